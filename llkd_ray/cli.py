"""Command-line interfaces of jobs/*.py: parse flags, make one call, print a user's mistake in one line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llkd_ray.api import compare, predict
from llkd_ray.audit.job import SCORE_SAMPLE, SampleSizes, export, import_answers
from llkd_ray.comparison.settings import load_comparison
from llkd_ray.config.base import ConfigError, absolute, absolute_folder, local_dir
from llkd_ray.config.loading import resolve
from llkd_ray.config.schema import Config
from llkd_ray.display import TEACHER_DOWN, Display, run_program
from llkd_ray.export import export_model
from llkd_ray.prediction.config import in_flags, predict_parser, settings_of
from llkd_ray.report.pages import write_pages
from llkd_ray.run.loop import Outcome, resume, start_run
from llkd_ray.run.plan import plan
from llkd_ray.storage.run_dir import MODEL_DIR, REPORT, RunStore, join_uri
from llkd_ray.teacher.base import TeacherDown


def distill_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of jobs/distill.py; returns the exit status."""
    options = distill_parser().parse_args(arguments)
    try:
        return run_program(partial(_dispatch, options))
    except TeacherDown as error:
        print(f"error: {error}; what is labelled is kept: resume with --resume RUN_DIR", file=sys.stderr)
        return TEACHER_DOWN


def distill_parser() -> argparse.ArgumentParser:
    """The argument parser of jobs/distill.py."""
    parser = argparse.ArgumentParser(
        prog="distill.py",
        description="Distil an LLM into a small text classifier. Without a config: the quickstart.",
    )
    parser.add_argument("config", nargs="?", help="a YAML file; see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--resume", metavar="RUN_DIR", help="resume a run that was stopped")
    return parser


def _dispatch(options: argparse.Namespace, display: Display) -> None:
    if options.resume:
        if options.config:
            raise ConfigError("--resume uses the run's own config: leave out CONFIG")
        _finish([resume(options.resume, display, options.set)], display)
    elif options.config:
        config = resolve(Config, options.config, options.set)
        if options.dry_run:
            plan(config, display)
        else:
            _finish([start_run(config, display)], display)
    else:
        # Imported here because it loads torch, which takes seconds and is needed only by the quickstart.
        from llkd_ray.quickstart.teacher import prepare

        settings = prepare(Path(local_dir("runs")) / "quickstart-data", say=display.say)
        config = resolve(Config, settings, options.set)
        if options.dry_run:
            plan(config, display)
        else:
            _finish(quickstart(config, display), display)


def quickstart(config: Config, display: Display) -> list[Outcome]:
    """Run the configured policy, then ``random`` on the same labels with the same budget."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [f"quickstart-{stamp}-{policy}" for policy in (config.selection.policy, "random")]
    first = start_run(resolve(Config, config, {"run.name": names[0]}), display)
    display.say("once more with the policy 'random', on the labels that are there")
    baseline = resolve(Config, config, {"run.name": names[1], "selection.policy": "random"})
    second = start_run(baseline, display)
    write_pages(RunStore(first.run_dir), RunStore(second.run_dir))
    return [first, second]


def _finish(outcomes: Sequence[Outcome], display: Display) -> None:
    """Print a short table and the paths of the results."""
    header = ("", "accuracy", "macro-F1", "agrees", "labelled", "trained on", "teacher tokens", "seconds")
    first = outcomes[0].summary
    rows = []
    if first["teacher"]:
        rows.append(
            [
                "teacher",
                *_figures(first["teacher"]),
                str(first["labelled"]),
                "",
                str(first["teacher_tokens"]),
                "",
            ]
        )
    for outcome in outcomes:
        summary = outcome.summary
        counts = [str(summary[key]) for key in ("labelled", "trained", "teacher_tokens")]
        name = f"student by {outcome.config.selection.policy}"
        rows.append([name, *_figures(summary["student"]), *counts, f"{summary['seconds']:.0f}"])
    display.table("Result", header, rows)
    for outcome in outcomes:
        reused = [one for one in outcome.summary["usage"].values() if one["reused_texts"]]
        for one in reused:
            display.say(
                f"{outcome.config.selection.policy}: {one['reused_texts']} of its labels were there from "
                f"earlier runs, which saved {one['reused_tokens']} teacher tokens"
            )
        if outcome.summary["student"]["accuracy"] is None:
            display.say("accuracy is unknown without a test set (test.uri, test.gold)")
        display.console.print(
            f"report: {join_uri(outcome.run_dir, REPORT)}\nmodel:  {join_uri(outcome.run_dir, MODEL_DIR)}"
        )


def _figures(scores: dict[str, Any]) -> list[str]:
    values = (scores.get(key) for key in ("accuracy", "macro_f1", "teacher_agreement"))
    return ["–" if value is None else f"{value:.3f}" for value in values]


def audit_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of jobs/audit.py; returns the exit status."""
    options = audit_parser().parse_args(arguments)

    def work(display: Display) -> None:
        if options.what == "export":
            wanted = SampleSizes(options.random, options.disagree, options.unsure)
            export(
                options.run,
                absolute(options.out),
                wanted,
                blind=options.blind,
                score_sample=options.score_sample,
                say=display.say,
            )
        else:
            import_answers(options.run, absolute(options.rows), replace=options.replace, say=display.say)

    return run_program(work)


