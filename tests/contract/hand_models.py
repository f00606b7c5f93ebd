"""Tiny reward models whose output a test can compute by itself, with numpy alone.

Queries and keys are zero, so that attention is the plain mean of what a token may see; the last
projection of every feed-forward block is zero, so that the block adds nothing. What is left is a
few products and norms, written out below per architecture from its paper, in float64. Every token
that reaches the model moves the output, and where an architecture knows order, so does its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]
Compute = Callable[[Weights, Sequence[int]], Array]
"""Outputs of the head for a sequence of tokens."""

HIDDEN = 8
LLAMA_HIDDEN = 64
"""Also the size of its one attention head, which vLLM's kernels must know."""
POSITIONS = 320
EPS = 1e-5


def save(model: Any, tokenizer: Any, directory: Path, *, seed: int = 0) -> Weights:
    """Give ``model`` its known weights, save it with its tokenizer, and return the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = "norm" in name.lower() or ".ln_" in name
            size = 0.1 if norm else 2 / math.sqrt(weight.shape[-1])
            values = torch.randn(weight.shape, generator=generator) * size
            weight.copy_(values + 1 if norm and name.endswith("weight") else values)
            if _silent(name):
                weight.zero_()
            if name.endswith("c_attn.weight") or name.endswith("c_attn.bias"):
                weight[..., : 2 * HIDDEN] = 0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def _silent(name: str) -> bool:
    """Whether a weight makes queries, keys, or the last step of a feed-forward block."""
    asks = ("query", "key", "q_lin", "k_lin", "q_proj", "k_proj")
    last = ("mlp.c_proj", "mlp.down_proj", "ffn.lin2")
    if any(f".{part}." in name or f".{part}_proj." in name for part in asks):
        return True
    dense = ".output.dense" in name and ".attention." not in name
    return dense or any(part in name for part in last)


# --- decoders ------------------------------------------------------------------------------------


def gpt2(**options: Any) -> Any:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        n_embd=HIDDEN, n_layer=1, n_head=1, n_positions=POSITIONS, layer_norm_epsilon=EPS,
        num_labels=1, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


def gpt2_outputs(weights: Weights, ids: Sequence[int]) -> Array:
    """Radford et al. 2019: positions are learned, norms come first, the last token is scored."""
    part = {name.removeprefix("transformer."): value for name, value in weights.items()}
    x = part["wte.weight"][list(ids)] + part["wpe.weight"][: len(ids)]
    seen = layer_norm(x, part, "h.0.ln_1")
    values = seen @ part["h.0.attn.c_attn.weight"] + part["h.0.attn.c_attn.bias"]
    mean = running_mean(values[:, 2 * HIDDEN :])
    x = x + mean @ part["h.0.attn.c_proj.weight"] + part["h.0.attn.c_proj.bias"]
    last: Array = layer_norm(x, part, "ln_f")[-1]
    return last @ weights["score.weight"].T


def llama_config(**options: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=LLAMA_HIDDEN, intermediate_size=LLAMA_HIDDEN, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=POSITIONS,
        rms_norm_eps=EPS, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=3, **options,
    )  # fmt: skip


def llama(**options: Any) -> Any:
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(llama_config(**options))


def causal_llama(**options: Any) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_config(**options))


def llama_state(weights: Weights, ids: Sequence[int]) -> Array:
    """Touvron et al. 2023: the last token's state. Two layers, so that order matters."""
    x = weights["model.embed_tokens.weight"][list(ids)]
    for layer in ("model.layers.0.", "model.layers.1."):
        seen = rms_norm(x, weights[layer + "input_layernorm.weight"])
        mean = running_mean(seen @ weights[layer + "self_attn.v_proj.weight"].T)
        x = x + mean @ weights[layer + "self_attn.o_proj.weight"].T
    last: Array = rms_norm(x, weights["model.norm.weight"])[-1]
    return last


def llama_outputs(weights: Weights, ids: Sequence[int]) -> Array:
    return weights["score.weight"] @ llama_state(weights, ids)


def llama_next_token(weights: Weights, ids: Sequence[int]) -> Array:
    """Logits of every token as the next one."""
    return weights["lm_head.weight"] @ llama_state(weights, ids)


# --- encoders ------------------------------------------------------------------------------------


def _encoder_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": HIDDEN, "max_position_embeddings": POSITIONS, "layer_norm_eps": EPS,
        **options,
    }  # fmt: skip


def bert(**options: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_encoder_options(options), pad_token_id=0))


def bert_outputs(weights: Weights, ids: Sequence[int]) -> Array:
    """Devlin et al. 2019: learned positions and segments, pooled at the first token.

    Segments change behind the first separator (token 3) but one: ``[CLS] a [SEP] | b [SEP]``.
    """
    second = list(ids).index(3) + 1
    segments = [0] * second + [1] * (len(ids) - second)
    part = {name.removeprefix("bert."): value for name, value in weights.items()}
    x = (
        _embed(part, ids, range(len(ids)))
        + part["embeddings.token_type_embeddings.weight"][segments]
    )
    x = _encoder_layer(part, layer_norm(x, part, "embeddings.LayerNorm"))
    pooled: Array = np.tanh(x[0] @ part["pooler.dense.weight"].T + part["pooler.dense.bias"])
    return pooled @ weights["classifier.weight"].T + weights["classifier.bias"]


