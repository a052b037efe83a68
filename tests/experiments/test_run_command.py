"""A command run in the tests' process ends as a process does, and leaves no trace."""

import jax
import pytest
from absl import flags, logging

from experiments.gradient_checks import walkthrough
from tests.helpers import run_command, start


def state():
    values = {name: flags.FLAGS[name].value for name in flags.FLAGS}
    given = {name for name in flags.FLAGS if flags.FLAGS[name].present}
    return values, given, logging.get_verbosity(), dict(jax.config.values)


@pytest.mark.slow
def test_it_prints_what_a_process_prints():
    process = start("compare_gradients", "--help")
    finished = run_command("compare_gradients", "--help")
    out, err = process.communicate(timeout=600)
    assert "Is every hand-derived gradient" in out
    assert finished == (process.returncode, out, err) == (0, out, "")


def test_flags_logging_and_configuration_are_restored():
    before = state()
    first = run_command("compare_gradients", "--explain", "--seed=3")
    assert first.status == 0
    assert "The network" in first.out
    assert state() == before
    second = run_command("compare_gradients", "--batch=99999")  # not --explain
    assert second.status == 2
    assert "digits has 1797 examples" in second.err
    assert state() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--no_such_flag",), "no_such_flag"),
        (("--seed=-1",), "--seed=-1"),
        (("--seeds=3",), "--seeds is not a flag of this command"),
        (("stray",), "'stray': expected a flag"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message):
    before = state()
    finished = run_command("compare_gradients", *arguments)
    assert (finished.status, finished.out) == (2, "")
    assert finished.err.startswith("compare_gradients: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1
    assert state() == before


def test_another_number_of_devices_is_an_error():
    with pytest.raises(ValueError, match="3 devices need a process"):
        run_command("benchmark", "--cpu_devices=3")


def test_a_failure_is_status_1_and_an_error_is_raised(monkeypatch):
    monkeypatch.setattr(walkthrough, "walk", lambda: ("text", False))
    assert run_command("compare_gradients", "--explain") == (1, "text\n", "")
    monkeypatch.setattr(walkthrough, "walk", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_command("compare_gradients", "--explain")


def test_memory_that_runs_out_is_one_line_and_status_2(monkeypatch):
    def exhausted():
        raise MemoryError("8 EB")

    monkeypatch.setattr(walkthrough, "walk", exhausted)
    assert run_command("compare_gradients", "--explain") == (
        2,
        "",
        "compare_gradients: not enough memory: 8 EB\n",
    )


def test_an_interrupt_is_status_130(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(walkthrough, "walk", interrupted)
    finished = run_command("compare_gradients", "--explain")
    assert finished.status == 130
    assert finished.err == "compare_gradients: interrupted\n"
