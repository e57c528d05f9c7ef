"""What operators see (--admin): /metrics by the parser of Prometheus' own library, the
page in Chromium, and what pages of other origins can do with either."""

import json
import urllib.error
import urllib.request
from typing import Any, Callable, Dict, List

from browser import Browser
from by_name import stop
from parts import Client, Server, World, curl, free_ports, wait_for
from prometheus_client.openmetrics.parser import text_string_to_metric_families

KIND = "application/openmetrics-text; version=1.0.0; charset=utf-8"
ATTACK = """
const url = arguments[0], said = {};
async function attempt(name, call) {
  const late = new Promise(done => setTimeout(done, 3000, "nothing"));
  try { said[name] = await Promise.race([call(), late]) }
  catch (error) { said[name] = "refused" }
}
function load(tag, attribute) {
  return new Promise((done, failed) => {
    const node = document.createElement(tag);
    node.onload = () => done(String(tag === "iframe" ? node.contentDocument : node));
    node.onerror = failed;
    node[attribute] = url;
    document.body.append(node);
  });
}
const read = async options => (await fetch(url, options)).text();
return (async () => {
  await attempt("fetch", () => read({}));
  await attempt("opaque", () => read({ mode: "no-cors" }));
  await attempt("with a field", () => read({ headers: { "X-A": "b" } }));
  await attempt("post", () => read({ method: "POST", body: "x" }));
  await attempt("script", () => load("script", "src"));
  await attempt("image", () => load("img", "src"));
  await attempt("frame", () => load("iframe", "src"));
  return JSON.stringify(said);
})();
"""
ERRORS = """
window.errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
"""


class Counted:
    """A server with --admin, a client with a service, and some requests."""

    def __init__(self, world: World) -> None:
        (self.port,) = free_ports(1)
        self.url = "http://127.0.0.1:%d/" % self.port
        self.server = Server("--admin", str(self.port))
        services = {"web": world.web, "gone": 9}
        self.client = Client(self.server, "counted", services)
        for _ in range(20):
            curl(self.client.url("web"))
        self.visit("web", "no-such-page?<b>bold</b>")
        self.visit("gone")

    def visit(self, service: str, path: str = "") -> int:
        asked = "http://127.0.0.1:%d/%s" % (self.server.port, path)
        fields = {"Host": self.client.host(service)}
        try:
            request = urllib.request.Request(asked, None, fields)
            return int(urllib.request.urlopen(request).status)
        except urllib.error.HTTPError as error:
            return error.code

    def metrics(self) -> Dict[Any, float]:
        """The samples, as Prometheus reads them."""
        with urllib.request.urlopen(self.url + "metrics") as answer:
            assert answer.headers["Content-Type"] == KIND, answer.headers
            text = answer.read().decode()
        found = {}
        read: Any = text_string_to_metric_families  # which has no types
        for metric in read(text):
            assert metric.documentation, metric.name
            for sample in metric.samples:
                found[(sample.name, *sorted(sample.labels.values()))] = sample.value
        return found

    def stop(self) -> None:
        stop(self.client.process, self.server.process)


# -----------------------------------------------------------------------------------
# Checks
# -----------------------------------------------------------------------------------
def metrics_are_read_by_prometheus_client(world: World) -> str:
    counted = Counted(world)
    found = counted.metrics()
    assert found["mdm_tunnel_requests_total", "2xx", "counted"] >= 20, found
    assert found["mdm_tunnel_requests_total", "4xx", "counted"] == 1, found
    assert found["mdm_tunnel_requests_total", "5xx", "counted"] == 1, found
    assert found["mdm_tunnel_resets_total", "refused"] == 1, found
    assert found["mdm_tunnel_request_seconds_count", "counted"] >= 22, found
    assert found["mdm_tunnel_ids",] == found["mdm_tunnel_links",] == 1, found
    assert 1 << 20 < found["process_resident_memory_bytes",] < 1 << 28, found
    counted.stop()
    return "%d samples" % len(found)


def admin_page_suits_day_and_night(world: World) -> str:
    """It goes on by itself, and stays where it is scrolled to."""
    counted, seen = Counted(world), 0
    with Browser() as browser:
        command = {"cmd": "Page.addScriptToEvaluateOnNewDocument"}
        asked = {**command, "params": {"source": ERRORS}}
        browser.call("POST", "/goog/cdp/execute", asked)
        for scheme in ("light", "dark"):
            for width in (400, 1400):
                browser.look(scheme, width)
                browser.open(counted.url)
                assert "counted" in browser.text("#links b"), browser.text("#links")
                browser.check_look()
                seen += 1
        browser.run("scrollTo(0, 120); window.stays = document.querySelector('h2')")
        path = "new-%d" % seen
        counted.visit("web", path)
        wait_for("refresh", lambda: path in browser.text("#last tbody tr .what"))
        there = "return stays.isConnected && scrollY === 120 && !document.querySelector"
        assert browser.run(there + "('#last .what b')")
        assert "<b>bold</b>" in browser.text("#last")
        assert browser.run("return errors") == []
        counted.stop()
        wait_for("said", lambda: browser.run("return document.body.className"))
    return "%d looks" % seen


def other_origins_read_no_numbers(world: World) -> str:
    """Neither as they are, nor by a name of theirs that leads to our address."""
    counted = Counted(world)
    with Browser("--host-resolver-rules=MAP evil.example 127.0.0.1") as browser:
        for path in ("", "metrics", "healthz"):
            browser.go("http://127.0.0.1:%d/" % world.web)
            said = json.loads(browser.run(ATTACK, counted.url + path))
            assert said.pop("frame") in ("null", "nothing"), said
            assert set(said.values()) == {"refused"}, said
            browser.go("http://evil.example:%d/%s" % (counted.port, path))
            text = browser.run("return document.body.textContent")
            assert "403" in text and "mdm_tunnel" not in text, text
            assert browser.run("return document.querySelector('table')") is None
    counted.stop()
    return ""


CHECKS: List[Callable[[World], str]] = [
    metrics_are_read_by_prometheus_client,
    admin_page_suits_day_and_night,
    other_origins_read_no_numbers,
]
