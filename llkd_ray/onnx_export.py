"""A classifier as an ONNX file, which stays only if it answers as torch does.

Shapes in names: B texts of a batch, L tokens of the longest, C labels.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import torch
from torch import nn

from llkd_ray.sections import ConfigError
from llkd_ray.store import ONNX_DIR, RunStore
from llkd_ray.student import Student

FILE = "model.onnx"
LIMIT = 1e-4
"""How far a logit may be from torch's."""
OUTPUT = "logits"


@dataclass(frozen=True)
class Difference:
    """The largest difference of a logit in one batch."""

    texts: int
    tokens: int
    largest: float


class _Logits(nn.Module):
    """The model with its inputs by place and nothing but logits as output."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def export_onnx(student: Student, max_tokens: int, store: RunStore) -> list[Difference]:
    """Write ``onnx/model.onnx`` into the folder of ``store``; any number of texts, of any length, at a time.

    The student is on the CPU, in float32. Returns what :func:`differences` finds. Raises ConfigError, and
    leaves no file, where the extra is missing, the model cannot be exported, or it answers otherwise.
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
        for part in sorted(Path(folder).iterdir()):  # weights of over 2 GB lie beside the graph
            target = store.path(f"{ONNX_DIR}/{part.name}")
            store.fs.create_dir(store.path(ONNX_DIR), recursive=True)
            pafs.copy_files(str(part), target, pafs.LocalFileSystem(), store.fs)
    return found


def differences(student: Student, max_tokens: int, file: Path) -> list[Difference]:
    """ONNX Runtime against torch on batches of many shapes, of random tokens, padded where lengths differ."""
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
    """Texts of these numbers of tokens: ordinary ones, for some models take padding from the tokens."""
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
    """The exporter warns of what it looks into and does without, such as torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
