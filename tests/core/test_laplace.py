import functools
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbce
from jaxbce import curvature, laplace
from tests.core.test_curvature import flat, jacobian_reference
from tests.helpers import TOLERANCE, member, problem, relative_error

EXACT = 1e-10  # float64, relative
P = 2.5  # pos_weight
# Layers, examples and what is uncertain; the size of the matrix that is factorized.
CASES = {
    "one output, by examples": ((4, 3, 1), 8, "all", 8),
    "one output, by parameters": ((4, 3, 1), 40, "all", 19),
    "three layers, by examples": ((3, 4, 3, 3), 5, "all", 15),
    "three layers, by parameters": ((3, 4, 3, 3), 40, "all", 43),
    "last layer, by examples": ((3, 4, 3, 3), 3, "last", 9),
    "last layer, by parameters": ((4, 3, 1), 40, "last", 4),
    "as many logits as parameters": ((3, 2), 4, "all", 8),
}


def sigma(a):
    return 1 / (1 + np.exp(-a))


def delta_reference(a, y, p=P):
    return (1 - y) * sigma(a) - p * y * sigma(-a)


def loss_of_logits(a, y, p=P):
    ell = p * y * np.logaddexp(0, -a) + (1 - y) * np.logaddexp(0, a)
    return ell.sum(1)


class Dense(NamedTuple):
    """The approximation by matrices of all parameters, in float64 NumPy."""

    a: Any  # [N, n_L]
    jacobian: Any  # [N, n_L, P]
    s: Any  # weighted second derivatives, [N, n_L]
    delta: Any  # weighted, [N, n_L]
    h: Any  # [P, P]
    tau: Any  # [P]
    selected: slice  # of all parameters

    @property
    def inverse(self):
        return np.linalg.inv(self.h)

    @property
    def ggn(self):
        return self.h - np.diag(self.tau)


def dense(params, x, y, taus, weight, *, layers="all", p=P):
    sizes = [layer.w.size + layer.b.size for layer in params]
    selected = slice(0 if layers == "all" else sum(sizes[:-1]), sum(sizes))
    tau = np.repeat(np.broadcast_to(taus, len(params)), sizes)[selected]
    y = np.asarray(y)
    a = np.asarray(jaxbce.logits(params, x))
    jacobian = np.asarray(jacobian_reference(params, x))[..., selected]
    s = weight[:, None] * ((1 - y) + p * y) * sigma(a) * sigma(-a)
    h = np.einsum("nop,no,noq->pq", jacobian, s, jacobian) + np.diag(tau)
    delta = weight[:, None] * delta_reference(a, y, p)
    return Dense(a, jacobian, s, delta, h, tau, selected)


def everything(*arguments: Any, layers: Any = "all", p: float = P) -> Any:
    """What the library finds, in one program per shape."""
    *_, weight = arguments
    return _everything(*arguments, np.asarray(p, weight.dtype), layers=layers)


@functools.partial(jax.jit, static_argnames="layers")
def _everything(params, x, y, taus, x2, y2, weight, p, *, layers: Any):
    weights: Any = {"sample_weight": weight, "pos_weight": p}

    def evidence(taus):
        result = laplace.posterior(params, x, y, taus, layers=layers, **weights)
        return laplace.log_evidence(result), result

    (value, result), slope = jax.value_and_grad(evidence, has_aux=True)(taus)
    return {
        "factor": result.factor,
        "covariance": laplace.logit_covariance(result, x2),
        "proba": laplace.predict_proba(result, x2),
        "influence": laplace.influence(result, x2, y2),
        "leave_one_out": laplace.leave_one_out(result),
        "evidence": value,
        "slope": slope,
    }


ROWS = pytest.mark.parametrize("rows", [8, 40], ids=["by examples", "by parameters"])


def small_case(rows: int, dtype: Any = np.float64) -> Any:
    """Arguments of `everything`, of the shapes of the first two cases."""
    params, x, y = problem((4, 3, 1), rows=rows).arguments(dtype)
    x2, y2 = problem((4, 3, 1), rows=7, seed=1).arguments(dtype)[1:]
    taus = np.array([0.3, 2], x.dtype)
    return params, x, y, taus, x2, y2, np.ones(rows, x.dtype)


