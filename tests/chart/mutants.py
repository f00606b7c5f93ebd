"""``python -m tests.chart.mutants``: do the chart's tests notice mistakes?

Each mutant is a copy of the chart with one mistake. The tests run on it and must fail; a mutant
that passes names a check that is missing. Exit status 1 when one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.chart.charts import ROOT


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old} -> {self.new}"


T = "templates/"
MUTANTS = (
    Mutant("values.schema.json", '"additionalProperties": false', '"additionalProperties": true'),
    Mutant("Chart.yaml", "appVersion: 0.1.0", "appVersion: 0.2.0"),
    Mutant("values.yaml", "version: 2.60.0", "version: 2.59.0"),
    Mutant("values.yaml", "num_gpus: 1, num_cpus: 4", "num_gpus: 2, num_cpus: 4"),
    Mutant("values.yaml", "runAsNonRoot: true", "runAsNonRoot: false"),
    Mutant("profiles/single-gpu.yaml", "num_gpus: 0.4, num_c", "num_gpus: 0.6, num_c"),
    Mutant("profiles/large.yaml", "gpus: 8", "gpus: 7"),
    Mutant("profiles/multi-gpu.yaml", "preset: beaver-v1-cost", "preset: beaver-v9-cost"),
    Mutant(T + "_settings.tpl", "import_path: api.cluster:build", "import_path: api.cluster:app"),
    Mutant(T + "_settings.tpl", "- name: mora", "- name: mora-serve"),
    Mutant(T + "_settings.tpl", '"/var/lib/mora"', '"/data"'),
    Mutant(T + "_settings.tpl", '(set (deepCopy $bundle) $pool 0.01)', "$bundle"),
    Mutant(T + "_settings.tpl", '"part" "scorers" "replica"', '"part" "trainer" "replica"'),
    Mutant(T + "_settings.tpl", 'port: {{ int .Values.service.port }}', "port: 8001"),
    Mutant(T + "_pods.tpl", "enableServiceLinks: false", "enableServiceLinks: true"),
    Mutant(T + "_pods.tpl", "name: MORA_REDIS__URL", "name: MORA_REDIS_URL"),
    Mutant(T + "_pods.tpl", "RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_THROUGHPUT"),
    Mutant(T + "_pods.tpl", "api.direct_bodies:middlewares", "api.direct_bodies:middleware"),
    Mutant(T + "_pods.tpl", "/api/local_raylet_healthz", "/api/raylet_healthz"),
    Mutant(T + "_pods.tpl", '"/-/healthz"', '"/healthz"'),
    Mutant(T + "_pods.tpl", "medium: Memory, ", ""),
    Mutant(T + "_pods.tpl", 'ternary "Never" "Always"', 'ternary "Always" "Never"'),
    Mutant(T + "_pods.tpl", "models, prepare, --profile", "models, prepared, --profile"),
    Mutant(T + "_pods.tpl", "ServiceAccountToken: false", "ServiceAccountToken: true"),
    Mutant(T + "_pods.tpl", "terminationGracePeriodSeconds:", "terminationGraceSeconds:"),
    Mutant(T + "_pods.tpl", '"mora-serve/group" .group', '"mora-group" .group'),
    Mutant(T + "_helpers.tpl", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
    Mutant(T + "_helpers.tpl", "minAvailable: {{ int", "maxUnavailable: {{ int"),
    Mutant(T + "_helpers.tpl", "trunc 40", "trunc 60"),
    Mutant(T + "_helpers.tpl", 'ternary "gpu" "cpu"', 'ternary "cuda" "cpu"'),
    Mutant(T + "_valkey.tpl", "appendonly yes", "appendonly no"),
    Mutant(T + "_valkey.tpl", "serviceName: {{ .name }}", "service: {{ .name }}"),
    Mutant(T + "_valkey.tpl", ".Values.valkey.podSecurityContext", ".Values.podSecurityContext"),
    Mutant(T + "rayservice.yaml", 'num-cpus: "0"', 'num-cpus: "4"'),
    Mutant(T + "rayservice.yaml", "version: v2", "version: v3"),
    Mutant(T + "rayservice.yaml", "type: {{ $ray.upgradeStrategy }}", "type: Rolling"),
    Mutant(T + "rayservice.yaml", "maxReplicas: {{ int .maxReplicas }}\n        {{- if", "{{- if"),
    Mutant(T + "rayservice.yaml", 'agent-listen-port: "52365"', 'agent-listen-port: "52366"'),
    Mutant(T + "rayservice.yaml", "component: gateway", "component: serve"),
    Mutant(T + "networkpolicy-ray.yaml", "port: metrics}", "port: dashboard}"),
    Mutant(T + "prometheusrule.yaml", "mora_gateway_rejected_total", "mora_gateway_refused_total"),
    Mutant(T + "prometheusrule.yaml", "alert: MoraStoreDown", "alert: MoraStoreAway"),
    Mutant(T + "networkpolicy-ray.yaml", "networkPolicy.clients", "networkPolicy.monitoring"),
    Mutant(T + "networkpolicy-valkey.yaml", "fullname\" . }}-valkey", "fullname\" . }}-stores"),
    Mutant(T + "networkpolicy-valkey.yaml", "[valkey, gcs-valkey]", "[valkey]"),
    Mutant(T + "networkpolicy-valkey.yaml", "port: valkey}", "port: redis}"),
    Mutant(T + "rayservice.yaml", "{{ int .idleTimeoutSeconds }}", "60"),
    Mutant(T + "rayservice.yaml", "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/queue"),
    Mutant(T + "rayservice.yaml", "elastic-job: \"true\"", "elastic-job: \"false\""),
    Mutant(T + "rayservice.yaml", "redis://%s-gcs-valkey:", "redis://%s-valkey:"),
    Mutant(T + "_pods.tpl", "name: HF_TOKEN", "name: HUB_TOKEN"),
    Mutant(T + "_pods.tpl", '"%s-data" $name', '"%s-files" $name'),
    Mutant(T + "_pods.tpl", "@{{ $name }}-valkey:", "@{{ $name }}-redis:"),
    Mutant(T + "_pods.tpl", "AWS_DEFAULT_REGION", "AWS_OTHER_REGION"),
    Mutant(T + "_pods.tpl", "merge $own .node.podLabels", "merge .node.podLabels $own"),
    Mutant(T + "_helpers.tpl", "with .tolerations", "with .toleration"),
    Mutant(T + "_settings.tpl", '.) ($config.blobs | default dict)', '.)'),
    Mutant(T + "_settings.tpl", "gt (float64 (.asked", "lt (float64 (.asked"),
    Mutant(T + "podmonitor.yaml", "port: metrics", "port: serve"),
    Mutant(T + "servicemonitor.yaml", "path: /metrics", "path: /metric"),
    Mutant(T + "prometheusrule.yaml", "-(gcs-)?valkey", "-(gcs)?valkey"),
    Mutant(T + "prometheusrule.yaml", "if .Values.monitoring.podMonitor.enabled", "if true"),
    Mutant("profiles/large.yaml", "num_cpus_per_worker: 1", "num_cpus_per_worker: 4"),
    Mutant("README.md", "config.policy.model=SmolLM2-135M-Instruct", "config.policy.model=SmolLM2"),
    Mutant("dashboards/mora-serve.json", "vllm:num_requests_running", "vllm:requests_running"),
    Mutant(T + "ingress.yaml", "port: {name: serve}", "port: {name: http}"),
    Mutant(T + "models-pvc.yaml", "resource-policy: keep", "resource-policy: delete"),
    Mutant(T + "tests/diagnostics.yaml", "name: MORA_URL", "name: MORA_ADDRESS"),
    Mutant(T + "tests/diagnostics.yaml", "diagnose, --prompt", "diagnose, --text"),
    Mutant(T + "tests/diagnostics.yaml", "before-hook-creation", "hook-succeeded"),
    Mutant(T + "prometheusrule.yaml", 'outcome!="ok"', 'outcome!="okay"'),
    Mutant(T + "prometheusrule.yaml", "by (reason)", "by (limit)"),
    Mutant(T + "podmonitor.yaml", "label_mora_serve_group", "label_mora_group"),
    Mutant(T + "rayservice.yaml", "FromServeSvc: true", "FromServeSvc: false"),
    Mutant(T + "rayservice.yaml", "volumeMounts: [{name: tmp, mountPath: /tmp}]", ""),
    Mutant(T + "rayservice.yaml", "replicas: {{ int .maxReplicas }}\n        {{- end }}",
           "replicas: {{ int .minReplicas }}\n        {{- end }}"),
    Mutant(T + "rayservice.yaml", "with .Values.service.annotations", "with .Values.annotations"),
    Mutant(T + "_pods.tpl", "command: [sleep,", "command: [sleeps,"),
    Mutant(T + "_pods.tpl", "value: /tmp/cache", "value: /cache"),
    Mutant(T + "_pods.tpl", "probes.readiness", "probes.liveness"),
    Mutant(T + "_pods.tpl", "(get $last .name)", "."),
    Mutant(T + "_pods.tpl", "(ge (float64", "(gt (float64"),
    Mutant(T + "_helpers.tpl", "if .Values.image.digest", "if .Values.digest"),
    Mutant(T + "_helpers.tpl", '"Gi" 1073741824.0', '"Gi" 1e9'),
    Mutant(T + "_helpers.tpl", "(int $group.minReplicas) -}}\n", "(int $group.maxReplicas) -}}\n"),
    Mutant(T + "_helpers.tpl", "instance: {{ .Release.Name | quote }}",
           "instance: {{ .Release.Name }}"),
    Mutant(T + "_valkey.tpl", "mulf 0.75", "mulf 1.5"),
    Mutant(T + "_valkey.tpl", "appendfsync everysec", "appendfsync no"),
    Mutant(T + "_valkey.tpl", '{{- include "mora-serve.pullSecrets" .root | nindent 6 }}', ""),
    Mutant(T + "_valkey.tpl", "toJson .store.persistence.size", ".store.persistence.size"),
    Mutant(T + "_settings.tpl", "proxy_location: EveryNode", "proxy_location: HeadOnly"),
    Mutant(T + "networkpolicy-valkey.yaml", "egress: []", "egress: [{}]"),
    Mutant(T + "httproute.yaml", "request: 0s", "request: 30s"),
    Mutant(T + "data-pvc.yaml", "with .Values.data.storageClass", "with .Values.data.class"),
    Mutant(T + "NOTES.txt", "secrets.apiKeys", "secrets.s3"),
    Mutant("README.md", "--reset-then-reuse-values", "--keep-values"),
    Mutant("README.md", "workerGroupSpecs/1/maxReplicas", "workerGroupSpecs/2/maxReplicas"),
    Mutant("README.md", "| `MoraStoreDown` |", "| `MoraStoreAway` |"),
    Mutant(T + "rayservice.yaml", "dashboard-host: 0.0.0.0", "dashboard-host: 127.0.0.1"),
    Mutant(T + "_pods.tpl", "containerPort: 8265", "containerPort: 8266"),
    Mutant(T + "_pods.tpl", "containerPort: 10001", "containerPort: 10009"),
    Mutant(T + "_pods.tpl", "name: gcs-server", "name: gcs"),
    Mutant(T + "_valkey.tpl", "REDISCLI_AUTH", "REDIS_AUTH"),
    Mutant(T + "_valkey.tpl", "grep -q PONG", "grep -q POMG"),
    Mutant(T + "tests/diagnostics.yaml", "helm.sh/hook: test", "helm.sh/hooks: test"),
    Mutant(T + "serviceaccount.yaml", "kind: ServiceAccount",
           "kind: Secret\nmetadata: {name: second}\n---\napiVersion: v1\nkind: ServiceAccount"),
    Mutant(T + "_settings.tpl", "if lt $fit $most", "if lt $fit 0.0"),
    Mutant(T + "_settings.tpl", "minf $fit", "maxf $fit"),
    Mutant(T + "_settings.tpl", "subf $free", "addf $free"),
    Mutant(T + "_settings.tpl", "$each = addf $each", "$each = addf 0"),
    Mutant("values.yaml", "fsGroup: 10001", "fsGroup: 20000"),
    Mutant("values.yaml", "fsGroup: 999", "fsGroup: 998"),
    Mutant("values.yaml", "runAsUser: 999", "runAsUser: 998"),
    Mutant("values.yaml", "readiness: {periodSeconds: 5,", "readiness: {periodSeconds: 500,"),
    Mutant("values.yaml", "failureThreshold: 60}", "failureThreshold: 1}"),
    Mutant("values.yaml", "timeoutSeconds: 300", "timeoutSeconds: 3"),
    Mutant(T + "prometheusrule.yaml", "> 0.05", "> 5"),
    Mutant(T + "prometheusrule.yaml", "> 0.8", "> 80"),
    Mutant(T + "prometheusrule.yaml", "generator_serves_current", "generator_is_current"),
    Mutant(T + "priorityclass-training.yaml", "preemptionPolicy: Never", ""),
    Mutant("profiles/multi-gpu.yaml", "valkey: {priorityClassName: mora-serving}", ""),
    Mutant(T + "networkpolicy-ray.yaml", "(not .Values.networkPolicy.monitoring)", "false"),
    Mutant(T + "_helpers.tpl", "app.kubernetes.io/part-of: mora-serve\napp.kubernetes.io/instance",
           "app.kubernetes.io/name: mora-serve\napp.kubernetes.io/instance"),
)  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Whether all tests pass on the mutant."""
    with tempfile.TemporaryDirectory(prefix="mora-chart-") as folder:
        chart = Path(folder) / "helm"
        shutil.copytree(ROOT / "helm", chart)
        path = chart / mutant.file
        text = path.read_text("utf-8")
        assert mutant.old in text, f"nothing to change: {mutant}"
        path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "tests/chart", "-x", "-q", "-m", "not ray",
             "-p", "no:cacheprovider", "--deselect", "tests/chart/test_values.py::"
             "test_random_valid_values_render_valid_objects"],
            cwd=ROOT, env={**os.environ, "CHART_UNDER_TEST": str(chart)}, capture_output=True,
        )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout.decode()[-2000:]
    return done.returncode == 0


def main(words: list[str]) -> int:
    """Try the mutants that hold one of ``words``, or all."""
    chosen = [m for m in MUTANTS if not words or any(word in str(m) for word in words)]
    survivors = []
    for number, mutant in enumerate(chosen, 1):
        alive = survives(mutant)
        survivors += [mutant] if alive else []
        said = "SURVIVES" if alive else "noticed"
        print(f"{number:2}/{len(chosen)} {said}  {mutant}", flush=True)
    print(f"mutants: {len(chosen) - len(survivors)} of {len(chosen)} noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
