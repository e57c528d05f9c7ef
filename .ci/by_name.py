"""Ways in by the name of a service: CONNECT, TLS that passes through, certificates and
domains; and proxies before the server that say who comes. All with real programs."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from parts import TMP, Client, Process, Server, World, curl, free_ports, get, run
from parts import sha256, start_haproxy, start_nginx, start_sshd, wait_for

COPIED = 200 << 20  # bytes that scp carries
VISITOR = "127.0.0.9"  # an address of loopback that nobody else has


# -----------------------------------------------------------------------------------
# Parts
# -----------------------------------------------------------------------------------
class Pair:
    """A certificate for these DNS names and its key, in a folder of their own."""

    def __init__(self, stem: str, *names: str) -> None:
        self.folder = TMP / ("pair-" + stem)
        self.folder.mkdir()
        self.cert, self.key = (self.folder / (stem + end) for end in (".crt", ".key"))
        self.pem = self.folder / "both.pem"
        words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x".split()
        words += ["-addext", "subjectAltName=" + ",".join("DNS:" + x for x in names)]
        run("openssl", *words, "-keyout", str(self.key), "-out", str(self.cert))
        self.pem.write_text(self.cert.read_text() + self.key.read_text())


class InFile(Client):
    """A client whose services stand in a file."""

    def is_in(self) -> bool:
        return get(self.server.port, "%s.localhost" % self.id, "/")[0] == 200


def publish(server: Server, services: Dict[str, Any], *options: str) -> Client:
    """A client `tim` whose services have options, so they stand in a file."""
    path = TMP / "by-name.json"
    path.write_text(json.dumps(services))
    return InFile(server, "tim", {}, options=("-c", str(path), *options))


NGINX_TELLS = """
  server {
    listen 127.0.0.1:%d %s;
    ssl_certificate %s;
    ssl_certificate_key %s;
    location / { return 200 "%s"; }
  }
