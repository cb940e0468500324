"""Where a webhook may lead: every spelling by which servers were made to call themselves or their neighbours, and what
is public all the same."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.events.addresses import is_public, may_be_asked
from buydesk.events.urls import URL_CHARS_MAX, parse_url

# Addresses that no webhook may lead to, by what they are.
INNER = {
    "this host": ["0.0.0.0", "0.1.2.3", "::"],  # noqa: S104
    "loopback": ["127.0.0.1", "127.255.255.254", "127.0.1.3", "::1"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd12:3456::1"],
    "link-local, with clouds' metadata": [
        "169.254.169.254",
        "168.63.129.16",
        "169.254.170.2",
        "fe80::1",
        "fd00:ec2::254",
    ],
    "shared by carriers": ["100.64.0.1", "100.100.100.200", "100.127.255.255"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "broadcast, reserved": ["255.255.255.255", "240.0.0.1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "benchmarks": ["198.18.0.1", "198.19.255.255", "2001:2::1"],
    "protocols": ["192.0.0.1", "192.0.0.170", "192.88.99.1", "2001:1::1", "5f00::1"],
    "discard, site-local, never given out": ["100::1", "fec0::1", "4000::1", "8000::1", "200::1"],
    "IPv4 in IPv6": [
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:a9fe:a9fe",
        "::127.0.0.1",
        "::ffff:0:7f00:1",
        "::808:808",
        "::ffff:0:808:808",
    ],
    "NAT64": [
        "64:ff9b::7f00:1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::10.0.0.1",
        "64:ff9b:1:a00:0:100:808:808",
    ],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::1"],
    "Teredo": ["2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "ISATAP": ["2606:4700::5efe:7f00:1", "2606:4700::200:5efe:a00:1"],
}
PUBLIC = (
    "8.8.8.8",
    "1.1.1.1",
    "172.32.0.1",
    "100.128.0.1",
    "2606:4700:4700::1111",
    "2a00:1450:4001::1",
    "64:ff9b::808:808",
)
# Hosts that are such an address, or stay within, in other spellings; each is put into a URL.
SPELLINGS = (
    *("2130706433", "017700000001", "0x7f000001", "0X7F000001", "0x7f.0.0.1", "0x7f.0x0.0x0.0x1", "127.0.0x1"),
    *("0177.0.0.1", "0177.0000.0000.0001", "127.1", "127.0.1", "10.1", "0", "00", "0x0", "0.0.0.0"),  # noqa: S104
    *(
        "2852039166",
        "0xA9FEA9FE",
        "0251.0376.0251.0376",
        "169.254.43518",
        "127.0.0.1.",
        "127.0.0.01",
        "256.256.256.256",
    ),
    *("localhost", "LOCALHOST", "localhost.", "a.localhost", "localhost.localdomain.local", "printer.local"),
    *("metadata.google.internal", "metadata", "postgres", "db_proxy", "router.home.arpa", "x.onion"),
    *("[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]"),
    *("[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "[fe80::1%25eth0]", "[fe80::1%eth0]", "[::1]x", "::1", "[1.2.3.4]"),
    *("127。0。0。1", "①②⑦.⓪.⓪.①", "１２７.0.0.1", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "exämple.com"),  # noqa: RUF001
    *("user@8.8.8.8", "user:password@8.8.8.8", "8.8.8.8@127.0.0.1", "8.8.8.8\\@127.0.0.1", "8.8.8.8%40127.0.0.1"),
    *("8.8.8.8#@127.0.0.1", "8.8.8.8 127.0.0.1", "8.8.8.8\t", "8.8.8.8\r\nHost: x", "8.8.8.8\x00", "%31%32%37.0.0.1"),
    *(
        "8.8.8.8:0",
        "8.8.8.8:65536",
        "8.8.8.8:",
        "8.8.8.8:443:80",
        "8.8.8.8:x",
        "",
        ":443",
        ".",
        "a..example",
        "-.example",
    ),
    *("a" * 64 + ".example", "a." * 130 + "example"),
)


@pytest.mark.parametrize("text", [each for some in INNER.values() for each in some])
def test_address_within_is_not_asked_however_it_is_written(text: str) -> None:
    address = ip_address(text)
    assert not is_public(address)
    assert may_be_asked(address, allows_loopback=True) is address.is_loopback
    host = f"[{text}]" if address.version == 6 else text
    for url in (f"https://{host}/x", f"https://{host}:8443"):
        with pytest.raises(ValueError, match="public internet"):
            parse_url(url, allows_loopback=False)


@pytest.mark.parametrize("text", PUBLIC)
def test_public_address_may_be_asked(text: str) -> None:
    assert is_public(ip_address(text))
    host = f"[{text}]" if ":" in text else text
    assert parse_url(f"https://{host}/x", allows_loopback=False)


@pytest.mark.parametrize("host", SPELLINGS)
def test_other_spelling_of_a_host_is_refused(host: str) -> None:
    for url in (f"https://{host}/hook", f"https://{host}"):
        with pytest.raises(ValueError, match=r"^must "):
            parse_url(url, allows_loopback=False)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://shop.example/",
            "ftp://shop.example/",
            "file:///etc/passwd",
            "gopher://shop.example",
            "//shop.example",
        ),
        *("shop.example/hook", "https:/shop.example", "https:shop.example", "https://", "", " https://shop.example"),
        *("https://shop.example\\.evil.example", "https://shop.example/a b", "https://shop.example/ä", "javascript:x"),
        *("https://shop.example/#x", "https://shop.example/\n", "HTTPS\t://shop.example", "https://[shop.example]/"),
    ],
)
def test_what_is_no_address_of_a_host_is_refused(url: str) -> None:
    for loopback in (True, False):
        with pytest.raises(ValueError, match=r"^must "):
            parse_url(url, allows_loopback=loopback)


@pytest.mark.parametrize(
    "url",
    [
        *("https://shop.example", "https://shop.example/hook?token=a%20b&c=d", "https://Shop.Example:8443/~x/@y"),
        *("https://xn--exmple-cua.com/", "https://a-b.c_d.example/;x=1,2", "https://shop.example?x=[1]"),
    ],
)
def test_https_address_of_a_name_is_taken_as_it_was_written(url: str) -> None:
    assert parse_url(url, allows_loopback=False) == url


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9:9000", "localhost:80", "[::1]:9000"])
def test_this_machine_is_asked_for_a_sandbox_only(host: str) -> None:
    for scheme in ("http", "https"):
        assert parse_url(f"{scheme}://{host}/x", allows_loopback=True)
        with pytest.raises(ValueError, match=r"^must "):
            parse_url(f"{scheme}://{host}/x", allows_loopback=False)


@pytest.mark.parametrize("url", ["http://10.0.0.1", "http://shop.example", "https://10.0.0.1", "http://8.8.8.8"])
def test_sandbox_asks_no_other_machine_within_and_none_without_tls(url: str) -> None:
    with pytest.raises(ValueError, match=r"^must "):
        parse_url(url, allows_loopback=True)


def test_address_has_a_length() -> None:
    longest = "https://shop.example/".ljust(URL_CHARS_MAX, "x")
    assert parse_url(longest, allows_loopback=False)
    with pytest.raises(ValueError, match="at most 2048"):
        parse_url(longest + "x", allows_loopback=False)


@given(st.text(max_size=60), st.booleans())
def test_whatever_is_written_is_taken_or_refused_with_a_reason(text: str, loopback: bool) -> None:
    for url in (text, f"https://{text}"):
        try:
            taken = parse_url(url, allows_loopback=loopback)
        except ValueError as refused:
            taken = str(refused)
        assert taken == url or taken.startswith("must ")


@given(st.ip_addresses())
def test_no_address_of_the_systems_own_kinds_is_called_public(address: object) -> None:
    given_address = ip_address(str(address))
    if is_public(given_address):
        assert not given_address.is_private
        assert not given_address.is_loopback
        assert not given_address.is_link_local
        assert not given_address.is_multicast
