"""Raw requests, and raw answers of a service, through our tunnel, HAProxy and nginx.
Each stands before a service of the same kind; to see what they make of every row:

    .ci/venv/bin/python .ci/strictness.py          every row
    .ci/venv/bin/python .ci/strictness.py differ   those where somebody disagrees

raw_inputs_beside_haproxy_and_nginx() is a check of .ci/interop. It fails when we accept
what one of the others refuses, unless EXPLAINED says why, or when two could read
differently what we pass on.

Each row goes over a connection of its own, followed by one more request, for /last: who
takes it for a part of the row, or a part of the row for it, shows how he has read that.
"""

import asyncio
import os
import re
import shutil
import sys
import time
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, NamedTuple, Optional
from typing import Tuple

from parts import HAPROXY, HAPROXY_FRONT, NGINX_FRONT, TMP, Client, Process, Server
from parts import free_ports, start_nginx

if TYPE_CHECKING:
    from parts import World

LANES = 4  # rows that are under way at once through each of the three
PATIENCE = 1.0  # seconds without a byte after which somebody waits for more
SYSTEMS = ("ours", "HAProxy", "nginx")


class Row(NamedTuple):
    """A request; or an answer, with the method of the request that it gets."""

    name: str
    raw: bytes
    method: str = "GET"
    ends: bool = False  # the service closes after its answer


# -----------------------------------------------------------------------------------
# Requests. {host} stands for the name of the service; in a variation, @ for a byte.
# -----------------------------------------------------------------------------------
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="


def request(
    *lines: str,
    first: str = "GET / HTTP/1.1",
    host: str = "Host: {host}",
    body: str = "",
) -> bytes:
    parts = [first] + ([host] if host else []) + list(lines)
    return ("\r\n".join(parts) + "\r\n\r\n" + body).encode("latin-1")


def post(*lines: str, body: str = "", version: str = "1.1") -> bytes:
    return request(*lines, first="POST / HTTP/" + version, body=body)


def sized(length: str) -> bytes:
    return post("Content-Length:" + length, body="hello")


def coded(coding: str) -> bytes:
    return post("Transfer-Encoding:" + coding, body="5\r\nhello\r\n0\r\n\r\n")


def chunked(body: str) -> bytes:
    return post("Transfer-Encoding: chunked", body=body)


def framed(lines: str) -> bytes:
    """With a body that is whole by its chunks, and by the length of 5 not."""
    return post(*lines.split(" & "), body="0\r\n\r\n")


def upgrading(lines: str) -> bytes:
    """The key is there, as HAProxy wants it, so that the rest counts."""
    return request(*lines.split(" & "), KEY)


def absolute(target: str) -> bytes:
    """`target host-lines`, each with its own idea of the host."""
    target, _, hosts = target.partition(" ")
    return request(first="GET %s HTTP/1.1" % target, host=hosts.replace("|", "\r\n"))


def plain(text: str) -> bytes:
    return text.encode("latin-1")


