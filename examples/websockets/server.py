#!/usr/bin/env python3
"""A WebSocket through a tunnel: a page is sent digits, and returns them inverted.

    python3 examples/websockets/server.py           http://127.0.0.1:9001/
    python3 mdm_tunnel_server.py -v
    python3 mdm_tunnel_client.py -v -i tim websockets=9001
    open http://websockets.tim.localhost:8000/      in a browser

One port serves the page and, to whoever asks to upgrade, a WebSocket (RFC 6455): four
times a second a random 0 or 1 goes out, the page returns the other digit, and what
comes back is shown here. Another port goes after the name:
examples/websockets/server.py 9005
"""

import argparse
import base64
import contextlib
import enum
import hashlib
import http.server
import io
import itertools
import os
import random
import re
import socket
import socketserver
import struct
import sys
import threading
import time
from typing import Any, Iterator, Set, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
TICK = 0.25  # seconds between digits
PING_TICKS = 80  # a page that returns no digits still answers a PING: every 20 s
SILENCE = 60  # seconds without a byte, not even a PONG: the other side has gone
MESSAGE_LIMIT = 4 << 10  # bytes: a digit needs one, and a stranger gets no more memory
SHOWN_LIMIT = 40  # letters of a message that the terminal shows
LINGER = 2.0  # seconds that the other side has to take leave after our last word
THREADS = 500  # at once: a WebSocket has two, any other connection one


def say(text: str) -> None:
    """One line on stdout, whole whatever other threads print, and harmless to the
    terminal whatever a visitor sent."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), text.encode("unicode_escape") + b"\n")


# -----------------------------------------------------------------------------------
# WebSocket: frames and messages (RFC 6455, sections 5 to 7). One thread receives; any
# thread may send.
# -----------------------------------------------------------------------------------
class Opcode(enum.IntEnum):
    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class Violation(Exception):
    """The other side broke the rules: the status code of our CLOSE, and why."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class WebSocket:
    """The server's end, from the 101 on."""

    def __init__(self, reader: io.BufferedIOBase, sock: socket.socket) -> None:
        self.reader, self.sock = reader, sock
        self.sending = threading.Lock()
        self.closed = threading.Event()  # CLOSE was said: nothing may follow it (5.5.1)

    # What goes out.

    def send(self, opcode: int, payload: bytes = b"") -> None:
        """One frame of at most 125 bytes, enough here (5.2). Raises OSError."""
        with self.sending:
            if not self.closed.is_set():
                if opcode == Opcode.CLOSE:
                    self.closed.set()
                self.put(bytes([0x80 | opcode, len(payload)]) + payload)

    def put(self, frame: bytes) -> None:
        try:
            self.sock.sendall(frame)
        except OSError:
            self.closed.set()  # a part may have gone, which no frame may follow
            raise

    def close(self, code: int, reason: str) -> None:
        """Take leave first. The other side answers, or is done with anyhow: closing
        at once, with bytes unread, would reset the connection and lose our word."""
        with contextlib.suppress(OSError):
            self.send(Opcode.CLOSE, struct.pack("!H", code) + reason.encode())
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(LINGER)
            until = time.monotonic() + LINGER
            while self.sock.recv(MESSAGE_LIMIT) and time.monotonic() < until:
                pass

    # What comes in.

    def messages(self) -> Iterator[str]:
        """Text messages, until the other side closes. Raises Violation, OSError."""
        message, begun = bytearray(), False
        while not self.closed.is_set():
            final, opcode, payload = self.read_frame()
            if opcode == Opcode.CLOSE:
                self.on_close(payload)
            elif opcode == Opcode.PING:
                self.send(Opcode.PONG, payload)
            elif opcode != Opcode.PONG:
                self.check_order(opcode, begun, len(message) + len(payload))
                message += payload
                begun = not final
                if final:
                    yield self.decode(bytes(message))
                    message.clear()

    @staticmethod
    def check_order(opcode: int, begun: bool, size: int) -> None:
        """A message is one frame, or a first one and continuations (5.4)."""
        if begun != (opcode == Opcode.CONTINUATION):
            raise Violation(1002, "a fragment out of order")
        if opcode == Opcode.BINARY:
            raise Violation(1003, "only text is understood")
        if size > MESSAGE_LIMIT:
            raise Violation(1009, "a message of more than %d bytes" % MESSAGE_LIMIT)

    @staticmethod
    def decode(message: bytes) -> str:
        try:
            return message.decode()
        except UnicodeDecodeError:
            raise Violation(1007, "text that is not UTF-8") from None

    def read_frame(self) -> Tuple[bool, int, bytes]:
        """(final, opcode, payload) of the next frame (5.2)."""
        first, second = self.read(2)
        final, opcode, length = bool(first & 0x80), first & 0x0F, second & 0x7F
        if first & 0x70 or opcode not in list(Opcode):
            raise Violation(1002, "a frame of an extension that was not agreed on")
        if not second & 0x80:
            raise Violation(1002, "an unmasked frame")
        if opcode >= Opcode.CLOSE and not (final and length < 126):
            raise Violation(1002, "a control frame in fragments, or too long")
        if length == 126:
            (length,) = struct.unpack("!H", self.read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self.read(8))
        if length > MESSAGE_LIMIT:
            raise Violation(1009, "a frame of more than %d bytes" % MESSAGE_LIMIT)
        mask = itertools.cycle(self.read(4))
        return final, opcode, bytes(a ^ b for a, b in zip(self.read(length), mask))

    def read(self, size: int) -> bytes:
        data = self.reader.read(size)
        if len(data) < size:
            raise ConnectionError("the other side left without a CLOSE")
        return data

    def on_close(self, payload: bytes) -> None:
        """Answer with the code that came (5.5.1), if it is one (7.4)."""
        code = struct.unpack("!H", payload[:2])[0] if len(payload) > 1 else 1000
        known = 1000 <= code <= 1014 and code not in (1004, 1005, 1006)
        if len(payload) == 1 or not (known or 3000 <= code < 5000):
            raise Violation(1002, "a CLOSE without a proper code")
        self.decode(payload[2:])
        self.close(code, "")


