"""Draw docs/learning_curve.svg, the picture of the README, from benchmarks/results/pubmed_rct.csv.

    python benchmarks/readme_curve.py

Macro-F1 against texts trained on, mean over the five teachers, which share the texts and the seed.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from llkd_ray.report.figures import plain

RESULTS = Path(__file__).parent / "results/pubmed_rct.csv"
PICTURE = Path(__file__).parent.parent / "docs/learning_curve.svg"
TEACHERS_THEMSELVES = 0.522
"""Mean macro-F1 of the five teachers on the test texts; docs/BENCHMARKS.md has each."""
STYLES = {"llkd_sample": ("#0b6fa4", "o"), "random": ("#777777", "s")}


def main() -> None:
    results = pd.read_csv(RESULTS)
    gold = results.loc[results["line"] == "gold", "macro_f1"].iloc[0]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    for line, (colour, marker) in STYLES.items():
        of_line = results[results["line"] == line]
        cells = of_line.groupby("trained")["macro_f1"]
        means = cells.mean()[cells.count() == 5]  # sizes that all five teachers have
        axes.plot(means.index, means, color=colour, marker=marker, label=line)
    axes.axhline(gold, color="black", linestyle=":", label="gold labels, all texts")
    axes.axhline(TEACHERS_THEMSELVES, color="black", linestyle="--", label="the teachers themselves")
    axes.set_xlabel("texts trained on, of 7,984")
    axes.set_ylabel("macro-F1, mean of five teachers")
    axes.set_ylim(0.3, 0.8)
    axes.legend(frameon=False, fontsize=9, loc="center right")
    figure.savefig(PICTURE, metadata={"Date": None}, transparent=False)


if __name__ == "__main__":
    main()
