"""Hosts: how their names, addresses and networks are written, and which of them only this machine reaches."""

import re
import socket
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

Network = IPv4Network | IPv6Network

HOST_NAME_CHARS_MAX = 253
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def host_name(text: str) -> str:
    """The name of a host in lower case, as a client's Host header has it without the port; raises ValueError."""
    name = text.lower()
    labels = name.split(".")
    # A name that ends in a number is an IPv4 address, well formed or not.
    if len(name) > HOST_NAME_CHARS_MAX or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise ValueError("no host name")
    return name


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`. Of names that is certain of ``localhost`` only."""
    try:
        address = ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def is_any_ipv6(host: str) -> bool:
    """Whether `host` is ``::``, every address of this machine."""
    try:
        return ip_address(host) == IPv6Address(0)
    except ValueError:
        return False


def reachable(host: str) -> str:
    """The address, as a URL writes it, at which this machine reaches what listens on `host`."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        # What listens on :: takes IPv4 too, where the system can; a machine may be without an IPv6 loopback.
        return "127.0.0.1" if address.version == 4 or socket.has_dualstack_ipv6() else "[::1]"
    return host if address.version == 4 else f"[{host}]"
