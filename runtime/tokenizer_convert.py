"""A SentencePiece model as the content of a tokenizer.json, which gives the same ids.

A tokenizer.model is a protobuf message (sentencepiece_model.proto). The few fields that matter are read by
hand: nothing else here needs Google's package for such messages.
"""
import base64
import re
from collections import defaultdict

from runtime.tokenizer_read import TokenizerFiles

NORMAL, USER_DEFINED = 1, 4                  # kinds of pieces; others are unknown, control, unused and byte
UNIGRAM, BPE = 1, 2                          # kinds of models; others are of whole words or of characters

def convert(files: TokenizerFiles) -> dict | None:
    """The content of tokenizer.json for a SentencePiece model. None for models that no LLaMA has, such as
    those of words or characters."""
    try:
        proto = read_message(files.model.serialized_model_proto())
        trainer, normalizer = (read_message(last(proto, n, b"")) for n in (2, 3))
        kinds = [last(read_message(piece), 3, NORMAL) for piece in proto[1]]
    except (IndexError, KeyError, TypeError):
        return None                          # a field is of another type than it should be
    kind, byte_fallback = last(trainer, 3, UNIGRAM), bool(last(trainer, 35, 0))
    space_is_written, space_is_suffix = last(normalizer, 5, 1), last(trainer, 24, 0)
    is_whole = len(kinds) == len(files.pieces)
    if kind not in (UNIGRAM, BPE) or not space_is_written or space_is_suffix or not is_whole:
        return None
    scores = files.model.get_score(list(range(len(kinds))))
    whole = [piece for piece, kind in zip(files.pieces, kinds, strict=True) if kind == USER_DEFINED]
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    puts_space = last(normalizer, 3, 1)
    if kind == UNIGRAM:
        model = {"type": "Unigram", "unk_id": files.unk_id, "byte_fallback": byte_fallback,
                 "vocab": [*zip(files.pieces, scores, strict=True)]}
    else:
        model = {"type": "BPE", "unk_token": None if files.unk_id is None else files.pieces[files.unk_id],
                 "fuse_unk": True, "byte_fallback": byte_fallback, "ignore_merges": bool(whole),
                 "vocab": {piece: i for i, piece in enumerate(files.pieces)},
                 "merges": merges(files.pieces, scores, kinds)}
    return {"version": "1.0", "added_tokens": [], "normalizer": normalizers(normalizer),
            "pre_tokenizer": isolate(whole) if whole else None, "model": model,
            "decoder": {"type": "Sequence", "decoders": decoders if puts_space else decoders[:3]}}

def merges(pieces: list[str], scores: list[float], kinds: list[int]) -> list[str]:
    """The merges of byte-pair encoding, "a b", in their order: SentencePiece merges two neighbours if both
    together are a piece, the pair of the highest score first."""
    normal = {piece: i for i, piece in enumerate(pieces) if kinds[i] == NORMAL}
    found = [(-scores[i], i, piece[:at], piece[at:])
             for piece, i in normal.items() for at in range(1, len(piece))
             if piece[:at] in normal and piece[at:] in normal]
    return [f"{left} {right}" for *_, left, right in sorted(found)]

def normalizers(normalizer: dict[int, list]) -> dict:
    """What is done to a text before it is divided, in SentencePiece's order."""
    steps = []
    if table := last(normalizer, 2, b""):    # such as NFKC
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()})
    if last(normalizer, 4, 1):               # spaces at the ends, and several in a row
        steps += [{"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
                  for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " "))]
    if last(normalizer, 3, 1):               # a space before the text
        steps.append({"type": "Prepend", "prepend": "▁"})
    return {"type": "Sequence",
            "normalizers": [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}

def isolate(pieces: list[str]) -> dict:
    """Cuts a text around these pieces, which SentencePiece never divides or merges; the longest comes
    first."""
    pattern = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

# ------------------------------------------------------------ protobuf
def read_message(message: bytes) -> dict[int, list]:
    """{number of a field: its values} of a protobuf message. A value is an int, or bytes: a float, a text, or
    another message."""
    at, fields = 0, defaultdict(list)

    def varint() -> int:                     # seven bits a byte, the lowest first
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            fields[key >> 3].append(varint())
        else:
            size = {1: lambda: 8, 2: varint, 5: lambda: 4}[key & 7]()
            fields[key >> 3].append(message[at:at + size])
            at += size
    return fields

def last(fields: dict[int, list], number: int, default: object) -> object:
    """The value of a field that stands once; of several, the last counts."""
    return fields[number][-1] if fields[number] else default
