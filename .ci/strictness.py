"""Raw requests through our tunnel, HAProxy and nginx, and raw answers of a service back
through the same. The rows are in .ci/corpus. To see what becomes of each:

    .ci/venv/bin/python .ci/strictness.py            all
    .ci/venv/bin/python .ci/strictness.py differ     where somebody disagrees
    .ci/venv/bin/python .ci/strictness.py answers    one of the two tables
    .ci/venv/bin/python .ci/strictness.py in DIR     with the two scripts of that folder

We are strict with visitors: who sends a request chooses what to send. So a request that
we accept and another refuses has to be among REASONS. We are tolerant with services,
which nobody can change: an answer that one of the others passes on, and that all who
pass it on read in one way, has to arrive. The corpus says what each visitor has to get;
where that is not what the others make of it, it has to be among ANSWER_REASONS. In both
directions a strict reader (.ci/reference.py) has to take what we pass on.

Each row goes over a connection of its own. One more request, for /last, follows: it
shows who takes it for a part of the row, or a part of the row for its answer.
"""

import asyncio
import functools
import re
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import parts
from parts import HAPROXY_FRONT, NGINX_FRONT, Client, Process, Server, World
from parts import free_ports, start_haproxy, start_nginx
from reference import CHUNKED, UNTIL_CLOSE, Faulty, Head, Message
from reference import read_answer, read_body, read_request
from rows import Row, read_rows, unescape

LANES = 8  # rows that are under way at once through each system
PATIENCE = 1.0  # seconds without a byte after which somebody waits for more
REFUSAL = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"


# -----------------------------------------------------------------------------------
# The service
# -----------------------------------------------------------------------------------
FRAMING = (b"content-length", b"transfer-encoding")
HOST = re.compile(rb"(?:[0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")


def judge_head(head: Head, host: bytes) -> None:
    """What must hold of a request that we pass on, beyond its grammar, or Faulty."""
    hosts = head.values(b"host")
    if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
        raise Faulty("Host %r" % hosts)
    if not hosts[0].lower().startswith(host):
        raise Faulty("Host of somebody else: %r" % hosts)
    upgrade = b",".join(head.values(b"upgrade")).lower()
    if b"h2c" in re.split(b"[^0-9a-z]+", upgrade):
        raise Faulty("Upgrade: %r" % upgrade)
    for name, _ in head.fields:
        if b"_" in name and name.replace(b"_", b"-") in FRAMING:
            raise Faulty("%r, which CGI cannot tell from framing" % name)
    named = b",".join(head.values(b"connection")).lower()
    if re.search(b"host|content-length|transfer-encoding", named):
        raise Faulty("Connection: %r" % named)


class Service:
    """Gives the request for /last, and when no row is set as `says` every request, an
    answer that is in order; the others what `says` has."""

    def __init__(self, host: str) -> None:
        self.host = host.encode()
        self.says: Optional[Row] = None
        self.forget()

    def forget(self) -> None:
        self.whole = 0  # requests
        self.faults: List[str] = []

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await self.talk(reader, writer)
        except OSError:
            pass
        writer.close()

    async def talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        data = b""
        while True:
            piece = await reader.read(1 << 16)
            if not piece:
                return
            try:
                data = self.take(data + piece, writer)
            except Faulty as fault:
                self.faults.append(str(fault))
                writer.write(REFUSAL)
                return
            except EOFError:
                await reader.read()
                return

    def take(self, data: bytes, writer: asyncio.StreamWriter) -> bytes:
        """Answer what is whole; the rest. Raises Faulty, and EOFError when nothing more
        will be answered."""
        while data:
            message = read_request(data)
            if not message:
                break
            judge_head(message.head, self.host)
            early = self.says is not None and "early" in self.says.options
            if not message.whole and not early:
                break
            data = data[message.body.end :]
            self.whole += 1
            self.answer(message.head, writer)
        return data

    def answer(self, head: Head, writer: asyncio.StreamWriter) -> None:
        method, target, _ = head.first.split(b" ")
        if target == b"/last":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlast")
        elif self.says:
            writer.write(self.says.raw)
            if "closes" in self.says.options:
                writer.write_eof()
                raise EOFError
        else:
            body = b"" if method == b"HEAD" else b"ok"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + body)


