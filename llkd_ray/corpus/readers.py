"""File readers: yield the raw rows of one unit of a corpus, one at a time, in bounded memory. Needs no Ray.

Nothing is cleaned here: a broken row is returned as a broken row. :mod:`llkd_ray.corpus.sources` plans what
to read.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SourceConfig
from llkd_ray.storage.run_dir import open_filesystem

BATCH_ROWS = 1024  # most rows converted to Python objects at a time
BATCH_BYTES = 32 << 20  # most uncompressed bytes of such a batch from a parquet file
MIN_LINE_BYTES = 16 << 20  # the longest line read whole, unless max_chars asks for longer ones
COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}
UTF8 = "utf-8"
LOOK_BYTES = 1 << 16  # at the start of a file, for its encoding and delimiter
DELIMITERS = (",", ";", "\t", "|")
MIN_LETTERS = 3  # beyond ASCII, before a file is taken for Windows-1252


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for a value that Python cannot represent, such as a date in the year 300,000."""

    kind: str


class RawRow(NamedTuple):
    """One row as it was read. ``position``: the 0-based row in its source (line, for jsonl and txt).

    Text read from bytes that are not UTF-8 contains surrogates. If the row is broken, ``broken`` gives the
    reason and ``text`` is the part that was read.
    """

    position: int
    text: object
    gold: object = None
    id: object = None
    broken: str = ""
    kept: tuple[object, ...] = ()
    """Values of ``source.kept_columns``."""


@dataclass(frozen=True)
class Unit:
    """The input of one reader: a file or a piece of it, parquet row groups, or a share of a hub data set."""

    source: str  # as shown to users
    kind: str  # parquet, jsonl, json, ndjson, csv, tsv, txt or hf
    size: int  # bytes, roughly
    base: str = ""  # opens the file's filesystem
    path: str = ""  # path on that filesystem
    part: tuple[int, int] = (0, 1)  # parquet: row groups [start, stop); hf: (index, of how many)
    span: tuple[int, int] | None = None  # line-based file: bytes [start, stop), whole records; None: all
    first: int = 0  # position of the first row
    encoding: str = UTF8  # of a line-based file
    delimiter: str = ","  # between the fields of a csv file


def read_rows(unit: Unit, source: SourceConfig, field: str, labels: Sequence[str]) -> Iterator[RawRow]:
    """The rows of one unit that pass ``source.where``, in order.

    Blank lines of jsonl and csv files are not rows. ``labels`` are the label names: if a hub data set uses
    the same class names, its gold values are returned as names instead of its own indices. Raises
    :class:`ConfigError` if the file cannot be read to its end.
    """
    with reading(unit, field):
        match unit.kind:
            case "parquet":
                yield from _parquet_rows(unit, source)
            case "hf":
                yield from _hub_rows(unit, source, labels)
            case "csv" | "tsv":
                yield from _csv_rows(unit, source)
            case "txt":
                for position, (line, cut, _) in enumerate(_lines(unit, source.max_chars), unit.first):
                    yield RawRow(position, line, broken=cut)
            case _:
                yield from _jsonl_rows(unit, source)


@contextmanager
def reading(unit: Unit, field: str) -> Iterator[None]:
    """Convert an error while a unit is read into a :class:`ConfigError` that names the unit."""
    # The hub library raises many exception types, including ValueError and its own.
    expected = Exception if unit.kind == "hf" else (OSError, EOFError, pa.ArrowException, csv.Error)
    try:
        yield
    except ConfigError:
        raise
    except expected as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{field}.uri: {unit.source!r} cannot be read ({reason}): repair it or leave it out"
        ) from error


def wanted_columns(source: SourceConfig) -> list[str]:
    names = (source.text, source.gold, source.id, *source.where, *source.kept_columns)
    return list(dict.fromkeys(name for name in names if name is not None))


# Parquet and hub data sets


def open_parquet(unit: Unit) -> pq.ParquetFile:
    fs, _ = open_filesystem(unit.base)
    # A buffered stream reads page by page, so a large row group does not have to fit into memory.
    return pq.ParquetFile(unit.path, filesystem=fs, buffer_size=1 << 20, pre_buffer=False)


