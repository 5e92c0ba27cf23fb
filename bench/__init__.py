"""Benchmarks: `python -m bench.NAME` from the repository root; each leaves an artefact in bench/results/."""
