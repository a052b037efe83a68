"""`fit`: the run it makes, where it stops, how it goes on, and what it refuses."""

import functools
import itertools
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from sklearn.neural_network import MLPClassifier

import jaxbce
from jaxbce import _batches, _layouts, _traced, gradients
from tests.helpers import TOLERANCE, loss_reference, member, problem, relative_error

KEY = jax.random.key(7)
ADAM = optax.adam(0.05)  # one object: each other one would be compiled for
SGD = optax.sgd(0.1)


pytestmark = pytest.mark.usefixtures("standard_promotion")


def arguments(rows=37, sizes=(5, 4, 1), dtype="float64"):
    """Params, and a batch with hard labels in NumPy."""
    params, x, y = jax.tree.map(
        lambda t: np.asarray(t, jnp.dtype(dtype)), problem(sizes, rows=rows)[:3]
    )
    return jax.device_put(params), x, np.round(y)


@functools.partial(jax.jit, static_argnames="rows")
def order_of(epoch, *, rows):
    return jax.random.permutation(jax.random.fold_in(KEY, epoch), rows)


def fit(params, x, y, *, optimizer=ADAM, num_steps=20, **options):
    return jaxbce.fit(
        KEY, params, x, y, optimizer=optimizer, num_steps=num_steps, **options
    )


def equal(a, b):
    """Whether two pytrees are the same to the bit, NaN being NaN."""
    same = jax.tree.map(lambda s, t: np.array_equal(s, t, equal_nan=True), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


# ---------------------------------------------------------------- the run itself


@pytest.mark.parametrize("hidden", [(16,), (9, 7)], ids=str)
@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0, False), (0.9, False), (0.9, True)]
)
def test_a_full_batch_run_is_scikit_learns(hidden, momentum, nesterov):
    with jax.enable_x64(True):
        params, x, y = arguments(rows=60, sizes=(5, *hidden, 1))
        options: Any = {"alpha": 0, "batch_size": 60, "shuffle": False}
        options |= {"learning_rate_init": 0.05, "momentum": momentum}
        options |= {"solver": "sgd", "nesterovs_momentum": nesterov}
        model = MLPClassifier(hidden, **options)
        model.partial_fit(x, y.ravel(), classes=[0, 1])  # lays out its state
        for k, layer in enumerate(params):
            model.coefs_[k][...], model.intercepts_[k][...] = layer
        del model._optimizer
        model.t_ = 0
        for _ in range(200):
            model.partial_fit(np.asarray(x), np.asarray(y).ravel())
        optimizer = optax.sgd(0.05, momentum=momentum or None, nesterov=nesterov)
        run = fit(params, x, y, optimizer=optimizer, num_steps=200)
        theirs = tuple(zip(model.coefs_, model.intercepts_, strict=True))
        assert relative_error(run.params, theirs) <= 1e-12
        assert relative_error(run.params, params) > 0.1


@functools.partial(jax.jit, static_argnames="optimizer")
def step_reference(params, state, x, y, c, *, optimizer):
    options = {"sample_weight": c, "pos_weight": 1.5, "reduction": "sum"}
    grads = jax.grad(loss_reference)(params, x, y, **options)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state


