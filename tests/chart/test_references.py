"""Whatever a rendered object names is there: claims, Secrets, Services, ports, pods, accounts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.chart.charts import (
    EVERYTHING,
    NAMESPACE,
    PROFILES,
    Rendered,
    everything,
    profile,
    render,
)

SECRETS = {
    "VALKEY_PASSWORD": ("store", "password"),
    "MORA_SERVER__API_KEYS": ("keys", "api-keys"),
    "MORA_API_KEY": ("keys", "client-key"),
    "HF_TOKEN": ("hub", "token"),
    "AWS_ACCESS_KEY_ID": ("bucket", "access-key-id"),
    "AWS_SECRET_ACCESS_KEY": ("bucket", "secret-access-key"),
}
"""Secret and key of each variable in ``EVERYTHING``."""
STORE = ("mora-mora-serve-valkey", "mora-mora-serve-gcs-valkey")
MONITORS = ("serviceMonitor", "podMonitor")


@pytest.fixture(params=[*PROFILES, "everything"])
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return everything() if request.param == "everything" else profile(request.param)


def names(rendered: Rendered, kind: str) -> set[str]:
    return {item["metadata"]["name"] for item in rendered.all(kind)}


def services(rendered: Rendered) -> dict[str, set[int]]:
    """Ports of each Service, the one that KubeRay makes among them."""
    made = rendered.ray_service["spec"]["serveService"]
    return {
        item["metadata"]["name"]: {port["port"] for port in item["spec"]["ports"]}
        for item in (*rendered.all("Service"), made)
    }


def selected(rendered: Rendered, selector: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pods of the release that a label selector with ``In`` expressions takes."""

    def takes(labels: Mapping[str, str]) -> bool:
        rest = selector.get("matchExpressions", ())
        assert all(item["operator"] == "In" for item in rest)
        return selector.get("matchLabels", {}).items() <= labels.items() and all(
            labels.get(item["key"]) in item["values"] for item in rest
        )

    return [pod for pod in rendered.pods() if takes(pod["metadata"]["labels"])]


def port_names(pod: Mapping[str, Any]) -> set[str]:
    return {port["name"] for port in pod["spec"]["containers"][0].get("ports", ())}


def urls(rendered: Rendered) -> Iterator[str]:
    for pod in rendered.pods():
        for variable in pod["spec"]["containers"][0]["env"]:
            if variable["name"] in ("MORA_REDIS__URL", "MORA_URL"):
                yield variable["value"]
    yield rendered.cluster["gcsFaultToleranceOptions"]["redisAddress"]


def test_urls_lead_to_services_of_the_release(rendered: Rendered) -> None:
    found = {(urlsplit(url).hostname, urlsplit(url).port) for url in urls(rendered)}
    assert len(found) == 3
    there = services(rendered)
    assert all(port in there[str(host)] for host, port in found)


def test_the_jobs_store_and_rays_are_different_ones(rendered: Rendered) -> None:
    pod = rendered.ray_pods()["gateway"]["spec"]["containers"][0]
    (url,) = [item["value"] for item in pod["env"] if item["name"] == "MORA_REDIS__URL"]
    assert urlsplit(url).hostname == STORE[0]
    address = rendered.cluster["gcsFaultToleranceOptions"]["redisAddress"]
    assert urlsplit(address).hostname == STORE[1]


def test_claims_mounts_and_accounts_are_there(rendered: Rendered) -> None:
    for pod in rendered.pods():
        spec = pod["spec"]
        volumes = {item["name"]: item for item in spec["volumes"]}
        claims = {
            item["persistentVolumeClaim"]["claimName"]
            for item in volumes.values()
            if "persistentVolumeClaim" in item
        }
        assert claims <= names(rendered, "PersistentVolumeClaim")
        templates = {"data"} if "mora-serve/group" not in pod["metadata"]["labels"] else set()
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            assert {
                item["name"] for item in container["volumeMounts"]
            } <= volumes.keys() | templates
        if "serviceAccountName" in spec:
            assert spec["serviceAccountName"] in names(rendered, "ServiceAccount")
        if "priorityClassName" in spec:
            assert spec["priorityClassName"] in names(rendered, "PriorityClass")


def test_data_and_models_are_claims_of_their_own() -> None:
    made, given = (
        render(),
        render(values={"data.existingClaim": "mine", "modelCache.existingClaim": "theirs"}),
    )
    for rendered, expected in (
        (made, ("mora-mora-serve-data", "mora-mora-serve-models")),
        (given, ("mine", "theirs")),
    ):
        volumes = rendered.ray_pods()["generator"]["spec"]["volumes"]
        claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in volumes}
        assert (claims["data"], claims["models"]) == expected
    assert names(given, "PersistentVolumeClaim") == set()


