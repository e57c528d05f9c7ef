#!/usr/bin/env python3
"""Link against a model: a peer and an owner who do anything, on a fake wire and clock.

    .ci/model                       30 s, from a seed that is printed
    .ci/model 20                    20 seeds, from that one on
    .ci/model 1 --first 17          seed 17 again
    .ci/model --server FILE --client FILE

The model knows the protocol and nothing of how a Link works. Both get the same bytes
and the same wishes; what the Link then says and tells has to be what the model expects.

The status is 0 if they never differed. Elsewhere:

    Schedule(module, role, seed).run(steps)

raises AssertionError, with the place, where they differ. `module` is one of the two
scripts, which has a Link; `role` is "server" or "client". What is touched of it stands
in the first section, and only there.
"""

import argparse
import collections
import enum
import importlib.util
import json
import random
import selectors
import struct
import sys
import time
from pathlib import Path
from typing import Any, DefaultDict, Dict, Iterator, List, Optional, Tuple
from typing import Union

ROOT = Path(__file__).resolve().parent.parent
KIB = 1 << 10
STEPS = 3000  # of a schedule
MOST_FINDS = 6
Kind = enum.IntEnum(
    "Kind",
    "CHALLENGE LOGIN WELCOME SERVICES URLS OPEN DATA CREDIT END RESET "
    "PING PONG GOODBYE",
)
Message = Dict[str, Any]
Frame = Tuple[int, int, bytes]  # kind, stream, payload
Text = Tuple[int, Message]  # what the link's owner gets
News = Tuple[int, Union[bytes, str, Exception]]  # stream, what its owner is told


# -----------------------------------------------------------------------------------
# The Link that is tried, between a fake connection and owners that note everything
# -----------------------------------------------------------------------------------
class Clock:
    """It stands still until somebody moves it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class NoSelector(selectors.SelectSelector):
    """Never waits, and sees nothing."""

    def select(self, timeout: Optional[float] = None) -> List[Any]:
        return []


class NoSocket:
    def fileno(self) -> int:
        return -1


class NoTransport:
    unsent = 0  # nothing waits below the connection


class Wire:
    """In place of a Connection: the kernel takes `room` bytes, the rest is backlog. It
    notes what was written, taken or not."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.sock, self.transport = clock, NoSocket(), NoTransport()
        self.owner: Any = None
        self.send_error: Optional[OSError] = None
        self.backlog = bytearray()
        self.room = 1 << 40
        self.progress_at = 0.0
        self.written = bytearray()
        self.pushed = False  # something was written although the wire was stuck
        self.ended = ""

    def waiting(self) -> int:
        return len(self.backlog)

    def limit_queue(self, size: int) -> None:
        pass

    def register(self) -> None:
        pass

    def write(self, data: memoryview) -> None:
        self.pushed = self.pushed or bool(self.backlog)
        self.written += data
        taken = 0 if self.backlog else min(self.room, len(data))
        self.room -= taken
        if len(data) > taken and not self.backlog:
            self.progress_at = self.clock()
        self.backlog += data[taken:]

    def flush(self, room: int) -> None:
        """The kernel has room again."""
        taken = min(room, len(self.backlog))
        self.room = room - taken
        del self.backlog[:taken]
        if taken:
            self.progress_at = self.clock()
        if not self.backlog:
            self.owner.on_writable()

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def close_when_drained(self, ending: Any) -> None:
        self.ended = self.ended or "lingered"


class Owner:
    """Of a stream: has something to send, and tells what it is told. A rude one resets
    when something comes, a hasty one wants another turn after each."""

    def __init__(self, told: List[News], message: Message) -> None:
        self.told, self.takes = told, message["takes"]
        self.rude, self.hasty = message["rude"], message["hasty"]
        self.stream: Any = None
        self.source = bytearray()
        self.finished = False  # the source has an end, not only nothing for now

    def tell(self, news: Union[bytes, str, Exception]) -> None:
        self.told.append((self.stream.id, news))

    # What the Link calls.

    def pull(self, view: memoryview) -> Optional[int]:
        if not self.stream.open:
            self.tell("asked, and it is over")
        count = min(len(view), len(self.source))
        view[:count] = self.source[:count]
        del self.source[:count]
        if self.finished or (self.hasty and count):
            self.stream.wake()  # nothing else does
        return count or (0 if self.finished else None)

    def receive(self, data: memoryview) -> None:
        self.tell(bytes(data))
        if self.takes:
            self.take(0)
        if self.rude:
            self.reset("busy")

    def on_end(self) -> None:
        self.tell("end")

    def on_reset(self, code: str, cause: str) -> None:
        self.tell(code)

    def fail(self, error: Exception) -> None:
        self.tell(error)

    # What it does.

    def open(self) -> bool:
        return bool(self.stream.open)

    def take(self, waiting: int) -> None:
        self.stream.acknowledge(waiting)

    def reset(self, code: str) -> None:
        self.stream.reset(code, "it has gone")

    def send(self, data: bytes) -> None:
        self.source += data
        self.stream.wake()

    def finish(self) -> None:
        self.finished = True
        self.stream.wake()


