import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbce
from experiments.support import baselines, timing
from jaxbce import gradients
from jaxbce._blocks import sum_over_blocks
from jaxbce._layouts import ROWS, Columns
from jaxbce.network import propagate
from tests.helpers import (
    LAYOUTS,
    NETWORKS,
    TOLERANCE,
    WITHOUT_ONES,
    autodiff,
    loss_reference,
    member,
    options,
    problem,
    relative_error,
)

OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "weights": {"sample_weight": True},
    "pos_weight": {"pos_weight": 2.5},
    "everything": {"sample_weight": True, "pos_weight": 2.5, "reduction": "sum"},
}
BLOCKS = [None, "auto", 1, 7, 36, 37, 1000]


IN_BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)


@functools.partial(jax.jit, static_argnames="layout")
def of_every_option(params, x, y, sample_weight, pos_weight, *, layout):
    """Value and gradient with each of OPTIONS, in one program per shape and dtype."""
    weights = {"sample_weight": sample_weight, "pos_weight": pos_weight}
    return {
        name: LAYOUTS[layout](
            params, x, y, **{k: weights.get(k, v) for k, v in chosen.items()}
        )
        for name, chosen in OPTIONS.items()
    }


@functools.cache
def found_and_rounded(sizes, dtype, layout):
    p = problem(sizes).rounded(dtype)
    with jax.enable_x64(dtype == "float64"):
        s = p.sample_weight.astype(jnp.dtype(dtype))
        wide = np.float64 if dtype == "float64" else np.float32
        return of_every_option(*p.arguments(dtype), s, wide(2.5), layout=layout), p


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
def test_value_and_gradient_are_autodiffs_in_float64(sizes, name, dtype, layout):
    found, p = found_and_rounded(sizes, dtype, layout)
    value, grads = found[name]
    with jax.enable_x64(dtype == "float64"):
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, p.arguments(dtype)[0])
    truth = autodiff(p, **OPTIONS[name])
    assert (
        relative_error((value, grads), (truth.value, truth.params)) <= TOLERANCE[dtype]
    )
    assert value.dtype == (jnp.float32 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("name", ["mean", "everything"])
def test_columns_need_no_row_of_ones(name):
    p = problem((5, 6, 3, 2))
    with jax.enable_x64(True):
        found = WITHOUT_ONES(*p.arguments(np.float64), **options(p, OPTIONS[name]))
    truth = autodiff(p, **OPTIONS[name])
    assert relative_error(found, (truth.value, truth.params)) <= TOLERANCE["float64"]


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(
    "layout",
    [ROWS, Columns(3), Columns(3, has_ones=False)],
    ids=[*LAYOUTS, "no ones"],
)
def test_bfloat16_activations_have_sums_and_deltas_in_float32(layout, outputs):
    def derivation(params, x):
        params = layout.convert(params)
        a, h = propagate(params, layout.arrange(layout.pad(x)), layout)
        delta = gradients.pull_back(params, jaxbce.Activations(a, h), a[-1], layout)
        return h[:-1], (a, delta, gradients.contract(h[:-1], delta, layout))

    params = jaxbce.init(jax.random.key(0), (3, 4, outputs), dtype="bfloat16")
    h, sums = jax.eval_shape(derivation, params, jnp.ones((5, 3), "bfloat16"))
    assert {t.dtype.name for t in h} == {"bfloat16"}
    assert {t.dtype.name for t in jax.tree.leaves(sums)} == {"float32"}


DIFFERENTIATED = ["mean", "weights", "everything"]


@functools.cache
def differentiated(sizes):
    """What JAX makes of `loss` with each of these options, in one program."""
    p = problem(sizes)

    @jax.jit
    def derivatives(*arguments):
        found = {}
        for name in DIFFERENTIATED:
            extra = options(p, OPTIONS[name])
            weights = {k: extra.pop(k) for k in list(extra) if "weight" in k}

            def loss(params, x, y, weights, extra=extra):
                return jaxbce.loss(params, x, y, **weights, **extra)

            case: Any = (*arguments, jax.tree.map(jnp.float64, weights))
            tangents = jax.tree.map(jnp.cos, case)
            together = jaxbce.value_and_grad(*arguments, **weights, **extra)
            alone = jaxbce.grad(*arguments, **weights, **extra)
            backward = jax.grad(loss, (0, 1, 2, 3))(*case)
            forward = jax.jvp(loss, case, tangents)
            found[name] = backward, forward, tangents, loss(*case), together, alone
        return found

    with jax.enable_x64(True):
        return derivatives(*p.arguments()), p


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_jax_differentiates_loss_through_the_derivation_in_every_argument(sizes, name):
    found, p = differentiated(sizes)
    (*backward, weights), forward, tangents, loss, together, alone = found[name]
    truth = autodiff(p, **OPTIONS[name])
    assert relative_error(backward, truth[1:4]) <= TOLERANCE["float64"]
    assert weights.keys() == {k for k in OPTIONS[name] if "weight" in k}
    for k, derivative in weights.items():
        assert relative_error(derivative, getattr(truth, k)) <= TOLERANCE["float64"]
    assert relative_error(forward[0], truth.value) <= TOLERANCE["float64"]
    slopes = [truth.params, truth.x, truth.y, {k: getattr(truth, k) for k in weights}]
    slope = sum(
        np.sum(g * np.asarray(t))
        for g, t in zip(jax.tree.leaves(slopes), jax.tree.leaves(tangents), strict=True)
    )
    assert relative_error(forward[1], slope) <= TOLERANCE["float64"]
    value, grads = together
    assert relative_error(grads, backward[0]) <= 1e-15
    assert relative_error(value, loss) <= 1e-15
    assert relative_error(alone, grads) == 0


@functools.cache
def hessian_reference():
    with jax.enable_x64(True):
        return jax.jit(jax.hessian(loss_reference))(*problem((4, 3, 2)).arguments())


@pytest.mark.parametrize("block_size", [None, 10])
@pytest.mark.parametrize(
    "second",
    [jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))],
    ids=["forward over reverse", "reverse over reverse"],
)
def test_hessian_of_loss_is_autodiffs(second, block_size):
    with jax.enable_x64(True):
        loss = functools.partial(jaxbce.loss, block_size=block_size)
        mine = jax.jit(second(loss))(*problem((4, 3, 2)).arguments())
    assert relative_error(mine, hessian_reference()) <= 1e-12


