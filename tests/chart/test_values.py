"""Values that are wrong are refused, in words that name them; random valid ones render."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chart.charts import CHART, RefusedError, Rendered, environment, render, run_helm
from tests.chart.operator_rules import violations
from tests.chart.test_drift import node_types, settings_of
from tests.chart.test_templates import as_pods, builtin

BAD: list[tuple[dict[str, Any], str]] = [
    ({"polcy": {}}, "polcy"),
    ({"config.polcy": {}}, "polcy"),
    ({"config.policy.replica.min_replica": 1}, "min_replica"),
    ({"config.sampling": {"n": 0}}, "n"),
    ({"config.sampling.temperature": 3}, "temperature"),
    ({"config.redis.url": "redis://x"}, "url"),
    ({"config.server.api_keys": ["plain"]}, "api_keys"),
    ({"config.server.port": 80}, "port"),
    ({"config.data_dir": "/x"}, "data_dir"),
    ({"config.scorers": [{"name": "one"}]}, "dimensions"),
    ({"config.scorers": []}, "config.scorers must list the scorers"),
    ({"profile": "cuda"}, "profile"),
    ({"nameOverride": "n" * 64}, "nameOverride"),
    ({"image.digest": "sha256:abc"}, "digest"),
    ({"image.repository": "registry.example.org/mora-serve:0.1.0"}, "repository"),
    ({"image.tag": 1.1}, "tag"),
    ({"image.tag": "0.1.0@sha256"}, "tag"),
    ({"image.pullSecrets": ["one", "one"]}, "pullSecrets"),
    ({"image.pullPolicy": "Sometimes"}, "pullPolicy"),
    ({"ray.upgradeStrategy": "Rolling"}, "upgradeStrategy"),
    ({"ray.upgradeStrategy": "NewClusterWithIncrementalUpgrade"}, "upgradeStrategy"),
    ({"ray.version": "latest"}, "version"),
    ({"workerGroups.gpu": {}}, "gpu"),
    ({"workerGroups.generator.gpus": -1}, "gpus"),
    ({"workerGroups.generator.maxReplicas": 0}, "maxReplicas"),
    ({"workerGroups.generator.maxReplicas": 2**31}, "maxReplicas"),
    ({"workerGroups.generator.minReplicas": 9}, "generator.minReplicas must be at most"),
    ({"workerGroups.gateway.enabled": False}, "workerGroups.gateway.enabled must be true"),
    ({"workerGroups.gateway.pdbMinAvailable": 2}, "must be less than minReplicas (2)"),
    ({"workerGroups.gateway.minReplicas": 1}, "gateway.pdbMinAvailable must be less"),
    ({"workerGroups.scorers.resources.limits.memory": "much"}, "memory"),
    ({"workerGroups.scorers.resources.limits.memory": -1}, "memory"),
    ({"workerGroups.scorers.resources.limits.mem": "24Gi"}, "mem"),
    ({"workerGroups.scorers.resources.limits.cpu": 3.5}, "cpu"),
    ({f"workerGroups.scorers.resources.{kind}.cpu": None for kind in ("limits", "requests")},
     "workerGroups.scorers.resources must give cpu"),
    ({"workerGroups.scorers.resources.limits.memory": "24000M"},
     "workerGroups.scorers.resources.requests.memory must be at most limits.memory (24000M)"),
    ({"head.resources.limits.cpu": "1500m"},
     "head.resources.requests.cpu must be at most limits.cpu (1500m), got 2"),
    ({"valkey.resources.requests.memory": "5Gi"}, "valkey.resources.requests.memory must be at"),
    ({"gcsFaultTolerance.resources.limits.cpu": "50m"},
     "gcsFaultTolerance.resources.requests.cpu must be at most limits.cpu (50m), got 100m"),
    ({"ray.autoscaler.resources.requests.cpu": "2"}, "ray.autoscaler.resources.requests.cpu must"),
    ({"workerGroups.scorers.shmSize": "24Gi"},
     "workerGroups.scorers.shmSize must be less than resources.limits.memory (24Gi)"),
    ({"head.shmSize": 8589934592}, "head.shmSize must be less than resources.limits.memory (8Gi)"),
    ({"gpuResource": "gpu"}, "gpuResource"),
    ({"head.tolerations": [{"key": "gpu", "operater": "Exists"}]}, "operater"),
    ({"head.affinity": {"nodeAfinity": {}}}, "nodeAfinity"),
    ({"workerGroups.trainer.topologySpreadConstraints": [{"topologyKey": "zone"}]}, "maxSkew"),
    ({"head.nodeSelector": {"pool": "a b"}}, "pool"),
    ({"head.podLabels": {"team": "t" * 64}}, "team"),
    ({"kueue.queueName": "q" * 64}, "queueName"),
    ({"podSecurityContext.fsgroup": 1}, "fsgroup"),
    ({"podSecurityContext.runAsUser": "mora"}, "runAsUser"),
    ({"preStopSleepSeconds": 90}, "preStopSleepSeconds must be less than termination"),
    ({"workerGroups.scorers.env": [{"name": "MORA_X", "value": "1"}]},
     "workerGroups.scorers.env must not hold settings, got MORA_X"),
    ({"extraEnv": [{"name": "MORA_REDIS__URL", "value": "x"}]},
     "extraEnv must not hold settings, got MORA_REDIS__URL"),
    ({"extraEnv": [{"name": "A", "value": "x", "valueFrom": {"fieldRef": {"fieldPath": "y"}}}]},
     "extraEnv must give either value or valueFrom, got both for A"),
    ({"data.accessModes": ["ReadOnlyMany"]}, "accessModes"),
    ({"data.accessModes": ["ReadWriteOncePod"]}, "accessModes"),
    ({"blobs.s3.url": "https://bucket"}, "url"),
    ({"modelCache.type": "nfs"}, "type"),
    ({"modelCache.hostPath": "relative"}, "hostPath"),
    ({"valkey.auth.existingSecret": ""}, "valkey.auth.existingSecret must name a Secret"),
    ({"valkey.enabled": False}, "externalRedis.existingSecret must name a Secret"),
    ({"externalRedis.existingSecret": "mine"}, "externalRedis.existingSecret must be empty with"),
    ({"gcsFaultTolerance.external.usernameKey": "user"}, "external.usernameKey must be empty"),
    ({"valkey.auth.password": "plain"}, "password"),
    ({"gcsFaultTolerance.external.address": "host:6379"}, "address"),
    ({"service.port": 80}, "port"),
    ({"service.type": "ExternalName"}, "type"),
    ({"ingress.enabled": True}, "ingress.hosts must name at least one host"),
    ({"ingress.tls": [{"secretname": "tls"}]}, "secretname"),
    ({"networkPolicy.clients": [{"podSelecter": {}}]}, "podSelecter"),
    ({"httpRoute.parentRefs": [{"sectionName": "https"}]}, "name"),
    ({"httpRoute.enabled": True}, "httpRoute.parentRefs must name a Gateway"),
    ({"fullnameOverride": "1mora"}, "fullnameOverride must give a name"),
    ({"monitoring.serviceMonitor.interval": "15"}, "interval"),
    ({"test.prompt": ""}, "prompt"),
    ({"workerGroups.trainer.pdbMinAvailable": 1}, "pdbMinAvailable"),
    *(({name: None}, name.rsplit(".", 1)[-1]) for name in (
        "ray", "ray.autoscaler", "head", "workerGroups", "workerGroups.trainer", "valkey.auth",
        "workerGroups.gateway.resources", "monitoring.podMonitor", "blobs.s3", "kueue", "test",
        "secrets.apiKeys", "gcsFaultTolerance.external", "image", "probes.startup", "service")),
    ({"workerGroups.trainer.enabled": False}, "num_cpus_per_worker must be at most the 3 CPUs"),
    ({"config.trainer.num_cpus_per_worker": 9}, "at most the 8 CPUs of a pod of workerGroups.tr"),
    ({"workerGroups.trainer.resources.limits.cpu": "3500m", "config.trainer.num_cpus_per_worker":
      4.5}, "at most the 4 CPUs"),
    ({"config.policy.replica.num_gpus": 2},
     "config.policy.replica.num_gpus must be at most the 1 GPUs of a pod of workerGroups.gen"),
    ({"config.policy.replica.num_cpus": 9}, "replica.num_cpus must be at most the 8 CPUs of a pod"),
    ({"config.policy.replica.bundles": [{"GPU": 1}, {"GPU": 1, "CPU": 9}]},
     "config.policy.replica.bundles[].CPU must be at most the 8 CPUs"),
    ({"workerGroups.scorers.gpus": 0}, "config.scorers.helpful.replica.num_gpus must be at most"),
    ({"config.server.num_cpus": 4}, "config.server.num_cpus must be at most the 3 CPUs of a pod"),
    ({"config.runner.replica.num_cpus": 3.5}, "config.runner.replica.num_cpus must be at most"),
    ({"config.trainer.launcher.num_cpus": 4}, "config.trainer.launcher.num_cpus must be at most"),
    ({"config.policy.replica.min_replicas": 9}, "config.policy.replica.min_replicas must be at "
     "most 4, or some wait for ever: for more, the 4 pods (maxReplicas) of workerGroups.generator"),
    ({"config.policy.replica": {"num_cpus": 5, "num_gpus": 0, "min_replicas": 5}},
     "min_replicas must be at most 4"),
    ({"config.policy.replica": {"bundles": [{"GPU": 1}, {"GPU": 1}], "min_replicas": 3}},
     "config.policy.replica.min_replicas must be at most 2"),
    ({"workerGroups.scorers": {"minReplicas": 0, "maxReplicas": 2}},
     "config.scorers.truthful.replica.min_replicas must be at most 0"),
    ({"config.server.replicas": 10}, "config.server.replicas must be at most 9"),
    ({"config.runner.replica.min_replicas": 8}, "config.runner.replica.min_replicas must be at m"),
    ({"config.trainer.num_workers": 2}, "config.trainer.num_workers must be at most 1"),
    ({"config.blobs.options": {"key": "AKIA"}}, "config.blobs.options.key must not be"),
    ({"config.blobs.options": {"client_kwargs": {"aws_secret_access_key": "x"}}},
     "config.blobs.options.client_kwargs.aws_secret_access_key must not be"),
    ({"config.blobs.options": {"sessionToken": "x"}}, "options.sessionToken must not be"),
    ({"config.blobs.options": {"proxy": "http://me:pass@proxy"}}, "options.proxy must not hold"),
    ({"config.policy.engine": {"hf_token": "hf_x"}}, "config.policy.engine.hf_token must not be"),
    ({"config.policy.engine_env": {"HF_TOKEN": "x"}}, "engine_env.HF_TOKEN must not be"),
    ({"config.policy.engine_env": {"VLLM_API_KEY": "x"}}, "engine_env.VLLM_API_KEY must not be"),
    ({"config.scorers": [{"name": "one", "preset": "mahalo-truth", "dimensions": ["truthful"],
                          "engine_env": {"HF_TOKEN": "x"}}]}, "scorers.one.engine_env.HF_TOKEN"),
    ({"ray.authMode": "token", "ray.version": "2.51.0"}, "ray.version must be at least 2.52.0"),
    *(({"extraEnv": [{"name": name, "value": "x"}]},
       f"extraEnv must not hold what KubeRay sets, got {name}")
      for name in ("REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS",
                   "RAY_enable_autoscaler_v2")),
    *(({"service.port": port}, "service.port must not be a port of Ray's")
      for port in (6379, 8080, 8265, 8404, 8500, 9101, 9500, 10001, 10002, 19999, 52365)),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), BAD, ids=[next(iter(values)) for values, _ in BAD])
def test_a_bad_value_is_refused_by_name(
    values: dict[str, Any], said: str, helm_version: str
) -> None:
    with pytest.raises(RefusedError) as refusal:
        render(values=values, version=helm_version)
    message = str(refusal.value)
    assert said in message
    assert "nil pointer" not in message
    assert "goroutine" not in message


def test_names_that_only_sound_like_secrets_are_taken() -> None:
    engine = {"max_num_batched_tokens": 4096, "tokenizer": "x/y", "long_prefill_token_threshold": 9,
              "tokenizer_mode": "auto", "hf_token": True}  # fmt: skip
    variables = {"TOKENIZERS_PARALLELISM": "false", "VLLM_KEYS_PER_TOKENS": "1"}
    options = {"anon": True, "client_kwargs": {"endpoint_url": "http://minio:9000"}, "key": ""}
    rendered = render(
        values={
            "config.policy.engine": engine,
            "config.policy.engine_env": variables,
            "config.blobs.options": options,
        }
    )
    assert engine.items() <= settings_of(rendered).policy.engine.items()
    assert settings_of(rendered).blobs.options == options


def test_a_bucket_keeps_the_options_of_its_filesystem() -> None:
    values = {"config.blobs.options": {"anon": True}, "blobs.s3.url": "s3://mora/blobs"}
    blobs = settings_of(render(values=values)).blobs
    assert blobs.url == "s3://mora/blobs"
    assert blobs.options == {"anon": True}


def test_a_region_is_told_to_every_reader_of_it() -> None:
    given = environment(render(values={"blobs.s3.region": "eu"}).ray_pods()["generator"])
    assert given["AWS_REGION"] == given["AWS_DEFAULT_REGION"] == "eu"


def test_a_variable_given_again_replaces_the_earlier_one() -> None:
    given = {
        "extraEnv": [
            {"name": "HF_HOME", "value": "/data"},
            {"name": "NCCL_DEBUG", "value": "INFO"},
        ],
        "workerGroups.generator.env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    }
    pods = render(values=given).ray_pods()
    for group, expected in (("generator", "WARN"), ("scorers", "INFO")):
        listed = pods[group]["spec"]["containers"][0]["env"]
        names = [item["name"] for item in listed]
        assert len(names) == len(set(names))
        assert environment(pods[group])["HF_HOME"] == "/data"
        assert environment(pods[group])["NCCL_DEBUG"] == expected
        # Kubernetes expands $(NAME) of earlier variables only.
        assert names.index("VALKEY_PASSWORD") < names.index("MORA_REDIS__URL")


def test_names_and_sizes_that_yaml_would_read_as_numbers_stay_what_they_are() -> None:
    """Whole numbers of bytes reach a template as floats; a name of digits is a name."""
    size, names = 34359738368, ("1", "1e3", "0.5", "true")
    values = {
        "fullnameOverride": "mora",
        "nameOverride": names[1],
        "tmpSizeLimit": size,
        "head.shmSize": 1073741824,
        "data": {"size": size, "storageClass": names[2]},
        "valkey.persistence": {"size": size, "storageClass": names[3]},
        "modelCache": {"type": "ephemeral", "size": size},
        "workerGroups.gateway.priorityClassName": names[0],
        "secrets.huggingFace": {"existingSecret": names[2], "key": names[3]},
        "valkey.auth": {"existingSecret": names[0], "key": names[1]},
        "image": {"pullSecrets": [names[0]], "tag": names[1]},
    }
    rendered = render(values=values, release="12345")
    for document in (*builtin(rendered), *as_pods(rendered)):
        kubernetes_validate.validate(document, "1.35", strict=True)
    for pod in rendered.ray_pods().values():
        volumes = {item["name"]: item for item in pod["spec"]["volumes"]}
        limit = volumes["tmp"]["emptyDir"]["sizeLimit"]
        assert (limit, type(limit)) == (size, int)
    claims = [rendered.one("PersistentVolumeClaim")]
    claims += rendered.one("StatefulSet", "mora-valkey")["spec"]["volumeClaimTemplates"]
    for claim in claims:
        storage = claim["spec"]["resources"]["requests"]["storage"]
        assert (storage, type(storage)) == (size, int)
    assert rendered.ray_service["metadata"]["labels"]["app.kubernetes.io/instance"] == "12345"


def test_an_external_store_with_users_is_told_both_from_its_secret() -> None:
    external = {
        "address": "rediss://redis:6380", "existingSecret": "ray", "usernameKey": "user"
    }  # fmt: skip
    rendered = render(values={"gcsFaultTolerance.external": external})
    told = rendered.cluster["gcsFaultToleranceOptions"]
    assert told["redisAddress"] == "rediss://redis:6380"
    keys = {
        name: told[name]["valueFrom"]["secretKeyRef"] for name in told if name != "redisAddress"
    }
    assert keys == {
        "redisPassword": {"name": "ray", "key": "password"},
        "redisUsername": {"name": "ray", "key": "user"},
    }
    assert len(rendered.all("StatefulSet")) == 1


def test_groups_may_all_rest_at_none() -> None:
    groups = ("gateway", "generator", "scorers", "trainer")
    rendered = render(
        values={f"workerGroups.{name}.minReplicas": 0 for name in groups}
        | {"workerGroups.gateway.pdbMinAvailable": 0}
    )
    assert {group["minReplicas"] for group in rendered.groups.values()} == {0}
    assert violations(rendered.ray_service) == []


def test_kueue_is_told_that_the_cluster_scales_only_where_it_does() -> None:
    elastic = "kueue.x-k8s.io/elastic-job"
    scaling = render("default", "kueue.queueName=gpus").ray_service["metadata"]
    assert scaling["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert scaling["annotations"] == {elastic: "true"}
    fixed = render("default", "kueue.queueName=gpus", "ray.autoscaling=false").ray_service
    assert "annotations" not in fixed["metadata"]
    assert "annotations" not in render().ray_service["metadata"]


def test_a_bare_n_is_read_as_false_and_refused() -> None:
    with pytest.raises(RefusedError, match="sampling"):
        run_helm(
            "template",
            "x",
            str(CHART),
            "--values",
            "/dev/stdin",
            stdin="config: {sampling: {n: 8}}",
        )


counts = st.integers(0, 40)
quantities = st.sampled_from(["500m", "2", "1.5", "96"])
memory = st.sampled_from(["16Gi", "64Gi", "1Ti"])
labels = st.dictionaries(
    st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,5}/[a-z]{1,8})?", fullmatch=True),
    st.from_regex(r"[a-z0-9]{0,8}", fullmatch=True),
    max_size=3,
)


def groups() -> st.SearchStrategy[dict[str, Any]]:
    resources = st.builds(
        lambda cpu, size: {key: {"cpu": cpu, "memory": size} for key in ("requests", "limits")},
        quantities,
        memory,
    )
    keys = {
        "gpus": st.integers(0, 8),
        "resources": resources,
        "shmSize": st.sampled_from(["1Gi", "4Gi"]),
        "nodeSelector": labels,
        "podLabels": labels,
        "podAnnotations": labels,
        "tolerations": st.just([{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]),
        "priorityClassName": st.sampled_from(["", "high"]),
        "runtimeClassName": st.sampled_from(["", "nvidia"]),
    }
    scale = st.tuples(counts, counts).map(
        lambda two: {"minReplicas": min(two), "maxReplicas": max(*two, 1), "pdbMinAvailable": 0}
    )
    return st.builds(
        lambda some, size: {**some, **size}, st.fixed_dictionaries({}, optional=keys), scale
    )


def without_budget(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "pdbMinAvailable"}


def valid_values() -> st.SearchStrategy[dict[str, Any]]:
    flags = st.booleans()
    optional: dict[str, st.SearchStrategy[Any]] = {
        "workerGroups.generator": groups(),
        "workerGroups.scorers": st.one_of(groups(), st.just({"enabled": False})),
        "workerGroups.trainer": st.one_of(
            groups().map(without_budget), st.just({"enabled": False})
        ),
        "ray.autoscaling": flags,
        "ray.authMode": st.sampled_from(["disabled", "token"]),
        "ray.haproxy": flags,
        "service.port": st.one_of(st.integers(1024, 6000), st.integers(20000, 52000)),
        "gcsFaultTolerance.enabled": flags,
        "networkPolicy.enabled": flags,
        "serviceAccount.create": flags,
        "valkey.auth": st.sampled_from([{"enabled": False}, {"existingSecret": "s"}]),
        "modelCache.type": st.sampled_from(["pvc", "hostPath", "ephemeral"]),
        "data.existingClaim": st.sampled_from(["", "shared"]),
        "blobs.s3.url": st.sampled_from(["", "s3://bucket/prefix"]),
        "kueue.queueName": st.sampled_from(["", "gpus"]),
        "config.runner.max_backlog_rows": st.integers(1, 10**12),
        "config.server.max_upload_bytes": st.integers(1024, 2**40),
        "config.sampling": st.just({"n": 4, "n_max": 12, "stop": ["\n", "it's: {x}"]}),
        "config.policy.system_prompt": st.text(
            st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=40
        ),
        "terminationGracePeriodSeconds": st.integers(16, 3600),
    }
    # Half a CPU fits the smallest pod of `quantities`.
    small = {"num_gpus": 0, "num_cpus": 0.5}
    dimensions = ["helpful", "harmless", "truthful"]
    scorer = {"name": "all", "backend": "fake", "dimensions": dimensions}
    always = {
        "config.trainer.num_cpus_per_worker": st.just(0.5),
        "config.policy.replica": st.just(small),
        "config.scorers": st.just([{**scorer, "replica": small}]),
    }
    return st.fixed_dictionaries(always, optional=optional)


def check(rendered: Rendered, values: dict[str, Any]) -> None:
    assert violations(rendered.ray_service) == [] or values.get("ray.autoscaling") is False
    settings_ = settings_of(rendered)
    assert settings_.runner.max_backlog_rows == values.get(
        "config.runner.max_backlog_rows", 10_000_000
    )
    assert settings_.policy.system_prompt == values.get("config.policy.system_prompt")
    assert settings_.server.port == values.get("service.port", 8000)
    node_types(rendered)
    for document in (*builtin(rendered), *as_pods(rendered)):
        kubernetes_validate.validate(document, "1.35", strict=True)


def test_random_valid_values_render_valid_objects(request: pytest.FixtureRequest) -> None:
    num_examples = 100 if request.config.getoption("chart_full", default=False) else 6

    @settings(
        max_examples=num_examples,
        derandomize=num_examples < 100,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(valid_values())
    def run(values: dict[str, Any]) -> None:
        check(render(values=values), values)

    run()
