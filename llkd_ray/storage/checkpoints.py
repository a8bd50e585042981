"""Checkpoints in transformers' format: everything that can be read without loading the weights.

Shapes in names: N texts, C classes.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from llkd_ray.config.base import ConfigError
from llkd_ray.storage.run_dir import CONFIG, MODEL_DIR, RunStore

SAFE = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Extensions of weights whose reading can run any code: they are never loaded."""
HUB_S = 15.0
"""Time limit for an answer of the hub."""
NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def load_tokenizer(source: str, revision: str | None, field: str) -> Any:
    """The tokenizer of a checkpoint folder or hub name.

    Raises :class:`ConfigError` if there is none; ``field`` is the setting that named ``source``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if source.startswith("/") and not Path(source).is_dir():
            raise ConfigError(
                f"{field}: there is no folder {source!r}; correct it, or give a hub name"
            ) from None
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{field}: no tokenizer can be loaded from {source!r}; give a checkpoint folder or a hub name "
            f"({first_line})"
        ) from None
    if len(tokenizer) < len(tokenizer.all_special_ids) + 10:
        # For some model types, transformers creates an empty tokenizer if the files are missing.
        raise ConfigError(
            f"{field}: {source!r} has no tokenizer files (its tokenizer knows {len(tokenizer)} tokens); save "
            "the tokenizer beside the weights"
        )
    return tokenizer


def commit_of(model: str, revision: str | None) -> str | None:
    """The commit in the hub's cache that a branch or tag stands for, once a file of it has been loaded.

    None for a folder. A branch may move to other weights, a commit cannot.
    """
    folder = None if _is_folder(model) else _cached_folder(model, revision)
    return folder.name if folder else None


def size_on_disk(model: str) -> int | None:
    """Bytes of a checkpoint's weights in a folder or the hub's cache; None if they are not here."""
    folder = Path(model) if Path(model).is_dir() else _cached_folder(model)
    size = sum(file.stat().st_size for file in folder.glob(f"*{SAFE}")) if folder else 0
    return size or None


def refuse_pickles(field: str, model: str, source: str, revision: str | None = None, kind: str = "") -> None:
    """Raise :class:`ConfigError` for a checkpoint whose weights are there, but none as safetensors.

    ``source`` is the folder, URI or hub name that ``field``'s ``model`` refers to, ``kind`` the end of the
    name of transformers' class for it. A hub that does not answer is not an error here.
    """
    names = _names(source, revision)
    pickled = sorted(name for name in names if name.endswith(PICKLED) and name not in NO_WEIGHTS)
    if pickled and not any(name.endswith(SAFE) for name in names):
        raise ConfigError(
            f"{field}: {model!r} has its weights only as a pickle ({pickled[0]}), which can run code when it "
            f"is loaded; give a checkpoint with *{SAFE}, or convert this one, if you trust it, with "
            f"transformers: AutoModel{kind}.from_pretrained({model!r}).save_pretrained('NEW'), copy its "
            "tokenizer, and give NEW"
        )


def _names(source: str, revision: str | None) -> list[str]:
    """The names of a checkpoint's files; none where they cannot be listed."""
    from huggingface_hub import HfApi, constants

    if "://" in source or Path(source).is_dir():
        return RunStore(source).names("")
    folder = _cached_folder(source, revision)
    cached = [file.name for file in folder.iterdir()] if folder else []
    if constants.HF_HUB_OFFLINE or any(name.endswith(SAFE) for name in cached):
        return cached
    with suppress(Exception):  # of the hub's HTTP library, which varies by version; loading will tell
        files = HfApi().model_info(source, revision=revision, timeout=HUB_S).siblings
        return [file.rfilename for file in files or ()]
    return cached


def _cached_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder in the hub's cache with the files of a model's revision; default: the newest."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    except HFValidationError:
        return None  # a path
    return Path(file).parent if isinstance(file, str) else None


HEAD = "ForSequenceClassification"
UNKNOWN_LENGTH = 1_000_000_000
"""A tokenizer without a known maximum length reports a larger number than this."""
READ_BY_DEFAULT = 512
_CONFIG_FILE = "config.json"
_MATTERS = (".json", SAFE, ".txt", ".model")
"""Extensions of the checkpoint files that affect the predictions."""


