"""Any text stands in a document, and a reader finds it there again."""

from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.core.xmltext import content, value, writable

ANY = st.text(st.characters(codec=None, exclude_categories=()), max_size=30)


@given(ANY)
@example("]]>")
@example("a\r\nb\rc\td\n")
@example("\x00\x1b[31m \ud800 \ufffe \U0001fffe \x7f\x85\u2028")
@example("""<a b="c" d='e'>&amp;""")
def test_a_reader_finds_what_was_written(text: str) -> None:
    found = ElementTree.fromstring(f'<a b="{value(text)}">{content(text)}</a>'.encode())
    assert found.get("b") == writable(text)
    assert (found.text or "") == writable(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tab\tline\nreturn\r", "tab\tline\nreturn\r"),
        ("\x00 \x1b[31m", "\\x00 \\x1b[31m"),
        ("\ud83d alone", "\\ud83d alone"),
        ("\ufffe\uffff", "\\ufffe\\uffff"),
        ("\x7f é 漢 😀", "\x7f é 漢 😀"),
    ],
)
def test_what_xml_forbids_is_spelt(text: str, expected: str) -> None:
    assert writable(text) == expected
