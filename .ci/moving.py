"""A link on the move: the client `far` in a network namespace whose addresses change,
whose machine sleeps, whose network swallows everything, or has a full queue before it.
Most of the time is waiting, so all of it happens at once."""

import concurrent.futures
import contextlib
import functools
import signal
import socket
import subprocess
import sys
import time
from typing import Callable, Iterator, List, Optional, Tuple

from parts import REPOSITORY, TMP, Process, Server, World, free_ports, get, namespace
from parts import run, wait_for

MOVED_WITHIN = 5.0  # seconds from a new address to the next served visitor
WOKEN_WITHIN = 4.0  # seconds from the end of a sleep to that
WAITED_WITHIN = 9.0  # seconds until visitors know that a link is dead
FILE = 200 << 20  # bytes of a file that no check reads to its end


class Far:
    """Far's service (files) and client in a namespace, and the server out here. The
    client speaks of what it does, and is no `client` of those that must be silent."""

    def __init__(self, inside: List[str], net: int) -> None:
        self.inside, self.device = inside, inside[-1]
        self.here, self.there = "10.213.%d.1" % net, "10.213.%d.%%d" % net
        for where in ([], inside):  # room for other addresses
            device = "cable" if where else self.device
            route = "%s/24 dev %s metric 9" % (self.there % 0, device)
            run(*where, *("ip route add " + route).split())
        (self.port,) = free_ports(1)
        words = [sys.executable, "-m", "http.server", str(self.port)]
        with open(TMP / ("sparse-%d" % net), "wb") as file:
            file.truncate(FILE)
        self.net = net
        self.files = Process("files", *inside, *words)
        self.server = Server()
        script = str(REPOSITORY / "mdm_tunnel_client.py")
        words = ["-v", "-h", "%s:%d" % (self.here, self.server.client_port)]
        words += ["-i", "far", "web=%d" % self.port]
        self.client = Process("far", *inside, sys.executable, script, *words)
        wait_for("login of far", self.is_served)

    def is_served(self) -> bool:
        """A whole visit: waits as long as the server lets it."""
        return get(self.server.port, "web.far.localhost", "/web/index.html")[0] == 200

    def served_after(self, start: float, seconds: float = 40) -> float:
        """Seconds from `start` to the first visitor that is served."""
        wait_for("the next visitor", self.is_served, seconds)
        return time.monotonic() - start

    def logins(self) -> int:
        return self.client.output().count("logged in")

    def move(self, old: int, new: int) -> float:
        """Another address in place of the old one; when that was."""
        for words in ("del %s/30" % self.there % old, "add %s/24" % self.there % new):
            run(*self.inside, "ip", "addr", *words.split(), "dev", "cable")
        return time.monotonic()

    def swallow(self) -> None:
        """Both ends send to nobody from here on."""
        state = "lladdr 02:00:00:00:00:99 nud permanent dev"  # nobody has it
        for where, device, other in self.ends():
            words = "ip neigh replace %s %s %s" % (other, state, device)
            run(*where, *words.split())

    def release(self) -> None:
        """They send to each other again. A move may have done it already."""
        for where, device, other in self.ends():
            words = [*where, "ip", "neigh", "del", other, "dev", device]
            subprocess.run(words, capture_output=True)

    def know_each_other(self) -> None:
        """For ever: what asks for a neighbour (ARP) gives up after three seconds, and a
        queue may be longer."""
        cat = "cat /sys/class/net/%s/address"
        for where, device, other in self.ends():
            mine = [] if where else self.inside
            theirs = self.device if where else "cable"
            mac = run(*mine, *(cat % theirs).split()).strip()
            words = "ip neigh replace %s lladdr %s nud permanent dev %s"
            run(*where, *(words % (other, mac, device)).split())

    def ends(self) -> List[Tuple[List[str], str, str]]:
        """What runs a command there, its device, and the other's address."""
        far = (self.inside, "cable", self.here)
        return [([], self.device, self.there % 2), far]

    def download(self, *words: str) -> Process:
        """A visitor's download that goes on for a minute."""
        copy = TMP / ("far-copy-%d" % self.net)
        copy.write_bytes(b"")
        url = "http://web.far.localhost:%d/sparse-%d" % (self.server.port, self.net)
        download = Process("curl", "curl", "-sS", *words, "-o", str(copy), url)
        wait_for("download", lambda: copy.stat().st_size > 10 << 10, 40)
        return download

    def stop(self) -> None:
        for process in (self.client, self.server.process, self.files):
            process.stop()


@contextlib.contextmanager
def far_away(net: int) -> Iterator[Optional[Far]]:
    with namespace(net) as inside:
        far = Far(inside, net) if inside else None
        try:
            yield far
        finally:
            if far:
                far.stop()  # or its processes would keep the cable


