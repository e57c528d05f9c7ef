"""The checks of .ci/interop: each is a function that gets the World, says what it
measured ("" for nothing), and raises when something is wrong. They are in the order of
CHECKS, at the end."""

import asyncio
import concurrent.futures
import functools
import hashlib
import http.client
import json
import os
import random
import ssl
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict, List, Optional, Tuple
from typing import Union

import by_name
import checking
import counting
import deploying
import first_minute
import inspecting
import leaving
import moving
import publishing
import skew
from browser import Browser
from parts import BIG, BLOCK, REPOSITORY, TMP, Client, Process, Server, World, curl
from parts import free_ports, get, listening, namespace, own_address, run, sha256
from parts import start_haproxy_front, start_nginx_front, start_sshd, wait_for
from strictness import strictness_with_answers, strictness_with_requests
from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed


# -----------------------------------------------------------------------------------
# Requests
# -----------------------------------------------------------------------------------
def two_hosts_on_one_connection(world: World) -> str:
    """A kept-alive connection is routed by each request, not by its first."""
    base = "http://127.0.0.1:%d/" % world.server.port
    words: List[str] = []
    for service in ("web", "other", "web"):
        words += ["--next"] if words else []
        words += ["-sS", "--fail", "-H", "Host: %s" % world.tim.host(service)]
        words += ["-w", "%{num_connects}\n", base]
    said = run("curl", *words)
    pages = ["<title>%s</title>this is %s" % (2 * (n,)) for n in ("web", "other")]
    expected = [pages[0], "1", pages[1], "0", pages[0], "0"]
    assert said.split("\n")[:-1] == expected, said
    return ""


def time_requests(port: int, host: str, method: str, path: str) -> float:
    """The median of 500 requests on one connection, one at a time, in ms."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    body = b"small" if method == "PUT" else None
    times = []
    for _ in range(500):
        start = time.perf_counter()
        connection.request(method, path, body, {"Host": host})
        answer = connection.getresponse()
        answer.read()
        times.append(time.perf_counter() - start)
        assert answer.status in (200, 201, 204), answer.status
    connection.close()
    return 1000 * statistics.median(times)


def one_request_at_a_time(world: World) -> str:
    """A stall of Nagle's algorithm and a delayed ACK takes 40 ms."""
    host, figures = world.tim.host("web"), []
    for method, path in (("GET", "/"), ("PUT", "/upload/small")):
        direct = time_requests(world.web, host, method, path)
        tunnel = time_requests(world.server.port, host, method, path)
        assert tunnel - direct < 20, "%s: %.2f ms more" % (method, tunnel - direct)
        figure = "%s p50 %.2f ms more than the %.2f ms without"
        figures.append(figure % (method, tunnel - direct, direct))
    return ", ".join(figures)


def speed(start: float, size: int = BIG) -> str:
    return "%.0f MB/s" % (size / 1e6 / (time.monotonic() - start))


def download_of_2_gib(world: World) -> str:
    expected, digest = world.big(), hashlib.sha256()
    command = ["curl", "-sS", "--fail", "-m", "100", world.tim.url("web", "big")]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        pipe = process.stdout
        assert pipe
        for block in iter(functools.partial(pipe.read, BLOCK), b""):
            digest.update(block)
    figure = speed(start)
    assert process.returncode == 0, "curl ended with %d" % process.returncode
    assert digest.hexdigest() == expected, digest.hexdigest()
    return figure


def upload_of_2_gib(world: World) -> str:
    expected, url = world.big(), world.tim.url("web", "upload/copy")
    start = time.monotonic()
    curl("-T", str(TMP / "web" / "big"), url, seconds=100)
    figure = speed(start)
    copy = TMP / "web" / "upload" / "copy"
    assert sha256(copy) == expected, copy.stat()
    copy.unlink()
    return figure


