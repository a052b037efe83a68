"""Training of one network, as a single pure function."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxbce import _layouts, _traced, _validate, gradients
from jaxbce._batches import Batches
from jaxbce._blocks import examples_per_block
from jaxbce._layouts import drop_nonfinite
from jaxbce._loops import repeat, varying
from jaxbce.gradients import Batch, Form
from jaxbce.network import Params

_NONE: Any = None  # in place of the losses of a run that is carried by a loop


class FitResult(NamedTuple):
    """Result of a training run. Pass it to `fit` in place of params to resume the run.

    Attributes:
      params: Parameters after the last step.
      best_params: Parameters at the best evaluation: the last one whose validation loss
        (training loss if there is no validation set) was lower than that of the best
        one before by more than `min_delta`.
      train_loss: Loss of the whole training set at each evaluation, in nats,
        `[evaluations]`; inf after the run has stopped.
      validation_loss: Loss of the validation set, likewise; `[0]` if there is none.
      diverged_at: The first step at which the run diverged, or −1. The parameters are
        those before that step.
      opt_state: State of the optimizer after the last step; unspecified if the run
        diverged.
      best_loss: The loss of `best_params`; inf before the first evaluation.
      best_step: Number of steps taken at the best evaluation; 0 if there is none.
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
    x: ArrayLike,
    y: ArrayLike,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    batch_size: int | None = None,
    validation: tuple[ArrayLike, ArrayLike]
    | tuple[ArrayLike, ArrayLike, ArrayLike]
    | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    min_delta: float = 0.0,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    penalty: Callable[[Params], jax.Array] | None = None,
    loss: Callable[..., jax.Array] | None = None,
    callback: Callable[[int, float, float | None], None] | None = None,
    precision: str | None = None,
) -> FitResult:
    r"""Trains one network. The whole run is one pure function of the arguments.

    `fit` works under `jit`, `vmap` and `shard_map`. `vmap` may map keys, params, data,
    and hyperparameters if the optimizer is built inside the mapped function. Under
    `shard_map` the results vary over all axes. Only forward-mode differentiation is
    supported, because of the loops.

    `fit` is compiled once per combination of shapes, static options and operations of
    the optimizer, penalty and loss. Their constants are arguments of the compiled
    program, so the same optimizer with another learning rate does not compile again.
    At most 64 programs are kept; the least recently used are freed. `fit` can be
    exported with `jax.export` for a symbolic N if `batch_size` is None. To serialize
    the result, register the states of the optimizer, or drop `opt_state`.

    From the first step whose loss is not finite (or is negative, from labels outside
    [0, 1]), or an evaluation whose training loss is so, the parameters no longer change
    and `diverged_at` is set. An optimizer that tests for values that are not finite
    itself, by `jnp.isfinite` or `jnp.isnan` as `optax.apply_if_finite` does, may skip
    steps: with it the run is frozen where parameters or state would become non-finite,
    or at an evaluation.

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
      optimizer: Any optax transformation. It is traced once per object, like `penalty`
        and `loss`, so that values that it reads elsewhere, such as global variables,
        must not change. `value`, `grad` and `value_fn` of the batch
        are passed to its `update` if it accepts them, and `grad_fn` if it names it.
        The reported losses are those of the parameters that it updates. For
        `optax.contrib.schedule_free`, evaluate the network with
        `schedule_free_eval_params(run.opt_state, run.params)` instead.
      num_steps: Number of steps; 0 returns the initial state of a run.
      batch_size: Number of examples per batch, 1 to N; None is N.
      validation: Features `[M, n_0]` and labels `[M, n_L]`, and optionally weights of
        the examples, `[M]`.
      evaluate_every: Number of steps between evaluations. There is always one after the
        last step; None evaluates only there. Each evaluation costs a forward pass over
        all examples. On a GPU it should divide `num_steps`: otherwise the number of
        steps is not a constant of the program, and the host waits for every step.
      patience: Stop at the first evaluation that is at least this many steps after the
        best one; None never stops. Nothing is computed after a stop, except under
        `vmap` while other networks continue.
      min_delta: An evaluation replaces the best one only if its loss is lower by more
        than this, in nats.
      sample_weight: Weights s >= 0 of the training examples, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`. It also
        applies to the validation loss.
      penalty: A function of params, such as `lambda params: 1e-3 *
        optax.tree.norm(params, squared=True)`. It is differentiated by JAX, and added
        to the loss and to the gradient of each step. The reported losses are without
        it. Its gradient must be finite wherever its value is.
      loss: A training objective to use in place of the hand-derived one, for comparing
        with automatic differentiation, by which it is differentiated. It has the
        signature of `jaxbce.loss` and is called with `sample_weight`, `pos_weight` and
        `reduction="sum"`. The reported losses are those of `jaxbce.loss`.
      callback: Called on the host after each evaluation, in order, with the number of
        steps taken and the training and validation loss (None without a validation
        set). Under `vmap` it is called once per network. It is not supported for
        examples that are sharded over several devices.
      precision: Precision of all matrix products of the run, as for
        `jax.default_matmul_precision`, such as "highest". None is JAX's setting. Its
        default is fast: in float32 it rounds the factors of each product to bfloat16 on
        TPU and to TensorFloat-32 on GPU, for a relative error of about 1e-3.

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
    _validate.optimizer(optimizer)
    if penalty is not None:
        _validate.function("penalty", penalty, "None or a function of params")
    if loss is not None:
        _validate.function("loss", loss, "None or a function like jaxbce.loss")
    start = params.params if isinstance(params, FitResult) else params
    training, evaluated = datasets(start, x, y, sample_weight, validation, pos_weight)
    options = check_options(
        training, num_steps, batch_size, evaluate_every, patience, min_delta, callback
    )
    with _validate.precision(precision):
        first, by_hand = varying(start), loss is None
        user = UserCode(_init, _step, (optimizer, penalty, loss), batch_size, by_hand)
        programs, constants = trace(user, (), first, training)
        if isinstance(params, FitResult):
            state = jax.eval_shape(programs.init, constants[0], (), first)
            _check_resumed(params, state, validation is not None)
            params = params._replace(train_loss=_NONE, validation_loss=_NONE)
        compiled = _traced.jitted(run, programs, options, by_hand)
        return compiled(constants, (), key, varying(params), training, evaluated)


def _check_resumed(run: FitResult, opt_state: Any, has_validation: bool) -> None:
    """Checks that a run can be resumed.

    Its optimizer state must be like `opt_state`, and its best loss must be comparable
    with the losses to come.
    """
    found = jax.eval_shape(lambda state: state, run.opt_state)
    if _form(found) != _form(opt_state):
        raise ValueError(
            "expected params to be the FitResult of a run with the same optimizer, got "
            "one with an opt_state of another structure, shape or dtype"
        )
    # Of a run that a loop carries, the losses are replaced by ().
    was_evaluated = np.shape(run.train_loss)[-1] > 0
    had_validation = np.shape(run.validation_loss)[-1] > 0
    if was_evaluated and had_validation != has_validation:
        with_or_without = "with" if had_validation else "without"
        raise ValueError(
            f"expected to resume the run as it began, {with_or_without} validation, "
            "because its best_loss is compared with later losses; pass its params to "
            "begin another run"
        )


def _form(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


class Options(NamedTuple):
    """Arguments of `fit` on which its compiled program depends, and the platform."""

    num_steps: int
    batch_size: int | None
    evaluate_every: int
    patience: int | None
    min_delta: float
    callback: Callable[..., None] | None
    platform: str
    is_fused: bool = False  # whether one kernel takes all steps; only for `sweep`


def check_options(
    training: "Dataset",
    num_steps: int,
    batch_size: int | None,
    evaluate_every: int | None,
    patience: int | None,
    min_delta: float,
    callback: Callable[..., None] | None = None,
    platform: str | None = None,
) -> Options:
    """Checks the static options, as `fit` documents them.

    The platform is that of the devices; None is JAX's default.
    """
    num_steps = _validate.count("num_steps", num_steps, least=0)
    most = max(num_steps, 1)
    if batch_size is not None:
        n = training.x.shape[0]
        batch_size = _validate.count("batch_size", batch_size, examples=n)
    if evaluate_every is not None:
        evaluate_every = _validate.count("evaluate_every", evaluate_every)
    if patience is not None:
        patience = _validate.count("patience", patience)
        if evaluate_every is None and patience < num_steps:
            raise ValueError(
                f"expected evaluate_every with patience={patience}, got None, which "
                "evaluates only after the last step"
            )
    if callback is not None:
        expected = "None or a function of (step, train_loss, validation_loss)"
        _validate.function("callback", callback, expected, arguments=3, is_static=True)
    return Options(
        num_steps=num_steps,
        batch_size=batch_size,
        evaluate_every=min(evaluate_every or most, most),
        patience=patience,
        min_delta=_validate.min_delta(min_delta, training.y.dtype),
        callback=callback,
        platform=platform or jax.default_backend(),
    )


class Dataset(NamedTuple):
    """Checked examples. Weights are relative, with a mean of 1; None is all ones."""

    x: jax.Array
    y: jax.Array
    weight: jax.Array | None
    pos_weight: jax.Array

    def batch(self) -> Batch:
        """All examples, with weights that add up to 1."""
        n = self.x.shape[0]
        weight = jnp.ones(n, self.y.dtype) if self.weight is None else self.weight
        return Batch(self.x, self.y, weight / n, self.pos_weight)


def datasets(
    params: Params, x: Any, y: Any, sample_weight: Any, validation: Any, pos_weight: Any
) -> tuple[Dataset, tuple[Dataset, ...]]:
    """Checks the examples to train on, and those to evaluate: these, and any others."""
    training = _validate.examples(x, y, sample_weight, params)
    sets = [training]
    if (checked := _validate.validation(validation, params)) is not None:
        sets.append(checked)
    p = _validate.pos_weight(pos_weight, params[-1].w.shape[1], training[1].dtype)
    _validate.weights("pos_weight", pos_weight, p.dtype)
    evaluated = tuple(_dataset(*examples, p) for examples in sets)
    return evaluated[0], evaluated


def _dataset(
    x: jax.Array, y: jax.Array, s: jax.Array | None, pos_weight: jax.Array
) -> Dataset:
    if s is None:
        return Dataset(x, y, None, pos_weight)
    # The label of an example of weight 0 may be NaN, too.
    x, y = drop_nonfinite(s == 0, x), drop_nonfinite(s == 0, y)
    return Dataset(x, y, relative_weight(s), pos_weight)


def relative_weight(s: jax.Array) -> jax.Array:
    """Weights divided by their mean."""
    s = gradients.rescale(s)
    return s / jnp.mean(s)


class Programs(NamedTuple):
    """The user's functions, as traced programs of hyperparameters and arrays.

    Attributes:
      init: `(hparams, params) -> state` of the optimizer.
      step: The user-supplied part of a training step, as `take_step` computes it:
        `(hparams, params, state, total, batch) -> (params, state, rest)`.
    """

    init: _traced.Program
    step: _traced.Program


class UserCode(NamedTuple):
    """The user's functions, and the static options on which their trace depends.

    Attributes:
      init: `(*functions, hparams, params) -> state` of the optimizer.
      step: `(*functions, hparams, params, state, total, batch)`, which returns the
        result of `take_step`.
      functions: The first arguments of both.
      batch_size: As for `fit`.
      by_hand: Whether the gradient is the hand-derived one.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    functions: tuple[Any, ...]
    batch_size: int | None
    by_hand: bool = True