@pytest.mark.usefixtures("standard_promotion")
def test_second_derivatives_are_exact_in_the_tail():
    params = (jaxbce.Layer(jnp.ones((1, 1)), jnp.zeros(1)),)
    hessian = jax.jit(jax.hessian(jaxbce.loss))

    @jax.jit
    @jax.jacfwd
    def in_pos_weight(p, params, x):
        return jaxbce.grad(params, x, np.ones((1, 1), "f"), pos_weight=p)[0].b

    for a in (10.0, 20.0, 40.0, 80.0):
        x = np.full((1, 1), a, "f")
        h = hessian(params, x, np.ones((1, 1), "f"))
        truth = np.exp(-a) / (1 + np.exp(-a)) ** 2  # σ(a) σ(−a)
        np.testing.assert_allclose(h[0].b[0].b, truth, rtol=1e-6)
        slope = in_pos_weight(np.float32(1), params, x)
        np.testing.assert_allclose(slope, [-np.exp(-a) / (1 + np.exp(-a))], rtol=1e-6)


def test_corrupting_pull_back_corrupts_every_derivative_of_loss(monkeypatch):
    params, x, y = problem((5, 4, 1)).arguments(np.float32)
    honest = gradients.pull_back

    def derivatives(v):
        # Under a jit of its own: the library's would keep the trace it has.
        def loss(params):
            return inspect.unwrap(jaxbce.loss)(params, x, y)

        def both(params, v):
            return loss(params), jax.grad(loss)(params), jax.jvp(loss, (params,), (v,))

        return jax.jit(both)(params, v)

    def corrupt(*args, **kwargs):
        return tuple(3 * d for d in honest(*args, **kwargs))

    value, right, _ = derivatives(params)
    with monkeypatch.context() as patched:
        patched.setattr(gradients, "pull_back", corrupt)
        same_value, wrong, (_, tangent) = derivatives(right)
    assert relative_error(wrong, jax.tree.map(lambda g: 3 * g, right)) <= 1e-6
    squared = sum(np.sum(np.square(g)) for g in jax.tree.leaves(right))
    np.testing.assert_allclose(tangent, 3 * squared, rtol=1e-5)
    assert same_value == value
    assert relative_error(derivatives(right)[1], right) == 0


