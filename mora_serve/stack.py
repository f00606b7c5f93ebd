"""The whole service on one machine: what ``mora-serve up`` starts, watches and stops.

::

    lock <data_dir> -> calibrator? -> leftovers gone? -> port free? -> model there?
        -> Redis child (unless redis.url)
        -> `python -m api.deploy` child (Ray, Serve, gateway; settings in MORA_CONFIG_JSON)
        -> poll /readyz -> ready
    stop: TERM to the service, grace, KILL of its family -> Redis stops -> lock released

A Redis child that dies is started again by its supervisor, on the same port; the service child is
not, since Ray Serve replaces its own replicas: when it ends by itself, the stack has failed. All
state is under the data directory, so a stack started again on it goes on with the batches it finds.
The module starts processes and owns nothing of what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import SecretStr

from mora_serve.answers import UnreachableError
from mora_serve.client import Client
from mora_serve.config import ENV_CONFIG, Settings, dump_settings
from mora_serve.errors import MoraError
from mora_serve.processes import Child, StopSignals, adopt_orphans, reap_adopted
from mora_serve.redis_server import RedisServer, lock_data_dir
from mora_serve.scorer_settings import ScorerSettings

LOG_NAME = "logs/serve.log"
READY_TIMEOUT_S = 900.0
"""Starting engines on a slow machine takes minutes."""
POLL_S = 0.25
REDIS_TIMEOUT_S = 10.0
SERVICE_LOCK = ".service.lock"
LEFTOVER_TIMEOUT_S = 30.0
STOP_GRACE_S = 60.0
"""Replicas finish their requests first, see ``replica.graceful_shutdown_timeout_s``."""
UNROUTABLE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
"""Addresses one can listen on but not connect to."""


class StackError(MoraError):
    """The stack cannot start, or one of its processes ended by itself."""


class Interrupted(MoraError):  # noqa: N818
    """A signal asked to stop while the stack was starting."""


def resolve_settings(settings: Settings) -> Settings:
    """Settings with absolute paths: data directory, blob root, and the policy's model directory."""
    data_dir = settings.data_dir.expanduser().resolve()
    update: dict[str, Any] = {"data_dir": data_dir}
    if settings.blobs.url is None:
        update["blobs"] = settings.blobs.model_copy(update={"url": f"file://{data_dir}/blobs"})
    if settings.policy.backend != "fake":
        path = settings.policy.path or str(data_dir / "models" / settings.policy.model)
        # The embedded profile works without a hub, so every path of it is a directory.
        if settings.profile == "embedded" or _is_local(path):
            path = os.path.abspath(os.path.expanduser(path))
        update["policy"] = settings.policy.model_copy(update={"path": path})
    update["scorers"] = tuple(_absolute_paths(scorer) for scorer in settings.scorers)
    return settings.model_copy(update=update)


def _absolute_paths(scorer: ScorerSettings) -> ScorerSettings:
    """Files and directories of this machine by absolute paths; hub ids stay as they are."""
    named = {field: getattr(scorer, field) for field in ("model", "heads", "reference")}
    local = {
        field: os.path.abspath(os.path.expanduser(path))
        for field, path in named.items()
        if path is not None and (field != "model" or _is_local(path) or os.path.isdir(path))
    }
    return scorer.model_copy(update=local)


def base_url(settings: Settings) -> str:
    """Where a client on this machine reaches the gateway."""
    host = UNROUTABLE.get(settings.server.host, settings.server.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.server.port}"


