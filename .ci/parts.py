"""What the checks of .ci/interop are made of: processes, ports, waiting, the tunnel,
the real programs at its two ends, and the World that all checks share."""

import atexit
import contextlib
import functools
import getpass
import hashlib
import http.client
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Set, Tuple, TypeVar

REPOSITORY = Path(__file__).resolve().parent.parent
TMP = Path(tempfile.mkdtemp(prefix="mdm-tunnel-"))
BIG = 2 << 30  # bytes of the file that goes down and up: past every 31-bit counter
BLOCK = 1 << 20
Found = TypeVar("Found")


# -----------------------------------------------------------------------------------
# Waiting, ports, curl
# -----------------------------------------------------------------------------------
def wait_for(what: str, probe: Callable[[], Found], seconds: float = 10) -> Found:
    """Ask `probe` until it says something true. Raises AssertionError when it does not
    within `seconds`, with what it said last."""
    until = time.monotonic() + seconds
    while True:
        try:
            said = probe()
            last: object = said
            if said:
                return said
        except OSError as error:
            last = error
        if time.monotonic() > until:
            raise AssertionError("%s: not in %g s: %r" % (what, seconds, last))
        time.sleep(0.01)


handed_out: Set[int] = set()


def free_ports(count: int) -> List[int]:
    """Ports that nobody listens on, below those that the kernel gives to whoever dials:
    so they are still free when a process that was killed wants them again."""
    ports: List[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 32000)
        with socket.socket(socket.AF_INET) as sock:
            try:
                sock.bind(("", port))
            except OSError:
                continue
        if port not in handed_out:
            handed_out.add(port)
            ports.append(port)
    return ports


def listening(port: int, address: str = "127.0.0.1") -> bool:
    """Somebody accepts connections there; raises OSError when nobody does."""
    socket.create_connection((address, port), 5).close()
    return True


def own_address() -> str:
    """One of this machine's that is not loopback, or ""; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def run(*command: str, seconds: float = 60, cwd: Optional[Path] = None) -> str:
    """The standard output of a program that must end well."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds
    )
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, "%s: status %d: %s" % (command, done.returncode, said)
    return done.stdout.decode()


def curl(*arguments: str, seconds: float = 60) -> str:
    """What curl prints; an answer of 400 or more is a failure."""
    return run("curl", "-sS", "--fail", *arguments, seconds=seconds)


