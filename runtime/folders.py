"""Hugging Face folders, and the OUT/ folder of a run: reading and writing weights and JSON.

What others made is read within bounds and never run: a file is looked at before memory is taken for it, and a
pickle is read only as weights. A disk that is full, or a folder that may not be written, is BadInput in one
line.
"""
import hashlib
import json
import os
import pickle
import shutil
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from runtime.errors import BadInput, note
from runtime.foreign import contents, refuse_pointer, refuse_quantised

MOST_JSON = 2**26                            # characters of a JSON file (64 MB): no config or index has more
SHARD_BYTES = 5 * 10**9                      # of weights in one file

# ------------------------------------------------------------ reading
def read_json(path: str | Path) -> dict:
    """The dictionary in a JSON file; BadInput where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise BadInput(f"{path}: is larger than any such file should be (64 MB)")
        value = json.loads(text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except BadInput:                         # a BadInput is a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise BadInput(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value

def find_tensors(path: str | Path) -> dict[str, Path]:
    """{name: file} of a folder's weights: safetensors or pytorch_model.bin, whole or in shards with an
    index."""
    path = Path(path)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (path / stem).exists():
            return dict.fromkeys(tensor_names(path / stem), path / stem)
        if (index := path / f"{stem}.index.json").exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{index}: has no weight_map")
            present = {p.name for p in path.iterdir() if p.is_file()}
            for file in set(map(str, weight_map.values())):
                if file not in present:      # this refuses a name that leads out of the folder, too
                    raise BadInput(f"{index}: names the shard {file!r}, which is not in the folder; copy it "
                                   f"again")
            return {name: path / str(file) for name, file in weight_map.items()}
    raise BadInput(f"{path}: has no weights (model.safetensors, pytorch_model.bin, or one of them in "
                   f"shards){contents(path)}")

def tensor_names(file: Path) -> list[str]:
    """The names of the tensors in a weight file."""
    return read_tensor(file, None)

def read_tensor(file: Path, name: str | None) -> Tensor | list[str]:
    """One tensor of a weight file, or with None their names. The file is mapped into memory anew each time:
    mapped pages count as resident, so one map for all tensors would make the peak twice the size of the
    model."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                return weights.get_tensor(name) if name else list(weights.keys())
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)   # runs no pickled code
        return weights[name] if name else list(weights)
    except pickle.UnpicklingError:
        refuse_pointer(file)
        raise BadInput(f"{file}: is damaged, or would run code when it is read; only weights are "
                       f"read") from None
    except Exception as error:               # torch.load raises errors of every kind on a damaged file
        refuse_pointer(file)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{file}: cannot be read as weights ({first}); it is damaged, copy it again") from None

