"""What .ci/fuzz is made of: seeds, a mutator that knows their structure, readings of
HTTP that are not ours, and what must hold for the parsers whatever they are given. As a
program it is what .ci/fuzz starts to try the parsers: it ends itself when its time is
up, which atheris, the fuzzer that follows the coverage, would not."""

import contextlib
import importlib
import json
import os
import random
import re
import signal
import ssl
import struct
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional
from typing import Sequence, Tuple

import reference

REPOSITORY = Path(__file__).resolve().parent.parent
ID = "fuzz"  # of the client
MARK = b"/smuggled"  # nine letters, so that another name of that length can stand here
MARKER = b"GET " + MARK + b" HTTP/1.1"
MOST_FINDS = 20  # more tell nothing new
SLOW = 4  # seconds of CPU that one input may take in a parser, instrumented as it is
MANY_CHUNKS = 20000  # bytes of chunks tried: of two bytes a line that is much already
Pieces = List[bytes]
Fields = List[Tuple[bytes, bytes]]
server: Any = None  # the two scripts, as modules: see load()
client: Any = None


def load() -> None:
    """Import the two scripts; atheris wants to see that happen."""
    global server, client
    sys.path.insert(0, str(REPOSITORY))
    server = importlib.import_module("mdm_tunnel_server")
    client = importlib.import_module("mdm_tunnel_client")


# -----------------------------------------------------------------------------------
# Seeds: what is right, with a request inside each body that must never be seen.
# -----------------------------------------------------------------------------------
def head(first: str, *fields: str) -> bytes:
    return "\r\n".join((first,) + fields + ("", "")).encode("latin-1")


def host(name: str = "web") -> str:
    return "Host: %s.%s.localhost" % (name, ID)


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


