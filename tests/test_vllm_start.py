"""What a vLLM engine is told, how many processes and threads it gets, and why it did not start."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llkd_ray import vllm_start
from llkd_ray.teacher_config import TeacherConfig
from llkd_ray.vllm_start import CPU_BLOCK_SIZE, engine_arguments, is_one_process, threads_of

pytest.importorskip("vllm")


def make_teacher(**settings_: Any) -> TeacherConfig:
    return TeacherConfig(model="toy-model", **settings_)


@pytest.fixture
def one_node(monkeypatch):
    """A machine of one memory node, on which nobody binds threads."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(vllm_start, "_memory_nodes", lambda: 1)


@pytest.mark.usefixtures("one_node")
class TestProcesses:
    def test_one_on_cpus(self):
        assert is_one_process(make_teacher())
        assert engine_arguments(make_teacher())["distributed_executor_backend"] == "uni"

    @pytest.mark.parametrize("settings_", [{"gpus": 1}, {"tensor_parallel": 2}], ids=["GPU", "parts"])
    def test_vllm_decides_elsewhere(self, settings_):
        assert not is_one_process(make_teacher(**settings_))
        assert threads_of(make_teacher(**settings_)) is None
        assert "distributed_executor_backend" not in engine_arguments(make_teacher(**settings_))

    def test_vllm_decides_where_threads_are_bound(self, monkeypatch):
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
        assert not is_one_process(make_teacher())
        assert threads_of(make_teacher()) is None

    def test_vllm_decides_where_there_are_memory_nodes_to_keep_apart(self, monkeypatch):
        monkeypatch.setattr(vllm_start, "_memory_nodes", lambda: 2)
        assert not is_one_process(make_teacher())


@pytest.mark.usefixtures("one_node")
class TestThreads:
    def test_as_many_as_cpus_are_booked(self):
        assert threads_of(make_teacher(cpus=3)) == 3
        assert threads_of(make_teacher(cpus=2.5)) == 2

    @pytest.mark.parametrize(
        ("allowed", "cores", "threads"), [(8, 4, 3), (8, 8, 7), (2, 16, 1), (1, 1, 1), (4, None, 3)]
    )
    def test_else_all_cores_but_one(self, monkeypatch, allowed, cores, threads):
        monkeypatch.setattr(vllm_start.os, "sched_getaffinity", lambda pid: set(range(allowed)))
        monkeypatch.setattr(vllm_start.psutil, "cpu_count", lambda logical: cores)
        assert threads_of(make_teacher()) == threads

    @pytest.mark.parametrize("before", ["5", None])
    def test_the_engine_finds_them_and_nobody_else(self, monkeypatch, before):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if before:
            monkeypatch.setenv("OMP_NUM_THREADS", before)
        with vllm_start._threads(3):
            assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ.get("OMP_NUM_THREADS") == before
        with vllm_start._threads(None):
            assert os.environ.get("OMP_NUM_THREADS") == before


class TestArguments:
    def test_vllm_knows_them_all(self):
        from vllm.engine.arg_utils import AsyncEngineArgs

        known = {field.name for field in fields(AsyncEngineArgs)}
        for settings_ in ({}, {"gpus": 1, "tensor_parallel": 2, "pipeline_parallel": 2}):
            assert engine_arguments(make_teacher(**settings_)).keys() <= known

    def test_on_cpu(self, monkeypatch):
        monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
        arguments = engine_arguments(make_teacher(max_model_len=512, dtype="float32"))
        assert arguments["block_size"] == CPU_BLOCK_SIZE
        assert arguments["enforce_eager"]
        assert arguments["max_model_len"] == 512
        assert arguments["dtype"] == "float32"
        one = {"distributed_executor_backend": "uni"} if vllm_start._memory_nodes() <= 1 else {}
        assert one.items() <= arguments.items()

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


class TestRootCause:
    def start(self, monkeypatch, folder: Path, said: str, error: Exception) -> RuntimeError:
        """What start_vllm raises where the engine's processes write to stderr and vLLM then raises."""
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        def from_engine_args(arguments, usage_context):
            assert usage_context is UsageContext.LLM_CLASS, "batches of a whole corpus, not of a server"
            os.write(2, said.encode())
            raise error

        monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)
        with pytest.raises(RuntimeError) as caught:
            vllm_start.start_vllm(TeacherConfig(model=str(folder)))
        return caught.value

    def test_the_first_error_that_an_engine_wrote_is_the_reason(self, monkeypatch, tmp_path, capfd):
        monkeypatch.delenv("LLKD_VERBOSE", raising=False)
        said = (
            "(EngineCore pid=7) ERROR 05-05 05:05:05 [core.py:99] Traceback (most recent call last):\n"
            "(EngineCore pid=7) ERROR 05-05 05:05:05 [core.py:99] torch.OutOfMemoryError: no memory is left\n"
            "(EngineCore pid=7) ERROR 05-05 05:05:06 [core.py:99] RuntimeError: the worker failed\n"
        )
        reason = str(
            self.start(monkeypatch, tmp_path, said, RuntimeError("Engine core initialization failed."))
        )
        assert reason == "OutOfMemoryError: no memory is left"
        assert "no memory" not in capfd.readouterr().err, "a traceback of pages is nobody's reading"
        os.write(2, b"and after that stderr is as it was")
        assert "as it was" in capfd.readouterr().err

    def test_an_engine_that_wrote_nothing(self, monkeypatch, tmp_path):
        monkeypatch.delenv("LLKD_VERBOSE", raising=False)
        assert (
            str(self.start(monkeypatch, tmp_path, "", OSError("no such model"))) == "OSError: no such model"
        )

    def test_whoever_wants_to_read_it_may(self, monkeypatch, tmp_path, capfd):
        monkeypatch.setenv("LLKD_VERBOSE", "1")
        reason = str(self.start(monkeypatch, tmp_path, "MemoryError: too small\n", RuntimeError("failed")))
        assert reason == "RuntimeError: failed"
        assert "MemoryError: too small" in capfd.readouterr().err
