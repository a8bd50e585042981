"""The run directory: its files are the source of truth, everything else is a cache of them.

A file exists only when it is complete: on a local disk it is written under a temporary name and renamed; on
an object store a PUT is atomic. Each file belongs to one ticket, one round or one step, so a retry writes the
same file again.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import random
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import yaml

from llkd_ray.config.base import ConfigError, absolute, check_uri
from llkd_ray.config.loading import parse_config
from llkd_ray.config.schema import Config

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
EXAMPLES_INDEX = "examples/index.json"
LABELS_DIR = "labels"
SMALL_DIR = "labels-small"
"""Answers of a cascade's small teacher, before the large one is asked."""
SCORES_METHOD = "scores.json"
"""File with the labels of a server: the method that ``server.scores: auto`` found."""
CALIBRATION = "calibration.json"
LEASES_DIR = "leases"
SENT_DIR = "sent"
ENGINES_DIR = "engines"
SNAPSHOTS_DIR = "snapshots"
"""State of the selector, for its restart under the same driver."""
LOST_DIR = "lost"
"""A file for each teacher actor that stopped permanently, with the reason."""
QUARANTINE_DIR = "quarantine"
EPOCHS_DIR = "epochs"
"""A file for each driver or actor that ever held the lock; the newest has the largest number."""
SESSIONS_DIR = "sessions"
"""A file for each driver of the run."""
ROUNDS_DIR = "rounds"
CHECKPOINTS_DIR = "checkpoints"
MODEL_DIR = "model"
ONNX_DIR = "onnx"
"""Subfolder of the model's folder, where the hub expects it."""
_UNFINISHED = ".tmp"
"""Suffix of a local file that has not been renamed yet."""


TRIES = 7
"""How often an operation of a store is tried; with the pauses in between, about half a minute."""
FIRST_PAUSE_S = 0.5
_PASSING = re.compile(
    r"AWS Error (SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT|THROTTLING"
    r"|UNKNOWN \(HTTP status 5\d\d\))"
)
_PASSING_ERRNO = {errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}  # of a network file system
store_errors: Counter[str] = Counter()
"""Errors of stores that an operation of this process was tried again after, by operation."""

P = ParamSpec("P")
T = TypeVar("T")


