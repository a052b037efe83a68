"""Mean predictions of several networks, accurate in both tails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit, logsumexp

import jaxbce
from jaxbce import ensembles
from tests.helpers import problem

SIZES = (5, 4, 2)


def networks(axes=(3, 2), dtype="float64"):
    """Parameters with leading axes, and features."""
    keys = jax.random.split(jax.random.key(0), axes)
    init = lambda key: jaxbce.init(key, SIZES, dtype=dtype)  # noqa: E731
    for _ in axes:
        init = jax.vmap(init)
    return init(keys), problem(SIZES, rows=37).x.astype(dtype)


def expected(params, x, axes):
    """The logits of the mean probability, in float64, by SciPy."""
    flat = jax.tree.map(lambda t: t.reshape(-1, *t.shape[len(axes) :]), params)
    each = jax.vmap(jaxbce.logits, (0, None))(flat, x)
    a = np.asarray(each, np.float64)
    positive, negative = (logsumexp(log_expit(t), axis=0) for t in (a, -a))
    return np.asarray(positive) - np.asarray(negative)


@pytest.mark.slow_ids("axes0", "axes1", "axes3")
@pytest.mark.parametrize(
    ("axes", "block_bytes"),
    [((3, 2), 1), ((7,), 1 << 12), ((1,), 1 << 22), ((2, 1, 3), 1 << 22)],
)
def test_the_probability_is_the_mean_in_blocks_of_any_size(
    axes, block_bytes, monkeypatch
):
    monkeypatch.setattr(ensembles, "_BLOCK_BYTES", block_bytes)
    jax.clear_caches()
    with jax.enable_x64(True):
        params, x = networks(axes)
        logits = jaxbce.ensemble_logits(params, x)
        np.testing.assert_allclose(logits, expected(params, x, axes), rtol=1e-12)
        flat = jax.tree.map(lambda t: t.reshape(-1, *t.shape[len(axes) :]), params)
        each = jax.vmap(jaxbce.predict_proba, (0, None))(flat, x)
        mean = jaxbce.ensemble_proba(params, x)
        np.testing.assert_allclose(mean, each.mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_tails_keep_their_digits(dtype):
    """Where every probability rounds to 0 or 1."""
    with jax.enable_x64(True):
        (first, second), x = networks(dtype=dtype)
        shift = jnp.array([60, -60], dtype)
        params = first, second._replace(b=second.b + shift)
        logits = np.asarray(jaxbce.ensemble_logits(params, x))
        truth = expected(params, x, (3, 2))
        assert truth.min() < -50
        assert truth.max() > 50
        tolerance = {"float32": 1e-6, "float64": 1e-14}[dtype]
        error = np.abs(logits - truth) / np.maximum(1, np.abs(truth))
        assert error.max() < tolerance
        y = np.zeros_like(logits)
        loss = jaxbce.bce_with_logits(logits, y)
        assert np.all(np.asarray(loss) > 0)


def test_one_network_without_axes_is_itself():
    params, x = networks((), dtype="float32")
    found = jaxbce.ensemble_logits(params, x)
    np.testing.assert_allclose(found, jaxbce.logits(params, x), rtol=1e-5, atol=1e-6)


def test_it_maps_over_ensembles():
    params, x = networks((3, 2), dtype="float32")
    found = jax.vmap(jaxbce.ensemble_logits, (0, None))(params, x)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        np.testing.assert_allclose(found[i], jaxbce.ensemble_logits(one, x), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: [1.0], TypeError, "a tuple of Layer"),
        (lambda p: (p[0]._replace(b=p[0].b[:1]), p[1]), ValueError, "leading axes"),
        (
            lambda p: jax.tree.map(lambda leaf: leaf[:0], p),
            ValueError,
            "of at least one network, got none",
        ),
        (lambda p: p[1:], ValueError, "x of shape"),
    ],
    ids=["list", "axes", "none", "features"],
)
def test_a_bad_argument_is_refused_by_name(change, error, message):
    params, x = networks(dtype="float32")
    with pytest.raises(error, match=message):
        jaxbce.ensemble_logits(change(params), jnp.asarray(x))
