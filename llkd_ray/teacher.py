"""The stream of tickets: what is leased, asked, put into files and told to the selector.

One Ray Data execution lives as long as the run, so every engine starts once:

    tickets → Leaser (asks the selector for rows, reads their texts) → pool of teacher actors → receipts

A teacher stage takes the texts of one ticket, writes their label file and then tells the selector. A cascade
has two pools, one behind the other: the small teacher's file is written before the large one is asked.
"""

from __future__ import annotations

import asyncio
import errno
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llkd_ray import schemas
from llkd_ray.answers import UNASKED, Labeller, TeacherDown, Usage
from llkd_ray.asker import Asked, Asker
from llkd_ray.cluster import Background
from llkd_ray.config import Config
from llkd_ray.label_files import TicketLabels, in_row_order, read_ticket, ticket_labels, write_ticket
from llkd_ray.room import LEASER_CPUS, of_one_part
from llkd_ray.schedule import Schedule
from llkd_ray.signals import confidence, normalise
from llkd_ray.store import (
    LABELS_DIR,
    QUARANTINE_DIR,
    SMALL_DIR,
    Examples,
    RunStore,
    matrix_of,
    ticket_file,
)
from llkd_ray.teacher_config import TeacherConfig
from llkd_ray.teachers import cache_key

_LEASED = pa.schema([pa.field("ticket", pa.int32()), *schemas.NUMBERED_EXAMPLES])
_RECEIPT = pa.schema([pa.field("ticket", pa.int32()), pa.field("rows", pa.int32())])


class Leaser:
    """Turns a ticket into the texts that are worth labelling now."""

    def __init__(self, store_uri: str, selector: Any) -> None:
        self.examples = Examples.open(RunStore(store_uri))
        self.selector = selector

    async def __call__(self, tickets: pa.Table) -> AsyncIterator[pa.Table]:
        for number in tickets["ticket"].to_pylist():
            ticket, rows = await self.selector.lease.remote(number)
            texts = await asyncio.to_thread(self.examples.read, rows, ["id", "text"])
            column = pa.array(np.full(len(texts), ticket, dtype=np.int32))
            leased = texts.add_column(0, "ticket", column)
            yield leased.cast(pa.schema([_LEASED.field(name) for name in leased.column_names]))


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Stage(ABC):
    """What stages share: one ticket at a call, and what happens when the teacher gives up."""

    member = 0
    """Which of the config's teachers the stage asks."""

    def __init__(
        self,
        config: Config,
        store_uri: str,
        selector: Any,
        labeller: Labeller | None = None,
        key: str | None = None,
        on_drop: Callable[[TeacherConfig], None] | None = None,
    ) -> None:
        self.config = config
        self.store = RunStore(store_uri)
        self.selector = selector
        self.actor = uuid.uuid4().hex
        # No method of its own: that would keep the stage, and with it an engine, alive when it is dropped.
        self.asker = Asker(config, store_uri, self.member, partial(_reserve, selector), labeller, key)
        self.on_drop = on_drop

    def __del__(self) -> None:
        # Ray Data drops the stage when the stream ends; an engine that is left to die with the actor
        # prints errors instead.
        if asker := getattr(self, "asker", None):
            asker.close()
            if self.on_drop:
                self.on_drop(asker.teacher)

    async def __call__(self, leased: pa.Table) -> AsyncIterator[pa.Table]:
        if not len(leased):
            yield self.nothing(leased)
            return
        ticket = leased["ticket"][0].as_py()
        assert leased["ticket"].unique().to_pylist() == [ticket], "a block holds one ticket"
        try:
            done = await self.see_to(ticket, leased)
        except TeacherDown as down:
            await self._give_back(ticket, str(down))
            done = self.nothing(leased)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            await self._give_back(ticket, f"no room to write labels: {error}")
            done = self.nothing(leased)
        yield done

    @abstractmethod
    async def see_to(self, ticket: int, leased: pa.Table) -> pa.Table:
        """See to it that the ticket's file is in place; returns what goes on. Raises TeacherDown."""

    def nothing(self, leased: pa.Table) -> pa.Table:
        """What goes on of a ticket that needs no more."""
        return _RECEIPT.empty_table()

    def is_review(self, ticket: int) -> bool:
        """Whether its texts have labels, at which a cascade's large teacher is to look again."""
        return ticket in self._reviews

    @cached_property
    def _reviews(self) -> range:
        examples = Examples.open(self.store)
        return Schedule.plan(self.config, examples.n_pool, examples.n_test).review_tickets

    async def put(
        self, ticket: int, leased: pa.Table, labels: pa.Table, usage: dict[str, Usage], asked: Asked
    ) -> TicketLabels:
        """Put a finished ticket's labels in place, and in quarantine what came to nothing; returns what the
        selector is to be told.
        """
        has_label_M = pc.is_in(leased["row"], value_set=labels["row"].combine_chunks()).to_numpy(
            zero_copy_only=False
        )
        outcome_M = np.array(asked.outcome_M, dtype=object)
        failed_M = ~has_label_M & (outcome_M != "") & (outcome_M != UNASKED)
        if failed_M.any():
            refused = leased.filter(pa.array(failed_M))
            self._quarantine(ticket, refused, outcome_M[failed_M].tolist())
        unasked = int(np.count_nonzero(~has_label_M & (outcome_M == UNASKED)))
        in_flight = self.asker.teacher.tickets_in_flight
        await asyncio.to_thread(
            write_ticket, self.store, LABELS_DIR, ticket, labels, usage, unasked, in_flight
        )
        await self.asker.forget(asked)
        return ticket_labels(labels, usage, unasked, len(self.config.labels.names))

    async def there(self, ticket: int) -> TicketLabels | None:
        """What the ticket's file says, where an earlier attempt died before it could tell the selector."""
        if not self.store.exists(ticket_file(LABELS_DIR, ticket)):
            return None
        said = await asyncio.to_thread(read_ticket, self.store, LABELS_DIR, ticket)
        return ticket_labels(*said, len(self.config.labels.names))

    async def tell(self, ticket: int, labels: TicketLabels) -> pa.Table:
        """Tell the selector of a ticket whose file is in place; returns the receipt."""
        await self.selector.put_labels.remote(ticket, labels)
        return pa.table({"ticket": [ticket], "rows": [len(labels.row_M)]}, schema=_RECEIPT)

    async def _give_back(self, ticket: int, reason: str) -> None:
        """Let another actor have the ticket, and take no further one before the teaching is over."""
        call = uuid.uuid4().hex
        await self.selector.give_back.remote(ticket, self.asker.name, self.actor, reason, call)
        await self.selector.wait_taught.remote()

    def _quarantine(self, ticket: int, refused: pa.Table, reasons: Sequence[str]) -> None:
        n = len(refused)
        columns = {
            "source": ["teacher"] * n,
            "position": refused["row"],
            "reason": reasons,
            "detail": [f"ticket {ticket}"] * n,
            "start_of_text": [text[:200] for text in refused["text"].to_pylist()],
        }
        table = pa.table(columns, schema=schemas.QUARANTINE)
        self.store.write_table(f"{QUARANTINE_DIR}/teacher-{ticket:08d}.parquet", table)


