#!/usr/bin/env python3
"""The whole tunnel on one machine: two services, a server, a client, and what to open.

    python3 examples/demo.py            Ctrl-C ends all of it
    python3 examples/demo.py -v         and shows what each of the four says

    browser --> server (port 8000) ==link (port 8001)==> client --> service (9000, 9001)

Where a port is taken the demo uses another. All of it listens on 127.0.0.1 only.
"""

import argparse
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, List, Optional

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HOST = "127.0.0.1"
HELLO, WEBSOCKETS = "hello-world.tim.localhost", "websockets.tim.localhost"
PATIENCE = 20.0  # seconds until the tunnel must answer: slow machines start slowly
FETCH_TIME = 2.0  # seconds for one look at whether it does
LOOK = 0.1  # seconds between looks at the children
LAST_CALL = 3.0  # seconds for a child to end by itself

READY = """The tunnel is there. Open in a browser

  http://%(hello)s:%(port)d/
  http://%(websockets)s:%(port)d/

or, where *.localhost is not known, tell the server the name that you want:

  curl -H Host:%(hello)s http://%(host)s:%(port)d/

Ctrl-C ends it."""

# A child lives as long as its standard input is open, and the system closes that
# however this process ends: not even `kill -9` leaves a child behind.
LIFELINE = """
import os, runpy, sys, threading

def wait():
    os.read(0, 1)
    os._exit(0)

threading.Thread(target=wait, daemon=True).start()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Failed(Exception):
    """The demo cannot go on."""


class Child:
    """One of the four processes. What it says is shown behind its name: with -v all,
    otherwise only what it says on stderr, which is why it has ended."""

    def __init__(self, name: str, verbose: bool, script: str, *options: str) -> None:
        self.name = name
        start = [sys.executable, "-I", "-c", LIFELINE, os.path.join(ROOT, script)]
        self.process = subprocess.Popen(
            start + list(options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if verbose else subprocess.DEVNULL,
            stderr=subprocess.STDOUT if verbose else subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self.voice = threading.Thread(target=self.repeat, daemon=True)
        self.voice.start()

    def repeat(self) -> None:
        label = ("%-11s | " % self.name).encode()
        said: Any = self.process.stdout or self.process.stderr
        for line in said:
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), label + line.rstrip(b"\r\n") + b"\n")
        said.close()

    def release(self) -> None:
        """Let go of the lifeline."""
        if self.process.stdin:
            self.process.stdin.close()

    def wait(self) -> None:
        """Wait for its end, and for its last words."""
        try:
            self.process.wait(LAST_CALL)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.voice.join()


class Demo:
    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.children: List[Child] = []
        self.stopped = False

    def on_signal(self, *_: Any) -> None:
        """Nothing is interrupted: a child just begun would not be in the list."""
        self.stopped = True

    def start(self, name: str, script: str, *options: str) -> None:
        self.children.append(Child(name, self.verbose, script, *options))

    def run(self) -> None:
        """Until a signal comes. Raises Failed."""
        port = self.start_all()
        until = time.monotonic() + PATIENCE
        while not (self.stopped or answers(port, HELLO) and answers(port, WEBSOCKETS)):
            self.look()
            if time.monotonic() > until:
                raise Failed("the tunnel does not answer")
        names = {"hello": HELLO, "websockets": WEBSOCKETS, "host": HOST, "port": port}
        if not self.stopped:
            print(READY % names, flush=True)
        while not self.stopped:
            self.look()

    def start_all(self) -> int:
        """Start the four; return the port to visit."""
        hello, websockets = free_port(9000), free_port(9001)
        port, client_port = free_port(8000), free_port(8001)
        services = ["hello-world=%d" % hello, "websockets=%d" % websockets]
        ports = ["-p", str(port), "-c", str(client_port), "--bind", HOST]
        dial = ["-h", "%s:%d" % (HOST, client_port), "-i", "tim"]
        verbose = ["-v"] * self.verbose
        self.start("hello-world", "examples/simple/server.py", str(hello))
        self.start("websockets", "examples/websockets/server.py", str(websockets))
        self.start("server", "mdm_tunnel_server.py", *ports, *verbose)
        self.start("client", "mdm_tunnel_client.py", *dial, *services, *verbose)
        return port

    def look(self) -> None:
        """Wait a moment. Raises Failed when one of the four has ended."""
        time.sleep(LOOK)
        for child in self.children:
            status = child.process.poll()
            if status is not None and not self.stopped:
                raise Failed("%s has ended, with status %d" % (child.name, status))

    def end(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # twice Ctrl-C is no more than once
        for child in self.children:
            child.release()
        for child in self.children:
            child.wait()


def free_port(wanted: int) -> int:
    """`wanted`, or where that is taken the next that ends in the same digit: so the
    four never ask for the same one."""
    return next(port for port in range(wanted, 1 << 16, 10) if is_free(port))


def is_free(port: int) -> bool:
    """Nobody answers there, nor on ::1, which browsers try first; it is to be had."""
    for host in (HOST, "::1"):
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), FETCH_TIME).close()
            return False
    with contextlib.suppress(OSError), socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        return True
    return False


def answers(port: int, name: str) -> bool:
    """Whether the page can be fetched through the tunnel."""
    connection = http.client.HTTPConnection(HOST, port, timeout=FETCH_TIME)
    try:
        connection.request("GET", "/", headers={"Host": "%s:%d" % (name, port)})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole tunnel on one machine.")
    parser.add_argument("-v", "--verbose", action="store_true", help="show all logs")
    demo = Demo(parser.parse_args().verbose)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, demo.on_signal)
    failure: Optional[Exception] = None
    try:
        demo.run()
    except (Failed, OSError) as error:
        failure = error
    finally:
        demo.end()
    sys.exit("demo.py: %s" % failure if failure else 0)


if __name__ == "__main__":
    main()
