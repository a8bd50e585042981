"""The README and the pages below docs/: all that they say is tried, and the site builds without a warning."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from pages import ROOT, arguments_of, blocks, commands, parsed

import llkd_ray
from llkd_ray.comparison.settings import load_comparison
from llkd_ray.config.loading import apply_overrides, load_config, parse_config
from llkd_ray.quickstart.teacher import settings
from llkd_ray.selection.acquisition import ACQUISITION
from llkd_ray.selection.policies import SELECTION

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
GUIDES = {name: page for name, page in PAGES.items() if name.startswith("guides/")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL_PAGES = PAGES | {"../README.md": README}
COMPARISONS = sorted((ROOT / "configs").glob("compare_*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - set(COMPARISONS))


def run_python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- commands and settings

COMMANDS = {" ".join(words): words for page in ALL_PAGES.values() for words in commands(page)}


def test_the_readme_has_commands():
    assert {"make quickstart", "make test"} <= {" ".join(words) for words in commands(README)}
    ours = [arguments_of(words) for words in commands(README)]
    assert {"init", "check", "train", "resume", "evaluate", "predict"} <= {one[0] for one in ours if one}


@functools.cache
def help_of_ray(*subcommand: str) -> str:
    ray = Path(sys.executable).parent / "ray"
    shown = subprocess.run([ray, *subcommand, "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_are_what_the_programs_take(words):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    if words[0] == "ray":
        own = words[: words.index("--")] if "--" in words else words
        shown = help_of_ray(*own[1 : 3 if words[1] == "job" else 2])
        assert not [word for word in own if word.startswith("--") and word.partition("=")[0] not in shown]
    if ours := arguments_of(words):
        options = parsed(ours)
        config = getattr(options, "config", None)
        if isinstance(config, str) and config.startswith("configs/"):
            (load_comparison if ours[0] == "compare" else load_config)(ROOT / config, options.set)
        elif config:
            (example,) = blocks(README, "yaml")
            parse_config(apply_overrides(yaml.safe_load(example), options.set))
    elif words[0] not in ("make", "ray"):
        text = (ROOT / next(word for word in words if word.endswith(".py"))).read_text()
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in text]


@pytest.mark.parametrize("name", [*GUIDES, "../README.md"])
def test_yaml_blocks_are_configs(name):
    for block in blocks(ALL_PAGES[name], "yaml"):
        parse_config(yaml.safe_load(block))


def test_python_blocks_compile_and_call_what_there_is():
    for name, page in ALL_PAGES.items():
        for block in blocks(page, "python"):
            compile(block, name, "exec")
    (example,) = blocks(README, "python")
    assert set(re.findall(r"llkd_ray\.(\w+)\(", example)) <= set(llkd_ray.__all__)


def test_every_policy_is_in_the_tables():
    page = GUIDES["guides/policies.md"]
    assert [name for name in (*SELECTION, *ACQUISITION) if f"\n| `{name}`" not in page] == []


@pytest.mark.parametrize("path", [*CONFIGS, *COMPARISONS], ids=lambda path: path.name)
def test_configs_load_and_say_how_they_are_run(path):
    job = "compare" if path in COMPARISONS else "distill"
    load_config(load_comparison(path).base if path in COMPARISONS else path)
    assert f"python jobs/{job}.py configs/{path.name}" in path.read_text()


def test_the_quickstart_config_is_what_the_quickstart_runs():
    written = load_config(ROOT / "configs/quickstart.yaml").model_dump(mode="json")
    run = parse_config(settings(Path("/data"), seed=0)).model_dump(mode="json")
    assert written == json.loads(json.dumps(run).replace("/data", str(ROOT / "runs/quickstart-data")))


# --- pages


def test_the_reference_is_what_the_code_says():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/config_reference.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout == PAGES["reference/config.md"], (
        "python scripts/config_reference.py > docs/reference/config.md"
    )


def test_pages_are_in_the_menu_and_link_to_pages_that_exist():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in PAGES if f": {name}" not in menu] == []
    for name, page in ALL_PAGES.items():
        links = re.findall(r"\]\((?!https?://)([^)#]+)", page)
        assert [link for link in links if not (DOCS / name).parent.joinpath(link).exists()] == []


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the dev extra is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "teacher.ticket_size" in (tmp_path / "site/reference/config/index.html").read_text()


@pytest.mark.slow
class TestOwnCsv:
    """With a tiny random teacher in the place of the hub's: what it says is not looked at."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("own-csv")
        make_files, _ = blocks(GUIDES["guides/own-csv.md"], "python")
        run_python(make_files, folder)
        (config,) = blocks(GUIDES["guides/own-csv.md"], "yaml")
        (folder / "tickets.yaml").write_text(config)
        return folder

    @pytest.fixture
    def job(self, folder, tiny_llm, tiny_encoder):
        def run(name: str, *flags: str) -> str:
            models = ["--set", f"teacher.model={tiny_llm}", "--set", f"student.model={tiny_encoder}"]
            done = subprocess.run(
                [sys.executable, ROOT / "jobs" / name, "tickets.yaml", *models, *flags],
                cwd=folder, capture_output=True, text=True, timeout=200,
                env=os.environ | {"COLUMNS": "200", "RAY_ADDRESS": ""},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        return run

    def test_files(self, folder):
        assert len((folder / "tickets.csv").read_text().splitlines()) == 601
        assert len((folder / "gold.csv").read_text().splitlines()) == 151

    def test_doctor(self, job):
        assert "0 problem(s)" in job("doctor.py")

    def test_plan(self, job):
        said = job("distill.py", "--dry-run")
        assert "What is the customer's message about?" in said
        assert "parcels on their way, late or lost" in said


@pytest.mark.slow
def test_the_service_answers_or_leaves_it_to_the_api(tiny_classifier, tmp_path):
    (code,) = blocks(GUIDES["guides/replace-an-api-call.md"], "python")
    (tmp_path / "runs/my-run").mkdir(parents=True)
    (tmp_path / "runs/my-run/model").symlink_to(tiny_classifier)
    asked = f"{code}\nprint([answer(text) for text in ('a b', 'c d')])"
    assert run_python(asked, tmp_path).strip() == "[None, None]", "random weights are sure of nothing"
    certain = asked.replace(">= 0.8", ">= 0.0")
    assert "None" not in run_python(certain, tmp_path)


def test_the_policy_of_the_guide_chooses_what_it_says():
    from llkd_ray.selection.search import NEVER
    from llkd_ray.selection.table import Candidates

    (code,) = blocks(GUIDES["guides/add-a-policy.md"], "python")
    known = set(SELECTION)
    try:
        exec(compile(code, "guide", "exec"), {})
        (name,) = set(SELECTION) - known
        policy = SELECTION[name]
        policy.check_options({"floor": 0.9})
        row_N = np.arange(3)
        candidates = Candidates(
            row_N, row_N % 2, np.array([0.95, 0.95, 0.5]), np.array([0.1, np.nan, 0.9]), row_N * 0.0,
            row_N * 0.0, n_classes=2,
        )  # fmt: skip
        value_N = policy.rule(candidates, None).value_N
        assert value_N.tolist() == [pytest.approx(0.1), 1.0, NEVER]
    finally:
        for name in set(SELECTION) - known:
            del SELECTION[name]
