"""All that speed is measured by, one after the other: what `make bench` runs.

    python benchmarks/suite.py [--pairs 5] [--only teacher student]
    python benchmarks/suite.py --quick      # small sizes, one pair each: does everything run?

Each part is a script of its own, which says what is measured and against what; here they get the sizes that
docs/BENCHMARKS.md was made with. On two cores the whole takes some four hours; nothing else should run then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """A command, with sizes for the figures and sizes for a look."""

    name: str
    script: str
    full: str
    quick: str
    in_pairs: bool = True


PARTS = (
    Part("teacher", "teacher_speed.py steady", "", "--prompts 300"),
    Part("teacher", "teacher_speed.py one_process", "", "--prompts 300"),
    Part("teacher", "teacher_speed.py rounds --theirs map_batches", "", "--prompts 300"),
    Part("teacher", "teacher_speed.py rounds --theirs ray_llm", "", "--prompts 300"),
    Part("teacher", "teacher_speed.py forward", "", "--prompts 300"),
    Part("teacher", "teacher_speed.py start", "", "--prompts 300"),
    Part("student", "train_speed.py", "", "--texts 32 --precisions float32"),
    Part("predict", "predict_speed.py", "--texts 1000 --job-texts 4000", "--texts 50 --job-texts 0"),
    Part("rounds", "round_overhead.py", "", "--rounds 3"),
    Part("rounds", "overlap.py", "--runs 3", "--runs 1 --seconds-per-text 0.1", in_pairs=False),
    Part(
        "table",
        "score_table.py",
        "--rows 10_000_000 100_000_000 --repeats 5",
        "--rows 1_000_000 --repeats 1",
        in_pairs=False,
    ),
    Part("growth", "growth.py", "", "--sizes 1e3 1e4 --repeats 1", in_pairs=False),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=sorted({part.name for part in PARTS}))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    failed = []
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        pairs = ["--pairs", str(1 if options.quick else options.pairs)] if part.in_pairs else []
        words = [*part.script.split(), *(part.quick if options.quick else part.full).split(), *pairs]
        print(f"\n## {' '.join(words)}\n", flush=True)
        began = time.monotonic()
        if subprocess.run([sys.executable, HERE / words[0], *words[1:]]).returncode:
            failed.append(part.script)
        print(f"({time.monotonic() - began:.0f} s)", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
