"""Programs of one network, run number by number, are those that `jit` compiles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxbce._threads import LANES, Number, Threads, array, value
from tests.helpers import TOLERANCE, relative_error

NETWORKS, THREADS = 2, 4  # threads per network
SHAPE = 3, 4

pytestmark = pytest.mark.usefixtures("standard_promotion")


def sum_lanes(t):
    return jnp.broadcast_to(jnp.sum(t, axis=1, keepdims=True), t.shape)


def run(function, *arguments):
    """Runs a function of arrays of one network on `[networks, lanes, ...]`."""

    def numbers(t):
        indices = np.ndindex(t.shape[2:])
        return array(t.shape[2:], (t[(..., *i)] for i in indices))

    program = Threads(THREADS, sum_lanes).program(function)
    result = program(*map(numbers, arguments))
    each = [jnp.broadcast_to(value(t), (NETWORKS, THREADS)) for t in result.flat]
    return jnp.stack(each, axis=-1).reshape(NETWORKS, THREADS, *result.shape)


def random(*shape):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(NETWORKS, THREADS, *shape)), jnp.float32)


PROGRAMS: Any = {
    "transpose": lambda t: t.T,
    "slice": lambda t: t[1:, ::2],
    "concatenate": lambda t: jnp.concatenate([t, 2 * t], axis=1),
    "squeeze": lambda t: t[:1].squeeze(0),
    "broadcast": lambda t: t + t[:, :1],
    "reshape": lambda t: t.reshape(2, 6),
    "sum over an axis": lambda t: jnp.sum(t, axis=0),
    "sum": jnp.sum,
    "product": lambda t: t @ t.T,
    "product with a vector": lambda t: t @ np.arange(4, dtype=np.float32),
    "sum over lanes": lambda t: lax.psum(t * t, LANES),
    "called": lambda t: jax.nn.relu(t) + jax.jit(jnp.cos)(t),
    "select": lambda t: jnp.where(t > 0, t, 1),
    "to and from bool": lambda t: (t > 0).astype(jnp.float32) + t.astype(bool),
    "cube": lambda t: t**3,
    "first power": lambda t: lax.integer_pow(t, 1),
    "inverse square": lambda t: lax.integer_pow(t, -2),
    "sign": lambda t: jnp.sign(jnp.trunc(t)),
    "root": lambda t: jnp.sqrt(abs(t)),
    "logarithm": lambda t: jnp.log1p(jnp.exp(8 * t)),
}


@pytest.mark.parametrize("function", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_of_threads_is_that_of_one_network(function):
    t = random(*SHAPE)
    theirs = jax.vmap(jax.vmap(function, axis_name=LANES))(t)
    assert relative_error(run(function, t), theirs) < TOLERANCE["float32"]


@pytest.mark.parametrize("function", [jnp.sqrt, jnp.log1p, jnp.sign, jnp.isfinite])
def test_substitutes_keep_their_accuracy_everywhere(function):
    special = [0, jnp.inf, jnp.nan, 2e-38, 1e-20, 1e-8, 1e-4, 0.5, 1, 3, 1e8, 3e38]
    t = jnp.broadcast_to(jnp.float32(special), (NETWORKS, THREADS, len(special)))
    mine, theirs = run(function, t), function(t)
    np.testing.assert_allclose(mine, theirs, rtol=3e-7)  # 2.5 units in the last place


def test_numbers_that_are_not_read_are_not_computed():
    def fail():
        raise AssertionError

    program = Threads(1, lambda t: t).program(lambda a, b: (a + 1, b + 1))
    one = array((), [jnp.ones((1, 1))])
    result, _ = program(one, array((), [Number(jnp.float32, fail)]))
    assert value(result.item()) == 2
