"""A batch on the real stack while parts of it are killed: nothing is lost, nothing comes twice."""

from __future__ import annotations

import pytest

from benchmarks import chaos


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_batch_survives_the_kill_of_every_kind_of_process() -> None:
    arguments = ["--rows", "200", "--kills", "6", "--seed", "5", "--delay", "120", "--no-clean"]
    assert chaos.main(arguments) == 0
