"""Parts of the stack that need no Ray: resolved paths, checks before the start, one-line errors."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mora_serve import stack
from mora_serve.config import Settings, load_settings
from mora_serve.errors import CalibrationError
from mora_serve.free_ports import free_port
from mora_serve.processes import StopSignals
from mora_serve.stack import (
    Stack,
    StackError,
    base_url,
    child_env,
    last_line,
    only_service,
    require_port_free,
    resolve_settings,
    run_child,
)


def settings(profile: str = "fake", **overrides: Any) -> Settings:
    overrides["server"] = {"port": free_port(), **overrides.get("server", {})}
    return load_settings(profile, environ={}, overrides=overrides)


def test_paths_are_absolute_and_under_the_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    resolved = resolve_settings(settings("embedded", data_dir="state"))
    assert resolved.data_dir == tmp_path / "state"
    assert resolved.blobs.url == f"file://{tmp_path}/state/blobs"
    assert resolved.policy.path == f"{tmp_path}/state/models/SmolLM2-135M-Instruct"


def test_relative_model_directory_becomes_absolute_and_hub_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    local = resolve_settings(settings("embedded", policy={"path": "./models/mine"}))
    assert local.policy.path == f"{tmp_path}/models/mine"
    assert resolve_settings(settings("gpu")).policy.path == "Qwen/Qwen3-8B"


def test_given_blob_storage_is_kept() -> None:
    assert resolve_settings(settings(blobs={"url": "s3://bucket"})).blobs.url == "s3://bucket"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("node7", "http://node7:8000"),
    ],
)
def test_address_printed_can_be_connected_to(host: str, url: str) -> None:
    assert base_url(settings(server={"host": host, "port": 8000})) == url


def test_taken_port_is_refused_and_a_free_one_is_not() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(StackError, match=rf"server\.port must be free, got {port}"):
            require_port_free("127.0.0.1", port)
    require_port_free("127.0.0.1", port)


def test_foreign_address_is_not_called_a_taken_port() -> None:
    with pytest.raises(StackError, match="must be an address of this machine"):
        require_port_free("203.0.113.7", 8000)


def test_missing_model_of_a_configured_path_stops_before_anything_runs(tmp_path: Path) -> None:
    chosen = settings("embedded", data_dir=tmp_path, policy={"path": "/absent/model"})
    with StopSignals() as signals, pytest.raises(StackError, match=r"got /absent/model"):
        Stack(chosen, signals, lambda line: None).__enter__()


def test_relative_model_path_of_the_embedded_profile_is_a_directory_even_when_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = settings("embedded", data_dir=tmp_path, policy={"path": "absent/model"})
    with StopSignals() as signals, pytest.raises(StackError, match=rf"got {tmp_path}/absent/model"):
        Stack(chosen, signals, lambda line: None).__enter__()


def test_home_in_a_model_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_settings(settings("gpu", policy={"path": "~/m"})).policy.path == f"{tmp_path}/m"


def test_missing_calibrator_stops_before_anything_runs(tmp_path: Path) -> None:
    lines: list[str] = []
    chosen = settings("gpu", data_dir=tmp_path)
    with (
        StopSignals() as signals,
        pytest.raises(CalibrationError, match=r"method\.calibrator must"),
    ):
        Stack(chosen, signals, lines.append).__enter__()
    assert lines == []


def test_service_that_outlived_its_stack_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings("embedded", data_dir=tmp_path, policy={"path": "/absent/model"})
    monkeypatch.setattr(stack, "POLL_S", 0.01)
    ending = threading.Event()

    def leftover() -> None:
        with only_service(tmp_path):
            held.set()
            ending.wait(60.0)

    def wait(timeout_s: float) -> bool:
        ending.set()
        thread.join()
        return False

    held = threading.Event()
    thread = threading.Thread(target=leftover)
    thread.start()
    held.wait(60.0)
    with StopSignals() as signals:
        monkeypatch.setattr(stack, "LEFTOVER_TIMEOUT_S", 0.05)
        with pytest.raises(StackError, match="data_dir must not be in use by another service"):
            Stack(chosen, signals, lambda line: None).__enter__()
        monkeypatch.setattr(stack, "LEFTOVER_TIMEOUT_S", 60.0)
        monkeypatch.setattr(signals, "wait", wait)
        with pytest.raises(StackError, match="/absent/model"):
            Stack(chosen, signals, lambda line: None).__enter__()


def test_failed_start_gives_the_data_directory_back(tmp_path: Path) -> None:
    chosen = settings("embedded", data_dir=tmp_path, policy={"path": "/absent/model"})
    with StopSignals() as signals:
        for _ in range(2):
            with pytest.raises(StackError, match="/absent/model"):
                Stack(chosen, signals, lambda line: None).__enter__()


def test_child_imports_the_packages_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    first, second = child_env()["PYTHONPATH"].split(":")
    assert (Path(first) / "mora_serve").is_dir()
    assert second == "/elsewhere"


def test_command_that_fails_is_named_with_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as signals, pytest.raises(StackError, match=r"training .* exit status 3"):
        run_child(
            [sys.executable, "-c", "import sys; sys.stderr.write('seen'); sys.exit(3)"],
            signals,
            "training the heads",
        )
    assert "seen" in capfd.readouterr().err


def test_last_line_skips_blank_ones(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    assert last_line(log) == "no output"
    log.write_text("first\nerror: the model is gone\n\n  \n")
    assert last_line(log) == "error: the model is gone"
