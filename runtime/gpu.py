"""What a GPU can do: whether PyTorch can use it, and how many answers it has room for."""
import os
import warnings
from pathlib import Path

import torch

from runtime.errors import BadInput

DRIVER = Path("/proc/driver/nvidia/version")           # there where NVIDIA's driver is loaded

def gpu_is_usable() -> bool:
    """Whether PyTorch can use a GPU. BadInput where there is a GPU that it cannot use: a 7B would train on
    the CPU, for weeks. DS_ACCELERATOR=cpu says that the CPU is meant, and so does CUDA_VISIBLE_DEVICES=,
    which DeepSpeed's launcher replaces."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""        # CUDA reads it when it is asked first: not yet
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")      # PyTorch does not raise: it returns False, and warns why
        usable = torch.cuda.is_available()
    has_gpu = DRIVER.exists() and any(Path("/dev").glob("nvidia[0-9]*"))
    warned = [str(warning.message) for warning in caught if "CUDA" in str(warning.message)]
    if usable or not (has_gpu or warned):
        return usable
    why = f"PyTorch {torch.__version__} is built for a CPU alone"
    if torch.version.cuda:
        why = f"PyTorch {torch.__version__} needs a driver for CUDA {torch.version.cuda}"
    if warned:
        why += f" ({warned[0].splitlines()[0]})"
    raise BadInput(f"there is a GPU that PyTorch cannot use: {why}; install the PyTorch for your driver, as "
                   f"with pip install torch --index-url https://download.pytorch.org/whl/cu126 "
                   f"(docs/clusters.md), or set DS_ACCELERATOR=cpu to compute on the CPU", everywhere=True)

def free_memory() -> int | None:
    """The bytes that new tensors can have on this rank's GPU: what no process holds, and what PyTorch keeps
    and does not use. None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

def answer_bytes(config: object, width: int, prompt: int, columns: int) -> float:
    """The bytes that an answer takes while it is generated in a text of so many columns, of which `prompt`
    are the prompt's. config: the network's LlamaConfig; width: the bytes of a number in the network."""
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * columns * width
    while_rows_leave = 1.25                  # KVCache.keep copies half of the rows, first their keys
    prompt_pass = 3 * (config.intermediate_size + config.hidden_size) * prompt * width
    groups = config.num_attention_heads // config.num_key_value_heads
    attention_mask = (2 + groups * width) * prompt * prompt        # bools, and what attention adds
    sampling = 5 * 4 * config.vocab_size     # logits, probabilities, their sums: float32
    return while_rows_leave * cache + prompt_pass + attention_mask + sampling

def rows_at_once(free: float, config: object, width: int, prompt: int, columns: int) -> int:
    """How many answers have room in so many free bytes at one time, at least one. A fifth is left free."""
    return max(1, int(0.8 * free / answer_bytes(config, width, prompt, columns)))
