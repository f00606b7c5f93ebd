"""What shows only in a cluster: who writes where, who reaches whom, what waits for what."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, get_args

import pytest
from prometheus_client import CollectorRegistry

from actors.fake_engine import FakeEngine
from actors.generator import GeneratorReplica
from actors.metrics import GeneratorMetrics
from mora_serve.config import PolicySettings
from mora_serve.types import Generation, GenerationRequest, Message, Sampling, ScoreStatus
from tests.chart.charts import (
    CHART,
    NAMESPACE,
    environment,
    everything,
    options,
    profile,
    render,
    run_helm,
)
from tests.chart.test_drift import expressions

WRITTEN = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "VLLM_CACHE_ROOT")
"""Variables that name directories which programs write to."""


def test_directories_that_variables_name_are_writable_on_a_read_only_root() -> None:
    for name, pod in render().ray_pods().items():
        given = environment(pod)
        (container,) = pod["spec"]["containers"]
        mounts = [PurePosixPath(item["mountPath"]) for item in container["volumeMounts"]]
        for variable in WRITTEN[:2] if name == "head" else WRITTEN:
            path = PurePosixPath(str(given[variable]))
            assert any(path.is_relative_to(mount) for mount in mounts), (name, variable)


def test_the_autoscaler_writes_where_it_may() -> None:
    cluster = render().cluster
    told = cluster["autoscalerOptions"]
    assert told["securityContext"]["readOnlyRootFilesystem"] is True
    (mount,) = told["volumeMounts"]
    (home,) = [item["value"] for item in told["env"] if item["name"] == "HOME"]
    assert PurePosixPath(home).is_relative_to(mount["mountPath"])
    volumes = cluster["headGroupSpec"]["template"]["spec"]["volumes"]
    assert mount["name"] in {item["name"] for item in volumes}


def test_requests_go_to_every_worker_and_never_to_the_head() -> None:
    rendered = render()
    assert rendered.ray_service["spec"]["excludeHeadPodFromServeSvc"] is True
    assert rendered.serve_config["proxy_location"] == "EveryNode"


@pytest.mark.parametrize("level", ["debug", "warning"])
def test_serve_logs_at_the_services_level_and_no_requests(level: str) -> None:
    config = render(values={"config.log_level": level}).serve_config
    (application,) = config["applications"]
    for part in (config, application):
        assert part["logging_config"] == {"log_level": level.upper(), "enable_access_log": False}


def test_workers_wait_for_load_balancers_before_they_stop() -> None:
    for name, pod in render("default", "preStopSleepSeconds=7").ray_pods().items():
        (container,) = pod["spec"]["containers"]
        stops = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
        assert stops == ({} if name == "head" else {"command": ["sleep", "7"]})


def test_without_the_autoscaler_groups_are_whole_and_no_pod_asks_the_api_server() -> None:
    rendered = render("default", "ray.autoscaling=false")
    assert "autoscalerOptions" not in rendered.cluster
    for group in rendered.groups.values():
        assert group["replicas"] == group["maxReplicas"]
        assert "idleTimeoutSeconds" not in group
    for pod in rendered.ray_pods().values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["restartPolicy"] == "Always"


def test_a_token_is_asked_for_where_the_values_say_so() -> None:
    assert everything().cluster["authOptions"] == {"mode": "token"}
    assert "authOptions" not in render().cluster


def test_what_has_one_pod_is_not_evicted_for_a_better_packing() -> None:
    rendered = render()
    stores = [item["spec"]["template"] for item in rendered.all("StatefulSet")]
    for pod in (rendered.ray_pods()["head"], *stores):
        assert pod["metadata"]["annotations"] == {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }


def test_the_stores_call_nobody_and_write_each_second() -> None:
    rendered = render()
    policy = rendered.one("NetworkPolicy", "-valkey")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    for store in rendered.all("StatefulSet"):
        (script,) = store["spec"]["template"]["spec"]["containers"][0]["args"]
        assert "'appendfsync everysec'" in script


def test_only_the_operator_of_the_named_namespace_reaches_the_head() -> None:
    where = {"matchLabels": {"kubernetes.io/metadata.name": "ray-system"}}
    rendered = render(values={"networkPolicy.operatorNamespaceSelector": where})
    (_, operator, *_) = rendered.one("NetworkPolicy", "-ray")["spec"]["ingress"]
    (peer,) = operator["from"]
    assert peer["namespaceSelector"] == where
    assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}


def test_streams_have_no_time_limit_on_their_way() -> None:
    route = {"enabled": True, "parentRefs": [{"name": "public", "sectionName": "https"}]}
    spec = render(values={"httpRoute": route}).one("HTTPRoute")["spec"]
    assert spec["parentRefs"] == route["parentRefs"]
    assert [rule["timeouts"] for rule in spec["rules"]] == [
        {"request": "0s", "backendRequest": "0s"}
    ]


def test_a_nodes_own_directory_is_made_where_it_is_missing() -> None:
    pods = render("default", "modelCache.type=hostPath").ray_pods()
    (models,) = [item for item in pods["generator"]["spec"]["volumes"] if item["name"] == "models"]
    assert models["hostPath"] == {"path": "/var/lib/mora-models", "type": "DirectoryOrCreate"}


def test_the_heads_metrics_carry_the_group_that_its_alert_asks_for() -> None:
    rendered = everything()
    (endpoint,) = rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    sources = {item["targetLabel"]: item["sourceLabels"] for item in endpoint["relabelings"]}
    labels = rendered.ray_pods()["head"]["metadata"]["labels"]
    found = {f"__meta_kubernetes_pod_label_{re.sub(r'[^a-z]', '_', n)}": n for n in labels}
    (source,) = sources["group"]
    (group,) = [rule for rule in expressions() if "group=" in rule]
    assert f'group="{labels[found[source]]}"' in group
    assert sources["ray_io_cluster"] == ["__meta_kubernetes_pod_label_ray_io_cluster"]


async def outcome_of_an_answer() -> str:
    """How a generator counts a prompt that it answers."""
    registry = CollectorRegistry()
    engine = FakeEngine(PolicySettings(backend="fake", model="policy"))
    replica = GeneratorReplica(engine, None, "policy", metrics=GeneratorMetrics(registry))
    await replica.start()
    (answer,) = await replica.generate(
        [GenerationRequest((Message("user", "Hi"),), Sampling(n=1, seed=1))]
    )
    assert isinstance(answer, Generation)
    samples = [sample for family in registry.collect() for sample in family.samples]
    (outcome,) = {s.labels["outcome"] for s in samples if s.name.endswith("_requests_total")}
    await replica.stop()
    return str(outcome)


async def test_alerts_on_failures_leave_out_what_the_code_calls_a_success() -> None:
    good = {pair for text in expressions() for pair in re.findall(r'(\w+)!="(\w+)"', text)}
    assert good == {("outcome", await outcome_of_an_answer()), ("status", "ok")}
    assert "ok" in get_args(ScoreStatus)
    statuses = {code for text in expressions() for code in re.findall(r'status=~"(.+?)"', text)}
    for pattern in statuses:
        assert all(re.fullmatch(pattern, code) for code in ("500", "503"))
        assert not any(re.fullmatch(pattern, code) for code in ("200", "400", "499"))


def test_alerts_fire_at_the_share_or_time_that_they_tell() -> None:
    (group,) = everything().one("PrometheusRule")["spec"]["groups"]
    told = 0
    for rule in group["rules"]:
        expression = rule["expr"].strip()
        beyond = re.search(r"[<>] ([\d.]+)$", expression)
        if " / " in expression or "deriv(" in expression:
            assert beyond is not None
            assert 0 < float(beyond[1]) < 1, rule["alert"]
        for number, unit in re.findall(r"(\d+) (%|s)(?!\w)", rule["annotations"]["summary"]):
            assert beyond is not None
            assert float(number) == float(beyond[1]) * {"%": 100, "s": 1}[unit], rule["alert"]
            told += 1
    assert told == 5


def test_probes_leave_time_to_start_and_notice_soon_what_does_not_answer(
    profile_name: str,
) -> None:
    rendered = profile(profile_name)
    stores = [item["spec"]["template"] for item in rendered.all("StatefulSet")]
    assert len(stores) == 2
    for pod in (*rendered.ray_pods().values(), *stores):
        (container,) = pod["spec"]["containers"]
        for kind, least_s, most_s in (
            ("startupProbe", 120, 3600),
            ("readinessProbe", 5, 30),
            ("livenessProbe", 30, 300),
        ):
            probe = container[kind]
            assert least_s <= probe["periodSeconds"] * probe.get("failureThreshold", 3) <= most_s
            assert probe.get("timeoutSeconds", 1) <= probe["periodSeconds"]
    assert rendered.one("Pod")["spec"]["activeDeadlineSeconds"] >= 120


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({}, {"rewards are raw", "every caller is accepted", "a pod of any namespace",
              "mora-mora-serve-gcs-valkey takes no password"}),
        ({"calibrator.existingConfigMap": "c", "secrets.apiKeys.existingSecret": "k",
          "gcsFaultTolerance.external.existingSecret": "s",
          "networkPolicy.operatorNamespaceSelector": {"matchLabels": {"name": "ray"}}}, set()),
        ({"gcsFaultTolerance.enabled": False, "config.method.calibrator": None,
          "networkPolicy.enabled": False},
         {"every caller is accepted", "the loss of the head replaces every pod",
          "every pod reaches Ray's ports"}),
    ],
    ids=["default", "all is given", "nothing is on"],
)  # fmt: skip
def test_what_is_printed_after_an_install_warns_of_what_is_missing(
    values: dict[str, Any], warned: set[str]
) -> None:
    arguments = ("--namespace", NAMESPACE, "--dry-run=client", *options("default", (), values))
    text = run_helm("install", "mora", str(CHART), *arguments)
    said = {line for line in text.splitlines() if line.startswith("WARNING: ")}
    assert len(said) == len(warned)
    assert all(any(part in line for line in said) for part in warned)
