"""Small tokenizers of every kind that is read, each in a folder as it comes with a model."""
import json
import random
import string

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from conftest import sentence
from runtime.tokenizer_write import copy_tokenizer

SPECIAL = {"byte-level": ["<|end|>", "<|begin|>", "<|turn|>"], "unigram": ["<unk>", "<s>", "</s>"]}


def corpus():
    rng = random.Random(0)
    return [sentence(rng, 12) + "\n\nHuman: Assistant:" for _ in range(200)]


def byte_level(prefix_space=False):
    """Byte-level BPE, as of GPT-2, SmolLM2 and Llama 3. EOS is id 0 and BOS id 1."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL["byte-level"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def llama_3():
    """Byte-level BPE laid out as Llama 3's: its own pattern, and special tokens after all words. EOS is the
    third last id and BOS the second last."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = tokenizers.Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                               r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=337, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(SPECIAL["byte-level"])
    bos = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A <|begin|> $B", [("<|begin|>", bos)])])
    return tokenizer


def unigram():
    """A Unigram model that puts a space before a text, yet not before one that follows a special token."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(corpus(), trainers.UnigramTrainer(
        vocab_size=340, special_tokens=SPECIAL["unigram"], unk_token="<unk>", show_progress=False,
        initial_alphabet=sorted({*string.printable, "é"})))
    return tokenizer


def save(folder, tokenizer, **config):
    """Writes tokenizer.json, and tokenizer_config.json with this."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make(kind, folder, tokenizer_file):
    """A folder with a tokenizer of this kind."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    elif kind == "converted":                # the SentencePiece model as a tokenizer.json, and that alone
        copy_tokenizer(tokenizer_file, folder)
        (folder / "tokenizer.model").unlink()
    elif kind == "unigram":
        save(folder, unigram(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    else:
        tokenizer = llama_3() if kind == "llama 3" else byte_level(kind == "prefix space")
        save(folder, tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    return folder


KINDS = ["sentencepiece", "converted", "unigram", "byte-level", "prefix space", "llama 3"]
