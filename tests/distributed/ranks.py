"""Runs scenarios on real processes: one interpreter imports torch and forks the ranks, which run them all in turn."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from datetime import timedelta
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLLECTIVE_SECONDS = 60
"""After so long without the others a collective is an error in the rank that waits."""
DEVICE = os.environ.get("FASTPCGRAD_TEST_DEVICE", "cpu")
"""``cuda``: scenarios of sharded models run on GPUs, one a rank, by NCCL."""


def run(module, ranks, folder, seconds):
    """For each scenario of a module, in order, what each rank says: nothing, or the traceback of what went wrong.

    A module has its scenarios in a dict ``SCENARIOS``: functions without arguments, by their names.
    """
    command = [sys.executable, "-m", "tests.distributed.ranks", module, str(ranks), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks with it, if they hang
            process.wait()
    said = [_read(folder / f"rank{rank}") for rank in range(ranks)]
    lost = f"did not get here within {seconds} s:\n{(folder / 'log').read_text()[-2000:]}"
    return {name: [rank.get(name, lost) for rank in said] for name in import_module(module).SCENARIOS}


def _read(path):
    return dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}


def _run_all(scenarios, rank, ranks, folder):
    import torch

    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    with open(f"{folder}/rank{rank}", "w") as said:
        for name, scenario in scenarios.items():
            try:
                scenario()
                wrong = ""
            except BaseException:
                wrong = traceback.format_exc()
            print(json.dumps([name, wrong]), file=said, flush=True)


def _main(module, ranks, folder):
    scenarios = import_module(module).SCENARIOS
    gc.freeze()  # what is here now holds no scenario's parameters, and takes long to look through
    children = []
    for rank in range(int(ranks)):
        child = os.fork()
        if not child:
            try:
                _run_all(scenarios, rank, int(ranks), folder)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)  # nothing of the interpreter that was forked
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