def _parquet_rows(unit: Unit, source: SourceConfig) -> Iterator[RawRow]:
    with open_parquet(unit) as file:
        position = unit.first
        for group in range(*unit.part):
            # The texts of a row group are read only if one of its rows passes the filter.
            filters = file.read_row_group(group, columns=list(source.where)) if source.where else None
            if filters is None or passing(filters, source.where).any():
                start = position
                meta = file.metadata.row_group(group)
                rows = max(1, min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // (meta.total_byte_size or 1)))
                for batch in file.iter_batches(rows, row_groups=[group], columns=wanted_columns(source)):
                    yield from _table_rows(pa.Table.from_batches([batch]), start, source)
                    start += batch.num_rows
            position += file.metadata.row_group(group).num_rows


def _table_rows(table: pa.Table, first: int, source: SourceConfig) -> Iterator[RawRow]:
    """The rows of a table that pass ``source.where``; ``first`` is the position of the table's first row."""
    blank = [None] * table.num_rows
    texts = _values(table[source.text])
    golds = blank if source.gold is None else _values(table[source.gold])
    ids = blank if source.id is None else _values(table[source.id])
    kept = [_values(table[name]) for name in source.kept_columns]
    # Selected in Python: Arrow's take() lacks some types and is wrong for string views.
    for at in np.flatnonzero(passing(table, source.where)).tolist():
        yield RawRow(first + at, texts[at], golds[at], ids[at], kept=tuple(values[at] for values in kept))


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """A column as Python values. Arrow reads strings without validation; bad bytes become surrogates."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # bad bytes, or dates that Python cannot represent
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, (pa.StringScalar, pa.LargeStringScalar, pa.StringViewScalar)):
            return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    except (ValueError, OverflowError):
        pass
    return Unreadable(str(scalar.type))


def passing(table: pa.Table, where: dict[str, Any]) -> np.ndarray:
    """bool[rows]: rows whose columns equal the values of ``where``; each distinct value is compared once."""
    mask = np.ones(table.num_rows, dtype=bool)
    for name, wanted in where.items():
        column = table[name].combine_chunks()
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        fits = np.array([*(_equals(value, wanted) for value in _values(encoded.dictionary)), False])
        mask &= fits[encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy()]
    return mask


def _equals(value: object, wanted: str | int | bool) -> bool:
    """Whether a value equals the wanted one; csv files hold only strings, so ``3`` equals ``"3"``."""
    if value is None or isinstance(value, (list, dict, Unreadable)):
        return False
    if isinstance(value, str) and isinstance(wanted, bool):
        return value.strip().lower() == str(wanted).lower()
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted or (isinstance(wanted, str) and str(value).lower() == wanted.lower())
    return value == wanted or str(value) == str(wanted)


def open_hub(unit: Unit) -> Any:
    """The streaming data set behind ``hf://NAME?split=…&config=…&revision=…``."""
    import datasets  # slow to import, and only needed here

    name, _, query = unit.source.removeprefix("hf://").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    return datasets.load_dataset(
        name,
        options.get("config"),
        split=options.get("split", "train"),
        revision=options.get("revision"),
        streaming=True,
    )


def _hub_rows(unit: Unit, source: SourceConfig, labels: Sequence[str]) -> Iterator[RawRow]:
    data = open_hub(unit)
    classes = getattr((data.features or {}).get(source.gold), "names", None)
    named: list[str] = list(classes) if classes and set(classes) <= set(labels) else []
    index, count = unit.part
    data = data.select_columns(wanted_columns(source)).shard(num_shards=count, index=index)
    position = 0
    for table in data.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for row in _table_rows(table, position, source):
            if isinstance(row.gold, int) and 0 <= row.gold < len(named):
                row = row._replace(gold=named[row.gold])
            yield row
        position += table.num_rows


# Line-based files


def _lines(unit: Unit, max_chars: int) -> Iterator[tuple[str, str, int]]:
    """Per line: text without line break, error or "", and the byte offset after the line (decompressed).

    Lines are read as bytes and decoded one by one: bad bytes become surrogates and affect only their line. A
    line that is too long is truncated, and the rest of it is skipped.
    """
    # A character takes at most 12 bytes in JSON (a pair of \\u escapes), so no valid text is truncated.
    limit = max(MIN_LINE_BYTES, 16 * max_chars)
    at, stop = unit.span or (0, None)
    with _open_at(unit, at) as stream:
        while (stop is None or at < stop) and (line := stream.readline(limit)):
            begin, wrong = at, ""
            at += len(line)
            if len(line) == limit and not line.endswith(b"\n"):
                wrong = f"the line is longer than {limit} bytes"
                while rest := stream.readline(limit):
                    at += len(rest)
                    if rest.endswith(b"\n"):
                        break
            if begin == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield line.rstrip(b"\r\n").decode("utf-8", "surrogateescape"), wrong, at


def _open_at(unit: Unit, start: int) -> io.BufferedReader:
    """The file's bytes from ``start`` on, decompressed; only uncompressed files are read in pieces."""
    fs, _ = open_filesystem(unit.base)
    if unit.span is None:
        file = fs.open_input_stream(unit.path, compression=compression_of(unit))
    else:
        file = fs.open_input_file(unit.path)
        file.seek(start)
    if unit.encoding != UTF8:
        return io.BufferedReader(_AsUtf8(file, unit.encoding), 1 << 20)
    return io.BufferedReader(file, 1 << 20)


class _AsUtf8(io.RawIOBase):
    """A byte stream in another encoding, as UTF-8. Bytes that cannot be decoded become U+FFFD."""

    def __init__(self, file: Any, encoding: str) -> None:
        self._text = io.TextIOWrapper(io.BufferedReader(file), encoding, errors="replace", newline="")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = self._text.read(1 << 16).encode(UTF8, "replace")
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def with_format(unit: Unit, source: SourceConfig) -> Unit:
    """A line-based unit with its encoding and delimiter: as configured, or as the start of the file shows."""
    if unit.kind in ("parquet", "hf"):
        return unit
    with _open_at(unit, 0) as stream:
        start = stream.read(LOOK_BYTES)
    encoding = source.encoding or guess_encoding(start)
    delimiter = source.delimiter or ("\t" if unit.kind == "tsv" else unit.delimiter)
    if unit.kind == "csv" and source.delimiter is None:
        header = start.decode(encoding, "replace").lstrip("\ufeff\r\n").splitlines()
        delimiter = guess_delimiter(header[0] if header else "")
    return replace(unit, encoding=encoding, delimiter=delimiter)


def guess_encoding(start: bytes) -> str:
    """The encoding of a file that begins so: by its byte order mark, else UTF-16, Windows-1252 or UTF-8.

    A few bytes that are not UTF-8 are damage, and their rows go to quarantine. Windows-1252, which contains
    the letters of Latin-1, is assumed only if nothing beyond ASCII is UTF-8, and all of it reads as single
    letters of that encoding.
    """
    for mark, encoding in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")):
        if start.startswith(mark):
            return encoding
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Without a mark, the high bytes of Latin letters in UTF-16 are zero.
    even, odd = start[0::2].count(0), start[1::2].count(0)
    if max(even, odd) > len(start) / 6 and min(even, odd) < max(even, odd) / 10:
        return "utf-16-be" if even > odd else "utf-16-le"
    runs = re.findall(rb"[\x80-\xff]+", start[:-4] if len(start) == LOOK_BYTES else start)
    if len(runs) < MIN_LETTERS or any(len(run) > 2 for run in runs):
        return UTF8
    for run in runs:
        try:
            run.decode(UTF8)
        except UnicodeDecodeError:
            try:
                if run.decode("cp1252").isprintable():
                    continue
            except UnicodeDecodeError:
                pass
        return UTF8
    return "cp1252"


def guess_delimiter(header: str) -> str:
    """The delimiter that splits a header line into the most fields; a comma if none does."""

    def fields(delimiter: str) -> int:
        try:
            return len(next(csv.reader([header], delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(DELIMITERS, key=fields)  # the first of equal ones


def describe_format(units: Sequence[Unit]) -> str:
    """What was assumed about the files, if it is not UTF-8 with commas; else ''."""
    names = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
    found = []
    for unit in {(unit.encoding, unit.delimiter, unit.kind): unit for unit in units}.values():
        if unit.encoding != UTF8:
            found.append(f"{unit.source} is read as {unit.encoding}")
        if unit.kind == "csv" and unit.delimiter != ",":
            found.append(f"{unit.source} is split at {names.get(unit.delimiter, repr(unit.delimiter))}")
    return "; ".join(found)


def compression_of(unit: Unit) -> str | None:
    """The compression of a line-based file, by its file extension."""
    return COMPRESSIONS.get(unit.path.lower().rpartition(".")[2])


def jsonl_records(unit: Unit, max_chars: int) -> Iterator[tuple[int, Any, str, str]]:
    """Per record: position, value, raw line, and error or ""; blank lines are skipped."""
    for position, (line, wrong, _) in enumerate(_lines(unit, max_chars), unit.first):
        if line.strip():
            record = None
            if not wrong:
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        wrong = f"the line holds a {type(record).__name__}, not an object"
                except (ValueError, RecursionError) as error:
                    wrong = f"the line is not JSON: {error}"
            yield position, record, line, wrong


def _jsonl_rows(unit: Unit, source: SourceConfig) -> Iterator[RawRow]:
    for position, record, line, wrong in jsonl_records(unit, source.max_chars):
        if wrong:
            yield RawRow(position, line, broken=wrong)
        elif all(_equals(record.get(name), wanted) for name, wanted in source.where.items()):
            gold = None if source.gold is None else record.get(source.gold)
            id_ = None if source.id is None else record.get(source.id)
            kept = tuple(record.get(name) for name in source.kept_columns)
            yield RawRow(position, record.get(source.text), gold, id_, kept=kept)


def csv_steps(unit: Unit, max_chars: int) -> Iterator[tuple[list[str], str, int]]:
    """Per record: fields, error or "", and the byte offset after it; a blank line has no fields and no error.

    After every step the reader is in its initial state, so a piece may start there.
    """
    csv.field_size_limit(max(MIN_LINE_BYTES, 16 * max_chars))
    cut, end = "", 0

    def feed() -> Iterator[str]:
        nonlocal cut, end
        for line, wrong, end in _lines(unit, max_chars):  # noqa: B007
            cut = cut or wrong
            yield line + "\n"

    # Strict: a stray quote breaks its own record instead of silently absorbing the next ones.
    reader = csv.reader(feed(), delimiter=unit.delimiter, strict=True)
    while True:
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cut = cut or str(error)
        yield fields, cut, end
        cut = ""


def csv_records(unit: Unit, max_chars: int) -> Iterator[tuple[int, list[str], str]]:
    """Per record: number (-1 for the header), fields, and error or ""; blank lines are skipped."""
    has_header = unit.span is None or unit.span[0] == 0
    steps = ((fields, wrong) for fields, wrong, _ in csv_steps(unit, max_chars) if fields or wrong)
    for number, (fields, wrong) in enumerate(steps, -1 if has_header else unit.first):
        yield number, fields, wrong


def _csv_rows(unit: Unit, source: SourceConfig) -> Iterator[RawRow]:
    header = next(csv_records(replace(unit, span=None), source.max_chars))[1]
    column = {name: place for place, name in enumerate(header)}
    for number, fields, wrong in csv_records(unit, source.max_chars):
        if number < 0:
            continue
        if not wrong and len(fields) != len(header):
            wrong = f"{len(fields)} fields, but the header has {len(header)}"
        if wrong:
            yield RawRow(number, ",".join(fields), broken=wrong)
        elif all(_equals(fields[column[name]], wanted) for name, wanted in source.where.items()):
            gold = None if source.gold is None else fields[column[source.gold]]
            id_ = None if source.id is None else fields[column[source.id]]
            kept = tuple(fields[column[name]] for name in source.kept_columns)
            yield RawRow(number, fields[column[source.text]], gold, id_, kept=kept)
