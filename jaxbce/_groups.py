"""The members of a sweep in groups, and where they are trained.

A group is what a device trains at a time. Its size suits the caches of a CPU, or the
memory on the chip of a TPU, and the memory of the device.
"""

import contextlib
import functools
import math
import os
import warnings
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbce._blocks import examples_per_block, for_platform
from jaxbce.network import Layer, Params

# The bytes of a group that suit the caches of a CPU. Smaller groups spend most of a
# step on starting operations; the arrays of larger ones no longer fit the caches.
_CACHE_BYTES = 3 << 19
_MAX_MEMBERS = {"cpu": 128}  # per group
MAX_MEMBERS_ELSEWHERE = 1 << 16
# A step of a group on a TPU should stay in this part of the memory on the chip, VMEM:
# above it, XLA moves arrays to and from the device's memory at every step.
_VMEM_FRACTION = 0.8
_VMEM_MIB = {
    "TPU v5 lite": 128,
    "TPU v5e": 128,
    "TPU v5": 64,
    "TPU v5p": 64,
    "TPU v6 lite": 128,
    "TPU v6e": 128,
    "TPU7x": 64,
}
_LEAST_VMEM_MIB = 16  # of all other TPUs
_LANES = 128  # fewer members would leave vector lanes of a TPU empty
_MEMORY_FRACTION = 0.5  # of a device's memory that a group may use


class Group(NamedTuple):
    """The members that a device trains at a time: some points, each with some seeds.

    Attributes:
      points: Indices of the points; the last one is repeated if a group is not full.
      seeds: Indices of the seeds, likewise.
    """

    points: np.ndarray
    seeds: np.ndarray


def max_members_per_device(
    sizes: tuple[int, ...],
    dtype: Any,
    n: int,
    batch_size: int | None,
    devices: np.ndarray,
    is_fused: bool = False,
) -> int:
    """The number of members that each device should train at a time, from shapes.

    Args:
      sizes: Layer sizes `(n_0, ..., n_L)`.
      dtype: Dtype of the parameters.
      n: Number of training examples.
      batch_size: Number of examples per batch; None is n.
      devices: The devices, of all processes.
      is_fused: Whether one kernel takes the steps.
    """
    params = parameter_shapes(sizes, dtype)
    leaves = jax.tree.leaves(params)
    param_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    example_bytes = sum(sizes[1:]) * leaves[0].dtype.itemsize
    platform = devices[0].platform
    # Bounds the memory of an evaluation. On a TPU its activations are stored at most
    # once, as programs compiled for v5e show: 100,000 networks 30→16→1 with 569
    # examples take 19 kB each, of the 63 kB here.
    block = for_platform(examples_per_block("auto", params, n), platform)
    copies = 1 if platform == "tpu" and is_fused else 4
    member_bytes = 12 * param_bytes + copies * block * example_bytes
    fit_memory = _MEMORY_FRACTION * _device_memory(devices) / member_bytes
    members = _MAX_MEMBERS.get(platform, MAX_MEMBERS_ELSEWHERE)
    batch = min(batch_size or n, block)
    if platform == "cpu":
        step_bytes = batch * example_bytes + 4 * param_bytes
        members = min(members, 2 ** round(math.log2(max(1, _CACHE_BYTES / step_bytes))))
    elif platform == "tpu" and not is_fused:  # a kernel has blocks of its own
        # Of activations, error signals and one more; of parameters, their gradient,
        # their new values and two more in the state of the optimizer.
        step_bytes = 3 * batch * example_bytes + 5 * param_bytes
        vmem = _VMEM_MIB.get(devices[0].device_kind, _LEAST_VMEM_MIB) << 20
        fit_vmem = max(_LANES, _VMEM_FRACTION * vmem / step_bytes)
        members = min(members, 2 ** int(math.log2(fit_vmem)))
    return max(1, int(min(members, fit_memory)))


def parameter_shapes(sizes: tuple[int, ...], dtype: Any) -> Params:
    """The parameters of layer sizes `(n_0, ..., n_L)`, as shapes."""
    shape: Any = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    return tuple(Layer(shape((a, b)), shape((b,))) for a, b in pairwise(sizes))


def _device_memory(devices: np.ndarray) -> float:
    """Bytes of memory per device, or the machine's memory divided by local devices."""
    local = [d for d in devices if d.process_index == jax.process_index()]
    try:
        stats = (local[0].memory_stats() or {}) if local else {}
    except jax.errors.JaxRuntimeError:  # a device that is only compiled for
        return math.inf
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total / max(1, len(local))


def divide(points: int, seeds: int, size: int) -> list[Group]:
    """Divides all members into groups of one shape, of at most `size` members."""

    def split(count: int, most: int) -> list[np.ndarray]:
        chunks = -(-count // most)
        length = -(-count // chunks)  # the most equal lengths
        starts = range(0, count, length)
        return [np.minimum(np.arange(i, i + length), count - 1) for i in starts]

    by_point = split(points, min(points, size))
    by_seed = split(seeds, max(1, size // len(by_point[0])))
    return [Group(p, s) for s in by_seed for p in by_point]


def halve(queue: list[Group], error: Exception) -> list[Group]:
    """The same members in groups of half the size, if `error` is a lack of memory."""
    points, seeds = (len(indices) for indices in queue[0])
    is_distributed = jax.process_count() > 1  # the other processes may not have failed
    is_memory = "RESOURCE_EXHAUSTED" in str(error)
    if not is_memory or points * seeds == 1 or is_distributed:
        raise error
    warnings.warn(
        f"a group of {points * seeds} members does not fit in memory; continuing with "
        "groups of half the size",
        RuntimeWarning,
        stacklevel=4,
    )
    axis, size = ("seeds", seeds) if seeds > 1 else ("points", points)
    halves = slice(-(-size // 2)), slice(size // 2, None)
    return [
        group._replace(**{axis: getattr(group, axis)[half]})
        for group in queue
        for half in halves
    ]


def count_members(groups: list[Group]) -> int:
    """The number of members, of which indices that fill a group are copies."""
    return sum(len({*g.points}) * len({*g.seeds}) for g in groups)


def only_mesh(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager[Any]:
    """Replaces the mesh that the caller has set, if any, by that of the sweep."""
    is_set = not jax.sharding.get_abstract_mesh().empty
    return jax.set_mesh(mesh) if is_set else contextlib.nullcontext()


def to_devices(mesh: jax.sharding.Mesh, spec: Any, tree: Any) -> Any:
    """Shards arrays, which every process holds whole, over all devices."""
    sharding = jax.sharding.NamedSharding(mesh, spec)
    if jax.process_count() == 1:  # avoids a copy through the host
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda i: leaf[i])

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """Gathers sharded arrays as NumPy arrays, whole in every process of the mesh."""
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        from jax.experimental import multihost_utils  # slow to import

        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)
