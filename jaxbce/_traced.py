"""Traces functions into hashable programs and their numeric constants.

`optax.adam(0.1)` and `optax.adam(0.01)` are different objects, but one program with
different numbers. `trace` separates the two. A function that is compiled for a program,
and takes its numbers as an argument, is compiled once for both optimizers.

Python code, such as `1 - b1`, runs during the trace. The numbers are therefore exactly
those that the function itself would use. The results are too, except where XLA would
combine several known numbers of a product, which rounds differently.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, get_opaque_trace_state
from jax.extend.core.primitives import (
    cond_p,
    custom_jvp_call_p,
    jit_p,
    pow_p,
    scan_p,
    while_p,
)


class Traced(NamedTuple):
    """A function as data: its result is `program(constants, *args)`.

    Attributes:
      program: The operations. Two programs are equal if they differ only in the values
        of their constants.
      constants: The numbers in the function, and the arrays that it closes over, which
        may be tracers.
    """

    program: "Program"
    constants: tuple[Any, ...]


def trace(fun: Callable[..., Any], *args: Any, static: tuple[Any, ...] = ()) -> Traced:
    """Traces `fun(*static, *args)` at the shapes and dtypes of `args`.

    The numbers 0, 1, −1, inf and NaN remain in the program, because XLA simplifies
    arithmetic with them. So do exponents, and numbers within custom derivatives.

    Args:
      fun: A function of arrays.
      *args: Arrays, tracers or `jax.ShapeDtypeStruct`s, in any pytrees.
      static: The first arguments of `fun`, any objects, such as an optimizer. They and
        `fun` may close over tracers.
    """
    function = functools.partial(fun, *static)
    closed, result = jax.make_jaxpr(function, return_shape=True)(*args)
    constants: list[Any] = []
    block = _Block(closed, constants)
    used = {v for eqn in closed.jaxpr.eqns for v in eqn.invars if isinstance(v, Var)}
    used.update(v for v in closed.jaxpr.outvars if isinstance(v, Var))
    program = Program(
        block,
        jax.tree.structure(args),
        jax.tree.structure(result),
        is_used=tuple(v in used for v in closed.jaxpr.invars),
        tests_finiteness=bool(_FINITENESS.search(str(closed))),
    )
    return Traced(program, tuple(constants))


# `jnp.isfinite`, and `jnp.isnan`, which is x != x.
_FINITENESS = re.compile(r"is_finite|\bne (\w+) \1\b")
_OUTERMOST = get_opaque_trace_state()  # when this module is imported


def remember(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers the last results of `fun(static, *args)`, by the types of the args.

    Nothing is remembered inside a transformation, where `static` and the result may
    hold tracers, nor if `static` is not hashable.
    """

    @functools.lru_cache(maxsize=64, typed=True)
    def remembered(static: Any, types: tuple[Any, ...], tree: Any, _: Any) -> Any:
        return fun(static, *jax.tree.unflatten(tree, types))

    @functools.wraps(fun)
    def call(static: Any, *args: Any) -> Any:
        try:
            hash(static)
        except TypeError:
            return fun(static, *args)
        if get_opaque_trace_state() != _OUTERMOST:
            return fun(static, *args)
        leaves, tree = jax.tree.flatten(args)
        context = (
            jax.sharding.get_abstract_mesh(),
            *(getattr(jax.config, name) for name in _SETTINGS),
        )
        return remembered(static, tuple(map(jax.typeof, leaves)), tree, context)

    return call


# The settings of JAX on which a trace depends, besides its arguments and the mesh.
_SETTINGS = (
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_random_seed_offset",
)


