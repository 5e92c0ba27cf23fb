"""Backends of ExpertBank: native (C++), numba, reference (NumPy float64)."""