def upload_in_chunks(world: World) -> str:
    """A body of unknown length, which nginx sees as chunks."""
    world.big()
    url = world.tim.url("web", "upload/chunked")
    start = TMP / "start"
    with open(TMP / "web" / "big", "rb") as big:
        start.write_bytes(big.read(100 * BLOCK + 1))
    curl("-H", "Transfer-Encoding: chunked", "-T", str(start), url)
    copy = TMP / "web" / "upload" / "chunked"
    assert sha256(copy) == sha256(start), copy.stat()
    return "%d MiB" % (copy.stat().st_size >> 20)


# -----------------------------------------------------------------------------------
# Five hundred at once
# -----------------------------------------------------------------------------------
CROWD = 500


class Meeting:
    """A service that answers nobody until all have come; then each gets his body."""

    def __init__(self) -> None:
        self.here = 0
        self.all_here = asyncio.Event()

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split()[0])
        body = await reader.readexactly(length)
        self.here += 1
        if self.here == CROWD:
            self.all_here.set()
        await self.all_here.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body)
        await writer.drain()
        await reader.read()
        writer.close()


async def visit(port: int, host: str, number: int) -> None:
    body = b"%d " % number * 5000
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST / HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n" % (host, len(body))
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    answer = await reader.read()
    got_head, _, got_body = answer.partition(b"\r\n\r\n")
    assert got_head.startswith(b"HTTP/1.1 200 "), answer[:300]
    assert got_body == body, "visitor %d got %r" % (number, got_body[:100])
    writer.close()


async def meet(world: World) -> None:
    meeting = Meeting()
    service = await asyncio.start_server(
        meeting.serve, "127.0.0.1", world.crowd, backlog=CROWD
    )
    async with service:
        host = world.tim.host("crowd")
        visits = [visit(world.server.port, host, number) for number in range(CROWD)]
        await asyncio.gather(*visits)


def five_hundred_visitors_at_once(world: World) -> str:
    asyncio.run(asyncio.wait_for(meet(world), 60))
    return ""


# -----------------------------------------------------------------------------------
# WebSockets
# -----------------------------------------------------------------------------------
class Echo:
    """A service that sends each message back in the pieces in which it came. It pings
    when it is told `ping`, and closes when it is told `close CODE REASON`."""

    def __init__(self) -> None:
        self.ends: List[Tuple[Optional[int], Optional[str]]] = []  # code and reason

    async def serve(self, connection: ServerConnection) -> None:
        try:
            while True:
                await self.answer(connection)
        except ConnectionClosed:
            self.ends.append((connection.close_code, connection.close_reason))

    async def answer(self, connection: ServerConnection) -> None:
        pieces = await receive(connection)
        words = pieces[0].split() if isinstance(pieces[0], str) else []
        if words[:1] == ["close"]:
            await connection.close(int(words[1]), words[2])
        elif words[:1] == ["ping"]:
            await (await connection.ping(b"from the service"))
            await connection.send("pong came")
        else:
            await connection.send(pieces if len(pieces) > 1 else pieces[0])


async def receive(connection: Connection) -> List[Any]:
    """The next message, in its pieces but for empty ones."""
    return [piece async for piece in connection.recv_streaming() if piece]


Talk = Callable[[Connection], Awaitable[None]]


async def talk(port: int, host: str, call: Talk) -> None:
    """Run `call` with a visitor's WebSocket."""
    uri = "ws://%s:%d/" % (host, port)
    async with connect(uri, host="127.0.0.1", max_size=32 << 20) as connection:
        await call(connection)


def with_echo(world: World, talks: List[Talk]) -> Echo:
    """Run these, one after the other, with an Echo as the service `sockets`."""

    async def serve_and_talk() -> None:
        host, port = world.tim.host("sockets"), world.server.port
        async with serve(echo.serve, "127.0.0.1", world.sockets, max_size=32 << 20):
            for call in talks:
                await talk(port, host, call)

    echo = Echo()
    asyncio.run(asyncio.wait_for(serve_and_talk(), 60))
    return echo


async def say(connection: Connection, *pieces: Any) -> None:
    """Send a message, in pieces if there are several; it must come back so."""
    await connection.send(pieces if len(pieces) > 1 else pieces[0])
    got = await receive(connection)
    assert got == list(pieces), "%d pieces back, not %d" % (len(got), len(pieces))


