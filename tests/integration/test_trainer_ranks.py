"""Two ranks over gloo on data that no partition divides: as many steps on both, every pair once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from tests.integration.gloo_worker import LONG, NUM_PAIRS
from trainer.tiny_model import ensure_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks of one run report."""
    folder = tmp_path_factory.mktemp("ranks")
    model = ensure_tiny_model(folder / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.integration.gloo_worker", str(model), str(folder)]
    # What would keep TRL from reporting without our doing.
    quiet = {
        "HF_HUB_DISABLE_TELEMETRY",
        "DISABLE_TELEMETRY",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
    }
    env = {name: value for name, value in os.environ.items() if name not in quiet}
    started = [
        subprocess.Popen(command, env={**env, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    return [json.loads((folder / str(rank)).read_text("utf-8")) for rank in range(2)]


def test_both_ranks_take_equally_many_steps_though_the_pairs_end_unevenly(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = ranks
    assert list(first["steps"]) == list(second["steps"]) == [str(n) for n in range(1, 7)]
    assert first["done"]
    assert second["done"]
    assert first["position"] == second["position"]


def test_every_pair_that_fits_is_trained_on_by_one_rank_in_turn(
    ranks: list[dict[str, Any]],
) -> None:
    fitting = [f"question {number}" for number in range(NUM_PAIRS) if number not in LONG]
    assert [rank["prompts"] for rank in ranks] == [fitting[0:22:2], fitting[1:22:2]]
    assert [(rank["skipped"], rank["left_over"]) for rank in ranks] == [(4, 1), (4, 1)]


def test_loss_margins_and_tokens_are_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    for name in ("rewards/margins", "margins/helpful"):
        assert [step[name] for step in first["steps"].values()] == [
            step[name] for step in second["steps"].values()
        ]
    # The rewards of the tests' pairs are their numbers: the first step has 0, 1, 2 and 3.
    assert first["steps"]["1"]["margins/helpful"] == pytest.approx(1.5)
    assert "margins/harmless" not in first["steps"]["1"]
    assert first["trained_tokens"] == second["trained_tokens"]
    assert first["trained_tokens"] == first["steps"]["6"]["num_tokens"]


def test_the_run_reports_to_nobody(ranks: list[dict[str, Any]]) -> None:
    # TRL sends usage reports from a thread of huggingface_hub on the first rank.
    for rank in ranks:
        assert not [name for name in rank["threads"] if "telemetry" in name]
