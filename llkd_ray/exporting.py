"""A run's model made ready to be taken elsewhere: calibrated anew, with a card, as ONNX, on the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from llkd_ray.classifier import Checkpoint, inspect, load, score
from llkd_ray.config import ConfigError
from llkd_ray.facts import SUMMARY
from llkd_ray.hub import push
from llkd_ray.onnx_export import FILE, LIMIT, Difference, export_onnx
from llkd_ray.report import write_pages
from llkd_ray.runs import run_config
from llkd_ray.store import CONFIG, MODEL_DIR, ONNX_DIR, Examples, RunStore
from llkd_ray.student_calibration import audited_sample, fit_student, in_words, write_calibration

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What came of an export."""

    model: str
    """The folder."""
    calibration: dict[str, Any] | None = field(default=None, repr=False)
    """Of a run: as in config.json."""
    onnx: str | None = None
    differences: list[Difference] = field(default_factory=list)
    """ONNX Runtime against torch, batch by batch."""
    address: str | None = None
    """On the hub."""


def export_model(
    model: str,
    *,
    onnx: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    say: Say = print,
) -> Exported:
    """Bring a finished run's model up to date with what people have said since; or take a checkpoint folder.

    Its temperature is fitted anew, its card and the run's report are written anew; a checkpoint that no run
    made stays as it is. ``onnx`` adds ``onnx/model.onnx``, ``push_to_hub`` uploads the folder under that
    name. Raises ConfigError for what the user can mend.
    """
    checkpoint = inspect(model)
    if not (checkpoint.is_remote or Path(checkpoint.source).is_dir()):
        raise ConfigError(f"MODEL: {model!r} is a hub name: give a run directory or a checkpoint folder")
    store, run = RunStore(checkpoint.source), _run_of(model)
    calibration = None
    if run is not None:
        calibration = _calibrated(run, checkpoint)
        say(in_words(calibration))
        write_pages(run)
    found: list[Difference] = []
    if onnx:
        student = load(checkpoint, "float32", torch.device("cpu"))
        found = export_onnx(student, checkpoint.max_tokens, store)
        for one in found:
            say(f"onnx: {one.texts} × {one.tokens} tokens: largest difference from torch {one.largest:.1e}")
        say(f"onnx: {store.uri(f'{ONNX_DIR}/{FILE}')}, within {LIMIT:g} of torch")
    address = None
    if push_to_hub is not None:
        with _local(store) as folder:
            address = push(folder, push_to_hub, private=private, message="Model made with llkd-ray")
        say(f"hub: {address}")
    return Exported(
        model=store.uri(),
        calibration=calibration,
        onnx=store.uri(f"{ONNX_DIR}/{FILE}") if onnx else None,
        differences=found,
        address=address,
    )


def _run_of(model: str) -> RunStore | None:
    """The finished run whose directory, or whose model/, this is."""
    for store in (RunStore(model), RunStore(model.rstrip("/").removesuffix(f"/{MODEL_DIR}"))):
        if store.exists(CONFIG) and store.exists(SUMMARY):
            return store
    return None


def _calibrated(run: RunStore, checkpoint: Checkpoint) -> dict[str, Any]:
    """The temperature by what is known today, written into the model and into the summary."""
    config = run_config(run)
    last = run.read_metrics()[-1]["round"]
    row_M, audited = audited_sample(run), None
    if row_M.size:
        texts = Examples.open(run).read(row_M, ["text"])["text"].to_pylist()
        student = load(checkpoint, config.student.precision, torch.device("cpu"))
        audited = row_M, score(student, texts, checkpoint.max_tokens, None)  # without its temperature
    found = fit_student(run, config, last, audited)
    write_calibration(run, found)
    run.write_json(SUMMARY, run.read_json(SUMMARY) | {"calibration": found})
    return found


@contextmanager
def _local(store: RunStore) -> Iterator[Path]:
    """The folder on this machine, all of it."""
    if store.is_local:
        yield Path(store.root)
        return
    with tempfile.TemporaryDirectory(prefix="llkd-model-") as folder:
        pafs.copy_files(store.root, folder, store.fs, pafs.LocalFileSystem())
        yield Path(folder)
