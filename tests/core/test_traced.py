"""Functions as data: equal programs, exact results and bounded memory."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxbce import _traced
from tests.helpers import problem

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = problem((5, 8, 1)).arguments(np.float32)[0]
SHAPE = jax.ShapeDtypeStruct((3,), np.float32)
X = np.linspace(-1, 1, 3, dtype=np.float32)


def quadratic(params):
    return sum(jnp.sum((leaf - 0.3) ** 2) for leaf in jax.tree.leaves(params))


def init(optimizer, params):
    return optimizer.init(params)


def update(optimizer, params, state):
    value, grads = jax.value_and_grad(quadratic)(params)
    extra = {"value": value, "grad": grads, "value_fn": quadratic}
    optimizer = optax.with_extra_args_support(optimizer)
    return optimizer.update(grads, state, params, **extra)


def traced(optimizer):
    """The traced init and update of an optimizer."""
    state = jax.eval_shape(optimizer.init, PARAMS)
    return (
        _traced.trace(init, PARAMS, static=(optimizer,)),
        _traced.trace(update, PARAMS, state, static=(optimizer,)),
    )


def finite_sgd(learning_rate):
    return optax.apply_if_finite(optax.sgd(learning_rate), 3)


def jitted_sgd(learning_rate):
    optimizer = optax.sgd(learning_rate)
    step = jax.jit(lambda grads, state, params: optimizer.update(grads, state, params))
    return optax.GradientTransformation(optimizer.init, step)


OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "warmup": lambda rate: optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, rate, int(1000 * rate), 500)
    ),
    "rmsprop": optax.rmsprop,
    "lion": optax.lion,
    "clipped": lambda rate: optax.chain(
        optax.clip_by_global_norm(10 * rate), optax.sgd(rate)
    ),
    "cond": finite_sgd,
    "steps": lambda rate: optax.MultiSteps(optax.adam(rate), int(100 * rate) + 1),
    "scan": lambda rate: optax.lbfgs(rate, linesearch=None),
    "while": lambda rate: optax.chain(
        optax.sgd(rate), optax.scale_by_backtracking_linesearch(5, decrease_factor=0.7)
    ),
    "jit": jitted_sgd,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_other_numbers_make_an_equal_program_and_the_results_of_the_function(make):
    (init_a, update_a), (init_b, update_b) = traced(make(0.02)), traced(make(0.03))
    assert init_a.program == init_b.program
    assert update_a.program == update_b.program
    assert hash(update_a.program) == hash(update_b.program)
    assert update_a.constants != update_b.constants
    optimizer = make(0.03)
    state = optimizer.init(PARAMS)
    by_program = jax.jit(init_a.program)(init_b.constants, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, by_program, state)
    run = jax.jit(update_a.program)
    expected = jax.jit(update, static_argnums=0)(optimizer, PARAMS, state)
    got = run(update_b.constants, PARAMS, state)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.typeof(jax.tree.leaves(got)[0]) == jax.typeof(
        jax.tree.leaves(expected)[0]
    )
    other = run(update_a.constants, PARAMS, state)
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(other), strict=True)
    if make not in (OPTIMIZERS["warmup"], OPTIMIZERS["steps"]):  # first updates are 0
        assert any(np.any(a != b) for a, b in leaves)


def identity_with_tangent(factor):
    fun = jax.custom_jvp(lambda x: x)
    fun.defjvp(lambda primals, tangents: (primals[0], factor * tangents[0]))
    return fun


# Pairs of functions that must not share a program.
DIFFERENT = {
    "operation": (lambda x: x + 2.0, lambda x: x * 2.0),
    "operands": (lambda x: x - jnp.sin(x), lambda x: jnp.sin(x) - x),
    "axis": (
        lambda x: jnp.flip(jnp.outer(x, x), 0),
        lambda x: jnp.flip(jnp.outer(x, x), 1),
    ),
    "special number": (lambda x: x * 2.0, lambda x: x * 1.0),
    "sign of zero": (lambda x: x + 0.0, lambda x: x + -0.0),
    "dtype of number": (lambda x: (x, jnp.float16(2)), lambda x: (x, jnp.float32(2))),
    "weak type": (lambda x: (x, x.sum() * 0 + 2), lambda x: (x, jnp.array(2.0))),
    "exponent": (lambda x: x**2.5, lambda x: x**3.5),
    "results": (lambda x: (x, x + 2.0), lambda x: (x + 2.0, x)),
    "tree": (lambda x: (x, x), lambda x: [x, x]),
    "closed over": (
        lambda x: x + jnp.ones(3, np.float16),
        lambda x: x + jnp.ones(3, np.float32),
    ),
    "branch": (
        lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
        lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.tan, x),
    ),
    "length": (
        lambda x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x), x),
        lambda x: jax.lax.fori_loop(0, 4, lambda _, x: jnp.sin(x), x),
    ),
    "custom derivative": (identity_with_tangent(2.0), identity_with_tangent(3.0)),
    "custom derivative with arrays": (
        identity_with_tangent(2 * np.ones(3, np.float32)),
        identity_with_tangent(3 * np.ones(3, np.float32)),
    ),
    # Only the first one is seen to test for NaN.
    "finiteness": (jnp.isnan, lambda x: jax.jit(lambda a, b: a != b)(x, x)),
    "callback": (
        lambda x: jax.pure_callback(lambda x: x, SHAPE, x),
        lambda x: jax.pure_callback(lambda x: 2 * x, SHAPE, x),
    ),
}


@pytest.mark.parametrize("functions", DIFFERENT.values(), ids=DIFFERENT)
def test_different_functions_are_different_programs(functions):
    a, b = (_traced.trace(fun, SHAPE) for fun in functions)
    assert a.program != b.program
    for fun, (program, constants) in zip(functions, (a, b), strict=True):
        got, expected = jax.jit(program)(constants, X), jax.jit(fun)(X)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("fun", [jnp.sin, lambda x: 2.5], ids=["used", "unused"])
def test_different_arguments_are_different_programs(fun):
    programs = {
        _traced.trace(fun, jax.ShapeDtypeStruct(shape, dtype)).program
        for shape in ((3,), (4,))
        for dtype in (np.float32, np.float16)
    }
    assert len(programs) == 4


def test_a_custom_derivative_is_equal_to_itself_and_is_kept():
    a, b = (_traced.trace(identity_with_tangent(2.0), SHAPE) for _ in range(2))
    assert a.program == b.program
    _, tangent = jax.jvp(lambda x: a.program(b.constants, x), (X,), (X,))
    np.testing.assert_array_equal(tangent, 2 * X)


def test_results_are_remembered_by_static_argument_types_and_settings():
    calls = []

    @_traced.remember
    def remembered(factor, x):
        calls.append(factor)
        return _traced.trace(lambda x: factor * x, x)

    a, *_ = [remembered(2.5, x) for x in (X, X + 1, np.asarray(X))]
    assert calls == [2.5]
    with jax.enable_x64(True):
        b = remembered(2.5, np.asarray(X, np.float64))
    assert calls == [2.5, 2.5]
    assert a.program != b.program
    remembered(1.5, X)
    assert calls[2:] == [1.5]
    with jax.set_mesh(jax.make_mesh((2,), ("devices",))):
        remembered(1.5, np.asarray(X))
    assert calls[3:] == [1.5]


def test_nothing_is_remembered_of_what_has_no_hash_or_is_transformed():
    calls = []

    @_traced.remember
    def remembered(static, x):
        calls.append(static)
        return x

    for _ in range(2):
        remembered([], X)
        jax.vmap(lambda x: remembered(0, x))(X)
    assert calls == [[], 0, [], 0]


def test_tracers_are_constants():
    traces = []

    def run(program, constants, x):
        traces.append(program)
        return program(constants, x)

    def fun(rate):
        program, constants = _traced.trace(lambda x: rate * x + 2.5, SHAPE)
        return _traced.jitted(run, program)(constants, X)

    rates = np.array([1.5, 2.5], np.float32)
    with jax.check_tracer_leaks():
        by_vmap = jax.vmap(fun)(rates)
        jax.vmap(fun)(2 * rates)
        assert len(traces) == 1
        value, tangent = jax.jvp(fun, (rates[0],), (np.float32(1),))
        by_jit = jax.jit(fun)(rates[0])
    expected = rates[:, None] * X + np.float32(2.5)
    np.testing.assert_allclose(by_vmap, expected, rtol=1e-6)
    np.testing.assert_allclose([value, by_jit], expected[[0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(tangent, X)


def test_effects_are_kept(capfd):
    def fun(x):
        jax.debug.print("the sum is {}", x.sum(), ordered=True)
        return 2.5 * x

    program, constants = _traced.trace(fun, SHAPE)
    jax.jit(program)(constants, X)
    jax.effects_barrier()
    assert "the sum is" in capfd.readouterr().out


def test_a_function_raises_its_own_error():
    with pytest.raises(ZeroDivisionError):
        _traced.trace(lambda x: x / (1 // 0), SHAPE)
    program, constants = _traced.trace(jnp.sin, SHAPE)
    with pytest.raises(TypeError, match="expected arguments"):
        program(constants, X, X)


def test_the_compiled_functions_in_memory_are_bounded():
    bound = _traced.jitted.cache_info().maxsize or 0
    alive = weakref.WeakSet()

    def power(n, x):
        return x**n

    def call(n):
        fun = _traced.jitted(power, n)
        alive.add(fun)
        if n < 3:
            fun(X)

    for n in range(bound + 3):
        call(n)
    gc.collect()
    assert len(alive) == bound > 0


def test_an_array_that_a_function_closes_over_has_the_dtype_of_its_trace():
    """JAX remembers the dtype that a NumPy array had when x64 was enabled."""
    array = np.arange(5)

    def is_at(i):
        return i == array

    for enabled in (True, False):
        with jax.enable_x64(enabled), jax.numpy_dtype_promotion("standard"):
            jax.make_jaxpr(is_at)(np.int32(0))
            program, constants = _traced.trace(is_at, np.int32(0))
            found = jax.jit(lambda *args, p=program: p(*args))(constants, np.int32(2))
            np.testing.assert_array_equal(found, array == 2)
            assert constants[0].dtype == ("int64" if enabled else "int32")