async def messages(connection: Connection) -> None:
    await say(connection, "text: \u00fc\u20ac\U0001f600")
    await say(connection, bytes(range(256)))
    await say(connection, "in ", "three ", "pieces")
    await say(connection, b"a" * 100000, b"b" * 100000)
    for number in range(200):
        await say(connection, str(number))


def websocket_messages(world: World) -> str:
    with_echo(world, [messages])
    return ""


def websocket_message_of_16_mib(world: World) -> str:
    message = random.Random(2).getrandbits(8 << 24).to_bytes(16 << 20, "big")
    with_echo(world, [lambda connection: say(connection, message)])
    return ""


async def pings(connection: Connection) -> None:
    await (await connection.ping(b"from the visitor"))
    await connection.send("ping")
    assert await receive(connection) == ["pong came"]


def websocket_pings(world: World) -> str:
    with_echo(world, [pings])
    return ""


def closing(code: int, reason: str, by_service: bool) -> Talk:
    """A talk that ends so, and sees it where the service closes."""

    async def close(connection: Connection) -> None:
        await say(connection, "hello")
        if by_service:
            await connection.send("close %d %s" % (code, reason))
            await connection.wait_closed()
        else:
            await connection.close(code, reason)
        seen = connection.close_code, connection.close_reason
        assert seen == (code, reason), seen

    return close


def websocket_close_codes(world: World) -> str:
    ends = [(1000, "bye"), (4001, "enough")]
    talks = [closing(*end, by_service) for end in ends for by_service in (False, True)]
    echo = with_echo(world, talks)
    assert echo.ends == [ends[0]] * 2 + [ends[1]] * 2, echo.ends
    return ""


# -----------------------------------------------------------------------------------
# A browser
# -----------------------------------------------------------------------------------
def chromium_websockets_example(world: World) -> str:
    """The page of examples/websockets shows digits that come and says what it sent."""
    (port,) = free_ports(1)
    script = REPOSITORY / "examples" / "websockets" / "server.py"
    service = Process("example", sys.executable, str(script), str(port))
    service.wait_until_listening(port)
    amy = Client(world.server, "amy", {"websockets": port, "web": world.web})
    with Browser() as browser:
        browser.open(amy.url("websockets"))
        for part in ("#digits", "#sent"):
            wait_for(part, functools.partial(has_digits, browser, part), 20)
    amy.process.stop()
    service.stop()
    return ""


def has_digits(browser: Browser, selector: str) -> bool:
    digits = "".join(browser.text(selector).split())
    return len(digits) >= 3 and set(digits) <= {"0", "1"}


def chromium_index_page(world: World) -> str:
    """Each link of an id's page leads to its service."""
    services = {"web": world.web, "other": world.other, "flask": world.flask}
    bob = Client(world.server, "bob", services)
    index = "http://bob.localhost:%d/" % world.server.port
    with Browser() as browser:
        browser.open(index)
        links = browser.links()
        assert links == [bob.url(name) for name in sorted(services)], links
        for link in links:
            browser.open(index)
            browser.click('a[href="%s"]' % link)
            browser.wait_until_at(link)
            assert "this is" in browser.text("body"), link
    bob.process.stop()
    return "%d links" % len(links)


# -----------------------------------------------------------------------------------
# git, Flask
# -----------------------------------------------------------------------------------
def git(where: Path, *words: str) -> str:
    """Run git without anybody's configuration."""
    environment = "GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null".split()
    who = ["-c", "user.name=tim", "-c", "user.email=tim@example.com"]
    return run("env", *environment, "git", "-C", str(where), *who, *words).strip()


def commit(where: Path, name: str, size: int) -> None:
    """One more file, which does not compress."""
    noise = random.Random(name).getrandbits(8 * size).to_bytes(size, "big")
    (where / name).write_bytes(noise)
    git(where, "add", name)
    git(where, "commit", "-qm", "add %s" % name)


