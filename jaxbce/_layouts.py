"""Layouts of a layer's arrays in memory, each with the three products of a layer.

The derivation in `gradients.py` is written once, over a layout. With examples as rows,
as users pass them, activations are `[N, n_k]` and weights `[n_{k-1}, n_k]`. With
examples as columns, both are transposed.

Training loops carry their parameters in columns. There `jax.vmap` over networks that
share their examples needs no transposes: the first layers of all G networks are one
matrix product, `[G n_1, n_0] [n_0, N]`, and so are their gradients. The later layers
are batched products over the networks. A single network is no slower in this layout.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding, reshard

from jaxbce import _validate

_LARGE_PRODUCT = 1 << 20  # multiplications above which `Rows` splits a product
_WIDTH_MULTIPLE = 8  # `Columns` pads features to a multiple, for vector units


def matmul(left: jax.Array, right: jax.Array, dtype: Any = None) -> jax.Array:
    """`left @ right`, accumulated in the accumulation dtype and returned in `dtype`.

    None is the accumulation dtype. An array that is returned in bfloat16 takes half the
    memory.
    """
    return jnp.matmul(
        left,
        right,
        preferred_element_type=dtype or _validate.accumulation_dtype(left.dtype),
        out_sharding=_sharding_of_product(left, right),
    )


def _sharding_of_product(left: jax.Array, right: jax.Array) -> NamedSharding | None:
    """The sharding of `left @ right` if it sums over an explicit axis of a mesh.

    JAX leaves the choice open. The sum over sharded examples is wanted on all devices.
    """
    if left.ndim != 2 or right.ndim != 2:
        return None
    (rows, left_inner), (right_inner, columns) = (
        jax.typeof(t).sharding.spec for t in (left, right)
    )
    if left_inner is None or right_inner is None:
        return None
    return NamedSharding(jax.typeof(left).sharding.mesh, P(rows, columns))


def is_sharded(*arrays: jax.Array) -> bool:
    """Whether examples, along the first axis, are or may be on several devices.

    The type of an array does not contain its sharding over automatic axes.
    """
    meshes = [jax.typeof(t).sharding.mesh for t in arrays]
    return any(num_shards(t) > 1 for t in arrays) or any(
        mesh.shape[axis] > 1 for mesh in meshes for axis in mesh.auto_axes
    )


def num_shards(t: jax.Array) -> int:
    """The number of shards of examples over explicit axes of a mesh."""
    mesh, axes = jax.typeof(t).sharding.mesh, jax.typeof(t).sharding.spec[0]
    axes = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
    return math.prod(mesh.shape[axis] for axis in axes)


def shard(t: jax.Array, *, like: jax.Array) -> jax.Array:
    """`t`, with its examples sharded over the explicit axes of those of `like`."""
    mesh, axes = jax.typeof(like).sharding.mesh, jax.typeof(like).sharding.spec[0]
    return t if axes is None else reshard(t, NamedSharding(mesh, P(axes)))


def stack_shards(t: jax.Array, *, like: jax.Array) -> jax.Array:
    """Examples `[N, ...]` as `[shards, N / shards, ...]`, sharded like `like`."""
    shards = num_shards(like)
    return shard(t, like=like).reshape(shards, t.shape[0] // shards, *t.shape[1:])


def take(t: jax.Array, indices: jax.Array) -> jax.Array:
    """`t[indices]`, sharded like t if the number of shards divides their number."""
    mesh, (axes, *rest) = jax.typeof(t).sharding.mesh, jax.typeof(t).sharding.spec
    if axes is None:
        return t[indices]
    batch = t.at[indices].get(out_sharding=NamedSharding(mesh, P(None, *rest)))
    return batch if indices.shape[0] % num_shards(t) else shard(batch, like=t)


def replicate(t: jax.Array) -> jax.Array:
    """Gathers examples that are sharded over explicit axes of a mesh, if they are."""
    mesh, (axes, *rest) = jax.typeof(t).sharding.mesh, jax.typeof(t).sharding.spec
    return t if axes is None else reshard(t, NamedSharding(mesh, P(None, *rest)))


def drop_nonfinite(
    ignored: jax.Array, t: jax.Array, feature_axis: int = 1
) -> jax.Array:
    """`t`, with 0 for what is not finite in the `ignored` examples `[N]`.

    Otherwise an example of weight 0 would add 0 · inf = NaN to a sum. Finite entries
    are kept, so derivatives with respect to a weight are right where it is 0.
    """
    finite = jnp.where(jnp.greater(jnp.inf, jnp.abs(t)), t, jnp.zeros((), t.dtype))
    return jnp.where(jnp.expand_dims(ignored, feature_axis), finite, t)


class Rows(NamedTuple):
    """Examples as rows: activations `[N, n_k]`, weights `[n_{k-1}, n_k]`."""

    feature_axis = 1

    def convert(self, tree: Any) -> Any:
        """Converts parameters between rows and this layout, in either direction."""
        return tree

    def pad(self, x: jax.Array) -> jax.Array:
        """Adds what the layout needs to features `[N, n_0]`, which is nothing here."""
        return x

    def arrange(self, t: jax.Array) -> jax.Array:
        """Converts an array with examples as rows to this layout."""
        return t

    def total(self, t: jax.Array) -> jax.Array:
        """The sum of `t [N, 1]` over examples."""
        return jnp.sum(t)

    def affine(
        self, k: int, h: jax.Array, w: jax.Array, b: jax.Array, dtype: Any = None
    ) -> jax.Array:
        """`a_k = h_{k-1} W_k + b_k`, `[N, n_k]`, of a product in `dtype`."""
        del k
        b = b.astype(_validate.accumulation_dtype(b.dtype))
        return matmul(h, w, dtype).astype(b.dtype) + b[None, :]

    def back(self, delta: jax.Array, w: jax.Array) -> jax.Array:
        """`δ_k W_kᵀ`, `[N, n_{k-1}]`, in the dtype of the parameters."""
        return matmul(delta.astype(w.dtype), w.T, w.dtype)

    def gradient(
        self, k: int, h: jax.Array, delta: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`h_{k-1}ᵀ δ_k`, like W_k, and `Σ_i δ_{k,i}`.

        On CPU `h.T @ δ` can be twice as slow as `δ.T @ h`, and XLA rewrites
        `(δ.T @ h).T` into it. This is avoided where a layer narrows, so that the result
        is cheap to transpose, and the product is large: there the examples are split
        into a few chunks of equal size, and the products of the chunks are added. Equal
        chunks need no copy.
        """
        del k
        b = jnp.sum(delta, axis=0)
        d = delta.astype(h.dtype)
        if d.dtype != delta.dtype and d.shape[1] == 1:
            # XLA may store the products; in bfloat16 they take half the memory.
            return jnp.sum(h * d, axis=0, dtype=delta.dtype)[:, None], b
        n, n_out, n_in = h.shape[0], d.shape[1], h.shape[1]
        chunks = next((chunks for chunks in (2, 3, 5, 7) if n % chunks == 0), 1)
        narrows = 1 < n_out < n_in and not is_sharded(h)
        is_static = isinstance(n, int)  # not symbolic, as in an exported program
        if narrows and chunks > 1 and is_static and n * n_out * n_in >= _LARGE_PRODUCT:
            d, h = d.reshape(chunks, -1, n_out), h.reshape(chunks, -1, n_in)
            return jnp.sum(matmul(d.swapaxes(1, 2), h), axis=0).T, b
        return matmul(d.T, h).T, b


