#!/usr/bin/env node
// The smallest client that works, in Node.js without packages:
//
//     node tiny_client.js HOST:PORT ID web=9000 api=9001
//
// The same as tiny_client.py: no TLS, no tokens, one link. When that ends, so does this.
"use strict";
const crypto = require("crypto");
const net = require("net");

const [, , where, id, ...words] = process.argv;
const [host, port] = where.split(":");
const ports = Object.fromEntries(words.map((word) => word.split("=")));
const [CHALLENGE, LOGIN, WELCOME, SERVICES, URLS, OPEN, DATA, CREDIT, END, RESET,
  PING, PONG, GOODBYE] = Array.from({ length: 13 }, (_, i) => i + 1);
const WINDOW = 256 << 10; // bytes that each side may send on a stream before CREDIT
const PIECE = 16 << 10; // bytes of a DATA frame: short ones let others have their turn
const streams = new Map();

// 1. Ask to go over from HTTP to the protocol: proxies let that through.
const link = net.connect(Number(port), host, () => {
  link.write(`GET /.well-known/mdm-tunnel HTTP/1.1\r\nHost: ${host}\r\n` +
    "Connection: Upgrade\r\nUpgrade: mdm-tunnel/1\r\n\r\n");
});
link.on("close", () => process.exit(1));
link.on("error", (error) => console.error(error.message));

function send(kind, stream, payload = Buffer.alloc(0)) {
  const header = Buffer.alloc(8);
  header.writeUInt32BE(((kind << 24) | payload.length) >>> 0, 0);
  header.writeUInt32BE(stream, 4);
  link.write(Buffer.concat([header, payload]));
}

const json = (value) => Buffer.from(JSON.stringify(value));

// What comes is cut into frames; the head of the answer, 101, stands before the first.
let waiting = Buffer.alloc(0);
let upgraded = false;
link.on("data", (data) => {
  waiting = Buffer.concat([waiting, data]);
  if (!upgraded) {
    const end = waiting.indexOf("\r\n\r\n");
    if (end < 0) return;
    if (!waiting.slice(0, 20).includes(" 101 ")) return link.destroy();
    upgraded = true;
    waiting = waiting.slice(end + 4);
  }
  while (waiting.length >= 8) {
    const word = waiting.readUInt32BE(0);
    const end = 8 + (word & 0xffffff);
    if (waiting.length < end) break;
    onFrame(word >>> 24, waiting.readUInt32BE(4), waiting.slice(8, end));
    waiting = waiting.slice(end);
  }
});

function onFrame(kind, n, payload) {
  const stream = streams.get(n);
  if (kind === CHALLENGE) {
    // 2. It holds a nonce, for clients with a token: they sign it.
    // 3. Who dials again with the same session gets its id back at once.
    send(LOGIN, 0, json({ id, session: crypto.randomBytes(16).toString("hex") }));
  } else if (kind === WELCOME) {
    // 4. What is published here; the server answers with URLS.
    send(SERVICES, 0, json(Object.fromEntries(words.map((x) => [x.split("=")[0], {}]))));
  } else if (kind === URLS || kind === GOODBYE) {
    console.log(payload.toString()); // where the services are; or why it ends
  } else if (kind === PING) {
    send(PONG, 0, payload); // the server wants to know whether we live
  } else if (kind === OPEN) {
    // 5. A visitor. DATA may follow at once: the socket keeps it until it is connected.
    streams.set(n, openStream(n, ports[JSON.parse(payload).service]));
  } else if (stream && kind === DATA) {
    // Credit goes back only for what the target has taken.
    const size = Buffer.alloc(4);
    size.writeUInt32BE(payload.length);
    stream.target.write(Buffer.from(payload), () => send(CREDIT, n, size));
  } else if (stream && kind === CREDIT) {
    stream.credit += payload.readUInt32BE(0);
    pump(n, stream);
  } else if (stream && kind === END) {
    stream.target.end(); // the visitor sends no more, but still reads
  } else if (stream && kind === RESET) {
    streams.delete(n);
    stream.target.destroy(); // it is over, both ways
  }
}

function openStream(n, port) {
  const target = net.connect({ port, host: "127.0.0.1", allowHalfOpen: true });
  const stream = { target, credit: WINDOW };
  target.on("readable", () => pump(n, stream));
  target.on("end", () => streams.has(n) && send(END, n));
  target.on("close", () => streams.delete(n)); // both have said END, or RESET
  target.on("error", (error) => {
    if (streams.delete(n)) send(RESET, n, Buffer.from("refused " + error.message));
  });
  return stream;
}

// Bytes from the target, as far as the credit goes.
function pump(n, stream) {
  while (stream.credit > 0 && streams.has(n)) {
    const size = Math.min(stream.credit, PIECE, stream.target.readableLength);
    const data = size > 0 ? stream.target.read(size) : stream.target.read(0);
    if (!data) return;
    stream.credit -= data.length;
    send(DATA, n, data);
  }
}