def test_ports_by_name_are_ports_of_the_pods(rendered: Rendered) -> None:
    for pod in rendered.pods():
        container = pod["spec"]["containers"][0]
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container.get(kind, {})
            port = (asked.get("httpGet") or asked.get("tcpSocket") or {}).get("port", 0)
            assert isinstance(port, int) or port in port_names(pod)
    for service in rendered.all("Service"):
        pods = selected(rendered, {"matchLabels": service["spec"]["selector"]})
        assert len(pods) == 1
        assert all(p["targetPort"] in port_names(pods[0]) for p in service["spec"]["ports"])
    for monitor in rendered.all("PodMonitor"):
        pods = selected(rendered, monitor["spec"]["selector"])
        assert len(pods) == len(rendered.ray_pods())
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert all(endpoint["port"] == "metrics" in port_names(pod) for pod in pods)


def test_network_policies_select_pods_that_have_their_ports(rendered: Rendered) -> None:
    ray, stores = list(rendered.ray_pods().values()), rendered.all("StatefulSet")
    for suffix, pods in (("-ray", ray), ("-valkey", [s["spec"]["template"] for s in stores])):
        policy = rendered.one("NetworkPolicy", suffix)
        assert policy["metadata"]["name"] == f"mora-mora-serve{suffix}"
        taken = selected(rendered, policy["spec"]["podSelector"])
        assert taken == pods
        for rule in policy["spec"]["ingress"]:
            for port in rule.get("ports", ()):
                assert any(port["port"] in port_names(pod) for pod in taken)
    (rule,) = rendered.one("NetworkPolicy", "-valkey")["spec"]["ingress"]
    assert selected(rendered, rule["from"][0]["podSelector"]) == ray


def test_clients_and_monitoring_open_their_own_ports() -> None:
    client, watcher = ({"podSelector": {"matchLabels": {"app": name}}} for name in ("web", "prom"))
    values = {"networkPolicy.clients": [client], "networkPolicy.monitoring": [watcher]}
    rendered = render(values=values)
    (_, _, serve, metrics) = rendered.one("NetworkPolicy", "-ray")["spec"]["ingress"]
    test, *others = serve["from"]
    assert others == [client]
    assert selected(rendered, test["podSelector"]) == rendered.all("Pod")
    assert [port["port"] for port in serve["ports"]] == ["serve"]
    assert metrics["from"] == [watcher]
    assert [port["port"] for port in metrics["ports"]] == ["metrics", "serve"]


def test_every_secret_is_the_one_that_the_values_name() -> None:
    found = {
        (item["name"], *(item["valueFrom"]["secretKeyRef"][key] for key in ("name", "key")))
        for pod in everything().pods()
        for item in pod["spec"]["containers"][0]["env"]
        if "valueFrom" in item
    }
    assert found == {(name, *reference) for name, reference in SECRETS.items()}
    password = everything().cluster["gcsFaultToleranceOptions"]["redisPassword"]
    assert password["valueFrom"]["secretKeyRef"] == {"name": "store", "key": "password"}


