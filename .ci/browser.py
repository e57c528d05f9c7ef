"""A headless Chromium, driven by chromedriver in plain HTTP (W3C WebDriver)."""

import json
import shutil
import tempfile
import urllib.request
from typing import Any, List, Optional

from parts import TMP, Process, free_ports, wait_for

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage "
    "--no-first-run --no-proxy-server --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
LOADED = """
const [page] = performance.getEntriesByType("navigation");
return document.readyState === "complete" && page.responseStatus === 200
    && location.href === arguments[0];
"""


# Seconds for a browser to start, the first and the second time: on a busy machine that
# has just installed it the first start takes most of a minute.
STARTS = 50, 60


class Browser:
    """One session with one window, and a profile of its own: one that was left behind
    by a browser that did not start would be locked."""

    def __init__(self, *flags: str) -> None:
        self.flags = [*FLAGS, *flags]
        for number, seconds in enumerate(STARTS, 1):
            try:
                self.start(seconds)
                return
            except OSError:
                self.stop()
                if number == len(STARTS):
                    raise

    def start(self, seconds: float) -> None:
        (port,) = free_ports(1)
        self.profile = tempfile.mkdtemp(prefix="chromium-", dir=TMP)
        self.driver = Process("chromedriver", "chromedriver", "--port=%d" % port)
        self.driver.wait_until_listening(port)
        self.base = "http://127.0.0.1:%d/session" % port
        options = {"args": [*self.flags, "--user-data-dir=%s" % self.profile]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        asked = {"capabilities": {"alwaysMatch": wanted}}
        self.base += "/" + self.call("POST", "", asked, seconds)["sessionId"]

    def stop(self) -> None:
        self.driver.stop()
        shutil.rmtree(self.profile, ignore_errors=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.call("DELETE", "")
        finally:
            self.stop()

    def call(
        self, method: str, path: str, body: Optional[Any] = None, seconds: float = 30
    ) -> Any:
        """A WebDriver command; its value. Raises OSError."""
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.base + path, data, method=method)
        with urllib.request.urlopen(asked, timeout=seconds) as answer:
            return json.load(answer)["value"]

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns, run in the page."""
        asked = {"script": script, "args": arguments}
        return self.call("POST", "/execute/sync", asked)

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})
        self.wait_until_at(url)

    def click(self, selector: str) -> None:
        asked = {"using": "css selector", "value": selector}
        (name,) = self.call("POST", "/element", asked).values()
        self.call("POST", "/element/%s/click" % name, {})

    def wait_until_at(self, url: str) -> None:
        """The page is there, whole, with status 200."""
        wait_for(url, lambda: self.run(LOADED, url), 20)

    def links(self) -> List[str]:
        found: List[str] = self.run("return [...document.links].map(a => a.href)")
        return found

    def text(self, selector: str) -> str:
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return str(self.run(script, selector))
