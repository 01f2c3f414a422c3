"""An http server on this machine that answers byte ranges, and misbehaves as told."""

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    number: int  # of all requests, from 0
    path: str
    headers: dict[str, str]


Fault = Callable[[Request], str]


class RangeServer(ThreadingHTTPServer):
    """Faults: ok, 503, 404, 401, cut, slow, stall, whole, gzip, short, shifted, or `to URL` for a redirect."""

    daemon_threads = True

    def __init__(self, folder: Path, fault: Fault) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fault, self.seen = folder, fault, []  # type: Path, Fault, list[Request]
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the play."""


@contextmanager
def serving(
    folder: Path, fault: Fault = lambda _: "ok", context: ssl.SSLContext | None = None
) -> Iterator[RangeServer]:
    server = RangeServer(folder, fault)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def do_GET(self) -> None:
        with self.server.lock:
            request = Request(len(self.server.seen), self.path, dict(self.headers))
            self.server.seen.append(request)
        fault = self.server.fault(request)
        if fault.isdigit():
            return self._answer(int(fault), {"Retry-After": "0"}, b"secret of the server")
        if fault.startswith("to "):
            return self._answer(302, {"Location": fault[3:]}, b"")
        path = unquote(urlsplit(self.path).path)  # a proxy is asked for a whole URL
        content = (self.server.folder / path.lstrip("/")).read_bytes()
        if fault == "whole":
            return self._answer(200, {}, content)
        start, stop = (int(place) for place in re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        if start >= len(content):
            return self._answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
        return self._ranged(fault, content[start : stop + 1], start, len(content))

    def _ranged(self, fault: str, body: bytes, start: int, total: int) -> None:
        headers = {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{total}"}
        if fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        if fault == "shifted":
            headers["Content-Range"] = f"bytes {start + 1}-{start + len(body)}/{total}"
        if fault == "short":
            headers["Content-Range"] = f"bytes {start}-{start + len(body) // 2 - 1}/{total}"
            body = body[: len(body) // 2]
        if fault == "slow":
            time.sleep(0.05)
        self._answer(206, headers, body, fault)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: str = "ok") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(1.0 if fault == "stall" else 0)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
