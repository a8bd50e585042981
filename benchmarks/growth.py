"""How does cost grow: seconds against rows, labels, rounds, classes and the length of texts.

    python benchmarks/growth.py
    python benchmarks/growth.py --only ingestion --sizes 1e4 1e5 1e6 1e7

Each line takes a part of a run by itself, at several sizes, and ends with two exponents of size: one fitted
to all, one between the largest two, which is what would hurt. 1 is in proportion; below 1, a fixed cost is
not outgrown yet. Seconds are of processor time, which other work on the machine disturbs less; those of
ingestion are of all processes of its Ray. Memory is what Python and numpy held at most, from another call.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from llkd_ray.config.schema import Config, LabelsConfig
from llkd_ray.config.teacher import PromptConfig
from llkd_ray.corpus.cleaning import clean_text, text_hash
from llkd_ray.corpus.ingest import ingest
from llkd_ray.metrics.quality import classification, macro_f1_interval
from llkd_ray.metrics.uncertainty import StudentScores
from llkd_ray.report.pages import write_report
from llkd_ray.selection.policies import SELECTION
from llkd_ray.selection.selector import Selector
from llkd_ray.selection.table import ScoreTable
from llkd_ray.storage.run_dir import CONFIG, EXAMPLES_INDEX, LABELS_DIR, RunStore
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.label_trie import LabelTrie
from llkd_ray.teacher.labels import TicketLabels, read_all
from llkd_ray.teacher.prompt import build_prompt, encode_prompts

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import memory_of_a_run
import report_runs
import toys

LEASE_ROWS = 128
Work = Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """Something whose cost grows with a size: ``prepare`` makes what is measured, in an empty folder."""

    name: str
    prepare: Callable[[int, Path], Work]
    sizes: Sequence[float]
    seconds: Callable[[Work], float]


def here(work: Work) -> float:
    """Processor seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def everywhere(work: Work) -> float:
    """Of this process and its descendants."""

    def spent() -> float:
        total = 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                total += sum(process.cpu_times()[:4])  # with those of children that have ended
            except psutil.Error:
                continue
        return total

    began = spent()
    work()
    return spent() - began


# --- rows ----------------------------------------------------------------------------------------


def ingestion(n: int, folder: Path) -> Work:
    memory_of_a_run.make(str(folder), n, "parquet")
    config = memory_of_a_run.make_config(folder, "parquet", 1_000, LEASE_ROWS)
    return lambda: ingest(config, RunStore(str(folder / "run")), lambda said: None)


