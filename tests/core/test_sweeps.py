"""`grid` and `sweep`: members are solo runs, wherever and with whomever they train."""

import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbce
from jaxbce import _groups, _traced, sweeps
from tests.helpers import member, problem, relative_error

KEY = jax.random.key(3)


pytestmark = pytest.mark.usefixtures("standard_promotion")


def data(rows=37, sizes=(5, 4, 1), dtype="float64"):
    _, x, y, _ = problem(sizes, rows=rows)
    return x.astype(dtype), np.round(y).astype(dtype)


def sgd(hp):
    return optax.sgd(hp["learning_rate"])


def adamw(hp):
    return optax.adamw(hp["learning_rate"], weight_decay=hp["weight_decay"])


def per_layer(hp):
    """A learning rate a layer, and a schedule of traced length."""

    def falling(t):
        return hp["learning_rate"] * (
            1 - jnp.minimum(jnp.asarray(t, float) / hp["decay_steps"], 1)
        )

    each: Any = {"hidden": optax.adam(falling), "output": optax.adam(hp["output_rate"])}
    return optax.partition(each, ("hidden", "output"))


def solo(x, y, hp, seed, *, hidden, make_optimizer, dtype="float64", **options):
    """The member as the docstring of `sweep` makes it."""
    key_params, key_rows = jax.random.split(jax.random.fold_in(KEY, seed))
    params = jaxbce.init(key_params, (x.shape[1], *hidden, y.shape[1]), dtype=dtype)
    scale = hp.get("init_scale", 1.0)
    params = tuple(layer._replace(w=scale * layer.w) for layer in params)
    smoothing = hp.get("label_smoothing", 0.0)
    options["pos_weight"] = hp.get("pos_weight", options.get("pos_weight", 1.0))
    return jaxbce.fit(
        key_rows,
        params,
        x,
        y * (1 - smoothing) + smoothing / 2,
        optimizer=make_optimizer(hp),
        **options,
    )


CASES = {
    "sgd": (sgd, {"learning_rate": [0.01, 0.1, 1.0]}, {}),
    "full batch": (sgd, {"learning_rate": [0.01, 0.1]}, {"batch_size": None}),
    "adamw": (
        adamw,
        jaxbce.grid(learning_rate=[0.01, 0.1], weight_decay=[0.0, 0.1]),
        {"patience": 5, "pos_weight": 1.5},
    ),
    "per layer, three outputs": (
        per_layer,
        {
            "learning_rate": [0.01, 0.1, 0.05],
            "output_rate": [0.1, 0.1, 0.01],
            "decay_steps": [10, 20, 30],
        },
        {"sizes": (5, 4, 3)},
    ),
    "of the sweep itself": (
        sgd,
        {
            "learning_rate": [0.1, 0.2, 0.1],
            "init_scale": [0.5, 1.0, 2.0],
            "pos_weight": [1.0, 2.0, 0.5],
            "label_smoothing": [0.0, 0.1, 0.2],
        },
        {},
    ),
    "deep": (sgd, {"learning_rate": [0.01, 0.1]}, {"hidden": (6, 5, 4)}),
    "seeds alone": (lambda hp: optax.adam(0.01), {}, {"hidden": ()}),
}


