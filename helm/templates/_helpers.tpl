{{/* Names and labels. KubeRay refuses a RayService whose name has more than 47 characters; 40 leave
room for the suffixes of the chart's own objects. */}}
{{- define "mora-serve.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $joined := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full := default $joined .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) -}}
{{- fail (printf "fullnameOverride must give a name that starts with a letter and holds a-z, 0-9 and '-', got %s" $full) -}}
{{- end -}}
{{- $full -}}
{{- end -}}

{{- define "mora-serve.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "mora-serve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: mora-serve
{{ include "mora-serve.selectorLabels" . }}
{{- end -}}

{{/* Labels of the Ray pods: they must not change with the chart's version, since another pod template
is another Ray cluster. `app.kubernetes.io/name` is KubeRay's, whose Services for the head select by it. */}}
{{- define "mora-serve.rayLabels" -}}
app.kubernetes.io/part-of: mora-serve
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: ray
{{- end -}}

{{- define "mora-serve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "mora-serve.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The image: on CPUs the build without CUDA. */}}
{{- define "mora-serve.image" -}}
{{- $gpus := 0 -}}
{{- range .Values.workerGroups }}{{ if .enabled }}{{ $gpus = add $gpus .gpus }}{{ end }}{{ end -}}
{{- $tag := default (printf "%s-%s" .Chart.AppVersion (ternary "gpu" "cpu" (gt (int $gpus) 0))) .Values.image.tag -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ $tag }}
{{- end -}}
{{- end -}}

{{- define "mora-serve.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "mora-serve.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* A quantity (500m, 2, 1.5Gi) as a number of CPUs or bytes. */}}
{{- define "mora-serve.amount" -}}
{{- $units := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- mulf (float64 (trimSuffix $unit $text)) (get $units $unit) -}}
{{- end -}}

{{/* `resources`, refused where a request is above its limit, or is not it where Kubernetes overcommits
nothing: devices and huge pages. `at` is their path in the values. */}}
{{- define "mora-serve.checkedResources" -}}
{{- $at := .at -}}
{{- $limits := .resources.limits -}}
{{- range $name, $request := .resources.requests -}}
{{- $whole := regexMatch "/|^hugepages-" $name -}}
{{- if and $whole (not (hasKey $limits $name)) -}}
{{- fail (printf "%s.limits.%s must be given with requests.%s (%v): nothing of it is overcommitted" $at $name $name $request) -}}
{{- end -}}
{{- if hasKey $limits $name -}}
{{- $limit := index $limits $name -}}
{{- if gt (float64 (include "mora-serve.amount" $request)) (float64 (include "mora-serve.amount" $limit)) -}}
{{- fail (printf "%s.requests.%s must be at most limits.%s (%v), got %v" $at $name $name $limit $request) -}}
{{- else if and $whole (ne (include "mora-serve.amount" $request) (include "mora-serve.amount" $limit)) -}}
{{- fail (printf "%s.requests.%s must be limits.%s (%v): nothing of it is overcommitted, got %v" $at $name $name $limit $request) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml .resources -}}
{{- end -}}

{{/* Where a pod may run: of the mapping that is given. */}}
{{- define "mora-serve.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* A PodDisruptionBudget of one worker group. Only a number of pods that must stay is valid for Ray
pods: they have no controller with a scale, which `maxUnavailable` and percentages need. */}}
{{- define "mora-serve.pdb" -}}
{{- $group := index .root.Values.workerGroups .group -}}
{{- if and $group.enabled (gt (int $group.pdbMinAvailable) 0) -}}
{{- if ge (int $group.pdbMinAvailable) (int $group.minReplicas) -}}
{{- fail (printf "workerGroups.%s.pdbMinAvailable must be less than minReplicas (%d), or no node could be drained at rest, got %d; 0 makes no budget" .group (int $group.minReplicas) (int $group.pdbMinAvailable)) -}}
{{- end -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "mora-serve.fullname" .root }}-{{ .group }}
  labels: {{- include "mora-serve.labels" .root | nindent 4 }}
spec:
  minAvailable: {{ int $group.pdbMinAvailable }}
  selector:
    matchLabels:
      {{- include "mora-serve.rayLabels" .root | nindent 6 }}
      mora-serve/group: {{ .group }}
{{- end }}
{{- end -}}
