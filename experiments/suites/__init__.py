"""Benchmark cases, and reports of their results."""
