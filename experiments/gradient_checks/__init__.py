"""Comparisons, walkthrough, tables and figure of `compare_gradients`."""
