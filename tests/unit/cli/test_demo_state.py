"""Where a demo keeps its state."""

from __future__ import annotations

from pathlib import Path

from mora_serve.cli.demo import own_state
from mora_serve.config import load_settings


def test_a_demo_shares_the_model_but_not_the_state_of_the_data_directory(tmp_path: Path) -> None:
    settings = load_settings("embedded", overrides={"data_dir": tmp_path}, environ={})
    own = own_state(settings)
    assert own.data_dir != tmp_path
    assert own.data_dir.parent == tmp_path
    assert own.policy.path == str(tmp_path / "models" / settings.policy.model)
    assert own.blobs.url is None


def test_a_demo_keeps_a_model_directory_that_was_configured(tmp_path: Path) -> None:
    policy = {"path": str(tmp_path / "mine")}
    overrides = {"data_dir": tmp_path, "policy": policy}
    settings = load_settings("embedded", overrides=overrides, environ={})
    assert own_state(settings).policy.path == policy["path"]
