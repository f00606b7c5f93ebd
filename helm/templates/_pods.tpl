{{/* The pods of Ray: head and worker groups differ in resources, probes and placement only. */}}

{{/* Variables of a Ray pod: the chart's, `extraEnv`, the group's. A name that comes again replaces the
earlier one, since an API server refuses a RayService that has it twice. */}}
{{- define "mora-serve.env" -}}
{{- include "mora-serve.checkedEnv" (dict "at" "extraEnv" "env" .root.Values.extraEnv) -}}
{{- include "mora-serve.checkedEnv" (dict "at" (printf "%s.env" .at) "env" .node.env) -}}
{{- $all := concat (include "mora-serve.chartEnv" .root | fromYamlArray) .root.Values.extraEnv (.node.env | default list) -}}
{{- $last := dict -}}
{{- range $all }}{{ $_ := set $last .name . }}{{ end -}}
{{- $once := list -}}
{{- range $all -}}
{{- if hasKey $last .name }}{{ $once = append $once (get $last .name) }}{{ $_ := unset $last .name }}{{ end -}}
{{- end -}}
{{- toYaml $once -}}
{{- end -}}

{{/* Nothing, or a message about a variable that is not the user's to set (MORA_* would be read as settings,
and KubeRay refuses the others) or whose value is a secret. */}}
{{- define "mora-serve.checkedEnv" -}}
{{- $at := .at -}}
{{- range .env -}}
{{- if hasPrefix "MORA_" .name -}}
{{- fail (printf "%s must not hold settings, got %s; they belong into `config`, and keys into the Secrets that `secrets` names or, for a remote scorer, into the variable that its remote.api_key_env names" $at .name) -}}
{{- else if has .name (list "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_REDIS_ADDRESS" "RAY_enable_autoscaler_v2") -}}
{{- fail (printf "%s must not hold what KubeRay sets, got %s; see gcsFaultTolerance and ray.autoscaling" $at .name) -}}
{{- else if and .value .valueFrom -}}
{{- fail (printf "%s must give either value or valueFrom, got both for %s" $at .name) -}}
{{- end -}}
{{- include "mora-serve.noSecrets" (dict "at" $at "value" (dict .name .value)) -}}
{{- end -}}
{{- end -}}

{{- define "mora-serve.chartEnv" -}}
{{- $name := include "mora-serve.fullname" . -}}
- {name: HOME, value: /tmp/home}
- {name: HF_HOME, value: /var/cache/mora/huggingface}
- {name: VLLM_CACHE_ROOT, value: /var/cache/mora/vllm}
- {name: XDG_CACHE_HOME, value: /tmp/cache}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_SERVE_THROUGHPUT_OPTIMIZED, value: "1"}
{{- if .Values.ray.haproxy }}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: "api.direct_bodies:middlewares"}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: "10"}
{{- else }}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "0"}
- {name: RAY_SERVE_ENABLE_DIRECT_INGRESS, value: "0"}
{{- end }}
{{- if .Values.valkey.enabled }}
{{- if .Values.externalRedis.existingSecret -}}
{{- fail (printf "externalRedis.existingSecret must be empty with valkey.enabled, got %s; set valkey.enabled: false to use it" .Values.externalRedis.existingSecret) -}}
{{- end }}
{{- if .Values.valkey.auth.enabled }}
- name: VALKEY_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ required "valkey.auth.existingSecret must name a Secret with the password (key valkey.auth.key), got none; or set valkey.auth.enabled: false" .Values.valkey.auth.existingSecret | quote }}
      key: {{ .Values.valkey.auth.key | quote }}
