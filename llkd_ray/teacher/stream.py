"""The stream of tickets: what is leased, asked, put into files and told to the selector.

One Ray Data execution lives as long as the run, so every engine starts once:

    tickets → Leaser (asks the selector for rows, reads their texts) → pool of teacher actors → receipts

A teacher stage takes the texts of one ticket, writes their label file and then tells the selector. A cascade
has two pools, one behind the other: the small teacher's file is written before the large one is asked.
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
from llkd_ray.teacher.cascade import LargeStage, SmallStage
from llkd_ray.teacher.factory import cache_key
from llkd_ray.teacher.worker import OnlyStage, Stage

_LEASED = pa.schema([pa.field("ticket", pa.int32()), *tables.NUMBERED_EXAMPLES])


class Leaser:
    """Turns a ticket into the texts that are worth labelling now."""

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
    """One ticket for each that teachers could give back before they are all lost.

    They come before all others: a ticket that was given back may be what the others wait for.
    """
    n = sum(teacher.max_actors * teacher.tickets_in_flight for _, teacher in config.teacher.members())
    return range(-n, 0)


def _build_stream(
    config: Config, store_uri: str, selector: Any, tickets: Sequence[int], groups: list[PlacementGroup]
) -> Any:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # They warn of every actor that holds a model without booking memory, and ask what an actor would book as
    # often as they look: each time, a placement group would be made that nobody uses and that holds its GPUs.
    context.issue_detectors_config.detectors = []
    # An actor takes no more tickets than it works on, so a pool is never busier than this: by default, Ray
    # Data waits for a queue at the actors before it adds one, and tickets are not to be bound before their
    # time.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    # No read task: one would ask for a whole CPU, which the student's ranks may hold for good.
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
        # The form without a check that refuses a teacher on GPUs without a batch size: a block is one ticket.
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
    """What Ray books for an actor: for an engine in several parts, a placement group that its parts find.

    Groups that are made are noted in ``groups``; they stay until somebody removes them.
    """
    if not teacher.is_placed_in_parts:
        booked = {"num_cpus": teacher.cpus * teacher.parts, "num_gpus": teacher.gpus or None}
        return booked | ({"resources": teacher.resources} if teacher.resources else {})
    return {"num_cpus": teacher.cpus, "ray_remote_args_fn": partial(_in_placement_group, teacher, groups)}


def _in_placement_group(teacher: TeacherConfig, groups: list[PlacementGroup]) -> dict[str, Any]:
    """For one actor; called by Ray Data in the driver."""
    bundles = [of_one_part(teacher) for _ in range(teacher.parts)]
    # The parts of a layer talk to each other for every token, so they stay on one node.
    strategy = "STRICT_PACK" if teacher.pipeline_parallel == 1 else "PACK"
    group = ray.util.placement_group(bundles, strategy=strategy, name=f"teacher-{uuid.uuid4().hex}")
    groups.append(group)
    return {
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, placement_group_capture_child_tasks=True
        )
    }


def _leave_placement_group(teacher: TeacherConfig) -> None:
    """Give back what was booked for the engine in parts of the actor that this runs in, if it is one.

    A pool that shrinks drops the actor; its group would stay until the run ends, and a pool that grows
    again makes another one.
    """
    if teacher.is_placed_in_parts and ray.is_initialized():
        group = ray.util.get_current_placement_group()
        if group is not None:
            ray.util.remove_placement_group(group)


def _pool(fewest: int, most: int, tickets: int) -> ActorPoolStrategy:
    """From so many to so many actors, each at work on some tickets at a time."""
    return ActorPoolStrategy(
        min_size=fewest,
        max_size=most,
        max_tasks_in_flight_per_actor=tickets,
        max_concurrent_calls_per_actor=tickets,
    )
