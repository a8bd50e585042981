"""The teacher on a server with an OpenAI-compatible API.

Servers differ in the probabilities they return: of exactly the labels' tokens (vLLM), of the likeliest
tokens (OpenAI and most others), or none, only answers. Unless ``server.scores`` is set, requests with a
neutral text find out, before the first text; all actors of a run then use the same method.

Shapes in names: N texts of one call, C labels.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import numpy as np

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import ANSWER_LETTERS, TeacherConfig
from llkd_ray.storage.checkpoints import load_tokenizer
from llkd_ray.teacher.base import UNASKED, Allowance, Answers, Meter, TeacherDown, TextFailed, label_batch
from llkd_ray.teacher.openai.client import NoScores, NotServed, Refused, ServerClient
from llkd_ray.teacher.openai.scoring import ByLabelIds, ByTopLogprobs, ByVotes, Chat, Scored, ScoringMethod
from llkd_ray.teacher.prompt import Prompt, build_prompt, label_sequences

logger = logging.getLogger(__name__)
NEUTRAL = "This is an example."
"""The text that the methods are tried with: what a user's text says decides nothing."""
TRIES = 2
"""Replies without probabilities, after which a server is taken to give none by a method."""


class OpenAITeacher:
    """A :class:`~llkd_ray.teacher.base.Teacher` that is a client of a server; belongs to one event loop."""

    def __init__(
        self,
        teacher: TeacherConfig,
        labels: LabelsConfig,
        agree: Callable[[str | None], str | None] = lambda found: found,
    ) -> None:
        """``agree``: given the method that this actor found, or None, returns the one that all actors use."""
        self.teacher = teacher
        self._agree = agree
        self.n_classes = len(labels.names)
        self.client = ServerClient(teacher)
        self.methods, _ = possible_methods(teacher, labels, "teacher")
        self.method: ScoringMethod | None = None
        """None until a first reply has shown that the server supports it."""
        self._deciding = asyncio.Lock()

    async def label(self, ids: Sequence[str], texts: Sequence[str], allowance: Allowance) -> Answers:
        cut: set[int] = set()
        last: list[TextFailed] = []
        left = len(texts)

        async def ask_one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            nonlocal left
            try:
                scored = await self._score(texts[i], meter)
            except TextFailed as failure:
                last[:] = [failure]
                left -= 1
                await self.client.judge(failure, meter, is_last=not left)
                raise
            left -= 1
            if scored.cut:
                cut.add(i)
            return scored.probs_C, scored.off_label

        with self.client.at_work():
            answers = await label_batch(len(texts), self.n_classes, ask_one, allowance, cut=0)
        if last and not self.client.has_answered:
            failed = sum(outcome not in ("", UNASKED) for outcome in answers.outcome_N)
            raise self.client.down(f"all {failed} texts asked first have failed", last[0])
        return replace(answers, usage=replace(answers.usage, cut_texts=len(cut)))

    def close(self) -> None:
        self.client.close()

    async def _score(self, text: str, meter: Meter) -> Scored:
        if self.method is None:
            async with self._deciding:
                if self.method is None:
                    method = await self._find_method(meter)
                    scored = await self._first_score(method, text, meter)
                    self.method = method
                    logger.info("%s: probabilities by %s", self.teacher.model, method.name)
                    return scored
        return await self.method.score(text, partial(self.client.post, meter=meter))

    async def _find_method(self, meter: Meter) -> ScoringMethod:
        """The method that the run's actors have agreed on, or else the first one that the server supports."""
        if len(self.methods) == 1:
            return self.methods[0]
        name = await asyncio.to_thread(self._agree, None)
        if name is None:
            for method in self.methods:
                if method is self.methods[-1] or await self._works(method, meter):
                    break
            name = await asyncio.to_thread(self._agree, method.name)
        for method in self.methods:
            if method.name == name:
                return method
        raise TeacherDown(
            f"teacher.server.scores: the labels so far are by {name!r}, which is not possible with these "
            "settings; set teacher.server as it was"
        )

    async def _works(self, method: ScoringMethod, meter: Meter) -> bool:
        for _ in range(TRIES):
            try:
                await method.score(NEUTRAL, partial(self.client.post, meter=meter, probing=True))
                return True
            except (Refused, NotServed) as error:
                reason: Exception = error
                break
            except NoScores as error:
                reason = error
        logger.info("%s: no probabilities by %s (%s)", self.teacher.model, method.name, reason)
        return False

    async def _first_score(self, method: ScoringMethod, text: str, meter: Meter) -> Scored:
        """Score a text by a method that may be set, or agreed on earlier, and that the server lacks."""
        try:
            return await method.score(text, partial(self.client.post, meter=meter, probing=True))
        except (NoScores, Refused) as error:
            if isinstance(error, Refused) and "logprob" not in str(error):
                raise  # the text may be the cause
            assert self.teacher.server is not None
            raise TeacherDown(
                f"teacher.server.scores {method.name!r}: {self.teacher.server.base_url!r} cannot do it "
                f"({error}); set it to 'auto' for what the server can, or to 'votes'"
            ) from None


