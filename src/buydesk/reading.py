"""Reading of JSON: documents of strangers as they were written, documents of the desk as the types they are to be."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import msgspec

from buydesk.money import CURRENCIES_TEXT, Currency, parse_amount, parse_btc, parse_rate, parse_sale_rate
from buydesk.times import parse_time

T = TypeVar("T")


class WrongMember(ValueError):
    """The document is not what it has to be: `member` says where, as in `sources.used.0.bid`, and `reason` why."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(f"{member}: {reason}")
        self.member = member
        self.reason = reason


def read(kind: type[T], document: object, whole: str = "document") -> T:
    """The decoded JSON as `kind`, a type of msgspec's; its members may be of the types below.

    Members that the type does not know are ignored. Raises WrongMember, with `whole` for the member when all is wrong.
    """
    try:
        return msgspec.convert(document, kind, dec_hook=_value_of)
    except msgspec.ValidationError as error:
        raise _wrong_member(str(error), whole) from error


class TextType(type):
    """Of a type whose values are text in documents: `parse` makes the value, or raises ValueError."""

    parse: Callable[[str], object]

    def __instancecheck__(cls, _: object) -> bool:
        """msgspec asks whether what `parse` made is of the type: it is a plain int, str or datetime."""
        return True


def text_type(parse: Callable[[str], object]) -> Any:
    """The type of what `parse` makes of text."""
    return TextType(parse.__name__, (), {"parse": staticmethod(parse)})


if TYPE_CHECKING:
    Cents = int
    Satoshi = int
    RateE8 = int
    SaleRateE8 = int
    Moment = datetime
    Rates = Mapping[Currency, int]
else:
    Cents, Satoshi, Moment = text_type(parse_amount), text_type(parse_btc), text_type(parse_time)
    RateE8, SaleRateE8 = text_type(parse_rate), text_type(parse_sale_rate)

    class Rates(metaclass=TextType):
        """Rates by currency, those that there are: a record may be older than a currency that was added since."""


_Known = msgspec.defstruct("_Known", [(each.value, RateE8 | msgspec.UnsetType, msgspec.UNSET) for each in Currency])


def _value_of(kind: Any, written: object) -> object:
    """What msgspec asks for when it does not know the type itself; it adds the path to a ValueError."""
    if kind is Rates:
        return _rates(written)
    if not isinstance(written, str):
        raise ValueError("must be text")
    return kind.parse(written)


def _rates(written: object) -> Rates:
    try:
        known = msgspec.convert(written, _Known, dec_hook=_value_of)
    except msgspec.ValidationError as error:
        raise ValueError(error) from error  # to which msgspec adds the rest of the path
    rates = msgspec.structs.asdict(known)
    return {currency: rates[currency] for currency in Currency if rates[currency] is not msgspec.UNSET}


_MISSING = re.compile(r"Object missing required field `(\w+)`")
_EXPECTED = re.compile(r"Expected `(\w+)[^`]*`(?:, got .*| (>=|<=) (\d+))")
_MUST_BE = {"object": "an object", "array": "a list", "str": "text", "uuid": "text", "int": "an integer"}
_MUST_BE |= {"bool": "true or false", ">=": "at least", "<=": "at most"}
_CHOICES = {"currency": f"must be one of {CURRENCIES_TEXT}", "feed": "must be sandbox or live"}
_CHOICES["status"] = "must be accepted, settled or cancelled"


def _wrong_member(message: str, whole: str) -> WrongMember:
    """msgspec's message, such as "Expected `str`, got `int` - at `$.used[0].bid`", in our words."""
    reason, *paths = message.split(" - at `$")
    path = "".join(each.removesuffix("`") for each in reversed(paths))
    if missing := _MISSING.fullmatch(reason):
        path, reason = f"{path}.{missing[1]}", "is missing"
    elif expected := _EXPECTED.fullmatch(reason):
        kind, bound, limit = expected.groups()
        reason = f"must be {_MUST_BE[bound]} {limit}" if bound else f"must be {_MUST_BE[kind]}"
    elif reason == "Invalid UUID":
        reason = "must be a UUID"
    member = re.sub(r"\[(\d+)\]", r".\1", path).removeprefix(".") or whole
    if reason.startswith("Invalid enum value"):
        reason = _CHOICES.get(member.rpartition(".")[2], _CHOICES["currency"])  # also as the name of a member
    return WrongMember(member, reason)


class Number(str):
    """A JSON number as it was written: it must never pass through a float."""

    __slots__ = ()


# Text of one line that reads as it is written: without control characters, ends of lines, and characters that turn the
# direction of what is read. As JSON schemas have it; half of a surrogate pair, which no UTF-8 has, is none either.
LINE_PATTERN = r"^[^\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069]+$"
_LINE = re.compile(LINE_PATTERN.replace("]", r"\ud800-\udfff]"))


def is_line(text: str) -> bool:
    """Whether it is one line as above, of at least one character."""
    return bool(_LINE.fullmatch(text))


def parse_line(text: str, chars_max: int) -> str:
    """The text, which is one line of at most so many characters; raises ValueError with the reason."""
    if len(text) > chars_max or not is_line(text):
        raise ValueError(f"must be 1 to {chars_max} characters without control characters")
    return text


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is text, and no number."""
    return isinstance(value, str) and not isinstance(value, Number)


class Repeated(ValueError):
    """An object has members of the same name: `names`."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"repeats {', '.join(names)}")
        self.names = names


def decode_json(text: str) -> object:
    """The document of a JSON text, its numbers as `Number`. Raises Repeated, ValueError for what is no JSON, and
    RecursionError for what is nested too deeply."""
    return _JSON.decode(text)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise Repeated([name for name in counts if counts[name] > 1])
    return members


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


_JSON = json.JSONDecoder(object_pairs_hook=_distinct, parse_float=Number, parse_int=Number, parse_constant=_no_number)
