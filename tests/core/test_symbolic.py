"""SymPy derives the gradient from the loss and finds the library's own identical.

The programs that JAX traces from the public functions, and from the derivation with
examples as columns, are read with symbols for numbers. Each entry is proved equal to
what `sympy.diff` makes of the textbook loss, in exact arithmetic. Only comparisons look
at numbers: a rational point says which way each goes, so a proof holds wherever all of
them go that way. The hidden layer's 16 patterns of active units and the two sides of
softplus, each taken by itself, leave out only the kinks.
"""

import functools
import inspect
import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy
from jax.extend.core import Literal

import jaxbce
from jaxbce import gradients
from jaxbce.losses import softplus
from tests.helpers import LAYOUTS

symbols: Callable[..., Any] = functools.partial(sympy.symarray, real=True)


def elementwise(fun: Callable[..., Any]) -> Callable[..., Any]:
    return np.vectorize(fun, otypes=[object])


SMALL = [f"2-2-1 {''.join(units)}" for units in itertools.product("01", repeat=4)]
DEEP = ["2-2-2-2 1001", "2-2-2-2 1101", "2-2-2-2 0011"]
FEW = ["2-2-1 1001", *DEEP]


def problem(name):
    """Symbols for these sizes, and a point where h₁ has this pattern, row by row."""
    sizes, pattern = name.split()
    sizes = [int(size) for size in sizes.split("-")]
    params: Any = tuple(
        jaxbce.Layer(symbols(f"w{k}", shape), symbols(f"b{k}", shape[1:]))
        for k, shape in enumerate(itertools.pairwise(sizes), start=1)
    )
    x, y = symbols("x", (2, 2)), symbols("y", (2, sizes[-1]))
    weights = {"sample_weight": symbols("s", 2), "pos_weight": symbols("p", sizes[-1])}
    case = params, x, y, weights
    names = [name for leaf in jax.tree.leaves(case) for name in leaf.flat]
    point = {name: sympy.Rational(1, 2 + k) for k, name in enumerate(names)}
    # The signs of a₁ are those of x; each layer after it has another pattern.
    point |= {v: 4 * int(unit) - 2 for v, unit in zip(x.flat, pattern, strict=True)}
    for k, (w, b) in enumerate(params):
        values = map(sympy.Rational, ("1/7 1 1 -2" if k else "1 1/5 1/7 1").split())
        point |= dict(zip(w.flat, values, strict=False))
        point |= dict.fromkeys(b.flat, sympy.Rational(-1, 2))
    return case, point


# The program's side: a jaxpr, read with SymPy. Symbols are exact in every dtype.


def sign(expr, point):
    """The sign of an expression at the point, and so around it."""
    value = expr.xreplace(point)
    if value == 0 and not expr.is_number:
        raise ValueError(f"the point is on a kink: {expr} = 0")
    return int(sympy.sign(value))


def convert_element_type(array, *, new_dtype, **_):
    if not jnp.issubdtype(new_dtype, jnp.floating):
        raise NotImplementedError(f"conversion to {new_dtype}")
    return elementwise(lambda v: sympy.Integer(v) if isinstance(v, bool) else v)(array)


def dot_general(left, right, *, dimension_numbers, **_):
    contract, batch = dimension_numbers
    if any(batch):
        raise NotImplementedError(f"dot_general with batch dimensions {batch}")
    return np.tensordot(left, right, contract)


def iota(*, dimension, shape, **_):
    return exact(np.indices(shape)[dimension])


def slice_(array, *, start_indices, limit_indices, strides):
    starts, limits = start_indices, limit_indices
    steps = strides or [1] * array.ndim
    return array[tuple(map(slice, starts, limits, steps))]


def broadcast_in_dim(array, *, shape, broadcast_dimensions, **_):
    kept = dict(zip(broadcast_dimensions, array.shape, strict=True))
    aligned = array.reshape([kept.get(k, 1) for k in range(len(shape))])
    return np.broadcast_to(aligned, shape)


