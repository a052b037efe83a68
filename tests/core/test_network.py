import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

import jaxbce
from tests.helpers import NETWORKS, TOLERANCE, member, problem, relative_error


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", None])
def test_init_has_the_sizes_and_dtype_asked_for(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = jaxbce.init(jax.random.key(0), [3, 5, 4, 2], dtype=dtype)
    assert [layer.w.shape for layer in params] == [(3, 5), (5, 4), (4, 2)]
    assert [layer.b.shape for layer in params] == [(5,), (4,), (2,)]
    names = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    assert names == {dtype or "float32"}


def test_init_draws_weights_of_variance_two_over_fan_in_and_zero_biases():
    first, second = jaxbce.init(jax.random.key(1), (200, 300, 100))
    # Standard error of a variance of n normal draws: √(2/n), under 1% here.
    np.testing.assert_allclose(np.var(first.w), 2 / 200, rtol=0.04)
    np.testing.assert_allclose(np.var(second.w), 2 / 300, rtol=0.04)
    assert not first.b.any()
    assert not second.b.any()


def test_init_is_a_function_of_the_key_and_layers_differ():
    one, same, other = (jaxbce.init(jax.random.key(k), (4, 4, 4)) for k in (0, 0, 1))
    assert relative_error(one, same) == 0
    assert relative_error(one[0].w, other[0].w) > 0.1
    assert relative_error(one[0].w, one[1].w) > 0.1


def test_init_under_vmap_makes_one_network_a_key():
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(lambda key: jaxbce.init(key, (4, 4, 4))))(keys)
    alone = jaxbce.init(keys[2], (4, 4, 4))
    assert relative_error(member(many, 2), alone) == 0


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS.keys())
def test_forward_is_the_textbook_in_numpy(sizes):
    p = problem(sizes)
    with jax.enable_x64(True):
        trace = jaxbce.forward(*p.arguments()[:2])
        logits = jaxbce.logits(*p.arguments()[:2])
        y_hat = jaxbce.predict_proba(*p.arguments()[:2])
    h = p.x
    assert relative_error(trace.h[0], h) == 0
    for k, (w, b) in enumerate(p.params):
        a = h @ w + b
        assert relative_error(trace.a[k], a) <= TOLERANCE["float64"]
        h = np.maximum(a, 0) if k < len(p.params) - 1 else 1 / (1 + np.exp(-a))
        assert relative_error(trace.h[k + 1], h) <= TOLERANCE["float64"]
    assert len(trace.a) + 1 == len(trace.h) == len(sizes)
    assert relative_error(logits, trace.a[-1]) == 0
    assert relative_error(y_hat, trace.h[-1]) == 0


def test_bfloat16_accumulates_in_float32():
    # In bfloat16, 1 + 1 + ... stops at 256, where the next float is 258, and 1001 would
    # be rounded to 1000.
    params = (jaxbce.Layer(jnp.ones((1001, 1), "bfloat16"), jnp.zeros(1, "bfloat16")),)
    logits = jaxbce.logits(params, jnp.ones((2, 1001), "bfloat16"))
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, 1001)


def test_features_are_cast_to_the_parameters_dtype():
    p = problem((3, 2, 1))
    params = p.arguments(np.float32)[0]
    trace = jaxbce.forward(params, p.x)  # float64 NumPy
    assert trace.h[0].dtype == trace.a[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("sizes", "error", "match"),
    [
        ((), ValueError, r"sizes to be at least two integers >= 1 .* got \(\)"),
        ((3,), ValueError, r"sizes to be at least two .* got \(3,\)"),
        ((3, 0, 1), ValueError, r"at least two integers >= 1"),
        ((3, 2.5, 1), TypeError, r"a sequence of integers .* got \(3, 2.5, 1\)"),
        (3, TypeError, "sizes to be a sequence of integers .* got 3"),
        ("31", TypeError, "sizes .* got '31'"),
    ],
)
def test_init_rejects_sizes(sizes, error, match):
    with pytest.raises(error, match=match):
        jaxbce.init(jax.random.key(0), sizes)


