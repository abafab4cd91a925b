"""csrc/solvers/pcgrad.h, compiled by itself: for one thread, a group of threads, and a GPU."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastpcgrad import reference

CSRC = Path(__file__).parents[1] / "csrc"
CXX = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ["g++", "clang++", "c++"]))[:1]
NVCC = shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc") or shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(not CXX, reason="there is no C++ compiler on this machine")
needs_nvcc = pytest.mark.skipif(not (NVCC and CXX), reason="there is no nvcc with a C++ compiler on this machine")

SOURCE = r"""
#include "solvers/pcgrad.h"

#include <cmath>
#include <thread>
#include <vector>

#include <pthread.h>

// As a warp would, with a barrier.
struct ThreadsGroup {
  int lane, lanes;
  pthread_barrier_t* barrier;

  void sync() const { pthread_barrier_wait(barrier); }
};

// Rows i = 0..tasks-1, each by a group of `lanes` threads.
extern "C" void solve(const double* gram, const int64_t* order, int64_t tasks, int self_projection, double eps,
                      double min_squared_norm, double* coefficients, int lanes) {
  const fpg::Projection projection{self_projection != 0, eps, min_squared_norm};
  for (int64_t i = 0; i < tasks; ++i) {
    std::vector<double> dots(static_cast<size_t>(tasks), std::nan(""));
    double* row = coefficients + i * tasks;
    if (lanes == 1) {
      fpg::project_row(fpg::OneThread(), gram, order + i * tasks, tasks, i, projection, row, dots.data());
      continue;
    }
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, nullptr, static_cast<unsigned>(lanes));
    std::vector<std::thread> group;
    for (int lane = 0; lane < lanes; ++lane) {
      group.emplace_back([&, lane] {
        const ThreadsGroup own = {lane, lanes, &barrier};
        fpg::project_row(own, gram, order + i * tasks, tasks, i, projection, row, dots.data());
      });
    }
    for (std::thread& thread : group) thread.join();
    pthread_barrier_destroy(&barrier);
  }
}

extern "C" double weight(const double* coefficients, int64_t tasks, int64_t k, double scale) {
  return fpg::merged_weight(coefficients, tasks, k, scale);
}
extern "C" int conflicts(double dot) { return fpg::conflicts(dot); }
extern "C" int usable(double squared_norm, double floor) { return fpg::usable(squared_norm, floor); }
"""

KERNEL = r"""
#include "solvers/pcgrad.h"

struct WarpGroup {
  static constexpr int lanes = 32;
  int lane;

  __device__ void sync() const { __syncwarp(); }
};

__global__ void solve(const double* gram, const int64_t* order, int64_t tasks, fpg::Projection projection, double scale,
                      double* coefficients, double* weights) {
  extern __shared__ double dots[];
  const int64_t i = blockIdx.x;
  const WarpGroup group = {static_cast<int>(threadIdx.x)};
  fpg::project_row(group, gram, order + i * tasks, tasks, i, projection, coefficients + i * tasks, dots);
  if (i == 0) weights[threadIdx.x] = fpg::merged_weight(coefficients, tasks, threadIdx.x, scale);
}
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    library = tmp_path_factory.mktemp("core") / "core.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", f"-I{CSRC}"]
    command = [*CXX, *flags, "-xc++", "-", "-o", str(library)]
    compiled = subprocess.run(command, input=SOURCE, text=True, capture_output=True)
    assert compiled.returncode == 0, compiled.stderr
    loaded = ctypes.CDLL(str(library))
    pointer, i64, f64, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    loaded.solve.argtypes = [pointer, pointer, i64, flag, f64, f64, pointer, flag]
    loaded.weight.argtypes, loaded.weight.restype = [pointer, i64, i64, f64], f64
    loaded.conflicts.argtypes, loaded.usable.argtypes = [f64], [f64, f64]
    return loaded


def solve(core, gram, order, guards=(False, 0.0, 0.0), lanes=1):
    coefficients = torch.full_like(gram, torch.nan)
    core.solve(gram.data_ptr(), order.data_ptr(), len(gram), *guards, coefficients.data_ptr(), lanes)
    return coefficients


def problem(tasks):
    rows = torch.randn(tasks, 5, dtype=torch.float64)
    return rows @ rows.mT, torch.stack([torch.randperm(tasks) for _ in range(tasks)])


GUARDS = [(False, 0.0, 0.0), (True, 0.0, 0.0), (True, 1e-8, 0.0), (False, 0.0, 4.0)]


@needs_compiler
@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 17])
def test_one_thread_gives_the_oracles_coefficients(core, tasks, guards):
    gram, order = problem(tasks)
    expected = reference.coefficients(gram, order, *guards)
    torch.testing.assert_close(solve(core, gram, order, guards), expected, rtol=1e-10, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("lanes", [2, 4, 7])
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_a_group_of_threads_gives_the_bits_of_one(core, tasks, lanes):
    gram, order = problem(tasks)
    for guards in GUARDS:
        assert torch.equal(solve(core, gram, order, guards, lanes), solve(core, gram, order, guards))


@needs_compiler
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("index", [-1, 3, 2**62, -(2**63)])
def test_an_index_out_of_range_ends_its_row_with_nan(core, index, lanes):
    gram, order = problem(3)
    expected = solve(core, gram, order)
    order[1, 1] = index
    found = solve(core, gram, order, lanes=lanes)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], expected[[0, 2]])


@needs_compiler
def test_only_negative_finite_dot_products_conflict(core):
    negative = [-1.0, -5e-324, -1.7976931348623157e308]
    others = [0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan]
    assert all(core.conflicts(dot) for dot in negative) and not any(core.conflicts(dot) for dot in others)


@needs_compiler
def test_only_finite_squared_norms_above_the_floor_are_usable(core):
    assert all(core.usable(x, 0.0) for x in (5e-324, 1.0, 1.7976931348623157e308))
    assert not any(core.usable(x, 0.0) for x in (0.0, -0.0, -1.0, torch.inf, torch.nan))
    assert not core.usable(1e-8, 1e-8) and core.usable(1.1e-8, 1e-8)


@needs_compiler
def test_merged_weights_are_the_scaled_column_sums(core):
    matrix = torch.randn(5, 5, dtype=torch.float64)
    found = [core.weight(matrix.data_ptr(), 5, k, 0.2) for k in range(5)]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), 0.2 * matrix.sum(dim=0), rtol=1e-14, atol=1e-14
    )


@needs_nvcc
def test_the_header_compiles_for_a_gpu(tmp_path):
    (tmp_path / "solve.cu").write_text(KERNEL)
    command = [
        NVCC,
        "-std=c++17",
        "-arch=sm_80",
        "-Werror=all-warnings",
        f"-I{CSRC}",
        "-c",
        "solve.cu",
        "-o",
        "solve.o",
    ]
    compiled = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert compiled.returncode == 0, compiled.stderr
    assert (tmp_path / "solve.o").stat().st_size > 0
