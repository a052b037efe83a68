"""Fixtures: strict dtypes everywhere, standard ones where a library needs them."""

from collections.abc import Iterator

import jax
import matplotlib as mpl
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 2)
mpl.use("Agg")
flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def _strict_promotion() -> Iterator[None]:
    """No implicit promotion: a float32 computation stays one."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def standard_promotion(_strict_promotion: None) -> Iterator[None]:
    """JAX's default promotion, which optax's schedules and Adam need."""
    with jax.numpy_dtype_promotion("standard"):
        yield
