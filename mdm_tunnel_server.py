#!/usr/bin/env python3
"""mdm-tunnel server: the public end of a reverse tunnel, in one file.

    python3 mdm_tunnel_server.py -v        visitors on port 8000, clients on port 8001

A client behind a NAT dials in and stays. Visitors' HTTP and WebSocket requests go to it
by the name in their Host field, `service.id.example.com`:

    visitor --TCP--> HTTPConnection --> Exchange --> Stream ==Link==> client --> service

How to read it. Part one carries a request:

    Protocol         what is said on the wire, with a picture
    Frames           bytes to frames, without I/O
    Loop             one thread: sockets, timers, and the one catcher of errors
    Connection       a socket, what waits for it, and how it ends
    Stream and Link  the multiplexer: credit, fair turns, liveness
    Pipe             joins a stream to a connection
    HTTP/1.1         heads and bodies, without I/O; skip it at first
    Names            which id and service a host stands for
    Registry         whose an id is, and its services
    HTTPConnection   a visitor between two requests
    Exchange         one request and its answer
    Connect          one CONNECT, until its target is there
    Server           what each port serves, and how it stops

Part two keeps it up: Secrets, TLS, Files, Limits, Log, Outcome, Service manager, Unit,
Fields, Pages, Ports, TCP ports, Prefaces, Fronts, Gates, Overload, Numbers, Admin,
Files of the server, Privileges, Command line. Nothing here needs more than the standard
library of Python 3.6.
"""

from typing import FrozenSet, Pattern

# ###################################################################################
# PART ONE: THE TUNNEL. What carries a request, from end to end.
# ###################################################################################

# ===================================================================================
# SHARED BLOCK 1: begins. The same lines stand in both scripts; a test compares them.
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
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, NoReturn
from typing import Optional, Set, Tuple

VERSION = "1.1.0"
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
#        |    <------------- CREDIT 1           |   a quarter was used: so many more
#        |   END 1 ------------->               |   I send no more (half-close)
#        |    <------------- RESET 1            |   the stream is over, both ways
#
# A visitor with two requests is OPEN, then DATA (a request) and DATA (its answer)
# twice, then RESET `done`: a web request needs neither END nor CREDIT. Only an OPEN
# that says `confirm` has an answer, CONNECTED: HTTP's CONNECT waits for it. A client
# that says `notes` in its LOGIN, as the server did before, gets NOTE: how requests
# ended, a list that is collected while the link cannot send. One that says `check` puts
# no other client off; the GOODBYE that it gets then has the `urls` of the other.
#
# Stream 0 is the link itself; PING, PONG and GOODBYE (no new streams) are its own. Only
# the server opens streams; ids rise by one from 1 and are never used twice. A frame for
# a stream that was open and is over is late, not wrong: it is dropped in silence. What
# else is not as told here ends the link with a GOODBYE of code `protocol`. A JSON key
# that a side does not know is ignored.
#
# RESET is `code cause`: done (no fault), left (nobody wants the rest), refused,
# timeout, no-service, reset, error, busy, overload, or gone: nothing was dialled, so
# the request may go elsewhere. The codes of GOODBYE: protocol, error, stopping,
# refused, taken, replaced.
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
    "PING PONG GOODBYE CONNECTED NOTE",
)
# kind: who sends it, is it about a stream, bytes at least, bytes at most
RULES: Dict[int, Tuple[str, bool, int, int]] = {
    Kind.CHALLENGE: ("server", False, 2, TEXT_LIMIT),  # JSON: nonce, version, options
    Kind.LOGIN: ("client", False, 2, LOGIN_LIMIT),  # JSON: id, session, nonce, proof
    Kind.WELCOME: ("server", False, 2, TEXT_LIMIT),  # JSON: proof, if there are tokens
    Kind.SERVICES: ("client", False, 2, TEXT_LIMIT),  # JSON: name -> options
    Kind.URLS: ("server", False, 2, TEXT_LIMIT),  # JSON: name -> URL or error
    Kind.OPEN: ("server", True, 2, TEXT_LIMIT),  # JSON: service, visitor, scheme, ...
    Kind.DATA: ("both", True, 1, DATA_LIMIT),  # bytes
    Kind.CREDIT: ("both", True, NUMBER.size, NUMBER.size),  # u32
    Kind.END: ("both", True, 0, 0),
    Kind.RESET: ("both", True, 0, TEXT_LIMIT),  # text: code, a space, cause
    Kind.PING: ("both", False, PING_CLOCK.size, PING_CLOCK.size),
    Kind.PONG: ("both", False, PING_CLOCK.size, PING_CLOCK.size),  # what the PING held
    Kind.GOODBYE: ("both", False, 2, TEXT_LIMIT),  # JSON: code, reason
    Kind.CONNECTED: ("client", True, 0, 0),  # the target is, if OPEN said `confirm`
    Kind.NOTE: ("server", False, 2, TEXT_LIMIT),  # JSON: [{service, status, ...}, ...]
}
LOGIN_ORDER = (Kind.CHALLENGE, Kind.LOGIN, Kind.WELCOME, Kind.SERVICES)  # in this order
DATA, OPEN = int(Kind.DATA), int(Kind.OPEN)  # looked at for every frame

