"""Hosts: how their names, addresses and networks are written, and which of them only this machine reaches."""

import re
import socket
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

HOST_NAME_CHARS_MAX = 253
# An IPv6 client has a network of this size to itself.
IPV6_CLIENT_BITS = 64
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def host_name(text: str) -> str:
    """The name of a host in lower case, as a client's Host header has it without the port; raises ValueError."""
    name = text.lower()
    labels = name.split(".")
    # A name that ends in a number is an IPv4 address, well formed or not.
    if len(name) > HOST_NAME_CHARS_MAX or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise ValueError("no host name")
    return name


def address_of(host: str) -> Address | None:
    """The address that `host` is, None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def caller_address(text: str) -> Address:
    """The address of whoever is at the other end; IPv4 as such also where it comes in IPv6. Raises ValueError."""
    address = ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def counted(address: Address) -> Address | Network:
    """What callers are told apart by, where it is by their address."""
    return address if address.version == 4 else ip_network((address, IPV6_CLIENT_BITS), strict=False)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`. Of names that is certain of ``localhost`` only."""
    address = address_of(host)
    if address is None:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def reachable(host: str) -> str:
    """The address, as a URL writes it, at which this machine reaches what listens on `host`."""
    address = address_of(host)
    if address is None:
        return host
    if address.is_unspecified:
        # What listens on :: takes IPv4 too, where the system can; a machine may be without an IPv6 loopback.
        return "127.0.0.1" if address.version == 4 or socket.has_dualstack_ipv6() else "[::1]"
    return host if address.version == 4 else f"[{host}]"


def is_http_url(url: str, schemes: Collection[str] = ("http", "https")) -> bool:
    """Whether it is a URL with a host, of one of the schemes."""
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # says what is wrong with the host or port, and would show a password that is taken for one
        return False
