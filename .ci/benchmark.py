#!/usr/bin/env python3
"""How fast the tunnel is, beside what else could stand in its place, on this machine.

    python3 .ci/benchmark.py                     all of it, about ten minutes
    python3 .ci/benchmark.py --quick             one short round
    python3 .ci/benchmark.py --only download     what has this word in its name
    python3 .ci/benchmark.py --against dbf19a3   beside the scripts of that commit
    python3 .ci/benchmark.py --markdown FILE --json FILE

    load --> system --> backend        system: nothing (direct), HAProxy (one hop),
                                       ssh -R, or this tunnel's server and client

The same load goes through each system to the same backend, on loopback. In every round
the systems take turns, each freshly started for each measure; what counts is the
median of the rounds. Numbers of different machines say little, so the bars are ratios
to HAProxy: a C proxy that only passes on, with half the tunnel's hops. Nothing has to
be installed but Linux, whose /proc it reads; what is missing is named and left out.

With --against the systems are these scripts and those of a commit, with and without
TLS on the link, and the bars are ratios of new to old, each of one round.

Read on in this order: the bars; processes; visitors; loads; the backend; the relay;
places; systems; measures; rounds; the report.
"""

import argparse
import atexit
import contextlib
import ctypes
import getpass
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import queue
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterable, Iterator, List, NamedTuple
from typing import Optional, Sequence, Tuple, Type

from history import ROOT, SCRIPTS, out_of_history

MIB, GIB = 1 << 20, 1 << 30
Figures = Dict[str, float]  # what one run of a measure found
Words = Tuple[str, ...]


class Failed(Exception):
    """This system did not do what this measure asked of it."""


class LeftOut(Exception):
    """This cannot be measured here."""


# -----------------------------------------------------------------------------------
# The bars
#
# A row shows one figure of a measure. Its bar is for the tunnel's ratio to HAProxy
# ("ratio") or for the figure itself ("value"); `aim` beyond `must` tells whether more
# or less is better.
# -----------------------------------------------------------------------------------
class Row(NamedTuple):
    measure: str
    figure: str
    unit: str
    bar: str = ""
    must: float = 0
    aim: float = 0


ROWS = [
    Row("one download", "rate", "MB/s", "ratio", 1.1, 1.5),
    Row("one download", "CPU per GiB", "s", "ratio", 1.5, 1.2),
    Row("one upload", "rate", "MB/s", "ratio", 1.0, 1.4),
    Row("one upload", "CPU per GiB", "s"),
    Row("eight downloads", "rate", "MB/s", "ratio", 0.8, 1.0),
    Row("requests, 1 kept", "rate", "/s"),
    Row("requests, 1 kept", "p50", "ms"),
    Row("requests, 1 kept", "p99", "ms"),
    Row("requests, 32 kept", "rate", "/s", "ratio", 0.45, 0.7),
    Row("requests, 32 kept", "p50", "ms"),
    Row("requests, 32 kept", "p99", "ms"),
    Row("requests, 32 kept", "CPU per 1000", "s", "ratio", 2.5, 1.7),
    Row("requests, 256 kept", "rate", "/s", "ratio", 0.45, 0.7),
    Row("requests, 256 kept", "p50", "ms"),
    Row("requests, 256 kept", "p99", "ms"),
    Row("requests, 32 fresh", "rate", "/s", "ratio", 0.45, 0.7),
    Row("requests, 32 fresh", "p50", "ms"),
    Row("requests, 32 fresh", "p99", "ms"),
    Row("beside four downloads", "p50", "ms", "value", 6, 2),
    Row("beside four downloads", "p99", "ms"),
    Row("beside four downloads", "fresh p50", "ms"),
    Row("beside four downloads", "fresh p99", "ms"),
    Row("beside four downloads", "their rate", "MB/s"),
    Row("thin link", "p50", "ms", "value", 40, 20),
    Row("thin link", "p99", "ms"),
    Row("thin link", "fresh p50", "ms"),
    Row("thin link", "their rate", "MB/s"),
    Row("long link, 100 Mbit/s", "steady share", "%", "value", 97, 99),
    Row("long link, 100 Mbit/s", "share", "%"),
    Row("long link, 400 Mbit/s", "steady share", "%", "value", 85, 95),
    Row("long link, 400 Mbit/s", "share", "%"),
    Row("stalled reader", "growth", "MiB", "value", 2, 0.6),
    Row("stalled reader", "growth unwarmed", "MiB"),
    Row("stalled reader", "p50", "ms"),
    Row("memory", "per idle visitor", "KiB", "value", 12, 6),
    Row("memory", "idle, larger process", "MiB", "value", 18, 13),
    Row("memory", "idle, all", "MiB"),
    Row("start", "to first answer", "ms", "value", 250, 150),
]
BY_TLS = "TLS / without"  # of the rate
AGAINST = [  # new scripts to old ones; of what has no bar only the ratio is shown
    Row("requests, 32 kept", "rate", "/s", "ratio", 1.05, 1.25),
    Row("requests, 32 kept", "CPU per 1000", "s", "ratio", 0.92, 0.75),
    Row("requests, 32 fresh", "rate", "/s", "ratio", 1.0, 1.1),
    Row("one download", "rate", "MB/s", "ratio", 0.97, 1.1),
    Row("one download", "CPU per GiB", "s"),
    Row("one download", BY_TLS, "", "value", 0.45, 0.6),
    Row("one upload", "rate", "MB/s", "ratio", 0.97, 1.1),
    Row("one upload", "CPU per GiB", "s"),
    Row("one upload", BY_TLS, ""),
    Row("eight downloads", "rate", "MB/s", "ratio", 0.97, 1.1),
    Row("beside four downloads", "p50", "ms", "value", 6, 2),
    Row("beside four downloads", "fresh p50", "ms"),
    Row("beside four downloads", "their rate", "MB/s"),
    Row("thin link", "p50", "ms", "value", 40, 20),
    Row("thin link", "their rate", "MB/s"),
    Row("long link, 100 Mbit/s", "steady share", "%", "value", 97, 99),
    Row("long link, 400 Mbit/s", "steady share", "%", "value", 85, 95),
    Row("stalled reader", "growth", "MiB", "value", 2, 0.6),
    Row("memory", "per idle visitor", "KiB", "value", 12, 6),
    Row("memory", "idle, larger process", "MiB", "value", 18, 13),
    Row("start", "to first answer", "ms", "value", 250, 150),
]


