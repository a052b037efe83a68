"""Registers of the threads of a block of the kernel for GPUs, loaded from memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxbce._threads import Number


class Registers(NamedTuple):
    """Arrays `[networks, lanes]` with one number per thread of a block.

    Attributes:
      networks: Number of networks per block.
      lanes: Number of threads per network.
      block: Index of the block.
      is_compiled: Whether for a GPU; otherwise arrays have no layouts.
    """

    networks: int
    lanes: int
    block: Any
    is_compiled: bool

    def load(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """A register `ref[index]`."""
        if not self.is_compiled:
            return ref[index or ...]
        return plgpu.load(ref, index, layout=self._layout, optimized=False)

    def later(self, ref: Any) -> Callable[[int], Number]:
        """Returns `i -> ref[i]`, registers that are loaded when they are needed."""
        return lambda i: Number(ref.dtype, lambda: self.load(ref, (i,)))

    def fill(self, t: Any) -> jax.Array:
        """A register, of one or of a scalar that the threads share."""
        t = jnp.broadcast_to(t, (self.networks, self.lanes))
        return plgpu.layout_cast(t, self._layout) if self.is_compiled else t

    def by_network(self, ref: Any, i: jax.Array | int) -> jax.Array:
        """The i-th of some numbers of each network, for all of its lanes."""
        index, shape = (i, self.block), (self.networks, self.lanes)
        if not self.is_compiled:
            return lax.broadcast_in_dim(ref[index], shape, (0,))
        layout = self._layout.reduce(1)
        t = plgpu.load(ref, index, layout=layout, optimized=False)
        return self.fill(lax.broadcast_in_dim(t, shape, (0,)))

    def scalar(self, ref: Any, i: jax.Array | int, dtype: Any) -> jax.Array:
        """The i-th of some scalars, shared or of each network."""
        t = ref[i] if ref.ndim == 1 else self.by_network(ref, i)
        return t != 0 if jnp.issubdtype(dtype, jnp.bool_) else t

    def sum_lanes(self, t: jax.Array) -> jax.Array:
        """The sum over the lanes of each network, for all of them."""
        return self.fill(lax.broadcast_in_dim(jnp.sum(t, axis=1), t.shape, (0,)))

    @property
    def _layout(self) -> Any:
        shape = self.networks, self.lanes
        tiles, warps, lanes = {
            32: ((shape, (1,)), (-3,), (-2,)),
            64: ((shape, (32,), (1,)), (-4, -3), (-2,)),
            128: ((shape, (32,), (1,)), (-3,), (-2,)),
        }.get(shape[1], ((shape, (shape[0] // 4, shape[1]), (1,)), (-5,), (-3, -2)))
        return plgpu.Layout.TILED(plgpu.Tiling(tiles), warps, lanes, -1)
