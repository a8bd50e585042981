"""An engine's requests and responses, in our types and vLLM's, and its start-up settings.

vLLM's own types take seconds to import and long to serialize; code that calls an engine in another process
needs neither.
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
    """Requests the probability of each of these tokens as the next one, over the whole vocabulary."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """Requests some randomly sampled answers."""

    number: int
    longest: int
    """Maximum tokens of an answer."""
    temperature: float


EngineRequest = NextToken | Samples


@dataclass(frozen=True)
class EngineResponse:
    """The result of one request."""

    cached_tokens: int
    """Tokens of the prompt that were in the prefix cache."""
    probs: tuple[float, ...] = ()
    """For the tokens of a :class:`NextToken`."""
    answers: tuple[str, ...] = ()
    """For :class:`Samples`."""
    answer_tokens: int = 0
    """Total of all answers."""


class EngineLost(Exception):
    """The engine died, hung or failed during the request; the text may or may not be the cause."""


class EngineDied(EngineLost):
    """The engine has not only lost the request, its process has died."""

    def __init__(self) -> None:
        super().__init__("engine_died")


class RunningEngine(Protocol):
    """An engine that has started. Belongs to the event loop that uses it first."""

    async def generate(self, token_ids: Sequence[int], request: EngineRequest) -> EngineResponse:
        """Raises :class:`EngineLost`, and ``TextFailed`` where it rejects the request.

        Cancelling the call removes the request from the engine.
        """

    def shutdown(self) -> None:
        """Stop it immediately, whatever its state; requests in progress are lost."""


def refusals() -> tuple[type[Exception], ...]:
    """The exceptions that vLLM raises for a request that it rejects."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError, ValueError


def engine_prompt(token_ids: Sequence[int]) -> Any:
    """A prompt marked as rendered: AsyncLLM would pass each plain one through a thread of its own."""
    from vllm.inputs.engine import tokens_input

    return tokens_input(list(token_ids))


@cache
def sampling_params(request: EngineRequest) -> Any:
    """vLLM's sampling parameters. Cached, because creating them was a fifth of a request's cost."""
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
    """The response in a finished RequestOutput."""
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
"""Tokens in a block of the prefix cache on CPU, where vLLM's default is 128. Only whole blocks can be reused,
so small blocks reuse most of the shared prefix of requests for names of several tokens.
"""


def is_one_process(teacher: TeacherConfig) -> bool:
    """Whether an engine on CPUs schedules and computes in one process, a child of the actor.

    By default vLLM uses two on CPUs, so that it can bind threads to cores: the second takes seconds more to
    start, and the first spins while it waits, which occupies a core. That pays off where there are several
    NUMA nodes, and the default is kept where the user binds threads through vLLM's own variable.
    """
    is_bound = bool(os.environ.get("VLLM_CPU_OMP_THREADS_BIND"))
    return not teacher.n_gpus and teacher.parts == 1 and not is_bound and _memory_nodes() <= 1


def threads_of(teacher: TeacherConfig) -> int:
    """Compute threads of an engine in one process.

    As many as the CPUs reserved for it; with less than one CPU, one for each physical core. They do not spin,
    so the student can use idle cores.
    """
    if teacher.cpus >= 1:
        return int(teacher.cpus)
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def engine_arguments(teacher: TeacherConfig) -> dict[str, Any]:
    """Arguments for vLLM; ``teacher.engine`` overrides them."""
    on_cpu = not teacher.n_gpus
    arguments: dict[str, Any] = {
        "model": teacher.model,
        "revision": teacher.revision,
        "tokenizer_revision": teacher.revision,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "dtype": teacher.dtype,
        "quantization": teacher.quantization,
        "max_model_len": teacher.context,
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
        # Its workers use the placement group of the actor, on one node or on several.
        arguments["distributed_executor_backend"] = "ray"
    return arguments | teacher.engine


def _memory_nodes() -> int:
    """NUMA nodes of this machine; 0 where unknown."""
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