SCALAR = {
    "add": operator.add,
    "add_any": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "exp": sympy.exp,
    "log1p": lambda u: sympy.log(1 + u),
    "logistic": lambda a: 1 / (1 + sympy.exp(-a)),
    "and": operator.and_,
    "select_n": lambda which, *values: values[which],
}
BRANCHING = {
    "abs": lambda point, v: v * sign(v, point),
    "max": lambda point, u, v: u if sign(u - v, point) > 0 else v,
    "gt": lambda point, u, v: sign(u - v, point) > 0,
    "lt": lambda point, u, v: sign(u - v, point) < 0,
    "eq": lambda point, u, v: sign(u - v, point) == 0,
}
ARRAY = {
    "integer_pow": lambda v, *, y: v**y,
    "reduce_sum": lambda v, *, axes, **_: v.sum(axes),
    "transpose": lambda v, *, permutation: v.transpose(permutation),
    "reshape": lambda v, *, new_sizes, **_: v.reshape(new_sizes),
    "squeeze": lambda v, *, dimensions: v.squeeze(dimensions),
    "concatenate": lambda *arrays, dimension: np.concatenate(arrays, dimension),
    "slice": slice_,
    "iota": iota,
    "convert_element_type": convert_element_type,
    "broadcast_in_dim": broadcast_in_dim,
    "dot_general": dot_general,
}
CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


@elementwise
def exact(v):
    return v if isinstance(v, bool) else sympy.oo if v == np.inf else sympy.Rational(v)


def interpret(closed, point, *inputs):
    env = dict(zip(closed.jaxpr.constvars, map(exact, closed.consts), strict=True))
    env |= dict(zip(closed.jaxpr.invars, inputs, strict=True))

    def read(v):
        return exact(v.val) if isinstance(v, Literal) else env[v]

    for eqn in closed.jaxpr.eqns:
        name, args = eqn.primitive.name, map(read, eqn.invars)
        if name in CALLS:
            outs = interpret(eqn.params[CALLS[name]], point, *args)
        elif name in BRANCHING:
            outs = [elementwise(functools.partial(BRANCHING[name], point))(*args)]
        elif name == "reduce_max":
            largest = max(next(args).flat, key=lambda v: v.xreplace(point))
            outs = [np.asarray(largest, object)]
        elif name in SCALAR:
            outs = [elementwise(SCALAR[name])(*args)]
        elif name in ARRAY:
            outs = [np.asarray(ARRAY[name](*args, **eqn.params))]
        else:
            raise NotImplementedError(f"no meaning is given for the primitive {name}")
        for var, out in zip(eqn.outvars, outs, strict=True):
            assert out.shape == var.aval.shape, eqn
            env[var] = out
    return [read(v) for v in closed.jaxpr.outvars]


def run(fun, point, *args, **kwargs):
    """What the program that JAX traces from `fun` makes of arrays of symbols."""
    avals, options = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, np.float32), (args, kwargs)
    )
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*avals, **options)
    outs = interpret(closed, point, *jax.tree.leaves((args, kwargs)))
    return jax.tree.unflatten(jax.tree.structure(shapes), outs)


# The textbook's side.

sigmoid = elementwise(lambda a: 1 / (1 + sympy.exp(-a)))
log = elementwise(sympy.log)
partial = elementwise(sympy.diff)


def relu(a, point):
    return elementwise(lambda v: v if sign(v, point) > 0 else sympy.Integer(0))(a)


def affine(h, layer):
    return h @ layer.w + layer.b


def onward(a, layers, point):
    """From pre-activations to those that these further layers make of them."""
    return functools.reduce(lambda a, layer: affine(relu(a, point), layer), layers, a)


def bce(y_hat, y, c=1, p=1):
    return -np.sum(c * (p * y * log(y_hat) + (1 - y) * log(1 - y_hat)))


