"""Benchmarks that report ratios within one run."""
