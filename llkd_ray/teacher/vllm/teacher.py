"""The teacher on a local vLLM engine: label probabilities from its next-token distribution, or votes.

Shapes in names: C labels, K sampled answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.storage.checkpoints import load_tokenizer, refuse_pickles
from llkd_ray.teacher.base import Allowance, Answers, Meter, TextFailed, label_batch
from llkd_ray.teacher.label_trie import LabelTrie
from llkd_ray.teacher.prompt import (
    Prompt,
    build_prompt,
    encode_prompts,
    label_sequences,
    match_answer,
    room_for_text,
)
from llkd_ray.teacher.vllm.backends import EngineStarter
from llkd_ray.teacher.vllm.engine import Engine
from llkd_ray.teacher.vllm.requests import NextToken, Samples


class VllmTeacher:
    """A :class:`~llkd_ray.teacher.base.Teacher` whose engine is managed by this process."""

    def __init__(
        self,
        teacher: TeacherConfig,
        labels: LabelsConfig,
        on_start: Callable[[float], None],
        prestart: bool = False,
    ) -> None:
        """``prestart``: it will be used soon, so start the preparations that can run in advance."""
        self.teacher = teacher
        self._start = EngineStarter(teacher)
        if prestart:
            self._start.prestart()
        self.tokenizer, self.prompt, self.trie = prepare(teacher, labels, "teacher")
        self.engine = Engine(teacher, on_start, self._start)

    async def label(self, ids: Sequence[str], texts: Sequence[str], allowance: Allowance) -> Answers:
        encoded, cut_N = await asyncio.to_thread(
            encode_prompts,
            self.prompt,
            texts,
            self.tokenizer,
            room_for_prompt(self.teacher, self.trie),
            self.teacher.prompt.cut,
        )
        votes = self.teacher.confidence.method == "votes"
        how = self._by_votes if votes else self._by_probabilities

        def one(i: int, meter: Meter) -> Any:
            return self.engine.with_retries(partial(how, encoded[i], meter))

        return await label_batch(len(texts), self.trie.n_labels, one, allowance, int(cut_N.sum()))

    def close(self) -> None:
        self.engine.close()
        self._start.close()

    async def _by_probabilities(self, token_ids: list[int], meter: Meter) -> tuple[np.ndarray, float]:
        """float[C] and the off-label mass, from the distribution over the whole vocabulary."""

        async def next_tokens(after: tuple[int, ...], tokens: tuple[int, ...]) -> list[float]:
            await meter.request(len(token_ids) + len(after), 1)
            response = await self.engine.generate([*token_ids, *after], NextToken(tokens))
            meter.correct(cached_tokens=response.cached_tokens)
            return list(response.probs)

        try:
            mass = await self.trie.mass(next_tokens, self.teacher.min_branch_prob)
        except ValueError as error:  # not a number, or not a distribution
            raise TextFailed("bad_answer", str(error)) from None
        return mass.probs_C, mass.off_label

    async def _by_votes(self, token_ids: list[int], meter: Meter) -> tuple[np.ndarray, float]:
        """float[C]: the share of K sampled answers for each label, and the share without a label."""
        confidence, longest = self.teacher.confidence, self.trie.depth
        samples = Samples(confidence.samples, longest, confidence.sampling_temperature)
        await meter.request(len(token_ids), samples.number * longest)
        response = await self.engine.generate(token_ids, samples)
        meter.correct(
            cached_tokens=response.cached_tokens,
            answer_tokens=response.answer_tokens - samples.number * longest,
        )
        matched_K = np.array([match_answer(answer, self.prompt.answers) for answer in response.answers])
        votes_C = np.bincount(matched_K[matched_K >= 0], minlength=self.trie.n_labels)
        return votes_C / samples.number, float(np.mean(matched_K < 0))


def prepare(teacher: TeacherConfig, labels: LabelsConfig, field: str) -> tuple[Any, Prompt, LabelTrie]:
    """Tokenizer, prompt and the labels' tokens; raises ConfigError, with ``field``, for invalid settings."""
    assert teacher.model is not None
    tokenizer = load_tokenizer(teacher.model, teacher.revision, f"{field}.model")
    prompt = build_prompt(teacher.prompt, labels, tokenizer)
    return tokenizer, prompt, LabelTrie.of(label_sequences(prompt, labels, tokenizer))


def check_vllm_teacher(teacher: TeacherConfig, labels: LabelsConfig, field: str) -> dict[str, Any]:
    """Find the errors that can be found without an engine; returns facts for the manifest."""
    assert teacher.model is not None
    refuse_pickles(f"{field}.model", teacher.model, teacher.model, teacher.revision, "ForCausalLM")
    tokenizer, prompt, trie = prepare(teacher, labels, field)
    room_for_text(prompt, tokenizer, room_for_prompt(teacher, trie))
    return {
        "kind": "vllm",
        "model": teacher.model,
        "revision": teacher.revision,
        "prompt_hash": prompt.hash,
    }


def room_for_prompt(teacher: TeacherConfig, trie: LabelTrie) -> int:
    """Maximum tokens of a prompt, so that the longest answer still fits after it."""
    return teacher.context - trie.depth
