"""What a cascade of two teachers costs and gives, on recorded answers of real LLMs.

    python benchmarks/cascade.py [--data ../shared/data/pubmed_rct_llm.parquet]

For each pair, the large teacher reads the texts where the small one's confidence is below a threshold; the
rest keeps the small one's label. Prints a Markdown table: the share that the large one reads, and how right
the labels are, beside each teacher alone and beside as many texts drawn at random for the large one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import f1_score

from llkd_ray.metrics.uncertainty import Floats, Ints, confidence, normalise

PAIRS = (("mistral", "gemma"), ("llama", "gemma"), ("qwen", "yi"))
THRESHOLDS = (0.5, 0.6, 0.8, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/pubmed_rct_llm.parquet"))
    options = parser.parse_args()
    if not options.data.exists():
        sys.exit(f"{options.data} is not there: give the recorded answers by --data")
    table = pq.read_table(options.data)
    names = sorted(set(table["label"].to_pylist()))
    gold_N = np.array([names.index(label) for label in table["label"].to_pylist()])
    rng = np.random.default_rng(0)
    print("| small → large | asked of the large one | accuracy | macro-F1 | as many at random |")
    print("|---|---|---|---|---|")
    for small, large in PAIRS:
        p_small, p_large = (probabilities(table[f"{name}_probs"].to_pylist()) for name in (small, large))
        print(f"| {small} alone | 0 % | {figures(p_small.argmax(1), gold_N)} | |")
        for threshold in THRESHOLDS:
            doubtful_N = confidence(p_small) < threshold
            drawn_N = rng.permutation(doubtful_N)
            said, at_random = (
                np.where(asked_N, p_large.argmax(1), p_small.argmax(1)) for asked_N in (doubtful_N, drawn_N)
            )
            share = f"{doubtful_N.mean():.0%} (under {threshold})"
            chance = figures(at_random, gold_N).replace(" | ", " / ")
            print(f"| {small} → {large} | {share} | {figures(said, gold_N)} | {chance} |")
        print(f"| {large} alone | 100 % | {figures(p_large.argmax(1), gold_N)} | |")


def probabilities(mass: list[list[float]]) -> Floats:
    return normalise(np.array(mass))


def figures(label_N: Ints, gold_N: Ints) -> str:
    return f"{np.mean(label_N == gold_N):.3f} | {f1_score(gold_N, label_N, average='macro'):.3f}"


if __name__ == "__main__":
    main()
