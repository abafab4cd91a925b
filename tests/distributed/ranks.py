"""Runs scenarios on real processes: one interpreter imports torch and forks the ranks, which run them all in turn."""

import atexit
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from functools import cache
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
    launcher = _launcher()
    print(json.dumps([module, ranks, str(folder), seconds]), file=launcher.stdin, flush=True)
    if not launcher.stdout.readline():  # it is gone
        _launcher.cache_clear()
    said = [_read(folder / f"rank{rank}") for rank in range(ranks)]
    log = folder / "log"
    lost = f"did not get here within {seconds} s:\n{log.read_text()[-2000:] if log.exists() else 'no rank was started'}"
    return {name: [rank.get(name, lost) for rank in said] for name in import_module(module).SCENARIOS}


@cache
def _launcher():
    """The interpreter that forks all ranks: to import what they need takes longer than most scenarios."""
    # What is freed goes back to the system at once, so that a rank's memory can be measured.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MALLOC_MMAP_THRESHOLD_": "262144"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.ranks"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(_end, process)
    return process


def _end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the ranks with it, if they hang
    process.communicate()


def _read(path):
    return dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}


def _run_all(scenarios, rank, ranks, folder):
    import torch

    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
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


def _launch(module, ranks, folder, seconds):
    scenarios = import_module(module).SCENARIOS
    gc.freeze()  # what is here now holds no scenario's parameters, and takes long to look through
    children = {rank: _fork(scenarios, rank, ranks, folder) for rank in range(ranks)}
    until = time.monotonic() + seconds
    while children and time.monotonic() < until:
        time.sleep(0.02)
        children = {rank: child for rank, child in children.items() if os.waitpid(child, os.WNOHANG) == (0, 0)}
    for child in children.values():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _fork(scenarios, rank, ranks, folder):
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log, stream.fileno())
        _run_all(scenarios, rank, ranks, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)  # nothing of the interpreter that was forked


if __name__ == "__main__":
    for line in sys.stdin:
        _launch(*json.loads(line))
        print("done", flush=True)
