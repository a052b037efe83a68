import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbce
from jaxbce import _mistakes, gradients
from jaxbce.network import Layer
from tests.helpers import LAYOUTS, problem


def by_hand(params, x, y, *, pos_weight=1.0, mask=lambda a: a > 0):
    """A gradient as a user writes one, with the steps that mutants change."""
    trace = jaxbce.forward(params, x)
    p = jnp.asarray(pos_weight, x.dtype)
    deltas = [(1 - y) * jax.nn.sigmoid(trace.a[-1])]
    deltas[0] -= p * y * jax.nn.sigmoid(-trace.a[-1])
    for layer, a in zip(params[:0:-1], trace.a[-2::-1], strict=True):
        deltas.insert(0, deltas[0] @ layer.w.T * mask(a).astype(x.dtype))
    grads = [
        Layer(h.T @ d / len(x), d.sum(0) / len(x))
        for h, d in zip(trace.h[:-1], deltas, strict=True)
    ]
    return jaxbce.loss(params, x, y, pos_weight=p), tuple(grads)


def changed(change, **options):
    def mutant(params, x, y, **kwargs):
        value, grads = by_hand(params, x, y, **options, **kwargs)
        return value, change(grads, params, x, y)

    return mutant


def at(k, **leaves):
    """A mutant that changes leaves of layer k."""

    def change(grads, params, x, y):
        del params, x, y
        layer = grads[k]
        new = {name: f(getattr(layer, name)) for name, f in leaves.items()}
        return (*grads[:k], layer._replace(**new), *grads[k + 1 :])

    return changed(change)


def same(grads, *_):
    return grads


def scaled(factor):
    return changed(lambda grads, *_: jax.tree.map(lambda g: g * factor, grads))


def dropped_row(params, x, y):
    value, _ = by_hand(params, x, y)
    n = len(x)
    _, grads = by_hand(params, x[:-1], y[:-1])
    return value, jax.tree.map(lambda g: g * ((n - 1) / n), grads)


def weight_not_transposed(params, x, y):
    value, _ = by_hand(params, x, y)
    middle = params[1]._replace(w=params[1].w.T)
    trace = jaxbce.forward(params, x)
    delta = (trace.h[-1] - y) / len(x)
    deltas = [delta]
    for layer, a in ((params[2], trace.a[1]), (middle, trace.a[0])):
        deltas.insert(0, deltas[0] @ layer.w.T * (a > 0).astype(x.dtype))
    return value, tuple(
        Layer(h.T @ d, d.sum(0)) for h, d in zip(trace.h, deltas, strict=False)
    )


def weight_decay(grads, params, *_):
    return jax.tree.map(lambda g, w: g + 1e-4 * w, grads, params)


def inputs_not_relu(grads, params, x, y):
    del y
    a_1 = x @ params[0].w + params[0].b
    h_1 = jax.nn.relu(a_1)
    ratio = jnp.sum(a_1) / jnp.sum(h_1)
    return (grads[0], grads[1]._replace(w=grads[1].w * ratio), *grads[2:])


def hard_labels(params, x, y):
    value, _ = by_hand(params, x, y)
    return value, by_hand(params, x, jnp.round(y))[1]


def in_float32(params, x, y):
    single = jax.tree.map(lambda t: t.astype(jnp.float32), (params, x, y))
    return jax.tree.map(lambda t: t.astype(jnp.float64), by_hand(*single))


