"""What is neither recorded nor printed: passwords in addresses, and what secret environment variables hold."""

from __future__ import annotations

import os
import re

MASK = "***"
SECRET_NAME = re.compile(
    r"(^|_)(API_?KEY|KEY|PAT|AUTH|COOKIE|CREDENTIALS?)(_|$)|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE", re.IGNORECASE
)
# a shorter one may stand anywhere by chance, and is none that protects
SHORTEST_SECRET = 6
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/?#]+@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"([?&](?:access_?token|token|api_?key|key|sig|signature|password|secret)=)[^&\s]+", re.IGNORECASE
)


def redacted(text: str) -> str:
    """Return a text without secrets: of an address the user and password, and what secret variables hold.

    >>> redacted("sweep on http://me:hunter2@host:5000/x?token=abc")
    'sweep on http://***@host:5000/x?token=***'
    """
    text = _PARAMETER.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", text))
    for secret in _secrets():
        text = text.replace(secret, MASK)
    return text


def _secrets() -> list[str]:
    """Return what secret variables hold, the longest first: one may be part of another."""
    held = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET}
    return sorted(held, key=len, reverse=True)
