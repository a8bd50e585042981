"""Integration with Ray Train: one DDP run that lasts for the whole distillation, round by round.

All ranks run :func:`train_loop`. They get the rows to score and the batches to train on from the selector,
so a run that is restarted, with the same number of ranks or a different one, resumes from its files.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from llkd_ray.cluster import Background, remove_left_groups
from llkd_ray.config.schema import Config
from llkd_ray.metrics.uncertainty import StudentScores
from llkd_ray.resources import of_a_rank
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import CHECKPOINTS_DIR, RunStore, predictions_file
from llkd_ray.storage.tables import AuditAnswers, Examples, list_column, matrix_of
from llkd_ray.student.inference import predict
from llkd_ray.student.model import Student, build_student, learning_rate, load_classifier
from llkd_ray.student.train import Batch, train_round

TRAIN_RUN = "student"
ROUND_PREFIX = "round-"
"""Prefix of the name of a checkpoint's folder."""
SCORE_CHUNK = 16_384
"""Rows that a rank reads, scores and reports at a time."""


def start_training(config: Config, store: RunStore, selector: Any) -> Background:
    """Start the training of all rounds."""
    return Background("training-run", lambda: _keep_training(config, store, selector))


def _keep_training(config: Config, store: RunStore, selector: Any) -> None:
    """Train until the rounds are over; if a Ray Train run fails, start another.

    ``student.max_failures`` counts failures without a finished round in between. Ray Train counts them from
    the start of the run: over days on pre-emptible nodes, any limit would be too small. A failure that
    repeats in the same round still ends the training.
    """
    if _starts_after_labels(config):
        ray.get(selector.wait_first_labels.remote())
    losses = 0
    while True:
        began_at = ray.get(selector.next_round.remote())
        try:
            _build_trainer(config, store, selector).fit()
            return
        except (TrainingFailedError, RayActorError) as error:
            has_moved = ray.get(selector.next_round.remote()) > began_at
            losses = 0 if has_moved else losses + 1
            # Ray Train has already retried failed ranks, but not the death of its own controller.
            as_often = 0 if isinstance(error, TrainingFailedError) else config.student.max_failures
            if losses > as_often or not config.student.max_failures:
                raise
            if isinstance(error, RayActorError):
                remove_left_groups(_resources(config))


def _starts_after_labels(config: Config) -> bool:
    """Whether ranks wait for the first labels, as an engine on CPUs starts faster on an idle machine.

    Not where a pool of teachers may grow: it could take the resources reserved for the ranks.
    """
    teachers = [teacher for _, teacher in config.teacher.members()]
    return all(one.kind == "vllm" and not one.n_gpus and one.min_actors == one.max_actors for one in teachers)


def _resources(config: Config) -> dict[str, float]:
    """Resources reserved by a rank."""
    return {name: amount for name, amount in of_a_rank(config.student).items() if amount}


def _build_trainer(config: Config, store: RunStore, selector: Any) -> TorchTrainer:
    student = config.student
    return TorchTrainer(
        train_loop,
        train_loop_config={"config": config, "store_uri": store.uri(), "selector": selector},
        scaling_config=ScalingConfig(
            num_workers=student.workers,  # type: ignore[arg-type]  # Ray's annotation lacks (min, max)
            use_gpu=student.n_gpus > 0,
            resources_per_worker=_resources(config),
            elastic_resize_monitor_interval_s=student.resize_s,  # type: ignore[call-arg]  # of Ray Train v2
        ),
        run_config=RunConfig(
            name=TRAIN_RUN,
            storage_path=store.path(CHECKPOINTS_DIR),
            storage_filesystem=store.fs,
            failure_config=FailureConfig(max_failures=student.max_failures),
        ),
    )


def train_loop(settings: dict[str, Any]) -> None:
    """The loop of every rank, round by round."""
    rank = StudentWorker(**settings)
    for k in range(rank.ask("next_round"), rank.config.budget.rounds):
        try:
            if not rank.run_round(k):
                break
        except FloatingPointError as error:
            # Ray Train would only start the ranks again, and they would diverge again.
            rank.ask("student_failed", rank.describe_divergence(k, error))
            raise