def git_clone_and_push(world: World) -> str:
    """Over smart HTTP; the push is too big for one piece, so it is chunked."""
    origin, clone = TMP / "git" / "origin.git", TMP / "clone"
    origin.mkdir(parents=True)
    clone.mkdir()
    git(origin, "init", "-q", "--bare", "-b", "main")
    git(origin, "config", "http.receivepack", "true")
    url = world.tim.url("web", "git/origin.git")
    first = clone / "first"
    git(clone, "clone", "-q", str(origin), str(first))
    git(first, "checkout", "-qb", "main")
    for number in range(50):
        commit(first, "file%d" % number, 200 * number)
    commit(first, "big", 8 << 20)
    git(first, "push", "-q", url, "main")
    second = clone / "second"
    git(clone, "clone", "-q", url, str(second))
    git(second, "fsck", "--full", "--strict")
    git(origin, "fsck", "--full", "--strict")
    heads = {git(where, "rev-parse", "main") for where in (origin, first, second)}
    assert len(heads) == 1, heads
    return ""


def flask_forms_and_files(world: World) -> str:
    assert "this is Flask" in curl(world.tim.url("flask"))
    file = TMP / "form-file"
    file.write_bytes(os.urandom(5 * BLOCK + 1))
    url = world.tim.url("flask", "form")
    said = curl("--data-urlencode", "name=a & b \u00fc", url)
    assert '"name":"a & b \\u00fc"' in said, said
    said = curl("-F", "name=tim", "-F", "file=@%s" % file, url)
    assert '"name":"tim"' in said and sha256(file) in said, said
    return ""


def flask_events_come_one_by_one(world: World) -> str:
    """The service sends each event only after it has been told to by another request,
    which we send only after the event before has arrived."""
    host, url = world.tim.host("flask"), world.tim.url("flask", "tell")
    visitor = http.client.HTTPConnection("127.0.0.1", world.server.port, timeout=10)
    visitor.request("GET", "/events", headers={"Host": host})
    answer = visitor.getresponse()
    texts = ["first", "second", "third", "last"]
    for text, following in zip(texts, texts[1:] + [""]):
        line = answer.readline()
        assert line == b"data: %s\n" % text.encode(), line
        assert answer.readline() == b"\n"
        if following:
            curl("-d", following, url)
    assert answer.read() == b""
    visitor.close()
    return ""


# -----------------------------------------------------------------------------------
# Fronts: a reverse proxy before both ports
# -----------------------------------------------------------------------------------
def behind(world: World, name: str, fronts: Tuple[int, int]) -> None:
    """A client that logs in through a front; its visitors come through it too."""
    visitors, clients = fronts
    services = {"web": world.web, "sockets": world.sockets}
    client = Client(world.server, name, services, through=clients)
    for port in (visitors, world.server.port):
        status, body = get(port, client.host("web"), "/")
        assert status == 200 and b"this is web" in body, body

    async def serve_and_talk() -> None:
        async with serve(Echo().serve, "127.0.0.1", world.sockets):
            await talk(visitors, client.host("sockets"), messages)

    asyncio.run(asyncio.wait_for(serve_and_talk(), 30))
    client.process.stop()
    assert client.process.popen.returncode == 0


def behind_nginx(world: World) -> str:
    behind(world, "via-nginx", start_nginx_front(world.server))
    return ""


def behind_haproxy(world: World) -> str:
    behind(world, "via-haproxy", start_haproxy_front(world.server))
    return ""


# -----------------------------------------------------------------------------------
# SIGTERM and SIGKILL
# -----------------------------------------------------------------------------------
def start_download(client: Client) -> Process:
    """A download that runs, and goes on for half a minute and more."""
    copy = TMP / "download"
    copy.write_bytes(b"")
    url = client.url("web", "big")
    words = ("-sS", "--limit-rate", "50M", "-o", str(copy), url)
    download = Process("curl", "curl", *words)
    wait_for("download", lambda: copy.stat().st_size > BLOCK)
    return download


