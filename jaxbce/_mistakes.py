"""Common mistakes in a gradient derived by hand, and their names.

The derivation in `gradients.py` has three steps: δ at the output, δ of a layer from
that of the next layer, and the contraction of activations and error signals. Each table
below lists mistakes in one step: the same step with something else substituted, such as
another mask, other weights or other labels. A leaf looks like a mistake if it equals
the result of that mistake at every position where `check_gradients` compares gradients.

Layers are numbered from 0, as in the names of the leaves: layer k has the input `h[k]`,
the pre-activations `a[k]`, and their error signal δ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbce import gradients
from jaxbce.losses import label_weights, output_delta
from jaxbce.network import Activations, Layer, Params, forward, sigmoid


class Step(NamedTuple):
    """The step of the derivation for layer k at one position, in float64.

    Attributes:
      grads: The gradient to explain, one `Layer` per layer.
      params: Parameters.
      a: Pre-activations of all layers, each `[N, n]`.
      h: Inputs of all layers, each `[N, n]`; h[0] is x.
      y: Labels `[N, n_L]`.
      p: Weight of the positive class.
      s: Weights of the examples, `[N, 1]`.
      c: The same, divided by their sum if the loss is a mean.
      is_mean: Whether the loss is a mean.
      k: The layer.
      next_delta: δ of layer k + 1, right or wrong; None at the output.
    """

    grads: Params
    params: Params
    a: tuple[Any, ...]
    h: tuple[Any, ...]
    y: Any
    p: Any
    s: Any
    c: Any
    is_mean: bool
    k: int
    next_delta: Any = None

    @classmethod
    def at_output(
        cls,
        grads: Params,
        params: Params,
        x: Any,
        y: Any,
        sample_weight: Any = None,
        pos_weight: Any = 1.0,
        reduction: str = "mean",
    ) -> "Step":
        """The step of the output layer, with the arguments of `value_and_grad`."""
        a, h = jax.tree.map(np.asarray, forward(params, x))
        loss = (sample_weight, pos_weight, reduction)
        c = np.asarray(gradients.check_batch(params, x, y, *loss).c)[:, None]
        s = np.ones_like(c) if sample_weight is None else sample_weight[:, None]
        is_mean = reduction == "mean"
        k = len(params) - 1
        return cls(grads, params, a, (x, *h[1:-1]), y, pos_weight, s, c, is_mean, k)

    def delta(self) -> Any:
        """δ of layer k, by the right step."""
        return self.output() if self.next_delta is None else self.back()

    def output(self, **changes: Any) -> Any:
        """δ at the output, with other labels or weights."""
        s = self._replace(**changes)
        positive, negative = label_weights(s.y, s.p)
        return np.asarray(_output(s.a[-1], s.c * positive, s.c * negative))

    def back(self, mask_input: Any = None, w: Any = None) -> Any:
        """δ of layer k, with the mask [mask_input > 0] or the weights w instead.

        Shapes that do not fit give NaN, which equals nothing.
        """
        a, own = self.a[self.k], self.params[self.k + 1].w
        mask_input = a if mask_input is None else np.asarray(mask_input, float)
        w = own if w is None else w
        if w.shape != own.shape or mask_input.shape[1:] not in ((), (1,), a.shape[1:]):
            return np.full_like(a, np.nan)
        mask_input = np.broadcast_to(mask_input, a.shape)
        return np.asarray(_back(w, mask_input, self.next_delta))

    def contract(self, delta: Any, h: Any = None) -> Layer:
        """The gradient of layer k, with another input; NaN if the shape is wrong."""
        own = self.h[self.k]
        h = own if h is None else h if h.shape == own.shape else np.nan * own
        return jax.tree.map(np.asarray, _contract(h, delta))

    def slope(self) -> Any:
        """σ′(a)."""
        return np.asarray(sigmoid(self.a[self.k]) * sigmoid(-self.a[self.k]))

    def updated(self, learning_rate: float) -> Any:
        """The weights of layer k + 1 after a step of gradient descent."""
        w, grad = self.params[self.k + 1].w, self.grads[self.k + 1].w
        return w - learning_rate * (grad if grad.shape == w.shape else np.nan)

    def without(self, example: int, *, mean: bool = False) -> Any:
        """Factors that drop an example.

        With `mean` they also rescale the weights of the others to add up to 1.
        """
        kept = np.ones_like(self.c)
        kept[example] = 0
        return kept / np.sum(kept * self.c) if mean else kept


_output = jax.jit(output_delta)


@jax.jit
def _back(w: Any, mask_input: Any, delta: Any) -> Any:
    layer = Layer(w, w[0])  # of two layers, only the weights of the second are used
    activations = Activations((), (mask_input, mask_input))
    return gradients.pull_back((layer, layer), activations, delta)[0]


@jax.jit
def _contract(h: Any, delta: Any) -> Layer:
    return gradients.contract((h,), (delta,))[0]


# In the tables, {j} stands for each layer, {t} for a number that is fitted to the leaf.
Table = dict[str, Callable[..., Any]]

# Factors of δ or of one leaf. The sum of c is 1 if the loss is a mean.
FACTORS: Table = {
    "with the opposite sign": lambda s: -1,
    "left at zero": lambda s: 0,
    "summed over the examples, not averaged": lambda s: np.sum(s.s) / np.sum(s.c),
    "averaged over the examples, not summed": lambda s: 1 / np.sum(s.c),
    "divided by N twice": lambda s: 1 / (len(s.c) * np.sum(s.c)),
    "averaged over the outputs, not summed": lambda s: 1 / s.y.shape[1],
    "without the first example": lambda s: s.without(0),
    "without the last example": lambda s: s.without(-1),
    "averaged over all examples but the first": lambda s: s.without(0, mean=True),
    "averaged over all examples but the last": lambda s: s.without(-1, mean=True),
}
# δ at the output.
OUTPUT: Table = {
    "with ŷ in place of ŷ − y": lambda s: s.output(y=0 * s.y),
    "with 1 − y in place of y": lambda s: s.output(y=1 - s.y),
    "with pos_weight ignored": lambda s: s.output(p=1.0),
    "with pos_weight for both labels": lambda s: s.output(p=1.0) * s.p,
    "with sample_weight ignored": lambda s: s.output(
        c=np.full_like(s.c, 1 / len(s.c) if s.is_mean else 1)
    ),
    "divided by N, not by the sum of sample_weight": lambda s: (
        s.output() * (np.mean(s.s) if s.is_mean else 1)
    ),
    "multiplied by σ′(a), as for the squared error": lambda s: s.output() * s.slope(),
    "multiplied by 2σ′(a), as for the squared error": lambda s: (
        s.output() * 2 * s.slope()
    ),
    "with ∂BCE/∂ŷ in place of ŷ − y": lambda s: s.output() / s.slope(),
    "with a relu mask at the output": lambda s: s.output() * (s.a[-1] > 0),
    **{
        text: lambda s, factor=factor: s.output() * factor(s)
        for text, factor in FACTORS.items()
    },
}
# δ of a hidden layer, from that of the next one.
BACK: Table = {
    "without the relu mask": lambda s: s.back(mask_input=1),
    "with [a ≥ 0] in place of [a > 0]": lambda s: s.back(mask_input=s.a[s.k] >= 0),
    "with [a < 0] in place of [a > 0]": lambda s: s.back(mask_input=-s.a[s.k]),
    "with relu(a) in place of [a > 0]": lambda s: s.back() * s.a[s.k],
    "with σ′(a) in place of [a > 0]": lambda s: s.back(mask_input=1) * s.slope(),
    "with [δ > 0] in place of [a > 0]": lambda s: s.back(
        mask_input=s.back(mask_input=1)
    ),
    "with [x > 0] in place of [a > 0]": lambda s: s.back(mask_input=s.h[0]),
    "with the relu mask of [{j}]": lambda s, j: s.back(mask_input=s.a[j]),
    "with w not transposed": lambda s: s.back(w=s.params[s.k + 1].w.T),
    "with the weights [{j}].w": lambda s, j: s.back(w=s.params[j].w),
    "with weights already updated, at a learning rate of {t:.4g}": (
        lambda s, t: s.back(w=s.updated(t))
    ),
}
# One leaf, from δ.
WEIGHTS: Table = {
    "with a in place of h": lambda s, d: (
        s.contract(d, s.a[s.k - 1] if s.k else s.h[0]).w
    ),
    "with the input of [{j}]": lambda s, d, j: s.contract(d, s.h[j]).w,
    "transposed": lambda s, d: s.contract(d).w.T,
    "plus {t:.4g} w, as for weight decay": lambda s, d, t: (
        s.contract(d).w + t * s.params[s.k].w
    ),
}
BIASES: Table = {
    "summed over the units, not the examples": lambda s, d: np.sum(d, axis=1),
    "summed over the units and the examples": lambda s, d: np.full_like(
        s.grads[s.k].b, np.sum(d)
    ),
    "plus {t:.4g} b, as for weight decay": lambda s, d, t: (
        s.contract(d).b + t * s.params[s.k].b
    ),
}
