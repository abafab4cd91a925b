"""Each method by each of its solvers against its oracle."""

import inspect

import pytest
import torch

from fastpcgrad import methods
from fastpcgrad.methods.fixed_weights import FixedWeights
from tests.methods.oracles import CASES, ELSEWHERE, answers
from tests.methods.random_rows import error, gram

on_each_case = pytest.mark.parametrize("name", CASES)


@on_each_case
def test_the_merged_gradient_is_the_oracles(name, solver):
    for rows, weights, allowed in answers(name):
        found = CASES[name].make(len(rows)).weights(gram(rows))
        assert error(found @ rows, weights @ rows, weights, rows) <= allowed


@on_each_case
def test_problems_of_every_kind_are_solved_at_once(name, solver):
    """Some end before others, and one is not finite."""
    tasks = max(3, CASES[name].least)
    known = [answer for answer in answers(name) if len(answer[0]) == tasks]
    matrices = torch.stack([gram(rows) for rows, _, _ in known])
    matrices[1, 0, 0] = torch.nan
    found = CASES[name].make(tasks).weights(matrices)
    assert found[1].isnan().all() != isinstance(CASES[name].make(tasks), FixedWeights)
    for s, (rows, weights, allowed) in enumerate(known):
        if s != 1 and name != "RandomWeights":  # which draws others for each problem
            assert error(found[s] @ rows, weights @ rows, weights, rows) <= allowed, s


def test_every_method_has_an_oracle():
    kinds = {
        name
        for name, kind in vars(methods).items()
        if inspect.isclass(kind) and issubclass(kind, methods.Method) and not inspect.isabstract(kind)
    }
    assert {name.partition(",")[0] for name in CASES} | ELSEWHERE == kinds