- {name: MORA_REDIS__URL, value: "redis://:$(VALKEY_PASSWORD)@{{ $name }}-valkey:6379/0"}
{{- else }}
- {name: MORA_REDIS__URL, value: "redis://{{ $name }}-valkey:6379/0"}
{{- end }}
{{- else }}
- name: MORA_REDIS__URL
  valueFrom:
    secretKeyRef:
      name: {{ required "externalRedis.existingSecret must name a Secret with the URL (key externalRedis.key), got none; or set valkey.enabled: true" .Values.externalRedis.existingSecret | quote }}
      key: {{ .Values.externalRedis.key | quote }}
{{- end }}
{{- with .Values.secrets.apiKeys }}{{ if .existingSecret }}
- name: MORA_SERVER__API_KEYS
  valueFrom: {secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}}
{{- end }}{{ end }}
{{- with .Values.secrets.huggingFace }}{{ if .existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}}
{{- end }}{{ end }}
{{- with .Values.secrets.s3 }}{{ if .existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .accessKeyIdKey | quote }}}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .secretAccessKeyKey | quote }}}}
{{- end }}{{ end }}
{{- with .Values.blobs.s3.endpoint }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- with .Values.blobs.s3.region }}
- {name: AWS_REGION, value: {{ . | quote }}}
- {name: AWS_DEFAULT_REGION, value: {{ . | quote }}}
{{- end }}
{{- end -}}

{{- define "mora-serve.volumes" -}}
{{- $name := include "mora-serve.fullname" .root -}}
{{- $v := .root.Values -}}
- name: tmp
  emptyDir: {sizeLimit: {{ toJson $v.tmpSizeLimit }}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ toJson .node.shmSize }}}
{{- if not .isHead }}
- name: data
  persistentVolumeClaim: {claimName: {{ default (printf "%s-data" $name) $v.data.existingClaim | quote }}}
- name: models
{{- if eq $v.modelCache.type "pvc" }}
  persistentVolumeClaim: {claimName: {{ default (printf "%s-models" $name) $v.modelCache.existingClaim | quote }}}
{{- else if eq $v.modelCache.type "hostPath" }}
  hostPath: {path: {{ $v.modelCache.hostPath | quote }}, type: DirectoryOrCreate}
{{- else }}
  emptyDir: {sizeLimit: {{ toJson $v.modelCache.size }}}
{{- end }}
{{- end }}
{{- with $v.calibrator.existingConfigMap }}
- name: calibrator
  configMap: {name: {{ . | quote }}}
{{- end }}
{{- end -}}

