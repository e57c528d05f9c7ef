#!/usr/bin/env python3
"""A tunnel server that asks visitors for a password, with every option of the server:

    TUNNEL_LOGIN=name:password python3 auth_router.py -v
    TUNNEL_LOGIN=name:password python3 auth_router.py --tls-cert cert.pem --tls-port 443

A Router decides, for every request, where it goes and whether it may. Passwords travel
in clear text without TLS.
"""

import base64
import hmac
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from mdm_tunnel_server import Request, Router, die, main  # noqa: E402

DENIED = 401, {"WWW-Authenticate": 'Basic realm="tunnel", charset="UTF-8"'}


class PasswordRouter(Router):
    """Lets in who knows `login`, name:password (RFC 7617)."""

    def __init__(self, login: str) -> None:
        self.wanted = b"Basic " + base64.b64encode(login.encode())

    def authorize(self, request: Request) -> object:
        said = request.headers.get("Authorization", "").encode("latin-1")
        if not hmac.compare_digest(said, self.wanted):  # its time tells nothing
            return DENIED
        fields = request.fields  # the service does not get the password
        request.fields = [x for x in fields if x[0].lower() != "authorization"]
        return None


if __name__ == "__main__":
    login = os.environ.get("TUNNEL_LOGIN", "")
    if not all(login.partition(":")):
        die(2, "set TUNNEL_LOGIN=name:password")
    main(router=PasswordRouter(login))
