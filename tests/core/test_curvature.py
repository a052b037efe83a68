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
from tests.helpers import (
    NETWORKS,
    TOLERANCE,
    loss_reference,
    member,
    options,
    problem,
    relative_error,
)

SIZES = [(4, 3, 1), (4, 3, 3), (3, 4, 3, 2, 1), (3, 4, 3, 2, 3), (3, 2)]
EXACT = 1e-12  # float64, relative
WEIGHTS = {
    "mean": {},
    "sum, pos_weight": {"pos_weight": 2.5, "reduction": "sum"},
    "weights": {"sample_weight": True, "pos_weight": 0.3},
}


@jax.jit
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


@functools.partial(jax.jit, static_argnames="reduction")
def ggn_reference(params, x, y, **options):
    """`Jᵀ S J`, with S by `jax.hessian` of the loss in the logits."""
    jacobian = jacobian_reference(params, x).reshape(y.size, -1)
    outputs = y.shape[1]
    unit = (jaxbce.Layer(jnp.eye(outputs), jnp.zeros(outputs)),)

    def of_logits(a):
        return loss_reference(unit, a.reshape(y.shape), y, **options)

    s = jax.hessian(of_logits)(jaxbce.logits(params, x).ravel())
    return jacobian.T @ s @ jacobian


@functools.partial(jax.jit, static_argnames="reduction")
def hessian_reference(params, x, y, **options):
    point, unravel = ravel_pytree(params)
    return jax.hessian(lambda t: loss_reference(unravel(t), x, y, **options))(point)


def direction(params, seed=3):
    """A random vector like params, in NumPy."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)


def flat(tree):
    """A pytree as one vector, in the order of `ravel_pytree`."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@functools.partial(jax.jit, static_argnames="block_size")
def kernels(params, x, x2, *, block_size):
    return [curvature.ntk(params, x, other, block_size=block_size) for other in x2]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tangent_kernel_is_the_jacobians_product(sizes):
    p, q = problem(sizes), problem(sizes, rows=11, seed=1)
    with jax.enable_x64(True):
        params, x, _ = p.arguments()
        x2 = q.arguments()[1]
        left, right = (np.asarray(jacobian_reference(params, rows)) for rows in (x, x2))
        between = np.einsum("nop,mqp->nmoq", left, right)
        within = np.einsum("nop,mqp->nmoq", left, left)
        if sizes[-1] == 1:
            between, within = between[:, :, 0, 0], within[:, :, 0, 0]
        for block_size in (None, 10):
            mine = kernels(params, x, (x2, None), block_size=block_size)
            assert relative_error(mine, [between, within]) <= EXACT


@functools.partial(jax.jit, static_argnames="reduction")
def products_and_spectrum(params, x, y, v, reduction="mean", **weights):
    """What the library finds, in one program: in one pass, in blocks, and spectra."""
    weights["reduction"] = reduction
    products = [
        product(params, x, y, v, block_size=block_size, **weights)
        for block_size in (None, 10)
        for product in (curvature.ggn_vp, curvature.hvp)
    ]
    return products, curvature.ggn_eigenvalues(params, x, y, **weights)


PAIRS = [
    pytest.param(sizes, name, id=f"{sizes}-{name}")
    for sizes in SIZES
    for name in WEIGHTS
]


@pytest.mark.slow_ids("(3, 4, 3, 2, 1)")
@pytest.mark.parametrize(("sizes", "name"), PAIRS)
def test_products_and_spectrum_are_those_of_explicit_matrices(sizes, name):
    p = problem(sizes)
    v = direction(p.params)
    weights = options(p, WEIGHTS[name])
    # The references are of weighted sums, and so one program per shape.
    s = weights.get("sample_weight", np.ones(len(p.x)))
    total = {"sample_weight": s, "pos_weight": np.float64(weights.get("pos_weight", 1))}
    divisor = 1 if weights.get("reduction") == "sum" else s.sum()
    with jax.enable_x64(True):
        arguments = p.arguments()
        ggn, hessian = (
            np.asarray(reference(*arguments, reduction="sum", **total)) / divisor
            for reference in (ggn_reference, hessian_reference)
        )
        products, mine = products_and_spectrum(*arguments, v, **weights)
        for found, matrix in zip(products, (ggn, hessian) * 2, strict=True):
            chex.assert_trees_all_equal_shapes_and_dtypes(found, arguments[0])
            assert relative_error(flat(found), matrix @ flat(v)) <= EXACT
    spectrum = np.linalg.eigvalsh(ggn)[::-1]
    mine = np.asarray(mine)
    most = min(p.y.size, len(flat(v)))
    assert mine.shape == (most,)
    np.testing.assert_allclose(mine, spectrum[:most], atol=EXACT * spectrum[0])
    assert np.all(np.diff(mine) <= 0)
    assert np.all(mine >= 0)


