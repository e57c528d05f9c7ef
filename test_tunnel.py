#!/usr/bin/env python3
"""The tests of mdm-tunnel: `python3 test_tunnel.py`, or with names of classes or tests.

In the scripts' own order: promises, frames, loop, link, HTTP, names, services, command
lines, then end to end over loopback sockets. Nothing sleeps: tests on a fake clock move
it, real ones wait for a state of the programs' loops. Only the standard library.
"""

import argparse
import ast
import base64
import collections
import contextlib
import errno
import faulthandler
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import logging
import mmap
import os
import queue
import random
import re
import select
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib
from unittest import mock

import mdm_tunnel_client as client_module
import mdm_tunnel_server as server_module

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = ("mdm_tunnel_server.py", "mdm_tunnel_client.py")
Kind = server_module.Kind
LINGER = server_module.Ending.LINGER
PATIENCE = 20  # seconds after which a wait has failed; nothing here takes that long
HANG = 120  # seconds after which a test says where it stands, and ends the run
KIB = 1 << 10


def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


# -----------------------------------------------------------------------------------
# Promises: what the project is, beside what it does
# -----------------------------------------------------------------------------------
def shared_blocks(name):
    """What stands in both scripts: a block in each of their two parts."""
    block = r"(# SHARED BLOCK (\d): begins.*?# SHARED BLOCK \2: ends)"
    return re.findall(block, read(name), re.S)


class Promises(unittest.TestCase):
    def test_shared_blocks_are_the_same_in_both_scripts(self):
        server, client = map(shared_blocks, SCRIPTS)
        self.assertEqual([number for _, number in server], ["1", "2"])
        for (mine, _), (theirs, _) in zip(server, client):
            self.assertGreater(len(mine.splitlines()), 300)
            self.assertEqual(mine.splitlines(), theirs.splitlines())
        self.assertEqual(len(server), len(client))

    def test_shared_blocks_lean_on_nothing_outside_themselves(self):
        namespace = {"__name__": "shared"}
        exec("\n".join(block for block, _ in shared_blocks(SCRIPTS[0])), namespace)
        for name in ("Link", "Pipe", "Sealed", "Watched"):
            self.assertIn(name, namespace)

    def test_only_the_standard_library_is_imported(self):
        allowed = set(
            "argparse collections contextlib enum errno functools hashlib heapq hmac "
            "html http itertools json logging mmap os pwd queue random re resource "
            "selectors shlex signal socket ssl stat struct sys threading time "
            "traceback typing difflib urllib base64 ipaddress getpass socketserver "
            "calendar io bisect".split()
        )
        for name in SCRIPTS:
            for node in ast.walk(ast.parse(read(name))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module]
                for found in names:
                    self.assertIn(found.split(".")[0], allowed, name)

    def test_heavy_modules_are_imported_only_when_used(self):
        heavy = "logging random html http urllib.parse shlex queue ssl hmac hashlib"
        if sys.version_info[:2] != (3, 8):  # whose argparse imports these itself
            heavy += " shutil threading"
        code = "import sys; sys.path.insert(0, %r); import %s as script; "
        code += "script.parse_arguments([]); print(*sys.modules)"
        for name in SCRIPTS:
            command = [sys.executable, "-S", "-c", code % (HERE, name[:-3])]
            loaded = subprocess.check_output(command, timeout=PATIENCE).decode().split()
            self.assertIn(name[:-3], loaded)
            self.assertEqual(set(heavy.split()) & set(loaded), set(), name)

    def test_what_is_imported_later_is_imported_before_the_rights_go(self):
        later, before = set(), {"pwd", "resource", "ssl"}  # which are used at the start
        for function in ast.walk(ast.parse(read(SCRIPTS[0]))):
            if isinstance(function, ast.FunctionDef):
                found = before if function.name == "drop_privileges" else later
                for node in ast.walk(function):
                    if isinstance(node, ast.Import):
                        found.update(alias.name for alias in node.names)
        self.assertEqual(later - before, set())

    def test_only_the_server_knows_http(self):
        own = read("mdm_tunnel_client.py")
        for block, _ in shared_blocks("mdm_tunnel_client.py"):
            own = own.replace(block, "")
        before, _, behind = own.partition("\n# Inspector: ")  # which shows it to people
        own = before + behind.partition("\n# Command line\n")[2]
        for word in ("Content-Length", "Transfer-Encoding", "chunked", "GET /"):
            self.assertNotIn(word, own)

    def test_every_option_of_the_help_is_in_the_readme_and_the_reverse(self):
        readme = read("README.md")
        usage = re.findall(r"```\nusage: (mdm_tunnel_\w+\.py.*?)```", readme, re.S)
        self.assertEqual(len(usage), 2)
        for text in usage:
            script = text.split(None, 1)[0]
            printed = run_script(script, "--help").stdout
            self.assertEqual(
                sorted(set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text))),
                sorted(set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", printed))),
            )

    # Lines with comments, as they stand; a part that adds says how many it may.
    BUDGETS = {"shared": 2410, "server": 4430, "client": 2840}

    def sections(self, text):
        """The sections of a script or a block, by title, with their lines."""
        bar = re.escape("# " + 83 * "-")
        parts = re.split(r"(?m)^%s\n# (.+)\n" % bar, text)
        titles = [title.split(":")[0].split(".")[0] for title in parts[1::2]]
        return dict(zip(titles, (len(part.splitlines()) for part in parts[2::2])))

    def test_scripts_keep_their_budgets(self):
        blocks = [block for block, _ in shared_blocks(SCRIPTS[0])]
        texts = {"shared": "\n".join(blocks)}
        for which, script in zip(("server", "client"), SCRIPTS):
            texts[which] = read(script)
            for block in blocks:
                texts[which] = texts[which].replace(block, "")
        for which, text in texts.items():
            lines = len(text.splitlines())
            longest = sorted(self.sections(text).items(), key=lambda x: -x[1])[:5]
            said = "%s has %d lines; longest: %s" % (which, lines, longest)
            self.assertLessEqual(lines, self.BUDGETS[which], said)

    def test_readme_is_short_enough_to_be_read(self):
        self.assertLessEqual(len(read("README.md").splitlines()), 400)

    def test_every_source_is_within_88_columns(self):
        for name in SCRIPTS + ("test_tunnel.py",):
            wide = [line for line in read(name).splitlines() if len(line) > 88]
            self.assertEqual(wide, [], name)


Finished = collections.namedtuple("Finished", "status stdout stderr")


def run_script(script, *arguments, stdin=None, cwd=None, isolated=True, env=None):
    """Run a script to its end, alone in an empty folder."""
    flags = ["-I"] if isolated else []
    with tempfile.TemporaryDirectory() as empty:
        path = "-"
        if stdin is None:
            path = shutil.copy(os.path.join(HERE, script), empty)
        process = subprocess.Popen(
            [sys.executable] + flags + [path] + list(arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd or empty,
            universal_newlines=True,
            env={**os.environ, "COLUMNS": "100", **(env or {})},
        )
        out, err = process.communicate(stdin, timeout=PATIENCE)
        return Finished(process.returncode, out, err)


# -----------------------------------------------------------------------------------
# Frames
# -----------------------------------------------------------------------------------
def frame(kind, stream=0, payload=b"", length=None):
    length = len(payload) if length is None else length
    return struct.pack("!II", kind << 24 | length, stream) + payload


def read_frames(data, step=None, peer="server"):
    """The frames in `data`, fed in pieces of `step` bytes; DATA pieces put together."""
    reader = server_module.FrameReader(peer)
    found = []
    step = step or max(1, len(data))
    for at in range(0, len(data), step):
        reader.push(memoryview(data[at : at + step]))
        for kind, stream, payload in iter(reader.next, None):
            if kind == Kind.DATA and found and found[-1][:2] == (kind, stream):
                found[-1] = (kind, stream, found[-1][2] + bytes(payload))
            else:
                found.append((kind, stream, bytes(payload)))
    return found


class Frames(unittest.TestCase):
    GOOD = (
        frame(Kind.CHALLENGE, 0, b"{}")
        + frame(Kind.OPEN, 1, b'{"service":"web"}')
        + frame(Kind.DATA, 1, b"x" * 3000)
        + frame(Kind.END, 1)
        + frame(Kind.CREDIT, 2, struct.pack("!I", 5))
        + frame(Kind.RESET, 2, b"")
        + frame(Kind.PING, 0, b"12345678")
    )

    def test_frames_come_out_the_same_however_they_are_cut(self):
        whole = read_frames(self.GOOD)
        self.assertEqual(len(whole), 7)
        self.assertEqual(whole[2], (Kind.DATA, 1, b"x" * 3000))
        for step in (1, 2, 7, 8, 9, 100):
            self.assertEqual(read_frames(self.GOOD, step), whole)

    def test_data_is_handed_on_before_its_frame_is_whole(self):
        reader = server_module.FrameReader("server")
        part = memoryview(frame(Kind.DATA, 1, b"abc", length=1000))
        reader.push(part)
        self.assertEqual([bytes(p) for _, _, p in iter(reader.next, None)], [b"abc"])

    def test_every_limit_is_checked_before_the_payload_comes(self):
        for kind, (_, on_stream, least, most) in server_module.RULES.items():
            for length in {least - 1, most + 1} - {-1}:
                header = frame(kind, int(on_stream), length=length)
                peer = "client" if kind in (Kind.LOGIN, Kind.SERVICES) else "server"
                with self.assertRaises(server_module.ProtocolError, msg=kind):
                    read_frames(header, peer=peer)

    def test_wrong_frames_are_refused(self):
        table = [
            ("an unknown kind", frame(99)),
            ("kind 0", frame(0)),
            ("a stream's kind on the link", frame(Kind.DATA, 0, b"x")),
            ("the link's kind on a stream", frame(Kind.PING, 1, b"12345678")),
            ("LOGIN from the server", frame(Kind.LOGIN, 0, b"{}")),
            ("SERVICES from the server", frame(Kind.SERVICES, 0, b"{}")),
            ("empty DATA", frame(Kind.DATA, 1)),
            ("END with a payload", frame(Kind.END, 1, b"x")),
            ("CREDIT of three bytes", frame(Kind.CREDIT, 1, b"123")),
        ]
        for what, data in table:
            for step in (None, 1):
                with self.assertRaises(server_module.ProtocolError, msg=what):
                    read_frames(data, step)

    def test_kinds_have_the_numbers_of_the_protocol(self):
        self.assertEqual((Kind.CHALLENGE, Kind.DATA, Kind.GOODBYE), (1, 7, 13))

    def test_json_that_is_no_object_is_refused(self):
        bad = [b"[]", b"1", b"{", b"\xff", b"[" * 60000, b'{"a":' * 9000, b"null"]
        for payload in bad:
            with self.assertRaises(server_module.ProtocolError):
                server_module.unpack_json(payload)


# -----------------------------------------------------------------------------------
# Loop, on a fake clock
# -----------------------------------------------------------------------------------
# -----------------------------------------------------------------------------------
# Secrets
# -----------------------------------------------------------------------------------
class Secrets(unittest.TestCase):
    def setUp(self):
        self.nonces = server_module.make_nonce(), server_module.make_nonce()

    def test_proof_is_an_hmac_over_role_nonces_and_id(self):
        said = "\n".join(["mdm-tunnel/1", "client", *self.nonces, "tim"]).encode()
        expected = hmac.new(b"secret", said, "sha256").hexdigest()
        found = server_module.prove("secret", "client", self.nonces, "tim")
        self.assertEqual(found, expected)
        self.assertTrue(server_module.is_proof(found, expected))

    def test_proof_is_good_for_one_role_link_and_id_only(self):
        other = server_module.make_nonce()
        first, second = self.nonces
        proofs = {
            server_module.prove(token, role, nonces, id)
            for token in ("secret", "Secret")
            for role in ("client", "server")
            for nonces in (self.nonces, (second, first), (first, other))
            for id in ("tim", "eva")
        }
        self.assertEqual(len(proofs), 24)

    def test_only_the_proof_itself_is_one(self):
        proof = server_module.prove("secret", "client", self.nonces, "tim")
        for said in (None, "", 0, [], proof[:-1], proof + "0", proof.upper(), "\u1234"):
            self.assertFalse(server_module.is_proof(said, proof))

    def test_nonce_of_another_form_is_refused(self):
        for nonce in ("", "None", "A" * 64, "0" * 63, "0" * 65, "\n" * 64):
            for nonces in ((nonce, self.nonces[0]), (self.nonces[0], nonce)):
                with self.assertRaises(server_module.ProtocolError):
                    server_module.prove("secret", "client", nonces, "tim")

    def test_broken_token_files_are_refused_and_no_token_is_told(self):
        table = [
            (b"", "JSON"),
            (b"\xff", "JSON"),
            (b"[" * 100000, "JSON"),
            (b'["hidden"]', "object"),
            (b'{"tim": ""}', "tim"),
            (b'{"tim": " "}', "tim"),
            (b'{"tim": null}', "tim"),
            (b'{"tim": 5}', "tim"),
            (b'{"tim": ["hidden"]}', "tim"),
            (b'{"tim": {"token": "hidden", "domain": ["a.b"]}}', "tim"),
            (b'{"tim": {"token": "hidden", "token": "hidden"}}', "tim"),
            (b'{"tim": {"domains": ["a.b"]}}', "tim"),
            (b'{"tim": {"token": "hidden", "domains": "a.b"}}', "list"),
            (b'{"tim": {"token": "hidden", "domains": ["a b.c"]}}', "no domain"),
            (b'{"tim": {"token": "hidden", "domains": ["*"]}}', "no domain"),
            (b'{"tim": {"token": "hidden", "domains": ["a.*.c"]}}', "no domain"),
            (b'{"tim": "hid\\u0000den"}', "tim"),
            (b'{"tim": "hidd\xc3\xa9n"}', "tim"),
            (b'{"tim": "%s"}' % (b"x" * 5000), "tim"),
            (b'{"tim": "hidden", "TIM": "hidden"}', "twice"),
            (b'{"a.b": "hidden"}', "letters"),
        ]
        for data, word in table:
            with self.assertRaises(ValueError, msg=data[:30]) as caught:
                server_module.parse_tokens(data)
            self.assertIn(word, str(caught.exception))
            self.assertNotIn("hid", str(caught.exception))

    def test_ids_and_domains_are_read_without_regard_to_case(self):
        data = b'{"Tim": "s", "eva": {"token": "t", "domains": ["A.b.", "*.C.d"]}}'
        found = server_module.parse_tokens(data)
        self.assertEqual(found, {"tim": ("s", ()), "eva": ("t", ("a.b", "*.c.d"))})


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class NoSelector(selectors.SelectSelector):
    """Never waits, and sees nothing."""

    def select(self, timeout=None):
        return []


def change(case, thing, **values):
    """Until the end of the test a module or a class has these attributes instead."""
    for name, value in values.items():
        case.addCleanup(setattr, thing, name, vars(thing)[name])
        setattr(thing, name, value)


def fake_loop(module, clock=None):
    return module.Loop(NoSelector(), clock or Clock())


class Witness:
    """An owner that notes what happens to it."""

    def __init__(self):
        self.errors = []
        self.rung = 0

    def fail(self, error):
        self.errors.append(error)

    def ring(self):
        self.rung += 1


class Loops(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.loop = fake_loop(server_module, self.clock)
        self.addCleanup(self.loop.close)
        self.owner = Witness()
        self.timer = server_module.Timer(self.loop, self.owner, self.owner.ring)

    def after(self, seconds):
        self.clock.now += seconds
        self.loop.turn()
        return self.owner.rung

    def test_lack_of_memory_is_an_error_like_others(self):
        log = Log()
        logging.getLogger("mdm_tunnel").addHandler(log)
        self.addCleanup(logging.getLogger("mdm_tunnel").removeHandler, log)
        told = []
        self.owner.fail = told.append

        def greedy():
            raise MemoryError

        self.loop.guard(self.owner, greedy)
        self.assertIsInstance(told[0], OSError)
        self.assertIn("memory", str(told[0]))
        self.assertEqual(log.lines, [])

    def test_folder_instead_of_a_file_is_named_and_left_closed(self):
        def lowest():
            with socket.socket() as sock:
                return sock.fileno()

        before = lowest()
        for _ in range(3):
            with self.assertRaises((OSError, ValueError)) as caught:
                server_module.read_file(HERE)
            self.assertIn(HERE, server_module.blame(caught.exception, ["?"]))
        self.assertEqual(lowest(), before)

    def test_files_that_are_no_files_are_refused_at_once(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        paths = [folder, "/dev/zero"]
        if hasattr(os, "mkfifo"):
            paths.append(os.path.join(folder, "pipe"))
            os.mkfifo(paths[-1])
        for path in paths:
            with self.assertRaises((OSError, ValueError), msg=path):
                server_module.read_file(path)

    def test_timer_rings_once_when_it_is_due(self):
        self.timer.set(5)
        self.assertEqual([self.after(4), self.after(2), self.after(100)], [0, 1, 1])

    def test_timer_moved_later_rings_later(self):
        self.timer.set(5)
        self.timer.set(10)
        self.assertEqual([self.after(6), self.after(5)], [0, 1])

    def test_timer_moved_earlier_rings_earlier_and_once(self):
        self.timer.set(10)
        self.timer.set(5)
        self.assertEqual([self.after(6), self.after(20)], [1, 1])

    def test_cleared_timer_does_not_ring_and_can_be_set_again(self):
        self.timer.set(5)
        self.timer.clear()
        self.assertEqual(self.after(6), 0)
        self.timer.set(5)
        self.assertEqual(self.after(6), 1)

    def test_cleared_timers_do_not_fill_the_heap(self):
        for _ in range(20000):
            timer = server_module.Timer(self.loop, self.owner, self.owner.ring)
            timer.set(60)
            timer.clear()
        self.timer.set(1)
        self.assertLess(len(self.loop.timers), 2000)
        self.assertEqual(self.after(2), 1)

    def test_an_error_costs_its_owner_and_nobody_else(self):
        other = Witness()
        self.loop.soon(self.owner, self.divide)
        self.loop.soon(other, other.ring)
        self.loop.turn()
        self.assertIsInstance(self.owner.errors[0], ZeroDivisionError)
        self.assertEqual(other.rung, 1)

    def divide(self):
        return 1 / 0

    def test_an_owner_that_fails_to_fail_does_not_end_the_loop(self):
        self.owner.fail = lambda error: self.divide()
        self.loop.soon(self.owner, self.divide)
        self.loop.turn()

    def test_links_send_in_between_when_a_turn_has_many_events(self):
        story = []
        link = Witness()
        link.flush = lambda: story.append("sent")

        def on_events(mask):
            story.append("event")
            self.loop.ready_links[link] = None

        self.owner.on_events = on_events
        key = selectors.SelectorKey(None, 0, 0, self.owner)
        part = server_module.PART
        self.loop.selector.select = lambda timeout: [(key, 1)] * (2 * part + 1)
        self.loop.turn()
        whole = ["event"] * part + ["sent"]
        self.assertEqual(story, 2 * whole + ["event", "sent"])

    def test_buffers_nobody_has_touched_take_no_memory(self):
        for buffer in (self.loop.scratch, self.loop.frames):
            self.assertIsInstance(buffer.obj, mmap.mmap)
        self.assertGreaterEqual(len(self.loop.scratch), server_module.DATA_LIMIT)

    def test_calls_from_a_thread_wake_the_loop(self):
        loop = server_module.Loop()
        self.addCleanup(loop.close)
        threading.Thread(target=loop.from_thread, args=(loop, self.owner.ring)).start()
        while not self.owner.rung:
            loop.turn()


# -----------------------------------------------------------------------------------
# Connection, on real sockets
# -----------------------------------------------------------------------------------
class Connections(unittest.TestCase):
    class Owner(Witness):
        """Not the test itself: its fail() would take the place of TestCase.fail()."""

        def interest(self):
            return server_module.READ

        def on_readable(self):
            pass

        def on_writable(self):
            pass

    def setUp(self):
        self.loop = server_module.Loop()
        self.addCleanup(self.loop.close)
        with contextlib.closing(server_module.listen("127.0.0.1", 0)) as listener:
            self.peer = socket.create_connection(listener.getsockname())
            self.addCleanup(self.peer.close)
            self.peer.settimeout(PATIENCE)
            listener.settimeout(PATIENCE)
            sock = listener.accept()[0]
        self.connection = server_module.Connection(self.loop, sock, self.Owner())
        self.view = memoryview(bytearray(100000))

    def reset_by_peer(self):
        reset_on_close(self.peer)
        self.peer.close()

    def turn_until(self, condition):
        while not condition():
            self.loop.turn()

    def test_small_writes_leave_at_once_and_dead_peers_are_found(self):
        option = self.connection.sock.getsockopt
        self.assertTrue(option(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        self.assertTrue(option(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    @unittest.skipUnless(sys.platform in ("linux", "darwin"), "no such option")
    def test_kernel_is_asked_for_a_short_queue(self):
        self.connection.limit_queue(12345)
        option = server_module.NOT_SENT[sys.platform]
        said = self.connection.sock.getsockopt(socket.IPPROTO_TCP, option)
        self.assertEqual(said, 12345)

    def test_what_the_kernel_does_not_take_waits_in_order(self):
        data = os.urandom(20 << 20)
        for at in range(0, len(data), 1 << 20):
            self.connection.write(memoryview(data)[at : at + (1 << 20)])
        self.assertTrue(self.connection.backlog)
        self.connection.shutdown_write()
        got = []
        reader = threading.Thread(target=lambda: got.extend(self.read_all()))
        reader.start()
        self.turn_until(lambda: not self.connection.backlog)
        reader.join(PATIENCE)
        self.assertEqual(b"".join(got), data)

    def read_all(self):
        return list(iter(lambda: self.peer.recv(1 << 20), b""))

    def test_last_word_is_read_after_a_failed_send(self):
        self.peer.sendall(b"last word")
        self.reset_by_peer()
        self.turn_until(lambda: self.connection.readable)
        self.connection.write(b"x")
        self.assertIsNotNone(self.connection.send_error)
        count = self.connection.read_into(self.view)
        self.assertEqual(bytes(self.view[:count]), b"last word")

    def test_cut_does_not_look_like_an_end_after_a_failed_send(self):
        self.peer.sendall(b"part")
        self.reset_by_peer()
        self.turn_until(lambda: self.connection.readable)
        self.connection.write(b"x")  # this swallows the socket's error
        self.connection.read_into(self.view)
        self.connection.readable = True
        with self.assertRaises(ConnectionResetError):
            self.connection.read_into(self.view)

    def test_clock_of_what_waits_runs_also_for_what_tls_holds(self):
        class Holding:
            more, unsent, send = False, 100, staticmethod(len)

        self.connection.transport = Holding
        self.connection.write(b"x" * 100)
        self.assertEqual(self.connection.waiting(), 100)
        self.assertGreater(self.connection.progress_at, 0)

    def test_backlog_can_be_let_go_while_a_view_of_it_lives(self):
        for let_go in (
            lambda: self.connection.note_send_error(BrokenPipeError()),
            self.connection.close,
        ):
            self.connection.backlog = bytearray(b"x" * 100)
            with memoryview(self.connection.backlog):  # as in a traceback
                let_go()
            self.assertEqual(self.connection.waiting(), 0)
        self.assertEqual(self.connection.sock.fileno(), -1)

    def test_transport_that_broke_is_not_read_again(self):
        class Broken:
            more, unsent, has_last_word, reads = True, 0, False, 0

            def recv_into(self, view):
                self.reads += 1
                raise OSError("broken")

        self.connection.transport = broken = Broken()
        self.connection.owner.on_readable = lambda: self.connection.read_into(self.view)
        self.connection.readable = True
        for _ in range(5):
            self.loop.dirty.add(self.connection)
            self.loop.soon(self.loop, bool)  # so that the turn does not wait
            self.loop.turn()
        self.assertEqual(broken.reads, 1)

    def test_end_is_told_again_and_again(self):
        self.peer.close()
        self.turn_until(lambda: self.connection.readable)
        self.assertEqual(self.connection.read_into(self.view), 0)
        self.assertEqual(self.connection.read_into(self.view), 0)

    def test_lingering_delivers_the_last_word_though_more_comes(self):
        self.peer.sendall(b"x" * 100000)
        self.connection.write(b"last word")
        self.connection.close_when_drained(LINGER)
        self.peer.sendall(b"x" * 100000)
        got = []
        reader = threading.Thread(target=lambda: got.extend(self.read_all()))
        reader.start()
        self.loop.turn()  # what came is dropped
        reader.join(PATIENCE)
        self.assertEqual(got, [b"last word"])
        self.peer.close()
        self.turn_until(lambda: self.connection.closed)

    def stop_the_clock(self):
        """From here on only the test moves the time, and nothing is read."""
        self.loop.selector.unregister(self.loop.wake_receiver)
        self.loop.selector = NoSelector()
        self.loop.clock = Clock()
        return self.loop.clock

    def test_lingering_ends_after_its_time(self):
        clock = self.stop_the_clock()
        self.connection.close_when_drained(LINGER)
        clock.now += server_module.LINGER + 1
        self.loop.turn()
        self.assertTrue(self.connection.closed)

    def test_peer_who_never_takes_the_last_word_is_given_up(self):
        clock = self.stop_the_clock()
        self.connection.write(b"x" * (20 << 20))
        self.connection.close_when_drained(LINGER)
        clock.now += server_module.STALLED - 1
        self.loop.turn()
        self.assertFalse(self.connection.closed)
        clock.now += 2
        self.loop.turn()
        self.assertTrue(self.connection.closed)


# -----------------------------------------------------------------------------------
# Link and Stream: the server's copy against the client's, on a fake wire and clock
# -----------------------------------------------------------------------------------
class FakeSocket:
    family = None

    def setsockopt(self, *_):
        pass

    def getsockopt(self, *_):
        return 0


class Wire:
    """In place of a Connection: takes `room` bytes, keeps the rest as backlog."""

    transport = server_module.Plain  # nothing waits below

    def __init__(self, loop):
        self.loop, self.sock = loop, FakeSocket()
        self.owner = self.send_error = None
        self.backlog = bytearray()
        self.sent = bytearray()
        self.room = 1 << 40
        self.progress_at = 0.0
        self.ended = ""
        self.limits = []  # what the kernel was told to hold, from time to time

    def waiting(self):
        return len(self.backlog)

    def limit_queue(self, size):
        self.limits.append(size)

    def write(self, data):
        taken = 0 if self.backlog else min(self.room, len(data))
        self.take(bytes(data[:taken]))
        if len(data) > taken and not self.backlog:
            self.progress_at = self.loop.clock()
        self.backlog += data[taken:]

    def take(self, data):
        self.room -= len(data)
        self.sent += data

    def flush(self, room):
        """The kernel has room again."""
        self.room = room
        taken = bytes(self.backlog[:room])
        self.take(taken)
        del self.backlog[: len(taken)]
        if taken:
            self.progress_at = self.loop.clock()
        if not self.backlog:
            self.owner.on_writable()

    def register(self):
        pass

    def close(self):
        self.ended = self.ended or "closed"

    def close_when_drained(self, ending):
        self.ended = self.ended or ending.name


class End:
    """Owner of a stream: a source with something to send, and all that came."""

    def __init__(self, source=b"", endless=False, takes=True):
        self.source, self.endless, self.takes = bytearray(source), endless, takes
        self.got = bytearray()
        self.stream = None
        self.finished = False  # the source has an end, not only nothing for now
        self.news = []
        self.pulled = 0

    def pull(self, view):
        count = len(view) if self.endless else min(len(view), len(self.source))
        view[:count] = b"e" * count if self.endless else self.source[:count]
        del self.source[:count]
        self.pulled += count
        if self.finished:
            self.stream.wake()  # nothing else wakes it for the end
        return count or (0 if self.finished else None)

    def receive(self, data):
        self.got += data
        if self.takes:
            self.stream.acknowledge(0)

    def take_all(self):
        self.stream.acknowledge(0)

    def on_end(self):
        self.news.append("end")

    def on_reset(self, code, cause):
        self.news.append(code)

    def fail(self, error):
        self.news.append(error)
        self.stream.reset("error", "it failed")

    def send(self, data):
        self.source += data
        self.stream.wake()


class Side:
    """One end of the link, with its owner's part."""

    def __init__(self, module, role, clock):
        self.module, self.role = module, role
        self.loop = fake_loop(module, clock)
        self.wire = Wire(self.loop)
        self.link = module.Link(self.loop, self.wire, self, role)
        self.ends = []
        self.messages = []
        self.closed = None
        self.next_end = End

    def __str__(self):
        return self.role

    def on_message(self, kind, message):
        self.messages.append((kind, message))
        if kind == Kind.CHALLENGE:
            self.link.send(Kind.LOGIN, {"id": "tim", "session": "s"})
        elif kind == Kind.LOGIN:
            self.link.send(Kind.WELCOME, {})
        elif kind == Kind.WELCOME:
            self.link.send(Kind.SERVICES, {"web": {}})

    def on_open(self, stream, message):
        end = self.next_end()
        end.stream, stream.owner = stream, end
        self.ends.append(end)

    def on_closed(self, cause):
        self.closed = cause

    def open(self, end):
        end.stream = self.link.open(end, {"service": "web"})
        self.ends.append(end)
        end.stream.wake()
        return end


class LinkCase(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.server = Side(server_module, "server", self.clock)
        self.client = Side(client_module, "client", self.clock)
        self.sides = (self.server, self.client)
        for side in self.sides:
            self.addCleanup(side.loop.close)
        self.server.link.send(Kind.CHALLENGE, {})
        self.settle()

    def settle(self):
        """Let both loops turn until nothing moves any more."""
        moved = True
        while moved:
            moved = self.exchange()

    def exchange(self):
        for side in self.sides:
            side.loop.turn()
            if side.link.busy and not side.wire.backlog:
                side.link.on_writable()
        moved = False
        for side, other in (self.sides, self.sides[::-1]):
            data, side.wire.sent = bytes(side.wire.sent), bytearray()
            if data and not other.link.closed:
                moved = True
                other.loop.guard(other.link, other.link.receive, memoryview(data))
        return moved

    def pass_time(self, seconds):
        for _ in range(int(seconds)):
            self.clock.now += 1
            self.settle()

    def pair(self, source=b"", **options):
        """A stream, as (server's end, client's end)."""
        self.client.next_end = lambda: End(**options)
        mine = self.server.open(End(source))
        self.settle()
        return mine, self.client.ends[-1]

    def feed(self, side, *frames):
        side.loop.guard(side.link, side.link.receive, memoryview(b"".join(frames)))


class Links(LinkCase):
    def test_handshake_brings_both_sides_to_their_work(self):
        kinds = [kind for kind, _ in self.server.messages + self.client.messages]
        self.assertEqual(
            sorted(kinds),
            [Kind.CHALLENGE, Kind.LOGIN, Kind.WELCOME, Kind.SERVICES],
        )
        self.assertEqual(self.server.link.step, 4)

    def test_bytes_arrive_both_ways(self):
        mine, theirs = self.pair(b"request")
        theirs.send(b"answer")
        self.settle()
        self.assertEqual((theirs.got, mine.got), (b"request", b"answer"))

    def test_end_is_a_half_close(self):
        mine, theirs = self.pair(b"all I have")
        mine.finished = True
        mine.stream.wake()
        self.settle()
        theirs.send(b"still here")
        self.settle()
        self.assertEqual((theirs.news, mine.got), (["end"], b"still here"))
        self.assertTrue(mine.stream.open)
        theirs.finished = True
        theirs.stream.wake()
        self.settle()
        self.assertEqual(mine.news, ["end"])
        self.assertEqual((self.server.link.streams, self.client.link.streams), ({}, {}))

    def test_reset_ends_both_ways_and_says_why(self):
        mine, theirs = self.pair(b"x")
        theirs.stream.reset("refused", "nobody there")
        self.settle()
        self.assertEqual(mine.news, ["refused"])
        self.assertEqual((self.server.link.streams, self.client.link.streams), ({}, {}))

    def test_eager_source_gets_no_turn_without_room(self):
        """It would give few bytes or none, and nobody would look at it again."""
        rooms = []

        class Eager(End):
            def pull(self, view):
                rooms.append(len(view))
                self.stream.wake()
                return min(len(view), 5000)

        self.client.next_end = lambda: End(takes=False)
        mine = self.server.open(Eager())
        self.settle()
        self.assertGreater(len(rooms), 10)
        self.assertGreaterEqual(min(rooms), server_module.LEAST_TURN)
        self.assertFalse(mine.stream.queued)

    def test_late_frames_are_dropped_in_silence(self):
        mine, theirs = self.pair(b"x")
        number = theirs.stream.id
        theirs.stream.reset("refused", "")
        late = [frame(Kind.DATA, number, b"late"), frame(Kind.END, number)]
        late += [frame(Kind.CREDIT, number, b"\0\0\0\1"), frame(Kind.RESET, number)]
        self.feed(self.client, *late)
        self.assertIsNone(self.client.closed)

    def tire(self):
        """From here on every turn of the loop has lasted long enough already."""
        for side in self.sides:
            change(self, side.module, TURN_BUDGET=-1)

    def test_flood_of_small_frames_takes_many_turns(self):
        mine, theirs = self.pair()
        self.tire()
        credit, part = theirs.stream.credit, server_module.LOOK_EVERY
        frames = [frame(Kind.CREDIT, theirs.stream.id, b"\0\0\0\1")] * (5 * part // 2)
        taken = []
        self.feed(self.client, *frames)
        for _ in range(3):
            taken.append(theirs.stream.credit - credit)
            self.client.loop.turn()
        self.assertEqual(taken, [part, 2 * part, 5 * part // 2])

    def test_flood_goes_on_while_there_is_time(self):
        mine, theirs = self.pair()
        credit, many = theirs.stream.credit, 100 * server_module.LOOK_EVERY
        self.feed(self.client, *[frame(Kind.CREDIT, 1, b"\0\0\0\1")] * many)
        self.assertEqual(theirs.stream.credit - credit, many)

    def test_nothing_is_read_while_a_flood_waits(self):
        self.tire()
        flood = [frame(Kind.PING, 0, b"12345678")] * (2 * server_module.LOOK_EVERY)
        self.feed(self.client, *flood)
        self.assertFalse(self.client.link.interest() & server_module.READ)
        self.settle()
        self.assertTrue(self.client.link.interest() & server_module.READ)

    def test_link_is_read_again_when_a_flood_is_over(self):
        """Of frames that are not answered, so that nothing else tells the selector."""
        self.tire()
        told = []
        self.client.wire.register = lambda: told.append(self.client.link.interest())
        flood = [frame(Kind.PONG, 0, b"12345678")] * (5 * server_module.LOOK_EVERY)
        self.feed(self.client, *flood)
        for _ in range(7):
            self.client.loop.turn()
        self.assertFalse(told[0] & server_module.READ)
        self.assertTrue(told[-1] & server_module.READ)

    def test_only_the_first_goodbye_is_told(self):
        goodbye = frame(Kind.GOODBYE, 0, b'{"code": "stopping"}')
        self.pair()
        self.feed(self.server, *[goodbye] * 5)
        kinds = [kind for kind, _ in self.server.messages]
        self.assertEqual(kinds.count(Kind.GOODBYE), 1)

    def test_large_lists_are_read_one_a_turn(self):
        name = "x" * 60
        services = {name + str(i): {} for i in range(940)}
        data = frame(Kind.SERVICES, 0, server_module.pack_json(services))
        before = len(self.server.messages)
        self.tire()
        self.feed(self.server, data, data, data)
        for number in (1, 2, 3, 3):
            self.assertEqual(len(self.server.messages), before + number)
            self.server.loop.turn()

    def test_links_that_hold_too_much_together_lose_from_the_largest(self):
        change(self, client_module, ALL_UNREAD=100 * KIB)
        mine, theirs = self.pair(b"", takes=False)
        other = self.client.link.loop.links
        shed = []

        class Large:
            unread = 90 * KIB

            def shed_largest(self, loop=self.client.loop):
                shed.append(self)
                loop.unread -= self.unread
                self.unread = 0

        large = Large()
        other.add(large)
        self.client.loop.unread += large.unread
        mine.send(b"x" * 60 * KIB)
        self.settle()
        other.discard(large)
        self.assertEqual(shed, [large])
        self.assertEqual(theirs.news, [])
        self.assertEqual(self.client.loop.unread, 60 * KIB)
        theirs.take_all()
        self.assertEqual(self.client.loop.unread, 0)

    def test_what_a_link_held_is_free_when_it_closes(self):
        mine, theirs = self.pair(b"x" * 50 * KIB, takes=False)
        self.assertEqual(self.client.loop.unread, 50 * KIB)
        self.client.link.close("for a test")
        self.assertEqual(self.client.loop.unread, 0)
        self.assertNotIn(self.client.link, self.client.loop.links)

    def test_stalled_reader_stops_its_sender_at_the_window(self):
        mine, theirs = self.pair(b"", takes=False)
        mine.endless = True
        mine.stream.wake()
        self.settle()
        self.assertLessEqual(len(theirs.got), server_module.WINDOW)
        self.assertGreater(len(theirs.got), server_module.WINDOW - 4 * KIB)
        theirs.takes = True
        theirs.take_all()
        before = mine.pulled
        for _ in range(4):
            self.exchange()
        self.assertGreater(mine.pulled, before)

    def test_stalled_reader_does_not_stop_other_streams(self):
        stalled, reader = self.pair(b"", takes=False)
        stalled.endless = True
        stalled.stream.wake()
        self.settle()
        data = os.urandom(3 << 20)
        mine, theirs = self.pair(data)
        self.assertEqual(hashlib.md5(theirs.got).digest(), hashlib.md5(data).digest())

    def test_slow_wire_leaves_no_more_than_one_frame_in_user_space(self):
        self.server.wire.room = 10000
        for _ in range(20):
            end = self.server.open(End(endless=True))
            end.stream.sent = end.stream.last_turn = 1 << 20  # busy
            end.stream.since = self.clock.now
        for _ in range(50):
            self.server.loop.turn()
            self.server.wire.flush(5000)
            bound = self.server.link.pacer.quantum + server_module.COLLECT + 4 * KIB
            self.assertLessEqual(len(self.server.wire.backlog), bound)

    def test_busy_streams_share_a_slow_wire_fairly(self):
        for _ in range(4):
            self.server.open(End(endless=True))
        self.settle_slowly(turns=400)
        pulled = [end.pulled for end in self.server.ends]
        self.assertLess(max(pulled) - min(pulled), 2 * self.server.link.pacer.quantum)
        self.assertGreater(min(pulled), server_module.WINDOW)

    def settle_slowly(self, turns, room=16 * KIB):
        for _ in range(turns):
            self.clock.now += 0.001
            self.server.wire.flush(room)
            self.exchange()

    def test_quiet_stream_goes_before_busy_ones(self):
        for _ in range(8):
            self.server.open(End(endless=True))
        self.settle_slowly(turns=200)
        small = self.server.open(End(b"small"))
        frames_before = sum(end.pulled for end in self.server.ends)
        while not small.pulled:
            self.settle_slowly(turns=1)
        passed = sum(end.pulled for end in self.server.ends) - frames_before
        self.assertLessEqual(passed, self.server.link.pacer.quantum // 4)

    def test_stream_of_many_small_turns_is_quiet(self):
        small, large = self.server.open(End()), self.server.open(End(endless=True))
        for _ in range(300):  # 1 MB/s
            small.send(b"x" * KIB)
            self.settle_slowly(turns=1, room=64 * KIB)
        for end, busy in ((small, False), (large, True)):
            end.send(b"x")
            self.assertEqual(end.stream in self.server.link.busy, busy)

    def test_download_on_a_very_thin_wire_is_busy(self):
        for _ in range(4):
            self.server.open(End(endless=True))
        self.settle_slowly(turns=3000, room=125)  # 1 Mbit/s
        small = self.server.open(End(b"small"))
        before = sum(end.pulled for end in self.server.ends)
        while not small.pulled:
            self.settle_slowly(turns=1, room=125)
        passed = sum(end.pulled for end in self.server.ends) - before
        self.assertLessEqual(passed, server_module.LEAST_TURN + len(b"small"))

    def test_busy_stream_gets_its_turn_among_many_quiet_ones(self):
        busy = self.server.open(End(endless=True))
        self.settle_slowly(turns=20)
        before = busy.pulled
        quiet = [self.server.open(End(b"q")) for _ in range(200)]
        for _ in range(30):
            for end in quiet:
                end.send(b"q")
            self.settle_slowly(turns=1, room=64 * KIB)
        self.assertGreater(busy.pulled, before + 30 * server_module.LEAST_TURN)

    def test_quantum_is_what_the_wire_delivers_in_ten_milliseconds(self):
        for room in (2500, 25000, 1000, 200000):  # bytes in each millisecond
            for _ in range(3):
                self.server.open(End(endless=True))
            self.settle_slowly(turns=600, room=room)
            most, least = server_module.DATA_LIMIT, server_module.LEAST_TURN
            delivered = max(least, min(most, 10 * room))
            self.assertGreater(self.server.link.pacer.quantum, delivered // 2)
            self.assertLess(self.server.link.pacer.quantum, 2 * delivered)
            self.assertGreater(self.server.wire.limits[-1], delivered // 3)
            self.assertLess(self.server.wire.limits[-1], 3 * delivered)

    def test_the_kernel_is_told_only_of_great_changes(self):
        self.server.open(End(endless=True))
        self.settle_slowly(turns=2000, room=2500)
        self.assertLess(len(self.server.wire.limits), 5)

    def test_wire_with_little_to_carry_keeps_its_quantum(self):
        self.server.open(End(endless=True))
        self.settle_slowly(turns=400, room=25000)
        before = self.server.link.pacer.quantum
        mine, theirs = self.pair()
        self.server.ends[0].endless = False
        for _ in range(100):
            mine.send(b"now and then")
            self.settle_slowly(turns=20, room=25000)
        self.assertGreaterEqual(self.server.link.pacer.quantum, before // 2)

    def test_quantum_is_divided_among_busy_streams(self):
        self.server.open(End(endless=True))
        self.settle_slowly(turns=400, room=25000)
        for _ in range(9):
            self.server.open(End(endless=True))
        self.settle_slowly(turns=100, room=25000)
        turns = []
        for end in self.server.ends:
            pull = end.pull
            end.pull = lambda view, pull=pull: (turns.append(len(view)), pull(view))[1]
        self.settle_slowly(turns=40, room=25000)
        share = self.server.link.pacer.quantum // server_module.SHARES
        self.assertLess(max(turns), 2 * share)

    def test_source_that_came_short_is_not_asked_again(self):
        mine, theirs = self.pair(b"")
        asked = []
        mine.pull = lambda view: asked.append(len(view)) or End.pull(mine, view)
        mine.send(b"all for now")
        self.settle()
        self.assertEqual(len(asked), 1)
        self.assertTrue(mine.stream.wants_read())

    def test_source_without_credit_is_not_at_its_end(self):
        mine, theirs = self.pair()
        mine.stream.credit = 5000
        mine.pull = lambda view: (mine.stream.wake(), End.pull(mine, view) or 0)[1]
        mine.send(b"h" * 7000)
        self.settle()
        self.assertEqual((len(theirs.got), theirs.news), (5000, []))
        self.assertFalse(mine.stream.ended_out)

    def test_round_trip_is_asked_for_once_until_it_is_known(self):
        mine, theirs = self.pair()
        mine.send(b"x" * 100 * KIB)
        self.client.loop.turn()
        self.settle()
        asked = self.client.link.pinged
        self.assertEqual(asked, self.clock.now)
        self.client.link.ping_payload = b"not answered"
        for _ in range(9):
            self.clock.now += 1
            mine.send(b"x" * 100 * KIB)
            self.settle()
        self.assertEqual(self.client.link.pinged, asked)

    # Windows, on a wire with a round trip of 100 ms.

    def far_away(self, turns, step=0.01, delay=0.05):
        """Both loops turn, and what one sends the other has `delay` seconds later."""
        flying = getattr(self, "flying", [])
        self.flying = flying
        for _ in range(turns):
            self.clock.now += step
            for side, other in (self.sides, self.sides[::-1]):
                side.loop.turn()
                while side.link.busy:
                    side.link.on_writable()
                data, side.wire.sent = bytes(side.wire.sent), bytearray()
                if data:
                    flying.append((self.clock.now + delay, other, data))
            while flying and flying[0][0] <= self.clock.now:
                _, other, data = flying.pop(0)
                other.loop.guard(other.link, other.link.receive, memoryview(data))

    def test_window_grows_until_it_covers_the_round_trip(self):
        mine, theirs = self.pair()
        mine.endless = True
        mine.stream.wake()
        self.far_away(turns=30)
        early = theirs.stream.window
        self.far_away(turns=200)
        self.assertLess(early, server_module.LARGEST_WINDOW)
        self.assertEqual(theirs.stream.window, server_module.LARGEST_WINDOW)
        self.assertAlmostEqual(self.client.link.round_trip, 0.1, delta=0.03)

    def test_window_of_a_near_or_slow_stream_stays(self):
        mine, theirs = self.pair()
        for _ in range(100):
            mine.send(b"d" * 20000)
            self.far_away(turns=5, step=0.01)
        self.assertEqual(theirs.stream.window, server_module.WINDOW)

    def test_window_of_a_stalled_reader_does_not_grow(self):
        mine, theirs = self.pair(takes=False)
        mine.endless = True
        mine.stream.wake()
        self.far_away(turns=300)
        self.assertEqual(theirs.stream.window, server_module.WINDOW)
        self.assertLessEqual(len(theirs.got), server_module.WINDOW)

    def test_windows_of_a_link_grow_to_a_limit_together(self):
        self.client.next_end = End
        for _ in range(20):
            self.server.open(End(endless=True))
        self.far_away(turns=400)
        windows = [end.stream.window for end in self.client.ends]
        grown = sum(windows) - 20 * server_module.WINDOW
        self.assertGreater(grown, server_module.SPARE_WINDOWS // 2)
        self.assertLessEqual(grown, server_module.SPARE_WINDOWS)
        for end in self.client.ends:
            end.stream.reset("done")
        self.assertEqual(self.client.link.spare, server_module.SPARE_WINDOWS)

    def test_small_frames_of_one_turn_leave_in_one_write(self):
        writes = []
        write = self.server.wire.write
        self.server.wire.write = lambda data: (writes.append(len(data)), write(data))
        for _ in range(20):
            self.server.open(End(b"small request"))
        self.server.loop.turn()
        self.assertEqual(len(writes), 1)

    def test_flood_of_pings_owes_one_pong(self):
        self.server.wire.room = 0
        self.server.wire.write(b"x")
        ping = frame(Kind.PING, 0, b"12345678")
        self.feed(self.server, ping * 10000)
        self.server.loop.turn()
        self.assertEqual(list(self.server.link.own_frames), [Kind.PONG])

    def test_credit_is_owed_as_a_sum(self):
        mine, theirs = self.pair(b"", takes=True)
        self.client.wire.room = 0
        self.client.wire.write(b"x")
        for _ in range(20):
            mine.send(b"d" * 10000)
            self.settle()
        self.assertEqual(len(self.client.link.debtors), 1)

    def test_link_that_holds_too_much_resets_those_who_hold_most(self):
        limit = server_module.UNREAD_LIMIT
        for _ in range(limit // server_module.WINDOW + 8):
            self.client.next_end = lambda: End(takes=False)
            self.server.open(End(endless=True))
        small = self.server.open(End(b"small"))
        self.settle()
        self.assertLessEqual(self.client.link.unread, limit)
        codes = {code for end in self.server.ends for code in end.news}
        self.assertEqual(codes, {"overload"})
        self.assertEqual(small.news, [])

    def test_owner_that_raises_costs_its_stream_only(self):
        mine, theirs = self.pair(b"x")
        theirs.receive = lambda data: 1 / 0
        mine.send(b"y")
        self.settle()
        self.assertIsInstance(theirs.news[0], ZeroDivisionError)
        self.assertEqual(mine.news, ["error"])
        other, remote = self.pair(b"fine")
        self.assertEqual(remote.got, b"fine")

    def test_source_that_raises_costs_its_stream_only(self):
        mine, theirs = self.pair(b"x")
        theirs.pull = lambda view: 1 / 0
        theirs.stream.wake()
        self.settle()
        self.assertEqual(mine.news, ["error"])
        self.assertIsNone(self.client.closed)

    def test_violations_end_the_link_with_goodbye(self):
        mine, theirs = self.pair(b"x")
        full = frame(Kind.DATA, 1, b"d" * (1 << 20))
        table = [
            ("DATA over the credit", full),
            ("a stream never opened", frame(Kind.DATA, 9, b"x")),
            ("CREDIT of zero", frame(Kind.CREDIT, 1, b"\0\0\0\0")),
            ("CREDIT past u32", frame(Kind.CREDIT, 1, b"\xff" * 4)),
            ("DATA after END", frame(Kind.END, 1) + frame(Kind.DATA, 1, b"x")),
            ("END after END", frame(Kind.END, 1) * 2),
            ("LOGIN again", frame(Kind.LOGIN, 0, b"{}")),
            ("a kind of the other side", frame(Kind.OPEN, 2, b"{}")),
            ("a giant length", frame(Kind.DATA, 1, length=(1 << 24) - 1)),
            ("SERVICES that are a list", frame(Kind.SERVICES, 0, b"[]")),
        ]
        for what, data in table:
            with self.subTest(what):
                self.setUp()
                self.pair(b"x")
                self.feed(self.server, data)
                self.assertIsNotNone(self.server.closed)
                self.exchange()
                kind, message = self.client.messages[-1]
                self.assertEqual((kind, message["code"]), (Kind.GOODBYE, "protocol"))

    def test_handshake_out_of_order_is_refused(self):
        for data in (frame(Kind.SERVICES, 0, b"{}"), frame(Kind.PING, 0, b"12345678")):
            side = Side(server_module, "server", self.clock)
            self.addCleanup(side.loop.close)
            side.link.send(Kind.CHALLENGE, {})
            self.feed(side, data)
            self.assertIn("handshake", side.closed)

    def test_stream_opened_out_of_order_is_refused(self):
        self.feed(self.client, frame(Kind.OPEN, 2, b"{}"))
        self.assertIn("OPEN of stream 2", self.client.closed)

    def test_unknown_json_keys_are_ignored(self):
        self.feed(self.client, frame(Kind.OPEN, 1, b'{"service":"web","new":[1]}'))
        self.assertEqual(len(self.client.ends), 1)

    def test_open_after_goodbye_is_answered_gone(self):
        self.pair(b"keeps the link open")
        self.client.link.goodbye("stopping", "")
        end = self.server.open(End(b"too late"))
        self.settle()
        self.assertEqual(end.news, ["gone"])

    def test_goodbye_waits_for_the_last_stream(self):
        mine, theirs = self.pair(b"x")
        self.client.link.goodbye("stopping", "")
        self.settle()
        self.assertIsNone(self.client.closed)
        mine.stream.reset("done")
        self.settle()
        self.assertEqual(self.client.closed, "goodbye")
        self.assertEqual(self.client.wire.ended, "LINGER")

    def test_last_end_of_a_leaving_link_is_sent_before_it_closes(self):
        mine, theirs = self.pair(b"x")
        mine.finished = True
        mine.stream.wake()
        self.settle()
        self.client.link.goodbye("stopping", "")
        theirs.finished = True
        theirs.send(b"tail")
        self.settle()
        self.assertEqual((mine.got, mine.news), (b"tail", ["end"]))
        self.assertEqual(self.client.wire.ended, "LINGER")

    def test_silent_peer_is_asked_then_given_up(self):
        self.client.loop.turn = lambda: None  # it has stopped
        self.pass_time(9)
        self.assertEqual(self.server.link.asked, 0)
        self.pass_time(10)
        self.assertIsNone(self.server.closed)
        self.pass_time(4)
        self.assertIn("no sign of life", self.server.closed)

    # Visitors wait: something was sent, and nothing comes.

    def pass_halves(self, seconds, each=lambda: None):
        """Time passes in steps of half a second, as the checks do."""
        for _ in range(int(2 * seconds)):
            self.clock.now += 0.5
            each()
            self.settle()

    def count_pings(self, link):
        """Grows by one with each PING that is asked for."""
        pings, ping = [], link.ping
        link.ping = lambda: pings.append(self.clock.now) or ping()
        return pings

    def test_silence_while_visitors_wait_is_given_up_within_nine_seconds(self):
        for side, other in (self.sides, self.sides[::-1]):
            with self.subTest(side.role):
                self.setUp()
                mine, theirs = self.pair()
                self.pass_halves(25)  # the visitor comes after a rest
                side, other = (getattr(self, x.role) for x in (side, other))
                other.loop.turn = lambda: None  # it has stopped
                (mine if side is self.server else theirs).send(b"x")
                for seconds in (7, 0.5):  # it looks twice a second now
                    self.pass_halves(seconds)
                    self.assertIsNone(side.closed)
                    self.assertLessEqual(side.link.timer.due - self.clock.now, 0.5)
                self.pass_halves(1.5)
                self.assertIn("no sign of life", side.closed)

    def test_ping_that_was_sent_with_the_bytes_ends_it_no_sooner(self):
        """One that measures the round trip, say."""
        mine, _ = self.pair()
        self.pass_halves(25)
        self.client.loop.turn = lambda: None
        mine.send(b"x")
        self.server.link.ping()
        self.pass_halves(7.5)
        self.assertIsNone(self.server.closed)
        self.pass_halves(1.5)
        self.assertIn("no sign of life", self.server.closed)

    def test_slow_answer_is_no_silence(self):
        mine, theirs = self.pair(b"a request")
        pings = self.count_pings(self.server.link)
        self.pass_halves(9)
        self.assertEqual(len(pings), 1)  # and it was answered
        self.pass_halves(60)
        self.assertIsNone(self.server.closed)
        theirs.send(b"the answer")
        self.settle()
        self.assertEqual(mine.got, b"the answer")

    def test_open_streams_that_rest_are_asked_for_no_more_than_idle_links(self):
        mine, theirs = self.pair(b"x")
        theirs.send(b"y")
        self.pass_halves(10)
        pings = [self.count_pings(side.link) for side in self.sides]
        self.pass_halves(100)
        for each in pings:
            self.assertLessEqual(len(each), 100 / client_module.PING_AFTER)

    def test_link_whose_bytes_do_not_move_is_given_up_as_soon(self):
        """Where the PING cannot leave. What began to wait later changes nothing."""
        for room in (0, 12):
            with self.subTest(room=room):
                self.setUp()
                mine, theirs = self.pair()
                self.pass_halves(25)
                self.client.loop.turn = lambda: None
                self.server.wire.room = room * (1 + 8)  # of DATA with one byte each
                self.pass_halves(7.5, lambda: mine.send(b"x"))  # noqa: B023
                self.assertIsNone(self.server.closed)
                self.assertTrue(self.server.wire.backlog)
                self.pass_halves(1.5, lambda: mine.send(b"x"))  # noqa: B023
                self.assertIn("no sign of life", self.server.closed)

    def test_bytes_that_move_before_the_ping_put_the_end_off(self):
        mine, theirs = self.pair()
        self.server.wire.room = 0
        mine.send(b"x" * (200 << 10))
        self.client.loop.turn = lambda: None
        for _ in range(60):
            self.server.wire.backlog += b"x" * 100
            self.pass_halves(0.5, lambda: self.server.wire.flush(100))
        self.assertIsNone(self.server.closed)
        self.pass_halves(6)
        self.assertIn("no sign of life", self.server.closed)

    def test_queue_before_a_link_is_never_taken_for_its_death(self):
        """Two seconds each way, as before a router with large buffers."""
        self.client.next_end = lambda: End(endless=True)
        mine = self.server.open(End())
        self.far_away(200, step=0.05, delay=2.0)
        self.client.ends[-1].stream.wake()
        pings = self.count_pings(self.server.link)
        self.far_away(1200, step=0.05, delay=2.0)
        self.assertEqual((self.server.closed, self.client.closed), (None, None))
        self.assertGreater(len(mine.got), 1000)
        self.assertTrue(pings)

    def test_ten_round_trips_may_pass_where_they_are_long(self):
        mine, theirs = self.pair()
        self.server.link.round_trip = 2.0
        self.client.loop.turn = lambda: None
        mine.send(b"x")
        self.pass_halves(22.5)
        self.assertIsNone(self.server.closed)
        self.pass_halves(1.5)
        self.assertIn("no sign of life", self.server.closed)

    def test_quiet_but_living_peer_is_kept(self):
        self.pass_time(120)
        self.assertEqual((self.server.closed, self.client.closed), (None, None))

    def test_frozen_process_does_not_kill_its_healthy_peer(self):
        mine, theirs = self.pair()
        mine.send(b"x")
        self.server.link.ping()
        self.server.loop.turn()
        for side, other in (self.sides, self.sides[::-1]):
            data, side.wire.sent = bytes(side.wire.sent), bytearray()
            self.feed(other, data)
            if other is self.client:
                other.loop.turn()  # it answers
                self.clock.now += 600
        self.settle()  # what came meanwhile was read before the timers ring
        self.pass_time(5)
        self.assertEqual((self.server.closed, self.client.closed), (None, None))

    def test_link_whose_bytes_do_not_move_is_given_up(self):
        self.server.wire.room = 0
        self.server.open(End(b"stuck"))
        for _ in range(25):
            self.clock.now += 1
            self.feed(self.server, frame(Kind.PONG, 0, b"12345678"))
            self.server.loop.turn()
        self.assertIn("nothing could be sent", self.server.closed)

    def test_bytes_that_do_not_move_below_tls_count_as_well(self):
        self.server.wire.waiting = lambda: 100  # encrypted, so no longer in the backlog
        for _ in range(25):
            self.clock.now += 1
            self.feed(self.server, frame(Kind.PONG, 0, b"12345678"))
            self.server.loop.turn()
        self.assertIn("nothing could be sent", self.server.closed)
        self.assertEqual(self.server.wire.ended, "closed")  # no last word waits

    def test_random_schedule_keeps_every_byte(self):
        dice = random.Random(5)
        pairs = [self.pair(b"", takes=False) for _ in range(6)]
        sent = collections.defaultdict(bytes)
        for _ in range(1500):
            mine, theirs = dice.choice(pairs)
            end = dice.choice((mine, theirs))
            data = bytes([dice.randrange(256)]) * dice.randrange(1, 20000)
            sent[end] += data
            end.send(data)
            dice.choice((mine, theirs)).take_all()
            for side in self.sides:
                side.wire.flush(dice.randrange(1, 50000))
            self.exchange()
        self.drain(pairs)
        for mine, theirs in pairs:
            self.assertEqual(bytes(theirs.got), sent[mine])
            self.assertEqual(bytes(mine.got), sent[theirs])

    def drain(self, pairs):
        for _ in range(2000):
            for side in self.sides:
                side.wire.flush(1 << 20)
            for end in sum(map(list, pairs), []):
                end.take_all()
            self.exchange()


# -----------------------------------------------------------------------------------
# Link against a model, which stands in .ci/model.py: one seed here, many there.
# -----------------------------------------------------------------------------------
MODEL = os.path.join(HERE, ".ci", "model.py")


@unittest.skipUnless(os.path.exists(MODEL), "there is no .ci/model.py")
class RandomLinks(unittest.TestCase):
    """To repeat a failure: .ci/model 1 --first SEED."""

    def run_one(self, module, role):
        spec = importlib.util.spec_from_file_location("model", MODEL)
        model = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(model)
        change(self, module, **model.Tried.hurry(module))
        schedule = model.Schedule(module, role, seed=0)
        schedule.run(2000)
        self.assertGreater(schedule.refused, 10)
        self.assertGreater(schedule.left, 0)

    def test_server_does_what_the_model_expects(self):
        self.run_one(server_module, "server")

    def test_client_does_what_the_model_expects(self):
        self.run_one(client_module, "client")


# -----------------------------------------------------------------------------------
# HTTP, without sockets
# -----------------------------------------------------------------------------------
def parse_request(raw, step=None):
    """Feed a head as a visitor would send it; the Request, or the status it costs."""
    buffer, searched, step = bytearray(), 0, step or len(raw)
    for at in range(0, len(raw), step):
        buffer += raw[at : at + step]
        try:
            end = server_module.find_request_head(buffer, searched)
            if end:
                return server_module.Request(bytes(buffer[:end]), "192.0.2.1")
        except server_module.HTTPError as error:
            return error.status
        searched = len(buffer)
    return None


def head(*lines, first="GET / HTTP/1.1", host="Host: a.b"):
    lines = [first] + ([host] if host else []) + list(lines)
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


CONTROLS = [chr(code) for code in range(32) if code != 9] + ["\x7f"]
NO_TOKEN = '"(),/;<=>?@[\\]{}'  # RFC 9110 5.6.2: delimiters, but for the colon


def parse_answer(raw, method="GET", step=None):
    """Feed an answer as a service would; its head and body, None while it has no head.
    Raises HTTPError when it is broken."""
    buffer, searched, step = bytearray(), 0, step or max(1, len(raw))
    for at in range(0, len(raw), step):
        buffer += raw[at : at + step]
        end = server_module.find_answer_head(buffer, searched)
        if end:
            answer = server_module.Answer(bytes(buffer[:end]), method)
            return answer, answer.frame()
        searched = len(buffer)
    return None


class RequestHeads(unittest.TestCase):
    BAD = [
        # The request line.
        (head(first="GET  / HTTP/1.1"), 400, "9112 3"),
        (head(first="GET /  HTTP/1.1"), 400, "9112 3"),
        (head(first="GET / HTTP/1.1 "), 400, "9112 3"),
        (head(first=" GET / HTTP/1.1"), 400, "9112 3"),
        (head(first="\tGET / HTTP/1.1"), 400, "9112 3"),
        (head(first="GET\t/ HTTP/1.1"), 400, "9112 3"),
        (head(first="GET /\tHTTP/1.1"), 400, "9112 3"),
        (head(first="GET / HTTP/1.1\t"), 400, "9112 3"),
        (head(first="GET / HTTP/1.1 x"), 400, "9112 3"),
        (head(first="GET / HTTP/1.1 HTTP/1.1"), 400, "9112 3"),
        (head(first="GET /"), 400, "9112 3"),
        (head(first="GET HTTP/1.1"), 400, "9112 3"),
        (head(first="/ HTTP/1.1"), 400, "9112 3"),
        (head(first="GET"), 400, "9112 3"),
        (head(first="HTTP/1.1 200 OK"), 400, "9112 3"),
        (b"GET /\r\n\r\n", 400, "9112 3"),
        (b"\r\r\n\r\n", 400, "9112 3"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "9112 3"),
        (head(first="GET /" + "x" * 17000 + " HTTP/1.1"), 414, "9112 3"),
        (head(first="X" * 17000 + " / HTTP/1.1"), 414, "9112 3"),
        # The method.
        (head(first="G\x00T / HTTP/1.1"), 400, "9112 3.1"),
        (head(first="G(T / HTTP/1.1"), 400, "9112 3.1"),
        (head(first="\x00GET / HTTP/1.1"), 400, "9112 3.1"),
        (head(first='"GET" / HTTP/1.1'), 400, "9112 3.1"),
        (head(first="G\xcbT / HTTP/1.1"), 400, "9112 3.1"),
        (head(first="CONNECT / HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="CONNECT a.b HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="CONNECT a.b: HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="CONNECT a.b:ssh HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="CONNECT a.b:65536 HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="CONNECT :22 HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="CONNECT u@a.b:22 HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="CONNECT http://a.b:22 HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="CONNECT /a.b:22 HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="CONNECT a.b:22 HTTP/1.1", host=""), 400, "9112 3.2"),
        (head(first="CONNECT a.b:22 HTTP/1.0", host="Host: c d"), 400, "9112 3.2"),
        (head(first="connect a.b:22 HTTP/1.1"), 400, "9110 9.1"),
        # The target.
        (head(first="GET /a b HTTP/1.1"), 400, "9112 3.2"),
        (head(first="GET / / HTTP/1.1"), 400, "9112 3.2"),
        (head(first="GET /\x7f HTTP/1.1"), 400, "9112 3.2"),
        (head(first="GET /\x00 HTTP/1.1"), 400, "9112 3.2"),
        (head(first="GET http://a.b\xe4/ HTTP/1.1"), 400, "3986 3.2.2"),
        (head(first="GET /a#b HTTP/1.1"), 400, "9112 3.2.1"),
        (head(first="GET /?a#b HTTP/1.1"), 400, "9112 3.2.1"),
        (head(first="GET a HTTP/1.1"), 400, "9112 3.2.1"),
        (head(first="GET ?a HTTP/1.1"), 400, "9112 3.2.1"),
        (head(first="GET a.b HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="GET a.b:80 HTTP/1.1"), 400, "9112 3.2.3"),
        (head(first="GET * HTTP/1.1"), 400, "9112 3.2.4"),
        (head(first="OPTIONS ** HTTP/1.1"), 400, "9112 3.2.4"),
        (head(first="GET https://a.b/ HTTP/1.1"), 400, "9112 3.2.2"),
        (head(first="GET ftp://a.b/ HTTP/1.1"), 400, "9112 3.2.2"),
        (head(first="GET ws://a.b/ HTTP/1.1"), 400, "9112 3.2.2"),
        (head(first="GET ://a.b/ HTTP/1.1"), 400, "9112 3.2.2"),
        (head(first="GET http:/a.b/ HTTP/1.1"), 400, "9112 3.2.2"),
        (head(first="GET http:a.b/ HTTP/1.1"), 400, "9112 3.2.2"),
        (head(first="GET http:///x HTTP/1.1"), 400, "9110 4.2.1"),
        (head(first="GET http:// HTTP/1.1"), 400, "9110 4.2.1"),
        (head(first="GET http://?x HTTP/1.1"), 400, "9110 4.2.1"),
        (head(first="GET http://:80/ HTTP/1.1"), 400, "9110 4.2.1"),
        (head(first="GET http://u@a.b/ HTTP/1.1"), 400, "9110 4.2.4"),
        (head(first="GET http://u:p@a.b/ HTTP/1.1"), 400, "9110 4.2.4"),
        (head(first="GET http://@a.b/ HTTP/1.1"), 400, "9110 4.2.4"),
        (head(first="GET http://a.b@c.d/ HTTP/1.1"), 400, "9110 4.2.4"),
        (head(first="GET http://a.b\\@c.d/ HTTP/1.1"), 400, "9110 4.2.4"),
        (head(first="GET http://a.b#f HTTP/1.1"), 400, "9110 7.1"),
        (head(first="GET http://a.b/#f HTTP/1.1"), 400, "9110 7.1"),
        (head(first="GET http://a.b:x/ HTTP/1.1"), 400, "3986 3.2.3"),
        (head(first="GET http://a.b:-1/ HTTP/1.1"), 400, "3986 3.2.3"),
        (head(first="GET http://a.b:123456/ HTTP/1.1"), 400, "3986 3.2.3"),
        (head(first="GET http://a.b%00/ HTTP/1.1"), 400, "3986 3.2.2"),
        # The version.
        (head(first="GET / HTTP/11"), 400, "9112 2.3"),
        (head(first="GET / HTTP/1"), 400, "9112 2.3"),
        (head(first="GET / HTTP/1."), 400, "9112 2.3"),
        (head(first="GET / HTTP/.1"), 400, "9112 2.3"),
        (head(first="GET / HTTP/1.10"), 400, "9112 2.3"),
        (head(first="GET / HTTP/01.1"), 400, "9112 2.3"),
        (head(first="GET / HTTP/1.1.1"), 400, "9112 2.3"),
        (head(first="GET / HTTP/1,1"), 400, "9112 2.3"),
        (head(first="GET / HTTP/+1.1"), 400, "9112 2.3"),
        (head(first="GET / HTTP/1.-1"), 400, "9112 2.3"),
        (head(first="GET / HTTP/1.\xb9"), 400, "9112 2.3"),
        (head(first="GET / HTTP/ 1.1"), 400, "9112 2.3"),
        (head(first="GET / http/1.1"), 400, "9112 2.3"),
        (head(first="GET / HTTPS/1.1"), 400, "9112 2.3"),
        (head(first="GET / ICY/1.1"), 400, "9112 2.3"),
        (head(first="GET / HTTP/1.1\x00"), 400, "9112 2.3"),
        (head(first="GET / HTTP/2.0"), 505, "9110 2.5"),
        (head(first="GET / HTTP/0.9"), 505, "9110 2.5"),
        (b"PRI * HTTP/2.0\r\n\r\n", 505, "9110 2.5"),
        # Where lines end.
        (b"GET / HTTP/1.1\nHost: a.b\n\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\nHost: a.b\r\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\r\nHost: a.b\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\r\nHost: a.b\r\n\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\r\nHost: a.b\r\nA: b\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\n\rHost: a.b\r\n\r\n", 400, "9112 2.2"),
        (b"\nGET / HTTP/1.1\r\nHost: a.b\r\n\r\n", 400, "9112 2.2"),
        (b"\rGET / HTTP/1.1\r\nHost: a.b\r\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\rHost: a.b\r\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\r\r\nHost: a.b\r\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\r\nHost: a.b\r\r\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\r\nHost: a.b\r\n\r\r\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\r\n\r\nHost: a.b\r\n\r\n", 400, "9112 3.2"),
        # Before the first field.
        (b"GET / HTTP/1.1\r\n Host: a.b\r\nHost: a.b\r\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\r\n \r\nHost: a.b\r\n\r\n", 400, "9112 2.2"),
        (b"GET / HTTP/1.1\r\n\tA: b\r\nHost: a.b\r\n\r\n", 400, "9112 2.2"),
        # Names of fields.
        (head("A : b"), 400, "9112 5.1"),
        (head("A\t: b"), 400, "9112 5.1"),
        (head("Content-Length : 5"), 400, "9112 5.1"),
        (head("Transfer-Encoding\t: chunked"), 400, "9112 5.1"),
        (head(host="Host : a.b"), 400, "9112 5.1"),
        (head(": b"), 400, "9112 5"),
        (head(":"), 400, "9112 5"),
        (head("A b"), 400, "9112 5"),
        (head("A"), 400, "9112 5"),
        (head("A b: c"), 400, "9112 5"),
        (head("GET / HTTP/1.1"), 400, "9112 5"),
        (head("Content-Length"), 400, "9112 5"),
        (head("Content Length: 5"), 400, "9112 5"),
        (head("A\xe4: b"), 400, "9110 5.1"),
        (head("\xa0A: b"), 400, "9110 5.1"),
        (head("Content\xadLength: 5"), 400, "9110 5.1"),
        # Folds.
        (head("A: b", " folded"), 400, "9112 5.2"),
        (head("A: b", "\tfolded"), 400, "9112 5.2"),
        (head("A: b", " "), 400, "9112 5.2"),
        (head("A:", " b"), 400, "9112 5.2"),
        (head("A: b", " Content-Length: 5"), 400, "9112 5.2"),
        (head("A: b", "\tTransfer-Encoding: chunked"), 400, "9112 5.2"),
        (head("Content-Length:", " 5"), 400, "9112 5.2"),
        (head("Transfer-Encoding:", " chunked"), 400, "9112 5.2"),
        (head("Transfer-Encoding: chunked", " , identity"), 400, "9112 5.2"),
        (head(host="Host:\r\n a.b"), 400, "9112 5.2"),
        (head(host="Host: a.b\r\n .c"), 400, "9112 5.2"),
        # Values of fields.
        (head("A: b\rc"), 400, "9110 5.5"),
        (head("A: b\x00c"), 400, "9110 5.5"),
        (head("A: b\x1bc"), 400, "9110 5.5"),
        (head("A: b\rContent-Length: 5"), 400, "9110 5.5"),
        (head("A: b\nTransfer-Encoding: chunked"), 400, "9112 2.2"),
        (head("A: b\x00Content-Length: 5"), 400, "9110 5.5"),
        # How much there may be.
        (head(*["A%d: b" % i for i in range(201)]), 431, "6585 5"),
        (head(*["A%d: %s" % (i, "b" * 1000) for i in range(70)]), 431, "6585 5"),
        (head("A" * 70000), 431, "6585 5"),
        # Host.
        (head(host=""), 400, "9112 3.2"),
        (head(host="", first="GET / HTTP/1.0"), 400, "9112 3.2"),
        (head(host="", first="GET http://a.b/ HTTP/1.1"), 400, "9112 3.2"),
        (head("X-Forwarded-Host: a.b", host=""), 400, "9112 3.2"),
        (head("Host: c.d"), 400, "9112 3.2"),
        (head("Host: a.b"), 400, "9112 3.2"),
        (head("hOST: a.b"), 400, "9112 3.2"),
        (head("Host:"), 400, "9112 3.2"),
        (head("A: b", "Host: a.b"), 400, "9112 3.2"),
        (head("Host: a.b", first="GET / HTTP/1.0"), 400, "9112 3.2"),
        (head("Host: a.b", first="GET http://a.b/ HTTP/1.1"), 400, "9112 3.2"),
        (head("Host: a.b", host="Host:"), 400, "9112 3.2"),
        (head(host="Host:"), 400, "9112 3.2"),
        (head(host="Host: a b", first="GET http://a.b/ HTTP/1.1"), 400, "9112 3.2"),
        (head(host="Host: u@a.b", first="GET http://a.b/ HTTP/1.1"), 400, "9112 3.2"),
        (head(host="Host: a b"), 400, "9110 7.2"),
        (head(host="Host: a.b, c.d"), 400, "9110 7.2"),
        (head(host="Host: a.b,a.b"), 400, "9110 7.2"),
        (head(host="Host: a.b/c"), 400, "9110 7.2"),
        (head(host="Host: a.b/"), 400, "9110 7.2"),
        (head(host="Host: a.b?c"), 400, "9110 7.2"),
        (head(host="Host: a.b#c"), 400, "9110 7.2"),
        (head(host="Host: a.b\\c"), 400, "9110 7.2"),
        (head(host="Host: a.b;c"), 400, "9110 7.2"),
        (head(host="Host: u@a.b"), 400, "9110 7.2"),
        (head(host="Host: @a.b"), 400, "9110 7.2"),
        (head(host="Host: http://a.b"), 400, "9110 7.2"),
        (head(host='Host: "a.b"'), 400, "9110 7.2"),
        (head(host="Host: a.b:x"), 400, "3986 3.2.3"),
        (head(host="Host: a.b:-1"), 400, "3986 3.2.3"),
        (head(host="Host: a.b: 80"), 400, "3986 3.2.3"),
        (head(host="Host: a.b :80"), 400, "3986 3.2.3"),
        (head(host="Host: a.b:80:80"), 400, "3986 3.2.3"),
        (head(host="Host: a.b:000080"), 400, "3986 3.2.3"),
        (head(host="Host: a.b:\xb2"), 400, "3986 3.2.3"),
        (head(host="Host: :80"), 400, "3986 3.2.2"),
        (head(host="Host: a.b%00"), 400, "3986 3.2.2"),
        (head(host="Host: a.b%2ec"), 400, "3986 3.2.2"),
        (head(host="Host: a.b\xe4"), 400, "3986 3.2.2"),
        (head(host="Host: a.b\xa0"), 400, "3986 3.2.2"),
        (head(host="Host: a.b*"), 400, "3986 3.2.2"),
        (head(host="Host: [::1"), 400, "3986 3.2.2"),
        (head(host="Host: ::1"), 400, "3986 3.2.2"),
        (head(host="Host: [x.y]"), 400, "3986 3.2.2"),
        (head(host="Host: [::1]x"), 400, "3986 3.2.2"),
        (head(host="Host: " + "a" * 256), 400, "1035 2.3.4"),
        # Framing: length and coding.
        (head("Content-Length: 5", "Transfer-Encoding: chunked"), 400, "9112 6.1"),
        (head("Transfer-Encoding: chunked", "Content-Length: 5"), 400, "9112 6.1"),
        (head("Transfer-Encoding: chunked", "Content-Length: 0"), 400, "9112 6.1"),
        (head("Transfer-Encoding: chunked", "Content-Length:"), 400, "9112 6.1"),
        (head("Transfer-Encoding: identity", "Content-Length: 5"), 400, "9112 6.1"),
        (head("Transfer-Encoding:", "Content-Length: 5"), 400, "9112 6.1"),
        (head("transfer-encoding: x", "content-length: 5"), 400, "9112 6.1"),
        (head("Transfer-Encoding: chunked", first="GET / HTTP/1.0"), 400, "9112 6.1"),
        (head("Transfer-Encoding: x", first="GET / HTTP/1.0"), 400, "9112 6.1"),
        # Framing: the length.
        (head("Content-Length: 5", "Content-Length: 5"), 400, "9112 6.3"),
        (head("Content-Length: 5", "content-length: 5"), 400, "9112 6.3"),
        (head("Content-Length: 5", "Content-Length: 6"), 400, "9112 6.3"),
        (head("Content-Length: 0", "A: b", "Content-Length: 5"), 400, "9112 6.3"),
        (head("Content-Length: 5", "Content-Length:"), 400, "9112 6.3"),
        (head("Content-Length: 5, 5"), 400, "9112 6.3"),
        (head("Content-Length: 5,5"), 400, "9112 6.3"),
        (head("Content-Length: 5,"), 400, "9112 6.3"),
        (head("Content-Length: ,5"), 400, "9112 6.3"),
        (head("Content-Length: +5"), 400, "9110 8.6"),
        (head("Content-Length: -5"), 400, "9110 8.6"),
        (head("Content-Length: -0"), 400, "9110 8.6"),
        (head("Content-Length: 5 5"), 400, "9110 8.6"),
        (head("Content-Length: 0x5"), 400, "9110 8.6"),
        (head("Content-Length: 5h"), 400, "9110 8.6"),
        (head("Content-Length: 5.0"), 400, "9110 8.6"),
        (head("Content-Length: 5e0"), 400, "9110 8.6"),
        (head("Content-Length: 5_0"), 400, "9110 8.6"),
        (head("Content-Length: 5;a=b"), 400, "9110 8.6"),
        (head('Content-Length: "5"'), 400, "9110 8.6"),
        (head("Content-Length:"), 400, "9110 8.6"),
        (head("Content-Length: \t"), 400, "9110 8.6"),
        (head("Content-Length: \xb2"), 400, "9110 8.6"),
        (head("Content-Length: 5\xa0"), 400, "9110 8.6"),
        (head("Content-Length: " + "1" * 19), 400, "9110 8.6"),
        (head("Content-Length: " + "0" * 18 + "5"), 400, "9110 8.6"),
        (head("Content-Length: 18446744073709551621"), 400, "9110 8.6"),
        # Framing: the coding.
        (head("Transfer-Encoding: gzip, chunked"), 501, "9112 6.1"),
        (head("Transfer-Encoding: chunked, gzip"), 501, "9112 6.1"),
        (head("Transfer-Encoding: gzip"), 501, "9112 6.1"),
        (head("Transfer-Encoding: identity"), 501, "9112 7"),
        (head("Transfer-Encoding: identity, chunked"), 501, "9112 7"),
        (head("Transfer-Encoding: chunked, identity"), 501, "9112 7"),
        (head("Transfer-Encoding: chunked, chunked"), 501, "9112 6.1"),
        (head(*["Transfer-Encoding: chunked"] * 2), 501, "9112 6.1"),
        (head("Transfer-Encoding: chunked", "Transfer-Encoding: x"), 501, "9112 6.1"),
        (head("Transfer-Encoding: x", "transfer-encoding: chunked"), 501, "9112 6.1"),
        (head("Transfer-Encoding: chunked", "Transfer-Encoding:"), 501, "9112 6.1"),
        (head("Transfer-Encoding:", "Transfer-Encoding: chunked"), 501, "9112 6.1"),
        (head("Transfer-Encoding: chunked,"), 501, "9112 6.1"),
        (head("Transfer-Encoding: ,chunked"), 501, "9112 6.1"),
        (head("Transfer-Encoding: xchunked"), 501, "9112 7"),
        (head("Transfer-Encoding: chunkedx"), 501, "9112 7"),
        (head("Transfer-Encoding: x chunked"), 501, "9112 7"),
        (head("Transfer-Encoding: chunked chunked"), 501, "9112 7"),
        (head("Transfer-Encoding: chunked;q=1"), 501, "9112 7"),
        (head("Transfer-Encoding: chunked;"), 501, "9112 7"),
        (head('Transfer-Encoding: "chunked"'), 501, "9112 7"),
        (head("Transfer-Encoding: chunked\xa0"), 501, "9112 7"),
        (head("Transfer-Encoding: \x85chunked"), 501, "9112 7"),
        (head("Transfer-Encoding: \x0bchunked"), 400, "9110 5.5"),
        (head("Transfer-Encoding: chunked\x00"), 400, "9110 5.5"),
        (head("Transfer-Encoding:"), 501, "9112 7"),
        # Connection names a field that is for everybody on the way.
        (head("Connection: Host"), 400, "9110 7.6.1"),
        (head("Connection: close, hOST"), 400, "9110 7.6.1"),
        (head("Connection: close", "Connection: Host"), 400, "9110 7.6.1"),
        (head("Connection: Content-Length"), 400, "9110 7.6.1"),
        (
            head("Connection: close, Content-Length", "Content-Length: 1"),
            400,
            "9110 7.6.1",
        ),
        (
            head("Connection: transfer-encoding", "Transfer-Encoding: chunked"),
            400,
            "9110 7.6.1",
        ),
        (head(host="Host: a.b.."), 400, "1035 2.3.1"),
        (head(host="Host: a..b"), 400, "1035 2.3.1"),
        (head(first="GET http://a.b../ HTTP/1.1"), 400, "1035 2.3.1"),
        (head(host="Host: [a.b]"), 400, "3986 3.2.2"),
        (head("Content_Length: 5"), 400, "9110 17.10"),
        (head("Transfer_Encoding: chunked"), 400, "9110 17.10"),
        (head("Content-Length: 5", "Transfer_Encoding: chunked"), 400, "9110 17.10"),
        (head("Connection: Upgrade", "Upgrade: h2c;a"), 400, "9110 7.8"),
        (head("Connection: Upgrade", "Upgrade: h2c x"), 400, "9110 7.8"),
    ]
    BAD += [(head("A%s: b" % char), 400, "9110 5.1") for char in NO_TOKEN]
    BAD += [(head("A%sB: c" % char), 400, "9110 5.1") for char in CONTROLS]
    BAD += [(head("A: b%sc" % char), 400, "9110 5.5") for char in CONTROLS]
    BAD += [(head("A:%sb" % char), 400, "9110 5.5") for char in CONTROLS]
    BAD += [(head("A: b" + char), 400, "9110 5.5") for char in CONTROLS]
    BAD += [(head(host="Host: a.b" + char), 400, "9110 5.5") for char in CONTROLS]
    BAD += [(head("Content-Length: 5" + char), 400, "9110 5.5") for char in CONTROLS]

    def test_what_two_parsers_could_read_differently_is_refused(self):
        for raw, status, clause in self.BAD:
            for step in (None, 1):
                for rest in (b"", b"GET / HTTP/1.1\r\n"):
                    with self.subTest(raw=raw[:80], rfc=clause, step=step, rest=rest):
                        self.assertEqual(parse_request(raw + rest, step), status)

    GOOD = [
        (head(), ("GET", "/", "a.b"), "9112 3.2.1"),
        (head(first="GET / HTTP/1.0"), ("GET", "/", "a.b"), "9110 2.5"),
        (head(first="GET / HTTP/1.9"), ("GET", "/", "a.b"), "9110 2.5"),
        (head(first="M-SEARCH / HTTP/1.1"), ("M-SEARCH", "/", "a.b"), "9110 9.1"),
        (head(first="get / HTTP/1.1"), ("get", "/", "a.b"), "9110 9.1"),
        (
            head(first="!#$%&'*+.^_`|~1 / HTTP/1.1"),
            ("!#$%&'*+.^_`|~1", "/", "a.b"),
            "9110 9.1",
        ),
        (head(first="GET //c.d/x HTTP/1.1"), ("GET", "//c.d/x", "a.b"), "9112 3.2.1"),
        (head(first="GET /../x HTTP/1.1"), ("GET", "/../x", "a.b"), "9112 3.2.1"),
        (head(first="GET /%00?a=%2F HTTP/1.1"), ("GET", "/%00?a=%2F", "a.b"), "3986 2"),
        (
            head(first='GET /"<>\\^`{|}[] HTTP/1.1'),  # not in a URI, but in browsers
            ("GET", '/"<>\\^`{|}[]', "a.b"),
            "9112 3.2",
        ),
        (
            head(first="GET /\xc3\xa0?\x80\x85\xff HTTP/1.1"),  # as curl sends them
            ("GET", "/\xc3\xa0?\x80\x85\xff", "a.b"),
            "9112 3.2",
        ),
        (head(first="OPTIONS * HTTP/1.1"), ("OPTIONS", "*", "a.b"), "9112 3.2.4"),
        (
            head(first="CONNECT C.d:022 HTTP/1.1"),
            ("CONNECT", "C.d:022", "c.d"),
            "9110 9.3.6",
        ),
        (
            head(first="CONNECT c.d:22 HTTP/1.0", host=""),  # as nc sends it
            ("CONNECT", "c.d:22", "c.d"),
            "9110 9.3.6",
        ),
        (
            head(first="GET http://c.d:80/x?y HTTP/1.1"),
            ("GET", "/x?y", "c.d"),
            "9112 3.2.2",
        ),
        (head(first="GET HTTP://c.d HTTP/1.1"), ("GET", "/", "c.d"), "9112 3.2.2"),
        (head(first="GET http://c.d?q HTTP/1.1"), ("GET", "/?q", "c.d"), "9112 3.2.2"),
        (head(first="GET http://C.D.:/ HTTP/1.1"), ("GET", "/", "c.d"), "9110 4.2.3"),
        (head(first="GET http://[::1]/ HTTP/1.1"), ("GET", "/", "[::1]"), "3986 3.2.2"),
        (head(host="hOsT:\t a.B.:81 \t"), ("GET", "/", "a.b"), "9110 7.2"),
        (head(host="Host:a.b:"), ("GET", "/", "a.b"), "3986 3.2.3"),
        (head(host="Host: [::1]:80"), ("GET", "/", "[::1]"), "3986 3.2.2"),
        (head("X-Host: c.d"), ("GET", "/", "a.b"), "9112 3.2"),
        (
            head("A:", "B:  c\td\xe4 ", "Content-Length: 0"),
            ("GET", "/", "a.b"),
            "9110 5.5",
        ),
        (head("A::", 'B: "c', "!#$%&'*+-.^`|~: d"), ("GET", "/", "a.b"), "9110 5.1"),
        (head("A: b", "a: c", "A: b"), ("GET", "/", "a.b"), "9110 5.3"),
        (head(*["A%d: b" % i for i in range(199)]), ("GET", "/", "a.b"), "9110 5.4"),
        (head("Content-Length:\t05\t"), ("GET", "/", "a.b"), "9110 5.6.3"),
        (head("Content-Length: " + "9" * 18), ("GET", "/", "a.b"), "9110 8.6"),
        (head("Transfer-Encoding: \tCHUNKED "), ("GET", "/", "a.b"), "9112 7"),
        (head("Connection: ,close,, x,"), ("GET", "/", "a.b"), "9110 5.6.1"),
        (
            head("Trailer: Content-Length", "TE: chunked"),
            ("GET", "/", "a.b"),
            "9110 6.6.2",
        ),
    ]

    def test_good_heads_are_understood_however_they_are_cut(self):
        for raw, expected, clause in self.GOOD:
            for step in (None, 1, 7):
                for rest in (b"", b"body"):
                    found = parse_request(raw + rest, step)
                    with self.subTest(raw=raw, rfc=clause, found=found):
                        said = found.method, found.target, found.name
                        self.assertEqual(said, expected)

    def test_later_minor_versions_are_one_point_one(self):
        line, _ = self.to_service(first="GET / HTTP/1.7")
        self.assertEqual(line, "GET / HTTP/1.1")

    def test_head_that_goes_on_is_not_judged_yet(self):
        self.assertIsNone(parse_request(b"GET / HTTP/1.1\r\nHost: a.b\r\n"))

    def test_long_head_of_blanks_is_refused_in_no_time(self):
        raw = head(*["A:" + " " * 300 for _ in range(199)] + ["bad line"])
        self.assertEqual(parse_request(raw), 400)

    def to_service(self, *lines, **options):
        text = parse_request(head(*lines, **options)).to_service().decode("latin-1")
        first, *fields = text[:-4].split("\r\n")
        return first, fields

    def test_service_gets_the_request_in_origin_form_with_one_host(self):
        line, fields = self.to_service(first="GET http://c.d:8000/x HTTP/1.1")
        self.assertEqual(line, "GET /x HTTP/1.1")
        self.assertEqual(fields[0], "Host: c.d:8000")
        self.assertEqual(sum(field.startswith("Host:") for field in fields), 1)

    def test_service_learns_who_asked_and_nobody_can_forge_it(self):
        forged = [
            "X-Forwarded-For: 6.6.6.6",
            "X_Forwarded_For: 6.6.6.6",
            "x-forwarded-port: 1",
            "X-Real-IP: 6.6.6.6",
            "X_real-ip: 6.6.6.6",
            "Forwarded: for=6.6.6.6",
        ]
        _, fields = self.to_service(*forged)
        self.assertEqual(
            fields,
            [
                "Host: a.b",
                "X-Forwarded-For: 192.0.2.1",
                "X-Forwarded-Proto: http",
                "X-Forwarded-Host: a.b",
            ],
        )

    def test_what_concerns_one_hop_is_dropped(self):
        lines = [
            "Connection: close, x-private",
            "X-Private: 1",
            "Keep-Alive: 5",
            "Proxy-Connection: x",
            "TE: gzip",
            "Upgrade: websocket",
            "Accept: text/html",
        ]
        _, fields = self.to_service(*lines)
        self.assertEqual(fields[1], "Accept: text/html")
        self.assertTrue(fields[2].startswith("X-Forwarded-For"))

    def test_framing_is_said_anew_and_once(self):
        _, fields = self.to_service("CONTENT-length:\t 7 \t", "Accept:x")
        self.assertEqual([f for f in fields if "ength" in f], ["Content-Length: 7"])
        _, fields = self.to_service("transfer-ENCODING: Chunked")
        found = [field for field in fields if "hunked" in field]
        self.assertEqual(found, ["Transfer-Encoding: chunked"])

    def test_service_gets_the_fields_that_a_hook_left(self):
        lines = ["X-Secret: 1", "Content-Length: 7", "X-Real-IP: forged", "A: 1"]
        request = parse_request(head(*lines))
        request.fields = [pair for pair in request.fields if pair[0] != "X-Secret"]
        request.fields.append(("B", "2"))
        text = request.to_service().decode()
        self.assertNotIn("X-Secret", text)
        self.assertNotIn("forged", text)
        self.assertEqual(text.count("Content-Length: 7\r\n"), 1)
        self.assertIn("\r\nA: 1\r\nB: 2\r\n", text)

    def test_fields_that_come_again_go_on_as_they_would_alone(self):
        lines = ["Content-Length: 3", "Connection: close, X-Gone", "X-Gone: 1", "B: 2"]
        raw, old = head(*lines), head(*lines, first="GET /2 HTTP/1.0")
        absolute = head(*lines, first="GET http://c.d/3 HTTP/1.1")
        asked = [(raw, "192.0.2.1"), (old, "192.0.2.1"), (absolute, "192.0.2.1")]
        asked += [(raw, "192.0.2.2"), (raw, "192.0.2.1")]
        recent, shared, alone = server_module.Recent(), [], []
        for data, address in asked:
            request = server_module.Request(data, address, recent=recent)
            shared.append(request.to_service())
        for data, address in asked:
            server_module.recent_sections.clear()
            alone.append(server_module.Request(data, address).to_service())
        self.assertEqual(shared, alone)
        self.assertEqual(len(set(shared)), 4)  # the first and the last are the same
        once, twice = [server_module.Request(raw, "192.0.2.3") for _ in range(2)]
        self.assertIs(once.section, twice.section)

    def test_what_hooks_and_bodies_do_to_a_request_harms_no_later_one(self):
        raw, recent = head("A: 1", "Content-Length: 3"), server_module.Recent()
        first = server_module.Request(raw, "192.0.2.1", recent=recent)
        first.fields.append(("B", "2"))
        first.body.feed(b"abc")
        self.assertIn(b"\r\nB: 2\r\n", first.to_service())
        second = server_module.Request(raw, "192.0.2.1", recent=recent)
        self.assertEqual(second.fields[1:], [("A", "1"), ("Content-Length", "3")])
        self.assertNotIn(b"\r\nB: 2\r\n", second.to_service())
        self.assertFalse(second.body.done)
        empty = [parse_request(head()).body for _ in range(2)]
        self.assertIsNot(*empty)

    def test_hook_cannot_leave_what_no_head_can_hold(self):
        for pair in [
            ("A", "b\r\nC: d"),
            ("A", "b\nC: d"),
            ("A", "b\rC: d"),
            ("A\r\nB", "c"),
            ("A: b\r\nB", "c"),
            ("A b", "c"),
            ("", "b"),
            ("A", "b\0"),
            ("A", "\u0141ukasz"),
            ("A", "b\r\n\r\nGET / HTTP/1.1"),
        ]:
            request = parse_request(head())
            request.fields.append(pair)
            with self.subTest(pair), self.assertRaises(ValueError):
                request.to_service()

    SECRETS = [
        "Cookie: a=secret",
        "cookie: a=secret",
        "Authorization: secret",
        "PROXY-AUTHORIZATION: secret",
        "Referer: http://a/?secret",
        "X-API-Key: secret",
        "X-Auth-Token: secret",
        "X-CSRF-Token: secret",
        "X-Amz-Security-Token: secret",
    ]

    def test_no_common_cache_keeps_secrets(self):
        server_module.recent_sections.clear()
        recent = server_module.Recent()
        for line in self.SECRETS:
            raw = head("A: b", line)
            server_module.Request(raw, "192.0.2.1", recent=recent).to_service()
            self.assertNotIn("secret", str(server_module.recent_sections))
            self.assertIn("secret", recent.request.raw)  # goes with its connection
        for line in ("Set-Cookie: a=secret", "Location: /?secret"):
            server_module.Answer(answer_head("A: b", line), "GET", recent)
            self.assertNotIn("secret", str(server_module.recent_sections))
            self.assertIn("secret", recent.answer.raw)

    def test_what_is_remembered_is_bounded_in_number_and_size(self):
        server_module.recent_sections.clear()
        recent, most = server_module.Recent(), server_module.RECENT
        for number in range(2 * most + 5):
            parse_request(head("A: %d" % number))
            self.assertLessEqual(len(server_module.recent_sections), most)
        self.assertGreater(len(server_module.recent_sections), 0)
        server_module.recent_sections.clear()
        large = "A: " + "b" * server_module.RECENT_SIZE
        server_module.Request(head(large), "192.0.2.1", recent=recent).to_service()
        server_module.Answer(answer_head(large), "GET", recent)
        self.assertFalse(server_module.recent_sections)
        self.assertLess(len(recent.request.raw + recent.answer.raw), 100)

    def test_safe_methods_are_known(self):
        for method in ("GET", "HEAD", "OPTIONS"):
            self.assertTrue(parse_request(head(first=method + " / HTTP/1.1")).is_safe())
        for method in ("POST", "PUT", "DELETE", "get", "TRACE"):
            raw = head(first=method + " / HTTP/1.1")
            self.assertFalse(parse_request(raw).is_safe())

    def test_upgrade_and_trailers_are_passed_on_as_our_own(self):
        lines = ["Connection: Upgrade, TE", "Upgrade: websocket", "TE: trailers, gzip"]
        _, fields = self.to_service(*lines)
        for field in ("Upgrade: websocket", "TE: trailers", "Connection: Upgrade, TE"):
            self.assertIn(field, fields)

    def test_empty_members_of_a_list_name_nothing(self):
        _, fields = self.to_service("A: b", "Connection: ,close,, x,", "X: c")
        self.assertEqual(fields[:2], ["Host: a.b", "A: b"])
        self.assertNotIn("X: c", fields)

    def test_upgrade_in_one_point_zero_is_dropped(self):
        lines = ["Connection: Upgrade", "Upgrade: websocket"]
        request = parse_request(head(*lines, first="GET / HTTP/1.0"))
        self.assertEqual(request.upgrade, "")
        self.assertNotIn(b"pgrade", request.to_service())

    def test_upgrade_to_h2c_is_dropped(self):
        _, fields = self.to_service("Connection: Upgrade", "Upgrade: h2c")
        self.assertFalse([field for field in fields if "pgrade" in field])

    def test_version_one_point_zero_stays(self):
        line, fields = self.to_service(first="GET / HTTP/1.0")
        self.assertEqual(line, "GET / HTTP/1.0")
        self.assertIn("Connection: close", fields)

    def test_headers_are_found_without_regard_to_case(self):
        request = parse_request(head("X-A: 1", "x-a: 2"))
        self.assertEqual(request.headers["X-a"], "1, 2")
        self.assertEqual(request.headers.get("none", "-"), "-")
        self.assertIn("x-A", request.headers)


def answer_head(*lines, first="HTTP/1.1 200 OK"):
    return head(*lines, first=first, host="")


class AnswerHeads(unittest.TestCase):
    def answer(self, *lines, first="HTTP/1.1 200 OK", method="GET"):
        return server_module.Answer(answer_head(*lines, first=first), method)

    BAD = [
        # The status line.
        (answer_head(first="HTTP/2 200 OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/0.9 200 OK"), "GET", "9110 2.5"),
        (answer_head(first="HTTP/1. 200 OK"), "GET", "9112 2.3"),
        (answer_head(first="HTTP/1 200 OK"), "GET", "9112 2.3"),
        (answer_head(first="HTTP/01.1 200 OK"), "GET", "9112 2.3"),
        (answer_head(first="http/1.1 200 OK"), "GET", "9112 2.3"),
        (answer_head(first="ICY 200 OK"), "GET", "9112 2.3"),
        (answer_head(first="200 OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 OK"), "GET", "9112 4"),
        (answer_head(first="GET / HTTP/1.1"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 20 OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 2000 OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 +20 OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 20\xb2 OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 200OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 000 X"), "GET", "9110 15"),
        (answer_head(first="HTTP/1.1 099 X"), "GET", "9110 15"),
        (answer_head(first=" HTTP/1.1 200 OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1\t200 OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 \t200 OK"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 200 O\x00K"), "GET", "9112 4"),
        (answer_head(first="HTTP/1.1 200 O\rK"), "GET", "9112 2.2"),
        (answer_head(first="HTTP/1.1 200 OK\r"), "GET", "9112 2.2"),
        (b"\0HTTP/1.1 200 OK\r\n\r\n", "GET", "9112 4"),
        (b"\rHTTP/1.1 200 OK\r\n\r\n", "GET", "9112 4"),
        (b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "GET", "9112 4"),
        (b"\n\nHTTP/1.1 200 OK\r\n\r\n", "GET", "9112 4"),
        (b"<html>hello</html>\r\n\r\n", "GET", "9112 4"),
        # Where lines end.
        (b"HTTP/1.1 200 OK\r\nA: b\r\r\n\r\n", "GET", "9112 2.2"),
        (b"HTTP/1.1 200 OK\rA: b\r\n\r\n", "GET", "9112 2.2"),
        (b"HTTP/1.1 200 OK\nA: b\r\r\n\n", "GET", "9112 2.2"),
        # Fields.
        (answer_head(" A: b"), "GET", "9112 2.2"),
        (answer_head("\tA: b"), "GET", "9112 2.2"),
        (answer_head(" "), "GET", "9112 2.2"),
        (answer_head("A", " : b"), "GET", "9112 5.2"),
        (answer_head("A", " b"), "GET", "9112 5.2"),
        (answer_head("Content-Length", " : 5"), "GET", "9112 5.2"),
        (answer_head("A: b", " c\x01"), "GET", "9112 5.2"),
        (answer_head("A\x00: b"), "GET", "9110 5.1"),
        (answer_head("A\x01: b"), "GET", "9110 5.1"),
        (answer_head(": b"), "GET", "9112 5"),
        (answer_head(" : b"), "GET", "9112 5"),
        (answer_head("A b: c"), "GET", "9112 5"),
        (answer_head("Content Length: 5"), "GET", "9112 5"),
        (answer_head("A b : c"), "GET", "9112 5"),
        (answer_head("A b"), "GET", "9112 5"),
        (answer_head("A@ : b"), "GET", "9112 5"),
        (answer_head("A: b\x00c"), "GET", "9110 5.5"),
        (answer_head("A: b\x7fc"), "GET", "9110 5.5"),
        (answer_head("A@: b\x01"), "GET", "9110 5.5"),
        (answer_head("A: b\rB: c"), "GET", "9110 5.5"),
        (answer_head(*["A: b"] * 201), "GET", "9110 5.4"),
        (answer_head("A: b", *[" c"] * 201), "GET", "9110 5.4"),
        (answer_head("A: " + "b" * 70000), "GET", "9110 5.4"),
        # Framing.
        (answer_head("Content-Length: 5", "Content-Length: 6"), "GET", "9112 6.3"),
        (answer_head("Content-Length: 5", "Content-Length: 6"), "HEAD", "9112 6.3"),
        (answer_head("Content-Length: 5", "Content-Length :6"), "GET", "9112 6.3"),
        (answer_head("Content-Length: 5", "Content-Length:"), "GET", "9112 6.3"),
        (answer_head("Content-Length: 5, 6"), "GET", "9112 6.3"),
        (answer_head("Content-Length: 5, 55"), "GET", "9112 6.3"),
        (answer_head("Content-Length: 0, 5"), "GET", "9112 6.3"),
        (answer_head("Content-Length: 5,"), "GET", "9112 6.3"),
        (answer_head("Content-Length: ,5"), "GET", "9112 6.3"),
        (answer_head("Content-Length: 5 5"), "GET", "9112 6.3"),
        (answer_head("Content-Length: 1", " 0"), "GET", "9112 6.3"),
        (answer_head("Content-Length:"), "GET", "9110 8.6"),
        (answer_head("Content-Length: +5"), "GET", "9110 8.6"),
        (answer_head("Content-Length: -5"), "GET", "9110 8.6"),
        (answer_head("Content-Length: 0x5"), "GET", "9110 8.6"),
        (answer_head("Content-Length: 5.0"), "GET", "9110 8.6"),
        (answer_head("Content-Length: 5;"), "GET", "9110 8.6"),
        (answer_head("Content-Length: \xb2"), "GET", "9110 8.6"),
        (answer_head("Content-Length: 5\xa0"), "GET", "9110 8.6"),
        (answer_head("Content-Length: " + "1" * 19), "GET", "9110 8.6"),
        (answer_head("Content-Length: 18446744073709551621"), "GET", "9110 8.6"),
        (
            answer_head("Content-Length: 5, 6", first="HTTP/1.1 100 X"),
            "GET",
            "9112 6.3",
        ),
        (
            answer_head("Transfer-Encoding: chunked", first="HTTP/1.0 200 OK"),
            "GET",
            "9112 6.1",
        ),
        (answer_head("Transfer-Encoding: gzip"), "GET", "9112 6.3"),
        (answer_head("Transfer-Encoding: x", "Content-Length: 5"), "GET", "9112 6.3"),
        (answer_head("Transfer-Encoding: gzip, chunked"), "GET", "9112 6.1"),
        (answer_head("Transfer-Encoding: chunked, gzip"), "GET", "9112 6.1"),
        (answer_head("Transfer-Encoding: xchunked"), "GET", "9112 7"),
        (answer_head("Transfer-Encoding: chunked x"), "GET", "9112 7"),
        (answer_head("Transfer-Encoding: chunked;q=1"), "GET", "9112 7"),
        (answer_head('Transfer-Encoding: "chunked"'), "GET", "9112 7"),
        (answer_head("Transfer-Encoding: chunked\xa0"), "GET", "9112 7"),
        (answer_head("Transfer-Encoding: chun", " ked"), "GET", "9112 7"),
        (answer_head("Transfer-Encoding: \x0bchunked"), "GET", "9110 5.5"),
    ]
    BAD += [(answer_head("A: b%sc" % char), "GET", "9110 5.5") for char in CONTROLS
            if char != "\n"]  # fmt: skip

    def test_fields_are_counted_before_they_are_tidied(self):
        odd = "\r\na :b"  # it breaks the grammar
        few, many = odd * 9 + "\r\n\r\n", odd * 300 + "\r\n\r\n"
        self.assertEqual(server_module.by_grammar(few, True).count("\r\na: b"), 9)
        self.assertEqual(server_module.by_grammar(many, True), "")

    def test_framing_of_a_body_that_does_not_come_is_not_judged(self):
        """An answer to HEAD loses what nobody understands of it."""
        broken = "Content-Length: +5", "Content-Length: ", "Transfer-Encoding: gzip"
        for line in broken:
            answer = server_module.Answer(answer_head(line, "A: b"), "HEAD")
            said = answer.to_visitor("")
            self.assertEqual(said, b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n", line)
            with self.assertRaises(server_module.HTTPError):
                server_module.Answer(answer_head(line, "A: b"), "GET")

    def test_broken_answers_are_refused(self):
        for raw, method, clause in self.BAD:
            for step in (None, 1):
                for rest in (b"", b"HTTP/1.1 200 OK\r\n\r\n"):
                    with self.subTest(raw=raw[:80], rfc=clause, step=step, rest=rest):
                        with self.assertRaises(server_module.HTTPError):
                            parse_answer(raw + rest, method, step)

    GOOD = [  # the verdict: status and reason
        (answer_head(), (200, "OK"), "9112 4"),
        (answer_head(first="HTTP/1.1 200"), (200, ""), "9112 4"),
        (answer_head(first="HTTP/1.10 200 OK"), (200, "OK"), "9112 2.3"),
        (answer_head(first="HTTP/1.01 200 OK"), (200, "OK"), "9112 2.3"),
        (answer_head(first="HTTP/1.0 200 "), (200, ""), "9112 4"),
        (answer_head(first="HTTP/1.2 200 OK"), (200, "OK"), "9110 2.5"),
        (answer_head(first="HTTP/2.0 200 OK"), (200, "OK"), "9110 2.5"),
        (answer_head(first="HTTP/1.1  200 OK"), (200, "OK"), "9112 4"),
        (answer_head(first="HTTP/1.1 200  OK"), (200, " OK"), "9112 4"),
        (answer_head(first="HTTP/1.1 200\tOK"), (200, "OK"), "9112 4"),
        (answer_head(first="HTTP/1.1 200 O\x1bK"), (200, "O"), "9112 4"),
        (answer_head(first="HTTP/1.1 200 \x7f"), (200, ""), "9112 4"),
        (answer_head(first="HTTP/1.1 599 a\tb; \xe4"), (599, "a\tb; \xe4"), "9112 4"),
        (answer_head(first="HTTP/1.1 600 X"), (600, "X"), "9110 15"),
        (answer_head(first="HTTP/1.1 999 Denied"), (999, "Denied"), "9110 15"),
        (answer_head(first="HTTP/1.1 100 X"), (100, "X"), "9110 15.2"),
        (b"\r\nHTTP/1.1 200 OK\r\n\r\n", (200, "OK"), "9112 2.2"),
        (b"\nHTTP/1.1 200 OK\n\n", (200, "OK"), "9112 2.2"),
        (b"HTTP/1.1 200 OK\n\n", (200, "OK"), "9112 2.2"),
        (b"HTTP/1.1 200\n\r\n", (200, ""), "9112 2.2"),
        (answer_head("A:", "B:c\xe4", "A_B: d"), (200, "OK"), "9110 5.5"),
        (answer_head("Set-Cookie: a", "Set-Cookie: b"), (200, "OK"), "9110 5.3"),
        (answer_head("Connection: Set-Cookie"), (200, "OK"), "9110 7.6.1"),
        (answer_head("Content-Length:\t05\t"), (200, "OK"), "9110 5.6.3"),
        (answer_head("Transfer-Encoding: CHUNKED"), (200, "OK"), "9112 7"),
    ]

    def test_good_answers_are_understood_however_they_are_cut(self):
        for raw, expected, clause in self.GOOD:
            for step in (None, 1, 7):
                for rest in (b"", b"body"):
                    with self.subTest(raw=raw, rfc=clause, step=step, rest=rest):
                        answer, _ = parse_answer(raw + rest, "GET", step)
                        self.assertEqual((answer.status, answer.reason), expected)

    LENGTH, CHUNKS = "Content-Length: 5", "Transfer-Encoding: chunked"
    LF = [  # behind the status line: lines that end with LF; only some of them, too
        ("\nContent-Length: 5\n\n", [LENGTH], "9112 2.2"),
        ("\r\nContent-Length: 5\n\r\n", [LENGTH], "9112 2.2"),
        ("\r\nContent-Length: 5\r\n\n", [LENGTH], "9112 2.2"),
        ("\nContent-Length: 5\r\n\r\n", [LENGTH], "9112 2.2"),
        ("\nA: b\nB: c\r\nContent-Length: 5\n\n", ["A: b", "B: c", LENGTH], "2.2"),
        ("\nTransfer-Encoding: chunked\n\n", [CHUNKS], "9112 2.2"),
        ("\nVia: a\nVia:b\n\n", ["Via: a", "Via: b"], "9112 2.2"),
        ("\nA : b\n c\n\n", ["A: b c"], "9112 5.2"),
    ]
    ODD = [  # fields of the service, and what goes on
        # White space before a colon.
        ("Server : box", ["Server: box"], "9112 5.1"),
        ("A \t :b", ["A: b"], "9112 5.1"),
        ("Content-Length : 5", [LENGTH], "9112 5.1"),
        ("Transfer-Encoding\t: chunked", [CHUNKS], "9112 5.1"),
        ("Content-Length: 5\r\nContent-Length : 5", [LENGTH], "5.1"),
        # Folds.
        ("X-Long: a\r\n b", ["X-Long: a b"], "9112 5.2"),
        ("A: b\r\n\tc\r\n \t d", ["A: b c d"], "9112 5.2"),
        ("A:\r\n b", ["A: b"], "9112 5.2"),
        ("A: b\r\n \r\n c", ["A: b  c"], "9112 5.2"),
        ("A: b\r\n ", ["A: b"], "9112 5.2"),
        ("Content-Length:\r\n 5", [LENGTH], "9112 5.2"),
        ("A: b\r\n Content-Length: 6", ["A: b Content-Length: 6"], "5.2"),
        ("Transfer-Encoding:\r\n\tchunked", [CHUNKS], "9112 5.2"),
        # Lengths.
        ("Content-Length: 5\r\nContent-Length: 5", [LENGTH], "9112 6.3"),
        ("Content-Length: 5\r\ncontent-length: 05", [LENGTH], "6.3"),
        ("Content-Length: 5, 5", [LENGTH], "9112 6.3"),
        ("Content-Length: 5,5 ,\t5", [LENGTH], "9112 6.3"),
        ("Content-Length: 05", [LENGTH], "9110 8.6"),
        ("Content-Length: %s5" % ("0" * 30), [LENGTH], "9110 8.6"),
        ("Content-Length: 00, 0", ["Content-Length: 0"], "9110 8.6"),
        # Both: chunks win.
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", [CHUNKS], "6.3"),
        ("Transfer-Encoding: chunked\r\nContent-Length: 9", [CHUNKS], "6.3"),
        ("Transfer-Encoding: chunked\r\nContent-Length: x", [CHUNKS], "6.3"),
        ("Content-Length: 5, 6\r\nTransfer-Encoding: chunked", [CHUNKS], "6.3"),
        # Codings.
        ("Transfer-Encoding: identity", [], "9112 7"),
        ("Transfer-Encoding:", [], "9112 7"),
        ("Transfer-Encoding: identity\r\nContent-Length: 5", [LENGTH], "7"),
        ("Transfer-Encoding: Identity, chunked", [CHUNKS], "9112 7"),
        ("Transfer-Encoding: chunked, identity", [CHUNKS], "9112 7"),
        ("Transfer-Encoding: Chunked", [CHUNKS], "9112 7"),
        ("Transfer-Encoding: chunked,", [CHUNKS], "9110 5.6.1"),
        ("Transfer-Encoding: ,chunked", [CHUNKS], "9110 5.6.1"),
        ("Transfer-Encoding: chunked, chunked", [CHUNKS], "9112 6.1"),
        ("\r\n".join([CHUNKS, CHUNKS]), [CHUNKS], "9112 6.1"),
        # What only looks like framing.
        ("Content_Length: 7", ["Content_Length: 7"], "9110 5.1"),
        ("Transfer_Encoding: chunked", ["Transfer_Encoding: chunked"], "5.1"),
        ("Connection: Content-Length\r\nContent-Length: 5", [LENGTH], "7.6.1"),
        ("Connection: Transfer-Encoding", [], "9110 7.6.1"),
        # What is no field to any browser.
        ("A@: b\r\nB: c", ["B: c"], "9110 5.1"),
        ("A(x): b\r\n c\r\nB: c", ["B: c"], "9110 5.1"),
        ("A\xe4: b", [], "9110 5.1"),
        ('"Content-Length": 7\r\nContent-Length: 5', [LENGTH], "9110 5.1"),
        ("word\r\nB: c", ["B: c"], "9112 5"),
        ("HTTP/1.1 404 Not Found\r\nB: c", ["B: c"], "9112 5"),
        ("HTTP/1.1 404 Not Found\r\n a\r\nB: c", ["B: c"], "9112 5.2"),
        # What concerns one hop, and broken protocols.
        ("Connection: close, A\r\nA: b\r\nB: c", ["B: c"], "9110 7.6.1"),
        ("Keep-Alive : 5\r\nB: c", ["B: c"], "9110 7.6.1"),
        ("Connection: upgrade\r\nUpgrade: h2c;a", [], "9110 7.8"),
    ]

    def test_odd_heads_go_on_by_the_grammar(self):
        table = [("HTTP/1.1 200 OK" + text, *row) for text, *row in self.LF]
        first = "HTTP/1.1 200 OK\r\n"
        table += [(first + text + "\r\n\r\n", *row) for text, *row in self.ODD]
        for text, fields, clause in table:
            raw, expected = text.encode("latin-1"), answer_head(*fields)
            for step in (None, 1, 7):
                for rest in (b"", b"\r\n\r\nbody", b"\n\n"):
                    with self.subTest(raw=raw, rfc=clause, step=step, rest=rest):
                        answer, _ = parse_answer(raw + rest, "GET", step)
                        self.assertEqual(answer.to_visitor(""), expected)

    def test_answer_without_content_needs_no_sound_framing(self):
        odd = ["Content-Length: x", "Transfer-Encoding: gzip"]
        for first in ("HTTP/1.1 204 X", "HTTP/1.1 304 X"):
            for line in odd:
                answer = self.answer(line, first=first)
                self.assertEqual(answer.to_visitor(""), answer_head(first=first))
                self.assertTrue(answer.frame().done)

    def test_stream_is_not_kept_when_the_service_may_think_of_another_end(self):
        length, chunked = "Content-Length: 5", "Transfer-Encoding: chunked"
        table = [
            ([length], True),
            ([length, length], True),
            ([chunked], True),
            ([length, chunked], False),
            ([chunked, length], False),
            ([length, "Transfer-Encoding: identity"], False),
            ([length, "Connection: close"], False),
        ]
        for lines, kept in table:
            self.assertEqual(self.answer(*lines).keeps_alive(), kept, lines)
        for version, kept in (("1.0", False), ("1.1", True), ("2.0", True)):
            answer = self.answer(length, first="HTTP/%s 200 OK" % version)
            self.assertEqual(answer.keeps_alive(), kept)

    def test_long_odd_heads_are_understood_in_no_time(self):
        for filler in (" ", "\t", "0", ",", "a", "\r\n ", "a:", ": "):
            for start in ("A :", "A@:", "A", "A: b\r\n ", "Content-Length: "):
                raw = answer_head(start + filler * (60000 // len(filler)) + "\x01")
                with self.assertRaises(server_module.HTTPError):
                    parse_answer(raw)

    def test_fields_that_come_again_go_on_as_they_would_alone(self):
        lines = ["Transfer-Encoding: chunked", "Upgrade: x", "Connection: upgrade"]
        firsts = ["HTTP/1.1 200 OK", "HTTP/1.1 426 No", "HTTP/1.1 204 None"]
        ways = [("", False), ("close", False), ("close", True)]
        said, recent = set(), server_module.Recent()
        for first in firsts:
            for way in ways:
                raw = answer_head(*lines, first=first)
                shared = server_module.Answer(raw, "GET", recent).to_visitor(*way)
                server_module.recent_sections.clear()
                alone = self.answer(*lines, first=first).to_visitor(*way)
                self.assertEqual(shared, alone)
                said.add(shared)
        self.assertGreater(len(said), 7)

    def test_framing_follows_rfc_9112_6_3(self):
        length, chunked = "Content-Length: 5", "Transfer-Encoding: chunked"
        table = [
            ("GET", 200, [length], server_module.Sized, False),
            ("HEAD", 200, [length], server_module.Body, True),
            ("HEAD", 200, [chunked], server_module.Body, True),
            ("GET", 204, [length], server_module.Body, True),
            ("GET", 304, [length], server_module.Body, True),
            ("GET", 100, [], server_module.Body, True),
            ("GET", 101, [], server_module.Body, True),
            ("GET", 200, [], server_module.UntilClose, False),
            ("GET", 200, ["Transfer-Encoding:"], server_module.UntilClose, False),
            ("GET", 404, ["Content-Length: 0"], server_module.Sized, True),
            ("GET", 200, [chunked], server_module.Chunked, False),
            ("GET", 200, [length, chunked], server_module.Chunked, False),
        ]
        for method, status, lines, kind, done in table:
            first = "HTTP/1.1 %d x" % status
            body = self.answer(*lines, first=first, method=method).frame()
            with self.subTest(method=method, status=status, lines=lines):
                self.assertIs(type(body), kind)
                self.assertEqual(body.done, done)
                self.assertEqual(body.until_close, kind is server_module.UntilClose)
                self.assertTrue(body.untouched)

    def test_upgrade_that_is_required_is_named(self):
        lines = ["Upgrade: x", "Connection: upgrade"]
        answer = self.answer(*lines, first="HTTP/1.1 426 No")
        text = answer.to_visitor("")
        self.assertIn(b"Upgrade: x\r\nConnection: Upgrade", text)

    def test_upgrade_that_names_no_protocol_is_dropped(self):
        lines = ["Upgrade: h2c;a", "Connection: upgrade"]
        for status in (101, 426):
            answer = self.answer(*lines, first="HTTP/1.1 %d X" % status)
            self.assertEqual(answer.upgrade, "")
            self.assertNotIn(b"pgrade", answer.to_visitor(""))

    def test_length_of_an_answer_that_has_no_body_is_dropped(self):
        answer = self.answer("Content-Length: 5", first="HTTP/1.1 204 No")
        self.assertNotIn(b"Length", answer.to_visitor(""))
        answer = self.answer("Content-Length: 5", first="HTTP/1.1 304 No")
        self.assertIn(b"Length", answer.to_visitor(""))

    def test_unwrapped_answer_names_no_chunks_and_no_trailer(self):
        lines = ["Transfer-Encoding: chunked", "Trailer: T"]
        text = self.answer(*lines).to_visitor("close", unwrapped=True)
        self.assertNotIn(b"hunked", text)
        self.assertNotIn(b"Trailer", text)
        text = self.answer(*lines).to_visitor("")
        self.assertIn(b"Transfer-Encoding: chunked\r\n", text)
        self.assertIn(b"Trailer: T\r\n", text)


def feed_all(body, data):
    """As who copies a body does: how much of it was consumed, and what goes on."""
    at, went_on = 0, b""
    while not body.done:
        count = body.feed(memoryview(data)[at:])
        said = data[at : at + count] if body.replaced is None else body.replaced
        at, went_on = at + count, went_on + said
        if not count:
            break
    return at, went_on


def feed_body(body, data, step=None):
    """Feed it in pieces: how many bytes of `data` belong to the body, and what goes
    on."""
    taken, buffer, went_on = 0, b"", b""
    step = step or max(1, len(data))
    for at in range(0, len(data), step):
        buffer += data[at : at + step]
        good, said = feed_all(body, buffer)
        taken, buffer, went_on = taken + good, buffer[good:], went_on + said
    return taken, went_on


class FakeFile:
    """A socket that http.client can read from."""

    def __init__(self, data):
        self.data = data

    def makefile(self, mode):
        return io.BytesIO(self.data)


class Bodies(unittest.TestCase):
    CHUNKED = [  # the verdict: the content
        (b"0\r\n\r\n", b"", "9112 7.1"),
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello", "9112 7.1"),
        (b"00000005\r\nhello\r\n000\r\n\r\n", b"hello", "9112 7.1"),
        (
            b"a\r\n0123\r\n6789\r\nA\r\nabcdefghij\r\n0\r\n\r\n",
            b"0123\r\n6789abcdefghij",
            "9112 7.1",
        ),
        (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n", "9112 7.1"),
        (
            b"ff\r\n" + b"\r\n" * 127 + b"x" + b"\r\n0\r\n\r\n",
            b"\r\n" * 127 + b"x",
            "9112 7.1",
        ),
        (
            b"A;x=y; z = \"q\\\"uo;te\"\r\n0123456789\r\n0\r\n\r\n",
            b"0123456789",
            "9112 7.1.1",
        ),
        (b"1;a\r\nb\r\n0;c=d;e\r\n\r\n", b"b", "9112 7.1.1"),
        (b"1 ; a\t=\tb\r\nc\r\n0\r\n\r\n", b"c", "9112 7.1.1"),
        (b'1;a="b;\tc\xe4"\r\nd\r\n0\r\n\r\n', b"d", "9112 7.1.1"),
        (b"1" + b";a" * 500 + b"\r\nb\r\n0\r\n\r\n", b"b", "9112 7.1.1"),
        (
            b"1\r\na\r\n1\r\nb\r\n0\r\nTrailer: x\r\nOther:\r\n\r\n",
            b"ab",
            "9112 7.1.2",
        ),
        (b"0\r\n" + b"A: b\r\n" * 199 + b"\r\n", b"", "9112 7.1.2"),
        (b"0\r\nA: b\xe4\tc\r\n\r\n", b"", "9110 5.5"),
    ]

    def test_chunked_bodies_end_where_they_end_however_they_are_cut(self):
        for data, _, clause in self.CHUNKED:
            for step in (None, 1, 2, 3):
                for rest in (b"", b"GET / HTTP/1.1\r\n"):
                    body = server_module.Chunked()
                    with self.subTest(data=data, rfc=clause, step=step, rest=rest):
                        taken, went_on = feed_body(body, data + rest, step)
                        self.assertEqual((taken, went_on), (len(data), data))
                        self.assertTrue(body.done)

    BROKEN = [
        # The size.
        (b"\r\n", 400, "9112 7.1"),
        (b"\r\n0\r\n\r\n", 400, "9112 7.1"),
        (b"g\r\n", 400, "9112 7.1"),
        (b"5g\r\nhello\r\n", 400, "9112 7.1"),
        (b"-1\r\n", 400, "9112 7.1"),
        (b"+1\r\n", 400, "9112 7.1"),
        (b"-0\r\n\r\n", 400, "9112 7.1"),
        (b"0x1\r\n", 400, "9112 7.1"),
        (b"0x0\r\n\r\n", 400, "9112 7.1"),
        (b"1h\r\na\r\n", 400, "9112 7.1"),
        (b"1.\r\na\r\n", 400, "9112 7.1"),
        (b"1,\r\na\r\n", 400, "9112 7.1"),
        (b"1_0\r\na\r\n", 400, "9112 7.1"),
        (b"'1'\r\na\r\n", 400, "9112 7.1"),
        (b"\xb9\r\na\r\n", 400, "9112 7.1"),
        (b" 1\r\na\r\n", 400, "9112 7.1"),
        (b"\t1\r\na\r\n", 400, "9112 7.1"),
        (b"1 \r\na\r\n", 400, "9112 7.1"),
        (b"1\t\r\na\r\n", 400, "9112 7.1"),
        (b"0 \r\n\r\n", 400, "9112 7.1"),
        (b"1 1\r\na\r\n", 400, "9112 7.1"),
        (b"1\x00\r\na\r\n", 400, "9112 7.1"),
        (b"1\x0b\r\na\r\n", 400, "9112 7.1"),
        (b"1\xa0\r\na\r\n", 400, "9112 7.1"),
        (b"000000001\r\na\r\n", 400, "9112 7.1"),
        (b"000000000\r\n\r\n", 400, "9112 7.1"),
        (b"123456789\r\n", 400, "9112 7.1"),
        (b"10000000000000001\r\na\r\n", 400, "9112 7.1"),
        (b"1" * 3000, 400, "9112 7.1"),
        # Where its line ends.
        (b"1\na\r\n", 400, "9112 7.1"),
        (b"1\r\r\na\r\n", 400, "9112 7.1"),
        (b"1\ra\r\n", 400, "9112 7.1"),
        (b"0\n\r\n", 400, "9112 7.1"),
        (b"0\r\r\n\r\n", 400, "9112 7.1"),
        # The two bytes after a chunk.
        (b"1\r\nab\r\n", 400, "9112 7.1"),
        (b"1\r\na\n", 400, "9112 7.1"),
        (b"1\r\naX\r\n", 400, "9112 7.1"),
        (b"1\r\naXX0\r\n\r\n", 400, "9112 7.1"),
        (b"1\r\naX\n0\r\n\r\n", 400, "9112 7.1"),
        (b"1\r\na\rX0\r\n\r\n", 400, "9112 7.1"),
        (b"1\r\na0\r\n\r\n", 400, "9112 7.1"),
        (b"1\r\na\r0\r\n\r\n", 400, "9112 7.1"),
        (b"2\r\na\r\n0\r\n\r\n", 400, "9112 7.1"),
        (b"1\r\na\r\n\r\n0\r\n\r\n", 400, "9112 7.1"),
        # Extensions.
        (b"1;\r\na\r\n", 400, "9112 7.1.1"),
        (b"0;\r\n\r\n", 400, "9112 7.1.1"),
        (b"1;;a\r\na\r\n", 400, "9112 7.1.1"),
        (b"1;a=\r\na\r\n", 400, "9112 7.1.1"),
        (b"1;=a\r\na\r\n", 400, "9112 7.1.1"),
        (b"1;a=b=c\r\na\r\n", 400, "9112 7.1.1"),
        (b"1;a b\r\na\r\n", 400, "9112 7.1.1"),
        (b"1;a,b\r\na\r\n", 400, "9112 7.1.1"),
        (b"1;a \r\na\r\n", 400, "9112 7.1.1"),
        (b"1;(a)\r\na\r\n", 400, "9112 7.1.1"),
        (b"1;a\xe4\r\na\r\n", 400, "9112 7.1.1"),
        (b'1;a="b\r\na\r\n', 400, "9112 7.1.1"),
        (b'1;a="b"c\r\na\r\n', 400, "9112 7.1.1"),
        (b'1;a="b\\"\r\na\r\n', 400, "9112 7.1.1"),
        (b'1;a="b\r\nc"\r\na\r\n', 400, "9112 7.1.1"),
        (b'1;a="b\nc"\r\na\r\n', 400, "9112 7.1.1"),
        (b'1;a="b\x00"\r\na\r\n', 400, "9112 7.1.1"),
        (b"1;a=\x00\r\na\r\n", 400, "9112 7.1.1"),
        (b"1;\na\r\n", 400, "9112 7.1.1"),
        (b"1;a\na\r\n", 400, "9112 7.1.1"),
        (b"1;a\ra\r\n", 400, "9112 7.1.1"),
        (b"0;a=b\n\r\n", 400, "9112 7.1.1"),
        (b"0;" + b"a" * 3000 + b"\r\n", 400, "9112 7.1.1"),
        # Trailers.
        (b"0\r\nA : b\r\n\r\n", 400, "9112 5.1"),
        (b"0\r\n folded\r\n\r\n", 400, "9112 5.2"),
        (b"0\r\nA: b\r\n c\r\n\r\n", 400, "9112 5.2"),
        (b"0\r\n A: b\r\n\r\n", 400, "9112 7.1.2"),
        (b"0\r\nno colon\r\n\r\n", 400, "9112 7.1.2"),
        (b"0\r\nGET / HTTP/1.1\r\n\r\n", 400, "9112 7.1.2"),
        (b"0\r\n0\r\n\r\n", 400, "9112 7.1.2"),
        (b"0\r\n: b\r\n\r\n", 400, "9112 7.1.2"),
        (b"0\r\nA\xe4: b\r\n\r\n", 400, "9110 5.1"),
        (b"0\r\nA@: b\r\n\r\n", 400, "9110 5.1"),
        (b"0\r\nA: b\x00\r\n\r\n", 400, "9110 5.5"),
        (b"0\r\nA: b\rB: c\r\n\r\n", 400, "9110 5.5"),
        (b"0\r\nA: b\r\r\n\r\n", 400, "9110 5.5"),
        (b"0\r\nA: b\n\r\n", 400, "9112 2.2"),
        (b"0\r\nA: b\r\n\n", 400, "9112 2.2"),
        (b"0\r\n\n", 400, "9112 2.2"),
        (b"0\r\n\r\r\n", 400, "9112 2.2"),
        (b"0\r\nX\n", 400, "9112 2.2"),
        (b"0\r\n" + b"A: b\r\n" * 300 + b"\r\n", 400, "9112 7.1.2"),
        (b"0\r\nA: " + b"b" * 3000 + b"\r\n\r\n", 400, "9112 7.1.2"),
    ]

    def test_broken_chunked_bodies_are_refused(self):
        for data, status, clause in self.BROKEN:
            for step in (None, 1):
                for rest in (b"", b"\r\nGET / HTTP/1.1\r\n"):
                    with self.subTest(data=data[:40], rfc=clause, step=step, rest=rest):
                        with self.assertRaises(server_module.HTTPError) as caught:
                            feed_body(server_module.Chunked(), data + rest, step)
                        self.assertEqual(caught.exception.status, status)

    def test_plain_bodies_of_answers_go_on_as_they_are(self):
        for data, content, clause in self.CHUNKED:
            for step in (None, 1, 3):
                body = server_module.Chunked(tolerant=True)
                with self.subTest(data=data, rfc=clause, step=step):
                    taken, went_on = feed_body(body, data + b"\r\nHTTP", step)
                    self.assertEqual((taken, went_on), (len(data), data))
                    body = server_module.Chunked(tolerant=True, unwrap=True)
                    taken, went_on = feed_body(body, data + b"\r\nHTTP", step)
                    self.assertEqual((taken, went_on), (len(data), content))

    HELLO = b"5\r\nhello\r\n0\r\n\r\n"
    WITH_TRAILER = b"5\r\nhello\r\n0\r\nA: b\r\n\r\n"
    ODD = [  # of answers: what the service says, and what goes on
        (b"5\nhello\n0\n\n", HELLO, "9112 2.2"),
        (b"5\r\nhello\n0\r\n\r\n", HELLO, "9112 2.2"),
        (b"5\nhello\r\n0\r\n\n", HELLO, "9112 2.2"),
        (b"5\r\nhello\r\n0\n\r\n", HELLO, "9112 2.2"),
        (b"5   \r\nhello\r\n0   \r\n\r\n", HELLO, "9112 7.1"),
        (b"5\t\nhello\n0 \n\n", HELLO, "9112 7.1"),
        (b"000000005\r\nhello\r\n0\r\n\r\n", HELLO, "9112 7.1"),
        (b"0" * 40 + b"5\r\nhello\r\n" + b"0" * 20 + b"\r\n\r\n", HELLO, "9112 7.1"),
        (b"5;\r\nhello\r\n0;\r\n\r\n", HELLO, "9112 7.1.1"),
        (b"5; a=\r\nhello\r\n0\r\n\r\n", HELLO, "9112 7.1.1"),
        (b'5 ;a b"c\x01\xe4\r\nhello\r\n0\r\n\r\n', HELLO, "9112 7.1.1"),
        (b"5;;\nhello\r\n0\r\n\r\n", HELLO, "9112 7.1.1"),
        (b"5\r\nhello\r\n0\r\nA: b\n\n", WITH_TRAILER, "9112 2.2"),
        (b"5\r\nhello\r\n0\r\nA : b\r\n\r\n", WITH_TRAILER, "9112 5.1"),
        (b"5\r\nhello\r\n0\r\nA:\r\n b\r\n\r\n", WITH_TRAILER, "9112 5.2"),
        (b"5\n12345\n0\nA: b\n\tc\n d\nE: f\n\n",
         b"5\r\n12345\r\n0\r\nA: b c d\r\nE: f\r\n\r\n", "9112 5.2"),
        (b"5\r\nhello\r\n0\r\nword\r\nA: b\r\n\r\n", WITH_TRAILER, "9112 7.1.2"),
        (b"5\r\nhello\r\n0\r\n b\r\n\r\n", HELLO, "9112 7.1.2"),
        (b"5\r\nhello\r\n0\r\nX y: z\r\n\r\n", HELLO, "9112 7.1.2"),
        (b"5\r\nhello\r\n0\r\nX: \x01\r\n c\r\n\r\n", HELLO, "9110 5.5"),
        (b"5\r\nhello\r\n0\r\nContent-Length: 7\r\n\r\n", HELLO, "9110 6.5.1"),
        (b"5\r\nhello\r\n0\r\nContent-Length : 7\r\n\r\n", HELLO, "9110 6.5.1"),
        (b"5\r\nhello\r\n0\r\nTransfer-Encoding:\r\n chunked\r\n\r\n", HELLO, "6.5.1"),
    ]  # fmt: skip

    def test_odd_bodies_of_answers_go_on_by_the_grammar(self):
        for data, expected, clause in self.ODD:
            content = expected.split(b"\r\n")[1]
            for unwrap, wanted in ((False, expected), (True, content)):
                for step in (None, 1, 2, 3):
                    for rest in (b"", b"\nHTTP/1.1 200 OK\r\n"):
                        body = server_module.Chunked(tolerant=True, unwrap=unwrap)
                        with self.subTest(data=data, rfc=clause, step=step, rest=rest):
                            taken, went_on = feed_body(body, data + rest, step)
                            self.assertEqual((taken, went_on), (len(data), wanted))
                            self.assertTrue(body.done)

    def test_what_is_odd_in_an_answer_is_refused_in_a_request(self):
        for data, _, clause in self.ODD:
            for step in (None, 1):
                with self.subTest(data=data, rfc=clause, step=step):
                    with self.assertRaises(server_module.HTTPError):
                        feed_body(server_module.Chunked(), data, step)

    BROKEN_ANSWERS = [
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"5 x\r\nhello\r\n0\r\n\r\n",
        b"5,\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"5h\r\nhello\r\n0\r\n\r\n",
        b"5\xa0\r\nhello\r\n0\r\n\r\n",
        b"5\x0b\r\nhello\r\n0\r\n\r\n",
        b"5\r\r\nhello\r\n0\r\n\r\n",
        b"5;a\rb\r\nhello\r\n0\r\n\r\n",
        b"5\rhello\r\n0\r\n\r\n",
        b"\r\n5\r\nhello\r\n0\r\n\r\n",
        b"\n5\nhello\n0\n\n",
        b"5\r\nhello\r\n\r\n0\r\n\r\n",
        b"5\r\nhellox\r\n0\r\n\r\n",
        b"5\r\nhello0\r\n\r\n",
        b"5\r\nhell\n0\r\n\r\n",
        b"5\r\nhello\r\r\n0\r\n\r\n",
        b"1000000000000000\r\n",
        b"5\r\nhello\r\n0\r\n\r\r\n",
        b"5\r\nhello\r\n0\r\nA: b\r\r\n\r\n",
        b"5\r\nhello\r\n0\r\nA: b\rC: d\r\n\r\n",
        b"5\r\nhello\r\n0\r\n" + b"A: b\n" * 300 + b"\n",
        b"5\r\nhello\r\n0\r\nA: b\n" + b" c\n" * 3000 + b"\n",
        b"5;" + b"a" * 3000 + b"\r\nhello\r\n0\r\n\r\n",
    ]

    def test_broken_bodies_of_answers_are_refused(self):
        for data in self.BROKEN_ANSWERS:
            for step in (None, 1):
                with self.subTest(data=data[:40], step=step):
                    body = server_module.Chunked(tolerant=True)
                    with self.assertRaises(server_module.HTTPError):
                        feed_body(body, data + b"\r\nHTTP/1.1 200 OK\r\n", step)

    HEAD, HELLO_LF = "HTTP/1.1 200 OK\r\n", "5\nhello\n0\n\n"
    FIELD = [  # answers of real services; the status, or None for a 502
        (HEAD + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
         "5\r\nhello\r\n0\r\n\r\n", 200),
        (HEAD + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 200),
        ("HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", 200),
        ("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n" + HELLO_LF, 200),
        ("HTTP/1.0 200 OK\n\nhello", 200),
        (HEAD + "Server : box\r\nContent-Length: 5\r\n\r\nhello", 200),
        (HEAD + "X-Long: a\r\n b\r\nContent-Length: 5\r\n\r\nhello", 200),
        (HEAD + "Transfer-Encoding: identity\r\n\r\nhello", 200),
        (HEAD + "Transfer-Encoding: chunked\r\n\r\n5   \r\nhello\r\n0   \r\n\r\n", 200),
        ("HTTP/1.1 999 Request denied\r\nContent-Length: 5\r\n\r\nhello", 999),
        (HEAD + "Content_Length: 7\r\nContent-Length: 5\r\n\r\nhello", 200),
        (HEAD + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", None),
        (HEAD + "X-A: a\x01b\r\nContent-Length: 5\r\n\r\nhello", None),
        (HEAD + "Content-Length: +5\r\n\r\nhello", None),
        ("http/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", None),
    ]  # fmt: skip

    def through(self, raw, step, unwrap):
        """What the visitor gets of an answer that comes in pieces."""
        buffer, searched, body, sent = bytearray(), 0, None, b""
        for at in range(0, len(raw), step):
            buffer += raw[at : at + step]
            end = 0 if body else server_module.find_answer_head(buffer, searched)
            if end:
                answer = server_module.Answer(buffer[:end], "GET")
                body = answer.frame(unwrap)
                chunked = isinstance(body, server_module.Chunked)
                sent = answer.to_visitor("", unwrap and chunked)
                del buffer[:end]
            searched = len(buffer)
            if body:
                count, said = feed_all(body, bytes(buffer))
                del buffer[:count]
                sent += said
        return sent

    def test_what_the_field_sends_is_read_by_a_strict_reader_behind_us(self):
        for text, status in self.FIELD:
            raw = text.encode("latin-1")
            for step, unwrap in itertools.product((len(raw) + 9, 1, 3), (False, True)):
                with self.subTest(raw=raw, step=step, unwrap=unwrap):
                    if status is None:
                        with self.assertRaises(server_module.HTTPError):
                            self.through(raw, step, unwrap)
                        continue
                    ends = b"Length: 5" not in raw and b"chunked" not in raw
                    rest = b"" if ends else b"\nmore\r\n"
                    sent = self.through(raw + rest, step, unwrap)
                    self.assertNotRegex(sent, rb"[^\r]\n|[ \t]:|\r\n[ \t]")
                    found = http.client.HTTPResponse(FakeFile(sent))
                    found.begin()
                    self.assertEqual((found.status, found.read()), (status, b"hello"))

    def test_the_middle_of_a_chunk_goes_on_without_a_look(self):
        body = server_module.Chunked(tolerant=True)
        self.assertEqual(body.feed(b"f\r\n0\r\n\r"), 7)
        for piece in (b"\n5\n", b"0\r\n\r\n"):
            self.assertEqual((body.feed(piece), body.replaced), (len(piece), None))
        self.assertFalse(body.done)

    def test_a_chunk_line_is_passed_on_only_when_it_is_whole(self):
        for tolerant in (False, True):
            body = server_module.Chunked(tolerant)
            self.assertEqual(body.feed(b"5;a"), 0)
            self.assertTrue(body.untouched)
            self.assertEqual(body.feed(b"5;a=b\r\nhe"), 9)
            self.assertFalse(body.untouched)

    def test_a_tired_call_looks_at_few_lines(self):
        data = b"1\r\nx\r\n" * 3000 + b"0\r\n\r\n"
        most = server_module.FEED_LINES * len(b"1\r\nx\r\n")
        for tolerant, unwrap in ((False, False), (True, False), (True, True)):
            body, at = server_module.Chunked(tolerant, unwrap), 0
            while not body.done:
                count = body.feed(memoryview(data)[at:], lambda: True)
                self.assertTrue(0 < count <= most, count)
                at += count
            self.assertEqual(at, len(data))

    def test_a_chunk_line_fits_into_the_least_turn(self):
        # Else an upload stalls: a line goes on when it is whole, credit or not.
        self.assertLess(server_module.CHUNK_LINE_LIMIT, server_module.LEAST_TURN)

    def test_body_of_a_length_takes_no_more(self):
        body = server_module.Sized(5)
        self.assertTrue(body.untouched)
        self.assertEqual((body.feed(b"hel"), body.done, body.read_limit), (3, False, 2))
        self.assertEqual((body.feed(b"lo, more"), body.done), (2, True))
        self.assertEqual(body.feed(b"more"), 0)
        self.assertFalse(body.untouched)
        self.assertEqual(server_module.Body().feed(b"more"), 0)
        self.assertTrue(server_module.Body().done)

    def test_body_until_the_end_takes_everything(self):
        body = server_module.UntilClose()
        self.assertEqual(body.feed(b""), 0)
        self.assertTrue(body.untouched)
        self.assertEqual(body.feed(b"all of it"), 9)
        self.assertFalse(body.untouched or body.done)
        self.assertIsNone(body.replaced)


# -----------------------------------------------------------------------------------
# Names
# -----------------------------------------------------------------------------------
class NamesOfHosts(unittest.TestCase):
    def find(self, host, domain="", ids=("tim", "eva")):
        names = server_module.Names(server_module.parse_domains(domain), set(ids))
        return names.find(host)

    def test_ids_that_look_like_a_part_of_a_name_take_nothing(self):
        ids = ("tim", "example", "0", "localhost")
        table = [
            ("localhost", (None, None)),
            ("127.0.0.1", (None, None)),
            ("web--tim.example.com", ("tim", "web")),
            ("web.tim.example.com", ("tim", "web")),
        ]
        for host, found in table:
            self.assertEqual(self.find(host, ids=ids), found, host)

    def test_longest_of_several_domains_counts_and_each_is_a_base(self):
        for domain in ("example.com,eu.example.com", "eu.example.com,example.com"):
            table = [
                ("web.tim.eu.example.com", ("tim", "web")),
                ("tim.eu.example.com", ("tim", None)),
                ("eu.example.com", (None, None)),
                ("tim.example.com", ("tim", None)),
                ("web.tim.example.com", ("tim", "web")),
            ]
            for host, found in table:
                self.assertEqual(self.find(host, domain), found, host)

    def test_links_of_an_index_keep_the_scheme_of_the_domain(self):
        domains = server_module.parse_domains("https://example.com")
        link = server_module.Names(domains, set()).link
        for host in ("tim.example.com", "Tim.Example.COM:8000"):
            url = link("web", host, "http")
            self.assertEqual(url, "https://web.tim.example.com/")

    def test_without_domain_connected_ids_decide(self):
        table = [
            ("hello-world.tim.localhost", ("tim", "hello-world")),
            ("web.tim.localhost.dev", ("tim", "web")),
            ("web.tim.example.com", ("tim", "web")),
            ("web.tim", ("tim", "web")),
            ("web--tim.example.com", ("tim", "web")),
            ("tim.example.com", ("tim", None)),
            ("tim", ("tim", None)),
            ("web.bob.example.com", (None, None)),
            ("web--bob.example.com", (None, None)),
            ("example.com", (None, None)),
            ("localhost", (None, None)),
            ("127.0.0.1", (None, None)),
            ("[::1]", (None, None)),
            ("tim.eva.example.com", ("eva", "tim")),
        ]
        for host, found in table:
            self.assertEqual(self.find(host), found, host)

    def test_with_domain_only_what_is_below_counts(self):
        table = [
            ("web.bob.example.com", ("bob", "web")),
            ("web--bob.example.com", ("bob", "web")),
            ("bob.example.com", ("bob", None)),
            ("web.bob.localhost", ("bob", "web")),
            ("web.bob.other.example", ("bob", "web")),
            ("web.tim.elsewhere.com", (None, None)),
            ("a.web.bob.example.com", (None, None)),
            ("a.web--bob.example.com", (None, None)),
            ("example.com", (None, None)),
            ("bobexample.com", (None, None)),
        ]
        for host, found in table:
            domain = "example.com,https://other.example"
            self.assertEqual(self.find(host, domain), found, host)

    def test_urls_follow_the_domain_or_the_host_that_was_dialled(self):
        table = [
            ("", "localhost:8001", "http://web.tim.localhost:8000/"),
            ("", "Example.COM:8001", "http://web.tim.example.com:8000/"),
            ("", "127.0.0.1:8001", "http://web.tim.localhost:8000/"),
            ("example.com", "1.2.3.4:8001", "http://web.tim.example.com:8000/"),
            ("https://e.com", "x:1", "https://web.tim.e.com/"),
            ("https://e.com:444,f.com", "x:1", "https://web.tim.e.com:444/"),
        ]
        for domain, dialled, url in table:
            names = server_module.Names(server_module.parse_domains(domain), set())
            names.port = 8000
            self.assertEqual(names.url("tim", "web", dialled), url)
        names = server_module.Names([], set())
        names.port = 80
        self.assertEqual(names.url("tim", "web", "a.b"), "http://web.tim.a.b/")
        self.assertIn("--domain", names.url("tim", "web", "10.2.3.4:8001"))
        self.assertIn("--domain", names.url("tim", "web", "[2001:db8::1]:8001"))

    def test_public_addresses_have_names_by_sslip_io_and_no_others_have(self):
        table = [
            ("tim", "8.8.8.8", "8.8.8.8.sslip.io"),
            ("node-1", "8.8.8.8", "8-8-8-8.sslip.io"),  # else it would be 1.8.8.8
            ("tim", "[2607:f8b0::200e]", "2607-f8b0--200e.sslip.io"),
            ("node-1", "[2607:f8b0::200e]", "2607-f8b0--200e.sslip.io"),
            ("tim", "[::ffff:8.8.8.8]", "8.8.8.8.sslip.io"),
            ("tim", "[2607:f8b0::]", ""),  # a label has no dash at its end
        ]
        table += [("tim", private, "") for private in (
            "10.0.0.1", "192.168.1.5", "172.16.0.1", "100.64.0.1", "169.254.1.1",
            "127.0.0.2", "0.0.0.0", "1", "8.8.8", "8.8.8.8.8", "[fe80::1]", "[fd00::1]",
        )]  # fmt: skip
        names = server_module.Names([], {"tim", "node-1"})
        names.port = 8000
        for id, address, base in table:
            url = names.url(id, "web", address + ":8001")
            host = "web.%s.%s" % (id, base)
            if not base:
                self.assertTrue(url.startswith("error: no name"), url)
                continue
            self.assertEqual(url, "http://%s:8000/" % host)
            self.assertTrue(server_module.HOST.fullmatch(host))
            self.assertEqual(names.find(host), (id, "web"))
            self.assertEqual(names.base(host), base)
            self.assertEqual(names.base("web--tim." + base), base)

    def test_domain_wins_over_sslip_io(self):
        names = server_module.Names(server_module.parse_domains("e.com"), set())
        self.assertEqual(names.url("tim", "web", "8.8.8.8"), "http://web.tim.e.com/")

    def test_broken_domains_are_refused(self):
        broken = ["a b", "http://", "a/b", "ftp://a.b", "u@a.b", "@a.b", "a..b", "a:x"]
        broken += ["a:", "a:65536", "a?b", "a#b", "[::1]", "http://https://a", "--a"]
        for text in broken:
            with self.assertRaises(ValueError, msg=text):
                server_module.parse_domains(text)

    def test_addresses_are_shown_plain(self):
        table = [
            ("::ffff:1.2.3.4", "1.2.3.4"),
            ("1.2.3.4", "1.2.3.4"),
            ("fe80::1%eth0", "fe80::1"),
            ("::1", "::1"),
        ]
        for found, shown in table:
            self.assertEqual(server_module.plain_address(found), shown)

    def test_links_of_the_index_go_the_way_the_visitor_came(self):
        table = [
            ("", "tim.localhost:8000", "http://web.tim.localhost:8000/"),
            ("a.b", "tim.a.b:8000", "http://web.tim.a.b:8000/"),
            ("https://a.b", "tim.a.b", "https://web.tim.a.b/"),
            ("https://a.b:444", "tim.a.b:8000", "https://web.tim.a.b:444/"),
            ("https://a.b", "tim.localhost:8000", "http://web.tim.localhost:8000/"),
        ]
        for domain, host, link in table:
            names = server_module.Names(server_module.parse_domains(domain), set())
            self.assertEqual(names.link("web", host, "http"), link)
        names = server_module.Names([], set())
        self.assertEqual(names.link("web", "tim.x", "https"), "https://web.tim.x/")

    def test_a_name_to_dial_is_guessed_from_the_host(self):
        table = [
            ("example.com", "example.com"),
            ("web.tim.example.com", "example.com"),
            ("web.tim.localhost", "localhost"),
            ("tim", "tim"),
            ("1.2.3.4", "1.2.3.4"),
        ]
        for host, base in table:
            self.assertEqual(server_module.Names([], set()).base(host), base)
        names = server_module.Names(server_module.parse_domains("a.b"), set())
        self.assertEqual(names.base("web.tim.x"), "a.b")

    def test_base_names_are_the_server_itself(self):
        names = server_module.Names(server_module.parse_domains("e.com"), set())
        for host in ("e.com", "localhost", "10.0.0.1", "[::1]"):
            self.assertTrue(names.is_base(host), host)
        self.assertFalse(names.is_base("web.e.com"))


# -----------------------------------------------------------------------------------
# Exchange, without sockets and threads: a visitor and a stream that only take notes
# -----------------------------------------------------------------------------------
def u8(data):
    return bytes([len(data)]) + data


def u16(data):
    return struct.pack("!H", len(data)) + data


def server_name(*names, kind=0):
    """The server_name extension (RFC 6066 3)."""
    entries = b"".join(bytes([kind]) + u16(name) for name in names)
    return struct.pack("!H", 0) + u16(u16(entries))


def hello_message(*extensions, kind=1):
    """A ClientHello, before it is cut into records."""
    body = b"\3\3" + bytes(32) + u8(b"s" * 32) + u16(b"\x13\1\x0a\x0a") + u8(b"\0")
    body += u16(b"".join(extensions))
    return bytes([kind]) + struct.pack("!I", len(body))[1:] + body


def records(message, size=1 << 14, kind=22, version=b"\3\1"):
    """A message of TLS as records of at most `size` bytes."""
    parts = [message[i : i + size] for i in range(0, len(message), size)]
    return b"".join(bytes([kind]) + version + u16(part) for part in parts)


# What real programs said first, for https://web.tim.example.com/ or for an address:
# compressed (zlib), in base85.
HELLOS = {
    # Chromium 156, with a post-quantum key share and GREASE
    "chromium": (
        "c-l49c{J2}AHebN>|?Cc3<g7!Flnq~8(IiiD@@j+#WHpc@gVyeS}Y-E?E9cpwxQfR5zRH++tVetZrA"
        "m=C_<q~JdbBM$M28Vd7tzB{m$=vzkhr`GB5~g8Uj$0Fqp&qP$zWTa^Mz|SfUx!z)@JM82=M*ej%ed3"
        "@y<f@tPDg>k%KMWL5T_X1a4JE2!lAE1XC0K#VpuAwh*Zu2~OAIXO584vK^EC_HVR22W>%Gt$Jv@$jG"
        "wlml&GApB9(yLSLsjsgULK?A6O0#L{sH(+oW3}Ap5z+f=gMW6^|0pWk*5P1L~0OA8kO-;e>TM}Ox47"
        "v-ufaRjKHdbJ@)X<V{*9k7pn{1o`U-(rii<gR5D?^CK(+%#gF>Nk21!QAvP4we%alzZe)`JsbqH+jR"
        "qL0zs;bU3`auc~Y?9^byW_jrA>(A$?%dJceop3kHNiT<Ao3X#!$*?(Pax9xE_uh5gSvpqmkmT}>kT^"
        "pRHdMJw8!8vS^Bf)Dr+J#qFWcIfLE2-Lcjm)-^zNN|q!LDc`Y>_3UAs^bz6A4c`|%Nr>+i8=F1Oy&>"
        "`JShR6BtC7sQDYGUbpP?2wnD`uoZ_S|Q97r2IE?WrJiy`Yxtg>Ad3c-oloDeU`mh$d^<N3$5F{we*v"
        "+%iC;Z_-9nBR~1HlO?X0JM|d~@=)ph3moOM%Vi(~&O0Qe`_4MYr(dfrFXBtbLuF79Hl#SE(LkwUIR?"
        "`eMpl4(_hayP*x4eV5SmAok-E4J8s%T_BxqL49AfyDUn|e0##@N_>x3c7Kdd8*UMdw^QtjHPHWZ6dB"
        "?dHg?ov|Tp=5SWKsFp`yzN|A$>czCLp@NSO+s$FD-^hxZbAtQ4#4#xmMY$f?W*uYBEo%E~K7k%-?wK"
        "F%@n?EaPnc4#oad9LsnV252J4ku_?9e7?E<^&Wtn60iRB#S?_A~O;F`tZSmZ?;|8$j>w2U3~XEU6j)"
        "Un*St(-UB@de{vFusixH?ztL{~XE3O63@AwA6kYS)i(at$7h!R=<#Q{sGys=%$ILiJ`Bt@ns<Cz%@k"
        "Zrk-~qAN*?eOPorkId^vZtO%h_l~d@`5x{_Imsd-CmT#`$$zPt~E=?aEjuI%iyDwIY+}TPoT1_xwM9"
        "h$Mu#b;gN9#C8^`EOcXzMuiX0}28i<x^q>bO<+%2o2@KXM-gEWK|0>X?EtMQhqAmz#6Ls9BYQ@kUoa"
        ";4YlK6VrO0novvYT?b-mJ*Vj2BTiM(HL}p!tP`t+eIwb4>um6|b*;Z~;i|hINUd1^kegWSX4umq?wQ"
        "8#sxdldJXcppvMrCHxrK;zA2W=9@;yw_x`DTN<aIN1NILVwkxREvWtCc>fsH=rT?0x-olPTE4E5t9;"
        "KTT58-x0#{vqDXdrnpK9Q$PaaL&C!cY?Wj+bzZ;&kXfv*)59<8&Ag3ZQIb^lLZ1;XTSABh{qJ;ymoy"
        "o)>!J?!oaI8ugm#>f{n8~->1{jqLg3ivXF4uQgH&IL{im*3i_)i2$J=KzEcGNevnRR_}W^h(b8B^0#"
        "6jsRvtgJYjCAHTl284#3-Y#AD)Lw5~W!$|L!Sszj=4o+GBZK=SuxAR4RfcQ*AQcGn!YSGmF`P^hvHK"
        "=joLs5{P7DY(O(H!MAp_=0V^`HE9kTyO?C%h?L%9mW(T|v{I9vs^0$cqB|1b7fVShM%TSbzPSbz?NZ"
        "mGZgyt$shojlSX+wGI}|eGrE2^)GP~R6E8ByjCcm}*<?NCbGm41)bv;m>UWS>n>@6^)Ced&RRJUODM"
        "Ws&U%nIr(kw`9KpbbuH5Cg7`jNZ>^c+^$(zVN6wp&_MP>h$(Y!!CbiU#Vg%*;M<1YXbDn*2U7;!%2a"
        "^8CcNF77owOx!P`ay<!X;yKvP4T{Dj^rX9#HQggWbWMHYt!tE2$?zTw)MTT9KWSXT9E93opCbNdacM"
        "zO$kxg-O>6&nTpv|W~mcMdb5Ir$eHyI8;p^rC>ce02yT&A8K6ghS6Q%hV3S*=q^!i1KGg%%GrddU?0"
        "!Q%bkT50s&_3CX5qE(X9wP_JoCaXuLQdQf1Ro(rn3+vJl$DD>XGxB=OJ`jHne|<XJC77>fmCmU{liL"
        "RKuPFJUd!q1i9mn}{`Q|j^pXQ<qPWMk&9ewNgVm(IS%(B00Rp`AC1!W^S3_7lZlx!Pl*O)SY=-tWsk"
        "}pLzsDI+WwglULB-{T-sa<zE*MIA!%F3a{JiKn2$%<>50mg~a|E=+@;{7X$$|FUl?UfB}P4|Bj6W;w"
        "K)k&3(K6x`b;Ya?X>f@TN&omvh{+MCrx}<DAIg;&12MWU30iZw>Kp|jQAM^q)BK2<^6tX9BPw_n^_L"
        "SW7z@E50@#r*`?`^gw1hpUN{Ses?%zlXOhuD6I@5h1tz`@_dia>UO?}FF`xeIC+^e&iPM0XL}MSK@Y"
        ";TS{+?{MLxDclSMhy!^*u(K0^iy(yG!_aUz1OY=M5D+vH2>}Q8-Xs7S0C3TM-dd4?p;~@1S3{X0ep)"
        "`)Lcw9-suYj_V#3La4v36oYU^t01_cR6!~X$+U`<Z"
    ),
    # the same, for https://127.0.0.1/
    "chromium-address": (
        "c-l48c{J4PAHebFYZkK^`x0pe6$W=K%^(UF&9$Xy5mS*ROUqy^5!oV_JB%4wZ>ceevSk^A?%-ZqQ>2"
        "uuTj7`8O}9mtUq61vIi5dW=l$1n&gc1@^Qgce=^zM5pM$|Di?v8EEn01a6_VdGiLOT{*9-73`R26`+"
        "e<Ihzl4arZCv`KryE=K_k?%<`}4O&+-&r5F?}@dBPG3+F6(X&h!~6_q$s5b6B&reB14g}_@1~*q$pA"
        "XrQlaU1{4S&SDl>!00uxBiNV0&Fc>g{FT?*{SO5@^UxJI^euq9p`Z5}oXJh&<nbwUPBwiMJ2=(<0j$"
        "HSDLHx5IT9u1G$hj-Lx7(qS)})m=*Wi=5q+Ec(>c%#wF&>UGnm0tZdIG6$GkiT9Y{sk^YgNC-We?eB"
        "5u5Y|zHoU#NkX4^g68|KH}OUM#%rB3wy$l?c(X;1lxn<V$hUFB+5vD_tZKNlQc4J!f+9@t1LVW~53}"
        "j;SA%DS>aGpMrZh#z5Zm)rkp{*)l#-i74Sj9F-G(Px_qw!PCfN*ilP5bw=5~Is<bsZm_Y9ePT95eBO"
        "?_H#L<xRQC$-zbn9S^ID*TA6M~s47o*Hc7y4$~Unx9b7k16iKa^d}n%A}_ME+j0v7{iCXh!YrCE2lo"
        "5u~JU58J7(!4@tw^W_mr!2=!g=$#)xPKjOiQKf4+oEeJw53wLlv%+a*m@Hf6jKWA`U=Gumxz-cjc<H"
        "*6zRf2JuItLf2tKQB^s@bm>$kz&@&0A!J5S(i)Sqq{Ym4neCPgCK0`pZjBe~!#jL*XGk>+8NZ4@n_h"
        "6=vD2XnKE7%`XY9=y#cdGeB$b=viGu8nxou&gW>>dASEASEZ{<7unGBt9wQk@Wp#iDo>>)df%+ySIX"
        "+3xMiv2#Nj=wLKIqQRtDmer|##h7HjMI>3Y;ul=KPYhg9roQ(~V3)8<U`aEnv9aolPS=)m^uKKo<o^"
        "y_O*!{$k8sPa)8vPyFGG(M-B{D&CpTiv-UMZJrClQ3WKnSrBg-*sl+f5N|>U)|n48)GcUEpKzI9W?E"
        "IVXc{6m~sBVRGjf3T=VXyi-p}0EDpn=so~X}%d|?sGWVQmWnp+$ahKjMROvtgJb$e#`a`d=iKQHyqs"
        "9K0w90E6!xl9jPrp12$T$YY-pPUHH4v)Xbi*+J#|Lj>t3zve@+AX~yFC)VB_0zwu4h|P*~trmOano("
        "Week{_>7Z<VXF4(jo=QxF|69ID9q~Q*P;}w0-uB?bFCO$;h5(mL!~U=dig4?RY3+nG-)HoV_n`UI@w"
        ")gik}%RoSb(@d-knC;&w>8W%2j-cf@f#`LC5;q@9OO`5)QW)gq3)R2$bpEQmWl*k&;CTT%9j+tR#<u"
        "+*>Awr7rJ7O)7d2pwdWo7GNUpPk_^&nn-h=GTR_3a>DUNZ*<E6931rxRr}%^^)4u{dK-~7VW9cSurx"
        "(qu-)`m@FP-I9#;d0bP4Z(U=JE55avA94aVBEYcqD3PQ?HUL8%jC7VWiyV3%0zE}Gqwl~UZz$tCr!#"
        "Z&lU-taz8mB+svkN;O%G9t5)!^O-Z91xve_0;S`+gBtx>qWRIknPx;%mN*Wvt&T)mV9}F%rhWfk>Y-"
        "udE2RXiE34cQ{5ZURFY;mQlTiF}Vvdh!)6BP$l>6Ogkdp4%_^&z2O3S|F^Peo4}}0TX(b3OwYWuXqT"
        "=}d02b113%e5DN-$a#;y0BIbmi3*bJzs8C39_hg_}wAarrfVE?(4mOKrWIn&!w5WPPx^}FpkX2iWWk"
        "(nAB)ercYF*Eu;2l0it?{-u|M$Fopi>C}TN?ftq_kzV3Je@U@5tXy{f!<T0_hdSy*E{>^U#EvolP&{"
        "IK+Gj8lmDZ_m-0NuO`J6(7BiPdn%Ywa>Oy)ov|(BM%>V)*ARswLKnj9@Dgf&;KnOO!K*$adMYW#^tQ"
        "6!Ago^owp+Jg}@NQ%H+;lul&Sgp2t60qz<mP0E^l#!!WnXtHzvzDUCDob7jkToxo#}mNoIs_F=rovl"
        "Mt&oFd0nS+*krZ0gA`Ahw-MDH<rLrY;qFVW{rGloZ{U7}niS7*%{r5thFc*PHU4wT+h)Lg{r&Q#KQJ"
        "?`In9yEIzuB58fHI1)MVC`i6sTutAu~vA23Sbw+3rFD3s;SUQ+t_jwa@?P`UuSIR^kb0BmfI0Dv681"
        "DsT_DJq!BWROjMFaa6>CIzGh_iauoK%~4=l!CTIZYi@ReoNUc6}D8|QVEq>9FSdN1W9iPYCF)|f!Pl"
        "1cHp){W;+zNLlOS+3L26Cmw=FflprkuB>^J=D*-1#MuIHB035(9EXXfyE?E_*0R;dYo@_1?wmB-00q"
        "Q`FL_)*Sh|SwzC^#HKz)%PTghC=Ab@k0>`9C>X8s`"
    ),
    # Firefox 153
    "firefox": (
        "c-n=O=UdZh7KYzn3JFz6sDcg#6U5LG17?U)6p#==hq{1Z!Vp?OV1Xnwm*^<f0t67rC{+nXL<u5ALSS"
        "g3Vqp=%9VH;jpfDoEGCJ97|A0N8&h^~SIUjFbIE0FZ0E!KVo4VSDhWE$aE<_(G>_$Af6XC^W?pce<&"
        "*NwMw6`I$jRix01^1p@zPi`pyz$J-Td|LgOV`b|pV6woUXYi2{`3qOV<9XY3zHJ1R%7C^da1e8TB;("
        "&O0|Iq{0gjq4Fr_F0s!=ZE&x~_JIpdUI?j^KXT>GNvMqm(j{|xDe1`x8fC|tA8d^(Wn<CN&28s*<ss"
        "N@SCW;3N2Gn3tWOP(=a)K4fk_3<dsbGr1DNfM{I1;V|hrt0xk?cWQAuY6)5YjwDB45pCGsUzpA9rzw"
        "^bux@u%C69eKnURvz_zYC94~ylhc=exKd|hOCx+Lh%l^I(ioyi=0lSx7Fc2YvWm6tL}ZF;?AzZG?Pv"
        "YbjO*f+EsG*T-y^r&^oJ@ntQ0PD!`c7KFiLL|Z<C5Dok*$Hvn+IG5s>aGF)4wMU?+SGWKj?0S~kw2t"
        "*@pN2Xp=H@$LUvcd+zn^Q|BzTH9G|MA|D~*j|*}KO1Y$7QD7|+*e2aL)iY-=BC^8*6)0#Q6bYJeMrp"
        "bhvw6ZlCIJZi9DT3mX#|f`!RHgKZXx!<|U{8a{0}i?D);2_;vS;pUC5*>8k|#rjGzoG$0jqQ76hIA2"
        "=qJVE?mwM;1MT-8HwJY<mB-bX3RWl>CwjUuYx8ar#l=S%`opGZxCN9v6U%E_R)AiTju{fIWF!@8&Y="
        "XFNS=$BhTWuBqo<Z~0W~TS|*xf^|@eDPf%^Wt7&my#aSN9Jj59Wgc|e9&mf2acDR|quHtOFxm$z5Gg"
        "af7K16h!y|n>=bc|Ku4ps9J!7)Uvk5v5ulx*2B~n9%%|b$R!|K24Bwm@b!n&pSWcGn{f)?%BP!>$(A"
        "Lb9X)_7wgd*wsMjecXnc9C%M&RjTG*f<zF)6<e83M1&5XL(i*#O+i)=+c)ZtnxxL>0~!f1B6)4_aJ5"
        "`>ygkTxT}CzFw)?`th1PY+}Aus)hDU^X6`%n`E(?$CEBn$rBJi`jbjz9BRYi>vZR^JJs`=bxldweR$"
        "i!>wQr(jFP`ej5fr~E4{nLX`xI^62krf{cz9;Uaml0Te9={H9y?>|Zuy(+o|krOuv6x0uE+dJ6Q?j|"
        "Z?%l>W3OWfDE9r$M5>)~f`RFYzf@{{kL(LAav)vwHCoZAj~VE?q2$JLM0ISfvD;sE1PLkcUro5co8G"
        "gEzIKwegJjevp~XZHk}l~%=XD(lMsFXCxUARh?Kr-l#}8i6><y>M8u1p(tz>eE!$;(aq{rNfo5jy3Y"
        "5JOBoiqvRb=oOW-+bgS8HGQikH@X^L=-D*4NKpRH%dR_wPsMa9>#QM%=T+Z+sSR4(g*!nI5%--xXxi"
        "a>zqXPH95^b{p`U%x@Nah@n%2X70WuEWu5m(vr_0mhE<k9b|9{WXynB4y<K3&P|-mZBviu#N}}*1oh"
        "Qlc#LA+;^L@K7y!fO&7wcDM6C6ra=VVkkO{BJAdOnT^Ei>V?4)MVZOK%kJqXZu|SjAJTzm~?QnWk#2"
        "HhZpkH(&FZ&tQuWm_l5;Nl}L!M!^_~uF$kYiU+4-`o;%#eb12$u6q42dY)Es{h90C!=_qoHFeVi0#!"
        "*fbxdpg$<WbXGL6gp&03u!0^3+OzzaiIZ9nxrcF5J}5~JS4pTza$<Rg9l85_|3h*<SxF5E{mzY3C0x"
        "@W6dGnFOX9gRK(HmwU~)r54*&8HEU?xEII;QY^;VnK~_J4KWxer;&Yb2ONETF%I2nV44OH!<>4&CV^"
        "96S?t?UdTbOY_q0>GrMy*9ll4G`E6Yf7>uzf8M?l%M0Yr%gfgT4O<tL&q}<A^B~9AH%Gn4hqH#I+_-"
        "?UTO@=~-#{ajY2b>T`ymfyUjxBUARU1`v^wm8ahwp?qucp=GlCG~!w;e6Rdg_!+xxnA8ysH?vo;;IR"
        "xgis3l{N-P>L(8V`ej=!AOa);j)22~`hQ*hKbxWvXe3$*0U;qJ2nJV}*g~OW2p9pFBLoZqN=cz@7=V"
        "9MhYWyXg;s&_7Zz(%{xr<4s5}1c9_FEDZ8sO}s-1n{T6u!+T*1;EunfDOK3J7`Y%@8<Klf2$#vztCi"
        "ddb+U8?n;N8%R4Dch|^f`VfRytq6q!Cr^h@OS47MtRg`s_?z5pPM5s#9CAPvwrS9Sy%X`Jisve^hSg"
        "I!qv9sW4sT;lFNZ(7*ZJJ-C=TZmaRNa_GjM6!=Q!}s%HH!GXW-pUMIHRnbtebt$#m~RVLW-?;RfKps"
        "z1VsQj2bHO%}9=hAV)l^eR@w*HtYm&vJ|hBF1Q=Rw^hN<6o*C`a~Vs_hH^D?QI+54}3A)N}Tu#)n?P"
        "{4RR#ySO&1#}h86cW}i@ov7d0V#tH2Ui0BrcZWNI^EdUbDqa"
    ),
    # curl 7.88 with OpenSSL 3.0
    "curl": (
        "c-qyD%PWLo7{$+fna?}plKL1!kz6M;=7L$MAsY)D3#G`yWqg^*%$PDV8w)85lfFrIZY6gqWnufS*bJ"
        "qVNHZIfjfI7k;`L`ZbvCDSp66$0go1#4GnTsz#XG8U`Gd*l^x(n!&F*FI@TkvycKY@3dZ+o$YeUzo%"
        "Yk*Xzwa%xFtjxC(rA19=v~?8!MgkU#mvAEx^=2Eok+LzVJCZ>J<6U)m-J#=Hb^I?WxZ_1l(fk*bV{q"
        "#(T*)_q6<L;;Kh%^m;>N|9nj~E2~RQ-^BAe|SR!h8LNhTGf-@*yn`)Gy8WpHPB^+u;2qlbgl%fPhG~"
        "6b_$z;Oo_xS&AsUF~0E=CKSoLQL0M1c^(Dr}-qaA6S|Cl;a+#u#CgQw!B7T(AnpRYVy<D<~lfxCssF"
        "ajoNN_Gj%V^(dly`3&C}>q!Sqrx}SG=Ec=#>tQF#ae{xNUu5f6tp"
    ),
    # openssl s_client 3.0
    "openssl": (
        "c-jq)y-Px29EH#CeXqAy&7!WDf|``1WojQJ8TK_7HP#kc5;v11qO8fJC0g715CWkhXox@>;;mWeAIL"
        "C>hK3?2Xsf%Pa~{s);6!5tN^suy_1^2KZoRGLV#y!%w>DI2{(Q_2&Q9DHs?Tk;dSAi4-B5@x9uzMpb"
        "?0u=Q=t5@F;hw}$EL3GacX?Uh{iOok?fW|C|1rZXO#;Xl2M#UzYHQR+hqVt(jx7MOS9C_k7FER7zqp"
        "@ia!Ew065_Qw9Qm9vaV+$soZ=fyON45tY%<^!a)ocV_}B}E%3qxr=d^8h?9bLgEwfS0c_|(P~j%7a#"
        "1IQFbj*Y3PqTNs*s6P;+zv_3Nta4Aq2DFiV-nR2!jzBdL8f^H@?Hpm%Xs})aHwiKU{y`>F)CW&TZ>-"
        "BI`=pJo@O|Kjn-}dH"
    ),
    # the same with -tls1_2
    "openssl-tls12": (
        "c-jq(%`O8`7>1v7zBA)=%0k)<U9hRpAXD)ZBy8P)D?p|qjGv?lH(=3wsIqKv2^QZ4Opu7Zl?$-2<t*"
        "OClRQt}R16;m-b7YkliuFu*X{gMcbIm*N6!!S&(78R&!D&d(wN-;g)Lpy74FMXIV>M_N!tu`PFtL6Q"
        "x`baMC)v8MQf~aN1t7G*r3f{I5-EUNuhR~A7<T?BFk?Mip#S+JGv;S;sj$!7!R9aidh=LZ-y!~fnkD"
        "0T23N~#gBRKD?ag6?|kHAXCf0D5iw$&jcjcH0a8*hQ~"
    ),
    # the same with -max_send_frag 512: three records
    "openssl-split": (
        "c-n2#&1(}u9LDiyb~bU6pcb~qC`LjP+iFdknQ5!RT2KB1MSD;bo4OWllP#fQ5zqA`coW|bUet5%jt3"
        "7yR1jYxiXsT2;H|}iO5L9OT)#5|^I_(fmBNF7Uzf6T_RHeu=g<D_S~~sUO=rue>~!<mkJX8<%WK8G`"
        "M*2!g_+#yg^`ua<)gn_d*t%U)3@8soESaSdD8WA;l|Y?FK%Ki@B$eKx8GH9zx}BFu>IH#xIx@=CD)G"
        "`S9E=tc4^m*noGF=7I$$6hcSv_3}Q_{egu$176>kd^~(JDMkQRBY|PDum8qzK419_BzUg>JH}cqy-P"
        "nPgfDpnHQurvw=euN&ECh3{Xg->XX3Ncsje6KBSF2UhG--x3OWF`=!=#Onc7U{lq}4VyO&ppyG;wI+"
        "&_h9X{S$0lAQ(+BnqV}+Xo4{WV+h6&j3F399>oxcAr3<vhBypySmLn6VTr>Mhb0b69F{mNaaiK8we>"
        "-ZhX~k=eTY8+&h`5;A(K*VQc9&%T4j{45-RD7gh&c0rI4QQCA_4E0i=}l<K)HX%J77U$GI1!cq|L!w"
        "~xOXyH$F9<=D^g)VsxR-+%qN{vjIgX(lH6PQG8-`X4w?ZAb"
    ),
    # the same with -noservername
    "openssl-noservername": (
        "c-jq)y-Pw-7>9rFdC$EaHJ9$?R$y_-TZvW%(GX}5xHJVp6x3h@HTVxS)DnUb4bqg**O(1aG&lvvr4K"
        "NOK9=eqs41|b2(r6A&+t4B6L|!3ne+Gc<DbfP;r#6KdBwTCxN$eD6C0(0;%X*0y`Idw*|*t6FPhCn3"
        "Ljq?mEO9WY^2uapX#sW_w0f*SHY+yEVfAZ=|Sw*%C*DVkxu9&_Oz#C$myu=#gYzc8zVZPEev57J4hp"
        "iVI<KYpo9=4g9L(bV50-A=tMi({6!)`OcGJRckm4mMjSE82Aiy!lu`i|R3Rmmp-f2znZ(S*LJC8e0t"
        "o~ZOCJd)^g|H&3qA1sjC&9sI~{M{{?2i^%YHa<m+jxFNO$$K`1jcIauuKX2PDQy{Q"
    ),
    # gnutls-cli 3.7
    "gnutls": (
        "c-j+VW@PMPWMJ%IW=`3+EOb}Bs7SgH*CEL@G1rumxYzyX(0=IE_W7wq{)bY93+C@UDmE{_R^aYDW!q"
        "}AqYW2XE7h03?|vX|WESXB<;!3t%p}Y#%qYxqK<CWL18Wa(9ne0o<^bmbgEK1*h#b&AAj~lLz+47Xh"
        "B*i3Fz7SPKeOt<d<IK~c?ae(7z3Ta$^e9n3?RV8AjTlVAkHAcAju%hAP1CWWMpDwW@KUDW?%v;;bl-"
        "_P+(!?;N)OoVdh|GW#r)EU}a_I;9z6q;O1asV`gGxVg{PQ05pSvK^cgR8L}BNfjmc+aF)e0E=7jjyB"
        "8f{F5-B#?RNFEzL@PUKmKvbW!HV+?9|~t`9r=UN@VArq)QjB=}h2vS6;54etM01cXk|$i*E_gK?*&x"
        ">N^xmeJ?8SIA>O~R=%R~^SjUK-zLvrlvOy*ds3x0gEj*v2Qv#ZGcyx2<A0#@L7tKTIY_uXHA$}|Ggm"
        "LQA~ClhCsi*wKbJw5ff?j083rZ?MgZ14a)b"
    ),
    # Go 1.19
    "go": (
        "c-j+VW@KbzWME`sW?u2-K)s*ir7yF+=P1sOk8OHBX~SO|skztl-q#r~^yj~?z+m*}3tPy`G|pplHy1"
        "3q;waJ)`#V{RWuc!^>YT6V`(qf?4rm|HKcI8K;LOT1D-LiT5I(?lK!jlq!(0Y^2GavV3|zvD!c4-<j"
        "0_Bu85kHO7{nMDgv(Qt^hz>w^-?Pma|?1(^^)^*8CV%ufogz&3kW$FWEsSPiX|Di8JK{=ybMwd5*#c"
        "n%pB|-tQ>4CjI2NpurjkTGXXvEALtbZ1|gtUZ3b2rW)@~<24e;_1{I(g3Wdk!@EGiUw6TBf{TUMt-}"
        "coVnw0x>_y0F*mZWMd-B4r?04GUIK>"
    ),
    # OpenJDK 17
    "java": (
        "c-j+VW@bFk$iR4-nOUv-kMTN>mu89*2copt48!<yre6;@=Xy8S_4~vZCtg-4q)To1_IWqoS9zN&bMg"
        "vyu{oYU92VSqRd=Q4k|JxzlM@-dgqegHg_#fN9MC?q@_@ma6$kVg=AT)`u$W;U!=eK!2Q&^SA5dq=X"
        "2@blXK*;cbwK0*=K)~`O9l%DV+JFJxeRj{Y#D4AOd0eU{sWz4!N9;E!63%KAY7iBq*s!etCw1lm|Kv"
        "Os+XLf%fQOO%E$l$TtFov46+R3K*f>_azKrYj7*Hoj4TY?3`{^Jf()Dt>`V+SV8!A<tPI4w3_1*2EX"
        "=ITY|I?&92^`h9IPB{9Go0n9Na97tc+}oEKJP6kYQ$GVrF7wVq(x{U}a%uVP<B~1)9kSbS!Dwje(xd"
        "1iDcn`^KEdGrD5*W72ph|8QM1dl!q6vumK`rQFgbd=o2f#sMAZ$fBV+i~me@z^Ox?<=6MGjr4Zz*Kt"
        "~L*7wUY;g;{IN7v5&a3Pi__{Y7!r@!2Ld`iy2yD@SqW2EUEoBfdz)@s+nHUj`6r*;G"
    ),
    # uv 0.13, which is rustls
    "uv-rustls": (
        "c-jHh1u6O#0|5om0RRQf0|OjDL|WMvN?I`8op`Rfk=`TmXcXpxSHH?05WmN?Zh{~<`}I9Xdl0OxQ;`"
        "JMo^Hc{O>l3;aGNuTAGjDGw1s~F6cYjy0TTnjEWj(wslYJ6FU+U_{{a96Z~zbh4gd@SXfg<BbaZepF"
        ")lFxBLDyZ1poyB000000000O02TlM6L)1|E_7*aE@gOOZE$R5E@N+P01W^f02&1Y1Oo;G2nPrT2n7f"
        "P1_1>D1OW*I2?YrT04)Fl0RaFD00IF304o3m1Oo&E0{{vD3IGTZ>;N4A7XTOl7XSbNGX&}c=n?D$z~"
        "vU6(3crhA)W9xA@`IKO_C*wE2T%1p7`u2E3g$a@Eza;2<v2-PqNEexdkRgY@>;f_@NU{?4Z$^8dLjM"
        "&(TwzC|^j+cE(eSfrDE8MY-Am&5~Oh2dpG@XI_|)isOhDcw2QO94=g1WXESpsd_036q}gGaWgcUd3;"
        "DWkeqiDlR&Giiv&d;N)7iHGeV)xBEfd<dX^cZP}e4>Kvl+E1G@pX5X!`rmmyL4mPgljxAa0XpWJ|jV"
        "VRnjgTG{prw1-;0IA$)J_zEO`(n$b3KwgqI~@kDhvg@g%2EjY2uM*Dm<x~h#Bf7vR{gaIU;%y(8Cyd"
        "0D@j&0G^cAK*$v#GMpoQjS*dbTasga%Kl`FNNgG*bv5n<)!{?T6LPs+%(K_0Nh9oI6OsY{t=UdE~G`"
        "9vNc;atydaY%fVS0Nm#P_%4)j%WmqJbrq*AkDl5QzEkOoygbBhXU{Y!l&_cR)3~XosY)8#ooURy0$@"
        "UgIJ@CMZH;3N~p%3u9Ky7p~-YIy5)833!f{x?u}r2IKeyZ;5)j#5l9Dx*jP^F-yhrv2xF>us*!Lep>"
        "~|XJAm$Ms;a~9>g%e)i79yjOG<ayjO#*rjQ^!Y@Y?R3+khGv7KenxW!;21^mL^K{L3~C8o9^qIOSD+"
        "X_wATuKtHCRUh{mN>>BOg0RZ$5w3d_RFd3RiOt9OO|b3%08CBw(A(HhUtD5mZpgIG*Jhv^_s1r^S%c"
        "meffO0n2|c~(J$6mMAu|1DpQ=Eb80%MPclZG?<l>5_Nx6lE9Np&KO@Qp3baPS8m;t^E)s}>;CLIEfo"
        "=s{bwde}0t^<1IEQ+0+DxliP)Jb14h`EmhP0M`8h>%+JSJ*z?0gmY%Lz!NbbM29%+aZ@2M|Dri56xz"
        "@i>30XJRWEgFG{R!rQ|cRC{}iFF&Hd^76$G0cdSVZz=(=zzLDUH!Dm?rfT4uQc|SfRzd6Ak#z^0&a)"
        "6ETV``?9Diy!vuwZd(kss!0B^vVHlP<;Q)s!jWhHU1;XJdyskMG^F5>k$yo)cgsGX2tb1e0Ddk8CgY"
        "IG}jSH3XF@ilHdOk3#$Dmr5(S7mP$X)t4YV-ga8_n<B>x;Yd;S_XrRcjX+j1GTSm!kz-CZD>`BG9)W"
        "36@_D1K!s8afVMputAIqLMJfSmlzyBPbN(<U??ESi1HO2$T6w%DOY=)X;#|fgS!+04DM_s#cNX<}Br"
        "};cUU_EvvAo^bLaZbpYKsskAxcaerqN|+J;Y?vkx^x9CZ;lY!GQ~r)+Y89bwpd2zjMoOd5+5)UKWZB"
        "q3Us7CQR+LyTW6(rsc;>y8=P*5RfP&hO3Z{>_ZpwCtLHzMj=*ET8d42LqArqmHCxYTa+gBC%#)vYK%"
        "Z!WnUJMFN63U=E97!phf-aaz_&ixPpwCwZ?pf&mBldd!tLX6t{gi9zHpVTY+fhM5<I-hg;f1$cRl_D"
        "Zf>qva3W5wJ0=Gse!OVC?B(1+d3L-AZ#J^EBP9Tid?7lTunrtsL0T0oWZuixht$DvU^<u(+)(6&cHC"
        "7H%rj<#UV7gq<6{$FmaLzf_2j<Vo7ks0PI*STmT&aAiyx3H%rj<#UV7gq<6{$FmaLzf_2j<Vo7ks0P"
        "I*ST$s6aBm"
    ),
}


class ClientHellos(unittest.TestCase):
    NAME = server_name(b"web.tim.example.com")
    OTHER = struct.pack("!HH", 0x0A0A, 0)  # GREASE (RFC 8701)
    LARGE = struct.pack("!H", 51) + u16(bytes(1800))  # a post-quantum key share

    def find(self, data, step=None):
        """What is found, and in how many bytes; None: more must come."""
        hello, buffer = server_module.ClientHello(), bytearray()
        for i in range(0, len(data), step or len(data)):
            buffer += data[i : i + (step or len(data))]
            found = hello.parse(buffer)
            if found is not None:
                self.assertEqual(found[1], 0)  # every byte stays
                return found[0], len(buffer)
        return None

    def test_name_is_found_however_the_hello_is_cut(self):
        message = hello_message(self.OTHER, self.LARGE, self.NAME, self.OTHER)
        for size in (1 << 14, 512, 5, 1):
            data = records(message, size)
            if len(data) > server_module.PREFACE_LIMIT:
                continue
            for step in (None, 1, 7, 1448):
                name, used = self.find(data + b"what follows", step)
                self.assertEqual(name, "web.tim.example.com", (size, step))
                if step == 1:
                    self.assertEqual(used, len(data))
            for end in range(1, len(data), 101):
                self.assertIsNone(self.find(data[:end]))
            self.assertIsNone(self.find(data[:-1], 1))

    def test_hellos_of_real_programs_are_understood(self):
        for program, text in HELLOS.items():
            data = zlib.decompress(base64.b85decode(text))
            named = "address" not in program and "noservername" not in program
            for step in (None, 1, 100, 1448):
                with self.subTest(program=program, step=step):
                    name, used = self.find(data, step)
                    self.assertEqual(name, "web.tim.example.com" if named else "")
                    if step == 1:
                        self.assertEqual(used, len(data))
            for end in range(1, len(data), 7):
                self.assertIsNone(self.find(data[:end]), (program, end))

    UNCLEAR = [
        hello_message(),
        hello_message(OTHER),
        hello_message(NAME, NAME),
        hello_message(NAME, server_name(b"other.tim.example.com")),
        hello_message(server_name(b"a.example.com", b"b.example.com")),
        hello_message(server_name()),
        hello_message(server_name(b"")),
        hello_message(server_name(b"web.tim.example.com", kind=1)),
        hello_message(server_name(b"web.tim.example.com\0.evil.org")),
        hello_message(server_name(b"web.tim.example.com:443")),
        hello_message(server_name(b"[::1]")),
        hello_message(server_name(b"w\xc3\xa9b.example.com")),
        hello_message(server_name(b"../../etc/passwd")),
        hello_message(server_name(b"a..b")),
        hello_message(server_name(b"a" * 300)),
        hello_message(b"\0\0" + u16(b"")),
        hello_message(b"\0\0" + u16(b"\0\1\0")),
        hello_message(b"\0\0" + u16(u16(b"\0" + u16(b"a.b")) + b"x")),
        hello_message(NAME, b"\0"),
        hello_message(NAME, kind=2),
        hello_message(NAME)[:50] + bytes(200),
        b"\1\0\0\0",
        b"\1\0\0\5abcde",
    ]

    def test_what_is_not_clear_has_no_name(self):
        for message in self.UNCLEAR:
            for step in (None, 1):
                with self.subTest(message=message[40:], step=step):
                    self.assertEqual(self.find(records(message), step)[0], "")

    def test_what_is_no_hello_is_not_waited_for(self):
        good = records(hello_message(self.NAME))
        table = [b"GET / HTTP/1.1\r\n", b"\0", b"SSH-2.0-x\r\n", b"\x80\x2e\1\3\1"]
        table += [b"\x15" + good[1:], b"\x16\2" + good[2:], b"\x16\3\1\0\0"]
        table += [b"\x16\3\1\x40\1" + bytes(9)]
        for data in table:
            for step in (None, 1):
                self.assertEqual(self.find(data, step)[0], "", data)

    def test_hello_without_an_end_is_given_up_at_the_limit(self):
        limit, endless = server_module.PREFACE_LIMIT, b"\1\xff\xff\xff" + bytes(40000)
        for size in (1, 1000, 1 << 14):
            data = records(endless, size)[:limit]
            self.assertEqual(self.find(data, 1000)[0], "")
            self.assertIsNone(self.find(data[:-1], 1000))

    def test_noise_is_never_an_error(self):
        chance = random.Random(8)
        good = records(hello_message(self.OTHER, self.NAME, self.LARGE), 700)
        for _ in range(3000):
            data = bytearray(good)
            for _ in range(chance.randrange(1, 6)):
                at = chance.randrange(len(data))
                data[at : at + chance.randrange(3)] = bytes([chance.randrange(256)])
            found = self.find(bytes(data), chance.choice((None, 1, 100)))
            self.assertTrue(found is None or isinstance(found[0], str))


class ProxyHeaders(unittest.TestCase):
    """The PROXY protocol: read by the server, written by the client."""

    MESSAGE = {"visitor": "192.0.2.7", "port": 4711, "to": "192.0.2.1", "to_port": 443}

    def parse(self, data, step=None):
        buffer = bytearray()
        for i in range(0, len(data), step or len(data)):
            buffer += data[i : i + (step or len(data))]
            found = server_module.parse_proxy_header(buffer)
            if found is not None:
                return found
        return None

    def test_what_the_client_writes_the_server_reads(self):
        wide = dict(self.MESSAGE, visitor="2001:db8::7", to="2001:db8::1")
        mixed = dict(self.MESSAGE, visitor="2001:db8::7")
        for message in (self.MESSAGE, wide, mixed):
            for version in (1, 2):
                data = client_module.proxy_header(version, message)
                ends = tuple(message[x] for x in ("visitor", "port", "to", "to_port"))
                for step in (None, 1, 5):
                    found = self.parse(data + b"GET", step)
                    self.assertEqual(found, (ends, len(data)), data)
                for end in range(1, len(data)):
                    self.assertIsNone(self.parse(data[:end]), data[:end])

    def test_headers_stand_as_the_specification_has_them(self):
        one = client_module.proxy_header(1, self.MESSAGE)
        self.assertEqual(one, b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n")
        two = client_module.proxy_header(2, self.MESSAGE)
        start = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c"
        self.assertEqual(two, start + bytes.fromhex("c0000207 c0000201 1267 01bb"))

    def test_port_that_is_none_is_told_as_zero(self):
        for port in (None, "80", 65536, -1, float("inf"), True, [1]):
            one = client_module.proxy_header(1, dict(self.MESSAGE, port=port))
            self.assertEqual(one, b"PROXY TCP4 192.0.2.7 192.0.2.1 0 443\r\n")

    def test_visitor_of_whom_nothing_is_known_is_told_as_such(self):
        odd = {"visitor": 5, "to": 7}
        for message in ({}, dict(self.MESSAGE, visitor="?"), {"visitor": ["a"]}, odd):
            one = client_module.proxy_header(1, message)
            self.assertEqual(one, b"PROXY UNKNOWN\r\n")
            for version in (1, 2):
                data = client_module.proxy_header(version, message)
                self.assertEqual(self.parse(data), (None, len(data)))

    TWO = b"\r\n\r\n\0\r\nQUIT\n"
    NOTHING_TOLD = [
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN ffff:f 192.0.2.1 0 0\r\n",
        TWO + b"\x20\x11\0\x0c" + bytes(12),  # LOCAL: a health check
        TWO + b"\x20\0\0\0",
        TWO + b"\x21\0\0\5" + bytes(5),
        TWO + b"\x21\x31\0\xd8" + bytes(216),  # a unix socket
    ]
    BAD = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\3\1",
        b"PROXX",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\n",
        b"PROXY  TCP4 192.0.2.7 192.0.2.1 4711 443\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 65536\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 04711 443\r\n",
        b"PROXY TCP4 192.0.2.777 192.0.2.1 4711 443\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4711\r\n",
        b"PROXY UDP4 192.0.2.7 192.0.2.1 4711 443\r\n",
        b"PROXY UNKNOWN" + b" " * 107,
        TWO + b"\x11\x11\0\x0c" + bytes(12),
        TWO + b"\x22\x11\0\x0c" + bytes(12),
        TWO + b"\x21\x11\0\x0b" + bytes(11),
        TWO + b"\x21\x11\xff\xff",
        TWO[:-1] + b"X",
    ]

    def test_header_that_tells_nothing_is_read_past(self):
        for data in self.NOTHING_TOLD:
            for step in (None, 1):
                self.assertEqual(self.parse(data + b"GET", step), (None, len(data)))

    def test_more_than_addresses_is_skipped(self):
        data = self.TWO + b"\x21\x11\0\x13" + bytes.fromhex("c0000207c0000201126701bb")
        data += b"\4\0\4zzzz"
        self.assertEqual(self.parse(data + b"x")[1], len(data))

    def test_anything_else_is_refused(self):
        for data in self.BAD:
            for step in (None, 1):
                with self.subTest(data=data, step=step):
                    with self.assertRaises(server_module.ProtocolError):
                        self.parse(data, step)

    def test_mapped_addresses_are_told_plainly(self):
        line = b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:192.0.2.1 1 2\r\n"
        self.assertEqual(self.parse(line)[0], ("192.0.2.7", 1, "192.0.2.1", 2))


class FakeVisitor(Wire):
    """In place of a visitor's Connection, and of what it was before: nothing comes."""

    class Site:
        scheme, kind, first_byte_time = "http", "visitor", 30.0

        def __init__(self, loop):
            self.visitors = server_module.Visitors(loop)
            self.services = {}

        def service(self, id, name):
            return self.services.get(name)

        def page(self, error, request):
            status = getattr(error, "status", 500)
            code = getattr(error, "code", "error")
            return server_module.Page(status, code, str(error), [str(error)])

    def __init__(self, loop):
        super().__init__(loop)
        self.eof, self.incoming = False, bytearray()
        self.phase = server_module.Phase.OPEN
        self.site = self.Site(loop)
        ends = server_module.Ends("192.0.2.1", 1025, "192.0.2.2", 80)
        self.http = server_module.HTTPConnection(self.site, self, ends)

    def read_into(self, view):
        count = min(len(view), len(self.incoming))
        view[:count] = self.incoming[:count]
        del self.incoming[:count]
        return count or (0 if self.eof else None)

    def has_unread(self):
        return bool(self.incoming)

    def close_when_drained(self, ending):
        super().close_when_drained(ending)
        self.phase = server_module.Phase.CLOSING

    def abort(self):
        self.ended = self.ended or "aborted"


class Exchanges(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.loop = fake_loop(server_module, self.clock)
        self.addCleanup(self.loop.close)
        self.visitor = FakeVisitor(self.loop)
        self.outcomes = []
        self.visitor.site.visitors.observers.append(self.outcomes.append)
        self.streams = []
        self.pool = server_module.Pool("tim", self)
        self.link = server_module.Link(self.loop, Wire(self.loop), self, "server")
        self.service = server_module.Service(self.pool, "web", {"target": "9000"})
        self.visitor.site.services["web"] = self.service

    def on_closed(self, cause):
        pass

    def ask(self, *lines, first="GET / HTTP/1.1", body=b""):
        """A request that is on its way: (exchange, stream)."""
        raw = head(*lines, first=first)
        request = server_module.Request(raw, "192.0.2.1")
        self.visitor.http.request = request
        self.visitor.incoming += body
        self.service.begin(self.visitor.http, request)
        exchange = self.visitor.owner
        self.loop.turn()
        return exchange, exchange.stream

    def say(self, stream, *pieces):
        """The service's bytes, as DATA."""
        for piece in pieces:
            self.link.receive(memoryview(frame(Kind.DATA, stream.id, piece)))

    def end(self, stream):
        self.link.receive(memoryview(frame(Kind.END, stream.id)))

    def reset(self, stream, text):
        self.link.receive(memoryview(frame(Kind.RESET, stream.id, text)))

    def said(self):
        return bytes(self.visitor.sent)

    def begin(self, *arguments, **options):
        """The first request, on a link that is logged in."""
        self.link.step = len(server_module.LOGIN_ORDER)
        return self.ask(*arguments, **options)

    def test_answer_comes_out_the_same_however_it_is_cut(self):
        raw = b"HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 200 OK\r\n"
        raw += b"Transfer-Encoding: chunked\r\n\r\n"
        raw += b"3;a=b\r\nabc\r\n0\r\nX: y\r\n\r\n"
        outputs = set()
        for step in (1, 2, 7, len(raw)):
            self.setUp()
            exchange, stream = self.begin()
            for at in range(0, len(raw), step):
                self.say(stream, raw[at : at + step])
            outputs.add(self.said())
            self.assertIs(self.visitor.owner, self.visitor.http)
            self.assertTrue(self.visitor.http.kept.stream is stream)
        (said,) = outputs
        self.assertTrue(said.startswith(raw[: raw.find(b"200")]))
        self.assertEqual(self.outcomes[0][3:7], ("GET", "/", 200, ""))

    def test_101_before_the_request_has_gone_is_no_answer(self):
        lines = "Connection: upgrade", "Upgrade: x"
        for sent in (True, False):
            self.setUp()
            self.link.connection.backlog += b"" if sent else b"of other streams"
            exchange, stream = self.begin(*lines)
            raw = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
            self.say(stream, raw)
            self.assertEqual(b" 101 " in self.said(), sent)

    def test_nothing_is_over_before_the_visitor_has_the_last_byte(self):
        self.visitor.room = 30
        exchange, stream = self.begin()
        self.say(stream, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        self.assertIs(self.visitor.owner, exchange)
        self.visitor.flush(1000)
        self.assertIs(self.visitor.owner, self.visitor.http)

    def test_visitor_who_leaves_before_the_answer_is_told_of_too(self):
        exchange, stream = self.begin()
        exchange.give_up()
        self.assertEqual(self.outcomes[-1][3:7], ("GET", "/", 499, "left"))

    def test_answer_until_the_end_is_whole_with_end_and_cut_with_reset(self):
        for ending, ended in ((self.end, "LINGER"), (None, "ABORT")):
            self.setUp()
            exchange, stream = self.begin()
            self.say(stream, b"HTTP/1.1 200 OK\r\n\r\npart")
            self.end(stream) if ending else self.reset(stream, b"reset gone")
            self.assertTrue(self.said().endswith(b"part"))
            self.assertEqual(self.visitor.ended, ended)

    def test_end_that_overtakes_a_tired_loop_cuts_nothing(self):
        """What came before it is in the inbox still, and goes on in later turns."""
        change(self, server_module, TURN_BUDGET=-1)
        exchange, stream = self.begin()
        chunks = b"1\r\nx\r\n" * (3 * server_module.FEED_LINES)
        self.say(stream, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.say(stream, chunks + b"0\r\n\r\n")
        self.assertLess(len(self.said()), len(chunks))
        self.end(stream)
        exchange.on_writable()  # the visitor has taken what there was
        for _ in range(20):
            self.loop.turn()
        self.assertTrue(self.said().endswith(b"x\r\n0\r\n\r\n"))
        self.assertEqual(self.visitor.ended, "")
        self.assertEqual(self.outcomes[-1].code, "")

    def test_kept_stream_that_dies_is_asked_once_more_and_once_only(self):
        exchange, stream = self.begin()
        self.say(stream, b"HTTP/1.1 204 No\r\n\r\n")
        second, kept = self.ask()
        self.assertIs(kept, stream)
        self.reset(kept, b"reset it died")
        self.assertIsNot(second.stream, stream)
        self.assertIs(self.visitor.owner, second)
        self.reset(second.stream, b"reset it died again")
        self.assertIn(b"HTTP/1.1 502", self.said())

    def test_request_that_goes_twice_does_not_pass_by_a_gate(self):
        for options in ({}, {"visitors": ["192.0.2.0/24"]}):
            self.setUp()
            exchange, stream = self.begin()
            other = server_module.Service(self.pool, "web", dict(options, target="1"))
            self.visitor.site.services["web"] = other  # a new list has come
            self.reset(stream, b"gone it was not dialled")
            self.loop.turn()
            self.assertEqual(exchange.service is other, not options)
            self.assertEqual(b" 503 " in self.said(), bool(options))

    def test_request_that_may_not_go_twice_does_not(self):
        post = {"first": "POST / HTTP/1.1", "body": b"x"}
        exchange, stream = self.begin()
        self.say(stream, b"HTTP/1.1 204 No\r\n\r\n")
        second, kept = self.ask("Content-Length: 1", **post)
        self.reset(kept, b"reset it died")
        self.assertIn(b"HTTP/1.1 502", self.said())

    def test_what_a_client_says_of_its_target_becomes_a_status(self):
        table = [(b"timeout late", 504), (b"no-service x", 404), (b"refused no", 502)]
        for text, status in table:
            self.setUp()
            exchange, stream = self.begin()
            self.reset(stream, text)
            self.assertIn(b"HTTP/1.1 %d " % status, self.said())
            self.assertEqual(self.outcomes[-1].status, status)

    def test_bytes_behind_a_whole_answer_go_nowhere_and_end_the_connection(self):
        exchange, stream = self.begin()
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        self.say(stream, answer + b"HTTP/1.1 200 X")
        self.assertTrue(self.said().endswith(b"\r\n\r\nok"))
        self.assertIsNone(self.visitor.http.kept)
        self.assertEqual(self.visitor.ended, "LINGER")

    def test_nothing_behind_a_malformed_request_is_read(self):
        """The next request may be begun twice: when the answer has gone, and when more
        has come in the same turn."""
        exchange, stream = self.begin()
        http = self.visitor.http
        http.unparsed += b"POST / HTTP/1.1\r\nHost: a.b\r\nno field\r\n\r\n"
        http.unparsed += head()
        http.site.resolve = lambda request: self.service
        self.say(stream, b"HTTP/1.1 204 No\r\n\r\n")
        self.visitor.incoming += b"x"
        self.loop.guard(http, http.on_readable)
        self.assertIn(b"400", self.said())
        self.loop.turn()
        self.assertEqual(self.link.last_id, 1)
        self.assertIsNone(http.kept and http.kept.stream.open or None)
        self.assertEqual(self.visitor.ended, "LINGER")

    def test_visitor_that_left_is_noticed_by_time_alone(self):
        exchange, stream = self.begin()
        self.visitor.eof = True
        exchange.on_readable()
        for _ in range(7):
            self.clock.now += server_module.LEFT_LOOK
            self.loop.turn()
        self.assertIs(self.visitor.owner, exchange)
        self.say(stream, b"HTTP/1.1 100 Continue\r\n\r\n")  # written to: begin anew
        for _ in range(7):
            self.clock.now += server_module.LEFT_LOOK
            self.loop.turn()
        self.assertIs(self.visitor.owner, exchange)
        for _ in range(3):
            self.clock.now += server_module.LEFT_LOOK
            self.loop.turn()
        self.assertEqual(self.visitor.ended, "closed")
        self.assertEqual(stream.reset_frame[:4], b"left")

    def test_stream_is_counted_to_nothing_whatever_ends_it(self):
        self.visitor.room = 10
        exchange, stream = self.begin()
        self.say(stream, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello")
        self.assertGreater(self.loop.unread, 0)
        self.reset(stream, b"overload too much")
        self.assertEqual((self.loop.unread, self.link.unread), (0, 0))
        self.assertEqual(self.visitor.ended, "ABORT")


# -----------------------------------------------------------------------------------
# Services
# -----------------------------------------------------------------------------------
class ServiceFiles(unittest.TestCase):
    def test_targets(self):
        local = ("127.0.0.1:9000", "localhost", 9000)
        table = [
            (9000, local),
            ("9000", local),
            ("nas:80", ("nas:80", "nas", 80)),
            ("[::1]:80", ("[::1]:80", "::1", 80)),
            ("unix:/run/x.sock", ("unix:/run/x.sock", "/run/x.sock", 0)),
            ("http://localhost:5173/", ("localhost:5173", "localhost", 5173)),
            ("http://nas", ("nas:80", "nas", 80)),
            ("http://[::1]:80", ("[::1]:80", "::1", 80)),
        ]
        for value, target in table:
            target += (None,)  # without TLS
            self.assertEqual(client_module.parse_target(value), target)
            self.assertEqual(client_module.parse_service(value), (target, {}))
            service = client_module.parse_service({"target": value, "tcp": 0})
            self.assertEqual(service, (target, {"tcp": 0}))

    def test_targets_by_tls_and_what_is_verified(self):
        ca = TunnelCase.file(self, LOCALHOST)
        pin = "AB:" * 31 + "AB"
        table = [
            ("https://nas:8443", {}, ("nas:8443", "nas", 8443), True),
            ("https://nas", {}, ("nas:443", "nas", 443), True),
            ("HTTPS://192.0.2.1/", {}, ("192.0.2.1:443", "192.0.2.1", 443), True),
            ("https://[::2]:8443", {}, ("[::2]:8443", "::2", 8443), True),
            ("https://127.256.0.1", {}, ("127.256.0.1:443", "127.256.0.1", 443), True),
            ("https://nas", {"ca": ca}, ("nas:443", "nas", 443), True),
            ("https://nas", {"fingerprint": pin}, ("nas:443", "nas", 443), False),
            ("https://localhost:1", {}, ("localhost:1", "localhost", 1), False),
            ("https://127.9.9.9", {}, ("127.9.9.9:443", "127.9.9.9", 443), False),
            ("https://[::1]", {}, ("[::1]:443", "::1", 443), False),
            ("https://[::1]", {"ca": ca}, ("[::1]:443", "::1", 443), True),
        ]
        for value, options, wanted, verified in table:
            found = client_module.parse_service(dict(options, target=value, tcp=0))
            self.assertEqual(found.target[:3], wanted)
            context, name, given = found.target.tls
            modes = context.check_hostname, context.verify_mode == ssl.CERT_REQUIRED
            self.assertEqual(modes, (verified, verified), value)
            self.assertEqual(name, wanted[1])
            self.assertEqual(given.hex().upper(), "AB" * 32 if "fingerprint" in options
                             else "")  # fmt: skip
            self.assertEqual(found.options, {"tcp": 0})  # which the server gets
        both = dict(target="https://nas", ca=ca, fingerprint=pin)
        context, _, given = client_module.parse_service(both).target.tls
        self.assertEqual((context.check_hostname, len(given)), (True, 32))
        near = client_module.parse_target("https://[fe80::2%lo]:1").tls[1]
        self.assertEqual(near, "fe80::2")

    def test_services_share_a_context_and_a_new_ca_has_a_new_one(self):
        ca = TunnelCase.file(self, LOCALHOST)

        def context(target, **options):
            found = client_module.parse_service(dict(options, target=target))
            return found.target.tls[0]

        self.assertIs(context("https://a"), context("https://b:1"))
        first = context("https://a", ca=ca)
        self.assertIs(first, context("https://b", ca=ca, fingerprint="AB" * 32))
        self.assertIsNot(first, context("https://a"))
        self.write(ca, OTHER)
        self.assertIsNot(first, context("https://a", ca=ca))

    def test_ssl_is_imported_for_an_https_target_only(self):
        code = "import sys; sys.path.insert(0, %r); import mdm_tunnel_client as m; "
        code += "m.parse_service({'target': %r, 'host': 'rewrite'}); "
        code += "print('ssl' in sys.modules)"
        for target, wanted in (("http://nas:80", b"False"), ("https://nas", b"True")):
            command = [sys.executable, "-S", "-c", code % (HERE, target)]
            said = subprocess.check_output(command, timeout=PATIENCE)
            self.assertEqual(said.strip(), wanted, target)

    def test_what_is_wrong_with_tls_is_told_with_the_service_and_the_file(self):
        empty, nas = TunnelCase.file(self, ""), "https://nas"
        table = [
            ({"target": "http://nas", "ca": empty}, "https://nas:8443"),
            ({"target": 9, "fingerprint": "AB" * 32}, "https://nas:8443"),
            ({"target": "unix:/x", "ca": empty}, "https://nas:8443"),
            ({"target": nas, "ca": 5}, "ca is a file"),
            ({"target": nas, "fingerprint": 5}, "a SHA-256"),
            ({"target": nas, "fingerprint": "AB"}, "fingerprint: a SHA-256 has 64"),
            ({"target": nas, "ca": "/no/such"}, "/no/such: No such file"),
            ({"target": nas, "ca": HERE}, HERE + ": "),
            ({"target": nas, "ca": empty}, re.escape(empty)),
            ({"target": nas, "fingerprnt": "x"}, "is it 'fingerprint'"),
        ]
        for value, cause in table:
            with self.assertRaisesRegex(ValueError, "^service 'web': .*" + cause):
                client_module.parse_services([("web", value)])
        broken = '{"web": {"target": "https://nas", "ca": "/no/such"}}'
        done = run_script(SCRIPTS[1], "-c", TunnelCase.file(self, broken))
        self.assertEqual((done.status, done.stderr.count("\n")), (2, 1))
        self.assertIn("service 'web': /no/such: No such file", done.stderr)
        client, path = self.services('{"web": 9000}')
        self.write(path, broken)
        client.look()
        self.assertIsNone(client.services["web"].target.tls)

    def test_options_are_checked_and_unknown_ones_name_the_nearest(self):
        table = [
            ({"target": 22, "tpc": 0}, "unknown option 'tpc'; is it 'tcp'"),
            ({"target": 22, "x": 0}, "unknown option 'x'$"),
            ({"target": 22, "tcp": -1}, "tcp is a port"),
            ({"target": 22, "tcp": 65536}, "tcp is a port"),
            ({"target": 22, "tcp": "22"}, "tcp is a port"),
            ({"target": 22, "tcp": False}, "tcp is a port"),
            ({"tcp": 22}, "no target"),
        ]
        for value, cause in table:
            with self.assertRaisesRegex(ValueError, cause):
                client_module.parse_service(value)

    def test_broken_targets_are_refused(self):
        bad = [0, 65536, -1, 1.5, True, None, [], {}, {"target": {}}, "", "nas"]
        bad += ["nas:", "nas:x", "nas:99999", ":80", "unix:x", {"target": 1, "x": 2}]
        bad += ["http://", "http://nas/x", "ftp://nas", "x://", "://a"]
        bad += ["https://", "https://nas/x", "https://nas:0", "https://.nas"]
        bad += [{"target": 1, "host": x} for x in ("rewrit", "Rewrite", "perserve")]
        bad += ["https://n\0s", "https://" + "nas." * 99 + "n" * 99]
        for value in bad:
            with self.assertRaises(ValueError, msg=repr(value)):
                client_module.parse_service(value)

    def test_broken_files_are_refused_with_the_cause(self):
        table = [
            (b"", "JSON"),
            (b"[]", "object"),
            (b'{"a": 1, "A": 2}', "twice"),
            (b'{"a": 1, "a": 2}', "twice"),
            (b'{"a--b": 1}', "--"),
            (b'{"a.b": 1}', "letters"),
            (b'{"": 1}', "letters"),
            (b'{"web": "x"}', "web"),
            (b'{"web": {"target": 1, "target": 2}}', "twice"),
            (b"[" * 100000, "JSON"),
            (b"\xff", "JSON"),
        ]
        for data, word in table:
            with self.assertRaises(ValueError, msg=data[:20]) as caught:
                client_module.parse_file(data)
            self.assertIn(word, str(caught.exception))

    def test_file_and_command_line_together_must_fit_into_a_frame(self):
        def many(letter):
            names = [letter * 60 + "%d" % number for number in range(500)]
            return client_module.parse_services([(name, 9000) for name in names])

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "services")
            with open(path, "wb") as file:
                file.write(b"{}")
            watched = client_module.Watched([path], client_module.parse_file)
            client = make_client(many("a"), file=watched)
            self.addCleanup(client.loop.close)
            with open(path, "w") as file:
                json.dump({name: 9000 for name in many("b")}, file)
            client.look()  # the old list stays
            self.assertEqual(client.services, many("a"))
            with self.assertRaisesRegex(ValueError, "bytes of services"):
                make_client(many("a"), file=watched)

    def test_extended_file_has_a_token_beside_the_services(self):
        table = [
            (b'{"web": 9}', "", ["web"]),
            (b'{"services": {"web": 9}}', "", ["web"]),
            (b'{"token": "s", "services": {"web": 9}}', "s", ["web"]),
            (b'{"token": "s", "services": {"target": 9}}', "s", ["target"]),
            (b'{"token": 9}', "", ["token"]),
            (b'{"services": 9, "token": 8}', "", ["services", "token"]),
            (b'{"services": {"target": 9}}', "", ["target"]),
            (b'\xef\xbb\xbf{"web": 9}', "", ["web"]),  # as Windows saves it
        ]
        for data, token, names in table:
            found, services = client_module.parse_file(data)
            self.assertEqual((found, sorted(services)), (token, names), data)

    def test_broken_extended_files_are_refused_with_the_cause(self):
        table = [
            (b'{"token": "", "services": {}}', "token"),
            (b'{"token": 5, "services": {}}', "token"),
            (b'{"token": "hidden", "web": 9}', "services"),
            (b'{"token": "hidden:80"}', "services"),
            (b'{"tokens": "s", "services": {"web": 9}}', "tokens"),
            (b'{"token": "s", "token": "t", "services": {"web": 9}}', "twice"),
            (b'{"token": "s", "services": {"web": "x"}}', "web"),
        ]
        for data, word in table:
            with self.assertRaises(ValueError, msg=data) as caught:
                client_module.parse_file(data)
            self.assertIn(word, str(caught.exception))
            self.assertNotIn("hidden", str(caught.exception))

    def test_deep_target_is_refused_like_any_other(self):
        for deep in (400, 700, 900):
            data = b'{"web":{"target":' + b'{"a":' * deep + b"1" + b"}" * (deep + 2)
            with self.assertRaises(ValueError) as caught:
                client_module.parse_file(data)
            self.assertLess(len(str(caught.exception)), 200)

    def services(self, content, given=None):
        handle, path = tempfile.mkstemp()
        os.close(handle)
        self.addCleanup(lambda: os.path.exists(path) and os.remove(path))
        self.write(path, content)
        watched = client_module.Watched([path], client_module.parse_file)
        loop = fake_loop(client_module)
        self.addCleanup(loop.close)
        return make_client(given or {}, loop, file=watched), path

    def write(self, path, content):
        with open(path, "w") as file:
            file.write(content)

    def test_change_is_seen_even_of_the_same_size(self):
        client, path = self.services('{"web": 9000}')
        self.write(path, '{"web": 9001}')
        client.look()
        self.assertEqual(client.services["web"].target.port, 9001)

    def test_broken_or_vanished_file_keeps_the_old_list(self):
        client, path = self.services('{"web": 9000}')
        self.write(path, "{")
        client.look()
        self.assertEqual(client.services["web"].target.port, 9000)
        os.remove(path)
        client.look()
        self.assertEqual(client.services["web"].target.port, 9000)
        self.write(path, '{"other": 9000}')
        client.look()
        self.assertEqual(list(client.services), ["other"])

    def test_command_line_wins_over_the_file(self):
        given = client_module.parse_services([("web", "7000"), ("x", "7001")])
        client, path = self.services('{"web": 9000, "y": 1}', given)
        ports = {name: found.target.port for name, found in client.services.items()}
        self.assertEqual(ports, {"web": 7000, "x": 7001, "y": 1})
        self.write(path, '{"web": 9001, "z": 2}')
        client.look()
        ports = {name: found.target.port for name, found in client.services.items()}
        self.assertEqual(ports, {"web": 7000, "x": 7001, "z": 2})


# -----------------------------------------------------------------------------------
# Command lines
# -----------------------------------------------------------------------------------
class CommandLines(unittest.TestCase):
    def parse(self, *words):
        return client_module.parse_arguments(list(words))

    def refuse(self, module, *words):
        """Exit status 2, and a line that says why."""
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            with self.assertRaises(SystemExit) as caught:
                module.parse_arguments(list(words))
        self.assertEqual(caught.exception.code, 2)
        self.assertEqual(len(errors.getvalue().splitlines()), 1)
        return errors.getvalue()

    def test_help_fits_into_80_columns(self):
        for script in SCRIPTS:
            text = run_script(script, "--help").stdout
            self.assertIn("--verbose", text)
            self.assertLess(max(map(len, text.splitlines())), 80)

    def test_options_and_services_mix_in_any_order(self):
        for words in (
            ["web=9000", "-i", "tim", "x=1", "-vv", "-h", "example.com"],
            ["-vv", "-h", "example.com", "-u", "tim", "web=9000", "x=1"],
            ["-h", "example.com", "web=9000", "--id=tim", "-v", "x=1", "-v"],
        ):
            options = self.parse(*words)
            self.assertEqual(sorted(options.given), ["web", "x"])
            found = (options.id, options.host, options.verbose)
            self.assertEqual(found, ("tim", "example.com", 2))

    def test_older_names_of_options_work(self):
        for name in ("-c", "--config", "-s", "--service-definitions"):
            self.assertEqual(self.parse(name, "f").config, "f")

    def test_defaults_are_those_of_the_original(self):
        options = self.parse()
        found = (options.id, options.host, options.port, options.config)
        self.assertEqual(found, ("admin", "localhost", 8001, None))
        server = server_module.parse_arguments([])
        self.assertEqual((server.port, server.client_port), (8000, 8001))

    def test_range_of_ports_is_read_or_refused(self):
        for text, ports in (("2222-2224", range(2222, 2225)), ("80", range(80, 81))):
            found = server_module.parse_arguments(["--tcp-ports", text])
            self.assertEqual(found.tcp_ports, ports)
        for text in ("", "x", "1-x", "9-8", "0-9", "1-65536", "1-2-3", "-5"):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                with self.assertRaises(SystemExit) as caught:
                    server_module.parse_arguments(["--tcp-ports=" + text])
            self.assertEqual(caught.exception.code, 2)
            self.assertEqual(err.getvalue().count("\n"), 1)

    def test_drain_is_read_or_refused(self):
        for module in (server_module, client_module):
            for text, seconds in (("0", 0), ("2.5", 2.5), ("3600", 3600)):
                found = module.parse_arguments(["--drain", text])
                self.assertEqual(found.drain, seconds)
            self.assertEqual(module.parse_arguments([]).drain, 4)
            for text in ("", "x", "-1", "nan", "inf", "3601", "4s"):
                self.assertIn("--drain", self.refuse(module, "--drain=" + text))

    def test_h_alone_is_help_and_with_a_name_the_host(self):
        for words in (["-h"], ["-v", "-h"], ["-h", "-v"], ["--help"]):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                with self.assertRaises(SystemExit) as caught:
                    self.parse(*words)
            self.assertEqual(caught.exception.code, 0)
            self.assertIn("usage:", out.getvalue())
        self.assertEqual(self.parse("-h", "example.com").host, "example.com")

    def test_host_may_hold_the_port(self):
        table = [
            (["-h", "a.b:99"], ("a.b", 99)),
            (["-h", "a.b", "-p", "98"], ("a.b", 98)),
            (["--host=[::1]:97"], ("::1", 97)),
            (["--host", "::1"], ("::1", 8001)),
            (["--host", "[::1]"], ("::1", 8001)),
            (["-h", "http://nas"], ("nas", 80)),
            (["-h", "https://nas/"], ("nas", 443)),
            (["-h", "HTTPS://nas:8443", "-p", "9"], ("nas", 8443)),
            (["-h", "https://nas", "-p", "9"], ("nas", 9)),
        ]
        for words, found in table:
            options = self.parse(*words)
            self.assertEqual((options.host, options.port), found)
            self.assertEqual(options.tls, "https" in "".join(words).lower())

    def test_wrong_command_lines_are_refused(self):
        table = [
            ["-h", "web=9000"],
            ["--host", "a b"],
            ["--host", "a:b"],
            ["-h", "https://a/b"],
            ["-h", "ftp://a"],
            ["-h", "https://"],
            ["-h", "http://a", "--tls"],
            ["-p", "x"],
            ["-p", "70000"],
            ["-p", "0"],
            ["web"],
            ["--nonsense"],
            ["--nonsense=1"],
            ["web=x"],
            ["a.b=1"],
            ["-i", "a.b"],
            ["-i", "a--b"],
            ["--max-attempts", "x"],
            ["--max-attempts", "-1"],
            ["@/no/such/file"],
        ]
        for words in table:
            self.refuse(client_module, *words)
        for words in (["-p", "x"], ["-p", "65536"], ["--domain", "a b"], ["x"]):
            self.refuse(server_module, *words)

    def test_at_file_holds_options_as_one_would_type_them(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "options")
            with open(path, "w") as file:
                file.write("-i tim  # me\n\n# all\n--host 'example.com' web=9000\n")
            options = self.parse("@" + path, "-v")
        self.assertEqual((options.id, options.host), ("tim", "example.com"))
        self.assertEqual(list(options.given), ["web"])

    def test_scripts_run_alone_isolated_and_from_standard_input(self):
        for script in SCRIPTS:
            for stdin in (None, read(script)):
                done = run_script(script, "-V", stdin=stdin)
                self.assertEqual(done, (0, server_module.VERSION + "\n", ""))

    def test_missing_or_broken_file_is_one_line_and_exit_2(self):
        with tempfile.TemporaryDirectory() as home:
            for content, word in ((None, "No such file"), ("{", "JSON")):
                path = os.path.join(home, ".tunnel-services.json")
                if content:
                    with open(path, "w") as file:
                        file.write(content)
                done = run_script(SCRIPTS[1], env={"HOME": home, "USERPROFILE": home})
                self.assertEqual((done.status, done.stdout), (2, ""))
                self.assertEqual(len(done.stderr.splitlines()), 1)
                self.assertIn(word, done.stderr)
                self.assertEqual("write it" in done.stderr, content is None)

    def test_taken_port_is_one_line_and_exit_1(self):
        with contextlib.closing(server_module.listen(None, 0)) as taken:
            port = str(taken.getsockname()[1])
            done = run_script(SCRIPTS[0], "-p", port, "-c", "0")
        self.assertEqual((done.status, done.stdout), (1, ""))
        self.assertEqual(len(done.stderr.splitlines()), 1)
        self.assertIn(port, done.stderr)

    def test_attempts_used_up_is_one_line_and_exit_4(self):
        with contextlib.closing(socket.socket()) as unused:
            unused.bind(("127.0.0.1", 0))
            port = str(unused.getsockname()[1])
            words = ["-h", "127.0.0.1", "-p", port, "--max-attempts", "2", "web=9"]
            done = run_script(SCRIPTS[1], *words)
        self.assertEqual((done.status, done.stdout), (4, ""))
        self.assertIn("refused", done.stderr)
        self.assertEqual(len(done.stderr.splitlines()), 1)

    def test_broken_at_files_are_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "options")
            for content in (b"-i 'tim", b"-i \xff"):
                with open(path, "wb") as file:
                    file.write(content)
                self.refuse(client_module, "@" + path)

    def test_last_line_cannot_be_forged(self):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            with self.assertRaises(SystemExit):
                client_module.die(3, "no\nforged\x1b[2J")
        self.assertEqual(len(errors.getvalue().splitlines()), 1)
        self.assertNotIn("\x1b", errors.getvalue())

    def test_log_lines_cannot_be_forged(self):
        log, err = server_module.Log(), io.StringIO()
        log.level = server_module.INFO
        with contextlib.redirect_stderr(err):
            log.info("a\nb\x1b[2Jc\x9b%s", "\r")
            log.debug("not asked for")
            log.error("oops", trace=ValueError("forged\r"))
        lines = err.getvalue().split("\n")
        self.assertRegex(lines[0], r"^\d\d:\d\d:\d\d a\\nb\\x1b\[2Jc\\x9b\\r$")
        self.assertRegex(lines[1], r" oops$")
        self.assertEqual(lines[2], r"ValueError: forged\r")


# -----------------------------------------------------------------------------------
# End to end: server and client in threads of their own, real sockets on loopback
# -----------------------------------------------------------------------------------
class Backstage:
    """A program in a thread. Tests wait for a state of it: after each turn of its loop
    they look again, so nothing sleeps and nothing is polled."""

    def __init__(self, module, make, selector):
        self.turned = threading.Condition()
        backstage = self

        class Loop(module.Loop):
            def turn(self):
                super().turn()
                with backstage.turned:
                    backstage.turned.notify_all()

        self.loop = Loop(selector())
        self.program = make(self.loop)
        self.error = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            self.program.run()
        except client_module.Refused as refusal:
            self.error = refusal
        with self.turned:
            self.turned.notify_all()

    def until(self, condition):
        def holds():
            with contextlib.suppress(RuntimeError):  # a set changed meanwhile: later
                return condition()

        with self.turned:
            if not self.turned.wait_for(holds, PATIENCE):
                raise AssertionError("waited in vain")

    def do(self, call):
        """Run `call` inside the loop; what it returned."""
        results = []
        self.loop.from_thread(self.loop, lambda: results.append(call()))
        self.until(lambda: results)
        return results[0]

    def pass_time(self, seconds):
        """The loop's clock jumps; what is due then happens, and nothing waits."""
        clock = self.loop.clock
        self.do(lambda: setattr(self.loop, "clock", lambda: clock() + seconds))

    def end(self):
        self.loop.from_thread(self.loop, setattr, self.loop, "running", False)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            raise AssertionError("it does not end")


def make_server(loop=None, router=None, **options):
    options = dict({"port": 0, "client_port": 0}, **options)
    return server_module.Server(server_module.Config(**options), router, loop)


def make_client(services, loop=None, token="", **options):
    if isinstance(token, str):
        token = client_module.Watched([], lambda word=token: word)
    options = dict({"host": "127.0.0.1", "given": services, "token": token}, **options)
    return QuietClient(client_module.Config(**options), loop)


class QuietClient(client_module.Client):
    def show(self, line, fields, level=""):
        """The log is on in these tests, but stdout is theirs."""


class Echo(http.server.BaseHTTPRequestHandler):
    """An independent service: says what it was asked."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment an answer

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        content = json.dumps(
            {
                "service": self.server.label,
                "method": self.command,
                "path": self.path,
                "headers": self.headers.items(),
                "body": self.rfile.read(length).decode("latin-1"),
                "port": self.client_address[1],
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_POST = do_PUT = do_HEAD = do_OPTIONS = do_DELETE = do_GET

    def log_message(self, *_):
        pass


class EchoServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request, client_address):
        """A visitor who was cut is cut here too."""



class Log(logging.Handler):
    """Keeps the lines of the programs' log."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        self.lines.append(self.format(record))


def reset_on_close(conn):
    """From here on close() sends a reset."""
    option = struct.pack("ii", 1, 0)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)


def read_head(conn):
    """A head, and what came with it, from a socket."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = conn.recv(65536)
        if not more:
            break
        data += more
    first, _, rest = data.partition(b"\r\n\r\n")
    return first, rest


class TunnelCase(unittest.TestCase):
    selector: type = selectors.DefaultSelector
    scheme = "http"

    def setUp(self):
        self.log = Log()
        logger = logging.getLogger("mdm_tunnel")
        level = logger.level
        logger.addHandler(self.log)
        logger.setLevel(logging.INFO)
        self.addCleanup(logger.setLevel, level)
        self.addCleanup(logger.removeHandler, self.log)
        self.addCleanup(self.check_log)

    def check_log(self):
        """A traceback in the log is a bug, unless the test is about one."""
        lines = [line for line in self.log.lines if "Traceback" in line]
        self.assertEqual(lines, [])

    def file(self, content, mode=0o600):
        """The path of a file that holds this."""
        handle, path = tempfile.mkstemp()
        os.close(handle)
        self.addCleanup(lambda: os.path.exists(path) and os.remove(path))
        with open(path, "w") as file:
            file.write(content)
        os.chmod(path, mode)
        return path

    def start_server(self, **options):
        options = dict({"port": 0, "client_port": 0, "bind": "127.0.0.1"}, **options)
        self.server = Backstage(
            server_module,
            lambda loop: make_server(loop, **options),
            self.selector,
        )
        self.addCleanup(self.server.end)
        return self.server

    @property
    def tunnels(self):
        """Who is logged in, by id."""
        pools = self.server.program.registry.pools
        return {id: pool.tunnel for id, pool in pools.items()}

    def start_client(self, services, id="tim", wait=True, **options):
        """Log a client in, with {name: port or target}; until its list is known."""
        targets = client_module.parse_services(list(services.items()))
        port = options.pop("port", 0) or self.server.program.client_address[1]
        client = Backstage(
            client_module,
            lambda loop: make_client(targets, loop, port=port, id=id, **options),
            self.selector,
        )
        self.addCleanup(client.end)
        if wait:
            self.server.until(lambda: self.serves(id, services))
        return client

    def serves(self, id, services):
        pool = self.server.program.registry.pools.get(id)
        return pool and sorted(pool.services) == sorted(services)

    def start(self, **services):
        """Server and client with these services, or with an echo called web."""
        if not services:
            services = {"web": self.echo()}
        self.start_server()
        self.client = self.start_client(services)

    def echo(self, label="web"):
        """The port of an Echo service."""
        server = EchoServer(("127.0.0.1", 0), Echo)
        server.label = label
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.daemon = True
        thread.start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return server.server_address[1]

    def service(self, handler, listener=None):
        """The port of a service that runs handler(socket) for each connection."""
        if listener is None:
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        self.addCleanup(self.hang_up, listener)

        def work(conn):
            with contextlib.suppress(OSError), contextlib.closing(conn):
                conn.settimeout(PATIENCE)
                handler(conn)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    conn = listener.accept()[0]
                    threading.Thread(target=work, args=(conn,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return listener.getsockname()[1] if listener.family == socket.AF_INET else 0

    def hang_up(self, listener):
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
        listener.close()

    def relay(self, one, other):
        """Carry bytes both ways until either side ends."""

        def carry(source, sink):
            with contextlib.suppress(OSError, ValueError):
                for data in iter(lambda: source.recv(65536), b""):
                    sink.sendall(data)
            for conn in (one, other):
                with contextlib.suppress(OSError):
                    conn.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=carry, args=(other, one), daemon=True).start()
        carry(one, other)

    def answering(self, *pieces):
        """The port of a service that reads a head, and says these bytes."""

        def handler(conn):
            read_head(conn)
            for piece in pieces:
                conn.sendall(piece)

        return self.service(handler)

    def deaf_port(self):
        """A port that does not answer a dial at all: its listener's queue is full."""
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = socket.socket()
            self.addCleanup(filler.close)
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        return listener.getsockname()[1]

    def visit(self):
        """A visitor's connection."""
        conn = socket.create_connection(self.server.program.visitor_address[:2])
        self.addCleanup(conn.close)
        conn.settimeout(PATIENCE)
        return conn

    def dial(self):
        """A connection to the client port."""
        conn = socket.create_connection(self.server.program.client_address[:2])
        self.addCleanup(conn.close)
        conn.settimeout(PATIENCE)
        return conn

    def raw(self, data, conn=None):
        """All that the server says to these bytes until it closes. A reset raises."""
        conn = conn or self.visit()
        if data:
            conn.sendall(data)
        said = b""
        while True:
            more = conn.recv(65536)
            if not more:
                return said
            said += more

    def ask(self, host, *lines, first="GET / HTTP/1.1", body=b"", close=True):
        lines += ("Connection: close",) if close else ()
        return head(*lines, first=first, host="Host: " + host) + body

    def get(self, host, path="/", method="GET", body=None, headers=None, conn=None):
        """An answer as http.client has it, with .content; `conn` is kept alive."""
        kept, conn = conn, conn or self.keep()
        conn.request(method, path, body, dict({"Host": host}, **(headers or {})))
        answer = conn.getresponse()
        answer.content = answer.read()
        if not kept:
            conn.close()
        return answer

    def keep(self):
        """A connection of http.client that can be kept alive."""
        host, port = self.server.program.visitor_address[:2]
        conn = http.client.HTTPConnection(host, port, timeout=PATIENCE)
        self.addCleanup(conn.close)
        return conn

    def echoed(self, *arguments, **options):
        answer = self.get(*arguments, **options)
        self.assertEqual(answer.status, 200, answer.content)
        return json.loads(answer.content.decode())

    def unauthenticated(self):
        """Who has not logged in yet, with the network it comes from."""
        return self.server.program.registry.unauthenticated.networks

    def exchanges(self):
        """The requests that are running."""
        owners = [http.connection.owner for http in self.server.program.visitors.all]
        return [x for x in owners if isinstance(x, server_module.Exchange)]

    def wait_for_answer(self):
        """Until an answer is here to its last byte; its Exchange."""
        def whole():
            return [x for x in self.exchanges() if x.answer and x.body.done]

        self.server.until(whole)
        return self.exchanges()[0]

    def dials(self):
        """How many dials of the client go on, and how many wait for a place."""
        gates = self.client.program.uplink.tunnel.gates.values()
        return [sum(len(g.running) for g in gates), sum(len(g.waiting) for g in gates)]

    def wait_for_streams(self, count):
        """Until so many streams are open on tim's link, as the server sees it."""
        self.server.until(lambda: len(self.tunnels["tim"].link.streams) == count)


class EndToEnd(TunnelCase):
    def test_request_reaches_the_service_named_by_host(self):
        self.start(web=self.echo("web"), api=self.echo("api"))
        for name in ("web", "api"):
            found = self.echoed(name + ".tim.localhost.dev", "/a?b")
            self.assertEqual((found["service"], found["path"]), (name, "/a?b"))

    def test_every_request_of_a_connection_is_routed_by_its_own_host(self):
        self.start(web=self.echo("web"), api=self.echo("api"))
        conn = self.keep()
        for name in ("web", "api", "web", "web", "api"):
            found = self.echoed(name + ".tim.localhost", conn=conn)
            self.assertEqual(found["service"], name)

    def test_large_bodies_pass_both_ways(self):
        self.start()
        body = "".join(chr(i % 251) for i in range(3000000))
        found = self.echoed("web.tim.x", "/", "POST", body.encode("latin-1"))
        self.assertEqual(found["body"], body)

    def test_kept_connection_is_kept_to_the_service_too(self):
        self.start()
        conn = self.keep()
        ports = {self.echoed("web.tim.x", conn=conn)["port"] for _ in range(5)}
        self.assertEqual(len(ports), 1)

    def test_pipelined_requests_are_answered_in_order(self):
        self.start()
        asked = [
            self.ask("web.tim.x", first="GET /%d HTTP/1.1" % i, close=i == 19)
            for i in range(20)
        ]
        said = self.raw(b"".join(asked))
        paths = [int(path) for path in re.findall(rb'"path": "/(\d+)"', said)]
        self.assertEqual(paths, list(range(20)))

    def test_pipelined_errors_are_answered_in_order_and_without_end(self):
        self.start()
        ask = self.ask("none.tim.x", close=False)
        said = self.raw(ask * 1500 + self.ask("none.tim.x"))
        self.assertEqual(said.count(b"HTTP/1.1 404"), 1501)

    def test_long_pipelined_burst_is_answered_to_its_end(self):
        self.start()
        ask = self.ask("web.tim.x", close=False)
        conn = self.visit()
        data = ask * 2000 + self.ask("web.tim.x")
        threading.Thread(target=conn.sendall, args=(data,), daemon=True).start()
        self.assertEqual(self.raw(b"", conn).count(b"HTTP/1.1 200"), 2001)

    def test_chunked_upload_and_answer_pass_unchanged(self):
        def handler(conn):
            first, rest = read_head(conn)
            while not rest.endswith(b"0\r\nT: v\r\n\r\n"):
                rest += conn.recv(65536)
            conn.sendall(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: T\r\n\r\n"
            )
            conn.sendall(rest)

        self.start(web=self.service(handler))
        body = b"3\r\nabc\r\n10;x=y\r\n0123456789abcdef\r\n0\r\nT: v\r\n\r\n"
        line = "Transfer-Encoding: chunked"
        ask = self.ask("web.tim.x", line, first="POST / HTTP/1.1", body=body)
        said = self.raw(ask)
        self.assertTrue(said.endswith(body), said)

    def test_chunks_that_came_with_the_head_all_go_on(self):
        body = b"1\r\nx\r\n" * 9000 + b"0\r\n\r\n"  # lines across the end of a turn

        def handler(conn):
            first, rest = read_head(conn)
            while len(rest) < len(body):
                rest += conn.recv(65536)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        self.start(web=self.service(handler))
        line = "Transfer-Encoding: chunked"
        for shift in range(6):
            lines = (line, "X-Shift: " + "s" * shift)
            ask = self.ask("web.tim.x", *lines, first="POST / HTTP/1.1", body=body)
            self.assertTrue(self.raw(ask).endswith(b"ok"))

    def test_answers_without_body_keep_the_connection(self):
        table = [
            ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"),
            ("GET", b"HTTP/1.1 204 No\r\n\r\n"),
            ("GET", b"HTTP/1.1 304 No\r\nContent-Length: 999\r\n\r\n"),
        ]
        for method, answer in table:
            with self.subTest(answer):
                self.start(web=self.answering(answer), echo=self.echo())
                conn = self.keep()
                self.get("web.tim.x", "/", method, conn=conn)
                sock = conn.sock
                self.echoed("echo.tim.x", conn=conn)
                self.assertIs(conn.sock, sock)

    def test_continue_comes_before_the_body_is_sent(self):
        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = conn.recv(100)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + body)

        self.start(web=self.service(handler))
        conn = self.visit()
        lines = ["Expect: 100-continue", "Content-Length: 4"]
        conn.sendall(self.ask("web.tim.x", *lines, first="POST / HTTP/1.1"))
        self.assertTrue(read_head(conn)[0].startswith(b"HTTP/1.1 100"))
        self.assertTrue(self.raw(b"body", conn).endswith(b"\r\n\r\nbody"))

    def test_early_answer_arrives_while_the_body_still_uploads(self):
        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 413 Big\r\nContent-Length: 3\r\n\r\nbig")

        self.start(web=self.service(handler))
        for _ in range(5):
            conn = self.visit()
            line = "Content-Length: 50000000"
            ask = self.ask("web.tim.x", line, first="PUT / HTTP/1.1", close=False)
            conn.sendall(ask)
            with contextlib.suppress(OSError):
                conn.sendall(b"x" * 1000000)
            first, rest = read_head(conn)
            self.assertIn(b"413", first)
            self.assertIn(b"Connection: close", first)
            self.assertEqual(rest or conn.recv(100), b"big")
        self.wait_for_streams(0)

    def test_body_until_the_end_of_the_connection(self):
        self.start(web=self.answering(b"HTTP/1.1 200 OK\r\n\r\nall", b" of it"))
        said = self.raw(self.ask("web.tim.x", close=False))
        self.assertIn(b"Connection: close", said)
        self.assertTrue(said.endswith(b"\r\n\r\nall of it"))

    def test_visitor_of_version_one_point_zero(self):
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        pieces = [b"HTTP/1.1 103 Hint\r\n\r\n", chunked, b"3\r\nabc\r\n0\r\n\r\n"]
        self.start(web=self.answering(*pieces))
        said = self.raw(b"GET / HTTP/1.0\r\nHost: web.tim.x\r\n\r\n")
        self.assertTrue(said.startswith(b"HTTP/1.1 200 OK"), said)
        self.assertNotIn(b"chunked", said)
        self.assertTrue(said.endswith(b"\r\n\r\nabc"))

    def test_version_one_point_zero_can_be_kept_alive(self):
        self.start()
        ask = b"GET / HTTP/1.0\r\nHost: web.tim.x\r\nConnection: keep-alive\r\n\r\n"
        last = b"GET / HTTP/1.0\r\nHost: web.tim.x\r\n\r\n"
        said = self.raw(ask + last)
        self.assertEqual(said.count(b"HTTP/1.1 200"), 2)
        self.assertIn(b"Connection: keep-alive", said)

    def test_interim_answer_of_two_lengths_is_a_502(self):
        lengths = b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"
        final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        switch = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n"
        for first in (b"HTTP/1.1 100 X\r\n", switch):
            self.start(web=self.answering(first + lengths + final))
            lines = ("Connection: upgrade", "Upgrade: x")
            conn = self.visit()
            conn.sendall(self.ask("web.tim.x", *lines, close=False))
            self.assertIn(b"HTTP/1.1 502", read_head(conn)[0])

    def test_empty_lines_before_a_request_are_skipped_however_they_come(self):
        self.start()
        ask = b"\r\n" * 5 + self.ask("web.tim.x")
        for step in (len(ask), 1, 2, 3):
            conn = self.visit()
            for at in range(0, len(ask), step):
                conn.sendall(ask[at : at + step])
            self.assertIn(b"200 OK", self.raw(b"", conn))

    def test_interim_answers_are_passed_on(self):
        hint = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        self.start(web=self.answering(hint + hint + final))
        said = self.raw(self.ask("web.tim.x"))
        self.assertEqual(said.count(b"HTTP/1.1 103"), 2)
        self.assertEqual(said.count(b"HTTP/1.1 200"), 1)

    def test_absolute_target_names_the_host(self):
        self.start(web=self.echo("web"))
        first = "GET %s://web.tim.x:81/y HTTP/1.1" % self.scheme
        said = self.raw(self.ask("other.eva.x", first=first))
        self.assertIn(b'"path": "/y"', said)
        self.assertIn(b'["Host", "web.tim.x:81"]', said)

    def test_server_sent_events_arrive_event_by_event(self):
        next_event = threading.Semaphore(0)

        def handler(conn):
            read_head(conn)
            conn.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
            )
            for number in range(5):
                next_event.acquire(timeout=PATIENCE)
                conn.sendall(b"data: %d\n\n" % number)

        self.start(web=self.service(handler))
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        first, rest = read_head(conn)
        for number in range(5):  # each is sent only when the one before has arrived
            next_event.release()
            self.assertEqual(conn.recv(100), b"data: %d\n\n" % number)

    def upgraded(self, handler):
        """A visitor's connection, to a service that says 101 and runs `handler`."""

        def switch(conn):
            first, rest = read_head(conn)
            conn.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n"
                b"Upgrade: x\r\n\r\n"
            )
            handler(conn, rest)

        self.start(web=self.service(switch))
        conn = self.visit()
        lines = ["Connection: upgrade", "Upgrade: x"]
        ask = self.ask("web.tim.x", *lines, close=False)
        conn.sendall(ask + b"early")
        first = b""
        while not first.endswith(b"\r\n\r\n"):  # and no byte of what follows
            first += conn.recv(1)
        self.assertTrue(first.startswith(b"HTTP/1.1 101"))
        self.assertIn(b"Upgrade: x", first)
        return conn

    def test_upgrade_lets_bytes_flow_both_ways(self):
        def handler(conn, rest):
            for data in iter(lambda: conn.recv(65536), b""):
                conn.sendall(data.upper())

        conn = self.upgraded(handler)
        self.assertEqual(conn.recv(5), b"EARLY")
        for word in (b"one", b"two"):
            conn.sendall(word)
            self.assertEqual(conn.recv(10), word.upper())

    def test_upgraded_connection_is_closed_one_way_at_a_time(self):
        def handler(conn, rest):
            while True:
                more = conn.recv(65536)
                if not more:
                    break
                rest += more
            conn.sendall(b"read %d to the end" % len(rest))

        conn = self.upgraded(handler)
        conn.sendall(b"x" * 100000)
        conn.shutdown(socket.SHUT_WR)
        said = b""
        while True:
            more = conn.recv(100)
            if not more:
                break
            said += more
        self.assertEqual(said, b"read 100005 to the end")
        self.wait_for_streams(0)

    def test_service_may_end_first_after_an_upgrade(self):
        got = []
        done = threading.Event()

        def handler(conn, rest):
            conn.shutdown(socket.SHUT_WR)
            while True:
                more = conn.recv(65536)
                if not more:
                    break
                rest += more
            got.append(rest)
            done.set()

        conn = self.upgraded(handler)
        self.assertEqual(conn.recv(10), b"")
        conn.sendall(b" and more")
        conn.shutdown(socket.SHUT_WR)
        self.assertTrue(done.wait(PATIENCE))
        self.assertEqual(got, [b"early and more"])
        self.wait_for_streams(0)

    def test_upgrade_that_is_refused_is_an_ordinary_answer(self):
        self.start()
        lines = ["Connection: upgrade", "Upgrade: x"]
        ask = self.ask("web.tim.x", *lines, close=False)
        said = self.raw(ask + self.ask("web.tim.x"))
        self.assertEqual(said.count(b"HTTP/1.1 200"), 2)

    def test_upgrade_that_nobody_asked_for_is_a_502(self):
        switch = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
        self.start(web=self.answering(switch))
        self.assertEqual(self.get("web.tim.x").status, 502)

    def test_hundred_visitors_at_once(self):
        self.start()
        conns = [self.visit() for _ in range(100)]
        for number, conn in enumerate(conns):
            first = "GET /%d HTTP/1.1" % number
            conn.sendall(self.ask("web.tim.x", first=first))
        for number, conn in enumerate(conns):
            self.assertIn(b'"path": "/%d"' % number, self.raw(b"", conn))

    def test_service_behind_ipv6_and_localhost(self):
        listener = socket.socket(socket.AF_INET6)
        other = socket.socket()  # keeps the port of IPv4 for nobody
        self.addCleanup(other.close)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        try:
            listener.bind(("::1", port))
        except OSError:
            self.skipTest("no IPv6 here")
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nsix"

        def handler(conn):
            read_head(conn)
            conn.sendall(answer)

        self.service(handler, listener)
        self.start(web="localhost:%d" % port, six="[::1]:%d" % port)
        for name in ("web", "six"):
            self.assertEqual(self.get(name + ".tim.x").content, b"six")

    def unix_listener(self):
        """A bound unix socket, and its target."""
        if not hasattr(socket, "AF_UNIX"):
            self.skipTest("no unix sockets here")
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(os.path.join(folder, "s"))
        return listener, "unix:" + os.path.join(folder, "s")

    def full_unix_listener(self):
        """The same, and nobody gets in until it accepts."""
        listener, target = self.unix_listener()
        listener.listen(0)
        filler = socket.socket(socket.AF_UNIX)
        self.addCleanup(filler.close)
        filler.connect(target[5:])
        return listener, target

    def unix_handler(self, conn):
        read_head(conn)
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nunix")

    def test_service_behind_a_unix_socket(self):
        listener, target = self.unix_listener()
        self.service(self.unix_handler, listener)
        self.start(web=target)
        self.assertEqual(self.get("web.tim.x").content, b"unix")

    def test_visitor_who_sends_no_more_is_not_waited_for(self):
        """A plain close loses nothing then. Behind a body some send a line's end, and
        1.0 has said nothing."""
        change(self, server_module, LINGER=PATIENCE)
        self.start()
        connections = self.server.loop.connections
        close, length = "Connection: close", "Content-Length: 1"
        for minor, lines, body, waits in (
            (1, [close], b"", self.scheme == "https"),
            (1, [close, length], b"x", True),
            (1, [close], b"\r\n", True),
            (0, [], b"", True),
        ):
            conn, first = self.visit(), "POST / HTTP/1.%d" % minor
            ask = self.ask("web.tim.x", *lines, first=first, close=False)
            conn.sendall(ask + body)
            self.assertIn(b"200 OK", self.raw(b"", conn))
            lingers = self.server.do(lambda: any(self.lingers(c) for c in connections))
            self.assertEqual(lingers, waits)
            getattr(conn, "conn", conn).close()
            self.server.until(lambda: len(connections) == 1)

    def lingers(self, connection):
        return connection.phase == server_module.Phase.LINGERING

    def test_unix_socket_whose_queue_is_full_is_tried_again(self):
        listener, target = self.full_unix_listener()
        self.start(web=target)
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        self.client.until(lambda: self.dials()[0])
        self.service(self.unix_handler, listener)  # from here on it accepts
        self.assertIn(b"unix", self.raw(b"", conn))

    def test_unix_socket_whose_queue_stays_full_is_a_504(self):
        change(self, client_module, DIAL_TIME=0.2)
        _, target = self.full_unix_listener()
        self.start(web=target)
        answer = self.get("web.tim.x")
        found = answer.status, answer.headers["X-Tunnel-Error"]
        self.assertEqual(found, (504, "timeout"))

    def test_hundreds_of_dials_that_end_at_once_take_their_turns(self):
        change(self, client_module, DIALS=1, DIAL_TIME=2 * PATIENCE)
        listener, target = self.full_unix_listener()
        self.start(web=target)
        conns = [self.visit() for _ in range(200)]  # times 4: select has 1024
        for conn in conns:
            conn.sendall(self.ask("web.tim.x"))
        link = self.client.program.uplink.tunnel.link
        self.client.until(lambda: link.last_id == len(conns))
        listener.listen(len(conns) + 1)  # from here on each is connected at once
        self.service(self.unix_handler, listener)
        for conn in conns:
            self.assertIn(b"unix", self.raw(b"", conn))

    def test_one_port_can_serve_visitors_and_clients(self):
        port = free_port()
        self.start_server(port=port, client_port=port)
        self.start_client({"web": self.echo()}, port=port)
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_becoming_a_link_lets_go_of_a_kept_stream(self):
        port = free_port()
        self.start_server(port=port, client_port=port)
        self.start_client({"web": self.echo()}, port=port)
        conn = self.keep()
        self.echoed("web.tim.x", conn=conn)
        lines = ["Connection: Upgrade", "Upgrade: mdm-tunnel/1"]
        first = "GET /.well-known/mdm-tunnel HTTP/1.1"
        conn.sock.sendall(self.ask("x", *lines, first=first, close=False))
        self.assertIn(b"101", read_head(conn.sock)[0])
        self.wait_for_streams(0)

    def test_names_of_both_kinds_reach_the_service(self):
        self.start()
        for host in ("web.tim.localhost", "web--tim.example.com", "WEB.TIM.x:81"):
            self.assertEqual(self.echoed(host)["service"], "web")


class EndToEndOnPoll(EndToEnd):
    selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class EndToEndOnSelect(EndToEnd):
    selector = selectors.SelectSelector


def free_port():
    """A port that is free, and stays so: below those that the kernel hands out."""
    while True:
        port = random.randrange(10000, 32000)
        with contextlib.closing(socket.socket()) as sock:
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                return port


class Listening(TunnelCase):
    def test_one_socket_serves_both_families_and_shows_plain_addresses(self):
        try:
            server_module.listen("::1", 0).close()
        except OSError:
            self.skipTest("no IPv6 here")
        self.start_server(bind=None)
        self.start_client({"web": self.echo()})
        for address in ("127.0.0.1", "::1"):
            port = self.server.program.visitor_address[1]
            conn = http.client.HTTPConnection(address, port, timeout=PATIENCE)
            found = self.echoed("web.tim.x", conn=conn)
            conn.close()
            self.assertEqual(dict(found["headers"])["X-Forwarded-For"], address)

    def test_without_ipv6_there_is_ipv4(self):
        def no_ipv6(family=socket.AF_INET, *arguments):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no such family")
            return real(family, *arguments)

        real = socket.socket
        socket.socket = no_ipv6
        try:
            sock = server_module.listen(None, 0)
        finally:
            socket.socket = real
        with contextlib.closing(sock):
            self.assertEqual(sock.getsockname()[0], "0.0.0.0")

    def test_server_that_cannot_listen_leaves_nothing_open(self):
        with contextlib.closing(server_module.listen("127.0.0.1", 0)) as taken:
            port = free_port()
            with self.assertRaises(OSError):
                make_server(
                    port=port, client_port=taken.getsockname()[1], bind="127.0.0.1"
                )
        server = make_server(port=port, bind="127.0.0.1")
        self.addCleanup(server.close)
        with self.assertRaises(ValueError):
            make_server(port=65536)

    def test_addresses_are_known_before_the_loop_runs(self):
        server = make_server()
        self.addCleanup(server.close)
        self.assertGreater(server.visitor_address[1], 0)
        self.assertNotEqual(server.visitor_address[1], server.client_address[1])


class Pages(TunnelCase):
    def test_index_has_links_to_the_services_that_work(self):
        self.start(web=self.echo("web"), api=self.echo("api"))
        port = self.server.program.visitor_address[1]
        host = "tim.localhost:%d" % port
        page = self.get(host, headers={"Accept": "text/html"}).content.decode()
        links = re.findall(r'href="([^"]*)"', page)
        self.assertEqual(
            links,
            ["http://%s.tim.localhost:%d/" % (name, port) for name in ("api", "web")],
        )
        for link in links:
            self.assertEqual(self.get(link.split("/")[2]).status, 200)

    def test_index_is_text_for_programs(self):
        self.start()
        answer = self.get("tim.localhost:80")
        self.assertIn("text/plain", answer.headers["Content-Type"])
        self.assertIn(b"http://web.tim.localhost:80/", answer.content)

    def test_base_names_and_addresses_show_how_to_begin(self):
        self.start_server()
        port = self.server.program.client_address[1]
        for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
            answer = self.get(host)
            self.assertEqual(answer.status, 200)
            self.assertIn(b"-p %d" % port, answer.content)

    def test_what_names_nothing_is_a_404_with_the_line_to_paste(self):
        self.start()
        table = [
            ("nobody.x", "/", "no-name"),
            ("web.bob.x", "/", "no-name"),
            ("none.tim.x", "/", "no-service"),
            ("tim.x", "/path", "no-page"),
            ("localhost", "/path", "no-name"),
        ]
        for host, path, code in table:
            answer = self.get(host, path)
            found = (answer.status, answer.headers["X-Tunnel-Error"])
            self.assertEqual(found, (404, code), host)
            self.assertIn(b"mdm_tunnel_client.py", answer.content)

    def test_with_domain_any_other_name_is_a_404(self):
        self.start_server(domain="example.com")
        self.start_client({"web": self.echo()})
        self.assertEqual(self.get("web.tim.example.com").status, 200)
        self.assertEqual(self.get("web.tim.localhost").status, 200)
        self.assertEqual(self.get("web.tim.evil.com").status, 404)

    def test_pages_are_never_stored_and_escape_what_came_from_outside(self):
        self.start()
        headers = {"Accept": "text/html"}
        answer = self.get("x.tim.x", "/<script>", headers=headers)
        self.assertEqual(answer.headers["Cache-Control"], "no-store")
        scripts = server_module.COPY.encode()  # one of our own, and no other
        self.assertNotIn(b"<script", answer.content.replace(scripts, b""))

    def test_head_of_a_page_has_its_length_and_no_body(self):
        self.start_server()
        answer = self.get("localhost", method="HEAD")
        self.assertEqual((answer.status, answer.content), (200, b""))
        self.assertGreater(int(answer.headers["Content-Length"]), 0)

    def test_error_keeps_the_connection_when_the_request_was_read_whole(self):
        self.start()
        conn = self.keep()
        self.get("none.tim.x", conn=conn)
        sock = conn.sock
        self.echoed("web.tim.x", conn=conn)
        self.assertIs(conn.sock, sock)

    def test_error_before_a_body_is_read_closes_the_connection_and_arrives(self):
        self.start()
        line = "Content-Length: 3000000"
        ask = self.ask("none.tim.x", line, first="POST / HTTP/1.1", close=False)
        for _ in range(5):
            said = self.raw(ask + b"x" * 100000)
            self.assertIn(b"404", said)
            self.assertIn(b"Connection: close", said)

    def test_empty_line_before_a_request_is_skipped_however_it_is_cut(self):
        self.start()
        visitors = self.server.program.visitors.all
        conn = self.visit()
        conn.sendall(b"\r")
        self.server.until(lambda: [v.unparsed for v in visitors] == [b"\r"])
        said = self.raw(b"\n" + self.ask("web.tim.x", close=False), self.visit())
        self.assertIn(b"HTTP/1.1 400", said)  # a line feed alone is no empty line
        said = self.raw(b"\n" + self.ask("web.tim.x"), conn)
        self.assertIn(b"HTTP/1.1 200", said)
        said = self.raw(b"\r\n" + self.ask("web.tim.x"))
        self.assertIn(b"HTTP/1.1 200", said)

    def test_malformed_request_is_answered_and_closed(self):
        self.start()
        said = self.raw(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" * 2)
        self.assertEqual(said.count(b"HTTP/1.1 400"), 1)
        self.assertIn(b"Connection: close", said)

    def test_urls_are_told_to_the_client(self):
        self.start_server(domain="https://example.com")
        client = self.start_client({"web": 9000})
        client.until(lambda: client.program.urls)
        self.assertEqual(client.program.urls, {"web": "https://web.tim.example.com/"})


class LandingPages(TunnelCase):
    """What the server says at its own name, and the client that it hands out."""

    FILE = "/mdm_tunnel_client.py"

    def page(self, host="localhost", **options):
        return self.get(host, **options).content.decode()

    def line(self, host, **headers):
        """The line to paste, at the landing page of this host."""
        lines = self.page(host, headers=headers).splitlines()
        return next(line.strip() for line in lines if line.startswith("  "))

    def hand_out(self, text):
        """The path of a file that the server hands out as its client."""
        path = self.file(text)
        self.server.program.landing.path = path
        return path

    def client_of(self, version):
        return 'VERSION = "%s"\nif __name__ == "__main__":\n    main()\n' % version

    def test_client_is_handed_out_to_the_byte_and_the_page_has_its_sum(self):
        self.start_server()
        data = read(SCRIPTS[1]).encode()
        for host in ("localhost", "127.0.0.1:8000", "[::1]"):
            self.assertEqual(self.get(host, self.FILE).content, data)
        page = self.page()
        self.assertIn(hashlib.sha256(data).hexdigest(), page)
        self.assertIn("Version %s," % client_module.VERSION, page)

    def test_client_is_had_on_a_kept_connection_and_its_length_by_head(self):
        self.start_server()
        conn, length = self.keep(), str(len(read(SCRIPTS[1]).encode()))
        for method in ("GET", "HEAD", "GET"):
            answer = self.get("localhost", self.FILE, method, conn=conn)
            self.assertEqual(answer.headers["Content-Length"], length)
            self.assertEqual(len(answer.content), int(length) * (method == "GET"))
            self.assertIsNotNone(conn.sock)

    def test_path_is_a_services_own_below_the_base(self):
        self.start()
        self.assertEqual(self.echoed("web.tim.x", self.FILE)["path"], self.FILE)
        for host, method in (("tim.x", "GET"), ("bob.x", "GET"), ("localhost", "POST")):
            self.assertEqual(self.get(host, self.FILE, method).status, 404)

    def test_clients_port_hands_nothing_out(self):
        self.start_server()
        first = "GET %s HTTP/1.1" % self.FILE
        said = self.raw(self.ask("localhost", first=first), self.dial())
        self.assertIn(b"X-Tunnel-Error: client-port", said)

    def test_where_no_client_lies_beside_the_server_a_404_says_so(self):
        self.start_server()
        for path in ("", "/no/such/file"):
            self.server.program.landing.path = path
            answer = self.get("localhost", self.FILE)
            self.assertEqual(answer.status, 404)
            self.assertIn(b"no mdm_tunnel_client.py lies beside", answer.content)
            self.assertIn("  python3 mdm_tunnel_client.py -h localhost", self.page())

    def test_client_is_read_once_and_again_when_it_may_have_changed(self):
        self.start_server()
        reads, real = [], server_module.read_file
        change(self, server_module, read_file=lambda x: reads.append(x) or real(x))
        change(self, server_module, LOOK_TIME=3600)
        for _ in range(5):
            self.get("localhost", self.FILE)
            self.page()
        self.assertEqual(len(reads), 1)
        self.server.program.landing.due = 0.0
        self.get("localhost", self.FILE)
        self.assertEqual(len(reads), 2)

    def test_client_that_changes_is_handed_out_anew_but_never_half_of_it(self):
        change(self, server_module, LOOK_TIME=0)
        self.start_server()
        path = self.hand_out(self.client_of("1"))
        for text, version in (
            (self.client_of("2"), "2"),
            (self.client_of("3")[:-9], "2"),
            ("no client", "2"),
            (self.client_of("4" * server_module.CLIENT_LIMIT), "2"),
            (self.client_of("5"), "5"),
        ):
            with open(path, "w") as file:
                file.write(text)
            found = self.get("localhost", self.FILE).content.decode()
            self.assertEqual(found, self.client_of(version))
            sum = hashlib.sha256(found.encode()).hexdigest()
            self.assertIn("Version %s, SHA-256 %s" % (version, sum), self.page())
        os.remove(path)
        found = self.get("localhost", self.FILE).content.decode()
        self.assertEqual(found, self.client_of("5"))

    def test_slow_visitor_gets_the_client_as_it_was_when_it_asked(self):
        change(self, server_module, LOOK_TIME=0)
        self.start_server()
        filler = "# %s\n" % ("x" * 80) * 3000
        path = self.hand_out(filler + self.client_of("1"))
        with contextlib.closing(socket.socket()) as conn:
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            conn.settimeout(PATIENCE)
            conn.connect(self.server.program.visitor_address)
            visitors = self.server.program.visitors.all
            self.server.until(lambda: visitors)
            connection = next(iter(visitors)).connection
            # The kernel holds little, so that the server has to wait for the visitor.
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            conn.sendall(self.ask("localhost", first="GET %s HTTP/1.1" % self.FILE))
            self.server.until(lambda: connection.waiting())
            with open(path, "w") as file:
                file.write(self.client_of("2"))
            other = self.get("localhost", self.FILE).content.decode()
            self.assertEqual(other, self.client_of("2"))
            self.assertTrue(connection.waiting())
            said = self.raw(b"", conn).partition(b"\r\n\r\n")[2].decode()
        self.assertEqual(said, filler + self.client_of("1"))

    def test_line_to_paste_is_right_for_the_ports_and_the_name(self):
        self.start_server(domain="e.com,eu.e.com")
        port = self.server.program.client_address[1]
        line = "curl -fsS {1}http://{0}{2}{1} | python3 - -h {1}{3}{1} -p %d" % port
        for host, quote, name in (
            ("localhost:80", "", "localhost"),
            ("E.com:8000", "", "e.com"),
            ("eu.e.com", "", "eu.e.com"),
            ("[::1]:8000", "'", "[::1]"),
        ):
            said = line.format(host.lower(), quote, self.FILE, name)
            self.assertEqual(self.line(host), said + " -i NAME -v web=9000")

    def test_usual_port_of_clients_is_not_in_the_line(self):
        self.start_server()
        self.server.program.client_address = ("", 8001)
        line = "curl -fsS http://localhost%s | python3 - -h localhost" % self.FILE
        self.assertEqual(self.line("localhost"), line + " -i NAME -v web=9000")

    def test_line_goes_by_the_front_where_there_is_one(self):
        port = free_port()
        self.start_server(
            port=port,
            client_port=port,
            domain="https://e.com",
            trust_proxy=["127.0.0.1"],
        )
        line = "curl -fsS %s" + self.FILE + " | python3 - -h %s -i NAME -v web=9000"
        self.assertEqual(self.line("e.com"), line % (2 * ("https://e.com",)))
        forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "localhost:444"}
        found = self.line("x", **forwarded)
        self.assertEqual(found, line % (2 * ("https://localhost:444",)))
        found = self.line("localhost:%d" % port)
        self.assertEqual(found, line % (2 * ("http://localhost:%d" % port,)))

    def test_page_says_where_the_service_will_be(self):
        self.start_server()
        port = self.server.program.visitor_address[1]
        for host, said in (
            ("localhost", "is then at http://web.NAME.localhost:%d/\n" % port),
            ("8.8.8.8", "is then at http://web.NAME.8.8.8.8.sslip.io:%d/ (by" % port),
            ("10.1.1.1", "There is no name: the server wants --domain, or a name"),
        ):
            self.assertIn(said, self.page(host))

    def test_server_with_tokens_says_how_the_token_is_given(self):
        self.start_server(tokens=self.file('{"tim": "secret"}'))
        self.assertIn("MDM_TUNNEL_TOKEN", self.page())
        self.assertNotIn("for you to choose", self.page())

    def test_without_landing_nothing_tells_what_is_here(self):
        self.start_server(landing=False)
        for path, method in (("/", "GET"), (self.FILE, "GET"), ("/path", "POST")):
            answer = self.get("localhost", path, method)
            self.assertEqual(answer.status, 404)
            self.assertEqual(answer.content, b"404 Not Found\nnothing is here\n")
        self.assertNotIn(b"mdm_tunnel", self.get("web.tim.x").content)
        for words, on in (([], True), (["--no-landing"], False)):
            self.assertEqual(server_module.parse_arguments(words).landing, on)

    def test_copy_button_needs_nothing_from_elsewhere(self):
        self.start_server()
        page = self.page(headers={"Accept": "text/html"})
        self.assertEqual(page.count("<script"), 1)
        text = re.sub("</?span>", "", page)
        self.assertIn("<pre><code>curl -fsS http://localhost", text)
        self.assertNotRegex(page, "src=|@import|url\\(|<link")

    def test_server_that_has_only_an_address_gives_names_that_work(self):
        self.start()
        for host in ("web.tim.203.0.113.5.sslip.io", "web--tim.203-0-113-5.sslip.io"):
            self.assertEqual(self.echoed(host + ":8000")["service"], "web")
        self.tunnels["tim"].host = "8.8.8.8:8001"  # as if that had been dialled
        self.client.do(self.client.program.uplink.tunnel.publish)
        self.client.until(lambda: "8.8.8.8" in self.client.program.urls["web"])
        url, _, hint = self.client.program.urls["web"].partition(" ")
        self.assertEqual(self.echoed(url.split("/")[2])["service"], "web")
        self.assertIn("sslip.io", url)
        self.assertIn("--domain", hint)


class Faults(TunnelCase):
    """What goes wrong costs the one whom it concerns, and he is told."""

    def status(self, port, *arguments, **options):
        self.start(web=port)
        answer = self.get("web.tim.x", *arguments, **options)
        return answer.status, answer.headers["X-Tunnel-Error"], answer.content.decode()

    def test_refused_target_is_a_502_that_names_it(self):
        port = free_port()
        status, code, text = self.status(port)
        self.assertEqual((status, code), (502, "refused"))
        self.assertIn("ervice web of tim: 127.0.0.1:%d refused" % port, text)

    def test_service_that_closes_without_an_answer_is_a_502(self):
        self.assertEqual(self.status(self.answering())[:2], (502, "reset"))

    def test_service_that_resets_is_a_502(self):
        def handler(conn):
            read_head(conn)
            reset_on_close(conn)

        self.assertEqual(self.status(self.service(handler))[:2], (502, "reset"))

    def test_broken_answers_are_a_502(self):
        table = [
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: \x01b\r\n\r\n",
            b"SSH-2.0-OpenSSH\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        ]
        for answer in table:
            with self.subTest(answer[:60]):
                found = self.status(self.answering(answer))[:2]
                self.assertEqual(found, (502, "broken"))

    def test_whole_early_answer_survives_what_happens_to_its_stream(self):
        """It waits for a slow visitor, whose upload has lost its service."""
        go = threading.Event()

        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 413 Big\r\nContent-Length: 150000\r\n\r\n")
            conn.sendall(b"y" * 150000)
            go.wait(PATIENCE)
            reset_on_close(conn)

        self.start(web=self.service(handler))
        conn = self.visit()
        visitors = self.server.program.visitors.all
        self.server.until(lambda: visitors)
        (visitor,) = visitors
        sock = visitor.connection.sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line = "Content-Length: 50000000"
        conn.sendall(self.ask("web.tim.x", line, first="PUT / HTTP/1.1", close=False))
        self.assertTrue(self.wait_for_answer().connection.backlog)
        go.set()
        self.wait_for_streams(0)
        conn.sendall(b"x" * 20000)
        self.server.until(lambda: len(visitor.unparsed) == 20000)  # read, and no spin
        self.assertEqual(len(self.raw(b"", conn).partition(b"\r\n\r\n")[2]), 150000)

    def cut(self, *pieces):
        """What a visitor gets of an answer that is cut, which must end with a reset."""
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        said = b""
        with self.assertRaises(ConnectionResetError):
            while True:
                more = conn.recv(65536)
                if not more:
                    break
                said += more
        return said

    def test_answer_that_was_cut_never_looks_complete(self):
        starts = [
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n",
        ]
        for start in starts:
            self.start(web=self.answering(start))
            self.cut()

    def test_body_until_the_end_that_was_reset_never_looks_complete(self):
        go = threading.Event()

        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 200 OK\r\n\r\npart")
            go.wait(PATIENCE)
            reset_on_close(conn)

        self.start(web=self.service(handler))
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        read_head(conn)
        go.set()
        with self.assertRaises(ConnectionResetError):
            while conn.recv(100):
                pass

    def test_visitor_who_leaves_in_the_middle_of_an_answer_frees_the_service(self):
        left = threading.Event()

        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            try:
                while True:
                    conn.sendall(b"x" * 65536)
            except OSError:
                left.set()

        self.start(web=self.service(handler), echo=self.echo())
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        conn.recv(1000)
        conn.close()
        self.assertTrue(left.wait(PATIENCE))
        self.assertEqual(self.echoed("echo.tim.x")["service"], "web")
        self.wait_for_streams(0)

    def test_visitor_who_had_ended_and_then_leaves_frees_the_service(self):
        left = threading.Event()

        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            try:
                while True:
                    conn.sendall(b"x" * 65536)
            except OSError:
                left.set()

        self.start(web=self.service(handler))
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        conn.shutdown(socket.SHUT_WR)
        conn.recv(1000)
        conn.close()
        self.assertTrue(left.wait(PATIENCE))

    def test_visitor_who_leaves_before_the_answer_frees_the_service(self):
        asked, left = threading.Event(), threading.Event()

        def handler(conn):
            read_head(conn)
            asked.set()
            try:
                conn.recv(100)
            except ConnectionResetError:
                left.set()

        self.start(web=self.service(handler))
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        self.assertTrue(asked.wait(PATIENCE))
        reset_on_close(conn)
        conn.close()
        self.assertTrue(left.wait(PATIENCE))

    def test_half_closed_visitor_is_answered(self):
        self.start()
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x", close=False))
        conn.shutdown(socket.SHUT_WR)
        self.assertIn(b"200 OK", self.raw(b"", conn))

    def test_visitor_who_resets_a_stalled_upload_frees_the_service(self):
        stop = threading.Event()
        self.addCleanup(stop.set)
        self.start(web=self.service(lambda conn: stop.wait(PATIENCE)))
        conn = self.visit()
        conn.setblocking(False)
        line = "Content-Length: 900000000"
        conn.send(self.ask("web.tim.x", line, first="PUT / HTTP/1.1"))
        self.wait_for_streams(1)
        (stream,) = self.tunnels["tim"].link.streams.values()
        for _ in range(4):
            with contextlib.suppress(BlockingIOError):
                conn.send(b"x" * 65536)
        self.server.until(lambda: stream.credit < server_module.WINDOW)
        reset_on_close(conn)
        conn.close()
        self.wait_for_streams(0)

    def test_visitor_who_ends_and_then_resets_is_noticed(self):
        change(self, server_module, LEFT_TIME=PATIENCE, LEFT_LOOK=0.05)
        stop = threading.Event()
        self.addCleanup(stop.set)
        self.start(web=self.service(lambda conn: stop.wait(PATIENCE)))
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        conn.shutdown(socket.SHUT_WR)
        self.wait_for_streams(1)
        reset_on_close(conn)
        conn.close()
        self.wait_for_streams(0)

    def half_closed(self, pieces, look=0.02, **limits):
        """A visitor who has sent its FIN, before a service that says each piece only
        when it is asked to: (connection, to ask for a piece, what the service saw)."""
        change(self, server_module, LEFT_LOOK=look, **limits)
        go, seen = queue.Queue(), queue.Queue()

        def handler(conn):
            read_head(conn)
            try:
                for piece in pieces:
                    go.get(timeout=PATIENCE)
                    conn.sendall(piece)
                seen.put(conn.recv(1))
            except OSError as error:
                seen.put(error)

        self.start(web=self.service(handler))
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        self.wait_for_streams(1)
        conn.shutdown(socket.SHUT_WR)
        self.server.until(lambda: any(x.timer for x in self.exchanges()))
        return conn, go, seen

    def test_end_that_comes_before_the_101_goes_on_after_it(self):
        upgrade = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
        go, seen = threading.Event(), queue.Queue()

        def handler(conn):
            read_head(conn)
            go.wait(PATIENCE)
            conn.sendall(upgrade)
            seen.put(b"".join(iter(lambda: conn.recv(100), b"")))
            conn.sendall(b"bye")

        self.start(web=self.service(handler))
        conn = self.visit()
        lines = ["Connection: upgrade", "Upgrade: x"]
        conn.sendall(self.ask("web.tim.x", *lines, close=False) + b"early")
        self.wait_for_streams(1)
        conn.shutdown(socket.SHUT_WR)
        self.server.until(lambda: self.exchanges()[0].connection.eof)
        go.set()
        self.assertEqual(seen.get(timeout=PATIENCE), b"early")
        self.assertTrue(self.raw(b"", conn).endswith(b"\r\n\r\nbye"))

    def test_visitor_who_half_closes_gets_an_answer_that_begins_in_time(self):
        answer = [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate"]
        conn, go, _ = self.half_closed(answer, LEFT_TIME=2 * PATIENCE)
        (exchange,) = self.exchanges()
        due = exchange.timer.due
        self.server.until(lambda: exchange.timer.due > due)  # it was looked at
        go.put(1)
        self.assertTrue(self.raw(b"", conn).endswith(b"late"))

    def test_visitor_who_half_closes_gets_an_answer_that_keeps_flowing(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n"
        conn, go, _ = self.half_closed([head] + 6 * [b"x"], LEFT_TIME=2 * PATIENCE)
        go.put(1)
        read_head(conn)
        for _ in range(6):
            self.server.pass_time(1.5 * PATIENCE)  # all together far more than it has
            (exchange,) = self.exchanges()
            self.server.until(lambda x=exchange: x.quiet_since)
            go.put(1)
            self.assertEqual(conn.recv(1), b"x")

    def test_service_learns_that_its_visitor_has_left(self):
        """Of a long poll, and of an event stream that is silent."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1"
        for pieces in ([], [head]):
            conn, go, seen = self.half_closed(pieces, LEFT_TIME=0.1)
            go.put(1)
            self.assertIsInstance(seen.get(timeout=PATIENCE), ConnectionResetError)
            self.wait_for_streams(0)

    def test_visitor_who_left_goes_first_when_the_client_is_out_of_descriptors(self):
        conn, _, seen = self.half_closed([], LEFT_TIME=2 * PATIENCE)
        loop = self.client.loop
        self.client.until(lambda: len(loop.connections) == 2)  # the service is dialled
        self.client.do(lambda: setattr(loop, "capacity", 2) or True)
        second = self.visit()
        second.sendall(self.ask("web.tim.x"))
        self.assertIsInstance(seen.get(timeout=PATIENCE), ConnectionResetError)
        self.wait_for_streams(1)
        (exchange,) = self.exchanges()
        self.assertFalse(exchange.is_left())

    def test_visitor_who_resets_after_a_101_is_noticed_though_nobody_reads(self):
        change(self, server_module, PIPE_LOOK=0.05)
        stop = threading.Event()
        self.addCleanup(stop.set)

        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
            stop.wait(PATIENCE)

        self.start(web=self.service(handler))
        conn = self.visit()
        lines = ["Connection: upgrade", "Upgrade: x"]
        conn.sendall(self.ask("web.tim.x", *lines, close=False))
        read_head(conn)
        (stream,) = self.tunnels["tim"].link.streams.values()
        conn.setblocking(False)

        def is_stuck():
            with contextlib.suppress(BlockingIOError):
                while True:
                    conn.send(bytes(65536))
            return stream.credit < server_module.LEAST_TURN

        self.server.until(is_stuck)
        reset_on_close(conn)
        conn.close()
        self.wait_for_streams(0)

    def test_stalled_visitor_does_not_stop_others(self):
        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
            for _ in range(1000):
                conn.sendall(b"x" * 100000)

        self.start(web=self.service(handler), echo=self.echo())
        stalled = [self.visit() for _ in range(4)]
        for conn in stalled:
            conn.sendall(self.ask("web.tim.x"))
        for _ in range(20):
            self.echoed("echo.tim.x")
        link = self.server.do(lambda: self.tunnels["tim"].link)
        held, windows = self.server.do(
            lambda: (link.unread, [stream.window for stream in link.streams.values()])
        )
        self.assertLessEqual(held, sum(windows))
        self.assertLess(max(windows), server_module.LARGEST_WINDOW)

    def test_service_that_never_reads_stops_its_visitor_only(self):
        stop = threading.Event()
        self.addCleanup(stop.set)

        def handler(conn):
            stop.wait(PATIENCE)

        change(self, client_module, WIDEN_AFTER=3600)  # its window is what it was
        self.start(web=self.service(handler), echo=self.echo())
        conn = self.visit()
        conn.setblocking(False)
        line = "Content-Length: 900000000"
        conn.send(self.ask("web.tim.x", line, first="PUT / HTTP/1.1"))
        with contextlib.suppress(BlockingIOError):
            while True:
                conn.send(b"x" * 65536)
        for _ in range(20):
            self.echoed("echo.tim.x")
        held = self.client.do(lambda: self.client.program.uplink.tunnel.link.unread)
        self.assertLessEqual(held, client_module.WINDOW)

    def test_dead_kept_stream_is_asked_once_more(self):
        """A service that closes after each answer, without saying so."""

        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        self.start(web=self.service(handler))
        conn = self.keep()
        for _ in range(30):
            self.assertEqual(self.get("web.tim.x", conn=conn).content, b"ok")

    def test_unasked_bytes_after_an_answer_are_not_the_next_answer(self):
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        evil = answer + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
        self.start(web=self.answering(evil))
        said = self.raw(self.ask("web.tim.x", close=False) * 2)
        self.assertNotIn(b"evil", said)

    def test_service_without_dial_answer_is_a_504(self):
        change(self, client_module, DIAL_TIME=0.3)
        status, code, text = self.status(self.deaf_port())
        self.assertEqual((status, code), (504, "timeout"))

    def test_name_that_cannot_be_found_is_a_502(self):
        real = client_module.Resolver.look_up

        def look_up(host, port, flags):
            if "invalid" in host:
                raise socket.gaierror(socket.EAI_NONAME, "no such name")
            return real(host, port, flags)

        change(self, client_module.Resolver, look_up=staticmethod(look_up))
        status, code, text = self.status("no-such-host.invalid:80")
        self.assertEqual((status, code), (502, "refused"))
        self.assertIn("no-such-host.invalid", text)

    def test_target_that_is_no_name_costs_its_request_only(self):
        change(self, client_module, DIAL_TIME=2 * PATIENCE)  # for a slow resolver
        self.start(bad="a..b:80", long="x" * 70 + ":80", web=self.echo())
        for name in ("bad", "long"):
            self.assertEqual(self.get(name + ".tim.x").status, 502)
        self.echoed("web.tim.x")
        self.assertEqual(self.client.program.uplink.failures, 0)

    def test_hanging_target_holds_up_no_other(self):
        half = 2 * PATIENCE  # for each of the target's two addresses
        change(self, client_module, DIALS=2, DIAL_TIME=2 * half)
        self.start(hang=self.deaf_port(), web=self.echo())
        for _ in range(5):
            self.visit().sendall(self.ask("hang.tim.x"))
        tunnel = self.client.program.uplink.tunnel
        self.client.until(lambda: tunnel.link.last_id == 5)
        self.echoed("web.tim.x")
        self.assertEqual(self.dials(), [2, 3])

    def test_endless_interim_answers_are_a_502(self):
        hint = b"HTTP/1.1 103 Early Hints\r\n\r\n"
        self.start(web=self.answering(hint * 1000))
        said = self.raw(self.ask("web.tim.x"))
        self.assertEqual(said.count(b"HTTP/1.1 103"), server_module.INTERIM_LIMIT)
        self.assertIn(b"HTTP/1.1 502", said)

    def test_lost_link_is_told_to_its_visitors_at_once(self):
        def handler(conn):
            first, rest = read_head(conn)
            if b"/begun" in first:
                conn.sendall(b"HTTP/1.1 200 OK\r\n\r\npart")
            conn.recv(100)

        self.start(web=self.service(handler))
        waiting, begun = self.visit(), self.visit()
        waiting.sendall(self.ask("web.tim.x"))
        begun.sendall(self.ask("web.tim.x", first="GET /begun HTTP/1.1"))
        read_head(begun)
        self.wait_for_streams(2)
        self.client.end()
        said = self.raw(b"", waiting)
        self.assertIn(b"HTTP/1.1 502", said)
        self.assertIn(b"X-Tunnel-Error: link-lost", said)
        with self.assertRaises(ConnectionResetError):
            while begun.recv(100):
                pass

    def test_no_descriptors_grow_over_many_requests(self):
        self.start()
        conn = self.keep()
        self.echoed("web.tim.x", conn=conn)
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0
        for number in range(300):
            self.echoed("web.tim.x", conn=conn if number % 2 else None)
        conn.close()
        self.wait_for_streams(0)
        self.client.until(lambda: len(self.client.loop.connections) == 1)
        self.assertEqual(len(self.client.program.uplink.tunnel.link.streams), 0)
        self.server.until(lambda: len(self.server.loop.connections) == 1)
        if os.path.isdir("/proc"):  # the service's threads close theirs later
            self.server.until(lambda: len(os.listdir("/proc/self/fd")) < before + 20)


class Stopping(TunnelCase):
    def stalled(self, start=b"", drain=0.2):
        """A visitor whose answer has begun with `start` and does not go on."""
        stop = threading.Event()
        self.addCleanup(stop.set)

        def handler(conn):
            read_head(conn)
            conn.sendall(start)
            stop.wait(PATIENCE)

        self.start_server(drain=drain)
        self.client = self.start_client({"web": self.service(handler)})
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        self.wait_for_streams(1)
        if start:
            read_head(conn)
        return conn

    def test_client_that_stops_lets_streams_of_an_old_link_end(self):
        change(self, client_module, FIRST_WAIT=PATIENCE)
        go = threading.Event()
        self.addCleanup(go.set)

        def handler(conn):
            read_head(conn)
            go.wait(PATIENCE)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        self.start(web=self.service(handler))
        conn, program = self.visit(), self.client.program
        conn.sendall(self.ask("web.tim.x"))
        self.client.until(lambda: len(self.client.loop.connections) == 2)
        link = self.tunnels["tim"].link
        self.server.do(lambda: link.goodbye("stopping", "for a while") or True)
        self.client.until(lambda: program.uplink.tunnel is None)
        self.client.loop.from_thread(program, program.stop)
        self.client.until(lambda: program.stopping)
        go.set()
        self.assertTrue(self.raw(b"", conn).endswith(b"\r\n\r\nok"))

    def test_request_without_answer_is_told_that_the_server_stops(self):
        conn = self.stalled()
        self.server.loop.from_thread(self.server.loop, self.server.program.stop)
        said = self.raw(b"", conn)
        self.assertIn(b"HTTP/1.1 503", said)
        self.assertIn(b"X-Tunnel-Error: stopping", said)

    def test_answer_cut_by_either_signal_does_not_look_whole(self):
        for call in ("stop", "interrupt"):
            conn = self.stalled(b"HTTP/1.1 200 OK\r\n\r\npart")
            program = self.server.program
            interrupt = lambda: program.on_signal(signal.SIGINT)  # noqa: E731,B023
            action = program.stop if call == "stop" else interrupt
            self.server.loop.from_thread(program, action)
            with self.assertRaises(ConnectionResetError):
                while conn.recv(100):
                    pass

    def test_server_ends_in_time_whatever_its_visitors_do(self):
        """One reads nothing of a large answer, one is in the middle of an upload, one
        in that of a head, one is idle, and one has changed the protocol."""
        self.assertLess(server_module.LAST_WORDS, 1)
        change(self, server_module, LAST_WORDS=2 * PATIENCE)
        upgrade = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"

        def handler(conn):
            head = read_head(conn)[0]
            if b"upgrade" in head:
                conn.sendall(upgrade)
                conn.recv(1)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 90000000\r\n\r\n")
            conn.sendall(bytes(90000000))

        self.start_server(drain=2 * PATIENCE)
        self.client = self.start_client({"web": self.service(handler)})
        asks = [
            self.ask("web.tim.x"),
            self.ask("web.tim.x", "Content-Length: 9", first="POST / HTTP/1.1"),
            b"GET / HTTP",
            b"",
            self.ask("web.tim.x", "Connection: upgrade", "Upgrade: x", close=False),
        ]
        conns = [self.visit() for _ in asks]
        for conn, ask in zip(conns, asks):
            conn.sendall(ask)
        self.wait_for_streams(3)
        read_head(conns[-1])
        self.server.loop.from_thread(self.server.program, self.server.program.stop)
        self.server.until(lambda: self.server.program.visitors.stopping)
        self.server.pass_time(2 * PATIENCE)
        self.server.until(lambda: self.server.program.said_goodbye)
        self.server.loop.from_thread(self.server.loop, self.jump, 2 * PATIENCE)
        self.server.thread.join(PATIENCE)
        self.assertFalse(self.server.thread.is_alive())

    def stop_both(self, drain):
        """Both stop while a request runs; the seconds that each has left then."""
        self.stalled(drain=drain)
        client = self.client.program
        client.config = client.config._replace(drain=drain)
        found = []
        for stage in (self.client, self.server):
            start = stage.do(stage.loop.clock)
            stage.do(lambda: stage.program.stop() or True)  # noqa: B023
            found.append(stage.program.until - start)
        return found

    def test_drain_is_the_time_that_what_runs_has(self):
        for left in self.stop_both(750):
            self.assertTrue(750 <= left < 751, left)

    def test_nothing_that_runs_is_waited_for_when_drain_is_0(self):
        change(self, server_module, LAST_WORDS=PATIENCE)
        client, server = self.stop_both(0)
        self.assertLess(client, 1)
        self.assertTrue(self.server.program.said_goodbye)
        self.client.thread.join(PATIENCE)
        self.assertFalse(self.client.thread.is_alive())
        self.server.loop.from_thread(self.server.loop, self.jump, PATIENCE)
        self.server.thread.join(PATIENCE)
        self.assertFalse(self.server.thread.is_alive())

    def test_id_of_a_client_that_leaves_is_free(self):
        conn = self.stalled(b"HTTP/1.1 200 OK\r\n\r\n", drain=PATIENCE)
        tunnel, program = self.tunnels["tim"], self.client.program
        self.client.do(lambda: program.stop() or True)
        self.server.until(lambda: tunnel.link.draining)
        self.start_client({"web": self.echo("new")}, wait=False)
        self.server.until(lambda: self.tunnels.get("tim") is not tunnel)
        self.server.until(lambda: self.serves("tim", {"web": 1}))
        self.assertEqual(self.echoed("web.tim.x")["service"], "new")
        self.assertEqual(len(tunnel.link.streams), 1)  # what runs may end
        conn.close()

    def jump(self, seconds):
        loop, clock = self.server.loop, self.server.loop.clock
        loop.clock = lambda: clock() + seconds


class Overload(TunnelCase):
    def test_visitor_cut_for_overload_holds_nothing_any_more(self):
        def handler(conn):
            read_head(conn)
            conn.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n"
                b"Upgrade: x\r\n\r\n"
            )
            conn.sendall(b"z" * 50000000)

        change(self, server_module, UNREAD_LIMIT=100 * KIB)
        self.start(web=self.service(handler))
        conn = self.visit()
        lines = ["Connection: upgrade", "Upgrade: x"]
        conn.sendall(self.ask("web.tim.x", *lines, close=False))
        loop = self.server.loop
        self.server.until(lambda: any(" overload: " in x for x in self.log.lines))
        self.server.until(lambda: not any(c.backlog for c in loop.connections))
        self.assertEqual(self.tunnels["tim"].link.unread, 0)


class TCPPorts(TunnelCase):
    def free_ports(self, count):
        """Ports that nobody has, and that nobody who dials is given."""
        ports = set()
        while len(ports) < count:
            ports.add(free_port())
        return sorted(ports)

    def start_tcp(self, count=2, **services):
        """A server with so many ports; a client with these {name: (target, tcp)}."""
        self.ports = self.free_ports(count)
        self.start_server(tcp_ports=self.ports, bind="127.0.0.1")
        return self.publish(**services) if services else None

    def publish(self, id="tim", **services):
        listed = {
            name: {"target": target, "tcp": tcp}
            for name, (target, tcp) in services.items()
        }
        return self.start_client(listed, id, wait=False)

    def url(self, client, name="ssh"):
        client.until(lambda: name in client.program.urls)
        return client.program.urls[name]

    def number(self, client, name="ssh"):
        found = re.fullmatch(r"tcp://127.0.0.1:(\d+)", self.url(client, name))
        self.assertTrue(found, client.program.urls)
        return int(found.group(1))

    def dial(self, number):
        conn = socket.create_connection(("127.0.0.1", number), PATIENCE)
        self.addCleanup(conn.close)
        return conn

    def assert_cut(self, number):
        """A visitor of this port is cut, perhaps before its connect() has returned."""
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(self.dial(number).recv(1), b"")

    def shouting(self):
        """The port of a service that reads to the end, and says it in capitals."""

        def handler(conn):
            conn.sendall(b"hello ")
            data = b"".join(iter(lambda: conn.recv(65536), b""))
            conn.sendall(data.upper())
            conn.shutdown(socket.SHUT_WR)

        return self.service(handler)

    def test_bytes_pass_as_they_are_with_a_half_close_each_way(self):
        number = self.number(self.start_tcp(ssh=(self.shouting(), 0)))
        conn = self.dial(number)
        conn.sendall(b"a\x00b\r\n" * 100000)
        conn.shutdown(socket.SHUT_WR)
        got = b"".join(iter(lambda: conn.recv(65536), b""))
        self.assertEqual(got, b"hello " + b"A\x00B\r\n" * 100000)
        self.assertNotIn(b"ssh", self.get("tim.localhost").content)  # no web page

    def test_wanted_port_is_given_and_two_claims_are_told_apart(self):
        self.start_tcp(2)
        one, two = self.ports
        tim = self.publish("tim", ssh=(self.shouting(), two))
        self.assertEqual(self.number(tim), two)
        eva = self.publish("eva", ssh=(self.shouting(), two))
        self.assertEqual(self.url(eva), "error: port %d belongs to tim ssh" % two)
        other = self.publish("pia", ssh=(self.shouting(), max(self.ports) + 1))
        self.assertIn("not among --tcp-ports", self.url(other))

    def test_port_goes_with_its_link_and_is_the_same_when_it_is_back(self):
        tim = self.start_tcp(3, web=(1, 0), ssh=(self.shouting(), 0))
        before = self.number(tim)
        tim.program.loop.from_thread(tim.loop, tim.program.stop)
        self.server.until(lambda: not self.server.program.tcp.open)
        with self.assertRaises(OSError):
            self.dial(before)
        again = self.publish(ssh=(self.shouting(), 0))
        self.assertEqual(self.number(again), before)
        self.dial(before)

    def test_port_closes_when_the_list_no_longer_has_it(self):
        tim = self.start_tcp(2, ssh=(self.shouting(), 0), db=(self.shouting(), 0))
        ssh, db = self.number(tim), self.number(tim, "db")
        listed = {"db": client_module.parse_service({"target": 1, "tcp": db})}

        def change_list():
            tim.program.services = listed
            tim.program.uplink.tunnel.publish()
            return True

        tim.do(change_list)
        ports = self.server.program.tcp.open
        self.server.until(lambda: list(ports) == [db])
        with self.assertRaises(OSError):
            self.dial(ssh)

    def test_service_without_a_port_is_not_published(self):
        self.start_server()
        tim = self.publish(ssh=(self.shouting(), 0))
        self.assertIn("--tcp-ports", self.url(tim))
        self.assertEqual(self.get("ssh.tim.localhost").status, 404)
        said = [line for line in self.log.lines if "does not serve ssh: " in line]
        self.assertIn("--tcp-ports", "".join(said))

    def test_all_ports_taken_and_a_port_of_another_program(self):
        self.start_tcp(2)
        with socket.socket() as other:
            other.bind(("127.0.0.1", self.ports[0]))
            other.listen(1)
            tim = self.publish("tim", ssh=(1, 0), db=(1, 0))
            urls = sorted((self.url(tim), self.url(tim, "db")))
            self.assertIn("all of --tcp-ports are taken", urls[0])
            self.assertIn(":%d" % self.ports[1], urls[1])
            eva = self.publish("eva", ssh=(1, self.ports[0]))
            self.assertIn("in use", self.url(eva))

    def test_target_that_refuses_cuts_its_visitor_and_no_other(self):
        dead = self.free_ports(1)[0]
        client = self.start_tcp(2, ssh=(dead, 0), db=(self.shouting(), 0))
        other = self.dial(self.number(client, "db"))
        self.assert_cut(self.number(client))
        self.assertEqual(other.recv(6), b"hello ")

    def test_visitor_of_a_full_link_is_cut_and_the_port_stays(self):
        change(self, server_module, MAX_STREAMS=0)
        number = self.number(self.start_tcp(1, ssh=(self.shouting(), 0)))
        for _ in range(2):
            self.assert_cut(number)

    def test_stopping_server_closes_its_ports_and_opens_none(self):
        tim = self.start_tcp(2, ssh=(self.shouting(), 0))
        self.server.program.drain_time = PATIENCE
        number, program = self.number(tim), self.server.program
        self.start_client({"web": self.echo()}, "eva")
        conn = self.visit()  # its request does not end, so the server waits
        post = self.ask("web.eva.x", "Content-Length: 9", first="POST / HTTP/1.1")
        conn.sendall(post)
        self.server.until(lambda: self.exchanges())
        capacity = self.server.loop.capacity
        self.server.do(lambda: program.stop() or True)
        with self.assertRaises(OSError):
            self.dial(number)
        self.assertEqual(self.server.loop.capacity, capacity + 1)
        tim.do(lambda: tim.program.uplink.tunnel.publish() or True)
        pools = program.registry.pools
        self.server.until(lambda: not pools["tim"].services)
        self.assertEqual(program.tcp.open, {})

    def test_ports_named_in_a_list_are_opened_before_any_free_one(self):
        self.start_tcp(2)
        named = self.ports[0]
        tim = self.publish(any=(1, 0), named=(1, named))
        self.assertEqual(self.number(tim, "named"), named)
        self.assertEqual(self.number(tim, "any"), self.ports[1])

    def fake_ports(self, count, opens):
        """TCPPorts without sockets, with the numbers that were tried."""
        tried = []

        def listen(bind, number):
            tried.append(number)
            if not opens:
                raise OSError(errno.EADDRINUSE, "in use")
            sock = socket.socket()
            self.addCleanup(sock.close)
            sock.bind(("127.0.0.1", 0))
            return sock

        change(self, server_module, listen=listen)
        loop = fake_loop(server_module)
        self.addCleanup(loop.close)
        visitors = server_module.Visitors(loop)
        return server_module.TCPPorts(visitors, None, range(1, count + 1)), tried

    def service_of(self, name, tcp=0):
        pool = server_module.Pool("tim", None)
        return server_module.Service(pool, name, {"tcp": tcp})

    def test_ports_of_other_programs_are_tried_seldom(self):
        ports, tried = self.fake_ports(100, opens=False)
        for _ in range(20):
            with self.assertRaisesRegex(ValueError, "all of --tcp-ports"):
                ports.give(self.service_of("ssh"))
        self.assertEqual(sorted(tried), list(range(1, 101)))
        ports.loop.clock.now += server_module.TRY_AGAIN
        with self.assertRaises(ValueError):
            ports.give(self.service_of("ssh"))
        self.assertEqual(len(tried), 100 + server_module.TRIES)

    def test_ports_leave_descriptors_for_visitors(self):
        ports, _ = self.fake_ports(100, opens=True)
        ports.loop.capacity = 20
        with self.assertRaisesRegex(ValueError, "no descriptors"):
            for number in range(20):
                ports.give(self.service_of("s%d" % number))
        self.assertEqual((len(ports.open), ports.loop.capacity), (4, 16))
        ports.close_unused()
        self.assertEqual((len(ports.open), ports.loop.capacity), (0, 20))

    def test_one_id_has_so_many_ports_and_no_more(self):
        change(self, server_module, TCP_LIMIT=1)
        tim = self.start_tcp(2, ssh=(1, 0), db=(1, 0))
        urls = sorted((self.url(tim), self.url(tim, "db")))
        self.assertIn("at most 1 ports", urls[0])
        self.assertIn("tcp://", urls[1])

    def test_option_that_the_server_does_not_know_is_not_published(self):
        self.start_server()
        client = self.start_client({"web": self.echo()})
        tunnel = client.program.uplink.tunnel
        listed = dict(client.program.services)
        listed["ssh"] = client_module.parse_service({"target": 22, "tcp": 0})
        sent = []

        def publish():
            tunnel.known, client.program.services = ["other"], listed
            tunnel.link.send = lambda kind, message: sent.append(message)
            tunnel.publish()
            return True

        client.do(publish)
        self.assertEqual([sorted(message) for message in sent], [["web"]])
        said = "ssh: not published: this server does not know the option tcp"
        self.assertTrue(any(said in line for line in self.log.lines))


class Hooks(TunnelCase):
    def start_router(self, router):
        self.start_server(router=router)
        self.start_client({"web": self.echo("web"), "api": self.echo("api")})

    def test_one_function_can_route_by_what_it_likes(self):
        class ByPath(server_module.Router):
            def route(self, request):
                if request.target.startswith("/api/"):
                    return "tim", "api"
                return super().route(request)

        self.start_router(ByPath())
        conn = self.keep()
        self.assertEqual(self.echoed("a.b", "/api/x", conn=conn)["service"], "api")
        self.assertEqual(self.echoed("web.tim.b", "/x", conn=conn)["service"], "web")

    def test_route_may_look_at_host_and_fields(self):
        class Fixed(server_module.Router):
            def route(self, request):
                if request.host == "my.host:81":
                    return "tim", request.headers.get("x-service")
                return None

        self.start_router(Fixed())
        found = self.echoed("my.host:81", headers={"X-Service": "api"})
        self.assertEqual(found["service"], "api")
        self.assertEqual(self.get("my.host:81").status, 200)
        self.assertEqual(self.get("other", "/x").status, 404)

    def test_authorize_is_asked_for_every_page_and_on_kept_connections(self):
        class Password(server_module.Router):
            def authorize(self, request):
                if request.headers.get("Authorization") != "Basic dDp0":
                    return 401, {"WWW-Authenticate": "Basic"}

                request.fields = [
                    pair for pair in request.fields if pair[0] != "Authorization"
                ]

        self.start_router(Password())
        conn = self.keep()
        headers = {"Authorization": "Basic dDp0"}
        for host in ("web.tim.x", "tim.x", "localhost", "nobody.x"):
            answer = self.get(host, conn=conn)
            self.assertEqual(answer.status, 401)
            self.assertEqual(answer.headers["WWW-Authenticate"], "Basic")
        found = self.echoed("web.tim.x", conn=conn, headers=headers)
        self.assertNotIn("Authorization", dict(found["headers"]))
        self.assertEqual(self.get("web.tim.x", conn=conn).status, 401)

    def test_hook_that_raises_costs_its_request_a_500(self):
        class Broken(server_module.Router):
            def route(self, request):
                if request.target == "/broken":
                    raise KeyError("oops")
                return super().route(request)

        self.start_router(Broken())
        conn = self.keep()
        self.assertEqual(self.get("web.tim.x", "/broken", conn=conn).status, 500)
        sock = conn.sock
        self.echoed("web.tim.x", conn=conn)
        self.assertIs(conn.sock, sock)
        self.assertIn("oops", "\n".join(self.log.lines))
        self.log.lines.clear()

    def test_hook_that_adds_what_no_head_can_hold_leaves_no_stream(self):
        class Broken(server_module.Router):
            def route(self, request):
                if request.target == "/broken":
                    request.fields.append(("X-User", "\u0141ukasz"))
                return super().route(request)

        self.start_router(Broken())
        conn = self.keep()
        self.echoed("web.tim.x", conn=conn)
        self.assertEqual(self.get("web.tim.x", "/broken", conn=conn).status, 500)
        conn.close()
        link = self.tunnels["tim"].link
        self.server.until(lambda: not link.streams)
        self.log.lines.clear()

    def test_hook_that_answers_nonsense_costs_its_request_a_500(self):
        for nonsense in (7, ("a",), (401, {"X": "a\r\nb"})):

            class Broken(server_module.Router):
                answer = nonsense

                def authorize(self, request):
                    return self.answer

            self.start_router(Broken())
            self.assertEqual(self.get("web.tim.x").status, 500, nonsense)
            self.log.lines.clear()


class Logins(TunnelCase):
    def hello(self, version="mdm-tunnel/1", upgrade=True):
        conn = self.dial()
        lines = ["Connection: Upgrade", "Upgrade: " + version] if upgrade else []
        first = "GET /.well-known/mdm-tunnel HTTP/1.1"
        conn.sendall(self.ask("localhost:1", *lines, first=first, close=False))
        return conn

    def log_in(self, id="tim", session="s", services=b"{}"):
        """A hand-made client, logged in with no services; frames follow."""
        conn = self.hello()
        self.rest = read_head(conn)[1]
        login = json.dumps({"id": id, "session": session}).encode()
        conn.sendall(frame(Kind.LOGIN, 0, login))
        if services:
            conn.sendall(frame(Kind.SERVICES, 0, services))
        return conn

    def frames(self, conn, until):
        """The frames that come, up to one of the kind `until`, or to the end."""
        reader = server_module.FrameReader("server")
        found, data = [], self.rest
        while True:
            reader.push(memoryview(data))
            for kind, stream, payload in iter(reader.next, None):
                found.append((kind, stream, bytes(payload)))
                if kind == until:
                    return found
            try:
                data = conn.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return found

    def test_hand_made_client_is_greeted_as_the_protocol_says(self):
        self.start_server()
        found = self.frames(self.log_in(), Kind.URLS)
        kinds = [kind for kind, _, _ in found]
        self.assertEqual(kinds, [Kind.CHALLENGE, Kind.WELCOME, Kind.URLS])

    def test_name_in_two_spellings_is_published_once(self):
        self.start_server()
        link = self.log_in(services=b'{"Ssh": {"tcp": 0}, "ssh": {"tcp": 0}}')
        urls = json.loads(self.frames(link, Kind.URLS)[-1][2].decode())
        self.assertIn("--tcp-ports", urls["Ssh"])
        self.assertIn("twice", urls["ssh"])

    def test_wrong_version_is_told_the_right_one(self):
        self.start_server()
        first, _ = read_head(self.hello("mdm-tunnel/9"))
        self.assertTrue(first.startswith(b"HTTP/1.1 426"))
        self.assertIn(b"Upgrade: mdm-tunnel/1", first)

    def test_request_without_upgrade_is_told_that_a_proxy_dropped_it(self):
        self.start_server()
        first, rest = read_head(self.hello(upgrade=False))
        self.assertTrue(first.startswith(b"HTTP/1.1 426"))
        self.assertIn(b"proxy", rest)

    def test_visitor_on_the_client_port_is_told_so(self):
        self.start_server()
        said = self.raw(self.ask("web.tim.x"), self.dial())
        self.assertIn(b"X-Tunnel-Error: client-port", said)

    def test_link_path_on_the_visitors_port_is_like_any_other(self):
        self.start()
        found = self.echoed("web.tim.x", "/.well-known/mdm-tunnel")
        self.assertEqual(found["service"], "web")

    def test_silent_login_ends_after_its_time(self):
        change(self, server_module, LOGIN_TIME=2 * PATIENCE)
        self.start_server()
        conn = self.hello()
        self.rest = read_head(conn)[1]
        self.frames(conn, Kind.CHALLENGE)
        self.server.pass_time(server_module.LOGIN_TIME)
        self.rest = b""
        self.assertEqual(self.frames(conn, None), [])

    def test_bad_logins_are_refused(self):
        self.start_server()
        for id in ("", "a.b", "a--b", "x" * 64, "LocalHost"):
            conn = self.log_in(id)
            kind, _, payload = self.frames(conn, Kind.GOODBYE)[-1]
            self.assertEqual(kind, Kind.GOODBYE)
            self.assertEqual(json.loads(payload.decode())["code"], "refused")

    def test_id_belongs_to_the_session_that_has_it(self):
        change(self, client_module, TAKEN_TIME=0.2)
        self.start()
        rival = self.start_client({"web": 1}, wait=False, max_attempts=1)
        rival.until(lambda: rival.error)
        self.assertEqual(rival.error.status, 3)
        self.assertIn("taken", str(rival.error))
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_id_of_a_dead_owner_goes_to_the_newcomer(self):
        change(self, server_module, TAKEOVER=0.2)
        self.start_server()
        silent = self.log_in()
        self.frames(silent, Kind.URLS)
        self.start_client({"web": self.echo()})
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_login_for_an_id_that_is_taken_is_answered_at_once(self):
        change(self, server_module, TAKEOVER=2 * PATIENCE)
        self.start_server()
        owner = self.log_in()
        self.frames(owner, Kind.URLS)
        rival = self.log_in(session="rival", services=None)
        payload = self.frames(rival, Kind.GOODBYE)[-1][2]
        self.assertEqual(json.loads(payload.decode())["code"], "taken")
        self.rest = b""
        self.assertEqual(self.frames(owner, Kind.PING)[-1][0], Kind.PING)

    def test_owner_who_shows_that_it_lives_keeps_its_id(self):
        change(self, server_module, TAKEOVER=2 * PATIENCE)
        self.start_server()
        owner = self.log_in()
        self.frames(owner, Kind.URLS)
        self.log_in(session="rival", services=None)
        self.rest = b""
        ping = self.frames(owner, Kind.PING)[-1][2]
        owner.sendall(frame(Kind.PONG, 0, ping))
        tunnel = self.tunnels["tim"]
        self.server.until(lambda: tunnel.link.heard > tunnel.asked_at)
        self.server.pass_time(server_module.TAKEOVER)
        self.server.until(lambda: tunnel.life_timer.due is None)
        self.assertIs(self.tunnels["tim"], tunnel)

    def test_login_without_services_ends_after_its_time(self):
        change(self, server_module, LOGIN_TIME=2 * PATIENCE)
        self.start_server()
        conn = self.hello()
        self.rest = read_head(conn)[1]
        conn.sendall(frame(Kind.LOGIN, 0, b'{"id":"tim","session":"s"}'))
        self.assertEqual(self.frames(conn, Kind.WELCOME)[-1][0], Kind.WELCOME)
        self.server.pass_time(server_module.LOGIN_TIME)
        self.rest = b""
        self.assertEqual(self.frames(conn, None), [])
        self.assertEqual(self.tunnels, {})

    def test_any_label_is_a_name_for_a_service(self):
        self.start_server()
        self.start_client({"kind": self.echo("kind"), "self": self.echo("self")})
        for name in ("kind", "self"):
            self.assertEqual(self.echoed(name + ".tim.x")["service"], name)

    def test_services_by_the_thousand_work(self):
        services = {"a-quite-long-name-%d" % number: 9 for number in range(1200)}
        services["web"] = self.echo()
        self.start(**services)
        self.client.until(lambda: self.client.program.urls)
        self.echoed("web.tim.x")
        self.assertEqual(self.client.program.uplink.failures, 0)

    def test_answers_that_are_no_tunnel_end_the_first_dial(self):
        location = b"HTTP/1.1 302 Found\r\nLocation: http://login.test/\x1b[2J\r\n\r\n"
        table = [
            (b"HTTP/1.0 404 No\r\n\r\n", "those of the server"),
            (b"HTTP/1.0 404 No\r\nX-Tunnel-Error: no-name\r\n\r\n", "--client-port"),
            (b"HTTP/1.1 \xb2 X\r\n\r\n", "no mdm-tunnel server"),
            (b"HTTP/1.1 200 OK\r\n\r\n<html>", "in the browser"),
            (location, "http://login.test/"),
            (b"HTTP/1.1 407 Auth\r\n\r\n", "a proxy in between wants a password"),
            (b"HTTP/1.1 500 Oops\r\n\r\n", "500"),
        ]
        for answer, likely in table:
            port = self.answering(answer)
            client = self.start_client({"web": 1}, port=port, wait=False)
            client.until(lambda client=client: client.error)
            self.assertEqual(client.error.status, 1)
            self.assertIn(likely, str(client.error))

    def test_front_that_starts_first_is_tried_again(self):
        """So are garbage and silence; whoever comes up behind it is found."""
        self.start_server()
        real = self.server.program.client_address[:2]
        starts = [b"HTTP/1.1 %d Wait\r\n\r\n" % code for code in (429, 502, 503, 504)]
        starts += [b"garbage\r\n\r\n", b""]
        change(self, client_module, FIRST_WAIT=0.01, LONGEST_WAIT=0.02)

        def handler(conn):
            if starts:
                read_head(conn)
                conn.sendall(starts.pop(0))
                return
            with socket.create_connection(real) as onward:
                self.relay(conn, onward)

        self.start_client({"web": self.echo()}, port=self.service(handler))
        self.assertEqual(starts, [])
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_same_session_replaces_its_old_link(self):
        self.start_server()
        old = self.log_in(session="mine")
        self.frames(old, Kind.URLS)
        new = self.log_in(session="mine")
        self.frames(new, Kind.URLS)
        self.rest = b""
        self.frames(old, None)  # it ends
        tunnel = self.server.do(lambda: self.tunnels["tim"].link.closed)
        self.assertFalse(tunnel)

    def test_end_of_an_old_link_does_not_remove_the_newer_one(self):
        self.start_server()
        old, new = self.log_in(session="mine"), self.log_in(session="mine")
        self.frames(new, Kind.URLS)
        old.close()
        self.rest = b""
        new.sendall(frame(Kind.PING, 0, b"12345678"))
        self.frames(new, Kind.PONG)
        self.assertIn("tim", self.tunnels)

    def test_too_many_strangers_cost_one_of_them(self):
        change(self, server_module, UNAUTHENTICATED=5)
        self.start()
        conns = [self.dial() for _ in range(20)]
        self.server.until(lambda: len(self.unauthenticated()) == 5)
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        self.assertEqual(len(conns), 20)

    def test_login_does_not_evict_itself(self):
        change(self, server_module, UNAUTHENTICATED=1)
        self.start_server()
        for _ in range(10):
            conn = self.log_in(session="mine")
            self.assertEqual(self.frames(conn, Kind.URLS)[-1][0], Kind.URLS)

    def test_first_answer_that_is_no_tunnel_ends_the_client(self):
        self.start_server()
        port = self.echo()
        client = self.start_client({"web": 1}, port=port, wait=False)
        client.until(lambda: client.error)
        self.assertEqual(client.error.status, 1)
        self.assertIn("200", str(client.error))

    def test_visitors_port_instead_of_clients_is_explained(self):
        self.start_server()
        port = self.server.program.visitor_address[1]
        client = self.start_client({"web": 1}, port=port, wait=False)
        client.until(lambda: client.error)
        self.assertIn("--client-port", str(client.error))


class Connects(TunnelCase):
    """CONNECT reaches the service that the name says."""

    shouting, publish = TCPPorts.shouting, TCPPorts.publish
    hello, log_in, frames = Logins.hello, Logins.log_in, Logins.frames
    CONNECTED = b"HTTP/1.1 200 Connection established\r\n\r\n"

    def start_ssh(self, **services):
        self.start_server()
        services = services or {"ssh": (self.shouting(), True)}
        client = self.publish(**services)
        pools = self.server.program.registry.pools
        self.server.until(lambda: "tim" in pools and pools["tim"].services)
        return client

    def ask_for(self, name, *lines, version="1.1"):
        first = "CONNECT %s HTTP/%s" % (name, version)
        return "\r\n".join([first, "Host: " + name, *lines, "", ""]).encode()

    def connect_to(self, name, *lines, early=b"", **options):
        """A connection on which that was asked, and the head of what was said."""
        conn = self.visit()
        conn.sendall(self.ask_for(name, *lines, **options) + early)
        first, rest = read_head(conn)
        return conn, first, rest

    def refusal(self, *arguments, **options):
        """The status and X-Tunnel-Error of an answer that is no 200."""
        _, first, _ = self.connect_to(*arguments, **options)
        word = re.search(rb"X-Tunnel-Error: ([a-z-]+)", first)
        return int(first.split()[1]), word.group(1).decode() if word else ""

    def test_bytes_pass_as_they_are_with_a_half_close_each_way(self):
        self.start_ssh()
        conn, first, rest = self.connect_to("ssh.tim.x:22", early=b"a\x00b\r\n")
        self.assertEqual(first + b"\r\n\r\n", self.CONNECTED)
        conn.sendall(b"more" * 100000)
        conn.shutdown(socket.SHUT_WR)
        got = rest + b"".join(iter(lambda: conn.recv(65536), b""))
        self.assertEqual(got, b"hello " + b"A\x00B\r\n" + b"MORE" * 100000)
        self.assertFalse(self.server.program.visitors.all)

    def test_it_is_spoken_as_nc_does_and_the_port_is_any(self):
        self.start_ssh()
        conn = self.visit()
        conn.sendall(b"CONNECT ssh--tim.example.com:1 HTTP/1.0\r\n\r\n")
        conn.shutdown(socket.SHUT_WR)  # everything is said already
        said = b"".join(iter(lambda: conn.recv(65536), b""))
        self.assertEqual(said, self.CONNECTED + b"hello ")

    def test_port_of_its_own_is_reached_by_name_too(self):
        ports = TCPPorts.free_ports(self, 1)
        self.start_server(tcp_ports=ports, bind="127.0.0.1")
        self.publish(ssh=(self.shouting(), ports[0]))
        self.server.until(lambda: self.server.program.tcp.open)
        _, first, _ = self.connect_to("ssh.tim.x:22")
        self.assertIn(b" 200 ", first)

    def test_only_services_with_tcp_are_reached(self):
        self.start_ssh(ssh=(self.shouting(), True))
        self.start_client({"web": self.echo()}, "eva")
        self.assertEqual(self.refusal("web.eva.x:80"), (403, "denied"))
        self.assertEqual(self.refusal("www.example.com:443"), (404, "no-name"))
        self.assertEqual(self.refusal("127.0.0.1:22"), (404, "no-name"))
        self.assertEqual(self.refusal("localhost:22"), (404, "no-name"))
        self.assertEqual(self.refusal("tim.x:22"), (404, "no-page"))
        self.assertEqual(self.refusal("db.tim.x:22"), (404, "no-service"))

    def test_no_service_is_reached_through_the_clients_port(self):
        self.start_ssh()
        with socket.create_connection(self.server.program.client_address[:2]) as conn:
            conn.settimeout(PATIENCE)
            conn.sendall(self.ask_for("ssh.tim.x:22"))
            self.assertIn(b" 404 ", read_head(conn)[0])

    def test_body_is_refused_and_what_follows_is_not_read(self):
        self.start_ssh()
        said = self.refusal("ssh.tim.x:22", "Content-Length: 5", early=b"12345")
        self.assertEqual(said, (400, "malformed"))
        said = self.refusal("ssh.tim.x:22", "Transfer-Encoding: chunked")
        self.assertEqual(said, (400, "malformed"))

    def test_cause_is_told_when_the_target_does_not_connect(self):
        self.start_ssh(ssh=(TCPPorts.free_ports(self, 1)[0], True))
        self.assertEqual(self.refusal("ssh.tim.x:22"), (502, "refused"))

    def test_silent_target_is_a_504_and_until_then_nothing_is_said(self):
        change(self, client_module, DIAL_TIME=0.3)
        self.start_ssh(ssh=(self.deaf_port(), True))
        self.assertEqual(self.refusal("ssh.tim.x:22"), (504, "timeout"))

    def test_kept_connection_may_ask_for_a_page_and_then_connect(self):
        self.start_ssh()
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x", close=False) + self.ask_for("ssh.tim.x:22"))
        first, rest = read_head(conn)
        self.assertIn(b" 404 ", first)
        while self.CONNECTED not in rest:
            rest += conn.recv(65536)

    def test_visitor_who_leaves_meanwhile_ends_the_dial(self):
        change(self, client_module, DIAL_TIME=PATIENCE)
        client = self.start_ssh(ssh=(self.deaf_port(), True))
        conn = self.visit()
        conn.sendall(self.ask_for("ssh.tim.x:22"))
        tunnel = client.program.uplink.tunnel
        client.until(lambda: tunnel.link.streams)
        reset_on_close(conn)
        conn.close()
        client.until(lambda: not tunnel.link.streams)
        self.server.until(lambda: not self.server.program.visitors.all)

    def test_client_that_never_answers_costs_no_connection_for_ever(self):
        change(self, server_module, CONNECT_TIME=PATIENCE)
        for ending in ("end", "reset", "flood"):
            _, conn, _ = self.ask_a_hand_made_client("c-" + ending)
            if ending == "flood":  # more than is read ahead
                with contextlib.suppress(OSError):
                    conn.sendall(b"x" * 400000)
            if ending != "end":
                reset_on_close(conn)
            conn.close()
        self.server.pass_time(server_module.CONNECT_TIME)
        self.server.until(lambda: not self.server.program.visitors.all)

    def test_visitor_who_waits_for_a_client_is_told_in_the_end(self):
        change(self, server_module, CONNECT_TIME=PATIENCE)
        _, conn, _ = self.ask_a_hand_made_client("tim")
        self.server.pass_time(server_module.CONNECT_TIME)
        self.assertIn(b" 504 ", read_head(conn)[0])

    def test_visitor_who_left_makes_room_for_others(self):
        _, conn, _ = self.ask_a_hand_made_client("tim")
        conn.shutdown(socket.SHUT_WR)
        visitors = self.server.program.visitors
        self.server.until(lambda: visitors.idle)
        self.assertTrue(self.server.do(visitors.make_room))
        self.assertFalse(visitors.all)
        self.assertEqual(conn.recv(1), b"")

    def test_nothing_behind_a_connect_that_failed_is_a_request(self):
        self.start_ssh(ssh=(TCPPorts.free_ports(self, 1)[0], True))
        self.start_client({"web": self.echo()}, "eva")
        outcomes = []
        self.server.program.visitors.observers.append(outcomes.append)
        for name in ("ssh.tim.x:22", "web.eva.x:22", "no.tim.x:22"):
            conn = self.visit()
            conn.sendall(self.ask_for(name) + self.ask("web.eva.x"))
            said = self.raw(b"", conn)
            self.assertEqual(said.count(b"HTTP/1.1 "), 1, said)
        self.assertEqual(len(outcomes), 3)

    def test_visitors_of_other_networks_are_refused(self):
        self.start_server()
        options = {"target": self.shouting(), "tcp": True, "visitors": ["192.0.2.0/24"]}
        self.start_client({"ssh": options}, "tim")
        self.assertEqual(self.refusal("ssh.tim.x:22"), (403, "denied"))

    def test_router_is_asked_as_for_any_request(self):
        asked = []

        class Router(server_module.Router):
            def route(self, request):
                asked.append((request.method, request.target, request.name))
                return "tim", "ssh"

            def authorize(self, request):
                return None if "pass" in request.headers else (407, {})

        self.start_server(router=Router())
        self.publish(ssh=(self.shouting(), True))
        services = self.server.program.registry.service
        self.server.until(lambda: services("tim", "ssh"))
        self.assertEqual(self.refusal("any.thing:7"), (407, "denied"))
        _, first, _ = self.connect_to("any.thing:7", "Pass: yes")
        self.assertIn(b" 200 ", first)
        self.assertEqual(asked, [("CONNECT", "any.thing:7", "any.thing")] * 2)

    def test_address_is_told_of_a_service_without_a_port(self):
        client = self.start_ssh()
        client.until(lambda: "ssh" in client.program.urls)
        port = self.server.program.visitor_address[1]
        self.assertEqual(
            client.program.urls["ssh"],
            "tcp://ssh.tim.localhost by CONNECT to http://127.0.0.1:%d/" % port,
        )

    def test_client_that_speaks_before_it_is_connected_breaks_the_rules(self):
        for kind, payload in ((Kind.DATA, b"SSH-2.0"), (Kind.END, b"")):
            link, conn, _ = self.ask_a_hand_made_client("b%d" % kind)
            link.sendall(frame(kind, 1, payload))
            self.assertIn(b" 502 ", read_head(conn)[0])

    def ask_a_hand_made_client(self, id, options=b'{"tcp": true}'):
        """A client's link, a visitor who asked for its ssh, and the OPEN that came."""
        if not hasattr(self, "server"):
            self.start_server()
        self.rest, services = b"", b'{"ssh": %s}' % options
        link = self.log_in(id, services=services)
        self.frames(link, Kind.URLS)
        conn, self.rest = self.visit(), b""
        conn.sendall(self.ask_for("ssh.%s.x:22" % id))
        opened = json.loads(self.frames(link, Kind.OPEN)[-1][2].decode())
        return link, conn, opened

    def test_client_is_asked_to_confirm_and_its_word_is_the_200(self):
        link, conn, opened = self.ask_a_hand_made_client("tim")
        self.assertIs(opened["confirm"], True)
        link.sendall(frame(Kind.CONNECTED, 1) + frame(Kind.DATA, 1, b"SSH-2.0"))
        first, rest = read_head(conn)
        self.assertIn(b" 200 ", first)
        self.assertEqual(rest or conn.recv(100), b"SSH-2.0")

    def test_link_that_goes_meanwhile_is_a_502(self):
        link, conn, _ = self.ask_a_hand_made_client("tim")
        link.close()
        self.assertIn(b" 502 ", read_head(conn)[0])

    def test_confirmation_that_nobody_asked_for_costs_the_link(self):
        link, conn, _ = self.ask_a_hand_made_client("tim")
        link.sendall(2 * frame(Kind.CONNECTED, 1))
        self.rest = b""
        kind, _, payload = self.frames(link, Kind.GOODBYE)[-1]
        self.assertEqual(kind, Kind.GOODBYE)
        self.assertIn(b"nobody asked", payload)


class Notes(TunnelCase):
    """How requests end is told to the client that asked, in the server's words."""

    def start(self, **services):
        self.start_server()
        self.client = self.start_client(services or {"web": self.echo()})
        self.notes = self.listen_to(self.client, self.server)

    def listen_to(self, client, server):
        """Both sides' outcomes from here on, as the client's list of pairs."""
        told, seen = [], []
        self.seen = seen
        client.program.observers.append(told.append)
        server.program.visitors.observers.append(seen.append)
        return told

    def wait(self, count):
        """The client's outcomes, when there are so many."""
        self.client.until(lambda: len(self.notes) >= count)
        self.assertEqual(len(self.notes), count, self.notes)
        return self.notes

    def test_client_is_told_what_the_server_logs(self):
        self.start(web=self.echo(), no=self.closed_port())
        conn = self.keep()
        self.get("web.tim.x", "/one?a=b", conn=conn)
        self.get("web.tim.x", "/two", "POST", b"12345", conn=conn)
        self.get("no.tim.x", "/three")
        self.get("no-such.tim.x", "/four")
        one, two, three = self.wait(3)  # what was for no service is not the client's
        for outcome, said in zip(self.seen, self.notes):
            said = said._replace(id="tim", seconds=outcome.seconds, link=outcome.link)
            self.assertEqual(said, outcome._replace(seconds=said.seconds))
        self.assertEqual(one[:6], ("127.0.0.1", "", "web", "GET", "/one?a=b", 200))
        self.assertEqual((two.method, two.received), ("POST", 5))
        self.assertEqual((three.status, three.code), (502, "refused"))
        self.assertIn("refused the connection", three.cause)

    def closed_port(self):
        with contextlib.closing(socket.socket()) as sock:
            sock.bind(("127.0.0.1", 0))
            return sock.getsockname()[1]

    def test_ranges_cut_the_bytes_of_a_stream_into_its_requests(self):
        carried = {}

        def tap(stream, way, data):
            carried[stream.id, way] = carried.get((stream.id, way), b"") + bytes(data)

        answers = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n"
        answers += b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", b""

        def handler(conn):
            while read_head(conn)[0]:
                conn.sendall(b"".join(answers))

        self.start(web=self.service(handler))
        frames = {Kind.DATA: self.tapping(tap)}
        with mock.patch.dict(client_module.STREAM_FRAMES, frames):
            with mock.patch.object(client_module.Pipe, "pull", self.pulling(tap)):
                conn = self.visit()
                for path in (b"/a", b"/bb"):
                    conn.sendall(b"GET %s HTTP/1.1\r\nHost: web.tim.x\r\n\r\n" % path)
                    self.read_chunks(conn)
                notes = self.wait(2)
        self.assertEqual(notes[0].stream, notes[1].stream)
        for note, path in zip(notes, (b"/a", b"/bb")):
            request = carried[note.stream, "in"][slice(*note.request)]
            self.assertTrue(request.startswith(b"GET %s HTTP/1.1" % path), request)
            self.assertTrue(request.endswith(b"\r\n\r\n"), request)
            answer = carried[note.stream, "out"][slice(*note.answer)]
            self.assertEqual(answer, b"".join(answers))

    def tapping(self, tap):
        real = client_module.Link.on_data

        def on_data(link, stream, payload):
            tap(stream, "in", payload)
            return real(link, stream, payload)

        return on_data

    def pulling(self, tap):
        real = client_module.Pipe.pull

        def pull(pipe, view):
            count = real(pipe, view)
            tap(pipe.stream, "out", view[: count or 0])
            return count

        return pull

    def read_chunks(self, conn):
        said = b""
        while not said.endswith(b"0\r\n\r\n"):
            said += conn.recv(65536)

    def test_pipes_are_told_when_they_end(self):
        def shout(conn):
            for data in iter(lambda: conn.recv(100), b""):
                conn.sendall(data.upper())

        def upgrade(conn):
            rest = read_head(conn)[1]
            conn.sendall(b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: y\r\n\r\n")
            conn.sendall(b"!!" + rest)
            shout(conn)

        number = free_port()
        self.start_server(tcp_ports=range(number, number + 1))
        services = {"chat": self.service(upgrade)}
        services["ssh"] = {"target": self.service(shout), "tcp": number}
        self.client = self.start_client(services)
        self.notes = self.listen_to(self.client, self.server)
        conn = self.visit()
        lines = "Connection: upgrade", "Upgrade: y"
        first = "GET /c HTTP/1.1"
        conn.sendall(self.ask("chat.tim.x", *lines, first=first, close=False))
        found, rest = read_head(conn)
        self.wait(1)
        conn.sendall(b"hello")
        while len(rest) < 7:
            rest += conn.recv(100)
        conn.close()
        begun, ended = self.wait(2)
        self.assertEqual((begun.status, begun.target, begun.stream), (101, "/c", 1))
        self.assertEqual(ended[3:6], ("GET", "/c", 0))
        self.assertEqual((ended.sent, ended.received), (7, 5))
        self.assertEqual(ended.request[0], begun.request[1])
        self.assertEqual(ended.answer[0], begun.answer[1])
        with socket.create_connection(("127.0.0.1", number)) as conn:
            conn.sendall(b"abc")
            self.assertEqual(conn.recv(3), b"ABC")
        ended = self.wait(3)[2]
        self.assertEqual(ended[2:6], ("ssh", "TCP", "", 0))
        self.assertEqual((ended.sent, ended.received, ended.request), (3, 3, (0, 3)))

    def test_who_is_not_let_in_is_told_too(self):
        number = free_port()
        self.start_server(tcp_ports=range(number, number + 1))
        nets = ["192.0.2.0/24"]
        services = {"web": {"target": self.echo(), "auth": "a:b"}}
        services["ssh"] = {"target": 1, "tcp": number, "visitors": nets}
        self.client = self.start_client(services)
        self.notes = self.listen_to(self.client, self.server)
        self.get("web.tim.x")
        with socket.create_connection(("127.0.0.1", number)) as conn:
            with contextlib.suppress(OSError):
                self.assertEqual(conn.recv(1), b"")
        web, ssh = self.wait(2)
        self.assertEqual((web.service, web.status, web.stream), ("web", 401, 0))
        self.assertEqual((ssh.service, ssh.status, ssh.code), ("ssh", 0, "denied"))

    def test_time_without_a_head_is_none(self):
        self.start()
        self.raw(b"\x16\x03\x01 is no HTTP\r\n\r\n")
        self.server.until(lambda: self.seen)
        self.assertEqual((self.seen[0].status, self.seen[0].seconds), (400, 0.0))

    def test_visitor_who_breaks_off_is_told(self):
        begun = threading.Event()
        self.addCleanup(begun.set)

        def handler(conn):
            if b"/late" in read_head(conn)[0]:
                conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx")
            begun.wait(PATIENCE)

        self.start(web=self.service(handler))
        for number, path in enumerate(("/early", "/late")):
            conn = self.visit()
            conn.sendall(self.ask("web.tim.x", first="GET %s HTTP/1.1" % path))
            self.wait_for_streams(1)
            if number:
                read_head(conn)
            reset_on_close(conn)
            conn.close()
            self.wait(number + 1)
        ends = [(outcome.status, outcome.code) for outcome in self.notes]
        self.assertEqual(ends, [(499, "left"), (200, "left")])

    def test_nothing_is_told_or_made_where_nobody_asks(self):
        with mock.patch.object(client_module.log, "hears", lambda level: False):
            with mock.patch.object(server_module.log, "hears", lambda level: False):
                self.start_server()
                client = self.start_client({"web": self.echo()})
        made = mock.patch.object(server_module, "Outcome", side_effect=AssertionError)
        self.assertEqual(client.program.observers, [])
        self.assertEqual(self.server.program.visitors.observers, [])
        with made:
            self.echoed("web.tim.x")
            self.get("nobody.x")
        client.end()
        self.assertEqual(self.server.program.registry.noted, set())

    def test_observer_goes_with_the_last_client_that_asked(self):
        self.start()
        registry = self.server.program.registry
        other = self.start_client({"web": 9}, id="eva")
        self.assertEqual(len(registry.noted), 2)
        observers = registry.visitors.observers
        for client in (self.client, other):
            self.assertIn(registry.note, observers)
            client.end()
            gone = client.program.id
            self.server.until(lambda gone=gone: gone not in registry.pools)
        self.assertNotIn(registry.note, observers)

    def test_what_does_not_fit_is_counted(self):
        self.start()
        tunnel, link = self.tunnels["tim"], self.tunnels["tim"].link
        outcome = server_module.Outcome("192.0.2.1", "tim", "web", "GET", "/" * 400)

        def flood():
            for _ in range(1000):
                tunnel.note(outcome)
            waiting = bytes(link.own_frames[Kind.NOTE])
            self.assertLessEqual(len(waiting), server_module.TEXT_LIMIT)
            return len(json.loads(waiting.decode())), tunnel.dropped

        told, dropped = self.server.do(flood)
        self.assertEqual(told + dropped, 1000)
        self.wait(told)
        self.server.do(lambda: tunnel.note(outcome))
        self.wait(told + 1)
        line = "%d more requests: the link was too slow to tell" % dropped
        self.assertIn(line, self.log.lines)


class SelfChecks(TunnelCase):
    """--check: what it says of set-ups that work, and of broken ones."""

    def check(self, services, **options):
        """Whether all went well, and what was printed."""
        given = client_module.parse_services(list(services.items()))
        token = options.pop("token", "")
        watched = client_module.Watched([], lambda: token)
        options = dict({"host": "127.0.0.1", "id": "tim", "check": True}, **options)
        if "port" not in options:
            options["port"] = self.server.program.client_address[1]
        config = client_module.Config(given=given, token=watched, **options)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            check = client_module.Check(config)
            self.addCleanup(check.loop.close)
            good = check.check()
        self.said = out.getvalue()
        return good

    def assertSays(self, mark, what, text, advice=""):
        """There is such a line; and behind it what to do."""
        lines = self.said.splitlines()
        pattern = r"%s\s+%s\s+.*%s" % (mark, what, text)
        at = [at for at, line in enumerate(lines) if re.match(pattern, line)]
        self.assertEqual(len(at), 1, "%s\n%s" % (pattern, self.said))
        if advice:
            self.assertRegex(lines[at[0] + 1], r"^\s+-> .*" + advice)

    def closed_port(self):
        with contextlib.closing(socket.socket()) as sock:
            sock.bind(("127.0.0.1", 0))
            return sock.getsockname()[1]

    def test_all_is_well(self):
        number = free_port()
        self.start_server(tcp_ports=range(number, number + 1))
        services = {"web": self.echo(), "ssh": {"target": self.echo(), "tcp": number}}
        self.assertTrue(self.check(services), self.said)
        for what in ("connect", "protocol", "login"):
            self.assertSays("ok", what, "")
        self.assertSays("ok", "url", "web  http://web.tim.localhost:")
        self.assertSays("ok", "target", "web  127.0.0.1:")
        self.assertSays("ok", "visit", "http://web.tim.localhost:.*: 200")
        self.assertSays("ok", "visit", "tcp://127.0.0.1:%d: connected" % number)
        self.assertTrue(self.said.endswith("All is well.\n"))
        self.server.until(lambda: not self.tunnels)

    def test_password_of_the_services_file_is_used(self):
        self.start_server()
        listed = {"Web": {"target": self.echo(), "auth": ["tim:s\u00e9cret", "eva:x"]}}
        listed["eva"] = {"target": self.echo(), "auth": "eva:x"}
        path = self.file(json.dumps(listed))
        file = client_module.Watched([path], client_module.parse_file)
        self.assertTrue(self.check({}, file=file), self.said)
        self.assertEqual(self.said.count("localhost:"), 4)
        self.assertNotIn("cret", self.said)
        whole = self.file(json.dumps({"token": "x", "services": listed}))
        file = client_module.Watched([whole], client_module.parse_file)
        for name, pair in (("web", "tim:s\u00e9cret"), ("eva", "eva:x"), ("no", "")):
            self.assertEqual(client_module.password_of(file, name), pair)

    def test_visitors_who_are_not_let_in(self):
        self.start_server()
        option = {"target": self.echo(), "visitors": ["192.0.2.0/24"]}
        self.assertFalse(self.check({"web": option}))
        self.assertSays("FAILED", "visit", ".*403 denied", '"visitors" does not have')
        self.start_client({"web": {"target": self.echo(), "auth": "a:b"}})
        self.assertFalse(self.check({"web": self.echo()}))
        self.assertSays("FAILED", "visit", ".*401 denied", "of the client that runs")

    def test_name_that_leads_elsewhere(self):
        """What answers there is no sign that the tunnel works."""
        change(self, client_module, SOON_HERE=0.1)
        self.start_server(domain="http://tunnel.localhost:%d" % self.echo())
        self.assertFalse(self.check({"web": self.echo()}))
        self.assertSays("FAILED", "visit", ".*nothing came by our link", "name lead")

    def test_service_that_only_connect_reaches_is_not_visited(self):
        self.start_server()
        self.assertTrue(self.check({"ssh": {"target": self.echo(), "tcp": True}}))
        self.assertSays("skipped", "visit", "ssh: by CONNECT only")
        self.assertNotIn(": 200", self.said)

    def test_client_that_starts_meanwhile_gets_the_id(self):
        """A check may take long: it only borrows the id."""
        self.start_server()
        conn = Logins.hello(self)
        rest = read_head(conn)[1]
        login = {"id": "tim", "session": "s", "check": True}
        conn.sendall(frame(Kind.LOGIN, 0, json.dumps(login).encode()))
        conn.sendall(frame(Kind.SERVICES, 0, b"{}"))
        self.server.until(lambda: self.tunnels)
        self.start_client({"web": self.echo()})
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        said = b"".join(iter(lambda: conn.recv(65536), b""))
        found = read_frames(rest + said, peer="server")
        self.assertIn(b"replaced", found[-1][2])

    def test_two_checks_at_once(self):
        self.start_server()
        first = threading.Event()
        real = client_module.Check.try_urls

        def slow(check, name, told):
            if not first.is_set():
                first.set()
                self.assertTrue(self.check({"web": 9, "x": self.echo()}) is False)
                self.assertSays("ok", "login", "a client runs as tim")
            real(check, name, told)

        with mock.patch.object(client_module.Check, "try_urls", slow):
            self.check({"web": self.echo()})

    def test_lines_that_nobody_reads_cost_nothing(self):
        class Closed(io.StringIO):
            def write(self, text):
                raise BrokenPipeError

        self.start_server()
        with mock.patch.object(io, "StringIO", Closed):
            self.assertTrue(self.check({"web": self.echo()}))

    def test_each_line_may_be_an_object(self):
        with mock.patch.object(client_module.log, "as_json", True):
            self.check({"web": 9}, port=self.closed_port())
        lines = list(map(json.loads, self.said.splitlines()))
        self.assertEqual([x.get("step") for x in lines][:2], ["name", "connect"])
        self.assertEqual(lines[1]["result"], "FAILED")
        self.assertIn("client port", lines[1]["advice"])

    def test_nobody_listens_where_the_server_should_be(self):
        self.assertFalse(self.check({"web": 9}, port=self.closed_port()))
        self.assertSays("FAILED", "connect", "refused", "client port")
        self.assertSays("skipped", "visit", "web")

    def test_name_of_the_server_is_unknown(self):
        error = socket.gaierror(-2, "Name or service not known")
        with mock.patch.object(socket, "getaddrinfo", side_effect=error):
            self.assertFalse(self.check({"web": 9}, host="no.such.name", port=1))
        self.assertSays("FAILED", "name", "no.such.name", "is the name right")

    def test_it_is_the_visitors_port(self):
        self.start_server()
        port = self.server.program.visitor_address[1]
        self.assertFalse(self.check({"web": self.echo()}, port=port))
        self.assertSays("FAILED", "protocol", "answered 404", "--client-port")

    def test_it_is_a_web_server(self):
        port = self.answering(b"HTTP/1.1 404 Not Found\r\n\r\n")
        self.assertFalse(self.check({"web": self.echo()}, port=port))
        self.assertSays("FAILED", "protocol", "answered 404, as no", "-p")
        port = self.answering(b"HTTP/1.1 200 OK\r\n\r\n")
        self.assertFalse(self.check({"web": self.echo()}, port=port))
        self.assertSays("FAILED", "protocol", "answered 200", "login in the browser")

    def test_token_is_missing_or_wrong(self):
        tokens = self.file(json.dumps({"tim": "secret"}))
        self.start_server(tokens=tokens)
        self.assertFalse(self.check({"web": self.echo()}))
        self.assertSays("FAILED", "login", "wants a token", "--token-file")
        self.assertFalse(self.check({"web": self.echo()}, token="wrong"))
        self.assertSays("FAILED", "login", "wrong token", "file tim, with this")
        self.assertTrue(self.check({"web": self.echo()}, token="secret"), self.said)

    def test_client_that_runs_is_left_alone(self):
        tokens = self.file(json.dumps({"tim": "secret"}))
        for options, token in (({}, ""), ({"tokens": tokens}, "secret")):
            self.start_server(**options)
            self.start_client({"web": self.echo()}, token=token)
            tunnel = self.tunnels["tim"]
            self.assertTrue(self.check({"web": self.echo()}, token=token), self.said)
            self.assertSays("ok", "login", "a client runs as tim")
            self.assertSays("ok", "visit", "http://web.tim.localhost:.*: 200")
            self.assertIs(self.tunnels["tim"], tunnel)
            self.assertFalse(tunnel.link.closed or tunnel.link.draining)

    def test_client_that_runs_does_not_have_the_service(self):
        self.start_server()
        self.start_client({"web": self.echo()})
        self.assertFalse(self.check({"web": self.echo(), "other": self.echo()}))
        self.assertSays("FAILED", "url", "other: the client that runs", "its list")
        self.assertSays("ok", "visit", "http://web.tim")

    def test_old_server_would_put_a_client_off(self):
        tokens = self.file(json.dumps({"tim": "secret"}))
        self.start_server(tokens=tokens)
        real = server_module.Link.send

        def old(link, kind, message):
            real(link, kind, {k: v for k, v in message.items() if k != "check"})

        with mock.patch.object(server_module.Link, "send", old):
            self.assertFalse(self.check({"web": self.echo()}, token="secret"))
        self.assertSays("FAILED", "login", "would put off")

    def test_target_does_not_listen(self):
        self.start_server()
        self.assertFalse(self.check({"web": self.closed_port(), "ok": self.echo()}))
        self.assertSays("FAILED", "target", "web .* refused", "start the service")
        self.assertSays("skipped", "visit", "web: its target failed")
        self.assertSays("ok", "visit", "http://ok.tim")

    def test_port_that_the_server_does_not_give(self):
        self.start_server()
        self.assertFalse(self.check({"ssh": {"target": self.echo(), "tcp": 22}}))
        self.assertSays("FAILED", "url", "ssh: ")

    def test_there_is_no_service(self):
        self.start_server()
        self.assertFalse(self.check({}))
        self.assertSays("FAILED", "services", "", "web=9000")

    def test_service_that_speaks_no_http(self):
        change(self, client_module, PROBE_TIME=0.2)
        self.start_server()
        self.assertFalse(self.check({"web": self.answering(b"SSH-2.0-x\r\n")}))
        self.assertSays("FAILED", "visit", "the server said 502", "a web server")

    def test_name_for_visitors_is_unknown(self):
        self.start_server(domain="tunnel.invalid")
        real = socket.getaddrinfo

        def look_up(host, *more):
            if host.endswith(".invalid"):
                raise socket.gaierror(-2, "Name or service not known")
            return real(host, *more)

        with mock.patch.object(socket, "getaddrinfo", look_up):
            self.assertFalse(self.check({"web": self.echo()}))
        url = "http://web.tim.tunnel.invalid:"
        self.assertSays("FAILED", "visit", url + r"\d+  ", r"record for \*.tim.tunnel")
        self.assertSays("ok", "visit", url + r"\d+ by 127.0.0.1: 200")

    def test_proxy_wants_a_password(self):
        answer = b"HTTP/1.1 407 x\r\nContent-Length: 0\r\n\r\n"
        proxy = client_module.Proxy("http://127.0.0.1:%d" % self.answering(answer))
        there = dict(host="tunnel.test", port=1, proxy=proxy)
        self.assertFalse(self.check({"web": 9}, **there))
        self.assertSays("FAILED", "proxy", "answered 407", "user:password")

    def test_visits_where_only_a_proxy_leads_out(self):
        """They go by it where it lets them: to https."""
        self.start_server()
        number, asked = self.server.program.client_address[1], []

        def handler(conn):
            asked.append(read_head(conn)[0])
            with socket.create_connection(("127.0.0.1", number)) as onward:
                conn.sendall(b"HTTP/1.1 200 x\r\n\r\n")
                self.relay(conn, onward)

        proxy = client_module.Proxy("http://127.0.0.1:%d" % self.service(handler))
        there = dict(host="tunnel.test", port=1, proxy=proxy)
        self.assertTrue(self.check({"web": self.echo()}, **there), self.said)
        self.assertSays("ok", "proxy", "lets us through")
        self.assertSays("skipped", "visit", "http://web.tim.*: only a proxy leads out")
        self.assertTrue(asked[0].startswith(b"CONNECT tunnel.test:1 "))

    def test_answers_that_never_come_end_in_time(self):
        change(self, client_module, SERVER_TIME=0.2, DIAL_TIME=0.2)
        done = threading.Event()
        self.addCleanup(done.set)
        mute = self.service(lambda conn: done.wait(PATIENCE))
        self.assertFalse(self.check({"web": self.deaf_port()}, port=mute))
        self.assertSays("FAILED", "protocol", "no answer in time")
        self.assertSays("FAILED", "target", "did not answer in time", "firewall")

    def test_urls_that_are_none_are_not_visited(self):
        self.start_server()
        urls = {"web": "http://a.test:99999999999/ tcp://a.test:0 gopher://x http://"}
        with mock.patch.object(server_module.Registry, "publish", lambda *_: urls):
            self.check({"web": self.echo()})
        self.assertNotIn("visit  ", self.said)

    def test_colours_only_on_a_terminal(self):
        self.start_server()
        with mock.patch.object(client_module, "shows_colours", lambda file: True):
            self.check({"web": self.echo()})
        self.assertIn("\x1b[32mok      \x1b[0m login", self.said)
        self.check({"web": self.echo()})
        self.assertNotIn("\x1b", self.said)


class Strips(unittest.TestCase):
    """What the inspector keeps of one way of a stream."""

    def test_requests_are_cut_out_however_their_bytes_came(self):
        dice = random.Random(1)
        for _ in range(200):
            data = bytes(dice.randrange(256) for _ in range(dice.randrange(1, 200)))
            ends = sorted(dice.randrange(len(data) + 1) for _ in range(4)) + [len(data)]
            strip, came, first = client_module.Strip(), 0, 0
            for last in ends:
                while came < last:
                    size = dice.randrange(1, 30)
                    strip.add(data[came : came + size], 1 << 20)
                    came += size
                self.assertEqual(strip.cut(first, last), data[first:last])
                first = last

    def test_at_most_so_much_is_kept_and_the_next_one_is_whole(self):
        change(self, client_module, KEPT=10)
        strip = client_module.Strip()
        self.assertEqual(strip.add(b"x" * 7, 100), 7)
        self.assertEqual(strip.add(b"y" * 7, 100), 3)
        self.assertEqual(strip.add(b"z" * 7, 100), 0)
        self.assertEqual(strip.cut(0, 21), b"xxxxxxxyyy")
        strip.add(b"next", 100)
        self.assertEqual(strip.cut(21, 25), b"next")

    def test_nothing_is_kept_behind_a_gap_or_without_room(self):
        change(self, client_module, KEPT=10)
        strip = client_module.Strip()
        self.assertEqual(strip.add(b"x" * 20, 4), 4)
        self.assertEqual(strip.add(b"y", 100), 0)
        self.assertEqual(strip.cut(0, 20), b"xxxx")
        self.assertEqual(strip.cut(20, 21), b"")  # it came before the cut
        strip.add(b"z", 100)
        self.assertEqual(strip.cut(21, 22), b"z")

    def test_outcome_that_was_not_told_costs_one_request(self):
        strip = client_module.Strip()
        strip.add(b"aaabbb", 100)
        self.assertEqual(strip.cut(3, 6), b"bbb")
        strip.add(b"ccc", 100)
        self.assertEqual(strip.cut(4, 6), b"")  # what is over is over
        self.assertEqual(strip.cut(6, 9), b"ccc")
        self.assertEqual(strip.cut(5, 3), b"")  # a server may say anything
        self.assertEqual(strip.cut(1 << 62, 1 << 63), b"")


class Inspections(TunnelCase):
    def start(self, wait=True, **services):
        self.start_server()
        services = services or {"web": self.echo()}
        self.client = self.start_client(services, inspect=0, wait=wait)
        self.inspector = self.client.program.inspector

    def entries(self, count):
        """The entries, when there are so many."""
        inspector = self.inspector
        self.client.until(lambda: len(inspector.entries) >= count)
        return list(inspector.entries)

    def page(self, path="", method="GET", body=None, token=None, **fields):
        """What the page's server answers: status and body."""
        port = self.inspector.port
        fields = {name.replace("_", "-"): value for name, value in fields.items()}
        conn = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.addCleanup(conn.close)
        token = self.inspector.token if token is None else token
        conn.request(method, "/%s/%s" % (token, path), body, fields)
        self.answer = conn.getresponse()
        return self.answer.status, self.answer.read()

    def replay(self, number, data):
        """Send it again; the new entry."""
        kind = {"Content_Type": client_module.BYTES}
        said = self.page("replay/%d" % number, "POST", data, **kind)
        self.assertEqual(said[0], 200, said)
        return self.inspector.find(int(said[1].decode()))

    def service_that_keeps(self):
        """The port of a service, and the requests that come to it."""
        heard = []

        def handler(conn):
            while True:
                first, body = read_head(conn)
                if not first:
                    return
                length = re.search(rb"Content-Length: (\d+)", first)
                while len(body) < int(length.group(1) if length else 0):
                    body += conn.recv(65536)
                heard.append(first + b"\r\n\r\n" + body)
                conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        return self.service(handler), heard

    def test_bytes_of_a_request_are_kept_as_the_service_saw_them(self):
        port, heard = self.service_that_keeps()
        self.start(web=port)
        conn = self.keep()
        for path in ("/one", "/two"):
            self.get("web.tim.x", path, "POST", b"a body", conn=conn)
        for entry, data in zip(self.entries(2), heard):
            self.assertEqual(entry.request, data)
            self.assertTrue(entry.answer.endswith(b"\r\n\r\nok"))
            self.assertTrue(entry.shown["whole"])
            way = "request/%d" % entry.shown["number"]
            self.assertEqual(self.page(way), (200, data))
            way = "answer/%d" % entry.shown["number"]
            self.assertEqual(self.page(way), (200, entry.answer))
        self.assertEqual(self.inspector.taped, 0)

    def test_request_that_failed_is_sent_again(self):
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            number = taken.getsockname()[1]
            self.start(web=number)
            self.get("web.tim.x", "/hook?a=b", "POST", b"important")
            (failed,) = self.entries(1)
        self.assertEqual(failed.shown["code"], "refused")
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", number))
        heard = []

        def handler(conn):
            heard.append(conn.recv(65536))
            conn.sendall(b"HTTP/1.1 201 Made\r\nContent-Length: 0\r\n\r\n")

        self.service(handler, listener)
        entry = self.replay(1, failed.request)
        self.assertEqual(heard, [failed.request])
        self.assertTrue(failed.request.endswith(b"important"))
        self.assertEqual(entry.shown["status"], 201)
        self.assertEqual(entry.shown["again"], 1)
        self.assertTrue(entry.answer.startswith(b"HTTP/1.1 201 Made"))

    def test_what_is_edited_is_sent(self):
        port, heard = self.service_that_keeps()
        self.start(web=port)
        self.get("web.tim.x")
        self.entries(1)
        data = b"PUT /other HTTP/1.1\r\nHost: y\r\nContent-Length: 1\r\n\r\n!"
        entry = self.replay(1, data)
        self.assertEqual(heard[-1], data)
        self.assertEqual(entry.shown["method"], "PUT")
        self.assertEqual(entry.shown["target"], "/other")
        self.assertEqual(entry.request, data)

    def test_replay_says_why_it_could_not_be(self):
        self.start()
        self.get("web.tim.x")
        (entry,) = self.entries(1)
        mute = self.service(lambda conn: conn.recv(9))
        odd = self.answering(b"no HTTP at all\r\n\r\n")
        closed = free_port()
        for port in (mute, odd, closed):
            self.client.program.services = client_module.parse_services([("web", port)])
            entry = self.replay(1, entry.request)
            self.assertEqual(entry.shown["code"], "replay")
            self.assertTrue(entry.shown["cause"])
        self.client.program.services = {}
        entry = self.replay(1, entry.request)
        self.assertIn("no service web any more", entry.shown["cause"])
        self.replay(1, b"")

    def test_answer_without_an_end_is_cut_in_time(self):
        change(self, client_module, REPLAY_TIME=0.2)
        done = threading.Event()
        self.addCleanup(done.set)

        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n")
            done.wait(PATIENCE)

        self.start(web=self.service(handler))
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x", close=False))
        read_head(conn)
        reset_on_close(conn)
        conn.close()
        (entry,) = self.entries(1)
        entry = self.replay(1, entry.request)
        self.assertEqual((entry.shown["status"], entry.shown["code"]), (200, "replay"))
        self.assertTrue(entry.answer.endswith(b"data: 1\n\n"))

    def test_long_bodies_are_kept_in_part(self):
        change(self, client_module, KEPT=1000)
        self.start(web=self.answering(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 5000))
        self.get("web.tim.x", "/" + "y" * 3000)
        (entry,) = self.entries(1)
        self.assertEqual((len(entry.request), len(entry.answer)), (1000, 1000))
        self.assertEqual(entry.shown["answer"], 5019)
        self.assertFalse(entry.shown["whole"])

    def test_the_oldest_go_where_there_are_too_many(self):
        change(self, client_module, ENTRIES=3)
        self.start()
        conn = self.keep()
        for _ in range(5):
            self.get("web.tim.x", conn=conn)
        self.client.until(lambda: self.inspector.count == 5)
        self.assertEqual([e.shown["number"] for e in self.inspector.entries], [3, 4, 5])
        self.assertEqual(self.page("request/2")[0], 404)
        kept = sum(len(e.request) + len(e.answer) for e in self.inspector.entries)
        self.assertEqual(self.inspector.kept, kept)

    def test_the_oldest_go_where_there_are_too_many_bytes(self):
        change(self, client_module, ALL_KEPT=3000)
        self.start()
        conn = self.keep()
        for _ in range(20):
            self.get("web.tim.x", conn=conn)
            inspector = self.inspector
            self.assertLessEqual(inspector.kept + inspector.taped, 3000)
        self.client.until(lambda: inspector.count == 20)
        self.assertLess(len(inspector.entries), 20)
        self.assertEqual(inspector.entries[-1].shown["number"], 20)

    def test_streams_that_nobody_tells_of_are_forgotten(self):
        self.start()
        with mock.patch.object(server_module.Tunnel, "note", lambda *_: None):
            self.get("web.tim.x")
        self.assertTrue(self.inspector.taped)
        self.client.until(lambda: not self.client.program.uplink.tunnel.link.streams)
        for _ in range(2):
            self.client.do(self.inspector.sweep)
        self.assertEqual((self.inspector.taped, self.inspector.tapes), (0, {}))

    def test_what_a_websocket_carries_is_kept(self):
        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: y\r\n\r\n")
            conn.sendall(conn.recv(5).upper())

        self.start(web=self.service(handler))
        conn = self.visit()
        lines = "Connection: upgrade", "Upgrade: y"
        conn.sendall(self.ask("web.tim.x", *lines, close=False))
        read_head(conn)
        conn.sendall(b"hello")
        self.assertEqual(conn.recv(5), b"HELLO")
        conn.close()
        begun, ended = self.entries(2)
        self.assertEqual(begun.shown["status"], 101)
        self.assertTrue(begun.answer.endswith(b"\r\n\r\n"))
        self.assertEqual((ended.request, ended.answer), (b"hello", b"HELLO"))

    def test_visitors_who_leave_while_the_target_is_dialled(self):
        self.start(web=self.deaf_port())
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x", first="GET /slow HTTP/1.1"))
        self.server.until(self.exchanges)
        self.client.until(lambda: self.inspector.tapes)
        reset_on_close(conn)
        conn.close()
        (entry,) = self.entries(1)
        self.assertEqual(entry.shown["code"], "left")
        self.assertTrue(entry.request.startswith(b"GET /slow HTTP/1.1\r\n"))

    def test_news_come_as_they_happen(self):
        self.start()
        told = []
        asked = threading.Thread(target=lambda: told.append(self.page("news/0")))
        asked.start()
        self.get("web.tim.x", "/x")
        asked.join(PATIENCE)
        ((status, body),) = told
        news = json.loads(body.decode())
        self.assertEqual((status, news["count"], news["first"]), (200, 1, 1))
        self.assertEqual(news["new"][0]["target"], "/x")
        self.assertFalse(news["deaf"])

    def test_clear_forgets_all(self):
        self.start()
        self.get("web.tim.x")
        self.entries(1)
        said = self.page("clear/0", "POST", b"", Content_Type=client_module.BYTES)
        self.assertEqual(said[0], 200)
        self.assertEqual((len(self.inspector.entries), self.inspector.kept), (0, 0))
        news = json.loads(self.page("news/1")[1].decode())
        self.assertEqual((news["new"], news["first"]), ([], 3))

    def test_only_the_page_may_ask(self):
        self.start()
        self.get("web.tim.x")
        self.entries(1)
        kind = client_module.BYTES
        own = "http://127.0.0.1:%d" % self.inspector.port
        for status, method, path, fields in (
            (200, "GET", "", {}),
            (200, "GET", "", {"Origin": own}),
            (200, "GET", "", {"Host": "localhost:%d" % self.inspector.port}),
            (403, "GET", "", {"Host": "evil.example:%d" % self.inspector.port}),
            (403, "GET", "", {"Host": "127.0.0.1"}),
            (403, "GET", "news/0", {"Origin": "http://evil.example"}),
            (403, "GET", "news/0", {"Origin": "null"}),
            (403, "POST", "replay/1", {"Origin": own + "0", "Content_Type": kind}),
            (404, "POST", "replay/1", {"Content_Type": "text/plain"}),
            (404, "GET", "replay/1", {"Content_Type": kind}),
            (404, "GET", "clear/0", {}),
            (404, "GET", "request/2", {}),
            (404, "GET", "request/" + "9" * 9999, {}),
            (404, "GET", "nothing", {}),
        ):
            self.assertEqual(self.page(path, method, b"", **fields)[0], status, path)
        for token in ("", "0" * 32, self.inspector.token[:-1]):
            for path in ("", "news/0", "request/1"):
                self.assertEqual(self.page(path, token=token)[0], 404)
        fields = {"Host": "127.0.0.1:%d" % self.inspector.port}
        for path in ("/%s/request/\xb2" % self.inspector.token, "/\xff/", "", "*"):
            found = self.inspector.answer("GET", path, fields, b"")
            self.assertEqual(found[0], 404, path)
        self.assertEqual(self.inspector.count, 1)

    def test_crowd_gets_no_threads_without_end(self):
        self.start()
        change(self, client_module, PAGE_THREADS=threading.active_count() + 3)
        where = "127.0.0.1", self.inspector.port
        crowd = [socket.create_connection(where) for _ in range(20)]
        for conn in crowd:
            self.addCleanup(conn.close)
        self.assertEqual(crowd[-1].recv(1), b"")  # it is closed at once
        for conn in crowd:
            conn.close()

        def answers():
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.page()[0] == 200

        self.client.until(answers)

    def test_request_that_is_too_large_is_refused(self):
        self.start()
        for size in ("1048577", "9" * 30, "x", "\xb2"):
            self.assertEqual(self.page("clear/0", "POST", Content_Length=size)[0], 413)

    def test_page_is_alone_and_runs_nothing_from_outside(self):
        self.start()
        status, body = self.page()
        text = body.decode()
        policy = self.answer.getheader("Content-Security-Policy")
        (nonce,) = set(re.findall("nonce-(\\w+)'", policy))
        self.assertEqual(text.count('nonce="%s"' % nonce), 2)
        self.assertNotIn("NONCE", text)
        self.assertTrue(policy.startswith("default-src 'none'"))
        for word in "innerHTML outerHTML insertAdjacent document.write eval(".split():
            self.assertNotIn(word, text)
        found = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text)
        self.assertEqual(found, ["data:,"])

    def test_targets_of_every_kind_are_sent_to(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        listener = socket.socket(socket.AF_UNIX)
        path = os.path.join(folder, "s")
        listener.bind(path)
        heard = []

        def handler(conn):
            heard.append(read_head(conn)[0])
            conn.sendall(b"HTTP/1.1 204 x\r\n\r\n")

        self.service(handler, listener)
        unix, plain = "unix:" + path, self.service(handler)
        told = {"target": plain, "proxy_protocol": 1}
        self.start(unix=unix, told=told)
        self.get("unix.tim.x")
        self.get("told.tim.x")
        for entry in self.entries(2):
            number = entry.shown["number"]
            again = self.replay(number, entry.request)
            self.assertEqual(again.shown["status"], 204, again.shown)
        self.assertEqual(heard[2], heard[0])
        self.assertRegex(heard[1], rb"^PROXY TCP4 127\.0\.0\.1 127\.0\.0\.1 ")
        self.assertEqual(heard[3], heard[1])

    def test_server_that_is_too_old_to_tell(self):
        real = server_module.Link.send

        def old(link, kind, message):
            message = {k: v for k, v in message.items() if k != "notes"}
            real(link, kind, message)

        with mock.patch.object(server_module.Link, "send", old):
            self.start()
        self.assertTrue(self.inspector.deaf)

    def test_without_it_streams_are_as_they_were(self):
        self.start_server()
        self.client = self.start_client({"web": self.echo()})
        kinds = []
        real = client_module.Bridge.join

        def join(bridge, connection):
            pipe = real(bridge, connection)
            kinds.append((type(bridge), type(pipe)))
            return pipe

        with mock.patch.object(client_module.Bridge, "join", join):
            self.echoed("web.tim.x")
        self.assertEqual(kinds, [(client_module.Bridge, client_module.Pipe)])
        self.assertIsNone(self.client.program.inspector)

    def test_port_that_is_taken_ends_the_client(self):
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            number = taken.getsockname()[1]
            done = run_script(SCRIPTS[1], "--inspect", str(number), "web=9")
        self.assertEqual(done.status, 1)
        self.assertIn("127.0.0.1:%d (--inspect)" % number, done.stderr)
        self.assertEqual(len(done.stderr.splitlines()), 1)

    def test_forms_of_the_option(self):
        for words, port, names in (
            (["web=9"], None, ["web"]),
            (["--inspect", "web=9"], 4040, ["web"]),
            (["--inspect", "5000", "web=9"], 5000, ["web"]),
            (["web=9", "--inspect"], 4040, ["web"]),
            (["--inspect=0", "web=9", "x=1"], 0, ["web", "x"]),
            (["--inspect", "-v", "web=9"], 4040, ["web"]),
        ):
            options = client_module.parse_arguments(words)
            self.assertEqual(options.inspect, port, words)
            self.assertEqual(sorted(options.given), names)
        for word in ("65536", "-1", "x", "\xb2"):
            done = run_script(SCRIPTS[1], "--inspect=" + word, "web=9")
            self.assertEqual((done.status, done.stdout), (2, ""))
            self.assertIn("--inspect", done.stderr)


class Exposition:
    """Reads OpenMetrics text strictly (its specification, version 1.0.0): what is not
    as it says raises AssertionError."""

    NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
    LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
    SAMPLE = re.compile(r"(%s)(?:\{(%s(?:,%s)*)\})? (\S+)" % (NAME, LABEL, LABEL))
    SUFFIXES = {"counter": {"_total"}, "gauge": {""}, "info": {"_info"},
                "histogram": {"_bucket", "_count", "_sum"}}  # fmt: skip

    def __init__(self, text):
        self.families, self.samples = {}, {}
        name = None
        lines = text.split("\n")
        assert lines[-2:] == ["# EOF", ""], lines[-2:]
        for line in lines[:-2]:
            if line.startswith("#"):
                mark, word, found, rest = line.split(" ", 3)
                assert mark == "#" and re.fullmatch(self.NAME, found), line
                if word == "TYPE":
                    assert found not in self.families and rest in self.SUFFIXES, line
                    self.families[found], name = rest, found
                elif word == "UNIT":
                    assert found.endswith("_" + rest), line
                else:
                    assert word == "HELP" and rest.endswith("."), line
                assert found == name, "%s among those of %s" % (line, name)
            else:
                self.read_sample(name, line)
        for name, kind in self.families.items():
            if kind == "histogram":
                self.check_histogram(name)

    def read_sample(self, name, line):
        match = self.SAMPLE.fullmatch(line)
        assert match, line
        labels = dict(re.findall(self.LABEL, match.group(2) or ""))
        suffix = match.group(1)[len(name) :]
        assert match.group(1).startswith(name), line
        assert suffix in self.SUFFIXES[self.families[name]], line
        key = match.group(1), tuple(sorted(labels.items()))
        assert key not in self.samples, "%s stands there twice" % line
        value = float(match.groups()[-1])
        assert value == value and value >= 0, line
        self.samples[key] = value

    def check_histogram(self, name):
        """The buckets of each id rise, and the last is the count."""
        for labels in {x for n, x in self.samples if n == name + "_count"}:
            rows = [(dict(x)["le"], value) for (n, x), value in self.samples.items()
                    if n == name + "_bucket" and set(labels) < set(x)]  # fmt: skip
            counts = [count for _, count in rows]
            assert counts == sorted(counts), rows
            bounds = [float(le) for le, _ in rows]
            assert bounds == sorted(set(bounds)), rows
            assert rows[-1] == ("+Inf", self.samples[name + "_count", labels]), rows
            assert (name + "_sum", labels) in self.samples, name

    def get(self, name, **labels):
        """A value, or None."""
        if not name.startswith("process_"):
            name = "mdm_tunnel_" + name
        return self.samples.get((name, tuple(sorted(labels.items()))))


class Admin(TunnelCase):
    """What --admin tells: /metrics, /healthz, and the page."""

    publish, stalled = TCPPorts.publish, Stopping.stalled

    def start_server(self, **options):
        admin = options.pop("admin", ("127.0.0.1", 0))
        return super().start_server(admin=admin, **options)

    @property
    def numbers(self):
        return self.server.program.admin.numbers

    def admin(self, path="/metrics", method="GET", **headers):
        """An answer of the admin port, with .content."""
        address = self.server.program.admin.port.address
        conn = http.client.HTTPConnection(*address, timeout=PATIENCE)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = self.get(headers.pop("Host", "%s:%d" % address), path, method,
                          headers=headers, conn=conn)  # fmt: skip
        conn.close()
        return answer

    def metrics(self):
        answer = self.admin()
        self.assertEqual(answer.status, 200)
        kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
        self.assertEqual(answer.headers["Content-Type"], kind)
        return Exposition(answer.content.decode())

    def count(self, **values):
        """Tell the numbers an outcome, as if it had been."""
        known = dict(visitor="203.0.113.9", id="tim", service="web", method="GET")
        known.update(target="/", status=200, sent=10, received=5, seconds=0.02)
        outcome = server_module.Outcome(**dict(known, **values))
        self.server.do(lambda: self.numbers.count(outcome) or True)

    def page(self):
        answer = self.admin("/")
        self.assertEqual(answer.status, 200)
        return answer.content.decode()

    # Metrics.

    def test_requests_are_counted_by_id_and_status_with_bytes_and_time(self):
        self.start()
        sent = len(self.get("web.tim.x", "/a").content)
        self.get("web.tim.x", "/a", "POST", b"12345")
        self.get("no.tim.x")
        found = self.metrics()
        self.assertEqual(found.get("requests_total", id="tim", status="2xx"), 2)
        self.assertEqual(found.get("requests_total", id="", status="4xx"), 1)
        self.assertGreater(found.get("bytes_total", id="tim", direction="sent"), sent)
        self.assertEqual(found.get("bytes_total", id="tim", direction="received"), 5)
        self.assertEqual(found.get("request_seconds_count", id="tim"), 2)
        self.assertGreater(found.get("request_seconds_sum", id="tim"), 0)
        self.assertEqual(found.get("build_info", version=server_module.VERSION,
                                   python="%d.%d.%d" % sys.version_info[:3]), 1)
        self.assertEqual(found.get("draining"), 0)

    def test_gauges_tell_what_is_here_now(self):
        self.start_server()
        found = self.metrics()
        for name in ("ids", "links", "streams", "visitors"):
            self.assertEqual(found.get(name), 0, name)
        self.start_client({"web": self.echo()})
        kept = self.keep()
        self.get("web.tim.x", conn=kept)
        self.dial()
        self.server.until(lambda: len(self.server.loop.connections) == 3)
        found = self.metrics()
        for name in ("ids", "links", "streams", "visitors"):
            self.assertEqual(found.get(name), 1, name)

    def test_round_trip_is_told_once_it_is_known(self):
        self.start()
        link = self.tunnels["tim"].link
        link.round_trip = 0.0
        self.assertIsNone(self.metrics().get("round_trip_seconds", id="tim"))
        link.round_trip = 0.25
        self.assertEqual(self.metrics().get("round_trip_seconds", id="tim"), 0.25)

    def test_resets_are_counted_by_reasons_that_are_known(self):
        self.start(web=self.echo(), no=Notes.closed_port(self))
        self.get("no.tim.x")
        self.count(code="my-own-word", link=object())
        self.count(code="denied")  # no stream was opened
        found = self.metrics()
        self.assertEqual(found.get("resets_total", reason="refused"), 1)
        self.assertEqual(found.get("resets_total", reason="other"), 1)
        self.assertEqual(found.get("resets_total", reason="left"), 0)
        text = self.admin().content.decode()
        self.assertNotIn("my-own-word", text)
        self.assertNotIn('reason="denied"', text)

    def test_connect_to_a_closed_port_is_a_reset(self):
        self.start_server()
        self.publish(ssh=(Notes.closed_port(self), True))
        self.server.until(lambda: self.serves("tim", {"ssh": 1}))
        self.visit().sendall(Connects.ask_for(self, "ssh.tim.x:22"))
        self.server.until(lambda: self.numbers.rows)
        self.assertEqual(self.metrics().get("resets_total", reason="refused"), 1)

    def test_refused_logins_are_counted(self):
        self.start_server(tokens=self.file('{"tim": "%s"}' % ("x" * 32)))
        client = self.start_client({"web": 9}, token="y" * 32, wait=False)
        client.thread.join(PATIENCE)
        found = self.metrics()
        self.assertEqual(found.get("refused_logins_total", reason="refused"), 1)
        self.assertEqual(found.get("refused_logins_total", reason="taken"), 0)

    def test_what_is_carried_counts_its_bytes_before_it_is_over(self):
        def shout(conn):
            for data in iter(lambda: conn.recv(100), b""):
                conn.sendall(b"hello " + data.upper())

        self.start_server()
        self.publish(ssh=(self.service(shout), True))
        self.server.until(lambda: self.serves("tim", {"ssh": 1}))
        conn = self.visit()
        conn.sendall(Connects.ask_for(self, "ssh.tim.x:22") + b"abcd")
        said = b""
        while not said.endswith(b"hello ABCD"):
            said += conn.recv(100)
        found = self.metrics()
        self.assertEqual(found.get("bytes_total", id="tim", direction="sent"), 10)
        self.assertEqual(found.get("bytes_total", id="tim", direction="received"), 4)
        self.assertIsNone(found.get("requests_total", id="tim", status="carried"))
        conn.close()
        self.server.until(lambda: ("tim", 0, "") in self.numbers.rows
                          or ("tim", 0, "left") in self.numbers.rows)  # fmt: skip
        found = self.metrics()
        self.assertEqual(found.get("bytes_total", id="tim", direction="sent"), 10)
        self.assertEqual(found.get("requests_total", id="tim", status="carried"), 1)
        self.assertEqual(found.get("requests_total", id="tim", status="2xx"), 1)
        self.assertEqual(found.get("request_seconds_count", id="tim"), 1)
        self.assertFalse(self.server.program.visitors.pipes)

    def test_download_counts_its_bytes_while_it_runs(self):
        self.stalled(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\npart")
        found = self.metrics()
        self.assertEqual(found.get("bytes_total", id="tim", direction="sent"), 4)
        self.assertIsNone(found.get("requests_total", id="tim", status="2xx"))

    def test_counter_of_bytes_never_falls(self):
        self.start_server()
        running = [("tim", 1000, 50)]
        self.numbers.running = lambda: running
        self.metrics()
        running.clear()  # refused: what the visitor had sent is no answer's
        self.count(sent=100, received=0)
        found = self.metrics()
        self.assertEqual(found.get("bytes_total", id="tim", direction="sent"), 1000)
        self.assertEqual(found.get("bytes_total", id="tim", direction="received"), 50)

    def test_ids_beyond_the_limit_are_other(self):
        change(self, server_module, ID_LABELS=3)
        self.start_server()
        for number in range(9):
            self.count(id="id%d" % number)
            self.count(id="id%d" % number, status=404)
        self.count(id="other")
        self.count(id="")
        found = self.metrics()
        self.assertEqual(found.get("requests_total", id="id2", status="2xx"), 1)
        self.assertIsNone(found.get("requests_total", id="id3", status="2xx"))
        self.assertEqual(found.get("requests_total", id="other", status="2xx"), 7)
        self.assertEqual(found.get("requests_total", id="", status="2xx"), 1)
        self.assertEqual(found.get("request_seconds_count", id="other"), 13)
        self.assertLess(len(self.numbers.rows), 12)

    def test_bounds_of_the_histogram_hold_what_is_equal_to_them(self):
        self.start_server()
        for seconds in (0.005, 0.0051, 59.0, 60.0, 61.0):
            self.count(seconds=seconds)
        self.count(status=0, seconds=7200.0)
        self.count(status=101, seconds=0.1)
        found = self.metrics()
        for bound, count in (("0.005", 1), ("0.01", 2), ("10.0", 2), ("60.0", 4)):
            within = found.get("request_seconds_bucket", id="tim", le=bound)
            self.assertEqual(within, count, bound)
        self.assertEqual(found.get("request_seconds_count", id="tim"), 5)
        self.assertEqual(found.get("request_seconds_sum", id="tim"), 180.0101)

    def test_labels_are_escaped(self):
        said = server_module.family("x", "gauge", "A.", [("", {"a": 'b"\\\n'}, 1)])
        self.assertIn('x{a="b\\"\\\\\\n"} 1\n', said)
        Exposition(said + "# EOF\n")

    def test_longest_turn_is_that_of_the_last_minute_for_all_who_ask(self):
        self.start_server()
        clock, past = self.server.loop.clock, []

        def slow():
            self.server.loop.clock = lambda: clock() + 1000
            past.append(True)

        self.server.loop.from_thread(self.server.loop, slow)
        self.server.until(lambda: past)
        for _ in range(2):
            self.assertGreaterEqual(self.metrics().get("longest_turn_seconds"), 1000)
        for _ in range(server_module.TURNS):
            self.server.do(lambda: self.numbers.sample() or True)
        self.assertLess(self.metrics().get("longest_turn_seconds"), 1000)

    def test_process_is_told_by_the_names_of_all_exporters(self):
        self.start_server()
        found = self.metrics()
        self.assertGreater(found.get("process_cpu_seconds_total"), 0)
        self.assertLess(found.get("process_start_time_seconds"), time.time() + 1)
        if sys.platform.startswith("linux"):
            self.assertGreater(found.get("process_resident_memory_bytes"), 1 << 20)
            opened = found.get("process_open_fds")
            self.assertLess(opened, found.get("process_max_fds"))
            conns = [self.visit() for _ in range(5)]
            self.server.until(lambda: self.server.program.visitors.all)
            files = opened + 2 * len(conns)  # this process has their other ends
            self.assertGreaterEqual(self.metrics().get("process_open_fds"), files - 5)

    def test_rates_are_those_between_two_samples(self):
        rate = server_module.rate_between([5.0, 1, 2, 0, 0], [15.0, 101, 2, 50, 10])
        self.assertEqual(rate, [10, 0, 5, 1])
        self.start_server()
        for _ in range(server_module.SAMPLES + 5):
            self.server.do(lambda: self.numbers.sample() or True)
        self.assertEqual(self.page().count("<rect "), 2 * (server_module.SAMPLES - 1))

    def test_nothing_is_counted_or_watched_without_it(self):
        self.start_server(admin=None)
        program = self.server.program
        self.assertIsNone(program.admin)
        observers = [x for x in program.visitors.observers
                     if x is not server_module.Outcome.tell]  # fmt: skip
        self.assertEqual(observers, [])  # and so no Outcome is made
        self.assertNotIn("select", vars(self.server.loop.selector))
        self.start_server()
        self.server.until(lambda: "select" in vars(self.server.loop.selector))

    # The port.

    def test_browser_shows_the_metrics_as_text(self):
        self.start_server()
        answer = self.admin(Accept="text/html,*/*;q=0.8")
        self.assertEqual(answer.headers["Content-Type"], "text/plain; charset=utf-8")
        Exposition(answer.content.decode())

    def test_its_own_requests_and_connections_are_not_counted(self):
        self.start_server()
        for path in ("/", "/metrics", "/no", "/healthz"):
            self.admin(path)
        found = self.metrics()
        names = {name for name, _ in found.samples}
        self.assertNotIn("mdm_tunnel_requests_total", names)
        self.assertEqual(found.get("visitors"), 0)
        self.assertFalse(self.numbers.recent)
        self.assertNotIn("/healthz", "".join(self.log.lines))

    def test_it_leads_to_no_service(self):
        self.start()
        for host in ("web.tim.localhost", "web.tim.x", "tim.localhost"):
            answer = self.admin("/", Host=host)
            self.assertEqual(answer.status, 403, answer.content)
        for path in ("/x", server_module.LINK_PATH, "/mdm_tunnel_client.py"):
            headers = {"Connection": "Upgrade", "Upgrade": "mdm-tunnel/1"}
            answer = self.admin(path, **headers)
            self.assertEqual(answer.status, 404)
            self.assertNotIn(b"paste", answer.content)
        port = self.server.program.admin.port.address[1]
        conn = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.addCleanup(conn.close)
        said = self.raw(Connects.ask_for(self, "127.0.0.1:%d" % port), conn)
        self.assertNotIn(b"HTTP/1.1 200", said)

    def test_only_get_and_head_are_allowed(self):
        self.start_server()
        for path in ("/", "/metrics", "/healthz"):
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                answer = self.admin(path, method)
                self.assertEqual(answer.status, 405)
                self.assertEqual(answer.headers["Allow"], "GET, HEAD")
                self.assertIsNone(answer.headers["Access-Control-Allow-Origin"])
            answer = self.admin(path, "HEAD")
            self.assertEqual((answer.status, answer.content), (200, b""))
            self.assertGreater(int(answer.headers["Content-Length"]), 2)

    def test_host_is_an_address_localhost_or_the_name_in_the_option(self):
        self.start_server(admin=("LocalHost", 0))
        self.server.program.admin.name = "stats.example.com"
        for host in ("127.0.0.1", "127.0.0.1:9", "[::1]:9", "203.0.113.9", "localhost",
                     "LOCALHOST:9100", "stats.example.com:9100"):  # fmt: skip
            self.assertEqual(self.admin("/healthz", Host=host).status, 200, host)
        for host in ("evil.example", "evil.example:9100", "localhost.evil.example",
                     "127.0.0.1.evil.example", "x.stats.example.com"):  # fmt: skip
            for path in ("/", "/metrics", "/healthz"):
                answer = self.admin(path, Host=host)
                self.assertEqual(answer.status, 403, host)
                self.assertNotIn(b"mdm_tunnel_", answer.content)

    def test_origin_is_its_own_where_there_is_one(self):
        self.start_server()
        for origin in ("http://127.0.0.1:8", "https://127.0.0.1:9", "null", "",
                       "http://127.0.0.1:9", "http://evil.example"):  # fmt: skip
            answer = self.admin("/", Host="127.0.0.1:9", Origin=origin)
            allowed = origin == "http://127.0.0.1:9"
            self.assertEqual(answer.status, 200 if allowed else 403, origin)
            self.assertIsNone(answer.headers["Access-Control-Allow-Origin"])

    def test_every_answer_is_guarded(self):
        self.start_server()
        for path in ("/", "/metrics", "/healthz", "/no"):
            headers = self.admin(path).headers
            self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
            self.assertEqual(headers["X-Frame-Options"], "DENY")
            self.assertEqual(headers["Cache-Control"], "no-store")
            policy = headers["Content-Security-Policy"]
            self.assertIn("default-src 'none'", policy)
            self.assertNotIn("unsafe", policy)
        page = self.page()
        for tag in ("style", "script"):
            (text,) = re.findall("(?s)<%s>(.*?)</%s>" % (tag, tag), page)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
            self.assertIn("%s-src 'sha256-%s'" % (tag, digest.decode()), policy)

    def test_its_connections_go_where_room_is_short_and_make_room(self):
        self.start_server()
        program, loop = self.server.program, self.server.loop
        address = program.admin.port.address[:2]
        old = socket.create_connection(address, PATIENCE)
        self.addCleanup(old.close)
        self.server.until(lambda: program.admin.visitors.all)
        loop.capacity = 1
        visitor = self.visit()
        self.assertEqual(old.recv(1), b"")
        self.assertEqual(self.admin("/healthz").status, 200)
        self.assertEqual(visitor.recv(1), b"")

    # Stopping.

    def test_health_is_503_while_it_drains_and_nobody_who_asks_holds_up_the_end(self):
        change(self, server_module, LAST_WORDS=2 * PATIENCE)
        conn = self.stalled(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", PATIENCE)
        self.assertEqual(self.admin("/healthz").content, b"ok\n")
        address = self.server.program.admin.port.address[:2]
        idle = socket.create_connection(address, PATIENCE)
        self.addCleanup(idle.close)
        kept = http.client.HTTPConnection(*address, timeout=PATIENCE)
        self.addCleanup(kept.close)
        self.get("127.0.0.1", "/metrics", conn=kept)
        self.server.loop.from_thread(self.server.program, self.server.program.stop)
        self.server.until(lambda: self.server.program.visitors.stopping)
        for _ in range(2):
            answer = self.get("127.0.0.1", "/healthz", conn=kept)
            self.assertEqual((answer.status, answer.content), (503, b"draining\n"))
        self.assertEqual(self.metrics().get("draining"), 1)
        self.assertIn('<b class="warn">draining</b>', self.page())
        conn.close()
        self.client.end()
        self.server.thread.join(PATIENCE)
        self.assertFalse(self.server.thread.is_alive())

    # The page.

    def test_page_without_traffic_says_so(self):
        self.start_server()
        page = self.page()
        self.assertIn("No client is connected.", page)
        self.assertIn("No requests yet.", page)
        self.assertEqual(page.count("<dl>"), 8)

    def test_page_shows_links_services_and_the_last_requests(self):
        tokens = {"tim": "x" * 32, "absent": "y" * 32}
        self.start_server(tokens=self.file(json.dumps(tokens)))
        services = {"web": self.echo(), "api": 9}
        self.client = self.start_client(services, token="x" * 32)
        change(self, server_module, LAST_REQUESTS=2)
        self.get("web.tim.x", "/some/path")
        self.server.do(lambda: self.numbers.sample() or True)
        page = self.page()
        port = self.server.program.visitor_address[1]
        for name in services:
            link = '<a href="http://%s.tim.localhost:%d/" rel="noreferrer">%s</a>'
            self.assertIn(link % (name, port, name), page)
        self.assertIn('<td class="st s2">200<td class="what">GET /some/path', page)
        self.assertIn("Not connected: absent", page)
        self.assertEqual(page.count("<rect "), 2)
        (row,) = re.findall("<b>tim</b>.*?<tbody>", page + "<tbody>", re.S)
        self.assertIn('title="from">127.0.0.1', row)

    def test_page_has_no_more_than_the_last_requests_and_parts_of_long_targets(self):
        self.start_server()
        for number in range(server_module.LAST_REQUESTS + 5):
            self.count(target="/%d/" % number + "x" * 9999)
        page = self.page()
        self.assertEqual(page.count('<td class="what">'), server_module.LAST_REQUESTS)
        self.assertNotIn("/4/x", page)
        self.assertIn("/5/x", page)
        self.assertLess(len(page), 100000)

    def test_page_shows_a_part_of_many_services(self):
        self.start(**{"s%02d" % number: 9 for number in range(20)})
        page = self.page()
        self.assertIn(">s11</a>", page)
        self.assertNotIn(">s12</a>", page)
        self.assertIn("and 8 more", page)

    def test_what_comes_from_outside_is_escaped(self):
        self.start_server()
        evil = "<img src=x onerror=alert(1)>\"'&\x1b[31m"
        self.count(visitor=evil, id=evil, service=evil, method=evil, target=evil,
                   status=502, code=evil, cause=evil, link=object())  # fmt: skip
        page = self.page()
        self.assertNotIn("<img", page)
        self.assertNotIn("\x1b", page)
        self.assertNotIn("\"'&", page)
        told = "&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;\\x1b[31m"
        self.assertGreaterEqual(page.count(told), 4)
        found = self.metrics()
        self.assertEqual(found.get("resets_total", reason="other"), 1)

    # The option.

    def test_option_is_a_port_or_an_address_with_one(self):
        table = [("9100", ("127.0.0.1", 9100)), ("0", ("127.0.0.1", 0)),
                 ("0.0.0.0:9100", ("0.0.0.0", 9100)), ("[::1]:9100", ("::1", 9100)),
                 ("localhost:9100", ("localhost", 9100))]  # fmt: skip
        for text, address in table:
            config = server_module.parse_arguments(["--admin", text])
            self.assertEqual(config.admin, address)
        for bad in ("", "x", ":9100", "::1:9100", "localhost:", "[::1]", "h:65536",
                    "http://h:1", "[]:9100", "[::1:9100", "-1"):  # fmt: skip
            said = CommandLines.refuse(self, server_module, "--admin=" + bad)
            self.assertIn("--admin", said)

    def test_port_with_another_use_is_refused(self):
        for options in ({"port": 9100}, {"client_port": 9100},
                        {"tls_port": 9100, "tls_cert": "x"},
                        {"tcp_ports": range(9000, 9200)}):  # fmt: skip
            config = server_module.Config(admin=("127.0.0.1", 9100), **options)
            with self.assertRaisesRegex(ValueError, "port 9100 of --admin"):
                server_module.plan_ports(config)

    def test_taken_port_is_exit_1_and_named(self):
        with contextlib.closing(socket.socket()) as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            port = sock.getsockname()[1]
            done = run_script(SCRIPTS[0], "-p0", "-c0", "--admin", str(port))
        self.assertEqual(done.status, 1)
        self.assertRegex(done.stderr, r"\A\S+: cannot listen on port %d: .+\n\Z" % port)
        done = run_script(SCRIPTS[0], "-p0", "-c0", "--admin", "no.such.invalid:9")
        self.assertEqual(done.status, 1)
        self.assertIn("no.such.invalid: no such address", done.stderr)

    def test_address_that_others_reach_is_warned_of(self):
        for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"),
                            ("::1", "[::1]")):  # fmt: skip
            del self.log.lines[:]
            try:
                self.start_server(admin=(host, 0))
            except OSError:
                continue  # without IPv6
            port = self.server.program.admin.port.address[1]
            line = "numbers on http://%s:%d/" % (shown, port)
            self.server.until(lambda: line in self.log.lines)  # noqa: B023
            self.server.do(lambda: True)
            warned = [line for line in self.log.lines if "whoever reaches" in line]
            self.assertEqual(len(warned), int(host == "0.0.0.0"), host)


class LogLines(unittest.TestCase):
    """What -v, -vv and --log-json print, for both scripts."""

    def lines(self, *outcomes, module=server_module, **options):
        log, file = module.Log(), io.StringIO()
        log.level = module.INFO
        for name, value in options.items():
            setattr(log, name, value)
        with mock.patch.object(module, "log", log):
            with mock.patch.object(sys, "stderr", file):
                for outcome in outcomes:
                    outcome.tell()
        return file.getvalue().splitlines()

    def outcome(self, **values):
        known = dict(visitor="203.0.113.9", id="tim", service="web", method="GET")
        known.update(target="/x", status=200, sent=5120, seconds=0.0123)
        return server_module.Outcome(**dict(known, **values))

    def test_line_of_a_request(self):
        (line,) = self.lines(self.outcome())
        found = line.split(" ", 1)[1].split()
        want = ["203.0.113.9", "tim", "web", '"GET', '/x"', "200", "5.1kB", "12ms"]
        self.assertEqual(found, want)
        cut = self.outcome(status=502, code="refused", cause="9000 is closed")
        self.assertTrue(self.lines(cut)[0].endswith(" refused: 9000 is closed"))
        end = self.outcome(status=0, method="TCP", target="")
        self.assertIn('"TCP" ', self.lines(end)[0])
        self.assertIn(" end ", self.lines(end)[0])

    def test_columns_stand_below_each_other(self):
        other = self.outcome(visitor="::1", target="/long/er", sent=7, seconds=70)
        places = {line.index(" 200 ") for line in self.lines(self.outcome(), other)}
        self.assertEqual(len(places), 1)

    def test_sizes_and_times(self):
        sizes = [0, 999, 1000, 5120, 9949, 9950, 999499, 999500, 10**9, 10**13]
        want = "0B 999B 1.0kB 5.1kB 9.9kB 10kB 999kB 1.0MB 1.0GB 10TB".split()
        self.assertEqual([server_module.short_size(x) for x in sizes], want)
        times = [0, 0.0004, 0.9994, 0.9995, 99.94, 99.96, 5969, 5970, 90000]
        want = "0ms 0ms 999ms 1.0s 99.9s 1m 99m 1h 25h".split()
        self.assertEqual([server_module.short_time(x) for x in times], want)

    def test_colour_says_the_class_of_the_status(self):
        codes = [(200, "32"), (304, "36"), (404, "33"), (502, "31"), (0, "2")]
        for status, colour in codes:
            (line,) = self.lines(self.outcome(status=status), coloured=True)
            self.assertIn("\x1b[%sm203." % colour, line)
            self.assertTrue(line.endswith("\x1b[0m"), line)

    def test_nothing_from_outside_moves_the_cursor(self):
        bad = self.outcome(target="/\x1b[2J\n", code="\x1b", cause="\r")
        for coloured in (False, True):
            (line,) = self.lines(bad, coloured=coloured)
            self.assertNotIn("\x1b", re.sub("\x1b\\[(32|0)m", "", line))

    def test_colours_are_for_terminals_whose_users_want_them(self):
        terminal, file = mock.Mock(), io.StringIO()
        terminal.isatty = lambda: True
        for module in (server_module, client_module):
            for environ, shown in (
                ({}, True),
                ({"NO_COLOR": ""}, True),
                ({"NO_COLOR": "1"}, False),
                ({"TERM": "dumb"}, False),
            ):
                with mock.patch.object(os, "environ", environ):
                    if os.name != "nt":
                        self.assertEqual(module.shows_colours(terminal), shown)
                    self.assertFalse(module.shows_colours(file))
                    self.assertFalse(module.shows_colours(None))

    def test_json_has_the_fields_and_the_text(self):
        (line,) = self.lines(self.outcome(code="cut"), as_json=True)
        found = json.loads(line)
        self.assertRegex(found.pop("time"), r"^\d{4}(-\d\d){2}T[\d:]{8}\.\d{3}Z$")
        self.assertIn('"GET /x"', found.pop("text"))
        want = dict(level="info", visitor="203.0.113.9", id="tim", service="web")
        want.update(method="GET", target="/x", status=200, code="cut")
        want.update(sent=5120, received=0, seconds=0.0123, stream=0)
        self.assertEqual(found, want)

    def test_json_has_a_traceback_in_its_line(self):
        log, file = client_module.Log(), io.StringIO()
        log.level, log.as_json = client_module.INFO, True
        with mock.patch.object(sys, "stderr", file):
            try:
                raise ValueError("a\nb")
            except ValueError as error:
                log.error("it is %s", "broken", trace=error)
        (line,) = file.getvalue().splitlines()
        found = json.loads(line)
        self.assertEqual((found["level"], found["text"]), ("error", "it is broken"))
        self.assertIn("Traceback", found["trace"])

    def test_every_frame_has_words_without_secrets(self):
        opening = b'{"service":"web","visitor":"192.0.2.1"}'
        listed = b'{"web":{"target":"9","auth":["abc:def"]}}'
        login = b'{"id":"tim","session":"abc","nonce":"abc","proof":"abc"}'
        hidden = ", session ..., nonce ..., proof ..."
        for kind, number, payload, words in (
            (Kind.OPEN, 3, opening, 'OPEN 3, service "web", visitor "192.0.2.1"'),
            (Kind.DATA, 3, b"GET /\r\n", 'DATA 3, 7 bytes: "GET /\\r\\n"'),
            (Kind.DATA, 3, b"x" * 99, 'DATA 3, 99 bytes: "%s" ...' % ("x" * 40)),
            (Kind.CREDIT, 3, b"\0\1\0\0", "CREDIT 3, 65536 more bytes may come"),
            (Kind.END, 3, b"", "END 3"),
            (Kind.RESET, 3, b"done ", "RESET 3, done"),
            (Kind.PING, 0, bytes(8), "PING"),
            (Kind.NOTE, 0, b"[{}]", "NOTE, 4 bytes"),
            (Kind.WELCOME, 0, b"[", "WELCOME"),
            (Kind.CONNECTED, 3, b"", "CONNECTED 3"),
            (Kind.LOGIN, 0, login, 'LOGIN, id "tim"' + hidden),
            (Kind.SERVICES, 0, listed, 'SERVICES, web {"target":"9","auth":"..."}'),
        ):
            for module in (server_module, client_module):
                found = module.describe(kind, number, memoryview(payload))
                self.assertEqual(found, words)
        long = module.describe(Kind.RESET, 3, b"x" * 9999)
        self.assertLessEqual(len(long), client_module.FRAME_TEXT + 4)


class Tokens(TunnelCase):
    """Who may have an id, when the server has a list of tokens."""

    log_in, hello, frames = Logins.log_in, Logins.hello, Logins.frames

    def start_with_tokens(self, **tokens):
        self.path = self.file(json.dumps(tokens or {"tim": "secret"}))
        return self.start_server(tokens=self.path)

    def refused(self, *arguments, **options):
        """What a client is told that ends with exit status 3."""
        client = self.start_client({"web": 1}, *arguments, wait=False, **options)
        client.until(lambda: client.error)
        self.assertEqual(client.error.status, 3)
        return str(client.error)

    def test_client_and_server_prove_that_they_know_the_token(self):
        self.start_with_tokens()
        self.start_client({"web": self.echo()}, token="secret")
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_wrong_token_and_unknown_id_get_the_same_answer(self):
        self.start_with_tokens()
        said = {self.refused(token="wrong"), self.refused("eva", token="secret")}
        self.assertEqual(said, {"no such id, or a wrong token"})
        self.assertIn("token", self.refused())
        self.assertEqual(self.tunnels, {})

    def test_unknown_id_costs_the_same_work_as_a_wrong_token(self):
        """Both lead to one proof and one comparison."""
        calls = []
        for name in ("prove", "is_proof"):
            real = getattr(server_module, name)

            def counted(*arguments, name=name, real=real):
                calls.append(name)
                return real(*arguments)

            change(self, server_module, **{name: counted})
        self.start_with_tokens()
        for id in ("tim", "eva"):
            self.refused(id, token="wrong")
        self.assertEqual(calls, ["prove", "is_proof"] * 2)

    def test_client_with_a_token_serves_no_server_without(self):
        self.start_server()
        self.assertIn("cannot prove", self.refused(token="secret"))

    def log_in_with(self, nonce, proof, id="tim"):
        """What a hand-made client is told for this LOGIN."""
        conn = self.hello()
        self.rest = read_head(conn)[1]
        (_, _, payload), *_ = self.frames(conn, Kind.CHALLENGE)
        self.rest = b""
        theirs = json.loads(payload.decode())["nonce"]
        login = {"id": id, "session": "s", "nonce": nonce, "proof": proof(theirs)}
        conn.sendall(frame(Kind.LOGIN, 0, json.dumps(login).encode()))
        kind, _, payload = self.frames(conn, Kind.WELCOME)[-1]
        return kind, json.loads(payload.decode())

    def test_proof_that_was_overheard_is_worth_nothing(self):
        self.start_with_tokens()
        mine, heard = server_module.make_nonce(), []

        def right(theirs):
            heard.append(server_module.prove("secret", "client", (theirs, mine), "tim"))
            return heard[-1]

        kind, said = self.log_in_with(mine, right)
        self.assertEqual(kind, Kind.WELCOME)
        kind, refused = self.log_in_with(mine, lambda theirs: heard[0])
        self.assertEqual((kind, refused["code"]), (Kind.GOODBYE, "refused"))
        kind, refused = self.log_in_with(mine, lambda theirs: said["proof"])
        self.assertEqual((kind, refused["code"]), (Kind.GOODBYE, "refused"))

    def test_login_with_a_broken_nonce_or_proof_is_refused(self):
        self.start_with_tokens()
        for nonce, proof in (("x", "y"), (None, None), ("0" * 64, {"a": []})):
            kind, said = self.log_in_with(nonce, lambda theirs, proof=proof: proof)
            self.assertEqual(kind, Kind.GOODBYE)
            self.assertIn(said["code"], ("protocol", "refused"))

    def test_newcomer_with_the_token_replaces_the_owner_for_good(self):
        self.start_with_tokens()
        old = self.start_client({"web": self.echo("old")}, token="secret")
        first = self.tunnels["tim"]
        self.start_client({"web": self.echo("new")}, token="secret", wait=False)
        old.until(lambda: old.error)
        self.assertEqual(old.error.status, 3)
        self.assertIn("another client", str(old.error))
        self.server.until(lambda: first.link.closed and self.serves("tim", {"web": 1}))
        self.assertEqual(self.echoed("web.tim.x")["service"], "new")
        self.assertIsNot(self.tunnels["tim"], first)

    def test_name_of_a_dead_link_is_free_at_once_for_who_has_the_token(self):
        self.start_with_tokens()
        mine = server_module.make_nonce()

        def right(theirs):
            return server_module.prove("secret", "client", (theirs, mine), "tim")

        self.log_in_with(mine, right)  # and never says a word again
        self.start_client({"web": self.echo()}, token="secret")
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_token_that_changes_ends_its_link_and_no_other(self):
        change(self, server_module, LOOK_TIME=0.05)
        self.start_with_tokens(tim="secret", eva="hers")
        tim = self.start_client({"web": self.echo("tim")}, token="secret")
        self.start_client({"web": self.echo("eva")}, "eva", token="hers")
        eva = self.tunnels["eva"]
        with open(self.path, "w") as file:
            file.write("{")
        self.server.until(lambda: any("not JSON" in x for x in self.log.lines))
        self.assertEqual(self.echoed("web.tim.x")["service"], "tim")
        with open(self.path, "w") as file:
            json.dump({"tim": "new", "eva": "hers"}, file)
        tim.until(lambda: tim.error)
        self.assertEqual(tim.error.status, 3)
        self.assertIn("no longer valid", str(tim.error))
        self.start_client({"web": self.echo("again")}, token="new")
        self.assertEqual(self.echoed("web.tim.x")["service"], "again")
        self.assertIs(self.tunnels["eva"], eva)

    def test_token_that_changed_at_the_client_first_brings_it_back(self):
        change(self, server_module, LOOK_TIME=0.05)
        change(self, client_module, LOOK_TIME=3600)
        self.start_with_tokens()
        mine = self.file("secret\n")
        watched = client_module.Watched([mine], client_module.parse_token)
        client = self.start_client({"web": self.echo()}, token=watched)
        old = self.tunnels["tim"]
        for path, content in ((mine, "new\n"), (self.path, '{"tim": "new"}')):
            with open(path, "w") as file:
                file.write(content)
        self.server.until(lambda: self.tunnels.get("tim") not in (None, old))
        self.server.until(lambda: self.serves("tim", {"web": 1}))
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        self.assertIsNone(client.error)

    def test_id_that_is_known_and_not_connected_is_a_503(self):
        self.start_with_tokens(tim="secret")
        said = self.raw(self.ask("web.tim.x"))
        self.assertIn(b"HTTP/1.1 503", said)
        self.assertIn(b"\r\nRetry-After: 5\r\n", said)
        self.assertIn(b"HTTP/1.1 404", self.raw(self.ask("web.eva.x")))
        self.start_client({"web": self.echo()}, token="secret")
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        self.assertIn(b"HTTP/1.1 404", self.raw(self.ask("other.tim.x")))

    def test_refused_login_names_its_id_to_the_log_only(self):
        self.start_with_tokens()
        self.refused("eva", token="secret")
        self.server.until(lambda: any("link closed" in x for x in self.log.lines))
        lines = [x for x in self.log.lines if "refused" in x or "link closed" in x]
        self.assertRegex(lines[0], "as eva refused: no such id, or a wrong token")
        self.assertRegex(lines[1], "^client 127.0.0.1: link closed")

    def test_token_that_changes_ends_also_a_link_that_was_replaced(self):
        change(self, server_module, LOOK_TIME=0.05)
        self.start_with_tokens()
        old = self.log_in_by_hand()
        self.frames(old, Kind.URLS)
        tunnel = self.tunnels["tim"]
        stream = self.server.do(lambda: tunnel.link.open(End(), {"service": "web"}))
        self.start_client({"web": 1}, token="secret")
        self.server.until(lambda: self.tunnels.get("tim") not in (None, tunnel))
        self.assertTrue(stream.open)  # it may end what it has begun
        with open(self.path, "w") as file:
            json.dump({"tim": "new"}, file)
        self.server.until(lambda: tunnel.link.closed)

    def log_in_by_hand(self):
        """A client with the token, which goes on when it is told to go."""
        mine = server_module.make_nonce()

        def right(theirs):
            return server_module.prove("secret", "client", (theirs, mine), "tim")

        conns, hello = [], self.hello
        self.hello = lambda: conns.append(hello()) or conns[-1]
        self.log_in_with(mine, right)
        del self.hello
        conns[0].sendall(frame(Kind.SERVICES, 0, b'{"web": {}}'))
        return conns[0]

    def test_token_that_goes_between_login_and_welcome_still_counts(self):
        self.start_server()
        client = self.start_client({"web": 1}, wait=False, token="secret")
        client.until(lambda: client.error)
        self.assertEqual(client.error.status, 3)
        tunnel = client_module.Tunnel.__new__(client_module.Tunnel)
        tunnel.client, tunnel.token = client.program, "secret"
        tunnel.nonces = server_module.make_nonce(), server_module.make_nonce()
        client.program.refusal = None
        tunnel.on_welcome({})
        self.assertEqual(client.program.refusal.status, 3)

    def test_fingerprint_without_tls_is_a_mistake(self):
        with self.assertRaises(ValueError):
            make_client({}, pin=b"x" * 32)

    def test_token_file_that_others_can_read_is_warned_about(self):
        if os.name == "nt":
            self.skipTest("no such modes here")
        for mode, warned in ((0o644, True), (0o640, True), (0o600, False)):
            del self.log.lines[:]
            path = self.file('{"tim": "secret"}', mode)
            self.start_server(tokens=path)
            found = any("chmod 600 " + path in line for line in self.log.lines)
            self.assertEqual(found, warned)


class FrontProxies(TunnelCase):
    """What proxies before the server say of who comes: --trust-proxy and
    --proxy-protocol."""

    def start_behind(self, *networks, services=None, **options):
        self.start_server(trust_proxy=networks, **options)
        self.start_client(services or {"web": self.echo()})

    def told(self, *lines, host="web.tim.x"):
        """What the service is told in X-Forwarded-*, and as its Host."""
        said = self.raw(self.ask(host, *lines))
        self.assertIn(b" 200 ", said, said)
        found = json.loads(said.partition(b"\r\n\r\n")[2].decode())["headers"]
        fields = {name.lower(): value for name, value in found}
        names = ("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "host")
        return tuple(fields[name] for name in names)

    def test_fields_of_a_trusted_proxy_count(self):
        self.start_behind("127.0.0.0/8", "10.0.0.0/8", "2001:db8::/32")
        host = "web.tim.x"
        table = [
            ("203.0.113.9", "203.0.113.9"),
            ("203.0.113.9, 10.1.1.1", "203.0.113.9"),  # two of ours, one after another
            ("6.6.6.6, 203.0.113.9", "203.0.113.9"),  # the left one anybody can write
            ("6.6.6.6,203.0.113.9 ,\t10.1.1.1", "203.0.113.9"),
            ("10.1.1.1, 10.2.2.2", "10.1.1.1"),
            ("203.0.113.9:4711", "203.0.113.9"),
            ("[2001:db9::7]:4711", "2001:db9::7"),
            ("::ffff:203.0.113.9", "203.0.113.9"),
            ("2001:db9::7, 2001:db8::1", "2001:db9::7"),
            ("2001:470:1f0b::1", "2001:470:1f0b::1"),
            ("2a00:1450:4001:81b::200e", "2a00:1450:4001:81b::200e"),
            ("2a00:1450:4001:81b:a:b:c:200e", "2a00:1450:4001:81b:a:b:c:200e"),
            ("2001:1234:db8::1", "2001:1234:db8::1"),
            ("[2001:db9::7]x", "unknown"),
            ("unknown", "unknown"),
            ("203.0.113.9, unknown", "unknown"),
            ("203.0.113.9, unknown, 10.1.1.1", "unknown"),
            ("203.0.113.9,", "unknown"),
            ("", "unknown"),
            ("203.0.113.9" + 40 * ", 10.1.1.1", "10.1.1.1"),  # too many to look at
        ]
        for said, address in table:
            found = self.told("X-Forwarded-For: " + said)
            self.assertEqual(found, (address, "http", host, host), said)
        found = self.told("X-Forwarded-For: 6.6.6.6", "X-Forwarded-For: 203.0.113.9")
        self.assertEqual(found[0], "203.0.113.9")
        self.assertEqual(self.told()[0], "127.0.0.1")

    def test_long_field_of_a_front_is_read_in_linear_time(self):
        """In quadratic time this took many minutes, and so ended the suite."""
        fronts = server_module.Fronts(["10.0.0.0/8"], False)
        raw = "\r\nX-Forwarded-For: %s, 10.0.0.7" % ("1" * 500000)
        self.assertEqual(fronts.read(raw, "10.0.0.1", "http")[0], "unknown")

    def test_scheme_and_host_of_a_trusted_proxy_count(self):
        self.start_behind("127.0.0.1")
        asked = "X-Forwarded-Proto: https", "X-Forwarded-Host: web.tim.x:8443"
        found = self.told(*asked, host="backend:9000")
        self.assertEqual(found[1:], ("https", "web.tim.x:8443", "web.tim.x:8443"))
        self.assertEqual(self.told("X-Forwarded-Proto: gopher")[1], "http")
        self.assertEqual(self.told("X-Forwarded-Proto: http, HTTPS")[1], "https")
        for broken in ("a b", "a@b", "a.b:x"):
            said = self.raw(self.ask("web.tim.x", "X-Forwarded-Host: " + broken))
            self.assertIn(b"HTTP/1.1 400", said)

    def test_nobody_else_is_believed(self):
        for networks in ((), ("192.0.2.0/24",)):
            self.start_behind(*networks)
            lines = ("X-Forwarded-For: 203.0.113.9", "X-Forwarded-Proto: https")
            found = self.told(*lines, "X-Forwarded-Host: other.tim.x")
            self.assertEqual(found, ("127.0.0.1", "http", "web.tim.x", "web.tim.x"))

    def test_gates_and_the_log_go_by_the_visitor(self):
        web = {"target": self.echo(), "visitors": ["203.0.113.0/24"]}
        outcomes = []
        self.start_behind("127.0.0.1", services={"web": web})
        self.server.program.visitors.observers.append(outcomes.append)
        found = self.told("X-Forwarded-For: 203.0.113.9")
        self.assertEqual(found[0], "203.0.113.9")
        for said in ("6.6.6.6", "203.0.113.9, 6.6.6.6", "127.0.0.1", "nobody"):
            answer = self.get("web.tim.x", headers={"X-Forwarded-For": said})
            self.assertEqual(answer.status, 403, said)
        self.server.until(lambda: len(outcomes) == 5)
        visitors = [outcome.visitor for outcome in outcomes]
        seen = ["203.0.113.9", "6.6.6.6", "6.6.6.6", "127.0.0.1", "unknown"]
        self.assertEqual(visitors, seen)

    def test_visitors_that_a_front_brings_one_after_another_are_told_apart(self):
        self.start_behind("127.0.0.1")
        conn = self.keep()
        for address in ("203.0.113.9", "203.0.113.10", "203.0.113.9"):
            fields = {"X-Forwarded-For": address}
            found = self.echoed("web.tim.x", headers=fields, conn=conn)
            said = {name.lower(): value for name, value in found["headers"]}
            self.assertEqual(said["x-forwarded-for"], address)

    def test_redirect_lets_connect_through(self):
        self.start_server(trust_proxy=["127.0.0.1"])
        self.start_client({"ssh": {"target": 1, "tcp": True}})
        site = server_module.RedirectSite(self.server.program, "http")
        raw = head(first="CONNECT ssh.tim.x:22 HTTP/1.1")
        request = server_module.Request(raw, "127.0.0.1")
        found = self.server.do(lambda: site.resolve(request))
        self.assertIsInstance(found, server_module.Service)

    def test_redirect_does_not_go_round_behind_a_front_with_tls(self):
        self.start_server(trust_proxy=["127.0.0.1"])
        self.start_client({"web": self.echo()})
        site = server_module.RedirectSite(self.server.program, "http")
        for scheme, kind in (("http", server_module.Page), ("https", None)):
            raw = head("X-Forwarded-Proto: " + scheme, host="Host: web.tim.x")
            front = self.server.program.visitors.fronts
            hop = "127.0.0.1", "http", server_module.Recent(), front
            request = server_module.Request(raw, *hop)
            found = self.server.do(lambda asked=request: site.resolve(asked))
            self.assertIsInstance(found, kind or server_module.Service)

    # The PROXY protocol.

    def header(self, version=1, visitor="203.0.113.9", **more):
        said = {"visitor": visitor, "port": 4711, "to": "192.0.2.1", "to_port": 80}
        return client_module.proxy_header(version, dict(said, **more))

    def dial(self):
        conn = super().dial()
        conn.sendall(self.header())
        return conn

    def test_every_connection_has_its_header(self):
        self.start_server(trust_proxy=["127.0.0.1"], proxy_protocol=True)
        self.log_in(services=b'{"web": {}}')
        self.server.until(lambda: self.serves("tim", ["web"]))
        registry = self.server.program.registry
        self.assertEqual(registry.pools["tim"].tunnel.peer, "client 203.0.113.9")
        for data in (self.header(1), self.header(2)):
            for step in (len(data), 1):
                conn = self.visit()
                for i in range(0, len(data), step):
                    conn.sendall(data[i : i + step])
                    self.server.do(lambda: True)
                said = self.raw(self.ask("no.tim.x"), conn)
                self.assertIn(b"HTTP/1.1 404", said)
        # The last byte of the header and the request may come together.
        said = self.raw(self.header() + self.ask("no.tim.x"))
        self.assertIn(b"HTTP/1.1 404", said)

    hello, log_in = Logins.hello, Logins.log_in

    def test_service_is_told_who_came_by_the_header(self):
        self.start_server(trust_proxy=["127.0.0.1"], proxy_protocol=True)
        fronted = self.service(self.relay_with(self.header()))
        self.start_client({"web": self.echo()}, port=fronted)
        conn = self.visit()
        conn.sendall(self.header(2, "2001:db8::9", to="2001:db8::1"))
        found = self.raw(self.ask("web.tim.x"), conn)
        self.assertIn(b'["X-Forwarded-For", "2001:db8::9"]', found)

    def relay_with(self, header):
        """A front before the clients' port, for one connection at a time."""

        def handler(conn):
            address = self.server.program.client_address[:2]
            with contextlib.closing(socket.create_connection(address)) as other:
                other.sendall(header)
                pairs = {conn: other, other: conn}
                while True:
                    for ready in select.select(list(pairs), [], [])[0]:
                        data = ready.recv(65536)
                        if not data:
                            return
                        pairs[ready].sendall(data)

        return handler

    def test_who_is_not_told_by_the_header_is_not_the_front(self):
        self.start_server(trust_proxy=["127.0.0.1"], proxy_protocol=True)
        fronted = self.service(self.relay_with(self.header()))
        web = {"target": self.echo(), "visitors": ["127.0.0.0/8", "10.1.1.1"]}
        self.start_client({"web": web}, port=fronted)
        for data in (b"PROXY UNKNOWN\r\n", ProxyHeaders.NOTHING_TOLD[2]):
            conn = self.visit()
            conn.sendall(data)
            forged = self.ask("web.tim.x", "X-Forwarded-For: 10.1.1.1")
            self.assertIn(b"HTTP/1.1 403", self.raw(forged, conn))

    def test_connection_without_a_header_is_cut(self):
        self.start_server(trust_proxy=["127.0.0.1"], proxy_protocol=True)
        for data in (self.ask("web.tim.x"), b"\x16\3\1", b"PROXY TCP4 a b c d\r\n"):
            with self.assertRaises(ConnectionResetError):
                self.raw(data + b"x")
                raise AssertionError("it was not cut")

    def test_header_is_believed_of_trusted_addresses_only(self):
        self.start_server(trust_proxy=["192.0.2.0/24"], proxy_protocol=True)
        with self.assertRaises((ConnectionResetError, BrokenPipeError)):
            self.raw(self.header() + self.ask("web.tim.x"))
            raise AssertionError("it was not cut")

    def test_header_without_trust_is_no_configuration(self):
        with self.assertRaisesRegex(ValueError, "--trust-proxy"):
            make_server(proxy_protocol=True)

    def test_header_that_does_not_come_ends_the_connection(self):
        change(self, server_module, HANDSHAKE_TIME=PATIENCE)
        self.start_server(trust_proxy=["127.0.0.1"], proxy_protocol=True)
        conn = self.visit()
        conn.sendall(b"PROXY ")
        visitors = self.server.program.visitors.all
        self.server.until(lambda: any(preface.buffer for preface in visitors))
        self.server.pass_time(server_module.HANDSHAKE_TIME)
        self.assertEqual(conn.recv(1), b"")
        self.assertFalse(self.server.program.visitors.all)

    def test_stopping_server_does_not_wait_for_headers(self):
        change(self, server_module, HANDSHAKE_TIME=10 * PATIENCE)
        late = {"drain": 10 * PATIENCE}
        self.start_server(trust_proxy=["127.0.0.1"], proxy_protocol=True, **late)
        conn = self.visit()
        conn.sendall(b"PROXY ")
        self.server.until(lambda: self.server.program.visitors.all)
        self.server.do(lambda: self.server.program.stop() or True)
        self.server.thread.join(PATIENCE)
        self.assertFalse(self.server.thread.is_alive())

    # To the target.

    def target_with_header(self, count=1):
        """The port of a service that says what came before each request's head; and how
        many connections it had."""
        seen = []

        def handler(conn):
            line = b""
            while not line.endswith(b"\r\n"):
                line += conn.recv(1)
            seen.append(line)
            while read_head(conn)[0]:
                conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        return self.service(handler), seen

    def test_target_is_told_who_comes(self):
        port, seen = self.target_with_header()
        target = {"target": port, "proxy_protocol": 1}
        self.start(web=target)
        conn = self.keep()
        for _ in range(3):
            self.assertEqual(self.get("web.tim.x", conn=conn).content, b"ok")
        mine, theirs = conn.sock.getsockname()[1], conn.sock.getpeername()[1]
        line = "PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n" % (mine, theirs)
        self.assertEqual(seen, [line.encode()])  # one header, for one visitor

    def test_stream_carries_one_visitor_only(self):
        port, seen = self.target_with_header()
        target = {"target": port, "proxy_protocol": 1}
        self.start_behind("127.0.0.1", services={"web": target})
        conn = self.keep()
        addresses = ["203.0.113.9", "203.0.113.9", "203.0.113.10", "203.0.113.9"]
        for address in addresses:
            fields = {"X-Forwarded-For": address}
            answer = self.get("web.tim.x", headers=fields, conn=conn)
            self.assertEqual(answer.content, b"ok")
        found = [line.split()[2].decode() for line in seen]
        self.assertEqual(found, ["203.0.113.9", "203.0.113.10", "203.0.113.9"])
        self.assertEqual({line.split()[4] for line in seen}, {b"0"})

    def test_target_of_a_tcp_port_is_told_before_the_first_byte(self):
        ports = TCPPorts.free_ports(self, 1)
        port = self.service(lambda conn: conn.sendall(conn.recv(1000)))
        self.start_server(tcp_ports=ports, bind="127.0.0.1")
        target = {"target": port, "tcp": ports[0], "proxy_protocol": 2}
        self.start_client({"ssh": target})
        self.server.until(lambda: self.server.program.tcp.open)
        with socket.create_connection(("127.0.0.1", ports[0]), PATIENCE) as conn:
            ends = conn.getsockname()[1], conn.getpeername()[1]
            got = b""
            while len(got) < 28:
                got += conn.recv(100)
        found, used = server_module.parse_proxy_header(bytearray(got))
        self.assertEqual(found, ("127.0.0.1", ends[0], "127.0.0.1", ends[1]))
        self.assertEqual(used, 28)


class Domains(TunnelCase):
    """Names of a service's own, that the token file grants."""

    GRANTS = {
        "tim": {"token": "secret", "domains": ["www.example.org", "*.apps.dev"]},
        "eva": {"token": "other", "domains": ["www.example.org"]},
        "pia": "third",
    }
    start_with_tokens = Tokens.start_with_tokens

    def start_granted(self, **options):
        self.start_with_tokens(**self.GRANTS)

    def publish(self, id="tim", token="secret", domains=(), name="web", target=None):
        listed = {name: {"target": target or self.echo(id), "domains": list(domains)}}
        return self.start_client(listed, id, wait=False, token=token)

    def url(self, client, name="web"):
        client.until(lambda: name in client.program.urls)
        return client.program.urls[name]

    def test_granted_domain_leads_to_the_service(self):
        self.start_granted()
        names = ["www.example.org", "a.apps.dev", "*.apps.dev"]
        url = self.url(self.publish(domains=names))
        port = self.server.program.visitor_address[1]
        self.assertTrue(url.startswith("http://web.tim.localhost:%d/ " % port), url)
        own = ["http://%s:%d/" % (name, port) for name in names]
        self.assertEqual(url.split(" ")[1:], own)
        for host in ("WWW.example.org.", "a.apps.dev:1", "b.apps.dev"):
            self.assertEqual(self.echoed(host)["service"], "tim", host)
        self.assertEqual(self.echoed("web.tim.x")["service"], "tim")
        for host in ("example.org", "apps.dev", "a.b.apps.dev", "x.www.example.org"):
            self.assertEqual(self.get(host).status, 404, host)

    def test_what_is_not_granted_is_not_published(self):
        self.start_granted()
        wrong = ("example.org", "x.y.apps.dev", "apps.dev", "*.example.org")
        for number, name in enumerate(wrong):
            client = self.publish(domains=[name], name="web%d" % number)
            said = self.url(client, "web%d" % number)
            self.assertIn("does not grant %s to tim" % name, said)
            self.assertEqual(self.get(name.replace("*", "a")).status, 404)
            client.end()
        third = self.publish("pia", "third", ["www.example.org"])
        self.assertIn("does not grant", self.url(third))

    def test_without_tokens_nothing_is_granted(self):
        self.start_server()
        self.assertIn("grant", self.url(self.publish(token="", domains=["a.b"])))

    def test_domain_has_one_owner_at_a_time(self):
        self.start_granted()
        tim = self.publish(domains=["www.example.org"])
        self.url(tim)
        eva = self.publish("eva", "other", ["www.example.org"])
        self.assertEqual(self.url(eva), "error: www.example.org belongs to tim web")
        self.assertEqual(self.echoed("www.example.org")["service"], "tim")
        tim.end()
        owners = self.server.program.registry.names.owners
        self.server.until(lambda: not owners)
        self.assertIn(self.get("www.example.org").status, (404, 503))
        again = self.publish("eva", "other", ["www.example.org"], name="web2")
        self.assertIn("http://www.example.org:", self.url(again, "web2"))
        self.assertEqual(self.echoed("www.example.org")["service"], "eva")

    def test_name_that_is_granted_goes_before_a_wildcard(self):
        grants = {
            "tim": {"token": "secret", "domains": ["www.example.org"]},
            "bob": {"token": "b", "domains": ["*.example.org"]},
        }
        self.start_with_tokens(**grants)
        names = ["*.example.org", "www.example.org"]
        bob = self.publish("bob", "b", names)
        self.assertIn("does not grant www.example.org to bob", self.url(bob))
        bob = self.publish("bob", "b", names[:1], name="web2")
        self.url(bob, "web2")
        self.assertEqual(self.echoed("other.example.org")["service"], "bob")
        self.assertEqual(self.get("www.example.org").status, 503)
        self.url(self.publish(domains=["www.example.org"]))
        self.assertEqual(self.echoed("www.example.org")["service"], "tim")

    def test_client_that_is_leaving_keeps_no_domain_that_it_lost(self):
        change(self, server_module, LOOK_TIME=0.05)
        self.start_granted()
        tim = self.publish(domains=["www.example.org"], target=self.deaf())
        self.url(tim)
        conn = self.visit()
        conn.sendall(self.ask("www.example.org"))
        self.server.until(self.exchanges)
        link = self.server.program.registry.pools["tim"].tunnel.link
        self.server.do(lambda: setattr(link, "draining", True) or True)
        grants = dict(self.GRANTS, tim="secret")
        with open(self.path, "w") as file:
            json.dump(grants, file)
        owners = self.server.program.registry.names.owners
        self.server.until(lambda: not owners)

    def deaf(self):
        """The port of a service that never answers."""
        return self.service(lambda conn: conn.recv(100000) and conn.recv(1))

    def test_domain_of_a_client_that_is_away_is_offline(self):
        self.start_granted()
        for host in ("www.example.org", "any.apps.dev"):
            answer = self.get(host)
            self.assertEqual(answer.status, 503, host)
            self.assertIn("Retry-After", answer.headers)

    def test_domain_goes_when_the_list_no_longer_has_it(self):
        self.start_granted()
        tim = self.publish(domains=["a.apps.dev"])
        self.url(tim)
        tim.program.services = client_module.parse_services([("web", self.echo("new"))])
        tim.do(lambda: tim.program.uplink.tunnel.publish() or True)
        owners = self.server.program.registry.names.owners
        self.server.until(lambda: not owners)
        self.assertEqual(self.get("a.apps.dev").status, 404)

    def test_grants_that_change_count_at_once_and_what_runs_may_end(self):
        change(self, server_module, LOOK_TIME=0.05)
        self.start_granted()
        tim = self.publish(domains=["www.example.org"])
        self.url(tim)
        post = self.ask("web.tim.x", "Content-Length: 5", first="POST / HTTP/1.1")
        conn = self.visit()
        conn.sendall(post)
        self.server.until(self.exchanges)
        grants = {"tim": {"token": "secret", "domains": ["new.example.org"]}}
        with open(self.path, "w") as file:
            json.dump(grants, file)
        tim.until(lambda: "grant" in tim.program.urls["web"])
        self.assertEqual(self.get("www.example.org").status, 404)
        self.assertIn(b" 200 ", self.raw(b"12345", conn))
        self.assertIsNone(tim.error)

    def test_domain_may_pass_tls_through_or_be_for_connect(self):
        self.start_granted()
        shouting = TCPPorts.shouting(self)
        listed = {"target": shouting, "tcp": True, "domains": ["a.apps.dev"]}
        self.start_client({"ssh": listed}, token="secret")
        conn = self.visit()
        conn.sendall(b"CONNECT a.apps.dev:22 HTTP/1.1\r\nHost: a.apps.dev:22\r\n\r\n")
        self.assertIn(b" 200 ", read_head(conn)[0])

    def test_domains_that_are_none_are_no_configuration(self):
        for wrong in ("www.example.org", [1], ["x"], [None], {"a": 1}):
            with self.assertRaises(ValueError, msg=wrong):
                client_module.parse_service({"target": 1, "domains": wrong})


class HandMadeServer(TunnelCase):
    """The client, against a server of frames by hand."""

    def greet(self, **services):
        """A logged-in client's connection, as the server has it."""
        with contextlib.closing(socket.socket()) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            listener.settimeout(PATIENCE)
            self.start_client(services, wait=False, port=listener.getsockname()[1])
            conn = listener.accept()[0]
        self.addCleanup(conn.close)
        conn.settimeout(PATIENCE)
        read_head(conn)
        conn.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n"
            + frame(Kind.CHALLENGE, 0, b"{}")
        )
        self.reader = client_module.FrameReader("client")
        self.expect(conn, Kind.LOGIN)
        conn.sendall(frame(Kind.WELCOME, 0, b"{}"))
        self.expect(conn, Kind.SERVICES)
        return conn

    def expect(self, conn, *kinds):
        """The next frames must be of these kinds; their payloads. Whole DATA only."""
        payloads = []
        while len(payloads) < len(kinds):
            data = conn.recv(65536)
            self.assertTrue(data, "it closed")
            self.reader.push(memoryview(data))
            for kind, _, payload in iter(self.reader.next, None):
                self.assertEqual(kind, kinds[len(payloads)])
                payloads.append(bytes(payload))
        return payloads

    def test_data_and_end_may_follow_open_at_once(self):
        def handler(conn):
            got = b"".join(iter(lambda: conn.recv(100), b""))
            conn.sendall(got.upper())

        conn = self.greet(web=self.service(handler))
        opening = frame(Kind.OPEN, 1, b'{"service":"web"}')
        conn.sendall(opening + frame(Kind.DATA, 1, b"hello") + frame(Kind.END, 1))
        self.assertEqual(self.expect(conn, Kind.DATA, Kind.END), [b"HELLO", b""])

    def test_only_what_the_list_names_is_dialled(self):
        conn = self.greet(web=1)
        conn.sendall(frame(Kind.OPEN, 1, b'{"service":"127.0.0.1:22"}'))
        conn.sendall(frame(Kind.OPEN, 2, b'{"service":["web"]}'))
        conn.sendall(frame(Kind.OPEN, 3, b"{}"))
        for payload in self.expect(conn, *[Kind.RESET] * 3):
            self.assertTrue(payload.startswith(b"no-service"))

    def test_reset_gives_the_dial_up(self):
        conn = self.greet(web=self.deaf_port())
        conn.sendall(frame(Kind.OPEN, 1, b'{"service":"web"}') + frame(Kind.RESET, 1))
        conn.sendall(frame(Kind.PING, 0, b"12345678"))
        self.expect(conn, Kind.PONG)
        conn.close()

    def test_violation_is_answered_with_goodbye_and_a_new_dial(self):
        conn = self.greet(web=1)
        conn.sendall(frame(Kind.DATA, 1, b"x"))
        (payload,) = self.expect(conn, Kind.GOODBYE)
        self.assertIn(b"protocol", payload)


class HostileServerOfInspections(HandMadeServer):
    def start_client(self, services, **options):
        self.client = super().start_client(services, inspect=0, **options)
        return self.client

    def test_ranges_that_a_server_made_up_cost_nothing(self):
        kept = self.service(lambda conn: conn.sendall(conn.recv(99)))
        conn = self.greet(web=kept)
        conn.sendall(frame(Kind.OPEN, 1, b'{"service":"web"}'))
        conn.sendall(frame(Kind.DATA, 1, b"hello"))
        self.expect(conn, Kind.DATA, Kind.END)
        made_up = [[1.5, 2.5], [3, 1], [-5, 1 << 62], [1 << 70, 1e300], [0, 5], None]
        made_up += [[[], {}], [0, 1 << 62], [9, 9]]
        notes = [{"stream": 1, "request": x, "answer": x} for x in made_up]
        notes += [{"stream": 1 << 40, "request": [0, 5]}, {"stream": "x"}, {}]
        conn.sendall(frame(Kind.NOTE, 0, json.dumps(notes).encode()))
        inspector = self.client.program.inspector
        self.client.until(lambda: inspector.count == len(notes))
        self.client.do(inspector.sweep)
        kept = sum(len(e.request) + len(e.answer) for e in inspector.entries)
        self.assertEqual(inspector.kept, kept)
        held = [len(s.data) for t in inspector.tapes.values() for s in (t.came, t.went)]
        self.assertEqual(inspector.taped, sum(held))


class HostileNotes(HandMadeServer):
    def test_junk_in_a_note_costs_nothing(self):
        conn = self.greet(web=1)
        junk = [1, None, [], {}, {"status": "x", "request": [1], "answer": [None, -1]}]
        junk += [{"visitor": 7, "stream": 1e400, "seconds": True, "dropped": "\x1b"}]
        junk += [{"cause": "\x1b[2J" * 9, "request": [[], {}], "target": "/\n/"}]
        junk += [{"request": [1.5, 2.5], "answer": [9, 3], "stream": 0.5}]
        conn.sendall(frame(Kind.NOTE, 0, json.dumps(junk).encode()))
        conn.sendall(frame(Kind.PING, 0, b"12345678"))
        self.expect(conn, Kind.PONG)

    def test_note_that_is_no_list_ends_the_link(self):
        conn = self.greet(web=1)
        conn.sendall(frame(Kind.NOTE, 0, b"{}"))
        (payload,) = self.expect(conn, Kind.GOODBYE)
        self.assertIn(b"not a JSON list", payload)

    def test_at_most_a_thousand_are_read(self):
        outcomes = []
        with mock.patch.object(client_module.Outcome, "tell", outcomes.append):
            conn = self.greet(web=1)
            conn.sendall(frame(Kind.NOTE, 0, b"[%s0]" % (b"0," * 5000)))
            conn.sendall(frame(Kind.PING, 0, b"12345678"))
            self.expect(conn, Kind.PONG)
        self.assertEqual(len(outcomes), client_module.NOTES_LIMIT)


class Reconnects(TunnelCase):
    def test_wait_for_an_id_that_was_taken_ends_with_the_login(self):
        client = make_client({})
        self.addCleanup(client.loop.close)
        uplink = client.uplink
        uplink.on_goodbye(object(), "taken", "the id tim is taken")
        self.assertEqual(uplink.wait, client_module.TAKEN_WAIT)
        uplink.on_login()
        self.assertEqual(uplink.wait, client_module.FIRST_WAIT)

    def test_client_comes_back_to_a_server_that_comes_back(self):
        port, client_port = free_port(), free_port()
        self.start_server(port=port, client_port=client_port)
        self.start_client({"web": self.echo()})
        self.server.end()
        self.start_server(port=port, client_port=client_port)
        self.server.until(lambda: self.serves("tim", {"web": 1}))
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_name_of_the_server_that_is_not_found_for_a_while(self):
        self.start_server()
        real, asked = client_module.Resolver.look_up, []

        def look_up(host, port, flags):
            asked.append(flags)
            if host == "tunnel.test" and asked.count(0) > 2:
                host = "127.0.0.1"
            elif flags == 0:
                raise socket.gaierror(socket.EAI_NONAME, "no such name")
            return real(host, port, flags)

        change(self, client_module.Resolver, look_up=staticmethod(look_up))
        self.start_client({"web": self.echo()}, host="tunnel.test")
        port = self.server.program.client_address[1]
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        said = "tunnel.test:%d: cannot find its address" % port
        self.assertTrue(any(said in line for line in self.log.lines))

    def test_waiting_grows_to_its_limit_and_is_never_the_same(self):
        loop = fake_loop(client_module)
        self.addCleanup(loop.close)
        uplink = make_client({}, loop).uplink
        waits = []
        for _ in range(12):
            uplink.retry("down")
            waits.append(uplink.timer.due - loop.clock())
        self.assertLessEqual(waits[0], client_module.FIRST_WAIT)
        self.assertLessEqual(max(waits), client_module.LONGEST_WAIT)
        self.assertGreater(waits[-1], client_module.LONGEST_WAIT / 2 - 0.01)
        self.assertEqual(len(set(waits)), len(waits))

    def test_link_that_was_lost_is_no_failed_attempt(self):
        port, client_port = free_port(), free_port()
        self.start_server(port=port, client_port=client_port)
        client = self.start_client({"web": self.echo()}, max_attempts=1)
        self.server.do(lambda: self.tunnels["tim"].link.close("for a test") or True)
        self.server.until(lambda: self.serves("tim", {"web": 1}))
        self.assertIsNone(client.error)

    def test_change_of_the_file_takes_effect_without_dropping_a_stream(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        path = os.path.join(folder, "services")
        go = threading.Event()

        def slow(conn):
            read_head(conn)
            go.wait(PATIENCE)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow")

        def write(**services):
            with open(path, "w") as file:
                json.dump(services, file)

        write(web=self.service(slow))
        self.start_server()
        port = self.server.program.client_address[1]
        watched = client_module.Watched([path], client_module.parse_file)
        client = Backstage(
            client_module,
            lambda loop: make_client({}, loop, file=watched, port=port, id="tim"),
            self.selector,
        )
        self.addCleanup(client.end)
        self.server.until(lambda: self.serves("tim", {"web": 1}))
        running = self.visit()
        running.sendall(self.ask("web.tim.x"))
        self.wait_for_streams(1)
        write(other=self.echo("other"))
        self.server.until(lambda: self.serves("tim", {"other": 1}))
        self.assertEqual(self.echoed("other.tim.x")["service"], "other")
        self.assertEqual(self.get("web.tim.x").status, 404)
        go.set()
        self.assertIn(b"slow", self.raw(b"", running))

    def test_kept_stream_is_not_used_after_its_target_changed(self):
        self.start(web=self.echo("old"))
        conn = self.keep()
        self.assertEqual(self.echoed("web.tim.x", conn=conn)["service"], "old")
        program = self.client.program
        new = client_module.parse_services([("web", self.echo("new"))])
        pool = self.server.program.registry.pools["tim"]
        before = dict(pool.services)
        program.services = new
        self.client.do(program.uplink.tunnel.publish)
        self.server.until(lambda: pool.services != before)
        self.assertEqual(self.echoed("web.tim.x", conn=conn)["service"], "new")


class Moves(TunnelCase):
    """A client whose machine gets another address, or sleeps."""

    ASIDE = 3600  # seconds that no test waits: what is due then is made due by hand

    def setUp(self):
        super().setUp()
        self.addresses = ["192.0.2.1"]  # what the kernel says; the last stays
        self.wall, self.real = 1e9, client_module.source_address
        change(self, client_module, source_address=self.source_address)
        change(self, client_module, wall_clock=lambda: self.wall)

    def source_address(self, sock):
        return self.addresses.pop(0) if self.addresses[1:] else self.addresses[0]

    def looks(self, *answers):
        """What is found at looks that the kernel answers so."""
        self.addresses = [*answers, None]
        place = client_module.Whereabouts(None)
        return [bool(place.change()) for _ in answers[1:]]

    def test_address_that_changes_counts_at_the_second_look_and_once(self):
        table = [
            ("aaaa", [0, 0, 0]),
            ("abbbb", [0, 1, 0, 0]),
            ("abab", [0, 0, 0]),
            ("abba", [0, 1, 0]),
            ("abbaabb", [0, 1, 0, 0, 0, 0]),  # with b it was alive too
            ("abbcc", [0, 1, 0, 1]),
            ("a--bb", [0, 0, 0, 1]),  # no way at the moment is no move
            ("ab-bb", [0, 0, 0, 1]),
            ("--aab", [0, 0, 0, 0]),
        ]
        for answers, wanted in table:
            said = [None if x == "-" else x for x in answers]
            self.assertEqual(self.looks(*said), list(map(bool, wanted)), answers)

    def test_wall_clock_that_runs_ahead_tells_of_a_sleep(self):
        place = client_module.Whereabouts(None)
        for seconds, wanted in ((1, 0), (5, 0), (6.1, 1), (1, 0), (-50, 0), (51, 1)):
            self.wall += seconds
            self.assertEqual(bool(place.change()), bool(wanted), seconds)

    def test_kernel_is_asked_without_a_packet(self):
        ask = self.real
        with socket.socket() as sock:
            self.assertIsNone(ask(sock))  # it is not connected
        port = self.service(lambda conn: conn.recv(1))
        with socket.create_connection(("127.0.0.1", port)) as conn:
            self.assertIsNone(ask(conn))  # this machine does not move
            change(self, client_module, LOOPBACK=re.compile("none"))
            self.assertEqual(ask(conn), "127.0.0.1")
        self.assertIsNone(ask(conn))

    # A client that is logged in, and its server behind a cable.

    def start_behind_a_cable(self, **services):
        """The links pass a relay that can hold back what comes from the server."""
        change(self, client_module, LOOK_AROUND=self.ASIDE)
        self.start_server()
        real = self.server.program.client_address[:2]
        self.cables = []

        def cable(conn):
            flows = threading.Event()
            flows.set()
            self.cables.append(flows)
            onward = socket.create_connection(real)

            def carry():
                with contextlib.suppress(OSError), contextlib.closing(onward):
                    for data in iter(lambda: onward.recv(65536), b""):
                        flows.wait(PATIENCE)
                        conn.sendall(data)
                with contextlib.suppress(OSError):
                    conn.shutdown(socket.SHUT_RDWR)

            threading.Thread(target=carry, daemon=True).start()
            with contextlib.suppress(OSError):
                for data in iter(lambda: conn.recv(65536), b""):
                    onward.sendall(data)
                onward.shutdown(socket.SHUT_WR)

        self.addCleanup(lambda: [flows.set() for flows in self.cables])
        services = services or {"web": self.echo()}
        self.client = self.start_client(services, port=self.service(cable))
        self.uplink = self.client.program.uplink
        self.client.until(lambda: self.client.program.urls)  # the last of the login
        self.first = self.uplink.tunnel

    def look(self):
        self.client.do(lambda: self.uplink.look() or True)

    def move(self):
        """The machine has another address; so two looks find."""
        self.addresses = ["192.0.2.2"]
        self.look()
        self.assertIsNone(self.uplink.doubted)
        self.look()

    def wait_for_a_successor(self):
        """Until it could log in."""
        self.client.until(lambda: getattr(self.uplink.coming, "challenge", None))

    def test_dead_link_is_replaced_after_two_seconds_of_silence(self):
        self.start_behind_a_cable()
        self.cables[0].clear()
        self.move()
        self.wait_for_a_successor()
        self.look()
        self.assertIs(self.uplink.tunnel, self.first)  # it has its time
        self.client.pass_time(client_module.DOUBT + 0.1)
        self.client.until(lambda: self.uplink.tunnel not in (None, self.first))
        self.assertTrue(self.first.link.closed)
        self.server.until(lambda: self.serves("tim", ["web"]))
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        self.assertEqual((self.uplink.doubted, self.uplink.coming), (None, None))

    def test_sleep_is_a_reason_to_ask_as_well(self):
        self.start_behind_a_cable()
        self.cables[0].clear()
        self.wall += 2 * self.ASIDE
        self.look()
        self.wait_for_a_successor()
        self.client.pass_time(client_module.DOUBT + 0.1)
        self.client.until(lambda: self.uplink.tunnel not in (None, self.first))

    def test_link_that_lives_goes_on_and_so_does_what_runs_in_it(self):
        go = threading.Event()
        self.addCleanup(go.set)

        def slow(conn):
            read_head(conn)
            go.wait(PATIENCE)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow")

        self.start_behind_a_cable(web=self.service(slow))
        running = self.visit()
        running.sendall(self.ask("web.tim.x"))
        self.wait_for_streams(1)
        for _ in range(3):  # the clock is set forward again and again
            self.wall += 2 * self.ASIDE
            self.look()
            self.client.until(lambda: self.uplink.doubted is None)
            self.assertIsNone(self.uplink.coming)
        self.client.pass_time(client_module.DOUBT)
        self.look()
        self.assertIs(self.uplink.tunnel, self.first)
        go.set()
        self.assertIn(b"slow", self.raw(b"", running))
        self.server.until(lambda: len(self.server.loop.links) == 1)

    def test_late_sign_of_life_still_counts_before_the_login(self):
        self.start_behind_a_cable()
        change(self, client_module, DOUBT=self.ASIDE)
        self.cables[0].clear()
        self.move()
        self.wait_for_a_successor()
        self.cables[0].set()
        self.client.until(lambda: self.uplink.doubted is None)
        self.assertIs(self.uplink.tunnel, self.first)
        self.server.until(lambda: len(self.server.loop.links) == 1)

    def test_link_that_dies_in_doubt_is_replaced_at_once(self):
        self.start_behind_a_cable()
        change(self, client_module, DOUBT=self.ASIDE)
        self.cables[0].clear()
        self.move()
        self.wait_for_a_successor()
        self.client.do(lambda: self.first.link.close("for a test") or True)
        self.client.until(lambda: self.uplink.tunnel not in (None, self.first))
        self.assertEqual(len(self.cables), 2)  # by the dial that ran already

    def test_sign_of_life_after_the_login_is_too_late(self):
        self.start_behind_a_cable()
        self.cables[0].clear()
        self.move()
        self.wait_for_a_successor()
        self.cables[1].clear()  # no WELCOME comes
        self.client.pass_time(client_module.DOUBT + 0.1)
        self.look()
        coming = self.uplink.coming
        self.assertIsNone(coming.challenge)
        self.first.link.asked = 0.0
        self.look()
        self.assertIs(self.uplink.coming, coming)
        self.cables[1].set()
        self.client.until(lambda: self.uplink.tunnel is coming)

    def test_successor_that_dies_has_one_itself(self):
        self.start_behind_a_cable()
        change(self, client_module, DOUBT=self.ASIDE)
        self.cables[0].clear()
        self.move()
        self.wait_for_a_successor()
        dead = self.uplink.coming
        self.client.do(lambda: dead.link.close("for a test") or True)
        self.client.until(lambda: self.uplink.coming not in (None, dead))
        self.assertIs(self.uplink.tunnel, self.first)

    def test_link_with_long_round_trips_has_two_of_them(self):
        self.start_behind_a_cable()
        self.cables[0].clear()
        self.first.link.round_trip = 2 * client_module.DOUBT
        self.move()
        self.wait_for_a_successor()
        self.client.pass_time(3 * client_module.DOUBT)
        self.look()
        self.assertIsNotNone(self.uplink.coming.challenge)
        self.client.pass_time(client_module.DOUBT)
        self.client.until(lambda: self.uplink.tunnel not in (None, self.first))

    def test_first_wait_in_doubt_is_short_unless_links_come_and_go(self):
        self.start_behind_a_cable()
        self.uplink.wait = client_module.LONGEST_WAIT
        self.cables[0].clear()
        self.client.do(lambda: self.uplink.forget_waits(self.first) or True)
        self.assertEqual(self.uplink.wait, client_module.LONGEST_WAIT)
        self.first.since -= client_module.STEADY
        self.move()
        self.assertEqual(self.uplink.wait, client_module.FIRST_WAIT)

    def test_client_that_stops_has_no_doubts(self):
        self.start_behind_a_cable()
        self.client.program.stopping = True
        self.move()
        self.assertIsNone(self.uplink.doubted)

    def test_dials_that_fail_in_doubt_are_no_failed_attempts(self):
        change(self, client_module, FIRST_WAIT=0.01, LONGEST_WAIT=0.02)
        self.start_behind_a_cable()
        client, fails = self.client.program, []
        self.client.program.config = client.config._replace(max_attempts=1)
        real = self.uplink.way

        def way():
            fails.append(1)
            return client_module.parse_target(free_port()), real()[1]

        self.uplink.way = way
        self.cables[0].clear()
        self.move()
        self.client.until(lambda: len(fails) > 3)
        self.assertIs(self.uplink.tunnel, self.first)
        self.cables[0].set()  # it was not dead, and nothing is dialled any more
        self.client.until(lambda: self.uplink.doubted is None)
        self.assertIsNone(self.uplink.timer.due)
        self.assertIsNone(self.client.error)

    def test_doubt_ends_with_the_client(self):
        self.start_behind_a_cable()
        change(self, client_module, DOUBT=self.ASIDE)
        self.cables[0].clear()
        self.move()
        self.wait_for_a_successor()
        self.client.do(lambda: self.client.program.on_signal(signal.SIGTERM) or True)
        self.client.until(lambda: self.uplink.coming is None)
        self.look()
        self.assertIsNone(self.uplink.coming)
        self.server.until(lambda: not self.server.loop.links)

    def test_doubt_begins_no_second_dial_and_looks_more_often(self):
        self.start_behind_a_cable()
        self.cables[0].clear()
        self.move()
        due = self.uplink.look_timer.due - self.client.loop.clock()
        self.assertLess(due, client_module.DOUBT_LOOK + 0.01)
        self.wall += 2 * self.ASIDE
        self.look()
        self.wait_for_a_successor()
        self.assertEqual(len(self.cables), 2)


class Options(TunnelCase):
    """What a service asks of its visitors, or wants to be called."""

    def start_with(self, **options):
        self.start_server()
        self.start_client({"web": dict(options, target=self.echo())})

    def headers(self, *arguments, **options):
        found = self.echoed("web.tim.x", *arguments, **options)["headers"]
        return {name.lower(): value for name, value in found}

    def basic(self, pair):
        return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}

    def test_password_is_asked_for_and_not_passed_on(self):
        self.start_with(auth=["tim:s\u00e9cret", "eva:a:b"])
        for pair in ("tim:s\u00e9cret", "eva:a:b"):
            found = self.headers(headers=dict(self.basic(pair), Cookie="x=y"))
            self.assertNotIn("authorization", found)
            self.assertEqual(found["cookie"], "x=y")
        wrong = [None, self.basic("tim:secret"), self.basic("tim"), self.basic("")]
        wrong += [{"Authorization": "Basic %"}, {"Authorization": "Bearer x"}]
        conn = self.keep()
        for headers in wrong:
            answer = self.get("web.tim.x", headers=headers, conn=conn)
            self.assertEqual(answer.status, 401, headers)
            realm = 'Basic realm="web.tim.x", charset="UTF-8"'
            self.assertEqual(answer.headers["WWW-Authenticate"], realm)
        self.assertEqual(self.tunnels["tim"].link.last_id, 2)  # no stream was opened

    def test_password_does_not_leave_the_client(self):
        self.start_with(auth="tim:secret")
        service = self.server.program.registry.service("tim", "web")
        self.assertNotIn("secret", json.dumps(service.options))
        one, two = (
            client_module.parse_service({"target": 1, "auth": "tim:secret"})
            for _ in range(2)
        )
        self.assertNotEqual(one.options, two.options)  # each has a salt of its own

    def test_change_of_protocol_needs_the_password_too(self):
        self.start_with(auth="tim:secret")
        lines = ["Connection: upgrade", "Upgrade: websocket"]
        said = self.raw(self.ask("web.tim.x", *lines))
        self.assertIn(b"HTTP/1.1 401", said)

    def test_only_visitors_from_the_networks_named(self):
        self.start_with(visitors=["192.0.2.0/24", "127.0.0.0/8"])
        self.assertEqual(self.get("web.tim.x").status, 200)
        option = {"target": self.echo(), "visitors": ["192.0.2.0/24", "::/0"]}
        self.start_client({"web": option}, "eva")
        self.assertEqual(self.get("web.eva.x").status, 403)
        self.assertEqual(self.tunnels["eva"].link.last_id, 0)

    def test_host_is_what_the_target_wants(self):
        port = self.echo()
        self.start_server()
        hosts = {"a": "rewrite", "b": "x.test:1", "c": "preserve"}
        listed = {name: {"target": port, "host": host} for name, host in hosts.items()}
        self.start_client(listed)
        wanted_hosts = {"a": "localhost:%d" % port, "b": "x.test:1", "c": ""}
        for name, wanted in wanted_hosts.items():
            host = "%s.tim.x:80" % name
            headers = {
                "Origin": "https://" + host,
                "Referer": "https://%s/a?b" % host,
                "Cookie": "https://%s/" % host,
            }
            found = dict(self.echoed(host, headers=headers)["headers"])
            self.assertEqual(found["Host"], wanted or host)
            self.assertEqual(found["X-Forwarded-Host"], host)
            self.assertEqual(found["Cookie"], headers["Cookie"])
            base = "http://" + wanted if wanted else "https://" + host
            self.assertEqual(found["Origin"], base)
            self.assertEqual(found["Referer"], base + "/a?b")
            other = {"Origin": "https://%s.evil" % host, "Referer": "http://o/" + host}
            found = dict(self.echoed(host, headers=other)["headers"])
            self.assertEqual({name: found[name] for name in other}, other)

    def test_values_of_options_are_checked_on_both_sides(self):
        wrong = [
            {"auth": "secret"},
            {"auth": ":secret"},
            {"auth": []},
            {"auth": 5},
            {"auth": ["tim:x", 5]},
            {"auth": "tim:x", "tcp": 0},
            {"visitors": []},
            {"visitors": "127.0.0.1"},
            {"visitors": ["127.0.0.1/33"]},
            {"visitors": ["x"]},
            {"host": ""},
            {"host": 5},
            {"host": "a/b"},
            {"host": "a\r\nb"},
        ]
        for options in wrong:
            with self.assertRaises(ValueError, msg=options):
                client_module.parse_service(dict(options, target=1))
            with self.assertRaises(ValueError, msg=options):
                server_module.Service(None, "web", options)

    def test_visitor_of_a_tcp_port_from_elsewhere_is_cut(self):
        (number,) = TCPPorts.free_ports(self, 1)
        self.start_server(tcp_ports=[number], bind="127.0.0.1")
        option = {"target": self.echo(), "tcp": number, "visitors": ["192.0.2.0/24"]}
        self.start_client({"web": option})
        self.server.until(lambda: self.server.program.tcp.open)
        with contextlib.suppress(ConnectionResetError):
            with socket.create_connection(("127.0.0.1", number), PATIENCE) as conn:
                self.assertEqual(conn.recv(1), b"")
        self.assertEqual(self.tunnels["tim"].link.last_id, 0)


class Dials(unittest.TestCase):
    """The race of a target's addresses."""

    class Found:
        """In place of a resolver, and of who dials."""

        def __init__(self, loop, addresses):
            self.loop, self.addresses = loop, addresses
            self.connection = self.error = None

        def resolve(self, dial):
            return self.addresses

        def on_dialled(self, connection):
            self.connection = connection

        def on_undialled(self, error):
            self.error = error

    deaf_port = TunnelCase.deaf_port

    def setUp(self):
        self.clock = Clock()
        self.loop = client_module.Loop(clock=self.clock)
        self.addCleanup(self.loop.close)

    def listen(self):
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        return listener.getsockname()[1]

    def refusing(self):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return sock.getsockname()[1]

    def dial(self, *ports):
        found = [(socket.AF_INET, ("127.0.0.1", port)) for port in ports]
        owner = self.Found(self.loop, found)
        target = client_module.Target("nas:1", "nas", 1)
        dial = client_module.Dial(owner, target, [], 5.0, owner)
        self.loop.soon(dial, dial.advance)
        self.turn()
        return dial, owner

    def turn(self):
        for _ in range(5):
            self.loop.soon(self.loop, bool)  # so that the turn does not wait
            self.loop.turn()

    def pass_time(self, seconds):
        self.clock.now += seconds
        self.turn()

    def test_next_address_begins_after_a_while_and_the_first_to_connect_wins(self):
        good = self.listen()
        dial, owner = self.dial(self.deaf_port(), self.deaf_port(), good)
        for count in (1, 2):
            self.assertEqual(len(dial.attempts), count)
            self.pass_time(client_module.STAGGER - 0.01)
            self.assertEqual(len(dial.attempts), count)
            self.pass_time(0.02)
        self.assertEqual(owner.connection.sock.getpeername()[1], good)
        self.assertEqual(self.loop.connections, {owner.connection})
        owner.connection.close()
        self.pass_time(10)
        self.assertIsNone(owner.error)

    def test_address_that_refuses_brings_the_next_at_once(self):
        good = self.listen()
        dial, owner = self.dial(self.refusing(), self.refusing(), good)
        self.assertEqual(owner.connection.sock.getpeername()[1], good)

    def test_first_failure_says_why_unless_one_hangs(self):
        dial, owner = self.dial(self.refusing(), self.refusing())
        self.assertEqual(str(owner.error), "nas:1 refused the connection")
        dial, owner = self.dial(self.refusing(), self.deaf_port())
        self.pass_time(5.1)
        self.assertEqual(owner.error.code, "timeout")
        self.assertEqual(self.loop.connections, set())

    def test_end_closes_all_that_is_tried(self):
        dial, owner = self.dial(self.deaf_port(), self.deaf_port())
        self.pass_time(client_module.STAGGER + 0.01)
        self.assertEqual(len(dial.attempts), 2)
        dial.end()
        self.assertEqual(self.loop.connections, set())
        self.pass_time(10)
        self.assertEqual((owner.connection, owner.error), (None, None))

    def test_families_take_turns(self):
        four, six = socket.AF_INET, socket.AF_INET6
        found = [(six, 1), (six, 2), (six, 3), (four, 4)]
        mixed = client_module.interleave(found)
        self.assertEqual([address for _, address in mixed], [1, 4, 2, 3])
        self.assertEqual(client_module.interleave([]), [])


class Proxies(TunnelCase):
    def environment(self, **variables):
        """Until the end of the test, of all that speak of proxies there are these."""
        before = dict(os.environ)
        self.addCleanup(os.environ.update, before)
        self.addCleanup(os.environ.clear)
        for name in before:
            if name.lower().endswith("_proxy"):
                del os.environ[name]
        os.environ.update(variables)

    def test_proxy_is_found_as_others_find_it(self):
        table = [
            ({}, True, ""),
            ({"https_proxy": "http://p:3128"}, True, "proxy p:3128"),
            ({"https_proxy": "http://p:3128"}, False, ""),
            ({"http_proxy": "p:3128"}, False, "proxy p:3128"),
            ({"HTTPS_PROXY": "http://p"}, True, "proxy p:80"),
            ({"all_proxy": "https://p"}, True, "proxy p:443"),
            ({"all_proxy": "p", "no_proxy": "a.b,example.com"}, True, ""),
            ({"all_proxy": "p", "no_proxy": "*"}, True, ""),
            ({"all_proxy": "p", "no_proxy": "b.example.com"}, True, "proxy p:80"),
        ]
        for variables, tls, name in table:
            self.environment(**variables)
            found = client_module.find_proxy("example.com", 443, tls)
            self.assertEqual(found.name if found else "", name, variables)
            for host in ("LOCALHOST", "127.0.0.1", "::1"):
                self.assertIsNone(client_module.find_proxy(host, 443, tls))

    def test_url_of_a_proxy_is_checked(self):
        for url in ("socks5://p", "http://", "http://p:x", "http://p:99999"):
            with self.assertRaises(ValueError):
                client_module.Proxy(url)
        for password in ("s3c/ret", "s3c#ret", "s3[cret", "s3\u2100cret"):
            with self.assertRaises(ValueError) as caught:
                client_module.Proxy("http://me:%s@p:3128" % password)
            self.assertNotRegex(str(caught.exception), "s3|cret")

    def test_no_proxy_and_a_bad_one_on_the_command_line(self):
        self.environment(https_proxy="socks5://p:1080")
        words = ["web=9", "-h", "https://example.com"]
        done = run_script(SCRIPTS[1], *words)
        self.assertEqual((done.status, len(done.stderr.splitlines())), (2, 1))
        self.assertIn("only http and https proxies", done.stderr)
        options = client_module.parse_arguments(words + ["--no-proxy"])
        self.assertIsNone(client_module.load_config(options).proxy)

    def start_by(self, answer, credentials="me:p%40ss%3A@", **options):
        """A client that knows a proxy, which answers so; the heads that it was sent."""
        self.start_server()
        real, heads = self.server.program.client_address[:2], []

        def proxy(conn):
            heads.append(read_head(conn)[0])
            conn.sendall(answer)
            if b" 200 " in answer:
                with socket.create_connection(real) as onward:
                    self.relay(conn, onward)

        url = "http://%s127.0.0.1:%d" % (credentials, self.service(proxy))
        options = dict({"proxy": client_module.Proxy(url), "port": 1}, **options)
        listed = {"web": self.echo()}
        client = self.start_client(listed, host="no.such.test", wait=False, **options)
        return client, heads

    def test_server_is_reached_by_connect_and_its_name_is_for_the_proxy(self):
        client, heads = self.start_by(b"HTTP/1.1 200 Connected\r\n\r\n")
        self.server.until(lambda: self.serves("tim", ["web"]))
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        lines = heads[0].split(b"\r\n")
        self.assertEqual(lines[0], b"CONNECT no.such.test:1 HTTP/1.1")
        self.assertIn(b"Host: no.such.test:1", lines)
        self.assertIn(b"Proxy-Authorization: Basic bWU6cEBzczo=", lines)
        said = "".join(self.log.lines)
        self.assertFalse("p@ss" in said or "p%40ss" in said or "bWU6" in said)

    def test_what_a_proxy_refuses_is_told_with_what_to_do(self):
        table = [
            (b"407 Who", "wants a password", {"credentials": ""}),
            (b"407 Who", "does not accept this user and password", {}),
            (b"403 No", "try port 443", {}),
            (b"404 What", "--no-proxy", {}),
        ]
        for status, advice, options in table:
            client, _ = self.start_by(b"HTTP/1.1 %s\r\n\r\n" % status, **options)
            client.until(lambda: client.error)  # noqa: B023
            self.assertEqual(client.error.status, 1)
            self.assertRegex(str(client.error), "no.such.test:1: proxy 127.0.0.1:")
            self.assertIn(advice, str(client.error))

    def test_proxy_that_does_not_reach_the_server_is_asked_again(self):
        answer = b"HTTP/1.1 502 Bad\r\n\r\n"
        client, heads = self.start_by(answer, max_attempts=2)
        client.until(lambda: client.error)
        self.assertEqual((client.error.status, len(heads)), (4, 2))


class Hostile(TunnelCase):
    """Limits, each reached, each with a clear answer and no harm to others."""

    def test_slow_head_is_a_408_however_it_dribbles(self):
        change(self, server_module, HEAD_TIME=0.2)
        self.start()
        said = self.raw(b"GET / HTTP/1.1\r\nHost: a")
        self.assertIn(b"HTTP/1.1 408", said)

    def test_empty_lines_do_not_prolong_the_time_for_a_head(self):
        server = self.start_server()
        conn = self.visit()
        visitors = server.program.visitors.all
        dues = set()
        for data in (b"\r", b"\n\r", b"\n\r"):
            conn.sendall(data)
            server.until(lambda: [bytes(v.unparsed) for v in visitors] == [b"\r"])
            dues.add(server.do(lambda: [v.timer.due for v in visitors][0]))
        self.assertEqual(len(dues), 1)

    def test_silent_visitor_is_closed_without_a_word(self):
        change(self, server_module, FIRST_BYTE_TIME=0.1)
        self.start()
        self.assertEqual(self.raw(b""), b"")

    def test_idle_visitor_is_closed_after_his_time(self):
        change(self, server_module, IDLE_TIME=0.1)
        self.start()
        self.assertIn(b"200 OK", self.raw(self.ask("web.tim.x", close=False)))

    def test_too_many_streams_are_a_503(self):
        change(self, server_module, MAX_STREAMS=2)
        stop = threading.Event()
        self.addCleanup(stop.set)
        self.start(web=self.service(lambda conn: stop.wait(PATIENCE)))
        for _ in range(2):
            self.visit().sendall(self.ask("web.tim.x"))
        self.wait_for_streams(2)
        answer = self.get("web.tim.x")
        self.assertEqual(answer.status, 503)
        self.assertEqual(answer.headers["X-Tunnel-Error"], "overload")

    def test_without_descriptors_the_visitor_idle_longest_goes(self):
        self.start()
        idle = self.keep()
        self.echoed("web.tim.x", conn=idle)
        self.server.do(self.fill)
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        self.assertEqual(idle.sock.recv(1), b"")

    def test_idle_visitor_that_takes_nothing_leaves_its_descriptor_at_once(self):
        self.start()
        self.visit()
        visitors = self.server.program.visitors
        self.server.until(lambda: visitors.all)
        (http,) = visitors.all

        def make_room():
            http.connection.backlog += b"x"  # a page that it does not take
            visitors.idle[http] = None
            return visitors.make_room() and http.connection.closed

        self.assertTrue(self.server.do(make_room))

    def fill(self):
        self.server.loop.capacity = len(self.server.loop.connections)
        return True

    def test_visitor_whose_request_is_on_its_way_is_not_idle(self):
        self.start()
        first, second = self.keep(), self.keep()
        for conn in (first, second):
            self.echoed("web.tim.x", conn=conn)

        def crowd():
            first.sock.sendall(self.ask("web.tim.x"))
            visitors = self.server.program.visitors
            while not any(v.connection.has_unread() for v in visitors.all):
                pass
            self.fill()
            return visitors.make_room()

        self.assertTrue(self.server.do(crowd))
        self.assertIn(b"200 OK", self.raw(b"", first.sock))
        self.assertEqual(second.sock.recv(1), b"")

    def test_client_without_descriptors_says_busy(self):
        self.start()
        self.client.do(lambda: setattr(self.client.loop, "capacity", 0) or True)
        answer = self.get("web.tim.x")
        self.assertEqual(answer.status, 503)
        self.assertEqual(answer.headers["X-Tunnel-Error"], "busy")

    def test_visitor_who_never_reads_has_one_answer_waiting(self):
        self.start()
        conn = self.visit()
        ask = self.ask("none.tim.x", close=False) * 100

        def flood():
            with contextlib.suppress(OSError):
                while True:
                    conn.sendall(ask)

        threading.Thread(target=flood, daemon=True).start()
        visitors = self.server.program.visitors.all
        self.server.until(lambda: any(v.connection.backlog for v in visitors))
        for _ in range(50):  # many turns of the loop
            self.echoed("web.tim.x")
        waiting = self.server.do(lambda: [len(v.connection.backlog) for v in visitors])
        self.assertLess(max(waiting), 4 * KIB)
        conn.shutdown(socket.SHUT_RDWR)

    def test_dials_at_once_are_counted(self):
        half = 2 * PATIENCE  # for each of the target's two addresses
        change(self, client_module, DIALS=2, DIAL_TIME=2 * half)
        self.start(web=self.deaf_port())
        for _ in range(5):
            self.visit().sendall(self.ask("web.tim.x"))
        tunnel = self.client.program.uplink.tunnel
        self.client.until(lambda: tunnel.link.last_id == 5)
        self.assertEqual(self.client.do(self.dials), [2, 3])

    def test_dials_beyond_the_limit_wait_their_turn(self):
        change(self, client_module, DIALS=2)
        self.start()
        conns = [self.visit() for _ in range(20)]
        for conn in conns:
            conn.sendall(self.ask("web.tim.x"))
        for conn in conns:
            self.assertIn(b"200 OK", self.raw(b"", conn))

    def test_answer_of_endless_small_chunks_arrives_whole_however_it_ends(self):
        body = b"1\r\nx\r\n" * 30000
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

        def whole(conn):
            read_head(conn)
            conn.sendall(head + body + b"0\r\n\r\n")

        def cut(conn):
            read_head(conn)
            conn.sendall(head + body)

        self.start(whole=self.service(whole), cut=self.service(cut))
        said = self.raw(self.ask("whole.tim.x"))
        self.assertEqual(said.partition(b"\r\n\r\n")[2], body + b"0\r\n\r\n")
        said = self.raw(self.ask("whole.tim.x", first="GET / HTTP/1.0"))
        self.assertEqual(said.partition(b"\r\n\r\n")[2], b"x" * 30000)
        conn, got = self.visit(), b""
        conn.sendall(self.ask("cut.tim.x"))
        with self.assertRaises(ConnectionResetError):
            while True:
                got += conn.recv(65536)
        self.wait_for_streams(0)

    def test_upload_of_endless_small_chunks_arrives_whole(self):
        body = b"1\r\nx\r\n" * 30000 + b"0\r\n\r\n"
        got = []

        def handler(conn):
            rest = read_head(conn)[1]
            while not rest.endswith(b"0\r\n\r\n"):
                rest += conn.recv(65536)
            got.append(rest)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        self.start(web=self.service(handler))
        line = "Transfer-Encoding: chunked"
        ask = self.ask("web.tim.x", line, first="POST / HTTP/1.1", body=body)
        self.assertTrue(self.raw(ask).endswith(b"ok"))
        self.assertEqual(got, [body])

    def test_upload_in_chunks_goes_on_after_what_was_read_ahead(self):
        """Which is all of a turn, so that nothing more is read in it."""
        size, go = 16 << 20, threading.Event()

        def handler(conn):
            rest = read_head(conn)[1]
            go.wait(PATIENCE)
            while not rest.endswith(b"0\r\n\r\n"):
                rest += conn.recv(1 << 20)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        self.start(web=self.service(handler))
        conn = self.visit()
        line = "Transfer-Encoding: chunked"
        body = b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n"
        ask = self.ask("web.tim.x", line, first="POST / HTTP/1.1", body=body)
        threading.Thread(target=conn.sendall, args=(ask,), daemon=True).start()
        full, visitors = server_module.HEAD_LIMIT, self.server.program.visitors.all
        self.server.until(lambda: any(len(v.unparsed) == full for v in visitors))
        go.set()
        self.assertTrue(self.raw(b"", conn).endswith(b"ok"))

    def test_what_comes_behind_an_upload_is_not_read_with_it(self):
        size, answer = 4 << 20, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

        def handler(conn):
            left = size - len(read_head(conn)[1])
            while left:
                left -= len(conn.recv(min(left, 1 << 20)))
            conn.sendall(answer)
            read_head(conn)
            conn.sendall(answer)

        self.start(web=self.service(handler))
        buffers, pull = [], server_module.Exchange.pull

        def watched(exchange, view):
            count = pull(exchange, view)
            buffers.append(len(exchange.http.unparsed))
            return count

        def measure(pacer, now):
            pacer.quantum = 1 << 20

        change(self, server_module.Exchange, pull=watched)
        change(self, server_module.Pacer, measure=measure)
        line, first = "Content-Length: %d" % size, "POST / HTTP/1.1"
        ask = self.ask("web.tim.x", line, first=first, body=b"x" * size, close=False)
        said = self.raw(ask + b"\r\n" * (2 << 20) + self.ask("web.tim.x"))
        self.assertEqual(said.count(b"HTTP/1.1 200"), 2)
        self.assertLessEqual(max(buffers), server_module.HEAD_LIMIT)

    def test_flood_of_lists_is_not_all_looked_at(self):
        log_in = Logins.log_in(self.hostile_client())
        lists = [json.dumps({"s%d" % i: {}}).encode() for i in range(200)]
        log_in.sendall(b"".join(frame(Kind.SERVICES, 0, data) for data in lists))
        self.server.until(lambda: self.serves("tim", ["s199"]))
        log_in.sendall(frame(Kind.PING, 0, b"12345678"))
        answers = [k for k, _, _ in Logins.frames(self, log_in, Kind.PONG)]
        self.assertLess(answers.count(Kind.URLS), 10)

    def test_goodbye_of_any_form_is_one_line_of_the_log(self):
        self.hostile_client()
        for reason in (b"[" * 970 + b"]" * 970, b'"%s"' % (b"x" * 60000), b"{}", b"5"):
            conn = Logins.hello(self)
            conn.sendall(frame(Kind.GOODBYE, 0, b'{"reason":' + reason + b"}"))
            self.raw(b"", conn)
        self.assertLess(max(map(len, self.log.lines)), 1000)

    def test_many_words_in_connection_are_refused(self):
        self.start()
        words = ", ".join("w%d" % i for i in range(1 + server_module.MEMBERS_LIMIT))
        said = self.raw(self.ask("web.tim.x", "Connection: " + words))
        self.assertIn(b"HTTP/1.1 400", said)

    def test_visitors_with_many_small_chunks_share_a_turn(self):
        done = threading.Event()

        def handler(conn):
            read_head(conn)
            while conn.recv(65536):
                pass

        self.start(web=self.service(handler))
        change(self, server_module, TURN_BUDGET=-1)  # each turn has lasted long enough
        taken, pull = [], server_module.Exchange.pull

        def watched(exchange, view):
            count = pull(exchange, view)
            taken.append(count or 0)
            return count

        change(self, server_module.Exchange, pull=watched)
        line = "Transfer-Encoding: chunked"
        body = b"1\r\nx\r\n" * 2000
        conns = [self.visit() for _ in range(8)]
        for conn in conns:
            conn.sendall(
                self.ask("web.tim.x", line, first="POST / HTTP/1.1", body=body)
            )
        self.server.until(lambda: sum(taken) > 8 * len(body))
        done.set()
        for conn in conns:
            conn.close()
        most = 6 * server_module.FEED_LINES
        self.assertGreater(len(taken), 8 * len(body) // most)
        self.assertLessEqual(sorted(taken)[-17], most)  # but for the heads

    def test_bytes_beyond_a_whole_answer_are_not_looked_at_again(self):
        junk = b"x" * 20000
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        self.start(web=self.answering(answer, junk, junk))
        said = self.raw(self.ask("web.tim.x"))
        self.assertTrue(said.endswith(b"\r\n\r\nok"))

    def test_held_bytes_count_to_nothing_when_all_is_over(self):
        body = b"x" * 200000
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.start(web=self.answering(answer + body))
        conn = socket.socket()
        self.addCleanup(conn.close)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        conn.connect(self.server.program.visitor_address[:2])
        visitors = self.server.program.visitors.all
        self.server.until(lambda: visitors)
        self.server.do(self.shrink)
        conn.sendall(self.ask("web.tim.x"))
        self.wait_for_answer()
        self.assertGreater(self.server.loop.unread, 0)
        self.client.end()
        self.server.until(lambda: not self.tunnels)
        conn.settimeout(1)
        with contextlib.suppress(OSError):
            while conn.recv(65536):
                pass
        conn.close()
        self.server.until(lambda: not visitors)
        self.assertEqual(self.server.loop.unread, 0)

    def shrink(self):
        for visitor in self.server.program.visitors.all:
            sock = visitor.connection.sock
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return True

    def test_visitor_who_takes_nothing_after_the_stream_is_over_is_let_go(self):
        change(self, server_module, LEFT_LOOK=0.05, STALLED=0.2)
        body = b"x" * 200000
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.start(web=self.answering(answer + body))
        conn = self.visit()
        visitors = self.server.program.visitors.all
        self.server.until(lambda: visitors)
        self.server.do(self.shrink)
        conn.sendall(self.ask("web.tim.x"))
        self.wait_for_answer()
        if self.server.do(lambda: any(v.connection.backlog for v in visitors)):
            self.client.end()
            self.server.until(lambda: not visitors)

    def test_crowd_from_one_network_keeps_out_no_other(self):
        """Who has one address of IPv6 has a /64 of them."""
        change(self, server_module, UNAUTHENTICATED=5)
        waiting = server_module.Unauthenticated()
        dropped = []

        class Stranger(Witness):
            closed = False

            def __init__(self, address):
                self.address = address
                waiting.admit(self, address)

            def fail(self, error):
                dropped.append(self.address)

        honest = Stranger("2001:db8:1:1::7")
        for number in range(200):
            Stranger("2001:db8:2:2:%x::%x" % (number, number))
        self.assertIn(honest, waiting.networks)
        self.assertEqual(len(waiting.networks), 5)
        self.assertEqual(len(dropped), 196)
        self.assertNotIn("2001:db8:1:1::7", dropped)

    def test_crowd_from_one_address_keeps_out_no_other(self):
        change(self, server_module, UNAUTHENTICATED=5)
        self.start_server()
        other = socket.socket()
        self.addCleanup(other.close)
        other.bind(("127.0.0.2", 0))
        other.connect(self.server.program.client_address[:2])
        self.server.until(lambda: self.unauthenticated())
        conns = [self.dial() for _ in range(30)]
        visitors = self.server.program.visitors.all
        self.server.until(lambda: len(visitors) == server_module.UNAUTHENTICATED)
        gone = self.server.do(lambda: len(self.unauthenticated()))
        self.assertEqual(gone, server_module.UNAUTHENTICATED)
        strangers = self.server.do(lambda: set(self.unauthenticated().values()))
        self.assertEqual(strangers, {"127.0.0.1", "127.0.0.2"})
        self.assertEqual(len(conns), 30)

    def test_idle_kept_streams_give_way_when_the_client_has_no_descriptors(self):
        self.start()
        conns = [self.keep() for _ in range(3)]
        for conn in conns:
            self.echoed("web.tim.x", conn=conn)

        def fill():
            self.client.loop.capacity = len(self.client.loop.connections)
            return True

        self.client.do(fill)
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_link_that_only_pings_harms_nobody(self):
        self.hostile_client()
        conn = Logins.log_in(self, "eva")
        Logins.frames(self, conn, Kind.URLS)
        self.start_client({"web": self.echo()})
        flood = frame(Kind.PING, 0, b"12345678") * 10000
        stop = threading.Event()

        def ping():
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    conn.sendall(flood)

        thread = threading.Thread(target=ping, daemon=True)
        thread.start()
        for _ in range(20):
            self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        stop.set()
        owed = self.server.do(lambda: dict(self.tunnels["eva"].link.own_frames))
        self.assertLessEqual(len(owed), 1)
        conn.close()
        thread.join(PATIENCE)

    def hostile_client(self):
        """self, with what Logins needs for a client by hand."""
        self.start_server()
        self.hello = lambda: Logins.hello(self)
        return self

    def test_request_that_is_cancelled_gives_its_place_among_the_dials_back(self):
        change(self, client_module, DIALS=1)
        self.start(web=self.deaf_port())
        conns = [self.visit() for _ in range(5)]
        for conn in conns:
            conn.sendall(self.ask("web.tim.x"))
        tunnel = self.client.program.uplink.tunnel
        self.client.until(lambda: tunnel.link.last_id == 5)
        for conn in conns[1:]:
            reset_on_close(conn)
            conn.close()
        self.client.until(lambda: self.dials()[1] == 0)

    def test_index_of_a_thousand_services_names_the_first(self):
        self.start(**{"s%d" % number: 9 for number in range(1000)})
        page = self.get("tim.x").content.decode()
        self.assertEqual(page.count("http://"), server_module.INDEX_LIMIT)
        more = 1000 - server_module.INDEX_LIMIT
        self.assertIn("and %d more" % more, page)

    def test_requests_opened_and_cancelled_by_the_hundred_leave_nothing(self):
        self.start()
        for _ in range(300):
            conn = self.visit()
            conn.sendall(self.ask("web.tim.x", close=False))
            reset_on_close(conn)
            conn.close()
        self.wait_for_streams(0)
        self.client.until(lambda: len(self.client.loop.connections) == 1)
        self.echoed("web.tim.x")


# -----------------------------------------------------------------------------------
# TLS
# -----------------------------------------------------------------------------------
LOCALHOST = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg4Dqqw4pCbeRDBpKE
5xYJPyFch8Y36Dhbt7VQ5XlqVxChRANCAAQI/eaXOo8VRHfJvFaL0jzMjRf8OSSy
fEjNxOfPVSOwf0dJZfty1+WVV99j3ehCV9960P7N4AJK1f9ygSiRm4xh
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBujCCAWGgAwIBAgIUVFpKyM3YOnh+PopU/keZw7A7BD0wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNTEwMDM0M1oYDzIxMjYxMTAx
MTAwMzQzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQI/eaXOo8VRHfJvFaL0jzMjRf8OSSyfEjNxOfPVSOwf0dJZfty1+WV
V99j3ehCV9960P7N4AJK1f9ygSiRm4xho4GOMIGLMB0GA1UdDgQWBBQP3akOa0lD
mRMxSTmSNCeT6vxUkjAfBgNVHSMEGDAWgBQP3akOa0lDmRMxSTmSNCeT6vxUkjAP
BgNVHRMBAf8EBTADAQH/MDgGA1UdEQQxMC+CCWxvY2FsaG9zdIILKi5sb2NhbGhv
c3SCDyoudGltLmxvY2FsaG9zdIcEfwAAATAKBggqhkjOPQQDAgNHADBEAiAkOgjM
Q/28lUpPoFNfmoRxbDuB3DWqXJP/sZ76tdnh/AIgCd28qd7R04jVc2BA5UEj5Ths
0VrMnDuLiKZ7obKw6KQ=
-----END CERTIFICATE-----
"""  # self-signed, for localhost, 127.0.0.1 and some names below localhost
OTHER = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgOnEsLLt5q7fqIl2r
t2vBevaNfE49tJtTmkuhLupgnlmhRANCAAQDwz+9+C0oXV4Qsy3bQ/+mGzgpLesi
Q6KGwbG0gqtLy+v/ZjQAwnuol1UWnbYbB8oBrd0rnEgUBxD5dF40n/H7
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBnzCCAUWgAwIBAgIUAKs5I2K+Pe+PGPor4DSpLq33/AAwCgYIKoZIzj0EAwIw
EDEOMAwGA1UEAwwFb3RoZXIwIBcNMjYxMTI1MTAwMzQzWhgPMjEyNjExMDExMDAz
NDNaMBAxDjAMBgNVBAMMBW90aGVyMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE
A8M/vfgtKF1eELMt20P/phs4KS3rIkOihsGxtIKrS8vr/2Y0AMJ7qJdVFp22GwfK
Aa3dK5xIFAcQ+XReNJ/x+6N7MHkwHQYDVR0OBBYEFCW0LgcmKaQHMzJTkKwbUAzT
E0DRMB8GA1UdIwQYMBaAFCW0LgcmKaQHMzJTkKwbUAzTE0DRMA8GA1UdEwEB/wQF
MAMBAf8wJgYDVR0RBB8wHYIFb3RoZXKCByoub3RoZXKCCyoudGltLm90aGVyMAoG
CCqGSM49BAMCA0gAMEUCIE1IYE2Dg1sDUy0UzxWQ+KNVDi/TN10FyVj+LYlnPwYy
AiEAxqLuSjXdn/z5PK7erpjG+O/qmPVbpO5l0yGHt3wIsvE=
-----END CERTIFICATE-----
"""  # the same for a host called other


class TLSVisitor:
    """A connection by TLS that can end each way alone, unlike that of `ssl`."""

    def __init__(self, conn, context, name=None, server=False):
        self.conn = conn
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        bios = self.incoming, self.outgoing
        self.object = context.wrap_bio(*bios, server, name)
        self.go_on(self.object.do_handshake)

    def __getattr__(self, name):
        return getattr(self.conn, name)

    def send_sealed(self):
        if self.outgoing.pending:
            self.conn.sendall(self.outgoing.read())

    def go_on(self, call, *arguments):
        while True:
            try:
                result = call(*arguments)
                self.send_sealed()
                return result
            except ssl.SSLWantReadError:
                self.send_sealed()
                data = self.conn.recv(65536)
                self.incoming.write(data) if data else self.incoming.write_eof()

    def sendall(self, data):
        view = memoryview(data)
        while view:
            view = view[self.go_on(self.object.write, view) :]

    def recv(self, size):
        try:
            return self.go_on(self.object.read, size)
        except ssl.SSLZeroReturnError:
            return b""

    def shutdown(self, how):
        with contextlib.suppress(ssl.SSLError):
            self.object.unwrap()
        self.send_sealed()
        self.conn.shutdown(how)


class TLSCase(TunnelCase):
    """Visitors and clients come by TLS."""

    scheme = "https"

    def setUp(self):
        super().setUp()
        self.pem = self.file(LOCALHOST)
        self.context = ssl.create_default_context(cafile=self.pem)
        self.context.check_hostname = False  # any name leads to the services

    def start_server(self, **options):
        port = options.get("port", 0)
        if port and port == options.get("client_port"):
            options = dict(options, port=0, tls_port=port)  # one port, with TLS
        options = dict({"tls_port": 0, "tls_cert": self.pem}, **options)
        return super().start_server(**options)

    def start_client(self, services, *arguments, **options):
        if "tls" not in options:
            options["tls"] = client_module.make_context(self.pem, False)
        return super().start_client(services, *arguments, **options)

    def connect(self):
        """To the port with TLS, and not yet a word of it."""
        conn = socket.create_connection(self.server.program.tls_address[:2])
        self.addCleanup(conn.close)
        conn.settimeout(PATIENCE)
        return conn

    def visit(self):
        return TLSVisitor(self.connect(), self.context)

    def keep(self):
        host, port = self.server.program.tls_address[:2]
        options = {"timeout": PATIENCE, "context": self.context}
        conn = http.client.HTTPSConnection(host, port, **options)
        self.addCleanup(conn.close)
        return conn


class EndToEndByTLS(TLSCase, EndToEnd):
    """All that holds without TLS holds with it."""

    def test_long_pipelined_burst_is_answered_to_its_end(self):
        self.skipTest("it sends in one thread, and reads in another")


class Encryption(TLSCase):
    def refused(self, status=1, **options):
        """Why a client ends at its first dial."""
        client = self.start_client({"web": 1}, wait=False, **options)
        client.until(lambda: client.error)
        self.assertEqual(client.error.status, status)
        return str(client.error)

    def test_server_that_no_authority_knows_is_refused(self):
        self.start_server()
        context = client_module.make_context(None, False)
        said = self.refused(tls=context)
        self.assertRegex(said, "self|verify failed")
        if "self" in said:
            self.assertIn("--fingerprint", said)
        self.assertEqual(self.tunnels, {})

    def test_certificate_for_another_name_is_refused(self):
        other = self.file(OTHER)
        self.start_server(tls_cert=other)
        context = client_module.make_context(other, False)
        self.assertIn("127.0.0.1", self.refused(tls=context))

    def test_certificate_with_the_fingerprint_needs_no_authority(self):
        self.start_server(tls_cert=self.file(OTHER))
        said = server_module.fingerprint(OTHER.encode())
        pin = client_module.parse_fingerprint("sha256 Fingerprint=" + said)
        context = client_module.make_context(None, True)
        self.start_client({"web": self.echo()}, tls=context, pin=pin)
        self.context.load_verify_locations(cadata=OTHER)
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        wrong = client_module.parse_fingerprint("00" * 32)
        self.assertIn("fingerprint", self.refused(tls=context, pin=wrong))

    def test_fingerprint_and_authority_must_both_be_right(self):
        self.start_server()
        pin = client_module.parse_fingerprint(
            server_module.fingerprint(LOCALHOST.encode())
        )
        right, wrong = [
            client_module.make_context(path, True)
            for path in (self.pem, self.file(OTHER))
        ]
        self.assertRegex(self.refused(tls=wrong, pin=pin), "self|verify failed")
        self.start_client({"web": 1}, tls=right, pin=pin)

    def test_server_is_reached_through_a_proxy_by_tls_in_tls(self):
        self.start_server()
        real = self.server.program.client_address[:2]
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.pem)
        asked = []

        def proxy(conn):
            with context.wrap_socket(conn, server_side=True) as conn:
                asked.append(read_head(conn)[0].split(b"\r\n")[0])
                conn.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                with socket.create_connection(real) as onward:
                    with contextlib.suppress(OSError, ValueError):
                        carry(conn, onward)

        def carry(conn, onward):
            """In one thread: OpenSSL would not bear two."""
            while True:
                readable = [conn] if conn.pending() else []
                readable = readable or select.select([conn, onward], [], [])[0]
                for source in readable:
                    data = source.recv(65536)
                    if not data:
                        return
                    (onward if source is conn else conn).sendall(data)

        m, port = client_module, self.service(proxy)
        trusted = m.make_context(self.pem, False)

        class ByProxy(m.Uplink):
            def way(self):
                connect = b"CONNECT tunnel.test:1 HTTP/1.1\r\n\r\n"
                before = [m.StartTLS(trusted, "localhost", b""), m.Ask(connect, 200)]
                return m.parse_target(port), before + super().way()[1]

        change(self, m, Uplink=ByProxy)
        self.start_client({"web": self.echo()})
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        self.assertEqual(asked, [b"CONNECT tunnel.test:1 HTTP/1.1"])

    def test_nothing_is_sent_before_the_fingerprint_is_known_to_be_right(self):
        got = []

        def handler(conn):
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self.pem)
            with contextlib.suppress(OSError):
                got.append(TLSVisitor(conn, context, server=True).recv(100))

        self.start_server()
        pin = client_module.parse_fingerprint("00" * 32)
        options = {"tls": client_module.make_context(None, True), "pin": pin}
        self.refused(port=self.service(handler), **options)
        self.assertEqual(b"".join(got), b"")

    def test_contexts_verify_and_speak_no_old_version(self):
        context = client_module.make_context(None, False)
        self.assertTrue(context.check_hostname)
        self.assertEqual(context.verify_mode, ssl.CERT_REQUIRED)
        for found in (context, server_module.make_context(self.pem, self.pem)):
            if hasattr(ssl, "TLSVersion"):
                self.assertEqual(found.minimum_version, ssl.TLSVersion.TLSv1_2)
            else:
                self.assertTrue(found.options & ssl.OP_NO_TLSv1_1)

    def test_fingerprints_are_read_as_openssl_writes_them(self):
        text = ":".join(["AB"] * 32)
        for said in (text, text.lower(), text.replace(":", " "), "x=" + text + "\n"):
            self.assertEqual(client_module.parse_fingerprint(said), b"\xab" * 32)
        for said in ("", "AB", text + ":AB", text[:-1] + "G"):
            with self.assertRaises(argparse.ArgumentTypeError):
                client_module.parse_fingerprint(said)

    def test_files_without_a_certificate_and_its_key_are_refused(self):
        key, cert = LOCALHOST.split("-----BEGIN CERT")
        cert, key = "-----BEGIN CERT" + cert, self.file(key)
        whole = self.file(cert)
        locked = self.file("-----BEGIN ENCRYPTED PRIVATE KEY-----")
        table = [
            (whole, None, "no private key in " + whole),
            (whole, self.file(OTHER), "key values mismatch"),
            (whole, "/nowhere", "/nowhere: No such file"),
            (whole, locked, "encrypted"),
            (self.file(""), key, "no certificate in "),
            (key, None, "no certificate in " + key),
        ]
        for cert, other, said in table:
            with self.assertRaisesRegex(ValueError, said):
                make_server(tls_cert=cert, tls_key=other)
        self.start_server(tls_cert=whole, tls_key=key)
        self.start_client({"web": 1})

    def test_ports_with_and_without_tls_are_told_apart(self):
        m = server_module
        table = [
            ((1, 2, None, None), [(1, m.Site, 0), (2, m.LinkSite, 0)]),
            ((1, 1, None, None), [(1, m.SharedSite, 0)]),
            ((1, 2, None, "x"), [(1, m.Site, 0), (2, m.LinkSite, 1)]),
            ((1, 2, 3, "x"), [(1, m.Site, 0), (3, m.Site, 1), (2, m.LinkSite, 1)]),
            ((1, 2, 2, "x"), [(1, m.Site, 0), (2, m.SharedSite, 1)]),
            ((0, 0, 0, "x"), [(0, m.Site, 0), (0, m.Site, 1), (0, m.LinkSite, 1)]),
        ]
        names = ("port", "client_port", "tls_port", "tls_cert")
        for arguments, ports in table:
            config = m.Config(**dict(zip(names, arguments)))
            self.assertEqual(m.plan_ports(config), ports)
        for bad in ((1, 1, None, "x"), (1, 2, 1, "x"), (1, 2, 3, None)):
            with self.assertRaises(ValueError):
                m.plan_ports(m.Config(**dict(zip(names, bad))))

    def test_silent_handshake_ends_after_its_time_and_holds_up_nobody(self):
        change(self, server_module, HANDSHAKE_TIME=PATIENCE, TURN_BUDGET=PATIENCE)
        change(self, server_module, FIRST_BYTE_TIME=3600)
        self.start()
        hello = ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            self.context.wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
        hello = hello.read()
        conns = [self.connect() for _ in range(30)]
        for conn in conns[:10]:
            conn.sendall(hello)
        for conn in conns[10:20]:
            conn.sendall(hello[:40])
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        phase, connections = server_module.Phase.HANDSHAKE, self.server.loop.connections
        preface = server_module.Preface

        def waiting():
            prefaces = [c.owner for c in connections if isinstance(c.owner, preface)]
            begun = [one for one in prefaces if one.buffer]  # unread it ends in a reset
            return sum(c.phase == phase for c in connections), len(prefaces), len(begun)

        self.server.until(lambda: waiting() == (10, 20, 10))
        for conn in conns[:10]:
            self.assertIn(b"\x16\x03", conn.recv(65536))  # our part of it
        self.server.pass_time(server_module.HANDSHAKE_TIME)
        for conn in conns:
            self.assertEqual(conn.recv(100), b"")

    def test_request_without_tls_is_told_so(self):
        self.start()
        said = self.raw(self.ask("web.tim.x"), self.connect())
        self.assertIn(b"HTTP/1.1 400", said)
        self.assertIn(b"X-Tunnel-Error: tls", said)
        self.assertIn("--tls", self.refused(tls=None))

    def test_server_without_tls_is_told_so(self):
        self.start_server()
        port = self.service(lambda conn: conn.sendall(b"HTTP/1.1 400 Bad\r\n\r\n"))
        self.assertIn("no TLS", self.refused(port=port))

    def stick(self, connection):
        """From here on the kernel takes nothing of what TLS has for it."""

        class Stuck(server_module.Plain):
            def __init__(self, sock):
                self.recv_into, self.sock = sock.recv_into, sock

            def send(self, data):
                raise BlockingIOError

        connection.transport.under = Stuck(connection.sock)
        connection.transport.pending += b"waits"

    def test_small_pieces_to_a_slow_reader_are_encrypted_together(self):
        connection, *_ = self.sealed_pair()
        self.stick(connection)
        for _ in range(1000):
            connection.write(b"x")
        self.assertEqual(connection.transport.pending, b"waits")
        self.assertEqual(connection.waiting(), 1005)

    def sealed_pair(self):
        """A connection of ours, the other end's socket, and what encrypts there."""
        wire, other = socket.socketpair()
        self.addCleanup(other.close)
        loop = fake_loop(server_module)
        self.addCleanup(loop.close)
        connection = server_module.Connection(loop, wire, Witness())
        context = server_module.make_context(self.pem, self.pem)
        connection.start_tls(context, True)
        other.setblocking(False)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        far = self.context.wrap_bio(incoming, outgoing)
        while connection.phase == server_module.Phase.HANDSHAKE:
            with contextlib.suppress(ssl.SSLWantReadError):
                far.do_handshake()
            other.sendall(outgoing.read())
            connection.on_events(selectors.EVENT_READ)
            with contextlib.suppress(BlockingIOError):  # TLS 1.3 may have said it all
                incoming.write(other.recv(65536))
        far.do_handshake()

        def seal(data):
            self.assertEqual(far.write(data), len(data))
            return outgoing.read()

        return connection, other, seal

    def read_again(self, connection):
        """What it reads when the selector has seen something."""
        connection.readable = True
        view = connection.loop.scratch
        return bytes(view[: connection.read_into(view) or 0])

    def test_much_that_comes_is_read_in_large_parts(self):
        connection, other, seal = self.sealed_pair()
        data = os.urandom(4 << 20)
        sealed, got = memoryview(seal(data)), []
        while sealed or not got or got[-1]:
            with contextlib.suppress(BlockingIOError):
                sealed = sealed[other.send(sealed[: 256 * KIB]) :]
            got.append(self.read_again(connection))
        self.assertEqual(b"".join(got), data)
        self.assertGreater(max(map(len, got)), server_module.SEALED)

    def test_what_came_before_a_fault_is_read_first(self):
        for fault in ("cut", "reset", "garbage"):
            connection, other, seal = self.sealed_pair()
            sealed = seal(b"x" * 50000)
            other.sendall(sealed)
            if fault == "garbage":
                other.sendall(b"no TLS" * 100)
            elif fault == "reset":
                connection.sock.sendall(b"unread")
            other.close()
            got = b""
            with self.assertRaises(OSError, msg=fault):
                while True:
                    got += self.read_again(connection)
            self.assertEqual(got, b"x" * 50000, fault)

    def test_end_is_said_though_the_peer_goes_on_and_on(self):
        connection, other, seal = self.sealed_pair()
        data = memoryview(seal(bytes(4 << 20)))

        def read_some():
            nonlocal data
            with contextlib.suppress(BlockingIOError):
                while data:
                    data = data[other.send(data[: 16 * KIB]) :]
            connection.readable = True
            connection.read_into(connection.loop.scratch[:20000])

        for _ in range(20):
            read_some()
        connection.shutdown_write()
        self.assertTrue(connection.transport.ending)  # unread bytes would be lost
        for _ in range(20):
            read_some()
        self.assertFalse(connection.transport.ending)
        self.assertTrue(data)

    def thrifty(self, content, answer=b""):
        """The connection of a peer of whose parts little is content, and the bytes that
        came at each read."""
        connection, other, _ = self.sealed_pair()
        came = []

        class Thrifty(server_module.Sealed):
            unread = 0

            def fill(self):
                count = super().fill()
                came[-1] += count
                self.unread = content
                self.outgoing.write(answer)
                return count

            def decrypt(self, view):
                count, self.unread = min(self.unread, len(view)), 0
                self.waste = max(0, self.waste - count * server_module.CONTENT_PART)
                return count or None

        context = server_module.make_context(self.pem, self.pem)
        arguments = (connection.loop, connection.transport.under, context, True)
        connection.transport = Thrifty(*arguments, None, b"")
        connection.transport.ready = True
        other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

        def read():
            with contextlib.suppress(BlockingIOError):
                while True:
                    other.send(bytes(64 * KIB))
            came.append(0)
            return self.read_again(connection)

        return connection, read, came

    def test_one_read_takes_little_with_little_in_it(self):
        connection, read, came = self.thrifty(100)
        read()
        self.assertEqual(len(came), 1)
        self.assertLessEqual(came[0], server_module.SEALED)

    def test_peer_who_sends_much_with_nothing_in_it_is_cut(self):
        connection, read, came = self.thrifty(0)
        with self.assertRaisesRegex(server_module.TLSError, "nothing was in it"):
            for _ in range(100):
                read()
        self.assertLessEqual(sum(came), server_module.FRUITLESS + server_module.SEALED)

    def test_peer_who_wants_answers_and_does_not_read_is_cut(self):
        connection, read, came = self.thrifty(20 * KIB, bytes(1000))
        self.stick(connection)
        with self.assertRaisesRegex(OSError, "does not read"):
            for _ in range(100):
                read()
        limit = server_module.REPLIES + 20000
        self.assertLess(len(connection.transport.pending), limit)

    def test_what_the_kernel_does_not_take_is_not_encrypted_yet(self):
        connection, *_ = self.sealed_pair()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
        connection.write(bytes(4 << 20))
        waits = len(connection.backlog)
        self.assertGreater(waits, 2 << 20)
        self.assertLess(connection.waiting(), waits + 2 * server_module.SEALED)

    def test_crowd_of_handshakes_is_served_a_few_at_a_time(self):
        change(self, server_module, HANDSHAKE_TIME=PATIENCE, TURN_BUDGET=-1)
        self.start()
        conns = [self.connect() for _ in range(20)]
        visitors = [None] * len(conns)

        def shake(number):
            visitors[number] = TLSVisitor(conns[number], self.context)

        threads = [threading.Thread(target=shake, args=(i,)) for i in range(len(conns))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        for visitor in visitors:
            self.assertIn(b"200 OK", self.raw(self.ask("web.tim.x"), visitor))

    def test_garbage_instead_of_tls_harms_nobody(self):
        self.start()
        for data in (b"\x16\x03\x01\xff\xff" + bytes(300), b"\0" * 300, b"x" * 70000):
            conn = self.connect()
            with contextlib.suppress(OSError):
                conn.sendall(data)
                self.raw(b"", conn)
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_services_learn_that_visitors_came_by_tls(self):
        self.start()
        headers = self.echoed("web.tim.x")["headers"]
        self.assertIn(["X-Forwarded-Proto", "https"], headers)

    def test_urls_lead_to_the_port_with_tls(self):
        self.start_server()
        client = self.start_client({"web": 1})
        client.until(lambda: client.program.urls)
        port = self.server.program.tls_address[1]
        url = "https://web.tim.localhost:%d/" % port
        self.assertEqual(client.program.urls, {"web": url})
        page = self.get("tim.localhost:%d" % port).content.decode()
        self.assertIn(url, page)

    def test_visitors_without_tls_stay_or_are_sent_to_it(self):
        for redirect in (False, True):
            self.start_server(redirect=redirect)
            self.start_client({"web": self.echo()})
            conn = socket.create_connection(self.server.program.visitor_address[:2])
            self.addCleanup(conn.close)
            first = "POST /a?b HTTP/1.1"
            said = self.raw(self.ask("web.tim.x:1", first=first), conn)
            where = b"https://web.tim.x:%d/a?b\r\n" % self.server.program.tls_address[1]
            self.assertEqual(b"HTTP/1.1 308" in said, redirect)
            self.assertEqual(b"\r\nLocation: " + where in said, redirect)

    def test_new_certificate_counts_without_dropping_a_connection(self):
        change(self, server_module, LOOK_TIME=0.05)
        self.start()
        conn = self.keep()
        self.echoed("web.tim.x", conn=conn)
        kept, tunnel = conn.sock, self.tunnels["tim"]
        tls = self.server.program.tls
        with open(self.pem, "w") as file:
            file.write("broken")
        self.server.until(lambda: any("no certificate in" in x for x in self.log.lines))
        self.echoed("web.tim.x")  # the old one still counts
        before = tls.value
        with open(self.pem, "w") as file:
            file.write(OTHER)
        self.server.until(lambda: tls.value is not before)
        self.assertEqual(self.echoed("web.tim.x", conn=conn)["service"], "web")
        self.assertIs(conn.sock, kept)
        self.assertIs(self.tunnels["tim"], tunnel)
        with self.assertRaises(ssl.SSLError):
            self.visit()
        self.context.load_verify_locations(cadata=OTHER)
        self.visit()

    def test_cut_is_not_taken_for_an_end(self):
        """After a 101 only TLS's own word for it ends a direction."""
        ended = []

        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
            try:
                ended.append(conn.recv(100))
            except OSError as error:
                ended.append(error)

        self.start(web=self.service(handler))
        lines = ["Connection: upgrade", "Upgrade: x"]
        for clean in (False, True):
            conn = self.visit()
            conn.sendall(self.ask("web.tim.x", *lines, close=False))
            self.assertIn(b"101", read_head(conn)[0])
            conn.shutdown(socket.SHUT_WR) if clean else conn.conn.close()
            self.wait_for_streams(0)
            self.server.until(lambda clean=clean: len(ended) == 1 + clean)
        self.assertIsInstance(ended[0], ConnectionResetError)
        self.assertEqual(ended[1], b"")


WWW = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg6DNSoIMZojM24z2U
mhp6IV5jQeYCpo0aP+GYscK87ryhRANCAAQicbboDLVaXHUixrTD7nEBXksLm2SG
py5ivyXd0N/tbqeBZH7sqhgO/O8LeKmigUYNGiGo3PEZ/CPcI/Tncwes
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIByTCCAW+gAwIBAgIUZzUOV28G+FkRBL2tsMo3hQJMtRYwCgYIKoZIzj0EAwIw
GjEYMBYGA1UEAwwPd3d3LmV4YW1wbGUub3JnMCAXDTI2MTEyNzEwMjUzMVoYDzIx
MjYxMTAzMTAyNTMxWjAaMRgwFgYDVQQDDA93d3cuZXhhbXBsZS5vcmcwWTATBgcq
hkjOPQIBBggqhkjOPQMBBwNCAAQicbboDLVaXHUixrTD7nEBXksLm2SGpy5ivyXd
0N/tbqeBZH7sqhgO/O8LeKmigUYNGiGo3PEZ/CPcI/Tncweso4GQMIGNMB0GA1Ud
DgQWBBSyFKnbmY5EiircbLiB84dm/wl3yjAfBgNVHSMEGDAWgBSyFKnbmY5Eiirc
bLiB84dm/wl3yjAPBgNVHRMBAf8EBTADAQH/MDoGA1UdEQQzMDGCD3d3dy5leGFt
cGxlLm9yZ4INKi5leGFtcGxlLm9yZ4IPKi50aW0ubG9jYWxob3N0MAoGCCqGSM49
BAMCA0gAMEUCIQCFtvCqiuPDk6Bi1d38BO3lQauE+lQkeoIihtgKKt2uiwIgHWcb
1ct+hSNRYqX5V1Jo4JsUnc6C0f/wTl9itutft1w=
-----END CERTIFICATE-----
"""  # for www.example.org, *.example.org and *.tim.localhost


OF_AN_AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBjzCCATWgAwIBAgIUf2tuLGEzrBMcy7bSxNvqlUDobMkwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJYXV0aG9yaXR5MCAXDTI2MTEyNzExNDU0M1oYDzIxMjYxMTAz
MTE0NTQzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQcqqjux7LfYXzn2IrQB6DXlrvse9RaLGMO2m94QORj5pxelIS1NvMk
2Wb+pfvp2uN8d5BgrCCMceyXYNVvYupwo2MwYTAUBgNVHREEDTALgglsb2NhbGhv
c3QwCQYDVR0TBAIwADAdBgNVHQ4EFgQUr2JTxhHXpk096pA+05Y+3bOa/E4wHwYD
VR0jBBgwFoAUHk82yLEV+t8/SpjzBVrf6yGR5k8wCgYIKoZIzj0EAwIDSAAwRQIh
AJvYI2r4d/yawgGhwXvbro+0FtvCW8JE2q2o/4mJ5SofAiAizkdpFRcOlR1swqEE
svwQecIyW3D6SfZ4qbCHvG5nzw==
-----END CERTIFICATE-----
"""


class LandingPagesByTLS(TLSCase):
    line, page, FILE = LandingPages.line, LandingPages.page, LandingPages.FILE

    def pin(self):
        return server_module.fingerprint(LOCALHOST.encode())

    def test_certificate_that_nobody_vouches_for_is_known_by_its_fingerprint(self):
        self.start_server()
        program = self.server.program
        host = "localhost:%d" % program.tls_address[1]
        dial = "https://localhost:%d --fingerprint %s -i NAME -v web=9000"
        dial %= program.client_address[1], self.pin()
        sum = hashlib.sha256(read(SCRIPTS[1]).encode()).hexdigest()
        line = "curl -fsSko {0} https://{1}/{0} && echo '{2}  {0}' | sha256sum -c"
        line += " && python3 {0} -h {3}"
        self.assertEqual(self.line(host), line.format(self.FILE[1:], host, sum, dial))
        self.assertIn("certificate of this server: SHA256 " + self.pin(), self.page())
        options = client_module.parse_arguments(["-h"] + dial.split())
        self.assertTrue(options.tls)
        self.assertEqual(options.fingerprint.hex(), self.pin().replace(":", "").lower())

    def test_visitors_without_tls_get_the_line_for_clients_with_it(self):
        self.start_server()
        program = self.server.program
        port = program.visitor_address[1]
        conn = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.addCleanup(conn.close)
        page = self.page("localhost:%d" % port, conn=conn)
        line = "curl -fsS http://localhost:%d%s | python3 - -h https://localhost:%d"
        line %= port, self.FILE, program.client_address[1]
        self.assertIn("%s --fingerprint %s -i" % (line, self.pin()), page)

    def test_self_signed_is_told_from_signed_by_another(self):
        for pem, expected in (
            (LOCALHOST, True),
            (OF_AN_AUTHORITY, False),
            (OF_AN_AUTHORITY + LOCALHOST, False),  # a chain: the first one counts
            ("", False),
            (LOCALHOST.replace("MIIB", "AAAA"), False),
        ):
            self.assertIs(server_module.is_self_signed(pem.encode()), expected)

    def test_certificate_of_an_authority_needs_no_fingerprint(self):
        change(self, server_module, is_self_signed=lambda cert: False)
        port = free_port()
        self.start_server(port=port, client_port=port)
        line = "curl -fsS https://localhost:%d%s | python3 - -h https://localhost:%d -i"
        line %= port, self.FILE, port
        self.assertIn(line, self.line("localhost:%d" % port))
        self.assertNotIn("--fingerprint", self.page())
        self.assertIn("certificate of this server: SHA256 " + self.pin(), self.page())


class NamesByTLS(TLSCase):
    """What the ClientHello decides: the certificate, or a service with its own TLS."""

    def setUp(self):
        super().setUp()
        self.www = self.file(WWW)
        self.of_www = ssl.create_default_context(cafile=self.www)

    def secret_service(self):
        """The port of a service that speaks TLS itself, half-close and all."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.www)

        def handler(conn):
            visitor = TLSVisitor(conn, context, server=True)
            data = b"".join(iter(lambda: visitor.recv(65536), b""))
            visitor.sendall(data.upper())
            visitor.shutdown(socket.SHUT_WR)

        return self.service(handler)

    def start_secret(self, **options):
        self.start_server(**options)
        target = {"target": self.secret_service(), "tls": "passthrough"}
        self.client = self.start_client({"secret": target, "web": self.echo()})

    def visit_by_name(self, name, context):
        return TLSVisitor(self.connect(), context, name)

    def test_service_with_its_own_tls_gets_it_untouched(self):
        self.start_secret()
        conn = self.visit_by_name("secret.tim.localhost", self.of_www)  # its own
        conn.sendall(b"hello" * 50000)
        conn.shutdown(socket.SHUT_WR)
        got = b"".join(iter(lambda: conn.recv(65536), b""))
        self.assertEqual(got, b"HELLO" * 50000)
        self.assertFalse(self.server.program.visitors.all)

    def test_other_names_are_served_by_our_own_tls(self):
        self.start_secret()
        for name in ("web.tim.x", "other.tim.x", None):
            conn = self.visit_by_name(name, self.context)
            conn.sendall(self.ask("web.tim.x"))
            self.assertIn(b" 200 ", read_head(conn)[0])

    def test_hello_that_comes_in_pieces_loses_nothing(self):
        self.start_secret()
        pairs = ("secret.tim.localhost", self.of_www), ("web.tim.x", self.context)
        for name, context in pairs:
            conn = self.connect()
            sent = []

            def trickle(data, send=conn.sendall, sent=sent):
                for i in range(0, len(data), 50):
                    sent.append(send(data[i : i + 50]))
                    self.server.do(lambda: True)  # a turn of the loop

            TLSVisitor(Trickle(conn, trickle), context, name)
            self.assertGreater(len(sent), 3)

    def test_requests_for_a_service_with_its_own_tls_are_misdirected(self):
        self.start_secret()
        self.assertEqual(self.get("secret.tim.x").status, 421)
        plain = socket.create_connection(self.server.program.visitor_address[:2])
        self.addCleanup(plain.close)
        plain.settimeout(PATIENCE)
        said = self.raw(self.ask("secret.tim.x"), plain)
        self.assertIn(b"HTTP/1.1 421", said)
        self.assertNotIn(b"secret", self.get("tim.x").content)

    def test_its_address_is_by_tls_and_needs_a_port_for_it(self):
        self.start_secret()
        self.client.until(lambda: "secret" in self.client.program.urls)
        url = self.client.program.urls["secret"]
        port = self.server.program.tls_address[1]
        self.assertEqual(url, "https://secret.tim.localhost:%d/" % port)
        self.start_server(tls_port=None)
        target = {"target": 1, "tls": "passthrough"}
        client = self.start_client({"secret": target}, wait=False)
        client.until(lambda: "secret" in client.program.urls)
        self.assertIn("no port with TLS", client.program.urls["secret"])

    def test_port_that_clients_share_passes_nothing_without_a_domain(self):
        """A client could take the name by which the others dial."""
        for domain, refused in (("", True), ("example.com", False)):
            port = TCPPorts.free_ports(self, 1)[0]
            self.start_server(domain=domain, tls_port=port, client_port=port)
            target = {"target": 1, "tls": "passthrough"}
            client = self.start_client({"secret": target}, wait=False)
            client.until(lambda: "secret" in client.program.urls)  # noqa: B023
            url = client.program.urls["secret"]
            self.assertEqual("only with --domain" in url, refused, url)

    def test_gate_of_addresses_stands_before_it_too(self):
        self.start_server()
        target = {"target": self.secret_service(), "tls": "passthrough"}
        target["visitors"] = ["192.0.2.0/24"]
        self.start_client({"secret": target})
        with self.assertRaises((OSError, ssl.SSLError)):
            self.visit_by_name("secret.tim.localhost", self.of_www).recv(1)

    def test_clients_port_passes_nothing_through(self):
        self.start_secret()
        address = self.server.program.client_address[:2]
        conn = socket.create_connection(address, PATIENCE)
        self.addCleanup(conn.close)
        visitor = TLSVisitor(conn, self.context, "secret.tim.localhost")
        visitor.sendall(self.ask("secret.tim.localhost"))
        self.assertIn(b" 404 ", read_head(visitor)[0])

    def test_connection_that_ends_in_its_hello_leaves_nothing(self):
        self.start_secret()
        conn = self.connect()
        conn.sendall(records(hello_message(ClientHellos.NAME))[:60])
        connections = self.server.loop.connections
        preface = server_module.Preface

        def waiting():
            return [c for c in connections if isinstance(c.owner, preface)]

        self.server.until(waiting)
        conn.close()
        self.server.until(lambda: not waiting())
        self.assertFalse(self.server.program.visitors.all)

    # Certificates by name.

    def folder(self, **pairs):
        """A folder with NAME.crt and NAME.key for each, `__` for a dot."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        for name, pem in pairs.items():
            self.put_pair(folder, name.replace("__", "."), pem)
        return folder

    def put_pair(self, folder, name, pem):
        key, cert = pem.split("-----BEGIN CERT")
        for end, text in ((".key", key), (".crt", "-----BEGIN CERT" + cert)):
            with open(os.path.join(folder, name + end), "w") as file:
                file.write(text)

    def certificate(self, name):
        """The name in the certificate that a visitor of this name gets."""
        context = ssl.SSLContext(getattr(ssl, "PROTOCOL_TLS_CLIENT", ssl.PROTOCOL_TLS))
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        visitor = self.visit_by_name(name, context)
        der = visitor.object.getpeercert(True)
        pems = {"localhost": LOCALHOST, "www": WWW}
        for word, pem in pems.items():
            cert = pem[pem.index("-----BEGIN CERT") :]
            if ssl.PEM_cert_to_DER_cert(cert) == der:
                return word
        return der

    def test_certificate_is_that_of_the_name(self):
        folder = self.folder(www__example__org=WWW, _wildcard__tim__dev=WWW)
        self.start_server(tls_dir=folder)
        for name in ("www.example.org", "WWW.example.org", "a.tim.dev", "b.tim.dev"):
            self.assertEqual(self.certificate(name), "www", name)
        for name in ("web.tim.x", None, "a.b.tim.dev", "tim.dev", "example.org"):
            self.assertEqual(self.certificate(name), "localhost", name)

    def test_folder_is_looked_at_again(self):
        change(self, server_module, LOOK_TIME=0)
        folder = self.folder(www__example__org=WWW)
        self.start_server(tls_dir=folder)
        self.put_pair(folder, "a.b", WWW)
        self.assertEqual(self.certificate("a.b"), "www")
        self.put_pair(folder, "a.b", LOCALHOST)
        self.assertEqual(self.certificate("a.b"), "localhost")
        self.put_pair(folder, "www.example.org", "x-----BEGIN CERTy")  # half written
        self.assertEqual(self.certificate("www.example.org"), "www")
        os.remove(os.path.join(folder, "www.example.org.crt"))
        self.assertEqual(self.certificate("www.example.org"), "localhost")
        self.put_pair(folder, "c.d", "x-----BEGIN CERTy")
        self.assertEqual(self.certificate("c.d"), "localhost")

    def test_without_a_default_a_name_that_is_not_there_is_told_so(self):
        folder = self.folder(www__example__org=WWW)
        self.start_server(tls_dir=folder, tls_cert=None)
        self.assertEqual(self.certificate("www.example.org"), "www")
        with self.assertRaisesRegex(ssl.SSLError, "(?i)unrecognized.name"):
            self.certificate("web.tim.x")
        said = self.raw(self.ask("www.example.org"), self.connect())
        self.assertIn(b"X-Tunnel-Error: tls", said)  # as with a certificate of its own

    def test_folder_that_is_wrong_is_told_at_the_start(self):
        broken = self.folder(a__b=WWW)
        os.remove(os.path.join(broken, "a.b.key"))
        table = [(os.path.join(broken, "none"), "No such file"), (broken, "a.b.key")]
        table.append((self.folder(), "holds no NAME.crt"))
        for folder, word in table:
            with self.assertRaisesRegex(ValueError, re.escape(word)):
                make_server(tls_dir=folder, tls_port=0)

    def test_a_name_opens_no_file_but_its_own(self):
        folder = self.folder(www__example__org=WWW)
        inside = os.path.join(folder, "inside")
        os.mkdir(inside)
        self.put_pair(folder, "outside", WWW)
        default = server_module.open_tls(self.pem, None)
        certificates = server_module.Certificates(default, inside)
        asked = []
        change(self, os.path, exists=lambda path: asked.append(path))
        for name in (b"../outside", b"..", b"a/../../outside", b"/etc/passwd", b"\0"):
            found = ClientHellos.find(self, records(hello_message(server_name(name))))
            self.assertEqual(found[0], "")
            certificates.find(found[0])
        self.assertEqual(asked, [])


class Trickle:
    """A connection that sends in another way."""

    def __init__(self, conn, send):
        self.conn, self.sendall = conn, send

    def __getattr__(self, name):
        return getattr(self.conn, name)


class TargetsByTLS(TunnelCase):
    """The client dials a service by TLS."""

    PIN = server_module.fingerprint(LOCALHOST.encode())

    def secured(self, handler, pem=LOCALHOST):
        """The port of a service that runs handler(connection by TLS)."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.file(pem))

        def handle(conn):
            with contextlib.suppress(ssl.SSLError):
                handler(TLSVisitor(conn, context, server=True))

        return self.service(handle)

    def greeting(self, **options):
        def greet(conn):
            while read_head(conn)[0]:
                conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

        return self.secured(greet, **options)

    def start_for(self, port, host="127.0.0.1", **options):
        """Server and client, whose service `web` is this target by TLS."""
        self.start_server()
        options["target"] = "https://%s:%d" % (host, port)
        self.client = self.start_client({"web": options})

    def refused(self, port, *arguments, status=502, **options):
        """What the page says that a visitor gets."""
        self.start_for(port, *arguments, **options)
        answer = self.get("web.tim.x", headers={"Accept": "text/plain"})
        self.assertEqual(answer.status, status, answer.content)
        return answer.content.decode()

    def test_own_certificate_on_this_machine_is_served_as_it_is(self):
        self.start_for(self.greeting())
        conn = self.keep()
        for _ in range(3):
            answer = self.get("web.tim.x", conn=conn)
            self.assertEqual((answer.status, answer.content), (200, b"hello"))

    def test_certificate_that_is_known_is_served(self):
        port, pem = self.greeting(), self.file(LOCALHOST)
        known = [{"ca": pem}, {"fingerprint": self.PIN}]
        known.append({"ca": pem, "fingerprint": self.PIN})
        for options in known:
            for host in ("127.0.0.1", "localhost"):
                self.start_for(port, host, **options)
                self.assertEqual(self.get("web.tim.x").content, b"hello", options)

    def test_certificate_that_is_not_known_is_refused_and_named(self):
        port, other = self.greeting(), self.file(OTHER)
        wrong = [{"ca": other}, {"fingerprint": "00" * 32}]
        wrong += [dict(wrong[0], fingerprint=self.PIN)]
        wrong += [{"ca": self.file(LOCALHOST), "fingerprint": "00" * 32}]
        for options in wrong:
            said = self.refused(port, **options)
            self.assertRegex(said, "127.0.0.1:%d: TLS: .*certificate" % port)
        with self.subTest("the name"):
            said = self.refused(self.greeting(pem=OTHER), ca=other)
            self.assertRegex(said, "TLS: .*127.0.0.1")

    def test_target_elsewhere_needs_a_certificate_that_the_system_knows(self):
        real = client_module.Resolver.look_up

        def look_up(host, port, flags):
            return real("127.0.0.1" if flags == 0 else host, port, flags)

        change(self, client_module.Resolver, look_up=staticmethod(look_up))
        port, names = self.greeting(), []
        said = self.refused(port, "nas.test")
        self.assertRegex(said, "nas.test:%d: TLS: .*certificate" % port)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.file(LOCALHOST))
        callback = "sni_callback" if hasattr(context, "sni_callback") else None
        note = lambda _conn, name, _context: names.append(name)  # noqa: E731
        if callback:
            context.sni_callback = note
        else:  # Python 3.6
            context.set_servername_callback(note)
        port = self.service(lambda conn: TLSVisitor(conn, context, server=True))
        self.refused(port, "nas.test", fingerprint="00" * 32)
        self.assertEqual(names, ["nas.test"])

    def test_target_without_tls_is_told_so(self):
        self.assertIn("the other side speaks no TLS", self.refused(self.echo()))
        port = self.service(lambda conn: conn.recv(1))  # enough of a hello
        self.assertRegex(self.refused(port), "127.0.0.1:%d: " % port)

    def test_target_that_refuses_is_told_as_without_tls(self):
        port = free_port()
        said = self.refused(port)
        self.assertIn("127.0.0.1:%d refused the connection" % port, said)

    def test_handshake_has_the_time_of_the_dial(self):
        going = threading.Event()
        port = self.service(lambda conn: going.wait(PATIENCE))
        self.addCleanup(going.set)
        self.start_for(port)
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x", "Accept: text/plain"))
        phase = client_module.Phase.HANDSHAKE
        connections = self.client.loop.connections
        self.client.until(lambda: phase in [c.phase for c in connections])
        self.client.pass_time(client_module.DIAL_TIME - 0.5)
        self.assertEqual(self.dials(), [1, 0])
        self.client.pass_time(0.6)
        said = self.raw(b"", conn)
        self.assertIn(b" 504 ", said)
        self.assertIn(b"127.0.0.1:%d did not answer in time" % port, said)
        self.assertEqual(self.dials(), [0, 0])

    def test_visitor_that_leaves_ends_the_handshake(self):
        ended = threading.Event()

        def hear(conn):
            while conn.recv(65536):
                pass
            ended.set()

        self.start_for(self.service(hear))
        conn = self.visit()
        conn.sendall(self.ask("web.tim.x"))
        self.client.until(lambda: self.dials() == [1, 0])
        reset_on_close(conn)
        conn.close()
        self.assertTrue(ended.wait(PATIENCE))
        self.client.until(lambda: self.dials() == [0, 0])

    def test_crowd_is_served_though_handshakes_take_turns(self):
        change(self, client_module, TURN_BUDGET=-1)  # one handshake a turn
        self.start_for(self.greeting())
        conns = [self.visit() for _ in range(20)]
        for conn in conns:
            conn.sendall(self.ask("web.tim.x"))
        for conn in conns:
            self.assertIn(b"hello", self.raw(b"", conn))

    def test_half_close_passes_both_ways(self):
        def handler(conn):
            got = b"".join(iter(lambda: conn.recv(100), b""))
            conn.sendall(got.upper())
            conn.shutdown(socket.SHUT_WR)

        (number,) = TCPPorts.free_ports(self, 1)
        self.start_server(tcp_ports=[number], bind="127.0.0.1")
        target = "https://127.0.0.1:%d" % self.secured(handler)
        self.start_client({"web": {"target": target, "tcp": number}})
        self.server.until(lambda: self.server.program.tcp.open)
        with socket.create_connection(("127.0.0.1", number), PATIENCE) as conn:
            conn.sendall(b"a half-close")
            conn.shutdown(socket.SHUT_WR)
            self.assertEqual(self.raw(b"", conn), b"A HALF-CLOSE")

    def test_websocket_passes(self):
        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n")
            conn.sendall(b"Upgrade: websocket\r\n\r\nfirst")
            for data in iter(lambda: conn.recv(100), b""):
                conn.sendall(data.upper())

        self.start_for(self.secured(handler))
        conn = self.visit()
        upgrade = ["Connection: Upgrade", "Upgrade: websocket"]
        conn.sendall(self.ask("web.tim.x", *upgrade, close=False))
        first, rest = read_head(conn)
        self.assertIn(b" 101 ", first)
        for said in (b"first", b"FRAME"):
            while len(rest) < 5:
                rest += conn.recv(100)
            self.assertEqual(rest, said)
            rest = b""
            conn.sendall(b"frame")

    def test_twenty_megabytes_come_down_and_go_up_whole(self):
        big = random.Random(3).getrandbits(8 << 20).to_bytes(1 << 20, "big") * 20
        digest = hashlib.sha256(big).hexdigest().encode()

        def handler(conn):
            head, data = read_head(conn)
            said, length = big, re.search(rb"(?i)content-length: (\d+)", head)
            if length:
                size = int(length.group(1))
                found = hashlib.sha256(data)
                size -= len(data)
                while size:
                    data = conn.recv(1 << 20)
                    found.update(data)
                    size -= len(data)
                said = found.hexdigest().encode()
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said))
            conn.sendall(said)
            conn.recv(1)

        self.start_for(self.secured(handler))
        self.assertEqual(self.get("web.tim.x").content, big)
        answer = self.get("web.tim.x", method="POST", body=big)
        self.assertEqual(answer.content, digest)

    def test_target_that_dies_in_an_answer_cuts_the_visitor(self):
        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf")
            conn.conn.shutdown(socket.SHUT_RDWR)  # and not by TLS

        self.start_for(self.secured(handler))
        with self.assertRaises(ConnectionResetError):
            self.raw(self.ask("web.tim.x"))

    def test_answer_that_is_whole_needs_no_end_by_tls(self):
        """Many servers just close the connection."""

        def handler(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole")
            conn.conn.shutdown(socket.SHUT_RDWR)

        self.start_for(self.secured(handler))
        for _ in range(5):
            self.assertEqual(self.get("web.tim.x").content, b"whole")

    def test_rewritten_host_is_that_of_the_target(self):
        table = [
            ("https://nas:8443", "nas:8443"),
            ("https://nas", "nas"),
            ("https://nas:80", "nas:80"),
            ("http://nas:443", "nas:443"),
            ("https://[::2]", "[::2]"),
        ]
        for target, host in table:
            value = {"target": target, "host": "rewrite"}
            found = client_module.parse_service(value)
            self.assertEqual(found.options, {"host": host}, target)


# -----------------------------------------------------------------------------------
# The configurations of examples/deploy
# -----------------------------------------------------------------------------------
class Deployed(unittest.TestCase):
    """They name only options that the scripts have."""

    def commands(self):
        """Every command line of ours in the folder: (file, script, words)."""
        for name in sorted(os.listdir(os.path.join(HERE, "examples", "deploy"))):
            text = read(os.path.join("examples", "deploy", name)).replace("\\\n", " ")
            pattern = r"(?m)python3\S* (?:/\S*/)?(mdm_tunnel_\w+\.py) (.*)$"
            for script, words in re.findall(pattern, text):
                yield name, script, words.split()
            for words in re.findall(r"docker run .* mdm-tunnel (.*)$", text, re.M):
                yield name, SCRIPTS[0], words.split()

    def test_every_option_is_known(self):
        found = list(self.commands())
        files = {name for name, _, _ in found}
        units = {"mdm-tunnel-server.service", "mdm-tunnel-client.service"}
        self.assertEqual(files, units | {"README.md", "Dockerfile"})
        for name, script, words in found:
            module = server_module if script == SCRIPTS[0] else client_module
            with self.subTest(file=name, words=words):
                module.parse_arguments(words)

    def test_readme_names_every_file(self):
        told = read(os.path.join("examples", "deploy", "README.md"))
        for name in os.listdir(os.path.join(HERE, "examples", "deploy")):
            self.assertTrue(name == "README.md" or "`%s`" % name in told, name)


# -----------------------------------------------------------------------------------
# The smallest client, against the real server
# -----------------------------------------------------------------------------------
class TinyClient(TunnelCase):
    SIZE = 10 << 20  # bytes of a download

    def start_tiny(self, **services):
        self.start_server()
        script = os.path.join(HERE, "examples", "tiny_client.py")
        where = "127.0.0.1:%d" % self.server.program.client_address[1]
        words = [sys.executable, script, where, "tim"]
        words += ["%s=%d" % pair for pair in services.items()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.tiny = subprocess.Popen(words, **pipes)
        self.addCleanup(self.end_tiny)
        self.server.until(lambda: self.serves("tim", services))
        self.assertIn(b"web.tim.", self.tiny.stdout.readline())

    def end_tiny(self):
        self.tiny.kill()
        self.tiny.wait(PATIENCE)
        self.tiny.stdout.close()

    def large(self):
        """The port of a service with SIZE bytes, and these."""
        body = os.urandom(self.SIZE)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self.SIZE
        return self.service(self.answer_each(head + body)), body

    def answer_each(self, answer):
        def handler(conn):
            while read_head(conn)[0]:
                conn.sendall(answer)

        return handler

    def test_two_services_a_download_and_an_upload(self):
        port, body = self.large()
        self.start_tiny(web=self.echo("web"), api=port)
        self.assertEqual(self.get("api.tim.x").content, body)
        conn = self.keep()
        for _ in range(3):
            self.assertEqual(self.echoed("web.tim.x", conn=conn)["service"], "web")
        text = "x" * (1 << 20)  # more than a window
        self.assertEqual(self.echoed("web.tim.x", "/", "POST", text)["body"], text)

    def test_download_that_is_not_read_holds_up_no_other(self):
        port, _ = self.large()
        self.start_tiny(web=self.echo("web"), api=port)
        stalled = self.visit()
        stalled.sendall(self.ask("api.tim.x"))
        self.assertTrue(stalled.recv(1))
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")
        stalled.close()
        link = self.server.program.registry.pools["tim"].tunnel.link
        self.server.until(lambda: not link.streams)
        self.assertEqual(self.echoed("web.tim.x")["service"], "web")

    def test_dead_target_is_told_and_a_server_that_stops_ends_it(self):
        self.start_tiny(web=TCPPorts.free_ports(self, 1)[0])
        answer = self.get("web.tim.x")
        self.assertEqual((answer.status, answer.headers["X-Tunnel-Error"]),
                         (502, "refused"))  # fmt: skip
        self.server.end()
        self.tiny.wait(PATIENCE)

    def test_it_is_short_and_knows_the_kinds_of_the_protocol(self):
        source = read(os.path.join("examples", "tiny_client.py"))
        self.assertLessEqual(len(source.splitlines()), 120)
        names = re.search(r"\(([A-Z,\s]+)\) = range\(1, 14\)", source).group(1)
        kinds = [name.strip() for name in names.split(",")]
        self.assertEqual(kinds, [kind.name for kind in Kind][:13])


# -----------------------------------------------------------------------------------
# The programs as processes: silence, signals, exit codes
# -----------------------------------------------------------------------------------
class Processes(TunnelCase):
    def setUp(self):
        super().setUp()
        self.processes = []

    def launch(self, script, *arguments, change="", **options):
        """A script as a process; its output is read line by line. `change` is such as
        `TAKEOVER = 3600`, for what a slow machine could miss."""
        command = [sys.executable, os.path.join(HERE, script)]
        if change:
            code = "import sys; sys.path.insert(0, %r); import %s as script; "
            code += "script.%s; script.main()"
            command[1:] = ["-c", code % (HERE, script[:-3], change)]
        process = subprocess.Popen(
            command + list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            **options
        )
        self.addCleanup(self.put_down, process)
        return process

    def put_down(self, process):
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
        process.stdout.close()
        process.stderr.close()

    def read_until(self, process, word):
        """Read what the process says up to a line with `word`, or to its end."""
        for line in iter(process.stderr.readline, ""):
            if word in line:
                return
        self.fail("it ended and never said %r" % word)

    def launch_server(self, *words, **options):
        """The process, and its two ports as -v says them."""
        words = ["-v", "-p", "0", "-c", "0"] + list(words)
        process = self.launch(SCRIPTS[0], *words, **options)
        ports = re.findall(r"port (\d+)", process.stderr.readline())
        return process, int(ports[0]), ports[1]

    def launch_both(self, *words, **options):
        server, port, client_port = self.launch_server(*words, **options)
        words = ["-v", "-h", "127.0.0.1", "-p", client_port, "-i", "tim"] + list(words)
        words += ["web=%d" % self.echo()]
        client = self.launch(SCRIPTS[1], *words, **options)
        line = client.stdout.readline()
        self.assertIn("http://web.tim.localhost:%d/" % port, line)
        return server, client, port

    def fetch(self, port, path="/"):
        conn = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.addCleanup(conn.close)
        headers = {"Host": "web.tim.localhost", "Connection": "close"}
        conn.request("GET", path, None, headers)
        return conn.getresponse()

    def test_verbose_client_prints_urls_that_work(self):
        server, client, port = self.launch_both()
        self.assertEqual(self.fetch(port).status, 200)

    def test_silent_without_v(self):
        ports = free_port(), free_port()
        server = self.launch(SCRIPTS[0], "-p", str(ports[0]), "-c", str(ports[1]))
        client = self.launch(
            SCRIPTS[1], "-h", "127.0.0.1", "-p", str(ports[1]), "-i", "tim", "web=9"
        )
        self.start_server()  # only for its until(): the processes have none to ask
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self.fetch(ports[0]).status == 502:
                    break
        for process in (client, server):
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=PATIENCE)
            self.assertEqual((process.returncode, out, err), (0, "", ""))

    def test_both_signals_end_both_programs_with_status_0(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            server, client, port = self.launch_both()
            for process in (client, server):
                process.send_signal(number)
                err = process.communicate(timeout=PATIENCE)[1]
                self.assertEqual(process.returncode, 0)
                self.assertIn("stopping", err)
                self.assertNotIn("dialling again", err)

    def test_many_signals_leave_no_traceback(self):
        if os.name == "nt":
            self.skipTest("no such signals here")
        server, client, _ = self.launch_both()
        for process in (client, server):
            for _ in range(200):
                process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=PATIENCE)[1]
            self.assertEqual(process.returncode, 0, err)
            self.assertNotIn("Traceback", err)

    def test_sigterm_lets_the_running_request_end(self):
        go, asked = threading.Event(), threading.Event()

        def slow(conn):
            read_head(conn)
            asked.set()
            go.wait(PATIENCE)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow")

        for script in SCRIPTS:
            go.clear()
            asked.clear()
            patient = ["--drain", "3600"]
            server, port, client_port = self.launch_server(*patient)
            words = ["-v", "-h", "127.0.0.1", "-p", client_port, "-i", "tim"]
            words += patient + ["web=%d" % self.service(slow)]
            client = self.launch(SCRIPTS[1], *words)
            client.stdout.readline()
            conn = socket.create_connection(("127.0.0.1", port), PATIENCE)
            self.addCleanup(conn.close)
            conn.sendall(self.ask("web.tim.x"))
            self.assertTrue(asked.wait(PATIENCE))
            process = server if script == SCRIPTS[0] else client
            process.send_signal(signal.SIGTERM)
            self.read_until(process, "stopping")
            go.set()
            self.assertIn(b"slow", self.raw(b"", conn))
            process.communicate(timeout=PATIENCE)
            self.assertEqual(process.returncode, 0)

    def test_client_that_stops_does_not_wait_for_a_stream_that_is_done(self):
        go, asked = threading.Event(), threading.Event()

        def slow(conn):
            read_head(conn)
            asked.set()
            go.wait(PATIENCE)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow")
            conn.recv(100)

        server, port, client_port = self.launch_server()
        words = ["-v", "-h", "127.0.0.1", "-p", client_port, "-i", "tim"]
        words += ["web=%d" % self.service(slow)]
        client = self.launch(SCRIPTS[1], "--drain", "3600", *words)
        client.stdout.readline()
        conn = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.addCleanup(conn.close)
        conn.sendall(self.ask("web.tim.x", close=False))
        self.assertTrue(asked.wait(PATIENCE))
        client.send_signal(signal.SIGTERM)
        self.read_until(server, "goodbye")
        go.set()
        self.assertIn(b"200 OK", read_head(conn)[0])
        client.wait(PATIENCE)

    def test_client_with_only_idle_connections_stops_at_once(self):
        server, client, port = self.launch_both("--drain", "3600")
        conn = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.addCleanup(conn.close)
        conn.request("GET", "/", None, {"Host": "web.tim.localhost"})
        conn.getresponse().read()
        client.send_signal(signal.SIGTERM)
        client.wait(PATIENCE)

    def test_second_client_of_an_id_ends_with_one_line_and_exit_3(self):
        server, port, client_port = self.launch_server(change="TAKEOVER = 3600")
        words = ["-h", "127.0.0.1", "-p", client_port, "-i", "tim", "web=9"]
        first = self.launch(SCRIPTS[1], "-v", *words)
        first.stdout.readline()
        done = run_script(SCRIPTS[1], *words)
        self.assertEqual((done.status, done.stdout), (3, ""))
        self.assertEqual(len(done.stderr.splitlines()), 1)
        self.assertIn("taken", done.stderr)

    def at_terminal(self, *words, begin=("-",), **env):
        """The client, which comes by standard input, and its terminal."""
        if os.name == "nt":
            self.skipTest("no such terminals here")
        import fcntl
        import pty
        import termios

        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        process = subprocess.Popen(
            [sys.executable, *begin, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
            env={**os.environ, **env},
        )
        os.close(slave)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(process.kill)
        process.stdin.write(read(SCRIPTS[1]).encode())
        process.stdin.close()
        return process, master

    def said_at(self, master, word=b"\0"):
        """What comes at a terminal, up to `word` or to the end of the program."""
        said = b""
        with contextlib.suppress(OSError):  # EIO: nobody holds the other end
            while word not in said:
                if not select.select([master], [], [], PATIENCE)[0]:
                    self.fail("nothing more came behind %r" % said)
                said += os.read(master, 4096)
        return said

    def start_with_a_token(self):
        """A server that wants one; the client's words."""
        self.start_server(tokens=self.file('{"tim": "secret"}'))
        port = str(self.server.program.client_address[1])
        return ["-v", "-h", "127.0.0.1", "-p", port, "-i", "tim", "web=9"]

    def test_token_is_asked_for_at_the_terminal_and_not_shown(self):
        words = self.start_with_a_token()
        process, master = self.at_terminal(*words)
        self.assertIn(b"Token of tim: ", self.said_at(master, b"Token of tim: "))
        os.write(master, b"secret\n")
        self.assertIn(b"http://web.tim.localhost", process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        self.assertNotIn(b"secret", self.said_at(master))
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_token_that_is_not_the_right_one_is_asked_for_once(self):
        words = self.start_with_a_token()
        for typed, status, word in (
            (b"wrong\n", 3, b"no such id, or a wrong token"),
            (b"\n", 3, b"this server wants a token"),
            (b"\x04", 3, b"this server wants a token"),
            (b"\xc3\xa9\n", 2, b"ASCII"),
            (b"\x03", 0, b""),
        ):
            process, master = self.at_terminal(*words, LC_ALL="C.UTF-8")
            self.said_at(master, b"Token of tim: ")
            os.write(master, typed)
            said = self.said_at(master)
            self.assertEqual(process.wait(PATIENCE), status, said)
            self.assertIn(word, said)
            self.assertNotIn(b"Traceback", said)
            self.assertNotIn(b"Token of", said)

    def test_sigterm_at_the_prompt_ends_the_client_and_gives_the_terminal_back(self):
        import termios

        words = self.start_with_a_token()
        process, master = self.at_terminal(*words)
        self.said_at(master, b"Token of tim: ")
        self.assertFalse(termios.tcgetattr(master)[3] & termios.ECHO)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertTrue(termios.tcgetattr(master)[3] & termios.ECHO)

    def test_job_in_the_background_is_not_stopped_by_asking(self):
        words = self.start_with_a_token()
        code = "import os, subprocess, sys\n"
        code += "words = [sys.executable, '-'] + sys.argv[1:]\n"
        code += "sys.exit(subprocess.call(words, preexec_fn=os.setpgrp))"
        process, master = self.at_terminal(*words, begin=("-c", code))
        said = self.said_at(master)
        self.assertEqual(process.wait(PATIENCE), 3)
        self.assertIn(b"this server wants a token", said)
        self.assertNotIn(b"Token of", said)

    def test_nobody_is_asked_where_there_is_no_terminal(self):
        done = run_script(SCRIPTS[1], *self.start_with_a_token()[1:])
        self.assertEqual((done.status, done.stdout), (3, ""))
        self.assertEqual(len(done.stderr.splitlines()), 1)
        self.assertIn("this server wants a token", done.stderr)

    def test_client_is_read_while_root_may_and_handed_out_afterwards(self):
        if os.name == "nt" or os.getuid() != 0:
            self.skipTest("only root can")
        folder = tempfile.mkdtemp()  # where nobody else can look
        self.addCleanup(shutil.rmtree, folder)
        for name in SCRIPTS:
            shutil.copy(os.path.join(HERE, name), folder)
        path = os.path.join(folder, SCRIPTS[0])
        words = ["-v", "-p", "0", "-c", "0", "--user", "nobody"]
        process = self.launch(path, *words)
        port = int(re.findall(r"port (\d+)", process.stderr.readline())[0])
        conn = http.client.HTTPConnection("localhost", port, timeout=PATIENCE)
        self.addCleanup(conn.close)
        conn.request("GET", "/" + SCRIPTS[1])
        self.assertEqual(conn.getresponse().read(), read(SCRIPTS[1]).encode())

    def test_mistakes_about_secrets_end_with_one_line_and_exit_2(self):
        good = self.file(LOCALHOST)
        empty, broken, none = self.file(""), self.file('{"tim": 5}'), "/no/such/file"
        bad_name = {"MDM_TUNNEL_TOKEN": "\u00e9"}
        table = [
            (SCRIPTS[0], ["--tokens", empty], {}, "JSON"),
            (SCRIPTS[0], ["--tokens", broken], {}, "tim"),
            (SCRIPTS[0], ["--tokens", none], {}, "No such file"),
            (SCRIPTS[0], ["--tls-cert", empty], {}, "certificate"),
            (SCRIPTS[0], ["--tls-cert", none], {}, "No such file"),
            (SCRIPTS[0], ["--tls-port", "0"], {}, "certificate"),
            (SCRIPTS[0], ["--tls-key", good], {}, "certificate"),
            (SCRIPTS[0], ["--redirect", "--tls-cert", good], {}, "redirect"),
            (SCRIPTS[0], ["--user", "no-such-user"], {}, "no-such-user"),
            (SCRIPTS[0], ["--user", ""], {}, "no user"),
            (SCRIPTS[0], ["--user", "root"], {}, "root would keep all rights"),
            (SCRIPTS[1], ["web=9", "--token-file", empty], {}, "empty"),
            (SCRIPTS[1], ["web=9", "--token-file", none], {}, "No such file"),
            (SCRIPTS[1], ["web=9", "--token-file", broken], {}, "JSON"),
            (SCRIPTS[1], ["web=9", "--token-file", good], {}, "line"),
            (SCRIPTS[1], ["web=9"], {"MDM_TUNNEL_TOKEN": ""}, "empty"),
            (SCRIPTS[1], ["web=9"], bad_name, "ASCII"),
            (SCRIPTS[1], ["web=9", "--tls-ca", empty], {}, empty),
            (SCRIPTS[1], ["web=9", "--tls-ca", none], {}, none),
            (SCRIPTS[1], ["web=9", "--fingerprint", "ab"], {}, "64"),
        ]
        for script, words, env, expected in table:
            with self.subTest(words=words):
                done = run_script(script, *words, env=env)
                self.assertEqual((done.status, done.stdout), (2, ""), done.stderr)
                self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
                self.assertIn(expected, done.stderr)

    def launch_with_secret(self, secret):
        """Both, by TLS and with a token, and all they say with -vv."""
        tokens, pem = self.file(json.dumps({"tim": secret})), self.file(LOCALHOST)
        words = ["-vv", "-p", "0", "-c", "0", "--tokens", tokens, "--tls-cert", pem]
        server = self.launch(SCRIPTS[0], *words)
        lines = iter(server.stderr.readline, "")
        said = [next(line for line in lines if "port" in line)]
        port = re.findall(r"port (\d+)", said[0])[1]
        words = ["-vv", "-h", "127.0.0.1", "-p", port, "-i", "tim", "--tls-ca", pem]
        words += ["--token-file", self.file(secret), "web=9"]
        client = self.launch(SCRIPTS[1], *words)
        self.assertIn("web.tim", client.stdout.readline())
        return server, client

    def test_secret_is_in_no_line_and_in_no_core_dump(self):
        secret = "do-not-tell-anybody"
        both = self.launch_with_secret(secret)
        for process in both:
            path = "/proc/%d/limits" % process.pid
            if os.path.exists(path):
                with open(path) as file:
                    line = next(x for x in file if x.startswith("Max core"))
                self.assertLessEqual(int(line.split()[4]), 1, line)
        for process in both[::-1]:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=PATIENCE)
            self.assertIn("LOGIN", err)
            self.assertNotIn(secret, out + err)
            self.assertNotIn(secret.encode().hex(), out + err)

    def test_rights_of_root_are_given_up(self):
        if os.name == "nt" or os.getuid() != 0:
            self.skipTest("only root can")
        import pwd

        nobody = pwd.getpwnam("nobody")
        words = ["-v", "-p", "0", "-c", "0", "--user", "nobody"]
        process = self.launch(SCRIPTS[0], *words)
        port = int(re.findall(r"port (\d+)", process.stderr.readline())[0])
        self.assertEqual(self.fetch(port).status, 404)
        with open("/proc/%d/status" % process.pid) as file:
            fields = dict(line.split(":", 1) for line in file)
        self.assertEqual(set(fields["Uid"].split()), {str(nobody.pw_uid)})
        self.assertEqual(set(fields["Gid"].split()), {str(nobody.pw_gid)})
        self.assertEqual(set(fields["Groups"].split()) - {str(nobody.pw_gid)}, set())

    def test_rights_that_cannot_be_given_up_end_the_server(self):
        if os.name == "nt" or os.getuid() != 0:
            self.skipTest("only root can")
        code = "import base64, hashlib, hmac, html, http, ipaddress, os, pwd, random; "
        code += "import resource, shlex, sys, traceback; "
        code += "sys.path[0] = %r; "
        code += "import mdm_tunnel_server as s; s.parse_arguments([]); "
        code += "os.setuid(65534); s.main(%r)"
        words = ["-p", "0", "-c", "0", "--user", "daemon"]
        command = [sys.executable, "-c", code % (HERE, words)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        err = process.communicate(timeout=PATIENCE)[1].decode()
        self.assertEqual(process.returncode, 1, err)
        self.assertEqual(len(err.splitlines()), 1, err)
        self.assertIn("cannot become daemon", err)

    def test_signals_of_an_embedding_program_stay_its_own(self):
        if os.name == "nt":
            self.skipTest("no such signals here")
        code = """
import os, signal, sys
sys.path.insert(0, %r)
import mdm_tunnel_server as s
before, heard = signal.getsignal(signal.SIGINT), []
signal.signal(signal.SIGUSR1, lambda *_: heard.append("usr1"))
server = s.Server(s.Config(0, 0, "127.0.0.1"))
server.loop.catch_signals(server.on_signal)
def tell(number):
    os.kill(os.getpid(), number)
def look():
    heard.append("stopping" if server.visitors.stopping else "running")
    tell(signal.SIGTERM)
timers = [s.Timer(server.loop, server, c) for c in (lambda: tell(signal.SIGUSR1), look)]
timers[0].set(0.05)
timers[1].set(0.2)
server.run()
assert heard == ["usr1", "running"] and server.visitors.stopping, heard
assert signal.getsignal(signal.SIGINT) is before
assert signal.set_wakeup_fd(-1) == -1
"""
        command = [sys.executable, "-c", code % HERE]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        err = process.communicate(timeout=PATIENCE)[1].decode()
        self.assertEqual((process.returncode, err), (0, ""))

    def test_user_who_could_not_read_the_files_again_ends_the_server(self):
        if os.name == "nt" or os.getuid() != 0:
            self.skipTest("only root can")
        words = ["-p", "0", "-c", "0", "--user", "nobody"]
        path = self.file('{"tim": "secret"}')
        done = run_script(SCRIPTS[0], *words + ["--tokens", path])
        said = "cannot become nobody: it must be able to read %s\n" % path
        self.assertEqual(done.status, 1)
        self.assertEqual(done.stderr.partition(": ")[2], said)

    def test_full_disk_under_the_log_harms_nobody(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full here")
        ports = free_port(), free_port()
        words = ["-p", str(ports[0]), "-c", str(ports[1])]
        mine = ["-h", "127.0.0.1", "-p", str(ports[1]), "-i", "tim"]
        mine += ["web=%d" % self.echo()]
        with open("/dev/full", "w") as full:
            for script, arguments in zip(SCRIPTS, (words, mine)):
                path = os.path.join(HERE, script)
                command = [sys.executable, path, "-vv"] + arguments
                process = subprocess.Popen(command, stdout=full, stderr=full)
                self.addCleanup(process.wait, PATIENCE)
                self.addCleanup(process.kill)
            self.until_answered(ports[0])
            path = os.path.join(HERE, SCRIPTS[0])
            command = [sys.executable, path, "--tokens", "/no/such/file"]
            done = subprocess.call(command, stdout=full, stderr=full, timeout=PATIENCE)
            self.assertEqual(done, 2)

    def until_answered(self, port):
        """Ask the service until it answers."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self.fetch(port).status == 200:
                    return
        self.fail("no answer")

    def test_both_work_with_few_descriptors_and_after_a_crowd(self):
        if os.name == "nt":
            self.skipTest("no such limit here")
        import resource

        def few():
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

        server, client, port = self.launch_both(preexec_fn=few)
        crowd = []
        for _ in range(150):
            conn = socket.create_connection(("127.0.0.1", port), PATIENCE)
            self.addCleanup(conn.close)
            conn.sendall(self.ask("web.tim.x", close=False))
            crowd.append(conn)
        for conn in crowd[-20:]:
            first, _ = read_head(conn)
            self.assertRegex(first, b"^HTTP/1.1 (200|503) ")
        for conn in crowd:
            conn.close()
        self.until_answered(port)
        for process in (client, server):
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=PATIENCE)
            self.assertEqual(process.returncode, 0)
            self.assertNotIn("Traceback", err)

    def test_stopped_client_loses_its_id_and_does_not_fight_for_it(self):
        if not hasattr(signal, "SIGSTOP"):
            self.skipTest("no such signal here")
        server, first, port = self.launch_both()
        first.send_signal(signal.SIGSTOP)
        client_port = next(word for word in first.args if word.isdigit())
        words = ["-v", "-h", "127.0.0.1", "-p", client_port, "-i", "tim"]
        second = self.launch(SCRIPTS[1], *words + ["web=%d" % self.echo("second")])
        self.assertIn("http://web.tim", second.stdout.readline())
        first.send_signal(signal.SIGCONT)
        self.read_until(first, "taken")
        answer = json.loads(self.fetch(port).read().decode())
        self.assertEqual(answer["service"], "second")
        self.assertIsNone(first.poll())
        second.kill()
        self.read_until(first, "logged in")

    def test_frames_are_shown_with_vv(self):
        server, port, client_port = self.launch_server()
        words = ["-vv", "-h", "127.0.0.1", "-p", client_port, "-i", "tim", "web=9"]
        client = self.launch(SCRIPTS[1], *words)
        client.stdout.readline()
        client.send_signal(signal.SIGTERM)
        out, err = client.communicate(timeout=PATIENCE)
        for line in (
            'from the server: CHALLENGE, version "%s"' % client_module.VERSION,
            'to the server: LOGIN, id "tim", session ..., nonce ..., notes true',
            "from the server: WELCOME\n",
            'to the server: SERVICES, web {"target":"127.0.0.1:9"}',
            'to the server: GOODBYE, code "stopping", reason "the client is stopping"',
        ):
            self.assertIn(line, err)

    def test_both_sides_say_the_same_of_a_request(self):
        server, client, port = self.launch_both()
        self.assertEqual(self.fetch(port, "/some/where").status, 200)
        lines = []
        for process in (server, client):
            found = iter(process.stderr.readline, "")
            line = next(line for line in found if '"GET /some/where" ' in line)
            lines.append(re.sub(r"^\S+ |tim |\s+\d+ms| +", "", line))
        self.assertEqual(*lines)

    def test_log_json_is_an_object_a_line_on_both_streams(self):
        server, port, client_port = self.launch_server()
        words = ["--log-json", "-h", "127.0.0.1", "-p", client_port, "-i", "tim"]
        target = "127.0.0.1:%d" % self.echo()
        client = self.launch(SCRIPTS[1], *words, "web=" + target)
        url = json.loads(client.stdout.readline())
        self.assertEqual((url["service"], url["target"]), ("web", target))
        self.assertEqual(url["url"], "http://web.tim.localhost:%d/" % port)
        self.assertEqual(self.fetch(port, "/x").status, 200)
        for line in iter(client.stderr.readline, ""):
            if json.loads(line).get("target") == "/x":
                break
        second = self.launch(SCRIPTS[1], *words, "--max-attempts", "1", "no-service")
        out, err = second.communicate(timeout=PATIENCE)
        self.assertEqual(second.returncode, 2)
        server.kill()
        for line in iter(client.stderr.readline, ""):
            if "dialling again" in json.loads(line)["text"]:
                break

    def test_what_ends_it_is_an_object_too(self):
        words = ["--log-json", "-p", str(free_port()), "--max-attempts", "1", "web=9"]
        client = self.launch(SCRIPTS[1], *words)
        out, err = client.communicate(timeout=PATIENCE)
        self.assertEqual(client.returncode, 4)
        self.assertIn("gave up", json.loads(err.splitlines()[-1])["text"])

    def test_address_of_the_inspector_is_told_also_without_v(self):
        words = ["-p", str(free_port()), "--inspect", "0", "web=9"]
        for more in ([], ["--log-json"]):
            client = self.launch(SCRIPTS[1], *words, *more)
            line = client.stdout.readline()
            url = json.loads(line)["inspect"] if more else line.split()[1]
            self.assertRegex(url, r"^http://127\.0\.0\.1:\d+/[0-9a-f]{32}/$")
            port = int(url.split(":")[2].split("/")[0])
            conn = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            self.addCleanup(conn.close)
            conn.request("GET", "/" + url.split("/", 3)[3])
            self.assertEqual(conn.getresponse().status, 200)
            client.send_signal(signal.SIGTERM)
            self.assertEqual(client.wait(PATIENCE), 0)
            if not more:
                self.assertEqual(client.stderr.read(), "")

    def test_urls_say_where_they_lead(self):
        server, port, client_port = self.launch_server()
        words = ["-v", "-h", "127.0.0.1", "-p", client_port, "-i", "tim"]
        client = self.launch(SCRIPTS[1], *words, "web=9", "long-name=unix:/no/where")
        lines = [client.stdout.readline() for _ in range(2)]
        url = "http://%%s.tim.localhost:%d/" % port
        want = ["long-name  %s -> unix:/no/where\n" % (url % "long-name")]
        want += ["web        %s -> 127.0.0.1:9\n" % (url % "web")]
        self.assertEqual(lines, want)

    def test_killed_server_and_client_come_back(self):
        ports = free_port(), free_port()
        words = ["-p", str(ports[0]), "-c", str(ports[1])]
        server = self.launch(SCRIPTS[0], *words)
        mine = ["-v", "-h", "127.0.0.1", "-p", str(ports[1]), "-i", "tim"]
        mine.append("web=%d" % self.echo())
        client = self.launch(SCRIPTS[1], *mine)
        client.stdout.readline()
        self.assertEqual(self.fetch(ports[0]).status, 200)
        client.kill()
        client = self.launch(SCRIPTS[1], *mine)
        client.stdout.readline()
        self.assertEqual(self.fetch(ports[0]).status, 200)
        server.kill()
        server.wait(PATIENCE)
        server = self.launch(SCRIPTS[0], "-v", *words)
        self.read_until(server, "tim serves")
        self.assertEqual(self.fetch(ports[0]).status, 200)


class LivingLong(Processes):
    """What systemd, scripts and administrators see of the programs. (None of the tests
    of Processes run here again.)"""

    def setUp(self):
        super().setUp()
        if os.name == "nt":
            self.skipTest("no such sockets and signals here")
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def path(self, name):
        return os.path.join(self.folder, name)

    def listen(self, address=None):
        """A stand-in for systemd; the address, as $NOTIFY_SOCKET has it."""
        address = address or self.path("notify")
        self.systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.systemd.close)
        self.systemd.settimeout(PATIENCE)
        self.systemd.bind(address.replace("@", "\0", 1))
        return address

    def told(self):
        return self.systemd.recv(4096).decode().split("\n")

    def told_until(self, line):
        """All lines up to this one."""
        lines = []
        while line not in lines:
            lines += self.told()
        return lines

    def assert_silent(self):
        self.systemd.setblocking(False)
        with self.assertRaises(BlockingIOError):
            raise AssertionError(self.told())
        self.systemd.settimeout(PATIENCE)

    def manager(self, environ, status=lambda: "well"):
        self.loop = fake_loop(server_module)
        self.addCleanup(self.loop.close)
        manager = server_module.Manager(self.loop, status)
        self.addCleanup(manager.close)
        manager.connect(environ)
        return manager

    def pass_time(self, seconds):
        self.loop.clock.now += seconds
        self.loop.turn()

    # The service manager.

    def test_manager_is_told_what_is_new_and_the_environment_forgets_it(self):
        environ = {"NOTIFY_SOCKET": self.listen(), "WATCHDOG_PID": "1", "HOME": "/"}
        said = ["a\nMAINPID=1"]
        manager = self.manager(environ, lambda: said[-1])
        self.assertEqual(environ, {"HOME": "/"})
        self.assert_silent()
        for _ in range(2):
            manager.ready()
        self.assertEqual(self.told(), ["READY=1"])
        self.assertEqual(self.told(), ["STATUS=a\\nMAINPID=1"])
        self.pass_time(server_module.LOOK_TIME)
        self.assert_silent()
        said.append("b")
        self.pass_time(server_module.LOOK_TIME)
        self.assertEqual(self.told(), ["STATUS=b"])
        manager.stopping(9)
        self.assertEqual(self.told(), ["STOPPING=1", "EXTEND_TIMEOUT_USEC=10000000"])
        manager.stopping(float("inf"))

    def test_abstract_address_is_reached(self):
        if not sys.platform.startswith("linux"):
            self.skipTest("no such addresses here")
        manager = self.manager({"NOTIFY_SOCKET": self.listen("@" + self.folder)})
        manager.ready()
        self.assertEqual(self.told(), ["READY=1"])

    def test_watchdog_is_fed_by_the_loop_at_half_its_time(self):
        environ = {"NOTIFY_SOCKET": self.listen(), "WATCHDOG_USEC": "20000000"}
        self.manager(dict(environ, WATCHDOG_PID=str(os.getpid())))
        self.assertEqual(self.told(), ["WATCHDOG=1"])
        self.pass_time(9.9)
        self.assert_silent()
        for seconds in (0.1, 10):
            self.pass_time(seconds)
            self.assertEqual(self.told(), ["WATCHDOG=1"])
        for more in ({"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"},
                     {"WATCHDOG_USEC": "-1"}, {"WATCHDOG_USEC": "x"}):  # fmt: skip
            self.manager(dict(environ, **more))
            self.pass_time(10)
            self.assert_silent()

    def test_reload_is_told_with_its_time_and_never_before_ready(self):
        manager = self.manager({"NOTIFY_SOCKET": self.listen()})
        with manager.reloading():
            pass
        self.assert_silent()
        manager.ready()
        self.told_until("STATUS=well")
        before = int(time.monotonic() * 1e6)
        with self.assertRaises(ValueError), manager.reloading():
            raise ValueError("and it is ready all the same")
        word, usec = self.told()
        self.assertEqual(word, "RELOADING=1")
        self.assertEqual(usec.partition("=")[0], "MONOTONIC_USEC")
        self.assertGreaterEqual(int(usec.partition("=")[2]), before)
        self.assertEqual(self.told(), ["READY=1"])

    def test_manager_that_is_deaf_or_gone_harms_nobody(self):
        logging.getLogger("mdm_tunnel").setLevel(logging.DEBUG)
        self.log.setLevel(logging.DEBUG)
        deaf = self.manager({"NOTIFY_SOCKET": self.listen()})
        for _ in range(2000):
            deaf.tell("x" * 1000)
        gone = [self.path("none"), "x" * 500, "@" + self.folder, "vsock:2:9"]
        for address in gone:
            manager = self.manager({"NOTIFY_SOCKET": address})
            manager.ready()
            manager.stopping(1)
        lines = [x for x in self.log.lines if x.startswith("service manager: ")]
        self.assertEqual(len(lines), 1 + len(gone), lines)

    def test_both_programs_tell_how_they_are(self):
        tokens = self.file('{"tim": "secret"}')
        env = dict(os.environ, NOTIFY_SOCKET=self.listen(), WATCHDOG_USEC="100000")
        server, _, port = self.launch_server("--tokens", tokens, env=env)
        lines = self.told_until("STATUS=0 ids are connected")
        self.assertIn("READY=1", lines)
        self.told_until("WATCHDOG=1")
        env.pop("NOTIFY_SOCKET")
        words = ["-v", "-h", "127.0.0.1", "-p", port, "-i", "tim", "web=9"]
        words += ["--token-file", self.file("secret")]
        client = self.launch(SCRIPTS[1], *words, env=env)
        self.told_until("STATUS=1 ids are connected")
        server.send_signal(signal.SIGHUP)
        self.told_until("RELOADING=1")
        self.told_until("READY=1")
        server.send_signal(signal.SIGTERM)
        self.told_until("STOPPING=1")
        self.read_until(client, "dialling again")

    def test_client_is_ready_with_its_login(self):
        server, _, port = self.launch_server()
        env = dict(os.environ, NOTIFY_SOCKET=self.listen())
        words = ["-h", "127.0.0.1", "-p", port, "-i", "tim", "web=9"]
        client = self.launch(SCRIPTS[1], *words, env=env)
        self.assertEqual(self.told(), ["READY=1"])
        said = "STATUS=logged in at 127.0.0.1:%s as tim" % port
        self.assertEqual(self.told(), [said])
        client.send_signal(signal.SIGHUP)
        self.told_until("RELOADING=1")
        self.assertEqual(self.told(), ["READY=1"])
        client.send_signal(signal.SIGTERM)
        self.told_until("STOPPING=1")

    def test_client_without_a_server_is_ready_but_one_that_is_refused_is_not(self):
        env = {"NOTIFY_SOCKET": self.listen()}
        words = ["-h", "127.0.0.1", "-i", "tim", "web=9", "-p"]
        client = self.launch(
            SCRIPTS[1], *words + [str(free_port())], env=dict(os.environ, **env)
        )
        self.assertEqual(self.told(), ["READY=1"])
        self.assertRegex(self.told()[0], "^STATUS=dialling again: .*refused")
        client.send_signal(signal.SIGINT)
        client.wait(PATIENCE)
        self.start_server(tokens=self.file('{"tim": "secret"}'))
        port = str(self.server.program.client_address[1])
        while self.drained():
            pass
        self.assertEqual(run_script(SCRIPTS[1], *words + [port], env=env).status, 3)
        self.assert_silent()

    def test_client_whose_id_is_taken_is_not_ready(self):
        server, _, port = self.launch_server(change="TAKEOVER = 3600")
        words = ["-h", "127.0.0.1", "-p", port, "-i", "tim", "web=9"]
        self.launch(SCRIPTS[1], "-v", *words).stdout.readline()
        env = {"NOTIFY_SOCKET": self.listen()}
        self.assertEqual(run_script(SCRIPTS[1], *words, env=env).status, 3)
        self.assert_silent()

    def test_client_is_told_again_what_it_cannot_take_over(self):
        client = self.manager_client()
        client.config.given.update(
            (str(n), client_module.parse_service(9)) for n in range(9000)
        )
        for _ in range(2):
            client.reload()
        lines = [x for x in self.log.lines if "the old list stays" in x]
        self.assertEqual(len(lines), 2, lines)

    def manager_client(self):
        """A client that has not dialled yet, with a service file."""
        file = client_module.Watched([self.file("{}")], client_module.parse_file)
        client = make_client({}, fake_loop(client_module), file=file)
        self.addCleanup(client.loop.close)
        return client

    def drained(self):
        """A datagram that waits, if there is one."""
        self.systemd.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return self.told()
        return self.systemd.settimeout(PATIENCE)

    def test_manager_is_still_told_when_the_rights_are_gone(self):
        if os.getuid() != 0:
            self.skipTest("only root can")
        env = dict(os.environ, NOTIFY_SOCKET=self.listen())
        os.chmod(self.folder, 0o700)
        server = self.launch_server("--user", "nobody", env=env)[0]
        self.told_until("READY=1")
        server.send_signal(signal.SIGTERM)
        self.told_until("STOPPING=1")

    # SIGHUP.

    def test_sighup_reads_the_files_and_tells_a_fault_again(self):
        tokens = self.file('{"tim": "secret"}')
        code = "LOOK_TIME = 3600"
        server, _, _ = self.launch_server("--tokens", tokens, change=code)
        for content, said in (('{"tim": "new"}', "changed: "), ("{", "not JSON"),
                              ("{", "not JSON"), ('{"tim": "new"}', "")):  # fmt: skip
            with open(tokens, "w") as file:
                file.write(content)
            server.send_signal(signal.SIGHUP)
            self.read_until(server, "reading all files again")
            if said:
                self.read_until(server, said)
        server.send_signal(signal.SIGTERM)
        self.assertNotIn("changed", server.communicate(timeout=PATIENCE)[1])

    def test_sighup_makes_the_client_publish_a_new_list(self):
        services = self.file('{"web": 9}')
        server, _, port = self.launch_server()
        words = ["-v", "-h", "127.0.0.1", "-p", port, "-i", "tim", "-c", services]
        client = self.launch(SCRIPTS[1], *words, change="LOOK_TIME = 3600")
        self.assertIn("web", client.stdout.readline())
        for _ in range(2):
            with open(services, "w") as file:
                file.write("{")
            client.send_signal(signal.SIGHUP)
            self.read_until(client, "not JSON")
        with open(services, "w") as file:
            file.write('{"api": 9}')
        client.send_signal(signal.SIGHUP)
        self.assertIn("api", client.stdout.readline())

    def test_sighup_reads_the_certificates_of_names(self):
        for end in (".crt", ".key"):
            shutil.copy(self.file(LOCALHOST), self.path("localhost" + end))
        words = ["--tls-dir", self.folder, "--tls-port", "0"]
        server, _, _ = self.launch_server(*words, change="LOOK_TIME = 3600")
        for _ in range(2):
            with open(self.path("localhost.crt"), "w") as file:
                file.write("broken")
            server.send_signal(signal.SIGHUP)
            self.read_until(server, "no certificate")
        with open(self.path("localhost.crt"), "w") as file:
            file.write("\n" + LOCALHOST)
        server.send_signal(signal.SIGHUP)
        self.read_until(server, "changed: ")

    def test_hangup_before_the_loop_runs_kills_nobody(self):
        for script in SCRIPTS:
            tell = "script.os.kill(script.os.getpid(), script.signal.SIGHUP)"
            code = "Config = lambda *_, **__: sys.exit(%s or 7)" % tell
            words = ["web=9"] if script == SCRIPTS[1] else []
            process = self.launch(script, *words, change=code)
            self.assertEqual(process.wait(PATIENCE), 7)

    def test_hangup_that_is_ignored_or_somebodys_own_stays_so(self):
        handlers = [signal.SIG_IGN, lambda *_: None]
        before = signal.getsignal(signal.SIGHUP)
        self.addCleanup(signal.signal, signal.SIGHUP, before)
        for handler in handlers:
            signal.signal(signal.SIGHUP, handler)
            for module in (server_module, client_module):
                module.survive_hangup()
                loop = module.Loop()
                loop.catch_signals(print)
                self.assertEqual(signal.getsignal(signal.SIGHUP), handler)
                loop.close()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        loop = server_module.Loop()
        loop.catch_signals(print)
        self.assertNotEqual(signal.getsignal(signal.SIGHUP), signal.SIG_DFL)
        loop.close()
        self.assertEqual(signal.getsignal(signal.SIGHUP), signal.SIG_DFL)

    def test_program_ends_with_its_terminal(self):
        import pty

        master, terminal = pty.openpty()
        command = [sys.executable, os.path.join(HERE, SCRIPTS[0]), "-p", "0", "-c", "0"]
        env = dict(os.environ, NOTIFY_SOCKET=self.listen())
        process = subprocess.Popen(command, stdin=terminal, stdout=terminal,
            stderr=terminal, env=env, start_new_session=True)  # fmt: skip
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(process.kill)
        os.close(terminal)
        self.told_until("READY=1")
        process.send_signal(signal.SIGHUP)
        self.told_until("RELOADING=1")
        os.close(master)
        process.send_signal(signal.SIGHUP)
        self.told_until("STOPPING=1")
        self.assertEqual(process.wait(PATIENCE), 0)

    # --url-file

    def start_with_file(self, **services):
        """A client whose file is written; the path."""
        path = self.path("urls.json")
        self.start_server()
        services = services or {"web": 9}
        self.client = self.start_client(services, wait=False, url_file=path)
        self.client.until(lambda: self.client.program.urls)
        return path

    def load(self, path):
        with open(path) as file:
            return json.load(file)

    def test_url_file_holds_what_is_true_now(self):
        with open(self.path("urls.json"), "w") as file:
            file.write("of a process that was killed")
        self.start_server()
        config = client_module.Config(url_file=self.path("urls.json"))
        client_module.Client(config).loop.close()
        self.assertEqual(os.listdir(self.folder), [])  # nothing is known yet
        path = self.start_with_file(web=9, ssh={"target": 22, "tcp": 0})
        program, umask = self.client.program, os.umask(0)
        os.umask(umask)
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o644 & ~umask)
        found = self.load(path)
        url = program.urls["web"]
        self.assertEqual((found["id"], found["pid"]), ("tim", os.getpid()))
        self.assertEqual(found["urls"], {"web": url})
        self.assertIn("--tcp-ports", found["errors"]["ssh"])
        program.services = client_module.parse_services([("api", 9)])
        self.client.do(lambda: program.uplink.tunnel.publish() or True)
        self.client.until(lambda: "api" in program.urls)
        self.assertEqual(list(self.load(path)["urls"]), ["api"])
        self.client.end()
        self.assertEqual(os.listdir(self.folder), [])

    def test_url_file_is_written_for_a_list_without_services_too(self):
        path = self.path("urls.json")
        self.start_server()
        client = self.start_client({}, url_file=path)
        client.until(lambda: os.path.exists(path))
        self.assertEqual(self.load(path)["urls"], {})

    def test_url_file_that_another_client_wrote_stays(self):
        path = self.start_with_file()
        with open(path, "w") as file:
            file.write("hers")
        self.client.end()
        self.assertEqual(os.listdir(self.folder), ["urls.json"])

    def test_url_file_that_can_no_longer_be_written_is_one_warning(self):
        path = self.start_with_file()
        os.remove(path)
        os.mkdir(path)
        program = self.client.program
        program.services = client_module.parse_services([("api", 9)])
        self.client.do(lambda: program.uplink.tunnel.publish() or True)
        self.client.until(lambda: "api" in program.urls)
        lines = [x for x in self.log.lines if "cannot write" in x]
        self.assertEqual(len(lines), 1, lines)
        self.assertEqual(os.listdir(self.folder), ["urls.json"])
        self.client.end()
        self.assertIsNone(self.client.error)

    def test_url_file_goes_however_the_client_ends(self):
        tokens, path = self.file('{"tim": "secret"}'), self.path("urls.json")
        server, _, port = self.launch_server("--tokens", tokens)
        words = ["-v", "-h", "127.0.0.1", "-p", port, "-i", "tim", "web=9"]
        words += ["--token-file", self.file("secret"), "--url-file", path]
        words += ["--max-attempts", "1"]
        nobody = self.file("{}")
        for act, status in (("SIGTERM", 0), ("SIGINT", 0), ("revoke", 3), ("kill", 4)):
            shutil.copy(self.file('{"tim": "secret"}'), tokens)
            server.send_signal(signal.SIGHUP)
            self.read_until(server, "reading all files again")
            client = self.launch(SCRIPTS[1], *words)
            client.stdout.readline()
            self.assertEqual(self.load(path)["pid"], client.pid)
            if act == "revoke":
                shutil.copy(nobody, tokens)
            elif act == "kill":
                server.kill()
            else:
                client.send_signal(getattr(signal, act))
            client.communicate(timeout=PATIENCE)
            self.assertEqual((client.returncode, os.listdir(self.folder)), (status, []))

    # Numbers.

    def test_load_balancer_learns_of_a_drain_after_sigterm(self):
        go = threading.Event()
        self.addCleanup(go.set)

        def slow(conn):
            read_head(conn)
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")
            go.wait(PATIENCE)
            conn.sendall(b"slow")

        words = ["--drain", "3600", "--admin", "0"]
        server, port, client_port = self.launch_server(*words)
        line = server.stderr.readline()
        admin = re.search(r"numbers on http://127\.0\.0\.1:(\d+)/$", line).group(1)
        client = self.launch(SCRIPTS[1], "-v", "-h", "127.0.0.1", "-p", client_port,
                             "-i", "tim", "web=%d" % self.service(slow))  # fmt: skip
        client.stdout.readline()
        conn = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.addCleanup(conn.close)
        conn.sendall(self.ask("web.tim.x"))
        read_head(conn)
        self.assertEqual(self.fetch_health(admin), (200, b"ok\n"))
        server.send_signal(signal.SIGTERM)
        self.read_until(server, "stopping")
        self.assertEqual(self.fetch_health(admin), (503, b"draining\n"))
        go.set()
        self.assertEqual(self.raw(b"", conn), b"slow")
        self.assertEqual(server.wait(PATIENCE), 0)

    def fetch_health(self, port):
        conn = http.client.HTTPConnection("127.0.0.1", int(port), timeout=PATIENCE)
        self.addCleanup(conn.close)  # which is idle until then
        conn.request("GET", "/healthz")
        answer = conn.getresponse()
        return answer.status, answer.read()

    def test_url_file_that_cannot_be_written_is_exit_2(self):
        table = [(self.folder, "no regular file"), (os.devnull, "no regular file"),
                 (self.path("a/b"), "No such file"), ("", "names no file"),
                 (self.path("c/"), "names no file")]  # fmt: skip
        if os.getuid() == 0:
            table.append((self.path("theirs"), "somebody else"))
            with open(self.path("theirs"), "w"):
                os.chown(self.path("theirs"), 1, 1)
        for path, cause in table:
            done = run_script(SCRIPTS[1], "--url-file", path, "web=9")
            self.assertEqual((done.status, done.stdout), (2, ""), done.stderr)
            self.assertRegex(done.stderr, r"\A.*cannot write %s: .*%s.*\n\Z"
                             % (re.escape(path), cause))  # fmt: skip


for name in [name for name in vars(Processes) if name.startswith("test_")]:
    setattr(LivingLong, name, None)  # they run above


class Units(unittest.TestCase):
    """--print-unit."""

    def unit(self, script, *words, **environment):
        """The lines of the unit, and its ExecStart as words."""
        done = run_script(script, "--print-unit", *words, env=environment or None)
        self.assertEqual((done.status, done.stderr), (0, ""))
        lines = done.stdout.splitlines()
        (start,) = [x for x in lines if x.startswith("ExecStart=")]
        return lines, start[len("ExecStart=") :].split(" ")

    def test_command_line_is_the_same_without_the_option(self):
        words = ["-v", "-i", "tim", "-h", "https://a.b", "--drain", "9", "web=9"]
        lines, start = self.unit(SCRIPTS[1], *words)
        self.assertTrue(os.path.isabs(start[0]) and os.path.isabs(start[1]))
        self.assertTrue(start[1].endswith(SCRIPTS[1]))
        options = client_module.parse_arguments(start[2:])
        self.assertEqual(options, client_module.parse_arguments(words))
        self.assertIn("TimeoutStopSec=20", lines)
        self.assertIn("DynamicUser=yes", lines)
        words = ["-p", "80", "-c", "8000", "--no-landing", "-vv", "--tcp-ports", "1-9"]
        lines, start = self.unit(SCRIPTS[0], *words)
        config = server_module.parse_arguments(start[2:])
        self.assertEqual(config, server_module.parse_arguments(words))
        self.assertIn("AmbientCapabilities=CAP_NET_BIND_SERVICE", lines)
        lines, _ = self.unit(SCRIPTS[0])
        self.assertIn("CapabilityBoundingSet=", lines)
        self.assertNotIn("Ambient", "\n".join(lines))

    def test_secrets_are_in_files(self):
        token = client_module.TOKEN_VARIABLE
        lines, start = self.unit(SCRIPTS[1], "web=9", **{token: "hidden-word"})
        text = "\n".join(lines)
        self.assertNotIn("hidden-word", text)
        self.assertIn("--token-file ${CREDENTIALS_DIRECTORY}/token", text)
        self.assertIn("LoadCredential=token:/etc/mdm-tunnel-token", text)
        lines, start = self.unit(SCRIPTS[1], "--token-file", "some/where", "web=9")
        credential = [x for x in lines if x.startswith("LoadCredential=token:/")]
        self.assertTrue(credential[0].endswith("/some/where"))
        self.assertIn("${CREDENTIALS_DIRECTORY}/token", start)

    @unittest.skipIf(os.name == "nt", "there is no systemd here")
    def test_files_are_absolute_and_their_owner_runs_it(self):
        import pwd

        me = pwd.getpwuid(os.getuid()).pw_name
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "list 100%.json")
            with open(path, "w") as file:
                file.write('{"web": 9}')
            lines, start = self.unit(SCRIPTS[1], "-c", path)
            text = "\n".join(lines)
            quoted = '"%s"' % path.replace("%", "%%")
            self.assertIn("--config %s" % quoted, text)
            self.assertIn("User=%s" % ("mdm-tunnel" if me == "root" else me), lines)
            self.assertNotIn("DynamicUser=yes", lines)

    @unittest.skipIf(os.name == "nt", "there is no systemd here")
    def test_python_and_the_script_are_where_any_user_finds_them(self):
        """The script of these tests is in /tmp, which a unit does not see."""
        lines, start = self.unit(SCRIPTS[0])
        self.assertEqual(start[1], "/opt/" + SCRIPTS[0])
        self.assertIn("# Put the script at /opt/%s." % SCRIPTS[0], lines)
        self.assertTrue(client_module.is_public("/etc/passwd"))
        self.assertFalse(client_module.is_public("/no/such/file"))
        if not os.access("/opt", os.W_OK):
            self.skipTest("only root writes where a unit sees it")
        with tempfile.TemporaryDirectory(dir="/opt") as folder:
            path = os.path.join(folder, "x")
            open(path, "w").close()
            for mode, file_mode, public in (
                (0o755, 0o644, True),
                (0o711, 0o604, True),
                (0o750, 0o644, False),
                (0o755, 0o640, False),
            ):
                os.chmod(folder, mode)
                os.chmod(path, file_mode)
                self.assertEqual(client_module.is_public(path), public)

    def test_proxy_of_the_environment_is_in_a_file(self):
        there = ["-h", "https://a.example", "web=9"]
        environment = {"https_proxy": "http://me:hidden-word@p:3128"}
        lines, _ = self.unit(SCRIPTS[1], *there, **environment)
        self.assertNotIn("hidden-word", "\n".join(lines))
        self.assertIn("EnvironmentFile=/etc/mdm-tunnel-proxy", lines)
        lines, _ = self.unit(SCRIPTS[1], *there, "--no-proxy", **environment)
        self.assertNotIn("EnvironmentFile", "\n".join(lines))

    def test_what_a_unit_does_not_see_is_named(self):
        lines, start = self.unit(SCRIPTS[1], "--check", "web=unix:/tmp/x\x1b[1m")
        self.assertRegex(lines[0], r"/tmp of its own: move .*/tmp/x\\x1b\[1m")
        self.assertNotIn("--check", start)

    def test_user_needs_no_rights_of_root_first(self):
        lines, start = self.unit(SCRIPTS[0], "--user", "nobody", "-p", "80")
        self.assertIn("User=nobody", lines)
        self.assertNotIn("--user", start)

    def test_reader_who_has_seen_enough_sees_no_traceback(self):
        words = [os.path.join(HERE, SCRIPTS[1]), "--print-unit", "web=9"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, *words], **pipes)
        process.stdout.close()
        self.assertEqual(process.stderr.read(), b"")
        process.stderr.close()
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_words_are_quoted_for_systemd(self):
        for word, quoted in (
            ("web=9000", "web=9000"),
            ("a b", '"a b"'),
            ('a"b\\', '"a\\"b\\\\"'),
            ("$HOME%h", "$$HOME%%h"),
            ("", '""'),
            ("a;b", '"a;b"'),
            ("a\nb", "a\\nb"),
        ):
            self.assertEqual(client_module.quoted_word(word), quoted)

    def test_fences_are_those_of_the_examples(self):
        lines, _ = self.unit(SCRIPTS[1], "web=9")
        for name in ("server", "client"):
            path = os.path.join("examples", "deploy", "mdm-tunnel-%s.service" % name)
            for line in read(path).splitlines():
                if re.match("Protect|Restrict|Private|Lock|Memory|System|NoNew", line):
                    key = line.partition("=")[0]
                    self.assertTrue([x for x in lines if x.startswith(key + "=")], line)


class Watch(unittest.TextTestResult):
    """A hang names itself."""

    def startTest(self, test):
        faulthandler.dump_traceback_later(HANG, exit=True)
        super().startTest(test)


class Runner(unittest.TextTestRunner):
    resultclass = Watch  # type: ignore[assignment]


if __name__ == "__main__":
    unittest.main(testRunner=Runner)