# The name of a service or of an id: a DNS label (RFC 1035 2.3.1) of which `_` may be a
# part, but not `--`, which stands between the two in `service--id`.
LABEL = re.compile(r"(?!.*--)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


class ProtocolError(Exception):
    """The peer broke the rules of the wire, which costs it the link."""


# -----------------------------------------------------------------------------------
# Frames: bytes to frames, without any I/O. DATA is handed on in the pieces in which it
# comes; every other payload is small and comes whole.
# -----------------------------------------------------------------------------------
NO_DATA = memoryview(b"")


class FrameReader:
    """Cuts what comes from `peer`, "server" or "client", into frames."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.rules = {k: r[1:] for k, r in RULES.items() if r[0] in ("both", peer)}
        self.held = b""  # the beginning of a header or of a small frame
        self.data = NO_DATA  # what was pushed; from `at` on nobody has seen it
        self.at = 0
        self.kind = self.stream = self.left = 0  # left: bytes of a DATA still to come

    def push(self, data: memoryview) -> None:
        """More bytes have come. next() has said None to those before."""
        if self.held:
            data, self.held = memoryview(self.held + data), b""
        self.data, self.at = data, 0

    def next(self) -> Optional[Tuple[int, int, memoryview]]:
        """The next (kind, stream, payload), or None until more bytes have come."""
        data, start = self.data, self.at
        if not self.left and start < len(data):
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
            self.left = length
        if start == len(data):
            self.data, self.at = NO_DATA, 0
            return None
        end = self.at = min(len(data), start + self.left)
        self.left -= end - start
        return DATA, self.stream, data[start:end]

    def hold(self) -> None:
        """What is left is the beginning of a frame."""
        self.held = bytes(self.data[self.at :])
        self.data, self.at = NO_DATA, 0

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
        if on_stream != (self.stream > 0):  # None: not this peer's to send
            said = Kind(self.kind).name, self.peer, self.stream
            raise ProtocolError("%s from the %s on stream %d" % said)
        if not least <= length <= most:
            raise ProtocolError("%s of %d bytes" % (Kind(self.kind).name, length))
        return length


encoder = json.JSONEncoder(separators=(",", ":"))  # dumps() would make one each time


def pack_json(message: Dict[str, Any]) -> bytes:
    """A message that people can read too, as UTF-8."""
    return encoder.encode(message).encode()


def unpack_json(payload: Any, kind: Any = dict) -> Any:
    """The object, or the list, in a payload. Raises ProtocolError when it is none."""
    try:
        message = json.loads(bytes(payload).decode())
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, kind):
        name = "object" if kind is dict else "list"
        raise ProtocolError("a payload is not a JSON %s" % name)
    return message


def peer_text(value: Any) -> str:
    """What a peer says for people to read: of any other type it is nothing."""
    return value[:TOLD_LIMIT] if isinstance(value, str) else ""


# -----------------------------------------------------------------------------------
# Loop: one thread, one selector, one heap of timers, one catcher of errors. A turn
#
#   1. reads what is there, each socket for itself and then for its owner;
#   2. runs what soon() has put off;
#   3. runs the timers that are due: after reading, so that a process that was frozen
#      does not take its healthy peers for dead;
#   4. lets the links send (after PART events also in between, so that the other side
#      can begin with the first of them);
#   5. tells the selector what each connection waits for now. That is derived from its
#      state once a turn, never toggled.
# -----------------------------------------------------------------------------------
TURN_BUDGET = 0.01  # seconds after which a peer's work goes on in the next turn
PART = 16  # events of a turn after which the links send in between
POLL = 0.5 if os.name == "nt" else None  # seconds: Windows hides Ctrl-C from a select
HANGUP = getattr(signal, "SIGHUP", 0)  # which Windows has not


class Timer:
    """One deadline. To put it off costs nothing: the entry in the heap looks here."""

    __slots__ = ("loop", "owner", "call", "due", "armed")

    def __init__(self, loop: "Loop", owner: Any, call: Call) -> None:
        self.loop, self.owner, self.call = loop, owner, call
        self.due: Optional[float] = None
        self.armed: Optional[float] = None  # when the heap looks here next

    def set(self, seconds: float) -> None:
        """Run `call` in so many seconds, instead of when it was due so far."""
        due = self.due = self.loop.clock() + seconds
        if self.armed is None or due < self.armed:
            self.loop.add_timer(due, self)

    def clear(self) -> None:
        self.due = None

    def fire(self, when: float, now: float) -> None:
        """The entry for `when` has come up: is it still meant?"""
        if when != self.armed:
            return
        self.armed, due = None, self.due
        if due is not None and due > now:
            self.loop.add_timer(due, self)
        elif due is not None:
            self.due = None
            self.loop.guard(self.owner, self.call)


class Loop:
    """Runs everything. Tests give a `selector` or a `clock` of their own."""

    def __init__(self, selector: Any = None, clock: Call = time.monotonic) -> None:
        self.selector = selector or selectors.DefaultSelector()
        self.clock: Callable[[], float] = clock
        self.unseen: List[Tuple[Any, int]] = []  # events that no selector tells
        self.serial = itertools.count()  # keeps equal deadlines in order
        self.timers: List[Tuple[float, int, Timer]] = []
        self.crowded = 1000  # timers that make it worth looking for cleared ones
        self.calls: Deque[Tuple[Any, Call, tuple]] = collections.deque()
        self.ready_links: Dict[Any, None] = {}  # with something to send
        self.dirty: Set[Connection] = set()  # may wait for something else now
        self.connections: Set[Connection] = set()
        self.links: Set[Any] = set()
        self.unread = 0  # bytes that the links hold unread
        # What is being read, and what is being sent: pages that nobody has dirty yet
        # take no memory, as those of a bytearray would.
        self.scratch = memoryview(mmap.mmap(-1, DATA_LIMIT))
        self.frames = memoryview(mmap.mmap(-1, DATA_LIMIT + 4 * TEXT_LIMIT))
        self.sealed = memoryview(mmap.mmap(-1, SEALED))  # what TLS is to open
        self.capacity = file_limit(self.selector) - SPARE_FILES
        self.turn_started: float = clock()
        self.handshakes = 0  # steps of TLS handshakes in this turn
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
            connection.abort() if connection.waiting() else connection.close()
        for part in (self.selector, self.wake_receiver, self.wake_sender):
            part.close()  # type: ignore[attr-defined]

    def soon(self, owner: Any, call: Call, *args: Any) -> None:
        """Run `call` on a fresh stack, in this turn or in the next, as guard() does."""
        self.calls.append((owner, call, args))

    def from_thread(self, owner: Any, call: Call, *args: Any) -> None:
        """Like soon(), from a thread. (The client's Resolver has one.)"""
        self.soon(owner, call, *args)
        with contextlib.suppress(OSError):  # full: it wakes already
            self.wake_sender.send(b"\0")

    def catch_signals(self, on_signal: Callable[[int], Any]) -> None:
        """Until close() SIGTERM, SIGINT and SIGHUP wake the loop, which calls
        `on_signal`. A SIGHUP that is ignored (nohup) or somebody's own stays so, and
        one that tells that our terminal has gone is a SIGTERM."""
        terminals = list(filter(os.isatty, range(3)))

        def on_caught(number: int, _: Any) -> None:
            gone = number == HANGUP and not all(map(os.isatty, terminals))
            self.soon(self, on_signal, signal.SIGTERM if gone else number)

        numbers: List[int] = [signal.SIGTERM, signal.SIGINT]
        if HANGUP and signal.getsignal(HANGUP) in (signal.SIG_DFL, no_hangup):
            numbers.append(HANGUP)
        for number in numbers:
            self.caught.setdefault(number, signal.signal(number, on_caught))
        signal.set_wakeup_fd(self.wake_sender.fileno())

    def on_events(self, mask: int) -> int:
        """Woken: something is in `calls`."""
        self.wake_receiver.recv(4096)
        return 0

    def turn(self) -> None:
        """Wait for something, and do all that follows from it."""
        events = self.selector.select(self.select_timeout())
        self.turn_started, self.handshakes = self.clock(), 0
        self.read_on(events)
        for _ in range(len(self.calls)):
            owner, call, args = self.calls.popleft()
            self.guard(owner, call, *args)
        now = self.clock()
        while self.timers and self.timers[0][0] <= now:
            when, _, timer = heapq.heappop(self.timers)
            timer.fire(when, now)
        self.send()
        while self.dirty:
            connection = self.dirty.pop()
            try:
                connection.register()
            except Exception as error:
                self.failed(connection, error)

    def read_on(self, events: List[Tuple[Any, int]]) -> None:
        """Sockets are ready: each first for itself, then for its owner."""
        events, self.unseen = self.unseen + events, []
        for number, (key, mask) in enumerate(events, 1):
            target = key.data
            try:
                told = target.on_events(mask)
                if told & WRITE:
                    target.owner.on_writable()
                if told & READ and target.phase == OPEN_PHASE:
                    target.owner.on_readable()
            except Exception as error:
                self.failed(target, error)
            if not number % PART:
                self.send()

    def send(self) -> None:
        """Flush the links that have something to send."""
        while self.ready_links:
            link = self.ready_links.popitem()[0]
            try:
                link.flush()
            except Exception as error:
                self.failed(link, error)

    def tired(self) -> bool:
        """Whether this turn has lasted long enough. Who has much to do looks here after
        every few items, and goes on in the next turn: soon()."""
        return self.clock() - self.turn_started > TURN_BUDGET

    def select_timeout(self) -> Optional[float]:
        """Seconds that the selector may wait; None is for ever."""
        if self.calls or self.dirty or self.ready_links or self.unseen:
            return 0
        if not self.timers:
            return POLL
        wait = max(0.0, self.timers[0][0] - self.clock())
        return wait if POLL is None else min(wait, POLL)

    def add_timer(self, when: float, timer: Timer) -> None:
        """Note that `timer` wants to look at the clock then. When the heap has become
        crowded, the entries that cleared timers left there are thrown out."""
        timer.armed = when
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
            return self.failed(owner, error)

    def failed(self, owner: Any, error: Exception) -> Any:
        """The one catcher. A peer's fault is told to the owner only; a bug of ours is
        logged with its traceback as well."""
        if isinstance(error, MemoryError):
            error = OSError(errno.ENOMEM, "no memory left")
        try:
            if not isinstance(error, (OSError, ProtocolError)):
                log.error("%s: %s", owner, error, trace=error)
            owner.fail(error)
        except Exception as worse:
            log.error("%s: %s", owner, worse, trace=worse)
        return None

    def fail(self, error: Exception) -> None:
        """The wake-up socket is broken. Nothing can mend that; timers go on."""
        log.error("loop: %s", error)


# -----------------------------------------------------------------------------------
# Connection: a non-blocking socket and what waits for it. Only it knows of would-block
# and of a socket's errors. It reads and sends through a transport: the socket itself,
# or TLS over it. What the transport does not take waits in order, and a half-close
# waits behind that. A failed send ends that direction only: what the peer said last is
# read first.
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


class Plain:
    """A socket as a transport: its own methods, so that it costs nothing."""

    __slots__ = ("recv_into", "send", "sock")
    unsent = 0  # TLS: ciphertext that waits
    more = False  # TLS: there is something to do of which no selector tells
    has_last_word = False  # TLS: close_notify

    def __init__(self, sock: socket.socket) -> None:
        self.recv_into, self.send, self.sock = sock.recv_into, sock.send, sock

    def flush(self) -> bool:
        return True

    def forget(self) -> None:
        pass  # TLS: drops its ciphertext

    shake_hands = flush  # nothing has to be done

    def shutdown(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)


class Phase(enum.IntEnum):
    """What a connection does. From CLOSING on it has no owner any more."""

    HANDSHAKE = 1  # of TLS
    OPEN = 2
    CLOSING = 3  # sends what waits, then ends
    LINGERING = 4  # reads and drops, so that what was said last arrives
    CLOSED = 5


class Ending(enum.IntEnum):
    """How a connection ends."""

    CLOSE = 1
    LINGER = 2  # half-close first: with bytes unread a plain close would be a reset,
    # which can overtake what was said last
    ABORT = 3  # with a reset: what was cut must not look complete


OPEN_PHASE, CLOSED_PHASE = Phase.OPEN, Phase.CLOSED  # looked at for every event


class Connection:
    """Its owner has interest(), on_readable(), on_writable() and fail(error)."""

    __slots__ = (
        "loop sock transport owner backlog readable unread eof send_error "
        "ending_write progress_at events timer phase ending on_closed"
    ).split()

    def __init__(self, loop: Loop, sock: socket.socket, owner: Any) -> None:
        self.loop, self.sock, self.owner = loop, sock, owner
        self.transport: Any = Plain(sock)
        self.phase = Phase.OPEN
        self.ending = Ending.CLOSE
        self.backlog = bytearray()  # what the transport has not taken yet
        self.readable = False  # a read may give something; the selector said so
        self.unread = b""  # was read by an owner before, and is this one's
        self.eof = False  # the peer sends no more
        self.send_error: Optional[OSError] = None  # why nothing can be sent
        self.ending_write = False  # a half-close waits behind the backlog
        self.progress_at = 0.0  # when the backlog began, or last became shorter
        self.events = 0  # what the selector was told
        self.timer: Optional[Timer] = None  # for the phases that have an end
        self.on_closed: Optional[Call] = None  # told once it is closed
        sock.setblocking(False)
        loop.connections.add(self)
        loop.dirty.add(self)
        with contextlib.suppress(OSError):  # a unix socket has none of them
            for level, option, value in SOCKET_OPTIONS:
                sock.setsockopt(level, option, value)

    def __str__(self) -> str:
        return str(self.owner)

    @property
    def closed(self) -> bool:
        return self.phase == CLOSED_PHASE

    def fail(self, error: Exception) -> None:
        if self.phase <= OPEN_PHASE:
            self.owner.fail(error)
        else:
            self.close()

    def on_events(self, mask: int) -> int:
        """The socket is ready. Returns what the loop is to tell the owner."""
        if self.phase == CLOSED_PHASE:
            return 0  # closed earlier in this turn
        self.loop.dirty.add(self)
        if mask & READ:
            self.readable = True
        if mask & WRITE:
            self.flush()
        if self.phase == OPEN_PHASE:
            return mask
        if self.phase == Phase.HANDSHAKE:
            self.shake_hands()
        elif self.phase == Phase.LINGERING and mask & READ:
            if self.read_into(self.loop.scratch) == 0:  # what comes is of no use
                self.close()
        return 0

    def register(self) -> None:
        """Tell the selector what is waited for now, if that has changed."""
        if self.phase == OPEN_PHASE:
            events: int = self.owner.interest()
        elif self.phase == CLOSED_PHASE:
            return
        else:
            events = 0 if self.phase == Phase.CLOSING else READ
        if events & READ and (self.unread or self.transport.more and not self.eof):
            self.announce()
        if self.eof:
            events &= ~READ
        if self.transport.unsent or self.backlog and self.phase != Phase.HANDSHAKE:
            events |= WRITE
        if events != self.events:
            self.tell_selector(events)

    def announce(self) -> None:
        """Something can be read of which no selector tells."""
        key = selectors.SelectorKey(self.sock, 0, READ, self)
        self.loop.unseen.append((key, READ))

    def tell_selector(self, events: int) -> None:
        if self.events and events:
            self.loop.selector.modify(self.sock, events, self)
        elif events:
            self.loop.selector.register(self.sock, events, self)
        else:
            self.loop.selector.unregister(self.sock)
        self.events = events

    def limit_queue(self, size: int) -> None:
        """Let the kernel hold about `size` bytes that are not under way yet. SO_SNDBUF
        would count what is under way too, and so slow down a long link."""
        with contextlib.suppress(OSError, KeyError):
            option = NOT_SENT[sys.platform]
            self.sock.setsockopt(socket.IPPROTO_TCP, option, size)

    # Reading.

    def read_into(self, view: memoryview) -> Optional[int]:
        """Bytes read, 0 at the end, None when there are none now. Raises OSError. An
        empty view gives None: to read nothing would look like the end."""
        count: int
        self.loop.dirty.add(self)
        if self.unread and len(view):
            count = min(len(view), len(self.unread))
            view[:count], self.unread = self.unread[:count], self.unread[count:]
            self.announce()  # there may be more, or the end was seen before
            return count
        if self.eof:
            return 0
        if not self.readable or not len(view):
            return None
        try:
            count = self.transport.recv_into(view)
        except BlockingIOError:
            self.readable = False
            return None
        except OSError:
            self.eof = True  # nothing more can come, so nobody waits for it
            raise
        self.readable = count == len(view)  # it came short, so there is no more
        if count == 0:
            self.eof = True
            if isinstance(self.send_error, ConnectionResetError):
                # an earlier send() consumed the RST; without this a cut looks like EOF
                raise self.send_error
        return count

    def has_unread(self) -> bool:
        """Whether something is here that was not read yet."""
        try:
            return bool(self.unread or self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    # Sending.

    def write(self, data: Any) -> None:
        """Send `data`, now or as soon as the transport takes it. Nothing overtakes what
        waits: TLS has encrypted it already. After a failed send bytes are dropped."""
        if not self.backlog:
            if self.send_error:
                return
            try:
                data = data[self.transport.send(data) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self.note_send_error(error)
                return
            if not (len(data) or self.transport.unsent):
                return
            self.progress_at = self.loop.clock()
            self.loop.dirty.add(self)
        self.backlog += data

    def waiting(self) -> int:
        """Bytes that were written and not sent."""
        return len(self.backlog) + int(self.transport.unsent)

    def flush(self) -> None:
        """Send what waits, then do what waits behind it."""
        before = self.waiting()
        try:
            self.transport.flush()
            if self.backlog:
                del self.backlog[: self.transport.send(self.backlog)]
        except BlockingIOError:
            pass
        except OSError as error:
            self.note_send_error(error)
        waiting = self.waiting()
        if waiting < before:
            self.progress_at = self.loop.clock()
        if not waiting:
            self.on_drained()

    def note_send_error(self, error: OSError) -> None:
        self.send_error = self.send_error or error
        self.backlog = bytearray()  # not clear(): a traceback may hold a view of it
        self.transport.forget()
        self.loop.dirty.add(self)

    def on_drained(self) -> None:
        """Everything has been sent."""
        if self.phase == Phase.CLOSING:
            self.end()
        elif self.ending_write:
            self.ending_write = False
            try:
                self.transport.shutdown()
            except OSError as error:
                self.note_send_error(error)

    def shutdown_write(self) -> None:
        """Half-close, behind everything written so far."""
        self.ending_write = True
        if not self.waiting():
            self.on_drained()

    # TLS.

    def start_tls(
        self, context: Any, server: bool, name: Any = None, pin: bytes = b""
    ) -> None:
        """From here on all is encrypted: see Sealed."""
        under = self.transport
        self.transport = Sealed(self.loop, under, context, server, name, pin)
        self.phase = Phase.HANDSHAKE
        self.loop.dirty.add(self)
        self.watch(HANDSHAKE_TIME)

    def stop_tls(self) -> None:
        """The peer does not speak it: what is left to say, it is told without."""
        self.transport, self.phase = self.transport.under, Phase.OPEN

    def shake_hands(self) -> None:
        """Go on with the handshake; then the owner's part begins. Steps are slow: after
        many in a turn the selector or register() tells again of those left."""
        if self.loop.handshakes and self.loop.tired():
            return
        self.loop.handshakes += 1
        self.transport.incoming.write(self.unread)
        self.unread = b""
        if not self.transport.shake_hands():
            return
        self.phase = Phase.OPEN
        if self.timer:
            self.timer.clear()
        self.readable = True
        self.flush()

    # How it ends.

    def close_when_drained(self, ending: Ending) -> None:
        """From here on the connection has no owner: it sends what waits, and ends. It
        gives up a peer that takes nothing for STALLED seconds."""
        if self.phase == CLOSED_PHASE:
            return
        self.phase, self.ending = Phase.CLOSING, ending
        self.loop.dirty.add(self)
        if self.waiting():
            self.watch(STALLED)
        else:
            self.end()

    def end(self) -> None:
        """All is sent: half-close where that helps, then close or linger."""
        if self.ending == Ending.ABORT:
            self.abort()
            return
        self.phase = Phase.LINGERING
        if self.ending == Ending.LINGER or self.transport.has_last_word:
            self.shutdown_write()
        if self.ending == Ending.CLOSE or self.eof or self.send_error:
            self.close()
        else:
            self.watch(LINGER)

    def watch(self, seconds: float) -> None:
        self.timer = self.timer or Timer(self.loop, self, self.on_late)
        self.timer.set(seconds)

    def on_late(self) -> None:
        if self.phase == Phase.HANDSHAKE:
            raise OSError("no TLS handshake within %d s" % HANDSHAKE_TIME)
        if self.phase == Phase.LINGERING:
            self.close()
        elif self.loop.clock() - self.progress_at < STALLED:
            self.watch(STALLED)
        else:
            self.abort()

    def abort(self) -> None:
        """Close with a reset, at once."""
        on = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, on)
        self.close()

    def close(self) -> None:
        """Close at once."""
        if self.phase == CLOSED_PHASE:
            return
        self.phase, self.readable = Phase.CLOSED, False
        self.loop.connections.discard(self)
        self.backlog = bytearray()
        if self.timer:
            self.timer.clear()
        if self.events:
            self.tell_selector(0)
        self.transport = Plain(self.sock)
        self.sock.close()
        if self.on_closed:
            self.loop.guard(self, self.on_closed)


# -----------------------------------------------------------------------------------
# Stream and Link: the multiplexer. Nothing is pushed into the link. A stream that may
# have something to send stands in a queue, and when its turn comes, its owner's
# pull(view) reads straight into the frame. So bytes wait in the kernel of the program
# that sends them, and a stream that nobody reads stops itself and no other.
#
# Fair turns. *Quiet* streams, which sent little of late, go first, and leave together
# in one system call at the end of each turn of the loop. *Busy* ones get one frame each
# time the link is writable. (RFC 8290: sparse and bulk flows.) It is at most a
# *quantum*: what the link delivers in 10 ms. The kernel is asked to hold no more than
# that unsent. So a small answer waits for some 20 ms of other bytes at most.
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
WIDEN_AFTER = 0.05  # seconds until a window may grow again: first the last must show
ASK_AFTER = 1.0  # seconds between looks at the round trip, while credit is given
UNREAD_LIMIT = 64 << 20  # bytes a link may hold that no local socket has taken
ALL_UNREAD = 256 << 20  # bytes that all links may hold: then it is the largest's turn
LOOK_EVERY = 64  # frames after which a link looks at the clock: half a millisecond
TEXT_WORK = 64  # bytes of JSON that are as much work as a frame
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
WAITED = 3.0  # seconds until we ask where visitors wait: something was sent
WAITED_MORE = 5.0  # seconds that it then has, so that they know within 9 ...
ROUND_TRIPS = 10  # ... or so many round trips: a full queue before a link is no death
STUCK_AFTER = 20.0  # seconds in which bytes that we have to send did not move


class Stream:
    """One visitor's bytes in a link. Its owner has pull(view), which returns how many
    bytes it wrote, None for nothing yet, or 0 for the end; receive(view), on_end(),
    on_reset(code, cause) and fail(error). What the link has to do, flush() does."""

    __slots__ = (
        "link id owner credit window granted widened unread uncredited sent last_turn "
        "since queued wants_turn owing open ended_out ended_in first_frame reset_frame "
        "bytes_in bytes_out"
    ).split()

    def __init__(self, link: "Link", number: int, owner: Any) -> None:
        self.link, self.id, self.owner = link, number, owner
        self.credit = WINDOW  # bytes that we may still send
        self.window = WINDOW  # bytes of the peer's that may be under way
        self.granted = self.widened = link.loop.clock()  # last CREDIT, last growth
        self.unread = 0  # bytes received that no local socket has taken
        self.uncredited = 0  # bytes taken for which the peer has no credit yet
        self.bytes_in = self.bytes_out = 0  # of DATA, from the first on
        self.sent, self.since = 0, 0.0  # bytes sent of late, and from when on
        self.last_turn = 0  # bytes sent in the last turn
        self.queued = False  # stands in a queue of the link, or has its turn
        self.wants_turn = False  # was woken since its turn began
        self.owing = False  # stands among the link's debtors
        self.open = True
        self.ended_out = self.ended_in = False  # END was sent, END was received
        self.first_frame: Any = None  # OPEN or CONNECTED and its payload, to send
        self.reset_frame = b""  # the RESET to send

    # For its owner.

    def wake(self) -> None:
        """The owner may have something. A quiet stream is pulled when this turn ends, a
        busy one when the link is writable."""
        self.wants_turn = True
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
        """Whether to watch the owner's source. Not while queued: its turn reads it."""
        blocked = self.queued or self.credit < LEAST_TURN or self.ended_out
        return self.open and not blocked

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

    def begin(self, kind: int, payload: bytes = b"") -> None:
        """Say this before anything else: OPEN, or that the target is CONNECTED."""
        self.first_frame = kind, payload
        self.owe()

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
        if now - self.since >= QUIET_TIME:
            self.since, self.sent = now, 0
        self.credit -= count
        self.sent += count
        self.bytes_out += count
        self.last_turn = count

    def owe(self) -> None:
        """The link has a frame of control to write for this stream."""
        if not self.owing:
            self.owing = True
            self.link.debtors.append(self)
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

    def take_credit(self, now: float) -> int:
        """The credit that the peer gets now; 0: none. Was half a window spent in less
        than a round trip, with nothing waiting here for a slow reader? Then the window
        doubles, and its growth is credit too."""
        credit, window, link = self.uncredited, self.window, self.link
        if not self.open or credit < window // 4:
            return 0
        took, self.granted, self.uncredited = now - self.granted, now, 0
        fast = credit * link.round_trip > took * window / 2 and not self.unread
        fits = 2 * window <= LARGEST_WINDOW and window <= link.spare
        if fast and fits and now - self.widened >= WIDEN_AFTER:
            self.widened = now
            self.window += window
            link.spare -= window
            credit += window
        return credit


class Pacer:
    """Finds the quantum: what a link delivers in TURN_TIME, from one moment when the
    kernel had taken everything to the next. An empty buffer swallows a megabyte at once
    and says nothing about the link, so the quantum at most doubles at a time. What the
    kernel holds nothing can overtake, so it is limited to a quantum."""

    def __init__(self, loop: "Loop", connection: Connection) -> None:
        self.loop, self.connection = loop, connection
        self.quantum = FIRST_QUANTUM
        self.notsent_lowat = FIRST_QUANTUM  # what the kernel was told
        self.sent_since = 0  # bytes sent from `measured` on
        self.measured = loop.clock()
        self.was_idle = True  # since `measured` there was a moment with nothing to send
        connection.limit_queue(self.quantum)

    def measure(self, now: float) -> None:
        """The kernel has taken everything. An idle link could have delivered more."""
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
        self.debtors: Deque[Stream] = collections.deque()  # streams that owe control
        self.own_frames: Dict[int, Any] = {}  # that the link owes, one of a kind
        self.heard = loop.clock()  # when the last byte came
        self.pinged = 0.0  # when the last PING went out
        # Both are 0 again as soon as any byte comes:
        self.sent = 0.0  # when streams first sent what nothing has answered
        self.asked = 0.0  # from when on the answer to a PING is due
        self.stood = 0.0  # `progress_at` of the backlog at the last check; 0: none
        self.draining = False  # GOODBYE was said or heard: no new streams
        self.goodbye_received = self.closed = False
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
        if not self.reader.data:
            count = self.connection.read_into(self.loop.scratch)
            if count == 0:
                raise OSError("the other side closed the connection")
            if count:
                self.receive(self.loop.scratch[:count])

    def receive(self, data: memoryview = NO_DATA) -> None:
        """Act on each frame, or go on with those that came before. With too many for
        one turn of the loop go on in the next. `data` is not ours: the next read
        overwrites it."""
        reader, count = self.reader, 0
        if data:
            self.heard = self.loop.clock()
            self.sent = self.asked = 0.0
            reader.push(data)
        while not self.closed:
            frame = reader.next()
            if frame is None:
                break
            kind, number, payload = frame
            if self.tracing:
                log.debug("from %s: %s", self.who(), describe(kind, number, payload))
            stream = self.streams.get(number)
            if stream and kind in STREAM_FRAMES and self.step == len(LOGIN_ORDER):
                STREAM_FRAMES[kind](self, stream, payload)
                count += 1
            else:
                self.on_other_frame(kind, number, payload)
                count += 1 + len(payload) // TEXT_WORK
            if count >= LOOK_EVERY:
                count = 0
                if self.loop.tired():
                    reader.keep()
                    self.loop.soon(self, self.receive)
                    break
        self.loop.dirty.add(self.connection)  # it may be read again

    def on_other_frame(self, kind: int, number: int, payload: memoryview) -> None:
        """One of the link's own, OPEN, or one for a stream that is over."""
        if self.step < len(LOGIN_ORDER) or kind in LOGIN_ORDER:
            self.check_order(kind)
        if number == 0:
            self.on_link_frame(kind, payload)
        elif kind == OPEN:
            self.on_open(number, payload)
        elif number > self.last_id:
            raise ProtocolError("%s on no stream %d" % (Kind(kind).name, number))

    def check_order(self, kind: int) -> None:
        """Frames of the login, sent or received, keep their order, and all else comes
        after them. SERVICES may come again."""
        if self.step < len(LOGIN_ORDER):
            if kind == LOGIN_ORDER[self.step]:
                self.step += 1
            elif kind != Kind.GOODBYE:
                raise ProtocolError("%s during the handshake" % Kind(kind).name)
        elif kind in LOGIN_ORDER[:-1]:
            raise ProtocolError("%s after the handshake" % Kind(kind).name)

    def on_link_frame(self, kind: int, payload: memoryview) -> None:
        if kind == Kind.PING:
            self.post(Kind.PONG, bytes(payload))
        elif kind == Kind.PONG:
            if payload == self.ping_payload:  # it came behind all that was under way
                self.round_trip = self.loop.clock() - self.pinged
                self.ping_payload = b""
        else:
            message = unpack_json(payload, list if kind == Kind.NOTE else dict)
            if kind == Kind.GOODBYE:
                if self.goodbye_received:
                    return  # once is enough
                self.draining = self.goodbye_received = True
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
        used = stream.unread + stream.uncredited + size  # of the peer's window
        if used > stream.window or stream.ended_in:
            raise ProtocolError("DATA over the credit or after END")
        stream.unread += size
        stream.bytes_in += size
        self.unread += size
        self.loop.unread += size
        try:
            stream.owner.receive(payload)
        except Exception as error:
            self.loop.failed(stream.owner, error)
        if self.unread > UNREAD_LIMIT or self.loop.unread > ALL_UNREAD:
            self.shed()

    def shed(self) -> None:
        """Reset the streams that hold most, here and then on the largest link."""
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

    def on_connected(self, stream: Stream, payload: memoryview) -> None:
        told = getattr(stream.owner, "on_connected", None)
        if told is None:
            raise ProtocolError("CONNECTED, and nobody asked")
        self.loop.guard(stream.owner, told)

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
        stream.begin(Kind.OPEN, pack_json(message))
        if self.last_id == LAST_ID:
            self.goodbye("stopping", "all stream ids are used up")
        return stream

    def send(self, kind: int, message: Dict[str, Any]) -> None:
        self.post(kind, pack_json(message))

    def post(self, kind: int, payload: Any) -> None:
        """Owe a frame of the link's own; a newer one of its kind takes its place."""
        if self.step < len(LOGIN_ORDER) or kind in LOGIN_ORDER:
            self.check_order(kind)
        self.own_frames[kind] = payload
        self.loop.ready_links[self] = None

    def on_writable(self) -> None:
        self.flush(writable=True)

    def flush(self, writable: bool = False) -> None:
        """Send control, quiet streams and, if `writable`, one busy frame, while the
        kernel takes all of it."""
        connection, pacer = self.connection, self.pacer
        while not (self.closed or connection.backlog or connection.transport.unsent):
            asks = not self.sent and bool(self.debtors or self.quiet or self.busy)
            fill = self.put_control(0) if self.own_frames or self.debtors else 0
            size = min(QUIET, pacer.quantum)
            while self.quiet and fill < COLLECT:
                fill = self.put_turn(self.quiet.popleft(), fill, size)
            if writable and self.busy:
                writable = False
                size = max(LEAST_TURN, pacer.quantum // min(SHARES, len(self.busy)))
                fill = self.put_turn(self.busy.popleft(), fill, size)
            if not fill:
                break
            now = self.loop.clock()
            if now - pacer.measured >= TURN_TIME:
                pacer.measure(now)
            pacer.sent_since += fill
            if asks:
                self.sent = now
            connection.write(self.loop.frames[:fill])
        pacer.was_idle |= not (self.busy or connection.backlog)
        self.loop.dirty.add(connection)
        if self.draining and not (self.streams or self.own_frames or self.debtors):
            if not connection.waiting():
                self.close("goodbye")

    def put_control(self, fill: int) -> int:
        """Write the frames that are owed from `fill` on; return where they end."""
        while self.own_frames and fill < COLLECT:
            kind = next(iter(self.own_frames))
            fill = self.put(kind, 0, self.own_frames.pop(kind), fill)
            if kind == Kind.PING:
                self.pinged = self.loop.clock()
        while self.debtors and fill < COLLECT:
            fill = self.put_stream_control(self.debtors.popleft(), fill)
        return fill

    def put_stream_control(self, stream: Stream, fill: int) -> int:
        """The frames of control that a stream owes; with this they are paid."""
        stream.owing = False
        if stream.first_frame:
            kind, payload = stream.first_frame
            fill = self.put(kind, stream.id, payload, fill)
            stream.first_frame = None
        if stream.reset_frame:
            return self.put(Kind.RESET, stream.id, stream.reset_frame, fill)
        now = self.loop.clock()
        credit = stream.take_credit(now)
        if credit:
            fill = self.put(Kind.CREDIT, stream.id, NUMBER.pack(credit), fill)
            if not self.ping_payload and now - self.pinged >= ASK_AFTER:
                self.ping()  # the round trip under load is what windows must cover
        return fill

    def put_turn(self, stream: Stream, fill: int, limit: int) -> int:
        """One turn of a stream: the owner writes right behind the header."""
        if stream.ended_out or stream.credit < LEAST_TURN or not stream.open:
            stream.queued = False  # an empty view would read as the end
            return fill
        start, size = fill + HEADER.size, min(limit, stream.credit)
        view = self.loop.frames[start : start + size]
        stream.wants_turn = False  # wake(), within pull(), asks for another turn
        try:
            count = stream.owner.pull(view)
        except Exception as error:
            count = self.loop.failed(stream.owner, error)
        stream.queued = False
        if count is None or not stream.open:
            return fill
        if count == 0:
            stream.ended_out = True
            if stream.ended_in:
                stream.detach()
            return self.put(Kind.END, stream.id, b"", fill)
        stream.note_sent(count, self.loop.clock())
        if count == size or stream.wants_turn:
            stream.wake()  # a source that came short is watched instead
        return self.put(DATA, stream.id, view[:count], fill)

    def put(self, kind: int, number: int, payload: Any, fill: int) -> int:
        """Header and payload at `fill`; the payload of DATA stands there already."""
        HEADER.pack_into(self.loop.frames, fill, kind << 24 | len(payload), number)
        start = fill + HEADER.size
        end = start + len(payload)
        if kind != DATA:
            self.loop.frames[start:end] = payload
        if self.tracing:
            log.debug("to %s: %s", self.who(), describe(kind, number, payload))
        return end

    # How it ends.

    def check(self) -> None:
        """Each second, or more often: does the other side live, do our bytes move?"""
        now, connection = self.loop.clock(), self.connection
        moved = connection.progress_at
        if connection.waiting() and now - moved > STUCK_AFTER:
            raise OSError("nothing could be sent for %d s" % STUCK_AFTER)
        if self.asked and moved > self.stood > 0:
            self.asked = max(self.asked, moved)  # what stands before the PING moves
        self.stood = moved if connection.waiting() else 0.0
        late = self.waits_since(now) + WAITED  # a PING before that has the time, too
        waited, due = late <= now, self.asked + PONG_WITHIN
        if waited:
            patience = max(WAITED_MORE, ROUND_TRIPS * self.round_trip)
            due = max(self.asked, late) + patience
        if self.asked and now >= due:
            raise OSError("no sign of life for %d s" % (now - self.heard))
        if not self.asked and (waited or now - self.heard >= PING_AFTER):
            self.ping()
        self.timer.set(0.25 if self.sent else 1.0)

    def waits_since(self, now: float) -> float:
        """Since when the other side could have answered what we sent, or made room."""
        if self.sent or not (self.busy or self.connection.waiting()):
            return self.sent or now
        return self.heard

    def ping(self) -> None:
        """Ask for a sign of life."""
        if self.step == len(LOGIN_ORDER):
            self.asked = self.loop.clock()
            self.ping_payload = PING_CLOCK.pack(self.asked)
            self.post(Kind.PING, self.ping_payload)

    def goodbye(self, code: str, reason: str, **more: Any) -> None:
        """Take no new streams; flush() closes the link after the last."""
        if not self.draining:
            self.draining = True
            self.send(Kind.GOODBYE, {"code": code, "reason": reason, **more})

    def fail(self, error: Exception) -> None:
        """The connection is broken, or the peer's frames are."""
        if isinstance(error, OSError):
            self.connection.send_error = self.connection.send_error or error
        else:
            code = "protocol" if isinstance(error, ProtocolError) else "error"
            self.say_last_word(code, str(error))
        self.close(str(error))

    def say_last_word(self, code: str, reason: str) -> None:
        """A GOODBYE before the link closes, unless one is owed already, or bytes wait
        that would delay it, perhaps for ever."""
        if not self.connection.waiting():
            message = pack_json({"code": code, "reason": reason})
            message = self.own_frames.pop(Kind.GOODBYE, message)
            self.own_frames[Kind.GOODBYE] = message  # last in the dict, so sent last
            self.debtors.clear()
            self.connection.write(self.loop.frames[: self.put_control(0)])

    def close(self, cause: str, code: str = "link-lost") -> None:
        """Over, with all its streams. What was said last arrives if nothing waits."""
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
            if self.connection.send_error or self.connection.waiting():
                self.connection.close()
            else:
                self.connection.close_when_drained(Ending.LINGER)

    def who(self) -> str:
        """The other side, for -vv."""
        return "the server" if self.reader.peer == "server" else str(self.owner)


STREAM_FRAMES: Dict[int, Call] = {
    Kind.DATA: Link.on_data,
    Kind.CREDIT: Link.on_credit,
    Kind.END: Link.on_end,
    Kind.RESET: Link.on_reset,
    Kind.CONNECTED: Link.on_connected,
}


# -----------------------------------------------------------------------------------
# Pipe: joins a stream to a connection. END becomes a half-close, a half-close END. A
# stream that is reset cuts the connection; a connection that breaks resets the stream.
# -----------------------------------------------------------------------------------
PIPE_LOOK = 5.0  # seconds between looks at a connection that nothing is waited for


class Pipe:
    """Owns both. When the connection breaks the peer is told `code`: "left" for a
    visitor, "reset" for a service."""

    __slots__ = ("stream", "connection", "name", "code", "cut", "timer")

    def __init__(
        self, stream: Stream, connection: Connection, name: str, code: str
    ) -> None:
        self.stream, self.connection = stream, connection
        self.name, self.code = name, code
        self.cut = ("", "")  # what ended it before its time: a code, and the cause
        stream.owner = connection.owner = self
        self.timer = Timer(connection.loop, self, self.look)
        connection.loop.dirty.add(connection)
        if connection.unread or connection.eof:
            stream.wake()  # no socket will announce it

    def __str__(self) -> str:
        return self.name

    # From the connection to the stream.

    def interest(self) -> int:
        if self.stream.wants_read():
            return READ
        if self.timer.due is None:
            self.timer.set(PIPE_LOOK)
        return 0

    def look(self) -> None:
        """While nothing is waited for, the selector does not tell of a reset."""
        connection = self.connection
        if connection.phase == OPEN_PHASE:
            error = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
            connection.loop.dirty.add(connection)  # interest() sets the timer again

    def on_readable(self) -> None:
        self.stream.wake()

    def pull(self, view: memoryview) -> Optional[int]:
        """When both sides have ended it is over."""
        count = self.connection.read_into(view)
        if count == 0 and self.stream.ended_in:
            self.connection.close_when_drained(Ending.CLOSE)
        return count

    # From the stream to the connection.

    def receive(self, data: memoryview) -> None:
        self.connection.write(data)
        self.on_writable()

    def on_writable(self) -> None:
        """With both directions broken there is nobody left to serve."""
        connection = self.connection
        if connection.send_error and connection.eof:
            self.cut = self.code, ""
            self.stream.reset(self.code)
            connection.close()
        else:
            self.stream.acknowledge(connection.waiting())

    def on_end(self) -> None:
        if self.stream.ended_out:
            self.connection.close_when_drained(Ending.CLOSE)
        else:
            self.connection.shutdown_write()

    def on_reset(self, code: str, cause: str) -> None:
        """What came before still arrives, unless nobody waits for it: the visitor has
        left, or what waits here is what is too much. `done` is no fault."""
        if code == "done":
            self.connection.close_when_drained(Ending.CLOSE)
            return
        log.debug("%s: cut: %s %s", self, code, cause)
        self.cut = code, cause
        if code in ("left", "overload"):
            self.connection.abort()
        else:
            self.connection.close_when_drained(Ending.ABORT)

    def fail(self, error: Exception) -> None:
        """The connection is broken."""
        cause = "%s reset the connection" % self
        if not isinstance(error, ConnectionError):
            cause = "%s: %s" % (self, error)
        self.cut = self.code, cause
        self.stream.reset(self.code, cause)
        self.connection.abort()


# ===================================================================================
# SHARED BLOCK 1: ends.
# ===================================================================================


# -----------------------------------------------------------------------------------
# HTTP/1.1: heads and bodies, without any I/O (RFC 9112). A head is a first line and a
# field section, which request_fields() and answer_fields() of part two read, check and
# rewrite.
#
# We are strict to visitors: a visitor chooses what it sends, and a request that two
# parsers read in two ways is an attack. We are tolerant to services: nobody can change
# the answers of a router or a camera, so they are read as nginx or HAProxy would. An
# answer is refused only where two readers would differ in what the visitor gets. What
# goes on, either way, is our own text by the strict grammar.
# -----------------------------------------------------------------------------------
HEAD_LIMIT = 64 << 10  # bytes of a head: far more than cookies need
LINE_LIMIT = 16 << 10  # bytes of a request line
INTERIM_LIMIT = 100  # 1xx answers to one request

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 5.6.2
TEXT = r"[\t -~\x80-\xff]"
REQUEST_LINE = re.compile(r'(%s) ([!"$-~\x80-\xff]+) HTTP/(\d)\.(\d)\r\n' % TOKEN)
# Some services say HTTP/2.0 here, which all browsers take for 1.1. A reason is cut
# where it is no longer text: no program reads it (RFC 9112 4).
STATUS_LINE = re.compile(
    r"(?:\r?\n)?HTTP/([1-9]\.\d{1,2}) +([1-9]\d\d)"
    r"(?:[ \t](%s*)(?:[^\t -~\x80-\xff\0\r\n][^\0\r\n]*)?)?(?=\r?\n)" % TEXT
)
ABSOLUTE = re.compile(r"(?i)(https?)://([^/?@]+)([/?].*)?")
EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")  # before a request: RFC 9112 2.2
BARE_LF = re.compile(rb"(?<!\r)\n")
END_OF_ANSWER_HEAD = re.compile(rb"\n\r?\n")
LINE_BREAK = re.compile(r"[\r\n\0]")


class HTTPError(ProtocolError):
    """An answer of our own: status, a word for programs, a sentence for people."""

    def __init__(self, status: int, code: str, cause: str, fields: Any = ()) -> None:
        super().__init__(cause)
        self.status, self.code, self.cause = status, code, cause
        self.fields = list(fields)


def malformed(cause: str) -> HTTPError:
    return HTTPError(400, "malformed", cause)


# Requests.


class LazyFields:
    """The `fields` of a request. They are made when a hook first asks for them."""

    def __get__(self, request: Any, owner: Any = None) -> Any:
        lines = request.section.raw[:-4].split("\r\n")[1:]
        parts = [line.partition(":") for line in lines]
        request.fields = [(name, value.strip(" \t")) for name, _, value in parts]
        return request.fields


class Request:
    """A visitor's request. Router hooks see its `method`, its `target` (`/path?query`
    or `*`), its `host` as it was sent, `name` (the host in lower case, without port),
    the `headers`, and the `address` of the visitor. What they take out of `fields`,
    (name, value) pairs, the service does not get. Raises HTTPError."""

    fields: List[Tuple[str, str]] = LazyFields()  # type: ignore[assignment]

    def __init__(
        self,
        head: Any,
        address: str,
        scheme: str = "http",
        recent: Any = None,
        front: Any = None,
    ) -> None:
        text = head.decode("latin-1")
        line = REQUEST_LINE.match(text)
        if not line:
            raise malformed("the request line breaks the grammar (RFC 9112, 3)")
        self.method, self.target, major, minor = line.groups()
        if major != "1":
            raise HTTPError(505, "version", "only HTTP/1.x is spoken here")
        self.minor = int(minor != "0")  # RFC 9110 2.5: 1.7 is 1.1 to us
        raw, recent, authority = text[line.end() - 2 :], recent or Recent(), ""
        if front:  # of --trust-proxy
            address, scheme, authority = front.read(raw, address, scheme)
        self.address, self.scheme = address, scheme
        if self.target[0] != "/" or self.method == "CONNECT":
            authority = self.make_origin_form() or authority
        hop = address, scheme, self.minor, authority
        section: Section = recent.request
        if section.raw != raw or section.hop != hop:
            section = recall(request_fields, raw, hop)
            if len(raw) <= RECENT_SIZE:
                recent.request = section
        self.section, self.connection = section, section.connection
        self.host, self.name, self.upgrade = section.host, section.name, section.upgrade
        if section.chunked:
            self.body: Body = Chunked()
        else:
            self.body = Sized(section.length) if section.length else Body()

    def make_origin_form(self) -> str:
        """Bring the target into origin-form (RFC 9112 3.2.1). Returns the host that an
        absolute target names, or CONNECT's, or ""."""
        if (self.target, self.method) == ("*", "OPTIONS"):
            return ""
        if self.method == "CONNECT":
            if not re.search(":[0-9]+$", self.target):
                raise malformed("CONNECT names host:port (RFC 9112, 3.2.3)")
            return self.target
        match = ABSOLUTE.fullmatch(self.target)
        if not match or match.group(1).lower() != self.scheme:
            raise malformed("the target is neither a path nor its %s URL" % self.scheme)
        rest = match.group(3) or ""
        if not rest and self.method == "OPTIONS":
            rest = "*"  # RFC 9112 3.2.4
        self.target = rest if rest.startswith(("/", "*")) else "/" + rest
        return match.group(2)

    @property
    def headers(self) -> "Fields":
        """The fields by name."""
        return Fields(join_fields(self.fields))

    def keeps_alive(self) -> bool:
        """Whether the visitor wants to go on after the answer (RFC 9112 9.3)."""
        if self.minor == 0:
            return "keep-alive" in self.connection
        return "close" not in self.connection

    def is_safe(self) -> bool:
        """Whether it may be sent twice (RFC 9110 9.2.1)."""
        return self.method in ("GET", "HEAD", "OPTIONS")

    def wants_html(self) -> bool:
        return "text/html" in self.section.accept

    def to_service(self, host: Optional[str] = None) -> bytes:
        """The head as the service gets it, perhaps with another `host`. Raises
        ValueError when a hook left a field that would break it, or hide another one."""
        line = "%s %s HTTP/1.%d" % (self.method, self.target, self.minor)
        head = line.encode("latin-1") + self.section.rewritten
        if "fields" in self.__dict__:
            head = (line + self.rewrite_fields()).encode("latin-1")
        return head if host is None else replace_host(head, self.host, host)

    def rewrite_fields(self) -> str:
        """What a hook, or a gate, has left of them."""
        text = "".join(["\r\n%s: %s" % pair for pair in self.fields])
        good = FIELDS.fullmatch(text + "\r\n\r\n")
        if not good or text.count("\r\n") != len(self.fields):
            raise ValueError("a hook left a field that breaks the grammar")
        text = strip_hop_by_hop(text, NOT_TO_SERVICE, self.connection)
        return "\r\nHost: %s%s%s" % (self.host, text, self.section.ours)


# Answers.


class Answer:
    """A service's answer to a request of this method. Raises HTTPError when it cannot
    be understood."""

    def __init__(self, head: Any, method: str, recent: Any = None) -> None:
        text = head.decode("latin-1")
        line = STATUS_LINE.match(text)
        if not line:
            raise malformed("its status line breaks the grammar (RFC 9112, 4)")
        version, status, reason = line.groups()
        self.method, self.minor = method, int(version != "1.0")
        self.status, self.reason = int(status), reason or ""
        raw, recent = text[line.end() :], recent or Recent()
        section: Section = recent.answer
        hop = self.status, method == "HEAD"
        if section.raw != raw or section.hop != hop:
            section = recall(answer_fields, raw, hop)
            if len(raw) <= RECENT_SIZE:
                recent.answer = section
        self.section, self.connection = section, section.connection
        self.upgrade = section.upgrade
        if section.chunked and self.minor == 0:
            raise malformed("Transfer-Encoding in HTTP/1.0")

    def frame(self, unwrap: bool = False) -> "Body":
        """The body that follows (RFC 9112 6.3). `unwrap`: only the content of chunks
        goes on, for a visitor that speaks HTTP/1.0."""
        section, status = self.section, self.status
        if self.method == "HEAD" or status in (204, 304) or status < 200:
            return Body()
        if section.chunked:
            return Chunked(tolerant=True, unwrap=unwrap)
        return UntilClose() if section.length is None else Sized(section.length)

    def keeps_alive(self) -> bool:
        """Whether the service goes on after this answer."""
        return self.minor == 1 and "close" not in self.connection

    def to_visitor(self, connection: str, unwrapped: bool = False) -> bytes:
        """The head as the visitor gets it. `connection` is our own Connection field.
        `unwrapped`: the visitor gets only the content of chunks."""
        first = "HTTP/1.1 %d %s" % (self.status, self.reason)
        rewritten = self.section.rewritten
        if unwrapped and self.section.chunked:
            rewritten = WRAPPING.sub("", rewritten.decode("latin-1")).encode("latin-1")
        if self.upgrade and self.status in (101, 426):
            connection = "Upgrade, " + connection if connection else "Upgrade"
        end = "\r\nConnection: %s\r\n\r\n" % connection if connection else "\r\n\r\n"
        return first.encode("latin-1") + rewritten + end.encode("latin-1")


# Bodies.

# CHUNK_LINE_LIMIT < LEAST_TURN: a chunk line goes on when it is whole. A stream may get
# no more than LEAST_TURN bytes to fill, and a line that does not fit would never go on.
CHUNK_LINE_LIMIT = 2 << 10  # bytes of a chunk line, or of a trailer
CHUNKS_A_TURN = 64 << 10  # bytes of chunks read at once: the rest of a line waits here
FEED_LINES = 32  # chunks between looks at the clock: some 0.1 ms

QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\%s)*"' % TEXT
EXTENSION = r"[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|%s))?" % (TOKEN, TOKEN, QUOTED)
CHUNK = re.compile(r"([0-9A-Fa-f]{1,8})(?:%s)*\r\n" % EXTENSION)
ODD_CHUNK = re.compile(r"0*([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
NEXT_CHUNK = re.compile(rb"\r\n[1-9A-Fa-f][0-9A-Fa-f]{0,7}\r\n")  # ends one, too
LINE = re.compile(rb"[^\n]*\n")
FOLDED_LINE = re.compile(rb"\r?\n|[^\n]+\n(?:[ \t][^\n]*\n)*(?=[^ \t])")


class Body:
    """An empty body, and what all bodies have in common."""

    done = True
    untouched = True  # nothing of it has been consumed yet
    until_close = False
    read_limit = 0  # bytes worth reading at once, and of a Sized body what is left
    replaced: Optional[bytes] = None  # what goes on in place of the bytes just consumed

    def feed(self, data: Any, tired: Call = bool) -> int:
        """Consume what is understood of `data` until it is `tired()`, and return how
        many bytes that is. 0 means that more must come first, or that the body is done.
        Raises HTTPError."""
        return 0


class Sized(Body):
    """A body with a Content-Length."""

    def __init__(self, length: int = 1 << 62) -> None:
        self.read_limit = length
        self.done = length == 0

    def feed(self, data: Any, tired: Call = bool) -> int:
        count = min(len(data), self.read_limit)
        self.read_limit -= count
        self.untouched = self.untouched and not count
        self.done = self.read_limit == 0
        return count


class UntilClose(Sized):
    """A body that ends with the stream. The caller then sets `done`."""

    until_close = True


AT_SIZE, AT_END, AT_TRAILER = range(3)  # the line of a chunked body that comes next


class Chunked(Body):
    """A chunked body (RFC 9112 7.1). A line of it is consumed when it is whole and
    keeps the grammar. `tolerant`: so is a line that all readers understand, and it is
    written anew. `unwrap`: only the content goes on."""

    done = False
    read_limit = CHUNKS_A_TURN

    def __init__(self, tolerant: bool = False, unwrap: bool = False) -> None:
        self.tolerant, self.unwrap = tolerant, unwrap
        self.left = 0  # bytes of the chunk
        self.expect = AT_SIZE
        self.trailers = 0

    def feed(self, data: Any, tired: Call = bool) -> int:
        self.replaced, size = None, len(data)
        if self.left >= size:  # the inside of a big chunk
            self.left -= size
            return size
        parts: List[Any] = []  # what goes on for data[:copied]
        at = copied = 0
        for number in itertools.count(1):
            content = min(self.left, size - at)
            self.left -= content
            at += content
            if self.done or at == size or number % FEED_LINES == 0 and tired():
                break
            match = NEXT_CHUNK.match(data, at) if self.expect == AT_END else None
            line = text = match.group() if match else self.find_line(data, at)
            if not line:
                break
            if match:  # mostly the next size has come with the end of a chunk
                self.left = int(line, 16)
            else:
                text = self.read_line(line)
            if text != line or self.unwrap:
                parts += data[copied:at], b"" if self.unwrap else text
                copied = at + len(line)
            at += len(line)
        self.untouched = self.untouched and not at
        if parts:
            self.replaced = b"".join(parts + [data[copied:at]])
        return at

    def find_line(self, data: Any, at: int) -> bytes:
        """The line at `at`, with its end; b"" while it is not whole. A trailer of an
        answer is whole when the next line has begun and is no fold."""
        folds = self.tolerant and self.expect == AT_TRAILER
        end = at + CHUNK_LINE_LIMIT
        match = (FOLDED_LINE if folds else LINE).match(data, at, end)
        if not match and len(data) >= end:
            raise malformed("a line of a chunked body is too long")
        return match.group() if match else b""

    def read_line(self, line: bytes) -> bytes:
        """Act on a line. Returns what goes on in its place."""
        text = line.decode("latin-1")
        if self.expect == AT_SIZE:
            plain = CHUNK.fullmatch(text)
            match = plain or (ODD_CHUNK if self.tolerant else CHUNK).fullmatch(text)
            if not match:
                raise malformed("a chunk size breaks the grammar (RFC 9112, 7.1)")
            self.left = int(match.group(1), 16)
            self.expect = AT_END if self.left else AT_TRAILER
            return line if plain else b"%x\r\n" % self.left
        if text == "\r\n" or (self.tolerant and text == "\n"):
            self.done = self.expect == AT_TRAILER
            self.expect = AT_SIZE
            return b"\r\n"
        if self.expect == AT_END:
            raise malformed("a chunk is longer than it said")
        return self.read_trailer(text)

    def read_trailer(self, line: str) -> bytes:
        """A trailer of an answer is dropped if it is not clear, or must not be one (RFC
        9110 6.5.1): browsers do not look at trailers."""
        self.trailers += 1
        raw = by_grammar("\r\n" + line + "\r\n", self.tolerant)  # of one field
        good = raw and not NOT_TO_SERVICE.match(raw)
        dropped = self.tolerant and line.count("\r") == line.count("\r\n")
        if self.trailers > FIELD_LIMIT or not (good or dropped):
            raise malformed("trailers break the grammar (RFC 9112, 7.1.2)")
        return raw[2:-2].encode("latin-1") if good else b""


def find_request_head(buffer: bytearray, searched: int) -> int:
    """Where the head in `buffer` ends; 0 while it is not whole. The first `searched`
    bytes have been searched before. Raises HTTPError when it cannot become a head."""
    end = buffer.find(b"\r\n\r\n", max(0, searched - 3)) + 4
    if end < 4 and BARE_LF.search(buffer, max(0, searched - 1)):
        raise malformed("a line of the head ends without CR")
    if len(buffer) > LINE_LIMIT:
        check_size(buffer, end if end > 3 else len(buffer))
    return end if end > 3 else 0


def find_answer_head(buffer: bytearray, searched: int) -> int:
    """The same for an answer, whose lines may end with LF."""
    match = END_OF_ANSWER_HEAD.search(buffer, max(0, searched - 2))
    end = match.end() if match else 0
    if len(buffer) > LINE_LIMIT:
        check_size(buffer, end or len(buffer))
    return end


def check_size(buffer: bytearray, size: int) -> None:
    """Raises HTTPError when a head of `size` bytes is too long, or a line of it."""
    if size > LINE_LIMIT and buffer.find(b"\n", 0, LINE_LIMIT + 2) < 0:
        raise HTTPError(414, "too-long", "a line of more than %d bytes" % LINE_LIMIT)
    if size >= HEAD_LIMIT:
        raise HTTPError(431, "too-long", "a head of more than %d bytes" % HEAD_LIMIT)


# -----------------------------------------------------------------------------------
# Names: which id and which service a host stands for. With --domain only names below
# one of the domains count, and names below localhost. Without it a name is read from
# the left, and the rest may be anything: the ids that are connected decide.
# -----------------------------------------------------------------------------------
ADDRESS = re.compile(r"\[.*\]|[0-9.]+")
DOMAIN = re.compile(r"(?:(https?)://)?([^/:]+?)\.?(?::([0-9]{1,5}))?/*")
# One of --domain. The port is None for the visitors' port, and 0 for the scheme's.
Domain = NamedTuple("Domain", [("scheme", str), ("name", str), ("port", Optional[int])])
# The public service sslip.io maps 8.8.8.8.sslip.io and 8-8-8-8.sslip.io, and all names
# below them, to that address. IPv6 always has dashes.
SSLIP = re.compile(
    r"(?:.*\.)?((?:\d+(?:\.\d+){3}|[\da-f]+(?:--?[\da-f]+){2,7})\.sslip\.io)"
)
SSLIP_HINT = " (by sslip.io; --domain gives the server names of its own)"


def parse_domains(text: str) -> List[Domain]:
    """The value of --domain. Raises ValueError, with what is wrong."""
    domains = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = DOMAIN.fullmatch(part.lower())
        scheme, name, digits = match.groups() if match else ("", "", "")
        port = int(digits or 0) or (0 if scheme else None)
        if not all(map(LABEL.fullmatch, name.split("."))) or (port or 0) >= 1 << 16:
            raise ValueError("%r is neither a domain nor its URL" % part)
        domains.append(Domain(scheme or "http", name, port))
    return domains


class Names:
    """Reads hosts and makes URLs. `ids` is the set of known ids."""

    def __init__(self, domains: List[Domain], ids: Any) -> None:
        self.domains, self.ids = domains, ids
        names = [domain.name for domain in domains] + ["localhost"]
        self.bases = sorted(names, key=len, reverse=True)  # one may be below another
        self.owners: Dict[str, Service] = {}  # of domains that are not ours
        self.granted: Dict[str, Set[str]] = {}  # such a domain, and the ids it is for
        self.scheme, self.port = "http", 0  # of the visitors' port, for the URLs
        self.no_passthrough = "this server has no port with TLS"  # "": it may be

    def find(self, name: str) -> Tuple[Optional[str], Optional[str]]:
        """(id, service), (id, None) or (None, None) for a host in lower case."""
        ids = self.may_have(name) if self.granted else None
        if ids:
            owner = self.owners.get(name) or self.owners.get(wildcard_of(name))
            if owner and owner.pool.id in ids:
                return owner.pool.id, owner.name
            return min(ids), name  # no service has a dot: a 503 or 404 of that id
        if name in self.bases or ADDRESS.fullmatch(name):
            return None, None
        if not self.domains:
            first, second = (name.split(".") + [""])[:2]
            service, dashes, id = first.partition("--")
            if dashes and id in self.ids:
                return id, service
            if second in self.ids:
                return second, first
            return (first, None) if first in self.ids else (None, None)
        for base in self.bases:
            if name.endswith("." + base):
                labels = name[: -len(base) - 1].replace("--", ".").split(".")
                if len(labels) <= 2:
                    return labels[-1], labels[0] if len(labels) == 2 else None
        return None, None

    def may_have(self, domain: str) -> Any:
        """The ids to which a domain is granted: by its name, or else by a wildcard."""
        return self.granted.get(domain) or self.granted.get(wildcard_of(domain), ())

    def is_base(self, name: str) -> bool:
        """Whether a host stands for the server itself, which then says how to begin."""
        return name in self.bases or bool(ADDRESS.fullmatch(name))

    def base(self, name: str) -> str:
        """A name by which a client can dial this server, as far as we know."""
        labels, mapped = name.split("."), SSLIP.fullmatch(name)
        if self.domains:
            return self.domains[0].name
        if self.is_base(name) or len(labels) < 3:
            return name
        if mapped:
            return mapped.group(1)
        return "localhost" if labels[-1] == "localhost" else ".".join(labels[-2:])

    def origin(self, host: str, came: str) -> str:
        """The URL, without a path, at which a visitor is that asked for `host` by the
        scheme `came`: that of the front before us, where --domain names it."""
        bare = host.lower().partition(":")[0]
        for scheme, name, port in self.domains:
            if port is not None and ("." + bare).endswith("." + name):
                return "%s://%s%s" % (scheme, bare, ":%d" % port if port else "")
        return "%s://%s" % (came, host.lower())

    def link(self, service: str, host: str, came: str) -> str:
        """The URL of a service, for the index page at `host`."""
        return self.origin(host, came).replace("://", "://%s." % service) + "/"

    def url(self, id: str, service: str, dialled: str) -> str:
        """Where a service is reached, or "error: ..." when the server has no name.
        `dialled` is the Host that its client used."""
        host = HOST.fullmatch(dialled)
        name = host.group(1).rstrip(".").lower() if host else ""
        scheme, name, port = self.domains[0] if self.domains else ("", name, None)
        if name in ("127.0.0.1", "[::1]"):
            name = "localhost"
        elif not name or ADDRESS.fullmatch(name):
            name = name_by_sslip(name, id)
        if not name:
            return "error: no name: the server wants --domain, or a name to dial"
        return self.make_url("%s.%s.%s" % (service, id, name), scheme, port)

    def is_mapped(self, url: str) -> bool:
        """Whether sslip.io makes this name, and not --domain."""
        return not self.domains and ".sslip.io" in url

    def make_url(self, host: str, scheme: str = "", port: Optional[int] = None) -> str:
        """Without a port it is that of the visitors, or of the front before us."""
        if port is None:
            scheme, port = self.scheme, self.port
        suffix = "" if port in (0, 80 if scheme == "http" else 443) else ":%d" % port
        return "%s://%s%s/" % (scheme, host, suffix)

    def own_url(self, host: str) -> str:
        """The URL of a whole host: a domain of a service's own, or a name of ours."""
        scheme, _, port = self.domains[0] if self.domains else ("", "", None)
        return self.make_url(host, scheme, port)


def name_by_sslip(address: str, id: str) -> str:
    """The name of a public address, below which the names of `id` may be; "" for any
    other address. A number at the end of the id would be read as a part of the address,
    if that had dots."""
    import ipaddress

    label = read_address(address.strip("[]"))
    if not label or not ipaddress.ip_address(label).is_global:
        return ""
    label = label.replace(":", "-")
    label = label.replace(".", "-") if id[-1:].isdigit() else label
    return label + ".sslip.io" if label.strip("-") == label else ""


def wildcard_of(name: str) -> str:
    """*.example.org for www.example.org: as in certificates, it stands for one label
    (RFC 6125 6.4.3)."""
    return "*." + name.partition(".")[2]


# -----------------------------------------------------------------------------------
# Registry: whose an id is, and what is published under it. A Pool is an id's link and
# its services. A Service is one entry of its list; it stays the same object while the
# lists say the same of it. A Tunnel is one client's link: it logs in, publishes, goes.
# -----------------------------------------------------------------------------------
# What a service may ask of us. A client does not publish one that asks for more.
OPTIONS = "auth domains host proxy_protocol tcp tls visitors".split()
LOGIN_TIME = 3.0  # seconds from our 101 to a whole LOGIN
SERVICES_LIMIT = 2000  # of a client: to make the URLs of more takes too long
LISTS_TIME = 0.2  # seconds between two lists of services that are looked at
TOLD = 20  # services of a list that the log names
TAKEOVER = 3.0  # seconds for the owner of an id to show that it lives, when it is asked


class Ends(NamedTuple):
    """The two ends of a connection from outside."""

    address: str  # of the visitor, or the client
    port: int
    to: str  # where it was reached
    to_port: int

    def of(self, address: str) -> "Ends":
        """The same for a visitor of whom a front says that this is the address."""
        if address == self.address:
            return self
        return self._replace(address=address, port=0)


class Service:
    """What a client publishes under one name, with the options that it has there. The
    object stays the same as long as the client's list says the same of it: a stream is
    used again for no other."""

    __slots__ = "pool name options tcp host domains passthrough tells_who gates".split()

    def __init__(self, pool: "Pool", name: str, options: Dict[str, Any]) -> None:
        """Raises ValueError for an option that has no such value."""
        self.pool, self.name, self.options = pool, name, options
        self.tcp = options.get("tcp")  # a port of ours; 0: any; True: CONNECT only
        self.host: Optional[str] = options.get("host")  # that the target gets to see
        self.domains = read_domains(options.get("domains", []))  # names of its own
        self.passthrough = "tls" in options  # visitors' TLS is for the target
        self.tells_who = "proxy_protocol" in options  # its target hears who comes
        self.gates = make_gates(options)
        if "tcp" in options and self.tcp is not True and not is_port(self.tcp):
            raise ValueError("tcp is a port of the server, 0 for a free one, or true")
        host = options.get("host", "x")
        if not isinstance(host, str) or not HOST.fullmatch(host):
            raise ValueError("host names a host")
        if options.get("tls", "passthrough") != "passthrough":
            raise ValueError('tls can be "passthrough"')

    def __str__(self) -> str:
        return "%s %s" % (self.pool.id, self.name)

    def wants_port(self) -> bool:
        return self.tcp is not None and self.tcp is not True

    def is_web(self) -> bool:
        return self.tcp is None and not self.passthrough

    def label(self) -> str:
        return "service %s of %s" % (self.name, self.pool.id)

    def begin(self, http: "HTTPConnection", request: Request) -> None:
        """As a destination: the request goes to the service, if it may."""
        http.service = self
        for gate in self.gates:
            gate.admit(request)
        if request.method == "CONNECT":
            Connect(http, request, self)
        elif self.passthrough:
            cause = "%s speaks TLS itself: ask for it by https" % self.label()
            raise HTTPError(421, "tls", cause)
        else:
            Exchange(http, request, self).ask()

    def carry_tcp(self, connection: Connection, ends: Ends) -> None:
        """What comes to a port of its own."""
        self.carry(connection, ends, "tcp")

    def carry(self, connection: Connection, ends: Ends, scheme: str) -> None:
        """A visitor's connection that is for this service alone, if it may: from here
        on bytes flow both ways."""
        log.info("%s: a connection from %s", self, ends.address)
        visitors = self.pool.tunnel.registry.visitors
        known = Outcome(ends.address, self.pool.id, self.name, scheme.upper())
        try:
            for gate in self.gates:
                gate.admit_address(ends.address)
            stream = self.pool.open(self, None, ends, scheme)
            pipe = Pipe(stream, connection, "%s %s" % (self, ends.address), "left")
            visitors.observe_pipe(pipe, known)
        except HTTPError as error:
            visitors.tell(known._replace(code=error.code, cause=error.cause))
            connection.abort()


class Pool:
    """The tunnel of an id, and its services by name."""

    __slots__ = ("id", "tunnel", "services")

    def __init__(self, id: str, tunnel: "Tunnel") -> None:
        self.id, self.tunnel = id, tunnel
        self.services: Dict[str, Service] = {}

    def open(
        self, service: Service, owner: Any, ends: Ends, scheme: str, **more: Any
    ) -> Stream:
        """A new stream to a service, for a visitor at one of the `ends`. Raises
        HTTPError when there can be none."""
        link = self.tunnel.link
        if link.draining or link.closed:
            raise HTTPError(503, "leaving", "the client of %s is leaving" % self.id)
        if len(link.streams) >= MAX_STREAMS or link.unread > UNREAD_LIMIT:
            raise HTTPError(503, "overload", "%s has too many requests" % self.id)
        if service.tells_who:
            more["port"], more["to_port"] = ends.port, ends.to_port
            more["to"] = plain_address(ends.to)
        message = {"service": service.name, "visitor": ends.address, "scheme": scheme}
        return link.open(owner, {**message, **more})

    def replace(self, services: Dict[str, Service]) -> None:
        """The client's new list. What it says again stays as it is."""
        old, self.services = self.services, services
        for name, service in services.items():
            if name in old and old[name].options == service.options:
                services[name] = old[name]


class Registry:
    """The ids and their pools. `tokens` is the watched file of --tokens, or None."""

    def __init__(
        self, names: Names, tokens: Optional["Watched"], tcp: "TCPPorts"
    ) -> None:
        self.loop, self.names, self.tokens, self.tcp = tcp.loop, names, tokens, tcp
        self.visitors = tcp.visitors
        self.pools: Dict[str, Pool] = {}
        self.noted: Set["Tunnel"] = set()  # whose clients want NOTE
        self.unauthenticated = Unauthenticated()
        self.refused: Dict[str, int] = {"refused": 0, "taken": 0}  # logins, by code
        self.note_ids()

    def note_ids(self) -> None:
        """Names are read by the ids that are known. With tokens these are known also
        while their clients are not connected."""
        names, grants = self.names, self.tokens.value if self.tokens else {}
        names.ids.clear()
        names.ids.update(self.pools, grants)
        names.granted.clear()
        for id, grant in grants.items():
            for domain in grant.domains:
                names.granted.setdefault(domain, set()).add(id)

    def service(self, id: Any, name: Any) -> Optional[Service]:
        pool = self.pools.get(id)
        return pool.services.get(name) if pool else None

    def claim(self, tunnel: "Tunnel") -> bool:
        """An id belongs to the session that has it, until its link goes or another one
        proves that it knows the token. False: the id is taken, and its owner has to
        show that it lives."""
        pool = self.pools.get(tunnel.id)
        if pool and pool.tunnel.session == tunnel.session:
            pool.tunnel.link.close("the same client dialled again")
        elif pool and pool.tunnel.yields_to(tunnel):
            cause = "another client logged in as %s" % tunnel.id
            pool.tunnel.evict("replaced", cause)
        elif pool:
            pool.tunnel.demand_life()
            return False
        self.unauthenticated.discard(tunnel.link.connection)
        self.pools[tunnel.id] = Pool(tunnel.id, tunnel)
        self.names.ids.add(tunnel.id)
        return True

    def release(self, tunnel: "Tunnel") -> None:
        """The link has gone, or the id is another's now."""
        pool = self.pools.get(tunnel.id)
        if pool and pool.tunnel is tunnel:
            del self.pools[tunnel.id]
            pool.replace({})
            self.drop_unused(pool)
            if not (self.tokens and tunnel.id in self.tokens.value):
                self.names.ids.discard(tunnel.id)

    def want_notes(self, tunnel: "Tunnel", wanted: bool) -> None:
        """Tell this client how requests end, or no longer. Where none asks nothing is
        observed."""
        observers = self.visitors.observers
        (self.noted.add if wanted else self.noted.discard)(tunnel)
        if bool(self.noted) != (self.note in observers):
            (observers.append if wanted else observers.remove)(self.note)

    def note(self, outcome: "Outcome") -> None:
        """An observer: tells the client that a request was for, if it asked."""
        pool = self.pools.get(outcome.id)
        tunnel = outcome.link.owner if outcome.link else pool and pool.tunnel
        if tunnel in self.noted:
            tunnel.note(outcome)

    def publish(self, tunnel: "Tunnel", listed: Dict[str, Any]) -> Dict[str, str]:
        """Take over a client's list of services; return name -> URL or error."""
        pool = self.pools.get(tunnel.id)
        if pool is None or pool.tunnel is not tunnel:
            return {}
        urls: Dict[str, str] = {}
        services: Dict[str, Service] = {}
        for name, options in listed.items():
            try:
                if len(urls) >= SERVICES_LIMIT:
                    raise ValueError("more than %d services" % SERVICES_LIMIT)
                if not LABEL.fullmatch(name.lower()):
                    raise ValueError("a service's name is a DNS label without --")
                if name.lower() in services:
                    raise ValueError("the name stands there twice")
                options = options if isinstance(options, dict) else {}
                services[name.lower()] = Service(pool, name.lower(), options)
                urls[name] = ""
            except ValueError as error:
                urls[name] = "error: %s" % error
        pool.replace(services)
        self.drop_unused(pool)  # what the old list had
        self.find_ways(tunnel, services, urls)
        self.drop_unused(pool)  # what a service got that then failed
        return urls

    def find_ways(self, tunnel: "Tunnel", services: Any, urls: Dict[str, str]) -> None:
        """Say where each service is reached. What cannot have its port or its domain is
        not published."""
        url, ports = self.names.url(tunnel.id, "%s", tunnel.host), 0
        found = [name for name, error in urls.items() if not error]
        found.sort(key=lambda name: services[name.lower()].tcp == 0)
        for name in found:  # "any free port" comes last
            service = services[name.lower()]
            ports += service.wants_port()
            try:
                if ports > TCP_LIMIT:  # to look for ports takes time
                    raise ValueError("an id has at most %d ports" % TCP_LIMIT)
                where = url.replace("%s", service.name)
                urls[name] = self.way_to(service, tunnel, where)
            except ValueError as error:
                del services[service.name]
                urls[name] = "error: %s" % error

    def way_to(self, service: Service, tunnel: "Tunnel", url: str) -> str:
        """Where visitors find a service whose name has this URL; what else it needs for
        that is made. Raises ValueError where it cannot be had."""
        names = self.names
        if service.passthrough and names.no_passthrough:
            raise ValueError(names.no_passthrough)
        urls = [url] + [self.claim_domain(service, x) for x in service.domains]
        base = names.base(read_host(tunnel.host))
        if service.wants_port():
            urls[0] = "tcp://%s:%d" % (base, self.tcp.give(service))
        elif service.tcp is True:
            host = url.partition("://")[2].partition(":")[0].rstrip("/")
            urls[0] = "tcp://%s by CONNECT to %s" % (host, names.own_url(base))
        return " ".join(urls) + (SSLIP_HINT if names.is_mapped(urls[0]) else "")

    def claim_domain(self, service: Service, domain: str) -> str:
        """The URL of a domain that is the service's from now on. Raises ValueError."""
        names, pool = self.names, service.pool
        if pool.id not in names.may_have(domain):
            cause = "the server's --tokens file does not grant %s to %s"
            raise ValueError(cause % (domain, pool.id))
        owner = names.owners.setdefault(domain, service)
        if owner is not service:
            raise ValueError("%s belongs to %s" % (domain, owner))
        return names.own_url(domain)

    def drop_unused(self, pool: Pool) -> None:
        """Ports and domains of services that are no longer there are free."""
        self.tcp.close_unused(pool)
        for domain, service in list(self.names.owners.items()):
            gone = pool.services.get(service.name) is not service
            if service.pool is pool and gone:
                del self.names.owners[domain]


class Tunnel:
    """One client's link, from our 101 on. `host` is the Host that was dialled."""

    def __init__(
        self, registry: Registry, connection: Connection, host: str, address: str
    ) -> None:
        self.registry, self.host = registry, host
        self.id = self.session = ""
        self.token, self.grant = "", None  # of our id, once it is proven
        self.checks = False  # the client looks whether all is well, and puts nobody off
        self.nonce = make_nonce()
        self.address, self.since = address, registry.loop.clock()
        self.peer = "client %s" % address
        self.link = Link(registry.loop, connection, self, "server")
        self.timer = Timer(registry.loop, self.link, self.on_late)
        self.timer.set(LOGIN_TIME)
        self.asked_at = 0.0  # when it last had to show that it lives
        self.life_timer = Timer(registry.loop, self.link, self.on_no_life)
        self.listed: Optional[Dict[str, Any]] = None  # the newest, not yet looked at
        self.urls: Dict[str, str] = {}  # of the services, as the client knows them
        self.dropped = 0  # outcomes that did not fit into a NOTE
        self.list_timer = Timer(registry.loop, self.link, self.on_services)
        message = {"version": VERSION, "nonce": self.nonce, "options": OPTIONS}
        self.link.send(Kind.CHALLENGE, {**message, "notes": True, "check": True})

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
        else:
            log.info("%s says goodbye: %s", self, peer_text(message.get("reason")))
            self.drop_kept()

    # Login.

    def on_login(self, message: Dict[str, Any]) -> None:
        id, session = peer_text(message.get("id")).lower(), message.get("session")
        if not LABEL.fullmatch(id):
            self.refuse("refused", "an id is a DNS label")
        elif id == "localhost":  # or tim.localhost would be its service tim
            self.refuse("refused", "localhost is no id")
        elif not isinstance(session, str) or not session:
            raise ProtocolError("LOGIN without a session")
        else:
            self.id, self.session = id, session
            self.authenticate(message)

    def authenticate(self, message: Dict[str, Any]) -> None:
        """Without --tokens anybody may ask for any id. With it the client has to prove
        that it knows the id's token; whether the token was wrong or the id unknown, it
        is told the same, after the same work."""
        welcome, tokens = {}, self.registry.tokens
        if tokens is not None:
            grant = tokens.value.get(self.id)
            token = grant.token if grant else None
            nonces = self.nonce, str(message.get("nonce"))
            proof = prove(token or self.nonce, "client", nonces, self.id)
            if "proof" not in message:
                return self.refuse("refused", "this server wants a token")
            if not is_proof(message["proof"], proof) or token is None:
                return self.refuse("refused", "no such id, or a wrong token")
            self.token, self.grant = token, grant
            welcome["proof"] = prove(token, "server", nonces, self.id)
        self.checks = message.get("check") is True
        if not self.registry.claim(self):
            owner = self.registry.pools[self.id].tunnel
            more: Any = {"urls": owner.urls} if self.checks else {}
            return self.refuse("taken", "the id %s is taken" % self.id, **more)
        self.timer.set(LOGIN_TIME)  # for its services
        self.link.send(Kind.WELCOME, welcome)
        if message.get("notes") is True:
            self.registry.want_notes(self, True)
        log.info("%s logged in from %s", self.id, self.peer)

    def refuse(self, code: str, cause: str, **more: Any) -> None:
        self.timer.clear()
        wanted, self.id = self.id, ""  # which it never was
        self.registry.refused[code] += 1
        log.info("%s as %s refused: %s", self.peer, wanted or "nobody", cause)
        self.link.goodbye(code, cause, **more)

    # The id is wanted by another client.

    def yields_to(self, newcomer: "Tunnel") -> bool:
        """A token takes the id over, and a check only borrows it. It takes none."""
        taken = bool(newcomer.token) or self.checks
        return taken and not newcomer.checks or self.link.draining

    def demand_life(self) -> None:
        """Any byte within TAKEOVER shows that the client is there."""
        if self.life_timer.due is None:
            self.asked_at = self.registry.loop.clock()
            self.life_timer.set(TAKEOVER)
            self.link.ping()

    def on_no_life(self) -> None:
        if self.link.heard <= self.asked_at:
            raise OSError("no sign of life when its id was asked for")

    def evict(self, code: str, cause: str) -> None:
        """The id is no longer ours; what runs may end."""
        self.registry.release(self)
        log.info("%s at %s: %s", self.id, self.peer, cause)
        self.link.goodbye(code, cause)
        self.drop_kept()

    # Services and streams.

    def on_services(self) -> None:
        """The whole list of the client's services; the answer is where they are. One
        that comes too soon after another waits, and the newest counts."""
        listed, self.listed = self.listed, None
        if listed is None:
            return
        self.list_timer.set(LISTS_TIME)
        urls = self.registry.publish(self, listed)
        refused = {name: x[7:] for name, x in urls.items() if x.startswith("error: ")}
        names = [name for name in urls if name not in refused]
        more = ", ... (%d)" % len(names) if len(names) > TOLD else ""
        log.info("%s serves %s%s", self, ", ".join(names[:TOLD]) or "nothing", more)
        for name, cause in itertools.islice(refused.items(), TOLD):
            log.info("%s does not serve %s: %s", self, name, cause)
        if len(pack_json(urls)) > TEXT_LIMIT - LOGIN_LIMIT:  # a GOODBYE has more to say
            urls = {"*": "error: too many services to tell where each is"}
        self.urls = urls
        self.link.send(Kind.URLS, urls)

    def note(self, outcome: "Outcome") -> None:
        """Tell the client how a request ended. While a NOTE waits for the link, the
        next outcomes join it, as many as fit."""
        link = self.link
        if link.closed or link.step < len(LOGIN_ORDER):
            return
        said = outcome._replace(id="").to_json()
        waiting = link.own_frames.get(Kind.NOTE)
        if self.dropped:
            said["dropped"] = self.dropped
        item = encoder.encode(said).encode()
        if waiting is None:
            link.post(Kind.NOTE, bytearray(b"[%s]" % item))
        elif len(waiting) + len(item) < TEXT_LIMIT:
            waiting[-1:] = b",%s]" % item
        else:
            self.dropped += 1
            return
        self.dropped = 0

    def drop_kept(self) -> None:
        """Streams between two requests would hold up the end of the link."""
        for stream in list(self.link.streams.values()):
            if isinstance(stream.owner, Kept):
                stream.owner.give_up()

    def free_descriptors(self) -> None:
        """The client has none left: streams of visitors who have left go first, then
        some that are between two requests."""
        owners = [stream.owner for stream in self.link.streams.values()]
        left = [x for x in owners if isinstance(x, Exchange) and x.is_left()]
        kept = [x for x in owners if isinstance(x, Kept)]
        for owner in left or kept[:KEPT_TO_DROP]:
            owner.give_up()

    def on_closed(self, cause: str) -> None:
        for timer in (self.timer, self.life_timer, self.list_timer):
            timer.clear()
        counts = self.link.last_id, self.link.resets
        log.info("%s: link closed: %s (%d streams, %d reset)", self, cause, *counts)
        self.registry.want_notes(self, False)
        self.registry.release(self)


# -----------------------------------------------------------------------------------
# HTTPConnection: a connection from outside, between two requests. It reads a head, asks
# its site where the request goes, and hands over: to an Exchange for a service, to a
# Link on the clients' port. A page of our own it answers itself.
# -----------------------------------------------------------------------------------
FIRST_BYTE_TIME = 30.0  # seconds for the first byte of a visitor's connection
HEAD_TIME = 10.0  # seconds from a head's first byte to its last, however it dribbles
IDLE_TIME = 60.0  # seconds that a connection is kept after an answer
KEPT_TIME = 1.0  # seconds a kept stream is good for a request that may not go twice
KEPT_TO_DROP = 8  # kept streams that go when a client has no descriptors left
RETRY_AFTER = "5"  # seconds: until then a client that can be back is back, mostly


class Page(NamedTuple):
    """An answer of our own. As a destination it is given at once."""

    status: int
    code: str  # for programs, in X-Tunnel-Error; "" where nothing is wrong
    title: str
    lines: List[str]
    fields: Any = ()
    file: bytes = b""  # what is sent as it is, in place of the lines
    kind: str = ""  # of the file; "": a text

    def begin(self, http: "HTTPConnection", request: Request) -> "Page":
        return self


class Visitor:
    """Owns a connection from outside that nobody has taken over yet. `give_up` it after
    `seconds`; or it goes where room is short, and when the server stops."""

    def __init__(
        self, visitors: "Visitors", connection: Connection, ends: Ends, seconds: float
    ) -> None:
        self.visitors, self.connection, self.ends = visitors, connection, ends
        self.loop = connection.loop
        self.timer = Timer(self.loop, self, self.on_late)
        self.timer.set(seconds)
        connection.owner = self
        self.loop.dirty.add(connection)
        visitors.add(self)

    def on_late(self) -> None:
        self.give_up()

    def give_up(self) -> None:
        """Nothing is left to say."""
        self.close(Ending.CLOSE)

    def close(self, ending: Ending) -> None:
        """Let go of everything; the connection ends by itself."""
        self.detach()
        self.connection.close_when_drained(ending)

    def detach(self) -> None:
        """The connection is somebody else's from here on, or its own."""
        self.timer.clear()
        self.visitors.discard(self)


class HTTPConnection(Visitor):
    """Owns `connection` until a request is handed over, and again after the answer."""

    def __init__(self, site: "Site", connection: Connection, ends: Ends) -> None:
        super().__init__(site.visitors, connection, ends, site.first_byte_time)
        self.site = site
        self.front = site.visitors.fronts.if_trusted(ends.address)
        self.unparsed = bytearray()  # read, and not yet understood
        self.searched = 0  # bytes of it in which no head's end was found
        self.request: Optional[Request] = None  # the one that is being answered
        self.service: Optional[Service] = None  # that answers it
        self.since = 0.0  # when its head was whole
        self.carried: Any = ()  # by which bytes of which stream: the end of an Outcome
        self.recent = Recent()
        self.kept: Optional[Kept] = None  # the stream of the last request

    def __str__(self) -> str:
        return "%s %s" % (self.site.kind, self.ends.address)

    def interest(self) -> int:
        return 0 if self.connection.backlog else READ

    def on_readable(self) -> None:
        if self.read_ahead() is not None:
            self.next()

    def read_ahead(self) -> Optional[int]:
        """Read what fits behind what is not understood yet; as read_into() does."""
        view = self.loop.scratch[: HEAD_LIMIT - len(self.unparsed)]
        count = self.connection.read_into(view)
        if count:
            self.unparsed += view[:count]
        return count

    def on_writable(self) -> None:
        self.next()

    def on_late(self) -> None:
        """Time is up for a head, for the next request, or for taking a page."""
        if self.connection.waiting():
            self.close(Ending.LINGER)  # it takes what is left, or is given up
        elif self.unparsed:
            raise HTTPError(408, "timeout", "no whole head within %d s" % HEAD_TIME)
        else:
            self.give_up()

    def next(self) -> None:
        """Begin the next request, if the last answer has gone and a head is here. This
        may be called once more after a 400, behind which nothing is read."""
        connection = self.connection
        ours = connection.phase == OPEN_PHASE and connection.owner is self
        if not ours or connection.backlog:
            return
        if self.unparsed.startswith(b"\r\n"):
            self.unparsed = bytearray(EMPTY_LINES.sub(b"", self.unparsed, 1))
        end = find_request_head(self.unparsed, self.searched)
        if end:
            head = bytes(self.unparsed[:end])
            del self.unparsed[:end]
            self.searched, self.service, self.since = 0, None, self.loop.clock()
            self.carried = ()
            self.timer.clear()
            hop = self.ends.address, self.site.scheme, self.recent, self.front
            self.request = Request(head, *hop)
            page = self.site.resolve(self.request).begin(self, self.request)
            if page is not None:
                self.respond(page)
        elif connection.eof or connection.send_error:
            self.give_up()
        elif self.unparsed:
            self.wait_for_head()

    def wait_for_head(self) -> None:
        """A part of a head is here. Dribbling does not prolong its time."""
        due = self.timer.due
        if due is None or due > self.loop.clock() + HEAD_TIME:
            self.timer.set(HEAD_TIME)
        if self.unparsed != b"\r":  # perhaps half of an empty line
            self.searched = len(self.unparsed)

    def respond(self, page: Page) -> None:
        """Answer with a page of our own."""
        request, keep = self.request, not self.visitors.stopping
        keep = keep and bool(request and request.keeps_alive() and request.body.done)
        if request and request.method == "CONNECT":
            keep = False  # what follows is for the target, and no request
        html = request is not None and request.wants_html()
        kind, body = page.kind or TEXT_KIND, page.file
        if not body:
            kind, body = make_page(page.title, page.lines, html)
        fields = [("Content-Type", kind), ("Content-Length", len(body))]
        fields += [("Cache-Control", "no-store"), *page.fields]
        fields += [("X-Tunnel-Error", page.code)] if page.code else []
        if not keep and "Connection" not in dict(page.fields):
            fields.append(("Connection", "close"))
        elif request and request.minor == 0:
            fields.append(("Connection", "keep-alive"))
        head = "HTTP/1.1 %d %s\r\n" % (page.status, phrase(page.status, page.title))
        head += "".join(["%s: %s\r\n" % pair for pair in fields]) + "\r\n"
        if request and request.method == "HEAD":
            body = b""
        self.connection.write(head.encode("latin-1", "replace") + body)
        if self.visitors.observers:
            cause = page.lines[0] if page.code else ""
            self.visitors.observe(self, page.status, page.code, cause, len(body))
        self.go_on(keep)

    def known(self) -> Tuple[str, str, str, str, str]:
        """What is known of the request: the beginning of an Outcome."""
        request, service = self.request, self.service
        id, name = (service.pool.id, service.name) if service else ("", "")
        if request is None:
            return self.ends.address, id, name, "", ""
        return request.address, id, name, request.method, request.target

    def fail(self, error: Exception) -> None:
        """What goes wrong between two requests is answered, unless the visitor cannot
        hear it."""
        if isinstance(error, TLSError):
            log.info("%s: %s", self, error)
            if error.plain:
                self.connection.stop_tls()
                error = HTTPError(400, "tls", "this port speaks TLS: https, or --tls")
        if not isinstance(error, OSError):
            self.respond(self.site.page(error, self.request))
            return
        if self.request and self.visitors.observers:
            self.visitors.observe(self, LEFT_STATUS, "left")
        self.give_up()

    def go_on(self, keep: bool) -> None:
        """An answer has been given: to the next request, or to the end. The next one
        always begins on a fresh stack."""
        self.connection.owner = self
        self.loop.dirty.add(self.connection)
        if not keep or self.visitors.stopping:
            plain = self.may_close_without_linger()
            self.close(Ending.CLOSE if plain else Ending.LINGER)
            return
        self.request = None
        self.visitors.idle[self] = None
        self.timer.set(IDLE_TIME)
        if self.unparsed or self.connection.eof:
            self.loop.soon(self, self.next)

    def may_close_without_linger(self) -> bool:
        """A plain close with bytes unread is a reset, which can overtake the answer. A
        visitor that said `close`, sent no body and of which nothing is unread sends no
        more: closing plainly is cheaper, and loses nothing. (Behind a body some send
        the end of a line; with TLS the visitor has a last word, too.)"""
        request, connection = self.request, self.connection
        if request is None or "close" not in request.connection or self.unparsed:
            return False
        if connection.transport.has_last_word or not request.body.untouched:
            return False
        return request.body.done and not connection.has_unread()

    def detach(self) -> None:
        super().detach()
        if self.kept:
            self.kept.give_up()


# -----------------------------------------------------------------------------------
# Exchange: one request to a service, and its answer. It owns the visitor's connection
# and the stream. What comes from the service stands in an inbox; advance() acts on it
# in order, and conclude() alone decides how the exchange ends:
#
#      the answer is whole, and taken              finish()    the stream is Kept
#      the service ended it too early, or is gone  refuse()    once more, or a 502
#      the same, behind the head of the answer     truncate()  the visitor is cut
#      the visitor has left                        give_up()   the stream is reset
#
# After a 101 a Pipe owns both. A kept stream saves the client a dial for the visitor's
# next request, and so more than half of what a small request costs.
# -----------------------------------------------------------------------------------
LEFT_TIME = 4.0  # seconds after a visitor's FIN in which nothing is written to it
LEFT_STATUS = 499  # in the log, as nginx has it: the visitor left before the answer
LEFT_LOOK = 0.5  # seconds between looks at a visitor that the selector is silent of
RESETS = {  # what the code of a RESET, or of a closed link, means to the visitor
    "no-service": 404,
    "timeout": 504,
    "busy": 503,
    "overload": 503,
    "gone": 503,
    "stopping": 503,
}


def reset_error(service: Service, code: str, cause: str) -> HTTPError:
    """What the RESET of a stream to a service means to the visitor."""
    word = re.sub("[^a-z-]", "", code)[:32] or "error"
    cause = "%s: %s" % (service.label(), cause or word)
    return HTTPError(RESETS.get(code, 502), word, cause)


class Kept:
    """Owns a stream between two requests. Whatever comes on it is unasked."""

    __slots__ = ("stream", "service", "address", "since")

    def __init__(self, stream: Stream, service: Service, address: str) -> None:
        self.stream, self.service, self.address = stream, service, address
        self.since = stream.link.loop.clock()
        stream.owner = self

    def serves(self, service: Service, request: Request) -> bool:
        """A stream may have died unseen. After KEPT_TIME it is for requests only that
        may go twice."""
        stream = self.stream
        if self.service is not service or not stream.open or stream.link.draining:
            return False
        if service.tells_who and self.address != request.address:
            return False  # a front brought another visitor on the same connection
        return stream.link.loop.clock() - self.since < KEPT_TIME or can_retry(request)

    def give_up(self) -> None:
        self.stream.reset("done")

    def pull(self, view: memoryview) -> None:
        pass

    def receive(self, data: memoryview) -> None:
        self.give_up()

    def on_end(self) -> None:
        self.give_up()

    def on_reset(self, code: str, cause: str) -> None:
        pass

    def fail(self, error: Exception) -> None:
        self.give_up()


def can_retry(request: Request) -> bool:
    """Whether a request may go to the service twice (RFC 9110 9.2.2)."""
    return request.is_safe() and request.body.done


class Exchange:
    """One request, from its head to the last byte of the answer."""

    __slots__ = (
        "http request service connection loop stream head inbox searched answer body "
        "keep reused retried later interim failure code sent received began "
        "quiet_since timer"
    ).split()

    def __init__(
        self, http: HTTPConnection, request: Request, service: Service
    ) -> None:
        self.http, self.request, self.service = http, request, service
        self.connection, self.loop = http.connection, http.loop
        self.head = request.to_service(service.host)  # what of it is still to be pulled
        self.inbox = bytearray()  # of the answer: what is not understood yet
        self.searched = 0  # bytes of it in which no head's end was found
        self.answer: Optional[Answer] = None  # its head, once the visitor gets it
        self.body: Any = None  # of the answer
        self.keep = False  # the visitor's connection, after this
        self.reused = self.retried = False  # a kept stream; asked for the second time
        self.later = False  # advance() goes on in the next turn
        self.interim = 0  # 1xx answers so far
        self.failure: Optional[Exception] = None  # why it cannot go on
        self.code = ""  # the same as a word
        self.sent = self.received = 0  # bytes of the bodies, to and from the visitor
        self.began = (0, 0)  # bytes that the stream had carried before, out and in
        self.quiet_since = 0.0  # since when it was not written to; 0: it just was
        self.timer: Optional[Timer] = None  # looks at a visitor who may have left

    def __str__(self) -> str:
        return str(self.service)

    # Asking.

    def ask(self) -> None:
        """Take the stream kept from the last request, or a new one; from here on both
        ends are ours. Raises HTTPError when there is no stream to be had."""
        http, kept = self.http, self.http.kept
        http.kept = None
        if kept and kept.serves(self.service, self.request):
            self.stream, self.reused = kept.stream, True
            self.stream.owner = self
            self.began = self.stream.bytes_out, self.stream.bytes_in
        else:
            if kept:
                kept.give_up()
            self.stream = self.open_stream()
        self.connection.owner = self
        http.visitors.idle.pop(http, None)
        self.loop.dirty.add(self.connection)
        self.stream.wake()

    def open_stream(self) -> Stream:
        """Raises HTTPError when there is none to be had."""
        request = self.request
        ends = self.http.ends.of(request.address)
        return self.service.pool.open(self.service, self, ends, request.scheme)

    def retry(self) -> bool:
        """Ask once more: a kept stream was reset before it answered, or the client had
        not even dialled. False when that may not be, or cannot."""
        stale = self.reused and can_retry(self.request)
        unseen = self.code in ("gone", "busy") and self.request.body.untouched
        pool = self.service.pool
        if self.code == "busy":
            pool.tunnel.free_descriptors()
        if self.retried or self.interim or self.inbox or not (stale or unseen):
            return False
        service = self.http.site.service(pool.id, self.service.name)
        if service is None or service is not self.service and service.gates:
            return False  # this visitor has not passed its gates
        self.service, self.retried, self.began = service, True, (0, 0)
        self.http.service = service
        self.stream = self.open_stream()
        self.head = self.request.to_service(service.host)
        self.failure, self.code = None, ""
        self.stream.wake()
        return True

    def pull(self, view: memoryview) -> Optional[int]:
        """The stream's turn: the head, then the body."""
        if not self.head:  # never 0, which is END: so the stream can be kept
            return None if self.request.body.done else self.pull_body(view)
        size = min(len(view), len(self.head))
        view[:size] = self.head[:size]
        self.head = self.head[size:]
        if not self.request.body.done:
            self.stream.wake()
        return size

    def pull_body(self, view: memoryview) -> Optional[int]:
        """The body, as far as its framing goes: first what was read already, then what
        the socket has, as one piece, for a chunk line may begin in the one and end in
        the other. What is not understood yet goes back."""
        body, unparsed = self.request.body, self.http.unparsed
        view = view[: body.read_limit]
        had = min(len(unparsed), len(view))
        view[:had] = unparsed[:had]
        count = self.connection.read_into(view[had:])
        total = had + (count or 0)
        good: int = body.feed(view[:total], self.loop.tired)
        unparsed[:had] = view[good:total]
        if count == 0 and not good:
            raise OSError("the visitor left in the middle of the request")
        if good and not body.done and (unparsed or total == len(view) or count == 0):
            self.wake_again()
        self.received += good
        return good or None

    def wake_again(self) -> None:
        """More of the body is here already, so no socket will announce it."""
        if self.loop.tired():
            self.loop.soon(self.stream, self.stream.wake)
        else:
            self.stream.wake()

    # The visitor's connection.

    def interest(self) -> int:
        """The body is read when its stream's turn comes; anything else is read ahead,
        so that a reset is seen."""
        stream = self.stream
        if stream.open and not self.request.body.done:
            if stream.queued:
                return 0
            if stream.wants_read():
                return READ
        return READ if len(self.http.unparsed) < HEAD_LIMIT else 0

    def on_readable(self) -> None:
        if not self.request.body.done and self.stream.wants_read():
            self.stream.wake()
            return
        count = self.http.read_ahead()
        if count == 0 or len(self.http.unparsed) == HEAD_LIMIT:
            self.watch()  # from here on the selector tells nothing of the visitor
        if count == 0:
            self.http.visitors.idle[self.http] = None  # it may go where room is short

    def on_writable(self) -> None:
        self.conclude()

    def watch(self) -> None:
        """Look at the visitor from time to time."""
        if self.timer is None:
            self.timer = Timer(self.loop, self, self.look)
            self.quiet_since = self.loop.clock()
            self.timer.set(LEFT_LOOK)

    def look(self) -> None:
        """A FIN may be a half-close, but mostly the visitor has left. If it has, what
        is written to it brings a reset; if nothing is, time tells."""
        now, connection = self.loop.clock(), self.connection
        if connection.waiting() or not self.quiet_since:
            self.quiet_since = now
        stalled = not self.stream.open and now - connection.progress_at > STALLED
        if connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.give_up()
        elif connection.waiting() and stalled:
            self.code = "overload"  # of what waits for it, too much for too long
            self.truncate()
        elif connection.eof and now - self.quiet_since >= LEFT_TIME:
            self.give_up()
        elif self.timer:
            self.timer.set(LEFT_LOOK)

    def is_left(self) -> bool:
        """Whether the visitor sends no more, and nothing waits for it."""
        return self.connection.eof and not self.connection.waiting()

    # Answering.

    def receive(self, data: memoryview) -> None:
        """Bytes from the service."""
        if self.answer and not self.inbox:
            data = data[self.pass_on(b"", data) :]  # no copy where none is needed
        self.inbox += data
        self.advance()

    def on_end(self) -> None:
        self.advance()

    def on_reset(self, code: str, cause: str) -> None:
        self.failure = reset_error(self.service, code, cause)
        self.code = self.failure.code
        self.advance()

    def fail(self, error: Exception) -> None:
        """Something raised while the stream or the visitor was served."""
        self.failure = error
        self.conclude()

    def advance(self) -> None:
        """Act on the inbox, in order: heads, then the body. When the turn has lasted
        long enough, the rest is for the next one; until then nothing is concluded."""
        if self.connection.owner is not self:
            return  # it is over
        self.later = False
        try:
            while self.inbox and self.answer is None:
                answer = self.read_head()
                if answer is None:
                    break
                if answer.status >= 200:
                    self.begin_answer(answer)
                elif answer.status == 101:
                    self.upgrade(answer)
                    return
                else:
                    self.pass_interim(answer)
            if self.inbox and self.answer and not self.body.done:
                count = self.pass_on(b"", memoryview(bytes(self.inbox)))
                del self.inbox[:count]
                if count and self.inbox and not self.body.done and self.loop.tired():
                    self.later = True
                    self.loop.soon(self, self.advance)
                    return
        except HTTPError as error:
            cause = "%s: %s" % (self.service.label(), error)
            self.failure = HTTPError(502, "broken", cause)
        self.conclude()

    def read_head(self) -> Optional[Answer]:
        """The next head in the inbox: any number of 1xx, then the answer's (RFC 9110
        15.2). None while it is not whole."""
        end = find_answer_head(self.inbox, self.searched)
        if not end:
            self.searched = len(self.inbox)
            return None
        answer = Answer(self.inbox[:end], self.request.method, self.http.recent)
        del self.inbox[:end]
        self.searched = 0
        return answer

    def pass_interim(self, answer: Answer) -> None:
        self.interim += 1
        if self.interim > INTERIM_LIMIT:
            raise malformed("more than %d interim answers" % INTERIM_LIMIT)
        if self.request.minor:
            self.connection.write(answer.to_visitor(""))
            self.quiet_since = 0.0

    def upgrade(self, answer: Answer) -> None:
        """From here on bytes flow both ways, and a Pipe owns both ends."""
        request, http = self.request, self.http
        whole = request.body.done and not self.head
        if not (whole and request.upgrade and answer.upgrade):
            raise malformed("it changed the protocol without being asked")
        self.connection.write(answer.to_visitor("") + bytes(self.inbox))
        self.end(101)
        http.detach()
        self.connection.unread = bytes(http.unparsed)
        pipe = Pipe(self.stream, self.connection, str(self), "left")
        http.visitors.observe_pipe(pipe, Outcome(*http.known()), len(self.inbox))

    def begin_answer(self, answer: Answer) -> None:
        """The head of the answer is whole. It goes out together with the beginning of
        the body; until then a fault is a 502."""
        request = self.request
        self.body = body = answer.frame(request.minor == 0)
        unwrapped = request.minor == 0 and isinstance(body, Chunked)
        ends = unwrapped or body.until_close
        keep = request.keeps_alive() and request.body.done and not ends
        self.keep = keep and not self.http.visitors.stopping
        connection = "" if self.keep else "close"
        if self.keep and request.minor == 0:
            connection = "keep-alive"
        head = answer.to_visitor(connection, unwrapped)
        count = self.pass_on(head, memoryview(bytes(self.inbox)))
        del self.inbox[:count]
        self.answer = answer

    def pass_on(self, head: bytes, data: memoryview) -> int:
        """Write `head`, and of the body in `data` what is understood, while there is
        time. Return how many bytes that was. What is well-formed goes on as it is."""
        count: int = self.body.feed(data, self.loop.tired)
        content = data[:count] if self.body.replaced is None else self.body.replaced
        self.sent += len(content)
        content = head + bytes(content) if head else content
        if content:
            self.connection.write(content)
        self.quiet_since = 0.0
        return count

    # How it ends.

    def conclude(self) -> None:
        """Is it over, and how? The only place that decides."""
        connection, stream, body = self.connection, self.stream, self.body
        if connection.owner is not self:
            return  # it was over before
        if self.answer and body.until_close and stream.ended_in:
            body.done = True
        if connection.send_error:
            self.give_up()
        elif self.later:
            pass  # what is here comes before how it ends
        elif self.answer and body.done and self.code != "overload":
            if connection.waiting():
                stream.acknowledge(len(self.inbox) + connection.waiting())
                self.watch()  # once the stream is closed, nothing else ends the wait
            else:
                self.finish()
        elif self.failure is None and not stream.ended_in:
            stream.acknowledge(len(self.inbox) + connection.waiting())
        elif self.answer:
            self.truncate()
        else:
            self.refuse()

    def finish(self) -> None:
        """The visitor has the whole answer. The stream is kept if everything was as it
        should be; bytes beyond the answer's framing belong to nobody."""
        answer, stream, http = self.answer, self.stream, self.http
        stream.acknowledge(0)
        usable = self.keep and stream.open and not (stream.ended_in or self.head)
        usable = usable and not (self.inbox or stream.link.draining)
        if usable and self.request.minor and answer and answer.keeps_alive():
            http.kept = Kept(stream, self.service, self.request.address)
        else:
            stream.reset("done")
        self.end(answer.status if answer else 0)
        http.go_on(self.keep and not self.inbox)

    def truncate(self) -> None:
        """What the visitor has got is all there is, and it must not look whole. What
        waits for it still goes out, unless just that is too much."""
        cause = str(self.failure or "the service closed too early")
        code = self.code or ("left" if isinstance(self.failure, OSError) else "cut")
        self.stream.reset("left")
        self.end(self.answer.status if self.answer else 0, code, cause)
        self.http.close(Ending.ABORT)
        if self.code == "overload":
            self.connection.abort()

    def refuse(self) -> None:
        """Nothing has gone to the visitor: ask once more, or say why."""
        if self.failure is None:
            self.code = "reset"
            cause = "the service closed the connection too early"
            self.failure = reset_error(self.service, "reset", cause)
        self.stream.reset("done" if self.stream.ended_in else "left")
        if self.code and self.retry():  # without one it was not the client's fault
            return
        failure = self.failure
        self.end()
        self.http.fail(failure)

    def give_up(self) -> None:
        """The visitor has left, or may go: nothing is left to say."""
        self.stream.reset("left")
        self.end(self.answer.status if self.answer else LEFT_STATUS, "left")
        self.http.detach()
        self.connection.close()

    def end(self, status: int = 0, code: str = "", cause: str = "") -> None:
        """The connection goes back. Without a status a page says the rest."""
        http, visitors = self.http, self.http.visitors
        self.connection.owner = http
        if self.timer:
            self.timer.clear()
        if visitors.observers:
            stream, (asked, answered) = self.stream, self.began
            request = asked, stream.bytes_out
            answer = answered, stream.bytes_in - len(self.inbox)
            http.carried = stream.id, request, answer, stream.link
            if status:
                visitors.observe(http, status, code, cause, self.sent, self.received)


# -----------------------------------------------------------------------------------
# Connect: a CONNECT request (RFC 9110 9.3.6). The visitor waits until the client says
# that the target is connected; then a Pipe owns both ends.
# -----------------------------------------------------------------------------------
CONNECT_TIME = 10.0  # seconds for the client's answer: it dials for 5 s


class Connect:
    """Owns both ends meanwhile. What the visitor says waits unread, 64 KiB at most."""

    __slots__ = ("http", "connection", "service", "stream", "timer")

    def __init__(
        self, http: HTTPConnection, request: Request, service: Service
    ) -> None:
        self.http, self.connection, self.service = http, http.connection, service
        if service.tcp is None:
            cause = "%s is not for CONNECT: it has no tcp" % service.label()
            raise HTTPError(403, "denied", cause)
        if not request.body.done:
            raise malformed("a body in a request to CONNECT")
        ends, open_stream = http.ends.of(request.address), service.pool.open
        self.stream = open_stream(service, self, ends, "tcp", confirm=True)
        self.connection.owner = self
        http.visitors.idle.pop(http, None)
        http.loop.dirty.add(self.connection)
        self.timer = Timer(http.loop, self, self.on_late)
        self.timer.set(CONNECT_TIME)

    def __str__(self) -> str:
        return str(self.service)

    def interest(self) -> int:
        return READ if len(self.http.unparsed) < HEAD_LIMIT else 0

    def on_readable(self) -> None:
        """It may speak, or end, before it has its answer."""
        if self.http.read_ahead() == 0:
            self.http.visitors.idle[self.http] = None  # it may go where room is short

    def on_writable(self) -> None:
        pass

    def on_late(self) -> None:
        cause = "%s: its client does not answer" % self.service.label()
        raise HTTPError(504, "timeout", cause)

    def on_connected(self) -> None:
        http, connection = self.http, self.connection
        self.timer.clear()
        connection.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        if http.visitors.observers:
            http.visitors.observe(http, 200)
        http.detach()
        connection.unread = bytes(http.unparsed)
        pipe = Pipe(self.stream, connection, str(self), "left")
        http.visitors.observe_pipe(pipe, Outcome(*http.known()))

    def pull(self, view: memoryview) -> None:
        pass

    def receive(self, data: memoryview) -> None:
        cause = "%s: its client went on before it was connected" % self.service.label()
        self.fail(HTTPError(502, "broken", cause))

    def on_end(self) -> None:
        self.receive(NO_DATA)

    def on_reset(self, code: str, cause: str) -> None:
        self.fail(reset_error(self.service, code, cause))

    def fail(self, error: Exception) -> None:
        """There is no target, or no visitor any more."""
        self.timer.clear()
        self.stream.reset("left")
        self.connection.owner = self.http
        self.http.carried = self.stream.id, (0, 0), (0, 0), self.stream.link
        self.http.fail(error)

    def give_up(self) -> None:
        self.fail(OSError("the visitor has to go"))


# -----------------------------------------------------------------------------------
# Server: what each port serves, and how it all stops. A Site says where a request goes
# that came to a port: resolve() gives a destination, whose begin() takes the request
# over, or returns a page of our own.
# -----------------------------------------------------------------------------------
LAST_WORDS = 0.5  # seconds after --drain for what was said last: it is less than one
DRAIN_LOOK = 0.05  # seconds between looks at whether they have ended


class Router:
    """Decides where a request goes, and whether it may. Subclass it and hand it to
    Server(router=...) or main(router=...). Hooks are asked for every request, inside
    the loop: they must not block. One that raises costs its request a 500, and nothing
    else."""

    names: Names  # how the server reads hosts; the server sets it

    def route(self, request: Request) -> Any:
        """(id, service), (id, None) for the id's index page, (None, None) or None for a
        404. By default the host decides."""
        return self.names.find(request.name)

    def authorize(self, request: Request) -> Any:
        """None lets the request pass; (status, fields) answers it, for example
        (401, {"WWW-Authenticate": 'Basic realm="tunnel"'})."""
        return None


class Site:
    """What a port serves, by HTTP. This one: the visitors' requests, by their Host."""

    kind = "visitor"

    def __init__(self, server: "Server", scheme: str) -> None:
        self.server, self.scheme = server, scheme
        self.registry, self.visitors = server.registry, server.visitors
        self.service = server.registry.service
        self.first_byte_time = FIRST_BYTE_TIME

    def serve(self, connection: Connection, ends: Ends) -> None:
        HTTPConnection(self, connection, ends)

    def resolve(self, request: Request) -> Any:
        """Service, or a page. Raises HTTPError, or whatever a hook raises."""
        router = self.server.router
        route, denied = router.route(request), router.authorize(request)
        if denied is not None:
            raise self.denial(*denied)
        id, name = route or (None, None)
        return self.service(id, name) or self.page_for(request, id, name)

    def find_passthrough(self, name: str) -> Optional[Service]:
        """The service to which a visitor by TLS goes without our reading it."""
        service = self.service(*self.registry.names.find(name))
        return service if service and service.passthrough else None

    def denial(self, status: Any, fields: Any) -> HTTPError:
        """What authorize() wants to be said."""
        pairs = [(str(name), str(value)) for name, value in dict(fields).items()]
        if LINE_BREAK.search("".join(map("".join, pairs))):
            raise ValueError("authorize() gave a field with a line break")
        cause = "a password is needed" if status == 401 else "not allowed"
        return HTTPError(int(status), "denied", cause, pairs)

    def page_for(self, request: Request, id: Any, name: Any) -> Page:
        """The index of an id, the landing page, or a 404 that says what is missing."""
        names, pool = self.registry.names, self.registry.pools.get(id)
        root = request.method in ("GET", "HEAD") and request.target == "/"
        if id is None and names.is_base(request.name):
            page = self.server.landing.find(self, request)
            if page:
                return page
        if pool and name:
            raise HTTPError(404, "no-service", "%s has no service %s" % (id, name))
        if pool and root:
            return self.index(request, pool)
        if pool:
            raise HTTPError(404, "no-page", "the index of %s is at /" % id)
        if id in names.ids:
            cause = "the client of %s is not connected now" % id
            raise HTTPError(503, "offline", cause, [("Retry-After", RETRY_AFTER)])
        cause = "nobody is connected as %s" % id if id else "no client serves "
        raise HTTPError(404, "no-name", cause if id else cause + request.name)

    def index(self, request: Request, pool: Pool) -> Page:
        link = self.registry.names.link
        names = sorted(x.name for x in pool.services.values() if x.is_web())
        shown = names[:INDEX_LIMIT]
        lines = [link(name, request.host, request.scheme) for name in shown]
        if len(names) > INDEX_LIMIT:
            lines.append("... and %d more." % (len(names) - INDEX_LIMIT))
        return Page(200, "", "Services of %s" % pool.id, lines or ["None yet."])

    def has_own_tls(self, request: Request) -> bool:
        """Whether the visitor sees a certificate of ours, and not that of a front."""
        origin = self.registry.names.origin(request.host, request.scheme)
        return self.scheme == "https" and origin == "https://" + request.host.lower()

    def way_in(self, request: Request) -> str:
        """The options with which a client dials this server."""
        names, port = self.registry.names, self.server.client_address[1]
        name = request.name if names.is_base(request.name) else names.base(request.name)
        if self.server.client_tls:
            url = "https://%s%s" % (name, ":%d" % port if port != 443 else "")
            return "-h " + quoted(url) + self.server.certificates.option(name)
        return "-h " + quoted(name) + (" -p %d" % port if port != 8001 else "")

    def page(self, error: Exception, request: Optional[Request]) -> Page:
        """What an error says to the visitor."""
        if not isinstance(error, HTTPError):
            error = HTTPError(500, "error", "the server made a mistake; its log has it")
        lines = [error.cause]
        if error.status == 404 and request:
            lines += self.server.landing.how_to(self, request)
        title = "%d %s" % (error.status, phrase(error.status, error.code))
        return Page(error.status, error.code, title, lines, error.fields)


class RedirectSite(Site):
    """Sends visitors to the same place by TLS (RFC 9110 15.4.9)."""

    def resolve(self, request: Request) -> Any:
        if request.scheme == "https" or request.method == "CONNECT":
            return super().resolve(request)  # by TLS to a front, or none that follows
        port = self.registry.names.port
        host = request.name + (":%d" % port if port != 443 else "")
        path = request.target if request.target.startswith("/") else "/"
        where = "https://%s%s" % (host, path)
        return Page(308, "", "Only by https", [where], [("Location", where)])


class LinkSite(Site):
    """The clients' port: one path, where a connection becomes a link."""

    kind = "client"

    def __init__(self, server: "Server", scheme: str) -> None:
        super().__init__(server, scheme)
        self.first_byte_time = HEAD_TIME

    def find_passthrough(self, name: str) -> Optional[Service]:
        return None

    def serve(self, connection: Connection, ends: Ends) -> None:
        super().serve(connection, ends)
        self.registry.unauthenticated.admit(connection, ends.address)

    def resolve(self, request: Request) -> Any:
        if request.target.partition("?")[0] != LINK_PATH:
            raise HTTPError(404, "client-port", "clients dial this port, not visitors")
        if request.upgrade.lower() != PROTOCOL:
            cause = "this port speaks %s" % PROTOCOL
            if not request.upgrade:
                cause += "; the request to upgrade is missing, so a proxy in between"
                cause += " dropped it: let it pass on Upgrade and Connection"
            fields = [("Upgrade", PROTOCOL), ("Connection", "Upgrade")]
            raise HTTPError(426, "version", cause, fields)
        if not request.body.done:
            raise malformed("a body in a request for a link")
        return self

    def begin(self, http: HTTPConnection, request: Request) -> None:
        """RFC 9110 7.8: go over to our protocol. What follows the head is frames."""
        connection, address = http.connection, request.address
        http.detach()
        self.registry.unauthenticated.admit(connection, address)
        lines = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s"
        connection.write((lines % PROTOCOL + "\r\n\r\n").encode())
        connection.unread = bytes(http.unparsed)
        Tunnel(self.registry, connection, request.host, address)


class SharedSite(Site):
    """Visitors and clients on one port: one path is the clients'."""

    def __init__(self, server: "Server", scheme: str) -> None:
        super().__init__(server, scheme)
        self.links = LinkSite(server, scheme)

    def resolve(self, request: Request) -> Any:
        if request.target.partition("?")[0] == LINK_PATH:
            return self.links.resolve(request)
        return super().resolve(request)

    def way_in(self, request: Request) -> str:
        """By the way on which the visitor came, also through a front."""
        names = self.registry.names
        if not names.is_base(request.name):
            return super().way_in(request)
        way = "-h " + quoted(names.origin(request.host, request.scheme))
        if self.has_own_tls(request):
            way += self.server.certificates.option(request.name)
        return way


class Server:
    """Listens from the start; run() serves until stop(). Port 0 takes a free port: see
    `visitor_address` and `client_address`, (host, port) each. Raises OSError when it
    cannot listen, ValueError for what is wrong in the configuration or in a file."""

    until = 0.0  # when what we wait for, stopping, has had its time
    said_goodbye = False

    def __init__(
        self,
        config: Optional["Config"] = None,
        router: Optional[Router] = None,
        loop: Optional[Loop] = None,
    ) -> None:
        config = config or Config()
        names = Names(parse_domains(config.domain), set())
        fronts = Fronts(config.trust_proxy, config.proxy_protocol)
        plan = plan_ports(config)
        tokens = config.tokens
        self.tokens = open_file([tokens], parse_tokens) if tokens is not None else None
        self.tls = open_tls(config.tls_cert, config.tls_key)
        self.certificates = Certificates(self.tls, config.tls_dir)
        self.landing = Landing(config.landing, tokens is not None)
        addresses = [(config.bind, number) for number, *_ in plan]
        socks = listen_all(addresses + [config.admin] * bool(config.admin))
        self.loop = loop or Loop()
        self.visitors = Visitors(self.loop, fronts)
        self.tcp = TCPPorts(self.visitors, config.bind, config.tcp_ports)
        self.registry = Registry(names, self.tokens, self.tcp)
        if log.hears(INFO):
            self.visitors.observers.append(Outcome.tell)
        self.router = router or Router()
        self.router.names = names
        self.manager = Manager(self.loop, self.status)
        self.drain_time = config.drain
        self.timer = Timer(self.loop, self, self.drain)
        self.look_timer = Timer(self.loop, self, self.look)
        self.ports = [
            self.make_port(sock, kind, tls) for sock, (_, kind, tls) in zip(socks, plan)
        ]
        self.note_addresses(names, plan)
        self.admin = AdminSite(self, socks[-1], config.admin) if config.admin else None
        self.watch_files()

    def __str__(self) -> str:
        return "server"

    def status(self) -> str:
        return "%d ids are connected" % len(self.registry.pools)

    def make_port(self, sock: Any, kind: Any, tls: bool) -> "Port":
        site = kind(self, "https" if tls else "http")
        serves = TLSPort(site, self.certificates) if tls else site
        return Port(sock, self.visitors, serves.serve)

    def note_addresses(self, names: Names, plan: List[Tuple[int, Any, bool]]) -> None:
        """Port 0 has become a real one."""
        by_tls = [port for port, (_, kind, tls) in zip(self.ports, plan)
                  if tls and kind is not LinkSite]  # fmt: skip
        self.visitor_address = self.ports[0].address
        self.client_address = self.ports[-1].address
        self.client_tls = plan[-1][2]
        self.tls_address = by_tls[0].address if by_tls else None
        names.port = (self.tls_address or self.visitor_address)[1]
        names.scheme = "https" if by_tls else "http"
        if by_tls:  # a client could take the name by which the others dial
            shared = any(kind is SharedSite for _, kind, _ in plan)
            need = "TLS passes through a port that clients share only with --domain"
            names.no_passthrough = need if shared and not names.domains else ""

    def run(self) -> None:
        """Serve until stop(), or on_signal(), and what follows from it is done."""
        ports = self.visitor_address[1], self.client_address[1]
        log.info("visitors on port %d, clients on port %d", *ports)
        if self.tls_address:
            log.info("visitors by TLS on port %d", self.tls_address[1])
        if self.admin:
            self.admin.tell()
        self.manager.ready()
        self.loop.run()
        self.close()

    def close(self) -> None:
        """Let go of everything at once; what is cut does not look whole."""
        for port in self.ports:
            port.close()
        self.tcp.close_unused()
        if self.admin:
            self.admin.close()
        self.close_links()
        self.manager.close()
        self.loop.close()

    def close_links(self) -> None:
        for pool in list(self.registry.pools.values()):
            link, cause = pool.tunnel.link, "the server is stopping"
            link.goodbye("stopping", cause)
            link.flush()
            link.close(cause, "stopping")

    def fail(self, error: Exception) -> None:
        log.error("server: %s", error)

    # Files that change while it runs.

    def watch_files(self) -> None:
        self.files = [file for file in (self.tokens, self.tls) if file]
        for file in self.files:
            forbid_core_dumps()
            self.on_new_file(file)
            self.look_timer.set(LOOK_TIME)

    def look(self) -> None:
        """Has a file changed? TLS that runs goes on with the certificate that it began
        with."""
        self.look_timer.set(LOOK_TIME)
        self.read_files(False)

    def read_files(self, asked: bool) -> None:
        for file in self.files:
            if file.look(asked):
                log.info("changed: %s", file)
                self.on_new_file(file)

    def reload(self) -> None:
        """SIGHUP: look at every file now. What is broken is told again."""
        with self.manager.reloading():
            log.info("reading all files again")
            self.read_files(True)
            self.certificates.read_again()

    def on_new_file(self, file: "Watched") -> None:
        """What follows from it; its last path leads to secrets."""
        warn_of_readers(file.paths[-1:])
        if file is self.tokens:
            self.registry.note_ids()
            self.close_invalid_links(file.value)
        elif file.contents and log.hears(INFO):
            with contextlib.suppress(ValueError):
                log.info("certificate: SHA256 %s", fingerprint(file.contents[0]))

    def close_invalid_links(self, grants: Dict[str, "Grant"]) -> None:
        """An id whose token has gone or changed is free. One that is granted other
        domains has to publish anew; what runs may end."""
        for link in list(self.loop.links):  # also those that were replaced
            tunnel, grant = link.owner, grants.get(link.owner.id)
            if tunnel.token and (grant is None or tunnel.token != grant.token):
                cause = "the token of %s is no longer valid" % tunnel.id
                tunnel.evict("refused", cause)
                link.flush()
                link.close("its token has changed")
            elif tunnel.token and grant != tunnel.grant:
                tunnel.evict("stopping", "the domains of %s have changed" % tunnel.id)

    # Stopping.

    def on_signal(self, number: int) -> None:
        """SIGTERM lets what runs end; SIGINT, or a second signal, does not."""
        if number == HANGUP:
            self.reload()
        elif self.visitors.stopping or number == signal.SIGINT:
            log.info("stopping at once")
            self.loop.running = False
        else:
            self.stop()

    def stop(self) -> None:
        """Accept no more, let what runs go on for --drain, then close the links."""
        log.info("stopping")
        self.manager.stopping(self.drain_time)
        self.visitors.stopping = True
        self.until = self.loop.clock() + self.drain_time
        for port in self.ports:
            port.close()
        self.tcp.close_unused()
        for http in list(self.visitors.all):
            if http.connection.owner is http:  # between two requests
                http.close(Ending.LINGER)
        self.drain()

    def drain(self) -> None:
        """Is there anything still to wait for?"""
        self.timer.set(DRAIN_LOOK)
        late = self.loop.clock() >= self.until
        if not self.said_goodbye and (late or not self.visitors.all):
            self.said_goodbye = True
            self.until = self.loop.clock() + LAST_WORDS
            if self.admin:
                self.admin.close()
            self.close_links()
        elif self.said_goodbye and (late or not self.loop.connections):
            self.loop.running = False


# ###################################################################################
# PART TWO: THE ARMOUR. What keeps it up: TLS, files, fields, overload, rights, options.
# ###################################################################################

# ===================================================================================
# SHARED BLOCK 2: begins. The same lines stand in both scripts; a test compares them.
# ===================================================================================
# -----------------------------------------------------------------------------------
# Secrets: each side proves that it knows the token of an id. A proof is HMAC-SHA256
# (RFC 2104) with the token as its key, over the role of the speaker, the nonces of both
# sides and the id. Nonces are new for every link, so a proof is good for one link only,
# and tells nothing of the token.
# -----------------------------------------------------------------------------------
NONCE = re.compile("[0-9a-f]{64}")  # 32 bytes: as many as a proof has
TOKEN_LIMIT = 4 << 10  # bytes: a longer one is probably the wrong file


def make_nonce() -> str:
    return os.urandom(32).hex()


def prove(token: str, role: str, nonces: Tuple[str, str], id: str) -> str:
    """The proof of `role`, "server" or "client". `nonces` are the server's and the
    client's. Raises ProtocolError for a bad one."""
    import hashlib
    import hmac

    if not all(NONCE.fullmatch(nonce) for nonce in nonces):
        raise ProtocolError("a nonce is 64 hexadecimal digits")
    said = "\n".join((PROTOCOL, role) + nonces + (id,)).encode()
    return hmac.new(token.encode(), said, hashlib.sha256).hexdigest()


def is_proof(said: Any, proof: str) -> bool:
    """Compare in constant time: how long it takes tells nothing of the proof."""
    import hmac

    return hmac.compare_digest(str(said).encode("utf-8", "replace"), proof.encode())


def check_token(token: Any) -> str:
    """Return the token. Raises ValueError, whose text does not hold the token."""
    if not isinstance(token, str) or not token.strip():
        raise ValueError("a token is a text, and not empty")
    if len(token) > TOKEN_LIMIT or not all(" " <= letter <= "~" for letter in token):
        raise ValueError("a token is a line of ASCII, at most %d bytes" % TOKEN_LIMIT)
    return token


# -----------------------------------------------------------------------------------
# TLS: a transport over another one, by two buffers in memory. So neither the handshake
# nor encryption ever waits for a socket, and TLS can stand over TLS (through a proxy).
# -----------------------------------------------------------------------------------
HANDSHAKE_TIME = 5.0  # seconds
SEALED = 64 << 10  # bytes of one read or write: OpenSSL keeps so much per connection
READS = 8  # of SEALED bytes in one turn
CONTENT_PART = 32  # bytes of ciphertext that may come for each byte of plaintext
FRUITLESS = 64 << 10  # bytes past that part that are accepted (KeyUpdate floods): to
# agree on new keys costs us more than the peer
REPLIES = 16 << 10  # bytes of replies to KeyUpdate that may wait for the peer


class TLSError(OSError):
    """TLS failed, or the peer's certificate is not the expected one."""

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


class Sealed:
    """TLS over the transport `under`. The server's certificate must be for the host
    `name`, and its SHA-256 `pin`."""

    __slots__ = (
        "ssl loop under incoming outgoing object pin buffer ready more ending ended "
        "pending failed waste replies"
    ).split()
    has_last_word = True

    def __init__(
        self, loop: Loop, under: Any, context: Any, server: bool, name: Any, pin: bytes
    ) -> None:
        import ssl

        self.ssl, self.loop, self.under, self.pin = ssl, loop, under, pin
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self.incoming, self.outgoing, server, name)
        shared = isinstance(under, Plain)  # else `under` decrypts into this buffer
        self.buffer = loop.sealed if shared else memoryview(bytearray(SEALED))
        self.ready = False  # the handshake is done
        self.more = not server  # plaintext, or our first words: no selector tells
        self.ending = False  # close_notify is to be said
        self.ended = False  # it is said: `under` is to be shut down behind it
        self.pending = b""  # ciphertext that `under` has not taken
        self.failed: Optional[OSError] = None  # told once what came before is read
        self.waste = 0  # bytes of ciphertext of late, less those that plaintext needs
        self.replies = 0  # bytes of our own that wait for the peer

    @property
    def unsent(self) -> int:
        return len(self.pending) + int(self.under.unsent)

    # Handshake.

    def shake_hands(self) -> bool:
        """Go on with the handshake; True when it is done. Raises TLSError."""
        if self.ready or not self.under.shake_hands():
            return self.ready
        self.more = False
        self.fill()
        try:
            self.object.do_handshake()
        except self.ssl.SSLWantReadError:
            return False
        except (self.ssl.SSLError, self.ssl.CertificateError) as error:
            raise TLSError(error) from None
        finally:
            self.pending += self.outgoing.read()  # also why we do not want to go on
            self.flush()
        if self.pin:
            self.check_pin()
        self.ready = self.more = True
        return True

    def check_pin(self) -> None:
        import hashlib
        import hmac

        found = hashlib.sha256(self.object.getpeercert(True))
        if not hmac.compare_digest(found.digest(), self.pin):
            pairs = ":".join("%02X" % x for x in found.digest())  # as openssl has it
            seen = "the certificate has another fingerprint, %s" % pairs
            raise TLSError(ValueError(seen))

    # Reading.

    def recv_into(self, view: memoryview) -> int:
        """As a socket's. An error waits until the plaintext before it has been read."""
        if self.failed:
            raise self.failed
        count = came = reads = 0
        got: Optional[int] = None
        self.more = False
        try:
            while count < len(view):
                got = self.decrypt(view[count:])
                if got:
                    count += got
                elif got == 0 or reads == READS or count < came // 2:
                    break  # tiny records, or none, must not hold the loop
                else:
                    part = self.fill()
                    came += part
                    reads = reads + 1 if part == SEALED else READS  # no more below
            self.more = count == len(view) or got == 0 < count
            self.reply()
        except OSError as error:
            if not count:
                raise
            self.failed, self.more = error, True
        if not count and got is None:
            raise BlockingIOError
        if self.ending and not self.more:
            self.say_close()
        return count

    def decrypt(self, view: memoryview) -> Optional[int]:
        """Bytes of plaintext, 0 at the end, None when more has to come."""
        try:
            count: int = self.object.read(len(view), view)
            self.waste = max(0, self.waste - count * CONTENT_PART)
            return count
        except self.ssl.SSLWantReadError:
            return None
        except self.ssl.SSLZeroReturnError:
            return 0
        except self.ssl.SSLError as error:
            raise TLSError(error) from None

    def fill(self) -> int:
        """Read ciphertext; return its length, 0 when there is none now. EOF without
        close_notify may be a truncation attack (RFC 8446 6.1), so it is an error."""
        if self.waste > FRUITLESS:
            raise TLSError(ValueError("much was sent, and nothing was in it"))
        if self.ending:
            self.say_close()
        try:
            count: int = self.under.recv_into(self.buffer)
        except BlockingIOError:
            return 0
        if count == 0:
            raise OSError("the other side closed the connection, and not by TLS")
        self.incoming.write(self.buffer[:count])
        if self.ready:
            self.waste += count
        return count

    def reply(self) -> None:
        """Send TLS's own replies (to KeyUpdate), unless the peer does not read them."""
        said = self.outgoing.read()
        if said:
            self.replies = self.replies + len(said) if self.unsent else 0
            if self.replies > REPLIES:
                raise TLSError(ValueError("it asks for new keys, and does not read"))
            self.pending += said
            self.flush()

    # Sending.

    def send(self, data: Any) -> int:
        """Encrypt what the transport below takes at once, and SEALED bytes more."""
        view, taken = memoryview(data), 0
        while taken < len(view) and self.ready and self.flush():
            part = view[taken : taken + SEALED]
            taken += len(part)
            while part:
                part = part[self.object.write(part) :]
            self.pending = self.outgoing.read()
        if not taken:
            raise BlockingIOError
        self.flush()
        return taken

    def flush(self) -> bool:
        """Send ciphertext; True when all of it has gone."""
        while self.pending:
            try:
                self.pending = self.pending[self.under.send(self.pending) :]
            except BlockingIOError:
                return False
        if not self.under.flush():
            return False
        if self.ended:
            self.ended = False
            self.under.shutdown()
        return True

    def shutdown(self) -> None:
        """Say that we send no more: at the next read, if plaintext is left, which
        OpenSSL would lose."""
        self.ending = True
        if not self.more:
            self.say_close()

    def say_close(self) -> None:
        """close_notify (RFC 8446 6.1), and then the end of the transport below."""
        self.ending, self.ended = False, True
        if self.ready:
            with contextlib.suppress(self.ssl.SSLError, ValueError):
                self.object.unwrap()
        self.pending += self.outgoing.read()
        self.flush()

    def forget(self) -> None:
        """Nothing can be sent any more."""
        self.pending = b""
        self.under.forget()


# -----------------------------------------------------------------------------------
# Files that are watched: a change of the configuration needs no restart.
# -----------------------------------------------------------------------------------
LOOK_TIME = 1.0  # seconds between looks: a change counts within two
FILE_LIMIT = 16 << 20  # bytes: a longer one is probably the wrong file


class Pairs(List[Tuple[str, Any]]):
    """A JSON object with all its keys, also those that stand there twice."""


def parse_object(data: bytes) -> Pairs:
    """The JSON object that a file holds. Raises ValueError."""
    try:
        pairs = json.loads(data.decode("utf-8-sig"), object_pairs_hook=Pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON: %s" % error) from None
    if not isinstance(pairs, Pairs):
        raise ValueError('not an object like {"name": ...}')
    return pairs


def read_file(path: str) -> bytes:
    """Read a regular file: a pipe could block for ever. Raises OSError, ValueError."""
    now = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, how: os.open(name, how | now)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > FILE_LIMIT:
            raise ValueError("no regular file of at most %d bytes" % FILE_LIMIT)
        return file.read(FILE_LIMIT)


def listed(paths: List[str]) -> str:
    """The names of some files. A certificate and its key may be the same file."""
    return " and ".join(dict.fromkeys(paths))


def blame(error: Exception, paths: List[str]) -> str:
    """Say which file is wrong, if that is known, and why."""
    where = getattr(error, "filename", None) or listed(paths)
    return "%s: %s" % (where, getattr(error, "strerror", None) or error)


class Watched:
    """The `value` that `parse` makes of the contents of files. The first look raises
    OSError or ValueError. Later a file that is broken or gone changes nothing."""

    def __init__(self, paths: List[str], parse: Callable[..., Any]) -> None:
        self.paths, self.parse = paths, parse
        self.contents: Optional[List[bytes]] = None  # when they were looked at last
        self.parsed: Optional[List[bytes]] = None  # of which `value` was made
        self.broken = False  # a fault was logged, and is still there
        self.value: Any = None
        self.read()

    def __str__(self) -> str:
        return listed(self.paths)

    def read(self) -> bool:
        """Look at them; True when the contents are new. (The time of the last change
        would miss two changes in one tick.)"""
        found = [read_file(path) for path in self.paths]
        if found == self.contents:
            return False
        self.contents = found  # also when they cannot be parsed: once is enough
        self.value = self.parse(*found)
        self.parsed = found
        return True

    def look(self, asked: bool = False) -> bool:
        """Like read(), for later: a fault is logged once, and again for who `asked`."""
        if asked:
            self.contents, self.broken = self.parsed, False
        try:
            changed, self.broken = self.read(), False
            return changed
        except (OSError, ValueError) as error:
            if not self.broken:
                cause = blame(error, self.paths)
                log.warning("%s; what it held before stays", cause)
            self.broken = True
            return False


def warn_of_readers(paths: List[str]) -> None:
    """Say which of these files with secrets others may read."""
    for path in paths:
        with contextlib.suppress(OSError):
            mode = os.stat(path).st_mode
            if os.name != "nt" and stat.S_ISREG(mode) and mode & 0o077:
                log.warning("%s: others can read it; chmod 600 %s", path, path)


def forbid_core_dumps() -> None:
    """A core dump would hold the secrets. A limit of one byte, not of zero, also keeps
    the kernel from piping it to a program (core(5))."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        least = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
        resource.setrlimit(resource.RLIMIT_CORE, (least, least))


# -----------------------------------------------------------------------------------
# Limits of the system: how many descriptors there are.
# -----------------------------------------------------------------------------------
SPARE_FILES = 32  # descriptors kept for links, listeners, files and the resolver


def file_limit(selector: selectors.BaseSelector) -> int:
    """Raise the soft limit of descriptors to the hard one; return the limit."""
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
# Log: what happens, for -v and for programs that use `logging` themselves, where the
# logger is "mdm_tunnel". `logging` is not imported here: it would be an eighth of the
# time to start. (What else is large and rarely used is imported where it is used.)
# -----------------------------------------------------------------------------------
LEVELS = {DEBUG: "debug", INFO: "info", WARNING: "warning", ERROR: "error"}


class Log:
    """Writes to stderr from `level` on, and to `logging` where that is in use."""

    level = ERROR + 1
    as_json = False  # a line is an object
    coloured = False
    width = 12  # of a column that grows: where requests went
    logger: Any = None

    def hears(self, level: int) -> bool:
        """Whether somebody wants to know."""
        if self.logger is None and "logging" in sys.modules:
            logging = sys.modules["logging"]
            self.logger = logging.getLogger("mdm_tunnel")
            self.logger.addHandler(logging.NullHandler())
        told = self.logger is not None and self.logger.isEnabledFor(level)
        return bool(told) or level >= self.level

    def tell(self, level: int, text: str, *args: Any, **more: Any) -> None:
        """Log `text % args`. `more` is for write()."""
        if self.hears(level) and self.logger is not None:
            self.logger.log(level, text, *args, exc_info=more.get("trace"))
        if level >= self.level:
            self.write(sys.stderr, LEVELS[level], text % args, **more)

    def write(
        self,
        file: Any,
        level: str,
        text: str,
        trace: Any = None,
        colour: str = "%s",
        fields: Any = (),
    ) -> None:
        """One line; only a traceback, of the error `trace`, has more. In JSON `fields`
        say what the text says. A full disk harms only the log."""
        lines = [] if trace is None else format_error(trace)
        if self.as_json:
            known = [("time", utc_time()), ("level", level), ("text", text), *fields]
            known += [("trace", "\n".join(lines))] if lines else []
            lines = [encoder.encode(dict(known))]
        else:
            clock = time.strftime("%H:%M:%S ") if file is sys.stderr else ""
            lines = [clock + (colour % printable(text)), *map(printable, lines)]
        with contextlib.suppress(OSError, ValueError):
            print("\n".join(lines), file=file, flush=True)

    debug = functools.partialmethod(tell, DEBUG)
    info = functools.partialmethod(tell, INFO)
    warning = functools.partialmethod(tell, WARNING)
    error = functools.partialmethod(tell, ERROR)


log = Log()


def set_up_log(verbose: int, as_json: bool) -> None:
    """-v tells events, -vv frames too, on stderr. --log-json tells at least events."""
    log.as_json = as_json
    if verbose or as_json:
        log.level = DEBUG if verbose > 1 else INFO
        log.coloured = not as_json and shows_colours(sys.stderr)


def shows_colours(file: Any) -> bool:
    """A terminal does, unless its user says NO_COLOR (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or os.name == "nt" and "WT_SESSION" not in os.environ:
        return False  # nor does an old console of Windows
    return bool(file and file.isatty())


def format_error(error: Exception) -> List[str]:
    import traceback

    found = traceback.format_exception(type(error), error, error.__traceback__)
    return "".join(found).split("\n")


def utc_time() -> str:
    """As RFC 3339 has it, with milliseconds."""
    now = time.time()
    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return "%s.%03dZ" % (clock, now % 1 * 1000)


def printable(text: str) -> str:
    """What comes from outside forges no line and moves no cursor."""
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)


# -----------------------------------------------------------------------------------
# Outcome: how a request ended. -v tells it on both sides in the same words: the server
# knows it, and a NOTE brings it to the client. And a frame in words, for -vv.
# -----------------------------------------------------------------------------------
COLOURS = {1: "36", 2: "32", 3: "36", 4: "33", 5: "31"}  # of a status, by its class
WIDEST = 40  # characters of an id and a service that still widen their column
FRAME_TEXT = 200  # characters of a frame's payload in words
FRAME_DATA = 40  # bytes of DATA that are shown
SECRETS = ("session", "nonce", "proof")  # who knows the session may take the link over
Range = Tuple[int, int]  # the first byte, and the one behind the last


class Outcome(NamedTuple):
    """How one request ended, or a connection that was passed on as it is: its status is
    0, and its method CONNECT, TCP, TLS, or that of the upgrade. For observers."""

    visitor: str = ""  # its address
    id: str = ""  # "" where no service was reached
    service: str = ""
    method: str = ""  # "" where there was no request
    target: str = ""
    status: int = 0
    code: str = ""  # what went wrong, as a word; "" for nothing
    cause: str = ""  # the same for people
    sent: int = 0  # bytes of the bodies, to the visitor and from it
    received: int = 0
    seconds: float = 0.0
    stream: int = 0  # that carried it, last; 0: none
    request: Range = (0, 0)  # which of the stream's bytes it was, and the answer
    answer: Range = (0, 0)
    link: Any = None  # of the stream

    def to_json(self) -> Dict[str, Any]:
        """What a NOTE says of it, and --log-json; without empty texts."""
        pairs = zip(self._fields, self[:-1])  # the link is ours
        found = {x: y for x, y in pairs if y != "" and y != (0, 0)}
        found["seconds"] = round(self.seconds, 4)
        if len(self.target) + len(self.cause) > TOLD_LIMIT:
            found["target"] = self.target[:TOLD_LIMIT]
            found["cause"] = self.cause[:TOLD_LIMIT]
        return found

    def tell(self) -> None:
        """Log it: 203.0.113.9 tim web "GET /x" 200 5.1kB 12ms, and what cut it. The
        columns stand below each other, where that is possible."""
        where = ("%s %s" % (self.id, self.service)).strip()
        log.width = max(log.width, min(len(where), WIDEST))
        what = '"%s"' % ("%s %s" % (self.method, self.target[:TOLD_LIMIT])).strip()
        status = "%3d" % self.status if self.status else "end"
        end = status, short_size(self.sent), short_time(self.seconds)
        row = self.visitor, log.width, where, what, *end
        line = "%-15s %-*s %-32s %s %7s %6s" % row
        why = ": ".join(filter(None, (self.code, self.cause[:TOLD_LIMIT])))
        line += " " + why if why else ""
        colour = "%s"
        if log.coloured:
            colour = "\x1b[%sm%%s\x1b[0m" % COLOURS.get(self.status // 100, "2")
        fields = self.to_json().items() if log.as_json else ()
        log.info("%s", line, colour=colour, fields=fields)


def short_size(count: int) -> str:
    """5.1kB"""
    size = float(count)
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and units[1:]:
        size /= 1000
        del units[0]
    digits = "%.1f" if size < 9.95 and count > 999 else "%.0f"
    return digits % size + units[0]


def short_time(seconds: float) -> str:
    """12ms, 3.4s, 5m or 7h"""
    if seconds < 0.9995:
        return "%dms" % round(seconds * 1000)
    if seconds < 99.95:
        return "%.1fs" % seconds
    return "%dm" % (seconds / 60) if seconds < 5970 else "%dh" % (seconds / 3600)


def describe(kind: int, number: int, payload: Any) -> str:
    """A frame in words: `OPEN 3, service "web", visitor "203.0.113.9"`."""
    size, name = len(payload), Kind(kind).name
    words = ["%s %d" % (name, number) if number else name]
    if kind == DATA:
        more = " ..." if size > FRAME_DATA else ""
        start = bytes(payload[:FRAME_DATA]).decode("latin-1")
        words.append("%d bytes: %s%s" % (size, json.dumps(start), more))
    elif kind == Kind.CREDIT:
        words.append("%d more bytes may come" % NUMBER.unpack(payload)[0])
    elif kind == Kind.RESET:
        words.append(bytes(payload).decode("utf-8", "replace").rstrip())
    elif kind == Kind.NOTE:
        words.append("%d bytes" % size)
    elif size and kind not in (Kind.PING, Kind.PONG):
        with contextlib.suppress(ProtocolError):
            for key, value in unpack_json(payload).items():
                if isinstance(value, dict) and "auth" in value:
                    value = dict(value, auth="...")
                value = "..." if key in SECRETS else encoder.encode(value)
                words.append("%s %s" % (key, value))
    text = ", ".join(words)
    return text if len(text) <= FRAME_TEXT else text[:FRAME_TEXT] + " ..."


# -----------------------------------------------------------------------------------
# Service manager: systemd, or what speaks as it does, is told how we are, in datagrams
# (sd_notify(3)). Where $NOTIFY_SOCKET names none, nothing is said.
# -----------------------------------------------------------------------------------
class Manager:
    """`status` says in a line how the program is. Nothing here blocks or raises."""

    sock: Any = None
    is_ready = is_lost = False

    def __init__(self, loop: Loop, status: Callable[[], str]) -> None:
        self.status, self.said = status, ""
        self.timer = Timer(loop, self, self.look)
        self.interval = 0.0  # seconds between signs of life; 0: nobody wants any
        self.life_timer = Timer(loop, self, self.show_life)

    def __str__(self) -> str:
        return "service manager"

    def connect(self, environ: Any) -> None:
        """Take what was meant for us out of the environment. The rights to connect may
        soon be gone (--user): a connected socket stays one."""
        names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        path, period, pid = [environ.pop(name, "") for name in names]
        if not path or not hasattr(socket, "AF_UNIX"):
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        try:
            self.sock.connect("\0" + path[1:] if path[0] == "@" else path)
        except OSError as error:
            self.fail(error)
        if period.isdecimal() and pid in ("", str(os.getpid())):
            self.interval = int(period) / 2e6  # half the time, as systemd advises
        if self.interval:
            self.show_life()

    def tell(self, *lines: str) -> None:
        try:
            if self.sock:
                self.sock.send("\n".join(lines).encode("utf-8", "replace"))
        except OSError as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Once is enough: what is lost, is lost."""
        if not self.is_lost:
            log.debug("%s: %s", self, error)
        self.is_lost = True

    def show_life(self) -> None:
        """From a timer of the loop, so that a loop that hangs is found out."""
        self.life_timer.set(self.interval)
        self.tell("WATCHDOG=1")

    def ready(self) -> None:
        """We do what we were started for; to say it again changes nothing."""
        if self.sock and not self.is_ready:
            self.is_ready = True
            self.tell("READY=1")
            self.look()

    def look(self) -> None:
        """Is there anything new to say of us? It must not forge another line."""
        self.timer.set(LOOK_TIME)
        said, self.said = self.said, printable(self.status())
        if said != self.said:
            self.tell("STATUS=" + self.said)

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Around SIGHUP; `Type=notify-reload` waits for the second word."""
        if self.is_ready:
            self.tell("RELOADING=1", "MONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
        try:
            yield
        finally:
            if self.is_ready:
                self.tell("READY=1")

    def stopping(self, seconds: float) -> None:
        """It may take so long, and a second; less than it would wait anyway is fine."""
        usec = (min(seconds, DRAIN_LIMIT) + 1) * 1e6
        self.tell("STOPPING=1", "EXTEND_TIMEOUT_USEC=%d" % usec)

    def close(self) -> None:
        if self.sock:
            self.sock.close()


# -----------------------------------------------------------------------------------
# Unit: what --print-unit prints, a unit of systemd for just this command line, with
# rights for nothing else (systemd.exec(5)).
# -----------------------------------------------------------------------------------
FENCES = """NoNewPrivileges=yes
ProtectSystem=strict
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077"""
CREDENTIAL = "${CREDENTIALS_DIRECTORY}/"  # where LoadCredential puts a file


def typed_words(parser: Any, argv: Optional[List[str]], paths: List[str]) -> List[str]:
    """The command line as the parser reads it, but for --print-unit: long options, and
    the values of those in `paths` as absolute paths."""
    for action in parser._actions:
        action.type = None  # as they were typed
    options, rest = parser.parse_known_args(argv)
    words: List[str] = rest
    for action in reversed(parser._actions):
        value = getattr(options, action.dest, action.default)
        if value == action.default or action.dest in ("print_unit", "check"):
            continue
        option = next(x for x in action.option_strings if x.startswith("--"))
        if action.nargs == 0:
            words[:0] = [option] * int(value or 1)
        else:
            value = os.path.abspath(value) if action.dest in paths else value
            words[:0] = [option, value] if value[:1] != "-" else [option + "=" + value]
    return words


def quoted_word(word: str) -> str:
    """As ExecStart wants it (systemd.syntax(7), systemd.service(5))."""
    start = CREDENTIAL if word.startswith(CREDENTIAL) else ""
    text = word[len(start) :].replace("\\", "\\\\").replace('"', '\\"')
    text = text.replace("%", "%%").replace("$", "$$").replace("\n", "\\n")
    plain = text and not re.search(r"[\s'\";]", text)
    return start + text if plain else '"%s"' % (start + text)


def is_public(path: str) -> bool:
    """Whether any user reads this file, also in a unit, which has a /tmp of its own."""
    path, wanted = os.path.realpath(path), 4
    if re.match("/(var/)?tmp/", path):
        return False
    with contextlib.suppress(OSError):
        while os.stat(path).st_mode & wanted:
            if path == os.path.dirname(path):
                return True
            path, wanted = os.path.dirname(path), 1
    return False


def owner_lines(paths: List[str], owner: Optional[str] = None) -> List[str]:
    """The user of a unit, which has to read these files, and goes on reading them."""
    programs = filter(is_public, (sys.executable or "", os.path.abspath(sys.argv[0])))
    homes = any(re.match("/(home|root)/", path) for path in [*paths, *programs])
    lines = ["ProtectHome=read-only" if homes else "ProtectHome=yes"]
    if not paths and not owner:
        return ["DynamicUser=yes", *lines]
    if owner is None:
        with contextlib.suppress(ImportError, OSError, KeyError):
            import pwd

            owner = pwd.getpwuid(os.stat(paths[0]).st_uid).pw_name
    elif paths:
        lines.insert(0, "# It has to be able to read: %s" % " ".join(paths))
    if owner in (None, "root"):  # which would have all rights
        lines.insert(0, "# Make this user, and let it read: %s" % " ".join(paths))
        owner = "mdm-tunnel"
    return ["User=%s" % owner, *lines]


def print_unit(words: List[str], drain: float, notes: List[str], more: Any) -> None:
    """Print it; `more` are lines of its own, and `notes` what is to be done before."""
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0].replace("_", "-")
    script = os.path.abspath(sys.argv[0])
    if not os.path.isfile(script):  # it came by a pipe
        name = "mdm-tunnel-client"
    if not is_public(script):
        script = "/opt/%s.py" % name.replace("-", "_")
        notes = ["Put the script at %s." % script, *notes]
    python = sys.executable or ""
    python = python if is_public(python) else "/usr/bin/python3"
    for word in words:
        if re.search("(^|:)/(var/)?tmp/", word):
            notes = ["A unit has a /tmp of its own: move what is at %s." % word, *notes]
    notes = [*notes, "Put this into /etc/systemd/system/%s.service, then:" % name]
    notes.append("  systemctl daemon-reload && systemctl enable --now %s" % name)
    command = [python, script, *words]
    lines = ["# " + printable(note) for note in notes]
    lines += ["[Unit]", "Description=%s" % name.replace("mdm-tunnel-", "mdm-tunnel ")]
    lines += ["Wants=network-online.target", "After=network-online.target"]
    lines += ["", "[Service]", "Type=notify"]
    lines += ["ExecStart=" + " ".join(map(quoted_word, command))]
    lines += ["ExecReload=/bin/kill -HUP $MAINPID", "WatchdogSec=30", "Restart=always"]
    lines += ["RestartSec=5", "TimeoutStopSec=%d" % (drain + 11), "LimitNOFILE=65536"]
    lines += [*more, FENCES, "", "[Install]", "WantedBy=multi-user.target"]
    with contextlib.suppress(OSError):  # who reads it may have seen enough
        print("\n".join(lines), flush=True)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -----------------------------------------------------------------------------------
# Command line and options, as far as they are the same in both.
# -----------------------------------------------------------------------------------
PROXY_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # version 2 of the PROXY protocol
DRAIN = 4.0  # seconds for what runs after SIGTERM, if --drain does not say it
DRAIN_LIMIT = 3600.0  # seconds: who asks for more has probably milliseconds in mind


def drain_time(text: str) -> float:
    """The value of --drain. (A NaN is between no limits.)"""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= DRAIN_LIMIT:
            return float(text)
    cause = "%r is no time: 0 to %d seconds" % (text, DRAIN_LIMIT)
    raise argparse.ArgumentTypeError(cause)


def is_port(value: Any) -> bool:
    """Whether a value out of JSON is the number of a port, or 0."""
    return type(value) is int and 0 <= value < 1 << 16


def no_hangup(*_: Any) -> None:
    """A SIGHUP comes while the files are only just being read."""


def survive_hangup() -> None:
    """From here on SIGHUP does not kill. Where it is ignored (nohup) it stays so."""
    if HANGUP and signal.getsignal(HANGUP) == signal.SIG_DFL:
        signal.signal(HANGUP, no_hangup)


def ignore_signals() -> None:
    """While no loop handles them, so that a second Ctrl-C prints no traceback."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def die(status: int, cause: Any) -> NoReturn:
    """End with one line. 1: anything, 2: usage or configuration, 3: login refused, 4:
    attempts used up."""
    name = os.path.basename(sys.argv[0] or "-")
    if log.as_json:
        log.error("%s", cause)
        sys.exit(status)
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
# SHARED BLOCK 2: ends.
# ===================================================================================


# -----------------------------------------------------------------------------------
# Fields: the field section of a head, without any I/O (RFC 9110 5 and 6.5). It is read
# by the strict grammar, checked for what frames the body, and rewritten for the other
# side: what concerns one hop is dropped, and what is ours is said anew. Most sections
# come again, so the last ones are remembered.
# -----------------------------------------------------------------------------------
FIELD_LIMIT = 200  # fields of a head, and of a trailer section
MEMBERS_LIMIT = 32  # options in a Connection field
RECENT = 512  # field sections that are remembered: they mostly come again
RECENT_SIZE = 4 << 10  # bytes: longer ones would cost more memory than they save time

FIELDS = re.compile(r"(?:\r\n%s:%s*)*\r\n\r\n" % (TOKEN, TEXT))
# What by_grammar() tidies. NO_FIELD is skipped by browsers, and nginx lets it pass:
# names that are no tokens, words without a colon, a second status line.
COLON = re.compile(r"\n(%s)[ \t]*:(?:\n?[ \t])*" % TOKEN)  # all white space around it
FOLD = re.compile(r"(?!\A)\n[ \t]+")  # there is none of the status line
NO_FIELD = re.compile(
    r"\n(?!%s:)(?:[!-9;-~\x80-\xff]+(?::%s*)?|HTTP/%s*)(?=\n)" % (TOKEN, TEXT, TEXT)
)
LABELS = r"(?:[0-9A-Za-z_-]+\.)*[0-9A-Za-z_-]+\.?"  # of any length, but none empty
HOST = re.compile(r"(\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]|%s)(?::([0-9]{0,5}))?" % LABELS)
PROTOCOLS = re.compile(r"%s(?:/%s)?(?:[ \t]*,[ \t]*%s(?:/%s)?)*" % (4 * (TOKEN,)))
LENGTH = re.compile(r"\d{1,18}")
# Once, or several times the same (RFC 9110 8.6).
EQUAL_LENGTHS = re.compile(r"0*([1-9]\d{0,17}|0)(?:[ \t]*,[ \t]*0*\1)*")
OF_OUR_HOP = frozenset(["close", "keep-alive", "te", "upgrade"])  # dropped anyway
Framing = Tuple[bool, Optional[int]]  # whether a body is chunked, or its length

# Finds the fields of these names, each with the CRLF before it.
NAMED = r"(?ai)\r\n(%s):([^\r]*)"
FRAMING = "content-length|transfer-encoding|"  # what we have understood, we say anew
LOOKALIKES = "content_length|transfer_encoding"  # the same to some services
HOP_BY_HOP = FRAMING + "connection|keep-alive|proxy-connection|te|upgrade"
FORWARDED = "x[-_]forwarded[-_][^:]*|x[-_]real[-_]ip|forwarded"  # ours to say
NOTED = FRAMING + LOOKALIKES + "|host|connection|upgrade|te|accept"
NOTED_OF_REQUEST = re.compile(NAMED % NOTED)
NOTED_OF_ANSWER = re.compile(NAMED % (FRAMING + "connection|upgrade"))
NOT_TO_SERVICE = re.compile(NAMED % (HOP_BY_HOP + "|host|" + FORWARDED))
NOT_TO_VISITOR = re.compile(NAMED % HOP_BY_HOP)
WRAPPING = re.compile(NAMED % "transfer-encoding|trailer")
SECRET = re.compile(  # not remembered beyond their connection
    "(?ai)\n(?:cookie|set-cookie|auth|proxy-auth|location|referer|api"
    "|x-(?:access|amz|api|auth|csrf|session|token|xsrf))"
)


def join_fields(pairs: List[Tuple[str, str]]) -> Dict[str, str]:
    """Fields by name in lower case, repeated ones as one list (RFC 9110 5.3)."""
    joined: Dict[str, str] = {}
    for name, value in pairs:
        name, value = name.lower(), value.strip(" \t")
        joined[name] = joined[name] + ", " + value if name in joined else value
    return joined


class Fields(Dict[str, str]):
    """Joined fields, to be asked for without regard to case."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class Section(NamedTuple):
    """A field section, read and rewritten. It never changes, so it can stand for every
    head with the same fields: most requests of a visitor differ in their first line
    only."""

    raw: str = ""
    hop: Any = None  # everything else that `rewritten` depends on
    connection: FrozenSet[str] = frozenset()  # the members of Connection
    upgrade: str = ""  # protocols
    chunked: bool = False
    length: Optional[int] = None
    ours: str = ""  # the lines that are ours to say
    rewritten: bytes = b""  # as it goes on
    host: str = ""
    name: str = ""
    accept: str = ""


class Recent:
    """What a connection remembers: the field sections of its last request and its last
    answer. They may hold cookies and passwords, so they end with the connection."""

    request = answer = Section()


recent_sections: Dict[Tuple[str, Any], Section] = {}  # of all, without secrets


def recall(read: Callable[[str, Any], Section], raw: str, hop: Any) -> Section:
    """read(raw, hop), unless it is a recent section of any connection."""
    section = recent_sections.get((raw, hop))
    if section is None:
        section = read(raw, hop)
        if len(raw) <= RECENT_SIZE and not SECRET.search(raw):
            if len(recent_sections) >= RECENT:
                recent_sections.clear()
            recent_sections[raw, hop] = section
    return section


def by_grammar(raw: str, tolerant: bool) -> str:
    """A field section, if it keeps the grammar, or "". A service's is `tolerant`, and
    tidied where it does not: no white space before a colon (RFC 9112 5.1), no folds
    (5.2), no line that is no field. Readers could differ in anything else."""
    if FIELDS.fullmatch(raw):
        return raw
    if not tolerant or raw.count("\n") > FIELD_LIMIT + 2:
        return ""
    text = COLON.sub(r"\n\1: ", raw.replace("\r\n", "\n"))
    text = NO_FIELD.sub("", FOLD.sub(" ", text))
    text = "\r\n".join([line.rstrip(" \t") for line in text.split("\n")])
    return text if FIELDS.fullmatch(text) else ""


def read_fields(
    raw: str, wanted: Pattern[str], tolerant: bool
) -> Tuple[str, Dict[str, str], FrozenSet[str]]:
    """The fields by the grammar, a CRLF before each; those that are wanted; and the
    members of Connection."""
    text = by_grammar(raw, tolerant)
    if not text:
        raise malformed("a field breaks the grammar (RFC 9112, 5)")
    if raw.count("\n") > FIELD_LIMIT + 2:
        raise HTTPError(431, "too-long", "more than %d fields" % FIELD_LIMIT)
    noted = join_fields(wanted.findall(text))
    connection = list_members(noted, "connection")
    if len(connection) > MEMBERS_LIMIT:
        raise malformed("Connection has more than %d members" % MEMBERS_LIMIT)
    return text[:-4], noted, connection


def list_members(noted: Dict[str, str], name: str) -> FrozenSet[str]:
    """The members of a list, in lower case (RFC 9110 5.6.1)."""
    value = noted.get(name, "").lower()
    members = [x.strip(" \t") for x in value.split(",")] if "," in value else [value]
    return frozenset(filter(None, members))


def strip_hop_by_hop(text: str, dropped: Pattern[str], connection: Any) -> str:
    """The fields that go on (RFC 9110 7.6.1), a CRLF before each."""
    text = dropped.sub("", text)
    if not connection <= OF_OUR_HOP:
        lines = text.split("\r\n")
        lines = [x for x in lines if x.partition(":")[0].lower() not in connection]
        text = "\r\n".join(lines)
    return text


@functools.lru_cache(maxsize=RECENT)
def read_host(host: str) -> str:
    """The name in a Host field: in lower case, without port and dot at the end. Raises
    HTTPError."""
    match = HOST.fullmatch(host) if len(host) < 256 else None  # RFC 1035 2.3.4
    if not match or int(match.group(2) or 0) >= 1 << 16:
        raise malformed("a request has one Host field, and it names a host")
    return match.group(1).rstrip(".").lower()


def request_fields(raw: str, hop: Any) -> Section:
    """Read a request's fields, and rewrite them for the service. `hop` is the visitor's
    address, the scheme, the minor version, and the host of an absolute target, or "".
    Raises HTTPError."""
    address, scheme, minor, authority = hop
    text, noted, connection = read_fields(raw, NOTED_OF_REQUEST, tolerant=False)
    if connection & {"host", "content-length", "transfer-encoding"}:
        raise malformed("Connection names a field that must arrive")
    chunked, length = request_framing(noted, minor)
    upgrade = requested_upgrade(noted, connection, minor)
    host = noted.get("host", authority if minor == 0 else "")
    name = read_host(host)  # it has to be sound even where the target names another
    if authority:
        host, name = authority, read_host(authority)
    ours = "\r\nX-Forwarded-For: %s\r\nX-Forwarded-Proto: %s\r\nX-Forwarded-Host: %s"
    ours %= (address, scheme, host)
    if chunked:
        ours += "\r\nTransfer-Encoding: chunked"
    elif length is not None:
        ours += "\r\nContent-Length: " + noted["content-length"]
    options = []
    if upgrade:
        options.append("Upgrade")
        ours += "\r\nUpgrade: " + upgrade
    if "trailers" in list_members(noted, "te"):
        options.append("TE")
        ours += "\r\nTE: trailers"
    if minor == 0:
        options.append("close")
    if options:
        ours += "\r\nConnection: " + ", ".join(options)
    ours += "\r\n\r\n"
    text = strip_hop_by_hop(text, NOT_TO_SERVICE, connection)
    text = "\r\nHost: " + host + text + ours
    said = connection, upgrade, chunked, length, ours, text.encode("latin-1")
    return Section(raw, hop, *said, host, name, noted.get("accept", ""))


def replace_host(head: bytes, old: str, new: str) -> bytes:
    """A request's head with another Host. Origin and Referer of the same host follow:
    a dev server compares them. What X-Forwarded-Host says stays."""
    line = ("\r\nHost: %s\r\n" % new).encode("latin-1")
    head = head.replace(("\r\nHost: %s\r\n" % old).encode("latin-1"), line, 1)
    same = r"(?i)(\r\n(?:origin|referer):[ \t]*)https?://%s(?=[/?#\r])" % re.escape(old)
    return re.sub(same.encode("latin-1"), rb"\1http://" + new.encode("latin-1"), head)


def request_framing(noted: Dict[str, str], minor: int) -> Framing:
    """RFC 9112 6.3."""
    if "content_length" in noted or "transfer_encoding" in noted:
        raise malformed("a field looks like one that frames the body")
    coding, length = noted.get("transfer-encoding"), noted.get("content-length")
    if coding is None:
        if length is not None and not LENGTH.fullmatch(length):
            raise malformed("Content-Length is not one number")
        return False, None if length is None else int(length)
    if length is not None or minor == 0:
        raise malformed("Transfer-Encoding with a Content-Length, or in HTTP/1.0")
    if coding.lower() != "chunked":
        raise HTTPError(501, "coding", "a transfer coding other than chunked")
    return True, None


def requested_upgrade(noted: Dict[str, str], connection: Any, minor: int) -> str:
    """The protocols that the visitor asks for (RFC 9110 7.8), or "". h2c is refused: we
    would not see what it carries (RFC 7540 3.2)."""
    upgrade = noted.get("upgrade", "")
    if not upgrade or "upgrade" not in connection:
        return ""
    if not PROTOCOLS.fullmatch(upgrade):
        raise malformed("Upgrade names no protocol (RFC 9110, 7.8)")
    names = [member.partition("/")[0] for member in list_members(noted, "upgrade")]
    return "" if minor == 0 or "h2c" in names else upgrade


def answer_fields(raw: str, hop: Tuple[int, bool]) -> Section:
    """Read an answer's fields, and rewrite them for the visitor, all but Connection.
    `hop`: the status, and whether HEAD was asked. Raises HTTPError."""
    status, to_head = hop
    text, noted, connection = read_fields(raw, NOTED_OF_ANSWER, tolerant=True)
    if "content-length" in noted and "transfer-encoding" in noted:
        connection |= {"close"}  # it may think of another end (RFC 9112 6.3)
    chunked, length = answer_framing(noted, status, to_head)
    upgrade = noted.get("upgrade", "") if "upgrade" in connection else ""
    upgrade = upgrade if PROTOCOLS.fullmatch(upgrade) else ""
    ours = ""
    if status >= 200 and status != 204:  # RFC 9110 8.6
        if length is not None:
            ours = "\r\nContent-Length: %d" % length
        elif chunked:
            ours = "\r\nTransfer-Encoding: chunked"
    if upgrade and status in (101, 426):  # RFC 9110 7.8
        ours += "\r\nUpgrade: " + upgrade
    text = strip_hop_by_hop(text, NOT_TO_VISITOR, connection) + ours
    said = connection, upgrade, chunked, length, ours, text.encode("latin-1")
    return Section(raw, hop, *said)


def answer_framing(noted: Dict[str, str], status: int, to_head: bool) -> Framing:
    """RFC 9112 6.3. Where there is no body a fault in its framing changes nothing; but
    of two lengths neither is the one that HEAD asks for."""
    length = noted.get("content-length")
    codings = list_members(noted, "transfer-encoding") - {"identity"}
    if codings == {"chunked"}:
        return True, None  # it overrides a length
    match = EQUAL_LENGTHS.fullmatch(length or "")
    if status not in (204, 304):
        if codings and not to_head:
            raise malformed("a transfer coding other than chunked")
        if length is not None and not match and not (to_head and "," not in length):
            raise malformed("Content-Length is not one number")
    return False, int(match.group(1)) if match else None


# -----------------------------------------------------------------------------------
# Pages: what the server says itself. HTML for browsers, text for everybody else. At its
# own name it says how to begin, and hands out the client that lies beside it.
# -----------------------------------------------------------------------------------
INDEX_LIMIT = 200  # services on an index page: to make one takes a while
TEXT_KIND = "text/plain; charset=utf-8"
CLIENT_NAME = "mdm_tunnel_client.py"
CLIENT_LIMIT = 256 << 10  # bytes: it waits in memory for each visitor that takes it
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title>
<style>
:root { color-scheme: light dark }
body { font: 17px/1.6 system-ui, sans-serif; max-width: 42em; margin: 12vh auto;
  padding: 0 1.2em }
h1 { font-size: 1.5em; margin: 0 0 .8em }
ul { list-style: none; padding: 0 }
li { margin: .4em 0 }
p, li, small { overflow-wrap: anywhere }
pre { background: rgba(127, 127, 127, .13); padding: 1em 1.2em; border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: break-word; font-size: .85em }
pre span { display: inline-block; max-width: 100%% }
button { float: right; font: .95em system-ui, sans-serif; margin: -.3em -.5em .3em 1em;
  padding: .3em .9em; border: 1px solid rgba(127, 127, 127, .5); border-radius: 6px;
  background: Canvas; color: inherit; cursor: pointer }
small { display: block; margin: .3em 0; opacity: .7 }
footer { margin-top: 3em; font-size: .8em; opacity: .6 }
</style></head><body>
<h1>%(title)s</h1>
%(body)s
<footer>mdm-tunnel %(version)s</footer>
%(script)s</body></html>
"""
# navigator.clipboard is not there by plain http. What is selected one can copy by hand.
COPY = """<script>
for (const code of document.querySelectorAll("pre code")) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  button.onclick = () => {
    getSelection().selectAllChildren(code);
    if (document.execCommand("copy")) button.textContent = "Copied";
  };
  code.before(button);
}
</script>
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
    two spaces something to paste, one with one space small print; all is escaped."""
    lines = list(map(printable, lines))
    if not as_html:
        return TEXT_KIND, "\n".join([title] + lines + [""]).encode()
    import html

    parts = []
    for line in lines:
        text = html.escape(line)
        if line.startswith("  "):
            words = text.strip().replace(" ", "</span> <span>")  # no `-` stands alone
            parts.append("<pre><code><span>%s</span></code></pre>" % words)
        elif line.startswith(" "):
            parts.append("<small>%s</small>" % text.strip())
        elif line.startswith("http://") or line.startswith("https://"):
            parts.append('<ul><li><a href="%s">%s</a></li></ul>' % (text, text))
        else:
            parts.append("<p>%s</p>" % text)
    values = {"title": html.escape(title), "body": "\n".join(parts), "version": VERSION}
    values["script"] = COPY if "<pre>" in values["body"] else ""
    return "text/html; charset=utf-8", (PAGE % values).encode()


def quoted(word: str) -> str:
    """A host or a URL as a word for the shell: an address of IPv6 has brackets."""
    import shlex

    return shlex.quote(word)


class Landing:
    """What the server says at its own name, unless --no-landing (`on` is False). The
    client's file is read when it is first asked for, and looked at once a second at
    most. A visitor gets the bytes of one look, even if the file changes meanwhile."""

    def __init__(self, on: bool, tokens: bool) -> None:
        self.on, self.tokens = on, tokens
        script = globals().get("__file__")  # none, where it came by standard input
        folder = os.path.dirname(os.path.abspath(script)) if script else ""
        self.path = os.path.join(folder, CLIENT_NAME) if script else ""
        self.file: Optional[Watched] = None
        self.due = 0.0  # when the next look may be

    def look(self) -> Any:
        """The client as parse_client() has it; None where there is none."""
        if self.on and self.path and time.monotonic() >= self.due:
            self.due = time.monotonic() + LOOK_TIME
            try:
                if self.file:
                    self.file.look()
                self.file = self.file or open_file([self.path], parse_client)
            except ValueError as error:
                log.info("%s", error)
        return self.file.value if self.file else None

    def find(self, site: Site, request: Request) -> Optional[Page]:
        """The page for what somebody gets at a name of the server itself, if there is
        one. Raises HTTPError."""
        path = request.target.partition("?")[0]
        if not self.on:
            raise HTTPError(404, "no-name", "nothing is here")
        if request.method not in ("GET", "HEAD"):
            return None
        if path == "/":
            return Page(200, "", "mdm-tunnel is here", self.begin(site, request))
        if path != "/" + CLIENT_NAME:
            return None
        client = self.look()
        if client is None:
            cause = "no %s lies beside this server" % CLIENT_NAME
            raise HTTPError(404, "no-page", cause)
        return Page(200, "", "", [], file=client[0])

    def begin(self, site: Site, request: Request) -> List[str]:
        """What the landing page says."""
        client, names = self.look(), site.registry.names
        if client is None:
            return self.how_to(site, request)
        certificates = site.server.certificates
        pin = certificates.pin(request.name)
        url = "%s/%s" % (names.origin(request.host, request.scheme), CLIENT_NAME)
        get = "curl -fsS %s | python3 -" % quoted(url)
        if certificates.option(request.name) and site.has_own_tls(request):
            # curl would not trust it
            get = "curl -fsSko {0} {1} && echo '{2}  {0}' | sha256sum -c && python3 {0}"
            get = get.format(CLIENT_NAME, quoted(url), client[1])
        where = names.url("NAME", "web", request.host)
        where += SSLIP_HINT if names.is_mapped(where) else ""
        lines = self.how_to(site, request, get)
        lines[-1] = "Until Ctrl-C your service is then at " + where
        if where.startswith("error: "):
            lines[-1] = "There is " + where[len("error: ") :]
        lines += ["The client is one file, and needs Python 3.6 or later:"]
        lines += [url, " Version %s, SHA-256 %s" % (client[2], client[1])]
        return lines + [" The certificate of this server: SHA256 " + pin] * bool(pin)

    def how_to(self, site: Site, request: Request, get: str = "") -> List[str]:
        """How somebody gets a name here; `get` is how the client is had and started."""
        if not self.on:
            return []
        get = get or "python3 " + CLIENT_NAME
        name = "NAME is for you to choose."
        if self.tokens:
            name = "NAME and its token come from who runs this server. The client asks "
            name += "for the token, if it is not in MDM_TUNNEL_TOKEN."
        return [
            "To publish what listens on port 9000 of your machine, paste there:",
            "  %s %s -i NAME -v web=9000" % (get, site.way_in(request)),
            name,
            "-v prints the address of the service web.",
        ]


# -----------------------------------------------------------------------------------
# Ports: accept connections, hand each to what the port serves, pause where descriptors
# are short, close. A Port knows no protocol.
# -----------------------------------------------------------------------------------
ACCEPT_BATCH = 64  # connections accepted in one turn of the loop, on each port
ACCEPT_PAUSE = 0.5  # seconds without accepting when no descriptors are left
QUEUE = 1024  # connections that the kernel may hold until we accept them
UNKNOWN = "unknown"  # in place of an address (RFC 7239 6.2); in no network


def plain_address(host: str) -> str:
    """An address as people write it: without the mapping into IPv6, or the zone."""
    if ":" not in host:
        return host
    return re.sub("^::ffff:(?=.*[.])|%.*", "", host)


def read_address(text: str) -> str:
    """An address as plain_address() has it; "" for what is none."""
    import ipaddress

    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    return plain_address(str(getattr(address, "ipv4_mapped", None) or address))


def ends_of(sock: socket.socket, address: Any) -> Ends:
    """The ends of a connection that was accepted from `address`."""
    host, port = address[:2] if address else (UNKNOWN, 0)  # it has gone already
    try:
        to, to_port = sock.getsockname()[:2]
    except OSError:
        to, to_port = UNKNOWN, 0
    return Ends(plain_address(host), port, to, to_port)


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


def listen_all(addresses: List[Any]) -> List[socket.socket]:
    """A listening socket for each (host, port), or for none of them. Raises OSError."""
    with contextlib.ExitStack() as undo:
        socks = [undo.enter_context(listen(*address)) for address in addresses]
        undo.pop_all()
    return socks


def plan_ports(config: "Config") -> List[Tuple[int, Any, bool]]:
    """The ports that there are: number, kind of site, TLS. Raises ValueError."""
    port, client_port, tls_port = config.port, config.client_port, config.tls_port
    tls = config.tls_cert is not None or config.tls_dir is not None
    if not all(map(is_port, (port, client_port, tls_port or 0))):
        raise ValueError("a port is a number from 0 to 65535")
    if tls_port is not None and not tls:
        raise ValueError("--tls-port needs a certificate: --tls-cert or --tls-dir")
    if config.redirect and tls_port is None:
        raise ValueError("--redirect needs a --tls-port to lead to")
    if port != 0 and (port == tls_port or tls and port == client_port):
        raise ValueError("port %d cannot be both with TLS and without" % port)
    admin = config.admin[1] if config.admin else 0
    if admin and admin in (port, client_port, tls_port, *config.tcp_ports):
        raise ValueError("port %d of --admin has another use already" % admin)
    plain = RedirectSite if config.redirect else Site
    if tls_port is None and port == client_port != 0:
        return [(port, SharedSite, False)]
    if tls_port is None:
        return [(port, plain, False), (client_port, LinkSite, tls)]
    if tls_port == client_port != 0:
        return [(port, plain, False), (tls_port, SharedSite, True)]
    return [(port, plain, False), (tls_port, Site, True), (client_port, LinkSite, True)]


class Port:
    """Accepts connections. What it calls, serve(connection, ends), makes the first
    owner of each."""

    def __init__(self, sock: Any, visitors: "Visitors", serve: Call) -> None:
        self.sock, self.serve = sock, visitors.fronts.wrap(serve, visitors)
        self.loop, self.visitors = visitors.loop, visitors
        self.address = self.sock.getsockname()[:2]
        self.timer = Timer(self.loop, self, self.resume)
        self.paused = True
        self.resume()

    def __str__(self) -> str:
        return "port %d" % self.address[1]

    def on_events(self, mask: int) -> int:
        for _ in range(ACCEPT_BATCH):
            if self.paused:
                break  # closed in this very turn
            if self.loop.full() and not self.visitors.idle:
                self.pause("no descriptors left")
            elif not self.accept():
                break
        return 0

    def accept(self) -> bool:
        """One connection; False when there is none, or too many are here already."""
        try:
            sock, address = self.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        crowded = self.loop.full() and not self.visitors.make_room()
        connection = Connection(self.loop, sock, self)
        self.serve(connection, ends_of(sock, address))
        if crowded:
            self.pause("no descriptors left")
        return not crowded

    def fail(self, error: Exception) -> None:
        self.pause(str(error))

    def pause(self, cause: str) -> None:
        log.warning("%s: %s: accepting pauses", self, cause)
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


# -----------------------------------------------------------------------------------
# TCP ports: a service with the option "tcp" has a port of the server's for itself, and
# what comes there goes to its target byte for byte. The port is open as long as the
# service is published.
# -----------------------------------------------------------------------------------
TCP_LIMIT = 64  # ports that one id may have, so that others find some
TCP_SHARE = 4  # of so many descriptors one may be a port: visitors need the others
TRIES = 16  # ports that other programs have, until we give up: each costs time
TRY_AGAIN = 10.0  # seconds until such a port is tried again


class TCPPorts:
    """The ports `numbers` of --tcp-ports, and the services that have one."""

    def __init__(self, visitors: "Visitors", bind: Optional[str], numbers: Any) -> None:
        self.loop, self.visitors = visitors.loop, visitors
        self.bind, self.numbers = bind, numbers
        self.open: Dict[int, Tuple[Service, Port]] = {}
        self.last: Dict[int, Tuple[str, str]] = {}  # the id and service that had it
        self.foreign: Dict[int, float] = {}  # what others have, and when to look again

    def give(self, service: Service) -> int:
        """Open the port that a service wants, or any free one. Raises ValueError."""
        mine = {x: n for n, (x, _) in self.open.items() if x.pool is service.pool}
        if service in mine:
            return mine[service]
        if not self.numbers or self.visitors.stopping:
            raise ValueError("this server has no --tcp-ports A-B, or is stopping")
        if len(mine) >= TCP_LIMIT:
            raise ValueError("an id has at most %d ports" % TCP_LIMIT)
        if TCP_SHARE * len(self.open) >= self.loop.capacity or self.loop.full():
            raise ValueError("no descriptors are left for ports")
        cause = "all of --tcp-ports are taken"
        if not service.tcp and len(self.open) >= len(self.numbers):
            raise ValueError(cause)
        free = itertools.islice(self.free(service), TRIES)
        for number in [service.tcp] if service.tcp else free:
            try:
                return self.listen(number, service)
            except OSError as error:  # another program has it
                self.foreign[number] = self.loop.clock() + TRY_AGAIN
                cause = str(error.strerror or error) if service.tcp else cause
        raise ValueError(cause)

    def free(self, service: Service) -> Iterator[int]:
        """What to try: the port that the service had before, new ones, the others."""
        key, last = (service.pool.id, service.name), self.last
        mine = [number for number, owner in last.items() if owner == key]
        new = (number for number in self.numbers if number not in last)
        now = self.loop.clock()
        for number in itertools.chain(mine, new, self.numbers):
            if number not in self.open and self.foreign.get(number, now) <= now:
                yield number

    def listen(self, number: int, service: Service) -> int:
        """Raises ValueError or OSError."""
        if number not in self.numbers:
            span = self.numbers[0], self.numbers[-1]
            raise ValueError("port %d is not among --tcp-ports %d-%d" % (number, *span))
        if number in self.open:
            raise ValueError("port %d belongs to %s" % (number, self.open[number][0]))
        sock = listen(self.bind, number)
        self.open[number] = service, Port(sock, self.visitors, service.carry_tcp)
        self.loop.capacity -= 1  # it is a descriptor, too
        self.last[number] = service.pool.id, service.name
        return number

    def close_unused(self, pool: Optional[Pool] = None) -> None:
        """Close the ports of services that the pool no longer has; of all without."""
        for number, (service, port) in list(self.open.items()):
            gone = service.pool.services.get(service.name) is not service
            if pool is None or service.pool is pool and gone:
                del self.open[number]
                self.loop.capacity += 1
                port.close()


# -----------------------------------------------------------------------------------
# Prefaces: what a connection says before HTTP, or instead of it. A front in TCP mode
# says who comes, by the PROXY protocol (haproxy.org, proxy-protocol.txt). A visitor by
# TLS says in its ClientHello for whom it is: a service with "tls": "passthrough" gets
# the connection as it is, and all else is decrypted here.
# -----------------------------------------------------------------------------------
PREFACE_LIMIT = 16 << 10  # bytes: post-quantum keys make a ClientHello 2 KiB or more
PROXY_LINE = re.compile(
    rb"PROXY (?:UNKNOWN[^\r\n]*|TCP[46] ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) "
    rb"(0|[1-9]\d{0,4}) (0|[1-9]\d{0,4}))\r\n"
)
PROXY_LINE_LIMIT = 107  # bytes, by the specification
PROXY_FAMILIES = {0x11: (socket.AF_INET, 4), 0x21: (socket.AF_INET6, 16)}  # over TCP
SERVER_NAME = re.compile(r"(?=.{1,255}\Z)%s" % LABELS)
HANDSHAKE = b"\x16"  # the kind of record in which a ClientHello comes (RFC 8446 5.1)
UNRECOGNIZED_NAME = b"\x15\3\1\0\2\2\x70"  # alert, 3.1, two bytes: fatal, 112


class Preface(Visitor):
    """Reads the first bytes of a connection. parse(buffer) returns None while more must
    come, then (found, count): what it found, and how many bytes that uses up. The rest
    stays for the next owner, whom then(connection, ends, found) makes. `parse` may
    raise ProtocolError, which cuts the connection."""

    def __init__(
        self, visitors: Any, connection: Connection, ends: Ends, parse: Call, then: Call
    ) -> None:
        super().__init__(visitors, connection, ends, HANDSHAKE_TIME)
        self.parse, self.then = parse, then
        self.buffer = bytearray()

    def __str__(self) -> str:
        return "visitor %s" % self.ends.address

    def interest(self) -> int:
        return READ

    def on_readable(self) -> None:
        connection = self.connection
        view = self.loop.scratch[: PREFACE_LIMIT - len(self.buffer)]
        count = connection.read_into(view)
        if count == 0:
            self.give_up()
        elif count:
            self.buffer += view[:count]
            found = self.parse(self.buffer)
            if found:
                self.detach()
                connection.unread = bytes(self.buffer[found[1] :])
                self.then(connection, self.ends, found[0])

    def on_writable(self) -> None:
        pass

    def fail(self, error: Exception) -> None:
        log.info("%s: %s", self, error)
        self.detach()
        self.connection.abort()


def parse_proxy_header(buffer: bytearray) -> Optional[Tuple[Optional[Ends], int]]:
    """The ends that a PROXY header tells, None for none, and its length; or None while
    it is not whole. Raises ProtocolError when there is no such header."""
    if buffer[:12] == PROXY_SIGNATURE[: len(buffer)]:
        return parse_proxy_2(buffer)
    end = buffer.find(b"\n", 0, PROXY_LINE_LIMIT) + 1
    if not end and len(buffer) < PROXY_LINE_LIMIT:
        if not buffer.startswith(b"PROXY "[: len(buffer)]):
            raise ProtocolError("no PROXY header, which every connection must have")
        return None
    match = PROXY_LINE.fullmatch(bytes(buffer[:end]))
    if not match:
        raise ProtocolError("a PROXY header breaks the grammar")
    if not match.group(1):
        return None, end
    source, to, port, to_port = [text.decode() for text in match.groups()]
    return make_ends(source, int(port), to, int(to_port)), end


def parse_proxy_2(buffer: bytearray) -> Optional[Tuple[Optional[Ends], int]]:
    """The same for version 2, which is binary. What it tells beyond the addresses is
    skipped."""
    if len(buffer) < 16:
        return None
    command, family, length = struct.unpack_from("!BBH", buffer, 12)
    if command not in (0x20, 0x21) or 16 + length > PREFACE_LIMIT:
        raise ProtocolError("a PROXY header of another version, or too long a one")
    if len(buffer) < 16 + length:
        return None
    kind, size = PROXY_FAMILIES.get(family, (0, 0))
    if command == 0x20 or not kind:  # the front speaks for itself: a health check
        return None, 16 + length
    if length < 2 * size + 4:
        raise ProtocolError("a PROXY header without its addresses")
    hosts = bytes(buffer[16 : 16 + 2 * size])
    port, to_port = struct.unpack_from("!HH", buffer, 16 + 2 * size)
    source, to = [socket.inet_ntop(kind, x) for x in (hosts[:size], hosts[size:])]
    return make_ends(source, port, to, to_port), 16 + length


def make_ends(source: str, port: int, to: str, to_port: int) -> Ends:
    """Raises ProtocolError when one is no address or no port."""
    source, to = read_address(source), read_address(to)
    if not (source and to and is_port(port) and is_port(to_port)):
        raise ProtocolError("a PROXY header names no address or no port")
    return Ends(source, port, to, to_port)


class ClientHello:
    """Finds the name in a ClientHello (RFC 8446 4.1.2, RFC 6066 3) as it comes, in any
    number of records and pieces. What is no such thing, or not clear, has the name "":
    our own TLS then says what is wrong with it."""

    def __init__(self) -> None:
        self.message = bytearray()  # the handshake message, out of its records
        self.at = 0  # where the next record begins

    def parse(self, buffer: bytearray) -> Optional[Tuple[str, int]]:
        """(name, 0) once it is there: all bytes stay for the next owner."""
        try:
            while self.at + 5 <= len(buffer):
                kind, major, _, length = struct.unpack_from("!BBBH", buffer, self.at)
                if (kind, major) != (22, 3) or not 0 < length <= 1 << 14:
                    return "", 0
                end = self.at + 5 + length
                if end > len(buffer):
                    break
                self.message += buffer[self.at + 5 : end]
                self.at = end
                size = 4 + int.from_bytes(self.message[1:4], "big")
                if len(self.message) >= max(4, size):
                    return find_server_name(bytes(self.message[:size])), 0
            if buffer[:1] != HANDSHAKE or len(buffer) >= PREFACE_LIMIT:
                return "", 0
            return None
        except (struct.error, ValueError):
            return "", 0


class Bytes:
    """Takes numbers and strings off the front of some bytes. Raises ValueError where
    there are too few."""

    def __init__(self, data: memoryview) -> None:
        self.data = data

    def take(self, count: int) -> memoryview:
        if count > len(self.data):
            raise ValueError("too short")
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, size: int) -> "Bytes":
        """What has its length before it, in `size` bytes."""
        return Bytes(self.take(self.number(size)))


def find_server_name(message: bytes) -> str:
    """The host of the server_name extension, in lower case; "" when there is none.
    Raises ValueError when the message is no ClientHello, or names more than one."""
    hello = Bytes(memoryview(message))
    if hello.number(1) != 1:
        raise ValueError("another message")
    hello = hello.block(3)
    hello.take(2 + 32)  # version, random
    for size in (1, 2, 1):  # session, cipher suites, compression
        hello.block(size)
    extensions, names = hello.block(2) if hello.data else hello, []
    while extensions.data:
        kind, content = extensions.number(2), extensions.block(2)
        if kind == 0:
            names.append(content)
    if len(names) != 1 or hello.data:
        return ""
    entries = names[0].block(2)
    kind, host = entries.number(1), entries.block(2).data
    if kind != 0 or entries.data or names[0].data:
        return ""
    text = bytes(host).decode("latin-1")
    return text.rstrip(".").lower() if SERVER_NAME.fullmatch(text) else ""


class TLSPort:
    """What a port with TLS serves: to whom the ClientHello says."""

    def __init__(self, site: "Site", certificates: "Certificates") -> None:
        self.site, self.certificates = site, certificates

    def serve(self, connection: Connection, ends: Ends) -> None:
        parse, visitors = ClientHello().parse, self.site.visitors
        Preface(visitors, connection, ends, parse, self.on_name)

    def on_name(self, connection: Connection, ends: Ends, name: str) -> None:
        service = self.site.find_passthrough(name)
        context = self.certificates.find(name)
        if context is None and not connection.unread.startswith(HANDSHAKE):
            context = self.certificates.any()  # which then says that this is no TLS
        if service:
            service.carry(connection, ends, "tls")
        elif context is None:
            log.info("%s: no certificate for %s", ends.address, name or "no name")
            connection.write(UNRECOGNIZED_NAME)
            connection.close_when_drained(Ending.LINGER)
        else:
            self.site.serve(connection, ends)  # who is told when TLS fails
            connection.loop.guard(connection, connection.start_tls, context, True)


# -----------------------------------------------------------------------------------
# Fronts: proxies that stand before us and say for whom they speak, in X-Forwarded-* or
# by a PROXY header. Only those of --trust-proxy are believed.
# -----------------------------------------------------------------------------------
SAID_BY_FRONT = re.compile(NAMED % "x-forwarded-(?:for|proto|host)")
HOP = re.compile(r"\[([^]]*)\](?::\d+)?|([\d.]+):\d+|(.*)")  # some write a port
HOPS_LIMIT = 32  # proxies one after another: to look at each takes time


class Fronts:
    """The networks of --trust-proxy. `proxied`: from there every connection has a PROXY
    header, and there are no others."""

    def __init__(self, trusted: Any, proxied: bool) -> None:
        if proxied and not trusted:
            raise ValueError("--proxy-protocol needs --trust-proxy: whom to believe")
        self.networks = Networks(trusted)
        self.proxied = proxied

    def if_trusted(self, address: str) -> Optional["Fronts"]:
        """Itself where what comes from this address is believed."""
        return self if self.networks.networks and self.networks.hold(address) else None

    def wrap(self, serve: Call, visitors: "Visitors") -> Call:
        """serve(connection, ends), with the PROXY header read before."""
        if not self.proxied:
            return serve

        def on_header(connection: Connection, ends: Ends, told: Optional[Ends]) -> None:
            serve(connection, told or ends.of(UNKNOWN))  # not the front: it is trusted

        def read_header(connection: Connection, ends: Ends) -> None:
            if self.networks.hold(ends.address):
                Preface(visitors, connection, ends, parse_proxy_header, on_header)
            else:
                log.info("%s is no proxy that we trust: cut", ends.address)
                connection.abort()

        return read_header

    def read(self, raw: str, address: str, scheme: str) -> Tuple[str, str, str]:
        """Who asks, by which scheme, and for which host ("": as Host says), by the
        fields of a request that came from a trusted `address`. Each proxy appends whom
        it saw. So from the right an entry counts as long as who wrote it is trusted,
        and of the scheme and the host only the last, which that proxy wrote."""
        noted = join_fields(SAID_BY_FRONT.findall(raw))
        hops = noted.get("x-forwarded-for", address).rsplit(",", HOPS_LIMIT)
        for hop in reversed(hops[-HOPS_LIMIT:]):
            if not self.networks.hold(address):
                break  # who said the rest is not known
            match = HOP.fullmatch(hop.strip(" \t"))
            address = read_address(match[match.lastindex or 0]) if match else ""
            address = address or UNKNOWN
        last = noted.get("x-forwarded-proto", "").rpartition(",")[2].strip().lower()
        host = noted.get("x-forwarded-host", "").rpartition(",")[2].strip()
        return address, last if last in ("http", "https") else scheme, host


# -----------------------------------------------------------------------------------
# Gates: what a service asks of its visitors, before a stream is opened: an address out
# of a list, a password. A gate raises HTTPError.
# -----------------------------------------------------------------------------------
HASHED = re.compile("([0-9a-f]{32}):([0-9a-f]{64})")  # salt, SHA-256 of it and the pair


def make_gates(options: Dict[str, Any]) -> Tuple[Any, ...]:
    """Those that a service's options ask for. Raises ValueError."""
    gates: List[Any] = []
    if "visitors" in options:
        gates.append(Addresses(options["visitors"]))
    if "auth" in options and ("tcp" in options or "tls" in options):
        raise ValueError("auth is for HTTP: it cannot guard what we cannot read")
    if "auth" in options:
        gates.append(Password(options["auth"]))
    return tuple(gates)


class Networks:
    """A list of networks, as texts. Raises ValueError."""

    def __init__(self, texts: Any) -> None:
        import ipaddress

        self.networks = [ipaddress.ip_network(str(text).strip()) for text in texts]

    def hold(self, text: str) -> bool:
        """Whether the address is in one of them. What is no address is in none."""
        import ipaddress

        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False
        return any(address in network for network in self.networks)


class Addresses:
    """The option "visitors": only from these networks."""

    def __init__(self, networks: Any) -> None:
        if not isinstance(networks, list) or not networks:
            raise ValueError("visitors is a list of networks")
        self.networks = Networks(networks)

    def admit(self, request: Request) -> None:
        self.admit_address(request.address)

    def admit_address(self, text: str) -> None:
        if not self.networks.hold(text):
            raise HTTPError(403, "denied", "this service is not for your address")


class Password:
    """The option "auth": one of these pairs of user and password, by Basic (RFC 7617).
    The service does not get the field that was for us."""

    def __init__(self, hashed: Any) -> None:
        texts = hashed if isinstance(hashed, list) and hashed else [""]
        found = [HASHED.fullmatch(str(text)) for text in texts]
        if not all(found):
            raise ValueError("auth is a list of salted hashes")
        self.pairs = [(bytes.fromhex(x.group(1)), x.group(2)) for x in found if x]

    def admit(self, request: Request) -> None:
        import base64
        import hashlib

        kind, _, coded = request.headers.get("authorization", "").partition(" ")
        try:
            said = base64.b64decode(coded.strip(), validate=True)
        except ValueError:
            said = b""
        good = [is_proof(hashlib.sha256(salt + said).hexdigest(), digest)
                for salt, digest in self.pairs]  # fmt: skip
        if kind.lower() != "basic" or not any(good):
            realm = 'Basic realm="%s", charset="UTF-8"' % request.name
            fields = [("WWW-Authenticate", realm)]
            raise HTTPError(401, "denied", "a password is needed", fields)
        ours = "authorization"
        request.fields = [pair for pair in request.fields if pair[0].lower() != ours]

    def admit_address(self, text: str) -> None:
        """Of TCP or TLS that passes through, which never has a password."""


# -----------------------------------------------------------------------------------
# Overload: which connections are here, and which one goes when there are too many.
# -----------------------------------------------------------------------------------
ROOM_LOOKS = 8  # idle visitors to look at for one that can go
UNAUTHENTICATED = 128  # connections on which no client has logged in yet


class Visitors:
    """The connections that speak HTTP, or are about to; and who is told how requests
    end. `fronts` are the proxies that may stand before us."""

    def __init__(self, loop: Loop, fronts: Optional["Fronts"] = None) -> None:
        self.loop, self.fronts = loop, fronts or Fronts((), False)
        self.all: Set[Visitor] = set()
        self.idle: Any = collections.OrderedDict()  # may go; idle longest: first
        self.stopping = False  # each request is the last of its connection
        self.observers: List[Callable[[Outcome], Any]] = []
        # What is known of a pipe that is observed, what it began with, and when.
        self.pipes: Dict[Pipe, Tuple[Outcome, Range, float]] = {}

    def add(self, visitor: Visitor) -> None:
        self.all.add(visitor)
        self.idle[visitor] = None

    def discard(self, visitor: Visitor) -> None:
        self.all.discard(visitor)
        self.idle.pop(visitor, None)

    def make_room(self) -> bool:
        """Close the visitor that is idle longest, and has sent nothing that we have not
        read yet; False when there seems to be none."""
        for _ in range(min(ROOM_LOOKS, len(self.idle))):
            http = next(iter(self.idle))
            connection = http.connection
            if not connection.has_unread():
                if connection.owner is http:
                    http.detach()  # at once: a lingering page keeps its descriptor
                    connection.close()
                else:
                    connection.owner.give_up()
                return True
            self.idle.move_to_end(http)
        return False

    def observe(
        self,
        http: HTTPConnection,
        status: int,
        code: str = "",
        cause: str = "",
        sent: int = 0,
        received: int = 0,
    ) -> None:
        """Tell the observers how a request ended."""
        seconds = self.loop.clock() - http.since if http.request else 0.0
        ended: Any = (status, code, cause, sent, received, seconds)
        self.tell(Outcome(*http.known(), *ended, *http.carried))

    def observe_pipe(self, pipe: Pipe, known: Outcome, before: int = 0) -> None:
        """Tell them how a pipe ends, once its connection closes: what is `known` of it,
        and what it carried. It began `before` bytes before it was made."""
        if self.observers:
            stream, since = pipe.stream, self.loop.clock()
            began = stream.bytes_out, stream.bytes_in - before
            self.pipes[pipe] = known, began, since
            over = functools.partial(self.on_pipe_closed, pipe)
            pipe.connection.on_closed = over

    def on_pipe_closed(self, pipe: Pipe) -> None:
        known, (asked, answered), since = self.pipes.pop(pipe)
        stream, (code, cause) = pipe.stream, pipe.cut
        outcome = known._replace(
            code=code,
            cause=cause,
            sent=stream.bytes_in - answered,
            received=stream.bytes_out - asked,
            seconds=self.loop.clock() - since,
            stream=stream.id,
            request=(asked, stream.bytes_out),
            answer=(answered, stream.bytes_in),
            link=stream.link,
        )
        self.tell(outcome)

    def tell(self, outcome: Outcome) -> None:
        for observer in self.observers:
            self.loop.guard(self, observer, outcome)

    def fail(self, error: Exception) -> None:
        """An observer raised. The next one is told all the same."""
        log.error("an observer of requests: %s", error)


class Unauthenticated:
    """Connections on which no client has logged in yet. Past the limit one at random
    goes, of the network that has most of them: so one source cannot lock out the rest.
    Of IPv6 a network is a /64, since who has one address there has all of them."""

    def __init__(self) -> None:
        self.networks: Dict[Connection, str] = collections.OrderedDict()

    def admit(self, connection: Connection, address: str) -> None:
        self.discard(connection)
        if len(self.networks) >= UNAUTHENTICATED:
            gone = [other for other in self.networks if other.closed]
            for other in gone:
                del self.networks[other]
            if not gone:
                self.drop_one()
        self.networks[connection] = network_of(address)

    def discard(self, connection: Connection) -> None:
        self.networks.pop(connection, None)

    def drop_one(self) -> None:
        import random

        (largest, _), *_ = collections.Counter(self.networks.values()).most_common(1)
        crowd = [other for other, where in self.networks.items() if where == largest]
        victim = random.choice(crowd)
        del self.networks[victim]
        victim.fail(OSError("too many connections have not logged in"))


def network_of(address: str) -> str:
    """What one owner may have many addresses of: a /64 of IPv6, one address of IPv4."""
    if ":" not in address:
        return address
    try:
        return socket.inet_pton(socket.AF_INET6, address)[:8].hex()
    except (OSError, ValueError):
        return address


# -----------------------------------------------------------------------------------
# Numbers: what has happened, for --admin. An observer of the requests, which updates
# one row of a table for each; the sums are made when somebody asks for them.
# -----------------------------------------------------------------------------------
# Seconds of a request, for the histogram: a page at its best, and a long poll.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
# Each id costs Prometheus some thirty time series for ever, and without --tokens anyone
# chooses ids. The first so many have their own, all others are "other".
ID_LABELS = 100
REASONS = frozenset(  # codes are words of the client's: none of these is "other"
    "broken busy cut error gone left link-lost malformed no-service other overload "
    "refused reset stopping timeout too-long".split()
)
STATUSES = ["carried", "1xx", "2xx", "3xx", "4xx", "5xx", *["other"] * 4]
SAMPLE_TIME = 10.0  # seconds between two points of the curves
SAMPLES = 61  # ten minutes of them, and where they begin
TURNS = 6  # of such times the longest turn is told: scrapes are a minute apart at most
LAST_REQUESTS = 200
SHOWN_TEXT = 120  # characters of a target, or a cause, of them
Sums = Dict[str, List[int]]
Sample = Tuple[str, Dict[str, str], Any]  # suffix of the name, labels, value
Metric = Tuple[str, str, str, List[Sample]]  # name, type, help


class Numbers:
    """Counts for a server what its observers are told. `rows` are by id, class of the
    status, and reason: count, bytes sent and received, seconds, and how many ended
    within each of the BOUNDS, or later."""

    def __init__(self, server: "Server") -> None:
        from bisect import bisect_left

        self.server, self.loop, self.bisect = server, server.loop, bisect_left
        self.started = time.time()
        self.ids = {""}  # that have a label
        self.rows: Dict[Tuple[str, int, str], List[Any]] = {}
        self.told: Dict[str, List[int]] = {}  # bytes of each id: a counter never falls
        self.recent: Deque[Tuple[Any, ...]] = collections.deque(maxlen=LAST_REQUESTS)
        self.samples: Deque[List[Any]] = collections.deque(maxlen=SAMPLES)
        self.turns: Deque[float] = collections.deque([0.0], TURNS)  # the longest each
        self.timer = Timer(self.loop, self, self.sample)
        self.sample()
        server.visitors.observers.append(self.count)
        self.loop.soon(self, self.watch_turns)  # to start is no turn

    def fail(self, error: Exception) -> None:
        log.error("numbers: %s", error)

    def label(self, id: str) -> str:
        if id not in self.ids and len(self.ids) <= ID_LABELS:
            self.ids.add(id)
        return id if id in self.ids else "other"

    def count(self, outcome: Outcome) -> None:
        """An observer. Most requests have a row already."""
        id, status, code, seconds = outcome[1], outcome[5], outcome[6], outcome[10]
        id = id if id in self.ids else self.label(id)
        if code:  # without a stream nothing was reset
            code = (code if code in REASONS else "other") if outcome.link else ""
        row = self.rows.get((id, status // 100, code))
        if row is None:
            row = self.rows[id, status // 100, code] = [0] * (len(BOUNDS) + 5)
        row[0] += 1
        row[1] += outcome[8]
        row[2] += outcome[9]
        row[3] += seconds
        row[4 + self.bisect(BOUNDS, seconds)] += 1
        target, cause = outcome[4], outcome[7]
        if len(target) > SHOWN_TEXT:
            target = target[:SHOWN_TEXT] + "..."
        told = target, cause[:SHOWN_TEXT]
        self.recent.append((time.time(), *outcome[:4], *told, *outcome[5:11]))

    def watch_turns(self) -> None:
        """The loop reads its clock when a turn begins. That it is over the selector
        knows, which is asked again."""
        loop, turns = self.loop, self.turns
        selector: Any = loop.selector
        select = selector.select

        def watched(timeout: Optional[float]) -> Any:
            turns[-1] = max(turns[-1], loop.clock() - loop.turn_started)
            return select(timeout)

        selector.select = watched

    def sample(self) -> None:
        self.timer.set(SAMPLE_TIME)
        self.samples.append(self.total())
        self.turns.append(0.0)

    # Sums.

    def by_id(self) -> Sums:
        """Requests, those with 5xx, bytes sent and received of each id, with what runs.
        What was carried is no request."""
        found: Sums = {}
        for (id, kind, _), row in self.rows.items():
            sums = found.setdefault(id, [0, 0, 0, 0])
            sums[0] += row[0] if kind else 0
            sums[1] += row[0] if kind == 5 else 0
            sums[2] += row[1]
            sums[3] += row[2]
        for id, sent, received in self.running():
            sums = found.setdefault(self.label(id), [0, 0, 0, 0])
            sums[2] += sent
            sums[3] += received
        for id, sums in found.items():
            least = self.told.get(id, (0, 0))
            sums[2:] = self.told[id] = list(map(max, sums[2:], least))
        return found

    def running(self) -> Iterator[Tuple[str, int, int]]:
        """The id of each request that goes on, and its bytes so far."""
        for connection in self.loop.connections:
            owner = connection.owner
            if isinstance(owner, Exchange):
                yield owner.service.pool.id, owner.sent, owner.received
        for pipe, (known, began, _) in self.server.visitors.pipes.items():
            stream = pipe.stream
            yield known.id, stream.bytes_in - began[1], stream.bytes_out - began[0]

    def total(self) -> List[Any]:
        """When that is, and the sums of all ids."""
        return [self.loop.clock(), *map(sum, zip([0, 0, 0, 0], *self.by_id().values()))]

    def visitors(self) -> int:
        """Connections of visitors, also those that wait for their TLS, or linger."""
        owners = [connection.owner for connection in self.loop.connections]
        sites = [getattr(x, "site", None) for x in owners if not isinstance(x, Link)]
        return sum(site is None or site.kind == "visitor" for site in sites)

    def streams(self) -> int:
        return sum(len(link.streams) for link in self.loop.links)

    # OpenMetrics (its text format, version 1.0.0).

    def metrics(self) -> bytes:
        found = itertools.chain(self.gauges(), self.counters(), process(self.started))
        return ("".join(family(*known) for known in found) + "# EOF\n").encode()

    def gauges(self) -> Iterator[Metric]:
        server, trips = self.server, {}  # type: Any, Dict[str, float]
        for link in self.loop.links:
            if link.round_trip and link.owner.id:
                id = self.label(link.owner.id)
                trips[id] = max(trips.get(id, 0), link.round_trip)
        labels = {"version": VERSION, "python": "%d.%d.%d" % sys.version_info[:3]}
        yield "mdm_tunnel_build", "info", "What runs.", [("_info", labels, 1)]
        for name, value, text in (
            ("draining", int(server.visitors.stopping), "Whether the server stops."),
            ("ids", len(server.registry.pools), "Ids that are connected."),
            ("links", len(self.loop.links), "Links of clients, with old ones."),
            ("streams", self.streams(), "Streams on the links, also those kept."),
            ("visitors", self.visitors(), "Connections of visitors."),
            ("longest_turn_seconds", max(self.turns), "Of the loop, in a minute."),
        ):
            yield "mdm_tunnel_" + name, "gauge", text, [("", {}, value)]
        samples = [("", {"id": id}, trip) for id, trip in sorted(trips.items())]
        text = "Round trip of a link, when it was last measured."
        yield "mdm_tunnel_round_trip_seconds", "gauge", text, samples

    def counters(self) -> Iterator[Metric]:
        asked: Dict[Tuple[str, str], int] = collections.Counter()
        resets = dict.fromkeys(REASONS, 0)
        times: Dict[str, List[Any]] = {}
        for (id, kind, reason), row in sorted(self.rows.items()):
            asked[id, STATUSES[kind]] += row[0]
            if reason:
                resets[reason] += row[0]
            if kind > 1:  # what is carried takes as long as it likes
                times[id] = [x + y for x, y in zip(times.get(id, [0] * 20), row)]
        sides = [("sent", id, x[2]) for id, x in self.by_id().items()]
        sides += [("received", id, x[3]) for id, x in self.by_id().items()]
        refused = self.server.registry.refused
        samples: Any = [x for id, row in times.items() for x in histogram(id, row)]
        text = "From a request's head to the end of its answer."
        yield "mdm_tunnel_request_seconds", "histogram", text, samples
        for name, text, samples in (
            ("requests", "By the class of their status; carried: passed on as bytes.",
             [({"id": x, "status": y}, count) for (x, y), count in asked.items()]),
            ("bytes", "Of bodies, sent to visitors and received from them.",
             [({"id": id, "direction": side}, count) for side, id, count in sides]),
            ("resets", "Streams that did not end as they should.",
             [({"reason": x}, count) for x, count in sorted(resets.items())]),
            ("refused_logins", "Logins of clients that were refused.",
             [({"reason": x}, count) for x, count in sorted(refused.items())]),
        ):  # fmt: skip
            samples = [("_total", *sample) for sample in samples]
            yield "mdm_tunnel_" + name, "counter", text, samples


def rate_between(one: List[Any], other: List[Any]) -> List[float]:
    """How much of each there was in a second; they begin with the time."""
    seconds = max(other[0] - one[0], 0.001)
    return [(y - x) / seconds for x, y in zip(one[1:], other[1:])]


def histogram(id: str, row: List[Any]) -> Iterator[Sample]:
    """A row of Numbers as samples."""
    within = 0
    for bound, count in zip((*map(repr, BOUNDS), "+Inf"), row[4:]):
        within += count
        yield "_bucket", {"id": id, "le": bound}, within
    yield "_count", {"id": id}, within
    yield "_sum", {"id": id}, row[3]


def family(name: str, kind: str, text: str, samples: List[Sample]) -> str:
    """A metric as text."""
    lines, unit = ["# TYPE %s %s" % (name, kind)], name.rpartition("_")[2]
    lines += ["# UNIT %s %s" % (name, unit)] if unit in ("seconds", "bytes") else []
    lines += ["# HELP %s %s" % (name, text)]
    for suffix, labels, value in samples:
        pairs = ",".join('%s="%s"' % (x, escaped(y)) for x, y in labels.items())
        where = "{%s}" % pairs if pairs else ""
        lines.append("%s%s%s %s" % (name, suffix, where, value))
    return "\n".join(lines) + "\n"


def escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def process(started: float) -> Iterator[Metric]:
    """By the names that all exporters have; of Linux what /proc tells."""
    used: List[Sample] = [("_total", {}, time.process_time())]
    yield "process_cpu_seconds", "counter", "Of user and system.", used
    found = [("start_time_seconds", "When it began.", started)]
    with contextlib.suppress(OSError, ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        found += [("max_fds", "Descriptors that may be open.", limit)]
        count = len(os.listdir("/proc/self/fd")) - 1  # one of them is to list them
        found += [("open_fds", "Descriptors that are open.", count)]
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[1]) * resource.getpagesize()
        found += [("resident_memory_bytes", "In memory.", size)]
    for name, text, value in found:
        yield "process_" + name, "gauge", text, [("", {}, value)]


# -----------------------------------------------------------------------------------
# Admin: what operators see, on a port of its own. It changes nothing, so whoever
# reaches the port may read it, as with all exporters. A page of another origin may not:
# the browser keeps the answer from it, and a name that leads here by a trick (DNS
# rebinding) is none of ours.
# -----------------------------------------------------------------------------------
ADMIN_HOST = "127.0.0.1"  # where --admin says only a port
METRICS_KIND = "application/openmetrics-text; version=1.0.0; charset=utf-8"
HTML_KIND = "text/html; charset=utf-8"
SHOWN_IDS = 100  # on the page, and of each so many services: to make it takes time
SHOWN_SERVICES = 12
SLOW = 0.25  # seconds of a turn that visitors notice
ADMIN_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mdm-tunnel: numbers</title>
<link rel="icon" href="data:,">
<noscript><meta http-equiv="refresh" content="5"></noscript>
<style>%s</style></head><body>
<header id="state">%s</header>
<section id="tiles" class="tiles">%s</section>
<section id="curves" class="curves">%s</section>
<h2>Clients</h2>
<table id="links" class="links">%s</table>
<h2>Last requests</h2>
<table id="last" class="last">%s</table>
<footer><a href="/metrics">/metrics</a> <a href="/healthz">/healthz</a></footer>
<script>%s</script></body></html>
"""
ADMIN_STYLE = """
:root { color-scheme: light dark; --line: #e4e7eb; --soft: #667080; --text: #1b212b;
  --back: #f6f7f9; --card: #fff; --one: #2c5fc0; --two: #95590a; --good: #17713d;
  --warn: #a06200; --bad: #c8342c }
@media (prefers-color-scheme: dark) { :root { --line: #2a303a; --soft: #8e99a8;
  --text: #dde3ea; --back: #12161c; --card: #191e26; --one: #6f9cf0; --two: #e0a35a;
  --good: #58c08a; --warn: #e0b050; --bad: #f27a70 } }
* { box-sizing: border-box }
body { font: 14px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  max-width: 1400px; margin: 0 auto; padding: 20px 24px; color: var(--text);
  background: var(--back) }
header { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline }
h1 { font-size: 20px; margin: 0 } h1 + b { flex: 1 } b { font-weight: 600 }
h2 { font-size: 14px; margin: 22px 0 8px }
small, th, header, footer, dt, dd + dd, figure p, .t { color: var(--soft);
  font-size: 12px }
h1, p b { color: var(--text) }
a { color: var(--one); text-decoration: none } a:hover { text-decoration: underline }
footer { margin-top: 16px } footer a, .what > * { margin-right: 12px }
.tiles, .curves { display: grid; gap: 10px; margin-top: 10px;
  grid-template-columns: repeat(8, 1fr) } .curves { grid-template-columns: 1fr 1fr }
dl, figure, table { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; margin: 0 } dl, figure { padding: 9px 12px } dd { margin: 0 }
dd b { font-size: 20px; line-height: 1.35; white-space: nowrap }
figure p { display: flex; gap: 14px; margin: 0 } p > :first-child { flex: 1 }
i { font-style: normal } i::before { content: "\\25cf  " }
svg { display: block; width: 100%; height: 110px; margin: 6px 0 2px;
  border-bottom: 1px solid var(--line) }
path { fill: currentColor; opacity: .75 } path + path { opacity: 1 }
rect { fill: transparent } rect:hover { fill: rgba(127, 127, 127, .2) }
table { width: 100%; border-collapse: separate; border-spacing: 0 }
th { text-align: left; font-weight: 400 }
th, td { padding: 5px 12px; vertical-align: baseline; overflow-wrap: anywhere }
td { border-top: 1px solid var(--line) } .n { white-space: nowrap }
.links tr > :nth-child(n+5), .last tr > :nth-child(n+6) { text-align: right }
.what { width: 34% } .last .what { width: 45% } .what small { margin: 0 0 0 8px }
.off { color: var(--soft); text-align: center; padding: 22px } .st { font-weight: 600 }
.s0, .s1, .s3, .one { color: var(--one) } .s2, .good { color: var(--good) }
.two { color: var(--two) } .s4, .warn { color: var(--warn) } .s5 { color: var(--bad) }
.gone #state b { font-size: 0 } .gone b::after { color: var(--bad); font-size: 12px;
  content: "no answer" }
@media (max-width: 900px) { .tiles { grid-template-columns: repeat(4, 1fr) } }
@media (max-width: 640px) { body { padding: 14px } thead, td:empty { display: none }
  .tiles { grid-template-columns: 1fr 1fr } .curves { grid-template-columns: 1fr }
  tr { display: flex; flex-wrap: wrap; gap: 0 10px; padding: 7px 12px }
  tr + tr { border-top: 1px solid var(--line) }
  td { padding: 0; border: 0; font-size: 12px } .off { margin: auto }
  td:not(.st) { color: var(--soft) }
  .what, .id, .st { font-size: 14px } td.what, td.id { color: var(--text) }
  .links .what { order: 1; width: 100% } td[title]::before { content: attr(title) " " }
  .last .st { order: -2 } .last .what { order: -1; flex: 1 0 80%; width: auto } }
"""
# What has not changed stays, so nothing flickers, and what is selected stays selected.
ADMIN_SCRIPT = """
async function refresh() {
  try {
    if (!document.hidden) {
      const answer = await fetch("/");
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of page.querySelectorAll("body > [id]")) {
        const old = document.getElementById(part.id);
        if (old.innerHTML !== part.innerHTML) old.innerHTML = part.innerHTML;
      }
      document.body.className = "";
    }
  } catch (error) { document.body.className = "gone" }
  setTimeout(refresh, 2000);
}
setTimeout(refresh, 2000);
"""


class AdminSite(Site):
    """What the port of --admin serves. Its connections are none of the visitors', so
    nobody counts or logs them, and a drain does not wait for them; but they, too, may
    go where room is short."""

    kind = "admin"

    def __init__(self, server: "Server", sock: Any, address: Tuple[str, int]) -> None:
        super().__init__(server, "http")
        self.visitors = Visitors(server.loop)
        self.visitors.idle = server.visitors.idle
        self.name = address[0].lower()
        self.numbers = Numbers(server)
        self.port = Port(sock, self.visitors, self.serve)
        self.html = AdminPage(self.numbers)
        policy = "default-src 'none'; img-src data:; connect-src 'self'; "
        policy += "style-src '%s'; script-src '%s'; base-uri 'none'; "
        policy += "form-action 'none'; frame-ancestors 'none'"
        hashes = csp_hash(ADMIN_STYLE), csp_hash(ADMIN_SCRIPT)
        self.fields = [
            ("Content-Security-Policy", policy % hashes),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
        ]

    def tell(self) -> None:
        import ipaddress

        host, port = self.port.address
        url = "http://%s:%d/" % ("[%s]" % host if ":" in host else host, port)
        log.info("numbers on %s", url)
        if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            log.warning("numbers: whoever reaches port %d may read them", port)

    def close(self) -> None:
        """The last is said: no connection here may hold up the end."""
        self.visitors.stopping = True
        self.port.close()
        for http in list(self.visitors.all):
            http.close(Ending.CLOSE)

    def resolve(self, request: Request) -> Page:
        """A page. Raises HTTPError."""
        name, path = request.name.strip("[]"), request.target.partition("?")[0]
        if name not in ("localhost", self.name) and not read_address(name):
            cause = "this port is asked by its address, or by its name in --admin"
            raise HTTPError(403, "denied", cause)
        origin = request.headers.get("origin")
        if origin is not None and origin.lower() != "http://" + request.host.lower():
            raise HTTPError(403, "denied", "pages of other origins may not ask here")
        make = {"/": self.show, "/metrics": self.tell_metrics, "/healthz": self.health}
        if path not in make:
            raise HTTPError(404, "no-page", "here are /, /metrics and /healthz")
        if request.method not in ("GET", "HEAD"):
            cause = "%s can only be read" % path
            raise HTTPError(405, "method", cause, [("Allow", "GET, HEAD")])
        return make[path](request)._replace(fields=self.fields)

    def page(self, error: Exception, request: Optional[Request]) -> Page:
        found = super().page(error, None)
        return found._replace(fields=[*found.fields, *self.fields])

    def health(self, request: Request) -> Page:
        if self.server.visitors.stopping:
            return Page(503, "draining", "", [""], file=b"draining\n")
        return Page(200, "", "", [], file=b"ok\n")

    def tell_metrics(self, request: Request) -> Page:
        kind = "" if request.wants_html() else METRICS_KIND  # a browser would save it
        return Page(200, "", "", [], file=self.numbers.metrics(), kind=kind)

    def show(self, request: Request) -> Page:
        return Page(200, "", "", [], file=self.html.make(), kind=HTML_KIND)


def csp_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style (CSP 3, 2.3.1)."""
    import base64
    import hashlib

    digest = hashlib.sha256(text.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def safe(text: Any) -> str:
    """What comes from outside, in HTML."""
    import html

    return html.escape(printable(str(text)))


class AdminPage:
    """Makes the page, from the numbers and what is here now."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers, self.loop = numbers, numbers.loop
        self.registry = numbers.server.registry

    def make(self) -> bytes:
        parts = self.state(), self.tiles(), self.curves(), self.links(), self.last()
        return (ADMIN_PAGE % (ADMIN_STYLE, *parts, ADMIN_SCRIPT)).encode()

    def state(self) -> str:
        stopping = self.numbers.server.visitors.stopping
        state = ("warn", "draining") if stopping else ("good", "running")
        since = short_time(time.time() - self.numbers.started)
        text = '<h1>mdm-tunnel</h1><b class="%s">%s</b><span>version %s</span>'
        text += "<span>up %s</span><span>%s</span>"
        return text % (*state, VERSION, since, time.strftime("%H:%M:%S"))

    def tiles(self) -> str:
        """The figures of now; a rate is that of the last ten to twenty seconds."""
        numbers, links = self.numbers, self.loop.links
        visitors, streams = map("{:,}".format, (numbers.visitors(), numbers.streams()))
        samples, total, longest = numbers.samples, numbers.total(), max(numbers.turns)
        rate = rate_between(samples[max(0, len(samples) - 2)], total)
        failed = total[2] - samples[0][2]
        trip = "round trip " + trip_time(max([x.round_trip for x in links], default=0))
        refused = sum(self.registry.refused.values())
        sent, received = [short_size(int(x)) + "/s" for x in rate[2:]]
        rows = [
            ("", "Requests", short_rate(rate[0]), "{:,} in all".format(total[1])),
            ("s5" * bool(failed), "Errors 5xx", "{:,}".format(failed), "in 10 minutes"),
            ("", "Sent", sent, short_size(total[3]) + " in all"),
            ("", "Received", received, short_size(total[4]) + " in all"),
            ("", "Visitors", visitors, "connections"),
            ("", "Streams", streams, "links: %d" % len(links)),
            ("", "Ids", len(self.registry.pools), "%d logins refused" % refused),
            ("s5" * (longest > SLOW), "Longest turn", short_time(longest), trip),
        ]
        form = '<dl><dt>%s</dt><dd><b class="%s">%s</b></dd><dd>%s</dd></dl>'
        return "".join(form % (name, kind, x, y) for kind, name, x, y in rows)

    def curves(self) -> str:
        """The last ten minutes, a point for each ten seconds; now is on the right."""
        samples = list(self.numbers.samples)
        rates = [rate_between(*pair) for pair in zip(samples, samples[1:])]
        asked, failed, sent, received = zip(*rates) if rates else [()] * 4
        curves = ("one", "all", asked), ("s5", "5xx", failed)
        found = figure("Requests", curves, short_rate)
        curves = ("one", "sent", sent), ("two", "received", received)
        return found + figure("Bytes", curves, byte_rate)

    def links(self) -> str:
        """The links, with the services of their ids; then who is not here."""
        sums, tokens = self.numbers.by_id(), self.registry.tokens
        links = [link for link in self.loop.links if link.owner.id]
        links.sort(key=lambda link: (link.owner.id, link.owner.since))
        shown, none = [link.owner for link in links[:SHOWN_IDS]], [0, 0, 0, 0]
        rows = [self.row(tunnel, sums.get(tunnel.id, none)) for tunnel in shown]
        rows = rows or ['<tr><td class="off" colspan="8">No client is connected.']
        absent = sorted(set(tokens.value if tokens else ()) - set(self.registry.pools))
        if absent:
            names = safe(", ".join(absent[:SHOWN_IDS]))
            rows.append('<tr><td class="off" colspan="8">Not connected: ' + names)
        heads = "Id|Services|From|Connected|Round trip|Streams|Requests|Sent / received"
        return table(heads, rows)

    def row(self, tunnel: Tunnel, sums: List[int]) -> str:
        """A link, with the sums of its id."""
        link, pool = tunnel.link, self.registry.pools.get(tunnel.id)
        here = pool and pool.tunnel is tunnel
        services = self.services(pool) if pool and here else "<span>leaving</span>"
        cells = (
            ("from", safe(tunnel.address)),
            ("for", short_time(self.loop.clock() - tunnel.since)),
            ("round trip", trip_time(link.round_trip)),
            ("streams", len(link.streams)),
            ("requests", "{:,}".format(sums[0])),
            ("bytes", "%s / %s" % (short_size(sums[2]), short_size(sums[3]))),
        )
        text = '<tr><td class="id"><b>%s</b><td class="what">%s'
        form, id = '<td class="n" title="%s">%s', safe(tunnel.id)
        return text % (id, services) + "".join(form % cell for cell in cells)

    def services(self, pool: Pool) -> str:
        found, shown = pool.services, []
        url = self.registry.names.url(pool.id, "%s", pool.tunnel.host)
        for name in sorted(found)[:SHOWN_SERVICES]:
            form, where = '<span title="%s">%s</span>', url.replace("%s", name)
            try:
                where = self.registry.way_to(found[name], pool.tunnel, where)
            except ValueError as error:
                where = str(error)
            if where.startswith("http"):
                form, where = '<a href="%s" rel="noreferrer">%s</a>', where.split()[0]
            shown.append(form % (safe(where), safe(name)))
        more = len(found) - SHOWN_SERVICES
        shown += ["<span>and %d more</span>" % more] if more > 0 else []
        return "".join(shown) or "<span>none</span>"

    def last(self) -> str:
        rows = list(map(request_row, reversed(self.numbers.recent)))
        rows = rows or ['<tr><td class="off" colspan="7">No requests yet.']
        return table("Time|Status|Request|Service|Visitor|Size|Took", rows)


def table(names: str, rows: List[str]) -> str:
    heads = "".join("<th>%s" % name for name in names.split("|"))
    return "<thead><tr>%s<tbody>%s" % (heads, "".join(rows))


def request_row(told: Tuple[Any, ...]) -> str:
    """One of the last requests."""
    at, visitor, id, service, method, target, cause = told[:7]
    status, code, _, sent, _, took = told[7:]
    clock = time.strftime("%H:%M:%S", time.localtime(at))
    why = safe(": ".join(filter(None, (code, cause))))
    what = safe("%s %s" % (method[:20], target)) + "<small>%s</small>" % why * bool(why)
    form = '<tr><td class="t">%s<td class="st s%d">%s<td class="what">%s<td>%s'
    form += '<td class="t">%s<td class="n">%s<td class="n">%s'
    cells = clock, status // 100, status or "end", what
    where = safe(("%s %s" % (id, service)).strip()), safe(visitor)
    return form % (*cells, *where, short_size(sent), short_time(took))


def trip_time(seconds: float) -> str:
    """0.0 is not known yet."""
    return "%.1fms" % (seconds * 1000) if seconds < 0.01 else short_time(seconds)


def short_rate(rate: float) -> str:
    return ("%.0f/s" if rate >= 9.95 or not rate else "%.1f/s") % rate


def byte_rate(rate: float) -> str:
    return short_size(int(rate)) + "/s"


def figure(title: str, curves: Any, say: Call) -> str:
    """A chart of 600 by 100 units, of which a point is 10 wide; the second of `curves`,
    which are colour, name, values, has narrow bars. Where the pointer rests it tells
    the values."""
    top, factors = 1.0, itertools.cycle((2, 2.5, 2))
    while top < max([x for _, _, values in curves for x in values], default=0):
        top *= next(factors)
    head, drawn = "<figure><p><b>%s</b>" % title, ""
    ago = range(len(curves[0][2]))[::-1]
    for width, (colour, name, values) in zip((8, 4), curves):
        head += '<i class="%s">%s</i>' % (colour, name)
        bars = [(595 - 10 * n - width / 2, 98 * x / top) for n, x in zip(ago, values)]
        path = "".join("M%d,100v-%.1fh%dV100z" % (x, y, width) for x, y in bars)
        drawn += '<path class="%s" d="%s"/>' % (colour, path)
    form = '<rect x="%d" width="10" height="100"><title>%s  %s</title></rect>'
    for n, *values in zip(ago, *(values for _, _, values in curves)):
        clock = time.strftime("%H:%M:%S", time.localtime(time.time() - SAMPLE_TIME * n))
        drawn += form % (590 - 10 * n, clock, ", ".join(map(say, values)))
    head += '<span>%s</span></p><svg viewBox="0 0 600 100" preserveAspectRatio="none">'
    foot = "</svg><p><span>10 minutes ago</span><span>now</span></p></figure>"
    return "".join((head % say(top), drawn, foot))


# -----------------------------------------------------------------------------------
# Files of the server: tokens, and the certificate with its key.
# -----------------------------------------------------------------------------------
class Grant(NamedTuple):
    """What the file of --tokens says of an id."""

    token: str
    domains: Tuple[str, ...] = ()  # that its services may have


def parse_tokens(data: bytes) -> Dict[str, Grant]:
    """The file of --tokens, {"tim": "secret"}. Raises ValueError, which names the id
    that is wrong, and no token."""
    grants: Dict[str, Grant] = {}
    for id, value in parse_object(data):
        try:
            if not LABEL.fullmatch(id.lower()):
                raise ValueError("an id has letters, digits, `-` and `_`, and no `--`")
            if id.lower() in grants:
                raise ValueError("the id stands there twice")
            grants[id.lower()] = parse_grant(value)
        except ValueError as error:
            raise ValueError("id %r: %s" % (id, error)) from None
    return grants


def parse_grant(value: Any) -> Grant:
    """A token, or {"token": one, "domains": a list}. Raises ValueError."""
    if not isinstance(value, Pairs):
        return Grant(check_token(value))
    said = dict(value)
    if len(said) < len(value) or set(said) - {"token", "domains"}:
        raise ValueError('an object here holds "token" and "domains", each once')
    return Grant(check_token(said.get("token")), read_domains(said.get("domains", [])))


def read_domains(value: Any) -> Tuple[str, ...]:
    """A list of domains, some perhaps like *.example.org. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError('domains is a list like ["www.example.org"]')
    domains = [str(domain).rstrip(".").lower() for domain in value]
    for domain in domains:
        name = domain[2:] if domain.startswith("*.") else domain
        if not SERVER_NAME.fullmatch(name) or "." not in name:
            raise ValueError("%r is no domain" % domain)
    return tuple(domains)


def open_file(paths: List[str], parse: Callable[..., Any]) -> Watched:
    """Files that must be there. Raises ValueError, which names what is wrong."""
    try:
        return Watched(paths, parse)
    except (OSError, ValueError) as error:
        raise ValueError(blame(error, paths)) from None


def open_tls(cert: Optional[str], key: Optional[str]) -> Optional[Watched]:
    """The TLS context of new connections, from files. Raises ValueError."""
    if cert is None:
        if key is not None:
            raise ValueError("--tls-key needs its certificate, --tls-cert")
        return None
    return open_pair([cert, key or cert])


def open_pair(paths: List[str]) -> Watched:
    """The TLS context of a certificate and its key. Raises ValueError."""

    def parse(*contents: bytes) -> Any:
        for path, held, what in zip(paths, contents, ("certificate", "private key")):
            if what.upper().encode() + b"-----" not in held:
                raise ValueError("no %s in %s" % (what, path))
        if b"ENCRYPTED" in contents[1]:
            raise ValueError("the key is encrypted, and there is nobody to ask")
        return make_context(*paths)

    return open_file(paths, parse)


class Certificates:
    """The TLS contexts: that of --tls-cert, and those of the names in --tls-dir, which
    holds NAME.crt and NAME.key. A file is looked at when its name is asked for, so
    there may be many. One that is broken counts as missing, with a warning; at the
    start it is a ValueError."""

    def __init__(self, default: Optional[Watched], folder: Optional[str]) -> None:
        self.default, self.folder = default, folder
        # What each name had when it was looked at, and when that was; None: broken.
        self.found: Dict[str, Tuple[Optional[Watched], float]] = {}
        try:
            names = sorted(os.listdir(folder)) if folder else []
        except OSError as error:
            raise ValueError(blame(error, [str(folder)])) from None
        stems = [name[:-4] for name in names if name.endswith(".crt")]
        if folder and default is None and not stems:
            raise ValueError("%s holds no NAME.crt" % folder)
        self.paths = [path for stem in stems for path in self.pair(stem)]
        for stem in stems:
            self.found[stem] = open_pair(self.pair(stem)), 0.0  # looked at long ago

    def pair(self, stem: str) -> List[str]:
        return [os.path.join(str(self.folder), stem + end) for end in (".crt", ".key")]

    def find(self, name: str) -> Any:
        """The context for a host name that was asked for; None when there is none."""
        file = self.find_file(name)
        return file.value if file else None

    def find_file(self, name: str) -> Optional[Watched]:
        wildcard = "_wildcard." + name.partition(".")[2]
        for stem in (name, wildcard) if self.folder and name else ():
            file = self.look(stem)
            if file:
                return file
        return self.default

    def pem(self, name: str) -> bytes:
        """The certificate that we show who dials us by this name; b"" for none."""
        file = self.find_file("" if ADDRESS.fullmatch(name) else name)
        return file.contents[0] if file and file.contents else b""

    def pin(self, name: str) -> str:
        """Its fingerprint, or ""."""
        with contextlib.suppress(ValueError):
            return fingerprint(self.pem(name))
        return ""

    def option(self, name: str) -> str:
        """What a client adds that dials us by this name: the fingerprint, if no
        authority vouches for the certificate."""
        alone = is_self_signed(self.pem(name))
        return " --fingerprint " + self.pin(name) if alone else ""

    def any(self) -> Any:
        """Some context, to say something at all."""
        files = [file for file, _ in self.found.values() if file]
        return files[0].value if files else None

    def read_again(self) -> None:
        """Every pair that was found so far; a new one is read when it is asked for."""
        for stem in list(self.found):
            self.look(stem, asked=True)

    def look(self, stem: str, asked: bool = False) -> Optional[Watched]:
        """The file pair of a name, as it is now or, if nobody `asked`, a second ago.
        (The name comes from outside; SERVER_NAME holds no `/`.)"""
        known, now = self.found.get(stem), time.monotonic()
        if known and now - known[1] < LOOK_TIME and not asked:
            return known[0]
        if not os.path.exists(self.pair(stem)[0]):
            self.found.pop(stem, None)
            return None
        file = known[0] if known else None
        try:
            file = file or open_pair(self.pair(stem))
            if file.look(asked):
                log.info("changed: %s", file)
        except ValueError as error:
            log.warning("%s", error)
        self.found[stem] = file, now
        return file


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


def first_certificate(cert: bytes) -> str:
    """The first certificate of a PEM file. Raises ValueError."""
    end = b"-----END CERTIFICATE-----"
    text = cert[cert.find(b"-----BEGIN CERTIFICATE-----") : cert.find(end)] + end
    return text.decode("ascii")


def fingerprint(cert: bytes) -> str:
    """The SHA-256 of the first certificate of a PEM file, as openssl writes it."""
    import hashlib
    import ssl

    der = ssl.PEM_cert_to_DER_cert(first_certificate(cert))
    digest = hashlib.sha256(der).hexdigest()
    return ":".join(re.findall("..", digest.upper()))


@functools.lru_cache(maxsize=64)
def is_self_signed(cert: bytes) -> bool:
    """Whether only its fingerprint tells that this certificate is the right one. ssl
    shows the issuer of authorities alone, and what `openssl req -x509` makes is one."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=first_certificate(cert))
    except (OSError, ValueError):
        return False
    return any(x["issuer"] == x["subject"] for x in context.get_ca_certs())


def parse_client(data: bytes) -> Tuple[bytes, str, str]:
    """The client's file, its SHA-256 and its version. Raises ValueError: what is copied
    there just now may be half of it."""
    import hashlib

    version = re.search(rb'(?m)^VERSION = "([\w.]+)"', data)
    whole = data.rstrip().endswith(b"    main()")
    if not version or not whole or len(data) > CLIENT_LIMIT:
        raise ValueError("no whole client of at most %d bytes" % CLIENT_LIMIT)
    return data, hashlib.sha256(data).hexdigest(), version.group(1).decode()


# -----------------------------------------------------------------------------------
# Privileges: root may open port 443; another user then serves.
# -----------------------------------------------------------------------------------
def find_user(name: str) -> Any:
    """Look a user up before anything else begins. Raises ValueError."""
    try:
        import pwd

        user = pwd.getpwnam(name)
    except (ImportError, KeyError):
        raise ValueError("there is no user %r here" % name) from None
    if user.pw_uid == 0:
        raise ValueError("%s would keep all rights; name another user" % name)
    return user


def drop_privileges(user: Any, paths: List[str]) -> None:
    """Give up root's rights for good, and those of its groups. The user must be able to
    read the files, which are read again when they change. Raises OSError."""
    # Modules that are imported later may lie where only root can read.
    import base64  # noqa: F401
    import hashlib  # noqa: F401
    import hmac  # noqa: F401
    import html  # noqa: F401
    import http  # noqa: F401
    import ipaddress  # noqa: F401
    import random  # noqa: F401
    import shlex  # noqa: F401
    import traceback  # noqa: F401

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


# -----------------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------------
class Config(NamedTuple):
    """What the command line says; the option of the same name explains each."""

    port: int = 8000
    client_port: int = 8001
    bind: Optional[str] = None
    domain: str = ""
    tokens: Optional[str] = None
    tls_cert: Optional[str] = None
    tls_key: Optional[str] = None
    tls_port: Optional[int] = None
    tls_dir: Optional[str] = None
    tcp_ports: Any = range(0)
    redirect: bool = False
    trust_proxy: Any = ()
    proxy_protocol: bool = False
    user: Optional[str] = None
    verbose: int = 0
    log_json: bool = False
    landing: bool = True
    drain: float = DRAIN
    admin: Optional[Tuple[str, int]] = None


def port_number(text: str) -> int:
    if not (text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError("%r is no port: 0 to 65535" % text)
    return int(text)


def port_range(text: str) -> range:
    """A-B, or one port."""
    first, dash, last = text.partition("-")
    ports = range(port_number(first), port_number(last if dash else first) + 1)
    if not ports or ports[0] == 0:
        raise argparse.ArgumentTypeError("%r is no range like 20000-20099" % text)
    return ports


def admin_address(text: str) -> Tuple[str, int]:
    """[HOST:]PORT; an address of IPv6 stands in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon:
        return ADMIN_HOST, port_number(port)
    host = host[1:-1] if re.fullmatch(r"\[[^][]+]", host) else host
    if not host or ":" in host and text[0] != "[" or "[" in host:
        cause = "%r is no address: 9100, 127.0.0.1:9100 or [::1]:9100" % text
        raise argparse.ArgumentTypeError(cause)
    return host, port_number(port)


def networks(text: str) -> List[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    try:
        Networks(found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found


def domains(text: str) -> str:
    try:
        parse_domains(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse_arguments(argv: Optional[List[str]]) -> Config:
    options = make_parser().parse_args(argv)
    if options.print_unit:
        print_server_unit(argv, options)
        sys.exit(0)
    del options.print_unit
    return Config(**vars(options))


def print_server_unit(argv: Optional[List[str]], options: argparse.Namespace) -> None:
    """Its user reads the certificates and tokens also when they change, so that
    systemd's credentials, which are copies, would not do."""
    names = ["tokens", "tls_cert", "tls_key", "tls_dir"]
    given = [getattr(options, name) for name in names]
    paths = [os.path.abspath(path) for path in given if path is not None]
    words = typed_words(make_parser(), argv, names)
    if options.user is not None:  # which needs no root's rights first
        at = words.index("--user")
        del words[at : at + 2]
    ports = [options.port, options.client_port, options.tls_port or 0]
    low = any(0 < port < 1024 for port in [*ports, *options.tcp_ports[:1]])
    capability = "CAP_NET_BIND_SERVICE" if low else ""
    more = owner_lines(paths, options.user) + ["CapabilityBoundingSet=" + capability]
    more += ["AmbientCapabilities=" + capability] if low else []
    print_unit(words, options.drain, [], more)


def make_parser() -> Parser:
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
    add_tls_options(add)
    add("--tcp-ports", type=port_range, default=range(0), metavar="A-B",
        help='ports that services with "tcp" may have (none)')  # fmt: skip
    add("--redirect", action="store_true",
        help="send visitors without TLS to the port with it")  # fmt: skip
    add("--tokens", metavar="FILE",
        help='the token of each id, as {"id": "token"}; without it any client gets a '
        "free id")  # fmt: skip
    add("--trust-proxy", type=networks, default=(), metavar="CIDR,...",
        help="believe X-Forwarded-For, -Proto and -Host from these addresses")
    add("--proxy-protocol", action="store_true",
        help="every connection, on every port, comes from such an address and begins "
        "with a PROXY header")  # fmt: skip
    add("--no-landing", action="store_false", dest="landing",
        help="at its own name neither say how to begin nor hand out the client")
    add_running_options(add)
    return parser


def add_running_options(add: Call) -> None:
    """How it runs, and what is seen of it."""
    add("--admin", type=admin_address, metavar="[HOST:]PORT",
        help="/metrics, /healthz and a page for operators, by http; whoever reaches it "
        "may read it (HOST is 127.0.0.1)")  # fmt: skip
    add("--user", metavar="NAME",
        help="once the ports are open, go on as this user, not as root")  # fmt: skip
    add("--drain", type=drain_time, default=DRAIN, metavar="SECONDS",
        help="after SIGTERM let what runs go on for so long (%(default)g)")  # fmt: skip
    add("--print-unit", action="store_true",
        help="print a unit of systemd for just these options, and end")  # fmt: skip
    add("-v", "--verbose", action="count", default=0,
        help="say what happens, on stderr; -vv: every frame")  # fmt: skip
    add("--log-json", action="store_true", help="the same, each line a JSON object")
    add("-V", "--version", action="version", version=VERSION)


def add_tls_options(add: Call) -> None:
    add("--tls-cert", metavar="FILE", help="certificate chain: clients dial by TLS")
    add("--tls-key", metavar="FILE", help="its key, if that is not in the same file")
    add("--tls-port", type=port_number, metavar="PORT",
        help="port for visitors by TLS; may be that for clients")  # fmt: skip
    add("--tls-dir", metavar="DIR",
        help="holds NAME.crt and NAME.key, also _wildcard.NAME.crt: the certificates "
        "of the names that are asked for")  # fmt: skip


def main(argv: Optional[List[str]] = None, router: Optional[Router] = None) -> None:
    """Serve until a signal. Exit status: 0, 1 (a port is taken) or 2 (usage)."""
    survive_hangup()
    config = parse_arguments(argv)
    set_up_log(config.verbose, config.log_json)
    try:
        user = None if config.user is None else find_user(config.user)
        server = Server(config, router)
    except OSError as error:
        die(1, "cannot listen on %s" % (error.strerror or error))
    except ValueError as error:
        die(2, error)
    server.manager.connect(os.environ)
    if user is not None:
        try:
            paths = [path for file in server.files for path in file.paths]
            paths += server.certificates.paths
            server.landing.look()  # while it can be read
            drop_privileges(user, paths)
        except OSError as error:
            die(1, "cannot become %s: %s" % (config.user, error.strerror or error))
    ignore_signals()
    server.loop.catch_signals(server.on_signal)
    server.run()


if __name__ == "__main__":
    main()
