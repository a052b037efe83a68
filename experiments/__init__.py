"""Experiments on jaxbce: one question per command, `python -m experiments.NAME`."""