"""


def start_telling(listen: str, text: str, pair: Pair) -> int:
    """The port of an nginx that says `text`, in which its variables are replaced."""
    (port,) = free_ports(1)
    servers = NGINX_TELLS % (port, listen, pair.cert, pair.key, text)
    start_nginx("nginx-%d" % port, servers, port)
    return port


def stop(*parts: Any) -> None:
    for part in parts:
        (part if isinstance(part, Process) else part.process).stop()


# -----------------------------------------------------------------------------------
# CONNECT, and TLS that passes through
# -----------------------------------------------------------------------------------
def ssh_by_connect(world: World) -> str:
    """As README has it: nc asks for CONNECT."""
    sshd, options = start_sshd()
    server = Server()
    client = publish(server, {"ssh": {"target": sshd, "tcp": True}})
    way = "ProxyCommand=nc -X connect -x 127.0.0.1:%d %%h %%p" % server.port
    words = [*options, "-o", way]
    wait_for("ssh", lambda: answers("ssh", *words, "ssh.tim.localhost", "true"))
    assert run("ssh", *words, "ssh.tim.localhost", "echo $((6 * 7))") == "42\n"
    took = copy(words, "ssh.tim.localhost", world)
    other = run_badly("ssh", *words, "other.tim.localhost", "true")
    assert "404" in other or "proxy" in other.lower(), other
    stop(client, server)
    return took


def answers(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=20).returncode == 0


def run_badly(*command: str) -> str:
    """What a program says that must fail."""
    done = subprocess.run(command, capture_output=True, timeout=20)
    assert done.returncode != 0, done.stdout
    return (done.stdout + done.stderr).decode(errors="replace")


def copy(words: List[str], host: str, world: World) -> str:
    """scp there and back; how fast it was."""
    world.big()
    sent, back = TMP / "sent", TMP / "back"
    with open(TMP / "web" / "big", "rb") as file:
        sent.write_bytes(file.read(COPIED))
    start = time.monotonic()
    there = "%s:%s/there" % (host, TMP)
    for one, two in ((str(sent), there), (there, str(back))):
        run("scp", *words, one, two)
    took = 2 * COPIED / (time.monotonic() - start)
    assert sha256(back) == sha256(sent)
    return "%.0f MB/s" % (took / 1e6)


def tls_that_passes_through(world: World) -> str:
    """The visitors see the certificate of the service, not of the server; HAProxy takes
    it off before sshd, and ssh comes by openssl."""
    ours, theirs = Pair("ours", "localhost"), Pair("theirs", "web.tim.localhost")
    web = start_telling("ssl", "behind its own TLS", theirs)
    sshd, ssh_options = start_sshd()
    (sealed,) = free_ports(1)
    text = "listen ssh\n  mode tcp\n  bind 127.0.0.1:%d ssl crt %s\n"
    text += "  timeout client 60s\n  timeout server 60s\n  server ssh 127.0.0.1:%d\n"
    start_haproxy("haproxy-ssh", text % (sealed, theirs.pem, sshd), sealed)
    (port,) = free_ports(1)
    files = "--tls-cert", str(ours.cert), "--tls-key", str(ours.key)
    server = Server(*files, "--tls-port", str(port))
    listed = {
        "web": {"target": web, "tls": "passthrough"},
        "ssh": {"target": sealed, "tls": "passthrough"},
        "plain": world.web,
    }
    client = publish(server, listed, "--tls", "--tls-ca", str(ours.cert))
    url = "https://web.tim.localhost:%d/" % port
    seen = ["--cacert", str(theirs.cert), url]
    wait_for("web", lambda: answers("curl", "-sf", *seen))
    assert curl(*seen) == "behind its own TLS"
    assert answers("curl", "-sf", "--tls-max", "1.2", *seen)
    assert not answers("curl", "-sf", "--cacert", str(ours.cert), url)
    said = run("openssl", "s_client", "-connect", "127.0.0.1:%d" % port, "-servername",
               "web.tim.localhost", "-CAfile", str(theirs.cert), "-verify_return_error",
               "-verify_hostname", "web.tim.localhost")  # fmt: skip
    assert "Verify return code: 0 (ok)" in said, said
    plain = "https://plain.tim.localhost:%d/" % port
    assert "this is web" in curl("-k", plain)
    proxy = "ProxyCommand=openssl s_client -quiet -verify_return_error -CAfile %s"
    proxy += " -servername %%h -connect 127.0.0.1:%d 2>%s"
    words = [*ssh_options, "-o", proxy % (theirs.cert, port, TMP / "s_client")]
    assert run("ssh", *words, "ssh.tim.localhost", "echo $((6 * 7))") == "42\n"
    took = copy(words, "ssh.tim.localhost", world)
    stop(client, server)
    return took


# -----------------------------------------------------------------------------------
# Certificates and domains
# -----------------------------------------------------------------------------------
def certificates_and_domains(world: World) -> str:
    """curl checks the certificate of each name, also after it was renewed."""
    ours, www = Pair("localhost", "localhost"), Pair(*2 * ("www.example.org",))
    folder = TMP / "certificates"
    folder.mkdir()
    for pair in (ours, www):
        for path in (pair.cert, pair.key):
            (folder / path.name).write_bytes(path.read_bytes())
    grants = {"tim": {"token": "secret", "domains": ["www.example.org"]}}
    (TMP / "grants.json").write_text(json.dumps(grants))
    (TMP / "grants.json").chmod(0o600)
    (port,) = free_ports(1)
    words = "--tls-dir", str(folder), "--tokens", str(TMP / "grants.json")
    server = Server(*words, "--tls-port", str(port))
    token = TMP / "by-name-token"
    token.write_text("secret")
    token.chmod(0o600)
    listed = {"www": {"target": world.web, "domains": ["www.example.org"]}}
    options = "--token-file", str(token), "--tls", "--tls-ca", str(ours.cert)
    client = publish(server, listed, *options)
    there = "--connect-to", "www.example.org:443:127.0.0.1:%d" % port
    seen = [*there, "https://www.example.org/", "--cacert"]
    wait_for("www", lambda: answers("curl", "-sf", *seen, str(www.cert)))
    assert "this is web" in curl(*seen, str(www.cert))
    assert not answers("curl", "-sf", *seen, str(ours.cert))
    new = Pair("new", "www.example.org")
    (folder / www.key.name).write_bytes(new.key.read_bytes())
    (folder / www.cert.name).write_bytes(new.cert.read_bytes())
    wait_for("new", lambda: answers("curl", "-sf", *seen, str(new.cert)), seconds=5)
    stop(client, server)
    return ""


# -----------------------------------------------------------------------------------
# Who comes
# -----------------------------------------------------------------------------------
def nginx_reads_our_proxy_headers(world: World) -> str:
    """Of both versions, with TLS to the target behind it and without."""
    pair = Pair("nginx", "localhost")
    text = "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_port"
    plain = start_telling("proxy_protocol", text, pair)
    by_tls = "https://127.0.0.1:%d" % start_telling("ssl proxy_protocol", text, pair)
    server = Server()
    listed = {
        "%s%d" % (name, n): {"target": target, "proxy_protocol": n}
        for name, target in (("plain", plain), ("tls", by_tls))
        for n in (1, 2)
    }
    client = publish(server, listed)
    for name in sorted(listed):
        url = "http://%s.tim.localhost:%d/" % (name, server.port)
        words = "--interface", VISITOR, url, "-w", " %{local_port}"
        wait_for(name, functools.partial(answers, "curl", "-sf", *words))
        address, port, ours, mine = curl(*words).split()
        found = address, int(port), int(ours)
        assert found == (VISITOR, int(mine), server.port), (name, found, mine)
    stop(client, server)
    return ""


FRONT = """
listen front%(port)d
  mode tcp
  timeout client 60s
  timeout server 60s
  bind 127.0.0.1:%(port)d
  server tunnel 127.0.0.1:%(to)d %(how)s
