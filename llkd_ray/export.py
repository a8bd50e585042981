"""Exports a model: recalibrated, with a model card, as ONNX, to the hub.

Shapes in names: B texts of a batch, L tokens of the longest text, C labels.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llkd_ray.config.base import ConfigError
from llkd_ray.evaluation.student_calibration import audited_sample, describe, fit_student, write_model
from llkd_ray.report.pages import write_pages
from llkd_ray.storage.checkpoints import inspect
from llkd_ray.storage.run_dir import (
    CONFIG,
    MODEL_DIR,
    ONNX_DIR,
    SUMMARY,
    TRAINED,
    RunStore,
    round_file,
    run_config,
)
from llkd_ray.storage.tables import Examples
from llkd_ray.student.inference import load, score
from llkd_ray.student.model import Student

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    model: str
    """The folder."""
    calibration: dict[str, Any] | None = field(default=None, repr=False)
    """The calibration of a run's model, as in config.json."""
    onnx: str | None = None
    differences: list[Difference] = field(default_factory=list)
    """ONNX Runtime compared with torch, batch by batch."""
    address: str | None = None
    """The model's address on the hub."""


def export_model(
    model: str,
    *,
    onnx: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    say: Say = print,
) -> Exported:
    """Update a finished run's model with people's latest answers, or export a checkpoint folder.

    The temperature is refitted, card and report are rewritten; a checkpoint not made by a run is unchanged.
    ``onnx`` adds ``onnx/model.onnx``; ``push_to_hub`` uploads the folder under that name. Raises ConfigError
    for user errors.
    """
    checkpoint = inspect(model)
    if not (checkpoint.is_remote or Path(checkpoint.source).is_dir()):
        raise ConfigError(f"MODEL: {model!r} is a hub name: give a run directory or a checkpoint folder")
    store, run = RunStore(checkpoint.source), _run_of(model)
    calibration = None
    if run is not None:
        calibration = _recalibrate(run)
        say(describe(calibration))
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
        with _local_copy(store) as folder:
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
    """The finished run that this directory, or this model/ folder, belongs to."""
    for store in (RunStore(model), RunStore(model.rstrip("/").removesuffix(f"/{MODEL_DIR}"))):
        if store.exists(CONFIG) and store.exists(SUMMARY):
            return store
    return None


def _recalibrate(run: RunStore) -> dict[str, Any]:
    """Refit the temperature on all current labels; writes the model and the summary again."""
    config = run_config(run)
    last = run.read_metrics()[-1]["round"]
    weights = str(run.read_json(round_file(last, TRAINED))["checkpoint"])
    row_M, audited = audited_sample(run), None
    if row_M.size:
        texts = Examples.open(run).read(row_M, ["text"])["text"].to_pylist()
        checkpoint = inspect(run.uri(weights), max_tokens=config.student.max_tokens)
        student = load(checkpoint, config.student.precision, torch.device("cpu"))
        audited = row_M, score(student, texts, checkpoint.max_tokens)  # without the temperature
    found = fit_student(run, config, last, audited)
    write_model(run, weights, found)
    run.write_json(SUMMARY, run.read_json(SUMMARY) | {"calibration": found})
    return found


@contextmanager
def _local_copy(store: RunStore) -> Iterator[Path]:
    """The complete folder on this machine."""
    if store.is_local:
        yield Path(store.root)
        return
    with tempfile.TemporaryDirectory(prefix="llkd-model-") as folder:
        store.download("", folder)
        yield Path(folder)


IGNORED = ["*.tmp", ".*"]
"""Left behind by a killed writer."""


