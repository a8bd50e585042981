"""The parts of KubeRay's RayJob that deploy/rayjob.yaml uses, as strict models.

Our own, since no Python package ships the CRD; compared on 2026-11-26, key by key, with the Go types that it
is made of (KubeRay's ray-operator/apis/ray/v1, with authOptions.secretName and group resources). They refuse
unknown keys and wrong types, which a cluster might pass over. The last word has the cluster:
``kubectl apply --dry-run=server -f deploy/rayjob.yaml``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

DnsLabel = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$")]
"""A Kubernetes quantity, always as text: bare numbers are easily misread."""
Port = Annotated[int, Field(ge=1, le=65535)]
Text = dict[str, str]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Unknown keys and silent conversions are mistakes."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SecretRef(Strict):
    name: DnsLabel
    optional: bool = False


class EnvFrom(Strict):
    secretRef: SecretRef


class SecretKeyRef(Strict):
    name: DnsLabel
    key: str


class ValueFrom(Strict):
    secretKeyRef: SecretKeyRef


class Env(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")]
    value: str | None = None
    valueFrom: ValueFrom | None = None


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class HttpGet(Strict):
    path: Annotated[str, StringConstraints(pattern="^/")]
    port: Port


class Probe(Strict):
    httpGet: HttpGet
    initialDelaySeconds: Count = 0
    periodSeconds: Annotated[int, Field(ge=1)] = 10
    timeoutSeconds: Annotated[int, Field(ge=1)] = 1
    failureThreshold: Annotated[int, Field(ge=1)] = 3


class ContainerPort(Strict):
    name: DnsLabel
    containerPort: Port


class VolumeMount(Strict):
    name: DnsLabel
    mountPath: Annotated[str, StringConstraints(pattern="^/")]


class Container(Strict):
    name: DnsLabel
    image: str
    resources: Resources
    ports: list[ContainerPort] = []
    env: list[Env] = []
    envFrom: list[EnvFrom] = []
    readinessProbe: Probe | None = None
    livenessProbe: Probe | None = None
    volumeMounts: list[VolumeMount] = []


class EmptyDir(Strict):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity


class Volume(Strict):
    name: DnsLabel
    emptyDir: EmptyDir


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Strict):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    nodeSelector: Text = {}
    tolerations: list[Toleration] = []
    restartPolicy: Literal["Always", "OnFailure", "Never"] = "Always"
    terminationGracePeriodSeconds: Count = 30

    @model_validator(mode="after")
    def _mounts(self) -> PodSpec:
        there = {volume.name for volume in self.volumes}
        for container in self.containers:
            missing = {mount.name for mount in container.volumeMounts} - there
            if missing:
                raise ValueError(f"{container.name} mounts {sorted(missing)}, which is no volume of its pod")
        return self


class Metadata(Strict):
    name: DnsLabel | None = None
    annotations: Text = {}
    labels: Text = {}


class PodTemplate(Strict):
    metadata: Metadata = Metadata()
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: Text
    template: PodTemplate
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    resources: Text = {}
    labels: Text = {}


class WorkerGroup(Strict):
    groupName: DnsLabel
    replicas: Count = 0
    minReplicas: Count
    maxReplicas: Count
    idleTimeoutSeconds: Count | None = None
    rayStartParams: Text
    resources: Text = {}
    labels: Text = {}
    template: PodTemplate

    @model_validator(mode="after")
    def _bounds(self) -> WorkerGroup:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"{self.groupName}: replicas must lie between minReplicas and maxReplicas")
        return self


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: DnsLabel


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Count
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    resources: Resources


class RayCluster(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]

    @model_validator(mode="after")
    def _names(self) -> RayCluster:
        names = [group.groupName for group in self.workerGroupSpecs]
        if len(names) != len(set(names)):
            raise ValueError(f"two worker groups have one name: {names}")
        return self


class RayJobSpec(Strict):
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    entrypoint: str
    runtimeEnvYAML: str = ""
    backoffLimit: Count = 0
    activeDeadlineSeconds: Annotated[int, Field(ge=1)] | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    submitterPodTemplate: PodTemplate | None = None
    rayClusterSpec: RayCluster


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


def read_rayjob(manifest: dict[str, Any]) -> RayJob:
    """The manifest as models; raises pydantic's ValidationError with the place of each mistake."""
    return RayJob.model_validate(manifest)