INNER = MARKER + b"\r\n" + host().encode() + b"\r\n\r\n"
CHUNKS = chunk(INNER) + b"0\r\n\r\n"
PARTS = chunk(b"a", b";x=y") + chunk(INNER, b' ; q="\\"z"') + b"00\r\nT: v\r\n\r\n"
SIZE = "Content-Length: %d" % len(INNER)
CHUNKED = "Transfer-Encoding: chunked"
UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: abc")
PLAIN = head("GET /plain?a=b HTTP/1.1", host(), "Accept: text/html", "Cookie: a=b")
REQUESTS = [
    PLAIN,
    head("POST /sized HTTP/1.1", host(), SIZE) + INNER,
    head("POST /chunks HTTP/1.1", host(), CHUNKED, "Trailer: T") + CHUNKS,
    head("PUT /parts HTTP/1.1", host(), CHUNKED, "TE: trailers") + PARTS,
    head("POST /1 HTTP/1.1", host(), SIZE) + INNER + PLAIN,
    head("POST /2 HTTP/1.1", host(), CHUNKED) + CHUNKS + PLAIN + PLAIN,
    head("GET /ws HTTP/1.1", host(), *UPGRADE) + b"\x81\x02hi" + INNER,
    head("POST /old HTTP/1.0", host(), "Connection: keep-alive", SIZE) + INNER,
    head("HEAD /head HTTP/1.1", host(), "X-Forwarded-For: 1.2.3.4"),
    head("GET /\xc3\xa4?\xff HTTP/1.1", host()),
    head("GET http://web.%s.localhost:80/abs HTTP/1.1" % ID, host("other")),
    head("OPTIONS * HTTP/1.1", host(), "Connection: close, X-A", "X-A: 1"),
    head("GET / HTTP/1.1", "Host: web--%s.localhost:8000" % ID, "Expect: 100-continue"),
    head("GET / HTTP/1.1", "Host: %s.localhost" % ID, "Accept: text/html,*/*;q=0.1"),
    head("GET / HTTP/1.1", "Host: [::1]:8000", "Keep-Alive: timeout=5"),
    head("CONNECT a:443 HTTP/1.1", host(), "Proxy-Connection: close"),
]
OTHER = b"HTTP/1.1 200 Smuggled\r\nContent-Length: 0\r\n\r\n"
HAS = "Content-Length: %d" % len(OTHER)
ANSWERS = [
    head("HTTP/1.1 200 OK", HAS, "Content-Type: text/html", "Set-Cookie: a") + OTHER,
    head("HTTP/1.1 200 OK", CHUNKED) + chunk(OTHER) + b"0\r\n\r\n",
    head("HTTP/1.1 200 OK", CHUNKED) + chunk(OTHER, b";a") + b"0\r\nT: v\r\n\r\n",
    head("HTTP/1.1 200 OK", "Connection: close") + OTHER,
    head("HTTP/1.0 200 OK", "Connection: keep-alive", HAS) + OTHER,
    head("HTTP/1.1 100 Continue") + head("HTTP/1.1 200 OK", HAS) + OTHER,
    head("HTTP/1.1 103 Hints", "Link: a") + head("HTTP/1.1 204 No Content"),
    head("HTTP/1.1 304 Not Modified", "ETag: x", HAS),
    head("HTTP/1.1 101 Switching Protocols", *UPGRADE[:2]) + b"\x81\x02hi",
    head("HTTP/1.1 426 Upgrade Required", "Upgrade: a", "Connection: Upgrade", HAS)
    + OTHER,
    head("HTTP/1.1 500 \xe4", "Connection: X-A", "X-A: 1", HAS) + OTHER,
    # not by the grammar, and passed on all the same
    head("HTTP/1.1 200 OK", HAS).replace(b"\r", b"") + OTHER,
    head("HTTP/1.1 200 OK", "Server : box", "X-Long: a\r\n b", HAS) + OTHER,
    head("HTTP/1.1 200 OK", HAS, CHUNKED) + chunk(OTHER) + b"0\r\n\r\n",
    head("HTTP/1.1 200 OK", HAS, HAS + ", " + HAS[16:]) + OTHER,
    head("HTTP/1.1 999 Denied", "Transfer-Encoding: identity", HAS) + OTHER,
    head("HTTP/1.1 200 OK", "Content_Length: 1", CHUNKED)
    + chunk(OTHER, b"  ").replace(b"  \r", b"  ")
    + b"00 \nT : v\n w\n\n",
]
LINES = [
    SIZE.encode(), CHUNKED.encode(), host().encode(), b"Content-Length: 0",
    b"Content-Length: 5", b"Transfer-Encoding: gzip, chunked", b"Connection: close",
    b"Transfer-Encoding: identity", b"transfer-encoding:\tCHUNKED ", b" folded",
    b"Connection: content-length", b"Connection: host, upgrade", b"Content_Length: 3",
    b"Connection: keep-alive, te", b"Upgrade: h2c", b"Upgrade: mdm-tunnel/1", b"",
    b"Connection: Upgrade", b"X-Forwarded-For: 9.9.9.9", b"Host:", b":", b"Host: a b",
    b"Expect: 100-continue", b"TE: trailers", b"GET / HTTP/1.1", b"\xff\xfe: \x80",
    b"HTTP/1.1 200 OK", b"HTTP/1.1 101 S", b"HTTP/1.1 100 C", b"0", b"X" * 17000,
]  # fmt: skip
ENDS = [b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n ", b"\0\r\n", b"\x0b", b"\r\n\r\n"]
COLONS = [b":", b" : ", b"\t:", b"\0:", b":\x0b", b"", b": ,", b"\xa0:", b"::", b"="]
SPACES = [b"\t", b"  ", b"", b"\x0b", b"\xa0", b"\0", b"\x85", b"\r", b"\r\n", b","]
NUMBERS = [
    b"", b"-1", b"+1", b"00", b"0x10", b"1_0", b"1 1", b"1,1", b"1.0", b"1e1", b"2",
    b"65535", b"65536", b"2147483648", b"4294967295", b"4294967296", b"FFFFFFFF",
    b"FFFFFFFFF", b"9" * 18, b"9" * 19, b"9223372036854775808", b"9" * 5000, b"\xb2",
    b"\xef\xbc\x95", b"0" * 9, b"18446744073709551616",
]  # fmt: skip

KINDS = (
    "CHALLENGE LOGIN WELCOME SERVICES URLS OPEN DATA CREDIT END RESET PING PONG "
    "GOODBYE CONNECTED NOTE"
).split()


class Frame(NamedTuple):
    kind: int
    stream: int
    payload: bytes

    def packed(self) -> bytes:
        word = self.kind << 24 & 0xFF000000 | len(self.payload)
        return struct.pack("!II", word, self.stream) + self.payload


def frame(kind: str, stream: int = 0, payload: Any = b"") -> Frame:
    if not isinstance(payload, bytes):
        payload = json.dumps(payload).encode()
    return Frame(KINDS.index(kind) + 1, stream, payload)


STAMP, CREDIT = b"01234567", struct.pack("!I", 70000)
WHO = {"id": "guest", "session": "x", "nonce": "0" * 64, "notes": True}
LOGIN = frame("LOGIN", 0, WHO)
SERVICES = frame("SERVICES", 0, {"web": {"target": "9000"}, "A_1": {}})
GOODBYE = frame("GOODBYE", 0, {"code": "stopping", "reason": "that is all"})
PING, PONG = frame("PING", 0, STAMP), frame("PONG", 0, STAMP)
CREDITED, ENDED = frame("CREDIT", 1, CREDIT), frame("END", 1)
LEFT = frame("RESET", 1, b"left the visitor has gone")
ANSWERED = [frame("DATA", 1, answer) for answer in ANSWERS]
FROM_CLIENT = [  # after LOGIN and SERVICES
    [PING, PONG, SERVICES],
    [ANSWERED[0]],
    [ANSWERED[1], CREDITED, ENDED],
    [CREDITED, ANSWERED[3], ENDED],
    [ANSWERED[5]],
    [PING, frame("RESET", 1, b"refused nobody listens")],
    [frame("RESET", 1, b"gone"), GOODBYE],
    [ANSWERED[8], ENDED, PING],
    [frame("DATA", 1, b"HTTP/1.1 200 OK\r\n\r\n"), LEFT],
    [frame("DATA", 1, b"x" * 70000)],
    [SERVICES, GOODBYE],
]
CHALLENGE = frame("CHALLENGE", 0, {"version": "1.0.0", "nonce": "0" * 64})
WELCOME = frame("WELCOME", 0, {})
URLS = frame("URLS", 0, {"web": "http://web.fuzz.localhost:1/", "x": "error: no"})
OPENED = frame("OPEN", 1, {"service": "web", "visitor": "127.0.0.1", "scheme": "http"})
TOLD = {"service": "web", "method": "GET", "target": "/", "status": 200, "sent": 5}
TOLD.update(request=[0, 99], answer=[0, 70], stream=1, seconds=0.1, dropped=2)
NOTE = frame("NOTE", 0, [TOLD, {"code": "left", "cause": "", "visitor": "::1"}])
FROM_SERVER = [  # after CHALLENGE and WELCOME
    [URLS, PING, PONG, URLS],
    [NOTE, OPENED, NOTE],
    [OPENED, frame("DATA", 1, PLAIN), CREDITED, ENDED],
    [OPENED, frame("DATA", 1, REQUESTS[1]), LEFT],
    [OPENED, CREDITED, frame("DATA", 1, REQUESTS[6]), ENDED],
    [OPENED, OPENED._replace(stream=2), ENDED, ENDED._replace(stream=2)],
    [OPENED, LEFT, PING],
    [OPENED, frame("DATA", 1, b"x" * 70000)],
    [OPENED, GOODBYE, frame("DATA", 1, PLAIN)],
    [URLS, frame("GOODBYE", 0, {"code": "taken", "reason": "no"})],
    [GOODBYE],
]


def nested(depth: int, begin: str = "[", end: str = "]", inner: str = "") -> str:
    return begin * depth + inner + end * depth


TEXTS = [
    b"9000", b"127.0.0.1:9000", b"[::1]:80", b"::1", b"unix:/run/app.sock", b"a:0",
    b"localhost:65536", b"a:\xc2\xb2", b"[::1", b"[]:1", b"web=9000", b"w=unix:/x",
    b"example.com\nweb.tim.example.com", b"https://example.com:8443/\nweb--tim.a",
    b"a.b,http://c.d\nx.fuzz.c.d", b"http://[::1]:80\n[::1]", b"http://[v1.a]/\na",
    b"//u:p@a.b\n.", b"http://a:99999\n--", b"\na--fuzz", b"a\xe2\x84\xaa.b\n..",
]  # fmt: skip
FILES = [
    b'{"hello-world": 9000, "websockets": "[::1]:9001"}',
    b'{"token": "secret", "services": {"web": {"target": "unix:/a"}, "b": 1}}',
    b'{"services": {"target": 9000}}',
    b'{"services": {"services": 1}, "token": 2}',
    b'{"tim": "secret", "Bob_1": "other token"}',
    b'{"a": [{"target": null}], "a": {"target": {"target": 1}}}',
    b'\xef\xbb\xbf{"id": "a", "session": "\\ud800", "code": "taken"}',
]
ODD = [  # in the place of any value of a JSON text
    "null", "true", "0", "-1", "1.5", "1e999", "NaN", "-Infinity", "9000", "65536",
    "[]", "{}", '""', '"\\ud800"', '"\\u0000"', '"\\n"', '"a--b"', '"a.b"', '"\u212a"',
    '"fuzz"', "1" * 4301, '"%s"' % ("a" * 64), '"%s"' % ("\xe4" * 3000), "[1", "'a'",
    '{"target": 9000}', '{"target": {"target": 1}}', '"unix:/x"', '"127.0.0.1:1"',
]  # fmt: skip


# -----------------------------------------------------------------------------------
# Mutator: what is nearly right reaches further than noise.
# -----------------------------------------------------------------------------------
class Mutator:
    """Makes of what is right what is nearly right. All chance comes from the seed."""

    def __init__(self, seed: Any) -> None:
        self.random = random.Random(seed)
        self.ways: List[Callable[[bytes], bytes]] = [
            self.repeat_line, self.drop_line, self.swap_lines, self.add_line,
            self.add_line, self.near_end, self.near_colon, self.near_space,
            self.number, self.number, self.control, self.case, self.cut, self.erase,
            self.again, self.flip, self.splice,
        ]  # fmt: skip

    def mutate(self, data: bytes, most: int = 120000) -> bytes:
        """`data` after some changes, mostly one or two."""
        for _ in range(self.random.choice((1, 1, 1, 1, 2, 2, 3, 5))):
            data = self.random.choice(self.ways)(data)
        return data[:most]

    def maybe(self, data: bytes, chance: float) -> bytes:
        return self.mutate(data) if self.random.random() < chance else data

    def place(self, data: bytes) -> int:
        return self.random.randrange(len(data) + 1)

    def pieces(self, data: bytes) -> Pieces:
        """As what comes in some writes, mostly one."""
        count = self.random.choice((0, 0, 0, 1, 1, 2, 4))
        cuts = sorted({self.place(data) for _ in range(count)} | {0, len(data)})
        return [data[a:b] for a, b in zip(cuts, cuts[1:])]

    # Lines.

    def on_lines(self, data: bytes, change: Callable[[List[bytes], int], Any]) -> bytes:
        lines = data.split(b"\r\n")
        change(lines, self.random.randrange(len(lines)))
        return b"\r\n".join(lines)

    def repeat_line(self, data: bytes) -> bytes:
        return self.on_lines(data, lambda lines, at: lines.insert(at, lines[at]))

    def drop_line(self, data: bytes) -> bytes:
        return self.on_lines(data, lambda lines, at: lines.pop(at))

    def swap_lines(self, data: bytes) -> bytes:
        def swap(lines: List[bytes], at: int) -> None:
            lines[at - 1], lines[at] = lines[at], lines[at - 1]

        return self.on_lines(data, swap)

    def add_line(self, data: bytes) -> bytes:
        """A field of another request; most belong behind the first line."""
        line = self.random.choice(LINES)
        early = self.random.random() < 0.7
        return self.on_lines(
            data, lambda lines, at: lines.insert(1 if early else at, line)
        )

    # Separators, numbers.

    def replace(self, data: bytes, what: str, by: Callable[[bytes], bytes]) -> bytes:
        """One of the places where the pattern is."""
        found = list(re.finditer(what.encode("latin-1"), data[:200000]))
        if not found:
            return self.flip(data)
        start, end = self.random.choice(found).span()
        return data[:start] + by(data[start:end]) + data[end:]

    def near(self, data: bytes, what: str, choice: List[bytes]) -> bytes:
        return self.replace(data, what, lambda _: self.random.choice(choice))

    def near_end(self, data: bytes) -> bytes:
        return self.near(data, r"\r\n", ENDS)

    def near_colon(self, data: bytes) -> bytes:
        return self.near(data, r": ?", COLONS)

    def near_space(self, data: bytes) -> bytes:
        return self.near(data, " ", SPACES)

    def number(self, data: bytes) -> bytes:
        def other(old: bytes) -> bytes:
            near = int(old[:15], 16 if old.isalnum() and not old.isdigit() else 10)
            step = self.random.choice((-2, -1, 1, 2))
            return self.random.choice(NUMBERS + 9 * [b"%d" % max(0, near + step)])

        return self.replace(data, r"\b[0-9]+\b", other)

    def case(self, data: bytes) -> bytes:
        return self.replace(data, r"[A-Za-z-]{3,}", bytes.swapcase)

    # Bytes.

    def control(self, data: bytes) -> bytes:
        at = self.place(data)
        some = self.random.choice(b"\0\t\n\x0b\r \x7f\x80\x85\xff")
        return data[:at] + bytes((some,)) + data[at:]

    def cut(self, data: bytes) -> bytes:
        return data[: self.place(data)]

    def erase(self, data: bytes) -> bytes:
        at = self.place(data)
        return data[:at] + data[at + self.random.choice((1, 1, 2, 4, 20)) :]

    def again(self, data: bytes) -> bytes:
        """A part once more, or so often that a limit is met."""
        at, size = self.place(data), self.random.choice((1, 2, 10, 50))
        times = self.random.choice((2, 2, 2, 3, 300, 70000 // size))
        return data[:at] + data[at : at + size] * times + data[at + size :]

    def flip(self, data: bytes) -> bytes:
        if not data:
            return b"\0"
        at = self.random.randrange(len(data))
        other = data[at] ^ 1 << self.random.randrange(8)
        return data[:at] + bytes((other,)) + data[at + 1 :]

    def splice(self, data: bytes) -> bytes:
        other = self.random.choice(REQUESTS + ANSWERS)
        return data[: self.place(data)] + other[self.place(other) :]

    # JSON, frames.

    def odd(self) -> str:
        """A value that nobody expects."""
        if self.random.random() < 0.7:
            return self.random.choice(ODD)
        depth = self.random.choice((30, 300, 480, 700, 3000))
        if self.random.random() < 0.5:  # as deep as Python goes
            depth = self.random.randrange(930, 996)
        if self.random.random() < 0.5:
            return nested(depth)
        return nested(depth, '{"a":', "}", "1")

    def json(self, text: bytes) -> bytes:
        """A JSON object in which one value or key is another, or broken text."""
        try:
            value = json.loads(text.decode())
        except (ValueError, RecursionError):
            return self.mutate(text)
        way = self.random.randrange(6)
        if way == 0 or not (isinstance(value, dict) and value):
            return self.mutate(text)
        if way == 1:
            return self.odd().encode("utf-8", "surrogatepass")
        key = self.random.choice(list(value))
        if way == 2:
            other = self.random.choice(("", "\0", "K\u212a", "a" * 64, "--"))
            value[other] = value[key]
        else:
            value[key] = {"target": "\x07"} if way == 3 else "\x07"
        odd = self.odd().encode("utf-8", "surrogatepass")
        return json.dumps(value).encode().replace(b'"\\u0007"', odd)

    def one_frame(self, old: Frame) -> Frame:
        """Another kind, another stream, or another payload."""
        way, payload = self.random.randrange(8), old.payload
        if way == 0:
            return old._replace(kind=self.random.choice((*range(15), 255)))
        if way == 1:
            ids = (0, 1, 2, 3, 77, 1 << 31, (1 << 32) - 1)
            return old._replace(stream=self.random.choice(ids))
        if way < 6 and payload[:1] == b"{":
            payload = self.json(payload)
        elif len(payload) in (4, 8) and way < 6:
            number = self.random.choice((0, 1, 4095, 1 << 20, 1 << 31, (1 << 32) - 1))
            payload = struct.pack("!I", number) * self.random.choice((1, 1, 2, 3))
        else:
            payload = self.mutate(payload)
        return old._replace(payload=payload)

    def frames(self, frames: Sequence[Frame], changes: Sequence[int]) -> bytes:
        """The frames after so many changes, as bytes; the header may lie."""
        found = list(frames)
        for _ in range(self.random.choice(changes)):
            at, way = self.random.randrange(len(found)), self.random.randrange(8)
            if way == 0:
                found.insert(at, found[at])
            elif way == 1 and len(found) > 1:
                del found[at]
            elif way == 2:
                found[0], found[at] = found[at], found[0]
            elif way == 3:
                found.insert(at, self.random.choice(self.random.choice(ALL_FRAMES)))
            else:
                found[at] = self.one_frame(found[at])
        data = b"".join(one.packed() for one in found)
        return self.flip(data) if self.random.random() < 0.05 else data


ALL_FRAMES = FROM_CLIENT + FROM_SERVER + [[LOGIN, SERVICES, CHALLENGE, WELCOME]]


# -----------------------------------------------------------------------------------
# Readings: HTTP as others read it, who overlook this or that (RFC 9112, 11.2). What
# goes on to a service or to a visitor must be the same to all of them, and to the
# strictest, which reference.py is.
# -----------------------------------------------------------------------------------
NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
FIRST = re.compile(reference.TEXT)  # line of a head, whatever it means
HEXADECIMAL = re.compile(rb"[ \t]*([0-9A-Fa-f]+)[ \t]*(;.*)?", re.DOTALL)
DIGITS = re.compile(rb"[ \t+]*([0-9]+)")


class Unclear(Exception):
    """This reader would refuse it."""


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """What the reference refuses is unclear."""
    try:
        yield
    except reference.Faulty as error:
        raise Unclear(str(error)) from None


class Reading(NamedTuple):
    """Somebody's way to read HTTP."""

    name: str
    lf: bool = False  # a line may end without CR
    loose: bool = False  # space before a colon, folded lines, lines without a colon
    last: bool = False  # of two lengths the last counts
    within: bool = False  # "chunked" may stand anywhere in the coding
    length_first: bool = False  # Content-Length counts, not Transfer-Encoding


IN_CHUNKS = -1
STRICT = Reading("strict")
READINGS = [
    STRICT,
    Reading("bare LF", lf=True),
    Reading("loose", loose=True),
    Reading("loose, bare LF, first length", lf=True, loose=True, within=True),
    Reading("loose, last length", loose=True, last=True),
    Reading("loose, length before coding", loose=True, length_first=True),
    Reading("all", lf=True, loose=True, last=True, length_first=True),
]


class Message(NamedTuple):
    first: bytes
    fields: Fields
    body: bytes  # without the framing
    end: int  # where the next one begins
    whole: bool = True  # False: more was to come


def line_at(data: bytes, at: int, how: Reading) -> Optional[Tuple[bytes, int]]:
    """A line, and where the next one begins."""
    end = data.find(b"\n" if how.lf else b"\r\n", at)
    if end < 0:
        return None
    if not how.lf:
        return data[at:end], end + 2
    return data[at : end - (data[end - 1 : end] == b"\r" and end > at)], end + 1


def head_at(data: bytes, at: int, how: Reading) -> Optional[Message]:
    """The head that begins there; None when it is not whole. Raises Unclear."""
    if how is STRICT:
        with strictly():
            head = reference.read_head(data, at, FIRST)
        return head and Message(head.first, head.fields, b"", head.end)
    lines: List[bytes] = []
    while not lines or lines[-1]:
        found = line_at(data, at, how)
        if found is None:
            return None
        lines.append(found[0])
        at = found[1]
    if not lines[0]:
        raise Unclear("no first line")
    fields: Fields = []
    for line in lines[1:-1]:
        add_field(fields, line, how)
    return Message(lines[0], fields, b"", at)


def add_field(fields: Fields, line: bytes, how: Reading) -> None:
    name, colon, value = line.partition(b":")
    if how.loose:
        if line[:1] in (b" ", b"\t") and fields:
            fields[-1] = fields[-1][0], fields[-1][1] + b" " + line.strip()
        elif colon:
            fields.append((name.strip(b" \t\0\x0b\x0c\r").lower(), value.strip()))
    elif not (colon and NAME.fullmatch(name)):
        raise Unclear("field")
    else:
        fields.append((name.lower(), value.strip(b" \t")))


def values(fields: Fields, name: bytes) -> List[bytes]:
    return [value for other, value in fields if other == name]


def chunks_at(data: bytes, at: int, how: Reading) -> Tuple[bytes, int, bool]:
    """Content and end of a chunked body, and whether it is whole."""
    if how is STRICT:
        with strictly():
            return reference.read_chunks(data, at)[:3]
    content: Pieces = []
    while True:
        found = line_at(data, at, how)
        if found is None:
            return b"".join(content), len(data), False
        line, at = found
        size = HEXADECIMAL.fullmatch(line)
        if not size:
            raise Unclear("chunk size")
        count = int(size.group(1), 16)
        if not count:
            break
        content.append(data[at : at + count])
        found = line_at(data, at + count, how)
        if found is None:
            return b"".join(content), len(data), False
        if found[0]:
            raise Unclear("end of chunk")
        at = found[1]
    while True:
        found = line_at(data, at, how)
        if found is None:
            return b"".join(content), len(data), False
        line, at = found
        if not line:
            return b"".join(content), at, True


def framing_of(fields: Fields, how: Reading) -> Optional[int]:
    """How long the body is by the fields: IN_CHUNKS, or None when they do not say.
    Raises Unclear."""
    if how is STRICT:
        with strictly():
            found = reference.framing(reference.Head(b"", fields, 0))
        return IN_CHUNKS if found == reference.CHUNKED else found
    lengths = values(fields, b"content-length")
    codings = [value.lower() for value in values(fields, b"transfer-encoding")]
    chunked = any(b"chunked" in c if how.within else c == b"chunked" for c in codings)
    if chunked and not (how.length_first and lengths):
        return IN_CHUNKS
    if lengths:
        number = DIGITS.match(lengths[-1 if how.last else 0])
        if not number:
            raise Unclear("length")
        return int(number.group(1)[:20])
    if codings and not how.loose:
        raise Unclear("coding")
    return None


def message_at(
    data: bytes, at: int, how: Reading, method: bytes = b""
) -> Optional[Message]:
    """A request, or the answer to a `method`; None when not even the head is whole.
    Raises Unclear."""
    if how is STRICT:
        return strict_message(data, at, method)
    found = head_at(data, at, how)
    if found is None:
        return None
    length = framing_of(found.fields, how)
    if method and has_no_body(found.first, method):
        return found
    if length == IN_CHUNKS:
        body, end, whole = chunks_at(data, found.end, how)
    elif length is None:
        end = len(data) if method else found.end
        body, whole = data[found.end : end], True
    else:
        end = found.end + length
        body, whole, end = data[found.end : end], end <= len(data), min(end, len(data))
    return Message(found.first, found.fields, body, end, whole)


def strict_message(data: bytes, at: int, method: bytes) -> Optional[Message]:
    """Nothing comes behind what is there of an answer."""
    with strictly():
        if method:
            read = reference.read_answer(data, method, at, closed=True)
        else:
            read = reference.read_request(data, at)
    if not read:
        return None
    head, body = read.head, read.body
    return Message(head.first, head.fields, body.content, body.end, body.whole)


def has_no_body(first: bytes, method: bytes) -> bool:
    status = first[9:12]
    return method == b"HEAD" or status[:1] == b"1" or status in (b"204", b"304")


def requests_in(data: bytes, how: Reading) -> Tuple[List[Message], bool]:
    """The requests as far as they can be read, and whether the reader has refused."""
    found: List[Message] = []
    at = 0
    while True:
        while data[at : at + 2] == b"\r\n":
            at += 2
        try:
            one = message_at(data, at, how)
        except Unclear:
            return found, True
        if one is None:
            return found, False
        found.append(one)
        at = one.end
        if not one.whole:
            return found, False


def fewest(data: bytes, first: bytes) -> int:
    """So many requests that begin with `first` see those readers who see fewest. Who
    would refuse any of it counts only where all do, with what he saw before."""
    read = [requests_in(data, how) for how in READINGS]
    whole = [found for found, refused in read if not refused]
    return min(
        sum(one.first.startswith(first) for one in found)
        for found in whole or [found for found, _ in read]
    )


def answers_in(data: bytes, methods: Pieces, how: Reading) -> List[Message]:
    """The final answers, as far as they are there. Raises Unclear."""
    found: List[Message] = []
    at = 0
    while len(found) < len(methods) and at < len(data):
        one = message_at(data, at, how, methods[len(found)])
        if one is None:
            raise Unclear("head")
        if one.first[9:10] != b"1":
            found.append(one)
        at = one.end
    if at < len(data):
        raise Unclear("more than was asked for")
    return found


# -----------------------------------------------------------------------------------
# Checks: what must hold of a parser, whatever it is given.
# -----------------------------------------------------------------------------------
REPEATED = re.compile(rb"(.{1,60}?)\1{9,}", re.DOTALL)


def shown(data: Any) -> str:
    """As Python would write it; what is repeated in bytes is written once."""
    if isinstance(data, str):
        return data
    if not isinstance(data, bytes):
        return "[%s]" % ", ".join(shown(one) for one in data)
    parts, at = [], 0
    for found in REPEATED.finditer(data):
        start, end = found.span()
        unit = found.group(1)
        parts += [repr(data[at:start])] * (at < start)
        parts.append("%r * %d" % (unit, (end - start) // len(unit)))
        at = end
    parts += [repr(data[at:])] * (at < len(data) or not parts)
    return " + ".join(parts)


class Wrong(AssertionError):
    """A property does not hold."""


def expect(good: Any, text: str, *args: Any) -> None:
    if not good:
        raise Wrong(text % args)


def cut_up(data: bytes) -> Pieces:
    """Pieces that depend on the data only, so that a find can be repeated."""
    chance = random.Random(zlib.crc32(data))
    if len(data) <= 400 and chance.random() < 0.3:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = {chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, 6))}
    ends = sorted(cuts | {0, len(data)})
    return [data[a:b] for a, b in zip(ends, ends[1:])]


def check_frames(data: bytes) -> None:
    """Whole or in pieces: the same frames, or refused for the same reason."""
    for peer in ("client", "server"):
        whole, pieces = read_frames(peer, [data]), read_frames(peer, cut_up(data))
        expect(whole == pieces, "%r is in pieces %r", whole, pieces)


def read_frames(peer: str, pieces: Pieces) -> List[Any]:
    reader = server.FrameReader(peer)
    found: List[Any] = []
    try:
        for piece in pieces:
            reader.push(memoryview(piece))
            for kind, stream, payload in iter(reader.next, None):
                sender, on_stream, _, most = server.RULES[kind]
                expect(sender in ("both", peer), "kind %d of the %s", kind, peer)
                expect(on_stream == (stream > 0), "%d on stream %d", kind, stream)
                expect(len(payload) <= most, "%d of %d bytes", kind, len(payload))
                if kind == server.DATA and found and found[-1][:2] == [kind, stream]:
                    found[-1][2] += bytes(payload)
                else:
                    found.append([kind, stream, bytes(payload)])
            expect(len(reader.held) <= server.TEXT_LIMIT + 8, "it holds too much")
    except server.ProtocolError as error:
        found.append(str(error))
    return found


def check_json(data: bytes) -> None:
    """A JSON object, or the one exception that is told of."""
    try:
        expect(isinstance(server.unpack_json(memoryview(data)), dict), "no object")
    except server.ProtocolError:
        pass
    for parse in (server.parse_object, parse_tokens, client.parse_file):
        try:
            parse(data)
        except ValueError as error:
            expect(str(error), "it is refused without a word")


def parse_tokens(data: bytes) -> Any:
    """The server's, when it has one."""
    return server.parse_tokens(data) if hasattr(server, "parse_tokens") else None


def find_head(pieces: Pieces, find: Callable[..., int]) -> Optional[bytes]:
    """The head at the beginning, as it comes."""
    buffer, searched = bytearray(), 0
    for piece in pieces:
        buffer += piece
        end = find(buffer, searched)
        if end:
            return bytes(buffer[:end])
        searched = len(buffer)
    return None


def read_request(pieces: Pieces, use: Any = None) -> Optional[bytes]:
    """What goes on to the service; None when it is refused or not whole."""
    try:
        found = find_head(pieces, server.find_request_head)
        if found is None:
            return None
        request = server.Request(found, "192.0.2.1")
        if use:
            use(request)
        sent: bytes = request.to_service()
        return sent
    except server.HTTPError as error:
        check_error(error)
        return None


def check_error(error: Any) -> None:
    expect(400 <= error.status < 600, "status %r", error.status)
    expect(re.fullmatch("[a-z-]+", error.code), "code %r", error.code)


def read_by_all(data: bytes) -> Message:
    """The head, which must be the same to all who read it."""
    found = head_at(data, 0, STRICT)
    assert found
    for how in READINGS:
        other = head_at(data, 0, how)
        expect(other == found, "read as %s it is %r", how.name, other)
    expect(found.end == len(data), "it goes on after its end")
    return found


def same_head(one: Optional[bytes], other: bytes) -> bool:
    """But for empty members at the end of a list."""
    heads = [head and [line.rstrip(b", \t") for line in head.split(b"\r\n")]
             for head in (one, other)]  # fmt: skip
    return heads[0] == heads[1]


def length_of(body: Any) -> Optional[int]:
    """IN_CHUNKS, a length, or None: to the end."""
    if isinstance(body, server.Chunked):
        return IN_CHUNKS
    return None if body.until_close else int(body.read_limit)


def check_framing(data: bytes, body: Any) -> None:
    """Who accepts the head too finds the end of the body in the same place."""
    ours = length_of(body)
    for how in READINGS:
        found = head_at(data, 0, how)
        theirs = framing_of(found.fields, how) if found else ours
        expect(theirs == ours, "a body of %r, read as %s of %r", ours, how.name, theirs)


def check_request(data: bytes) -> None:
    """What is passed on is read in one way only, and passed on again as it is."""
    data = data[:65536]
    sent = read_request([data])
    pieces = read_request(cut_up(data))
    expect(sent == pieces, "%r is in pieces %r", sent, pieces)
    if sent is None:
        return
    read_request([data], lambda request: check_request_framing(data, request.body))
    try:
        found = read_by_all(sent)
    except (Unclear, AssertionError) as error:
        raise Wrong("%r goes to the service: %s" % (sent, error)) from None
    expect(len(values(found.fields, b"host")) == 1, "Host in %r", sent)
    framing = values(found.fields, b"content-length")
    framing += values(found.fields, b"transfer-encoding")
    expect(len(framing) <= 1, "framing in %r", sent)
    came = values(found.fields, b"x-forwarded-for")
    expect(came == [b"192.0.2.1"], "X-Forwarded-For in %r", sent)
    if len(found.fields) <= server.FIELD_LIMIT:  # we have added some
        again = read_request([sent])
        expect(same_head(again, sent), "%r, passed on again, is %r", sent, again)
    hooked = read_request([data], lambda request: request.fields)
    assert hooked
    same = read_by_all(hooked).fields == found.fields
    expect(same, "after a hook it is %r, not %r", hooked, sent)


def check_request_framing(data: bytes, body: Any) -> None:
    """No field that frames it, and a length of 0, are the same."""
    for how in READINGS:
        found = head_at(data, 0, how)
        theirs = found and framing_of(found.fields, how) or 0
        ours = length_of(body)
        expect(theirs == ours, "a body of %r, read as %s of %r", ours, how.name, theirs)


def read_answer(data: bytes, method: str, connection: str) -> Any:
    """The answer, its body, how its head goes on, and where it ends; None when it is
    refused or not whole."""
    try:
        found = find_head([data], server.find_answer_head)
        if found is None:
            return None
        answer = server.Answer(found, method)
        unwrap = answer.section.chunked and not connection  # as to a visitor of 1.0
        body = answer.frame(unwrap)
        return answer, body, answer.to_visitor(connection, unwrap), len(found)
    except server.HTTPError as error:
        check_error(error)
        return None


def check_answer(data: bytes) -> None:
    """How it may be written is the service's matter. What goes on is the same to all;
    what the service says of the connection is ours to say."""
    data = data[:65536]
    for method in ("GET", "HEAD"):
        for connection in ("", "close", "keep-alive"):
            read = read_answer(data, method, connection)
            if read is None:
                continue
            answer, body, sent, _ = read
            if length_of(body) == IN_CHUNKS and not connection:
                body = server.UntilClose()  # to a visitor of 1.0
            try:
                found = read_by_all(sent)
            except (Unclear, AssertionError) as error:
                raise Wrong("%r goes to the visitor: %s" % (sent, error)) from None
            if not has_no_body(found.first, method.encode()):
                check_framing(sent, body)
            said = values(found.fields, b"connection")
            upgraded = answer.upgrade and answer.status in (101, 426)
            expected = ["Upgrade"] * bool(upgraded) + [connection] * bool(connection)
            wanted = [", ".join(expected).encode()] if expected else []
            expect(said == wanted, "Connection is %r in %r", said, sent)
            framing = values(found.fields, b"content-length")
            framing += values(found.fields, b"transfer-encoding")
            expect(len(framing) <= 1, "framing in %r", sent)
            if len(found.fields) > server.FIELD_LIMIT:  # with ours
                continue
            again = read_answer(sent, method, connection)
            good = again and same_head(again[2], sent)
            expect(good, "%r again is %r", sent, again)
        check_whole_answer(data, method)


def check_whole_answer(data: bytes, method: str) -> None:
    """With its body: the strictest reader has no doubt about what goes on, and where it
    has none about what came the content is the same."""
    whole, pieces = pass_on(data, method), pass_on(data, method, cut_up)
    expect(whole == pieces, "%r is in pieces %r", whole, pieces)
    if not whole:
        return
    try:
        (found,) = answers_in(whole, [method.encode()], STRICT)
    except Unclear as error:
        raise Wrong("%r goes to the visitor: %s" % (whole, error)) from None
    expect(found.whole, "%r goes to the visitor as if it was whole", whole)
    for how in READINGS[1:]:
        with contextlib.suppress(Unclear):
            (other,) = answers_in(whole, [method.encode()], how)
            expect(other == found, "%r, read as %s: %r", whole, how.name, other)
    with contextlib.suppress(Unclear):
        came = message_at(data, 0, STRICT, method.encode())
        if came and came.whole:
            expect(came.body == found.body, "%r, not %r", found.body, came.body)


def pass_on(
    data: bytes, method: str, cut: Callable[[bytes], Pieces] = lambda data: [data]
) -> Optional[bytes]:
    """What of the first answer goes on, when that is final and comes whole."""
    read = read_answer(data, method, "close")
    if not read or read[0].status < 200:
        return None
    _, body, sent, end = read
    try:
        text, _ = feed_all(cut(data[end:]), body)
    except server.HTTPError as error:
        check_error(error)
        return None
    return sent + text if body.done or body.until_close else None


def feed_all(pieces: Pieces, body: Any) -> Tuple[bytes, int]:
    """What goes on of a body, and how many bytes of the pieces it had. What is not
    consumed comes again with more. Raises HTTPError."""
    rest, text, consumed = b"", b"", 0
    for piece in pieces:
        rest += piece
        good = -1
        while good and not (body.done or body.until_close and not rest):
            good = body.feed(memoryview(rest))
            text += rest[:good] if body.replaced is None else body.replaced
            consumed, rest = consumed + good, rest[good:]
        fits = body.done or len(rest) <= server.CHUNK_LINE_LIMIT
        expect(fits, "it holds %r", rest)
        if body.done:
            break
    return text, consumed


def check_chunks(data: bytes) -> None:
    """Whole or in pieces: the same content, and the same end; to all who read it. A
    visitor's have to be by the grammar. A service's are, when they go on."""
    data = data[:MANY_CHUNKS]
    whole, pieces = read_chunks([data], False), read_chunks(cut_up(data), False)
    expect(whole == pieces, "%r is in pieces %r", whole, pieces)
    answer, pieces = read_chunks([data], True), read_chunks(cut_up(data), True)
    expect(answer == pieces, "%r is in pieces %r", answer, pieces)
    if answer and answer[2]:
        check_text_of_chunks(answer[3], answer[0])
    if not (whole and whole[2]):
        return
    expect(answer, "a service's chunks are refused, a visitor's are not")
    expect(whole[3] == data[: whole[1]], "%r goes on", whole[3])
    check_text_of_chunks(whole[3], whole[0])


def check_text_of_chunks(text: bytes, content: bytes) -> None:
    """It is read so by all, and is itself what goes on of it."""
    again = read_chunks([text], False)
    expected = content, len(text), True, text
    expect(again == expected, "alone it is %r, not %r", again, expected)
    for how in READINGS:
        try:
            read = chunks_at(text, 0, how)
        except Unclear:
            expect(how is not STRICT, "%r goes on, but breaks the grammar", text)
            continue
        expect(read == expected[:3], "%r is %r when read as %s", text, read, how.name)


def read_chunks(
    pieces: Pieces, tolerant: bool
) -> Optional[Tuple[bytes, int, bool, bytes]]:
    """Content, end, whether it is done, and what goes on."""
    try:
        body, inside = server.Chunked(tolerant), server.Chunked(tolerant, unwrap=True)
        text, end = feed_all(pieces, body)
        content, same = feed_all(pieces, inside)
        expect(end == same, "without chunk lines it ends at %d, not at %d", same, end)
        return content, end, body.done, text
    except server.HTTPError as error:
        check_error(error)
        return None


def check_text(data: bytes) -> None:
    """Targets, hosts, domains and names, as a command line or a file has them."""
    text = data.decode("utf-8", "surrogateescape")
    name, _, value = text.partition("=")
    calls: List[Callable[[], Tuple[Any, int]]] = [
        lambda: client.split_host(text, 8001),
        lambda: client.parse_target(text)[1:],
        lambda: client.parse_service({"target": text}).target[1:],
        lambda: client.parse_services([(name, value)]) and ("a", 1),
    ]
    for call in calls:
        try:
            found, port = call()
        except ValueError as error:
            expect(str(error), "it is refused without a word")
            continue
        expect(found and 0 <= port < 65536, "%r is %r", text, (found, port))
    check_names(*(text + "\n").split("\n")[:2])


def check_names(domains: str, name: str) -> None:
    """Whatever --domain was taken: any host is somebody's, or nobody's."""
    try:
        parsed = server.parse_domains(domains)
    except ValueError as error:
        expect(str(error), "it is refused without a word")
        parsed = []
    names = server.Names(parsed, {ID, "tim"})
    host = server.HOST.fullmatch(name)
    if host:
        asked = host.group(1).rstrip(".").lower()
        id, service = names.find(asked)
        expect(id is not None or service is None, "%r: service of nobody", asked)
        expect(parsed or id in (None, ID, "tim"), "%r: id %r", asked, id)
        names.is_base(asked)
        names.base(asked)
    for text in (names.link("web", name, "http"), names.url("tim", "web", name)):
        expect(re.match("https?://web[.]|error: ", text), "URL %r", text)


def find_in_preface(parse: Callable[[bytearray], Any], pieces: Pieces) -> Any:
    """What is found in the first bytes of a connection, as they come."""
    buffer = bytearray()
    try:
        for piece in pieces:
            buffer += piece
            found = parse(buffer)
            if found is not None:
                return found
    except server.ProtocolError:
        return "refused"
    return None


def check_prefaces(data: bytes) -> None:
    """Whole or in pieces: the same name in a ClientHello, the same PROXY header. A name
    has only letters that names have; an address is one."""
    data = data[: server.PREFACE_LIMIT] or b"\0"
    whole = find_in_preface(server.ClientHello().parse, [data])
    pieces = find_in_preface(server.ClientHello().parse, cut_up(data))
    expect(whole == pieces, "a hello of %r is in pieces %r", whole, pieces)
    name = whole[0] if whole else ""
    expect(re.fullmatch("[a-z0-9_.-]{0,255}", name), "the name %r", name)
    whole = find_in_preface(server.parse_proxy_header, [data])
    pieces = find_in_preface(server.parse_proxy_header, cut_up(data))
    expect(whole == pieces, "a header of %r is in pieces %r", whole, pieces)
    ends = whole[0] if isinstance(whole, tuple) else None
    if ends:
        for address in (ends.address, ends.to):
            expect(server.read_address(address) == address, "address %r", address)


def check_forwarded(data: bytes) -> None:
    """Whoever a front says comes: an address, or nobody."""
    text = data.decode("latin-1").replace("\r", "").replace("\n", "")
    raw = "\r\nX-Forwarded-For: %s\r\nX-Forwarded-Proto: %s" % (text, text)
    fronts = server.Fronts(["10.0.0.0/8", "2001:db8::/32"], False)
    address, scheme, _ = fronts.read(raw, "10.0.0.1", "http")
    known = server.read_address(address) == address or address == "unknown"
    expect(known and scheme in ("http", "https"), "%r by %r", address, scheme)


def hello() -> bytes:
    """As OpenSSL says it."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    with contextlib.suppress(ssl.SSLWantReadError):
        incoming = ssl.MemoryBIO()
        context.wrap_bio(incoming, outgoing, False, "web.tim.x").do_handshake()
    return outgoing.read()


PROXY_2 = b"\r\n\r\n\0\r\nQUIT\n"
PREFACES = [
    hello(),
    b"PROXY UNKNOWN\r\nGET / HTTP/1.1\r\n",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n",
    b"PROXY TCP6 2001:db8::7 ::ffff:192.0.2.1 4711 443\r\n",
    PROXY_2 + b"\x21\x11\0\x0c" + bytes.fromhex("c0000207c0000201126701bb"),
    PROXY_2 + b"\x21\x21\0\x24" + bytes(36) + b"GET",
    PROXY_2 + b"\x20\0\0\0",
]
FORWARDED = [b"203.0.113.9, 10.1.1.1", b"[2001:db8::7]:47, 10.1.1.1:80", b"https, http"]


def encoded(frames: Sequence[Sequence[Frame]]) -> Pieces:
    return [b"".join(one.packed() for one in some) for some in frames]


TARGETS: List[Tuple[Callable[[bytes], None], Pieces]] = [
    (check_request, REQUESTS),
    (check_answer, ANSWERS),
    (check_chunks, [CHUNKS, PARTS, chunk(b"abc", b";a=b;c") + PARTS + PLAIN]),
    (check_frames, encoded(ALL_FRAMES)),
    (check_json, FILES + [one.payload for one in (LOGIN, SERVICES, GOODBYE, OPENED)]),
    (check_text, TEXTS),
    (check_prefaces, PREFACES),
    (check_forwarded, FORWARDED),
]


# -----------------------------------------------------------------------------------
# Running the checks: an input is a byte that says which, and what it is given.
# -----------------------------------------------------------------------------------
def on_alarm(*_: Any) -> NoReturn:
    raise Wrong("it takes more than %d s" % SLOW)


def place_of(error: BaseException) -> str:
    """The line of the scripts, or else of ours, where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    product = [one for one in frames if "mdm_tunnel" in one.filename]
    last = (product or frames)[-1]
    return "%s:%s" % (Path(last.filename).name, last.name)


class Parsers:
    """Tries inputs until the time is up, and keeps what it finds."""

    def __init__(self, seconds: float, seed: int, report: str) -> None:
        self.until = time.monotonic() + seconds
        self.report = report
        self.mutator = Mutator(seed)
        self.inputs = 0
        self.finds: Dict[Tuple[str, str, str], Dict[str, str]] = {}
        signal.signal(signal.SIGVTALRM, on_alarm)

    def one(self, data: bytes) -> None:
        """An input; ends the process when the time is up."""
        if time.monotonic() > self.until:
            self.end()
        self.inputs += 1
        check = TARGETS[(data[0] if data else 0) % len(TARGETS)][0]
        signal.setitimer(signal.ITIMER_VIRTUAL, SLOW)
        try:
            check(data[1:])
        except Exception as error:
            where = check.__name__, type(error).__name__, place_of(error)
            if where not in self.finds and len(self.finds) < MOST_FINDS:
                cause = "%s: %s at %s: %.600s" % (*where, error)
                self.finds[where] = {"cause": cause, "data": shown(data[1:])}
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def end(self) -> NoReturn:
        text = json.dumps({"inputs": self.inputs, "finds": list(self.finds.values())})
        Path(self.report).write_text(text)
        os._exit(0)

    def seeds(self) -> Iterator[bytes]:
        for number, (_, seeds) in enumerate(TARGETS):
            for seed in seeds:
                yield bytes((number,)) + seed

    def change(self, data: bytes) -> bytes:
        """A mutation that fits the target."""
        number, rest = (data[0] if data else 0) % len(TARGETS), data[1:]
        check = TARGETS[number][0]
        if check is check_json:
            rest = self.mutator.json(rest)
        elif check is check_frames and self.mutator.random.random() < 0.7:
            seed = self.mutator.random.choice(ALL_FRAMES)
            rest = self.mutator.frames(seed, (1, 2, 3))
        else:
            rest = self.mutator.mutate(rest)
        return bytes((number,)) + rest

    def run(self) -> NoReturn:
        """With our own mutator: seeds, and what has become of them."""
        pool = list(self.seeds())
        first = len(pool)
        for seed in pool:
            self.one(seed)
        while True:
            data = self.change(self.mutator.random.choice(pool))
            self.one(data)
            if len(data) < 5000 and self.mutator.random.random() < 0.1:
                pool.append(data)
            if len(pool) > 4 * first:
                del pool[self.mutator.random.randrange(first, len(pool))]

    def run_atheris(self, atheris: Any, seed: int, corpus: str) -> None:
        """With a fuzzer that keeps what reaches new lines, and goes on from there."""
        for number, data in enumerate(self.seeds()):
            Path(corpus, str(number)).write_bytes(data)

        def mutate(data: bytes, most: int, _: int) -> bytes:
            if self.mutator.random.random() < 0.6:
                return self.change(data)[:most]
            changed: bytes = atheris.Mutate(data, most)
            return changed

        options = "-max_len=70000 -len_control=0 -rss_limit_mb=0 -verbosity=0 -seed=%d"
        options %= seed & 0x7FFFFFFF or 1
        arguments = ["fuzz", corpus, *options.split()]
        atheris.Setup(arguments, self.one, custom_mutator=mutate)
        atheris.Fuzz()


def main(seconds: str, seed: str, report: str, corpus: str) -> None:
    """Try the parsers: with atheris when `corpus` names a directory."""
    if corpus:
        atheris: Any = importlib.import_module("atheris")
        scripts = ["mdm_tunnel_server", "mdm_tunnel_client"]
        with atheris.instrument_imports(include=scripts):
            load()
        parsers = Parsers(float(seconds), int(seed), report)
        parsers.run_atheris(atheris, int(seed), corpus)
    else:
        load()
        Parsers(float(seconds), int(seed), report).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
