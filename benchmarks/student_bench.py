"""What student_gpu.py measures with: how much, a student with texts for it, clocks, and the output."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from student_variants import Size, save_checkpoint

from llkd_ray.config.schema import LabelsConfig, StudentConfig
from llkd_ray.student.model import Student, build_student

LABELS = LabelsConfig(names=("one", "two", "three", "four"))


@dataclass(frozen=True)
class Plan:
    """How much is measured: of ``quick``, only that it runs."""

    lengths: tuple[int, ...] = (32, 128, 512)
    tokens: int = 1 << 20
    """Of the texts that are scored from end to end."""
    budgets: tuple[int, ...] = (8_192, 32_768, 131_072)
    """Tokens of a forward pass."""
    train_batches: tuple[int, ...] = (32, 256)
    product: int = 8192
    repeats: int = 5
    at_least: float = 0.1
    """Seconds of one repeat."""


QUICK = Plan((8, 16, 32), 2_048, (256, 512), (4, 8), 256, 2, 0.0)


class Output:
    """A line for each thing measured, printed and, as JSON, in a file."""

    def __init__(self, path: Path | None, deadline: float) -> None:
        self.file = path.open("a") if path else None
        self.deadline = deadline
        self.lines: list[dict[str, Any]] = []

    def add(self, **facts: Any) -> None:
        facts = {
            key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in facts.items()
        }
        self.lines.append(facts)
        print("  ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
        if self.file:
            print(json.dumps(facts), file=self.file, flush=True)

    def attempt(self, measure: Callable[[], dict[str, Any]], **facts: Any) -> None:
        """Add what ``measure`` finds, or why it did not."""
        if time.monotonic() > self.deadline:
            return self.add(**facts, skipped="out of time")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        try:
            found = measure()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
        if torch.cuda.is_available():
            found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        self.add(**facts, **found, took=round(time.monotonic() - began, 1))
        return None


class Bench:
    """One size of student, on its device."""

    def __init__(
        self,
        name: str,
        size: Size,
        plan: Plan,
        device: torch.device,
        folder: Path,
        out: Output,
        ceiling: float,
    ) -> None:
        self.name, self.size, self.plan, self.device, self.out = name, size, plan, device, out
        self.ceiling = ceiling
        self.folder = str(folder / name)
        self.words = save_checkpoint(self.folder, size, max(plan.lengths))
        self.config = StudentConfig(model=self.folder, max_tokens=max(plan.lengths), min_steps=1, epochs=1)
        self.student = self.build()

    def build(self, precision: str = "auto", device: torch.device | None = None) -> Student:
        config = self.config.model_copy(update={"precision": precision})
        return build_student(config, LABELS, 0, device or self.device)

    def attempt(self, part: str, measure: Callable[[], dict[str, Any]], **facts: Any) -> None:
        self.out.attempt(measure, part=part, model=self.name, **facts)

    def texts(self, length_N: np.ndarray) -> list[str]:
        """Texts of exactly so many tokens each, the two marks counted in."""
        picked = iter(np.random.default_rng(0).integers(0, len(self.words), int(length_N.sum())).tolist())
        return [" ".join(self.words[next(picked)] for _ in range(length - 2)) for length in length_N]

    def rate(self, length_N: np.ndarray, seconds: float, passes: int = 1) -> dict[str, float]:
        """Of real tokens; ``passes`` forward passes' worth of operations."""
        share = passes * self.size.operations(length_N) / seconds / self.ceiling
        return {"tokens_per_s": round(length_N.sum() / seconds), "share": share, "ms": 1e3 * seconds}

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median seconds of a call, where one follows the other."""
        for _ in range(2):
            run()
        began = self.now()
        run()
        calls = max(1, round(self.plan.at_least / max(1e-6, self.now() - began)))
        each = []
        for _ in range(self.plan.repeats):
            began = self.now()
            for _ in range(calls):
                run()
            each.append((self.now() - began) / calls)
        return float(np.median(each))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def once(self, run: Callable[[], Any], repeats: int = 3) -> float:
        """Median seconds of something long."""
        each = []
        for _ in range(repeats):
            began = self.now()
            run()
            each.append(self.now() - began)
        return float(np.median(each))

    def inputs(self, length: int, texts: int, masked: bool = False) -> dict[str, torch.Tensor]:
        """On the device; ``masked``: every text but the first has one token of padding."""
        ids_BL = torch.randint(5, self.size.vocab_size, (texts, length), device=self.device)
        if not masked:
            return {"input_ids": ids_BL}
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[1:, -1] = 0
        return {"input_ids": ids_BL, "attention_mask": mask_BL}


def mixed_lengths(n: int, longest: int) -> np.ndarray:
    """int64[N]: log-normal, 60 on average before they are cut at ``longest``, median 50."""
    length_N = np.random.default_rng(1).lognormal(np.log(50), np.sqrt(2 * np.log(60 / 50)), n)
    return np.clip(np.rint(length_N), 4, longest).astype(np.int64)


def product_ceiling(device: torch.device, width: int) -> dict[str, float]:
    """Operations a second of a bf16 matrix product of this width; the median of 20."""
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    each = []
    for _ in range(25):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            a @ b
            end.record()
            end.synchronize()
            each.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            a @ b
            each.append(time.perf_counter() - began)
    seconds = float(np.median(each[5:]))
    return {"tflops": 2 * width**3 / seconds / 1e12, "ms": 1e3 * seconds}


def about(device: torch.device) -> dict[str, Any]:
    """The machine and what it runs."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "cpus": torch.get_num_threads(),
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        facts |= {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "nvidia_smi": said}
    return facts
