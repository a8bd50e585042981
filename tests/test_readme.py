"""The README tells the truth: its commands exist, its configs load, its names are known."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import PARSERS, ROOT, blocks, commands, flags_of, job_of

import llkd_ray
from llkd_ray.cli import compare_parser, distill_parser
from llkd_ray.comparison.settings import load_comparison
from llkd_ray.config.loading import apply_overrides, load_config, parse_config
from llkd_ray.doctor.doctor import doctor_parser
from llkd_ray.prediction.config import predict_parser, settings_of
from llkd_ray.quickstart.teacher import settings
from llkd_ray.selection.acquisition import ACQUISITION
from llkd_ray.selection.policies import SELECTION

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPARISONS = sorted((ROOT / "configs").glob("compare_*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - set(COMPARISONS))


def test_there_are_commands():
    assert ["make", "quickstart"] in commands(README)
    assert ["make", "test"] in commands(README)
    assert any("jobs/doctor.py" in words for words in commands(README))


@pytest.mark.parametrize("words", [w for w in commands(README) if w[0] == "make"], ids=" ".join)
def test_make_targets_exist(words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("words", [w for w in commands(README) if "jobs/distill.py" in w], ids=" ".join)
def test_distill_commands_parse_and_name_configs_that_load(words):
    options = distill_parser().parse_args(words[words.index("jobs/distill.py") + 1 :])
    assert all("=" in override for override in options.set)
    if options.config and options.config.startswith("configs/"):
        load_config(ROOT / options.config, options.set)


@pytest.mark.parametrize("words", [w for w in commands(README) if "jobs/compare.py" in w], ids=" ".join)
def test_compare_commands_parse_and_name_settings_that_load(words):
    options = compare_parser().parse_args(words[words.index("jobs/compare.py") + 1 :])
    load_comparison(ROOT / options.config, options.set)


@pytest.mark.parametrize("words", [w for w in commands(README) if "jobs/doctor.py" in w], ids=" ".join)
def test_doctor_commands_parse_and_change_settings_that_exist(words):
    """What doctor then does is run by tests/test_doctor.py."""
    options = doctor_parser().parse_args(words[words.index("jobs/doctor.py") + 1 :])
    (example,) = blocks(README, "yaml")  # my.yaml
    parse_config(apply_overrides(yaml.safe_load(example), options.set))


@pytest.mark.parametrize("words", [w for w in commands(README) if "jobs/predict.py" in w], ids=" ".join)
def test_predict_commands_parse_and_are_settings(words):
    settings_of(predict_parser().parse_args(words[words.index("jobs/predict.py") + 1 :]))


AUDIT_AND_EXPORT = [w for w in commands(README) if job_of(w) in {"jobs/audit.py", "jobs/export.py"}]


@pytest.mark.parametrize("words", AUDIT_AND_EXPORT, ids=" ".join)
def test_audit_and_export_commands_parse(words):
    PARSERS[job_of(words)](flags_of(words))


def test_the_python_example_calls_what_there_is():
    (example,) = blocks(README, "python")
    compile(example, "README.md", "exec")
    assert set(re.findall(r"llkd_ray\.(\w+)\(", example)) <= set(llkd_ray.__all__)


@pytest.mark.parametrize("words", [w for w in commands(README) if w[0] == "ray"], ids=" ".join)
def test_ray_commands_exist(words):
    subcommand = words[1:3] if words[1] == "job" else words[1:2]
    ray = Path(sys.executable).parent / "ray"
    shown = subprocess.run([ray, *subcommand, "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    for flag in (
        word for word in words[: words.index("--") if "--" in words else None] if word.startswith("--")
    ):
        assert flag.partition("=")[0] in shown.stdout


def test_the_yaml_example_is_a_config():
    (example,) = blocks(README, "yaml")
    parse_config(yaml.safe_load(example))


def test_every_policy_is_in_the_tables():
    for name in (*SELECTION, *ACQUISITION):
        assert f"\n| `{name}`" in README


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_load(path):
    load_config(path)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_comparisons_load_and_say_how_they_are_run(path):
    comparison = load_comparison(path)
    load_config(comparison.base)
    assert f"python jobs/compare.py configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_say_how_they_are_run(path):
    assert f"python jobs/distill.py configs/{path.name}" in path.read_text()


def test_the_quickstart_config_is_what_the_quickstart_runs():
    written = load_config(ROOT / "configs/quickstart.yaml").model_dump(mode="json")
    run = parse_config(settings(Path("/data"), seed=0)).model_dump(mode="json")
    assert written == json.loads(json.dumps(run).replace("/data", "runs/quickstart-data"))
