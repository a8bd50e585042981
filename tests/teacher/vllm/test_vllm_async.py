"""vLLM's asynchronous engine, as the teacher's actor asks it; and why it did not start."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import TextFailed
from llkd_ray.teacher.vllm.backends import AsyncEngine
from llkd_ray.teacher.vllm.requests import EngineDied, EngineLost, EngineResponse, NextToken, Samples

pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError


class FakeVllm:
    """An AsyncLLM that gives ``outputs`` to each request, and then raises ``error``."""

    def __init__(self, *outputs: Any, error: Exception | None = None) -> None:
        self.outputs, self.error = outputs, error
        self.requests: list[tuple[list[int], Any, str]] = []
        self.is_closed = False

    async def generate(self, prompt, sampling, request_id):
        self.requests.append((prompt["prompt_token_ids"], sampling, request_id))
        for output in self.outputs:
            yield output
        if self.error:
            raise self.error

    def shutdown(self) -> None:
        self.is_closed = True


def output(*completions: Any, cached: int | None = None) -> Any:
    return SimpleNamespace(outputs=completions, num_cached_tokens=cached)


def next_token(**logprobs: float) -> Any:
    by_token = {int(name[1:]): SimpleNamespace(logprob=value) for name, value in logprobs.items()}
    return SimpleNamespace(logprobs=[by_token])


class TestReply:
    def ask(self, vllm: FakeVllm, request: Any, times: int = 1) -> list[EngineResponse]:
        engine = AsyncEngine(vllm)

        async def script():
            return [await engine.generate([5, 6], request) for _ in range(times)]

        return asyncio.run(script())

    def test_the_next_tokens_probabilities(self):
        vllm = FakeVllm(output(next_token(t7=-0.5, t3=-2.0, t9=0.0), cached=4))
        (response,) = self.ask(vllm, NextToken((3, 7)))
        assert response.cached_tokens == 4
        assert response.probs == pytest.approx((0.1353353, 0.6065307))
        ((prompt, sampling, _),) = vllm.requests
        assert prompt == [5, 6]
        assert (sampling.max_tokens, sampling.temperature, sampling.logprob_token_ids) == (1, 0.0, [3, 7])
        assert not sampling.detokenize

    def test_samples(self):
        completions = [SimpleNamespace(text="sea", token_ids=[1, 2]), SimpleNamespace(text="", token_ids=[1])]
        vllm = FakeVllm(output(*completions))
        (response,) = self.ask(vllm, Samples(2, longest=3, temperature=0.7))
        assert response == EngineResponse(0, answers=("sea", ""), answer_tokens=3)
        ((_, sampling, _),) = vllm.requests
        assert (sampling.n, sampling.max_tokens, sampling.temperature) == (2, 3, 0.7)

    def test_the_last_output_counts_and_each_request_has_a_name_of_its_own(self):
        vllm = FakeVllm(output(next_token(t1=-9.0)), output(next_token(t1=0.0)))
        assert [response.probs for response in self.ask(vllm, NextToken((1,)), times=3)] == [(1.0,)] * 3
        assert len({name for _, _, name in vllm.requests}) == 3

    @pytest.mark.parametrize(
        ("error", "kind", "reason"),
        [
            (EngineDeadError(), EngineDied, "engine_died"),
            (EngineGenerateError(), EngineLost, "engine_error"),
            (VLLMValidationError("the prompt is too long"), TextFailed, "too long"),
            (ValueError("too long"), TextFailed, "too long"),
        ],
    )
    def test_what_goes_wrong(self, error, kind, reason):
        with pytest.raises(kind, match=reason) as caught:
            self.ask(FakeVllm(error=error), NextToken((1,)))
        assert type(caught.value) is kind
        if kind is TextFailed:
            assert caught.value.reason == "refused_by_engine"

    def test_shutdown(self):
        vllm = FakeVllm()
        AsyncEngine(vllm).shutdown()
        assert vllm.is_closed


class TestRootCause:
    def start(self, monkeypatch, folder: Path, said: str, error: Exception) -> RuntimeError:
        """What is raised where the engine's processes write to stderr and vLLM then raises."""
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        def from_engine_args(arguments, usage_context):
            assert usage_context is UsageContext.LLM_CLASS, "batches of a whole corpus, not of a server"
            os.write(2, said.encode())
            raise error

        monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)
        with pytest.raises(RuntimeError) as caught:
            AsyncEngine.start(TeacherConfig(model=str(folder)))
        return caught.value

    def test_the_first_error_that_an_engine_wrote_is_the_reason(self, monkeypatch, tmp_path, capfd):
        monkeypatch.delenv("LLKD_VERBOSE", raising=False)
        said = (
            "(EngineCore pid=7) ERROR 05-05 05:05:05 [core.py:99] Traceback (most recent call last):\n"
            "(EngineCore pid=7) ERROR 05-05 05:05:05 [core.py:99] torch.OutOfMemoryError: no memory is left\n"
            "(EngineCore pid=7) ERROR 05-05 05:05:06 [core.py:99] RuntimeError: the worker failed\n"
        )
        reason = str(
            self.start(monkeypatch, tmp_path, said, RuntimeError("Engine core initialization failed."))
        )
        assert reason == "OutOfMemoryError: no memory is left"
        assert "no memory" not in capfd.readouterr().err, "a traceback of pages is nobody's reading"
        os.write(2, b"and after that stderr is as it was")
        assert "as it was" in capfd.readouterr().err

    def test_an_engine_that_wrote_nothing(self, monkeypatch, tmp_path):
        monkeypatch.delenv("LLKD_VERBOSE", raising=False)
        assert (
            str(self.start(monkeypatch, tmp_path, "", OSError("no such model"))) == "OSError: no such model"
        )

    def test_whoever_wants_to_read_it_may(self, monkeypatch, tmp_path, capfd):
        monkeypatch.setenv("LLKD_VERBOSE", "1")
        reason = str(self.start(monkeypatch, tmp_path, "MemoryError: too small\n", RuntimeError("failed")))
        assert reason == "RuntimeError: failed"
        assert "MemoryError: too small" in capfd.readouterr().err
