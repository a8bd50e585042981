"""The stream around the stages: leases, pools, and actors that are lost.

Without Ray's actors; the teachers are fakes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_selector import FakeSelector, go
from fake_teacher import FakeTeacher, cascade_config
from toys import make_config, make_run

from llkd_ray.config.base import ConfigError
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.run.loop import failed_teachers
from llkd_ray.selection.selector import Selector
from llkd_ray.storage.run_dir import LABELS_DIR, RunStore
from llkd_ray.teacher import stream as stream_module
from llkd_ray.teacher.base import TeacherDown
from llkd_ray.teacher.stream import Leaser, spare_tickets
from llkd_ray.teacher.worker import OnlyStage, Stage

N_POOL, N_TEST = 200, 30


@pytest.fixture
def store(tmp_path) -> RunStore:
    return make_run(tmp_path / "run", N_POOL, N_TEST)


class Handle:
    """A selector in this event loop, called as an actor is."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.selector, name))


class DownAfter(FakeTeacher):
    """Gives up after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__(lambda number: np.array([0.05, 0.9, 0.05]))
        self.limit = calls

    async def label(self, ids, texts, allowance):
        if len(self.calls) >= self.limit:
            raise TeacherDown("the server is gone")
        await asyncio.sleep(0.001)
        return await super().label(ids, texts, allowance)


class TestAnActorThatIsLost:
    """The stream as Ray Data runs it, in one event loop: a leaser, two actors, and the selector itself."""

    ROUNDS = 4

    async def teach(self, store: RunStore, teachers: Sequence[FakeTeacher]) -> Selector:
        """Teach as far as it goes, with a student that learns in no time."""
        config = make_config(
            teacher={"ticket_size": 4, "actors": len(teachers)},
            budget={"rounds": self.ROUNDS, "train": 60},
            selection={"policy": "random"},
        )
        selector = Selector(config, store.root)
        handle: Any = Handle(selector)
        leaser = Leaser(store.root, handle)
        stages = [OnlyStage(config, store.root, handle, teacher) for teacher in teachers]
        # Spare tickets come first: behind all others, they would wait for rounds that wait for them.
        spare = spare_tickets(config)
        tickets = iter([*spare, *selector.schedule.in_order()])
        blocks: asyncio.Queue[pa.Table] = asyncio.Queue()

        async def lease() -> None:
            for ticket in tickets:
                async for block in leaser(pa.table({"ticket": [ticket]})):
                    blocks.put_nowait(block)

        async def work(stage: Stage) -> None:
            while True:
                await go(stage, await blocks.get())

        async def learn() -> None:
            for k in range(self.ROUNDS):
                await selector.wait_labels(k)
                await selector.select(k)
                await selector.trained(k, {})
            await selector.wait_taught()

        tasks = [asyncio.create_task(lease()) for _ in range(len(spare) + 2)]
        tasks += [asyncio.create_task(work(stage)) for stage in stages for _ in range(2)]
        tasks.append(learning := asyncio.create_task(learn()))
        async with asyncio.timeout(60):
            while not learning.done() and selector.teachers.failure_reason() is None:
                await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return selector

    @pytest.mark.parametrize("calls", [0, 1, 5])
    def test_every_text_is_labelled_all_the_same(self, store, calls):
        teachers = [DownAfter(calls), DownAfter(10**9)]
        selector = asyncio.run(self.teach(store, teachers))
        assert selector.teachers.failure_reason() is None
        assert len(store.names(LABELS_DIR)) == selector.schedule.n_tickets
        assert [one["reason"] for one in failed_teachers(store)] == ["the server is gone"]
        answers = [row for teacher in teachers for rows in teacher.calls for row in rows]
        assert sorted(answers) == list(range(N_POOL + N_TEST)), "each text once"
        assert len(teachers[0].calls) <= calls + 1

    def test_when_none_is_left_the_user_is_told(self, store):
        selector = asyncio.run(self.teach(store, [DownAfter(2), DownAfter(3)]))
        assert selector.teachers.failure_reason() == (
            "the teacher has given up, all 2 actor(s): the server is gone"
        )
        assert len(failed_teachers(store)) == 2
        assert 0 < len(store.names(LABELS_DIR)) < selector.schedule.n_tickets


def test_each_lease_is_a_block_of_its_texts(store):
    """A spare ticket becomes the one that was given back; an empty lease has the same columns."""
    selector = FakeSelector()
    selector.leases = {4: (4, np.array([150, 3, 77])), -2: (17, np.array([9])), 6: (6, np.empty(0, np.int64))}

    async def script():
        leaser = Leaser(store.root, selector)
        return [block async for block in leaser(pa.table({"ticket": [4, -2, 6]}))]

    full, spare, empty = asyncio.run(script())
    assert full["ticket"].to_pylist() == [4, 4, 4]
    assert full["row"].to_pylist() == [150, 3, 77]
    assert full["id"].to_pylist() == ["toy-150", "toy-3", "toy-77"]
    assert all(full["text"].to_pylist())
    assert spare["ticket"].to_pylist() == [17]
    assert len(empty) == 0
    assert empty.schema == full.schema


class TestPools:
    def test_a_spare_ticket_for_each_that_may_be_given_back_by_the_largest_pool(self):
        one, growing = (
            make_config(teacher={"actors": actors, "tickets_in_flight": 4}) for actors in (3, (1, 3))
        )
        assert spare_tickets(one) == spare_tickets(growing) == range(-12, 0)
        assert spare_tickets(cascade_config()) == range(-5, 0), "two and three in flight"

    def test_a_pool_is_a_number_or_two(self):
        pools = [make_config(teacher={"actors": actors}).teacher for actors in (2, (1, 3))]
        assert [(one.min_actors, one.max_actors) for one in pools] == [(2, 2), (1, 3)]
        for actors in (0, (0, 2), (3, 2)):
            with pytest.raises(ConfigError, match=r"^teacher\.actors: is .*at least 1, or \(min, max\)"):
                make_config(teacher={"actors": actors})

    @pytest.mark.parametrize(
        ("settings", "resources"),
        [
            (
                {"resources": {"teacher": 1.0}},
                {"num_cpus": 0.5, "num_gpus": None, "resources": {"teacher": 1.0}},
            ),
            ({"cpus": 2, "gpus": 1}, {"num_cpus": 2, "num_gpus": 1}),
            # Parts on CPUs are processes of one actor.
            ({"cpus": 2, "tensor_parallel": 2}, {"num_cpus": 4, "num_gpus": None}),
        ],
    )
    def test_resources_of_an_engine_in_one_piece(self, settings, resources):
        assert stream_module._resources(TeacherConfig(model="toy", **settings), []) == resources

    @pytest.mark.parametrize(("parts", "removed"), [(1, []), (2, ["the actor's own"])])
    def test_an_actor_that_goes_takes_its_placement_group_along(self, monkeypatch, parts, removed):
        gone: list[str] = []
        monkeypatch.setattr(stream_module.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(stream_module.ray.util, "get_current_placement_group", lambda: "the actor's own")
        monkeypatch.setattr(stream_module.ray.util, "remove_placement_group", gone.append)
        stream_module._leave_placement_group(TeacherConfig(model="toy", gpus=1, tensor_parallel=parts))
        assert gone == removed, "an engine in one piece may share the driver's own group"

    @pytest.mark.parametrize(
        ("tensor", "pipeline", "strategy"), [(4, 1, "STRICT_PACK"), (2, 2, "PACK"), (1, 4, "PACK")]
    )
    def test_parts_on_gpus_share_a_placement_group(self, monkeypatch, tensor, pipeline, strategy):
        calls: list[tuple] = []

        def placement_group(bundles, strategy, name):
            calls.append((bundles, strategy, name))
            return f"group {len(calls)}"

        monkeypatch.setattr(stream_module.ray.util, "placement_group", placement_group)
        settings = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
        groups: list[Any] = []
        resources = stream_module._resources(TeacherConfig(model="toy", cpus=2, gpus=1, **settings), groups)
        assert resources["num_cpus"] == 2
        assert "num_gpus" not in resources, "the parts take the GPUs, not the actor"
        for name in ("group 1", "group 2"):  # each actor has its own
            chosen = resources["ray_remote_args_fn"]()["scheduling_strategy"]
            assert chosen.placement_group == name
            assert chosen.placement_group_capture_child_tasks
        assert [call[:2] for call in calls] == [([{"CPU": 2, "GPU": 1}] * 4, strategy)] * 2
        assert groups == ["group 1", "group 2"], "whoever started them removes them"
        names = {name for *_, name in calls}
        assert len(names - {""}) == 2, "groups without a name are taken for those of a dead Train controller"