@functools.cache
def case(name):
    """What the library finds, what dense algebra does, and the arguments."""
    sizes, rows, layers, _ = CASES[name]
    p, q = problem(sizes, rows=rows), problem(sizes, rows=7, seed=1)
    weight = p.sample_weight.copy()
    weight[1] = 0
    taus = np.linspace(0.3, 2, len(sizes) - 1)
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        _, x2, y2 = q.arguments()
        found = everything(params, x, y, taus, x2, y2, weight, layers=layers)
        found = jax.tree.map(np.asarray, found)
        truth = dense(params, x, y, taus, weight, layers=layers)
        j2 = np.asarray(jacobian_reference(params, x2))[..., truth.selected]
        a2 = np.asarray(jaxbce.logits(params, x2))
    return found, truth, (p, q, a2, j2)


EVERY_CASE = pytest.mark.parametrize("name", CASES)


@pytest.mark.slow_ids("three layers")
@EVERY_CASE
def test_the_smaller_matrix_is_factorized(name):
    found, truth, _ = case(name)
    size = CASES[name][-1]
    assert found["factor"].shape == (size, size)
    # Both matrices have the determinant of H / T.
    _, log_det = np.linalg.slogdet(truth.h / truth.tau)
    mine = 2 * np.log(np.diagonal(found["factor"])).sum()
    np.testing.assert_allclose(mine, log_det, rtol=EXACT)


@EVERY_CASE
def test_covariance_and_probability_are_those_of_the_inverse(name):
    found, truth, (_, _, a2, j2) = case(name)
    covariance = np.einsum("mop,pq,mrq->mor", j2, truth.inverse, j2)
    assert relative_error(found["covariance"], covariance) <= EXACT
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    proba = sigma(a2 / np.sqrt(1 + np.pi * variance / 8))
    assert relative_error(found["proba"], proba) <= EXACT


@EVERY_CASE
def test_influence_is_that_of_the_inverse(name):
    found, truth, (_, q, a2, j2) = case(name)
    left = np.einsum("nop,no->np", truth.jacobian, truth.delta)
    right = np.einsum("mop,mo->mp", j2, delta_reference(a2, q.y))
    assert relative_error(found["influence"], left @ truth.inverse @ right.T) <= EXACT
    assert not found["influence"][1].any()  # of weight 0


@EVERY_CASE
def test_leave_one_out_is_a_step_with_the_hessian_of_the_others(name):
    found, truth, (p, *_) = case(name)
    mine = found["leave_one_out"]
    logits = []
    for a, j, s, delta in zip(*truth[:4], strict=True):
        others = truth.h - j.T @ np.diag(s) @ j
        logits.append(a + j @ np.linalg.solve(others, j.T @ delta))
    assert relative_error(mine.logits, np.array(logits)) <= EXACT
    assert relative_error(mine.loss, loss_of_logits(np.array(logits), p.y)) <= EXACT
    np.testing.assert_array_equal(mine.logits[1], truth.a[1])  # of weight 0


@EVERY_CASE
def test_leverages_add_up_to_the_effective_number_of_parameters(name):
    found, truth, _ = case(name)
    mine = found["leave_one_out"].leverage
    each = np.einsum("nop,pq,noq->no", truth.jacobian, truth.inverse, truth.jacobian)
    assert relative_error(mine, (truth.s * each).sum(1)) <= EXACT
    total = np.trace(truth.inverse @ truth.ggn)
    np.testing.assert_allclose(mine.sum(), total, rtol=EXACT)


@EVERY_CASE
def test_evidence_is_the_gaussian_integral_and_has_its_slope(name):
    found, truth, (p, *_) = case(name)
    weight = p.sample_weight.copy()
    weight[1] = 0
    misfit = weight @ loss_of_logits(truth.a, p.y)
    theta, tau = flat(p.params)[truth.selected], truth.tau

    def evidence(tau):
        _, log_det = np.linalg.slogdet(truth.ggn + np.diag(tau))
        return -misfit - tau @ theta**2 / 2 + (np.log(tau).sum() - log_det) / 2

    np.testing.assert_allclose(found["evidence"], evidence(tau), rtol=EXACT)
    sizes = [layer.w.size + layer.b.size for layer in p.params]
    layer = np.repeat(np.arange(len(sizes)), sizes)[truth.selected]
    for k in range(len(sizes)):
        step = np.where(layer == k, 1e-5, 0)
        slope = (evidence(tau + step) - evidence(tau - step)) / 2e-5
        np.testing.assert_allclose(found["slope"][k], slope, rtol=1e-7, atol=1e-7)


