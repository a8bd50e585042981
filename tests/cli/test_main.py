"""The program as a whole: its subcommands, what it imports, its messages and exit statuses."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from llkd_ray.cli.main import COMMANDS, main, program_parser, run
from llkd_ray.config.base import ConfigError
from llkd_ray.display import Display, printable
from llkd_ray.teacher.base import TeacherDown

HEAVY = {"numpy", "pydantic", "pyarrow", "ray", "torch", "transformers", "yaml"}


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"quiet": False, "verbose": False, "log_file": None} | changes)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_arguments_and_a_function(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: llkd {name}" in said
    assert "--log-file" in said


def test_help_and_version_load_nothing(capsys):
    """So that they are there at once; the command line is parsed before anything else is imported."""
    code = (
        "import sys\nfrom llkd_ray.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    for flag, said in (("--help", "compare"), ("--version", "llkd-ray 0.")):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["distil"])
    assert stopped.value.code == 2
    assert "distil" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("budget.train: too many"), 2, "error: budget.train: too many"),
        (TeacherDown("no engine is left"), 3, "error: no engine is left"),
        (KeyboardInterrupt(), 130, "stopped"),
        (PermissionError(13, "Permission denied", "/runs/a"), 1, "error: Permission denied: /runs/a"),
        (ConfigError("'\x1b]0;a\x07\udce9'"), 2, r"error: '\x1b]0;a\x07\udce9'"),
        (ZeroDivisionError("1 / 0 \x1b[2J\udce9"), 1, "error: unexpected ZeroDivisionError"),
    ],
)
def test_an_error_is_one_line_with_the_command_that_continues(error, status, said, capsys):
    def command(options: argparse.Namespace, display: Display) -> None:
        display.resume_with = "llkd resume '/runs/my run'"
        raise error

    assert run(options(), command) == status
    shown = capsys.readouterr().err
    assert shown == printable(shown)
    lines = shown.splitlines()
    assert lines[-1] == f"{said}; what is done is kept, continue with: llkd resume '/runs/my run'"
    is_bug = isinstance(error, ZeroDivisionError)
    assert ("Traceback (most recent call last):" in lines) == is_bug
    assert is_bug or len(lines) == 1


def test_quiet_prints_results_and_warnings_and_a_log_file_has_all(tmp_path, capsys):
    def command(options: argparse.Namespace, display: Display) -> int:
        display.say("round 0 is done")
        display.warn("the teacher always says no")
        display.result("model: there")
        return 5

    log = tmp_path / "all.log"
    assert run(options(quiet=True, log_file=str(log)), command) == 5
    assert capsys.readouterr().out.splitlines() == ["warning: the teacher always says no", "model: there"]
    for line in ("round 0 is done", "warning: the teacher always says no", "model: there"):
        assert line in log.read_text()
    assert run(options(log_file=str(tmp_path / "nowhere/all.log")), command) == 2


def test_only_the_chosen_command_is_imported():
    """A parser without a command in its line knows the names of all."""
    parser = program_parser([])
    assert all(name in parser.format_help() for name in COMMANDS)


def test_help_and_mistakes_load_neither_torch_nor_ray():
    """They took ten seconds once."""
    modules = sorted({f"llkd_ray.cli.{module}" for module, _ in COMMANDS.values()})
    code = (
        f"import sys, {', '.join(modules)}\n"
        "print(*sys.modules.keys() & {'torch', 'ray', 'transformers', 'vllm', 'matplotlib', 'datasets'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