@pytest.mark.slow_ids("deep", "per layer", "seeds alone")
@pytest.mark.parametrize(("make", "hparams", "given"), CASES.values(), ids=CASES)
def test_every_member_is_its_solo_run(make, hparams, given):
    given = dict(given)
    sizes = given.pop("sizes", (5, 4, 1))
    hidden = given.pop("hidden", (4,))
    with jax.enable_x64(True):
        x, y = data(sizes=sizes)
        options: Any = {"num_steps": 30, "batch_size": 8, "evaluate_every": 10}
        options |= {"validation": (x[:9] + 0.1, y[:9])} | given
        common: Any = {"hidden": hidden, "make_optimizer": make, "dtype": "float64"}
        found = jaxbce.sweep(
            KEY, x, y, hparams=hparams, num_seeds=2, first_seed=5, **common, **options
        )
        points = len(next(iter(hparams.values()), [0]))
        assert found.train_loss.shape == (points, 2, 3)
        alone = jax.jit(lambda hp, seed: solo(x, y, hp, seed, **common, **options))
        for i in range(points):
            hp = {name: np.asarray(v)[i] for name, v in hparams.items()}
            for s in range(2):
                run = alone(hp, np.uint32(5 + s))
                mine = member(found, i, s)
                assert relative_error(mine.params, run.params) <= 1e-10
                assert mine.step == run.step
                assert mine.diverged_at == run.diverged_at
                if "pos_weight" in hparams:  # judged by a loss of its own
                    for loss, sets in (
                        (mine.train_loss, (x, y)),
                        (mine.validation_loss, options["validation"]),
                    ):
                        truth = jaxbce.loss(mine.params, *sets)
                        np.testing.assert_allclose(loss[-1], truth, rtol=1e-10)
                    continue
                assert relative_error(mine.best_params, run.best_params) <= 1e-10
                for name in ("train_loss", "validation_loss", "best_loss"):
                    a, b = getattr(mine, name), getattr(run, name)
                    np.testing.assert_allclose(a, b, rtol=1e-10)
                assert mine.best_step == run.best_step


# ------------------------------------------------------------- groups and devices


def rates(count, **options):
    return {"learning_rate": np.geomspace(1e-3, 1.0, count)} | options


SMALL: Any = {"hidden": (4,), "make_optimizer": sgd, "num_steps": 12, "batch_size": 8}


@pytest.mark.slow_ids("1", "64")
@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_groups_of_any_size_give_the_same_members(group_size):
    with jax.enable_x64(True):
        x, y = data()
        options = SMALL | {"hparams": rates(7), "num_seeds": 3, "dtype": "float64"}
        truth = jaxbce.sweep(KEY, x, y, **options, group_size=2)
        found = jaxbce.sweep(KEY, x, y, **options, group_size=group_size)
        assert relative_error(found.params, truth.params) <= 1e-10
        np.testing.assert_allclose(found.train_loss, truth.train_loss, rtol=1e-10)


def test_two_devices_give_what_one_gives():
    with jax.enable_x64(True):
        x, y = data()
        options = SMALL | {"hparams": rates(5), "num_seeds": 2, "dtype": "float64"}
        one = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
        truth = jaxbce.sweep(KEY, x, y, **options, mesh=one)
        found = jaxbce.sweep(KEY, x, y, **options)
        assert jax.device_count() == 2
        assert relative_error(found.params, truth.params) <= 1e-10


@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
def test_a_mesh_that_the_caller_has_set_changes_nothing(axis_type):
    x, y = data(rows=38, dtype="float32")
    options = SMALL | {"hparams": rates(5), "num_seeds": 2}
    truth = jaxbce.sweep(KEY, x, y, **options)
    axis_types = (jax.sharding.AxisType[axis_type],)
    mesh = jax.make_mesh((2,), ("examples",), axis_types=axis_types)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P("examples"))
        x, y = jax.device_put((x, y), sharding)
        for chosen in (None, mesh):
            found = jaxbce.sweep(KEY, x, y, **options, mesh=chosen)
            np.testing.assert_array_equal(found.train_loss, truth.train_loss)
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh


def test_parts_of_a_sweep_are_the_sweep():
    x, y = data(dtype="float32")
    options = SMALL | {"group_size": 2}
    whole = jaxbce.sweep(KEY, x, y, hparams=rates(4), num_seeds=3, **options)
    part = {name: v[1:3] for name, v in rates(4).items()}
    found = jaxbce.sweep(KEY, x, y, hparams=part, num_seeds=2, first_seed=1, **options)
    mine = jax.tree.map(lambda t: t[1:3, 1:], whole.params)
    assert relative_error(found.params, mine) <= 1e-5


def test_points_share_what_seeds_do_not():
    x, y = data(dtype="float32")
    same = {"learning_rate": np.full(2, 0.1)}
    found = jaxbce.sweep(KEY, x, y, hparams=same, num_seeds=2, **SMALL)
    w = found.params[0].w
    assert np.array_equal(w[0], w[1])
    assert not np.allclose(w[:, 0], w[:, 1])


