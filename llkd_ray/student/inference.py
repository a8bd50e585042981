"""What the student says of texts: batches by length, probabilities, whole checkpoints."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import StudentConfig
from llkd_ray.metrics.calibration import at_temperature
from llkd_ray.storage.checkpoints import Checkpoint, _unloadable, load_tokenizer, local_copy
from llkd_ray.student.model import Inputs, Student, Tokens, as_student, lengths

CHUNK = 2048
"""Texts tokenized and sorted by length at a time, while those before them are scored."""
AHEAD = 64
"""Batches made ready before they are asked for."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}


def load(checkpoint: Checkpoint, dtype: str, device: torch.device) -> Student:
    """The classifier on its device; ``dtype`` is as in ``student.precision``.

    Raises :class:`ConfigError` where weights are missing: transformers would make them up.
    """
    from transformers import AutoModelForSequenceClassification

    with local_copy(checkpoint.source) as folder:
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, revision=checkpoint.revision or "main", dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(_unloadable(checkpoint.source, error)) from None
        tokenizer = load_tokenizer(folder, checkpoint.revision, "MODEL")
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"MODEL: {checkpoint.source!r} lacks the weights {', '.join(missing[:3])}: give a checkpoint "
            "that was trained as a classifier"
        )
    return as_student(model, tokenizer, dtype, device)


def score(
    student: Student,
    texts: Sequence[str],
    max_tokens: int,
    batch_tokens: int | None,
    temperature: float | None = None,
) -> np.ndarray:
    """float32[N, C]: probabilities in the order of the texts; batches are of like length, by tokens.

    At a ``temperature`` they are other probabilities of the same labels.
    """
    budget = batch_tokens or BATCH_TOKENS[student.device.type]
    batches = made_ahead(scoring_batches(student, texts, max_tokens, 1, budget, CHUNK), AHEAD)
    p_NC = probabilities(student, len(texts), batches)
    if temperature is not None and np.isfinite(p_NC).all():
        p_NC = at_temperature(p_NC, temperature)
    return p_NC.astype(np.float32)


GPU_CHUNK = 2048
"""Texts that are tokenized at a time for a GPU, which scores those before them meanwhile."""
GPU_AHEAD = 64
"""Batches made ready for a GPU before they are asked for: two chunks' at 64 texts each."""
T = TypeVar("T")


def by_length(tokens_N: Sequence[Tokens], size: int, budget: int | None = None) -> Iterator[np.ndarray]:
    """int64[B]: places of texts of like length, so that little is padding; the longest first: fail early.

    ``size`` texts at a time, or as many more as have ``budget`` tokens together, padding and all.
    """
    length_N = lengths(tokens_N)
    order = np.argsort(length_N, kind="stable")[::-1]
    start = 0
    while start < order.size:
        longest = max(1, int(length_N[order[start]]))
        end = start + max(size, (budget or 0) // longest)
        yield order[start:end]
        start = end


def predict(student: Student, texts: Sequence[str], config: StudentConfig) -> np.ndarray:
    """float64[N, C]: the student's probabilities, in the order of the texts.

    A GPU takes more than ``score_batch_size`` texts where they are short: as many as have the tokens of
    that many texts of ``max_tokens``.
    """
    # The wrapped module: DDP's forward would wait for the other ranks.
    alone = Student(student.module, student.tokenizer, student.device, student.autocast)
    size = config.score_batch_size
    if student.device.type == "cuda":
        budget = size * config.max_tokens
        batches = scoring_batches(alone, texts, config.max_tokens, size, budget, GPU_CHUNK)
        return probabilities(alone, len(texts), made_ahead(batches, GPU_AHEAD))
    return probabilities(
        alone, len(texts), scoring_batches(alone, texts, config.max_tokens, size, None, len(texts))
    )


def probabilities(student: Student, n: int, batches: Iterable[tuple[np.ndarray, Inputs]]) -> np.ndarray:
    """float64[N, C]: of ``n`` texts that come in batches, each with the texts' places."""
    student.model.eval()
    p_NC = np.empty((n, student.module.config.num_labels))
    indices, answers = [], []
    with torch.inference_mode():
        for index_B, inputs in batches:
            indices.append(index_B)
            answers.append(torch.softmax(student.forward(inputs).double(), dim=1))
        if answers:  # taken from the device in one piece, as each would wait for what goes before
            p_NC[np.concatenate(indices)] = torch.cat(answers).cpu().numpy()
    return p_NC


def scoring_batches(
    student: Student, texts: Sequence[str], max_tokens: int, size: int, budget: int | None, chunk: int
) -> Iterator[tuple[np.ndarray, Inputs]]:
    """Places of texts of like length and what the model reads of them; ``chunk`` texts are sorted at a time.

    ``size`` and ``budget`` are those of :func:`by_length`.
    """
    for start in range(0, len(texts), max(1, chunk)):
        tokens_N = student.encode(texts[start : start + chunk], max_tokens)
        for index_B in by_length(tokens_N, size, budget):
            yield start + index_B, student.pad([tokens_N[i] for i in index_B])


def made_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The items, ``count`` of them made in a thread before they are asked for."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item
