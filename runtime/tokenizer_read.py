"""Tokenizer files as they are read: SentencePiece's tokenizer.model, or the tokenizer.json of the package
tokenizers.

What others made is read within bounds and never run, and what is damaged is BadInput in one line. Special
tokens are BOS, EOS and the like. They come from the program alone: no text of a user may turn into one.
"""
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from runtime.errors import BadInput
from runtime.folders import read_json
from runtime.foreign import refuse_pointer

NAMES = ["tokenizer.model", "tokenizer.json"]           # the first of these that a folder has is read
MOST_BYTES = 2**28                           # of a tokenizer.model: it may be a file of weights by mistake
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")           # a line of such a file: base64, rank
NO_CHARACTER = "\ufdd0"                      # Unicode promises that this will never be a character

@dataclass
class TokenizerFiles:
    """What the tokenizer files of a folder say."""
    file: Path                               # tokenizer.model or tokenizer.json
    model: SentencePieceProcessor | dict     # of tokenizer.json its content
    pieces: list[str]                        # all tokens as text, in the order of their ids
    bos_id: int
    eos_ids: list[int]                       # all that end an answer; the first one is appended in training
    unk_id: int | None
    special_ids: set[int] = field(default_factory=set)             # of tokenizer.json: no text becomes these

    @property
    def pad_id(self) -> int:
        """The id with which transformers may pad: unk, else BOS, else another special token, but not an EOS
        where there is a choice. transformers takes a reward model's score at the last id that is not pad, and
        this should be EOS."""
        order = [self.unk_id, self.bos_id, *sorted(self.special_ids)]
        return next((i for i in order if i is not None and i not in self.eos_ids), self.bos_id)

def read_tokenizer(path: str | Path, model_folder: str | Path | None = None) -> TokenizerFiles:
    """Reads the tokenizer of a folder, or of a file. With tokenizer.json, the config.json and
    generation_config.json beside it and in model_folder say which other ids end an answer, and which id is
    BOS or EOS where no other file does."""
    file = find_tokenizer(path)
    if file.suffix != ".json":
        return read_sentencepiece(file)
    return read_tokenizer_json(file, [file.parent] + ([Path(model_folder)] if model_folder else []))

# ------------------------------------------------------------ which file
def choose_tokenizer(full: Path, adapter: Path | None) -> Path:
    """The folder whose tokenizer counts: an adapter's own comes before that of its base."""
    own = adapter and any((adapter / name).exists() for name in NAMES)
    return adapter if own else full

def find_tokenizer(path: str | Path) -> Path:
    """The file to read of a folder: tokenizer.model, or tokenizer.json if that is not there or is a tiktoken
    file. BadInput where there is none, or something else in its place."""
    file = Path(path)
    try:
        if file.is_dir():
            file = next((file / name for name in NAMES if (file / name).exists()), file / NAMES[0])
        if not file.exists():
            raise BadInput(f"{file}: there is no such file, and no {NAMES[1]} beside it; a model's folder "
                           f"brings one of the two")
        if TIKTOKEN.match(first_bytes(file)):
            if not file.with_name("tokenizer.json").exists():
                raise BadInput(f"{file}: is a tiktoken file, as Llama 3 has it, which is not read; copy the "
                               f"tokenizer.json of the model's Hugging Face folder beside it")
            file = file.with_name("tokenizer.json")
        refuse_pointer(file)
    except BadInput:                         # a BadInput is a ValueError too
        raise
    except (OSError, ValueError) as error:   # ValueError: a null character in the path
        raise BadInput(f"{file}: cannot be read ({getattr(error, 'strerror', error)})") from None
    return file

def first_bytes(file: Path) -> bytes:
    with open(file, "rb") as f:
        return f.read(1000)

# ------------------------------------------------------------ tokenizer.model
def read_sentencepiece(file: Path) -> TokenizerFiles:
    """The model itself names BOS and EOS. No other file is asked: those of old LLaMA folders are often
    wrong."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise OSError
        model = SentencePieceProcessor(model_file=str(file))
        pieces = model.id_to_piece(list(range(len(model))))        # ValueError where one is not UTF-8
    except (OSError, RuntimeError, ValueError):
        raise BadInput(f"{file}: is not a SentencePiece model; copy it again") from None
    bos_id, eos_id, unk_id = model.bos_id(), model.eos_id(), model.unk_id()
    if min(bos_id, eos_id) < 0:
        raise BadInput(f"{file}: has no BOS or no EOS; a LLaMA tokenizer has both")
    return TokenizerFiles(file, model, pieces, bos_id, [eos_id], unk_id if unk_id >= 0 else None)

# ------------------------------------------------------------ tokenizer.json
def read_tokenizer_json(file: Path, folders: list[Path]) -> TokenizerFiles:
    """folders: where to look for the other files, the tokenizer's own folder first."""
    raw = read_json(file)
    pieces = read_pieces(file, raw)
    ids = {piece: i for i, piece in enumerate(pieces)}
    added = {token["id"] for token in raw.get("added_tokens") or []}
    bos_id, eos_id = (special_id(name, ids, folders, added) for name in ("bos", "eos"))
    others = [i for folder in folders for name in ("generation_config.json", "config.json")
              for i in configured_ids(folder / name, "eos_token_id", len(ids))]
    unknown = [named_token(folders[0], "unk")[1], raw["model"].get("unk_token"), raw["model"].get("unk_id")]
    unk_ids = [ids.get(token) if isinstance(token, str) else token for token in unknown]
    unk_id = next((i for i in unk_ids if type(i) is int and 0 <= i < len(ids)), None)
    special = {token["id"] for token in raw.get("added_tokens") or []
               if token.get("special") or token["id"] in others}
    return TokenizerFiles(file, raw, pieces, bos_id, list(dict.fromkeys([eos_id, *others])), unk_id,
                          special_ids={bos_id, eos_id, unk_id, *special} - {None})