def address_that_changes() -> str:
    """While nobody comes; and while a download runs, and visitors wait."""
    with far_away(9) as far:
        if not far:
            return "left out: no namespaces here"
        far.move(2, 77)
        time.sleep(MOVED_WITHIN)
        start = time.monotonic()
        idle = far.served_after(start)
        assert far.logins() == 2, far.client.output()
    with far_away(13) as far:
        assert far
        download = far.download("--limit-rate", "2M")
        busy = far.served_after(far.move(2, 77))
        status = download.popen.wait(5)
        assert status in (18, 56), "curl ended with %d" % status
    assert idle < 0.5 and busy < MOVED_WITHIN, "%.1f s, %.1f s" % (idle, busy)
    return "visitors were served %.1f s after it" % busy


def machine_that_slept() -> str:
    """It stands still, and its cable is pulled, for longer than the server waits, or
    for less; it wakes where it was, or elsewhere."""
    tooks = []
    for net, seconds, elsewhere in ((10, 25, False), (15, 25, True), (16, 8, True)):
        with far_away(net) as far:
            if not far:
                return "left out: no namespaces here"
            far.swallow()
            far.client.popen.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            if elsewhere:
                far.move(2, 77)
            far.release()
            start = time.monotonic()
            far.client.popen.send_signal(signal.SIGCONT)
            tooks.append(far.served_after(start))
    assert max(tooks) < WOKEN_WITHIN, tooks
    return "visitors were served %.1f, %.1f and %.1f s after it woke" % tuple(tooks)


def silence_of_15_and_40_seconds() -> str:
    """Visitors who wait are told, and the client is back soon after the silence."""
    said = []
    for net, seconds in ((11, 15), (17, 40)):
        with far_away(net) as far:
            if not far:
                return "left out: no namespaces here"
            far.download("--limit-rate", "2M")
            start = time.monotonic()
            far.swallow()
            ask = functools.partial(get, far.server.port, "web.far.localhost", "/web/")
            waited = ask()[0], time.monotonic() - start
            assert waited[0] in (502, 404) and waited[1] < WAITED_WITHIN, waited
            time.sleep(max(0.0, start + seconds - time.monotonic()))
            far.release()
            back = far.served_after(time.monotonic())
            assert back < 12, "%.1f s" % back
            figures = seconds, waited[1], back
            said.append("%d s: told after %.1f s, back %.1f s after" % figures)
    return "; ".join(said)


FLOOD = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, 32, 220000)  # SO_SNDBUFFORCE: with 1000 bytes each
sock.connect((sys.argv[1], 9))                  # the kernel queues some 180 of them
while True:
    try:
        sock.send(bytes(1000))
    except ConnectionRefusedError:
        pass
"""


def link_behind_a_full_queue() -> str:
    """Other programs keep more than a second of bytes before ours, each way, always: a
    round trip takes two and more, on a busy machine three.
    Then the kernel says another address, with which the link is as alive as before."""
    with far_away(12) as far:
        if not far:
            return "left out: no namespaces here"
        far.know_each_other()
        flood = [sys.executable, "-c", FLOOD]
        for where, device, other in far.ends():
            queue = "root tbf rate 1mbit burst 16kbit latency 9s"
            run(*where, *("tc qdisc add dev %s %s" % (device, queue)).split())
            Process("flood", *where, *flood, other)
        for _ in range(4):  # TCP has to learn how long the way is, or it sends twice
            wait_for("a visit", far.is_served, 40)
        download = far.download()
        time.sleep(15)
        words = "ip addr add %s/24 dev cable" % (far.there % 78)
        run(*far.inside, *words.split())
        words = "ip route add %s/32 dev cable src %s" % (far.here, far.there % 78)
        run(*far.inside, *words.split())
        time.sleep(15)
        start = time.monotonic()
        socket.create_connection((far.there % 2, far.port), 20).close()
        took = time.monotonic() - start
        for process in [x for x in Process.all if x.name == "flood"]:
            process.stop()
        assert far.logins() == 1, far.client.output()
        assert "still there" in far.client.output(), far.client.output()
        assert download.popen.poll() is None, download.output()
        download.stop()
    assert took > 1.5, "no queue: %.1f s" % took
    return "a handshake through it took %.1f s" % took


ALL: List[Callable[[], str]] = [
    address_that_changes,
    machine_that_slept,
    silence_of_15_and_40_seconds,
    link_behind_a_full_queue,
]


def links_on_the_move(world: World) -> str:
    """Each in namespaces of its own."""
    with concurrent.futures.ThreadPoolExecutor(len(ALL)) as pool:
        futures = [pool.submit(call) for call in ALL]
        names = [call.__name__.replace("_", " ") for call in ALL]
        said = ["%s: %s" % pair for pair in zip(names, (x.result() for x in futures))]
    return "\n        ".join(["", *said])


CHECKS: List[Callable[[World], str]] = [links_on_the_move]
