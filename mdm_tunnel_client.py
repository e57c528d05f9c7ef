#!/usr/bin/env python3
"""mdm-tunnel client: the end behind the NAT of a reverse tunnel, in one file.

    python3 mdm_tunnel_client.py -v -h example.com -i tim web=9000

dials the server at example.com, logs in as tim, and joins what comes for the service
web to port 9000 of this machine. Without `web=9000` the services come from the file
$HOME/.tunnel-services.json: {"hello-world": 9000, "websockets": 9001}.

    visitor --> server ==Link==> Stream --> Bridge, then Pipe --> Connection --> service

How to read it. Part one carries a request. What the server has too comes first (read it
in either file): Protocol, Frames, Loop, Connection, Stream and Link, Pipe. Then:

    Services         what is published, and where it listens
    Dial             connect, TLS, ask: the steps to a target or to the server
    Bridge           a stream that waits for its target
    Tunnel           one link: login, services, new streams
    Whereabouts      has the machine moved, or slept?
    Uplink           dials, has a tunnel, dials again
    Client           all of it, and how it stops

Part two keeps it up: Secrets, TLS, Files, Limits, Log, Outcome, Service manager, Unit,
Resolver, PROXY protocol, Proxies, URL file, Check, Inspector, Command line. Part one
knows nothing of HTTP, so any protocol passes. Nothing here needs more than the standard
library of Python 3.6.
"""

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
# Services: what is published, by name, and where it listens.
# -----------------------------------------------------------------------------------
Service = collections.namedtuple("Service", "target options")  # which the server keeps
LOOPBACK = re.compile(  # what is sent there does not leave this machine
    r"(?i)localhost|::1|127(\.(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){3}"
)
HOST = re.compile(  # [::1] or nas, and perhaps a port; or ::1, which can have none
    r"(?:\[([^]]+)\]|([^:[]+))(?::([0-9]+))?|((?:[^:[]*:){2}[^[]*)"
)


class Target(NamedTuple):
    """Where a dial leads. `tls` is what StartTLS takes; None goes without it."""

    text: str
    host: str
    port: int  # 0: host is the path of a unix socket
    tls: Optional[Tuple[Any, str, bytes]] = None


def split_host(text: str, port: int) -> Tuple[str, int]:
    """`host`, `host:port`, `[::1]:port` or `::1`, with a default for the port. Raises
    ValueError."""
    match = HOST.fullmatch(text)
    if match is None or set(text) & set("=/@ "):
        raise ValueError("%r is neither host, host:port nor [address]:port" % text)
    bracketed, name, number, address = match.groups()
    port = int(number or port)
    if not 0 < port < 1 << 16:
        raise ValueError("%d is no port: 1 to 65535" % port)
    return bracketed or name or address, port


def split_url(text: str) -> Tuple[str, str]:
    """The scheme, or "", and what a URL without a path has behind it. Raises
    ValueError."""
    scheme, found, rest = text.rpartition("://")
    if not found:
        return "", text
    rest = rest[:-1] if rest.endswith("/") else rest
    if scheme.lower() not in ("http", "https") or "/" in rest:
        raise ValueError("%r is not like http://host:port, without a path" % text)
    return scheme.lower(), rest


def parse_target(value: Any, ca: Any = None, fingerprint: Any = None) -> Target:
    """9000, "host:port", "http://host:port", the same with https, or "unix:/path".
    Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("a target is a port, host:port, https://host or unix:/path")
    scheme, text = "", str(value)
    if not text.startswith("unix:"):
        scheme, text = split_url(text)  # dev servers print their URL
    if scheme != "https" and (ca, fingerprint) != (None, None):
        raise ValueError('ca and fingerprint are for a target like "https://nas:8443"')
    if scheme:
        host, port = split_host(text, 443 if scheme == "https" else 80)
        text = "%s:%d" % ("[%s]" % host if ":" in host else host, port)
        if scheme == "https":
            return Target(text, host, port, target_tls(host, ca, fingerprint))
    if text.isdigit():
        return Target("127.0.0.1:" + text, *split_host("localhost:" + text, 0))
    if text.startswith("unix:/"):
        if not hasattr(socket, "AF_UNIX"):
            raise ValueError("this system has no unix sockets")
        return Target(text, text[5:], 0)
    if ":" not in text:
        raise ValueError("%r is neither a port, host:port nor unix:/path" % value)
    return Target(text, *split_host(text, 0))


def target_tls(host: str, ca: Any, fingerprint: Any) -> Tuple[Any, str, bytes]:
    """The context for an https target, its name, and the fingerprint wanted. A target
    on this machine is verified only if that is asked for. Raises ValueError."""
    if not all(isinstance(said, (str, type(None))) for said in (ca, fingerprint)):
        raise ValueError("ca is a file, and fingerprint a SHA-256")
    try:
        pin = b"" if fingerprint is None else parse_fingerprint(fingerprint)
    except argparse.ArgumentTypeError as error:
        raise ValueError("fingerprint: %s" % error) from None
    known = ca is None and bool(pin or LOOPBACK.fullmatch(host))
    try:
        context = shared_context(ca, known, b"" if ca is None else read_file(ca))
    except (OSError, ValueError) as error:
        raise ValueError(blame(error, [str(ca)])) from None
    import ssl

    name = host.partition("%")[0]  # an address without its interface
    try:
        name.encode("idna")
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), False, name)
    except (OSError, ValueError, TypeError):
        raise ValueError("%.80r is no name for TLS" % name) from None
    return context, name, pin


@functools.lru_cache(maxsize=32)
def shared_context(ca: Optional[str], known: bool, contents: bytes) -> Any:
    """One for all services with the same `contents` of the file `ca`: the system's
    authorities take 20 ms to load, and megabytes."""
    return make_context(ca, known)


def parse_service(value: Any) -> Service:
    """A target, or {"target": one, and options}. Raises ValueError."""
    if not isinstance(value, (dict, Pairs)):
        return Service(parse_target(value), {})
    options = dict(value)
    ours = ["target", "ca", "fingerprint"]  # the server is not told of the last two
    for name in sorted(set(options) - {*ours, *OPTIONS}):
        import difflib

        near = difflib.get_close_matches(name, [*ours, *OPTIONS], 1)
        hint = "; is it %r?" % near[0] if near else ""
        raise ValueError("unknown option %r%s" % (name, hint))
    if len(value) > len(options):
        raise ValueError("an option stands there twice")
    if "target" not in options:
        raise ValueError("no target")
    target = parse_target(*(options.pop(name, None) for name in ours))
    if "auth" in options and ("tcp" in options or "tls" in options):
        raise ValueError("auth is for HTTP: it cannot guard tcp, or TLS of your own")
    said = {name: OPTIONS[name](given, target) for name, given in options.items()}
    return Service(target, {name: x for name, x in said.items() if x is not None})


# What the server is told of each option. Raises ValueError.


def tcp_option(value: Any, target: Target) -> Any:
    if value is not True and not is_port(value):
        raise ValueError("tcp is a port of the server, 0 for a free one, or true")
    return value


def tls_option(value: Any, target: Target) -> str:
    if value != "passthrough":
        raise ValueError('tls can be "passthrough": visitors\' TLS is for the target')
    return str(value)


def domains_option(value: Any, target: Target) -> List[str]:
    if not isinstance(value, list):
        raise ValueError('domains is a list, like ["www.example.org"]')
    for text in value:
        if not isinstance(text, str) or "." not in text:
            raise ValueError("%r is no domain" % (text,))
    return value


def proxy_protocol_option(value: Any, target: Target) -> int:
    if type(value) is not int or value not in (1, 2):
        raise ValueError("proxy_protocol is its version, 1 or 2")
    return value


def host_option(value: Any, target: Target) -> Optional[str]:
    """None leaves Host as the visitor sent it."""
    name = target.host if target.port else "localhost"
    name = "[%s]" % name if ":" in name else name
    usual = (443,) if target.tls else (0, 80)
    own = name if target.port in usual else "%s:%d" % (name, target.port)
    if not isinstance(value, str) or not value or set(value) & set("/@ \t\r\n"):
        raise ValueError('host is "preserve", "rewrite" or a host')
    import difflib

    near = difflib.get_close_matches(value, ["preserve", "rewrite"], 1, 0.8)
    if near and value not in near:
        raise ValueError("host %r: is it %r?" % (value, near[0]))
    return {"preserve": None, "rewrite": own}.get(value, value)


def visitors_option(value: Any, target: Target) -> List[str]:
    import ipaddress

    if not isinstance(value, list) or not value:
        raise ValueError('visitors is a list of networks, like ["203.0.113.0/24"]')
    return [str(ipaddress.ip_network(str(text))) for text in value]


def auth_option(value: Any, target: Target) -> List[str]:
    """The password does not leave this machine: the server gets a salted hash."""
    import hashlib

    hashed, pairs = [], [value] if isinstance(value, str) else value
    for pair in pairs if isinstance(pairs, list) and pairs else [""]:
        if not isinstance(pair, str) or ":" not in pair[1:] or not pair.isprintable():
            raise ValueError('auth is "user:password", or a list of them')
        salt = os.urandom(16)
        digest = hashlib.sha256(salt + pair.encode()).hexdigest()
        hashed.append("%s:%s" % (salt.hex(), digest))
    return hashed


OPTIONS: Dict[str, Call] = {
    "auth": auth_option,
    "domains": domains_option,
    "host": host_option,
    "proxy_protocol": proxy_protocol_option,
    "tcp": tcp_option,
    "tls": tls_option,
    "visitors": visitors_option,
}


def parse_services(pairs: List[Tuple[str, Any]]) -> Dict[str, Service]:
    """Raises ValueError, naming the service that is wrong."""
    services = {}
    for name, value in pairs:
        try:
            if not LABEL.fullmatch(name.lower()):
                raise ValueError("a name has letters, digits, `-` and `_`, and no `--`")
            if name.lower() in services:
                raise ValueError("the name stands there twice")
            services[name.lower()] = parse_service(value)
        except ValueError as error:
            raise ValueError("service %r: %s" % (name, error)) from None
    return services


def services_message(services: Dict[str, Service]) -> Dict[str, Any]:
    """What the server is told of them."""
    return {
        name: dict(service.options, target=service.target.text)
        for name, service in services.items()
    }


def parse_file(data: bytes = b"{}") -> Tuple[str, Dict[str, Service]]:
    """The token ("" for none) and the services of a file: {"web": 9000}, or {"token":
    "secret", "services": {"web": 9000}}. Raises ValueError."""
    pairs, token = parse_object(data), ""
    top = dict(pairs)
    if isinstance(top.get("services"), Pairs):
        extra = sorted(set(top) - {"token", "services"})
        if extra or len(pairs) > len(top):
            wrong = "unknown option %r" % extra[0] if extra else "an option twice"
            raise ValueError("%s beside services" % wrong)
        token = check_token(top["token"]) if "token" in top else ""
        pairs = top["services"]
    elif isinstance(top.get("token"), str):
        raise ValueError('beside a token all that is published stands in "services"')
    return token, parse_services(pairs)


# -----------------------------------------------------------------------------------
# Dial: connects to a target, and takes the steps from there: TLS, a request that must
# have the wanted answer. A target takes TLS or none, the server two, and a proxy before
# it would take two more.
# -----------------------------------------------------------------------------------
STAGGER = 0.25  # seconds until the next address is tried, too (RFC 8305 5)
RETRY_TIME = 0.05  # seconds until a unix socket whose queue is full is tried again
WAITING = errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY, errno.EAGAIN
FAILURES: Dict[Any, Tuple[str, str]] = {  # what the server is told, and people
    errno.ECONNREFUSED: ("refused", " refused the connection"),
    errno.ETIMEDOUT: ("timeout", " did not answer in time"),
    errno.EMFILE: ("busy", ": the client has no descriptors left"),
    errno.ENFILE: ("busy", ": the system has no descriptors left"),
}
ANSWER_LIMIT = 16 << 10  # bytes of the head of an answer
STATUS = re.compile(rb"HTTP/1[.]\d (\d{3})[ \r]")
LOCATION = re.compile(rb"(?i)\r\nlocation:[ \t]*([^\r]*)")
Address = Tuple[int, Any]  # family, and what connect() takes


class Unreachable(OSError):
    """Why a target cannot be connected; `code` is what the server is told, if the
    error does not say it."""

    def __init__(self, target: Target, error: Exception, code: str = "refused") -> None:
        other = code, ": %s" % (getattr(error, "strerror", None) or error)
        self.code, cause = FAILURES.get(getattr(error, "errno", None), other)
        super().__init__(target.text + cause)


class Answered(OSError):
    """An HTTP server answered, but not as wanted. `who` begins the text."""

    def __init__(self, status: int, head: bytes, who: str = "") -> None:
        cause, where = "%sanswered %d" % (who, status), LOCATION.search(head)
        if status == 404 and not who and b"\nx-tunnel-error:" not in head.lower():
            cause += ", as no mdm-tunnel server does"
        if where:
            cause += ", which leads to " + peer_text(where.group(1).decode("latin-1"))
        super().__init__(cause)
        self.status = status


def interleave(addresses: List[Address]) -> List[Address]:
    """Both families in turn, beginning with that of the first (RFC 8305 4)."""
    ours = [address for address in addresses if address[0] == addresses[0][0]]
    others = [address for address in addresses if address[0] != addresses[0][0]]
    pairs = itertools.zip_longest(ours, others)
    return [address for pair in pairs for address in pair if address]


class Attempt:
    """One address of a dial: owns a connection that is not there yet."""

    def __init__(self, dial: "Dial", family: int) -> None:
        self.dial = dial
        sock = socket.socket(family, socket.SOCK_STREAM)
        self.connection = Connection(dial.loop, sock, self)

    def __str__(self) -> str:
        return str(self.dial)

    def interest(self) -> int:
        return WRITE

    def on_writable(self) -> None:
        sock = self.connection.sock
        if self.is_connected(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            self.dial.on_connected(self)

    on_readable = on_writable

    def is_connected(self, code: int) -> bool:
        """What connect() has said so far. A local port is connected before the selector
        tells. Raises OSError."""
        if code in WAITING:
            try:
                return bool(self.connection.sock.getpeername())
            except OSError:
                return False
        if code not in (0, errno.EISCONN):
            raise OSError(code, os.strerror(code))
        return True

    def fail(self, error: Exception) -> None:
        self.dial.on_failed(self, error)


class Dial:
    """Tries the target's addresses, the next one STAGGER after the last if that has not
    answered; the first to connect wins. Then it takes the steps: each has go_on(dial),
    which returns whether it is done. All has at most `seconds`. It ends with one call:
    of owner.on_dialled(connection) or of owner.on_undialled(error)."""

    def __init__(
        self, resolver: Any, target: Target, steps: list, seconds: float, owner: Any
    ) -> None:
        self.resolver, self.loop = resolver, resolver.loop
        self.target, self.steps, self.owner = target, steps, owner
        self.awaits = WRITE  # while it connects; then READ, and 0 when it is over
        self.addresses: Optional[List[Address]] = None  # still to be tried
        self.attempts: List[Attempt] = []  # that go on
        self.failure: Optional[Unreachable] = None  # of the first address
        self.connection: Any = None  # the one that won
        self.gate: Optional["Gate"] = None  # which lets it begin
        self.timer = Timer(self.loop, self, self.on_late)
        self.timer.set(seconds)
        self.next_timer = Timer(self.loop, self, self.advance)

    def __str__(self) -> str:
        return "dial to %s" % self.target.text

    def interest(self) -> int:
        return self.awaits

    def advance(self) -> None:
        """Begin, or go on, until it has to wait."""
        if self.awaits == WRITE and self.addresses is None:
            self.addresses = interleave(self.resolver.resolve(self))
        if self.awaits == WRITE and self.addresses:
            self.try_next(self.addresses.pop(0))
        if self.awaits == READ:
            while self.steps and self.steps[0].go_on(self):
                del self.steps[0]
            if not self.steps:
                connection, self.connection = self.connection, None
                self.end()
                self.owner.on_dialled(connection)

    on_readable = on_writable = advance

    def try_next(self, address: Address) -> None:
        """Begin with one more address, beside those that are being tried."""
        attempt = Attempt(self, address[0])
        self.attempts.append(attempt)
        code = attempt.connection.sock.connect_ex(address[1])
        if code == errno.EAGAIN and not self.target.port:
            self.drop(attempt)  # the queue of a unix socket is full: no event will tell
            self.addresses = [address]
            self.next_timer.set(RETRY_TIME)
            return
        try:
            if attempt.is_connected(code):
                self.win(attempt)
            elif self.addresses:
                self.next_timer.set(STAGGER)
        except OSError as error:
            self.on_failed(attempt, error)

    def on_addresses(self, addresses: List[Address]) -> None:
        """The resolver has found them."""
        self.addresses = interleave(addresses)
        self.advance()

    def on_connected(self, attempt: Attempt) -> None:
        self.win(attempt)
        self.advance()

    def win(self, attempt: Attempt) -> None:
        """This one is it; the others are closed."""
        self.attempts.remove(attempt)
        self.connection = attempt.connection
        self.connection.owner = self
        for other in list(self.attempts):
            self.drop(other)
        self.next_timer.clear()
        self.awaits = READ
        self.loop.dirty.add(self.connection)

    def on_failed(self, attempt: Attempt, error: Exception) -> None:
        """Another address may answer: the next one is tried at once."""
        self.drop(attempt)
        self.failure = self.failure or Unreachable(self.target, error)
        if self.addresses:
            self.loop.soon(self, self.advance)
        elif not self.attempts:
            self.fail(error)

    def on_late(self) -> None:
        raise OSError(errno.ETIMEDOUT, "no answer in time")

    def fail(self, error: Exception) -> None:
        """It is over. The first that failed says why, unless another still hangs."""
        if self.awaits == WRITE:
            failure = None if self.attempts else self.failure
            error = failure or Unreachable(self.target, error)
        if self.awaits:
            self.end()
            self.owner.on_undialled(error)

    def drop(self, attempt: Attempt) -> None:
        if attempt in self.attempts:
            self.attempts.remove(attempt)
        attempt.connection.close()

    def end(self) -> None:
        """Stop. The owner is not told."""
        self.awaits = 0
        self.timer.clear()
        self.next_timer.clear()
        for attempt in list(self.attempts):
            self.drop(attempt)
        if self.connection:
            self.connection.close()
            self.connection = None
        if self.gate:
            self.gate.leave(self)


class StartTLS:
    """From here on all is encrypted. It is done when the handshake is."""

    def __init__(self, context: Any, name: str, pin: bytes) -> None:
        self.how: Optional[Tuple[Any, ...]] = (context, False, name, pin)

    def go_on(self, dial: Dial) -> bool:
        if self.how:
            how, self.how = self.how, None
            dial.connection.start_tls(*how)
        return bool(dial.connection.phase == OPEN_PHASE)


class Say:
    """Sends something before all else."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def go_on(self, dial: Dial) -> bool:
        dial.connection.write(self.data)
        return True