def test_the_program_is_compiled_once_whatever_the_members():
    x, y = data(dtype="float32")
    traces = []

    def counted(hp):
        traces.append(1)
        return sgd(hp)

    options = SMALL | {"group_size": 4, "make_optimizer": counted}
    for points in (64, 8, 32):
        jaxbce.sweep(KEY, x, y, hparams=rates(points), **options)
    assert len(traces) == 2  # of init and of update


def test_memory_that_runs_out_halves_the_group_and_keeps_what_is_done(monkeypatch):
    x, y = data(dtype="float32")
    honest, sizes = sweeps._train, []

    def limited(seeds, values, *rest, **options):
        sizes.append(values["learning_rate"].shape[1] * seeds.shape[1])
        if len(sizes) > 1 and sizes[-1] > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return honest(seeds, values, *rest, **options)

    truth = jaxbce.sweep(KEY, x, y, hparams=rates(16), group_size=4, **SMALL)
    monkeypatch.setattr(sweeps, "_train", limited)
    with pytest.warns(RuntimeWarning, match="group of 4 members does not") as warned:
        found = jaxbce.sweep(KEY, x, y, hparams=rates(16), group_size=4, **SMALL)
    assert warned[0].filename == __file__  # the line that calls sweep
    assert sizes == [4, 4, 2, 2]
    assert relative_error(found.params, truth.params) <= 1e-5


def test_a_group_of_several_seeds_is_halved_without_losing_one(monkeypatch):
    x, y = data(dtype="float32")
    honest = sweeps._train

    def limited(seeds, values, *rest, **options):
        if values["learning_rate"].shape[1] * seeds.shape[1] > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return honest(seeds, values, *rest, **options)

    options = SMALL | {"hparams": rates(2), "num_seeds": 6}
    truth = jaxbce.sweep(KEY, x, y, group_size=2, **options)
    monkeypatch.setattr(sweeps, "_train", limited)
    with pytest.warns(RuntimeWarning, match="a group of 6 members does not fit"):
        found = jaxbce.sweep(KEY, x, y, group_size=6, **options)
    assert relative_error(found.params, truth.params) <= 1e-5


def test_a_prepared_sweep_has_the_program_and_arguments_that_sweep_runs(monkeypatch):
    x, y = data(dtype="float32")
    honest, calls = sweeps._train, []

    def recorded(*args, plan):
        calls.append((args, plan))
        return honest(*args, plan=plan)

    def adam(hp):
        return optax.adam(hp["learning_rate"])

    options = SMALL | {"hparams": rates(6), "make_optimizer": adam}
    monkeypatch.setattr(sweeps, "_train", recorded)
    result = jaxbce.sweep(KEY, x, y, group_size=3, **options)
    prepared = sweeps.prepare(KEY, x, y, group_size=3, **options)
    function, shapes = sweeps.program(prepared)
    (args, plan), *others = calls
    assert len(prepared.groups) == len(args[0]) * (1 + len(others))
    assert plan == prepared.plan
    for arg, shape in zip(*map(jax.tree.leaves, (args, shapes)), strict=True):
        aval = jax.typeof(arg)
        assert (aval.shape, aval.dtype) == (shape.shape, shape.dtype)
        assert aval.weak_type == shape.weak_type
    trained = function.lower(*shapes).compile()(*args)
    losses = np.concatenate([np.ravel(group) for group in trained.train_loss])
    np.testing.assert_array_equal(losses, np.ravel(result.train_loss)[: len(losses)])


