"""The composition root: settings, checks before anything starts, the proxy's environment."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve._private.http_util import parse_disconnect_disabled_header
from starlette.types import Receive, Scope, Send

from api import deploy, direct_bodies, proxy
from mora_serve.config import ENV_CONFIG, dump_settings, load_settings
from mora_serve.errors import ConfigError
from mora_serve.free_ports import free_port
from mora_serve.stack import StackError, resolve_settings
from tests.unit.api.conftest import make_settings


def test_settings_handed_by_a_parent_win_and_keep_their_secrets() -> None:
    settings = resolve_settings(
        make_settings(server={"port": 1234, "api_keys": ["k"]}, redis={"url": "redis://h:1"})
    )
    environ = {ENV_CONFIG: json.dumps(dump_settings(settings, reveal=True))}

    read = deploy.read_settings([], environ)

    assert read == settings
    assert read.server.api_keys[0].get_secret_value() == "k"


def test_settings_of_the_command_line_are_resolved(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("server: {port: 4321}\n", "utf-8")

    read = deploy.read_settings(
        ["--profile", "fake", "--config", str(file)], {"MORA_DATA_DIR": str(tmp_path)}
    )

    assert (read.profile, read.server.port) == ("fake", 4321)
    assert read.blobs.url == f"file://{tmp_path}/blobs"


def test_broken_settings_are_a_config_error() -> None:
    with pytest.raises(ConfigError):
        deploy.read_settings([], {ENV_CONFIG: "{"})
    with pytest.raises(ConfigError, match="MORA_SERVER__PORT"):
        deploy.read_settings(["--profile", "fake"], {"MORA_SERVER__PROT": "1"})


def run_deploy(
    tmp_path: Path, profile: str = "fake", **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "api.deploy", "--profile", profile],
        env={**os.environ, "MORA_DATA_DIR": str(tmp_path), **environ},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_taken_port_is_one_line_and_a_failure(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_deploy(tmp_path, MORA_SERVER__PORT=str(port))

    assert done.returncode == 1
    assert done.stderr.startswith("error: server.port must be free")
    assert str(port) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_unreachable_redis_is_one_line_and_a_failure(tmp_path: Path) -> None:
    done = run_deploy(
        tmp_path,
        MORA_SERVER__PORT=str(free_port()),
        MORA_REDIS__URL=f"redis://127.0.0.1:{free_port()}",
    )

    assert done.returncode == 1
    assert done.stderr.startswith("error: redis.url must be reachable")
    assert len(done.stderr.splitlines()) == 1


def test_missing_model_directory_is_named(tmp_path: Path) -> None:
    settings = make_settings(
        policy={"backend": "vllm", "path": str(tmp_path / "nothing")},
        server={"port": free_port()},
    )

    with pytest.raises(StackError, match=r"policy\.path must be a model directory.*nothing"):
        deploy.check(settings)


def test_relative_model_directory_of_the_embedded_profile_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = {"policy": {"path": "models/absent"}, "server": {"port": free_port()}}
    loaded = load_settings("embedded", environ={}, overrides=overrides)

    with pytest.raises(StackError, match=rf"must be a model directory.*{tmp_path}/models/absent"):
        deploy.check(resolve_settings(loaded))


def test_scorers_without_a_calibrator_are_refused_before_ray_is_joined(tmp_path: Path) -> None:
    done = run_deploy(tmp_path, "gpu", MORA_SERVER__PORT=str(free_port()))

    assert done.returncode == 1
    assert done.stderr.startswith("error: method.calibrator must name a calibrator")
    assert len(done.stderr.splitlines()) == 1


def slow_ray(monkeypatch: pytest.MonkeyPatch, num_failures: int) -> list[str]:
    """Replace Ray by one that fails to start so often; what was asked of it."""
    asked: list[str] = []

    def init(**options: Any) -> None:
        asked.append("init")
        if asked.count("init") <= num_failures:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: asked.append("shutdown"))
    return asked


def test_ray_that_starts_too_slowly_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = slow_ray(monkeypatch, 2)

    deploy._start_ray(make_settings())

    assert asked == ["init", "shutdown", "init", "shutdown", "init"]


def test_ray_that_never_starts_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = slow_ray(monkeypatch, 100)

    with pytest.raises(StackError, match=r"^Ray could not start in 3 tries: The current node"):
        deploy._start_ray(make_settings())

    assert asked.count("init") == 3


def test_processes_of_a_start_that_failed_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[subprocess.Popen[bytes]] = []

    def init(**options: Any) -> None:
        if not left:
            left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    deploy._start_ray(make_settings())

    assert left[0].wait(20) == -signal.SIGKILL


def running_ray(
    monkeypatch: pytest.MonkeyPatch, applications: list[str], labels: dict[str, str]
) -> None:
    status = SimpleNamespace(applications=dict.fromkeys(applications))
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Labels": labels}])
    monkeypatch.setattr(serve, "status", lambda: status)


def test_ray_that_serves_another_mora_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    running_ray(monkeypatch, ["other", "mora"], {})
    with pytest.raises(StackError, match="serves no application 'mora' yet, got auto"):
        deploy._join_ray("auto")


def test_private_ray_of_another_stack_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    running_ray(monkeypatch, [], {deploy.PRIVATE_LABEL: "private"})
    with pytest.raises(StackError, match="private Ray of another mora-serve, got auto"):
        deploy._join_ray("auto")


def test_ray_that_serves_something_else_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    running_ray(monkeypatch, ["other"], {"ray.io/node-id": "a"})
    deploy._join_ray("auto")


def test_ray_that_does_not_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(StackError, match="must name a running Ray, got auto: Could not find"):
        deploy._join_ray("auto")


def test_haproxy_is_found_where_it_is_configured_or_not_at_all(tmp_path: Path) -> None:
    binary = tmp_path / "haproxy"
    binary.write_text("#!/bin/sh\n", "utf-8")
    assert proxy.find_haproxy({proxy.BINARY_VARIABLE: str(binary)}) is None, "not executable"
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)

    assert proxy.find_haproxy({proxy.BINARY_VARIABLE: str(binary)}) == str(binary)


def test_haproxy_files_stay_under_the_data_directory_while_sockets_fit(tmp_path: Path) -> None:
    short, deep = Path("/tmp") / f"m{os.getpid()}", tmp_path / ("d" * 80)

    directory, temporary = proxy.socket_directory(short)
    assert (directory, temporary) == (short / "haproxy", False)
    directory.rmdir()
    short.rmdir()

    directory, temporary = proxy.socket_directory(deep)
    assert temporary
    assert len(str(directory)) <= proxy.MAX_SOCKET_DIR_CHARS
    directory.rmdir()


def test_longest_directory_leaves_room_for_what_serve_and_haproxy_append(tmp_path: Path) -> None:
    longest = "/" + "d" * (proxy.MAX_SOCKET_DIR_CHARS - 1)

    path = Path(longest) / ("0" * 56) / Path(haproxy_metrics_socket(longest)).name

    assert len(str(path)) == proxy.MAX_SOCKET_CHARS


def haproxy_metrics_socket(directory: str) -> str:
    variables = proxy.haproxy_environment("/bin/haproxy", Path(directory))
    return variables["RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"]


def test_every_file_of_haproxy_is_in_its_directory_and_ports_are_free(tmp_path: Path) -> None:
    first = proxy.haproxy_environment("/bin/haproxy", tmp_path)
    haproxy = {k: v for k, v in first.items() if k.startswith("RAY_SERVE_HAPROXY_")}
    paths = [value for name, value in haproxy.items() if name.endswith(("_LOC", "_PATH", "_BASE"))]

    assert first["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert all(path.startswith((str(tmp_path), "/bin/haproxy")) for path in paths)
    ports = [value for name, value in first.items() if name.endswith("_PORT")]
    assert len(set(ports)) == 4
    assert "8500" not in ports, "a shared default port lets another stack answer for this one"


@pytest.mark.parametrize(
    ("method", "path", "direct"),
    [
        ("POST", "/v1/files", True),
        ("POST", "/v1/uploads/upload_1/parts", True),
        ("GET", "/v1/files", False),
        ("POST", "/v1/uploads/upload_1/complete", False),
        ("POST", "/v1/diagnostics", False),
    ],
)
async def test_serve_is_told_to_leave_uploads_to_the_application(
    method: str, path: str, direct: bool
) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def unused(*_: Any) -> Any:
        raise AssertionError

    given = [(b"x-request-disconnect-disabled", b"?0"), (b"a", b"b")]
    scope = {"type": "http", "method": method, "path": path, "headers": given}
    for middleware in direct_bodies.middlewares():
        wrapped = middleware.cls(app, *middleware.args, **middleware.kwargs)
        await wrapped(scope, unused, unused)

    headers = dict(seen[0]["headers"])
    assert parse_disconnect_disabled_header(headers) is direct
    assert headers[b"a"] == b"b"


def test_callback_is_where_serve_is_told_to_find_it(tmp_path: Path) -> None:
    environment = proxy.haproxy_environment("/bin/haproxy", tmp_path)
    module, name = environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].split(":")

    assert getattr(importlib.import_module(module), name) is direct_bodies.middlewares


def test_python_proxy_is_not_silently_replaced_by_direct_ingress() -> None:
    environment = {**proxy.common_environment(local=True), **proxy.python_proxy_environment()}

    assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert environment["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"


def test_without_haproxy_no_upload_is_larger_than_a_part() -> None:
    bounded = deploy.without_haproxy(make_settings()).server
    small = make_settings(server={"max_upload_bytes": 2048})

    assert bounded.max_upload_bytes == bounded.max_part_bytes
    assert deploy.without_haproxy(small) == small


def test_failure_report_is_the_last_line_of_serves_traceback() -> None:
    message = "The deployment failed:\n  Traceback...\n    raise X\nConfigError: no such model\n\n"

    assert deploy._cause(message) == "ConfigError: no such model"


def test_application_starts_without_importing_ray() -> None:
    """Checks must fail fast and readably, before Ray reads its environment."""
    code = "import sys, api.deploy; sys.exit('ray' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
