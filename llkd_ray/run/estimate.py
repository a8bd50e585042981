"""Estimates the tokens, cost and time of labelling from a sample: pure arithmetic on intervals.

Shapes in names: N texts of the sample.
"""

from __future__ import annotations

import json
import math
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llkd_ray.config.schema import CapConfig
from llkd_ray.config.teacher import PriceConfig
from llkd_ray.teacher.footprint import RequestCounts

Z = 1.96
"""Half-width of a 95 % interval, in standard errors."""


@dataclass(frozen=True)
class Estimate:
    """A number between ``low`` and ``high``; ``middle`` is the point estimate, None if there is none."""

    low: float
    middle: float | None
    high: float

    @classmethod
    def exactly(cls, value: float) -> Estimate:
        return cls(value, value, value)

    @classmethod
    def between(cls, low: float, high: float) -> Estimate:
        return cls(low, low if low == high else None, high)

    def __add__(self, other: Estimate) -> Estimate:
        """Adds the bounds, so the interval is never too narrow."""
        both = None if self.middle is None or other.middle is None else self.middle + other.middle
        return Estimate(self.low + other.low, both, self.high + other.high)

    def times(self, low: float, high: float | None = None) -> Estimate:
        """Multiply by a non-negative factor: an exact one, or one between two numbers."""
        high = low if high is None else high
        middle = None if self.middle is None or low != high else self.middle * low
        return Estimate(self.low * low, middle, self.high * high)

    def words(self, digits: int = 0) -> str:
        """``1,200``, ``1,200 (1,100 to 1,300)`` or ``1,100 to 1,300``."""
        low, high = f"{self.low:,.{digits}f}", f"{self.high:,.{digits}f}"
        if low == high:
            return high
        return f"{low} to {high}" if self.middle is None else f"{self.middle:,.{digits}f} ({low} to {high})"


NOTHING = Estimate.exactly(0.0)


def mean(value_N: np.ndarray, population: float, taken: float, most: float = math.inf) -> Estimate:
    """The mean of ``taken`` values from the population that was sampled, with a 95 % interval.

    W. G. Cochran, Sampling Techniques (1977), sections 2.6 to 2.8: the standard error of a mean with the
    finite population correction, applied once for the sample and once for the values taken. The population
    may be infinite. Every value lies between 0 and ``most``, and so does the mean.
    """
    n = len(value_N)
    middle = float(np.mean(value_N))
    share = max(0.0, 1 / n - 1 / population) + max(0.0, 1 / taken - 1 / population)
    # A single value gives no estimate of the variance.
    spread = float(np.std(value_N, ddof=1)) if n > 1 else math.inf
    half = Z * spread * math.sqrt(share) if share else 0.0
    return Estimate(max(0.0, middle - half), middle, min(max(most, middle), middle + half))


# --- totals


@dataclass(frozen=True)
class Bill:
    """Texts, tokens and cost of the requests to one teacher or several."""

    texts: Estimate
    prompt_tokens: Estimate
    answer_tokens: Estimate
    cost: Estimate

    def __add__(self, other: Bill) -> Bill:
        return Bill(
            self.texts + other.texts,
            self.prompt_tokens + other.prompt_tokens,
            self.answer_tokens + other.answer_tokens,
            self.cost + other.cost,
        )

    @property
    def tokens(self) -> Estimate:
        return self.prompt_tokens + self.answer_tokens

    def from_none_up(self) -> Bill:
        """The same with all lower bounds 0, for when it is unknown which texts will be requested."""
        parts = self.texts, self.prompt_tokens, self.answer_tokens, self.cost
        return Bill(*(Estimate.between(0.0, part.high) for part in parts))


