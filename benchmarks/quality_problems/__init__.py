"""The problems of ``benchmarks.quality``: what they are, those with data, those with equations."""

from benchmarks.quality_problems.base import PARTS, Budget, Measure, Part, Problem
from benchmarks.quality_problems.data import Digits, Tables, Texts
from benchmarks.quality_problems.physics import Burgers, Poisson

__all__ = ["PARTS", "PROBLEMS", "Budget", "Measure", "Part", "Problem"]

PROBLEMS: dict[str, type[Problem]] = {
    "digits": Digits,
    "tables": Tables,
    "texts": Texts,
    "poisson": Poisson,
    "burgers": Burgers,
}
