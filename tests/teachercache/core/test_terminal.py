"""Text of others on a terminal: no escapes, no markup, no letter that ends a command."""

import io
import sys

import pytest

from teachercache.core import progress
from teachercache.core.progress import printable, say, show, ticker, write_any_letter

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


def test_brackets_in_titles_and_notes_are_no_markup(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(progress, "rank", lambda: 0)
    with ticker(2, "[/] rows", "data/[bold]a[/]\x1b[5m") as tick:
        tick.step(2, "[/red] note")
    text = screen.getvalue()
    assert r"data/[bold]a[/]\x1b[5m" in text
    assert "[/red] note" in text
    assert "[/] rows/s" in text
