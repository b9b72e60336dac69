"""The LLaMA network from scratch: the model, its KV cache, decoding, and reading and writing Hugging Face
folders.

A decoder-only transformer (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288), layer by layer:
1. embed the ids
2. in each layer: RMSNorm, attention with rotary positions, add; RMSNorm, SwiGLU, add
3. a last RMSNorm, then the head gives one logit per word of the vocabulary

Shapes, in every file: B sequences, P prompt length, R response length, T = P + R, C width, H heads, D head
size, V vocabulary, N chosen places. `mask` (B,T) says which ids are real; the value of an id never marks
padding.

    model = Llama.from_pretrained("some/llama/folder")
    response_ids, response_mask = model.generate(ids, mask, max_new_tokens=100, temperature=0.7)
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runtime.errors import BadInput
from runtime.folders import load_weights, read_json, save_weights
from runtime.foreign import what_instead
from runtime.speed import attention_bias, faster_step, fewest_rows

# ------------------------------------------------------------ configuration
@dataclass
class LlamaConfig:
    """The keys of config.json that define the network, as Hugging Face names them. Defaults: LLaMA-7B."""
    vocab_size: int = 32000
    hidden_size: int = 4096                  # C
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32            # H
    num_key_value_heads: int | None = None   # H for multi-head attention, fewer for grouped-query attention
    head_dim: int | None = None              # D, C / H where not given
    max_position_embeddings: int = 2048
    max_sequence_length: int | None = None   # the context, where rope_scaling makes it longer
    rms_norm_eps: int | float = 1e-6
    rope_theta: int | float = 10000.0
    rope_scaling: dict | None = None         # {"rope_type": "linear" or "llama3", "factor": ..., ...}
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    pad_token_id: int | None = 0             # for transformers alone: here the mask tells what is padding

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def context(self) -> int:
        """The most tokens that a text may have. Linear scaling stretches the positions of the model that was
        trained; with llama3 scaling, max_position_embeddings counts the stretched ones already."""
        if self.rope_scaling is None or self.rope_scaling["rope_type"] != "linear":
            return self.max_position_embeddings
        return self.max_sequence_length or int(self.max_position_embeddings * self.rope_scaling["factor"])

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LlamaConfig":
        """Reads path/config.json of transformers 4 or 5. BadInput where it asks for what is not done here."""
        file = Path(path) / "config.json"
        if not file.exists():
            raise BadInput(f"{file}: is missing; {what_instead(Path(path))}")
        raw = read_json(file)
        rope = read_rope(file, raw)
        for key, values in IMPLEMENTED.items():
            value = rope.get(key, raw.get(key))
            if value not in values:
                implemented = ", ".join(map(str, values))
                raise BadInput(f"{file}: {key} {value!r} is not supported (there is {implemented})")

        given = {field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None}
        given["rope_theta"] = rope.pop("rope_theta")
        given["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        for field in fields(cls):
            if field.name in given:
                check_value(file, field.name, given[field.name], field.type)
        for key in ROPE_NUMBERS[rope["rope_type"]]:
            check_value(file, key, rope.get(key), int | float)

        if "max_sequence_length" in given:   # the first LLaMA folders have this key alone
            given.setdefault("max_position_embeddings", given["max_sequence_length"])
        config = cls(**given)
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise BadInput(f"{file}: num_attention_heads {config.num_attention_heads} must divide by "
                f"num_key_value_heads {config.num_key_value_heads}, and head_dim {config.head_dim} by 2")
        return config

    def to_dict(self, architecture: str = "LlamaForCausalLM", dtype: torch.dtype = torch.float32) -> dict:
        """The dictionary for config.json, with the keys of transformers 4, which transformers 5 reads too."""
        config = {"architectures": [architecture], "model_type": "llama", "hidden_act": "silu",
                  **asdict(self), "torch_dtype": str(dtype).removeprefix("torch.")}
        if "Classification" in architecture:
            # transformers takes the score at the last id that is not the pad id. With EOS as pad it would
            # miss the end of every answer, so pad is another token, such as the unknown word.
            return config | {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        del config["pad_token_id"]           # of a language model, transformers would hide it in prompts
        return config

# The largest values that are accepted from a config.json. They are far above those of any LLaMA; without
# them, a damaged or malicious file could make this program ask for more memory than the machine has.
LARGEST = {"vocab_size": 2**24, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 2**10,
           "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12}
LARGEST_OTHER = 1e12                         # of all other numbers

# The kinds of rotary positions, each with the numbers that it needs in rope_scaling.
ROPE_NUMBERS = {"default": [], "linear": ["factor"],
                "llama3": ["factor", "low_freq_factor", "high_freq_factor",
                           "original_max_position_embeddings"]}

# Keys that change the result, each with the values that are implemented here. None: the key is absent.
IMPLEMENTED = {"model_type": ["llama"], "hidden_act": ["silu", None], "rope_type": list(ROPE_NUMBERS),
               "partial_rotary_factor": [1, None], "sliding_window": [None]}

def read_rope(file: Path, raw: dict) -> dict:
    """The rotary part of a config.json as one dictionary: rope_type, rope_theta and the numbers of that type.
    transformers 4 has rope_theta and rope_scaling; transformers 5 has all of it under rope_parameters."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadInput(f"{file}: rope_scaling is {rope!r}, expected an object")
    if by_kind := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise BadInput(f"{file}: rope_parameters of their own for {by_kind[0]} are not supported")
    rope = {"rope_theta": raw.get("rope_theta") or LlamaConfig.rope_theta, **rope}
    if not rope.get("rope_type"):
        rope["rope_type"] = rope.pop("type", "default")            # the older name of the key
    return rope