class Scale(NamedTuple):
    """How much of everything."""

    rounds: int
    size: int  # bytes of one download or upload
    seconds: float  # of eight downloads, or of wrk
    small: int  # requests beside downloads
    patience: float  # seconds for these, or for memory to settle
    long: float  # seconds of a download over the long link
    ramp: float  # of these, before its share counts as steady
    starts: int


FULL = Scale(3, 2 * GIB, 3, 200, 5, 11, 3, 5)
QUICK = Scale(1, GIB // 2, 1, 100, 2, 4, 2, 2)


# -----------------------------------------------------------------------------------
# Processes
#
# All that was started is in `started`, and is killed by its number in the end. Nobody
# is waited for by sleeping, but probed.
# -----------------------------------------------------------------------------------
class Process:
    """A program that runs beside us. What it prints goes into a file."""

    def __init__(self, name: str, *command: str) -> None:
        self.name = name
        self.log = World.directory / ("%d-%s.log" % (next(World.numbers), name))
        with open(self.log, "wb") as log:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, who end it
            )
        World.started.append(self)

    def check(self) -> None:
        """Raises Failed when it has ended."""
        status = self.popen.poll()
        if status is not None:
            said = self.log.read_text(errors="replace").strip()[-300:]
            raise Failed("%s ended with %d: %s" % (self.name, status, said))

    def wait_until_listening(self, host: str, port: int) -> None:
        wait_for(lambda: socket.create_connection((host, port), 1).close(), [self])

    def family(self) -> List[int]:
        """It and all that descend from it: sshd's children leave its session."""
        children: Dict[int, List[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = stat.read_text().rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(stat.parent.name))
        found = [self.popen.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def kill(self) -> None:
        if self.popen.poll() is None:
            for pid in self.family():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.popen.wait()

    def cpu(self) -> float:
        """Seconds that all its threads have computed: the kernel's own count, in ns."""
        total = 0
        for pid in self.family():
            for task in Path("/proc/%d/task" % pid).iterdir():
                with contextlib.suppress(OSError):  # it may have ended
                    total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def memory(self, kind: str = "Rss") -> float:
        """MiB resident. `status` would be some hundred KiB off, as the kernel gathers
        its counts by processor."""
        total = 0
        for pid in self.family():
            text = Path("/proc/%d/smaps_rollup" % pid).read_text()
            total += int(re.findall(r"\n%s: *(\d+) kB" % kind, text)[0])
        return total / 1024


class World:
    """What stands until the end."""

    directory = Path()
    started: List[Any] = []  # has kill()
    numbers = itertools.count()
    ports = iter(random.sample(range(20000, 32000), 12000))

    @classmethod
    def kill_from(cls, number: int) -> None:
        """All but the first so many."""
        while len(cls.started) > number:
            cls.started[-1].kill()  # it stays there, in case a signal comes meanwhile
            cls.started.pop()


def find(program: str) -> str:
    """Its path. Raises LeftOut where it is not installed."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        raise LeftOut("%s is not installed" % program)
    return found


def wait_for(probe: Callable[[], Any], processes: List[Process]) -> None:
    """Until it no longer raises; these must live as long."""
    until = time.monotonic() + 10
    while True:
        for process in processes:
            process.check()
        try:
            probe()
            return
        except (OSError, Failed):
            if time.monotonic() > until:
                raise
        time.sleep(0.005)


def free_port() -> int:
    """One not handed out before, below those that the kernel gives to whoever dials."""
    for port in World.ports:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("", port))
            return port
    raise LeftOut("no port is free")


def listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(4096)
    return listener


# -----------------------------------------------------------------------------------
# Visitors
#
# HTTP by hand: a client that costs more than what it measures would measure itself.
# -----------------------------------------------------------------------------------
class Address(NamedTuple):
    host: str
    port: int
    name: str = "localhost"  # what the Host field says


class Visitor:
    """One connection, which makes one request after the other."""

    def __init__(self, address: Address, room: int = 4096, patience: float = 30):
        self.sock = socket.create_connection(address[:2], patience)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.name = address.name
        self.buffer = bytearray(room)
        self.view = memoryview(self.buffer)

    def send_head(self, method: str, path: str, *fields: str) -> None:
        lines = ["%s %s HTTP/1.1" % (method, path), "Host: " + self.name, *fields]
        self.sock.sendall("\r\n".join(lines + ["", ""]).encode())

    def receive(self, start: int = 0) -> int:
        count = self.sock.recv_into(self.view[start:])
        if not count:
            raise Failed("the connection was closed too early")
        return count

    def read_head(self) -> Tuple[int, bytes]:
        """How long the body is, and what of it has come already."""
        got, end = 0, -1
        while end < 0:
            got += self.receive(got)
            end = self.buffer.find(b"\r\n\r\n", 0, got)
        head = bytes(self.view[:end])
        if not head.startswith(b"HTTP/1.1 200 "):
            raise Failed("the answer is %r" % head.partition(b"\r\n")[0].decode())
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if not length:
            raise Failed("an answer without a length")
        return int(length.group(1)), bytes(self.view[end + 4 : got])

    def pieces(self, path: str, *fields: str) -> Iterator[int]:
        """GET it; the sizes in which the body comes, all of which is read."""
        self.send_head("GET", path, *fields)
        length, begun = self.read_head()
        yield len(begun)
        length -= len(begun)
        while length > 0:
            count = self.receive()
            yield count
            length -= count

    def get(self, path: str, *fields: str) -> int:
        return sum(self.pieces(path, *fields))

    def close(self) -> None:
        self.sock.close()


# -----------------------------------------------------------------------------------
# Loads
#
# What makes load runs in processes of its own, so that several use both cores and none
# waits for this one.
# -----------------------------------------------------------------------------------
SMALL, BIG = "/small", "/big"  # 1 KiB, and Scale.size
MEDIUM = 64 * MIB  # bytes of /medium
fork = multiprocessing.get_context("fork")


class Load:
    """A function that has been called in a fork of this process, and what it returns.
    Its first argument is an event that tells it to come to an end."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.stopped, self.name = fork.Event(), call.__name__
        self.pipe, far_end = fork.Pipe()
        target = (far_end, call, self.stopped, *arguments)
        self.process = fork.Process(target=self.run, args=target, daemon=True)
        self.process.start()
        far_end.close()  # so that its end is seen here
        World.started.append(self)

    @staticmethod
    def run(pipe: Any, call: Callable[..., Any], *arguments: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            pipe.send(call(*arguments))
        except (OSError, Failed) as error:
            pipe.send(Failed("%s: %s" % (type(error).__name__, error)))

    def result(self, patience: float = 60) -> Any:
        if not self.pipe.poll(patience):
            raise Failed("%s took more than %g s" % (self.name, patience))
        found = self.pipe.recv()
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Transfer(NamedTuple):
    start: float
    end: float
    bytes: int
    samples: Sequence[Tuple[float, int]] = ()  # time, and bytes until then


def download(stopped: Any, address: Address, size: int, seconds: float) -> Transfer:
    """Once, and it must have that size; or again and again, so many seconds."""
    visitor = Visitor(address, MIB)
    start = now = time.monotonic()
    total, samples = 0, [(start, 0)]
    paths = itertools.repeat(BIG) if seconds else iter([BIG])
    for count in itertools.chain.from_iterable(map(visitor.pieces, paths)):
        total += count
        now = time.monotonic()
        if now - samples[-1][0] > 0.05:
            samples.append((now, total))
            if seconds and now - start > seconds or stopped.is_set():
                break
    if not seconds and total != size:
        raise Failed("%d bytes came, not %d" % (total, size))
    return Transfer(start, now, total, samples)


def upload(_: Any, address: Address, size: int) -> Transfer:
    """Until the backend has answered how many bytes it has read."""
    visitor, block = Visitor(address), bytes(MIB)
    start = time.monotonic()
    visitor.send_head("POST", "/upload", "Content-Length: %d" % size)
    for _ in range(size // MIB):
        visitor.sock.sendall(block)
    length, said = visitor.read_head()
    while len(said) < length:
        said += bytes(visitor.view[: visitor.receive()])
    if int(said) != size:
        raise Failed("%r of %d bytes have arrived" % (said, size))
    return Transfer(start, time.monotonic(), size)


def rate(transfers: List[Transfer]) -> float:
    """MB/s of all together."""
    seconds = max(t.end for t in transfers) - min(t.start for t in transfers)
    return sum(t.bytes for t in transfers) / seconds / 1e6


def ask(_: Any, address: Address, kept: bool, seconds: float, most: int) -> List[float]:
    """The times that small requests take, one after the other."""
    times: List[float] = []
    visitor: Optional[Visitor] = None
    now = time.monotonic()
    until = now + seconds
    while now < until and len(times) < most:
        began = now
        visitor = visitor or Visitor(address)
        visitor.get(SMALL, *([] if kept else ["Connection: close"]))
        now = time.monotonic()
        times.append(now - began)
        if not kept:
            visitor.close()
            visitor = None
    return times


def spread(times: List[float]) -> Figures:
    """Median and 99th percentile, in ms."""
    if not times:
        raise Failed("no request was answered")
    times = sorted(times)
    return {"p%d" % n: 1000 * times[len(times) * n // 100] for n in (50, 99)}


# -----------------------------------------------------------------------------------
# The backend
#
# nginx, one worker, with its files in memory; where it is not installed, the one below.
# Uploads always go to the one below, which says how much it has read: nginx answers
# an upload that it drops before it has come.
# -----------------------------------------------------------------------------------
NGINX = """
daemon off;
user %(user)s;
pid %(dir)s/nginx.pid;
error_log stderr;
worker_processes 1;
events { worker_connections 4096; }
http {
  access_log off;
  sendfile on;
  keepalive_requests 1000000000;
  client_body_temp_path %(dir)s/t1;
  proxy_temp_path %(dir)s/t2;
  fastcgi_temp_path %(dir)s/t3;
  uwsgi_temp_path %(dir)s/t4;
  scgi_temp_path %(dir)s/t5;
  server { listen %(host)s:%(port)d backlog=4096; root %(root)s; }
}
"""


def start_nginx(prefix: Words = (), host: str = "127.0.0.1") -> int:
    """The port on which it listens. Raises LeftOut."""
    nginx, port = find("nginx"), free_port()
    directory = World.directory / ("nginx-%d" % port)
    directory.mkdir()
    values = {"host": host, "port": port, "root": World.directory, "dir": directory}
    config = directory / "nginx.conf"
    config.write_text(NGINX % dict(values, user=getpass.getuser()))
    command = (nginx, "-p", str(directory), "-e", "stderr", "-c", str(config))
    Process("nginx", *prefix, *command).wait_until_listening(host, port)
    return port


def start_own_backend() -> int:
    port = free_port()
    with listen(port) as listener:
        Load(backend, listener)
    return port


def backend(_: Any, listener: socket.socket) -> None:
    """Serves files and swallows uploads, with a thread for each connection."""
    while True:
        sock = listener.accept()[0]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        spawn(serve, sock)


def spawn(call: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=call, args=arguments, daemon=True).start()


def serve(sock: socket.socket) -> None:
    """Requests, until the other side has no more."""
    with sock, sock.makefile("rb", 1 << 16) as stream, contextlib.suppress(OSError):
        for line in stream:
            fields = b"".join(iter(stream.readline, b"\r\n")).lower()
            length = re.search(rb"content-length: *(\d+)", fields)
            if length:
                answer(sock, b"%d" % swallow(stream, int(length.group(1))))
            else:
                answer_file(sock, World.directory / line.split()[1].decode()[1:])


def swallow(stream: Any, length: int) -> int:
    """Read as much through one buffer; how much has come."""
    view, got, count = memoryview(bytearray(MIB)), 0, 1
    while got < length and count:
        count = stream.readinto1(view[: length - got])
        got += count
    return got


def answer(sock: socket.socket, body: bytes) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def answer_file(sock: socket.socket, path: Path) -> None:
    size = path.stat().st_size
    if size <= CHUNK:
        return answer(sock, path.read_bytes())
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    with open(path, "rb") as file:
        sock.sendfile(file)


def make_files(size: int) -> None:
    """With bytes in them: what is read from a hole never leaves the processor's cache.
    Only `endless` is one; nobody reads more than its beginning."""
    block = random.Random(1).getrandbits(8 * MIB).to_bytes(MIB, "big")
    for name, length in (("medium", MEDIUM), ("big", size)):
        with open(World.directory / name, "wb") as file:
            for _ in range(length // MIB):
                file.write(block)
    (World.directory / "small").write_bytes(block[:1024])
    with open(World.directory / "endless", "wb") as file:
        file.truncate(2 * GIB)


# -----------------------------------------------------------------------------------
# The relay
#
# A long link of one's own, 50 ms each way. Bytes enter it at its rate and leave one
# delay later. Nothing is read while those that wait to enter would fill the short
# queue, so the sender has to wait as for a router.
# -----------------------------------------------------------------------------------
DELAY = 0.05  # seconds, each way
QUEUE = 0.015  # seconds to send what waits to enter
CHUNK = 16 << 10  # bytes that travel together
Packets = Any  # a queue of (when it arrives, what), of which an empty one is the end


def relay(_: Any, listener: socket.socket, target: int, rate: float) -> None:
    """`rate` is in bytes per second, each way, for each connection."""
    while True:
        near = listener.accept()[0]
        try:
            far = socket.create_connection(("127.0.0.1", target))
        except OSError:
            near.close()
            continue
        for source, sink in ((near, far), (far, near)):
            sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            packets: Packets = queue.Queue()
            spawn(depart, source, packets, rate)
            spawn(arrive, sink, packets)


def depart(source: socket.socket, packets: Packets, rate: float) -> None:
    entered, data = 0.0, b"?"  # when the last byte has entered, and the last bytes
    while data:
        time.sleep(max(0, entered - QUEUE - time.monotonic()))
        try:
            data = source.recv(CHUNK)
        except OSError:
            data = b""
        entered = max(entered, time.monotonic()) + len(data) / rate
        packets.put((entered + DELAY, data))


def arrive(sink: socket.socket, packets: Packets) -> None:
    due, data = packets.get()
    with contextlib.suppress(OSError):
        while data:
            time.sleep(max(0, due - time.monotonic()))
            sink.sendall(data)
            due, data = packets.get()
        sink.shutdown(socket.SHUT_WR)


# -----------------------------------------------------------------------------------
# Places
#
# The near side has the visitors and the server, the far side the client and the
# backend. On loopback they differ in nothing.
# -----------------------------------------------------------------------------------
class Place:
    far: Words = ()  # what comes before a command to run it there
    near_host = far_host = "127.0.0.1"

    def dial(self, port: int) -> int:
        """The port by which the link reaches `port` on its other side."""
        return port


class LongLink(Place):
    """The link goes through a relay."""

    def __init__(self, mbit: float) -> None:
        self.mbit = mbit

    def dial(self, port: int) -> int:
        entry = free_port()
        with listen(entry) as listener:
            # The kernel's queue before the relay shall be short, with real packets.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1448)
            Load(relay, listener, port, self.mbit * 1e6 / 8)
        return entry


class ThinLink(Place):
    """Two network namespaces and a cable, whose far end sends 20 Mbit/s. We enter the
    near one, and what we start is there too."""

    near_host, far_host = "10.77.0.1", "10.77.0.2"
    UP = """
ip netns add %(near)s
ip netns add %(far)s
ip link add thin netns %(near)s type veth peer name thin netns %(far)s
ip -n %(near)s address add 10.77.0.1/24 dev thin
ip -n %(far)s address add 10.77.0.2/24 dev thin
ip -n %(near)s link set lo up
ip -n %(far)s link set lo up
ip -n %(near)s link set thin up
ip -n %(far)s link set thin up
tc -n %(far)s qdisc add dev thin root tbf rate 20mbit burst 32kbit latency 400ms
"""

    def __init__(self) -> None:
        if os.geteuid():
            raise LeftOut("thin link: only root may make network namespaces")
        for program in ("ip", "tc"):
            find(program)
        name = "benchmark-%d-" % os.getpid()
        self.names = {"near": name + "near", "far": name + "far"}
        self.far = ("ip", "netns", "exec", name + "far")
        self.home = open("/proc/self/ns/net")
        World.started.append(self)
        try:
            self.run(self.UP)
            with open("/run/netns/%snear" % name) as near:
                self.enter(near)
        except OSError as error:
            raise LeftOut("thin link: %s" % error) from None

    def run(self, commands: str) -> None:
        for line in (commands % self.names).strip().splitlines():
            done = subprocess.run(line.split(), stderr=subprocess.PIPE)
            if done.returncode:
                raise OSError(line + ": " + done.stderr.decode().strip())

    def enter(self, namespace: IO[str]) -> None:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")

    def kill(self) -> None:
        self.enter(self.home)
        for end in ("near", "far"):
            with contextlib.suppress(OSError):
                self.run("ip netns delete %%(%s)s" % end)


# -----------------------------------------------------------------------------------
# Systems
# -----------------------------------------------------------------------------------
class System:
    """A way from the visitors to a port of the backend. It has answered when it has
    been made."""

    name = title = ""
    options = argparse.Namespace()

    def __init__(self, place: Place, target: int) -> None:
        self.place = place
        self.processes: List[Process] = []
        began = time.monotonic()
        self.address = self.launch(target)
        wait_for(self.ask, self.processes)
        self.took = time.monotonic() - began

    def launch(self, target: int) -> Address:
        """Raises LeftOut where it is not installed."""
        raise NotImplementedError

    def start(self, name: str, *command: str) -> Process:
        process = Process(name, *command)
        self.processes.append(process)
        return process

    def ask(self) -> None:
        visitor = Visitor(self.address, patience=1)
        try:
            visitor.get(SMALL, "Connection: close")
        finally:
            visitor.close()

    def memory(self) -> float:
        return sum(process.memory() for process in self.processes)

    def cpu(self) -> float:
        return sum(process.cpu() for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


class Direct(System):
    name, title = "direct", "direct"

    def launch(self, target: int) -> Address:
        return Address(self.place.far_host, self.place.dial(target))


class HAProxy(System):
    """As it comes: HTTP mode, a thread for each core, buffers of 16 KiB. It keeps its
    connections to the backend; the first request of a visitor gets a new one."""

    name, title = "haproxy", "HAProxy"
    CONFIG = """
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen hop
  bind %s:%d backlog 4096
  server backend %s:%d
"""

    def launch(self, target: int) -> Address:
        address = Address(self.place.near_host, free_port())
        config = World.directory / "haproxy.cfg"
        hop = (*address[:2], self.place.far_host, self.place.dial(target))
        config.write_text(self.CONFIG % hop)
        self.start("haproxy", find("haproxy"), "-db", "-f", str(config))
        return address


class SSH(System):
    """`ssh -R` on an sshd of its own, with the ciphers that the two choose."""

    name, title = "ssh", "ssh -R"
    CONFIG = """
ListenAddress %(host)s
Port %(port)d
HostKey %(dir)s/key
AuthorizedKeysFile %(dir)s/key.pub
PidFile none
StrictModes no
UsePAM %(pam)s
GatewayPorts clientspecified
"""
    OPTIONS = (
        *("-N", "-F", "/dev/null", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"),
        *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
        *("-o", "ExitOnForwardFailure=yes", "-o", "IdentitiesOnly=yes"),
    )

    def prepare(self, key: Path) -> None:
        if os.geteuid() == 0 and not os.path.exists("/run/sshd"):
            os.mkdir("/run/sshd", 0o755)  # where root's sshd locks itself up
            atexit.register(os.rmdir, "/run/sshd")
        if not key.exists():
            make = [find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
            subprocess.run(make, check=True)

    def launch(self, target: int) -> Address:
        directory, port = World.directory, free_port()
        key, config = directory / "key", directory / "sshd_config"
        self.prepare(key)
        host, user = self.place.near_host, getpass.getuser()
        pam = "yes" if os.geteuid() == 0 else "no"  # else root may count as locked
        values = {"host": host, "port": port, "dir": directory, "pam": pam}
        config.write_text(self.CONFIG % values)
        sshd = self.start("sshd", find("sshd"), "-D", "-e", "-f", str(config))
        sshd.wait_until_listening(host, port)
        address = Address(host, free_port())
        forward = "%s:%d:%s:%d" % (*address[:2], self.place.far_host, target)
        options = ("-i", str(key), "-p", str(self.place.dial(port)), "-R", forward)
        command = (find("ssh"), *self.OPTIONS, *options, "%s@%s" % (user, host))
        self.start("ssh", *self.place.far, *command)
        return address


class Ours(System):
    """Server and client, started at the same moment."""

    name, title = "ours", "mdm-tunnel"

    def scripts(self) -> Words:
        """The server's and the client's path."""
        return self.options.server, self.options.client

    def launch(self, target: int) -> Address:
        for_server, for_client = self.secrets()
        server_script, client_script = self.scripts()
        python = self.options.python
        host, visitors, clients = self.place.near_host, free_port(), free_port()
        words = ("--bind", host, "-p", str(visitors), "-c", str(clients))
        server = (python, server_script, *words, *for_server)
        dial = "%s:%d" % (host, self.place.dial(clients))
        service = "web=%s:%d" % (self.place.far_host, target)
        client = (python, client_script, "-h", dial, "-i", "tim", service, *for_client)
        self.start("server", *server)
        self.start("client", *self.place.far, *client)
        return Address(host, visitors, "web.tim.localhost")

    def secrets(self) -> Tuple[Words, Words]:
        """Options of the server and of the client."""
        return (), ()


class Encrypted(Ours):
    """The same with TLS on the link, which `ssh -R` encrypts too. The visitors' side is
    as plain as that of all others."""

    name, title = "encrypted", "with TLS"
    MAKE = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"

    def secrets(self) -> Tuple[Words, Words]:
        pem = World.directory / "link.pem"
        if not pem.exists():
            where = ["-subj", "/CN=benchmark", "-keyout", str(pem), "-out", str(pem)]
            make = [find("openssl"), *self.MAKE.split(), *where]
            subprocess.run(make, check=True, stderr=subprocess.DEVNULL)
        _, begin, cert = pem.read_text().partition("-----BEGIN CERTIFICATE-----")
        pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(begin + cert)).hexdigest()
        return ("--tls-cert", str(pem)), ("--fingerprint", pin)


class Old(Ours):
    """With the scripts of the commit that --against names."""

    name, title = "old", "old"

    def scripts(self) -> Words:
        folder = World.directory / "old"
        return str(folder / SCRIPTS[0]), str(folder / SCRIPTS[1])


class OldEncrypted(Encrypted, Old):
    name, title = "old encrypted", "old with TLS"


SYSTEMS: List[Type[System]] = [Direct, HAProxy, SSH, Ours, Encrypted]
PAIRS: List[Type[System]] = [Old, Ours, OldEncrypted, Encrypted]


# -----------------------------------------------------------------------------------
# Measures
#
# A measure starts a system, does one thing with it, and says what it found. What it
# has started is killed when it has returned.
# -----------------------------------------------------------------------------------
Kind = Type[System]


class Bench(NamedTuple):
    """What the measures share: how much of everything, and the backend's ports."""

    scale: Scale
    files: int
    uploads: int

    def start(self, kind: Kind, port: int = 0, place: Optional[Place] = None) -> System:
        return kind(place or Place(), port or self.files)

    def download(self, system: System, seconds: float = 0) -> Load:
        return Load(download, system.address, self.scale.size, seconds)


def transfer(bench: Bench, system: System, load: Callable[[], Load]) -> Figures:
    before = system.cpu()
    speed = rate([load().result()])
    per_gib = (system.cpu() - before) * GIB / bench.scale.size
    return {"rate": speed, "CPU per GiB": per_gib}


def one_download(bench: Bench, kind: Kind) -> Figures:
    system = bench.start(kind)
    return transfer(bench, system, lambda: bench.download(system))


def one_upload(bench: Bench, kind: Kind) -> Figures:
    system, size = bench.start(kind, bench.uploads), bench.scale.size
    return transfer(bench, system, lambda: Load(upload, system.address, size))


def eight_downloads(bench: Bench, kind: Kind) -> Figures:
    system = bench.start(kind)
    loads = [bench.download(system, bench.scale.seconds) for _ in range(8)]
    return {"rate": rate([load.result() for load in loads])}


def requests(bench: Bench, kind: Kind, connections: int, kept: bool = True) -> Figures:
    system = bench.start(kind)
    load = wrk if shutil.which("wrk") else own_wrk
    Load(ask, system.address, kept, 0.5, 500).result()  # to warm up
    before = system.cpu()
    figures = load(system, connections, kept, bench.scale.seconds)
    figures["CPU per 1000"] = 1000 * (system.cpu() - before) / figures["count"]
    return figures


def wrk(system: System, connections: int, kept: bool, seconds: float) -> Figures:
    address = system.address
    fields = ["Host: " + address.name] + ([] if kept else ["Connection: close"])
    command = ["wrk", "-t1", "-c%d" % connections, "-d%ds" % seconds, "--latency"]
    for field in fields:
        command += ["-H", field]
    command.append("http://%s:%d%s" % (address.host, address.port, SMALL))
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
    text = done.stdout.decode()
    wrong = re.search("Socket errors.*|Non-2xx.*", text)
    if wrong:
        raise Failed(wrong.group())
    units = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}
    figures = {}
    for share, number, unit in re.findall(r" (50|99)% +([\d.]+)([a-z]+)", text):
        figures["p" + share] = float(number) * units[unit]
    count, took = re.findall(r"(\d+) requests in ([\d.]+)s", text)[0]
    return dict(figures, count=float(count), rate=float(count) / float(took))


def own_wrk(system: System, connections: int, kept: bool, seconds: float) -> Figures:
    """The same by processes in Python, which are slower than what they measure."""
    words = (system.address, kept, seconds, sys.maxsize)
    loads = [Load(ask, *words) for _ in range(connections)]
    times = [each for load in loads for each in load.result()]
    return dict(spread(times), count=len(times), rate=len(times) / seconds)


def beside(bench: Bench, system: System, downloads: int) -> Figures:
    """Small requests while so many downloads run."""
    loads = [bench.download(system, seconds=60) for _ in range(downloads)]
    time.sleep(0.5)  # let them come to full speed
    limits = (bench.scale.patience, bench.scale.small)
    kept = spread(Load(ask, system.address, True, *limits).result())
    fresh = spread(Load(ask, system.address, False, *limits).result())
    figures = {"fresh " + name: value for name, value in fresh.items()}
    for load in loads:
        load.stopped.set()
    figures["their rate"] = rate([load.result() for load in loads])
    return dict(figures, **kept)


def beside_four_downloads(bench: Bench, kind: Kind) -> Figures:
    return beside(bench, bench.start(kind), 4)


def thin_link(bench: Bench, kind: Kind) -> Figures:
    place = ThinLink()
    port = start_nginx(place.far, place.far_host)
    return beside(bench, bench.start(kind, port, place), 2)


def long_link(bench: Bench, kind: Kind, mbit: int) -> Figures:
    """One download's share of what the relay lets through; steady: after the ramp."""
    system = bench.start(kind, place=LongLink(mbit))
    done = bench.download(system, bench.scale.long).result()
    ramp = done.start + bench.scale.ramp
    then, before = next(sample for sample in done.samples if sample[0] >= ramp)
    full = mbit * 1e6 / 8 / 100
    steady = (done.bytes - before) / (done.end - then) / full
    share = done.bytes / (done.end - done.start) / full
    return {"share": share, "steady share": steady}


def settle(system: System, patience: float) -> float:
    """The most MiB that it holds until nothing has changed for a second."""
    last = most = system.memory()
    now = since = time.monotonic()
    until = now + patience
    while now < until and now - since < 1:
        time.sleep(0.05)
        last, before, now = system.memory(), last, time.monotonic()
        most = max(most, last)
        since = since if last == before else now
    return most


def stalled_reader(bench: Bench, kind: Kind) -> Figures:
    """Twice: what a first download makes it allocate once is not the reader's."""
    cold = stall(bench, bench.start(kind))
    system = bench.start(kind)
    Visitor(system.address, MIB).get("/medium")
    return dict(stall(bench, system), **{"growth unwarmed": cold["growth"]})


def stall(bench: Bench, system: System) -> Figures:
    before = settle(system, bench.scale.patience)
    visitor = Visitor(system.address)
    visitor.send_head("GET", "/endless")
    growth = settle(system, bench.scale.patience) - before
    times = Load(ask, system.address, True, 2, 100).result()
    visitor.close()
    return dict(spread(times), growth=growth)


VISITORS = 1000
FILES = 8192  # open ones that all may have: HAProxy takes memory for as many


def memory(bench: Bench, kind: Kind) -> Figures:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 3 * VISITORS:
        raise LeftOut("memory: ulimit -Hn allows too few open files")
    system = bench.start(kind)
    idle = {process.name: process.memory() for process in system.processes}
    pss = {p.name + " (PSS)": p.memory("Pss") for p in system.processes}
    larger, every = max(idle.values()), sum(idle.values())
    figures = {"idle, larger process": larger, "idle, all": every}
    Load(ask, system.address, False, 2, 100).result()  # to warm up
    before = settle(system, bench.scale.patience)
    visitors = [Visitor(system.address) for _ in range(VISITORS)]
    for visitor in visitors:
        visitor.get(SMALL)
    grown = settle(system, bench.scale.patience) - before
    for visitor in visitors[::100]:
        visitor.get(SMALL)  # they are still there
    for visitor in visitors:
        visitor.close()
    return dict(figures, **idle, **pss, **{"per idle visitor": grown * 1024 / VISITORS})


def start(bench: Bench, kind: Kind) -> Figures:
    times = []
    for _ in range(bench.scale.starts):
        system = bench.start(kind)
        times.append(1000 * system.took)
        system.stop()
    return {"to first answer": statistics.median(times)}


class Measure(NamedTuple):
    name: str
    run: Callable[..., Figures]
    options: Dict[str, Any] = {}
    systems: str = "direct haproxy ssh ours"


ALL = "direct haproxy ssh ours encrypted"
MEASURES = [
    Measure("one download", one_download, systems=ALL),
    Measure("one upload", one_upload, systems=ALL),
    Measure("eight downloads", eight_downloads, systems=ALL),
    Measure("requests, 1 kept", requests, {"connections": 1}),
    Measure("requests, 32 kept", requests, {"connections": 32}, ALL),
    Measure("requests, 256 kept", requests, {"connections": 256}),
    Measure("requests, 32 fresh", requests, {"connections": 32, "kept": False}),
    Measure("beside four downloads", beside_four_downloads),
    Measure("thin link", thin_link, systems="direct ssh ours"),
    Measure("long link, 100 Mbit/s", long_link, {"mbit": 100}, "direct ours"),
    Measure("long link, 400 Mbit/s", long_link, {"mbit": 400}, "direct ours"),
    Measure("stalled reader", stalled_reader, systems="haproxy ssh ours"),
    Measure("memory", memory, systems="haproxy ours"),
    Measure("start", start, systems="haproxy ssh ours"),
]


# -----------------------------------------------------------------------------------
# The rounds
# -----------------------------------------------------------------------------------
class Run(NamedTuple):
    """One measure of one system in one round."""

    round: int
    measure: str
    system: str
    figures: Figures
    error: str = ""
    left_out: str = ""


def run_once(bench: Bench, measure: Measure, kind: Kind, number: int) -> Run:
    already = len(World.started)
    what = (number, measure.name, kind.name)
    try:
        return Run(*what, measure.run(bench, kind, **measure.options))
    except LeftOut as why:
        return Run(*what, {}, left_out=str(why))
    except Exception as error:
        return Run(*what, {}, error="%s: %s" % (type(error).__name__, error))
    finally:
        World.kill_from(already)


def takes_part(kind: Kind, measure: Measure) -> bool:
    """Old ones do where new ones do; those with TLS where a row is about it."""
    name = {"old": "ours", "old encrypted": "encrypted"}.get(kind.name, kind.name)
    rows = [row.figure for row in AGAINST if row.measure == measure.name]
    if System.options.against and name == "encrypted" and BY_TLS not in rows:
        return False
    return name in measure.systems.split()


def run_all(bench: Bench, measures: List[Measure], kinds: List[Kind]) -> List[Run]:
    runs: List[Run] = []
    for number in range(bench.scale.rounds):
        turn = number % len(kinds)
        for measure in measures:
            for kind in kinds[turn:] + kinds[:turn]:
                if takes_part(kind, measure):
                    runs.append(run_once(bench, measure, kind, number + 1))
                    tell(runs[-1], bench.scale.rounds)
    return runs


def tell(run: Run, rounds: int) -> None:
    found = ["%s %s" % (name, show(value)) for name, value in run.figures.items()]
    said = run.error or run.left_out or ", ".join(found)
    words = (run.round, rounds, run.measure, run.system, said)
    print("%d/%d  %-21s %-13s %s" % words, file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------------
# The report
# -----------------------------------------------------------------------------------
def show(value: Optional[float]) -> str:
    if value is None:
        return ""
    return "%.0f" % value if abs(value) >= 100 else "%.3g" % value


def median(values: Iterable[float]) -> Optional[float]:
    values = list(values)
    return statistics.median(values) if values else None


class Table:
    """The medians of the runs, against the bars."""

    def __init__(self, runs: List[Run], kinds: List[Kind]) -> None:
        self.runs, self.kinds = runs, kinds
        self.measured = {run.measure for run in runs}

    def values(self, row: Row, system: str) -> Dict[int, float]:
        """What was found in each round."""
        runs = [r for r in self.runs if (r.measure, r.system) == (row.measure, system)]
        return {r.round: r.figures[row.figure] for r in runs if row.figure in r.figures}

    def median(self, row: Row, system: str) -> Optional[float]:
        return median(self.values(row, system).values())

    def ratio(self, row: Row) -> Optional[float]:
        """The median of the rounds' ratios: those of one round ran side by side."""
        return self.divided(self.values(row, "ours"), self.values(row, "haproxy"))

    @staticmethod
    def divided(ours: Dict[int, float], other: Dict[int, float]) -> Optional[float]:
        return median(ours[n] / other[n] for n in ours if other.get(n))

    def cell(self, row: Row, system: str) -> str:
        runs = [r for r in self.runs if (r.measure, r.system) == (row.measure, system)]
        failed = [run for run in runs if run.error]
        note = "failed %d of %d" % (len(failed), len(runs)) if failed else ""
        return (show(self.median(row, system)) + " " + note).strip()

    def mark(self, row: Row) -> str:
        value = self.ratio(row) if row.bar == "ratio" else self.median(row, "ours")
        if not row.bar or value is None:
            return ""
        sign = 1 if row.aim > row.must else -1
        if sign * value >= sign * row.aim:
            return "aim reached"
        return "reached" if sign * value >= sign * row.must else "NOT reached"

    def line(self, row: Row) -> List[str]:
        bar = (">= %s" if row.aim > row.must else "<= %s") if row.bar else "%.0s"
        bar += " x" if row.bar == "ratio" else ""
        cells = [self.cell(row, kind.name) for kind in self.kinds]
        bars = [bar % show(row.must), bar % show(row.aim), self.mark(row)]
        title = "%s: %s, %s" % (row.measure, row.figure, row.unit)
        return [title.rstrip(", "), *cells, show(self.ratio(row)), *bars]

    def lines(self) -> List[List[str]]:
        titles = [kind.title for kind in self.kinds]
        rows = [self.line(row) for row in ROWS if row.measure in self.measured]
        return [["measure", *titles, "to HAProxy", "must", "aim", ""], *rows]


class Against(Table):
    """The same for new and old scripts."""

    def ratio(self, row: Row) -> Optional[float]:
        return self.divided(self.values(row, "ours"), self.values(row, "old"))

    def values(self, row: Row, system: str) -> Dict[int, float]:
        if row.figure != BY_TLS:
            return super().values(row, system)
        with_tls = {"ours": "encrypted", "old": "old encrypted"}[system]
        row = row._replace(figure="rate")
        found, plain = super().values(row, with_tls), super().values(row, system)
        return {n: found[n] / plain[n] for n in found if plain.get(n)}

    def lines(self) -> List[List[str]]:
        names = [kind.name for kind in self.kinds]
        self.kinds = [kind for kind in (Old, Ours) if kind.name in names]
        titles = [{"old": "old", "ours": "new"}[kind.name] for kind in self.kinds]
        rows = [self.line(row) for row in AGAINST if row.measure in self.measured]
        return [["measure", *titles, "new to old", "must", "aim", ""], *rows]


NOTES = """Medians of the rounds; `to HAProxy` is the median of each round's own ratio.
HAProxy is one hop as it comes: HTTP mode, a thread for each core.
CPU and memory are of all processes of a system together, where not said otherwise.
A kept connection makes many requests, a fresh one makes one; p50 and p99 of kept ones.
Thin link: two downloads and small requests, 20 Mbit/s from the service to the visitors.
With TLS: the same with an encrypted link, as that of ssh -R is.
Long link: one download, 100 ms there and back; steady is after the first seconds.
Stalled reader: growth of memory, after a first download, when 2 GiB are not read."""


AGAINST_NOTES = """Medians of the rounds; `new to old`: of each round's ratio.
Thin link: two downloads and small requests, 20 Mbit/s from the service to the visitors.
Stalled reader: growth of memory, after a first download, when 2 GiB are not read."""


def notes(runs: List[Run]) -> List[str]:
    said = (AGAINST_NOTES if System.options.against else NOTES).splitlines()
    if not shutil.which("wrk"):
        said.append("wrk is not installed: requests by a slower client, in Python.")
    reasons = {run.left_out for run in runs if run.left_out}
    said += ["Left out: %s." % reason for reason in sorted(reasons)]
    for run in runs:
        if run.error:
            what = (run.measure, run.system, run.round, run.error)
            said.append("Failed: %s of %s in round %d: %s" % what)
    return said


def first_line(*command: str) -> str:
    """Of what it says about its version."""
    with contextlib.suppress(OSError, LeftOut):
        command = (find(command[0]), *command[1:])
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return out.stdout.decode(errors="replace").partition("\n")[0].strip()
    return "none"


def machine(options: argparse.Namespace, scale: Scale) -> Dict[str, str]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    name = cpu.group(1) if cpu else platform.machine()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "rounds": "%d%s" % (scale.rounds, ", short" if options.quick else ""),
        "machine": "%s, %d cores, %.0f GiB" % (name, os.cpu_count() or 0, memory),
        "kernel": platform.system() + " " + platform.release().partition("-")[0],
        "mdm-tunnel": first_line(options.python, options.server, "-V"),
        "against": options.against or "HAProxy",
        "its Python": first_line(options.python, "-V"),
        "nginx": first_line("nginx", "-v"),
        "HAProxy": first_line("haproxy", "-v"),
        "OpenSSH": first_line("ssh", "-V"),
        "wrk": first_line("wrk", "-v"),
    }


def as_text(lines: List[List[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[0], cells[-1] = line[0].ljust(widths[0]), line[-1]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)


def as_markdown(lines: List[List[str]], about: Dict[str, str], said: List[str]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    rows.insert(1, "|---" + "|--:" * (len(lines[0]) - 2) + "|---|")
    parts = ["# Benchmark", "`python3 .ci/benchmark.py`", "\n".join(rows)]
    parts.append("\n".join("- " + line for line in said))
    parts.append("\n".join("- %s: %s" % pair for pair in about.items()))
    return "\n\n".join(parts) + "\n"


def report(options: argparse.Namespace, about: Dict[str, str], runs: List[Run]) -> None:
    kind = Against if options.against else Table
    lines, said = kind(runs, options.kinds).lines(), notes(runs)
    print("\n".join([as_text(lines), "", *said]))
    if options.markdown:
        Path(options.markdown).write_text(as_markdown(lines, about, said))
    if options.json:
        every = [run._asdict() for run in runs]
        whole = json.dumps({"about": about, "runs": every, "table": lines}, indent=1)
        Path(options.json).write_text(whole + "\n")


# -----------------------------------------------------------------------------------
# The command line
# -----------------------------------------------------------------------------------
def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast the tunnel is.")
    add = parser.add_argument
    add("--rounds", type=int, metavar="N", help="instead of %d" % FULL.rounds)
    add("--quick", action="store_true", help="one short round, in a minute")
    add("--only", nargs="+", metavar="WORD", help="measures with a WORD in their name")
    add("--systems", nargs="+", metavar="WORD", help="the same for systems")
    add("--against", metavar="COMMIT", help="measure its scripts beside these")
    add("--python", default=debian_python(), help="what runs the tunnel (%(default)s)")
    add("--server", default=str(ROOT / "mdm_tunnel_server.py"), metavar="FILE")
    add("--client", default=str(ROOT / "mdm_tunnel_client.py"), metavar="FILE")
    add("--json", metavar="FILE", help="write every number there")
    add("--markdown", metavar="FILE", help="write the table there")
    options = parser.parse_args(argv)
    options.measures = chosen(MEASURES, options.only)
    options.kinds = chosen(PAIRS if options.against else SYSTEMS, options.systems)
    if options.against:
        measured = {row.measure for row in AGAINST}
        options.measures = [m for m in options.measures if m.name in measured]
    if not options.measures or not options.kinds:
        names = [m.name for m in MEASURES] + [kind.name for kind in SYSTEMS]
        parser.error("there are only: " + "; ".join(names))
    return options


def debian_python() -> str:
    """So that figures of different days compare, whoever starts this."""
    path = "/usr/bin/python3"
    return path if os.access(path, os.X_OK) else sys.executable


def chosen(things: Sequence[Any], words: Optional[List[str]]) -> List[Any]:
    """Those that have one of the words, which may have commas between them."""
    words = ",".join(words or [""]).lower().split(",")
    return [each for each in things if any(word in each.name for word in words)]


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def on_signal(*_: Any) -> None:
    """The first one ends us in good order; it may come twice."""
    ignore_signals()
    sys.exit(1)


def measure_all(scale: Scale, options: argparse.Namespace) -> List[Run]:
    """In a directory, in memory where that has room, that goes in the end; so do all
    processes, however it ends."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(str(shm)).free > 2 * scale.size
    with tempfile.TemporaryDirectory(dir=str(shm) if roomy else None) as directory:
        World.directory = Path(directory)
        try:
            if options.against:
                out_of_history(options.against, World.directory / "old")
            make_files(scale.size)
            uploads = files = start_own_backend()
            with contextlib.suppress(LeftOut):
                files = start_nginx()
            bench = Bench(scale, files, uploads)
            return run_all(bench, options.measures, options.kinds)
        finally:
            ignore_signals()
            World.kill_from(0)


def main(argv: Optional[List[str]] = None) -> None:
    System.options = options = parse_arguments(argv)
    scale = QUICK if options.quick else FULL
    scale = scale._replace(rounds=options.rounds or scale.rounds)
    for number in SIGNALS:
        signal.signal(number, on_signal)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        runs = measure_all(scale, options)
    except LookupError as error:
        sys.exit(str(error))
    report(options, machine(options, scale), runs)
    sys.exit(1 if any(run.error for run in runs) else 0)


if __name__ == "__main__":
    main()
