"""deploy/rayjob.yaml: a strict schema of our own, Ray's own reading of it, and what they cannot know."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import tomllib
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jsonschema import ValidationError
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

from llkd_ray.cli.train import distill_parser
from llkd_ray.config.loading import load_config
from llkd_ray.config.schema import Config
from llkd_ray.resources import of_a_rank, of_one_part
from llkd_ray.storage.run_dir import join_uri

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "deploy" / "rayjob.yaml").read_text(encoding="utf-8")
RAW: dict[str, Any] = yaml.safe_load(TEXT)
JOB = RAW["spec"]
CLUSTER = JOB["rayClusterSpec"]
HEAD = CLUSTER["headGroupSpec"]
GROUPS: dict[str, dict[str, Any]] = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
PODS = {"submitter": JOB["submitterPodTemplate"], "head": HEAD["template"]} | {
    name: group["template"] for name, group in GROUPS.items()
}
RAY_CONTAINERS = {name: pod["spec"]["containers"][0] for name, pod in PODS.items() if name != "submitter"}
GPU = "nvidia.com/gpu"
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
AGENT_PORT = 52365
"""Where Ray's agent on every node listens (--dashboard-agent-listen-port)."""


# --- the parts of KubeRay's RayJob that the file uses
#
# Our own, since no Python package ships the CRD; compared on 2026-11-26, key by key, with the Go types that
# it is made of (KubeRay's ray-operator/apis/ray/v1, with authOptions.secretName and group resources). Refused
# are unknown keys and wrong types, which a cluster might pass over. The last word has the cluster:
# ``kubectl apply --dry-run=server -f deploy/rayjob.yaml``.


def fields(needed: dict[str, Any], **more: Any) -> dict[str, Any]:
    known = {"properties": needed | more, "required": list(needed)}
    return {"type": "object", "additionalProperties": False} | known


def text(pattern: str = "", **more: Any) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern} | more


def number(least: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "integer", "minimum": least} | more


