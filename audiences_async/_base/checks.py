"""Argument checks: raise a clear `ConfigurationError` before anything is sent."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from audiences_async.errors import ConfigurationError

if TYPE_CHECKING:
    from attrs import Attribute

_LARGEST: Final = 1e9  # 31 years of seconds; this comparison also rejects nan, inf and integers too large for a float


def number(name: str, value: Any, *, zero: bool = False, unit: str = "") -> float:
    """Return a finite number above 0, or from 0 up if *zero* is true."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -_LARGEST < value < _LARGEST or value < 0 or (value == 0 and not zero):
        bound = "of 0 or more" if zero else "above 0"
        raise ConfigurationError(f"{name} must be a finite number {unit}{bound}, got {value!r}")
    return float(value)


def seconds(name: str, value: Any, *, zero: bool = False) -> float:
    """Return a number of seconds; see `number`."""
    return number(name, value, zero=zero, unit="of seconds ")


def count(name: str, value: Any, *, least: int = 1) -> int:
    """Return *value* if it is a whole number from *least* up."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{name} must be a whole number of {least} or more, got {value!r}")
    return value


def is_count(_: object, attribute: "Attribute[int]", value: int) -> None:
    """Validate an attrs field as `count` does."""
    count(attribute.name, value)


def is_count_or_zero(_: object, attribute: "Attribute[int]", value: int) -> None:
    """Check a field of an attrs class as `count` does, with 0 allowed."""
    count(attribute.name, value, least=0)


def is_positive(_: object, attribute: "Attribute[float]", value: float) -> None:
    """Validate an attrs field as `number` does."""
    number(attribute.name, value)


def is_not_negative(_: object, attribute: "Attribute[float]", value: float) -> None:
    """Validate an attrs field as `number` does; 0 is allowed."""
    number(attribute.name, value, zero=True)


def statuses(name: str, values: Iterable[Any]) -> frozenset[int]:
    """Return a set of HTTP statuses from 300 to 599."""
    listed = list(values) if isinstance(values, Iterable) else [values]
    for value in listed:
        if not isinstance(value, int) or not 300 <= value <= 599:
            raise ConfigurationError(f"{name} must contain only HTTP statuses from 300 to 599, got {value!r}")
    return frozenset(listed)


def instance(name: str, value: Any, *kinds: type) -> None:
    """Check that *value* is an instance of one of *kinds*."""
    if not isinstance(value, kinds):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigurationError(f"{name} must be {expected}, got {type(value).__name__}")
