"""``python -m api.deploy``: the composition root; serves the application until a signal.

::

    settings -> checks (calibrator, port, model, Redis) -> environment of Serve -> ray.init
      -> serve.start -> gateway over engines, runner and launcher -> wait for SIGTERM or SIGINT
      -> serve.shutdown -> ray.shutdown

Settings come from ``MORA_CONFIG_JSON`` when a parent (``mora-serve up``) resolved them, else from
``--profile`` and ``--config``. A failure is one line on stderr and exit status 1. With
``ray.address`` set it joins that cluster, refuses one that serves another mora-serve already, and
when it stops it removes its own application and leaves the cluster running.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from actors.guard import child_pids
from api.proxy import (
    common_environment,
    find_haproxy,
    haproxy_environment,
    python_proxy_environment,
    socket_directory,
)
from mora_serve.config import ENV_CONFIG, PROFILES, Settings, load_settings, settings_from_dump
from mora_serve.errors import ConfigError, MoraError
from mora_serve.processes import ParentWatch, StopSignals
from mora_serve.stack import (
    StackError,
    only_service,
    require_calibrator,
    require_port_free,
    require_redis,
    resolve_settings,
)

logger = logging.getLogger("mora.deploy")

START_POLL_S = 1.0
WATCH_POLL_S = 10.0
MAX_LOST_POLLS = 3
"""Unanswered status questions in a row after which Ray is taken for dead."""
ORPHAN_GRACE_S = 3.0
"""Time to stop in order once ``mora-serve up`` was killed. Its Redis has ended with it, so that no
request can be finished any more."""
RAY_TRIES = 3
"""Ray gives its own processes fixed times to start, which a busy machine can exceed."""
PRIVATE_LABEL = "mora-serve"
"""Label of the nodes of a Ray that one stack started for itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit status."""
    try:
        settings = read_settings(arguments, os.environ)
        logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(message)s")
        check(settings)
        with only_service(settings.data_dir), ParentWatch(ORPHAN_GRACE_S):
            serve_until_stopped(settings)
    except MoraError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def read_settings(arguments: Sequence[str] | None, environ: Mapping[str, str]) -> Settings:
    """The parent's resolved settings, or those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m api.deploy", description="Serve mora-serve.")
    parser.add_argument("--profile", choices=PROFILES, default="embedded")
    parser.add_argument("--config", type=Path, default=None, metavar="FILE")
    given = parser.parse_args(arguments)
    handed = environ.get(ENV_CONFIG)
    if handed is None:
        loaded = load_settings(given.profile, config_file=given.config, environ=environ)
        return resolve_settings(loaded)
    try:
        return settings_from_dump(json.loads(handed))
    except ValueError:
        raise ConfigError(f"{ENV_CONFIG} must be the JSON of resolved settings") from None


def check(settings: Settings) -> None:
    """Refuse to start what cannot work, before anything is started."""
    require_calibrator(settings)
    require_port_free(settings.server.host, settings.server.port)
    policy = settings.policy
    local = policy.path is not None and policy.path.startswith("/")
    if policy.backend != "fake" and local and not Path(policy.path or "", "config.json").is_file():
        raise StackError(
            f"policy.path must be a model directory, got {policy.path} (no config.json in it); "
            "see: mora-serve models prepare"
        )
    require_redis(settings)


def serve_until_stopped(settings: Settings) -> None:
    """Start Ray and Serve, wait for a signal, stop both. Raises ``StackError`` when it fails."""
    local = settings.ray.address is None
    os.environ.update(common_environment(local))
    directory: Path | None = None
    binary = find_haproxy(os.environ) if settings.server.haproxy else None
    if binary is None:
        if settings.server.haproxy:
            logger.warning("no HAProxy binary found: serving through Serve's Python proxy")
        os.environ.update(python_proxy_environment())
        settings = without_haproxy(settings)
    else:
        path, temporary = socket_directory(settings.data_dir)
        directory = path if temporary else None
        os.environ.update(haproxy_environment(binary, path))
    try:
        _serve(settings, local)
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def without_haproxy(settings: Settings) -> Settings:
    """Settings for Serve's Python proxy, which holds whole bodies: no file larger than a part."""
    server = settings.server
    limit = min(server.max_upload_bytes, server.max_part_bytes)
    if limit < server.max_upload_bytes:
        logger.warning(
            "without HAProxy a file may have %d bytes; larger ones go in parts or by uri", limit
        )
    bounded = server.model_copy(update={"max_upload_bytes": limit})
    return settings.model_copy(update={"server": bounded})


