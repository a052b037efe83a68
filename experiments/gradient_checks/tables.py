"""Headings of the printed tables, by the keys of the results."""

from typing import Any

Row = dict[str, Any]

HEADINGS = {
    "max_abs": "max abs",
    "max_rel": "max rel",
    "norm_rel": "norm rel",
    "worst_point": "worst at",
    "worst_network": "worst network",
    "worst_error": "its error",
    "median_error": "median error",
    "logit": "|a|",
    "textbook": "textbook, ŷ−y",
    "by_hand": "by hand, δ",
    "jax_grad_of_optax": "jax.grad, optax",
    "jax_grad_of_logaddexp": "jax.grad, log(1+eᵃ)−ya",
    "microseconds": "µs",
    "temporary_kb": "temporary kB",
    "tolerance": "allowed",
    "passed": "verdict",
}


def heading(key: str) -> str:
    """The heading of a key; most keys are their own."""
    return HEADINGS.get(key, key)


def with_headings(rows: list[Row]) -> list[Row]:
    """Rows with headings in place of keys, for printing."""
    return [{heading(key): value for key, value in row.items()} for row in rows]
