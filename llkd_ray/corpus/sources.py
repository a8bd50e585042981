"""Turns the ``uri`` of a corpus into units: finds files, checks columns, splits the work. Needs no Ray.

All errors that names, headers and footers reveal are raised here, before a task starts.

Large line-based files are split in three steps:

1. Byte ranges of about the same size, cut without looking at the content.
2. A scan of each range, which can run on any node: where its first record may start, and for each such
   place, where the first record after the range starts and how many rows lie between.
3. Pieces: from the start of the file, each starts where the previous one ends. A place that was not scanned
   is scanned now, so a wrong guess costs time but never loses a row.

In jsonl and txt files a record starts after any line break. In a csv file the line break may be inside
quotes: then the record starts after the line with an odd number of quotes. Quotes that are not csv quotes
(``5" pipe``) make that guess fail, which step 3 detects. The scan reads the file one additional time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice, pairwise
from pathlib import Path
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.fs as pafs

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import SourceConfig
from llkd_ray.corpus.readers import (
    COMPRESSIONS,
    UTF8,
    Unit,
    compression_of,
    csv_records,
    csv_steps,
    jsonl_records,
    open_hub,
    open_parquet,
    reading,
    wanted_columns,
    with_format,
)
from llkd_ray.storage.run_dir import open_filesystem

TASK_BYTES = 32 << 20  # read by one task, if the files allow it
JSONL_LOOK_ROWS = 1000  # first rows of a JSON lines file, where all columns must occur
NAME_CHARS, NAMES_SHOWN = 100, 50  # limits for column names listed in a message
HUB_UNITS = 64  # most units of a hub data set, which every unit opens again
KINDS = ("parquet", "jsonl", "json", "ndjson", "csv", "tsv", "txt")


def plan(source: SourceConfig, field: str) -> list[Unit]:
    """All units of ``source`` in reading order: by uri, then by path.

    Raises :class:`ConfigError` if a uri matches nothing, file kinds are mixed or unknown, a file cannot be
    opened, or a column is missing. ``field`` is the section's name, for the message.
    """
    found = [unit for uri in source.uris for unit in expand(uri, field)]
    files = list({unit.source: unit for unit in found}.values())  # overlapping globs match a file twice
    by_kind = {_family(unit.kind): unit for unit in files}
    if len(by_kind) > 1:
        first, second = list(by_kind.values())[:2]
        raise ConfigError(
            f"{field}.uri: {first.source!r} and {second.source!r} are of different kinds: "
            "give files of one kind, with a glob such as folder/*.parquet"
        )
    with ThreadPoolExecutor(16) as pool:
        cut = pool.map(lambda numbered: _inspect(numbered[1], source, field, numbered[0]), enumerate(files))
        return [unit for units in cut for unit in units]


def pack(units: Sequence[Unit]) -> list[list[Unit]]:
    """Group consecutive units up to TASK_BYTES, so that small files share a task."""
    packs: list[list[Unit]] = []
    filled = TASK_BYTES
    for unit in units:
        if filled + unit.size > TASK_BYTES:
            packs.append([])
            filled = 0
        packs[-1].append(unit)
        filled += unit.size
    return packs


# Finding files


def expand(uri: str, field: str) -> list[Unit]:
    """The files of one uri, sorted by path; not yet split into units.

    Raises :class:`ConfigError`, which names ``field``, if there are none.
    """
    if uri.startswith("hf://"):
        return [Unit(source=uri, kind="hf", size=TASK_BYTES)]
    base, pattern = _split_glob(uri)
    try:
        fs, path = open_filesystem(base)
        info = fs.get_file_info(path)
        is_folder = info.type == pafs.FileType.Directory
        selector = pafs.FileSelector(path, recursive=len(pattern) != 1 or pattern == ["**"])
        below = [one for one in fs.get_file_info(selector) if one.path and one.is_file] if is_folder else []
    except UnicodeError as error:
        raise ConfigError(
            f"{field}.uri: {uri!r} has a name that is not UTF-8 ({error}): rename the file or folder"
        ) from None
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{field}.uri: {uri!r} cannot be opened ({reason}): check the address") from error
    if info.is_file and not pattern:
        infos = [info]
    elif is_folder:
        wanted = pattern or ["**"]
        # Ignores marker files and hidden folders such as _SUCCESS and .ipynb_checkpoints.
        infos = [
            one
            for one in below
            if _fits(parts := _below(one.path, path), wanted)
            and not any(part.startswith((".",) if pattern else (".", "_")) for part in parts)
        ]
    else:
        infos = []
    if not infos:
        raise ConfigError(f"{field}.uri: {uri!r} matches no file: check the path, or the glob")
    prefix = uri.partition("://")[0] + "://" if "://" in uri else ""
    return [
        Unit(prefix + one.path, _kind(one.base_name, field), one.size or 0, base, one.path)
        for one in sorted(infos, key=lambda one: one.path)
    ]


def _split_glob(uri: str) -> tuple[str, list[str]]:
    """The prefix before the first wildcard, which can be opened, and the parts of the pattern after it."""
    remote = "://" in uri
    if not remote and Path(uri).expanduser().exists():
        return uri, []
    # In a URI the question mark starts the options, so it is not a wildcard.
    address, mark, query = uri.partition("?") if remote else (uri, "", "")
    wildcard = re.search(r"[*\[]" if remote else r"[*?\[]", address)
    if wildcard is None:
        return uri, []
    cut = address.rfind("/", 0, wildcard.start()) + 1
    return (address[:cut] or ".") + mark + query, [part for part in address[cut:].split("/") if part]


def _below(path: str, folder: str) -> list[str]:
    return path.removeprefix(folder.rstrip("/")).strip("/").split("/")


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match those of a glob; ``**`` matches any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:]
        return not rest or any(_fits(parts[start:], rest) for start in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _kind(name: str, field: str) -> str:
    parts = name.lower().split(".")
    compressed = len(parts) > 2 and parts[-1] in COMPRESSIONS
    kind = parts[-2] if compressed else parts[-1]
    if kind not in KINDS or (kind == "parquet" and compressed):
        endings = ", ".join(f".{known}" for known in KINDS)
        raise ConfigError(
            f"{field}.uri: the kind of {name!r} is unknown: the name must end in one of {endings} "
            "(all but parquet also .gz or .zst); pick files with a glob such as folder/*.parquet"
        )
    return kind


def _family(kind: str) -> str:
    return "jsonl" if kind in ("json", "ndjson") else kind


# Checks before the start


def _inspect(unit: Unit, source: SourceConfig, field: str, number: int) -> list[Unit]:
    """Check the columns of one file and return its units."""
    with reading(unit, field):
        unit = with_format(unit, source)
        match unit.kind:
            case "parquet":
                return _parquet_units(unit, source, field)
            case "hf":
                return _hub_units(unit, source, field)
            case "csv" | "tsv":
                header = next(csv_records(unit, source.max_chars), None)
                if header is None or header[2]:
                    raise ConfigError(f"{field}.uri: {unit.source!r} has no header line: put one first")
                _check_columns(header[1], unit, source, field)
            case "txt":
                settings = {"gold": source.gold, "id": source.id, "where": source.where}
                for setting, value in (settings | {"keep_columns": source.kept_columns}).items():
                    if value:
                        raise ConfigError(
                            f"{field}.{setting}: {value!r} is set, but txt files have no columns: "
                            "leave it out, or use csv or jsonl"
                        )
            case _ if number == 0:  # any row may lack a key, so only the first file is checked
                seen = _jsonl_keys(unit, source, field)
                if seen:
                    _check_columns(seen, unit, source, field)
    return [unit]


def _check_columns(columns: Sequence[str], unit: Unit, source: SourceConfig, field: str) -> None:
    wanted = [("text", source.text), ("gold", source.gold), ("id", source.id)]
    wanted += [("where", name) for name in source.where]
    wanted += [("keep_columns", name) for name in source.kept_columns]
    for setting, name in wanted:
        if name is not None and name not in columns:
            raise ConfigError(
                f"{field}.{setting}: there is no column {name!r} in {unit.source!r}; "
                f"its columns are {_describe(columns)}"
            )
        if name is not None and columns.count(name) > 1:
            raise ConfigError(
                f"{field}.{setting}: {unit.source!r} has {columns.count(name)} columns {name!r}: rename them"
            )


def _describe(columns: Sequence[str]) -> str:
    """The column names in one line, whatever they contain."""
    shown = [name if name.isprintable() else repr(name) for name in (one[:NAME_CHARS] for one in columns)]
    more = ["…"] if len(shown) > NAMES_SHOWN else []
    return ", ".join([*shown[:NAMES_SHOWN], *more]) or "(none)"


def _parquet_units(unit: Unit, source: SourceConfig, field: str) -> list[Unit]:
    """Group row groups until the wanted columns reach TASK_BYTES, uncompressed."""
    with open_parquet(unit) as file:
        _check_columns(file.schema_arrow.names, unit, source, field)
        for name in source.where:
            if pa.types.is_nested(kind := file.schema_arrow.field(name).type):
                raise ConfigError(
                    f"{field}.where: column {name!r} of {unit.source!r} is of type {kind}: name a column of "
                    "single values"
                )
        wanted = set(wanted_columns(source))
        units: list[Unit] = []
        first = start = size = rows = 0
        for group in range(file.metadata.num_row_groups):
            meta = file.metadata.row_group(group)
            chunks = (meta.column(c) for c in range(meta.num_columns))
            size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in wanted)
            rows += meta.num_rows
            if size >= TASK_BYTES or group == file.metadata.num_row_groups - 1:
                units.append(replace(unit, part=(start, group + 1), first=first, size=size))
                first, start, size, rows = first + rows, group + 1, 0, 0
        return units


def _hub_units(unit: Unit, source: SourceConfig, field: str) -> list[Unit]:
    name, mark, query = unit.source.removeprefix("hf://").partition("?")
    if strangers := sorted(dict(parse_qsl(query)).keys() - {"split", "config", "revision"}):
        raise ConfigError(
            f"{field}.uri: {unit.source!r} has the unknown option {strangers[0]!r}: "
            "it takes split, config and revision"
        )
    if Path(name).expanduser().is_dir():  # a local folder; workers have another working directory
        unit = replace(unit, source=f"hf://{Path(name).expanduser().resolve()}{mark}{query}")
    data = open_hub(unit)
    columns = list(data.features or next(iter(data), {}))
    _check_columns(columns, unit, source, field)
    count = min(data.num_shards, HUB_UNITS)
    return [replace(unit, part=(index, count)) for index in range(count)]


def _jsonl_keys(unit: Unit, source: SourceConfig, field: str) -> list[str]:
    """The keys of the first JSONL_LOOK_ROWS rows."""
    keys: dict[str, None] = {}
    for position, record, line, wrong in islice(jsonl_records(unit, source.max_chars), JSONL_LOOK_ROWS):
        if position == 0 and re.match(r"\s*\[\s*(\{|$)", line):
            raise ConfigError(
                f"{field}.uri: {unit.source!r} is a JSON array: write one object a line (JSON lines)"
            )
        if not wrong:
            keys.update(dict.fromkeys(record))
    return list(keys)


CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, end) of a line-based file, regardless of where records start."""

    unit: Unit
    start: int
    end: int


