"""Dicts of arrays to merge, and what TensorLogic's loops and the oracle make of them."""

import random
import warnings

import numpy as np
import pytest
import torch

from fastpcgrad import reference

SHAPES = [(), (1,), (7,), (3, 4), (2, 0, 3), (0,), (2, 3, 5), (33,)]


def tensorlogic(tasks):
    """TensorLogic's loops in NumPy: every name by itself, originals in order, mean over the tasks."""
    merged = {}
    for name in tasks[0]:
        if not all(name in task for task in tasks):
            continue
        originals = [task[name] for task in tasks]
        total = np.zeros_like(originals[0])
        for i, own in enumerate(originals):
            projected = own.copy()
            for j, other in enumerate(originals):
                dot, squared_norm = np.sum(projected * other), np.sum(other * other)
                if j != i and dot < 0 and squared_norm > 1e-8:
                    projected = projected - dot / squared_norm * other
            total = total + projected
        merged[name] = total / len(tasks)
    return merged


def random_tasks(rng, dtype=np.float64, scales=(1.0,), missing=0.15):
    """One to eight tasks on up to six names, some of which some tasks lack; the later tasks conflict with others."""
    layout = {f"p{k}": SHAPES[rng.integers(len(SHAPES))] for k in range(rng.integers(1, 7))}
    tasks = []
    for t in range(rng.integers(1, 9)):
        names = [name for name in layout if rng.random() >= missing]
        rng.shuffle(names)
        task = {}
        for name in names:
            values = rng.standard_normal(layout[name]) * rng.choice(scales)
            if t and name in tasks[t - 1] and rng.random() < 0.5:
                values = 0.3 * values - tasks[t - 1][name]
            task[name] = np.asarray(values, dtype=dtype)
        tasks.append(task)
    return tasks


def names_in_order(tasks):
    return list(dict.fromkeys(name for task in tasks for name in task))


def oracle(tasks, variant, seed, reduction=None):
    """``reference.merge`` in float64, as dicts."""
    names = names_in_order(tasks)
    like = {name: array for task in tasks for name, array in task.items()}
    rows = [[torch.tensor(task[n], dtype=torch.float64) if n in task else None for n in names] for task in tasks]
    parameters = [torch.zeros(like[name].shape, dtype=torch.float64) for name in names]
    merged = reference.merge(rows, parameters, variant, random.Random(seed), reduction)
    return {name: grad.numpy() for name, grad in zip(names, merged, strict=True) if grad is not None}


def scale_of(tasks):
    """Σ_j ‖g_j‖, which Σ_j w_j ‖g_j‖ exceeds for a sum."""
    return sum(np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in task.values())) for task in tasks)


def distance(found, expected):
    assert list(found) == list(expected)
    gaps = [np.asarray(found[n], dtype=np.float64) - expected[n] for n in expected]
    return np.sqrt(sum(float(np.sum(np.square(gap))) for gap in gaps))


def copied(tasks):
    return [{name: np.array(array) for name, array in task.items()} for task in tasks]


def optional(name):
    """A library that may be missing; what it warns of while it is imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)
