"""Visitors who have left, and the end of a program whatever its visitors do.

A FIN after a whole request may come from a visitor that only half-closes, but mostly it
comes from one that has left: 4 s without a byte to write, and it has left. So a service
learns it within 5 s, and who still reads has its answer if that begins within 4 s."""

import contextlib
import queue
import socket
import ssl
import threading
import time
from typing import Any, Callable, Dict, List, Tuple

from parts import TMP, Client, Server, World
from skew import Secrets

SOON = 5.0  # seconds until a service has learnt that its visitor left
SHORT = 64  # descriptors of a client that has few
CROWD = 150  # visitors, more than these
PATIENCE = 6.0  # seconds after they have left, until the next one is served
DRAIN = 4.0  # seconds that running requests have after SIGTERM, if nobody says
LONGER = 1.0  # seconds from their end to the exit, at most
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = STREAM + b"Transfer-Encoding: chunked\r\n\r\n"


# -----------------------------------------------------------------------------------
# The service
# -----------------------------------------------------------------------------------
class Service:
    """A path is a way to answer, one of the methods below; behind a `?` stands whose it
    is. When a connection has ended `ends` tells whose that was, and when."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.listener.getsockname()[1]
        self.ends: "queue.Queue[Tuple[str, float]]" = queue.Queue()
        self.asked: "queue.Queue[str]" = queue.Queue()  # paths, as they come
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            sock = self.listener.accept()[0]
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        path = ""
        with sock, contextlib.suppress(OSError):
            while True:
                data = sock.recv(1 << 16)
                if not data:
                    break
                if data.startswith((b"GET ", b"POST ")):  # bodies are zeros
                    path = data.split()[1].decode()[1:]
                    self.asked.put(path)
                    getattr(self, path.partition("?")[0])(sock)
        self.ends.put((path, time.monotonic()))

    def page(self, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npage")

    def poll(self, sock: socket.socket) -> None:
        """No answer, as long as the other side wants one."""

    def stuck(self, sock: socket.socket) -> None:
        """Nor is anything read."""
        threading.Event().wait()

    def events(self, sock: socket.socket) -> None:
        """One, and then silence."""
        sock.sendall(CHUNKED + b"d\r\ndata: first\n\n\r\n")

    def raw_events(self, sock: socket.socket) -> None:
        """The same with no framing but the end of the connection."""
        sock.sendall(STREAM + b"\r\ndata: first\n\n")

    def late(self, sock: socket.socket) -> None:
        """The answer begins after 3 s."""
        time.sleep(3)
        self.page(sock)

    def flow(self, sock: socket.socket) -> None:
        """For 8 s, with 2 s between two events."""
        sock.sendall(CHUNKED)
        for number in range(4):
            sock.sendall(b"7\r\ndata: %d\r\n" % number)
            time.sleep(2)
        sock.sendall(b"0\r\n\r\n")

    def endless(self, sock: socket.socket) -> None:
        sock.sendall(STREAM + b"\r\n")
        while True:
            sock.sendall(bytes(1 << 16))

    def websocket(self, sock: socket.socket) -> None:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\n" + upgrade)

    def wait_until_asked(self, *paths: str) -> None:
        """For each of these, in whatever order."""
        left = list(paths)
        while left:
            left.remove(self.asked.get(timeout=10))


# -----------------------------------------------------------------------------------
# Visitors
# -----------------------------------------------------------------------------------
def head(client: Client, path: str, *fields: str, method: str = "GET") -> bytes:
    lines = ["%s /%s HTTP/1.1" % (method, path), "Host: " + client.host("it"), *fields]
    return "\r\n".join(lines + ["", ""]).encode()


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 15)


def ask(client: Client, path: str, *fields: str, method: str = "GET") -> socket.socket:
    """A visitor that has sent a head."""
    visitor = dial(client.server.port)
    visitor.sendall(head(client, path, *fields, method=method))
    return visitor


def read_until(visitor: socket.socket, word: bytes) -> bytes:
    data = b""
    while word not in data:
        more = visitor.recv(1 << 16)
        assert more, "it ended after %r" % data[-200:]
        data += more
    return data


def publish(service: Service, **rest: Any) -> Client:
    """On a server of its own."""
    server = rest.pop("server", None) or Server()
    return Client(server, "eve", {"it": service.port}, **rest)


def stop(*clients: Client) -> None:
    for client in clients:
        client.process.stop()
        client.server.process.stop()


# -----------------------------------------------------------------------------------
# The service learns it
# -----------------------------------------------------------------------------------
SILENT = {  # what a visitor has of the answer when it leaves
    "poll": b"",
    "events": b"first",
    "raw_events": b"first",
}


def leave(client: Client, path: str, kept: bool) -> socket.socket:
    """A visitor that goes in its first request, or in the second of a connection."""
    visitor = ask(client, "page" if kept else path)
    if kept:
        read_until(visitor, b"page")
        visitor.sendall(head(client, path))
    return visitor


def leave_by_tls(client: Client, secrets: Secrets, path: str) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=secrets.for_server[1])
    visitor = context.wrap_socket(dial(secrets.by_tls), server_hostname="localhost")
    visitor.sendall(head(client, path))
    return visitor


def service_learns_that_a_visitor_left(_: World) -> str:
    """All at once: with a FIN, by TLS with and without the word for it."""
    service, secrets = Service(), Secrets(TMP / "leaving")
    server = Server(*secrets.for_server)
    words: Dict[str, Any] = {"options": secrets.for_client, "token": secrets.token}
    client = Client(server, "tim", {"it": service.port}, **words)
    visitors: Dict[str, socket.socket] = {}
    for path in SILENT:
        for kept in (False, True):
            who = path + ("?kept" if kept else "?first")
            visitors[who] = leave(client, who, kept)
        for polite in ("?bare", "?polite"):
            visitors[path + polite] = leave_by_tls(client, secrets, path + polite)
    service.wait_until_asked(*["page"] * len(SILENT), *visitors)
    started = {}
    for who, visitor in visitors.items():
        if SILENT[who.partition("?")[0]]:
            read_until(visitor, b"first")
        if who.endswith("polite"):
            say_goodbye(visitor)
        started[who] = time.monotonic()
        visitor.shutdown(socket.SHUT_WR)
    said = wait_for_ends(service, started)
    stop(client)
    return said


def say_goodbye(visitor: socket.socket) -> None:
    """TLS's own end; whether the other side says it too is not waited for."""
    assert isinstance(visitor, ssl.SSLSocket)
    visitor.settimeout(0)
    with contextlib.suppress(ssl.SSLWantReadError):
        visitor.unwrap()


