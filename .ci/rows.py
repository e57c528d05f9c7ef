"""The raw inputs of .ci/corpus, row by row. The format is told in the first lines of
each file."""

import re
from pathlib import Path
from typing import FrozenSet, Iterator, List, NamedTuple

CORPUS = Path(__file__).resolve().parent / "corpus"
ODD_BYTES = b"\0\1\x08\t\n\x0b\x0c\r\x1b\x1f\x7f\x80\x85\xa0\xff"
HEADING = re.compile(r"\[([^\];]+)((?:; [^\];]+)*)\] (.+)")
REPEATED = re.compile(r"\{([0-9]+)\*([^{}]*)\}")
ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|(.))")
LETTERS = {"r": "\r", "n": "\n", "t": "\t", "s": " ", "\\": "\\"}


class Row(NamedTuple):
    name: str
    raw: bytes  # {host} stands for the name of the service
    want: str  # what the visitor has to get; "" for a request
    options: FrozenSet[str]  # of its section


class Section(NamedTuple):
    group: str
    options: FrozenSet[str]
    template: str


def unescape(text: str) -> bytes:
    """The bytes that a template or a row stands for."""
    text = REPEATED.sub(lambda found: int(found.group(1)) * found.group(2), text)
    text = text.replace("{nothing}", "")
    return ESCAPED.sub(unescape_one, text).encode("latin-1")


def unescape_one(found: "re.Match[str]") -> str:
    code, letter = found.groups()
    return chr(int(code, 16)) if code else LETTERS[letter]


def read_section(line: str) -> Section:
    found = HEADING.fullmatch(line)
    assert found, line
    group, options, template = found.groups()
    return Section(group, frozenset(options.split("; ")[1:]), template)


def make_rows(section: Section, line: str) -> Iterator[Row]:
    """One, or one for each odd byte."""
    want, bar, rest = line.strip().partition(" | ")
    if not bar:
        want, rest = "", want
    name, arrow, text = rest.partition(" => ")
    name = "%s: %s" % (section.group, name.replace("{host}", "H"))
    raw = unescape(section.template.replace("{row}", text if arrow else rest))
    if b"{byte}" not in raw:
        yield Row(name, raw, want, section.options)
        return
    for number in ODD_BYTES:
        changed = raw.replace(b"{byte}", bytes([number]))
        yield Row("%s, %02x" % (name, number), changed, want, section.options)


def read_rows(name: str) -> List[Row]:
    """All of a file. Two rows of the same name are a mistake."""
    rows: List[Row] = []
    sections: List[Section] = []
    in_rows = False
    for line in (CORPUS / name).read_text("ascii").splitlines():
        if line.startswith("["):
            sections = [] if in_rows else sections
            sections.append(read_section(line))
            in_rows = False
        elif line and not line.startswith("#"):
            for section in sections:
                rows += make_rows(section, line)
            in_rows = True
    names = [row.name for row in rows]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, "rows of the same name: %s" % twice
    return rows
