"""The order in which training visits examples."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbce._loops import repeat, varying

# Orders of examples that are drawn at a time: of this many epochs, or of as many as
# have this many examples.
_ORDERS, _MIN_INDICES = 8, 1 << 14


class Batches(NamedTuple):
    """The batches of a run: in each epoch all examples, in an order of its own.

    Attributes:
      key: The random key of the orders.
      n: Number of examples.
      size: Number of examples per batch.
    """

    key: jax.Array
    n: int
    size: int

    def fold(
        self,
        body: Callable[[jax.Array, jax.Array, jax.Array, Any], Any],
        begin: jax.Array,
        steps: int | jax.Array,
        most: int,
        carry: Any,
    ) -> Any:
        """Folds `body(t, indices, weight, carry)` over some steps from step `begin`.

        `indices [size]` are the examples of a batch, and `weight [size]` their weights
        in its mean. The orders of the epochs are drawn before the steps that use them,
        those of a few epochs at a time: a loop that carried the order would copy it at
        every step.

        Args:
          body: The step.
          begin: Number of the first step.
          steps: How many steps to take.
          most: The largest value of `steps`.
          carry: The initial carry.
        """

        def chunk(first: Any, count: Any, draw: Any, _: int, carry: Any) -> Any:
            batches = draw()

            def step(i: jax.Array, carry: Any) -> Any:
                indices, weight = jax.tree.map(
                    lambda t: lax.dynamic_index_in_dim(t, i, keepdims=False), batches
                )
                if weight is None:  # a constant is faster than rows of constants
                    weight = jnp.full(self.size, 1 / self.size)
                return body(first + i, indices, weight, carry)

            return repeat(count, step, carry)

        return self.fold_chunks(chunk, begin, steps, most, self._chunk_steps(), carry)

    def fold_chunks(
        self,
        body: Callable[..., Any],
        begin: jax.Array,
        steps: int | jax.Array,
        most: int,
        most_per_chunk: int,
        carry: Any,
    ) -> Any:
        """Folds `body(first, count, draw, chunk, carry)` over chunks of steps.

        A chunk has `count` steps, at most `chunk`, which is static, and `draw()` is the
        result of `_draw` for them.
        """
        chunks = -(-most // max(1, most_per_chunk))
        chunk = -(-most // chunks)
        is_static = isinstance(steps, int) and steps % chunk == 0

        def take_chunk(j: jax.Array | int, carry: Any) -> Any:
            first = begin + j * chunk
            count = chunk if is_static else jnp.minimum(chunk, steps - j * chunk)
            draw = functools.partial(self._draw, first, count, chunk)
            return body(first, count, draw, chunk, carry)

        if chunks == 1:
            return take_chunk(0, carry)
        return repeat(chunks, take_chunk, carry)

    def _chunk_steps(self) -> int:
        """The number of steps whose orders are drawn at a time."""
        return max(_ORDERS * self.n, _MIN_INDICES) // self.size

    def _draw(
        self, first: jax.Array, count: Any, most: int
    ) -> tuple[jax.Array, jax.Array | None]:
        """The examples of `count` steps and their weights, both `[most, size]`.

        A short last batch is padded at its start with examples of the previous batch,
        which get weight 0. The weights are None if no batch is short.
        """
        n, size = self.n, self.size
        per_epoch = -(-n // size)
        epochs = -(-(most - 1) // per_epoch) + 1  # that `most` steps can touch
        epoch, last = first // per_epoch, (first + count - 1) // per_epoch

        def draw(i: jax.Array, orders: jax.Array) -> jax.Array:
            order = jax.random.permutation(jax.random.fold_in(self.key, epoch + i), n)
            return lax.dynamic_update_index_in_dim(orders, order, i, 0)

        def some(batches: jax.Array) -> jax.Array:  # of the epochs
            return lax.dynamic_slice_in_dim(batches, first % per_epoch, most)

        empty = varying(jnp.zeros((epochs, n), int))
        orders = repeat(last - epoch + 1, draw, empty)
        full = n // size * size
        batches = orders[:, :full].reshape(epochs, -1, size)
        weight = None
        if full < n:
            batches = jnp.concatenate([batches, orders[:, None, n - size :]], axis=1)
            weights = np.full((per_epoch, size), 1 / size)
            weights[-1] = np.where(np.arange(size) < full + size - n, 0, 1 / (n - full))
            weight = some(jnp.tile(jnp.asarray(weights, float), (epochs, 1)))
        return some(batches.reshape(-1, size)), weight