def killed(world: World, who: str) -> str:
    """Kill the client or the server while it serves a download: the visitor learns it,
    and when it has been started again all is well."""
    world.big()
    server = Server()
    client = Client(server, "tim", {"web": world.web})
    part: Union[Client, Server] = client if who == "client" else server
    download = start_download(client)
    start = time.monotonic()
    part.process.kill()
    status = download.popen.wait(5)
    learned = time.monotonic() - start
    assert status in (18, 56), "curl ended with %d" % status
    start = time.monotonic()
    part.start()
    wait_for("login", client.is_in, 12)
    curl(client.url("web"))
    back = time.monotonic() - start
    for other in (client, server):
        other.process.stop()
    return "visitor learned it in %.2f s, back in %.2f s" % (learned, back)


def client_killed_in_a_download(world: World) -> str:
    return killed(world, "client")


def server_killed_in_a_download(world: World) -> str:
    return killed(world, "server")


def client_told_to_end_while_a_visitor_idles(world: World) -> str:
    """A kept-alive connection without a request is nothing to wait for."""
    eve = Client(world.server, "eve", {"web": world.web})
    visitor = http.client.HTTPConnection("127.0.0.1", world.server.port, timeout=10)
    visitor.request("GET", "/", headers={"Host": eve.host("web")})
    assert b"this is web" in visitor.getresponse().read()
    start = time.monotonic()
    eve.process.popen.terminate()
    assert eve.process.popen.wait(10) == 0
    seconds = time.monotonic() - start
    visitor.close()
    assert seconds < 2, "the client took %.1f s to end" % seconds
    return "it took %.2f s" % seconds


# -----------------------------------------------------------------------------------
# The open internet
# -----------------------------------------------------------------------------------
PART = 256 << 20  # bytes of the big file that pass by TLS


def make_secrets() -> Tuple[Path, str]:
    """Certificate and token as README makes them: where they are, the fingerprint."""
    text = (REPOSITORY / "README.md").read_text()
    text = text.partition("## Use it for real")[2]
    block = text.partition("```sh\n")[2].partition("```")[0]
    commands = block.replace("\\\n", " ").splitlines()
    lines = [line for line in commands if line.find("openssl") >= 0]
    assert len(lines) == 3, block
    folder = TMP / "secrets"
    folder.mkdir()
    said = run("sh", "-c", "\n".join(lines), cwd=folder)
    return folder, said.partition("Fingerprint=")[2].split()[0]


def tls_and_tokens(world: World) -> str:
    """By the README's commands; the visitors are curl and websockets."""
    folder, fingerprint = make_secrets()
    (port,) = free_ports(1)
    words = ["--tls-cert", str(folder / "cert.pem")]
    words += ["--tls-key", str(folder / "key.pem")]
    words += ["--tokens", str(folder / "tokens.json"), "--tls-port", str(port)]
    server = Server(*words)
    token = json.loads((folder / "tokens.json").read_text())["tim"]
    services = {"web": world.web, "sockets": world.sockets}
    options = ("--fingerprint", fingerprint)
    client = Client(server, "tim", services, options=options, token=token)
    base = "https://%s:%d" % (client.host("web"), port)
    assert "this is web" in curl("-k", base + "/")
    world.big()
    start = time.monotonic()
    curl("-k", "-r", "0-%d" % (PART - 1), "-o", str(TMP / "part"), base + "/big")
    took = speed(start, PART)
    with open(TMP / "web" / "big", "rb") as file:
        expected = hashlib.sha256(file.read(PART)).hexdigest()
    assert sha256(TMP / "part") == expected
    asyncio.run(one_message_by_tls(world.sockets, client.host("sockets"), port))
    old = ["openssl", "s_client", "-tls1_1", "-connect", "127.0.0.1:%d" % port]
    assert subprocess.run(old, stdin=subprocess.DEVNULL, capture_output=True).returncode
    for other in (client, server):
        other.process.stop()
    return took


# -----------------------------------------------------------------------------------
# More than the web
# -----------------------------------------------------------------------------------
COPIED = 200 << 20  # bytes that scp carries each way