@functools.cache
def by_blocks(block_size, name):
    p = problem((6, 5, 4, 2), rows=37)
    extra = options(p, OPTIONS[name]) | {"block_size": block_size}

    @jax.jit
    def everything(*arguments):
        loss = functools.partial(jaxbce.loss, **extra)
        in_x_and_y = jax.grad(loss, argnums=(1, 2))(*arguments)
        of_layouts = [fun(*arguments, **extra) for fun in LAYOUTS.values()]
        return of_layouts, loss(*arguments), in_x_and_y

    with jax.enable_x64(True):
        return everything(*p.arguments())


@pytest.mark.slow_ids("mean-7", "mean-36", "everything-1")
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("name", ["mean", "everything"])
def test_blocks_equal_one_pass(block_size, name):
    (one, columns), value, in_x_and_y = by_blocks(None, name)
    blocks, loss, by_row = by_blocks(block_size, name)
    assert relative_error(value, one[0]) <= 1e-14
    assert relative_error(columns, one) <= 1e-14
    assert relative_error(blocks, [one, one]) <= 1e-14
    assert relative_error(loss, one[0]) <= 1e-14
    assert relative_error(by_row, in_x_and_y) <= 1e-13


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_any_number_of_rows_works_with_any_block_size(rows):
    @jax.jit
    def of_each_size(*arguments):
        return [
            jaxbce.value_and_grad(*arguments, block_size=size)
            for size in (None, 1, 2, 3, 7)
        ]

    with jax.enable_x64(True):
        arguments = problem((3, 4, 1), rows=rows, seed=rows).arguments()
        one, *many = of_each_size(*arguments)
    for found in many:
        assert relative_error(found, one) <= 1e-13


def test_temporary_memory_is_constant_in_the_number_of_rows():
    def temporary(rows):
        p = problem((30, 64, 1), rows=rows)
        compiled = jaxbce.value_and_grad.lower(*p.arguments(np.float32)).compile()
        return timing.temp_bytes(compiled)

    small, large = temporary(2**17), temporary(2**18 + 1)
    assert large <= 1.1 * small
    assert large <= 2 * 2**20


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
def test_scikit_learns_backward_pass_agrees(sizes, layout):
    found, p = found_and_rounded(sizes, "float64", layout)
    theirs = baselines.scikit_learn_gradient(*p[:3])
    _, grads = found["mean"]
    assert relative_error(jax.tree.leaves(grads), theirs) <= TOLERANCE["float64"]


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize("sizes", [(7, 5, 1), (6, 8, 7, 5, 1)])
def test_scikit_learns_backward_pass_agrees_with_weights(sizes, layout):
    p = problem(sizes)
    p = p._replace(y=np.round(p.y))
    with jax.enable_x64(True):
        case = *p.arguments(), p.sample_weight, np.float64(3)
        found = of_every_option(*case, layout=layout)
    # With one output and hard labels a positive class's weight is the rows' own.
    s = p.sample_weight * np.where(p.y[:, 0] == 1, 3.0, 1.0)
    theirs = baselines.scikit_learn_gradient(*p[:3], sample_weight=s)
    theirs = [s.sum() * leaf for leaf in theirs]
    _, grads = found["everything"]
    assert relative_error(jax.tree.leaves(grads), theirs) <= TOLERANCE["float64"]


