"""Models for tests: tiny random ones made on the spot, and the prepared embedded one.

Import what is needed into a ``conftest.py``. ``model_dir`` runs the preparation when the directory
is not there yet; tests that use it carry the marker ``slow``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.prepare_model import prepare

PREPARED = Path(__file__).parents[1] / ".cache" / "models" / "SmolLM2-135M-Instruct"

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe good<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The embedded model, prepared once and kept between runs."""
    prepare(PREPARED)
    return PREPARED


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal Llama of four layers with a chat template, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**llama_sizes(len(tokenizer)))).save_pretrained(directory)
    return directory


def llama_sizes(vocab_size: int) -> dict[str, Any]:
    """Arguments of a small Llama configuration whose scores are not all alike."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def byte_tokenizer(*, chat: bool = True, bos: str | None = None, pad: bool = True) -> Any:
    """One token per byte after the special tokens; ``bos`` starts every text when it is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens(SPECIAL)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocab[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos or "<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if pad else None,
        padding_side="left",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
