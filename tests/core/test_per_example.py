import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbce
from jaxbce import per_example
from tests.helpers import (
    NETWORKS,
    TOLERANCE,
    loss_reference,
    member,
    options,
    problem,
    relative_error,
)

SIZES = [(7, 5, 1), (7, 5, 3), (6, 8, 7, 5, 1), (6, 8, 7, 5, 3), (4, 2)]
EXACT = 1e-12  # float64, relative
WEIGHTS = {
    "plain": {},
    "pos_weight": {"pos_weight": 2.5},
    "weights": {"sample_weight": True, "pos_weight": 0.3},
}


@functools.cache
def grads_of(sizes, sample_weight=False, pos_weight=1.0, rows=37, seed=0):
    """Each row's gradient, materialised in one program per shape, in NumPy."""
    p = problem(sizes, rows=rows, seed=seed)
    s = p.sample_weight if sample_weight else np.ones(rows)
    with jax.enable_x64(True):
        grads = grads_reference(*p.arguments(), s, np.float64(pos_weight))
    return jax.tree.map(np.asarray, grads)


@jax.jit
def grads_reference(params, x, y, sample_weight, pos_weight):
    """`vmap(jax.grad)` of each row's own loss."""

    def row(x, y, s):
        one = {"sample_weight": s[None], "pos_weight": pos_weight, "reduction": "sum"}
        return jax.grad(loss_reference)(params, x[None], y[None], **one)

    return jax.vmap(row)(x, y, sample_weight)


def flat(grads):
    """Per-example gradients as a matrix `[N, P]`."""
    leaves = jax.tree.leaves(grads)
    return np.concatenate([np.reshape(t, (len(t), -1)) for t in leaves], axis=1)