def accept(key: str) -> str:
    """What shows that we have understood Sec-WebSocket-Key (RFC 6455 4.2.2)."""
    text = key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    return base64.b64encode(hashlib.sha1(text.encode()).digest()).decode()


# -----------------------------------------------------------------------------------
# Service: the page, and a WebSocket for each page that is open.
# -----------------------------------------------------------------------------------
KEY = re.compile("[A-Za-z0-9+/]{22}==")  # 16 bytes in base64
NUMBERS = itertools.count(1)  # what the terminal calls the pages


def send_digits(page: WebSocket) -> None:
    """Run in a thread of its own, until the page has gone."""
    with contextlib.suppress(OSError):
        for tick in itertools.count(1):
            page.send(Opcode.TEXT, random.choice((b"0", b"1")))
            if tick % PING_TICKS == 0:
                page.send(Opcode.PING)
            if page.closed.wait(TICK):
                return


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one visitor's requests, one after the other."""

    protocol_version = "HTTP/1.1"  # the connection is kept, and can be upgraded
    timeout = SILENCE
    wbufsize = 64 << 10  # bytes: head and body leave together
    server: "Server"

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/":
            self.send_error(404)
        elif "websocket" in self.words("Upgrade"):
            self.upgrade()
        else:
            self.answer(200, self.server.page, "Content-Type: text/html; charset=utf-8")

    do_HEAD = do_GET

    def words(self, field: str) -> Set[str]:
        """The members of a list of words, in lower case."""
        values = ",".join(self.headers.get_all(field, [])).lower().split(",")
        return {value.strip() for value in values}

    def answer(self, status: int, body: bytes, *fields: str) -> None:
        self.send_response(status)
        for field in fields:
            self.send_header(*field.split(": ", 1))
        self.send_header("Content-Length", str(len(body)))
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.send_header("Connection", "close")  # an unread body is no request
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def upgrade(self) -> None:
        """The opening handshake (RFC 6455 4.2). The Origin is not looked at: there is
        nothing here that a page from elsewhere must not have."""
        key = self.headers.get("Sec-WebSocket-Key", "")
        if self.headers.get("Sec-WebSocket-Version") != "13":
            self.answer(400, b"", "Sec-WebSocket-Version: 13")  # 4.4
        elif self.command != "GET" or "upgrade" not in self.words("Connection"):
            self.send_error(400, "no proper request for a WebSocket")
        elif not KEY.fullmatch(key):
            self.send_error(400, "no proper Sec-WebSocket-Key")
        else:
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", accept(key))
            self.end_headers()
            self.wfile.flush()
            self.close_connection = True  # no HTTP comes after the WebSocket
            self.talk(WebSocket(self.rfile, self.connection), next(NUMBERS))

    def talk(self, page: WebSocket, number: int) -> None:
        say("page %d: connected" % number)
        threading.Thread(target=send_digits, args=(page,), daemon=True).start()
        try:
            for text in page.messages():
                say("page %d: sent back %s" % (number, text[:SHOWN_LIMIT]))
        except Violation as violation:
            say("page %d: %s" % (number, violation.reason))
            page.close(violation.code, violation.reason)
        except OSError as error:
            say("page %d: %s" % (number, error))
        finally:
            page.closed.set()
            say("page %d: gone" % number)

    def log_message(self, format: str, *args: Any) -> None:
        say(format % args)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each connection: http.server has this only since Python 3.7."""

    allow_reuse_address = os.name != "nt"  # there it would let two share a port
    daemon_threads = True  # none outlives Ctrl-C
    request_queue_size = 128  # a browser opens several at once; the default is 5

    def __init__(self, port: int) -> None:
        with open(os.path.join(HERE, "index.html"), "rb") as file:
            self.page = file.read()
        super().__init__(("127.0.0.1", port), Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return threading.active_count() < THREADS

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor who leaves early is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def main() -> None:
    parser = argparse.ArgumentParser(description="Digits on a page, on 127.0.0.1.")
    parser.add_argument("port", nargs="?", type=int, default=9001, metavar="PORT")
    port = parser.parse_args().port
    try:
        server = Server(port)
    except (OSError, OverflowError) as error:
        parser.exit(1, "server.py: cannot serve on port %d: %s\n" % (port, error))
    say("http://127.0.0.1:%d/ (Ctrl-C ends it)" % server.server_address[1])
    server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