def check_server_teacher(
    teacher: TeacherConfig, labels: LabelsConfig, field: str = "teacher"
) -> dict[str, Any]:
    """Find the errors that can be found without a request; returns facts for the manifest.

    Raises :class:`ConfigError`; ``field`` is the location of ``teacher`` in the settings.
    """
    server = teacher.server
    assert server is not None
    try:
        url = httpx.URL(server.base_url)
    except httpx.InvalidURL as error:
        raise ConfigError(
            f"{field}.server.base_url: {server.base_url!r} is no address ({error}); write it like "
            "http://127.0.0.1:8000/v1"
        ) from None
    if url.userinfo or url.query:
        shown = url.copy_with(username=None, password=None, query=None)
        raise ConfigError(
            f"{field}.server.base_url: more than an address goes with {str(shown)!r}, a user, a password or "
            "a query; leave it out, and put the key into the variable that server.api_key_env names"
        )
    methods, prompt = possible_methods(teacher, labels, field)
    return {
        "kind": "openai",
        "model": teacher.model,
        "base_url": server.base_url,
        "scores": methods[0].name if len(methods) == 1 else "auto",
        "prompt_hash": prompt.hash,
    }


def possible_methods(
    teacher: TeacherConfig, labels: LabelsConfig, field: str
) -> tuple[list[ScoringMethod], Prompt]:
    """The methods to try, best first, and the prompt of the best; raises :class:`ConfigError`."""
    server = teacher.server
    assert server is not None
    scores = "votes" if teacher.confidence.method == "votes" else server.scores
    tokenizer = None
    if server.tokenizer is not None:
        tokenizer = load_tokenizer(server.tokenizer, teacher.revision, f"{field}.server.tokenizer")
    methods: list[ScoringMethod] = []
    if scores == "label_ids" and tokenizer is None:
        raise ConfigError(
            f"{field}.server.tokenizer is missing: server.scores 'label_ids' needs the served model's "
            "tokenizer; give a checkpoint folder or a hub name, or set server.scores to 'auto'"
        )
    if tokenizer is not None and scores in ("auto", "label_ids"):
        by_ids = build_prompt(teacher.prompt, labels, tokenizer)
        methods.append(ByLabelIds(teacher, by_ids, label_sequences(by_ids, labels, tokenizer), tokenizer))
        if scores == "label_ids":
            return methods, by_ids
    # Where the tokenizer has no chat template, the server uses its own.
    has_template = tokenizer is not None and getattr(tokenizer, "chat_template", None)
    chat_prompt = build_prompt(teacher.prompt, labels, tokenizer if has_template else None)
    chat = Chat(teacher, chat_prompt, tokenizer, field)
    if scores == "top_logprobs" and not chat.has_letters:
        raise ConfigError(
            f"{field}.server.scores: 'top_logprobs' needs answers of one token each, and {len(labels.names)} "
            f"{teacher.prompt.answer} are not; set {field}.prompt.answer to 'letters' for "
            f"{len(ANSWER_LETTERS)} labels at most, or server.scores to 'label_ids' or 'votes'"
        )
    if scores != "votes" and chat.has_letters:
        methods.append(ByTopLogprobs(chat, server.top_logprobs))
    if scores != "top_logprobs":
        methods.append(ByVotes(chat))
    return methods, methods[0].prompt