def clipped_reference(grads, max_norm, divisor=1.0):
    """Materialised gradients, each rescaled, then summed."""
    norms = np.linalg.norm(flat(grads), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.where(norms > max_norm, max_norm / norms, 1)
    return jax.tree.map(lambda g: np.tensordot(kept, g, 1) / divisor, grads)


@jax.jit
def everything(params, x, y, weights, max_norms):
    """What is found of the rows in one pass and in blocks, in one program."""
    found: dict[str, Any] = {"grads": per_example.grads(params, x, y, **weights)}
    passes: Any = (("sum", None), ("mean", 10))
    for reduction, block_size in passes:

        def clipped(most, reduction=reduction, block_size=block_size):
            given = {"max_norm": most, "reduction": reduction} | weights
            return per_example.clipped_value_and_grad(
                params, x, y, **given, block_size=block_size
            )

        found[reduction] = (
            per_example.norms(params, x, y, **weights, block_size=block_size),
            jaxbce.value_and_grad(params, x, y, reduction=reduction, **weights),
            jax.lax.map(clipped, max_norms),
        )
    return found


@pytest.mark.slow_ids("(6, 8, 7, 5, 3)", "(7, 5, 1)")
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_everything_is_what_materialised_gradients_give(sizes, name):
    p = problem(sizes)
    truth = grads_of(sizes, **WEIGHTS[name])
    norms = np.linalg.norm(flat(truth), axis=1)
    most = np.array([0.0, 0.999 * np.median(norms), np.inf])
    weights = options(p, WEIGHTS[name])
    s = weights.get("sample_weight", np.ones(len(p.x)))
    weights["pos_weight"] = np.float64(weights.get("pos_weight", 1.0))
    with jax.enable_x64(True):
        found = everything(*p.arguments(), weights, most)
        chex.assert_trees_all_equal_shapes_and_dtypes(found["grads"], truth)
    assert relative_error(found["grads"], truth) <= EXACT
    for reduction in ("sum", "mean"):
        mine, (value, grads), of_every_norm = found[reduction]
        np.testing.assert_allclose(mine, norms, rtol=EXACT)
        divisor = float(np.sum(s)) if reduction == "mean" else 1.0
        for i, max_norm in enumerate(most):
            clipped = member(of_every_norm, i)
            sums = clipped_reference(truth, max_norm, divisor)
            assert relative_error(clipped.grads, sums) <= EXACT
            assert relative_error(clipped.value, value) <= EXACT
            if max_norm == np.inf:
                assert relative_error(clipped.grads, grads) <= EXACT
            np.testing.assert_allclose(clipped.norms, norms, rtol=EXACT)
            fraction = np.mean(norms > max_norm)
            np.testing.assert_allclose(clipped.fraction_clipped, fraction)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_inner_products_are_those_of_materialised_gradients(sizes):
    p, q = problem(sizes), problem(sizes, rows=11, seed=1)
    left = grads_of(sizes, pos_weight=2.5)
    with jax.enable_x64(True):
        (params, x, y), (_, x2, y2) = p.arguments(), q.arguments()
        right = grads_reference(params, x2, y2, np.ones(11), np.float64(2.5))

        @jax.jit
        def products(params, x, y, x2, y2):
            between = [
                per_example.inner_products(
                    params, x, y, x2, y2, pos_weight=2.5, block_size=block_size
                )
                for block_size in (None, 10)
            ]
            own = per_example.inner_products(params, x, y, x, y)
            return between, own, per_example.norms(params, x, y)

        between, own, norms = products(params, x, y, x2, y2)
    for mine in between:
        assert relative_error(mine, flat(left) @ flat(right).T) <= EXACT
    np.testing.assert_allclose(np.diag(own), np.asarray(norms) ** 2, rtol=EXACT)


def test_influence_sums_over_checkpoints():
    p = problem((7, 5, 1))
    rates = np.array([0.3, 0.1])
    points = [p.params, jax.tree.map(np.negative, p.params)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *points)
    each = jax.vmap(per_example.inner_products, (0, None, None, None, None))

    @jax.jit
    def influence(stacked, x, y):
        return jnp.tensordot(rates, each(stacked, x, y, x[:5], y[:5]), 1)

    with jax.enable_x64(True):
        mine = influence(stacked, p.x, p.y)
        truth = 0.0
        for rate, point in zip(rates, points, strict=True):
            matrix = flat(grads_reference(point, p.x, p.y, np.ones(37), np.float64(1)))
            truth += rate * matrix @ matrix[:5].T
    assert relative_error(mine, truth) <= EXACT


def test_influence_predicts_what_a_small_step_does():
    p = problem((7, 5, 1))
    with jax.enable_x64(True):
        params, x, y = p[:3]
        rate = 1e-6
        row = jaxbce.grad(params, x[:1], y[:1])
        stepped = jax.tree.map(lambda t, g: t - rate * np.asarray(g), params, row)
        for j in (0, 5, 9):
            other = x[j : j + 1], y[j : j + 1]
            after, before = (float(jaxbce.loss(t, *other)) for t in (stepped, params))
            influence = per_example.inner_products(params, x[:1], y[:1], *other)
            slope = float(np.asarray(influence)[0, 0])
            np.testing.assert_allclose(after - before, -rate * slope, rtol=1e-4)


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
def test_scores_are_their_definitions(sizes):
    p = problem(sizes)
    matrix = flat(grads_of(sizes))
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        scores = per_example.scores(params, x, y, block_size=10)
        error = np.asarray(jaxbce.predict_proba(params, x)) - p.y
    np.testing.assert_allclose(scores.el2n, np.linalg.norm(error, axis=1), rtol=EXACT)
    np.testing.assert_allclose(scores.grand, np.linalg.norm(matrix, axis=1), rtol=EXACT)
    norms = np.linalg.norm(p.x, axis=1)
    np.testing.assert_allclose(scores.input_norm, norms, rtol=EXACT)


def test_noise_scale_is_its_definition_and_unbiased():
    p = problem((7, 5, 3), rows=64)
    matrix = flat(grads_of((7, 5, 3), rows=64))
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        variance = np.var(matrix, axis=0, ddof=1).sum()
        squared_norm = np.sum(matrix.mean(0) ** 2) - variance / len(x)
        for block_size in (None, 10):
            mine = per_example.noise_scale(params, x, y, block_size=block_size)
            np.testing.assert_allclose(mine.variance, variance, rtol=1e-11)
            np.testing.assert_allclose(mine.squared_norm, squared_norm, rtol=1e-11)
            np.testing.assert_allclose(mine.scale, variance / squared_norm, rtol=1e-11)
        # Unbiased: over every pair of rows the mean is the population's.
        few = jax.jit(jax.vmap(per_example.noise_scale, (None, 0, 0)))
        pairs = np.array([(i, j) for i in range(64) for j in range(i)])
        each = few(params, p.x[pairs], p.y[pairs])
        np.testing.assert_allclose(np.mean(each.variance), variance, rtol=1e-11)
        np.testing.assert_allclose(np.mean(each.squared_norm), squared_norm, rtol=1e-10)


def test_noise_scale_where_rows_agree_or_cancel():
    params = (jaxbce.Layer(jnp.zeros((1, 1)), jnp.zeros(1)),)
    same = jnp.ones((4, 1))
    assert per_example.noise_scale(params, same, same).scale == 0
    opposite = per_example.noise_scale(params, same, jnp.array([[1.0], [0.0]] * 2))
    assert opposite.scale == np.inf
    assert opposite.squared_norm < 0
    zero = per_example.noise_scale(params, same, jnp.full((4, 1), 0.5))
    assert np.isnan(zero.scale)
    assert zero.variance == 0
    with pytest.raises(ValueError, match="N >= 2, got"):
        per_example.noise_scale(params, same[:1], same[:1])


@pytest.mark.parametrize("a", [0.0, 15.0, 50.0, 80.0])
def test_norms_are_exact_in_the_tail(a):
    params = (jaxbce.Layer(jnp.ones((1, 1)), jnp.zeros(1)),)
    x, y = jnp.full((2, 1), a), jnp.array([[1.0], [0.0]])
    norms = per_example.norms(params, x, y)
    wrong = 1 / (1 + np.exp(-a))
    truth = np.array([np.exp(-a) * wrong, wrong]) * np.sqrt(1 + a**2)
    np.testing.assert_allclose(norms, truth, rtol=1e-6)
    np.testing.assert_allclose(
        per_example.scores(params, x, y).el2n, truth / np.sqrt(1 + a**2), rtol=1e-6
    )
    half = float(truth[0]) / 2
    clipped = per_example.clipped_value_and_grad(
        params, x[:1], y[:1], max_norm=half, reduction="sum"
    )
    np.testing.assert_allclose(norm_of(clipped.grads), half, rtol=1e-6)


def norm_of(grads):
    return np.linalg.norm(
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)]).astype(float)
    )