def several(one: dict[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": one, "minItems": least}


def by_name(one: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": one}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


DNS, PATH = text("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", maxLength=63), text("^/")
QUANTITY = text(r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$")  # always as text: bare numbers are easily misread
PORT, TRUTH = number(1, maximum=65535), {"type": "boolean"}
RESOURCES = fields({"requests": by_name(QUANTITY), "limits": by_name(QUANTITY)})
PROBE = fields(
    {"httpGet": fields({"path": PATH, "port": PORT})},
    initialDelaySeconds=number(),
    periodSeconds=number(1),
    timeoutSeconds=number(1),
    failureThreshold=number(1),
)
CONTAINER = fields(
    {"name": DNS, "image": text(), "resources": RESOURCES},
    ports=several(fields({"name": DNS, "containerPort": PORT})),
    env=several(
        fields(
            {"name": text("^[A-Z][A-Z0-9_]*$")},
            value=text(),
            valueFrom=fields({"secretKeyRef": fields({"name": DNS, "key": text()})}),
        )
    ),
    envFrom=several(fields({"secretRef": fields({"name": DNS}, optional=TRUTH)})),
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    volumeMounts=several(fields({"name": DNS, "mountPath": PATH})),
)
EFFECT = one_of("NoSchedule", "PreferNoSchedule", "NoExecute")
POD_SPEC = fields(
    {"containers": several(CONTAINER, 1)},
    volumes=several(
        fields({"name": DNS, "emptyDir": fields({"sizeLimit": QUANTITY}, medium=one_of("", "Memory"))})
    ),
    nodeSelector=by_name(text()),
    tolerations=several(
        fields({"key": text(), "operator": one_of("Exists", "Equal"), "effect": EFFECT}, value=text())
    ),
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    terminationGracePeriodSeconds=number(),
)
METADATA = fields({}, name=DNS, annotations=by_name(text()), labels=by_name(text()))
POD = fields({"spec": POD_SPEC}, metadata=METADATA)
OF_GROUP = {"resources": by_name(text()), "labels": by_name(text())}
WORKERS = fields(
    {"groupName": DNS, "minReplicas": number(), "maxReplicas": number()}
    | {"rayStartParams": by_name(text()), "template": POD},
    replicas=number(),
    idleTimeoutSeconds=number(),
    **OF_GROUP,
)
AUTOSCALER = fields(
    {"version": one_of("v1", "v2"), "idleTimeoutSeconds": number(), "resources": RESOURCES},
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
)
RAY_CLUSTER = fields(
    {
        "rayVersion": text(),
        "authOptions": fields({"mode": one_of("disabled", "token"), "secretName": DNS}),
        "enableInTreeAutoscaling": TRUTH,
        "autoscalerOptions": AUTOSCALER,
        "headGroupSpec": fields(
            {"rayStartParams": by_name(text()), "template": POD},
            serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
            **OF_GROUP,
        ),
        "workerGroupSpecs": several(WORKERS),
    }
)
RAY_JOB = fields(
    {
        "submissionMode": one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
        "entrypoint": text(),
        "rayClusterSpec": RAY_CLUSTER,
    },
    runtimeEnvYAML=text(),
    backoffLimit=number(),
    activeDeadlineSeconds=number(1),
    shutdownAfterJobFinishes=TRUTH,
    ttlSecondsAfterFinished=number(),
    submitterPodTemplate=POD,
)
MANIFEST = fields(
    {"apiVersion": one_of("ray.io/v1"), "kind": one_of("RayJob"), "metadata": METADATA, "spec": RAY_JOB}
)


def check(manifest: dict[str, Any]) -> None:
    """By the schema, and by what it cannot say; raises jsonschema's ValidationError, or ValueError."""
    jsonschema.validate(manifest, MANIFEST)
    cluster = manifest["spec"]["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    if len({group["groupName"] for group in groups}) < len(groups):
        raise ValueError("two worker groups have one name")
    for group in groups:
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            raise ValueError(f"{group['groupName']}: replicas must lie between minReplicas and maxReplicas")
    templates = [group["template"] for group in (cluster["headGroupSpec"], *groups)]
    for spec in (pod["spec"] for pod in [*templates, manifest["spec"]["submitterPodTemplate"]]):
        mounts = [mount["name"] for one in spec["containers"] for mount in one.get("volumeMounts", [])]
        if missing := set(mounts) - {volume["name"] for volume in spec.get("volumes", [])}:
            raise ValueError(f"{sorted(missing)} is mounted, and no volume of its pod")


def test_our_schema_accepts_it() -> None:
    check(RAW)


def misspelt(manifest: dict[str, Any]) -> None:
    manifest["spec"]["shutdownAfterJobFinished"] = manifest["spec"].pop("shutdownAfterJobFinishes")


def misspelt_in_a_container(manifest: dict[str, Any]) -> None:
    container = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["envform"] = container.pop("envFrom")


def group(manifest: dict[str, Any], number: int) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][number]


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (misspelt, ValidationError),
        (misspelt_in_a_container, ValidationError),
        (lambda one: group(one, 0)["rayStartParams"].update({"num-cpus": 0}), ValidationError),
        (lambda one: group(one, 0).update(minReplicas=5), ValueError),
        (lambda one: group(one, 1).update(groupName="teacher"), ValueError),
        (lambda one: group(one, 2)["template"]["spec"].pop("volumes"), ValueError),
    ],
    ids=["misspelt", "in a container", "number for text", "fewer than the least", "name twice", "no volume"],
)
def test_a_slip_is_caught(break_it: Any, error: type[Exception]) -> None:
    raw = copy.deepcopy(RAW)
    break_it(raw)
    with pytest.raises(error):
        check(raw)


@pytest.mark.skipif("LLKD_RAYJOB_CRD" not in os.environ, reason="LLKD_RAYJOB_CRD names no file with the CRD")
def test_the_cluster_s_own_schema_accepts_it() -> None:
    """For whoever has the CRD: ``kubectl get crd rayjobs.ray.io -o yaml > FILE``."""
    crd = yaml.safe_load(Path(os.environ["LLKD_RAYJOB_CRD"]).read_text(encoding="utf-8"))
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    jsonschema.validate(RAW, closed(schema))


def closed(schema: Any) -> Any:
    """The schema with unknown keys refused: a cluster drops them, or warns."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        inner.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    return inner


# --- what the file says


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """What Ray's autoscaler makes of the file, checked by Ray's own schema on the way."""
    resource = {"metadata": {"name": "llkd-ray", "namespace": "default"}, "spec": copy.deepcopy(CLUSTER)}
    return _derive_autoscaling_config_from_ray_cr(resource)


def entrypoint() -> tuple[str, list[str]]:
    """The folder and the name of the run as a URI, and what begins it for jobs/distill.py."""
    shell, script, folder, name, *rest = JOB["entrypoint"].split()
    assert (shell, script) == ("sh", "/opt/llkd-ray/deploy/resume_or_start.sh")
    assert (ROOT / "deploy/resume_or_start.sh").exists()
    return join_uri(folder, name), [*rest, "--set", f"run.dir={folder}", "--set", f"run.name={name}"]


@pytest.fixture(scope="module")
def config() -> Config:
    options = distill_parser().parse_args(entrypoint()[1])
    return load_config(ROOT / options.config, options.set)


def test_autoscaler_reads_what_the_pods_have(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    for name, group in GROUPS.items():
        limits = RAY_CONTAINERS[name]["resources"]["limits"]
        assert types[name]["resources"]["CPU"] == int(limits["cpu"])
        assert types[name]["resources"].get("GPU", 0) == int(limits.get(GPU, "0"))
        assert (types[name]["min_workers"], types[name]["max_workers"]) == (0, group["maxReplicas"])


def test_entrypoint_is_one_that_the_program_takes_and_needs_no_quotes(config: Config) -> None:
    run, _ = entrypoint()
    assert config.run.name is not None
    assert join_uri(config.run.dir, config.run.name) == run
    assert run.startswith("s3://")
    # It goes through two shells, of the submitter and of the job.
    words = JOB["entrypoint"]
    assert shlex.split(words) == words.split()
    said = subprocess.run(["sh", "-c", f"echo {words}"], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == words


@pytest.mark.parametrize(
    ("statuses", "begun", "status"),
    [("0", False, 0), ("2 0", True, 0), ("3", False, 3), ("1", False, 1), ("2 2", True, 2)],
    ids=["resumed", "begun", "teacher is down", "broken", "cannot be resumed"],
)
def test_run_is_resumed_or_else_begun(tmp_path: Path, statuses: str, begun: bool, status: int) -> None:
    """The script for real, with a ``python`` that notes what it is asked to do."""
    (tmp_path / "statuses").write_text(statuses.replace(" ", "\n") + "\n", encoding="utf-8")
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/bin/sh
echo "$PWD: $*" >> {tmp_path}/calls
read -r status < {tmp_path}/statuses
sed -i 1d {tmp_path}/statuses
exit "$status"
""",
        encoding="utf-8",
    )
    fake.chmod(0o755)
    words = ["s3://bucket/runs", "one", "configs/c.yaml", "--set", "teacher.actors=[1,4]"]
    done = subprocess.run(
        ["sh", str(ROOT / "deploy/resume_or_start.sh"), *words],
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        cwd=tmp_path,
    )
    expected = [f"{ROOT}: jobs/distill.py --resume s3://bucket/runs/one"]
    if begun:
        expected.append(
            f"{ROOT}: jobs/distill.py configs/c.yaml --set teacher.actors=[1,4] "
            "--set run.dir=s3://bucket/runs --set run.name=one"
        )
    assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines() == expected
    assert done.returncode == status


def test_autoscaler_starts_groups_as_large_as_what_the_config_asks_for(
    config: Config, cluster: dict[str, Any]
) -> None:
    assert GROUPS["teacher"]["maxReplicas"] == config.teacher.max_actors
    assert GROUPS["student"]["maxReplicas"] == config.student.max_workers
    score = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))

    def started(demand: list[dict[str, float]]) -> dict[str, int]:
        types, most = cluster["available_node_types"], cluster["max_workers"]
        nodes, left = get_nodes_for(types, {"headgroup": 1}, "headgroup", most, demand, score)
        assert left == []
        return dict(nodes)

    assert started([of_one_part(config.teacher)] * 4) == {"teacher": 4}
    assert started([of_a_rank(config.student)] * 2) == {"student": 2}
    assert started([{"CPU": 1}] * 12) == {"cpu": 2}