def check_value(file: Path, key: str, value: object, kind: type):
    """BadInput where a value of config.json is not of its kind, or is a number outside (0, LARGEST]."""
    is_bool = isinstance(value, bool)                              # Python counts True and False as ints
    right_kind = isinstance(value, kind) and is_bool == (kind is bool)
    is_size = isinstance(value, int | float) and not is_bool and not key.endswith("token_id")
    if not right_kind or is_size and not 0 < value <= LARGEST.get(key, LARGEST_OTHER):
        raise BadInput(f"{file}: {key} is {value!r}")

# ------------------------------------------------------------ the network
class Linear(nn.Linear):
    """nn.Linear whose weight starts at normal(0, 0.02). On the meta device, which holds no numbers, it draws
    none: PyTorch would import its compiler for that call."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the root mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if x.is_cuda:                        # up to rounding the same, in one kernel without float32 copies
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

def rope_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """(D/2,): the angle in radians by which each pair of numbers turns from one position to the next (Su et
    al. 2021, arXiv 2104.09864). It is computed anew each time, in float32: model.to(bfloat16) would round a
    stored buffer."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    freqs = 1.0 / config.rope_theta ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling["rope_type"] == "linear":
        return freqs / scaling["factor"]
    # llama3: a pair that makes many turns within the original context keeps its frequency. A pair that makes
    # few turns gets its frequency divided by the factor. Between the two bounds, the frequency is a weighted
    # mean of both.
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)          # the weight of the original frequency
    return freqs * unscaled + freqs / scaling["factor"] * (1 - unscaled)

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of numbers (i, i + D/2) of x (B,heads,T,D) by its angle: (a, b) becomes (a cos - b sin,
    b cos + a sin). cos, sin (B,1,T,D) have the angle at both numbers of a pair. The weights of Hugging Face
    folders are ordered for these pairs."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin

