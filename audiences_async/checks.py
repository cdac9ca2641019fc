"""Checks of arguments: a clear `ConfigurationError` before anything is sent."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from audiences_async.errors import ConfigurationError

if TYPE_CHECKING:
    from attrs import Attribute

_LARGEST: Final = 1e9  # 31 years of seconds; a comparison refuses nan, inf and integers beyond floats


def number(name: str, value: Any, *, zero: bool = False, unit: str = "") -> float:
    """A finite number above zero, or from zero up where *zero* says so."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -_LARGEST < value < _LARGEST or value < 0 or (value == 0 and not zero):
        bound = "of 0 or more" if zero else "above 0"
        raise ConfigurationError(f"{name} must be a finite number {unit}{bound}, got {value!r}")
    return float(value)


def seconds(name: str, value: Any, *, zero: bool = False) -> float:
    """As `number`, of seconds."""
    return number(name, value, zero=zero, unit="of seconds ")


def count(name: str, value: Any, *, least: int = 1) -> int:
    """Return *value* if it is a whole number from *least* up."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{name} must be a whole number of {least} or more, got {value!r}")
    return value


def is_count(_: object, attribute: "Attribute[int]", value: int) -> None:
    """As `count`, for a field of an attrs class."""
    count(attribute.name, value)


def is_count_or_zero(_: object, attribute: "Attribute[int]", value: int) -> None:
    """Check a field of an attrs class as `count` does, with 0 allowed."""
    count(attribute.name, value, least=0)


def is_positive(_: object, attribute: "Attribute[float]", value: float) -> None:
    """As `number`, for a field of an attrs class."""
    number(attribute.name, value)


def is_not_negative(_: object, attribute: "Attribute[float]", value: float) -> None:
    """As `number`, for a field of an attrs class that may be zero."""
    number(attribute.name, value, zero=True)


def statuses(name: str, values: Iterable[Any]) -> frozenset[int]:
    """A set of HTTP statuses that can stand for a failure."""
    given = list(values) if isinstance(values, Iterable) else [values]
    for value in given:
        if not isinstance(value, int) or not 300 <= value <= 599:
            raise ConfigurationError(f"{name} must hold HTTP statuses from 300 to 599, got {value!r}")
    return frozenset(given)


def instance(name: str, value: Any, *kinds: type) -> None:
    """One of the classes that are meant here."""
    if not isinstance(value, kinds):
        meant = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigurationError(f"{name} must be {meant}, got {type(value).__name__}")
