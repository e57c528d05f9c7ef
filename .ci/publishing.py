"""Ways to publish, with the programs that people use: a database by a port of its own,
squid as the only way out, and a dev server that checks Host."""

import base64
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List, Tuple

from browser import Browser
from parts import REPOSITORY, TMP, Process, Server, World, free_ports, get, listening
from parts import own_address, run, sha256, wait_for
from skew import Secrets, end

SCRIPT = str(REPOSITORY / "mdm_tunnel_client.py")
NOBODY = "nobody"  # who runs what refuses to run as root


def talking(*words: str, **environment: str) -> Process:
    """A client that may print, so it is not named as those that may not."""
    return Process("talking", sys.executable, SCRIPT, *words, **environment)


def says(process: Process, text: str) -> bool:
    return text in process.output()


def make_certificate(folder: Path, *names: str) -> Tuple[str, str]:
    """The files of a certificate for these names, and of its key."""
    folder.mkdir()
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    words += " -keyout key.pem -out cert.pem -addext subjectAltName="
    words += ",".join("DNS:" + name for name in names)
    run(*words.split(), cwd=folder)
    return str(folder / "cert.pem"), str(folder / "key.pem")


def as_nobody() -> List[str]:
    """The words that run a command with no rights; none where we have none anyway."""
    if os.getuid():
        return []
    TMP.chmod(0o711)  # it may enter, not look
    group = run("id", "-g", NOBODY).strip()
    return ["setpriv", "--reuid", NOBODY, "--regid", group, "--clear-groups"]


def give_away(path: Path) -> Path:
    """So that nobody owns a folder and what is in it."""
    if not os.getuid():
        for one in (path, *path.iterdir()):
            shutil.chown(one, NOBODY)
    return path