@_traced.remember
def trace(
    user: UserCode, hparams: Any, params: Params, training: Dataset
) -> tuple[Programs, tuple[Any, ...]]:
    """Traces the user's functions.

    Returns:
      The programs, and the numbers in each of them.
    """
    init = _traced.trace(user.init, hparams, params, static=user.functions)

    def example(constants: Any, hparams: Any, params: Params, training: Dataset) -> Any:
        x, y, c, p = training.batch()
        size = user.batch_size or x.shape[0]
        x, y, c = (_layouts.take(t, jnp.arange(size)) for t in (x, y, c))
        batch = Batch(x, y, c, p)
        state = init.program(constants, hparams, params)
        total = (jnp.sum(c), params) if user.by_hand else None
        return varying((params, state, total, batch))

    arguments = jax.eval_shape(example, init.constants, hparams, params, training)
    step = _traced.trace(user.step, hparams, *arguments, static=user.functions)
    return Programs(init.program, step.program), (init.constants, step.constants)


def _init(optimizer: Any, penalty: Any, loss: Any, _: Any, params: Params) -> Any:
    return optimizer.init(params)


def _step(optimizer: Any, penalty: Any, loss: Any, _: Any, *arrays: Any) -> Any:
    return take_step(optimizer, penalty, loss, *arrays)


