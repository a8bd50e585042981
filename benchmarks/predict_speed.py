"""How fast are predictions: ours against transformers.pipeline and against a plain map_batches, in turns.

    python benchmarks/predict_speed.py --texts 1000 --job-texts 4000 --pairs 5

Texts are made on the spot: frequent words of MiniLM's vocabulary, in number log-normal (median 40). The
classifier is MiniLM with a fresh head. First one model in one process without Ray, against
transformers.pipeline; then whole executions in one Ray, against a plain map_batches of the same number of
actors and threads. They run in turns; the ratio is the median of the pairs' own. 0 texts of either leaves it
out.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pairs import HEADER, in_turns, ratio_line

BATCH = 32
LABELS = 5


def make_classifier(folder: str) -> str:
    """MiniLM's own weights where they are installed, random ones of its size otherwise."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llkd_ray.student.model import resolve_model

    source = resolve_model("minilm")
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=LABELS).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def make_texts(n: int, folder: str, seed: int) -> list[str]:
    """Words by Zipf's law, 3 to 400 of them."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    words = np.array(
        sorted((w for w in vocabulary if w.isalpha() and len(w) > 1), key=vocabulary.__getitem__)
    )
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, len(words) + 1)
    counts = np.clip(rng.lognormal(np.log(40), 0.9, n), 3, 400).astype(int)
    return [" ".join(rng.choice(words, count, p=share / share.sum())) for count in counts]


Seconds = tuple[float, float]
"""On the clock, and of processor time, which other work on the machine disturbs less."""


def timed(work: Callable[[], Any]) -> Seconds:
    began, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - processor


def their_model(folder: str, texts: list[str], max_tokens: int) -> Callable[[], Any]:
    from transformers import pipeline

    classify = pipeline("text-classification", model=folder, top_k=None, device="cpu")
    return lambda: classify(texts, batch_size=BATCH, truncation=True, max_length=max_tokens)


def our_model(folder: str, texts: list[str], max_tokens: int, dtype: str, tokens: int) -> Callable[[], Any]:
    import torch

    from llkd_ray.storage.checkpoints import inspect
    from llkd_ray.student.inference import load, score

    student = load(inspect(folder), dtype, torch.device("cpu"))
    print(f"{dtype}: {'bf16 autocast' if student.autocast else 'float32'}")
    return lambda: score(student, texts, max_tokens, tokens)


class Classifier:
    """As in Ray's guide to batch inference, with batches inside of the pipeline, too."""

    def __init__(self, folder: str, max_tokens: int) -> None:
        from transformers import pipeline

        self.classify = pipeline("text-classification", model=folder, top_k=None)
        self.max_tokens = max_tokens

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        began = time.time()
        found = self.classify(
            batch["text"].tolist(), batch_size=BATCH, truncation=True, max_length=self.max_tokens
        )
        batch["label"] = np.array([one[0]["label"] for one in found])
        batch["confidence"] = np.array([one[0]["score"] for one in found])
        batch["began"] = np.full(len(found), began)
        batch["ended"] = np.full(len(found), time.time())
        return batch


def plain_job(folder: str, corpus: str, max_tokens: int, actors: int, rows: int) -> tuple[float, float]:
    """Seconds of the whole, and from the first batch's beginning to the last one's end."""
    import ray

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        ray.data.read_parquet(corpus, override_num_blocks=4 * actors).map_batches(
            Classifier,
            fn_constructor_args=(folder, max_tokens),
            batch_size=rows,
            num_cpus=0.5,  # with more, its reading finds no room beside actors on all cores, and it hangs
            compute=ray.data.ActorPoolStrategy(size=actors),
        ).write_parquet(out)
        whole = time.perf_counter() - began
        times = pq.read_table(out, columns=["began", "ended"])
    return whole, max(times["ended"].to_pylist()) - min(times["began"].to_pylist())


def our_job(
    folder: str, corpus: str, max_tokens: int, pieces: int, flags: dict[str, Any]
) -> tuple[float, float]:
    from llkd_ray.config.base import parse
    from llkd_ray.prediction.config import PredictConfig
    from llkd_ray.prediction.job import predict

    said: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        tree = {"model": folder, "corpus": {"uri": corpus}, "out": out, "piece_rows": pieces}
        predict(parse(PredictConfig, {**tree, "max_tokens": max_tokens, **flags}), said.append)
    rate = float(said[-1].split(", ")[-1].split(" ")[0])
    return time.perf_counter() - began, pq.read_table(corpus).num_rows / rate


def rows(title: str, n: int, pairs: list[tuple[Seconds, Seconds]], second: str) -> list[str]:
    """Two lines of the table, one of either clock."""
    return [
        ratio_line(name, [(n / ours[clock], n / theirs[clock]) for ours, theirs in pairs], "texts/s")
        for clock, name in enumerate((title, f"{title}, {second}"))
    ]


def compare_models(options: argparse.Namespace, folder: str, texts: list[str]) -> list[str]:
    theirs = their_model(folder, texts, options.max_tokens)
    ours = {
        dtype: our_model(folder, texts, options.max_tokens, dtype, options.batch_tokens)
        for dtype in options.dtypes
    }
    for work in (theirs, *ours.values()):
        work()
    lines = []
    for dtype, work in ours.items():
        pairs = in_turns(partial(timed, work), partial(timed, theirs), options.pairs)
        lines += rows(f"one model, {dtype}", len(texts), pairs, "per processor second")
    return lines


def compare_jobs(options: argparse.Namespace, folder: str, texts: list[str], place: str) -> list[str]:
    import ray

    # A file for each batch: of one small file, read_parquet makes one block, which one actor would have.
    rows_a_file = min(1000, -(-len(texts) // (4 * options.cpus)))
    corpus = f"{place}/corpus"
    os.mkdir(corpus)
    for start in range(0, len(texts), rows_a_file):
        part = pa.table({"text": texts[start : start + rows_a_file]})
        pq.write_table(part, f"{corpus}/{start:08d}.parquet")
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.init(num_cpus=options.cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    dtype = options.dtypes[-1]
    flags = {
        "dtype": dtype,
        "batch_tokens": options.batch_tokens,
        "workers": (options.cpus,) * 2,
        "threads": 1,
    }
    ours = partial(our_job, folder, corpus, options.max_tokens, rows_a_file, flags)
    theirs = partial(plain_job, folder, corpus, options.max_tokens, options.cpus, rows_a_file)
    pairs = in_turns(ours, theirs, options.pairs)
    ray.shutdown()
    return rows(f"whole job, {dtype}", len(texts), pairs, "behind the start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=1000, help="scored by one model in one process")
    parser.add_argument("--job-texts", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "auto"])
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="of the jobs: actors of one thread")
    parser.add_argument("--threads", type=int, default=1, help="of the one model")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    lines = [HEADER]
    with tempfile.TemporaryDirectory() as place:
        folder = make_classifier(f"{place}/model")
        texts = make_texts(max(options.texts, options.job_texts), folder, seed=0)
        if options.texts:
            lines += compare_models(options, folder, texts[: options.texts])
        if options.job_texts:
            lines += compare_jobs(options, folder, texts[: options.job_texts], place)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
