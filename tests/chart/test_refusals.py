"""Values that would break, or bare, an installation later are refused by name when it is made."""

from __future__ import annotations

from typing import Any

import pytest

from mora_serve.config import PROFILES, load_settings
from tests.chart.charts import RefusedError, environment, render
from tests.chart.test_drift import settings_of

FORBIDDEN = "bad key!"
REMOTE = {"name": "rm", "backend": "remote", "dimensions": ["truthful"], "sign": 1,
          "remote": {"url": "http://rm/classify", "protocol": "classify"}}  # fmt: skip
FAKE = {"name": "one", "backend": "fake", "dimensions": ["helpful", "harmless"]}
VLLM = {"name": "judge", "preset": "qwen3guard-gen-8b", "engine": "vllm",
        "dimensions": ["harmless"], "replica": {"num_gpus": 1}}  # fmt: skip
DEVICE = "workerGroups.generator.resources"
AGENTS: dict[str, Any] = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}


def remote(**fields: Any) -> list[dict[str, Any]]:
    return [FAKE, {**REMOTE, "remote": {**REMOTE["remote"], **fields}}]  # type: ignore[dict-item]


def devices(name: str, request: Any, limit: Any) -> dict[str, Any]:
    found = {"requests": {name: request}, "limits": {name: limit}}
    return {
        f"{DEVICE}.{kind}": {"cpu": "8", "memory": "48Gi"}
        | {key: value for key, value in given.items() if value is not None}
        for kind, given in found.items()
    }


RANKS: list[tuple[str, dict[str, Any], str]] = [
    ("default", {"config.policy.engine.tensor_parallel_size": 4},
     "must be at most replica.num_gpus (1), got 4"),
    ("default", {"config.policy.engine.data_parallel_size": 2},
     "must be at most replica.num_gpus (1), got 2"),
    ("default", {"config.policy.engine.distributed_executor_backend": "ray"},
     "config.policy.replica.bundles must have one bundle with a GPU for each rank (1)"),
    ("multi-gpu", {"config.policy.engine.tensor_parallel_size": 4},
     "config.policy.engine: tensor_parallel_size * pipeline_parallel_size"),
    ("single-gpu", {"config.policy.engine.pipeline_parallel_size": 2},
     "must be at most replica.num_gpus (0.4), got 2"),
    ("large", {"config.policy.engine.pipeline_parallel_size": 4},
     "must be at most the 16 of replica.bundles that have a GPU, one for each rank, got 32"),
    ("large", {"config.policy.engine.distributed_executor_backend": "mp"},
     "config.policy.engine.distributed_executor_backend must be ray with replica.bundles, got mp"),
    ("large", {"config.policy.engine.distributed_executor_backend": None},
     "distributed_executor_backend must be ray with replica.bundles, got none"),
    ("default", {"config.scorers": [{**VLLM, "engine_args": {"tensor_parallel_size": 2}}]},
     "config.scorers.judge.engine_args: tensor_parallel_size"),
]  # fmt: skip