@functools.lru_cache(maxsize=64, typed=True)
def jitted(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """`jax.jit` of `function` with its first arguments fixed to hashable values.

    The least recently used functions are freed, with everything that was compiled for
    them. With static arguments of `jax.jit`, each program would be kept forever.
    """
    return jax.jit(functools.partial(function, *static))


class Program:
    """The operations of a traced function. Equal structure makes equal programs.

    Attributes:
      is_used: Which of its arguments, as a flat list, it reads.
      tests_finiteness: Whether it looks for values that are infinite or NaN.
    """

    def __init__(
        self,
        block: "_Block",
        in_tree: Any,
        out_tree: Any,
        *,
        is_used: tuple[bool, ...],
        tests_finiteness: bool,
    ):
        self.is_used, self.tests_finiteness = is_used, tests_finiteness
        self._block, self._in_tree, self._out_tree = block, in_tree, out_tree
        self._key = (block.key, in_tree, out_tree, is_used, tests_finiteness)
        self._hash = hash(self._key)  # once, because keys are large

    def __call__(self, constants: Sequence[Any], *args: Any) -> Any:
        """The result of the function, with the constants of any equal program."""
        leaves, tree = jax.tree.flatten(args)
        if tree != self._in_tree:
            raise TypeError(f"expected arguments {self._in_tree}, got {tree}")
        return jax.tree.unflatten(self._out_tree, self._block(constants, leaves))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        return self._hash == other._hash and self._key == other._key


class _Constant(NamedTuple):
    """The operand that is one of the constants of the program."""

    number: int
    aval: Any


@dataclasses.dataclass(frozen=True)
class _Static:
    """An operand that remains in the block, compared by its key."""

    value: Any = dataclasses.field(compare=False)
    key: Any


class _Same:
    """A key that equals only the key of the same object, which it keeps alive."""

    def __init__(self, value: Any):
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


class _Block:
    """A jaxpr as a list of steps, in which calls of jitted functions are inlined.

    The values of a block are numbered: first its arguments, then the results of its
    steps. An operand is the number of a value, a `_Constant` or a `_Static`. The blocks
    of a program, such as those of the branches of a `cond`, share its constants.

    Attributes:
      key: All that determines the operations; hashable.
    """

    def __init__(
        self, closed: Any, constants: list[Any] | None, has_rules: bool = True
    ):
        """Flattens a closed jaxpr.

        Args:
          closed: The jaxpr.
          constants: The list to which its constants are appended; if None, they remain
            in the block, which is then only of use for its key.
          has_rules: Whether the key includes the rules of custom derivatives.
        """
        self._constants, self._has_rules = constants, has_rules
        self._steps: list[tuple[Callable[..., Any], Any, list[Any]]] = []
        self._keys: list[Any] = [tuple(v.aval for v in closed.jaxpr.invars)]
        self._size = len(closed.jaxpr.invars)
        self._outputs = self._inline(closed, list(range(self._size)))
        self.key = (*self._keys, tuple(self._outputs))
        del self._constants, self._keys

    def __call__(self, constants: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        values = list(args)

        def read(operand: Any) -> Any:
            if isinstance(operand, int):
                return values[operand]
            if isinstance(operand, _Constant):
                return constants[operand.number]
            return operand.value

        for run, context, operands in self._steps:
            with context.manager:
                values.extend(run(constants, [read(operand) for operand in operands]))
        return [read(operand) for operand in self._outputs]

    def _inline(self, closed: Any, operands: list[Any]) -> list[Any]:
        """Appends the steps of a jaxpr, and returns the operands that it returns."""
        jaxpr = closed.jaxpr
        env = dict(zip(jaxpr.invars, operands, strict=True))
        for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
            # JAX keeps the dtype that a NumPy array had under another jax_enable_x64.
            dtype, key = jax.dtypes.canonicalize_dtype(value.dtype), _Same(value)
            if dtype != value.dtype:
                value = np.asarray(value, dtype)
            env[var] = self._constant(value, var.aval.update(dtype=dtype), key)
        for eqn in jaxpr.eqns:
            # XLA compiles a known exponent to other operations, such as a root.
            operands = [
                self._operand(env, v, is_static=eqn.primitive is pow_p and i == 1)
                for i, v in enumerate(eqn.invars)
            ]
            if _is_plain_jit(eqn):
                results = self._inline(eqn.params["jaxpr"], operands)
            else:
                run, key = self._step(eqn)
                self._steps.append((run, eqn.ctx, operands))
                avals = tuple(v.aval for v in eqn.outvars)
                # JAX's context has no comparison. Its text is complete; if it had an
                # address, the step keeps the context alive.
                self._keys.append((key, repr(eqn.ctx), tuple(operands), avals))
                results = list(range(self._size, self._size + len(avals)))
                self._size += len(avals)
            env.update(zip(eqn.outvars, results, strict=True))
        return [self._operand(env, v) for v in jaxpr.outvars]

    def _operand(self, env: dict[Any, Any], atom: Any, is_static: bool = False) -> Any:
        if not isinstance(atom, Literal):
            return env[atom]
        value: Any = np.asarray(atom.val)
        aval: Any = atom.aval
        key = (aval, value.dtype, value.shape, value.tobytes())
        # Of the types that JAX accepts, only Python numbers are weakly typed.
        number = value.item() if aval.weak_type else value[()]
        type_ = jax.typeof(number)
        if (
            is_static
            or value.dtype == bool
            or value.shape
            or value in (-1, 0, 1)
            or not np.isfinite(value)
            or (type_.dtype, type_.weak_type) != (aval.dtype, aval.weak_type)
        ):
            return _Static(atom.val, key)
        return self._constant(number, aval, key)

    def _constant(self, value: Any, aval: Any, key: Any) -> Any:
        if self._constants is None:
            return _Static(value, key)
        self._constants.append(value)
        return _Constant(len(self._constants) - 1, aval)

    def _step(self, eqn: Any) -> tuple[Callable[..., Any], Any]:
        """The function `run(constants, operands)` of an equation, and its key."""
        params = dict(eqn.params)
        if self._constants is not None:
            if eqn.primitive is cond_p and params.keys() == {"branches"}:
                return self._cond(**params)
            if eqn.primitive is while_p:
                return self._while(**params)
            if eqn.primitive is scan_p and params.keys() == _SCAN_PARAMS:
                return self._scan(**params)
        bind_params = eqn.primitive.get_bind_params(params)

        def run(_: Any, operands: list[Any]) -> Any:
            results = eqn.primitive.bind(*operands, **bind_params)
            return results if eqn.primitive.multiple_results else [results]

        if eqn.primitive is custom_jvp_call_p:
            # The rule is a new object in each trace, so its derivative is compared.
            rule = params.pop("jvp_jaxpr_fun")
            if self._has_rules:
                params["derivative"] = _derivative(eqn, run) or _Same(rule)
        return run, (eqn.primitive, self._key(params))

    def _key(self, value: Any) -> Any:
        """A hashable key of a parameter of an equation."""
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(self._key, value))
        if isinstance(value, dict):
            return tuple((name, self._key(item)) for name, item in value.items())
        if isinstance(value, Jaxpr) and not hasattr(value, "consts"):
            value = ClosedJaxpr(value, [])  # one class since JAX 0.11
        if isinstance(value, (Jaxpr, ClosedJaxpr)):
            return _Block(value, None, has_rules=self._has_rules).key
        if isinstance(value, (float, complex, np.generic)):
            # As numbers, -0.0 equals 0.0, and NaN does not equal NaN.
            return type(value), np.asarray(value).tobytes()
        try:
            hash(value)
        except TypeError:
            return _Same(value)
        return type(value), value

    def _cond(self, branches: Any) -> tuple[Callable[..., Any], Any]:
        blocks = [_Block(branch, self._constants) for branch in branches]

        def run(constants: Any, operands: list[Any]) -> Any:
            functions = [lambda *args, b=b: b(constants, args) for b in blocks]
            return lax.switch(operands[0], functions, *operands[1:])

        return run, ("cond", *(block.key for block in blocks))

    def _while(
        self, cond_nconsts: int, cond_jaxpr: Any, body_nconsts: int, body_jaxpr: Any
    ) -> tuple[Callable[..., Any], Any]:
        cond = _Block(cond_jaxpr, self._constants)
        body = _Block(body_jaxpr, self._constants)
        n = cond_nconsts + body_nconsts

        def run(constants: Any, operands: list[Any]) -> Any:
            for_cond, for_body = operands[:cond_nconsts], operands[cond_nconsts:n]
            return lax.while_loop(
                lambda carry: cond(constants, [*for_cond, *carry])[0],
                lambda carry: body(constants, [*for_body, *carry]),
                operands[n:],
            )

        return run, ("while", cond_nconsts, cond.key, body_nconsts, body.key)

    def _scan(
        self, jaxpr: Any, num_consts: int, num_carry: int, **options: Any
    ) -> tuple[Callable[..., Any], Any]:
        body = _Block(jaxpr, self._constants)
        n = num_consts + num_carry

        def run(constants: Any, operands: list[Any]) -> Any:
            def step(carry: Any, x: Any) -> tuple[Any, Any]:
                results = body(constants, [*operands[:num_consts], *carry, *x])
                return results[:num_carry], results[num_carry:]

            carry, xs = operands[num_consts:n], operands[n:]
            carry, ys = lax.scan(step, carry, xs, **options)
            return [*carry, *ys]

        return run, ("scan", num_consts, num_carry, self._key(options), body.key)


# An equation with other parameters is bound as it is.
_SCAN_PARAMS = {"jaxpr", "num_consts", "num_carry", "length", "reverse", "unroll"}


def _is_plain_jit(eqn: Any) -> bool:
    """Whether it calls a jitted function, without shardings or compiler options."""
    if eqn.primitive is not jit_p:
        return False
    params = eqn.params
    shardings = (*params["in_shardings"], *params["out_shardings"])
    return not params["compiler_options_kvs"] and not any(
        isinstance(s, jax.sharding.Sharding) for s in shardings
    )


def _derivative(eqn: Any, run: Callable[..., Any]) -> Any:
    """The key of the derivative of an equation, or None if that is not comparable.

    Custom rules within the derivative are not compared: they only matter to the second
    derivative.
    """
    avals = [v.aval for v in eqn.invars]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    floating = [i for i, a in enumerate(avals) if jnp.issubdtype(a.dtype, jnp.inexact)]

    def derivative(args: list[Any], tangents: list[Any]) -> Any:
        def fun(*floats: Any) -> Any:
            operands = list(args)
            for i, value in zip(floating, floats, strict=True):
                operands[i] = value
            return run((), operands)

        return jax.jvp(fun, [args[i] for i in floating], tangents)

    try:
        closed = jax.make_jaxpr(derivative)(shapes, [shapes[i] for i in floating])
    except Exception:  # a rule that fails is an error only if it is needed
        return None
    return None if closed.consts else _Block(closed, None, has_rules=False).key