@jax.jit
def spectra_and_evidence(params, x, y, taus, weights):
    """What the library finds, in one program; evidence and its slope per precision."""
    summed = weights | {"reduction": "sum"}
    evidence = functools.partial(curvature.log_evidence, params, x, y, **weights)
    return (
        curvature.ggn_eigenvalues(params, x, y, **summed),
        curvature.ggn_eigenvalues(params, x, y, k=3, **summed),
        jax.lax.map(jax.value_and_grad(evidence), taus),
    )


@pytest.mark.parametrize("rows", [5, 60], ids=["few rows", "many rows"])
@pytest.mark.parametrize("sizes", [(4, 3, 1), (3, 4, 3, 3)], ids=str)
def test_either_matrix_gives_the_spectrum_and_the_evidence(sizes, rows):
    p = problem(sizes, rows=rows)
    weights = {"sample_weight": p.sample_weight, "pos_weight": np.float64(2.5)}
    taus = np.array([1e-3, 0.7, 100.0])
    with jax.enable_x64(True):
        arguments = p.arguments()
        ggn = np.asarray(ggn_reference(*arguments, reduction="sum", **weights))
        size = len(ggn)
        mine, some, (evidences, slopes) = jax.tree.map(
            np.asarray, spectra_and_evidence(*arguments, taus, weights)
        )
        reference = jax.jit(functools.partial(loss_reference, reduction="sum"))
        misfit = float(reference(*arguments, **weights))
    point = flat(p.params)
    spectrum = np.linalg.eigvalsh(ggn)[::-1][: min(size, p.y.size)]
    np.testing.assert_allclose(mine, spectrum, atol=EXACT * spectrum[0])
    np.testing.assert_allclose(some, spectrum[:3], rtol=1e-10)
    for tau, evidence, slope in zip(taus, evidences, slopes, strict=True):
        # Log of the Gaussian integral around params, with its prior.
        log_prior = size / 2 * np.log(tau) - tau / 2 * point @ point
        _, log_det = np.linalg.slogdet(ggn + tau * np.eye(size))
        truth = -misfit + log_prior - log_det / 2
        np.testing.assert_allclose(evidence, truth, rtol=1e-11)
        truth = size / (2 * tau) - point @ point / 2
        truth -= np.trace(np.linalg.inv(ggn + tau * np.eye(size))) / 2
        np.testing.assert_allclose(slope, truth, rtol=1e-9)


def test_largest_eigenvalues_come_without_a_matrix():
    p = problem((10, 20, 1), rows=400)
    weights = {"sample_weight": p.sample_weight, "reduction": "sum"}
    with jax.enable_x64(True):
        arguments = p.arguments()
        every = np.asarray(curvature.ggn_eigenvalues(*arguments, **weights))
        assert every.shape == (241,)
        some = curvature.ggn_eigenvalues(*arguments, k=20, **weights)
        np.testing.assert_allclose(some[:8], every[:8], rtol=1e-10)
        program = curvature.ggn_eigenvalues.lower(*arguments, k=20, **weights).as_text()
        assert "241x241" not in program
        assert "400x400" not in program


