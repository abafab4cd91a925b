"""Step time and peak memory over model size and number of tasks: ``python -m benchmarks.large``."""

from benchmarks.rows import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "large.jsonl"
