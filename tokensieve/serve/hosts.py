"""The names by which a server may be asked.

A page can let its own name point to this machine (DNS rebinding). Its browser then takes the server's answers for the
page's own, but still sends the page's name as `Host`.
"""

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

PATTERN = re.compile(r"\*|(\*\.)?[A-Za-z0-9_][A-Za-z0-9_.-]*")


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_pattern(name: str) -> bool:
    """Whether `name` is a host's name or address, `*.` before a name, or `*` for any."""
    return bool(PATTERN.fullmatch(name)) or is_address(name)


def is_allowed(header: str, patterns: Collection[str]) -> bool:
    """Whether a `Host` header names an address, which no page can make its own, or a host among `patterns`."""
    try:
        name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
    except ValueError:
        return False
    return is_address(name) or any(_matches(name, pattern.lower()) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    return pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))
