"""Hugging Face folders and the OUT/ folder of a run: reading and writing weights and JSON."""
import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.errors import BadInput

def read_json(path):
    """The dictionary in a JSON file; BadInput where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(2**26 + 1)
        if len(text) > 2**26:
            raise BadInput(f"{path}: is larger than any such file should be (64 MB)")
        value = json.loads(text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:                  # BadInput too is a ValueError
        raise error if isinstance(error, BadInput) else BadInput(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value

SHARD_BYTES = 5 * 10**9

def find_tensors(path):
    """name -> file of a folder's weights: safetensors or pytorch_model.bin, whole or in shards with an index."""
    path = Path(path)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (path / stem).exists():
            return dict.fromkeys(read_tensor(path / stem), path / stem)
        if (index := path / f"{stem}.index.json").exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{index}: has no weight_map")
            present = {p.name for p in path.iterdir() if p.is_file()}
            for file in set(map(str, weight_map.values())):
                if file not in present:      # nor can it lead out of the folder
                    raise BadInput(f"{index}: names the shard {file!r}, which is not in the folder; copy it again")
            return {name: path / str(file) for name, file in weight_map.items()}
    raise BadInput(f"{path}: has no weights (model.safetensors, pytorch_model.bin, or one of them in shards)")

def read_tensor(file, name=None):
    """One tensor of a weight file, or with no name the list of its names; no pickled code is ever run. The file is
    mapped anew each time: mapped pages count as resident, and one map for all would peak at twice the model."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                return weights.get_tensor(name) if name else list(weights.keys())
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return weights[name] if name else list(weights)
    except Exception as error:               # torch.load meets a damaged file with errors of every kind
        if code := re.search(r"GLOBAL (\S+)|global (\S+)", str(error)):
            raise BadInput(f"{file}: asks to run {code[1] or code[2]} when it is read, so it is not only weights, and is "
                           f"not read") from None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{file}: cannot be read as weights ({first}); it is damaged, copy it again") from None

def load_weights(module, path, dtype=torch.float32, device="cpu", optional=()):
    """Fills every parameter of module, which is on meta, from the folder, cast, one by one; only an optional one may be
    missing. All is checked before any memory is taken."""
    files = find_tensors(path)
    parameters = {n: p for n, p in module.named_parameters() if n in files or n not in optional}
    if missing := sorted(set(parameters) - set(files)):
        hint = " (it is a reward model)" if "score.weight" in files else ""
        raise BadInput(f"{path}: lacks {len(missing)} of the weights it should hold, such as {missing[0]}{hint}")
    # old folders carry the rotary table, tied ones the head twice; anything else would be dropped in silence
    harmless = ("rotary_emb.inv_freq", "lm_head.weight")
    if extra := [n for n in files if n not in parameters and not n.endswith(harmless)]:
        raise BadInput(f"{path}: holds {len(extra)} weights that config.json has no place for, such as {extra[0]}")
    for name, parameter in parameters.items():
        tensor = read_tensor(files[name], name)                    # mapped; its numbers are not read yet
        found, asked = tuple(getattr(tensor, "shape", ())), tuple(parameter.shape)
        if found != asked or not tensor.is_floating_point():
            raise BadInput(f"{files[name]}: {name} is {found} of {getattr(tensor, 'dtype', 'no tensor')}, config.json asks "
                           f"for {asked}")
    module.to(dtype).to_empty(device=device)
    if hasattr(module, "tie_weights"):
        module.tie_weights()                 # to_empty parts them
    for name, parameter in module.named_parameters():
        if name in parameters:
            parameter.data.copy_(read_tensor(files[name], name))
    return module

def save_weights(module, path, config):
    """Writes config (a dictionary) and the parameters of module as safetensors, in shards above 5 GB."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for old in [*path.glob("model*.safetensors*"), *path.glob("pytorch_model*.bin*")]:
        old.unlink()                                               # or they would be read instead of the new ones
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards, size = [[]], 0
    for name, parameter in module.named_parameters():              # a tied head is one parameter, and named once
        size += parameter.nbytes
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = parameter.nbytes
        shards[-1].append((name, parameter))
    n = len(shards)
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)] if n > 1 else ["model.safetensors"]
    for file, shard in zip(names, shards):
        save_file({n: p.detach().cpu().contiguous() for n, p in shard}, path / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(p.nbytes for s in shards for _, p in s)},
                 "weight_map": {n: file for file, shard in zip(names, shards) for n, _ in shard}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

def copy_tokenizer(source, path):
    """Copies the tokenizer's files, and adds what AutoTokenizer needs to give the same ids where it is missing."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                 "tokenizer.json"):
        if (Path(source) / name).exists():
            (path / name).write_bytes((Path(source) / name).read_bytes())
    if not (path / "tokenizer_config.json").exists():
        (path / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "add_bos_token": True, "add_eos_token": False}, indent=2) + "\n")

WRITTEN = ["args.json", "config.json", "adapter_config.json", "metrics.jsonl", "samples.jsonl", "reward_stats.json",
           "curves.png"]

PARTS = ["critic", "ema", "checkpoints"]

def check_folders(args, adapter, *folders):
    """BadInput where --out is a folder that is read, or holds another run, or where --lora-rank asks for an adapter
    on an adapter; before any weights load."""
    if args.lora_rank and adapter:
        raise BadInput(f"--lora-rank: {adapter} is an adapter already, which is trained on; leave the flag out")
    read = [folder.resolve() for folder in (adapter, *folders) if folder]
    if any((Path(args.out) / part).resolve() in read for part in ("", "critic", "ema")):
        raise BadInput(f"--out {args.out}: is a folder that this run reads; choose another")
    if dist.get_rank():                      # its machine may have another disk, with nothing but checkpoints
        return
    there = [name for name in [*WRITTEN, "checkpoints"] if (Path(args.out) / name).exists()]
    if there and args.resume and "args.json" not in there:
        raise BadInput(f"--out {args.out}: holds {there[0]}, but no run to resume; choose another folder, or --overwrite it "
                       f"without --resume")
    if there and not args.overwrite and not args.resume:
        raise BadInput(f"--out {args.out}: holds a run or a model already; choose another folder, --resume the run, or "
                       f"--overwrite it")

@contextmanager
def writing(path, needed=0, flag=""):
    """What a full disk, a missing permission or a vanished folder raise becomes BadInput, with the path, how many bytes are
    needed and how many are left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:      # torch and safetensors wrap the system's errors
        if isinstance(error, RuntimeError) and not re.search("writ|inline_container", str(error)):
            raise
        there = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
        free, why = shutil.disk_usage(there).free, getattr(error, "strerror", None) or str(error).splitlines()[0]
        if "inline_container" in why and free < needed:            # torch.save speaks of positions
            why = os.strerror(errno.ENOSPC)
        room = f"; {max(1, needed / 1e6):,.0f} MB are needed, {free / 1e6:,.0f} MB are free" if needed else ""
        raise BadInput(f"{flag}{path}: cannot be written ({why}){room}") from None

def write_whole(path, text):
    """Writes a file so that at any moment the old one or the new one is there, never a part."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    fingerprint(new, sync=True)
    new.replace(path)

def fingerprint(file, sync=False):
    """[size, SHA-256] of a file; sync: it is on the disk itself before this returns."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        while piece := f.read(2**24):
            digest.update(piece)
    return [file.stat().st_size, digest.hexdigest()]
