"""The selector gives the same answers however often it is asked and however often it dies.

The plain class runs in a test's own event loop. Blocking is tested by a wait that must not end soon.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from selector_bench import N_CLASSES, N_POOL, N_TEST, TOKENS, Bench
from toys import toy_texts

from llkd_ray.config.base import ConfigError
from llkd_ray.metrics.uncertainty import entropy, margin, support
from llkd_ray.selection.selector import ScoresLost
from llkd_ray.storage import lock, tables
from llkd_ray.storage.lock import Fence, Superseded
from llkd_ray.storage.run_dir import (
    BATCH,
    CALIBRATION,
    EPOCHS_DIR,
    LABELS_DIR,
    LEASES_DIR,
    SCORES,
    SELECTED,
    SNAPSHOTS_DIR,
    RunStore,
    round_file,
    ticket_file,
)
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.labels import write_mark


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "run")


async def still_waits(waiting: asyncio.Task) -> bool:
    """Whether a task is held up; it gets many turns of the loop to finish."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not waiting.done()


async def released(waiting: asyncio.Task):
    """The result of a task that nothing holds up any more."""
    return await asyncio.wait_for(waiting, timeout=5)


def run(coroutine):
    return asyncio.run(coroutine)


def in_a_loop(tests: type) -> type:
    """Run each async test of a class in an event loop of its own."""
    for name, test in list(vars(tests).items()):
        if name.startswith("test_") and inspect.iscoroutinefunction(test):

            @functools.wraps(test)
            def of_loop(*arguments, test=test, **more):
                run(test(*arguments, **more))

            del of_loop.__wrapped__
            of_loop.__signature__ = inspect.signature(test)
            setattr(tests, name, of_loop)
    return tests


NO_ROWS = np.empty(0, dtype=np.int64), np.empty((0, N_CLASSES))


@in_a_loop
class TestLease:
    async def test_every_kind_has_rows_of_its_own(self, bench):
        await bench.rounds()
        schedule = bench.schedule
        leased = [await bench.lease(ticket) for ticket in range(schedule.n_tickets)]
        assert [len(rows) for rows in leased] == [schedule.ticket_rows(t) for t in range(schedule.n_tickets)]
        holdout, pool, test = (
            np.concatenate([leased[ticket] for ticket in tickets])
            for tickets in (schedule.holdout_tickets, schedule.pool_tickets, schedule.test_tickets)
        )
        assert holdout.size == schedule.holdout == 20
        assert np.array_equal(np.sort(holdout), await bench.selector.holdout_rows())
        assert np.array_equal(test, np.arange(N_POOL, N_POOL + N_TEST))
        assert np.unique(pool).size == pool.size
        assert pool.max() < N_POOL
        assert not np.isin(pool, holdout).any()

    async def test_is_in_a_file_so_that_a_second_call_and_a_new_selector_give_the_same(self, bench):
        pool = range(bench.schedule.pool_tickets.start, bench.schedule.tickets_before(1))
        tickets = [*bench.schedule.holdout_tickets, *pool, *bench.schedule.test_tickets]

        async def lease_all():
            return {ticket: (await bench.lease(ticket)).tolist() for ticket in tickets}

        first = await lease_all()
        files = [f"{LEASES_DIR}/{name}" for name in bench.store.names(LEASES_DIR)]
        leases = pa.concat_tables([bench.store.read_table(file) for file in files])
        assert leases.schema == tables.LEASES
        ticket_M, row_M = (leases[name].to_numpy() for name in ("ticket", "row"))
        assert {ticket: row_M[ticket_M == ticket].tolist() for ticket in pool} == {t: first[t] for t in pool}
        assert await lease_all() == first
        bench.restart()
        assert await lease_all() == first
        assert [f"{LEASES_DIR}/{name}" for name in bench.store.names(LEASES_DIR)] == files

    async def test_does_not_depend_on_which_round_is_asked_for_first(self, tmp_path):
        async def lease(bench, *rounds):
            return {k: (await bench.lease(bench.schedule.tickets_before(k) - 1)).tolist() for k in rounds}

        in_order = await lease(Bench(tmp_path / "a"), 0, 1)
        assert await lease(Bench(tmp_path / "b"), 1, 0) == in_order

    async def test_more_rounds_than_tickets(self, tmp_path):
        bench = Bench(tmp_path / "run", teacher={"ticket_size": 150}, budget={"rounds": 6, "train": 60})
        assert len(bench.schedule.pool_tickets) == 2
        for k in range(6):
            await bench.round(k)
        stats = await bench.selector.stats()
        assert (stats["labelled"], stats["rounds_trained"]) == (N_POOL, 6)
        assert (await bench.restart().stats())["labelled"] == N_POOL

    @pytest.mark.parametrize("restart", [False, True])
    async def test_one_round_ahead_is_given_and_two_must_wait(self, bench, restart):
        await bench.teach_for(1)  # round 0 is not selected yet
        two_ahead = asyncio.create_task(bench.lease(bench.schedule.tickets_before(1)))
        assert bench.schedule.round_of(bench.schedule.tickets_before(1)) == 2
        assert await still_waits(two_ahead)
        await bench.selector.select(0)
        assert len(await released(two_ahead)) == 16
        if restart:
            bench.restart()
        for k, waits in ((1, False), (2, False), (3, True)):
            lease = asyncio.create_task(bench.lease(bench.schedule.tickets_before(k) - 1))
            assert await still_waits(lease) == waits, k
            lease.cancel()

    async def test_finish_releases_waiters_with_nothing(self, bench):
        ticket = bench.schedule.pool_tickets.stop - 1
        calls = bench.lease(ticket), bench.selector.batch_files(0), bench.selector.wait_labels(0)
        lease, files, labels = waiting = [asyncio.create_task(call) for call in calls]
        for task in waiting:
            assert await still_waits(task)
        await bench.selector.finish()
        assert (await released(lease)).tolist() == []
        assert await released(files) is None
        await released(labels)
        assert (await bench.lease(ticket)).tolist() == []
        assert len(await bench.lease(bench.schedule.test_tickets.start)) == 16
        assert bench.store.names(LEASES_DIR) == []


