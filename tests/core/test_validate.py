"""Checks of arguments: what is refused, by which name, and with what advice."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.sparse

import jaxbce
from jaxbce import _validate, curvature, laplace, per_example
from jaxbce.network import Layer

PARAMS: Any = (Layer(jnp.ones((3, 1)), jnp.zeros(1)),)
X = np.ones((4, 3), np.float32)
Y = np.array([[0.0], [1.0], [0.5], [1.0]], np.float32)
S = np.array([1.0, 0.0, 2.0, 0.5], np.float32)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def column(*values, dtype: Any = np.float32):
    return np.array(values, dtype)[:, None]


ARRAYS = [np.asarray, jnp.asarray]


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (column(-1, 1, -1, 1), r"got -1.0 \(labels -1/\+1: use \(y \+ 1\) / 2\)"),
        (column(2, 1, 1, 2), r"got 2.0 \(labels 1/2: use y - 1\)"),
        (column(0, 255, 0, 255, dtype=np.uint8), r"got 255 \(labels 0/255: use y / "),
        (column(0, 255, 7, 99, dtype=np.uint8), r"got 255 \(values 0...255: use y / "),
        (column(0, 3, 9, 1, dtype=int), r"got 3 \(class numbers 0...9: .* np.arange\("),
        (column(0, 1, 1.5, 0), r"got 1.5 at y\[2, 0\]"),
        (column(0, 1, 0, np.nan), r"got nan at y\[3, 0\]"),
    ],
)
def test_labels_outside_0_and_1_are_refused_with_what_they_probably_are(
    array, y, message
):
    with pytest.raises(ValueError, match=r"expected y to be in \[0, 1\], " + message):
        _validate.examples(X, array(y), None, PARAMS)


@pytest.mark.parametrize(
    ("y", "converted"),
    [
        (column(-1, 1, -1, 1), lambda y: (y + 1) / 2),
        (column(2, 1, 1, 2), lambda y: y - 1),
        (column(0, 255, 7, 99), lambda y: y / 255),
        (column(0, 1, 1, 0, dtype=bool), lambda y: y),
    ],
)
def test_converted_labels_pass(y, converted):
    _validate.examples(X, converted(y), None, PARAMS)


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_labels_are_refused_unless_the_weight_is_0(array, bad):
    y = array(changed(Y, 1, bad))
    for weight in (None, array(1 + S)):
        with pytest.raises(ValueError, match=rf"y to be in .*, got {bad} at y\[1, 0\]"):
            _validate.examples(X, y, weight, PARAMS)
    _validate.examples(X, y, array(S), PARAMS)


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (changed(S, 3, -1), r"to be finite and >= 0, got -1.0 at sample_weight\[3\]"),
        (changed(S, 0, np.nan), "sample_weight to be finite and >= 0, got nan"),
        (changed(S, 0, np.inf), "sample_weight to be finite and >= 0, got inf"),
        (0 * S, r"entry of sample_weight to be >= 1.2e-38 .* largest is 0\.0e\+00"),
        (1e-42 * S, "entry of sample_weight to be >= 1.2e-38 .* largest is 2.0e-42"),
    ],
)
def test_weights_out_of_bounds_are_refused(array, weight, message):
    with pytest.raises(ValueError, match=message):
        _validate.examples(X, Y, array(weight), PARAMS)


@pytest.mark.parametrize("p", [-1.0, np.nan, jnp.array([1.0, -1.0]), np.float32(-1)])
def test_a_negative_pos_weight_is_refused(p):
    with pytest.raises(ValueError, match="pos_weight to be finite and >= 0, got "):
        _validate.weights("pos_weight", p, jnp.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda tau: curvature.log_evidence(PARAMS, X, Y, tau),
            "prior_precision to be a number > 0, got -1.0",
        ),
        (
            lambda c: per_example.clipped_value_and_grad(PARAMS, X, Y, max_norm=c),
            "max_norm to be a number >= 0, got -1.0",
        ),
    ],
)
@pytest.mark.parametrize("array", [float, np.float32, jnp.float32])
def test_a_scalar_out_of_bounds_is_refused_in_every_form(call, message, array):
    with pytest.raises(ValueError, match=message):
        call(array(-1))


def test_bounds_of_scalars_are_part_of_the_interval_as_documented():
    _validate.scalar("max_norm", jnp.float32(0), allow_zero=True)
    _validate.scalar("max_norm", jnp.inf, allow_zero=True)
    with pytest.raises(ValueError, match=r"prior_precision .* got 0.0"):
        _validate.scalar("prior_precision", jnp.float32(0))


def test_hyperparameters_of_the_sweep_itself_are_bounded():
    good = {"label_smoothing": np.array([0.0, 1.0]), "init_scale": np.array([-1.0])}
    _validate.hparams(good | {"pos_weight": np.array([0, 3])}, jnp.float32)
    for name, value, expected in (
        ("label_smoothing", [0.5, 1.5], r"in \[0, 1\], got 1.5"),
        ("label_smoothing", [np.nan], r"in \[0, 1\], got nan"),
        ("pos_weight", [-1.0], "finite and >= 0, got -1.0"),
    ):
        message = rf"expected hparams\['{name}'\] to be {expected}"
        with pytest.raises(ValueError, match=message):
            _validate.hparams({name: np.array(value)}, jnp.float32)


def test_traced_values_are_not_read():
    @jax.jit
    def traced(x, y, s):
        _validate.examples(x, y, s, PARAMS)
        _validate.examples(x, changed(Y, 1, 2), s, PARAMS)  # perhaps of weight 0
        _validate.scalar("max_norm", -s[0])
        with pytest.raises(ValueError, match="y to be in"):  # known, and counts
            _validate.examples(x, changed(Y, 1, 2), None, PARAMS)
        return x

    traced(jnp.full_like(X, jnp.nan), 1 + jnp.asarray(Y), -jnp.asarray(S))


# ------------------------------------------------------------------ shapes and types


def test_labels_with_one_axis_get_the_conversion():
    for y in (Y[:, 0], Y[:3, 0]):
        with pytest.raises(ValueError, match=r"y of shape .*\): use y\[:, None\]"):
            jaxbce.loss(PARAMS, X, y)
    with pytest.raises(ValueError, match=r"y of shape \[N, n_L\], .*y\[:, None\]"):
        _validate.matrix("y", Y[:, 0], "[N, n_L]")
    with pytest.raises(ValueError, match=r"(?m)shape of the logits, got \(4,\)$"):
        jaxbce.bce_with_logits(jnp.zeros((4, 2)), Y[:, 0])


@pytest.mark.parametrize(
    ("sizes", "k"), [((3, 1), 0), ((3, 4, 1), 0), ((4, 4, 1), 1), ((3, 5, 5, 2), 0)]
)
def test_transposed_weights_are_recognized(sizes, k):
    params = jax.eval_shape(lambda: jaxbce.init(jax.random.key(0), sizes))
    params = tuple(Layer(jnp.ones(w.shape[::-1]), jnp.ones(b.shape)) for w, b in params)
    with pytest.raises(ValueError, match=rf"params\[{k}\].w looks transposed"):
        _validate.params(params)


def test_a_wrong_bias_alone_does_not_look_like_transposed_weights():
    with pytest.raises(ValueError, match=r"params\[0\].b of .* got \(2,\)$"):
        _validate.params((Layer(jnp.ones((3, 1)), jnp.ones(2)),))


def test_transposed_features_are_recognized():
    with pytest.raises(ValueError, match=r"got \(3, 4\): x looks transposed"):
        jaxbce.forward(PARAMS, X.T)


class Tensor:
    """An array of another library: it has a shape and a dtype, but is none of JAX's."""

    shape, ndim, dtype = (4, 3), 2, np.dtype("f")

    def __init__(self, *_: Any) -> None:
        pass


