"""The network: parameters, initialization and the forward pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbce import _validate
from jaxbce._jit import jit
from jaxbce._layouts import ROWS, Layout, drop_nonfinite


class Layer(NamedTuple):
    """One affine layer, `a = h w + b`.

    Networks of other libraries convert to a tuple of layers:

        # PyTorch, which stores transposed weights
        linear = [m for m in model if isinstance(m, torch.nn.Linear)]
        arrays = [(m.weight.detach().T, m.bias.detach()) for m in linear]
        params = tuple(Layer(*map(jnp.asarray, pair)) for pair in arrays)

        # Flax Linen; for NNX, the kernel and bias of each nnx.Linear
        dense = [variables["params"][f"Dense_{k}"] for k in range(depth)]
        params = tuple(Layer(d["kernel"], d["bias"]) for d in dense)

        # scikit-learn's MLPClassifier
        arrays = zip(mlp.coefs_, mlp.intercepts_)
        params = tuple(Layer(*map(jnp.asarray, pair)) for pair in arrays)

    Attributes:
      w: Weights `[n_in, n_out]`.
      b: Biases `[n_out]`.
    """

    w: jax.Array
    b: jax.Array


Params = tuple[Layer, ...]


class Activations(NamedTuple):
    """Pre-activations and activations of every layer in a forward pass.

    Attributes:
      a: Pre-activations `(a_1, ..., a_L)`, each `[N, n_k]`, in the accumulation
        dtype (float32 for bfloat16 parameters). `a[-1]` are the logits. In hidden
        layers the products `h_{k-1} W_k` are rounded to the dtype of the parameters.
      h: Layer inputs and the output `(h_0, ..., h_L)`, each `[N, n_k]`: `h[0]` is x,
        `h[k]` is `relu(a_k)` for a hidden layer, and `h[-1]` are the probabilities ŷ.
        ŷ has the dtype of the logits, the others have that of the parameters.
    """

    a: tuple[jax.Array, ...]
    h: tuple[jax.Array, ...]


@jax.custom_jvp
def sigmoid(a: jax.Array) -> jax.Array:
    """`σ(a) = 1 / (1 + exp(−a))`, with derivative `σ(a) σ(−a)`.

    The derivative of JAX's own sigmoid is `σ(a) (1 − σ(a))`, which is 0 in float32
    for a >= 16.64. This one keeps its relative accuracy in both tails, at every order
    of differentiation.
    """
    return jax.lax.logistic(a)


sigmoid.defjvps(lambda t, y_hat, a: t * y_hat * sigmoid(-a))


def init(
    key: jax.Array, sizes: Sequence[int], *, dtype: DTypeLike | None = None
) -> Params:
    r"""Draws parameters for layer sizes `(n_0, n_1, ..., n_L)`.

    Weights are normal with variance :math:`2 / n_{k-1}`, which preserves the scale of
    activations through ReLU layers. Biases are zero.

    Args:
      key: A JAX random key. Equal keys give equal parameters.
      sizes: Numbers of features, of units in each hidden layer (if any) and of
        outputs, each >= 1.
      dtype: bfloat16, float32 or float64; None is JAX's default float dtype.
        bfloat16 weights are drawn in float32 and rounded.

    Returns:
      A tuple of L `Layer(w [n_in, n_out], b [n_out])`: an ordinary pytree, which every
      optax transformation accepts.

    Raises:
      TypeError: If `key` is not a key, `sizes` is not a sequence of integers, or
        `dtype` is unsupported.
      ValueError: If there are several keys or fewer than two sizes, or a size is less
        than 1.

    Example:
      >>> import jax, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (64, 32, 1))
      >>> [layer.w.shape for layer in params]
      [(64, 32), (32, 1)]

    References:
      He et al., Delving Deep into Rectifiers, 2015, arXiv:1502.01852, eq. 10.
    """
    _validate.key(key)
    return _init(key, _validate.sizes(sizes), _validate.float_dtype(dtype))


@jit(static_argnames=("sizes", "dtype"))
def _init(key: jax.Array, sizes: tuple[int, ...], dtype: Any) -> Params:
    draw_dtype = _validate.accumulation_dtype(dtype)
    layers = []
    for layer_key, n_in, n_out in zip(
        jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True
    ):
        w = jax.random.normal(layer_key, (n_in, n_out), draw_dtype) * (2 / n_in) ** 0.5
        layers.append(Layer(w.astype(dtype), jnp.zeros((n_out,), dtype)))
    return tuple(layers)


@jit()
def forward(params: Params, x: ArrayLike) -> Activations:
    r"""Runs the network and returns the activations of every layer.

    .. math::
      h_0 = X, \quad a_k = h_{k-1} W_k + b_k, \quad h_k = \max(a_k, 0)\ (k < L),
      \quad \hat y = h_L = \sigma(a_L)

    Args:
      params: A tuple of `Layer`, as `init` returns.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.

    Returns:
      `Activations`. Under `jit`, unused ones are not computed.

    Raises:
      TypeError: If x or a leaf of params is not an array of a supported float dtype.
      ValueError: If shapes do not match, or x has no examples.

    Example:
      >>> import jax, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> activations = jaxbce.forward(params, jax.numpy.ones((5, 2)))
      >>> [a.shape for a in activations.a], [h.shape for h in activations.h]
      ([(5, 3), (5, 1)], [(5, 2), (5, 3), (5, 1)])
    """
    return propagate(params, _validate.features(x, params), ROWS)


def propagate(
    params: Params, x: jax.Array, layout: Layout, ignored: jax.Array | None = None
) -> Activations:
    """The forward pass, with params, features and activations in a layout.

    Args:
      params: Parameters.
      x: Features.
      layout: The layout of both and of the result.
      ignored: Examples that shall add exactly nothing to a sum, `[N]`, boolean. Their
        pre-activations are 0 where they overflow, since 0 · inf is NaN.
    """
    a, h = [], [x]
    for k, (w, b) in enumerate(params, start=1):
        is_hidden = k < len(params)
        dtype = w.dtype if is_hidden else None  # logits are not rounded
        a_k = layout.affine(k, h[-1], w, b, dtype)  # [N, n_k]
        if ignored is not None:
            a_k = drop_nonfinite(ignored, a_k, layout.feature_axis)
        a.append(a_k)
        if is_hidden:
            h.append(jax.nn.relu(a_k).astype(w.dtype))
    h.append(sigmoid(a[-1]))
    return Activations(tuple(a), tuple(h))


def logits(params: Params, x: ArrayLike) -> jax.Array:
    """Computes the logits `a_L` of label 1.

    Args:
      params: A tuple of `Layer`, as `init` returns.
      x: Features `[N, n_0]`, floating, N >= 1.

    Returns:
      Logits `[N, n_L]`, in the accumulation dtype (float32 for bfloat16).

    Raises:
      TypeError: As for `forward`.
      ValueError: As for `forward`.

    Example:
      >>> import jax, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> jaxbce.logits(params, jax.numpy.ones((5, 2))).shape
      (5, 1)
    """
    return forward(params, x).a[-1]


def predict_proba(params: Params, x: ArrayLike) -> jax.Array:
    """Computes the probabilities `ŷ = σ(a_L)` of label 1.

    Each output has its own; they do not add up to 1. Where ŷ may round to 0 or 1, use
    `logits`.

    Args:
      params: A tuple of `Layer`, as `init` returns.
      x: Features `[N, n_0]`, floating, N >= 1.

    Returns:
      Probabilities `[N, n_L]`, in the accumulation dtype (float32 for bfloat16).

    Raises:
      TypeError: As for `forward`.
      ValueError: As for `forward`.

    Example:
      >>> import jax, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> jaxbce.predict_proba(params, jax.numpy.zeros((1, 2))).item()
      0.5
    """
    return forward(params, x).h[-1]
