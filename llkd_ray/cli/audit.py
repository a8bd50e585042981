"""``llkd audit export`` and ``llkd audit import``: people check a run's labels."""

from __future__ import annotations

import argparse

from llkd_ray.audit.files import SCORE_SAMPLE, SampleSizes
from llkd_ray.config.base import absolute
from llkd_ray.display import Display


def add_audit(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="what", metavar="export|import", required=True)
    out = parts.add_parser("export", help="write the rows that a person should check")
    out.add_argument("run_dir", metavar="RUN", help="a run directory")
    out.add_argument("--out", required=True, metavar="FILE", help=".csv, .jsonl, or .json for Label Studio")
    sizes = SampleSizes()
    for name, text in (
        ("random", "texts in the random sample, including those with an answer"),
        ("disagree", "texts where teacher and student are sure of different labels"),
        ("unsure", "texts where the student's best labels are closest"),
    ):
        default = getattr(sizes, name)
        out.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=f"{text} ({default})")
    out.add_argument(
        "--blind", action="store_true", help="leave out the models' answers, which may bias people"
    )
    out.add_argument(
        "--score-sample",
        type=_count,
        default=SCORE_SAMPLE,
        metavar="N",
        help=f"texts that the student scores ({SCORE_SAMPLE:,})",
    )
    back = parts.add_parser("import", help="take the answers into the run")
    back.add_argument("run_dir", metavar="RUN", help="the same run directory")
    back.add_argument("rows", metavar="FILE", help="the file, with the column 'label' filled in")
    back.add_argument("--replace", action="store_true", help="new answers replace older ones that differ")


def run_audit(options: argparse.Namespace, display: Display) -> None:
    from llkd_ray.audit.job import export, import_answers

    if options.what == "import":
        import_answers(options.run_dir, absolute(options.rows), replace=options.replace, say=display.say)
        return
    sizes = SampleSizes(options.random, options.disagree, options.unsure)
    export(
        options.run_dir,
        absolute(options.out),
        sizes,
        blind=options.blind,
        score_sample=options.score_sample,
        say=display.say,
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number
