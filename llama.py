"""The LLaMA network from scratch: the model, its KV cache, decoding, and reading and writing Hugging Face folders.

A decoder-only transformer (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288), layer by layer:
1. embed the ids
2. in each layer: RMSNorm, attention with rotary positions, add; RMSNorm, SwiGLU, add
3. a last RMSNorm, then the head gives one logit per word of the vocabulary

Shapes, in every file: B sequences, P prompt length, R response length, T = P + R, C width, H heads, D head size,
V vocabulary, N chosen places. `mask` (B,T) says which ids are real; padding is never told by an id's value.

    model = Llama.from_pretrained("some/llama/folder")
    response_ids, response_mask = model.generate(ids, mask, max_new_tokens=100, temperature=0.7)
"""
import functools
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from runtime.errors import BadInput
from runtime.folders import load_weights, read_json, save_weights

# ------------------------------------------------------------------------------------------------ configuration
# more than any LLaMA has, and little enough to look at
MOST = {"vocab_size": 2**24, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 2**10,
        "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12}

@dataclass
class LlamaConfig:
    """The keys of config.json that define the network, by Hugging Face's names; the defaults are LLaMA-7B's."""
    vocab_size: int = 32000
    hidden_size: int = 4096                  # C
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32            # H
    num_key_value_heads: int | None = None   # H for multi-head attention, fewer for grouped-query attention
    head_dim: int | None = None              # D, C / H where not given
    max_position_embeddings: int = 2048
    rms_norm_eps: int | float = 1e-6
    rope_theta: int | float = 10000.0
    rope_scaling: dict | None = None         # {"rope_type": "linear" or "llama3", "factor": ..., ...}
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_pretrained(cls, path):
        """Reads path/config.json of transformers 4 and 5; BadInput where a key asks for what is not done here."""
        where = Path(path) / "config.json"
        raw = read_json(where)
        # transformers 5 puts all of rope under one key; a reader of the old keys alone would fall back to 10,000
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise BadInput(f"{where}: rope_scaling is {rope!r}, expected an object")
        rope = {"rope_theta": raw.get("rope_theta") or cls.rope_theta, **rope}
        rope["rope_type"] = kind = rope.get("rope_type") or rope.pop("type", "default")
        llama3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        scaling = {"default": [], "linear": ["factor"], "llama3": llama3}
        allowed = {"model_type": ["llama"], "hidden_act": ["silu", None], "rope_type": list(scaling),
                   "partial_rotary_factor": [1, None], "sliding_window": [None], "quantization_config": [None]}
        for key, only in allowed.items():
            if (value := (raw | rope).get(key)) not in only:
                raise BadInput(f"{where}: {key} {value!r} is not supported (there is {', '.join(map(str, only))})")
        values = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if kind == "default" else rope}
        types = {f.name: f.type for f in fields(cls)} | dict.fromkeys(scaling[kind], int | float)
        for key in [*values, *scaling[kind]]:
            value = (rope | values).get(key)
            absurd = type(value) in (int, float) and not key.endswith("token_id") and not (
                0 < value <= MOST.get(key, 1e12))
            if absurd or not isinstance(value, types[key]) or type(value) is bool and types[key] is not bool:
                raise BadInput(f"{where}: {key} is {value!r}")
        config = cls(**values)
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise BadInput(f"{where}: num_attention_heads {config.num_attention_heads} must divide by "
                f"num_key_value_heads {config.num_key_value_heads}, and head_dim {config.head_dim} by 2")
        return config

    def to_dict(self, architecture="LlamaForCausalLM", dtype=torch.float32):
        """The dictionary for config.json, with the keys of transformers 4, which transformers 5 reads too."""
        # transformers pools a score at the last id that is not pad, so pad is the unknown word and never EOS
        labels = {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}, "pad_token_id": 0}
        return {"architectures": [architecture], "model_type": "llama", "hidden_act": "silu", **asdict(self),
                "torch_dtype": str(dtype)[6:], **(labels if "Classification" in architecture else {})}

# ------------------------------------------------------------------------------------------------ the network
class Linear(nn.Linear):
    """nn.Linear that starts at normal(0, 0.02), but not on meta: torch would import its compiler for it."""
    def reset_parameters(self):
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

