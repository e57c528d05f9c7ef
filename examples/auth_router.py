#!/usr/bin/env python3
"""A tunnel server of your own: visitors need a password, and one service has a path.

    MDM_TUNNEL_VISITOR=ann:secret python3 examples/auth_router.py -v
    python3 examples/auth_router.py -v password.txt         holds one line, ann:secret
    python3 mdm_tunnel_client.py -v -i tim web=9000 api=9001
    curl -u ann:secret http://web.tim.localhost:8000/       the service web
    curl -u ann:secret http://tim.localhost:8000/api/       the service api
    curl -u ann:secret http://tim.localhost:8000/           the index of tim

mdm_tunnel_server.py is a module too: subclass its Router, hand it to its Server. The
hooks are asked for every request, WebSockets included, and must not block. A password
sent over http can be read on its way: put a proxy that speaks https in front. The
services see it too, as it is passed on to them. It is for visitors only; who may log in
as a client is not asked here.
"""

import argparse
import base64
import hmac
import os
import sys
from typing import Any, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mdm_tunnel_server import Request, Router, Server, die, set_up_log  # noqa: E402

VARIABLE = "MDM_TUNNEL_VISITOR"


class PasswordRouter(Router):
    """Lets in who knows `login`, "name:password", and knows one path."""

    def __init__(self, login: str) -> None:
        self.expected = base64.b64encode(login.encode())  # RFC 7617

    def authorize(self, request: Request) -> Any:
        """None lets a request pass. The comparison takes as long whatever was sent, so
        that nobody finds the password letter by letter."""
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(sent.strip().encode("latin-1"), self.expected)
        if right and scheme.lower() == "basic":
            return None
        return 401, {"WWW-Authenticate": 'Basic realm="tunnel", charset="UTF-8"'}

    def route(self, request: Request) -> Any:
        """id.example.com/api/... is for the service api; all else goes by its name."""
        id, service = super().route(request)
        if service is None and request.target.startswith("/api/"):
            service = "api"
        return id, service


def find_login(path: Optional[str]) -> str:
    """What visitors must know. Without it there is no server: exit status 2."""
    login = os.environ.get(VARIABLE, "")
    try:
        if path is not None:
            with open(path, encoding="utf-8") as file:
                login = file.read().strip("\r\n")
    except (OSError, ValueError) as error:
        die(2, "%s: %s" % (path, error))
    name, _, password = login.partition(":")
    if not (name and password and login.isprintable()):
        die(2, "no login: name:password, in %s or as a line in a file" % VARIABLE)
    return login


def main() -> None:
    parser = argparse.ArgumentParser(description="A tunnel server with a password.")
    add = parser.add_argument
    add("file", nargs="?", help="a line name:password (else from $%s)" % VARIABLE)
    add("-p", "--port", type=int, default=8000, help="for visitors (%(default)s)")
    add("-c", "--client-port", type=int, default=8001, help="for clients (%(default)s)")
    add("-v", "--verbose", action="count", default=0, help="say what happens")
    options = parser.parse_args()
    router = PasswordRouter(find_login(options.file))
    set_up_log(options.verbose)
    try:
        server = Server(options.port, options.client_port, router=router)
    except (OSError, OverflowError) as error:
        die(1, "cannot listen: %s" % error)
    server.loop.catch_signals(server.on_signal)
    server.run()


if __name__ == "__main__":
    main()
