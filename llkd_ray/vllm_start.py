"""How a vLLM engine is started: what it is told, in how many processes, and why it did not start."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

from llkd_ray.teacher_config import TeacherConfig

CPU_BLOCK_SIZE = 32
"""Tokens of a block of the prefix cache on CPU, where vLLM takes 128 by default. Only whole blocks are found
again, so a small one saves most of what the requests for names of several tokens have in common."""


def start_vllm(teacher: TeacherConfig) -> Any:
    """vLLM's asynchronous engine, started. Raises RuntimeError with the root cause where it does not."""
    # Read by vLLM when it is imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if is_one_process(teacher):
        # Without this, "uni" is "mp" on CPUs. The engine is a process of its own all the same.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    elif not teacher.gpus and teacher.parts > 1:
        # By default vLLM gives each part a memory node of its own and refuses where there is but one.
        cores = np.array_split(sorted(os.sched_getaffinity(0)), teacher.parts)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, own)) for own in cores))
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    with _listening() as log, _threads(threads_of(teacher)):
        try:
            # By default it would take batches as small as a server's that answers at once.
            return AsyncLLM.from_engine_args(
                AsyncEngineArgs(**engine_arguments(teacher)), usage_context=UsageContext.LLM_CLASS
            )
        except Exception as error:
            raise RuntimeError(_root_cause(log) or f"{type(error).__name__}: {error}") from error


def is_one_process(teacher: TeacherConfig) -> bool:
    """Whether an engine on CPUs computes in the process that schedules, as vLLM has it on GPUs.

    On CPUs it takes two by default, so that it can bind threads to cores: the second takes seconds more to
    start, and the first spins while it waits, which costs a core. That pays where there are memory nodes to
    keep apart, and it is left alone where somebody binds threads by vLLM's own variable.
    """
    is_bound = bool(os.environ.get("VLLM_CPU_OMP_THREADS_BIND"))
    return not teacher.gpus and teacher.parts == 1 and not is_bound and _memory_nodes() <= 1


def threads_of(teacher: TeacherConfig) -> int | None:
    """Threads that an engine of one process on CPUs computes with; None where that is vLLM's to say.

    As many as the CPUs that are booked for it; where less than one is, all physical cores but the one that
    the actor and Ray want.
    """
    if not is_one_process(teacher):
        return None
    if teacher.cpus >= 1:
        return int(teacher.cpus)
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed) - 1)


def _memory_nodes() -> int:
    """Memory nodes (NUMA) of this machine; 0 where it does not tell."""
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """What processes that are started meanwhile find in OMP_NUM_THREADS, where Ray has put its own."""
    before = os.environ.get("OMP_NUM_THREADS")
    if number is not None:
        os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        if number is not None:
            os.environ.pop("OMP_NUM_THREADS")
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before


def engine_arguments(teacher: TeacherConfig) -> dict[str, Any]:
    """What vLLM is told; ``teacher.engine`` has the last word."""
    on_cpu = teacher.gpus == 0
    arguments: dict[str, Any] = {
        "model": teacher.model,
        "revision": teacher.revision,
        "tokenizer_revision": teacher.revision,
        "dtype": teacher.dtype,
        "quantization": teacher.quantization,
        "max_model_len": teacher.max_model_len,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "enforce_eager": on_cpu,
        "tensor_parallel_size": teacher.tensor_parallel,
        "pipeline_parallel_size": teacher.pipeline_parallel,
    }
    if on_cpu:
        arguments |= {
            "block_size": CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": int(teacher.kv_cache_gib * 2**30),
        }
        if is_one_process(teacher):
            arguments["distributed_executor_backend"] = "uni"
    elif teacher.parts > 1:
        # Its workers find the placement group that the actor is in, on one node or on several.
        arguments["distributed_executor_backend"] = "ray"
    return arguments | teacher.engine


@contextmanager
def _listening() -> Iterator[IO[bytes] | None]:
    """A file that also gets what the engine's processes, which inherit it, write to stderr.

    vLLM tells the root cause of a failed start there and nowhere else. With LLKD_VERBOSE, people read it.
    """
    if os.environ.get("LLKD_VERBOSE"):
        yield None
        return
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)


def _root_cause(log: IO[bytes] | None) -> str:
    """The first error that a log of nested tracebacks ends in, without its time and place; or nothing."""
    if log is None:
        return ""
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").splitlines()
    errors = [found[1] for line in lines if (found := re.search(r"\b(\w*(?:Error|Exception): .+)$", line))]
    if not errors:
        return ""
    quoted = re.search(r"Worker failed with error '(.+)', please check", errors[0])
    return (quoted[1] if quoted else errors[0])[:500]
