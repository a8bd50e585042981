"""The command line of jobs/export.py: flags to one call; mistakes in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llkd_ray.config import ConfigError
from llkd_ray.console import Display
from llkd_ray.ending import status_of
from llkd_ray.exporting import export_model
from llkd_ray.runs import absolute_folder


def export_main(arguments: Sequence[str] | None = None) -> int:
    """Export what the command line asks for; returns the exit status."""
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

    return status_of(work)


def export_parser() -> argparse.ArgumentParser:
    """What jobs/export.py takes."""
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
