"""The inspector's page in Chromium: what it shows, what a click sends, and what a page
of somebody else's reaches."""

import functools
import gzip
import http.server
import json
import re
import shlex
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from typing import Any, Callable, Dict, List, Tuple

from browser import Browser
from parts import REPOSITORY, Process, Server, World, free_ports, wait_for
from skew import end

HOST = "shop.tim.localhost"
Heard = List[Tuple[str, str, bytes]]


def picture() -> bytes:
    """A PNG of one pixel."""
    parts = [
        (b"IHDR", struct.pack("!IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\xff\0\0")),
        (b"IEND", b""),
    ]
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        made += struct.pack("!I", len(data)) + kind + data
        made += struct.pack("!I", zlib.crc32(kind + data))
    return made


class Shop(http.server.BaseHTTPRequestHandler):
    """Answers of every kind, and keeps what it is sent."""

    protocol_version = "HTTP/1.1"
    heard: Heard = []

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        self.heard.append((self.command, self.path, body))
        kind, said, coding = self.answer()
        self.send_response(500 if self.path == "/hook" else 200)
        self.send_header("Content-Type", kind)
        if coding:
            self.send_header("Content-Encoding", coding)
        if self.path == "/chunks":
            self.send_header("Transfer-Encoding", "chunked")
            pieces = [said[at : at + 5] for at in range(0, len(said), 5)] + [b""]
            said = b"".join(b"%x\r\n%s\r\n" % (len(x), x) for x in pieces)
        else:
            self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_POST = do_PUT = do_GET

    def answer(self) -> Tuple[str, bytes, str]:
        """Type, body, and how it is coded."""
        shown = json.dumps({"list": [1, {"a": "\u00fc"}]}).encode()
        bomb = gzip.compress(bytes(64 << 20))
        return {
            "/json": ("application/json", gzip.compress(shown), "gzip"),
            "/deflate": ("application/json", zlib.compress(shown), "deflate"),
            "/bomb": ("text/plain", bomb, "gzip"),
            "/image": ("image/png", picture(), ""),
            "/binary": ("application/octet-stream", bytes(range(256)), ""),
            "/chunks": ("text/plain", b"said in many chunks", ""),
        }.get(self.path, ("text/plain; charset=utf-8", "d\u00e4".encode(), ""))

    def log_message(self, *_: object) -> None:
        pass


class Inspected:
    """A shop behind a client with --inspect; its page's address."""

    def __init__(self) -> None:
        self.shop = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shop)
        threading.Thread(target=self.shop.serve_forever, daemon=True).start()
        Shop.heard.clear()
        self.server = Server()
        ports = self.server.client_port, self.shop.server_address[1]
        words = "-v -h 127.0.0.1 -i tim --inspect 0 -p %d shop=%d" % ports
        script = str(REPOSITORY / "mdm_tunnel_client.py")
        self.client = Process("inspected", sys.executable, script, *words.split())
        wait_for("its address", lambda: "inspect  http" in self.client.output())
        wait_for("its URL", lambda: "http://" + HOST in self.client.output())
        found = re.search(r"inspect  (\S+)", self.client.output())
        self.url = found.group(1) if found else ""

    def ask(self, path: str, data: Any = None, **fields: str) -> None:
        url = "http://127.0.0.1:%d%s" % (self.server.port, path)
        told = {"Host": HOST, "User-Agent": "check/1.0", **fields}
        request = urllib.request.Request(url, data, told)
        try:
            urllib.request.urlopen(request, timeout=20).read()
        except urllib.error.HTTPError:
            pass

    def __enter__(self) -> "Inspected":
        return self

    def __exit__(self, *_: Any) -> None:
        end(self.client)
        self.server.process.stop()
        self.shop.shutdown()


ROW = "[...document.querySelectorAll('#list li')].find(x => x.innerText.includes(%s))"
BUTTON = "[...document.querySelectorAll('button')].find(x => x.innerText === %s)"


def choose(browser: Browser, word: str) -> None:
    """Click on a row; until its request and answer are shown."""
    row = ROW % json.dumps(word)
    wait_for(word, lambda: browser.run("return !!" + row))
    browser.run(row + ".click()")
    wait_for("details", lambda: word in browser.text("#detail h2"))


def press(browser: Browser, name: str) -> None:
    browser.run((BUTTON % json.dumps(name)) + ".click()")


def shown(browser: Browser) -> str:
    return str(browser.run("return document.querySelector('#detail').innerText"))


def inspector_shows_what_passed(world: World) -> str:
    """Every kind of body, by day and by night, on a phone and on a desk."""
    expected = {
        "/json": '"a": "\u00fc"',
        "/deflate": '"a": "\u00fc"',
        "/chunks": "\nsaid in many chunks",
        "/binary": "000010  10 11 12",
        "/plain": "d\u00e4",
    }
    with Inspected() as inspected, Browser() as browser:
        for path in [*expected, "/image", "/bomb", "/<img/src=x/onerror=alert(1)>"]:
            inspected.ask(path)
        for scheme in ("light", "dark"):
            for width in (400, 1400):
                browser.look(scheme, width)
                browser.open(inspected.url)
                choose(browser, "/json")
                browser.check_look()
        for path, text in expected.items():
            choose(browser, path)
            assert text in shown(browser), shown(browser)
        choose(browser, "/image")
        loaded = "return document.querySelector('#detail img').naturalWidth"
        wait_for("the image", lambda: browser.run(loaded) == 1)
        choose(browser, "/bomb")
        assert len(shown(browser)) < 100000
        choose(browser, "/<img/src=x")
        assert browser.run("return document.querySelector('#detail img')") is None
        browser.run("const f = document.querySelector('#filter'); f.value = 'binary';"
                    "f.oninput()")  # fmt: skip
        left = "return document.querySelectorAll('#list li:not([hidden])').length"
        assert browser.run(left) == 1
    return ""