MUTANTS = {
    "a leaf scaled by 1.001": at(1, w=lambda w: w * 1.001),
    "a bias scaled by 1.001": at(0, b=lambda b: b * 1.001),
    "everything scaled by 1.001": scaled(1.001),
    "sum for mean": scaled(37),
    "everything scaled by 1 + 1e-11": scaled(1 + 1e-11),
    "a flipped sign": scaled(-1),
    "a leaf with a flipped sign": at(2, b=lambda b: -b),
    "a dropped row": dropped_row,
    "a flipped mask": changed(same, mask=lambda a: a < 0),
    "no mask": changed(same, mask=lambda a: a == a),
    ">= for >": changed(same, mask=lambda a: a >= 0),
    "a weight not transposed": weight_not_transposed,
    "a transposed leaf": at(1, w=lambda w: w.T),
    "a bias of zero": at(0, b=jnp.zeros_like),
    "one entry off": at(0, w=lambda w: w.at[2, 3].multiply(1 + 1e-6)),
    "one entry exchanged": at(0, w=lambda w: w.at[0].set(w[1])),
    "weight decay": changed(weight_decay),
    "h before its relu": changed(inputs_not_relu),
    "soft labels rounded": hard_labels,
    "two leaves exchanged": changed(
        lambda g, *_: (g[0]._replace(b=g[1].b), g[1]._replace(b=g[0].b), *g[2:])
    ),
    "a NaN": at(0, w=lambda w: w.at[0, 0].set(jnp.nan)),
    "a missing layer": changed(lambda grads, *_: grads[:-1]),
    "a wrong shape": at(2, w=jnp.ravel),
    "float32 inside": in_float32,
    "a wrong value": lambda *a: (by_hand(*a)[0] * 1.001, by_hand(*a)[1]),
}
SQUARE = problem((6, 5, 5, 1))


pytestmark = pytest.mark.usefixtures("standard_promotion")


def check(fun, p=SQUARE, **kwargs):
    return jaxbce.check_gradients(fun, *p.arguments(np.float32), **kwargs)


@pytest.mark.parametrize("call", range(4))
def test_a_nan_at_any_one_point_is_rejected(call):
    calls = []

    def mutant(params, x, y):
        value, grads = by_hand(params, x, y)
        calls.append(1)
        if len(calls) != call + 1:
            return value, grads
        return value, jax.tree.map(lambda g: g * jnp.nan, grads)

    assert not check(mutant).passed


@pytest.mark.parametrize("hidden", [0, 1])
def test_a_wrong_derivative_at_the_kink_of_one_layer_is_rejected(hidden):
    def mutant(params, x, y):
        trace = jaxbce.forward(params, x)
        deltas = [(trace.h[-1] - y) / len(x)]
        for k in (1, 0):
            on = trace.a[k] >= 0 if k == hidden else trace.a[k] > 0
            deltas.insert(0, deltas[0] @ params[k + 1].w.T * on)
        grads = [(h.T @ d, d.sum(0)) for h, d in zip(trace.h, deltas, strict=False)]
        return jaxbce.loss(params, x, y), grads

    assert not check(mutant).passed


@pytest.mark.parametrize("grads", [(), None, (1j * jnp.ones(3),)], ids=str)
def test_grads_that_cannot_be_compared_are_a_type_error(grads):
    with pytest.raises(TypeError, match="empty or complex"):
        check(lambda params, x, y: (jaxbce.loss(params, x, y), grads))


