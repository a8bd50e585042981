"""What does a round cost besides its work: ours against a new trainer and a new actor pool each round.

    python benchmarks/round_overhead.py --rounds 10 --pairs 5

Toy texts, a recorded teacher and a BERT of two narrow layers, so that teaching, scoring and training take
next to nothing. Ours is a whole run: seconds from one round's line of metrics to the next, median of all but
the first, which waits for the start that a run has once. Theirs does the same for the texts of a round as one
would string the libraries together: a Ray Data execution whose actors look answers up, a choice by confidence
× uncertainty, and a ``TorchTrainer.fit()`` that loads the last checkpoint, trains, scores all labelled texts,
evaluates and leaves a checkpoint; both in the same Ray, in turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.train
from pairs import HEADER, in_turns, ratio_line

from llkd_ray.config.loading import parse_config
from llkd_ray.config.schema import Config
from llkd_ray.display import Display
from llkd_ray.run.loop import distill
from llkd_ray.storage.run_dir import METRICS, RunStore
from llkd_ray.student.inference import predict
from llkd_ray.student.model import as_student, build_student
from llkd_ray.student.train import Batch, train_round

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import toys

POOL, TEST, TRAIN, LEASE = 640, 100, 240, 32


class Clock(Display):
    """Notes when each round's line of metrics is written."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def say(self, line: str) -> None:
        if line.startswith("round "):
            self.times.append(time.perf_counter())

    def update(self, line: str, rows: Sequence[tuple[str, str]] = ()) -> None:
        pass


def our_round(config: Config, folder: Path, parts: list[dict[str, float]]) -> float:
    """Seconds of a round in a whole run; what it consists of goes to ``parts``."""
    clock = Clock()
    store = RunStore(tempfile.mkdtemp(dir=folder))
    distill(config, store.root, clock)
    assert store.exists(METRICS)
    parts += [line["seconds"] for line in store.read_metrics()[1:]]
    return statistics.median(np.diff(clock.times).tolist())


class Recorded:
    """The teacher, as an actor of Ray Data."""

    def __init__(self, answers: str) -> None:
        table = pq.read_table(answers)
        self.probs = dict(zip(table["id"].to_pylist(), table["probs"].to_pylist(), strict=True))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return {**batch, "probs": np.array([self.probs[one] for one in batch["id"]])}


def fit(settings: dict[str, Any]) -> None:
    """One round of theirs on a rank."""
    import torch
    from ray.train.torch import prepare_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config: Config = settings["config"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if settings["checkpoint"]:
        model = AutoModelForSequenceClassification.from_pretrained(settings["checkpoint"])
        tokenizer = AutoTokenizer.from_pretrained(settings["checkpoint"])
        student = as_student(model, tokenizer, config.student.precision, device)
    else:
        student = build_student(config.student, config.labels, 0, device)
    student.model = prepare_model(student.model)
    train_round(student, settings["batch"], config.student, rank=rank, world=world)
    p_NC = predict(student, settings["labelled"], config.student)
    predict(student, settings["test"], config.student)
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            student.module.save_pretrained(folder)
            student.tokenizer.save_pretrained(folder)
            np.save(f"{folder}/scores.npy", p_NC)
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder) if rank == 0 else None)


def their_round(config: Config, folder: Path, state: dict[str, Any]) -> float:
    """Seconds of the next round; ``state`` is what is left of the ones before."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    began = time.perf_counter()
    pool, rounds = state["pool"], config.budget.rounds
    done, size = state["labels"].num_rows, len(pool) // rounds
    if done + size > len(pool):
        state.update(labels=state["labels"].slice(0, 0), checkpoint=None)
        done = 0
    new = ray.data.from_arrow(pool.slice(done, size)).map_batches(
        Recorded,
        fn_constructor_args=(config.teacher.recorded.uri,),
        batch_size=LEASE,
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    labels = pa.concat_tables([state["labels"], pa.Table.from_pylist(new.take_all(), state["labels"].schema)])
    p_NC = np.array(labels["probs"].to_pylist())
    value_N = p_NC.max(axis=1)
    if state["checkpoint"]:
        scored_NC = np.load(f"{state['checkpoint']}/scores.npy")
        value_N[: len(scored_NC)] *= -(scored_NC * np.log(scored_NC + 1e-9)).sum(axis=1)
    chosen = np.argsort(-value_N)[: TRAIN // rounds]
    texts = labels["text"].to_pylist()
    batch = Batch([texts[i] for i in chosen], p_NC[chosen].argmax(1), np.ones(chosen.size), p_NC[chosen])
    settings = {"config": config, "batch": batch, "labelled": texts, "test": state["test"]}
    result = TorchTrainer(
        fit,
        train_loop_config={**settings, "checkpoint": state["checkpoint"]},
        scaling_config=ScalingConfig(
            num_workers=config.student.max_workers, resources_per_worker={"CPU": 0.5}
        ),
        run_config=RunConfig(storage_path=tempfile.mkdtemp(dir=folder)),
    ).fit()
    assert result.checkpoint is not None
    state.update(labels=labels, checkpoint=result.checkpoint.path)
    return time.perf_counter() - began


def make_config(folder: Path, rounds: int, workers: int) -> Config:
    """All that a run reads, made in a folder."""
    pool = toys.write_corpus(folder / "pool.parquet", POOL, seed=1)
    test = toys.write_corpus(folder / "test.parquet", TEST, seed=2)
    answers = toys.write_answers(folder / "answers.parquet", [pool, test])
    tree = toys.config_tree(
        corpus={"uri": str(pool)},
        test={"uri": str(test)},
        teacher={"recorded": {"uri": str(answers)}, "ticket_size": LEASE},
        student={
            "model": toys.save_tiny_encoder(folder / "student"),
            "workers": workers,
            "threads": 1,
            "epochs": 1,
            "min_steps": 1,
        },
        budget={"labels": POOL, "train": TRAIN, "rounds": rounds},
    )
    return parse_config(tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="ranks of the student")
    options = parser.parse_args()
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # for both; as a run of ours sets it
    parts: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="llkd-") as place:
        folder = Path(place)
        config = make_config(folder, options.rounds, options.workers)
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=f"{place}/ray")
        pool = pq.read_table(config.corpus.uri, columns=["id", "text"])
        schema = pool.schema.append(pa.field("probs", pa.list_(pa.float64())))
        state = {
            "pool": pool,
            "test": pq.read_table(f"{place}/test.parquet")["text"].to_pylist(),
            "labels": schema.empty_table(),
            "checkpoint": None,
        }
        found = in_turns(
            partial(our_round, config, folder, parts),
            partial(their_round, config, folder, state),
            options.pairs,
        )
        ray.shutdown()
    print(f"Python {platform.python_version()}, ray {ray.__version__}")
    print("\n".join([HEADER, ratio_line("a round", found, "s")]))
    medians = {key: statistics.median(part[key] for part in parts) for key in parts[0]}
    print("ours, median seconds: " + ", ".join(f"{key} {value:.3f}" for key, value in medians.items()))


if __name__ == "__main__":
    main()
