"""Sampling, noise and accounting for DP-SGD, by jax_privacy and dp_accounting."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.support.cli import InputError

MAX_EPSILON = 20.0  # larger ε protects little and takes minutes to account for
MIN_DELTA = 1e-15  # for smaller δ, the accountant's own rounding errors matter


class PrivacyConfig(NamedTuple):
    """Privacy budgets and clipping norm of private training.

    Attributes:
      epsilons: Privacy budgets ε, each in (0, 20].
      delta: δ, in [1e-15, 1).
      max_grad_norm: Norm to which each example's gradient is clipped, > 0.
    """

    epsilons: tuple[float, ...] = (3.0,)
    delta: float = 1e-5
    max_grad_norm: float = 1.0

    def check(self) -> None:
        """Checks the ranges.

        Raises:
          InputError: If a value is out of its range.
        """
        if not self.epsilons or not all(0 < e <= MAX_EPSILON for e in self.epsilons):
            given = ",".join(map(str, self.epsilons))
            raise InputError(
                f"--epsilon={given}: expected numbers in (0, {MAX_EPSILON:g}]"
            )
        if not MIN_DELTA <= self.delta < 1:
            raise InputError(
                f"--delta={self.delta}: expected a number in [{MIN_DELTA:g}, 1)"
            )
        if not 0 < self.max_grad_norm < np.inf:
            raise InputError(
                f"--max_grad_norm={self.max_grad_norm}: expected a finite number > 0"
            )


def _libraries() -> Any:
    """Imports jax_privacy and its submodules."""
    try:
        import jax_privacy
        from jax_privacy.accounting import accountants, analysis, calibrate
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed; run pip install 'jaxbce[privacy]'"
        ) from None
    del accountants, analysis, calibrate  # attributes of jax_privacy.accounting now
    return jax_privacy


def _accountant(interval: float) -> Any:
    accounting = _libraries().accounting
    config = accounting.accountants.PldAccountantConfig(
        value_discretization_interval=interval
    )
    return accounting.analysis.DpsgdTrainingAccountant(config)


def epsilon_spent(
    noise: float,
    delta: float,
    *,
    rows: int,
    batch_size: int,
    num_steps: int,
    interval: float = 1e-4,
) -> float:
    """ε spent by noisy sums over Poisson samples, for adding or removing one example.

    Args:
      noise: Standard deviation of the noise divided by the clipping norm.
      delta: δ.
      rows: Number of training examples.
      batch_size: Expected examples per batch; each example is in each batch with
        probability `batch_size / rows`.
      num_steps: Number of steps.
      interval: Bin width of the privacy loss distribution. ε is an upper bound for any
        width; smaller bins give a tighter bound and take longer.
    """
    params = _libraries().accounting.analysis.DpParams(
        noise_multipliers=noise,
        delta=delta,
        num_samples=rows,
        batch_size=batch_size,
    )
    return float(_accountant(interval).compute_epsilon(num_steps, params))


def noise_multiplier(
    epsilon: float, delta: float, *, rows: int, batch_size: int, num_steps: int
) -> float:
    """The smallest noise multiplier, within 0.1%, that spends at most (ε, δ).

    Raises:
      InputError: If even a multiplier of 2^20 is not enough.
    """
    sampling: Any = {"rows": rows, "batch_size": batch_size, "num_steps": num_steps}
    noise = 64.0
    while epsilon_spent(noise, delta, **sampling) > epsilon:
        noise *= 2
        if noise > 2**20:
            raise InputError(f"--epsilon={epsilon}: no noise is enough")
    # Search downwards, because less noise takes longer to account for, and with wide
    # bins first, because they are faster.
    for interval, ratio in ((1e-3, 1.5), (1e-4, 1.1)):
        less = noise / ratio
        while epsilon_spent(less, delta, **sampling, interval=interval) <= epsilon:
            noise, less = less, less / ratio
        noise = _libraries().accounting.calibrate.calibrate_noise_multiplier(
            target_epsilon=epsilon,
            accountant=_accountant(interval),
            batch_sizes=batch_size,
            num_updates=num_steps,
            num_samples=rows,
            target_delta=delta,
            initial_min_noise=less,
            initial_max_noise=noise,
            tol=less / 1000,
        )
    return noise


def poisson_batches(
    *, rows: int, batch_size: int, num_steps: int, seed: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Draws the examples of each batch by Poisson sampling, as the accountant assumes.

    Each example is in each batch independently, with probability `batch_size / rows`.
    Yields the indices of a batch, `[n]`, for each step.
    """
    sampling = _libraries().batch_selection.CyclicPoissonSampling(
        sampling_prob=batch_size / rows, iterations=num_steps
    )
    return sampling.batch_iterator(rows, rng=np.random.default_rng(seed))


def noisy_mean(
    key: jax.Array, stddev: jax.Array, batch_size: int
) -> optax.GradientTransformation:
    """Adds noise to a sum of clipped gradients, and divides by the batch size."""
    noisy = _libraries().noise_addition.gaussian_privatizer(stddev=stddev, prng_key=key)
    return optax.chain(noisy, optax.scale(1 / batch_size))
