#!/usr/bin/env python3
"""mdm-tunnel server: the public end of a reverse tunnel, in one file.

    python3 mdm_tunnel_server.py -v        visitors on port 8000, clients on port 8001

A client behind a NAT dials in and stays; visitors' HTTP and WebSocket requests go to it
by the name in their Host field, `service.id.example.com`:

    visitor --TCP--> Visitor --Exchange--> Stream ==Link==> client --TCP--> service

A request's way through this file: a Listener accepts a Visitor, who reads a head; the
Router names the id and the service; an Exchange takes the request to a Stream of the
Tunnel on which that id is logged in, and the answer back. Read on in that order: the
wire and the machinery that the client has too, then HTTP, names, tunnels, visitors,
the server. Nothing here needs more than the standard library of Python 3.6.
"""

from typing import NamedTuple, Pattern

# ===================================================================================
# SHARED BLOCK: begins. The same lines stand in both scripts; a test compares them.
# ===================================================================================
import argparse
import collections
import contextlib
import enum
import errno
import functools
import heapq
import itertools
import json
import mmap
import os
import re
import selectors
import signal
import socket
import stat
import struct
import sys
import time
from typing import Any, Callable, Deque, Dict, List, NoReturn, Optional, Set, Tuple

VERSION = "1.0.0"
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
Call = Callable[..., Any]
DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40  # as `logging` has them

# -----------------------------------------------------------------------------------
# Protocol
#
# The client dials the server and asks, in HTTP, to go over to `mdm-tunnel/1`; after
# the 101 both sides speak frames, and this connection is the *link*:
#
#      0       1               4               8
#      | kind  |    length     |    stream     |  payload, `length` bytes ...
#        u8          u24             u32          (network byte order)
#
#      client                                server
#        |    <------------- CHALLENGE          |   a nonce
#        |   LOGIN ------------->               |   who I am: id, session, nonce, proof
#        |    <------------- WELCOME            |   the id is yours; a proof of mine
#        |   SERVICES ---------->               |   name -> options; again on change
#        |    <------------- URLS               |   name -> URL or error
#        |    <------------- OPEN 1             |   a visitor's request: dial `service`
#        |    <------------- DATA 1             |   no answer to OPEN: data may follow
#        |   DATA 1 ------------>               |   at most the credit, 256 KiB at first
#        |    <------------- CREDIT 1           |   you may send that many bytes more
#        |   END 1 ------------->               |   I send no more (half-close)
#        |    <------------- RESET 1            |   the stream is over, both ways
#
# Stream 0 is the link itself. Only the server opens streams; ids rise by one from 1
# and are never used twice. A frame for a stream that was open and is over is late, not
# wrong: it is dropped in silence. Whatever else is not as told here ends the link with
# a GOODBYE of code `protocol`. A JSON key that a side does not know is ignored.
#
# RESET is `code cause`: done (no fault), left (the visitor has gone), refused, timeout,
# no-service, reset, error, busy, overload, or gone: nothing was dialled, so the request
# may go elsewhere.
# -----------------------------------------------------------------------------------
PROTOCOL = "mdm-tunnel/1"
LINK_PATH = "/.well-known/mdm-tunnel"  # what the client asks for (RFC 8615)
HEADER = struct.Struct("!II")  # kind and length in one word, then the stream
NUMBER = struct.Struct("!I")  # the payload of CREDIT
PING_CLOCK = struct.Struct("!d")  # the payload of PING and PONG: the asker's clock
DATA_LIMIT = 2 << 20  # bytes: one frame never holds the link for longer than that
TEXT_LIMIT = 64 << 10  # bytes of any other payload: it is kept until it is whole
TOLD_LIMIT = 500  # characters of a peer's text that people get to read
LOGIN_LIMIT = 4 << 10  # bytes: nobody is known yet, so nobody may cost much

Kind = enum.IntEnum(  # numbered from 1
    "Kind",
    "CHALLENGE LOGIN WELCOME SERVICES URLS OPEN DATA CREDIT END RESET "
    "PING PONG GOODBYE",
)
# kind: who sends it, is it about a stream, bytes at least, bytes at most
RULES: Dict[int, Tuple[str, bool, int, int]] = {
    Kind.CHALLENGE: ("server", False, 2, TEXT_LIMIT),  # JSON: nonce
    Kind.LOGIN: ("client", False, 2, LOGIN_LIMIT),  # JSON: id, session, nonce, proof
    Kind.WELCOME: ("server", False, 2, TEXT_LIMIT),  # JSON: proof, if there are tokens
    Kind.SERVICES: ("client", False, 2, TEXT_LIMIT),  # JSON: name -> options
    Kind.URLS: ("server", False, 2, TEXT_LIMIT),  # JSON: name -> URL or error
    Kind.OPEN: ("server", True, 2, TEXT_LIMIT),  # JSON: service, visitor, scheme
    Kind.DATA: ("both", True, 1, DATA_LIMIT),  # bytes
    Kind.CREDIT: ("both", True, NUMBER.size, NUMBER.size),  # u32
    Kind.END: ("both", True, 0, 0),
    Kind.RESET: ("both", True, 0, TEXT_LIMIT),  # text: code, a space, cause
    Kind.PING: ("both", False, PING_CLOCK.size, PING_CLOCK.size),
    Kind.PONG: ("both", False, PING_CLOCK.size, PING_CLOCK.size),  # what the PING held
    Kind.GOODBYE: ("both", False, 2, TEXT_LIMIT),  # JSON: code, reason
}
HANDSHAKE = (Kind.CHALLENGE, Kind.LOGIN, Kind.WELCOME, Kind.SERVICES)  # in this order
DATA, OPEN = int(Kind.DATA), int(Kind.OPEN)  # looked at for every frame


# The name of a service or of an id: a DNS label (RFC 1035 2.3.1) of which `_` may be a
# part, but not `--`, which stands between the two in `service--id`.
LABEL = re.compile(r"(?!.*--)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


class ProtocolError(Exception):
    """The peer broke the rules of the wire; it costs him the link."""


# -----------------------------------------------------------------------------------
# Frames: bytes to frames, without any I/O. DATA is handed on in the pieces in which it
# comes, so that nothing is put together only to be taken apart again; every other
# payload is small and comes whole.
# -----------------------------------------------------------------------------------
class FrameReader:
    """Cuts what comes from `peer`, "server" or "client", into frames."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.rules = {k: r[1:] for k, r in RULES.items() if r[0] in ("both", peer)}
        self.held = b""  # the beginning of a header or of a small frame
        self.data = memoryview(b"")  # what was pushed; from `at` on nobody has seen it
        self.at = 0
        self.kind = self.stream = 0
        self.left = 0  # bytes of the current DATA still to come

    def push(self, data: memoryview) -> None:
        """More bytes have come. next() has said None to those before."""
        if self.held:
            data, self.held = memoryview(self.held + data), b""
        self.data, self.at = data, 0

    def next(self) -> Optional[Tuple[int, int, memoryview]]:
        """The next (kind, stream, payload), or None: more bytes must come first.
        Raises ProtocolError."""
        data, start = self.data, self.at
        if not self.left:
            start += HEADER.size
            if start > len(data):
                self.hold()
                return None
            length = self.open_frame(data, self.at)
            if self.kind != DATA:
                end = start + length
                if end > len(data):
                    self.hold()
                    return None
                self.at = end
                return self.kind, self.stream, data[start:end]
            self.left, self.at = length, start
        if start == len(data):
            self.hold()
            return None
        end = self.at = min(len(data), start + self.left)
        self.left -= end - start
        return DATA, self.stream, data[start:end]

    def hold(self) -> None:
        """What is left is the beginning of a frame."""
        self.held = bytes(self.data[self.at :])
        self.data, self.at = memoryview(b""), 0

    def keep(self) -> None:
        """Whoever reads stops here for now, and the buffer of `data` is not theirs."""
        self.data, self.at = memoryview(bytes(self.data[self.at :])), 0

    def open_frame(self, data: memoryview, at: int) -> int:
        """A header is whole: check it; return the length of the payload."""
        word: int
        word, self.stream = HEADER.unpack_from(data, at)
        self.kind, length = word >> 24, word & 0xFFFFFF
        on_stream, least, most = self.rules.get(self.kind, (None, 0, 0))
        if self.kind not in RULES:
            raise ProtocolError("unknown kind of frame %d" % self.kind)
        if on_stream != (self.stream > 0):
            raise ProtocolError(
                "%s from the %s on stream %d"
                % (Kind(self.kind).name, self.peer, self.stream)
            )
        if not least <= length <= most:
            raise ProtocolError("%s of %d bytes" % (Kind(self.kind).name, length))
        return length


encoder = json.JSONEncoder(separators=(",", ":"))  # dumps() would make one each time


def pack_json(message: Dict[str, Any]) -> bytes:
    """A message that people can read too, as UTF-8."""
    return encoder.encode(message).encode()


def unpack_json(payload: Any) -> Dict[str, Any]:
    """The object in a payload. Raises ProtocolError when there is none."""
    try:
        message = json.loads(bytes(payload).decode())
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ProtocolError("a payload is not a JSON object")
    return message


def peer_text(value: Any) -> str:
    """What a peer says for people to read: of any other type it is nothing."""
    return value[:TOLD_LIMIT] if isinstance(value, str) else ""


# -----------------------------------------------------------------------------------
# Secrets: each side proves that it knows the token of an id, and neither says anything
# from which the token, or a proof for another link, could be made: HMAC-SHA256 (RFC
# 2104) over who speaks, the nonces of both, which are new for every link, and the id.
# -----------------------------------------------------------------------------------
NONCE = re.compile("[0-9a-f]{64}")  # 32 bytes: as many as a proof has
TOKEN_LIMIT = 4 << 10  # bytes: what is longer is another file than was meant


def make_nonce() -> str:
    return os.urandom(32).hex()


def prove(token: str, role: str, nonces: Tuple[str, str], id: str) -> str:
    """What `role`, "server" or "client", says to prove that it knows the token of `id`;
    `nonces` are the server's and the client's. Raises ProtocolError for a bad one."""
    import hashlib
    import hmac

    if not all(NONCE.fullmatch(nonce) for nonce in nonces):
        raise ProtocolError("a nonce is 64 hexadecimal digits")
    said = "\n".join((PROTOCOL, role) + nonces + (id,)).encode()
    return hmac.new(token.encode(), said, hashlib.sha256).hexdigest()


def is_proof(said: Any, proof: str) -> bool:
    """Whether it is this proof, in a time that does not tell how much of it is."""
    import hmac

    return hmac.compare_digest(str(said).encode("utf-8", "replace"), proof.encode())


def check_token(token: Any) -> str:
    """A token, if it can be one. Raises ValueError, which does not tell it."""
    if not isinstance(token, str) or not token.strip():
        raise ValueError("a token is a text, and not empty")
    if len(token) > TOKEN_LIMIT or not all(" " <= letter <= "~" for letter in token):
        raise ValueError("a token is a line of ASCII, at most %d bytes" % TOKEN_LIMIT)
    return token


# -----------------------------------------------------------------------------------
# Log: what happens, for whoever wants to know: -v, or a program that uses `logging`
# itself, where the logger is "mdm_tunnel". Without one of them it is not even imported:
# it would be an eighth of the memory and of the time to start. (What else is large and
# rarely used is imported where it is used.)
# -----------------------------------------------------------------------------------
class Log:
    """A logger when there is `logging`, and silence before."""

    logger: Any = None

    def hears(self, level: int) -> bool:
        """Whether somebody wants to know."""
        logging = sys.modules.get("logging")
        if self.logger is None and logging is not None:
            self.logger = logging.getLogger("mdm_tunnel")
            self.logger.addHandler(logging.NullHandler())
        return self.logger is not None and bool(self.logger.isEnabledFor(level))

    def tell(self, level: int, text: str, *args: Any, trace: Any = None) -> None:
        """Log `text % args`, and the traceback of the error `trace`."""
        if self.hears(level):
            self.logger.log(level, text, *args, exc_info=trace)

    def debug(self, text: str, *args: Any) -> None:
        self.tell(DEBUG, text, *args)

    def info(self, text: str, *args: Any) -> None:
        self.tell(INFO, text, *args)

    def warning(self, text: str, *args: Any) -> None:
        self.tell(WARNING, text, *args)

    def error(self, text: str, *args: Any, trace: Any = None) -> None:
        self.tell(ERROR, text, *args, trace=trace)


log = Log()


# -----------------------------------------------------------------------------------
# Files: what is configured is looked at again and again, so that nothing has to be
# started anew.
# -----------------------------------------------------------------------------------
LOOK_TIME = 1.0  # seconds between looks: a change counts within two
FILE_LIMIT = 16 << 20  # bytes: what is longer is another file than was meant


class Pairs(List[Tuple[str, Any]]):
    """A JSON object with all its keys, also those that stand there twice."""


def parse_object(data: bytes) -> Pairs:
    """The JSON object that a file holds. Raises ValueError."""
    try:
        pairs = json.loads(data.decode(), object_pairs_hook=Pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON: %s" % error) from None
    if not isinstance(pairs, Pairs):
        raise ValueError('not an object like {"name": ...}')
    return pairs


def read_file(path: str) -> bytes:
    """All of a regular file: to open another, a pipe perhaps, could take for ever.
    Raises OSError or ValueError."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > FILE_LIMIT:
            raise ValueError("no regular file of at most %d bytes" % FILE_LIMIT)
        return file.read(FILE_LIMIT)


def listed(paths: List[str]) -> str:
    """Their names; a certificate and its key may be the same file."""
    return " and ".join(dict.fromkeys(paths))


def blame(error: Exception, paths: List[str]) -> str:
    """Which file is to blame, if that is known, and for what."""
    where = getattr(error, "filename", None) or listed(paths)
    return "%s: %s" % (where, getattr(error, "strerror", None) or error)


class Watched:
    """Files, and the `value` that `parse` makes of their contents. Raises OSError or
    ValueError at the start; later what is broken or has vanished changes nothing."""

    def __init__(self, paths: List[str], parse: Callable[..., Any]) -> None:
        self.paths, self.parse = paths, parse
        self.seen: Optional[List[bytes]] = None  # when they were looked at last
        self.value: Any = None
        self.read()

    def __str__(self) -> str:
        return listed(self.paths)

    def read(self) -> bool:
        """Look at them; True when there is something new. All of it is compared: the
        time of the last change would miss two changes in one tick."""
        found = []
        for path in self.paths:
            found.append(read_file(path))
        if found == self.seen:
            return False
        self.seen = found
        self.value = self.parse(*found)
        return True

    def look(self) -> bool:
        """Like read(), for later: what is wrong is told once."""
        try:
            return self.read()
        except (OSError, ValueError) as error:
            if self.seen is not None:
                cause = blame(error, self.paths)
                log.warning("%s; what it held before stays", cause)
            if isinstance(error, OSError):
                self.seen = None
            return False


def warn_of_readers(paths: List[str]) -> None:
    """Say which of these files with secrets others may read."""
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            others = stat.S_ISREG(status.st_mode) and status.st_mode & 0o077
            if os.name != "nt" and others:
                log.warning("%s: others can read it; chmod 600 %s", path, path)


def forbid_core_dumps() -> None:
    """They would hold the secrets. A limit of one byte, not of none, also keeps the
    kernel from handing them to a program (core(5))."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        least = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
        resource.setrlimit(resource.RLIMIT_CORE, (least, least))


# -----------------------------------------------------------------------------------
# Loop: one selector, one heap of timers, one catcher of errors. A turn reads what is
# there, then runs what that left to do, then timers, then lets the links send (after
# many events also in between: the other side can begin with the first of them), and
# last tells the selector what each connection now waits for: that is derived from its
# state once a turn, never toggled. The clock is looked at after reading, so that a
# process that was frozen does not take its healthy peers for dead.
# -----------------------------------------------------------------------------------
SPARE_FILES = 32  # descriptors kept for links, listeners, files and the resolver
TURN_BUDGET = 0.01  # seconds of a turn that peers may fill: then the others have theirs
PART = 16  # events of a turn after which the links send in between
POLL = 0.5 if os.name == "nt" else None  # seconds: Windows hides Ctrl-C from a select


class Timer:
    """One deadline. To move it later or to clear it costs nothing: its entry in the
    heap stays, and looks here when its time has come."""

    __slots__ = ("loop", "owner", "call", "due", "armed")

    def __init__(self, loop: "Loop", owner: Any, call: Call) -> None:
        self.loop, self.owner, self.call = loop, owner, call
        self.due: Optional[float] = None
        self.armed: Optional[float] = None  # when the heap looks here next

    def set(self, seconds: float) -> None:
        """Run `call` in so many seconds, instead of when it was due so far."""
        self.due = self.loop.clock() + seconds
        self.arm()

    def clear(self) -> None:
        self.due = None

    def arm(self) -> None:
        if self.due is not None and (self.armed is None or self.due < self.armed):
            self.armed = self.due
            self.loop.add_timer(self.due, self)

    def ring(self, when: float, now: float) -> None:
        """The entry for `when` has come up: is it still meant?"""
        if when == self.armed:
            self.armed = None
            if self.due is not None and self.due <= now:
                self.due = None
                self.loop.guard(self.owner, self.call)
            self.arm()


class Loop:
    """Runs everything in one thread. Tests give a `selector` or a `clock`."""

    def __init__(
        self,
        selector: Optional[selectors.BaseSelector] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.selector = selector or selectors.DefaultSelector()
        self.clock = clock
        self.serial = itertools.count()  # keeps equal deadlines in order
        self.timers: List[Tuple[float, int, Timer]] = []
        self.crowded = 1000  # timers that make it worth looking for cleared ones
        self.calls: Deque[Tuple[Any, Call, tuple]] = collections.deque()
        self.ready_links: Dict[Any, None] = {}  # with something to send
        self.dirty: Set[Connection] = set()  # may wait for something else now
        self.connections: Set[Connection] = set()
        self.links: Set[Any] = set()
        self.unread = 0  # bytes that they hold
        # What is being read, and what is being sent: pages that nobody has dirty yet
        # take no memory, as those of a bytearray would.
        self.scratch = memoryview(mmap.mmap(-1, DATA_LIMIT))
        self.frames = memoryview(mmap.mmap(-1, DATA_LIMIT + 4 * TEXT_LIMIT))
        self.sealed = memoryview(mmap.mmap(-1, SEALED))  # what TLS is to open
        self.capacity = file_limit(self.selector) - SPARE_FILES
        self.turn_started = clock()
        self.shook = 0.0  # seconds of TLS handshakes in this turn
        self.running = True
        self.caught: Dict[int, Any] = {}  # signals, and what they did before
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_receiver.setblocking(False)
        self.wake_sender.setblocking(False)
        self.selector.register(self.wake_receiver, READ, self)

    def __str__(self) -> str:
        return "loop"

    def run(self) -> None:
        """Turn until somebody sets `running` to False."""
        while self.running:
            self.turn()

    def close(self) -> None:
        """Close everything. The loop cannot be used again."""
        if self.caught:
            signal.set_wakeup_fd(-1)
        for number, before in self.caught.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        for connection in list(self.connections):
            connection.abort() if connection.backlog else connection.close()
        for part in (self.selector, self.wake_receiver, self.wake_sender):
            part.close()  # type: ignore[attr-defined]

    def soon(self, owner: Any, call: Call, *args: Any) -> None:
        """Run `call` later in this turn or in the next, on a fresh stack."""
        self.calls.append((owner, call, args))

    def from_thread(self, owner: Any, call: Call, *args: Any) -> None:
        """Like soon(), from any thread."""
        self.soon(owner, call, *args)
        with contextlib.suppress(OSError):  # full: it wakes already
            self.wake_sender.send(b"\0")

    def catch_signals(self, on_signal: Callable[[int], Any]) -> None:
        """Until close() SIGTERM and SIGINT wake the loop, which calls `on_signal`."""

        def ring(number: int, frame: Any) -> None:
            self.soon(self, on_signal, number)

        for number in (signal.SIGTERM, signal.SIGINT):
            self.caught.setdefault(number, signal.signal(number, ring))
        signal.set_wakeup_fd(self.wake_sender.fileno())

    def on_events(self, mask: int) -> None:
        """Woken: something is in `calls`."""
        self.wake_receiver.recv(4096)

    def turn(self) -> None:
        """Wait for something, and do all that follows from it."""
        self.shook = 0.0
        events = self.selector.select(self.select_timeout())
        self.turn_started = self.clock()
        for number, (key, mask) in enumerate(events, 1):
            try:
                key.data.on_events(mask)
            except Exception as error:
                self.failed(key.data, error)
            if not number % PART:
                self.send()
        for _ in range(len(self.calls)):
            owner, call, args = self.calls.popleft()
            self.guard(owner, call, *args)
        now = self.clock()
        while self.timers and self.timers[0][0] <= now:
            when, _, timer = heapq.heappop(self.timers)
            timer.ring(when, now)
        self.send()
        while self.dirty:
            connection = self.dirty.pop()
            try:
                connection.register()
            except Exception as error:
                self.failed(connection, error)

    def send(self) -> None:
        """What the links owe, and what quiet streams have."""
        while self.ready_links:
            link = self.ready_links.popitem()[0]
            try:
                link.flush()
            except Exception as error:
                self.failed(link, error)

    def tired(self) -> bool:
        """Whether this turn has lasted long enough. Whoever may have much to do looks
        here after every few items, and goes on in the next turn: soon()."""
        return self.clock() - self.turn_started > TURN_BUDGET

    def select_timeout(self) -> Optional[float]:
        """Seconds that the selector may wait; None is for ever."""
        if self.calls or self.dirty or self.ready_links:
            return 0
        if not self.timers:
            return POLL
        wait = max(0.0, self.timers[0][0] - self.clock())
        return wait if POLL is None else min(wait, POLL)

    def add_timer(self, when: float, timer: Timer) -> None:
        """Note that `timer` wants to look at the clock then. When the heap has become
        crowded, the entries that cleared timers left there are thrown out."""
        heapq.heappush(self.timers, (when, next(self.serial), timer))
        if len(self.timers) > self.crowded:
            for old, _, other in self.timers:
                if other.due is None and other.armed == old:
                    other.armed = None
            self.timers = [entry for entry in self.timers if entry[0] == entry[2].armed]
            heapq.heapify(self.timers)
            self.crowded = 2 * len(self.timers) + 1000

    def full(self) -> bool:
        """Whether no descriptors are left for another connection."""
        return len(self.connections) >= self.capacity

    def guard(self, owner: Any, call: Call, *args: Any) -> Any:
        """What `call` raises ends `owner`, and nothing else. (Where every call counts,
        the same `try` stands in place of this.)"""
        try:
            return call(*args)
        except Exception as error:
            self.failed(owner, error)
            return None

    def failed(self, owner: Any, error: Exception) -> None:
        """The one catcher: serving `owner` raised `error`. A peer's fault is told to
        the owner only; a bug of ours is logged with its traceback as well."""
        if isinstance(error, MemoryError):
            error = OSError(errno.ENOMEM, "no memory left")
        try:
            if not isinstance(error, (OSError, ProtocolError)):
                log.error("%s: %s", owner, error, trace=error)
            owner.fail(error)
        except Exception as worse:
            log.error("%s: %s", owner, worse, trace=worse)

    def fail(self, error: Exception) -> None:
        """The wake-up socket is broken. Nothing can mend that; timers go on."""
        log.error("loop: %s", error)


def file_limit(selector: selectors.BaseSelector) -> int:
    """How many descriptors we can use, once the soft limit is raised to the hard."""
    limit = 1 << 20
    if isinstance(selector, selectors.SelectSelector):
        limit = 512 if os.name == "nt" else 1024  # CPython's FD_SETSIZE
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        hard = limit if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
        limit = min(limit, max(soft, hard))
    return limit


# -----------------------------------------------------------------------------------
# TLS: what is read from the network is fed into a memory buffer, and what has to go
# there is taken out of another, so that neither handshake nor encryption ever waits for
# a socket, and all that was said here about sending and ending holds for it too.
# -----------------------------------------------------------------------------------
HANDSHAKE_TIME = 5.0  # seconds
SHAKING_A_TURN = 0.01  # seconds of them in a turn of the loop: each computes a while
SEALED = 64 << 10  # bytes encrypted, or read to be decrypted, at once: OpenSSL keeps so
# much memory for each connection
RECORDS_A_READ = 256  # be they ever so small
WASTE_A_READ = 32 << 10  # bytes that may come in a read beyond its content, before it
# ends: a record that is not whole has half as much
FIRST_SEALED = 4 << 10  # bytes read to be decrypted, until there was something in them
FRUITLESS = 16 << 10  # bytes with nothing in them that may come: to agree on new keys
# again and again costs us more than the peer
SEALED_PART = 32  # bytes that may come for each byte of content
ANSWERS = 16 << 10  # bytes for new keys that may wait for a peer who does not read


class TLSError(OSError):
    """The peer's TLS cannot be understood, or it is not whom we want to speak to."""

    def __init__(self, error: Exception) -> None:
        reason = str(getattr(error, "reason", "") or error)
        said = getattr(error, "verify_message", "") or reason.replace("_", " ").lower()
        super().__init__("TLS: %s" % said)
        self.plain = reason == "HTTP_REQUEST"  # it was not even TLS
        if reason == "WRONG_VERSION_NUMBER":  # what OpenSSL makes of anything else
            self.args = ("the other side speaks no TLS",)


def demand_tls_1_2(context: Any) -> Any:
    """The versions before are broken (RFC 8996). Nothing may be negotiated again."""
    import ssl

    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # Python 3.6, or OpenSSL 1.0
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    return context


class TLS:
    """The encryption of one connection, without I/O. `name` is the host that the
    server's certificate must be for; `pin` the SHA-256 that it must have."""

    __slots__ = (
        "ssl incoming outgoing object pin ready early more ending failed size "
        "fruitless answers"
    ).split()

    def __init__(self, context: Any, server: bool, name: Any, pin: bytes) -> None:
        import ssl

        self.ssl, self.pin = ssl, pin
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self.incoming, self.outgoing, server, name)
        self.ready = False  # the handshake is done
        self.early = bytearray()  # what was written, and waits to be encrypted
        self.more = False  # something is decrypted, or decryptable, and not yet read
        self.ending = False  # we send no more
        self.failed: Optional[OSError] = None  # told once what came before is read
        self.size = FIRST_SEALED  # bytes to read at once
        self.fruitless = 0  # bytes read of late in which there was nothing
        self.answers = 0  # bytes of our own that wait for the peer

    def shake_hands(self) -> bool:
        """Go on with the handshake; True when it is done. Raises TLSError."""
        try:
            self.object.do_handshake()
        except self.ssl.SSLWantReadError:
            return False
        except (self.ssl.SSLError, self.ssl.CertificateError) as error:
            raise TLSError(error) from None
        if self.pin:
            self.check_pin()
        self.ready = self.more = True
        return True

    def check_pin(self) -> None:
        import hashlib
        import hmac

        found = hashlib.sha256(self.object.getpeercert(True))
        if not hmac.compare_digest(found.digest(), self.pin):
            seen = "the certificate has another fingerprint, %s" % found.hexdigest()
            raise TLSError(ValueError(seen))

    def read_into(self, view: memoryview) -> Optional[int]:
        """Bytes decrypted, 0 at the end, None when more has to come. Or TLSError."""
        try:
            count: int = self.object.read(len(view), view)
            self.fruitless = max(0, self.fruitless - count * SEALED_PART)
            return count
        except self.ssl.SSLWantReadError:
            return None
        except self.ssl.SSLZeroReturnError:
            return 0
        except self.ssl.SSLError as error:
            raise TLSError(error) from None

    def feed(self, data: memoryview) -> None:
        """What has come from the network. Raises TLSError when it is of no use."""
        self.incoming.write(data)
        if self.ready:
            grows = self.fruitless <= FRUITLESS
            self.size = min(SEALED, 2 * self.size) if grows else FIRST_SEALED
            self.fruitless += len(data)
            if self.fruitless > FRUITLESS + SEALED:
                raise TLSError(ValueError("much was sent, and nothing was in it"))

    def seal(self, part: Any) -> bytes:
        """What to send for at most SEALED bytes, once the handshake is done."""
        while part:
            part = part[self.object.write(part) :]
        return self.outgoing.read()

    def seal_early(self) -> bytes:
        """The next part of what could not be sent at once."""
        part = bytes(self.early[:SEALED])
        del self.early[:SEALED]
        return self.seal(part)

    def say_end(self) -> None:
        """The word that we send no more (RFC 8446 6.1). OpenSSL would lose what has
        come and is not read."""
        if self.ready:
            with contextlib.suppress(self.ssl.SSLError, ValueError):
                self.object.unwrap()