class Ask:
    """Sends the head of an HTTP request, and reads that of the answer, whose status has
    to be `want`: 101 for our Upgrade, 200 for a proxy's CONNECT."""

    def __init__(self, request: bytes, want: int, who: str = "") -> None:
        self.request, self.want, self.who = request, want, who
        self.answer = bytearray()

    def go_on(self, dial: Dial) -> bool:
        if self.request:
            dial.connection.write(self.request)
            self.request = b""
        view = dial.loop.scratch[:ANSWER_LIMIT]
        count = dial.connection.read_into(view)
        if count == 0:
            raise OSError("%s closed the connection" % (self.who or "the server"))
        self.answer += view[: count or 0]
        if not self.answer.startswith(b"HTTP/1."[: len(self.answer)]):
            raise OSError("whoever listens there does not speak HTTP")
        end = self.answer.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(self.answer) >= ANSWER_LIMIT:
                raise OSError("the server's answer does not end")
            return False
        head = bytes(self.answer[:end])
        dial.connection.unread = bytes(self.answer[end:])
        match = STATUS.match(head)
        status = int(match.group(1)) if match else 0
        self.check(status, head)
        return True

    def check(self, status: int, head: bytes) -> None:
        if status != self.want:
            raise Answered(status, head, self.who and self.who + " ")


# -----------------------------------------------------------------------------------
# Bridge: a stream that waits for its target: a Dial, and then a Pipe. Meanwhile what
# comes waits here, an end is remembered, and a reset gives the dial up. A Gate lets
# DIALS dials to one target go at once; the rest wait their turn.
# -----------------------------------------------------------------------------------
DIAL_TIME = 5.0  # seconds from OPEN to a connected target, waiting for a place included
DIALS = 128  # at once to a target: one that hangs holds up its own visitors only


class Gate:
    """The dials to one target."""

    def __init__(self) -> None:
        self.running: Set[Dial] = set()
        self.waiting: "collections.OrderedDict[Dial, None]" = collections.OrderedDict()

    def admit(self, dial: Dial) -> None:
        self.waiting[dial], dial.gate = None, self
        self.begin_next()

    def leave(self, dial: Dial) -> None:
        """A dial is over: its place is the next one's."""
        self.waiting.pop(dial, None)
        self.running.discard(dial)
        self.begin_next()

    def begin_next(self) -> None:
        """It begins on a fresh stack, never within admit()."""
        if self.waiting and len(self.running) < DIALS:
            dial = self.waiting.popitem(last=False)[0]
            self.running.add(dial)
            dial.loop.soon(dial, dial.advance)


class Bridge:
    def __init__(
        self, tunnel: "Tunnel", stream: Stream, name: str, message: Dict[str, Any]
    ) -> None:
        self.tunnel, self.stream, self.name = tunnel, stream, name
        service = tunnel.client.services[name]
        self.target, self.confirm = service.target, message.get("confirm") is True
        self.pending = bytearray()  # what came before there was a connection
        steps: List[Any] = [StartTLS(*self.target.tls)] if self.target.tls else []
        version = service.options.get("proxy_protocol")
        if version:
            steps.insert(0, Say(proxy_header(version, message)))
        self.dial = Dial(tunnel.client.resolver, self.target, steps, DIAL_TIME, self)
        stream.owner = self
        tunnel.gates[self.target].admit(self.dial)

    def __str__(self) -> str:
        return "%s %s" % (self.tunnel, self.name)

    def on_dialled(self, connection: Connection) -> None:
        if self.confirm:
            self.stream.begin(Kind.CONNECTED)
        pipe = self.join(connection)
        if self.pending:
            connection.write(memoryview(self.pending))
            pipe.on_writable()
        if self.stream.ended_in:
            pipe.on_end()

    def join(self, connection: Connection) -> Pipe:
        return Pipe(self.stream, connection, self.target.text, "reset")

    def on_undialled(self, error: Exception) -> None:
        if not isinstance(error, Unreachable):  # it was reached, and TLS failed
            error = Unreachable(self.target, error, "error")
        self.stream.reset(error.code, str(error))
        tell = log.debug if self.tunnel.notes else log.info  # a NOTE says the same
        tell("%s: %s", self, error)

    def pull(self, view: memoryview) -> None:
        pass

    def receive(self, data: memoryview) -> None:
        self.pending += data

    def on_end(self) -> None:
        pass

    def on_reset(self, code: str, cause: str) -> None:
        self.dial.end()

    def fail(self, error: Exception) -> None:
        self.stream.reset("error", str(error))
        self.dial.end()


# -----------------------------------------------------------------------------------
# Tunnel: one link, from the server's first word to its end.
# -----------------------------------------------------------------------------------
WELCOME_TIME = 10.0  # seconds from the 101 to the end of the login
NOTES_LIMIT = 1000  # outcomes that are read of one frame: honest ones are 100 bytes
UNPROVEN = "the server cannot prove that it knows the token: has it --tokens?"


def peer_number(value: Any) -> Any:
    """A number that a peer says: anything else is 0."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if good and 0 <= value < 1 << 63 else 0


def read_outcome(said: Any) -> "Outcome":
    """What a NOTE says of one. What is not as it should be is left out."""
    known: Dict[str, Any] = {}
    for name, value in said.items() if isinstance(said, dict) else ():
        empty = Outcome._field_defaults.get(name)
        if isinstance(empty, tuple):
            pair = value if isinstance(value, list) and len(value) == 2 else empty
            known[name] = tuple(sorted(int(peer_number(end)) for end in pair))
        elif isinstance(empty, str):
            known[name] = peer_text(value)
        elif isinstance(empty, (int, float)):
            known[name] = type(empty)(peer_number(value))
    return Outcome(**known)


class Tunnel:
    def __init__(self, uplink: "Uplink", connection: Connection) -> None:
        self.uplink, self.client = uplink, uplink.client
        self.token = ""  # with which we log in
        self.challenge: Optional[str] = None  # the server's nonce, until we log in
        self.nonces = "", ""  # the server's and ours
        self.known: Any = ()  # the options that the server keeps
        self.notes = self.checks = False  # it tells how requests end; knows `check`
        self.parting: Dict[str, Any] = {}  # its GOODBYE
        self.logged_in = False
        self.since = 0.0  # when it logged in
        self.place: Any = None  # from where: Whereabouts
        self.gates: Dict[Target, Gate] = collections.defaultdict(Gate)
        self.link: Link = Link(uplink.loop, connection, self, "client")
        self.timer = Timer(uplink.loop, self.link, self.on_late)
        self.timer.set(WELCOME_TIME)

    def __str__(self) -> str:
        return self.client.id

    def on_late(self) -> None:
        raise OSError("no welcome within %d s" % WELCOME_TIME)

    def on_message(self, kind: int, message: Any) -> None:
        if kind == Kind.CHALLENGE:
            known = message.get("options")
            self.known = known if isinstance(known, list) else ()
            self.challenge = str(message.get("nonce"))
            self.notes = message.get("notes") is True
            self.checks = message.get("check") is True
            self.uplink.decide()
        elif kind == Kind.WELCOME:
            self.on_welcome(message)
        elif kind == Kind.URLS:
            self.client.on_urls(message)
        elif kind == Kind.NOTE:
            self.on_note(message)
        elif kind == Kind.GOODBYE:
            self.parting = message
            code, reason = map(peer_text, (message.get("code"), message.get("reason")))
            self.uplink.on_goodbye(self, code, reason)

    def log_in(self) -> None:
        client, self.token = self.client, self.client.token
        nonce, self.challenge = self.challenge or "", None
        self.nonces = nonce, make_nonce()
        login: Dict[str, Any] = {"id": client.id, "session": client.session}
        login["nonce"] = self.nonces[1]
        if self.notes and client.observers:
            login["notes"] = True
        if client.checking:
            login["check"] = True
        if self.token:
            if not NONCE.fullmatch(nonce):
                client.end(3, UNPROVEN)
                return
            login["proof"] = prove(self.token, "client", self.nonces, client.id)
        self.link.send(Kind.LOGIN, login)

    def on_welcome(self, message: Dict[str, Any]) -> None:
        """The id is ours; but with a token we serve only a server that knows it too."""
        if self.token:
            proof = prove(self.token, "server", self.nonces, self.client.id)
            if not is_proof(message.get("proof"), proof):
                self.client.end(3, UNPROVEN)
                return
        self.timer.clear()
        self.logged_in, self.since = True, self.link.loop.clock()
        self.place = Whereabouts(self.link.connection.sock)
        self.uplink.on_login()
        self.publish()

    def publish(self) -> None:
        """Send the list of services, whole; but none with an option that the server
        does not keep, since it may be there to protect."""
        kept = dict(self.client.services)
        for name, service in self.client.services.items():
            for option in [x for x in service.options if x not in self.known]:
                cause = "not published: this server does not know the option"
                log.warning("%s: %s %s", name, cause, option)
                kept.pop(name, None)
        if self.logged_in and not self.link.draining:
            self.link.send(Kind.SERVICES, services_message(kept))

    def on_open(self, stream: Stream, message: Dict[str, Any]) -> None:
        """Only what our own list names is dialled."""
        service = str(message.get("service"))
        if service not in self.client.services:
            stream.reset("no-service", "the client has no such service")
        elif self.link.loop.full():
            stream.reset("busy", "the client has no descriptors left")
        else:
            bridge = TappedBridge if self.client.inspector else Bridge
            bridge(self, stream, service, message)

    def on_note(self, notes: List[Any]) -> None:
        """How requests ended, as the server saw it."""
        for said in notes[:NOTES_LIMIT]:
            outcome = read_outcome(said)._replace(link=self.link)
            for observer in self.client.observers:
                self.link.loop.guard(self.client, observer, outcome)
            dropped = peer_number(said.get("dropped")) if type(said) is dict else 0
            if dropped:
                log.info("%d more requests: the link was too slow to tell", dropped)

    def on_closed(self, cause: str) -> None:
        self.timer.clear()
        self.uplink.on_lost(self, cause)


# -----------------------------------------------------------------------------------
# Whereabouts: a machine that gets another address, or sleeps, has a link that may be
# dead, and nobody tells. So it looks once a second, without sending a packet.
# -----------------------------------------------------------------------------------
LOOK_AROUND = 1.0  # seconds between looks
SLEPT = 5.0  # seconds by which the wall clock is ahead after a look: it was a sleep
wall_clock: Callable[[], float] = time.time


def source_address(sock: socket.socket) -> Optional[str]:
    """Which address of this machine leads to the peer of `sock`, as the kernel says of
    a UDP socket. None when there is no way now, or the peer is this machine."""
    try:
        peer = sock.getpeername()
        if LOOPBACK.fullmatch(peer[0]):
            return None
        with socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError:
        return None


class Whereabouts:
    """From where the link on `sock` was dialled. The kernel's first answer is taken as
    it is: where routes depend on the protocol it need not be the link's address."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.known: Set[str] = set()  # no news: dialled from there, or asked about
        self.strange = False  # at the last look the address was another
        self.looked = wall_clock()
        self.change()

    def change(self) -> str:
        """Look around: what has changed since the last look, or "". An address counts
        when two looks find it strange, as one may fall between two addresses; and then
        no more: either the link lives, or it is replaced."""
        before, self.looked = self.looked, wall_clock()
        found, again = source_address(self.sock), self.strange
        if found and not self.known:
            self.known.add(found)
        self.strange = found is not None and found not in self.known
        if found and self.strange and again:
            self.known.add(found)
            self.strange = False
            return "this machine has another address, %s" % found
        slept = self.looked - before >= LOOK_AROUND + SLEPT
        return "this machine slept, or its clock was set" if slept else ""