LINES = [
    "GET / HTTP/1.1",
    "HEAD / HTTP/1.1",
    "PUT / HTTP/1.1",
    "DELETE / HTTP/1.1",
    "OPTIONS / HTTP/1.1",
    "TRACE / HTTP/1.1",
    "M-SEARCH / HTTP/1.1",
    "PROPFIND / HTTP/1.1",
    "FOO_BAR / HTTP/1.1",
    "get / HTTP/1.1",
    "GeT / HTTP/1.1",
    "G / HTTP/1.1",
    "G1 / HTTP/1.1",
    "1 / HTTP/1.1",
    "!#$%&'*+.^`|~ / HTTP/1.1",
    "G(T / HTTP/1.1",
    "G:T / HTTP/1.1",
    "G/T / HTTP/1.1",
    "G@T / HTTP/1.1",
    "G=T / HTTP/1.1",
    "G,T / HTTP/1.1",
    "G{T / HTTP/1.1",
    '"GET" / HTTP/1.1',
    "GET  / HTTP/1.1",
    "GET /  HTTP/1.1",
    "GET / HTTP/1.1 ",
    "GET / HTTP/1.1  ",
    " GET / HTTP/1.1",
    "\tGET / HTTP/1.1",
    "GET\t/ HTTP/1.1",
    "GET /\tHTTP/1.1",
    "GET / HTTP/1.1\t",
    "GET / HTTP/1.1 x",
    "GET / HTTP/1.1 HTTP/1.1",
    "GET / x HTTP/1.1",
    "GET / / HTTP/1.1",
    "GET /",
    "GET",
    "GET HTTP/1.1",
    "/ HTTP/1.1",
    "/",
    "PRI * HTTP/2.0",
    "CONNECT {host}:80 HTTP/1.1",
    "CONNECT / HTTP/1.1",
    "CONNECT http://{host}/ HTTP/1.1",
    "OPTIONS * HTTP/1.1",
    "OPTIONS http://{host} HTTP/1.1",
    "GET * HTTP/1.1",
]
VERSIONS = [
    "HTTP/1.0",
    "HTTP/1.2",
    "HTTP/1.9",
    "HTTP/1.10",
    "HTTP/01.1",
    "HTTP/1.01",
    "HTTP/1",
    "HTTP/1.",
    "HTTP/.1",
    "HTTP/11",
    "HTTP/0.9",
    "HTTP/2",
    "HTTP/2.0",
    "HTTP/3.0",
    "http/1.1",
    "Http/1.1",
    "HTTPS/1.1",
    "HTTP/1.1a",
    "HTTP/1,1",
    "HTTP/1.1.1",
    "HTTP 1.1",
    "HTTP/ 1.1",
    "HTTP/1. 1",
    "HTTP/+1.1",
    "HTTP/1.-1",
    "HTTP/\xb9.1",
    "HTTP/1.\xb9",
    "RTSP/1.0",
    "ICY/1.1",
]
TARGETS = [
    "/x?y=z",
    "/?",
    "//",
    "//evil/x",
    "/../x",
    "/./x",
    "/%00",
    "/%0d%0aA:b",
    "/%zz",
    "/%",
    "/a#b",
    "/?a#b",
    "/\xe4",
    '/"',
    "/<>",
    "/\\",
    "/^`{|}",
    "/[]",
    "/;x",
    "a",
    "?a",
    "#a",
    "{host}",
    "{host}:80",
    "http://{host}/",
    "HTTP://{host}/x?y",
    "hTTp://{host}/",
    "http://{host}",
    "http://{host}?q",
    "http://{host}#f",
    "http://{host}/#f",
    "http://{host}:80/",
    "http://{host}:/",
    "http://{host}:x/",
    "http://{host}:-1/",
    "http://{host}:123456/",
    "http://{host}.:80/",
    "http://u@{host}/",
    "http://u:p@{host}/",
    "http://@{host}/",
    "http://evil@{host}/",
    "http://{host}@evil/",
    "http://{host}\\@evil/",
    "http://{host}%00/",
    "http:///x",
    "http://",
    "http:/x",
    "http:x",
    "http:{host}/",
    "http//{host}/",
    "https://{host}/",
    "ftp://{host}/",
    "ws://{host}/",
    "x://{host}/",
    "://{host}/",
    "javascript:alert(1)",
]
AUTHORITIES = [  # the target, and the Host lines
    "http://{host}/ Host: {host}",
    "http://{host}/ Host: {host}:80",
    "http://{host}:80/ Host: {host}",
    "http://{host}/ Host: other.example",
    "http://other.example/ Host: {host}",
    "http://{host}/ Host:",
    "http://{host}/ ",
    "http://{host}/ Host: {host}|Host: {host}",
    "http://{host}/ Host: a b",
    "http://{host}/ Host: u@{host}",
    "http://{host}/ X-Host: {host}",
    "/ X-Forwarded-Host: {host}",
]
HOSTS = [
    "Host: {host}",
    "Host:{host}",
    "Host:   {host}   ",
    "Host:\t{host}\t",
    "host: {host}",
    "HOST: {host}",
    "Host: {host}:80",
    "Host: {host}:0",
    "Host: {host}:",
    "Host: {host}:00080",
    "Host: {host}:000080",
    "Host: {host}:99999",
    "Host: {host}:x",
    "Host: {host}:8 0",
    "Host: {host}: 80",
    "Host: {host} :80",
    "Host: {host}:-1",
    "Host: {host}:80:80",
    "Host: {host}.",
    "Host: {host}..",
    "Host: {host}..x",
    "Host: .{host}",
    "Host: {host}/",
    "Host: {host}/x",
    "Host: {host}?x",
    "Host: {host}#x",
    "Host: {host};x",
    "Host: {host}\\x",
    "Host: {host},",
    "Host: {host},{host}",
    "Host: {host}, {host}",
    "Host: {host} {host}",
    "Host: {host} evil",
    "Host: u@{host}",
    "Host: u:p@{host}",
    "Host: @{host}",
    "Host: http://{host}",
    "Host: http://{host}/",
    'Host: "{host}"',
    "Host: {host}%00",
    "Host: {host}%2e",
    "Host: {host}\xe4",
    "Host: {host}{",
    "Host: {host}*",
    "Host: {host}!",
    "Host: [::1",
    "Host: ::1",
    "Host: [{host}]",
    "Host: [::1]x",
    "Host:",
    "Host: ",
    "Host",
    "Host : {host}",
    "Host\t: {host}",
    " Host: {host}",
    "\tHost: {host}",
    "Host:\r\n {host}",
    "Host: {host}\r\n .evil",
    "Host: {host}\r\nHost: {host}",
    "Host: {host}\r\nhost: {host}",
    "Host: {host}\r\nHost: evil",
    "Host: evil\r\nHost: {host}",
    "Host: {host}\r\nHost:",
    "Host:\r\nHost: {host}",
    "Host: {host}\r\nHost : evil",
    "Host: {host}\r\nA: b\r\nHost: {host}",
    "Host: {host}\r\nHost_: evil",
    "Host: {host}\r\nA: b\r\n Host: evil",
    "X-Host: {host}",
    "A: b",
]
FIELDS = [
    "A: b",
    "A:b",
    "A:",
    "A: ",
    "A:\t b \t",
    "A::b",
    "A: :",
    "A: b: c",
    'A: "b',
    "A: b\xe4",
    "A: b\tc",
    "A : b",
    "A\t: b",
    "A  : b",
    ": b",
    ":",
    " : b",
    "A",
    "A b",
    "A b: c",
    " A: b",
    "\tA: b",
    "A: b\r\n c",
    "A: b\r\n\tc",
    "A: b\r\n ",
    "A: b\r\n :",
    "A:\r\n b",
    "A:\r\n\r\n b",
    "A\xe4: b",
    "\xe4: b",
    "A(: b",
    "A): b",
    "A,: b",
    "A/: b",
    "A;: b",
    "A<: b",
    "A=: b",
    "A>: b",
    "A?: b",
    "A@: b",
    "A[: b",
    "A\\: b",
    "A]: b",
    "A{: b",
    "A}: b",
    '"A": b',
    "!#$%&'*+-.^`|~: b",
    "1: b",
    "-: b",
    "_: b",
    "A_B: c",
    "A.B: c",
    "GET / HTTP/1.1",
    "HTTP/1.1 200 OK",
    "X-Forwarded-For: 6.6.6.6",
    "X_Forwarded_For: 6.6.6.6",
    "X-Forwarded_For: 6.6.6.6",
    "Forwarded: for=6.6.6.6",
    "Expect: 100-continue",
    "Expect: x",
    "TE: trailers",
    "TE: chunked",
    "Trailer: Content-Length",
    "Proxy: x",
    "Keep-Alive: 5",
    "Proxy-Connection: keep-alive",
    "X-HTTP-Method-Override: DELETE",
    "Content-Encoding: chunked",
    "HTTP2-Settings: AAMAAABkAAQAAP__",
]
PLACES = {  # where a byte may stand that has no business there
    "method": "G@T / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "target": "GET /a@b HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "target, before": "GET @/ HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "target, behind": "GET /@ HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "version": "GET / HTTP/1@1\r\nHost: {host}\r\n\r\n",
    "version, behind": "GET / HTTP/1.1@\r\nHost: {host}\r\n\r\n",
    "request, before": "@GET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "name": "GET / HTTP/1.1\r\nHost: {host}\r\nA@B: c\r\n\r\n",
    "name, before": "GET / HTTP/1.1\r\nHost: {host}\r\n@A: c\r\n\r\n",
    "name, behind": "GET / HTTP/1.1\r\nHost: {host}\r\nA@: c\r\n\r\n",
    "value": "GET / HTTP/1.1\r\nHost: {host}\r\nA: b@c\r\n\r\n",
    "value, before": "GET / HTTP/1.1\r\nHost: {host}\r\nA:@c\r\n\r\n",
    "value, behind": "GET / HTTP/1.1\r\nHost: {host}\r\nA: b@\r\n\r\n",
    "Host": "GET / HTTP/1.1\r\nHost: a@{host}\r\n\r\n",
    "Host, before": "GET / HTTP/1.1\r\nHost:@{host}\r\n\r\n",
    "Host, behind": "GET / HTTP/1.1\r\nHost: {host}@\r\n\r\n",
    "length, before": "POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length:@1\r\n\r\nx",
    "length, behind": "POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1@\r\n\r\nx",
    "its name": "POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length@: 1\r\n\r\nx",
    "coding, before": "POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding:@chunked"
    "\r\n\r\n0\r\n\r\n",
    "coding, behind": "POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked@"
    "\r\n\r\n0\r\n\r\n",
    "coding's name": "POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding@: chunked"
    "\r\n\r\n0\r\n\r\n",
    "last line": "GET / HTTP/1.1\r\nHost: {host}\r\n@\r\n\r\n",
}
CHUNK_PLACES = {
    "chunk size, before": "@1\r\nx\r\n0\r\n\r\n",
    "chunk size, behind": "1@\r\nx\r\n0\r\n\r\n",
    "extension's name": "1;a@b=c\r\nx\r\n0\r\n\r\n",
    "extension's value": "1;a=b@c\r\nx\r\n0\r\n\r\n",
    "quoted extension": '1;a="b@c"\r\nx\r\n0\r\n\r\n',
    "chunk, behind": "1\r\nx@\r\n0\r\n\r\n",
    "last chunk": "0@\r\n\r\n",
    "trailer's name": "0\r\nA@B: c\r\n\r\n",
    "trailer's value": "0\r\nA: b@c\r\n\r\n",
}
BYTES = "\0\1\x08\t\n\x0b\x0c\r\x1b\x1f\x7f\x80\x85\xa0\xff"
ENDS = [
    "GET / HTTP/1.1\nHost: {host}\n\n",
    "GET / HTTP/1.1\nHost: {host}\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\n\n",
    "GET / HTTP/1.1\r\nHost: {host}\n\n",
    "GET / HTTP/1.1\rHost: {host}\r\r",
    "GET / HTTP/1.1\rHost: {host}\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\r\n\r\n",
    "GET / HTTP/1.1\r\r\nHost: {host}\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\n\r\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\n\r\n\r",
    "GET / HTTP/1.1\n\rHost: {host}\n\r\n\r",
    "GET / HTTP/1.1\r\nHost: {host}\r\nA: b\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\nA: b\nB: c\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\nA: b\rB: c\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\n \r\n\r\n",
    "GET / HTTP/1.1\r\n\r\nHost: {host}\r\n\r\n",
    "GET / HTTP/1.1\r\n Host: {host}\r\nHost: {host}\r\n\r\n",
    "GET / HTTP/1.1\r\n \r\nHost: {host}\r\n\r\n",
    "\r\nGET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "\r\n\r\nGET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "\nGET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "\n\nGET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "\rGET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "\r\r\nGET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    " \r\nGET / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "GET /\r\n",
    "GET /\r\n\r\n",
    "GET / HTTP/1.0\r\n\r\n",
    "GET / HTTP/1.1\r\n\r\n",
    "GET / HTTP/1.0\r\nHost: {host}\r\n\r\n",
    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "garbage\r\n\r\n",
]
LENGTHS = [  # of a body of five bytes
    " 5",
    "5",
    " 05",
    " 000000000000000005",
    " 0000000000000000005",
    " 5 ",
    "\t5\t",
    "",
    " ",
    " +5",
    " -5",
    " -0",
    " 5.",
    " 5.0",
    " 5e0",
    " 0x5",
    " 05h",
    " 5h",
    " 5 5",
    " 5,",
    " ,5",
    " 5,5",
    " 5, 5",
    " 5,6",
    " 5, 0",
    " 5;",
    " 5;a=b",
    ' "5"',
    " '5'",
    " (5)",
    " 5_0",
    " \xb2",
    " 5\xa0",
    " \xa05",
    " 4294967301",
    " 9223372036854775807",
    " 9223372036854775808",
    " 18446744073709551621",
    " 1111111111111111111",
    " null",
    "\r\n 5",
    " 5\r\n ",
    " 5\r\n 6",
    " 5\r\nContent-Length: 5",
    " 5\r\ncontent-length: 5",
    " 5\r\nContent-Length: 6",
    " 0\r\nContent-Length: 5",
    " 5\r\nContent-Length: 0",
    " 5\r\nContent-Length:",
    "\r\nContent-Length: 5",
    " 5\r\nA: b\r\nContent-Length: 5",
    " 5\r\nContent-Length : 6",
    " 5\r\nContent_Length: 6",
    " 5\r\nContent-Length-: 6",
]
NAMES = [  # none of these is a framing field, and there is no body
    "Content_Length: 5",
    "CONTENT_LENGTH: 5",
    "Transfer_Encoding: chunked",
    "TRANSFER_ENCODING: chunked",
    "Content Length: 5",
    "ContentLength: 5",
    "Content-Length-: 5",
    "-Content-Length: 5",
    "Content--Length: 5",
    "Content.Length: 5",
    "Content\xadLength: 5",
    "Content-Length : 5",
    "Content-Length\t: 5",
    " Content-Length: 5",
    "A: b\r\n Content-Length: 5",
    "A: b\rContent-Length: 5",
    "A: b\nContent-Length: 5",
    "A: b\0Content-Length: 5",
    "A: b\r\n\tTransfer-Encoding: chunked",
    "A: b\rTransfer-Encoding: chunked",
    "A: b\nTransfer-Encoding: chunked",
    "Transfer-Encoding : chunked",
    "Transfer-Encoding\t: chunked",
    " Transfer-Encoding: chunked",
    "\tTransfer-Encoding: chunked",
    "X-Transfer-Encoding: chunked",
    "Transfer-Encodings: chunked",
    "Transfer Encoding: chunked",
    "TransferEncoding: chunked",
    "Transfer-Encoding",
    "Content-Length",
]
CODINGS = [
    " chunked",
    "chunked",
    " Chunked",
    " CHUNKED",
    " chunked ",
    "\tchunked\t",
    "",
    " ",
    " chunked,",
    " ,chunked",
    " , chunked",
    " chunked, ,",
    " chunked chunked",
    " chunked, chunked",
    " chunked,chunked",
    " identity",
    " identity, chunked",
    " chunked, identity",
    " gzip",
    " gzip, chunked",
    " chunked, gzip",
    " deflate, chunked",
    " trailers",
    " x, chunked",
    " xchunked",
    " chunkedx",
    " x chunked",
    " chunk",
    " chun ked",
    " chunked;q=1",
    " chunked; a=b",
    " chunked;",
    ' "chunked"',
    " 'chunked'",
    " chunked\xa0",
    " \xe7hunked",
    " null",
    " true",
    "\r\n chunked",
    " chunked\r\n ",
    " chunked\r\n , identity",
    " chunked\r\nTransfer-Encoding: chunked",
    " chunked\r\ntransfer-encoding: chunked",
    " chunked\r\nTransfer-Encoding: identity",
    " identity\r\nTransfer-Encoding: chunked",
    " chunked\r\nTransfer-Encoding:",
    "\r\nTransfer-Encoding: chunked",
    " gzip\r\nTransfer-Encoding: chunked",
    " chunked\r\nTransfer-Encoding: x",
    " x\r\nTransfer-Encoding: chunked",
    " chunked\r\nTransfer-Encoding : x",
    " chunked\r\nTransfer_Encoding: x",
]
FRAMINGS = [
    "Content-Length: 5 & Transfer-Encoding: chunked",
    "Transfer-Encoding: chunked & Content-Length: 5",
    "Transfer-Encoding: chunked & Content-Length: 0",
    "Transfer-Encoding: chunked & Content-Length:",
    "Transfer-Encoding: chunked & Content-Length: x",
    "Transfer-Encoding: chunked & content-length: 5",
    "transfer-encoding: chunked & Content-Length: 5",
    "Transfer-Encoding: Chunked & Content-Length: 5",
    "Transfer-Encoding: identity & Content-Length: 5",
    "Transfer-Encoding: gzip & Content-Length: 5",
    "Transfer-Encoding: xchunked & Content-Length: 5",
    "Transfer-Encoding: & Content-Length: 5",
    "Transfer-Encoding : chunked & Content-Length: 5",
    "Transfer-Encoding: \x0bchunked & Content-Length: 5",
    "Transfer_Encoding: chunked & Content-Length: 5",
    "Transfer-Encoding: chunked & Content_Length: 5",
    "A: b\r\n Transfer-Encoding: chunked & Content-Length: 5",
    "Transfer-Encoding:\r\n chunked & Content-Length: 5",
    "Content-Length: 5 & Connection: Content-Length",
    "Content-Length: 5 & Connection: close, content-length",
    "Transfer-Encoding: chunked & Connection: Transfer-Encoding",
    "Transfer-Encoding: chunked & Connection: close, transfer-encoding",
    "Content-Length: 5 & Upgrade: websocket & Connection: Upgrade",
    "Transfer-Encoding: chunked & Upgrade: websocket & Connection: Upgrade",
    "Content-Length: 5 & Upgrade: h2c & Connection: Upgrade",
    "Transfer-Encoding: chunked & Expect: 100-continue",
    "Content-Length: 5 & Expect: 100-continue",
    "Transfer-Encoding: chunked & TE: trailers & Connection: TE",
    "Transfer-Encoding: chunked & Trailer: Content-Length",
    "Content-Length: 5 & Trailer: A",
]
CHUNKS = [
    "0\r\n\r\n",
    "5\r\nhello\r\n0\r\n\r\n",
    "00000005\r\nhello\r\n00000000\r\n\r\n",
    "000000005\r\nhello\r\n0\r\n\r\n",
    "5\r\nhello\r\n000000000\r\n\r\n",
    "a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n",
    "100000005\r\nhello\r\n0\r\n\r\n",
    "10000000000000005\r\nhello\r\n0\r\n\r\n",
    "ffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "7fffffff\r\nhello\r\n0\r\n\r\n",
    "\r\n0\r\n\r\n",
    "5\r\n\r\nhello\r\n0\r\n\r\n",
    "g\r\n\r\n0\r\n\r\n",
    "5g\r\nhello\r\n0\r\n\r\n",
    "-5\r\nhello\r\n0\r\n\r\n",
    "+5\r\nhello\r\n0\r\n\r\n",
    "-0\r\n\r\n",
    "0x5\r\nhello\r\n0\r\n\r\n",
    "0x0\r\n\r\n",
    "5h\r\nhello\r\n0\r\n\r\n",
    "5.\r\nhello\r\n0\r\n\r\n",
    "5,\r\nhello\r\n0\r\n\r\n",
    "5_0\r\nhello\r\n0\r\n\r\n",
    "'5'\r\nhello\r\n0\r\n\r\n",
    " 5\r\nhello\r\n0\r\n\r\n",
    "\t5\r\nhello\r\n0\r\n\r\n",
    "5 \r\nhello\r\n0\r\n\r\n",
    "5\t\r\nhello\r\n0\r\n\r\n",
    "5 5\r\nhello\r\n0\r\n\r\n",
    "5 ;a\r\nhello\r\n0\r\n\r\n",
    "\xb5\r\nhello\r\n0\r\n\r\n",
    "5\nhello\r\n0\r\n\r\n",
    "5\rhello\r\n0\r\n\r\n",
    "5\r\r\nhello\r\n0\r\n\r\n",
    "5\r\nhello\n0\r\n\r\n",
    "5\r\nhello\r0\r\n\r\n",
    "5\r\nhello0\r\n\r\n",
    "5\r\nhelloXX0\r\n\r\n",
    "5\r\nhello\rX0\r\n\r\n",
    "5\r\nhelloX\n0\r\n\r\n",
    "5\r\nhello!\r\n0\r\n\r\n",
    "5\r\nhell\r\n0\r\n\r\n",
    "5\r\nhello\r\n\r\n0\r\n\r\n",
    "5\r\nhello\r\n0\n\r\n",
    "5\r\nhello\r\n0\r\n\n",
    "5\r\nhello\r\n0\n\n",
    "5\r\nhello\r\n0\r\r\n",
    "5\r\nhello\r\n0\r\n\r\r\n",
    "5\r\nhello\r\n0\r\nX\n",
    "5\r\nhello\r\n0 \r\n\r\n",
    "5\r\nhello\r\n0;\r\n\r\n",
    "5;\r\nhello\r\n0\r\n\r\n",
    "5;;\r\nhello\r\n0\r\n\r\n",
    "5;a\r\nhello\r\n0\r\n\r\n",
    "5;a=\r\nhello\r\n0\r\n\r\n",
    "5;=b\r\nhello\r\n0\r\n\r\n",
    "5;a=b\r\nhello\r\n0;c=d\r\n\r\n",
    "5;a=b;c\r\nhello\r\n0\r\n\r\n",
    "5 ; a = b\r\nhello\r\n0\r\n\r\n",
    "5;\ta\r\nhello\r\n0\r\n\r\n",
    "5;a b\r\nhello\r\n0\r\n\r\n",
    "5;a,b\r\nhello\r\n0\r\n\r\n",
    "5;a=b=c\r\nhello\r\n0\r\n\r\n",
    "5;(a)\r\nhello\r\n0\r\n\r\n",
    '5;a="b"\r\nhello\r\n0\r\n\r\n',
    '5;a="b;c\\"d"\r\nhello\r\n0\r\n\r\n',
    '5;a="b\r\nhello\r\n0\r\n\r\n',
    '5;a="b\r\nc"\r\nhello\r\n0\r\n\r\n',
    '5;a="b\nc"\r\nhello\r\n0\r\n\r\n',
    "5;a='b\r\nhello\r\n0\r\n\r\n",
    "5;\nhello\r\n0\r\n\r\n",
    "5;a\nhello\r\n0\r\n\r\n",
    "5;a\rhello\r\n0\r\n\r\n",
    "5;\r\n\r\nhello\r\n0\r\n\r\n",
    "0;a=b\n\r\n",
    "0\r\nA: b\r\n\r\n",
    "0\r\nA: b\r\nB: c\r\n\r\n",
    "0\r\nA:\r\n\r\n",
    "0\r\nA : b\r\n\r\n",
    "0\r\n: b\r\n\r\n",
    "0\r\nA\r\n\r\n",
    "0\r\n A: b\r\n\r\n",
    "0\r\nA: b\r\n c\r\n\r\n",
    "0\r\nA: b\n\r\n",
    "0\r\nA: b\r\n\n",
    "0\r\nA: b\n\n",
    "0\r\nA: b\rB: c\r\n\r\n",
    "0\r\nA\xe4: b\r\n\r\n",
    "0\r\nA: b\xe4\r\n\r\n",
    "0\r\nContent-Length: 5\r\n\r\n",
    "0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "0\r\nHost: evil\r\n\r\n",
    "0\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n",
    "0\r\nGET / HTTP/1.1\r\n\r\n",
    "0\r\n0\r\n\r\n",
    "hello",
]
UPGRADES = [
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Connection: Upgrade & Upgrade: websocket",
    "Connection: upgrade & Upgrade: WebSocket & Sec-WebSocket-Version: 13",
    "Connection: keep-alive, Upgrade & Upgrade: websocket",
    "Connection: Upgrade & Connection: close & Upgrade: websocket",
    "Connection: Upgrade & Upgrade: websocket & Upgrade: h2c",
    "Connection: Upgrade & Upgrade: websocket, h2c",
    "Connection: Upgrade & Upgrade: h2c, websocket",
    "Connection: Upgrade & Upgrade: ,h2c",
    "Connection: Upgrade & Upgrade: h2c",
    "Connection: Upgrade & Upgrade: H2C",
    "Connection: Upgrade & Upgrade: h2",
    "Connection: Upgrade & Upgrade: h2c/1",
    "Connection: Upgrade & Upgrade: h2c;a",
    "Connection: Upgrade & Upgrade: h2c x",
    "Connection: Upgrade & Upgrade: \x0bh2c",
    "Connection: Upgrade & Upgrade:",
    "Connection: Upgrade & Upgrade: TLS/1.0",
    "Connection: Upgrade & Upgrade: mdm-tunnel/1",
    "Connection: Upgrade, HTTP2-Settings & Upgrade: h2c & HTTP2-Settings: AAMAAABk",
    "Connection: HTTP2-Settings & Upgrade: h2c & HTTP2-Settings: AAMAAABk",
    "Connection: X-Upgrade & Upgrade: h2c",
    "Upgrade: h2c & HTTP2-Settings: AAMAAABk",
]
CONNECTIONS = [
    "close",
    "Close",
    "keep-alive",
    "keep-alive, close",
    "close, keep-alive",
    "",
    ",",
    "close,",
    ",close",
    '"close"',
    "close;a",
    "close close",
    "x",
    "a b",
    "(",
    "Host",
    "close, host",
    "Content-Length",
    "Transfer-Encoding",
    "Connection",
    "Upgrade",
    "TE",
    "Cookie",
    "Authorization",
    "X-Forwarded-For",
    "X-Forwarded-Host, X-Forwarded-Proto",
    "close\r\nConnection: Host",
    "close\r\nConnection: keep-alive",
]
TWO = "GET /second HTTP/1.1\r\nHost: {host}\r\n\r\n"
PIPELINES = {
    "two": request() + TWO.encode(),
    "five": request() + 4 * TWO.encode(),
    "after a length": post("Content-Length: 5", body="hello" + TWO),
    "after a length of 0": post("Content-Length: 0", body=TWO),
    "after no length": post(body=TWO),
    "after chunks": chunked("1\r\na\r\n0\r\n\r\n" + TWO),
    "after a trailer": chunked("0\r\nA: b\r\n\r\n" + TWO),
    "after HEAD": request(first="HEAD / HTTP/1.1", body=TWO),
    "after HEAD with a length": request(
        "Content-Length: 5", first="HEAD / HTTP/1.1", body="hello" + TWO
    ),
    "after OPTIONS *": request(first="OPTIONS * HTTP/1.1", body=TWO),
    "after close": request("Connection: close", body=TWO),
    "after close with a length": post(
        "Connection: close", "Content-Length: 5", body="hello" + TWO
    ),
    "after 1.0": request(first="GET / HTTP/1.0", body=TWO),
    "after 1.0 kept alive": request(
        "Connection: keep-alive", first="GET / HTTP/1.0", body=TWO
    ),
    "after a body in 1.0": post("Content-Length: 5", version="1.0", body="hello" + TWO),
    "after a body without length in 1.0": post(version="1.0", body="hello"),
    "after chunks in 1.0": post(
        "Transfer-Encoding: chunked", version="1.0", body="0\r\n\r\n"
    ),
    "after chunks and length in 1.0": post(
        "Transfer-Encoding: chunked",
        "Content-Length: 5",
        version="1.0",
        body="0\r\n\r\n",
    ),
    "after chunks in 1.0 kept alive": post(
        "Transfer-Encoding: chunked",
        "Connection: keep-alive",
        version="1.0",
        body="0\r\n\r\n",
    ),
    "after chunks in 1.2": post(
        "Transfer-Encoding: chunked", version="1.2", body="0\r\n\r\n"
    ),
    "after a GET with a length": request("Content-Length: 5", body="hello" + TWO),
    "after a GET with chunks": request(
        "Transfer-Encoding: chunked", body="0\r\n\r\n" + TWO
    ),
    "after a TRACE with a length": request(
        "Content-Length: 5", first="TRACE / HTTP/1.1", body="hello"
    ),
    "after a body one too long": post("Content-Length: 5", body="hello!"),
    "after a body and a CRLF": post("Content-Length: 5", body="hello\r\n"),
    "after a body and an LF": post("Content-Length: 5", body="hello\n"),
    "after a body and a space": post("Content-Length: 5", body="hello "),
    "after a body and a NUL": post("Content-Length: 5", body="hello\0"),
    "after a request for h2c": request(
        "Connection: Upgrade", "Upgrade: h2c", body="PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    ),
    "after a request for a WebSocket": request(
        "Connection: Upgrade", "Upgrade: websocket", KEY, body=TWO
    ),
    "after a request for a WebSocket without key": request(
        "Connection: Upgrade", "Upgrade: websocket", body=TWO
    ),
    "a second that is bad": request() + b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "a second without Host": request() + b"GET / HTTP/1.1\r\n\r\n",
    "a second with two lengths": request()
    + post("Content-Length: 5", "Content-Length: 6", body="hello"),
    "a second in 0.9": request() + b"GET /\r\n",
}
LONG = {
    "target of 4000": request(first="GET /%s HTTP/1.1" % ("x" * 4000)),
    "target of 9000": request(first="GET /%s HTTP/1.1" % ("x" * 9000)),
    "target of 15000": request(first="GET /%s HTTP/1.1" % ("x" * 15000)),
    "target of 17000": request(first="GET /%s HTTP/1.1" % ("x" * 17000)),
    "target of 70000": request(first="GET /%s HTTP/1.1" % ("x" * 70000)),
    "method of 100": request(first="%s / HTTP/1.1" % ("X" * 100)),
    "method of 17000": request(first="%s / HTTP/1.1" % ("X" * 17000)),
    "version of 1000": request(first="GET / HTTP/1.%s" % ("1" * 1000)),
    "value of 4000": request("A: " + "x" * 4000),
    "value of 9000": request("A: " + "x" * 9000),
    "value of 14000": request("A: " + "x" * 14000),
    "value of 60000": request("A: " + "x" * 60000),
    "value of 70000": request("A: " + "x" * 70000),
    "blanks of 4000": request("A: " + " " * 4000 + "x"),
    "name of 1000": request("x" * 1000 + ": b"),
    "name of 9000": request("x" * 9000 + ": b"),
    "name without end": request("x" * 70000),
    "100 fields": request(*["A%d: b" % number for number in range(90)]),
    "199 fields": request(*["A%d: b" % number for number in range(190)]),
    "250 fields": request(*["A%d: b" % number for number in range(250)]),
    "1000 fields": request(*["A%d: b" % number for number in range(1000)]),
    "Host of 255": request(host="Host: {host}." + "x" * 200),
    "Host of 300": request(host="Host: {host}." + "x" * 300),
    "Host of 5000": request(host="Host: {host}." + "x" * 5000),
    "length of 1000 zeros": sized(" " + "0" * 1000 + "5"),
    "coding of 1000": coded(" " + "chunked, " * 100 + "chunked"),
    "Connection of 1000 words": request("Connection: " + "a," * 1000 + "close"),
    "1000 chunks": chunked("1\r\nx\r\n" * 1000 + "0\r\n\r\n"),
    "chunk size of 1000 zeros": chunked("0" * 1000 + "\r\n\r\n"),
    "extension of 500": chunked("1;a=%s\r\nx\r\n0\r\n\r\n" % ("b" * 500)),
    "extension of 5000": chunked("1;a=%s\r\nx\r\n0\r\n\r\n" % ("b" * 5000)),
    "extension of 70000": chunked("1;a=%s\r\nx\r\n0\r\n\r\n" % ("b" * 70000)),
    "500 extensions": chunked("1%s\r\nx\r\n0\r\n\r\n" % (";a" * 500)),
    "50 trailers": chunked("0\r\n%s\r\n" % ("A: b\r\n" * 50)),
    "300 trailers": chunked("0\r\n%s\r\n" % ("A: b\r\n" * 300)),
    "trailer of 5000": chunked("0\r\nA: %s\r\n\r\n" % ("b" * 5000)),
    "10 empty lines before": b"\r\n" * 10 + request(),
    "1000 empty lines before": b"\r\n" * 1000 + request(),
}


def name_of(group: str, variation: str) -> str:
    """What a row is called: short, printable, and the same each time."""
    text = repr(variation)[1:-1].replace("{host}", "H")
    return "%s: %s" % (group, text)


def place_bytes(places: Dict[str, str], build: Callable[[str], bytes]) -> List[Row]:
    """Each of BYTES in each place."""
    return [
        Row("byte %02x: %s" % (ord(byte), place), build(text.replace("@", byte)))
        for place, text in places.items()
        for byte in BYTES
    ]


def make_requests() -> List[Row]:
    groups: List[Tuple[str, List[str], Callable[[str], bytes]]] = [
        ("line", LINES, lambda text: request(first=text)),
        ("version", VERSIONS, lambda text: request(first="GET / " + text)),
        ("target", TARGETS, lambda text: request(first="GET %s HTTP/1.1" % text)),
        ("authority", AUTHORITIES, absolute),
        ("host", HOSTS, lambda text: request(host=text)),
        ("host in 1.0", HOSTS, lambda text: request(first="GET / HTTP/1.0", host=text)),
        ("field", FIELDS, request),
        ("end", ENDS, plain),
        ("length", LENGTHS, sized),
        ("name", NAMES, request),
        ("coding", CODINGS, coded),
        ("framing", FRAMINGS, framed),
        ("chunk", CHUNKS, chunked),
        ("upgrade", UPGRADES, upgrading),
        ("connection", CONNECTIONS, lambda text: request("Connection: " + text)),
    ]
    rows = [
        Row(name_of(group, variation), build(variation))
        for group, variations, build in groups
        for variation in variations
    ]
    rows += place_bytes(PLACES, plain) + place_bytes(CHUNK_PLACES, chunked)
    rows += [Row("pipeline: " + name, raw) for name, raw in PIPELINES.items()]
    rows += [Row("long: " + name, raw) for name, raw in LONG.items()]
    return [row._replace(method=method_of(row.raw)) for row in rows]


def method_of(raw: bytes) -> str:
    return "HEAD" if raw.startswith(b"HEAD ") else "GET"


# -----------------------------------------------------------------------------------
# Answers of a service
# -----------------------------------------------------------------------------------
def answer(*lines: str, first: str = "HTTP/1.1 200 OK", body: str = "") -> bytes:
    return request(*lines, first=first, host="", body=body)


def answer_sized(length: str) -> bytes:
    return answer("Content-Length:" + length, body="hello")


def answer_coded(coding: str) -> bytes:
    return answer("Transfer-Encoding:" + coding, body="5\r\nhello\r\n0\r\n\r\n")


def answer_chunked(body: str) -> bytes:
    return answer("Transfer-Encoding: chunked", body=body)


STATUS_LINES = [
    "HTTP/1.1 200 OK",
    "HTTP/1.1 200 ",
    "HTTP/1.1 200",
    "HTTP/1.1 200 Not really; OK, \xe4",
    "HTTP/1.1 200 O\tK",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 203 OK",
    "HTTP/1.1 399 X",
    "HTTP/1.2 200 OK",
    "HTTP/1.10 200 OK",
    "HTTP/2 200 OK",
    "HTTP/2.0 200 OK",
    "HTTP/0.9 200 OK",
    "HTTP/1 200 OK",
    "http/1.1 200 OK",
    "HTTPS/1.1 200 OK",
    "RTSP/1.0 200 OK",
    "ICY 200 OK",
    "200 OK",
    "HTTP/1.1 OK",
    "HTTP/1.1",
    "HTTP/1.1  200 OK",
    " HTTP/1.1 200 OK",
    "HTTP/1.1\t200 OK",
    "HTTP/1.1 200\tOK",
    "HTTP/1.1 200OK",
    "HTTP/1.1 20 OK",
    "HTTP/1.1 2000 OK",
    "HTTP/1.1 2x0 OK",
    "HTTP/1.1 +20 OK",
    "HTTP/1.1 -20 OK",
    "HTTP/1.1 000 OK",
    "HTTP/1.1 099 OK",
    "HTTP/1.1 600 OK",
    "HTTP/1.1 999 OK",
    "HTTP/1.1 200 O\0K",
    "HTTP/1.1 200 O\x1bK",
    "HTTP/1.1 200 O\rK",
    "HTTP/1.1 200 O\x7fK",
    "HTTP/1.1 200 OK\r",
    "GET / HTTP/1.1",
    "garbage",
]
ANSWER_FIELDS = [
    "A:",
    "A:b",
    "A: b\xe4",
    "A_B: c",
    "A : b",
    "A\t: b",
    ": b",
    "A",
    "A b: c",
    " A: b",
    "A: b\r\n c",
    "A\xe4: b",
    "A(: b",
    "A@: b",
    "A\0: b",
    "A: b\0c",
    "A: b\x1bc",
    "A: b\x7fc",
    "A: b\rc",
    "A: b\r",
    "A: b\nB: c",
    "Connection: close",
    "Connection: Content-Length",
    "Connection: Transfer-Encoding",
    "Connection: Set-Cookie",
    "Content_Length: 5",
    "Content-Length : 5",
    "Transfer-Encoding : chunked",
    "Transfer_Encoding: chunked",
    "Upgrade: websocket",
    "Connection: Upgrade\r\nUpgrade: h2c",
]
ANSWER_ENDS = [
    "HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    "HTTP/1.1 200 OK\r\nContent-Length: 5\n\r\nhello",
    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\nhello",
    "HTTP/1.1 200 OK\rContent-Length: 5\r\rhello",
    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\r\n\r\nhello",
    "HTTP/1.1 200 OK\r\n\r\nContent-Length: 5\r\n\r\nhello",
    "\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    " HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "HTTP/1.1 200 OK\r\n Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "\0HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "hello",
]
ANSWER_LENGTHS = [
    " 5",
    " 05",
    " 0000000000000000005",
    "",
    " +5",
    " -5",
    " 5.0",
    " 0x5",
    " 5 5",
    " 5,",
    " 5, 5",
    " 5, 6",
    " 5;a",
    ' "5"',
    " \xb2",
    " 5\xa0",
    " 5\0",
    " 5\x0b",
    " 18446744073709551621",
    "\r\n 5",
    " 5\r\nContent-Length: 5",
    " 5\r\nContent-Length: 6",
    " 5\r\nContent-Length:",
    " 5\r\nTransfer-Encoding: chunked",
    " 5\r\nTransfer-Encoding: identity",
    " 5\r\nTransfer-Encoding:",
    " 5\r\nTransfer-Encoding : chunked",
]
ANSWER_CODINGS = [
    " chunked",
    " Chunked",
    "",
    " chunked,",
    " ,chunked",
    " chunked, chunked",
    " identity",
    " identity, chunked",
    " gzip, chunked",
    " chunked, gzip",
    " gzip",
    " xchunked",
    " chunked;q=1",
    ' "chunked"',
    " chunked\0",
    " \x0bchunked",
    " chunked\xa0",
    "\r\n chunked",
    " chunked\r\nTransfer-Encoding: chunked",
    " chunked\r\nTransfer-Encoding: identity",
    " identity\r\nTransfer-Encoding: chunked",
    " chunked\r\nContent-Length: 5",
    " chunked\r\nContent-Length:",
    " chunked\r\nConnection: Transfer-Encoding",
]
WHOLE = "Content-Length: 5\r\n\r\nhello"
MORE = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
ANSWERS = {  # name: what is sent; those in ENDING close after it
    "a length": "HTTP/1.1 200 OK\r\n" + WHOLE,
    "bytes beyond a length": "HTTP/1.1 200 OK\r\n%s!" % WHOLE,
    "an answer beyond a length": "HTTP/1.1 200 OK\r\n" + WHOLE + MORE,
    "an answer beyond chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    "0\r\n\r\n" + MORE,
    "an answer beyond 204": "HTTP/1.1 204 X\r\n\r\n" + MORE,
    "an answer beyond 304": "HTTP/1.1 304 X\r\n\r\n" + MORE,
    "204 with a length of 0": "HTTP/1.1 204 X\r\nContent-Length: 0\r\n\r\n",
    "204 with a body": "HTTP/1.1 204 X\r\n" + WHOLE,
    "204 with chunks": "HTTP/1.1 204 X\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "304 with a length": "HTTP/1.1 304 X\r\nContent-Length: 5\r\n\r\n",
    "304 with a body": "HTTP/1.1 304 X\r\n" + WHOLE,
    "205 with a body": "HTTP/1.1 205 X\r\n" + WHOLE,
    "100 before": "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + WHOLE,
    "103 before": "HTTP/1.1 103 Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\n" + WHOLE,
    "199 before": "HTTP/1.1 199 X\r\n\r\nHTTP/1.1 200 OK\r\n" + WHOLE,
    "100 with a length of 0": "HTTP/1.1 100 X\r\nContent-Length: 0\r\n\r\n"
    "HTTP/1.1 200 OK\r\n" + WHOLE,
    "100 with a body": "HTTP/1.1 100 X\r\n" + WHOLE + "HTTP/1.1 200 OK\r\n" + WHOLE,
    "100 with two lengths": "HTTP/1.1 100 X\r\nContent-Length: 5\r\nContent-Length: 6"
    "\r\n\r\nHTTP/1.1 200 OK\r\n" + WHOLE,
    "200 times 100": "HTTP/1.1 100 X\r\n\r\n" * 200 + "HTTP/1.1 200 OK\r\n" + WHOLE,
    "101 unasked": "HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
    "101 without Upgrade": "HTTP/1.1 101 X\r\n\r\n",
    "until the end": "HTTP/1.1 200 OK\r\n\r\nhello",
    "until the end in 1.0": "HTTP/1.0 200 OK\r\n\r\nhello",
    "too short": "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
    "no last chunk": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    "5\r\nhello\r\n",
    "no end of the last chunk": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    "5\r\nhello\r\n0\r\n",
    "half a chunk": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
    "chunks in 1.0": "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    "5\r\nhello\r\n0\r\n\r\n",
    "chunks and length in 1.0": "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n"
    "Content-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "two lengths, closed": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6"
    "\r\n\r\nhello",
    "half a head": "HTTP/1.1 200 OK\r\nA: b\r\n",
    "half a status line": "HTTP/1.1 2",
    "nothing": "",
    "100 and nothing": "HTTP/1.1 100 X\r\n\r\n",
    "250 fields": "HTTP/1.1 200 OK\r\n" + "A: b\r\n" * 250 + WHOLE,
    "value of 3000": "HTTP/1.1 200 OK\r\nA: %s\r\n%s" % ("b" * 3000, WHOLE),
    "value of 20000": "HTTP/1.1 200 OK\r\nA: %s\r\n%s" % ("b" * 20000, WHOLE),
    "value of 70000": "HTTP/1.1 200 OK\r\nA: %s\r\n%s" % ("b" * 70000, WHOLE),
}
ENDING = [
    "until the end",
    "until the end in 1.0",
    "too short",
    "no last chunk",
    "no end of the last chunk",
    "half a chunk",
    "chunks in 1.0",
    "chunks and length in 1.0",
    "two lengths, closed",
    "half a head",
    "half a status line",
    "nothing",
    "100 and nothing",
]
TO_HEAD = {
    "a length": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    "chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a body": "HTTP/1.1 200 OK\r\n" + WHOLE,
    "two lengths": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "length and chunks": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"
    "Transfer-Encoding: chunked\r\n\r\n",
}


def make_answers() -> List[Row]:
    groups: List[Tuple[str, List[str], Callable[[str], bytes]]] = [
        ("status", STATUS_LINES, lambda x: answer(first=x) + b""),
        ("field", ANSWER_FIELDS, answer),
        ("end", ANSWER_ENDS, plain),
        ("length", ANSWER_LENGTHS, answer_sized),
        ("coding", ANSWER_CODINGS, answer_coded),
        ("chunk", CHUNKS, answer_chunked),
    ]
    rows = []
    for group, variations, build in groups:
        for variation in variations:
            raw = build(variation)
            if group in ("status", "field"):
                raw = raw[:-2] + WHOLE.encode()
            rows.append(Row("answer's " + name_of(group, variation), raw))
    for name, text in ANSWERS.items():
        rows.append(Row("answer: " + name, plain(text), ends=name in ENDING))
    for name, text in TO_HEAD.items():
        rows.append(Row("answer to HEAD: " + name, plain(text), "HEAD"))
    return rows


# -----------------------------------------------------------------------------------
# The judge: reads as strictly as can be, and knows nothing of how we read.
# -----------------------------------------------------------------------------------
class Ambiguous(Exception):
    """What two parsers could read in two ways."""


TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
TEXT = r"[\t\x20-\x7e\x80-\xff]"
FIELD = re.compile("(%s):[\t ]*(%s*?)[\t ]*" % (TOKEN, TEXT))
FIRST = re.compile(r"%s (?:/[!-\"$-~]*|\*) HTTP/1\.([01])" % TOKEN)
STATUS = re.compile(r"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: %s*)?" % TEXT)
QUOTED = r'"(?:[^"\\\r\n\0]|\\[^\r\n\0])*"'
SIZE = re.compile(
    r"([0-9A-Fa-f]{1,8})(?:[\t ]*;[\t ]*%s(?:[\t ]*=[\t ]*(?:%s|%s))?)*"
    % (TOKEN, TOKEN, QUOTED)
)
FRAMING = ("content-length", "transfer-encoding")
HOST = re.compile(r"(?:[0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")


class Message:
    """One message at the start of `data`; `end` is None while it is not whole."""

    def __init__(self, data: bytes, method: str = "", closed: bool = False) -> None:
        """An answer, if a `method` was asked. `closed`: no more will come."""
        self.end: Optional[int] = None
        self.first, self.status = "", 0
        self.fields: Dict[str, List[str]] = {}
        size = data.find(b"\r\n\r\n") + 4
        if size < 4:
            return
        self.first, *lines = data[: size - 4].decode("latin-1").split("\r\n")
        for line in lines:
            match = FIELD.fullmatch(line)
            if not match:
                raise Ambiguous("field %r" % line[:80])
            self.fields.setdefault(match.group(1).lower(), []).append(match.group(2))
        match = (STATUS if method else FIRST).fullmatch(self.first)
        if not match:
            raise Ambiguous("first line %r" % self.first[:80])
        self.status = int(match.group(2)) if method else 0
        framing = self.framing(match.group(1) == "0")
        if method == "HEAD" or self.status in (204, 304, *range(100, 200)):
            framing = "0"
        if framing == "chunked":
            self.end = end_of_chunks(data, size)
        elif framing or not method:
            end = size + int(framing or "0")
            self.end = end if end <= len(data) else None
        elif closed:
            self.end = len(data)

    def framing(self, old: bool) -> str:
        """`chunked`, a length, or nothing."""
        lengths = self.fields.get("content-length", [])
        codings = self.fields.get("transfer-encoding", [])
        if len(lengths + codings) > 1:
            raise Ambiguous("framed %d times" % len(lengths + codings))
        if codings and (old or codings[0].lower() != "chunked"):
            raise Ambiguous("coding %r" % codings[0][:80])
        if lengths and not re.fullmatch("[0-9]{1,18}", lengths[0]):
            raise Ambiguous("length %r" % lengths[0][:80])
        return codings[0].lower() if codings else "".join(lengths)

    def judge_request(self, host: str) -> None:
        """What must hold of a request that we pass on."""
        hosts = self.fields.get("host", [])
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            raise Ambiguous("Host %r" % hosts)
        if not hosts[0].lower().startswith(host):
            raise Ambiguous("Host of somebody else: %r" % hosts)
        upgrade = ",".join(self.fields.get("upgrade", [])).lower()
        if "h2c" in re.split("[^0-9a-z]+", upgrade):
            raise Ambiguous("Upgrade: %s" % upgrade)
        for name in self.fields:
            if "_" in name and name.replace("_", "-") in FRAMING:
                raise Ambiguous("%s, which CGI cannot tell from framing" % name)
        named = ",".join(self.fields.get("connection", [])).lower()
        if re.search("host|content-length|transfer-encoding", named):
            raise Ambiguous("Connection: %s" % named)


def end_of_line(data: bytes, at: int) -> Optional[int]:
    """Behind the CRLF of the line that begins there."""
    end = data.find(b"\n", at) + 1
    if end == 0:
        return None
    if data[end - 2 : end] != b"\r\n":
        raise Ambiguous("a line without CR")
    return end


def end_of_chunks(data: bytes, at: int) -> Optional[int]:
    while True:
        end = end_of_line(data, at)
        if end is None:
            return None
        match = SIZE.fullmatch(data[at : end - 2].decode("latin-1"))
        if not match:
            raise Ambiguous("chunk line %r" % data[at : end - 2][:80])
        at = end + int(match.group(1), 16)
        if at == end:
            return end_of_trailer(data, at)
        if not b"\r\n".startswith(data[at : at + 2]):
            raise Ambiguous("a chunk longer than it says")
        at += 2


def end_of_trailer(data: bytes, at: int) -> Optional[int]:
    while True:
        end = end_of_line(data, at)
        if end is None or end == at + 2:
            return end
        if not FIELD.fullmatch(data[at : end - 2].decode("latin-1")):
            raise Ambiguous("trailer %r" % data[at : end - 2][:80])
        at = end


# -----------------------------------------------------------------------------------
# The service, and the visitor
# -----------------------------------------------------------------------------------
class Service:
    """Keeps what comes. The request for /last, and all when no row is set as `says`,
    get an answer that is in order; the others what `says` has."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.says: Optional[Row] = None
        self.forget()

    def forget(self) -> None:
        self.whole = 0  # requests
        self.faults: List[str] = []

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        data = b""
        try:
            while True:
                piece = await reader.read(1 << 16)
                if not piece:
                    break
                data = self.take(data + piece, writer)
        except (OSError, Ambiguous) as fault:
            if isinstance(fault, Ambiguous):
                self.faults.append(str(fault))
                writer.write(answer("Connection: close", "Content-Length: 0"))
        writer.close()

    def take(self, data: bytes, writer: asyncio.StreamWriter) -> bytes:
        """Answer what is whole; the rest."""
        while data:
            message = Message(data)
            if message.first:
                message.judge_request(self.host)
            if message.end is None:
                break
            data = data[message.end :]
            self.whole += 1
            self.answer(message, writer)
        return data

    def answer(self, message: Message, writer: asyncio.StreamWriter) -> None:
        method, target, _ = message.first.split(" ")
        if target == "/last":
            writer.write(answer("Content-Length: 4", body="last"))
        elif self.says:
            writer.write(self.says.raw)
            if self.says.ends:
                writer.write_eof()
        else:
            body = "" if method == "HEAD" else "ok"
            writer.write(answer("Content-Length: 2", body=body))


class Verdict(NamedTuple):
    """What became of a row through one of the three."""

    answers: List[str]  # status of each that came whole; `cut`, `waits`, `bad` at last
    faults: List[str]  # what the service, or the visitor, got

    @property
    def accepted(self) -> int:
        """How many were, before the first that was not."""
        good = [status[0] in "23" for status in self.answers]  # 4, 5: their own words
        return (good + [False]).index(False)

    def __str__(self) -> str:
        return " ".join(self.answers) + (" !" if self.faults else "")


async def exchange(port: int, raw: bytes) -> Tuple[bytes, str]:
    """Send it all; what came back, and how it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    came, end = b"", "closed"
    try:
        writer.write(raw)
        while True:
            piece = await asyncio.wait_for(reader.read(1 << 16), PATIENCE)
            if not piece:
                break
            came += piece
    except asyncio.TimeoutError:
        end = "waits"
    except OSError:
        end = "cut"
    writer.close()
    return came, end


def read_answers(data: bytes, end: str, method: str) -> Verdict:
    """What a strict visitor makes of it."""
    answers: List[str] = []
    while data:
        try:
            message = Message(data, method, end == "closed")
        except Ambiguous as fault:
            return Verdict(answers + ["bad"], [str(fault)])
        if message.end is None:
            return Verdict(answers + [end if end == "waits" else "cut"], [])
        if message.status == 101 or message.status >= 200:
            answers.append(str(message.status))
            method = "GET"
        data = data[message.end :]
    if end == "waits" or not answers:
        answers.append(end)
    return Verdict(answers, [])


LAST = "GET /last HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"


class Lane:
    """One way to one service, on which rows go one after the other."""

    def __init__(self, port: int, service_port: int, host: str) -> None:
        self.port, self.service_port = port, service_port
        self.host = host
        self.service = Service(host)

    async def ask(self, row: Row) -> Verdict:
        """A request, and another."""
        raw = (row.raw + LAST.encode()).replace(b"{host}", self.host.encode())
        self.service.forget()
        came, end = await exchange(self.port, raw)
        verdict = read_answers(came, end, row.method)
        faults = verdict.faults + self.service.faults
        if self.service.whole > sum(one[0] in "23" for one in verdict.answers):
            faults.append("the service saw %d whole requests" % self.service.whole)
        return verdict._replace(faults=faults)

    async def hear(self, row: Row) -> Verdict:
        """An answer, and that to another request."""
        first = request(first=row.method + " / HTTP/1.1")
        raw = (first + LAST.encode()).replace(b"{host}", self.host.encode())
        self.service.says = row
        came, end = await exchange(self.port, raw)
        self.service.says = None
        verdict = read_answers(came, end, row.method)
        if b"poison" in came:
            verdict.faults.append("poison")
        return verdict


# -----------------------------------------------------------------------------------
# All three
# -----------------------------------------------------------------------------------
Table = Dict[str, List[Verdict]]  # by row, in the order of SYSTEMS


def start_lanes(server: Server, client_id: str) -> Tuple[Client, List[List[Lane]]]:
    """Our client, and the lanes through each of SYSTEMS."""
    services = free_ports(3 * LANES)
    ours, haproxies, nginxes = [services[at::3] for at in range(3)]
    names = ["raw%d" % number for number in range(LANES)]
    client = Client(server, client_id, dict(zip(names, ours)))
    ports = free_ports(2 * LANES)
    text = "".join(
        HAPROXY_FRONT % (port, port, service)
        for port, service in zip(ports[:LANES], haproxies)
    )
    start_haproxy("strict-haproxy", text, *ports[:LANES])
    text = "".join(NGINX_FRONT % pair for pair in zip(ports[LANES:], nginxes))
    start_nginx("strict-nginx", text, *ports[LANES:])
    doors = [[server.port] * LANES, ports[:LANES], ports[LANES:]]
    hosts = [client.host(name) for name in names]
    behind = [ours, haproxies, nginxes]
    return client, [
        [Lane(*lane) for lane in zip(*system, hosts)] for system in zip(doors, behind)
    ]


def start_haproxy(name: str, fronts: str, *ports: int) -> None:
    config = TMP / (name + ".cfg")
    config.write_text(HAPROXY + fronts)
    haproxy = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin")
    process = Process(name, haproxy or "haproxy", "-db", "-f", str(config))
    process.wait_until_listening(*ports)


async def walk(
    lane: Lane, rows: Iterator[Row], hear: bool, found: Dict[str, Verdict]
) -> None:
    for row in rows:
        found[row.name] = await (lane.hear if hear else lane.ask)(row)


async def walk_all(systems: List[List[Lane]]) -> Tuple[Table, Table]:
    """What each of SYSTEMS does with all requests, and with all answers."""
    servers = [
        await asyncio.start_server(lane.service.serve, "127.0.0.1", lane.service_port)
        for lanes in systems
        for lane in lanes
    ]
    tables = []
    for rows, hear in ((make_requests(), False), (make_answers(), True)):
        found: List[Dict[str, Verdict]] = [{} for _ in systems]
        walks = []
        for lanes, said in zip(systems, found):
            shared = iter(rows)
            walks += [walk(lane, shared, hear, said) for lane in lanes]
        await asyncio.gather(*walks)
        assert len(found[0]) == len(rows), "two rows have the same name"
        tables.append({row.name: [said[row.name] for said in found] for row in rows})
    for server in servers:
        server.close()
    return tables[0], tables[1]


def measure(server: Server) -> Tuple[Table, Table]:
    client, systems = start_lanes(server, "strict")
    try:
        return asyncio.run(asyncio.wait_for(walk_all(systems), 100))
    finally:
        client.process.stop()


# Why we accept what another refuses; the rows by name.
REASONS = {
    "a method is any token (RFC 9110 9.1); the service decides": [
        "line: TRACE / HTTP/1.1",
        "line: get / HTTP/1.1",
        "line: GeT / HTTP/1.1",
        "line: G1 / HTTP/1.1",
        "line: 1 / HTTP/1.1",
        "line: !#$%&'*+.^`|~ / HTTP/1.1",
        "pipeline: after a TRACE with a length",
        "pipeline: after a body one too long",  # the next method is `!GET`
    ],
    "OPTIONS has this form (RFC 9112 3.2.4)": [
        "line: OPTIONS * HTTP/1.1",
        "pipeline: after OPTIONS *",
    ],
    "we do not decode paths: the service gets what was sent": [
        "target: /../x",
        "target: /%00",
        "target: /%zz",
        "target: /%",
    ],
    "a query may follow the host at once (RFC 3986 3): HAProxy takes it for the host": [
        "target: http://H?q",
    ],
    "the target's host counts, that of Host is dropped (RFC 9112 3.2.2)": [
        "target: http://H.:80/",
        "authority: http://H/ Host: other.example",
    ],
    "a tab is OWS (RFC 9110 5.6.3); the service gets none": [
        r"host: Host:\tH\t",
        r"host in 1.0: Host:\tH\t",
        r"length: \t5\t",
        r"coding: \tchunked\t",
        "byte 09: Host, before",
        "byte 09: Host, behind",
        "byte 09: length, before",
        "byte 09: length, behind",
        "byte 09: coding, before",
        "byte 09: coding, behind",
    ],
    "not the option `close` (RFC 9110 7.6.1): nginx looks for the letters": [
        'connection: "close"',
        "connection: close;a",
        "connection: close close",
    ],
    "the key of a WebSocket is between the visitor and the service (RFC 6455 4)": [
        "pipeline: after a request for a WebSocket without key",
    ],
    "everybody has limits of his own; ours are 16 KiB a line, 64 KiB, 200 fields": [
        "long: target of 9000",
        "long: target of 15000",
        "long: value of 9000",
        "long: value of 14000",
        "long: value of 60000",
        "long: name of 1000",
        "long: name of 9000",
        "long: 199 fields",
        "answer: value of 20000",
    ],
    "any number of 1xx may come first (RFC 9110 15.2), which nginx does not know": [
        "answer: 100 before",
        "answer: 103 before",
        "answer: 199 before",
        "answer: 100 with a length of 0",  # which goes no further
    ],
}
EXPLAINED = {name: reason for reason, names in REASONS.items() for name in names}


def complain(table: Table) -> List[str]:
    """What is wrong with what we do."""
    wrong = []
    for name, verdicts in table.items():
        ours, *others = verdicts
        if ours.faults:
            wrong.append("%s: %s: %s" % (name, ours, "; ".join(ours.faults)))
        elif ours.accepted > min(other.accepted for other in others):
            said = ["%s %s" % pair for pair in zip(SYSTEMS, verdicts)]
            if name not in EXPLAINED:
                wrong.append("%s: %s" % (name, ", ".join(said)))
    return wrong


def count(table: Table) -> str:
    """How many each refuses."""
    refused = []
    for at, system in enumerate(SYSTEMS):
        number = sum(not verdicts[at].accepted for verdicts in table.values())
        refused.append("%d by %s" % (number, system))
    return "of %d are refused %s" % (len(table), ", ".join(refused))


def raw_inputs_beside_haproxy_and_nginx(world: "World") -> str:
    """Where we accept what HAProxy or nginx refuses there is a reason."""
    requests, answers = measure(world.server)
    wrong = complain(requests) + complain(answers)
    unknown = set(EXPLAINED) - set(requests) - set(answers)
    wrong += ["there is no row %s" % name for name in sorted(unknown)]
    assert not wrong, "%d rows:\n%s" % (len(wrong), "\n".join(wrong))
    return "requests: %s; answers: %s" % (count(requests), count(answers))


def show(table: Table, differing: bool) -> None:
    """One line a row: * where we accept what another refuses, - the other way round."""
    for name, verdicts in table.items():
        ours, *others = [verdict.accepted for verdict in verdicts]
        mark = "*" if ours > min(others) else "-" if ours < max(others) else " "
        if differing and len({verdict.accepted for verdict in verdicts}) == 1:
            if not any(verdict.faults for verdict in verdicts):
                continue
        cells = ["%-12s" % str(verdict) for verdict in verdicts]
        note = EXPLAINED.get(name, "; ".join(verdicts[0].faults))
        print("%s %-60s %s %s" % (mark, name[:60], " ".join(cells), note))
    print(count(table))


def main(words: List[str]) -> None:
    start = time.monotonic()
    print("%-62s %-12s %-12s %-12s" % ("", *SYSTEMS))
    for table in measure(Server()):
        show(table, "differ" in words)
    print("%.1f s" % (time.monotonic() - start))


if __name__ == "__main__":
    main(sys.argv[1:])