# -----------------------------------------------------------------------------------
# Connection: a non-blocking socket. What it will not take now waits here in order,
# and a half-close waits behind that. The only place that knows of would-block and of
# the errors of a socket. A failed send ends that direction only: what the peer said
# last is read first.
# -----------------------------------------------------------------------------------
KEEPALIVE = 60  # seconds of silence until TCP asks whether a peer is still there
LINGER = 2.0  # seconds to read and drop after a last word, so that it arrives
NOT_SENT = {"linux": 25, "darwin": 0x201}  # TCP_NOTSENT_LOWAT, which `socket` may lack
STALLED = 60.0  # seconds for a peer to take anything of what is left, at the end
SOCKET_OPTIONS = [
    (getattr(socket, level), getattr(socket, name), value)
    for level, name, value in (
        ("IPPROTO_TCP", "TCP_NODELAY", 1),  # what is small leaves at once
        ("SOL_SOCKET", "SO_KEEPALIVE", 1),
        ("IPPROTO_TCP", "TCP_KEEPIDLE", KEEPALIVE),
        ("IPPROTO_TCP", "TCP_KEEPINTVL", KEEPALIVE // 6),
    )
    if hasattr(socket, name)  # the system may lack the last two
]


class Connection:
    """Its owner has interest(), on_readable(), on_writable() and fail(error)."""

    __slots__ = (
        "loop sock tls owner backlog dry eof lost last moved events timer shaking "
        "lingering closed"
    ).split()

    def __init__(self, loop: Loop, sock: socket.socket, owner: Any) -> None:
        self.loop, self.sock, self.owner = loop, sock, owner
        self.tls: Optional[TLS] = None
        self.backlog = bytearray()  # what the kernel has not taken yet
        self.dry = True  # a read would block, until the selector says otherwise
        self.eof = False  # the peer sends no more
        self.lost: Optional[OSError] = None  # why nothing can be sent
        self.last: Optional[Call] = None  # to do when the backlog is gone
        self.moved = 0.0  # when the backlog began, or last became shorter
        self.events = 0  # what the selector was told
        self.timer: Optional[Timer] = None  # when it comes to an end
        self.shaking = self.lingering = False  # the TLS handshake goes on; it ends
        self.closed = False
        sock.setblocking(False)
        loop.connections.add(self)
        loop.dirty.add(self)
        with contextlib.suppress(OSError):  # a unix socket has none of them
            for level, option, value in SOCKET_OPTIONS:
                sock.setsockopt(level, option, value)

    def __str__(self) -> str:
        return str(self.owner)

    def fail(self, error: Exception) -> None:
        self.close() if self.lingering else self.owner.fail(error)

    def on_events(self, mask: int) -> None:
        """The selector says that the socket is ready."""
        self.loop.dirty.add(self)
        if mask & WRITE and not self.closed:
            self.flush()
            if not (self.lingering or self.shaking):
                self.owner.on_writable()
        if mask & READ and not self.closed:
            self.dry = False
            if self.lingering:
                self.drop()
            else:
                self.shake_hands() if self.shaking else self.owner.on_readable()

    def register(self) -> None:
        """Tell the selector what is waited for now, if that has changed."""
        if self.closed:
            return
        own = not (self.lingering or self.shaking)
        events = self.owner.interest() if own else READ
        if events & READ and self.tls and self.tls.more and not self.eof:
            self.loop.soon(self, self.on_events, READ)  # the selector cannot see it
        events = (events & ~READ if self.eof else events) | bool(self.backlog) * WRITE
        if events != self.events:
            if self.events and events:
                self.loop.selector.modify(self.sock, events, self)
            elif events:
                self.loop.selector.register(self.sock, events, self)
            else:
                self.loop.selector.unregister(self.sock)
            self.events = events

    def limit_queue(self, size: int) -> None:
        """Let the kernel hold about `size` bytes that are not under way yet. Systems
        without that option are left alone: SO_SNDBUF would count what is under way too,
        and so slow down a long link."""
        option = NOT_SENT.get(sys.platform)
        if option is not None:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.IPPROTO_TCP, option, size)

    def read_into(self, view: memoryview) -> Optional[int]:
        """Bytes read, 0 at the end, None when there are none now. Raises OSError."""
        self.loop.dirty.add(self)
        if self.eof:
            return 0
        if not len(view):
            return None  # to read nothing would look like the end
        if self.tls:
            return self.open_into(view, self.tls)
        if self.dry or self.closed:
            return None
        try:
            count = self.sock.recv_into(view)
        except (BlockingIOError, InterruptedError):
            self.dry = True
            return None
        self.dry = count < len(view)  # it came short, so there is no more
        if count == 0:
            self.eof = True
            if isinstance(self.lost, ConnectionResetError):
                raise self.lost  # a send has swallowed the news that this is a cut
        return count

    def write(self, data: Any) -> None:
        """Send `data`, now or as soon as the socket takes it."""
        tls = self.tls
        if not tls:
            self.put(data)
            return
        rest = memoryview(data)
        while rest and tls.ready and not self.backlog:
            self.put(tls.seal(rest[:SEALED]))
            rest = rest[SEALED:]
        tls.early += rest  # encrypted in small pieces it would be many times that

    def waiting(self) -> int:
        """Bytes that were written and not sent."""
        return len(self.backlog) + (len(self.tls.early) if self.tls else 0)

    def put(self, data: Any) -> None:
        if data and not self.backlog:
            data = data[self.send(data) :]
        if data:
            if not self.backlog:
                self.moved = self.loop.clock()
                self.loop.dirty.add(self)
            self.backlog += data

    def send(self, data: Any) -> int:
        """How many bytes the socket took. After a failure all are taken and lost."""
        if self.lost is None:
            try:
                return self.sock.send(data)
            except (BlockingIOError, InterruptedError):
                return 0
            except OSError as error:
                self.lost = error
        return len(data)

    def flush(self) -> None:
        """Send what waits, then do what waits behind it."""
        if self.backlog:
            count = self.send(self.backlog)
            if count:
                self.moved = self.loop.clock()
                del self.backlog[:count]
        if self.tls and self.tls.ready:
            while self.tls.early and not self.backlog:
                self.put(self.tls.seal_early())
        if not self.backlog and self.last:
            last, self.last = self.last, None
            last()

    def after_backlog(self, call: Call) -> None:
        """Do `call` when everything written so far has been sent."""
        self.last = call
        self.loop.dirty.add(self)
        self.flush()

    def finish(self) -> None:
        """Half-close: tell the peer that no more will come."""
        if not self.tls:
            self.shut()
        else:
            self.tls.ending = True
            if not self.tls.more:
                self.finish_tls(self.tls)

    def finish_tls(self, tls: TLS) -> None:
        tls.ending = False
        tls.say_end()
        self.put(tls.outgoing.read())
        self.after_backlog(self.shut)

    def shut(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.lost = self.lost or error

    # TLS.

    def start_tls(
        self, context: Any, server: bool, name: Any = None, pin: bytes = b""
    ) -> None:
        """From here on all is encrypted: see TLS."""
        self.tls = TLS(context, server, name, pin)
        self.shaking = True
        self.watch(HANDSHAKE_TIME)
        if not server:
            self.shake_hands()

    def shake_hands(self) -> None:
        """Go on with the handshake; then the owner's part begins. With too many in one
        turn the selector will say again that there is something to read."""
        tls, start = self.tls, self.loop.clock()
        if tls and self.loop.shook <= SHAKING_A_TURN:
            self.receive(tls)
            try:
                done = tls.shake_hands()
            finally:
                self.loop.shook += self.loop.clock() - start
                self.put(tls.outgoing.read())  # also why we do not want to go on
            if done and self.timer:
                self.shaking = False
                self.timer.clear()
                self.flush()

    def receive(self, tls: TLS) -> int:
        """How many bytes have come for TLS, which has none left. An end without the
        word for it (RFC 8446 6.1) may be a cut that somebody else has made."""
        if tls.ending:
            self.finish_tls(tls)
        view, count = self.loop.sealed[: tls.size], -1
        if not (self.dry or self.closed):
            with contextlib.suppress(BlockingIOError, InterruptedError):
                count = self.sock.recv_into(view)
        if count == 0:
            raise OSError("the other side closed the connection, and not by TLS")
        self.dry = count < len(view)
        if count > 0:
            tls.feed(view[:count])
        return max(0, count)

    def open_into(self, view: memoryview, tls: TLS) -> Optional[int]:
        """read_into(), decrypted: what TLS has, then what the socket has, part by part.
        An error waits until what came before it has been read."""
        if tls.failed:
            raise tls.failed
        got: Optional[int] = None
        count = records = came = 0
        try:
            got = tls.read_into(view) if tls.ready else None
            while got != 0:
                if got:
                    count += got
                    records += 1
                    if count == len(view) or records == RECORDS_A_READ:
                        break
                else:
                    part = self.receive(tls) if came <= count + WASTE_A_READ else 0
                    if not part:
                        break
                    came += part
                got = tls.read_into(view[count:])
            self.answer(tls)
        except OSError as error:
            if not count:
                raise
            tls.failed, got = error, count
        self.eof = got == 0 and count == 0
        tls.more = got is not None and not self.eof
        if tls.ending and not tls.more:
            self.finish_tls(tls)
        return 0 if self.eof else count or None

    def answer(self, tls: TLS) -> None:
        """Send what TLS itself has to say, when the peer has agreed on new keys."""
        said = tls.outgoing.read()
        tls.answers = tls.answers + len(said) if self.backlog else 0
        if tls.answers > ANSWERS:
            raise TLSError(ValueError("it asks for new keys, and does not read"))
        self.put(said)

    def end(self, call: Call) -> None:
        """The last thing to do, when everything has been sent. A peer who takes nothing
        of it for STALLED seconds is given up."""
        if self.backlog:
            self.watch(STALLED)
        self.after_backlog(call)

    def linger(self) -> None:
        """Close, but so that the last word arrives: with bytes unread a plain close
        would reset the connection, and the reset can overtake what was said."""
        self.finish()
        self.lingering = True
        self.watch(LINGER)
        if self.eof or self.lost:
            self.close()

    def watch(self, seconds: float) -> None:
        self.timer = self.timer or Timer(self.loop, self, self.on_late)
        self.timer.set(seconds)

    def on_late(self) -> None:
        if self.shaking:
            raise OSError("no TLS handshake within %d s" % HANDSHAKE_TIME)
        if self.backlog and self.loop.clock() - self.moved < STALLED:
            self.watch(STALLED)
        else:
            self.abort() if self.backlog else self.close()

    def drop(self) -> None:
        """While it lingers, what still comes is of no use."""
        if self.read_into(self.loop.scratch) == 0:
            self.close()

    def abort(self) -> None:
        """Close with a reset, so that what was cut does not look complete."""
        if not self.closed:
            on = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, on)
            self.close()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.loop.connections.discard(self)
            self.backlog.clear()
            self.tls = None
            self.last = None
            if self.timer:
                self.timer.clear()
            if self.events:
                self.loop.selector.unregister(self.sock)
            self.sock.close()


