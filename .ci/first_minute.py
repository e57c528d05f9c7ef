"""The first minute of a newcomer, who has curl, python3 and an empty folder. The line
of the landing page is pasted into a shell as it is, but for the name and the port."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, List

from browser import Browser
from by_name import Pair, answers, stop
from parts import REPOSITORY, TMP, Process, Server, World, curl, free_ports, own_address
from parts import run, sha256, wait_for

CLIENT = REPOSITORY / "mdm_tunnel_client.py"
TOKEN = "a-token-of-the-newcomer"


class OnePort(Server):
    """Visitors and clients come to the same port."""

    def start(self) -> None:
        self.client_port = self.port
        super().start()


def page_of(url: str, *words: str) -> List[str]:
    """The lines of a landing page, as text."""
    return curl(*words, url).splitlines()


def line_of(page: List[str]) -> str:
    return next(line.strip() for line in page if line.startswith("  "))


def paste(line: str, port: int, **environment: str) -> Process:
    """Run the line as tim in an empty folder, with the Python that runs this."""
    line = line.replace("NAME", "tim").replace("web=9000", "web=%d" % port)
    folder = tempfile.mkdtemp(dir=TMP)
    path = "%s:%s" % (Path(sys.executable).parent, os.environ["PATH"])
    command = "cd %s && %s" % (folder, line)
    return Process("newcomer", "sh", "-c", command, PATH=path, **environment)


def until_answered(url: str, *words: str) -> None:
    ask = functools.partial(answers, "curl", "-sf", *words, url)
    wait_for(url, ask, seconds=20)
    assert "this is web" in curl(*words, url)


def wait_until_told(client: Process, url: str) -> None:
    """The client has printed this URL."""
    wait_for("%s told" % url, lambda: url in client.output())


# -----------------------------------------------------------------------------------
# Checks
# -----------------------------------------------------------------------------------
def pasted_line_works_from_an_empty_folder(world: World) -> str:
    """On two ports, and on one."""
    for server in (Server(), OnePort()):
        page = page_of("http://localhost:%d/" % server.port)
        assert any(sha256(CLIENT) in line for line in page), page
        client = paste(line_of(page), world.web)
        url = "http://web.tim.localhost:%d/" % server.port
        until_answered(url)
        wait_until_told(client, url)
        stop(client, server)
    return ""


def client_from_the_server_is_the_file(world: World) -> str:
    server = Server()
    url = "http://localhost:%d/mdm_tunnel_client.py" % server.port
    data = subprocess.run(["curl", "-fsS", url], stdout=subprocess.PIPE, check=True)
    assert hashlib.sha256(data.stdout).hexdigest() == sha256(CLIENT)
    slow = run("curl", "-fsS", "--limit-rate", "60k", url)
    assert slow.encode() == CLIENT.read_bytes()
    assert run("curl", "-fsSI", url).startswith("HTTP/1.1 200")
    stop(server)
    return "%d KiB" % (len(data.stdout) >> 10)


def start_with_tls() -> Any:
    """A server with a certificate that nobody vouches for, and with tokens; the port of
    its visitors by TLS, and its certificate."""
    pair = Pair("minute", "localhost", "*.tim.localhost")
    tokens = TMP / "minute-tokens.json"
    tokens.write_text(json.dumps({"tim": TOKEN}))
    tokens.chmod(0o600)
    (port,) = free_ports(1)
    words = "--tls-cert", str(pair.cert), "--tls-key", str(pair.key)
    server = Server(*words, "--tls-port", str(port), "--tokens", str(tokens))
    return server, port, pair


def pasted_line_works_by_tls_with_a_token(world: World) -> str:
    """sha256sum checks what curl, which does not know the certificate, has got."""
    server, port, pair = start_with_tls()
    trusted = "--cacert", str(pair.cert)
    page = page_of("https://localhost:%d/" % port, *trusted)
    line = line_of(page)
    assert "sha256sum -c" in line and "--fingerprint" in line, line
    client = paste(line, world.web, MDM_TUNNEL_TOKEN=TOKEN)
    url = "https://web.tim.localhost:%d/" % port
    until_answered(url, *trusted)
    wait_until_told(client, url)
    assert TOKEN not in client.output(), client.output()
    stop(client)
    forged = line.replace(sha256(CLIENT), "0" * 64)
    client = paste(forged, world.web, MDM_TUNNEL_TOKEN=TOKEN)
    assert client.popen.wait(20) != 0 and url not in client.output(), client.output()
    plain = line_of(page_of("http://localhost:%d/" % server.port))
    assert "| python3 -" in plain, plain
    client = paste(plain, world.web)
    assert client.popen.wait(20) == 3, client.output()
    assert "this server wants a token" in client.output(), client.output()
    stop(server)
    return ""


PASTE = "\ue009v"  # Ctrl-V, as WebDriver has it
AREA = """
const area = document.createElement("textarea");
document.body.replaceChildren(area);
return area;
"""


def pasted(browser: Browser) -> str:
    """What the clipboard holds, by the keyboard of whoever sits there."""
    (element,) = browser.run(AREA).values()
    browser.call("POST", "/element/%s/value" % element, {"text": PASTE})
    return str(browser.run("return document.querySelector('textarea').value"))


def copy_button_has_the_line(world: World) -> str:
    """Also by plain http at an address, where there is no navigator.clipboard."""
    server, found = Server(), []
    with Browser() as browser:
        for host in filter(None, ("localhost", own_address())):
            url = "http://%s:%d/" % (host, server.port)
            line = line_of(page_of(url))
            browser.open(url)
            assert browser.text("pre code") == line
            assert browser.text("button") == "Copy"
            browser.click("button")
            wait_for("copied", lambda: browser.text("button") == "Copied")
            found.append(browser.run("return window.isSecureContext"))
            wait_for("clipboard", functools.partial(holds, browser, line))
    stop(server)
    return "secure contexts: %s" % found


def holds(browser: Browser, line: str) -> bool:
    return pasted(browser) == line


def pages_suit_day_and_night(world: World) -> str:
    """The landing page, an index, an error, a visitor's and the service's fault."""
    server, seen = Server(), 0
    words = "-v -h 127.0.0.1 -i tim web=9 -p %d" % server.client_port
    client = Process("pages", sys.executable, str(CLIENT), *words.split())
    wait_until_told(client, "http://web.tim.localhost:%d/" % server.port)
    with Browser() as browser:
        for name in ("localhost", "tim.localhost", "web.tim.localhost", "no.localhost"):
            for scheme in ("light", "dark"):
                for width in (400, 1400):
                    browser.look(scheme, width)
                    browser.go("http://%s:%d/" % (name, server.port))
                    browser.check_look()
                    seen += 1
    stop(client, server)
    return "%d looks" % seen


CHECKS: List[Callable[[World], str]] = [
    pasted_line_works_from_an_empty_folder,
    client_from_the_server_is_the_file,
    pasted_line_works_by_tls_with_a_token,
    copy_button_has_the_line,
    pages_suit_day_and_night,
]
