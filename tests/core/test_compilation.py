"""What the compiler sees: platforms, traces, work that is not asked for, devices."""

import contextlib
import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import jaxbce
from jaxbce import _layouts, curvature, gradients, laplace, per_example
from tests.helpers import member, problem, relative_error


@functools.cache
def traced_core(dtype, block_size):
    s = np.ones(37, "f")

    def core(params, x, y):
        options = {"sample_weight": s, "pos_weight": 2.0, "block_size": block_size}
        return (
            jaxbce.value_and_grad(params, x, y, **options),
            jax.grad(jaxbce.loss, argnums=(0, 1, 2))(params, x, y, **options),
            jaxbce.chain_rule(params, x, y),
            jaxbce.predict_proba(params, x),
            jaxbce.init(jax.random.key(0), (5, 4, 2), dtype=dtype),
        )

    return jax.jit(core).trace(*problem((5, 4, 2)).arguments(dtype))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [None, 8])
def test_the_core_lowers_for_accelerators(platform, dtype, block_size):
    lowered = traced_core(dtype, block_size).lower(lowering_platforms=(platform,))
    assert "dot_general" in lowered.as_text()


def test_blocks_are_those_of_the_platform_that_is_lowered_for():
    params = jax.eval_shape(lambda: jaxbce.init(jax.random.key(0), (2, 64, 1)))
    x, y = (jax.ShapeDtypeStruct((70_000, width), "float32") for width in (2, 1))
    traced = jaxbce.value_and_grad.trace(params, x, y)
    has_loop = {
        platform: "while" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert has_loop == {"cpu": True, "cuda": False, "tpu": False}


@functools.cache
def traced_per_example_work_and_curvature(dtype):
    def everything(params, x, y):
        return (
            per_example.grads(params, x, y),
            per_example.inner_products(params, x, y, x, y, block_size=8),
            per_example.clipped_value_and_grad(params, x, y, max_norm=1.0),
            per_example.scores(params, x, y),
            per_example.noise_scale(params, x, y),
            curvature.ntk(params, x, block_size=8),
            curvature.hvp(params, x, y, params),
            curvature.ggn_vp(params, x, y, params),
            curvature.ggn_eigenvalues(params, x, y, k=3),
            curvature.log_evidence(params, x, y, 1.0),
            curvature.kfac_factors(params, x),
            laplace_quantities(params, x, y),
        )

    return jax.jit(everything).trace(*problem((5, 4, 2)).arguments(dtype))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_per_example_work_and_curvature_lower_for_accelerators(platform, dtype):
    traced = traced_per_example_work_and_curvature(dtype)
    assert "dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_equal_shapes_are_traced_once(monkeypatch):
    traces = []
    honest = gradients.contract
    monkeypatch.setattr(
        gradients, "contract", lambda *args: traces.append(1) or honest(*args)
    )
    arguments = [  # of a shape that no other test has
        problem((2, 3, 1), rows=41, seed=seed).arguments(np.float32)
        for seed in range(3)
    ]
    for each in arguments:
        jaxbce.value_and_grad(*each)
        assert len(traces) == 1
    for weight in (2.0, 3.0):  # a Python number is an argument, not a constant
        jaxbce.value_and_grad(*arguments[0], pos_weight=weight)
    assert len(traces) == 2


def products(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


def test_only_the_gradients_asked_for_are_computed():
    params, x, y = problem((5, 6, 1)).arguments(np.float32)
    # Forward 2, backward 1, contraction 2; ∂/∂X is one more.
    assert products(jaxbce.value_and_grad, params, x, y) == 5
    assert products(jax.grad(jaxbce.loss), params, x, y) == 5
    assert products(jax.grad(jaxbce.loss, argnums=(0, 1)), params, x, y) == 6
    assert products(jaxbce.loss, params, x, y) == 2


@pytest.mark.parametrize("block_size", [None, 7])
def test_shard_map_over_rows_adds_up_to_the_batch(block_size):
    params, x, y = problem((5, 4, 1), rows=40).arguments(np.float32)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": (P(), P("i"), P("i")), "out_specs": P()}
    options = {"reduction": "sum", "block_size": block_size}

    def by_hand(params, x, y):
        return jax.lax.psum(jaxbce.value_and_grad(params, x, y, **options), "i")

    def through_loss(params, x, y):
        def total(params):
            return jax.lax.psum(jaxbce.loss(params, x, y, **options), "i")

        return jax.value_and_grad(total)(params)

    truth = jaxbce.value_and_grad(params, x, y, reduction="sum")
    for function in (by_hand, through_loss):
        found = jax.jit(jax.shard_map(function, **specs))(params, x, y)
        assert relative_error(found, truth) <= 1e-6


def test_nothing_relies_on_rank_promotion():
    params, x, y = problem((5, 4, 2)).arguments(np.float32)
    p: Any = np.array([1, 2], "f")
    with jax.numpy_rank_promotion("raise"):
        jaxbce.chain_rule(params, x, y)
        jax.grad(jaxbce.loss, (0, 1, 2))(params, x, y, pos_weight=p)
        jax.grad(lambda p: jaxbce.loss(params, x, y, pos_weight=p))(p)
        options: Any = {"pos_weight": p, "sample_weight": jnp.ones(37)}
        options |= {"optimizer": optax.sgd(0.1), "num_steps": 3, "batch_size": 8}
        jaxbce.fit(jax.random.key(0), params, x, y, **options)
        checked = jaxbce.check_gradients(
            jaxbce.value_and_grad, params, x, y, pos_weight=p
        )
        assert checked.passed


def laplace_quantities(params, x, y):
    """All of `laplace`; 14 examples have more logits than there are parameters."""
    posterior = laplace.posterior(params, x, y, (0.5, 2.0))
    last = laplace.posterior(params, x, y, 1.0, layers="last", sample_weight=y[:, 0])
    return (
        laplace.logit_covariance(posterior, x),
        laplace.predict_proba(last, x),
        laplace.influence(posterior, x, y),
        laplace.leave_one_out(posterior),
        laplace.log_evidence(last),
    )


QUANTITIES = {  # every public function of per_example, curvature and laplace
    "grads": per_example.grads,
    "norms": per_example.norms,
    "inner_products": lambda params, x, y: per_example.inner_products(
        params, x, y, x, y
    ),
    "clipped_value_and_grad": lambda params, x, y: per_example.clipped_value_and_grad(
        params, x, y, max_norm=0.5
    ),
    "scores": per_example.scores,
    "noise_scale": per_example.noise_scale,
    "ntk": lambda params, x, y: curvature.ntk(params, x),
    "hvp": lambda params, x, y: curvature.hvp(params, x, y, params),
    "ggn_vp": lambda params, x, y: curvature.ggn_vp(params, x, y, params),
    "kfac_factors": lambda params, x, y: curvature.kfac_factors(params, x),
    "laplace": laplace_quantities,
    "log_evidence": lambda params, x, y: curvature.log_evidence(params, x, y, 1.0),
    "ggn_eigenvalues": curvature.ggn_eigenvalues,
    "largest eigenvalues": lambda params, x, y: curvature.ggn_eigenvalues(
        params, x, y, k=2
    ),
}
EVERY_QUANTITY = pytest.mark.parametrize("name", QUANTITIES)


def small_problem(dtype="float32", rows=28):
    """26 parameters; 14 examples have enough logits for LOBPCG to find eigenvalues."""
    params, x, y = problem((3, 4, 2), rows=28, seed=1).arguments(dtype)
    return params, x[:rows], y[:rows]


@pytest.mark.slow_ids("laplace", "largest eigenvalues")
@EVERY_QUANTITY
def test_quantities_map_over_networks_and_devices(name):
    params, x, y = small_problem()
    networks = [params, jax.tree.map(lambda leaf: leaf / 2, params)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("i"), P("i")), out_specs=P("i")
    )
    def mapped(stacked, x, y):
        found = jax.vmap(QUANTITIES[name], (0, None, None))(stacked, x, y)
        return jax.tree.map(lambda leaf: leaf[None], found)

    found = jax.jit(mapped)(stacked, x, y)
    with jax.debug_nans(True):
        for i, shard in enumerate((slice(14), slice(14, 28))):
            for j, network in enumerate(networks):
                alone = QUANTITIES[name](network, x[shard], y[shard])
                assert_close(member(found, i, j), alone)


def fit(params, x, y, **options):
    options |= {"optimizer": optax.sgd(0.1, momentum=0.9), "evaluate_every": 3}
    result = jaxbce.fit(
        jax.random.key(0), params, x, y, validation=(x, y), num_steps=8, **options
    )
    return result.params, result.train_loss, result.validation_loss


WEIGHTED: Any = {"pos_weight": 2.0}
ON_A_MESH = QUANTITIES | {
    "loss": jaxbce.loss,
    "value_and_grad": functools.partial(jaxbce.value_and_grad, **WEIGHTED),
    "grad in blocks": lambda params, x, y: jaxbce.grad(
        params, x, y, block_size=5, sample_weight=1 + y[:, 0], reduction="sum"
    ),
    "grad of loss": lambda params, x, y: jax.grad(
        lambda *args: jaxbce.loss(*args[:3], sample_weight=args[3], pos_weight=args[4]),
        argnums=(0, 1, 2, 3, 4),
    )(params, x, y, 1 + y[:, 0], np.asarray(2, y.dtype)),
    "deltas": lambda params, x, y: jaxbce.deltas(params, jaxbce.forward(params, x), y),
    "chain_rule": jaxbce.chain_rule,
    "bce": lambda params, x, y: jaxbce.bce(jaxbce.predict_proba(params, x), y),
    "bce_with_logits": lambda params, x, y: jaxbce.bce_with_logits(
        jaxbce.logits(params, x), y, pos_weight=np.array([1.0, 2.0])
    ),
    "grad of ntk": lambda params, x, y: jax.grad(
        lambda params, x: jnp.sum(curvature.ntk(params, x) ** 2), argnums=(0, 1)
    )(params, x),
    "fit": lambda params, x, y: fit(params, x, y, sample_weight=1 + y[:, 0]),
    "fit, batches of 8": lambda params, x, y: fit(
        params, x, y, sample_weight=1 + y[:, 0], batch_size=8
    ),
    "fit, batches of 5": functools.partial(fit, batch_size=5),
}


@functools.cache
def on_one_device(name, rows):
    found = jax.jit(ON_A_MESH[name])(*small_problem("float64", rows))
    return jax.tree.map(np.asarray, found)


@pytest.mark.slow_ids("laplace-8", "batches of 5", "largest eigenvalues", "-Auto")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
@pytest.mark.parametrize(
    ("name", "rows"),
    [*((name, 28) for name in ON_A_MESH), ("ggn_eigenvalues", 8), ("laplace", 8)],
)
def test_examples_on_a_mesh_give_what_one_device_gives(name, rows, axis_type):
    axis_types = (jax.sharding.AxisType[axis_type],) * 2
    mesh = jax.make_mesh((2, 1), ("examples", "model"), axis_types=axis_types)
    with jax.enable_x64(True):
        truth = on_one_device(name, rows)
        params, x, y = small_problem("float64", rows)
        with jax.set_mesh(mesh):
            sharding = jax.NamedSharding(mesh, P("examples"))
            params = jax.device_put(params, jax.NamedSharding(mesh, P()))
            x, y = jax.device_put((x, y), sharding)
            found = jax.jit(ON_A_MESH[name])(params, x, y)
        assert relative_error(found, truth) <= 1e-12


@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
def test_each_device_computes_with_its_share_of_the_examples(axis_type):
    params, x, y = problem((5, 6, 1), rows=40).arguments(np.float32)
    axis_types = (jax.sharding.AxisType[axis_type],)
    mesh = jax.make_mesh((2,), ("examples",), axis_types=axis_types)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P("examples"))
        x, y = jax.device_put((x, y), sharding)
        for block_size, size in (("auto", 20), (7, 20 if axis_type == "Auto" else 7)):
            options = {"block_size": block_size}
            step = jax.jit(functools.partial(jaxbce.value_and_grad, **options))
            text = str(step.lower(params, x, y).compile().as_text())
            assert f"f32[{size},6]" in text
            assert "f32[40,6]" not in text
            assert "all-gather" not in text
        assert per_example.norms(params, x, y).sharding.is_equivalent_to(sharding, 1)