def push(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Upload the folder as the model ``OWNER/NAME``, which is created if needed; returns its address.

    The token is the one stored by ``hf auth login``, or HF_TOKEN. Raises ConfigError if the hub refuses or
    does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not get_token():
        raise ConfigError(
            "--push-to-hub: there is no token for the hub: run `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            folder_path=folder,
            repo_id=address.repo_id,
            repo_type="model",
            commit_message=message,
            ignore_patterns=IGNORED,
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ConfigError(_push_failure(name, error)) from None
    except Exception as error:
        # Errors of a hub that does not answer come from the client's HTTP library, which varies by version.
        if "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
            raise ConfigError(_push_failure(name, error)) from None
        raise
    return str(address)


def _push_failure(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"--push-to-hub: {name!r} cannot be written ({reason}): check the name (OWNER/NAME), the rights of "
        "your token and HF_ENDPOINT"
    )


FILE = "model.onnx"
LIMIT = 1e-4
"""Maximum difference of a logit from torch's."""
OUTPUT = "logits"


@dataclass(frozen=True)
class Difference:
    """The largest difference of a logit in one batch."""

    texts: int
    tokens: int
    largest: float


class _Logits(nn.Module):
    """The model with positional inputs and only logits as output."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def export_onnx(student: Student, max_tokens: int, store: RunStore) -> list[Difference]:
    """Write ``onnx/model.onnx`` into the folder of ``store``; batch size and text length are dynamic.

    The student is on the CPU, in float32. Returns the result of :func:`differences`. Raises ConfigError, and
    leaves no file, if the extra is missing, the model cannot be exported, or its outputs differ.
    """
    _require_extra()
    example = student.pad(_batch(student, [3, 7], np.random.default_rng(0)))
    names = list(example)
    module = _Logits(student.module.eval(), names).eval()
    axes = tuple({0: "batch", 1: "length"} for _ in names)
    with tempfile.TemporaryDirectory(prefix="llkd-onnx-") as folder:
        file = Path(folder) / FILE
        try:
            with _quiet(), torch.inference_mode(False), torch.no_grad():
                program = torch.onnx.export(
                    module,
                    tuple(example.values()),
                    input_names=names,
                    output_names=[OUTPUT],
                    dynamic_shapes=(axes,),
                    dynamo=True,
                    verbose=False,
                )
            assert program is not None, "with dynamo there always is one"
            program.save(str(file))
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ConfigError(f"--onnx: the model cannot be exported ({reason}): leave --onnx out") from None
        found = differences(student, max_tokens, file)
        worst = max(found, key=lambda one: one.largest if np.isfinite(one.largest) else np.inf)
        if not worst.largest <= LIMIT:
            raise ConfigError(
                f"--onnx: {worst.texts} texts of {worst.tokens} tokens differ from torch by "
                f"{worst.largest:.2g}, where {LIMIT:g} is the most: no file is left; try another version of "
                "onnxruntime"
            )
        store.upload(folder, ONNX_DIR)  # weights over 2 GB are stored next to the graph
    return found


def differences(student: Student, max_tokens: int, file: Path) -> list[Difference]:
    """ONNX Runtime vs. torch on batches of many shapes: random tokens, padded if lengths differ."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    shapes = [[3], [max_tokens], [2, 3], [5, max_tokens, 3, 11], [max_tokens // 2] * 7, list(range(3, 19))]
    found = []
    for lengths in shapes:
        inputs = student.pad(_batch(student, [min(max(2, n), max_tokens) for n in lengths], rng))
        with torch.inference_mode():
            torch_BC = student.module(**inputs).logits.numpy()
        (onnx_BC,) = session.run([OUTPUT], {name: value_BL.numpy() for name, value_BL in inputs.items()})
        texts, tokens = next(iter(inputs.values())).shape
        found.append(Difference(texts, tokens, float(np.abs(torch_BC - onnx_BC).max())))
    return found


def _batch(student: Student, lengths: list[int], rng: np.random.Generator) -> list[dict[str, list[int]]]:
    """Texts with these numbers of ordinary tokens, because some models infer padding from the token ids."""
    order = list(student.encode(["a"], 8)[0])
    ordinary = np.setdiff1d(np.arange(len(student.tokenizer)), student.tokenizer.all_special_ids)
    fill = {"attention_mask": 1}
    return [
        {
            name: rng.choice(ordinary, n).tolist() if name == "input_ids" else [fill.get(name, 0)] * n
            for name in order
        }
        for n in lengths
    ]


def _require_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--onnx: {missing[0]} is not installed: pip install 'llkd-ray[onnx]'")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the exporter's warnings about missing optional packages, such as torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
