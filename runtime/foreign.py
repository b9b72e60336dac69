"""What a path is that is no model's folder here, and how to go on: said in one line.

Models come as Git LFS pointers, in the hub's cache, in Meta's or llama.cpp's format, as a name on the hub, as
a folder of checkpoints. "There is no config.json" would be true of most of them and help nobody.
"""
import os
import re
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import BadInput

META = ("convert it with transformers 4: python -m transformers.models.llama.convert_llama_weights_to_hf "
        "--input_dir {folder} --model_size SIZE --output_dir DIR")
ADAPTER = "merge it with python lora.py {path} --out DIR, and give DIR"

# What a folder may hold: the files, what that is, and how to go on. {path} is the folder, {found} the first
# such file in it, {folder} that file's folder.
FORMATS = [
    ("consolidated*", "Meta's own format ({found})", META),
    ("*/consolidated*", "Meta's own format ({found})", META),
    ("*.gguf", "llama.cpp's format ({found})", "take the Hugging Face folder that it was made from"),
    ("*.msgpack", "Flax weights ({found})", "transformers 4 reads them with from_flax=True; save_pretrained "
     "then writes safetensors"),
    ("*.h5", "TensorFlow weights ({found})", "transformers 4 reads them with from_tf=True; save_pretrained "
     "then writes safetensors"),
    ("zero_to_fp32.py", "a checkpoint in DeepSpeed's parts", "put it together with python "
     "{path}/zero_to_fp32.py {path} DIR"),
    ("adapter_config.json", "an adapter", ADAPTER),
    ("adapter_model.*", "an adapter's weights ({found}) without adapter_config.json", "copy that file too"),
    ("*-00001-of-*.safetensors", "shards without model.safetensors.index.json", "copy that file too"),
    ("*-00001-of-*.bin", "shards without pytorch_model.bin.index.json", "copy that file too"),
]

def refuse_pointer(file: str | Path):
    """BadInput where a Git LFS pointer, or a web page, stands in place of a file."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(100)
    except OSError:
        return
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise BadInput(f"{file}: is a Git LFS pointer, which stands for a file that was not downloaded; run "
                       f"`git lfs pull` in {Path(file).parent}")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise BadInput(f"{file}: is a web page in place of the file; download the file itself")

def what_instead(path: Path) -> str:
    """What a path is instead of a full model's folder, and how to go on: a line that begins with the path."""
    if not os.path.exists(path):
        line = f"{path}: there is no such folder"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not os.path.exists(path.parent):
            line += (f", and nothing is downloaded here; if this is a name on the Hugging Face hub, run hf "
                     f"download {path} --local-dir DIR (hf auth login first, if it is gated) and give DIR")
        return line
    if path.suffix == ".gguf":
        return f"{path}: is in llama.cpp's format; take the Hugging Face folder that it was made from"
    if not path.is_dir():
        return f"{path}: is a file; give the folder, {path.parent}"
    if (path / "adapter_config.json").exists():
        return f"{path}: is an adapter, not a full model; {ADAPTER.format(path=path)}"
    if inside := models_inside(path):
        more = f" (and {len(inside) - 3} more)" if len(inside) > 3 else ""
        names = ", ".join(map(str, inside[:3]))
        return f"{path}: holds no model itself; give the folder inside: {names}{more}"
    return f"{path}: has no config.json{contents(path)}"

def contents(path: Path) -> str:
    """What a folder holds in place of what is read here, and how to go on; "" where that is not known."""
    for file in ("config.json", "model.safetensors", "pytorch_model.bin"):
        if (path / file).is_symlink() and not (path / file).exists():
            return f"; its {file} is a link to what is not there; copy the folder with cp -rL, without links"
    for pattern, what, how in FORMATS:
        if found := sorted(path.glob(pattern)):
            words = {"path": path, "found": found[0].relative_to(path), "folder": found[0].parent}
            return f"; it holds {what}: {how}".format(**words)
    return ""

def models_inside(path: Path) -> list[Path]:
    """The model folders in a folder of checkpoints or in the hub's cache, the latest first."""
    def latest(folder):
        number = re.search(r"\d+$", folder.name) if "checkpoint" in folder.name else None
        main = folder.parent.parent / "refs" / "main"              # of the hub's cache: the snapshot in use
        is_main = main.is_file() and main.read_text(errors="replace").strip() == folder.name
        return is_main, int(number[0]) if number else -1, folder.stat().st_mtime

    patterns = ("*", "snapshots/*", "models--*/snapshots/*", "hub/models--*/snapshots/*")
    found = {file.parent for pattern in patterns for name in ("config.json", "adapter_config.json")
             for file in path.glob(f"{pattern}/{name}")}
    return sorted(found, key=latest, reverse=True)

# ------------------------------------------------------------ quantised weights
# The names that bitsandbytes, GPTQ, AWQ, fp8, HQQ, AQLM and compressed-tensors give to their numbers.
QUANTISED = re.compile(
    r"\.(SCB|weight_format|absmax|quant_map|quant_state\..*|qweight|qzeros|scales|g_idx|W_q|codes|codebooks"
    r"|input_scale|weight_(scale|scale_inv|scales|packed|shape|zero_point))$")

def refuse_quantised(path: str | Path, names: Iterable[str]):
    """BadInput where tensors have the names that a method of quantisation gives to its numbers."""
    if found := [name for name in names if QUANTISED.search(name)]:
        raise BadInput(f"{path}: its weights are quantised ({found[0]}); take the folder that it was made "
                       f"from, or let transformers write plain weights (docs/data.md, Models that are read)")
