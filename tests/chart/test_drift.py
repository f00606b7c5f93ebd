"""Chart and code agree: settings, the application graph, placement, ports, variables, commands.

Every rendered profile is read by the code that will run there: the settings' loader, Serve's
configuration schema and application builder, and the autoscaler's reader of a RayCluster.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
import yaml
from prometheus_client import CollectorRegistry
from ray._private.ray_constants import (
    DEFAULT_DASHBOARD_AGENT_LISTEN_PORT,
    DEFAULT_DASHBOARD_PORT,
    DEFAULT_PORT,
)
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _generate_available_node_types_from_ray_cr_spec,
)
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.serve._private.build_app import build_app
from ray.serve._private.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from actors.metrics import GeneratorMetrics, ScorerMetrics
from api.cluster import cluster_settings
from api.ingress import APPLICATION
from api.proxy import common_environment, haproxy_environment, python_proxy_environment
from api.telemetry import GatewayMetrics, merge_expositions
from mora_serve import __version__
from mora_serve.cli.app import app
from mora_serve.config import (
    CLIENT_VARIABLES,
    ENV_PREFIX,
    RESERVED_VARIABLES,
    Settings,
    load_settings,
)
from mora_serve.errors import ConfigError
from mora_serve.settings_sources import read_environ
from mora_serve.stack import resolve_settings
from tests.chart.charts import (
    CHART,
    ROOT,
    Rendered,
    environment,
    everything,
    in_cluster,
    profile,
    render,
    run_helm,
)
from tests.chart.footprint import row
from trainer.metrics import exposition

SECRET_VALUES = {"MORA_SERVER__API_KEYS": '["one", "two"]', "MORA_REDIS__URL": "redis://store:6379"}
HEAD_PORTS = {"gcs-server": DEFAULT_PORT, "dashboard": DEFAULT_DASHBOARD_PORT, "client": 10001}
"""Where the head listens, under KubeRay's names; Ray has no constant for the last one."""
FOREIGN_METRICS = {
    "up",
    "kube_statefulset_status_replicas_ready",
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
}
"""Of Prometheus, kube-state-metrics and the kubelet."""
REPORT = {"step": 1.0, "loss": 1.0, "rewards/margins": 1.0, "rewards/accuracies": 1.0}
"""What a trainer reports of a step."""


@dataclass(frozen=True)
class Demand:
    """What one replica takes of the pods of a group."""

    deployment: str
    group: str
    bundles: tuple[Mapping[str, float], ...]
    fewest: int
    most: int


def variables(rendered: Rendered) -> dict[str, str]:
    """The environment of a gateway's pod, Secrets filled in."""
    given = environment(rendered.ray_pods()["gateway"])
    return {
        name: SECRET_VALUES.get(name, "secret") if value is None else value
        for name, value in given.items()
    }


def settings_of(rendered: Rendered) -> Settings:
    return cluster_settings(in_cluster(rendered), variables(rendered))