{{- define "mora-serve.volumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
{{- if not .isHead }}
- {name: data, mountPath: /var/lib/mora}
- {name: models, mountPath: /var/cache/mora}
{{- end }}
{{- if .root.Values.calibrator.existingConfigMap }}
- {name: calibrator, mountPath: /etc/mora/calibrator, readOnly: true}
{{- end }}
{{- end -}}

{{- define "mora-serve.resources" -}}
{{- $resources := include "mora-serve.checkedResources" (dict "at" (printf "%s.resources" .at) "resources" .node.resources) | fromYaml -}}
{{- $limit := $resources.limits.memory -}}
{{- if and $limit (ge (float64 (include "mora-serve.amount" .node.shmSize)) (float64 (include "mora-serve.amount" $limit))) -}}
{{- fail (printf "%s.shmSize must be less than resources.limits.memory (%v), of which it is a part, got %v" .at $limit .node.shmSize) -}}
{{- end -}}
{{- if .gpus -}}
{{- $_ := set $resources "requests" (set ($resources.requests | default dict) .name (int .gpus)) -}}
{{- $_ := set $resources "limits" (set ($resources.limits | default dict) .name (int .gpus)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Bytes of a node's object store: three quarters of /dev/shm, whose rest is for engines and training
workers. Left to itself Ray takes 30 % of the memory limit, and puts it all under /tmp where /dev/shm has less. */}}
{{- define "mora-serve.objectStore" -}}
{{- $bytes := include "mora-serve.amount" .node.shmSize | float64 | mulf 0.75 -}}
{{- if lt $bytes 78643200.0 -}}
{{- fail (printf "%s.shmSize must be at least 100Mi, got %v: three quarters of it are Ray's object store, which takes no less than 75 MiB" .at .node.shmSize) -}}
{{- end -}}
{{- printf "%.0f" (floor $bytes) -}}
{{- end -}}

{{/* Ready means that it takes requests: on a worker, that Serve's proxy answers there. KubeRay sends
requests to every ready worker, and a worker without a replica has no proxy. */}}
{{- define "mora-serve.probes" -}}
{{- $alive := dict "path" "/api/local_raylet_healthz" "port" 52365 -}}
{{- $ready := ternary $alive (dict "path" "/-/healthz" "port" "serve") .isHead -}}
startupProbe: {{- toYaml (merge (dict "httpGet" $alive) .root.Values.probes.startup) | nindent 2 }}
livenessProbe: {{- toYaml (merge (dict "httpGet" $alive) .root.Values.probes.liveness) | nindent 2 }}
readinessProbe: {{- toYaml (merge (dict "httpGet" $ready) .root.Values.probes.readiness) | nindent 2 }}
{{- end -}}

{{/* The pod template of the head (`group` is "head") or of a worker group. Service links are off:
with them a release called "mora" would hand MORA_..._SERVICE_HOST to settings that refuse unknown
variables. Autoscaler v2 replaces pods instead of restarting their containers. */}}
{{- define "mora-serve.rayPod" -}}
{{- $root := .root -}}
{{- $isHead := eq .group "head" -}}
{{- $at := ternary "head" (printf "workerGroups.%s" .group) $isHead -}}
metadata:
  labels:
    {{- $own := set (include "mora-serve.rayLabels" $root | fromYaml) "mora-serve/group" .group }}
    {{- merge $own .node.podLabels | toYaml | nindent 4 }}
  {{- $annotations := ternary (dict "cluster-autoscaler.kubernetes.io/safe-to-evict" "false" "karpenter.sh/do-not-disrupt" "true") dict $isHead }}
  {{- with merge (deepCopy .node.podAnnotations) $annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  restartPolicy: {{ ternary "Never" "Always" $root.Values.ray.autoscaling }}
  {{- if not $isHead }}
  serviceAccountName: {{ include "mora-serve.serviceAccountName" $root }}
  {{- end }}
  {{- if not (and $isHead $root.Values.ray.autoscaling) }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ int $root.Values.terminationGracePeriodSeconds }}
  securityContext: {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- include "mora-serve.pullSecrets" $root | nindent 2 }}
  {{- include "mora-serve.scheduling" .node | nindent 2 }}
  {{- if and (not $isHead) (eq $root.Values.profile "embedded") }}
  initContainers:
    - name: prepare-model
      image: {{ include "mora-serve.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [python, -m, mora_serve, models, prepare, --profile, embedded, --out, {{ include "mora-serve.embeddedModel" $root }}]
      env: [{name: HOME, value: /tmp/home}]
      securityContext: {{- include "mora-serve.containerSecurityContext" $root | nindent 8 }}
      resources: {{- toYaml .node.resources | nindent 8 }}
      volumeMounts: {{- include "mora-serve.volumeMounts" (dict "root" $root "isHead" $isHead) | nindent 8 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" $isHead }}
      image: {{ include "mora-serve.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      ports:
        {{- if $isHead }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
        - {name: serve, containerPort: {{ int $root.Values.service.port }}}
        - {name: metrics, containerPort: 8080}
      env:
        {{- include "mora-serve.env" (dict "root" $root "node" .node "at" $at) | nindent 8 }}
      {{- include "mora-serve.probes" (dict "root" $root "isHead" $isHead) | nindent 6 }}
      {{- if not $isHead }}
      lifecycle:
        preStop:
          exec: {command: [sleep, {{ $root.Values.preStopSleepSeconds | quote }}]}
      {{- end }}
      securityContext: {{- include "mora-serve.containerSecurityContext" $root | nindent 8 }}
      resources: {{- include "mora-serve.resources" (dict "at" $at "node" .node "gpus" .node.gpus "name" $root.Values.gpuResource) | nindent 8 }}
      volumeMounts: {{- include "mora-serve.volumeMounts" (dict "root" $root "isHead" $isHead) | nindent 8 }}
  volumes: {{- include "mora-serve.volumes" (dict "root" $root "node" .node "isHead" $isHead) | nindent 4 }}
{{- end -}}
