"""What each method of confidence is worth on the recorded answers of real LLMs.

Methods are fitted on the train split alone, as a run fits them on what is read before its first round, and
measured on the test split: to 200 texts drawn by seed (their gold is looked at by temperature only), and
batch to the whole split, too. Prints a Markdown table; figures of drawn texts are means over the draws.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --draws 20 --texts 50
    python benchmarks/small_teacher.py emotion && python benchmarks/calibration.py --small emotion
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.config.teacher import ConfidenceConfig
from llkd_ray.metrics.calibration import Calibrator
from llkd_ray.metrics.quality import teacher_quality
from llkd_ray.metrics.uncertainty import normalise

TEACHERS = ("gemma", "yi", "llama", "qwen", "mistral")
FIGURES = ("ece", "nll", "brier", "auroc", "accuracy", "macro_f1")
HEADINGS = ("ECE [95 %]", "NLL", "Brier", "AUROC", "accuracy", "macro-F1")


@dataclass(frozen=True)
class Answers:
    """One teacher's, to some texts. N texts, C classes."""

    gold_N: np.ndarray
    mass_NC: np.ndarray
    votes_NC: np.ndarray | None = None

    def __getitem__(self, rows: np.ndarray) -> Answers:
        return Answers(
            self.gold_N[rows], self.mass_NC[rows], None if self.votes_NC is None else self.votes_NC[rows]
        )

    def __len__(self) -> int:
        return len(self.gold_N)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure methods of confidence on recorded answers.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--small", choices=("emotion", "banking77"), help="a teacher of small_teacher.py instead"
    )
    parser.add_argument("--small-from", type=Path, default=Path("runs/small-teacher"))
    parser.add_argument("--texts", type=int, default=200, help="drawn to be fitted on")
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args(arguments)
    teachers = (
        read_small(options.small_from, options.small)
        if options.small
        else read_recorded(options.data / "pubmed_rct_llm.parquet")
    )
    print(f"| teacher | method | {' | '.join(HEADINGS)} |\n|{'---|' * (len(HEADINGS) + 2)}")
    for name, train, test in teachers:
        for method, qualities in measure(train, test, options.texts, options.draws):
            print(f"| {name} | {method} | {' | '.join(cells(qualities))} |", flush=True)


def measure(
    train: Answers, test: Answers, texts: int, draws: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each method's figures on the test split, once, or once for every draw of texts to fit it on."""

    def quality(p_NC: np.ndarray) -> dict[str, Any]:
        return teacher_quality(test.gold_N, p_NC, np.random.default_rng(0))

    def fitted(method: str, on: Answers) -> Calibrator:
        return Calibrator.fit(ConfidenceConfig(method=method), on.mass_NC, on.gold_N)

    def both(on: Answers) -> np.ndarray:
        """Batch, then a temperature on top."""
        batch = fitted("batch", on)
        above = Answers(on.gold_N, batch.apply(on.mass_NC))
        return fitted("temperature", above).apply(batch.apply(test.mass_NC))

    drawn = [
        train[np.random.default_rng(seed).choice(len(train), texts, replace=False)] for seed in range(draws)
    ]
    yield "raw", [quality(normalise(test.mass_NC))]
    yield f"batch, {len(train):,} texts", [quality(fitted("batch", train).apply(test.mass_NC))]
    for method in ("batch", "temperature"):
        yield f"{method}, {texts} texts", [quality(fitted(method, one).apply(test.mass_NC)) for one in drawn]
    yield f"batch, then temperature, {texts} texts", [quality(both(one)) for one in drawn]
    if test.votes_NC is not None:
        yield "votes", [quality(normalise(test.votes_NC))]


def cells(qualities: list[dict[str, Any]]) -> list[str]:
    """Means over the draws, of the ends of the intervals, too."""
    shown = [f"{np.mean([one[key] for one in qualities]):.3f}" for key in FIGURES]
    low, high = np.mean([one["ece_interval"] for one in qualities], axis=0)
    return [f"{shown[0]} [{low:.3f}, {high:.3f}]", *shown[1:]]


def read_recorded(path: Path) -> Iterator[tuple[str, Answers, Answers]]:
    table = pq.read_table(path)
    is_train = np.array(table["split"].to_pylist()) == "train"
    labels = json.loads(table.schema.metadata[b"labels"])
    gold_N = np.array([labels.index(label) for label in table["label"].to_pylist()])
    for teacher in TEACHERS:
        answers = Answers(
            gold_N,
            matrix(table[f"{teacher}_probs"]),
            matrix(table[f"{teacher}_votes"]),
        )
        yield teacher, answers[is_train], answers[~is_train]


def read_small(folder: Path, name: str) -> Iterator[tuple[str, Answers, Answers]]:
    answers = pq.read_table(folder / f"{name}-answers.parquet")
    mass_NC = matrix(answers["probs"])
    place = {text_id: i for i, text_id in enumerate(answers["id"].to_pylist())}
    parts = [
        pq.read_table(folder / f"{name}-{part}.parquet", columns=["id", "label"]) for part in ("pool", "test")
    ]
    classes = sorted(set(parts[0]["label"].to_pylist()))
    train, test = (
        Answers(
            np.array([classes.index(label) for label in part["label"].to_pylist()]),
            mass_NC[[place[text_id] for text_id in part["id"].to_pylist()]],
        )
        for part in parts
    )
    yield name, train, test


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), dtype=np.float64)


if __name__ == "__main__":
    main()