class StudentWorker:
    """One rank of the student: its model, its share of the texts and its connection to the selector."""

    def __init__(self, config: Config, store_uri: str, selector: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.config, self.selector = config, selector
        self.store = RunStore(store_uri)
        self.examples = Examples.open(self.store)
        torch.set_num_threads(config.student.threads or max(1, (os.cpu_count() or 1) // self.world))
        self.batches: dict[str, pa.Table] = {}
        """What the last round was trained on, by file."""
        self.facts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.student = self._build()
        self.first_weights = {key: value.clone() for key, value in self.student.module.state_dict().items()}
        self._restore()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the selector and wait for its reply."""
        return ray.get(getattr(self.selector, method).remote(*arguments))

    def run_round(self, k: int) -> bool:
        """All of a round; False if there is none. Raises FloatingPointError if the student diverges."""
        self.score(k)
        files = self.ask("batch_files", k)
        if files is None:
            return False
        self.train(k, files)
        self.evaluate(k)
        self.report(k)
        return True

    def describe_divergence(self, k: int, error: FloatingPointError) -> str:
        """What happened, and what to do about it."""
        rate = learning_rate(self.config.student, self.student.module.config)
        return (
            f"round {k}: {error}, it has diverged: start a new run with a student.learning_rate below "
            f"{rate:g}; labels that the teacher has given are reused"
        )

    def score(self, k: int) -> None:
        """Update the student's scores of the texts that round ``k`` may choose from."""
        rows, labels = self.ask("rows_to_score", k)
        began = time.monotonic()
        if rows.size:
            mine = np.array_split(np.arange(rows.size), self.world)[self.rank]  # neighbours share row groups
            for start in range(0, mine.size, SCORE_CHUNK):
                self._say(f"round {k}: scoring {min(start + SCORE_CHUNK, mine.size) * self.world} texts")
                chunk = mine[start : start + SCORE_CHUNK]
                p_MC = self._predict(rows[chunk]).astype(np.float32)
                self.ask("refresh", k, rows[chunk], StudentScores.of(p_MC, labels[chunk]))
            dist.barrier()
            if self.rank == 0:
                self.ask("refresh_done", k, rows.size)
        self.seconds = {"refresh": time.monotonic() - began}

    def train(self, k: int, files: list[str]) -> None:
        """Train on the batches that the config selects; an empty new batch leaves the student unchanged."""
        began = time.monotonic()
        config = self.config.student
        wanted = files if config.replay == "all" else files[-1:]
        # Batches of earlier rounds are reused from memory: a batch never changes.
        self.batches = {
            file: self.batches[file] if file in self.batches else self.store.read_table(file)
            for file in wanted
        }
        if len(self.batches[files[-1]]):
            data = pa.concat_tables(self.batches.values())
            # Texts from earlier rounds may have got human labels since.
            data = AuditAnswers.of_round(self.store, k).correct(data, len(self.config.labels.names))
            if config.start == "fresh":
                self.student.module.load_state_dict(self.first_weights)
            batch = Batch(
                data["text"].to_pylist(),
                data["label"].to_numpy(),
                data["weight"].to_numpy(),
                matrix_of(data["probs"], len(self.config.labels.names)),
                self.ask("target_prior", k),
            )
            self.facts = train_round(
                self.student,
                batch,
                config,
                rank=self.rank,
                world=self.world,
                seed=self.config.run.seed * 1_000 + k,
                on_step=lambda step, steps: self._say_step(k, step, steps),
            )
        self.seconds["train"] = time.monotonic() - began

    def evaluate(self, k: int) -> None:
        """Write the student's predictions on test set and hold-out, each rank its share."""
        began = time.monotonic()
        holdout = self.ask("holdout_rows")
        mine = np.concatenate([self.examples.test_rows, holdout])[self.rank :: self.world]
        self._say(f"round {k}: evaluating")
        columns = [pa.array(mine), list_column(self._predict(mine))]
        table = pa.Table.from_arrays(columns, schema=tables.PREDICTIONS)
        self.ask("assert_owner")
        self.store.write_table(predictions_file(k, self.rank, self.world), table)
        self.seconds["evaluate"] = time.monotonic() - began

    def report(self, k: int) -> None:
        """Save the student; once it is saved and all ranks have got here, the round is finished."""
        checkpoint = self._save(k) if self.rank == 0 else None
        ray.train.report({"round": k} | self.facts)
        dist.barrier()  # every rank's predictions are written
        if self.rank == 0:
            facts = {"ranks": self.world, "checkpoint": checkpoint, "seconds": self.seconds}
            self.ask("trained", k, self.facts | facts)
            self._drop_old_checkpoints(k)

    def _save(self, k: int) -> str:
        """Write the student to a folder unique to this attempt, in the run directory; returns the folder.

        Not through Ray Train, which tracks its checkpoints by the names of their folders: a round that is
        trained again, because its end was not recorded, breaks that list, and with it every resume.
        """
        place = f"{CHECKPOINTS_DIR}/{ROUND_PREFIX}{k:04d}-{uuid.uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory() as folder:
            self.student.module.save_pretrained(folder)
            self.student.tokenizer.save_pretrained(folder)
            self.store.upload(folder, place)
        return place

    def _drop_old_checkpoints(self, k: int) -> None:
        """Delete those before the last two rounds: a stale rank, presumed dead, cannot delete newer ones."""
        for name in self.store.folders(CHECKPOINTS_DIR):
            if name.startswith(ROUND_PREFIX) and int(name.split("-")[1]) < k - 1:
                self.store.delete_folder(f"{CHECKPOINTS_DIR}/{name}")

    def _build(self) -> Student:
        device = ray.train.torch.get_device()
        student = build_student(self.config.student, self.config.labels, self.config.run.seed, device)
        student.model = ray.train.torch.prepare_model(student.model)
        return student

    def _restore(self) -> None:
        """Load the student of the last finished round, if there is one."""
        last = self.ask("last_trained")
        if last is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            self.store.download(last["checkpoint"], folder)
            saved = load_classifier(folder, dtype=torch.float32)
            self.student.module.load_state_dict(saved.state_dict())

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        texts = self.examples.read(rows, ["text"])["text"].to_pylist()
        return predict(self.student, texts, self.config.student)

    def _say(self, note: str) -> None:
        if self.rank == 0:
            self.selector.say.remote(note)

    def _say_step(self, k: int, step: int, steps: int) -> None:
        if step % 10 == 0 or step == steps:
            self._say(f"round {k}: training, step {step} of {steps}")
