"""The program ``llkd``: parses the command line, runs one subcommand, and turns errors into exit statuses.

For each subcommand, its module has a function ``add_NAME(parser)`` that declares the arguments and a function
``run_NAME(options, display)`` that does the work and returns an exit status (None: 0). The module is imported
only for its own subcommand, because most of them load torch or Ray, which takes seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata

from llkd_ray.display import Display, printable

COMMANDS = {
    "quickstart": ("train", "distil a tiny teacher into a small student, from nothing, on this machine"),
    "init": ("init", "look at a file and write a config for it"),
    "check": ("check", "check the set-up, and what a config names, before a run"),
    "train": ("train", "distil a teacher into a student"),
    "resume": ("train", "resume a run that was stopped, or add rounds to a finished one"),
    "status": ("runs", "say how far a run is"),
    "runs": ("runs", "list the runs in a folder"),
    "report": ("runs", "write a run's report again, from its files"),
    "predict": ("model", "label a corpus with a model"),
    "evaluate": ("model", "measure a model on texts with known labels"),
    "export": ("model", "make a model ready for use elsewhere: model card, ONNX, hub"),
    "audit": ("audit", "let people check labels, and take in their answers"),
    "compare": ("compare", "compare policies or other settings on the same labels"),
}
"""By name of the subcommand: its module in this folder, and its help."""
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}
"""Environment of a run without ``--verbose``."""
FAILED, USER_MISTAKE, TEACHER_FAILED, STOPPED = 1, 2, 3, 130
"""Exit statuses: an error that is not the user's; a mistake that the user can correct; a teacher that failed
permanently; stopped by Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process); returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = program_parser(given).parse_args(given)
    return run(options, options.run)


def program_parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; of the subcommands, only that named in ``given`` has its arguments."""
    parser = argparse.ArgumentParser(
        prog="llkd", description="Turn a large language model into a small text classifier of your own."
    )
    parser.add_argument("--version", action="version", version=f"llkd-ray {metadata.version('llkd-ray')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in given if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == chosen:
            room = import_module(f"llkd_ray.cli.{module}")
            getattr(room, f"add_{name}")(command)
            command.set_defaults(run=getattr(room, f"run_{name}"))
            add_output_options(command)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The option that overrides settings; may be repeated."""
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    how_much = output.add_mutually_exclusive_group()
    how_much.add_argument("--quiet", action="store_true", help="print results only, no progress")
    how_much.add_argument("--verbose", action="store_true", help="print what the workers print, too")
    output.add_argument("--log-file", metavar="FILE", help="append every line to this file, too")


def run(options: argparse.Namespace, command: Callable[[argparse.Namespace, Display], int | None]) -> int:
    """Run a subcommand with its parsed options; returns the exit status."""
    if options.verbose:
        os.environ["LLKD_VERBOSE"] = "1"
    else:  # bars of loading weights, and retries that succeed
        for name, level in QUIET.items():
            os.environ.setdefault(name, level)

    def say(line: str) -> None:
        print(printable(line), file=sys.stderr)

    try:
        display = Display(quiet=options.quiet, log_file=options.log_file)
    except OSError as error:
        say(f"error: --log-file: {error.strerror}: {options.log_file}")
        return USER_MISTAKE
    try:
        with display:
            return command(options, display) or 0
    except KeyboardInterrupt:
        say(f"stopped{_how_to_go_on(display)}")
        return STOPPED
    except Exception as error:
        status = _status_of(error)
        if status is None:  # a bug: its traceback is the report
            import traceback

            say(traceback.format_exc().rstrip("\n"))
            say(f"error: unexpected {type(error).__name__}{_how_to_go_on(display)}")
            return FAILED
        reason = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            reason = f"{error.strerror}: {error.filename}"
        say(f"error: {reason}{_how_to_go_on(display)}")
        return status


def _status_of(error: Exception) -> int | None:
    """The exit status of an expected error; None for any other."""
    from llkd_ray.config.base import ConfigError
    from llkd_ray.teacher.base import TeacherDown

    if isinstance(error, ConfigError):
        return USER_MISTAKE
    if isinstance(error, TeacherDown):
        return TEACHER_FAILED
    return FAILED if isinstance(error, OSError) else None


def _how_to_go_on(display: Display) -> str:
    return f"; what is done is kept, continue with: {display.resume_with}" if display.resume_with else ""
