"""The arguments of the kernels that train many networks.

Each kernel, `_kernel_tpu.py` and `_kernel_gpu.py`, arranges them for its device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbce.network import Layer, Params


class Inputs(NamedTuple):
    """The arguments of a call for one network, or with axes `[seeds, networks]`.

    Either axis may be 1 for what is shared. All but the indices, params, state and
    `diverged_at` must be shared by seeds.

    Attributes:
      first: Number of the first step, int32.
      num_steps: Number of steps to take, int32.
      indices: The examples of each step, `[steps, B]`, or `[1, B]` if all steps are
        equal, int32. N stands for no example.
      scale: The weight of an example in the mean of each step, `[steps]`.
      fixed: Scalars of the optimizer.
      varying: Scalars of the optimizer in each step, each `[steps]`.
      data: Examples, a `training.Dataset`; all networks share x.
      params: Leaves of the parameters.
      state: Leaves of the optimizer's state, without counters.
      diverged_at: int32.
    """

    first: jax.Array
    num_steps: jax.Array
    indices: jax.Array
    scale: jax.Array
    fixed: list[jax.Array]
    varying: list[jax.Array]
    data: Any
    params: list[jax.Array]
    state: list[jax.Array]
    diverged_at: jax.Array

    def num_networks(self) -> tuple[int, int]:
        """The numbers of seeds and of networks per seed."""
        seeds, networks = (
            max(t.shape[axis] for t in jax.tree.leaves(self)) for axis in (0, 1)
        )
        return seeds, networks

    def leaves(self) -> list[jax.Array]:
        """Parameters, state and `diverged_at`, with both axes in full."""
        leaves = [*self.params, *self.state, self.diverged_at]
        axes = self.num_networks()
        return [jnp.broadcast_to(t, (*axes, *t.shape[2:])) for t in leaves]

    def operands(
        self,
        num_indices: int,
        by_network: Callable[[jax.Array], jax.Array],
        labels_by_network: Callable[[jax.Array], jax.Array],
        pad: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> dict[str, Any]:
        """Arrays that a kernel reads, by name; shared ones have no axis of networks.

        Args:
          num_indices: Number of indices per step, with those of no example.
          by_network: Arranges numbers `[networks, k]` for the kernel.
          labels_by_network: Arranges labels `[networks, N + 1, n_L]`.
          pad: Pads the features, `[N, n_0]`.

        Returns:
          "steps", the first and their number; "indices", `[seeds or 1, steps or 1,
          num_indices]`; "scale", `[steps]`; "pos_weight", "fixed" and "varying",
          arranged, with bools as int32; "table", whose columns are features, and the
          labels and weights that all networks share; otherwise "y" and "weight",
          arranged. The last example has only zeros.
        """
        first, num_steps, scale, fixed, varying, data = (
            jax.tree.map(lambda t: jnp.squeeze(t, 0), t)  # shared by seeds
            for t in (
                self.first,
                self.num_steps,
                self.scale,
                self.fixed,
                self.varying,
                self.data,
            )
        )

        def arrange(t: jax.Array) -> jax.Array:
            t = t.astype(jnp.int32) if t.dtype == bool else t
            return t[0] if t.shape[0] == 1 else by_network(t)

        n, outputs = data.y.shape[1:]
        made: dict[str, Any] = {}
        columns = [pad(data.x[0])]
        if data.y.shape[0] == 1:
            columns.append(data.y[0])
        else:
            made["y"] = labels_by_network(jnp.pad(data.y, ((0, 0), (0, 1), (0, 0))))
        if data.weight is None:
            columns.append(jnp.ones((n, 1), data.x.dtype))
        elif data.weight.shape[0] == 1:
            columns.append(data.weight[0][:, None])
        else:
            made["weight"] = by_network(jnp.pad(data.weight, ((0, 0), (0, 1))))
        p = data.pos_weight
        indices = jnp.squeeze(self.indices, 1)
        fill = num_indices - indices.shape[2]
        return made | {
            "steps": jnp.concatenate([first, num_steps]),
            "indices": jnp.pad(indices, ((0, 0), (0, 0), (0, fill)), constant_values=n),
            "scale": scale[0],
            "pos_weight": arrange(
                jnp.broadcast_to(p.reshape(p.shape[0], -1), (p.shape[0], outputs))
            ),
            "fixed": [arrange(t[:, None]) for t in fixed],
            "varying": [arrange(t) for t in varying],
            "table": jnp.pad(jnp.concatenate(columns, axis=1), ((0, 1), (0, 0))),
        }

    def dtypes(self) -> dict[str, list[Any]]:
        """Dtypes of the scalars per call and per step."""
        return {
            "fixed": [t.dtype for t in self.fixed],
            "varying": [t.dtype for t in self.varying],
        }


def as_params(leaves: list[jax.Array]) -> Params:
    """The leaves of the parameters, in their order, as layers."""
    return tuple(Layer(w, b) for w, b in zip(leaves[::2], leaves[1::2], strict=True))
