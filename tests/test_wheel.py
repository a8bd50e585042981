"""The wheel, installed outside of the repository: the program and its files are all there.

Its dependencies are those of this environment; only the package itself comes from the wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import NAMES, write_answers, write_corpus

ROOT = Path(__file__).parents[1]

# The runs start Ray, so they share one process of tests with those that use the fixture local_ray.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("llkd_ray", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run([*pip, *build], check=True, capture_output=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", folder / "there", wheel], check=True, timeout=100
    )
    return folder / "there"


def test_a_run_from_the_wheel(installed: Path, tmp_path: Path, tiny_encoder: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {"PYTHONPATH": str(installed), "COLUMNS": "80"}

    def llkd(*words: str) -> str:
        command = [sys.executable, installed / "bin/llkd", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import llkd_ray; print(llkd_ray.__file__)"],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(installed))
    assert (installed / "share/llkd-ray/configs/quickstart.yaml").exists()
    assert next(installed.glob("llkd_ray-*.dist-info/licenses/LICENSE")).exists()

    pool = write_corpus(tmp_path / "pool.parquet", 300, seed=1)
    test = write_corpus(tmp_path / "test.parquet", 60, seed=2)
    answers = write_answers(tmp_path / "answers.parquet", [pool, test])
    assert f"labels: {', '.join(sorted(NAMES[:3]))}" in llkd("init", "pool.parquet", "--test", "test.parquet")
    recorded = {"kind": "recorded", "model": None, "recorded": {"uri": str(answers)}}
    small = {"model": tiny_encoder, "max_tokens": 32, "precision": "float32", "min_steps": 5, "workers": 1}
    names = list(NAMES[:3])
    budget = {"rounds": 2, "train": 50}
    changes = {"teacher": recorded, "student": small, "budget": budget, "labels": {"names": names}}
    settings = [word for name, value in changes.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    assert "policy: llkd_sample; 2 rounds" in llkd("train", "llkd.yaml", "--dry-run", *settings)
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"
    said = llkd("train", "llkd.yaml", "--quiet", "--set", "run.name=first", *settings)
    assert said.splitlines()[-1] == f"model:  {tmp_path / 'runs/first/model'}"
    assert "finished, 2 of 2 rounds done" in llkd("status", "runs/first")