def test_zero_norms_saturated_rows_and_zero_weights_are_left_alone():
    params = (jaxbce.Layer(jnp.ones((1, 1)), jnp.zeros(1)),)
    x = jnp.array([[np.inf], [200.0], [-1.0], [-200.0]])
    y = jnp.ones((4, 1))
    norms = per_example.norms(params, x[1:], y[1:])
    assert norms[0] == 0  # e^-200 is below the smallest float32
    np.testing.assert_allclose(norms[2], np.hypot(1, 200), rtol=1e-6)
    for max_norm in (0.0, 1e-30, 1.0, np.inf):
        clipped = per_example.clipped_value_and_grad(
            params, x[1:], y[1:], max_norm=max_norm, reduction="sum"
        )
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(clipped.grads))
        assert norm_of(clipped.grads) <= 2 * max_norm
        assert clipped.fraction_clipped == np.float32(np.mean(norms > max_norm))
    weights = jnp.array([0.0, 1.0, 0.0])
    some = per_example.clipped_value_and_grad(
        params, x[1:], y[1:], max_norm=0.5, sample_weight=weights
    )
    alone = per_example.clipped_value_and_grad(params, x[2:3], y[2:3], max_norm=0.5)
    chex.assert_trees_all_close(some.grads, alone.grads, rtol=1e-6)
    np.testing.assert_array_equal(some.norms == 0, [True, False, True])
    assert some.fraction_clipped == alone.fraction_clipped == 1
    none = per_example.clipped_value_and_grad(
        params, x[1:], y[1:], max_norm=0.5, sample_weight=0 * weights, reduction="sum"
    )
    assert norm_of(none.grads) == 0
    assert np.isnan(none.fraction_clipped)
    # An infinite logit that agrees with its label has a gradient of 0.
    sure = (jaxbce.Layer(jnp.ones((1, 1)), jnp.full(1, np.inf)),)
    assert per_example.norms(sure, jnp.ones((1, 1)), jnp.ones((1, 1)))[0] == 0


