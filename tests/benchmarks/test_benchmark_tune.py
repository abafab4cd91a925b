"""What tuning writes into csrc/cuda/tuned.h, without a GPU."""

import re

import pytest

from benchmarks import tune


def crossovers(text):
    return re.findall(r"^    \{(\d+), int64_t\{(\d+)\} << 20\},$", text, re.MULTILINE)


def test_a_value_and_an_architecture_are_replaced_and_all_else_stays():
    before = tune.TUNED.read_text(encoding="utf-8")
    after = tune.written(before, {"FPG_FEW_SLOTS": 7, "FPG_VECTORS_OF_8": 2}, 90, 48 << 20)
    assert "#define FPG_FEW_SLOTS 7\n" in after and "#define FPG_VECTORS_OF_8 2\n" in after
    assert dict(crossovers(after)) == dict(crossovers(before)) | {"90": "48"}
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(changed) == 3 and len(after.splitlines()) == len(before.splitlines())


def test_a_new_architecture_stands_before_the_older_ones():
    after = tune.written(tune.TUNED.read_text(encoding="utf-8"), {}, 120, 512 << 20)
    architectures = [int(architecture) for architecture, _ in crossovers(after)]
    assert architectures[0] == 120 and architectures == sorted(architectures, reverse=True)


def test_what_is_already_there_is_written_back_as_it_is():
    text = tune.TUNED.read_text(encoding="utf-8")
    values = {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)", text)}
    architecture, size = crossovers(text)[0]
    assert tune.written(text, values, int(architecture), int(size) << 20) == text


def test_a_name_that_the_file_lacks_is_an_error():
    with pytest.raises(ValueError, match="defines no FPG_NOTHING"):
        tune.written(tune.TUNED.read_text(encoding="utf-8"), {"FPG_NOTHING": 1}, 90, 0)
