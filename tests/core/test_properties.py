"""The equalities hold, and errors are the promised ones, whatever the arguments."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxbce
from tests.helpers import TOLERANCE, loss_reference, relative_error

# Each example compiles; the number of them is what the suite's time allows.
EXAMPLES = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SCALES = st.sampled_from([0.0, 1e-6, 1.0, 30.0])


@st.composite
def calls(draw):
    """Arguments of any shape and dtype, ordinary and extreme values."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    dtype = draw(st.sampled_from(["float64", "float32", "bfloat16"]))
    rows = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    scale_w, scale_x = draw(SCALES), draw(SCALES)

    def rounded(values):
        return np.asarray(values).astype(jnp.dtype(dtype)).astype(float)

    layer: Any = jaxbce.Layer
    params = tuple(
        layer(rounded(scale_w * rng.normal(size=(a, b))), rounded(rng.normal(size=b)))
        for a, b in itertools.pairwise(sizes)
    )
    x = rounded(scale_x * rng.normal(size=(rows, sizes[0])))
    y = rounded(rng.choice([0, 0.5, 1], size=(rows, sizes[-1])))
    options = {"reduction": draw(st.sampled_from(["mean", "sum"]))}
    if draw(st.booleans()):
        options["sample_weight"] = rounded(rng.choice([0, 1, 3], size=rows))
        options["sample_weight"][0] = 1
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(), (sizes[-1],)]))
        options["pos_weight"] = rounded(np.abs(rng.normal(size=shape)))
    return dtype, (params, x, y), options, draw(st.none() | st.integers(1, 12))


@EXAMPLES
@given(calls())
def test_value_and_gradient_are_autodiffs(call):
    dtype, arguments, options, block_size = call
    with jax.enable_x64(True):
        truth = jax.value_and_grad(loss_reference)(
            *jax.tree.map(jnp.float64, arguments), **options
        )
    with jax.enable_x64(dtype == "float64"):
        arguments = jax.tree.map(lambda t: jnp.asarray(t, dtype), arguments)
        mine = jaxbce.value_and_grad(*arguments, **options, block_size=block_size)
        through = jax.grad(jaxbce.loss)(*arguments, **options, block_size=block_size)
    assert relative_error(through, mine[1]) <= TOLERANCE[dtype]
    assert all(np.isfinite(np.asarray(t, float)).all() for t in jax.tree.leaves(mine))
    # In lower precision a relu may round to its other side, and a sum may cancel:
    # what is then bounded is the error against the whole, not against each leaf.
    if dtype == "float64":
        scale = np.sqrt(sum(np.sum(np.square(t)) for t in jax.tree.leaves(truth)))
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(truth), strict=True):
            assert np.linalg.norm(a - b) <= TOLERANCE[dtype] * scale


ARRAYS = st.builds(
    lambda shape, dtype: jnp.ones(shape, dtype),
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
