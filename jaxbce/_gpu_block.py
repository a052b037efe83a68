"""Training of a block of networks in the registers of a GPU.

A thread has a share of the hidden units of one network. Each step is a program of one
network: `gradients.accumulate`, then the optimizer's elementwise update. `_threads.py`
runs it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbce import gradients
from jaxbce._gpu_registers import Registers
from jaxbce._kernel_inputs import as_params
from jaxbce._threads import Number, Shares, Threads, array, value
from jaxbce.gradients import Batch, Form

NUM_PARAMS = 4  # leaves: weights and biases of two layers


class Leaf(NamedTuple):
    """The share of a thread in a leaf of the parameters or of the optimizer's state.

    Attributes:
      shape: The shape of its share.
      axis: The axis of the hidden units, or None if all lanes have the same numbers.
      owner: The parameter to which a leaf of the state belongs, or None.
    """

    shape: tuple[int, ...]
    axis: int | None
    owner: int | None = None


class Sizes(NamedTuple):
    """Static sizes of a kernel.

    Attributes:
      examples: Number of examples per pass.
      passes: Number of passes over the examples of a batch.
      features: Number of features, n_0.
      outputs: Number of outputs, n_L.
      stride: Number of indices per step; 0 if all steps have the same examples.
      is_weighted: Whether there are weights of the examples.
      has_padding: Whether some lanes have fewer hidden units than others.
    """

    examples: int
    passes: int
    features: int
    outputs: int
    stride: int
    is_weighted: bool
    has_padding: bool


class Block(NamedTuple):
    """A block of networks of one seed.

    Attributes:
      inputs: References to what `_kernel_gpu.train` passes.
      dtypes: Dtypes of the scalars per call and per step.
      update: The optimizer's step.
      params: The leaves of the parameters.
      state: The leaves of the optimizer's state.
      sizes: Static sizes.
      seed: Index of the seed.
      registers: Loads registers of the threads.
    """

    inputs: dict[str, Any]
    dtypes: dict[str, list[Any]]
    update: Callable[..., Any]
    params: list[Leaf]
    state: list[Leaf]
    sizes: Sizes
    seed: Any
    registers: Registers

    def run(self, begin: list[Any], end: list[Any], scratch: list[Any]) -> None:
        """Takes the steps.

        Args:
          begin: References to params, state and `diverged_at` before the steps, each
            `[seeds, blocks, numbers, networks, lanes]`.
          end: The same afterwards.
          scratch: References to memory for the state, each
            `[numbers, networks, lanes]`.
        """
        registers = self.registers
        threads = Threads(registers.lanes, registers.sum_lanes)
        add, take = threads.program(self._add), threads.program(self._take)
        at = self.seed, registers.block
        for ref, old in zip(scratch, begin[NUM_PARAMS:], strict=False):
            for i in range(ref.shape[0]):
                ref[i] = registers.load(old, (*at, i))
        carry = [
            registers.load(ref, (*at, i))
            for ref in (*begin[:NUM_PARAMS], begin[-1])
            for i in range(ref.shape[2])
        ]
        fixed = self._scalars("fixed", 0)
        pos_weight = array(
            (self.sizes.outputs,),
            (
                registers.scalar(self.inputs["pos_weight"], o, jnp.float32)
                for o in range(self.sizes.outputs)
            ),
        )
        is_unit = array((), [registers.load(self.inputs["is_unit"], ()) != 0])
        first, num_steps = self.inputs["steps"][0], self.inputs["steps"][1]

        def step(i: jax.Array, carry: list[jax.Array]) -> list[jax.Array]:
            numbers = iter(carry)
            params = [_next(leaf.shape, numbers) for leaf in self.params]
            diverged_at = _next((), numbers)
            state = [
                array(leaf.shape, map(registers.later(ref), range(ref.shape[0])))
                for leaf, ref in zip(self.state, scratch, strict=True)
            ]
            new, new_state, diverged_at = take(
                params,
                state,
                diverged_at,
                self._objective(add, i, params, pos_weight),
                fixed,
                self._scalars("varying", i),
                array((), [registers.fill(first + i)]),
                is_unit,
            )
            # One number of the parameters at a time, with the states that belong to it:
            # all are computed before the first is stored.
            carry = []
            for k, leaf in enumerate([*new, diverged_at]):
                own = [
                    (ref, t.flat)
                    for ref, t, s in zip(scratch, new_state, self.state, strict=True)
                    if s.owner == (k if k < NUM_PARAMS else None)
                ]
                for e, number in enumerate(leaf.flat):
                    numbers = [number, *(t[e] for _, t in own)]
                    result, *stored = [registers.fill(value(t)) for t in numbers]
                    carry.append(result)
                    for (ref, _), t in zip(own, stored, strict=True):
                        ref[e] = t
            return carry

        carry = lax.fori_loop(np.int32(0), num_steps, step, carry)
        numbers = iter(carry)
        for ref in (*end[:NUM_PARAMS], end[-1]):
            for i in range(ref.shape[2]):
                ref[(*at, i)] = next(numbers)
        for ref, new in zip(scratch, end[NUM_PARAMS:], strict=False):
            for i in range(ref.shape[0]):
                new[(*at, i)] = registers.load(ref, (i,))

    def _objective(self, add: Any, i: jax.Array, params: Any, pos_weight: Any) -> Any:
        """The loss of a batch and its gradient, for step i."""
        sizes, registers = self.sizes, self.registers
        shapes = [(), (), *(leaf.shape for leaf in self.params)]
        scale = array((), [self.inputs["scale"][i]])

        def one_pass(j: jax.Array | int, carry: list[jax.Array]) -> list[jax.Array]:
            at = i * np.int32(sizes.stride) + j * np.int32(sizes.examples)
            # One example at a time: then each product of the gradient and its sum over
            # examples is one instruction.
            for r in range(sizes.examples):
                numbers = iter(carry)
                sums = [_next(shape, numbers) for shape in shapes]
                example = self._example(at + np.int32(r))
                sums = add(params, sums, *example, scale, pos_weight)
                carry = [registers.fill(value(t)) for leaf in sums for t in leaf.flat]
            return carry

        zeros = [registers.fill(jnp.float32(0))] * sum(map(math.prod, shapes))
        if sizes.passes == 1:
            carry = one_pass(0, zeros)
        else:
            carry = lax.fori_loop(np.int32(0), np.int32(sizes.passes), one_pass, zeros)
        numbers = iter(carry)
        return [_next(shape, numbers) for shape in shapes]

    def _add(
        self, params: Any, sums: Any, x: Any, y: Any, c: Any, scale: Any, p: Any
    ) -> list[jax.Array]:
        """Adds the loss of examples and its gradient, as a program of one network."""
        form = Form(1, self.sizes.is_weighted, Shares(self.sizes.features, False))
        batch = Batch(x, y, scale * c, p)
        objective, _ = gradients.accumulate(as_params(params), batch, form)
        leaves = jax.tree.leaves(objective)
        return [a + b for a, b in zip(sums, leaves, strict=True)]

    def _take(
        self,
        params: list[jax.Array],
        state: list[jax.Array],
        diverged_at: jax.Array,
        objective: list[jax.Array],
        fixed: list[jax.Array],
        varying: list[jax.Array],
        t: jax.Array,
        is_unit: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
        """Step t, as a program of one network."""
        value, linear_part, *grads = objective

        def with_networks(leaves: list[jax.Array]) -> list[jax.Array]:
            """Adds the axis of networks, of length 1; scalars are `[1, 1]`."""
            return [jnp.atleast_1d(leaf)[..., None] for leaf in leaves]

        new, new_state, rest = self.update(
            with_networks(fixed),
            with_networks(varying),
            with_networks(params),
            with_networks(grads),
            value[None, None],
            with_networks(state),
        )
        new, new_state = (
            [a.reshape(b.shape) for a, b in zip(after, before, strict=True)]
            for after, before in ((new, params), (new_state, state))
        )
        is_finite = jnp.isfinite(linear_part + rest[0, 0]) & (linear_part >= 0)
        diverged_at = jnp.where((diverged_at < 0) & ~is_finite, t, diverged_at)
        kept = []
        for a, b, leaf in zip(new, params, self.params, strict=True):
            keep = jnp.broadcast_to(diverged_at < 0, b.shape)
            if self.sizes.has_padding and leaf.axis is not None:
                end = b.shape[leaf.axis] - 1
                last = lax.slice_in_dim(keep, end, None, axis=leaf.axis) & is_unit
                keep = lax.slice_in_dim(keep, 0, end, axis=leaf.axis)
                keep = jnp.concatenate([keep, last], axis=leaf.axis)
            kept.append(jnp.where(keep, a, b))
        return kept, new_state, diverged_at

    def _example(self, at: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, labels and weight of one example, loaded where they are used."""
        inputs, sizes = self.inputs, self.sizes
        table, indices = inputs["table"], inputs["indices"]
        row = indices[self.seed if indices.shape[0] > 1 else 0, at]
        columns = iter(range(table.shape[1]))

        def shared(shape: tuple[int, ...]) -> np.ndarray:
            def number(column: int) -> Number:
                return Number(table.dtype, lambda: table[row, column])

            return array(
                shape, (number(next(columns)) for _ in range(math.prod(shape)))
            )

        def own(ref: Any, shape: tuple[int, ...]) -> np.ndarray:
            by_network, size = self.registers.by_network, np.int32(math.prod(shape))

            def number(i: np.int32) -> Number:
                return Number(ref.dtype, lambda: by_network(ref, row * size + i))

            return array(shape, map(number, np.arange(size, dtype=np.int32)))

        x = shared((1, sizes.features))
        labels = 1, sizes.outputs
        y = shared(labels) if "y" not in inputs else own(inputs["y"], labels)
        weight = inputs.get("weight")
        return x, y, shared((1,)) if weight is None else own(weight, (1,))

    def _scalars(self, name: str, i: jax.Array | int) -> list[np.ndarray]:
        return [
            array((), [self.registers.scalar(ref, i, dtype)])
            for ref, dtype in zip(self.inputs[name], self.dtypes[name], strict=True)
        ]


def _next(shape: tuple[int, ...], numbers: Iterator[Any]) -> np.ndarray:
    return array(shape, (next(numbers) for _ in range(math.prod(shape))))