def test_leaving_a_row_out_changes_the_clipped_sum_by_max_norm_at_most():
    p = problem((7, 5, 3))
    with jax.enable_x64(True):
        clipped = functools.partial(
            per_example.clipped_value_and_grad,
            *p.arguments(),
            max_norm=0.2,
            reduction="sum",
        )
        s = 10 * p.sample_weight
        all_rows = clipped(sample_weight=s)
        assert all_rows.fraction_clipped > 0.5
        for i in range(0, len(p.x), 6):
            left = np.where(np.arange(len(s)) == i, 0, s)
            without = clipped(sample_weight=left).grads
            change = jax.tree.map(np.subtract, all_rows.grads, without)
            assert norm_of(change) <= 0.2 * (1 + 1e-12)


def test_duplicated_rows_count_twice_and_one_row_is_itself():
    p = problem((7, 5, 1))
    with jax.enable_x64(True):
        params, x, y = p[:3]
        one = per_example.clipped_value_and_grad(
            params, x[:1], y[:1], max_norm=0.1, reduction="sum"
        )
        two = per_example.clipped_value_and_grad(
            params,
            x[[0, 0]],
            y[[0, 0]],
            max_norm=0.1,
            reduction="sum",
        )
        twice = jax.tree.map(lambda g: 2 * np.asarray(g), one.grads)
        assert relative_error(two.grads, twice) <= EXACT
        first, second = two.norms.tolist()
        assert first == second
        alone = per_example.norms(params, x[:1], y[:1])
        np.testing.assert_allclose(one.norms, alone, rtol=EXACT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_agrees_with_float64(dtype):
    p = problem((6, 8, 7, 5, 3)).rounded(dtype)
    mine = per_example.clipped_value_and_grad(*p.arguments(dtype), max_norm=1.0)
    assert mine.norms.dtype == mine.value.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(mine.grads, p.arguments(dtype)[0])
    with jax.enable_x64(True):
        truth = per_example.clipped_value_and_grad(*p.arguments(), max_norm=1.0)
    assert relative_error(mine[:3], truth[:3]) <= TOLERANCE[dtype]


def test_networks_of_a_sweep_map():
    p = problem((7, 5, 1))
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, -leaf, 2 * leaf]), p.params)

    def both(params, x, y, max_norm):
        clipped = per_example.clipped_value_and_grad(params, x, y, max_norm=max_norm)
        return per_example.scores(params, x, y), clipped

    norms = np.array([0.1, 1.0, 10.0])
    with jax.enable_x64(True):
        _, x, y = p.arguments()
        mapped = jax.jit(jax.vmap(both, (0, None, None, 0)))(stacked, x, y, norms)
        for i in range(3):
            alone = jax.jit(both)(member(stacked, i), x, y, norms[i])
            assert relative_error(member(mapped, i), alone) <= EXACT


def test_no_per_example_gradient_is_in_memory():
    rows, sizes = 512, (64, 256, 1)
    arguments = problem(sizes, rows=rows).arguments(np.float32)
    whole = 4 * rows * 64 * 256
    for fun in (
        per_example.norms,
        per_example.scores,
        per_example.noise_scale,
        functools.partial(per_example.clipped_value_and_grad, max_norm=1.0),
    ):
        memory = jax.jit(fun).lower(*arguments).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < whole / 10, fun


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_norm": -1.0}, r"max_norm to be a number >= 0, got -1.0"),
        ({"max_norm": float("nan")}, "max_norm .* got nan"),
        ({"max_norm": "1"}, "max_norm .* got str"),
        ({"max_norm": None}, "max_norm .* got NoneType"),
        ({"max_norm": np.float64(-1.0)}, "expected max_norm"),
        ({"max_norm": np.array(float("nan"))}, "expected max_norm"),
        ({"max_norm": np.array(True)}, "dtype bool"),
        ({"max_norm": np.ones(2)}, r"max_norm .* got .* shape \(2,\)"),
        ({"max_norm": 1.0, "reduction": "max"}, "reduction .* got 'max'"),
        ({"max_norm": 1.0, "block_size": 0}, "block_size .* got 0"),
        ({"max_norm": 1.0, "sample_weight": np.ones(3)}, "sample_weight of shape"),
    ],
)
def test_a_wrong_option_is_named(change, message):
    arguments = problem((7, 5, 1)).arguments(np.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        per_example.clipped_value_and_grad(*arguments, **change)


def test_a_norm_that_is_not_a_number_clips_to_nothing_that_looks_right():
    arguments = problem((7, 5, 1)).arguments(np.float32)
    clipped = jax.jit(
        lambda max_norm: per_example.clipped_value_and_grad(
            *arguments, max_norm=max_norm
        )
    )(jnp.float32("nan"))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(clipped.grads))