# -----------------------------------------------------------------------------------
# Stream and Link: the multiplexer. Nothing is pushed into the link. A stream that may
# have something to send stands in a ring, and when its turn comes, its owner's
# pull(view) reads straight into the frame. So bytes wait in the kernel of the program
# that sends them, and a stream that nobody reads stops itself and no other.
#
# Fair turns. *Quiet* streams, which sent little of late, go first, and leave together
# in one system call at the end of each turn of the loop. *Busy* ones get one frame
# each time the selector finds the link writable. (RFC 8290 calls the two sparse and
# bulk flows.) A busy frame is at most a *quantum*: what the link delivers in 10 ms. The
# kernel is asked to hold no more than that unsent. So a small answer waits for some
# 20 ms of other bytes at most, on a thin link as on a fast one.
#
# Credit. A *window* is how much of a stream may be under way. It begins small, and
# doubles while half of it is spent in less than a round trip: a fast reader gets a
# window that fills a long link; a stalled one pins only the first 256 KiB.
#
# Control is owed, not queued. A stream remembers its OPEN, its credit or its RESET, the
# link one frame of each kind, and they become bytes when the link can send. A peer that
# floods and never reads costs nothing more.
# -----------------------------------------------------------------------------------
WINDOW = 256 << 10  # bytes that may be sent on a stream before it needs CREDIT
LARGEST_WINDOW = 8 << 20  # bytes: 80 MB/s over a round trip of 100 ms
SPARE_WINDOWS = 64 << 20  # bytes that a link may promise over all streams' WINDOW
WIDEN_AFTER = 0.05  # seconds until a window may grow again: wait until the last growth
# shows in the measurements
ASK_AFTER = 1.0  # seconds between looks at the round trip, while credit is given
UNREAD_LIMIT = 64 << 20  # bytes a link may hold that no local socket has taken
ALL_UNREAD = 256 << 20  # bytes that all links may hold: then it is the largest's turn
LOOK_EVERY = 16  # frames after which a link looks at the clock
MAX_STREAMS = 16384  # open at once on a link: more is an attack or a loop
LAST_ID = (1 << 32) - 1  # stream ids are u32; past it the client dials anew
TURN_TIME = 0.01  # seconds of what the link delivers: so long may a busy frame last
SHARES = 4  # busy streams among which a turn is divided: small frames cost time too
FIRST_QUANTUM = 16 << 10  # bytes of a busy frame, until the link has been measured
LEAST_TURN = 4 << 10  # bytes: less credit than this counts as none (no tiny frames)
QUIET = 16 << 10  # bytes that a stream may send in QUIET_TIME and still go first;
# capped at half a quantum: on a slow link even a bulk download sends less than 16 KiB
QUIET_TIME = 0.1  # seconds
COLLECT = 64 << 10  # bytes of small frames that leave in one system call
PING_AFTER = 10.0  # seconds of silence until we ask whether the other side lives
PONG_WITHIN = 10.0  # seconds that it then has, for any byte at all
STUCK_AFTER = 20.0  # seconds in which bytes that we have to send did not move


class Stream:
    """One visitor's bytes in a link. Its owner has pull(view), which returns the number
    of bytes that it wrote, None for nothing yet, or 0 for the end; receive(view),
    on_end(), on_reset(code, cause) and fail(error). A stream never calls its link: it
    notes what the link has to do, and flush() does it."""

    __slots__ = (
        "link id owner credit window receive_window granted widened unread uncredited "
        "sent last_turn since queued owing open ended_out ended_in open_frame "
        "reset_frame"
    ).split()

    def __init__(self, link: "Link", number: int, owner: Any) -> None:
        self.link, self.id, self.owner = link, number, owner
        self.credit = WINDOW  # bytes that we may still send
        self.window = WINDOW  # bytes that the peer may have under way
        self.receive_window = WINDOW  # bytes that the peer may still send
        self.granted = self.widened = link.loop.clock()  # last CREDIT, last growth
        self.unread = 0  # bytes received that no local socket has taken
        self.uncredited = 0  # bytes taken for which the peer has no credit yet
        self.sent = 0  # bytes sent since `since`
        self.last_turn = 0  # bytes sent in the last turn
        self.since = 0.0
        self.queued = False  # stands in a ring
        self.owing = False  # stands among the streams that owe control
        self.open = True
        self.ended_out = self.ended_in = False  # END was sent, END was received
        self.open_frame: Optional[bytes] = None  # the OPEN to send
        self.reset_frame: Optional[bytes] = None  # the RESET to send

    # For its owner.

    def wake(self) -> None:
        """The owner may have something: it is pulled when the link can send."""
        if self.queued or self.credit < LEAST_TURN or self.ended_out or not self.open:
            return
        self.queued = True
        link = self.link
        if self.last_turn >= LEAST_TURN and self.is_busy():
            link.busy.append(self)
            link.loop.dirty.add(link.connection)
        else:
            link.quiet.append(self)
            link.loop.ready_links[link] = None

    def wants_read(self) -> bool:
        """Whether the owner's source is worth watching: nothing else will wake it."""
        if self.queued or self.credit < LEAST_TURN or self.ended_out:
            return False
        return self.open

    def acknowledge(self, still_waiting: int) -> None:
        """Of the bytes received, `still_waiting` still wait for a local socket. Credit
        for the others is given back a quarter of the window at a time: with halves the
        window would have to be half as large again to keep a long link full."""
        taken = self.unread - still_waiting
        if taken > 0:
            self.unread = still_waiting
            self.link.unread -= taken
            self.link.loop.unread -= taken
            self.uncredited += taken
            if self.uncredited >= self.window // 4 and not self.ended_in:
                self.owe()

    def reset(self, code: str, cause: str = "") -> None:
        """End both ways at once; the peer is told why. The owner is not."""
        if self.open:
            self.link.resets += code != "done"
            self.reset_frame = ("%s %s" % (code, cause)).encode()[:TEXT_LIMIT]
            self.owe()
            self.detach()

    def fail(self, error: Exception) -> None:
        """It could not be given an owner."""
        self.reset("error", str(error))

    # For its link.

    def is_busy(self) -> bool:
        """A stream that sends much. Not one that sent little in a while, nor one whose
        last turn was tiny: small answers stay quiet, however many there are."""
        if self.sent < min(QUIET, self.link.pacer.quantum // 2):
            return False
        return self.link.loop.clock() - self.since < QUIET_TIME

    def note_sent(self, count: int, now: float) -> None:
        """`count` bytes have gone in one turn."""
        self.credit -= count
        if now - self.since >= QUIET_TIME:
            self.since, self.sent = now, 0
        self.sent += count
        self.last_turn = count

    def owe(self) -> None:
        """The link has a frame of control to write for this stream."""
        if not self.owing:
            self.owing = True
            self.link.owing.append(self)
        self.link.loop.ready_links[self.link] = None

    def detach(self) -> None:
        """The stream is over: what still comes for it is late."""
        link = self.link
        if link.streams.pop(self.id, None):
            self.open = False
            link.unread -= self.unread
            link.loop.unread -= self.unread
            self.unread = 0
            link.spare += self.window - WINDOW
            link.loop.ready_links[link] = None  # it may have waited for the last stream

    def take_credit(self, now: float, round_trip: float) -> int:
        """The credit that the peer gets now, growth of the window included; 0: none."""
        if not self.open or self.uncredited < self.window // 4:
            return 0
        credit = self.uncredited + self.widen(now, round_trip)
        self.uncredited = 0
        self.receive_window += credit
        return credit

    def widen(self, now: float, round_trip: float) -> int:
        """Is half a window spent in less than a round trip, with nothing waiting here
        for a slow reader? Then it doubles; return by how much it grew."""
        took, self.granted = now - self.granted, now
        growth = self.window
        fast = self.uncredited * round_trip > took * growth / 2 and not self.unread
        if not fast or now - self.widened < WIDEN_AFTER:
            return 0
        if 2 * growth > LARGEST_WINDOW or growth > self.link.spare:
            return 0
        self.widened = now
        self.window += growth
        self.link.spare -= growth
        return growth


class Pacer:
    """Finds the quantum: what a link delivers in TURN_TIME. It is measured from one
    moment when the kernel had taken everything to the next. An empty buffer swallows a
    megabyte at once and says nothing about the link, so the quantum at most doubles at
    a time. The kernel is asked to hold no more than a quantum that is not under way
    (TCP_NOTSENT_LOWAT): what it holds, nothing can overtake."""

    def __init__(self, loop: "Loop", connection: Connection) -> None:
        self.loop, self.connection = loop, connection
        self.quantum = FIRST_QUANTUM
        self.notsent_lowat = FIRST_QUANTUM  # what the kernel was told
        self.sent_since = 0  # bytes sent from `measured` on
        self.measured = loop.clock()
        self.was_idle = True  # since `measured` there was a moment with nothing to send
        connection.limit_queue(self.quantum)

    def note_sent(self, count: int) -> None:
        """The kernel has taken all before; `count` bytes more are about to be sent."""
        now = self.loop.clock()
        if now - self.measured >= TURN_TIME:
            self.measure(now)
        self.sent_since += count

    def measure(self, now: float) -> None:
        """With nothing to send for a moment, the link delivered at least so much."""
        delivered = int(self.sent_since * TURN_TIME / (now - self.measured))
        if delivered > self.quantum or not self.was_idle:
            most = min(2 * self.quantum, DATA_LIMIT)
            self.quantum = max(LEAST_TURN, min(delivered, most))
        self.sent_since, self.measured, self.was_idle = 0, now, False
        if not self.notsent_lowat < 2 * self.quantum < 4 * self.notsent_lowat:
            self.notsent_lowat = self.quantum
            self.connection.limit_queue(self.quantum)


class Link:
    """One end of a link over `connection`, its `role` "server" or "client". The owner
    has on_message(kind, message), on_open(stream, message) and on_closed(cause)."""

    def __init__(
        self, loop: Loop, connection: Connection, owner: Any, role: str
    ) -> None:
        self.loop, self.connection, self.owner = loop, connection, owner
        self.reader = FrameReader("client" if role == "server" else "server")
        self.pacer = Pacer(loop, connection)
        self.step = 0  # how much of the handshake is done
        self.streams: Dict[int, Stream] = {}
        self.last_id = 0  # the newest stream's
        self.unread = 0  # bytes received on all streams that no local socket has taken
        self.spare = SPARE_WINDOWS  # bytes that windows may still grow by
        self.round_trip = 0.0  # seconds, under load; 0: not known yet
        self.ping_payload = b""  # of the PING that is under way
        self.quiet: Deque[Stream] = collections.deque()
        self.busy: Deque[Stream] = collections.deque()
        self.owing: Deque[Stream] = collections.deque()
        self.owed: Dict[int, bytes] = {}  # the link's own frames, one of a kind
        self.heard = loop.clock()  # when the last byte came
        self.pinged = 0.0  # when the last PING went out
        self.draining = False  # GOODBYE was said or heard: no new streams
        self.goodbye_received = False
        self.closed = False
        self.tracing = log.hears(DEBUG)  # -vv
        self.resets = 0  # streams that did not end as they should
        self.timer = Timer(loop, self, self.check)
        self.timer.set(1.0)
        connection.owner = self
        loop.links.add(self)
        loop.dirty.add(connection)

    def __str__(self) -> str:
        return str(self.owner)

    # What comes in.

    def interest(self) -> int:
        return (0 if self.reader.data else READ) | (WRITE if self.busy else 0)

    def on_readable(self) -> None:
        """Read once; what is left keeps the socket readable."""
        if self.reader.data:
            return
        count = self.connection.read_into(self.loop.scratch)
        if count == 0:
            raise OSError("the other side closed the connection")
        if count:
            self.receive(self.loop.scratch[:count])

    def receive(self, data: memoryview) -> None:
        """Act on what was read. `data` is not ours: the next read overwrites it."""
        self.heard = self.loop.clock()
        self.reader.push(data)
        self.read_frames()

    def read_frames(self) -> None:
        """Frame by frame; with too many for one turn of the loop go on in the next."""
        reader, count = self.reader, 0
        while not self.closed:
            frame = reader.next()
            if frame is None:
                break
            self.on_frame(*frame)
            count += 1
            # a frame of JSON takes as long as many others
            if count % LOOK_EVERY and frame[0] in STREAM_FRAMES:
                continue
            if self.loop.tired():
                reader.keep()
                self.loop.soon(self, self.read_frames)
                break
        self.loop.dirty.add(self.connection)  # it may be read again

    def on_frame(self, kind: int, number: int, payload: memoryview) -> None:
        if self.tracing:
            self.trace("<", kind, number, payload)
        if self.step < len(HANDSHAKE) or kind in HANDSHAKE:
            self.check_order(kind)
        if number == 0:
            LINK_FRAMES.get(kind, Link.on_text)(self, kind, payload)
        elif number in self.streams and kind != OPEN:
            STREAM_FRAMES[kind](self, self.streams[number], payload)
        elif kind == OPEN:
            self.on_open(number, payload)
        elif number > self.last_id:
            raise ProtocolError("%s on no stream %d" % (Kind(kind).name, number))

    def check_order(self, kind: int) -> None:
        """The frames of the handshake come in their order, and all else after them."""
        if self.step < len(HANDSHAKE):
            if kind == HANDSHAKE[self.step]:
                self.step += 1
            elif kind != Kind.GOODBYE:
                raise ProtocolError("%s during the handshake" % Kind(kind).name)
        elif kind in HANDSHAKE[:-1]:
            raise ProtocolError("%s after the handshake" % Kind(kind).name)

    def on_text(self, kind: int, payload: memoryview) -> None:
        self.owner.on_message(kind, unpack_json(payload))

    def on_ping(self, kind: int, payload: memoryview) -> None:
        self.post(Kind.PONG, bytes(payload))

    def on_pong(self, kind: int, payload: memoryview) -> None:
        """How long it took, behind all that was under way."""
        if payload == self.ping_payload:
            self.round_trip = self.loop.clock() - self.pinged
            self.ping_payload = b""

    def on_goodbye(self, kind: int, payload: memoryview) -> None:
        message = unpack_json(payload)
        self.draining = True
        if not self.goodbye_received:  # once is enough
            self.goodbye_received = True
            self.loop.ready_links[self] = None
            self.owner.on_message(kind, message)

    def on_open(self, number: int, payload: memoryview) -> None:
        if number != self.last_id + 1:
            raise ProtocolError("OPEN of stream %d" % number)
        message, stream = unpack_json(payload), self.add(None)
        if self.draining:
            stream.reset("gone", "the client is leaving")
        elif len(self.streams) > MAX_STREAMS or self.unread > UNREAD_LIMIT:
            stream.reset("overload", "the client has too much to do")
        else:
            self.loop.guard(stream, self.owner.on_open, stream, message)

    def on_data(self, stream: Stream, payload: memoryview) -> None:
        size = len(payload)
        stream.receive_window -= size
        if stream.receive_window < 0 or stream.ended_in:
            raise ProtocolError("DATA over the credit or after END")
        stream.unread += size
        self.unread += size
        self.loop.unread += size
        try:
            stream.owner.receive(payload)
        except Exception as error:
            self.loop.failed(stream.owner, error)
        if self.unread > UNREAD_LIMIT or self.loop.unread > ALL_UNREAD:
            self.shed()

    def shed(self) -> None:
        """Reset the streams that hold most, here or on the largest link, until what is
        held is under the limits."""
        while self.unread > UNREAD_LIMIT:
            self.shed_largest()
        while self.loop.unread > ALL_UNREAD:
            max(self.loop.links, key=lambda link: link.unread).shed_largest()

    def shed_largest(self) -> None:
        worst = max(self.streams.values(), key=lambda other: other.unread)
        owner, cause = worst.owner, "the link holds too much"
        worst.reset("overload", cause)
        self.loop.guard(owner, owner.on_reset, "overload", cause)

    def on_credit(self, stream: Stream, payload: memoryview) -> None:
        (more,) = NUMBER.unpack(payload)
        if not 0 < more <= LAST_ID - stream.credit:
            raise ProtocolError("CREDIT of %d" % more)
        stream.credit += more
        stream.wake()

    def on_end(self, stream: Stream, payload: memoryview) -> None:
        if stream.ended_in:
            raise ProtocolError("END after END")
        stream.ended_in = True
        self.loop.guard(stream.owner, stream.owner.on_end)
        if stream.ended_out:
            stream.detach()

    def on_reset(self, stream: Stream, payload: memoryview) -> None:
        code, _, cause = bytes(payload).decode("utf-8", "replace").partition(" ")
        self.resets += code != "done"
        stream.detach()
        cause = cause[:TOLD_LIMIT]
        self.loop.guard(stream.owner, stream.owner.on_reset, code, cause)

    # What goes out.

    def add(self, owner: Any) -> Stream:
        self.last_id += 1
        stream = self.streams[self.last_id] = Stream(self, self.last_id, owner)
        return stream

    def open(self, owner: Any, message: Dict[str, Any]) -> Stream:
        """Open a stream, as only the server does."""
        stream = self.add(owner)
        stream.open_frame = pack_json(message)
        stream.owe()
        if self.last_id == LAST_ID:
            self.goodbye("stopping", "all stream ids are used up")
        return stream

    def send(self, kind: int, message: Dict[str, Any]) -> None:
        self.post(kind, pack_json(message))

    def post(self, kind: int, payload: bytes) -> None:
        """Owe a frame of the link's own; a newer one of its kind takes its place."""
        if self.step < len(HANDSHAKE) or kind in HANDSHAKE:
            self.check_order(kind)
        self.owed[kind] = payload
        self.loop.ready_links[self] = None

    def on_writable(self) -> None:
        """The kernel has room: control and quiet streams, then one busy frame."""
        if not self.closed:
            self.flush(1)

    def flush(self, busy: int = 0) -> None:
        """Send what is owed, what quiet streams have, and `busy` busy frames, as long
        as the kernel takes all of it."""
        connection = self.connection
        while not (self.closed or connection.waiting()):
            fill = self.put_control(0) if self.owed or self.owing else 0
            if self.quiet:
                fill = self.put_quiet(fill)
            if busy and self.busy:
                busy = 0
                size = self.pacer.quantum // min(SHARES, len(self.busy))
                size = max(LEAST_TURN, size)
                fill = self.put_turn(self.busy.popleft(), fill, size)
            if not fill:
                break
            self.pacer.note_sent(fill)
            connection.write(self.loop.frames[:fill])
        self.pacer.was_idle |= not (self.busy or connection.backlog)
        self.loop.dirty.add(connection)
        if self.draining:
            self.close_when_done()

    def close_when_done(self) -> None:
        """After GOODBYE: is there anything left that the link is needed for?"""
        waiting = self.streams or self.owed or self.owing or self.connection.waiting()
        if not waiting:
            self.close("goodbye")

    def put_control(self, fill: int) -> int:
        """Write the frames that are owed from `fill` on; return where they end."""
        while self.owed and fill < COLLECT:
            kind = next(iter(self.owed))
            fill = self.put(kind, 0, self.owed.pop(kind), fill)
            if kind == Kind.PING:
                self.pinged = self.loop.clock()
        while self.owing and fill < COLLECT:
            fill = self.put_owed(self.owing.popleft(), fill)
        return fill

    def put_owed(self, stream: Stream, fill: int) -> int:
        """The frames of control that a stream owes; with this they are paid."""
        stream.owing = False
        if stream.open_frame is not None:
            fill = self.put(Kind.OPEN, stream.id, stream.open_frame, fill)
            stream.open_frame = None
        if stream.reset_frame is not None:
            return self.put(Kind.RESET, stream.id, stream.reset_frame, fill)
        now = self.loop.clock()
        credit = stream.take_credit(now, self.round_trip)
        if credit:
            fill = self.put(Kind.CREDIT, stream.id, NUMBER.pack(credit), fill)
            if not self.ping_payload and now - self.pinged >= ASK_AFTER:
                self.ping()  # the round trip under load is what windows must cover
        return fill

    def put_quiet(self, fill: int) -> int:
        """Turns of quiet streams, until they are worth a system call."""
        limit = min(QUIET, self.pacer.quantum)
        while self.quiet and fill < COLLECT:
            fill = self.put_turn(self.quiet.popleft(), fill, limit)
        return fill

    def put_turn(self, stream: Stream, fill: int, limit: int) -> int:
        """One turn of a stream: the owner writes right behind the header."""
        stream.queued = False
        if stream.ended_out or stream.credit < LEAST_TURN or not stream.open:
            return fill  # with no room in its view a source would seem to be at its end
        start, size = fill + HEADER.size, min(limit, stream.credit)
        view = self.loop.frames[start : start + size]
        try:
            count = stream.owner.pull(view)
        except Exception as error:
            self.loop.failed(stream.owner, error)
            return fill
        if count is None or not stream.open:
            return fill
        if count == 0:
            stream.ended_out = True
            if stream.ended_in:
                stream.detach()
            return self.put(Kind.END, stream.id, b"", fill)
        stream.note_sent(count, self.loop.clock())
        if count == size:
            stream.wake()  # a source that came short is watched instead
        return self.put(DATA, stream.id, view[:count], fill)

    def put(self, kind: int, number: int, payload: Any, fill: int) -> int:
        """Header and payload at `fill`; the payload of DATA stands there already."""
        start, end = fill + HEADER.size, fill + HEADER.size + len(payload)
        HEADER.pack_into(self.loop.frames, fill, kind << 24 | len(payload), number)
        if kind != DATA:
            self.loop.frames[start:end] = payload
        if self.tracing:
            self.trace(">", kind, number, payload)
        return end

    # How it ends.

    def check(self) -> None:
        """Each second: does the other side live, and do our bytes move?"""
        now = self.loop.clock()
        if self.connection.backlog and now - self.connection.moved > STUCK_AFTER:
            raise OSError("nothing could be sent for %d s" % STUCK_AFTER)
        if self.heard < self.pinged < now - PONG_WITHIN:
            raise OSError("no sign of life for %d s" % (now - self.heard))
        if now - self.heard >= PING_AFTER and self.heard >= self.pinged:
            self.ping()
        self.timer.set(1.0)

    def ping(self) -> None:
        """Ask for a sign of life."""
        if self.step == len(HANDSHAKE):
            self.ping_payload = PING_CLOCK.pack(self.loop.clock())
            self.post(Kind.PING, self.ping_payload)

    def goodbye(self, code: str, reason: str) -> None:
        """Take no new streams; flush() closes the link after the last."""
        if not self.draining:
            self.draining = True
            self.send(Kind.GOODBYE, {"code": code, "reason": reason})

    def fail(self, error: Exception) -> None:
        """The connection is broken, or the peer's frames are."""
        if isinstance(error, OSError):
            self.connection.lost = self.connection.lost or error
        else:
            code = "protocol" if isinstance(error, ProtocolError) else "error"
            self.say_last_word(code, str(error))
        self.close(str(error))

    def say_last_word(self, code: str, reason: str) -> None:
        """A GOODBYE that goes out before the link closes, unless another waits, or
        bytes before it do: those would delay it, perhaps for ever."""
        if not self.connection.waiting():
            message = pack_json({"code": code, "reason": reason})
            self.owed.setdefault(Kind.GOODBYE, message)
            self.owing.clear()
            self.connection.write(self.loop.frames[: self.put_control(0)])

    def close(self, cause: str, code: str = "link-lost") -> None:
        """Over, with all its streams. What was said last still arrives, but not where
        other bytes wait before it."""
        if not self.closed:
            self.closed = True
            self.timer.clear()
            self.loop.links.discard(self)
            self.loop.unread -= self.unread
            self.owner.on_closed(cause)
            streams, self.streams = self.streams, {}
            for stream in streams.values():
                stream.open, stream.unread = False, 0
                self.loop.guard(stream.owner, stream.owner.on_reset, code, cause)
            if self.connection.lost or self.connection.backlog:
                self.connection.close()
            else:
                self.connection.linger()

    def trace(self, way: str, kind: int, number: int, payload: Any) -> None:
        """The line that -vv gives for each frame."""
        name, start = Kind(kind).name, bytes(payload[:24])
        if kind == Kind.LOGIN:
            start = b""  # who knows the session may take the link over
        log.debug("%s %s %d %s %d %r", self, way, number, name, len(payload), start)


LINK_FRAMES: Dict[int, Call] = {  # those that are not here are for the owner
    Kind.PING: Link.on_ping,
    Kind.PONG: Link.on_pong,
    Kind.GOODBYE: Link.on_goodbye,
}
STREAM_FRAMES: Dict[int, Call] = {
    Kind.DATA: Link.on_data,
    Kind.CREDIT: Link.on_credit,
    Kind.END: Link.on_end,
    Kind.RESET: Link.on_reset,
}


# -----------------------------------------------------------------------------------
# What both say: nothing at all without -v but the line that they end with.
# -----------------------------------------------------------------------------------
def printable(text: str) -> str:
    """What comes from outside forges no line and moves no cursor."""
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)