class RMSNorm(nn.Module):
    """x / rms(x) * weight, the root mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

def rope_frequencies(config, device):
    """Angle per position of each of the D/2 pairs (Su et al. 2021, arXiv 2104.09864), scaled for long texts.
    In float32, computed anew each time: a buffer would be rounded with the model to bfloat16."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    freqs = 1.0 / config.rope_theta ** exponents                                # (D/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling["rope_type"] == "linear":
        return freqs / scaling["factor"]
    # llama3: long waves are slowed by the factor, short ones kept, those between blended
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * keep + freqs / scaling["factor"] * (1 - keep)

def rotate(x, cos, sin):
    """Rotary embedding of x (B,heads,T,D) by cos, sin (B,1,T,D/2); pairs are (i, i + D/2), as in HF's weights."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

class KVCache:
    """Keys and values of all layers for S columns, allocated once; the first `length` columns are filled. Where
    `column` (1,), a tensor, is set, the newest id goes there and all of `length` is read: in a CUDA graph."""
    def __init__(self, config, batch, columns, dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, columns, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.length, self.column = 0, None

    def extend(self, layer, k, v):
        """Writes k, v (B,Hkv,T,D) behind what is there and returns everything so far, as views."""
        if self.column is None:
            keys, values = (x[layer, :, :, :self.length + k.shape[2]] for x in (self.keys, self.values))
            keys[:, :, self.length:], values[:, :, self.length:] = k, v
        else:
            keys, values = (x[layer, :, :, :self.length] for x in (self.keys, self.values))
            keys.index_copy_(2, self.column, k)
            values.index_copy_(2, self.column, v)
        return keys, values

    def keep(self, rows):
        """Only these rows (n,) go on."""
        self.keys = self.keys[:, rows]       # one after the other: the old one is gone before the next is made
        self.values = self.values[:, rows]

class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        size, bias, self.D, self.index = config.hidden_size, config.attention_bias, config.head_dim, index
        self.q_proj = Linear(size, config.num_attention_heads * self.D, bias=bias)
        self.k_proj = Linear(size, config.num_key_value_heads * self.D, bias=bias)
        self.v_proj = Linear(size, config.num_key_value_heads * self.D, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * self.D, size, bias=bias)

    def forward(self, x, cos, sin, allowed, cache=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.D).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))         # (B, H or Hkv, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)                               # (B, Hkv, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(size, inner, bias=bias)
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))      # SwiGLU (arXiv 2002.05202)

class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, index), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, allowed, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, allowed, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

class Transformer(nn.Module):
    """ids, mask (B,T) -> hidden states (B,T,C); with a cache, ids are the newest T of the mask's S columns."""
    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False            # True: recompute layers in the backward pass
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        if not self.embed_tokens.weight.is_meta:
            nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids, mask, cache=None):
        T, S, mask = ids.shape[1], mask.shape[1], mask.bool()
        x = self.embed_tokens(ids)                                                          # (B, T, C)
        columns = torch.arange(S, device=ids.device)
        newest = columns[S - T:] if cache is None or cache.column is None else cache.column # (T,)
        # padding takes no position, so a text has the same positions alone and left-padded in a batch
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, newest]                            # (B, T)
        angles = positions[:, None, :, None] * rope_frequencies(self.config, ids.device)    # (B, 1, T, D/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        rows = newest[:, None]
        # a padded row may see itself, or its softmax over nothing would be NaN; nobody ever sees it
        allowed = ((columns <= rows) & mask[:, None, None, :]) | (columns == rows)          # (B, 1, T, S)
        # added to the attention's logits; as numbers, or each layer would turn the truth values into them anew
        allowed = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(~allowed, -math.inf)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                # non-reentrant, so that gradients flow where the input needs none (only LoRA is trained)
                x = checkpoint(layer, x, cos, sin, allowed, use_reentrant=False)
            else:
                x = layer(x, cos, sin, allowed, cache)
        if cache is not None:
            cache.length = S
        return self.norm(x)

