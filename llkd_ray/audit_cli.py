"""The command line of jobs/audit.py: flags to one call; mistakes in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llkd_ray.audit import Wanted
from llkd_ray.auditing import LOOK_AT, bring_back, export
from llkd_ray.console import Display
from llkd_ray.ending import status_of
from llkd_ray.runs import absolute


def audit_main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    options = audit_parser().parse_args(arguments)

    def work(display: Display) -> None:
        if options.what == "export":
            wanted = Wanted(options.random, options.disagree, options.unsure)
            export(
                options.run,
                absolute(options.out),
                wanted,
                blind=options.blind,
                look_at=options.look_at,
                say=display.say,
            )
        else:
            bring_back(options.run, absolute(options.rows), replace=options.replace, say=display.say)

    return status_of(work)


def audit_parser() -> argparse.ArgumentParser:
    """What jobs/audit.py takes."""
    parser = argparse.ArgumentParser(
        prog="audit.py", description="Let people look at a run's labels, and bring back what they say."
    )
    parts = parser.add_subparsers(dest="what", required=True)
    out = parts.add_parser("export", help="write the rows that a person should look at")
    out.add_argument("run", metavar="RUN", help="a run directory")
    out.add_argument("--out", required=True, metavar="FILE", help=".csv, .jsonl, or .json for Label Studio")
    wanted = Wanted()
    for name, words in (
        ("random", "texts in the random sample, with those that are answered"),
        ("disagree", "texts where teacher and student are sure of different labels"),
        ("unsure", "texts where the student's best labels are closest"),
    ):
        number = getattr(wanted, name)
        out.add_argument(f"--{name}", type=_number, default=number, metavar="N", help=f"{words} ({number})")
    out.add_argument("--blind", action="store_true", help="without the models' answers, which may sway")
    out.add_argument(
        "--look-at",
        type=_number,
        default=LOOK_AT,
        metavar="N",
        help=f"texts the student scores ({LOOK_AT:,})",
    )
    back = parts.add_parser("import", help="take the answers into the run")
    back.add_argument("run", metavar="RUN", help="the same run directory")
    back.add_argument("rows", metavar="ROWS", help="the file, with the column 'label' filled in")
    back.add_argument("--replace", action="store_true", help="new answers count where older ones differ")
    return parser


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number
