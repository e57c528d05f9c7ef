"""The configurations of examples/deploy: the very files, with other ports and paths. A
replacement that no longer matches is a failure."""

import functools
import hashlib
import http.client
import http.server
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from parts import REPOSITORY, TMP, Process, Server, World, curl, free_ports, run, sha256
from parts import start_haproxy, start_nginx, wait_for
from publishing import SCRIPT, make_certificate, says, talking
from skew import NOISE, SUM, end, services
from websockets.sync.client import connect

FOLDER = REPOSITORY / "examples" / "deploy"
VISITOR = "127.0.0.2"  # so that it can be told from the front
EVENTS = 5


def filled(name: str, *pairs: Any) -> str:
    """A file with each `old, new` replaced: its comments may say them, too."""
    text = (FOLDER / name).read_text()
    for old, new in pairs:
        assert old in text, "%s has no %r any more" % (name, old)
        text = text.replace(old, str(new))
    return text


# -----------------------------------------------------------------------------------
# A service that is asked how it is seen
# -----------------------------------------------------------------------------------
class Asked(http.server.BaseHTTPRequestHandler):
    """/who: the fields of the request. Else events, each after the last has come."""

    protocol_version = "HTTP/1.1"
    came = threading.Semaphore(0)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.path == "/who":
            self.wfile.write(json.dumps(dict(self.headers)).encode())
            return
        for number in range(EVENTS):
            self.wfile.write(b"data: %d\n\n" % number)
            assert self.came.acquire(timeout=20), "event %d did not come" % number

    def log_message(self, *_: object) -> None:
        pass


def start_asked() -> Any:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


# -----------------------------------------------------------------------------------
# Fronts with TLS: one port of theirs, for visitors and clients, before one of ours
# -----------------------------------------------------------------------------------
class OnePort(Server):
    """A server as examples/deploy/README.md starts it, but for its ports."""

    def __init__(self, name: str) -> None:
        self.front, self.plain, self.port = free_ports(3)
        self.client_port, self.scripts = self.port, REPOSITORY
        line = filled("README.md", ("https://tunnel.example.com --", "%s --"))
        line = line.partition("    python3 mdm_tunnel_server.py ")[2]
        words = line.partition("\n\n")[0].replace("\\\n", " ").split()
        assert words[:4] == ["-p", "8000", "-c", "8000"], words
        domain = "https://tunnel.example.com:%d" % self.front
        words = [domain if word == "%s" else word for word in words[4:]]
        at = words.index("--tokens")
        self.options = tuple(words[:at] + words[at + 2 :])  # it has no secrets here
        self.start()
        names = "localhost", "*.tim.tunnel.example.com"
        folder = TMP / ("front-%s" % name)
        self.certificate, self.key = make_certificate(folder, *names)
        self.both = folder / "both.pem"  # in one file, as HAProxy has them
        files = (self.certificate, self.key)
        self.both.write_text("".join(Path(file).read_text() for file in files))
        der = ssl.PEM_cert_to_DER_cert(Path(self.certificate).read_text())
        self.fingerprint = hashlib.sha256(der).hexdigest()

    def name(self, service: str) -> str:
        return "%s.tim.tunnel.example.com:%d" % (service, self.front)

    def connect(self, service: str) -> http.client.HTTPSConnection:
        """A visitor's connection, from an address of its own."""
        context = ssl.create_default_context(cafile=self.certificate)
        conn = http.client.HTTPSConnection(
            self.name(service), context=context, source_address=(VISITOR, 0)
        )
        source = (VISITOR, 0)
        sock = socket.create_connection(("127.0.0.1", self.front), 30, source)
        host = self.name(service).partition(":")[0]
        conn.sock = context.wrap_socket(sock, server_hostname=host)
        return conn


def web_by_tls(server: OnePort) -> None:
    """curl, which speaks HTTP/2 with the front: a page, and 20 MiB both ways."""
    into, base = TMP / "by-tls", server.name("")
    words = ["--cacert", server.certificate, "-o", str(into), "-w", "%{http_version}"]
    for name in ("web", "noise"):
        words += ["--resolve", name + base + ":127.0.0.1"]
    assert curl(*words, "https://web%s/" % base) == "2"
    assert "this is web" in into.read_text()
    assert curl(*words, "https://noise%s/" % base) == "2"
    assert sha256(into) == SUM, into.stat()
    up = ["--data-binary", "@-", "https://noise%s/" % base]
    command = ["curl", "-sS", *words, *up]
    said = subprocess.run(command, input=NOISE, stdout=subprocess.PIPE, timeout=60)
    assert said.stdout == b"2" and into.read_text() == SUM, into.read_text()[:200]


