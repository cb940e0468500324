"""Addresses of endpoints, as clients write them. Whoever sends to one looks again where it leads (addresses.py)."""

import re
from urllib.parse import urlsplit

from buydesk import hosts
from buydesk.events.addresses import may_be_asked

URL_CHARS_MAX = 2048
# What a URL has (RFC 3986, section 2), without the # of a fragment and the @ of a user: readers differ on what stands
# before an @, or behind a backslash, and so on where such an address leads.
URL_PATTERN = r"^https?://[A-Za-z0-9._\-\[\]:]+([/?][A-Za-z0-9._~:/?\[\]!$&'()*+,;=%@\-]*)?$"
_URL = re.compile(URL_PATTERN)
# As the last label, hexadecimal digits are a part of an IPv4 address to some (`inet_aton`), as decimal digits are.
_HEXADECIMAL = re.compile(r"0x[0-9a-f]*")
# Names that lead nowhere outside: this machine, its network, the cloud's own (RFC 6761, 6762, 8375, ICANN's .internal).
_INNER = ("localhost", "local", "internal", "arpa", "onion")
_ONLY_TLS = "must be an https:// address"


def parse_url(text: str, *, allows_loopback: bool) -> str:
    """The address of an endpoint, as it was written; raises ValueError with the reason.

    It is an https address of the public internet, as far as that can be seen of it; with `allows_loopback` one of this
    machine too, by http if need be.
    """
    if len(text) > URL_CHARS_MAX:
        raise ValueError(f"must have at most {URL_CHARS_MAX} characters")
    if not _URL.fullmatch(text):
        raise ValueError(f"{_ONLY_TLS} with a host, of ASCII characters, without a user, a password or a fragment")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError("must have a host, and if any a port from 1 to 65535") from error
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError("must have a port from 1 to 65535, or none")
    is_loopback = hosts.is_loopback(host)
    if not (is_loopback and allows_loopback):
        _require_public(host, is_bracketed="[" in parts.netloc)
    if parts.scheme != "https" and not is_loopback:
        raise ValueError(_ONLY_TLS)
    return text


def _require_public(host: str, *, is_bracketed: bool) -> None:
    """Raises ValueError for a host that cannot be of the public internet."""
    address = hosts.address_of(host)
    if address is not None:
        if not may_be_asked(address, allows_loopback=False) or (address.version == 6) is not is_bracketed:
            raise ValueError("must lead to an address of the public internet")
        return
    try:
        name = hosts.host_name(host)
    except ValueError as error:
        raise ValueError("must have a host's name, or an IP address in its usual form") from error
    labels = name.split(".")
    if len(labels) == 1 or labels[-1] in _INNER or _HEXADECIMAL.fullmatch(labels[-1]):
        raise ValueError("must have the name of a host on the public internet")