def take_step(
    optimizer: optax.GradientTransformation,
    penalty: Callable[[Params], jax.Array] | None,
    loss: Callable[..., jax.Array] | None,
    params: Params,
    state: Any,
    total: tuple[jax.Array, Params] | None,
    batch: Batch,
) -> tuple[Any, Any, jax.Array]:
    """The user-supplied part of a step: penalty or loss, and the optimizer's update.

    Args:
      optimizer: The optimizer.
      penalty: The penalty, or None.
      loss: The objective in place of the derivation, or None.
      params: Parameters.
      state: State of the optimizer.
      total: The hand-derived loss and gradient; None if there is an objective.
      batch: The examples, for optimizers that evaluate the objective themselves.

    Returns:
      The new parameters and state, and the part of the loss that is not hand-derived.
    """

    def penalized(params: Any) -> jax.Array:
        return _validate.penalty_value(penalty(params) if penalty else None)

    def objective(params: Any) -> jax.Array:
        x, y, c, p = batch
        function = loss or gradients.loss
        value = function(params, x, y, sample_weight=c, pos_weight=p, reduction="sum")
        return value if penalty is None else value + penalized(params)

    rest = jnp.zeros((), batch.c.dtype)
    if total is None:
        value, grads = jax.value_and_grad(objective)(params)
        rest = value
    else:
        value, grads = total
        if penalty is not None:
            rest, penalty_grads = jax.value_and_grad(penalized)(params)
            value, grads = value + rest, jax.tree.map(jnp.add, grads, penalty_grads)
    # The value and gradient in the state of a line search are not reused: they may
    # belong to another batch, or to other parameters if a transformation follows the
    # search.
    extra_args = {"value": value, "grad": grads, "value_fn": objective}
    signature = inspect.signature(optimizer.update).parameters
    if "grad_fn" in signature:  # optax.contrib.sam; line searches reject it
        extra_args["grad_fn"] = lambda params, _: jax.grad(objective)(params)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        extra_args = {k: extra_args[k] for k in signature if k in extra_args}
    updates, state = optimizer.update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state, rest


