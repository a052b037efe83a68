"""The kernel that trains many networks, written in Pallas for NVIDIA GPUs.

A block is a warpgroup, whose threads share its networks by their hidden units. While a
loop takes the steps, parameters and gradients stay in registers, and optimizer states
in shared memory. `_gpu_block.py` is the kernel; this module arranges its arguments.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxbce._elementwise import Split
from jaxbce._gpu_block import NUM_PARAMS, Block, Leaf, Sizes
from jaxbce._gpu_registers import Registers
from jaxbce._kernel_inputs import Inputs

_THREADS = 128  # of a warpgroup
_LANES = (2, 4, 8, 16, 32, 64, 128)  # per network
MAX_EXAMPLES = 4  # per pass
_MAX_REGISTERS = 230  # for parameters, gradients and features; a thread has 255
_SHARED_BYTES = 225 << 10  # per block, of 227 KiB of H100
_ROW_MULTIPLE = 4  # numbers that a thread loads at once
_HIDDEN_AXES = (0, 0, 1, None)  # of the parameters, in the layout `Columns`


def train(split: Split, inputs: Inputs) -> Any:
    """Trains networks: `inputs` have axes `[seeds, networks]`."""
    seeds, networks = inputs.num_networks()
    data = inputs.data
    hidden = inputs.params[0].shape[-1]
    batch = inputs.indices.shape[-1]
    leaves = inputs.leaves()
    owners = [*range(NUM_PARAMS), *split.owners, None]
    for leaf, owner in zip(inputs.state, split.owners, strict=True):
        if owner is None and leaf.ndim > 2:
            raise ValueError(
                'expected an optimizer for kernel="fused" on a GPU whose state has the '
                f"structure of the parameters, got an array {leaf.shape[2:]} in it"
            )
    axes = [None if owner is None else _HIDDEN_AXES[owner] for owner in owners]
    lanes = _num_lanes(inputs, leaves, axes)
    group = _THREADS // lanes
    blocks = -(-networks // group)
    examples = min(MAX_EXAMPLES, batch)
    passes = -(-batch // examples)
    arrange = functools.partial(_arrange, lanes, group)

    def by_network(t: jax.Array) -> jax.Array:
        """`[networks, k]` as `[k, blocks, group]`."""
        return jnp.moveaxis(_spread(t, 0, group), -1, 0)

    operands = inputs.operands(
        passes * examples,
        by_network,
        lambda y: by_network(y.reshape(networks, -1)),  # [(N + 1) n_L, blocks, group]
    )
    table, indices = operands["table"], operands["indices"]
    units = np.arange(-(-hidden // lanes) * lanes)  # of the hidden layer, with padding
    is_unit = np.broadcast_to(units[-lanes:] < hidden, (group, lanes))
    operands |= {
        "table": jnp.pad(table, ((0, 0), (0, -table.shape[1] % _ROW_MULTIPLE))),
        "indices": indices.reshape(indices.shape[0], -1),
        "is_unit": jnp.asarray(is_unit, jnp.int32),
    }
    shares = [
        Leaf(_share(t.shape[:1:-1], axis, lanes), axis, owner)
        for t, axis, owner in zip(leaves, axes, owners, strict=True)
    ]
    carried = [arrange(t, axis) for t, axis in zip(leaves, axes, strict=True)]
    registers = functools.partial(Registers, group, lanes)
    block = functools.partial(
        Block,
        dtypes=inputs.dtypes(),
        update=split.update,
        params=shares[:NUM_PARAMS],
        state=shares[NUM_PARAMS:-1],
        sizes=Sizes(
            examples=examples,
            passes=passes,
            features=data.x.shape[-1],
            outputs=data.y.shape[-1],
            stride=0 if indices.shape[1] == 1 else passes * examples,
            is_weighted=data.weight is not None,
            has_padding=hidden % lanes > 0,
        ),
    )
    results = launch(block, registers, (seeds, blocks), operands, carried)
    results = [
        _restore(t, axis, like)
        for t, axis, like in zip(results, axes, leaves, strict=True)
    ]
    return results[:NUM_PARAMS], results[NUM_PARAMS:-1], results[-1]


def launch(
    block: Callable[..., Block],
    registers: Callable[..., Registers],
    grid: tuple[int, int],
    operands: Any,
    carried: list[jax.Array],
    interpret: Any = None,
) -> list[jax.Array]:
    """Runs the kernel.

    Args:
      block: Makes a block, given its inputs, seed and registers.
      registers: Makes them, given the number of the block and whether it is compiled.
      grid: Numbers of seeds and of blocks per seed.
      operands: Its inputs.
      carried: Parameters, state and `diverged_at`.
      interpret: How to interpret the kernel; None compiles it.
    """
    flat, structure = jax.tree.flatten((operands, carried))
    state = [
        plgpu.SMEM(t.shape[2:], t.dtype)  # pyright: ignore[reportCallIssue]
        for t in carried[NUM_PARAMS:-1]
    ]

    def train_networks(*refs: Any) -> None:
        inputs, begin = jax.tree.unflatten(structure, refs[: len(flat)])
        end = refs[len(flat) : len(flat) + len(carried)]
        own = registers(lax.axis_index("block"), interpret is None)
        scratch = refs[len(flat) + len(carried) :]
        seed = lax.axis_index("seed")
        block(inputs, seed=seed, registers=own).run(begin, list(end), list(scratch))

    # Every number has one thread that reads and writes it, so none waits for another.
    return plgpu.kernel(
        train_networks,
        out_type=[jax.ShapeDtypeStruct(t.shape, t.dtype) for t in carried],
        scratch_types=state,
        grid=grid,
        grid_names=("seed", "block"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*flat)


def _num_lanes(inputs: Inputs, leaves: list[jax.Array], axes: list[int | None]) -> int:
    """The least number of lanes per network for which a block fits."""
    needed = 0, 0
    for lanes in _LANES:
        sizes = [
            math.prod(_share(t.shape[:1:-1], axis, lanes))
            for t, axis in zip(leaves, axes, strict=True)
        ]
        registers = 2 * sum(sizes[:NUM_PARAMS]) + inputs.data.x.shape[-1]
        needed = registers, sum(sizes[NUM_PARAMS:-1]) * _THREADS * 4
        if needed[0] <= _MAX_REGISTERS and needed[1] <= _SHARED_BYTES:
            return lanes
    raise ValueError(
        'expected a network for kernel="fused" that fits in a block of a GPU, with '
        f"{_MAX_REGISTERS} registers of {_THREADS} threads and {_SHARED_BYTES >> 10} "
        f"KiB of shared memory, but it needs {needed[0]} registers per thread and "
        f"{needed[1] >> 10} KiB"
    )


def _share(shape: tuple[int, ...], axis: int | None, lanes: int) -> tuple[int, ...]:
    """The shape of what a lane has of a leaf, in the layout `Columns`."""
    return tuple(-(-n // lanes) if a == axis else n for a, n in enumerate(shape))


def _spread(t: jax.Array, axis: int, group: int) -> jax.Array:
    """Divides networks into `[blocks, group]`, and repeats the last ones to fill it."""
    fill = [(0, 0)] * t.ndim
    fill[axis] = (0, -t.shape[axis] % group)
    t = jnp.pad(t, fill, mode="edge")
    return t.reshape(*t.shape[:axis], -1, group, *t.shape[axis + 1 :])


def _arrange(lanes: int, group: int, t: jax.Array, axis: int | None) -> jax.Array:
    """A leaf `[seeds, networks, ...]` as `[seeds, blocks, numbers, group, lanes]`."""
    t = t.transpose(0, 1, *range(t.ndim - 1, 1, -1))  # as columns
    if axis is None:
        t = jnp.broadcast_to(t[..., None], (*t.shape, lanes))
    else:
        at = axis + 2
        fill = [(0, 0)] * t.ndim
        fill[at] = (0, -t.shape[at] % lanes)
        t = jnp.pad(t, fill)
        t = t.reshape(*t.shape[:at], -1, lanes, *t.shape[at + 1 :])
        t = jnp.moveaxis(t, at + 1, -1)
    t = t.reshape(*t.shape[:2], -1, lanes)
    return jnp.swapaxes(_spread(t, 1, group), 2, 3)


def _restore(t: jax.Array, axis: int | None, like: jax.Array) -> jax.Array:
    """The inverse of `_arrange`, for a leaf of the shape of `like`."""
    (seeds, networks), shape = like.shape[:2], like.shape[:1:-1]
    lanes = t.shape[-1]
    t = jnp.swapaxes(t, 2, 3).reshape(seeds, -1, t.shape[2], lanes)[:, :networks]
    t = t.reshape(seeds, networks, *_share(shape, axis, lanes), lanes)
    if axis is None:
        t = t[..., 0]
    else:
        at = axis + 2
        t = jnp.moveaxis(t, -1, at + 1)
        t = t.reshape(*t.shape[:at], -1, *t.shape[at + 2 :])
        t = lax.slice_in_dim(t, 0, shape[axis], axis=at)
    return t.transpose(0, 1, *range(t.ndim - 1, 1, -1))
