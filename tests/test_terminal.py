"""Text of models and files reaches a terminal only as text."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfjax.terminal import printable, take_any_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode 日本 🙂\n\ttab", "plain ünïcode 日本 🙂\n\ttab"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[Hcleared", "cleared"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;aGk=", ""),  # a clipboard write that never ends
        ("\x1bP1$q\x1b\\x", "x"),
        ("\x1bcreset", "reset"),
        ("\x9b31mred", "red"),
        ("a\rb\r\nc\x08\x00\x7f", "ab\nc"),
        ("safe\u202egnp.exe", "safegnp.exe"),
        ("[bold]markup[/bold]", "[bold]markup[/bold]"),
        ("\x1b", ""),
        ("\ud800", ""),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@given(st.text(alphabet=st.characters() | st.sampled_from("\x1b[]\x07\x9b0;m\\"), max_size=40))
def test_nothing_that_steers_is_left(text):
    shown = printable(text)
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]
    shown.encode()


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"\\xe9 \\u20ac"), ("latin-1", b"\xe9 \\u20ac")])
def test_what_an_encoding_lacks_is_an_escape(monkeypatch, encoding, shown):
    # fails with UnicodeEncodeError, as PYTHONIOENCODING=latin-1 did: seen
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    monkeypatch.setattr(sys, "stderr", None)  # 2>&-
    take_any_text()
    print("é €", end="", flush=True)
    assert written.getvalue() == shown
