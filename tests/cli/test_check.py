"""The command line of doctor: what it prints, its exit status, and set-ups that are broken, end to end."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from toys import config_tree, write_answers, write_corpus

from llkd_ray.cli import check as module
from llkd_ray.cli.check import print_findings, to_json
from llkd_ray.cli.main import main
from llkd_ray.display import Display
from llkd_ray.doctor import doctor
from llkd_ray.doctor.doctor import all_checks, load
from llkd_ray.doctor.findings import Check, Finding, describe, ok, problem, warning

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def settings(tmp_path: Path, tiny_encoder: str) -> dict:
    """A sound set-up: recorded answers and a tiny student."""
    pool = write_corpus(tmp_path / "pool.parquet", 300, seed=1)
    test = write_corpus(tmp_path / "test.parquet", 60, seed=2)
    return config_tree(
        corpus={"uri": str(pool)},
        test={"uri": str(test)},
        teacher={"recorded": {"uri": str(write_answers(tmp_path / "answers.parquet", [pool, test]))}},
        student={"model": tiny_encoder},
        budget={"rounds": 2, "train": 50},
        run={"dir": str(tmp_path / "runs")},
    )


def config_file(settings: dict, tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """As a user calls it; gives the exit status and what was printed."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    # Which doctor would set for good.
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def call(*words: str) -> tuple[int, str]:
        return main(["check", *words]), capsys.readouterr().out

    return call


# --- end to end


def test_a_sound_set_up(check, settings, tmp_path):
    status, said = check(config_file(settings, tmp_path), "--json")
    findings = json.loads(said)["findings"]
    assert [one for one in findings if one["state"] == "problem"] == []
    assert status == 0
    machine = ["config", "python", "packages", "vllm", "gpu", "memory", "shared memory", "ray's disk"]
    cluster = ["ray token", "ray", "room"]
    inputs = ["storage", "disk", "runs", "policies", "student", "corpus", "test", "labels"]
    assert [one["check"] for one in findings] == machine + cluster + inputs
    assert not (tmp_path / "runs").exists()


def test_several_mistakes_at_once(check, settings, tmp_path, monkeypatch):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    (tmp_path / "file").write_text("")
    words = ["--set", "corpus.text=body", "--set", f"run.dir={tmp_path / 'file/runs'}"]
    status, said = check(config_file(settings, tmp_path), *words)
    ray, storage, corpus = [line for line in said.splitlines() if line.startswith("problem")]
    assert f"ray: RAY_ADDRESS '{address}' does not answer" in ray
    assert "storage: run.dir " in storage
    assert "corpus.text: there is no column 'body'" in corpus
    assert "ok       test: 60 rows" in said, "the other checks go on"
    assert said.splitlines()[-1].startswith("3 problem(s)")
    assert status == 2


def test_gpus_and_room_that_are_not_there(check, settings, tmp_path):
    status, said = check(config_file(settings, tmp_path), "--set", "student.gpus=64")
    assert "problem  gpu: " in said
    assert "student.gpus: 1 student rank(s) need 64 = 64 GPUs" in said
    assert status == 2


def test_without_a_config_it_is_the_quickstart(check, tmp_path):
    status, said = check("--json", "--set", f"run.dir={tmp_path / 'runs'}")
    findings = {one["check"]: one for one in json.loads(said)["findings"]}
    assert "quickstart" in findings["config"]["found"]
    assert "'minilm'" in findings["student"]["found"]
    assert "corpus" not in findings, "it is made by the run"
    assert status == (2 if any(one["state"] == "problem" for one in findings.values()) else 0)


# --- configs that are refused


def test_a_config_that_is_refused_leaves_the_machine_to_be_looked_at(tmp_path, settings, monkeypatch):
    settings["budget"] |= {"round": 1}
    settings["labels"] = {"names": ["sea"]}
    config, findings = load(config_file(settings, tmp_path), [])
    assert config is None
    assert [one.state for one in findings] == ["problem", "problem"]
    assert any("budget.round: unknown setting" in one.found for one in findings)
    names = [check.name for check in all_checks(None, inputs=True)]
    assert ("packages" in names, "corpus" in names) == (True, False)

    def broken(config):
        raise ImportError("libtorch is broken")

    monkeypatch.setattr(doctor, "with_absolute_paths", broken)
    config, (finding,) = load(None, [])
    assert (config, "libtorch is broken" in finding.found) == (None, True)


def test_an_unknown_policy(tmp_path, settings):
    config, _ = load(config_file(settings, tmp_path), ["selection.policy=best"])
    (check,) = [one for one in all_checks(config, inputs=True) if one.name == "policies"]
    with pytest.raises(ValueError, match="'best' is unknown"):
        check.run()


# --- in words

FINDINGS = [ok("a", "fine"), warning("b", "[bold]odd[/bold]", "mend"), problem("c", "broken; x: y")]


def shown(terminal: bool) -> str:
    checks = [Check(one.check, lambda one=one: one) for one in FINDINGS[1:]]
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, soft_wrap=True)
    with Display(console) as display:
        assert print_findings(FINDINGS[:1], checks, display) == FINDINGS
    return console.file.getvalue()


def test_lines_without_a_terminal_and_a_table_on_one():
    assert shown(terminal=False).splitlines() == [
        "ok       a: fine",
        "warning  b: [bold]odd[/bold]; to do: mend",
        "problem  c: broken; x: y",
        "1 problem(s), 1 warning(s)",
    ]
    text = shown(terminal=True)
    assert all(words in text for words in ("what to do", "[bold]odd[/bold]"))
    assert "1 problem(s), 1 warning(s)" in text


@pytest.mark.parametrize(("findings", "status"), [(FINDINGS[:2], 0), (FINDINGS, 2)])
def test_only_problems_decide_the_exit_status(monkeypatch, capsys, findings, status):
    checks = [Check(one.check, lambda one=one: one) for one in findings]
    monkeypatch.setattr(module, "load", lambda path, overrides: (None, []))
    monkeypatch.setattr(module, "all_checks", lambda config, inputs: checks)
    assert main(["check", "--json"]) == status
    assert json.loads(capsys.readouterr().out)["counts"]["problem"] == status / 2


findings = st.builds(
    Finding, st.text(), st.sampled_from(["ok", "warning", "problem"]), st.text(), st.just("") | st.text()
)


@given(st.lists(findings, max_size=5))
def test_json_and_lines_hold_all_that_findings_say(some):
    said = json.loads(to_json(some))
    assert [Finding(**one) for one in said["findings"]] == some
    assert sum(said["counts"].values()) == len(some)
    for finding in some:
        line = describe(finding)
        assert all(part in line for part in (finding.check, finding.found, finding.remedy))
