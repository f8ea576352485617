"""Files of other hosts, fetched for a client: from hosts that are allowed by name, never from a private address.

A host's name is resolved once, all of its addresses are looked at, and the connection goes to the one that was looked
at: what the name resolves to later doesn't matter. Each redirect begins anew. See
https://cheatsheetseries.owasp.org/cheatsheets/Server_Side_Request_Forgery_Prevention_Cheat_Sheet.html
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from mmllm.serving.errors import bad_request

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_NOT_GLOBAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "2001:db8::/32", "3fff::/20", "5f00::/16")))
"""Of IANA's registries of special addresses, those that some releases of Python take for global ones."""
Resolve = Callable[[str, int], Sequence[str]]
"""A host's name and a port to addresses."""


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host's name, as the system tells them."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet: not private, loopback, link-local, or such a one in disguise."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None) or _translated(ip)
        if inner is not None:
            return is_public(str(inner))
    is_odd = any(ip in network for network in _NOT_GLOBAL if network.version == ip.version)
    return ip.is_global and not (is_odd or ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _translated(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a NAT64 gateway makes of an IPv6 address (RFC 6052, RFC 8215)."""
    if any(ip in ipaddress.ip_network(prefix) for prefix in ("64:ff9b::/96", "64:ff9b:1::/48")):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


class RemoteFiles:
    """Fetches files from hosts that are allowed.

    Args:
        hosts: names that are allowed; none: nothing is fetched.
        max_seconds: that one may take, redirects included.
        resolve: addresses of a name.
        is_allowed: of an address.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        max_seconds: float = 10.0,
        resolve: Resolve = resolve,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self._max_seconds = max_seconds
        self._resolve = resolve
        self._is_allowed = is_allowed

    def fetch(self, url: str, param: str, max_bytes: int) -> bytes:
        """The content of a file.

        Args:
            url: of the client.
            param: what errors call it.
            max_bytes: that it may have.

        Raises:
            ApiError: its host isn't allowed, it isn't there, takes too long or is too large.
        """
        if not self._hosts:
            raise bad_request(
                f"{param} is an address, but this server fetches nothing; send the file itself as a data URL "
                f"(data:image/png;base64,…), or start the server with --allow_remote HOST",
                param,
                "remote_not_allowed",
            )
        deadline = time.monotonic() + self._max_seconds
        for _ in range(MAX_REDIRECTS + 1):
            target = self._checked(url, param)
            try:
                location, data = self._get(target, max_bytes, deadline, param)
            except (OSError, http.client.HTTPException) as error:
                raise bad_request(f"{param}: {target.hostname} can't be read: {error}", param, "unreachable") from error
            if location is None:
                return data
            url = urljoin(url, location)
        raise bad_request(f"{param} leads through more than {MAX_REDIRECTS} redirects", param, "unreachable")

    def _checked(self, url: str, param: str) -> SplitResult:
        try:
            target = urlsplit(url)
            port = target.port
        except ValueError as error:
            raise bad_request(f"{param} is no address: {error}", param) from error
        host = (target.hostname or "").rstrip(".")
        if target.scheme not in ("http", "https") or target.username or target.password:
            raise bad_request(f"{param} is {target.scheme}: only http and https without a name are fetched", param)
        if host not in self._hosts or port not in (None, 80, 443):
            raise bad_request(
                f"{param} is of {host[:100]!r}, from which this server fetches nothing", param, "remote_not_allowed"
            )
        if not (url.isascii() and url.isprintable() and " " not in url):
            raise bad_request(f"{param} has characters that an address can't have", param)
        return target

    def _get(self, target: SplitResult, max_bytes: int, deadline: float, param: str) -> tuple[str | None, bytes]:
        """Where it redirects to, or None and the content."""
        host = (target.hostname or "").rstrip(".")
        port = target.port or (443 if target.scheme == "https" else 80)
        connection = _Connection(host, port, self._address(host, port, param), target.scheme == "https", deadline)
        watch = threading.Timer(max(0.0, deadline - time.monotonic()), connection.end)
        watch.start()
        try:
            path = (target.path or "/") + (f"?{target.query}" if target.query else "")
            connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "mmllm"})
            with connection.getresponse() as answer:
                if answer.status in _REDIRECTS:
                    return answer.headers.get("Location", ""), b""
                if answer.status != 200:
                    raise bad_request(f"{param}: {host} answered {answer.status}", param, "unreachable")
                data = answer.read(max_bytes + 1)
        finally:
            watch.cancel()
            connection.close()
        if time.monotonic() >= deadline:  # what was read may be a part
            raise TimeoutError("it takes too long")
        if len(data) > max_bytes:
            raise bad_request(f"{param} has more than {max_bytes} bytes", param, "remote_too_large")
        return None, data

    def _address(self, host: str, port: int, param: str) -> str:
        """The address to connect to; none of the name's may be private."""
        addresses = self._resolve(host, port)
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            raise bad_request(f"{param} is of {host!r}, which is no public address", param, "remote_not_allowed")
        return addresses[0]


class _Connection(http.client.HTTPConnection):
    """To an address that was looked at, under the name that it was looked up by."""

    def __init__(self, host: str, port: int, address: str, is_secure: bool, deadline: float) -> None:
        super().__init__(host, port)
        self.default_port = 443 if is_secure else 80
        self._address = address
        self._is_secure = is_secure
        self._deadline = deadline
        self._raw: socket.socket | None = None

    def connect(self) -> None:
        """Connects, within the time that is left."""
        self.sock = self._raw = socket.create_connection((self._address, self.port), self._left())
        if self._is_secure:
            context = ssl.create_default_context()
            self.sock = self._raw = context.wrap_socket(self._raw, server_hostname=self.host)
        self._raw.settimeout(self._left())

    def end(self) -> None:
        """Ends what is being read: a server that sends a byte now and then would never run into a timeout."""
        if self._raw is not None:
            with contextlib.suppress(OSError):
                self._raw.shutdown(socket.SHUT_RDWR)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it takes too long")
        return left
