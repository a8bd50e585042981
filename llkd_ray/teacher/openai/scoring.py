"""Three methods to get label probabilities from an OpenAI-compatible API; servers support different ones.

Shapes in names: C labels, K tokens that are requested together.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BaseModel, Field

from llkd_ray.config.base import ConfigError
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import TextFailed
from llkd_ray.teacher.label_trie import OVERFULL, LabelTrie
from llkd_ray.teacher.openai.client import BadReply, NoScores, Post, Refused
from llkd_ray.teacher.prompt import Prompt, encode_prompts, match_answer, room_for_text, shorten

CHARS_PER_TOKEN = 4
"""For cutting texts without a tokenizer: typical for English, too many for most other languages."""
TOKENS_PER_MESSAGE = 16
"""Maximum tokens that a chat template adds to a message; the server's count replaces this estimate."""
Logprob = Annotated[float, Field(le=1e-3)]  # also rejects nan
PostOne = Callable[[Post[Any]], Awaitable[Any]]


@dataclass(frozen=True)
class Scored:
    """The teacher's answer to one text."""

    probs_C: np.ndarray
    off_label: float
    cut: bool
    """Whether the text was truncated."""


class ScoringMethod(Protocol):
    """A method to get the labels' probabilities for one text."""

    name: str
    prompt: Prompt

    async def score(self, text: str, post: PostOne) -> Scored:
        """Raises what ``ServerClient.post`` raises."""


# --- by the labels' tokens


class ByLabelIds:
    """The probability of each label's whole token sequence, through vLLM's ``logprob_token_ids``."""

    name = "label_ids"

    def __init__(
        self, teacher: TeacherConfig, prompt: Prompt, sequences: Sequence[tuple[int, ...]], tokenizer: Any
    ) -> None:
        self.teacher, self.prompt, self.tokenizer = teacher, prompt, tokenizer
        self.trie = LabelTrie.of(sequences)
        self.room = teacher.context - self.trie.depth
        room_for_text(prompt, tokenizer, self.room)  # raises ConfigError where there is none

    async def score(self, text: str, post: PostOne) -> Scored:
        [token_ids], [cut] = encode_prompts(
            self.prompt, [text], self.tokenizer, self.room, self.teacher.prompt.cut
        )

        async def next_tokens(after: tuple[int, ...], tokens: tuple[int, ...]) -> list[float]:
            body = {
                "model": self.teacher.model,
                "prompt": [*token_ids, *after],
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": 1,  # vLLM requires it with logprob_token_ids
                "logprob_token_ids": list(tokens),
                "return_tokens_as_token_ids": True,
            }
            read = partial(read_label_ids, tokens)
            probs_K = await post(Post("/completions", body, len(token_ids) + len(after), 1, read))
            return probs_K.tolist()

        try:
            mass = await self.trie.mass(next_tokens, self.teacher.min_branch_prob)
        except ValueError as error:  # replies that are valid individually, but inconsistent
            raise TextFailed("bad_answer", str(error)) from None
        return Scored(mass.probs_C, mass.off_label, bool(cut))


class _CompletionLogprobs(BaseModel):
    top_logprobs: Annotated[list[dict[str, Logprob] | None], Field(min_length=1)] | None = None


class _Completion(BaseModel):
    logprobs: _CompletionLogprobs | None = None


class _Completions(BaseModel):
    choices: list[_Completion] = Field(min_length=1)


def read_label_ids(tokens: Sequence[int], reply: dict[str, Any]) -> np.ndarray:
    """float[K]: the probability of each token, from a reply of the completions endpoint."""
    logprobs = _Completions.model_validate(reply).choices[0].logprobs
    said = logprobs.top_logprobs[0] if logprobs and logprobs.top_logprobs else None
    if said is None:
        raise NoScores("the reply holds no logprobs")
    missing = [token for token in tokens if f"token_id:{token}" not in said]
    if missing:
        raise NoScores(f"logprob_token_ids: {len(missing)} of {len(tokens)} tokens asked for are not there")
    return _no_more_than_one(np.exp([said[f"token_id:{token}"] for token in tokens]))


def _no_more_than_one(probs: np.ndarray) -> np.ndarray:
    if probs.sum() > 1 + OVERFULL:
        raise BadReply(f"probabilities add up to {probs.sum():.3f}")
    return probs


# --- by chat


