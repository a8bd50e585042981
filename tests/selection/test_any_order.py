"""Selector, ledger and teacher actors in any order of events: deaths, repeated calls, stale actors, restarts.

Leaser, stage and selector are those of a run; only Ray and the teacher's model are replaced.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from selector_bench import N_CLASSES, N_POOL, N_TEST, Bench

from llkd_ray.selection.selector import ScoresLost, Selector
from llkd_ray.storage import lock, run_dir
from llkd_ray.storage.lock import Superseded
from llkd_ray.storage.run_dir import BATCH, LABELS_DIR, SCORES, RunStore, round_file, ticket_file, ticket_of
from llkd_ray.teacher.base import TeacherDown, label_batch
from llkd_ray.teacher.labels import read_ticket
from llkd_ray.teacher.stream import Leaser
from llkd_ray.teacher.worker import OnlyStage

ROUNDS, LABELS = 3, 100
picks = st.integers(0, 7)


async def at_once(function, *arguments):
    """``asyncio.to_thread`` without a thread, so that examples repeat."""
    return function(*arguments)


class Driver:
    """A session's selector, newest incarnation, and the calls that it has not answered."""

    def __init__(self, selector: Selector) -> None:
        self.selector, self.calls = selector, set()

    def call_again(self) -> None:
        for call in self.calls:
            call.cancel()


class Handle:
    """Of the selector, as Ray's: what a dead one has not answered is called again at the next."""

    def __init__(self, driver: Driver, twice: bool) -> None:
        self.driver, self.twice, self.is_mute = driver, twice, False

    def __getattr__(self, name):
        return SimpleNamespace(remote=partial(self._call, name))

    async def _call(self, name, *arguments):
        while True:
            call = asyncio.ensure_future(self._reach(name, arguments))
            self.driver.calls.add(call)
            try:
                return await call
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():
                    raise
            finally:
                self.driver.calls.discard(call)

    async def _reach(self, name, arguments):
        if self.is_mute and name == "put_labels":
            self.is_mute = False
            await asyncio.Future()  # the message is on its way until either end dies
        for _ in range(1 + self.twice):
            answer = await getattr(self.driver.selector, name)(*arguments)
        return answer


