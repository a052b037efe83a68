"""Training: one network's whole run as one pure function."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxbce import _columns, _validate, gradients
from jaxbce._blocks import rows_per_block
from jaxbce._columns import transposed
from jaxbce.network import Params


class FitResult(NamedTuple):
    """What a run has come to; passed to `fit` in place of params, it goes on.

    Attributes:
      params: Parameters after the last step.
      best_params: Parameters of the evaluation with the least validation loss, or
        the least train loss where there is no validation.
      train_loss: The loss of all training rows at each evaluation, in nats,
        `[evaluations]`; NaN from where the run had stopped.
      validation_loss: The same of the validation rows; NaN if there are none.
      diverged_at: The first step whose loss was not finite, or −1. The parameters
        are left as they were at that step.
      opt_state: The optimizer's state after the last step.
      best_loss: The loss of `best_params`; inf before the first evaluation.
      best_step: Steps that had been taken at `best_params`.
      step: Steps taken, less than asked for if the run stopped.
    """

    params: Params
    best_params: Params
    train_loss: jax.Array
    validation_loss: jax.Array
    diverged_at: jax.Array
    opt_state: Any
    best_loss: jax.Array
    best_step: jax.Array
    step: jax.Array


def fit(
    key: jax.Array,
    params: Params | FitResult,
    x: jax.Array,
    y: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    batch_size: int | None = None,
    validation: tuple[jax.Array, jax.Array] | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    loss: Callable[..., jax.Array] = gradients.loss,
) -> FitResult:
    r"""Trains one network, as one pure function of its arguments.

    It works under `jit`, `vmap` (over keys, params, data, and hyperparameters from
    which the optimizer is built inside the mapped function) and `shard_map`, where its
    results vary over every axis. Its loops can be differentiated forwards only. It is
    compiled once for each optimizer object and each set of shapes and static options.

    An epoch is every row once, in an order drawn from the key and the epoch's number;
    its last batch may be short, and is averaged over the rows it has. With weights
    :math:`s` the loss of a batch of B rows is
    :math:`\frac1B \sum_i \frac{s_i}{\bar s}\, \ell_i`, :math:`\bar s` their mean over
    all rows: its mean over an epoch of full batches is the loss of all rows.

    Args:
      key: A JAX random key, for the order of rows; not used by a full batch.
      params: A tuple of `Layer` to start from; or the `FitResult` of a call with the
        same key and data, to go on. Two runs of n steps are one of 2n to the bit if
        `evaluate_every` divides n; else, without patience, in params and opt_state.
      x: Features `[N, n_0]`, floating, N >= 1.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      optimizer: Any optax transformation. One that asks for them is given `value`,
        `grad` and `value_fn` of the batch; `grad_fn`, if its `update` names it.
      num_steps: Steps to take; 0 gives the run that has not begun.
      batch_size: Rows in a batch, 1 to N; None is all of them.
      validation: Features `[M, n_0]` and labels `[M, n_L]`.
      evaluate_every: Steps between evaluations, the last of which follows the last
        step; None is that one alone. Each costs a forward pass over all rows.
      patience: Stop at the first evaluation that comes this many steps, or more,
        after the best one; None is never. Nothing is computed after a stop, unless
        under `vmap` others go on.
      sample_weight: Weights s >= 0 of the training rows, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`; in the
        validation loss too.
      loss: The objective whose gradient is followed, of `jaxbce.loss`'s signature;
        for a penalty, say. It is called with `sample_weight`, `pos_weight` and
        `reduction="sum"`. What is reported is `jaxbce.loss` all the same.

    Returns:
      A `FitResult`.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit or a number is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce, optax
      >>> x = jax.random.normal(jax.random.key(0), (256, 2))
      >>> y = x[:, :1] * x[:, 1:] > 0  # exclusive or
      >>> params = jaxbce.init(jax.random.key(1), (2, 16, 1))
      >>> run = jaxbce.fit(
      ...     jax.random.key(2), params, x, y, optimizer=optax.adam(1e-2),
      ...     num_steps=500, batch_size=32, evaluate_every=100)
      >>> run.train_loss.shape, bool(run.train_loss[-1] < 0.1)
      ((5,), True)
    """
    _validate.key(key)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; an optax transformation, such "
            "as optax.sgd(0.1), is accepted"
        )
    num_steps = _validate.count("num_steps", num_steps, least=0)
    if evaluate_every is None:
        evaluate_every = max(num_steps, 1)
    evaluate_every = _validate.count("evaluate_every", evaluate_every)
    if patience is not None:
        patience = _validate.count("patience", patience)
    x = _validate.features(
        x, params.params if isinstance(params, FitResult) else params
    )
    if batch_size is not None:
        batch_size = _validate.count("batch_size", batch_size, most=x.shape[0])
    if validation is not None and (
        not isinstance(validation, (tuple, list)) or len(validation) != 2
    ):
        raise TypeError("validation is not a pair; (x, y) is accepted")
    return _fit(
        key,
        params,
        (x, y, sample_weight),
        None if validation is None else tuple(validation),
        pos_weight,
        optimizer=optimizer,
        num_steps=num_steps,
        batch_size=batch_size,
        evaluate_every=min(evaluate_every, max(num_steps, 1)),
        patience=patience,
        loss=loss,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "optimizer",
        "num_steps",
        "batch_size",
        "evaluate_every",
        "patience",
        "loss",
    ),
)
def _fit(
    key: jax.Array,
    start: Params | FitResult,
    data: tuple[jax.Array, jax.Array, jax.Array | None],
    validation: tuple[jax.Array, jax.Array] | None,
    pos_weight: jax.Array | float,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    batch_size: int | None,
    evaluate_every: int,
    patience: int | None,
    loss: Callable[..., jax.Array],
) -> FitResult:
    x, y, sample_weight = data
    rows, n_in = x.shape
    run = _start(start, optimizer)
    dtype = run.best_loss.dtype
    outputs = run.params[-1].w.shape[1]
    y = _validate.labels(y, (rows, outputs), dtype)
    p = _validate.pos_weight(pos_weight, outputs, dtype)
    relative = None
    if sample_weight is not None:
        s = _validate.sample_weight(sample_weight, rows, dtype)
        s = s / jnp.max(s)  # so that their sum does not overflow
        relative = s / jnp.mean(s)
    block_rows = rows_per_block("auto", run.params, rows)
    each = jnp.full(rows, 1 / rows, dtype)
    evaluated = [(x, y, each if relative is None else relative / rows)]
    if validation is not None:
        valid_x = _validate.features(validation[0], run.params)
        valid_y = _validate.labels(validation[1], (len(valid_x), outputs), dtype)
        weight = jnp.full(len(valid_x), 1 / len(valid_x), dtype)
        evaluated.append((valid_x, valid_y, weight))

    # What the loops carry: the run, with the losses of its last evaluation alone, and
    # every leaf in its columns form: under vmap no step then moves any data. A product
    # with one row is slower in that form, and another loss knows nothing of it.
    by_columns = loss is gradients.loss and (batch_size or rows) > 1
    turned = transposed if by_columns else _unchanged
    # The barrier keeps a run of one evaluation the same program as a part of more.
    run = _varying(lax.optimization_barrier(_turned(run, turned)))
    if by_columns:
        x = _columns.with_ones(x)

    def step(t: jax.Array, run: FitResult, x: Any, y: Any, c: jax.Array) -> FitResult:
        """One update on rows (x, y), which count c in the batch's loss."""

        def objective(params: Params) -> jax.Array:
            weights = {"sample_weight": c, "pos_weight": pos_weight}
            return loss(params, x[:, :n_in], y, **weights, reduction="sum")

        # Not what a line search left in its state: it may be of other parameters, where
        # something follows the search, and of another batch.
        params, state = turned((run.params, run.opt_state))
        if by_columns:
            value, hinge, grads = _columns.objective(
                run.params, x, y, c, p, block_rows=block_rows
            )
            grads = turned(grads)
        else:
            value, grads = jax.value_and_grad(objective)(params)
            hinge = value
        updates, state = _update(optimizer, params, state, objective, value, grads)
        healthy = (run.diverged_at < 0) & jnp.isfinite(hinge)
        params = turned(optax.apply_updates(params, updates))
        return run._replace(
            params=_select(healthy, params, run.params),
            opt_state=turned(state),
            diverged_at=jnp.where(healthy | (run.diverged_at >= 0), run.diverged_at, t),
        )

    def advance(begin: jax.Array, end: jax.Array, run: FitResult) -> FitResult:
        """Takes the steps from `begin` to `end`, and evaluates."""
        if batch_size is None:
            c = evaluated[0][2]
            run = lax.fori_loop(begin, end, lambda t, run: step(t, run, x, y, c), run)
        else:

            def batch(t: Any, chosen: Any, share: Any, run: FitResult) -> FitResult:
                c = share.astype(dtype)
                if relative is not None:
                    c = c * relative[chosen]
                return step(t, run, x[chosen], y[chosen], c)

            run = _over_batches(batch, key, rows, batch_size, begin, end, run)
        columns = run.params if by_columns else transposed(run.params)
        train, *other = [
            _columns.loss(columns, *data, p, block_rows=block_rows)
            for data in evaluated
        ]
        judged = other[0] if other else train
        diverged_at = jnp.where(
            (run.diverged_at < 0) & ~jnp.isfinite(train), end, run.diverged_at
        )
        better = (diverged_at < 0) & (judged < run.best_loss)
        return run._replace(
            best_params=_select(better, run.params, run.best_params),
            train_loss=train,
            validation_loss=judged if other else run.validation_loss,
            diverged_at=diverged_at,
            best_loss=jnp.where(better, judged, run.best_loss),
            best_step=jnp.where(better, end, run.best_step),
            step=jnp.where(diverged_at < 0, end, diverged_at),
        )

    def evaluation(run: FitResult, begin: jax.Array) -> tuple[FitResult, Any]:
        end = jnp.minimum(begin + evaluate_every, first + num_steps)
        stopped = run.diverged_at >= 0
        if patience is not None:
            stopped |= run.step - run.best_step >= patience
        nan = jnp.full_like(run.train_loss, jnp.nan)
        idle = run._replace(train_loss=nan, validation_loss=nan)
        run = lax.cond(
            _all(stopped),
            lambda run: idle,
            lambda run: _select(stopped, idle, advance(begin, end, run)),
            run,
        )
        return run, (run.train_loss, run.validation_loss)

    if num_steps == 0:
        none = run.train_loss[None][:0]
        return _turned(run, turned)._replace(train_loss=none, validation_loss=none)
    # Time does not follow run.step, which under vmap is each member's own: then
    # every member would have an order of rows to itself.
    first = run.step
    begins = first + jnp.arange(0, num_steps, evaluate_every, dtype=first.dtype)
    run, (train_loss, validation_loss) = lax.scan(evaluation, run, begins)
    return _turned(run, turned)._replace(
        train_loss=train_loss, validation_loss=validation_loss
    )


def _start(
    start: Params | FitResult, optimizer: optax.GradientTransformation
) -> FitResult:
    """A run that begins at params, or goes on from a result."""
    if isinstance(start, FitResult):
        nan = jnp.full_like(start.best_loss, jnp.nan)
        state = jax.eval_shape(optimizer.init, start.params)
        if jax.tree.map(jnp.shape, start.opt_state) != jax.tree.map(jnp.shape, state):
            raise ValueError(
                "params is a FitResult whose opt_state is not of the optimizer's "
                "structure; the result of a run with the same optimizer is accepted"
            )
        return start._replace(train_loss=nan, validation_loss=nan)
    dtype = _validate.accumulation_dtype(_validate.params(start))
    return FitResult(
        params=start,
        best_params=start,
        train_loss=jnp.full((), jnp.nan, dtype),
        validation_loss=jnp.full((), jnp.nan, dtype),
        diverged_at=jnp.int32(-1),
        opt_state=optimizer.init(start),
        best_loss=jnp.full((), jnp.inf, dtype),
        best_step=jnp.int32(0),
        step=jnp.int32(0),
    )


def _unchanged(tree: Any) -> Any:
    return tree


def _turned(run: FitResult, turned: Callable[[Any], Any]) -> FitResult:
    """A run with every leaf turned, and back: whatever an optimizer keeps."""
    params, best, state = turned((run.params, run.best_params, run.opt_state))
    return run._replace(params=params, best_params=best, opt_state=state)


def _over_batches(
    body: Callable[[jax.Array, jax.Array, jax.Array, Any], Any],
    key: jax.Array,
    rows: int,
    size: int,
    begin: jax.Array,
    end: jax.Array,
    carry: Any,
) -> Any:
    """Folds `body(t, chosen, share, carry)` over the batches of steps begin to end.

    `chosen [size]` are the batch's rows and `share [size]` the part that each has in
    its mean. An epoch's order is drawn where it begins, or where the steps begin
    within it: carried along, it would be copied at every step.
    """
    per_epoch = -(-rows // size)

    def epoch(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        t, carry = state
        number = t // per_epoch
        order = jax.random.permutation(jax.random.fold_in(key, number), rows)

        def batch(t: jax.Array, carry: Any) -> Any:
            # A short batch is as long as the others: it starts with rows of the one
            # before, whose share is 0.
            first = (t - number * per_epoch) * size
            if rows % size == 0:
                chosen = lax.dynamic_slice_in_dim(order, first, size)
                return body(t, chosen, jnp.full(size, 1 / size), carry)
            start = jnp.minimum(first, rows - size)
            chosen = lax.dynamic_slice_in_dim(order, start, size)
            fresh = start + jnp.arange(size) >= first
            share = fresh.astype(float) / jnp.minimum(size, rows - first).astype(float)
            return body(t, chosen, share, carry)

        until = jnp.minimum(end, (number + 1) * per_epoch)
        return until, lax.fori_loop(t, until, batch, carry)

    return lax.while_loop(lambda state: state[0] < end, epoch, (begin, carry))[1]


@jax.custom_batching.custom_vmap
def _all(stopped: jax.Array) -> jax.Array:
    """Whether every member of the `vmap`s that this is under has stopped.

    A branch on it stays a branch; on each member's own it would become both branches,
    with begin and end, and with them the order of rows, each member's own.
    """
    return stopped


@_all.def_vmap
def _(size: int, batched: list[bool], stopped: jax.Array) -> tuple[jax.Array, bool]:
    del size, batched
    return _all(jnp.all(stopped, axis=0)), False


def _update(
    optimizer: optax.GradientTransformation,
    params: Params,
    state: Any,
    objective: Callable[[Params], jax.Array],
    value: Any,
    grads: Any,
) -> tuple[Any, Any]:
    """The optimizer's update, given what its signature can take."""
    given = {"value": value, "grad": grads, "value_fn": objective}
    accepted = inspect.signature(optimizer.update).parameters
    if "grad_fn" in accepted:  # optax.contrib.sam; a line search refuses it
        given["grad_fn"] = lambda params, _: jax.grad(objective)(params)
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        given = {name: given[name] for name in accepted if name in given}
    return optimizer.update(grads, state, params, **given)


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _varying(tree: Any) -> Any:
    """Inside `shard_map`, leaves typed as different on each device; else as they are.

    A loop's carry must keep its type, and what begins as a constant would not.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if not axes:
        return tree
    same = sum(lax.axis_index(axis) for axis in axes) >= 0  # True, and varying
    return jax.tree.map(lambda leaf: jnp.where(same, leaf, leaf), tree)
