"""Requests and replies in vLLM's words. Imports vLLM, in the functions that need it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from llkd_ray.engine_requests import NextToken, Reply, Wish


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it does not take."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError, ValueError


def prompt_of(token_ids: Sequence[int]) -> Any:
    """A prompt that is "rendered" already: AsyncLLM would take each plain one through a thread of its own."""
    from vllm.inputs.engine import tokens_input

    return tokens_input(list(token_ids))


@cache
def sampling_of(wish: Wish) -> Any:
    """vLLM's sampling parameters. Kept, because making them was a fifth of what a request cost."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if isinstance(wish, NextToken):
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=list(wish.tokens),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    return SamplingParams(
        n=wish.number,
        max_tokens=wish.longest,
        temperature=wish.temperature,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def reply_of(wish: Wish, output: Any) -> Reply:
    """What a finished RequestOutput says."""
    cached = output.num_cached_tokens or 0
    if isinstance(wish, NextToken):
        logprobs = output.outputs[0].logprobs[0]
        return Reply(cached, probs=tuple(float(np.exp(logprobs[token].logprob)) for token in wish.tokens))
    return Reply(
        cached,
        answers=tuple(one.text for one in output.outputs),
        answer_tokens=sum(len(one.token_ids) for one in output.outputs),
    )
