"""The teacher on a real vLLM engine on a GPU. Needs a GPU and vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch
from toys import NAMES, toy_texts
from transformers import AutoModelForCausalLM

from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import Answers, Unlimited
from llkd_ray.teacher.prompt import encode_prompts, label_sequences
from llkd_ray.teacher.vllm.teacher import VllmTeacher

pytest.importorskip("vllm", reason="no vLLM for this machine is installed")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]

LABELS = LabelsConfig(names=NAMES[:3])


class Bench:
    """A teacher, asked in one event loop; ``starts`` holds the seconds of each of its engines' starts."""

    def __init__(self, model: str) -> None:
        teacher = TeacherConfig.model_validate(
            {
                "model": model,
                "dtype": "bfloat16",
                "gpus": 1,
                "max_model_len": 160,
                "prompt": {"show_labels": False},
                "engine": {"gpu_memory_utilization": 0.2, "enforce_eager": True},
            }
        )
        self.starts: list[float] = []
        self.vllm_teacher = VllmTeacher(teacher, LABELS, self.starts.append)
        self._loop = asyncio.new_event_loop()

    def ask(self, texts: list[str]) -> Answers:
        ids = list(map(str, range(len(texts))))
        return self._loop.run_until_complete(self.vllm_teacher.label(ids, texts, Unlimited()))

    def close(self) -> None:
        self.vllm_teacher.close()
        self._loop.close()


def among_labels(probs_NC: np.ndarray) -> np.ndarray:
    """As shares of the labels; a random model gives most of its probability to other tokens."""
    return probs_NC / probs_NC.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def bench(tiny_llm: str) -> Iterator[Bench]:
    made = Bench(tiny_llm)
    yield made
    made.close()


def test_label_probabilities_are_those_of_a_plain_forward_pass(bench, tiny_llm):
    texts = toy_texts(300, 3, seed=5)[0]
    answers = bench.ask(texts)
    vllm_teacher = bench.vllm_teacher
    encoded, _ = encode_prompts(vllm_teacher.prompt, texts, vllm_teacher.tokenizer, 159, "tail")
    tokens = [token for (token,) in label_sequences(vllm_teacher.prompt, LABELS, vllm_teacher.tokenizer)]
    model = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected_NC = np.array(
            [model(torch.tensor([ids])).logits[0, -1].softmax(-1)[tokens].numpy() for ids in encoded]
        )
    assert answers.answered_N.all()
    assert np.abs(among_labels(answers.probs_NC) - among_labels(expected_NC)).max() < 0.06, "bf16's rounding"
    assert np.abs(answers.probs_NC.sum(axis=1) + answers.off_label_N - 1.0).max() < 1e-6
    assert np.ptp(among_labels(expected_NC)[:, 0]) > 0.5, "the texts get different answers"
    assert len(bench.starts) == 1


def test_an_engine_that_was_killed_is_started_anew(bench):
    texts = toy_texts(20, 3, seed=6)[0]
    before, starts = bench.ask(texts), len(bench.starts)
    for child in psutil.Process().children(recursive=True):
        if "llkd_ray.teacher.vllm.child_main" in child.cmdline() or "EngineCore" in child.name():
            os.kill(child.pid, signal.SIGKILL)
    after = bench.ask(texts)
    assert len(bench.starts) == starts + 1
    assert after.answered_N.all()
    assert np.abs(among_labels(after.probs_NC) - among_labels(before.probs_NC)).max() < 0.06
