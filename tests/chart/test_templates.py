"""What the chart renders is valid: for Kubernetes, for KubeRay's CRDs, for its operator, for us."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import redis
import yaml
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from yamllint import linter
from yamllint.config import YamlLintConfig

from mora_serve.free_ports import free_ports
from mora_serve.redis_server import find_redis_binary
from tests.chart import crds
from tests.chart.charts import (
    CHART,
    EVERYTHING,
    HELM_VERSIONS,
    RELEASE,
    TALLY,
    Rendered,
    everything,
    options,
    profile,
    render,
    run_helm,
)
from tests.chart.operator_rules import violations

FOREIGN = ("ray.io/", "monitoring.coreos.com/", "gateway.networking.k8s.io/")
"""API groups that Kubernetes itself does not have."""
needs_crds = pytest.mark.skipif(
    crds.folder() is None, reason="no KubeRay CRDs: name their folder in KUBERAY_CRDS"
)
LINT = YamlLintConfig(
    "{extends: default, rules: {line-length: {max: 130}, braces: {max-spaces-inside: 0}, "
    "document-start: disable, comments: {min-spaces-from-content: 2}}}"
)


def builtin(rendered: Rendered) -> list[dict[str, Any]]:
    return [item for item in rendered.documents if not item["apiVersion"].startswith(FOREIGN)]


def as_pods(rendered: Rendered) -> list[dict[str, Any]]:
    """The Ray pods as plain ones: their templates are Kubernetes' own."""
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray", **pod["metadata"]},
         "spec": pod["spec"]}
        for pod in rendered.ray_pods().values()
    ]  # fmt: skip


def test_lint_is_strict_and_clean(helm_version: str, profile_name: str) -> None:
    run_helm("lint", "--strict", str(CHART), *options(profile_name), version=helm_version)


def test_both_helms_render_the_same(profile_name: str) -> None:
    older, newer = (render(profile_name, version=version) for version in HELM_VERSIONS)
    assert older == newer


def test_a_template_holds_one_object() -> None:
    """Each has something to say in one of two renderings: a route excludes an Ingress."""
    more = {
        "workerGroups.generator": {"minReplicas": 2, "pdbMinAvailable": 1},
        "workerGroups.scorers.pdbMinAvailable": 1,
        "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}}],
    }
    route = {"enabled": True, "parentRefs": [{"name": "public"}]}
    folder, seen = CHART / "templates", set[str]()
    everything = {**EVERYTHING, **more}
    for values in (everything, {**everything, "ingress": {}, "httpRoute": route}):
        text = run_helm("template", RELEASE, str(CHART), *options("default", (), values))
        sources = re.findall(r"^# Source: mora-serve/templates/(\S+)$", text, re.MULTILINE)
        assert len(sources) == len(set(sources)) == len(list(yaml.safe_load_all(text)))
        seen |= set(sources)
    assert seen == {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}


def test_rendering_is_repeatable(profile_name: str) -> None:
    assert render(profile_name) == profile(profile_name)


def test_builtin_objects_are_valid(profile_name: str, kubernetes: str) -> None:
    rendered = render(profile_name, kubernetes=kubernetes)
    for document in (*builtin(rendered), *as_pods(rendered)):
        kubernetes_validate.validate(document, kubernetes, strict=True)
    TALLY.kubernetes.add(kubernetes)


def test_optional_objects_are_valid(kubernetes: str) -> None:
    rendered = render(values=EVERYTHING, kubernetes=kubernetes)
    for document in (*builtin(rendered), *as_pods(rendered)):
        kubernetes_validate.validate(document, kubernetes, strict=True)


@needs_crds
def test_ray_objects_are_valid(profile_name: str) -> None:
    assert crds.problems(profile(profile_name).ray_service) == []


@needs_crds
def test_ray_objects_with_every_option_are_valid() -> None:
    assert crds.problems(everything().ray_service) == []


@needs_crds
@pytest.mark.parametrize(
    "break_it",
    [
        lambda spec: spec.update(serveConfig=""),
        lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplicas="1"),
        lambda spec: spec["rayClusterConfig"]["autoscalerOptions"].update(version="v3"),
        lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"].update(x=1),
        lambda spec: _head_env({"spec": spec}).append({"name": "HF_HOME", "value": "/again"}),
    ],
)
def test_the_crds_would_find_a_mistake(break_it: Any) -> None:
    service = render().ray_service
    break_it(service["spec"])
    assert crds.problems(service) != []


def test_the_operator_takes_it(profile_name: str) -> None:
    assert violations(profile(profile_name).ray_service) == []