# -----------------------------------------------------------------------------------
# Uplink: dials, has a tunnel as long as it lives, and dials again. A tunnel in doubt is
# asked for a sign of life; meanwhile its successor is dialled, and logs in only if none
# comes: to log in ends the tunnel, and with it what runs there.
# -----------------------------------------------------------------------------------
DOUBT = 2.0  # seconds for that sign, or two round trips
DOUBT_LOOK = 0.1  # seconds between looks at whether it came
SERVER_TIME = 10.0  # seconds for all steps to the server
FIRST_WAIT = 0.05  # seconds until the first attempt to come back; it doubles
LONGEST_WAIT = 10.0  # seconds: a server that is back has its clients back soon
STEADY = 5.0  # seconds a link must have lived for the wait to be short again
TAKEN_TIME = 4.0  # seconds in which a first login that finds its id taken is repeated:
TAKEN_WAIT = 0.6  # the server asks the owner for a sign of life, which has 3 s
PASSING = (429, 502, 503, 504)  # of a front that stands before the server is there
ADVICE = (  # what an error, which begins so, probably means
    ("proxy .*word[)] answered 407", "it does not accept this user and password"),
    ("proxy .*answered 407", "it wants a password: http://user:password@proxy"),
    ("proxy .*answered 403", "it does not let us through; try port 443"),
    ("proxy .*answered 50[234]", "it does not reach the server"),
    ("proxy .*answered", "it is no proxy for CONNECT; --no-proxy goes without it"),
    ("answered (200|3..,)", "is this a network that wants a login in the browser?"),
    ("answered 400", "does this port want --tls?"),
    ("answered 404,", "are address (-h) and port (-p) those of the server?"),
    ("answered 404", "is this the visitors' port? dial the --client-port with -p"),
    ("answered 407", "a proxy in between wants a password"),
    ("answered 426", "another version of mdm-tunnel, or a proxy that drops Upgrade"),
    ("answered (429|50[234])", "a proxy answered that does not reach the server"),
    ("answered", "whoever listens there is no mdm-tunnel server"),
    (".*unrecognized name", "the server has no certificate for the name dialled"),
    (".*signed certificate", "trust it with --tls-ca, or name it with --fingerprint"),
    (".*local issuer", "trust its authority with --tls-ca, or use --fingerprint"),
    (".*speaks no TLS", "has the server --tls-cert, and is this its client port?"),
    (".*has expired", "renew it; or is the clock of this machine wrong?"),
    (".*not yet valid", "is the clock of this machine wrong?"),
    (".*(mismatch|not valid for)", "it is for other names: dial one, or --fingerprint"),
    (".*fingerprint", "compare --fingerprint with what the server's -v prints"),
)


class Uplink:
    def __init__(self, client: "Client") -> None:
        self.client, self.loop = client, client.loop
        self.tunnel: Optional[Tunnel] = None  # that is logged in
        self.coming: Any = None  # its successor, or the first: a Dial, then a Tunnel
        self.doubted: Optional[float] = None  # since when the tunnel is in doubt
        self.failures = 0  # attempts since a login
        self.cause = ""  # why there is no tunnel
        self.wait = FIRST_WAIT
        self.ever = False  # logged in at least once
        self.taken_until = 0.0  # when a first login whose id is taken gives up
        self.timer = Timer(self.loop, client, self.dial)
        self.look_timer = Timer(self.loop, client, self.look)

    def dial(self) -> None:
        if self.tunnel is None:
            self.failures += 1  # until it leads to a login
        self.coming = dial = Dial(self.client.resolver, *self.way(), SERVER_TIME, self)
        self.loop.guard(dial, dial.advance)

    def way(self) -> Tuple[Target, List[Any]]:
        """What to connect to, and the steps from there to the server."""
        client, config = self.client, self.client.config
        lines = "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: %s"
        request = lines % (LINK_PATH, client.server, PROTOCOL) + "\r\n\r\n"
        steps: List[Any] = [Ask(request.encode(), 101)]
        if config.tls:
            steps.insert(0, StartTLS(config.tls, config.host, config.pin))
        if config.proxy:
            target, before = config.proxy.way(client.server)
            return target, before + steps
        return client.target, steps

    def on_dialled(self, connection: Connection) -> None:
        self.coming = Tunnel(self, connection)

    def on_undialled(self, error: Exception) -> None:
        """There is no link. An answer that will stay the same ends the first dial."""
        self.coming = None
        cause = str(getattr(error, "strerror", None) or error)
        advice = [help for start, help in ADVICE if re.match(start, cause)][:1]
        if not isinstance(error, Unreachable):  # which names the server itself
            cause = "%s: %s" % (self.client.server, cause)
        cause = ": ".join([cause] + advice)
        passing = isinstance(error, Answered) and error.status in PASSING
        if isinstance(error, (Answered, TLSError)) and not (passing or self.ever):
            self.client.end(1, cause)
        else:
            self.retry(cause)

    def on_login(self) -> None:
        proxy = self.client.config.proxy
        by = " by %s" % proxy.name if proxy else ""
        log.info("logged in at %s%s as %s", self.client.server, by, self.client.id)
        if not self.ever:
            self.wait = FIRST_WAIT  # not what it was while the id was taken
        self.ever, self.failures = True, 0
        if self.client.inspector and self.coming:
            self.client.inspector.deaf = not self.coming.notes
        old, self.tunnel = self.tunnel, self.coming
        self.coming = self.doubted = None
        self.client.manager.ready()
        if old:
            old.link.close("there is a newer link")
        self.look_timer.set(LOOK_AROUND)

    # Is there another link to be made?

    def look(self) -> None:
        """Once a second: may the tunnel be dead? In doubt more often: does it live?"""
        if self.tunnel is None or self.client.stopping:
            return
        change = self.tunnel.place.change()
        if self.doubted is not None:
            self.decide()
        elif change:
            log.info("%s: is %s still there?", change, self.client.server)
            self.doubted = self.loop.clock()
            self.forget_waits(self.tunnel)
            self.tunnel.link.ping()
            self.dial()
        self.look_timer.set(LOOK_AROUND if self.doubted is None else DOUBT_LOOK)

    def decide(self) -> None:
        """The successor logs in, unless the tunnel lives or has time left to say so. At
        the first login there is no tunnel to doubt, so it logs in at once."""
        link, coming = self.tunnel and self.tunnel.link, self.coming
        if isinstance(coming, Tunnel) and coming.nonces[1]:
            return  # it has logged in: the server may have closed the old link
        if link and not link.asked:
            log.info("%s is still there", self.client.server)
            self.give_up()
        elif isinstance(coming, Tunnel) and coming.challenge is not None:
            patience = max(DOUBT, 2 * link.round_trip) if link else 0.0
            if self.loop.clock() - (self.doubted or 0.0) >= patience:
                coming.log_in()

    def give_up(self) -> None:
        """No successor is wanted."""
        coming, self.coming, self.doubted = self.coming, None, None
        self.timer.clear()
        if isinstance(coming, Tunnel):
            coming.link.close("it is not needed")
        elif coming:
            coming.end()

    # How a tunnel, or its successor, ends.

    def on_goodbye(self, tunnel: Tunnel, code: str, reason: str) -> None:
        """The server takes leave: for good, or until it is back?"""
        client, taken = self.client, code == "taken" and not self.ever
        if code == "refused":
            client.look()  # the token may have changed here too
        if taken:  # no failure: its owner may be dead, which the server finds out
            self.failures, self.wait = 0, TAKEN_WAIT
            self.taken_until = self.taken_until or self.loop.clock() + TAKEN_TIME
        if taken and self.loop.clock() >= self.taken_until:
            client.end(3, reason + " by another client: choose one with -i")
        elif code == "replaced" or code == "refused" and tunnel.token == client.token:
            client.end(3, reason)
        else:
            self.on_lost(tunnel, reason)

    def on_lost(self, tunnel: Tunnel, cause: str) -> None:
        """The tunnel is of no more use; what runs in it may still end."""
        cause = "%s: %s" % (self.client.server, cause)
        if tunnel is self.coming:
            self.coming = None
            self.retry(cause)
        elif tunnel is self.tunnel:
            self.tunnel = self.doubted = None
            self.forget_waits(tunnel)
            if self.coming:
                log.info("%s", cause)
                self.decide()
            else:
                self.retry(cause)

    def forget_waits(self, tunnel: Tunnel) -> None:
        """Do not begin with a long wait, unless links come and go."""
        if self.loop.clock() - tunnel.since >= STEADY:
            self.wait = FIRST_WAIT

    def retry(self, cause: str) -> None:
        """Dial again, after a while that grows and is never the same for all."""
        import random

        if self.client.stopping:
            return
        if self.failures == self.client.config.max_attempts > 0:
            self.client.end(4, "gave up after %d: %s" % (self.failures, cause))
            return
        self.cause = cause
        if not self.taken_until:  # that may still turn out to be for good
            self.client.manager.ready()
        wait = self.wait * random.uniform(0.5, 1.0)
        self.wait = min(2 * self.wait, LONGEST_WAIT)
        log.info("%s; dialling again in %.1f s", cause, wait)
        self.timer.set(wait)


# -----------------------------------------------------------------------------------
# Client: keeps its uplink up, and ends when there is a reason to.
# -----------------------------------------------------------------------------------
DRAIN_LOOK = 0.05  # seconds between looks at whether they have ended


class Refused(Exception):
    """To dial again would not help. `status` is the exit status."""

    def __init__(self, status: int, cause: str) -> None:
        super().__init__(cause)
        self.status = status