@pytest.mark.parametrize(("size", "axis"), [(8, "examples"), (5, None)])
def test_devices_share_a_batch_if_they_divide_it(size, axis):
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("examples",), axis_types=explicit)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P("examples"))
        x = jax.device_put(np.ones((40, 5), "f"), sharding)
        batch = _layouts.take(x, jnp.arange(size))
        assert jax.typeof(batch).sharding.spec == P(axis, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_A_MESH)
def test_functions_leak_no_tracers(name):
    with jax.checking_leaks():
        jax.eval_shape(ON_A_MESH[name], *small_problem())


@pytest.mark.parametrize("name", ON_A_MESH)
def test_functions_trace_in_strict_modes(name):
    def function(*arguments):  # a new function, which no cache knows
        return ON_A_MESH[name](*arguments)

    with jax.numpy_rank_promotion("raise"), jax.enable_x64(True):
        for dtype in ("float32", "float64"):
            found = jax.eval_shape(function, *small_problem(dtype))
            assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {dtype}


@pytest.mark.parametrize(
    "check_leaks",
    [contextlib.nullcontext, pytest.param(jax.checking_leaks, marks=pytest.mark.slow)],
)
def test_networks_train_together_in_strict_modes(check_leaks):
    with (
        jax.numpy_rank_promotion("raise"),
        jax.enable_x64(True),
        jax.debug_nans(True),
        check_leaks(),
    ):
        params, x, y = small_problem()
        key, rates = jax.random.key(0), jnp.array([0.1, 0.2], "float32")
        options: Any = {"num_steps": 7, "batch_size": 5, "evaluate_every": 3}
        options |= {"validation": (x, y)}

        @jax.vmap
        def train(rate):
            return jaxbce.fit(key, params, x, y, optimizer=optax.sgd(rate), **options)

        losses = train(rates).train_loss
        options |= {"hidden": (4,), "hparams": {"rate": rates}, "dtype": "float32"}
        options |= {"make_optimizer": lambda hp: optax.sgd(hp["rate"])}
        result = jaxbce.sweep(key, x, y, **options)
        even = np.arange(len(x)) % 2 == 0
        options |= {"make_sample_weight": lambda hp: even | (hp["rate"] > 9)}
        options |= {"make_labels": lambda hp, y: y / 2, "validation": "held_out"}
        by_fold = jaxbce.sweep(key, x, y, **options)
        p = jaxbce.ensemble_proba(by_fold.params, x)
    for found in (
        *(losses, result.train_loss, result.validation_loss),
        *(by_fold.train_loss, by_fold.validation_loss, p),
    ):
        assert found.dtype == "float32"
        assert np.isfinite(found).all()


