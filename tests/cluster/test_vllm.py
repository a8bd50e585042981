"""The teacher on a real vLLM engine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from toys import toy_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from llkd_ray.config.loading import parse_config
from llkd_ray.config.schema import LabelsConfig
from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.display import Display
from llkd_ray.run.loop import distill
from llkd_ray.teacher.base import Answers, TeacherDown, Unlimited
from llkd_ray.teacher.prompt import build_prompt, encode_prompts, label_sequences
from llkd_ray.teacher.vllm.teacher import VllmTeacher

pytest.importorskip("vllm", reason="no vLLM for this machine is installed")
pytestmark = pytest.mark.timeout(600)

MODEL_LEN = 160
PREFIXES = ("sea", "sea wind", "sea wind storm", "sea winter", "kitchen", "kitchen stove")
"""Each but two goes on from one before it."""
_THINGS = (
    "boat pan tulip tram drum snow bread bee bus song ice kettle rake bridge choir frost oven pond lamp "
    "flute coat soup tide"
)
MANY = tuple(
    f"{place} {thing}"
    for place in ("sea", "kitchen", "garden", "street", "music", "winter")
    for thing in _THINGS.split()
)
"""138 names of several tokens each."""


@pytest.fixture(scope="module")
def engine_of(tiny_llm: str) -> Iterator[Callable[..., VllmTeacher]]:
    """Teachers that share one engine."""
    made: list[VllmTeacher] = []

    def make(names: Sequence[str], **settings) -> VllmTeacher:
        teacher = TeacherConfig.model_validate(
            {"model": tiny_llm, "dtype": "float32", "max_model_len": MODEL_LEN, "min_branch_prob": 0.0}
            | settings
        )
        vllm_teacher = VllmTeacher(teacher, LabelsConfig(names=tuple(names)), lambda seconds: None)
        if made:
            vllm_teacher.engine = made[0].engine
        made.append(vllm_teacher)
        return vllm_teacher

    # One loop for all, as an engine belongs to the loop that it was first used in.
    loop = asyncio.new_event_loop()

    def make_and_ask(names: Sequence[str], texts: Sequence[str], **settings) -> tuple[VllmTeacher, Answers]:
        vllm_teacher = make(names, **settings)
        ids = [str(i) for i in range(len(texts))]
        return vllm_teacher, loop.run_until_complete(vllm_teacher.label(ids, texts, Unlimited()))

    yield make_and_ask
    made[0].engine.close()
    made.clear()
    loop.close()
    gc.collect()


@pytest.fixture(scope="module")
def plain(tiny_llm: str) -> Callable[[Sequence[int], Sequence[int]], float]:
    """Probability of some tokens after others, by a plain forward pass in float32."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32).eval()

    @torch.inference_mode()
    def probability(before: Sequence[int], tokens: Sequence[int]) -> float:
        log_p_TV = model(torch.tensor([[*before, *tokens]])).logits[0].log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(tokens) - 1)
        return float(
            torch.stack([log_p_TV[t, token] for t, token in zip(places, tokens, strict=True)]).sum().exp()
        )

    return probability


