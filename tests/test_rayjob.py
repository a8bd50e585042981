"""deploy/rayjob.yaml: strict models of our own, Ray's own reading of it, and what they cannot know."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay_schema import Container, PodTemplate, RayJob, WorkerGroup, read_rayjob
from pydantic import ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

from llkd_ray.cli import distill_parser
from llkd_ray.config.loading import load_config
from llkd_ray.config.schema import Config
from llkd_ray.resources import of_a_rank, of_one_part
from llkd_ray.storage.run_dir import join_uri

ROOT = Path(__file__).resolve().parent.parent
RAW: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text(encoding="utf-8"))
GPU = "nvidia.com/gpu"
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
AGENT_PORT = 52365
"""Where Ray's agent on every node listens (--dashboard-agent-listen-port)."""


@pytest.fixture
def raw() -> dict[str, Any]:
    return copy.deepcopy(RAW)


@pytest.fixture(scope="module")
def job() -> RayJob:
    return read_rayjob(RAW)


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """What Ray's autoscaler makes of the file, checked by Ray's own schema on the way."""
    spec = copy.deepcopy(RAW["spec"]["rayClusterSpec"])
    resource = {"metadata": {"name": "llkd-ray", "namespace": "default"}, "spec": spec}
    return _derive_autoscaling_config_from_ray_cr(resource)


def groups(job: RayJob) -> dict[str, WorkerGroup]:
    return {group.groupName: group for group in job.spec.rayClusterSpec.workerGroupSpecs}


def pods(job: RayJob) -> Iterator[tuple[str, PodTemplate]]:
    """Every pod template of the file, with a name."""
    assert job.spec.submitterPodTemplate is not None
    yield "submitter", job.spec.submitterPodTemplate
    yield "head", job.spec.rayClusterSpec.headGroupSpec.template
    for name, group in groups(job).items():
        yield name, group.template


def ray_containers(job: RayJob) -> Iterator[tuple[str, Container]]:
    for name, pod in pods(job):
        if name != "submitter":
            yield name, pod.spec.containers[0]


def entrypoint(job: RayJob) -> tuple[str, list[str]]:
    """The folder and the name of the run as a URI, and what begins it for jobs/distill.py."""
    shell, script, folder, name, *rest = job.spec.entrypoint.split()
    assert (shell, script) == ("sh", "/opt/llkd-ray/deploy/resume_or_start.sh")
    assert (ROOT / "deploy/resume_or_start.sh").exists()
    return join_uri(folder, name), [*rest, "--set", f"run.dir={folder}", "--set", f"run.name={name}"]


def config_of(job: RayJob) -> Config:
    options = distill_parser().parse_args(entrypoint(job)[1])
    return load_config(ROOT / options.config, options.set)


def misspelt_key(manifest: dict[str, Any]) -> None:
    manifest["spec"]["shutdownAfterJobFinished"] = manifest["spec"].pop("shutdownAfterJobFinishes")


def misspelt_key_of_a_container(manifest: dict[str, Any]) -> None:
    head = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["envform"] = head.pop("envFrom")


def number_where_text_is_wanted(manifest: dict[str, Any]) -> None:
    manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def fewer_than_the_least(manifest: dict[str, Any]) -> None:
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"] = 5


def one_name_twice(manifest: dict[str, Any]) -> None:
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["groupName"] = "teacher"


def mount_without_volume(manifest: dict[str, Any]) -> None:
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][2]["template"]["spec"]["volumes"] = []


@pytest.mark.parametrize(
    "break_it",
    [
        misspelt_key,
        misspelt_key_of_a_container,
        number_where_text_is_wanted,
        fewer_than_the_least,
        one_name_twice,
        mount_without_volume,
    ],
)
def test_a_slip_is_caught(raw: dict[str, Any], break_it: Any) -> None:
    break_it(raw)
    with pytest.raises(ValidationError):
        read_rayjob(raw)


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


def test_ray_is_the_pinned_one(job: RayJob) -> None:
    assert job.spec.rayClusterSpec.rayVersion == metadata.version("ray")


