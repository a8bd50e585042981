"""Answers of earlier runs: a text that a teacher has already answered is not sent to it again.

Nothing is copied. A run registers the location of its label files, under a key of everything that
determines an answer (:func:`answer_key`); a later run with the same key reads them there:

    CACHE/KEY/HASH.json = {"labels": folder of LABELS files, "member": which teacher's rows of them}

Shapes in names: N texts that are looked up, K answers in the index.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import SCORES_METHOD, RunStore

READERS = 8
"""Threads that read label files."""
OPEN_FILES = 64
"""Label files that are kept in memory after an answer was found in them."""
RECENT_FILES = 64
"""Label files that the speed is measured on."""
_HARMLESS_ENGINE_ARGUMENTS = {
    "block_size", "cpu_offload_gb", "data_parallel_size", "disable_log_requests", "disable_log_stats",
    "distributed_executor_backend", "download_dir", "enable_chunked_prefill", "enable_prefix_caching",
    "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_logprobs",
    "max_num_batched_tokens", "max_num_seqs", "max_parallel_loading_workers", "pipeline_parallel_size",
    "seed", "swap_space", "tensor_parallel_size",
}  # fmt: skip
"""These affect an engine's speed, not its answers; any other argument makes it a different teacher."""
_CHECKPOINT_FILES = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NAMES_OF_MEMBER = {0: ("teacher", "small"), 1: ("large",)}
_NEEDED = ("text_hash", "member", "probs")

# --- key of an answer


def answer_key(teacher: TeacherConfig, names: Sequence[str], prompt_hash: str) -> str:
    """A short key of everything that determines one teacher's (not a cascade's) answer to a text.

    Parallelism and the processing of answers are not part of it. A server is identified by its address, since
    different models may have the same name, unless ``server.cache_as`` names it. A checkpoint folder is
    identified by its path and the names, sizes and times of its files, so that retraining into the same
    folder gives a different teacher; call this on the machine that has the folder. Raises ValueError for a
    teacher that sends no requests.
    """
    if teacher.kind not in ("vllm", "openai"):
        raise ValueError(f"kind is {teacher.kind!r}: only the answers of a vllm or openai teacher are kept")
    decisive: dict[str, Any] = {
        "kind": teacher.kind,
        "model": _source(teacher.model) if teacher.kind == "vllm" else teacher.model,
        "revision": teacher.revision,
        "dtype": teacher.dtype,
        "quantization": teacher.quantization,
        "max_model_len": teacher.context,
        "cut": teacher.prompt.cut,
        "engine": {k: v for k, v in teacher.engine.items() if k not in _HARMLESS_ENGINE_ARGUMENTS},
        "min_branch_prob": teacher.min_branch_prob,
        "labels": list(names),
        "prompt": prompt_hash,
        "votes": None,
    }
    may_vote = teacher.confidence.method == "votes"
    if teacher.kind == "openai":
        assert teacher.server is not None
        server = teacher.server
        where = server.cache_as or server.base_url.rstrip("/").lower()
        decisive["server"] = [where, server.scores, server.top_logprobs, _source(server.tokenizer)]
        may_vote = may_vote or server.scores in ("votes", "auto")
    if may_vote:
        confidence = teacher.confidence
        decisive["votes"] = [
            confidence.method == "votes",
            confidence.samples,
            confidence.sampling_temperature,
        ]
    return _short_hash(json.dumps(decisive, sort_keys=True, default=str))


