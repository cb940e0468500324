"""Where prices come from. The exchanges of the live feed are listed here; a new one is a small file and a line."""

from buydesk.backends.sources.bitfinex import BITFINEX
from buydesk.backends.sources.bitstamp import BITSTAMP
from buydesk.backends.sources.bitvavo import BITVAVO
from buydesk.backends.sources.coinbase import COINBASE
from buydesk.backends.sources.exchange import ExchangeSource
from buydesk.backends.sources.gemini import GEMINI
from buydesk.backends.sources.kraken import KRAKEN
from buydesk.backends.sources.okx import OKX
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.prices.model import PriceSource
from buydesk.settings.model import Settings

EXCHANGES = (BITFINEX, BITSTAMP, COINBASE, GEMINI, KRAKEN)
# Asked only where `settings.extra_sources` names them.
EXTRA_EXCHANGES = (BITVAVO, OKX)


def exchanges(settings: Settings, clocks: ClockMonitor | None = None) -> list[PriceSource]:
    """The sources of the live feed, each at the address that `settings` has for it. `clocks` hear what time it is."""
    asked = [*EXCHANGES, *(each for each in EXTRA_EXCHANGES if each.name in settings.extra_sources)]
    return [ExchangeSource(each, getattr(settings, f"{each.name}_url"), settings, clocks=clocks) for each in asked]
