"""Rounds of calls, in several processes, until there were enough; and what else must hold of the services."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context

import httpx2

from fuzz.calls import Found, Part, call
from fuzz.documents import Document, faults, for_anybody, forms, only_guarded, operations, with_examples

# Calls of an operation in the first round, which also makes those at the edges of the schemas, and in every later one.
EXAMPLES_FIRST = 5
EXAMPLES = 200
WORKERS = 2


@dataclass(frozen=True)
class Services:
    """What is called: the services' URLs, their tokens, and examples that find something, so that each operation
    succeeds: of parameters by name, and of bodies by service and operation."""

    urls: Mapping[str, str]
    tokens: Mapping[str, Sequence[str]]
    parameters: Mapping[str, str] = field(default_factory=dict)
    bodies: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def fuzz(services: Services, *, calls: int, seed: int, seconds_max: float) -> Found:
    """What so many calls, or up to a round more, found out. That the time was over before is a failure too."""
    documents = {service: document_at(url) for service, url in services.urls.items()}
    found = Found({}, {f"{name}: {each}": "" for name, document in documents.items() for each in faults(document)})
    parts = list(_parts(services, documents))
    ends = time.monotonic() + seconds_max
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        made = partial(call, seed=seed, examples=EXAMPLES_FIRST, boundaries=True)
        while True:
            for each in pool.map(made, parts):
                found.add(each)
            if found.made >= calls or time.monotonic() > ends:
                break
            print(f"{found.made} calls", flush=True)
            seed += 1
            made = partial(call, seed=seed, examples=EXAMPLES, boundaries=False)
    if found.made < calls:
        found.failures["not all calls were made"] = f"The time was over after {found.made} of {calls}."
    for service, document in documents.items():
        for name, operation in operations(document):
            # 409: the call was as it should be, but came late (a newer price) or was too large (the cap).
            good = {int(status) for status in operation["responses"] if status.startswith("2") or status == "409"}
            if name == "GET /readyz":
                good.add(503)  # of a db_proxy that gets nobody's price but those that are made up here
            if not good & found.calls.get(f"{service}: {name}", {}).keys():
                found.failures[f"{service}: {name}: never succeeded"] = f"None of its calls was answered {good}."
    return found


def document_at(url: str) -> Document:
    """The OpenAPI document of the service there."""
    document: Document = httpx2.get(f"{url}/openapi.json").raise_for_status().json()
    return document


def _parts(services: Services, documents: Mapping[str, Document]) -> Iterator[Part]:
    for service, document in documents.items():
        url = services.urls[service]
        shown = with_examples(document, services.parameters, services.bodies.get(service, {}))
        for index, form in enumerate(forms(for_anybody(shown))):
            yield Part(service, url, form, None, is_form=index > 0)
        guarded = only_guarded(shown)
        if guarded["paths"]:
            for token in services.tokens[service]:
                yield Part(service, url, guarded, token)
