#!/usr/bin/env python3
"""A service worth a tunnel: one page, which says by which name it was reached.

    python3 examples/simple/server.py               http://127.0.0.1:9000/
    python3 mdm_tunnel_server.py -v
    python3 mdm_tunnel_client.py -v -i tim hello-world=9000
    curl http://hello-world.tim.localhost:8000/

It knows nothing of the tunnel and listens on the loopback address only, as a service
behind a NAT would. Another port goes after the name: examples/simple/server.py 9005
"""

import argparse
import html
import http.server
import os
import socketserver
import string
import sys
from typing import Any, Dict

HERE = os.path.dirname(os.path.abspath(__file__))


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one visitor's requests, one after the other."""

    protocol_version = "HTTP/1.1"  # the connection is kept for the next request
    timeout = 60  # seconds: whoever falls silent must not keep a thread for ever
    wbufsize = 64 << 10  # bytes: head and body leave together
    server: "Server"

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/":
            self.send_page(self.server.page.safe_substitute(self.facts()).encode())
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def facts(self) -> Dict[str, str]:
        """What the page tells. The tunnel's server says for whom it asks."""
        visitor = self.headers.get("X-Forwarded-For")
        return {
            "host": html.escape(self.headers.get("Host", "nobody")),
            "visitor": html.escape(visitor or self.client_address[0]),
            "way": "tunnel" if visitor else "direct",
        }

    def send_page(self, page: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")  # the next name may be another
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.send_header("Connection", "close")  # an unread body is no request
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """One line on stdout, which no visitor can break or colour."""
        line = (format % args).encode("unicode_escape") + b"\n"
        os.write(sys.stdout.fileno(), line)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each connection: http.server has this only since Python 3.7."""

    allow_reuse_address = os.name != "nt"  # there it would let two share a port
    daemon_threads = True  # none outlives Ctrl-C
    request_queue_size = 128  # a browser opens several at once; the default is 5

    def __init__(self, port: int) -> None:
        with open(os.path.join(HERE, "index.html"), encoding="utf-8") as file:
            self.page = string.Template(file.read())
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor who leaves early is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves one page, on 127.0.0.1.")
    parser.add_argument("port", nargs="?", type=int, default=9000, metavar="PORT")
    port = parser.parse_args().port
    try:
        server = Server(port)
    except (OSError, OverflowError) as error:
        parser.exit(1, "server.py: cannot serve on port %d: %s\n" % (port, error))
    port = server.server_address[1]
    print("http://127.0.0.1:%d/ (Ctrl-C ends it)" % port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