def _source(model: str | None) -> Any:
    """A hub name unchanged; a local checkpoint with its files' names, sizes and times."""
    path = Path(model or "").expanduser()
    if not model or not path.exists():
        return model
    files = [path] if path.is_file() else sorted(path.iterdir())
    stats = [(file.name, file.stat()) for file in files if file.suffix in _CHECKPOINT_FILES]
    return [str(path.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]


def _short_hash(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


# --- registrations


def register(uri: str, key: str, labels_uri: str, member: int) -> None:
    """Register that the folder ``labels_uri`` holds answers of the teacher ``key``.

    ``member`` selects the teacher's rows: see LABELS. May be called before the first file exists, and
    repeatedly.
    """
    store = RunStore(uri)
    content = {"labels": _absolute(labels_uri), "member": member}
    name = f"{key}/{_short_hash(json.dumps(content, sort_keys=True))}.json"
    if not store.exists(name):  # its modification time gives the order of registration
        store.write_json(name, content)


class Registration(NamedTuple):
    """A folder of LABELS, and the teacher whose rows of it count."""

    labels: str
    member: int


def registrations(uri: str, key: str) -> list[Registration]:
    """Registrations under a key, the oldest first. Invalid files are skipped."""
    store = RunStore(uri)
    infos = store.fs.get_file_info(pafs.FileSelector(store.path(key), allow_not_found=True))
    found = []
    for info in sorted(infos, key=lambda info: (info.mtime_ns or 0, info.base_name)):
        if info.is_file and info.extension == "json":
            try:
                content = store.read_json(f"{key}/{info.base_name}")
                found.append(Registration(str(content["labels"]), int(content["member"])))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # another run may be writing it, or it is an unrelated file
    return found


def _absolute(uri: str) -> str:
    """An absolute URI, so that a run has one name."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().resolve())


# --- answers


@dataclass(frozen=True)
class LabelFile:
    """One file of LABELS in which rows of ``member`` count."""

    store: RunStore
    folder: str
    name: str
    member: int
    mtime_ns: int


class AnswerCache:
    """Finds answers by their texts' hashes; 16 bytes per answer. Thread-safe."""

    def __init__(
        self,
        files: Sequence[LabelFile],
        hash_K: np.ndarray,
        file_K: np.ndarray,
        position_K: np.ndarray,
        skipped: int = 0,
    ) -> None:
        self._files = files
        self._hash_K, self._file_K, self._position_K = hash_K, file_K, position_K
        self.skipped = skipped
        """Label folders and files that are missing, unreadable, or not in this format."""
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, uri: str, key: str, n_classes: int, own: str | None) -> AnswerCache:
        """Index all answers of runs under a key, except those in the folder ``own``.

        If two runs have answered a text, the one that registered first counts. A run still in progress is
        indexed in its current state.
        """
        own = _absolute(own) if own else None
        known = [one for one in registrations(uri, key) if one.labels != own]
        files, skipped = _label_files(known)
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(lambda file: _read_hashes(file, n_classes), files))
        hashes = [found[0] for found in read if found]
        positions = [found[1] for found in read if found]
        sizes = [len(found[0]) if found else 0 for found in read]
        all_hashes = np.concatenate([np.empty(0, np.uint64), *hashes])
        # np.unique returns the first of equal ones: files are in the order of registration.
        hash_K, first_K = np.unique(all_hashes, return_index=True)
        file_K = np.repeat(np.arange(len(files), dtype=np.int32), sizes)[first_K]
        position_K = np.concatenate([np.empty(0, np.int32), *positions])[first_K]
        return cls(files, hash_K, file_K, position_K, skipped + sum(found is None for found in read))

    def __len__(self) -> int:
        return self._hash_K.size

    def scores_method(self) -> str | None:
        """The method of the earliest run whose answers are reused, see ``server.scores``; None if unknown."""
        for store in dict.fromkeys(file.store for file in self._files):
            with suppress(OSError, ValueError):
                return str(store.read_json(SCORES_METHOD))
        return None

    def find(self, text_hash_N: np.ndarray) -> tuple[np.ndarray, pa.Table]:
        """bool[N]: which texts have an answer; and those answers, rows of LABELS in the same order.

        The rows are those of the earlier run: ``row``, ``id`` and ``reused`` do not refer to this run. Files
        deleted since the index was built give no answers.
        """
        text_hash_N = np.asarray(text_hash_N, dtype=np.uint64)
        place_N = np.searchsorted(self._hash_K, text_hash_N)
        found_N = place_N < len(self)
        found_N[found_N] = self._hash_K[place_N[found_N]] == text_hash_N[found_N]
        at_N = np.flatnonzero(found_N)
        file_N = self._file_K[place_N[at_N]]
        pieces, order = [tables.LABELS.empty_table()], [np.empty(0, np.int64)]
        for file in np.unique(file_N).tolist():
            here = at_N[file_N == file]
            rows = self._rows(file, self._position_K[place_N[here]])
            whole = _is_as_indexed(rows, text_hash_N[here], self._files[file].member)
            found_N[here[~whole]] = False
            order.append(here[whole])
            pieces.append(rows.filter(pa.array(whole)) if len(rows) else rows)
        back = np.argsort(np.concatenate(order), kind="stable")
        return found_N, pa.concat_tables(pieces).take(pa.array(back))

    def _rows(self, file: int, position_M: np.ndarray) -> pa.Table:
        """Rows of one file; empty where the file has changed and no longer has them."""
        table = self._table(file)
        if position_M.max() >= len(table):
            return tables.LABELS.empty_table()
        return table.take(pa.array(position_M))

    def _table(self, file: int) -> pa.Table:
        with self._lock:
            if file in self._tables:
                self._tables.move_to_end(file)
                return self._tables[file]
        try:
            with _parquet(self._files[file]) as parquet:
                table = parquet.read(columns=tables.LABELS.names, use_threads=False).cast(tables.LABELS)
        except (OSError, ValueError, pa.ArrowException):
            table = tables.LABELS.empty_table()
        with self._lock:
            self._tables[file] = table
            while len(self._tables) > OPEN_FILES:
                self._tables.popitem(last=False)
        return table