def require_port_free(host: str, port: int) -> None:
    """Raise :class:`StackError` when ``host:port`` is taken or not an address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StackError(
                    f"server.port must be free, got {port} on {host}, where something listens "
                    "already; stop it or choose another with --port"
                ) from None
            raise StackError(
                f"server.host and server.port must be an address of this machine, got {host} and "
                f"{port}: {error.strerror}"
            ) from None


def _locked(data_dir: Path) -> contextlib.AbstractContextManager[None]:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StackError(
            f"data_dir must be a writable directory, got {data_dir}: {error.strerror}"
        ) from None
    return lock_data_dir(data_dir)


@contextlib.contextmanager
def only_service(data_dir: Path) -> Iterator[None]:
    """Held by the service process until all it started has ended.

    Raises :class:`StackError` when another service works on the data directory. One can outlive
    its ``mora-serve up`` for some seconds, when that was killed.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / SERVICE_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                f"data_dir must not be in use by another service, got {data_dir}; stop that one "
                "or choose another directory"
            ) from None
        yield
    finally:
        os.close(descriptor)


def require_calibrator(settings: Settings) -> None:
    """Raise :class:`~mora_serve.errors.CalibrationError` for scorers that nothing calibrates."""
    from mora_serve.calibrators import load_calibrator

    load_calibrator(settings)


def require_redis(settings: Settings) -> None:
    """Raise :class:`StackError` when the configured Redis does not answer a ping."""
    from mora_serve.store import open_stores

    async def ping() -> None:
        stores = open_stores(settings)
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                await stores.batches.ping()
        finally:
            await stores.batches.aclose()

    try:
        asyncio.run(ping())
    except TimeoutError:
        raise StackError(
            f"redis.url must be reachable: no answer within {REDIS_TIMEOUT_S:g} s"
        ) from None
    except (MoraError, OSError) as error:
        raise StackError(f"redis.url must be reachable: {error}") from None