class Client:
    """Dials the server and serves. run() ends after stop(), or raises Refused: by the
    server, or after `max_attempts` failures in a row."""

    checking = False  # it must put nobody off

    def __init__(self, config: "Config", loop: Optional[Loop] = None) -> None:
        if config.pin and config.tls is None:
            raise ValueError("a fingerprint is of no use without TLS")
        self.config, self.id = config, config.id.lower()
        self.take_over()
        self.url_file = URLFile(config.url_file)
        self.loop = loop or Loop()
        shown = "[%s]" % config.host if ":" in config.host else config.host
        self.server = "%s:%d" % (shown, config.port)  # as the Host field has it
        self.target = Target(self.server, config.host, config.port)
        self.session = os.urandom(16).hex()
        self.resolver = Resolver(self.loop)
        self.urls: Dict[str, str] = {}
        self.observers: List[Callable[[Outcome], Any]] = []  # told how requests ended
        if log.hears(INFO):
            self.observers.append(Outcome.tell)
        self.stopping = False
        self.refusal: Optional[Refused] = None
        self.uplink = Uplink(self)
        self.manager = Manager(self.loop, self.status)
        self.timer = Timer(self.loop, self, self.drain)
        self.look_timer = Timer(self.loop, self, self.look)
        self.inspector: Optional[Inspector] = None
        if config.inspect is not None:
            try:
                self.inspector = Inspector(self, config.inspect)
            except OSError as error:
                where = "127.0.0.1:%d (--inspect)" % config.inspect
                cause = "cannot listen on %s: %s" % (where, error.strerror or error)
                raise Refused(1, cause) from None

    def __str__(self) -> str:
        return self.id

    def status(self) -> str:
        if self.uplink.tunnel:
            return "logged in at %s as %s" % (self.server, self.id)
        return "dialling again: %s" % self.uplink.cause

    def run(self) -> None:
        """Serve until stop(). Raises Refused."""
        if self.inspector:
            self.inspector.run()
        self.uplink.timer.set(0)
        self.look_timer.set(LOOK_TIME)
        try:
            self.loop.run()
        finally:
            self.url_file.remove()
            self.manager.close()
            if self.inspector:
                self.inspector.close()
        self.stopping = True
        for link in [link for link in self.loop.links if link.owner.logged_in]:
            link.close("the client is stopping")
        self.loop.close()
        if self.refusal:
            raise self.refusal

    def fail(self, error: Exception) -> None:
        log.error("%s: %s", self, error)

    def take_over(self) -> None:
        """Use what the files hold. The command line wins. Raises ValueError."""
        token, found = self.config.file.value
        services = {**found, **self.config.given}
        if len(pack_json(services_message(services))) > TEXT_LIMIT:
            raise ValueError("more than %d bytes of services" % TEXT_LIMIT)
        self.services = services
        self.token = self.config.token.value or token  # of our id; "" for none
        if token:
            warn_of_readers(self.config.file.paths)
        if self.token:
            forbid_core_dumps()

    def look(self, asked: bool = False) -> None:
        """Has a file changed? Who `asked` is told of each fault, also of an old one."""
        self.look_timer.set(LOOK_TIME)
        before, tunnel = self.services, self.uplink.tunnel
        for file in (self.config.token, self.config.file):
            changed = file.look(asked)
            if changed:
                log.info("%s has changed", file)
            if changed or asked and file.paths:
                try:
                    self.take_over()
                except ValueError as error:
                    log.warning("%s: %s; the old list stays", file, error)
        if tunnel and self.services != before:
            tunnel.publish()

    def reload(self) -> None:
        """SIGHUP: look at the files now."""
        with self.manager.reloading():
            log.info("reading all files again")
            self.look(asked=True)

    def on_urls(self, message: Dict[str, Any]) -> None:
        """Where the services are reached; -v prints it."""
        names = [name for name in message if name in self.services or name == "*"]
        urls = {name: peer_text(message[name]) for name in names}
        self.url_file.write(self.id, urls)
        if urls != self.urls:
            self.urls = urls
            for name in sorted(urls):
                self.show_url(name, urls[name], max(map(len, urls)))

    def show_url(self, name: str, url: str, width: int) -> None:
        """With -v a line on stdout: where a service is reached, and where it leads."""
        fields, level = {"service": name, "url": url}, "info"
        if url.startswith("error: "):
            fields, level = {"service": name, "error": url[len("error: ") :]}, "warning"
        elif name in self.services:
            fields["target"] = self.services[name].target.text
            url += " -> " + fields["target"]
        if log.hears(INFO):
            self.show("%-*s  %s" % (width, name, url), fields, level)

    def show(self, line: str, fields: Dict[str, str], level: str = "info") -> None:
        log.write(sys.stdout, level, line, fields=fields.items())

    # Stopping.

    def end(self, status: int, cause: str) -> None:
        """There is no point in going on."""
        self.refusal = self.refusal or Refused(status, cause)
        self.stopping, self.loop.running = True, False

    def on_signal(self, number: int) -> None:
        """SIGTERM lets what runs end; SIGINT, or a second signal, does not."""
        if number == HANGUP:
            self.reload()
        elif self.stopping or number == signal.SIGINT:
            log.info("stopping at once")
            self.loop.running = False
        else:
            self.stop()

    def stop(self) -> None:
        """Take no new streams, let those that run go on for --drain, and end."""
        log.info("stopping")
        self.manager.stopping(self.config.drain)
        self.stopping = True
        self.until = self.loop.clock() + self.config.drain
        self.uplink.give_up()
        links = [link for link in self.loop.links if link.owner.logged_in]
        for link in links:  # an old one may still carry streams
            link.goodbye("stopping", "the client is stopping")
        self.drain()
        if not links:
            self.loop.running = False

    def drain(self) -> None:
        """Is there anything still to wait for?"""
        self.timer.set(DRAIN_LOOK)
        if self.loop.clock() >= self.until or not self.loop.connections:
            self.loop.running = False


# ###################################################################################
# PART TWO: THE ARMOUR. What keeps it up: TLS, files, limits, names, command line.
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
# Resolver: names are looked up in one helper thread, the only one but for those of the
# inspector, since the system's resolver blocks. Numeric addresses and localhost need
# none.
# -----------------------------------------------------------------------------------
class Resolver:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.asked: Any = None  # a queue of dials, for the thread

    def resolve(self, dial: Dial) -> List[Address]:
        """The addresses of its target; none: it is told later."""
        target = dial.target
        if target.port == 0:
            return [(socket.AF_UNIX, target.host)]
        if target.host.lower() == "localhost":
            first = (socket.AF_INET, ("127.0.0.1", target.port))
            return [first, (socket.AF_INET6, ("::1", target.port))]
        try:
            return self.look_up(target.host, target.port, socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):  # a name
            self.ask(dial)
            return []

    def ask(self, dial: Dial) -> None:
        if self.asked is None:
            import queue
            import threading

            self.asked = queue.Queue()
            threading.Thread(target=self.work, daemon=True).start()
        self.asked.put(dial)

    def work(self) -> None:
        """The helper thread: one name after the other."""
        while True:
            dial = self.asked.get()
            try:
                found = self.look_up(dial.target.host, dial.target.port, 0)
                self.loop.from_thread(dial, dial.on_addresses, found)
            except (OSError, UnicodeError) as error:
                cause = OSError("cannot find its address: %s" % error)
                self.loop.from_thread(dial, dial.fail, cause)

    @staticmethod
    def look_up(host: str, port: int, flags: int) -> List[Address]:
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, flags)
        return [(entry[0], entry[4]) for entry in found]


# -----------------------------------------------------------------------------------
# PROXY protocol: tells a target who the visitor is, in its versions 1 and 2 (see
# haproxy.org, proxy-protocol.txt).
# -----------------------------------------------------------------------------------


def proxy_header(version: int, message: Dict[str, Any]) -> bytes:
    """The header for a stream, of which the server's OPEN says whose it is."""
    import ipaddress

    try:
        found = [ipaddress.ip_address(str(message.get(x))) for x in ("visitor", "to")]
        said = [message.get(key) for key in ("port", "to_port")]
        ports = [port if is_port(port) else 0 for port in said]  # 0: nobody knows it
    except ValueError:  # the visitor had gone already
        unknown = PROXY_SIGNATURE + struct.pack("!BBH", 0x21, 0, 0)
        return b"PROXY UNKNOWN\r\n" if version == 1 else unknown
    wide = any(address.version == 6 for address in found)
    packed = [widen(x) if wide else x.packed for x in found]
    if version == 2:
        body = b"".join(packed) + struct.pack("!HH", *ports)
        family = 0x21 if wide else 0x11
        return PROXY_SIGNATURE + struct.pack("!BBH", 0x21, family, len(body)) + body
    texts = [str(ipaddress.ip_address(address)) for address in packed]
    line = "PROXY %s %s %s %d %d\r\n"
    return (line % ("TCP6" if wide else "TCP4", *texts, *ports)).encode()


def widen(address: Any) -> bytes:
    """An address as IPv6, where the other one is (RFC 4291 2.5.5.2)."""
    packed: bytes = address.packed
    return packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed


# -----------------------------------------------------------------------------------
# Proxies: where only a proxy leads out, the client asks it to CONNECT (RFC 9110 9.3.6).
# The variables http_proxy, https_proxy, all_proxy and no_proxy say so, as for curl.
# -----------------------------------------------------------------------------------
NO_PROXY_URL = (
    "no URL like http://user:password@host:port; escape what is special in a password, "
    "or use --no-proxy"
)


class Proxy:
    """The proxy at `url`. Raises ValueError, whose text does not hold the URL."""

    def __init__(self, url: str) -> None:
        import urllib.parse

        try:
            parts = urllib.parse.urlsplit(url if "://" in url else "http://" + url)
            port = parts.port
        except ValueError:  # whose text may hold the password
            parts, port = urllib.parse.urlsplit(""), None
        if parts.hostname and parts.scheme not in ("http", "https"):
            raise ValueError("only http and https proxies are known, no other kind")
        if not parts.hostname:
            raise ValueError(NO_PROXY_URL)
        self.tls = parts.scheme == "https"
        port = port or (443 if self.tls else 80)
        self.name = "proxy %s:%d" % (parts.hostname, port)
        self.target = Target(self.name, parts.hostname, port)
        self.credentials = ""
        if parts.username is not None:
            import base64

            self.name += " (with a password)"
            pair = map(urllib.parse.unquote, (parts.username, parts.password or ""))
            self.credentials = base64.b64encode(":".join(pair).encode()).decode()

    def way(self, server: str) -> Tuple[Target, List[Any]]:
        """What to connect to, and the steps from there to `server`, as host:port."""
        lines = ["CONNECT %s HTTP/1.1" % server, "Host: " + server]
        if self.credentials:
            lines.append("Proxy-Authorization: Basic " + self.credentials)
        request = "\r\n".join(lines + ["", ""]).encode()
        steps: List[Any] = [Ask(request, 200, self.name)]
        if self.tls:
            steps.insert(0, StartTLS(make_context(None, False), self.target.host, b""))
        return self.target, steps


def find_proxy(host: str, port: int, tls: bool) -> Optional[Proxy]:
    """The proxy on the way to a server; None when there is none. This machine needs no
    proxy. Raises ValueError."""
    named = any(name.lower().endswith("_proxy") for name in os.environ)
    if LOOPBACK.fullmatch(host) or not named:
        return None  # urllib is large
    import urllib.request

    proxies = urllib.request.getproxies()
    url = proxies.get("https" if tls else "http") or proxies.get("all")
    if not url or urllib.request.proxy_bypass("%s:%d" % (host, port)):
        return None
    return Proxy(url)


# -----------------------------------------------------------------------------------
# URL file: tells other programs where the services are reached, as long as they are.
# -----------------------------------------------------------------------------------
class URLFile:
    """The file of --url-file. Raises ValueError if it cannot be written. One that a
    killed process left behind goes at once: it would tell what may not be true."""

    def __init__(self, path: Optional[str]) -> None:
        self.path, self.written = path, b""
        if path is not None:
            try:
                self.check(path)
                os.remove(self.write_beside(path))
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
            except OSError as error:
                cause = error.strerror or error
                raise ValueError("cannot write %s: %s" % (path, cause)) from None

    def check(self, path: str) -> None:
        """A file of ours, or none."""
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is there, and no regular file")
            if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
                raise OSError("it belongs to somebody else")
        if not os.path.basename(path):
            raise OSError("this names no file")

    def write_beside(self, path: str, data: bytes = b"", replace: bool = False) -> str:
        """A new file in the same folder, by a name that nobody could have foreseen. It
        may `replace` the other."""
        beside = "%s.%s" % (path, os.urandom(8).hex())
        how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(beside, how, 0o644), "wb")
        try:
            with file:
                file.write(data)
            if replace:
                os.replace(beside, path)
        except OSError:
            os.remove(beside)
            raise
        return beside

    def write(self, id: str, urls: Dict[str, str]) -> None:
        """Readers find all or nothing. `errors` has the services without a URL."""
        found: Dict[str, Any] = {"id": id, "pid": os.getpid(), "urls": {}}
        for name, url in urls.items():
            kind = "errors" if url.startswith("error: ") else "urls"
            found.setdefault(kind, {})[name] = url
        data = json.dumps(found, indent=2, sort_keys=True).encode() + b"\n"
        if self.path is not None and data != self.written:
            try:
                self.write_beside(self.path, data, replace=True)
                self.written = data
            except OSError as error:
                log.warning("cannot write %s: %s", self.path, error.strerror or error)

    def remove(self) -> None:
        """Unless somebody else has written it since."""
        with contextlib.suppress(OSError, ValueError):
            if self.written and read_file(str(self.path)) == self.written:
                os.remove(str(self.path))


# -----------------------------------------------------------------------------------
# Check: goes the way of a visitor step by step, says how each step went, and what to do
# where one failed. It uses what the client uses, and waits for one thing at a time.
# -----------------------------------------------------------------------------------
LOOK_UP_TIME = 10.0  # seconds for the resolver
LOGIN_TIME = 15.0  # seconds from the Upgrade to the URLs of the services
FETCH_TIME = 10.0  # seconds for a visitor's request
PROBE_TIME = 2.0  # seconds for a target to show whether it speaks TLS
SOON_HERE = 2.0  # seconds from an answer to the stream that brought it
SOON = 21  # days that a certificate should still have: renewals are due at 30
MARKS = {"ok": "32", "FAILED": "31", "skipped": "33"}  # and their colours
URL = re.compile(r"(https?|tcp)://(\[[^]]+\]|[^:/ ]+)(?::(\d+))?")
VALIDITY = re.compile(rb"\x17\x0d(\d{12})Z\x17\x0d(\d{12})Z")  # in DER, until 2049
TROUBLE = (  # what a fault that a visitor was told of, or a dial's, probably means
    ("refused", "start the service, or change its port in the list"),
    ("timeout", "is the host right, and does a firewall drop what comes to it?"),
    ("denied 401", '"auth" here is not that of the client that runs'),
    ("denied 403", '"visitors" does not have the address of this machine'),
    ("elsewhere", "does the name lead to this server? See --domain, and any front"),
    (".*TLS", "speaks the target TLS at all? then write http://, not https://"),
    ("broken|reset|error", "is what listens there a web server?"),
    ("no-name|no-service", "does the name lead to another server?"),
    ("offline|leaving", "another client with this id has come: choose one with -i"),
)


def advice_for(text: str, table: Any = ADVICE) -> str:
    return next((help for start, help in table if re.match(start, text)), "")


class Fetch(Ask):
    """A visitor's request for the page at /. Every answer is welcome."""

    def __init__(self, host: str, password: str) -> None:
        lines = "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n"
        if password:
            import base64

            said = base64.b64encode(password.encode()).decode()
            lines += "Authorization: Basic %s\r\n" % said
        super().__init__((lines % ("/", host) + "\r\n").encode(), 0)
        self.status, self.code = 0, ""

    def check(self, status: int, head: bytes) -> None:
        found = re.search(rb"(?i)\r\nx-tunnel-error: ([a-z-]+)", head)
        self.status, self.code = status, found.group(1).decode() if found else ""


def password_of(file: Watched, name: str) -> str:
    """The first pair in the "auth" of a service, as its file has it; "" for none."""
    pairs = parse_object(*file.contents) if file.contents else Pairs()
    inner = dict(pairs).get("services")
    for key, value in inner if isinstance(inner, Pairs) else pairs:
        if key.lower() == name and isinstance(value, Pairs):
            auth = dict(value).get("auth", "")
            return str(auth if isinstance(auth, str) else auth[0])
    return ""


