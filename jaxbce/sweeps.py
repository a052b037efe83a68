"""Sweeps: thousands of networks in one program, each with its own hyperparameters.

A member of a sweep is one network, trained by `jaxbce.fit`. A sweep applies `jax.vmap`
to `fit` twice: first over the points of one seed, which share their examples, so that
their first layers are one matrix product, and then over seeds. Members are trained in
groups that fit in cache and memory, distributed over devices (`_groups.py`).
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P
from jax.typing import ArrayLike, DTypeLike

from jaxbce import _groups, _member_data, _traced, _validate, training
from jaxbce._groups import max_members_per_device
from jaxbce.network import Params, init
from jaxbce.training import Dataset, datasets

_AXIS = "members"
_OWN_NAMES = ("init_scale", "pos_weight", "label_smoothing")  # read by the sweep itself
_NO_MESH = jax.sharding.AbstractMesh((), ())


class SweepResult(NamedTuple):
    """Results of all members as NumPy arrays; the fields correspond to `FitResult`.

    Attributes:
      params: Parameters after the last step, leaves `[points, seeds, ...]`; None if
        `keep_params` was False.
      best_params: Parameters at the best evaluation; None as above.
      train_loss: Loss of the training set at each evaluation, in nats,
        `[points, seeds, evaluations]`; inf after a member has stopped.
      validation_loss: Loss of the validation set, likewise; `[points, seeds, 0]` if
        there is none.
      diverged_at: The first step at which a member diverged, or −1, `[points, seeds]`.
      best_loss: The loss of `best_params`, `[points, seeds]`.
      best_step: Number of steps taken at the best evaluation, `[points, seeds]`.
      step: Number of steps taken, `[points, seeds]`.
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
    """All combinations of the values of the axes, as the `hparams` of `sweep`.

    Args:
      **axes: The values of each hyperparameter, `[n_i]`, n_i >= 1.

    Returns:
      A dict of arrays `[n_1 n_2 ...]`, in which the last axis varies fastest. Reshaping
      the first axis of a result to `(n_1, n_2, ...)` restores the grid.

    Raises:
      ValueError: If there is no axis, or one is not a sequence of at least one value.

    Example:
      >>> import jaxbce
      >>> points = jaxbce.grid(learning_rate=[0.1, 0.2], weight_decay=[0.0, 0.5, 1.0])
      >>> points["learning_rate"].tolist()
      [0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
    """
    if not axes:
        raise ValueError(
            "expected at least one axis, such as learning_rate=[0.1], got none"
        )
    values = {name: np.asarray(value) for name, value in axes.items()}
    for name, value in values.items():
        if value.ndim != 1 or len(value) == 0:
            raise ValueError(
                f"expected {name} to be a sequence of values, got shape {value.shape}"
            )
    mesh = np.meshgrid(*values.values(), indexing="ij")
    return {name: m.ravel() for name, m in zip(values, mesh, strict=True)}