# -----------------------------------------------------------------------------------
# The visitor
# -----------------------------------------------------------------------------------
class Verdict(NamedTuple):
    """What became of a row through one of the systems."""

    answers: List[Tuple[int, bytes]]  # status and body of each that came whole
    end: str  # "closed", "cut", "waits", or "bad": the rest is no HTTP
    faults: List[str]  # what the service, or the visitor, got

    @property
    def accepted(self) -> int:
        """How many were, before the first that was not."""
        good = [status < 400 for status, _ in self.answers]  # the rest: their own words
        return (good + [False]).index(False)

    @property
    def outcome(self) -> str:
        """What a visitor gets of a service's answer, `status:body`, or "" of it."""
        if not self.answers or self.answers[0][0] in (500, 502, 503, 504):
            return ""
        return "%d:%s" % (self.answers[0][0], self.answers[0][1].decode("latin-1"))

    def __str__(self) -> str:
        words = [str(status) for status, _ in self.answers]
        if self.end != "closed" or not words:
            words.append(self.end)
        return " ".join(words) + (" !" if self.faults else "")


async def exchange(port: int, raw: bytes) -> Tuple[bytes, str]:
    """Send it all; what came back, and how it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    came, end = b"", "closed"
    try:
        writer.write(raw)
        while True:
            piece = await asyncio.wait_for(reader.read(1 << 16), PATIENCE)
            if not piece:
                break
            came += piece
    except asyncio.TimeoutError:
        end = "waits"
    except OSError:
        end = "cut"
    writer.close()
    return came, end


def read_answers(data: bytes, end: str, method: bytes) -> Verdict:
    """What a visitor makes of it. Where it is not strictly HTTP, it is a fault."""
    answers: List[Tuple[int, bytes]] = []
    faults: List[str] = []
    while data:
        try:
            message = read_answer(data, method, closed=end == "closed")
        except Faulty as fault:
            faults.append(str(fault))
            message = read_loosely(data, method, end == "closed")
            if not message:
                return Verdict(answers, "bad", faults)
        if not message or not message.whole:
            return Verdict(answers, "waits" if end == "waits" else "cut", faults)
        if message.status == 101 or message.status >= 200:
            answers.append((message.status, message.body.content))
            method = b"GET"
        data = data[message.body.end :]
    return Verdict(answers, end, faults)


def read_loosely(data: bytes, method: bytes, closed: bool) -> Optional[Message]:
    """As a browser reads, which knows the last hop's framing and asks no questions."""
    text, empty_line, _ = data.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[0-9] ([0-9]{3})\b", text)
    if not status or not empty_line:
        return None
    lengths = re.findall(rb"(?mi)^content-length:[\t ]*([0-9]+)[\t ]*\r?$", text)
    bodiless = method == b"HEAD" or status.group(1) in (b"204", b"304")
    if bodiless or status.group(1) < b"200":
        length = 0
    elif re.search(rb"(?mi)^transfer-encoding:[\t ]*chunked[\t ]*\r?$", text):
        length = CHUNKED
    else:
        length = int(lengths[-1]) if lengths else UNTIL_CLOSE
    end = len(text) + 4
    try:
        return Message(Head(text, [], end), read_body(data, end, length, closed))
    except Faulty:
        return None


# -----------------------------------------------------------------------------------
# Lanes: a visitor, a system, and a service
# -----------------------------------------------------------------------------------
class Lane:
    """One way to one service, on which rows go one after the other."""

    def __init__(self, port: int, service_port: int, host: str) -> None:
        self.port, self.service_port = port, service_port
        self.host = host.encode()
        self.service = Service(host)

    async def ask(self, row: Row) -> Verdict:
        """A request, and another."""
        raw = (row.raw + LAST).replace(b"{host}", self.host)
        method = b"HEAD" if row.raw.startswith(b"HEAD ") else b"GET"
        self.service.forget()
        came, end = await exchange(self.port, raw)
        verdict = read_answers(came, end, method)
        faults = verdict.faults + self.service.faults
        if self.service.whole > sum(status < 400 for status, _ in verdict.answers):
            faults.append("the service saw %d whole requests" % self.service.whole)
        return verdict._replace(faults=faults)

    async def hear(self, row: Row) -> Verdict:
        """An answer, and that to another request."""
        method = b"HEAD" if "HEAD" in row.options else b"GET"
        raw = self.request_for(row, method).replace(b"{host}", self.host)
        self.service.says = row
        came, end = await exchange(self.port, raw)
        self.service.says = None
        verdict = read_answers(came, end, method)
        if b"poison" in came:
            verdict.faults.append("poison")
        if verdict.answers[1:] not in ([], [(200, b"last")]):
            verdict.faults.append("answers that nobody asked for")
        if "1.0" in row.options and re.search(rb"(?i)\ntransfer-encoding:", came):
            verdict.faults.append("chunks for a visitor of HTTP/1.0")
        return verdict

    def request_for(self, row: Row, method: bytes) -> bytes:
        """What the visitor sends to get that answer."""
        if "early" in row.options:
            return b"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 10\r\n\r\nhalf"
        if "1.0" in row.options:
            return b"GET / HTTP/1.0\r\nHost: {host}\r\n\r\n"
        return method + b" / HTTP/1.1\r\nHost: {host}\r\n\r\n" + LAST


