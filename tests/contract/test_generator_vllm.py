"""The generator contract on a real vLLM engine, and what only a real engine can get wrong.

One engine serves the whole module; the last test ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.generator import PolicyVersion
from actors.merge import merge_adapter
from actors.prepare_model import prepare
from actors.vllm_engine import VllmGenerator
from benchmarks import kills
from mora_serve.config import load_settings
from mora_serve.errors import GenerationError
from mora_serve.types import Failure, Generation, GenerationRequest, Message, Sampling
from tests.contract.generator_contract import GENERATOR_CHECKS, GeneratorCheck, generated

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

SETTINGS = load_settings("embedded", environ={}).policy
LIMIT = SETTINGS.max_model_len
BASE = PolicyVersion(SETTINGS.model, "base", None)
NEAR_TIE = 0.25
"""Log odds that half precision may take for equal."""
CACHE = Path(__file__).parents[2] / ".cache" / "models"


@pytest.fixture(scope="module")
def model_dir() -> Path:
    directory = CACHE / SETTINGS.model
    prepare(directory)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model_dir: Path) -> AsyncIterator[VllmGenerator]:
    generator = VllmGenerator(SETTINGS, str(model_dir))
    await generator.start()
    yield generator
    await generator.stop()


def request(
    text: str = "Name three colours.", *, model: str | None = None, **sampling: object
) -> GenerationRequest:
    defaults = {"n": 1, "max_tokens": 16, "temperature": 0.0}
    return GenerationRequest(
        (Message("user", text),),
        Sampling(**{**defaults, **sampling}),  # type: ignore[arg-type]
        model,
    )


async def answer(engine: VllmGenerator, text: str, model: str | None = None) -> str:
    (result,) = await generated(engine, [request(text, model=model)])
    return result.completions[0].text


@pytest.mark.parametrize("check", GENERATOR_CHECKS, ids=lambda check: check.__name__)
async def test_vllm_keeps_the_contract(engine: VllmGenerator, check: GeneratorCheck) -> None:
    await check(engine, max_model_len=LIMIT)


async def test_the_model_follows_its_chat_template(engine: VllmGenerator) -> None:
    text = await answer(engine, "What is the capital of France? Answer with one sentence.")
    assert "Paris" in text
    assert "<|im_end|>" not in text


async def test_a_prompt_that_leaves_no_room_for_max_tokens_is_refused(
    engine: VllmGenerator,
) -> None:
    (fits,) = await generated(engine, [request(max_tokens=1)])
    room = LIMIT - fits.num_prompt_tokens
    over, within = await engine.generate(
        [request(max_tokens=room + 1), request(max_tokens=room, stop=(" ",))]
    )
    assert isinstance(over, Failure)
    assert (over.code, over.retryable) == ("context_length_exceeded", False)
    assert isinstance(within, Generation)


async def test_samples_of_neighbouring_seeds_do_not_repeat_each_other(
    engine: VllmGenerator,
) -> None:
    drawn = await generated(
        engine,
        [request("Tell me a story.", n=4, temperature=1.0, seed=seed) for seed in (1, 2, 3)],
    )
    texts = [completion.text for result in drawn for completion in result.completions]
    assert len(set(texts)) == len(texts)


async def test_many_long_seeded_prompts_at_once_leave_the_engine_alive(
    engine: VllmGenerator,
) -> None:
    """Prompts of very different lengths, more than a scheduling step can hold, some cancelled."""
    lengths = [40, 900, 300, 700, 20, 880, 500, 610]
    requests = [
        request(f"{index} " + "word " * length, n=2, max_tokens=12, temperature=1.0, seed=index)
        for index, length in enumerate(lengths * 3)
    ]
    doomed = asyncio.create_task(engine.generate(requests[:4]))
    whole = asyncio.create_task(engine.generate(requests))
    await asyncio.wait({doomed}, timeout=1.0)
    doomed.cancel()
    results = await whole
    await engine.check_health()
    assert all(isinstance(result, Generation) for result in results)


async def test_a_cancelled_call_is_aborted_in_the_engine(engine: VllmGenerator) -> None:
    long = request("Write a very long essay.", n=8, max_tokens=900, temperature=1.0)
    call = asyncio.create_task(engine.generate([long]))
    async with asyncio.timeout(60):
        while engine.num_unfinished() < 8:
            await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert engine.num_unfinished() == 0


# --- policy versions ------------------------------------------------------------------------------


def write_adapter(
    directory: Path, model_dir: Path, *, scale: float, seed: int = 0
) -> PolicyVersion:
    """An adapter as peft saves it, rank 2 on the query projections, with random A and B."""
    config = json.loads((model_dir / "config.json").read_text())
    hidden = config["hidden_size"]
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, hidden) * scale
        tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, 2) * scale
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return PolicyVersion(directory.name, "lora", str(directory))


async def test_an_adapter_is_served_under_its_name_and_the_base_comes_back(
    engine: VllmGenerator, model_dir: Path, tmp_path: Path
) -> None:
    strong = write_adapter(tmp_path / "strong", model_dir, scale=0.5)
    question = "Why is the sky blue?"
    before = await answer(engine, question)
    await engine.publish([BASE, strong], strong.id)
    assert await engine.models() == ["strong"]
    (changed,) = await generated(engine, [request(question)])
    assert changed.policy_version == "strong"
    assert changed.completions[0].text != before
    assert isinstance((await engine.generate([request(model=BASE.id)]))[0], Failure)
    await engine.publish([BASE, strong], BASE.id)
    assert await engine.models() == [BASE.id]
    assert await answer(engine, question) == before


async def test_an_adapter_answers_as_its_merged_weights_do_in_transformers(
    engine: VllmGenerator, model_dir: Path, tmp_path: Path
) -> None:
    strong = write_adapter(tmp_path / "strong", model_dir, scale=0.3)
    question = "Why is the sky blue?"
    before = await answer(engine, question)
    await engine.publish([BASE, strong], strong.id)
    after = await answer(engine, question)
    await engine.publish([BASE], BASE.id)
    merged = tmp_path / "merged"
    shutil.copytree(model_dir, merged)
    merge_adapter(model_dir, Path(str(strong.uri)), merged)
    assert greedy_shortfall(merged, question, after) < NEAR_TIE
    assert greedy_shortfall(model_dir, question, before) < NEAR_TIE
    # What tells the two apart is larger than what rounding does to either.
    assert greedy_shortfall(model_dir, question, after) > 10 * NEAR_TIE


def greedy_shortfall(directory: Path, question: str, text: str) -> float:
    """How far the answer's tokens fall below the most probable ones at worst, in log odds."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    answered = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt["input_ids"], *answered]])
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        logits = model(ids).logits[0, -len(answered) - 1 : -1]
    given = logits.gather(1, ids[0, -len(answered) :, None])[:, 0]
    return float((logits.max(dim=1).values - given).max())


