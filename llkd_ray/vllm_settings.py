"""What a vLLM engine is told, and how many processes and threads it computes in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil

from llkd_ray.teacher_config import TeacherConfig

CPU_BLOCK_SIZE = 32
"""Tokens of a block of the prefix cache on CPU, where vLLM takes 128 by default. Only whole blocks are found
again, so a small one saves most of what the requests for names of several tokens have in common."""


def is_one_process(teacher: TeacherConfig) -> bool:
    """Whether an engine on CPUs schedules and computes in one process, a child of the actor.

    By default vLLM takes two on CPUs, so that it can bind threads to cores: the second takes seconds more to
    start, and the first spins while it waits, which costs a core. That pays where there are memory nodes to
    keep apart, and it is left alone where somebody binds threads by vLLM's own variable.
    """
    is_bound = bool(os.environ.get("VLLM_CPU_OMP_THREADS_BIND"))
    return not teacher.gpus and teacher.parts == 1 and not is_bound and _memory_nodes() <= 1


def threads_of(teacher: TeacherConfig) -> int:
    """Threads that an engine of one process computes with.

    As many as the CPUs that are booked for it; where less than one is, one for each physical core. They do
    not spin, so a student that wants some of the cores meanwhile gets them.
    """
    if teacher.cpus >= 1:
        return int(teacher.cpus)
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


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


def _memory_nodes() -> int:
    """Memory nodes (NUMA) of this machine; 0 where it does not tell."""
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
