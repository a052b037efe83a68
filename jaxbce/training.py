"""Training of one network, as a single pure function."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxbce import _layouts, _validate, gradients
from jaxbce._blocks import examples_per_block
from jaxbce._layouts import take
from jaxbce.gradients import Batch
from jaxbce.network import Params


class FitResult(NamedTuple):
    """Result of a training run. Pass it to `fit` in place of params to resume the run.

    Attributes:
      params: Parameters after the last step.
      best_params: Parameters at the evaluation with the lowest validation loss, or the
        lowest training loss if there is no validation set.
      train_loss: Loss of the whole training set at each evaluation, in nats,
        `[evaluations]`; NaN after the run has stopped.
      validation_loss: Loss of the validation set, likewise; NaN if there is none.
      diverged_at: The first step whose loss was not finite, or −1. The parameters are
        those before that step.
      opt_state: State of the optimizer after the last step.
      best_loss: The loss of `best_params`; inf before the first evaluation.
      best_step: Number of steps before the evaluation of `best_params`.
      step: Number of steps taken, also before a resume; fewer than requested if the run
        stopped.
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
    loss: Callable[..., jax.Array] | None = None,
) -> FitResult:
    r"""Trains one network. The whole run is one pure function of the arguments.

    `fit` works under `jit`, `vmap` and `shard_map`. `vmap` may map keys, params, data,
    and hyperparameters if the optimizer is built inside the mapped function. Under
    `shard_map` the results vary over all axes. Only forward-mode differentiation is
    supported, because of the loops. `fit` is compiled once per optimizer object and
    combination of shapes and static options.

    An epoch visits every example once, in an order drawn from the key and the number of
    the epoch. If its last batch is shorter than the others, the loss of that batch is
    the mean over fewer examples. With weights :math:`s` the loss of a batch of B
    examples is :math:`\frac1B \sum_i \frac{s_i}{\bar s}\, \ell_i`, where
    :math:`\bar s` is the mean weight of all examples. The mean of this loss over an
    epoch of full batches is the loss of the training set.

    Args:
      key: A JAX random key for the order of examples; unused for full batches.
      params: A tuple of `Layer` to start from, or the `FitResult` of a call with the
        same key and data to resume it. If `evaluate_every` divides n, two runs of n
        steps are bitwise equal to one run of 2n steps. Otherwise only params and
        opt_state are equal, and only without patience.
      x: Features `[N, n_0]`, floating, N >= 1.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      optimizer: Any optax transformation. `value`, `grad` and `value_fn` of the batch
        are passed to its `update` if it accepts them, and `grad_fn` if it names it.
      num_steps: Number of steps; 0 returns the initial state of a run.
      batch_size: Number of examples per batch, 1 to N; None is N.
      validation: Features `[M, n_0]` and labels `[M, n_L]`.
      evaluate_every: Number of steps between evaluations. The last step is always
        followed by one; with None it is the only one. Each evaluation costs a forward
        pass over all examples.
      patience: Stop at the first evaluation that is at least this many steps after the
        best one; None never stops. Nothing is computed after a stop, except under
        `vmap` while other networks continue.
      sample_weight: Weights s >= 0 of the training examples, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`. It also
        applies to the validation loss.
      loss: A training objective in place of `jaxbce.loss`, with its signature; for
        example, one with a penalty. JAX differentiates it. It is called with
        `sample_weight`, `pos_weight` and `reduction="sum"`. The reported losses are
        those of `jaxbce.loss`.

    Returns:
      A `FitResult`.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or a number is out of range.

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
            "expected optimizer to be an optax transformation, such as optax.sgd(0.1), "
            f"got {type(optimizer).__name__}"
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
        batch_size = _validate.count("batch_size", batch_size, examples=x.shape[0])
    if validation is not None and (
        not isinstance(validation, (tuple, list)) or len(validation) != 2
    ):
        is_sequence = isinstance(validation, (tuple, list))
        got = f"{len(validation)} items" if is_sequence else type(validation).__name__
        raise TypeError(f"expected validation to be a tuple (x, y), got {got}")
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
    loss: Callable[..., jax.Array] | None,
) -> FitResult:
    x, y, sample_weight = data
    n, n_in = x.shape
    run = _initial_run(start, optimizer)
    dtype = run.best_loss.dtype
    outputs = run.params[-1].w.shape[1]
    y = _validate.labels(y, (n, outputs), dtype)
    p = _validate.pos_weight(pos_weight, outputs, dtype)
    relative_weight = None
    if sample_weight is not None:
        s = _validate.sample_weight(sample_weight, n, dtype)
        s = s / jnp.max(s)  # so that the sum cannot overflow
        relative_weight = s / jnp.mean(s)
    block_size = examples_per_block("auto", run.params, n)
    c = jnp.full(n, 1 / n, dtype)
    layout = _layouts.for_training(batch_size or n, n_in)
    datasets = [Batch(x, y, c if relative_weight is None else relative_weight / n, p)]
    if validation is not None:
        valid_x = _validate.features(validation[0], run.params)
        valid_y = _validate.labels(validation[1], (len(valid_x), outputs), dtype)
        weight = jnp.full(len(valid_x), 1 / len(valid_x), dtype)
        datasets.append(Batch(valid_x, valid_y, weight, p))
    datasets = [data._replace(x=layout.pad(data.x)) for data in datasets]
    x = datasets[0].x

    # The loops carry the run, with only the losses of its last evaluation and with
    # every leaf in the layout. The barrier makes a run with one evaluation compile to
    # the same arithmetic as a section of a longer run.
    convert = layout.convert
    run = _varying(lax.optimization_barrier(_convert_run(run, convert)))

    def step(t: jax.Array, run: FitResult, batch: Batch) -> FitResult:
        """One update on a batch, whose weights are those in its loss."""

        def objective(params: Params) -> jax.Array:
            x, y, c, p = batch
            weights = {"sample_weight": c, "pos_weight": p}
            function = loss or gradients.loss
            return function(params, x[:, :n_in], y, **weights, reduction="sum")

        # The value and gradient in the state of a line search are not reused: they may
        # belong to another batch, or to other parameters if a transformation follows
        # the search.
        params, state = convert((run.params, run.opt_state))
        if loss is None:
            total, _ = gradients.accumulate(run.params, batch, block_size, layout)
            value, linear_part = total.value, total.linear_part
            grads = convert(gradients.cast_like(total.grads, run.params))
        else:
            value, grads = jax.value_and_grad(objective)(params)
            linear_part = value
        updates, state = _update(optimizer, params, state, objective, value, grads)
        params = optax.apply_updates(params, updates)
        is_finite = (run.diverged_at < 0) & jnp.isfinite(linear_part)
        params, state = convert((params, state))
        return run._replace(
            params=_select(is_finite, params, run.params),
            opt_state=state,
            diverged_at=jnp.where(
                is_finite | (run.diverged_at >= 0), run.diverged_at, t
            ),
        )

    def advance(begin: jax.Array, end: jax.Array, run: FitResult) -> FitResult:
        """Takes the steps from `begin` to `end`, and evaluates."""
        if batch_size is None:
            full = datasets[0]
            run = lax.fori_loop(begin, end, lambda t, run: step(t, run, full), run)
        else:

            def batch(t: Any, indices: Any, weight: Any, run: FitResult) -> FitResult:
                c = weight.astype(dtype)
                if relative_weight is not None:
                    c = c * take(relative_weight, indices)
                return step(t, run, Batch(take(x, indices), take(y, indices), c, p))

            run = _over_batches(batch, key, n, batch_size, begin, end, run)
        train_loss, *validation_loss = [
            gradients.weighted_loss(run.params, data, block_size, layout)
            for data in datasets
        ]
        selection_loss = validation_loss[0] if validation_loss else train_loss
        diverged_at = jnp.where(
            (run.diverged_at < 0) & ~jnp.isfinite(train_loss), end, run.diverged_at
        )
        is_best = (diverged_at < 0) & (selection_loss < run.best_loss)
        return run._replace(
            best_params=_select(is_best, run.params, run.best_params),
            train_loss=train_loss,
            validation_loss=(
                validation_loss[0] if validation_loss else run.validation_loss
            ),
            diverged_at=diverged_at,
            best_loss=jnp.where(is_best, selection_loss, run.best_loss),
            best_step=jnp.where(is_best, end, run.best_step),
            step=jnp.where(diverged_at < 0, end, diverged_at),
        )

    def advance_unless_stopped(
        run: FitResult, begin: jax.Array
    ) -> tuple[FitResult, Any]:
        end = jnp.minimum(begin + evaluate_every, first + num_steps)
        stopped = run.diverged_at >= 0
        if patience is not None:
            stopped |= run.step - run.best_step >= patience
        nan = jnp.full_like(run.train_loss, jnp.nan)
        unchanged = run._replace(train_loss=nan, validation_loss=nan)
        run = lax.cond(
            _all_across_vmap(stopped),
            lambda run: unchanged,
            lambda run: _select(stopped, unchanged, advance(begin, end, run)),
            run,
        )
        return run, (run.train_loss, run.validation_loss)

    if num_steps == 0:
        empty = run.train_loss[None][:0]
        return _convert_run(run, convert)._replace(
            train_loss=empty, validation_loss=empty
        )
    # The loop counts steps from the initial one and does not read run.step. Under vmap
    # run.step may differ between networks, and each would draw its own order.
    first = run.step
    begins = first + jnp.arange(0, num_steps, evaluate_every, dtype=first.dtype)
    run, (train_loss, validation_loss) = lax.scan(advance_unless_stopped, run, begins)
    return _convert_run(run, convert)._replace(
        train_loss=train_loss, validation_loss=validation_loss
    )


def _initial_run(
    start: Params | FitResult, optimizer: optax.GradientTransformation
) -> FitResult:
    """A run that starts at params, or resumes from a result."""
    if isinstance(start, FitResult):
        nan = jnp.full_like(start.best_loss, jnp.nan)
        state = jax.eval_shape(optimizer.init, start.params)
        if jax.tree.map(jnp.shape, start.opt_state) != jax.tree.map(jnp.shape, state):
            raise ValueError(
                "expected params to be the FitResult of a run with the same optimizer, "
                "got one with an opt_state of another structure"
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


def _convert_run(run: FitResult, convert: Callable[[Any], Any]) -> FitResult:
    """The run with `convert` applied to its parameters and optimizer state."""
    params, best, state = convert((run.params, run.best_params, run.opt_state))
    return run._replace(params=params, best_params=best, opt_state=state)


def _over_batches(
    body: Callable[[jax.Array, jax.Array, jax.Array, Any], Any],
    key: jax.Array,
    n: int,
    size: int,
    begin: jax.Array,
    end: jax.Array,
    carry: Any,
) -> Any:
    """Folds `body(t, indices, weight, carry)` over the batches of steps begin to end.

    `indices [size]` are the examples of a batch, and `weight [size]` their weights in
    its mean. The order of an epoch is drawn at its first step, and again if `begin` is
    within the epoch. It is not carried, because then every step would copy it.
    """
    per_epoch = -(-n // size)

    def epoch(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        t, carry = state
        number = t // per_epoch
        order = jax.random.permutation(jax.random.fold_in(key, number), n)

        def batch(t: jax.Array, carry: Any) -> Any:
            # A short last batch is padded at its start with examples of the previous
            # batch, which get weight 0.
            first = (t - number * per_epoch) * size
            if n % size == 0:
                indices = lax.dynamic_slice_in_dim(order, first, size)
                return body(t, indices, jnp.full(size, 1 / size), carry)
            start = jnp.minimum(first, n - size)
            indices = lax.dynamic_slice_in_dim(order, start, size)
            is_new = start + jnp.arange(size) >= first
            weight = is_new.astype(float) / jnp.minimum(size, n - first).astype(float)
            return body(t, indices, weight, carry)

        until = jnp.minimum(end, (number + 1) * per_epoch)
        return until, lax.fori_loop(t, until, batch, carry)

    return lax.while_loop(lambda state: state[0] < end, epoch, (begin, carry))[1]


@jax.custom_batching.custom_vmap
def _all_across_vmap(stopped: jax.Array) -> jax.Array:
    """Whether all networks of the enclosing `vmap`s have stopped.

    A `cond` on the result remains a branch under `vmap`. A `cond` on the network's own
    value would compute both branches, and `begin`, `end` and the order of examples
    would be batched too, with one copy per network.
    """
    return stopped


@_all_across_vmap.def_vmap
def _(size: int, batched: list[bool], stopped: jax.Array) -> tuple[jax.Array, bool]:
    del size, batched
    return _all_across_vmap(jnp.all(stopped, axis=0)), False


def _update(
    optimizer: optax.GradientTransformation,
    params: Params,
    state: Any,
    objective: Callable[[Params], jax.Array],
    value: Any,
    grads: Any,
) -> tuple[Any, Any]:
    """Calls `optimizer.update` with the extra arguments that its signature accepts."""
    extra_args = {"value": value, "grad": grads, "value_fn": objective}
    signature = inspect.signature(optimizer.update).parameters
    if "grad_fn" in signature:  # optax.contrib.sam; line searches reject it
        extra_args["grad_fn"] = lambda params, _: jax.grad(objective)(params)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        extra_args = {k: extra_args[k] for k in signature if k in extra_args}
    return optimizer.update(grads, state, params, **extra_args)


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _varying(tree: Any) -> Any:
    """Marks every leaf as varying over the axes of an enclosing `shard_map`, if any.

    The carry of a loop must keep its type, but a constant initial value would not be
    typed as varying.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if not axes:
        return tree
    always = sum(lax.axis_index(axis) for axis in axes) >= 0  # True, typed as varying
    return jax.tree.map(lambda leaf: jnp.where(always, leaf, leaf), tree)