class Torch(Tensor):
    __module__ = "torch"

    def detach(self) -> None:
        pass

    def numpy(self) -> None:
        pass


class Eager(Tensor):
    def numpy(self) -> None:
        pass


FOREIGN: Any = {
    "torch": (Torch, r"torch.Torch: use {}.detach\(\).cpu\(\).numpy\(\)"),
    "tensorflow": (Eager, r"Eager: use {}.numpy\(\)"),
    "unknown": (Tensor, "Tensor$"),
    "DataFrame": (pd.DataFrame, r"pandas.DataFrame: use {}.to_numpy\(\)"),
    "Series": (lambda x: pd.Series(x.ravel()), r"pandas.Series: use {}.to_numpy"),
    "sparse": (
        lambda x: scipy.sparse.csr_array(np.atleast_2d(x)),
        r"scipy.csr_array: use {}.toarray\(\)",
    ),
    "masked": (np.ma.masked_array, r"numpy.MaskedArray: use {}.filled\(\)"),
    "list": (list, "list$"),
}


@pytest.mark.parametrize(("convert", "message"), FOREIGN.values(), ids=FOREIGN)
def test_arrays_of_other_libraries_are_named_with_their_conversion(convert, message):
    def refuses(name, call):
        expected = f"(?m)expected {name} .* got .*{message.format(name)}"
        with pytest.raises(TypeError, match=expected.replace("[", r"\[")):
            call()

    def check(*arguments, **options):
        return jaxbce.check_gradients(jaxbce.value_and_grad, *arguments, **options)

    refuses("x", lambda: check(PARAMS, convert(X), Y))
    refuses("y", lambda: check(PARAMS, X, convert(Y)))
    refuses("sample_weight", lambda: check(PARAMS, X, Y, sample_weight=convert(S)))
    refuses("x", lambda: _validate.matrix("x", convert(X), "[N, n_0]"))
    refuses("x", lambda: jaxbce.loss(PARAMS, convert(X), Y))
    refuses("y", lambda: jaxbce.per_example.norms(PARAMS, X, convert(Y)))
    posterior = laplace.posterior(PARAMS, X, Y, 1.0)
    refuses("x2", lambda: laplace.influence(posterior, convert(X), Y))
    w = convert(np.ones((3, 1)))
    refuses("params[0].w", lambda: _validate.params((Layer(w, jnp.zeros(1)),)))
    refuses("validation[0]", lambda: _validate.validation((convert(X), Y), PARAMS))