@dataclass(frozen=True)
class Found:
    """One way to read a byte range: the records from byte ``start`` to ``stop``, which are ``rows`` rows."""

    start: int
    stop: int
    rows: int


def byte_ranges(unit: Unit, size: int) -> list[ByteRange]:
    """Byte ranges of at most ``size`` bytes; none if the unit is small or cannot be split."""
    is_whole = unit.span or compression_of(unit) or unit.encoding != UTF8
    if unit.kind in ("parquet", "hf") or is_whole or unit.size <= size:
        return []
    count = -(-unit.size // size)
    edges = [unit.size * number // count for number in range(count + 1)]
    return [ByteRange(unit, start, end) for start, end in pairwise(edges)]


def scan(byte_range: ByteRange, max_chars: int) -> list[Found]:
    """The possible ways to read a byte range; none if no record starts in it.

    ``max_chars`` is that of the source; it limits the length of a csv field.
    """
    places = _places(byte_range)
    return [found_from(byte_range, place, max_chars) for place in places if place < byte_range.end]


def pieces(scanned: Sequence[tuple[ByteRange, Sequence[Found]]], max_chars: int) -> Iterator[Unit]:
    """The units of one file; ``scanned`` holds all its byte ranges in order, with their scan results."""
    at, number = 0, 0
    for byte_range, found in scanned:
        if at >= byte_range.end:  # the previous record extends past this range
            continue
        here = next((one for one in found if one.start == at), None) or found_from(byte_range, at, max_chars)
        yield replace(byte_range.unit, span=(at, here.stop), first=number, size=here.stop - at)
        at, number = here.stop, number + here.rows


def found_from(byte_range: ByteRange, start: int, max_chars: int) -> Found:
    """How to read a byte range whose first record starts at ``start``."""
    if byte_range.unit.kind in ("csv", "tsv"):
        return _csv_from(byte_range, start, max_chars)
    with _open(byte_range.unit) as file:
        stop = _behind_break(file, byte_range.end, byte_range.unit.size)
        return Found(start, stop, _count(file, start, stop, b"\n"))


def _csv_from(byte_range: ByteRange, start: int, max_chars: int) -> Found:
    rows, stop = 0, start
    for fields, wrong, stop in csv_steps(
        replace(byte_range.unit, span=(start, byte_range.unit.size)), max_chars
    ):
        rows += bool(fields or wrong)
        if stop >= byte_range.end:
            break
    else:
        stop = byte_range.unit.size
    return Found(start, stop, max(0, rows - (start == 0)))  # the header is not a row


def _places(byte_range: ByteRange) -> list[int]:
    """Offsets at which the first record of a byte range may start."""
    if byte_range.start == 0:
        return [0]
    with _open(byte_range.unit) as file:
        outside = _behind_break(file, byte_range.start, byte_range.end)
        if byte_range.unit.kind not in ("csv", "tsv"):
            return [outside]
        return [outside, _behind_odd_line(file, outside, byte_range.end)]


def _open(unit: Unit) -> pa.NativeFile:
    fs, _ = open_filesystem(unit.base)
    return fs.open_input_file(unit.path)


def _chunks(file: pa.NativeFile, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The bytes [start, stop) as chunks, each with its offset."""
    while start < stop and (chunk := file.read_at(min(CHUNK, stop - start), start)):
        yield start, chunk
        start += len(chunk)


def _count(file: pa.NativeFile, start: int, stop: int, what: bytes) -> int:
    return sum(chunk.count(what) for _, chunk in _chunks(file, start, stop))


def _behind_break(file: pa.NativeFile, start: int, stop: int) -> int:
    """The first offset from ``start`` on that follows a line break; ``stop`` if there is none."""
    for place, chunk in _chunks(file, start - 1, stop):
        if (found := chunk.find(b"\n")) >= 0:
            return place + found + 1
    return stop


def _behind_odd_line(file: pa.NativeFile, start: int, stop: int) -> int:
    """The offset after the first line with an odd number of quotes; ``stop`` if there is none."""
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
