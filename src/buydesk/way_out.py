"""The way out to others' servers: through a proxy where the environment names one, as most programs do it."""

from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from buydesk import hosts


class UnusableProxy(ValueError):
    """The environment names a proxy that cannot be one."""


def proxy_for(url: str) -> str | None:
    """The proxy of HTTPS_PROXY or HTTP_PROXY for an address, None if it is asked directly: because none is named, it is
    in NO_PROXY, or it is of this machine. May hold a password. Raises UnusableProxy for a proxy that cannot be one, and
    ValueError for an address that is none.

    aiohttp's own reading (`trust_env`) would also send what a .netrc has for a server.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if hosts.is_loopback(host) or proxy_bypass(host):
        return None
    proxy = getproxies().get(parts.scheme)
    if proxy is not None and not hosts.is_http_url(proxy, ["http"]):
        raise UnusableProxy(f"the proxy that {parts.scheme.upper()}_PROXY names is no http:// address")
    return proxy
