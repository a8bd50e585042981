"""When a training that is lost begins anew; the whole of it is tested with real runs in tests/cluster/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from toys import make_config

from llkd_ray.student import ray_train

CONTROLLER_DIED = -1


class Answer:
    """A method of an actor that is none: ``ray.get`` is replaced, too."""

    def __init__(self, answer: Any) -> None:
        self.remote = answer


class RoundCounter:
    def __init__(self) -> None:
        self.done = 0
        self.next_round = Answer(lambda: self.done)


@pytest.fixture
def keep_training(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Training whose runs are lost after so many rounds each, or end well after None.

    Or Ray Train's own actor dies before a round is finished.
    """

    def go(runs: list[int | None], max_failures: int = 3, cleaned: list[Any] | None = None) -> None:
        cleaned = [] if cleaned is None else cleaned
        selector = RoundCounter()

        class Trainer:
            def fit(self) -> None:
                rounds = runs.pop(0)
                if rounds == CONTROLLER_DIED:
                    raise RayActorError
                if rounds is not None:
                    selector.done += rounds
                    raise WorkerGroupError("a rank is lost", {0: RuntimeError("gone")})

        monkeypatch.setattr(ray_train.ray, "get", lambda answer: answer)
        monkeypatch.setattr(ray_train, "_build_trainer", lambda *_: Trainer())
        monkeypatch.setattr(ray_train, "remove_left_groups", cleaned.append)
        config = make_config(student={"max_failures": max_failures})
        ray_train._keep_training(config, None, selector)  # type: ignore[arg-type]

    return go


def test_a_run_that_ends_well_is_the_only_one(keep_training):
    runs = [None, None]
    keep_training(runs)
    assert runs == [None]


def test_lost_runs_are_replaced_as_long_as_rounds_are_finished(keep_training):
    runs = [1, 2, 1, None]
    keep_training(runs)
    assert runs == []


def test_what_breaks_the_same_round_again_ends_the_training(keep_training):
    runs = [2, 0, None]
    with pytest.raises(WorkerGroupError, match="a rank is lost"):
        keep_training(runs)
    assert runs == [None]


def test_ray_trains_own_actor_may_die_so_often_in_a_round(keep_training):
    runs: list[int | None] = [CONTROLLER_DIED, CONTROLLER_DIED, 1, CONTROLLER_DIED, CONTROLLER_DIED, None]
    cleaned: list[dict[str, float]] = []
    keep_training(runs, max_failures=2, cleaned=cleaned)
    assert runs == []
    assert cleaned == [{"CPU": 0.5}] * 4, "what each dead one has booked for its ranks"
    runs = [1, *[CONTROLLER_DIED] * 3, None]
    with pytest.raises(RayActorError):
        keep_training(runs, max_failures=2)
    assert runs == [None]


def test_no_failures_means_none(keep_training):
    runs = [1, None]
    with pytest.raises(WorkerGroupError):
        keep_training(runs, max_failures=0)
    assert runs == [None]


VLLM = {"kind": "vllm", "model": "toy-model"}


@pytest.mark.parametrize(
    ("teacher", "waits"),
    [
        (VLLM, True),
        (VLLM | {"actors": 2}, True),
        (VLLM | {"actors": [1, 2]}, False),
        (VLLM | {"gpus": 1}, False),
        ({"kind": "openai", "model": "toy-model", "server": {"base_url": "http://localhost:1/v1"}}, False),
        ({"kind": "cascade", "cascade": {"small": VLLM, "large": VLLM}}, True),
        ({"kind": "cascade", "cascade": {"small": VLLM, "large": VLLM | {"gpus": 1}}}, False),
    ],
    ids=["CPUs", "several", "a pool that may grow", "GPU", "server", "cascade", "cascade with a GPU"],
)
def test_ranks_wait_for_labels_where_they_would_hold_up_an_engine(monkeypatch, teacher, waits):
    seen = []

    class Trainer:
        def fit(self) -> None:
            seen.append("fit")

    selector = RoundCounter()
    selector.wait_first_labels = Answer(lambda: seen.append("labels"))
    monkeypatch.setattr(ray_train.ray, "get", lambda answer: answer)
    monkeypatch.setattr(ray_train, "_build_trainer", lambda *_: Trainer())
    ray_train._keep_training(make_config(teacher=teacher), None, selector)
    assert seen == (["labels", "fit"] if waits else ["fit"])
