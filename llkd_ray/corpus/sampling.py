"""How many rows a source has, and some of its texts, without reading it all. Needs no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from urllib.parse import parse_qsl

import pyarrow as pa

from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.cleaning import Cleaner, Example
from llkd_ray.corpus.readers import (
    COMPRESSIONS,
    RawRow,
    Unit,
    open_hub,
    open_parquet,
    passing,
    read_rows,
    reading,
)
from llkd_ray.storage.run_dir import open_filesystem

PARTS = 20
"""Places that a sample is drawn from, where the files allow it."""
LOOK_BYTES = 1 << 20
"""Bytes of a file of lines in which lines are counted."""
SCAN_BYTES = 16 << 20
"""What is read for a sample, about, so that it is spread inside of parts, too."""


@dataclass(frozen=True)
class Rows:
    """How many rows a source has, ``where`` and refusals apart."""

    count: int
    is_exact: bool


@dataclass(frozen=True)
class Sample:
    """Some rows of a source, from several places of it."""

    kept: list[Example]
    refused: Counter[str]
    """By reason. A text that the sample holds twice is a duplicate."""
    parts: int
    passed: float
    """Share of the rows that ``where`` lets through."""

    @property
    def read(self) -> int:
        return len(self.kept) + self.refused.total()

    @property
    def usable(self) -> float:
        """Share of a source's rows that come to be texts of the run."""
        return self.passed * len(self.kept) / self.read if self.read else 0.0


# --- how many


def count_rows(units: Sequence[Unit], source: SourceConfig, field: str) -> Rows | None:
    """From footers where there are any, else from the bytes of the files; None where nothing tells."""
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
    """The lines in the first bytes, and as many in the others; a guess, as a record may have several."""
    fs, _ = open_filesystem(unit.base)
    with fs.open_input_stream(unit.path, compression=None) as stream:
        start = stream.read(LOOK_BYTES)
    text = _decompressed(start, COMPRESSIONS.get(unit.path.lower().rpartition(".")[2]))
    lines = text.count(b"\n") + (0 if text.endswith(b"\n") else len(start) >= unit.size and bool(text))
    whole = lines * max(1.0, unit.size / len(start)) if start else 0.0
    return Rows(max(0, round(whole) - (unit.kind in ("csv", "tsv"))), False)


def _decompressed(start: bytes, compression: str | None) -> bytes:
    """As far as the first bytes of a file go."""
    if compression is None:
        return start
    pieces = []
    try:
        with pa.CompressedInputStream(pa.BufferReader(start), compression) as stream:
            while piece := stream.read(1 << 16):
                pieces.append(piece)
    except OSError:
        pass  # it ends in the middle, as it must
    return b"".join(pieces)


# --- some of them


def draw(units: Sequence[Unit], source: SourceConfig, field: str, labels: Sequence[str], n: int) -> Sample:
    """Up to ``n`` rows, of evenly spaced parts of the source and spread over the beginning of each.

    With ``source.limit`` they are its first rows, as those are all that is read; with ``source.where`` the
    first that pass in each part.
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
    """Share of the rows that ``where`` lets through, counted, where its columns can be read by themselves and
    are small: files are often sorted by them, so that no sample tells.
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
    """What a reader reads in one go, and over how many of its first rows a sample is spread."""

    unit: Unit
    rows: int = 0
    bytes_a_row: float = 1.0

    def read(
        self, source: SourceConfig, field: str, labels: Sequence[str], n: int, most: int
    ) -> Iterator[RawRow]:
        """About ``n`` rows, evenly spaced in the part's first ``most`` bytes; then further ones."""
        over = min(self.rows, max(n, int(most / self.bytes_a_row)))
        for number, row in enumerate(read_rows(self.unit, source, field, labels)):
            if over <= n or number * n % over < n:  # true of n in every ``over`` numbers
                yield row


def _parts(units: Sequence[Unit], source: SourceConfig, field: str) -> list[_Part]:
    """Parquet files by row groups; other files cannot be entered in the middle."""
    parts: list[_Part] = []
    for unit in units:
        with reading(unit, field):
            pieces = _row_groups(unit) if unit.kind == "parquet" else [(unit, _rows_to_cross(unit))]
        rows = sum(count for _, count in pieces)
        each = max(1.0, unit.size / max(1, rows))
        parts += [_Part(piece, 0 if source.where else count, each) for piece, count in pieces]
    return parts


def _row_groups(unit: Unit) -> list[tuple[Unit, int]]:
    """Each by itself, with its rows."""
    groups, first = [], unit.first
    with open_parquet(unit) as file:
        for group in range(*unit.part):
            count = file.metadata.row_group(group).num_rows
            groups.append((replace(unit, part=(group, group + 1), first=first), count))
            first += count
    return groups


def _rows_to_cross(unit: Unit) -> int:
    """Rather too few than too many, or the sample would come short; none where each row is a download."""
    counted = None if unit.kind == "hf" else _count(unit)
    return 0 if counted is None else int(0.9 * counted.count)


def _spread_out(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """PARTS of them, evenly spaced; then as many of those that are left, and so on."""
    rest = list(parts)
    while rest:
        places = {number * len(rest) // PARTS for number in range(PARTS)}
        yield [rest[place] for place in sorted(places)]
        rest = [part for place, part in enumerate(rest) if place not in places]


def _read_evenly(
    parts: Sequence[_Part], source: SourceConfig, field: str, labels: Sequence[str], n: int
) -> tuple[list[RawRow], int]:
    """About as many rows of each part, ``n`` in all where there are so many; and how many were looked at."""
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
    for row in rows:
        cleaned = clean(row)
        if not isinstance(cleaned, Example):
            refused[cleaned.reason] += 1
        elif cleaned.hash in kept:
            refused["duplicate"] += 1
        else:
            kept[cleaned.hash] = cleaned
    return Sample(list(kept.values()), refused, parts, passed)
