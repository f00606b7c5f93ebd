"""The environment engines are started with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actors.runtime import OPENMP, engine_environment, environment


def test_threads_are_bound_to_every_usable_core(tmp_path: Path) -> None:
    variables = engine_environment({}, on_cpu=True, cores=frozenset({0, 2, 5}), prefix=tmp_path)
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "0,2,5"
    assert variables["OMP_NUM_THREADS"] == "3"


def test_several_ranks_keep_the_engines_own_binding(tmp_path: Path) -> None:
    cores = frozenset(range(8))
    variables = engine_environment({}, on_cpu=True, num_ranks=2, cores=cores, prefix=tmp_path)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in variables
    assert variables["OMP_NUM_THREADS"] == "4"


def test_the_openmp_runtime_is_preloaded_where_it_exists(tmp_path: Path) -> None:
    assert "LD_PRELOAD" not in engine_environment({}, on_cpu=True, prefix=tmp_path)
    library = tmp_path / OPENMP
    library.parent.mkdir()
    library.touch()
    assert engine_environment({}, on_cpu=True, prefix=tmp_path)["LD_PRELOAD"] == str(library)


def test_accelerators_are_left_to_the_engine_but_nobody_reports_usage() -> None:
    assert engine_environment({}, on_cpu=False) == {"VLLM_NO_USAGE_STATS": "1"}


def test_configured_variables_win(tmp_path: Path) -> None:
    variables = engine_environment(
        {"VLLM_CPU_OMP_THREADS_BIND": "1", "MORE": "yes"}, on_cpu=True, prefix=tmp_path
    )
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert variables["MORE"] == "yes"


def test_the_environment_is_restored_also_from_what_the_block_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEPT", "old")
    monkeypatch.delenv("ADDED", raising=False)
    with environment({"KEPT": "new"}):
        assert os.environ["KEPT"] == "new"
        os.environ["ADDED"] = "by the block"
        del os.environ["KEPT"]
    assert os.environ["KEPT"] == "old"
    assert "ADDED" not in os.environ