def test_a_row_of_weight_0_may_have_an_infinite_loss():
    params = (jaxbce.Layer(jnp.full((1, 1), 1e30), jnp.zeros(1)),)
    x, y = jnp.array([[1e30], [0.0]]), jnp.zeros((2, 1))
    clipped = per_example.clipped_value_and_grad(
        params, x, y, max_norm=1.0, sample_weight=jnp.array([0.0, 1.0])
    )
    np.testing.assert_allclose(clipped.value, np.log(2), rtol=1e-6)


# Squares of 1e20 overflow, and so do hidden activations of 3e38.
EXTREME = pytest.mark.parametrize("feature", [1e20, 3e38, np.inf, np.nan])


@jax.jit
def weighted_quantities(params, x, y, s):
    return (
        per_example.grads(params, x, y, sample_weight=s),
        per_example.norms(params, x, y, sample_weight=s),
        per_example.clipped_value_and_grad(
            params, x, y, sample_weight=s, max_norm=1.0, reduction="sum"
        ),
    )


@EXTREME
def test_an_example_of_weight_0_is_ignored_whatever_its_features(feature):
    params, x, y = problem((7, 5, 3)).arguments(np.float32)
    ones = jnp.ones(len(x))
    found = weighted_quantities(params, x.at[0].set(feature), y, ones.at[0].set(0))
    truth = weighted_quantities(params, x, y, ones.at[0].set(0))
    chex.assert_trees_all_equal(found, truth)
    assert found[1][0] == 0
    if not np.isfinite(feature):  # with a weight, it makes sums not finite
        grads, norms, clipped = weighted_quantities(
            params, x.at[0].set(feature), y, ones
        )
        assert not np.isfinite(norms[0])
        for sums in (jax.tree.map(lambda leaf: leaf[0], grads), clipped.grads):
            assert any(not np.isfinite(leaf).all() for leaf in jax.tree.leaves(sums))


@jax.jit
def unweighted_quantities(params, x, y):
    clipped = per_example.clipped_value_and_grad(
        params, x, y, max_norm=1.0, reduction="sum"
    )
    return (
        per_example.grads(params, x, y),
        per_example.norms(params, x, y),
        clipped,
        per_example.inner_products(params, x, y, x, y),
        per_example.scores(params, x, y)[:2],
        per_example.noise_scale(params, x, y),
    )


@pytest.mark.parametrize("feature", [1e20, 3e38, np.inf])
def test_a_saturated_example_that_is_right_adds_nothing(feature):
    """In a network whose hidden layer overflows; its logit is large or infinite."""
    first = jaxbce.Layer(jnp.array([[2.0, -1.0]]), jnp.array([0.0, 1.0]))
    params = (first, jaxbce.Layer(jnp.array([[1.0], [-0.5]]), jnp.zeros(1)))
    x, y = jnp.array([[feature], [0.5], [-0.5]]), jnp.array([[1.0], [0.0], [1.0]])
    found = unweighted_quantities(params, x, y)
    truth = unweighted_quantities(params, x.at[0].set(200.0), y)
    assert truth[1][0] == 0
    chex.assert_trees_all_equal(found, truth)


@pytest.mark.parametrize("feature", [1e20, -1e20])
def test_an_example_whose_squares_overflow_adds_at_most_max_norm(feature):
    """The hidden unit is active for one feature, and inactive for the other."""
    params = (jaxbce.Layer(jnp.ones((1, 1)), jnp.zeros(1)),) * 2
    x, y = jnp.array([[feature], [0.5]]), jnp.array([[0.0], [1.0]])
    clipped = functools.partial(
        per_example.clipped_value_and_grad, params, max_norm=0.1, reduction="sum"
    )
    change = jax.tree.map(
        jnp.subtract, clipped(x, y).grads, clipped(x[1:], y[1:]).grads
    )
    assert norm_of(change) <= 0.1 * (1 + 1e-6)