def run(
    programs: Programs,
    options: Options,
    by_hand: bool,
    constants: tuple[Any, ...],
    hparams: Any,
    key: jax.Array,
    start: Params | FitResult,
    training: Dataset,
    evaluated: tuple[Dataset, ...],
) -> FitResult:
    """Runs `fit` on checked arguments, with users' functions as traced programs.

    Args:
      programs: The programs of `trace`; static, like the next two.
      options: The static options.
      by_hand: Whether the gradient is the hand-derived one.
      constants: The constants of the programs.
      hparams: Hyperparameters, arguments of the programs.
      key: A JAX random key.
      start: Parameters, or the result of a run to resume, without losses.
      training: The examples to train on.
      evaluated: The sets whose losses are reported: a training set, and optionally a
        validation set.
    """
    init, step = (
        functools.partial(program, numbers, hparams)
        for program, numbers in zip(programs, constants, strict=True)
    )
    may_skip = programs.step.tests_finiteness
    num_steps, evaluate_every = options.num_steps, options.evaluate_every
    batch_size, patience = options.batch_size, options.patience
    n, n_in = training.x.shape
    dtype = training.y.dtype
    # The loops carry the run in the layout, without its losses. The barrier makes a
    # run with one evaluation compile to the same arithmetic as a section of a longer
    # run.
    layout = _layouts.ROWS
    if by_hand:
        layout = _layouts.for_training(batch_size or n, n_in, options.platform)
    convert = layout.convert
    if not isinstance(start, FitResult):
        start = FitResult(
            params=start,
            best_params=start,
            train_loss=_NONE,
            validation_loss=_NONE,
            diverged_at=jnp.int32(-1),
            opt_state=init(start),
            best_loss=jnp.full((), jnp.inf, dtype),
            best_step=jnp.int32(0),
            step=jnp.int32(0),
        )
    initial = varying(lax.optimization_barrier(_convert_run(start, convert)))
    block_size = examples_per_block("auto", start.params, n)
    x, y, relative_weight, p = training
    padded = layout.pad(x)
    full = training.batch()._replace(x=padded)
    form = Form(block_size, relative_weight is not None, layout)
    fused = None
    if options.is_fused:
        from jaxbce import _fused  # slow to import

        step_arguments = programs.step, constants[1], hparams, start.params
        fused = _fused.prepare(
            *step_arguments, start.opt_state, training, batch_size, options.platform
        )

    def take(t: jax.Array, batch: Batch, run: FitResult) -> FitResult:
        """Takes step t, on a batch."""
        total, linear_part = None, jnp.zeros((), dtype)
        if by_hand:
            objective, _ = gradients.accumulate(run.params, batch, form)
            grads = gradients.cast_like(objective.grads, run.params)
            total = objective.value, convert(grads)
            linear_part = objective.linear_part
        params, state, rest = step(
            *convert((run.params, run.opt_state)),
            total,
            varying(batch._replace(x=batch.x[:, :n_in])),
        )
        if may_skip:  # the optimizer may have skipped a bad gradient
            before = convert((run.params, run.opt_state))
            is_finite = _stays_finite(before, (params, state))
        else:
            is_finite = jnp.isfinite(linear_part + rest) & (linear_part >= 0)
        is_finite &= run.diverged_at < 0
        params, state = convert((params, state))
        return run._replace(
            params=_select(is_finite, params, run.params),
            opt_state=(_select(is_finite, state, run.opt_state) if may_skip else state),
            diverged_at=jnp.where(
                is_finite | (run.diverged_at >= 0), run.diverged_at, t
            ),
        )

    def advance(
        begin: jax.Array, end: jax.Array, run: FitResult
    ) -> tuple[FitResult, list[jax.Array]]:
        """Takes the steps from `begin` to `end`, and evaluates."""
        # A GPU reads the number of steps back to the host at every step unless it is
        # a constant of the program.
        is_static = num_steps % evaluate_every == 0
        steps = evaluate_every if is_static else end - begin
        batches = Batches(key, n, batch_size or n)
        if fused is not None:
            carried = *convert((run.params, run.opt_state)), run.diverged_at
            carried = fused.fold(batches, begin, steps, evaluate_every, carried)
            params, state = convert(carried[:2])
            run = run._replace(params=params, opt_state=state, diverged_at=carried[2])
        elif batch_size is None:
            run = repeat(steps, lambda i, run: take(begin + i, full, run), run)
        else:

            def batch(t: Any, indices: Any, weight: Any, run: FitResult) -> FitResult:
                c = weight.astype(dtype)
                if relative_weight is not None:
                    c = c * _layouts.take(relative_weight, indices)
                features = _layouts.take(padded, indices)
                if n % indices.shape[0]:  # a copy of weight 0 must not overflow
                    features = jnp.where(weight[:, None] > 0, features, 0)
                labels = _layouts.take(y, indices)
                return take(t, Batch(features, labels, c, p), run)

            run = batches.fold(batch, begin, steps, evaluate_every, run)
        losses = [
            gradients.weighted_loss(
                run.params,
                data.batch()._replace(x=layout.pad(data.x)),
                form._replace(is_weighted=data.weight is not None),
            )
            for data in evaluated
        ]
        train_loss, selection_loss = losses[0], losses[-1]
        is_valid = jnp.isfinite(train_loss) & (train_loss >= 0)
        diverged_at = jnp.where((run.diverged_at < 0) & ~is_valid, end, run.diverged_at)
        is_best = (diverged_at < 0) & (
            selection_loss < run.best_loss - options.min_delta
        )
        run = run._replace(
            best_params=_select(is_best, run.params, run.best_params),
            diverged_at=diverged_at,
            best_loss=jnp.where(is_best, selection_loss, run.best_loss),
            best_step=jnp.where(is_best, end, run.best_step),
            step=jnp.where(diverged_at < 0, end, diverged_at),
        )
        return run, losses

    def advance_unless_stopped(
        run: FitResult, begin: jax.Array
    ) -> tuple[FitResult, Any]:
        end = jnp.minimum(begin + evaluate_every, first + num_steps)
        stopped = run.diverged_at >= 0
        if patience is not None:
            stopped |= run.step - run.best_step >= patience
        unchanged = run, [jnp.full_like(run.best_loss, jnp.inf) for _ in evaluated]
        run, losses = lax.cond(
            _all_across_vmap(stopped),
            lambda run: unchanged,
            lambda run: _keep(stopped, unchanged, advance(begin, end, run), fused),
            run,
        )
        if options.callback is not None:
            report = functools.partial(_report, options.callback)
            jax.debug.callback(report, stopped, run.step, losses, ordered=True)
        return run, losses

    if num_steps == 0:
        last, losses = initial, [initial.best_loss[None][:0] for _ in evaluated]
    else:
        # The loop counts steps from the initial one and does not read run.step. Under
        # vmap run.step may differ between networks, and each would draw its own order.
        first = initial.step
        begins = first + jnp.arange(0, num_steps, evaluate_every, dtype=first.dtype)
        last, losses = lax.scan(advance_unless_stopped, initial, begins)
    return _convert_run(last, convert)._replace(
        train_loss=losses[0],
        validation_loss=losses[1] if len(losses) > 1 else losses[0][:0],
    )