def test_a_job_is_of_one_image_and_the_pinned_ray_and_ends_with_its_cluster() -> None:
    environment = yaml.safe_load(JOB["runtimeEnvYAML"])
    assert set(environment) == {"env_vars"}
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    assert environment["env_vars"]["LLKD_AUTOSCALING"] == "1"
    assert CLUSTER["rayVersion"] == metadata.version("ray")
    assert len({container["image"] for pod in PODS.values() for container in pod["spec"]["containers"]}) == 1
    assert JOB["backoffLimit"] >= 1, "a lost head is tried again"
    assert JOB["shutdownAfterJobFinishes"]


def test_only_the_teacher_is_on_spot_and_the_head_stays() -> None:
    def on_spot(pod: dict[str, Any]) -> bool:
        spec = pod["spec"]
        chosen = spec.get("nodeSelector", {}).get("node.example.com/lifecycle") == "spot"
        return chosen or any("spot" in toleration["key"] for toleration in spec.get("tolerations", []))

    assert [name for name, pod in PODS.items() if on_spot(pod)] == ["teacher"]
    annotations = HEAD["template"]["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] == 0 for group in GROUPS.values())


def test_requests_are_limits_for_all_that_ray_counts() -> None:
    resources = {name: container["resources"] for name, container in RAY_CONTAINERS.items()}
    assert [name for name, one in resources.items() if one["requests"] != one["limits"]] == []
    with_gpu = {name for name, one in resources.items() if GPU in one["limits"]}
    assert with_gpu == {"teacher", "student"}
    for name in with_gpu:
        assert any(one["key"] == GPU for one in PODS[name]["spec"]["tolerations"])


def test_every_ray_pod_is_looked_after_at_the_right_port() -> None:
    agent = {"path": "/api/local_raylet_healthz", "port": AGENT_PORT}
    gcs = {"path": "/api/gcs_healthz", "port": HEAD_PORTS["dashboard"]}
    for name, container in RAY_CONTAINERS.items():
        lives = container["livenessProbe"]
        assert lives["httpGet"] == agent
        assert container["readinessProbe"]["httpGet"] == (gcs if name == "head" else agent)
        patience_s = lives.get("periodSeconds", 10) * lives.get("failureThreshold", 3)
        assert patience_s >= 60, "a busy node must not be taken for dead"
    assert {one["name"]: one["containerPort"] for one in RAY_CONTAINERS["head"]["ports"]} == HEAD_PORTS
    assert HEAD["rayStartParams"]["dashboard-host"] == "0.0.0.0"  # or kubelet could not ask
    assert HEAD.get("serviceType", "ClusterIP") == "ClusterIP"  # not open to the world


def test_token_and_keys_come_from_secrets_only() -> None:
    auth = CLUSTER["authOptions"]
    assert auth["mode"] == "token"
    used = {auth["secretName"]}
    for container in RAY_CONTAINERS.values():
        own = {one["secretRef"]["name"] for one in container["envFrom"]}
        assert "llkd-ray-s3" in own, "every pod reads the bucket"
        used |= own
    made = set(re.findall(r"kubectl create secret generic (\S+)", TEXT))
    assert used == made, "what the head of the file says is what the pods use"
    containers = [container for pod in PODS.values() for container in pod["spec"]["containers"]]
    variables = [one for container in containers for one in container.get("env", [])]
    secret = re.compile("TOKEN|SECRET|PASSWORD|ACCESS_KEY")
    assert [one["name"] for one in variables if secret.search(one["name"]) and one.get("value")] == []


def test_the_image_has_the_pinned_ray_and_a_python_and_extras_that_the_package_takes() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    steps = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    ray, python = re.fullmatch(r"rayproject/ray:([\d.]+)-py3(\d+)-gpu", steps["FROM"]).groups()
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={ray}" in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"3.{python}" in SpecifierSet(project["requires-python"])
    extras = re.search(r'-c constraints\.txt "\.\[(.*)\]"', steps["RUN"])[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    # Where the job looks for its script.
    assert f"sh {steps['WORKDIR']}/deploy/resume_or_start.sh" in JOB["entrypoint"]
    assert (ROOT / "deploy/resume_or_start.sh").exists()
