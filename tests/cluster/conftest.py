"""What the tests with a real Ray share: a private place for its files, and toy runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys import config_tree as toy_config_tree
from toys import write_answers, write_corpus


@pytest.fixture
def own_cluster_env() -> Iterator[dict[str, str]]:
    """Environment of a program that starts a Ray of its own, in a folder of its own."""
    folder = tempfile.mkdtemp(prefix="llkd-")  # Ray's sockets need a short path
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    yield kept | {"RAY_TMPDIR": folder, "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def toy_settings(tmp_path: Path, tiny_encoder: str) -> dict:
    """A whole run that takes seconds: 600 pool texts, 120 test texts, recorded answers, a tiny student."""
    pool = write_corpus(tmp_path / "pool.parquet", 600, seed=1)
    test = write_corpus(tmp_path / "test.parquet", 120, seed=2)
    answers = write_answers(tmp_path / "answers.parquet", [pool, test])
    return toy_config_tree(
        corpus={"uri": str(pool), "id": "id", "gold": "label"},
        test={"uri": str(test), "id": "id", "gold": "label"},
        teacher={"kind": "recorded", "recorded": {"uri": str(answers)}, "ticket_size": 32},
        student={
            "model": tiny_encoder,
            "epochs": 20,
            "min_steps": 1,
            "learning_rate": 3e-3,
            "max_tokens": 32,
        },
        budget={"rounds": 3, "train": 150, "labels": 500},
        evaluation={"holdout": 40},
        run={"dir": str(tmp_path / "runs")},
    )


@pytest.fixture
def vllm_settings(toy_settings: dict, tiny_llm: str) -> dict:
    """The same with a real engine for the teacher, of random weights: little of its mass is on labels."""
    teacher = {
        "kind": "vllm",
        "model": tiny_llm,
        "dtype": "float32",
        "max_model_len": 128,
        "max_off_label": 1.0,
        "ticket_size": 16,
        "prompt": {"instruction": "Which?", "show_labels": False},
    }
    return toy_settings | {"teacher": teacher}