def test_pos_weights_of_each_output_are_differentiated_by_output():
    p = problem((4, 3, 2))
    weights = {"sample_weight": p.sample_weight, "reduction": "sum"}

    @jax.jit
    def in_pos_weight(q, *arguments):
        return [
            jax.grad(lambda q: loss(*arguments, pos_weight=q, **weights))(q)  # noqa: B023
            for loss in (jaxbce.loss, loss_reference)
        ]

    with jax.enable_x64(True):
        mine, truth = in_pos_weight(np.array([0.5, 3.0]), *p.arguments())
    assert relative_error(mine, truth) <= TOLERANCE["float64"]


def test_the_derivative_in_a_weight_of_zero_is_autodiffs():
    p = problem((4, 3, 2))
    s = np.where(np.arange(37) % 5, p.sample_weight, 0)

    @jax.jit
    def in_sample_weight(s, *arguments):
        return [
            jax.grad(lambda s: loss(*arguments, sample_weight=s))(s)  # noqa: B023
            for loss in (jaxbce.loss, loss_reference)
        ]

    with jax.enable_x64(True):
        mine, truth = in_sample_weight(s, *p.arguments())
    assert relative_error(mine, truth) <= TOLERANCE["float64"]


def test_deltas_are_the_derivatives_in_the_pre_activations():
    p = problem((5, 6, 4, 2))
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        offsets = tuple(np.zeros((len(x), len(layer.b))) for layer in params)

        @jax.jit
        @jax.grad
        def shifted(offsets):
            h = x
            for (w, b), e in zip(params[:-1], offsets[:-1], strict=True):
                h = jax.nn.relu(h @ w + b + e)
            a = h @ params[-1].w + params[-1].b + offsets[-1]
            ell = 2 * y * jax.nn.softplus(-a) + (1 - y) * jax.nn.softplus(a)
            return jnp.sum(ell)

        truth = shifted(offsets)
        trace = jaxbce.forward(params, x)
        mine = jaxbce.deltas(params, trace, y, pos_weight=2.0)
        assert relative_error(mine, truth) <= TOLERANCE["float64"]
        s = p.sample_weight
        mine = jaxbce.deltas(params, trace, y, pos_weight=2.0, sample_weight=s)
        truth = [s[:, None] * np.asarray(d) for d in truth]
        assert relative_error(mine, truth) <= TOLERANCE["float64"]