def loss(params, x, y, weights, reduction, point):
    s, p = weights.get("sample_weight", np.ones(2, int)), weights.get("pos_weight", 1)
    c = s / s.sum() if reduction == "mean" else s
    logits = onward(affine(x, params[0]), params[1:], point)
    return np.asarray(bce(sigmoid(logits), y, c[:, None], p))


def derivatives(scalar, variables):
    return jax.tree.map(lambda v: partial(scalar, v), variables)


def derivative_at(fun, value, point):
    """The derivative of `fun(v, point)` in v, a quantity that is itself computed."""
    free = symbols("free", value.shape)
    there = dict(zip(free.flat, value.flat, strict=True))
    point = point | {v: expr.xreplace(point) for v, expr in there.items()}
    return elementwise(lambda d: d.xreplace(there))(partial(fun(free, point), free))


# The proof.


@functools.cache  # both layouts often have the same entry
def cancels(expr):
    """Whether it is 0 as a rational function of E = exp(a) > 0 and log(1 + E)."""
    exponents = {}

    def power(a):
        a = sympy.expand(a)
        if a.could_extract_minus_sign():
            return 1 / power(-a)
        return exponents.setdefault(a, sympy.Dummy("E", positive=True))

    def logarithm(u):
        u = sympy.expand_log(sympy.log(sympy.factor(u)))
        return u.xreplace({sympy.log(e): a for a, e in exponents.items()})

    for kind, rewritten in ((sympy.exp, power), (sympy.log, logarithm)):
        expr = expr.xreplace({v: rewritten(*v.args) for v in expr.atoms(kind)})
    numerator, denominator = map(sympy.expand, sympy.fraction(sympy.together(expr)))
    assert denominator != 0
    assert not expr.has(sympy.Float)
    return numerator == 0


def unproved(found, derived):
    """The leaves with an entry whose difference does not cancel."""
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, derived)
    differences = jax.tree.map(lambda f, d: np.ravel(f - d), found, derived)
    return [
        jax.tree_util.keystr(path)
        for path, entries in jax.tree.leaves_with_path(differences)
        if not all(map(cancels, entries))
    ]


@pytest.mark.parametrize("name", SMALL)
def test_each_factor_of_the_chain_rule_is_the_derivative_it_names(name):
    (params, x, y, _), point = problem(name)
    (w1, b1), (w2, b2) = params
    a1 = affine(x, params[0])
    h1 = relu(a1, point)
    a2 = affine(h1, params[1])
    y_hat = sigmoid(a2)
    total = bce(y_hat, y)
    # The rows of one unit give ∂a/∂w, the same for every unit, as h or X transposed.
    da1_dw1, again = (partial(a1[:, j], w1[:, [j]]) for j in range(2))
    assert [sign(v, point) > 0 for v in a1.flat] == [v == "1" for v in name.split()[1]]
    assert np.array_equal(da1_dw1, again)
    derived = jaxbce.ChainRule(
        dbce_dyhat=derivative_at(lambda v, _: bce(v, y), y_hat, point),
        # σ and relu act entry by entry: the derivative of the sum is that of each.
        dyhat_da2=derivative_at(lambda a, _: sigmoid(a).sum(), a2, point),
        da2_dw2=partial(a2[:, 0], w2),
        dbce_dw2=partial(total, w2),
        dbce_db2=partial(total, b2),
        dbce_dh1=derivative_at(
            lambda h, _: bce(sigmoid(affine(h, params[1])), y), h1, point
        ),
        dh1_da1=derivative_at(lambda a, at: relu(a, at).sum(), a1, point),
        da1_dw1=da1_dw1,
        dbce_dw1=partial(total, w1),
        dbce_db1=partial(total, b1),
    )
    assert unproved(run(jaxbce.chain_rule, point, params, x, y), derived) == []