def is_closed(port: int) -> bool:
    try:
        return not listening(port)
    except ConnectionRefusedError:
        return True


def ssh_and_redis_by_ports_of_their_own(world: World) -> str:
    sshd, options = start_sshd()
    ssh, redis, local = free_ports(3)
    Process("redis", "redis-server", "--port", str(local)).wait_until_listening(local)
    listed = {"ssh": {"target": sshd, "tcp": ssh}}
    listed["db"] = {"target": local, "tcp": redis}
    (TMP / "tcp.json").write_text(json.dumps(listed))
    span = "%d-%d" % (min(ssh, redis), max(ssh, redis))
    server = Server("--tcp-ports", span)
    client = Client(server, "tim", {}, options=("-c", str(TMP / "tcp.json")))
    client.process.wait_until_listening(ssh, redis)
    where = [*options, "-p", str(ssh), "127.0.0.1"]
    assert run("ssh", *where, "echo $((6 * 7))") == "42\n"
    world.big()
    with open(TMP / "web" / "big", "rb") as file:
        (TMP / "sent").write_bytes(file.read(COPIED))
    start = time.monotonic()
    there = "127.0.0.1:%s" % (TMP / "there")
    for one, two in ((str(TMP / "sent"), there), (there, str(TMP / "back"))):
        run("scp", *options, "-P", str(ssh), one, two)
    took = speed(start, 2 * COPIED)
    assert sha256(TMP / "back") == sha256(TMP / "sent")
    redis_cli = ["redis-cli", "-p", str(redis)]
    assert run(*redis_cli, "set", "a", "b") == "OK\n"
    assert run(*redis_cli, "get", "a") == "b\n"
    client.process.stop()
    wait_for("no port without its link", lambda: is_closed(ssh), seconds=1)
    server.process.stop()
    return took


# -----------------------------------------------------------------------------------
# Out by a proxy
# -----------------------------------------------------------------------------------
TINYPROXY = """
Port %(port)d
Listen %(address)s
BasicAuth me secret
"""


def out_by_tinyproxy(world: World) -> str:
    """With the password in the URL, and without it."""
    address, (port,) = own_address(), free_ports(1)
    if not address:
        return "left out: there is no address but loopback"
    conf = TMP / "tinyproxy.conf"
    conf.write_text(TINYPROXY % {"port": port, "address": address})
    proxy = Process("tinyproxy", "tinyproxy", "-d", "-c", str(conf))
    wait_for("tinyproxy", lambda: listening(port, address))
    script = str(REPOSITORY / "mdm_tunnel_client.py")
    where = "http://%s:" + str(world.server.client_port)
    words = [sys.executable, script, "-h", where % address, "-i", "out"]
    words.append("web=%d" % world.web)
    url = "http://%s" + "%s:%d" % (address, port)
    client = Process("client", *words, http_proxy=url % "me:secret@")
    wait_for("login by the proxy", lambda: is_served(world.server.port, "web.out.x"))
    assert "CONNECT %s" % address in proxy.output(), proxy.output()
    client.stop()
    environment = dict(os.environ, http_proxy=url % "")
    alone = subprocess.run(words, capture_output=True, env=environment, timeout=20)
    assert alone.returncode == 1 and b"wants a password" in alone.stderr, alone
    proxy.stop()
    return ""


def is_served(port: int, host: str) -> bool:
    return get(port, host, "/")[0] == 200


async def one_message_by_tls(local: int, host: str, port: int) -> None:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with serve(echo, "127.0.0.1", local, max_size=None):
        url = "wss://%s:%d/" % (host, port)
        where: Dict[str, Any] = {"host": "127.0.0.1", "port": port, "ssl": context}
        async with connect(url, max_size=None, **where) as connection:
            await connection.send(b"x" * (1 << 20))
            assert await connection.recv() == b"x" * (1 << 20)