def assert_close(mine, theirs):
    """Within 1e-4 of the largest entry of each leaf; infinite entries are equal."""
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        largest = np.max(np.abs(b), where=np.isfinite(b), initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * largest)


FIT: Any = {"optimizer": optax.sgd(0.1), "num_steps": 8, "evaluate_every": 3}


def weighted_fit(params, x, y):
    s = 1 + y[:, 0]
    options = {"validation": (x, y, s), "sample_weight": s}
    return jaxbce.fit(jax.random.key(0), params, x, y, **FIT, **options)


EXPORTED = (
    {name: QUANTITIES[name] for name in list(QUANTITIES)[:-2]}
    | {
        "forward": lambda params, x, y: jaxbce.forward(params, x),
        "logits": lambda params, x, y: jaxbce.logits(params, x),
        "predict_proba": lambda params, x, y: jaxbce.predict_proba(params, x),
        "ensemble_logits": lambda params, x, y: jaxbce.ensemble_logits(params, x),
        "weighted deltas": lambda params, x, y: jaxbce.deltas(
            params, jaxbce.forward(params, x), y, sample_weight=y[:, 0]
        ),
        "bce_with_logits": lambda params, x, y: jaxbce.bce_with_logits(
            jaxbce.logits(params, x), y, **WEIGHTED
        ),
        "weighted value_and_grad": lambda params, x, y: jaxbce.value_and_grad(
            params, x, y, sample_weight=1 + y[:, 0]
        ),
        "fit": lambda params, x, y: jaxbce.fit(jax.random.key(0), params, x, y, **FIT),
        "weighted fit": weighted_fit,
    }
    | {
        name: ON_A_MESH[name]
        for name in (
            *("loss", "value_and_grad", "grad in blocks", "grad of loss"),
            *("deltas", "chain_rule", "bce"),
        )
    }
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, "n") for name in EXPORTED), ("grad in blocks", "2*n")],
)
def test_exports_with_a_symbolic_number_of_examples(name, size):
    (n,) = jax.export.symbolic_shape(size)
    params, x, y = small_problem()
    symbolic = [jax.ShapeDtypeStruct((n, *t.shape[1:]), t.dtype) for t in (x, y)]
    exported = jax.export.export(jax.jit(EXPORTED[name]))(params, *symbolic)
    for rows in (14, 6):
        arguments = small_problem(rows=rows)
        assert_close(exported.call(*arguments), EXPORTED[name](*arguments))