class Tried:
    """The Link, and its owner's part."""

    def __init__(self, module: Any, role: str, clock: Clock) -> None:
        self.loop = module.Loop(NoSelector(), clock)
        self.wire = Wire(clock)
        self.link = module.Link(self.loop, self.wire, self, role)
        self.least_turn: int = module.LEAST_TURN  # with less credit nothing is sent
        self.spare_windows: int = module.SPARE_WINDOWS
        self.told: List[News] = []
        self.messages: List[Text] = []
        self.ends: List[Owner] = []
        self.closings: List[str] = []

    @staticmethod
    def hurry(module: Any) -> Dict[str, int]:
        """Constants of the module with which a flood of frames begins early."""
        return {"TURN_BUDGET": -1, "LOOK_EVERY": 3}

    # What the Link calls.

    def on_message(self, kind: int, message: Message) -> None:
        self.messages.append((kind, message))
        if kind in ANSWERS:
            self.send(ANSWERS[kind], {})
        if message.get("enough"):
            self.link.close("enough")

    def on_open(self, stream: Any, message: Message) -> None:
        stream.owner = owner = Owner(self.told, message)
        owner.stream = stream
        self.ends.append(owner)

    def on_closed(self, cause: str) -> None:
        self.closings.append(cause)

    # What is done to it.

    def send(self, kind: int, message: Message) -> None:
        self.link.send(kind, message)

    def open(self, message: Message) -> None:
        owner = Owner(self.told, message)
        owner.stream = self.link.open(owner, message)
        self.ends.append(owner)

    def goodbye(self) -> None:
        self.link.goodbye("stopping", "")

    def hear(self, data: bytes) -> None:
        """Bytes of the peer; also what is left of them for later turns."""
        self.loop.guard(self.link, self.link.receive, memoryview(data))
        while self.loop.calls and not self.closed:
            owner, call, values = self.loop.calls.popleft()
            self.loop.guard(owner, call, *values)

    def turn(self) -> None:
        """Of the loop, and then the link may send until it rests."""
        self.loop.turn()
        for _ in range(4096):  # or else it would never rest
            if not self.link.busy or self.wire.backlog or self.closed:
                break
            self.link.on_writable()

    def discard(self) -> None:
        self.loop.close()

    # What it shows.

    @property
    def closed(self) -> bool:
        return bool(self.link.closed)

    def unread(self) -> Dict[int, int]:
        """Bytes that each open stream holds."""
        return {number: one.unread for number, one in self.link.streams.items()}

    def totals(self) -> Tuple[int, int]:
        """The same of all streams, as link and loop count it."""
        return self.link.unread, self.loop.unread

    def spare(self) -> int:
        """Bytes by which windows may still grow."""
        return int(self.link.spare)

    def said(self) -> bytes:
        """What it has written since the last time."""
        said, self.wire.written = bytes(self.wire.written), bytearray()
        return said


# -----------------------------------------------------------------------------------
# The model
# -----------------------------------------------------------------------------------
ORDER = (Kind.CHALLENGE, Kind.LOGIN, Kind.WELCOME, Kind.SERVICES)  # of the handshake
ANSWERS: Dict[int, Kind] = dict(zip(ORDER, ORDER[1:]))
ONLY_FROM = {  # all other kinds both may send
    "server": (Kind.CHALLENGE, Kind.WELCOME, Kind.URLS, Kind.OPEN),
    "client": (Kind.LOGIN, Kind.SERVICES),
}
PEERS = {"server": "client", "client": "server"}
ON_STREAM = (Kind.OPEN, Kind.DATA, Kind.CREDIT, Kind.END, Kind.RESET)
SIZES = {  # bytes at least and at most; all other kinds are JSON: 2 to 64 KiB
    Kind.LOGIN: (2, 4 * KIB),
    Kind.DATA: (1, 2 * KIB * KIB),
    Kind.CREDIT: (4, 4),
    Kind.END: (0, 0),
    Kind.RESET: (0, 64 * KIB),
    Kind.PING: (8, 8),
    Kind.PONG: (8, 8),
}


