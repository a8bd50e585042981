"""Screen selection and acquisition policies in minutes: a comparison with a stand-in for the student.

The stand-in is logistic regression, on TF-IDF or on sentence embeddings of the student's checkpoint, trained
anew in every round. It says which ideas are worth the hours of `jobs/compare.py`, not how good they are: it
takes noise and order otherwise than a fine-tuned encoder, and its figures are lower. Table and policies are
those of a run.

    python benchmarks/screen_policies.py configs/compare_pubmed_rct.yaml --features student --seeds 0 1 2
    python benchmarks/screen_policies.py configs/compare_pubmed_rct.yaml \\
        --line 'half the labels={selection: {policy: llkd_sample}, budget: {labels: 3992, first_labels: 0.3}}'
    python benchmarks/screen_policies.py configs/compare_pubmed_rct.yaml --against-rest objective
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from llkd_ray.cluster import connect
from llkd_ray.comparison.settings import REFERENCES, changed, load_comparison, teacher_config
from llkd_ray.comparison.tables import ALL, GOLD
from llkd_ray.comparison.trial import CPU, Labels, Texts, Trial, gold_labels, read_teacher, read_texts
from llkd_ray.config.base import with_absolute_paths
from llkd_ray.config.loading import load_config
from llkd_ray.config.schema import Config, LabelsConfig, StudentConfig
from llkd_ray.corpus.ingest import ingest
from llkd_ray.display import Display
from llkd_ray.metrics.uncertainty import StudentScores
from llkd_ray.selection.table import ScoreTable
from llkd_ray.storage.run_dir import RunStore
from llkd_ray.storage.tables import Examples
from llkd_ray.student.inference import by_length
from llkd_ray.student.model import build_student
from llkd_ray.student.train import Batch

Predict = Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Features:
    """Of pool (N rows) and test set (T rows); sparse or dense."""

    x_N: Any
    x_T: Any
    c: float
    """Inverse strength of the stand-in's regularisation that suits them."""


def tfidf(texts: Texts) -> Features:
    """Of words and pairs of words."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    return Features(vectorizer.fit_transform(texts.pool), vectorizer.transform(texts.test), c=10.0)


def embeddings(texts: Texts, config: StudentConfig, labels: LabelsConfig) -> Features:
    """Mean of the last hidden states of the student's checkpoint, as it is before training, at length one."""
    student = build_student(config, labels, seed=0, device=CPU)
    encoder = student.module.base_model.eval()

    @torch.inference_mode()
    def embed(part: list[str]) -> np.ndarray:
        x_NF = np.empty((len(part), encoder.config.hidden_size), dtype=np.float32)
        tokens_N = student.encode(part, config.max_tokens)
        for index_B in by_length(tokens_N, config.score_batch_size):
            inputs = student.tokenizer.pad([tokens_N[i] for i in index_B], return_tensors="pt")
            is_text = inputs["attention_mask"][:, :, None]
            mean_BF = (encoder(**inputs).last_hidden_state * is_text).sum(dim=1) / is_text.sum(dim=1)
            x_NF[index_B] = torch.nn.functional.normalize(mean_BF).numpy()
        return x_NF

    return Features(embed(texts.pool), embed(texts.test), c=30.0)


def fit(x_M: Any, batch: Batch, c: float) -> Predict:
    """A stand-in student; its answers have a column for every class, seen or not.

    What it is to reckon with is put on afterwards: scikit-learn's model takes no shift in training.
    """
    n_classes = batch.p_NC.shape[1]
    seen = np.unique(batch.label_N)
    if seen.size == 1:
        return lambda x: np.eye(n_classes)[np.full(x.shape[0], seen[0])]
    model = LogisticRegression(C=c, max_iter=300).fit(x_M, batch.label_N, sample_weight=batch.weight_N)

    shift_C = batch.logit_shift()

    def predict(x: Any) -> np.ndarray:
        p_NC = np.zeros((x.shape[0], n_classes))
        p_NC[:, seen] = softmax(model.predict_log_proba(x) - shift_C[seen], axis=1)
        return p_NC

    return predict