def wait_for_ends(service: Service, started: Dict[str, float]) -> str:
    seconds: Dict[str, float] = {}
    until = max(started.values()) + SOON
    with contextlib.suppress(queue.Empty):
        while len(seconds) < len(started):
            who, when = service.ends.get(timeout=max(0, until - time.monotonic()))
            if who in started:  # not the kept streams of earlier requests
                seconds[who] = when - started[who]
    missing = set(started) - set(seconds)
    assert not missing, "not learnt in %g s: %s" % (SOON, sorted(missing))
    # By TLS a bare FIN is a cut, and no half-close.
    early = [who for who, took in seconds.items() if took < 3 and "bare" not in who]
    assert not early, "too early for who half-closes: %s" % early
    return "after %.1f to %.1f s" % (min(seconds.values()), max(seconds.values()))


# -----------------------------------------------------------------------------------
# Who only half-closes
# -----------------------------------------------------------------------------------
def half_closed_visitor_gets_its_answer(_: World) -> str:
    """One that begins within 4 s, and one that flows for longer."""
    service = Service()
    client = publish(service)
    visitors = {path: ask(client, path) for path in ("late", "flow")}
    for visitor in visitors.values():
        visitor.shutdown(socket.SHUT_WR)
    read_until(visitors["late"], b"\r\n\r\npage")
    came = read_until(visitors["flow"], b"\r\n0\r\n\r\n")
    assert came.count(b"data: ") == 4, came
    stop(client)
    return ""


def half_close_before_the_101_reaches_the_service(_: World) -> str:
    """It belongs to the other protocol: the service sees it behind its 101."""
    service = Service()
    client = publish(service)
    visitor = ask(client, "websocket", *UPGRADE)
    visitor.shutdown(socket.SHUT_WR)
    read_until(visitor, b" 101 ")
    try:
        ended, _when = service.ends.get(timeout=SOON)
    except queue.Empty:
        raise AssertionError("the service does not see it") from None
    assert ended == "websocket", ended
    stop(client)
    return ""