def load_weights(module: nn.Module, path: str | Path, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu", optional: list[str] | tuple = ()) -> nn.Module:
    """Fills every parameter of a module on the meta device from the folder, one by one, cast to dtype. Only
    an `optional` one may be missing. Everything is checked before memory is taken."""
    files = find_tensors(path)
    parameters = {n: p for n, p in module.named_parameters() if n in files or n not in optional}
    check_weights(parameters, files, path)
    module.to(dtype).to_empty(device=device)
    if hasattr(module, "tie_weights"):
        module.tie_weights()                 # to_empty gives tied weights separate memory
    for name, parameter in module.named_parameters():
        if name in parameters:
            parameter.data.copy_(read_tensor(files[name], name))
    return module

def check_weights(parameters: dict[str, Tensor], files: dict[str, Path], path: str | Path):
    """BadInput where a weight is missing, has no place in the network, has another shape, or is quantised."""
    refuse_quantised(path, files)
    if missing := sorted(set(parameters) - set(files)):
        hint = " (it is a reward model)" if "score.weight" in files else ""
        raise BadInput(f"{path}: lacks {len(missing)} of the weights it should hold, such as "
                       f"{missing[0]}{hint}")
    if any(name.startswith("v_head.") for name in files):
        note(f"{path}: holds a value head (v_head) beside the model, which is left out")
    # old folders hold the rotary table, folders with a tied head hold the head twice
    harmless = ("rotary_emb.inv_freq", "lm_head.weight")
    if extra := [n for n in files if n not in parameters and not n.endswith(harmless)
                 and not n.startswith("v_head.")]:
        raise BadInput(f"{path}: holds {len(extra)} weights that config.json has no place for, such as "
                       f"{extra[0]}")
    for name, parameter in parameters.items():
        tensor = read_tensor(files[name], name)                    # mapped: its numbers are not read yet
        check_tensor(tensor, files[name], name, parameter.shape, "config.json")
    if read_json(Path(path) / "config.json").get("quantization_config"):
        note(f"{path}/config.json: has a quantization_config, but the weights are plain; they are read as "
             f"they are")

def check_tensor(tensor: object, file: Path, name: str, shape: tuple[int, ...], asker: str):
    """BadInput where what a file holds under a name is no tensor of real numbers of this shape, which `asker`
    asks for."""
    found, shape = tuple(getattr(tensor, "shape", ())), tuple(shape)
    is_real = isinstance(tensor, Tensor) and tensor.is_floating_point()
    if is_real and found == shape:
        return
    if is_real and name.endswith("score.weight") and len(found) == 2 and found[0] > 1:
        raise BadInput(f"{file}: {name} is {found}, a head of {found[0]} labels; a reward model has one: "
                       f"train it again with num_labels=1 (transformers' default is 2)")
    why = ""
    if isinstance(tensor, Tensor) and not is_real:
        why = "; quantised weights are not read (docs/data.md, Models that are read)"
    elif 0 in found:
        why = "; under ZeRO-3 weights are empty until they are gathered: gather them and save them again"
    raise BadInput(f"{file}: {name} is {found} of {getattr(tensor, 'dtype', 'no tensor')}, {asker} asks for "
                   f"{shape}{why}")

# ------------------------------------------------------------ writing
def save_weights(module: nn.Module, path: str | Path, config: dict):
    """Writes config.json and the parameters of module as safetensors, in shards above 5 GB."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for old in [*path.glob("model*.safetensors*"), *path.glob("pytorch_model*.bin*")]:
        old.unlink()                         # or these would be read instead of the new ones
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards, size = [[]], 0
    for name, parameter in module.named_parameters():    # a tied head is one parameter with one name
        size += parameter.nbytes
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = parameter.nbytes
        shards[-1].append((name, parameter))
    n = len(shards)
    names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    names = names if n > 1 else ["model.safetensors"]
    files = dict(zip(names, shards, strict=True))
    for file, shard in tqdm(files.items(), f"writing {path}", leave=False, disable=None):
        tensors = {name: p.detach().cpu().contiguous() for name, p in shard}
        save_file(tensors, path / file, metadata={"format": "pt"})
    if n > 1:
        index = {"metadata": {"total_size": sum(p.nbytes for shard in shards for _, p in shard)},
                 "weight_map": {name: file for file, shard in files.items() for name, _ in shard}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

@contextmanager
def writing(path: object, needed: int = 0, flag: str = ""):
    """Turns a full disk, a missing permission or a vanished folder into BadInput, with the path, the bytes
    that are needed and the bytes that are free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        there = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        free = shutil.disk_usage(there).free / 1e6
        room = f"; {max(1, needed / 1e6):,.0f} MB are needed, {free:,.0f} MB are free" if needed else ""
        raise BadInput(f"{flag}{path}: cannot be written ({why}){room}") from None

def write_whole(path: Path, text: str):
    """Writes a file so that at any moment the old one or the new one is there, never a part of one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    fingerprint(new, sync=True)
    new.replace(path)

def fingerprint(file: Path, sync: bool = False) -> list:
    """[size, SHA-256] of a file; with sync, the file is on the disk itself before this returns."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        while piece := f.read(2**24):
            digest.update(piece)
    return [file.stat().st_size, digest.hexdigest()]

# ------------------------------------------------------------ the OUT/ folder of a run
FILES = ["args.json", "config.json", "generation_config.json", "adapter_config.json", "metrics.jsonl",
         "samples.jsonl", "reward_stats.json", "curves.png", "wandb/run-id"]
FOLDERS = ["critic", "ema", "checkpoints", "tensorboard"]          # wandb/ may hold runs of other programs

def check_out(args: Namespace, *inputs: Path | None):
    """BadInput where --out is a folder that the run reads (`inputs`), or holds another run; before any
    weights load."""
    read = [folder.resolve() for folder in inputs if folder]
    if any((Path(args.out) / part).resolve() in read for part in ("", "critic", "ema")):
        raise BadInput(f"--out {args.out}: is a folder that this run reads; choose another")
    if dist.get_rank():                      # another machine's own disk may hold nothing but checkpoints
        return
    there = [name for name in [*FILES, "checkpoints", "tensorboard"] if (Path(args.out) / name).exists()]
    if there and args.resume and "args.json" not in there:
        raise BadInput(f"--out {args.out}: holds {there[0]}, but no run to resume; choose another folder, or "
                       f"--overwrite it without --resume")
    if there and not args.overwrite and not args.resume:
        raise BadInput(f"--out {args.out}: holds a run or a model already; choose another folder, --resume "
                       f"the run, or --overwrite it")
