"""api_updater: the loop that asks the feed's sources, makes a price of their quotes and publishes it."""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from buydesk.errors import DeskError, PriceSuperseded, PriceUnavailable
from buydesk.http.app import Service, service_app
from buydesk.money import RATE_SCALE, Currency
from buydesk.observability.reporter import Reporter
from buydesk.prices.anchors import AnchorStore
from buydesk.prices.guard import PriceGuard
from buydesk.prices.model import (
    FeedStatus,
    PriceRecord,
    PriceSource,
    PriceStore,
    RejectedQuote,
    SourceResponse,
    SourceStatus,
    UsablePrice,
)
from buydesk.prices.polling import SourcePoller
from buydesk.prices.publishing import STORE_RETRY_SECONDS, PricePublisher
from buydesk.prices.rule import Verdict, decide, listed, record_of, rule_of
from buydesk.prices.signing import Signer
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

_log = logging.getLogger(__name__)


def create_app(
    settings: Settings, sources: Sequence[PriceSource], store: PriceStore, reporter: Reporter, *, anchors: AnchorStore
) -> Service:
    """The service. Its caller closes the sources and the stores."""
    updater = Updater(settings, sources, store, anchors=anchors)

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        running = asyncio.create_task(updater.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    app = service_app(
        "api_updater", "Asks for prices and publishes them", {"prices": updater.check}, reporter, lifespan
    )
    app.registry.register(FeedMetrics(updater))
    return app


@dataclass(frozen=True, slots=True)
class Tick:
    """What one tick found out; `moment` is `decided_at` on the monotonic clock, in seconds."""

    answers: Sequence[SourceResponse]
    verdict: Verdict
    moment: float
    decided_at: datetime


class Updater:
    """The loop."""

    def __init__(
        self,
        settings: Settings,
        sources: Sequence[PriceSource],
        store: PriceStore,
        *,
        anchors: AnchorStore,
        clock: Clock = CLOCK,
    ) -> None:
        self.sources = [SourcePoller(source, settings, clock=clock) for source in sources]
        self.statuses: tuple[SourceStatus, ...] = ()
        self.priced: Collection[Currency] = ()  # at the last tick
        self._may_rest = False
        self.currencies = settings.currencies
        self._settings = settings
        self._rule = rule_of(settings)
        self._signer = Signer(settings.price_signing_key.get_secret_value())
        self._publisher = PricePublisher(store, settings.clock_skew_seconds_max, _log, clock=clock)
        self._guard = PriceGuard(anchors, settings, _log)
        self._changes = StateChangeLog()
        self._clock = clock
        self._problem = "No price has been published yet."
        self._decided_at = clock.now()

    @property
    def published(self) -> PriceRecord | None:
        """The last record that this updater published, valid or not."""
        return self._publisher.last

    async def run(self) -> None:
        """Asks, decides and publishes every interval, the first time at once, until cancelled."""
        interval_seconds = self._settings.feed_interval_seconds
        due = self._clock.monotonic()
        while True:
            await self._tick(due + interval_seconds)
            due = next_tick(due, self._clock.monotonic(), interval_seconds)
            await self._publisher.keep_published(due)

    async def _load_last_prices(self, give_up_at: float) -> None:
        """Nothing is published before the ledger has said what was published last: it is asked again and again until
        `give_up_at`. Raises PriceUnavailable then."""
        while True:
            try:
                return await self._guard.load()
            except DeskError as error:
                self._problem = f"The last prices are not known: {error.detail}"
            except Exception as error:  # a fault of one look must not cost the whole tick
                self._problem = f"The last prices are not known: something went wrong here ({type(error).__name__})."
                _log.debug("The last prices could not be asked for", exc_info=True)
            self._changes.price(self._problem)
            if self._clock.monotonic() + STORE_RETRY_SECONDS >= give_up_at:
                raise PriceUnavailable(self._problem)
            await self._clock.sleep(STORE_RETRY_SECONDS)

    async def check(self) -> None:
        """Raises PriceUnavailable unless the last tick published a price and the store can be used."""
        problem = self._problem or self._publisher.down
        if problem:
            raise PriceUnavailable(problem, retry_after_seconds=math.ceil(self._settings.feed_interval_seconds))

    async def _tick(self, next_tick_at: float) -> None:
        """One round, whatever happens in it, and its status for the store."""
        try:
            self._problem = await self._publish(await self._poll(), next_tick_at)
        except DeskError as error:
            self._problem = error.detail
        except Exception as error:  # a fault of one tick must not end the prices of all later ones
            self._problem = f"Something went wrong here ({type(error).__name__})."
            _log.exception("No price was published")
        self._changes.price(self._problem)
        await self._publisher.put_feed_status(
            FeedStatus(self._decided_at, self._settings.price_feed, self._problem, self.statuses)
        )

    async def _poll(self) -> Tick:
        """Asks all sources at once and applies the rule to what they say."""
        answers = await asyncio.gather(*(source.poll(may_rest=self._may_rest) for source in self.sources))
        quotes = [quote for answer in answers for quote in answer.quotes]
        moment, decided_at = self._clock.monotonic(), self._clock.now()
        self._decided_at = decided_at
        verdict = decide(quotes, decided_at, self._rule, self._settings.currencies)
        self.priced = verdict.rates_e8.keys()
        self._may_rest = not verdict.missing and not verdict.unsettled
        self._note_sources(answers, verdict)
        return Tick(answers, verdict, moment, decided_at)

    def _note_sources(self, answers: Sequence[SourceResponse], verdict: Verdict) -> None:
        """A source is at fault for all that was rejected, but not for being left alone with a quote that was fit."""
        rejected = [each for answer in answers for each in answer.rejected] + list(verdict.rejected)
        shared = verdict.missing.values()
        own = [each for each in rejected if each.reason not in shared]
        self.statuses = tuple(source.state(rejection_reason(source.name, rejected)) for source in self.sources)
        self._changes.sources({source.name: rejection_reason(source.name, own) for source in self.sources})

    async def _publish(self, found: Tick, next_tick_at: float) -> str:
        """Publishes the prices that were found, and which of them are unsettled; returns why there is none to sell at,
        by currency, "" if there is one in each."""
        verdict = found.verdict
        await self._load_last_prices(next_tick_at)
        frozen = [each.name for each in self.sources if each.is_frozen]
        withdrawn = self._guard.withdrawn(verdict, frozen, found.decided_at)
        unsettled = {**withdrawn, **await self._guard.unsettled(verdict, found.decided_at)}
        if not verdict.rates_e8 and not withdrawn:
            return listed(verdict.missing)
        price = self._price(found, unsettled)
        with contextlib.suppress(PriceSuperseded):  # by a newer one of another updater
            await self._publisher.publish(price, next_tick_at)
            await self._guard.note_published(price.record)
        doubted = {each: unsettled.reason for each, unsettled in price.record.unsettled.items()}
        return listed({**price.record.missing, **doubted})

    def _price(self, found: Tick, unsettled: Mapping[Currency, str]) -> UsablePrice:
        record = record_of(
            found.verdict,
            [each for answer in found.answers for each in answer.rejected],
            self._settings.price_feed,
            unsettled=unsettled,
            rule=self._rule,
            decided_at=found.decided_at,
            ttl=timedelta(seconds=self._settings.price_ttl_seconds),
            replayed_from=min((each.replayed_from for each in found.answers if each.replayed_from), default=None),
        )
        return UsablePrice.seen(self._signer.sign(record), found.decided_at, found.moment, None)


class StateChangeLog:
    """What the updater logs of sources and prices, and with that reports: each change once."""

    def __init__(self) -> None:
        self._bad: Collection[str] = ()
        self._problem = ""

    def sources(self, wrong: Mapping[str, str]) -> None:
        """What is wrong with each source, "" when nothing is."""
        for source, why in wrong.items():
            if why and source not in self._bad:
                _log.warning("The price source %s is not used as it should be: %s", source, why)
            elif not why and source in self._bad:
                _log.info("The price source %s is all right again.", source)
        self._bad = {source for source, why in wrong.items() if why}

    def price(self, problem: str) -> None:
        """Why there is no price, "" when there is one."""
        if problem and problem != self._problem:
            _log.critical(
                "A price is missing or in doubt; orders at it are refused, at the latest when the last one ends: %s",
                problem,
            )
        elif self._problem and not problem:
            _log.info("All prices are there again.")
        self._problem = problem


class FeedMetrics(Collector):
    """How the sources and the price are, for Prometheus. Times are seconds since 1970."""

    def __init__(self, updater: Updater) -> None:
        self._updater = updater

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at every scrape."""
        up = _gauge("source_up", "1 when the source gave quotes at the last tick.", "source")
        used = _gauge("source_used", "1 when all quotes of the source were used at the last tick.", "source")
        open_circuits = _gauge("source_circuit_open", "1 while the source is left alone, after failures.", "source")
        quoted_at = _gauge("source_quoted_at_seconds", "When the source's last quotes were observed.", "source")
        mid = _gauge("source_mid", "The middle of the source's last bid and ask.", "source", "currency")
        for state in self._updater.statuses:
            up.add_metric([state.source], not state.failures)
            used.add_metric([state.source], not state.detail)
            open_circuits.add_metric([state.source], state.resting_until is not None)
            if state.quoted_at is not None:
                quoted_at.add_metric([state.source], state.quoted_at.timestamp())
            for currency, mid_e8 in (state.mids_e8 or {}).items():
                mid.add_metric([state.source, currency], mid_e8 / RATE_SCALE)
        failures = CounterMetricFamily("buydesk_source_failures", "Calls of the source that failed.", labels=["source"])
        for source in self._updater.sources:
            failures.add_metric([source.name], source.failures_total)
        quorum = _gauge("price_has_quorum", "1 when at the last tick enough sources agreed on a price.", "currency")
        for currency in self._updater.currencies:
            quorum.add_metric([currency], currency in self._updater.priced)
        unsettled = _gauge("price_unsettled", "1 while the last published record doubts the price.", "currency")
        as_of = _gauge("price_as_of_seconds", "When the last published price was observed.")
        if self._updater.published is not None:
            as_of.add_metric([], self._updater.published.as_of.timestamp())
            for currency in self._updater.currencies:
                unsettled.add_metric([currency], currency in self._updater.published.unsettled)
        yield from (up, used, open_circuits, quoted_at, mid, failures, quorum, as_of, unsettled)


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"buydesk_{name}", documentation, labels=labels)


def next_tick(due: float, moment: float, interval: float) -> float:
    """The first time of the schedule after `moment`: ticks that were missed are not made up for."""
    missed = max(0, math.floor((moment - due) / interval))
    return due + (missed + 1) * interval


def rejection_reason(source: str, rejected: Sequence[RejectedQuote]) -> str:
    """What was wrong with what the source said, "" when nothing was."""
    own = [each for each in rejected if each.source == source]
    of_quotes = listed({each.quote.currency: each.reason for each in own if each.quote is not None})
    others = [each.reason for each in own if each.quote is None]
    return "; ".join([*others, of_quotes] if of_quotes else others)