def sweep(
    key: jax.Array,
    x: jax.Array | np.ndarray,
    y: jax.Array | np.ndarray,
    *,
    hidden: Sequence[int] | None = None,
    make_optimizer: Callable[[dict[str, jax.Array]], optax.GradientTransformation],
    make_penalty: Callable[[dict[str, jax.Array]], Any] | None = None,
    make_sample_weight: Callable[[dict[str, jax.Array]], ArrayLike] | None = None,
    make_labels: Callable[[dict[str, jax.Array], jax.Array], ArrayLike] | None = None,
    hparams: Mapping[str, Any],
    params: Params | None = None,
    num_seeds: int = 1,
    first_seed: int = 0,
    num_steps: int,
    batch_size: int | None = None,
    validation: tuple[ArrayLike, ArrayLike]
    | tuple[ArrayLike, ArrayLike, ArrayLike]
    | Literal["held_out"]
    | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    min_delta: float = 0.0,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    dtype: DTypeLike | None = None,
    keep_params: bool = True,
    group_size: int | Literal["auto"] = "auto",
    kernel: Literal["auto", "xla", "fused"] = "auto",
    mesh: jax.sharding.Mesh | None = None,
    callback: Callable[[int], None] | None = None,
    precision: str | None = None,
) -> SweepResult:
    r"""Trains a network for every point and seed, in one program over all devices.

    Up to rounding, and with s = first_seed + j, member (i, j) is the result of::

      key_params, key_fit = jax.random.split(jax.random.fold_in(key, s))
      params = init(key_params, (n_0, *hidden, n_L), dtype=dtype)
      fit(key_fit, params, x, y, optimizer=make_optimizer(point_i), ...)

    `params`, if given, replace the call of `init`, and the result of
    `make_sample_weight` multiplies `sample_weight`.

    Points of one seed share their initial weights and the order of examples, so they
    differ only in their hyperparameters. A member that diverges is frozen and does not
    affect the others.

    The reported losses of all members are comparable: they use the given labels and the
    argument `pos_weight`, even if hyperparameters change the loss that members train
    on. `make_sample_weight` is the exception: the training loss has the member's
    weights, and with validation="held_out" the validation loss is over the examples
    that the member leaves out, weighted by `sample_weight`.

    The program is compiled once per shape of a group and per distinct computation of
    the functions passed, as for `fit`. The shape depends on the number of members
    only if they do not fill a group. On CPU each JAX device uses one core. To use n
    cores, call `jax.config.update("jax_num_cpu_devices", n)` before any other use of
    JAX.

    Args:
      key: A JAX random key.
      x: Features `[N, n_0]`, floating, N >= 1.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      hidden: Widths of the hidden layers; may be empty. None if params are given.
      make_optimizer: Builds any optax transformation from the hyperparameters of one
        point, a dict of traced scalars. Like the next three functions, it is traced
        once, so values that it reads elsewhere, such as global variables, must not
        change.
      make_penalty: Builds the penalty of `fit` from them, a function of params.
      make_sample_weight: Builds the weights of the examples for one point, `[N]`, which
        are multiplied by `sample_weight`. For example, `lambda hp: fold != hp["fold"]`
        for cross-validation, where `fold [N]` is the fold of each example;
        `jnp.arange(N) != hp["left_out"]` for leave-one-out; or a draw of
        `jax.random.poisson(jax.random.key(hp["draw"]), 1, (N,))` for the bootstrap.
        Members still share features and batches, so a batch of `batch_size` examples
        includes some of weight 0. The features of all examples whose `sample_weight` is
        not 0 must be finite.
      make_labels: Builds the labels that a member trains on, `[N, n_L]`, from its
        hyperparameters and the given labels, which it gets as floats. Without
        `validation`, `best_params` and `patience` follow the loss of the given labels:
        use `params` instead, or pass a validation set.
      hparams: A dict with the hyperparameters of all points, arrays `[points]`: the
        result of `grid`, or random values; empty for one point. The sweep itself uses
        three names: `init_scale` multiplies the initial weights, `pos_weight` is passed
        to the loss that members train on, and `label_smoothing` ε replaces the labels
        that they train on by y (1 − ε) + ε / 2.
      params: Parameters to start from, instead of `hidden` and random ones: those of
        one network, or leaves `[points, seeds, ...]` as in a `SweepResult`, where an
        axis may also have length 1.
      num_seeds: Number of seeds per point.
      first_seed: The first seed, so that a sweep can be split into several calls.
      num_steps: Number of steps. This and the next arguments up to `pos_weight` are as
        in `fit`.
      batch_size: Number of examples per batch; None is N.
      validation: Features `[M, n_0]`, labels `[M, n_L]` and optionally weights `[M]`;
        or "held_out", the examples to which `make_sample_weight` gives weight 0, which
        differ between points. Every point must then have some of them. With "held_out"
        an evaluation costs two forward passes.
      evaluate_every: Number of steps between evaluations.
      patience: Number of steps without a better loss after which a member stops.
      min_delta: The least improvement that counts as better.
      sample_weight: Weights of the examples, `[N]`.
      pos_weight: Weight of the positive class in the reported losses, and in those that
        members train on unless `hparams` contains it.
      dtype: Dtype of the parameters; None is JAX's default float dtype, or that of
        params.
      keep_params: Whether to return parameters. If False, the memory of the result does
        not depend on their size.
      group_size: The largest number of members that a device trains at a time; "auto"
        chooses from the shapes and the memory of the device.
      kernel: How members take the steps between two evaluations. "xla" compiles them as
        for `fit`. "fused" takes all of them in one kernel, in which parameters and the
        states of optimizers stay on chip: for TPU, and for NVIDIA GPUs of compute
        capability 9.0 or higher, such as H100, with one hidden layer and float32.
        Optimizers must be elementwise, such as `optax.sgd`, `adamw`, `rmsprop` or
        `lion` with any schedule, and penalties are not supported. Results differ by
        rounding; on a GPU no product is rounded to less than float32. On CPU the
        kernel for TPU is interpreted, which is slow and meant for tests. "auto" is
        "xla", because no device has measured the other.
      mesh: The devices to use, with any axes; None is all devices of all processes.
      callback: Called on the host with the number of members that are done, whenever
        each device has trained a group.
      precision: Precision of all matrix products, as for `fit`. With kernel="fused",
        "high" is computed as "highest".

    Returns:
      A `SweepResult`, complete in every process.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, a number is out of range, or `hparams` has a
        name that nothing reads.

    Warns:
      RuntimeWarning: If a group does not fit in memory. All remaining groups are then
        halved; with several processes an error is raised instead.

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
    prepared = _prepare(**locals())  # all arguments, by their names
    return _run(prepared, callback)


def prepare(*args: Any, **kwargs: Any) -> "PreparedSweep":
    """Prepares a sweep, given the arguments of `sweep`. It uses no device.

    The mesh may therefore be of devices to compile for that are not attached.
    """
    call = inspect.signature(sweep).bind(*args, **kwargs)
    call.apply_defaults()
    return _prepare(**call.arguments)


def _prepare(
    *,
    key: Any,
    x: Any,
    y: Any,
    hidden: Any,
    make_optimizer: Any,
    make_penalty: Any,
    make_sample_weight: Any,
    make_labels: Any,
    hparams: Any,
    params: Any,
    num_seeds: Any,
    first_seed: Any,
    num_steps: Any,
    batch_size: Any,
    validation: Any,
    evaluate_every: Any,
    patience: Any,
    min_delta: Any,
    sample_weight: Any,
    pos_weight: Any,
    dtype: Any,
    keep_params: Any,
    group_size: Any,
    mesh: Any,
    callback: Any,
    precision: Any,
    kernel: Any,
) -> "PreparedSweep":
    """Checks the arguments of `sweep` and traces its functions."""
    # Check the arguments.
    _validate.key(key)
    num_seeds = _validate.count("num_seeds", num_seeds)
    first_seed = _validate.count("first_seed", first_seed, least=0)
    expected = "a function of a dict of hyperparameters"
    _validate.function("make_optimizer", make_optimizer, expected, arguments=1)
    expected = f"None or {expected}"
    if make_penalty is not None:
        _validate.function("make_penalty", make_penalty, expected, arguments=1)
    if make_sample_weight is not None:
        name = "make_sample_weight"
        _validate.function(name, make_sample_weight, expected, arguments=1)
    if make_labels is not None:
        expected = "None or a function of hyperparameters and labels"
        _validate.function("make_labels", make_labels, expected, arguments=2)
    if callback is not None:
        expected = "None or a function of the number of members done"
        _validate.function("callback", callback, expected, arguments=1)
    hold_out = _holds_out(validation, make_sample_weight)
    _validate.mesh(mesh)
    _validate.matrix("x", x, "[N, n_0]")
    _validate.matrix("y", y, "[N, n_L]")
    sizes, dtype, starts = _networks(x, y, hidden, params, dtype)
    points, values = _points(hparams, dtype)
    points = _member_data.resolve_num_points(
        starts, points if values else None, num_seeds
    )
    total = points * num_seeds
    shapes = _groups.parameter_shapes(sizes, dtype)
    data, evaluated = datasets(
        shapes, x, y, sample_weight, None if hold_out else validation, pos_weight
    )
    if make_sample_weight is not None:  # the members' examples of weight 0 stay in x
        _validate.finite("x", data.x, dtype)

    devices = np.array(jax.devices()) if mesh is None else mesh.devices.ravel()
    if jax.process_count() == 1:  # surplus devices would train copies of members
        devices = devices[:total]
    options = training.check_options(
        data,
        num_steps,
        batch_size,
        evaluate_every,
        patience,
        min_delta,
        platform=devices[0].platform,
    )
    members_mesh = jax.sharding.Mesh(devices, (_AXIS,))
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    key_data = jax.random.key_data(key) if is_typed else key
    key_impl = str(jax.random.key_impl(key)) if is_typed else None

    # Trace the user's functions.
    if _is_fused(kernel, devices, sizes, dtype, make_penalty):
        from jaxbce import _fused  # slow to import

        options = options._replace(is_fused=True)
        precision = _fused.resolve_precision(precision)
    hp = {name: jax.ShapeDtypeStruct((), v.dtype) for name, v in values.items()}
    spec = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), data)
    if "pos_weight" in hp:
        spec = spec._replace(pos_weight=jax.ShapeDtypeStruct((), data.y.dtype))
    user = training.UserCode(
        _init, _step, (make_optimizer, make_penalty), options.batch_size
    )
    no_mesh = jax.sharding.use_abstract_mesh(_NO_MESH)  # the members have theirs
    with _validate.precision(precision), no_mesh:
        programs, constants = training.trace(user, hp, shapes, spec)
        data_programs, data_constants = _member_data.trace(
            _member_data.Functions(make_sample_weight, make_labels), hp, data.y
        )
        _member_data.check(
            data_programs, data_constants, values, points, data, hold_out=hold_out
        )
    _check_all_read(hp, (*programs, *filter(None, data_programs)))
    plan = _Plan(
        mesh=members_mesh,
        sizes=sizes,
        dtype=dtype,
        programs=programs,
        data_programs=data_programs,
        hold_out=hold_out,
        options=options,
        keep_params=keep_params,
        key_impl=key_impl,
        precision=precision,
    )

    # Divide the members into groups.
    if group_size == "auto":
        group_size = max_members_per_device(
            sizes, dtype, x.shape[0], batch_size, devices, options.is_fused
        )
    group_size = _validate.count("group_size", group_size, other='"auto" or ')
    size = min(group_size, -(-total // len(devices)))
    return PreparedSweep(
        plan=plan,
        groups=_groups.divide(points, num_seeds, size),
        values=values,
        first_seed=first_seed,
        starts=starts,
        shared=(key_data, data, evaluated),
        constants=(constants, data_constants),
        shape=(points, num_seeds),
    )


def _run(
    prepared: "PreparedSweep", callback: Callable[[int], None] | None
) -> SweepResult:
    """Trains one group per device at a time."""
    plan, shape = prepared.plan, prepared.shape
    devices = plan.mesh.size
    shared = _groups.to_devices(plan.mesh, P(), prepared.shared)
    queue = prepared.groups
    result: Any = None
    while queue:
        groups = queue[:devices]
        try:
            members = _groups.to_devices(
                plan.mesh, P(_AXIS), _members(groups, prepared)
            )
            with _validate.precision(plan.precision), _groups.only_mesh(plan.mesh):
                trained = _groups.to_host(
                    _train(*members, shared, prepared.constants, plan=plan)
                )
        except jax.errors.JaxRuntimeError as error:
            queue = _groups.halve(queue, error)
            continue
        if result is None:
            result = jax.tree.map(
                lambda t: np.empty((*shape, *t.shape[3:]), t.dtype), trained
            )
        for device, group in enumerate(groups):
            _store(result, trained, device, group)
        queue = queue[len(groups) :]
        if callback is not None:
            callback(math.prod(shape) - _groups.count_members(queue))
    return result


def program(prepared: "PreparedSweep") -> tuple[Any, tuple[Any, ...]]:
    """The jitted function of `sweep` and the arguments of its first call, as shapes."""

    def shapes(spec: Any, tree: Any) -> Any:
        sharding = jax.sharding.NamedSharding(prepared.plan.mesh, spec)

        def shape(t: Any) -> jax.ShapeDtypeStruct:
            aval: Any = jax.typeof(t)
            options: Any = {"weak_type": aval.weak_type, "sharding": sharding}
            return jax.ShapeDtypeStruct(aval.shape, aval.dtype, **options)

        return jax.tree.map(shape, tree)

    groups = prepared.groups[: prepared.plan.mesh.size]
    members = shapes(P(_AXIS), _members(groups, prepared))
    shared = shapes(P(), (prepared.shared, prepared.constants))
    return _traced.jitted(_train_groups, prepared.plan), (*members, *shared)


class _Plan(NamedTuple):
    """The static facts, besides shapes, on which the compiled program depends."""

    mesh: jax.sharding.Mesh
    sizes: tuple[int, ...]
    dtype: Any
    programs: training.Programs
    data_programs: _member_data.Programs
    hold_out: bool
    options: training.Options
    keep_params: bool
    key_impl: str | None  # None for a legacy key
    precision: str | None


class PreparedSweep(NamedTuple):
    """A sweep that is ready to run.

    Attributes:
      plan: The static facts of its program.
      groups: The groups of members, one for each call and device.
      values: Hyperparameters `[points]`, by name.
      first_seed: The first seed.
      starts: Parameters to start from, leaves `[points, seeds, ...]`, or None.
      shared: What all members share: key data, and the examples of all sets.
      constants: The constants of the programs of the plan.
      shape: Numbers of points and seeds.
    """

    plan: _Plan
    groups: list[_groups.Group]
    values: dict[str, np.ndarray]
    first_seed: int
    starts: Params | None
    shared: tuple[Any, ...]
    constants: tuple[Any, ...]
    shape: tuple[int, int]


def _holds_out(validation: Any, make_sample_weight: Any) -> bool:
    """Whether members are evaluated on the examples to which they give weight 0."""
    if not isinstance(validation, str):
        return False
    if validation != "held_out":
        raise ValueError(
            f'expected validation to be examples or "held_out", got {validation!r}'
        )
    if make_sample_weight is None:
        raise ValueError('expected make_sample_weight with validation="held_out"')
    return True


def _is_fused(
    kernel: Any, devices: np.ndarray, sizes: tuple[int, ...], dtype: Any, penalty: Any
) -> bool:
    """Whether members are trained in one kernel, which is checked to be possible."""
    if kernel not in ("auto", "xla", "fused"):
        raise ValueError(
            f'expected kernel to be "auto", "xla" or "fused", got {kernel!r}'
        )
    if kernel != "fused":
        return False
    from jaxbce import _fused  # slow to import

    _fused.check_devices(devices)
    _fused.check_network(sizes[:-1], dtype)
    if penalty is not None:
        raise ValueError('expected make_penalty to be None for kernel="fused"')
    return True


def _networks(
    x: Any, y: Any, hidden: Any, params: Any, dtype: Any
) -> tuple[tuple[int, ...], Any, Params | None]:
    """Layer sizes, dtype, and the parameters to start from, if they are given."""
    if (hidden is None) == (params is None):
        got = "neither" if hidden is None else "both"
        raise TypeError(f"expected exactly one of hidden and params, got {got}")
    if params is not None:
        return _member_data.check_initial_params(params, dtype)
    sizes = (x.shape[1], *_validate.hidden(hidden), y.shape[1])
    return sizes, _validate.float_dtype(dtype), None


def _points(hparams: Mapping[str, Any], dtype: Any) -> tuple[int, dict[str, Any]]:
    """The number of points, and their hyperparameters as arrays that JAX accepts."""
    if not isinstance(hparams, Mapping):
        raise TypeError(
            "expected hparams to be a dict of arrays [points], such as "
            f"grid(learning_rate=[0.1, 0.2]), got {type(hparams).__name__}"
        )
    values = {name: np.asarray(value) for name, value in hparams.items()}
    shapes = {name: value.shape for name, value in values.items()}
    shape = next(iter(shapes.values()), (1,))
    if len(shape) != 1 or shape == (0,) or set(shapes.values()) - {shape}:
        raise ValueError(
            f"expected hparams to be arrays [points] of one length >= 1, got {shapes}"
        )
    floating = _validate.accumulation_dtype(dtype)
    for name, value in values.items():
        kind = value.dtype.kind
        if kind in "iu":
            expected = "integers from -2**31 to 2**31 - 1"
            _validate.bounds(f"hparams[{name!r}]", value, expected, -(2**31), 2**31 - 1)
        if kind not in "fiub":
            raise TypeError(
                f"expected the dtype of hparams[{name!r}] to be real or boolean, got "
                f"{value.dtype}"
            )
        with np.errstate(over="ignore"):  # a value that overflows to inf just diverges
            values[name] = value.astype({"f": floating, "b": bool}.get(kind, np.int32))
    _validate.hparams(values, floating)
    return shape[0], values


def _members(
    groups: list[_groups.Group], prepared: PreparedSweep
) -> tuple[np.ndarray, dict[str, np.ndarray], Params | None]:
    """The members of one group per device.

    Returns:
      Seeds `[devices, seeds]`, values `[devices, points]`, and the parameters to start
      from, leaves `[devices, seeds, points, ...]`, in which seeds or points may be 1.
    """
    values, starts = prepared.values, prepared.starts
    devices, first_seed = prepared.plan.mesh.size, prepared.first_seed
    groups = groups + groups[-1:] * (devices - len(groups))
    seeds = np.stack([first_seed + group.seeds for group in groups]).astype(np.uint32)
    points = np.stack([group.points for group in groups])

    def begin(leaf: np.ndarray) -> np.ndarray:
        by_point, by_seed = (length > 1 for length in leaf.shape[:2])
        chosen = [leaf[g.points] if by_point else leaf for g in groups]
        chosen = [
            leaf[:, g.seeds] if by_seed else leaf
            for leaf, g in zip(chosen, groups, strict=True)
        ]
        return np.stack(chosen).swapaxes(1, 2)

    chosen = {name: value[points] for name, value in values.items()}
    return seeds, chosen, jax.tree.map(begin, starts)


def _store(
    result: SweepResult, trained: SweepResult, device: int, group: _groups.Group
) -> None:
    """Stores one device's part of `trained`, `[devices, seeds, points, ...]`."""
    where = np.ix_(group.points, group.seeds)

    def store(target: np.ndarray, source: np.ndarray) -> None:
        target[where] = source[device].swapaxes(0, 1)

    jax.tree.map(store, result, trained)