class OneLine:
    """Formats a record in one line; only a traceback has more."""

    def __init__(self, formatter: Any) -> None:
        self.formatter = formatter

    def format(self, record: Any) -> str:
        text = self.formatter.format(record)
        return "\n".join(map(printable, text.split("\n" if record.exc_info else "\0")))


def set_up_log(verbose: int) -> None:
    """-v tells events, -vv frames too, on stderr."""
    if verbose:
        import logging

        logging.raiseExceptions = False  # a full disk under the log harms only the log
        handler = logging.StreamHandler()
        form = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
        handler.setFormatter(OneLine(form))  # type: ignore[arg-type]
        logger = logging.getLogger("mdm_tunnel")
        logger.addHandler(handler)
        logger.setLevel(INFO if verbose == 1 else DEBUG)


def be_deaf() -> None:
    """To the signals that end us, but while a loop catches them: when that is over we
    are ending already, and one more is no reason for a traceback."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def die(status: int, cause: Any) -> NoReturn:
    """End with one line. 1: anything, 2: usage or configuration, 3: login refused, 4:
    attempts used up."""
    name = os.path.basename(sys.argv[0] or "-")
    text = printable(str(cause))
    with contextlib.suppress(OSError, ValueError):  # a full disk, or no stderr
        print("%s: %s" % ("mdm-tunnel" if name == "-" else name, text), file=sys.stderr)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, **options: Any) -> None:
        # To ask for the terminal's width it would import shutil, even without --help.
        form = functools.partial(argparse.HelpFormatter, width=79)
        super().__init__(formatter_class=form, **options)

    def error(self, message: str) -> NoReturn:
        die(2, "%s (--help tells more)" % message)
# ===================================================================================
# SHARED BLOCK: ends.
# ===================================================================================


# -----------------------------------------------------------------------------------
# HTTP/1.1: heads and body framing, without any I/O (RFC 9112; fields: RFC 9110). Heads
# are parsed strictly: what two parsers could read in two ways is refused. Bodies are
# copied as they are, as far as their framing has been understood.
# -----------------------------------------------------------------------------------
HEAD_LIMIT = 64 << 10  # bytes of a head: far more than cookies need
LINE_LIMIT = 16 << 10  # bytes of a request line
FIELD_LIMIT = 200  # fields of a head, and of a trailer section
WORDS_LIMIT = 32  # options in a Connection field
INTERIM_LIMIT = 100  # 1xx answers to one request
CHUNK_LINE_LIMIT = 2 << 10  # bytes of a chunk or trailer line: fits the least turn
CHUNKS_A_TURN = 64 << 10  # bytes of it read at once: what is not understood waits here
RECENT = 256  # sections of fields that are remembered: they mostly come again
RECENT_SIZE = 4 << 10  # bytes: longer ones would cost more memory than they save time

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 5.6.2
TEXT = r"[\t\x20-\x7e\x80-\xff]"
QUOTED = r'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\%s)*"' % TEXT
BARE_LF = re.compile(rb"(?<!\r)\n")
REQUEST_LINE = re.compile(r"(%s) ([\x21\x22\x24-\x7e]+) HTTP/(\d)\.(\d)\r\n" % TOKEN)
STATUS_LINE = re.compile(r"HTTP/1\.(\d) ([1-5]\d\d)(?: (%s*))?\r\n" % TEXT)
FIELDS = re.compile(r"(?:%s:%s*\r\n)*\r\n" % (TOKEN, TEXT))
TRAILER = re.compile(r"(?:%s:%s*)?" % (TOKEN, TEXT))
CHUNK = re.compile(
    r"([0-9A-Fa-f]{1,8})(?:[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|%s))?)*"
    % (TOKEN, TOKEN, QUOTED)
)
LABELS = r"(?:[0-9A-Za-z_-]+\.)*[0-9A-Za-z_-]+\.?"  # of any length, but none empty
HOST = re.compile(r"(\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]|%s)(?::(\d{0,5}))?" % LABELS)
HOST_LIMIT = 255  # characters (RFC 1035 2.3.4)
PROTOCOLS = re.compile(r"%s(?:/%s)?(?:[ \t]*,[ \t]*%s(?:/%s)?)*" % (4 * (TOKEN,)))
ABSOLUTE = re.compile(r"(?i)(https?)://([^/?@]+)([/?].*)?")
EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")  # before a request: RFC 9112 2.2
LINE_BREAK = re.compile(r"[\r\n\0]")
LENGTH = re.compile(r"\d{1,18}")
REPEATABLE = ("GET", "HEAD", "OPTIONS")  # may be sent twice: a kept stream may be dead
NOTHING: Set[str] = set()


def field_lines(names: str) -> Pattern[str]:
    """Finds the fields of these names, each with the CRLF before it."""
    return re.compile(r"(?ai)\r\n(%s):([^\r]*)" % names)


FRAMING = "content-length|transfer-encoding|"  # what we have understood, we say anew
LOOKALIKES = "content_length|transfer_encoding"  # the same to some services
HOP_BY_HOP = FRAMING + "connection|keep-alive|proxy-connection|te|upgrade"
FORWARDED = "x[-_]forwarded[-_][^:]*|x[-_]real[-_]ip|forwarded"  # ours to say
NOTED = field_lines(FRAMING + LOOKALIKES + "|host|connection|upgrade|te|accept")
NO_TRAILER = re.compile("(?ai)(?:%s|%s|host):" % (HOP_BY_HOP, FORWARDED))
TO_SERVICE = field_lines(HOP_BY_HOP + "|host|" + FORWARDED)  # what is not passed on
TO_VISITOR = field_lines(HOP_BY_HOP)
UNWRAPPED = field_lines(HOP_BY_HOP + "|trailer")  # the same, of a body without chunks


class HTTPError(ProtocolError):
    """An answer of our own: status, a word for programs, a sentence for people."""

    def __init__(self, status: int, code: str, cause: str, fields: Any = ()) -> None:
        super().__init__(cause)
        self.status, self.code, self.cause = status, code, cause
        self.fields = list(fields)


def malformed(cause: str) -> HTTPError:
    return HTTPError(400, "malformed", cause)


class Fields(Dict[str, str]):
    """Fields by name, without regard to case; repeated ones joined by a comma."""

    def __init__(self, pairs: List[Tuple[str, str]]) -> None:
        super().__init__()
        for name, value in pairs:  # RFC 9110 5.3
            name = name.lower()
            self[name] = self[name] + ", " + value if name in self else value

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class Section:
    """The fields of a head. They stay the text they are; only what matters here is
    looked at, or cut out. Never changed, so it can stand for all heads with the same
    fields: most requests of a visitor differ in their first line only."""

    __slots__ = ("text", "named", "connection", "upgrade", "passed")

    def __init__(self, raw: str) -> None:
        if not FIELDS.fullmatch(raw, 2):
            raise malformed("a field breaks the grammar (RFC 9112, 5)")
        if raw.count("\r\n") > FIELD_LIMIT + 2:
            raise HTTPError(431, "too-long", "more than %d fields" % FIELD_LIMIT)
        self.text = raw[:-4]  # a CRLF before each field, none behind
        self.passed: Tuple[Any, bytes] = (None, b"")  # how it went on last, and why so
        self.named: Dict[str, str] = {}  # those noted, repeated ones as one list
        for name, value in NOTED.findall(self.text):
            name, value = name.lower(), value.strip(" \t")
            if name in self.named:  # RFC 9110 5.3
                value = self.named[name] + ", " + value
            self.named[name] = value
        if "content_length" in self.named or "transfer_encoding" in self.named:
            raise malformed("a field looks like one that frames the body")
        self.connection = self.words("connection")
        self.upgrade = ""
        if self.connection:
            if "upgrade" in self.connection:
                self.upgrade = self.named.get("upgrade", "")
                if self.upgrade and not PROTOCOLS.fullmatch(self.upgrade):
                    raise malformed("Upgrade names no protocol (RFC 9110, 7.8)")
            if len(self.connection) > WORDS_LIMIT:
                raise malformed("Connection has more than %d words" % WORDS_LIMIT)
            if self.connection & {"host", "content-length", "transfer-encoding"}:
                raise malformed("Connection names a field that must arrive")

    def words(self, wanted: str) -> Set[str]:
        """The members of a list of words, in lower case."""
        value = self.named.get(wanted)
        if not value:
            return NOTHING
        if "," not in value:
            return {value.lower()}
        return {word.strip(" \t") for word in value.lower().split(",")} - {""}

    def cut(self, text: str, gone: Pattern[str]) -> str:
        """`text`, which is ours or what a hook made of it, without the fields that
        concern only this hop."""
        text = gone.sub("", text)
        if self.connection - {"close", "keep-alive", "te", "upgrade"}:
            lines, named = text.split("\r\n"), self.connection
            lines = [x for x in lines if x.partition(":")[0].lower() not in named]
            text = "\r\n".join(lines)
        return text


recent_section = functools.lru_cache(maxsize=RECENT)(Section)


class Head:
    """What requests and answers have in common: their fields, in their order."""

    minor = 1  # of the version HTTP/1.x

    def __init__(self, text: str, start: int) -> None:
        """The fields begin at `start`."""
        raw = text[start - 2 :]
        self.section = (recent_section if len(raw) <= RECENT_SIZE else Section)(raw)
        self.named = self.section.named
        self.connection = self.section.connection
        self.upgrade = self.section.upgrade
        self.pairs: Optional[List[Tuple[str, str]]] = None  # the fields, if asked for

    @property
    def fields(self) -> List[Tuple[str, str]]:
        """All fields, as (name, value)."""
        if self.pairs is None:
            lines = self.section.text.split("\r\n")[1:]
            parts = [line.partition(":") for line in lines]
            self.pairs = [(name, value.strip(" \t")) for name, _, value in parts]
        return self.pairs

    @fields.setter
    def fields(self, pairs: List[Tuple[str, str]]) -> None:
        self.pairs = pairs

    @property
    def headers(self) -> Fields:
        """The fields by name."""
        return Fields(self.fields)

    def framing(self) -> "Optional[Body]":
        """The body as its fields frame it (RFC 9112 6.3); None when they do not."""
        coding = self.named.get("transfer-encoding")
        length = self.named.get("content-length")
        if coding is not None:
            if length is not None:
                raise malformed("both Transfer-Encoding and Content-Length")
            if self.minor == 0:
                raise malformed("Transfer-Encoding in HTTP/1.0")
            if coding.lower() != "chunked":
                raise HTTPError(501, "coding", "a transfer coding other than chunked")
            return Chunked()
        if length is None:
            return None
        if not LENGTH.fullmatch(length):
            raise malformed("Content-Length is not one number")
        return Body(int(length))

    def pass_on(self, first: str, why: Any, gone: Pattern[str], add: Call) -> bytes:
        """The head as it goes on. `add` gives lines of ours, each with a CRLF before
        it; `why` is what they depend on besides the fields."""
        section = self.section
        if self.pairs is not None:  # a hook has had them in its hands
            text = "".join(["\r\n%s: %s" % pair for pair in self.pairs])
            rest = "".join([section.cut(text, gone)] + add() + ["\r\n\r\n"])
            return (first + rest).encode("latin-1")
        if section.passed[0] == why:
            return first.encode("latin-1") + section.passed[1]
        rest = "".join([section.cut(section.text, gone)] + add() + ["\r\n\r\n"])
        if len(rest) <= 2 * RECENT_SIZE:
            section.passed = why, rest.encode("latin-1")
        return (first + rest).encode("latin-1")


@functools.lru_cache(maxsize=RECENT)
def read_host(host: str) -> str:
    """The name in a Host field: in lower case, without port and dot at the end. Raises
    HTTPError."""
    match = HOST.fullmatch(host)
    if not match or len(host) > HOST_LIMIT or int(match.group(2) or 0) >= 1 << 16:
        raise malformed("a request has one Host field, and it names a host")
    return match.group(1).rstrip(".").lower()


class Request(Head):
    """A visitor's request. Router hooks see its `method`, its `target` (`/path?query`
    or `*`), its `host` as it was sent, `name` (the host in lower case, without port),
    the `headers`, and the `address` of the visitor. What they take out of `fields`,
    (name, value) pairs, the service does not get."""

    def __init__(self, head: Any, address: str, scheme: str = "http") -> None:
        text = head.decode("latin-1")
        line = REQUEST_LINE.match(text)
        if not line:
            raise malformed("the request line breaks the grammar (RFC 9112, 3)")
        self.method, self.target, major, minor = line.groups()
        if major != "1":
            raise HTTPError(505, "version", "only HTTP/1.x is spoken here")
        self.minor = int(minor != "0")  # RFC 9110 2.5: 1.7 is 1.1 to us
        self.address, self.scheme = address, scheme
        super().__init__(text, line.end())
        self.body = self.framing() or NO_BODY
        if self.method == "CONNECT":
            raise HTTPError(501, "connect", "CONNECT is not served here")
        self.host = host = self.named.get("host", "")
        if self.target[0] != "/":
            self.host = self.absolute() or host
        self.name = read_host(self.host)
        if self.host is not host:
            read_host(host)
        if self.minor == 0 or self.upgrade and self.asks_for_h2c():
            self.upgrade = ""

    def asks_for_h2c(self) -> bool:
        """Which would be spoken past us (RFC 7540 3.2)."""
        words = self.section.words("upgrade")
        return any(word.partition("/")[0] == "h2c" for word in words)

    def absolute(self) -> str:
        """Bring the target into origin-form; the host that an absolute one names."""
        if (self.target, self.method) == ("*", "OPTIONS"):
            return ""
        match = ABSOLUTE.fullmatch(self.target)
        if not match or match.group(1).lower() != self.scheme:
            raise malformed("the target is neither a path nor its %s URL" % self.scheme)
        rest = match.group(3) or ""
        if not rest and self.method == "OPTIONS":
            rest = "*"  # RFC 9112 3.2.4
        self.target = rest if rest.startswith(("/", "*")) else "/" + rest
        return match.group(2)

    def keeps_alive(self) -> bool:
        """Whether the visitor wants to go on after the answer (RFC 9112 9.3)."""
        if self.minor == 0:
            return "keep-alive" in self.connection
        return "close" not in self.connection

    def wants_html(self) -> bool:
        return "text/html" in self.named.get("accept", "")

    def to_service(self) -> bytes:
        """The head as the service gets it."""
        why = self.address, self.host, self.minor, self.scheme
        first = "%s %s HTTP/1.%d\r\nHost: %s"
        first %= (self.method, self.target, self.minor, self.host)
        return self.pass_on(first, why, TO_SERVICE, self.for_service)

    def for_service(self) -> List[str]:
        """The lines that are ours to say."""
        named, hops = self.named, []
        add = [
            "\r\nX-Forwarded-For: " + self.address,
            "\r\nX-Forwarded-Proto: " + self.scheme,
            "\r\nX-Forwarded-Host: " + self.host,
        ]
        if "content-length" in named:
            add.append("\r\nContent-Length: " + named["content-length"])
        elif "transfer-encoding" in named:
            add.append("\r\nTransfer-Encoding: chunked")
        if self.upgrade:
            hops.append("Upgrade")
            add.append("\r\nUpgrade: " + self.upgrade)
        if "te" in named and "trailers" in self.section.words("te"):
            hops.append("TE")
            add.append("\r\nTE: trailers")
        if self.minor == 0:
            hops.append("close")
        if hops:
            add.append("\r\nConnection: " + ", ".join(hops))
        return add


class Answer(Head):
    """A service's answer. Raises HTTPError (502) when it cannot be understood."""

    def __init__(self, head: Any) -> None:
        text = head.decode("latin-1")
        line = STATUS_LINE.match(text)
        if not line:
            raise malformed("its status line breaks the grammar (RFC 9112, 4)")
        minor, status, reason = line.groups()
        self.minor = int(minor != "0")
        self.status, self.reason = int(status), reason or ""
        super().__init__(text, line.end())

    def frame(self, method: str) -> "Body":
        """The body that follows (RFC 9112 6.3)."""
        body = self.framing()
        if method == "HEAD" or self.status in (204, 304) or self.status < 200:
            return NO_BODY
        return Body(None) if body is None else body

    def keeps_alive(self) -> bool:
        """Whether the service goes on after this answer."""
        return self.minor == 1 and "close" not in self.connection

    def to_visitor(self, connection: str, unwrapped: bool = False) -> bytes:
        """The head as the visitor gets it; `connection` is ours to say. `unwrapped`: of
        a chunked body he gets the content only."""
        first = "HTTP/1.1 %d %s" % (self.status, self.reason)
        why, gone = (connection, unwrapped, self.status), TO_VISITOR
        if unwrapped:
            gone = UNWRAPPED
        return self.pass_on(first, why, gone, lambda: self.for_visitor(*why[:2]))

    def for_visitor(self, connection: str, unwrapped: bool) -> List[str]:
        """The lines that are ours to say."""
        add = []
        if self.status >= 200 and self.status != 204:  # RFC 9110 8.6
            if "content-length" in self.named:
                add.append("\r\nContent-Length: " + self.named["content-length"])
            elif "transfer-encoding" in self.named and not unwrapped:
                add.append("\r\nTransfer-Encoding: chunked")
        if self.upgrade and self.status in (101, 426):  # RFC 9110 7.8
            add.append("\r\nUpgrade: " + self.upgrade)
            connection = "Upgrade, " + connection if connection else "Upgrade"
        if connection:
            add.append("\r\nConnection: " + connection)
        return add


