"""Tokenizer files as they are written, for transformers: its AutoTokenizer gives BOS and the ids that were
trained with, whatever files the base brought.

AutoTokenizer reads tokenizer.json first. So every folder gets one, and no other file contradicts it. For a
SentencePiece model it is made here: that of transformers 5 would give other ids for two spaces in a row.
"""
import json
from contextlib import suppress
from pathlib import Path

from runtime.errors import BadInput
from runtime.folders import read_json
from runtime.tokenizer_convert import convert
from runtime.tokenizer_read import TokenizerFiles, open_backend, read_tokenizer

# The one template (data.render) for transformers' apply_chat_template, after BOS. An answer that ends the
# messages gets EOS, as in training.
CHAT_TEMPLATE = r"""
{%- set ns = namespace(system='', asked=false) -%}
{%- for message in messages -%}
    {%- set text = message['content'] | trim -%}
    {%- if message['role'] in ['system', 'developer'] -%}
        {%- set ns.system = ns.system ~ ('\n\n' if ns.system and text else '') ~ text -%}
    {%- elif message['role'] == 'user' -%}
        {{- '\n\nHuman: ' ~ (ns.system ~ '\n\n' if ns.system else '') ~ text -}}
        {%- set ns.system = '' -%}
        {%- set ns.asked = true -%}
    {%- elif message['role'] != 'assistant' -%}
        {{- raise_exception('the roles are system, user and assistant') -}}
    {%- elif ns.asked -%}
        {{- '\n\nAssistant: ' ~ text ~ (eos_token if loop.last and not add_generation_prompt else '') -}}
    {%- endif -%}
{%- endfor -%}
{{- '\n\nAssistant:' if add_generation_prompt else '' -}}
""".strip()

# The files of a tokenizer. The last two are never written: what they hold stands in the others.
NAMES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "chat_template.jinja"]

# Keys of a base's tokenizer_config.json with which transformers would not take tokenizer.json as it is.
NOT_KEPT = {"add_prefix_space", "added_tokens_decoder", "auto_map", "backend", "from_slow", "is_local",
            "legacy", "local_files_only", "name_or_path", "sp_model_kwargs", "special_tokens_map_file",
            "split_special_tokens", "tokenizer_file", "tokenizer_padding", "tokenizer_truncation"}

def copy_tokenizer(source: str | Path, path: str | Path,
                   model_folder: str | Path | None = None) -> TokenizerFiles:
    """Writes the tokenizer of the folder `source` into the folder `path`: the file that is read here, and
    those that transformers reads. Keys of the base's tokenizer_config.json that contradict nothing are kept.
    model_folder as for read_tokenizer."""
    files, path = read_tokenizer(source, model_folder), Path(path)
    is_json = isinstance(files.model, dict)
    raw = files.model if is_json else convert(files)
    content = complete(raw, files) if raw else None
    config, names = (read_or_nothing(files.file.parent / name) for name in NAMES[2:4])
    config = corrected(config, files, content) | {
        "tokenizer_class": "PreTrainedTokenizerFast" if content else "LlamaTokenizer",
        "add_bos_token": True, "add_eos_token": False, "add_prefix_space": prefix_space(content),
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": chat_template(content if is_json else None, files)}
    written = {"tokenizer_config.json": as_bytes(config, indent=2, sort_keys=True)}
    if content:
        written["tokenizer.json"] = as_bytes(content)
    if names:
        written["special_tokens_map.json"] = as_bytes(corrected(names, files, content), indent=2)
    if not is_json:
        written["tokenizer.model"] = files.file.read_bytes()
    path.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if name in written:
            (path / name).write_bytes(written[name])
        else:                                # another run's file would contradict the new ones
            (path / name).unlink(missing_ok=True)
    return files

def as_bytes(content: dict, **layout) -> bytes:
    return (json.dumps(content, ensure_ascii=False, **layout) + "\n").encode("utf-8", "replace")

def read_or_nothing(file: Path) -> dict:
    with suppress(BadInput):                 # it is missing, or damaged; then nothing of it is kept
        return read_json(file)
    return {}

def save_generation_config(path: str | Path, bos_id: int, eos_ids: list[int]):
    """Writes generation_config.json, so that transformers ends an answer where it ends here."""
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids}
    (Path(path) / "generation_config.json").write_text(json.dumps(ids) + "\n")

# ------------------------------------------------------------ the small files
def corrected(given: dict, files: TokenizerFiles, content: dict | None) -> dict:
    """tokenizer_config.json or special_tokens_map.json with the special tokens of training. Others stay if
    they are special in tokenizer.json too; if not, transformers would add them to the vocabulary."""
    known = [token["content"] for token in content["added_tokens"] if token.get("special")] if content else []

    def is_known(token):
        return (token.get("content") if isinstance(token, dict) else token) in known

    kept = {}
    for key, value in given.items():
        if key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(value, list):
                kept[key] = [token for token in value if is_known(token)]
        elif key not in NOT_KEPT and not (key.endswith("_token") and not is_known(value)):
            kept[key] = value
    ids = {"bos_token": files.bos_id, "eos_token": files.eos_ids[0], "unk_token": files.unk_id,
           "pad_token": files.pad_id}
    return kept | {key: files.pieces[i] for key, i in ids.items() if i is not None}

def prefix_space(content: dict | None) -> bool:
    """Whether the first step of a tokenizer.json says that it puts a space before a text. Where
    tokenizer_config.json says something else, transformers 4 changes this step."""
    step = (content or {}).get("pre_tokenizer")
    return isinstance(step, dict) and bool(step.get("add_prefix_space"))

def chat_template(content: dict | None, files: TokenizerFiles) -> str:
    """CHAT_TEMPLATE after BOS. Some tokenizer.json puts a space before a text, but not where the text follows
    a special token; then the template has this space."""
    spaces = [""]
    if content:
        bos, text = files.pieces[files.bos_id], "\n\nHuman: why?"
        encode = open_backend(files.file, content).encode
        alone = encode(text, add_special_tokens=False).ids
        spaces = [space for space in ("", " ")
                  if encode(bos + space + text, add_special_tokens=False).ids == [files.bos_id, *alone]]
    return "{{- bos_token" + " ~ ' '" * (spaces == [" "]) + " -}}\n" + CHAT_TEMPLATE

# ------------------------------------------------------------ tokenizer.json
def complete(raw: dict, files: TokenizerFiles) -> dict:
    """A tokenizer.json that puts BOS before a text, cuts and pads nothing, and has the special tokens of
    training among its added tokens."""
    bos = files.pieces[files.bos_id]
    added = {token["id"]: token for token in raw.get("added_tokens") or []}
    for i in {files.bos_id, files.eos_ids[0], files.pad_id, files.unk_id} - {None}:
        added[i] = {"id": i, "content": files.pieces[i], "single_word": False, "lstrip": False,
                    "rstrip": False, "normalized": False, "special": True}
    bos_a, bos_b = ({"SpecialToken": {"id": bos, "type_id": n}} for n in (0, 1))
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    template = {"type": "TemplateProcessing", "single": [bos_a, a], "pair": [bos_a, a, bos_b, b],
                "special_tokens": {bos: {"id": bos, "ids": [files.bos_id], "tokens": [bos]}}}
    return {**raw, "truncation": None, "padding": None, "model": {**raw["model"], "dropout": None},
            "added_tokens": [added[i] for i in sorted(added)], "post_processor": template}
