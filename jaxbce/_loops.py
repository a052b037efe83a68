"""Loops whose carry keeps its type under `shard_map`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def repeat(count: Any, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """Folds `body(i, carry)` over i < count, of dtype int32."""
    count = np.int32(count) if isinstance(count, int) else count
    return lax.fori_loop(np.int32(0), count, body, carry)


def varying(tree: Any) -> Any:
    """Marks every leaf as varying over the axes of an enclosing `shard_map`, if any.

    The carry of a loop must keep its type, but a constant initial value would not be
    typed as varying.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if not axes:
        return tree
    always = sum(lax.axis_index(axis) for axis in axes) >= 0  # True, typed as varying
    return jax.tree.map(lambda leaf: jnp.where(always, leaf, leaf), tree)
