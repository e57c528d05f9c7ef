#!/usr/bin/env python3
"""The whole tunnel on one machine: two services, a server, a client, and what to open.

    python3 examples/demo.py            Ctrl-C ends all of it
    python3 examples/demo.py -v         and shows what server and client say

    browser --> server (port 8000) ==link (port 8001)==> client --> service (9000, 9001)

Where a port is taken the demo uses another. All of it listens on 127.0.0.1 only.
"""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from typing import List

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HOST = "127.0.0.1"
NAMES = ("hello-world.tim.localhost", "websockets.tim.localhost")
PATIENCE = 20.0  # seconds until the tunnel must answer: slow machines start slowly
READY = """The tunnel is there. Open in a browser

  http://%(hello)s:%(port)d/
  http://%(websockets)s:%(port)d/

or, where *.localhost is not known, tell the server the name that you want:

  curl -H Host:%(hello)s http://127.0.0.1:%(port)d/

Ctrl-C ends it."""


def is_free(port: int) -> bool:
    """Nobody answers there, on 127.0.0.1 or on ::1, which browsers try first."""
    for host in (HOST, "::1"):
        try:
            socket.create_connection((host, port), 2).close()
            return False
        except OSError:
            pass
    return True


def free_port(wanted: int) -> int:
    """`wanted`, or where that is taken the next that ends in the same digit."""
    return next(port for port in range(wanted, 1 << 16, 10) if is_free(port))


def start_all(children: List[subprocess.Popen], verbose: List[str]) -> int:
    """Start the four; return the port to visit."""
    port, client_port = free_port(8000), free_port(8001)
    hello, websockets = free_port(9000), free_port(9001)
    for line in (
        "examples/simple/server.py %d" % hello,
        "examples/websockets/server.py %d" % websockets,
        "mdm_tunnel_server.py --bind %s -p %d -c %d" % (HOST, port, client_port),
        "mdm_tunnel_client.py -h %s:%d -i tim hello-world=%d websockets=%d"
        % (HOST, client_port, hello, websockets),
    ):
        script, *options = line.split()
        command = [sys.executable, os.path.join(ROOT, script)] + options
        command += verbose if script.startswith("mdm_tunnel") else []
        children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    return port


def answers(port: int, name: str) -> bool:
    """Whether the page can be fetched through the tunnel."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/", headers={"Host": "%s:%d" % (name, port)})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def run(children: List[subprocess.Popen], verbose: List[str]) -> None:
    port, until, ready = start_all(children, verbose), time.time() + PATIENCE, False
    while all(child.poll() is None for child in children):
        if not ready and all(answers(port, name) for name in NAMES):
            ready = True
            names = {"hello": NAMES[0], "websockets": NAMES[1], "port": port}
            print(READY % names, flush=True)
        if not ready and time.time() > until:
            sys.exit("demo.py: the tunnel does not answer")
        time.sleep(0.1)
    sys.exit("demo.py: one of the four has ended")


def main() -> None:
    if sys.argv[1:] not in ([], ["-v"], ["-vv"]):
        sys.exit("usage: demo.py [-v | -vv]")
    children: List[subprocess.Popen] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        run(children, sys.argv[1:])
    except KeyboardInterrupt:
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # twice is no more than once
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


if __name__ == "__main__":
    main()
