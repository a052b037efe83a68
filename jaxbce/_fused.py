"""Training of many networks in one kernel, for all steps between two evaluations.

`Steps.fold` replaces the loop over steps of `training.run`. It computes for each step
which examples it visits, and the optimizer's scalars. A rule for `jax.vmap` collects
the networks of a group in one call of the kernel: `_kernel_tpu.py` for TPU, or
`_kernel_gpu.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbce import _elementwise, _kernel_tpu, _traced, _validate
from jaxbce._kernel_inputs import Inputs
from jaxbce.gradients import Batch
from jaxbce.network import Params
from jaxbce.training import Dataset

PLATFORMS = ("cpu", "tpu", "gpu")
_LEAST_CAPABILITY = 9.0  # of GPUs; that of H100
_MAX_INDICES = 1 << 15  # of examples, per call; 128 KiB of scalar memory
_MAX_STEPS = 1 << 12  # per call


_Carry = tuple[Params, Any, jax.Array]


class Steps(NamedTuple):
    """Takes training steps of one network; under `jax.vmap`, of many in one kernel.

    Attributes:
      split: The optimizer's step.
      data: Examples to train on.
      train: The kernel's `train`.
    """

    split: _elementwise.Split
    data: Dataset
    train: Callable[..., Any]

    def fold(
        self, batches: Any, begin: jax.Array, num_steps: Any, most: int, carry: _Carry
    ) -> _Carry:
        """Takes steps.

        Args:
          batches: The batches, a `_batches.Batches`; one batch of all examples is in
            their order.
          begin: Number of the first step.
          num_steps: How many steps to take.
          most: The largest value of `num_steps`.
          carry: Parameters, the state of the optimizer, and the step at which the
            network diverged, or −1.
        """
        n, size = batches.n, batches.size
        is_full = size == n

        def chunk(
            first: jax.Array, count: Any, draw: Any, most: int, carry: _Carry
        ) -> _Carry:
            indices, weight = (jnp.arange(n)[None], None) if is_full else draw()
            if weight is None:
                weight = jnp.full((most, size), 1 / size)
            return self._take(first, count, indices, weight, carry)

        chunk_steps = _MAX_STEPS if is_full else max(1, _MAX_INDICES // size)
        return batches.fold_chunks(chunk, begin, num_steps, most, chunk_steps, carry)

    def _take(
        self,
        first: jax.Array,
        count: Any,
        indices: jax.Array,
        weight: jax.Array,
        carry: _Carry,
    ) -> _Carry:
        """Takes `count` steps in one call, at most T.

        Args:
          first: Number of the first step.
          count: Number of steps.
          indices: The examples of each step, `[T, B]`, or `[1, B]` for T equal steps.
          weight: Their weights in the mean of a batch, `[T, B]`; those of a step are
            equal, or 0 for examples that are not part of the batch.
          carry: As for `fold`.
        """
        params, state, diverged_at = carry
        leaves, structure = jax.tree.flatten(state)
        is_counter = self.split.is_counter
        counters = [t for t, c in zip(leaves, is_counter, strict=True) if c]

        def scalars(counters: Any, i: jax.Array) -> Any:
            varying, following = self.split.varying(counters)
            return [
                jnp.where(i < count, new, old)
                for new, old in zip(following, counters, strict=True)
            ], varying

        steps = jnp.arange(weight.shape[0], dtype=jnp.int32)
        last_counters, varying = lax.scan(scalars, counters, steps)
        is_real = weight[: indices.shape[0]] > 0
        inputs = Inputs(
            first=jnp.asarray(first, jnp.int32),
            num_steps=jnp.asarray(count, jnp.int32),
            indices=jnp.where(is_real, indices, self.data.x.shape[0]).astype(jnp.int32),
            scale=jnp.max(weight, axis=1).astype(self.data.y.dtype),
            fixed=self.split.fixed(counters),
            varying=varying,
            data=self.data,
            params=jax.tree.leaves(params),
            state=[t for t, c in zip(leaves, is_counter, strict=True) if not c],
            diverged_at=diverged_at,
        )
        train = _for_all_networks(functools.partial(self.train, self.split))
        results = train(jax.tree.map(lambda t: t[None, None], inputs))
        param_leaves, inner, diverged_at = jax.tree.map(lambda t: t[0, 0], results)
        outer, inner = iter(last_counters), iter(inner)
        leaves = [next(outer if c else inner) for c in is_counter]
        params = jax.tree.unflatten(jax.tree.structure(params), param_leaves)
        return params, jax.tree.unflatten(structure, leaves), diverged_at


def prepare(
    program: _traced.Program,
    constants: Any,
    hparams: Any,
    params: Params,
    state: Any,
    data: Dataset,
    batch_size: int | None,
    platform: str,
) -> Steps:
    """Checks that a kernel can take the steps.

    Args:
      program: The user's part of a step, `training.Programs.step`.
      constants: Its constants.
      hparams: Hyperparameters, scalars.
      params: Parameters of one network.
      state: State of the optimizer.
      data: Examples to train on.
      batch_size: Number of examples per batch; None is all.
      platform: The platform of the devices.

    Raises:
      ValueError: If it cannot.
    """
    check_network(tuple(layer.w.shape[0] for layer in params), params[0].w.dtype)
    if program.tests_finiteness:
        raise ValueError(
            'expected an optimizer for kernel="fused" that does not test for values '
            "that are not finite, got one that does"
        )
    size = batch_size or data.x.shape[0]
    batch = Batch(data.x[:size], data.y[:size], data.y[:size, 0], data.pos_weight)
    split = _elementwise.split(program, constants, hparams, params, state, batch)
    return Steps(split, data, _kernel_of(platform))


def _kernel_of(platform: str) -> Callable[..., Any]:
    """The function `train` of the kernel for a platform."""
    if platform == "gpu":
        from jaxbce import _kernel_gpu  # not every build of JAX has its compiler

        return _kernel_gpu.train
    return _kernel_tpu.train


def check_network(widths: tuple[int, ...], dtype: Any) -> None:
    """Checks the number of layers, from the sizes of their inputs, and the dtype."""
    if len(widths) != 2:
        raise ValueError(
            f'expected one hidden layer for kernel="fused", got {len(widths) - 1}'
        )
    if dtype != jnp.float32:
        raise ValueError(
            f'expected parameters of float32 for kernel="fused", got {dtype}'
        )


def check_devices(devices: Any) -> None:
    """Checks that there is a kernel for the devices."""
    device = devices[0]
    if device.platform not in PLATFORMS:
        raise ValueError(
            'expected devices for kernel="fused" to be TPUs or GPUs (or CPUs, for '
            f"tests), got {device.platform}"
        )
    if device.platform != "gpu":
        return
    capability = str(device.compute_capability)
    if not capability[:1].isdigit() or float(capability) < _LEAST_CAPABILITY:
        raise ValueError(
            'expected GPUs for kernel="fused" of NVIDIA, of compute capability '
            f"{_LEAST_CAPABILITY} or higher, got {device.device_kind} ({capability})"
        )


def resolve_precision(precision: str | None) -> str | None:
    """The precision of a run in a kernel, given the argument of `sweep`.

    Mosaic has products of the default and of the highest precision, so all between
    become the highest.
    """
    config: Any = jax.config
    with _validate.precision(precision):
        name = config.jax_default_matmul_precision
    try:
        level = lax.Precision(name)
    except ValueError:
        raise ValueError(
            'expected a precision for kernel="fused" of "default", "high" or '
            f'"highest", got {name!r}'
        ) from None
    return "highest" if level is lax.Precision.HIGH else precision


def _for_all_networks(train: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """Gives `train` a rule for `vmap` that merges the mapped axis into one of its own.

    Networks with other batches are other seeds, the first axis of all leaves; those
    with the same batches share the second one.
    """
    mapped = jax.custom_batching.custom_vmap(train)

    @mapped.def_vmap
    def _(size: int, in_batched: Any, inputs: Inputs) -> tuple[Any, Any]:
        (batched,) = in_batched
        by_seed = batched.indices
        most = max(
            t.shape[1 + is_batched]
            for t, is_batched in zip(
                jax.tree.leaves(inputs), jax.tree.leaves(batched), strict=True
            )
        )

        def merge(t: jax.Array, is_batched: bool) -> jax.Array:
            if by_seed:
                return jnp.squeeze(t, 1) if is_batched else t
            if not is_batched and t.shape[1] == 1:
                return t
            t = t if is_batched else t[None]
            t = jnp.broadcast_to(t, (size, t.shape[1], most, *t.shape[3:]))
            return jnp.moveaxis(t, 0, 1).reshape(t.shape[1], size * most, *t.shape[3:])

        def divide(t: jax.Array) -> jax.Array:
            if by_seed:
                return t[:, None]
            t = t.reshape(t.shape[0], size, -1, *t.shape[2:])
            return jnp.moveaxis(t, 1, 0)

        results = _for_all_networks(train)(jax.tree.map(merge, inputs, batched))
        return jax.tree.map(divide, results), jax.tree.map(lambda _: True, results)

    return mapped
