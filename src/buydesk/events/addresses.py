"""Addresses that a webhook may lead to: those of the public internet, and nothing of the desk's own networks."""

from ipaddress import IPv4Address, IPv6Address, ip_network

from buydesk.hosts import Address

# Addresses in which IPv4 addresses stand, and at which bit from the right: these are judged too. (RFC 4291 section
# 2.5.5, RFC 6052; of 6to4, RFC 3056, Teredo, RFC 4380, and ISATAP, RFC 5214, nothing is taken at all.)
_EMBEDDING = ((ip_network("::ffff:0:0/96"), 0), (ip_network("64:ff9b::/96"), 0))
# Not of the public internet, whatever Python's version makes of them (the IANA's special-purpose registries): Python
# calls some of them global, and learns of others late.
_NEVER = (
    ip_network("168.63.129.16/32"),  # a cloud's own services and name server, in spite of its looks
    ip_network("100.64.0.0/10"),  # shared by carriers (RFC 6598); some clouds keep their metadata there
    ip_network("192.0.0.0/24"),
    ip_network("192.88.99.0/24"),  # was for 6to4 relays
    ip_network("198.18.0.0/15"),
    ip_network("::/96"),  # was for IPv4 addresses (RFC 4291, section 2.5.5.1)
    ip_network("::ffff:0:0:0/96"),  # IPv4 addresses as translators had them (RFC 2765, obsolete)
    ip_network("64:ff9b:1::/48"),  # a network's own translation (RFC 8215): where an IPv4 address stands is its choice
    ip_network("2001::/23"),  # Teredo, ORCHID and others
    ip_network("2001:db8::/32"),
    ip_network("2002::/16"),  # 6to4, which nobody relays any more (RFC 7526)
    ip_network("3fff::/20"),
    ip_network("5f00::/16"),
    ip_network("fec0::/10"),  # was for sites
)
_PUBLIC_IPV6 = ip_network("2000::/3")  # all that the IANA gives out


def is_public(address: Address) -> bool:
    """Whether it is of the public internet, and so is every IPv4 address that stands in it."""
    if any(address.version == network.version and address in network for network in _NEVER):
        return False
    embedded = [
        IPv4Address(int(address) >> shift & 0xFFFF_FFFF)
        for network, shift in _EMBEDDING
        if address.version == 6 and address in network
    ]
    if embedded:
        return all(map(is_public, embedded))
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    return isinstance(address, IPv4Address) or (address in _PUBLIC_IPV6 and not _is_isatap(address))


def may_be_asked(address: Address, *, allows_loopback: bool) -> bool:
    """Whether a webhook may lead to the address; with `allows_loopback` to this machine too."""
    return is_public(address) or (allows_loopback and address.is_loopback)


def _is_isatap(address: IPv6Address) -> bool:
    return int(address) >> 32 & 0xFDFF_FFFF == 0x0000_5EFE