def loop_reference(params, x, y, s, *, optimizer, num_steps, batch_size):
    """The run as one would write it: an order an epoch, slices of it, autodiff."""
    state = optimizer.init(params)
    rows, t = len(x), 0
    per_epoch = -(-rows // batch_size)
    while t < num_steps:
        order = np.asarray(order_of(t // per_epoch, rows=rows))
        for i in range(0, rows, batch_size):
            rows_ = order[i : i + batch_size]
            c = s[rows_] / np.mean(s) / len(rows_)
            params, state = step_reference(
                params, state, x[rows_], y[rows_], c, optimizer=optimizer
            )
            t += 1
            if t == num_steps:
                break
    return params


@pytest.mark.parametrize("batch_size", [8, 36])
def test_a_run_by_batches_is_the_plain_loop(batch_size):
    with jax.enable_x64(True):
        params, x, y = arguments()
        s = problem((5, 4, 1)).sample_weight
        optimizer = optax.adam(0.01)
        options = {"optimizer": optimizer, "num_steps": 50, "batch_size": batch_size}
        run = fit(
            params, x, y, sample_weight=s, pos_weight=1.5, evaluate_every=7, **options
        )
        truth = loop_reference(params, x, y, s, **options)
        assert relative_error(run.params, truth) <= 1e-10
        loss = jax.jit(
            functools.partial(loss_reference, sample_weight=s, pos_weight=1.5)
        )
        assert np.isclose(run.train_loss[-1], loss(truth, x, y), rtol=1e-10)
        assert run.train_loss.shape == (8,)


def linear(params, x, y, *, sample_weight, pos_weight, reduction):
    """Its gradient in row i of the weights is what row i of a unit matrix counted."""
    assert reduction == "sum"
    return jnp.sum(sample_weight[:, None] * (x @ params[0].w))


@pytest.mark.parametrize("batch_size", [4, 10, None])
def test_every_row_counts_once_an_epoch_and_a_short_batch_is_a_mean(batch_size):
    params = (jaxbce.Layer(jnp.zeros((10, 1)), jnp.zeros(1)),)
    x, y = np.eye(10, dtype="f"), np.zeros((10, 1), "f")
    size = batch_size or 10
    steps = -(-10 // size)
    options = {"num_steps": steps, "batch_size": batch_size, "loss": linear}
    run = fit(params, x, y, optimizer=SGD, **options)
    short = 10 % size or size
    shares = [1 / size] * (10 - short) + [1 / short] * short
    counted = np.sort(-10 * np.ravel(run.params[0].w))
    np.testing.assert_allclose(counted, np.sort(shares), rtol=1e-6)


def test_a_mean_over_an_epoch_is_the_weighted_loss_of_all_rows():
    params = (jaxbce.Layer(jnp.zeros((10, 1)), jnp.zeros(1)),)
    s = np.arange(10, dtype="f")  # a weight may be 0
    run = fit(
        params,
        np.eye(10, dtype="f"),
        np.zeros((10, 1), "f"),
        optimizer=optax.sgd(0.5),
        num_steps=2,
        batch_size=5,
        sample_weight=s,
        loss=linear,
    )
    np.testing.assert_allclose(-np.ravel(run.params[0].w), s / s.sum(), rtol=1e-6)


def test_orders_differ_between_epochs_and_keys():
    params, x, y = arguments(dtype="float32")
    options = {"optimizer": SGD, "num_steps": 5, "batch_size": 8}
    runs = [
        jaxbce.fit(jax.random.key(seed), start, x, y, **options)
        for seed, start in ((0, params), (0, params), (1, params))
    ]
    assert equal(runs[0], runs[1])
    assert relative_error(runs[0].params, runs[2].params) > 1e-4
    # The second epoch from the same parameters is not the first again.
    again = jaxbce.fit(
        jax.random.key(0), runs[0]._replace(params=params), x, y, **options
    )
    assert relative_error(again.params, runs[0].params) > 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_dtypes_stay_what_they_were(dtype):
    with jax.enable_x64(dtype == "float64"):
        params, x, y = arguments(dtype=dtype)
        run = fit(params, x, y, batch_size=8, validation=(x, y))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(run.params)} == {dtype}
        wide = "float64" if dtype == "float64" else "float32"
        assert run.train_loss.dtype == run.best_loss.dtype == wide
        assert run.train_loss[-1] < jaxbce.loss(params, x, y)


def test_losses_are_those_of_all_rows_and_the_best_params_are_of_the_least():
    params, x, y = arguments(dtype="float32")
    valid = (x[:9] + 0.1, 1 - y[:9])  # gets worse at some time
    options = {"batch_size": 8, "validation": valid, "evaluate_every": 5}
    run = fit(params, x, y, num_steps=100, pos_weight=2.0, **options)
    assert run.train_loss.shape == run.validation_loss.shape == (20,)
    best = int(np.argmin(run.validation_loss))
    assert 0 <= best < 19
    assert run.best_step == 5 * (best + 1)
    assert run.best_loss == np.asarray(run.validation_loss)[best]
    truth = jaxbce.loss(run.best_params, *valid, pos_weight=2.0)
    assert np.isclose(run.best_loss, truth, rtol=1e-6)
    last = jaxbce.loss(run.params, *valid, pos_weight=2.0)
    assert np.isclose(np.asarray(run.validation_loss)[-1], last, rtol=1e-6)
    without = fit(params, x, y, num_steps=5, evaluate_every=2)
    assert without.validation_loss.shape == (0,)
    assert without.train_loss.shape == (3,)
    assert without.best_loss == np.min(without.train_loss)


def test_a_penalty_is_followed_and_not_reported():
    with jax.enable_x64(True):
        params, x, y = arguments()

        def penalised(params, x, y, **options):
            penalty = 0.5 * sum(jnp.sum(layer.w**2) for layer in params)
            return jaxbce.loss(params, x, y, **options) + 0.1 * penalty

        run = fit(params, x, y, optimizer=optax.sgd(0.1), loss=penalised)
        mask: Any = tuple(layer._replace(w=True, b=False) for layer in params)
        decay = optax.add_decayed_weights(0.1, mask=mask)
        chained = fit(params, x, y, optimizer=optax.chain(decay, optax.sgd(0.1)))
        assert relative_error(run.params, chained.params) <= 1e-12
        assert np.isclose(run.train_loss[0], jaxbce.loss(run.params, x, y))


def test_autodiff_of_the_plain_loss_gives_the_same_run():
    with jax.enable_x64(True):
        params, x, y = arguments()
        options: Any = {"batch_size": 8, "num_steps": 100, "evaluate_every": 10}
        by_hand = fit(params, x, y, **options)
        autodiff = fit(params, x, y, loss=loss_reference, **options)
        np.testing.assert_allclose(by_hand.train_loss, autodiff.train_loss, rtol=1e-10)


# -------------------------------------------------------- stopping and going on


@pytest.mark.slow_ids("line search")
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (optax.sgd(0.1, momentum=0.9), {}),
        (optax.lbfgs(), {}),
        (
            optax.chain(
                optax.adam(optax.cosine_decay_schedule(0.05, 100)),
                optax.contrib.reduce_on_plateau(patience=3),
            ),
            {"batch_size": 8},
        ),
    ],
    ids=["full batch", "line search", "batches, schedule, plateau"],
)
def test_two_runs_are_one_long_run_to_the_bit(optimizer, options):
    params, x, y = arguments(dtype="float32")
    options |= {"optimizer": optimizer, "validation": (x[:7], y[:7])}
    options |= {"evaluate_every": 6}
    whole = fit(params, x, y, num_steps=36, **options)
    begun = fit(params, x, y, num_steps=0, **options)
    assert equal(begun.params, params)
    assert begun.train_loss.shape == begun.validation_loss.shape == (0,)
    first = fit(begun, x, y, num_steps=18, **options)
    second = fit(first, x, y, num_steps=18, **options)
    for name in ("train_loss", "validation_loss"):
        parts = np.concatenate([getattr(first, name), getattr(second, name)])
        np.testing.assert_array_equal(parts, getattr(whole, name))
    none = {"train_loss": None, "validation_loss": None}
    assert equal(second._replace(**none), whole._replace(**none))


def test_a_run_ends_when_patience_does():
    params, x, y = arguments(dtype="float32")
    options = {"batch_size": 8, "validation": (x[:9] + 0.1, 1 - y[:9])}
    options |= {"evaluate_every": 5, "num_steps": 100}
    free = fit(params, x, y, **options)
    run = fit(params, x, y, patience=15, **options)
    best = int(run.best_step)
    assert best == free.best_step
    assert run.step == best + 15 < 100
    assert equal(run.best_params, free.best_params)
    made = (best + 15) // 5
    losses, free_losses = map(np.asarray, (run.validation_loss, free.validation_loss))
    np.testing.assert_array_equal(losses[:made], free_losses[:made])
    assert np.isinf(losses[made:]).all()
    assert np.isinf(np.asarray(run.train_loss)[made:]).all()
    last = jaxbce.loss(run.params, *options["validation"])
    assert np.isclose(last, losses[made - 1], rtol=1e-6)
    more = fit(run, x, y, patience=15, **options)
    assert equal(more.params, run.params)
    assert more.step == run.step


def test_an_equal_loss_is_no_better_so_that_patience_ends_on_a_plateau():
    params, x, y = arguments(dtype="float32")
    options = {"optimizer": optax.sgd(0.0), "evaluate_every": 5, "num_steps": 50}
    run = fit(params, x, y, patience=10, **options)
    assert run.best_step == 5
    assert run.step == 15


@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_run_that_diverges_is_frozen_and_says_when(batch_size):
    params, x, y = arguments(dtype="float32", sizes=(5, 4, 4, 1))
    options = {"optimizer": optax.sgd(1e15), "batch_size": batch_size}
    run = fit(params, x, y, num_steps=40, evaluate_every=20, **options)
    at = int(run.diverged_at)
    assert 0 < at < 20
    assert run.step == at
    step = fit(params, x, y, num_steps=1, **options)
    for t in range(1, at):
        assert step.diverged_at == -1, t
        step = fit(step, x, y, num_steps=1, **options)
    assert equal(run.params, step.params)
    assert not np.isfinite(run.train_loss).any()
    assert equal(run.best_params, params)
    assert fit(step, x, y, num_steps=1, **options).diverged_at == at
    if batch_size is None:  # the evaluation after the last step sees it too
        assert fit(params, x, y, num_steps=at, **options).diverged_at == at


def test_a_loss_that_is_not_finite_at_the_start_is_step_0():
    params, x, y = arguments(dtype="float32")
    x[0, 0] = np.nan
    run = fit(params, x, y, evaluate_every=5)
    assert run.diverged_at == 0
    assert equal(run.params, params)


# ------------------------------------------------------------ what JAX makes of it


def test_members_of_a_vmap_are_their_solo_runs_and_do_not_disturb_each_other():
    with jax.enable_x64(True):
        params, x, y = arguments(sizes=(5, 4, 4, 1))
        options = {"batch_size": 8, "num_steps": 30, "evaluate_every": 10}

        def train(rate):
            return fit(params, x, y, optimizer=optax.sgd(rate), **options)

        rates = np.array([0.01, 0.1, 1e200, 1.0])
        members, solo = jax.jit(jax.vmap(train)), jax.jit(train)
        run = jax.tree.map(np.asarray, members(rates))
        assert run.diverged_at[2] >= 0
        assert set(run.diverged_at[[0, 1, 3]].tolist()) == {-1}
        for i in (0, 1, 3):
            mine = member(run, i)
            assert relative_error(mine.params, solo(rates[i]).params) <= 1e-10
        others = np.array([0, 1, 3])
        rates[2] = 0.5
        calm = jax.tree.map(np.asarray, members(rates))
        for a, b in zip(
            jax.tree.leaves(run.params), jax.tree.leaves(calm.params), strict=True
        ):
            np.testing.assert_array_equal(a[others], b[others])


def test_members_may_differ_in_key_and_params_and_stop_by_themselves():
    with jax.enable_x64(True):
        _, x, y = arguments()
        valid = (x[:9] + 0.1, 1 - y[:9])

        def train(seed):
            key = jax.random.fold_in(KEY, seed)
            return jaxbce.fit(
                key,
                jaxbce.init(key, (5, 4, 1)),
                x,
                y,
                optimizer=ADAM,
                num_steps=60,
                batch_size=8,
                validation=valid,
                evaluate_every=5,
                patience=10,
            )

        seeds = np.arange(4, dtype=np.uint32)
        run, solo = jax.jit(jax.vmap(train))(seeds), jax.jit(train)
        for i, seed in enumerate(seeds):
            mine, alone = member(run, i), solo(seed)
            assert alone.step == mine.step
            assert relative_error(mine.params, alone.params) <= 1e-10
        assert len(set(run.step.tolist())) > 1


def test_under_vmap_members_of_one_key_share_the_order_of_rows():
    params, x, y = arguments(dtype="float32")

    def train(rate):
        options = {"batch_size": 8, "patience": 5, "evaluate_every": 5}
        return fit(params, x, y, optimizer=optax.sgd(rate), **options).params

    text = str(jax.make_jaxpr(jax.vmap(train))(jnp.ones(3)))
    # A batch each would be gathered, and an order each drawn, with a leading 3.
    assert ":f32[8,8] = gather" in text
    assert ":f32[3,8,8] = gather" not in text
    assert "u32[3,37]" not in text


@pytest.mark.parametrize("batch_size", [None, 8])
def test_members_sharded_over_devices_are_those_of_one(batch_size):
    params, x, y = arguments(dtype="float32")

    def train(rate):
        optimizer = optax.adam(rate)
        options = {"batch_size": batch_size, "patience": 10, "evaluate_every": 5}
        return fit(params, x, y, optimizer=optimizer, **options)

    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": P("i"), "out_specs": P("i")}
    rates = np.array([0.01, 0.1, 1.0, 0.003], "f")
    sharded = jax.jit(jax.shard_map(jax.vmap(train), **specs))(rates)
    truth = jax.jit(jax.vmap(train))(rates)
    assert relative_error(sharded.params, truth.params) <= TOLERANCE["float32"]
    np.testing.assert_array_equal(sharded.step, truth.step)


DATA_PARALLEL = """
import sys
process, port, folder = sys.argv[1:]
import jax, numpy as np, optax
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
import jaxbce
given = np.load(f"{folder}/data.npz")
jax.set_mesh(jax.make_mesh((2,), ("examples",)))

def place(t, *spec):
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*spec))
    return jax.make_array_from_callback(t.shape, sharding, lambda i: t[i])

params = tuple(
    jaxbce.Layer(place(given[f"w{k}"]), place(given[f"b{k}"])) for k in range(2))
x, y, s = (place(given[name], "examples") for name in "xys")
for name, batch_size in ("full", None), ("batches", 8):
    run = jaxbce.fit(
        jax.random.key(7), params, x, y, sample_weight=s, optimizer=optax.sgd(0.1),
        num_steps=20, evaluate_every=5, batch_size=batch_size)
    found = (*jax.tree.leaves(run.params), run.train_loss)
    np.savez(f"{folder}/{name}{process}.npz", *map(np.asarray, found))
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_that_share_the_examples_train_like_one(tmp_path):
    params, x, y, s = problem((5, 4, 1), rows=36)
    named = {f"{n}{k}": t for k, p in enumerate(params) for n, t in p._asdict().items()}
    np.savez(tmp_path / "data.npz", x=x, y=y, s=s, **named)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", DATA_PARALLEL]
    processes = [
        subprocess.Popen([*command, str(i), port, str(tmp_path)]) for i in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    with jax.enable_x64(True):
        for name, batch_size in (("full", None), ("batches", 8)):
            options = {"evaluate_every": 5, "batch_size": batch_size}
            truth = fit(params, x, y, sample_weight=s, optimizer=SGD, **options)
            leaves = [*jax.tree.leaves(truth.params), truth.train_loss]
            for process in range(2):
                found = np.load(tmp_path / f"{name}{process}.npz")
                mine = [found[f"arr_{i}"] for i in range(len(leaves))]
                assert relative_error(mine, leaves) <= 1e-12


@pytest.mark.parametrize("num_steps", [1, 1000])
def test_the_loss_is_traced_once_whatever_the_steps(num_steps):
    params, x, y = arguments(dtype="float32")
    traces = []

    def counted(params, x, y, **options):
        traces.append(1)
        return jaxbce.loss(params, x, y, **options)

    options = {"optimizer": ADAM, "num_steps": num_steps}
    options |= {"loss": counted, "batch_size": 8, "evaluate_every": 10}
    run = fit(params, x, y, **options)
    assert len(traces) == 1
    for key in range(3):
        jaxbce.fit(jax.random.key(key), params, x + 1, y, **options)
    assert len(traces) == 1
    for _ in range(2):  # resuming needs no trace either
        run = fit(run, x, y, **options)
    assert len(traces) == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_it_lowers_for_accelerators(platform, batch_size):
    params, x, y = arguments(dtype="float32")

    def run(key, params, x, y):
        options = {"optimizer": optax.adam(0.01), "num_steps": 10}
        options |= {"batch_size": batch_size, "validation": (x, y)}
        return jaxbce.fit(key, params, x, y, **options)

    traced = jax.jit(run).trace(KEY, params, x, y)
    assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.slow_ids("None")
@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize(
    ("num_steps", "is_known"), [(21, True), (20, False)], ids=["equal", "ragged"]
)
def test_the_number_of_steps_between_evaluations_is_known(
    batch_size, num_steps, is_known
):
    # A GPU would read an unknown one back to the host at every step.
    params, x, y = arguments(dtype="float32")
    options: Any = {"optimizer": optax.sgd(0.1), "num_steps": num_steps}
    options |= {"batch_size": batch_size, "evaluate_every": 7}
    run = jax.jit(lambda *a: jaxbce.fit(KEY, *a, **options)).lower(params, x, y)
    text = str(run.compile().as_text())
    assert bool(re.search(r'known_trip_count":{"n":"7"}', text)) == is_known


def test_orders_drawn_a_few_epochs_at_a_time_are_the_same(monkeypatch):
    params, x, y = arguments(dtype="float32")
    options: Any = {"optimizer": optax.adam(0.01), "num_steps": 60}
    options |= {"batch_size": 7, "evaluate_every": 30}
    whole = fit(params, x, y, **options)
    monkeypatch.setattr(_batches, "_ORDERS", 1)  # 5 steps of 6 per epoch, so 2 orders
    monkeypatch.setattr(_batches, "_MIN_INDICES", 1)
    _traced.jitted.cache_clear()
    assert equal(fit(params, x, y, **options), whole)
    monkeypatch.setattr(_batches, "_ORDERS", 2)  # 10 steps, and 7 at a resume
    _traced.jitted.cache_clear()
    options |= {"num_steps": 28, "evaluate_every": 14}
    begun = fit(params, x, y, **options | {"num_steps": 32, "evaluate_every": 16})
    assert equal(fit(begun, x, y, **options).params, whole.params)
    _traced.jitted.cache_clear()


@pytest.mark.parametrize("precision", [None, "highest"])
def test_precision_is_that_of_every_matrix_product(precision):
    params, x, y = arguments(dtype="float32")
    options: Any = {"optimizer": optax.sgd(0.1), "num_steps": 2}
    options |= {"precision": precision}
    run = jax.jit(lambda *a: fit(*a, **options)).lower(params, x, y)
    products = re.findall("dot_general.*", run.as_text())
    assert products
    exact = [product for product in products if "HIGHEST" in product]
    assert exact == (products if precision else [])


@pytest.mark.parametrize("batch_size", [None, 8])
def test_the_derivative_in_a_hyperparameter_is_the_difference_quotient(batch_size):
    with jax.enable_x64(True):
        params, x, y = arguments()

        def final(rate):
            return fit(
                params,
                x,
                y,
                optimizer=optax.sgd(rate),
                batch_size=batch_size,
                num_steps=10,
            ).train_loss[-1]

        @jax.jit
        def value_and_derivative(rate):
            return jax.jvp(final, (rate,), (jnp.ones_like(rate),))

        rate, step = 0.1, 1e-6
        after, before = (value_and_derivative(t)[0] for t in (rate + step, rate - step))
        quotient = (float(after) - float(before)) / (2 * step)
        assert np.isclose(value_and_derivative(rate)[1], quotient, rtol=1e-6)


# ------------------------------------------------------------------- what it refuses

REFUSED = {
    "optimizer": ({"optimizer": "adam"}, TypeError, "an optax .* got str"),
    "steps": (
        {"num_steps": -1},
        ValueError,
        "num_steps .* integer >= 0 and less than .*, got -1",
    ),
    "many steps": ({"num_steps": 2**31}, ValueError, r"less than 2\*\*31, got"),
    "half a step": ({"num_steps": 1.5}, TypeError, "num_steps .* >= 0 .*, got 1.5"),
    "no rows": ({"batch_size": 0}, ValueError, "batch_size .* from 1 to 37, .* got 0"),
    "too many": ({"batch_size": 38}, ValueError, "batch_size .* 1 to 37, .* got 38"),
    "every": ({"evaluate_every": -1}, ValueError, "evaluate_every .* got -1"),
    "patience": (
        {"patience": 0},
        ValueError,
        "patience .* integer >= 1 and less than .*, got 0",
    ),
    "never evaluated": (
        {"patience": 2},
        ValueError,
        "expected evaluate_every with patience=2, got None",
    ),
    "callback": (
        {"callback": lambda step: None},
        TypeError,
        r"callback to be .* function of \(step, train_loss, .* \(too many positional",
    ),
    "precision": (
        {"precision": "best"},
        ValueError,
        "precision to be None or a precision of .*, such as .* got 'best'",
    ),
    "number": ({"precision": 3}, TypeError, "precision to be None or a string, got"),
    "inf": ({"min_delta": 1e39}, ValueError, "min_delta to be finite and >= 0, got"),
    "pair": ({"validation": jnp.ones((5, 5))}, TypeError, "validation to be a tuple"),
    "weights": ({"sample_weight": jnp.ones(3)}, ValueError, "sample_weight of shape"),
    "p": ({"pos_weight": jnp.ones(3)}, ValueError, "pos_weight of shape"),
    "labels": (
        {"validation": (jnp.ones((5, 5)), jnp.ones(5))},
        ValueError,
        r"validation\[1\] of shape .* got \(5,\)",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_argument_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        fit(*arguments(dtype="float32"), **options)


def test_a_key_that_is_none_is_refused():
    params, x, y = arguments(dtype="float32")
    bad: Any = 3
    with pytest.raises(TypeError, match=r"key to be a random key, .* got int"):
        jaxbce.fit(bad, params, x, y, optimizer=ADAM, num_steps=1)


def test_a_result_of_another_optimizer_is_refused():
    params, x, y = arguments(dtype="float32")
    # The last two have states of the same shapes, in different named tuples.
    for before, after in (
        (optax.sgd(0.1), optax.adam(0.1)),
        (
            optax.sgd(0.1, momentum=0.9),
            optax.chain(optax.scale_by_rss(), optax.scale(-1)),
        ),
    ):
        run = fit(params, x, y, optimizer=before)
        with pytest.raises(ValueError, match=r"to be the FitResult of .* opt_state"):
            fit(run, x, y, optimizer=after)


def test_a_run_is_resumed_with_validation_only_if_it_had_validation():
    params, x, y = arguments(dtype="float32")
    other: Any = {"validation": (x[:9], y[:9])}
    for before, after in (({}, other), (other, {})):
        run = fit(params, x, y, **before)
        with pytest.raises(ValueError, match="expected to resume the run as it began"):
            fit(run, x, y, **after)
    assert fit(fit(params, x, y, num_steps=0), x, y, **other).step > 0


def test_labels_of_another_shape_are_refused():
    params, x, y = arguments(dtype="float32")
    with pytest.raises(ValueError, match=r"y of shape .* got \(37,\)"):
        fit(params, x, y.ravel())


def test_what_follows_a_line_search_does_not_leave_it_a_stale_gradient():
    with jax.enable_x64(True):
        params, x, y = arguments()
        search = optax.scale_by_zoom_linesearch(10)
        optimizer = optax.chain(optax.sgd(1.0), search, optax.scale(0.5))

        def loss(params):
            return loss_reference(params, x, y)

        @jax.jit
        def step(params, state):
            value, grads = jax.value_and_grad(loss)(params)
            given = {"value": value, "grad": grads, "value_fn": loss}
            updates, state = optimizer.update(grads, state, params, **given)
            return optax.apply_updates(params, updates), state

        run = fit(params, x, y, optimizer=optimizer, num_steps=3)
        state = optimizer.init(params)
        for _ in range(3):
            params, state = step(params, state)
        assert relative_error(run.params, params) <= 1e-10


def test_one_bad_row_freezes_a_run_where_it_is_met():
    params, x, y = arguments(dtype="float32")
    options = {"batch_size": 8, "validation": (x.copy(), y)}
    x[order_of(0, rows=37)[20], 0] = np.nan  # of the third batch of five
    run = fit(params, x, y, num_steps=20, evaluate_every=5, **options)
    at = int(run.diverged_at)
    assert at == 2
    before = fit(params, x, y, num_steps=at, **options)
    assert equal(run.params, before.params)  # later batches are finite
    assert run.best_step == 0  # though the validation loss is finite
    first, *rest = run.validation_loss.tolist()
    assert np.isfinite(first)
    assert np.isinf(rest).all()  # nothing is evaluated any more


def test_weights_of_any_size_are_relative():
    params, x, y = arguments(dtype="float32")
    s = problem((5, 4, 1)).sample_weight.astype("f")
    runs = [fit(params, x, y, sample_weight=np.float32(c) * s) for c in (1, 2.0**125)]
    runs = [run.params for run in runs]
    assert equal(*runs)


@pytest.mark.parametrize("every", [2**31 - 1, 7])
def test_an_evaluation_may_be_asked_for_later_than_the_end(every):
    params, x, y = arguments(dtype="float32")
    first = fit(params, x, y, num_steps=5, patience=2**31 - 1)
    run = fit(first, x, y, num_steps=5, evaluate_every=every)
    assert run.step == 10
    assert run.train_loss.shape == (1,)


# -------------------------------------------------- one derivation, and what is added


@pytest.mark.parametrize("batch_size", [None, 8, 1], ids=["columns", "batches", "rows"])
def test_a_penalty_is_added_to_the_hand_derived_gradient(batch_size):
    def penalty(params):
        return 0.05 * sum(jnp.sum(jnp.square(layer.w)) for layer in params)

    def penalized(params, x, y, **options):
        return loss_reference(params, x, y, **options) + penalty(params)

    with jax.enable_x64(True):
        params, x, y = arguments()
        options = {"batch_size": batch_size, "evaluate_every": 5, "optimizer": SGD}
        run = fit(params, x, y, penalty=penalty, **options)
        truth = fit(params, x, y, loss=penalized, **options)
        assert relative_error(run.params, truth.params) <= 1e-12
        # The reported losses are without it.
        last = jaxbce.loss(run.params, x, y)
        np.testing.assert_allclose(run.train_loss[-1], last, rtol=1e-12)


def test_a_line_search_sees_the_penalty():
    seen = []

    def update(grads, state, params, *, value, value_fn, **_: Any) -> Any:
        seen.append(1)
        gap = value_fn(params) - value
        return jax.tree.map(lambda g: 0 * g + gap, grads), state

    functions: Any = (lambda _: ()), update
    optimizer = optax.GradientTransformationExtraArgs(*functions)
    with jax.enable_x64(True):
        params, x, y = arguments()
        run = fit(
            params, x, y, optimizer=optimizer, penalty=optax.tree.norm, num_steps=1
        )
        assert seen
        assert relative_error(run.params, params) <= 1e-14


def triple_all_but_the_last(honest):
    def pull_back(params, activations, delta, *layout):
        *first, last = honest(params, activations, delta, *layout)
        return (*(3 * d for d in first), last)

    return pull_back


def triple(honest):
    return lambda *args: jax.tree.map(lambda g: 3 * g, honest(*args))


@pytest.mark.slow_ids("rows-", "ones-")
@pytest.mark.parametrize(
    ("name", "corrupt", "factors"),
    [("pull_back", triple_all_but_the_last, (3, 1)), ("contract", triple, (3, 3))],
    ids=["pull_back", "contract"],
)
@pytest.mark.parametrize(
    ("rows", "layout"),
    [
        (19, _layouts.Columns(5)),
        (1, _layouts.ROWS),
        (18, _layouts.Columns(5, has_ones=False)),
    ],
    ids=["columns", "rows", "columns without ones"],
)
def test_training_follows_the_one_derivation(
    monkeypatch, rows, layout, name, corrupt, factors
):
    """Corrupting it corrupts `fit` and `sweep` in the same way as `value_and_grad`."""
    if layout == _layouts.Columns(5, has_ones=False):
        assert _layouts.for_training(rows, 5, "gpu") == layout
        monkeypatch.setattr(_layouts, "for_training", lambda *_: layout)
    assert _layouts.for_training(rows, 5, "cpu") == layout
    sgd = optax.sgd(1.0)
    with jax.enable_x64(True):
        _, x, y = arguments(rows=19)
        x, y = x[:rows], y[:rows]
        params = jaxbce.init(
            jax.random.split(jax.random.fold_in(KEY, 0))[0], (5, 4, 1), dtype="float64"
        )
        truth = jaxbce.grad(params, x, y)
        with monkeypatch.context() as patched:
            patched.setattr(gradients, name, corrupt(getattr(gradients, name)))
            _traced.jitted.cache_clear()
            jax.clear_caches()
            after = fit(params, x, y, optimizer=sgd, num_steps=1).params
            swept = jaxbce.sweep(
                KEY,
                x,
                y,
                hidden=(4,),
                make_optimizer=lambda hp: optax.sgd(hp["rate"]),
                hparams={"rate": [1.0, 2.0]},
                num_steps=1,
                dtype="float64",
            ).params
            by_hand = jaxbce.grad(params, x, y)
        _traced.jitted.cache_clear()
        jax.clear_caches()
        wrong = tuple(
            jax.tree.map(lambda g, f=f: f * g, layer)
            for layer, f in zip(truth, factors, strict=True)
        )
        member = jax.tree.map(lambda t: t[0, 0], swept)
        for found in (after, member):
            followed = jax.tree.map(lambda a, b: np.asarray(a - b), params, found)
            assert relative_error(followed, wrong) <= 1e-12
        assert relative_error(by_hand, wrong) <= 1e-12


# ------------------------------------------------------------- many runs, strict modes


def memory_maps():
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_many_runs_with_other_numbers_compile_once_in_constant_memory():
    params, x, y = arguments(dtype="float32")

    def run(rate: Any):
        schedule = optax.cosine_decay_schedule(rate, 100)
        optimizer = optax.chain(optax.clip_by_global_norm(9.0), optax.adamw(schedule))
        return fit(params, x, y, optimizer=optimizer, num_steps=3, batch_size=8)

    first = run(0.5)
    before = memory_maps()
    runs = [run(0.5 + 0.01 * i) for i in range(1, 40)]
    assert memory_maps() <= before + 8  # a program takes many more
    assert not equal(first.params, runs[-1].params)

    # Likewise where the optimizer closes over tracers.
    def by_rate(rate: Any):
        return fit(params, x, y, optimizer=optax.adam(rate), num_steps=3).params

    rates = np.array([0.1, 0.2], np.float32)
    jax.vmap(by_rate)(rates)
    before = memory_maps()
    for i in range(1, 10):
        jax.vmap(by_rate)(rates * i)
    assert memory_maps() <= before + 8


def test_programs_that_were_not_used_for_long_are_freed():
    assert _traced.jitted.cache_info().maxsize == 64


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sgd: optax.apply_if_finite(sgd, 5),
        lambda sgd: optax.MultiSteps(
            sgd, 1, should_skip_update_fn=optax.skip_not_finite
        ),
    ],
    ids=["apply_if_finite", "MultiSteps"],
)
def test_a_wrapper_that_skips_bad_steps_has_its_say(wrap):
    params, x, y = arguments(rows=40, dtype="float32")
    order = np.asarray(order_of(0, rows=40)).reshape(5, 8)
    validation = (x.copy(), y)
    optimizer = wrap(SGD)
    good = [b for i, b in enumerate(order) if i != 2]
    x[order[2][3], 0] = np.nan  # of the third batch of five
    run = fit(
        params,
        x,
        y,
        optimizer=optimizer,
        num_steps=5,
        batch_size=8,
        evaluate_every=4,
        validation=validation,
    )
    assert run.diverged_at == 4  # the training loss at the first evaluation
    truth, state = params, SGD.init(params)
    for batch in good[:3]:
        grads = jaxbce.grad(truth, x[batch], y[batch])
        updates, state = SGD.update(grads, state)
        truth: Any = optax.apply_updates(truth, updates)
    assert relative_error(run.params, truth) <= 1e-6


def test_params_and_state_stay_finite_where_a_wrapper_gives_up():
    params, x, y = arguments(dtype="float32")
    x[0, 0] = np.nan
    optimizer: Any = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 1)
    run = fit(params, x, y, optimizer=optimizer)
    assert run.diverged_at == 1  # it skips step 0
    assert equal(run.params, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.opt_state))


def test_a_weight_of_zero_ignores_whatever_the_features_and_labels_are():
    params, x, y = arguments(dtype="float32")
    # Features of 3e38 give hidden units of inf, and their difference is NaN.
    first, last = params
    last = last._replace(w=jnp.abs(last.w) * np.array([[1], [-1], [1], [-1]], "f"))
    params = (first._replace(w=jnp.abs(first.w) + 1), last)
    weight = np.ones(len(x), np.float32)
    weight[::5] = 0
    kept = weight > 0
    truth = fit(params, x, y, sample_weight=weight)
    unweighted = fit(params, x, y)
    for bad in (1e20, 3e38, np.inf, np.nan):
        worse = (
            np.where(kept[:, None], x, np.float32(bad)),
            np.where(kept[:, None], y, np.float32(np.nan)),
        )
        validation = (*worse, weight)
        for examples, s, expected in (
            (worse, weight, truth),
            ((x, y), None, unweighted),
        ):
            run = fit(params, *examples, sample_weight=s, validation=validation)
            assert equal(run.params, expected.params)
            assert run.diverged_at == -1
            alone = jaxbce.loss(run.params, x[kept], y[kept])
            np.testing.assert_allclose(run.validation_loss[-1], alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "at"),
    [(ADAM, 0), (optax.apply_if_finite(SGD, 5), 20)],
    ids=["at the step", "at the evaluation"],
)
def test_a_negative_loss_is_a_divergence_under_tracing(optimizer, at):
    params, x, _ = arguments(dtype="float32")
    y = np.where(jaxbce.logits(params, x) > 0, 2, -1)
    run = jax.jit(lambda y: fit(params, x, y, optimizer=optimizer))(y)
    assert run.diverged_at == at


@pytest.mark.parametrize("name", ["penalty", "loss"])
def test_a_loss_of_the_users_that_is_not_finite_is_a_divergence(name):
    params, x, y = arguments(dtype="float32")

    def infinite(*_, **__):
        return jnp.float32(jnp.inf)

    options: Any = {name: infinite}
    run = fit(params, x, y, **options)
    assert run.diverged_at == 0
    assert equal(run.params, params)


def test_an_improvement_below_min_delta_does_not_count():
    params, x, y = arguments(dtype="float32")
    options: Any = {"num_steps": 60, "evaluate_every": 5}
    losses = fit(params, x, y, **options).train_loss.tolist()
    assert all(a > b for a, b in itertools.pairwise(losses))
    delta = (losses[0] - losses[-1]) / 2.5  # two improvements
    best, at = np.inf, 0
    for i, loss in enumerate(losses):
        if loss < best - delta:
            best, at = loss, 5 * (i + 1)
    run = fit(params, x, y, min_delta=delta, **options)
    assert run.best_step == at
    assert np.isclose(run.best_loss, best)
    stopped = fit(params, x, y, min_delta=1.0, patience=10, **options)
    assert stopped.step == 15  # the first evaluation is the best, at step 5


def test_a_callback_hears_each_evaluation_in_order():
    params, x, y = arguments(dtype="float32")
    heard = []
    options = {"num_steps": 10, "evaluate_every": 4, "callback": heard_by(heard)}
    run = fit(params, x, y, **options)
    jax.effects_barrier()
    assert [step for step, _, _ in heard] == [4, 8, 10]
    np.testing.assert_array_equal([t for _, t, _ in heard], run.train_loss)
    assert {v for _, _, v in heard} == {None}
    assert {tuple(map(type, h)) for h in heard} == {(int, float, type(None))}

    heard.clear()
    run = jax.jit(lambda x: fit(params, x, y, validation=(x, y), **options))(x)
    jax.effects_barrier()
    np.testing.assert_array_equal([v for _, _, v in heard], run.validation_loss)

    heard.clear()
    rates = np.array([0.1, 1e30], np.float32)  # the second diverges at once
    runs = jax.vmap(lambda r: fit(params, x, y, optimizer=optax.sgd(r), **options))(
        rates
    )
    jax.effects_barrier()
    finite = [loss for loss in np.ravel(runs.train_loss) if np.isfinite(loss)]
    assert sorted(t for _, t, _ in heard if np.isfinite(t)) == sorted(finite)
    assert len(heard) == len(finite) + 1  # nothing after it has diverged


def heard_by(heard):
    return lambda *args: heard.append(args)


def test_no_nan_stands_for_a_value_that_is_absent():
    params, x, y = arguments(dtype="float32")
    with jax.debug_nans(True):
        run = fit(
            params, x, y, num_steps=30, evaluate_every=5, patience=5, batch_size=8
        )
        result = jaxbce.sweep(
            KEY,
            x,
            y,
            hidden=(4,),
            make_optimizer=lambda hp: optax.sgd(hp["rate"]),
            hparams={"rate": [0.1, 1e30]},
            num_steps=20,
            evaluate_every=5,
        )
    for losses in (run.train_loss, result.train_loss):
        assert not np.isnan(losses).any()
    assert np.isinf(result.train_loss[1, 0, -1])
    assert result.validation_loss.shape == (2, 1, 0)


def test_a_run_of_no_steps_is_a_valid_carry():
    params, x, y = arguments(dtype="float32")
    start = fit(params, x, y, num_steps=0)
    assert start.train_loss.shape == (0,)

    def section(run, _):
        result = fit(run, x, y, num_steps=5)
        losses = {"train_loss": run.train_loss, "validation_loss": run.validation_loss}
        return result._replace(**losses), result.train_loss

    last, losses = jax.lax.scan(section, start, None, length=4)
    truth = fit(params, x, y, num_steps=20, evaluate_every=5)
    assert relative_error(last.params, truth.params) <= 1e-6
    np.testing.assert_allclose(losses[:, 0], truth.train_loss, rtol=1e-6)


def test_a_state_that_begins_with_inf_is_no_divergence():
    params, x, y = problem((3, 4, 1)).arguments(np.float32)
    optimizer = optax.chain(
        optax.zero_nans(),
        optax.adam(1e-2),
        optax.contrib.reduce_on_plateau(accumulation_size=3),
    )
    run = jaxbce.fit(jax.random.key(0), params, x, y, optimizer=optimizer, num_steps=4)
    assert int(run.diverged_at) == -1
    assert int(run.step) == 4


def test_a_traced_min_delta_is_refused():
    params, x, y = arguments(dtype="float32")
    with pytest.raises(TypeError, match="min_delta to be a known number, got a traced"):
        jax.vmap(lambda least: fit(params, x, y, min_delta=least))(jnp.zeros(2))


def test_copies_in_a_short_batch_do_not_overflow():
    params = (
        jaxbce.Layer(jnp.array([[0.5, 0.5]]), jnp.zeros(2)),
        jaxbce.Layer(jnp.array([[1.0], [-2.0]]), jnp.zeros(1)),
    )
    x, y = jnp.array([[3e38], [0.0], [0.0]]), jnp.ones((3, 1))

    def order(seed):
        key = jax.random.fold_in(jax.random.key(seed), 0)
        return jax.random.permutation(key, 3).tolist()

    # The copy in the second batch is of the first example, which overflows by then.
    seed = next(seed for seed in range(100) if order(seed)[1] == 0)
    options = {"optimizer": optax.sgd(1e-37), "num_steps": 2, "batch_size": 2}
    run = jaxbce.fit(jax.random.key(seed), params, x, y, **options)
    for batch in (order(seed)[:2], order(seed)[2:]):
        grads = jaxbce.grad(params, x[jnp.array(batch)], y[jnp.array(batch)])
        params = jax.tree.map(lambda p, g: p - 1e-37 * g, params, grads)
    assert np.isinf(jaxbce.forward(params, x).h[1]).any()
    for found, expected in zip(
        jax.tree.leaves(run.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_a_penalty_returns_is_checked():
    params, x, y = problem((3, 4, 1)).arguments(np.float32)
    wrong: Any = (lambda p: p[0].b, lambda p: None, lambda p: jnp.int32(1))
    for penalty in wrong:
        with pytest.raises(TypeError, match="expected penalty to return a floating"):
            jaxbce.fit(
                jax.random.key(0),
                params,
                x,
                y,
                optimizer=optax.sgd(0.1),
                num_steps=1,
                penalty=penalty,
            )