class Staged:
    """A step of a dial that tells how it went."""

    def __init__(self, check: "Check", name: str, step: Any, tell: Call) -> None:
        self.check, self.name, self.step, self.tell = check, name, step, tell

    def go_on(self, dial: Dial) -> bool:
        self.check.stage = self.name
        done: bool = self.step is None or self.step.go_on(dial)
        if done:
            self.check.say("ok", self.name, self.tell(dial))
        return done


class LookUp:
    """Asks the resolver as a dial does."""

    def __init__(self, resolver: Any, target: Target) -> None:
        self.target, self.cause = target, ""
        self.found: List[str] = []
        resolver.ask(self)

    def on_addresses(self, found: List[Address]) -> None:
        self.found = sorted({str(address[0]) for _, address in found})

    def fail(self, error: Exception) -> None:
        self.cause = str(error)


class Check(Client):
    """A client that makes its way once; it is the uplink of its only tunnel."""

    checking = True

    def __init__(self, config: "Config") -> None:
        super().__init__(config._replace(inspect=None, url_file=None))
        self.client, self.stage, self.since = self, "", time.monotonic()
        self.failed = self.skipped = 0
        self.bad_targets: Set[str] = set()
        self.connection: Any = None  # that a dial has made
        self.error: Optional[Exception] = None  # or why it made none
        self.told: Optional[Dict[str, str]] = None  # the URLs
        self.over = ""  # why the link ended

    def say(self, mark: str, what: str, text: str, advice: str = "") -> None:
        """A line, and where it failed one with what to do."""
        now = time.monotonic()
        took, self.since = now - self.since, now
        self.failed += mark == "FAILED"
        self.skipped += mark == "skipped"
        shown = "%-8s" % mark
        if shows_colours(sys.stdout):
            shown = "\x1b[%sm%s\x1b[0m" % (MARKS[mark], shown)
        timed = mark != "skipped" and what != "url"
        line = "%-9s %s" % (what, text) + "  (%s)" % short_time(took) * timed
        fields = {"step": what, "result": mark, "seconds": round(took, 4)}
        if log.as_json:
            fields["advice"], line, advice = advice, text, ""
        self.write(line, colour=shown + " %s", fields=fields.items())
        if advice:
            self.write("%-19s-> %s" % ("", advice))

    def write(self, text: str, **more: Any) -> None:
        log.write(sys.stdout, "info", text, **more)

    def check(self) -> bool:
        """Go all the way; whether all went well."""
        if self.find() and self.reach() and self.log_in():
            self.say_urls()
        for name in sorted(self.services):
            self.try_target(name, self.services[name].target)
        for name in sorted(self.services):
            self.try_urls(name, (self.told or {}).get(name, ""))
        if not self.services:
            self.say("FAILED", "services", "there is none", "publish one: web=9000")
        for link in list(self.loop.links):
            link.close("the check is over")
        said = "%d failed, %d skipped." % (self.failed, self.skipped)
        self.write(said if self.failed or self.skipped else "All is well.")
        return not self.failed

    def wait(self, done: Call, seconds: float) -> None:
        """Let the loop turn until this is so, or for so long."""
        over: List[bool] = []
        timer = Timer(self.loop, self, functools.partial(over.append, True))
        timer.set(seconds)
        while not (done() or over):
            self.loop.turn()
        timer.clear()

    def dial(self, target: Target, steps: List[Any], seconds: float) -> bool:
        """Whether it was connected, and all steps taken: `connection` or `error`."""
        self.connection = self.error = None
        dial = Dial(self.resolver, target, steps, seconds, self)
        self.loop.guard(dial, dial.advance)
        self.wait(lambda: self.connection or self.error, 2 * seconds)
        return self.connection is not None

    def on_dialled(self, connection: Connection) -> None:
        self.connection = connection

    def on_undialled(self, error: Exception) -> None:
        self.error = error

    def why(self) -> str:
        return str(getattr(self.error, "strerror", None) or self.error or "no answer")

    # To the server.

    def find(self) -> bool:
        """The addresses of the first host on the way."""
        target, _ = Uplink.way(self)  # type: ignore[arg-type]
        name = LookUp(self.resolver, target)
        self.wait(lambda: name.found or name.cause, LOOK_UP_TIME)
        if name.found:
            self.say("ok", "name", "%s: %s" % (target.host, ", ".join(name.found)))
            return True
        advice = "is the name right (-h), and has this machine a network?"
        text = "%s: %s" % (target.host, name.cause or "no answer")
        self.say("FAILED", "name", text, advice)
        return False

    def reach(self) -> bool:
        """Connect, by the proxy if there is one; TLS; the Upgrade."""
        target, steps = Uplink.way(self)  # type: ignore[arg-type]
        own = 2 if self.config.tls else 1
        stages = [Staged(self, "connect", None, self.tell_address)]
        for step in steps[:-own]:
            stages.append(Staged(self, "proxy", step, lambda dial: "lets us through"))
        if self.config.tls:
            stages.append(Staged(self, "TLS", steps[-2], self.tell_tls))
        speaks = "the server speaks %s" % PROTOCOL
        stages.append(Staged(self, "protocol", steps[-1], lambda dial: speaks))
        self.stage = "connect"
        if self.dial(target, stages, SERVER_TIME):
            return True
        why = self.why()
        why, advice = why[5:] if why.startswith("TLS: ") else why, advice_for(why)
        if self.stage == "connect":
            advice = "does the server run, is %d its client port, and is that open?"
            advice %= self.config.port
        self.say("FAILED", self.stage, why, advice)
        return False

    def tell_address(self, dial: Dial) -> str:
        proxy = self.config.proxy
        by = ", the %s" % proxy.name if proxy else ""
        return "%s:%d%s" % (*dial.connection.sock.getpeername()[:2], by)

    def tell_tls(self, dial: Dial) -> str:
        """Its version, whose certificate, and how long that is good."""
        tls = dial.connection.transport.object
        text = "%s, the certificate is the right one" % tls.version()
        found = VALIDITY.search(tls.getpeercert(True) or b"")
        if found:
            import calendar

            until = time.strptime(found.group(2).decode(), "%y%m%d%H%M%S")
            days = (calendar.timegm(until) - time.time()) / 86400
            text += ", for %d days" % days
            if days < SOON:
                text += ": RENEW IT SOON"
        return text

    # Login.

    def log_in(self) -> bool:
        """As the client does; but where another one runs as this id it stays."""
        self.tunnel = Tunnel(self, self.connection)  # type: ignore[arg-type]
        self.wait(self.is_over, LOGIN_TIME)
        if self.told is not None:
            return True
        cause = str(self.refusal or self.over or "no answer")
        advice = ""
        if cause == WANTS_TOKEN:
            advice = "give it by --token-file, or in $%s" % TOKEN_VARIABLE
        elif cause == "no such id, or a wrong token":
            advice = "has the server's --tokens file %s, with this token?" % self.id
        elif "is taken" in cause:
            text = "a client runs as %s, and was left alone: this is what it serves"
            advice = "" if self.token else "if it is not yours, choose an id with -i"
            self.say("ok", "login", text % self.id, advice)
            found = self.tunnel.parting.get("urls")
            self.on_urls(found if isinstance(found, dict) else {})
            return True
        self.say("FAILED", "login", cause, advice)
        return False

    def is_over(self) -> Any:
        """The login: there are URLs, or a reason why not."""
        return self.told is not None or self.over or self.refusal

    def decide(self) -> None:
        """The server has said who it is."""
        if self.token and not self.tunnel.checks:
            self.over = "this old server would put off who runs as %s" % self.id
        else:
            self.tunnel.log_in()

    def on_login(self) -> None:
        self.say("ok", "login", "as %s" % self.id)

    def on_goodbye(self, tunnel: Tunnel, code: str, reason: str) -> None:
        self.over = self.over or reason or code

    def on_lost(self, tunnel: Tunnel, cause: str) -> None:
        self.over = self.over or cause

    def on_urls(self, message: Dict[str, Any]) -> None:
        self.told = {name: peer_text(message[name]) for name in message}

    # The services.

    def say_urls(self) -> None:
        """Where each service is, or why it is nowhere."""
        for name, url in sorted((self.told or {}).items()):
            if url.startswith("error: "):
                self.say("FAILED", "url", "%s: %s" % (name, url[len("error: ") :]))
            else:
                self.say("ok", "url", "%s  %s" % (name, url))
        for name in sorted(set(self.services) - set(self.told or self.services)):
            other = "the client that runs" if self.over else "the server"
            advice = "stop that client, or add the service to its list"
            advice = advice if self.over else "is the server older than this client?"
            self.say("FAILED", "url", "%s: %s does not have it" % (name, other), advice)

    def try_target(self, name: str, target: Target) -> None:
        steps = [StartTLS(*target.tls)] if target.tls else []
        if self.dial(target, steps, DIAL_TIME):
            self.connection.close()
            self.say("ok", "target", "%s  %s" % (name, target.text))
            return
        self.bad_targets.add(name)
        code = getattr(self.error, "code", "") or self.why()
        text = "%s  %s" % (name, self.why())
        if target.text not in text:
            text = "%s  %s: %s" % (name, target.text, self.why())
        self.say("FAILED", "target", text, advice_for(code, TROUBLE))

    def try_urls(self, name: str, told: str) -> None:
        """Ask as a visitor would, from here."""
        if not self.told or name not in self.told:
            self.say("skipped", "visit", "%s: it is not published" % name)
        elif name in self.bad_targets:
            self.say("skipped", "visit", "%s: its target failed" % name)
            return
        if " by CONNECT to " in told:
            self.say("skipped", "visit", "%s: by CONNECT only" % name)
            return
        for scheme, host, port in URL.findall(told):
            number = int(port[:6] or {"http": 80, "https": 443}.get(scheme, 0))
            if is_port(number) and number:
                self.visit(name, scheme, host.strip("[]"), number)

    def visit(self, name: str, scheme: str, host: str, port: int) -> None:
        """One URL; and where its name is not known, by the server's own address."""
        service, passes = self.services[name], "tls" in self.services[name].options
        url = "%s://%s:%d" % (scheme, host, port)
        where = self.config.host if host.endswith(".localhost") else host
        password, before_it = password_of(self.config.file, name), self.streams()
        fetch = Fetch(host if port in (80, 443) else "%s:%d" % (host, port), password)
        steps: List[Any] = [] if scheme == "tcp" or passes else [fetch]
        if scheme == "https":
            context = None if passes else self.config.tls
            context = context or make_context(None, passes)
            steps.insert(0, StartTLS(context, host, b""))
        target, proxy = Target(host, where, port), self.config.proxy
        if proxy and scheme != "https":
            self.say("skipped", "visit", "%s: only a proxy leads out of here" % url)
            return
        if proxy:
            target, before = proxy.way("%s:%d" % (host, port))
            steps = before + steps
        good = self.dial(target, steps, FETCH_TIME)
        if not good and "cannot find its address" in self.why():
            advice = "its name is not in the DNS: make a record for *.%s"
            self.say("FAILED", "visit", url, advice % host.partition(".")[2])
            good = self.dial(Target(host, self.config.host, port), steps, FETCH_TIME)
            url += " by %s" % self.config.host
        if good and not fetch.code:
            self.wait(lambda: self.streams() != before_it, SOON_HERE)
            fetch.code = "elsewhere" if self.streams() == before_it else ""
        self.tell_visit(service, url, fetch, good)

    def streams(self) -> Any:
        """How many visitors have come by our link; of that of another client, which
        runs, nobody knows: something new each time."""
        return object() if self.over else self.tunnel.link.last_id

    def tell_visit(self, service: Service, url: str, fetch: Fetch, good: bool) -> None:
        if good:
            self.connection.close()
        if not good:
            advice = advice_for(self.why()) or "is this port open to visitors?"
            self.say("FAILED", "visit", "%s: %s" % (url, self.why()), advice)
        elif fetch.code == "elsewhere":
            text = "%s: something answered, but nothing came by our link" % url
            self.say("FAILED", "visit", text, self.advice_to_visit(service, fetch.code))
        elif not fetch.status:
            self.say("ok", "visit", "%s: connected" % url)
        elif fetch.code:
            text = "%s: the server said %d %s" % (url, fetch.status, fetch.code)
            fetch.code += " %d" % fetch.status
            self.say("FAILED", "visit", text, self.advice_to_visit(service, fetch.code))
        elif fetch.status == 400 and self.speaks_tls(service.target):
            text = "%s: the service said 400" % url
            self.say("FAILED", "visit", text, self.advice_to_visit(service, "broken"))
        else:
            self.say("ok", "visit", "%s: %d" % (url, fetch.status))

    def advice_to_visit(self, service: Service, code: str) -> str:
        if code.startswith(("broken", "reset")) and self.speaks_tls(service.target):
            return 'the target speaks TLS: write "https://%s"' % service.target.text
        return advice_for(code, TROUBLE)

    def speaks_tls(self, target: Target) -> bool:
        """Whether a target that is listed without TLS has it."""
        steps = [StartTLS(make_context(None, True), "localhost", b"")]
        found = not target.tls and self.dial(target, steps, PROBE_TIME)
        if found:
            self.connection.close()
        return found


# -----------------------------------------------------------------------------------
# Inspector: the requests of late, in a browser on this machine. Taps keep the bytes
# that pass on each stream, and a NOTE says which of them a request was. Threads serve
# the page and send a request again; they see entries under a lock, and never a stream.
# -----------------------------------------------------------------------------------
INSPECT_PORT = "4040"
ENTRIES = 200  # requests that the page lists
KEPT = 256 << 10  # bytes of a request, and of an answer, that are kept
ALL_KEPT = 64 << 20  # bytes over all: then the oldest go
SWEEP = 5.0  # seconds between looks at streams that ended, and were not told of
NEWS_TIME = 25.0  # seconds that the page waits for news
REPLAY_TIME = 30.0  # seconds: an event stream may have no end
REPLAY_LIMIT = 1 << 20  # bytes of a request that was edited
PAGE_THREADS = 64  # a tab of a browser has six connections, and each has a thread
BYTES = "application/octet-stream"  # which no form of another page can post


