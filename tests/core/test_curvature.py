import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxbce
from jaxbce import curvature
from tests.helpers import NETWORKS, TOLERANCE, loss_reference, problem, relative_error

SIZES = [(4, 3, 1), (4, 3, 3), (3, 4, 3, 2, 1), (3, 4, 3, 2, 3), (3, 2)]
EXACT = 1e-12  # float64, relative
WEIGHTS = {
    "mean": {},
    "sum, pos_weight": {"pos_weight": 2.5, "reduction": "sum"},
    "weights": {"sample_weight": True, "pos_weight": 0.3},
}


def options(p, name, dtype=np.float64):
    chosen = dict(WEIGHTS[name])
    if "sample_weight" in chosen:
        chosen["sample_weight"] = jnp.asarray(p.sample_weight, dtype)
    return chosen


def jacobian_reference(params, x):
    """`[N, n_L, P]`, by `jax.jacrev`."""
    point, unravel = ravel_pytree(params)

    def logits(point):
        h = x
        *hidden, last = unravel(point)
        for w, b in hidden:
            h = jax.nn.relu(h @ w + b)
        return h @ last.w + last.b

    return jax.jacrev(logits)(point)


def ggn_reference(params, x, y, **options):
    """`Jᵀ S J`, with S by `jax.hessian` of the loss in the logits."""
    jacobian = jacobian_reference(params, x).reshape(y.size, -1)
    outputs = y.shape[1]
    unit = (jaxbce.Layer(jnp.eye(outputs), jnp.zeros(outputs)),)

    def of_logits(a):
        return loss_reference(unit, a.reshape(y.shape), y, **options)

    s = jax.hessian(of_logits)(jaxbce.logits(params, x).ravel())
    return jacobian.T @ s @ jacobian


def hessian_reference(params, x, y, **options):
    point, unravel = ravel_pytree(params)
    return jax.hessian(lambda t: loss_reference(unravel(t), x, y, **options))(point)


def direction(params, seed=3):
    point, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(seed), point.shape, point.dtype))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tangent_kernel_is_the_jacobians_product(sizes):
    p, q = problem(sizes), problem(sizes, rows=11, seed=1)
    with jax.enable_x64(True):
        params, x, _ = p.arguments()
        x2 = q.arguments()[1]
        left, right = (jacobian_reference(params, rows) for rows in (x, x2))
        between = jnp.einsum("nop,mqp->nmoq", left, right)
        within = jnp.einsum("nop,mqp->nmoq", left, left)
        if sizes[-1] == 1:
            between, within = between[:, :, 0, 0], within[:, :, 0, 0]
        for block_size in (None, 10):
            mine = curvature.ntk(params, x, x2, block_size=block_size)
            assert relative_error(mine, between) <= EXACT
            mine = curvature.ntk(params, x, block_size=block_size)
            assert relative_error(mine, within) <= EXACT


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_and_spectrum_are_those_of_explicit_matrices(sizes, name):
    p = problem(sizes)
    with jax.enable_x64(True):
        arguments, weights = p.arguments(), options(p, name)
        v = direction(arguments[0])
        ggn = jax.jit(ggn_reference, static_argnames="reduction")(*arguments, **weights)
        hessian = jax.jit(hessian_reference, static_argnames="reduction")(
            *arguments, **weights
        )
        flat = ravel_pytree(v)[0]
        for block_size in (None, 10):
            for product, matrix in ((curvature.ggn_vp, ggn), (curvature.hvp, hessian)):
                mine = product(*arguments, v, block_size=block_size, **weights)
                chex.assert_trees_all_equal_shapes_and_dtypes(mine, arguments[0])
                truth = matrix @ flat
                assert relative_error(ravel_pytree(mine)[0], truth) <= EXACT
        spectrum = np.linalg.eigvalsh(ggn)[::-1]
        mine = np.asarray(curvature.ggn_eigenvalues(*arguments, **weights))
        most = min(p.y.size, len(flat))
        assert mine.shape == (most,)
        np.testing.assert_allclose(mine, spectrum[:most], atol=EXACT * spectrum[0])
        assert np.all(np.diff(mine) <= 0)
        assert np.all(mine >= 0)


