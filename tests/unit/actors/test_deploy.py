"""What Serve is told about each deployment."""

from __future__ import annotations

from typing import Any

from ray import cloudpickle
from ray.serve._private.config import DeploymentConfig

from actors.autoscaling import BacklogPolicy
from actors.deploy import build_backends, build_engine, build_scorer, pools_from_zero
from actors.fake_engine import FakeEngine
from actors.scoring.remote.scorer import RemoteScorer
from mora_serve.config import dump_settings, load_settings, settings_from_dump
from mora_serve.fakes import FakeScorer

DIMENSIONS = ("helpful", "harmless", "truthful")


def backends(**overrides: Any) -> Any:
    overrides.setdefault("redis", {"url": "redis://127.0.0.1:1"})
    return build_backends(load_settings("fake", environ={}, overrides=overrides))


def deployment(application: Any) -> Any:
    return application._bound_deployment


def test_every_engine_of_the_settings_has_a_deployment() -> None:
    built = backends()
    assert set(built.scorers) == {"fake-helpful", "fake-harmless", "fake-truthful"}
    names = [
        deployment(item).name
        for item in (built.generator, *built.scorers.values(), built.runner, built.launcher)
    ]
    assert names == [
        "generator",
        "scorer-fake-helpful",
        "scorer-fake-harmless",
        "scorer-fake-truthful",
        "runner",
        "launcher",
    ]


def test_placement_and_limits_come_from_the_replica_section() -> None:
    replica = {
        "min_replicas": 2,
        "max_replicas": 2,
        "num_gpus": 1,
        "num_cpus": 4,
        "resources": {"h100": 1},
        "max_ongoing_requests": 7,
        "max_surge_percent": 50,
        "health_check_period_s": 3,
        "graceful_shutdown_timeout_s": 11,
    }
    built = deployment(backends(policy={"replica": replica}).generator)
    assert built.num_replicas == 2
    assert built.max_ongoing_requests == 7
    options = built.ray_actor_options
    assert (options["num_gpus"], options["num_cpus"]) == (1, 4)
    assert options["resources"] == {"h100": 1}
    config = built._deployment_config
    assert config.health_check_period_s == 3
    assert config.max_surge_percent == 50
    assert config.graceful_shutdown_timeout_s == 11


def test_an_engine_on_several_nodes_gets_a_placement_group() -> None:
    replica = {"num_cpus": 1, "bundles": [{"GPU": 1, "CPU": 2}] * 4, "bundle_strategy": "SPREAD"}
    built = deployment(backends(policy={"replica": replica}).generator)
    config = built._replica_config
    assert config.placement_group_bundles == [{"GPU": 1, "CPU": 2}] * 4
    assert config.placement_group_strategy == "SPREAD"
    assert deployment(backends().generator)._replica_config.placement_group_bundles is None


def test_the_launcher_can_be_placed() -> None:
    launcher = {"num_cpus": 2, "resources": {"gateway-nodes": 1}}
    options = deployment(backends(trainer={"launcher": launcher}).launcher).ray_actor_options
    assert (options["num_cpus"], options["resources"]) == (2, {"gateway-nodes": 1})


def test_a_range_of_replicas_autoscales() -> None:
    built = deployment(backends(policy={"replica": {"max_replicas": 4}}).generator)
    autoscaling = built._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas) == (1, 4)


def test_scaling_takes_its_times_from_the_replica_section() -> None:
    replica = {
        "min_replicas": 0,
        "max_replicas": 3,
        "target_ongoing_requests": 5,
        "upscale_delay_s": 1,
        "downscale_delay_s": 20,
        "downscale_to_zero_delay_s": 60,
        "look_back_period_s": 6,
    }
    built = deployment(backends(policy={"replica": replica}).generator)
    scaling = built._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 3)
    assert scaling.target_ongoing_requests == 5
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (1, 20)
    assert scaling.downscale_to_zero_delay_s == 60
    assert (scaling.look_back_period_s, scaling.metrics_interval_s) == (6, 2)


def test_the_runners_policy_reaches_the_controller_without_showing_the_stores_password() -> None:
    redis = {"url": "redis://:hush@127.0.0.1:1", "key_prefix": "other"}
    built = deployment(backends(runner={"shard_rows": 10}, redis=redis).runner)
    arrived = DeploymentConfig.from_proto_bytes(built._deployment_config.to_proto_bytes())
    again = cloudpickle.loads(cloudpickle.dumps(arrived))
    for config in (arrived, again):
        policy = config.autoscaling_config.policy
        assert isinstance(policy.get_policy(), BacklogPolicy)
        assert policy.policy_kwargs == {}
        assert "hush" not in f"{config!r} {config.model_dump()} {vars(policy.get_policy())}"


def test_pools_that_may_have_no_replica_are_named() -> None:
    none = {"min_replicas": 0}
    scorer = {"name": "one", "backend": "fake", "dimensions": DIMENSIONS, "replica": none}
    overrides = {"policy": {"replica": none}, "scorers": [scorer]}
    settings = load_settings("fake", environ={}, overrides=overrides)
    assert pools_from_zero(settings) == {"generator", "scorer-one"}


def test_the_fake_backend_needs_no_weights() -> None:
    settings = load_settings("fake", environ={})
    assert isinstance(build_engine(settings), FakeEngine)
    assert isinstance(build_scorer(settings, settings.scorers[0]), FakeScorer)


def test_a_remote_scorer_reaches_its_replica_with_its_key() -> None:
    remote = {"url": "http://rm/classify", "protocol": "classify", "api_key": "key-0815"}
    columns = {name: {"label": index} for index, name in enumerate(DIMENSIONS)}
    section = {"name": "rm", "backend": "remote", "dimensions": DIMENSIONS, "columns": columns}
    overrides = {"scorers": [{**section, "remote": remote}]}
    settings = load_settings("fake", environ={}, overrides=overrides)
    arrived = settings_from_dump(dump_settings(settings, reveal=True)).scorers[0]
    assert arrived.remote is not None
    assert arrived.remote.api_key is not None
    assert arrived.remote.api_key.get_secret_value() == "key-0815"
    assert isinstance(build_scorer(settings, arrived), RemoteScorer)
    assert "key-0815" not in str(dump_settings(settings))
