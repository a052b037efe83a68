"""One network trained in chunks of steps, with progress, checkpoints and resuming."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxbce
from experiments.support import metrics
from experiments.support.cli import InputError
from experiments.support.config import TrainingConfig
from experiments.support.datasets import Split
from experiments.support.resumable import Checkpoints

CHUNKS = 20  # at most; each ends with a checkpoint


class Trained(NamedTuple):
    """Result of a run that has finished or stopped.

    Attributes:
      run: `FitResult` of the run, without the losses. If a metric is judged, the best
        parameters are those with the largest one, and `best_loss` is minus it.
      history: Training and validation loss in nats at each evaluation, and the metric
        if one is judged, `[evaluations, 2 or 3]`.
      steps: Number of steps taken at each evaluation, `[evaluations]`.
    """

    run: jaxbce.FitResult
    history: np.ndarray
    steps: np.ndarray


class ChunkedFit:
    """A run of `jaxbce.fit`, checked on construction and trained in chunks of steps."""

    def __init__(
        self,
        splits: dict[str, Split],
        training: TrainingConfig,
        *,
        optimizer: optax.GradientTransformation,
        penalty: Callable[..., Any] | None,
        loss: Callable[..., Any] | None,
        pos_weight: tuple[float, ...],
    ) -> None:
        """Checks the optimizer and its arguments, without training.

        Args:
          splits: The data; "train" and "validation" are used.
          training: How to train, as returned by `TrainingConfig.check`.
          optimizer: The optax transformation.
          penalty: The penalty, as `jaxbce.fit` takes it.
          loss: The objective, likewise; None is the hand-derived one.
          pos_weight: Weight of the positive class for each output, `[n_L]`.

        Raises:
          InputError: If the optimizer does not work with its arguments.
        """
        dtype = training.dtype
        x, y = (jnp.asarray(t, dtype) for t in splits["train"][1:])
        held_out = splits["validation"]
        validation = jnp.asarray(held_out.x, dtype), jnp.asarray(held_out.y, dtype)
        key_params, key_order = jax.random.split(jax.random.key(training.seed))
        sizes = (x.shape[1], *training.hidden, y.shape[1])
        params = jaxbce.init(key_params, sizes, dtype=dtype)
        weight = jnp.asarray(pos_weight, validation[1].dtype)

        def fit(
            run: Any, num_steps: int, callback: Callable[..., None] | None = None
        ) -> jaxbce.FitResult:
            return jaxbce.fit(
                key_order,
                run,
                x,
                y,
                optimizer=optimizer,
                num_steps=num_steps,
                batch_size=training.batch_size,
                validation=validation,
                evaluate_every=training.evaluate_every,
                patience=training.patience,
                pos_weight=weight,
                penalty=penalty,
                loss=loss,
                callback=callback,
            )

        def measure(params: Any) -> float:
            a = metrics.logits(params, held_out.x) - metrics.prior_shift(pos_weight)
            return metrics.criterion(training.metric, held_out.y, a)

        self._fit = fit
        self._training = training
        self._measure = None if training.metric == "loss" else measure
        try:
            self._start = _without_losses(fit(params, 0))
            jax.eval_shape(lambda: fit(self._start, 1))
        except Exception as error:  # optax raises various errors for bad arguments
            raise InputError(f"--optimizer cannot be used like this: {error}") from None

    def train(self, checkpoints: Checkpoints | None = None) -> Trained:
        """Trains until all steps are taken, or the run stops early or diverges.

        Args:
          checkpoints: If given, training resumes from the last checkpoint, and saves
            one after each chunk of steps.
        """
        run, history, steps = self._restore(checkpoints)
        done = len(steps)
        rest = _evaluations_after(int(run.step), self._training)
        steps = np.concatenate([steps, rest])
        unknown = np.full((len(rest), history.shape[1]), np.nan)
        history = np.concatenate([history, unknown])
        chunk = -(-len(steps) // CHUNKS)  # evaluations between checkpoints
        at_once = chunk if self._measure is None else 1  # evaluations
        with tqdm(
            total=self._training.steps,
            initial=int(run.step),
            unit="step",
            disable=None,
        ) as bar:

            def show(step: int, train_loss: float, validation_loss: float) -> None:
                losses = f"train {train_loss:.4f}, valid {validation_loss:.4f}"
                bar.set_postfix_str(losses, refresh=False)
                bar.update(step - bar.n)

            while done < len(steps) and not self._stopped(run):
                until = min(done + at_once, len(steps))
                count = int(steps[until - 1]) - int(run.step)
                result = self._fit(run, count, None if bar.disable else show)
                history[done:until, 0] = result.train_loss
                history[done:until, 1] = result.validation_loss
                if self._measure is not None:
                    result, history[done, 2] = self._judge(run, result)
                run, done = _without_losses(result), until
                is_last = done == len(steps) or self._stopped(run)
                if checkpoints is not None and (is_last or done % chunk == 0):
                    checkpoints.save(done, (run, history[:done], steps[:done]))
            jax.effects_barrier()  # waits for the last calls of `show`
        evaluated = np.flatnonzero(np.isfinite(history[:, 0]))
        return Trained(run, history[evaluated], steps[evaluated])

    def _judge(
        self, run: jaxbce.FitResult, result: jaxbce.FitResult
    ) -> tuple[jaxbce.FitResult, float]:
        """The result with the best parameters by the metric, and its rounded value.

        `fit` can judge only by the loss, so it stops at each evaluation for this.
        """
        value = np.nan
        best = run.best_params, run.best_loss, run.best_step
        if self._measure is not None and int(result.diverged_at) < 0:
            value = self._measure(result.params)
            loss = jnp.asarray(-value, run.best_loss.dtype)  # smaller is better
            value = -float(loss)  # as a checkpoint holds it
            if loss < run.best_loss:
                best = result.params, loss, result.step
        params, loss, step = best
        result = result._replace(best_params=params, best_loss=loss, best_step=step)
        return result, value

    def _restore(
        self, checkpoints: Checkpoints | None
    ) -> tuple[Any, np.ndarray, np.ndarray]:
        """The run so far, and the losses and steps of its evaluations."""
        done = (checkpoints.last if checkpoints else None) or 0
        columns = 2 if self._measure is None else 3
        start = self._start, np.zeros((done, columns)), np.zeros(done, np.int64)
        saved = checkpoints.restore(start) if checkpoints else None
        if saved is None:
            return start
        run, history, steps = saved
        print(
            f"Resuming from step {int(run.step)} of {self._training.steps}.", flush=True
        )
        return run, np.asarray(history), np.asarray(steps)

    def _stopped(self, run: jaxbce.FitResult) -> bool:
        patience = self._training.patience
        stale = int(run.step) - int(run.best_step)
        out_of_patience = patience is not None and stale >= patience
        return int(run.diverged_at) >= 0 or out_of_patience


def _evaluations_after(first: int, training: TrainingConfig) -> np.ndarray:
    """Number of steps taken at each evaluation after step `first`, `[evaluations]`."""
    every = training.evaluate_every or training.steps
    count = -(-(training.steps - first) // every)
    return np.minimum(first + np.arange(1, count + 1) * every, training.steps)


def _without_losses(run: jaxbce.FitResult) -> Any:
    return run._replace(train_loss=(), validation_loss=())