def bill(texts: Estimate, tokens: Estimate, requests: RequestCounts, price: PriceConfig) -> Bill:
    """The bill for ``texts`` texts whose prompts have ``tokens`` in total, each prompt counted once.

    A prompt that is sent again is in the prefix cache and costs the price of cached tokens. The first time,
    all its tokens are billed as new, although the part before the text is the same in all prompts.
    """
    prompt_tokens = tokens.times(*requests.prompts) + texts.times(*requests.behind)
    answer_tokens = texts.times(*requests.answers)
    again = tokens.times(requests.prompts[0] - 1, requests.prompts[1] - 1) + texts.times(*requests.behind)
    cached = price.input if price.cached is None else price.cached
    cost = (
        tokens.times(price.input / 1e6) + again.times(cached / 1e6) + answer_tokens.times(price.output / 1e6)
    )
    return Bill(texts, prompt_tokens, answer_tokens, cost)


def hours(tokens: Estimate, slowest: float, fastest: float) -> Estimate:
    """Hours for so many prompt tokens, between two speeds (tokens per second of all actors)."""
    if slowest == fastest:
        return tokens.times(1 / (3600 * fastest))
    return Estimate(tokens.low / (3600 * fastest), None, tokens.high / (3600 * slowest))


def what_caps_do(cap: CapConfig, whole: Bill, currency: str) -> list[str]:
    """For each cap that is set, one line: whether it ends the run before all texts are labelled."""
    caps = (
        ("texts", cap.texts, whole.texts, "texts"),
        ("tokens", cap.tokens, whole.tokens, "tokens"),
        ("cost", cap.cost, whole.cost, currency),
    )
    return [
        f"budget.cap.{name} of {limit:,} {unit} {_verdict(limit, need)}"
        for name, limit, need, unit in caps
        if limit is not None
    ]


def _verdict(limit: float, need: Estimate) -> str:
    if limit >= need.high:
        return "is enough for all labels"
    least = limit / need.high
    if limit >= need.low:
        return f"may end the run before all labels are had, after {least:.0%} of them at the earliest"
    most = limit / need.low
    share = f"{most:.1%}" if f"{least:.1%}" == f"{most:.1%}" else f"{least:.1%} to {most:.1%}"
    return f"will end the run before all labels are had: after about {share} of them"


MEASURE_S = 0.3
SIZE = 1024
"""Rows and columns of the benchmark matrices."""
UTILISATION = (0.1, 0.5)
"""Lowest and highest share of the matrix product throughput that engines usually reach; a rule of thumb."""


def tokens_per_s(model: str, dtype: str, on_gpu: bool) -> tuple[float, float] | None:
    """Lower and upper bound of new prompt tokens per second, on all CPUs of this machine or on one GPU.

    A token takes two operations for each non-embedding weight (J. Kaplan et al., arXiv 2001.08361, section
    2.1). The speed is the measured throughput of matrix products times a utilisation. None if ``model`` is
    not a local checkpoint whose size can be read, or if this machine has no GPU but one is required.
    """
    weights = count_weights(Path(model).expanduser())
    if not weights:
        return None
    import torch

    if on_gpu and not torch.cuda.is_available():
        return None
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    flops = matmul_flops("cuda" if on_gpu else "cpu", kind)
    low, high = (share * flops / (2 * weights) for share in UTILISATION)
    return low, high


def count_weights(checkpoint: Path) -> int:
    """Number of non-embedding weights in a folder with safetensors files; 0 if there are none.

    The output layer (``lm_head``) is excluded as well: it processes only a prompt's last token.
    """
    if not checkpoint.is_dir():
        return 0
    shapes: dict[str, list[int]] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        shapes |= {name: tensor["shape"] for name, tensor in _header(file).items()}
    return sum(math.prod(s) for name, s in shapes.items() if "embed" not in name and "lm_head" not in name)


def _header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name; its first 8 bytes are the length of the JSON header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header


def matmul_flops(device: str, kind: Any) -> float:
    """Floating-point operations per second in products of square matrices; takes MEASURE_S seconds."""
    import torch

    a, b = (torch.ones(SIZE, SIZE, dtype=kind, device=device) for _ in range(2))

    def multiply() -> None:
        torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    multiply()  # warm-up: the first call selects a kernel
    times, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < MEASURE_S:
        multiply()
        times += 1
    return 2 * SIZE**3 * times / passed