def sockets_by_tls(server: OnePort) -> None:
    uri = "wss://%s/" % server.name("sockets")
    sock = socket.create_connection(("127.0.0.1", server.front), 30)
    context = ssl.create_default_context(cafile=server.certificate)
    with connect(uri, sock=sock, ssl=context, max_size=None, proxy=None) as visitor:
        for message in ("\u00fc\u20ac", b"", NOISE[: 3 << 20]):
            visitor.send(message)
            came = visitor.recv(30)
            assert came == message, "%r came back" % came[:100]


def events_one_by_one(server: OnePort) -> None:
    conn = server.connect("asked")
    conn.request("GET", "/events", headers={"Host": server.name("asked")})
    answer = conn.getresponse()
    for number in range(EVENTS):
        line = answer.readline()
        assert line == b"data: %d\n" % number, line
        assert answer.readline() == b"\n"
        Asked.came.release()
    conn.close()


def who_comes(server: OnePort) -> None:
    """The service learns the visitor, whatever he says of himself."""
    conn = server.connect("asked")
    fields = {"Host": server.name("asked"), "X-Forwarded-For": "192.0.2.66"}
    conn.request("GET", "/who", headers=fields)
    told = json.loads(conn.getresponse().read().decode())
    conn.close()
    assert told["X-Forwarded-For"].split(",")[-1].strip() == VISITOR, told
    assert told["X-Forwarded-Proto"] == "https", told
    assert told["X-Forwarded-Host"] == server.name("asked"), told


def plain_is_led_to_tls(server: OnePort) -> None:
    url = "http://127.0.0.1:%d/a?b" % server.plain
    host = "Host: web.tim.tunnel.example.com"
    said = curl("-H", host, "-o", os.devnull, "-w", "%{http_code} %{redirect_url}", url)
    assert said == "308 https://web.tim.tunnel.example.com/a?b", said


def behind(world: World, server: OnePort, *trust: str) -> str:
    """The client dials by the front, and so do its visitors."""
    where = ["-h", "https://localhost:%d" % server.front, "-i", "tim"]
    stranger = [sys.executable, SCRIPT, *where, "--fingerprint", "0" * 64, "web=9"]
    done = subprocess.run(stranger, capture_output=True, timeout=20)
    assert done.returncode == 1 and b"fingerprint" in done.stderr, done
    asked = start_asked()
    with services() as ports:
        listed = {"web": world.web, "noise": ports["web"], "sockets": ports["sockets"]}
        listed["asked"] = asked.server_address[1]
        words = ["%s=%d" % pair for pair in listed.items()]
        client = talking("-v", *where, *trust, *words)
        for name in listed:
            url = "https://%s/ " % server.name(name)
            wait_for(url, functools.partial(says, client, url))
        for check in (web_by_tls, sockets_by_tls, events_one_by_one, who_comes):
            check(server)
        plain_is_led_to_tls(server)
        end(client)
    asked.shutdown()
    server.process.stop()
    return ""


LIVE = "/etc/letsencrypt/live/tunnel.example.com/"


def behind_nginx_by_tls(world: World) -> str:
    server = OnePort("nginx")
    text = filled(
        "nginx.conf",
        ("listen 80;", "listen 127.0.0.1:%d;" % server.plain),
        ("listen 443 ssl", "listen 127.0.0.1:%d ssl" % server.front),
        (LIVE + "fullchain.pem", server.certificate),
        (LIVE + "privkey.pem", server.key),
        ("http://127.0.0.1:8000;", "http://127.0.0.1:%d;" % server.port),
    )
    start_nginx("nginx-by-tls", text, server.front)
    return behind(world, server, "--tls-ca", server.certificate)


def behind_haproxy_by_tls(world: World) -> str:
    server = OnePort("haproxy")
    text = filled(
        "haproxy.cfg",
        ("bind :80\n", "bind 127.0.0.1:%d\n" % server.plain),
        ("bind :443 ", "bind 127.0.0.1:%d " % server.front),
        ("crt /etc/haproxy/tunnel.pem", "crt %s" % server.both),
        ("tunnel 127.0.0.1:8000\n", "tunnel 127.0.0.1:%d\n" % server.port),
    )
    start_haproxy("haproxy-by-tls", text, server.front, whole=True)
    return behind(world, server, "--fingerprint", server.fingerprint)


