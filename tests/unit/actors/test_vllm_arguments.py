"""What the engine is started with, and its seeds. No engine is started here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from actors.runtime import engine_arguments, engine_seed
from mora_serve.config import PolicySettings
from mora_serve.errors import ConfigError


def test_importing_the_engine_module_does_not_import_vllm() -> None:
    code = "import sys, actors.vllm_engine, actors.deploy; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_prompts_are_never_prefilled_in_part_on_cpu() -> None:
    arguments = engine_arguments(PolicySettings(max_model_len=4096), "model", on_cpu=True)
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] >= 4096


def test_accelerators_keep_the_engines_own_scheduling() -> None:
    arguments = engine_arguments(PolicySettings(), "model", on_cpu=False)
    assert "enable_chunked_prefill" not in arguments
    assert "enforce_eager" not in arguments


def test_configured_arguments_win() -> None:
    settings = PolicySettings(engine={"max_num_seqs": 3, "max_num_batched_tokens": 9999})
    arguments = engine_arguments(settings, "model", on_cpu=True)
    assert (arguments["max_num_seqs"], arguments["max_num_batched_tokens"]) == (3, 9999)


def test_adapters_are_applied_per_request_except_on_cpu() -> None:
    on_gpu = engine_arguments(PolicySettings(lora=True), "model", on_cpu=False)
    assert (on_gpu["enable_lora"], on_gpu["max_lora_rank"]) == (True, 16)
    assert engine_arguments(PolicySettings(lora=True), "model", on_cpu=True)["enable_lora"] is False
    without = engine_arguments(PolicySettings(lora=False), "model", on_cpu=False)
    assert without["enable_lora"] is False
    assert "max_loras" not in without


def test_adapters_that_would_reach_the_base_version_are_refused_on_cpu() -> None:
    settings = PolicySettings(engine={"enable_lora": True, "max_loras": 1})
    with pytest.raises(ConfigError, match=r"policy\.engine\.enable_lora must be false on CPU"):
        engine_arguments(settings, "model", on_cpu=True)
    assert engine_arguments(settings, "model", on_cpu=False)["max_loras"] == 1


def test_neighbouring_seeds_never_share_a_sample() -> None:
    prompt, n = [1, 2, 3], 256
    first = {engine_seed(7, prompt) + sample for sample in range(n)}
    second = {engine_seed(8, prompt) + sample for sample in range(n)}
    assert not first & second


def test_seeds_depend_on_the_prompt_and_nothing_else() -> None:
    assert engine_seed(7, [1, 2]) == engine_seed(7, [1, 2])
    assert engine_seed(7, [1, 2]) != engine_seed(7, [12])
    assert 0 <= engine_seed(-(2**63), [1]) + 1024 < 2**63