def test_autoscaler_reads_what_the_pods_have(job: RayJob, cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    for name, group in groups(job).items():
        limits = group.template.spec.containers[0].resources.limits
        assert types[name]["resources"]["CPU"] == int(limits["cpu"])
        assert types[name]["resources"].get("GPU", 0) == int(limits.get(GPU, "0"))
        assert (types[name]["min_workers"], types[name]["max_workers"]) == (0, group.maxReplicas)


def test_entrypoint_is_one_that_the_program_takes(job: RayJob) -> None:
    run, _ = entrypoint(job)
    config = config_of(job)
    assert config.run.name is not None
    assert join_uri(config.run.dir, config.run.name) == run
    assert run.startswith("s3://")


def test_entrypoint_needs_no_quotes(job: RayJob) -> None:
    # It goes through two shells, of the submitter and of the job.
    assert shlex.split(job.spec.entrypoint) == job.spec.entrypoint.split()
    said = subprocess.run(
        ["sh", "-c", f"echo {job.spec.entrypoint}"], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == job.spec.entrypoint


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


def test_groups_are_as_large_as_what_the_config_asks_for(job: RayJob) -> None:
    config, group = config_of(job), groups(job)
    assert group["teacher"].maxReplicas == config.teacher.max_actors
    workers = config.student.workers
    assert group["student"].maxReplicas == (workers if isinstance(workers, int) else workers[1])


def test_autoscaler_starts_the_group_that_is_meant(job: RayJob, cluster: dict[str, Any]) -> None:
    config = config_of(job)
    score = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))

    def started(demand: list[dict[str, float]]) -> dict[str, int]:
        types, most = cluster["available_node_types"], cluster["max_workers"]
        nodes, left = get_nodes_for(types, {"headgroup": 1}, "headgroup", most, demand, score)
        assert left == []
        return dict(nodes)

    assert started([of_one_part(config.teacher)] * 4) == {"teacher": 4}
    assert started([of_a_rank(config.student)] * 2) == {"student": 2}
    assert started([{"CPU": 1}] * 12) == {"cpu": 2}


def test_runtime_environment_is_yaml_with_text_for_values(job: RayJob) -> None:
    environment = yaml.safe_load(job.spec.runtimeEnvYAML)
    assert set(environment) == {"env_vars"}
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    assert environment["env_vars"]["LLKD_AUTOSCALING"] == "1"


def test_only_the_teacher_is_on_spot_and_the_head_stays(job: RayJob) -> None:
    def on_spot(pod: PodTemplate) -> bool:
        chosen = pod.spec.nodeSelector.get("node.example.com/lifecycle") == "spot"
        return chosen or any("spot" in toleration.key for toleration in pod.spec.tolerations)

    assert [name for name, pod in pods(job) if on_spot(pod)] == ["teacher"]
    head = job.spec.rayClusterSpec.headGroupSpec
    assert head.template.metadata.annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert head.rayStartParams["num-cpus"] == "0"
    assert all(group.minReplicas == 0 for group in groups(job).values())


def test_requests_are_limits_for_all_that_ray_counts(job: RayJob) -> None:
    for name, container in ray_containers(job):
        assert container.resources.requests == container.resources.limits, name
    with_gpu = {name for name, container in ray_containers(job) if GPU in container.resources.limits}
    assert with_gpu == {"teacher", "student"}
    for name in with_gpu:
        assert any(one.key == GPU for one in groups(job)[name].template.spec.tolerations)


def test_every_ray_pod_is_looked_after_at_the_right_port(job: RayJob) -> None:
    for name, container in ray_containers(job):
        ready, lives = container.readinessProbe, container.livenessProbe
        assert ready is not None
        assert lives is not None
        assert (lives.httpGet.path, lives.httpGet.port) == ("/api/local_raylet_healthz", AGENT_PORT)
        expected = (
            ("/api/gcs_healthz", HEAD_PORTS["dashboard"])
            if name == "head"
            else (lives.httpGet.path, AGENT_PORT)
        )
        assert (ready.httpGet.path, ready.httpGet.port) == expected
        assert lives.periodSeconds * lives.failureThreshold >= 60, "a busy node must not be taken for dead"
    head = job.spec.rayClusterSpec.headGroupSpec
    assert {port.name: port.containerPort for port in head.template.spec.containers[0].ports} == HEAD_PORTS
    assert head.rayStartParams["dashboard-host"] == "0.0.0.0"  # or kubelet could not ask
    assert head.serviceType == "ClusterIP"  # not open to the world


def test_token_and_keys_come_from_secrets_only(job: RayJob) -> None:
    auth = job.spec.rayClusterSpec.authOptions
    assert auth.mode == "token"
    text = (ROOT / "deploy" / "rayjob.yaml").read_text(encoding="utf-8")
    made = set(re.findall(r"kubectl create secret generic (\S+)", text))
    used = {auth.secretName}
    for _, container in ray_containers(job):
        used |= {one.secretRef.name for one in container.envFrom}
        assert "llkd-ray-s3" in {one.secretRef.name for one in container.envFrom}, (
            "every pod reads the bucket"
        )
    assert used == made, "what the head of the file says is what the pods use"
    for name, pod in pods(job):
        for container in pod.spec.containers:
            for one in container.env:
                secret = re.search("TOKEN|SECRET|PASSWORD|ACCESS_KEY", one.name)
                assert not (secret and one.value), f"{name}: {one.name} stands in the file"


def test_all_pods_run_one_image(job: RayJob) -> None:
    assert len({container.image for _, pod in pods(job) for container in pod.spec.containers}) == 1


def test_a_lost_head_is_tried_again_and_nothing_runs_on(job: RayJob) -> None:
    assert job.spec.backoffLimit >= 1
    assert job.spec.shutdownAfterJobFinishes
