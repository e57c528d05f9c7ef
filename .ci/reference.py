"""HTTP/1.x messages as the strictest reader takes them (RFC 9112). It knows nothing of
how the product reads, so the two can be compared.

    read_request(data)          the request that begins there
    read_answer(data, method)   the answer to a request by that method
    read_head, read_body        the two halves of both

Each takes bytes and a place in them, and looks no further than one message. None, or
`whole` False, means that more has to come; Faulty, that another reader could take the
same bytes for something else.
"""

import re
from typing import List, NamedTuple, Optional, Tuple

CHUNKED = -1  # instead of a length
UNTIL_CLOSE = -2
Fields = List[Tuple[bytes, bytes]]  # names in lower case, values without blanks


class Faulty(ValueError):
    """No strict reader takes this."""


class Head(NamedTuple):
    first: bytes  # the first line
    fields: Fields
    end: int  # where the body begins

    def values(self, name: bytes) -> List[bytes]:
        return [value for other, value in self.fields if other == name]

    def members(self, name: bytes) -> List[bytes]:
        """The members of a list, over all its fields, in lower case."""
        parts = b",".join(self.values(name)).lower().split(b",")
        return [part.strip(b"\t ") for part in parts]


class Body(NamedTuple):
    content: bytes  # without chunk lines and trailers
    end: int  # where the next message begins, or where the data ends
    whole: bool
    trailers: Fields = []


class Message(NamedTuple):
    head: Head
    body: Body

    @property
    def whole(self) -> bool:
        return self.body.whole

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.head.first[9:12])


# -----------------------------------------------------------------------------------
# Grammar: RFC 9110 5.5 and 5.6, RFC 9112 3, 4 and 7.1
# -----------------------------------------------------------------------------------
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
QUOTED = rb'"(?:[\t\x20!#-\[\]-~\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
REQUEST_LINE = re.compile(
    TOKEN + rb" (?:/[!-\"$-~\x80-\xff]*|\*) HTTP/1\.[01]"  # curl sends bytes from 0x80
)
STATUS_LINE = re.compile(rb"HTTP/1\.[01] [1-9][0-9][0-9] " + TEXT)
FIELD = re.compile(rb"(%s):(%s)" % (TOKEN, TEXT))
EXTENSION = rb"[\t ]*;[\t ]*%s(?:[\t ]*=[\t ]*(?:%s|%s))?" % (TOKEN, TOKEN, QUOTED)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:%s)*" % EXTENSION)
LENGTH = re.compile(rb"[0-9]{1,18}")


# -----------------------------------------------------------------------------------
# Head
# -----------------------------------------------------------------------------------
def read_line(data: bytes, at: int) -> Optional[Tuple[bytes, int]]:
    """The line that begins there, and where the next one does."""
    end = data.find(b"\n", at)
    if end < 0:
        return None
    if end == at or data[end - 1] != 0x0D:
        raise Faulty("a line that ends without CR: %r" % data[at:end][:80])
    return data[at : end - 1], end + 1


def read_fields(data: bytes, at: int) -> Optional[Tuple[Fields, int]]:
    """The fields, or trailers, to the empty line, and where that ends."""
    fields: Fields = []
    while True:
        found = read_line(data, at)
        if not found:
            return None
        line, at = found
        if not line:
            return fields, at
        match = FIELD.fullmatch(line)
        if not match:
            raise Faulty("field %r" % line[:80])
        fields.append((match.group(1).lower(), match.group(2).strip(b"\t ")))


def read_head(data: bytes, at: int, line: "re.Pattern[bytes]") -> Optional[Head]:
    """`line` is REQUEST_LINE or STATUS_LINE."""
    found = read_line(data, at)
    if not found:
        return None
    first, at = found
    if not line.fullmatch(first):
        raise Faulty("first line %r" % first[:80])
    section = read_fields(data, at)
    return Head(first, *section) if section else None


def framing(head: Head) -> Optional[int]:
    """A length or CHUNKED; None when no field tells (RFC 9112 6.3)."""
    lengths = head.values(b"content-length")
    codings = head.values(b"transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise Faulty("framed %d times" % len(lengths + codings))
    if codings:
        if codings[0].lower() != b"chunked":
            raise Faulty("coding %r" % codings[0][:80])
        if b"HTTP/1.0" in (head.first[:8], head.first[-8:]):
            raise Faulty("chunks in HTTP/1.0")
        return CHUNKED
    if lengths and not LENGTH.fullmatch(lengths[0]):
        raise Faulty("length %r" % lengths[0][:80])
    return int(lengths[0]) if lengths else None


# -----------------------------------------------------------------------------------
# Body
# -----------------------------------------------------------------------------------
def read_body(data: bytes, at: int, length: int, closed: bool = False) -> Body:
    """`length` may be CHUNKED or UNTIL_CLOSE. `closed`: no more will come."""
    if length == CHUNKED:
        return read_chunks(data, at)
    if length == UNTIL_CLOSE:
        return Body(data[at:], len(data), closed)
    content = data[at : at + length]
    return Body(content, at + len(content), len(content) == length)


def read_chunks(data: bytes, at: int) -> Body:
    content = b""
    while True:
        found = read_line(data, at)
        if not found:
            return Body(content, len(data), False)
        match = CHUNK_LINE.fullmatch(found[0])
        if not match:
            raise Faulty("chunk line %r" % found[0][:80])
        size, at = int(match.group(1), 16), found[1]
        if size == 0:
            section = read_fields(data, at)
            if not section:
                return Body(content, len(data), False)
            return Body(content, section[1], True, section[0])
        content += data[at : at + size]
        at += size
        if not b"\r\n".startswith(data[at : at + 2]):
            raise Faulty("a chunk that is longer than it says")
        if len(data) < at + 2:
            return Body(content, len(data), False)
        at += 2


# -----------------------------------------------------------------------------------
# Messages
# -----------------------------------------------------------------------------------
def read_request(data: bytes, at: int = 0) -> Optional[Message]:
    """None while the head is not whole."""
    head = read_head(data, at, REQUEST_LINE)
    if not head:
        return None
    return Message(head, read_body(data, head.end, framing(head) or 0))


def read_answer(
    data: bytes, method: bytes, at: int = 0, closed: bool = False
) -> Optional[Message]:
    """An answer to `method`, also one with a status of 1xx; None while the head is not
    whole. `closed`: no more will come."""
    head = read_head(data, at, STATUS_LINE)
    if not head:
        return None
    length, status = framing(head), head.first[9:12]
    if status[:1] == b"1" or status == b"204":
        if length is not None:
            raise Faulty("framed, with a status that has no body")
        length = 0
    elif method == b"HEAD" or status == b"304":
        length = 0
    elif length is None:
        length = UNTIL_CLOSE
    return Message(head, read_body(data, head.end, length, closed))
