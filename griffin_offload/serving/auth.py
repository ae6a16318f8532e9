"""Who may ask: hosts, origins and the key are checked before anything else is looked at."""

import contextlib
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from griffin_offload.config import ServeConfig
from griffin_offload.errors import UsageError
from griffin_offload.serving.api_errors import ApiError

# The API key, as it is given to the server.


KEY_VARIABLE = "GRIFFIN_OFFLOAD_API_KEY"
_SHORTEST = 8
_LONGEST = 1000


def check_key(key: str, source: str) -> str:
    """`key` without the line's end; UsageError if it cannot be one."""
    key = key.strip()
    if not _SHORTEST <= len(key) <= _LONGEST or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{source} has no usable key: {_SHORTEST} printable ASCII letters or more, without spaces")
    return key


# Answered without the key: whoever watches the process need not be able to use it, and the page has to ask for it.
_OPEN_PATHS = ("/health", "/")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def check_bind(config: ServeConfig) -> None:
    """UsageError for an address that others can reach, without a key."""
    if config.api_key is None and not is_loopback(config.host):
        raise UsageError(
            f"--host {config.host} can be reached by others, and there is no API key: set {KEY_VARIABLE} or give "
            "--api-key-file, or leave --host out"
        )


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    if host == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def _address(host: str) -> "ipaddress.IPv4Address | ipaddress.IPv6Address | None":
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]"))
    return None


class AccessGuard:
    """The checks of one server."""

    def __init__(self, config: ServeConfig) -> None:
        self._key = config.api_key.encode() if config.api_key is not None else None
        self._page = config.page
        self._origins = frozenset(origin.lower().rstrip("/") for origin in config.cors_origin)
        self._hosts = _host_names([*_LOCAL_NAMES, config.host, *config.allow_host])
        bound = _address(config.host)
        # A page that points its own name here can send no address as Host.
        self._any_address = bound is not None and not bound.is_loopback

    def check(self, method: str, path: str, headers: Headers) -> None:
        """ApiError 403 or 401 for a request that is not answered."""
        self._check_host(headers)
        origin = headers.get("origin")
        if origin is not None and not (self._allowed_origin(origin) or self._is_our_page(origin, headers)):
            raise ApiError(
                403, "this web page may not ask here: name its origin by --cors-origin", code="origin_not_allowed"
            )
        if self._key is not None and path not in _OPEN_PATHS and not self.is_preflight(method, headers):
            self._check_key(headers)

    def is_preflight(self, method: str, headers: Headers) -> bool:
        """Whether a browser asks if it may ask."""
        return method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers

    def cors_headers(self, headers: Headers) -> dict[str, str]:
        """What lets a page of an allowed origin read the answer."""
        origin = headers.get("origin")
        if origin is None or not self._allowed_origin(origin):
            return {}
        return {"access-control-allow-origin": origin, "vary": "Origin"}

    def preflight_headers(self, headers: Headers) -> dict[str, str]:
        return self.cors_headers(headers) | {
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": headers.get(
                "access-control-request-headers", "authorization, content-type"
            ),
            "access-control-max-age": "600",
        }

    def _is_our_page(self, origin: str, headers: Headers) -> bool:
        """Whether the page that asks is the one that this server shows, under the name by which it is asked."""
        return self._page and urlsplit(origin).netloc.lower() == headers["host"].lower()

    def _allowed_origin(self, origin: str) -> bool:
        return "*" in self._origins or origin.lower() in self._origins

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self._hosts or (self._any_address and _address(name) is not None)):
            raise ApiError(403, "this name is not answered: add it by --allow-host", code="host_not_allowed")

    def _check_key(self, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")  # as Anthropic's clients give it
        assert self._key is not None, "there is a key"
        if not hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key):
            headers_401 = {"www-authenticate": "Bearer"}
            raise ApiError(
                401,
                "a valid API key has to be given as a bearer token or x-api-key",
                code="invalid_api_key",
                headers=headers_401,
            )


def _host_names(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.strip("[]").lower().rstrip(".") for name in names)


def _host_name(header: str) -> str | None:
    """The name in a Host header, without its port; None if it is none."""
    with contextlib.suppress(ValueError):
        split = urlsplit(f"//{header}")
        split.port  # noqa: B018 - ValueError if it is no number
        if split.username is None and split.netloc == header:
            return (split.hostname or "").lower().rstrip(".") or None
    return None
