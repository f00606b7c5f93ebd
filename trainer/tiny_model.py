"""A tiny random Llama with a byte-level tokenizer, made in code: what the fake profile trains.

Real in every respect but size (about 60,000 parameters), so that load, failure and chart tests
train a real model without downloading weights. The same seed gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus the chat markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def build_model(vocabulary_size: int, seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 48, in float32."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def ensure_tiny_model(folder: Path) -> Path:
    """``folder`` with the model in it; written once, whole or not at all."""
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(draft)
    build_model(len(tokenizer)).save_pretrained(draft)
    try:
        os.replace(draft, folder)
    except OSError:
        # Another process was faster; a directory is only replaced when it is empty.
        shutil.rmtree(draft)
        if not (folder / "config.json").exists():
            raise
    return folder