def _train(
    seeds: jax.Array,
    values: dict[str, jax.Array],
    starts: Params | None,
    shared: tuple[Any, ...],
    constants: tuple[Any, ...],
    *,
    plan: _Plan,
) -> SweepResult:
    """Trains one group per device.

    Args:
      seeds: `[devices, seeds]`.
      values: Hyperparameters `[devices, points]`.
      starts: Parameters to start from, as `_members` returns them.
      shared: What all members share: key data, and the examples of all sets.
      constants: The constants of the programs of the plan.
      plan: The static facts.

    Returns:
      The results, with leaves `[devices, seeds, points, ...]`.
    """
    arguments = seeds, values, starts, shared, constants
    return _traced.jitted(_train_groups, plan)(*arguments)


def _train_groups(
    plan: _Plan, seeds: Any, values: Any, starts: Any, shared: Any, constants: Any
) -> SweepResult:

    def train_group(
        seeds: jax.Array,
        values: dict[str, Any],
        starts: Params | None,
        shared: Any,
        constants: Any,
    ) -> SweepResult:
        key, data, evaluated = shared
        if plan.key_impl is not None:
            key = jax.random.wrap_key_data(key, impl=plan.key_impl)

        def train_seed(seed: jax.Array, starts: Params | None) -> SweepResult:
            keys = jax.random.split(jax.random.fold_in(key, seed))
            if starts is None:
                params = init(keys[0], plan.sizes, dtype=plan.dtype)
                starts = jax.tree.map(lambda t: t[None], params)

            def member(values: dict[str, Any], params: Params) -> SweepResult:
                return _member(
                    plan, constants, keys[1], params, data, evaluated, values
                )

            points = {name: value[0] for name, value in values.items()}
            return _map(member, points, starts)

        trained = _map(train_seed, seeds[0], jax.tree.map(lambda t: t[0], starts))
        return jax.tree.map(lambda t: t[None], trained)

    return jax.shard_map(
        train_group,
        mesh=plan.mesh,
        in_specs=(P(_AXIS), P(_AXIS), P(_AXIS), P(), P()),
        out_specs=P(_AXIS),
        check_vma=False,  # the programs were traced outside, and no device needs others
    )(seeds, values, starts, shared, constants)