def test_a_device_that_is_only_compiled_for_limits_no_group():
    class Device:
        platform, process_index = "gpu", jax.process_index()

        def memory_stats(self):
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: MemoryStats")

    devices = np.array([Device()])
    members = sweeps.max_members_per_device((30, 16, 1), "float32", 9, None, devices)
    assert members == _groups.MAX_MEMBERS_ELSEWHERE


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def broken(*args, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    x, y = data(dtype="float32")
    monkeypatch.setattr(sweeps, "_train", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        jaxbce.sweep(KEY, x, y, hparams=rates(4), **SMALL)


def test_without_parameters_only_losses_are_returned():
    x, y = data(dtype="float32")
    found = jaxbce.sweep(KEY, x, y, hparams=rates(2), keep_params=False, **SMALL)
    assert found.params is None
    assert found.best_params is None
    truth = jaxbce.sweep(KEY, x, y, hparams=rates(2), **SMALL)
    assert np.array_equal(found.train_loss, truth.train_loss)


@pytest.mark.parametrize("hidden", [(4,), (16,), (7, 5)], ids=str)
def test_a_member_that_diverges_leaves_the_others_as_they_are_to_the_bit(hidden):
    x, y = data(dtype="float32")
    options = SMALL | {"hidden": hidden, "num_seeds": 2, "num_steps": 40}
    calm = np.geomspace(1e-3, 0.3, 8)
    wild = calm.copy()
    wild[[2, 5]] = 1e6, np.inf
    sick = jaxbce.sweep(KEY, x, y, hparams={"learning_rate": wild}, **options)
    well = jaxbce.sweep(KEY, x, y, hparams={"learning_rate": calm}, **options)
    assert (sick.diverged_at[5] > 0).all()
    assert (sick.diverged_at[2] > 0).any()  # or all its units have died
    healthy = np.setdiff1d(np.arange(8), [2, 5])
    assert (sick.diverged_at[healthy] == -1).all()
    for a, b in zip(jax.tree.leaves(sick), jax.tree.leaves(well), strict=True):
        np.testing.assert_array_equal(a[healthy], b[healthy])


class FakeTpu(NamedTuple):
    """A device of which only what `max_members_per_device` reads is there."""

    device_kind: str
    platform: str = "tpu"
    process_index: int = 0

    def memory_stats(self):
        return {"bytes_limit": 16 << 30}


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("TPU v5 lite", (30, 16, 1), 4096),  # with Adam, 8192 do not stay on the chip
        ("TPU v4", (30, 16, 1), 512),
        ("TPU v99", (30, 16, 1), 512),
        ("TPU v5 lite", (1024, 512, 1), 128),
    ],
)
def test_a_group_stays_on_the_chip_of_a_tpu_but_fills_its_lanes(kind, sizes, expected):
    devices = np.empty(1, object)
    devices[0] = FakeTpu(kind)
    members = sweeps.max_members_per_device(sizes, jnp.float32, 569, 32, devices)
    assert members == expected


@pytest.mark.parametrize(
    ("sizes", "expected"), [((30, 16, 1), 65536), ((1024, 512, 1), 325)]
)
def test_a_group_in_a_kernel_only_has_to_fit_in_the_memory_of_a_tpu(sizes, expected):
    devices = np.empty(1, object)
    devices[0] = FakeTpu("TPU v5 lite")
    arguments = sizes, jnp.float32, 569, 32, devices
    members = sweeps.max_members_per_device(*arguments, is_fused=True)
    assert members == expected
    # 8 GiB, for 12 times the parameters and activations of an evaluation.
    assert members * (12 * (sizes[0] + 2) * sizes[1] + 569 * (sizes[1] + 1)) < 1 << 31


