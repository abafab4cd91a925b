"""What ``python -m fastpcgrad`` does: config, doctor, bench."""