def test_leave_one_out_is_one_newton_step_from_the_minimum():
    """Of logistic regression, where logits are linear in the parameters."""
    p = problem((3, 2), rows=20)
    x = np.pad(p.x, ((0, 0), (0, 1)), constant_values=1)
    tau, s = 0.7, p.sample_weight

    def newton_step(w, s):  # [4, 2], output by output
        a = x @ w
        g = x.T @ (s[:, None] * delta_reference(a, p.y)) + tau * w
        curvatures = s[:, None] * (1 - p.y + P * p.y) * sigma(a) * sigma(-a)
        h = np.einsum("np,no,nq->opq", x, curvatures, x) + tau * np.eye(4)
        return np.linalg.solve(h, g.T[:, :, None])[:, :, 0].T

    w = np.zeros((4, 2))
    for _ in range(30):
        w -= newton_step(w, s)
    with jax.enable_x64(True):
        params = (jaxbce.Layer(jnp.array(w[:3]), jnp.array(w[3])),)
        result = laplace.posterior(params, p.x, p.y, tau, sample_weight=s, pos_weight=P)
        mine = np.asarray(laplace.leave_one_out(result).logits)
    for i in range(20):
        without = np.where(np.arange(20) == i, 0, s)
        truth = x[i] @ (w - newton_step(w, without))
        np.testing.assert_allclose(mine[i], truth, rtol=EXACT, atol=EXACT)


@ROWS
def test_scalar_and_equal_precisions_give_the_evidence_of_curvature(rows):
    params, x, y = problem((4, 3, 1), rows=rows).arguments(np.float32)
    truth = curvature.log_evidence(params, x, y, 0.7)
    taus: Any = (0.7, (0.7, jnp.float32(0.7)), np.full(2, 0.7))
    for tau in taus:
        mine = laplace.log_evidence(laplace.posterior(params, x, y, tau))
        np.testing.assert_array_equal(mine, truth)


@pytest.mark.slow
@ROWS
def test_all_results_have_derivatives_in_the_precisions_and_params(rows):
    def results(params, taus):
        found = everything(params, x, y, taus, x2, y2, one)
        return [found[name] for name in ("covariance", "influence", "leave_one_out")]

    with jax.enable_x64(True):
        params, x, y, taus, x2, y2, one = small_case(rows)
        at = params, taus
        step = jax.tree.map(lambda t: 1e-6 * jnp.cos(t), at)
        mine = jax.jit(functools.partial(jax.jvp, results))(at, step)[1]
        above = results(*jax.tree.map(jnp.add, at, step))
        below = results(*jax.tree.map(jnp.subtract, at, step))
        truth = jax.tree.map(lambda a, b: (a - b) / 2, above, below)
    assert relative_error(mine, truth) <= 1e-6


def test_the_last_layer_is_a_network_of_its_inputs():
    with jax.enable_x64(True):
        params, x, y, taus, *others = small_case(40)
        mine = everything(params, x, y, taus, *others, layers="last")
        hidden, hidden2 = (jaxbce.forward(params, t).h[1] for t in (x, others[0]))
        others[0] = hidden2
        truth = everything(params[1:], hidden, y, taus[1:], *others)
        slope = mine.pop("slope")
        assert slope[0] == 0  # of the other layer
        assert relative_error(slope[1:], truth.pop("slope")) <= EXACT
        assert relative_error(mine, truth) <= EXACT


def linear(dtype, scale=1.0):
    layer: Any = jaxbce.Layer
    return (layer(np.full((1, 1), scale, dtype), np.zeros(1, dtype)),)


