"""Old and new at the two ends of a link: a client of 1.0.0 with our server, and our
client with a server of 1.0.0. Both scripts are taken out of the history."""

import contextlib
import hashlib
import http.client
import http.server
import json
import os
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple, Union

from history import VERSION_1, out_of_history
from parts import REPOSITORY, TMP, Client, Process, Server, World, free_ports, get, run
from parts import wait_for
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_websocket

SIZE = 20 << 20  # bytes, each way
NOISE = os.urandom(SIZE)
SUM = hashlib.sha256(NOISE).hexdigest()


# -----------------------------------------------------------------------------------
# Services
# -----------------------------------------------------------------------------------
class Handler(http.server.BaseHTTPRequestHandler):
    """GET: the noise. POST: the SHA-256 of what came."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(NOISE)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(hashlib.sha256(body).hexdigest().encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


@contextlib.contextmanager
def services() -> Iterator[Dict[str, int]]:
    """Their ports."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sockets = serve_websocket(echo, "127.0.0.1", 0, max_size=None)
    for one in (web, sockets):
        threading.Thread(target=one.serve_forever, daemon=True).start()
    try:
        ports = web.server_address[1], sockets.socket.getsockname()[1]
        yield dict(zip(("web", "sockets"), ports))
    finally:
        web.shutdown()
        sockets.shutdown()


# -----------------------------------------------------------------------------------
# A link
# -----------------------------------------------------------------------------------
class FileClient(Client):
    """One that has its services in a file."""

    def command(self) -> List[str]:
        self.write(dict(self.ports()))
        words = super().command()[: -len(self.services)]
        return [*words, "-c", str(self.file())]

    def ports(self) -> Iterator[Tuple[str, int]]:
        for service in self.services:
            name, _, port = service.partition("=")
            yield name, int(port)

    def file(self) -> Path:
        return TMP / ("services-%d.json" % self.server.port)

    def write(self, ports: Dict[str, int]) -> None:
        """As an editor does it: the file is never half there."""
        draft = self.file().with_suffix(".new")
        draft.write_text(json.dumps(ports))
        draft.replace(self.file())
        self.services = ["%s=%d" % pair for pair in ports.items()]


class Secrets:
    """A certificate, its fingerprint, and tokens."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        words = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
        words += " -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
        run(*words.split(), cwd=folder)
        der = ssl.PEM_cert_to_DER_cert((folder / "cert.pem").read_text())
        self.fingerprint = hashlib.sha256(der).hexdigest()
        self.token = os.urandom(16).hex()
        (folder / "tokens.json").write_text(json.dumps({"tim": self.token}))
        (folder / "tokens.json").chmod(0o600)
        (self.by_tls,) = free_ports(1)
        self.for_server = (
            *("--tls-cert", str(folder / "cert.pem")),
            *("--tls-key", str(folder / "key.pem")),
            *("--tls-port", str(self.by_tls)),
            *("--tokens", str(folder / "tokens.json")),
        )
        self.for_client = ("--fingerprint", self.fingerprint)


# -----------------------------------------------------------------------------------
# What must go well
# -----------------------------------------------------------------------------------
def bodies(client: Client, connection: http.client.HTTPConnection) -> None:
    """Down and up, on one connection."""
    host = {"Host": client.host("web")}
    for _ in range(2):
        connection.request("GET", "/noise", headers=host)
        came = connection.getresponse().read()
        assert hashlib.sha256(came).hexdigest() == SUM, "%d bytes came" % len(came)
        connection.request("POST", "/", NOISE, host)
        said = connection.getresponse().read().decode()
        assert said == SUM, "the upload came as %s" % said
    connection.close()


def messages(client: Client) -> None:
    uri = "ws://%s:%d/" % (client.host("sockets"), client.server.port)
    sock = socket.create_connection(("127.0.0.1", client.server.port), 30)
    with connect(uri, sock=sock, max_size=None, proxy=None) as visitor:
        said: List[Union[str, bytes]] = ["\u00fc\u20ac", b"", NOISE[: 3 << 20]]
        for message in said:
            visitor.send(message)
            came = visitor.recv(30)
            assert came == message, "%r came back" % came[:100]


def reload(client: FileClient, ports: Dict[str, int]) -> None:
    """A service more, then one less."""
    server = client.server
    client.write(dict(ports, more=ports["web"]))
    wait_for("the new service", client.is_in)
    status, body = get(server.port, client.host("more"), "/")
    assert (status, body) == (200, NOISE), status
    client.write({"more": ports["web"]})
    wait_for("the end of a service", client.is_in)
    status, _ = get(server.port, client.host("web"), "/")
    assert status == 404, status


def wrong_token(client: Client) -> None:
    """Ends the newcomer, and not who is there."""
    process = Process("thief", *client.command(), MDM_TUNNEL_TOKEN="wrong")
    status = process.popen.wait(15)
    assert status == 3, "it ended with %d: %s" % (status, process.output())
    assert client.is_in()


def end(process: Process) -> None:
    """By SIGTERM, in good order."""
    start = time.monotonic()
    process.popen.terminate()
    status = process.popen.wait(10)
    seconds = time.monotonic() - start
    assert status == 0, "%s ended with %d" % (process.name, status)
    assert seconds < 5, "%s took %.1f s to end" % (process.name, seconds)


def try_all(server: Server, client: FileClient, ports: Dict[str, int]) -> None:
    bodies(client, http.client.HTTPConnection("127.0.0.1", server.port, timeout=30))
    messages(client)
    reload(client, ports)


def plain(server_scripts: Path, client_scripts: Path, ports: Dict[str, int]) -> None:
    """The server is told to end first: the client stays, and dials again."""
    server = Server(scripts=server_scripts)
    client = FileClient(server, "tim", ports, scripts=client_scripts)
    try_all(server, client, ports)
    end(server.process)
    server.start()
    wait_for("the way back", client.is_in, 12)
    end(client.process)
    end(server.process)


def secured(server_scripts: Path, client_scripts: Path, ports: Dict[str, int]) -> None:
    """With TLS on both hops, fingerprint and token."""
    secrets = Secrets(TMP / ("secrets-%s" % server_scripts.name))
    server = Server(*secrets.for_server, scripts=server_scripts)
    options, token = secrets.for_client, secrets.token
    client = FileClient(
        server, "tim", ports, options=options, token=token, scripts=client_scripts
    )
    try_all(server, client, ports)
    wrong_token(client)
    context = ssl.create_default_context(cafile=secrets.for_server[1])
    by_tls = http.client.HTTPSConnection(
        "localhost", secrets.by_tls, timeout=30, context=context
    )
    client.write(ports)
    wait_for("the old services", client.is_in)
    bodies(client, by_tls)
    end(client.process)
    end(server.process)


def both(server_scripts: Path, client_scripts: Path) -> str:
    with services() as ports:
        plain(server_scripts, client_scripts, ports)
        secured(server_scripts, client_scripts, ports)
    return ""


def old() -> Path:
    return out_of_history(VERSION_1, TMP / VERSION_1)


def client_of_1_0_0(_: World) -> str:
    return both(REPOSITORY, old())


def server_of_1_0_0(_: World) -> str:
    return both(old(), REPOSITORY)


CHECKS: List[Callable[[World], str]] = [client_of_1_0_0, server_of_1_0_0]