@in_a_loop
class TestLabels:
    async def test_twice_counts_once(self, bench):
        ticket = bench.schedule.pool_tickets.start
        rows = await bench.lease(ticket)
        probs = bench.probs(rows)
        # Another answer to the same texts changes nothing.
        answers = probs, probs, np.roll(probs, 1, axis=1)
        assert [await bench.put(ticket, rows, answer, 112) for answer in answers] == [16, 0, 0]
        stats = await bench.selector.stats()
        assert (stats["labelled"], stats["teacher_tokens"], stats["tickets_done"]) == (16, 112, 1)
        assert bench.selector.table.label[rows].tolist() == probs.argmax(axis=1).tolist()

    async def test_confidence_is_over_the_labels(self, bench):
        ticket = bench.schedule.pool_tickets.start
        rows = (await bench.lease(ticket))[:2]
        await bench.put(ticket, rows, np.array([[0.3, 0.1, 0.0], [0.0, 0.0, 0.0]]), 9)
        assert bench.selector.table.confidence[rows] == pytest.approx([0.75, 1 / 3])

    async def test_of_holdout_and_pool_are_counted_and_of_test_are_not(self, bench):
        for ticket in bench.schedule.test_tickets:
            await bench.teach(ticket)
        assert (await bench.selector.stats())["labelled"] == 0
        for ticket in bench.schedule.holdout_tickets:
            await bench.teach(ticket)
        stats = await bench.selector.stats()
        assert stats["labelled"] == bench.schedule.holdout
        assert stats["teacher_tokens"] == TOKENS * (N_TEST + bench.schedule.holdout)

    async def test_wait_labels_waits_for_the_last_of_them(self, bench):
        waiting = asyncio.create_task(bench.selector.wait_labels(0))
        for ticket in (*bench.schedule.test_tickets, *range(1, bench.schedule.tickets_before(0))):
            await bench.teach(ticket)
            assert await still_waits(waiting)
        await bench.teach(0)
        await released(waiting)

    @pytest.mark.parametrize("is_over", [False, True])
    async def test_the_first_of_them_or_the_end_of_the_run_is_waited_for(self, bench, is_over):
        waiting = asyncio.create_task(bench.selector.wait_first_labels())
        assert await still_waits(waiting)
        await (bench.selector.finish() if is_over else bench.teach(bench.schedule.holdout_tickets[0]))
        await released(waiting)
        await bench.selector.wait_first_labels()


