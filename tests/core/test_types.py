"""What a type checker sees of the package, in code that a user would write."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxbce

SETUP = """\
import jax
import numpy as np
import optax  # pyright: ignore[reportMissingTypeStubs]

import jaxbce

key = jax.random.key(0)
params = jaxbce.init(key, (2, 3, 1), dtype="float32")
x, y = np.ones((8, 2), np.float32), np.ones((8, 1), bool)
device_x, device_y = jaxbce.forward(params, x).h[0], jaxbce.predict_proba(params, x)
optimizer = optax.adam(1e-2)


def make(point: dict[str, jax.Array]) -> optax.GradientTransformation:
    return optax.sgd(point["learning_rate"])


"""
RIGHT = """\
from typing import assert_type

from jaxbce.checking import Report
from jaxbce.curvature import KroneckerFactors
from jaxbce.laplace import LeaveOneOut, Posterior
from jaxbce.network import Params
from jaxbce.per_example import Clipped

assert_type(params, Params)
assert_type(jaxbce.forward(params, x).h[0], jax.Array)
assert_type(jaxbce.logits(params, device_x), jax.Array)
assert_type(jaxbce.bce_with_logits(device_x, x, pos_weight=np.ones(2)), jax.Array)
assert_type(jaxbce.value_and_grad(params, x, y), tuple[jax.Array, Params])
assert_type(jaxbce.value_and_grad(params, device_x, device_y)[1][0].w, jax.Array)
assert_type(jaxbce.grad(params, x, y, sample_weight=np.ones(8)), Params)
assert_type(jaxbce.loss(params, x, y, reduction="sum", block_size=None), jax.Array)
assert_type(jaxbce.chain_rule(params, x, y).dbce_dw1, jax.Array)
assert_type(jaxbce.per_example.norms(params, x, y), jax.Array)
clipped = jaxbce.per_example.clipped_value_and_grad(params, x, y, max_norm=1)
assert_type(clipped, Clipped)
assert_type(clipped.grads, Params)
assert_type(jaxbce.curvature.hvp(params, x, y, params), Params)
assert_type(jaxbce.curvature.kfac_factors(params, x), tuple[KroneckerFactors, ...])
posterior = jaxbce.laplace.posterior(params, x, y, (1.0, device_x), layers="last")
assert_type(posterior, Posterior)
assert_type(jaxbce.laplace.influence(posterior, x, y), jax.Array)
assert_type(jaxbce.laplace.leave_one_out(posterior), LeaveOneOut)
run = jaxbce.fit(key, params, x, y, optimizer=optimizer, num_steps=3)
run = jaxbce.fit(
    key,
    run,
    device_x,
    device_y,
    optimizer=optax.chain(optax.clip(1.0), optimizer),
    num_steps=3,
    validation=(x, y),
    loss=jaxbce.loss,
)
assert_type(run.best_params, Params)
assert_type(run.train_loss, jax.Array)
members = jaxbce.sweep(
    key,
    x,
    y,
    hidden=[3],
    make_optimizer=make,
    hparams=jaxbce.grid(learning_rate=[0.1, 0.2]),
    num_steps=3,
)
more = jaxbce.sweep(
    key,
    x,
    y,
    params=members.params,
    make_optimizer=make,
    make_sample_weight=lambda point: point["fold"] != np.arange(8) % 2,
    make_labels=lambda point, y: 1 - y,
    hparams=jaxbce.grid(learning_rate=[0.1], fold=[0, 1]),
    num_steps=3,
    validation="held_out",
)
assert_type(jaxbce.ensemble_logits(more.params, x), jax.Array)
assert_type(jaxbce.ensemble_proba(params, device_x), jax.Array)
assert_type(members.train_loss, np.ndarray)
report = jaxbce.check_gradients(jaxbce.value_and_grad, params, x, y, dtype=np.float32)
assert_type(report, Report)
assert_type(report.passed, bool)
many = jax.vmap(jaxbce.value_and_grad, in_axes=(None, 0, 0))
assert_type(many(params, x[None], y[None]), tuple[jax.Array, Params])
assert_type(jaxbce.loss.lower(params, x, y), jax.stages.Lowered)
assert_type(jaxbce.loss.trace(params, x, y), jax.stages.Traced)
"""
WRONG = """\
jaxbce.value_and_grad(params, x, y, nonsense=4)
jaxbce.value_and_grad(params, x)
jaxbce.loss(x, params, y)
jaxbce.loss(params, x, "y")
jaxbce.loss(params, x, y, reduction="max")
jaxbce.grad(params, x, y, block_size="large")
jaxbce.grad(params, x, y, pos_weight=[1.0])
jaxbce.init(key, "2")
jaxbce.fit(key, params, x, y, optimizer=optimizer)
jaxbce.fit(key, params, x, y, optimizer=optimizer, num_steps="3")
jaxbce.fit(key, params, x, y, optimizer="adam", num_steps=3)
jaxbce.sweep(key, x, y, hidden="3", make_optimizer=make, hparams={}, num_steps=3)
jaxbce.per_example.clipped_value_and_grad(params, x, y)
jaxbce.curvature.hvp(params, x, y)
print(jaxbce.forward(params, x).z)
print(jaxbce.value_and_grad(params, x, y).value)
jaxbce.check_gradients(jaxbce.loss, params, x, y)
"""


@pytest.mark.slow
def test_a_strict_checker_accepts_right_calls_and_rejects_wrong_ones(tmp_path):
    (tmp_path / "right.py").write_text(SETUP + RIGHT)
    (tmp_path / "wrong.py").write_text(SETUP + WRONG)
    # The package under test, also where another copy of it is installed.
    root = str(Path(jaxbce.__file__).parents[1])
    settings = {"typeCheckingMode": "strict", "extraPaths": [root]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", tmp_path]
    command += ["--pythonpath", sys.executable]
    finished = subprocess.run(command, capture_output=True, text=True)
    errors = [
        (Path(error["file"]).name, error["range"]["start"]["line"], error["message"])
        for error in json.loads(finished.stdout)["generalDiagnostics"]
    ]
    assert [error for error in errors if error[0] == "right.py"] == []
    lines = (SETUP + WRONG).splitlines()
    assert {lines[line] for _, line, _ in errors} == set(WRONG.splitlines())


def test_compiled_functions_can_be_traced_lowered_and_pickled():
    params = jaxbce.init(jax.random.key(0), (2, 1))
    shape = jax.ShapeDtypeStruct((4, 2), "float32")
    assert jaxbce.forward.trace(params, shape).lower().out_info.a[0].shape == (4, 1)
    assert jaxbce.forward.lower(params, shape).out_info.a[0].shape == (4, 1)
    # jax.grad copies the attributes of a function.
    assert not hasattr(jax.grad(jaxbce.loss), "trace")
    assert pickle.loads(pickle.dumps(jaxbce.loss)) is jaxbce.loss
    assert repr(jaxbce.loss) == "<compiled function jaxbce.gradients.loss>"
