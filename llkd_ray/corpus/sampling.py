"""Row count and a sample of a source's texts, without reading the whole source. Needs no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from typing import Any
from urllib.parse import parse_qsl

import pyarrow as pa

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.cleaning import UNKNOWN_GOLD, Cleaner, Example, show_gold
from llkd_ray.corpus.readers import (
    COMPRESSIONS,
    RawRow,
    Unit,
    csv_records,
    describe_format,
    jsonl_records,
    open_hub,
    open_parquet,
    passing,
    read_rows,
    reading,
    with_format,
)
from llkd_ray.corpus.sources import expand
from llkd_ray.storage.run_dir import open_filesystem

PARTS = 20
"""Number of places that a sample is drawn from, if the files allow it."""
LOOK_BYTES = 1 << 20
"""Bytes at the start of a line-based file in which lines are counted."""
SCAN_BYTES = 16 << 20
"""Approximate bytes read for a sample, so that it is also spread within each part."""


@dataclass(frozen=True)
class Rows:
    """Number of rows of a source, before ``where`` and refusals."""

    count: int
    is_exact: bool


@dataclass(frozen=True)
class Sample:
    """Some rows of a source, from several places in it."""

    kept: list[Example]
    refused: Counter[str]
    """Counts by reason. A text that occurs twice in the sample is a duplicate."""
    parts: int
    passed: float
    """Share of the rows that pass ``where``."""
    unknown_gold: Counter[str]
    """Gold values that match no label."""

    @property
    def read(self) -> int:
        return len(self.kept) + self.refused.total()

    @property
    def usable(self) -> float:
        """Share of a source's rows that become texts of the run."""
        return self.passed * len(self.kept) / self.read if self.read else 0.0


@dataclass(frozen=True)
class Preview:
    """The first rows of a file, with all columns."""

    kind: str
    columns: tuple[str, ...]
    """Empty for a txt file, whose rows have only ``text``."""
    rows: list[dict[str, Any]]
    assumed: str
    """The encoding and delimiter, where they are not the usual ones; see ``readers.describe_format``."""


def preview(uri: str, field: str, n: int = 1000) -> Preview:
    """The first rows of the first file of a uri; raises ConfigError, which names ``field``, without any."""
    source = SourceConfig(uri=uri)
    unit = expand(uri, field)[0]
    with reading(unit, field):
        unit = with_format(unit, source)
        columns, rows = _first_rows(unit, source, n)
    if not rows:
        raise ConfigError(f"{field}: {unit.source!r} holds no rows")
    return Preview(unit.kind, tuple(columns), rows, describe_format([unit]))


def _first_rows(unit: Unit, source: SourceConfig, n: int) -> tuple[Sequence[str], list[dict[str, Any]]]:
    match unit.kind:
        case "parquet":
            with open_parquet(unit) as file:
                batch = next(file.iter_batches(n), None)
                return file.schema_arrow.names, batch.to_pylist() if batch else []
        case "hf":
            rows = list(open_hub(unit).take(n))
            return list(rows[0]) if rows else [], rows
        case "csv" | "tsv":
            records = csv_records(unit, source.max_chars)
            header = next(records, (-1, [], ""))[1]
            lines = [fields for _, fields, wrong in islice(records, n) if not wrong]
            return header, [dict(zip(header, one, strict=True)) for one in lines if len(one) == len(header)]
        case "txt":
            return [], [{"text": row.text} for row in islice(read_rows(unit, source, "", ()), n)]
        case _:
            found = [
                one for _, one, _, wrong in islice(jsonl_records(unit, source.max_chars), n) if not wrong
            ]
            return list(dict.fromkeys(key for one in found for key in one)), found


# --- row counts


