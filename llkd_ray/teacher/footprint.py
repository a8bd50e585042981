"""How much a teacher reads for some texts, computed before it starts: prompt tokens and requests.

Shapes in names: N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np

from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.label_trie import LabelTrie
from llkd_ray.teacher.openai.scoring import CHARS_PER_TOKEN, ByLabelIds, ByTopLogprobs, ByVotes, ScoringMethod
from llkd_ray.teacher.openai.teacher import possible_methods
from llkd_ray.teacher.prompt import encode_prompts
from llkd_ray.teacher.vllm.teacher import prepare, room_for_prompt


@dataclass(frozen=True)
class PromptSizes:
    """Prompt sizes of N texts."""

    tokens_N: np.ndarray
    """Of each prompt, as it is sent once."""
    cut_N: np.ndarray
    """bool[N]: whether the text is truncated."""
    requests: RequestCounts
    shared: int
    """Length in tokens of the prefix that all prompts share."""
    counted: bool
    """Counted by the teacher's own tokenizer; otherwise estimated from characters."""
    first: str
    """The first prompt, as the teacher reads it."""
    methods: tuple[str, ...] = ()
    """For a server: the possible scoring methods, the best one first."""


def prompt_sizes(
    teacher: TeacherConfig, labels: LabelsConfig, texts: Sequence[str], field: str
) -> PromptSizes:
    """Sizes for one or more texts of a vllm or openai teacher; raises ConfigError, with ``field``."""
    if teacher.kind == "openai":
        return _of_server(teacher, labels, texts, field)
    tokenizer, prompt, trie = prepare(teacher, labels, field)
    room = room_for_prompt(teacher, trie)
    encoded, cut_N = encode_prompts(prompt, texts, tokenizer, room, teacher.prompt.cut)
    votes = teacher.confidence.method == "votes"
    requests = requests_by_votes(teacher.confidence.samples, trie.depth) if votes else requests_by_trie(trie)
    first = prompt.render(texts[0])
    return PromptSizes(_lengths(encoded), cut_N, requests, _shared(encoded), True, first)


def _of_server(teacher: TeacherConfig, labels: LabelsConfig, texts: Sequence[str], field: str) -> PromptSizes:
    methods, _ = possible_methods(teacher, labels, field)
    requests = reduce(or_, map(_requests, methods))
    names = tuple(method.name for method in methods)
    best = methods[0]
    if isinstance(best, ByLabelIds):
        encoded, cut_N = encode_prompts(best.prompt, texts, best.tokenizer, best.room, teacher.prompt.cut)
        first = best.prompt.render(texts[0])
        return PromptSizes(_lengths(encoded), cut_N, requests, _shared(encoded), True, first, names)
    assert isinstance(best, ByTopLogprobs | ByVotes)
    posts = [best.chat.request(text, 1, 1) for text in texts]
    cut_N = np.array([cut for _, cut in posts], dtype=bool)
    contents = [[one["content"] for one in request["body"]["messages"]] for request, _ in posts]
    counted = best.chat.tokenizer is not None
    tokens_N = np.array(
        [
            request["prompt_tokens"] if counted else round(sum(map(len, content)) / CHARS_PER_TOKEN)
            for (request, _), content in zip(posts, contents, strict=True)
        ]
    )
    return PromptSizes(tokens_N, cut_N, requests, 0, counted, "\n\n".join(contents[0]), names)


def _requests(method: ScoringMethod) -> RequestCounts:
    match method:
        case ByLabelIds():
            return requests_by_trie(method.trie)
        case ByVotes():
            # A server may return one answer per request, regardless of the number requested.
            return requests_by_votes(method.samples, method.chat.answer_tokens, prompts=method.samples)
        case _:
            return RequestCounts(prompts=(1, 1), behind=(0, 0), answers=(1, 1))


def _lengths(encoded: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([len(ids) for ids in encoded])


def _shared(encoded: Sequence[list[int]]) -> int:
    """Number of tokens in the prompts' common prefix; unknown from a single prompt."""
    if len(encoded) < 2:
        return 0
    smallest, largest = min(encoded), max(encoded)  # in the order of lists, so all others are between them
    pairs = zip(smallest, largest, strict=False)
    differs = (place for place, (one, other) in enumerate(pairs) if one != other)
    return next(differs, min(len(smallest), len(largest)))


# --- requests


@dataclass(frozen=True)
class RequestCounts:
    """Requests for one text and tokens in addition to the prompt's own; each as (minimum, maximum)."""

    prompts: tuple[int, int]
    """Number of times that the prompt is sent."""
    behind: tuple[int, int]
    """Tokens of partial answers after the prompt, over all requests."""
    answers: tuple[int, int]
    """Answer tokens, over all requests."""

    def __or__(self, other: RequestCounts) -> RequestCounts:
        """The combined range, where it is unknown which of two methods will be used."""

        def either(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
            return min(a[0], b[0]), max(a[1], b[1])

        return RequestCounts(
            either(self.prompts, other.prompts),
            either(self.behind, other.behind),
            either(self.answers, other.answers),
        )

    @property
    def is_known(self) -> bool:
        return all(least == most for least, most in (self.prompts, self.behind, self.answers))


def requests_by_trie(trie: LabelTrie) -> RequestCounts:
    """Label probabilities by the labels' token sequences: from the first tokens only to every branch."""
    questions = list(trie.questions())
    first, every = questions[0][1], sum(requests for _, requests in questions)
    behind = sum(after * requests for after, requests in questions)
    return RequestCounts((first, every), (0, behind), (first, every))


def requests_by_votes(samples: int, longest_answer: int, prompts: int = 1) -> RequestCounts:
    """Some sampled answers of at most so many tokens; the prompt is sent once, or up to ``prompts`` times."""
    return RequestCounts((1, prompts), (0, 0), (samples, samples * longest_answer))
