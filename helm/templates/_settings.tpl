{{/* The settings of the service: `config`, and what only the chart knows. */}}

{{/* The worker group that hosts a part of the service. */}}
{{- define "mora-serve.home" -}}
{{- $groups := .root.Values.workerGroups -}}
{{- $next := dict "trainer" "gateway" "scorers" "generator" "generator" "gateway" -}}
{{- $group := .part -}}
{{- range until 3 -}}
{{- if not (index $groups $group).enabled }}{{ $group = index $next $group | default "gateway" }}{{ end -}}
{{- end -}}
{{- $group -}}
{{- end -}}

{{/* CPUs or GPUs (`kind`) of a pod of the group `home`, as KubeRay tells them to Ray. */}}
{{- define "mora-serve.perPod" -}}
{{- $group := index .root.Values.workerGroups .home -}}
{{- if eq .kind "GPU" -}}
{{- $group.gpus -}}
{{- else -}}
{{- coalesce $group.resources.limits.cpu $group.resources.requests.cpu 0 | include "mora-serve.amount" | float64 | ceil -}}
{{- end -}}
{{- end -}}

{{/* Nothing, or a message about what no pod of the group `home` has room for: it would wait for ever.
`at` is the path in the values, `kind` CPU or GPU, `asked` how many. */}}
{{- define "mora-serve.fits" -}}
{{- $has := include "mora-serve.perPod" . | float64 -}}
{{- if and (eq .kind "CPU") (not $has) -}}
{{- fail (printf "workerGroups.%s.resources must give cpu in limits or requests, got none: Ray's autoscaler would not know the size of a pod" .home) -}}
{{- end -}}
{{- if gt (float64 (.asked | default 0)) (float64 $has) -}}
{{- fail (printf "%s must be at most the %v %ss of a pod of workerGroups.%s, where it runs, got %v" .at $has .kind .home .asked) -}}
{{- end -}}
{{- end -}}

{{/* Nothing, or a message about replicas that wait for ever: all pods of a group together (`maxReplicas`)
must hold what rests there, and the workers of a training run. `config` is what is rendered. */}}
{{- define "mora-serve.holds" -}}
{{- $root := .root -}}
{{- $config := .config -}}
{{- $trainer := $config.trainer -}}
{{- $server := dict "min_replicas" (dig "replicas" 1 $config.server) "num_cpus" $config.server.num_cpus -}}
{{- $workers := dict "min_replicas" (dig "num_workers" 1 $trainer) "num_cpus" (dig "num_cpus_per_worker" 1 $trainer) "num_gpus" (ternary 1 0 $trainer.use_gpu) -}}
{{- $parts := list (dict "at" "config.trainer.num_workers" "part" "trainer" "replica" $workers) -}}
{{- $parts = append $parts (dict "at" "config.server.replicas" "part" "gateway" "replica" $server) -}}
{{- $parts = append $parts (dict "at" "config.runner.replica.min_replicas" "part" "gateway" "replica" $config.runner.replica) -}}
{{- $parts = append $parts (dict "at" "config.trainer.launcher.min_replicas" "part" "gateway" "replica" $trainer.launcher) -}}
{{- $parts = append $parts (dict "at" "config.policy.replica.min_replicas" "part" "generator" "replica" $config.policy.replica) -}}
{{- range $config.scorers -}}
{{- $parts = append $parts (dict "at" (printf "config.scorers.%s.replica.min_replicas" .name) "part" "scorers" "replica" .replica) -}}
{{- end -}}
{{- $left := dict -}}
{{- range $part := $parts -}}
{{- $home := include "mora-serve.home" (dict "root" $root "part" $part.part) -}}
{{- $pods := int (index $root.Values.workerGroups $home).maxReplicas -}}
{{- $asked := int (dig "min_replicas" 1 $part.replica) -}}
{{- $most := float64 $asked -}}
{{- $scarce := "" -}}
{{- range $kind, $name := dict "CPU" "num_cpus" "GPU" "num_gpus" -}}
{{- $pod := include "mora-serve.perPod" (dict "root" $root "home" $home "kind" $kind) | float64 -}}
{{- $key := printf "%s %s" $home $kind -}}
{{- $free := ternary (get $left $key) (mulf $pod $pods) (hasKey $left $key) -}}
{{- $each := float64 (get $part.replica $name | default 0) -}}
{{- if $part.replica.bundles -}}
{{- $each = 0.0 -}}
{{- range $part.replica.bundles }}{{ $each = addf $each (get . $kind | default 0) }}{{ end -}}
{{- end -}}
{{- if gt $each 0.0 -}}
{{- /* A millionth for fractions of a GPU, which floats do not add up exactly. */ -}}
{{- $fit := floor (addf (divf $free $each) 1e-6) -}}
{{- if not $part.replica.bundles }}{{ $fit = minf $fit (mulf $pods (floor (addf (divf $pod $each) 1e-6))) }}{{ end -}}
{{- if lt $fit $most }}{{ $most = $fit }}{{ $scarce = $kind }}{{ end -}}
{{- if ne $part.part "trainer" }}{{ $_ := set $left $key (subf $free (mulf $each $asked)) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if $scarce -}}
{{- fail (printf "%s must be at most %.0f, or some wait for ever: for more, the %d pods (maxReplicas) of workerGroups.%s have too few %ss, got %d" $part.at $most $pods $home $scarce $asked) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* `replica` with the Ray resource of its group. */}}
{{- define "mora-serve.placed" -}}
{{- $root := .root -}}
{{- $at := .at -}}
{{- $replica := deepCopy (.replica | default dict) -}}
{{- $home := include "mora-serve.home" (dict "root" .root "part" .part) -}}
{{- $pool := printf "mora-%s" $home -}}
{{- range $name, $kind := dict "num_cpus" "CPU" "num_gpus" "GPU" -}}
{{- include "mora-serve.fits" (dict "root" $root "home" $home "at" (printf "%s.%s" $at $name) "kind" $kind "asked" (get $replica $name)) -}}
{{- end -}}
{{- if $replica.bundles -}}
{{- $bundles := list -}}
{{- range $bundle := $replica.bundles -}}
{{- range $kind := list "CPU" "GPU" -}}
{{- include "mora-serve.fits" (dict "root" $root "home" $home "at" (printf "%s.bundles[].%s" $at $kind) "kind" $kind "asked" (get $bundle $kind)) -}}
{{- end -}}
{{- $bundles = append $bundles (set (deepCopy $bundle) $pool 0.01) -}}
{{- end -}}
{{- $_ := set $replica "bundles" $bundles -}}
{{- else -}}
{{- $_ := set $replica "resources" (set (deepCopy ($replica.resources | default dict)) $pool 0.01) -}}
{{- end -}}
{{- toYaml $replica -}}
{{- end -}}