# -----------------------------------------------------------------------------------
# A database
# -----------------------------------------------------------------------------------
ROWS = 100000  # of 100 bytes
POSTGRES = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
ssl = on
ssl_cert_file = '%s'
ssl_key_file = '%s'
"""
MODES = {"disable": "false", "verify-full": "true"}  # and what the database sees then
SEEN = "select ssl::text from pg_stat_ssl where pid = pg_backend_pid()"


def start_postgres() -> Tuple[int, str]:
    """Its port, and its certificate."""
    (port,) = free_ports(1)
    before, secrets, data = as_nobody(), TMP / "postgres-tls", TMP / "postgres"
    certificate, key = make_certificate(secrets, "localhost")
    data.mkdir()
    for folder in (secrets, data):
        give_away(folder)
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"))
    words = ["-D", str(data), "-N", "--locale", "C.UTF-8", "-U", "tim", "-A", "trust"]
    run(*before, str(programs / "initdb"), *words, cwd=Path("/"))
    with open(data / "postgresql.conf", "a") as conf:
        conf.write(POSTGRES % (certificate, key))
    words = ["-D", str(data), "-p", str(port)]
    postgres = Process("postgres", *before, str(programs / "postgres"), *words)
    postgres.wait_until_listening(port)
    return port, certificate


def copy_there_and_back(psql: List[str], rows: Path) -> None:
    back = rows.with_name("back.tsv")
    made = "create temp table copied (number int, line text)"
    there = r"\copy copied from '%s'" % rows
    again = r"\copy (select * from copied order by number) to '%s'" % back
    run(*psql, "-c", made, "-c", there, "-c", again)
    assert sha256(back) == sha256(rows), back.stat()


def postgres_by_a_port_of_its_own(_: World) -> str:
    """At the address that the client prints. TLS is between psql and PostgreSQL, and as
    psql checks the certificate, nobody between them has a part in it."""
    local, certificate = start_postgres()
    (port,) = free_ports(1)
    file, rows = TMP / "postgres.json", TMP / "rows.tsv"
    file.write_text(json.dumps({"db": {"target": local, "tcp": 0}}))
    server = Server("--tcp-ports", "%d-%d" % (port, port))
    where = "localhost:%d" % server.client_port
    client = talking("-v", "-h", where, "-i", "tim", "-c", str(file))
    address = "\ndb  tcp://localhost:%d -> " % port
    wait_for("address", functools.partial(says, client, address))
    lines = ["%d\t%s\n" % (one, os.urandom(46).hex()) for one in range(ROWS)]
    rows.write_text("".join(lines))
    for mode, expected in MODES.items():
        line = "host=localhost hostaddr=127.0.0.1 port=%d user=tim " % port
        line += "dbname=postgres sslmode=%s sslrootcert=%s" % (mode, certificate)
        psql = ["psql", "-XqAt", "-v", "ON_ERROR_STOP=1", line]
        found = run(*psql, "-c", SEEN).strip()
        assert found == expected, "sslmode=%s: ssl is %s" % (mode, found)
        copy_there_and_back(psql, rows)
    end(client)
    server.process.stop()
    return "%.0f MB each way, without and with TLS" % (rows.stat().st_size / 1e6)


# -----------------------------------------------------------------------------------
# squid: one door without a password, one with
# -----------------------------------------------------------------------------------
SQUID = """
http_port %(address)s:%(open)d
http_port %(address)s:%(closed)d
auth_param basic program /usr/lib/squid/basic_ncsa_auth %(folder)s/passwords
auth_param basic realm the way out
acl open localport %(open)d
acl known proxy_auth REQUIRED
http_access allow open
http_access allow known
http_access deny all
access_log stdio:%(folder)s/access.log
cache_log %(folder)s/cache.log
cache deny all
pid_filename none
netdb_filename none
pinger_enable off
max_filedescriptors 1024
shutdown_lifetime 0 seconds
"""
USER, PASSWORD = "somebody", "c@lm:secret/%"
QUOTED = "c%40lm%3Asecret%2F%25"
WRONG = "wr0ngsecret"


def start_squid(address: str, ports: Dict[str, int]) -> Path:
    """The folder with its files."""
    before, folder = as_nobody(), TMP / "squid"
    folder.mkdir()
    hashed = run("openssl", "passwd", "-apr1", PASSWORD).strip()
    (folder / "passwords").write_text("%s:%s\n" % (USER, hashed))
    values = dict(address=address, folder=folder, **ports)
    (folder / "conf").write_text(SQUID % values)
    give_away(folder)
    words = ["-N", "-n", "interop", "-f", str(folder / "conf")]
    Process("squid", *before, "/usr/sbin/squid", *words)
    for port in ports.values():
        wait_for("squid", functools.partial(listening, port, address))
    return folder


def both_went(log: Path, place: str) -> bool:
    """squid let two through to a place, at first one without a name."""
    lines = [line.split() for line in log.read_text().splitlines()]
    went = [line[7] for line in lines if line[3:7:3] == ["TCP_TUNNEL/200", place]]
    return went == ["-", USER]


def tells_nothing(output: str) -> None:
    """It holds no name and no password, in none of the ways to write them."""
    for password in (PASSWORD, WRONG):
        pair = ("%s:%s" % (USER, password)).encode()
        for text in (USER, password, QUOTED, base64.b64encode(pair).decode()):
            assert text not in output, output


def goes_out(server: Server, words: List[str], **environment: str) -> None:
    """A client reaches the server, and a visitor its service."""
    client = talking("-vv", *words, **environment)
    answer = functools.partial(get, server.port, "web.tim.x", "/")
    wait_for("login by squid", lambda: answer()[0] == 200)
    end(client)
    tells_nothing(client.output())


def is_kept_in(words: List[str], url: str, cause: bytes) -> None:
    """The client ends with 1 and says what is wrong."""
    command = [sys.executable, SCRIPT, "-vv", *words]
    environment = dict(os.environ, http_proxy=url)
    alone = subprocess.run(command, capture_output=True, env=environment, timeout=20)
    assert alone.returncode == 1 and cause in alone.stderr, alone
    tells_nothing((alone.stdout + alone.stderr).decode())


def out_by_squid(world: World) -> str:
    """For a server without TLS and for one with it. No password is in any log."""
    address = own_address()
    if not address:
        return "left out: there is no address but loopback"
    doors = dict(zip(("open", "closed"), free_ports(2)))
    folder = start_squid(address, doors)
    url = "http://%s" + "%s:" % address
    free = url % "" + "%d" % doors["open"]
    asks = url + "%d" % doors["closed"]
    paid = asks % ("%s:%s@" % (USER, QUOTED))
    secrets = Secrets(TMP / "secrets-squid")
    plain, by_tls = Server(), Server(*secrets.for_server)
    web = ["-i", "tim", "web=%d" % world.web]
    words = ["-h", "http://%s:%d" % (address, plain.client_port), *web]
    for proxy in (free, paid):
        goes_out(plain, words, http_proxy=proxy)
    far = "https://%s:%d" % (address, by_tls.client_port)
    token = {"MDM_TUNNEL_TOKEN": secrets.token}
    safe = ["-h", far, *secrets.for_client, *web]
    for proxy in (free, paid):
        goes_out(by_tls, safe, https_proxy=proxy, **token)
    is_kept_in(words, asks % "", b"wants a password")
    wrong = asks % ("%s:%s@" % (USER, WRONG))
    is_kept_in(words, wrong, b"does not accept this user and password")
    for server in (plain, by_tls):
        place = "%s:%d" % (address, server.client_port)
        log = folder / "access.log"
        wait_for("squid's log", functools.partial(both_went, log, place))
        server.process.stop()
    return ""


# -----------------------------------------------------------------------------------
# A dev server
# -----------------------------------------------------------------------------------
VITE = REPOSITORY / ".ci" / "node" / "node_modules" / "vite" / "bin" / "vite.js"
PAGE = {
    "index.html": """<!doctype html><title>dev</title><p id="said"></p>