class Strip:
    """What passes one way on a stream: its first bytes since the last request."""

    def __init__(self) -> None:
        self.start = self.total = 0  # where `data` begins, and where the stream is
        self.data = bytearray()

    def add(self, data: Any, room: int) -> int:
        """How many bytes of it were kept: none behind a gap."""
        gap = self.start + len(self.data) < self.total
        kept = 0 if gap else max(0, min(len(data), room, KEPT - len(self.data)))
        self.data += data[:kept]
        self.total += len(data)
        return kept

    def cut(self, first: int, last: int) -> bytes:
        """Take out these bytes of the stream, and forget what was before them. What
        was not kept is missing at the end; without its beginning it is nothing."""
        at, behind = first - self.start, last - self.start
        found = bytes(self.data[at:behind]) if 0 <= at <= behind else b""
        if behind > len(self.data):
            self.start, self.data = max(last, self.total), bytearray()
        elif behind > 0:
            self.start = last
            del self.data[:behind]
        return found


class Tape:
    """Both ways of a stream, and the OPEN that began it."""

    def __init__(self, stream: Stream, message: Dict[str, Any]) -> None:
        self.stream, self.message = stream, message
        self.came, self.went = Strip(), Strip()
        self.ended = False  # at the last sweep


class TappedPipe(Pipe):
    __slots__ = ("inspector", "tape")
    inspector: "Inspector"
    tape: Tape

    def receive(self, data: memoryview) -> None:
        self.inspector.keep(self.tape.came, data)
        super().receive(data)

    def pull(self, view: memoryview) -> Optional[int]:
        count = super().pull(view)
        self.inspector.keep(self.tape.went, view[: count or 0])
        return count


class TappedBridge(Bridge):
    inspector: Any
    tape: Tape

    def __init__(self, tunnel: Tunnel, stream: Stream, *more: Any) -> None:
        self.inspector = tunnel.client.inspector
        self.tape = self.inspector.begin(stream, more[-1])
        super().__init__(tunnel, stream, *more)

    def join(self, connection: Connection) -> Pipe:
        pipe = TappedPipe(self.stream, connection, self.target.text, "reset")
        pipe.inspector, pipe.tape = self.inspector, self.tape
        return pipe

    def receive(self, data: memoryview) -> None:
        self.inspector.keep(self.tape.came, data)
        super().receive(data)


class Entry(NamedTuple):
    """One request of the list. `shown` is what the page's list gets."""

    shown: Dict[str, Any]
    message: Dict[str, Any]  # the OPEN, or nothing
    request: bytes
    answer: bytes


class Inspector:
    """Listens on `port` of 127.0.0.1, 0 for any. Raises OSError."""

    def __init__(self, client: "Client", port: int) -> None:
        import threading

        self.client, self.token = client, os.urandom(16).hex()
        self.tapes: Dict[Tuple[Link, int], Tape] = {}
        self.taped = self.kept = 0  # bytes on tapes, and in entries
        self.entries: Deque[Entry] = collections.deque()
        self.count = 0  # of entries, so far
        self.deaf = False  # the server is too old to tell of requests
        self.news = threading.Condition()
        self.server = make_page_server(self, port)
        self.port = self.server.server_address[1]
        self.url = "http://127.0.0.1:%d/%s/" % (self.port, self.token)
        self.timer = Timer(client.loop, client, self.sweep)
        client.observers.append(self.on_outcome)

    def run(self) -> None:
        import threading

        self.timer.set(SWEEP)
        work = functools.partial(self.server.serve_forever, 0.2)
        threading.Thread(target=work, daemon=True).start()
        self.client.show("inspect  " + self.url, {"inspect": self.url})

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    # On the loop: bytes pass, requests end.

    def begin(self, stream: Stream, message: Dict[str, Any]) -> Tape:
        tape = self.tapes[stream.link, stream.id] = Tape(stream, message)
        return tape

    def keep(self, strip: Strip, data: Any) -> None:
        self.taped += strip.add(data, ALL_KEPT - self.taped)
        if self.taped + self.kept > ALL_KEPT:
            with self.news:
                self.shed()

    def on_outcome(self, outcome: Outcome) -> None:
        """An observer: takes what the request was off its tape."""
        tape = self.tapes.get((outcome.link, outcome.stream))
        request = answer = b""
        if tape:
            before = len(tape.came.data) + len(tape.went.data)
            request = tape.came.cut(*outcome.request)
            answer = tape.went.cut(*outcome.answer)
            self.taped -= before - len(tape.came.data) - len(tape.went.data)
        self.add(outcome, tape.message if tape else {}, (request, answer))

    def add(
        self, outcome: Outcome, message: Any, kept: Tuple[bytes, bytes], again: int = 0
    ) -> int:
        """A new entry; its number. `again` is that of the one that was sent again."""
        request, answer = kept
        shown = outcome.to_json()
        shown["request"] = outcome.request[1] - outcome.request[0]
        shown["answer"] = outcome.answer[1] - outcome.answer[0]
        shown["whole"] = 0 < len(request) == shown["request"]
        shown["at"], shown["again"] = time.time() - outcome.seconds, again
        shown["url"] = self.client.urls.get(outcome.service, "")
        with self.news:
            self.count += 1
            shown["number"] = self.count
            self.entries.append(Entry(shown, message, request, answer))
            self.kept += len(request) + len(answer)
            self.shed()
            self.news.notify_all()
            return self.count

    def shed(self) -> None:
        """The oldest go, when there are too many, or too many bytes."""
        held = len(self.entries) > ENTRIES or self.taped + self.kept > ALL_KEPT
        while held and self.entries:
            old = self.entries.popleft()
            self.kept -= len(old.request) + len(old.answer)
            held = len(self.entries) > ENTRIES or self.taped + self.kept > ALL_KEPT

    def sweep(self) -> None:
        """Forget the streams that ended a while ago."""
        self.timer.set(SWEEP)
        for key, tape in list(self.tapes.items()):
            if tape.ended:
                self.taped -= len(tape.came.data) + len(tape.went.data)
                del self.tapes[key]
            tape.ended = not tape.stream.open

    # In threads: what the page asks for.

    def answer(self, method: str, path: str, fields: Any, body: bytes) -> Any:
        """Status, type and body. Another page in the browser may not ask (its Origin
        and Host tell), nor may another user of this machine (who has no token)."""
        import hmac

        hosts = ["%s:%d" % (name, self.port) for name in ("127.0.0.1", "localhost")]
        origin = fields.get("Origin", "http://" + hosts[0]).partition("://")[2]
        if fields.get("Host") not in hosts or origin not in hosts:
            return 403, "text/plain", b"not from there\n"
        _, token, what, *more = (path.partition("?")[0] + "//").split("/")
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return 404, "text/plain", b"the client prints the whole address\n"
        number = int(more[0][:9]) if more[0].isdecimal() else 0
        if method == "GET" and what == "":
            return 200, "text/html", INSPECT_PAGE.encode()
        if method == "GET" and what == "news":
            return 200, "application/json", json.dumps(self.wait(number)).encode()
        found = self.find(number)
        if method == "GET" and found and what in ("request", "answer"):
            return 200, BYTES, getattr(found, what)
        if method == "POST" and fields.get("Content-Type") == BYTES:
            if what == "clear":
                self.clear()
                return 200, "application/json", b"0"
            if what == "replay" and found:
                return 200, "application/json", b"%d" % self.replay(found, body)
        return 404, "text/plain", b"no longer kept\n"

    def wait(self, number: int) -> Dict[str, Any]:
        """The entries behind this one, as soon as there is one."""
        with self.news:
            self.news.wait_for(lambda: self.count != number, NEWS_TIME)
            first = self.entries[0].shown["number"] if self.entries else self.count + 1
            new = [e.shown for e in self.entries if e.shown["number"] > number]
            return {"first": first, "count": self.count, "new": new, "deaf": self.deaf}

    def find(self, number: int) -> Optional[Entry]:
        with self.news:
            return next((e for e in self.entries if e.shown["number"] == number), None)

    def clear(self) -> None:
        with self.news:
            self.entries.clear()
            self.kept = 0
            self.count += 1
            self.news.notify_all()

    def replay(self, entry: Entry, request: bytes) -> int:
        """Send a request to the target of its service; the number of its entry."""
        import http.client

        old, start, exchange, why = entry.shown, time.monotonic(), None, ("", "")
        where = old["visitor"], "", old.get("service", "")
        what = request.split(b"\r\n", 1)[0].decode("latin-1").split(" ") + ["", ""]
        try:
            with connect_to(self.client.services[where[2]], entry.message) as sock:
                exchange = Exchange(sock, request)
                exchange.read(what[0])
        except KeyError:
            why = "replay", "there is no service %s any more" % where[2]
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = "replay", str(error) or type(error).__name__
        status, size = (exchange.status, exchange.size) if exchange else (0, 0)
        answer = bytes(exchange.kept) if exchange else b""
        seconds = time.monotonic() - start
        outcome = Outcome(
            *where, what[0], what[1], status, *why, size, 0, seconds, 0,
            (0, len(request)), (0, size),
        )  # fmt: skip
        return self.add(outcome, entry.message, (request, answer), old["number"])


def connect_to(service: Service, message: Dict[str, Any]) -> Any:
    """A blocking socket to a target, as a visitor's stream would have it. Raises
    OSError."""
    target, version = service.target, service.options.get("proxy_protocol")
    if target.port:
        sock: Any = socket.create_connection((target.host, target.port), DIAL_TIME)
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(target.host)
    sock.settimeout(REPLAY_TIME)
    if version:
        sock.sendall(proxy_header(version, message))
    if target.tls:
        import hashlib

        context, name, pin = target.tls
        sock = context.wrap_socket(sock, server_hostname=name)
        if pin and hashlib.sha256(sock.getpeercert(True)).digest() != pin:
            raise OSError("%s has another fingerprint" % target.text)
    return sock


class Exchange:
    """One request on a blocking socket; of the answer the first KEPT bytes."""

    def __init__(self, sock: Any, request: bytes) -> None:
        self.sock, self.kept, self.size, self.status = sock, bytearray(), 0, 0
        self.until = time.monotonic() + REPLAY_TIME
        sock.sendall(request)

    def read(self, method: str) -> None:
        """To the end of the answer. Raises OSError or HTTPException."""
        import http.client

        answer = http.client.HTTPResponse(self, method=method)  # type: ignore[arg-type]
        answer.begin()
        self.status = answer.status
        while answer.read(1 << 16):
            pass

    def makefile(self, *_: Any) -> Any:
        """What http.client reads, in place of the socket."""
        import io

        raw = type("Raw", (io.RawIOBase,), {})()
        raw.readable = lambda: True
        raw.readinto = self.read_into
        return io.BufferedReader(raw)

    def read_into(self, view: Any) -> int:
        self.sock.settimeout(max(0.01, self.until - time.monotonic()))
        count = int(self.sock.recv_into(view))
        self.kept += view[: min(count, KEPT - len(self.kept))]
        self.size += count
        return count


def make_page_server(inspector: Inspector, port: int) -> Any:
    """Raises OSError."""
    import http.server
    import socketserver
    import threading

    class PageServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True
        allow_reuse_address = os.name != "nt"  # where it would share the port

        def server_bind(self) -> None:  # without asking the DNS for our name
            socketserver.TCPServer.server_bind(self)
            self.server_name, self.server_port = "localhost", self.server_address[1]

        def verify_request(self, *_: Any) -> bool:
            return threading.active_count() < PAGE_THREADS

        def handle_error(self, *_: Any) -> None:
            pass  # the browser has left

    return PageServer(("127.0.0.1", port), make_handler(inspector))


def make_handler(inspector: Inspector) -> Any:
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 2 * NEWS_TIME

        def do_GET(self) -> None:
            size = self.headers.get("Content-Length", "0")
            if not size.isdecimal() or int(size[:9]) > REPLAY_LIMIT:
                return self.send_error(413)
            body = self.rfile.read(int(size[:9]))
            asked = self.command, self.path, self.headers, body
            status, kind, said = inspector.answer(*asked)
            nonce = os.urandom(12).hex()
            if kind == "text/html":
                said = said.replace(b"NONCE", nonce.encode())
            self.send_response(status)
            for name, value in PAGE_FIELDS:
                self.send_header(name, value.replace("NONCE", nonce))
            self.send_header("Content-Type", kind + "; charset=utf-8")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


# -----------------------------------------------------------------------------------
# The inspector's page. It cuts the bytes into heads and bodies, and undoes chunks and
# codings; what comes from outside gets into it as text.
# -----------------------------------------------------------------------------------
PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-NONCE'; style-src 'nonce-NONCE'; img-src "
    "blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
PAGE_FIELDS = (
    ("Content-Security-Policy", PAGE_POLICY),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)
