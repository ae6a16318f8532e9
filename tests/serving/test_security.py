"""Who is answered."""

import pytest
from starlette.datastructures import Headers

from griffin_offload import UsageError
from griffin_offload.config import ServeConfig
from griffin_offload.serving.api_errors import ApiError
from griffin_offload.serving.auth import AccessGuard, check_bind, check_key, is_loopback

KEY = "sk-a-secret"


def status(config: ServeConfig, method: str = "GET", path: str = "/v1/models", **headers: str) -> int:
    """200, or what the guard says."""
    headers = {name.replace("_", "-"): value for name, value in ({"host": "localhost:8000"} | headers).items()}
    try:
        AccessGuard(config).check(method, path, Headers(headers))
    except ApiError as failure:
        return failure.status
    return 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str):
    assert is_loopback(host)
    check_bind(ServeConfig(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "localhost.example.org"])
def test_other_addresses_need_one(host: str):
    with pytest.raises(UsageError, match="GRIFFIN_OFFLOAD_API_KEY"):
        check_bind(ServeConfig(host=host))
    check_bind(ServeConfig(host=host, api_key=KEY))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST.:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("box.lan", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example@localhost", 403),
        ("localhost/evil", 403),
        ("192.168.1.5", 403),
        ("localhost:x", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_hosts(host: str, expected: int):
    assert status(ServeConfig(allow_host=("box.lan",)), host=host) == expected


def test_a_server_for_all_addresses_is_called_by_any_address_but_by_no_name():
    config = ServeConfig(host="0.0.0.0", api_key=KEY)
    bearer = f"Bearer {KEY}"
    assert status(config, host="192.168.1.5:8000", authorization=bearer) == 200
    assert status(config, host="evil.example", authorization=bearer) == 403
    with pytest.raises(ApiError):
        AccessGuard(config).check("GET", "/health", Headers(raw=[(b"host", b"localhost"), (b"host", b"evil")]))


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY}", 200),
        (f"Bearer {KEY}x", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        ("Bearer ", 401),
        ("Bearer \xe9", 401),
        ("", 401),
    ],
)
def test_keys(authorization: str, expected: int):
    for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/nothing"):
        assert status(ServeConfig(api_key=KEY), path=path, authorization=authorization) == expected
    assert status(ServeConfig(api_key=KEY), path="/health", authorization=authorization) == 200


def test_web_pages_are_not_answered_unless_named():
    page = "https://chat.example"
    assert status(ServeConfig(), origin=page) == 403
    assert status(ServeConfig(), origin="null") == 403
    named = ServeConfig(cors_origin=(page + "/",), api_key=KEY)
    assert status(named, origin=page, authorization=f"Bearer {KEY}") == 200
    assert status(named, origin=page) == 401
    assert status(named, origin="https://evil.example") == 403
    # A browser asks first, and has no key then.
    assert status(named, "OPTIONS", origin=page, access_control_request_method="POST") == 200
    assert status(named, "OPTIONS", origin=page) == 401
    asked = Headers({"origin": page, "access-control-request-headers": "authorization, x-stainless-os"})
    assert (
        AccessGuard(named).preflight_headers(asked)["access-control-allow-headers"] == "authorization, x-stainless-os"
    )
    assert AccessGuard(named).cors_headers(asked) == {"access-control-allow-origin": page, "vary": "Origin"}
    assert AccessGuard(named).cors_headers(Headers({"origin": "https://evil.example"})) == {}
    assert status(ServeConfig(cors_origin=("*",)), origin=page) == 200


def test_keys_that_cannot_be():
    assert check_key("  sk-a-secret\n", "x") == KEY
    for bad in ("", "short", "with a space in it", "ünïcödé-key", "line\nbreak-in-it", "x" * 2000):
        with pytest.raises(UsageError, match="no usable key"):
            check_key(bad, "the file")


@pytest.mark.parametrize("host", ["box.lan:8000", "http://box.lan", "*", "", "a b", "bücher.example", "[::1]:8000"])
def test_host_names_that_no_request_could_have(host: str):
    with pytest.raises(UsageError, match="without scheme and port"):
        ServeConfig(allow_host=("good.lan", host))


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/chat", "https://", "", "* ", "null"])
def test_origins_that_no_page_could_have(origin: str):
    with pytest.raises(UsageError, match="write https://"):
        ServeConfig(cors_origin=("https://good.example", origin))


def test_hosts_and_origins_that_can_be():
    ServeConfig(allow_host=("box.lan", "my_box", "192.168.1.5", "::1", "[fe80::1]", "LLM.example.", "::ffff:1.2.3.4"))
    ServeConfig(cors_origin=("*", "https://a.example:8443", "http://localhost:3000/", "app://obsidian.md"))
    addressed = ServeConfig(host="fe80::1", api_key=KEY)
    assert status(addressed, host="[FE80::1]:8000", authorization=f"Bearer {KEY}") == 200


def test_the_key_is_not_shown():
    assert KEY not in repr(ServeConfig(api_key=KEY))
