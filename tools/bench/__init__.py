"""Benchmarks: models x sparsity x engine, measured in turns. `python tools/bench/run.py --help`; nothing imports this."""