"""


def haproxy_says_who_comes(world: World) -> str:
    """In TCP mode by both versions of the PROXY protocol, to a server whose every
    connection has a header: those of visitors and of the client."""
    server = Server("--proxy-protocol", "--trust-proxy", "127.0.0.1")
    ports = free_ports(3)
    ways = [(server.port, "send-proxy"), (server.port, "send-proxy-v2")]
    ways.append((server.client_port, "send-proxy-v2"))
    text = ""
    for port, (to, how) in zip(ports, ways):
        text += FRONT % {"port": port, "to": to, "how": how}
    start_haproxy("haproxy-tcp", text, *ports)
    script = str(Path(__file__).parent.parent / "mdm_tunnel_client.py")
    words = ["-h", "localhost:%d" % ports[2], "-i", "tim", "flask=%d" % world.flask]
    client = Process("client", sys.executable, script, *words)
    for port in ports[:2]:
        url = "http://flask.tim.localhost:%d/headers" % port
        told = "--interface", VISITOR, url
        wait_for("flask", functools.partial(answers, "curl", "-sf", *told))
        fields = json.loads(curl(*told))
        assert fields["X-Forwarded-For"] == VISITOR, fields
    direct = "http://flask.tim.localhost:%d/" % server.port
    assert not answers("curl", "-sf", direct)
    stop(client, server)
    return ""


NGINX_SAYS = """
  server {
    listen 127.0.0.1:%d;
    location / {
      proxy_pass http://127.0.0.1:%d;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto https;
      proxy_set_header X-Forwarded-Host $http_host;
    }
  }
"""


def nginx_says_who_comes(world: World) -> str:
    """In X-Forwarded-*, which are believed of it and of nobody else."""
    server = Server("--trust-proxy", "127.0.0.1")
    client = Client(server, "tim", {"flask": world.flask})
    (port,) = free_ports(1)
    start_nginx("nginx-says", NGINX_SAYS % (port, server.port), port)
    forged = "-H", "X-Forwarded-For: 6.6.6.6", "-H", "X-Forwarded-Proto: gopher"
    words = "--interface", VISITOR, *forged
    host = "flask.tim.localhost:%d"
    fields = json.loads(curl(*words, "http://%s/headers" % (host % port)))
    assert fields["X-Forwarded-For"] == VISITOR, fields
    assert fields["X-Forwarded-Proto"] == "https", fields
    assert fields["X-Forwarded-Host"] == fields["Host"] == host % port, fields
    fields = json.loads(curl(*words, "http://%s/headers" % (host % server.port)))
    assert fields["X-Forwarded-For"] == VISITOR, fields
    assert fields["X-Forwarded-Proto"] == "http", fields
    stop(client, server)
    return ""


CHECKS: List[Callable[[World], str]] = [
    ssh_by_connect,
    tls_that_passes_through,
    certificates_and_domains,
    nginx_reads_our_proxy_headers,
    haproxy_says_who_comes,
    nginx_says_who_comes,
]
