"""Sampling, noise and accounting of DP-SGD, by jax_privacy and dp_accounting."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from experiments.support.cli import InputError


def _libraries() -> Any:
    """jax_privacy, with its parts."""
    try:
        import jax_privacy
        from jax_privacy.accounting import accountants, analysis, calibrate
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed; pip install 'jaxbce[privacy]' brings it"
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
    """ε of Gaussian sums over Poisson samples, for adding or removing a row.

    Each row is in each sample with chance `batch_size / rows`.

    Args:
      noise: The noise's standard deviation over the norm clipped to.
      delta: δ.
      rows: Rows to train on.
      batch_size: Expected rows in a batch.
      num_steps: Steps.
      interval: Width of the bins of privacy losses; ε is an upper bound for any, closer
        and slower for smaller ones.
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
    """The least noise, to a thousandth, that spends no more than (ε, δ).

    Raises:
      InputError: If there is none that is of any use.
    """
    sampling: Any = {"rows": rows, "batch_size": batch_size, "num_steps": num_steps}
    noise = 64.0
    while epsilon_spent(noise, delta, **sampling) > epsilon:
        noise *= 2
        if noise > 2**20:
            raise InputError(f"--epsilon={epsilon}: no noise is enough")
    # Downwards, since less noise takes longer to account for; in wide bins first.
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
    """The rows of each batch, by the sampling that the accountant assumes.

    Each row is in each batch with chance `batch_size / rows`, whatever else is.
    """
    sampling = _libraries().batch_selection.CyclicPoissonSampling(
        sampling_prob=batch_size / rows, iterations=num_steps
    )
    return sampling.batch_iterator(rows, rng=np.random.default_rng(seed))


def noisy_mean(
    key: jax.Array, stddev: jax.Array, batch_size: int
) -> optax.GradientTransformation:
    """Adds noise to a sum of clipped gradients, and divides by the expected batch."""
    noisy = _libraries().noise_addition.gaussian_privatizer(stddev=stddev, prng_key=key)
    return optax.chain(noisy, optax.scale(1 / batch_size))
