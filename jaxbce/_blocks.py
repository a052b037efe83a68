"""Sums over the rows of a batch, taken in blocks.

The gradient of a sum over examples is the sum of the examples' gradients. Taking
the rows some at a time makes temporary memory independent of their number, keeps a
block's activations in cache, and changes nothing else.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbce import _validate

# Bytes of activations above which a batch is split, bytes a block should hold, and the
# rows it may have. On a CPU a pass over a smaller batch is as fast as blocks are;
# above, its temporaries (twice the activations) no longer stay in memory that the
# allocator keeps, and blocks that fit the caches win: with 256 rows or fewer a block
# loses time adding gradients up, with 1024 a wide network gains little and takes twice
# the memory. On an accelerator, not measured, blocks only bound memory.
_SPLIT_ABOVE = {"cpu": 16 << 20}
_BLOCK_BYTES = {"cpu": 2 << 20}
_BLOCK_ROWS = {"cpu": (512, 2048)}
_ELSEWHERE = (1 << 30, 1 << 28, (4096, 1 << 20))


def rows_per_block(block_size: int | str | None, params: Any, rows: int) -> int:
    """The number of rows in a block that `block_size` asks for, from shapes alone.

    Raises:
      TypeError: If it is neither None, "auto" nor an integer.
      ValueError: If it is another word, or below 1.
    """
    _validate.block_size(block_size)
    if block_size is None:
        return rows
    if block_size != "auto":
        return min(int(block_size), rows)
    backend = jax.default_backend()
    split_above = _SPLIT_ABOVE.get(backend, _ELSEWHERE[0])
    block_bytes = _BLOCK_BYTES.get(backend, _ELSEWHERE[1])
    fewest, most = _BLOCK_ROWS.get(backend, _ELSEWHERE[2])
    row_bytes = sum(layer.w.shape[1] for layer in params) * params[0].w.dtype.itemsize
    if rows * row_bytes <= split_above:
        return rows
    return min(rows, max(fewest, min(most, block_bytes // row_bytes)))


def sum_over_blocks(
    fun: Callable[..., tuple[Any, Any]],
    weight: jax.Array,
    rows: tuple[jax.Array, ...],
    block_size: int,
) -> tuple[Any, Any]:
    """Sums `fun` over blocks of rows.

    The blocks are equally long, at most `block_size`. When they do not divide the
    batch evenly the last one starts early, and the rows it repeats are given weight
    0: one program, any number of rows, under one extra row a block.

    Args:
      fun: Maps `(weight [B], *rows [B, ...])` to `(totals, per_row)`: a pytree to be
        summed over blocks, which a row of weight 0 must leave unchanged, and a pytree
        of arrays `[B, ...]` to be collected.
      weight: Weights of the rows, `[N]`.
      rows: Arrays `[N, ...]`.
      block_size: The most rows a block may have.

    Returns:
      The totals, and the per-row results as `[N, ...]`.
    """
    n = weight.shape[0]
    count = -(-n // block_size)
    size = -(-n // count)
    if count == 1:
        return fun(weight, *rows)

    def block(i: jax.Array | int) -> tuple[Any, Any]:
        start = jnp.minimum(i * size, n - size)
        w, *r = (lax.dynamic_slice_in_dim(t, start, size) for t in (weight, *rows))
        if count * size != n:
            w = jnp.where(start + jnp.arange(size) >= i * size, w, 0)
        return fun(w, *r)

    def step(totals: Any, i: jax.Array) -> tuple[Any, Any]:
        block_totals, per_row = block(i)
        return jax.tree.map(jnp.add, totals, block_totals), per_row

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(block, 0)[0])
    totals, per_row = lax.scan(step, zeros, jnp.arange(count))
    return totals, jax.tree.map(lambda t: _unblock(t, n), per_row)


def _unblock(t: jax.Array, n: int) -> jax.Array:
    """`[count, size, ...]` to `[n, ...]`, less the rows that the last block repeats."""
    count, size = t.shape[:2]
    head = t[:-1].reshape((count - 1) * size, *t.shape[2:])
    return jnp.concatenate([head, t[-1, count * size - n :]])