@pytest.mark.parametrize("rows", [5, 60], ids=["few rows", "many rows"])
@pytest.mark.parametrize("sizes", [(4, 3, 1), (3, 4, 3, 3)], ids=str)
def test_either_matrix_gives_the_spectrum_and_the_evidence(sizes, rows):
    p = problem(sizes, rows=rows)
    with jax.enable_x64(True):
        arguments = p.arguments()
        weights = {"sample_weight": jnp.asarray(p.sample_weight), "pos_weight": 2.5}
        ggn = np.asarray(ggn_reference(*arguments, reduction="sum", **weights))
        size = len(ggn)
        point = np.asarray(ravel_pytree(arguments[0])[0])
        spectrum = np.linalg.eigvalsh(ggn)[::-1][: min(size, p.y.size)]
        mine = curvature.ggn_eigenvalues(*arguments, reduction="sum", **weights)
        np.testing.assert_allclose(mine, spectrum, atol=EXACT * spectrum[0])
        some = curvature.ggn_eigenvalues(*arguments, k=3, reduction="sum", **weights)
        np.testing.assert_allclose(some, spectrum[:3], rtol=1e-10)
        misfit = loss_reference(*arguments, reduction="sum", **weights)

        def evidence(tau):
            # Log of the Gaussian integral around params, with its prior.
            log_prior = size / 2 * np.log(tau) - tau / 2 * point @ point
            _, log_det = np.linalg.slogdet(ggn + tau * np.eye(size))
            return -float(misfit) + log_prior - log_det / 2

        for tau in (1e-3, 0.7, 100.0):
            mine = functools.partial(curvature.log_evidence, *arguments, **weights)
            np.testing.assert_allclose(mine(tau), evidence(tau), rtol=1e-11)
            slope = jax.jit(jax.grad(mine))(tau)
            truth = size / (2 * tau) - point @ point / 2
            truth -= np.trace(np.linalg.inv(ggn + tau * np.eye(size))) / 2
            np.testing.assert_allclose(slope, truth, rtol=1e-9)