def _serve(settings: Settings, local: bool) -> None:
    # Ray reads the environment set above when it is imported.
    import ray

    try:
        _start_ray(settings) if local else _join_ray(str(settings.ray.address))
        # Ray replaced the signal handlers while it started, so ours come after it.
        with StopSignals() as signals:
            try:
                with signals.raising():
                    _deploy(settings, local)
                _watch(signals)
            finally:
                logger.info("stopping")
                _undeploy(local)
    finally:
        ray.shutdown()


def _start_ray(settings: Settings) -> None:
    """A Ray of our own. Raises ``StackError`` when it does not start in ``RAY_TRIES`` tries."""
    import ray

    for num_tries in range(1, RAY_TRIES + 1):
        before = child_pids()
        try:
            ray.init(
                address="local",
                num_cpus=settings.ray.num_cpus,
                object_store_memory=settings.ray.object_store_bytes,
                labels={PRIVATE_LABEL: "private"},
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:  # noqa: BLE001  Ray raises a bare Exception for a slow start
            reason = _cause(str(error))
        logger.warning("Ray did not start (try %d of %d): %s", num_tries, RAY_TRIES, reason)
        ray.shutdown()
        # A start that failed half way leaves its processes to the end of ours.
        _kill(child_pids() - before)
    raise StackError(f"Ray could not start in {RAY_TRIES} tries: {reason}")


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _join_ray(address: str) -> None:
    """Connect to a running Ray. Raises ``StackError`` when there is none, or it is not free."""
    import ray
    from ray import serve

    from api.ingress import APPLICATION

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # noqa: BLE001  of several kinds, whatever keeps us from joining
        raise StackError(
            f"ray.address must name a running Ray, got {address}: {_cause(str(error))}"
        ) from None
    if any(PRIVATE_LABEL in node.get("Labels", {}) for node in ray.nodes() if node["Alive"]):
        raise StackError(
            f"ray.address must not lead to the private Ray of another mora-serve, got {address}; "
            "stop that one, or start a Ray for this one ('ray start --head') and name its address"
        )
    if APPLICATION in serve.status().applications:
        raise StackError(
            f"ray.address must lead to a Ray that serves no application '{APPLICATION}' yet, got "
            f"{address}; stop the mora-serve that runs there, or remove what a killed one left "
            "with 'serve shutdown'"
        )


def _undeploy(local: bool) -> None:
    """Stop what was deployed; of a cluster that others use, only our application."""
    from ray import serve

    from api.ingress import APPLICATION

    if local:
        serve.shutdown()
        return
    try:
        if APPLICATION in serve.status().applications:
            serve.delete(APPLICATION)
    except Exception as error:  # noqa: BLE001  the cluster may be what was lost
        logger.warning("the application could not be removed (%s)", type(error).__name__)


def _deploy(settings: Settings, local: bool) -> None:
    from ray import serve

    from api.ingress import APPLICATION, build_application

    server = settings.server
    try:
        serve.start(
            proxy_location="HeadOnly" if local else "EveryNode",
            http_options={"host": server.host, "port": server.port},
            logging_config=_logging(settings),
        )
    except Exception as error:  # noqa: BLE001  what a proxy raised arrives as any kind
        raise StackError(f"Ray Serve could not start: {_cause(str(error))}") from None
    serve.run_many(
        [
            serve.RunTarget(
                build_application(settings),
                name=APPLICATION,
                route_prefix="/",
                logging_config=_logging(settings),
            )
        ],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    logger.info("serving on http://%s:%d", server.host, server.port)


def _logging(settings: Settings) -> dict[str, Any]:
    return {"log_level": settings.log_level.upper(), "enable_access_log": False}


def _watch(signals: StopSignals) -> None:
    """Wait for a signal. Raises ``StackError`` when the application cannot start or Ray is lost."""
    lost, poll_s = 0, START_POLL_S
    while not signals.wait(poll_s):
        try:
            status, message = _application_status()
        except Exception as error:  # noqa: BLE001  whatever Ray raises, it did not answer
            lost += 1
            logger.warning("Ray Serve did not answer (%s)", type(error).__name__)
            if lost == MAX_LOST_POLLS:
                raise StackError("Ray was lost: its processes no longer answer") from None
            continue
        lost = 0
        if status == "DEPLOY_FAILED":
            raise StackError(f"the application could not start: {message}")
        poll_s = WATCH_POLL_S if status == "RUNNING" else START_POLL_S


def _application_status() -> tuple[str, str]:
    from ray import serve

    from api.ingress import APPLICATION

    application = serve.status().applications[APPLICATION]
    failed = [
        f"{name}: {_cause(item.message)}"
        for name, item in application.deployments.items()
        if item.status.value in ("DEPLOY_FAILED", "UNHEALTHY")
    ]
    return application.status.value, "; ".join(failed) or _cause(application.message)


def _cause(message: str) -> str:
    """The line of Serve's report that names the error: the last one of a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


if __name__ == "__main__":
    sys.exit(main())
