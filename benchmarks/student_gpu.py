"""How near the student comes to what the card can do: scoring and training, tokens per second.

Two sizes, with random weights: MiniLM's and roberta-base's. Needs neither Ray nor pyarrow. A variant that
fails is a line of the output, and what does not fit into the time is left out, last things first.

    python benchmarks/student_gpu.py --out student_gpu.jsonl
    python benchmarks/student_gpu.py --device cpu --quick      # tiny sizes: does everything run?

Shares are of the bf16 matrix product that this card does (8192 × 8192 × 8192, on random numbers). Operations
are those of the matrix products of the layers, for real tokens, not padding: in a forward pass of a text of
L tokens, each token costs layers × (2 × (4 d² + 2 d f) + 4 L d), with width d and inner width f; training
costs three times that (a backward pass is two forward passes). Embeddings and the head count nothing.

Shapes in names: B texts of a batch, L tokens of a text, T tokens of packed texts, H heads, D width of one.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from student_bench import LABELS, QUICK, Bench, Output, Plan, about, mixed_lengths, product_ceiling
from student_variants import PACKED, SIZES, ScoringMethod, in_bf16, packed_logits
from torch import nn
from torch.nn.attention import SDPBackend
from transformers import RobertaModel
from transformers import pipeline as make_pipeline

from llkd_ray.config.schema import StudentConfig
from llkd_ray.student import inference as student_module
from llkd_ray.student.inference import by_length, predict
from llkd_ray.student.model import Student, build_student, lengths
from llkd_ray.student.train import Batch, train_round

AUTOCAST = ScoringMethod("autocast")
BF16 = ScoringMethod("bf16 weights", bf16=True)
FORWARD = [
    replace(AUTOCAST, all_budgets=True),
    replace(BF16, all_budgets=True),
    ScoringMethod("bf16 weights, padded", bf16=True, masked=True),
    ScoringMethod("autocast, padded", masked=True),
    ScoringMethod("bf16 weights, eager attention", bf16=True, attention="eager"),
    ScoringMethod("bf16 weights, flash kernel", bf16=True, kernel=SDPBackend.FLASH_ATTENTION),
    ScoringMethod("bf16 weights, cuDNN kernel", bf16=True, kernel=SDPBackend.CUDNN_ATTENTION),
    ScoringMethod("bf16 weights, memory-efficient kernel", bf16=True, kernel=SDPBackend.EFFICIENT_ATTENTION),
]
COMPILED = [replace(way, name=f"{way.name}, compiled", compiled=True) for way in FORWARD[1::-1]]


class StudentBench(Bench):
    """What is measured of one size of student, part by part."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # In the order of their use, and of the harm that a failure could do to those after them.
        self.parts: dict[str, Callable[[], None]] = {
            "check": self.check,
            "forward": lambda: self.forward(FORWARD),
            "score": self.end_to_end,
            "train": self.train,
            "steps": lambda: self.steps([AUTOCAST, BF16]),
            "foreach": lambda: self.steps([AUTOCAST], fused=False),
            "profile": lambda: self.profile([AUTOCAST, BF16]),
            "compiled": lambda: self.forward(COMPILED),
            "packed": self.padding_free,
            "compiled_steps": lambda: self.steps(COMPILED[1:]),
        }

    # What is right

    def check(self) -> None:
        """Answers against the CPU's in float32; a round lowers the loss; what is saved comes back."""
        texts = self.texts(mixed_lengths(96, max(self.plan.lengths)))
        expected = predict(self.build("float32", torch.device("cpu")), texts, self.config)
        for precision in ("float32", "bfloat16"):
            self.attempt(
                "correct",
                lambda p=precision: agreement(expected, self.build(p), texts, self.config),
                what=precision,
            )
        bare = Student(in_bf16(self.student.model), self.student.tokenizer, self.device, False)
        self.attempt("correct", lambda: agreement(expected, bare, texts, self.config), what="bf16 weights")
        self.attempt("correct", self.learn, what="a round lowers the loss, its state comes back")

    def learn(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        label_N = rng.integers(0, 4, 256)
        texts = [
            f"{self.words[label]} {rest}"
            for label, rest in zip(label_N, self.texts(np.full(256, 12)), strict=True)
        ]
        batch = Batch(texts, label_N, np.ones(256), np.eye(4)[label_N])
        config = self.config.model_copy(update={"epochs": 12, "learning_rate": 3e-4})
        learner = self.build()

        def loss() -> float:
            p_NC = predict(learner, texts, config)
            return float(-np.log(p_NC[np.arange(256), label_N]).mean())

        before = loss()
        facts = train_round(learner, batch, config)
        after, p_NC = loss(), predict(learner, texts, config)
        with tempfile.TemporaryDirectory() as folder:
            learner.module.save_pretrained(folder)
            learner.tokenizer.save_pretrained(folder)
            again = build_student(config.model_copy(update={"model": folder}), LABELS, 1, self.device)
            back = np.abs(predict(again, texts, config) - p_NC).max()
        return {
            "before": before,
            "after": after,
            "lower": after < before,
            "steps": facts["steps"],
            "back": float(back),
        }

    # Scoring, from texts to probabilities

    def end_to_end(self) -> None:
        cases: list[tuple[str, np.ndarray]] = [
            (str(length), np.full(max(64, self.plan.tokens // length), length))
            for length in self.plan.lengths
        ]
        cases.append(("mixed", mixed_lengths(self.plan.tokens // 60, max(self.plan.lengths))))
        for case, length_N in cases:
            texts = self.texts(length_N)
            longest = 128 if case == "mixed" and max(self.plan.lengths) > 128 else int(length_N.max())
            self.score(case, texts, np.minimum(length_N, longest), longest)

    def score(self, case: str, texts: list[str], length_N: np.ndarray, longest: int) -> None:
        facts = {"length": case, "texts": len(texts)}
        plain = self.student
        bare = Student(in_bf16(plain.model), plain.tokenizer, self.device, False)

        def scored(student: Student, batch: int, ahead: bool = True) -> dict[str, Any]:
            config = self.config.model_copy(update={"max_tokens": longest, "score_batch_size": batch})
            predict(student, texts[: 4 * batch], config)
            with nothing_ahead() if not ahead else contextlib.nullcontext():
                return self.rate(length_N, self.once(lambda: predict(student, texts, config)))

        def tokenized(padded: bool) -> dict[str, Any]:
            def run() -> None:
                for start in range(0, len(texts), student_module.CHUNK):
                    tokens_N = plain.encode(texts[start : start + student_module.CHUNK], longest)
                    for index_B in by_length(tokens_N, 64, 64 * longest) if padded else ():
                        plain.pad([tokens_N[i] for i in index_B])

            return self.rate(length_N, self.once(run))

        self.attempt("score", lambda: tokenized(False), **facts, way="tokenizing only")
        self.attempt("score", lambda: tokenized(True), **facts, way="tokenizing and padding only")
        self.attempt("score", lambda: scored(plain, 64), **facts, way="predict, 64 texts")
        self.attempt("score", lambda: scored(plain, 256), **facts, way="predict, 256 texts")
        self.attempt("score", lambda: scored(bare, 256), **facts, way="predict, 256 texts, bf16 weights")
        if case in ("128", "mixed"):
            self.attempt(
                "score", lambda: scored(plain, 64, False), **facts, way="predict, 64 texts, no thread"
            )
            self.attempt(
                "score", lambda: scored(plain, 256, False), **facts, way="predict, 256 texts, no thread"
            )
        few = slice(0, max(64, len(texts) // 8))
        for batch in (64, 256):
            self.attempt(
                "score",
                lambda b=batch: self.piped(texts[few], length_N[few], longest, b),
                **facts,
                way=f"transformers pipeline, {batch} texts, bf16 weights",
            )

    def piped(self, texts: list[str], length_N: np.ndarray, longest: int, batch: int) -> dict[str, Any]:
        classify = make_pipeline(
            "text-classification",
            model=in_bf16(self.student.model),
            tokenizer=self.student.tokenizer,
            device=self.device,
        )
        options = {"batch_size": batch, "top_k": None, "truncation": True, "max_length": longest}
        classify(texts[:batch], **options)
        return self.rate(length_N, self.once(lambda: classify(texts, **options), repeats=1))

    # Scoring, the forward pass alone

    def forward(self, ways: Sequence[ScoringMethod]) -> None:
        for way in ways:
            self.attempt("way", lambda w=way: self.forward_of(w), way=way.name)

    def forward_of(self, way: ScoringMethod) -> dict[str, Any]:
        def measure(length: int, texts: int) -> dict[str, Any]:
            inputs = self.inputs(length, texts, masked=way.masked)
            return self.rate(np.full(texts, length), self.seconds(lambda: way.logits(model, inputs)))

        with way.model(self.student.model.eval()) as model, torch.inference_mode():
            for length in self.plan.lengths:
                for budget in self.plan.budgets if way.all_budgets else self.plan.budgets[1:2]:
                    n = max(1, budget // length)
                    facts = {"way": way.name, "length": length, "texts": n}
                    self.attempt("forward", lambda k=length, n=n: measure(k, n), **facts)
        return {}

    def padding_free(self) -> None:
        """Texts of mixed lengths: sorted and padded, in batches of one length each, and packed."""
        length_N = mixed_lengths(max(64, self.plan.tokens // 240), max(self.plan.lengths))
        tokens_N = self.student.encode(self.texts(length_N), int(length_N.max()))
        budget = self.plan.budgets[1]
        nearly = list(by_length(tokens_N, 1, budget))
        exactly = [part for index_B in nearly for part in np.split(index_B, changes(length_N[index_B]))]
        expected_NC = np.zeros((length_N.size, len(LABELS.names)), dtype=np.float32)

        def run(way: ScoringMethod, batches: list[np.ndarray], packed: bool = False) -> dict[str, Any]:
            places = np.concatenate(batches)
            widths = [length_N[index_B].max() * (not packed) for index_B in batches]
            padded = sum(w * b.size for w, b in zip(widths, batches, strict=True)) / length_N.sum() - 1
            make, call = (self.pack, packed_logits) if packed else (self.padded, way.logits)
            inputs = [make([tokens_N[i] for i in index_B]) for index_B in batches]
            with way.model(self.student.model.eval()) as model, torch.inference_mode():
                p_NC = torch.cat([call(model, each) for each in inputs]).float().softmax(dim=1).cpu().numpy()
                seconds = self.once(lambda: [call(model, each) for each in inputs])
            if way is BF16 and batches is nearly:
                expected_NC[places] = p_NC
            furthest = float(np.abs(p_NC - expected_NC[places]).max())
            return self.rate(length_N, seconds) | {"padding": max(0.0, padded), "furthest": furthest}

        facts = {"length": "mixed", "texts": length_N.size}
        packing = ScoringMethod("", bf16=True, attention=PACKED)
        self.attempt("padding", lambda: run(BF16, nearly), way="sorted, padded", **facts)
        self.attempt("padding", lambda: run(BF16, exactly), way="one length a batch", **facts)
        self.attempt("padding", lambda: run(packing, nearly, packed=True), way="packed", **facts)

    def padded(self, tokens_B: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """What the model takes, on its device."""
        return {name: value.to(self.device) for name, value in self.student.pad(tokens_B).items()}

    def pack(self, tokens_B: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """One long row of all texts' tokens, with their places and where each text begins."""
        length_B = lengths(tokens_B)
        first = self.student.tokenizer.pad_token_id + 1 if self.size.model is RobertaModel else 0
        ids = np.concatenate([tokens["input_ids"] for tokens in tokens_B])
        positions = np.concatenate([first + np.arange(length) for length in length_B])
        starts = np.concatenate([[0], np.cumsum(length_B)])
        return {
            "input_ids": torch.as_tensor(ids, device=self.device)[None],
            "position_ids": torch.as_tensor(positions, device=self.device)[None],
            "cu_seq_lens_q": torch.as_tensor(starts, dtype=torch.int32, device=self.device),
            "max_length_q": int(length_B.max()),
        }

    def profile(self, ways: Sequence[ScoringMethod]) -> None:
        """Which kernels the time of a forward pass goes to: share of it and count."""
        length = self.plan.lengths[1]

        def measure(way: ScoringMethod) -> dict[str, Any]:
            inputs = self.inputs(length, self.plan.budgets[1] // length)
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            with way.model(self.student.model.eval()) as model, torch.inference_mode():
                self.seconds(lambda: way.logits(model, inputs))
                with torch.profiler.profile(activities=kinds) as profiler:
                    way.logits(model, inputs)
                    self.now()
            key = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            found = sorted(profiler.key_averages(), key=lambda event: getattr(event, key), reverse=True)
            total = sum(getattr(event, key) for event in found)
            return {"kernels": {e.key[:70]: [round(getattr(e, key) / total, 3), e.count] for e in found[:14]}}

        for way in ways:
            self.attempt("profile", lambda w=way: measure(w), way=way.name, length=length)

    # Training

    def train(self) -> None:
        for batch in self.plan.train_batches:
            for length in self.plan.lengths:
                facts = {"length": length, "texts": batch}
                self.attempt(
                    "train", lambda b=batch, n=length: self.one_round(n, b), way="train_round", **facts
                )

    def one_round(self, length: int, batch: int) -> dict[str, Any]:
        steps = 24 if batch <= 32 else 8
        n = steps * batch
        length_N = np.full(n, length)
        texts, label_N = self.texts(length_N), np.arange(n) % 4
        config = self.config.model_copy(update={"max_tokens": length, "batch_size": batch})
        learner = self.build()
        times: list[float] = []

        def note(step: int, steps: int) -> None:
            if step in (3, steps):
                times.append(self.now())

        began = self.now()
        train_round(learner, Batch(texts, label_N, np.ones(n), np.eye(4)[label_N]), config, on_step=note)
        whole = self.now() - began
        per_step = (times[1] - times[0]) / (steps - 3)
        return self.rate(np.full(batch, length), per_step, passes=3) | {
            "with_tokenizing": round(n * length / whole)
        }

    def steps(self, ways: Sequence[ScoringMethod], fused: bool = True) -> None:
        """A step's forward, backward, clipping and AdamW, with inputs that lie on the device."""
        for way in ways:
            name = way.name + ("" if fused else ", AdamW not fused")
            self.attempt("way", lambda w=way, n=name: self.steps_of(w, n, fused), way=name)

    def steps_of(self, way: ScoringMethod, name: str, fused: bool) -> dict[str, Any]:
        def measure(length: int, batch: int) -> dict[str, Any]:
            inputs = self.inputs(length, batch)
            label_B = torch.randint(0, 4, (batch,), device=self.device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused, foreach=not fused)

            def run() -> None:
                nn.functional.cross_entropy(way.logits(model, inputs).float(), label_B).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            return self.rate(np.full(batch, length), self.seconds(run), passes=3)

        with way.model(self.student.model) as model:
            model.train()
            for batch in self.plan.train_batches:
                for length in self.plan.lengths:
                    facts = {"way": name, "length": length, "texts": batch}
                    self.attempt("step", lambda k=length, b=batch: measure(k, b), **facts)
                    model.zero_grad(set_to_none=True)
        return {}


def changes(value_N: np.ndarray) -> np.ndarray:
    """int64[M]: places whose value differs from that before."""
    return np.flatnonzero(np.diff(value_N)) + 1


def agreement(
    expected_NC: np.ndarray, student: Student, texts: list[str], config: StudentConfig
) -> dict[str, Any]:
    """How far the student's probabilities are from those expected; ``spread``: how far those are apart."""
    p_NC = predict(student, texts, config)
    return {
        "furthest": float(np.abs(p_NC - expected_NC).max()),
        "mean": float(np.abs(p_NC - expected_NC).mean()),
        "same_answer": float((p_NC.argmax(axis=1) == expected_NC.argmax(axis=1)).mean()),
        "spread": float(np.ptp(expected_NC, axis=0).max()),
    }


@contextlib.contextmanager
def nothing_ahead() -> Iterator[None]:
    """Batches are made in the thread that uses them, when it asks for them."""
    plain = student_module.prefetched
    student_module.prefetched = lambda items, count: items
    try:
        yield
    finally:
        student_module.prefetched = plain


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; figures mean nothing")
    parser.add_argument("--out", type=Path, help="file that JSON lines are added to")
    parser.add_argument("--seconds", type=float, default=420, help="after these, nothing more is begun")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["roberta-base", "minilm"])
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", help="these of each model's parts (default: all)"
    )
    options = parser.parse_args(arguments)
    device, plan = torch.device(options.device), QUICK if options.quick else Plan()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = Output(options.out, time.monotonic() + options.seconds)
    out.add(part="about", **about(device))
    out.attempt(lambda: product_ceiling(device, plan.product), part="ceiling", width=plan.product)
    ceiling = out.lines[-1].get("tflops", float("nan")) * 1e12
    with tempfile.TemporaryDirectory() as folder:
        benches = []
        for name in options.models:
            size = SIZES[name].tiny() if options.quick else SIZES[name]
            benches.append(StudentBench(name, size, plan, device, Path(folder), out, ceiling))
        for part in options.parts or benches[0].parts:
            for bench in benches:
                out.attempt(
                    lambda b=bench, p=part: b.parts[p]() or {}, part=f"end of {part}", model=bench.name
                )


if __name__ == "__main__":
    main()