@pytest.mark.slow_ids("20-")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ["dead units", "zero", "no weight", "saturated"])
@pytest.mark.parametrize("k", [2, 20])
def test_largest_eigenvalues_of_a_matrix_of_low_rank(case, dtype, k):
    with jax.enable_x64(dtype == "float64"):
        params, x, y = problem((10, 20, 1), rows=400).arguments(dtype)
        first, last = jax.tree.map(np.asarray, params)
        y = np.ones_like(y)
        weights: Any = {"sample_weight": np.ones(400, dtype), "reduction": "sum"}
        if case == "dead units":
            first = first._replace(b=first.b - 50)
        elif case == "zero":
            first, last = jax.tree.map(np.zeros_like, (first, last))
        elif case == "saturated":
            last = last._replace(w=0 * last.w, b=last.b + 1000)
        else:
            weights["sample_weight"] = np.zeros(400, dtype)
        some = curvature.ggn_eigenvalues((first, last), x, y, k=k, **weights)
        every = curvature.ggn_eigenvalues((first, last), x, y, **weights)
    some, every = np.asarray(some), np.asarray(every)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(some, every[:k], atol=20 * eps * every[0])


def test_evidence_of_a_linear_model_is_near_the_integral():
    """One weight, no bias that matters: Laplace against quadrature."""
    rng = np.random.default_rng(0)
    x: Any = rng.normal(size=(50, 1))
    y: Any = rng.random((50, 1)) < 1 / (1 + np.exp(-1.5 * x))
    tau = 1.0
    grid = np.linspace(-6, 6, 241)
    w, b = (t.ravel() for t in np.meshgrid(grid, grid))
    a = w[:, None] * x[:, 0] + b[:, None]
    ell = np.logaddexp(0, np.where(y[:, 0], -a, a)).sum(1)
    log_joint = -ell - tau / 2 * (w**2 + b**2) + np.log(tau / (2 * np.pi))
    log_integral = np.logaddexp.reduce(log_joint) + 2 * np.log(grid[1] - grid[0])
    best = np.argmax(log_joint)
    params = (jaxbce.Layer(w[best].reshape(1, 1), b[best].reshape(1)),)
    with jax.enable_x64(True):
        mine = curvature.log_evidence(params, x, y, tau)
    np.testing.assert_allclose(mine, log_integral, atol=0.05)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kronecker_factors_are_their_expectations(sizes):
    p = problem(sizes)
    labels = np.array(list(np.ndindex((2,) * sizes[-1])), float)  # every label
    every = np.broadcast_to(labels[:, None], (len(labels), *p.y.shape))
    with jax.enable_x64(True):
        params, x, _ = p.arguments()

        @jax.jit
        def found(params, x, every):
            trace = jaxbce.forward(params, x)
            deltas = jax.vmap(lambda y: jaxbce.deltas(params, trace, y))(every)
            factors = [
                curvature.kfac_factors(params, x, block_size=block_size)
                for block_size in (None, 10)
            ]
            return trace, deltas, factors

        trace, deltas, both = jax.tree.map(np.asarray, found(params, x, every))
    y_hat = trace.h[-1]
    chance = np.prod(np.where(every == 1, y_hat, 1 - y_hat), axis=2)  # with its chance
    for mine in both:
        for k, factors in enumerate(mine):
            h = np.pad(trace.h[k], ((0, 0), (0, 1)), constant_values=1)
            assert relative_error(factors.a, h.T @ h / len(p.x)) <= EXACT
            g = np.einsum("ln,lni,lnj->ij", chance, deltas[k], deltas[k]) / len(p.x)
            assert relative_error(factors.g, g) <= EXACT


@pytest.mark.parametrize("sizes", [(4, 3, 1), (3, 4, 3, 2, 3)], ids=str)
def test_kronecker_factors_of_one_row_are_its_gauss_newton_blocks(sizes):
    p = problem(sizes, rows=1)
    with jax.enable_x64(True):
        params, x, y = p.arguments()
        factors = curvature.kfac_factors(params, x)
        v = direction(params)
        for k, (a, g) in enumerate(factors):
            only = [jax.tree.map(np.zeros_like, layer) for layer in v]
            only[k] = v[k]
            mine = curvature.ggn_vp(params, x, y, tuple(only))[k]
            block = np.vstack([v[k].w, v[k].b]).ravel()
            truth = np.kron(a, g) @ block
            both = np.vstack([mine.w, mine.b]).ravel()
            assert relative_error(both, truth) <= EXACT


