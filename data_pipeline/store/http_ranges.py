"""Byte ranges over http and https, with persistent connections and a policy for redirects.

This uses http.client and not urllib, because urllib follows redirects and reads bodies by itself.
"""

import base64
import http.client
import re
import ssl
import threading
import time
from email.message import Message
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from data_pipeline.safety import redact
from data_pipeline.store.ranges import TransientError
from sharpmoe.errors import DamageError, DataError, first_line

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_SAFE = "/%:;=@!$&'()*+,?~"  # characters of a URL that stay as they are
_MOST_REDIRECTS, _CHUNK, _WHOLE_REQUEST = 5, 1 << 18, 10
_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")


class _Place(NamedTuple):
    scheme: str
    host: str
    port: int
    target: str  # path and query

    @property
    def root(self) -> str:
        """Return the URL of the server."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class _Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes


class HttpRanges:
    """Ranges of the files below one URL; a query, as in a signed URL, is added to every file.

    User and password of the URL are sent to its own host only. Proxies come from http_proxy, https_proxy and no_proxy.
    """

    def __init__(self, url: str, timeout_s: float, allow_hosts: tuple[str, ...] = ()) -> None:
        self._url, self._timeout_s = urlsplit(url), timeout_s
        self._shown = redact(url)
        self._home, self._login = self._place(self._url), _authorization(self._url)
        self._allowed = {host.lower() for host in allow_hosts}
        self._kept = threading.local()  # connections: one per place and thread

    def fetch(self, name: str, start: int, stop: int) -> bytes:
        answer = self._get(name, start, stop)
        if answer.status == 416:
            return b""
        first, last, total = self._content_range(name, answer)
        if first != start or last != min(stop, total) - 1 or len(answer.body) != last - first + 1:
            raise TransientError(f"answered with bytes {first} to {last} for {start} to {stop - 1}")
        return answer.body

    def size(self, name: str) -> int:
        """Return the bytes of a file, by a GET of one byte: a signed URL may be signed for GET only."""
        answer = self._get(name, 0, 1)
        return self._content_range(name, answer)[2]

    def _content_range(self, name: str, answer: _Answer) -> tuple[int, int, int]:
        """Return (first, last, size of the file), as the answer states them."""
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if match is None and "Content-Range" in answer.headers:
            raise TransientError("the server answered with a range that cannot be read")
        if match is None:
            raise DataError(f"{self._shown}/{name}: the server does not answer range requests; use one that does")
        return int(match.group(1) or 0), int(match.group(2) or -1), int(match.group(3))

    def _get(self, name: str, start: int, stop: int) -> _Answer:
        path = f"{self._url.path.rstrip('/')}/{quote(name)}"
        place = self._place(self._url._replace(path=path))
        deadline = time.monotonic() + _WHOLE_REQUEST * self._timeout_s
        for _ in range(_MOST_REDIRECTS + 1):
            answer = self._ask(place, start, stop, deadline)
            if answer.status not in _REDIRECTS:
                return self._accepted(name, answer)
            place = self._redirected(name, place, answer.headers.get("Location", ""))
        raise DataError(f"{self._shown}/{name}: more than {_MOST_REDIRECTS} redirects")

    def _accepted(self, name: str, answer: _Answer) -> _Answer:
        where = f"{self._shown}/{name}"
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise DataError(f"{where}: the server compresses its answers; expected the bytes as they are")
        if answer.status in (206, 416):
            return answer
        if answer.status in _PASSING:
            raise TransientError(f"the server answered {answer.status}", _seconds(answer.headers.get("Retry-After")))
        if answer.status in (404, 410):
            raise DamageError(f"{where}: does not exist (the server answered {answer.status})")
        if answer.status == 200:
            raise DataError(f"{where}: the server does not answer range requests; use one that does")
        raise DataError(f"{where}: the server answered {answer.status}; check the address and the access rights")

    def _redirected(self, name: str, place: _Place, target: str) -> _Place:
        """Return the place that a redirect leads to. Raises DataError where it may not be followed."""
        url = urlsplit(urljoin(place.root + place.target, target))
        where = f"{self._shown}/{name}"
        if url.scheme not in ("http", "https") or (place.scheme == "https" and url.scheme == "http"):
            raise DataError(f"{where}: refused a redirect to {redact(url.geturl())[:120]}: only http(s) is followed")
        new = self._place(url)
        home = (self._home.host, self._home.port)
        upgraded = new.host == self._home.host and (self._home.port, new.port) == (80, 443)
        if (new.host, new.port) != home and not upgraded and not self._is_allowed(new):
            raise DataError(
                f"{where}: refused a redirect to another host ({new.host}:{new.port}); add it to "
                "data.remote.allow_hosts if it is right"
            )
        return new

    def _is_allowed(self, place: _Place) -> bool:
        port = {"http": 80, "https": 443}[place.scheme]
        return f"{place.host}:{place.port}" in self._allowed or (place.host in self._allowed and place.port == port)

    def _place(self, url: SplitResult) -> _Place:
        try:
            port = url.port or (443 if url.scheme.lower() == "https" else 80)
        except ValueError:
            port = 0
        if not url.hostname or not port:
            raise DataError(f"{self._shown}: no host and port in the URL")
        target = quote(url.path or "/", safe=_SAFE) + (f"?{quote(url.query, safe=_SAFE)}" if url.query else "")
        return _Place(url.scheme.lower(), url.hostname.lower(), port, target)

    def _ask(self, place: _Place, start: int, stop: int, deadline: float) -> _Answer:
        """Send one request and return the answer; the connection stays open where the server keeps it open."""
        kept: dict[str, HTTPConnection] = self._kept.__dict__  # of this thread
        proxy = _proxy(place)
        connection = kept.pop(place.root, None) or _connection(place, proxy, self._timeout_s)
        absolute = place.root if proxy and place.scheme == "http" else ""
        try:
            connection.request("GET", absolute + place.target, headers=self._headers(place, start, stop))
            response = connection.getresponse()
            answer = _Answer(response.status, response.headers, _body(response, stop - start, deadline))
        except ssl.SSLCertVerificationError as error:
            raise DataError(f"{place.root}: the certificate cannot be verified ({error.verify_message})") from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise TransientError(f"no answer ({_reason(error)})") from None
        if response.isclosed() and not response.will_close:
            kept[place.root] = connection
        else:
            connection.close()
        return answer

    def _headers(self, place: _Place, start: int, stop: int) -> dict[str, str]:
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity", "User-Agent": "sharpmoe"}
        if self._login and place.root == self._home.root:
            headers["Authorization"] = self._login
        return headers


def _body(response: HTTPResponse, size: int, deadline: float) -> bytes:
    """Read at most `size` bytes of an answer that holds the requested range; nothing of any other."""
    match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status != 206 or match is None or not match.group(1):
        return b""
    expected = int(match.group(2)) - int(match.group(1)) + 1
    if not 0 < expected <= size:
        raise http.client.HTTPException(f"{expected} bytes announced for {size}")
    body = bytearray()
    while len(body) < expected:
        piece = response.read1(min(_CHUNK, expected - len(body)))
        if not piece:
            raise http.client.HTTPException(f"cut after {len(body)} of {expected} bytes")
        body += piece
        if time.monotonic() > deadline:
            raise http.client.HTTPException("too slow")
    if response.length == 0:  # the end mark of a chunked answer is not read: its connection is not kept
        response.close()
    return bytes(body)


def _connection(place: _Place, proxy: SplitResult | None, timeout_s: float) -> HTTPConnection:
    through = (proxy.hostname or "", proxy.port or 80) if proxy else (place.host, place.port)
    if place.scheme == "http":
        return HTTPConnection(*through, timeout=timeout_s)
    connection = HTTPSConnection(*through, timeout=timeout_s)  # certificates and names are checked by default
    if proxy:
        authorization = _authorization(proxy)
        headers = {"Proxy-Authorization": authorization} if authorization else {}
        connection.set_tunnel(place.host, place.port, headers)
    return connection


def _proxy(place: _Place) -> SplitResult | None:
    url = getproxies().get(place.scheme)
    if not url or proxy_bypass(f"{place.host}:{place.port}"):
        return None
    return urlsplit(url if "://" in url else f"http://{url}")


def _authorization(url: SplitResult) -> str | None:
    if url.username is None:
        return None
    login = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return "Basic " + base64.b64encode(login.encode()).decode()


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isdigit() and len(header) < 6 else 0.0


def _reason(error: Exception) -> str:
    """Say what failed, without text that the server or a proxy may have supplied."""
    if isinstance(error, TimeoutError):
        return "time-out"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return redact(first_line(error)[:120])
