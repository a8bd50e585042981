"""Make a small teacher for the Emotion data and record its answers, for configs/compare_emotion.yaml.

A logistic regression on TF-IDF of single words, trained on a thousand texts of the validation split, which is
neither pool nor test set. It stands for an LLM that is right three times in four and knows which.

    python benchmarks/emotion_teacher.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Record a small teacher's answers to the Emotion data.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/emotion.parquet"))
    parser.add_argument("--out", type=Path, default=Path("runs/emotion-teacher.parquet"))
    parser.add_argument("--texts", type=int, default=1000, help="texts that the teacher is trained on")
    options = parser.parse_args(arguments)

    table = pq.read_table(options.data)
    text_N = np.array(table["text"].to_pylist(), dtype=object)
    gold_N, split_N = (np.array(table[name].to_pylist()) for name in ("label", "split"))
    own = np.flatnonzero(split_N == "validation")[: options.texts]
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, stop_words="english"),
        LogisticRegression(C=10.0, max_iter=500, class_weight="balanced"),
    ).fit(text_N[own], gold_N[own])
    p_NC = model.predict_proba(text_N)
    # The classes are in the order of their names, as in configs/emotion_local.yaml.
    answers = pa.table({"id": table["id"], "probs": pa.array(list(p_NC.astype(np.float32)))})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(answers.filter(pa.array(split_N != "validation")), options.out)
    for split in ("train", "test"):
        of_split = split_N == split
        said = model.classes_[p_NC[of_split].argmax(axis=1)]
        accuracy, f1 = (
            accuracy_score(gold_N[of_split], said),
            f1_score(gold_N[of_split], said, average="macro"),
        )
        print(f"{split}: accuracy {accuracy:.3f}, macro-F1 {f1:.3f}")


if __name__ == "__main__":
    main()