@jax.jit
def products_and_kernel(params, x, y):
    v = jax.tree.map(lambda t: t[::-1], params)
    theta = curvature.ntk(params, x)
    return curvature.hvp(params, x, y, v), curvature.ggn_vp(params, x, y, v), theta


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
def test_low_precision_agrees_with_float64(sizes, dtype):
    p = problem(sizes).rounded(dtype)
    mine = products_and_kernel(*p.arguments(dtype))
    with jax.enable_x64(True):
        truth = products_and_kernel(*p.arguments())
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
    x: Any = np.array([[100, 100], [1, 0], [1, 0], [0, 0]], "f")
    y: Any = np.ones((4, 1), "f")
    theta = np.asarray(curvature.ntk(params, x))
    np.testing.assert_array_equal(theta[1], theta[2])
    np.testing.assert_array_equal(theta[3], np.ones(4))  # the bias alone
    spectrum = np.asarray(curvature.ggn_eigenvalues(params, x, y))
    assert spectrum.shape == (3,)
    assert spectrum[2] <= 1e-7  # two directions are seen by rows that count
    assert np.isfinite(curvature.log_evidence(params, x, y, 1e-6))
    one = curvature.ggn_eigenvalues(params, x[1:2], y[1:2])
    s = 1 / (1 + np.exp(-1)) / (1 + np.exp(1))
    np.testing.assert_allclose(one, [2 * s], rtol=1e-6)
    infinite = (jaxbce.Layer(jnp.zeros((2, 1)), jnp.full(1, np.inf)),)
    assert curvature.ggn_eigenvalues(infinite, x[1:2], y[1:2]).item() == 0


MAPPED = {
    "products and kernel": lambda params, tau, x, y: (
        curvature.ntk(params, x[:8]),
        curvature.hvp(params, x, y, params),
        curvature.kfac_factors(params, x),
    ),
    "spectrum and evidence": lambda params, tau, x, y: (
        curvature.ggn_eigenvalues(params, x[:8], y[:8]),
        curvature.log_evidence(params, x, y, tau),
    ),
    "largest eigenvalues": lambda params, tau, x, y: curvature.ggn_eigenvalues(
        params, x, y, k=2
    ),
}


@pytest.mark.parametrize(
    "fun",
    MAPPED.values(),
    ids=MAPPED,
)
def test_networks_of_a_sweep_map(fun):
    p = problem((4, 3, 1))
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, -leaf, 2 * leaf]), p.params)
    taus = np.array([0.1, 1.0, 10.0])
    with jax.enable_x64(True):
        _, x, y = p.arguments()
        mapped = jax.jit(jax.vmap(fun, (0, 0, None, None)))(stacked, taus, x, y)
        for i in range(3):
            alone = jax.jit(fun)(member(stacked, i), taus[i], x, y)
            assert relative_error(member(mapped, i), alone) <= 1e-10


@jax.jit
def weighted_curvature(params, x, y, v, s):
    """Products, and eigenvalues of either matrix and by LOBPCG."""
    given: Any = {"sample_weight": s, "reduction": "sum"}
    few = params, x[:8], y[:8]
    return (
        curvature.hvp(params, x, y, v, **given),
        curvature.ggn_vp(params, x, y, v, **given),
        curvature.ggn_eigenvalues(params, x, y, **given),
        curvature.ggn_eigenvalues(params, x, y, k=2, **given),
        curvature.ggn_eigenvalues(*few, sample_weight=s[:8], reduction="sum"),
    )


# Squares of 1e20 overflow, and so do hidden activations of 3e38.
@pytest.mark.parametrize("feature", [1e20, 3e38, np.inf, np.nan])
def test_an_example_of_weight_0_is_ignored_whatever_its_features(feature):
    p = problem((4, 3, 1))
    params, x, y = p.arguments(np.float32)
    v = jax.tree.map(jnp.float32, direction(p.params))
    s = jnp.ones(len(x)).at[0].set(0)
    found = weighted_curvature(params, x.at[0].set(feature), y, v, s)
    truth = weighted_curvature(params, x, y, v, s)
    for mine, theirs in zip(found, truth, strict=True):
        assert relative_error(mine, theirs) <= 1e-6
    if not np.isfinite(feature):  # with a weight, it makes all of them not finite
        for mine in weighted_curvature(params, x.at[0].set(feature), y, v, s + 1):
            assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(mine))


