"""The judge's data: the same files but for the helpful pairs, and complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.head_data import data_files
from benchmarks.judge_heads import link_data
from mora_serve.errors import MoraError


def test_the_helpful_judge_learns_from_pairs_that_the_shipped_head_has_not_seen(
    tmp_path: Path,
) -> None:
    data, folder = tmp_path / "data", tmp_path / "judge"
    data.mkdir()
    folder.mkdir()
    for place in [*data_files(data), data / "hh_helpful_extra.train.jsonl.gz"]:
        place.write_text(place.name)
    link_data(data, folder)
    found = {place.name: place.read_text() for place in folder.iterdir()}
    assert found.pop("hh_helpful.train.jsonl.gz") == "hh_helpful_extra.train.jsonl.gz"
    assert all(name == text for name, text in found.items())
    assert {place.name for place in data_files(folder)} == {p.name for p in folder.iterdir()}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoraError, match=r"--data must hold hh_harmless\.test"):
        link_data(tmp_path, tmp_path)
