"""Screen selection and acquisition policies in minutes: a comparison with a stand-in for the student.

The stand-in is logistic regression on TF-IDF, trained anew in every round. It says which ideas are worth the
hours of `jobs/compare.py`, not how good they are: it takes noise and order otherwise than a fine-tuned
encoder, and its figures are lower. Table and policies are those of a run.

    python benchmarks/screen_policies.py configs/compare_pubmed_rct.yaml --seeds 0 1
    python benchmarks/screen_policies.py configs/compare_pubmed_rct.yaml \\
        --line 'half the labels={selection: {policy: llkd_sample}, budget: {labels: 3992, first_labels: 0.3}}'
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import yaml
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from llkd_ray.acquisition import ACQUISITION
from llkd_ray.cli import with_absolute_paths
from llkd_ray.cluster import connect
from llkd_ray.comparison import (
    ALL,
    GOLD,
    REFERENCES,
    changed,
    gold_labels,
    load_comparison,
    read_teacher,
    read_texts,
)
from llkd_ray.config import Config
from llkd_ray.console import Display
from llkd_ray.corpus import ingest
from llkd_ray.labelling import teacher_config
from llkd_ray.policies import SELECTION
from llkd_ray.settings import load_config
from llkd_ray.store import Examples, RunStore
from llkd_ray.table import ScoreTable
from llkd_ray.trial import Labels, Texts, Trial

Predict = Callable[[scipy.sparse.csr_matrix], np.ndarray]


@dataclass(frozen=True)
class Features:
    """TF-IDF of pool (N rows) and test set (T rows)."""

    x_N: scipy.sparse.csr_matrix
    x_T: scipy.sparse.csr_matrix

    @classmethod
    def of(cls, texts: Texts) -> Features:
        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
        return cls(vectorizer.fit_transform(texts.pool), vectorizer.transform(texts.test))


def fit(x_M: scipy.sparse.csr_matrix, label_M: np.ndarray, weight_M: np.ndarray, n_classes: int) -> Predict:
    """A stand-in student; its answers have a column for every class, seen or not."""
    seen = np.unique(label_M)
    if seen.size == 1:
        return lambda x: np.eye(n_classes)[np.full(x.shape[0], seen[0])]
    model = LogisticRegression(C=10.0, max_iter=200).fit(x_M, label_M, sample_weight=weight_M)

    def predict(x: scipy.sparse.csr_matrix) -> np.ndarray:
        p_NC = np.zeros((x.shape[0], n_classes))
        p_NC[:, model.classes_] = model.predict_proba(x)
        return p_NC

    return predict


def screen(trial: Trial, texts: Texts, features: Features, labels: Labels) -> list[tuple[float, float]]:
    """Accuracy and macro-F1 at every reported size."""
    config, n_classes = trial.config, len(texts.names)
    policy, acquisition = SELECTION[config.selection.policy], ACQUISITION[config.acquisition.policy]
    table = ScoreTable(n_classes, len(texts.pool))
    row_M, weight_M, figures = np.empty(0, dtype=np.int64), np.empty(0), []
    for k, size in enumerate(trial.sizes):
        n = trial.labelled_before(k, len(table)) - table.count_labelled()
        rng = np.random.default_rng([config.run.seed, 2, k])
        seed, explore = config.run.seed, config.acquisition.explore
        read_M = acquisition.choose(table.unread(), n, rng, seed=seed, explore=explore)
        p_MC = labels.p_NC[read_M]
        table.lease(k, read_M)
        table.put_labels(read_M, p_MC.argmax(axis=1), p_MC.max(axis=1))
        chosen = policy.choose(
            table.candidates(k + 1),
            size - row_M.size,
            np.random.default_rng([config.run.seed, 3, k]),
            quota=config.selection.quota,
            trained_C=table.trained_of_class(),
            options=config.selection.options,
        )
        row_M, weight_M = np.append(row_M, chosen.row_M), np.append(weight_M, chosen.weight_M)
        table.mark_trained(k, row_M)
        predict = fit(features.x_N[row_M], table.label[row_M], weight_M, n_classes)
        table.refresh(k, np.arange(len(table)), predict(features.x_N))
        if size in trial.reported:
            answer_T = predict(features.x_T).argmax(axis=1)
            f1 = f1_score(texts.gold_T, answer_T, average="macro", zero_division=0)
            figures.append((float(accuracy_score(texts.gold_T, answer_T)), float(f1)))
    return figures


def read(base: Config, display: Display) -> Examples:
    """The corpus by the same way as a run's, in a folder that lasts as long as this program."""
    folder = tempfile.mkdtemp(prefix="screen-")
    with connect(base):
        return ingest(base, RunStore(folder), display.say)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Screen policies with a stand-in for the student.")
    parser.add_argument("comparison", help="a YAML file as of jobs/compare.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--line", action="append", default=[], metavar="NAME={…}", help="one more line")
    options = parser.parse_args(arguments)
    comparison = load_comparison(options.comparison)
    more: dict[str, Any] = {}
    for line in options.line:
        name, _, changes = line.partition("=")
        more[name] = yaml.safe_load(changes)
    base = with_absolute_paths(load_config(comparison.base))
    with Display() as display:
        examples = read(base, display)
        texts = read_texts(examples, base.labels.names)
        features, n_pool = Features.of(texts), examples.n_pool
        teachers = {
            name: read_teacher(teacher_config(base, changes), examples)[0]
            for name, changes in comparison.teachers.items()
        }
        small = [
            tuple(round(share * n_pool) for share in shares)
            for shares in (comparison.sizes, comparison.reported)
        ]
        rows = []
        for line, changes in {**REFERENCES, **comparison.lines, **more}.items():
            sizes = ((n_pool,), (n_pool,)) if line in (GOLD, ALL) else small
            cells, sums = [], []
            for labels in [gold_labels(examples, texts)] if line == GOLD else teachers.values():
                trials = [Trial(changed(base, changes, seed), *sizes, Path()) for seed in options.seeds]
                mean = np.mean([screen(trial, texts, features, labels) for trial in trials], axis=0)
                cells.append("  ".join(f"{f1:.3f}" for _, f1 in mean))
                sums.append(mean)
            overall = "  ".join(f"{accuracy:.3f}/{f1:.3f}" for accuracy, f1 in np.mean(sums, axis=0))
            rows.append([line, *(cells if line != GOLD else cells * len(teachers)), overall])
            display.say(f"{line}: {overall}")
        shares = ", ".join(f"{share:.0%}" for share in comparison.reported)
        display.table(
            f"macro-F1 of the stand-in at {shares} of the pool; last: accuracy/macro-F1, mean over teachers",
            ["", *teachers, "mean"],
            rows,
        )


if __name__ == "__main__":
    main()
