"""Prompts are measured as the teachers would send them."""

from __future__ import annotations

import numpy as np
import pytest
from toys import NAMES, toy_texts

from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.footprint import RequestCounts, prompt_sizes
from llkd_ray.teacher.vllm.teacher import prepare

LABELS = LabelsConfig(names=NAMES[:3])
TEXTS = toy_texts(40, 3, seed=5)[0]


def local(tiny_llm: str, **changes) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": tiny_llm, "max_model_len": 256, **changes})


def served(**server) -> TeacherConfig:
    server = {"base_url": "http://127.0.0.1:9/v1", **server}
    return TeacherConfig.model_validate({"kind": "openai", "model": "m", "server": server})


def test_a_teacher_is_measured_by_its_tokenizer_local_or_served(tiny_llm):
    teacher = local(tiny_llm)
    tokenizer, prompt, _ = prepare(teacher, LABELS, "teacher")
    sizes = prompt_sizes(teacher, LABELS, TEXTS, "teacher")
    assert sizes.tokens_N.tolist() == [len(tokenizer(prompt.render(text))["input_ids"]) for text in TEXTS]
    assert not sizes.cut_N.any()
    assert (sizes.requests, sizes.counted) == (RequestCounts((1, 1), (0, 0), (1, 1)), True)
    assert sizes.first == prompt.render(TEXTS[0])
    head = len(tokenizer(prompt.head.rstrip())["input_ids"])
    assert abs(sizes.shared - head) <= 1, "all that stands before the text"
    assert prompt_sizes(teacher, LABELS, TEXTS[:1], "teacher").shared == 0, "unknown of one text"
    by_server = prompt_sizes(served(tokenizer=tiny_llm, scores="label_ids"), LABELS, TEXTS, "teacher")
    assert (by_server.tokens_N.tolist(), by_server.counted) == (sizes.tokens_N.tolist(), True)


def test_cuts_are_noticed(tiny_llm):
    whole = prompt_sizes(local(tiny_llm), LABELS, TEXTS, "teacher")
    room = int(np.median(whole.tokens_N))
    sizes = prompt_sizes(local(tiny_llm, max_model_len=room + 1), LABELS, TEXTS, "teacher")
    assert sizes.cut_N.tolist() == (whole.tokens_N > room).tolist()
    assert sizes.tokens_N.max() <= room


@pytest.mark.parametrize(
    ("server", "methods", "prompts"),
    [
        ({"scores": "top_logprobs"}, ("top_logprobs",), (1, 1)),
        ({"scores": "votes"}, ("votes",), (1, 10)),
        ({}, ("top_logprobs", "votes"), (1, 10)),
    ],
)
def test_a_server_without_a_tokenizer_is_measured_by_characters(server, methods, prompts):
    sizes = prompt_sizes(served(**server), LABELS, TEXTS, "teacher")
    assert (sizes.methods, sizes.requests.prompts, sizes.counted) == (methods, prompts, False)
    assert sizes.tokens_N[0] == round(len(sizes.first) / 4)
    assert TEXTS[0] in sizes.first