@in_a_loop
class TestScoring:
    @pytest.mark.parametrize(("policy", "k"), [("random", 1), ("llkd", 0)])
    async def test_nothing_is_scored_for_random_nor_before_the_first_round(self, tmp_path, policy, k):
        bench = Bench(tmp_path / "run", selection={"policy": policy})
        for earlier in range(k):
            await bench.round(earlier)
        await bench.teach_for(k)
        assert (await bench.rows_to_score(k)).size == 0
        await released(asyncio.create_task(bench.selector.wait_refreshed(k)))

    async def test_candidates_are_scored_before_the_selection_and_their_scores_kept(self, bench):
        await bench.round(0)
        waiting = asyncio.create_task(bench.rows_to_score(1))
        refreshed = asyncio.create_task(bench.selector.wait_refreshed(1))
        assert await still_waits(waiting), "the round's labels are not there yet"
        await bench.teach_for(2)  # further than round 1 may look
        rows = await released(waiting)
        tickets = range(bench.schedule.pool_tickets.start, bench.schedule.tickets_before(1))
        leased = np.concatenate([await bench.lease(ticket) for ticket in tickets])
        assert np.array_equal(rows, np.setdiff1d(leased, bench.batch(0)["row"].to_numpy()))
        assert await still_waits(refreshed)
        assert np.array_equal(await bench.score(1), rows)
        await released(refreshed)
        scores = bench.store.read_table(round_file(1, SCORES))
        assert scores.schema == tables.SCORES
        assert scores["row"].to_pylist() == rows.tolist()
        p_MC, label_M = bench.opinion(1)[rows], bench.selector.table.label[rows]
        assert scores["uncertainty"].to_numpy() == pytest.approx(entropy(p_MC), abs=1e-5)
        assert scores["margin"].to_numpy() == pytest.approx(margin(p_MC), abs=1e-3)
        assert scores["support"].to_numpy() == pytest.approx(support(p_MC, label_M), abs=1e-3)
        await bench.selector.select(1)
        assert (await bench.rows_to_score(1)).size == 0, "nothing more to score once selected"

    async def test_a_round_without_candidates_does_not_wait_for_their_scores(self, bench):
        """As when the cap ends the teaching after the first round."""
        await bench.round(0)
        for ticket in range(bench.schedule.tickets_before(0), bench.schedule.tickets_before(1)):
            await bench.lease(ticket)
            await bench.put(ticket, *NO_ROWS, 0)
        rest = bench.selector.table.candidates(bench.schedule.tickets_before(1)).row_N
        bench.selector.table.mark_trained(0, rest)
        assert (await bench.rows_to_score(1)).size == 0
        await released(asyncio.create_task(bench.selector.wait_refreshed(1)))
        assert (await bench.selector.select(1))["selected"] == 0


