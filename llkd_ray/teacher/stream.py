"""The stream of tickets: leased, labelled, written to files and reported to the selector.

One Ray Data execution lasts for the whole run, so every engine starts once:

    tickets → Leaser (gets rows from the selector, reads their texts) → pool of teacher actors → receipts

A teacher stage takes the texts of one ticket, writes their label file and then calls the selector. A cascade
has two pools in sequence: the small teacher's file is written before the large one starts on the ticket.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llkd_ray.cluster import Background
from llkd_ray.config.schema import Config
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.resources import LEASER_CPUS, of_one_part
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import RunStore
from llkd_ray.storage.tables import Examples
from llkd_ray.teacher.factory import cache_key
from llkd_ray.teacher.worker import LargeStage, OnlyStage, SmallStage, Stage

_LEASED = pa.schema([pa.field("ticket", pa.int32()), *tables.NUMBERED_EXAMPLES])


class Leaser:
    """Turns a ticket into the texts that need a label."""

    def __init__(self, store_uri: str, selector: Any) -> None:
        self.examples = Examples.open(RunStore(store_uri))
        self.selector = selector

    async def __call__(self, tickets: pa.Table) -> AsyncIterator[pa.Table]:
        for number in tickets["ticket"].to_pylist():
            ticket, rows = await self.selector.lease.remote(number)
            texts = await asyncio.to_thread(self.examples.read, rows, ["id", "text", "text_hash"])
            column = pa.array(np.full(len(texts), ticket, dtype=np.int32))
            leased = texts.add_column(0, "ticket", column)
            yield leased.cast(pa.schema([_LEASED.field(name) for name in leased.column_names]))


def start_stream(config: Config, store_uri: str, selector: Any, tickets: Sequence[int]) -> Background:
    """Start the Ray Data execution that labels the tickets."""
    groups: list[PlacementGroup] = []
    stream = _build_stream(config, store_uri, selector, tickets, groups)

    def consume() -> None:
        try:
            for _ in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
                pass
        finally:
            for group in groups:
                ray.util.remove_placement_group(group)

    return Background("ticket-stream", consume)


def spare_tickets(config: Config) -> range:
    """One spare ticket for each ticket that teachers could return before they are all lost.

    They come before all others, because the others may wait for a returned ticket.
    """
    n = sum(teacher.max_actors * teacher.tickets_in_flight for _, teacher in config.teacher.members())
    return range(-n, 0)


def _build_stream(
    config: Config, store_uri: str, selector: Any, tickets: Sequence[int], groups: list[PlacementGroup]
) -> Any:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # They warn about every actor that holds a model without a memory request. They also evaluate an actor's
    # resources at each check, which would create an unused placement group that holds GPUs.
    context.issue_detectors_config.detectors = []
    # An actor takes no more tickets than it works on, so utilization never exceeds 1.0. By default, Ray Data
    # scales up only once tickets queue at the actors, and tickets must not be assigned that early.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    # No read task: it would request a whole CPU, and the student's ranks may hold all CPUs permanently.
    source = ray.data.from_items([{"ticket": t} for t in tickets], override_num_blocks=len(tickets))
    stages: list[type[Stage]] = [OnlyStage]
    if config.teacher.kind == "cascade":
        stages = [SmallStage, LargeStage]
    members = [teacher for _, teacher in config.teacher.members()]
    arguments: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    stream = source.map_batches(
        Leaser,
        fn_constructor_args=(store_uri, selector),
        compute=_pool(1, 1, 2 * sum(one.max_actors for one in members) + 2 + len(spare_tickets(config))),
        num_cpus=LEASER_CPUS,
        **arguments,
    )
    for stage, teacher in zip(stages, members, strict=True):
        # map_batches() rejects a stage on GPUs without a batch size; here a block is one ticket.
        stream = stream.map_batches_internal(
            stage,
            fn_constructor_args=(
                config,
                store_uri,
                selector,
                None,
                cache_key(config, teacher),
                _leave_placement_group,
            ),
            compute=_pool(teacher.min_actors, teacher.max_actors, teacher.tickets_in_flight),
            **_resources(teacher, groups),
            **arguments,
        )
    return stream


def _resources(teacher: TeacherConfig, groups: list[PlacementGroup]) -> dict[str, Any]:
    """Ray resources of an actor; an engine in several parts gets a placement group for its parts.

    Groups that are created are added to ``groups``; they exist until they are removed explicitly.
    """
    if not teacher.is_placed_in_parts:
        booked = {"num_cpus": teacher.cpus * teacher.parts, "num_gpus": teacher.n_gpus or None}
        return booked | ({"resources": teacher.resources} if teacher.resources else {})
    return {"num_cpus": teacher.cpus, "ray_remote_args_fn": partial(_in_placement_group, teacher, groups)}


def _in_placement_group(teacher: TeacherConfig, groups: list[PlacementGroup]) -> dict[str, Any]:
    """Resources of one actor; called by Ray Data in the driver."""
    bundles = [of_one_part(teacher) for _ in range(teacher.parts)]
    # Tensor-parallel parts communicate for every token, so they stay on one node.
    strategy = "STRICT_PACK" if teacher.pipeline_parallel == 1 else "PACK"
    group = ray.util.placement_group(bundles, strategy=strategy, name=f"teacher-{uuid.uuid4().hex}")
    groups.append(group)
    return {
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, placement_group_capture_child_tasks=True
        )
    }


def _leave_placement_group(teacher: TeacherConfig) -> None:
    """Remove the placement group of this actor's engine, if it has one.

    A pool that shrinks drops the actor; its group would exist until the run ends, and a pool that grows
    again creates another one.
    """
    if teacher.is_placed_in_parts and ray.is_initialized():
        group = ray.util.get_current_placement_group()
        if group is not None:
            ray.util.remove_placement_group(group)


def _pool(fewest: int, most: int, tickets: int) -> ActorPoolStrategy:
    """Between ``fewest`` and ``most`` actors, each working on some tickets concurrently."""
    return ActorPoolStrategy(
        min_size=fewest,
        max_size=most,
        max_tasks_in_flight_per_actor=tickets,
        max_concurrent_calls_per_actor=tickets,
    )