@pytest.mark.slow_ids("float32 inside", "flipped sign")
@pytest.mark.parametrize("fun", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_mutant_is_rejected_with_a_reason(fun):
    report = check(fun)
    assert not report.passed
    wrong = [c for c in report.comparisons if not c.passed]
    assert wrong
    assert all(c.reason for c in wrong)
    assert "WRONG: " in str(report)
    assert "FAILED" in str(report)


def test_a_leaf_is_judged_by_its_own_norm_and_not_by_the_gradients():
    # Small last weights make the first leaves a small part of the gradient.
    *first, last = SQUARE.params
    small = SQUARE._replace(params=(*first, last._replace(w=1e-2 * last.w)))
    report = check(at(0, w=lambda w: w * (1 + 2e-12)), small)
    assert {c.leaf for c in report.comparisons if not c.passed} == {"[0].w"}


@pytest.mark.slow
@pytest.mark.parametrize("fun", [*LAYOUTS.values(), by_hand], ids=[*LAYOUTS, "by hand"])
def test_a_correct_gradient_passes_at_20_seeds(fun):
    # Under one jit, so that its operations are not compiled one by one.
    fun = jax.jit(fun) if fun is by_hand else fun
    for seed in range(20):
        sizes = [(6, 5, 5, 1), (4, 9, 3), (3, 1)][seed % 3]
        p = problem(sizes, rows=12, seed=seed)
        with np.errstate(all="raise"):
            report = check(fun, p, seed=seed)
        assert report.passed, str(report)
        assert report.mistakes == {}
        assert "gradient: passed" in str(report)


def test_weights_and_reduction_reach_the_function_and_the_oracles():
    s = jnp.asarray(SQUARE.sample_weight)
    every = {"sample_weight": s, "pos_weight": 2.5, "reduction": "sum"}
    assert all(check(fun, **every).passed for fun in LAYOUTS.values())
    for name in every:

        def ignores(params, x, y, name=name, **options):
            options.pop(name, None)  # the tail is looked at without options
            return jaxbce.value_and_grad(params, x, y, **options)

        assert not check(ignores, **every).passed


def test_three_oracles_look_at_every_leaf():
    report = check(jaxbce.value_and_grad)
    leaves = {f"[{k}].{name}" for k in range(3) for name in "wb"}
    oracles = {"autodiff", "complex step", "differences"}
    found = {(c.leaf, c.reference) for c in report.comparisons}
    assert found == {(leaf, o) for leaf in leaves for o in oracles} | {
        ("value", "autodiff")
    }
    # A leaf that is wrong is wrong for each of them.
    wrong = check(at(1, w=lambda w: w * 1.001)).comparisons
    assert {c.reference for c in wrong if not c.passed and c.leaf == "[1].w"} == oracles
    assert all(c.passed for c in wrong if c.leaf != "[1].w")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a leaf scaled by 1.001", "is 1.001 times what it should be"),
        ("a flipped sign", "is -1 times what it should be"),
        ("a transposed leaf", "is transposed"),
        ("a NaN", "1 of 30 entries are not finite"),
        ("a wrong shape", r"expected shape (5, 1), got (5,)"),
        ("a missing layer", "expected 6 leaves, got 4"),
        ("one entry off", " at [2, 3], got "),
        ("everything scaled by 1 + 1e-11", "is 1 + 1e-11 times what it should be"),
        ("float32 inside", "; looks as if computed in float32"),
    ],
)
def test_the_reason_names_the_mistake(name, reason):
    reasons = [c.reason for c in check(MUTANTS[name]).comparisons if not c.passed]
    assert any(reason in r for r in reasons), reasons
    for r in reasons:
        if found := re.fullmatch(r"expected (\S+)(?: at .*)?, got ([^\s;]+)(;.*)?", r):
            assert found[1] != found[2], r


def test_every_leaf_of_a_sum_in_place_of_the_mean_has_the_factor():
    """The rounding that it multiplies may exceed the tolerance."""

    def summed(g):
        return 1797 * g * (1 + 2e-14 * (-1.0) ** jnp.arange(g.size).reshape(g.shape))

    p = problem((3, 1), rows=1797)
    report = check(changed(lambda grads, *_: jax.tree.map(summed, grads)), p)
    leaves = [c for c in report.comparisons if c.leaf != "value"]
    assert {c.reason for c in leaves} == {"is 1797 times what it should be"}


@pytest.mark.parametrize("clamp", [0.1, 0.01, 1e-7])
def test_a_clamp_that_no_given_logit_reaches_is_rejected(clamp):
    def clamped(params, x, y):
        activations = jaxbce.forward(params, x)
        y_hat = jnp.clip(jax.nn.sigmoid(activations.a[-1]), clamp, 1 - clamp)
        deltas = gradients.pull_back(params, activations, y_hat - y)
        grads = gradients.contract(activations.h[:-1], deltas)
        grads = jax.tree.map(lambda g: g / len(x), grads)
        return jaxbce.loss(params, x, y), grads

    small = problem((4, 3, 2))
    small = small._replace(params=jax.tree.map(lambda t: t / 8, small.params))
    assert np.abs(jaxbce.logits(small.params, small.x)).max() < 1
    report = check(clamped, small)
    wrong = {c.leaf: c.point for c in report.comparisons if not c.passed}
    assert set(wrong.values()) == {"large"}
    text = "is wrong only at large logits, as with ŷ clamped"
    assert report.mistakes == dict.fromkeys(wrong, text)
    assert set(wrong) == {"[0].w", "[0].b", "[1].w", "[1].b"}
    # Unclamped, ŷ − y passes.
    clamp = 0.0
    one = problem((4, 3, 1), rows=1)  # all logits are large
    *hidden, last = one.params
    opposite = one._replace(params=(*hidden, jax.tree.map(np.negative, last)))
    for p in (small, one, opposite):
        report = check(clamped, p)
        assert report.passed, str(report)
        assert not report.tail_passed


