"""`mora-serve up` for real: ready line, refusals, supervision, orderly stop, restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mora_serve.client import Client
from mora_serve.free_ports import free_port
from tests.e2e.running import Up, eventually


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("data"), free_port())
    try:
        running.wait_for("ready ")
        yield running
    finally:
        running.stop()
        running.kill_all()


def refused(*arguments: str, **environ: str) -> tuple[int, str]:
    """Exit code and output of an ``up`` that must not start."""
    done = subprocess.run(
        [sys.executable, "-m", "mora_serve", "up", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environ},
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).strip()


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.slow
def test_ready_line_names_an_address_that_serves(up: Up) -> None:
    assert up.lines[-1] == f"ready {up.url}"
    assert Client(up.url).ready()[0] is True
    assert Client(up.url).get("/v1/models")["data"][0]["id"] == "fake-policy"


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.slow
def test_second_up_on_the_same_port_says_so(up: Up, tmp_path: Path) -> None:
    port = up.url.rpartition(":")[2]
    code, text = refused("--profile", "fake", "--port", port, "--data-dir", str(tmp_path))
    assert code == 1
    assert text.startswith(f"error: server.port must be free, got {port}")
    assert len(text.splitlines()) == 1


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.slow
def test_second_up_on_the_same_data_directory_says_so(up: Up) -> None:
    data_dir = next(line for line in up.lines if line.startswith("redis")).split("files ")[1]
    where = ["--port", str(free_port()), "--data-dir", str(Path(data_dir).parent)]
    code, text = refused("--profile", "fake", *where)
    assert code == 1
    assert text.startswith("error: data_dir must not be in use")
    assert len(text.splitlines()) == 1


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.slow
def test_redis_that_is_killed_comes_back(up: Up) -> None:
    (old,) = up.named("redis-server")
    os.kill(old, signal.SIGKILL)
    up.wait_for("redis    died and was started again")
    eventually(lambda: Client(up.url).ready()[0])
    (new,) = up.named("redis-server")
    assert new != old


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.slow
def test_ctrl_c_stops_everything_and_leaves_no_process(up: Up) -> None:
    assert up.named("redis-server")
    assert len(up.family()) > 8
    assert up.stop(signal.SIGINT) == 0
    eventually(lambda: up.family() == [], 10.0)


# --- refusals that start nothing ----------------------------------------------------------------


def test_unreachable_redis_is_one_line_without_the_password(tmp_path: Path) -> None:
    where = ["--port", str(free_port()), "--data-dir", str(tmp_path)]
    url = f"redis://:hush@127.0.0.1:{free_port()}/0"
    code, text = refused("--profile", "fake", *where, MORA_REDIS__URL=url)
    assert code == 1
    assert text.startswith("error: redis.url must be reachable")
    assert "hush" not in text
    assert len(text.splitlines()) == 1


def test_missing_model_directory_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "absent"
    where = ["--port", str(free_port()), "--data-dir", str(tmp_path)]
    code, text = refused("--profile", "embedded", *where, MORA_POLICY__PATH=str(missing))
    assert code == 1
    assert text.startswith(f"error: policy.path must be a model directory, got {missing}")
    assert len(text.splitlines()) == 1


def test_unknown_variable_is_refused_with_the_nearest() -> None:
    code, text = refused(MORA_SERVER__PROT="9")
    assert code == 1
    assert text.endswith("the nearest valid variable is MORA_SERVER__PORT")
