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
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mora-serve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: mora-serve
{{ include "mora-serve.selectorLabels" . }}
{{- end -}}

{{/* Labels of the Ray pods: they must not change with the chart's version, since another pod template
is another Ray cluster. */}}
{{- define "mora-serve.rayLabels" -}}
{{ include "mora-serve.selectorLabels" . }}
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
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "mora-serve.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
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
runtimeClassName: {{ . }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* A PodDisruptionBudget of one worker group. Only a number of pods that must stay is valid for Ray
pods: they have no controller with a scale, which `maxUnavailable` and percentages need. */}}
{{- define "mora-serve.pdb" -}}
{{- $group := index .root.Values.workerGroups .group -}}
{{- if and $group.enabled (gt (int $group.pdbMinAvailable) 0) -}}
{{- if ge (int $group.pdbMinAvailable) (int $group.maxReplicas) -}}
{{- fail (printf "workerGroups.%s.pdbMinAvailable must be less than maxReplicas, or no node could be drained, got %d" .group (int $group.pdbMinAvailable)) -}}
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
