"""Turns the public 260K-parameter TinyStories LLaMA, a checkpoint of llama2.c, into a Hugging Face folder.

The folder gets config.json, model.safetensors, tokenizer.model and greedy.txt, the published text that the
model must say. The script needs torch, numpy and safetensors.

1. get stories260K.bin and tok512.bin from https://huggingface.co/karpathy/tinyllamas, folder stories260K
2. python tests/stories260k.py stories260K.bin tok512.bin DATA/stories260k
3. RLHF_TEST_DATA=DATA ./run.sh test
"""
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

# what it says from BOS on, 199 tokens, taking the likeliest each time, as published in llama2.c's test_all.py
GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\nLily's mom "
    "said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I want "
    "to play with your ball, but I can't find it.\"\nLily was sad and didn't know what to do. She "
    "said, \"I'm sorry, Lily. I didn't know what to do.\"\nLily didn't want to help her mom, so")


# ------------------------------------------------------------------------------------------------ weights
def permute(weight, n_heads):
    """The rows of each head in Hugging Face's order: it rotates the pairs (i, i + D/2), and llama2.c rotates
    the pairs (2i, 2i + 1)."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_checkpoint(path):
    """The config.json and the state dict of a llama2.c checkpoint: 7 numbers, then every matrix, all layers
    of a kind together, in float32."""
    raw = Path(path).read_bytes()
    width, inner, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    if vocab < 0:
        raise ValueError(f"{path}: has a head of its own (a negative vocabulary); "
                         "only a shared one is read here")
    flat, at, D = torch.from_numpy(np.frombuffer(raw[28:], "<f4").copy()), 0, width // heads

    def take(*shape):
        nonlocal at
        at += math.prod(shape)
        return flat[at - math.prod(shape):at].reshape(shape)

    embedding = take(vocab, width)
    stacks = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": take(layers, heads * D, width),
        "self_attn.k_proj": take(layers, kv_heads * D, width),
        "self_attn.v_proj": take(layers, kv_heads * D, width),
        "self_attn.o_proj": take(layers, width, heads * D),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, inner, width), "mlp.down_proj": take(layers, width, inner),
        "mlp.up_proj": take(layers, inner, width)}
    norm = take(width)
    take(context * D)                        # the rotary table, which every loader computes anew
    if at != len(flat):
        raise ValueError(f"{path}: holds {len(flat)} numbers, its header asks for {at}")

    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm, "lm_head.weight": embedding}
    for kind, stack in stacks.items():
        for i, weight in enumerate(stack):
            if kind.endswith(("q_proj", "k_proj")):
                weight = permute(weight, heads if kind.endswith("q_proj") else kv_heads)
            state[f"model.layers.{i}.{kind}.weight"] = weight
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab,
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": context, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32"}
    return config, {name: weight.clone().contiguous() for name, weight in state.items()}


# ------------------------------------------------------------------------------------------------ tokenizer
def varint(number):
    """A whole number in protobuf's coding: seven bits a byte, lowest first; a negative one as its 64-bit
    complement."""
    number &= 2**64 - 1
    head = b""
    while number > 127:
        head += bytes([number & 127 | 128])
        number >>= 7
    return head + bytes([number])


def field(number, value):
    """One field of a protobuf message, written by hand: SentencePiece's own classes would need another
    package."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def read_tokenizer(path, vocab):
    """The bytes of a SentencePiece BPE model, laid out as LLaMA's own, pieces and scores from llama2.c's
    file."""
    NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
    raw, at, model = Path(path).read_bytes(), 4, b""     # the first number is the length of the longest piece
    for i in range(vocab):
        score, size = struct.unpack("<fi", raw[at:at + 8])
        piece, kind, at = raw[at + 8:at + 8 + size], NORMAL, at + 8 + size
        if i < 3:                            # llama2.c wrote line breaks around them
            piece, kind, score = (b"<unk>", b"<s>", b"</s>")[i], UNKNOWN if i == 0 else CONTROL, 0.0
        elif i < 259:
            piece, kind, score = b"<0x%02X>" % (i - 3), BYTE, 0.0
        model += field(1, field(1, piece.replace(b" ", "\u2581".encode())) + field(2, score) + field(3, kind))
    if at != len(raw):
        raise ValueError(f"{path}: holds {len(raw)} bytes, {vocab} pieces end at {at}")
    # numbered as in sentencepiece_model.proto: BPE, digits apart, byte fallback, unk 0, BOS 1, EOS 2, no pad
    trainer = {3: 2, 4: vocab, 25: 1, 26: 1, 35: 1, 40: 0, 41: 1, 42: 2, 43: -1}
    normalizer = {1: b"identity", 3: 1, 4: 0, 5: 1}      # a space before the text, and no other change
    for number, spec in ((2, trainer), (3, normalizer)):
        model += field(number, b"".join(field(n, value) for n, value in spec.items()))
    return model


def main(checkpoint, tokenizer, out):
    config, state = read_checkpoint(checkpoint)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(read_tokenizer(tokenizer, config["vocab_size"]))
    (out / "greedy.txt").write_text(GREEDY)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