class Pair(NamedTuple):
    w: Any
    b: Any


class Special(Layer):
    pass


class Network(NamedTuple):
    first: Layer


@pytest.mark.parametrize(
    ("params", "got"),
    [
        ((Pair(*PARAMS[0]),), "tuple of tests.Pair"),
        ((Special(*PARAMS[0]),), "tuple of tests.Special"),
        (Network(*PARAMS), "tests.Network"),
        ([*PARAMS], "list of Layer"),
        ({"w": X}, "dict"),
    ],
)
def test_layers_are_exactly_layer(params, got):
    for function in (jaxbce.value_and_grad, jaxbce.loss):
        with pytest.raises(TypeError, match=rf"(?m)tuple of Layer\(w, b\), got {got}$"):
            function(params, X, Y)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((X, Y[:, 0]), ValueError, r"validation\[1\] of shape .*\[1\]\[:, None\]"),
        ((X[:, :2], Y), ValueError, r"validation\[0\] of shape \[N, 3\]"),
        ((X, Y, S[:2]), ValueError, r"validation\[2\] of shape \(4,\)"),
        ((X, Y, -S), ValueError, r"validation\[2\] to be finite and >= 0, got -1.0"),
        ((X, 2 * Y), ValueError, r"validation\[1\] to be in .*0, 1.*, got 2.0"),
        ((X, 1 + Y // 1), ValueError, r"validation\[1\] .* use validation\[1\] - 1"),
        ((X, Y, S, S), TypeError, r"validation to be .* \(x, y, weight\), got 4 items"),
        (X, TypeError, r"validation to be a tuple \(x, y\) .* got numpy.ndarray"),
    ],
)
def test_a_validation_set_is_refused_by_its_own_name(value, error, message):
    with pytest.raises(error, match="expected " + message):
        _validate.validation(value, PARAMS)


