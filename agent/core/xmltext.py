"""Texts as they stand in a document of XML 1.0: any string may be one. Pure.

By hand: xml.sax.saxutils brings urllib, http and email along, and leaves what no document can hold as it is.

Source: Extensible Markup Language 1.0, 2.2 "Characters", 2.4 "Character Data and Markup", 2.11 "End-of-Line Handling",
3.3.3 "Attribute-Value Normalization".
"""

import re

# Surrogates cannot be written as UTF-8 either.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# A reader would make a bare \r a line feed, and of white space in an attribute blanks.
_IN_CONTENT = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#13;"}
_IN_VALUE = _IN_CONTENT | {'"': "&quot;", "\t": "&#9;", "\n": "&#10;"}
_CONTENT, _VALUE = str.maketrans(_IN_CONTENT), str.maketrans(_IN_VALUE)
# Most texts hold none of these, and are written as they are.
_ODD = re.compile('[&<>"\x00-\x1f\ud800-\udfff\ufffe\uffff]')


def writable(text: str) -> str:
    """The text with characters that XML forbids as `\\xNN` or `\\uNNNN`."""
    return _FORBIDDEN.sub(_written, text)


def content(text: str) -> str:
    """The text as it stands between tags; a reader finds `writable(text)` there."""
    return writable(text).translate(_CONTENT) if _ODD.search(text) else text


def value(text: str) -> str:
    """The text as it stands between the double quotes of an attribute; a reader finds `writable(text)` there."""
    return writable(text).translate(_VALUE) if _ODD.search(text) else text


def _written(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
