"""What is said stays, word for word; what goes on is not repeated too often; what is untrusted is escaped."""

from __future__ import annotations

import io
import re
import unicodedata
from html import unescape
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from llkd_ray import display as console_module
from llkd_ray.display import LOG_EVERY_S, Display, escape_formula, markdown, printable, unescape_formula


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


# --- escapes

OBEYED = (
    "\x1b[31m \x1b]0;title\x07 \x1b]8;;http://evil\x1b\\ \x9b2J \b \r \x00 \x7f \u202e \u2066 \u2028 \udce9"
)
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_is_said_commands_the_terminal(tmp_path, terminal):
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    made = Display(
        Console(file=file, force_terminal=terminal, soft_wrap=True), log_file=str(tmp_path / "log")
    )
    with made:
        for say in (made.say, made.warn, made.result, made.update):
            say(OBEYED)
        made.update("", [(OBEYED, OBEYED)])
        made.table(OBEYED, [OBEYED], [[OBEYED]])
    file.flush()
    shown = file.buffer.getvalue().decode()
    assert shown.count(r"\x1b]0;title\x07") >= 6
    own = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", shown) if terminal else shown  # of rich: colours, cursor
    for line in (own, (tmp_path / "log").read_text(encoding="utf-8")):
        assert line == printable(line)


@given(ANY_TEXT)
def test_what_is_printable_stays_and_the_rest_is_visible(text):
    shown = printable(text)
    shown.encode()
    assert printable(shown) == shown
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    if all(c.isprintable() or c in "\t\n\u200d" for c in text):
        assert shown == text


@given(st.text(st.sampled_from("=+-@＝'\"; \t\r\n\xa0ax,")) | ANY_TEXT)
def test_a_spreadsheet_of_any_language_finds_no_formula_in_a_cell(cell):
    escaped = escape_formula(cell)
    assert unescape_formula(escaped) == cell
    assert not [
        one for one in re.split(r"[;\t\r\n]", escaped) if one.strip().startswith(tuple("=+-@＝＋－＠"))
    ]


@pytest.mark.timeout(20)
def test_escapes_take_linear_time():
    for text in ("\n", "; ", "'", " ", ";'", "\n' ", "\x1b", "[", "1."):
        assert unescape_formula(escape_formula(text * 300_000)) == text * 300_000
        markdown(text * 300_000)


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>", "![i](http://e.example/i.png)", "[a](javascript:x)", "`x` **y** _z_",
        "a|b", "- item", "+ item", "12) item", "3. item", "# title", "---", "===", "~~~", "> quote",
        "&lt;b&gt;",
        "$$x$$", "http://e.example", "www.e.example", "one\n\n# two", "\x1b[31m", "\\",
    ],
)  # fmt: skip
def test_a_name_in_markdown_is_text(name):
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"- {markdown(name)} end")
    shown = re.sub(r"<[^>]*>", "", html)
    assert re.findall(r"<(\w+)", html) == ["ul", "li"], html
    assert unescape(shown).split() == [*printable(" ".join(name.split())).split(), "end"]