def _is_as_indexed(rows: pa.Table, text_hash_M: np.ndarray, member: int) -> np.ndarray:
    """bool[M]: whether rows match the index; a folder may have been deleted and rewritten since."""
    if not len(rows):
        return np.zeros(len(text_hash_M), dtype=bool)
    return (rows["text_hash"].to_numpy() == text_hash_M) & (rows["member"].to_numpy() == member)


def _label_files(known: Sequence[Registration]) -> tuple[list[LabelFile], int]:
    """The files in registered folders, in the order of registration, and the number of missing folders."""
    files: list[LabelFile] = []
    gone = 0
    for registration in known:
        try:
            store = RunStore(registration.labels)
            infos = store.fs.get_file_info(pafs.FileSelector(store.root))
        except (OSError, ValueError, pa.ArrowException):
            gone += 1
            continue
        parquet = [info for info in infos if info.is_file and info.extension == "parquet"]
        files += [
            LabelFile(store, registration.labels, info.base_name, registration.member, info.mtime_ns or 0)
            for info in sorted(parquet, key=lambda info: info.base_name)
        ]
    return files, gone


def _read_hashes(file: LabelFile, n_classes: int) -> tuple[np.ndarray, np.ndarray] | None:
    """uint64[M] and int32[M]: text hashes and positions of the rows that count; None for an unusable file."""
    try:
        with _parquet(file) as parquet:
            if not _fits(parquet, n_classes):
                return None
            table = parquet.read(columns=["text_hash", "member"], use_threads=False)
    except (OSError, pa.ArrowException):
        return None
    position_M = np.flatnonzero(table["member"].to_numpy() == file.member)
    return table["text_hash"].to_numpy()[position_M], position_M.astype(np.int32)


def _fits(parquet: pq.ParquetFile, n_classes: int) -> bool:
    """Whether it is a file of LABELS with this number of probabilities per row, by its footer alone."""
    schema, metadata = parquet.schema_arrow, parquet.metadata
    if any(schema.get_field_index(field.name) < 0 for field in tables.LABELS):
        return False
    if any(schema.field(name).type != tables.LABELS.field(name).type for name in _NEEDED):
        return False
    groups = (metadata.row_group(g) for g in range(metadata.num_row_groups))
    n_probs = sum(
        group.column(c).num_values
        for group in groups
        for c in range(group.num_columns)
        if group.column(c).path_in_schema.startswith("probs.")
    )
    return n_probs == metadata.num_rows * n_classes


def _parquet(file: LabelFile) -> pq.ParquetFile:
    return pq.ParquetFile(file.store.path(file.name), filesystem=file.store.fs, pre_buffer=False)


# --- speed


class Speed(NamedTuple):
    """The measured speed of an earlier run."""

    tokens_per_s: float
    """Prompt tokens of one actor; the median of some tickets."""
    tickets: int
    labels: str
    """The folder of the newest of these tickets."""


def speed_of(uri: str, key: str) -> Speed | None:
    """The speed of earlier runs under a key, from their newest label files; None without a measurement.

    A ticket's seconds are divided by the number of tickets in flight at the same time.
    """
    files, _ = _label_files(registrations(uri, key))
    newest = sorted(files, key=lambda file: -file.mtime_ns)[:RECENT_FILES]
    measured = [(speed, file) for file in newest for speed in _speeds(file)]
    if not measured:
        return None
    return Speed(float(np.median([speed for speed, _ in measured])), len(measured), measured[0][1].folder)


def _speeds(file: LabelFile) -> Iterator[float]:
    """The speed of one ticket, if its file records it."""
    try:
        with _parquet(file) as parquet:
            metadata = parquet.schema_arrow.metadata or {}
        usage = json.loads(metadata.get(b"usage", b"{}"))
        in_flight = int(metadata.get(b"tickets_in_flight", b"1"))
    except (OSError, ValueError, pa.ArrowException):
        return
    for name in _NAMES_OF_MEMBER.get(file.member, ()):
        used = usage.get(name, {})
        if used.get("seconds", 0) > 0 and used.get("prompt_tokens", 0) > 0:
            yield used["prompt_tokens"] / used["seconds"] * in_flight
