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


@pytest.fixture
def one_node(monkeypatch):
    """A machine of one memory node, on which nobody binds threads."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(requests, "_memory_nodes", lambda: 1)


@pytest.mark.usefixtures("one_node")
class TestProcesses:
    def test_one_on_cpus(self):
        assert is_one_process(make_teacher())
        assert engine_arguments(make_teacher())["distributed_executor_backend"] == "uni"

    @pytest.mark.parametrize("settings_", [{"gpus": 1}, {"tensor_parallel": 2}], ids=["GPU", "parts"])
    def test_vllm_decides_elsewhere(self, settings_):
        assert not is_one_process(make_teacher(**settings_))
        assert "distributed_executor_backend" not in engine_arguments(make_teacher(**settings_))

    def test_vllm_decides_where_threads_are_bound(self, monkeypatch):
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
        assert not is_one_process(make_teacher())
        assert "distributed_executor_backend" not in engine_arguments(make_teacher())

    def test_vllm_decides_where_there_are_memory_nodes_to_keep_apart(self, monkeypatch):
        monkeypatch.setattr(requests, "_memory_nodes", lambda: 2)
        assert not is_one_process(make_teacher())


class TestThreads:
    def test_as_many_as_cpus_are_booked(self):
        assert threads_of(make_teacher(cpus=3)) == 3
        assert threads_of(make_teacher(cpus=2.5)) == 2

    @pytest.mark.parametrize(
        ("allowed", "cores", "threads"), [(8, 4, 4), (8, 8, 8), (2, 16, 2), (1, 1, 1), (4, None, 4)]
    )
    def test_else_one_for_each_physical_core(self, monkeypatch, allowed, cores, threads):
        monkeypatch.setattr(requests.os, "sched_getaffinity", lambda pid: set(range(allowed)))
        monkeypatch.setattr(requests.psutil, "cpu_count", lambda logical: cores)
        assert threads_of(make_teacher()) == threads


class TestArguments:
    def test_vllm_knows_them_all(self):
        arg_utils = pytest.importorskip("vllm.engine.arg_utils")
        known = {field.name for field in fields(arg_utils.AsyncEngineArgs)}
        for settings_ in ({}, {"gpus": 1, "tensor_parallel": 2, "pipeline_parallel": 2}):
            assert engine_arguments(make_teacher(**settings_)).keys() <= known

    def test_on_cpu(self):
        arguments = engine_arguments(make_teacher(max_model_len=512, dtype="float32"))
        assert arguments["block_size"] == CPU_BLOCK_SIZE
        assert arguments["enforce_eager"]
        assert arguments["max_model_len"] == 512
        assert arguments["dtype"] == "float32"

    def test_an_engine_in_parts_finds_its_placement_group_through_ray(self):
        assert "distributed_executor_backend" not in engine_arguments(make_teacher(gpus=1))
        parts = engine_arguments(make_teacher(gpus=1, tensor_parallel=4))
        assert parts["distributed_executor_backend"] == "ray"
        assert parts["tensor_parallel_size"] == 4
        assert not parts["enforce_eager"]

    def test_the_user_has_the_last_word(self):
        own = {"block_size": 16, "enforce_eager": False, "max_num_seqs": 8}
        arguments = engine_arguments(make_teacher(engine=own))
        assert {name: arguments[name] for name in own} == own