HUNDRED_THOUSAND = """
import resource
import jax, numpy as np, optax, jaxbce
jax.config.update("jax_num_cpu_devices", 2)
x = jax.random.normal(jax.random.key(0), (569, 30))
found = jaxbce.sweep(
    jax.random.key(1), x, x[:, :1] > 0, hidden=(8,), num_steps=20, batch_size=32,
    make_optimizer=lambda hp: optax.sgd(hp["learning_rate"]),
    hparams={"learning_rate": np.geomspace(1e-4, 1, 100_000)})
assert found.params[0].w.shape == (100_000, 1, 30, 8)
assert (found.diverged_at == -1).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_hundred_thousand_members_take_less_than_four_gigabytes():
    command = [sys.executable, "-c", HUNDRED_THOUSAND]
    options: Any = {"capture_output": True, "text": True, "check": True}
    done = subprocess.run(command, timeout=600, **options)  # only against hanging
    assert int(done.stdout) < 4e6  # in kilobytes


# ------------------------------------------------------------------ what it refuses


def test_a_grid_is_every_combination_with_the_last_axis_fastest():
    points = jaxbce.grid(a=[1, 2], b=[0.1, 0.2, 0.3])
    assert points["a"].tolist() == [1, 1, 1, 2, 2, 2]
    assert points["b"].tolist() == [0.1, 0.2, 0.3] * 2


REFUSED = {
    "lengths": (
        {"hparams": {"a": [1.0], "b": [1.0, 2.0]}},
        ValueError,
        "of one length",
    ),
    "none": ({"hparams": {"a": []}}, ValueError, "hparams to be arrays"),
    "a list": ({"hparams": [0.1]}, TypeError, "hparams to be a dict .* got list"),
    "text": ({"hparams": {"a": ["x"]}}, TypeError, r"dtype of hparams\['a'\]"),
    "optimizer": ({"make_optimizer": 3}, TypeError, "make_optimizer .* got int"),
    "seeds": ({"num_seeds": 0}, ValueError, "num_seeds .* got 0"),
    "first": ({"first_seed": -1}, ValueError, "first_seed .* got -1"),
    "group": ({"group_size": 0}, ValueError, "group_size .* got 0"),
    "steps": ({"num_steps": -1}, ValueError, "num_steps .* got -1"),
    "hidden": ({"hidden": (0,)}, ValueError, "hidden to be integers >= 1"),
    "batch": ({"batch_size": 99}, ValueError, "batch_size .* got 99"),
    "precision": ({"precision": "best"}, ValueError, "precision to be .* got 'best'"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_argument_is_refused_by_name(options, error, message):
    x, y = data(dtype="float32")
    with pytest.raises(error, match=message):
        jaxbce.sweep(KEY, x, y, **({"hparams": rates(2)} | SMALL | options))


def test_an_axis_without_values_is_refused():
    with pytest.raises(ValueError, match=r"a to be a sequence .* got shape \(\)"):
        jaxbce.grid(a=0.1)
    with pytest.raises(ValueError, match="at least one axis"):
        jaxbce.grid()
    with pytest.raises(ValueError, match=r"x of shape \[N, n_0\], got \(3,\)"):
        jaxbce.sweep(KEY, jnp.ones(3), jnp.ones(3), hparams=rates(2), **SMALL)


# ------------------------------------------------- what is judged, read and heard


def test_a_hyperparameter_that_nothing_reads_is_an_error_that_names_it():
    x, y = data(dtype="float32")
    hparams = jaxbce.grid(learning_rate=[0.1], batch_size=[8, 16], pos_weight=[1.0])
    for _ in range(2):  # also of an optimizer that has been traced
        with pytest.raises(
            ValueError, match=r"expected all of hparams .* got batch_size"
        ):
            jaxbce.sweep(KEY, x, y, hparams=hparams, **SMALL)

    def late(hp):
        return optax.sgd(lambda t: jnp.asarray(hp["late"]))

    def whole(hp):
        return optax.adam(**hp)

    options: Any = SMALL | {"num_steps": 1}
    jaxbce.sweep(
        KEY, x, y, hparams={"late": [0.1]}, **options | {"make_optimizer": late}
    )
    read = {"learning_rate": [0.1], "b1": [0.8]}
    jaxbce.sweep(KEY, x, y, hparams=read, **options | {"make_optimizer": whole})


@pytest.mark.parametrize("validation", [True, False])
def test_all_members_are_judged_by_one_loss(validation):
    """A weight of 0 would otherwise win, and so would smoothed labels."""
    with jax.enable_x64(True):
        x, y = data()
        held_out = (x[:9] + 0.1, y[:9]) if validation else None
        hparams = jaxbce.grid(
            learning_rate=[0.3],
            pos_weight=[0.0, 0.5, 1.0, 10.0],
            label_smoothing=[0.0, 0.5],
        )
        found = jaxbce.sweep(
            KEY,
            x,
            y,
            hparams=hparams,
            pos_weight=2.0,
            validation=held_out,
            **SMALL | {"num_steps": 100, "dtype": "float64"},
        )
        best = np.argmin(found.best_loss[:, 0])
        assert hparams["pos_weight"][best] > 0
        for i in range(len(found.best_loss)):
            params = member(found, i, 0).best_params
            truth = jaxbce.loss(params, *(held_out or (x, y)), pos_weight=2.0)
            np.testing.assert_allclose(found.best_loss[i, 0], truth, rtol=1e-10)


def test_a_penalty_may_be_swept():
    def make_penalty(hp):
        return lambda params: hp["decay"] * optax.tree.norm(params, squared=True)

    with jax.enable_x64(True):
        x, y = data()
        options: Any = {"num_steps": 20, "batch_size": 8, "dtype": "float64"}
        found = jaxbce.sweep(
            KEY,
            x,
            y,
            hidden=(4,),
            make_optimizer=lambda hp: optax.sgd(0.1),
            make_penalty=make_penalty,
            hparams={"decay": [0.0, 0.1]},
            **options,
        )
        for i, decay in enumerate((0.0, 0.1)):
            run = solo(
                x,
                y,
                {},
                0,
                hidden=(4,),
                make_optimizer=lambda hp: optax.sgd(0.1),
                penalty=make_penalty({"decay": decay}),
                **options,
            )
            assert relative_error(member(found, i, 0).params, run.params) <= 1e-10


def test_a_callback_hears_the_number_of_members_done():
    x, y = data(dtype="float32")
    heard = []
    options: Any = SMALL | {"num_seeds": 3, "group_size": 4, "callback": heard.append}
    jaxbce.sweep(KEY, x, y, hparams=rates(5), **options)
    # The points of a seed are two groups of at most 4, one per device.
    assert heard == [5, 10, 15]


def test_fresh_functions_with_the_same_operations_are_one_program():
    x, y = data(dtype="float32")
    compiled = _traced.jitted.cache_info

    def run(factor):
        make = lambda hp: optax.sgd(factor * hp["learning_rate"])  # noqa: E731
        options: Any = SMALL | {"make_optimizer": make, "num_steps": 7}
        return jaxbce.sweep(KEY, x, y, hparams=rates(4), **options)

    first = run(0.5)
    before = compiled().misses
    runs = [run(0.5 + 0.1 * i) for i in range(1, 5)]
    assert compiled().misses == before
    assert not np.allclose(first.params[0].w, runs[-1].params[0].w)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, 2**31]),
        np.array([1, 2**32 + 1], np.uint64),
        np.array([-(2**31) - 1, 1]),
    ],
)
def test_integers_that_jax_would_wrap_are_refused(values):
    x, y = data(dtype="float32")
    with pytest.raises(ValueError, match=r"hparams\['v'\] to be integers from"):
        jaxbce.sweep(KEY, x, y, hparams={"v": values}, **SMALL)


def test_what_make_optimizer_and_make_penalty_return_is_checked():
    x, y = data(dtype="float32")
    wrong: Any = {
        "the result of make_optimizer": {"make_optimizer": lambda hp: None},
        "the result of make_penalty": {"make_penalty": lambda hp: 1.0},
    }
    for message, options in wrong.items():
        with pytest.raises(TypeError, match=message):
            jaxbce.sweep(KEY, x, y, hparams=rates(2), **{**SMALL, **options})


def test_a_sweep_inside_a_mesh_leaves_later_ones_as_they_are():
    x, y = np.ones((4, 2), "f"), np.array([[0], [1], [1], [0]], "f")

    def train():
        return jaxbce.sweep(
            jax.random.key(0),
            x,
            y,
            hidden=(2,),
            make_optimizer=make_optimizer,
            hparams={"rate": [0.1, 0.2]},
            num_steps=1,
        )

    def make_optimizer(hp):  # a new function, which no cache knows
        return optax.sgd(hp["rate"])

    with jax.set_mesh(jax.make_mesh((2,), ("d",))):
        inside = train()
    np.testing.assert_array_equal(inside.train_loss, train().train_loss)
