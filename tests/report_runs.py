"""Finished runs for the tests of records and pages."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import yaml

from llkd_ray.config.loading import dump_config, parse_config
from llkd_ray.metrics.calibration import Calibrator
from llkd_ray.metrics.quality import quality_of
from llkd_ray.report.pages import write_report
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import (
    CANDIDATE_SAMPLE,
    CONFIG,
    EXAMPLES_INDEX,
    INSIGHT,
    MANIFEST,
    QUARANTINE_DIR,
    SELECTED,
    SUMMARY,
    RunStore,
    round_file,
)

LABELS = ("billing", "delivery", "returns", "praise", "account")


TEXTS = {
    "billing": ["I was charged twice in March.", "Where can I find the invoice?", "The discount is missing."],
    "delivery": ["The parcel is still in Lyon.", "Nobody rang at my door.", "Can you ship it to Oslo?"],
    "returns": ["The kettle leaks; I want to send it back.", "How long may I keep it?", "Wrong size again."],
    "praise": ["Best lamp I ever had!", "Your repair shop is a delight.", "Thank you, it came in a day."],
    "account": ["I cannot log in any more.", "Please delete my data.", "My new address is not saved."],
}


ATTACK = "<script>alert('boo')</script> & \"quotes\" </p></body> {{ 7 * 7 }}"


def make_run(folder, *, rounds=5, gold=True, finished=True, labels=LABELS, teacher_known=True) -> RunStore:
    """A run directory as the loop leaves it: ``rounds`` rounds of 160 texts out of 8,000."""
    rng = np.random.default_rng(7)
    store = RunStore(str(folder))
    config = parse_config(
        {
            "corpus": {"uri": "letters/*.parquet"},
            "test": {"uri": "test.parquet", "gold": "true"} if gold else None,
            "labels": {"names": list(labels), "descriptions": {labels[0]: "Money & <invoices>"}},
            "teacher": {
                "model": "models/large-teacher",
                "prompt": {"answer": "names" if len(labels) > 24 else "letters"},
            },
            "student": {"model": "minilm"},
        }
    )
    store.write_bytes(CONFIG, dump_config(config).encode())
    store.write_json(MANIFEST, {"versions": {"ray": "2.60.0"}, "rows": {"holdout": 200}})
    index = {
        "pool": [{"file": f"examples/pool-{i}.parquet", "rows": 2000} for i in range(4)],
        "test": [{"file": "examples/test-0.parquet", "rows": 1200}] if gold else [],
        "rows_in": {"pool": 8352} | ({"test": 1205} if gold else {}),
        "quarantined": {"pool": {"empty_text": 12, "duplicate": 340}}
        | ({"test": {"duplicate": 5}} if gold else {}),
    }
    store.write_json(EXAMPLES_INDEX, index)
    for number in range(rounds):
        write_round(store, number, labels, rng)
        write_selection(store, number, labels, np.random.default_rng(number))
        progress = 1 - 0.5 ** (number + 1)
        line = {
            "round": number,
            "labelled": 1000 * (number + 1),
            "trained": 160 * (number + 1),
            "teacher_tokens": 61_000 * (number + 1),
            "accuracy": 0.5 + 0.25 * progress if gold else None,
            "macro_f1": 0.4 + 0.28 * progress if gold else None,
            "ece": 0.12 - 0.07 * progress if gold else None,
            "teacher_agreement": 0.6 + 0.2 * progress,
            "pseudo_label_accuracy": 0.83 if gold else None,
            "seconds": {
                "teach": 14.0 + number,
                "select": 0.4,
                "train": 21.5 + 3 * number,
                "refresh": 5.2,
                "evaluate": 2.1,
                "idle": 1.5 if number else 9.0,
            },
            "pace": [[0.0, 1000 * number], [5.0, 1000 * number + 400], [14.0, 1000 * (number + 1)]],
        }
        store.append_metrics(line)
    if finished and rounds:
        teacher = {
            "accuracy": 0.742,
            "macro_f1": 0.664,
            "ece": 0.081,
            "off_label": 0.013,
            "quality": None,
        }
        student = {
            "accuracy": 0.7421 if gold else None,
            "macro_f1": 0.6713 if gold else None,
            "ece": 0.052 if gold else None,
            "accuracy_interval": [0.7181, 0.7663] if gold else None,
            "macro_f1_interval": [0.64, 0.70] if gold else None,
            "teacher_agreement": store.read_metrics()[-1]["teacher_agreement"],
        }
        summary = {
            "teacher": teacher if gold and teacher_known else None,
            "student": student,
            "labelled": 1000 * rounds,
            "trained": 160 * rounds,
            "teacher_tokens": 61_000 * rounds,
            "seconds": 254.0,
        }
        store.write_json(SUMMARY, summary)
    return store


def write_round(store, number, labels, rng, n=160):
    label_N = rng.choice(len(labels), n, p=(p := np.arange(len(labels), 0, -1.0)) / p.sum())
    weight_N = rng.gamma(4.0, 0.25, n)
    probs_NC = rng.dirichlet(np.full(len(labels), 0.3), n)
    texts = [
        f"{rng.choice(TEXTS.get(labels[c], [f'A line on {labels[c]}.']))} (letter {number}-{i})"
        for i, c in enumerate(label_N)
    ]
    if number == 0:
        heaviest_of_class_0 = np.flatnonzero(label_N == 0)[0]
        weight_N[heaviest_of_class_0] = 9.0
        texts[heaviest_of_class_0] = ATTACK
    columns = [number * n + np.arange(n), texts, label_N.astype(np.int16), list(probs_NC), weight_N]
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, tables.ROUND, strict=True)]
    store.write_table(round_file(number, "batch.parquet"), pa.Table.from_arrays(arrays, schema=tables.ROUND))


def add_teacher(store, *, calibrator=None, gold=True, cap=None, lost=()) -> dict:
    """Add the teacher's quality and usage to the summary; returns it as it is read."""
    summary, config = store.read_json(SUMMARY), yaml.safe_load(store.read_bytes(CONFIG))
    calibrator = calibrator or Calibrator()
    config["teacher"]["confidence"]["method"] = calibrator.method
    config["teacher"]["price"] = {"currency": "EUR", "input": 0.3, "cached": None, "output": 0.6}
    store.write_bytes(CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
    if gold:
        rng = np.random.default_rng(3)
        classes = len(config["labels"]["names"])
        fair_NC = rng.dirichlet(np.full(classes, 8 / classes), 1200)
        gold_N = np.minimum((fair_NC.cumsum(axis=1) < rng.random((1200, 1))).sum(axis=1), classes - 1)
        summary["teacher"]["quality"] = {"on": "test set"} | quality_of(fair_NC**3, gold_N, calibrator, rng)
    usage = {
        "texts": 4300,
        "requests": 4411,
        "prompt_tokens": 305_000,
        "cached_tokens": 220_000,
        "answer_tokens": 4411,
        "reused_texts": 700,
        "reused_tokens": 49_650,
        "cut_texts": 17,
        "seconds": 512.5,
        "cost": 0.0941,
    }
    extra = {"usage": {"teacher": usage}, "currency": "EUR", "cap": cap, "unasked": 0, "lost": list(lost)}
    if cap and cap["reached"]:
        extra["unasked"] = 250
    store.write_json(SUMMARY, summary | extra)
    return store.read_json(SUMMARY)


WARM = Calibrator("temperature", temperature=3.0, fitted_on=200)


class Page(HTMLParser):
    """A page read as a browser would: its text, elements, tables, and whether every tag is closed."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text, self.rows = [], [], "", []
        self.styles = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.styles += data
            return
        self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, first):
        return next(row for row in self.rows if row and row[0] == first)

    @property
    def plain(self):
        """The text with every kind of space made one."""
        return " ".join(self.text.split())


def render(store) -> Page:
    path = write_report(store)
    assert path == store.path("report.html")
    with open(path, encoding="utf-8") as file:
        return Page(file.read())


def write_selection(store, k, labels, rng, texts=40, sure=0.9):
    """A round's candidate sample and the record of its selection; in round 0 nothing is scored."""
    n_classes = len(labels)
    columns = [
        k * texts + np.arange(texts),
        rng.integers(0, n_classes, texts).astype(np.int16),
        1 - (1 - sure) * rng.random(texts),
        rng.random(texts) if k else np.full(texts, np.nan),
        rng.random(texts).astype(np.float16),
        np.arange(texts) % 2 == 0,
    ]
    arrays = [pa.array(x, field.type) for x, field in zip(columns, tables.CANDIDATE_SAMPLE, strict=True)]
    store.write_table(
        round_file(k, CANDIDATE_SAMPLE), pa.Table.from_arrays(arrays, schema=tables.CANDIDATE_SAMPLE)
    )
    levels = {"confidence": rng.random(n_classes).tolist(), "uncertainty": rng.random(n_classes).tolist()}
    selected = {"labelled_of_class": [100 * (k + 1)] * n_classes, "prior": None}
    selected["thresholds"] = levels if k else {"confidence": levels["confidence"]}
    store.write_json(round_file(k, SELECTED), selected)


def enrich(store: RunStore, labels=LABELS, rounds=5, per_round=2_000, sure=0.9, seed=5) -> RunStore:
    """Larger candidate samples, and texts to read."""
    rng = np.random.default_rng(seed)
    for k in range(rounds):
        write_selection(store, k, labels, rng, per_round, sure)
    looked_at = {"text": ATTACK, "gold": 1, "teacher": 0, "teacher_confidence": 0.97}
    insight = {
        "confusion": [[0, 0, 90], [0, 1, 30], [1, 1, 70], [1, 0, 10]],
        "reliability": [
            {"texts": 0, "accuracy": None, "confidence": None},
            {"texts": 100, "accuracy": 0.5, "confidence": 0.6},
            {"texts": 100, "accuracy": 0.9, "confidence": 0.95},
        ],
        "pool_gold": [50] * len(labels),
        "disagreements": [looked_at | {"student": 1, "student_confidence": 0.88}],
        "useful": [looked_at | {"uncertainty": 0.91}],
        "doubtful": [looked_at | {"uncertainty": None, "gold": None, "text": "Hm."}],
    }
    store.write_json(INSIGHT, insight)
    refused = {
        "source": ["letters/a.parquet"] * 4,
        "position": [3, 5, 8, 9],
        "reason": ["empty_text", "empty_text", "empty_text", "bad_id"],
        "detail": ["", "", "", "a list"],
        "start_of_text": ["", "", "", "<b>Dear</b>"],
    }
    store.write_table(f"{QUARANTINE_DIR}/pool-00000001.parquet", pa.table(refused, schema=tables.QUARANTINE))
    return store
