"""The optimizers of optax by name, with arguments and schedules from text."""

import ast
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags

import jaxbce
from experiments.support.cli import InputError
from jaxbce.network import Layer, Params

OPTIMIZER = flags.DEFINE_string(
    "optimizer",
    "adam",
    "An optimizer of optax or optax.contrib by its name; a wrong name lists them. "
    "sweep takes several, comma-separated.",
)
OPTIMIZER_ARG = flags.DEFINE_multi_string(
    "optimizer_arg", [], "An argument of the optimizer, as b1=0.95"
)
LEARNING_RATE = flags.DEFINE_float(
    "learning_rate",
    None,
    "The learning rate. If not set, the optimizer's own default, or if it has none "
    "0.003; in private 0.01 for adam.",
)
SCHEDULE = flags.DEFINE_enum(
    "schedule",
    "constant",
    ["constant", "cosine", "warmup-cosine", "exponential"],
    "How the learning rate changes over all steps. cosine: falls to 0; warmup-cosine: "
    "rises over the first tenth, then falls to 0; exponential: falls to a hundredth.",
)
WEIGHT_DECAY = flags.DEFINE_float(
    "weight_decay",
    0.001,
    "The optimizer's own weight_decay if it has one, as adamw's; else half of this "
    "times the weights' squares is added to the objective.",
    lower_bound=0.0,
)

LEARNING_RATE_WITHOUT_DEFAULT = 0.003


def known() -> dict[str, Callable[..., Any]]:
    """The optimizers of optax by name.

    Left out are those that need more than a batch's gradient and value (per-example
    gradients, curvature), and those whose parameters must be averaged before use.
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


def arguments(texts: list[str]) -> dict[str, Any]:
    """`name=value` texts as a dict; values are Python's numbers, booleans and None.

    Raises:
      InputError: If one is not of that form, or a name comes twice.
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
            why = "given twice" if name in found else "not NAME=NUMBER, True or None"
            raise InputError(f"--optimizer_arg={text}: {why}") from None
    return found


@functools.cache  # one object for equal arguments, so that fit compiles once for them
def build(
    name: str,
    *,
    learning_rate: float | None = None,
    schedule: str = "constant",
    num_steps: int = 1,
    weight_decay: float = 0.0,
    args: tuple[tuple[str, Any], ...] = (),
) -> tuple[optax.GradientTransformation, float]:
    """An optimizer, and the penalty its objective needs in place of a weight decay.

    Args:
      name: Its name in optax or optax.contrib.
      learning_rate: The (peak) learning rate; None is the optimizer's default.
      schedule: A name that --schedule accepts.
      num_steps: Steps of the run, for the schedule.
      weight_decay: Its weight_decay, or the penalty's factor.
      args: Its other arguments.

    Raises:
      InputError: If there is no such optimizer, or it does not take an argument.
    """
    if name not in known():
        raise InputError(f"--optimizer={name}: not one of {', '.join(known())}")
    make = known()[name]
    accepted = inspect.signature(make).parameters
    given = dict(args)
    for argument in given:
        if argument not in accepted:
            raise InputError(
                f"--optimizer_arg={argument}: {name} takes {', '.join(accepted)}"
            )
        if argument in ("learning_rate", "weight_decay"):
            raise InputError(f"--optimizer_arg={argument}: has a flag, --{argument}")
    for flag, number in (
        ("learning_rate", learning_rate),
        ("weight_decay", weight_decay),
    ):
        if number is not None and not 0 <= number < float("inf"):
            raise InputError(f"--{flag}={number}: not a finite number >= 0")
    rate = learning_rate
    if "learning_rate" not in accepted:
        if rate is not None or schedule != "constant":
            raise InputError(f"--optimizer={name}: takes no learning rate or schedule")
    else:
        default = accepted["learning_rate"].default
        if rate is None and (default is inspect.Parameter.empty):
            rate = LEARNING_RATE_WITHOUT_DEFAULT
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
            warnings.simplefilter("error", UserWarning)  # of an argument that it needs
            optimizer = make(**given)
    except (TypeError, ValueError, UserWarning) as error:
        raise InputError(f"--optimizer={name}: {error}") from None
    return optimizer, penalty