def test_automatic_differentiation_of_logarithms_passes():
    def naive(params, x, y):
        y_hat = jax.nn.sigmoid(jaxbce.logits(params, x))
        ell = -y * jnp.log(y_hat) - (1 - y) * jnp.log(1 - y_hat)
        return jnp.mean(jnp.sum(ell, axis=1))

    for p in (SQUARE, problem((4, 3, 1), rows=1)):
        report = check(jax.value_and_grad(naive), p)
        assert report.passed, str(report)
        assert not report.tail_passed


def test_the_tail_has_a_verdict_of_its_own():
    def textbook(params, x, y):
        trace = jaxbce.forward(params, x)
        delta = (trace.h[-1] - y) / len(x)
        return jaxbce.loss(params, x, y), (Layer(x.T @ delta, delta.sum(0)),)

    p = problem((4, 1))
    assert check(jaxbce.value_and_grad, p).tail_passed
    report = check(textbook, p)
    assert report.passed
    assert not report.tail_passed
    errors = {(t.logit, t.label): t.error for t in report.tail}
    assert errors[40.0, 1] == 1  # ŷ − y is 0
    assert errors[-40.0, 0] < 1e-14


@pytest.mark.parametrize("fun", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_passes_by_its_own_tolerance(dtype, fun):
    report = check(fun, dtype=dtype)
    assert report.passed, str(report)
    assert report.tail_passed, str(report)
    assert report.mistakes == {}
    strict = check(fun, dtype=dtype, tolerance=1e-12)
    assert not strict.passed
    assert strict.mistakes == {}  # it is only rounded


@pytest.mark.parametrize("before", [False, True])
def test_x64_is_left_as_it_was_also_when_the_function_raises(before):
    def raises(params, x, y):
        raise RuntimeError("mine")

    with jax.enable_x64(before):
        check(jaxbce.value_and_grad)
        assert (jnp.result_type(float) == jnp.float64) == before
        with pytest.raises(RuntimeError, match="mine"):
            check(raises)
        assert (jnp.result_type(float) == jnp.float64) == before


def test_a_function_of_numpy_alone_can_be_checked():
    def in_numpy(params, x, y):
        (w, b), x, y = jax.tree.map(np.asarray, (params[0], x, y))
        a = x @ w + b
        value = np.mean(np.sum(np.logaddexp(0, a) - y * a, axis=1))
        delta = (1 / (1 + np.exp(-a)) - y) / len(x)
        return value, [(x.T @ delta, delta.sum(0))]

    assert check(in_numpy, problem((5, 2))).passed


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"x": jnp.full((37, 6), jnp.nan)},
            ValueError,
            "x to be finite in float64, got nan",
        ),
        ({"y": jnp.zeros(37)}, ValueError, r"y of shape .* logits, got \(37,\)"),
        ({"reduction": "max"}, ValueError, "reduction .* got 'max'"),
        ({"dtype": "float16"}, TypeError, "dtype to be bfloat16, .* got float16"),
        ({"sample_weight": jnp.ones(3)}, ValueError, r"sample_weight of .* got \(3,\)"),
        ({"sample_weight": jnp.zeros(37)}, ValueError, "one entry of sample_weight"),
    ],
)
def test_rejects(change, error, match):
    call = {**dict(zip(("params", "x", "y"), SQUARE.arguments("float32"), strict=True))}
    with pytest.raises(error, match=match):
        jaxbce.check_gradients(jaxbce.value_and_grad, **{**call, **change})


# The steps of a backward pass in NumPy, which `planted` replaces by wrong ones. A step
# sees all that the pass has computed up to there.
STEPS = {
    "output": lambda n: n.c * ((1 - n.y) * n.y_hat - n.p * n.y * (1 - n.y_hat)),
    "next_w": lambda n: n.w[n.k + 1],
    "back": lambda n: n.up * (n.a[n.k] > 0),
    "w": lambda n: n.h[n.k].T @ n.delta,
    "b": lambda n: n.delta.sum(0),
}


