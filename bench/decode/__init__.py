"""Decode benchmarks: whole models (`python -m bench.decode`) and expert layers alone (`python -m bench.decode.layers`)."""
