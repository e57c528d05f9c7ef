#!/usr/bin/env python3
"""The smallest client that works: python3 tiny_client.py HOST:PORT ID web=9000 api=9001

To be read beside the protocol in the README. It has blocking sockets and threads where
the real client has a loop, and neither TLS nor tokens. It ends with its link."""

import json
import os
import queue
import socket
import struct
import sys
import threading
from functools import partial
from typing import Any, Dict, Tuple

(CHALLENGE, LOGIN, WELCOME, SERVICES, URLS, OPEN, DATA, CREDIT, END, RESET,
 PING, PONG, GOODBYE) = range(1, 14)  # fmt: skip
WINDOW = 256 << 10  # bytes that each side may send on a stream before it needs CREDIT
PIECE = 16 << 10  # bytes of a DATA frame: short ones let other streams have their turn


class Link:
    """The one connection to the server, on which all streams send their frames."""

    def __init__(self, host: str, port: int) -> None:
        self.sock, self.lock = socket.create_connection((host, port)), threading.Lock()
        self.file = self.sock.makefile("rb")

    def send(self, kind: int, stream: int, payload: bytes) -> None:
        """Header and payload in one piece: frames of other threads must not get in."""
        header = struct.pack("!II", kind << 24 | len(payload), stream)
        with self.lock:
            self.sock.sendall(header + payload)

    def read(self) -> Tuple[int, int, bytes]:
        header = self.file.read(8) or sys.exit("the server closed the link")
        word, stream = struct.unpack("!II", header)
        return word >> 24, stream, self.file.read(word & 0xFFFFFF)


class Stream(threading.Condition):
    """A visitor's connection: a target's socket, and a thread for each direction."""

    def __init__(self, link: Link, number: int, port: str) -> None:
        super().__init__()
        self.send, self.credit = partial(link.send, stream=number), WINDOW
        self.inbox: Any = queue.Queue()
        threading.Thread(target=self.carry, args=(port,), daemon=True).start()

    def carry(self, port: str) -> None:
        """Bytes from the visitor. Credit goes back only for what the target has taken:
        so at most a window waits here, and no other stream waits for a slow target."""
        try:
            with socket.create_connection(("localhost", port)) as self.target:
                threading.Thread(target=self.carry_back, daemon=True).start()
                for kind, data in iter(self.inbox.get, None):
                    if kind == DATA:
                        self.target.sendall(data)
                        self.send(CREDIT, payload=struct.pack("!I", len(data)))
                    else:  # after END the visitor sends no more, but still reads
                        how = socket.SHUT_WR if kind == END else socket.SHUT_RDWR
                        self.target.shutdown(how)
            self.send(RESET, payload=b"done ")  # the stream is over, both ways
        except OSError as error:
            self.send(RESET, payload=b"refused %a" % str(error))

    def carry_back(self) -> None:
        """Bytes from the target, as far as the credit goes; at its end END."""
        try:
            for data in iter(lambda: self.target.recv(self.wait_for_credit()), b""):
                self.add_credit(-len(data))
                self.send(DATA, payload=data)
            self.send(END, payload=b"")
        finally:
            self.inbox.put(None)

    def wait_for_credit(self) -> int:
        with self:
            self.wait_for(lambda: self.credit > 0)
            return min(self.credit, PIECE)

    def add_credit(self, count: int) -> None:
        with self:
            self.credit += count
            self.notify()


def main(host: str, port: int, id: str, ports: Dict[str, str]) -> None:
    link, streams = Link(host, port), {}  # type: Link, Dict[int, Stream]
    # 1. Ask to go over from HTTP to the protocol: proxies let that through.
    fields = "Host: %s\r\nConnection: Upgrade\r\nUpgrade: mdm-tunnel/1\r\n\r\n" % host
    link.sock.sendall(b"GET /.well-known/mdm-tunnel HTTP/1.1\r\n" + fields.encode())
    list(iter(link.file.readline, b"\r\n"))  # the head of the answer, 101
    link.read()  # 2. CHALLENGE holds a nonce, for clients with a token: they sign it
    # 3. Who dials again with the same session gets its id back at once.
    login = {"id": id, "session": os.urandom(16).hex()}
    link.send(LOGIN, 0, json.dumps(login).encode())
    # 4. What is published here; the server answers with URLS.
    link.send(SERVICES, 0, json.dumps({name: {} for name in ports}).encode())
    while True:  # 5. WELCOME, or GOODBYE; from here on frames come in any order
        kind, number, payload = link.read()
        if kind == OPEN:  # DATA may follow at once: it waits in the stream's inbox
            name = json.loads(payload)["service"]
            streams[number] = Stream(link, number, ports[name])
        elif kind == PING:  # the server wants to know whether we live
            link.send(PONG, 0, payload)
        elif kind in (URLS, GOODBYE):  # where the services are; or why it ends
            print(payload.decode(), flush=True)
        elif kind == CREDIT and number in streams:
            streams[number].add_credit(struct.unpack("!I", payload)[0])
        elif number in streams:  # else it is late: the stream is over
            streams[number].inbox.put((kind, payload))
            if kind == RESET:
                streams.pop(number).add_credit(1 << 30)  # nobody may wait for it


if __name__ == "__main__":
    where, pairs = sys.argv[1].split(":"), [x.split("=") for x in sys.argv[3:]]
    main(where[0], int(where[1]), sys.argv[2], dict(pairs))
