"""Text of others on a terminal: no escapes, no markup, no letter that ends a command."""

import io
import re
import shlex
import sys

import pytest

from teachercache.core import progress
from teachercache.core.progress import printable, quiet, say, show, status, suggest, ticker, write_any_letter

NASTY = {
    "\x1b[2Ja": r"\x1b[2Ja",
    "a\rb": r"a\rb",
    "a\x07": r"a\x07",
    "\x9b31m": r"\x9b31m",
    "a\nb": r"a\nb",
    "\u202eabc": r"\u202eabc",
    "\u2066a": r"\u2066a",
    "\ud83d": r"\ud83d",
    "\u2028": r"\u2028",
}


@pytest.mark.parametrize(("text", "shown"), NASTY.items(), ids=ascii)
def test_controls_are_written_as_escapes(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["a red dog", "ein Hündchen", "猫", "👩\u200d🚀", "العربية", r"C:\new"])
def test_other_letters_stay(text):
    assert printable(text) == text


@pytest.mark.parametrize("speak", [say, show])
def test_what_is_said_and_shown_keeps_its_lines_alone(speak, capsys):
    speak("a\x1b[31m", "b\nc\r")
    out, err = capsys.readouterr()
    assert out + err == "a\\x1b[31m b\nc\\r\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_letters_that_a_terminal_lacks_are_escapes(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    write_any_letter()
    show("猫")
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == ("猫\n" if encoding == "utf-8" else "\\u732b\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    """A terminal that stands for stderr. A fixture cannot set it: pytest puts its own stream there for the test."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(progress, "rank", lambda: 0)
    return screen


def test_brackets_in_titles_and_notes_are_no_markup(monkeypatch):
    screen = terminal(monkeypatch)
    with ticker(2, "[/] rows", "data/[bold]a[/]\x1b[5m") as tick:
        tick.step(2, "[/red] note")
    text = screen.getvalue()
    assert r"data/[bold]a[/]\x1b[5m" in text
    assert "[/red] note" in text
    assert "[/] rows/s" in text


COLOR = re.compile(r"\x1b\[[0-9;]*3[0-9]")  # a sequence that sets a foreground color


@pytest.mark.parametrize("variable", ["", "NO_COLOR"])
def test_bars_and_status_lines_are_colored_unless_no_color(variable, monkeypatch):
    screen = terminal(monkeypatch)
    if variable:
        monkeypatch.setenv(variable, "1")
    with status("loading [bold]a[/]"):
        pass
    with ticker(2, "rows", "a") as tick:
        tick.step(1)
    text = screen.getvalue()
    assert "loading [bold]a[/] ..." in text
    assert bool(COLOR.search(text)) == (not variable)


def test_a_status_line_within_a_bar_stays_away(monkeypatch):
    screen = terminal(monkeypatch)
    with ticker(2, "rows", "outer") as tick, status("inner"), ticker(1, "rows", "innermost"):
        tick.step(2)
    assert "outer" in screen.getvalue()
    assert "inner" not in screen.getvalue()


def test_quiet_hides_all_but_warnings_until_it_ends(monkeypatch):
    screen = terminal(monkeypatch)
    with quiet():
        say("a notice")
        suggest("tc", "info")
        with status("loading"), ticker(1, "rows", "bar") as tick:
            tick.step(1)
        say("WARNING: beware")
    say("after")
    assert screen.getvalue() == "WARNING: beware\nafter\n"


def test_long_work_leaves_a_line_where_there_is_no_terminal(capsys, monkeypatch):
    times = iter([0.0, 9.0, 10.0, 22.6])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    for name in ("short", "long"):
        with status(name):
            pass
    assert capsys.readouterr() == ("", "long: 13 s\n")


def test_a_suggestion_can_be_pasted(capsys):
    suggest("tc", "search", "my caches/a.zarr", "it's")
    line = capsys.readouterr().err
    assert shlex.split(line.removeprefix("next: ")) == ["tc", "search", "my caches/a.zarr", "it's"]
