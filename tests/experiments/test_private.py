"""`experiments.private`: what it claims is what the accountant says of what it does."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import jaxbce
from experiments import private
from experiments.support import datasets, dp_accounting, metrics
from experiments.support.cli import InputError
from experiments.support.config import OptimizerConfig, TrainingConfig
from experiments.support.dp_accounting import PrivacyConfig
from experiments.support.schema import Column
from tests.experiments.files import odd_keys
from tests.helpers import run_command, start

pytestmark = pytest.mark.usefixtures("standard_promotion")

MOONS = datasets.load(dataset="moons")
TOY: Any = {"num_steps": 10, "hidden": (8,), "batch_size": 100}
FLAGS = (
    *("--dataset=moons", "--epsilon=1,0.5,1", "--max_grad_norm=0.5", "--bounds=-3,3"),
    *("--num_steps=10", "--hidden=8", "--batch_size=100", "--seeds=2"),
    "--learning_rate=0.1",
)


def run(
    *,
    privacy: Any = None,
    optimizer: Any = None,
    table: datasets.Table = MOONS,
    seeds: int = 2,
    bounds: Any = None,
    **training: Any,
) -> dict[str, Any]:
    options: Any = {"learning_rate": 0.1} | (optimizer or {})
    return private.run(
        table=table,
        privacy=PrivacyConfig(**(privacy or {})),
        optimizer=OptimizerConfig(**options),
        training=TrainingConfig(**(TOY | training)),
        seeds=seeds,
        bounds=bounds,
    )


@pytest.fixture(scope="module", autouse=True)
def _few_chunks() -> Iterator[None]:
    """Two chunks of steps, whose batches have one width, so that one compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "CHUNKS", 2)
        yield


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A toy run for two ε, by the real accountant."""
    privacy = {"epsilons": (0.5, 1.0), "max_grad_norm": 0.5}
    with jax.numpy_dtype_promotion("standard"):
        return run(privacy=privacy, bounds=(-3.0, 3.0))


@pytest.fixture
def known_noise(monkeypatch):
    """A noise multiplier of 2 in place of the accountant's, which takes seconds."""
    monkeypatch.setattr(dp_accounting, "noise_multiplier", lambda *_, **__: 2.0)
    monkeypatch.setattr(dp_accounting, "epsilon_spent", lambda *_, **__: 1.0)


def test_a_run_says_what_it_did(result):
    low, high, plain = result["rows"]
    assert low["noise_multiplier"] > high["noise_multiplier"]
    assert plain["noise_multiplier"] == 0
    assert low["epsilon_spent"] <= 0.5 < 0.99 < high["epsilon_spent"] <= 1
    assert plain["epsilon"] == plain["epsilon_spent"] == np.inf
    assert result["clipped"].shape == (3, 2, 10)
    assert result["clipped"][:2].max() > 0.5
    assert result["clipped"][2].max() == 0  # nothing is clipped at an infinite norm
    assert plain["test_accuracy"] > 0.7
    assert result["configuration"]["rows"] == 600
    assert result["configuration"]["bounds"] == (-3.0, 3.0)
    for row, clipped in zip(result["rows"], result["clipped"], strict=True):
        assert row["clipped_first_tenth"] == clipped[:, 0].mean()
        assert row["clipped_last_tenth"] == clipped[:, -1].mean()
    sampling: Any = {"rows": 600, "batch_size": 100, "num_steps": 10}
    noise = high["noise_multiplier"]
    assert high["epsilon_spent"] == dp_accounting.epsilon_spent(noise, 1e-5, **sampling)


def test_a_mean_has_its_standard_error():
    scores = {"test": {"accuracy": np.array([[0.5, 0.7, 0.9]])}}
    (row,) = private.summarize([1.0], [0.9], [2.0], scores, np.zeros((1, 3, 4)))
    assert np.isclose(row["test_accuracy"], 0.7)
    assert np.isclose(row["test_accuracy_se"], 0.2 / 3**0.5)
    single = {"test": {"accuracy": np.array([[0.5]])}}
    (row,) = private.summarize([1.0], [0.9], [2.0], single, np.zeros((1, 1, 4)))
    assert row["test_accuracy_se"] is None


