"""Accounting, sampling and noise of DP-SGD, against dp_accounting and statistics."""

import sys
from typing import Any

import dp_accounting as library
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.support import dp_accounting
from experiments.support.cli import InputError
from experiments.support.dp_accounting import PrivacyConfig

SAMPLING: Any = {"rows": 400, "batch_size": 40, "num_steps": 50}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def spent(accountant: Any, noise: float) -> Any:
    """The same training, said to dp_accounting itself."""
    event = library.PoissonSampledDpEvent(
        SAMPLING["batch_size"] / SAMPLING["rows"], library.GaussianDpEvent(noise)
    )
    accountant.compose(library.SelfComposedDpEvent(event, SAMPLING["num_steps"]))
    return accountant.get_epsilon(1e-5)


@pytest.mark.parametrize("noise", [0.8, 2.0])
def test_epsilon_spent_is_dp_accountings(noise):
    mine = dp_accounting.epsilon_spent(noise, 1e-5, **SAMPLING)
    direct = spent(library.pld.PLDAccountant(), noise)
    np.testing.assert_allclose(mine, direct, rtol=1e-6)
    assert mine <= spent(library.rdp.RdpAccountant(), noise)  # a looser bound


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.3, 3.0])
def test_the_noise_is_the_least_that_keeps_to_epsilon(epsilon):
    noise = dp_accounting.noise_multiplier(epsilon, 1e-5, **SAMPLING)
    assert spent(library.pld.PLDAccountant(), noise) <= epsilon
    assert spent(library.pld.PLDAccountant(), 0.99 * noise) > epsilon


def test_an_epsilon_that_no_noise_reaches_is_refused(monkeypatch):
    tried = []
    monkeypatch.setattr(
        dp_accounting,
        "epsilon_spent",
        lambda noise, *_, **__: tried.append(noise) or 9.0,
    )
    with pytest.raises(InputError, match=r"--epsilon=3\.0: no noise is enough"):
        dp_accounting.noise_multiplier(3.0, 1e-5, **SAMPLING)
    assert tried == [2.0**n for n in range(6, 21)]


def test_batches_are_poisson_samples():
    batches = list(
        dp_accounting.poisson_batches(
            rows=400, batch_size=40, num_steps=2000, seed=(0, 1)
        )
    )
    member = np.zeros((2000, 400))
    for line, rows in zip(member, batches, strict=True):
        assert len(np.unique(rows)) == len(rows)
        line[rows] = 1
    sizes = member.sum(axis=1)
    # Of 2000 binomial numbers of variance 36: five standard errors.
    assert abs(sizes.mean() - 40) < 5 * 6 / 2000**0.5
    assert abs(sizes.var() - 36) < 5 * 36 * (2 / 2000) ** 0.5
    assert abs(member.mean(axis=0) - 0.1).max() < 5 * 0.3 / 2000**0.5
    together = (member[:, ::2] * member[:, 1::2]).mean()
    assert abs(together - 0.01) < 5 * 0.1 / (2000 * 200) ** 0.5
    others = dp_accounting.poisson_batches(**SAMPLING, seed=(0, 2))
    assert not np.array_equal(next(others), batches[0])


def test_the_noise_added_is_that_accounted_for():
    mean = dp_accounting.noisy_mean(jax.random.key(0), jnp.float32(6.0), 40)
    zero = {"w": jnp.zeros((300, 300)), "b": jnp.zeros(300)}
    state = mean.init(zero)
    first: Any
    second: Any
    first, state = mean.update(zero, state)
    second, _ = mean.update(jax.tree.map(jnp.ones_like, zero), state)
    np.testing.assert_allclose(np.std(first["w"]), 6 / 40, rtol=0.02)
    np.testing.assert_allclose(np.std(second["w"]), 6 / 40, rtol=0.02)
    assert abs(np.corrcoef(np.ravel(first["w"]), np.ravel(second["w"]))[0, 1]) < 0.02
    assert abs(float(jnp.mean(second["w"] - first["w"])) - 1 / 40) < 0.005


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilons": (0.0,)}, r"--epsilon=0\.0: expected numbers in \(0, 20\]"),
        ({"epsilons": ()}, "--epsilon=: expected numbers in"),
        ({"epsilons": (1.0, 21.0)}, r"--epsilon=1\.0,21\.0: expected numbers in"),
        ({"epsilons": (float("nan"),)}, "--epsilon=nan: expected numbers"),
        ({"delta": 1e-300}, r"--delta=1e-300: expected a number in \[1e-15, 1\)"),
        ({"delta": 0.0}, r"--delta=0\.0: expected"),
        ({"delta": 1.0}, r"--delta=1\.0: expected"),
        ({"delta": float("nan")}, "--delta=nan: expected"),
        ({"max_grad_norm": 0.0}, r"--max_grad_norm=0\.0: expected a finite number > 0"),
        ({"max_grad_norm": float("inf")}, "--max_grad_norm=inf: expected"),
    ],
)
def test_privacy_out_of_range_is_refused(change, message):
    PrivacyConfig().check()
    PrivacyConfig(epsilons=(1e-3, 20.0), delta=1e-15, max_grad_norm=1e-9).check()
    with pytest.raises(InputError, match=message):
        PrivacyConfig(**change).check()


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    with pytest.raises(InputError, match=r"jax_privacy is not installed; run pip inst"):
        dp_accounting.poisson_batches(**SAMPLING, seed=(0,))