@pytest.mark.parametrize(("profile", "values", "said"), RANKS)
def test_an_engine_has_a_gpu_for_each_rank(profile: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        render(profile, values=values)
    assert said in str(refusal.value)


def test_engines_that_fit_their_gpus_or_run_on_cpus_are_taken() -> None:
    pair = {"workerGroups.generator.gpus": 2, "config.policy.replica.num_gpus": 2,
            "config.policy.engine.tensor_parallel_size": 2}  # fmt: skip
    assert settings_of(render(values=pair)).policy.engine["tensor_parallel_size"] == 2
    sockets = {"config.policy.engine": {"tensor_parallel_size": 2}}
    assert settings_of(render("cpu", values=sockets)).policy.replica.num_gpus == 0


BAD: list[tuple[dict[str, Any], str]] = [
    # Secrets in what everybody who reads the RayService sees.
    ({"gcsFaultTolerance.external.address": "redis://:pw@host:6379"},
     "gcsFaultTolerance.external.address must not hold a URL with a password"),
    ({"blobs.s3.url": "s3://AKIA:pw@bucket/x"}, "blobs.s3.url must not hold a URL with a password"),
    ({"blobs.s3.endpoint": "http://u:pw@minio:9000"}, "blobs.s3.endpoint must not hold"),
    ({"config.server.file_uri_prefixes": ["ftp://u:pw@host/"]},
     "config.server.file_uri_prefixes must not hold"),
    ({"config.scorers": remote(url="http://u:pw@rm/classify")},
     "config.scorers.rm.remote.url must not hold"),
    ({"config.scorers": remote(api_key="plain")}, "api_key"),
    ({"config.scorers": remote(api_key_env="REWARD_KEY")},
     "config.scorers.rm.remote.api_key_env must name a variable of extraEnv, got REWARD_KEY"),
    *(({"extraEnv": [{"name": name, "value": "x"}]}, f"extraEnv.{name} must not be in the values")
      for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DB_PASSWORD")),
    ({"extraEnv": [{"name": "HTTPS_PROXY", "value": "http://me:pw@proxy"}]},
     "extraEnv.HTTPS_PROXY must not hold a URL with a password"),
    ({"workerGroups.trainer.env": [{"name": "HF_TOKEN", "value": "x"}]},
     "workerGroups.trainer.env.HF_TOKEN must not be in the values"),
    ({"extraEnv": [{"name": "MORA_SCORERS__0__REMOTE__API_KEY", "value": "x"}]},
     "into the variable that its remote.api_key_env names"),
    # What an API server refuses, or drops from a RayService's pods.
    *(({path: {FORBIDDEN: "x"}}, FORBIDDEN) for path in (
        "head.podLabels", "head.nodeSelector", "head.podAnnotations", "service.annotations",
        "service.labels", "monitoring.podMonitor.labels", "serviceAccount.annotations")),
    ({"head.podLabels": {"a/b/c": "x"}}, "a/b/c"),
    (devices("rdma/hca", "1", None), f"{DEVICE}.limits.rdma/hca must be given with requests"),
    (devices("rdma/hca", "1", "2"), f"{DEVICE}.requests.rdma/hca must be limits.rdma/hca (2)"),
    (devices("rdma/hca", "0.5", "0.5"), "pattern"),
    (devices("hugepages-2Mi", "1Gi", "2Gi"), f"{DEVICE}.requests.hugepages-2Mi must be limits"),
    ({"data.size": 0}, "size"),
    ({"data.size": "0Gi"}, "size"),
    ({f"valkey.resources.{kind}.memory": "48m" for kind in ("limits", "requests")}, "memory"),
    ({f"{DEVICE}.limits.cpu": "8Gi"}, "cpu"),
    ({"tmpSizeLimit": "20m"}, "tmpSizeLimit"),
    ({"head.shmSize": "64Mi"}, "head.shmSize must be at least 100Mi, got 64Mi"),
    ({"ingress.hosts": [{"host": "Bad Host_"}]}, "host"),
    ({"ingress.hosts": [{"host": "mora.example.org", "path": "nopath"}]}, "path"),
    ({"ingress.tls": [{"secretName": "tls", "hosts": ["Bad Host_"]}]}, "hosts"),
    ({"httpRoute.hostnames": ["Bad Host_"]}, "hostnames"),
    ({"networkPolicy.clients": [{}]}, "clients"),
    ({"networkPolicy.clients": [{"ipBlock": {}}]}, "cidr"),
    ({"networkPolicy.clients": [{**AGENTS, "ipBlock": {"cidr": "10.0.0.0/8"}}]}, "clients"),
    ({"networkPolicy.monitoring": [{"podSelector": {"matchLabel": {"app": "x"}}}]}, "matchLabel"),
    ({"extraEnv": [{"name": "A", "valueFrom": {}}]}, "valueFrom"),
    ({"extraEnv": [{"name": "A", "valueFrom": {"secretKeyRef": {"nme": "x"}}}]}, "nme"),
    ({"extraEnv": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "x"}}}]}, "key"),
    ({"podSecurityContext.runAsUser": 0}, "runAsUser"),
    ({"valkey.podSecurityContext.runAsUser": 0}, "runAsUser"),
    ({"extraObjects": [{"a": 1}]}, "apiVersion"),
    # What no API server takes of the pods that are made later.
    ({"probes.liveness.successThreshold": 2}, "successThreshold"),
    ({"probes.startup.successThreshold": 1}, "successThreshold"),
    ({"podSecurityContext.seccompProfile": {"type": "Localhost"}}, "localhostProfile"),
    ({"podSecurityContext.seccompProfile.localhostProfile": "p.json"}, "seccompProfile"),
    ({"valkey.podSecurityContext.appArmorProfile": {"type": "Localhost"}}, "localhostProfile"),
    ({"modelCache": {"type": "hostPath", "hostPath": "/a/../b"}}, "hostPath"),
    ({"valkey.image.tag": ""}, "valkey"),
    # Labels by which KubeRay's Services find the head.
    *(({"head.podLabels": {label: "x"}}, label) for label in (
        "ray.io/identifier", "ray.io/node-type", "app.kubernetes.io/created-by",
        "app.kubernetes.io/name")),
    # Prometheus shut out of the gateways that it scrapes.
    ({"networkPolicy": {"enabled": True, "clients": [AGENTS]},
      "monitoring.serviceMonitor.enabled": True}, "networkPolicy.monitoring must name Prometheus"),
    # What the settings' loader would refuse in the cluster.
    ({"config.sampling": {"n": 20, "n_max": 16}}, "config.sampling.n_max must be at least n (20)"),
    ({"config.scorers": [FAKE, {**FAKE, "dimensions": ["truthful"]}]},
     "config.scorers must have distinct names, got one twice"),
    # Every pod at Ray's dashboard.
    *(({"networkPolicy.operatorPodSelector": selector},
       "networkPolicy.operatorPodSelector must select the operator's pods")
      for selector in ({"matchLabels": None},
                       {"matchLabels": {"app.kubernetes.io/name": None}})),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), BAD, ids=[next(iter(values)) for values, _ in BAD])