def test_relu_has_derivative_zero_at_zero():
    w = jnp.array([[1.0, -1.0]])
    params = (jaxbce.Layer(w, jnp.zeros(2)), jaxbce.Layer(w.T, jnp.zeros(1)))
    x, y = jnp.zeros((1, 1)), jnp.ones((1, 1))
    grads, dx = jax.grad(jaxbce.loss, argnums=(0, 1))(params, x, y)
    np.testing.assert_array_equal(grads[0].b, 0)
    np.testing.assert_array_equal(dx, 0)
    assert grads[1].b == -0.5
    np.testing.assert_array_equal(jaxbce.chain_rule(params, x, y).dh1_da1, 0)


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_loss_and_gradient_are_exact_in_the_tail(dtype, y, layout):
    # One weight of 1 and no bias: the logit is x, exactly.
    params = (jaxbce.Layer(jnp.ones((1, 1), dtype), jnp.zeros(1, dtype)),)
    label = np.full((1, 1), y, "f")
    for a in np.linspace(0.25, 80, 320) * (1 if y else -1):
        x = np.full((1, 1), a).astype(jnp.dtype(dtype))
        value, grads = LAYOUTS[layout](params, x, label)
        a = abs(float(x[0, 0]))
        tolerance = 1e-6 if dtype == "float32" else 2.0**-7
        np.testing.assert_allclose(value, np.log1p(np.exp(-a)), rtol=tolerance)
        slope = np.exp(-a) / (1 + np.exp(-a))
        found = abs(float(np.asarray(grads[0].b)[0]))
        np.testing.assert_allclose(found, slope, rtol=tolerance)


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize("block_size", [None, 1])
def test_infinite_logits_give_finite_gradients(block_size, layout):
    # Logits of inf, −inf, 1, from biases that weights and features keep finite.
    params = (jaxbce.Layer(jnp.ones((1, 3)), jnp.array([jnp.inf, -jnp.inf, 0.0])),)
    x = jnp.ones((2, 1))
    right, wrong = jnp.array([[1.0, 0.0, 1.0]] * 2), jnp.array([[0.0, 1.0, 1.0]] * 2)
    kwargs = {"reduction": "sum", "block_size": block_size}
    value, grads = LAYOUTS[layout](params, x, right, **kwargs)
    assert np.isfinite(value)
    np.testing.assert_array_equal(np.asarray(grads[0].b)[:2], [0, 0])
    value, grads = LAYOUTS[layout](params, x, wrong, **kwargs)
    assert value == jnp.inf
    np.testing.assert_array_equal(np.asarray(grads[0].b)[:2], [2, -2])
    assert np.isfinite(jax.tree.leaves(grads)[0]).all()


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize("block_size", [None, 2])
def test_rows_of_weight_zero_count_for_nothing_whatever_their_data(block_size, layout):
    p = problem((3, 4, 1), rows=6)
    params, x, y = p.arguments(np.float32)
    truth = jaxbce.value_and_grad(params, x[2:], y[2:])
    s = np.array([0, 0, 1, 1, 1, 1], "f")
    for bad in (3e38, np.inf, np.nan):  # 3e38 is finite, its loss is infinite
        worse = np.concatenate([np.full_like(x[:2], bad), x[2:]])
        counted, _ = LAYOUTS[layout](params, worse, y, sample_weight=np.ones(6, "f"))
        assert not np.isfinite(counted)
        options = {"sample_weight": s, "block_size": block_size}
        unknown = np.concatenate([np.full_like(y[:2], np.nan), y[2:]])
        found = LAYOUTS[layout](params, worse, unknown, **options)
        assert relative_error(found, truth) <= 1e-6


@pytest.mark.parametrize("scale", [2.0**124, 2.0**100, 2.0**-100, 2.0**-120])
def test_the_mean_is_relative_to_weights_of_any_size(scale):
    p = problem((5, 4, 1))
    params, x, y = p.arguments(np.float32)
    s = p.sample_weight.astype("f")
    s[0] = 0
    differentiate = jax.value_and_grad(
        lambda params, s: jaxbce.loss(params, x, y, sample_weight=s), argnums=(0, 1)
    )
    value, (grads, slope) = differentiate(params, s)
    scaled_value, (scaled_grads, scaled_slope) = differentiate(params, scale * s)
    assert scaled_value == value
    assert relative_error(scaled_grads, grads) == 0
    if scale < 2.0**120:  # it is subnormal there
        assert relative_error(scale * scaled_slope, slope) <= 1e-6


def test_a_batch_is_the_mean_of_its_rows_in_any_order():
    p = problem((5, 6, 2), rows=11)
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        batch = jaxbce.value_and_grad(params, x, y)
        order = np.random.default_rng(0).permutation(11)
        shuffled = jaxbce.value_and_grad(params, p.x[order], p.y[order])
        assert relative_error(shuffled, batch) <= 1e-13
        of_each = jax.jit(jax.vmap(jaxbce.value_and_grad, (None, 0, 0)))
        rows = of_each(params, p.x[:, None], p.y[:, None])
        mean = jax.tree.map(lambda t: np.mean(t, axis=0), rows)
        assert relative_error(mean, batch) <= 1e-13