<script type="module" src="/main.js"></script>
""",
    "main.js": """import { text } from "./text.js";
const say = (text) => { document.querySelector("#said").textContent = text; };
say(text);
import.meta.hot.accept("./text.js", (changed) => say(changed.text));
""",
    "vite.config.js": """export default {
  clearScreen: false,
  server: { host: "127.0.0.1", strictPort: true, watch: { usePolling: true } },
};
""",
}
TEXT = "export const text = '%s';\n"
# The page of Vite dials Vite itself where it does not come through to it.
RULES = "--host-resolver-rules=MAP *.example.com 127.0.0.1,MAP * ~NOTFOUND"


def start_vite() -> Tuple[int, Path]:
    """Its port, and the file with the text of its page."""
    folder, (port,) = TMP / "vite", free_ports(1)
    folder.mkdir()
    for name, text in PAGE.items():
        (folder / name).write_text(text)
    (folder / "text.js").write_text(TEXT % "before")
    words = [str(VITE), str(folder), "--port", str(port)]
    Process("vite", "node", *words).wait_until_listening(port)
    return port, folder / "text.js"


def vite_with_hot_reload(_: World) -> str:
    """Vite blocks a name that it does not know, and `"host": "rewrite"` helps; what is
    edited then is in the page at once, which stays the page that it was."""
    local, text = start_vite()
    target, file = {"target": local}, TMP / "vite.json"
    file.write_text(json.dumps({"web": {**target, "host": "rewrite"}, "raw": target}))
    server = Server("--domain", "example.com")
    where = "localhost:%d" % server.client_port
    client = talking("-h", where, "-i", "tim", "-c", str(file))
    answer = functools.partial(get, server.port, "raw.tim.example.com", "/")
    wait_for("Vite blocks", lambda: answer()[0] == 403)
    assert b"Blocked request. This host" in answer()[1], answer()
    with Browser(RULES) as browser:
        browser.open("http://web.tim.example.com:%d/" % server.port)
        said = functools.partial(browser.text, "#said")
        wait_for("the page", lambda: said() == "before", 20)
        browser.run("window.mark = 1")
        text.write_text(TEXT % "after")
        wait_for("the change", lambda: said() == "after", 20)
        assert browser.run("return window.mark") == 1, "it was loaded again"
    end(client)
    server.process.stop()
    return ""


CHECKS: List[Callable[[World], str]] = [
    postgres_by_a_port_of_its_own,
    out_by_squid,
    vite_with_hot_reload,
]
