"""The equalities hold, and errors are the promised ones, whatever the arguments."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxbce
from tests.helpers import LAYOUTS, TOLERANCE, loss_reference, relative_error

EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SCALES = st.sampled_from([0.0, 1e-6, 1.0, 30.0])


class Form(NamedTuple):
    """What a program is compiled for."""

    dtype: str
    sizes: list[int]
    rows: int
    reduction: str
    weighted: bool
    pos_weight: tuple[int, ...] | None
    block_size: int | None


FORMS = [
    Form("float64", [3, 4, 2], 7, "mean", True, (2,), 3),
    Form("float64", [1, 1], 1, "sum", False, None, None),
    Form("float32", [2, 5, 3, 1], 9, "mean", True, (), None),
    Form("bfloat16", [4, 1], 5, "sum", False, (), 2),
]


@st.composite
def any_form(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    return Form(
        dtype=draw(st.sampled_from(["float64", "float32", "bfloat16"])),
        sizes=sizes,
        rows=draw(st.integers(1, 9)),
        reduction=draw(st.sampled_from(["mean", "sum"])),
        weighted=draw(st.booleans()),
        pos_weight=draw(st.none() | st.sampled_from([(), (sizes[-1],)])),
        block_size=draw(st.none() | st.integers(1, 12)),
    )


@st.composite
def calls(draw, forms):
    """Arguments in one of these forms, of ordinary and extreme values."""
    form = draw(forms)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    scale_w, scale_x = draw(SCALES), draw(SCALES)

    def rounded(values):
        return np.asarray(values).astype(jnp.dtype(form.dtype)).astype(float)

    layer: Any = jaxbce.Layer
    params = tuple(
        layer(rounded(scale_w * rng.normal(size=(a, b))), rounded(rng.normal(size=b)))
        for a, b in itertools.pairwise(form.sizes)
    )
    x = rounded(scale_x * rng.normal(size=(form.rows, form.sizes[0])))
    y = rounded(rng.choice([0, 0.5, 1], size=(form.rows, form.sizes[-1])))
    weights = {}
    if form.weighted:
        weights["sample_weight"] = rounded(rng.choice([0, 1, 3], size=form.rows))
        weights["sample_weight"][0] = 1
    if form.pos_weight is not None:
        p = np.abs(rng.normal(size=form.pos_weight))
        weights["pos_weight"] = rounded(p)
    return form, (params, x, y), weights


@functools.partial(jax.jit, static_argnames="reduction")
def reference(arguments, weights, *, reduction):
    loss = functools.partial(loss_reference, **weights, reduction=reduction)
    return jax.value_and_grad(loss)(*arguments)


@functools.partial(jax.jit, static_argnames=("reduction", "block_size"))
def found(arguments, weights, **static):
    together = {k: f(*arguments, **weights, **static) for k, f in LAYOUTS.items()}
    return together, jax.grad(jaxbce.loss)(*arguments, **weights, **static)


def check_against_autodiff(call):
    form, arguments, weights = call
    dtype = form.dtype
    with jax.enable_x64(True):
        truth = reference(arguments, weights, reduction=form.reduction)
    with jax.enable_x64(dtype == "float64"):
        arguments = jax.tree.map(lambda t: t.astype(jnp.dtype(dtype)), arguments)
        static = {"reduction": form.reduction, "block_size": form.block_size}
        mine, through = found(arguments, weights, **static)
    mine, through, truth = jax.tree.map(np.asarray, (mine, through, truth))
    assert relative_error(through, mine["rows"][1]) <= TOLERANCE[dtype]
    assert all(np.isfinite(np.asarray(t, float)).all() for t in jax.tree.leaves(mine))
    # In lower precision a relu may round to its other side, and a sum may cancel:
    # what is then bounded is the error against the whole, not against each leaf.
    if dtype == "float64":
        scale = np.sqrt(sum(np.sum(np.square(t)) for t in jax.tree.leaves(truth)))
        for layout in mine.values():
            pairs = zip(jax.tree.leaves(layout), jax.tree.leaves(truth), strict=True)
            for a, b in pairs:
                assert np.linalg.norm(a - b) <= TOLERANCE[dtype] * scale


@EXAMPLES
@given(calls(st.sampled_from(FORMS)))
def test_value_and_gradient_are_autodiffs_whatever_the_numbers(call):
    check_against_autodiff(call)


@pytest.mark.slow
@settings(EXAMPLES, max_examples=100)
@given(calls(any_form()))
def test_value_and_gradient_are_autodiffs_whatever_the_form(call):
    check_against_autodiff(call)


ARRAYS = st.builds(
    lambda shape, dtype: np.ones(shape, jnp.dtype(dtype)),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(["float32", "bfloat16", "float16", "int32", "bool", "complex64"]),
)
ANYTHING = (
    ARRAYS
    | st.sampled_from([None, "mean", "sum", "auto", 1.5, 2, -1, True, (), [1.0], {}])
    | st.builds(lambda n: jaxbce.init(jax.random.key(0), n), st.just((2, 1)))
    | st.builds(lambda w, b: (jaxbce.Layer(w, b),), ARRAYS, ARRAYS)
)


@settings(EXAMPLES, max_examples=150)
@given(
    st.sampled_from(
        [jaxbce.value_and_grad, jaxbce.loss, jaxbce.chain_rule, jaxbce.forward]
    ),
    st.lists(ANYTHING, min_size=3, max_size=3),
    st.dictionaries(
        st.sampled_from(["sample_weight", "pos_weight", "reduction", "block_size"]),
        ANYTHING,
        max_size=2,
    ),
)
def test_whatever_is_passed_only_value_and_type_errors_are_raised(
    function, arguments, options
):
    if function is jaxbce.forward:
        arguments, options = arguments[:2], {}
    if function is jaxbce.chain_rule:
        options = {}
    try:
        function(*arguments, **options)
    except (ValueError, TypeError) as error:
        assert str(error)  # noqa: PT017


@settings(EXAMPLES, max_examples=100)
@given(st.lists(ANYTHING, min_size=2, max_size=2))
def test_elementwise_losses_raise_only_value_and_type_errors(arguments):
    for function in (jaxbce.bce, jaxbce.bce_with_logits):
        try:
            function(*arguments)
        except (ValueError, TypeError) as error:
            assert str(error)  # noqa: PT017


@settings(EXAMPLES, max_examples=100)
@given(ANYTHING, ANYTHING)
def test_init_raises_only_value_and_type_errors(sizes, dtype):
    try:
        jaxbce.init(jax.random.key(0), sizes, dtype=dtype)
    except (ValueError, TypeError) as error:
        assert str(error)  # noqa: PT017