@pytest.mark.parametrize("name", ["forward", "chain_rule", "weighted fit"])
def test_exported_programs_are_serialized_with_their_types(name):
    def function(*arguments):
        result = EXPORTED[name](*arguments)
        return result._replace(opt_state=()) if "fit" in name else result

    arguments = small_problem(rows=14)
    exported = jax.export.export(jax.jit(function))(*arguments)
    found = jax.export.deserialize(exported.serialize()).call(*arguments)
    expected = function(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(found, expected)


SUMS = ["clipped_value_and_grad", "noise_scale", "hvp", "ggn_vp"]


def changes(name, monkeypatch, step, altered):
    """Whether a quantity changes if one step of the derivation is altered."""
    rows = 14 if "eigenvalues" in name else 5
    with jax.disable_jit():
        honest = QUANTITIES[name](*small_problem(rows=rows))
        monkeypatch.setattr(gradients, step, altered)
        changed = QUANTITIES[name](*small_problem(rows=rows))
    leaves = zip(jax.tree.leaves(honest), jax.tree.leaves(changed), strict=True)
    return any(not np.allclose(a, b, rtol=1e-2) for a, b in leaves)


@pytest.mark.slow_ids("laplace", "largest eigenvalues")
@EVERY_QUANTITY
def test_there_is_one_backward_pass(name, monkeypatch):
    honest = gradients.pull_back

    def altered(params, activations, delta):
        *hidden, last = honest(params, activations, delta)
        return (*(3 * t for t in hidden), last)

    assert changes(name, monkeypatch, "pull_back", altered)


@pytest.mark.slow_ids("laplace", "largest eigenvalues")
@pytest.mark.parametrize(
    "name", [*SUMS, "laplace", "ggn_eigenvalues", "largest eigenvalues"]
)
def test_there_is_one_contraction(name, monkeypatch):
    honest = gradients.contract

    def altered(h, delta):
        return jax.tree.map(lambda leaf: 3 * leaf, honest(h, delta))

    assert changes(name, monkeypatch, "contract", altered)