CHANGE = """
const area = document.querySelector('textarea');
area.value = area.value.replace('POST /hook', 'PUT /edited').replace('HOME', 'AWAY');
"""
CLIPBOARD = "navigator.clipboard.writeText = async text => { window.copied = text; };"


def inspector_sends_again(world: World) -> str:
    """By Replay, by Edit, and by the command that it copies, to the last byte."""
    body, binary = b'{"it\'s": "$HOME `x` \\\\ \xc3\xbc"}\n', bytes(range(256))
    with Inspected() as inspected, Browser() as browser:
        inspected.ask("/hook", body, **{"Content-Type": "application/json"})
        browser.look("light", 1400)
        browser.open(inspected.url)
        choose(browser, "/hook")
        press(browser, "Replay")
        wait_for("replayed", lambda: len(Shop.heard) == 2)
        assert Shop.heard[0] == Shop.heard[1] == ("POST", "/hook", body), Shop.heard
        wait_for("its entry", lambda: "replay of 1" in shown(browser))
        press(browser, "Edit")
        browser.run(CHANGE)
        press(browser, "Send")
        wait_for("edited", lambda: len(Shop.heard) == 3)
        wait_for("its entry", lambda: "/edited" in browser.text("#detail h2"))
        edited = body.replace(b"HOME", b"AWAY")
        assert Shop.heard[2] == ("PUT", "/edited", edited), Shop.heard[2]
        inspected.ask("/b?[x]={y}&z='", binary)
        for path, sent in (("/hook", body), ("/b?[x]={y}&z='", binary)):
            choose(browser, path)
            browser.run(CLIPBOARD)
            press(browser, "Copy as curl")
            wait_for("copied", lambda: browser.run("return !!window.copied"))
            command = str(browser.run("const x = copied; copied = ''; return x"))
            assert shlex.split(command), command
            before = len(Shop.heard)
            resolve = "--resolve %s:%d:127.0.0.1" % (HOST, inspected.server.port)
            command = command.replace("curl ", "curl -sS %s " % resolve, 1)
            subprocess.check_output(["sh", "-c", command], timeout=20)
            assert Shop.heard[before:] == [("POST", path, sent)], Shop.heard[before:]
    return ""


ATTACK = """<!doctype html><title>attack</title><script>
const url = %s, token = %s, done = [];
const seen = (name, promise) => promise.then(
  r => done.push([name, r.type, r.status]), e => done.push([name, "error", 0]));
const kind = { "Content-Type": "application/octet-stream" };
const options = { method: "POST", body: "GET / HTTP/1.1\\r\\n\\r\\n" };
Promise.all([
  seen("read", fetch(url + token + "/news/0")),
  seen("guess", fetch(url + "/news/0", { mode: "no-cors" })),
  seen("send", fetch(url + token + "/replay/1", { ...options, headers: kind })),
  seen("blind", fetch(url + token + "/replay/1", { ...options, mode: "no-cors" })),
]).then(() => document.title = "done");
</script><form method="post" enctype="text/plain" target="frame"
 action="%s/replay/1"><input name="GET / HTTP/1.1" value="x"></form>
<iframe name="frame" src="%s/"></iframe>"""


class Attack(http.server.BaseHTTPRequestHandler):
    """A page of another origin that even knows the token."""

    page = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, *_: object) -> None:
        pass


def other_pages_do_not_reach_the_inspector(world: World) -> str:
    with Inspected() as inspected, Browser() as browser:
        inspected.ask("/hook", b"once")
        base, _, token = inspected.url.rstrip("/").rpartition("/")
        whole = inspected.url.rstrip("/")
        values = json.dumps(base + "/"), json.dumps(token), whole, whole
        Attack.page = (ATTACK % values).encode()
        (port,) = free_ports(1)
        attacker = http.server.ThreadingHTTPServer(("127.0.0.1", port), Attack)
        threading.Thread(target=attacker.serve_forever, daemon=True).start()
        browser.open("http://127.0.0.1:%d/" % port)
        browser.run("document.forms[0].submit()")
        wait_for("the attack", lambda: browser.run("return document.title") == "done")
        found: Dict[str, Any] = {x[0]: x[1:] for x in browser.run("return done")}
        assert found["read"] == found["send"] == ["error", 0], found
        assert all(found[name][1] == 0 for name in ("guess", "blind")), found
        fields = {"Host": "evil.example"}
        rebound = urllib.request.Request(inspected.url, headers=fields)
        ask = functools.partial(urllib.request.urlopen, rebound, timeout=20)
        try:
            ask()
        except urllib.error.HTTPError as error:
            assert error.code == 403, error.code
        else:
            raise AssertionError("a name that was rebound reads the page")
        assert Shop.heard == [("POST", "/hook", b"once")], Shop.heard
        attacker.shutdown()
    return ""


CHECKS: List[Callable[[World], str]] = [
    inspector_shows_what_passed,
    inspector_sends_again,
    other_pages_do_not_reach_the_inspector,
]
