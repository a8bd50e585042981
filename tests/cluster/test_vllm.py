"""The teacher on a real vLLM engine."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from toys import toy_texts
from transformers import AutoModelForCausalLM

from llkd_ray.config import parse_config
from llkd_ray.console import Display
from llkd_ray.loop import distill
from llkd_ray.teacher import VllmTeacher

pytest.importorskip("vllm", reason="no vLLM for this machine is installed")
pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def vllm_settings(toy_settings: dict, tiny_llm: str) -> dict:
    teacher = {
        "kind": "vllm",
        "model": tiny_llm,
        "dtype": "float32",
        "max_model_len": 128,
        "lease_rows": 16,
        "prompt": {"instruction": "Which?", "show_labels": False},
    }
    return toy_settings | {"teacher": teacher}


def test_label_probabilities_are_those_of_a_plain_forward_pass(vllm_settings, tiny_llm, tmp_path):
    config = parse_config(vllm_settings)
    teacher = VllmTeacher(config, str(tmp_path / "run"), selector=None)
    texts = toy_texts(40, 3, seed=5)[0] + [" ".join(toy_texts(60, 3, seed=6)[0])]  # the last is cut
    try:
        answers = asyncio.run(teacher.answer([str(i) for i in range(len(texts))], texts))
    finally:
        teacher.engine.shutdown()
        del teacher.engine  # or it shuts down once more while Python goes, and complains
        gc.collect()

    model = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32).eval()
    room = config.teacher.max_model_len - 1
    for text, probs, tokens in zip(texts[:-1], answers.probs_NC, answers.prompt_tokens_N, strict=False):
        ids = teacher.tokenizer(teacher.prompt.render(text), return_tensors="pt")["input_ids"]
        assert ids.shape[1] == tokens
        with torch.inference_mode():
            expected = torch.softmax(model(ids).logits[0, -1], dim=-1)[teacher.label_ids]
        np.testing.assert_allclose(probs, expected.numpy(), atol=1e-3, rtol=1e-3)
    assert room - 2 <= answers.prompt_tokens_N[-1] <= room, "cut to what fits, give or take the seams"
    np.testing.assert_allclose(answers.probs_NC.sum(axis=1) + answers.off_label_N, 1.0, atol=1e-6)


def test_one_engine_a_run_and_a_killed_engine_is_replaced(vllm_settings, tmp_path):
    run_dir = tmp_path / "run"
    killed: list[int] = []

    def kill_engine_after_some_labels() -> None:
        while len(list(run_dir.glob("labels/*.parquet"))) < 3:
            time.sleep(0.02)
        # The first process whose run this is: other engines of the machine are not ours to end.
        for pid in engine_pids(str(run_dir)):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill_engine_after_some_labels, daemon=True)
    killer.start()
    with Display() as display:
        summary = distill(parse_config(vllm_settings), str(run_dir), display)
    assert len(killed) == 1
    assert summary["labelled"] == 500
    rows = [
        row for file in run_dir.glob("labels/*.parquet") for row in pq.read_table(file)["row"].to_pylist()
    ]
    assert len(rows) == len(set(rows)) == 620
    assert summary["engines_started"] == 2, "one for the run, one for the one that was killed"
    assert summary["texts_sent_but_not_answered"] <= 2 * 16, "what was in flight, at most"


def engine_pids(run_dir: str) -> list[int]:
    """Engine processes whose parent is a teacher actor of this run."""
    import json

    import psutil

    actors = [json.loads(file.read_text())["pid"] for file in Path(run_dir, "engines").glob("*.json")]
    children = [child for pid in actors if psutil.pid_exists(pid) for child in psutil.Process(pid).children()]
    return [child.pid for child in children if "EngineCore" in " ".join(child.cmdline())]
