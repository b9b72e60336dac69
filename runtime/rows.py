"""Rows of data files: JSON lines, a JSON array, either of them gzipped, or parquet; and folders of these.

The content of a file decides its format, the ending of its name does not. Reads are bounded, because a small
gzip file may unpack to terabytes and a damaged file may have no line ends.
"""
import codecs
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runtime.errors import BadInput, note
from runtime.foreign import refuse_pointer

MAX_LINE_BYTES = 2**25                       # one line of JSON lines
MAX_ARRAY_BYTES = 2**29                      # a whole JSON array, which is parsed at once
# Of the files in a folder: those with data, those about the data, and those that might hold data too.
DATA = re.compile(r"\.(json|jsonl|ndjson|parquet)(\.gz)?$", re.IGNORECASE)
ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
OTHERS = re.compile(r"\.(csv|tsv|txt|arrow|zst|xz|zip|tar|gz)$", re.IGNORECASE)
SPLITS = re.compile(r"(?:^|[_.-])(train|test|val|eval|dev|held|hold)(?:ing|id|idation|uation|out)?"
                    r"(?=[_.\d-]|$)", re.IGNORECASE)
# Formats of which one is often a copy of the other: the hub's own parquet (0000.parquet), parquet, and JSON.
FORMATS = [re.compile(ending, re.IGNORECASE) for ending in (r"^\d{4}\.parquet$", r"\.parquet(\.gz)?$", "")]
# What to do with files of other formats.
CSV = "pandas' read_csv and to_json(orient='records', lines=True) make JSON lines of a csv file"
ARROW = "load it with datasets and save it by to_parquet"
# How files of other formats begin, and what to do with them.
PACKED = {b"PK\x03\x04": "is a zip archive; unpack it", b"\xfd7zXZ": "is packed by xz; unpack it",
          b"\x28\xb5\x2f\xfd": "is packed by zstd; unpack it",
          b"\xff\xfe": "is UTF-16 text; save it as UTF-8", b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
          b"ARROW1": f"is an arrow file; {ARROW}", b"\xff" * 4: f"is an arrow file; {ARROW}"}

# ------------------------------------------------------------ files
def data_files(path: str | Path) -> list[Path]:
    """The data files that a path stands for: itself, or all in a folder and below it, such as the shards of
    a downloaded data set. BadInput where rows of different splits, or the same rows twice, would be mixed."""
    if not str(path):
        raise BadInput("--data: an empty path")
    path = Path(path)
    if not path.is_dir():
        return [path]
    inside = [file for file in sorted(path.rglob("*")) if not file.is_dir() and file.name not in ABOUT
              and not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in inside if DATA.search(file.name)]
    others = [file.name for file in inside if OTHERS.search(file.name) and file not in files]
    if not files:
        endings = {Path(name).suffix.lower() for name in others}
        hint = f"; {ARROW}" if ".arrow" in endings else f"; {CSV}" if endings & {".csv", ".tsv"} else ""
        raise BadInput(f"{path}: cannot be read: a folder without data files (.json, .jsonl, .parquet){hint}")
    if others:
        note(f"{path}: files that are not read: {', '.join(others[:10])}")
    splits, formats, snapshots, stems = {}, {}, set(), {}
    for file in files:
        parts = file.relative_to(path).parts
        splits |= {found[1].lower(): file for part in parts if (found := SPLITS.search(DATA.sub("", part)))}
        snapshots |= {after for before, after in itertools.pairwise(parts) if before == "snapshots"}
        formats[next(ending for ending in FORMATS if ending.search(file.name))] = file
        stems.setdefault(file.with_name(DATA.sub("", file.name)), []).append(file)
    twice = next((both for both in stems.values() if len(both) > 1), [])
    for several, what in ((splits.values(), "files of several splits"), (snapshots, "several snapshots"),
                          (twice, "the same file in several formats"),
                          (formats.values(), "files of several formats, which may be the same rows twice")):
        if len(several) > 1:
            names = " and ".join(map(str, several))
            raise BadInput(f"{path}: holds {what}, such as {names}; name those that you mean")
    return files

def data_sizes(paths: list[str]) -> dict[str, int]:
    """{name: size in bytes} of data files, by which a later step knows the same file again."""
    return {str(file.relative_to(Path(path).parent)): file.stat().st_size
            for path in paths for file in data_files(path)}

# ------------------------------------------------------------ rows
def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yields (where, row); where is the file with the number of the line or row, for messages."""
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: is not a file")
        with open(path, "rb") as file:
            head = file.read(30)
            refuse_pointer(path)
            for start, what in PACKED.items():
                if head.startswith(start):
                    raise BadInput(f"{path}: {what}")
            if head[:4] == b"PAR1":
                yield from read_parquet(path)
                return
            file.seek(0)
            yield from read_json_rows(path, gzip.GzipFile(fileobj=file) if head[:2] == b"\x1f\x8b" else file)
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{path}: cannot be read: there is no such file{hub_hint(path)}") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None

def hub_hint(path: Path) -> str:
    """What to do where a path looks like the name of a data set on the Hugging Face hub."""
    if str(path).startswith(("http:/", "https:/", "hf:/")):
        return "; nothing is downloaded here: download it first"
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) or DATA.search(path.name):
        return ""
    return (f"; nothing is downloaded here: a data set of the hub comes by `hf download {path} --repo-type "
            f"dataset --local-dir {path.name}`, then --data {path.name}")

def read_json_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    """The rows of a JSON array, of JSON lines, or a single object over several lines."""
    start = file.peek(64)
    if start.startswith(codecs.BOM_UTF8):    # Windows writes this mark at the start of a file
        file.read(len(codecs.BOM_UTF8))
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        text = decode_json(path, file.read(MAX_ARRAY_BYTES + 1), MAX_ARRAY_BYTES)
        yield from ((f"{path}, row {n}", row) for n, row in enumerate(parse_json(path, text), 1))
        return
    is_first = True
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        where = f"{path}:{number}"
        text = decode_json(where, line, MAX_LINE_BYTES)
        if not text.strip():
            continue
        if is_first and text.rstrip()[-1] in "{[,":                # one object, written over many lines
            text += decode_json(path, file.read(MAX_ARRAY_BYTES + 1), MAX_ARRAY_BYTES)
        yield where, parse_json(where, text)
        is_first = False

def decode_json(where: str | Path, piece: bytes, most: int) -> str:
    if len(piece) > most:
        raise BadInput(f"{where}: is longer than {most >> 20} MB; it should hold a row per line")
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: is not UTF-8 text (byte {error.start})") from None

def parse_json(where: str | Path, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:      # RecursionError: thousands of nested brackets
        hint = "" if text.lstrip()[:1] in ("{", "[") else "; a line should be a JSON object"
        hint += f"; {CSV}" if hint and str(where).endswith(":1") else ""
        raise BadInput(f"{where}: is not JSON ({error}){hint}") from None

def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a parquet file, which only the package pyarrow can read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path}: is a parquet file; to read it: pip install pyarrow") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise BadInput(f"{path}: is a damaged parquet file ({str(error).splitlines()[0]})") from None
    yield from ((f"{path}, row {n}", row) for n, row in enumerate(rows, 1))