def test_scores_and_noise_scale_know_of_pos_weight():
    p = problem((7, 5, 3))
    matrix = flat(grads_of((7, 5, 3), pos_weight=2.5))
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        scores = per_example.scores(params, x, y, pos_weight=2.5)
        mine = per_example.noise_scale(params, x, y, pos_weight=2.5)
    np.testing.assert_allclose(scores.grand, np.linalg.norm(matrix, axis=1), rtol=EXACT)
    variance = np.var(matrix, axis=0, ddof=1).sum()
    np.testing.assert_allclose(mine.variance, variance, rtol=1e-11)


def test_wrong_second_rows_are_named():
    params, x, y = problem((7, 5, 1)).arguments(np.float32)
    with pytest.raises(ValueError, match=r"x2 of shape .* got \(37, 6\)"):
        per_example.inner_products(params, x, y, x[:, :6], y)
    with pytest.raises(ValueError, match=r"y2 of shape .* got \(37,\)"):
        per_example.inner_products(params, x, y, x, y[:, 0])


def test_norms_and_clipped_sums_are_pytorchs():
    """An oracle that shares no code: a loop of PyTorch's autograd over rows."""
    torch = pytest.importorskip("torch", reason="needs PyTorch, which is not installed")
    p = problem((6, 8, 7, 5, 3))
    leaves = [
        torch.tensor(leaf, requires_grad=True) for layer in p.params for leaf in layer
    ]
    rows = []
    for x, y in zip(p.x, p.y, strict=True):
        h = torch.tensor(x)
        for w, b in zip(leaves[:-2:2], leaves[1:-2:2], strict=True):
            h = torch.relu(h @ w + b)
        a = h @ leaves[-2] + leaves[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            a, torch.tensor(y), reduction="sum", pos_weight=torch.tensor(2.5).double()
        )
        grads = torch.autograd.grad(loss, leaves)
        rows.append(torch.cat([g.flatten() for g in grads]).numpy())
    matrix = np.stack(rows)
    norms = np.linalg.norm(matrix, axis=1)
    kept = np.minimum(1, np.median(norms) / norms)
    with jax.enable_x64(True):
        mine = per_example.clipped_value_and_grad(
            *p.arguments(),
            max_norm=float(np.median(norms)),
            pos_weight=2.5,
            reduction="sum",
        )
    np.testing.assert_allclose(mine.norms, norms, rtol=EXACT)
    flat_sum = np.concatenate([np.ravel(g) for g in jax.tree.leaves(mine.grads)])
    np.testing.assert_allclose(flat_sum, kept @ matrix, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_clipped_sums_are_opacus():
    """The norms and sums that Opacus takes for private training."""
    reason = "needs Opacus, which is not installed"
    opacus = pytest.importorskip("opacus", reason=reason)
    torch = pytest.importorskip("torch", reason=reason)
    p = problem((6, 8, 1))
    layers = []
    for w, b in p.params:
        layer = torch.nn.Linear(*w.shape, dtype=torch.float64)
        layer.weight.data, layer.bias.data = torch.tensor(w.T.copy()), torch.tensor(b)
        layers += [layer, torch.nn.ReLU()]
    model = opacus.GradSampleModule(
        torch.nn.Sequential(*layers[:-1]), loss_reduction="sum"
    )
    loss = torch.nn.BCEWithLogitsLoss(reduction="sum")
    loss(model(torch.tensor(p.x)), torch.tensor(p.y)).backward()
    samples = [leaf.grad_sample for leaf in model.parameters()]
    norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples]).norm(dim=0)
    kept = (norms.median() / norms).clamp(max=1)
    sums = [torch.einsum("i,i...", kept, s).numpy().T for s in samples]
    with jax.enable_x64(True):
        mine = per_example.clipped_value_and_grad(
            *p.arguments(), max_norm=float(norms.median()), reduction="sum"
        )
    np.testing.assert_allclose(mine.norms, norms.numpy(), rtol=EXACT)
    assert relative_error(jax.tree.leaves(mine.grads), sums) <= EXACT