def start_far(inside: List[str], server: Server, host: str) -> Process:
    """The client `far` in a namespace."""
    script = str(REPOSITORY / "mdm_tunnel_client.py")
    words = ["-h", "%s:%d" % (host, server.client_port), "-i", "far", "web=9"]
    return Process("client", *inside, sys.executable, script, *words)


def network_that_swallows_everything(world: World) -> str:
    """The client sits in a namespace whose only cable is pulled, and put back."""
    with namespace(7) as inside:
        if not inside:
            return "left out: no namespaces here"
        server = Server()
        client = start_far(inside, server, "10.213.7.1")
        answers = functools.partial(has_an_index, server.port)
        wait_for("login of far", answers)
        run(*inside, "ip", "link", "set", "cable", "down")
        wait_for("server's notice", lambda: not answers(), seconds=40)
        run(*inside, "ip", "link", "set", "cable", "up")
        start = time.monotonic()
        wait_for("the way back", answers, seconds=40)
        back = time.monotonic() - start
        client.stop()
        server.process.stop()
    return "back %.1f s after the cable" % back


BOTH = "fd00:213:8::99 dual.test\n10.213.8.1 dual.test\n"


def family_that_swallows_everything(world: World) -> str:
    """A server of both families, of which IPv6 never answers: the neighbour is made up.
    The other begins a moment later, and not when the first has failed."""
    with namespace(8) as inside:
        if not inside:
            return "left out: no namespaces here"
        run(*inside, "ip", "-6", *"addr add fd00:213:8::2/64 dev cable nodad".split())
        neighbour = "neigh add fd00:213:8::99 lladdr 02:00:00:00:00:99 dev cable"
        run(*inside, "ip", "-6", *neighbour.split())
        hosts = Path("/etc/netns") / inside[-1] / "hosts"  # for ip netns exec
        hosts.parent.mkdir(parents=True)
        hosts.write_text(BOTH)
        try:
            server = Server()
            start = time.monotonic()
            client = start_far(inside, server, "dual.test")
            wait_for("login of far", functools.partial(has_an_index, server.port))
            took = time.monotonic() - start
        finally:
            hosts.unlink()
            hosts.parent.rmdir()
        assert took < 2, "%.1f s" % took  # one address after the other took over 5
        client.stop()
        server.process.stop()
    return "logged in %.2f s after the start" % took


def has_an_index(port: int) -> bool:
    return get(port, "far.localhost", "/")[0] == 200


# -----------------------------------------------------------------------------------
# The smallest clients
# -----------------------------------------------------------------------------------
def tiny_clients(world: World) -> str:
    """In Python and in Node: two services, a large download, a target that is dead."""
    took = []
    for program, end in ((sys.executable, "py"), ("node", "js")):
        script = str(REPOSITORY / "examples" / ("tiny_client." + end))
        where = "127.0.0.1:%d" % world.server.client_port
        services = ["web=%d" % world.web, "other=%d" % world.other, "dead=1"]
        tiny = Process("tiny", program, script, where, "tiny", *services)
        for name in ("web", "other"):
            host = "%s.tiny.localhost" % name
            wait_for(name, functools.partial(is_served, world.server.port, host))
            assert b"this is " + name.encode() in get(world.server.port, host, "/")[1]
        world.big()
        url = "http://web.tiny.localhost:%d/big" % world.server.port
        start = time.monotonic()
        curl("-r", "0-%d" % (PART - 1), "-o", str(TMP / "part"), url)
        took.append(speed(start, PART))
        with open(TMP / "web" / "big", "rb") as file:
            assert sha256(TMP / "part") == hashlib.sha256(file.read(PART)).hexdigest()
        assert get(world.server.port, "dead.tiny.localhost", "/")[0] == 502
        tiny.stop()
        wait_for("its end", lambda: not is_served(world.server.port, "web.tiny.x"))
    return "Python %s, Node %s" % tuple(took)


# -----------------------------------------------------------------------------------
# After all that
# -----------------------------------------------------------------------------------
WARM = 40000  # requests after which the allocator has what it needs
GROWTH = 2048  # KiB that it may still take: a leak of 100 bytes a request


