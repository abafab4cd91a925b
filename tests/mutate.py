"""Plants one bug after the other in a copy of the tree, and says which of them no test notices.

Run by hand from the root, never by pytest: ``python -m tests.mutate [--list] [WORD ...]`` takes the bugs of
``mutants.txt`` whose name or file contains a word, or all of them, which takes an hour or two on two cores.
A bug is noticed if the tests that belong to it pass without it and fail with it. Ends with 1 where one was not noticed,
with 2 where a bug is none any more: its text is not in its file exactly once, it does not compile, or the tests are red
without it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LONGEST = 1200
"""Seconds after which tests count as failed: a bug may make a loop endless."""


class NoMutant(Exception):
    """A bug that says nothing about the tests."""


class Mutant(NamedTuple):
    """One bug: ``old`` is in ``file`` exactly once and becomes ``new``; ``tests`` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def is_native(self) -> bool:
        """Whether the compiled CPU library has to be built anew. That for CUDA is built by its tests."""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")

    @property
    def occurrences(self) -> int:
        """How often its text is found."""
        file = ROOT / self.file
        return file.read_text(encoding="utf-8").count(self.old) if file.exists() else 0


def read(text: str) -> Iterator[Mutant]:
    """Paragraphs: a file and its tests, or a bug."""
    file = tests = ""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for _, paragraph in groupby(lines, key=lambda line: not line):
        first, *rest = paragraph
        if first.startswith("["):
            file, _, tests = first[1:].partition("] ")
        elif first:
            old, new = ("\n".join(line[2:] for line in rest if line[0] == sign) for sign in "-+")
            yield Mutant(first, file, old, new, tests)


def chosen(words: Sequence[str]) -> list[Mutant]:
    """Those whose name or file has one of the words, or all; NoMutant where one is none."""
    every = list(read(Path(__file__).with_name("mutants.txt").read_text(encoding="utf-8")))
    found = [m for m in every if not words or any(word in m.name or word in m.file for word in words)]
    wrong = [f"{m.name}: its text is {m.occurrences} times in {m.file}" for m in found if m.occurrences != 1]
    if wrong or not found:
        raise NoMutant("\n".join(wrong) or f"no bug has {' or '.join(words)} in its name or file")
    return found


class Copy:
    """A copy of the tree as it is, with its compiled CPU library."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        built = [str(path.relative_to(ROOT)) for path in ROOT.glob("fastpcgrad/*fastpcgrad_*")]
        for name in filter(None, [*names, *built]):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._library = folder / "fastpcgrad" / "libfastpcgrad_cpu.so"
        self._clean = b""
        self._green: dict[tuple[str, bool], bool] = {}

    def _run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        # What Python compiled is told by time and size, which two versions of a file may have in common.
        env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | variables
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=LONGEST)

    def _build(self) -> None:
        """The CPU library, quickly."""
        command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force")
        done = self._run(*command, FASTPCGRAD_BUILD="cpu", CXXFLAGS="-O1")
        if done.returncode:
            raise NoMutant(f"does not compile:\n{done.stderr[-2000:]}")

    def failed(self, tests: str) -> str:
        """The first test that failed, empty where all passed."""
        command = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests))
        try:
            done = self._run(*command)
        except subprocess.TimeoutExpired:
            return f"no end after {LONGEST} s"
        if done.returncode < 0:
            return f"the process died of signal {-done.returncode}"
        if done.returncode > 1:
            raise NoMutant(f"the tests {tests} do not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return lines[0].split(" ")[1] if done.returncode else ""

    def check_green(self, mutant: Mutant) -> None:
        """NoMutant where its tests fail as it is."""
        if mutant.is_native and not self._clean:
            self._build()
            self._clean = self._library.read_bytes()
        key = mutant.tests, mutant.is_native
        if key not in self._green:
            self._green[key] = not (failed := self.failed(mutant.tests))
            if failed:
                print(f"red without a bug: {failed}")
        if not self._green[key]:
            raise NoMutant(f"{mutant.tests} fails without it")

    def first_to_fail(self, mutant: Mutant) -> str:
        """The test that noticed the bug, empty where none did."""
        file = self.folder / mutant.file
        clean = file.read_text(encoding="utf-8")
        file.write_text(clean.replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            if mutant.is_native:
                self._build()
            return self.failed(mutant.tests)
        finally:
            file.write_text(clean, encoding="utf-8")
            if mutant.is_native:
                self._library.unlink(missing_ok=True)
                self._library.write_bytes(self._clean)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--list", action="store_true", help="show the bugs, and whether their text is still there")
    options = parser.parse_args()
    try:
        mutants = chosen(options.words)
    except NoMutant as error:
        print(error)
        return 2
    if options.list:
        for m in mutants:
            print(f"{m.name:50} {m.file:45} {m.tests}")
        return 0
    counts = dict.fromkeys(("killed", "SURVIVED", "NO MUTANT"), 0)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder))
        for m in mutants:
            start = time.monotonic()
            try:
                copy.check_green(m)
                start = time.monotonic()
                by = copy.first_to_fail(m)
                result = "killed" if by else "SURVIVED"
            except NoMutant as error:
                result, by = "NO MUTANT", str(error)
            counts[result] += 1
            print(f"{result:9} {time.monotonic() - start:6.1f} s  {m.name:50} {by}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    return 2 if counts["NO MUTANT"] else 1 if counts["SURVIVED"] else 0


if __name__ == "__main__":
    sys.exit(main())