def screen(trial: Trial, texts: Texts, features: Features, labels: Labels) -> list[tuple[float, float]]:
    """Accuracy and macro-F1 at every reported size."""
    config, n_classes = trial.config, len(texts.names)
    table = ScoreTable(n_classes, len(texts.pool))
    predict: Predict | None = None
    row_M, weight_M, figures = np.empty(0, dtype=np.int64), np.empty(0), []
    for k, size in enumerate(trial.sizes):
        n = trial.labelled_before(k, len(table)) - table.count_labelled()
        rng = np.random.default_rng([config.run.seed, 2, k])
        seed, explore = config.run.seed, config.acquisition.explore
        read_M = trial.acquisition.choose(table.unread(), n, rng, seed=seed, explore=explore)
        p_MC = labels.p_NC[read_M]
        table.lease(k, read_M)
        table.put_labels(read_M, p_MC.argmax(axis=1), p_MC.max(axis=1), np.zeros(read_M.size, dtype=np.int8))
        selection = trial.round_selection(table, k)
        if predict:
            to_score = selection.to_score()
            p_SC = predict(features.x_N[to_score])
            table.refresh(k, to_score, StudentScores.of(p_SC, table.label[to_score]))
        chosen = selection.choose(size - row_M.size)
        row_M, weight_M = np.append(row_M, chosen.row_M), np.append(weight_M, chosen.weight_M)
        table.mark_trained(k, row_M)
        prior_C = trial.prior(table.labelled_of_class(k + 1))
        batch = Batch([], table.label[row_M].astype(np.int64), weight_M, labels.p_NC[row_M], prior_C)
        predict = fit(features.x_N[row_M], batch, features.c)
        if size in trial.reported:
            answer_T = predict(features.x_T).argmax(axis=1)
            f1 = f1_score(texts.gold_T, answer_T, average="macro", zero_division=0)
            figures.append((float(accuracy_score(texts.gold_T, answer_T)), float(f1)))
    return figures


def one_against_rest(
    texts: Texts, labels: Mapping[str, Labels], name: str
) -> tuple[Texts, dict[str, Labels]]:
    """The same texts and teachers, asked only whether a text is of one class."""
    c = texts.names.index(name)
    gold_N, gold_T = ((gold == c).astype(np.int64) for gold in (texts.gold_N, texts.gold_T))
    collapsed = {
        teacher: replace(of, p_NC=np.stack([1 - of.p_NC[:, c], of.p_NC[:, c]], axis=1))
        for teacher, of in labels.items()
    }
    return replace(texts, gold_N=gold_N, gold_T=gold_T, names=("rest", name)), collapsed


def read(base: Config, display: Display) -> Examples:
    """The corpus by the same way as a run's, in a folder that lasts as long as this program."""
    folder = tempfile.mkdtemp(prefix="screen-")
    with connect(base.run.address):
        return ingest(base, RunStore(folder), display.say)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Screen policies with a stand-in for the student.")
    parser.add_argument("comparison", help="a YAML file as of jobs/compare.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--features", choices=("tfidf", "student"), default="tfidf")
    parser.add_argument("--against-rest", metavar="LABEL", help="two classes: this one, and all others")
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
        features = (
            tfidf(texts) if options.features == "tfidf" else embeddings(texts, base.student, base.labels)
        )
        n_pool = examples.n_pool
        teachers = {
            name: read_teacher(teacher_config(base, changes), examples)[0]
            for name, changes in comparison.teachers.items()
        }
        truth = {GOLD: gold_labels(examples, texts)}
        if options.against_rest:
            _, truth = one_against_rest(texts, truth, options.against_rest)
            texts, teachers = one_against_rest(texts, teachers, options.against_rest)
        small = [
            tuple(round(share * n_pool) for share in shares)
            for shares in (comparison.sizes, comparison.reported)
        ]
        rows = []
        for line, changes in {**REFERENCES, **comparison.lines, **more}.items():
            sizes, reported = ((n_pool,), (n_pool,)) if line in (GOLD, ALL) else small
            cells, sums = [], []
            for labels in (truth if line == GOLD else teachers).values():
                trials = [
                    Trial(changed(base, changes, seed), sizes, reported, Path()) for seed in options.seeds
                ]
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