@pytest.mark.parametrize("dtype", ["int32", "float16", "complex64"])
def test_init_rejects_dtypes(dtype):
    with pytest.raises(TypeError, match=f"bfloat16, float32 or float64, got {dtype}"):
        jaxbce.init(jax.random.key(0), (2, 1), dtype=dtype)


LAYER = jaxbce.Layer(jnp.ones((3, 2)), jnp.zeros(2))
X = jnp.ones((4, 3))


@pytest.mark.parametrize(
    ("params", "x", "error", "match"),
    [
        ([LAYER], X, TypeError, "params to be a tuple of Layer.* got list of Layer"),
        (((X, X),), X, TypeError, "params .* got tuple of tuple"),
        (LAYER, X, TypeError, "params .* got Layer"),
        ((), X, ValueError, "params to have at least one Layer"),
        ((LAYER, LAYER), X, ValueError, r"params\[1\].w of shape \[2, n_.* \(3, 2"),
        ((LAYER._replace(b=X[0]),), X, ValueError, r"params\[0\].b of shape .* \(3,\)"),
        ((LAYER._replace(w=X[0]),), X, ValueError, r"params\[0\].w of shape .* \(3,\)"),
        ((LAYER._replace(w=1.0),), X, ValueError, r"params\[0\].w of shape .* \(\)"),
        (
            (LAYER._replace(b=jnp.zeros(2, int)),),
            X,
            TypeError,
            r"params\[0\].b to be bfloat16, float32 or float64, got int32",
        ),
        (
            (LAYER._replace(b=jnp.zeros(2, "bfloat16")),),
            X,
            TypeError,
            "one dtype, got bfloat16 and float32",
        ),
        ((LAYER,), X[:, :2], ValueError, r"x of shape \[N, 3\] .* got \(4, 2\)"),
        ((LAYER,), X[0], ValueError, r"x of shape \[N, 3\] .* got \(3,\)"),
        ((LAYER,), X[:0], ValueError, r"x of shape \[N, 3\], N >= 1, got \(0, 3"),
        ((LAYER,), X.astype(int), TypeError, "dtype of x to be .* got int32"),
        ((LAYER,), [[1.0, 2.0, 3.0]], TypeError, r"to be an array \[N, 3\], got list"),
    ],
)
def test_forward_rejects(params, x, error, match):
    with pytest.raises(error, match=match):
        jaxbce.forward(params, x)


FEATURES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def test_networks_of_scikit_learn_convert_as_documented():
    labels = np.array([0, 1, 0, 1, 1])
    model = MLPClassifier((4,), max_iter=1, random_state=0)
    with pytest.warns(ConvergenceWarning):
        mlp = model.fit(FEATURES, labels)
    arrays = zip(mlp.coefs_, mlp.intercepts_, strict=True)
    params = tuple(jaxbce.Layer(*map(jnp.asarray, pair)) for pair in arrays)
    found = jaxbce.predict_proba(params, FEATURES)[:, 0]
    expected = np.asarray(mlp.predict_proba(FEATURES))[:, 1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_networks_of_torch_convert_as_documented():
    torch = pytest.importorskip("torch", reason="needs PyTorch, which is not installed")
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
    )
    linear = [m for m in model if isinstance(m, torch.nn.Linear)]
    arrays = [(m.weight.detach().T, m.bias.detach()) for m in linear]
    params = tuple(jaxbce.Layer(*map(jnp.asarray, pair)) for pair in arrays)
    expected = model(torch.tensor(FEATURES)).detach().numpy()
    np.testing.assert_allclose(jaxbce.logits(params, FEATURES), expected, rtol=1e-5)


def test_networks_of_flax_convert_as_documented():
    linen = pytest.importorskip(
        "flax.linen", reason="needs Flax, which is not installed"
    )

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.relu(linen.Dense(4)(x))
            return linen.Dense(1)(h)

    model, depth = Network(), 2
    variables = model.init(jax.random.key(0), FEATURES)
    dense = [variables["params"][f"Dense_{k}"] for k in range(depth)]
    params = tuple(jaxbce.Layer(d["kernel"], d["bias"]) for d in dense)
    expected = model.apply(variables, FEATURES)
    np.testing.assert_allclose(jaxbce.logits(params, FEATURES), expected, rtol=1e-5)
