"""The toy's tokenizer and base model: a LLaMA of about a million parameters, pre-trained on the world's
texts.

The base model is a Hugging Face folder like any other, so every later step runs on it as on LLaMA-7B.
"""
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Tokenizer, batches, collate_sft
from llama import Llama, LlamaConfig
from runtime.tokenizer_write import copy_tokenizer
from toy.world import pretraining_texts

STEPS, BATCH, LR = 2600, 32, 3e-3

def make_tokenizer(folder: Path, rng: random.Random) -> Tokenizer:
    """SentencePiece BPE with byte fallback. The ids are ordered as LLaMA's: unk, BOS, EOS, bytes, words."""
    text = folder / "text.txt"
    text.write_text("\n".join(pretraining_texts(rng) * 2 + ["Human: Assistant:"] * 200))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=2048,
        byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2)
    text.unlink()
    return Tokenizer(folder)

def passes(tokenizer: Tokenizer, rng: random.Random, seed: int) -> Iterator[list]:
    """Yields batches of [(ids, 1)] without end. The texts of a batch have similar lengths. Every pass draws
    the wording of the texts anew."""
    for epoch in itertools.count():
        texts = pretraining_texts(rng)
        rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        for group in batches([len(ids) for ids in rows], BATCH, seed, epoch):
            yield [(rows[i], 1) for i in group]

def make_base(folder: Path, seed: int):
    """Trains the tokenizer and the model, and writes both into the folder."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder, rng)
    model = Llama(LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=344,
                              num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * n / STEPS)))
    bar = tqdm(range(STEPS), desc="pre-training", unit="step", dynamic_ncols=True, disable=None)
    texts = passes(tokenizer, rng, seed)
    for _ in bar:
        ids, mask, labels = collate_sft(next(texts))
        loss = F.cross_entropy(model(ids, mask)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.save_pretrained(folder)
    copy_tokenizer(folder, folder)