def planted(k=None, **wrong):
    """`value_and_grad` in NumPy alone, with wrong steps in layer k or in every one."""

    def fun(params, x, y, *, sample_weight=None, pos_weight=1.0, reduction="mean"):
        params, x, y = jax.tree.map(np.asarray, (params, x, y))
        s = np.ones((len(x), 1)) if sample_weight is None else sample_weight[:, None]
        n = SimpleNamespace(x=x, y=y, s=np.asarray(s), p=np.asarray(pos_weight))
        n.c = n.s / n.s.sum() if reduction == "mean" else n.s
        n.w, n.biases = zip(*params, strict=True)
        n.a, n.h, n.grads = [], [x], []
        for w, b in params:
            n.a.append(n.h[-1] @ w + b)
            n.h.append(np.maximum(n.a[-1], 0))
        n.y_hat = 1 / (1 + np.exp(-n.a[-1]))
        ell = n.p * y * np.logaddexp(0, -n.a[-1]) + (1 - y) * np.logaddexp(0, n.a[-1])
        for n.k in reversed(range(len(params))):
            steps = STEPS if k not in (None, n.k) else STEPS | wrong
            if not n.grads:
                n.delta = steps["output"](n)
            else:
                n.up = n.delta @ steps["next_w"](n).T
                n.delta = steps["back"](n)
            n.grads.insert(0, (steps["w"](n), steps["b"](n)))
        return np.sum(n.c * ell), n.grads

    return fun


def times(factor):
    """δ at the output, times a factor."""
    return {"output": lambda n: STEPS["output"](n) * factor(n)}


def without(i, rescaled=False):
    def factor(n):
        kept = np.ones_like(n.s)
        kept[i] = 0
        return kept / (n.c * kept).sum() if rescaled else kept

    return times(factor)


def slope(a):
    return 1 / (1 + np.exp(-a)) / (1 + np.exp(a))


def error(n, y=None, p=None):
    y, p = n.y if y is None else y, n.p if p is None else p
    return (1 - y) * n.y_hat - p * y * (1 - n.y_hat)


# Each row of the tables of `jaxbce._mistakes`, written a second time. Those of "back"
# and of a leaf are planted in layer 1.
PLANTED = {
    "with the opposite sign": times(lambda n: -1),
    "left at zero": times(lambda n: 0),
    "summed over the examples, not averaged": times(lambda n: n.s / n.c),
    "divided by N twice": times(lambda n: 1 / len(n.x)),
    "averaged over the outputs, not summed": times(lambda n: 1 / n.y.shape[1]),
    "without the first example": without(0),
    "without the last example": without(-1),
    "averaged over all examples but the first": without(0, rescaled=True),
    "averaged over all examples but the last": without(-1, rescaled=True),
    "with ŷ in place of ŷ − y": {"output": lambda n: n.c * n.y_hat},
    "with 1 − y in place of y": {"output": lambda n: n.c * error(n, y=1 - n.y)},
    "with pos_weight ignored": {"output": lambda n: n.c * error(n, p=1)},
    "with pos_weight for both labels": {
        "output": lambda n: n.c * n.p * (n.y_hat - n.y)
    },
    "with sample_weight ignored": {"output": lambda n: error(n) / len(n.x)},
    "divided by N, not by the sum of sample_weight": {
        "output": lambda n: n.s / len(n.x) * error(n)
    },
    "multiplied by σ′(a), as for the squared error": times(lambda n: slope(n.a[-1])),
    "multiplied by 2σ′(a), as for the squared error": times(
        lambda n: 2 * n.y_hat * (1 - n.y_hat)
    ),
    "with ∂BCE/∂ŷ in place of ŷ − y": times(lambda n: 1 / slope(n.a[-1])),
    "with a relu mask at the output": times(lambda n: n.a[-1] > 0),
    "without the relu mask": {"back": lambda n: n.up},
    "with [a ≥ 0] in place of [a > 0]": {"back": lambda n: n.up * (n.a[n.k] >= 0)},
    "with [a < 0] in place of [a > 0]": {"back": lambda n: n.up * (n.a[n.k] < 0)},
    "with relu(a) in place of [a > 0]": {"back": lambda n: n.up * n.h[n.k + 1]},
    "with σ′(a) in place of [a > 0]": {"back": lambda n: n.up * slope(n.a[n.k])},
    "with [δ > 0] in place of [a > 0]": {"back": lambda n: np.maximum(n.up, 0)},
    "with [x > 0] in place of [a > 0]": {"back": lambda n: n.up * (n.x > 0)},
    "with the relu mask of [0]": {"back": lambda n: n.up * (n.a[0] > 0)},
    "with w not transposed": {"next_w": lambda n: n.w[n.k + 1].T},
    "with the weights [0].w": {"next_w": lambda n: n.w[0]},
    "with weights already updated, at a learning rate of 0.3": {
        "next_w": lambda n: n.w[n.k + 1] - 0.3 * n.grads[0][0]
    },
    "with a in place of h": {"w": lambda n: n.a[n.k - 1].T @ n.delta},
    "with the input of [0]": {"w": lambda n: n.h[0].T @ n.delta},
    "transposed": {"w": lambda n: n.delta.T @ n.h[n.k]},
    "plus 0.02 w, as for weight decay": {
        "w": lambda n: n.h[n.k].T @ n.delta + 0.02 * n.w[n.k]
    },
    "plus -0.02 b, as for weight decay": {
        "b": lambda n: n.delta.sum(0) - 0.02 * n.biases[n.k]
    },
    "summed over the units, not the examples": {"b": lambda n: n.delta.sum(1)},
    "summed over the units and the examples": {
        "b": lambda n: np.full(n.delta.shape[1], n.delta.sum())
    },
}
EQUAL_WIDTHS = problem((4, 4, 4, 4, 2), rows=9)
WEIGHTS = {
    "sample_weight": np.linspace(0.5, 2, 9, dtype="f"),
    "pos_weight": np.array([2.5, 0.5], "f"),
}


