"""The student's class probabilities for texts, during training and from a checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import StudentConfig
from llkd_ray.storage.checkpoints import Checkpoint, _unloadable, load_tokenizer, local_copy
from llkd_ray.student.model import Inputs, Student, Tokens, as_student, lengths, load_classifier

CHUNK = 2048
"""Texts tokenized and sorted by length at a time, while the previous ones are scored."""
AHEAD = 64
"""Batches prepared before the model needs them."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
T = TypeVar("T")


def load(checkpoint: Checkpoint, dtype: str, device: torch.device) -> Student:
    """The classifier on its device; ``dtype`` is as in ``student.precision``.

    Raises :class:`ConfigError` where weights are missing: transformers would initialise them at random.
    """
    with local_copy(checkpoint.source) as folder:
        try:
            model, info = load_classifier(
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
    student: Student, texts: Sequence[str], max_tokens: int, batch_tokens: int | None = None
) -> np.ndarray:
    """float32[N, C]: a checkpoint's probabilities, in the order of the texts.

    A batch has at most ``batch_tokens`` tokens, padding included; default: ``BATCH_TOKENS`` of the device.
    Raises :class:`ConfigError` for a model that has diverged.
    """
    budget = batch_tokens or BATCH_TOKENS[student.device.type]
    try:
        return probabilities(student, texts, max_tokens, 1, budget).astype(np.float32)
    except FloatingPointError as error:
        raise ConfigError(f"MODEL: {error}, it diverged in training: give another checkpoint") from None


def predict(student: Student, texts: Sequence[str], config: StudentConfig) -> np.ndarray:
    """float64[N, C]: probabilities of a student in training, in the order of the texts.

    A batch has ``score_batch_size`` texts; on a GPU, a batch of short texts is larger, up to the tokens of
    ``score_batch_size`` texts of ``max_tokens``.
    """
    size = config.score_batch_size
    if student.device.type == "cuda":
        return probabilities(student, texts, config.max_tokens, size, size * config.max_tokens)
    return probabilities(student, texts, config.max_tokens, size, chunk=len(texts))


def probabilities(
    student: Student,
    texts: Sequence[str],
    max_tokens: int,
    size: int,
    budget: int | None = None,
    chunk: int | None = None,
) -> np.ndarray:
    """float64[N, C], in the order of the texts.

    ``size`` and ``budget`` are those of :func:`by_length`; ``chunk`` (default: ``CHUNK``) texts are sorted
    at a time. Raises FloatingPointError where the student says no numbers.
    """
    # The wrapped module: DDP's forward would wait for the other ranks.
    unwrapped = Student(student.module, student.tokenizer, student.device, student.autocast)
    unwrapped.model.eval()
    p_NC = np.empty((len(texts), unwrapped.module.config.num_labels))
    indices, answers = [], []
    batches = _batches(unwrapped, texts, max_tokens, size, budget, max(1, CHUNK if chunk is None else chunk))
    with torch.inference_mode():
        for index_B, inputs in prefetched(batches, AHEAD):
            indices.append(index_B)
            answers.append(torch.softmax(unwrapped.forward(inputs).double(), dim=1))
        if answers:  # one copy from the device: each copy waits for the work queued before it
            p_NC[np.concatenate(indices)] = torch.cat(answers).cpu().numpy()
    if not np.isfinite(p_NC).all():
        raise FloatingPointError("the student's probabilities are not finite")
    return p_NC


def _batches(
    student: Student, texts: Sequence[str], max_tokens: int, size: int, budget: int | None, chunk: int
) -> Iterator[tuple[np.ndarray, Inputs]]:
    """Positions of texts of similar length, and the model's inputs for them."""
    for start in range(0, len(texts), chunk):
        tokens_N = student.encode(texts[start : start + chunk], max_tokens)
        for index_B in by_length(tokens_N, size, budget):
            yield start + index_B, student.pad([tokens_N[i] for i in index_B])


def by_length(tokens_N: Sequence[Tokens], size: int, budget: int | None = None) -> Iterator[np.ndarray]:
    """int64[B]: positions of texts of similar length, to save padding; the longest first, to fail early.

    A batch has ``size`` texts, or more, as long as they have at most ``budget`` tokens, padding included.
    """
    length_N = lengths(tokens_N)
    order = np.argsort(length_N, kind="stable")[::-1]
    start = 0
    while start < order.size:
        longest = max(1, int(length_N[order[start]]))
        end = start + max(size, (budget or 0) // longest)
        yield order[start:end]
        start = end


def prefetched(items: Iterator[T], count: int) -> Iterator[T]:
    """The items; a thread produces up to ``count`` of them in advance."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item