def deployments_of(rendered: Rendered, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The application as Serve would build it in the cluster, by deployment name."""
    for name, value in variables(rendered).items():
        if name.startswith(("MORA_", "RAY_SERVE_ENABLE")):
            monkeypatch.setenv(name, value)
    (application,) = ServeDeploySchema.model_validate(rendered.serve_config).applications
    assert application.import_path is not None
    built = import_attr(application.import_path)(application.args)
    graph = build_app(built, name=application.name, default_runtime_env={})
    return {item.name: item for item in graph.deployments}


def demands(rendered: Rendered, monkeypatch: pytest.MonkeyPatch) -> Iterator[Demand]:
    for name, deployment in deployments_of(rendered, monkeypatch).items():
        replica = deployment._replica_config
        actor = replica.ray_actor_options
        alone = {
            "CPU": actor.get("num_cpus", 0),
            "GPU": actor.get("num_gpus", 0),
            **actor.get("resources", {}),
        }
        bundles = tuple(replica.placement_group_bundles or (alone,))
        for bundle in bundles:
            (group,) = [key for key in bundle if key.startswith("mora-")]
        scaling = deployment._deployment_config.autoscaling_config
        fixed = deployment.num_replicas
        fewest, most = (scaling.min_replicas, scaling.max_replicas) if scaling else (fixed, fixed)
        yield Demand(name, group.removeprefix("mora-"), bundles, fewest, most)


def fit(bundles: list[Mapping[str, float]], node: Mapping[str, float], num_nodes: int) -> bool:
    """Whether all bundles have a place, the largest placed first."""
    left = [dict(node) for _ in range(num_nodes)]
    for bundle in sorted(bundles, key=lambda b: (b.get("GPU", 0), b.get("CPU", 0)), reverse=True):
        for free in left:
            if all(free.get(key, 0) + 1e-9 >= amount for key, amount in bundle.items()):
                for key, amount in bundle.items():
                    free[key] = free.get(key, 0) - amount
                break
        else:
            return False
    return True


def node_types(rendered: Rendered) -> dict[str, Any]:
    """The cluster as Ray's autoscaler reads it."""
    types: dict[str, Any] = _generate_available_node_types_from_ray_cr_spec(rendered.cluster)
    return types


def test_the_settings_load(profile_name: str) -> None:
    rendered = profile(profile_name)
    settings = settings_of(rendered)
    arguments = in_cluster(rendered)["settings"]
    assert settings.server.host == "0.0.0.0"
    assert str(settings.data_dir) == arguments["data_dir"]
    assert [item.name for item in settings.scorers] == [i["name"] for i in arguments["scorers"]]
    assert settings.trainer.use_gpu == arguments["trainer"]["use_gpu"]


def test_settings_with_every_option_load() -> None:
    rendered = everything()
    arguments = in_cluster(rendered)
    settings = load_settings(
        arguments["profile"], overrides=arguments["settings"], environ=variables(rendered)
    )
    assert settings.blobs.url == "s3://mora/blobs"
    assert [key.get_secret_value() for key in settings.server.api_keys] == ["one", "two"]
    assert settings.method.calibrator == "/etc/mora/calibrator/calibrator.json"


def test_no_secret_is_in_the_serve_configuration() -> None:
    text = everything().ray_service["spec"]["serveConfigV2"]
    assert "redis://" not in text
    assert "api_keys" not in text


def test_serve_builds_the_application(profile_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = profile(profile_name)
    (application,) = rendered.serve_config["applications"]
    assert application["name"] == APPLICATION
    scorers = {f"scorer-{item['name']}" for item in in_cluster(rendered)["settings"]["scorers"]}
    built = deployments_of(rendered, monkeypatch)
    assert set(built) == {"gateway", "generator", "runner", "launcher", *scorers}


def test_every_deployment_has_one_group_and_fits_it(
    profile_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = profile(profile_name)
    types, groups = node_types(rendered), rendered.groups
    by_group: dict[str, list[Demand]] = defaultdict(list)
    for demand in demands(rendered, monkeypatch):
        by_group[demand.group].append(demand)
    assert set(by_group) <= set(groups)
    for name, found in by_group.items():
        node = types[name]["resources"]
        assert node[f"mora-{name}"] == 1
        least = [b for d in found for _ in range(d.fewest) for b in d.bundles]
        assert fit(least, node, groups[name]["minReplicas"]), f"{name}: too few pods at rest"
        most = [b for d in found for _ in range(d.most) for b in d.bundles]
        assert fit(most, node, groups[name]["maxReplicas"]), f"{name}: too few pods at most"


def test_groups_that_serve_nothing_at_rest_have_no_pod(
    profile_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = profile(profile_name)
    serving = {item.group for item in demands(rendered, monkeypatch)}
    for name, group in rendered.groups.items():
        assert name in serving or group["minReplicas"] == 0


def test_training_workers_have_a_place(profile_name: str) -> None:
    rendered = profile(profile_name)
    trainer = settings_of(rendered).trainer
    (pool,) = [name for name in trainer.resources if name.startswith("mora-")]
    node = node_types(rendered)[pool.removeprefix("mora-")]
    worker = {"CPU": trainer.num_cpus_per_worker, "GPU": float(trainer.use_gpu)}
    workers: list[Mapping[str, float]] = [{**worker, **trainer.resources}] * trainer.num_workers
    assert fit(workers, node["resources"], node["max_workers"])


def test_the_head_does_no_work(profile_name: str) -> None:
    head = node_types(profile(profile_name))["headgroup"]["resources"]
    assert head["CPU"] == 0
    assert head.get("GPU", 0) == 0
    assert not any(name.startswith("mora-") for name in head)


def test_the_trainers_start_from_none_and_the_others_from_what_serves() -> None:
    groups = profile("multi-gpu").groups
    assert groups["trainer"]["minReplicas"] == 0
    assert all(groups[name]["minReplicas"] > 0 for name in ("gateway", "generator", "scorers"))


def test_ports_agree(profile_name: str) -> None:
    check_ports(profile(profile_name))


def test_ports_agree_when_they_are_others() -> None:
    check_ports(render("cpu", "service.port=9009"))


def check_ports(rendered: Rendered) -> None:
    port = settings_of(rendered).server.port
    assert rendered.serve_config["http_options"] == {"host": "0.0.0.0", "port": port}
    (service,) = rendered.ray_service["spec"]["serveService"]["spec"]["ports"]
    assert (service["name"], service["port"]) == ("serve", port)
    groups = {"head": rendered.cluster["headGroupSpec"], **rendered.groups}
    for name, pod in rendered.ray_pods().items():
        (container,) = pod["spec"]["containers"]
        ports = {item["name"]: item["containerPort"] for item in container["ports"]}
        parameters = groups[name]["rayStartParams"]
        assert ports["serve"] == port
        assert str(ports["metrics"]) == parameters["metrics-export-port"]
        assert parameters["dashboard-agent-listen-port"] == str(DEFAULT_DASHBOARD_AGENT_LISTEN_PORT)
        own = {key: number for key, number in ports.items() if key not in ("serve", "metrics")}
        assert own == (HEAD_PORTS if name == "head" else {})
    assert groups["head"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    name = rendered.ray_service["spec"]["serveService"]["metadata"]["name"]
    url, _ = CLIENT_VARIABLES
    assert environment(rendered.one("Pod"))[url] == f"http://{name}:{port}"


def test_the_tests_pod_is_a_client_with_a_key() -> None:
    given = environment(everything().one("Pod"))
    assert {name for name in given if name.startswith(ENV_PREFIX)} == set(CLIENT_VARIABLES)


def test_probes_ask_what_ray_answers_without_a_token() -> None:
    for name, pod in profile("multi-gpu").ray_pods().items():
        (container,) = pod["spec"]["containers"]
        for kind in ("startupProbe", "livenessProbe"):
            asked = container[kind]["httpGet"]
            assert asked["path"] in PUBLIC_EXACT_PATHS
            assert asked["port"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
        ready = container["readinessProbe"]["httpGet"]
        if name != "head":
            assert ready == {"path": "/-/healthz", "port": "serve"}


def test_variables_are_settings_of_the_code() -> None:
    for pod in everything().ray_pods().values():
        given = {n: v or SECRET_VALUES.get(n, "x") for n, v in environment(pod).items()}
        read_environ(Settings, ENV_PREFIX, given, RESERVED_VARIABLES)


def test_service_links_would_be_refused_as_settings_and_are_off() -> None:
    link = {"MORA_VALKEY_SERVICE_HOST": "10.0.0.1", **SECRET_VALUES}
    with pytest.raises(ConfigError, match="MORA_VALKEY_SERVICE_HOST is not a setting"):
        load_settings("fake", environ=link)
    for pod in everything().pods():
        assert pod["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("haproxy", [True, False])
def test_serves_variables_are_those_of_a_local_stack(haproxy: bool) -> None:
    rendered = render("cpu", f"ray.haproxy={str(haproxy).lower()}")
    given = environment(rendered.ray_pods()["gateway"])
    expected = dict(common_environment(local=False))
    if haproxy:
        local = haproxy_environment("/haproxy", PurePosixPath("/tmp"))  # type: ignore[arg-type]
        kept = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
                "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S")  # fmt: skip
        expected |= {name: local[name] for name in kept}
    else:
        expected |= python_proxy_environment()
    assert {n: v for n, v in given.items() if n.startswith(("RAY_",))} == expected
    # The Python proxy holds whole bodies, so that a file is no larger than a part there.
    server = settings_of(rendered).server
    assert (server.max_upload_bytes > server.max_part_bytes) is haproxy


def test_paths_are_mounted(profile_name: str) -> None:
    check_paths(profile(profile_name))


def test_the_calibrator_and_the_embedded_model_are_mounted() -> None:
    check_paths(everything())
    check_paths(embedded())


def embedded() -> Rendered:
    """What the README's own command installs."""
    readme = (CHART / "README.md").read_text("utf-8")
    (command,) = re.findall(
        r"^helm install (mora helm [^`]*?profile=embedded.*?)^```", readme, re.M | re.S
    )
    words = shlex.split(command.replace("\\\n", " "))
    options = [word.replace("helm/", f"{CHART}/") for word in words[2:]]
    text = run_helm("template", "mora", str(CHART), *options)
    return Rendered(tuple(item for item in yaml.safe_load_all(text) if item))


def test_the_embedded_install_serves_the_model_that_it_prepares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendered = embedded()
    policy = settings_of(rendered).policy
    prepared = rendered.ray_pods()["gateway"]["spec"]["initContainers"][0]["command"][-1]
    assert policy.path == prepared
    assert PurePosixPath(prepared).name == policy.model
    for demand in demands(rendered, monkeypatch):
        assert not any(bundle.get("GPU") for bundle in demand.bundles)


def check_paths(rendered: Rendered) -> None:
    arguments = in_cluster(rendered)
    settings = arguments["settings"]
    paths = {settings["data_dir"], settings.get("method", {}).get("calibrator", "")}
    paths.add(settings["policy"].get("path", ""))
    loaded = load_settings(arguments["profile"], overrides=settings, environ=variables(rendered))
    blobs = urlsplit(resolve_settings(loaded).blobs.url or "")
    assert blobs.scheme in ("file", "s3")
    paths.add(blobs.path if blobs.scheme == "file" else "")
    for name, pod in rendered.ray_pods().items():
        if name == "head":
            continue
        (container,) = pod["spec"]["containers"]
        given = environment(pod)
        wanted = {path for path in paths if path.startswith("/")}
        wanted |= {str(given[key]) for key in ("HOME", "HF_HOME", "VLLM_CACHE_ROOT")}
        mounts = [PurePosixPath(item["mountPath"]) for item in container["volumeMounts"]]
        for path in wanted:
            assert any(PurePosixPath(path).is_relative_to(mount) for mount in mounts), path


def test_commands_are_ones_that_the_command_line_takes() -> None:
    rendered = embedded()
    init = rendered.ray_pods()["gateway"]["spec"]["initContainers"][0]["command"]
    for command in (init, rendered.one("Pod")["spec"]["containers"][0]["command"]):
        assert command[:3] == ["python", "-m", "mora_serve"]
        parse(command[3:])


def parse(arguments: list[str]) -> None:
    """Raises a ``click`` error for arguments that the command line would refuse."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("mora-serve", [], resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, arguments)
        resilient = hasattr(command, "resolve_command")
        context = command.make_context(
            name, [] if resilient else list(arguments), parent=context, resilient_parsing=resilient
        )


def test_versions_are_the_codes(profile_name: str) -> None:
    chart = (CHART / "Chart.yaml").read_text("utf-8")
    assert f"appVersion: {__version__}\n" in chart
    for lock in ("cpu.lock", "image-cpu.lock", "image-gpu.lock"):
        (locked,) = re.findall(r"^ray==(.+)$", (ROOT / "requirements" / lock).read_text(), re.M)
        assert profile(profile_name).cluster["rayVersion"] == locked


def test_images_are_the_dockerfiles_targets() -> None:
    targets = set(re.findall(r"^FROM .* AS (gpu|cpu)$", (ROOT / "Dockerfile").read_text(), re.M))
    for name in ("cpu", "multi-gpu"):
        image = profile(name).ray_pods()["head"]["spec"]["containers"][0]["image"]
        repository, _, tag = image.partition(":")
        assert repository == "mora-serve"
        assert tag in {f"{__version__}-{target}" for target in targets}


def test_metrics_in_rules_and_dashboard_exist() -> None:
    named = {name for text in expressions() for name in re.findall(r"[a-z_:]+(?=\{)", text)}
    assert len(named) > 15
    vllm = {name for name in named if name.startswith("vllm:")}
    assert vllm <= vllm_metrics()
    assert named - vllm - FOREIGN_METRICS <= our_metrics()


def test_labels_in_rules_and_dashboard_are_the_metrics() -> None:
    """A label that a metric does not have selects nothing, and says so nowhere."""
    labels = metric_labels()
    added = set(re.findall(r'(\w+)="', merge_expositions({"gateway-1": "some_total 1"})))
    assert len(added) == 1
    known = 0
    for text in expressions():
        used = set(re.findall(r'(\w+)(?:=~|!=|=)"', text))
        used |= {name for by in re.findall(r"by \(([^)]*)\)", text) for name in by.split(", ")}
        for metric in set(re.findall(r"mora_[a-z_]+(?=\{)", text)):
            family = re.sub(r"_(total|bucket|count|sum)$", "", metric)
            assert used <= labels[family] | added | {"namespace", "service", "le"}, text
            known += 1
    assert known > 15


def expressions() -> list[str]:
    """PromQL of the dashboard and of the rules."""
    rendered = everything()
    dashboard = json.loads(rendered.one("ConfigMap", "-dashboard")["data"]["mora-serve.json"])
    (group,) = rendered.one("PrometheusRule")["spec"]["groups"]
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*panels, *(rule["expr"] for rule in group["rules"])]


def metric_labels() -> dict[str, set[str]]:
    """Labels of our metrics, by family."""
    registry = CollectorRegistry()
    owners = (GeneratorMetrics(registry), ScorerMetrics(registry), GatewayMetrics())
    instruments = [item for owner in owners for item in vars(owner).values()]
    labels = {item._name: set(item._labelnames) for item in instruments if hasattr(item, "_name")}
    trained = re.findall(r"^(mora_[a-z_]+)\{(.+)\}", exposition("job", REPORT), re.M)
    return labels | {name: set(re.findall(r'(\w+)="', given)) for name, given in trained}


def our_metrics() -> set[str]:
    registry = CollectorRegistry()
    GeneratorMetrics(registry)
    ScorerMetrics(registry)
    families = [*registry.collect(), *GatewayMetrics().registry.collect()]
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    names = {f.name + ending for f in families for ending in endings[f.type]}
    return names | set(re.findall(r"^([a-z_]+)\{", exposition("job", REPORT), re.M))


def vllm_metrics() -> set[str]:
    """Names in the sources of the installed vLLM: importing it takes longer than all of this."""
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (PurePosixPath(spec.origin).parent / "v1" / "metrics" / "loggers.py").as_posix()
    with open(source, encoding="utf-8") as file:
        return set(re.findall(r'name="(vllm:[a-z_]+)"', file.read()))


def test_the_readme_tells_what_a_profile_asks_for(profile_name: str) -> None:
    assert row(profile_name) in (CHART / "README.md").read_text("utf-8")


def test_every_alert_is_explained() -> None:
    (group,) = everything().one("PrometheusRule")["spec"]["groups"]
    readme = (CHART / "README.md").read_text("utf-8")
    explained = re.findall(r"^\| `(Mora\w+)` \|", readme, re.M)
    assert sorted(explained) == sorted(rule["alert"] for rule in group["rules"])


def test_the_values_schema_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "chart_schema.py"), "--check"]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def test_every_value_has_a_default_to_read() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert sorted(undocumented(schema, values)) == []


def undocumented(
    schema: Mapping[str, Any], values: Mapping[str, Any], at: str = ""
) -> Iterator[str]:
    for name, child in schema.get("properties", {}).items():
        if at == "" and name in ("config", "global"):
            continue
        if name not in values:
            if not at.startswith((".probes", ".podSecurityContext")):
                yield f"{at}.{name}"
        elif isinstance(values[name], Mapping):
            yield from undocumented(child, values[name], f"{at}.{name}")
