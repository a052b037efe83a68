"""`experiments.private`: what it claims is what the accountant says of what it does."""

import json
from typing import Any

import dp_accounting as library
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from experiments import private
from experiments.support import datasets, dp_accounting
from experiments.support.cli import InputError
from tests.helpers import start

SAMPLING: Any = {"rows": 400, "batch_size": 40, "num_steps": 50}
TOY: Any = {"num_steps": 10, "seeds": 2, "hidden": (8,), "batch_size": 100}


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


@pytest.mark.parametrize("epsilon", [0.3, 3.0])
def test_the_noise_is_the_least_that_keeps_to_epsilon(epsilon):
    noise = dp_accounting.noise_multiplier(epsilon, 1e-5, **SAMPLING)
    assert spent(library.pld.PLDAccountant(), noise) <= epsilon
    assert spent(library.pld.PLDAccountant(), 0.99 * noise) > epsilon


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


def test_a_run_says_what_it_did():
    table = datasets.load(dataset="digits")
    result = private.run(table=table, epsilons=(0.5, 2.0), bounds=(0.0, 16.0), **TOY)
    again = private.run(table=table, epsilons=(0.5, 2.0), bounds=(0.0, 16.0), **TOY)
    assert result["rows"] == again["rows"]
    low, high, plain = result["rows"]
    assert low["noise"] > high["noise"] > plain["noise"] == 0
    assert low["ε spent"] <= 0.5 < 2 * 0.99 < high["ε spent"] <= 2
    assert plain["ε"] == np.inf
    assert result["clipped"].shape == (3, 2, 10)
    assert result["clipped"][:2].max() > 0.5
    assert result["clipped"][2].max() == 0  # nothing is clipped at an infinite norm
    assert plain["test accuracy"] > 0.7
    assert result["configuration"]["rows"] == 1077


def test_nothing_of_a_row_goes_round_the_noise(monkeypatch):
    """With the noisy mean replaced by zeros nothing is left to learn from."""

    def nothing(*_):
        return optax.set_to_zero()

    monkeypatch.setattr(dp_accounting, "noisy_mean", nothing)
    table = datasets.load(dataset="moons")
    toy = {**TOY, "optimizer": "sgd", "weight_decay": 0.0}
    first = private.run(table=table, epsilons=(1.0,), **{**toy, "num_steps": 1})
    later = private.run(table=table, epsilons=(1.0,), **toy)
    for part in ("validation accuracy", "test accuracy"):
        assert first["rows"][0][part] == later["rows"][0][part]
    assert first["clipped"][0, 0, 0] == later["clipped"][0, 0, 0] > 0


def test_privacy_3_on_digits_beats_chance_by_far():
    table = datasets.load(dataset="digits")
    result = private.run(table=table, epsilons=(3.0,), bounds=(0.0, 16.0), seeds=3)
    some, plain = result["rows"]
    assert 0.88 < some["test accuracy"] < plain["test accuracy"]
    assert plain["test accuracy"] > 0.96
    assert some["clipped at last"] < 0.5 < some["clipped at first"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilons": (0.0,)}, "--epsilon=0.0"),
        ({"epsilons": ()}, "--epsilon="),
        ({"epsilons": (1.0, 21.0)}, "not in"),
        ({"dtype": "bfloat16"}, "--dtype=bfloat16"),
        (
            {"optimizer": "polyak_sgd", "learning_rate": None},
            "--optimizer=polyak_sgd: needs more",
        ),
        ({"delta": 1e-300}, "--delta=1e-300"),
        ({"epsilons": (float("nan"),)}, "--epsilon=nan"),
        ({"delta": 0.0}, "--delta=0.0"),
        ({"delta": 1.0}, "--delta=1.0"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm=0.0"),
        ({"max_grad_norm": float("inf")}, "--max_grad_norm=inf"),
        ({"batch_size": 601}, "has 600 rows to train on"),
        ({"bounds": (1.0, 0.0)}, "--bounds=1,0"),
        ({"optimizer": "adamm"}, "--optimizer=adamm"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        private.run(table=datasets.load(dataset="moons"), **{**TOY, **change})


def test_a_batch_may_be_empty():
    sampling = {"rows": 600, "batch_size": 1, "num_steps": 5}
    batches = list(dp_accounting.poisson_batches(**sampling, seed=(0, 0)))
    assert min(map(len, batches)) == 0
    toy = {**TOY, "num_steps": 5, "seeds": 1, "batch_size": 1}
    result = private.run(table=datasets.load(dataset="moons"), epsilons=(3.0,), **toy)
    empty = [len(rows) == 0 for rows in batches]
    assert np.all(result["clipped"][:, 0, empty] == 0)
    assert np.isfinite(result["clipped"]).all()
    assert result["rows"][0]["test accuracy"] > 0


def test_the_noise_is_in_units_of_the_norm(monkeypatch):
    given = {}

    def train(parts, optimizer, *, levels, **_):
        given["levels"] = levels
        return {"test": np.ones((2, 2))}, np.zeros((2, 2, 10))

    monkeypatch.setattr(private, "_train", train)
    toy = {**TOY, "max_grad_norm": 0.25}
    result = private.run(table=datasets.load(dataset="moons"), epsilons=(3.0,), **toy)
    noise = result["rows"][0]["noise"]
    assert given["levels"] == [(0.25 * noise, 0.25), (0.0, np.inf)]


def test_bounds_leave_the_training_rows_out():
    table = datasets.load(dataset="moons")
    table.features.iloc[0, 0] = 1e6  # clipped, and nothing else is changed by it
    parts, _ = datasets.split(table, 0)
    scaled = private._scaled(table, parts, (-2.0, 2.0))
    everything = np.concatenate([part.x for part in scaled.values()])
    rows = np.concatenate([part.rows for part in scaled.values()])
    expected = table.features.to_numpy().clip(-2, 2) / 2
    np.testing.assert_allclose(everything[np.argsort(rows)], expected, atol=1e-15)


def test_the_command_writes_its_files(tmp_path):
    process = start(
        "private",
        *("--dataset=moons", "--epsilon=1,3", "--num_steps=6", "--seeds=2"),
        *("--hidden=8", "--batch_size=64", f"--output_dir={tmp_path}"),
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "which ε does not cover" in out
    assert "not private" in out
    document = json.loads((tmp_path / "private.json").read_text(encoding="utf-8"))
    assert [row["ε"] for row in document["rows"]] == [1, 3, np.inf]
    assert document["configuration"]["batch_size"] == 64
    assert len(pd.read_csv(tmp_path / "private.csv")) == 3
    shares = pd.read_csv(tmp_path / "clipped.csv")
    assert list(shares) == ["step", "ε = 1", "ε = 3"]
    assert len(shares) == 6
    assert (tmp_path / "private.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--epsilon=1,x", "--epsilon=1,x: not numbers"),
        ("--bounds=1", "--bounds=1: not LOW,HIGH"),
        ("--delta=2", "--delta"),
    ],
)
def test_a_bad_flag_is_one_line(flag, message):
    process = start("private", flag)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