def looks_like(text, *leaves):
    return dict.fromkeys(leaves, f"looks like the gradient {text}")


def leaves_below(k):
    """The leaves of layers below k, in the order of the backward pass."""
    return [f"[{j}].{leaf}" for j in reversed(range(k)) for leaf in "wb"]


def follow_from(k):
    return dict.fromkeys(leaves_below(k), f"follows from the mistake in [{k}]")


@pytest.mark.parametrize("text", PLANTED)
def test_a_planted_mistake_is_named_and_the_layers_below_follow(text):
    wrong = PLANTED[text]
    if "output" in wrong:
        expected = looks_like(text, "[3].w", "[3].b") | follow_from(3)
    elif "next_w" in wrong or "back" in wrong:
        expected = looks_like(text, "[1].w", "[1].b") | follow_from(1)
    else:
        expected = looks_like(text, *(f"[1].{leaf}" for leaf in wrong))
    if "≥" in text:  # seen where the layer's input is 0, and the error stops there
        expected = looks_like(text, "[1].b")
    fun = planted(3 if "output" in wrong else 1, **wrong)
    report = check(fun, EQUAL_WIDTHS, **WEIGHTS)
    assert report.mistakes == expected
    lines = str(report).splitlines()
    assert {f"{leaf} {mistake}" for leaf, mistake in expected.items()} <= {*lines}


def test_every_mistake_of_the_tables_is_planted():
    tables = "FACTORS", "OUTPUT", "BACK", "WEIGHTS", "BIASES"
    texts = {text for name in tables for text in getattr(_mistakes, name)}
    texts.remove("averaged over the examples, not summed")  # in the next test
    planted_texts = {re.sub(r"-?0\.\d+|(?<=\[)0(?=\])", "#", text) for text in PLANTED}
    assert planted_texts == {re.sub(r"\{.*?\}", "#", text) for text in texts}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("averaged over the examples, not summed", times(lambda n: 1 / len(n.x))),
        ("averaged over all examples but the last", without(-1, rescaled=True)),
    ],
)
def test_an_average_in_place_of_a_sum_is_named(text, wrong):
    report = check(planted(**wrong), EQUAL_WIDTHS, reduction="sum")
    assert report.mistakes == looks_like(text, "[3].w", "[3].b") | follow_from(3)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sizes", [(4, 5, 3, 1), (4, 4, 4, 4, 2)], ids=str)