@functools.cache
def value_and_derivative(name, reduction):
    (params, x, y, weights), point = problem(name)
    weights = weights if reduction == "mean" else {}
    value = loss(params, x, y, weights, reduction, point)
    return (params, x, y, weights), point, (value, derivatives(value, params))


@pytest.mark.slow_ids("2-2-2-2")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", [*SMALL, *DEEP])
def test_value_and_grad_is_the_loss_and_its_derivative(name, reduction, layout):
    (*arguments, weights), point, derived = value_and_derivative(name, reduction)
    program = functools.partial(LAYOUTS[layout], reduction=reduction, block_size=None)
    assert unproved(run(program, point, *arguments, **weights), derived) == []


@pytest.mark.parametrize("name", FEW)
def test_deltas_are_the_derivatives_in_each_pre_activation(name):
    (params, x, y, weights), point = problem(name)
    s, p = weights.values()

    def program(params, x, y, **weights):
        return jaxbce.deltas(params, jaxbce.forward(params, x), y, **weights)

    def delta(k):
        def total(a, at):
            return bce(sigmoid(onward(a, params[k:], at)), y, s[:, None], p)

        a_k = onward(affine(x, params[0]), params[1:k], point)
        return derivative_at(total, a_k, point)

    derived = tuple(delta(k + 1) for k in range(len(params)))
    assert unproved(run(program, point, params, x, y, **weights), derived) == []


@pytest.mark.parametrize("name", FEW)
def test_jax_differentiates_the_loss_rightly_in_every_argument(name):
    case, point = problem(name)

    def program(params, x, y, weights):
        return jaxbce.loss(params, x, y, **weights, block_size=None)

    found = run(jax.grad(program, argnums=(0, 1, 2, 3)), point, *case)
    assert unproved(found, derivatives(loss(*case, "mean", point), case)) == []


@pytest.mark.parametrize("side", [-1, 1], ids=["a<0", "a>0"])
def test_softplus_is_log_of_1_plus_exp_on_both_sides_of_0(side):
    a = symbols("a", 1)
    found = run(softplus, {a[0]: sympy.Integer(side)}, a)
    assert unproved(found, log(1 + elementwise(sympy.exp)(a))) == []


WRONG = {
    "sign flipped": (0, lambda d1, d2, back, h1: (-d1, d2)),
    "mask left out": (0, lambda d1, d2, back, h1: (back, d2)),
    "mask inverted": (0, lambda d1, d2, back, h1: (jnp.where(h1 > 0, 0, back), d2)),
    "one ulp off": (1, lambda d1, d2, back, h1: (d1, d2 * (1 + 2.0**-23))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("layer", "wrong"), WRONG.values(), ids=WRONG)
def test_just_the_leaves_of_a_wrong_gradient_are_unproved(
    monkeypatch, layer, wrong, layout
):
    honest = gradients.pull_back

    def pull_back(params, activations, delta, layout):
        d1, d2 = honest(params, activations, delta, layout)
        return wrong(d1, d2, layout.back(d2, params[1].w), activations.h[1])

    monkeypatch.setattr(gradients, "pull_back", pull_back)
    (*arguments, weights), point, derived = value_and_derivative("2-2-1 1001", "mean")
    # Not under jit, which would keep the wrong trace, or already has the right one.
    program = functools.partial(inspect.unwrap(LAYOUTS[layout]), block_size=None)
    _, found = run(program, point, *arguments, **weights)
    assert unproved(found, derived[1]) == [f"[{layer}].w", f"[{layer}].b"]


def test_an_unknown_primitive_and_a_point_on_a_kink_are_refused():
    a = symbols("a", 1)
    with pytest.raises(NotImplementedError, match="primitive sin"):
        run(jnp.sin, {}, a)
    with pytest.raises(ValueError, match="on a kink"):
        run(jax.nn.relu, {a[0]: sympy.Integer(0)}, a)
