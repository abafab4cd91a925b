"""What tuning writes into csrc/cuda/tuned.h, without a GPU."""

import re

import pytest

from benchmarks import tune


def crossovers(text):
    """(architecture, MiB of rows that a thread holds, MiB of more rows)."""
    size = r"int64_t\{(\d+)\} << 20"
    return re.findall(rf"^    \{{(\d+), {size}, {size}\}},$", text, re.MULTILINE)


def test_a_value_and_an_architecture_are_replaced_and_all_else_stays():
    before = tune.TUNED.read_text(encoding="utf-8")
    after = tune.written(before, {"FPG_FEW_SLOTS": 7, "FPG_VECTORS_OF_8": 2}, 90, (48 << 20, 7 << 20))
    assert "#define FPG_FEW_SLOTS 7\n" in after and "#define FPG_VECTORS_OF_8 2\n" in after
    expected = [("90", "48", "7") if line[0] == "90" else line for line in crossovers(before)]
    assert crossovers(after) == expected
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(changed) == 3 and len(after.splitlines()) == len(before.splitlines())


def test_a_new_architecture_stands_before_the_older_ones():
    after = tune.written(tune.TUNED.read_text(encoding="utf-8"), {}, 120, (512 << 20, 1 << 20))
    architectures = [int(architecture) for architecture, *_ in crossovers(after)]
    assert architectures[0] == 120 and architectures == sorted(architectures, reverse=True)


def test_what_is_already_there_is_written_back_as_it_is():
    text = tune.TUNED.read_text(encoding="utf-8")
    values = {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)", text)}
    architecture, held, more = map(int, crossovers(text)[0])
    assert tune.written(text, values, architecture, (held << 20, more << 20)) == text


def test_a_name_that_the_file_lacks_is_an_error():
    with pytest.raises(ValueError, match="defines no FPG_NOTHING"):
        tune.written(tune.TUNED.read_text(encoding="utf-8"), {"FPG_NOTHING": 1}, 90, (0, 0))


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ([(1, 2), (3, 4), (9, 8)], 2),
        ([(2, 1), (5, 4), (9, 8)], 0),
        ([(1, 2), (5, 4.9), (7, 8)], 4),  # a little lost in between
        ([(1, 2), (9, 4), (7, 8)], 1),
    ],
)
def test_the_crossover_loses_least(times, best):
    assert tune.best_crossover([1, 2, 4], times) == best
