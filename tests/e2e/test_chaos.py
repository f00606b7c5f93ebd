"""A batch on the real stack while parts of it are killed: nothing is lost, nothing comes twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import chaos, kills


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_batch_survives_the_kill_of_every_kind_of_process() -> None:
    arguments = ["--rows", "200", "--kills", "6", "--seed", "5", "--delay", "120", "--no-clean"]
    assert chaos.main(arguments) == 0


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_batch_survives_the_kill_of_the_vllm_engine_process(model_dir: Path) -> None:
    policy = {"backend": "vllm", "model": model_dir.name, "path": str(model_dir)}
    engine = {"dtype": "bfloat16", "enforce_eager": True, "max_num_seqs": 64}
    settings = {"policy": {**policy, "engine": engine}, "runner": {"shard_rows": 8}}
    planned = [kills.Planned(0.3, "engine")]
    body = {"n": 4, "n_max": 4, "candidates": 1, "max_tokens": 12}
    outcome = chaos.run(16, planned, 1, settings, body)
    assert chaos.report(outcome, planned, 16) == []
    assert outcome.findings.error_codes == {}