def behind_caddy_by_tls(world: World) -> str:
    server, file = OnePort("caddy"), TMP / "Caddyfile"
    ports = "http_port %d\n\thttps_port %d" % (server.plain, server.front)
    ours = "{\n\tadmin off\n\tauto_https off\n\t%s\n}\n" % ports
    text = filled(
        "Caddyfile",
        ("\n:443 {\n", "\n:%d {\n\tbind 127.0.0.1\n" % server.front),
        ("\n:80 {\n", "\n:%d {\n\tbind 127.0.0.1\n" % server.plain),
        (LIVE + "fullchain.pem", server.certificate),
        (LIVE + "privkey.pem", server.key),
        ("proxy 127.0.0.1:8000 {", "proxy 127.0.0.1:%d {" % server.port),
    )
    file.write_text(ours + text)
    words = ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)]
    caddy = Process("caddy", *words, HOME=str(TMP))
    caddy.wait_until_listening(server.front)
    trust = ["--tls-ca", server.certificate, "--fingerprint", server.fingerprint]
    return behind(world, server, *trust)


# -----------------------------------------------------------------------------------
# Units, certificates, a container
# -----------------------------------------------------------------------------------
EXPOSED = 2.0  # what systemd-analyze may say: 10 is a unit without any fence


def exposure(unit: Path) -> float:
    """systemd has nothing to say against the unit; how exposed it is."""
    run("systemd-analyze", "verify", str(unit))
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    said = subprocess.run(words, stdout=subprocess.PIPE, universal_newlines=True).stdout
    match = re.search(r"exposure level for .*: ([\d.]+)", said)
    assert match, said
    return float(match.group(1))


def units_are_verified(world: World) -> str:
    found = {unit.name: exposure(unit) for unit in sorted(FOLDER.glob("*.service"))}
    assert len(found) == 2 and max(found.values()) <= EXPOSED, found
    return ", ".join("exposure %.1f" % value for value in found.values())


def shows_certificate(port: int, name: str, wanted: str) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 20) as sock:
        with context.wrap_socket(sock, server_hostname=name) as tls:
            der = tls.getpeercert(True) or b""
    return hashlib.sha256(der).hexdigest() == wanted


def certbots_hook(world: World) -> str:
    """As certbot calls it, and then once more with renewed files."""
    folder, hook = TMP / "tls-dir", TMP / "certbot-hook.sh"
    folder.mkdir()
    text = filled(
        "certbot-hook.sh",
        ("folder=/etc/mdm-tunnel/tls", "folder=%s" % folder),
        ("group=mdm-tunnel", "group=%s" % run("id", "-gn").strip()),
    )
    hook.write_text(text)
    names = "tunnel.example.com", "*.tim.tunnel.example.com"
    (port,) = free_ports(1)
    server = None
    for turn in ("first", "renewed"):
        lineage = TMP / ("lineage-" + turn)
        certificate, key = make_certificate(lineage, *names)
        shutil.copy(certificate, str(lineage / "fullchain.pem"))
        shutil.copy(key, str(lineage / "privkey.pem"))
        said = {"RENEWED_LINEAGE": str(lineage), "RENEWED_DOMAINS": " ".join(names)}
        environment: Dict[str, str] = {**os.environ, **said}
        subprocess.run(["sh", str(hook)], env=environment, check=True, timeout=20)
        assert len(list(folder.iterdir())) == 4, list(folder.iterdir())
        assert all(not file.stat().st_mode & 7 for file in folder.iterdir())
        if server is None:
            server = Server("--tls-dir", str(folder), "--tls-port", str(port))
        der = ssl.PEM_cert_to_DER_cert(Path(certificate).read_text())
        wanted = hashlib.sha256(der).hexdigest()
        for name in ("tunnel.example.com", "web.tim.tunnel.example.com"):
            shows = functools.partial(shows_certificate, port, name, wanted)
            wait_for("%s of %s" % (turn, name), shows)
    if server:
        server.process.stop()
    return ""


def lines_of_the_dockerfile(world: World) -> str:
    """Where no container can be built its lines are followed by hand: the files are
    copied alone into an empty folder, and the entry point is run."""
    text = filled("Dockerfile")
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    said = dict(line.split(" ", 1) for line in lines)
    assert list(said) == ["FROM", "COPY", "USER", "ENTRYPOINT"], said
    root = TMP / "container"
    root.mkdir()
    *files, into = said["COPY"].split()
    for file in files:
        shutil.copy(str(REPOSITORY / file), str(root / into.lstrip("/")))
    program, script = json.loads(said["ENTRYPOINT"])
    ports = free_ports(2)
    words = ["-v", "-p", str(ports[0]), "-c", str(ports[1])]
    server = Process("container", program, str(root / script.lstrip("/")), *words)
    server.wait_until_listening(*ports)
    start = time.monotonic()
    server.popen.terminate()
    assert server.popen.wait(20) == 0
    assert time.monotonic() - start < 10, "docker would have killed it"
    return "by hand: no image was built"


CHECKS: List[Callable[[World], str]] = [
    behind_nginx_by_tls,
    behind_haproxy_by_tls,
    behind_caddy_by_tls,
    units_are_verified,
    certbots_hook,
    lines_of_the_dockerfile,
]
