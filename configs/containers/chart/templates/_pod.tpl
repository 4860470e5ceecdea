{{/* What both sides' pods and containers have in common. */}}

{{- define "headwater.labels" -}}
app.kubernetes.io/name: headwater
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .side }}
{{- end }}

{{- define "headwater.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: 90
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  # Always would make private keys readable by the group at each start, and they would be refused.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "headwater.container" -}}
image: "{{ .root.Values.image.repository }}:{{ .root.Values.image.tag }}"
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- if .root.Values.setup }}
command: [sleep, infinity]
{{- end }}
env:
  - {name: HEALTH_PORT, value: {{ .healthPort | quote }}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- if not .root.Values.setup }}
# The health port is on loopback: an exec probe reaches it, a grpc probe would ask the pod's address.
startupProbe:
  exec: {command: &alive [python3, -c, "import os, sys; from common.process.health import is_serving; sys.exit(is_serving(int(os.environ['HEALTH_PORT'])) is None)"]}
  periodSeconds: 10
  timeoutSeconds: 20
  failureThreshold: 30
livenessProbe:
  exec: {command: *alive}
  periodSeconds: 60
  timeoutSeconds: 20
  failureThreshold: 3
readinessProbe:
  exec: {command: [python3, -c, "import os, sys; from common.process.health import is_serving; sys.exit(is_serving(int(os.environ['HEALTH_PORT'])) is not True)"]}
  periodSeconds: 30
  timeoutSeconds: 20
{{- end }}
{{- end }}

{{- define "headwater.claim" -}}
volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: [ReadWriteOnce]
      resources: {requests: {storage: {{ .size }}}}
      {{- with .className }}
      storageClassName: {{ . }}
      {{- end }}
{{- end }}
