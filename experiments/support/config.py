"""Configuration of a training run: two dataclasses and the flags that fill them.

A command states its own defaults once, in a dictionary that it passes to `from_flags`
and to `cli.launch`, so that its `--help` shows them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from absl import flags

from experiments.support import cli, metrics, optimizers
from experiments.support.cli import InputError

OPTIMIZER = flags.DEFINE_string(
    "optimizer",
    "adam",
    "Name of an optimizer in optax or optax.contrib; a wrong name lists them.",
)
OPTIMIZER_ARG = flags.DEFINE_multi_string(
    "optimizer_arg", [], "An argument of the optimizer, such as b1=0.95."
)
LEARNING_RATE = flags.DEFINE_float(
    "learning_rate",
    None,
    "The learning rate. If not set, the optimizer's own default, or "
    f"{optimizers.DEFAULT_LEARNING_RATE} if it has none.",
)
SCHEDULE = flags.DEFINE_enum(
    "schedule",
    "constant",
    ["constant", "cosine", "warmup-cosine", "exponential"],
    "How the learning rate changes over the run. cosine: falls to 0; warmup-cosine: "
    "rises over the first tenth, then falls to 0; exponential: falls to a hundredth.",
)
WEIGHT_DECAY = flags.DEFINE_float(
    "weight_decay",
    None,
    "The optimizer's own weight_decay if it has one, as adamw does. Otherwise this "
    "times the weights is added to their gradient. If not set, 1 / the number of "
    "training examples: the prior of scikit-learn's LogisticRegression.",
    lower_bound=0.0,
)
HIDDEN = flags.DEFINE_multi_string(
    "hidden", ["32"], "Widths of the hidden layers, comma-separated; '' for none."
)
# Drops absl's hint that the flag may be repeated, which only `sweep` allows.
flags.FLAGS["hidden"].help = flags.FLAGS["hidden"].help.partition(";\n")[0]
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Examples per batch; 0 is all of them.", lower_bound=0
)
NUM_STEPS = flags.DEFINE_integer(
    "num_steps",
    None,
    "Steps to train for.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
EPOCHS = flags.DEFINE_integer(
    "epochs",
    None,
    "Epochs to train for; 60 if neither this nor --num_steps is set.",
    lower_bound=1,
)
EVALUATE_EVERY = flags.DEFINE_integer(
    "evaluate_every",
    None,
    "Steps between evaluations. If not set, an epoch or a hundredth of the run, "
    "whichever is longer.",
    lower_bound=1,
)
PATIENCE = flags.DEFINE_integer(
    "patience",
    None,
    "Stop at the first evaluation that is at least this many steps after the best one. "
    "If not set, never stop early.",
    lower_bound=1,
)
METRIC = flags.DEFINE_enum(
    "metric",
    "loss",
    ["loss", *metrics.CRITERIA],
    "What is judged on the validation set: the loss, or the mean over outputs of a "
    "metric, which decides at a probability of 0.5.",
)
POS_WEIGHT = flags.DEFINE_string(
    "pos_weight",
    "1",
    "Weight of label 1 in the loss.",
)

OPTIMIZER_FLAGS = (
    "optimizer",
    "optimizer_arg",
    "learning_rate",
    "schedule",
    "weight_decay",
)
DEFAULT_EPOCHS = 60
DEFAULT_PRIOR = 1.0  # weight decay times the number of training examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optax optimizer and its hyperparameters.

    Attributes:
      optimizer: Name of the optimizer in optax or optax.contrib.
      optimizer_args: Arguments of the optimizer by name.
      learning_rate: None is the optimizer's own default, or 0.003 if it has none.
      schedule: "constant", "cosine", "warmup-cosine" or "exponential".
      weight_decay: The optimizer's own, or else the strength of an L2 penalty on the
        weights; None is 1 divided by the number of training examples.
    """

    optimizer: str = "adam"
    optimizer_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float | None = None
    schedule: str = "constant"
    weight_decay: float | None = None

    @classmethod
    def from_flags(cls, **defaults: Any) -> Self:
        """The flags' values; flags that are not set take `defaults`, if given.

        Raises:
          InputError: If an --optimizer_arg is malformed.
        """
        return cls(
            optimizer=OPTIMIZER.value,
            optimizer_args=optimizers.parse_args(OPTIMIZER_ARG.value),
            learning_rate=_value(LEARNING_RATE, defaults.get("learning_rate")),
            schedule=SCHEDULE.value,
            weight_decay=WEIGHT_DECAY.value,
        )

    def fill_in(self, rows: int) -> Self:
        """The configuration with the `weight_decay` for this many training examples.

        The loss is a mean over examples, so the same prior on the weights counts less
        the more examples there are.
        """
        if self.weight_decay is not None:
            return self
        return dataclasses.replace(self, weight_decay=DEFAULT_PRIOR / rows)

    def as_dict(self) -> dict[str, Any]:
        """The optimizer's entries in the configuration file."""
        return dataclasses.asdict(self)

    def build(self, num_steps: int) -> tuple[Any, float]:
        """The optax transformation, and the strength of the penalty that it needs."""
        return optimizers.build(self.optimizer, **self._options(num_steps))

    def build_family(
        self, num_steps: int, swept: tuple[str, ...] = ()
    ) -> optimizers.Family:
        """Functions from one point's hyperparameters to its optimizer and penalty."""
        return optimizers.build_family(
            self.optimizer, swept=swept, **self._options(num_steps)
        )

    def _options(self, num_steps: int) -> dict[str, Any]:
        if self.weight_decay is None:
            raise ValueError("expected an OptimizerConfig that `fill_in` returned")
        return {
            "learning_rate": self.learning_rate,
            "schedule": self.schedule,
            "num_steps": num_steps,
            "weight_decay": self.weight_decay,
            "args": tuple(self.optimizer_args.items()),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a network is trained.

    Attributes:
      seed: Seed of the split, the parameters and the order of examples.
      hidden: Widths of the hidden layers.
      batch_size: Examples per batch; 0 and None are all of them, but a command may
        replace None by its own choice.
      num_steps: Steps to train for; None is as many as `epochs` takes.
      epochs: Epochs to train for; None is 60.
      evaluate_every: Steps between evaluations; None is an epoch or a hundredth of the
        run, whichever is longer.
      patience: Steps without a better evaluation after which to stop; None is never.
      metric: "loss", or the key of `metrics.CRITERIA` by which parameters are judged on
        the validation set.
      pos_weight: Weight of label 1 in the loss, or "balanced".
      dtype: "float64", "float32" or "bfloat16".
      lower_batch_size: Whether to use all examples if there are fewer than
        `batch_size`, which is then a default that nobody asked for.
    """

    seed: int = 0
    hidden: tuple[int, ...] = (32,)
    batch_size: int | None = 32
    num_steps: int | None = None
    epochs: int | None = None
    evaluate_every: int | None = None
    patience: int | None = None
    metric: str = "loss"
    pos_weight: float | str = 1.0
    dtype: str = "float32"
    lower_batch_size: bool = dataclasses.field(default=False, compare=False)

    @classmethod
    def from_flags(cls, **defaults: Any) -> Self:
        """The flags' values; flags that are not set take `defaults`, if given.

        Args:
          **defaults: The command's own `batch_size`, `num_steps`, `dtype` or `hidden`.

        Raises:
          InputError: If --hidden cannot be read.
        """
        hidden = defaults.get("hidden")
        return cls(
            seed=cli.SEED.value,
            hidden=hidden_sizes() if hidden is None else hidden,
            batch_size=_value(BATCH_SIZE, defaults.get("batch_size")),
            num_steps=_value(NUM_STEPS, defaults.get("num_steps")),
            epochs=EPOCHS.value,
            evaluate_every=EVALUATE_EVERY.value,
            patience=PATIENCE.value,
            metric=METRIC.value,
            pos_weight=_number_or_text(POS_WEIGHT.value),
            dtype=_value(cli.DTYPE, defaults.get("dtype", "float32")),
            lower_batch_size=not BATCH_SIZE.present,
        )

    def check(self, rows: int, name: str = "the data") -> Self:
        """Checks the configuration, and fills in steps for epochs and defaults.

        Args:
          rows: Number of training examples.
          name: Name of the data in messages.

        Returns:
          The configuration with `num_steps` and `evaluate_every` set, `epochs` None,
          and a `batch_size` of None if it was 0, or lowered to the rows if it may be.

        Raises:
          InputError: If a batch needs more examples than there are, `num_steps` and
            `epochs` are both given, the run is too long, or `pos_weight` is out of
            range.
        """
        batch_size = self.batch_size or None
        if batch_size is not None and batch_size > rows:
            if not self.lower_batch_size:
                raise InputError(
                    f"--batch_size={batch_size}: {name} has {rows} rows to train on"
                )
            batch_size = rows
        weight = self.pos_weight
        if weight != "balanced" and not (
            isinstance(weight, float | int) and 0 <= weight < math.inf
        ):
            raise InputError(
                f"--pos_weight={weight}: expected a finite number >= 0, or 'balanced'"
            )
        if self.num_steps is not None and self.epochs is not None:
            raise InputError("expected --num_steps or --epochs, got both")
        epoch = -(-rows // (batch_size or rows))
        num_steps = self.num_steps or (self.epochs or DEFAULT_EPOCHS) * epoch
        if num_steps >= 2**31:
            raise InputError(
                f"expected fewer than 2^31 steps, got {num_steps}; lower --epochs or "
                "raise --batch_size"
            )
        every = self.evaluate_every or max(epoch, -(-num_steps // 100))
        return dataclasses.replace(
            self,
            batch_size=batch_size,
            num_steps=num_steps,
            epochs=None,
            evaluate_every=min(every, num_steps),
        )

    @property
    def steps(self) -> int:
        """The number of steps, which `check` has set."""
        if self.num_steps is None:
            raise ValueError("expected a TrainingConfig that `check` returned")
        return self.num_steps

    def as_dict(self) -> dict[str, Any]:
        """The entries for training in the configuration file."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in ("epochs", "lower_batch_size")  # which `check` has used
        }


def _value(flag: flags.FlagHolder, default: Any) -> Any:
    return default if flag.value is None else flag.value


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def hidden_choices() -> list[tuple[int, ...]]:
    """The widths that each --hidden gives.

    Raises:
      InputError: If one of them is not an integer >= 1.
    """
    return [_widths(text) for text in HIDDEN.value]


def hidden_sizes() -> tuple[int, ...]:
    """The widths that --hidden gives, which must occur only once.

    Raises:
      InputError: If there are several, or a width is not an integer >= 1.
    """
    if len(HIDDEN.value) > 1:
        raise InputError("--hidden: expected once, got several; one network is trained")
    return hidden_choices()[0]


def _widths(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(n) for n in text.split(",")) if text else ()
    except ValueError:
        sizes = (0,)
    if any(n < 1 for n in sizes):
        raise InputError(f"--hidden={text}: expected comma-separated integers >= 1")
    return sizes