def test_weights_of_two_are_rows_given_twice():
    p = problem((5, 6, 2), rows=9)
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        s = np.array([1.0, 2.0, 1.0] * 3)
        twice = np.repeat(np.arange(9), [1, 2, 1] * 3)
        mine = jaxbce.value_and_grad(params, x, y, sample_weight=s)
        truth = jaxbce.value_and_grad(params, p.x[twice], p.y[twice])
        assert relative_error(mine, truth) <= 1e-13


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize("block_size", [None, 10])
def test_vmap_over_networks_is_each_network(block_size, layout):
    problems = [problem((4, 3, 1), seed=seed) for seed in range(5)]
    many = jax.tree.map(lambda *leaves: np.stack(leaves), *(p.params for p in problems))
    with jax.enable_x64(True):
        _, x, y = problems[0].arguments()
        one = functools.partial(LAYOUTS[layout], block_size=block_size)
        together = jax.jit(jax.vmap(one, (0, None, None)))(many, x, y)
        for i, p in enumerate(problems):
            alone = jaxbce.value_and_grad(p.params, x, y)
            assert relative_error(member(together, i), alone) <= 1e-13


def test_chain_rule_is_the_gradient_of_the_summed_loss():
    p = problem((6, 5, 3))
    with jax.enable_x64(True):
        factors = jax.tree.map(np.asarray, jaxbce.chain_rule(*p.arguments()))
        (dw_1, db_1), (dw_2, db_2) = jaxbce.grad(*p.arguments(), reduction="sum")
    found = [factors.dbce_dw1, factors.dbce_db1, factors.dbce_dw2, factors.dbce_db2]
    assert relative_error(found, [dw_1, db_1, dw_2, db_2]) <= 1e-12
    # The factors multiply to the gradients, as the table has it.
    delta_2 = factors.dbce_dyhat * factors.dyhat_da2
    dbce_dh1 = delta_2 @ p.params[1].w.T
    delta_1 = dbce_dh1 * factors.dh1_da1
    products = [factors.da1_dw1 @ delta_1, factors.da2_dw2 @ delta_2]
    assert relative_error(products, [dw_1, dw_2]) <= 1e-12
    assert relative_error(factors.dbce_dh1, dbce_dh1) <= 1e-12


@pytest.mark.parametrize("sizes", [(4, 1), (4, 3, 3, 1)])
def test_chain_rule_is_for_one_hidden_layer(sizes):
    arguments = problem(sizes).arguments(np.float32)
    with pytest.raises(ValueError, match=f"to have 2 layers .* got {len(sizes) - 1}"):
        jaxbce.chain_rule(*arguments)


GOOD = problem((3, 2, 1), rows=8).arguments(np.float32)


