"""Cutting a large file of lines into pieces to be read side by side, record for record as in one go. No Ray.

1. Stretches: about as many bytes each, cut blindly.
2. A survey of each, which can run anywhere: where may its first record begin, and for each such place, where
   does the first record behind the stretch begin, and how many rows lie between.
3. Pieces: from the file's start on, each begins where the one before it ends. A place that was not surveyed
   is surveyed now, so a wrong guess costs time and never a row.

In jsonl and txt a record begins behind any line break. In a csv file, the break may be inside of quotes: then
the record begins behind the line whose quotes are odd in number. Quotes that are no csv quotes (``5" pipe``)
make that guess fail; the third step notices. The survey reads the file once more than reading alone would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pyarrow as pa

from llkd_ray.readers import Unit, compression_of, csv_steps
from llkd_ray.store import open_filesystem

CHUNK = 1 << 20  # bytes looked at in one go


@dataclass(frozen=True)
class Stretch:
    """Bytes [start, end) of a file of lines, which begin and end anywhere."""

    unit: Unit
    start: int
    end: int


@dataclass(frozen=True)
class Found:
    """One way to read a stretch: records from byte ``start`` to ``stop``, with so many numbered rows."""

    start: int
    stop: int
    rows: int


def stretches(unit: Unit, size: int) -> list[Stretch]:
    """Stretches of at most ``size`` bytes; none where the unit is small or can only be read in one go."""
    if unit.kind in ("parquet", "hf") or unit.span or compression_of(unit) or unit.size <= size:
        return []
    count = -(-unit.size // size)
    edges = [unit.size * number // count for number in range(count + 1)]
    return [Stretch(unit, start, end) for start, end in pairwise(edges)]


def survey(stretch: Stretch, max_chars: int) -> list[Found]:
    """The ways to read a stretch, none where no record begins in it.

    ``max_chars`` is the source's: it decides how long a csv field may be.
    """
    places = _places(stretch)
    return [found_from(stretch, place, max_chars) for place in places if place < stretch.end]


def pieces(surveyed: Sequence[tuple[Stretch, Sequence[Found]]], max_chars: int) -> Iterator[Unit]:
    """The units that read one file, from all its stretches in order, with what was found in each."""
    at, number = 0, 0
    for stretch, found in surveyed:
        if at >= stretch.end:  # the record before reaches beyond it
            continue
        here = next((one for one in found if one.start == at), None) or found_from(stretch, at, max_chars)
        yield replace(stretch.unit, span=(at, here.stop), first=number, size=here.stop - at)
        at, number = here.stop, number + here.rows


def found_from(stretch: Stretch, start: int, max_chars: int) -> Found:
    """How to read a stretch whose first record begins at ``start``."""
    if stretch.unit.kind in ("csv", "tsv"):
        return _csv_from(stretch, start, max_chars)
    with _open(stretch.unit) as file:
        stop = _behind_break(file, stretch.end, stretch.unit.size)
        return Found(start, stop, _count(file, start, stop, b"\n"))


def _csv_from(stretch: Stretch, start: int, max_chars: int) -> Found:
    rows, stop = 0, start
    for fields, wrong, stop in csv_steps(replace(stretch.unit, span=(start, stretch.unit.size)), max_chars):
        rows += bool(fields or wrong)
        if stop >= stretch.end:
            break
    else:
        stop = stretch.unit.size
    return Found(start, stop, max(0, rows - (start == 0)))  # the header is no row


def _places(stretch: Stretch) -> list[int]:
    """Where the first record of a stretch may begin."""
    if stretch.start == 0:
        return [0]
    with _open(stretch.unit) as file:
        outside = _behind_break(file, stretch.start, stretch.end)
        if stretch.unit.kind not in ("csv", "tsv"):
            return [outside]
        return [outside, _behind_odd_line(file, outside, stretch.end)]


def _open(unit: Unit) -> pa.NativeFile:
    fs, _ = open_filesystem(unit.base)
    return fs.open_input_file(unit.path)


def _chunks(file: pa.NativeFile, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The bytes [start, stop) as chunks, each with its place."""
    while start < stop and (chunk := file.read_at(min(CHUNK, stop - start), start)):
        yield start, chunk
        start += len(chunk)


def _count(file: pa.NativeFile, start: int, stop: int, what: bytes) -> int:
    return sum(chunk.count(what) for _, chunk in _chunks(file, start, stop))


def _behind_break(file: pa.NativeFile, start: int, stop: int) -> int:
    """The first place from ``start`` on that has a line break before it; ``stop`` where there is none."""
    for place, chunk in _chunks(file, start - 1, stop):
        if (found := chunk.find(b"\n")) >= 0:
            return place + found + 1
    return stop


def _behind_odd_line(file: pa.NativeFile, start: int, stop: int) -> int:
    """The place behind the first line with an odd number of quotes; ``stop`` where there is none."""
    quotes = 0
    for place, chunk in _chunks(file, start, stop):
        if not quotes % 2 and b'"' not in chunk:
            continue
        begin = 0
        while (found := chunk.find(b"\n", begin)) >= 0:
            quotes += chunk.count(b'"', begin, found)
            if quotes % 2:
                return place + found + 1
            quotes, begin = 0, found + 1
        quotes += chunk.count(b'"', begin)
    return stop
