"""What a user sees after a mistake: one line with the field, the value and the remedy, and status 2.

Bad rows are no mistake of the run: they go to quarantine, are counted, and the run goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from llkd_ray.cli.main import USER_MISTAKE
from llkd_ray.cli.train import distill_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("local_ray")]


def run(settings: dict, tmp_path: Path, *flags: str) -> int:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    return distill_job([str(config), "--set", "run.name=run", *flags])


def changed(settings: dict, section: str, **fields: object) -> dict:
    return settings | {section: {**(settings[section] or {}), **fields}}


def vllm(settings: dict, model: str, **prompt: object) -> dict:
    return settings | {"teacher": {"kind": "vllm", "model": model, "prompt": prompt}}


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["run", "plan"])
class TestOneLine:
    """The same message from a run and from its plan; neither starts anything before."""

    def refuse(self, capfd, settings: dict, tmp_path: Path, flags: tuple[str, ...]) -> str:
        assert run(settings, tmp_path, *flags) == USER_MISTAKE
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    def test_missing_file(self, toy_settings, tmp_path, capfd, flags):
        message = self.refuse(
            capfd, changed(toy_settings, "corpus", uri=str(tmp_path / "no.parquet")), tmp_path, flags
        )
        assert "corpus.uri" in message
        assert "no.parquet" in message

    def test_wrong_column(self, toy_settings, tmp_path, capfd, flags):
        message = self.refuse(capfd, changed(toy_settings, "corpus", text="body"), tmp_path, flags)
        assert "corpus.text" in message
        assert "'body'" in message
        assert "id, text, label" in message

    def test_unknown_key(self, toy_settings, tmp_path, capfd, flags):
        message = self.refuse(capfd, changed(toy_settings, "budget", round=3), tmp_path, flags)
        assert "budget.round: unknown setting" in message
        assert "rounds" in message

    def test_one_label(self, toy_settings, tmp_path, capfd, flags):
        message = self.refuse(capfd, toy_settings | {"labels": {"names": ["sea"]}}, tmp_path, flags)
        assert "labels: names has 1 label(s): a classifier needs at least two" in message

    def test_a_prompt_that_leaves_the_text_out(self, toy_settings, tiny_llm, tmp_path, capfd, flags):
        settings = vllm(toy_settings, tiny_llm, template="{{ instruction }} Label:")
        message = self.refuse(capfd, settings, tmp_path, flags)
        assert "teacher.prompt.template" in message
        assert "{{ text }}" in message

    def test_a_cap_in_money_without_a_price(self, toy_settings, tmp_path, capfd, flags):
        settings = changed(toy_settings, "budget", cap={"cost": 5.0})
        message = self.refuse(capfd, settings, tmp_path, flags)
        assert "budget.cap.cost is 5.0, but teacher.price says that nothing costs anything" in message

    def test_a_student_that_is_no_checkpoint(self, toy_settings, tmp_path, capfd, flags):
        message = self.refuse(capfd, changed(toy_settings, "student", model=str(tmp_path)), tmp_path, flags)
        assert "student.model" in message
        assert "checkpoint folder" in message

    def test_a_student_that_cannot_classify(self, toy_settings, tmp_path, capfd, flags, tiny_encoder):
        other = tmp_path / "speech"
        other.mkdir()
        for file in Path(tiny_encoder).iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        (other / "config.json").write_text(json.dumps({"model_type": "vits"}))
        message = self.refuse(capfd, changed(toy_settings, "student", model=str(other)), tmp_path, flags)
        assert "is of type 'vits'" in message
        assert "roberta-base" in message

    def test_unknown_policy(self, toy_settings, tmp_path, capfd, flags):
        message = self.refuse(capfd, toy_settings | {"selection": {"policy": "best"}}, tmp_path, flags)
        assert "selection.policy: 'best' is unknown; there are all, confidence, " in message

    def test_empty_corpus(self, toy_settings, tmp_path, capfd, flags):
        (tmp_path / "blank.txt").write_text("\n \n\t\n")
        settings = toy_settings | {"corpus": {"uri": str(tmp_path / "blank.txt")}}
        message = self.refuse(capfd, settings, tmp_path, flags)
        assert "corpus.uri" in message
        assert "empty" in message


def test_bad_rows_go_to_quarantine_and_the_run_goes_on(toy_settings, tmp_path):
    pool = pq.read_table(toy_settings["corpus"]["uri"]).to_pylist()
    lines = [json.dumps({"id": row["id"], "text": row["text"]}).encode() for row in pool]
    lines += [
        b'{"id": "a", "text": "no end',
        json.dumps({"id": "b", "text": "sea " * 262_144}).encode(),  # 1 MiB
        b'{"id": "c", "text": "caf\xe9"}',
        json.dumps({"id": "d", "text": " \x00 "}).encode(),
        json.dumps({"id": "e", "text": pool[0]["text"] + "\x00"}).encode(),
    ]
    corpus = tmp_path / "pool.jsonl"
    corpus.write_bytes(b"\n".join(lines))
    settings = toy_settings | {
        "corpus": {"uri": str(corpus), "id": "id"},
        "selection": {"policy": "random"},
        "budget": {"rounds": 1, "train": 50},
        "run": {"dir": str(tmp_path / "runs")},
    }
    assert run(settings, tmp_path) == 0
    run_dir = tmp_path / "runs/run"
    index = json.loads((run_dir / "examples/index.json").read_text())
    assert index["rows_in"]["pool"] == 605
    assert sum(shard["rows"] for shard in index["pool"]) == 600
    expected = {"broken_line": 1, "too_long": 1, "undecodable": 1, "empty": 1, "duplicate": 1}
    assert index["quarantined"]["pool"] == expected
    rows = [row for file in run_dir.glob("quarantine/*.parquet") for row in pq.read_table(file).to_pylist()]
    assert Counter(row["reason"] for row in rows) == expected
    too_long = next(row for row in rows if row["reason"] == "too_long")
    assert "corpus.max_chars" in too_long["detail"]
    assert too_long["position"] == 601


def test_a_second_run_under_the_same_name_is_refused(toy_settings, tmp_path, capfd):
    (tmp_path / "runs/run/labels").mkdir(parents=True)
    (tmp_path / "runs/run/labels/ticket-00000000.parquet").write_bytes(b"")
    assert run(toy_settings, tmp_path) == USER_MISTAKE
    assert "holds a run already; resume it" in capfd.readouterr().err