class Body:
    """A body of `left` bytes; of None, until the connection ends. feed() says how many
    of the bytes that came belong to it, and `spans` where its content is in them."""

    def __init__(self, left: Optional[int]) -> None:
        self.until_end = left is None
        self.left = sys.maxsize if left is None else left
        self.done = left == 0
        self.untouched = True
        self.more = False  # feed() was given more lines than it might take
        self.lines = 0  # that it took
        self.spans: List[Tuple[int, int]] = []

    @property
    def at_most(self) -> int:
        """Bytes to read at once: what is beyond the body waits here."""
        return self.left

    def feed(self, data: Any, lines: int = sys.maxsize) -> int:
        """Take of `data` what is understood, at most so many lines. Raises HTTPError
        for a broken framing."""
        count = min(len(data), self.left)
        self.spans = [(0, count)]
        if count:
            self.untouched = False
        if not self.until_end:
            self.left -= count
            self.done = self.left == 0
        return count


NO_BODY = Body(0)  # of most requests


class Chunked(Body):
    """RFC 9112 7.1. A line counts when it is there to its end and keeps the grammar."""

    at_most = CHUNKS_A_TURN

    def __init__(self) -> None:
        super().__init__(0)
        self.done = False
        self.expect: Callable[[str], Any] = self.on_size
        self.trailers = 0

    def feed(self, data: Any, lines: int = sys.maxsize) -> int:
        at = self.lines = 0
        self.spans = []
        while at < len(data) and self.lines < lines and not self.done:
            if self.left:
                end = min(len(data), at + self.left)
                self.spans.append((at, end))
                self.left -= end - at
                at = end
                continue
            for size in (32, CHUNK_LINE_LIMIT):  # most lines are short
                start = bytes(data[at : at + size])
                end = start.find(b"\n")
                if end >= 0:
                    break
            if end < 0 and len(start) < CHUNK_LINE_LIMIT:
                break
            if end < 1 or start[end - 1 : end] != b"\r":
                raise malformed("a line of a chunked body is too long or has no CRLF")
            self.untouched = False
            self.expect(start[: end - 1].decode("latin-1"))
            at += end + 1
            self.lines += 1
        self.more = self.lines == lines and not self.done
        return at

    def on_size(self, line: str) -> None:
        match = CHUNK.fullmatch(line)
        if not match:
            raise malformed("a chunk size breaks the grammar (RFC 9112, 7.1)")
        self.left = int(match.group(1), 16)
        self.expect = self.on_end_of_chunk if self.left else self.on_trailer

    def on_end_of_chunk(self, line: str) -> None:
        if line:
            raise malformed("a chunk is longer than it said")
        self.expect = self.on_size

    def on_trailer(self, line: str) -> None:
        self.trailers += 1
        if self.trailers > FIELD_LIMIT or not TRAILER.fullmatch(line):
            raise malformed("a trailer breaks the grammar (RFC 9112, 7.1.2)")
        if NO_TRAILER.match(line):
            raise malformed("a field that cannot be a trailer (RFC 9110, 6.5.1)")
        self.done = not line


def find_head(buffer: bytearray, searched: int) -> int:
    """Where the head in `buffer` ends; 0 while it is not whole. The first `searched`
    bytes were looked at before. Raises HTTPError when it never will be a head."""
    end = buffer.find(b"\r\n\r\n", max(0, searched - 3)) + 4
    size = end if end > 3 else len(buffer)
    if size > LINE_LIMIT and buffer.find(b"\r\n", 0, LINE_LIMIT + 2) < 0:
        raise HTTPError(414, "too-long", "a line of more than %d bytes" % LINE_LIMIT)
    if size >= HEAD_LIMIT:
        raise HTTPError(431, "too-long", "a head of more than %d bytes" % HEAD_LIMIT)
    if end > 3:
        return end
    if BARE_LF.search(buffer, max(0, searched - 1)):
        raise malformed("a line of the head ends without CR")
    return 0


# -----------------------------------------------------------------------------------
# Names: which id and which service a host stands for. With --domain only what is below
# one of the domains counts, and localhost; without, a name is read from the left and
# the rest may be anything, so ids that are connected are what decides.
# -----------------------------------------------------------------------------------
ADDRESS = re.compile(r"\[.*\]|[0-9.]+")


class Domain(NamedTuple):
    """One of --domain."""

    scheme: str
    name: str
    port: Optional[int]  # None: the visitors' port; 0: that of the scheme


def parse_domains(text: str) -> List[Domain]:
    """The value of --domain. Raises ValueError, with what is wrong."""
    if not text:
        return []
    import urllib.parse

    domains = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        whole = "://" in part
        url = urllib.parse.urlsplit(part if whole else "//" + part)
        name = (url.hostname or "").rstrip(".")
        bare = not (url.path.strip("/") or url.query or url.fragment or url.username)
        labels_fine = all(LABEL.fullmatch(label) for label in name.split("."))
        if url.scheme not in ("", "http", "https") or not (bare and labels_fine):
            raise ValueError("%r is neither a domain nor its URL" % part)
        port = url.port or (0 if whole else None)
        domains.append(Domain(url.scheme or "http", name, port))
    return domains


class Names:
    """Reads hosts and makes URLs. `ids` has the ids that are connected."""

    def __init__(self, domains: List[Domain], ids: Any) -> None:
        self.domains, self.ids = domains, ids
        names = [domain.name for domain in domains] + ["localhost"]
        self.bases = sorted(names, key=len, reverse=True)  # one may be below another
        self.scheme, self.port = "http", 0  # of the visitors' port, for the URLs

    def find(self, name: str) -> Tuple[Optional[str], Optional[str]]:
        """(id, service), (id, None) or (None, None) for a host in lower case."""
        labels = name.split(".")
        if self.is_base(name):
            return None, None
        if not self.domains:
            service, dashes, id = labels[0].partition("--")
            if dashes and id in self.ids:
                return id, service
            if len(labels) > 1 and labels[1] in self.ids:
                return labels[1], labels[0]
            return (labels[0], None) if labels[0] in self.ids else (None, None)
        for base in self.bases:
            if name.endswith("." + base):
                labels = name[: -len(base) - 1].replace("--", ".").split(".")
                if len(labels) <= 2:
                    return labels[-1], labels[0] if len(labels) == 2 else None
        return None, None

    def is_base(self, name: str) -> bool:
        """Whether a host stands for the server itself: then it shows how to begin."""
        return name in self.bases or bool(ADDRESS.fullmatch(name))

    def base(self, name: str) -> str:
        """Under which name a client may dial this server, as far as we can know."""
        labels = name.split(".")
        if self.domains:
            return self.domains[0].name
        if self.is_base(name) or len(labels) < 3:
            return name
        return "localhost" if labels[-1] == "localhost" else ".".join(labels[-2:])

    def link(self, service: str, host: str, came: str) -> str:
        """The service of the id whose index is at `host`, on this way to the server:
        `came` is the scheme."""
        host = host.lower()
        for scheme, name, port in self.domains:
            if port is not None and host.partition(":")[0].endswith("." + name):
                suffix = ":%d" % port if port else ""
                host = host.partition(":")[0] + suffix
                return "%s://%s.%s/" % (scheme, service, host)
        return "%s://%s.%s/" % (came, service, host)

    def url(self, id: str, service: str, dialled: str) -> str:
        """Where a service is reached, or "error: ..." when the server has no name.
        `dialled` is the Host that its client used."""
        host = HOST.fullmatch(dialled)
        name = host.group(1).rstrip(".").lower() if host else ""
        scheme, port = self.scheme, None
        if self.domains:
            scheme, name, port = self.domains[0]
            scheme = self.scheme if port is None else scheme
        elif name in ("127.0.0.1", "[::1]"):
            name = "localhost"
        elif not name or ADDRESS.fullmatch(name):
            return "error: no name: the server wants --domain, or a name to dial"
        port = self.port if port is None else port
        suffix = "" if port in (0, 80 if scheme == "http" else 443) else ":%d" % port
        return "%s://%s.%s.%s%s/" % (scheme, service, id, name, suffix)


