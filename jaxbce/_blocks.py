"""Sums over the examples of a batch, computed in blocks.

The gradient of a sum over examples is the sum of the examples' gradients. Processing
a batch in blocks makes temporary memory independent of the batch size and keeps the
activations of a block in cache. The result differs only by rounding.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbce import _validate
from jaxbce._layouts import is_sharded, num_shards, stack_shards

# A batch is split if its activations take more than _SPLIT_ABOVE bytes. A block should
# then hold _BLOCK_BYTES, within the limits on its number of examples. On CPU, smaller
# batches are as fast in one pass. Larger ones are faster in blocks that fit the cache,
# since their temporaries (twice the activations) exceed the memory that the allocator
# keeps. Blocks of 256 examples or fewer lose time adding up gradients. Blocks of 1024
# gain little for a wide network and take twice the memory. The accelerator values have
# not been measured; there blocks only bound memory.
_ON_CPU = (16 << 20, 2 << 20, 512, 2048)
_ELSEWHERE = (1 << 30, 1 << 28, 4096, 1 << 20)


class PerPlatform(NamedTuple):
    """A number of examples per block that depends on the platform of the program.

    A program may be compiled for another platform than that of the process.
    """

    cpu: int
    elsewhere: int


BlockSize = int | PerPlatform


def for_platform(size: BlockSize, platform: str) -> int:
    """The number of examples per block on one platform."""
    if isinstance(size, PerPlatform):
        return size.cpu if platform == "cpu" else size.elsewhere
    return size


def at_most(size: BlockSize, limit: int) -> BlockSize:
    """The number of examples per block, or `limit` where that is less."""
    if isinstance(size, PerPlatform):
        return PerPlatform(*(min(n, limit) for n in size))
    return min(size, limit)


def examples_per_block(
    block_size: int | Literal["auto"] | None, params: Any, n: int
) -> BlockSize:
    """The number of examples per block for a batch of n, from static shapes alone.

    A symbolic n, as in an exported program, is processed in one block.

    Raises:
      TypeError: If `block_size` is not None, "auto" or an integer.
      ValueError: If `block_size` is another string or less than 1.
    """
    _validate.block_size(block_size)
    if block_size is None or not isinstance(n, int):
        return n
    if block_size != "auto":
        return min(int(block_size), n)
    example_bytes = (
        sum(layer.w.shape[1] for layer in params) * params[0].w.dtype.itemsize
    )
    sizes = PerPlatform(
        *(_most_examples(limits, example_bytes, n) for limits in (_ON_CPU, _ELSEWHERE))
    )
    return sizes if sizes.cpu != sizes.elsewhere else sizes.cpu


def _most_examples(limits: tuple[int, ...], example_bytes: int, n: int) -> int:
    split_above, block_bytes, least, most = limits
    if n * example_bytes <= split_above:
        return n
    return min(n, max(least, min(most, block_bytes // example_bytes)))


def sum_over_blocks(
    fun: Callable[..., tuple[Any, Any]],
    weight: jax.Array,
    examples: tuple[jax.Array, ...],
    block_size: BlockSize,
) -> tuple[Any, Any]:
    """Sums `fun` over blocks of examples.

    All blocks have the same length, at most `block_size`, so that one loop body serves
    any batch size. If they do not divide the batch evenly, the last block starts early
    and the examples that it repeats get weight 0. Fewer examples are repeated than
    there are blocks.

    Examples that are sharded over explicit axes of a mesh are divided into blocks on
    each device. On a mesh with automatic axes they are one block, since their sharding
    is not known and slices of sharded examples would be gathered.

    Args:
      fun: Maps `(weight [B], *examples [B, ...])` to `(totals, per_example)`. `totals`
        is a pytree that is summed over blocks; examples of weight 0 must not change
        it. `per_example` is a pytree of arrays `[B, ...]`, which are concatenated.
      weight: Weights of the examples, `[N]`.
      examples: Arrays `[N, ...]`.
      block_size: The largest number of examples per block.

    Returns:
      The totals, and the per-example results as `[N, ...]`.
    """
    if isinstance(block_size, PerPlatform):
        cpu, elsewhere = (
            lambda w, *e, size=size: sum_over_blocks(fun, w, e, size)
            for size in block_size
        )
        return lax.platform_dependent(weight, *examples, cpu=cpu, default=elsewhere)
    n = weight.shape[0]
    shards = num_shards(examples[0])
    one_block = shards == 1 and is_sharded(weight, *examples)
    if not isinstance(n, int) or n <= shards * block_size or one_block:
        return fun(weight, *examples)
    if shards > 1:  # slices of the shards, so that none is gathered
        stacked = [stack_shards(t, like=examples[0]) for t in (weight, *examples)]
        totals, per_example = jax.vmap(
            lambda w, *e: sum_over_blocks(fun, w, e, block_size)
        )(*stacked)
        totals = jax.tree.map(lambda t: jnp.sum(t, axis=0), totals)
        return totals, jax.tree.map(lambda t: t.reshape(n, *t.shape[2:]), per_example)
    count = -(-n // block_size)
    size = -(-n // count)

    def block(i: jax.Array | int) -> tuple[Any, Any]:
        start = jnp.minimum(i * size, n - size)
        w, *e = (lax.dynamic_slice_in_dim(t, start, size) for t in (weight, *examples))
        if count * size != n:
            w = jnp.where(start + jnp.arange(size) >= i * size, w, 0)
        return fun(w, *e)

    def step(totals: Any, i: jax.Array) -> tuple[Any, Any]:
        block_totals, per_example = block(i)
        return jax.tree.map(jnp.add, totals, block_totals), per_example

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(block, 0)[0])
    totals, per_example = lax.scan(step, zeros, jnp.arange(count))
    return totals, jax.tree.map(lambda t: _unblock(t, n), per_example)


def map_over_blocks(
    fun: Callable[..., Any], examples: tuple[jax.Array, ...], block_size: BlockSize
) -> Any:
    """Computes `fun(*examples)` in blocks, as `sum_over_blocks` divides them.

    Args:
      fun: Maps arrays `[B, ...]` to a pytree of arrays `[B, ...]`.
      examples: Arrays `[N, ...]`.
      block_size: The largest number of examples per block.

    Returns:
      The results of all examples, as `[N, ...]`.
    """

    def block(_: jax.Array, *examples: jax.Array) -> tuple[tuple[()], Any]:
        return (), fun(*examples)

    weight = jnp.ones(examples[0].shape[0], examples[0].dtype)
    return sum_over_blocks(block, weight, examples, block_size)[1]


def _unblock(t: jax.Array, n: int) -> jax.Array:
    """Joins blocks `[count, size, ...]` to `[n, ...]`, without repeated examples."""
    count, size = t.shape[:2]
    head = t[:-1].reshape((count - 1) * size, *t.shape[2:])
    return jnp.concatenate([head, t[-1, count * size - n :]])
