"""``python -m trainer.kl``: log-probabilities of sampled answers under two policy versions.

A teacher-forced pass outside the serving engine: both versions see the same token ids and the same
float32 arithmetic, so that their difference is the versions' alone. One version is loaded at a
time; an adapter is merged into the base as peft merges it.

Per token ``t`` of an answer drawn from the policy ``p``, with the reference ``q`` and
``d = log q(t) - log p(t)``, two estimators of ``KL(p || q)`` are summed over the answer
(Schulman 2020, *Approximating KL divergence*)::

    k1 = -d                 unbiased, may be negative
    k3 = exp(d) - 1 - d     unbiased, never negative, of smaller variance

Each is unbiased for the divergence of the next token given the answer so far, hence their sums for
that of whole answers (chain rule). Both hold for the distribution that was sampled: ``p`` and ``q``
are the models' at ``--temperature``, and nucleus sampling must have been off. An answer is its text
encoded again: ends of answers, which stop strings leave unknown, are not part of it.

Input: JSON lines ``{"prompt": [messages], "answer": str}``. Output, in the same order:
``{"num_tokens", "k1", "k3"}``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from trainer.dpo import load_tokenizer

TOKENS_PER_BATCH = 4096
"""Padded tokens of one pass: bounds the logits, which dominate memory."""
BASE = "base"
"""Name of the base model among versions, where others are directories."""

Encoded = tuple[list[int], int]
"""Token ids of prompt and answer, and where the answer begins."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.kl", description=__doc__)
    parser.add_argument("--base", required=True, help="directory of the base model")
    parser.add_argument("--policy", required=True, help="`base`, an adapter or a model directory")
    parser.add_argument("--reference", default=BASE, help="likewise")
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args(arguments)
    disable_progress_bar()
    rows = [json.loads(line) for line in args.answers.read_text("utf-8").splitlines()]
    tokenizer = load_tokenizer(args.base)
    encoded = [encode(tokenizer, row["prompt"], row["answer"]) for row in rows]
    sides = [
        log_probabilities(load_version(args.base, version), encoded, args.temperature)
        for version in (args.policy, args.reference)
    ]
    lines = [json.dumps(divergence(p, q)) for p, q in zip(*sides, strict=True)]
    args.out.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return 0


def load_version(base: str, version: str) -> torch.nn.Module:
    """A policy version in float32, on the GPU where there is one."""
    is_adapter = (Path(version) / "adapter_config.json").is_file()
    path = base if version == BASE or is_adapter else version
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if is_adapter:
        model = PeftModel.from_pretrained(model, version).merge_and_unload()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: str) -> Encoded:
    """Tokens of a conversation and its answer, encoded apart: the answer was sampled apart."""
    opening = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*opening, *tail], len(opening)


def log_probabilities(
    model: torch.nn.Module, encoded: Sequence[Encoded], temperature: float
) -> list[torch.Tensor]:
    """Per answer the log-probabilities ``[T]`` of its tokens, in float64."""
    found: dict[int, torch.Tensor] = {}
    device = next(model.parameters()).device
    for places in _batches(encoded):
        longest = max(len(encoded[place][0]) for place in places)
        ids = torch.zeros((len(places), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            tokens = encoded[place][0]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        with torch.inference_mode():
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        for row, place in enumerate(places):
            tokens, start = encoded[place]
            found[place] = _of_answer(logits[row], tokens, start, temperature)
    return [found[place] for place in range(len(encoded))]


def _of_answer(
    logits: torch.Tensor, tokens: Sequence[int], start: int, temperature: float
) -> torch.Tensor:
    scaled = logits[start - 1 : len(tokens) - 1].double() / temperature
    wanted = torch.tensor(tokens[start:], device=logits.device, dtype=torch.long)
    return scaled.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].cpu()


def _batches(encoded: Sequence[Encoded]) -> Iterator[list[int]]:
    """Places of rows of like length, as many as fit ``TOKENS_PER_BATCH`` when padded."""
    batch: list[int] = []
    for place in sorted(range(len(encoded)), key=lambda index: len(encoded[index][0])):
        if batch and (len(batch) + 1) * len(encoded[place][0]) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Sums of both estimators over the tokens of one answer."""
    difference = reference - policy
    return {
        "num_tokens": int(policy.numel()),
        "k1": float(-difference.sum()),
        "k3": float((difference.expm1() - difference).sum()),
    }


if __name__ == "__main__":
    sys.exit(main())