def count_rows(units: Sequence[Unit], source: SourceConfig, field: str) -> Rows | None:
    """Row count from parquet footers or hub metadata, else estimated from file sizes; None if unknown."""
    files = list({unit.source: unit for unit in units}.values())
    counts = []
    for unit in files:
        with reading(unit, field):
            counted = _count(unit)
        if counted is None:
            return None
        counts.append(counted)
    total = Rows(sum(one.count for one in counts), all(one.is_exact for one in counts))
    if source.limit and source.limit < total.count:
        return Rows(source.limit, total.is_exact)
    return total


def _count(unit: Unit) -> Rows | None:
    match unit.kind:
        case "parquet":
            with open_parquet(unit) as file:
                return Rows(file.metadata.num_rows, True)
        case "hf":
            split = dict(parse_qsl(unit.source.partition("?")[2])).get("split", "train")
            known = (open_hub(unit).info.splits or {}).get(split)
            return Rows(known.num_examples, True) if known is not None and known.num_examples else None
        case _:
            return _count_lines(unit)


def _count_lines(unit: Unit) -> Rows:
    """Extrapolate from the lines in the first bytes; an estimate, as a record may span several lines."""
    fs, _ = open_filesystem(unit.base)
    with fs.open_input_stream(unit.path, compression=None) as stream:
        start = stream.read(LOOK_BYTES)
    text = _decompressed(start, COMPRESSIONS.get(unit.path.lower().rpartition(".")[2]))
    lines = text.count(b"\n") + (0 if text.endswith(b"\n") else len(start) >= unit.size and bool(text))
    whole = lines * max(1.0, unit.size / len(start)) if start else 0.0
    return Rows(max(0, round(whole) - (unit.kind in ("csv", "tsv"))), False)


def _decompressed(start: bytes, compression: str | None) -> bytes:
    """Decompress as much as the first bytes of a file allow."""
    if compression is None:
        return start
    pieces = []
    try:
        with pa.CompressedInputStream(pa.BufferReader(start), compression) as stream:
            while piece := stream.read(1 << 16):
                pieces.append(piece)
    except OSError:
        pass  # the input is truncated, so the stream ends early
    return b"".join(pieces)


# --- samples


def draw(units: Sequence[Unit], source: SourceConfig, field: str, labels: Sequence[str], n: int) -> Sample:
    """Up to ``n`` rows from evenly spaced parts of the source, spread over the beginning of each part.

    With ``source.limit`` these are the first rows of the source, because a run reads no others; with
    ``source.where``, the first rows of each part that pass.
    """
    parts = [_Part(unit) for unit in units] if source.limit else _parts(units, source, field)
    wanted = min(n, source.limit or n)
    rows: list[RawRow] = []
    scanned = opened = 0
    for batch in ([part] for part in parts) if source.limit else _spread_out(parts):
        if len(rows) == wanted:
            break
        opened += len(batch)
        found, looked_at = _read_evenly(batch, source, field, labels, wanted - len(rows))
        rows += found
        scanned += looked_at
    passed = len(rows) / scanned if source.where and scanned else 1.0
    if source.where and (counted := _share_passing(units, source, field)) is not None:
        passed = counted
    return _cleaned(rows, source, field, labels, opened, passed)


def _share_passing(units: Sequence[Unit], source: SourceConfig, field: str) -> float | None:
    """Counted share of the rows that pass ``where``; None unless its columns are small parquet columns.

    It is counted because files are often sorted by these columns, so that a sample is not representative.
    """
    if any(unit.kind != "parquet" for unit in units):
        return None
    passed = rows = size = 0
    for unit in units:
        with reading(unit, field), open_parquet(unit) as file:
            columns = [file.schema_arrow.names.index(name) for name in source.where]
            for group in range(*unit.part):
                of_group = file.metadata.row_group(group)
                size += sum(of_group.column(column).total_compressed_size for column in columns)
                if size > SCAN_BYTES:
                    return None
                passes = passing(file.read_row_group(group, columns=list(source.where)), source.where)
                passed, rows = passed + int(passes.sum()), rows + passes.size
    return passed / rows if rows else None