{{/* Nothing, or a message about a vLLM engine whose ranks have not a GPU each. `at` is the path of the policy or
scorer, `name` of the engine's arguments in it, `home` the worker group. */}}
{{- define "mora-serve.ranks" -}}
{{- $at := .at -}}
{{- $engine := .engine | default dict -}}
{{- $replica := .replica | default dict -}}
{{- $ranks := mul (int ($engine.tensor_parallel_size | default 1)) (int ($engine.pipeline_parallel_size | default 1)) (int ($engine.data_parallel_size | default 1)) -}}
{{- $said := printf "%s.%s: tensor_parallel_size * pipeline_parallel_size * data_parallel_size" $at .name -}}
{{- $executor := $engine.distributed_executor_backend -}}
{{- if $replica.bundles -}}
{{- $gpus := 0 -}}
{{- range $replica.bundles }}{{ if .GPU }}{{ $gpus = add1 $gpus }}{{ end }}{{ end -}}
{{- if gt (int $ranks) (int $gpus) -}}
{{- fail (printf "%s must be at most the %d of replica.bundles that have a GPU, one for each rank, got %d" $said (int $gpus) (int $ranks)) -}}
{{- else if and (gt (int $ranks) 1) (ne (toString $executor) "ray") -}}
{{- fail (printf "%s.%s.distributed_executor_backend must be ray with replica.bundles, got %v: only Ray's actors reach the GPUs of several" $at .name ($executor | default "none")) -}}
{{- end -}}
{{- else if eq (toString $executor) "ray" -}}
{{- fail (printf "%s.replica.bundles must have one bundle with a GPU for each rank (%d) with distributed_executor_backend ray, got none: vLLM would take GPUs of any group" $at (int $ranks)) -}}
{{- else if and .home.gpus (gt $ranks (max 1 ($replica.num_gpus | default 0 | ceil))) -}}
{{- fail (printf "%s must be at most replica.num_gpus (%v), got %d" $said ($replica.num_gpus | default 0) (int $ranks)) -}}
{{- end -}}
{{- end -}}