def make_requests(world: World, count: int) -> None:
    """By four visitors: two keep their connection, two take a new one each time."""
    url = world.tim.url("web", "?[1-%d]" % (count // 4))
    words = ["-o", os.devnull, "-w", "%{http_code}\n", url]
    ways: List[List[str]] = [[], ["-H", "Connection: close"]] * 2
    with concurrent.futures.ThreadPoolExecutor() as pool:
        said = list(pool.map(lambda way: curl(*way, *words), ways))
    answers = "".join(said).split()
    assert answers == ["200"] * count, "%d of %d" % (answers.count("200"), count)


def nothing_grows_in_20000_requests(world: World) -> str:
    """Neither side keeps a descriptor or memory, now and of all that was before."""
    parts = {"server": world.server.process, "client": world.tim.process}
    make_requests(world, WARM)
    before = {name: part.memory() for name, part in parts.items()}
    make_requests(world, 20000)
    wait_for("no more descriptors", lambda: is_idle(world))
    figures = []
    for name, part in parts.items():
        grown = part.memory() - before[name]
        assert grown <= GROWTH, "%s: %d KiB more" % (name, grown)
        figures.append("%s %d%+d KiB" % (name, before[name], grown))
    return ", ".join(figures)


def is_idle(world: World) -> bool:
    """Both sides have as many descriptors as before the first request."""
    return all(part.descriptors() <= count for part, count in world.idle.items())


def nothing_was_printed(world: World) -> str:
    """Without -v both scripts are silent, whatever happened; and still there."""
    parts = [part for part in Process.all if part.name in ("server", "client")]
    for part in parts:
        assert not part.output(), "%s printed: %s" % (part.name, part.output()[:2000])
    for part in world.idle:
        assert part.popen.poll() is None, "%s has ended" % part.name
    return "%d processes" % len(parts)


def benchmark_runs(world: World) -> str:
    """The benchmark measures what it is asked for; what it finds is for its readers."""
    script = str(REPOSITORY / ".ci" / "benchmark.py")
    found = TMP / "benchmark.json"
    words = ["--quick", "--json", str(found), "--systems", "haproxy", "ours"]
    words += ["--only", "one download", "32 kept", "thin link", "start"]
    run(sys.executable, script, *words, seconds=100)
    runs = json.loads(found.read_text())["runs"]
    ours = {one["measure"]: one["figures"] for one in runs if one["system"] == "ours"}
    assert len(ours) == 4 and all(ours.values()), ours
    figures = ours["one download"]["rate"], ours["thin link"]["p50"]
    return "%.0f MB/s, %.0f ms beside two downloads at 20 Mbit/s" % figures


CHECKS: List[Callable[[World], str]] = [
    two_hosts_on_one_connection,
    one_request_at_a_time,
    websocket_messages,
    websocket_message_of_16_mib,
    websocket_pings,
    websocket_close_codes,
    chromium_websockets_example,
    chromium_index_page,
    git_clone_and_push,
    flask_forms_and_files,
    flask_events_come_one_by_one,
    five_hundred_visitors_at_once,
    download_of_2_gib,
    upload_of_2_gib,
    upload_in_chunks,
    behind_nginx,
    behind_haproxy,
    client_killed_in_a_download,
    server_killed_in_a_download,
    client_told_to_end_while_a_visitor_idles,
    strictness_with_requests,
    strictness_with_answers,
    tls_and_tokens,
    ssh_and_redis_by_ports_of_their_own,
    out_by_tinyproxy,
    tiny_clients,
    *first_minute.CHECKS,
    *counting.CHECKS,
    *by_name.CHECKS,
    *publishing.CHECKS,
    *deploying.CHECKS,
    *checking.CHECKS,
    *inspecting.CHECKS,
    *skew.CHECKS,
    *leaving.CHECKS,
    network_that_swallows_everything,
    family_that_swallows_everything,
    *moving.CHECKS,
    nothing_grows_in_20000_requests,
    nothing_was_printed,
    benchmark_runs,
]
