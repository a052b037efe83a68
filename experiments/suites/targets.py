"""Accelerators that programs can be compiled for although they are not attached."""

import importlib.util
from typing import Any, NamedTuple

# XLA's description of a GPU. Without a device nothing is autotuned: matrix products
# become kernels with default tiles.
_GPU = """
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: 0 }}
  core_count: {cores}
  fpus_per_core: {units_per_core}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory_bytes}
  memory_bandwidth: {bytes_per_second}
  l2_cache_size: {l2_bytes}
  shared_memory_per_core: {shared_bytes_per_core}
  shared_memory_per_block_optin: {shared_bytes_per_block}
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
_H100 = _GPU.format(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    cores=132,
    units_per_core=128,
    clock_ghz=1.98,
    memory_bytes=84942979072,
    bytes_per_second=3352320000000,
    l2_bytes=52428800,
    shared_bytes_per_core=233472,
    shared_bytes_per_block=232448,
)
_A100 = _GPU.format(
    name="NVIDIA A100-SXM4-80GB",
    major=8,
    cores=108,
    units_per_core=64,
    clock_ghz=1.41,
    memory_bytes=85100068864,
    bytes_per_second=2039040000000,
    l2_bytes=41943040,
    shared_bytes_per_core=167936,
    shared_bytes_per_block=166912,
)


class Target(NamedTuple):
    """A device to compile for.

    Attributes:
      device: Its name.
      platform: JAX's name of its platform.
      extra: The extra of this package that installs its compiler.
      module: A module that is importable if the compiler is installed.
      topology: Arguments of `jax.experimental.topologies.get_topology_desc`.
      environment: Environment variables that its compiler needs.
    """

    device: str
    platform: str
    extra: str
    module: str
    topology: dict[str, Any]
    environment: dict[str, str]


def _gpu(device: str, description: str) -> Target:
    return Target(
        device=device,
        platform="cuda",
        extra="aot-gpu",
        module="jax_plugins.xla_cuda13",
        topology={"topology": "1x1x1", "target_config": description},
        environment={},
    )


def _tpu(device: str, name: str, accelerator_type: str) -> Target:
    return Target(
        device=device,
        platform="tpu",
        extra="aot-tpu",
        module="libtpu",
        topology={"topology_name": name, "chips_per_host_bounds": (1, 1, 1)},
        environment={
            "TPU_ACCELERATOR_TYPE": accelerator_type,
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server where this is
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may use a real TPU
        },
    )


TARGETS = {
    "h100": _gpu("NVIDIA H100 SXM, 80 GB", _H100),
    "a100": _gpu("NVIDIA A100 SXM, 80 GB", _A100),
    "v5e": _tpu("TPU v5e", "v5e:1x1", "v5litepod-1"),
    "v6e": _tpu("TPU v6e", "v6e:1x1", "v6e-1"),
}


def missing(name: str) -> str | None:
    """A line that says how to install the compiler of a target, or None if it is."""
    target = TARGETS[name]
    try:
        if importlib.util.find_spec(target.module) is not None:
            return None
    except ModuleNotFoundError:  # of the package that the module is in
        pass
    return f"{name}: skipped; pip install '.[{target.extra}]' installs its compiler"