@in_a_loop
class TestSelect:
    async def test_batch_holds_what_teacher_and_corpus_say_and_a_second_call_changes_nothing(self, bench):
        facts = await bench.round(0)
        batch, content = bench.batch(0), bench.store.read_bytes(round_file(0, BATCH))
        rows = batch["row"].to_numpy()
        texts, _ = toy_texts(N_POOL + N_TEST, N_CLASSES, seed=0)
        mass = bench.probs(rows)
        assert batch.schema == tables.ROUND
        assert len(batch) == facts["selected"] == (await bench.selector.stats())["trained"] == 15
        assert batch["text"].to_pylist() == [texts[row] for row in rows]
        assert batch["label"].to_pylist() == mass.argmax(axis=1).tolist()
        expected = mass / mass.sum(axis=1, keepdims=True)
        assert np.array(batch["probs"].to_pylist()) == pytest.approx(expected, abs=1e-6)
        assert batch["weight"].to_numpy().mean() == pytest.approx(1.0)
        assert await bench.selector.select(0) == facts
        assert bench.store.read_bytes(round_file(0, BATCH)) == content
        assert (await bench.selector.stats())["trained"] == 15

    @pytest.mark.parametrize("policy", ["random", "llkd"])
    async def test_rows_are_of_the_pool_never_twice_and_the_same_for_a_seed(self, tmp_path, policy):
        async def finished(name, seed):
            bench = Bench(tmp_path / name, selection={"policy": policy}, run={"seed": seed})
            await bench.rounds()
            return bench

        bench = await finished("a", seed=1)
        chosen = np.concatenate(bench.batch_rows())
        assert np.unique(chosen).size == chosen.size == (await bench.selector.stats())["trained"]
        assert chosen.max() < N_POOL
        assert not np.isin(chosen, await bench.selector.holdout_rows()).any()
        if policy == "random":
            assert [len(rows) for rows in bench.batch_rows()] == [15, 15, 15, 15]
        assert (await finished("b", seed=1)).batch_rows() == bench.batch_rows()
        assert (await finished("c", seed=2)).batch_rows() != bench.batch_rows()

    async def test_a_round_looks_only_at_the_tickets_it_waited_for(self, tmp_path):
        late, early = Bench(tmp_path / "late"), Bench(tmp_path / "early")
        await late.teach_for(0)
        await early.teach_for(1)  # the teacher is ahead
        for ticket in early.schedule.test_tickets:
            await early.teach(ticket)
        for bench in (late, early):
            await bench.selector.select(0)
        assert late.batch(0).equals(early.batch(0))

    async def test_fewer_candidates_than_wanted_are_made_up_for_later(self, tmp_path):
        bench = Bench(tmp_path / "run", selection={"policy": "random"}, budget={"rounds": 2, "train": 170})
        await bench.rounds(2)
        assert [bench.schedule.train_target(k) for k in range(2)] == [85, 170]
        sizes = [len(rows) for rows in bench.batch_rows(2)]
        assert sum(sizes) == 170
        assert sizes[0] <= 85

    async def test_a_round_of_texts_that_all_went_to_quarantine(self, bench):
        for ticket in range(bench.schedule.tickets_before(0)):
            bench.write_labels(ticket, NO_ROWS[0])
            await bench.put(ticket, *NO_ROWS, 0)
        assert (await bench.selector.stats())["tickets_done"] == bench.schedule.tickets_before(0)
        facts = await bench.selector.select(0)
        assert (facts["selected"], facts["candidates"]) == (0, 0)
        assert bench.batch(0).schema == tables.ROUND
        assert len(bench.batch(0)) == 0
        assert bench.restart().state.selected == {0: facts}

    async def test_selected_and_trained_are_told_to_those_who_wait(self, bench):
        selector = bench.selector
        assert await selector.last_trained() is None
        assert await selector.next_round() == 0
        await bench.teach_for(0)
        files, trained = (
            asyncio.create_task(call) for call in (selector.batch_files(0), selector.wait_trained(0))
        )
        assert await still_waits(files)
        await selector.select(0)
        assert await released(files) == [round_file(0, BATCH)]
        assert await still_waits(trained)
        await selector.say("round 0: training")
        assert (await selector.stats())["note"] == "round 0: training"
        facts = {"ranks": 2, "loss": 0.5, "checkpoint": "checkpoints/x"}
        for _ in range(2):
            await selector.trained(0, facts)
        assert await released(trained) == facts
        for one in (selector, bench.restart()):
            assert await one.last_trained() == facts
            assert await one.next_round() == 1
        await bench.round(1)
        assert await bench.selector.batch_files(1) == [round_file(0, BATCH), round_file(1, BATCH)]

    async def test_options_reach_the_policy(self, tmp_path):
        options = {"order": "product", "thresholds": "global"}
        bench = Bench(tmp_path / "run", selection={"policy": "llkd", "options": options})
        await bench.round(0)
        await bench.teach_for(1)
        await bench.score(1)
        candidates = bench.selector.table.candidates(bench.schedule.tickets_before(1))
        await bench.selector.select(1)
        signals = candidates.confidence_N, candidates.uncertainty_N
        passing = np.all([signal >= signal.mean() for signal in signals], axis=0)
        value = np.prod(signals, axis=0)
        order = np.argsort(-np.where(passing, value, -1), kind="stable")[: min(15, passing.sum())]
        assert bench.batch(1)["row"].to_pylist() == candidates.row_N[order].tolist()
        weights = bench.batch(1)["weight"].to_numpy()
        assert weights == pytest.approx(value[order] / value[order].mean(), rel=1e-5)

    @pytest.mark.parametrize("quota", [0.0, None])
    async def test_quota_shares_all_rounds_out_between_the_classes(self, tmp_path, quota):
        bench = Bench(tmp_path / "run", selection={"policy": "random", "quota": quota})
        await bench.rounds()
        labels = np.concatenate([bench.batch(k)["label"].to_numpy() for k in range(4)])
        counts = np.bincount(labels, minlength=N_CLASSES).tolist()
        assert sum(counts) == 60
        assert (counts == [20, 20, 20]) == (quota == 0.0)

    @pytest.mark.parametrize("prior", [0.5, None])
    async def test_the_student_is_told_what_to_reckon_with_if_there_is_a_prior(self, tmp_path, prior):
        bench = Bench(tmp_path / "run", selection={"policy": "random", "prior": prior})
        await bench.teach_for(1)  # more than round 0 waits for
        await bench.selector.select(0)
        told = [await selector.target_prior(0) for selector in (bench.selector, bench.restart())]
        if prior is None:
            assert told == [None, None]
            return
        rows = np.concatenate(
            [bench.selector.leases.rows[t] for t in range(bench.schedule.tickets_before(0))]
        )
        count_C = np.bincount(bench.probs(rows[rows < N_POOL]).argmax(axis=1), minlength=N_CLASSES)
        assert told[0] == pytest.approx(count_C**0.5 / (count_C**0.5).sum())
        assert told[1].tolist() == told[0].tolist()


