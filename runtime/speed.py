"""What makes a run faster and changes no result: a decoding step in fewer calls, and memory that is kept.

A decoding step is a function next_logits(ids, mask, cache, head=None): it reads the newest ids (B,T) of the
text that mask (B,S) covers, extends the cache, and returns the logits (B,V) of what follows. `head` stands in
for the model's own head.
"""
import ctypes
import functools
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

def faster_step(model: nn.Module, device: torch.device) -> Callable[..., Tensor]:
    """model.next_logits in the form that decodes fastest on this device; its arguments and results are the
    same. model.stream keeps the CUDA stream of the model's graphs from one call to the next."""
    if device.type == "cuda":
        model.stream = model.stream or torch.cuda.Stream()
        return CapturedStep(model.next_logits, model.stream)
    has_adapter = any(model.lm_head.children())                    # a copy of the weights would leave it out
    if device.type == "cpu" and not has_adapter:
        return functools.partial(model.next_logits, head=head_in_columns(model.lm_head.weight))
    return model.next_logits

def fewest_rows(device: torch.device) -> int:
    """A batch of so few rows stays as it is when rows of it end. On a GPU, a step of few rows takes the time
    of reading the weights, and another number of rows needs a new graph."""
    return 16 if device.type == "cuda" else 1

# ------------------------------------------------------------ attention
def attention_bias(allowed: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """What attention adds to its logits, (B,1,G*T,S): 0 where allowed (B,1,T,S) is true and -inf elsewhere,
    G times one below the other. It is made once, because every layer would convert bools again.

    In memory each row has a multiple of 8 numbers. Otherwise PyTorch's attention on a GPU would copy the bias
    in every layer, and keep each copy for the backward pass."""
    B, _, T, S = allowed.shape
    bias = torch.zeros(B, 1, groups * T, -(-S // 8) * 8, dtype=dtype, device=allowed.device)[..., :S]
    return bias.masked_fill_(~allowed.repeat(1, 1, groups, 1), -math.inf)

# ------------------------------------------------------------ decoding on a GPU
# The bytes that must be free on the GPU before a capture. A graph needs some memory of its own, and during
# the capture PyTorch cannot give free memory of its cache back to the GPU (pytorch issue 159594).
ROOM = 2**30

class CapturedStep:
    """A decoding step as a CUDA graph. One step is about a thousand kernels, and Python takes longer to start
    them than the GPU takes to run them; a graph starts all of them in one call.

    All shapes in a graph are fixed. So attention always reads whole blocks of the cache's columns, as far as
    there are any, and causality hides those that are not filled yet. When the columns are full, a wider graph
    is captured."""

    def __init__(self, step: Callable[..., Tensor], stream: torch.cuda.Stream, block: int = 256):
        self.step, self.stream, self.block, self.cache = step, stream, block, None

    def __call__(self, ids: Tensor, mask: Tensor, cache) -> Tensor:
        if cache.length == 0:                # the prompt: long, and read only once
            return self.step(ids, mask, cache)
        length, columns = mask.shape[1], cache.keys.shape[3]
        width = min(-(-length // self.block) * self.block, columns)
        if cache is not self.cache or width != cache.length or len(ids) != len(self.ids):
            self.cache, self.ids = cache, ids.clone()
            self.mask = F.pad(mask, (0, width - length), value=True)         # new ids are never padding
            cache.column, cache.length = torch.full((1,), length - 1, device=ids.device), width
            self.capture()
        self.ids.copy_(ids)
        self.cache.column.fill_(length - 1)
        self.graph.replay()
        return self.logits

    def run(self) -> Tensor:
        return self.step(self.ids, self.mask, self.cache)

    def capture(self):
        """Captures the graph as PyTorch's documentation says: the step first runs once on another stream,
        where libraries allocate what they need. Each model has its own stream, because cuBLAS keeps one
        workspace per stream, and the graph of one model must not use the workspace of another. For the same
        reason no two decodes of one model may be alive together: when one graph is destroyed, PyTorch frees
        the workspace of its stream, which the other graph still uses (pytorch issue 193402)."""
        self.graph = None                    # frees the memory of the graph before
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.run()
        torch.cuda.current_stream().wait_stream(self.stream)
        # torch.cuda.graph always empties the cache. That takes longer than many steps, and the next training
        # step would have to allocate its memory anew.
        if torch.cuda.mem_get_info()[0] < ROOM:
            torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream), capturing(self.graph):
            self.logits = self.run()

@contextmanager
def capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """The kernels that the body starts become the graph. Meanwhile Python's garbage collector is off, because
    it could destroy another graph."""
    collects = gc.isenabled()
    gc.disable()
    try:
        # thread_local: the watchdog thread of NCCL may make CUDA calls during the capture
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
    finally:
        if collects:
            gc.enable()

# ------------------------------------------------------------ decoding on a CPU
def head_in_columns(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The head, weight (V,C), as a function from hidden states (n,C) of few rows to logits (n,V). It reads a
    copy of the weight in columns (C,V), which a CPU reads two to three times as fast. The head is most of a
    small model."""
    # the copy is made from small pieces: transposed in one piece it would take several times as long
    columns = torch.cat([part.t() for part in weight.split(256)], dim=1)
    return lambda hidden: thin_product(hidden, columns)

def thin_product(x: Tensor, columns: Tensor) -> Tensor:
    """x (n,C) times columns (C,V), for few rows n. oneDNN takes as little as a third of MKL's time for this
    product. The network's other products gain nothing from oneDNN, and PyTorch's fused attention is slower
    with it."""
    before = torch.get_float32_matmul_precision()
    if x.dtype == torch.float32 and onednn_is_float32():
        torch.set_float32_matmul_precision("medium")
    y = x @ columns
    torch.set_float32_matmul_precision(before)
    return y

@functools.cache
def onednn_is_float32() -> bool:
    """Whether PyTorch's precision "medium", which chooses oneDNN on a CPU, still computes in float32 on this
    machine. A processor with matrix units for bfloat16 computes in bfloat16 instead. The error of a product
    shows which."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(2, 256, 512, generator=torch.Generator().manual_seed(0))
    error = (F.linear(a, b) - F.linear(a.double(), b.double())).abs().max()
    torch.set_float32_matmul_precision(before)
    return bool(error < 1e-3)

# ------------------------------------------------------------ memory on a CPU
def keep_memory():
    """From now on, glibc keeps the memory that this program frees. By default it returns every large block to
    the system, which fills the next one with zeros, page by page: a quarter of the time of a training step on
    a CPU. The price is up to a quarter more memory."""
    tell_allocator("mallopt", -4, 0)         # M_MMAP_MAX: take no block from the system by itself
    tell_allocator("mallopt", -1, -1)        # M_TRIM_THRESHOLD: give none back

def give_back_memory():
    """Returns free memory to the system once. Free pieces between blocks in use would otherwise add up."""
    tell_allocator("malloc_trim", 0)

def tell_allocator(function: str, *numbers: int):
    """Calls a function of glibc's allocator. On other systems, whose allocators lack the function, nothing
    happens."""
    with suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*numbers)