# -----------------------------------------------------------------------------------
# Descriptors run short
# -----------------------------------------------------------------------------------
def few_descriptors_and_a_crowd_that_left(_: World) -> str:
    """They came, asked what hangs, and went: whoever comes next is served soon."""
    service = Service()
    limit = 'ulimit -n %d; exec "$@"' % SHORT
    client = publish(service, prefix=("sh", "-c", limit, "sh"))
    crowd = [ask(client, "poll?%d" % number) for number in range(CROWD)]
    for _number in range(SHORT // 4):
        service.asked.get(timeout=10)
    for visitor in crowd:
        visitor.shutdown(socket.SHUT_WR)  # unread 503s would make it a reset
    start = time.monotonic()
    last = b""
    while not last.endswith(b"page"):
        seconds = time.monotonic() - start
        assert seconds < PATIENCE, "not served after %.1f s: %r" % (seconds, last[:200])
        last = page(client, PATIENCE - seconds)
    for visitor in crowd:
        visitor.close()
    stop(client)
    return "served after %.1f s" % (time.monotonic() - start)


def page(client: Client, seconds: float) -> bytes:
    """What a new visitor gets."""
    with ask(client, "page", "Connection: close") as visitor:
        visitor.settimeout(seconds)
        data = b""
        with contextlib.suppress(OSError):
            for more in iter(lambda: visitor.recv(1 << 16), b""):
                data += more
        return data


# -----------------------------------------------------------------------------------
# SIGTERM to exit
# -----------------------------------------------------------------------------------
LONG = "Content-Length: 1000000000"
UPGRADE = ("Connection: Upgrade", "Upgrade: websocket")
PARTS = ("server", "client")
Way = Callable[[Client], socket.socket]


def stalls(client: Client) -> socket.socket:
    """Reads the beginning of a download that has no end."""
    visitor = ask(client, "endless")
    visitor.recv(1)
    return visitor


def uploads(client: Client, path: str = "poll") -> socket.socket:
    """Has sent a part of its upload, and sends no more."""
    visitor = ask(client, path, LONG, method="POST")
    visitor.settimeout(0.5)
    with contextlib.suppress(socket.timeout):
        visitor.sendall(bytes(4 << 20))
    return visitor


def uploads_to_one_that_does_not_read(client: Client) -> socket.socket:
    return uploads(client, "stuck")


def idles(client: Client) -> socket.socket:
    visitor = ask(client, "page")
    read_until(visitor, b"page")
    return visitor


def sends_half_a_head(client: Client) -> socket.socket:
    visitor = dial(client.server.port)
    visitor.sendall(head(client, "page")[:-2])
    return visitor


def has_a_websocket(client: Client) -> socket.socket:
    visitor = ask(client, "websocket", *UPGRADE)
    read_until(visitor, b" 101 ")
    return visitor


def waits_for_events(client: Client) -> socket.socket:
    visitor = ask(client, "events")
    read_until(visitor, b"first")
    return visitor


def polls(client: Client) -> socket.socket:
    return ask(client, "poll")


def does_all_that(client: Client) -> List[socket.socket]:
    return [way(client) for way in WAYS]


WAYS: List[Way] = [
    stalls,
    uploads,
    uploads_to_one_that_does_not_read,
    idles,
    sends_half_a_head,
    has_a_websocket,
    waits_for_events,
    polls,
]


def ends_in_time(who: str, drain: float = DRAIN) -> str:
    """A pair of programs for each way, and SIGTERM for all at once. Both ends count."""
    ways: List[Callable[[Client], Any]] = [*WAYS, does_all_that]
    words = () if drain == DRAIN else ("--drain", "%g" % drain)
    clients = [publish(Service(), server=Server(*words), options=words) for _ in ways]
    visitors = [way(client) for way, client in zip(ways, clients)]
    parts = [client.server if who == "server" else client for client in clients]
    left = {way.__name__: part.process.popen for way, part in zip(ways, parts)}
    start = time.monotonic()
    for popen in left.values():
        popen.terminate()
    took: Dict[str, float] = {}
    while left and time.monotonic() < start + 2 * (drain + LONGER):
        for name, popen in list(left.items()):
            if popen.poll() is not None:
                took[name] = time.monotonic() - start
                assert popen.returncode == 0, (name, popen.returncode)
                del left[name]
        time.sleep(0.01)
    del visitors
    stop(*clients)
    late = ["%s %.1f s" % pair for pair in took.items() if pair[1] > drain + LONGER]
    late += ["%s, still there" % name for name in left]
    assert not late, "its visitor " + ", ".join(late)
    assert max(took.values()) > drain, "what ran had %s" % took
    return "%.1f s at most" % max(took.values())


def server_ends_in_time_whatever_visitors_do(_: World) -> str:
    return ends_in_time("server")


def client_ends_in_time_whatever_visitors_do(_: World) -> str:
    return ends_in_time("client")


def both_end_in_the_time_of_drain(_: World) -> str:
    """Shorter than it is by itself, also without any time, and longer."""
    found = [ends_in_time(who, drain) for who in PARTS for drain in (0, 1.5, 7)]
    return ", ".join(found)


CHECKS: List[Callable[[World], str]] = [
    service_learns_that_a_visitor_left,
    half_closed_visitor_gets_its_answer,
    half_close_before_the_101_reaches_the_service,
    few_descriptors_and_a_crowd_that_left,
    server_ends_in_time_whatever_visitors_do,
    client_ends_in_time_whatever_visitors_do,
    both_end_in_the_time_of_drain,
]