class KVCache:
    """Keys and values of all layers, (layers,B,Hkv,S,D) each, allocated once. `length` columns are filled.

    `column` is None in ordinary use: new keys are appended, and attention reads the filled columns. In a CUDA
    graph (runtime/speed.py) no shape may change from step to step. There `column` (1,) is a tensor with the
    column of the newest id, and attention always reads `length` columns; the mask hides the columns that are
    not filled yet."""

    def __init__(self, config: LlamaConfig, batch: int, columns: int, dtype: torch.dtype,
                 device: str | torch.device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, columns, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.length, self.column = 0, None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the newest keys and values k, v (B,Hkv,T,D) of a layer, and returns those of the whole text
        so far, (B,Hkv,S,D), as views."""
        if self.column is None:
            keys, values = (x[layer, :, :, :self.length + k.shape[2]] for x in (self.keys, self.values))
            keys[:, :, self.length:], values[:, :, self.length:] = k, v
        else:
            keys, values = (x[layer, :, :, :self.length] for x in (self.keys, self.values))
            keys.index_copy_(2, self.column, k)
            values.index_copy_(2, self.column, v)
        return keys, values

    def keep(self, rows: Tensor):
        """Keeps these rows (n,) of the batch and drops the others."""
        self.keys = self.keys[:, rows]       # first the keys alone, so that the old ones are freed at once
        self.values = self.values[:, rows]

class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        size, bias, self.D, self.index = config.hidden_size, config.attention_bias, config.head_dim, index
        self.q_proj = Linear(size, config.num_attention_heads * self.D, bias=bias)
        self.k_proj = Linear(size, config.num_key_value_heads * self.D, bias=bias)
        self.v_proj = Linear(size, config.num_key_value_heads * self.D, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * self.D, size, bias=bias)

    def forward(self, x, cos, sin, bias, cache=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.D).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))         # (B, H or Hkv, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)                               # (B, Hkv, S, D)
        # G = H / Hkv heads share their keys and values (arXiv 2305.13245). Their queries stand one below the
        # other as G * T queries of one head, so nothing is copied for each of them.
        grouped = q.reshape(B, k.shape[1], -1, self.D)                          # (B, Hkv, G * T, D)
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias)
        return self.o_proj(y.reshape(q.shape).transpose(1, 2).reshape(B, T, -1))

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

    def forward(self, x, cos, sin, bias, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

class Transformer(nn.Module):
    """The network without its head: ids, mask (B,T) -> hidden states (B,T,C). With a cache, mask is (B,S) and
    ids are the newest T of its S columns."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        torch.backends.cuda.enable_cudnn_sdp(False)      # with a mask, NaN gradients: pytorch issue 196678
        self.config = config
        self.checkpointing = False           # True: recompute each layer in the backward pass, to save memory
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        if not self.embed_tokens.weight.is_meta:
            nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor, cache: KVCache | None = None) -> Tensor:
        T, S, mask = ids.shape[1], mask.shape[1], mask.bool()
        x = self.embed_tokens(ids)                                                          # (B, T, C)
        columns = torch.arange(S, device=ids.device)
        newest = columns[S - T:] if cache is None or cache.column is None else cache.column  # (T,)
        # padding takes no position, so a text has the same positions alone and left-padded in a batch
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, newest]                            # (B, T)
        angles = positions[:, None, :, None] * rope_frequencies(self.config, ids.device)    # (B, 1, T, D/2)
        angles = torch.cat([angles, angles], dim=-1)     # (B, 1, T, D): a pair has one angle
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        # Each column sees the real columns up to itself. Padding on the left would see nothing, and a softmax
        # over nothing is NaN. So every column also sees itself; real columns still see no padding.
        rows = newest[:, None]
        allowed = ((columns <= rows) & mask[:, None, None, :]) | (columns == rows)          # (B, 1, T, S)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads         # G
        bias = attention_bias(allowed, groups, x.dtype)                                     # (B, 1, G * T, S)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                # With LoRA, x needs no gradient at first, and reentrant checkpointing would give none at all.
                x = checkpoint(layer, x, cos, sin, bias, use_reentrant=False)
            else:
                x = layer(x, cos, sin, bias, cache)
        if cache is not None:
            cache.length = S
        return self.norm(x)