class Router:
    """Decides where a request goes, and whether it may. Subclass it and hand it to
    Server(router=...). Hooks are asked for every request, inside the loop: they must
    not block. One that raises costs its request a 500, and nothing else."""

    names: Names  # how the server reads hosts; the server sets it

    def route(self, request: Request) -> Any:
        """(id, service), (id, None) for the id's index page, (None, None) or None for a
        404. By default the host decides."""
        return self.names.find(request.name)

    def authorize(self, request: Request) -> Any:
        """None lets the request pass; (status, fields) answers it, for example
        (401, {"WWW-Authenticate": 'Basic realm="tunnel"'})."""
        return None


# -----------------------------------------------------------------------------------
# Pages: what the server says itself. HTML for browsers, text for everybody else.
# -----------------------------------------------------------------------------------
INDEX_LIMIT = 200  # services on an index page: to make one takes a while
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title>
<style>
:root { color-scheme: light dark }
body { font: 17px/1.55 system-ui, sans-serif; max-width: 40em; margin: 14vh auto;
  padding: 0 1.2em }
h1 { font-size: 1.5em; margin: 0 0 .6em }
ul { list-style: none; padding: 0 }
li { margin: .4em 0 }
pre { background: rgba(127, 127, 127, .14); padding: .8em 1em; border-radius: 6px;
  overflow-x: auto; font-size: .85em }
footer { margin-top: 3em; font-size: .8em; opacity: .6 }
</style></head><body>
<h1>%(title)s</h1>
%(body)s
<footer>mdm-tunnel %(version)s</footer>
</body></html>
"""


def phrase(status: int, default: str) -> str:
    """What RFC 9110 calls a status."""
    import http

    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return default


def make_page(title: str, lines: List[str], as_html: bool) -> Tuple[str, bytes]:
    """(content type, body). A line that is a URL becomes a link, one that begins with
    two spaces something to paste; all is escaped."""
    lines = list(map(printable, lines))
    if not as_html:
        return "text/plain; charset=utf-8", "\n".join([title] + lines + [""]).encode()
    import html

    parts = []
    for line in lines:
        text = html.escape(line)
        if line.startswith("  "):
            parts.append("<pre>%s</pre>" % text.strip())
        elif line.startswith("http://") or line.startswith("https://"):
            parts.append('<ul><li><a href="%s">%s</a></li></ul>' % (text, text))
        else:
            parts.append("<p>%s</p>" % text)
    values = {"title": html.escape(title), "body": "\n".join(parts), "version": VERSION}
    return "text/html; charset=utf-8", (PAGE % values).encode()


# -----------------------------------------------------------------------------------
# Tunnel: the link of one client, from our 101 on: login, its services, its streams.
# -----------------------------------------------------------------------------------
LOGIN_TIME = 3.0  # seconds from our 101 to a whole LOGIN
SERVICES_LIMIT = 2000  # of a client: to make the URLs of more takes too long
LISTS_TIME = 0.2  # seconds between two lists of services that are looked at
STRANGERS = 128  # links on which nobody has logged in yet; one more, and one must go
TAKEOVER = 3.0  # seconds for the owner of an id to show that he lives, when it is asked
TAKEOVER_LOOK = 0.05  # seconds between looks at whether he has


def parse_tokens(data: bytes) -> Dict[str, str]:
    """The file of --tokens, {"tim": "secret"}. Raises ValueError, naming the id that is
    wrong, and no token."""
    tokens: Dict[str, str] = {}
    for id, token in parse_object(data):
        try:
            if not LABEL.fullmatch(id.lower()):
                raise ValueError("an id has letters, digits, `-` and `_`, and no `--`")
            if id.lower() in tokens:
                raise ValueError("the id stands there twice")
            tokens[id.lower()] = check_token(token)
        except ValueError as error:
            raise ValueError("id %r: %s" % (id, error)) from None
    return tokens


class Tunnel:
    """One client's link at the server."""

    def __init__(self, server: "Server", connection: Connection, host: str) -> None:
        self.server, self.dialled = server, host
        self.id = self.session = ""
        self.token = ""  # of our id, once it is proven
        self.nonce = make_nonce()
        self.welcoming: Dict[str, str] = {}  # what WELCOME says
        self.services: Dict[str, str] = {}  # name -> target, to know when it changes
        self.peer = "client %s" % address_of(connection.sock)
        self.asked = 0.0  # when the owner of our id was asked whether he lives
        self.challenger: Optional[Tunnel] = None  # waits for whether we live
        self.link = Link(server.loop, connection, self, "server")
        self.timer = Timer(server.loop, self.link, self.on_late)
        self.timer.set(LOGIN_TIME)
        self.contest_timer = Timer(server.loop, self.link, self.contest)
        self.listed: Optional[Dict[str, Any]] = None  # the newest, not yet looked at
        self.list_timer = Timer(server.loop, self.link, self.on_services)
        self.link.send(Kind.CHALLENGE, {"version": VERSION, "nonce": self.nonce})

    def __str__(self) -> str:
        return self.id or self.peer

    def on_late(self) -> None:
        raise OSError("no login within %d s" % LOGIN_TIME)

    def on_message(self, kind: int, message: Dict[str, Any]) -> None:
        if kind == Kind.LOGIN:
            self.on_login(message)
        elif kind == Kind.SERVICES:
            self.timer.clear()
            self.listed = message
            if self.list_timer.due is None:
                self.on_services()
        elif kind == Kind.GOODBYE:
            log.info("%s says goodbye: %s", self, peer_text(message.get("reason")))
            self.drop_kept()

    def drop_kept(self, most: int = MAX_STREAMS) -> None:
        """They would hold up the end, or cost the client descriptors."""
        kept = (s for s in self.link.streams.values() if isinstance(s.owner, Kept))
        for stream in list(itertools.islice(kept, most)):
            stream.owner.drop()

    def on_login(self, message: Dict[str, Any]) -> None:
        self.timer.clear()
        id, session = message.get("id"), message.get("session")
        if not isinstance(id, str) or not LABEL.fullmatch(id.lower()):
            self.refuse("refused", "an id is a DNS label")
        elif id.lower() == "localhost":  # or tim.localhost would be its service tim
            self.refuse("refused", "localhost is no id")
        elif not isinstance(session, str) or not session:
            raise ProtocolError("LOGIN without a session")
        else:
            self.id, self.session = id.lower(), session
            if self.proves(message):
                self.claim()

    def proves(self, message: Dict[str, Any]) -> bool:
        """Whether the client knows the token of its id, or needs none; else it is told
        the same, after the same work, whether the token was wrong or the id unknown."""
        tokens = self.server.tokens
        if tokens is None:
            return True
        token = tokens.value.get(self.id)
        nonces = self.nonce, str(message.get("nonce"))
        proof = prove(token or self.nonce, "client", nonces, self.id)
        if "proof" not in message:
            self.refuse("refused", "this server wants a token")
        elif not is_proof(message["proof"], proof) or token is None:
            self.refuse("refused", "no such id, or a wrong token")
        else:
            self.token = token
            self.welcoming["proof"] = prove(token, "server", nonces, self.id)
            return True
        return False

    def claim(self) -> None:
        """An id belongs to the session that has it, as long as that lives, or until
        another one proves that it knows the token."""
        owner = self.server.tunnels.get(self.id)
        if owner and owner.session == self.session:
            owner.link.close("the same client dialled again")
            owner = None
        elif owner and self.token:
            owner.depose("replaced", "another client logged in as %s" % self.id)
            owner = None
        if owner is None:
            self.welcome()
        elif owner.challenger and not owner.challenger.link.closed:
            self.refuse("taken", "the id %s is taken" % self.id)
        else:
            owner.challenger = self
            owner.link.ping()
            self.asked = self.server.loop.clock()
            self.contest()

    def contest(self) -> None:
        """Does the owner of our id live? Any byte since we asked shows it."""
        owner, now = self.server.tunnels.get(self.id), self.server.loop.clock()
        if owner and owner.link.heard > self.asked:
            owner.challenger = None
            self.refuse("taken", "the id %s is taken" % self.id)
        elif owner and now < self.asked + TAKEOVER:
            self.contest_timer.set(TAKEOVER_LOOK)
        else:
            if owner:
                owner.link.close("no sign of life when its id was asked for")
            self.welcome()

    def welcome(self) -> None:
        self.server.strangers.pop(self.link.connection, None)
        self.server.tunnels[self.id] = self
        self.timer.set(LOGIN_TIME)  # for its services
        self.link.send(Kind.WELCOME, self.welcoming)
        log.info("%s logged in from %s", self.id, self.peer)

    def depose(self, code: str, cause: str) -> None:
        """The id is no longer ours; what runs may end."""
        if self.server.tunnels.get(self.id) is self:
            del self.server.tunnels[self.id]
        log.info("%s at %s: %s", self.id, self.peer, cause)
        self.link.goodbye(code, cause)
        self.drop_kept()

    def refuse(self, code: str, cause: str) -> None:
        wanted, self.id = self.id, ""  # which it never was
        log.info("%s as %s refused: %s", self.peer, wanted or "nobody", cause)
        self.link.goodbye(code, cause)

    def on_services(self) -> None:
        """The whole list of the client's services; the answer is where they are. One
        that comes too soon after another waits, and the newest counts."""
        loop, listed = self.server.loop, self.listed
        if listed is None:
            return
        if loop.tired():
            self.list_timer.set(0)
            return
        self.list_timer.set(LISTS_TIME)
        self.listed, self.services = None, {}
        urls: Dict[str, str] = {}
        url = self.server.names.url(self.id, "%s", self.dialled)
        for name, options in listed.items():
            service = name.lower()
            if len(urls) >= SERVICES_LIMIT:
                urls[name] = "error: more than %d services" % SERVICES_LIMIT
            elif LABEL.fullmatch(service):
                target = options.get("target") if isinstance(options, dict) else ""
                self.services[service] = peer_text(target)
                urls[name] = url.replace("%s", service)
            else:
                urls[name] = "error: a service's name is a DNS label without --"
        first = ", ".join(itertools.islice(self.services, 20)) or "nothing"
        more = ", ... (%d)" % len(self.services) if len(self.services) > 20 else ""
        log.info("%s serves %s%s", self.id, first, more)
        if len(pack_json(urls)) > TEXT_LIMIT:
            urls = {"*": "error: too many services to tell where each is"}
        self.link.send(Kind.URLS, urls)

    def open(self, exchange: "Exchange") -> Stream:
        """A new stream for a request. Raises HTTPError when there can be none."""
        link = self.link
        if link.draining or link.closed:
            raise HTTPError(503, "leaving", "the client of %s is leaving" % self.id)
        if len(link.streams) >= MAX_STREAMS or link.unread > UNREAD_LIMIT:
            raise HTTPError(503, "overload", "%s has too many requests" % self.id)
        request = exchange.request
        message = {"service": exchange.service, "visitor": request.address}
        message["scheme"] = request.scheme
        return link.open(exchange, message)

    def on_closed(self, cause: str) -> None:
        for timer in (self.timer, self.contest_timer, self.list_timer):
            timer.clear()
        counts = self.link.last_id, self.link.resets
        log.info("%s: link closed: %s (%d streams, %d reset)", self, cause, *counts)
        if self.server.tunnels.get(self.id) is self:
            del self.server.tunnels[self.id]


# -----------------------------------------------------------------------------------
# Visitors: a Visitor is a connection from outside; its requests are answered one at a
# time, each by an Exchange, which owns the stream. An Exchange is in one of these:
#
#      asking     the request goes out; nothing of the final answer has come
#      answering  the head of the answer has gone to the visitor, its body is passing;
#                 this lasts until his connection has taken the last byte of it
#      upgraded   the service said 101: bytes flow both ways, each with its own end
#
# After a whole answer its stream is Kept for the visitor's next request to the service:
# that saves the client a dial, and so more than half of what a small request costs.
# -----------------------------------------------------------------------------------
FIRST_BYTE_TIME = 30.0  # seconds for the first byte of a new connection
HEAD_TIME = 10.0  # seconds from a head's first byte to its last, however it dribbles
IDLE_TIME = 60.0  # seconds that a connection is kept after an answer
PROBE_TIME = 5.0  # seconds between looks at whether a visitor we do not read is there
RETRY_AFTER = "5"  # seconds: until then a client that can be back is back, mostly
KEPT_TO_DROP = 8  # kept streams that go when the client has no descriptors left
KEPT_TIME = 1.0  # seconds a kept stream is good for a request that may not go twice
RESETS = {  # what a client's RESET means to the visitor
    "no-service": 404,
    "timeout": 504,
    "busy": 503,
    "overload": 503,
    "gone": 503,
    "stopping": 503,
}


