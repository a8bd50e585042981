"""What is said stays, word for word; what goes on is not repeated too often."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from llkd_ray import display as console_module
from llkd_ray.display import LOG_EVERY_S, Display


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Stands in for the module time; ``now`` is what it says."""
    made = SimpleNamespace(now=1000.0, monotonic=lambda: made.now)
    monkeypatch.setattr(console_module, "time", made)
    return made


def display(terminal=False, width=60) -> Display:
    file = io.StringIO()
    return Display(Console(file=file, force_terminal=terminal, width=width, soft_wrap=True, highlight=False))


def shown(made: Display) -> str:
    return made.console.file.getvalue()


class TestLog:
    @pytest.mark.parametrize(
        "line", ["[bold]x[/bold] [/]", "a path [/runs/x]", ":warning: s3://b:eye:", "x" * 200]
    )
    def test_lines_carry_the_seconds_since_the_start_and_are_printed_as_they_are(self, clock, line):
        made = display()
        made.say(line)
        clock.now += 75.4
        made.say("done")
        assert shown(made) == f"[    0 s] {line}\n[   75 s] done\n"

    def test_updates_come_at_once_then_now_and_then_and_none_twice(self, clock):
        clock.now = 1.0  # a machine just started
        made = display()
        with made:
            for i in range(20):
                made.update(f"labelled {i}")
                clock.now += LOG_EVERY_S / 4
        lines = shown(made).splitlines()
        assert 4 <= len(lines) <= 5
        assert lines[0].endswith("labelled 0")
        for _ in range(5):
            clock.now += 10 * LOG_EVERY_S
            made.update("waiting")
        assert shown(made).count("waiting") == 1


class TestTerminal:
    @pytest.mark.parametrize("line", ["labelled 5 of 9", "sorted into [/x] and [b]"])
    def test_update_moves_and_say_stays_and_it_is_put_away_when_something_breaks(self, clock, line):
        made = display(terminal=True)

        def break_off() -> None:
            with made:
                made.update(line)
                made.say("round 0 is over")
                assert made._status._live.is_started
                raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            break_off()
        assert line in shown(made)
        assert "round 0 is over" in shown(made)
        assert not made._status._live.is_started


def test_table_shows_every_cell_as_it_is():
    made = display(width=80)
    made.table("Plan [x]", ["policy", "rows [n]"], [["llkd", "1,000"], ["[/b] random", "[red]5"]])
    lines = shown(made).splitlines()
    assert lines[0].strip() == "Plan [x]"
    assert any("policy" in line and "rows [n]" in line for line in lines)
    assert any("llkd" in line and "1,000" in line for line in lines)
    assert any("[/b] random" in line and "[red]5" in line for line in lines)
