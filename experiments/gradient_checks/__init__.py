"""Comparisons, walkthrough and figure of `compare_gradients`."""