class Visitor:
    """A connection from outside."""

    def __init__(self, port: "Listener", sock: socket.socket, address: str) -> None:
        self.port, self.server, self.loop = port, port.server, port.server.loop
        self.address = address
        self.connection = Connection(self.loop, sock, self)
        self.buffer = bytearray()  # read, and not yet understood
        self.searched = 0  # bytes of the buffer in which no head's end was found
        self.request: Optional[Request] = None
        self.exchange: Optional[Exchange] = None
        self.kept: Optional[Kept] = None  # the stream of the last request
        self.closing = False
        self.timer = Timer(self.loop, self, self.on_late)
        self.timer.set(FIRST_BYTE_TIME if port.visitors else HEAD_TIME)
        self.server.visitors.add(self)
        self.server.idle[self] = None

    def __str__(self) -> str:
        return "%s %s" % ("visitor" if self.port.visitors else "client", self.address)

    def interest(self) -> int:
        if self.exchange:
            return READ if self.exchange.wants_read() else 0
        return 0 if self.closing or self.connection.backlog else READ

    def on_readable(self) -> None:
        """A body is pulled by its stream; anything else is read ahead, up to a head."""
        exchange = self.exchange
        if exchange and exchange.uploading() and exchange.stream.wants_read():
            exchange.stream.wake()
            return
        view = self.loop.scratch[: HEAD_LIMIT - len(self.buffer)]
        count = self.connection.read_into(view)
        if count:
            self.buffer += view[:count]
        if count == 0 and exchange:
            self.server.idle[self] = None  # where descriptors are short he may go
        if count is not None and not exchange:
            self.next()
        elif count == 0 and self.connection.lost:
            self.leave()

    def on_writable(self) -> None:
        if self.exchange:
            self.exchange.settle()
        elif self.connection.lost:
            self.leave()
        else:
            self.next()

    def on_late(self) -> None:
        """Time is up: for a head, for the next request, or for a look at him."""
        connection = self.connection
        if self.exchange:
            # After his FIN, or with no room to read, the selector tells nothing.
            gone = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self.timer.set(PROBE_TIME)
            if gone:
                self.leave()
            elif self.exchange.is_stalled():
                self.forget()
                connection.abort()
        elif connection.backlog:
            self.end()  # he takes what is left, or is given up
        elif self.buffer:
            cause = "no whole head within %d s" % HEAD_TIME
            raise HTTPError(408, "timeout", cause)
        else:
            self.leave()

    def next(self) -> None:
        """Begin the next request, if the last answer has gone and a head is here."""
        if self.exchange or self.closing or self.connection.backlog:
            return
        if self.buffer.startswith(b"\r\n"):
            self.buffer = bytearray(EMPTY_LINES.sub(b"", self.buffer, 1))
        end = find_head(self.buffer, self.searched)
        if end:
            head = self.buffer[:end]
            del self.buffer[:end]
            self.searched = 0
            self.timer.clear()
            self.request = Request(head, self.address, self.port.scheme)
            self.serve(self.request)
        elif self.connection.eof or self.connection.lost:
            self.leave()
        elif self.buffer:
            due = self.timer.due
            if due is None or due > self.loop.clock() + HEAD_TIME:
                self.timer.set(HEAD_TIME)  # once: dribbling does not prolong it
            if self.buffer != b"\r":  # perhaps half of an empty line
                self.searched = len(self.buffer)

    def serve(self, request: Request) -> None:
        """A whole head is here: whose is it?"""
        if self.port.clients and request.target.partition("?")[0] == LINK_PATH:
            self.become_link(request)
        elif not self.port.visitors:
            raise HTTPError(404, "client-port", "clients dial this port, not visitors")
        elif self.port.redirect:
            self.redirect(request)
        else:
            router = self.server.router
            route, denied = router.route(request), router.authorize(request)
            if denied is not None:
                status, fields = denied
                pairs = [(str(name), str(v)) for name, v in dict(fields).items()]
                if LINE_BREAK.search("".join(map("".join, pairs))):
                    raise ValueError("authorize() gave a field with a line break")
                cause = "a password is needed" if status == 401 else "not allowed"
                raise HTTPError(int(status), "denied", cause, pairs)
            self.visit(request, *(route or (None, None)))

    def visit(
        self, request: Request, id: Optional[str], service: Optional[str]
    ) -> None:
        """The Router has spoken: take the request where it belongs."""
        tunnel = self.server.tunnels.get(id or "")
        if tunnel and service in tunnel.services:
            exchange = Exchange(self, request, tunnel, str(service))
            exchange.start()
            self.exchange = exchange
            self.server.idle.pop(self, None)
            self.timer.set(PROBE_TIME)
        elif request.method not in ("GET", "HEAD") or request.target != "/":
            self.not_found(tunnel, id, service)
        elif tunnel and service is None:
            self.show_index(request, tunnel)
        elif id is None and self.server.names.is_base(request.name):
            self.respond(200, "", "mdm-tunnel is here", self.server.how_to(request))
        else:
            self.not_found(tunnel, id, service)

    def not_found(
        self, tunnel: Optional[Tunnel], id: Optional[str], service: Optional[str]
    ) -> None:
        if tunnel and service:
            raise HTTPError(404, "no-service", "%s has no service %s" % (id, service))
        if tunnel:
            raise HTTPError(404, "no-page", "the index of %s is at /" % id)
        if id and self.server.tokens and id in self.server.tokens.value:
            cause = "the client of %s is not connected now" % id
            raise HTTPError(503, "offline", cause, [("Retry-After", RETRY_AFTER)])
        name = self.request.name if self.request else ""
        cause = "nobody is connected as %s" % id if id else "no client serves " + name
        raise HTTPError(404, "no-name", cause)

    def show_index(self, request: Request, tunnel: Tunnel) -> None:
        link = self.server.names.link
        host, scheme = request.host, request.scheme
        names = sorted(tunnel.services)
        lines = [link(name, host, scheme) for name in names[:INDEX_LIMIT]]
        if len(names) > INDEX_LIMIT:
            lines.append("... and %d more." % (len(names) - INDEX_LIMIT))
        self.respond(200, "", "Services of %s" % tunnel.id, lines or ["None yet."])

    def redirect(self, request: Request) -> None:
        """To the same place by TLS (RFC 9110 15.4.9)."""
        port = self.server.names.port
        host = request.name + (":%d" % port if port != 443 else "")
        path = request.target if request.target.startswith("/") else "/"
        where = "https://%s%s" % (host, path)
        self.respond(308, "", "Only by https", [where], [("Location", where)])

    def become_link(self, request: Request) -> None:
        """RFC 9110 7.8: go over to our protocol."""
        asked = request.upgrade.lower()
        if asked != PROTOCOL:
            cause = "this port speaks %s" % PROTOCOL
            if not asked:
                cause += "; the request to upgrade is missing, so a proxy in between"
                cause += " dropped it: let it pass on Upgrade and Connection"
            fields = [("Upgrade", PROTOCOL), ("Connection", "Upgrade")]
            raise HTTPError(426, "version", cause, fields)
        if not request.body.done:
            raise malformed("a body in a request for a link")
        self.forget()
        self.server.meet(self.connection)
        lines = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s"
        self.connection.write((lines % PROTOCOL + "\r\n\r\n").encode())
        tunnel = Tunnel(self.server, self.connection, request.host)
        link, early = tunnel.link, memoryview(bytes(self.buffer))
        self.loop.guard(link, link.receive, early)

    def respond(
        self, status: int, code: str, title: str, lines: List[str], fields: Any = ()
    ) -> None:
        """Answer with a page of our own."""
        request = self.request
        kind, body = make_page(title, lines, bool(request and request.wants_html()))
        keep = bool(request and request.keeps_alive() and request.body.done)
        keep = keep and not self.server.stopping
        head = ["HTTP/1.1 %d %s" % (status, phrase(status, title))]
        head += ["Content-Type: " + kind, "Content-Length: %d" % len(body)]
        head += ["Cache-Control: no-store"]
        head += ["X-Tunnel-Error: " + code] if code else []
        head += ["%s: %s" % pair for pair in fields]
        if not keep and not any(name == "Connection" for name, _ in fields):
            head.append("Connection: close")
        elif request and request.minor == 0:
            head.append("Connection: keep-alive")
        if request and request.method == "HEAD":
            body = b""
        text = "\r\n".join(head) + "\r\n\r\n"
        self.connection.write(text.encode("latin-1", "replace") + body)
        self.log_answer(status, code)
        self.done(keep)

    def log_answer(self, status: int, note: str) -> None:
        if log.hears(INFO):
            request, where = self.request, self.exchange or self
            what = "%s %s" % (request.method, request.target) if request else "-"
            log.info("%s: %s %s", where, what, ("%d %s" % (status, note)).strip())

    def fail(self, error: Exception) -> None:
        """What went wrong before an answer began is answered; after that he is cut."""
        if isinstance(error, TLSError) and error.plain:
            self.connection.tls, self.connection.shaking = None, False
            error = HTTPError(400, "tls", "this port speaks TLS: https, or --tls")
        elif isinstance(error, TLSError):
            log.info("%s: %s", self, error)
        if self.closing or isinstance(error, OSError):
            self.leave()
            return
        if not isinstance(error, HTTPError):
            error = HTTPError(500, "error", "the server made a mistake; its log has it")
        lines = [error.cause]
        if error.status == 404 and self.request:
            lines += self.server.how_to(self.request)
        title = "%d %s" % (error.status, phrase(error.status, error.code))
        self.respond(error.status, error.code, title, lines, error.fields)

    def done(self, keep: bool) -> None:
        """An answer has been given; what comes next?"""
        silent = self.is_silent()
        self.exchange = self.request = None
        self.server.idle.pop(self, None)
        self.server.idle[self] = None  # at the end
        self.loop.dirty.add(self.connection)  # it may be read again
        if keep and not self.server.stopping:
            self.timer.set(IDLE_TIME)
            if self.buffer or self.connection.eof:
                self.loop.soon(self, self.next)
        elif silent:
            self.forget()
            self.connection.end(self.connection.close)
        else:
            self.end()

    def is_silent(self) -> bool:
        """Whether he has said that he sends no more, and nothing of his is here: then a
        plain close, which is cheaper, loses nothing of ours. Behind a body some send a
        line's end; with TLS he has a last word, too."""
        request = self.request
        if not request or "close" not in request.connection or self.connection.tls:
            return False
        read = request.body.done and not (self.buffer or self.has_sent())
        return read and request.body.untouched

    def has_sent(self) -> bool:
        """Whether something is here that was not read yet."""
        try:
            return bool(self.connection.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def end(self) -> None:
        """Close, when everything has been said and has arrived."""
        self.forget()
        self.connection.end(self.connection.linger)

    def cut(self) -> None:
        """What he has got so far is all there is, and it must not look whole."""
        self.forget()
        self.connection.end(self.connection.abort)

    def leave(self) -> None:
        """He has gone, or may go: nothing is left to say."""
        self.forget()
        self.connection.close()

    def forget(self) -> None:
        """From here on only the connection's own end is left."""
        self.closing = True
        self.timer.clear()
        self.server.visitors.discard(self)
        self.server.idle.pop(self, None)
        if self.exchange:
            self.exchange.stream.reset("done" if self.exchange.whole() else "left")
            self.exchange = None
        if self.kept:
            self.kept.drop()


class Kept:
    """Owns a stream between two requests. Whatever comes on it is unasked."""

    __slots__ = ("visitor", "stream", "service", "since")
    def __init__(self, visitor: Visitor, stream: Stream, service: Any) -> None:
        self.visitor, self.stream, self.service = visitor, stream, service
        self.since = visitor.loop.clock()
        stream.owner = self

    def __str__(self) -> str:
        return str(self.visitor)

    def drop(self) -> None:
        """It is of no more use."""
        self.stream.reset("done")
        if self.visitor.kept is self:
            self.visitor.kept = None

    def pull(self, view: memoryview) -> None:
        pass

    def receive(self, data: memoryview) -> None:
        self.drop()

    def on_end(self) -> None:
        self.drop()

    def on_reset(self, code: str, cause: str) -> None:
        self.drop()

    def fail(self, error: Exception) -> None:
        self.drop()


class Exchange:
    """One request and its answer. It owns the stream that carries them."""

    __slots__ = (
        "visitor request tunnel service options stream head carry searched "
        "answer body keep reused repeated interim upgraded after"
    ).split()

    def __init__(
        self, visitor: Visitor, request: Request, tunnel: Tunnel, service: str
    ) -> None:
        self.visitor, self.request = visitor, request
        self.tunnel, self.service = tunnel, service
        self.options = tunnel.services[service]
        self.head = b""  # of the request: what is still to be pulled
        self.carry = bytearray()  # of the answer: what is not understood yet
        self.searched = 0
        self.answer: Optional[Answer] = None  # its head, when the visitor gets it
        self.body = NO_BODY  # of the answer
        self.keep = False  # the visitor's connection, after this
        self.reused = False  # the stream carried an earlier request
        self.repeated = False  # it is being asked for the second time
        self.interim = 0  # 1xx answers so far
        self.upgraded = False
        self.after: Optional[Call] = None  # how it ended, when the body is passed on

    def __str__(self) -> str:
        return "%s %s" % (self.tunnel, self.service)

    # Asking.

    def start(self) -> None:
        """Take the stream kept from the last request, or a new one."""
        self.head = self.request.to_service()
        kept, self.visitor.kept = self.visitor.kept, None
        if kept and self.may_reuse(kept):
            self.stream, self.reused = kept.stream, True
            self.stream.owner = self
        else:
            if kept:
                kept.drop()
            self.stream = self.tunnel.open(self)
        self.stream.wake()

    def place(self) -> Tuple[Tunnel, str, Any]:
        """What must be the same for a stream to be used again."""
        return self.tunnel, self.service, self.options

    def may_reuse(self, kept: Kept) -> bool:
        """Is it the same service still, and if the stream has died unseen, may the
        request go twice?"""
        if self.place() != kept.service or not kept.stream.open:
            return False
        fresh = self.visitor.loop.clock() - kept.since < KEPT_TIME or self.repeatable()
        return fresh and not self.tunnel.link.draining

    def repeatable(self) -> bool:
        return self.request.method in REPEATABLE and self.request.body.done

    def repeat(self, code: str) -> bool:
        """Ask once more: a kept stream died before it answered, or the client had not
        even dialled. False when that may not be, or cannot."""
        stale = self.reused and self.repeatable()
        unseen = code in ("gone", "busy") and self.request.body.untouched
        if code == "busy":
            self.tunnel.drop_kept(KEPT_TO_DROP)
        tunnel = self.visitor.server.tunnels.get(self.tunnel.id)
        if self.repeated or self.interim or not (stale or unseen):
            return False
        if tunnel is None or self.service not in tunnel.services:
            return False
        self.tunnel, self.repeated = tunnel, True
        self.stream = tunnel.open(self)
        self.head = self.request.to_service()
        self.stream.wake()
        return True

    def is_stalled(self) -> bool:
        """Whether the visitor has not moved for long, while what waits for him counts
        on no link any more."""
        connection = self.visitor.connection
        if self.stream.open or not connection.backlog:
            return False
        return self.visitor.loop.clock() - connection.moved > STALLED

    def uploading(self) -> bool:
        """Whether what the visitor sends belongs to the stream."""
        return self.stream.open and (self.upgraded or not self.request.body.done)

    def wants_read(self) -> bool:
        """What is not for the stream now is read ahead, so that a reset is seen."""
        if self.uploading() and (self.stream.wants_read() or self.stream.queued):
            return not self.stream.queued
        return len(self.visitor.buffer) < HEAD_LIMIT

    def pull(self, view: memoryview) -> Optional[int]:
        """The stream's turn: the head, then the body as far as its framing goes."""
        if self.head:
            size = min(len(view), len(self.head))
            view[:size] = self.head[:size]
            self.head = self.head[size:]
            if self.uploading():
                self.stream.wake()
            return size
        if not self.uploading():
            return None
        if not self.upgraded:
            view = view[: self.request.body.at_most]
        buffer, connection = self.visitor.buffer, self.visitor.connection
        had = min(len(buffer), len(view))
        view[:had] = buffer[:had]
        count = connection.read_into(view[had:])
        total = had + (count or 0)
        good = total if self.upgraded else self.feed(self.request.body, view[:total])
        buffer[:had] = view[good:total]  # a part of a line, or of the next request
        if count == 0 and not good:
            return self.on_visitor_end()
        if self.request.body.more:
            self.visitor.loop.soon(self.stream, self.stream.wake)
        elif self.uploading():
            if buffer or count == 0 or total == len(view):
                self.stream.wake()
        return good or None

    def feed(self, body: Body, data: Any) -> int:
        """What is understood of a body; of one in chunks as much as there is time."""
        return body.feed(data, 1000)

    def on_visitor_end(self) -> int:
        """The visitor sends no more: an end after a 101, a fault in a body."""
        if not self.upgraded:
            raise OSError("the visitor left in the middle of the request")
        if self.stream.ended_in:
            self.both_ended()
        return 0

    def both_ended(self) -> None:
        """After a 101, when neither side sends more."""
        self.visitor.exchange = None
        self.visitor.end()

    # Answering.

    def receive(self, data: memoryview) -> None:
        """Bytes from the service."""
        try:
            if self.upgraded:
                self.visitor.connection.write(data)
            elif self.body.more or self.whole():
                self.carry += data  # for go_on(), or for nobody
            elif self.answer:
                self.on_body(data)
            else:
                self.carry += data
                self.read_heads()
        except HTTPError as error:
            raise HTTPError(502, "broken", "%s: %s" % (self.said(), error)) from None
        self.settle()

    def said(self) -> str:
        return "service %s of %s" % (self.service, self.tunnel.id)

    def read_heads(self) -> None:
        """Any number of 1xx, then the head of the answer (RFC 9110 15.2)."""
        while not (self.answer or self.upgraded):
            end = find_head(self.carry, self.searched)
            if not end:
                self.searched = len(self.carry)
                return
            answer = Answer(self.carry[:end])
            body = answer.frame(self.request.method)  # be it only to refuse it
            del self.carry[:end]
            self.searched = 0
            if answer.status == 101:
                self.on_upgrade(answer)
            elif answer.status < 200:
                self.interim += 1
                if self.interim > INTERIM_LIMIT:
                    raise malformed("more than %d interim answers" % INTERIM_LIMIT)
                if self.request.minor:
                    self.visitor.connection.write(answer.to_visitor(""))
            else:
                self.on_answer(answer, body)

    def on_upgrade(self, answer: Answer) -> None:
        if not (self.request.upgrade and answer.upgrade and self.request.body.done):
            raise malformed("it changed the protocol without being asked")
        self.upgraded = True
        head = answer.to_visitor("")
        self.visitor.connection.write(head + bytes(self.carry))
        self.carry.clear()
        self.visitor.log_answer(101, "")
        self.stream.wake()

    def on_answer(self, answer: Answer, body: Body) -> None:
        """Its head is whole: say whether the connection goes on, and pass it on."""
        request, server = self.request, self.visitor.server
        self.body = body
        unwrap = request.minor == 0 and isinstance(body, Chunked)
        ends = unwrap or body.until_end
        keep = request.keeps_alive() and request.body.done and not ends
        self.keep = keep and not server.stopping
        connection = "" if self.keep else "close"
        if self.keep and request.minor == 0:
            connection = "keep-alive"
        head = answer.to_visitor(connection, unwrap)
        kept, self.carry = memoryview(self.carry), bytearray()
        good = self.feed(body, kept)
        self.answer = answer  # from here on it can no longer be a 502
        self.visitor.log_answer(answer.status, "")
        self.pass_on(head, kept, good)

    def on_body(self, data: Any) -> None:
        """More of the body, or nothing but what was kept of it."""
        if self.carry:
            data, self.carry = memoryview(self.carry + data), bytearray()
        self.pass_on(b"", data, self.feed(self.body, data))

    def pass_on(self, head: bytes, data: Any, good: int) -> None:
        """The framing allows `good` bytes; keep the rest. Was it the last?"""
        content = data[:good]
        if self.request.minor == 0 and isinstance(self.body, Chunked):
            content = b"".join(data[start:end] for start, end in self.body.spans)
        self.visitor.connection.write(head + bytes(content) if head else content)
        self.carry += data[good:]
        if self.body.done:
            self.visitor.connection.after_backlog(self.finish)
        elif self.body.more:
            self.visitor.loop.soon(self, self.go_on)

    def go_on(self) -> None:
        """With a body of which there was more than is done at once."""
        if self.visitor.exchange is self and self.body.more:
            self.on_body(b"")
            self.settle()
            if self.after and not self.body.more:
                self.after()

    def whole(self) -> bool:
        """Whether the answer is here to its last byte; the visitor may not have it."""
        return self.answer is not None and self.body.done

    def settle(self) -> None:
        """Give credit for what the visitor has taken; see whether he is still there."""
        connection = self.visitor.connection
        if connection.lost and (connection.eof or not self.upgraded):
            self.visitor.leave()
        else:
            self.stream.acknowledge(len(self.carry) + connection.waiting())

    def finish(self) -> None:
        """The visitor has the whole answer. The stream is kept if everything was as it
        should be: bytes beyond the answer's framing belong to nobody."""
        answer, stream, visitor = self.answer, self.stream, self.visitor
        usable = stream.open and not (stream.ended_in or self.head or self.carry)
        usable = usable and self.request.body.done and self.request.minor == 1
        usable = usable and not self.tunnel.link.draining
        stream.acknowledge(0)
        if usable and self.keep and answer and answer.keeps_alive():
            visitor.kept = Kept(visitor, stream, self.place())
        else:
            stream.reset("done")
        visitor.done(self.keep and not self.carry)

    # When it ends before its time.

    def on_end(self) -> None:
        """The service sends no more."""
        connection = self.visitor.connection
        if self.body.more:
            self.after = self.on_end
        elif self.upgraded and connection.eof:
            self.both_ended()
        elif self.upgraded:
            connection.after_backlog(connection.finish)
        elif self.answer and self.body.until_end:
            self.body.left = 0
            connection.after_backlog(self.finish)
        elif not self.whole():
            self.stream.reset("done")
            self.on_reset("reset", "the service closed the connection too early")

    def on_reset(self, code: str, cause: str) -> None:
        """The stream is over: ask again, say why, or cut what has begun."""
        if self.body.more and code != "overload":
            self.after = functools.partial(self.on_reset, code, cause)
        elif self.whole() and code != "overload":
            log.debug("%s: the stream ended after a whole answer", self)
        elif self.answer or self.upgraded:
            log.info("%s: cut: %s %s", self, code, cause)
            self.visitor.cut()
            if code == "overload":  # what waits for him is what is too much
                self.visitor.connection.abort()
        elif self.carry or not self.repeat(code):
            word = re.sub("[^a-z-]", "", code)[:32] or "error"
            text = "%s: %s" % (self.said(), cause or word)
            self.visitor.fail(HTTPError(RESETS.get(code, 502), word, text))

    def fail(self, error: Exception) -> None:
        """Something raised while the stream was served."""
        self.stream.reset("left")
        if self.whole():
            log.debug("%s: %s, after a whole answer", self, error)
        elif self.answer or self.upgraded:
            log.info("%s: cut: %s", self, error)
            self.visitor.cut()
        else:
            self.visitor.fail(error)


# -----------------------------------------------------------------------------------
# Server: the two ports, who is connected, and how it all stops.
# -----------------------------------------------------------------------------------
ACCEPT_BATCH = 64  # connections accepted in one turn of the loop, on each port
ROOM_LOOKS = 8  # idle visitors looked at for one who can go
ACCEPT_PAUSE = 0.5  # seconds without accepting when no descriptors are left
QUEUE = 1024  # connections that the kernel may hold until we accept them
DRAIN = 4.0  # seconds for running requests after SIGTERM
DRAIN_LOOK = 0.05  # seconds between looks at whether they have ended


def plain_address(host: str) -> str:
    """An address as people write it: without the mapping into IPv6, or the zone."""
    if ":" not in host:
        return host
    return re.sub("^::ffff:(?=.*[.])|%.*", "", host)


def address_of(sock: socket.socket) -> str:
    """The address of a socket's peer; "?" when it has gone already."""
    try:
        return plain_address(sock.getpeername()[0])
    except OSError:
        return "?"


def listen(bind: Optional[str], port: int) -> socket.socket:
    """A listening socket, for IPv4 and IPv6 where `bind` is None. Raises OSError."""
    if bind:
        try:
            found = socket.getaddrinfo(bind, port, 0, socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError):
            raise OSError("%s: no such address" % bind) from None
        return listen_on(found[0], found[4])
    try:
        return listen_on(socket.AF_INET6, ("::", port))
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
    return listen_on(socket.AF_INET, ("0.0.0.0", port))


def listen_on(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Windows would let SO_REUSEADDR share the port with somebody else
        name = "SO_EXCLUSIVEADDRUSE" if os.name == "nt" else "SO_REUSEADDR"
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
        if family == socket.AF_INET6:
            only = int(address[0] != "::")
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        sock.bind(address)
        sock.listen(QUEUE)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        cause = "port %d: %s" % (address[1], error.strerror)
        raise OSError(error.errno, cause) from None
    return sock


def open_file(paths: List[str], parse: Callable[..., Any]) -> Watched:
    """Files that must be there. Raises ValueError, which names what is wrong."""
    try:
        return Watched(paths, parse)
    except (OSError, ValueError) as error:
        raise ValueError(blame(error, paths)) from None


def open_tls(cert: Optional[str], key: Optional[str]) -> Optional[Watched]:
    """The context that new connections get, from files. Raises ValueError."""
    if cert is None:
        if key is not None:
            raise ValueError("a key is of no use without its certificate")
        return None
    paths = [cert, key or cert]

    def parse(*contents: bytes) -> Any:
        for path, held, what in zip(paths, contents, ("certificate", "private key")):
            if what.upper().encode() + b"-----" not in held:
                raise ValueError("no %s in %s" % (what, path))
        if b"ENCRYPTED" in contents[1]:
            raise ValueError("the key is encrypted, and there is nobody to ask")
        return make_context(*paths)

    return open_file(paths, parse)


def make_context(cert: str, key: str) -> Any:
    """For the server's side of TLS. Raises ValueError."""
    import ssl

    context = demand_tls_1_2(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, lambda: b"")  # asks nobody for a password
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error)
        said = reason.replace("_", " ").lower()
        raise ValueError("no certificate and its key: %s" % said) from None
    return context


def fingerprint(cert: bytes) -> str:
    """The SHA-256 of the first certificate of a PEM file, as openssl writes it."""
    import hashlib
    import ssl

    end = b"-----END CERTIFICATE-----"
    text = cert[cert.find(b"-----BEGIN CERTIFICATE-----") : cert.find(end)] + end
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(text.decode("ascii"))).hexdigest()
    return ":".join(re.findall("..", digest.upper()))