@dataclass(frozen=True)
class Checkpoint:
    """A classifier that was inspected without loading its weights."""

    source: str
    """A local folder, a URI or a hub name."""
    revision: str | None
    labels: tuple[str, ...]
    """In the order of the model's outputs."""
    max_tokens: int
    fingerprint: str
    """Hash of the files or the hub's commit; differs whenever the predictions may differ."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.source


def inspect(model: str, revision: str | None = None, max_tokens: int | None = None) -> Checkpoint:
    """The checkpoint that a run directory, a checkpoint folder or a hub name refers to.

    Raises :class:`ConfigError` if it is not a single-label classifier with two or more classes.
    """
    source, trained_tokens = _find(model)
    if revision and (_is_folder(source) or "://" in source):
        raise ConfigError(
            f"--revision: {revision!r} is of a hub name, and {model!r} is a folder: leave it out"
        )
    with local_copy(source, weights=False) as folder:
        config = _load_config(folder, model, revision)
        labels = _labels(config, model)
        refuse_pickles("MODEL", model, source, revision, HEAD)
        tokenizer = load_tokenizer(folder, revision, "MODEL")
        reads = _reads(config, tokenizer)
    if max_tokens is not None and max_tokens > reads:
        raise ConfigError(f"--max-tokens: {max_tokens} is too long, {model!r} reads {reads}: lower it")
    is_hub_name = not (_is_folder(source) or "://" in source)
    if is_hub_name:
        revision = commit_of(source, revision) or revision  # workers that come later load the same one
    fingerprint = f"commit {revision}" if is_hub_name else _fingerprint(source)
    tokens = max_tokens or min(reads, trained_tokens or reads)
    return Checkpoint(source, revision, labels, tokens, fingerprint)


@contextmanager
def local_copy(source: str, weights: bool = True) -> Iterator[str]:
    """A local folder or a hub name; files on an object store are copied to a temporary folder."""
    if "://" not in source:
        yield source
        return
    store = RunStore(source)
    with tempfile.TemporaryDirectory(prefix="llkd-model-") as folder:
        for name in _files(store):
            if weights or not name.endswith(SAFE):
                store.download(name, f"{folder}/{name}")
        yield folder


# Locating the checkpoint


def _is_folder(model: str) -> bool:
    return Path(model).expanduser().is_dir()


def _find(model: str) -> tuple[str, int | None]:
    """The checkpoint's location, and the ``student.max_tokens`` of the run that made it, if any."""
    if not _is_folder(model) and "://" not in model:
        if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
            raise ConfigError(
                f"MODEL: {model!r} does not exist: give a run directory, a checkpoint or a hub name"
            )
        return model, None
    try:
        store = RunStore(model)
        if store.exists(_CONFIG_FILE):
            source = store.root if store.is_local else model
            run, _, name = store.root.rpartition("/")
            in_run = store.is_local and name == MODEL_DIR
            return source, _trained_tokens(RunStore(run)) if in_run else None
        if store.exists(f"{MODEL_DIR}/{_CONFIG_FILE}"):
            return store.uri(MODEL_DIR), _trained_tokens(store)
        is_run = store.exists(CONFIG)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"MODEL: {model!r} cannot be opened ({reason}): check the address") from None
    if is_run:
        raise ConfigError(
            f"MODEL: the run {model!r} has no {MODEL_DIR}/ yet: finish it first: llkd resume {model}"
        )
    raise ConfigError(
        f"MODEL: {model!r} holds neither {_CONFIG_FILE} nor {MODEL_DIR}/: give a run directory or a "
        "checkpoint folder"
    )


def _trained_tokens(run: RunStore) -> int | None:
    """``student.max_tokens`` of a run; None if there is no run."""
    if not run.exists(CONFIG):
        return None
    tree = yaml.safe_load(run.read_bytes(CONFIG))
    student = tree.get("student") if isinstance(tree, dict) else None
    tokens = student.get("max_tokens") if isinstance(student, dict) else None
    return tokens if isinstance(tokens, int) else None


def _files(store: RunStore) -> list[str]:
    return [name for name in store.names("") if name.endswith(_MATTERS)]


def _fingerprint(source: str) -> str:
    """A hash of all files that affect the predictions, each read once."""
    store, whole = RunStore(source), hashlib.blake2b(digest_size=16)
    for name in _files(store):
        whole.update(name.encode() + b"\0")
        with store.fs.open_input_stream(store.path(name), compression=None) as stream:
            while chunk := stream.read(1 << 24):
                whole.update(chunk)
    return whole.hexdigest()


# Inspecting it


def _load_config(folder: str, model: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(_unloadable(model, error)) from None


def _unloadable(model: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    here = "" if "://" in model or Path(model).exists() else "there is no such folder here, and the hub: "
    return (
        f"MODEL: {model!r} cannot be loaded ({here}{reason}); give a run directory, a checkpoint folder or a "
        "hub name"
    )


def _labels(config: Any, model: str) -> tuple[str, ...]:
    kinds = list(config.architectures or [])
    if not any(kind.endswith(HEAD) for kind in kinds):
        raise ConfigError(
            f"MODEL: {model!r} has no classification head (it is {', '.join(kinds) or 'of no known kind'}): "
            "give a checkpoint that was trained as a classifier"
        )
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        kind = (config.problem_type or "regression").replace("_", " ")
        raise ConfigError(
            f"MODEL: {model!r} is made for {kind} with {config.num_labels} output(s): give a classifier of "
            "two or more classes, one of which is right"
        )
    labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    if len(set(labels)) < len(labels):
        raise ConfigError(
            f"MODEL: {model!r} has a label twice in its id2label ({', '.join(labels)}): rename one there"
        )
    return labels


def _reads(config: Any, tokenizer: Any) -> int:
    """Number of tokens that the model reads of a text."""
    positions = getattr(config, "max_position_embeddings", None)
    if tokenizer.model_max_length < UNKNOWN_LENGTH:
        return int(min(tokenizer.model_max_length, positions or tokenizer.model_max_length))
    # RoBERTa-like models number positions after the padding index, so they read two tokens fewer.
    return positions - 2 if positions else READ_BY_DEFAULT


CALIBRATION_KEY = "llkd_calibration"
"""Key in a student's config.json: the temperature in its last layer, and how it was fitted."""
