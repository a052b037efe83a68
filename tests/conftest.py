"""Fixtures, and a quick compiler: most of the tests' time is compilation.

Each program is compiled once per run of the tests: its workers, and the processes that
tests start, share a cache of compiled programs, which is removed when the run ends.
Programs are compiled without XLA's expensive optimizations, unless the environment has
XLA_FLAGS, which may be empty.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import jax
import matplotlib as mpl
import pytest
from absl import flags

from tests import helpers

jax.config.update("jax_num_cpu_devices", 2)
mpl.use("Agg")
flags.FLAGS.mark_as_parsed()

CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def pytest_configure(config: pytest.Config) -> None:
    """Sets up the compiler and its cache; workers inherit the environment."""
    environ = pytest.MonkeyPatch()
    if "XLA_FLAGS" not in os.environ and _xla_accepts(QUICK_COMPILATION):
        environ.setenv("XLA_FLAGS", QUICK_COMPILATION)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="jaxbce-tests-")
        environ.setenv("JAX_COMPILATION_CACHE_DIR", folder.name)
        config.add_cleanup(folder.cleanup)
    for name, value in CACHE.items():
        environ.setenv(name.upper(), str(value))
        jax.config.update(name, value)
    config.add_cleanup(environ.undo)
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves slow tests out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases as slow that `slow_ids` names."""
    for item in items:
        for marker in item.iter_markers("slow_ids"):
            if any(text in item.name.partition("[")[2] for text in marker.args):
                item.add_marker(pytest.mark.slow)


def _xla_accepts(xla_flags: str) -> bool:
    """Whether the installed XLA knows these flags; it aborts if it does not."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": xla_flags}
    return not subprocess.run(command, env=environment, capture_output=True).returncode


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


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    """Kills what `helpers.start` started, also when a test fails."""
    try:
        yield
    finally:
        helpers.end_processes()
