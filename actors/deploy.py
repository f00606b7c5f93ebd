"""Serve applications of the engines: the one place that decorates classes and reads all settings.

:func:`build_backends` returns bound applications; the gateway's ingress binds them as arguments, so
that one ``serve.run`` deploys everything. Each deployment constructs its plain class inside the
replica process, from the settings dump it was bound with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from actors.adapters import ServeGenerator, ServeScorer, Tries
from actors.autoscaling import backlog_policy
from actors.generator import GeneratorReplica, PolicyEngine
from actors.metrics import GeneratorMetrics, MetricsPublisher, ScorerMetrics, StatsCollector
from actors.scorer import ScorerReplica
from actors.worker import WorkerReplica
from mora_serve.config import (
    Settings,
    dump_settings,
    settings_from_dump,
)
from mora_serve.openmp import torch_environment
from mora_serve.ports import Scorer
from mora_serve.scorer_settings import ScorerSettings
from mora_serve.sections import ReplicaSettings
from mora_serve.store import open_stores

GENERATOR = "generator"
RUNNER = "runner"
LAUNCHER = "launcher"
REPORTS_PER_PERIOD = 3
"""How often calls under way are reported within the period they are averaged over."""


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
    generator = _deployment(GeneratorDeployment, GENERATOR, settings.policy.replica).bind(dump)
    scorers = {
        scorer.name: _deployment(
            ScorerDeployment,
            scorer_deployment_name(scorer.name),
            scorer.replica,
            env_vars=torch_environment(scorer.num_threads),
        ).bind(dump, scorer.name)
        for scorer in settings.scorers
    }
    runner = _deployment(
        RunnerDeployment,
        RUNNER,
        settings.runner.replica,
        policy=backlog_policy(settings.runner.shard_rows, settings.redis),
    ).bind(dump, generator, scorers)
    launcher = _deployment(LauncherDeployment, LAUNCHER, settings.trainer.launcher).bind(dump)
    return Backends(generator, scorers, runner, launcher)


def pools_from_zero(settings: Settings) -> frozenset[str]:
    """Deployments that may be without a replica."""
    replicas = {
        GENERATOR: settings.policy.replica,
        RUNNER: settings.runner.replica,
        **{scorer_deployment_name(item.name): item.replica for item in settings.scorers},
    }
    return frozenset(name for name, replica in replicas.items() if replica.min_replicas == 0)


def _deployment(
    target: type,
    name: str,
    replica: ReplicaSettings,
    *,
    env_vars: Mapping[str, str] | None = None,
    policy: AutoscalingPolicy | None = None,
) -> Any:
    options: dict[str, Any] = {
        "name": name,
        "max_ongoing_requests": replica.max_ongoing_requests,
        "max_surge_percent": replica.max_surge_percent,
        "health_check_period_s": replica.health_check_period_s,
        "health_check_timeout_s": replica.health_check_timeout_s,
        "graceful_shutdown_timeout_s": replica.graceful_shutdown_timeout_s,
        "ray_actor_options": _actor_options(replica, env_vars or {}),
    }
    if replica.max_replicas > replica.min_replicas:
        options["autoscaling_config"] = _autoscaling(replica, policy)
    else:
        options["num_replicas"] = replica.max_replicas
    if replica.bundles:
        options["placement_group_bundles"] = [dict(bundle) for bundle in replica.bundles]
        options["placement_group_strategy"] = replica.bundle_strategy
    return serve.deployment(**options)(target)


def _autoscaling(replica: ReplicaSettings, policy: AutoscalingPolicy | None) -> AutoscalingConfig:
    target = replica.target_ongoing_requests or max(1, replica.max_ongoing_requests // 2)
    return AutoscalingConfig(
        min_replicas=replica.min_replicas,
        max_replicas=replica.max_replicas,
        target_ongoing_requests=target,
        upscale_delay_s=replica.upscale_delay_s,
        downscale_delay_s=replica.downscale_delay_s,
        downscale_to_zero_delay_s=replica.downscale_to_zero_delay_s,
        look_back_period_s=replica.look_back_period_s,
        metrics_interval_s=replica.look_back_period_s / REPORTS_PER_PERIOD,
        **({} if policy is None else {"policy": policy}),
    )


def _actor_options(replica: ReplicaSettings, env_vars: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": replica.num_cpus, "num_gpus": replica.num_gpus}
    if replica.resources:
        options["resources"] = dict(replica.resources)
    if env_vars:
        options["runtime_env"] = {"env_vars": dict(env_vars)}
    return options


class GeneratorDeployment(GeneratorReplica):
    """Serve awaits the coroutine ``__init__`` before it routes requests, ``__del__`` at the end."""

    async def __init__(self, dump: Mapping[str, Any]) -> None:  # type: ignore[misc]
        settings = settings_from_dump(dump)
        stores = open_stores(settings)
        super().__init__(
            build_engine(settings), stores.jobs, settings.policy.model, metrics=GeneratorMetrics()
        )
        self._publisher = MetricsPublisher(stores.metrics, _replica_name())
        await self.start()
        await self._publisher.start()

    async def __del__(self) -> None:  # type: ignore[misc]
        await self._publisher.stop()
        await self.stop()


class ScorerDeployment(ScorerReplica):
    async def __init__(self, dump: Mapping[str, Any], name: str) -> None:  # type: ignore[misc]
        from actors.scoring.parity import require_parity

        settings = settings_from_dump(dump)
        section = next(item for item in settings.scorers if item.name == name)
        scorer = build_scorer(settings, section)
        super().__init__(
            scorer,
            timeout_s=section.timeout_s,
            token_budget=section.token_budget,
            metrics=ScorerMetrics(),
        )
        self._publisher = MetricsPublisher(open_stores(settings).metrics, _replica_name())
        stats = getattr(scorer, "stats", None)
        if stats is not None:
            REGISTRY.register(StatsCollector(stats, "mora_scorer"))
        await self.start()
        if section.parity and section.backend != "fake":
            await require_parity(scorer, section)
        await self._publisher.start()

    async def __del__(self) -> None:  # type: ignore[misc]
        await self._publisher.stop()
        await self.stop()


class RunnerDeployment(WorkerReplica):
    async def __init__(  # type: ignore[misc]
        self,
        dump: Mapping[str, Any],
        generator: DeploymentHandle[Any],
        scorers: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        from actors.runner import ROW_LISTS, BatchRunner

        settings = settings_from_dump(dump)
        stores = open_stores(settings)
        # Of a row whose engine was lost, the runner alone knows what it may do again.
        tries, chunk = Tries(lost_repeats=0), ROW_LISTS.max_items
        ports = (
            ServeGenerator(generator, tries=tries, chunk=chunk),
            ServeScorer(scorers, tries=tries, chunk=chunk),
        )
        super().__init__(BatchRunner(*ports, stores, settings, _replica_name()))
        await self.start()

    async def __del__(self) -> None:  # type: ignore[misc]
        await self.stop()


class LauncherDeployment(WorkerReplica):
    async def __init__(self, dump: Mapping[str, Any]) -> None:  # type: ignore[misc]
        from actors.launcher import TrainerLauncher

        settings = settings_from_dump(dump)
        stores = open_stores(settings)
        super().__init__(TrainerLauncher(stores.jobs, stores.batches, settings))
        await self.start()

    async def __del__(self) -> None:  # type: ignore[misc]
        await self.stop()


def _replica_name() -> str:
    replica = serve.get_replica_context().replica_id
    return f"{replica.deployment_id.name}-{replica.unique_id}"


def policy_directory(settings: Settings) -> str:
    """Where the policy's weights are: a directory, or a hub id."""
    policy = settings.policy
    return policy.path or str(settings.data_dir.absolute() / "models" / policy.model)


def build_engine(settings: Settings) -> PolicyEngine:
    """The engine of ``settings.policy``, not started."""
    if settings.policy.backend == "fake":
        from actors.fake_engine import FakeEngine

        return FakeEngine(settings.policy)
    from actors.vllm_engine import VllmGenerator

    return VllmGenerator(settings.policy, policy_directory(settings))


def build_scorer(settings: Settings, scorer: ScorerSettings) -> Scorer:
    """The scorer of one section of ``settings.scorers``, not started."""
    if scorer.backend == "fake":
        from mora_serve.fakes import FakeScorer

        return FakeScorer(scorer.dimensions, scorer.fake_delay_ms, max_tokens=scorer.max_tokens)
    if scorer.backend == "remote":
        from actors.scoring.remote.scorer import RemoteScorer

        return RemoteScorer(scorer)
    from actors.scoring.build import model_scorer

    return model_scorer(scorer, policy_directory(settings))
