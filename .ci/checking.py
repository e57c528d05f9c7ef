"""--check against set-ups that are broken as people break them, with the advice that it
gives; and the units that --print-unit prints."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, List, Tuple

from deploying import EXPOSED, exposure
from parts import REPOSITORY, TMP, Process, Server, World, free_ports, run, wait_for
from publishing import make_certificate
from skew import Secrets, end

CLIENT = str(REPOSITORY / "mdm_tunnel_client.py")
SERVER = str(REPOSITORY / "mdm_tunnel_server.py")
FILLERS: List[socket.socket] = []
EXPIRED = """
[ca]
default_ca=ours
[ours]
database=index.txt
serial=serial
new_certs_dir=.
default_md=sha256
policy=policy
x509_extensions=names
[policy]
commonName=supplied
[names]
subjectAltName=DNS:localhost
"""


def make_expired(folder: Path) -> Tuple[str, str]:
    """A certificate that was good in January 2020, and its key."""
    folder.mkdir()
    (folder / "ca.cnf").write_text(EXPIRED)
    (folder / "index.txt").touch()
    (folder / "serial").write_text("01\n")
    made = "openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout key.pem"
    run(*made.split(), "-out", "req.pem", cwd=folder)
    signed = "openssl ca -batch -config ca.cnf -selfsign -keyfile key.pem -in req.pem"
    signed += " -startdate 20200101000000Z -enddate 20200201000000Z -notext"
    run(*signed.split(), "-out", "cert.pem", cwd=folder)
    return str(folder / "cert.pem"), str(folder / "key.pem")


class Found:
    """What a --check says."""

    def __init__(self, *words: str, status: int = 1, **environment: str) -> None:
        command = [sys.executable, CLIENT, "--check", "-i", "tim", *words]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=60,
            env={**os.environ, **environment},
        )
        self.said = done.stdout + done.stderr
        assert done.returncode == status, "%d: %s" % (done.returncode, self.said)
        assert "Traceback" not in self.said, self.said

    def has(self, pattern: str, advice: str = "") -> None:
        """A line like this, and behind it what to do."""
        lines = self.said.splitlines()
        at = [at for at, line in enumerate(lines) if re.match(pattern, line)]
        assert at, "%s:\n%s" % (pattern, self.said)
        assert not advice or advice in lines[at[0] + 1], self.said


def check_of_the_way_to_the_server(world: World) -> str:
    """Its name, its port, its TLS, its token."""
    web, secrets = "web=%d" % world.web, Secrets(TMP / "secrets-check")
    server, plain = Server(*secrets.for_server), Server()
    (closed,) = free_ports(1)
    there, token = ["-h", "localhost:%d" % server.client_port], secrets.token
    known: Any = {"MDM_TUNNEL_TOKEN": token}
    good = Found(*there, *secrets.for_client, web, status=0, **known)
    good.has(r"ok +TLS +TLSv1\.3, .*for [12] days: RENEW")
    good.has("ok +visit +https://web.tim.localhost:[0-9]+: 200")
    found = Found("-h", "no-such-name.invalid", web)
    found.has("FAILED +name", "is the name right")
    Found("-h", "localhost:%d" % closed, web).has("FAILED +connect", "client port")
    Found("-h", "localhost:%d" % world.web, web).has("FAILED +protocol", "those of the")
    found = Found("-h", "localhost:%d" % plain.port, web)
    found.has("FAILED +protocol", "--client-port")
    found = Found("-h", "localhost:%d" % plain.client_port, "--tls", web)
    found.has("FAILED +TLS", "has the server --tls-cert")
    Found(*there, web, **known).has("FAILED +protocol.*answered 400", "--tls")
    found = Found(*there, "--tls", web, **known)
    found.has("FAILED +TLS.*self.signed", "--fingerprint")
    found = Found(*there, "--fingerprint", "0" * 64, web, **known)
    found.has("FAILED +TLS.*fingerprint", "compare")
    found = Found(*there, *secrets.for_client, web)
    found.has("FAILED +login.*wants a token", "--token-file")
    found = Found(*there, *secrets.for_client, web, MDM_TUNNEL_TOKEN="x" * 30)
    found.has("FAILED +login.*wrong token", "file tim, with this")
    proxy = "http://127.0.0.1:%d" % closed
    found = Found("-h", "tunnel.test:1", web, http_proxy=proxy)
    found.has("FAILED +connect.*proxy 127.0.0.1")
    for one in (server, plain):
        one.process.stop()
    return "12 set-ups"


def check_of_certificates(world: World) -> str:
    """Expired, and for another name."""
    expired = make_expired(TMP / "expired")
    other = make_certificate(TMP / "another-name", "another.example")
    for (cert, key), cause, advice in (
        (expired, "expired", "clock of this machine"),
        (other, "mismatch|not valid for", "it is for other names"),
    ):
        server = Server("--tls-cert", cert, "--tls-key", key)
        where = "https://localhost:%d" % server.client_port
        found = Found("-h", where, "--tls-ca", cert, "web=%d" % world.web)
        found.has("FAILED +TLS.*(%s)" % cause, advice)
        server.process.stop()
    return ""


def check_of_targets(world: World) -> str:
    """Nobody listens; TLS where none is expected, and the reverse."""
    cert, key = make_certificate(TMP / "check-target", "localhost")
    tls, closed = free_ports(2)
    words = "openssl s_server -www -accept 127.0.0.1:%d" % tls
    openssl = Process("s_server", *words.split(), "-cert", cert, "-key", key)
    openssl.wait_until_listening(tls)
    server = Server()
    there = ["-h", "localhost:%d" % server.client_port]
    Found(*there, "web=%d" % closed).has("FAILED +target +web", "start the service")
    found = Found(*there, "web=%d" % tls)
    found.has("FAILED +visit", 'write "https://127.0.0.1:%d"' % tls)
    good = Found(*there, "web=https://127.0.0.1:%d" % tls, status=0)
    good.has("ok +visit +.*: 200")
    found = Found(*there, "web=https://127.0.0.1:%d" % world.web)
    found.has("FAILED +target.*no TLS", "write http://")
    found = Found(*there, "-c", "/no/such/file", status=2)
    assert "/no/such/file" in found.said, found.said
    openssl.stop()
    server.process.stop()
    return ""


def check_beside_a_client_that_runs(world: World) -> str:
    """It is left alone, also where a token would put it off."""
    secrets = Secrets(TMP / "secrets-beside")
    server, token = Server(*secrets.for_server), secrets.token
    there = ["-h", "localhost:%d" % server.client_port, *secrets.for_client]
    words = ["-v", "-i", "tim", *there, "web=%d" % world.web]
    command = [sys.executable, CLIENT, *words]
    client = Process("beside", *command, MDM_TUNNEL_TOKEN=token)
    wait_for("its URL", lambda: "web  https://" in client.output())
    web = "web=%d" % world.web
    found = Found(*there, web, status=0, MDM_TUNNEL_TOKEN=token)
    found.has("ok +login +a client runs as tim, and was left alone")
    assert client.popen.poll() is None and "replaced" not in client.output()
    assert client.output().count("logged in") == 1, client.output()
    end(client)
    server.process.stop()
    return ""


def deaf_listener() -> socket.socket:
    """Nobody accepts there, and its queue is full: who dials gets no answer."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        FILLERS.append(filler)
    return listener