def test_the_operator_takes_every_option() -> None:
    assert violations(everything().ray_service) == []
    assert violations(render("cpu", "ray.autoscaling=false").ray_service) == []


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda s: s["metadata"].update(name="m" * 48), "47 characters"),
        (lambda s: s["metadata"].update(name="1mora"), "DNS label"),
        (lambda s: s["spec"]["upgradeStrategy"].update(type="Rolling"), "got Rolling"),
        (lambda s: _cluster(s).update(upgradeStrategy={}), "rayClusterConfig.upgradeStrategy"),
        (lambda s: _cluster(s)["headGroupSpec"].update(resources={"CPU": "1"}), "one place"),
        (lambda s: _head_env(s).append({"name": "REDIS_PASSWORD"}), "REDIS_PASSWORD"),
        (lambda s: _pod(s).update(restartPolicy="Always"), "restartPolicy Never"),
        (lambda s: _cluster(s)["workerGroupSpecs"][0].update(replicas=1), "replicas"),
        (lambda s: _cluster(s).update(authOptions={"mode": "token"}, rayVersion="2.51.0"), "2.52"),
        (lambda s: _cluster(s)["headGroupSpec"]["rayStartParams"].update(labels="a=b"), "labels"),
        (lambda s: _cluster(s)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "text"),
    ],
)  # fmt: skip
def test_the_operators_rules_would_find_a_mistake(break_it: Any, said: str) -> None:
    service = render().ray_service
    break_it(service)
    assert said in "; ".join(violations(service))


def _cluster(service: dict[str, Any]) -> Any:
    return service["spec"]["rayClusterConfig"]


def _pod(service: dict[str, Any]) -> Any:
    return _cluster(service)["headGroupSpec"]["template"]["spec"]


def _head_env(service: dict[str, Any]) -> Any:
    return _pod(service)["containers"][0]["env"]


def test_sources_and_renderings_are_tidy_yaml(profile_name: str) -> None:
    path = CHART / ("values.yaml" if profile_name == "default" else f"profiles/{profile_name}.yaml")
    assert [str(item) for item in linter.run(path.read_text("utf-8"), LINT)] == []


def test_every_pod_is_restricted(profile_name: str) -> None:
    for pod in profile(profile_name).pods():
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        spec = pod["spec"]
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("at", ["podSecurityContext", "valkey.podSecurityContext"])
def test_a_platform_that_chooses_users_itself_can_be_left_to_do_so(at: str) -> None:
    users = {"runAsUser", "runAsGroup", "fsGroup"}
    rendered = render("cpu", *(f"{at}.{name}=null" for name in sorted(users)))
    stores = [item["spec"]["template"] for item in rendered.all("StatefulSet")]
    others = [pod for pod in rendered.pods() if pod not in stores]
    left, kept = (stores, others) if at.startswith("valkey") else (others, stores)
    assert len(stores) == 2
    for pod in left:
        assert not users & set(pod["spec"]["securityContext"])
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    for pod in kept:
        assert users < set(pod["spec"]["securityContext"])


def test_pods_that_need_no_api_get_no_token() -> None:
    rendered = everything()
    for name, pod in rendered.ray_pods().items():
        # The autoscaler runs in the head's pod, with the account that KubeRay makes for it.
        expected = None if name == "head" else False
        assert pod["spec"].get("automountServiceAccountToken") is expected
    for item in (*rendered.all("StatefulSet"), rendered.one("Pod")):
        spec = item["spec"].get("template", item)["spec"]
        assert spec["automountServiceAccountToken"] is False