def retried(operation: Callable[P, T]) -> Callable[P, T]:
    """The operation, tried again after errors that pass: an overloaded store, a lost connection.

    The S3 client retries on its own, but not for long, and not where the error's text is larger than the
    range that was asked for. Other errors, such as a missing file, a refused key or a full disk, are raised
    at once. An operation may have happened although its answer was lost, so it must be one that can be
    repeated.
    """

    @functools.wraps(operation)
    def tried(*args: P.args, **kwargs: P.kwargs) -> T:
        pause_s = FIRST_PAUSE_S
        for number in range(1, TRIES):
            try:
                return operation(*args, **kwargs)
            except OSError as error:
                if error.errno not in _PASSING_ERRNO and not _PASSING.search(str(error)):
                    raise
                store_errors[operation.__name__] += 1
                what = operation.__name__.strip("_").replace("_", " ")
                logging.getLogger(__name__).warning(
                    "%s: the store failed (%s); try %d of %d follows (%d errors of stores in this process)",
                    *(what, reason_of(error), number + 1, TRIES, store_errors.total()),
                )
            time.sleep(pause_s * random.uniform(0.5, 1.5))  # so that many clients do not come back at once
            pause_s *= 2
        return operation(*args, **kwargs)

    return tried


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Filesystem and path of a local path or a URI such as ``s3://bucket/folder``.

    Raises :class:`ConfigError` for an address with a key in it, which would be shown and written down.
    """
    check_uri("URI", uri)
    if uri.startswith("s3://") and "allow_delayed_open" not in uri:
        # A small file is then one PUT instead of the three requests of a multipart upload.
        uri += f"{'&' if '?' in uri else '?'}allow_delayed_open=true"
    if "://" in uri:
        return pafs.FileSystem.from_uri(uri)
    return pafs.LocalFileSystem(), str(Path(uri).expanduser().resolve())


def join_uri(folder: str, *names: str) -> str:
    """A path below a folder; the options of a URI (``s3://bucket/runs?region=…``) stay at its end."""
    address, mark, options = folder.partition("?") if "://" in folder else (folder, "", "")
    return "/".join([address.rstrip("/"), *names]) + mark + options


class RunStore:
    """Reads and writes the files of one run; cheap to construct and to pickle.

    Paths are relative to the run directory, with forward slashes.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.fs, self.root = open_filesystem(uri)
        self.root = self.root.rstrip("/")
        self.is_local = isinstance(self.fs, pafs.LocalFileSystem)
        # S3 has no folders; creating one costs a request for each part of the path.
        self._has_folders = self.fs.type_name != "s3"

    def path(self, relative: str) -> str:
        """The path on the store's filesystem."""
        return f"{self.root}/{relative}".rstrip("/")

    def uri(self, relative: str = "") -> str:
        """The address for users and other stores; on a local disk the absolute path."""
        if not relative:
            return self.root if self.is_local else self._uri
        return self.path(relative) if self.is_local else join_uri(self._uri, relative)

    @retried
    def exists(self, relative: str) -> bool:
        return self.fs.get_file_info(self.path(relative)).type != pafs.FileType.NotFound

    @retried
    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Sorted names of the files in a folder; empty if there is no such folder.

        Unfinished files of killed writers are not included.
        """
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        found = [info.base_name for info in self.fs.get_file_info(selector) if info.is_file]
        return sorted(n for n in found if n.endswith(suffix) and not n.endswith(_UNFINISHED))

    @retried
    def folders(self, folder: str) -> list[str]:
        """Sorted names of the folders in a folder."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        return sorted(
            i.base_name for i in self.fs.get_file_info(selector) if i.type == pafs.FileType.Directory
        )

    @retried
    def delete(self, relative: str) -> None:
        """Delete a file; a missing file is not an error."""
        with suppress(FileNotFoundError):
            self.fs.delete_file(self.path(relative))

    @retried
    def delete_folder(self, relative: str) -> None:
        """Delete a folder and all in it; a missing folder is not an error."""
        with suppress(FileNotFoundError):
            self.fs.delete_dir(self.path(relative))

    @retried
    def upload(self, folder: str | Path, relative: str) -> None:
        """Copy the files of a local folder, one by one, into a folder of the run."""
        self.fs.create_dir(self.path(relative), recursive=True)
        pafs.copy_files(str(folder), self.path(relative), pafs.LocalFileSystem(), self.fs)

    @retried
    def download(self, relative: str, to: str | Path) -> None:
        """Copy a file to a local path, or the files of a folder to a local folder that exists."""
        pafs.copy_files(self.path(relative), str(to), self.fs, pafs.LocalFileSystem())

    @retried
    def write_bytes(self, relative: str, content: Any, replace: bool = True) -> None:
        """Write a complete file, atomically, from bytes or a buffer. See :meth:`writing`."""
        with self.writing(relative, replace) as stream:
            stream.write(content)

    @contextmanager
    def writing(self, relative: str, replace: bool = True) -> Iterator[pa.NativeFile]:
        """A stream to a file that exists once the block ends; on S3, a large file may end up truncated.

        On a local disk it outlasts a loss of power. Without ``replace``, an existing file stays and the block
        ends with FileExistsError; of two writers at the same moment, one wins on a local disk.
        """
        target = self.path(relative)
        if not replace and self.exists(relative):
            raise FileExistsError(errno.EEXIST, "there is a file already", target)
        if self._has_folders:
            self.fs.create_dir(target.rpartition("/")[0], recursive=True)
        place = f"{target}.{uuid.uuid4().hex}{_UNFINISHED}" if self.is_local else target
        try:
            with self.fs.open_output_stream(place, compression=None) as stream:
                yield stream
            if place != target:
                _flush(place)
                if replace or not _link(place, target):
                    self.fs.move(place, target)
                else:
                    self.fs.delete_file(place)
                _flush(target.rpartition("/")[0])
        except BaseException:
            if place != target and self.fs.get_file_info(place).is_file:
                self.fs.delete_file(place)
            raise

    @retried
    def read_at(self, relative: str, size: int, start: int) -> bytes:
        """``size`` bytes of a file from byte ``start`` on."""
        with self.fs.open_input_file(self.path(relative)) as file:
            return file.read_at(size, start)

    @retried
    def read_bytes(self, relative: str) -> bytes:
        with self.fs.open_input_stream(self.path(relative), compression=None) as stream:
            return stream.read()

    def write_json(self, relative: str, value: Any) -> None:
        self.write_bytes(relative, json.dumps(value, indent=1, ensure_ascii=False).encode())

    def write_json_once(self, relative: str, value: Any) -> Any:
        """Write a JSON file unless it exists; returns what the file holds."""
        with suppress(FileExistsError):
            self.write_bytes(relative, json.dumps(value).encode(), replace=False)
        return self.read_json(relative)

    def read_json(self, relative: str) -> Any:
        with self._naming(relative):
            return json.loads(self.read_bytes(relative))

    def write_table(
        self, relative: str, table: pa.Table, row_group_size: int | None = None, replace: bool = True
    ) -> None:
        """Write a parquet file, atomically; its schema should be one of ``tables``. See :meth:`writing`."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=row_group_size, compression="zstd")
        self.write_bytes(relative, buffer.getvalue(), replace)

    def read_table(self, relative: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a parquet file, or some of its columns. Raises ConfigError if it is damaged."""
        with self._naming(relative):
            return self._read_parquet(relative, columns)

    @retried
    def _read_parquet(self, relative: str, columns: Sequence[str] | None) -> pa.Table:
        # Not pq.read_table, which costs two more requests to an object store for the file's size.
        with pq.ParquetFile(self.path(relative), filesystem=self.fs, pre_buffer=True) as file:
            return file.read(columns=None if columns is None else list(columns))

    @contextmanager
    def _naming(self, relative: str) -> Iterator[None]:
        """Name the file in errors of damaged files; FileNotFoundError is passed on unchanged."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # pyarrow raises both for damaged files
            raise ConfigError(
                f"{self.uri(relative)} cannot be read ({reason_of(error)}): "
                "if it is damaged, put a copy back, or begin a new run, which finds the labels in the cache"
            ) from error

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one round's line to metrics.jsonl, in order of rounds; replaces a line of the same round."""
        lines = self.read_bytes(METRICS).splitlines() if self.exists(METRICS) else []
        later: list[bytes] = []
        # Searched from the end, where the line usually belongs, so earlier rounds are not parsed.
        while lines and (last := json.loads(lines[-1])["round"]) >= line["round"]:
            kept = lines.pop()
            later += [kept] if last > line["round"] else []
        lines += [json.dumps(line).encode(), *reversed(later)]
        self.write_bytes(METRICS, b"".join(one + b"\n" for one in lines))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest round first."""
        if not self.exists(METRICS):
            return []
        return [json.loads(line) for line in self.read_bytes(METRICS).decode().splitlines()]


def open_run(run_dir: str, field: str = "RUN") -> RunStore:
    """The store of an existing run; raises ConfigError, which names ``field``, if there is no run."""
    store = RunStore(absolute(run_dir))
    if not store.exists(CONFIG):
        raise ConfigError(f"{field}: {run_dir} has no {CONFIG}; give the directory of a run")
    return store


def run_config(store: RunStore) -> Config:
    """The settings of an existing run."""
    return parse_config(yaml.safe_load(store.read_bytes(CONFIG)))


def _flush(path: str) -> None:
    """Write a local file, or a folder's list of names, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(place: str, target: str) -> bool:
    """Whether a second name could be given to a file; raises FileExistsError if that name is taken."""
    try:
        os.link(place, target)
    except FileExistsError:
        raise
    except OSError:  # a filesystem without hard links
        return False
    return True


