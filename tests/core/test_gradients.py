import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbce
from experiments.support import baselines, timing
from jaxbce import gradients
from jaxbce._blocks import sum_over_blocks
from tests.helpers import NETWORKS, TOLERANCE, loss_reference, problem, relative_error

OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "weights": {"sample_weight": True},
    "pos_weight": {"pos_weight": 2.5},
    "everything": {"sample_weight": True, "pos_weight": 0.3, "reduction": "sum"},
}
BLOCKS = [None, "auto", 1, 7, 36, 37, 1000]


def options(p, name, dtype="float64"):
    chosen = dict(OPTIONS[name])
    if "sample_weight" in chosen:
        chosen["sample_weight"] = jnp.asarray(p.sample_weight, dtype)
    return chosen


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
def test_value_and_gradient_are_autodiffs_in_float64(sizes, name, dtype):
    p = problem(sizes).rounded(dtype)
    with jax.enable_x64(dtype == "float64"):
        arguments = p.arguments(dtype)
        value, grads = jaxbce.value_and_grad(*arguments, **options(p, name, dtype))
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, arguments[0])
    with jax.enable_x64(True):
        truth = jax.value_and_grad(loss_reference)(*p.arguments(), **options(p, name))
    assert relative_error((value, grads), truth) <= TOLERANCE[dtype]
    assert value.dtype == (jnp.float32 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("name", ["mean", "weights", "everything"])
def test_jax_differentiates_loss_through_the_derivation_in_every_argument(sizes, name):
    p = problem(sizes)
    with jax.enable_x64(True):
        arguments = p.arguments()
        extra = options(p, name)
        weights = {k: jnp.float64(extra.pop(k)) for k in list(extra) if "weight" in k}

        def of(loss):
            return lambda params, x, y, w: loss(params, x, y, **w, **extra)

        @functools.partial(jax.jit, static_argnums=0)
        def derivatives(loss, *arguments):
            tangents = jax.tree.map(jnp.cos, arguments)
            backward = jax.grad(of(loss), (0, 1, 2, 3))(*arguments)
            return backward, jax.jvp(of(loss), arguments, tangents)

        mine = derivatives(jaxbce.loss, *arguments, weights)
        truth = derivatives(loss_reference, *arguments, weights)
        assert relative_error(mine, truth) <= TOLERANCE["float64"]
        value, grads = jaxbce.value_and_grad(*arguments, **weights, **extra)
        assert relative_error(grads, mine[0][0]) <= 1e-15
        assert relative_error(value, of(jaxbce.loss)(*arguments, weights)) <= 1e-15
        assert relative_error(jaxbce.grad(*arguments, **weights, **extra), grads) == 0


@pytest.mark.parametrize("block_size", [None, 10])
def test_hessian_of_loss_is_autodiffs(block_size):
    p = problem((4, 3, 2))
    with jax.enable_x64(True):
        for second in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
            mine, truth = (
                jax.jit(second(loss))(*p.arguments())
                for loss in (
                    lambda *a: jaxbce.loss(*a, block_size=block_size),
                    loss_reference,
                )
            )
            assert relative_error(mine, truth) <= 1e-12


def test_second_derivatives_are_exact_in_the_tail():
    params = (jaxbce.Layer(jnp.ones((1, 1)), jnp.zeros(1)),)
    with jax.numpy_dtype_promotion("standard"):
        for a in (10.0, 20.0, 40.0, 80.0):
            h = jax.hessian(jaxbce.loss)(params, jnp.full((1, 1), a), jnp.ones((1, 1)))
            truth = np.exp(-a) / (1 + np.exp(-a)) ** 2  # σ(a) σ(−a)
            np.testing.assert_allclose(h[0].b[0].b, truth, rtol=1e-6)


def test_corrupting_deltas_corrupts_every_derivative_of_loss(monkeypatch):
    p = problem((5, 4, 1))
    arguments = p.arguments(np.float32)
    honest = gradients.deltas
    right = jax.grad(jaxbce.loss)(*arguments)
    value = jaxbce.loss(*arguments)

    def corrupt(*args, **kwargs):
        return tuple(3 * d for d in honest(*args, **kwargs))

    monkeypatch.setattr(gradients, "deltas", corrupt)
    jax.clear_caches()
    wrong = jax.grad(jaxbce.loss)(*arguments)
    tangent = jax.jvp(
        lambda params: jaxbce.loss(params, *arguments[1:]), arguments[:1], (right,)
    )[1]
    monkeypatch.undo()
    jax.clear_caches()
    assert relative_error(wrong, jax.tree.map(lambda g: 3 * g, right)) <= 1e-6
    squared = sum(jnp.sum(g**2) for g in jax.tree.leaves(right))
    np.testing.assert_allclose(tangent, 3 * squared, rtol=1e-5)
    assert jaxbce.loss(*arguments) == value
    assert relative_error(jax.grad(jaxbce.loss)(*arguments), right) == 0


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("name", ["mean", "everything"])
def test_blocks_equal_one_pass(block_size, name):
    p = problem((6, 5, 4, 2), rows=37)
    with jax.enable_x64(True):
        extra = options(p, name)
        one = jaxbce.value_and_grad(*p.arguments(), block_size=None, **extra)
        blocks = jaxbce.value_and_grad(*p.arguments(), block_size=block_size, **extra)
        assert relative_error(blocks, one) <= 1e-14
        loss = jaxbce.loss(*p.arguments(), block_size=block_size, **extra)
        assert relative_error(loss, one[0]) <= 1e-14
        in_x = [
            jax.jit(
                jax.grad(
                    lambda *a, b=b: jaxbce.loss(*a, block_size=b, **extra),
                    argnums=(1, 2),
                )
            )(*p.arguments())
            for b in (None, block_size)
        ]
        assert relative_error(*in_x) <= 1e-13


def test_any_number_of_rows_works_with_any_block_size():
    with jax.enable_x64(True):
        for rows, block_size in itertools.product((1, 2, 5, 8), (1, 2, 3, 7)):
            p = problem((3, 4, 1), rows=rows, seed=rows)
            one = jaxbce.value_and_grad(*p.arguments(), block_size=None)
            many = jaxbce.value_and_grad(*p.arguments(), block_size=block_size)
            assert relative_error(many, one) <= 1e-13


def test_temporary_memory_is_constant_in_the_number_of_rows():
    def temporary(rows):
        p = problem((30, 64, 1), rows=rows)
        compiled = jaxbce.value_and_grad.lower(*p.arguments(np.float32)).compile()
        return timing.temp_bytes(compiled)

    small, large = temporary(2**17), temporary(2**18 + 1)
    assert large <= 1.1 * small
    assert large <= 2 * 2**20


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
def test_scikit_learns_backward_pass_agrees(sizes):
    p = problem(sizes)
    with jax.enable_x64(True):
        grads = jaxbce.grad(*p.arguments())
    theirs = baselines.scikit_learn_gradient(*p[:3])
    assert relative_error(jax.tree.leaves(grads), theirs) <= TOLERANCE["float64"]


@pytest.mark.parametrize("sizes", [(7, 5, 1), (6, 8, 7, 5, 1)])
def test_scikit_learns_backward_pass_agrees_with_weights(sizes):
    p = problem(sizes)
    y = np.round(p.y)
    with jax.enable_x64(True):
        grads = jaxbce.grad(
            *p._replace(y=y).arguments(),
            sample_weight=jnp.asarray(p.sample_weight),
            pos_weight=3.0,
            reduction="sum",
        )
    # With one output and hard labels a positive class's weight is the rows' own.
    s = p.sample_weight * np.where(y[:, 0] == 1, 3.0, 1.0)
    theirs = baselines.scikit_learn_gradient(p.params, p.x, y, sample_weight=s)
    theirs = [s.sum() * leaf for leaf in theirs]
    assert relative_error(jax.tree.leaves(grads), theirs) <= TOLERANCE["float64"]


def test_pos_weights_of_each_output_are_differentiated_by_output():
    p = problem((4, 3, 2))
    with jax.enable_x64(True):
        arguments, s = p.arguments(), jnp.asarray(p.sample_weight)

        def in_pos_weight(loss):
            options = {"sample_weight": s, "reduction": "sum"}
            return jax.grad(lambda q: loss(*arguments, pos_weight=q, **options))(
                jnp.array([0.5, 3.0])
            )

        mine, truth = in_pos_weight(jaxbce.loss), in_pos_weight(loss_reference)
        assert relative_error(mine, truth) <= TOLERANCE["float64"]


def test_deltas_are_the_derivatives_in_the_pre_activations():
    p = problem((5, 6, 4, 2))
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        offsets = tuple(jnp.zeros((len(x), len(layer.b))) for layer in params)

        def shifted(offsets):
            h = x
            for (w, b), e in zip(params[:-1], offsets[:-1], strict=True):
                h = jax.nn.relu(h @ w + b + e)
            a = h @ params[-1].w + params[-1].b + offsets[-1]
            ell = 2 * y * jax.nn.softplus(-a) + (1 - y) * jax.nn.softplus(a)
            return jnp.sum(ell)

        truth = jax.grad(shifted)(offsets)
        trace = jaxbce.forward(params, x)
        mine = jaxbce.deltas(params, trace, y, pos_weight=2.0)
        assert relative_error(mine, truth) <= TOLERANCE["float64"]
        s = jnp.asarray(p.sample_weight)
        mine = jaxbce.deltas(params, trace, y, pos_weight=2.0, sample_weight=s)
        truth = jax.tree.map(lambda d: s[:, None] * d, truth)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_loss_and_gradient_are_exact_in_the_tail(dtype, y):
    # One weight of 1 and no bias: the logit is x, exactly.
    params = (jaxbce.Layer(jnp.ones((1, 1), dtype), jnp.zeros(1, dtype)),)
    for a in np.linspace(0.25, 80, 320) * (1 if y else -1):
        x = jnp.full((1, 1), a, dtype)
        value, grads = jaxbce.value_and_grad(params, x, jnp.full((1, 1), y))
        a = abs(float(x[0, 0]))
        tolerance = 1e-6 if dtype == "float32" else 2.0**-7
        np.testing.assert_allclose(value, np.log1p(np.exp(-a)), rtol=tolerance)
        slope = np.exp(-a) / (1 + np.exp(-a))
        np.testing.assert_allclose(abs(float(grads[0].b[0])), slope, rtol=tolerance)


@pytest.mark.parametrize("block_size", [None, 1])
def test_infinite_logits_give_finite_gradients(block_size):
    # Logits of inf, −inf, 1, from biases that weights and features keep finite.
    params = (jaxbce.Layer(jnp.ones((1, 3)), jnp.array([jnp.inf, -jnp.inf, 0.0])),)
    x = jnp.ones((2, 1))
    right, wrong = jnp.array([[1.0, 0.0, 1.0]] * 2), jnp.array([[0.0, 1.0, 1.0]] * 2)
    kwargs = {"reduction": "sum", "block_size": block_size}
    value, grads = jaxbce.value_and_grad(params, x, right, **kwargs)
    assert np.isfinite(value)
    np.testing.assert_array_equal(grads[0].b[:2], [0, 0])
    value, grads = jaxbce.value_and_grad(params, x, wrong, **kwargs)
    assert value == jnp.inf
    np.testing.assert_array_equal(grads[0].b[:2], [2, -2])
    assert np.isfinite(jax.tree.leaves(grads)[0]).all()


@pytest.mark.parametrize("block_size", [None, 2])
def test_rows_of_weight_zero_count_for_nothing_even_at_infinite_loss(block_size):
    p = problem((3, 4, 1), rows=6)
    params, x, y = p.arguments(np.float32)
    x = x.at[:2].set(3e38)  # finite features, infinite loss
    s = jnp.array([0, 0, 1, 1, 1, 1.0])
    assert not np.isfinite(jaxbce.loss(params, x, y))
    value, grads = jaxbce.value_and_grad(
        params, x, y, sample_weight=s, block_size=block_size
    )
    truth = jaxbce.value_and_grad(params, x[2:], y[2:])
    assert relative_error((value, grads[1].b), (truth[0], truth[1][1].b)) <= 1e-6


def test_a_batch_is_the_mean_of_its_rows_in_any_order():
    p = problem((5, 6, 2), rows=11)
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        batch = jaxbce.value_and_grad(params, x, y)
        order = np.random.default_rng(0).permutation(11)
        shuffled = jaxbce.value_and_grad(params, x[order], y[order])
        assert relative_error(shuffled, batch) <= 1e-13
        rows = jax.vmap(lambda x, y: jaxbce.value_and_grad(params, x[None], y[None]))
        mean = jax.tree.map(lambda t: t.mean(0), rows(x, y))
        assert relative_error(mean, batch) <= 1e-13


def test_weights_of_two_are_rows_given_twice():
    p = problem((5, 6, 2), rows=9)
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        s = jnp.array([1.0, 2.0, 1.0] * 3)
        twice = jnp.repeat(jnp.arange(9), np.array([1, 2, 1] * 3))
        mine = jaxbce.value_and_grad(params, x, y, sample_weight=s)
        truth = jaxbce.value_and_grad(params, x[twice], y[twice])
        assert relative_error(mine, truth) <= 1e-13


def test_vmap_over_networks_is_each_network():
    p = problem((4, 3, 1))
    with jax.enable_x64(True):
        _, x, y = p.arguments()
        keys = jax.random.split(jax.random.key(0), 5)
        many = jax.vmap(lambda key: jaxbce.init(key, (4, 3, 1)))(keys)
        for block_size in (None, 10):
            together = jax.vmap(
                lambda params, b=block_size: jaxbce.value_and_grad(
                    params, x, y, block_size=b
                )
            )(many)
            for i in range(5):
                one = jaxbce.value_and_grad(jax.tree.map(lambda t: t[i], many), x, y)  # noqa: B023
                assert (
                    relative_error(jax.tree.map(lambda t: t[i], together), one)  # noqa: B023
                    <= 1e-13
                )


def test_chain_rule_is_the_gradient_of_the_summed_loss():
    p = problem((6, 5, 3))
    with jax.enable_x64(True):
        factors = jaxbce.chain_rule(*p.arguments())
        grads = jaxbce.grad(*p.arguments(), reduction="sum")
        (dw_1, db_1), (dw_2, db_2) = grads
        found = [factors.dbce_dw1, factors.dbce_db1, factors.dbce_dw2, factors.dbce_db2]
        assert relative_error(found, [dw_1, db_1, dw_2, db_2]) <= 1e-12
        # The factors multiply to the gradients, as the table has it.
        delta_2 = factors.dbce_dyhat * factors.dyhat_da2
        dbce_dh1 = delta_2 @ p.arguments()[0][1].w.T
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

    x = jnp.arange(2.0 * rows).reshape(rows, 2)
    total, per_row = sum_over_blocks(block, jnp.ones(rows), (x,), block_size)
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
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
        mapped = jax.jit(jax.vmap(jaxbce.value_and_grad, (0, None, None)))
        found = jax.tree.map(lambda leaf: leaf[0], mapped(stacked, x, y))
        theirs = jax.value_and_grad(loss_reference)(params, x, y)
        assert relative_error(found, jaxbce.value_and_grad(params, x, y)) <= 1e-12
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
