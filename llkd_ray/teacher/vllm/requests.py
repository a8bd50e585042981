"""What an engine is asked and what it replies, in our words and in vLLM's, and its start-up settings.

vLLM's own take seconds to import and long to send; whoever asks an engine in another process needs neither.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from llkd_ray.config.teacher import TeacherConfig


@dataclass(frozen=True)
class NextToken:
    """How probable is each of these tokens as the next one, among all of the vocabulary?"""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """Some answers, drawn at random."""

    number: int
    longest: int
    """Tokens of an answer, at most."""
    temperature: float


EngineRequest = NextToken | Samples


@dataclass(frozen=True)
class EngineResponse:
    """What came of one request."""

    cached_tokens: int
    """Tokens of the prompt that the prefix cache knew."""
    probs: tuple[float, ...] = ()
    """Of a :class:`NextToken`'s tokens."""
    answers: tuple[str, ...] = ()
    """Of :class:`Samples`."""
    answer_tokens: int = 0
    """Of all answers together."""


class EngineLost(Exception):
    """The engine died, hung or failed with the request; it may be the text's doing, or not."""


class EngineDied(EngineLost):
    """It has not only lost the request, it is no more."""

    def __init__(self) -> None:
        super().__init__("engine_died")


class RunningEngine(Protocol):
    """An engine that has started. Belongs to the event loop that first asks it."""

    async def generate(self, token_ids: Sequence[int], request: EngineRequest) -> EngineResponse:
        """Raises :class:`EngineLost`, and ``TextFailed`` where it refuses the request.

        Whoever stops waiting takes the request out of the engine.
        """

    def shutdown(self) -> None:
        """Put it away, whatever it does; requests under way are lost."""


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it does not take."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError, ValueError


def engine_prompt(token_ids: Sequence[int]) -> Any:
    """A prompt that is "rendered" already: AsyncLLM would take each plain one through a thread of its own."""
    from vllm.inputs.engine import tokens_input

    return tokens_input(list(token_ids))


@cache
def sampling_params(request: EngineRequest) -> Any:
    """vLLM's sampling parameters. Kept, because making them was a fifth of what a request cost."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if isinstance(request, NextToken):
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=list(request.tokens),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    return SamplingParams(
        n=request.number,
        max_tokens=request.longest,
        temperature=request.temperature,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def response_from(request: EngineRequest, output: Any) -> EngineResponse:
    """What a finished RequestOutput says."""
    cached = output.num_cached_tokens or 0
    if isinstance(request, NextToken):
        logprobs = output.outputs[0].logprobs[0]
        return EngineResponse(
            cached, probs=tuple(float(np.exp(logprobs[token].logprob)) for token in request.tokens)
        )
    return EngineResponse(
        cached,
        answers=tuple(one.text for one in output.outputs),
        answer_tokens=sum(len(one.token_ids) for one in output.outputs),
    )


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