def reason_of(error: Exception) -> str:
    """An exception's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def ticket_file(folder: str, ticket: int) -> str:
    """The file of one ticket in LABELS_DIR or SENT_DIR."""
    return f"{folder}/ticket-{ticket:08d}.parquet"


def ticket_of(name: str) -> int:
    """The ticket number in a name made by :func:`ticket_file`."""
    return int(name.removeprefix("ticket-").partition(".")[0])


NO_LABEL = "no_label"
"""Reason for the quarantine: the teacher's answer is none of the labels (``teacher.max_off_label``)."""


def teacher_quarantine_file(ticket: int) -> str:
    """The texts of a ticket that the teacher gave no label."""
    return f"{QUARANTINE_DIR}/teacher-{ticket:08d}.parquet"


BATCH = "batch.parquet"
SELECTED = "selected.json"
"""File in a round's folder: the round's batch is complete once this file exists."""
SCORES = "scores.parquet"
TRAINED = "trained.json"
"""File in a round's folder: the student has finished the round once this file exists."""


def round_file(round_number: int, name: str) -> str:
    """A file of one round, such as ``rounds/0003/batch.parquet``."""
    return f"{ROUNDS_DIR}/{round_number:04d}/{name}"


def predictions_file(round_number: int, rank: int, ranks: int) -> str:
    """The file in which one of ``ranks`` ranks writes the student's predictions after a round."""
    return round_file(round_number, f"predictions-{rank:04d}-of-{ranks:04d}.parquet")


ASKED = "audit/asked.parquet"
ANSWERS = "audit/answers.parquet"
ESTIMATE = "audit/estimate.json"
AUDITED = "audited.parquet"
"""File in a round's folder: people's labels that the round was scored and selected with."""


SUMMARY = "summary.json"
TEACHER_CHECK = "teacher_check.json"
"""Warnings about the teacher's first labels."""
INSIGHT = "insight.json"
"""Figures of a finished run on single classes and texts."""


CANDIDATE_SAMPLE = "candidate_sample.parquet"
"""File in a round's folder."""


REPORT = "report.html"
CARD = f"{MODEL_DIR}/README.md"
