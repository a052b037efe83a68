"""Checks of the arguments of public functions.

Checks read only static facts of JAX arrays (structure, shape, dtype), so they work on
tracers and cost nothing after compilation. Each message names the argument, what was
expected and what was passed. Nothing is broadcast silently.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("bfloat16", "float32", "float64")


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype in which sums are accumulated: float32 for bfloat16, else the same."""
    return jnp.dtype(jnp.float32 if dtype == jnp.bfloat16 else dtype)


def _array(name: str, value: Any, expected: str) -> None:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        got = type(value).__name__
        raise TypeError(f"expected {name} to be {expected}, got {got}")


def _kind(name: str, value: Any, *, floating: bool) -> None:
    if floating:
        ok, expected = value.dtype.name in DTYPES, _one_of(DTYPES)
    else:
        ok = jnp.issubdtype(value.dtype, jnp.bool_) or (
            jnp.issubdtype(value.dtype, jnp.number)
            and not jnp.issubdtype(value.dtype, jnp.complexfloating)
        )
        expected = "real or boolean"
    if not ok:
        raise TypeError(
            f"expected the dtype of {name} to be {expected}, got {value.dtype.name}"
        )


def _one_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def float_dtype(dtype: Any) -> np.dtype:
    """Checks a dtype and returns it; None is JAX's default float dtype."""
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise TypeError(f"expected dtype to be {_one_of(DTYPES)}, got {dtype.name}")
    return dtype


def sizes(value: Any) -> tuple[int, ...]:
    """Checks layer sizes (n_0, ..., n_L); returns them as a tuple of ints."""
    try:
        result = tuple(operator.index(n) for n in value)
    except TypeError:
        raise TypeError(
            "expected sizes to be a sequence of integers (n_0, ..., n_L), got "
            f"{value!r}"
        ) from None
    if len(result) < 2 or min(result) < 1:
        raise ValueError(
            "expected sizes to be at least two integers >= 1 (n_0, ..., n_L), got "
            f"{value!r}"
        )
    return result


def params(value: Any) -> Any:
    """Checks a tuple of Layer(w, b); returns the dtype that all its leaves share."""
    if not isinstance(value, tuple) or not all(
        getattr(layer, "_fields", None) == ("w", "b") for layer in value
    ):
        got = type(value).__name__
        if isinstance(value, (tuple, list)) and value:
            got += f" of {', '.join(sorted({type(v).__name__ for v in value}))}"
        raise TypeError(f"expected params to be a tuple of Layer(w, b), got {got}")
    if not value:
        raise ValueError("expected params to have at least one Layer(w, b), got ()")
    width = None
    for k, layer in enumerate(value):
        w, b = f"params[{k}].w", f"params[{k}].b"
        for name, leaf, ndim, shape in (
            (w, layer.w, 2, "[n_in, n_out]"),
            (b, layer.b, 1, "[n_out]"),
        ):
            _array(name, leaf, f"an array {shape}")
            _kind(name, leaf, floating=True)
            if leaf.ndim != ndim:
                raise ValueError(f"expected {name} of shape {shape}, got {leaf.shape}")
        if 0 in layer.w.shape:
            raise ValueError(
                f"expected {w} of shape [n_in, n_out], both >= 1, got {layer.w.shape}"
            )
        if width is not None and layer.w.shape[0] != width:
            raise ValueError(
                f"expected {w} of shape [{width}, n_out] (params[{k - 1}].w has shape "
                f"{value[k - 1].w.shape}), got {layer.w.shape}"
            )
        width = layer.w.shape[1]
        if layer.b.shape != (width,):
            raise ValueError(
                f"expected {b} of shape ({width},) ({w} has shape {layer.w.shape}), "
                f"got {layer.b.shape}"
            )
    dtypes = sorted({leaf.dtype.name for layer in value for leaf in layer})
    if len(dtypes) > 1:
        raise TypeError(
            f"expected all of params to have one dtype, got {' and '.join(dtypes)}"
        )
    return value[0].w.dtype


def features(x: Any, params_: Any, name: str = "x") -> jax.Array:
    """Checks x [N, n_0] against params; returns it in the parameters' dtype."""
    dtype = params(params_)
    w_shape = params_[0].w.shape
    shape = f"[N, {w_shape[0]}]"
    _array(name, x, f"an array {shape}")
    _kind(name, x, floating=True)
    if x.ndim != 2 or x.shape[1] != w_shape[0]:
        raise ValueError(
            f"expected {name} of shape {shape} (params[0].w has shape {w_shape}), got "
            f"{x.shape}"
        )
    if x.shape[0] == 0:
        raise ValueError(f"expected {name} of shape {shape}, N >= 1, got {x.shape}")
    return jnp.asarray(x, dtype)


