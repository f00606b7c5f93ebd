"""Random models of the kinds that reward models are, in float32, and what their own code says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actors.scoring.packing import Answer, Pack

VOCAB = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "sliding_window": None,
}
OWN_NAMES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "pad_token_id": None},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4},
    "roberta": {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0},
    "deberta-v2": {"type_vocab_size": 0, "relative_attention": True, "pos_att_type": "p2c|c2p"},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.0625},
}
"""Where a kind calls a size otherwise, or needs one of its own."""
PACKED = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
PADDED = ("bert", "roberta", "distilbert", "deberta-v2", "gemma2")


def make_model(directory: Path, kind: str, auto_class: Any, **changes: Any) -> Path:
    """Save a model with three labels; ``changes`` go to its configuration."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    sizes = SIZES | OWN_NAMES.get(kind, {}) | changes
    if "n_embd" in sizes:
        sizes = {k: v for k, v in sizes.items() if k not in ("hidden_size", "num_attention_heads")}
        for name in ("num_hidden_layers", "max_position_embeddings"):
            del sizes[name]
    config = AutoConfig.for_model(kind, **({"num_labels": 3} | sizes))
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith("bias"):
                weights.normal_(0.0, 0.1)
    model.save_pretrained(directory)
    return directory


def made_packs(seed: int = 1) -> list[Pack]:
    """Three prompts of several lengths with up to four answers each."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, VOCAB, (count,), generator=generator).tolist())

    shapes = [(17, (5, 1, 30, 9)), (40, (12, 3)), (3, (21,))]
    return [
        Pack(tokens(prompt), tuple(Answer(g, i, tokens(n)) for i, n in enumerate(lengths)))
        for g, (prompt, lengths) in enumerate(shapes)
    ]


def each_text(packs: Sequence[Pack]) -> list[list[list[int]]]:
    """Tokens of prompt and answer, by pack and answer."""
    return [[[*pack.prompt, *answer.tokens] for answer in pack.answers] for pack in packs]


@torch.inference_mode()
def own_outputs(directory: Path, auto_class: Any, packs: Sequence[Pack]) -> list[list[list[float]]]:
    """The model's logits of every answer by a pass of its own: one row, no padding."""
    model = auto_class.from_pretrained(directory, dtype=torch.float32)
    return [
        [model(input_ids=torch.tensor([text])).logits[0].tolist() for text in texts]
        for texts in each_text(packs)
    ]