@pytest.mark.parametrize("group", ["head", "gateway", "generator", "scorers", "trainer"])
def test_pods_are_placed_as_their_group_says(group: str) -> None:
    at = group if group == "head" else f"workerGroups.{group}"
    wanted: dict[str, Any] = {
        "nodeSelector": {"pool": group},
        "tolerations": [{"key": group, "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "runtimeClassName": "nvidia",
        "priorityClassName": "high",
    }
    if group != "head":
        wanted["topologySpreadConstraints"] = [
            {"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}
        ]
    rendered = render(values={f"{at}.{key}": value for key, value in wanted.items()})
    for name, pod in rendered.ray_pods().items():
        placed = {key: pod["spec"][key] for key in wanted if key in pod["spec"]}
        assert placed == (wanted if name == group else {})


def test_groups_scale_and_idle_as_their_values_say() -> None:
    groups = ("gateway", "generator", "scorers", "trainer")
    values = {
        f"workerGroups.{name}.{key}": number + offset
        for number, name in enumerate(groups, 3)
        for key, offset in (("minReplicas", 0), ("maxReplicas", 10), ("idleTimeoutSeconds", 100))
    }
    for number, name in enumerate(groups, 3):
        group = render(values=values).groups[name]
        found = tuple(group[key] for key in ("minReplicas", "maxReplicas", "idleTimeoutSeconds"))
        assert found == (number, number + 10, number + 100)


def test_a_pods_own_labels_keep_the_charts() -> None:
    theirs = {"mora-serve/group": "x", "team": "z"}
    rendered = render(values={"workerGroups.generator.podLabels": theirs})
    labels = rendered.ray_pods()["generator"]["metadata"]["labels"]
    assert labels["team"] == "z"
    assert labels["mora-serve/group"] == "generator"


def test_what_serves_is_not_given_up_for_a_training_run(rendered: Rendered) -> None:
    """The stores least of all: everything waits for them."""
    values = {item["metadata"]["name"]: item for item in rendered.all("PriorityClass")}
    training = [item for name, item in values.items() if name.endswith("-training")]
    assert all(item["preemptionPolicy"] == "Never" for item in training)

    def rank(pod: dict[str, Any]) -> int:
        name = pod["spec"].get("priorityClassName")
        return 0 if name is None else int(values[name]["value"])

    trainer = rendered.ray_pods().get("trainer")
    for store in rendered.all("StatefulSet"):
        assert trainer is None or rank(store["spec"]["template"]) >= rank(trainer)


def test_kuberays_services_find_the_head(rendered: Rendered) -> None:
    """They select by labels that KubeRay adds where a pod has none of its own."""
    kuberays = ("ray.io/", "app.kubernetes.io/name", "app.kubernetes.io/created-by")
    for pod in rendered.ray_pods().values():
        assert not [name for name in pod["metadata"]["labels"] if name.startswith(kuberays)]


def alerts(rendered: Rendered) -> dict[str, str]:
    (group,) = rendered.one("PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


@pytest.mark.parametrize("enabled", [(), MONITORS[:1], MONITORS[1:], MONITORS])
def test_alerts_ask_only_for_what_is_scraped(enabled: tuple[str, ...]) -> None:
    values = {f"monitoring.{kind}.enabled": True for kind in ("prometheusRule", *enabled)}
    found = alerts(render(values=values))
    assert {"MoraStoreDown", "MoraVolumeFills"} <= found.keys()
    assert ("MoraRayHeadDown" in found) == ("podMonitor" in enabled)
    assert ("MoraGatewayDown" in found) == ("serviceMonitor" in enabled)
    ours = any("mora_" in text for text in found.values())
    assert ours == ("serviceMonitor" in enabled)


def test_alerts_name_the_objects_of_the_release() -> None:
    rendered = everything()
    texts = alerts(rendered)
    stores = re.search(r'statefulset=~"(.+?)"', texts["MoraStoreDown"])
    assert stores is not None
    assert all(re.fullmatch(stores[1], name) for name in names(rendered, "StatefulSet"))
    claims = re.search(r'persistentvolumeclaim=~"(.+?)"', texts["MoraVolumeFills"])
    assert claims is not None
    own = names(rendered, "PersistentVolumeClaim") | {f"data-{name}-0" for name in STORE}
    assert all(re.fullmatch(claims[1], name) for name in own)
    named = {"data.existingClaim": "mine", "modelCache.existingClaim": "theirs"}
    given = alerts(render(values={**EVERYTHING, **named}))["MoraVolumeFills"]
    for pattern in re.findall(r'persistentvolumeclaim=~"(.+?)"', given):
        assert all(
            re.fullmatch(pattern, name) for name in ("mine", "theirs", "data-" + STORE[0] + "-0")
        )
        assert not re.fullmatch(pattern, "minery")
    monitor = rendered.one("PodMonitor")["metadata"]["name"]
    assert f'job="{NAMESPACE}/{monitor}"' in texts["MoraRayHeadDown"]


def test_the_gateway_is_scraped_where_it_answers() -> None:
    from api.routes.health import router

    (endpoint,) = everything().one("ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["path"] in {getattr(route, "path", None) for route in router.routes}
    assert endpoint["honorLabels"] is True


def test_every_option_is_told_the_queue() -> None:
    labels = everything().ray_service["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == EVERYTHING["kueue"]["queueName"]
    assert labels["kueue.x-k8s.io/priority-class"] == EVERYTHING["kueue"]["priorityClass"]


def test_an_account_that_exists_is_used_and_not_made() -> None:
    rendered = render(values={"serviceAccount": {"create": False, "name": "mine"}})
    assert rendered.all("ServiceAccount") == []
    accounts = {
        name: p["spec"].get("serviceAccountName") for name, p in rendered.ray_pods().items()
    }
    assert accounts.pop("head") is None
    assert set(accounts.values()) == {"mine"}


def test_every_pod_pulls_with_the_secrets() -> None:
    for pod in everything().pods():
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
