"""LLKD's five tasks: each config is planned against a small stand-in with the columns of the hub's data."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from toys import toy_texts

from llkd_ray.config.loading import load_config
from llkd_ray.display import Display
from llkd_ray.run.plan import plan

CONFIGS = Path(__file__).parents[2] / "configs"
N = 60

# config → text column, gold column, other columns, whether gold is a number, whether there is a test split
COLUMNS: dict[str, tuple[str, str, tuple[str, ...], bool, bool]] = {
    "pubmed_rct_gpu": ("text", "label", (), False, True),
    "llkd_emotion": ("text", "label", (), True, True),
    "llkd_yahoo": ("question_title", "topic", ("question_content", "best_answer"), True, True),
    "llkd_arxiv": ("abstract", "label", ("title",), False, False),
    "llkd_bios": ("hard_text", "profession", ("gender",), True, True),
}


def stand_in(path: Path, names: tuple[str, ...], columns: tuple[Any, ...], seed: int) -> Path:
    text, gold, others, is_number, _ = columns
    texts, _ = toy_texts(N, 3, seed)
    labels = [i % len(names) if is_number else names[i % len(names)] for i in range(N)]
    pq.write_table(pa.table({text: texts, gold: labels} | dict.fromkeys(others, texts)), path)
    return path


def test_all_of_them_are_here():
    assert {path.stem for path in CONFIGS.glob("llkd_*.yaml")} == set(COLUMNS) - {"pubmed_rct_gpu"}


@pytest.mark.parametrize("name", COLUMNS)
def test_is_planned(name, tiny_llm, tiny_encoder, tmp_path):
    columns = COLUMNS[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    assert all(uri.startswith("hf://") for uri in config.corpus.uris)
    assert (config.test is not None) == columns[-1]
    names = config.labels.names
    parts = {"corpus": stand_in(tmp_path / "pool.parquet", names, columns, seed=1)}
    if config.test is not None:
        parts["test"] = stand_in(tmp_path / "test.parquet", names, columns, seed=2)
    changes = [f"{part}.uri={path}" for part, path in parts.items()]
    changes += [f"teacher.model={tiny_llm}", f"student.model={tiny_encoder}", f"run.dir={tmp_path / 'runs'}"]
    changes += ["teacher.max_model_len=1024", "student.max_tokens=32", "budget.labels=50", "budget.train=20"]
    stream = StringIO()
    config = load_config(CONFIGS / f"{name}.yaml", changes)
    plan(config, Display(Console(file=stream, soft_wrap=True, highlight=False)))
    said = " ".join(stream.getvalue().split())
    assert " ".join(config.teacher.prompt.instruction.split()) in said
    assert "the teacher labels at most 50 texts" in said