INSPECT_PAGE = r"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>Requests</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<link rel="icon" href="data:,"><style nonce="NONCE">
:root { color-scheme: light dark; --bg: #fff; --fg: #1b2230; --dim: #5b6577;
  --line: #e1e5ec; --soft: #f4f6f9; --on: #e3ecfd; --accent: #1f4fd0;
  --c2: #15693f; --c3: #0b6390; --c4: #8a5300; --c5: #bb2027; --c0: #5b6577 }
@media (prefers-color-scheme: dark) { :root { --bg: #13161c; --fg: #e4e8ef;
  --dim: #98a2b3; --line: #2a303b; --soft: #1a1e26; --on: #22304d; --accent: #8fb2ff;
  --c2: #55c98f; --c3: #6bb8ee; --c4: #eeae4a; --c5: #ff8b8f; --c0: #98a2b3 } }
* { box-sizing: border-box } [hidden] { display: none !important }
body { margin: 0; height: 100vh; display: flex; flex-direction: column;
  background: var(--bg); color: var(--fg); font: 14px/1.45 system-ui, sans-serif }
header { display: flex; gap: 10px; align-items: center; padding: 10px 14px;
  border-bottom: 1px solid var(--line) }
h1 { font-size: 15px; margin: 0; white-space: nowrap } h1 small { color: var(--dim);
  font-weight: 400; margin-left: 6px }
input, textarea, button { font: inherit; color: inherit; background: var(--bg);
  border: 1px solid var(--line); border-radius: 6px; padding: 5px 10px }
input { flex: 1; min-width: 60px; max-width: 420px; margin-left: auto }
button { cursor: pointer; white-space: nowrap } button:hover { background: var(--soft) }
button.main { background: var(--accent); border-color: var(--accent); color: var(--bg) }
button:disabled { color: var(--dim); background: var(--soft); border-color: var(--line);
  cursor: default }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
main { flex: 1; display: flex; min-height: 0 } #list { flex: 0 0 46%; overflow: auto;
  margin: 0; padding: 0; list-style: none; border-right: 1px solid var(--line) }
#list li { display: grid; grid-template-columns: 64px 40px 56px 1fr 64px 92px; gap: 8px;
  padding: 6px 14px; cursor: pointer; border-bottom: 1px solid var(--line);
  font: 12.5px/1.5 ui-monospace, monospace; align-items: center }
#list li:hover { background: var(--soft) } #list li[aria-selected=true] {
  background: var(--on) } li > * { overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap } .dim { color: var(--dim) } .num { text-align: right }
.path b { font-weight: 600 } .bar { position: relative; text-align: right }
.bar i { position: absolute; left: 0; bottom: 0; height: 3px; border-radius: 2px;
  background: var(--accent); opacity: .6 }
.s2 { color: var(--c2) } .s1, .s3 { color: var(--c3) } .s4 { color: var(--c4) }
.s5 { color: var(--c5) } .s0 { color: var(--c0) }
#detail { flex: 1; min-width: 0; overflow: auto; padding: 14px 18px }
.tools { display: flex; flex-wrap: wrap; gap: 8px; margin: 10px 0 4px }
h2 { font: 600 15px/1.4 ui-monospace, monospace; margin: 0; overflow-wrap: anywhere }
h3 { font-size: 13px; margin: 20px 0 6px } h3 .dim { font-weight: 400 }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
td { padding: 2px 8px 2px 0; vertical-align: top; overflow-wrap: anywhere;
  font: 12.5px/1.5 ui-monospace, monospace; border-bottom: 1px solid var(--line) }
td:first-child { color: var(--dim); width: 180px }
.first { font: 12.5px/1.5 ui-monospace, monospace; overflow-wrap: anywhere;
  padding-bottom: 4px; border-bottom: 1px solid var(--line) }
pre, textarea { font: 12.5px/1.5 ui-monospace, monospace; background: var(--soft);
  border-radius: 6px; padding: 10px 12px; margin: 8px 0 0; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 60vh; overflow: auto } img { max-width: 100%;
  margin-top: 8px } textarea { width: 100%; height: 40vh; display: block }
.none { color: var(--dim); padding: 40px 18px; text-align: center }
#back { display: none } @media (max-width: 760px) { #list, #detail { flex: 1 0 100% }
  #list { border: 0 } #list li { grid-template-columns: 34px 48px 1fr 60px }
  #list li .wide { display: none } #detail, .open #list { display: none }
  .open #detail { display: block } #back { display: block } td:first-child {
  width: 120px } h1 small { display: none } }
</style></head><body>
<header><h1>Requests<small id="state" role="status"></small></h1>
<input id="filter" type="search" placeholder="Filter: path, status, service ..."
  aria-label="Filter"><button id="clear">Clear</button></header>
<main id="main"><ol id="list" role="listbox" aria-label="Requests" tabindex="0"></ol>
<section id="detail" aria-live="polite"><p class="none">Nothing has come yet. Requests
stand here as they end.</p></section></main>
<script nonce="NONCE">
"use strict";
const $ = id => document.getElementById(id), rows = new Map();
let last = 0, chosen = 0, deaf = false;
function el(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text; made.className = kind;
  return made;
}
const size = n => n < 1000 ? n + " B" : n < 999500 ? (n / 1e3).toPrecision(3) + " kB"
  : (n / 1e6).toPrecision(3) + " MB";
const time = s => s < 1 ? Math.round(s * 1000) + " ms" : s.toFixed(1) + " s";
const latin = bytes => Array.from(bytes, x => String.fromCharCode(x)).join("");
const pause = ms => new Promise(f => setTimeout(f, ms));
const octets = text => Uint8Array.from(text, x => x.charCodeAt(0));