def _map(fun: Callable[..., Any], *args: Any) -> Any:
    """`jax.vmap` over the first axis of all leaves; those of length 1 are shared."""
    lengths = [leaf.shape[0] for leaf in jax.tree.leaves(args)]
    if max(lengths, default=1) == 1:  # vmap would cost time
        return jax.tree.map(
            lambda t: t[None], fun(*jax.tree.map(lambda leaf: leaf[0], args))
        )
    axes = jax.tree.map(lambda leaf: 0 if leaf.shape[0] > 1 else None, args)
    shared = jax.tree.map(lambda leaf: leaf if leaf.shape[0] > 1 else leaf[0], args)
    return jax.vmap(fun, in_axes=axes)(*shared)


def _member(
    plan: _Plan,
    constants: tuple[Any, ...],
    key: jax.Array,
    params: Params,
    data: Dataset,
    evaluated: tuple[Dataset, ...],
    values: dict[str, Any],
) -> SweepResult:
    """Trains one member; `values` are the hyperparameters of its point, scalars."""
    training_constants, data_constants = constants
    data, evaluated = _member_data.examples(
        plan.data_programs,
        data_constants,
        values,
        data,
        evaluated,
        hold_out=plan.hold_out,
    )
    if "init_scale" in values:
        scale = values["init_scale"]
        params = tuple(
            layer._replace(w=(scale * layer.w).astype(layer.w.dtype))
            for layer in params
        )
    if "label_smoothing" in values:
        smoothing = values["label_smoothing"]
        data = data._replace(y=data.y * (1 - smoothing) + smoothing / 2)
    if "pos_weight" in values:
        data = data._replace(pos_weight=values["pos_weight"].astype(data.y.dtype))
    run = training.run(
        plan.programs,
        plan.options,
        True,
        training_constants,
        values,
        key,
        params,
        data,
        evaluated,
    )
    return SweepResult(
        params=run.params if plan.keep_params else None,
        best_params=run.best_params if plan.keep_params else None,
        **{name: getattr(run, name) for name in SweepResult._fields[2:]},
    )


