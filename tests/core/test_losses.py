import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf

import jaxbce

LOGITS = np.concatenate([np.linspace(-80, 80, 641), [1e-3, -1e-3, 1e-6, 1e-30]])


def exact(logits, y, order):
    """The loss or its derivative of an order, with 50 digits, as float64."""
    mp.dps = 50
    values = []
    for a in map(mpf, map(float, logits)):
        sigma, other = 1 / (1 + mp.exp(-a)), 1 / (1 + mp.exp(a))
        value = (
            mp.log1p(mp.exp(-a if y else a)),
            -other if y else sigma,
            sigma * other,
        )[order]
        values.append(float(value))
    return np.array(values)


@functools.partial(jax.jit, static_argnames="order")
def derivative(a, y, *, order):
    fun = jaxbce.bce_with_logits
    for _ in range(order):
        fun = jax.grad(fun)
    return jax.vmap(fun, (0, None))(a, y)


@pytest.mark.parametrize("order", [0, 1, 2], ids=["loss", "gradient", "curvature"])
@pytest.mark.parametrize("y", [0, 1])
@pytest.mark.parametrize(
    # bfloat16 logits are the inputs; the result's own rounding is 2⁻⁹.
    ("dtype", "tolerance"),
    [("float32", 1e-6), ("float64", 1e-14), ("bfloat16", 2.0**-8)],
)
def test_every_order_is_exact_in_the_tails(dtype, tolerance, y, order):
    with jax.enable_x64(dtype == "float64"):
        a = LOGITS.astype(jnp.dtype(dtype))
        found = np.asarray(derivative(a, a.dtype.type(y), order=order), np.float64)
    truth = exact(a, y, order)
    assert np.max(abs(found - truth) / abs(truth)) <= tolerance


@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
@pytest.mark.parametrize(
    ("a", "y", "loss", "slope"),
    [
        (np.inf, 1, 0, 0),
        (-np.inf, 0, 0, 0),
        (np.inf, 0, np.inf, 1),
        (-np.inf, 1, np.inf, -1),
    ],
)
def test_infinite_logits_cost_nothing_or_infinity_but_never_nan(
    a, y, loss, slope, pos_weight
):
    value, grad = jax.value_and_grad(jaxbce.bce_with_logits)(
        jnp.float32(a), jnp.float32(y), pos_weight=pos_weight
    )
    assert value == loss
    assert grad == slope * (pos_weight if y else 1)


def test_derivative_at_zero_is_one_half_minus_y():
    # max(a, 0) − a y + log1p(exp(−|a|)), differentiated as written, gives −1 and 0.
    for y in (0.0, 0.25, 1.0):
        slope = jax.grad(jaxbce.bce_with_logits)(np.float32(0), np.float32(y))
        assert slope == 0.5 - y


@pytest.mark.parametrize("y", [0.0, 0.3, 1.0])
def test_derivative_in_the_label_is_minus_the_logit(y):
    a = jnp.array([-20.0, -1.0, 0.0, 3.0, 30.0])
    slope = jax.vmap(jax.grad(jaxbce.bce_with_logits, argnums=1))(
        a, jnp.full_like(a, y)
    )
    np.testing.assert_allclose(slope, -a, rtol=1e-6)


def test_probabilities_and_logits_agree_where_both_are_exact():
    a = jnp.linspace(-5, 5, 101)
    y = jnp.linspace(0, 1, 101)
    textbook = jaxbce.bce(jax.nn.sigmoid(a), y)
    np.testing.assert_allclose(textbook, jaxbce.bce_with_logits(a, y), rtol=1e-5)


def test_certain_predictions_cost_nothing_if_right_and_infinity_if_wrong():
    y_hat, y = jnp.array([0.0, 1.0, 0.0, 1.0]), jnp.array([0.0, 1.0, 1.0, 0.0])
    np.testing.assert_array_equal(jaxbce.bce(y_hat, y), [0, 0, np.inf, np.inf])


def test_pos_weight_weighs_the_positive_term_of_its_output():
    a, y = jnp.full((2, 3), 0.7), jnp.array([[1.0, 1.0, 0.0], [0.5, 0.0, 1.0]])
    p = jnp.array([2.0, 3.0, 5.0])
    positive = jaxbce.bce_with_logits(a, jnp.ones_like(a))
    negative = jaxbce.bce_with_logits(a, jnp.zeros_like(a))
    np.testing.assert_allclose(
        jaxbce.bce_with_logits(a, y, pos_weight=p),
        p[None] * y * positive + (1 - y) * negative,
        rtol=1e-6,
    )


@pytest.mark.parametrize("loss", [jaxbce.bce, jaxbce.bce_with_logits])
@pytest.mark.parametrize(
    ("y", "dtype"), [(True, bool), (1, np.int32), (1.0, np.float32)]
)
def test_labels_may_be_boolean_integer_or_floating(loss, y, dtype):
    a = jnp.array([0.25, 0.5])
    expected = loss(a, jnp.ones(2))
    np.testing.assert_array_equal(loss(a, np.full(2, y, dtype)), expected)


@pytest.mark.parametrize("loss", [jaxbce.bce, jaxbce.bce_with_logits])
@pytest.mark.parametrize(
    ("a", "y", "error", "match"),
    [
        (
            jnp.zeros((8, 1)),
            jnp.zeros(8),
            ValueError,
            r"y of shape \(8, 1\), the shape of .* got \(8,\)",
        ),
        (jnp.zeros(8), jnp.zeros(()), ValueError, r"y of shape .* got \(\)"),
        (jnp.zeros(8, int), jnp.zeros(8), TypeError, "to be bfloat16, .* got int32"),
        (jnp.zeros(8), jnp.zeros(8, complex), TypeError, "dtype of y .* got complex64"),
        (jnp.zeros(8), [0.0] * 8, TypeError, "y to be an array .* got list"),
    ],
)
def test_rejects(loss, a, y, error, match):
    with pytest.raises(error, match=match):
        loss(a, y)


@pytest.mark.parametrize(
    ("p", "error", "match"),
    [
        (
            jnp.ones(3),
            ValueError,
            r"pos_weight of shape \(\) or \(2,\), got \(3,",
        ),
        (jnp.ones((4, 2)), ValueError, r"pos_weight of shape .* got \(4, 2\)"),
        (1j, TypeError, "pos_weight"),
        ("2", TypeError, "'2'|pos_weight"),
    ],
)
def test_rejects_pos_weight(p, error, match):
    with pytest.raises(error, match=match):
        jaxbce.bce_with_logits(jnp.zeros((4, 2)), jnp.zeros((4, 2)), pos_weight=p)
