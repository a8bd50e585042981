"""What a vLLM engine is told, and how many processes and threads it gets."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.vllm import requests
from llkd_ray.teacher.vllm.requests import CPU_BLOCK_SIZE, engine_arguments, is_one_process, threads_of


def make_teacher(**settings_: Any) -> TeacherConfig:
    return TeacherConfig(model="toy-model", **settings_)


@pytest.mark.parametrize(
    ("settings_", "nodes", "bound", "backend"),
    [
        ({}, 1, "", "uni"),
        # vLLM decides where threads are bound, or where there are memory nodes to keep apart.
        ({}, 1, "0-3", None),
        ({}, 2, "", None),
        ({"tensor_parallel": 2}, 1, "", None),
        ({"gpus": 1}, 1, "", None),
        # Parts on GPUs find the actor's placement group through Ray.
        ({"gpus": 1, "tensor_parallel": 4}, 1, "", "ray"),
    ],
)
def test_one_process_on_cpus(monkeypatch, settings_, nodes, bound, backend):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bound)
    monkeypatch.setattr(requests, "_memory_nodes", lambda: nodes)
    teacher = make_teacher(**settings_)
    assert is_one_process(teacher) == (backend == "uni")
    arguments = engine_arguments(teacher)
    assert arguments.get("distributed_executor_backend") == backend
    assert arguments["tensor_parallel_size"] == settings_.get("tensor_parallel", 1)


@pytest.mark.parametrize(
    ("cpus", "allowed", "cores", "threads"),
    [(3, 8, 8, 3), (2.5, 8, 8, 2), (0.5, 8, 4, 4), (0.5, 8, 8, 8), (0.5, 2, 16, 2), (0.5, 4, None, 4)],
)
def test_as_many_threads_as_cpus_are_booked_or_one_for_each_core(monkeypatch, cpus, allowed, cores, threads):
    monkeypatch.setattr(requests.os, "sched_getaffinity", lambda pid: set(range(allowed)))
    monkeypatch.setattr(requests.psutil, "cpu_count", lambda logical: cores)
    assert threads_of(make_teacher(cpus=cpus)) == threads


def test_vllm_knows_all_arguments():
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    known = {field.name for field in fields(arg_utils.AsyncEngineArgs)}
    for settings_ in ({}, {"gpus": 1, "tensor_parallel": 2, "pipeline_parallel": 2}):
        assert engine_arguments(make_teacher(**settings_)).keys() <= known


def test_arguments_on_cpu_and_the_user_has_the_last_word():
    teacher = make_teacher(max_model_len=512, dtype="float32")
    assert engine_arguments(teacher)["load_format"] == "safetensors"
    assert engine_arguments(teacher)["trust_remote_code"] is False
    expected = {"block_size": CPU_BLOCK_SIZE, "enforce_eager": True, "max_model_len": 512, "dtype": "float32"}
    assert engine_arguments(teacher).items() >= expected.items()
    assert not engine_arguments(make_teacher(gpus=1))["enforce_eager"]
    own = {"block_size": 16, "enforce_eager": False, "max_num_seqs": 8}
    assert engine_arguments(make_teacher(engine=own)).items() >= own.items()
