"""Make a small teacher for a data set without recorded answers, and record its answers.

A logistic regression on TF-IDF of single words, trained on a slice that is neither pool nor test set. It
stands for an LLM that is right three times in four and knows which. Writes pool, test set and answers below
``--out``, for configs/compare_emotion.yaml and configs/compare_banking77.yaml.

    python benchmarks/small_teacher.py emotion
    python benchmarks/small_teacher.py banking77
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline


@dataclass(frozen=True)
class Recipe:
    """Where the teacher's own texts come from."""

    split: str
    texts: int
    """So many of the split, drawn at random; they are left out of pool and test set."""


RECIPES = {"emotion": Recipe("validation", 1000), "banking77": Recipe("train", 1500)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Record a small teacher's answers to a data set.")
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/small-teacher"))
    options = parser.parse_args(arguments)

    recipe, table = RECIPES[options.name], pq.read_table(options.data / f"{options.name}.parquet")
    text_N = np.array(table["text"].to_pylist(), dtype=object)
    gold_N, split_N = (np.array(table[name].to_pylist()) for name in ("label", "split"))
    of_split = np.flatnonzero(split_N == recipe.split)
    own = np.random.default_rng(0).choice(of_split, recipe.texts, replace=False)
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, stop_words="english"),
        LogisticRegression(C=10.0, max_iter=500, class_weight="balanced"),
    ).fit(text_N[own], gold_N[own])
    assert model.classes_.size == np.unique(gold_N).size, "a class that the teacher has not seen"
    p_NC = model.predict_proba(text_N)

    options.out.mkdir(parents=True, exist_ok=True)
    split_N[own] = "teacher"
    for part, split in (("pool", "train"), ("test", "test")):
        is_part = split_N == split
        said = model.classes_[p_NC[is_part].argmax(axis=1)]
        accuracy = accuracy_score(gold_N[is_part], said)
        f1 = f1_score(gold_N[is_part], said, average="macro")
        print(f"{part}: {is_part.sum()} texts, teacher {accuracy:.3f} accurate, macro-F1 {f1:.3f}")
        pq.write_table(table.filter(pa.array(is_part)), options.out / f"{options.name}-{part}.parquet")
    # The classes are in the order of their names, as in the config files.
    answers = pa.table({"id": table["id"], "probs": pa.array(list(p_NC.astype(np.float32)))})
    pq.write_table(
        answers.filter(pa.array(np.isin(split_N, ["train", "test"]))),
        options.out / f"{options.name}-answers.parquet",
    )


if __name__ == "__main__":
    main()
