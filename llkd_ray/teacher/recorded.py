"""Answers that a teacher gave earlier, read from parquet: a benchmark's file, or the labels of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llkd_ray.config.base import ConfigError
from llkd_ray.config.teacher import RecordedConfig
from llkd_ray.corpus.sources import expand
from llkd_ray.storage.run_dir import open_filesystem
from llkd_ray.storage.tables import FILE_LABELS, list_column, matrix_of
from llkd_ray.teacher.base import Allowance, Answers, Meter, TextFailed, label_batch


@dataclass(frozen=True)
class Recorded:
    """All recorded answers. R answers, C labels."""

    place: dict[str, int]
    """The index of the answer for each text id."""
    probs_RC: np.ndarray
    prompt_tokens_R: np.ndarray
    """Zero where they are not recorded."""

    def __len__(self) -> int:
        return len(self.prompt_tokens_R)


class RecordedTeacher:
    """A :class:`~llkd_ray.teacher.base.Teacher` that returns recorded answers, mostly for benchmarks."""

    def __init__(self, config: RecordedConfig, names: Sequence[str]) -> None:
        """``names``: the labels, as for :func:`read_recorded`."""
        self.recorded = read_recorded(config, names)

    async def label(self, ids: Sequence[str], texts: Sequence[str], allowance: Allowance) -> Answers:
        """Usage is the recorded number of tokens of the answers."""

        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            place = self.recorded.place.get(ids[i])
            if place is None:
                raise TextFailed("no_recorded_answer")
            await meter.request(int(self.recorded.prompt_tokens_R[place]), 0)
            probs_C = self.recorded.probs_RC[place]
            return probs_C, float(np.clip(1.0 - probs_C.sum(), 0.0, 1.0))

        return await label_batch(len(ids), self.recorded.probs_RC.shape[1], one, allowance, cut=0)

    def close(self) -> None:
        """Nothing to release."""


def read_recorded(config: RecordedConfig, names: Sequence[str]) -> Recorded:
    """Read and check recorded answers; of two answers to one id, the first counts.

    Probabilities are in the order of ``labels`` in a file's metadata, a JSON list, as runs and predictions
    write them; without it, in the order of ``names``.

    Raises :class:`ConfigError` where files or columns are missing, their labels are not ``names``, or a row
    is not a distribution over the labels. Keeps all answers in memory.
    """
    is_folder = not config.uri.endswith(".parquet") and not any(mark in config.uri for mark in "*?[")
    units = expand(f"{config.uri.rstrip('/')}/*.parquet" if is_folder else config.uri, "teacher.recorded")
    wanted = {"id": config.id, "probs": config.probs}
    if config.prompt_tokens:
        wanted["prompt_tokens"] = config.prompt_tokens
    table = pa.concat_tables([_read_file(unit.base, unit.path, wanted, names) for unit in units])
    if not len(table):
        raise ConfigError(f"teacher.recorded.uri: {config.uri!r} holds no answers")
    probs_RC = _check_probs(table["probs"], config, len(names))
    place: dict[str, int] = {}
    for i, text_id in enumerate(table["id"].cast(pa.string()).to_pylist()):
        place.setdefault(text_id, i)
    tokens = table["prompt_tokens"].to_numpy() if config.prompt_tokens else np.zeros(len(table), dtype=int)
    return Recorded(place, probs_RC, tokens)


def _read_file(base: str, path: str, wanted: dict[str, str], names: Sequence[str]) -> pa.Table:
    """The wanted columns of one file, by our names; ``probs`` in the order of the label ``names``."""
    filesystem, _ = open_filesystem(base)
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            there = file.schema_arrow.names
            for field, column in wanted.items():
                if column not in there:
                    raise ConfigError(
                        f"teacher.recorded.{field}: no column {column!r} in {path!r}; "
                        f"there are {', '.join(there)}"
                    )
            table = file.read(columns=list(wanted.values()))
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"teacher.recorded.uri: {path!r} cannot be read: {error}") from None
    columns = {field: table[column] for field, column in wanted.items()}
    said = (table.schema.metadata or {}).get(FILE_LABELS)
    if said is not None and (there := json.loads(said)) != list(names):
        if sorted(there) != sorted(names):
            raise ConfigError(
                f"labels.names: {path!r} holds answers for the labels {', '.join(there)}, and not for "
                f"{', '.join(names)}"
            )
        order = [there.index(name) for name in names]
        columns["probs"] = pa.chunked_array([list_column(matrix_of(columns["probs"], len(there))[:, order])])
    return pa.table(columns)


def _check_probs(probs: pa.ChunkedArray, config: RecordedConfig, n_classes: int) -> np.ndarray:
    """float[R, C]; raises ConfigError for anything but C finite, non-negative numbers per row."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(probs.type) for is_kind in kinds):
        raise ConfigError(
            f"teacher.recorded.probs: {config.probs!r} is of type {probs.type}; each row needs a list of "
            f"{n_classes} probabilities"
        )
    lengths = pc.unique(pc.list_value_length(probs)).to_pylist()
    if lengths != [n_classes]:
        raise ConfigError(
            f"teacher.recorded.probs: {config.probs!r} holds {lengths} numbers a row, but labels.names has "
            f"{n_classes} labels"
        )
    probs_RC = matrix_of(probs, n_classes)
    if not (np.isfinite(probs_RC) & (probs_RC >= 0)).all():
        raise ConfigError(f"teacher.recorded.probs: {config.probs!r} holds numbers that are no probabilities")
    return probs_RC