def test_metrics_of_rare_labels_are_those_of_the_logits():
    params = jaxbce.init(jax.random.key(0), (2, 3, 1))
    split = datasets.split(datasets.load(dataset="moons"), 0)[0]["test"]
    y = np.zeros_like(split.y)
    y[:6] = 1
    networks = jax.tree.map(lambda t: jnp.stack([jnp.stack([t, 1e30 * t])]), params)
    found = private.evaluate(networks, split._replace(y=y))
    expected = metrics.score(y[:, 0], metrics.logits(params, split.x)[:, 0])
    for name in private.METRICS:
        assert found[name].shape == (2, 1)
        assert found[name][0, 0] == expected[name]
    broken = jax.tree.map(lambda t: jnp.full_like(t, jnp.inf)[None, None], params)
    assert np.isnan(private.evaluate(broken, split)["roc_auc"]).all()


@pytest.mark.usefixtures("known_noise")
def test_nothing_of_a_row_goes_round_the_noise(monkeypatch):
    """With the noisy mean replaced by zeros nothing is left to learn from."""

    def nothing(*_):
        return optax.set_to_zero()

    monkeypatch.setattr(dp_accounting, "noisy_mean", nothing)
    options: Any = {"privacy": {"epsilons": (1.0,), "max_grad_norm": 0.1}}
    options["optimizer"] = {"optimizer": "sgd", "weight_decay": 0.0}
    first, later = (run(num_steps=steps, **options) for steps in (1, 10))
    for name in ("validation_accuracy", "test_accuracy"):
        assert first["rows"][0][name] == later["rows"][0][name]
    assert first["clipped"][0, 0, 0] == later["clipped"][0, 0, 0] > 0