def audit_parser() -> argparse.ArgumentParser:
    """The argument parser of jobs/audit.py."""
    parser = argparse.ArgumentParser(
        prog="audit.py", description="Let people look at a run's labels, and bring back what they say."
    )
    parts = parser.add_subparsers(dest="what", required=True)
    out = parts.add_parser("export", help="write the rows that a person should look at")
    out.add_argument("run", metavar="RUN", help="a run directory")
    out.add_argument("--out", required=True, metavar="FILE", help=".csv, .jsonl, or .json for Label Studio")
    wanted = SampleSizes()
    for name, words in (
        ("random", "texts in the random sample, with those that are answered"),
        ("disagree", "texts where teacher and student are sure of different labels"),
        ("unsure", "texts where the student's best labels are closest"),
    ):
        number = getattr(wanted, name)
        out.add_argument(f"--{name}", type=_number, default=number, metavar="N", help=f"{words} ({number})")
    out.add_argument("--blind", action="store_true", help="without the models' answers, which may sway")
    out.add_argument(
        "--score-sample",
        type=_number,
        default=SCORE_SAMPLE,
        metavar="N",
        help=f"texts the student scores ({SCORE_SAMPLE:,})",
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


FAILED, STOPPED = 1, 130


def compare_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of jobs/compare.py; returns the exit status."""
    options = compare_parser().parse_args(arguments)
    try:
        return run_program(partial(_compare, options))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return STOPPED


def _compare(options: argparse.Namespace, display: Display) -> int:
    result = compare(
        load_comparison(options.config, options.set),
        options.out or f"runs/{Path(options.config).stem.replace('_', '-')}",
        only=options.only,
        add=options.add,
        report_only=options.report_only,
        display=display,
    )
    return FAILED if result.errors else 0


def compare_parser() -> argparse.ArgumentParser:
    """The argument parser of jobs/compare.py."""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Set policies, or any other change of settings, against each other on the same labels. "
        "Stopped or killed, the same command goes on; what is finished is not done again.",
    )
    parser.add_argument("config", help="a comparison's YAML file; see configs/compare_*.yaml")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for results; on a cluster one that all nodes share, such as NFS "
        "(default: runs/ and the config file's name)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A=B", help="override one setting: sizes=[0.04,0.1]"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="train only for these teachers, lines and seeds; the report has whatever is finished",
    )
    parser.add_argument(
        "--add",
        nargs="+",
        action="extend",
        default=[],
        metavar="CSV",
        help="results.csv of the same comparison from elsewhere: the report has them, too, where there is no "
        "trial of its own",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing, write the report anew")
    return parser


def export_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of jobs/export.py; returns the exit status."""
    options = export_parser().parse_args(arguments)

    def work(display: Display) -> None:
        if options.private and options.push_to_hub is None:
            raise ConfigError("--private: is of --push-to-hub, which is not given: add it, or leave it out")
        done = export_model(
            absolute_folder(options.model),
            onnx=options.onnx,
            push_to_hub=options.push_to_hub,
            private=options.private,
            say=display.say,
        )
        display.console.print(f"model: {done.model}")

    return run_program(work)


def export_parser() -> argparse.ArgumentParser:
    """The argument parser of jobs/export.py."""
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Make a run's model ready to be taken elsewhere: calibrate it by the gold there is by "
        "now, write its card, and, where asked, an ONNX file, and put it on the hub.",
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a finished run, or a checkpoint folder")
    parser.add_argument("--onnx", action="store_true", help="write onnx/model.onnx, checked against torch")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder as this model")
    parser.add_argument("--private", action="store_true", help="of --push-to-hub: for you alone")
    return parser


def predict_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of jobs/predict.py; returns the exit status."""
    options = predict_parser().parse_args(arguments)

    def work(display: Display) -> None:
        done = predict(settings_of(options), display=display)
        display.console.print(f"predictions: {done.predictions}")

    return run_program(work, in_flags)
