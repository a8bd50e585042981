"""What losses and in-step thresholds are worth: the same texts, learned in several ways.

For each teacher of a comparison, a share of the pool is selected once, by the default policy as before its
first round (without a student, so that nothing but the learning differs), and a student is trained on it in
each way.

    python benchmarks/learn_variants.py configs/compare_pubmed_rct.yaml --only gemma llama --seeds 0
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from llkd_ray.cluster import connect
from llkd_ray.comparison.settings import changed, load_comparison, teacher_config
from llkd_ray.comparison.trial import Trial, read_teacher, read_texts, run_trial
from llkd_ray.config.base import with_absolute_paths
from llkd_ray.config.loading import load_config
from llkd_ray.corpus.ingest import ingest
from llkd_ray.display import Display
from llkd_ray.storage.run_dir import RunStore

WAYS: dict[str, dict[str, str]] = {
    "cross-entropy": {},
    "soft": {"loss": "soft"},
    "in-step mask": {"step_thresholds": "mask"},
    "in-step weight": {"step_thresholds": "weight"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Learn the same texts in several ways.")
    parser.add_argument("comparison", help="a YAML file as of jobs/compare.py")
    parser.add_argument("--only", nargs="+", metavar="TEACHER", help="these teachers (default: all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--share", type=float, default=0.1, help="of the pool")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args(arguments)
    comparison = load_comparison(options.comparison)
    base = with_absolute_paths(load_config(comparison.base))
    torch.set_num_threads(1)
    with Display() as display, tempfile.TemporaryDirectory() as folder:
        with connect(base.run.address):
            examples = ingest(base, RunStore(folder), display.say)
        texts = read_texts(examples, base.labels.names)
        size = round(options.share * examples.n_pool)
        for teacher in options.only or comparison.teachers:
            config = teacher_config(base, comparison.teachers[teacher])
            labels, _ = read_teacher(config, examples)
            for way in options.ways:
                for seed in options.seeds:
                    trial = Trial(
                        changed(base, {"student": WAYS[way]}, seed), (size,), (size,), Path(folder) / "trials"
                    )
                    (facts,) = run_trial(trial, texts, labels)
                    masked = f", {facts['masked']:.0%} of the texts masked" if "masked" in facts else ""
                    display.say(
                        f"{teacher}, {way}, seed {seed}, {size} texts: "
                        f"{facts['accuracy']:.3f} / {facts['macro_f1']:.3f}{masked}"
                    )


if __name__ == "__main__":
    main()