def roberta(**options: Any) -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    made = RobertaConfig(
        **_encoder_options(options), pad_token_id=1, bos_token_id=0, eos_token_id=2,
        type_vocab_size=1,
    )  # fmt: skip
    return RobertaForSequenceClassification(made)


def roberta_outputs(weights: Weights, ids: Sequence[int]) -> Array:
    """Liu et al. 2019: positions are counted from two, one segment, a head on the first token."""
    part = {name.removeprefix("roberta."): value for name, value in weights.items()}
    x = _embed(part, ids, range(2, len(ids) + 2)) + part["embeddings.token_type_embeddings.weight"]
    x = _encoder_layer(part, layer_norm(x, part, "embeddings.LayerNorm"))
    hidden: Array = np.tanh(
        x[0] @ weights["classifier.dense.weight"].T + weights["classifier.dense.bias"]
    )
    return hidden @ weights["classifier.out_proj.weight"].T + weights["classifier.out_proj.bias"]


def deberta(**options: Any) -> Any:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    made = DebertaV2Config(
        **_encoder_options(options), pad_token_id=0, type_vocab_size=0, relative_attention=True,
        position_biased_input=False, pos_att_type=["p2c", "c2p"], share_att_key=True,
        norm_rel_ebd="layer_norm", position_buckets=16, pooler_hidden_size=HIDDEN,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(made)


def deberta_outputs(weights: Weights, ids: Sequence[int]) -> Array:
    """He et al. 2021: no positions in the embeddings, GELU behind the first token's projection."""
    part = {name.removeprefix("deberta."): value for name, value in weights.items()}
    x = layer_norm(
        part["embeddings.word_embeddings.weight"][list(ids)], part, "embeddings.LayerNorm"
    )
    x = _encoder_layer(part, x, value="value_proj")
    pooled = gelu(x[0] @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"])
    return pooled @ weights["classifier.weight"].T + weights["classifier.bias"]


def distilbert(**options: Any) -> Any:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    made = DistilBertConfig(
        dim=HIDDEN, n_layers=1, n_heads=1, hidden_dim=HIDDEN, max_position_embeddings=POSITIONS,
        pad_token_id=0, **options,
    )  # fmt: skip
    return DistilBertForSequenceClassification(made)


def distilbert_outputs(weights: Weights, ids: Sequence[int]) -> Array:
    """Sanh et al. 2019: BERT without segments and pooler, a ReLU layer on the first token."""
    part = {name.removeprefix("distilbert."): value for name, value in weights.items()}
    x = layer_norm(_embed(part, ids, range(len(ids))), part, "embeddings.LayerNorm", 1e-12)
    block = "transformer.layer.0."
    values = x @ part[block + "attention.v_lin.weight"].T + part[block + "attention.v_lin.bias"]
    mean = values.mean(0) @ part[block + "attention.out_lin.weight"].T
    x = layer_norm(
        x + mean + part[block + "attention.out_lin.bias"], part, block + "sa_layer_norm", 1e-12
    )
    x = layer_norm(x, part, block + "output_layer_norm", 1e-12)
    hidden: Array = x[0] @ weights["pre_classifier.weight"].T + weights["pre_classifier.bias"]
    return np.maximum(hidden, 0) @ weights["classifier.weight"].T + weights["classifier.bias"]


def _embed(part: Weights, ids: Sequence[int], positions: Sequence[int]) -> Array:
    words = part["embeddings.word_embeddings.weight"][list(ids)]
    return words + part["embeddings.position_embeddings.weight"][list(positions)]


def _encoder_layer(part: Weights, x: Array, *, value: str = "value") -> Array:
    """One layer that sees every token of the text; the feed-forward block adds nothing."""
    block = "encoder.layer.0.attention."
    values = x @ part[f"{block}self.{value}.weight"].T + part[f"{block}self.{value}.bias"]
    mean = (
        values.mean(0) @ part[block + "output.dense.weight"].T + part[block + "output.dense.bias"]
    )
    x = layer_norm(x + mean, part, block + "output.LayerNorm")
    return layer_norm(x, part, "encoder.layer.0.output.LayerNorm")


# --- arithmetic ----------------------------------------------------------------------------------


def running_mean(values: Array) -> Array:
    """What uniform causal attention sees: the mean over a token and those before it."""
    return np.cumsum(values, 0) / np.arange(1, len(values) + 1)[:, None]


def layer_norm(x: Array, part: Weights, name: str, eps: float = EPS) -> Array:
    centred: Array = x - x.mean(-1, keepdims=True)
    scaled: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * part[name + ".weight"] + part[name + ".bias"]


def rms_norm(x: Array, weight: Array) -> Array:
    scaled: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    return scaled * weight


def gelu(x: Array) -> Array:
    return np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x])