def test_shared_memory_is_a_part_of_the_memory_limit(profile_name: str) -> None:
    for pod in profile(profile_name).ray_pods().values():
        (shm,) = [item for item in pod["spec"]["volumes"] if item["name"] == "shm"]
        limit = pod["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert shm["emptyDir"]["medium"] == "Memory"
        assert _bytes(shm["emptyDir"]["sizeLimit"]) < _bytes(limit)
        mounts = pod["spec"]["containers"][0]["volumeMounts"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in mounts


def test_disruption_budgets_are_valid_for_ray_pods(profile_name: str) -> None:
    rendered = profile(profile_name)
    for budget in rendered.all("PodDisruptionBudget"):
        assert "maxUnavailable" not in budget["spec"]
        assert isinstance(budget["spec"]["minAvailable"], int)
        group = budget["spec"]["selector"]["matchLabels"]["mora-serve/group"]
        assert budget["spec"]["minAvailable"] < rendered.groups[group]["minReplicas"]


def test_selectors_find_the_pods_they_are_meant_for() -> None:
    rendered = everything()
    pods = {name: pod["metadata"]["labels"] for name, pod in rendered.ray_pods().items()}
    for budget in rendered.all("PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"]
        matching = [name for name, labels in pods.items() if wanted.items() <= labels.items()]
        assert matching == [wanted["mora-serve/group"]]
    ray = rendered.one("NetworkPolicy", "-ray")["spec"]["podSelector"]["matchLabels"]
    assert all(ray.items() <= labels.items() for labels in pods.values())
    monitor = rendered.one("PodMonitor")["spec"]["selector"]["matchLabels"]
    assert monitor == ray
    stores = {item["metadata"]["name"]: item for item in rendered.all("StatefulSet")}
    assert set(stores) == {"mora-mora-serve-valkey", "mora-mora-serve-gcs-valkey"}
    for service in rendered.all("Service"):
        labels = stores[service["metadata"]["name"]]["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert not service["spec"]["selector"].items() <= pods["head"].items()


def test_the_gateways_monitor_selects_the_service_that_kuberay_makes() -> None:
    rendered = everything()
    service = rendered.ray_service["spec"]["serveService"]
    monitor = rendered.one("ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    for other in rendered.all("Service"):
        labels = other["metadata"]["labels"]
        assert not monitor["selector"]["matchLabels"].items() <= labels.items()


def test_only_operator_and_own_pods_reach_rays_ports() -> None:
    (own, operator, *public) = render().one("NetworkPolicy", "-ray")["spec"]["ingress"]
    assert "ports" not in own
    assert "app.kubernetes.io/instance" in own["from"][0]["podSelector"]["matchLabels"]
    assert operator["from"][0]["podSelector"]["matchLabels"]
    assert {port["port"] for port in operator["ports"]} == {"dashboard", "serve"}
    assert {port["port"] for rule in public for port in rule["ports"]} == {"serve", "metrics"}


def test_named_clients_are_the_only_ones_at_the_gateway() -> None:
    clients = {"podSelector": {"matchLabels": {"app": "web"}}}
    policy = render(values={"networkPolicy.clients": [clients]}).one("NetworkPolicy", "-ray")
    for rule in policy["spec"]["ingress"]:
        open_to_all = "from" not in rule
        assert not (open_to_all and any(port["port"] == "serve" for port in rule["ports"]))
    gateway = [rule for rule in policy["spec"]["ingress"] if clients in rule.get("from", ())]
    assert [port["port"] for port in gateway[0]["ports"]] == ["serve"]


def test_settings_change_in_place_and_bounds_wait_for_a_new_cluster() -> None:
    before = render().ray_service["spec"]
    settings = render(values={"config.method.p_class": 0.9}).ray_service["spec"]
    assert settings["rayClusterConfig"] == before["rayClusterConfig"]
    assert settings["serveConfigV2"] != before["serveConfigV2"]
    scale = render("default", "workerGroups.generator.maxReplicas=9").ray_service["spec"]
    assert scale["serveConfigV2"] == before["serveConfigV2"]
    assert _hashed(scale) == _hashed(before)
    image = render("default", "image.tag=other").ray_service["spec"]
    assert _hashed(image) != _hashed(before)


@pytest.mark.parametrize(
    "values",
    [
        {"workerGroups.gateway.idleTimeoutSeconds": 7},
        {"service.port": 9009},
        {"calibrator.existingConfigMap": "fitted"},
        {"valkey.auth.existingSecret": "another"},
        {"gcsFaultTolerance.enabled": False},
        {"gcsFaultTolerance.external": {"existingSecret": "another"}},
        {"head.podAnnotations": {"turn": "2"}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_changes_that_replace_the_cluster_are_told(values: dict[str, Any]) -> None:
    assert _hashed(render(values=values).ray_service["spec"]) != _hashed(
        render().ray_service["spec"]
    )
    readme = (CHART / "README.md").read_text("utf-8")
    (told,) = [line for line in readme.splitlines() if "a new Ray cluster beside" in line]
    name = next(iter(values)).rsplit(".", 1)
    assert any(f"`{word}`" in told for word in (*name, ".".join(name))) or "head" in name


def test_a_services_type_is_no_part_of_what_replaces_the_cluster() -> None:
    changed = render("default", "service.type=NodePort").ray_service["spec"]
    assert _hashed(changed) == _hashed(render().ray_service["spec"])


@pytest.mark.parametrize(
    ("value", "restarted"),
    [
        ("valkey.image.tag=8.2", {"valkey", "gcs-valkey"}),
        ("valkey.podSecurityContext.fsGroup=1", {"valkey", "gcs-valkey"}),
        ("valkey.resources.limits.cpu=3", {"valkey"}),
        ("gcsFaultTolerance.resources.limits.cpu=3", {"gcs-valkey"}),
        ("gcsFaultTolerance.external.address=redis://other:6379", {"gcs-valkey"}),
    ],
)
def test_changes_reach_the_stores_that_the_guide_says(value: str, restarted: set[str]) -> None:
    stores = (
        {item["metadata"]["name"]: item["spec"] for item in rendered.all("StatefulSet")}
        for rendered in (render(), render("default", value))
    )
    before, after = stores
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == {f"mora-mora-serve-{name}" for name in restarted}


def _hashed(spec: dict[str, Any]) -> Any:
    """What the operator compares to decide on a new cluster: all but the numbers of pods."""
    cluster = spec["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        for number in ("minReplicas", "maxReplicas"):
            group.pop(number, None)
    return cluster


def test_a_new_chart_version_alone_replaces_no_cluster() -> None:
    for pod in render().ray_pods().values():
        assert "helm.sh/chart" not in pod["metadata"]["labels"]
        assert "app.kubernetes.io/version" not in pod["metadata"]["labels"]


def test_data_outlives_the_release() -> None:
    for claim in render().all("PersistentVolumeClaim"):
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_the_tests_pod_is_there_for_its_logs_and_is_placed_by_its_own_values() -> None:
    placed = {"nodeSelector": {"pool": "cpu"}, "tolerations": [{"operator": "Exists"}]}
    rendered = render(values={f"test.{key}": value for key, value in placed.items()})
    pod = rendered.one("Pod")
    assert pod["metadata"]["annotations"] == {
        "helm.sh/hook": "test",
        "helm.sh/hook-delete-policy": "before-hook-creation",
    }
    hooks = [
        i for i in rendered.documents if "helm.sh/hook" in i["metadata"].get("annotations", ())
    ]
    assert hooks == [pod]
    assert placed.items() <= pod["spec"].items()


def test_routes_lead_to_the_gateway() -> None:
    rendered = everything()
    service = rendered.ray_service["spec"]["serveService"]
    (path,) = rendered.one("Ingress")["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    assert path["backend"]["service"]["port"] == {"name": service["spec"]["ports"][0]["name"]}
    parents = {"enabled": True, "parentRefs": [{"name": "public"}]}
    (rule,) = render(values={"httpRoute": parents}).one("HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": 8000}]


def test_long_release_names_leave_room_for_suffixes() -> None:
    rendered = render("cpu", f"fullnameOverride=m{'o' * 60}")
    assert len(rendered.ray_service["metadata"]["name"]) <= 40
    assert violations(rendered.ray_service) == []


@pytest.mark.redis
@pytest.mark.parametrize("secret", ["hush", None])
def test_the_stores_start_append_never_evict_and_stop_in_order(
    tmp_path: Path, secret: str | None
) -> None:
    rendered = everything() if secret else profile("cpu")
    store = rendered.one("StatefulSet", "-serve-valkey")
    (container,) = store["spec"]["template"]["spec"]["containers"]
    shell, script = container["command"], container["args"][0]
    (port,) = free_ports(1)
    command = "valkey-server /run/valkey/valkey.conf"
    script = script.replace(command, f"{find_redis_binary()} {tmp_path}/valkey.conf --port {port}")
    script = script.replace("/run/valkey", str(tmp_path)).replace("dir /data", f"dir {tmp_path}")
    env = {"PATH": os.environ["PATH"], **container_environment(container, secret)}
    with subprocess.Popen([*shell, script], env=env, stdout=subprocess.DEVNULL) as running:
        try:
            client = redis.Redis(port=port, password=secret, retry=Retry(ConstantBackoff(0.1), 50))
            assert client.ping()
            memory = _bytes(container["resources"]["limits"]["memory"])
            expected = {
                "save": "",
                "appendonly": "yes",
                "maxmemory-policy": "noeviction",
                "maxmemory": str(int(memory * 0.75)),
            }
            for name, value in expected.items():
                assert client.config_get(name) == {name: value}
            assert (tmp_path / "valkey.conf").stat().st_mode & 0o077 == 0
            for kind in ("startupProbe", "readinessProbe"):
                assert answers(container[kind], port, env)
                assert answers(container[kind], port, {"PATH": env["PATH"]}) is (secret is None)
            running.terminate()
            assert running.wait(20) == 0
            assert not answers(container["readinessProbe"], port, env)
        finally:
            running.kill()


def container_environment(container: dict[str, Any], secret: str | None) -> dict[str, str]:
    """Variables as Kubernetes sets them where every Secret holds ``secret``."""
    given: dict[str, str] = {}
    for item in container["env"]:
        text = item.get("value", secret)
        for name, value in given.items():
            text = text.replace(f"$({name})", value)
        given[item["name"]] = text
    return given


def answers(probe: dict[str, Any], port: int, env: dict[str, str]) -> bool:
    """Whether a store's probe succeeds, asked of the server at ``port``."""
    cli = find_redis_binary().with_name("redis-cli")
    words = [word.replace("valkey-cli", f"{cli} -p {port}") for word in probe["exec"]["command"]]
    return subprocess.run(words, env=env, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _bytes(quantity: str) -> float:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(quantity[:-2]) * units[quantity[-2:]]