@in_a_loop
class TestAcquisitionByTheStudent:
    """The student's opinion decides what is read, so a lease waits until the opinion is complete."""

    def make(self, folder, policy="entropy", **sections):
        selection = {"policy": "random"} | sections.pop("selection", {})
        acquisition = {"policy": policy, "explore": 0.0} | sections.pop("acquisition", {})
        return Bench(folder, selection=selection, acquisition=acquisition, **sections)

    async def lease_for(self, bench, k):
        tickets = range(bench.schedule.tickets_before(k - 1), bench.schedule.tickets_before(k))
        return np.concatenate([await bench.lease(ticket) for ticket in tickets])

    async def test_leases_wait_for_the_selection_of_the_round_before(self, tmp_path):
        bench = self.make(tmp_path / "run")
        await bench.teach_for(0)
        next_round = asyncio.create_task(bench.lease(bench.schedule.tickets_before(0)))
        assert await still_waits(next_round), "round 0 is not selected yet"
        await bench.selector.select(0)
        assert len(await released(next_round)) == 16

    @pytest.mark.parametrize("policy", ["random", "llkd"])
    async def test_unread_texts_are_scored_too_whatever_selects(self, tmp_path, policy):
        bench = self.make(tmp_path / "run", selection={"policy": policy})
        await bench.round(0)
        await bench.teach_for(1)
        waiting = asyncio.create_task(bench.selector.wait_refreshed(1))
        assert await still_waits(waiting)
        rows = await bench.score(1)
        await released(waiting)
        assert np.array_equal(rows, bench.selector.table.untrained())
        unread = bench.selector.table.unread().row_N
        assert unread.size > 0
        assert np.isin(unread, rows).all()

    @pytest.mark.parametrize("policy", ["entropy", "margin"])
    async def test_reads_what_the_student_of_the_round_before_was_least_sure_of(self, tmp_path, policy):
        """A restarted selector does so too."""
        bench = self.make(tmp_path / "run", policy)
        await bench.rounds(2)
        unread = bench.selector.table.unread().row_N
        bench.restart()  # the leases are in no file yet: they come from the scores in theirs
        leased = await self.lease_for(bench, 2)
        p_MC = bench.opinion(1)[unread]
        sure_M = -entropy(p_MC) if policy == "entropy" else margin(p_MC)
        cutoff = np.sort(sure_M)[leased.size - 1]
        assert leased.size < unread.size
        assert sure_M[np.isin(unread, leased)].max() <= cutoff + 1e-3, "margins are kept in 16 bits"
        bench.restart()
        assert (await self.lease_for(bench, 2)).tolist() == leased.tolist()
        undisturbed = self.make(tmp_path / "undisturbed", policy)
        await undisturbed.rounds(2)
        assert (await self.lease_for(undisturbed, 2)).tolist() == leased.tolist()

    async def test_explore_and_seed_reach_the_policy(self, tmp_path, monkeypatch):
        bench = self.make(tmp_path / "run", acquisition={"explore": 0.25}, run={"seed": 5})
        policy, seen = bench.selector.leases.policy, []

        def choose(*arguments, **more):
            seen.append(more)
            return policy.choose(*arguments, **more)

        bench.selector.leases.policy = SimpleNamespace(uses_student=True, choose=choose)
        await bench.lease(bench.schedule.pool_tickets.start)
        assert seen == [{"seed": 5, "explore": 0.25}]

    async def test_a_whole_run_is_the_same_however_often_the_selector_restarts(self, tmp_path):
        rows = []
        for restart in (False, True):
            bench = self.make(
                tmp_path / str(restart),
                "m_raru",
                selection={"policy": "llkd_sample", "quota": 0.5},
                acquisition={"explore": 0.1},
                budget={"labels": 120},
            )
            for k in range(4):
                await bench.round(k)
                if restart:
                    bench.restart()
            stats = await bench.selector.stats()
            assert (stats["labelled"], stats["trained"]) == (120, 60)
            rows.append(bench.batch_rows())
        assert rows[0] == rows[1]