class Llama(nn.Module):
    """The language model: `model`, the transformer, and `lm_head`. The state-dict keys are Hugging Face's."""
    architecture = "LlamaForCausalLM"        # for config.json; lora.py merges reward models, too

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.model = config, Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.n_words = config.vocab_size     # set it to the tokenizer's size: larger ids are never sampled
        self.stream = None                   # used by faster_step
        self.tie_weights()

    def tie_weights(self):
        """Lets a tied head share the embedding's weight. (lora.py merges reward models without lm_head.)"""
        if self.config.tie_word_embeddings and self.lm_head is not None:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits (B,T,V) for ids, mask (B,T): column t predicts the id at t + 1. With `at` (B,T) bool: logits
        (N,V) of the N columns where it is true, row by row. Training needs few columns, and the head is most
        of a small model's work."""
        hidden = self.model(ids, mask)
        return self.lm_head(hidden if at is None else hidden[at])

    def next_logits(self, ids: Tensor, mask: Tensor, cache: KVCache, head=None) -> Tensor:
        """Float32 logits (B,V) of the id that follows ids (B,T), the newest columns of mask (B,S). `head`, a
        function, takes the place of lm_head where it is given."""
        hidden = self.model(ids, mask, cache)[:, -1]
        return (head or self.lm_head)(hidden)[:, :self.n_words].float()

    @torch.inference_mode()                  # a tenth faster than no_grad for one row
    def decode(self, ids: Tensor, mask: Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int = 0, top_p: float = 1.0, eos_id: int | list[int] | None = None,
               uniforms: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the new ids (B,) of each step, for left-padded prompts ids, mask (B,P), until all rows end.

        temperature: 0 takes the likeliest id. top_k 0 and top_p 1 restrict nothing. eos_id: the id, or ids,
        that end a row, whose later ids are 0; with None no row ends. uniforms (B,max_new_tokens) in [0,1):
        the random numbers of each row, by default from torch's generator."""
        B, P = ids.shape
        cache = KVCache(self.config, B, P + max_new_tokens, self.model.norm.weight.dtype, ids.device)
        mask = torch.cat([mask.bool(), mask.new_ones(B, max_new_tokens, dtype=torch.bool)], dim=1)
        if uniforms is None and temperature > 0:
            uniforms = torch.rand(B, max_new_tokens, device=ids.device)
        next_logits = faster_step(self, ids.device)
        rows = torch.arange(B, device=ids.device)                # the rows that are still computed
        alive = torch.ones_like(rows, dtype=torch.bool)          # which of these rows have not ended
        for t in range(max_new_tokens):
            logits = next_logits(ids, mask[:, :P + t], cache)    # of the prompt, then of one id a step
            uniform = None if temperature == 0 else uniforms[rows, t]
            new = alive * sample(logits, temperature, top_k, top_p, uniform)
            yield new.new_zeros(B).index_copy(0, rows, new)
            alive = alive & ~is_eos(new, eos_id)
            n_alive = int(alive.sum())
            if n_alive == 0:
                return
            ids = new[:, None]
            # once half of the rows have ended, compute the others alone
            if 2 * n_alive <= len(rows) and len(rows) > fewest_rows(ids.device):
                keep = alive.nonzero().squeeze(1)
                rows, alive, ids, mask = (x[keep] for x in (rows, alive, ids, mask))
                cache.keep(keep)

    def generate(self, ids: Tensor, mask: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, eos_id: int | list[int] | None = None,
                 uniforms: Tensor | None = None, watch: Callable = iter) -> tuple[Tensor, Tensor]:
        """Collects what decode yields: response_ids, response_mask (B,R). An EOS belongs to its answer; after
        it come id 0 and mask 0. R is the length of the longest answer. watch goes round the steps."""
        steps = self.decode(ids, mask, max_new_tokens, temperature, top_k, top_p, eos_id, uniforms)
        steps = list(watch(steps))
        response = torch.stack(steps, dim=1) if steps else ids[:, :0]       # (B, R)
        ends = is_eos(response, eos_id).long()
        return response, ends.cumsum(1) - ends == 0                         # no EOS before this column

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu") -> "Llama":
        """Reads a full Hugging Face folder. BadInput where a file is missing, broken or does not fit."""
        if not (Path(path) / "config.json").exists() and (Path(path) / "adapter_config.json").exists():
            raise BadInput(f"{path}: is an adapter, not a full model; read it with lora.load_model")
        config = LlamaConfig.from_pretrained(path)
        with torch.device("meta"):           # no memory, and no random numbers, before the weights are read
            model = cls(config)
        return load_weights(model, path, dtype, device)

    def save_pretrained(self, path: str | Path):
        """Writes config.json and safetensors. transformers' AutoModelForCausalLM loads the folder."""
        save_weights(self, path, self.config.to_dict(self.architecture, self.model.norm.weight.dtype))

# ------------------------------------------------------------ sampling
def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, uniforms: Tensor | None) -> Tensor:
    """One id per row, (B,), from float32 logits (B,V) and a random number per row, uniforms (B,) in [0,1):
    the first id whose cumulative probability exceeds it. This is exact, takes a small part of
    torch.multinomial's time for 32,000 words, and no row depends on another. With temperature 0 it is the
    likeliest id, and uniforms may be None."""
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
    # Rounding makes the last sum a little more or less than 1, so the random number is scaled by this total.
    # It must be smaller than the total, or a word of probability 0 could be chosen. nextafter gives the next
    # smaller number.
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # NaN logits give the id V, which has no embedding. The last valid id takes its place; the loss is then
    # NaN, and the run stops with a message that says so.
    return ids.clamp(max=logits.shape[-1] - 1)

def is_eos(ids: Tensor, eos_id: int | list[int] | None) -> Tensor:
    """Where ids, of any shape, are eos_id, or one of several; nowhere with None."""
    eos_ids = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else eos_id
    found = torch.zeros_like(ids, dtype=torch.bool)
    for eos in eos_ids:
        found = found | (ids == eos)
    return found