@pytest.mark.parametrize("rows", [1, 6], ids=["by examples", "by parameters"])
@pytest.mark.parametrize(("dtype", "large"), [("float32", 300.0), ("float64", 2e3)])
def test_saturated_examples_agree_with_the_limit(dtype, large, rows):
    """S is far below rounding, so that each step is that of the prior."""
    tau, tiny = 2.0, float(jnp.finfo(dtype).tiny)
    for a, y in ((40.0, 0.0), (40.0, 1.0), (large, 0.0), (large, 1.0)):
        with jax.enable_x64(dtype == "float64"):
            x: Any = np.full((rows, 1), a, dtype)
            labels: Any = np.full((rows, 1), y, dtype)
            one, taus = np.ones(rows, dtype), np.full(1, tau, dtype)
            found = everything(linear(dtype), x, labels, taus, x, labels, one, p=1)
        found = jax.tree.map(lambda t: np.asarray(t, float), found)
        prior = (1 + a**2) / tau
        e = np.exp(-a)
        delta = 1 / (1 + e) if y == 0 else -e / (1 + e)
        mine = found["leave_one_out"]
        close = functools.partial(
            np.testing.assert_allclose, rtol=1e-5, atol=tiny * prior
        )
        close(found["covariance"], np.full((rows, 1, 1), prior))
        close(mine.logits, np.full((rows, 1), a + prior * delta))
        close(mine.leverage, np.full(rows, prior * e / (1 + e) ** 2))
        close(found["influence"], np.full((rows, rows), delta**2 * prior))
        close(found["evidence"], -rows * (a if y == 0 else e) - tau / 2)


def positive_case(rows: int) -> Any:
    """The same with logits that are larger the larger the features are."""
    params, x, y, *others = small_case(rows)
    return jax.tree.map(abs, params), abs(x), y.at[0].set(1), *others


@ROWS
def test_saturated_examples_in_float32_agree_with_float64(rows):
    found = []
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            params, x, y, taus, x2, y2, one = small_case(rows, dtype)
            a = jaxbce.logits(params, 1e3 * x)
            x = x.at[:4].multiply(4e4 / abs(a[:4]))  # logits of about ±40
            y = y.at[:4].set(jnp.array([[0], [1], [1], [0]], dtype))
            assert np.all(abs(abs(jaxbce.logits(params, x[:4])) - 40) < 2)
            found.append(everything(params, x, y, taus, x2, y2, one))
    mine, truth = (jax.tree.map(np.asarray, t) for t in found)
    for name in ("covariance", "proba", "influence", "leave_one_out", "evidence"):
        assert relative_error(mine[name], truth[name]) <= 1e-4


@ROWS
def test_an_example_of_weight_0_is_ignored_whatever_its_features_and_label(rows):
    with jax.enable_x64(True):
        params, x, y, *others, s = small_case(rows)
        s[0] = 0
        truth = everything(params, x, y, *others, s)
        for feature in (1e200, 1.7e308, np.inf, np.nan):
            extreme, label = x.at[0].set(feature), y.at[0].set(np.nan)
            found = everything(params, extreme, label, *others, s)
            assert not found["influence"][0].any()
            assert found["leave_one_out"].leverage[0] == 0
            mine, theirs = (
                result | {"leave_one_out": [t[1:] for t in result["leave_one_out"]]}
                for result in (found, truth)
            )
            assert relative_error(mine, theirs) <= EXACT


@ROWS
def test_a_saturated_example_that_is_right_is_as_if_it_were_not_there(rows):
    with jax.enable_x64(True):
        params, x, y, taus, x2, y2, one = positive_case(rows)
        y2 = y2.at[0].set(1)
        without = one.copy()
        without[0] = 0
        truth = everything(params, x, y, taus, x2, y2, without)
        for feature in (1e4, 1e200, np.inf):
            extreme, extreme2 = (t.at[0].set(feature) for t in (x, x2))
            found = everything(params, extreme, y, taus, extreme2, y2, one)
            assert not found["influence"][0].any()
            assert not found["influence"][:, 0].any()
            mine, theirs = found["leave_one_out"], truth["leave_one_out"]
            assert mine.logits[0] == jaxbce.logits(params, extreme)[0]
            assert mine.loss[0] == mine.leverage[0] == 0
            assert (
                relative_error([t[1:] for t in mine], [t[1:] for t in theirs]) <= EXACT
            )
            assert relative_error(found["evidence"], truth["evidence"]) <= EXACT
            for name, part in (("covariance", np.s_[1:]), ("influence", np.s_[1:, 1:])):
                assert relative_error(found[name][part], truth[name][part]) <= EXACT