def test_a_mistake_made_in_every_layer_is_named_in_each(sizes, dtype):
    fun = planted(**PLANTED["without the relu mask"])
    report = check(fun, problem(sizes, rows=9), dtype=dtype)
    top, *others = reversed(range(len(sizes) - 2))
    text = "without the relu mask"
    expected = looks_like(text, f"[{top}].w", f"[{top}].b")
    for k in others:
        leaves = f"[{k}].w", f"[{k}].b"
        expected |= looks_like(f"{text}, after the mistake in [{k + 1}]", *leaves)
    assert report.mistakes == expected


def test_two_mistakes_in_one_layer_are_both_named():
    both = times(lambda n: slope(n.a[-1]) * n.s / n.c)
    text = (
        "multiplied by σ′(a), as for the squared error and "
        "summed over the examples, not averaged"
    )
    report = check(planted(**both), EQUAL_WIDTHS)
    assert report.mistakes == looks_like(text, "[3].w", "[3].b") | follow_from(3)
    wrong = PLANTED["without the relu mask"] | PLANTED["with the input of [0]"]
    report = check(planted(1, **wrong), EQUAL_WIDTHS)
    assert report.mistakes == (
        looks_like("without the relu mask and with the input of [0]", "[1].w")
        | looks_like("without the relu mask", "[1].b")
        | follow_from(1)
    )


def test_guesses_that_only_one_leaf_of_a_layer_allows_are_dropped():
    # In bfloat16 the mask of [2] would explain [1].w as well, but not [1].b.
    report = check(MUTANTS["no mask"], dtype="bfloat16")
    assert report.mistakes == (
        looks_like("without the relu mask", "[1].w", "[1].b")
        | looks_like(
            "without the relu mask, after the mistake in [1]", "[0].w", "[0].b"
        )
    )


def test_a_wrong_error_signal_in_one_leaf_alone_is_named():
    report = check(planted(1, w=lambda n: n.h[n.k].T @ n.up), EQUAL_WIDTHS)
    assert report.mistakes == looks_like("without the relu mask", "[1].w")


def test_a_leaf_of_another_shape_does_not_hide_mistakes_below():
    def transposed_above(grads, *_):
        return (grads[0], Layer(grads[1].w.T, grads[1].b), *grads[2:])

    fun = changed(transposed_above, mask=lambda a: a == a)
    report = check(fun, problem((4, 5, 3, 1), rows=9))
    text = "without the relu mask"
    assert report.mistakes == (
        looks_like(f"{text} and transposed", "[1].w")
        | looks_like(text, "[1].b")
        | looks_like(f"{text}, after the mistake in [1]", "[0].w", "[0].b")
    )


def test_mistakes_in_leaves_alone_are_named_in_every_layer():
    wrong = {"w": lambda n: -n.h[n.k].T @ n.delta, "b": lambda n: n.delta.mean(0)}
    report = check(planted(**wrong), EQUAL_WIDTHS)
    leaves = leaves_below(4)
    assert report.mistakes == (
        looks_like("with the opposite sign", *leaves[::2])
        | looks_like("divided by N twice", *leaves[1::2])
    )


def test_a_leaf_that_is_not_finite_does_not_hide_mistakes_or_make_them_up():
    def infinite(grads, *_):
        first, second, third = grads
        first = first._replace(w=first.w.at[0, 0].set(jnp.inf))
        second = second._replace(b=1.001 * second.b)
        return first, second, third._replace(b=-third.b)

    report = check(changed(infinite))
    assert report.mistakes == looks_like("with the opposite sign", "[2].b")


def test_mistakes_that_coincide_are_not_told_apart():
    ones = EQUAL_WIDTHS._replace(y=np.ones((9, 2)))
    report = check(planted(**PLANTED["with 1 − y in place of y"]), ones)
    assert report.mistakes["[3].w"] == (
        "looks like the gradient with ŷ in place of ŷ − y or with 1 − y in place of y"
    )


def test_a_leaf_is_not_named_after_a_mistake_that_is_as_close_to_the_right_one():
    ones = EQUAL_WIDTHS._replace(y=np.ones((9, 2)))
    p = {"pos_weight": np.float32(1 / 1.001), "tolerance": 1e-3}
    named = check(planted(**times(lambda n: 1.0011)), ones, **p)
    assert named.mistakes["[3].b"] == "looks like the gradient with pos_weight ignored"
    assert not check(planted(**times(lambda n: 1.0015)), ones, **p).passed
    assert not check(planted(**times(lambda n: 1.0015)), ones, **p).mistakes


