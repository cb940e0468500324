"""Callers with keys, by the names of their clients; some have other scopes than a client's."""

from buydesk.clients.keys import new_key, parse_key_text
from buydesk.clients.scopes import CLIENT_SCOPES, Scope
from tests.builders import TOKEN
from tests.model_keys import ModelKeys

# Who reads for all, a client too; and who may do hardly anything.
READER, PLACER = "reader", "placer"
_SCOPES: dict[str, frozenset[Scope]] = {
    READER: CLIENT_SCOPES | {"orders:read_all"},
    PLACER: frozenset({"orders:create"}),
}
_TEXTS: dict[str, str] = {"processor": TOKEN, "wrong": new_key(livemode=False).text}
KEYS = ModelKeys()


def key(name: str) -> dict[str, str]:
    """The header that shows the key of this client, of the desk's own processor, or one that is wrong."""
    if name not in _TEXTS:
        _TEXTS[name] = KEYS.add(name, *_SCOPES.get(name, CLIENT_SCOPES)).text
    return {"Authorization": f"Bearer {_TEXTS[name]}"}


def revoke(name: str) -> None:
    """Ends the key of this client."""
    KEYS.revoke(parse_key_text(_TEXTS[name]))
