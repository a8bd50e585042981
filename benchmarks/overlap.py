"""How much of a run's time teacher and student share: the whole against the longer of the two.

    python benchmarks/overlap.py --seconds-per-text 0.7 [--rounds 6] [--growth 2] [--runs 3]

The teacher is a model server on loopback that takes its time for a text and no processor, as one on another
machine; the student is MiniLM, on the cores of this one. What each took is read off the same run: of the
teacher, the time in which any request was under way; of the student, what its rounds say of selecting,
training, scoring and evaluating. Counted from the first request to the last round's line, and from the call
to its return, which adds the start and what a run writes at its end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import ray

from llkd_ray.config.loading import parse_config
from llkd_ray.display import Display
from llkd_ray.evaluation.run_record import phase_seconds
from llkd_ray.run.loop import distill
from llkd_ray.storage.run_dir import RunStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/cluster"))
import toys
from chaos import CountingTeacher

POOL, TEST, TRAIN, CONCURRENCY = 750, 100, 240, 4
OF_STUDENT = ("select", "train", "refresh", "evaluate")


class Clock(Display):
    """Notes when the last line of a round came."""

    last = 0.0

    def say(self, line: str) -> None:
        if line.startswith("round "):
            self.last = time.monotonic()


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are covered by at least one span."""
    covered, until = 0.0, 0.0
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def measure(
    folder: Path, seconds_per_text: float, n_rounds: int, growth: float, seed: int
) -> dict[str, float]:
    """Seconds of one run and of its parts."""
    with CountingTeacher(seconds_per_text) as server:
        tree = toys.config_tree(
            corpus={"uri": str(folder / "pool.parquet")},
            test={"uri": str(folder / "test.parquet")},
            teacher={
                "kind": "openai",
                "model": "toy",
                "recorded": None,
                "server": {"base_url": server.base_url, "tokenizer": None, "concurrency": CONCURRENCY},
                "prompt": {"answer": "letters"},
                "cache": None,
                "ticket_size": 16,
            },
            student={"model": "minilm", "workers": 1, "threads": 1, "epochs": 3},
            budget={"labels": POOL, "train": TRAIN, "rounds": n_rounds, "growth": growth},
        )
        tree["run"] = (tree.get("run") or {}) | {"seed": seed}
        store, clock = RunStore(tempfile.mkdtemp(dir=folder)), Clock()
        began = time.monotonic()
        distill(parse_config(tree), store.root, clock)
        called = time.monotonic() - began
        spans = [(one.at, one.at + seconds_per_text) for one in server.requests if one.body]
    rounds = [phase_seconds(line) for line in store.read_metrics()]
    student = [sum(line[phase] for phase in OF_STUDENT) for line in rounds]
    for name, seconds in (
        ("student", student),
        ("waits for labels", [line["teach"] for line in rounds]),
        ("neither", [line["idle"] for line in rounds]),
    ):
        print(f"seconds of each round, {name}:", *(f"{one:.1f}" for one in seconds), flush=True)
    return {
        "teacher": union(spans),
        "student": sum(student),
        "labelling and rounds": clock.last - min(begin for begin, _ in spans),
        "whole": called,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds-per-text", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--growth", type=float, default=2.0, help="1: as many new texts in every round")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llkd-") as place:
        folder = Path(place)
        toys.write_corpus(folder / "pool.parquet", POOL, seed=1)
        toys.write_corpus(folder / "test.parquet", TEST, seed=2)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=f"{place}/ray")
        how = folder, options.seconds_per_text, options.rounds, options.growth
        found = [measure(*how, seed) for seed in range(options.runs)]
        ray.shutdown()
    for name in ("labelling and rounds", "whole"):
        ratios = sorted(one[name] / max(one["teacher"], one["student"]) for one in found)
        print(f"{name}: {statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) of the longer one")
    medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
    print("median seconds: " + ", ".join(f"{key} {value:.1f}" for key, value in medians.items()))


if __name__ == "__main__":
    main()
