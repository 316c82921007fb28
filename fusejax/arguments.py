"""Checks of what a caller passes to a function of arrays: one line that names the argument and what would be right.

Values that are being traced are not known yet, so only their shapes are checked.
"""

import math
from collections.abc import Iterable
from typing import Any

# Of a weight that is not 0: sums and quotients of such stay well within float32.
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-30, 1e30


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """ValueError where `value` is none of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: {value!r} should be {', '.join(choices[:-1])} or {choices[-1]}")


def within(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> None:
    """ValueError where a number is known and not finite, or not in [least, most], or not greater than `above`."""
    number = _known(value)
    if number is None or (math.isfinite(number) and least <= number <= most and number > above):
        return
    wanted = [
        f"{word} {bound:g}"
        for word, bound in (("at least", least), ("at most", most), ("greater than", above))
        if math.isfinite(bound)
    ]
    raise ValueError(f"{name}: {number:g} should be a finite number{''.join(f', {part}' for part in wanted)}")


def optional(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> None:
    """`within`, where None says nothing."""
    if value is not None:
        within(name, value, least, most, above=above)


def shape(name: str, array: Any, wanted: tuple[int, ...], why: str) -> None:
    """ValueError where an array, if there is one, has another shape; `why` says where the wanted one comes from."""
    if array is not None and tuple(array.shape) != tuple(wanted):
        raise ValueError(f"{name}: shape {tuple(array.shape)} should be {tuple(wanted)}, {why}")


def weights_objection(weights: Iterable[Any]) -> str | None:
    """What is wrong with the weights of sources; None: nothing, or they are not known yet."""
    numbers = [_known(weight) for weight in weights]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return None
    wrong = [number for number in known if not (number == 0 or _LEAST_WEIGHT <= number <= _MOST_WEIGHT)]
    if wrong:
        return f"each should be 0, or between {_LEAST_WEIGHT:g} and {_MOST_WEIGHT:g}, got {wrong[0]:g}"
    return None if any(known) else f"should not all be 0, got {known}"


def _known(value: Any) -> float | None:
    """A number's value; None while it is traced."""
    try:
        return float(value)
    except TypeError:  # as jax raises it of a traced value
        return None