class Columns(NamedTuple):
    """Examples as columns: activations `[n_k, N]`, weights `[n_k, n_{k-1}]`.

    Features may have one more row of ones, so that the gradient of the first layer's
    biases is a column of the same product as that of its weights, and are then padded
    with zeros. In bfloat16 that product rounds δ, which `Rows` sums in float32 for the
    biases.

    Attributes:
      features: The number of features, n_0.
      has_ones: Whether there is a row of ones.
    """

    features: int
    has_ones: bool = True

    feature_axis = 0

    def convert(self, tree: Any) -> Any:
        """Converts parameters between rows and this layout, in either direction."""
        return jax.tree.map(jnp.transpose, tree)

    def pad(self, x: jax.Array) -> jax.Array:
        """Features `[N, n_0]`, then a column of ones for the bias, then zeros.

        Examples stay rows, so that those of a batch can be gathered quickly.
        """
        return _with_ones(x) if self.has_ones else x

    def arrange(self, t: jax.Array) -> jax.Array:
        """Converts an array with examples as rows to this layout."""
        return t.T

    def total(self, t: jax.Array) -> jax.Array:
        """The sum of `t [1, N]` over examples."""
        return jnp.sum(t)

    def affine(
        self, k: int, h: jax.Array, w: jax.Array, b: jax.Array, dtype: Any = None
    ) -> jax.Array:
        """`a_k = W_k h_{k-1} + b_k`, `[n_k, N]`, of a product in `dtype`."""
        del k
        h = h.T[:, : w.shape[1]].T  # drops padding, so that XLA slices rows
        b = b.astype(_validate.accumulation_dtype(b.dtype))
        return matmul(w, h, dtype).astype(b.dtype) + b[:, None]

    def back(self, delta: jax.Array, w: jax.Array) -> jax.Array:
        """`W_kᵀ δ_k`, `[n_{k-1}, N]`, in the dtype of the parameters."""
        delta = delta.astype(w.dtype)
        if w.shape[0] == 1:  # cheaper than a product with an inner size of 1
            return w.T * delta
        return matmul(w.T, delta, w.dtype)

    def gradient(
        self, k: int, h: jax.Array, delta: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`δ_k h_{k-1}ᵀ`, like W_k, and `Σ_i δ_{k,i}`."""
        w = matmul(delta.astype(h.dtype), h.T)
        if k == 1 and self.has_ones:
            return w[:, : self.features], w[:, self.features]
        return w, jnp.sum(delta, axis=1)


class Lanes(NamedTuple):
    """Many networks, one per vector lane: activations `[n_k, N, G]` of G networks.

    Weights are `[n_k, n_{k-1}, G]` and biases `[n_k, G]`. The networks share features,
    which are `[N, n_0]` as in `Columns.pad`, so the first layers of all networks are
    one matrix product. The later layers are elementwise products and sums. Kernels that
    train many networks on chip use this layout; G is a multiple of the lanes.

    Attributes:
      features: The number of features, n_0.
    """

    features: int

    feature_axis = 0

    def convert(self, tree: Any) -> Any:
        """Converts parameters `[G, ...]` of many networks, in either direction."""
        return jax.tree.map(jnp.transpose, tree)

    def pad(self, x: jax.Array) -> jax.Array:
        """Features `[N, n_0]`, then a column of ones for the bias, then zeros."""
        return _with_ones(x)

    def arrange(self, t: jax.Array) -> jax.Array:
        """Returns features and labels unchanged: labels are given as `[n_L, N, G]`."""
        return t

    def total(self, t: jax.Array) -> jax.Array:
        """The sums of `t [1, N, G]` over examples, `[1, G]`."""
        return jnp.sum(t, axis=1)

    def affine(
        self, k: int, h: jax.Array, w: jax.Array, b: jax.Array, dtype: Any = None
    ) -> jax.Array:
        """`a_k = W_k h_{k-1} + b_k`, `[n_k, N, G]`, in float32 like its factors."""
        del dtype
        if k == 1:  # the features, which all networks share
            a = _split_lanes(matmul(h[:, : w.shape[1]], _join_lanes(w)), w.shape[0])
        else:
            a = jnp.stack([jnp.sum(h * w_o[:, None], axis=0) for w_o in w])
        return a + b[:, None]

    def back(self, delta: jax.Array, w: jax.Array) -> jax.Array:
        """`W_kᵀ δ_k`, `[n_{k-1}, N, G]`."""
        terms = [d[None] * w_o[:, None] for d, w_o in zip(delta, w, strict=True)]
        return functools.reduce(jnp.add, terms)

    def gradient(
        self, k: int, h: jax.Array, delta: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`δ_k h_{k-1}ᵀ`, like W_k, and `Σ_i δ_{k,i}`."""
        if k == 1:  # with the column of ones
            w = _split_lanes(matmul(h.T, _join_lanes(delta)), delta.shape[0])
            return w[:, : self.features], w[:, self.features]
        w = jnp.stack([jnp.sum(h * d[None], axis=1) for d in delta])
        return w, jnp.sum(delta, axis=1)


def _join_lanes(t: jax.Array) -> jax.Array:
    """`[n, N, G]` as a matrix `[N, n G]`."""
    return jnp.concatenate(list(t), axis=1)


def _split_lanes(t: jax.Array, n: int) -> jax.Array:
    """The inverse of `_join_lanes`."""
    return jnp.stack(jnp.split(t, n, axis=1))


def _with_ones(x: jax.Array) -> jax.Array:
    n, n_in = x.shape
    extra = -(-(n_in + 1) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE - n_in
    added = jnp.broadcast_to(jnp.eye(1, extra, dtype=x.dtype), (n, extra))
    return jnp.concatenate([x, shard(added, like=x)], 1)


Layout = Rows | Columns | Lanes
ROWS = Rows()


def for_training(batch_size: int, features: int, platform: str) -> Layout:
    """The layout in which a training loop carries its parameters, from static facts.

    On CPU, `Columns` was at least as fast for every shape measured, except for batches
    of one example. On a GPU the gradient of the biases, a column of a product, would be
    read from memory with the whole product; a sum of its own is fused with the rest.
    """
    if batch_size == 1:  # False if symbolic
        return ROWS
    return Columns(features, has_ones=platform != "gpu")