def frame(
    kind: int, number: int = 0, payload: bytes = b"", length: Optional[int] = None
) -> bytes:
    length = len(payload) if length is None else length
    return struct.pack("!II", kind << 24 | length, number) + payload


class Illegal(Exception):
    """By the model: the frame costs the peer the link."""


def demand(truth: object, what: str, *values: object) -> None:
    if not truth:
        raise AssertionError(what % values if values else what)


def json_object(payload: bytes) -> Message:
    try:
        message = json.loads(payload.decode())
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise Illegal("no JSON object")
    return message


def gist(kind: int, payload: bytes) -> Any:
    """What of a payload the model can foretell."""
    if kind in (Kind.PING, Kind.PONG):
        return payload
    if kind == Kind.RESET:
        return payload.decode().partition(" ")[0]
    message = json_object(payload)
    return message.get("code") if kind == Kind.GOODBYE else message


class Cutter:
    """Cuts what `sender` says into frames, DATA as it comes: in the plainest way."""

    def __init__(self, sender: str) -> None:
        self.kinds = set(Kind) - set(ONLY_FROM[PEERS[sender]])
        self.data = bytearray()
        self.number = self.left = 0  # of the DATA that has begun

    def feed(self, data: bytes) -> Iterator[Frame]:
        self.data += data
        while self.data:
            if self.left:
                payload = self.cut(self.left)
                self.left -= len(payload)
                yield Kind.DATA, self.number, payload
                continue
            if len(self.data) < 8:
                return
            kind, number, length = self.header()
            if kind == Kind.DATA:
                self.number, self.left = number, length
                self.cut(8)
            elif len(self.data) < 8 + length:
                return
            else:
                yield kind, number, self.cut(8 + length)[8:]

    def cut(self, count: int) -> bytes:
        piece = bytes(self.data[:count])
        del self.data[:count]
        return piece

    def header(self) -> Tuple[int, int, int]:
        word, number = struct.unpack_from("!II", self.data)
        kind, length = word >> 24, word & 0xFFFFFF
        if kind not in self.kinds or (kind in ON_STREAM) != (number > 0):
            raise Illegal("kind %d on stream %d" % (kind, number))
        least, most = SIZES.get(kind, (2, 64 * KIB))
        if not least <= length <= most:
            raise Illegal("%d bytes of kind %d" % (length, kind))
        return kind, number, length


class ModelStream:
    def __init__(self, message: Message, least_turn: int) -> None:
        self.takes, self.rude = message["takes"], message["rude"]
        self.least_turn = least_turn
        self.credit = 256 * KIB  # bytes that the Link may send
        self.allowed = 256 * KIB  # bytes that the peer may send
        self.window = 256 * KIB
        self.held = 0  # bytes that the owner has and has not taken
        self.taken = 0  # bytes for which the peer has had no credit yet
        self.unsent = bytearray()  # what the owner has to send
        self.finished = False  # and then no more
        self.link_ended = self.peer_ended = False

    def waits_for_credit(self) -> bool:
        return self.credit < self.least_turn


