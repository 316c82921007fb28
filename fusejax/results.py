"""What the numbers that stages leave in files look like, for whoever reads them again."""

from typing import Annotated

from pydantic import AfterValidator, FiniteFloat


def _with_average(values: dict[str, float]) -> dict[str, float]:
    if "average" not in values:
        raise ValueError("has no average")
    return values


Scores = Annotated[dict[str, FiniteFloat], AfterValidator(_with_average)]
"""Bits per byte of one model: by domain, and `average`."""