def _init(
    make_optimizer: Any, make_penalty: Any, hparams: dict[str, Any], params: Params
) -> Any:
    del make_penalty
    return _optimizer(make_optimizer, hparams).init(params)


def _step(
    make_optimizer: Any, make_penalty: Any, hparams: dict[str, Any], *arrays: Any
) -> Any:
    """`take_step` for a member."""
    optimizer, penalty = _optimizer(make_optimizer, hparams), None
    if make_penalty is not None:
        with _validate.calling("make_penalty", hparams):
            penalty = make_penalty(dict(hparams))
        expected = "a function of params"
        _validate.function("the result of make_penalty", penalty, expected)
    return training.take_step(optimizer, penalty, None, *arrays)


def _optimizer(make_optimizer: Any, hparams: dict[str, Any]) -> Any:
    with _validate.calling("make_optimizer", hparams):
        optimizer = make_optimizer(dict(hparams))
    _validate.optimizer(optimizer, "the result of make_optimizer")
    return optimizer


def _check_all_read(names: Iterable[str], programs: Sequence[_traced.Program]) -> None:
    """Checks that the sweep or its programs read every hyperparameter.

    Raises:
      ValueError: If one is not read.
    """
    # Hyperparameters are the first arguments of all programs, sorted by their names.
    is_used = zip(*(program.is_used for program in programs), strict=False)
    unread = [
        name
        for name, used in zip(sorted(names), is_used, strict=False)
        if not any(used) and name not in _OWN_NAMES
    ]
    if unread:
        raise ValueError(
            "expected all of hparams to be read by the functions passed or by the "
            f"sweep ({', '.join(_OWN_NAMES)}), got {', '.join(unread)}"
        )
