"""The guide on replacing an API call, followed: with a server on this machine in the API's place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pages import ROOT, blocks
from stub_server import Asked, Reply, StubServer, likeliest, usage
from toys import toy_texts

from llkd_ray import distill

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("local_ray")]
GUIDE = (ROOT / "docs/guides/replace-an-api-call.md").read_text(encoding="utf-8")


def answer(asked: Asked) -> Reply:
    """A letter by the length of the text, mostly."""
    best = "ABC"[len(asked.text.rpartition("Text: ")[2].split()) % 3]
    return likeliest({letter: 0.9 if letter == best else 0.03 for letter in "ABC"}, usage=usage(50, 1))


def test_an_api_call_is_replaced(tiny_encoder, tmp_path: Path):
    texts, _ = toy_texts(300, 3, seed=5)
    (tmp_path / "messages.csv").write_text("\n".join(["text", *texts]) + "\n")
    (block,) = blocks(GUIDE, "yaml")
    with StubServer(answer) as server:
        changes = {
            "corpus.uri": str(tmp_path / "messages.csv"),
            "teacher.server.base_url": server.base_url,
            "student": {"model": tiny_encoder, "min_steps": 5, "max_tokens": 32, "precision": "float32"},
            "budget.labels": 200,
            "budget.train": 40,
            "budget.rounds": 2,
            "run.dir": str(tmp_path / "runs"),
        }
        found = distill(yaml.safe_load(block), changes)
    spent = found.summary["usage"]["teacher"]
    assert found.summary["labelled"] == spent["texts"] == 200
    assert spent["cost"] == pytest.approx(200 * (50 * 0.15 + 0.60) / 1e6)
    assert found.accuracy is None, "nobody has said what is true"
    assert len(found.metrics) == 2
    assert Path(found.report).exists()