# -----------------------------------------------------------------------------------
# Processes
# -----------------------------------------------------------------------------------
class Process:
    """A program that runs beside us; all that it prints goes to one file."""

    all: List["Process"] = []
    numbers = itertools.count()  # several threads may start some at once

    def __init__(self, name: str, *command: str, **environment: str) -> None:
        self.name = name
        self.log = TMP / ("%d-%s.log" % (next(Process.numbers), name))
        with open(self.log, "wb") as log:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=TMP,
                env=dict(os.environ, **environment),
                start_new_session=True,  # its children go when it goes
            )
        Process.all.append(self)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until_listening(self, *ports: int) -> None:
        for port in ports:
            what = "%s on port %d" % (self.name, port)
            wait_for(what, functools.partial(self.serves, port))

    def serves(self, port: int) -> bool:
        status = self.popen.poll()
        if status is not None:
            raise AssertionError("%s ended with %d" % (self.name, status))
        return listening(port)

    def kill(self) -> None:
        """As kill -9 does."""
        self.popen.kill()
        self.popen.wait(10)

    def stop(self) -> None:
        """Politely, then not; whatever it started goes too."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(5)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.popen.wait(10)

    def descriptors(self) -> int:
        return len(os.listdir("/proc/%d/fd" % self.popen.pid))

    def descriptors_at_rest(self) -> int:
        """The fewest in a moment: what was there for the last request has gone."""
        return min(self.descriptors() for _ in range(20000))

    def memory(self) -> int:
        """Resident, in KiB."""
        for line in Path("/proc/%d/status" % self.popen.pid).read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("no VmRSS of %s" % self.name)


@atexit.register
def clean_up() -> None:
    for process in reversed(Process.all):
        process.stop()
    shutil.rmtree(TMP, ignore_errors=True)


# -----------------------------------------------------------------------------------
# The tunnel: both scripts as a user runs them, without -v, so they must print nothing.
# -----------------------------------------------------------------------------------
class Server:
    """mdm_tunnel_server.py of `scripts`, on two ports. It keeps them when it is started
    again."""

    def __init__(self, *options: str, scripts: Path = REPOSITORY) -> None:
        self.port, self.client_port = free_ports(2)
        self.options, self.scripts = options, scripts
        self.start()

    def start(self) -> None:
        script = str(self.scripts / "mdm_tunnel_server.py")
        ports = ("-p", str(self.port), "-c", str(self.client_port))
        self.process = Process("server", sys.executable, script, *ports, *self.options)
        self.process.wait_until_listening(self.port, self.client_port)


class Client:
    """mdm_tunnel_client.py, which publishes `services` of 127.0.0.1 as `id`. It dials
    `through`, the port of a proxy, or the server itself. `token` is in its environment
    and `options` before its other words; `prefix` is what starts it."""

    def __init__(
        self,
        server: Server,
        id: str,
        services: Dict[str, int],
        through: Optional[int] = None,
        options: Tuple[str, ...] = (),
        token: str = "",
        scripts: Path = REPOSITORY,
        prefix: Tuple[str, ...] = (),
    ) -> None:
        self.server, self.id = server, id
        self.dials = through or server.client_port
        self.services = ["%s=%d" % pair for pair in services.items()]
        self.options, self.scripts, self.prefix = options, scripts, prefix
        self.environment = {"MDM_TUNNEL_TOKEN": token} if token else {}
        self.start()

    def start(self) -> None:
        self.process = Process("client", *self.command(), **self.environment)
        wait_for("login of %s" % self.id, self.is_in)

    def command(self) -> List[str]:
        script = str(self.scripts / "mdm_tunnel_client.py")
        options = (*self.options, "-h", "localhost:%d" % self.dials, "-i", self.id)
        return [*self.prefix, sys.executable, script, *options, *self.services]

    def is_in(self) -> bool:
        """The server has its index page."""
        host = "%s.localhost" % self.id
        status, body = get(self.server.port, host, "/")
        return status == 200 and len(self.services) == body.count(b"\nhttp://")

    def host(self, service: str) -> str:
        return "%s.%s.localhost" % (service, self.id)

    def url(self, service: str, path: str = "") -> str:
        return "http://%s:%d/%s" % (self.host(service), self.server.port, path)


def get(port: int, host: str, path: str) -> Tuple[int, bytes]:
    """Status and body of the answer to one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={"Host": host, "Connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(repr(error)) from None
    finally:
        connection.close()


# -----------------------------------------------------------------------------------
# nginx, HAProxy
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
  default_type text/html;
  keepalive_requests 1000000;
  client_max_body_size 0;
  client_body_temp_path %(dir)s/body;
  proxy_temp_path %(dir)s/proxy;
  fastcgi_temp_path %(dir)s/fastcgi;
  uwsgi_temp_path %(dir)s/uwsgi;
  scgi_temp_path %(dir)s/scgi;
  %(servers)s
}
"""
NGINX_SERVICES = """
  server {
    listen 127.0.0.1:%(web)d backlog=4096;
    root %(dir)s/web;
    location /upload/ { dav_methods PUT; create_full_put_path on; }
    location ~ ^/git(/.*)$ {
      include /etc/nginx/fastcgi_params;
      fastcgi_param SCRIPT_FILENAME %(git)s/git-http-backend;
      fastcgi_param GIT_PROJECT_ROOT %(dir)s/git;
      fastcgi_param GIT_HTTP_EXPORT_ALL "";
      fastcgi_param PATH_INFO $1;
      fastcgi_pass unix:%(dir)s/fcgi;
    }
  }
  server {
    listen 127.0.0.1:%(other)d;
    root %(dir)s/other;
  }
"""
NGINX_FRONT = """
  server {
    listen 127.0.0.1:%d;
    location / {
      proxy_pass http://127.0.0.1:%d;
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection "upgrade";
    }
  }
"""
HAPROXY = """
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
"""
HAPROXY_FRONT = """
listen port%d
  bind 127.0.0.1:%d
  server tunnel 127.0.0.1:%d
"""


def start_nginx(name: str, servers: str, *ports: int) -> None:
    config = TMP / (name + ".conf")
    values = {"user": getpass.getuser(), "dir": TMP, "servers": servers}
    config.write_text(NGINX % values)
    nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or "nginx"
    process = Process(name, nginx, "-p", str(TMP), "-e", "stderr", "-c", str(config))
    process.wait_until_listening(*ports)


def start_haproxy(name: str, fronts: str, *ports: int, whole: bool = False) -> None:
    config = TMP / (name + ".cfg")
    config.write_text(fronts if whole else HAPROXY + fronts)
    haproxy = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin")
    process = Process(name, haproxy or "haproxy", "-db", "-f", str(config))
    process.wait_until_listening(*ports)


def start_services() -> Tuple[int, int]:
    """nginx with files, uploads and git on one port, and with a page on another."""
    for name in ("web", "other"):
        (TMP / name).mkdir()
        page = "<title>%s</title>this is %s\n" % (name, name)
        (TMP / name / "index.html").write_text(page)
    fcgi = TMP / "fcgi"
    Process("fcgiwrap", "fcgiwrap", "-s", "unix:%s" % fcgi)
    wait_for("fcgiwrap", fcgi.exists)
    web, other = free_ports(2)
    git = run("git", "--exec-path").strip()
    values = {"web": web, "other": other, "dir": TMP, "git": git}
    start_nginx("nginx", NGINX_SERVICES % values, web, other)
    return web, other


def start_nginx_front(server: Server) -> Tuple[int, int]:
    """nginx before the visitors' port and the clients', as the README has it."""
    visitors, clients = free_ports(2)
    servers = NGINX_FRONT % (visitors, server.port)
    servers += NGINX_FRONT % (clients, server.client_port)
    start_nginx("nginx-front", servers, visitors, clients)
    return visitors, clients


def start_haproxy_front(server: Server) -> Tuple[int, int]:
    """HAProxy before both ports, with not a word about upgrades."""
    visitors, clients = free_ports(2)
    text = HAPROXY_FRONT % (visitors, visitors, server.port)
    text += HAPROXY_FRONT % (clients, clients, server.client_port)
    start_haproxy("haproxy", text, visitors, clients)
    return visitors, clients


# -----------------------------------------------------------------------------------
# sshd
# -----------------------------------------------------------------------------------
SSHD = """
ListenAddress 127.0.0.1
HostKey %(folder)s/host
AuthorizedKeysFile %(folder)s/key.pub
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""