class Attempt:
    """A teacher's actor with one ticket: it asks in two halves, then answers; no two answer alike."""

    def __init__(self, world: AnyOrder, number: int, twice: bool) -> None:
        self.world, self.number = world, number
        self.handle, self.is_down = Handle(world.driver, twice), False
        self.gates = [asyncio.Event() for _ in range(3)]
        self.rng = np.random.default_rng(world.n_attempts)
        self.task = asyncio.ensure_future(self._run(world.bench))

    async def _run(self, bench: Bench) -> None:
        leaser = Leaser(bench.store.root, self.handle)
        stage = OnlyStage(bench.config, bench.store.root, self.handle, self)
        stage.worker._made.result()
        async for leased in leaser(pa.table({"ticket": [self.number]})):
            async for _ in stage(leased):
                pass

    async def label(self, ids, texts, allowance):
        async def one(i, meter):
            await self._pass(self.gates[2 * i // len(ids)])
            await meter.request(10, 1)
            self.world.sent += 1
            await self._pass(self.gates[2])
            return self.rng.dirichlet(np.ones(N_CLASSES)) * 0.9, 0.1

        return await label_batch(len(ids), N_CLASSES, one, allowance, 0)

    async def _pass(self, gate: asyncio.Event) -> None:
        await gate.wait()
        if self.is_down:
            raise TeacherDown("gone")

    def close(self) -> None:
        """Part of a teacher."""

    def advance(self) -> None:
        for gate in [gate for gate in self.gates if not gate.is_set()][:1]:
            gate.set()


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.patches = [
            patch.object(asyncio, "to_thread", at_once),
            patch.object(lock, "THROTTLE_S", 0.0),
            patch.object(run_dir, "_flush"),
        ]
        for one in self.patches:
            one.start()

    @initialize(
        cap=st.none() | st.integers(1, LABELS + N_TEST),
        policy=st.sampled_from(["random", "llkd"]),
        acquisition=st.sampled_from(["random", "entropy"]),
        rounds=st.integers(0, ROUNDS - 1),
    )
    def begin(self, cap, policy, acquisition, rounds):
        """After some undisturbed rounds."""
        self.cap, self.policy = cap, policy
        self.bench = Bench(
            self.folder / "run",
            budget={"rounds": ROUNDS, "train": 45, "labels": LABELS, "cap": {"texts": cap}},
            selection={"policy": policy},
            acquisition={"policy": acquisition},
            teacher={"actors": (1, 1000)},
        )
        self.schedule = self.bench.schedule
        self.superseded: list[Selector] = []
        self.attempts: list[Attempt] = []
        self.sent = self.n_attempts = 0
        self.files: dict[str, tuple[int, int]] = {}
        """Label files and batches: i-node and time of change when they were first seen."""
        n_rows = N_POOL + N_TEST
        self.leased: dict[int, list[int]] = {}
        self.label = np.full(n_rows, -1)
        """Of the label files."""
        self.trained = np.zeros(n_rows, dtype=bool)
        self.new_driver()
        for _ in range(rounds):
            self.do_round()

    def do_round(self) -> None:
        while not self.is_taught:
            self.teach(1)
        if self.round not in self.driver.selector.state.selected:
            self.select(False)
        self.train()

    def new_driver(self) -> None:
        self.driver = Driver(self.bench.selector)
        exists = self.bench.store.exists
        self.pending = [t for t in self.schedule.in_order() if not exists(ticket_file(LABELS_DIR, t))]
        self.spare = 0

    # --- the event loop

    def go(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def settle(self) -> None:
        """Let everything run that waits for nothing."""

        async def turns():
            await asyncio.sleep(0)
            while self.loop._ready:
                await asyncio.sleep(0)

        self.go(turns())
        for attempt in [one for one in self.attempts if one.task.done()]:
            self.attempts.remove(attempt)
            try:
                attempt.task.result()
            except asyncio.CancelledError:
                continue
            except Superseded:
                assert attempt.handle.driver is not self.driver

    def start_attempt(self, number: int, twice: bool = False) -> None:
        async def start():
            return Attempt(self, number, twice)

        self.n_attempts += 1
        self.attempts.append(self.go(start()))
        self.settle()

    # --- teachers

    @precondition(lambda self: self.pending)
    @rule(pick=picks, twice=st.booleans())
    def start(self, pick, twice):
        self.start_attempt(self.pending.pop(pick % min(len(self.pending), 3)), twice)

    @precondition(lambda self: self.attempts)
    @rule(pick=picks)
    def start_again(self, pick):
        """As Ray does where it has lost sight of the first."""
        self.start_attempt(self.attempts[pick % len(self.attempts)].number)

    @precondition(lambda self: self.attempts)
    @rule(pick=picks, is_mute=st.booleans())
    def advance(self, pick, is_mute):
        attempt = self.attempts[pick % len(self.attempts)]
        attempt.handle.is_mute = is_mute
        attempt.advance()
        self.settle()

    @precondition(lambda self: self.attempts)
    @rule(pick=picks)
    def give_up(self, pick):
        attempt = self.attempts[pick % len(self.attempts)]
        attempt.is_down = True
        attempt.advance()
        self.settle()

    @precondition(lambda self: self.driver.selector.teachers.returned)
    @rule(twice=st.booleans())
    def start_spare(self, twice):
        self.spare -= 1
        self.start_attempt(self.spare, twice)

    @precondition(lambda self: self.attempts)
    @rule(pick=picks)
    def kill(self, pick):
        attempt = self.attempts[pick % len(self.attempts)]
        attempt.task.cancel()
        self.settle()
        if attempt.handle.driver is self.driver:
            self.start_attempt(attempt.number)

    @rule(n=st.integers(1, 4))
    def teach(self, n):
        """The next tickets, without a disturbance."""
        for _ in range(min(n, len(self.pending))):
            self.start_attempt(self.pending.pop(0))
        self.advance_all()

    def advance_all(self) -> None:
        for _ in range(3):
            for attempt in self.attempts:
                attempt.advance()
            self.settle()

    # --- the selector

    @rule(is_new_driver=st.booleans(), all_die=st.booleans())
    def restart(self, is_new_driver, all_die):
        driver = self.driver
        self.superseded.append(driver.selector)
        selector = self.bench.restart(None if is_new_driver else driver.selector.session)
        if is_new_driver:
            if all_die:
                for attempt in self.attempts:
                    attempt.task.cancel()
            self.new_driver()
        else:
            driver.selector = selector
            driver.call_again()
        self.settle()

    @precondition(lambda self: self.superseded)
    @rule(pick=picks)
    def superseded_one_writes_nothing(self, pick):
        old = self.superseded[pick % len(self.superseded)]
        calls = (
            old.select(len(old.state.selected)),
            old.refresh_done(self.round, 0),
            old.trained(self.round, {}),
            old.lease(self.schedule.pool_tickets.start),
        )
        if self.cap:
            calls += (old.reserve(self.schedule.pool_tickets.start, "new", "teacher", {"texts": 1}),)
        for call in calls:
            with pytest.raises(Superseded):
                self.go(call)

    # --- rounds

    @property
    def round(self) -> int:
        return len(self.driver.selector.state.trained)

    @property
    def is_taught(self) -> bool:
        needed = set(self.schedule.needed_for(self.round))
        return self.round < ROUNDS and needed <= self.driver.selector.ingest.done

    @precondition(lambda self: self.is_taught and self.round not in self.driver.selector.state.refreshed)
    @rule(is_disturbed=st.booleans())
    def score(self, is_disturbed):
        rows, labels = self.go(self.bench.selector.rows_to_score(self.round))
        for half in np.array_split(np.arange(rows.size), 2):
            self.go(self.bench.tell(self.round, rows[half], labels[half]))
            if is_disturbed:
                self.restart(False, False)
        try:
            self.go(self.bench.selector.refresh_done(self.round, rows.size))
            assert (
                self.bench.store.read_table(round_file(self.round, SCORES))["row"].to_pylist()
                == rows.tolist()
            )
        except ScoresLost:
            assert is_disturbed
        self.settle()

    @precondition(lambda self: self.is_taught and self.round not in self.driver.selector.state.selected)
    @rule(is_known=st.booleans())
    def select(self, is_known):
        """A selector that knows nothing but the files, or their snapshot, selects the same."""
        k, selector = self.round, self.bench.selector
        if k not in selector.state.refreshed and (self.go(self.bench.rows_to_score(k))).size:
            self.score(False)
        copy = self.folder / "copy"
        shutil.copytree(self.bench.store.root, copy, copy_function=os.link)
        other = Selector(self.bench.config, str(copy), selector.session if is_known else "other")
        self.go(other.select(k))
        self.go(selector.select(k))
        self.settle()
        batches = [
            RunStore(root).read_bytes(round_file(k, BATCH)) for root in (str(copy), self.bench.store.root)
        ]
        assert batches[0] == batches[1]
        shutil.rmtree(copy)

    @precondition(lambda self: self.round in self.driver.selector.state.selected)
    @rule()
    def train(self):
        self.go(self.bench.selector.trained(self.round, {"ranks": 1}))
        self.settle()

    # --- what holds at any time

    @invariant()
    def cap_holds(self):
        assert self.cap is None or self.sent <= self.cap

    @invariant()
    def files_stay_and_every_row_is_used_once(self):
        store, selector = self.bench.store, self.bench.selector
        names = [f"{LABELS_DIR}/{name}" for name in store.names(LABELS_DIR)]
        names += [round_file(k, BATCH) for k in sorted(selector.state.selected)]
        assert self.files.keys() <= set(names)
        for name in names:
            stat = Path(store.path(name)).stat()
            if name not in self.files:
                self.files[name] = stat.st_ino, stat.st_mtime_ns
                (self.note_labels if name.startswith(LABELS_DIR) else self.note_batch)(store.read_table(name))
            assert self.files[name] == (stat.st_ino, stat.st_mtime_ns)
        for ticket, rows in selector.leases.rows.items():
            assert self.leased.setdefault(ticket, rows.tolist()) == rows.tolist()
        leased = [row for rows in self.leased.values() for row in rows]
        assert len(set(leased)) == len(leased)
        is_labelled = selector.table.label >= 0
        assert np.array_equal(selector.table.label[is_labelled], self.label[is_labelled])

    def note_labels(self, labels: pa.Table) -> None:
        row_M = labels["row"].to_numpy()
        assert (self.label[row_M] == -1).all()
        mass_MC = np.array(labels["probs"].to_pylist()).reshape(-1, N_CLASSES)
        self.label[row_M] = mass_MC.argmax(axis=1)

    def note_batch(self, batch: pa.Table) -> None:
        row_M = batch["row"].to_numpy()
        before = self.schedule.tickets_before(
            np.count_nonzero([name.endswith(BATCH) for name in self.files]) - 1
        )
        assert (self.bench.selector.table.ticket[row_M] < before).all()
        assert not self.trained[row_M].any()
        self.trained[row_M] = True
        assert np.array_equal(batch["label"].to_numpy(), self.label[row_M])

    # --- the end

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            for one in self.patches:
                one.stop()
            self.go(self.stop_all())
            self.loop.close()
            shutil.rmtree(self.folder)

    async def stop_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def finish(self) -> None:
        """The run can be finished from any state, and no text is left out."""
        for attempt in self.attempts:
            attempt.handle.is_mute = False
        self.driver.call_again()
        for _ in range(20):
            while self.pending:
                self.start_attempt(self.pending.pop(0))
            while self.driver.selector.teachers.returned:
                self.start_spare(False)
            self.advance_all()
            if self.is_taught:
                self.do_round()
            if self.round == ROUNDS and len(self.bench.selector.ingest.done) == self.schedule.n_tickets:
                break
        self.files_stay_and_every_row_is_used_once()
        self.cap_holds()
        assert len(self.bench.selector.ingest.done) == self.schedule.n_tickets
        assert self.round == ROUNDS
        files = [ticket_of(name) for name in self.bench.store.names(LABELS_DIR)]
        read = [read_ticket(self.bench.store, LABELS_DIR, ticket) for ticket in files]
        unasked = sum(one[2] for one in read)
        stats = self.go(self.bench.selector.stats())
        assert stats["usage"]["teacher"]["texts"] == sum(one[1]["teacher"].texts for one in read)
        n_labelled = np.count_nonzero(self.label >= 0)
        assert n_labelled + unasked == LABELS + N_TEST
        if self.cap is None:
            assert unasked == 0
            assert self.policy != "random" or np.count_nonzero(self.trained) == self.schedule.train


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
