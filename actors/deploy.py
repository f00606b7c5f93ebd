"""Serve applications of the engines: the one place that decorates classes and reads all settings.

:func:`build_backends` returns bound applications; the gateway's ingress binds them as arguments, so
that one ``serve.run`` deploys everything. Each deployment constructs its plain class inside the
replica process, from the settings dump it was bound with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from actors.adapters import ServeGenerator, ServeScorer
from actors.generator import GeneratorReplica, PolicyEngine
from actors.scorer import ScorerReplica
from mora_serve.config import (
    ReplicaSettings,
    ScorerSettings,
    Settings,
    dump_settings,
    settings_from_dump,
)
from mora_serve.errors import MoraError
from mora_serve.ports import Scorer

logger = logging.getLogger(__name__)

GENERATOR = "generator"
RUNNER = "runner"
LAUNCHER = "launcher"


def scorer_deployment_name(name: str) -> str:
    return f"scorer-{name}"


@dataclass(frozen=True, slots=True)
class Backends:
    """Bound applications; pass them (or parts) as arguments to another deployment's ``bind``.

    Inside that deployment they arrive as ``DeploymentHandle``: wrap them with
    :class:`~actors.adapters.ServeGenerator` and :class:`~actors.adapters.ServeScorer`.
    """

    generator: Application
    scorers: Mapping[str, Application]
    """By scorer name, as in ``settings.scorers``."""
    runner: Application
    launcher: Application


def build_backends(settings: Settings) -> Backends:
    """Applications for every engine that ``settings`` names. Starts nothing."""
    dump = dump_settings(settings, reveal=True)
    generator = _deployment(
        GeneratorDeployment,
        GENERATOR,
        settings.policy.replica,
    ).bind(dump)
    scorers = {
        scorer.name: _deployment(
            ScorerDeployment, scorer_deployment_name(scorer.name), scorer.replica
        ).bind(dump, scorer.name)
        for scorer in settings.scorers
    }
    return Backends(
        generator=generator,
        scorers=scorers,
        runner=_deployment(RunnerDeployment, RUNNER, settings.runner.replica).bind(
            dump, generator, scorers
        ),
        launcher=_deployment(LauncherDeployment, LAUNCHER, ReplicaSettings()).bind(dump),
    )


def _deployment(
    target: type, name: str, replica: ReplicaSettings, env_vars: Mapping[str, str] | None = None
) -> Any:
    options: dict[str, Any] = {
        "name": name,
        "max_ongoing_requests": replica.max_ongoing_requests,
        "health_check_period_s": replica.health_check_period_s,
        "health_check_timeout_s": replica.health_check_timeout_s,
        "graceful_shutdown_timeout_s": replica.graceful_shutdown_timeout_s,
        "ray_actor_options": _actor_options(replica, env_vars or {}),
    }
    if replica.max_replicas > replica.min_replicas:
        options["autoscaling_config"] = {
            "min_replicas": replica.min_replicas,
            "max_replicas": replica.max_replicas,
        }
    else:
        options["num_replicas"] = replica.max_replicas
    return serve.deployment(**options)(target)


def _actor_options(replica: ReplicaSettings, env_vars: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": replica.num_cpus, "num_gpus": replica.num_gpus}
    if replica.resources:
        options["resources"] = dict(replica.resources)
    if env_vars:
        options["runtime_env"] = {"env_vars": dict(env_vars)}
    return options


class GeneratorDeployment(GeneratorReplica):
    """Serve calls the coroutine ``__init__`` and waits for it before routing requests."""

    async def __init__(self, dump: Mapping[str, Any]) -> None:  # type: ignore[misc]
        from mora_serve.store import open_stores

        settings = settings_from_dump(dump)
        super().__init__(build_engine(settings), open_stores(settings).jobs, settings.policy.model)
        await self.start()

    async def __del__(self) -> None:  # type: ignore[misc]
        await self.stop()


class ScorerDeployment(ScorerReplica):
    async def __init__(self, dump: Mapping[str, Any], name: str) -> None:  # type: ignore[misc]
        settings = settings_from_dump(dump)
        scorer = next(item for item in settings.scorers if item.name == name)
        super().__init__(
            build_scorer(settings, scorer),
            timeout_s=scorer.timeout_s,
            token_budget=scorer.token_budget,
        )
        await self.start()

    async def __del__(self) -> None:  # type: ignore[misc]
        await self.stop()


class Worker(Protocol):
    """A component that works by itself until it is stopped."""

    async def run(self) -> None: ...
    async def stop(self) -> None: ...


class WorkerReplica:
    """Runs a :class:`Worker` in the background; unhealthy once it has ended by itself."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._worker.run())

    async def check_health(self) -> None:
        if self._task is not None and self._task.done():
            error = None if self._task.cancelled() else self._task.exception()
            raise MoraError(f"the worker ended by itself ({type(error).__name__})")

    async def stop(self) -> None:
        """Let the worker finish what it holds and end."""
        await self._worker.stop()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


class RunnerDeployment(WorkerReplica):
    async def __init__(  # type: ignore[misc]
        self,
        dump: Mapping[str, Any],
        generator: DeploymentHandle[Any],
        scorers: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        from actors.runner import BatchRunner
        from mora_serve.store import open_stores

        settings = settings_from_dump(dump)
        super().__init__(
            BatchRunner(
                ServeGenerator(generator),
                ServeScorer(scorers),
                open_stores(settings),
                settings,
                serve.get_replica_context().replica_id.unique_id,
            )
        )
        await self.start()

    async def __del__(self) -> None:  # type: ignore[misc]
        await self.stop()


class LauncherDeployment(WorkerReplica):
    async def __init__(self, dump: Mapping[str, Any]) -> None:  # type: ignore[misc]
        from actors.launcher import TrainerLauncher
        from mora_serve.store import open_stores

        settings = settings_from_dump(dump)
        super().__init__(TrainerLauncher(open_stores(settings).jobs, settings))
        await self.start()

    async def __del__(self) -> None:  # type: ignore[misc]
        await self.stop()


def build_engine(settings: Settings) -> PolicyEngine:
    """The engine of ``settings.policy``, not started."""
    if settings.policy.backend == "fake":
        from actors.fake_engine import FakeEngine

        return FakeEngine(settings.policy)
    from actors.vllm_engine import VllmGenerator

    directory = settings.data_dir / "models" / settings.policy.model
    return VllmGenerator(settings.policy, settings.policy.path or str(directory))


def build_scorer(settings: Settings, scorer: ScorerSettings) -> Scorer:
    """The scorer of one section of ``settings.scorers``, not started."""
    if scorer.backend == "fake":
        from mora_serve.fakes import FakeScorer

        return FakeScorer(scorer.dimensions, scorer.fake_delay_ms, max_tokens=scorer.max_tokens)
    if scorer.backend == "heads":
        from actors.heads import HeadScorer

        return HeadScorer(scorer, settings)
    from actors.seqcls import SequenceClassificationScorer

    return SequenceClassificationScorer(scorer)