STAGES = ("leases", "labels", "scores", "batch without mark", "select", "trained")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Batches and counts of a run that nothing broke."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed") / "run")
    run(bench.rounds())
    return bench.batch_rows(), run(bench.selector.stats())


@in_a_loop
class TestRebuild:
    """A selector that dies at any stage of round 1 leaves a run that ends as if it had not."""

    async def until(self, bench, stage):
        await bench.round(0)
        if stage == "leases":
            await bench.lease(bench.schedule.tickets_before(0))
            return
        await bench.teach_for(1)
        if stage == "labels":
            return
        await bench.score(1)
        if stage == "scores":
            return
        await bench.selector.select(1)
        if stage == "batch without mark":
            bench.store.delete(round_file(1, SELECTED))
        if stage == "trained":
            await bench.selector.trained(1, {"ranks": 1})

    async def onwards(self, bench):
        for k in range(1, 4):
            await bench.teach_for(k)
            if (await bench.rows_to_score(k)).size:
                await bench.score(k)
            await asyncio.wait_for(bench.selector.wait_refreshed(k), timeout=5)
            await bench.selector.select(k)
            if await bench.selector.next_round() == k:
                await bench.selector.trained(k, {"ranks": 1})

    @pytest.mark.parametrize("stage", STAGES)
    async def test_after(self, bench, undisturbed, stage):
        await self.until(bench, stage)
        before = await bench.selector.stats()
        bench.restart()
        if stage != "batch without mark":
            assert await bench.selector.stats() == before
        await self.onwards(bench)
        assert (bench.batch_rows(), await bench.selector.stats()) == undisturbed

    @pytest.mark.parametrize("told_before", [1, 2])
    async def test_amid_the_scores(self, bench, undisturbed, told_before):
        """What some or all ranks told the dead one is in no file, so all score again."""
        await self.until(bench, "labels")
        rows, labels = await bench.selector.rows_to_score(1)
        halves = np.array_split(np.arange(rows.size), 2)  # two ranks
        for i, mine in enumerate(halves):
            if i == told_before:
                bench.restart()
            await bench.tell(1, rows[mine], labels[mine])
        if told_before == 2:
            bench.restart()
        lost = sum(mine.size for mine in halves[:told_before])
        with pytest.raises(ScoresLost, match=rf"{lost} of {rows.size} scores"):
            await bench.selector.refresh_done(1, rows.size)
        assert not bench.store.exists(round_file(1, SCORES))
        await self.onwards(bench)
        # Once they are in their file, a successor that is told so again is content.
        await bench.restart().refresh_done(1, rows.size)
        assert bench.batch_rows() == undisturbed[0]

    async def test_a_run_whose_rounds_are_over_is_finished(self, bench):
        await bench.rounds()
        assert bench.restart().state.finished
        assert await bench.selector.batch_files(4) is None

    async def test_half_a_write_is_no_label(self, bench):
        await bench.lease(bench.schedule.pool_tickets.start)
        bench.store.write_bytes(f"{LABELS_DIR}/ticket-00000002.parquet.0123.tmp", b"PAR1 half")
        assert (await bench.restart().stats())["tickets_done"] == 0


async def assert_same(before, after):
    """Two selectors have the same table and counts."""
    columns = {name for name, value in vars(before.table).items() if isinstance(value, np.ndarray)}
    assert {"label", "uncertainty", "margin", "support", "ticket"} < columns
    for column in sorted(columns):
        np.testing.assert_array_equal(getattr(before.table, column), getattr(after.table, column), column)
    assert await after.stats() == await before.stats()


