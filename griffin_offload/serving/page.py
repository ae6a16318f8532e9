"""The page at /: one file that asks for nothing outside, and headers that hold it to that."""

import base64
import hashlib
import re
from importlib.resources import files

_INLINE = re.compile(r"<(style|script)[^>]*>(.*?)</\1>", re.DOTALL)


def page_and_headers() -> tuple[bytes, dict[str, str]]:
    """The page, and what it is sent with: nothing but its own style and script is run, nobody but this server is asked,
    and text never becomes markup."""
    text = files("griffin_offload.serving").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {kind: f"'sha256-{_digest(code)}'" for kind, code in _INLINE.findall(text)}
    policy = (
        "default-src 'none'",
        f"style-src {hashes['style']}",
        f"script-src {hashes['script']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return text.encode(), {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(policy),
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