@pytest.mark.parametrize("function", [jaxbce.value_and_grad, jaxbce.grad, jaxbce.loss])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"y": jnp.zeros(8)}, ValueError, r"y of shape \(8, 1\), the .* got \(8,\)"),
        ({"y": jnp.zeros((8, 2))}, ValueError, r"shape of the logits, got \(8, 2\)"),
        ({"y": jnp.zeros((1, 1))}, ValueError, r"y of shape .* got \(1, 1\)"),
        ({"y": jnp.zeros((8, 1), complex)}, TypeError, "dtype of y .* got complex64"),
        ({"x": jnp.zeros((8, 4))}, ValueError, r"x of shape \[N, 3\] .* got \(8, 4\)"),
        ({"x": jnp.zeros((8, 3), int)}, TypeError, "dtype of x .* got int32"),
        ({"x": jnp.zeros((0, 3))}, ValueError, r"x of shape .* N >= 1, got \(0, 3"),
        ({"params": ()}, ValueError, "params to have at least one Layer"),
        ({"reduction": "average"}, ValueError, "to be \"mean\" or .* got 'average'"),
        ({"reduction": None}, ValueError, "reduction .* got None"),
        ({"block_size": 0}, ValueError, 'block_size to be None, "auto" or .* got 0'),
        ({"block_size": "all"}, ValueError, "block_size .* got 'all'"),
        ({"block_size": True}, ValueError, "block_size .* got True"),
        ({"block_size": 2.5}, TypeError, r"block_size .* got 2.5"),
        (
            {"sample_weight": jnp.ones(7)},
            ValueError,
            r"sample_weight of shape \(8,\), one weight per example, got \(7,\)",
        ),
        ({"sample_weight": jnp.ones((8, 1))}, ValueError, r"shape \(8,\), .* \(8, 1"),
        ({"sample_weight": jnp.ones(8, complex)}, TypeError, "dtype of sample_weight"),
        ({"pos_weight": jnp.ones(2)}, ValueError, r"pos_weight of .* got \(2,\)"),
    ],
)
def test_rejects(function, change, error, match):
    call = {**dict(zip(("params", "x", "y"), GOOD, strict=True)), **change}
    positional = [call.pop(name) for name in ("params", "x", "y")]
    with pytest.raises(error, match=match):
        function(*positional, **call)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda trace: (trace.a, trace.h), TypeError, "activations .* got tuple"),
        (lambda trace: trace._replace(a=trace.a[:1]), ValueError, "activations with a"),
        (
            lambda trace: trace._replace(h=(trace.h[0][:4], *trace.h[1:])),
            ValueError,
            r"activations with a .* and \[\(4, 3\)",
        ),
    ],
)
def test_deltas_rejects_a_trace_of_something_else(change, error, match):
    params, x, y = GOOD
    with pytest.raises(error, match=match):
        jaxbce.deltas(params, change(jaxbce.forward(params, x)), y)


@pytest.mark.parametrize(
    ("rows", "block_size", "length"), [(9, 8, 5), (16, 8, 8), (17, 8, 6), (3, 8, 3)]
)
def test_blocks_are_equally_long_so_that_few_rows_are_taken_twice(
    rows, block_size, length
):
    lengths = set()

    def block(weight, x):
        lengths.add(x.shape[0])
        return jnp.sum(weight[:, None] * x), x

    @jax.jit
    def by_blocks(weight, x):
        return sum_over_blocks(block, weight, (x,), block_size)

    x = np.arange(2 * rows, dtype="f").reshape(rows, 2)
    total, per_row = by_blocks(np.ones(rows, "f"), x)
    assert lengths == {length}
    assert total == x.sum()
    np.testing.assert_array_equal(per_row, x)


@pytest.mark.parametrize("sizes", [(6, 8, 7, 2), (256, 128, 1), (8, 256, 128, 3)])
def test_networks_map_whatever_layers_narrow(sizes):
    """XLA aborts on some batched products whose results are laid out transposed.

    Large layers that narrow are products of a few parts of the rows.
    """
    p = problem(sizes, rows=36)
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        stacked = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), p.params)
        mapped = jax.jit(jax.vmap(jaxbce.value_and_grad, (0, None, None)))
        found = member(mapped(stacked, x, y), 0)
        assert relative_error(found, jaxbce.value_and_grad(params, x, y)) <= 1e-12
        theirs = jax.jit(jax.value_and_grad(loss_reference))(params, x, y)
        assert relative_error(found, theirs) <= 1e-12


@pytest.mark.parametrize("rows", [1024, 1023, 1025, 1001, 1019])
def test_one_pass_takes_the_memory_of_autodiff(rows):
    """Also where a layer narrows, into parts of the rows by the least divisor."""
    params, x, y = problem((64, 32, 1), rows=rows).arguments(np.float32)
    found, theirs = (
        jax.jit(fun).lower(params, x, y).compile()
        for fun in (jaxbce.value_and_grad, jax.value_and_grad(loss_reference))
    )
    assert relative_error(found(params, x, y), theirs(params, x, y)) <= 1e-5
    mine, its = (program.memory_analysis() for program in (found, theirs))
    assert mine is not None
    assert its is not None
    assert mine.temp_size_in_bytes <= 1.01 * its.temp_size_in_bytes
