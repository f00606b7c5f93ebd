"""Versions as vLLM LoRA requests, several on one engine (``make adapters-test``).

GPUs serve adapters like this, and CPUs do not, since vLLM 0.32's CPU kernels take the index -1 of a
request without an adapter for the last slot. Here one slot more than there are adapters stays
empty, so that what the generator does with requests, names and weights can be seen without a GPU.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from actors.generator import PolicyVersion
from actors.merge import merge_adapter
from actors.runtime import engine_arguments
from actors.vllm_engine import VllmGenerator
from mora_serve.types import Generation
from tests.contract.test_generator_vllm import (
    BASE,
    NEAR_TIE,
    SETTINGS,
    answer,
    greedy_shortfall,
    request,
    write_adapter,
)
from tests.model_fixtures import model_dir

__all__ = ["model_dir"]

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

LIMIT = 256
ADAPTER_TIE = 2 * NEAR_TIE
"""Adapters are rounded to half precision beside the weights, not with them."""
QUESTION = "Why is the sky blue?"


def arguments_with_adapters(*args: Any, on_cpu: bool) -> dict[str, Any]:
    # What adapters cost on CPU grows with tokens and ranks, at start most of all.
    small = {"max_model_len": LIMIT, "max_num_batched_tokens": LIMIT, "max_lora_rank": 8}
    adapters = {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 3}
    return engine_arguments(*args, on_cpu=on_cpu) | small | adapters


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model_dir: Path) -> AsyncIterator[VllmGenerator]:
    settings = SETTINGS.model_copy(update={"max_model_len": LIMIT})
    generator = VllmGenerator(settings, str(model_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.vllm_engine.engine_arguments", arguments_with_adapters)
        await generator.start()
    yield generator
    await generator.stop()


@pytest.fixture(scope="module")
def versions(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PolicyVersion, PolicyVersion]:
    folder = tmp_path_factory.mktemp("adapters")
    return (
        write_adapter(folder / "first", model_dir, scale=0.3),
        write_adapter(folder / "second", model_dir, scale=0.3, seed=1),
    )


async def test_an_adapter_beside_others_answers_as_its_merged_weights_do(
    engine: VllmGenerator,
    versions: tuple[PolicyVersion, PolicyVersion],
    model_dir: Path,
    tmp_path: Path,
) -> None:
    await engine.publish([BASE, *versions], BASE.id)
    for version in versions:
        merged = tmp_path / version.id
        shutil.copytree(model_dir, merged)
        merge_adapter(model_dir, Path(str(version.uri)), merged)
        told = await answer(engine, QUESTION, version.id)
        assert greedy_shortfall(merged, QUESTION, told) < ADAPTER_TIE
        assert greedy_shortfall(model_dir, QUESTION, told) > 10 * NEAR_TIE


async def test_going_back_to_a_version_holds_no_request_back_and_drops_none(
    engine: VllmGenerator, versions: tuple[PolicyVersion, PolicyVersion]
) -> None:
    first, second = versions
    await engine.publish([BASE, first, second], second.id)
    long = request(max_tokens=64)
    running = [asyncio.create_task(engine.generate([long])) for _ in range(4)]
    async with asyncio.timeout(60):
        while engine.num_unfinished() < 4:
            await asyncio.sleep(0.01)
    await engine.publish([BASE, first, second], first.id)
    assert engine.num_unfinished() == 4
    for (result,) in await asyncio.gather(*running):
        assert isinstance(result, Generation)
        assert result.policy_version == second.id
    (now,) = await engine.generate([request()])
    assert isinstance(now, Generation)
    assert now.policy_version == first.id
