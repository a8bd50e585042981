"""Real ranks for tests: processes that train in gloo groups. Imports little, as every process does so."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from llkd_ray.config.schema import LabelsConfig, StudentConfig
from llkd_ray.student.model import build_student
from llkd_ray.student.train import Batch, train_round

# What held a process group, to the end of the process. A group that is freed just after its last exchange can
# hang: its destructor waits, with the GIL held, for a thread that needs the GIL to let go of that exchange.
_KEPT: list[nn.Module] = []


@dataclass(frozen=True)
class Job:
    """A round to train on each of several numbers of ranks."""

    configs: tuple[StudentConfig, ...]
    labels: LabelsConfig
    batch: Batch
    worlds: tuple[int, ...]


def train_on_ranks(job: Job, folder: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """For each config, by its place, and each world size: what every rank returned, with ``weights``."""
    # Not forked: a fork of a process whose OpenMP threads have run hangs at its first parallel loop.
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, job, folder)) for rank in range(max(job.worlds))]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    finally:
        for rank in ranks:
            rank.kill()  # where one has failed, the others wait for it
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks)
    places = [(i, world) for i in range(len(job.configs)) for world in job.worlds]
    return {(i, world): [_load(folder, i, world, rank) for rank in range(world)] for i, world in places}


def without_dropout(model: nn.Module) -> None:
    """Its noise depends on the shape of a rank's batch, so ranks could not agree exactly."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def gradient_steps(parameters: Sequence[Any], lr: float, **_: Any) -> torch.optim.Optimizer:
    """Plain descent in AdamW's place, which makes whole steps of gradients that are nothing but rounding."""
    return torch.optim.SGD(parameters, lr=lr)


def _rank(rank: int, job: Job, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.optim.AdamW = gradient_steps  # type: ignore[assignment,misc]
    for i, config in enumerate(job.configs):
        for world in job.worlds:
            if rank < world:
                torch.save(
                    _train(rank, world, config, job, folder / f"store-{i}-{world}"),
                    _file(folder, i, world, rank),
                )


def _train(rank: int, world: int, config: StudentConfig, job: Job, store: Path) -> dict[str, Any]:
    learner = build_student(config, job.labels, 0, torch.device("cpu"))
    without_dropout(learner.model)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        learner.model = nn.parallel.DistributedDataParallel(learner.model)
    facts: dict[str, Any] = dict(train_round(learner, job.batch, config, rank=rank, world=world, seed=1))
    flat = np.concatenate([value.numpy().ravel() for value in learner.module.state_dict().values()])
    if world > 1:
        dist.destroy_process_group()
        _KEPT.append(learner.model)
    return facts | {"weights": torch.tensor(flat)}


def _file(folder: Path, i: int, world: int, rank: int) -> Path:
    return folder / f"result-{i}-{world}-{rank}.pt"


def _load(folder: Path, i: int, world: int, rank: int) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(_file(folder, i, world, rank))
    return result