# -----------------------------------------------------------------------------------
# Systems: each has a door for every lane, and behind it that lane's service
# -----------------------------------------------------------------------------------
NAMES = ["raw%d" % number for number in range(LANES)]
TOLERANT = "  option accept-invalid-http-response\n"
NGINX_KEPT = """
  upstream kept%d { server 127.0.0.1:%d; keepalive 8; }
  server {
    listen 127.0.0.1:%d;
    location / {
      proxy_pass http://kept%d;
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_set_header Connection "";
    }
  }
"""


def open_ours(server: Server, services: List[int]) -> List[int]:
    Client(server, "strict", dict(zip(NAMES, services)))
    return [server.port] * LANES


def open_haproxy(services: List[int], options: str = "") -> List[int]:
    doors = free_ports(LANES)
    pairs = zip(doors, services)
    fronts = [HAPROXY_FRONT % (door, door, port) + options for door, port in pairs]
    start_haproxy("strict-haproxy%d" % doors[0], "".join(fronts), *doors)
    return doors


def open_nginx(services: List[int]) -> List[int]:
    doors = free_ports(LANES)
    fronts = [NGINX_FRONT % pair for pair in zip(doors, services)]
    start_nginx("strict-nginx", "".join(fronts), *doors)
    return doors


def open_nginx_kept(services: List[int]) -> List[int]:
    """Its connections to the service are kept, as is usual where speed counts."""
    doors = free_ports(LANES)
    pairs = zip(doors, services)
    fronts = [NGINX_KEPT % (door, port, door, door) for door, port in pairs]
    start_nginx("strict-nginx-kept", "".join(fronts), *doors)
    return doors


# -----------------------------------------------------------------------------------
# Reasons; the rows by name
# -----------------------------------------------------------------------------------
Reasons = Dict[str, List[str]]

# Why we accept what another refuses.
REASONS: Reasons = {
    "a method is any token (RFC 9110 9.1); the service decides": [
        "line: TRACE / HTTP/1.1",
        "line: get / HTTP/1.1",
        "line: GeT / HTTP/1.1",
        "line: G1 / HTTP/1.1",
        "line: 1 / HTTP/1.1",
        "line: !#$%&'*+.^`|~ / HTTP/1.1",
        "pipeline: after a TRACE with a length",
        "pipeline: after a body one too long",  # the next method is `!GET`
    ],
    "OPTIONS has this form (RFC 9112 3.2.4)": [
        "line: OPTIONS * HTTP/1.1",
        "pipeline: after OPTIONS *",
    ],
    "we do not decode paths: the service gets what was sent": [
        "target: /../x",
        "target: /%00",
        "target: /%zz",
        "target: /%",
    ],
    "bytes from 0x80 up go on as they are: curl sends them": [
        r"target: /\xe4",
        "byte: target, ff",
        "byte: target, behind, 80",
        "byte: target, behind, 85",
        "byte: target, behind, a0",
        "byte: target, behind, ff",
    ],
    "a query may follow the host at once (RFC 3986 3): HAProxy takes it for the host": [
        "target: http://H?q",
    ],
    "the target's host counts, that of Host is dropped (RFC 9112 3.2.2)": [
        "target: http://H.:80/",
        r"authority: http://H/ HTTP/1.1\r\nHost: other.example",
    ],
    "a tab is OWS (RFC 9110 5.6.3); the service gets none": [
        r"host: Host:\tH\t",
        r"host in 1.0: Host:\tH\t",
        r"length: \t5\t",
        r"coding: \tchunked\t",
        "byte: Host, before, 09",
        "byte: Host, behind, 09",
        "byte: length, before, 09",
        "byte: length, behind, 09",
        "byte: coding, before, 09",
        "byte: coding, behind, 09",
    ],
    "not the option `close` (RFC 9110 7.6.1): nginx looks for the letters": [
        'connection: "close"',
        "connection: close;a",
        "connection: close close",
    ],
    "the key of a WebSocket is between the visitor and the service (RFC 6455 4)": [
        "pipeline: after a request for a WebSocket without key",
    ],
    "everybody has limits of their own; ours are 16 KiB a line, 64 KiB, 200 fields": [
        "long: target of 9000",
        "long: target of 15000",
        "long: value of 9000",
        "long: value of 14000",
        "long: value of 60000",
        "long: name of 1000",
        "long: name of 9000",
        "long: 199 fields",
    ],
}