@dataclass(frozen=True)
class _Part:
    """A unit of reading, and the number of its first rows that a sample is spread over."""

    unit: Unit
    rows: int = 0
    bytes_a_row: float = 1.0

    def read(
        self, source: SourceConfig, field: str, labels: Sequence[str], n: int, most: int
    ) -> Iterator[RawRow]:
        """About ``n`` rows, evenly spaced in the part's first ``most`` bytes; then rows after those."""
        over = min(self.rows, max(n, int(most / self.bytes_a_row)))
        for number, row in enumerate(read_rows(self.unit, source, field, labels)):
            if over <= n or number * n % over < n:  # true for n of every ``over`` numbers
                yield row


def _parts(units: Sequence[Unit], source: SourceConfig, field: str) -> list[_Part]:
    """Parquet files are split by row group; other files cannot be read from the middle."""
    parts: list[_Part] = []
    for unit in units:
        with reading(unit, field):
            pieces = _row_groups(unit) if unit.kind == "parquet" else [(unit, _rows_to_cross(unit))]
        rows = sum(count for _, count in pieces)
        each = max(1.0, unit.size / max(1, rows))
        parts += [_Part(piece, 0 if source.where else count, each) for piece, count in pieces]
    return parts


def _row_groups(unit: Unit) -> list[tuple[Unit, int]]:
    """Each row group as a unit, with its number of rows."""
    groups, first = [], unit.first
    with open_parquet(unit) as file:
        for group in range(*unit.part):
            count = file.metadata.row_group(group).num_rows
            groups.append((replace(unit, part=(group, group + 1), first=first), count))
            first += count
    return groups


def _rows_to_cross(unit: Unit) -> int:
    """Rows to spread a sample over: a low estimate, so that it reaches its size; 0 if rows are downloaded."""
    counted = None if unit.kind == "hf" else _count(unit)
    return 0 if counted is None else int(0.9 * counted.count)


def _spread_out(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Batches of up to PARTS evenly spaced parts, each taken from the parts not yet returned."""
    rest = list(parts)
    while rest:
        places = {number * len(rest) // PARTS for number in range(PARTS)}
        yield [rest[place] for place in sorted(places)]
        rest = [part for place, part in enumerate(rest) if place not in places]


def _read_evenly(
    parts: Sequence[_Part], source: SourceConfig, field: str, labels: Sequence[str], n: int
) -> tuple[list[RawRow], int]:
    """About equally many rows of each part, ``n`` in total if available; and how many rows were scanned."""
    density, most = ceil(n / len(parts)), SCAN_BYTES // len(parts)
    readers = {place: part.read(source, field, labels, density, most) for place, part in enumerate(parts)}
    rows: list[RawRow] = []
    reached = [part.unit.first - 1 for part in parts]
    while readers and len(rows) < n:
        share = max(1, (n - len(rows)) // len(readers))
        for place, reader in list(readers.items()):
            wanted = min(share, n - len(rows))
            found = list(islice(reader, wanted))
            rows += found
            if found:
                reached[place] = found[-1].position
            if len(found) < wanted:
                del readers[place]
    return rows, sum(end + 1 - part.unit.first for end, part in zip(reached, parts, strict=True))


def _cleaned(
    rows: Sequence[RawRow], source: SourceConfig, field: str, labels: Sequence[str], parts: int, passed: float
) -> Sample:
    clean = Cleaner(source, field, labels)
    kept: dict[int, Example] = {}
    refused: Counter[str] = Counter()
    unknown_gold: Counter[str] = Counter()
    for row in rows:
        cleaned = clean(row)
        if not isinstance(cleaned, Example):
            refused[cleaned.reason] += 1
            unknown_gold.update([show_gold(row.gold)] if cleaned.reason == UNKNOWN_GOLD else [])
        elif cleaned.hash in kept:
            refused["duplicate"] += 1
        else:
            kept[cleaned.hash] = cleaned
    return Sample(list(kept.values()), refused, parts, passed, unknown_gold)
