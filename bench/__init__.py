"""Benchmarks against peers on the same data and machine: `python -m bench`. Not part of the installed packages."""
