"""How fast a local model may be on this machine, where nobody has measured it: a guess with wide ends."""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

MEASURE_S = 0.3
SIZE = 1024
"""Rows and columns of the matrices that are multiplied."""
UTILISATION = (0.1, 0.5)
"""What an engine makes of a machine's matrix products, at least and at most: no law, but what is usual."""


def tokens_per_s(model: str, dtype: str, on_gpu: bool) -> tuple[float, float] | None:
    """At least and at most so many new prompt tokens a second on all of this machine, or on one GPU of it.

    A token takes two operations for each weight that is no embedding (J. Kaplan et al., arXiv 2001.08361,
    section 2.1), and the machine does as many as it does in matrix products, at a utilisation. None where
    ``model`` is no local checkpoint whose size can be read, or where the GPU is not here.
    """
    weights = count_weights(Path(model).expanduser())
    if not weights:
        return None
    import torch

    if on_gpu and not torch.cuda.is_available():
        return None
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    flops = matmul_flops("cuda" if on_gpu else "cpu", kind)
    low, high = (share * flops / (2 * weights) for share in UTILISATION)
    return low, high


def count_weights(checkpoint: Path) -> int:
    """Of a folder with safetensors files, embeddings apart; 0 where it is none.

    A layer that turns states into words is left out, too: it works on a prompt's last token alone.
    """
    if not checkpoint.is_dir():
        return 0
    shapes: dict[str, list[int]] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        shapes |= {name: tensor["shape"] for name, tensor in _header(file).items()}
    return sum(math.prod(s) for name, s in shapes.items() if "embed" not in name and "lm_head" not in name)


def _header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name: its first 8 bytes say how long the JSON is that follows."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header


def matmul_flops(device: str, kind: Any) -> float:
    """Operations a second in products of square matrices; takes MEASURE_S seconds."""
    import torch

    a, b = (torch.ones(SIZE, SIZE, dtype=kind, device=device) for _ in range(2))

    def multiply() -> None:
        torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    multiply()  # the first one chooses how
    times, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < MEASURE_S:
        multiply()
        times += 1
    return 2 * SIZE**3 * times / passed