@pytest.mark.parametrize(
    ("names", "prompt", "n_texts"),
    [
        (("sea", "kitchen", "garden"), {"show_labels": False}, 40),
        (PREFIXES, {"answer": "names"}, 20),
        (MANY, {"answer": "names", "show_labels": False}, 2),
    ],
    ids=["letters", "names that go on from one another", "more names than one request takes"],
)
def test_label_probabilities_are_those_of_a_plain_forward_pass(
    engine_of, plain, tiny_llm, names, prompt, n_texts
):
    texts = toy_texts(n_texts, 3, seed=5)[0] + [" ".join(toy_texts(60, 3, seed=6)[0])]  # the last is cut
    vllm_teacher, answers = engine_of(names, texts, prompt={"instruction": "Which?"} | prompt)

    # All that follows is without the engine and without the trie.
    tokenizer, labels = AutoTokenizer.from_pretrained(tiny_llm), LabelsConfig(names=tuple(names))
    whole = build_prompt(vllm_teacher.teacher.prompt, labels, tokenizer)
    sequences = label_sequences(whole, labels, tokenizer)
    room = MODEL_LEN - max(map(len, sequences))
    encoded, cut_N = encode_prompts(whole, texts, tokenizer, room, "tail")
    assert cut_N.tolist() == [False] * n_texts + [True]
    longer = [
        [j for j, other in enumerate(sequences) if len(other) > len(own) and other[: len(own)] == own]
        for own in sequences
    ]
    for before, probs_C in zip(encoded, answers.probs_NC, strict=True):
        sequence_C = [plain(before, own) for own in sequences]
        # What begins with a longer label is that label's; of longer ones that go on from each other, the
        # shortest holds the rest.
        nearest = [
            [j for j in after if not any(i in after and j in longer[i] for i in after)] for after in longer
        ]
        expected_C = [
            p - sum(sequence_C[j] for j in more) for p, more in zip(sequence_C, nearest, strict=True)
        ]
        np.testing.assert_allclose(probs_C, expected_C, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(answers.probs_NC.sum(axis=1) + answers.off_label_N, 1.0, atol=1e-6)
    assert answers.usage.cut_texts == 1
    assert answers.answered_N.all()


def test_only_names_that_matter_are_followed(engine_of):
    texts = toy_texts(20, 3, seed=8)[0]
    # Longer than a block of the cache, so that there is something to be found in it.
    prompt = {"answer": "names", "show_labels": False, "instruction": 12 * "Which? "}
    _, exact = engine_of(MANY, texts, prompt=prompt)
    _, answers = engine_of(MANY, texts, prompt=prompt, min_branch_prob=5e-4)
    assert np.abs(answers.probs_NC - exact.probs_NC).max() < 5e-4
    np.testing.assert_allclose(answers.probs_NC.sum(axis=1) + answers.off_label_N, 1.0, atol=1e-6)
    assert answers.usage.requests < 0.75 * exact.usage.requests
    assert answers.usage.cached_tokens > 0, "what the requests for a text have in common is in the cache"


def test_votes_are_shares_of_sampled_answers(engine_of):
    texts = toy_texts(10, 3, seed=9)[0]
    _, answers = engine_of(("sea", "kitchen", "garden"), texts, confidence={"method": "votes", "samples": 8})
    np.testing.assert_allclose(answers.probs_NC.sum(axis=1) + answers.off_label_N, 1.0)
    np.testing.assert_allclose((8 * answers.probs_NC) % 1, 0.0, atol=1e-9)
    assert answers.usage.requests == 10
    assert answers.usage.answer_tokens <= 8 * 10


def run(settings: dict, folder: Path) -> dict:
    with Display() as display:
        return distill(parse_config(settings), str(folder), display)


def labelled_rows(run_dir: Path) -> list[int]:
    tables = [pq.read_table(file) for file in run_dir.glob("labels/*.parquet")]
    return [row for table in tables for row in table["row"].to_pylist()]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_an_engine_that_is_lost_is_replaced_and_nothing_with_it(vllm_settings, tmp_path, fault):
    if fault == signal.SIGSTOP:
        vllm_settings["teacher"] |= {"timeout_s": 30}  # a busy machine may hold up a sound engine, too
    run_dir = tmp_path / "run"
    hit: list[int] = []

    def harm_engine_after_some_labels() -> None:
        # Found first: so small a model labels all within a few seconds.
        while not (pids := engine_pids(run_dir)):
            time.sleep(0.02)
        while len(list(run_dir.glob("labels/*.parquet"))) < 3:
            time.sleep(0.005)
        for pid in pids:
            os.kill(pid, fault)
            hit.append(pid)

    threading.Thread(target=harm_engine_after_some_labels, daemon=True).start()
    summary = run(vllm_settings, run_dir)
    assert len(hit) == 1
    assert summary["labelled"] == 500
    rows = labelled_rows(run_dir)
    assert len(rows) == len(set(rows)) == 620
    assert summary["engines_started"] == 2, "one for the run, one for the one that was lost"
    assert summary["texts_sent_but_not_answered"] == 0, "the actor lived on and asked again itself"
    usage = summary["usage"]["teacher"]
    assert usage["texts"] == 620
    assert 620 < usage["requests"] <= 620 + 2 * 16, "what was under way was asked again, and nothing else"
    assert not list((run_dir / "quarantine").glob("teacher-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_an_engine_that_has_no_memory_ends_the_run_with_the_reason(vllm_settings, tmp_path):
    vllm_settings["teacher"] |= {"kv_cache_gib": 100_000, "attempts": 1}
    with pytest.raises(
        TeacherDown, match=r"did not start in 1 tries: ValueError: Available memory .* requested memory"
    ):
        run(vllm_settings, tmp_path / "run")
    assert labelled_rows(tmp_path / "run") == []
    # With memory, the same run goes on.
    config = tmp_path / "run/config.yaml"
    mended = vllm_settings | {"teacher": vllm_settings["teacher"] | {"kv_cache_gib": 1}}
    assert "100000" in config.read_text()
    assert run(mended, tmp_path / "run")["labelled"] == 500


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_second_run_with_another_policy_asks_nothing_and_starts_no_engine(vllm_settings, tmp_path):
    first = run(vllm_settings, tmp_path / "first")
    other = vllm_settings | {"selection": {"policy": "random"}, "run": vllm_settings["run"] | {"seed": 7}}
    second = run(other | {"budget": vllm_settings["budget"] | {"labels": 450}}, tmp_path / "second")
    usage = second["usage"]["teacher"]
    assert second["labelled"] == 450
    assert usage["texts"] + usage["reused_texts"] == 450 + 120
    known = set(labelled_rows(tmp_path / "first"))
    wanted = set(labelled_rows(tmp_path / "second"))
    assert usage["texts"] == len(wanted - known), "another seed reads some texts that nobody has read"
    third = run(other | {"budget": vllm_settings["budget"] | {"labels": 450}}, tmp_path / "third")
    usage = third["usage"]["teacher"]
    assert (usage["texts"], usage["requests"], usage["prompt_tokens"]) == (0, 0, 0)
    assert usage["reused_texts"] == 570
    assert usage["reused_tokens"] > 570 * 20
    assert third["engines_started"] == 0
    assert third["teacher"]["accuracy"] == second["teacher"]["accuracy"] == first["teacher"]["accuracy"]


def engine_pids(run_dir: Path) -> list[int]:
    """Engine processes whose parent is a teacher actor of this run: others are not ours to harm.

    Ours, or vLLM's where a machine has several memory nodes, which is known by how it was spawned, too: a
    process whose first environment variable was changed cannot be given a title.
    """
    found = []
    for file in run_dir.glob("engines/*.json"):
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(json.loads(file.read_text())["pid"]).children():
                # Some live for a moment only.
                with contextlib.suppress(psutil.NoSuchProcess):
                    command = " ".join(child.cmdline())
                    if any(name in command for name in ("child_main", "EngineCore", "spawn_main")):
                        found.append(child.pid)
    return found
