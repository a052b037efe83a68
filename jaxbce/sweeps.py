"""Sweeps: thousands of networks in one program, each with its own hyperparameters.

A member is one run of `jaxbce.fit`; a sweep is `jax.vmap` of it, first over the points
of one seed, which share their examples and so are one matrix product, then over seeds.
What is here is which members go together, in groups that fit a cache and a memory, and
which device takes which group.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P

from jaxbce import _validate
from jaxbce._blocks import rows_per_block
from jaxbce.network import Layer, Params, init
from jaxbce.training import fit

# A group's bytes in a CPU's caches, and the most members of a group: with fewer bytes
# a step is mostly the start of its operations, with more its arrays leave the caches.
_CACHE_BYTES = 3 << 19
_MOST_MEMBERS = {"cpu": 128}
_ELSEWHERE = 1 << 16
_MEMORY_SHARE = 0.5  # of a device's memory that a group may take
_AXIS = "members"


class SweepResult(NamedTuple):
    """What each member has come to: NumPy arrays, as `FitResult` of points and seeds.

    Attributes:
      params: Parameters after the last step, leaves `[points, seeds, ...]`; None where
        they were not to be kept.
      best_params: Those of the evaluation with the least validation loss, or train
        loss where there is no validation; None as above.
      train_loss: In nats, `[points, seeds, evaluations]`; NaN from where a member had
        stopped.
      validation_loss: The same of the validation rows; NaN if there are none.
      diverged_at: The first step whose loss was not finite, or −1, `[points, seeds]`.
      best_loss: The loss of `best_params`, `[points, seeds]`.
      best_step: Steps that had been taken there, `[points, seeds]`.
      step: Steps taken, `[points, seeds]`.
    """

    params: Any
    best_params: Any
    train_loss: np.ndarray
    validation_loss: np.ndarray
    diverged_at: np.ndarray
    best_loss: np.ndarray
    best_step: np.ndarray
    step: np.ndarray


def grid(**axes: Any) -> dict[str, np.ndarray]:
    """Every combination of the axes' values, as the equal-length arrays `sweep` takes.

    Args:
      **axes: By name, the values of a hyperparameter, `[n_i]`, n_i >= 1.

    Returns:
      By name, an array `[n_1 n_2 ...]`; the last axis varies fastest. Reshaped to
      `(n_1, n_2, ...)`, a result's first axis is the grid again.

    Raises:
      ValueError: If there is no axis, or one is not a sequence of at least one value.

    Example:
      >>> import jaxbce
      >>> points = jaxbce.grid(learning_rate=[0.1, 0.2], weight_decay=[0.0, 0.5, 1.0])
      >>> points["learning_rate"].tolist()
      [0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
    """
    if not axes:
        raise ValueError("grid has no axes; at least one, as learning_rate=[0.1], is")
    values = {name: np.asarray(value) for name, value in axes.items()}
    for name, value in values.items():
        if value.ndim != 1 or len(value) == 0:
            raise ValueError(
                f"{name} has shape {value.shape}; a sequence of values is accepted"
            )
    mesh = np.meshgrid(*values.values(), indexing="ij")
    return {name: m.ravel() for name, m in zip(values, mesh, strict=True)}


def sweep(
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    *,
    hidden: Sequence[int],
    make_optimizer: Callable[[dict[str, jax.Array]], optax.GradientTransformation],
    hparams: Mapping[str, Any],
    num_seeds: int = 1,
    first_seed: int = 0,
    num_steps: int,
    batch_size: int | None = None,
    validation: tuple[jax.Array, jax.Array] | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    dtype: Any = None,
    keep_params: bool = True,
    group_size: int | str = "auto",
    mesh: jax.sharding.Mesh | None = None,
) -> SweepResult:
    r"""Trains a network for every point and seed, in one program over all devices.

    Member (i, s) is the run that `fit` makes of::

      key_params, key_rows = jax.random.split(jax.random.fold_in(key, s))
      params = init(key_params, (n_0, *hidden, n_L), dtype=dtype)
      fit(key_rows, params, x, y, optimizer=make_optimizer(point_i), ...)

    to rounding: points of one seed share their initial weights and the order of rows,
    so that they differ by their hyperparameters alone. A member that diverges is
    frozen and changes nothing in the others.

    The program is compiled once for a `make_optimizer` object and a group's shape,
    which the number of members changes only while they fill no group. On a CPU each
    device of JAX's computes on a core: `jax.config.update("jax_num_cpu_devices", n)`,
    before anything else of JAX, is how a sweep uses them all.

    Args:
      key: A JAX random key.
      x: Features `[N, n_0]`, floating, N >= 1.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      hidden: Widths of the hidden layers; may be empty.
      make_optimizer: Builds any optax transformation from one point's values, which
        are traced scalars. Give the same function object again to compile once.
      hparams: By name, the points' values, `[points]`: what `grid` returns, or random
        ones; empty for one point. Three names mean something to the sweep itself:
        `init_scale` multiplies the initial weights, `pos_weight` is the loss's, and
        `label_smoothing` ε trains on y (1 − ε) + ε / 2 (the train loss is of those,
        the validation loss of the labels as they are).
      num_seeds: Seeds of every point.
      first_seed: The first of them, so that a sweep can be made in parts.
      num_steps: As `fit`, and so the others up to `pos_weight`.
      batch_size: Rows in a batch; None is all of them.
      validation: Features `[M, n_0]` and labels `[M, n_L]`.
      evaluate_every: Steps between evaluations.
      patience: Steps without a better loss after which a member stops.
      sample_weight: Weights of the rows, `[N]`.
      pos_weight: Weight of the positive class, unless it is in `hparams`.
      dtype: Of the parameters; None is JAX's default float dtype.
      keep_params: Whether to return parameters. If not, memory does not grow with them.
      group_size: The most members that a device trains at a time; "auto" chooses from
        shapes and the device's memory.
      mesh: The devices, of any axes; None is all there are, of all processes.

    Returns:
      A `SweepResult`, whole in every process.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit or a number is out of range.

    Warns:
      RuntimeWarning: If a group does not fit the memory; it is halved.

    Example:
      >>> import jax, jaxbce, optax
      >>> x = jax.random.normal(jax.random.key(0), (256, 2))
      >>> y = x[:, :1] * x[:, 1:] > 0  # exclusive or
      >>> result = jaxbce.sweep(
      ...     jax.random.key(1), x, y, hidden=(16,), num_seeds=3, num_steps=100,
      ...     hparams=jaxbce.grid(learning_rate=[1e-3, 1e-2, 1e9]),
      ...     make_optimizer=lambda hp: optax.sgd(hp["learning_rate"], momentum=0.9))
      >>> result.train_loss.shape, (result.diverged_at >= 0).all(axis=1).tolist()
      ((3, 3, 1), [False, False, True])
    """
    _validate.key(key)
    num_seeds = _validate.count("num_seeds", num_seeds)
    first_seed = _validate.count("first_seed", first_seed, least=0)
    if not callable(make_optimizer):
        raise TypeError(
            f"make_optimizer is a {type(make_optimizer).__name__}; a function of a "
            "point's hyperparameters is accepted"
        )
    for name, value, columns in (("x", x, "n_0"), ("y", y, "n_L")):
        if getattr(value, "ndim", None) != 2:
            raise ValueError(
                f"{name} is of shape {np.shape(value)}; [rows, {columns}] is accepted"
            )
    dtype = _validate.float_dtype(dtype)
    sizes = _validate.sizes((x.shape[1], *hidden, y.shape[1]))
    points, values = _points(hparams, dtype)
    total = points * num_seeds
    if "pos_weight" not in values:
        pos_weight = _validate.pos_weight(
            pos_weight, sizes[-1], _validate.accumulation_dtype(dtype)
        )
    devices = np.array(jax.devices()) if mesh is None else mesh.devices.ravel()
    if jax.process_count() == 1:  # a device without a member would repeat another's
        devices = devices[:total]
    plan = _Plan(
        mesh=jax.sharding.Mesh(devices, (_AXIS,)),
        sizes=sizes,
        dtype=dtype,
        make_optimizer=make_optimizer,
        keep_params=keep_params,
        fit_options=(
            ("num_steps", num_steps),
            ("batch_size", batch_size),
            ("evaluate_every", evaluate_every),
            ("patience", patience),
        ),
    )
    if group_size == "auto":
        group_size = members_that_fit(sizes, dtype, x.shape[0], batch_size, devices)
    group_size = _validate.count("group_size", group_size)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    key_data = jax.random.key_data(key) if typed else key
    impl = str(jax.random.key_impl(key)) if typed else None
    data = (key_data, x, y, validation, sample_weight, pos_weight)
    shared = _placed(plan.mesh, P(), data)
    todo = _groups(points, num_seeds, min(group_size, -(-total // len(devices))))
    result: Any = None
    while todo:
        now = todo[: len(devices)]
        try:
            members = _members(now, len(devices), values, first_seed)
            placed = _placed(plan.mesh, P(_AXIS), members)
            found = _fetched(_train(*placed, shared, plan=plan, impl=impl))
        except jax.errors.JaxRuntimeError as error:
            todo = _halved(todo, error)
            continue
        if result is None:
            whole = (points, num_seeds)
            result = jax.tree.map(
                lambda t, whole=whole: np.empty((*whole, *t.shape[3:]), t.dtype), found
            )
        for device, group in enumerate(now):
            _keep(result, found, device, group)
        todo = todo[len(now) :]
    return result


class _Plan(NamedTuple):
    """What the compiled program depends on, beside shapes."""

    mesh: jax.sharding.Mesh
    sizes: tuple[int, ...]
    dtype: Any
    make_optimizer: Callable[[dict[str, jax.Array]], optax.GradientTransformation]
    keep_params: bool
    fit_options: tuple[tuple[str, Any], ...]


class _Group(NamedTuple):
    """What a device trains at a time: some points of some seeds.

    Attributes:
      points: Their indices, `[points]`; the same one again where a group is not full.
      seeds: The same of seeds.
    """

    points: np.ndarray
    seeds: np.ndarray


def _points(hparams: Mapping[str, Any], dtype: Any) -> tuple[int, dict[str, Any]]:
    """The number of points, and their values as arrays that JAX can take."""
    if not isinstance(hparams, Mapping):
        raise TypeError(
            f"hparams is a {type(hparams).__name__}; a dict of arrays [points], such "
            "as grid(learning_rate=[0.1, 0.2]) makes, is accepted"
        )
    values = {name: np.asarray(value) for name, value in hparams.items()}
    shapes = {name: value.shape for name, value in values.items()}
    shape = next(iter(shapes.values()), (1,))
    if len(shape) != 1 or shape == (0,) or set(shapes.values()) - {shape}:
        raise ValueError(
            f"hparams has shapes {shapes}; arrays [points] of one length >= 1 are "
            "accepted"
        )
    floating = _validate.accumulation_dtype(dtype)
    for name, value in values.items():
        kind = value.dtype.kind
        if kind not in "fiub":
            raise TypeError(
                f"hparams[{name!r}] has dtype {value.dtype}; numbers and booleans are "
                "accepted"
            )
        with np.errstate(over="ignore"):  # a rate beyond float32 is inf, and diverges
            values[name] = value.astype({"f": floating, "b": bool}.get(kind, np.int32))
    return shape[0], values


def members_that_fit(
    sizes: tuple[int, ...],
    dtype: Any,
    rows: int,
    batch_size: int | None,
    devices: np.ndarray,
) -> int:
    """How many members each of `devices` should train at a time, from shapes."""
    shape: Any = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    params = tuple(Layer(shape((a, b)), shape((b,))) for a, b in pairwise(sizes))
    leaves = jax.tree.leaves(params)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    row = sum(sizes[1:]) * leaves[0].dtype.itemsize
    block = rows_per_block("auto", params, rows)  # the whole of an evaluation's memory
    memory = _MEMORY_SHARE * _memory(devices) / (12 * weights + 4 * block * row)
    platform = devices[0].platform
    members = _MOST_MEMBERS.get(platform, _ELSEWHERE)
    if platform == "cpu":
        step = min(batch_size or rows, block) * row + 4 * weights
        members = min(members, 2 ** round(math.log2(max(1, _CACHE_BYTES / step))))
    return max(1, min(members, int(memory)))


def _memory(devices: np.ndarray) -> float:
    """Bytes that a device has, or its share of the machine's."""
    local = [d for d in devices if d.process_index == jax.process_index()]
    stats = (local[0].memory_stats() or {}) if local else {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total / max(1, len(local))


def _groups(points: int, seeds: int, size: int) -> list[_Group]:
    """All members in groups of one shape, of at most `size` members."""

    def parts(count: int, most: int) -> list[np.ndarray]:
        number = -(-count // most)
        each = -(-count // number)  # as equal as can be
        starts = range(0, count, each)
        return [np.minimum(np.arange(i, i + each), count - 1) for i in starts]

    by_point = parts(points, min(points, size))
    by_seed = parts(seeds, max(1, size // len(by_point[0])))
    return [_Group(p, s) for s in by_seed for p in by_point]


def _halved(todo: list[_Group], error: Exception) -> list[_Group]:
    """The same members in smaller groups, where memory was what failed."""
    points, seeds = (len(indices) for indices in todo[0])
    several = jax.process_count() > 1  # of which the others have not failed
    if "RESOURCE_EXHAUSTED" not in str(error) or points * seeds == 1 or several:
        raise error
    warnings.warn(
        f"a group of {points * seeds} members does not fit the memory; going on with "
        "half of it",
        RuntimeWarning,
        stacklevel=3,
    )
    halves = []
    for group in todo:
        if seeds > 1:
            first, second = group.seeds[: -(-seeds // 2)], group.seeds[seeds // 2 :]
            halves += [group._replace(seeds=first), group._replace(seeds=second)]
        else:
            first, second = group.points[: -(-points // 2)], group.points[points // 2 :]
            halves += [group._replace(points=first), group._replace(points=second)]
    return halves


def _members(
    now: list[_Group], devices: int, values: dict[str, np.ndarray], first_seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Seeds `[devices, seeds]` and values `[devices, points]` of a group a device."""
    now = now + now[-1:] * (devices - len(now))
    seeds = np.stack([first_seed + group.seeds for group in now]).astype(np.uint32)
    points = np.stack([group.points for group in now])
    return seeds, {name: value[points] for name, value in values.items()}


def _keep(result: SweepResult, found: SweepResult, device: int, group: _Group) -> None:
    """Puts what a device found, `[devices, seeds, points, ...]`, where it belongs."""
    where = np.ix_(group.points, group.seeds)

    def put(whole: np.ndarray, part: np.ndarray) -> None:
        whole[where] = part[device].swapaxes(0, 1)

    jax.tree.map(put, result, found)


@functools.partial(jax.jit, static_argnames=("plan", "impl"))
def _train(
    seeds: jax.Array,
    values: dict[str, jax.Array],
    shared: tuple[Any, ...],
    *,
    plan: _Plan,
    impl: str | None,
) -> SweepResult:
    """A group a device: seeds `[devices, seeds]`, values `[devices, points]`."""

    def group(seeds: jax.Array, values: dict[str, Any], shared: Any) -> SweepResult:
        key, *data = shared
        if impl is not None:
            key = jax.random.wrap_key_data(key, impl=impl)

        def seed(seed: jax.Array) -> SweepResult:
            keys = jax.random.split(jax.random.fold_in(key, seed))
            params = init(keys[0], plan.sizes, dtype=plan.dtype)
            each = functools.partial(_member, plan, keys[1], params, data)
            points = {name: value[0] for name, value in values.items()}
            if any(len(value) > 1 for value in points.values()):
                return jax.vmap(each)(points)
            one = each({name: value[0] for name, value in points.items()})
            return jax.tree.map(lambda t: t[None], one)

        if seeds.shape[1] == 1:
            found = jax.tree.map(lambda t: t[None], seed(seeds[0, 0]))
        else:
            found = jax.vmap(seed)(seeds[0])
        return jax.tree.map(lambda t: t[None], found)

    specs = {"in_specs": (P(_AXIS), P(_AXIS), P()), "out_specs": P(_AXIS)}
    return jax.shard_map(group, mesh=plan.mesh, **specs)(seeds, values, shared)


def _member(
    plan: _Plan, key: jax.Array, params: Params, shared: Any, values: dict[str, Any]
) -> SweepResult:
    x, y, validation, sample_weight, pos_weight = shared
    if "init_scale" in values:
        scale = values["init_scale"]
        params = tuple(
            layer._replace(w=(scale * layer.w).astype(layer.w.dtype))
            for layer in params
        )
    if "label_smoothing" in values:
        smoothing = values["label_smoothing"]
        y = y.astype(_validate.accumulation_dtype(plan.dtype))
        y = y * (1 - smoothing) + smoothing / 2
    run = fit(
        key,
        params,
        x,
        y,
        optimizer=plan.make_optimizer(values),
        validation=validation,
        sample_weight=sample_weight,
        pos_weight=values.get("pos_weight", pos_weight),
        **dict(plan.fit_options),
    )
    return SweepResult(
        params=run.params if plan.keep_params else None,
        best_params=run.best_params if plan.keep_params else None,
        **{name: getattr(run, name) for name in SweepResult._fields[2:]},
    )


def _placed(mesh: jax.sharding.Mesh, spec: Any, tree: Any) -> Any:
    """Arrays that every process has whole, put on the devices of all of them."""
    sharding = jax.sharding.NamedSharding(mesh, spec)
    if jax.process_count() == 1:  # without a way over the host
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda i: leaf[i])

    return jax.tree.map(place, tree)


def _fetched(tree: Any) -> Any:
    """Arrays that are spread over devices, whole in every process, as NumPy's."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils  # slow to import

        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)