def read_pieces(file: Path, raw: dict) -> list[str]:
    """All tokens of a tokenizer.json in the order of their ids, which must be 0, 1, 2 and so on."""
    try:
        vocab, added = raw["model"]["vocab"], raw.get("added_tokens") or []
        is_list = not isinstance(vocab, dict)                      # of [piece, score]
        pairs = {(piece, i) for i, (piece, _) in enumerate(vocab)} if is_list else {*vocab.items()}
        pairs |= {(token["content"], token["id"]) for token in added}
        of_id = {i: piece for piece, i in pairs if isinstance(piece, str) and type(i) is int}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{file}: is not a tokenizer.json; the vocabulary or the added_tokens are missing or "
                       f"damaged") from None
    n = len(pairs)
    if not n or of_id.keys() != {*range(n)} or len({*of_id.values()}) != n:
        raise BadInput(f"{file}: its {n} tokens do not have the ids 0 to {n - 1}, one each; the vocabulary "
                       f"is damaged, copy it again")
    return [of_id[i] for i in range(n)]

def optional_json(file: Path) -> dict:
    return read_json(file) if file.exists() else {}

def named_token(folder: Path, name: str) -> tuple[Path | None, str | None]:
    """(file, token): which token a folder names as "bos", "eos" or "unk", and in which file."""
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        token = optional_json(file).get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            return file, str(token)
    return None, None

def configured_ids(file: Path, key: str, n: int) -> list[int]:
    """The ids, one or several, that config.json or generation_config.json has under a key, as far as they are
    ids of n tokens."""
    value = optional_json(file).get(key)
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and 0 <= i < n]

def special_id(name: str, ids: dict[str, int], folders: list[Path], added: set[int]) -> int:
    """The id of "bos" or "eos": of the token that a file names, or else the id in config.json, if it is an
    added token's. An ordinary word must not end an answer because config.json has a default."""
    for file, token in (named_token(folder, name) for folder in folders):
        if token is not None:
            if token not in ids:
                raise BadInput(f"{file}: {name}_token is {token!r}, which is not a token of tokenizer.json")
            return ids[token]
    for folder in folders:
        for i in configured_ids(folder / "config.json", f"{name}_token_id", len(ids)):
            if i in added:
                return i
    raise BadInput(f"{folders[0] / 'tokenizer_config.json'}: names no {name}_token, and config.json has no "
                   f"{name}_token_id among the tokenizer's special tokens; name the token in one of them")

# ------------------------------------------------------------ the package tokenizers
class JsonTokenizer:
    """A tokenizer.json with the methods of a SentencePieceProcessor that data.Tokenizer calls."""

    def __init__(self, files: TokenizerFiles):
        self.file, self.pieces = files.file, files.pieces
        self.special = files.special_ids
        renamed = {files.pieces[i]: f"{NO_CHARACTER}{i}" for i in self.special}
        try:
            content = bare(files.model, renamed)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{self.file}: is not a sound tokenizer.json ({error})") from None
        self.backend = open_backend(self.file, content)
        expected = {renamed.get(piece, piece): i for i, piece in enumerate(files.pieces)}
        if self.backend.get_vocab(with_added_tokens=True) != expected:
            raise BadInput(f"{self.file}: the ids of its added_tokens contradict its vocabulary")

    def encode(self, text: str) -> list[int]:
        with bad_input(self.file, "cannot encode a text"):         # such as a character without a token
            return self.backend.encode(text.replace(NO_CHARACTER, "\ufffd"), add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with bad_input(self.file, "cannot decode ids"):
            return self.backend.decode([i for i in ids if i not in self.special], skip_special_tokens=False)

    def id_to_piece(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]

def bare(raw: dict, renamed: dict[str, str]) -> dict:
    """The tokenizer.json without what cuts, pads and adds tokens, and with other names for special tokens,
    which no text can contain. With their own names, a "</s>" in a text could become EOS, as an added token or
    as a word of the vocabulary."""
    model, vocab = {**raw["model"], "dropout": None}, raw["model"]["vocab"]
    if model.get("merges") and model.get("continuing_subword_prefix"):
        raise ValueError("its merges have a continuing_subword_prefix, which no LLaMA has")
    if isinstance(vocab, dict):
        model["vocab"] = {renamed.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocab]
    if isinstance(model.get("merges"), list):
        if not all(vocab.keys() >= parts(merge) for merge in model["merges"]):
            raise ValueError("it merges pieces that are not in its vocabulary")
        model["merges"] = [merge for merge in model["merges"] if renamed.keys().isdisjoint(parts(merge))]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    added = [{**token, "content": renamed.get(token["content"], token["content"])}
             for token in raw.get("added_tokens") or []]
    return {**raw, "model": model, "added_tokens": added, "truncation": None, "padding": None,
            "post_processor": None}

def parts(merge: str | list[str]) -> set[str]:
    """The two pieces that byte-pair encoding merges, given as "a b" or ["a", "b"], and what they become."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return {*pair, "".join(pair)}

def open_backend(file: Path, content: dict):
    """The tokenizers.Tokenizer of this content."""
    try:
        import tokenizers
    except ImportError:
        raise BadInput(f"{file}: to read it: pip install tokenizers") from None
    with bad_input(file, "the package tokenizers cannot read it"):
        return tokenizers.Tokenizer.from_str(json.dumps(content))

@contextmanager
def bad_input(file: Path, what: str):
    """Turns what the package tokenizers raises, a bare Exception or a panic of Rust, into BadInput."""
    try:
        yield
    except BaseException as error:           # a panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BadInput(f"{file}: {what} ({error})") from None