def test_largest_eigenvalues_come_without_a_matrix():
    p = problem((10, 20, 1), rows=400)
    with jax.enable_x64(True):
        arguments = p.arguments()
        every = curvature.ggn_eigenvalues(*arguments)
        assert every.shape == (241,)
        some = jax.jit(functools.partial(curvature.ggn_eigenvalues, k=8))
        np.testing.assert_allclose(some(*arguments), every[:8], rtol=1e-10)
        program = some.lower(*arguments).as_text()
        assert "241x241" not in program
        assert "400x400" not in program


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ["dead units", "zero", "no weight", "saturated"])
def test_largest_eigenvalues_of_a_matrix_of_low_rank(case, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jax.random.normal(jax.random.key(1), (400, 10), dtype)
        y = jnp.ones((400, 1), dtype)
        first, last = jaxbce.init(jax.random.key(0), (10, 20, 1), dtype=dtype)
        weights = {}
        if case == "dead units":
            first = first._replace(b=first.b - 50)
        elif case == "zero":
            first, last = jax.tree.map(jnp.zeros_like, (first, last))
        elif case == "saturated":
            last = last._replace(w=0 * last.w, b=last.b + 1000)
        else:
            weights = {"sample_weight": jnp.zeros(400, dtype), "reduction": "sum"}
        for k in (2, 20):
            some = curvature.ggn_eigenvalues((first, last), x, y, k=k, **weights)
            every = curvature.ggn_eigenvalues((first, last), x, y, **weights)
            eps = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(some, every[:k], atol=20 * eps * every[0])


def test_evidence_of_a_linear_model_is_near_the_integral():
    """One weight, no bias that matters: Laplace against quadrature."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(50, 1)))
        y = jnp.asarray(rng.random((50, 1)) < 1 / (1 + np.exp(-1.5 * x)))
        tau = 1.0
        grid = np.linspace(-6, 6, 241)
        w, b = (jnp.asarray(t.ravel()) for t in np.meshgrid(grid, grid))
        a = w[:, None] * x[:, 0] + b[:, None]
        ell = jaxbce.bce_with_logits(a, jnp.broadcast_to(y[:, 0], a.shape)).sum(1)
        log_joint = -ell - tau / 2 * (w**2 + b**2) + np.log(tau / (2 * np.pi))
        log_integral = jax.nn.logsumexp(log_joint) + 2 * np.log(grid[1] - grid[0])
        best = jnp.argmax(log_joint)
        params = (jaxbce.Layer(w[best].reshape(1, 1), b[best].reshape(1)),)
        mine = curvature.log_evidence(params, x, y, tau)
    np.testing.assert_allclose(mine, log_integral, atol=0.05)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kronecker_factors_are_their_expectations(sizes):
    p = problem(sizes)
    with jax.enable_x64(True):
        params, x, _ = p.arguments()
        trace = jaxbce.forward(params, x)
        for block_size in (None, 10):
            mine = curvature.kfac_factors(params, x, block_size=block_size)
            g = [0.0] * len(params)
            for label in np.ndindex((2,) * sizes[-1]):  # every label, with its chance
                y = jnp.broadcast_to(jnp.asarray(label, float), p.y.shape)
                y_hat = trace.h[-1]
                chance = jnp.prod(jnp.where(y == 1, y_hat, 1 - y_hat), axis=1)
                for k, d in enumerate(jaxbce.deltas(params, trace, y)):
                    g[k] += (chance[:, None] * d).T @ d / len(x)
            for k, factors in enumerate(mine):
                h = np.pad(trace.h[k], ((0, 0), (0, 1)), constant_values=1)
                assert relative_error(factors.a, h.T @ h / len(x)) <= EXACT
                assert relative_error(factors.g, g[k]) <= EXACT


@pytest.mark.parametrize("sizes", [(4, 3, 1), (3, 4, 3, 2, 3)], ids=str)
def test_kronecker_factors_of_one_row_are_its_gauss_newton_blocks(sizes):
    p = problem(sizes, rows=1)
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        factors = curvature.kfac_factors(params, x)
        v = direction(params)
        for k, (a, g) in enumerate(factors):
            only = [jax.tree.map(jnp.zeros_like, layer) for layer in params]
            only[k] = v[k]
            mine = curvature.ggn_vp(params, x, y, tuple(only))[k]
            block = jnp.vstack([v[k].w, v[k].b]).ravel()
            truth = jnp.kron(a, g) @ block
            both = jnp.vstack([mine.w, mine.b]).ravel()
            assert relative_error(both, truth) <= EXACT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
def test_low_precision_agrees_with_float64(sizes, dtype):
    p = problem(sizes).rounded(dtype)

    def everything(dtype):
        params, x, y = p.arguments(dtype)
        v = jax.tree.map(lambda t: t[::-1], params)
        theta = curvature.ntk(params, x)
        return curvature.hvp(params, x, y, v), curvature.ggn_vp(params, x, y, v), theta

    mine = everything(dtype)
    with jax.enable_x64(True):
        truth = everything(np.float64)
    chex.assert_trees_all_equal_shapes_and_dtypes(mine[0], p.arguments(dtype)[0])
    assert mine[2].dtype == jnp.float32
    # bfloat16 rounds v's pushed-forward activations once more in every layer.
    assert relative_error(mine, truth) <= TOLERANCE[dtype] * (2 if "b" in dtype else 1)


def test_products_are_exact_in_the_tail():
    params = (jaxbce.Layer(jnp.ones((1, 1)), jnp.zeros(1)),)
    v = (jaxbce.Layer(jnp.zeros((1, 1)), jnp.ones(1)),)
    for a in (10.0, 20.0, 40.0, 80.0):
        truth = np.exp(-a) / (1 + np.exp(-a)) ** 2
        for product in (curvature.hvp, curvature.ggn_vp):
            mine = product(params, jnp.full((1, 1), a), jnp.ones((1, 1)), v)
            np.testing.assert_allclose(mine[0].b, truth, rtol=1e-6)


def test_saturated_and_repeated_rows():
    params = (jaxbce.Layer(jnp.ones((2, 1)), jnp.zeros(1)),)
    x = jnp.array([[100.0, 100.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    y = jnp.ones((4, 1))
    theta = curvature.ntk(params, x)
    np.testing.assert_array_equal(theta[1], theta[2])
    np.testing.assert_array_equal(theta[3], np.ones(4))  # the bias alone
    spectrum = curvature.ggn_eigenvalues(params, x, y)
    assert spectrum.shape == (3,)
    assert spectrum[2] <= 1e-7  # two directions are seen by rows that count
    assert np.isfinite(curvature.log_evidence(params, x, y, 1e-6))
    one = curvature.ggn_eigenvalues(params, x[1:2], y[1:2])
    s = 1 / (1 + np.exp(-1)) / (1 + np.exp(1))
    np.testing.assert_allclose(one, [2 * s], rtol=1e-6)
    infinite = (jaxbce.Layer(jnp.zeros((2, 1)), jnp.full(1, np.inf)),)
    assert curvature.ggn_eigenvalues(infinite, x[1:2], y[1:2])[0] == 0


def test_networks_of_a_sweep_map():
    p = problem((4, 3, 1))
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 * leaf]), params)

        def everything(params, tau):
            return (
                curvature.ntk(params, x[:8]),
                curvature.ggn_eigenvalues(params, x[:8], y[:8]),
                curvature.ggn_eigenvalues(params, x, y, k=2),
                curvature.hvp(params, x, y, params),
                curvature.log_evidence(params, x, y, tau),
                curvature.kfac_factors(params, x),
            )

        taus = jnp.array([0.1, 1.0, 10.0])
        mapped = jax.vmap(everything)(stacked, taus)
        for i in range(3):
            member = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            of_one = jax.tree.map(lambda leaf, i=i: leaf[i], mapped)
            assert relative_error(of_one, everything(member, taus[i])) <= 1e-10


def test_tangent_kernel_holds_no_jacobian():
    rows, sizes = 512, (64, 256, 1)
    params, x, _ = problem(sizes, rows=rows).arguments(np.float32)
    memory = jax.jit(curvature.ntk).lower(params, x).compile().memory_analysis()
    assert memory is not None
    activations = rows * sum(sizes)
    assert memory.temp_size_in_bytes <= 4 * (4 * rows**2 + 4 * activations)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: curvature.ntk(a[0], a[1], a[1][:, 1:]), r"x2 of .* got \(37, 3\)"),
        (lambda a: curvature.hvp(*a, a[0][:1]), "v to be a tuple .* got PyTreeDef"),
        (lambda a: curvature.ggn_vp(*a, a[0][::-1]), r"v with the .* got .*\(3, 1\)"),
        (
            lambda a: curvature.hvp(*a, jax.tree.map(lambda t: t > 0, a[0])),
            "dtype of v.* got bool",
        ),
        (lambda a: curvature.hvp(*a, a[0], reduction="max"), "reduction .* got 'max'"),
        (
            lambda a: curvature.ggn_eigenvalues(*a, k=20),
            "k to be .* to 19, .* got 20",
        ),
        (lambda a: curvature.ggn_eigenvalues(*a, k=0), "k to be .* got 0"),
        (
            lambda a: curvature.log_evidence(a[0], a[1], a[2], 0.0),
            "prior_precision to be a number > 0, got 0.0",
        ),
        (
            lambda a: curvature.log_evidence(a[0], a[1], a[2], jnp.ones(2)),
            "prior_precision .* got an array of shape",
        ),
        (lambda a: curvature.kfac_factors(*a[:2], block_size=0), "block_size .* got 0"),
    ],
)
def test_a_wrong_argument_is_named(call: Any, message):
    arguments: Any = problem((4, 3, 1)).arguments(np.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        call(arguments)
