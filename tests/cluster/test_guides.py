"""Guides, followed, with a server on this machine in the place of an API or of a teacher on a GPU."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from pages import ROOT, arguments_of, blocks, commands
from stub_server import Request, Response, StubServer, likeliest, usage
from toys import NAMES, WORDS, toy_texts

from llkd_ray import distill
from llkd_ray.cli.main import main
from llkd_ray.config.teacher import ANSWER_LETTERS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("local_ray")]


def guide(name: str) -> str:
    return (ROOT / f"docs/guides/{name}.md").read_text(encoding="utf-8")


def answer(request: Request) -> Response:
    """A letter by the length of the text, mostly."""
    best = ANSWER_LETTERS[len(request.text.rpartition("Text: ")[2].split()) % 3]
    return likeliest(
        {letter: 0.9 if letter == best else 0.03 for letter in ANSWER_LETTERS[:3]}, usage=usage(50, 1)
    )


def test_an_api_call_is_replaced(tiny_encoder, tmp_path: Path):
    texts, _ = toy_texts(300, 3, seed=5)
    (tmp_path / "messages.csv").write_text("\n".join(["text", *texts]) + "\n")
    (block,) = blocks(guide("replace-an-api-call"), "yaml")
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


def grade(request: Request) -> Response:
    """A page's grade by its words: 0 for the first toy class to 5 for the last."""
    words = set(request.text.rpartition("Text: ")[2].split())
    hits = [len(words & set(WORDS[name].split())) for name in NAMES]
    best = hits.index(max(hits))
    return likeliest({ANSWER_LETTERS[i]: 0.9 if i == best else 0.015 for i in range(6)}, usage=usage(50, 1))


def test_pages_are_graded_and_the_better_ones_kept(tiny_encoder, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts, grades = toy_texts(520, 6, seed=6)
    (tmp_path / "pages").mkdir()
    for path, chosen in (("pages/all.csv", slice(0, 400)), ("graded.csv", slice(400, 520))):
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "grade"])
            rows = enumerate(zip(texts[chosen], grades[chosen], strict=True))
            writer.writerows([f"{path}-{i}", text, mark] for i, (text, mark) in rows)
    page = guide("quality-classifier")
    (block,) = blocks(page, "yaml")
    tree = yaml.safe_load(block)
    with StubServer(grade) as server:
        tree["teacher"] |= {"kind": "openai", "server": {"base_url": server.base_url}, "gpus": 0}
        tree["corpus"]["uri"] = "pages/*.csv"
        small = {
            "model": tiny_encoder,
            "gpus": 0,
            "workers": 1,
            "precision": "float32",
            "max_tokens": 32,
            "min_steps": 100,
            "learning_rate": 3e-3,
        }
        changes = {
            "student": tree["student"] | small,
            "budget": {"rounds": 2, "labels": 300, "train": 150},
            "run": {"dir": "runs", "name": "edu"},
        }
        found = distill(tree, changes)
    assert found.accuracy > 0.5, "the six grades are learned"

    ours = {"s3://bucket/runs/edu": found.run_dir, "s3://bucket/pages/*.parquet": "pages/*.csv"}
    called = [arguments_of(words) for words in commands(page)]
    predictions = [words for words in called if words and words[0] == "predict"]
    for words, out in zip(predictions, ("by_precision", "by_hand"), strict=True):
        here = ours | {"s3://bucket/kept": out}
        assert main([here.get(word, word) for word in words]) == 0
    kept = pq.read_table("by_hand/predictions").filter(pc.field("accepted"))
    assert len(kept) > 0
    assert min(kept["p_min_grade"].to_pylist()) >= 0.8
    gold = dict(zip(texts, grades, strict=True))
    right = [gold[text] >= 3 for text in kept["text"].to_pylist()]
    assert sum(right) / len(right) > 0.7
    assert "3" in json.dumps(json.loads(Path("by_precision/thresholds.json").read_text()))