def activations(value: Any, params_: Any) -> None:
    """Checks that `value` is like the Activations that `forward(params, x)` returns."""
    if getattr(value, "_fields", None) != ("a", "h"):
        raise TypeError(
            "expected activations to be the Activations that forward(params, x) "
            f"returns, got {type(value).__name__}"
        )
    params(params_)
    widths = [params_[0].w.shape[0], *(layer.w.shape[1] for layer in params_)]
    a, h = [jnp.shape(a) for a in value.a], [jnp.shape(h) for h in value.h]
    n = h[0][:1] if h else ()
    expected_a, expected_h = [(*n, m) for m in widths[1:]], [(*n, m) for m in widths]
    if (a, h) != (expected_a, expected_h):
        raise ValueError(
            f"expected activations with a of shapes {expected_a} and h of shapes "
            f"{expected_h}, as forward returns for params, got {a} and {h}"
        )


def labels(
    y: Any,
    shape: tuple[int, ...],
    dtype: Any,
    output: str = "the logits",
    name: str = "y",
) -> jax.Array:
    """Checks y against the shape of the outputs; returns it in `dtype`."""
    _array(name, y, f"an array of shape {shape}")
    _kind(name, y, floating=False)
    if y.shape != shape:
        raise ValueError(
            f"expected {name} of shape {shape}, the shape of {output}, got {y.shape}"
        )
    return jnp.asarray(y, dtype)


def real(name: str, value: Any) -> None:
    """Checks that `value` is an array of a supported floating dtype."""
    _array(name, value, "an array")
    _kind(name, value, floating=True)


def sample_weight(value: Any, n: int, dtype: Any) -> jax.Array:
    """Checks example weights [N]; returns them in `dtype`."""
    _array("sample_weight", value, f"None or an array of shape ({n},)")
    _kind("sample_weight", value, floating=False)
    if value.shape != (n,):
        raise ValueError(
            f"expected sample_weight of shape ({n},), one weight per example, got "
            f"{value.shape}"
        )
    return jnp.asarray(value, dtype)


def pos_weight(value: Any, outputs: int | None, dtype: Any) -> jax.Array:
    """Checks a scalar or [n_L] positive-class weight; returns it in `dtype`."""
    if isinstance(value, (bool, int, float)):
        return jnp.asarray(value, dtype)
    shapes = "()" if outputs is None else f"() or ({outputs},)"
    _array("pos_weight", value, f"a number or an array of shape {shapes}")
    _kind("pos_weight", value, floating=False)
    if value.shape not in ((), (outputs,)):
        raise ValueError(f"expected pos_weight of shape {shapes}, got {value.shape}")
    return jnp.asarray(value, dtype)


def vector(v: Any, params_: Any) -> Any:
    """Checks a pytree with the structure of params; returns it in their dtype."""
    dtype = params(params_)
    expected = jax.tree.map(jnp.shape, params_)
    if jax.tree.structure(v) != jax.tree.structure(params_):
        raise TypeError(
            "expected v to be a tuple of Layer(w, b) like params, got "
            f"{jax.tree.structure(v)}"
        )
    if (shapes := jax.tree.map(jnp.shape, v)) != expected:
        raise ValueError(
            f"expected v with the shapes of params, {expected}, got {shapes}"
        )
    for path, leaf in jax.tree.leaves_with_path(v):
        real(f"v{jax.tree_util.keystr(path)}", leaf)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), v)


def scalar(name: str, value: Any, *, allow_zero: bool = False) -> None:
    """Checks that a scalar is real, and if it is not a JAX array, > 0 (or >= 0)."""
    expected = "a number >= 0" if allow_zero else "a number > 0"
    if type(value) not in (int, float):
        _array(name, value, expected)
        _kind(name, value, floating=False)
        if value.shape != () or value.dtype == bool:
            raise ValueError(
                f"expected {name} to be {expected}, got an array of shape "
                f"{value.shape} and dtype {value.dtype.name}"
            )
    if isinstance(value, (int, float, np.generic, np.ndarray)):
        number = float(value)
        if not (number >= 0 if allow_zero else number > 0):
            raise ValueError(f"expected {name} to be {expected}, got {value!r}")


def reduction(value: Any) -> None:
    """Checks the name of a reduction."""
    if not isinstance(value, str) or value not in ("mean", "sum"):
        raise ValueError(f'expected reduction to be "mean" or "sum", got {value!r}')


def block_size(value: Any) -> None:
    """Checks a block size: None, "auto" or a positive int."""
    message = (
        f'expected block_size to be None, "auto" or an integer >= 1, got {value!r}'
    )
    if value is None or value == "auto":
        return
    if isinstance(value, str):
        raise ValueError(message)
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if isinstance(value, bool) or size < 1:
        raise ValueError(message)


def key(value: Any) -> None:
    """Checks that `value` may be a JAX random key, typed or legacy."""
    _array("key", value, "a random key, such as jax.random.key(0)")


def count(name: str, value: Any, *, least: int = 1, examples: int | None = None) -> int:
    """Checks an integer from `least` to `examples` (or 2^31 − 1); returns it."""
    expected = f"an integer >= {least}"
    if examples is not None:
        expected = f"an integer from {least} to {examples}, the number of examples in x"
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"expected {name} to be {expected}, got {value!r}") from None
    if examples is None and number >= 2**31:
        expected = "less than 2**31"
    elif not isinstance(value, bool) and least <= number <= (examples or number):
        return number
    raise ValueError(f"expected {name} to be {expected}, got {value!r}")