function row(e) {
  const li = el("li"), path = el("span", "", "path"), bar = el("span", "", "bar dim");
  li.id = "r" + e.number; li.setAttribute("role", "option");
  const from = e.again ? "replay of " + e.again : e.service || "";
  path.append(e.target || e.code || "", el("span", "  " + from, "dim"));
  path.title = e.target || "";
  bar.append(time(e.seconds), el("i"));
  bar.lastChild.style.width = Math.min(100, 12 * Math.log2(1 + e.seconds * 1000)) + "%";
  li.append(el("span", new Date(e.at * 1000).toLocaleTimeString("en-GB"), "dim wide"),
    el("span", e.status || "end", "s" + Math.floor(e.status / 100)),
    el("span", e.method || ""), path, el("span", size(e.sent), "num dim wide"), bar);
  li.onclick = () => choose(e.number);
  return li;
}
function fits(e) {
  const said = [e.method, e.target, e.status, e.service, e.visitor, e.code].join(" ");
  return said.toLowerCase().includes($("filter").value.trim().toLowerCase());
}
function state(text) { $("state").textContent = text; }
function count() {
  const shown = [...rows.values()].filter(x => !x.li.hidden).length;
  state(deaf ? "The server is too old to tell of requests." : shown === rows.size
    ? rows.size + " kept" : shown + " of " + rows.size);
}
async function news() {
  for (;;) {
    try {
      const told = await (await fetch("news/" + last)).json();
      last = told.count; deaf = told.deaf;
      for (const [n, { li }] of rows)
        if (n < told.first) { li.remove(); rows.delete(n); }
      for (const e of told.new) {
        if (rows.has(e.number)) continue;
        const li = row(e);
        rows.set(e.number, { e, li }); li.hidden = !fits(e); $("list").prepend(li);
        if (!chosen && matchMedia("(min-width: 761px)").matches)
          choose(e.number, true);
      }
      count();
    } catch { state("the client is gone"); await pause(1000); }
    await pause(200);
  }
}
// A message: interim heads, the head, and the body without its chunks.
function parse(bytes) {
  let text = latin(bytes), head = "", end;
  do {
    end = text.indexOf("\r\n\r\n");
    if (end < 0) return { first: text, fields: [], body: new Uint8Array() };
    head = text.slice(0, end); text = text.slice(end + 4);
  } while (/^HTTP\/1\.\d 1(?!01)/.test(head) && text);
  const [first, ...lines] = head.split("\r\n");
  const fields = lines.map(x => [x.split(":")[0], x.slice(x.indexOf(":") + 1).trim()]);
  const found = { first, fields, raw: text, get: name => (fields.find(
    x => x[0].toLowerCase() === name) || [, ""])[1].toLowerCase() };
  if (found.get("transfer-encoding").includes("chunked")) text = joined(text);
  return Object.assign(found, { body: octets(text) });
}
function joined(text) {
  let body = "", at = 0;
  for (;;) {
    const end = text.indexOf("\r\n", at), size = parseInt(text.slice(at, end), 16);
    if (end < 0 || !size) return body;
    body += text.slice(end + 2, end + 2 + size); at = end + 4 + size;
  }
}
const MOST = 2 << 20;
async function unpack(message) {
  const coding = message.get("content-encoding").replace("x-", "");
  if (!message.body.length || !coding || coding === "identity") return message.body;
  if (!["gzip", "deflate"].includes(coding)) return null;
  const parts = [], stream = new Blob([message.body]).stream();
  const reader = stream.pipeThrough(new DecompressionStream(coding)).getReader();
  try {
    for (let had = 0, part; had < MOST && !(part = await reader.read()).done;) {
      parts.push(part.value); had += part.value.length;
    }
  } catch { /* what is cut, or broken, is shown as far as it goes */ }
  reader.cancel().catch(() => 0);
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
function hex(bytes) {
  const lines = [];
  for (let at = 0; at < Math.min(bytes.length, 4096); at += 16) {
    const part = bytes.slice(at, at + 16);
    const two = Array.from(part, x => x.toString(16).padStart(2, "0")).join(" ");
    lines.push(at.toString(16).padStart(6, "0") + "  " + two.padEnd(49)
      + latin(part).replace(/[^ -~]/g, "."));
  }
  return lines.join("\n") + (bytes.length > 4096 ? "\n..." : "");
}
function plain(bytes) {
  try {
    const reader = new TextDecoder("utf-8", { fatal: true });
    const text = reader.decode(bytes, { stream: true });
    return /[\0-\x08\x0e-\x1f]/.test(text) ? null : text;
  } catch { return null; }
}
async function body(message) {
  const bytes = await unpack(message), kind = message.get("content-type");
  if (bytes === null) return el("p", "This coding cannot be undone here.", "dim");
  if (!bytes.length) return "";
  if (/^image\/(png|jpe?g|gif|webp|avif|bmp|svg\+xml|x-icon)/.test(kind)) {
    const image = el("img");
    image.src = URL.createObjectURL(new Blob([bytes], { type: kind.split(";")[0] }));
    image.alt = "the body, " + size(bytes.length);
    return image;
  }
  let text = plain(bytes);
  if (text !== null) try { text = JSON.stringify(JSON.parse(text), null, 2); } catch { }
  return el("pre", text === null ? hex(bytes) : text);
}
async function bytes(e, way) {
  const answer = await fetch(way + "/" + e.number);
  return new Uint8Array(answer.ok ? await answer.arrayBuffer() : 0);
}
async function part(title, raw, full) {
  const box = el("div"), h3 = el("h3", title + " "), table = el("table");
  const short = raw.length < full ? ", of which " + size(raw.length) + " are kept" : "";
  h3.append(el("span", full ? size(full) + short : "none", "dim"));
  box.append(h3);
  const message = parse(raw), http = /HTTP\/1\.\d/.test(message.first);
  if (!raw.length) return box;
  if (!http) { box.append(el("pre", plain(raw) ?? hex(raw))); return box; }
  for (const [name, value] of message.fields)
    table.insertRow().append(el("td", name), el("td", value));
  box.append(el("div", message.first, "first"), table, await body(message));
  return box;
}
const quote = text => "'" + text.replace(/'/g, "'\\''") + "'";
function curl(e, message) {
  const [method, target] = message.first.split(" ");
  const drop = /^(host|connection|content-length|transfer-encoding|x-forwarded-.*)$/i;
  const base = e.url.split(" ")[0] || "http://" + message.get("host");
  const url = base.replace(/\/$/, "");
  const words = ["curl", "-g", "--path-as-is"];
  if (method === "HEAD") words.push("-I"); else words.push("-X", quote(method));
  for (const [name, value] of message.fields) if (!drop.test(name))
    words.push("-H", quote(value ? name + ": " + value : name + ";"));
  words.push(quote(url + target));
  if (!message.body.length) return words.join(" ");
  const text = plain(message.body);
  if (text !== null) return words.join(" ") + " --data-raw " + quote(text);
  const escaped = Array.from(message.body, x => "\\" + x.toString(8).padStart(3, "0"));
  return "printf '" + escaped.join("") + "' | " + words.join(" ") + " --data-binary @-";
}
async function replay(e, data) {
  const type = { "Content-Type": "application/octet-stream" }, before = chosen;
  const said = await fetch("replay/" + e.number, { method: "POST", body: data,
    headers: type });
  if (!said.ok) { state("it is no longer kept"); return; }
  const number = await said.json();
  for (let n = 0; n < 50 && !rows.has(number); n++) await pause(100);
  if (rows.has(number) && chosen === before) choose(number);
}
function editor(e, raw) {
  const message = parse(raw), text = plain(message.body), area = el("textarea");
  const drop = /^(content-length|transfer-encoding)$/i;
  const send = el("button", "Send", "main");
  const lines = message.fields.filter(x => !drop.test(x[0])).map(x => x.join(": "));
  area.value = [message.first, ...lines, "", text ?? ""].join("\n");
  area.setAttribute("aria-label", "The request");
  area.spellcheck = false;
  send.onclick = () => {
    const [head, ...rest] = area.value.split("\n\n");
    const content = text === null ? message.body
      : new TextEncoder().encode(rest.join("\n\n"));
    let fields = head.trim().split("\n");
    if (content.length || !/^(GET|HEAD|OPTIONS|DELETE) /.test(head))
      fields.push("Content-Length: " + content.length);
    fields = fields.join("\r\n") + "\r\n\r\n";
    const bytes = /[^\0-\xff]/.test(fields) ? new TextEncoder().encode(fields)
      : octets(fields);
    replay(e, new Blob([bytes, content]));
  };
  const tools = el("div", "", "tools");
  tools.append(send);
  if (text === null) tools.append(el("span", "The body stays as it is.", "dim"));
  return [area, tools];
}
async function choose(number, quietly) {
  const { e, li } = rows.get(number);
  $("list").querySelector("[aria-selected]")?.removeAttribute("aria-selected");
  li.setAttribute("aria-selected", "true"); li.scrollIntoView({ block: "nearest" });
  $("list").setAttribute("aria-activedescendant", li.id);
  if (!quietly) $("main").classList.add("open");
  chosen = number;
  const [request, answer] = [await bytes(e, "request"), await bytes(e, "answer")];
  const why = [e.code, e.cause].filter(Boolean).join(": "), made = el("div");
  const tools = el("div", "", "tools"), back = el("button", "Back"), edit = el("div");
  const again = el("button", "Replay", "main"), change = el("button", "Edit");
  const copy = el("button", "Copy as curl");
  back.id = "back"; back.onclick = () => $("main").classList.remove("open");
  again.id = "replay"; again.onclick = () => replay(e, request);
  change.onclick = () => edit.hasChildNodes() ? edit.replaceChildren()
    : edit.append(...editor(e, request));
  copy.onclick = async () => {
    await navigator.clipboard.writeText(curl(e, parse(request)));
    copy.textContent = "Copied"; await pause(1500); copy.textContent = "Copy as curl";
  };
  const can = e.whole && request.length > 0 && /^\S+ \S+ HTTP/.test(latin(
    request.slice(0, 9000)));
  again.disabled = change.disabled = copy.disabled = !can;
  if (!can) again.title = "the request was not kept whole";
  tools.append(back, again, change, copy);
  const when = new Date(e.at * 1000).toLocaleTimeString("en-GB");
  const said = [e.status || "end", e.service, "from " + e.visitor, "at " + when,
    time(e.seconds), e.again ? "replay of " + e.again : ""];
  made.append(el("h2", [e.method, e.target].filter(Boolean).join(" ") || "-"),
    el("div", said.filter(Boolean).join(", "), "dim"), el("div", why, "s5"),
    tools, edit, await part("Request", request, e.request),
    await part("Answer", answer, e.answer));
  if (chosen === number) $("detail").replaceChildren(made);
}
function step(by) {
  const shown = [...$("list").children].filter(x => !x.hidden);
  const at = shown.findIndex(x => x.id === "r" + chosen);
  const next = shown[Math.max(0, Math.min(shown.length - 1, at + by))];
  if (next) choose(+next.id.slice(1));
}
document.onkeydown = event => {
  if (/INPUT|TEXTAREA/.test(event.target.tagName) || event.ctrlKey || event.metaKey
      || event.altKey) return;
  const does = { ArrowDown: () => step(1), ArrowUp: () => step(-1), r: () =>
    $("replay")?.click(), "/": () => $("filter").focus(), Escape: () =>
    $("main").classList.remove("open") }[event.key];
  if (does) { event.preventDefault(); does(); }
};
$("filter").oninput = () => { for (const { e, li } of rows.values())
  li.hidden = !fits(e); count(); };
$("clear").onclick = () => fetch("clear/0", { method: "POST", headers: {
  "Content-Type": "application/octet-stream" } });
news();
</script></body></html>
"""


# -----------------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------------
HELP = "\0"  # what -h has for a value when it stands alone
DEFAULT_FILE = os.path.join("~", ".tunnel-services.json")
TOKEN_VARIABLE = "MDM_TUNNEL_TOKEN"
WANTS_TOKEN = "this server wants a token"  # as servers say it, from 1.0.0 on


class Config(NamedTuple):
    """What the command line says. `file` holds a token and services, `given` are the
    services over them, and `token` is that of the id; "" leaves it to `file`. `tls` is
    an SSLContext, `pin` the SHA-256 of the server's certificate."""

    file: Watched = Watched([], parse_file)
    given: Dict[str, Service] = {}
    token: Watched = Watched([], str)
    host: str = "localhost"
    port: int = 8001
    id: str = "admin"
    max_attempts: int = 0
    tls: Any = None
    pin: bytes = b""
    proxy: Optional[Proxy] = None
    drain: float = DRAIN
    url_file: Optional[str] = None
    inspect: Optional[int] = None  # a port for the inspector
    check: bool = False


def make_context(ca: Optional[str], pinned: bool) -> Any:
    """For the client's side of TLS. Nothing is taken on trust: a certificate is checked
    with the authorities of the system or of the file `ca`, or it has the fingerprint
    wanted. Raises OSError or ValueError."""
    import ssl

    if not pinned or ca is not None:
        return demand_tls_1_2(ssl.create_default_context(cafile=ca))
    context = demand_tls_1_2(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def parse_fingerprint(text: str) -> bytes:
    """A certificate's SHA-256, as openssl writes it or without the colons."""
    digits = re.sub(r"[:\s]", "", text.rpartition("=")[2])
    if not re.fullmatch("[0-9A-Fa-f]{64}", digits):
        raise argparse.ArgumentTypeError("a SHA-256 has 64 hexadecimal digits")
    return bytes.fromhex(digits)


class FileParser(Parser):
    """Takes options from @file as one would type them."""

    def convert_arg_line_to_args(self, line: str) -> List[str]:
        import shlex

        return shlex.split(line, comments=True)


def make_parser() -> FileParser:
    parser = FileParser(
        prog="mdm_tunnel_client.py",
        usage="%(prog)s [options] [name=target ...]",
        description="Publishes local services through an mdm-tunnel server. A target "
        "is a port, host:port, https://host or unix:/path; given here, it replaces the "
        "default file. @FILE holds options as one would type them. Silent without -v.",
        add_help=False,
        fromfile_prefix_chars="@",
    )
    add = parser.add_argument
    add("-c", "--config", "-s", "--service-definitions", metavar="FILE",
        help='services, as {"name": target} ($HOME/.tunnel-services.json)')  # fmt: skip
    add("-i", "--id", "-u", default="admin", help="id to log in with (%(default)s)")
    add("-h", "--host", nargs="?", const=HELP, default="localhost",
        help="the server, as host, host:port or https://host[:port], which is by "
        "TLS on port 443 (%(default)s)")  # fmt: skip
    add("-p", "--port", type=int, help="its client port (8001)")
    add_server_options(add)
    add("--max-attempts", type=int, default=0, metavar="N",
        help="give up after N failures in a row (no limit)")  # fmt: skip
    add("--drain", type=drain_time, default=DRAIN, metavar="SECONDS",
        help="after SIGTERM let what runs go on for so long (%(default)g)")  # fmt: skip
    add("--url-file", metavar="PATH",
        help="as long as it runs this holds id, URLs and pid, as JSON")  # fmt: skip
    add_seeing_options(add)
    add("-V", "--version", action="version", version=VERSION)
    add("--help", action="help", help="this text; also -h alone")
    return parser


def add_seeing_options(add: Call) -> None:
    """What is seen of it, and what ends at once."""
    add("--inspect", nargs="?", const=INSPECT_PORT, metavar="PORT",
        help="show each request on a page at this machine's port PORT (%s), and "
        "send it again from there; its address is printed" % INSPECT_PORT)  # fmt: skip
    add("--check", action="store_true",
        help="go the way of a visitor, say how each step went and what to do where one "
        "failed, and end; puts no other client off")  # fmt: skip
    add("--print-unit", action="store_true",
        help="print a unit of systemd for just these options, and end")  # fmt: skip
    add("-v", "--verbose", action="count", default=0,
        help="print the URLs, say what happens; -vv: every frame")  # fmt: skip
    add("--log-json", action="store_true", help="the same, each line a JSON object")


def add_server_options(add: Call) -> None:
    """How the server knows us, and we know the server."""
    add("--token-file", metavar="FILE",
        help="holds the token of the id, and nothing else; without it "
        "$MDM_TUNNEL_TOKEN counts, the service file, or you are asked")  # fmt: skip
    add("--tls", action="store_true",
        help="dial by TLS; the certificate must be for the host")  # fmt: skip
    add("--tls-ca", metavar="FILE", help="authorities to trust, and no others")
    add("--fingerprint", type=parse_fingerprint, default=b"", metavar="SHA256",
        help="the server's certificate is this; without --tls-ca nothing else "
        "counts")  # fmt: skip
    add("--no-proxy", action="store_true",
        help="dial directly, whatever https_proxy and its like say")  # fmt: skip


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    """Options and name=target in any order. Exits with 2 when something is wrong."""
    parser = make_parser()
    try:
        options, rest = parser.parse_known_args(argv)
        if options.host == HELP:
            parser.print_help()
            sys.exit(0)
        if options.inspect and "=" in options.inspect:  # web=9000 stood behind it
            rest.append(options.inspect)
            options.inspect = INSPECT_PORT
        options.inspect = inspect_port(options.inspect)
        for word in rest:
            if "=" not in word or word.startswith("-"):
                raise ValueError("no option, and not like web=9000: %s" % word)
        options.given = parse_services([word.partition("=")[::2] for word in rest])
        scheme, host = split_url(options.host)
        if options.port is None:
            options.port = {"https": 443, "http": 80}.get(scheme, 8001)
        if scheme == "http" and (options.tls or options.tls_ca or options.fingerprint):
            raise ValueError("TLS goes with https://, not with http://")
        options.tls = options.tls or scheme == "https"
        options.host, options.port = split_host(host, options.port)
        if not LABEL.fullmatch(options.id.lower()):
            raise ValueError("an id has letters, digits, - and _, and no --")
        if options.max_attempts < 0:
            raise ValueError("--max-attempts is a number of failures")
    except ValueError as error:
        parser.error(str(error))
    if options.print_unit:
        print_client_unit(argv, options)
        sys.exit(0)
    return options


def inspect_port(text: Optional[str]) -> Optional[int]:
    """Raises ValueError."""
    if text is None:
        return None
    if not (text.isdecimal() and int(text[:9]) < 1 << 16):
        raise ValueError("--inspect has a port: 0 to 65535, and not %r" % text)
    return int(text)


def print_client_unit(argv: Optional[List[str]], options: argparse.Namespace) -> None:
    """The token stays where only root reads it, and is handed to the unit as a copy.
    The service file is read by the unit's user, also when it changes."""
    names = ["config", "tls_ca", "url_file", "token_file"]
    words, notes = typed_words(make_parser(), argv, names), []
    paths = [options.config, options.tls_ca, options.url_file]
    if options.config is None and not options.given:
        paths[0] = os.path.expanduser(DEFAULT_FILE)
        words += ["--config", paths[0]]
    paths = [os.path.abspath(path) for path in paths if path is not None]
    more, secret = owner_lines(paths), options.token_file
    if options.url_file is not None:
        folder = os.path.dirname(os.path.abspath(options.url_file))
        more.append("ReadWritePaths=%s" % folder.replace("%", "%%"))
    named = any(name.lower().endswith("_proxy") for name in os.environ)
    if named and not options.no_proxy:  # the URL may hold a password
        more.append("EnvironmentFile=/etc/mdm-tunnel-proxy")
        notes.append("The proxy is not in here: by env | grep -i _proxy= save it as ")
        notes[-1] += "/etc/mdm-tunnel-proxy, with mode 600."
    if secret is None and TOKEN_VARIABLE in os.environ:
        secret = "/etc/mdm-tunnel-token"
        words += ["--token-file", secret]
        note = "The token is not in here: put it into %s, with mode 600."
        notes.append(note % secret)
    if secret is not None:
        words[words.index("--token-file") + 1] = CREDENTIAL + "token"
        path = os.path.abspath(secret).replace("%", "%%")
        more.append("LoadCredential=token:%s" % path)
    print_unit(words, options.drain, notes, [*more, "CapabilityBoundingSet="])


def parse_token(data: bytes) -> str:
    """The file of --token-file. Raises ValueError."""
    text = data.decode("latin-1").strip("\r\n")
    text = text[3:] if text.startswith("\xef\xbb\xbf") else text  # UTF-8's BOM
    if text.startswith("{"):
        raise ValueError("this is JSON; here stands a token, and nothing else")
    return check_token(text)


def load_token(path: Optional[str]) -> Watched:
    """The token in the file, or in the environment; "" when there is none."""
    token = os.environ.pop(TOKEN_VARIABLE, None)
    if path is None:
        return Watched([], lambda: "" if token is None else check_token(token))
    warn_of_readers([path])
    if os.path.isfile(path):
        return Watched([path], parse_token)
    with open(path, "rb") as file:  # what a pipe holds can be read but once
        return Watched([], functools.partial(parse_token, file.read(2 * TOKEN_LIMIT)))


def load_config(options: argparse.Namespace) -> Config:
    """Read the files that the command line names. Exits with 2 when one is wrong."""
    path, pin = options.config, options.fingerprint
    tls, proxy = None, None
    if path is None and not options.given:
        path = os.path.expanduser(DEFAULT_FILE)
    try:
        reading = path
        file = Watched([] if path is None else [path], parse_file)
        reading = options.token_file or TOKEN_VARIABLE
        token = load_token(options.token_file)
        reading = options.tls_ca or "--tls"
        if options.tls or pin or options.tls_ca is not None:
            tls = make_context(options.tls_ca, bool(pin))
        reading = "the proxy in the environment"
        if not options.no_proxy:
            proxy = find_proxy(options.host, options.port, tls is not None)
    except (OSError, ValueError) as error:
        cause = blame(error, [reading])
        if isinstance(error, FileNotFoundError) and reading == path != options.config:
            cause += "; write it, or name a service: web=9000"
        die(2, cause)
    return Config(file, options.given, token, options.host, options.port, options.id,
                  options.max_attempts, tls, pin, proxy, options.drain,
                  options.url_file, options.inspect, options.check)  # fmt: skip


def has_terminal() -> bool:
    """Whether somebody can be asked. The script itself may come by standard input, so
    the terminal counts, unless we are a job in its background, which it would stop."""
    if not any(stream and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        return False
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except (OSError, AttributeError):
        return os.name == "nt"


def ask_token(id: str) -> str:
    """Ask at the terminal; "" when nothing is said. A signal ends the client by an
    exception, so that the terminal shows again what is typed. Raises ValueError."""
    import getpass

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        said = getpass.getpass("Token of %s: " % id)
    except (EOFError, OSError):
        said = ""
    return said and check_token(said)


def serve(config: Config) -> None:
    """Serve until a signal. Raises ValueError or Refused."""
    if config.check:
        try:
            sys.exit(0 if Check(config).check() else 1)
        except KeyboardInterrupt:
            die(1, "stopped")
    client = Client(config)
    client.manager.connect(os.environ)
    ignore_signals()
    client.loop.catch_signals(client.on_signal)
    client.run()


def main(argv: Optional[List[str]] = None) -> None:
    """Serve until a signal. Exit status: 0, 1, 2 (usage, configuration), 3 (login
    refused) or 4 (attempts used up)."""
    survive_hangup()
    options = parse_arguments(argv)
    set_up_log(options.verbose, options.log_json)
    config = load_config(options)
    try:
        try:
            serve(config)
        except Refused as refusal:
            asks = str(refusal) == WANTS_TOKEN and has_terminal()
            token = ask_token(options.id) if asks else ""
            if not token:
                raise
            serve(config._replace(token=Watched([], lambda: token)))
    except ValueError as error:
        die(2, error)
    except Refused as refusal:
        die(refusal.status, refusal)


if __name__ == "__main__":
    main()