@pytest.mark.slow
def test_privacy_3_on_digits_beats_chance_by_far():
    result = run(
        table=datasets.load(dataset="digits"),
        optimizer={"learning_rate": private.LEARNING_RATE},
        bounds=(0.0, 16.0),
        seeds=3,
        hidden=(32,),
        num_steps=300,
        batch_size=None,
    )
    some, plain = result["rows"]
    assert 0.88 < some["test_accuracy"] < plain["test_accuracy"]
    assert plain["test_accuracy"] > 0.96
    assert some["clipped_last_tenth"] < 0.5 < some["clipped_first_tenth"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"privacy": {"epsilons": (0.0,)}}, r"--epsilon=0\.0"),
        ({"privacy": {"delta": 1e-300}}, "--delta=1e-300"),
        ({"privacy": {"max_grad_norm": 0.0}}, r"--max_grad_norm=0\.0"),
        ({"dtype": "bfloat16"}, "--dtype=bfloat16: its rounding errors exceed"),
        (
            {"optimizer": {"optimizer": "polyak_sgd", "learning_rate": None}},
            "--optimizer=polyak_sgd: needs more than the private gradient",
        ),
        ({"batch_size": 601}, "--batch_size=601: moons has 600 rows to train on"),
        (
            {"bounds": (1.0, 0.0)},
            "expected finite numbers LOW < HIGH for 'x1', got 1:0",
        ),
        ({"bounds": (0.0, np.inf)}, "--bounds: expected finite numbers .* got 0:inf"),
        ({"optimizer": {"optimizer": "adamm"}}, "--optimizer=adamm: expected one of"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        run(**change)


def test_each_column_of_numbers_has_bounds_and_categories_are_one_hot():
    colors = np.where(np.arange(1000) % 3 == 0, "red", "blue")
    table = MOONS._replace(features=MOONS.features.assign(color=colors))
    splits, preprocessor = datasets.split(table, 0)
    bounds = {"x2": (-1.0, 3.0), "x1": (-2.0, 2.0)}
    scaled = private.scale_to_bounds(table, splits, preprocessor, bounds)["test"]
    x = table.features[["x1", "x2"]].to_numpy()[scaled.rows]
    expected = np.clip((x - [0, 1]) / 2, -1, 1)
    np.testing.assert_allclose(scaled.x[:, :2], expected, atol=1e-15)
    red = colors[scaled.rows] == "red"
    np.testing.assert_array_equal(scaled.x[:, 2:], np.stack([~red, red], axis=1))
    for wrong, message in (
        ({"x1": (0.0, 1.0)}, "moons has no bounds for column 'x2'"),
        (bounds | {"color": (0.0, 1.0)}, "moons has no column of numbers 'color'"),
    ):
        with pytest.raises(InputError, match=message):
            private.scale_to_bounds(table, splits, preprocessor, wrong)


def test_one_pair_of_bounds_is_refused_for_dates():
    schema = MOONS.schema._replace(columns=(Column("when", "date"),))
    table = MOONS._replace(
        features=MOONS.features.set_axis(["when year", "when days"], axis=1),
        schema=schema,
    )
    splits, preprocessor = datasets.split(table, 0)
    with pytest.raises(InputError, match=r"'when' is a date; columns are 'when y"):
        private.scale_to_bounds(table, splits, preprocessor, (0.0, 100.0))


@pytest.mark.usefixtures("known_noise")
def test_a_batch_may_be_empty(monkeypatch):
    monkeypatch.setattr(private, "CHUNKS", 1)
    sampling = {"rows": 600, "batch_size": 1, "num_steps": 5}
    batches = list(dp_accounting.poisson_batches(**sampling, seed=(0, 0)))
    assert min(map(len, batches)) == 0
    found = run(num_steps=5, seeds=1, batch_size=1)
    empty = [len(rows) == 0 for rows in batches]
    assert np.all(found["clipped"][:, 0, empty] == 0)
    assert np.isfinite(found["clipped"]).all()
    assert found["rows"][0]["test_accuracy"] > 0


def test_batches_are_padded_and_have_few_widths():
    sampling = {"rows": 600, "batch_size": 100, "num_steps": 50}
    chunks = list(private.padded_batches(sampling, seed=4, seeds=2))
    assert sum(chunk.shape[1] for chunk in chunks) == 50
    assert len({chunk.shape[2] for chunk in chunks}) <= 3
    for s in range(2):
        drawn = dp_accounting.poisson_batches(**sampling, seed=(4, s))
        lines = [line for chunk in chunks for line in chunk[s]]
        for rows, line in zip(drawn, lines, strict=True):
            np.testing.assert_array_equal(line[line >= 0], rows)


@pytest.mark.usefixtures("known_noise")
def test_the_noise_is_in_units_of_the_norm(monkeypatch):
    given = {}

    def train(data, optimizer, training, *, levels, **_):
        given["levels"] = levels
        return (), np.zeros((2, 2, 10))

    monkeypatch.setattr(private, "train", train)
    monkeypatch.setattr(private, "evaluate", lambda *_: {"accuracy": np.ones((2, 2))})
    found = run(privacy={"max_grad_norm": 0.25})
    assert found["rows"][0]["noise_multiplier"] == 2.0
    assert given["levels"] == [(0.25 * 2.0, 0.25), (0.0, np.inf)]


def test_bounds_leave_the_training_rows_out():
    table = datasets.load(dataset="moons")
    table.features.iloc[0, 0] = 1e6  # clipped, and nothing else is changed by it
    splits, preprocessor = datasets.split(table, 0)
    scaled = private.scale_to_bounds(table, splits, preprocessor, (-2.0, 2.0))
    everything = np.concatenate([split.x for split in scaled.values()])
    rows = np.concatenate([split.rows for split in scaled.values()])
    expected = table.features.to_numpy().clip(-2, 2) / 2
    np.testing.assert_allclose(everything[np.argsort(rows)], expected, atol=1e-15)


# ------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def printed(tmp_path_factory, result):
    """The folder of the toy run by the command, and its output."""
    spent = {row["noise_multiplier"]: row["epsilon_spent"] for row in result["rows"]}
    noise = {row["epsilon"]: row["noise_multiplier"] for row in result["rows"]}
    folder = tmp_path_factory.mktemp("private")
    with pytest.MonkeyPatch.context() as patch:  # the accountant's numbers are known
        patch.setattr(dp_accounting, "noise_multiplier", lambda e, *_, **__: noise[e])
        patch.setattr(dp_accounting, "epsilon_spent", lambda n, *_, **__: spent[n])
        status, out, err = run_command("private", *FLAGS, f"--output_dir={folder}")
    assert (status, err) == (0, "")
    return folder, out


def test_the_command_prints_and_writes_the_same_as_run(printed, result):
    folder, out = printed
    assert "not private" in out
    assert "600 rows to train on, each in a batch with probability 0.167; 10 st" in out
    assert "which ε does not cover" not in out  # the bounds are known
    assert "Warning" not in out
    document = json.loads((folder / "private.json").read_text(encoding="utf-8"))
    assert document["rows"] == result["rows"]
    assert [row["epsilon"] for row in document["rows"]] == [0.5, 1, np.inf]
    assert document["configuration"]["batch_size"] == 100
    assert list(pd.read_csv(folder / "private.csv")) == [
        *("epsilon", "epsilon_spent", "noise_multiplier"),
        *(
            f"{split}_{name}{end}"
            for split in ("validation", "test")
            for name in private.METRICS
            for end in ("", "_se")
        ),
        *("clipped_first_tenth", "clipped_last_tenth"),
    ]
    assert len(pd.read_csv(folder / "private.csv")) == 3
    fractions = pd.read_csv(folder / "clipped.csv")
    assert list(fractions) == ["step", "epsilon_0.5", "epsilon_1"]
    assert len(fractions) == 10
    np.testing.assert_allclose(fractions["epsilon_1"], result["clipped"][1].mean(0))
    assert (folder / "private.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_another_run_is_refused(printed, tmp_path):
    folder = shutil.copytree(printed[0], tmp_path / "copied")
    flags = (*FLAGS, "--max_grad_norm=0.25", f"--output_dir={folder}")
    status, _, err = run_command("private", *flags)
    assert status == 2
    assert "holds another run, with max_grad_norm=0.5 there, 0.25 here" in err


def test_keys_of_results_are_snake_case(printed):
    assert odd_keys(printed[0], ignored=r"epsilon_[0-9.]+") == {}


def test_what_epsilon_does_not_cover_is_said(result, capsys):
    configuration = {**result["configuration"], "bounds": None, "delta": 1 / 600}
    private._report({**result, "configuration": configuration})
    out = capsys.readouterr().out
    assert "standardized by the training rows, which ε does not cover" in out
    assert "Warning: δ is at least 1 / rows" in out


@pytest.mark.parametrize(
    ("flags", "bounds", "rate"),
    [
        ((), (0.0, 16.0), 0.01),  # digits, whose pixels are known
        (("--dataset=moons",), None, 0.01),
        (("--data=x.csv",), None, 0.01),
        (("--bounds=-1,2.5", "--learning_rate=0.2"), (-1.0, 2.5), 0.2),
        (("--bounds=a b=0:1,c=d=-1:2e5",), {"a b": (0, 1), "c=d": (-1, 2e5)}, 0.01),
        (("--optimizer=sgd",), (0.0, 16.0), None),
    ],
)
def test_flags_that_are_not_set_have_the_defaults_in_help(
    flags, bounds, rate, monkeypatch
):
    given = {}

    def stopped(**options):
        given.update(options)
        raise InputError("stopped")

    monkeypatch.setattr(private, "run", stopped)
    monkeypatch.setattr(datasets, "from_flags", lambda seed: MOONS)
    finished = run_command("private", *flags)
    assert (finished.status, finished.err) == (2, "private: stopped\n")
    assert given["bounds"] == bounds
    assert given["optimizer"].learning_rate == rate
    assert given["training"].batch_size is None
    assert given["privacy"].epsilons == (0.5, 1, 2, 3, 5, 8)
    assert given["seeds"] == 5
    assert [private.default_batch_size(n) for n in (5, 600, 2000)] == [2, 150, 256]


BAD_FLAGS = [
    ("--epsilon=1,x", "--epsilon=1,x: expected comma-separated numbers"),
    ("--bounds=1", "--bounds=1: expected LOW,HIGH"),
    ("--bounds=1,y", "--bounds=1,y: expected comma-separated numbers"),
    ("--bounds=a=1,b=0:1", "--bounds=a=1: expected NAME=LOW:HIGH"),
    ("--delta=2", "--delta=2"),
    ("--epochs=3", "epochs"),
]


@pytest.mark.parametrize(("flag", "message"), BAD_FLAGS)
def test_a_bad_flag_is_one_line(flag, message):
    finished = run_command("private", flag)
    assert finished.status == 2
    assert finished.err.startswith("private: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1


@pytest.mark.slow
def test_a_bad_flag_is_one_line_of_a_process():
    flag, message = BAD_FLAGS[0]
    with start("private", flag) as process:
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (2, "", f"private: {message}\n")
