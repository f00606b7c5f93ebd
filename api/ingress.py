"""The gateway as a Serve deployment over the engines' handles.

Imported in the replica and by the composition root, never by the application itself: routes know
ports, not Ray.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from actors.adapters import ServeGenerator, ServeScorer
from actors.deploy import build_backends, pools_from_zero
from actors.metrics import MetricsPublisher
from api.app import create_app
from api.deps import Deps
from api.pools import CheckedPools, PoolMonitor
from api.telemetry import GatewayMetrics
from mora_serve.calibrators import load_calibrator
from mora_serve.config import Settings, dump_settings, settings_from_dump
from mora_serve.service import MoraService
from mora_serve.store import open_stores

APPLICATION = "mora"
GATEWAY = "gateway"
MAX_ONGOING_REQUESTS = 4096
"""High on purpose: the gateway refuses work by prompts, before Serve would by requests."""


class Gateway:
    """Builds the application once the replica runs: ports need its event loop and handles."""

    def __init__(
        self,
        dump: Mapping[str, Any],
        generator: DeploymentHandle[Any],
        scorers: Mapping[str, DeploymentHandle[Any]],
        background: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        # ``background`` workers are bound so that they are deployed with us; nobody calls them.
        self._settings = settings_from_dump(dump)
        level = self._settings.log_level.upper()
        logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(message)s")
        self._generator = ServeGenerator(generator)
        self._scorer = ServeScorer(scorers)
        self._pools = tuple(
            handle.deployment_name
            for handle in (generator, *scorers.values(), *background.values())
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        settings = self._settings
        # Asking a scorer that may start from zero for its revision would start it.
        idle = any(scorer.replica.min_replicas == 0 for scorer in settings.scorers)
        pools = PoolMonitor(_deployments, self._pools, from_zero=pools_from_zero(settings))
        service = MoraService(self._generator, self._scorer, load_calibrator(settings), settings)
        stores = open_stores(settings)
        metrics = GatewayMetrics()
        name = f"{GATEWAY}-{serve.get_replica_context().replica_id.unique_id}"
        return create_app(
            Deps(
                service=service,
                generator=self._generator,
                scorer=self._scorer,
                stores=stores,
                settings=settings,
                readiness=CheckedPools(pools, None if idle else service.start),
                replica=name,
                sets_request_id=False,
                metrics=metrics,
                publisher=MetricsPublisher(stores.metrics, name, metrics.registry),
            )
        )


def _deployments() -> Mapping[str, Any]:
    application = serve.status().applications.get(APPLICATION)
    return {} if application is None else application.deployments


def build_application(settings: Settings) -> Application:
    """The whole service as one bound Serve application; starts nothing."""
    backends, server = build_backends(settings), settings.server
    deployment = serve.deployment(
        name=GATEWAY,
        num_replicas=server.replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=10.0,
        ray_actor_options={"num_cpus": server.num_cpus, "resources": dict(server.resources)},
    )(serve.ingress()(Gateway))
    bound: Application = deployment.bind(
        dump_settings(settings, reveal=True),
        backends.generator,
        dict(backends.scorers),
        {"runner": backends.runner, "launcher": backends.launcher},
    )
    return bound