@EVERY_CASE
def test_without_the_only_example_that_counts_a_network_has_its_prior(name):
    sizes, rows, layers, _ = CASES[name]
    p, q = problem(sizes, rows=rows), problem(sizes, rows=7, seed=1)
    only = np.eye(rows)[0]
    taus = np.linspace(0.3, 2, len(sizes) - 1)
    with jax.enable_x64(True):
        arguments = p.arguments()
        found = everything(*arguments, taus, *q.arguments()[1:], only, layers=layers)
        truth = dense(*arguments, taus, 0 * only, layers=layers)
    mine, j = found["leave_one_out"], truth.jacobian[0]
    step = j @ (j / truth.tau).T @ delta_reference(truth.a, p.y)[0]
    assert relative_error(mine.logits[0], truth.a[0] + step) <= EXACT
    np.testing.assert_array_equal(mine.logits[1:], truth.a[1:])


@ROWS
def test_two_copies_of_an_example_are_one_of_twice_the_weight(rows):
    with jax.enable_x64(True):
        params, x, y, *others, one = small_case(rows)
        x, y = x.at[1].set(x[0]), y.at[1].set(y[0])
        twice = one.copy()
        twice[:2] = 2, 0
        found = everything(params, x, y, *others, one)
        truth = everything(params, x, y, *others, twice)
    for name in ("covariance", "evidence", "slope"):
        assert relative_error(found[name], truth[name]) <= EXACT
    mine, theirs = (np.asarray(t["influence"]) for t in (found, truth))
    np.testing.assert_allclose(mine[0], mine[1], rtol=EXACT)
    assert relative_error(mine[0] + mine[1], theirs[0]) <= EXACT
    assert relative_error(mine[2:], theirs[2:]) <= EXACT
    # Without one copy, the other still supports its logits.
    one, both = (np.asarray(t["leave_one_out"].leverage) for t in (found, truth))
    np.testing.assert_allclose(one[:2], both[0] / 2, rtol=EXACT)


@ROWS
def test_results_are_finite_for_any_precision(rows):
    """In float32, where rounding is larger than the smallest eigenvalues of B."""
    params, x, y, _, x2, y2, one = small_case(rows, np.float32)
    x = jnp.concatenate([x[:4], x[:4], x[8:]])
    for tau in (1e-12, 1e-6, 1e12):
        taus = np.full(2, tau, "f")
        found = everything(params, x, y, taus, x2, y2, 1e3 * one)
        leaves = jax.tree.leaves(found)
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        leverage = np.asarray(found["leave_one_out"].leverage)
        assert np.min(leverage) >= 0
        assert np.max(leverage) <= 1


@pytest.mark.parametrize("rows", [1, 3], ids=["by examples", "by parameters"])
def test_leverage_is_between_0_and_the_number_of_outputs(rows):
    params, x, y = problem((1, 2), rows=rows).arguments(np.float32)

    def leverage(tau):
        return laplace.leave_one_out(laplace.posterior(params, x, y, tau)).leverage

    found = np.asarray(jax.vmap(leverage)(jnp.geomspace(1e-30, 1e-6, 100)))
    assert np.min(found) >= 0
    assert np.max(found) <= 2
    assert np.any(found > 1)


def test_a_matrix_whose_trace_overflows_is_factorized():
    b = 1.2e38 * jnp.ones((3, 3)).at[0, 1].set(1.001).at[1, 0].set(1.001)  # indefinite
    assert np.isfinite(laplace._cholesky(b)).all()


def test_a_query_with_one_saturated_output_keeps_its_features():
    """Its δ is 0 in one output, and 1 in the other."""
    with jax.enable_x64(True):
        params, x, y = problem((3, 2), rows=9).arguments()
        x2 = 1e4 * x[:1]
        right = (jaxbce.logits(params, x2) > 0).astype(y.dtype)
        posterior = laplace.posterior(params, x, y, 0.7)
        covariance = dense(params, x, y, 0.7, np.ones(9), p=1)
        delta = delta_reference(np.asarray(jaxbce.logits(params, x)), np.asarray(y), 1)
        j, j2 = covariance.jacobian, np.asarray(jacobian_reference(params, x2))[0]
        for wrong in (0, 1):
            y2 = right.at[0, wrong].set(1 - right[0, wrong])
            delta2 = np.asarray(right - y2)[0]
            g = np.einsum("nop,no->np", j, delta)
            truth = g @ covariance.inverse @ (delta2 @ j2)
            found = laplace.influence(posterior, x2, y2)[:, 0]
            assert relative_error(found, truth) <= EXACT


