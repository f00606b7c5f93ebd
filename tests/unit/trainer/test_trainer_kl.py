"""Log-probabilities by hand, estimators by hand, adapters against the base, whole command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trainer.dpo import LORA_TARGETS, load_tokenizer
from trainer.kl import BASE, divergence, encode, load_version, log_probabilities, main
from trainer.tiny_model import ensure_tiny_model

ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": f"question {number}"}], "answer": "yes " * number}
    for number in range(4)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(ensure_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return str(folder)


def run(tmp_path: Path, base: str, *more: str) -> list[dict[str, Any]]:
    answers, out = tmp_path / "answers.jsonl", tmp_path / "kl.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["--base", base, "--answers", str(answers), "--out", str(out), *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_log_probabilities_are_those_of_each_answer_alone_at_the_temperature(base: str) -> None:
    tokenizer, model = load_tokenizer(base), load_version(base, BASE)
    encoded = [encode(tokenizer, row["prompt"], row["answer"]) for row in ROWS]
    together = log_probabilities(model, encoded, 0.7)
    for (tokens, start), found in zip(encoded, together, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0].double() / 0.7
        expected = [
            float(logits[place - 1].log_softmax(-1)[tokens[place]])
            for place in range(start, len(tokens))
        ]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_estimators_are_schulmans() -> None:
    policy, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    found = divergence(policy.double(), reference.double())
    assert found["k1"] == pytest.approx(0.0, abs=1e-7)
    assert found["k3"] == pytest.approx((0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2)))
    assert found["num_tokens"] == 2


def test_both_estimators_agree_with_the_exact_divergence_on_answers_that_were_sampled() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 12).double().log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    drawn = torch.multinomial(p.exp(), 20_000, replacement=True)
    found = divergence(p[drawn], q[drawn])
    assert found["k1"] / 20_000 == pytest.approx(exact, rel=0.1)
    assert found["k3"] / 20_000 == pytest.approx(exact, rel=0.1)


def test_a_version_does_not_diverge_from_itself(base: str, tmp_path: Path) -> None:
    for item in run(tmp_path, base, "--policy", BASE):
        assert (item["k1"], item["k3"]) == (0.0, 0.0)


def test_an_adapter_diverges_from_the_base_and_an_answer_without_text_does_not_count(
    base: str, adapter: str, tmp_path: Path
) -> None:
    found = run(tmp_path, base, "--policy", adapter)
    assert [item["num_tokens"] for item in found] == [0, 4, 8, 12]
    assert found[0]["k3"] == 0.0
    assert all(item["k3"] > 0 for item in found[1:])
    swapped = run(tmp_path, base, "--policy", BASE, "--reference", adapter)
    assert [item["k1"] for item in swapped] == pytest.approx([-item["k1"] for item in found])