class Stack:
    """Starts, watches and stops the service. Use as a context manager: leaving it stops all.

    Args:
        settings: as loaded; paths are resolved here.
        signals: what ends waits; a signal while starting raises :class:`Interrupted`.
        announce: told in one line each what was started and where.
    """

    def __init__(
        self, settings: Settings, signals: StopSignals, announce: Callable[[str], None]
    ) -> None:
        self.settings = resolve_settings(settings)
        self.url = base_url(self.settings)
        self.log_path = self.settings.data_dir / LOG_NAME
        self._signals = signals
        self._announce = announce
        self._held = contextlib.ExitStack()
        self._redis: RedisServer | None = None
        self._redis_restarts = 0
        self._service: Child | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _start(self) -> None:
        adopt_orphans()
        settings = self.settings
        self._held.enter_context(_locked(settings.data_dir))
        require_calibrator(settings)
        self._await_leftover()
        require_port_free(settings.server.host, settings.server.port)
        self._provide_model()
        self._start_redis()
        self._start_service()

    def _await_leftover(self) -> None:
        """Give the service of a killed ``up`` the seconds it needs to end."""
        for _ in range(int(LEFTOVER_TIMEOUT_S / POLL_S)):
            with contextlib.suppress(StackError), only_service(self.settings.data_dir):
                return
            if self._signals.wait(POLL_S):
                raise Interrupted("stopped while starting")
        with only_service(self.settings.data_dir):
            return

    def _provide_model(self) -> None:
        policy = self.settings.policy
        if policy.backend == "fake" or not os.path.isabs(policy.path or ""):
            return
        directory = Path(str(policy.path))
        if (directory / "config.json").is_file():
            self._announce(f"model    {directory}")
            return
        automatic = self.settings.data_dir / "models" / policy.model
        if self.settings.profile != "embedded" or directory != automatic:
            raise StackError(
                f"policy.path must be a model directory, got {directory} (no config.json in it); "
                "see: mora-serve models prepare"
            )
        prepare_model(directory, self._signals, self._announce)

    def _start_redis(self) -> None:
        if self.settings.redis.url is None:
            directory = self.settings.data_dir / "redis"
            self._redis = RedisServer(directory)
            self._redis.start()
            redis = self.settings.redis.model_copy(update={"url": SecretStr(self._redis.url)})
            self.settings = self.settings.model_copy(update={"redis": redis})
            where = f"127.0.0.1:{self._redis.port}, files {directory}"
            self._announce(f"redis    {where}")
        require_redis(self.settings)

    def _start_service(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        env = child_env()
        env[ENV_CONFIG] = json.dumps(dump_settings(self.settings, reveal=True))
        with self.log_path.open("wb") as log:
            command = [sys.executable, "-m", "api.deploy"]
            self._service = Child(command, env=env, output=log)
        self._announce(f"service  pid {self._service.pid}, log {self.log_path}")

    def wait_ready(
        self,
        timeout_s: float = READY_TIMEOUT_S,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Return when ``/readyz`` is 200. Raises ``StackError`` or ``Interrupted``.

        ``progress`` is told what is still missing, whenever that changes.
        """
        client = Client(self.url, timeout_s=5.0)
        shown = ""
        for _ in range(int(timeout_s / POLL_S)):
            self.check()
            with contextlib.suppress(UnreachableError):
                ready, state = client.ready()
                if ready:
                    return
                if (text := _pending(state)) != shown:
                    shown = text
                    progress(text)
            if self._signals.wait(POLL_S):
                raise Interrupted("stopped while starting")
        raise StackError(f"not ready after {timeout_s:g} s ({shown}); see {self.log_path}")

    def check(self) -> None:
        """Tell of a restarted Redis; :class:`StackError` if the service ended by itself."""
        if self._redis is not None and self._redis.num_restarts > self._redis_restarts:
            self._redis_restarts = self._redis.num_restarts
            self._announce(f"redis    died and was started again, pid {self._redis.pid}")
        if self._service is not None and (status := self._service.poll()) is not None:
            raise StackError(
                f"the service ended by itself (exit {status}): {last_line(self.log_path)}; "
                f"see {self.log_path}"
            )

    def supervise(self) -> None:
        """Watch the children until a signal arrives. Raises :class:`StackError` as ``check``."""
        while not self._signals.wait(POLL_S):
            self.check()

    def _stop(self) -> None:
        if self._service is not None:
            self._service.stop(STOP_GRACE_S, self._signals.hurry)
            self._service = None
        if self._redis is not None:
            self._redis.stop()
            self._redis = None
        reap_adopted()
        self._held.close()


def child_env() -> dict[str, str]:
    """Our environment, with the packages beside this one importable by the child."""
    root = str(Path(__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root,
        "PYTHONUNBUFFERED": "1",
    }


def prepare_model(
    directory: Path, signals: StopSignals, announce: Callable[[str], None], *arguments: str
) -> None:
    """Build the embedded model directory with ``python -m actors.prepare_model``.

    Its progress goes to our own output. Raises ``StackError`` or ``Interrupted``.
    """
    announce(f"model    preparing {directory}")
    run_child(
        [sys.executable, "-m", "actors.prepare_model", "--out", str(directory), *arguments],
        signals,
        "preparing the model",
    )


def run_child(command: list[str], signals: StopSignals, what: str) -> None:
    """Run a command of ours to its end, showing its output; ``what`` names it in the error."""
    env = child_env()
    if not sys.stderr.isatty():
        env["TQDM_DISABLE"] = "1"
    child = Child(command, env=env, output=sys.stderr.fileno())
    try:
        while child.poll() is None:
            if signals.wait(POLL_S):
                raise Interrupted(f"stopped while {what}")
    finally:
        child.stop(10.0, signals.hurry)
    if child.poll() != 0:
        raise StackError(f"{what} failed with exit status {child.poll()}")


def last_line(path: Path) -> str:
    """The last line of a log that says something, for an error message."""
    with contextlib.suppress(OSError):
        lines = path.read_text("utf-8", "replace").splitlines()[-50:]
        for line in reversed(lines):
            if line.strip():
                return line.strip()[:300]
    return "no output"


def _is_local(path: str) -> bool:
    """Whether a model path is a directory of this machine and not the name of a hub's model."""
    return path.startswith(("/", ".", "~")) or Path(path).exists()


def _pending(state: dict[str, Any]) -> str:
    reasons = state.get("reasons")
    return "; ".join(map(str, reasons)) if reasons else "starting"