class Model:
    """What a Link of this role has to do."""

    def __init__(self, least_turn: int) -> None:
        self.least_turn = least_turn
        self.step = 0  # how much of the handshake is done
        self.open: Dict[int, ModelStream] = {}  # streams by their number
        self.last = 0  # the newest stream's number
        self.seen = 0  # the newest one's that the wire has seen
        self.owed: Dict[int, Any] = {}  # what the Link has to say of its own, by kind
        # OPEN and RESET to come, by number
        self.due: DefaultDict[int, List[Any]] = collections.defaultdict(list)
        self.told: List[News] = []  # to the owners of streams, in this order
        self.messages: List[Text] = []  # to the owner of the link
        self.stamp = struct.pack("!d", 0)  # of the Link's newest PING
        self.leaving = self.parted = self.closed = False

    # What the peer says.

    def hear(self, kind: int, number: int, payload: bytes) -> None:
        self.keep_order(kind)
        if number == 0:
            self.hear_link(kind, payload)
        elif kind == Kind.OPEN:
            self.hear_open(number, payload)
        elif number > self.last:
            raise Illegal("stream %d was never open" % number)
        elif number in self.open:  # or else it is late
            getattr(self, "hear_" + Kind(kind).name.lower())(number, payload)

    def keep_order(self, kind: int) -> None:
        if self.step < len(ORDER):
            if kind not in (ORDER[self.step], Kind.GOODBYE):
                raise Illegal("kind %d in the handshake" % kind)
            self.step += kind == ORDER[self.step]
        elif kind in ORDER[:-1]:
            raise Illegal("kind %d after the handshake" % kind)

    def hear_link(self, kind: int, payload: bytes) -> None:
        if kind == Kind.PING:
            self.owed[Kind.PONG] = payload
        elif kind != Kind.PONG:
            message = json_object(payload)
            if kind != Kind.GOODBYE or not self.parted:  # one is enough
                self.tell(kind, message)
        if kind in ANSWERS:
            self.owed[ANSWERS[kind]] = {}
            self.step += 1

    def tell(self, kind: int, message: Message) -> None:
        self.messages.append((kind, message))
        self.parted = self.parted or kind == Kind.GOODBYE
        self.leaving = self.leaving or self.parted
        if message.get("enough"):
            self.close()

    def hear_open(self, number: int, payload: bytes) -> None:
        if number != self.last + 1:
            raise Illegal("OPEN %d after %d" % (number, self.last))
        message = json_object(payload)
        self.last = self.seen = number
        if self.leaving:
            self.due[number].append((Kind.RESET, "gone"))
        else:
            self.open[number] = ModelStream(message, self.least_turn)

    def hear_data(self, number: int, payload: bytes) -> None:
        stream = self.open[number]
        if len(payload) > stream.allowed or stream.peer_ended:
            raise Illegal("DATA over the credit or after END")
        stream.allowed -= len(payload)
        stream.held += len(payload)
        self.told.append((number, payload))
        if stream.takes:
            self.take(number, 0)
        if stream.rude:
            self.reset(number, "busy")

    def hear_credit(self, number: int, payload: bytes) -> None:
        stream, more = self.open[number], int.from_bytes(payload, "big")
        if more == 0 or stream.credit + more >= 1 << 32:
            raise Illegal("CREDIT of %d" % more)
        stream.credit += more

    def hear_end(self, number: int, payload: bytes) -> None:
        if self.open[number].peer_ended:
            raise Illegal("END after END")
        self.open[number].peer_ended = True
        self.told.append((number, "end"))
        self.forget_ended(number)

    def hear_reset(self, number: int, payload: bytes) -> None:
        del self.open[number]
        self.told.append((number, gist(Kind.RESET, payload)))

    # What the owner does.

    def open_stream(self, message: Message) -> None:
        self.last += 1
        self.open[self.last] = ModelStream(message, self.least_turn)
        self.due[self.last].append((Kind.OPEN, message))

    def take(self, number: int, waiting: int) -> None:
        stream = self.open[number]
        stream.taken += stream.held - waiting
        stream.held = waiting

    def reset(self, number: int, code: str) -> None:
        del self.open[number]
        self.due[number].append((Kind.RESET, code))

    def forget_ended(self, number: int) -> None:
        if self.open[number].link_ended and self.open[number].peer_ended:
            del self.open[number]

    def close(self) -> None:
        """The link broke."""
        self.closed = True
        self.told += [(number, "link-lost") for number in sorted(self.open)]
        self.open.clear()
        self.due.clear()

    # What the Link says.

    def hear_link_say(self, kind: int, number: int, payload: bytes) -> None:
        name = Kind(kind).name
        if kind == Kind.PING:
            demand(self.step == len(ORDER), "PING in the handshake")
            self.stamp = payload
        elif number == 0:
            demand(kind in self.owed, "%s, which nobody asked for", name)
            due, said = self.owed.pop(kind), gist(kind, payload)
            demand(due == said, "%s of %r, not of %r", name, said, due)
        elif kind in (Kind.OPEN, Kind.RESET):
            said, due = (kind, gist(kind, payload)), self.due[number][:1]
            demand([said] == due, "%s %d is %r, not %r", name, number, said, due)
            self.due[number].pop(0)
            demand(kind != Kind.OPEN or number == self.seen + 1, "OPEN %d", number)
            self.seen = max(self.seen, number)
        else:
            demand(number in self.open, "%s %d, which is over", name, number)
            demand(not self.due[number], "%s %d before its OPEN", name, number)
            getattr(self, "said_" + name.lower())(number, payload)

    def said_data(self, number: int, payload: bytes) -> None:
        stream, size = self.open[number], len(payload)
        demand(not stream.link_ended, "DATA %d after END", number)
        demand(size <= stream.credit, "DATA %d over the credit", number)
        demand(stream.unsent[:size] == payload, "DATA %d is not what was sent", number)
        stream.credit -= size
        del stream.unsent[:size]

    def said_credit(self, number: int, payload: bytes) -> None:
        """All that was taken, and as much as the window grew: it doubles."""
        stream, more = self.open[number], int.from_bytes(payload, "big")
        grown = more - stream.taken
        demand(more and grown in (0, stream.window), "CREDIT %d of %d", number, more)
        stream.allowed += more
        stream.window += grown
        stream.taken = 0

    def said_end(self, number: int, payload: bytes) -> None:
        stream = self.open[number]
        demand(not stream.link_ended, "END %d after END", number)
        demand(stream.finished and not stream.unsent, "END %d too early", number)
        stream.link_ended = True
        self.forget_ended(number)

    def demand_rest(self) -> None:
        """The wire takes all: then nothing is left that the Link could say."""
        demand(not self.owed, "not said: %r", self.owed)
        demand(not any(self.due.values()), "not said: %r", self.due)
        demand(self.open or not self.leaving, "left, but it did not close")
        for number, stream in self.open.items():
            lost = stream.taken >= stream.window // 4 and not stream.peer_ended
            demand(not lost, "credit of stream %d is lost", number)
            if not stream.waits_for_credit():
                demand(not stream.unsent, "stream %d sends nothing", number)
                demand(stream.link_ended or not stream.finished, "no END %d", number)


