"""Experiments on jaxbce: one question a script, `python -m experiments.NAME`."""
