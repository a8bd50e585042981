"""A whole run whose teacher and student share one GPU. Needs a GPU, Ray and vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toys import config_tree, write_corpus

from llkd_ray.config.loading import parse_config
from llkd_ray.display import Display

pytest.importorskip("vllm", reason="no vLLM for this machine is installed")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("local_ray"),
]


def test_a_run_from_corpus_to_model(tiny_llm, tiny_encoder, tmp_path: Path):
    from llkd_ray.run.loop import distill

    pool = write_corpus(tmp_path / "pool.parquet", 600, seed=1)
    test = write_corpus(tmp_path / "test.parquet", 120, seed=2)
    tree = config_tree(
        corpus={"uri": str(pool), "id": "id", "gold": "label"},
        test={"uri": str(test), "id": "id", "gold": "label"},
        teacher={
            "kind": "vllm",
            "recorded": None,
            "model": tiny_llm,
            "dtype": "bfloat16",
            "gpus": 0.5,
            "max_model_len": 160,
            "max_off_label": 1.0,
            "ticket_size": 32,
            "engine": {"gpu_memory_utilization": 0.2, "enforce_eager": True},
        },
        student={"model": tiny_encoder, "gpus": 0.5, "cpus": 0.4, "precision": "bfloat16", "min_steps": 10},
        budget={"rounds": 3, "train": 150, "labels": 500},
        evaluation={"holdout": 40},
        run={"dir": str(tmp_path / "runs")},
    )
    with Display() as display:
        summary = distill(parse_config(tree), str(tmp_path / "run"), display)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert summary["labelled"] == 500
    assert summary["trained"] == 150
    assert len(list((tmp_path / "run/engines").glob("*.json"))) == 1
