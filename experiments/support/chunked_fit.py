"""One network trained in chunks of compiled steps: progress, checkpoints, resuming."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from tqdm import tqdm

import jaxbce
from experiments.support.cli import InputError
from experiments.support.datasets import Part
from experiments.support.resumable import Checkpoints

BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Rows in a batch; 0 is all of them. If not set, 32; private takes a quarter of the "
    "rows, 256 at most.",
    lower_bound=0,
)
NUM_STEPS = flags.DEFINE_integer(
    "num_steps",
    None,
    "Steps to train for. If not set, 200 in trainability, 300 in private, 400 in "
    "find_mislabeled, and what --epochs says elsewhere.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
EPOCHS = flags.DEFINE_integer(
    "epochs", None, "Epochs to train for; 60 if not set.", lower_bound=1
)
EVALUATE_EVERY = flags.DEFINE_integer(
    "evaluate_every",
    None,
    "Steps between evaluations; if not set, an epoch or a hundredth of the run, "
    "whichever is more.",
    lower_bound=1,
)
PATIENCE = flags.DEFINE_integer(
    "patience",
    None,
    "Stop at the first evaluation that comes this many steps, or more, after the best; "
    "never if not set.",
    lower_bound=1,
)
POS_WEIGHT = flags.DEFINE_string(
    "pos_weight",
    "1",
    "Weight of label 1 in the loss; in train also 'balanced', rows of label 0 over "
    "rows of label 1.",
)

CHUNKS = 20  # a run is checkpointed, and its progress shown, this many times or fewer


def batch_size() -> int | None:
    """--batch_size, its default of 32, or None for all rows."""
    return 32 if BATCH_SIZE.value is None else BATCH_SIZE.value or None


def duration(
    rows: int,
    batch_size: int | None,
    num_steps: int | None,
    epochs: int | None,
    evaluate_every: int | None,
) -> tuple[int, int]:
    """Steps in all, and between evaluations, from what is set of them.

    Raises:
      InputError: If both `num_steps` and `epochs` are, or the epochs are too many.
    """
    if num_steps is not None and epochs is not None:
        raise InputError("--num_steps and --epochs are two answers to one question")
    epoch = -(-rows // (batch_size or rows))
    num_steps = num_steps or (epochs or 60) * epoch
    if num_steps >= 2**31:
        raise InputError(f"--epochs={epochs}: {num_steps} steps; 2^31 are too many")
    return num_steps, min(evaluate_every or max(epoch, -(-num_steps // 100)), num_steps)


class Trained(NamedTuple):
    """A run that has ended, or stopped.

    Attributes:
      run: Its `FitResult`, without the losses.
      history: Train and validation loss in nats at each evaluation that was made,
        `[evaluations, 2]`.
      steps: The steps after which they were made, `[evaluations]`.
    """

    run: jaxbce.FitResult
    history: np.ndarray
    steps: np.ndarray


def train(
    parts: dict[str, Part],
    *,
    seed: int,
    hidden: tuple[int, ...],
    dtype: str,
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
    num_steps: int,
    batch_size: int | None,
    evaluate_every: int,
    patience: int | None,
    pos_weight: tuple[float, ...],
) -> Callable[[Checkpoints | None], Trained]:
    """Checks that a run can be made, without computing anything.

    Args:
      parts: The split.
      seed: Of the parameters and the order of rows.
      hidden: Widths of the hidden layers.
      dtype: Of the parameters.
      optimizer: What `jaxbce.fit` takes, and so all below.
      loss: The objective.
      num_steps: Steps in all.
      batch_size: Rows in a batch; None is all of them.
      evaluate_every: Steps between evaluations.
      patience: Steps without a better validation loss after which to stop, or None.
      pos_weight: Weight of the positive class, for each output.

    Returns:
      A function that makes the run: given checkpoints it goes on from the last one,
      and saves one after each chunk of steps.

    Raises:
      InputError: If the optimizer does not take its arguments, or part of the run.
    """
    x, y = (jnp.asarray(t, dtype) for t in parts["train"][1:])
    valid_x, valid_y = (jnp.asarray(t, dtype) for t in parts["validation"][1:])
    key_params, key_rows = jax.random.split(jax.random.key(seed))
    params = jaxbce.init(key_params, (x.shape[1], *hidden, y.shape[1]), dtype=dtype)
    evaluations = -(-num_steps // evaluate_every)
    chunk = -(-evaluations // CHUNKS)  # evaluations

    def fit(run: Any, steps: int) -> jaxbce.FitResult:
        return jaxbce.fit(
            key_rows,
            run,
            x,
            y,
            optimizer=optimizer,
            num_steps=steps,
            batch_size=batch_size,
            validation=(valid_x, valid_y),
            evaluate_every=evaluate_every,
            patience=patience,
            pos_weight=jnp.asarray(pos_weight, valid_y.dtype),
            loss=loss,
        )

    def bare(run: jaxbce.FitResult) -> Any:
        return run._replace(train_loss=(), validation_loss=())

    try:
        begin = bare(fit(params, 0))
        jax.eval_shape(lambda: fit(begin, 1))
    except Exception as error:  # whatever optax raises of arguments that do not fit
        raise InputError(f"--optimizer cannot be used so: {error}") from None

    def make(checkpoints: Checkpoints | None) -> Trained:
        done = np.int32(0)  # evaluations
        history = np.full((evaluations, 2), np.nan)
        run = begin
        if checkpoints is not None:
            saved = checkpoints.restore((begin, history, done))
            if saved is not None:
                run, history, done = saved
                history = np.array(history)
                print(f"Going on from step {int(run.step)} of {num_steps}.", flush=True)
        steps = np.minimum(np.arange(1, evaluations + 1) * evaluate_every, num_steps)
        with tqdm(
            total=num_steps,
            initial=int(steps[done - 1]) if done else 0,
            unit="step",
            disable=None,
        ) as bar:
            while done < evaluations and not _stopped(run, patience):
                until = min(int(done) + chunk, evaluations)
                count = steps[until - 1] - (steps[done - 1] if done else 0)
                result = fit(run, int(count))
                history[done:until, 0] = result.train_loss
                history[done:until, 1] = result.validation_loss
                run, done = bare(result), np.int32(until)
                if checkpoints is not None:
                    checkpoints.save(int(done), (run, history, done))
                bar.update(int(count))
                train_loss, valid_loss = history[done - 1]
                bar.set_postfix_str(f"train {train_loss:.4f}, valid {valid_loss:.4f}")
        made = np.flatnonzero(~np.isnan(history[:, 0]))
        return Trained(run, history[made], steps[made])

    return make


def _stopped(run: jaxbce.FitResult, patience: int | None) -> bool:
    stale = int(run.step) - int(run.best_step)
    return int(run.diverged_at) >= 0 or (patience is not None and stale >= patience)
