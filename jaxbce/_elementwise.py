"""Optimizers that work elementwise, taken apart for a kernel.

A kernel that trains many networks holds one network per vector lane. An update of
parameters that is elementwise, such as that of Adam, is the same program there, and for
a part of the parameters. Scalars that depend only on hyperparameters and on counters,
such as the learning rate of a schedule or Adam's `1 − bⁿ`, do not: `split` separates
them, so that XLA computes them as it does without a kernel.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, Var
from jax.extend.core import primitives as p

from jaxbce import _traced
from jaxbce.gradients import Batch
from jaxbce.network import Params

# Elementwise operations with the accuracy of XLA in a kernel. `pow` is not one.
_ELEMENTWISE = {
    p.abs_p,
    p.add_jaxvals_p,
    p.add_p,
    p.and_p,
    p.clamp_p,
    p.convert_element_type_p,
    p.copy_p,
    p.div_p,
    p.eq_p,
    p.exp_p,
    p.ge_p,
    p.gt_p,
    p.integer_pow_p,
    p.is_finite_p,
    p.le_p,
    p.log_p,
    p.log1p_p,
    p.logistic_p,
    p.lt_p,
    p.max_p,
    p.min_p,
    p.mul_p,
    p.ne_p,
    p.neg_p,
    p.not_p,
    p.or_p,
    p.rsqrt_p,
    p.select_n_p,
    p.sign_p,
    p.sqrt_p,
    p.square_p,
    p.sub_p,
    p.tanh_p,
}
_RESHAPES = {p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p}
CALLS = {p.jit_p: "jaxpr", p.custom_jvp_call_p: "call_jaxpr"}


class Split(NamedTuple):
    """A step of an optimizer, split into scalars and elementwise operations.

    Attributes:
      is_counter: Which leaves of the state, as a flat list, are counters: scalars that
        depend on nothing but hyperparameters and counters.
      owners: For each other leaf of the state, the index of the parameter that it
        belongs to, such as the momentum of a weight, or None.
      fixed: `(counters) -> scalars` that do not depend on counters.
      varying: `(counters) -> (scalars, counters)`, the scalars that do, and the
        counters of the next step.
      update: `(fixed, varying, params, grads, value, state) -> (params, state, rest)`
        on flat lists of leaves without the counters, elementwise. Leaves `[n, m]` of
        one network are `[m, n, G]`, `[n]` are `[n, G]`, and scalars are `[1, G]`.
    """

    is_counter: tuple[bool, ...]
    owners: tuple[int | None, ...]
    fixed: Callable[..., list[jax.Array]]
    varying: Callable[..., tuple[list[jax.Array], list[jax.Array]]]
    update: Callable[..., tuple[list[jax.Array], list[jax.Array], jax.Array]]


def split(
    program: _traced.Program,
    constants: Sequence[Any],
    hparams: Any,
    params: Params,
    state: Any,
    batch: Batch,
) -> Split:
    """Splits a step, `training.Programs.step`, traced at the shapes of one network.

    Args:
      program: The step.
      constants: Its constants.
      hparams: Hyperparameters, scalars.
      params: Parameters of one network.
      state: State of its optimizer.
      batch: A batch, which the step must not read.

    Raises:
      ValueError: If an operation on the parameters is not elementwise.
    """
    scalars = (constants, hparams)
    total = jnp.zeros((), batch.c.dtype), params
    closed = jax.make_jaxpr(program)(*scalars, params, state, total, batch)
    jaxpr = closed.jaxpr
    sizes = [len(jax.tree.leaves(t)) for t in (scalars, params, state, 0, params)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    constant_vars, param_vars, state_vars, (value_var,), grad_vars = (
        jaxpr.invars[end - size : end] for size, end in zip(sizes, ends, strict=True)
    )
    new_params = jaxpr.outvars[: sizes[1]]
    new_state, (rest,) = jaxpr.outvars[sizes[1] : -1], jaxpr.outvars[-1:]

    # The counters: begin with all scalars of the state, and drop those that depend on
    # other arguments.
    free = {v for v in constant_vars if not v.aval.shape}
    free |= {
        v
        for v, value in zip(jaxpr.constvars, closed.consts, strict=True)
        if not jnp.shape(value)
    }
    counters = {v for v in state_vars if not v.aval.shape}
    while True:
        known = _closure(jaxpr, free | counters)
        dropped = {
            old
            for old, new in zip(state_vars, new_state, strict=True)
            if old in counters and isinstance(new, Var) and new not in known
        }
        if not dropped:
            break
        counters -= dropped
    is_counter = tuple(v in counters for v in state_vars)
    fixed_vars = _closure(jaxpr, free)

    # The operations outside, and those in the kernel.
    kept = [v for v, c in zip(new_state, is_counter, strict=True) if not c]
    results = [*new_params, *kept, rest]
    inner = _live([e for e in jaxpr.eqns if not known.issuperset(e.outvars)], results)
    read = [v for eqn in inner for v in eqn.invars] + results
    boundary = list(dict.fromkeys(v for v in read if isinstance(v, Var) and v in known))
    fixed = [v for v in boundary if v in fixed_vars]
    varying = [v for v in boundary if v not in fixed_vars]
    inner_state = [v for v, c in zip(state_vars, is_counter, strict=True) if not c]
    arrays = [*param_vars, *grad_vars, value_var, *inner_state]
    defined = {*boundary, *arrays, *(v for eqn in inner for v in eqn.outvars)}
    if any(isinstance(v, Var) and v not in defined for v in read):
        raise ValueError(
            'expected an optimizer for kernel="fused" that reads params, gradients and '
            "scalars, got one that reads the batch or an array that it closes over"
        )
    _check_elementwise(inner)
    outer = [e for e in jaxpr.eqns if known.issuperset(e.outvars)]
    before = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    before |= dict(zip(constant_vars, jax.tree.leaves(scalars), strict=True))
    old_counters = [v for v, c in zip(state_vars, is_counter, strict=True) if c]
    new_counters = [v for v, c in zip(new_state, is_counter, strict=True) if c]

    def evaluate(wanted: list[Any], values: list[Any]) -> list[jax.Array]:
        env = before | dict(zip(old_counters, values, strict=True))
        for eqn in _live(outer, wanted):
            operands = [_read(env, v) for v in eqn.invars]
            results = eqn.primitive.bind(
                *operands, **eqn.primitive.get_bind_params(eqn.params)
            )
            results = results if eqn.primitive.multiple_results else [results]
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [jnp.asarray(_read(env, v), v.aval.dtype) for v in wanted]

    def update(
        fixed_values: list[jax.Array],
        varying_values: list[jax.Array],
        params: list[jax.Array],
        grads: list[jax.Array],
        value: jax.Array,
        state: list[jax.Array],
    ) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
        env = dict(zip(fixed, fixed_values, strict=True))
        env |= dict(zip(varying, varying_values, strict=True))
        env |= dict(zip(arrays, [*params, *grads, value, *state], strict=True))
        _run_elementwise(inner, env, value.shape[-1])
        old = [*params, *state, value]
        made = [
            jnp.broadcast_to(_read(env, v), t.shape)
            for v, t in zip(results, old, strict=True)
        ]
        return made[: len(params)], made[len(params) : -1], made[-1]

    return Split(
        is_counter=is_counter,
        owners=tuple(
            owner
            for owner, c in zip(_owners(params, state), is_counter, strict=True)
            if not c
        ),
        fixed=lambda values: evaluate(fixed, values),
        varying=lambda values: (
            evaluate(varying, values),
            evaluate(new_counters, values),
        ),
        update=update,
    )


def _owners(params: Params, state: Any) -> list[int | None]:
    """For each leaf of the state, the parameter whose path and shape it has."""

    def leaves(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
        paths, _ = jax.tree.flatten_with_path(tree)
        return [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in paths]

    return [
        next(
            (
                i
                for i, (name, shape) in enumerate(leaves(params))
                if path.endswith(name) and shape == leaf_shape
            ),
            None,
        )
        for path, leaf_shape in leaves(state)
    ]


def _closure(jaxpr: Any, known: set[Any]) -> set[Any]:
    """`known` and the scalars that are computed from it alone."""
    known = set(known)
    for eqn in jaxpr.eqns:
        if all(isinstance(v, Literal) or v in known for v in eqn.invars) and not any(
            v.aval.shape for v in eqn.outvars
        ):
            known.update(eqn.outvars)
    return known


def _live(eqns: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """The equations on which results depend."""
    needed, live = {v for v in results if isinstance(v, Var)}, []
    for eqn in reversed(eqns):
        if needed.intersection(eqn.outvars):
            live.append(eqn)
            needed.update(v for v in eqn.invars if isinstance(v, Var))
    return live[::-1]


def _check_elementwise(eqns: Sequence[Any]) -> None:
    """Checks that all operands have the shape of the result, or are scalars."""
    for eqn in eqns:
        shapes = {v.aval.shape for v in eqn.invars} - {()}
        if (called := CALLS.get(eqn.primitive)) is not None:
            if not eqn.params[called].consts:
                _check_elementwise(eqn.params[called].jaxpr.eqns)
                continue
        elif eqn.primitive in _RESHAPES:
            if not shapes or shapes == {eqn.outvars[0].aval.shape}:
                continue
        elif eqn.primitive in _ELEMENTWISE and shapes <= {eqn.outvars[0].aval.shape}:
            continue
        raise ValueError(
            'expected an optimizer for kernel="fused" whose update is elementwise, got '
            f"one that uses {eqn.primitive.name}"
        )


def _run_elementwise(eqns: Sequence[Any], env: dict[Any, Any], networks: int) -> None:
    """Computes equations on arrays of many networks, and stores the results in env.

    Scalars that an equation broadcasts remain `[1, G]` until they meet an array.
    """
    for eqn in eqns:
        operands = [_read(env, v) for v in eqn.invars]
        if (called := CALLS.get(eqn.primitive)) is not None:
            closed: ClosedJaxpr = eqn.params[called]
            inside = dict(zip(closed.jaxpr.invars, operands, strict=True))
            _run_elementwise(closed.jaxpr.eqns, inside, networks)
            results = [_read(inside, v) for v in closed.jaxpr.outvars]
        elif eqn.primitive in _RESHAPES:
            results = operands[:1]
        else:
            results = [_apply(eqn, operands, networks)]
        env.update(zip(eqn.outvars, results, strict=True))


def _apply(eqn: Any, operands: list[Any], networks: int) -> jax.Array:
    """The result of one elementwise operation, of which some operands are scalars."""
    one = 1, networks
    shape = jnp.broadcast_shapes(one, *map(jnp.shape, operands))
    is_float = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    if (
        eqn.primitive is p.div_p
        and is_float
        and jnp.size(operands[1]) < math.prod(shape)
    ):
        # A division costs as much as ten products.
        numerator, denominator = operands
        inverse = 1 / jnp.broadcast_to(denominator, one)
        return numerator * jnp.broadcast_to(inverse, shape)
    operands = [jnp.broadcast_to(x, shape) for x in operands]
    if eqn.primitive is p.sign_p:  # its rule asks which device the process has
        (t,) = operands
        return jnp.where(t > 0, 1, jnp.where(t < 0, -1, t)).astype(t.dtype)
    return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))


def _read(env: dict[Any, Any], atom: Any) -> Any:
    if not isinstance(atom, Literal):
        return env[atom]
    aval: Any = atom.aval
    return lax.convert_element_type(atom.val, aval.dtype)