@functools.lru_cache(maxsize=None)
def start_sshd() -> Tuple[int, List[str]]:
    """Its port, and the options of ssh and scp with which it lets us in."""
    folder, (port,) = TMP / "ssh", free_ports(1)
    folder.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "conf").write_text(SSHD % {"folder": folder})
    words = ["-D", "-e", "-f", str(folder / "conf"), "-p", str(port)]
    Process("sshd", "/usr/sbin/sshd", *words).wait_until_listening(port)
    options = ["BatchMode=yes", "StrictHostKeyChecking=no", "LogLevel=ERROR"]
    options += ["UserKnownHostsFile=" + os.devnull, "IdentityFile=%s/key" % folder]
    return port, ["-o" + option for option in options]


# -----------------------------------------------------------------------------------
# Network namespaces
# -----------------------------------------------------------------------------------
@contextlib.contextmanager
def namespace(net: int) -> Iterator[List[str]]:
    """A network namespace with one cable, to this machine, which is 10.213.NET.1: the
    words that run a command in it; no words where there are no namespaces."""
    name = "mdm-%d-%d" % (net, os.getpid())
    inside = ["ip", "netns", "exec", name]
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        yield []
        return
    try:
        pair = ("type", "veth", "peer", "name", "cable", "netns", name)
        run("ip", "link", "add", name, *pair)
        run("ip", "addr", "add", "10.213.%d.1/30" % net, "dev", name)
        run("ip", "link", "set", name, "up")
        run(*inside, "ip", "addr", "add", "10.213.%d.2/30" % net, "dev", "cable")
        for device in ("cable", "lo"):
            run(*inside, "ip", "link", "set", device, "up")
        yield inside
    finally:  # sockets that still wait would keep the namespace, and so the cable
        subprocess.run(["ip", "link", "del", name])
        subprocess.run(["ip", "netns", "del", name])


# -----------------------------------------------------------------------------------
# Big files
# -----------------------------------------------------------------------------------
def make_big(path: Path) -> str:
    """Write BIG bytes of which no two blocks are alike; their SHA-256."""
    free = shutil.disk_usage(path.parent).free
    assert free > 3 * BIG, "%d MiB free in %s are too few" % (free >> 20, path.parent)
    noise = random.Random(1).getrandbits(16 * BLOCK).to_bytes(2 * BLOCK, "big")
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for number in range(BIG // BLOCK):
            start = number * 509 % BLOCK
            block = b"%016d" % number + noise[start : start + BLOCK - 16]
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            if not block:
                return digest.hexdigest()
            digest.update(block)


# -----------------------------------------------------------------------------------
# What the checks share
# -----------------------------------------------------------------------------------
class World:
    """One server, one client `tim`, and its services."""

    def __init__(self) -> None:
        self.web, self.other = start_services()
        self.flask, self.sockets, self.crowd = free_ports(3)
        service = str(REPOSITORY / ".ci" / "flask_service.py")
        flask = Process("flask", sys.executable, service, str(self.flask))
        flask.wait_until_listening(self.flask)
        services = {
            "web": self.web,
            "other": self.other,
            "flask": self.flask,
            "sockets": self.sockets,
            "crowd": self.crowd,
        }
        self.server = Server()
        self.tim = Client(self.server, "tim", services)
        parts = (self.server.process, self.tim.process)
        self.idle = {part: part.descriptors_at_rest() for part in parts}
        self.big_sum = ""

    def big(self) -> str:
        """The SHA-256 of the big file, which nginx has at /big."""
        self.big_sum = self.big_sum or make_big(TMP / "web" / "big")
        return self.big_sum