# Why the visitor has to get something else than what HAProxy and nginx make of it: one
# passes it on and we do not, they read it in two ways, or both refuse it.
ANSWER_REASONS: Reasons = {
    "control characters: there is no way to say them (RFC 9110 5.5)": [
        r"byte in a value: \x00",
        r"byte in a value: \x01",
        r"byte in a value: \x08",
        r"byte in a value: \x0b",
        r"byte in a value: \x0c",
        r"byte in a value: \x1b",
        r"byte in a value: \x1f",
        r"byte in a value: \x7f",
        r"status: HTTP/1.1 200 O\x00K",
        r"field: A: b\x00c",
        r"field: A: b\x1bc",
        r"field: A: b\x7fc",
        "field report: control character in a value",
        r"both: Content-Length: 15\r\nA: b\x00Transfer-Encoding: chunked",
    ],
    "a bare CR at the end of a line: some readers end the line there (RFC 9112 2.2)": [
        r"field: A: b\r",
        r"end: HTTP/1.1 200 OK\r\nContent-Length: 5\r\r\n\r\nhello",
        r"end: HTTP/1.1 200 OK\r\nA: b\r\r\nContent-Length: 5\r\n\r\nhello",
        r"byte behind a length: \r",
    ],
    "one empty line before an answer is tolerated, more are no HTTP": [
        r"end: \r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ],
    "white space before a colon is removed (RFC 9112 5.1)": [
        "field: A : b",
        r"field: A\t: b",
        "field: Content-Length : 5",
        r"field: Content-Length\t: 5",
        r"length: \s5\r\nContent-Length : 5",
        "first field: Content-Length : 5",
        r"first field: Content-Length\t : 5",
        "field report: space before colon",
        r"both: Content-Length: 15\r\nTransfer-Encoding : chunked",
        r"both: Content-Length: 15\r\nTransfer-Encoding\t: chunked",
        r"both: Content-Length : 15\r\nTransfer-Encoding: chunked",
        r"coding: \schunked\r\nTransfer-Encoding : chunked",
    ],
    "a coding that curl undoes and Chromium does not; nginx looks for the letters": [
        r"coding: \sgzip, chunked",
        r"coding: \schunked, gzip",
        r"coding: \sx, chunked",
        r"coding: \sdeflate, chunked",
        r"coding: \sgzip\r\nTransfer-Encoding: chunked",
        r"coding: \schunked\r\nTransfer-Encoding: x",
        r"coding: \sxchunked",
        r"coding: \schunked;q=1",
        r'coding: \s"chunked"',
        r"coding: \s\x0bchunked",
        r"coding: \schunked\xa0",
        r"coding: \schunked chunked",
        r"coding: \s'chunked'",
        r"coding: \schunked;",
        r'coding to the end: \s"identity"',
        r"coding to the end: \sgzip",
        r"coding to the end: \sx",
        r"coding to the end: \schunk",
        r"coding to the end: \snone",
        r"both: Content-Length: 15\r\nTransfer-Encoding: gzip",
        r"both: Content-Length: 15\r\nTransfer-Encoding: x",
        r"both: Content-Length: 15\r\nTransfer-Encoding: gzip, chunked",
    ],
    "an empty member of a list is nothing (RFC 9110 5.6.1): HAProxy leaves it there": [
        r"coding: \schunked,",
    ],
    "any number of 1xx may come first (RFC 9110 15.2), which nginx does not know": [
        "answer: 100 with a length of 0",
        "answer at the end: 100 and nothing",
    ],
    "a status is three digits from 100 on, behind a space; Chromium makes up others": [
        "status: HTTP/1.1 200.1 OK",
        r"status: HTTP/1.1\t200 OK",
        "answer: 99 before",
    ],
    "a 101 that nobody asked for": [
        "answer: 101 unasked, with a body",
    ],
    "no length: RFC 9112 6.3 asks for a 502, which curl does; nginx reads to the end": [
        "answer at the end: empty length",
        "answer at the end: bad length",
    ],
    "no chunk size: nginx passes over what follows the digits": [
        r"chunk: 5 5\r\nhello\r\n0\r\n\r\n",
    ],
    "folded, and then a list as any other": [
        r"coding: \schunked\r\n , identity",
    ],
    "Chromium takes no chunks from HTTP/1.0, in which they are faulty (RFC 9112 6.1)": [
        "answer at the end: chunks in 1.0",
        "answer at the end: chunks and length in 1.0",
    ],
    "before a status line Chromium takes four bytes, and no more": [
        r"end: \r\n\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ],
    "lengths that differ: Chromium refuses them after HEAD too": [
        "answer to HEAD: two lengths",
    ],
    "what is cut must not look whole": [
        "old visitor, at the end: no last chunk",
    ],
    "everybody has limits of their own; ours are 64 KiB, 200 fields, 100 times 1xx": [
        r"chunk: 5;{70000*a}\r\nhello\r\n0\r\n\r\n",
        "chunk: trailer of 70000",
        "chunk: 300 trailers",
        "answer: 250 fields",
        "answer: 300 fields",
        "answer: 200 times 100",
        "answer: value of 20000",
    ],
}


# -----------------------------------------------------------------------------------
# Tables
# -----------------------------------------------------------------------------------
Opener = Callable[[List[int]], List[int]]
Verdicts = Dict[str, Verdict]  # by the name of a system, where nothing else is said


class Table:
    """What becomes of every row of a file through each system."""

    def __init__(self, corpus: str, reasons: Reasons, **systems: Opener) -> None:
        """`systems` are those beside which ours stands."""
        self.rows = read_rows(corpus)
        self.reasons = {row: why for why, rows in reasons.items() for row in rows}
        self.systems = systems
        self.found: Dict[str, Verdicts] = {}  # by row

    async def walk(self, lane: Lane, row: Row) -> Verdict:
        raise NotImplementedError

    def passed(self, verdict: Verdict) -> object:
        """What of it counts; it is false when the row was refused."""
        raise NotImplementedError

    def judge(self, row: Row, verdicts: Verdicts) -> Iterator[str]:
        """What is wrong."""
        raise NotImplementedError

    def measure(self, server: Server) -> None:
        before = len(Process.all)
        openers: Dict[str, Opener] = dict(ours=functools.partial(open_ours, server))
        openers.update(self.systems)
        lanes = {name: self.open_lanes(opener) for name, opener in openers.items()}
        try:
            asyncio.run(asyncio.wait_for(self.walk_all(lanes), 100))
        finally:
            for process in Process.all[before:]:
                process.stop()

    def open_lanes(self, opener: Opener) -> List[Lane]:
        services = free_ports(LANES)
        hosts = [name + ".strict.localhost" for name in NAMES]
        return [Lane(*lane) for lane in zip(opener(services), services, hosts)]

    async def walk_all(self, systems: Dict[str, List[Lane]]) -> None:
        said: Dict[str, Verdicts] = {name: {} for name in systems}  # by row
        servers, walks = [], []
        for name, lanes in systems.items():
            rows = iter(self.rows)  # which the lanes share
            for lane in lanes:
                service = lane.service.serve, "127.0.0.1", lane.service_port
                servers.append(await asyncio.start_server(*service))
                walks.append(self.walk_lane(lane, rows, said[name]))
        await asyncio.gather(*walks)
        for server in servers:
            server.close()
        for row in self.rows:
            self.found[row.name] = {name: said[name][row.name] for name in systems}

    async def walk_lane(self, lane: Lane, rows: Iterator[Row], said: Verdicts) -> None:
        for row in rows:
            said[row.name] = await self.walk(lane, row)

    def complain(self) -> List[str]:
        wrong = [
            "there is no row %s" % row for row in set(self.reasons) - set(self.found)
        ]
        for row in self.rows:
            verdicts = self.found[row.name]
            said = ", ".join("%s %s" % pair for pair in verdicts.items())
            for why in self.judge(row, verdicts):
                wrong.append("%s: %s (%s)" % (row.name, why, said))
        return wrong

    def count(self) -> str:
        """How many each refuses."""
        refused = []
        for name in ("ours", *self.systems):
            passed = [self.passed(said[name]) for said in self.found.values()]
            refused.append("%d by %s" % (sum(not one for one in passed), name))
        return "of %d are refused %s" % (len(self.rows), ", ".join(refused))

    def check(self, server: Server) -> str:
        self.measure(server)
        wrong = self.complain()
        assert not wrong, "%d faults:\n%s" % (len(wrong), "\n".join(wrong))
        return self.count()


class Requests(Table):
    def __init__(self) -> None:
        super().__init__(
            "requests.txt", REASONS, HAProxy=open_haproxy, nginx=open_nginx
        )

    async def walk(self, lane: Lane, row: Row) -> Verdict:
        return await lane.ask(row)

    def passed(self, verdict: Verdict) -> object:
        return verdict.accepted

    def judge(self, row: Row, verdicts: Verdicts) -> Iterator[str]:
        ours = verdicts["ours"]
        if ours.faults:
            yield "; ".join(ours.faults)
        elif ours.accepted > min(verdict.accepted for verdict in verdicts.values()):
            if row.name not in self.reasons:
                yield "we accept it, and another does not"


class Answers(Table):
    def __init__(self) -> None:
        others: Dict[str, Opener] = {
            "HAProxy": open_haproxy,
            "nginx": open_nginx_kept,
            "tolerant": functools.partial(open_haproxy, options=TOLERANT),
        }
        super().__init__("answers.txt", ANSWER_REASONS, **others)

    async def walk(self, lane: Lane, row: Row) -> Verdict:
        return await lane.hear(row)

    def passed(self, verdict: Verdict) -> object:
        return verdict.outcome

    def judge(self, row: Row, verdicts: Verdicts) -> Iterator[str]:
        ours, want = verdicts["ours"], wanted(row)
        if ours.outcome != want:
            yield "the visitor has to get %r, not %r" % (
                want or "no",
                ours.outcome or "no",
            )
        if ours.faults:
            yield "; ".join(ours.faults)
        others = {verdicts[name].outcome for name in ("HAProxy", "nginx")}
        passed = others - {""} or {""}
        if passed != {want} and row.name not in self.reasons:
            yield "%r is not what the others make of it" % want


def wanted(row: Row) -> str:
    """The outcome that the corpus asks for; the body is `hello` where it says none."""
    status, colon, body = row.want.partition(":")
    if status == "no":
        return ""
    return "%s:%s" % (status, unescape(body).decode("latin-1") if colon else "hello")


def strictness_with_requests(world: World) -> str:
    """Where we accept what HAProxy or nginx refuses there is a reason."""
    return Requests().check(world.server)


def strictness_with_answers(world: World) -> str:
    """What HAProxy or nginx passes on arrives, or there is a reason."""
    return Answers().check(world.server)


# -----------------------------------------------------------------------------------
# By hand
# -----------------------------------------------------------------------------------
def show(table: Table, differing: bool) -> None:
    """One line a row: ! where something is wrong, * where there is a reason."""
    names = ["ours", *table.systems]
    print("\n  %-60s %s" % ("", " ".join("%-14s" % name for name in names)))
    for row in table.rows:
        verdicts = table.found[row.name]
        wrong = list(table.judge(row, verdicts))
        same = len({table.passed(verdict) for verdict in verdicts.values()}) == 1
        if same and differing and not wrong:
            continue
        mark = "!" if wrong else "*" if row.name in table.reasons else " "
        cells = " ".join("%-14s" % str(verdict)[:14] for verdict in verdicts.values())
        note = "; ".join(wrong) or table.reasons.get(row.name, "")
        print("%s %-60s %s %s" % (mark, row.name[:60], cells, note))
    print(table.count())


def main(words: List[str]) -> None:
    if "in" in words:
        parts.REPOSITORY = Path(words[words.index("in") + 1]).resolve()
    start = time.monotonic()
    server = Server()
    for name, table in (("requests", Requests()), ("answers", Answers())):
        if name in words or not {"requests", "answers"} & set(words):
            table.measure(server)
            show(table, "differ" in words)
    print("%.1f s" % (time.monotonic() - start))


if __name__ == "__main__":
    main(sys.argv[1:])
