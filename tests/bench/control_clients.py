"""Many clients of a control server in one process of their own, cheap enough not to be what is measured.

    python control_clients.py HOST PORT CLIENTS TOTAL

Prints "ready", then, once TOTAL events came over all connections: a JSON line with the seconds since the first of them
and the delays (arrival less `at`, seconds) of a sample of them.
"""

import base64
import json
import os
import re
import selectors
import socket
import sys
import time

SUBSCRIBE = b'{"action":"subscribe","req_id":1,"payload":{"kinds":["Logged"]}}'
AT = re.compile(rb'"at":([0-9.]+),"kind":"Logged"')


def frame(text: bytes) -> bytes:
    """A masked text frame of less than 126 bytes; the mask of zeros leaves it readable."""
    return b"\x81" + bytes([0x80 | len(text)]) + bytes(4) + text


def opened(host: str, port: int) -> socket.socket:
    line = socket.create_connection((host, port))
    key = base64.b64encode(os.urandom(16)).decode()
    head = (
        f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nAuthorization: Bearer sesame\r\n\r\n"
    )
    line.sendall(head.encode())
    said = b""
    while b"\r\n\r\n" not in said:
        said += line.recv(4096)
    assert b" 101 " in said, said
    return line


def subscribed(host: str, port: int) -> socket.socket:
    line = opened(host, port)
    line.sendall(frame(SUBSCRIBE))
    said = b""
    while b'"sub":1' not in said:
        said += line.recv(4096)
    return line


class Frames:
    """What came over one line: frames in, the text between their heads out, in pieces that cut no number."""

    def __init__(self) -> None:
        self._raw, self._text = bytearray(), b""

    def feed(self, data: bytes) -> list[bytes]:
        """The `at` of each event that is complete now."""
        self._raw += data
        pieces = [self._text]
        while len(self._raw) >= 2:
            size, head = self._raw[1], 2
            if size >= 126:
                head = 4 if size == 126 else 10
                size = int.from_bytes(self._raw[2:head])
            if len(self._raw) < head + size:
                break
            if self._raw[0] & 0x0F <= 1:  # not a ping
                pieces.append(bytes(self._raw[head : head + size]))
            del self._raw[: head + size]
        text = b"".join(pieces)
        found = list(AT.finditer(text))
        self._text = text[found[-1].end() if found else 0 :][-64:]
        return [match[1] for match in found]


def main(host: str, port: int, clients: int, total: int) -> None:
    waiting = selectors.DefaultSelector()
    for _ in range(clients):
        waiting.register(subscribed(host, port), selectors.EVENT_READ, Frames())
    print("ready", flush=True)
    seen, first, delays = 0, 0.0, list[float]()
    while seen < total:
        for key, _ in waiting.select():
            line = key.fileobj
            assert isinstance(line, socket.socket)
            data = line.recv(1 << 20)
            now = time.time()
            assert data, "the server closed a connection"
            first = first or now
            found = key.data.feed(data)
            seen += len(found)
            delays += (now - float(at) for at in found[:8])
    print(json.dumps({"seconds": time.time() - first, "delays": sorted(delays)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