# -----------------------------------------------------------------------------------
# Random schedules
# -----------------------------------------------------------------------------------
def joined(told: List[News]) -> List[News]:
    """With the pieces of DATA put together."""
    whole: List[News] = []
    for number, news in told:
        last = whole[-1] if whole else (0, "")
        if number == last[0] and isinstance(news, bytes) and isinstance(last[1], bytes):
            whole[-1] = number, last[1] + news
        else:
            whole.append((number, news))
    return whole


class Schedule:
    """Link after link, of which each gets random frames and wishes, until it closes."""

    STREAMS = 6  # open at once

    def __init__(self, module: Any, role: str, seed: int) -> None:
        self.module, self.role, self.seed = module, role, seed
        self.dice = random.Random(seed)
        self.noise = self.dice.getrandbits(8 << 20).to_bytes(1 << 20, "big")
        self.clock = Clock()
        self.step = self.refused = self.left = 0

    def run(self, steps: int) -> None:
        self.begin()
        try:
            for self.step in range(steps):
                self.act()
                self.compare()
                if self.model.closed:
                    self.after_the_end()
                    self.side.discard()
                    self.begin()
        except Exception as error:
            place = "%s, seed %d, step %d" % (self.role, self.seed, self.step)
            raise AssertionError("%s: %r" % (place, error)) from error
        finally:
            self.side.discard()

    def begin(self) -> None:
        self.side = Tried(self.module, self.role, self.clock)
        self.wire = self.side.wire
        self.model = Model(self.side.least_turn)
        self.hearing, self.saying = Cutter(PEERS[self.role]), Cutter(self.role)
        self.flying = bytearray()  # what the peer has said and the Link not yet read
        self.heard = self.clock.now
        self.wrong = self.dice.choice((0.005, 0.1))  # of what the peer says
        if self.role == "server":
            self.side.send(Kind.CHALLENGE, {})
            self.model.step, self.model.owed = 1, {Kind.CHALLENGE: {}}

    def act(self) -> None:
        self.peer_acts() if self.dice.random() < 0.5 else self.owner_acts()
        if self.dice.random() < 0.7 and not self.model.closed:
            self.turn()

    def turn(self) -> None:
        self.side.turn()
        self.listen()
        if not (self.wire.backlog or self.model.closed):
            self.model.demand_rest()

    def listen(self) -> List[int]:
        """What has the Link said? Returns the kinds."""
        kinds: List[int] = []
        for kind, number, payload in self.saying.feed(self.side.said()):
            kinds.append(kind)
            self.model.hear_link_say(kind, number, payload)
        if self.side.closed and not self.model.closed:
            demand(self.model.leaving and not self.model.open, "closed too early")
            demand(not self.model.owed, "closed, and not said: %r", self.model.owed)
            self.left += 1
            self.model.close()
        return kinds

    def compare(self) -> None:
        """After each step."""
        self.listen()
        demand(self.side.closed == self.model.closed, "closed: %s", self.side.closed)
        demand(not self.wire.pushed, "the wire was stuck, and got more")
        told, expected = joined(self.side.told), joined(self.model.told)
        demand(told == expected, "told: %.200r, not %.200r", told, expected)
        demand(self.side.messages == self.model.messages, "messages differ")
        for notes in (self.side, self.model):
            notes.told.clear()
            notes.messages.clear()
        expected_unread = {n: one.held for n, one in self.model.open.items()}
        unread = self.side.unread()
        demand(unread == expected_unread, "%s unread, not %s", unread, expected_unread)
        if not self.side.closed:
            both, held = self.side.totals(), sum(expected_unread.values())
            demand(both == (held, held), "link and loop hold %d and %d bytes", *both)
            grown = sum(one.window - 256 * KIB for one in self.model.open.values())
            spare = self.side.spare()
            demand(self.side.spare_windows - grown == spare, "%d bytes to spare", spare)

    def after_the_end(self) -> None:
        """Nothing more is said or told, whatever happens."""
        demand(len(self.side.closings) == 1, "told: %s", self.side.closings)
        demand(not any(end.open() for end in self.side.ends), "a stream is open")
        self.flying += frame(Kind.PING, 0, bytes(8)) + frame(Kind.END, 1)
        self.side.hear(bytes(self.flying))
        for end in self.side.ends:
            end.send(b"too late")
            end.take(0)
            end.reset("left")
        self.clock.now += 30
        self.side.turn()
        demand(not self.side.said(), "said after the end")
        demand(not self.side.told and not self.side.messages, "told after the end")
        demand(len(self.side.closings) == 1, "told: %s", self.side.closings)
        demand(self.side.totals()[1] == 0, "%d bytes held", self.side.totals()[1])

    # The peer: what it says is cut at random, and the rest comes in a later step.

    def peer_acts(self) -> None:
        dice = self.dice
        if not self.flying:
            ready = self.model.step == len(ORDER)
            for _ in range(dice.randint(1, 3) if ready else 1):
                self.flying += self.legal_frame()
            if dice.random() < (self.wrong if ready else 0.1):
                self.flying += self.illegal_frame()
        size = len(self.flying)
        self.feed(size if dice.random() < 0.7 else dice.randint(1, size))

    def feed(self, size: int) -> None:
        self.listen()
        if self.model.closed:
            return
        data = bytes(self.flying[:size])
        del self.flying[:size]
        self.heard = self.clock.now
        blocked = bool(self.wire.backlog)
        self.side.hear(data)
        try:
            for kind, number, payload in self.hearing.feed(data):
                self.model.hear(kind, number, payload)
                if self.model.closed:  # what the peer said behind that is lost
                    return
        except Illegal as cause:
            self.demand_refusal(cause, blocked)

    def demand_refusal(self, cause: Illegal, blocked: bool) -> None:
        """It says GOODBYE, unless the wire is stuck."""
        self.refused += 1
        self.model.close()
        if blocked:
            self.model.owed.clear()
        else:
            self.model.owed.setdefault(Kind.GOODBYE, "protocol")
        demand(self.side.closed, "not refused: %s", cause)
        kinds = self.listen()
        demand(not self.model.owed, "%s, but not said: %r", cause, self.model.owed)
        demand(blocked or kinds[-1] == Kind.GOODBYE, "GOODBYE is not the last word")
        ended = "closed" if self.wire.backlog else "lingered"
        demand(self.wire.ended == ended, "the last word may be lost")

    def number(self) -> int:
        """Of a stream that is open and that the peer knows, or 0."""
        known = [number for number in self.model.open if number <= self.model.seen]
        return self.dice.choice(known) if known else 0

    def some(self, most: int) -> bytes:
        """Bytes, at most so many."""
        dice, start = self.dice, self.dice.randrange(1 << 19)
        few, more = dice.randint(1, 1000), dice.randint(1, 64 * KIB)
        size = min(most, dice.choice((1, few, few, more, more, 1 << 19)))
        return self.noise[start : start + size]

    def legal_frame(self) -> bytes:
        """As far as the peer knows: two such frames together may be too much."""
        dice, step = self.dice, self.model.step
        if dice.random() < 0.004:
            return frame(Kind.GOODBYE, 0, b'{"code":"stopping","reason":""}')
        if step < len(ORDER):
            return frame(ORDER[step], 0, b"{}")
        number = self.number()
        few = len(self.model.open) < dice.randint(1, self.STREAMS)
        if self.role == "client" and few and not self.flying:
            payload = json.dumps(self.wishes()).encode()
            return frame(Kind.OPEN, self.model.last + 1, payload)
        if not number or dice.random() < 0.2:
            return dice.choice((self.ping, self.pong, self.text, self.late_frame))()
        choice = dice.choice((self.data,) * 6 + (self.credit,) * 4 + (self.ending,))
        return choice(number)

    def wishes(self) -> Message:
        """What the owner of a new stream will do."""
        odds = {"takes": 0.4, "rude": 0.05, "hasty": 0.5}
        wishes = {wish: self.dice.random() < odds[wish] for wish in sorted(odds)}
        return dict(wishes, service="web", n=self.model.last)

    def ping(self) -> bytes:
        return frame(Kind.PING, 0, struct.pack("!d", self.dice.random()))

    def pong(self) -> bytes:
        return frame(Kind.PONG, 0, self.model.stamp)

    def text(self) -> bytes:
        kind = Kind.SERVICES if self.role == "server" else Kind.URLS
        enough = self.dice.random() < 0.08  # the owner closes, and hears no second one
        message = {"n": self.dice.random(), "enough": enough}
        return frame(kind, 0, json.dumps(message).encode()) * (1 + enough)

    def late_frame(self) -> bytes:
        past = set(range(1, self.model.seen + 1)) - set(self.model.open)
        if not past:
            return self.ping()
        number = self.dice.choice(sorted(past))
        return self.dice.choice((
            frame(Kind.DATA, number, self.some(1 << 19)),
            frame(Kind.CREDIT, number, self.dice.choice((bytes(4), b"\xff" * 4))),
            frame(Kind.END, number),
            frame(Kind.RESET, number, b"left it has gone"),
        ))  # fmt: skip

    def data(self, number: int) -> bytes:
        stream = self.model.open[number]
        if stream.peer_ended or not stream.allowed:
            return self.credit(number)
        return frame(Kind.DATA, number, self.some(stream.allowed))

    def credit(self, number: int) -> bytes:
        more = self.dice.choice((1, 5000, 64 * KIB, 256 * KIB))
        return frame(Kind.CREDIT, number, struct.pack("!I", more))

    def ending(self, number: int) -> bytes:
        if self.model.open[number].peer_ended or self.dice.random() < 0.3:
            return frame(Kind.RESET, number, self.dice.choice((b"", b"done", b"x y z")))
        return frame(Kind.END, number)

    def illegal_frame(self) -> bytes:
        """Whatever comes of it when half of it is late: the model knows."""
        dice, number = self.dice, self.number()
        if self.model.step < len(ORDER) and dice.random() < 0.5:
            return dice.choice((self.ping, self.pong, self.text))()
        unknown = self.model.last + 2 + dice.randrange(3)  # one may be OPENed before
        wrong = [
            frame(dice.choice((0, 14, 99, 255)), dice.randrange(2), b"{}"),
            frame(dice.choice(ON_STREAM[1:]), 0, b"1234"),
            frame(dice.choice((Kind.PING, Kind.GOODBYE)), 1, b"{      }"),
            frame(Kind.END, 1, b"x"),
            frame(Kind.DATA, 1),
            frame(Kind.CREDIT, 1, dice.choice((b"123", b"12345"))),
            frame(dice.choice((Kind.PING, Kind.PONG)), 0, b"1234567"),
            frame(Kind.DATA, 1, length=(2 << 20) + 1),
            frame(dice.choice((Kind.RESET, Kind.OPEN)), 1, length=(64 << 10) + 1),
            frame(Kind.GOODBYE, 0, length=(64 << 10) + 1),
            frame(Kind.DATA, unknown, b"data"),
            frame(Kind.CREDIT, unknown, b"1234"),
            frame(Kind.END, unknown),
            frame(Kind.RESET, unknown),
            frame(dice.choice((Kind.CHALLENGE, Kind.LOGIN, Kind.WELCOME)), 0, b"{}"),
            self.bad_json(),
        ]
        for kind in ONLY_FROM[self.role]:
            wrong.append(frame(kind, int(kind in ON_STREAM), b"{}"))
        if self.role == "client":
            others = (self.model.last or 9, unknown + 1, (1 << 32) - 1)
            wrong += [frame(Kind.OPEN, other, b"{}") for other in others]
        if number:
            many = frame(Kind.DATA, number, self.noise[: 1 << 18])
            times = self.model.open[number].allowed // (1 << 18) + 1
            end, full = frame(Kind.END, number), b"\xff" * 4
            wrong += [many * times if times < 3 else many + end + many]
            wrong += [end * 2, end + frame(Kind.DATA, number, b"x")] * 2
            wrong += [frame(Kind.CREDIT, number, bytes(4))]
            wrong += [frame(Kind.CREDIT, number, full)]
        return dice.choice(wrong)

    def bad_json(self) -> bytes:
        payload = self.dice.choice((b"[]", b"{,", b"\xff\xff", b"12", b'"{}"'))
        if self.role == "client" and self.dice.random() < 0.5:
            return frame(Kind.OPEN, self.model.last + 1, payload)
        own = Kind.SERVICES if self.role == "server" else Kind.URLS
        return frame(self.dice.choice((own, Kind.GOODBYE)), 0, payload)

    # The owners, of the link and of its streams.

    def owner_acts(self) -> None:
        dice, numbers = self.dice, sorted(self.model.open)
        few = len(numbers) < dice.randint(1, self.STREAMS) and not self.model.leaving
        chance = dice.random()
        if self.role == "server" and few and self.model.step == len(ORDER):
            self.open_stream()
        elif chance < 0.2:
            self.pass_time()
        elif chance < 0.3:
            self.wire.flush(dice.choice((0, 3000, 1 << 40, 1 << 40)))
        elif chance < 0.35 and self.model.step == len(ORDER):
            self.say_something()
        elif chance < 0.4 and self.side.ends:
            self.act_late(dice.choice(self.side.ends))
        elif numbers:
            number = dice.choice(numbers)
            acts = (self.take,) * 4 + (self.send,) * 5 + (self.finish, self.reset)
            dice.choice(acts)(number, self.side.ends[number - 1])

    def open_stream(self) -> None:
        message = self.wishes()
        self.side.open(message)
        self.model.open_stream(message)

    def say_something(self) -> None:
        if self.dice.random() < 0.05:
            self.side.goodbye()
            if not self.model.leaving:
                self.model.owed[Kind.GOODBYE] = "stopping"
            self.model.leaving = True
        else:
            kind = Kind.URLS if self.role == "server" else Kind.SERVICES
            self.model.owed[kind] = {"n": self.dice.randrange(100)}
            self.side.send(kind, self.model.owed[kind])

    def act_late(self, end: Owner) -> None:
        if not end.open():
            end.send(b"too late")
            end.take(0)
            end.reset("left")

    def pass_time(self) -> None:
        """Never so long that the Link loses its patience; other tests do that."""
        seconds = self.dice.choice((0.001, 0.06, 0.5, 4))
        if seconds > 1:
            self.wire.flush(1 << 40)
        self.clock.now += seconds
        if self.model.step < len(ORDER):
            self.clock.now += 2 * seconds
        elif self.clock.now - self.heard > 5:
            self.flying += self.pong() if not self.flying else b""
            self.feed(len(self.flying))

    def take(self, number: int, end: Owner) -> None:
        held = self.model.open[number].held
        waiting = self.dice.choice((0, held // 2, held))
        self.model.take(number, waiting)
        end.take(waiting)

    def send(self, number: int, end: Owner) -> None:
        if not end.finished:
            data = self.some(1 << 19)
            self.model.open[number].unsent += data
            end.send(data)

    def finish(self, number: int, end: Owner) -> None:
        self.model.open[number].finished = True
        end.finish()

    def reset(self, number: int, end: Owner) -> None:
        self.model.reset(number, "left")
        end.reset("left")


# -----------------------------------------------------------------------------------
# The command line
# -----------------------------------------------------------------------------------
def load(path: str) -> Any:
    """The script, with which a flood of frames begins early."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for name, value in Tried.hurry(module).items():
        setattr(module, name, value)
    return module


def numbers(options: argparse.Namespace) -> Iterator[int]:
    """The seeds: so many, or as long as there is time."""
    until = time.monotonic() + options.seconds
    number = options.first
    while number < options.first + options.seeds if options.seeds else True:
        if not options.seeds and time.monotonic() > until:
            return
        yield number
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Tries Links against a model.")
    add = parser.add_argument
    add("seeds", type=int, nargs="?", default=0, help="how many")
    add("--seconds", type=float, default=30, help="how long, where that is not said")
    add("--first", type=int, default=random.randrange(1 << 30), help="seed")
    add("--server", default=str(ROOT / "mdm_tunnel_server.py"), metavar="FILE")
    add("--client", default=str(ROOT / "mdm_tunnel_client.py"), metavar="FILE")
    options = parser.parse_args()
    roles = {"server": load(options.server), "client": load(options.client)}
    count = refused = left = found = 0
    for seed in numbers(options):
        if found >= MOST_FINDS:
            break
        for role, module in roles.items():
            schedule = Schedule(module, role, seed)
            try:
                schedule.run(STEPS)
            except AssertionError as error:
                found += 1
                print("%.300s" % error)
            count += 1
            refused += schedule.refused
            left += schedule.left
    words = (options.first, count, refused, left, found)
    print("seed %d: %d schedules, %d links refused, %d left, %d finds" % words)
    return 1 if found or not (refused and left) else 0


if __name__ == "__main__":
    sys.exit(main())