def check_gives_the_id_to_who_starts(world: World) -> str:
    """One that waits for targets holds no client up; Ctrl-C ends it in one line."""
    server = Server()
    deaf = [deaf_listener() for _ in range(3)]
    words = ["t%d=%d" % (at, x.getsockname()[1]) for at, x in enumerate(deaf)]
    there = ["-i", "tim", "-h", "localhost:%d" % server.client_port]
    check = Process("check", sys.executable, CLIENT, "--check", *there, *words)
    wait_for("its URLs", lambda: "url       t2" in check.output())
    web = "web=%d" % world.web
    client = Process("starter", sys.executable, CLIENT, "-v", *there, web)
    wait_for("its URL", lambda: "web  http://" in client.output(), 3)
    check.popen.send_signal(signal.SIGINT)
    assert check.popen.wait(20) == 1, check.output()
    assert check.output().endswith(": stopped\n"), check.output()
    end(client)
    server.process.stop()
    for sock in [*deaf, *FILLERS]:
        sock.close()
    return ""


def check_sees_who_else_answers(world: World) -> str:
    """Another server has the name; a visitor is not let in, or has a password."""
    elsewhere = Server("--domain", "http://tunnel.localhost:%d" % world.other)
    where = ["-h", "localhost:%d" % elsewhere.client_port]
    found = Found(*where, "web=%d" % world.web)
    found.has("FAILED +visit.*nothing came by our link", "does the name lead")
    server, path = Server(), TMP / "check-services.json"
    where = ["-h", "localhost:%d" % server.client_port, "-c", str(path)]
    for more, status, line in (
        ({"auth": "me:secret"}, 0, "ok +visit.*: 200"),
        ({"visitors": ["192.0.2.0/24"]}, 1, "FAILED +visit.*403 denied"),
    ):
        path.write_text(json.dumps({"web": dict(more, target=world.web)}))
        Found(*where, status=status).has(line)
    for one in (elsewhere, server):
        one.process.stop()
    return ""


def printed_units_are_verified(world: World) -> str:
    """systemd has nothing to say against them, and sees their fences."""
    folder, worst = TMP / "units", 0.0
    folder.mkdir()
    (folder / "services.json").write_text('{"web": 9000}')
    (folder / "token").write_text("a token\n")
    for name, words in (
        ("client", ["-h", "https://a.example", "-i", "tim", "-v", "web=9000"]),
        ("client", ["-c", "services.json", "--token-file", "token", "--drain", "9"]),
        ("client", ["web=unix:/a b%h$x", "--url-file", "urls.json"]),
        ("server", ["-p", "80", "--tokens", "token", "--domain", "a.example"]),
        ("server", ["--user", "nobody", "-vv", "--tcp-ports", "2222-2299"]),
    ):
        script = {"client": CLIENT, "server": SERVER}[name]
        command = [sys.executable, script, "--print-unit", *words]
        said = run(*command, cwd=folder)
        unit = folder / ("mdm-tunnel-%s.service" % name)
        unit.write_text(said)
        worst = max(worst, exposure(unit))
    assert worst <= EXPOSED, worst
    return "exposure at most %.1f" % worst


CHECKS: List[Callable[[World], str]] = [
    check_of_the_way_to_the_server,
    check_of_certificates,
    check_of_targets,
    check_beside_a_client_that_runs,
    check_gives_the_id_to_who_starts,
    check_sees_who_else_answers,
    printed_units_are_verified,
]
