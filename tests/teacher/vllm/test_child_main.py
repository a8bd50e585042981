"""The engine's own process: what comes by its connection, and what goes back. vLLM's engine is a fake."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import pytest

from llkd_ray.teacher.vllm import child_main
from llkd_ray.teacher.vllm.requests import EngineResponse, NextToken, Samples, sampling_params

pytest.importorskip("vllm")

REQUEST = NextToken((3, 7))


class OutOfWork(Exception):
    """Ends what would wait for ever."""


class FakeEngine:
    """An LLMEngine that finishes one request a step, the oldest, and tells of all the others' progress."""

    def __init__(self, broken_after: int | None = None) -> None:
        self.under_way: dict[str, tuple[Any, Any]] = {}
        self.aborted: list[str] = []
        self.steps = 0
        self.broken_after = broken_after

    def has_unfinished_requests(self) -> bool:
        return bool(self.under_way)

    def add_request(self, name: str, prompt: Any, sampling: Any) -> None:
        if not prompt["prompt_token_ids"]:
            raise ValueError("the prompt is empty")
        self.under_way[name] = prompt["prompt_token_ids"], sampling

    def abort_request(self, names: Sequence[str]) -> None:
        for name in names:
            self.aborted.append(name)
            self.under_way.pop(name)

    def step(self) -> list[Any]:
        assert self.under_way, "a step with nothing to do computes for nobody"
        if self.steps == self.broken_after:
            raise RuntimeError("the engine is broken")
        self.steps += 1
        oldest = next(iter(self.under_way))
        outputs = [self._output(name, name == oldest) for name in self.under_way]
        del self.under_way[oldest]
        return outputs

    def _output(self, name: str, finished: bool) -> Any:
        token_ids, _ = self.under_way[name]
        logprob_A = {token: SimpleNamespace(logprob=-float(token)) for token in (3, 7)}
        said = SimpleNamespace(text="sea", token_ids=[1, 2], logprobs=[logprob_A])
        return SimpleNamespace(
            request_id=name, finished=finished, num_cached_tokens=token_ids[0], outputs=[said]
        )


class Inbox(queue.SimpleQueue):
    """Requests that are there already; whoever waits for another one ends the loop."""

    def __init__(self, *requests: Any) -> None:
        self.requests = list(requests)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if self.requests:
            return self.requests.pop(0)
        raise OutOfWork if block else queue.Empty

    def get_nowait(self) -> Any:
        return self.get(block=False)


def serve(engine: FakeEngine, *requests: Any) -> list[list[tuple[int, EngineResponse | str]]]:
    """What goes back, message by message, until there is no more work."""
    ours, theirs = Pipe()
    with ours, theirs:
        with pytest.raises(OutOfWork):
            child_main._serve(engine, Inbox(*requests), theirs)
        sent = []
        while ours.poll():
            sent.append(ours.recv())
    return sent


class TestServe:
    def test_every_request_gets_its_reply(self):
        engine = FakeEngine()
        sent = serve(engine, (0, [40], REQUEST), (1, [41], Samples(1, 5, 0.7)), (2, [42], REQUEST))
        assert [[number for number, _ in message] for message in sent] == [[0], [1], [2]]
        (_, first), (_, second), (_, third) = (response for message in sent for response in message)
        assert (first.cached_tokens, third.cached_tokens) == (40, 42)
        assert first.probs == pytest.approx((0.049787068, 0.00091188197))
        assert second == EngineResponse(41, answers=("sea",), answer_tokens=2)
        assert engine.steps == 3

    def test_all_that_are_there_are_in_the_first_step(self):
        engine = FakeEngine(broken_after=0)
        with pytest.raises(RuntimeError, match="broken"):
            serve(engine, *((number, [1], REQUEST) for number in range(50)))
        assert len(engine.under_way) == 50
        assert engine.under_way["7"] == ([1], sampling_params(REQUEST))

    def test_a_refusal_says_why_and_the_others_go_on(self):
        sent = serve(FakeEngine(), (0, [], REQUEST), (1, [41], REQUEST), (2, [], REQUEST))
        by_number = {number: response for message in sent for number, response in message}
        assert by_number.pop(1).cached_tokens == 41
        assert by_number == {0: "the prompt is empty", 2: "the prompt is empty"}

    def test_only_refusals(self):
        engine = FakeEngine()
        assert serve(engine, (0, [], REQUEST)) == [[(0, "the prompt is empty")]]
        assert engine.steps == 0

    def test_what_nobody_waits_for_is_taken_out(self):
        engine = FakeEngine()
        sent = serve(engine, (0, [40], REQUEST), (1, [41], REQUEST), (0, None, None))
        assert [number for message in sent for number, _ in message] == [1]
        assert engine.aborted == ["0"]

    def test_what_is_finished_already_is_not_taken_out_again(self):
        engine = FakeEngine()
        serve(engine, (0, [], REQUEST), (0, None, None), (9, None, None))
        assert engine.aborted == []


class TestProcess:
    """The module as a process, as far as it goes without a model."""

    def begin(self, *more: str) -> tuple[subprocess.Popen[bytes], Any]:
        ours, theirs = Pipe()
        script = "".join((*more, "from llkd_ray.teacher.vllm.child_main import main; main()"))
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", script, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return process, ours

    @pytest.mark.timeout(120)
    def test_it_ends_when_the_actor_is_gone_before_it_was_needed(self):
        process, ours = self.begin("import sys; sys.modules['vllm'] = sys;")
        ours.close()
        assert process.wait() == 0

    @pytest.mark.timeout(120)
    def test_it_ends_when_the_actor_is_gone_while_it_loads(self):
        slow = "import sys, time; sys.modules['vllm'] = sys; import llkd_ray.teacher.vllm.child_main as c;"
        process, ours = self.begin(slow, "c._start = lambda teacher: time.sleep(1000);")
        ours.send("the settings")
        ours.close()
        assert process.wait() == 0

    @pytest.mark.timeout(120)
    def test_why_it_did_not_start(self):
        broken = "import sys; sys.modules['vllm'] = sys; import llkd_ray.teacher.vllm.child_main as c;"
        process, ours = self.begin(broken, "c._start = lambda teacher: 1 / 0;")
        ours.send("the settings")
        assert ours.recv() == "ZeroDivisionError: division by zero"
        assert process.wait() == 1
