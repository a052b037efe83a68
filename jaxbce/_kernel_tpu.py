"""The kernel that trains many networks, written in Pallas for TPU.

Parameters and optimizer states of a block of networks stay on chip, one network per
vector lane (`_layouts.Lanes`), while a loop takes the steps: it gathers the examples of
a batch, calls `gradients.accumulate`, and then the optimizer, whose update must be
elementwise (`_elementwise.py`). On CPU the kernel is interpreted.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxbce import gradients
from jaxbce._elementwise import Split
from jaxbce._kernel_inputs import Inputs, as_params
from jaxbce._layouts import Lanes
from jaxbce.gradients import Batch, Form, Objective

_LANES, _SUBLANES = 128, 8
_MAX_NETWORKS = 512  # per block
_MAX_EXAMPLES = 32  # per pass
_MAX_ACTIVATIONS = 1 << 18  # of a layer, in a pass of a block
_VMEM_BYTES = 100 << 20  # of the 128 MiB of TPU v4, v5e, v5p and v6e
_SMEM_BYTES = 1 << 20


class _Sizes(NamedTuple):
    """Static sizes of a kernel.

    Attributes:
      networks: Number of networks per block.
      group: Number of networks whose step is computed at a time. Without a state, a
        whole block takes fewest cycles; otherwise it would not fit in registers.
      examples: Number of examples per pass.
      passes: Number of passes over the examples of a batch.
      features: Number of features, n_0.
      columns: Number of columns of features with their padding.
      outputs: Number of outputs, n_L.
      leaves: Number of leaves of the parameters.
      stride: Number of indices per step; 0 if all steps have the same examples.
      is_weighted: Whether there are weights of the examples.
    """

    networks: int
    group: int
    examples: int
    passes: int
    features: int
    columns: int
    outputs: int
    leaves: int
    stride: int
    is_weighted: bool


def train(split: Split, inputs: Inputs) -> Any:
    """Trains networks: `inputs` have axes `[seeds, networks]`."""
    seeds, networks = inputs.num_networks()
    lanes = Lanes(inputs.data.x.shape[-1])
    outputs = inputs.data.y.shape[-1]
    hidden = inputs.params[0].shape[-1]
    batch = inputs.indices.shape[-1]
    block, examples = _block(networks, batch, max(hidden, outputs))
    passes = -(-batch // examples)
    blocks = -(-networks // block)

    def arrange(t: jax.Array) -> jax.Array:
        """`[networks, ...]` as `[..., networks]`, at least of two dimensions."""
        fill = blocks * block - t.shape[0]  # with copies of the last network
        t = jnp.concatenate([t, jnp.broadcast_to(t[-1:], (fill, *t.shape[1:]))])
        t = lanes.convert(t)
        return t[None] if t.ndim == 1 else t

    operands = inputs.operands(
        passes * examples,
        arrange,
        lambda y: jnp.stack([arrange(y[:, :, o]) for o in range(outputs)]),
        lanes.pad,
    )
    table, indices = operands["table"], operands["indices"]
    num_seeds, num_steps, _ = indices.shape
    operands["indices"] = indices.reshape(num_seeds, 1, -1)
    dtype = table.dtype
    sizes = _Sizes(
        networks=block,
        group=_LANES if inputs.state else block,
        examples=examples,
        passes=passes,
        features=lanes.features,
        columns=lanes.pad(inputs.data.x[0, 0]).shape[1],
        outputs=outputs,
        leaves=len(inputs.params),
        stride=0 if num_steps == 1 else passes * examples,
        is_weighted=inputs.data.weight is not None,
    )
    leaves = inputs.leaves()
    carried = [jax.vmap(arrange)(t) for t in leaves]  # [seeds, ..., networks]
    specs = jax.tree.map(functools.partial(_spec, block), operands)
    specs["table"] = pl.BlockSpec(table.shape, lambda *_: (0, 0))
    specs["indices"] = pl.BlockSpec(
        (None, *operands["indices"].shape[1:]),
        lambda s, _: (s if num_seeds > 1 else 0, 0, 0),
        memory_space=pltpu.SMEM,
    )
    kernel = functools.partial(
        _kernel, update=split.update, sizes=sizes, dtypes=inputs.dtypes()
    )
    carried_specs = [
        pl.BlockSpec(
            (None, *t.shape[1:-1], block),
            lambda s, b, ndim=t.ndim: (s, *(0,) * (ndim - 2), b),
        )
        for t in carried
    ]
    rows = {"table": pltpu.VMEM((examples, table.shape[1]), dtype)}
    if "y" in operands:
        rows["y"] = pltpu.VMEM((outputs, examples, block), dtype)
    if "weight" in operands:
        rows["weight"] = pltpu.VMEM((examples, block), dtype)
    scratch: dict[str, Any] = {"examples": rows}
    if passes > 1:
        shapes = [(1, block), (1, block)]
        shapes += [(*t.shape[1:-1], block) for t in carried[: sizes.leaves]]
        scratch["sums"] = [pltpu.VMEM(shape, dtype) for shape in shapes]
    _check_memory(operands, carried, block)
    num_operands = len(jax.tree.leaves(operands))

    def call(interpret: bool, operands: Any, carried: Any) -> Any:
        return pl.pallas_call(
            kernel,
            grid=(seeds, blocks),
            in_specs=[specs, carried_specs],
            out_specs=[carried_specs],  # one argument of the kernel
            out_shape=[[jax.ShapeDtypeStruct(t.shape, t.dtype) for t in carried]],
            scratch_shapes=[scratch],
            input_output_aliases={num_operands + i: i for i in range(len(carried))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"),
                vmem_limit_bytes=_VMEM_BYTES,
            ),
            interpret=interpret,
            name="train_networks",
        )(operands, carried)[0]

    results = lax.platform_dependent(
        operands,
        carried,
        cpu=functools.partial(call, True),
        tpu=functools.partial(call, False),
    )

    def restore(t: jax.Array, like: jax.Array) -> jax.Array:
        t = t[0] if like.ndim == 2 else t
        return lanes.convert(t)[:networks]

    results = [
        jax.vmap(functools.partial(restore, like=like))(t)
        for t, like in zip(results, leaves, strict=True)
    ]
    k = sizes.leaves
    return results[:k], results[k:-1], results[-1]


def _block(networks: int, batch: int, width: int) -> tuple[int, int]:
    """The number of networks per block, and of examples per pass."""
    examples = min(_MAX_EXAMPLES, -(-batch // _SUBLANES) * _SUBLANES)
    block = min(_MAX_NETWORKS, -(-networks // _LANES) * _LANES)
    while width * examples * block > _MAX_ACTIVATIONS and block > _LANES:
        block -= _LANES
    while width * examples * block > _MAX_ACTIVATIONS and examples > _SUBLANES:
        examples -= _SUBLANES
    return block, examples


def _spec(block: int, t: jax.Array) -> pl.BlockSpec:
    """Scalars as a whole, and otherwise the networks of a block."""
    zeros = (0,) * (t.ndim - 1)
    if t.ndim == 1:
        return pl.BlockSpec(t.shape, lambda *_: (0,), memory_space=pltpu.SMEM)
    return pl.BlockSpec((*t.shape[:-1], block), lambda _, b: (*zeros, b))


def _check_memory(operands: Any, carried: list[jax.Array], block: int) -> None:
    """Checks that a block fits in the memory of a core, twice for what is copied."""

    def size(shape: tuple[int, ...]) -> int:
        *rest, sublanes, lanes = (1, *shape)
        padded = -(-sublanes // _SUBLANES) * _SUBLANES, -(-lanes // _LANES) * _LANES
        return math.prod((*rest, *padded)) * 4

    vectors = [operands["table"].shape]
    mapped = [operands[name] for name in ("y", "weight", "varying") if name in operands]
    vectors += [(*t.shape[:-1], block) for t in jax.tree.leaves(mapped) if t.ndim > 1]
    vectors += 2 * [(*t.shape[1:-1], block) for t in carried]
    num_indices = operands["indices"].shape[-1]
    needed = 2 * sum(map(size, vectors)), 2 * num_indices * 4
    for bytes_, limit, kind in zip(
        needed, (_VMEM_BYTES, _SMEM_BYTES), ("vector", "scalar"), strict=True
    ):
        if bytes_ > limit:
            raise ValueError(
                'expected a network and examples for kernel="fused" that fit in '
                f"{limit >> 20} MiB of {kind} memory, but a block of {block} networks "
                f"needs {bytes_ >> 20} MiB"
            )


def _kernel(
    inputs: dict[str, Any],
    begin: list[Any],
    carried: list[Any],
    scratch: dict[str, Any],
    *,
    update: Callable[..., Any],
    sizes: _Sizes,
    dtypes: dict[str, list[Any]],
) -> None:
    """Takes the steps of a block of networks.

    Args:
      inputs: References to what `train` passes.
      begin: References to params, state and `diverged_at` before the steps.
      carried: The same afterwards.
      scratch: References to temporary memory.
      update: The optimizer's step.
      sizes: Static sizes.
      dtypes: Dtypes of the scalars per call and per step.
    """
    form = Form(sizes.examples, sizes.is_weighted, Lanes(sizes.features))
    params_refs, state_refs = carried[: sizes.leaves], carried[sizes.leaves : -1]
    first, num_steps = inputs["steps"][0], inputs["steps"][1]
    for old, new in zip(begin, carried, strict=True):
        new[...] = old[...]

    def scalars(name: str, i: jax.Array | int, lanes: slice) -> list[jax.Array]:
        refs = inputs[name]
        return [
            _lane_scalar(ref, i, lanes, dtype)
            for ref, dtype in zip(refs, dtypes[name], strict=True)
        ]

    def objective(i: jax.Array, lanes: slice) -> Objective:
        """The loss of the gathered examples and its gradient, for step i."""
        p = [
            _lane_scalar(inputs["pos_weight"], o, lanes, jnp.float32)
            for o in range(sizes.outputs)
        ]
        scale = inputs["scale"][i]
        batch = _batch(scratch["examples"], scale, jnp.stack(p), lanes, sizes)
        params = as_params([ref[..., lanes] for ref in params_refs])
        return gradients.accumulate(params, batch, form)[0]

    def take(i: jax.Array, lanes: slice, objective: Objective) -> None:
        """Takes step i, given its objective."""
        old = [ref[..., lanes] for ref in params_refs]
        new, state, rest = update(
            scalars("fixed", 0, lanes),
            scalars("varying", i, lanes),
            old,
            jax.tree.leaves(objective.grads),
            objective.value,
            [ref[..., lanes] for ref in state_refs],
        )
        linear_part = objective.linear_part  # [1, G], like all that follows
        is_finite = jnp.isfinite(linear_part + rest) & (linear_part >= 0)
        diverged_at = carried[-1][:, lanes]
        is_running = diverged_at < 0
        diverged_at = jnp.where(is_running & ~is_finite, first + i, diverged_at)
        carried[-1][:, lanes] = diverged_at
        for ref, a, b in zip(params_refs, new, old, strict=True):
            keep = jnp.broadcast_to(diverged_at < 0, a.shape)
            ref[..., lanes] = jnp.where(keep, a, b)
        for ref, a in zip(state_refs, state, strict=True):
            ref[..., lanes] = a

    groups = [
        slice(begin, begin + sizes.group)
        for begin in range(0, sizes.networks, sizes.group)
    ]

    def step(i: jax.Array, _: None) -> None:
        start = i * np.int32(sizes.stride)
        if sizes.passes == 1:
            _gather(inputs, scratch["examples"], start, sizes)
            for lanes in groups:
                take(i, lanes, objective(i, lanes))
            return
        for ref in scratch["sums"]:
            ref[...] = jnp.zeros_like(ref)

        def add(j: jax.Array, _: None) -> None:
            at = start + j * np.int32(sizes.examples)
            _gather(inputs, scratch["examples"], at, sizes)
            for lanes in groups:
                parts = jax.tree.leaves(objective(i, lanes))
                for ref, t in zip(scratch["sums"], parts, strict=True):
                    ref[..., lanes] += t

        lax.fori_loop(np.int32(0), np.int32(sizes.passes), add, None)
        for lanes in groups:
            value, linear_part, *grads = [ref[..., lanes] for ref in scratch["sums"]]
            take(i, lanes, Objective(value, linear_part, as_params(grads)))

    lax.fori_loop(np.int32(0), num_steps, step, None)


def _lane_scalar(ref: Any, i: jax.Array | int, lanes: slice, dtype: Any) -> jax.Array:
    """The i-th of some scalars, as `[1, G]`."""
    shape = 1, lanes.stop - lanes.start
    # A load at a dynamic row must be that of whole rows.
    t = jnp.full(shape, ref[i]) if ref.ndim == 1 else ref[pl.ds(i, 1), :][:, lanes]
    return t != 0 if jnp.issubdtype(dtype, jnp.bool_) else t


def _gather(inputs: Any, gathered: Any, start: jax.Array, sizes: _Sizes) -> None:
    """Copies the examples of a pass to temporary memory."""
    for r in range(sizes.examples):
        row = pl.ds(inputs["indices"][0, start + np.int32(r)], 1)
        for name, ref in gathered.items():
            ref[..., r : r + 1, :] = inputs[name][..., row, :]


def _batch(
    gathered: Any, scale: jax.Array, p: jax.Array, lanes: slice, sizes: _Sizes
) -> Batch:
    """The gathered examples, in the layout `Lanes`."""
    table = gathered["table"][...]
    shared = iter(range(sizes.columns, table.shape[1]))

    def column() -> jax.Array:
        i = next(shared)
        return jnp.broadcast_to(table[:, i : i + 1], (sizes.examples, sizes.group))

    if "y" in gathered:
        y = gathered["y"][..., lanes]
    else:
        y = jnp.stack([column() for _ in range(sizes.outputs)])
    c = gathered["weight"][:, lanes] if "weight" in gathered else column()
    return Batch(table[:, : sizes.columns], y, scale * c, p)
