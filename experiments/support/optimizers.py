"""Optimizers of optax by name, with arguments and schedules given as text."""

import ast
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxbce
from experiments.support.cli import InputError
from jaxbce.network import Layer, Params

DEFAULT_LEARNING_RATE = 0.003  # for optimizers without a default of their own


def available() -> dict[str, Callable[..., Any]]:
    """The optimizers of optax that can be used here, by name.

    This excludes optimizers that need more than the gradient and value of a batch
    (per-example gradients, curvature), and those whose parameters must be averaged
    before use.
    """
    modules = (optax, "optax._src.alias"), (optax.contrib, "optax.contrib._")
    return {
        name: function
        for module, prefix in modules
        for name, function in sorted(vars(module).items())
        if inspect.isfunction(function)
        and function.__module__.startswith(prefix)
        and any("learning_rate" in p for p in inspect.signature(function).parameters)
        and not name.startswith(("dpsgd", "sophia", "schedule_free", "scale_by"))
    }


def parse_args(texts: list[str]) -> dict[str, Any]:
    """Parses texts `name=value` into a dictionary of numbers, booleans, text or None.

    Raises:
      InputError: If a text is malformed or a name is repeated.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not equals or not name.isidentifier() or name in found:
                raise ValueError
            read = ast.literal_eval(value)
            if not isinstance(read, (bool, int, float, str, type(None))):
                raise ValueError
            found[name] = read
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            if name in found:
                raise InputError(f"--optimizer_arg={text}: is given twice") from None
            raise InputError(
                f"--optimizer_arg={text}: expected NAME=VALUE, with a number, True, "
                "False or None"
            ) from None
    return found


@functools.cache  # equal arguments return the same object, so that fit compiles once
def build(
    name: str,
    *,
    learning_rate: float | None = None,
    schedule: str = "constant",
    num_steps: int = 1,
    weight_decay: float = 0.0,
    args: tuple[tuple[str, Any], ...] = (),
) -> tuple[optax.GradientTransformation, float]:
    """Builds an optimizer, and the weight of the penalty that its objective needs.

    Args:
      name: Name of the optimizer in optax or optax.contrib.
      learning_rate: The (peak) learning rate; None is the optimizer's default.
      schedule: A value of --schedule.
      num_steps: Length of the schedule in steps.
      weight_decay: The optimizer's own weight decay if it has one; otherwise it is
        returned as the penalty.
      args: The optimizer's other arguments.

    Returns:
      The optax transformation and the penalty, which is 0 if the optimizer decays
      weights itself.

    Raises:
      InputError: If the optimizer is unknown or does not take an argument.
    """
    if name not in available():
        raise InputError(
            f"--optimizer={name}: expected one of {', '.join(available())}"
        )
    make = available()[name]
    accepted = inspect.signature(make).parameters
    given = dict(args)
    for argument in given:
        if argument not in accepted:
            raise InputError(
                f"--optimizer_arg={argument}: {name} takes {', '.join(accepted)}"
            )
        if argument in ("learning_rate", "weight_decay"):
            raise InputError(f"--optimizer_arg={argument}: use --{argument} instead")
    for flag, number in (
        ("learning_rate", learning_rate),
        ("weight_decay", weight_decay),
    ):
        if number is not None and not 0 <= number < float("inf"):
            raise InputError(f"--{flag}={number}: expected a finite number >= 0")
    rate = learning_rate
    if "learning_rate" not in accepted:
        if rate is not None or schedule != "constant":
            raise InputError(f"--optimizer={name}: takes no learning rate or schedule")
    else:
        default = accepted["learning_rate"].default
        if rate is None and (default is inspect.Parameter.empty):
            rate = DEFAULT_LEARNING_RATE
        if schedule != "constant":
            rate = default if rate is None else rate
            if not isinstance(rate, float):
                raise InputError(f"--schedule={schedule}: needs --learning_rate")
            given["learning_rate"] = _schedule(schedule, rate, num_steps)
        elif rate is not None:
            given["learning_rate"] = rate
    penalty = weight_decay
    if "weight_decay" in accepted:
        given["weight_decay"], penalty = weight_decay, 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # about a missing argument
            optimizer = make(**given)
    except (TypeError, ValueError, UserWarning) as error:
        raise InputError(f"--optimizer={name}: {error}") from None
    return optimizer, penalty


class Family(NamedTuple):
    """The optimizers of the points of a sweep.

    Attributes:
      make_optimizer: From the hyperparameters of a point to its optax transformation.
      make_penalty: From them to the penalty of its loss, if the optimizer does not
        decay weights itself and one is asked for; otherwise None.
    """

    make_optimizer: Callable[[dict[str, Any]], optax.GradientTransformation]
    make_penalty: Callable[[dict[str, Any]], Callable[[Params], jax.Array]] | None


@functools.cache  # as for `build`
def build_family(
    name: str,
    *,
    swept: tuple[str, ...],
    learning_rate: float | None = None,
    schedule: str = "constant",
    num_steps: int = 1,
    weight_decay: float = 0.0,
    args: tuple[tuple[str, Any], ...] = (),
) -> "Family":
    """Builds functions of a point of a sweep, for `jaxbce.sweep`.

    Args:
      name: See `build`, also for the other arguments, which apply if they are not
        swept.
      swept: Names of the arguments that the points give, which may include
        learning_rate and weight_decay.
      learning_rate: See `build`.
      schedule: See `build`.
      num_steps: See `build`.
      weight_decay: See `build`.
      args: See `build`.

    Raises:
      InputError: As in `build`, or if the optimizer does not take what is swept.
    """
    rest = tuple((k, v) for k, v in args if k not in swept)
    build(
        name,
        learning_rate=learning_rate,
        schedule="constant" if "learning_rate" in swept else schedule,
        weight_decay=weight_decay,
        args=rest,
    )
    make = available()[name]
    accepted = inspect.signature(make).parameters
    for argument in swept:
        if argument not in (*accepted, "weight_decay"):
            raise InputError(
                f"--axis={argument}: {name} takes {', '.join(accepted)}; every sweep "
                "takes init_scale, pos_weight and label_smoothing"
            )
    if learning_rate is None and "learning_rate" in accepted:
        default = accepted["learning_rate"].default
        learning_rate = default if isinstance(default, float) else None
        if default is inspect.Parameter.empty:
            learning_rate = DEFAULT_LEARNING_RATE

    decays = "weight_decay" in accepted  # by itself

    def make_optimizer(values: dict[str, Any]) -> optax.GradientTransformation:
        given = dict(rest) | {k: values[k] for k in swept if k in accepted}
        rate = values.get("learning_rate", learning_rate)
        if rate is not None:
            given["learning_rate"] = rate
        if schedule != "constant":
            unit = _schedule(schedule, 1.0, num_steps)
            given["learning_rate"] = lambda t: jnp.multiply(unit(t), jnp.asarray(rate))
        if decays:
            given["weight_decay"] = values.get("weight_decay", weight_decay)
        return make(**given)

    def make_penalty(values: dict[str, Any]) -> Callable[[Params], jax.Array]:
        return l2_penalty(values.get("weight_decay", weight_decay))

    is_penalized = not decays and ("weight_decay" in swept or weight_decay > 0)
    family = Family(make_optimizer, make_penalty if is_penalized else None)
    params = (Layer(jnp.zeros((2, 1)), jnp.zeros(1)),)
    try:
        jax.eval_shape(
            lambda values: jaxbce.fit(
                jax.random.key(0),
                params,
                jnp.zeros((2, 2)),
                jnp.zeros((2, 1)),
                optimizer=make_optimizer(values),
                num_steps=1,
            ),
            dict.fromkeys(swept, jnp.zeros(())),
        )
    except Exception as error:  # optax raises various errors for static arguments
        what = ", ".join(swept) or "nothing"
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"--optimizer={name}: cannot be swept over {what} ({reason})"
        ) from None
    return family


def _schedule(name: str, rate: float, num_steps: int) -> optax.Schedule:
    if name == "cosine":
        return optax.cosine_decay_schedule(rate, num_steps)
    if name == "exponential":
        return optax.exponential_decay(rate, num_steps, decay_rate=0.01)
    warmup = max(1, num_steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(num_steps, 2))


def l2_penalty(strength: Any) -> Callable[[Params], jax.Array]:
    """Half of `strength` times the sum of squared weights (no biases), of params."""

    def penalty(params: Params) -> jax.Array:
        dtype = jnp.promote_types(params[0].w.dtype, jnp.float32)
        squares = [jnp.sum(jnp.square(layer.w.astype(dtype))) for layer in params]
        return 0.5 * jnp.asarray(strength, dtype) * jnp.sum(jnp.stack(squares))

    return penalty
