"""What ``python -m fastpcgrad`` does: config, doctor, demo, bench."""
