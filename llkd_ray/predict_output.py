"""The folder of a prediction: what decided it, its tables, and how a second start is held to the first.

    predict.json                what decided the results; versions
    predictions/  gold/         parquet, a file a piece; gold's, where thresholds are fitted
    quarantine/                 refused rows, with a reason
    thresholds.json             what was fitted, with precision, interval and coverage
    summary.json                rows in, predicted and refused
    tasks/                      how the corpus was cut, and what was read of it

Shapes in names: N texts, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llkd_ray.classifier import Checkpoint
from llkd_ray.config import ConfigError
from llkd_ray.pieces import CORPUS, FOLDERS, GOLD
from llkd_ray.predict_config import PredictConfig
from llkd_ray.readers import Unit
from llkd_ray.signals import confidence
from llkd_ray.store import RunStore, list_column, matrix_of, open_filesystem
from llkd_ray.thresholds import Thresholds, grade_confidence

MANIFEST = "predict.json"
SUMMARY = "summary.json"
THRESHOLDS = "thresholds.json"

# ``probs`` are in the order of ``labels`` in the schema's metadata. ``p_at_least`` (with ``at_least``) and
# ``text`` (if it is asked for) come behind.
PREDICTIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("accepted", pa.bool_(), nullable=False),
        pa.field("probs", pa.list_(pa.float32()), nullable=False),
    ]
)


def open_output(
    config: PredictConfig,
    checkpoint: Checkpoint,
    units: Mapping[str, Sequence[Unit]],
    versions: dict[str, str],
) -> RunStore:
    """The folder, ready to go on in. A first start writes down what decides the results.

    Raises :class:`ConfigError` where it holds something else, or was begun with something else.
    """
    asked = decides(config, checkpoint, units)
    try:
        store = RunStore(config.out)
        if store.exists(MANIFEST):
            _require_same(config, asked, store.read_json(MANIFEST)["decides"])
        elif store.names(FOLDERS[CORPUS]):
            raise ConfigError(
                f"--out: {config.out!r} holds {FOLDERS[CORPUS]}/ of something else: give another folder"
            )
        else:
            store.write_json(MANIFEST, {"decides": asked, "versions": versions})
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--out: {config.out!r} cannot be used ({reason}): check the address and your rights"
        ) from None
    return store


def decides(
    config: PredictConfig, checkpoint: Checkpoint, units: Mapping[str, Sequence[Unit]]
) -> dict[str, Any]:
    """By flag, all that the results follow from. How fast they come (batches, workers) is not among it."""
    corpus, gold = config.corpus, config.gold
    asked: dict[str, Any] = {
        "MODEL (its files)": checkpoint.fingerprint,
        "CORPUS_URI": list(corpus.uris),
        "CORPUS_URI (its files)": _files_hash(units[CORPUS]),
        "--text": corpus.text,
        "--id": corpus.id,
        "--where": corpus.where,
        "--max-chars": corpus.max_chars,
        "--limit": corpus.limit,
        "--gold": list(gold.uris) if gold else None,
        "--gold (its files)": _files_hash(units[GOLD]) if gold else None,
        "--gold-text": gold.text if gold else None,
        "--label": gold.gold if gold else None,
        "--precision": config.precision,
        "--threshold": config.thresholds,
        "--at-least": config.at_least,
        "--max-tokens": checkpoint.max_tokens,
        "--dtype": config.dtype,
        "--piece-rows": config.piece_rows,
        "--with-text": config.with_text,
    }
    return json.loads(json.dumps(asked))  # as it will be read back


def _require_same(config: PredictConfig, asked: dict[str, Any], begun: dict[str, Any]) -> None:
    for field, value in asked.items():
        if value != begun.get(field):
            raise ConfigError(
                f"{field}: {value!r} now, but {config.out!r} was begun with {begun.get(field)!r}: "
                "give what it was begun with, or another --out"
            )
    if not config.resume:
        raise ConfigError(
            f"--out: {config.out!r} holds predictions: go on with --resume, or give another folder"
        )


def _files_hash(units: Sequence[Unit]) -> str:
    """Of names, sizes and times of change; a hub's data set has none but its name."""
    whole = hashlib.blake2b(digest_size=16)
    for base in dict.fromkeys(unit.base for unit in units):
        paths = sorted({unit.path for unit in units if unit.base == base})
        whole.update(json.dumps(paths).encode())
        if base:
            infos = open_filesystem(base)[0].get_file_info(paths)
            whole.update(json.dumps([(info.size, info.mtime_ns) for info in infos]).encode())
    return whole.hexdigest()


def predictions(texts: pa.Table, p_NC: np.ndarray, thresholds: Thresholds, with_text: bool) -> pa.Table:
    """PREDICTIONS of some TEXTS, with gold behind them where it is known."""
    names = np.array(thresholds.labels, dtype=object)
    columns: dict[str, Any] = {
        "id": texts["id"],
        "source": texts["source"],
        "position": texts["position"],
        "label": pa.array(names[p_NC.argmax(axis=1)], pa.string()),
        "confidence": pa.array(confidence(p_NC), pa.float32()),
        "accepted": pa.array(thresholds.accept(p_NC)),
        "probs": list_column(p_NC),
    }
    fields = list(PREDICTIONS)
    if thresholds.at_least is not None:
        columns["p_at_least"] = pa.array(grade_confidence(p_NC, thresholds.at_least), pa.float32())
        fields.append(pa.field("p_at_least", pa.float32(), nullable=False))
    for name, is_wanted in (("text", with_text), ("gold", bool((texts["gold"].to_numpy() >= 0).any()))):
        if is_wanted:
            columns[name] = texts[name]
            fields.append(texts.schema.field(name))
    schema = pa.schema(fields, metadata={"labels": json.dumps(list(thresholds.labels), ensure_ascii=False)})
    return pa.table(columns, schema=schema)


def read_gold(store: RunStore, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """int[N] and float64[N, C]: true labels and the model's probabilities of all gold texts."""
    golds, probs = [np.empty(0, dtype=np.int64)], [np.empty((0, n_classes))]
    for name in store.names(FOLDERS[GOLD], ".parquet"):
        table = store.read_table(f"{FOLDERS[GOLD]}/{name}", ["gold", "probs"])
        golds.append(table["gold"].to_numpy())
        probs.append(matrix_of(table["probs"], n_classes))
    return np.concatenate(golds), np.concatenate(probs)