async def test_an_adapter_that_changes_nothing_gives_the_bases_answers(
    engine: VllmGenerator, model_dir: Path, tmp_path: Path
) -> None:
    void = write_adapter(tmp_path / "void", model_dir, scale=0.0)
    before = await answer(engine, "Why is the sky blue?")
    await engine.publish([BASE, void], void.id)
    assert await answer(engine, "Why is the sky blue?") == before
    await engine.publish([BASE], BASE.id)


async def test_an_adapter_that_cannot_be_read_leaves_the_engine_serving(
    engine: VllmGenerator, model_dir: Path, tmp_path: Path
) -> None:
    broken = write_adapter(tmp_path / "broken", model_dir, scale=0.1)
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(GenerationError):
        await engine.publish([BASE, broken], broken.id)
    await engine.check_health()
    assert await engine.models() == [BASE.id]
    assert await answer(engine, "Hi")


async def test_merged_weights_replace_the_base_while_requests_wait(
    engine: VllmGenerator, model_dir: Path, tmp_path: Path
) -> None:
    merged_dir = tmp_path / "merged"
    shutil.copytree(model_dir, merged_dir)
    tensors = load_file(merged_dir / "model.safetensors")
    tensors["model.norm.weight"] = -tensors["model.norm.weight"]
    save_file(tensors, merged_dir / "model.safetensors", metadata={"format": "pt"})
    merged = PolicyVersion("merged", "merged", str(merged_dir))
    question = "Why is the sky blue?"
    before = await answer(engine, question)

    running = [asyncio.create_task(engine.generate([request(question)])) for _ in range(4)]
    await asyncio.sleep(0)
    swap = asyncio.create_task(engine.publish([BASE, merged], "merged"))
    await asyncio.sleep(0)
    running += [asyncio.create_task(engine.generate([request(question)])) for _ in range(4)]
    await swap
    for (result,) in await asyncio.gather(*running):
        assert isinstance(result, Generation)
        same = result.completions[0].text == before
        assert same == (result.policy_version == BASE.id)

    assert await engine.models() == ["merged"]
    assert isinstance((await engine.generate([request(model=BASE.id)]))[0], Failure)
    assert await answer(engine, question) != before
    await engine.publish([BASE], BASE.id)
    assert await answer(engine, question) == before


# --- the end --------------------------------------------------------------------------------------


async def test_a_killed_engine_is_an_error_and_unhealthy(engine: VllmGenerator) -> None:
    await engine.check_health()
    long = request("Write a very long essay.", n=4, max_tokens=900, temperature=1.0)
    call = asyncio.create_task(engine.generate([long]))
    async with asyncio.timeout(60):
        while engine.num_unfinished() < 4:
            await asyncio.sleep(0.01)
    (pid,) = kills.find(os.getpid(), "engine")
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(GenerationError):
        await call
    with pytest.raises(GenerationError):
        await engine.check_health()
    with pytest.raises(GenerationError):
        await engine.generate([request()])
