"""csrc/cuda/plan.h, compiled by itself: each column belongs to one item, each pair of rows to one number."""

from __future__ import annotations

import ctypes
import itertools
import subprocess

import pytest
import torch

from tests.backends.cuda_emulated import CSRC, CXX

pytestmark = pytest.mark.skipif(not CXX, reason="there is no C++ compiler on this machine")

SOURCE = """
#include "cuda/plan.h"
using namespace fpg;

extern "C" int plan(int kind, int64_t tasks, int64_t width, int64_t segments, int64_t itemsize, Plan* found) {
  *found = kind == 0 ? columns_plan(tasks, width, segments, itemsize) : gram_plan(tasks, width, segments, itemsize);
  return 0;
}
extern "C" int items(const Plan* plan, const int64_t* offsets, int64_t segments, int64_t width, Item* found) {
  for (int64_t k = 0; k < plan->items; ++k) found[k] = item_at(*plan, offsets, segments, width, k);
  return 0;
}
extern "C" int items_of_segments(const Plan* plan, const int64_t* offsets, int64_t segments, int64_t width,
                                 Range* found) {
  for (int64_t s = 0; s < segments; ++s) found[s] = items_of(*plan, offsets, s, width);
  return 0;
}
extern "C" int64_t wrong_pairs(int64_t tasks) {
  int64_t index = 0, wrong = 0;
  for (int64_t i = 0; i < tasks; ++i) {
    for (int64_t j = 0; j <= i; ++j, ++index) {
      const Pair pair = pair_of(index);
      wrong += pair.i != i || pair.j != j || pair_index(i, j) != index;
    }
  }
  return wrong;
}
extern "C" int64_t tiles_of(int64_t tasks, int64_t itemsize) { return tiles_of_gram(tasks, itemsize); }
"""


class Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("step", "span", "slots", "items")]


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    library = tmp_path_factory.mktemp("plan") / "plan.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
    command = [*CXX, *flags, "-xc++", "-", "-o", str(library)]
    compiled = subprocess.run(command, input=SOURCE, text=True, capture_output=True)
    assert compiled.returncode == 0, compiled.stderr
    loaded = ctypes.CDLL(str(library))
    pointer, i64, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.plan.argtypes = [kind, i64, i64, i64, i64, pointer]
    loaded.items.argtypes = loaded.items_of_segments.argtypes = [pointer, pointer, i64, i64, pointer]
    loaded.wrong_pairs.argtypes, loaded.wrong_pairs.restype = [i64], i64
    loaded.tiles_of.argtypes, loaded.tiles_of.restype = [i64, i64], i64
    return loaded


def plan_of(core, kind, tasks, width, segments, itemsize):
    found = Plan()
    core.plan(kind, tasks, width, segments, itemsize, ctypes.addressof(found))
    return found


def items_of(core, plan, offsets, width):
    """[items, 4]: segment, slot, first and last column; and [segments, 2]: first and last item."""
    segments = 1 if offsets is None else len(offsets) - 1
    pointer = None if offsets is None else offsets.data_ptr()
    items = torch.empty(plan.items, 4, dtype=torch.int64)
    ranges = torch.empty(segments, 2, dtype=torch.int64)
    core.items(ctypes.addressof(plan), pointer, segments, width, items.data_ptr())
    core.items_of_segments(ctypes.addressof(plan), pointer, segments, width, ranges.data_ptr())
    return items, ranges


def test_pairs_are_numbered_row_by_row(core):
    assert core.wrong_pairs(256) == 0


@pytest.mark.parametrize(
    ("tasks", "itemsize", "tiles"), [(8, 4, 1), (9, 4, 1), (33, 2, 1), (65, 2, 6), (256, 4, 28), (9, 8, 3)]
)
def test_tiles_cover_the_triangle(core, tasks, itemsize, tiles):
    assert core.tiles_of(tasks, itemsize) == tiles


WIDTHS = [0, 1, 2, 511, 512, 513, 4096, 100_003, 10**6, 2**22, 2**31 + 5, 5 * 10**9]


@pytest.mark.parametrize("kind", [0, 1], ids=["columns", "gram"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 9, 64, 256])
def test_items_cut_the_columns_without_gap_or_overlap(core, tasks, itemsize, kind):
    for width in WIDTHS:
        plan = plan_of(core, kind, tasks, width, 1, itemsize)
        assert plan.span % plan.step == 0 and plan.items == plan.slots <= 2048
        assert plan.step % (16 // itemsize) == 0
        items, ranges = items_of(core, plan, None, width)
        assert items[0, 2] == 0 and items[-1, 3] == width and torch.equal(items[1:, 2], items[:-1, 3])
        assert bool((items[:, 2] % plan.step == 0).all())
        assert ranges.tolist() == [[0, plan.items if width else 0]]


def all_offsets(width, segments):
    """Every way to cut few columns; a random one of many."""
    if width <= 4:
        for inner in itertools.combinations_with_replacement(range(width + 1), segments - 1):
            yield [0, *inner, width]
    else:
        inner = torch.randint(0, width + 1, (segments - 1,)).sort().values.tolist()
        yield [0, *inner, width]
        yield [0] * segments + [width]
        yield [0] + [width] * segments


@pytest.mark.parametrize("width", [1, 4, 700, 5000, 1_000_003])
@pytest.mark.parametrize("segments", [1, 2, 5, 40])
def test_each_column_of_each_segment_lies_in_one_item_of_its_own(core, width, segments):
    if width <= 4 and segments > 5:
        pytest.skip("few columns have only so many cuts")
    for offsets in all_offsets(width, segments):
        plan = plan_of(core, 1, 3, width, segments, 4)
        items, ranges = items_of(core, plan, torch.tensor(offsets), width)
        for s in range(segments):
            first, last = ranges[s].tolist()
            mine = items[first:last]
            assert bool((mine[:, 0] == s).all())
            ends = [offsets[s], *mine[:, 3].tolist()]
            assert ends[-1] == offsets[s + 1] and mine[:, 2].tolist() == ends[:-1]
            assert bool((mine[:, 3] <= (mine[:, 1] + 1) * plan.span).all())
            assert bool((mine[:, 2] >= mine[:, 1] * plan.span).all())
            others = torch.cat([items[:first], items[last:]])
            assert not bool(((others[:, 0] == s) & (others[:, 3] > others[:, 2])).any())


def test_offsets_that_are_wrong_stay_inside_the_columns(core):
    plan = plan_of(core, 1, 3, 5000, 3, 4)
    for offsets in itertools.product([-(10**15), 0, 2500, 5000, 10**15], repeat=4):
        items, _ = items_of(core, plan, torch.tensor(offsets), 5000)
        assert bool((items[:, 2] <= items[:, 3]).all())
        touched = items[items[:, 2] < items[:, 3]]
        assert bool((touched[:, 2] >= 0).all() and (touched[:, 3] <= 5000).all())