{{/* Refuses texts that look like secrets in what the schema leaves open: `value` is at the path `at`. Names of
files that hold one, and switches, are none. */}}
{{- define "mora-serve.noSecrets" -}}
{{- $at := .at -}}
{{- if kindIs "map" .value -}}
{{- range $name, $inner := .value -}}
{{- $text := and (kindIs "string" $inner) (not (regexMatch "^(?i:[0-9]|true|false|yes|no|on|off)?$" (toString $inner))) (not (regexMatch "(?i:_(file|path|dir))$|^GOOGLE_APPLICATION_CREDENTIALS$" $name)) -}}
{{- if and $text (regexMatch "(?i:secret|passw|credential|access_?key|connection_?string)|(^|[_.-])(?i:api_?key|key|token)$|[a-z](Key|Token)$" $name) -}}
{{- fail (printf "%s.%s must not be in the values, which everybody who reads the RayService sees: name a Secret under `secrets`, or give a variable with valueFrom in extraEnv" $at $name) -}}
{{- end -}}
{{- include "mora-serve.noSecrets" (dict "at" (printf "%s.%s" $at $name) "value" $inner) -}}
{{- end -}}
{{- else if kindIs "slice" .value -}}
{{- range $inner := .value }}{{ include "mora-serve.noSecrets" (dict "at" $at "value" $inner) }}{{ end -}}
{{- else if kindIs "string" .value -}}
{{- if regexMatch "://[^/@ ]*:[^/@ ]+@" .value -}}
{{- fail (printf "%s must not hold a URL with a password: name a Secret under `secrets` or in `existingSecret`, or give a variable with valueFrom in extraEnv" $at) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "mora-serve.settings" -}}
{{- $config := deepCopy .Values.config -}}
{{- include "mora-serve.noSecrets" (dict "at" "config.blobs.options" "value" (dig "blobs" "options" dict $config)) -}}
{{- include "mora-serve.noSecrets" (dict "at" "config.server.file_uri_prefixes" "value" (dig "server" "file_uri_prefixes" list $config)) -}}
{{- include "mora-serve.noSecrets" (dict "at" "blobs.s3" "value" .Values.blobs.s3) -}}
{{- include "mora-serve.noSecrets" (dict "at" "gcsFaultTolerance.external.address" "value" .Values.gcsFaultTolerance.external.address) -}}
{{- range $name := list "engine" "engine_env" -}}
{{- include "mora-serve.noSecrets" (dict "at" (printf "config.policy.%s" $name) "value" (dig "policy" $name dict $config)) -}}
{{- end -}}
{{- range $scorer := $config.scorers }}{{ range $name := list "engine_args" "engine_env" "remote" -}}
{{- include "mora-serve.noSecrets" (dict "at" (printf "config.scorers.%s.%s" $scorer.name $name) "value" (index $scorer $name)) -}}
{{- end }}{{ end -}}
{{- if not $config.scorers }}{{ fail "config.scorers must list the scorers, got none: the chart places each on its worker group" }}{{ end -}}
{{- $names := list -}}
{{- range $config.scorers -}}
{{- if has .name $names }}{{ fail (printf "config.scorers must have distinct names, got %s twice" .name) }}{{ end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- $variables := list -}}
{{- range concat (include "mora-serve.chartEnv" . | fromYamlArray) .Values.extraEnv }}{{ $variables = append $variables .name }}{{ end -}}
{{- range $scorer := $config.scorers }}{{ with (.remote | default dict).api_key_env -}}
{{- if not (has . $variables) }}{{ fail (printf "config.scorers.%s.remote.api_key_env must name a variable of extraEnv, got %s" $scorer.name .) }}{{ end -}}
{{- end }}{{ end -}}
{{- /* The defaults are the profile's. */ -}}
{{- $sampling := $config.sampling | default dict -}}
{{- $n := int ($sampling.n | default 8) -}}
{{- $most := int ($sampling.n_max | default (ternary 16 24 (eq .Values.profile "gpu"))) -}}
{{- if lt $most $n }}{{ fail (printf "config.sampling.n_max must be at least n (%d), got %d" $n $most) }}{{ end -}}
{{- $server := $config.server | default dict -}}
{{- include "mora-serve.fits" (dict "root" . "home" "gateway" "at" "config.server.num_cpus" "kind" "CPU" "asked" $server.num_cpus) -}}
{{- $server = merge (dict "host" "0.0.0.0" "port" (int .Values.service.port) "resources" (set ($server.resources | default dict) "mora-gateway" 0.01)) $server -}}
{{- $_ := set $config "server" $server -}}
{{- $_ := set $config "data_dir" "/var/lib/mora" -}}
{{- with .Values.blobs.s3.url }}{{ $_ := set $config "blobs" (merge (dict "url" .) ($config.blobs | default dict)) }}{{ end -}}
{{- $policy := $config.policy | default dict -}}
{{- $_ := set $policy "replica" (include "mora-serve.placed" (dict "root" $ "at" "config.policy.replica" "part" "generator" "replica" $policy.replica) | fromYaml) -}}
{{- $home := include "mora-serve.home" (dict "root" . "part" "generator") -}}
{{- include "mora-serve.ranks" (dict "at" "config.policy" "name" "engine" "engine" $policy.engine "replica" $policy.replica "home" (index .Values.workerGroups $home)) -}}
{{- if and (eq .Values.profile "embedded") (not $policy.path) }}{{ $_ := set $policy "path" (include "mora-serve.embeddedModel" .) }}{{ end -}}
{{- $_ := set $config "policy" $policy -}}
{{- $scorers := list -}}
{{- $home = include "mora-serve.home" (dict "root" . "part" "scorers") -}}
{{- range $config.scorers -}}
{{- $placed := include "mora-serve.placed" (dict "root" $ "at" (printf "config.scorers.%s.replica" .name) "part" "scorers" "replica" .replica) | fromYaml -}}
{{- include "mora-serve.ranks" (dict "at" (printf "config.scorers.%s" .name) "name" "engine_args" "engine" .engine_args "replica" $placed "home" (index $.Values.workerGroups $home)) -}}
{{- $scorers = append $scorers (set . "replica" $placed) -}}
{{- end -}}
{{- $_ := set $config "scorers" $scorers -}}
{{- $runner := $config.runner | default dict -}}
{{- $_ := set $runner "replica" (include "mora-serve.placed" (dict "root" $ "at" "config.runner.replica" "part" "gateway" "replica" ($runner.replica | default (dict "min_replicas" 1 "max_replicas" 2))) | fromYaml) -}}
{{- $_ := set $config "runner" $runner -}}
{{- $trainer := $config.trainer | default dict -}}
{{- $home = include "mora-serve.home" (dict "root" . "part" "trainer") -}}
{{- $_ := set $trainer "launcher" (include "mora-serve.placed" (dict "root" $ "at" "config.trainer.launcher" "part" "gateway" "replica" $trainer.launcher) | fromYaml) -}}
{{- $_ := set $trainer "resources" (set ($trainer.resources | default dict) (printf "mora-%s" $home) 0.01) -}}
{{- if not (hasKey $trainer "use_gpu") }}{{ $_ := set $trainer "use_gpu" (gt (int (index .Values.workerGroups $home).gpus) 0) }}{{ end -}}
{{- include "mora-serve.fits" (dict "root" . "home" $home "at" "config.trainer.num_cpus_per_worker" "kind" "CPU" "asked" $trainer.num_cpus_per_worker) -}}
{{- $_ := set $config "trainer" $trainer -}}
{{- include "mora-serve.holds" (dict "root" . "config" $config) -}}
{{- if .Values.calibrator.existingConfigMap -}}
{{- $_ := set $config "method" (set ($config.method | default dict) "calibrator" (printf "/etc/mora/calibrator/%s" .Values.calibrator.key)) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "mora-serve.embeddedModel" -}}
/var/cache/mora/models/SmolLM2-135M-Instruct
{{- end -}}

{{/* What Ray Serve is given; `name` and `import_path` are the code's. */}}
{{- define "mora-serve.serveConfig" -}}
{{- $level := upper (.Values.config.log_level | default "info") -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ int .Values.service.port }}
logging_config: {log_level: {{ $level }}, enable_access_log: false}
applications:
  - name: mora
    route_prefix: /
    import_path: api.cluster:build
    logging_config: {log_level: {{ $level }}, enable_access_log: false}
    args:
      profile: {{ .Values.profile }}
      settings: {{- include "mora-serve.settings" . | nindent 8 }}
{{- end -}}