def test_a_validation_set_is_a_triple():
    assert _validate.validation(None, PARAMS) is None
    triple: Any = _validate.validation([X, Y > 0], PARAMS)
    x, y, weight = triple
    assert (x.shape, y.dtype, weight) == (X.shape, jnp.float32, None)
    triple = _validate.validation((X, Y, S), PARAMS)
    np.testing.assert_array_equal(triple[2], S)


# ------------------------------------------------------------------ other arguments


@pytest.mark.parametrize(
    ("key", "error", "got"),
    [
        (0, TypeError, "int"),
        (1.5, TypeError, "float"),
        (None, TypeError, "NoneType"),
        ("key", TypeError, "str"),
        (np.zeros(2), TypeError, "an array of dtype float64"),
        (np.zeros(3, np.uint32), ValueError, r"an array of shape \(3,\)"),
        (np.zeros((5, 2), np.uint32), ValueError, r"an .* \(5, 2\); use jax.vmap"),
        (jax.random.split(jax.random.key(0), 3), ValueError, r"an .* \(3,\); use jax"),
    ],
)
def test_what_is_not_one_key_is_refused(key, error, got):
    with pytest.raises(error, match=f"expected key to be a random key, .* got {got}"):
        jaxbce.init(key, (3, 1))


@pytest.mark.parametrize(
    "key", [jax.random.key(0), jax.random.PRNGKey(0), np.zeros(2, np.uint32)]
)
def test_typed_and_legacy_keys_are_accepted(key):
    jaxbce.init(key, (3, 1))
    _validate.key(jax.random.key(0, impl="rbg"))


@pytest.mark.parametrize("hidden", [4, None, (2.5,), "4"])
def test_hidden_that_is_no_sequence_of_integers_is_refused(hidden):
    with pytest.raises(TypeError, match=r"hidden to be a sequence .* such as \(16,\)"):
        _validate.hidden(hidden)


def test_hidden_layers_have_at_least_one_unit_and_there_may_be_none():
    assert _validate.hidden(()) == ()
    assert _validate.hidden(np.array([4, 5])) == (4, 5)
    with pytest.raises(ValueError, match=r"hidden to be integers >= 1, got \(4, 0\)"):
        _validate.hidden((4, 0))


def test_a_list_of_devices_is_no_mesh():
    _validate.mesh(None)
    _validate.mesh(jax.make_mesh((1,), ("members",)))
    no_devices = jax.sharding.AbstractMesh((1,), ("members",))
    for mesh, got in ((jax.devices(), "list"), (no_devices, "jax.AbstractMesh")):
        with pytest.raises(TypeError, match=f"mesh to be None or .* got {got}"):
            _validate.mesh(mesh)


class Unhashable:
    __hash__: Any = None

    def init(self, params):
        pass

    update = __call__ = init


def test_functions_are_named_and_have_a_hash_where_they_are_static():
    _validate.optimizer(optax.adam(0.1))
    with pytest.raises(TypeError, match=r"optimizer to be an optax .* got function"):
        _validate.optimizer(optax.adam)
    unhashable: Any = Unhashable()
    expected = "a function of params"
    for value in (jnp.sum, unhashable):
        _validate.function("penalty", value, expected)
    with pytest.raises(TypeError, match=r"penalty to be a function of .* got float"):
        _validate.function("penalty", 0.1, expected)
    with pytest.raises(TypeError, match=r"callback to be hashable, .*Unhashable"):
        _validate.function("callback", unhashable, expected, is_static=True)
    # Optimizers need none: what is traced of them is compared.
    sgd: Any = Sgd([0.1])
    jaxbce.fit(jax.random.key(0), PARAMS, X, Y, optimizer=sgd, num_steps=1)


class Sgd(NamedTuple):
    rates: list[float]

    def init(self, params):
        return ()

    def update(self, grads, state, params=None):
        return jax.tree.map(lambda g: -self.rates[0] * g, grads), state
