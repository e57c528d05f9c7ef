"""Ways to publish, with the programs that people use: a database by a port of its
own."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Callable, List, Tuple

from parts import REPOSITORY, TMP, Process, Server, World, free_ports
from parts import run, sha256
from parts import wait_for
from skew import end

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
    address = "\ndb  tcp://localhost:%d\n" % port
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


CHECKS: List[Callable[[World], str]] = [
    postgres_by_a_port_of_its_own,
]