@functools.cache  # one object, as above
def family(
    name: str,
    *,
    swept: tuple[str, ...],
    learning_rate: float | None = None,
    schedule: str = "constant",
    num_steps: int = 1,
    weight_decay: float = 0.0,
    args: tuple[tuple[str, Any], ...] = (),
) -> Callable[[dict[str, Any]], optax.GradientTransformation]:
    """The optimizers that differ in the values of `swept`, for `jaxbce.sweep`.

    Args:
      name: As `build`, and so the others: what is not swept.
      swept: Names of its arguments, learning_rate and weight_decay among them. Where
        it has no weight_decay, its objective's penalty is added to the gradient.
      learning_rate: See `build`.
      schedule: See `build`.
      num_steps: See `build`.
      weight_decay: See `build`.
      args: See `build`.

    Raises:
      InputError: As `build`, or if it does not take what is swept.
    """
    rest = tuple((k, v) for k, v in args if k not in swept)
    options: dict[str, Any] = {"schedule": schedule, "num_steps": num_steps}
    build(name, learning_rate=learning_rate, weight_decay=weight_decay, args=rest)
    make = known()[name]
    accepted = inspect.signature(make).parameters
    for argument in swept:
        if argument not in (*accepted, "weight_decay"):
            raise InputError(
                f"--axis={argument}: {name} takes {', '.join(accepted)}; any sweep "
                "init_scale, pos_weight and label_smoothing"
            )
    if learning_rate is None and "learning_rate" in accepted:
        default = accepted["learning_rate"].default
        learning_rate = default if isinstance(default, float) else None
        if default is inspect.Parameter.empty:
            learning_rate = LEARNING_RATE_WITHOUT_DEFAULT

    def of_point(values: dict[str, Any]) -> optax.GradientTransformation:
        given = dict(rest) | {k: values[k] for k in swept if k in accepted}
        rate = values.get("learning_rate", learning_rate)
        decay = values.get("weight_decay", weight_decay)
        if rate is not None:
            given["learning_rate"] = rate
        if options["schedule"] != "constant":
            unit = _schedule(options["schedule"], 1.0, options["num_steps"])
            given["learning_rate"] = lambda t: jnp.multiply(unit(t), jnp.asarray(rate))
        if "weight_decay" in accepted:
            return make(**given | {"weight_decay": decay})
        if "weight_decay" not in swept and decay == 0:
            return make(**given)
        return optax.chain(optax.add_decayed_weights(decay, _weights), make(**given))

    params = (Layer(jnp.zeros((2, 1)), jnp.zeros(1)),)
    try:
        jax.eval_shape(
            lambda values: jaxbce.fit(
                jax.random.key(0),
                params,
                jnp.zeros((2, 2)),
                jnp.zeros((2, 1)),
                optimizer=of_point(values),
                num_steps=1,
            ),
            dict.fromkeys(swept, jnp.zeros(())),
        )
    except Exception as error:  # whatever optax raises of an argument it must know
        what = ", ".join(swept) or "with nothing"
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"--optimizer={name}: cannot be swept over {what} ({reason})"
        ) from None
    return of_point


def _weights(params: Any) -> Any:
    return tuple(layer._replace(w=True, b=False) for layer in params)


def _schedule(name: str, rate: float, num_steps: int) -> optax.Schedule:
    if name == "cosine":
        return optax.cosine_decay_schedule(rate, num_steps)
    if name == "exponential":
        return optax.exponential_decay(rate, num_steps, decay_rate=0.01)
    warmup = max(1, num_steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(num_steps, 2))


@functools.cache
def objective(loss: Callable[..., Any], penalty: float) -> Callable[..., Any]:
    """A loss, and half of `penalty` times the squares of the weights (not biases)."""
    if penalty == 0:
        return loss

    def penalised(params: Params, *data: Any, **options: Any) -> Any:
        value = loss(params, *data, **options)
        squares = [jnp.sum(jnp.square(layer.w.astype(value.dtype))) for layer in params]
        return value + 0.5 * penalty * jnp.sum(jnp.stack(squares))

    return penalised
