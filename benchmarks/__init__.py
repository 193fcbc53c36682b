"""Benchmarks: each ``python -m benchmarks.NAME`` writes ``build/bench/NAME.json``."""
