{{- define "rtml.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 32 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough that "-pool-" and a pool's name fit behind it. */}}
{{- define "rtml.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $long := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- default $long .Values.fullnameOverride | trunc 32 | trimSuffix "-" -}}
{{- end -}}

{{/* Of {root, component, pool}: what selects a component's pods; never changes during upgrades. */}}
{{- define "rtml.selector" -}}
app.kubernetes.io/name: {{ include "rtml.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
rtml/pool: {{ . }}
{{- end }}
{{- end -}}

{{/* Of {root, component, pool}. */}}
{{- define "rtml.labels" -}}
{{ include "rtml.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "rtml.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "rtml.serviceAccount" -}}
{{- $made := .Values.serviceAccount.create | ternary (include "rtml.fullname" .) "default" -}}
{{- default $made .Values.serviceAccount.name -}}
{{- end -}}

{{- define "rtml.dispatcher" -}}
tcp://{{ include "rtml.fullname" . }}-dispatcher.{{ .Release.Namespace }}.svc:{{ int64 .Values.dispatcher.port }}
{{- end -}}

{{/* "2Gi" -> 2048 */}}
{{- define "rtml.mebibytes" -}}
{{- $units := dict "Mi" 1 "Gi" 1024 "Ti" 1048576 -}}
{{- mul (regexFind "^[0-9]+" . | int64) (get $units (regexFind "[MGT]i$" .) | int64) -}}
{{- end -}}

{{/* Of {root, defaults, given}: `given` over `defaults`, with its zeros, falses and empty lists, too. JSON. */}}
{{- define "rtml.over" -}}
{{- $result := deepCopy .defaults -}}
{{- range $key, $value := .given -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $result $key)) -}}
{{- $_ := set $result $key (include "rtml.over" (dict "defaults" (get $result $key) "given" $value) | fromJson) -}}
{{- else -}}
{{- $_ := set $result $key $value -}}
{{- end -}}
{{- end -}}
{{- toJson $result -}}
{{- end -}}

{{/* Of {root, component, pool, of}: annotations and labels of a pod. */}}
{{- define "rtml.podMetadata" -}}
{{- $annotations := deepCopy .of.podAnnotations -}}
{{- with .root.Values.keys.data -}}
{{- $_ := set $annotations "checksum/keys" (toJson . | sha256sum) -}}
{{- end -}}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
labels:
  {{- include "rtml.labels" . | nindent 2 }}
  {{- with .of.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Of {root, component, pool, of}: what all pod specs share. Service links are off because those of a Service named
     "rtml" would set RTML_PORT, which is a setting. */}}
{{- define "rtml.podSpec" -}}
serviceAccountName: {{ include "rtml.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .of.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .of.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .of.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $selector := dict "matchLabels" (include "rtml.selector" $ | fromYaml) }}
  - {{- toYaml (merge (deepCopy .) (dict "labelSelector" $selector)) | nindent 4 }}
  {{- end }}
{{- end }}
{{- with .of.initContainers }}
initContainers:
  {{- range . }}
  - {{- toYaml (merge (deepCopy .) (dict "securityContext" $.root.Values.securityContext)) | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Of {root, of}: what all containers share. */}}
{{- define "rtml.container" -}}
image: {{ include "rtml.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- toYaml .root.Values.securityContext | nindent 2 }}
env:
  - name: POD_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  - {name: HOME, value: /tmp}
  - {name: RTML_KEYS, value: /etc/rtml/keys}
  {{- with .of.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .of.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "rtml.volumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: run, mountPath: /run/rtml}
- {name: keys, mountPath: /etc/rtml/keys, readOnly: true}
{{- if .of.sharedMemory }}
- {name: shared-memory, mountPath: /dev/shm}
{{- if ne .root.Values.models.type "none" }}
- {name: models, mountPath: {{ .root.Values.models.mountPath }}, readOnly: {{ .root.Values.models.readOnly }}}
{{- end }}
{{- end }}
{{- with .of.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Of {root, of, files}: each pod sees only the key files that it needs. */}}
{{- define "rtml.volumes" -}}
- {name: tmp, emptyDir: {}}
- {name: run, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
- name: keys
  secret:
    secretName: {{ default (printf "%s-keys" (include "rtml.fullname" .root)) .root.Values.keys.existingSecret }}
    defaultMode: 288 # 0440
    items:
      {{- range .files }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
{{- if .of.sharedMemory }}
- {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ .of.sharedMemory }}}}
{{- include "rtml.modelsVolume" .root }}
{{- end }}
{{- with .of.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "rtml.modelsVolume" -}}
{{- with .Values.models }}
{{- if eq .type "pvc" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "rtml.fullname" $)) .pvc.existingClaim }}
    readOnly: {{ .readOnly }}
{{- else if eq .type "emptyDir" }}
- {name: models, emptyDir: {sizeLimit: {{ .emptyDir.sizeLimit }}}}
{{- else if eq .type "hostPath" }}
- {name: models, hostPath: {path: {{ .hostPath.path }}, type: Directory}}
{{- end }}
{{- end }}
{{- end -}}
