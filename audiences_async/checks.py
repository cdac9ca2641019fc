"""Checks of arguments: a clear `ConfigurationError` before anything is sent."""

from collections.abc import Iterable
from typing import Any, Final

from audiences_async.errors import ConfigurationError

_LONGEST: Final = 1e9  # seconds, or 31 years: no event loop can wait longer, and a comparison refuses nan and inf


def seconds(name: str, value: Any, *, zero: bool = False) -> float:
    """A finite number of seconds above zero, or from zero up where *zero* says so."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -_LONGEST < value < _LONGEST or value < 0 or (value == 0 and not zero):
        bound = "of 0 or more" if zero else "above 0"
        raise ConfigurationError(f"{name} must be a finite number of seconds {bound}, got {value!r}")
    return float(value)


def count(name: str, value: Any) -> int:
    """A whole number from 1 up."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number of 1 or more, got {value!r}")
    return value


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