def labelled_table(n: int, classes: int) -> ScoreTable:
    """All rows labelled and scored."""
    rng = np.random.default_rng(0)
    table = ScoreTable(classes, n, 0)
    row_N = np.arange(n)
    table.lease(0, row_N)
    table.put_labels(row_N, rng.integers(0, classes, n), rng.uniform(0.3, 1, n), np.zeros(n, dtype=np.int64))
    part = max(1, 2**24 // classes)
    for start in range(0, n, part):
        p_MC = rng.gamma(0.3, size=(min(part, n - start), classes)).astype(np.float32) + 1e-9
        row_M = row_N[start : start + part]
        scores = StudentScores.of(p_MC / p_MC.sum(axis=1, keepdims=True), table.label[row_M])
        table.refresh(1, row_M, scores)
    return table


def choice(n: int, classes: int) -> Work:
    table, rng = labelled_table(n, classes), np.random.default_rng(0)
    trained_C = np.zeros(classes, dtype=np.int64)
    return lambda: SELECTION["llkd_sample"].choose(table.candidate_chunks(1), 1_000, rng, trained_C=trained_C)


# --- labels and rounds ---------------------------------------------------------------------------


def selector_of(labels: int, rounds: int, folder: Path) -> Selector:
    """On a run whose texts are numbers alone: in a round nobody reads them."""
    store = RunStore(str(folder))
    index = {"pool": [{"file": "none.parquet", "rows": labels}], "test": []}
    store.write_json(EXAMPLES_INDEX, index)
    return Selector(run_config(labels, rounds), store.root)


def run_config(labels: int, rounds: int) -> Config:
    return toys.make_config(
        teacher={"ticket_size": LEASE_ROWS},
        test=None,
        budget={"labels": labels, "rounds": rounds, "train": max(rounds, labels // 10)},
        evaluation={"holdout": 0},
        selection={"policy": "random"},
    )


def said(row_M: np.ndarray) -> TicketLabels:
    usage = {"teacher": Usage(texts=len(row_M), requests=len(row_M), prompt_tokens=40 * len(row_M))}
    p_MC = np.tile(np.array([0.2, 0.7, 0.1], dtype=np.float32), (len(row_M), 1))
    return TicketLabels(row_M, p_MC, np.zeros(len(row_M), dtype=np.int64), usage, 0)


async def teach(selector: Selector) -> None:
    """Every ticket of a run, a round at a time, while driver and student wait as they do in a run."""
    schedule, taught = selector.schedule, 0
    for k in range(schedule.rounds):
        waiting = [asyncio.create_task(selector.wait_labels(k)) for _ in range(2)]
        for ticket in range(taught, schedule.tickets_before(k)):
            await asyncio.sleep(0)
            _, row_M = await selector.lease(ticket)
            await selector.put_labels(ticket, said(row_M))
        taught = schedule.tickets_before(k)
        await asyncio.gather(*waiting)
        selector.state.selected[k] = {}
        selector.state.trained[k] = {}


def teaching(labels: int, rounds: int, folder: Path) -> Work:
    selector = selector_of(labels, rounds, folder)
    return lambda: asyncio.run(teach(selector))


def restart(labels: int, folder: Path) -> Work:
    """Label files as a selector reads them that begins anew."""
    store = RunStore(str(folder))
    for ticket, first in enumerate(range(0, labels, LEASE_ROWS)):
        row_M = np.arange(first, min(first + LEASE_ROWS, labels))
        toys.put_label_file(store, ticket, row_M, said(row_M).probs_MC)
    return lambda: sum(1 for _ in read_all(store, LABELS_DIR, 3, lambda ticket, line: None))


def metrics(rounds: int, folder: Path) -> Work:
    line = report_runs.make_run(folder / "one", rounds=1).read_metrics()[0]
    store = RunStore(str(folder))

    def work() -> None:
        for k in range(rounds):
            store.append_metrics(line | {"round": k})

    return work


def report(rounds: int, names: Sequence[str], folder: Path) -> Work:
    store = report_runs.make_run(folder, rounds=rounds, labels=names[:10])
    config = yaml.safe_load(store.read_bytes(CONFIG))
    config["labels"]["names"] = list(names)  # most are never selected, but all stand in the report
    store.write_bytes(CONFIG, yaml.safe_dump(config).encode())
    for k in range(rounds):
        report_runs.write_selection(store, k, names, np.random.default_rng(k))
    return lambda: write_report(store)


# --- classes -------------------------------------------------------------------------------------


def class_names(n: int) -> list[str]:
    """Like those of a taxonomy: of two words, with prefixes in common."""
    return [f"topic{i % max(1, math.isqrt(n))} part{i // max(1, math.isqrt(n))}" for i in range(n)]


def trie(classes: int, folder: Path) -> Work:
    """Build it and share out one text's answers over everything in it."""
    tokens: dict[str, int] = {}
    sequences = [
        [tokens.setdefault(word, len(tokens)) for word in name.split()] for name in class_names(classes)
    ]

    async def ask(after: tuple[int, ...], wanted: tuple[int, ...]) -> list[float]:
        return [0.9 / classes] * len(wanted)

    def work() -> None:
        for _ in range(20):
            asyncio.run(LabelTrie.of(sequences).mass(ask, 0.0))

    return work


def prompt(classes: int, folder: Path) -> Work:
    labels = LabelsConfig(names=tuple(class_names(classes)))
    return lambda: [build_prompt(PromptConfig(answer="names"), labels, None).hash for _ in range(20)]


def figures(classes: int, folder: Path) -> Work:
    """A student's on 2,000 test texts, with intervals."""
    rng = np.random.default_rng(0)
    gold_N = rng.integers(0, classes, 2_000)
    p_NC = rng.dirichlet(np.full(classes, 0.3), 2_000) + 0.5 * np.eye(classes)[gold_N]

    def work() -> None:
        classification(gold_N, p_NC, classes)
        macro_f1_interval(gold_N, p_NC.argmax(axis=1), rng)

    return work


# --- length --------------------------------------------------------------------------------------


def long_text(words: int) -> str:
    rng = np.random.default_rng(0)
    return " ".join(rng.choice(memory_of_a_run.WORDS, words))


def cleaning(words: int, folder: Path) -> Work:
    texts = [f"\x07{long_text(words)} naïve {i}" for i in range(100)]
    return lambda: [text_hash(str(clean_text(text, 10**9))) for text in texts]


def cut_prompt(words: int, folder: Path) -> Work:
    """Texts that are too long for a teacher, cut in the middle."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toys.save_tiny_llm(folder))
    made = build_prompt(PromptConfig(), LabelsConfig(names=toys.NAMES[:3]), tokenizer)
    texts = [f"{long_text(words)} {i}" for i in range(5)]
    return lambda: encode_prompts(made, texts, tokenizer, 512, "middle")


def student_tokens(words: int, folder: Path) -> Work:
    """Texts as a student takes them, cut at 128 tokens."""
    import torch
    from transformers import AutoTokenizer

    from llkd_ray.student.model import Student

    tokenizer = AutoTokenizer.from_pretrained(toys.save_tiny_encoder(folder))
    student = Student(torch.nn.Identity(), tokenizer, torch.device("cpu"), False)
    texts = [f"{long_text(words)} {i}" for i in range(100)]
    return lambda: student.encode(texts, 128)


PARTS = [
    Part("ingestion, by rows", ingestion, [1e4, 1e5, 1e6], everywhere),
    Part("a round's choice, by rows", lambda n, folder: choice(n, 16), [1e4, 1e5, 1e6, 1e7], here),
    Part("leases and labels, by labels", lambda n, folder: teaching(n, 4, folder), [1e4, 1e5, 1e6], here),
    Part("label files read again, by labels", restart, [1e4, 1e5, 4e5], here),
    Part(
        "leases and labels, by rounds", lambda n, folder: teaching(128_000, n, folder), [10, 100, 1e3], here
    ),
    Part("lines of metrics, by rounds", metrics, [10, 100, 1e3], here),
    Part("report, by rounds", lambda n, folder: report(n, report_runs.LABELS, folder), [10, 100, 1e3], here),
    Part(
        "a round's choice of 1e5, by classes", lambda n, folder: choice(100_000, n), [2, 10, 100, 1e3], here
    ),
    Part("label trie, by classes", trie, [2, 10, 100, 1e3], here),
    Part("prompt, by classes", prompt, [2, 10, 100, 1e3], here),
    Part("figures of a round, by classes", figures, [2, 10, 100, 1e3], here),
    Part("report, by classes", lambda n, folder: report(3, class_names(n), folder), [2, 10, 100, 1e3], here),
    Part("cleaning, by words a text", cleaning, [10, 100, 1e3, 1e4], here),
    Part("prompts cut to length, by words a text", cut_prompt, [1e3, 1e4, 1e5], here),
    Part("student's tokens, by words a text", student_tokens, [10, 100, 1e3, 1e4], here),
]


def exponents(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Of size: fitted to all by least squares in logarithms, and between the last two."""
    x, y = np.log(sizes), np.log(costs)
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def measure(part: Part, sizes: Sequence[float], repeats: int) -> str:
    found, peak = [], 0.0
    if part.seconds is everywhere:  # Ray starts its workers in the first one
        with tempfile.TemporaryDirectory(prefix="llkd-") as folder:
            part.prepare(int(sizes[0]), Path(folder))()
    for size in sizes:
        costs = []
        for number in range(repeats):
            with tempfile.TemporaryDirectory(prefix="llkd-") as folder:
                work = part.prepare(int(size), Path(folder))
                costs.append(part.seconds(work))
                if number == 0 and size == sizes[-1] and part.seconds is here:
                    peak = peak_mib(part.prepare(int(size), Path(folder, "again")))
        found.append(max(min(costs), 1e-4))
    times = " | ".join(f"{size:.0e}: {cost:.3g} s" for size, cost in zip(sizes, found, strict=True))
    fitted, last = exponents(sizes, found)
    return f"| {part.name} | {times} | {fitted:.2f} | {last:.2f} | {peak:,.0f} MiB |"


def peak_mib(work: Work) -> float:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="parts with this in their names")
    parser.add_argument("--sizes", type=float, nargs="+", default=None, help="instead of each part's own")
    parser.add_argument("--repeats", type=int, default=2, help="the least seconds count")
    options = parser.parse_args()
    wanted = [part for part in PARTS if options.only in part.name]
    if any(part.seconds is everywhere for part in wanted):
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
    print("| part | cost | exponent | the largest two | most memory |\n|---|---|---|---|---|")
    for part in wanted:
        print(measure(part, options.sizes or part.sizes, options.repeats), flush=True)


if __name__ == "__main__":
    main()
