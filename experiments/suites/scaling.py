"""Benchmark cases: how cost grows with examples, widths, networks and batches."""

import functools
from collections.abc import Iterator
from typing import Any

import jax

from experiments.suites import batches, training
from experiments.suites.case import Case

_ROWS = (64, 512, 4096, 32768)
_ACCELERATOR_ROWS = (4096, 65536, 1 << 20)
_WIDTHS = (32, 128, 512, 2048)
_MEMBERS = (1, 8, 64, 512, 4096)
_ACCELERATOR_MEMBERS = (1, 64, 4096, 100000)
_BATCHES = (1, 8, 64, 512)


def _curves(key: jax.Array) -> Iterator[Case]:
    """Curves: one thing grows, and all else stays."""
    on_cpu = jax.default_backend() == "cpu"
    along = functools.partial(batches.case, "scaling", key=key)
    for rows in _ROWS if on_cpu else _ACCELERATOR_ROWS:
        options: Any = {"along": ("rows", rows)}
        yield along("gradient", rows, (64, 128, 1), peers=("jax.grad",), **options)
        for quantity in ("clipped sum", "ntk"):
            if rows <= 4096:
                peers = ("vmap(jax.grad)",)
                yield along(quantity, rows, (64, 128, 1), peers=peers, **options)
    for width in _WIDTHS:
        options = {"along": ("width", width)}
        yield along("gradient", 1024, (64, width, 1), peers=("jax.grad",), **options)
        peers = ("vmap(jax.grad)",)
        yield along("clipped sum", 1024, (64, width, 1), peers=peers, **options)
    sweep = functools.partial(training.sweep, "scaling", key=key)
    for members in _MEMBERS if on_cpu else _ACCELERATOR_MEMBERS:
        grows = ("members", members)
        yield sweep(members, 512, 32, (30, 16, 1), "sgd", along=grows)
    for batch in _BATCHES:
        yield sweep(256, 512, batch, (30, 16, 1), "sgd", along=("batch", batch))


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All of suite "scaling", or a small part."""
    del suite
    for case in _curves(key):
        few = case.quantity == "gradient" and case.along in (
            ("rows", 64),
            ("rows", 512),
        )
        if few or not quick:
            yield case