@pytest.mark.parametrize(
    "name",
    [
        "a leaf scaled by 1.001",
        "one entry off",
        "one entry exchanged",
        "soft labels rounded",
        "two leaves exchanged",
        "a NaN",
        "a missing layer",
        "a wrong shape",
        "a wrong value",
    ],
)
def test_what_is_no_known_mistake_is_not_named(name):
    report = check(MUTANTS[name])
    assert not report.passed
    assert report.mistakes == {}


def assignment(*, relu_backward, bias):
    """The exercise of many courses: L layers in NumPy, with examples as columns."""

    def sigmoid_backward(da, z):
        s = 1 / (1 + np.exp(-z))
        return da * s * (1 - s)

    def linear_activation_forward(a_prev, w, b, activation):
        z = np.dot(w, a_prev) + b
        a = 1 / (1 + np.exp(-z)) if activation == "sigmoid" else np.maximum(0, z)
        return a, (a_prev, w, z)

    def linear_activation_backward(da, cache, activation):
        a_prev, w, z = cache
        dz = (sigmoid_backward if activation == "sigmoid" else relu_backward)(da, z)
        m = a_prev.shape[1]
        return np.dot(w.T, dz), np.dot(dz, a_prev.T) / m, bias(dz, m)

    def compute_cost(al, y):
        return -np.mean(np.sum(y * np.log(al) + (1 - y) * np.log(1 - al), axis=0))

    def model(params, x, y):
        a, y = np.asarray(x).T, np.asarray(y).T
        kinds = ["relu"] * (len(params) - 1) + ["sigmoid"]
        caches, grads = [], []
        for (w, b), kind in zip(params, kinds, strict=True):
            w, b = np.asarray(w).T, np.asarray(b)[:, np.newaxis]
            a, cache = linear_activation_forward(a, w, b, kind)
            caches.append(cache)
        da = -(y / a) + (1 - y) / (1 - a)
        for cache, kind in zip(caches[::-1], kinds[::-1], strict=True):
            da, dw, db = linear_activation_backward(da, cache, kind)
            grads.insert(0, (dw.T, np.ravel(db)))
        return compute_cost(a, y), grads

    return model


def test_two_mistakes_in_an_assignment_are_both_named():
    p = problem((4, 5, 3, 1), rows=9)
    right = {
        "relu_backward": lambda da, z: np.where(z > 0, da, 0),
        "bias": lambda dz, m: np.sum(dz, axis=1, keepdims=True) / m,
    }
    with np.errstate(all="ignore"):  # 1 − ŷ is 0 in the tail
        report = check(assignment(**right), p)
        assert report.passed
        assert report.mistakes == {}
        wrong = {
            "relu_backward": lambda da, z: da,
            "bias": lambda dz, m: np.sum(dz, axis=1, keepdims=True),
        }
        report = check(assignment(**wrong), p)
    mask, bias = "without the relu mask", "summed over the examples, not averaged"
    assert report.mistakes == (
        looks_like(bias, "[2].b")
        | looks_like(mask, "[1].w")
        | looks_like(f"{mask} and {bias}", "[1].b")
        | looks_like(f"{mask}, after the mistake in [1]", "[0].w")
        | looks_like(f"{mask} and {bias}, after the mistake in [1]", "[0].b")
    )


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda value, grads: grads, r"\(Layer, Layer, Layer\)"),
        (lambda value, grads: grads[:2], r"\(Layer, Layer\)"),
        (lambda value, grads: list(grads), "list"),
        (lambda value, grads: (None, grads), r"\(NoneType, tuple\)"),
        (lambda value, grads: (np.ones(9), grads), r"a value of shape \(9,\)"),
        (lambda value, grads: (value + 1j, grads), "a value of .* complex128"),
    ],
)
def test_a_function_that_returns_something_else_is_a_type_error(result, got):
    def fun(*args):
        return result(*by_hand(*args))

    with pytest.raises(TypeError, match=rf"\(value, grads\) with a real .* got {got}"):
        check(fun)