class Chat:
    """Sends texts to the chat endpoint, cut to fit into ``max_model_len``.

    With a tokenizer, texts are cut by tokens. Without one they are cut by characters, four per token, and
    a request is claimed at one token per byte, the upper bound of any tokenizer; the server's count then
    corrects it.
    """

    def __init__(self, teacher: TeacherConfig, prompt: Prompt, tokenizer: Any | None, field: str) -> None:
        self.teacher, self.prompt = teacher, prompt
        # Slow tokenizers return no character offsets.
        self.tokenizer = tokenizer if getattr(tokenizer, "is_fast", True) else None
        self.answers = tuple(answer.strip() for answer in prompt.answers)
        self.answer_tokens = math.ceil(2 * max(map(len, self.answers)) / 3) + 8
        around = prompt.messages("")
        said = sum(len(self._pieces(message["content"])) for message in around)
        used = said + TOKENS_PER_MESSAGE * len(around) + self.answer_tokens
        self.room = teacher.context - used
        if self.room < 1:
            raise ConfigError(
                f"{field}.max_model_len: {teacher.context} leaves no room for a text, as the prompt "
                f"around it and the answer take about {used} tokens; raise it or use fewer demonstrations"
            )

    @property
    def has_letters(self) -> bool:
        return self.teacher.prompt.answer == "letters" and max(map(len, self.answers)) == 1

    def request(
        self, text: str, answers: int, answer_tokens: int, **body: Any
    ) -> tuple[dict[str, Any], bool]:
        """Arguments of a :class:`Post`, except ``read``, and whether the text is cut."""
        pieces = self._pieces(text)
        cut = len(pieces) > self.room
        if cut:
            text = shorten(text, pieces, self.room, self.teacher.prompt.cut)
        messages = self.prompt.messages(text)
        body |= {"model": self.teacher.model, "messages": messages, "max_tokens": answer_tokens}
        tokens = sum(self._tokens(message["content"]) + TOKENS_PER_MESSAGE for message in messages)
        arguments = {"body": body, "prompt_tokens": tokens, "answer_tokens": answers * answer_tokens}
        return {"path": "/chat/completions", **arguments}, cut

    def _pieces(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each token in the text; estimated without a tokenizer."""
        if self.tokenizer is not None:
            options = {"add_special_tokens": False, "return_offsets_mapping": True}
            return self.tokenizer(text, **options)["offset_mapping"]
        return [(start, start + CHARS_PER_TOKEN) for start in range(0, len(text), CHARS_PER_TOKEN)]

    def _tokens(self, text: str) -> int:
        return len(self._pieces(text)) if self.tokenizer is not None else len(text.encode())


class ByTopLogprobs:
    """Probabilities of the labels' letters that are among the likeliest first tokens."""

    name = "top_logprobs"

    def __init__(self, chat: Chat, top: int) -> None:
        self.chat, self.prompt, self.top = chat, chat.prompt, top

    async def score(self, text: str, post: PostOne) -> Scored:
        options = {"temperature": 0.0, "logprobs": True, "top_logprobs": self.top}
        request, cut = self.chat.request(text, 1, 1, **options)
        probs_C = await post(Post(**request, read=partial(read_top_logprobs, self.chat.answers)))
        return Scored(probs_C, max(0.0, 1.0 - float(probs_C.sum())), cut)


class _TokenLogprob(BaseModel):
    token: str
    logprob: Logprob


class _Position(BaseModel):
    top_logprobs: list[_TokenLogprob] | None = None


class _ChatLogprobs(BaseModel):
    content: Annotated[list[_Position], Field(min_length=1)] | None = None


class _ScoredChoice(BaseModel):
    logprobs: _ChatLogprobs | None = None


class _ScoredChoices(BaseModel):
    choices: list[_ScoredChoice] = Field(min_length=1)


def read_top_logprobs(letters: Sequence[str], reply: dict[str, Any]) -> np.ndarray:
    """float[C]: the probability of each letter among the likeliest tokens, with or without spaces.

    Lower-case letters count where no upper-case one is among the tokens.
    """
    logprobs = _ScoredChoices.model_validate(reply).choices[0].logprobs
    likeliest = logprobs.content[0].top_logprobs if logprobs and logprobs.content else None
    if not likeliest:
        raise NoScores("the reply holds no top_logprobs")
    said = [(one.token.strip(), math.exp(one.logprob)) for one in likeliest]
    if not any(token in letters for token, _ in said):
        said = [(token.upper(), prob) for token, prob in said]
    return _no_more_than_one(
        np.array([math.fsum(prob for token, prob in said if token == letter) for letter in letters])
    )


class ByVotes:
    """Shares of sampled answers."""

    name = "votes"

    def __init__(self, chat: Chat) -> None:
        self.chat, self.prompt = chat, chat.prompt
        self.samples = chat.teacher.confidence.samples
        self.at_once = self.samples
        """Answers that the server returns per request, as far as known."""

    async def score(self, text: str, post: PostOne) -> Scored:
        said: list[str] = []
        cut = False
        at_once = self.at_once
        while len(said) < self.samples:  # every reply holds an answer, so this ends
            n = min(at_once, self.samples - len(said))
            options: dict[str, Any] = {"temperature": self.chat.teacher.confidence.sampling_temperature}
            if n > 1:
                options["n"] = n
            request, cut = self.chat.request(text, n, self.chat.answer_tokens, **options)
            try:
                answers = await post(Post(**request, read=read_answers))
            except Refused:
                if n == 1:
                    raise
                at_once = 1
                continue
            at_once = min(at_once, len(answers)) if len(answers) < n else at_once
            said += answers
        self.at_once = at_once
        matched = [match_answer(answer, self.prompt.answers) for answer in said[: self.samples]]
        votes_C = np.array([matched.count(label) for label in range(len(self.chat.answers))])
        return Scored(votes_C / self.samples, matched.count(-1) / self.samples, cut)


class _Message(BaseModel):
    content: str | None = None


class _SaidChoice(BaseModel):
    message: _Message


class _SaidChoices(BaseModel):
    choices: list[_SaidChoice] = Field(min_length=1)


def read_answers(reply: dict[str, Any]) -> list[str]:
    """The text of each sampled answer."""
    return [choice.message.content or "" for choice in _SaidChoices.model_validate(reply).choices]