def listen_all(bind: Optional[str], ports: List[int]) -> List[socket.socket]:
    """A listening socket for each, or for none of them. Raises OSError."""
    with contextlib.ExitStack() as undo:
        socks = [undo.enter_context(listen(bind, port)) for port in ports]
        undo.pop_all()
    return socks


class Listener:
    """A port on which visitors or clients, or both, are accepted, maybe by TLS."""

    def __init__(
        self,
        server: "Server",
        sock: socket.socket,
        visitors: bool,
        clients: bool,
        tls: bool,
    ) -> None:
        self.server, self.loop, self.sock = server, server.loop, sock
        self.visitors, self.clients, self.tls = visitors, clients, tls
        self.scheme = "https" if tls else "http"
        self.redirect = False  # visitors are sent to the port with TLS
        self.address = self.sock.getsockname()[:2]
        self.timer = Timer(self.loop, self, self.resume)
        self.paused = True
        self.resume()

    def __str__(self) -> str:
        return "port %d" % self.address[1]

    def on_events(self, mask: int) -> None:
        for _ in range(ACCEPT_BATCH):
            if self.paused:
                return  # closed in this very turn
            if self.loop.full() and not self.server.idle:
                raise OSError("no descriptors left: accepting pauses")
            try:
                sock, address = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            crowded = self.loop.full() and not self.server.make_room()
            host = plain_address(address[0]) if address else "?"  # gone already
            visitor = Visitor(self, sock, host)
            if not self.visitors:
                self.server.meet(visitor.connection)
            if self.tls and self.server.tls:
                visitor.connection.start_tls(self.server.tls.value, True)
            if crowded:
                raise OSError("no descriptors left: accepting pauses")

    def fail(self, error: Exception) -> None:
        log.warning("%s: %s", self, error)
        if not self.paused:
            self.paused = True
            self.loop.selector.unregister(self.sock)
            self.timer.set(ACCEPT_PAUSE)

    def resume(self) -> None:
        self.loop.selector.register(self.sock, READ, self)
        self.paused = False

    def close(self) -> None:
        if not self.paused:
            self.loop.selector.unregister(self.sock)
            self.paused = True
        self.timer.clear()
        self.sock.close()


def plan_ports(
    port: int, client_port: int, tls_port: Optional[int], tls: bool
) -> List[Tuple[int, bool, bool, bool]]:
    """Which ports there are: number, visitors, clients, TLS. The first is for visitors,
    the last for clients. Raises ValueError."""
    if not all(0 <= number < 1 << 16 for number in (port, client_port, tls_port or 0)):
        raise ValueError("a port is a number from 0 to 65535")
    if tls_port is not None and not tls:
        raise ValueError("TLS for visitors needs a certificate")
    if port != 0 and (port == tls_port or tls and port == client_port):
        raise ValueError("port %d cannot be both with TLS and without" % port)
    if not tls and port == client_port != 0:
        return [(port, True, True, False)]
    ports = [(port, True, False, False)]
    if tls_port is not None:
        ports.append((tls_port, True, tls_port == client_port != 0, True))
    if tls_port != client_port or client_port == 0:
        ports.append((client_port, False, True, tls))
    return ports


class Server:
    """Listens from the start; run() serves until stop(). Port 0 takes a free port: see
    `visitor_address` and `client_address`, (host, port) each. `domain` is as --domain,
    `tokens`, `tls_cert` and `tls_key` are paths. Raises OSError when it cannot listen,
    ValueError for what is wrong in an argument or in a file."""

    stopping = said_goodbye = False
    until = 0.0  # when what we wait for, stopping, has had its time

    def __init__(
        self,
        port: int = 8000,
        client_port: int = 8001,
        bind: Optional[str] = None,
        domain: str = "",
        router: Optional[Router] = None,
        loop: Optional[Loop] = None,
        tokens: Optional[str] = None,
        tls_cert: Optional[str] = None,
        tls_key: Optional[str] = None,
        tls_port: Optional[int] = None,
        redirect: bool = False,
    ) -> None:
        domains = parse_domains(domain)
        ports = plan_ports(port, client_port, tls_port, tls_cert is not None)
        if redirect and tls_port is None:
            raise ValueError("a redirect needs a port with TLS to lead to")
        self.tokens = None if tokens is None else open_file([tokens], parse_tokens)
        self.tls = open_tls(tls_cert, tls_key)
        socks = listen_all(bind, [number for number, *_ in ports])
        self.loop = loop or Loop()
        self.tunnels: Dict[str, Tunnel] = {}  # by id
        self.visitors: Set[Visitor] = set()
        self.idle: Any = collections.OrderedDict()  # visitors, the longest so first
        self.strangers: Dict[Connection, str] = {}  # who is not logged in, from where
        self.names = Names(domains, self.tunnels)
        self.router = router or Router()
        self.router.names = self.names
        self.timer = Timer(self.loop, self, self.drain)
        self.look_timer = Timer(self.loop, self, self.look)
        self.listeners = [
            Listener(self, sock, *roles) for sock, (_, *roles) in zip(socks, ports)
        ]
        self.listeners[0].redirect = redirect
        self.set_addresses(tls_port is not None)
        self.watch_files()

    def __str__(self) -> str:
        return "server"

    def set_addresses(self, tls: bool) -> None:
        """Port 0 has become a real one."""
        self.visitor_address = self.listeners[0].address
        self.client_address = self.listeners[-1].address
        self.tls_address = self.listeners[1].address if tls else None
        self.names.port = (self.tls_address or self.visitor_address)[1]
        self.names.scheme = "https" if tls else "http"

    def run(self) -> None:
        """Serve until stop(), or on_signal(), and what follows from it is done."""
        ports = self.visitor_address[1], self.client_address[1]
        log.info("visitors on port %d, clients on port %d", *ports)
        if self.tls_address:
            log.info("visitors by TLS on port %d", self.tls_address[1])
        self.loop.run()
        self.close()

    def close(self) -> None:
        """Let go of everything at once; what is cut does not look whole."""
        for listener in self.listeners:
            listener.close()
        self.close_links()
        self.loop.close()

    def close_links(self) -> None:
        for tunnel in list(self.tunnels.values()):
            tunnel.link.goodbye("stopping", "the server is stopping")
            tunnel.link.flush()
            tunnel.link.close("the server is stopping", "stopping")

    def fail(self, error: Exception) -> None:
        log.error("server: %s", error)

    def watch_files(self) -> None:
        files = self.files()
        if files:
            forbid_core_dumps()
            self.on_new_files(files)
            self.look_timer.set(LOOK_TIME)

    def files(self) -> List[Watched]:
        """What is looked at again and again."""
        return [file for file in (self.tokens, self.tls) if file]

    def look(self) -> None:
        """Has a file changed? An id whose token has gone or changed is free; TLS that
        runs goes on with the certificate that it began with."""
        self.look_timer.set(LOOK_TIME)
        files = [file for file in self.files() if file.look()]
        if self.tokens in files and self.tokens:
            for link in list(self.loop.links):  # also those that were replaced
                tunnel, token = link.owner, link.owner.token
                mine = tunnel.server is self
                if mine and token and token != self.tokens.value.get(tunnel.id):
                    cause = "the token of %s is no longer valid" % tunnel.id
                    tunnel.depose("refused", cause)
                    tunnel.link.flush()
                    tunnel.link.close("its token has changed")
        if files:
            log.info("changed: %s", ", ".join(map(str, files)))
            self.on_new_files(files)

    def on_new_files(self, files: List[Watched]) -> None:
        """What follows from them; the last path of each leads to secrets."""
        if self.tokens:  # whoever has a token is known, also while he is not connected
            self.names.ids = collections.ChainMap(self.tunnels, self.tokens.value)
        for file in files:
            warn_of_readers(file.paths[-1:])
            if file is self.tls and file.seen and log.hears(INFO):
                with contextlib.suppress(ValueError):
                    log.info("certificate: SHA256 %s", fingerprint(file.seen[0]))

    def how_to(self, request: Request) -> List[str]:
        """For the landing page and the 404s: how somebody gets a name here."""
        line = "  python3 mdm_tunnel_client.py -v -h %s -p %d -i NAME web=9000"
        return [
            "To publish what listens on port 9000 of your machine, run there:",
            line % (self.names.base(request.name), self.client_address[1]),
            "NAME is for you to choose; -v prints the address of the service web.",
        ]

    def meet(self, connection: Connection) -> None:
        """Somebody who has not logged in. Of too many one at random has to go, of the
        address that has most of them: so a crowd from one keeps out no other."""
        strangers = {c: where for c, where in self.strangers.items() if not c.closed}
        strangers.pop(connection, None)
        if len(strangers) >= STRANGERS:
            (crowd, _), *_ = collections.Counter(strangers.values()).most_common(1)
            victims = [other for other, where in strangers.items() if where == crowd]
            number = int.from_bytes(os.urandom(4), "big") % len(victims)
            del strangers[victims[number]]
            victims[number].fail(OSError("too many connections have not logged in"))
        strangers[connection] = address_of(connection.sock)
        self.strangers = strangers

    def make_room(self) -> bool:
        """Close the visitor who is longest between two requests, and has sent nothing
        that we have not read yet; False when there seems to be none."""
        for _ in range(min(ROOM_LOOKS, len(self.idle))):
            visitor = next(iter(self.idle))
            if not visitor.has_sent():
                visitor.leave()
                return True
            self.idle.move_to_end(visitor)
        return False

    # Stopping.

    def on_signal(self, number: int) -> None:
        """SIGTERM lets what runs end; SIGINT, or a second signal, does not."""
        if self.stopping or number == signal.SIGINT:
            log.info("stopping at once")
            self.loop.running = False
        else:
            self.stop()

    def stop(self) -> None:
        """Accept no more, give running requests DRAIN seconds, then close the links."""
        log.info("stopping")
        self.stopping = True
        self.until = self.loop.clock() + DRAIN
        for listener in self.listeners:
            listener.close()
        for visitor in list(self.visitors):
            if not visitor.exchange:
                visitor.end()
        self.drain()

    def drain(self) -> None:
        """Is there anything still to wait for?"""
        late = self.loop.clock() >= self.until
        exchanges = [visitor.exchange for visitor in self.visitors]
        running = [e for e in exchanges if e and not e.upgraded]
        if not self.said_goodbye and (late or not running):
            self.say_goodbye()
        elif self.said_goodbye and (late or not self.loop.connections):
            self.loop.running = False
        self.timer.set(DRAIN_LOOK)

    def say_goodbye(self) -> None:
        """The last words, to visitors and to clients."""
        self.said_goodbye = True
        self.until = self.loop.clock() + LINGER
        self.close_links()
        for visitor in list(self.visitors):
            visitor.end()


# -----------------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------------
def port_number(text: str) -> int:
    if not (text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError("%r is no port: 0 to 65535" % text)
    return int(text)


def domains(text: str) -> str:
    try:
        parse_domains(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = Parser(
        prog="mdm_tunnel_server.py",
        description="The public end of a reverse tunnel: takes visitors' HTTP and "
        "WebSocket requests for service.id.example.com to the client that is logged in "
        "as id. Silent without -v.",
    )
    add = parser.add_argument
    add("-p", "--port", type=port_number, default=8000, metavar="PORT",
        help="port for visitors (%(default)s; 0: any free one)")  # fmt: skip
    add("-c", "--client-port", type=port_number, default=8001, metavar="PORT",
        help="port for clients (%(default)s); may be the same")  # fmt: skip
    add("--bind", metavar="ADDR", help="address to listen on (all, IPv4 and IPv6)")
    add("--domain", type=domains, default="", metavar="NAME",
        help="serve only names below NAME and localhost; several with commas; a whole "
        "URL (https://example.com) when a proxy stands in front")  # fmt: skip
    add("--tls-cert", metavar="FILE", help="certificate chain: clients dial by TLS")
    add("--tls-key", metavar="FILE", help="its key, if that is not in the same file")
    add("--tls-port", type=port_number, metavar="PORT",
        help="port for visitors by TLS; may be that for clients")  # fmt: skip
    add("--redirect", action="store_true",
        help="send visitors without TLS to the port with it")  # fmt: skip
    add("--tokens", metavar="FILE",
        help='ids and what proves them, as {"id": "token"}; without it any client gets '
        "a free id")  # fmt: skip
    add("--user", metavar="NAME",
        help="once the ports are open, go on as this user, not as root")  # fmt: skip
    add("-v", "--verbose", action="count", default=0,
        help="say what happens, on stderr; -vv: every frame")  # fmt: skip
    add("-V", "--version", action="version", version=VERSION)
    return parser.parse_args(argv)


def find_user(name: str) -> Any:
    """What the system knows of a user, so that it fails before anything has begun.
    Raises ValueError."""
    try:
        import pwd

        user = pwd.getpwnam(name)
    except (ImportError, KeyError):
        raise ValueError("there is no user %r here" % name) from None
    if user.pw_uid == 0:
        raise ValueError("%s would keep all rights; name another user" % name)
    return user


def become(user: Any, paths: List[str]) -> None:
    """Give up root's rights for good, those of its groups too; but not without the
    files, which are read again when they change. Raises OSError. What is imported later
    may lie where only root can read."""
    import hashlib  # noqa: F401
    import hmac  # noqa: F401
    import html  # noqa: F401
    import http  # noqa: F401

    if os.geteuid() != user.pw_uid:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    try:
        os.setuid(0)
    except OSError:
        pass
    else:
        raise PermissionError("the rights of root came back")
    for path in paths:
        if not os.access(path, os.R_OK):
            raise PermissionError("it must be able to read %s" % path)


def main(argv: Optional[List[str]] = None) -> None:
    """Serve until a signal. Exit status: 0, 1 (a port is taken) or 2 (usage)."""
    options = parse_arguments(argv)
    set_up_log(options.verbose)
    try:
        user = None if options.user is None else find_user(options.user)
        server = Server(
            options.port,
            options.client_port,
            options.bind,
            options.domain,
            tokens=options.tokens,
            tls_cert=options.tls_cert,
            tls_key=options.tls_key,
            tls_port=options.tls_port,
            redirect=options.redirect,
        )
    except OSError as error:
        die(1, "cannot listen on %s" % (error.strerror or error))
    except ValueError as error:
        die(2, error)
    if user is not None:
        try:
            become(user, [path for file in server.files() for path in file.paths])
        except OSError as error:
            die(1, "cannot become %s: %s" % (options.user, error.strerror or error))
    be_deaf()
    server.loop.catch_signals(server.on_signal)
    server.run()


if __name__ == "__main__":
    main()
