{{/* A Valkey with append-only persistence, one replica: Ray's control store and ours are two of them.
`store` is the section of the values, `at` its path in them, `secret` and `key` name the password's
Secret, if any. At three quarters of the memory limit writes are refused: the rest is for the copy
that rewriting the append-only file makes, and a store that is killed for memory does not start again. */}}
{{- define "mora-serve.valkey" -}}
{{- $image := .root.Values.valkey.image -}}
{{- $limit := .store.resources.limits.memory -}}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ .name }}
  labels:
    {{- include "mora-serve.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  serviceName: {{ .name }}
  replicas: 1
  selector:
    matchLabels:
      {{- include "mora-serve.selectorLabels" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
  template:
    metadata:
      labels:
        {{- include "mora-serve.selectorLabels" .root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
      annotations:
        cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
        karpenter.sh/do-not-disrupt: "true"
    spec:
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: 60
      securityContext: {{- toYaml .root.Values.valkey.podSecurityContext | nindent 8 }}
      {{- include "mora-serve.pullSecrets" .root | nindent 6 }}
      {{- include "mora-serve.scheduling" .store | nindent 6 }}
      containers:
        - name: valkey
          image: {{ printf "%s%s" $image.repository (ternary (printf "@%s" $image.digest) (printf ":%s" $image.tag) (ne $image.digest "")) | quote }}
          imagePullPolicy: {{ $image.pullPolicy }}
          command: [/bin/sh, -ec]
          {{- /* The password goes through a file, so that no process list shows it. */}}
          args:
            - |
              umask 077
              printf '%s\n' 'dir /data' 'save ""' 'appendonly yes' 'appendfsync everysec' \
                'maxmemory-policy noeviction' {{ with $limit }}'maxmemory {{ include "mora-serve.amount" . | float64 | mulf 0.75 | printf "%.0f" }}' {{ end }} \
                {{ if .secret }}"requirepass $VALKEY_PASSWORD"{{ else }}'protected-mode no'{{ end }} \
                > /run/valkey/valkey.conf
              exec valkey-server /run/valkey/valkey.conf
          env:
            {{- if .secret }}
            - name: VALKEY_PASSWORD
              valueFrom: {secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}}
            - {name: REDISCLI_AUTH, value: $(VALKEY_PASSWORD)}
            {{- else }}
            []
            {{- end }}
          ports:
            - {name: valkey, containerPort: 6379}
          startupProbe:
            exec: {command: [/bin/sh, -c, "valkey-cli ping | grep -q PONG"]}
            periodSeconds: 5
            failureThreshold: 120
          readinessProbe:
            exec: {command: [/bin/sh, -c, "valkey-cli ping | grep -q PONG"]}
            periodSeconds: 5
            timeoutSeconds: 5
          livenessProbe:
            tcpSocket: {port: valkey}
            periodSeconds: 10
            failureThreshold: 6
          securityContext: {{- include "mora-serve.containerSecurityContext" .root | nindent 12 }}
          resources: {{- include "mora-serve.checkedResources" (dict "at" (printf "%s.resources" .at) "resources" .store.resources) | nindent 12 }}
          volumeMounts:
            - {name: data, mountPath: /data}
            - {name: run, mountPath: /run/valkey}
      volumes:
        - {name: run, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
  volumeClaimTemplates:
    - metadata:
        name: data
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .store.persistence.storageClass }}
        storageClassName: {{ . | quote }}
        {{- end }}
        resources: {requests: {storage: {{ toJson .store.persistence.size }}}}
{{- end -}}

{{- define "mora-serve.valkeyService" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ .name }}
  labels:
    {{- include "mora-serve.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  clusterIP: None
  selector:
    {{- include "mora-serve.selectorLabels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
  ports:
    - {name: valkey, port: 6379, targetPort: valkey}
{{- end -}}

{{- define "mora-serve.ownGcsStore" -}}
{{- if and .Values.gcsFaultTolerance.enabled (not .Values.gcsFaultTolerance.external.address) }}true{{ end -}}
{{- end -}}