def test_variances_are_not_negative_where_they_are_a_small_difference():
    x, y = jnp.ones((1, 1)), jnp.ones((1, 1))

    def variance(tau):
        result = laplace.posterior(linear("float32"), x, y, tau)
        return laplace.logit_covariance(result, x)

    variances = jax.vmap(variance)(jnp.geomspace(1e-9, 1e-6, 100))
    assert np.min(np.asarray(variances)) == 0  # of the prior's 1e6 and more


def test_logits_without_a_decisive_example_move_the_right_way():
    """Each of two examples alone determines a direction, and has leverage 1."""
    x, y = jnp.array([[1.0], [-0.3]]), jnp.array([[1.0], [0.0]])

    def logits(tau):
        result = laplace.posterior(linear("float32"), x, y, tau)
        return laplace.leave_one_out(result).logits

    found = np.asarray(jax.vmap(logits)(jnp.geomspace(1e-30, 1e-6, 100)))[:, :, 0]
    assert np.isfinite(found).all()
    assert np.max(found[:, 0]) < -1e4
    assert np.min(found[:, 1]) > 1e4


@pytest.mark.slow_ids("bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@ROWS
def test_low_precision_agrees_with_float64(rows, dtype):
    rounded = jax.tree.map(np.asarray, small_case(rows, dtype))
    mine = everything(*rounded[:-1], np.ones(rows, "f"))
    assert mine["covariance"].dtype == jnp.float32
    with jax.enable_x64(True):
        truth = everything(*jax.tree.map(lambda t: t.astype(float), rounded))
    for name in ("covariance", "proba", "influence", "leave_one_out", "evidence"):
        # Differences of variances, and products of several rounded factors.
        assert relative_error(mine[name], truth[name]) <= 3 * TOLERANCE[dtype]


@ROWS
def test_networks_of_a_sweep_map(rows):
    with jax.enable_x64(True):
        params, x, y, _, x2, y2, one = small_case(rows)
        stacked = jax.tree.map(lambda t: jnp.stack([t, -t, 2 * t]), params)
        taus = np.array([[0.1, 1.0], [2.0, 0.5], [10.0, 3.0]])

        @jax.jit
        def mapped(stacked, taus):
            posteriors = jax.vmap(laplace.posterior, (0, None, None, 0))(
                stacked, x, y, taus
            )
            return {
                "factor": posteriors.factor,
                "covariance": jax.vmap(laplace.logit_covariance, (0, None))(
                    posteriors, x2
                ),
                "proba": jax.vmap(laplace.predict_proba, (0, None))(posteriors, x2),
                "influence": jax.vmap(laplace.influence, (0, None, None))(
                    posteriors, x2, y2
                ),
                "leave_one_out": jax.vmap(laplace.leave_one_out)(posteriors),
                "evidence": jax.vmap(laplace.log_evidence)(posteriors),
            }

        found = mapped(stacked, taus)
        for i in range(3):
            network = jax.tree.map(jnp.asarray, member(stacked, i))
            truth = everything(network, x, y, taus[i], x2, y2, one, p=1)
            del truth["slope"]
            assert relative_error(member(found, i), truth) <= EXACT


@ROWS
def test_blocks_of_examples_give_what_one_pass_gives(rows):
    p = problem((4, 3, 1), rows=rows)
    many = problem((4, 3, 1), rows=600, seed=1)  # blocks have at most 256
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        _, x2, y2 = many.arguments()
        found, truth = (
            laplace.posterior(params, x, y, 0.7, block_size=size) for size in (3, None)
        )
        assert relative_error(found, truth) <= EXACT
        covariance = laplace.logit_covariance(truth, x2)
        influence = laplace.influence(truth, x2, y2)
        part = slice(500, 520)
        some = laplace.logit_covariance(truth, x2[part])
        assert relative_error(covariance[part], some) <= EXACT
        some = laplace.influence(truth, x2[part], y2[part])
        assert relative_error(influence[:, part], some) <= EXACT


def test_a_posterior_can_be_serialized_and_used():
    params, x, y, taus, x2, *_ = small_case(8, np.float32)

    def covariance(params, x, y, taus, x2):
        result = laplace.posterior(params, x, y, taus)
        return result, laplace.leave_one_out(result)

    exported = jax.export.export(jax.jit(covariance))(params, x, y, taus, x2)
    exported = jax.export.deserialize(exported.serialize())
    found, left_out = exported.call(params, x, y, taus, x2)
    assert isinstance(left_out, laplace.LeaveOneOut)
    truth = laplace.posterior(params, x, y, taus)
    mine = laplace.logit_covariance(found, x2)
    assert relative_error(mine, laplace.logit_covariance(truth, x2)) <= 1e-5


def test_uncertainty_grows_away_from_the_data_and_never_crosses_one_half():
    params, x, y = problem((4, 3, 1)).arguments(np.float32)
    result = laplace.posterior(params, x, y, 1.0)
    far = jnp.concatenate([x, 10 * x, 1e3 * x])
    plain = np.asarray(jaxbce.predict_proba(params, far)) - 0.5
    mine = np.asarray(laplace.predict_proba(result, far)) - 0.5
    assert np.all(mine * plain >= 0)
    assert np.all(np.abs(mine) <= np.abs(plain))
    variance = np.asarray(laplace.logit_covariance(result, far)).reshape(3, -1)
    assert np.all(np.diff(np.median(variance, axis=1)) > 0)


def test_a_posterior_does_not_hold_what_it_does_not_need():
    params, x, y = problem((4, 3, 1)).arguments(np.float32)
    result = laplace.posterior(params, x, y, 1.0, layers="last")
    assert result.factor.shape == (4, 4)
    assert result.prior_precision.shape == (1,)
    held = sum(leaf.size for leaf in jax.tree.leaves(result))
    assert held == 19 + 37 * (4 + 1 + 1) + 1 + 1 + 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a, _: laplace.posterior(*a, prior_precision=0.0),
            "prior_precision to be a number > 0, got 0.0",
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision=(1.0, -1.0)),
            r"prior_precision\[1\] to be a number > 0, got -1.0",
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision=np.array([np.nan, 1])),
            r"prior_precision\[0\] to be a number > 0, got nan",
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision=np.inf),
            "prior_precision to be finite in float32, got inf",
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision=(1.0, 1e39)),
            r"prior_precision\[1\] to be finite in float32, got 1e\+39",
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision=(1.0, 1.0, 1.0)),
            r"prior_precision .* of shape \(2,\), got an array of shape \(3,\)",
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision=np.ones((2, 1))),
            r"prior_precision .* got an array of shape \(2, 1\)",
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision="1"),  # pyright: ignore
            "prior_precision to be a number > 0, got str",
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision=np.array([True, True])),
            r"prior_precision\[0\] .* dtype bool",
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision=1.0, layers="first"),  # pyright: ignore
            'layers to be "all" or "last", got \'first\'',
        ),
        (
            lambda a, _: laplace.posterior(*a, prior_precision=1.0, block_size=0),
            "block_size .* got 0",
        ),
        (
            lambda a, _: laplace.posterior(*a[:2], y=a[2].T, prior_precision=1.0),
            r"y of shape \(37, 1\)",
        ),
        (
            lambda a, _: laplace.logit_covariance(a[0], a[1]),
            "posterior to be a Posterior, .* got tuple",
        ),
        (lambda a, p: laplace.logit_covariance(p, a[1].T), "x looks transposed"),
        (
            lambda a, p: laplace.influence(p, a[1][:, 1:], a[2]),
            r"x2 of .* got \(37, 3\)",
        ),
        (
            lambda a, p: laplace.influence(p, a[1], a[2][1:]),
            r"y2 of shape \(37, 1\).* got \(36, 1\)",
        ),
        (
            lambda a, p: laplace.leave_one_out(jax.tree.map(lambda t: t[None], p)),
            r"params\[0\].w of shape .* got \(1, 4, 3\); for stacked .* use jax.vmap",
        ),
        (lambda a, _: laplace.log_evidence(None), "posterior .* got NoneType"),  # pyright: ignore
    ],
)
def test_a_wrong_argument_is_named(call: Any, message):
    arguments: Any = problem((4, 3, 1)).arguments(np.float32)
    result = laplace.posterior(*arguments, prior_precision=1.0)
    with pytest.raises((TypeError, ValueError), match=message):
        call(arguments, result)