class CapturedStep:
    """A decoding step, step(ids, mask, cache), as a CUDA graph: one call starts the thousand kernels that Python would
    take longer to start than the GPU to run. Its shapes are fixed, so attention reads the columns of a whole number of
    `block`s, those not yet filled masked; a wider graph is captured when they are full."""
    def __init__(self, step, stream, block=256):
        self.step, self.stream, self.block, self.cache = step, stream, block, None

    def __call__(self, ids, mask, cache, length):
        """The step of ids (B,1), the newest of `length` columns, of which mask (B,S) and cache have room for more."""
        width = min(-(-length // self.block) * self.block, mask.shape[1])
        if cache is not self.cache or width != cache.length or len(ids) != len(self.ids):
            self.cache, self.ids, self.mask = cache, ids.clone(), mask[:, :width]
            cache.column, cache.length = torch.full((1,), length - 1, device=ids.device), width
            self.capture()
        self.ids.copy_(ids)
        self.cache.column.fill_(length - 1)
        self.graph.replay()
        return self.out

    def run(self):
        return self.step(self.ids, self.mask, self.cache)

    def capture(self):
        """By PyTorch's recipe: warmed up on another stream, where libraries allocate what they need. That is the model's
        own: cuBLAS keeps a workspace per stream, which a graph of another model would take away."""
        self.graph = None                    # the one before frees its memory first
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.run()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: nccl's watchdog may ask about its events meanwhile
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.out = self.run()

class Llama(nn.Module):
    """The language model: `model`, the transformer, and `lm_head`; the state-dict keys are Hugging Face's."""
    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.stream = None                   # of its CUDA graphs
        self.n_words = config.vocab_size     # ids from here on are never sampled: set it to the tokenizer's size
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings and self.lm_head is not None:     # none in a reward model that lora.py merges
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, mask, at=None):
        """Logits (B,T,V) of the next id; with at (B,T) bool only those there, (N,V) row by row: the head is most
        of the work of a small model, and training needs it at few places."""
        hidden = self.model(ids, mask)
        return self.lm_head(hidden if at is None else hidden[at])

    def next_logits(self, ids, mask, cache, head=None):
        """Float32 logits (B,V) of what follows ids (B,T), the newest of the mask's columns. head: lm_head's weight in
        columns (C,V)."""
        hidden = self.model(ids, mask, cache)[:, -1]
        logits = self.lm_head(hidden) if head is None else thin_product(hidden, head)
        return logits[:, :self.n_words].float()

    @torch.inference_mode()                  # no_grad, less its bookkeeping: a tenth of a token's time at B = 1
    def decode(self, ids, mask, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos_id=None,
               uniforms=None, together=False):
        """Yields the new ids (B,) of each step for left-padded prompts ids, mask (B,P), 0 after a row's eos_id.
        Ends when all rows have. temperature 0 is greedy, top_k 0 and top_p 1 are off. uniforms (B,max_new_tokens)
        in [0,1) are each row's random numbers, by default torch's. together: all ranks take as many steps as the
        longest, since ZeRO-3's module calls wait for all."""
        B, P = ids.shape
        cache = KVCache(self.config, B, P + max_new_tokens, self.model.norm.weight.dtype, ids.device)
        mask = torch.cat([mask.bool(), mask.new_ones(B, max_new_tokens, dtype=torch.bool)], dim=1)
        if uniforms is None and temperature > 0:
            uniforms = torch.rand(B, max_new_tokens, device=ids.device)
        captured = None
        if ids.is_cuda and not together:
            self.stream = self.stream or torch.cuda.Stream()
            captured = CapturedStep(self.next_logits, self.stream)
        # on a CPU the head, most of a small model, is read two to three times as fast from columns
        in_columns = ids.device.type == "cpu" and type(self.lm_head) is Linear and not together
        # a piece at a time, or the copy itself would take several times as long
        head = torch.cat([part.t() for part in self.lm_head.weight.split(256)], dim=1) if in_columns else None
        rows = torch.arange(B, device=ids.device)                                   # those that are still computed
        alive = torch.ones_like(rows, dtype=torch.bool)
        for t in range(max_new_tokens):
            if captured and t:
                logits = captured(ids, mask, cache, P + t)
            else:
                logits = self.next_logits(ids, mask[:, :P + t], cache, head)        # the prompt once, then one id
            new = alive * sample(logits, temperature, top_k, top_p, None if temperature == 0 else uniforms[rows, t])
            yield new.new_zeros(B).index_copy(0, rows, new)
            alive = alive if eos_id is None else alive & (new != eos_id)
            n_alive = int(alive.sum())
            if not any_alive(n_alive, together):
                return
            ids = new[:, None]
            if 2 * n_alive <= len(rows):     # half have ended: the others go on alone (under `together` one stays)
                keep = alive.nonzero().squeeze(1) if n_alive else torch.zeros_like(rows[:1])
                rows, alive, ids, mask = (x[keep] for x in (rows, alive, ids, mask))
                cache.keep(keep)

    def generate(self, ids, mask, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos_id=None,
                 uniforms=None, together=False):
        """decode, collected: response_ids, response_mask (B,R); after a row's eos_id come id 0 and mask 0."""
        steps = list(self.decode(ids, mask, max_new_tokens, temperature, top_k, top_p, eos_id, uniforms, together))
        response = torch.stack(steps, dim=1) if steps else ids[:, :0]               # (B, R)
        ends = (response == (-1 if eos_id is None else eos_id)).long()
        response_mask = ends.cumsum(1) - ends == 0                                  # no end before this column
        longest = int(response_mask.any(0).sum())                                   # other ranks may have gone on
        return response[:, :longest], response_mask[:, :longest]

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Reads a full Hugging Face folder; BadInput where a file is missing, broken or does not fit."""
        if not (Path(path) / "config.json").exists() and (Path(path) / "adapter_config.json").exists():
            raise BadInput(f"{path}: is an adapter, not a full model; read it with lora.load_model")
        config = LlamaConfig.from_pretrained(path)
        with torch.device("meta"):           # no memory until the weights are there, and no time for random numbers
            model = cls(config)
        return load_weights(model, path, dtype, device)

    def save_pretrained(self, path):
        """Writes config.json and safetensors; transformers' AutoModelForCausalLM loads the folder."""
        save_weights(self, path, self.config.to_dict("LlamaForCausalLM", self.lm_head.weight.dtype))

# ------------------------------------------------------------------------------------------------ sampling
def sample(logits, temperature, top_k, top_p, uniforms):
    """One id per row, (B,), from float32 logits (B,V): the first whose cumulative probability exceeds the row's
    uniform. Exact, many times faster than torch.multinomial over 32,000 words, and no row depends on another."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits if temperature == 1 else logits / temperature
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:                            # the smallest set of words that holds top_p (arXiv 1904.09751)
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
        outside = probs.cumsum(-1) - probs >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -math.inf)
    cumulative = logits.softmax(-1).cumsum(-1)                                      # (B, V)
    total = cumulative[:, -1:]               # 1 up to rounding; strictly below it no word of probability 0 is met
    target = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)    # NaN

@functools.cache
def onednn_is_float32():
    """Whether PyTorch's "medium" precision, oneDNN on a CPU, keeps float32 here: one with matrix units for bfloat16
    would use these. A product tells."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(2, 256, 512, generator=torch.Generator().manual_seed(0))
    error = (F.linear(a, b) - F.linear(a.double(), b.double())).abs().max()
    torch.set_float32_matmul_precision(before)
    return bool(error < 1e-3)

def thin_product(x, columns):
    """x (n,C) of few rows times columns (C,V), by oneDNN: up to three times as fast as MKL. Only here, for what else a
    network multiplies gains nothing, and PyTorch's fused attention is slower by oneDNN."""
    before = torch.get_float32_matmul_precision()
    if x.dtype == torch.float32 and onednn_is_float32():
        torch.set_float32_matmul_precision("medium")
    y = x @ columns
    torch.set_float32_matmul_precision(before)
    return y

def any_alive(n_alive, together):
    """Whether a row is still going on, on this rank or (together) on any."""
    if together and dist.is_initialized():
        flag = torch.tensor(n_alive, device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
    return n_alive > 0
