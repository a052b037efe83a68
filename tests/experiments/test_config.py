"""Configurations: what flags fill them with, what is refused, what is written."""

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.support import config
from experiments.support.cli import InputError
from experiments.support.config import OptimizerConfig, TrainingConfig
from tests.helpers import run_command


@contextlib.contextmanager
def given(*arguments: str) -> Iterator[None]:
    """The flags as a command line sets them; the others at their defaults."""
    with flagsaver.flagsaver():
        for holder in vars(config).values():
            if isinstance(holder, flags.FlagHolder):
                flags.FLAGS[holder.name].unparse()
        flags.FLAGS(["command", *arguments])
        yield


# ------------------------------------------------------------------------- from flags


def test_flags_that_are_not_set_give_the_defaults_of_the_classes():
    with given():
        assert OptimizerConfig.from_flags() == OptimizerConfig()
        assert TrainingConfig.from_flags(batch_size=32) == TrainingConfig()
        assert TrainingConfig.from_flags().batch_size is None


def test_flags_that_are_set_fill_every_field():
    with given(
        *("--optimizer=adamw", "--optimizer_arg=b1=0.5", "--optimizer_arg=b2=0.9"),
        *("--learning_rate=0.25", "--schedule=cosine", "--weight_decay=0.5"),
    ):
        found = OptimizerConfig.from_flags(learning_rate=7.0)
    assert found == OptimizerConfig(
        optimizer="adamw",
        optimizer_args={"b1": 0.5, "b2": 0.9},
        learning_rate=0.25,
        schedule="cosine",
        weight_decay=0.5,
    )
    with given(
        *("--seed=4", "--hidden=8,2", "--batch_size=0", "--num_steps=9"),
        *("--evaluate_every=3", "--patience=5", "--pos_weight=2", "--dtype=bfloat16"),
        "--metric=f1",
    ):
        found = TrainingConfig.from_flags(batch_size=16, num_steps=7, dtype="float64")
    assert found == TrainingConfig(
        seed=4,
        hidden=(8, 2),
        batch_size=0,
        num_steps=9,
        evaluate_every=3,
        patience=5,
        metric="f1",
        pos_weight=2.0,
        dtype="bfloat16",
    )
    with given("--epochs=3", "--pos_weight=balanced", "--hidden="):
        found = TrainingConfig.from_flags(hidden=None)
    assert (found.epochs, found.pos_weight, found.hidden) == (3, "balanced", ())


def test_a_command_fills_in_its_own_defaults():
    own = {"batch_size": 16, "num_steps": 7, "dtype": "float64", "hidden": (3,)}
    with given("--hidden=4", "--hidden=5"):
        found = TrainingConfig.from_flags(**own)
        assert config.hidden_choices() == [(4,), (5,)]
        assert OptimizerConfig.from_flags(learning_rate=7.0).learning_rate == 7.0
    assert found == TrainingConfig(**own)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hidden=8", "--hidden=9"), "--hidden: expected once, got several"),
        (("--hidden=8,x",), "--hidden=8,x: expected comma-separated integers >= 1"),
        (("--hidden=8,0",), "--hidden=8,0: expected comma-separated integers >= 1"),
        (("--hidden=8,",), "--hidden=8,: expected comma-separated integers >= 1"),
    ],
)
def test_widths_that_cannot_be_read_are_refused(arguments, message):
    with given(*arguments), pytest.raises(InputError, match=message):
        TrainingConfig.from_flags()


def test_an_argument_that_cannot_be_read_is_refused():
    with (
        given("--optimizer_arg=b1"),
        pytest.raises(InputError, match="--optimizer_arg=b1: expected NAME=VALUE"),
    ):
        OptimizerConfig.from_flags()


# ------------------------------------------------------------------------------- check


@pytest.mark.parametrize(
    ("options", "steps", "every"),
    [
        ({}, 60 * 4, 4),  # an epoch is longer than a hundredth of the run
        ({"epochs": 3}, 3 * 4, 4),
        ({"num_steps": 10**4}, 10**4, 100),
        ({"num_steps": 10**4 + 1}, 10**4 + 1, 101),
        ({"num_steps": 3}, 3, 3),  # an evaluation at the end, at least
        ({"num_steps": 50, "evaluate_every": 7}, 50, 7),
        ({"num_steps": 50, "evaluate_every": 99}, 50, 50),
        ({"batch_size": 0}, 60, 1),
        ({"batch_size": None, "epochs": 250}, 250, 3),
        ({"batch_size": 100, "epochs": 2}, 2, 1),
    ],
    ids=str,
)
def test_durations_become_steps(options, steps, every):
    training = TrainingConfig(**options)
    found = training.check(100)
    assert (found.num_steps, found.evaluate_every, found.epochs) == (steps, every, None)
    assert found.batch_size == (options.get("batch_size", 32) or None)
    assert found.check(100) == found
    assert training == TrainingConfig(**options)  # which is left as it is


def test_a_batch_size_that_nobody_asked_for_is_at_most_all_examples():
    with given():
        default = TrainingConfig.from_flags(batch_size=32)
    assert default.check(20).batch_size == 20
    assert default.check(20).num_steps == 60  # of one step per epoch
    assert default.check(33).batch_size == 32
    with given("--batch_size=32"):
        asked_for = TrainingConfig.from_flags(batch_size=32)
    with pytest.raises(InputError, match="--batch_size=32: moons has 20 rows to train"):
        asked_for.check(20, "moons")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 101}, "--batch_size=101: moons has 100 rows to train on"),
        ({"num_steps": 5, "epochs": 3}, "expected --num_steps or --epochs, got both"),
        ({"pos_weight": -1.0}, "--pos_weight=-1.0: expected a finite number >= 0"),
        ({"pos_weight": "high"}, "--pos_weight=high: expected a finite number >= 0"),
        ({"pos_weight": float("inf")}, "--pos_weight=inf: expected a finite number"),
        ({"pos_weight": float("nan")}, "--pos_weight=nan: expected a finite number"),
        (
            {"epochs": 2**29},
            r"expected fewer than 2\^31 steps, got 2147483648",
        ),
    ],
)
def test_training_that_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        TrainingConfig(**options).check(100, "moons")