async def _reserve(selector: Any, ticket: int, attempt: str, teacher: str, usage: Usage) -> bool:
    return await selector.reserve.remote(ticket, attempt, teacher, usage.as_dict())


class OnlyStage(Stage):
    """The one teacher of a run."""

    async def see_to(self, ticket: int, leased: pa.Table) -> pa.Table:
        done = await self.there(ticket)
        if done is None:
            asked = await self.asker.ask(ticket, leased)
            done = await self.put(ticket, leased, asked.labels, {self.asker.name: asked.usage}, asked)
        return await self.tell(ticket, done)


class SmallStage(Stage):
    """A cascade's small teacher: reads all but what is under review, and passes everything on."""

    def nothing(self, leased: pa.Table) -> pa.Table:
        return leased.slice(0, 0)

    async def see_to(self, ticket: int, leased: pa.Table) -> pa.Table:
        is_done = any(self.store.exists(ticket_file(folder, ticket)) for folder in (SMALL_DIR, LABELS_DIR))
        if not is_done and not self.is_review(ticket):
            asked = await self.asker.ask(ticket, leased)
            usage, in_flight = {self.asker.name: asked.usage}, self.asker.teacher.tickets_in_flight
            await asyncio.to_thread(
                write_ticket, self.store, SMALL_DIR, ticket, asked.labels, usage, asked.unasked, in_flight
            )
            await self.asker.forget(asked)
            await self.selector.settle.remote(ticket, self.asker.name, asked.usage.as_dict())
        return leased


class LargeStage(Stage):
    """A cascade's large teacher: reads what the small one is unsure of or has not answered, and reviews."""

    member = 1

    async def see_to(self, ticket: int, leased: pa.Table) -> pa.Table:
        done = await self.there(ticket)
        if done is None:
            small, usage = await asyncio.to_thread(self._small_answers, ticket)
            doubtful = leased.filter(pa.array(~np.isin(leased["row"].to_numpy(), self._sure_rows(small))))
            asked = await self.asker.ask(ticket, doubtful)
            answered_by_large = pc.is_in(small["row"], value_set=asked.labels["row"].combine_chunks())
            kept = small.filter(pc.invert(answered_by_large))
            labels = in_row_order([kept, asked.labels], leased["row"].to_numpy())
            if self.is_review(ticket):
                # A review without an answer leaves a text with the label that it has.
                asked = replace(asked, outcome_M=[""] * len(doubtful))
            done = await self.put(ticket, doubtful, labels, usage | {self.asker.name: asked.usage}, asked)
        return await self.tell(ticket, done)

    def _small_answers(self, ticket: int) -> tuple[pa.Table, dict[str, Usage]]:
        if not self.store.exists(ticket_file(SMALL_DIR, ticket)):  # a review
            return schemas.LABELS.empty_table(), {}
        labels, usage, _ = read_ticket(self.store, SMALL_DIR, ticket)
        return labels.replace_schema_metadata(None), usage

    def _sure_rows(self, small: pa.Table) -> np.ndarray:
        """int64: the rows whose small answer is not to be doubted."""
        cascade = self.config.teacher.cascade
        assert cascade is not None
        p_MC = normalise(matrix_of(small["probs"], len(self.config.labels.names)))
        return small["row"].to_numpy()[confidence(p_MC) >= cascade.unsure_below]


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
