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

SIDEWAYS = "const x = document.documentElement; return x.scrollWidth - x.clientWidth;"
CONTRAST = """
function light(text) {
  const parts = text.match(/[\\d.]+/g).map(Number);
  const [r, g, b] = parts.map(x => x / 255).map(
    x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return { value: 0.2126 * r + 0.7152 * g + 0.0722 * b, shown: (parts[3] ?? 1) > 0.5 };
}
function ground(node) {
  for (let at = node; at; at = at.parentElement) {
    const found = light(getComputedStyle(at).backgroundColor);
    if (found.shown) return found.value;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? 0.006 : 1;
}
const found = [];
for (const node of document.querySelectorAll("body, body *")) {
  const own = [...node.childNodes].some(x => x.nodeType === 3 && x.data.trim());
  if (!own || !node.getClientRects().length || node.closest("script, style")) continue;
  const [one, two] = [light(getComputedStyle(node).color).value, ground(node)];
  const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  if (ratio < 4.5) found.push(node.tagName + " " + ratio.toFixed(1) + " "
                              + node.textContent.trim().slice(0, 40));
}
return found;
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

    def go(self, url: str) -> None:
        """Whatever status it has."""
        self.call("POST", "/url", {"url": url})

    def open(self, url: str) -> None:
        self.go(url)
        self.wait_until_at(url)

    def click(self, selector: str) -> None:
        asked = {"using": "css selector", "value": selector}
        (name,) = self.call("POST", "/element", asked).values()
        self.call("POST", "/element/%s/click" % name, {})

    def wait_until_at(self, url: str) -> None:
        """The page is there, whole, with status 200."""
        wait_for(url, lambda: self.run(LOADED, url), 20)

    def look(self, scheme: str, width: int) -> None:
        """From here on as one who likes "dark" or "light", in so many pixels."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        for command, values in (
            ("Emulation.setEmulatedMedia", {"features": [feature]}),
            ("Emulation.setDeviceMetricsOverride", size),
        ):
            asked = {"cmd": command, "params": values}
            self.call("POST", "/goog/cdp/execute", asked)

    def check_look(self) -> None:
        """Nothing needs to be scrolled sideways, and text can be told from its ground
        (WCAG 1.4.3: a contrast of 4.5)."""
        wide, unlike = self.run(SIDEWAYS), self.run(CONTRAST)
        assert wide <= 0, "%d pixels too wide" % wide
        assert not unlike, "too little contrast: %s" % unlike[:5]

    def links(self) -> List[str]:
        found: List[str] = self.run("return [...document.links].map(a => a.href)")
        return found

    def text(self, selector: str) -> str:
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return str(self.run(script, selector))