def _report(
    callback: Callable[..., None], stopped: Any, step: Any, losses: Any
) -> None:
    """Calls the user's callback with Python numbers, unless the run had stopped."""
    if not stopped:
        train_loss, validation_loss = (*map(float, losses), None)[:2]
        callback(int(step), train_loss, validation_loss)


def _stays_finite(before: Any, after: Any) -> jax.Array:
    """Whether all numbers are finite but for those that were not finite before.

    The state of an optimizer may hold inf, such as a best loss without an evaluation.
    """
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    stays = [
        jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old))
        for old, new in pairs
        if jnp.issubdtype(new.dtype, jnp.inexact)
    ]
    return functools.reduce(jnp.logical_and, stays)


def _convert_run(run: FitResult, convert: Callable[[Any], Any]) -> FitResult:
    """The run with `convert` applied to its parameters and optimizer state."""
    params, best, state = convert((run.params, run.best_params, run.opt_state))
    return run._replace(params=params, best_params=best, opt_state=state)


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


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _keep(stopped: jax.Array, unchanged: Any, advanced: Any, fused: Any) -> Any:
    """Selects the state of a run before or after a section, if it has stopped or not.

    With a kernel, all networks share the counters in the states of their optimizers, so
    the counters of a stopped run advance as well. Nothing reads them.
    """
    kept, losses = _select(stopped, unchanged, advanced)
    if fused is not None:
        kept = kept._replace(opt_state=advanced[0].opt_state)
    return kept, losses