@in_a_loop
class TestSnapshot:
    """A selector that restarts while its driver lives."""

    @pytest.fixture
    def bench(self, tmp_path):
        bench = Bench(tmp_path / "run")
        bench.restart("one")
        return bench

    @pytest.fixture
    def read(self, monkeypatch) -> list[str]:
        """The names of the files that are read; to be cleared at will."""
        read: list[str] = []
        for method in ("read_bytes", "read_table"):
            original = getattr(RunStore, method)

            def reading(store, relative, *more, original=original):
                read.append(relative)
                return original(store, relative, *more)

            monkeypatch.setattr(RunStore, method, reading)
        return read

    async def test_what_is_in_it_is_not_read_again(self, bench, read):
        await bench.rounds(2)
        done = set(bench.selector.ingest.done)
        await bench.teach_for(2)
        await bench.score(2)
        later = bench.selector.ingest.done - done
        assert later
        read.clear()
        before, after = bench.selector, bench.restart("one")
        assert {name for name in read if name.endswith(".parquet")} == {
            *(ticket_file(LABELS_DIR, ticket) for ticket in later),
            *(f"{LEASES_DIR}/{name}" for name in bench.store.names(LEASES_DIR)),
            round_file(2, SCORES),
        }
        await assert_same(before, after)

    async def test_the_rounds_are_those_of_an_undisturbed_run(self, bench, undisturbed):
        for k in range(4):
            await bench.rounds(k + 1, start=k)
            bench.restart("one")
        assert (bench.batch_rows(), await bench.selector.stats()) == undisturbed

    async def test_what_comes_while_it_is_copied_is_not_lost(self, bench, monkeypatch):
        """The copy is taken in many steps; a ticket comes between two of them."""
        monkeypatch.setattr("llkd_ray.selection.table._ROWS_A_STEP", 10)
        await bench.round(0)
        for ticket in range(bench.schedule.tickets_before(0), bench.schedule.tickets_before(1)):
            await bench.teach(ticket)
        assert not bench.selector.snapshot_task.done()
        await bench.selector.snapshot_task
        await assert_same(bench.selector, bench.restart("one"))

    @pytest.mark.parametrize("why", ["half written", "full disk", "another driver"])
    async def test_without_one_the_files_are_read(self, bench, monkeypatch, read, why):
        """Another driver asks again what it finds damaged: nobody has looked at the files since."""
        if why == "full disk":
            no_space = Mock(side_effect=OSError("no space left on device"))
            monkeypatch.setattr("llkd_ray.selection.selector.save_snapshot", no_space)
        await bench.rounds(2)
        await bench.teach_for(2)
        names = bench.store.names(SNAPSHOTS_DIR)
        assert bool(names) == (why != "full disk")
        if why == "half written":
            content = bench.store.read_bytes(f"{SNAPSHOTS_DIR}/{names[0]}")
            bench.store.write_bytes(f"{SNAPSHOTS_DIR}/{names[0]}", content[: len(content) // 2])
        read.clear()
        before, after = bench.selector, bench.restart("two" if why == "another driver" else "one")
        assert after.ingest.done
        assert {ticket_file(LABELS_DIR, ticket) for ticket in after.ingest.done} <= set(read)
        await assert_same(before, after)

    async def test_the_last_round_needs_none(self, bench):
        await bench.rounds(3)
        bench.selector.snapshot_task = None
        await bench.round(3)
        assert bench.selector.snapshot_task is None


@in_a_loop
class TestDamage:
    async def test_a_damaged_label_file_is_moved_and_its_ticket_is_not_done(self, bench):
        await bench.round(0)
        ticket = bench.schedule.pool_tickets.start
        bench.store.write_bytes(ticket_file(LABELS_DIR, ticket), b"PAR1 and zeros")
        stats = await bench.restart().stats()
        assert stats["damaged"] == [ticket]
        (line,) = stats["broken_files"]
        assert line.startswith(f"{ticket_file(LABELS_DIR, ticket)} cannot be read (")
        assert ticket not in bench.selector.ingest.done
        await bench.teach(ticket)
        assert (await bench.restart().stats())["damaged"] == []

    @pytest.mark.parametrize("part", ["leases", SCORES, BATCH, SELECTED])
    async def test_what_cannot_be_made_again_is_named(self, bench, part):
        await bench.rounds(2)
        leases = f"{LEASES_DIR}/{bench.store.names(LEASES_DIR)[0]}"
        file = leases if part == "leases" else round_file(1, part)
        content = bench.store.read_bytes(file)
        bench.store.write_bytes(file, content[: len(content) // 2])
        with pytest.raises(ConfigError, match=rf"{file} cannot be read \(.*\): if it is damaged, put a copy"):
            bench.restart()


@in_a_loop
class TestFence:
    """A selector whose node was lost may go on answering for a while after the next one has begun."""

    async def test_one_that_was_replaced_writes_and_grants_nothing_more(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lock, "THROTTLE_S", 0.0)
        bench = Bench(tmp_path / "run", budget={"cap": {"texts": 500}})
        await bench.round(0)
        await bench.teach_for(1)
        await bench.score(1)
        stale, newest = bench.selector, bench.restart()
        files = everything_below(bench.store)
        calls = (
            stale.select(1),
            stale.refresh_done(1, 0),
            stale.trained(1, {}),
            stale.lease(bench.schedule.tickets_before(1)),
            stale.reserve(bench.schedule.tickets_before(1), "a", "teacher", Usage(texts=1).as_dict()),
        )
        for call in calls:
            with pytest.raises(Superseded):
                await call
        assert everything_below(bench.store) == files
        assert (await newest.select(1))["selected"] > 0
        Fence.claim(bench.store, "another-driver")
        with pytest.raises(Superseded, match="another-driver"):
            await newest.assert_owner()


def everything_below(store):
    """Content of all files of a run but the epochs."""
    files = (file for file in Path(store.root).rglob("*") if file.is_file() and EPOCHS_DIR not in file.parts)
    return {file: file.read_bytes() for file in files}


@in_a_loop
class TestTeachers:
    async def test_a_ticket_that_is_given_back_goes_to_a_spare_one_once(self, tmp_path):
        bench = Bench(tmp_path / "run", teacher={"actors": 2})
        spare = asyncio.create_task(bench.selector.lease(-1))
        rows = await bench.lease(0)
        assert await still_waits(spare)
        for _ in range(2):  # a call may come twice
            await bench.selector.give_back(0, "teacher", "actor-1", "no memory", "call-1")
        ticket, again = await released(spare)
        assert (ticket, again.tolist()) == (0, rows.tolist())
        # The answer may be lost on its way: the same call gets the same ticket.
        ticket, again = await bench.selector.lease(-1)
        assert (ticket, again.tolist()) == (0, rows.tolist())
        other = asyncio.create_task(bench.selector.lease(-2))
        assert await still_waits(other)
        await bench.rounds()
        for ticket in bench.schedule.test_tickets:
            await bench.teach(ticket)
        assert (await released(other))[1].size == 0, "nothing was left to be taken"

    async def test_what_was_given_back_outlives_the_selector_but_not_the_driver(self, bench):
        rows = await bench.lease(0)
        await bench.selector.give_back(0, "teacher", "actor-1", "no memory", "call-1")
        assert "no memory" in (await bench.selector.stats())["trouble"], "there was but one actor"
        same = bench.restart(bench.selector.session)
        assert (await same.lease(-1))[1].tolist() == rows.tolist()
        assert "no memory" in (await same.stats())["trouble"]
        later = bench.restart()
        assert (await later.stats())["trouble"] is None
        assert not later.teachers.returned

    async def test_a_claim_waits_for_what_others_may_leave(self, tmp_path):
        bench = Bench(tmp_path / "run", budget={"cap": {"tokens": 200}})

        def usage(tokens):
            return Usage(texts=1, prompt_tokens=tokens).as_dict()

        for ticket in (0, 1):
            await bench.lease(ticket)
        assert await bench.selector.reserve(0, "a", "teacher", usage(120))
        second = asyncio.create_task(bench.selector.reserve(1, "b", "teacher", usage(120)))
        assert await still_waits(second), "the first may use less than it claimed"
        rows = bench.selector.leases.rows[0][:1]
        bench.write_labels(0, rows)
        await bench.put(0, rows, bench.probs(rows), TOKENS, "a")
        assert await released(second)
        assert not await bench.selector.reserve(1, "b", "teacher", usage(120))
        assert (await bench.selector.stats())["cap_reached"]
        # What a killed attempt may have used stays used.
        write_mark(bench.store, "ticket-00000001.b", 1, {"teacher": Usage(**usage(120))})
        later, left = bench.restart(), 200 - 120 - TOKENS
        assert not await later.reserve(1, "c", "teacher", usage(left + 1))
        assert await later.reserve(1, "c", "teacher", usage(left))

    async def test_labels_wait_for_the_calibrator(self, tmp_path):
        bench = Bench(tmp_path / "run", teacher={"confidence": {"method": "batch"}})
        needed = range(bench.schedule.tickets_before(0))
        for ticket in needed[:-1]:
            await bench.teach(ticket)
        stats = await bench.selector.stats()
        assert (stats["labelled"], stats["tickets_done"]) == (0, 0)
        assert not bench.store.exists(CALIBRATION)
        await bench.teach(needed[-1])
        assert (await bench.selector.stats())["tickets_done"] == len(needed)
        await bench.teach(needed[-1] + 1)
        mean_C = np.mean([bench.probs(bench.selector.leases.rows[t]).sum(axis=0) for t in needed], axis=0)
        fitted = bench.store.read_json(CALIBRATION)
        assert fitted["method"] == "batch"
        prior_C = np.array(fitted["prior_C"])
        assert prior_C / prior_C.sum() == pytest.approx(mean_C / mean_C.sum(), abs=0.02)
        await assert_same(bench.selector, bench.restart())