@pytest.mark.parametrize("rows", [3, 40], ids=["few rows", "many rows"])
@pytest.mark.parametrize("feature", [1e20, 3e38, np.inf])
def test_a_saturated_example_that_is_right_adds_no_eigenvalue(feature, rows):
    first = jaxbce.Layer(jnp.array([[2.0, -1.0]]), jnp.array([0.0, 1.0]))
    params = (first, jaxbce.Layer(jnp.array([[1.0], [-0.5]]), jnp.zeros(1)))
    x = jnp.linspace(-0.5, 0.5, rows)[:, None]
    y = jnp.ones_like(x)
    found = curvature.log_evidence(params, x.at[0].set(feature), y, 1.0)
    truth = curvature.log_evidence(params, x[1:], y[1:], 1.0)
    np.testing.assert_allclose(found, truth, rtol=1e-6)


@pytest.mark.parametrize("rows", [3, 40], ids=["few rows", "many rows"])
def test_eigenvalues_have_a_gradient_where_an_example_is_saturated(rows):
    params = (jaxbce.Layer(jnp.ones((4, 1)), jnp.zeros(1)),)
    x = jnp.linspace(0.0, 0.5, 4 * rows).reshape(rows, 4)
    y = jnp.ones((rows, 1))

    def largest(params, x, y):
        return curvature.ggn_eigenvalues(params, x, y, reduction="sum")[0]

    found = jax.grad(largest)(params, x.at[0].set(jnp.inf), y)
    truth = jax.grad(largest)(params, x[1:], y[1:])
    assert relative_error(found, truth) <= 1e-5


@pytest.mark.parametrize("product", [curvature.hvp, curvature.ggn_vp])
def test_products_have_a_derivative_where_a_weight_is_0(product):
    params, x, y = problem((4, 3, 1)).arguments(np.float32)
    s = jnp.ones(len(x)).at[0].set(0)

    def weighted(s):
        return product(params, x, y, params, sample_weight=s, reduction="sum")

    slope = jax.jvp(weighted, (s,), (1 - s,))[1]
    assert relative_error(slope, product(params, x[:1], y[:1], params)) <= 1e-5


@functools.partial(jax.jit, static_argnames="k")
def slopes_of_largest_eigenvalue(params, x, y, k):
    """Its derivatives with respect to params, backward, and x and y, forward."""

    def largest(params, x, y):
        return curvature.ggn_eigenvalues(params, x, y, k=k)[0]

    forward = functools.partial(largest, params)
    return (
        jax.grad(largest)(params, x, y),
        jax.jvp(forward, (x, y), (jnp.cos(x), jnp.cos(y)))[1],
    )


def test_largest_eigenvalues_have_the_derivatives_of_all():
    p = problem((3, 2), rows=28)
    with jax.enable_x64(True):
        found, truth = (
            slopes_of_largest_eigenvalue(*p.arguments(), k=k) for k in (1, None)
        )
    assert relative_error(found, truth) <= 1e-8


def test_evidence_has_a_gradient_where_an_example_has_weight_0():
    params, x, y = problem((4, 3, 1), rows=8).arguments(np.float32)
    evidence = jax.grad(curvature.log_evidence)
    s = jnp.ones(8).at[0].set(0)
    found = evidence(params, x, y, 1.0, sample_weight=s)
    assert relative_error(found, evidence(params, x[1:], y[1:], 1.0)) <= 1e-4


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
        (lambda a: curvature.hvp(*a, v=a[0][:1]), "v to be a tuple .* got PyTreeDef"),
        (lambda a: curvature.ggn_vp(*a, v=a[0][::-1]), r"v with the .* got .*\(3, 1\)"),
        (
            lambda a: curvature.hvp(*a, v=jax.tree.map(lambda t: t > 0, a[0])),
            "dtype of v.* got bool",
        ),
        (
            lambda a: curvature.hvp(
                *a,
                v=a[0],
                reduction="max",  # pyright: ignore[reportArgumentType]
            ),
            "reduction .* got 'max'",
        ),
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