def test_the_longest_run_is_accepted():
    training = TrainingConfig(epochs=2**29 - 1, pos_weight="balanced").check(100)
    assert training.num_steps == 2**31 - 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamm"}, "--optimizer=adamm: expected one of .*adam, "),
        ({"optimizer_args": {"b3": 1}}, "--optimizer_arg=b3: adam takes learning_rate"),
        ({"learning_rate": -1.0}, "--learning_rate=-1.0: expected a finite number"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(options, message):
    optimizer = OptimizerConfig(**options).fill_in(100)
    with pytest.raises(InputError, match=message):
        optimizer.build(num_steps=1)
    with pytest.raises(InputError, match=message):
        optimizer.build_family(num_steps=1)


def test_an_optimizer_is_built_once_for_equal_configurations():
    options: Any = {"optimizer": "sgd", "optimizer_args": {"momentum": 0.9}}
    first, again = (OptimizerConfig(**options).fill_in(100) for _ in range(2))
    assert first.build(5)[0] is again.build(5)[0]  # so that `fit` compiles once
    assert first.build(5)[1] == first.weight_decay == 0.01  # sgd has none of its own
    family = first.build_family(5, ("learning_rate",))
    assert family is again.build_family(5, ("learning_rate",))
    assert family is not first.build_family(5)


def test_weight_decay_is_one_prior_for_any_number_of_examples():
    assert OptimizerConfig().fill_in(1077).weight_decay == 1 / 1077
    for given in (0.0, 0.25):
        assert OptimizerConfig(weight_decay=given).fill_in(9).weight_decay == given
    with pytest.raises(ValueError, match="that `fill_in` returned"):
        OptimizerConfig().build(1)


# ----------------------------------------------------------------------------- as_dict


def test_what_is_written_reads_back_as_what_was_configured():
    optimizer = OptimizerConfig(
        optimizer="adamw", optimizer_args={"b1": 0.5, "nesterov": True}
    )
    training = TrainingConfig(hidden=(8, 2), pos_weight="balanced").check(100)
    assert training.as_dict()["hidden"] == (8, 2)  # JSON has no tuples
    for configured in (optimizer, training):
        read = json.loads(json.dumps(configured.as_dict()))
        options: Any = read | ({"hidden": (8, 2)} if "hidden" in read else {})
        assert type(configured)(**options) == configured
    assert "epochs" not in training.as_dict()  # its steps say it
    assert training.as_dict()["num_steps"] == 240
    assert not set(optimizer.as_dict()) & set(training.as_dict())


# -------------------------------------------------------------------------------- help


def default_in_help(text: str, name: str) -> str | None:
    """The default that `--help` shows for a flag; None if it shows none."""
    entry = re.search(rf"^  --(?:\[no\])?{name}:.*?(?=^  --|\Z)", text, re.M | re.S)
    assert entry is not None, name
    shown = re.search(r"\(default: ['\"](.*)['\"]\)", entry[0])
    return shown and shown[1]


@pytest.mark.parametrize("command", ["train", "sweep", "private", "find_mislabeled"])
def test_help_shows_the_defaults_of_the_command(command):
    module = importlib.import_module(f"experiments.{command}")
    finished = run_command(command, "--help")
    assert (finished.status, finished.err) == (0, "")
    assert finished.out.startswith(str(module.__doc__).split("\n")[0])
    for name, value in module.DEFAULTS.items():
        assert default_in_help(finished.out, name) == str(value)
    words = " ".join(finished.out.split())
    for text in module.HELP.values():
        assert text in words
    assert default_in_help(finished.out, "weight_decay") is None
    assert default_in_help(finished.out, "learning_rate") is None


EXPECTED_DEFAULTS = {
    "benchmark": {},
    "compare_gradients": {"dtype": "float64"},
    "double_descent": {"dtype": "float32", "seeds": "8", "noise": "0.15"},
    "grokking": {"dtype": "float32", "epochs": "600", "seeds": "3"},
    "leave_one_out": {"dtype": "float64", "num_steps": "2000", "num_rows": "300"},
    "trainability": {"dtype": "float32", "num_steps": "200"},
}


@pytest.mark.parametrize("command", EXPECTED_DEFAULTS)
def test_help_of_the_other_commands_is_printed(command):
    module = importlib.import_module(f"experiments.{command}")
    finished = run_command(command, "--help")
    assert (finished.status, finished.err) == (0, "")
    assert finished.out.startswith(str(module.__doc__).split("\n")[0])
    assert default_in_help(finished.out, "seed") == "0"
    for name, value in EXPECTED_DEFAULTS[command].items():
        assert default_in_help(finished.out, name) == value


def test_a_default_of_one_command_is_not_one_of_another():
    assert default_in_help(run_command("train", "--help").out, "batch_size") == "32"
    private = run_command("private", "--help").out
    assert default_in_help(private, "batch_size") is None
    assert "a quarter of the training rows" in " ".join(private.split())
    assert default_in_help(private, "num_steps") == "300"
    assert default_in_help(run_command("train", "--help").out, "num_steps") is None