def test_it_is_refused_by_name(values: dict[str, Any], said: str, helm_version: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        render(values=values, version=helm_version)
    assert said in str(refusal.value)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_a_profile_samples_at_most_is_known_to_the_chart(profile: str) -> None:
    sampling = load_settings(profile, environ={}).sampling
    given = {"profile": profile, "image.tag": "x", "config.sampling.n": sampling.n_max + 1}
    with pytest.raises(RefusedError, match=f"must be at least n .{sampling.n_max + 1}., got"):
        render(values=given)
    below = {**given, "config.sampling": {"n_max": sampling.n - 1}}
    del below["config.sampling.n"]
    with pytest.raises(RefusedError, match=f"must be at least n .{sampling.n}., got"):
        render(values=below)
    render(values={**given, "config.sampling.n": sampling.n_max})


def test_values_near_the_refused_ones_are_taken() -> None:
    variables = [
        {"name": "HF_HUB_DISABLE_IMPLICIT_TOKEN", "value": "1"},
        {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": "/var/run/token"},
        {"name": "GOOGLE_APPLICATION_CREDENTIALS", "value": "/etc/gcp.json"},
        {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "w", "key": "k"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ]
    block = {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}
    rendered = render(
        values={
            "extraEnv": variables,
            "networkPolicy.clients": [AGENTS, block],
            "networkPolicy.operatorPodSelector": {
                "matchLabels": None,
                "matchExpressions": [{"key": "app", "operator": "In", "values": ["kuberay"]}],
            },
            "blobs.s3.url": "s3://bucket/a@b",
            "gcsFaultTolerance.external.address": "rediss://user@redis:6380",
            "data.size": "0.5Ti",
            "head.podAnnotations": {"Example.org/a": "x"},
            "head.podLabels": {"team": "a", "example.org/app.kubernetes.io": "x"},
            "podSecurityContext.seccompProfile": {
                "type": "Localhost",
                "localhostProfile": "mora.json",
            },
            "probes.readiness.successThreshold": 2,
            "modelCache": {"type": "hostPath", "hostPath": "/srv/a..b/models"},
            "valkey.image": {"tag": "", "digest": f"sha256:{'0' * 64}"},
            "networkPolicy.monitoring": [AGENTS],
            "monitoring.serviceMonitor.enabled": True,
            "ingress": {"enabled": True, "hosts": [{"host": "*.example.org"}, {"host": ""}]},
            "extraObjects": [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}],
            **devices("rdma/hca", 1, "1"),
        }
    )
    given = environment(rendered.ray_pods()["head"])
    assert given["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert given["WANDB_API_KEY"] is None


def test_a_platforms_own_root_can_be_asked_for() -> None:
    root = {"podSecurityContext.runAsNonRoot": False, "podSecurityContext.runAsUser": 0}
    context = render(values=root).ray_pods()["head"]["spec"]["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"]) == (False, 0)
