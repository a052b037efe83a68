"""Checks of the arguments of public functions.

Most checks read only static facts of JAX arrays (structure, shape, dtype), so they work
on tracers and cost nothing after compilation. `bounds` and the functions that use it
also read the values of arrays that are not traced. Each message names the argument,
what was expected and what was passed. Nothing is broadcast silently.
"""

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

DTYPES = ("bfloat16", "float32", "float64")


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype in which sums are accumulated: float32 for bfloat16, else the same."""
    return jnp.dtype(jnp.float32 if dtype == jnp.bfloat16 else dtype)


# How arrays of other libraries become NumPy arrays, by a method that they have: pandas
# and polars, SciPy's and JAX's sparse matrices, masked arrays, torch, tensorflow.
_CONVERSIONS = {
    "to_numpy": ".to_numpy()",
    "toarray": ".toarray()",
    "todense": ".todense()",
    "filled": ".filled()",
    "detach": ".detach().cpu().numpy()",
    "numpy": ".numpy()",
}


def _type_name(value: Any) -> str:
    library = type(value).__module__.partition(".")[0]
    prefix = "" if library in ("builtins", "jaxbce") else f"{library}."
    return prefix + type(value).__name__


def _array(
    name: str, value: Any, expected: str, *, floating: bool | None = None
) -> None:
    """Checks that `value` is an array, and unless `floating` is None, its dtype."""
    # Shapes without values stand for the parameters of a sweep.
    arrays = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    if isinstance(value, arrays) and not isinstance(value, np.ma.MaskedArray):
        if floating is not None:
            _kind(name, value, floating)
        return
    got = _type_name(value)
    for method, conversion in _CONVERSIONS.items():
        if hasattr(value, method):
            got += f": use {name}{conversion}"
            break
    raise TypeError(f"expected {name} to be {expected}, got {got}")


def arrays(arguments: Mapping[str, Any]) -> None:
    """Checks that all leaves of the arguments are arrays or numbers."""
    for name, value in arguments.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            if not isinstance(leaf, (bool, int, float, complex)):
                # JAX refuses NumPy arrays of text or objects before it traces.
                floating = False if isinstance(leaf, np.ndarray) else None
                at = name + jax.tree_util.keystr(path)
                _array(at, leaf, "an array", floating=floating)


def _cast(value: Any, dtype: Any) -> jax.Array:
    """`value` in `dtype`, without a copy if it already has that dtype."""
    if isinstance(value, jax.Array) and value.dtype == dtype:
        return value
    return jnp.asarray(value, dtype)


def _kind(name: str, value: Any, floating: bool) -> None:
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
    result = _integers("sizes", value, "(n_0, ..., n_L)")
    if len(result) < 2 or min(result) < 1:
        raise ValueError(
            "expected sizes to be at least two integers >= 1 (n_0, ..., n_L), got "
            f"{value!r}"
        )
    return result


def hidden(value: Any) -> tuple[int, ...]:
    """Checks the widths of hidden layers; returns them as a tuple of ints."""
    result = _integers("hidden", value, "(n_1, ..., n_{L-1}), such as (16,)")
    if min(result, default=1) < 1:
        raise ValueError(f"expected hidden to be integers >= 1, got {value!r}")
    return result


def _integers(name: str, value: Any, form: str) -> tuple[int, ...]:
    try:
        return tuple(operator.index(n) for n in value)
    except TypeError:
        raise TypeError(
            f"expected {name} to be a sequence of integers {form}, got {value!r}"
        ) from None


def params(value: Any) -> Any:
    """Checks a tuple of Layer(w, b); returns the dtype that all its leaves share."""
    from jaxbce.network import Layer  # here, because network imports this module

    # Another named tuple would be another pytree than the gradients.
    if type(value) is not tuple or any(type(layer) is not Layer for layer in value):
        got = _type_name(value)
        if type(value) in (tuple, list) and value:
            got += f" of {', '.join(sorted({_type_name(v) for v in value}))}"
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
            _array(name, leaf, f"an array {shape}", floating=True)
            if leaf.ndim != ndim:
                hint = "; for stacked networks use jax.vmap" * (leaf.ndim > ndim)
                raise ValueError(
                    f"expected {name} of shape {shape}, got {leaf.shape}{hint}"
                )
        if 0 in layer.w.shape:
            raise ValueError(
                f"expected {w} of shape [n_in, n_out], both >= 1, got {layer.w.shape}"
            )
        n_in, n_out = layer.w.shape
        hint = ""
        if layer.b.shape == (n_in,) and width in (None, n_out):  # as torch stores it
            hint = f": {w} looks transposed"
        if width is not None and n_in != width:
            raise ValueError(
                f"expected {w} of shape [{width}, n_out] (params[{k - 1}].w has shape "
                f"{value[k - 1].w.shape}), got {layer.w.shape}{hint}"
            )
        if layer.b.shape != (n_out,):
            raise ValueError(
                f"expected {b} of shape ({n_out},) ({w} has shape {layer.w.shape}), "
                f"got {layer.b.shape}{hint}"
            )
        width = n_out
    dtypes = sorted({leaf.dtype.name for layer in value for leaf in layer})
    if len(dtypes) > 1:
        raise TypeError(
            f"expected all of params to have one dtype, got {' and '.join(dtypes)}"
        )
    return value[0].w.dtype


def stacked_params(value: Any) -> tuple[tuple[int, ...], Any]:
    """Checks the parameters of several networks, with the same leading axes.

    Returns:
      The lengths of the leading axes, and the shapes of one network.
    """
    axes = 0
    if type(value) is tuple and value and hasattr(value[0], "w"):
        axes = max(0, getattr(value[0].w, "ndim", 0) - 2)
    leaves = jax.tree.leaves(value)
    if not all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves):
        params(value)  # which says what was expected
    leading = {leaf.shape[:axes] for leaf in leaves}
    if len(leading) > 1:
        raise ValueError(
            "expected all leaves of params to have the same leading axes, got "
            f"{' and '.join(map(str, sorted(leading)))}"
        )
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype), value
    )
    params(one)
    return leading.pop(), one


def matrix(name: str, value: Any, shape: str) -> None:
    """Checks that `value` is an array with two axes, neither of them empty."""
    _array(name, value, f"an array {shape}")
    if value.ndim != 2 or 0 in value.shape:
        hint = f": use {name}[:, None]" if value.ndim == 1 else ""
        raise ValueError(f"expected {name} of shape {shape}, got {value.shape}{hint}")


def features(x: Any, params_: Any, name: str = "x") -> jax.Array:
    """Checks x [N, n_0] against params; returns it in the parameters' dtype."""
    dtype = params(params_)
    w_shape = params_[0].w.shape
    shape = f"[N, {w_shape[0]}]"
    _array(name, x, f"an array {shape}", floating=True)
    if x.ndim != 2 or x.shape[1] != w_shape[0]:
        hint = ""
        if x.ndim == 2 and x.shape[0] == w_shape[0]:
            hint = f": {name} looks transposed"
        elif x.ndim == w_shape[0] == 1:
            hint = f": use {name}[:, None]"
        raise ValueError(
            f"expected {name} of shape {shape} (params[0].w has shape {w_shape}), got "
            f"{x.shape}{hint}"
        )
    if x.shape[0] == 0:
        raise ValueError(f"expected {name} of shape {shape}, N >= 1, got {x.shape}")
    return _cast(x, dtype)


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
    _array(name, y, f"an array of shape {shape}", floating=False)
    if y.shape != shape:
        hint = f": use {name}[:, None]" if y.ndim == 1 and shape[1:] == (1,) else ""
        raise ValueError(
            f"expected {name} of shape {shape}, the shape of {output}, got "
            f"{y.shape}{hint}"
        )
    return _cast(y, dtype)


def real(name: str, value: Any) -> None:
    """Checks that `value` is an array of a supported floating dtype."""
    _array(name, value, "an array", floating=True)


def sample_weight(
    value: Any, n: int, dtype: Any, name: str = "sample_weight"
) -> jax.Array:
    """Checks example weights [N]; returns them in `dtype`."""
    _array(name, value, f"None or an array of shape ({n},)", floating=False)
    if value.shape != (n,):
        raise ValueError(
            f"expected {name} of shape ({n},), one weight per example, got "
            f"{value.shape}"
        )
    return _cast(value, dtype)


def pos_weight(value: Any, outputs: int | None, dtype: Any) -> Any:
    """Checks a scalar or [n_L] positive-class weight; returns it in `dtype`."""
    if isinstance(value, (bool, int, float)):
        return np.asarray(value, dtype)
    shapes = "()" if outputs is None else f"() or ({outputs},)"
    _array(
        "pos_weight", value, f"a number or an array of shape {shapes}", floating=False
    )
    if value.shape not in ((), (outputs,)):
        raise ValueError(f"expected pos_weight of shape {shapes}, got {value.shape}")
    return _cast(value, dtype)


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
    """Checks that a scalar is real, and if it is not traced, > 0 (or >= 0)."""
    expected = "a number >= 0" if allow_zero else "a number > 0"
    if type(value) not in (int, float):
        _array(name, value, expected, floating=False)
        if value.shape != () or value.dtype == bool:
            raise ValueError(
                f"expected {name} to be {expected}, got an array of shape "
                f"{value.shape} and dtype {value.dtype.name}"
            )
    least = 0 if allow_zero else np.nextafter(0, 1)
    bounds(name, value, expected, least, np.inf)


def prior_precision(value: Any, layers: int, dtype: Any) -> jax.Array:
    """Checks precisions > 0, a scalar or one per layer; returns them as `[layers]`."""
    name = "prior_precision"
    is_sequence = isinstance(value, (tuple, list))
    if is_sequence or getattr(value, "ndim", 0) > 0:
        shape = (len(value),) if is_sequence else value.shape
        if shape != (layers,):
            raise ValueError(
                f"expected {name} to be a number > 0, or one per layer of shape "
                f"({layers},), got an array of shape {shape}"
            )
        for k, each in enumerate(value):
            scalar(f"{name}[{k}]", each)
            finite(f"{name}[{k}]", each, dtype)
        return jnp.stack([jnp.asarray(each, dtype) for each in value])
    scalar(name, value)
    finite(name, value, dtype)
    return jnp.broadcast_to(jnp.asarray(value, dtype), (layers,))


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


def returned_array(
    name: str, value: Any, shape: tuple[int, ...], form: str, dtype: Any
) -> jax.Array:
    """Checks the array that a function of the user returns, and casts it."""
    _array(f"the result of {name}", value, f"an array {form}", floating=False)
    if value.shape != shape:
        raise ValueError(
            f"expected {name} to return an array of shape {shape}, got {value.shape}"
        )
    return _cast(value, dtype)


def key(value: Any) -> None:
    """Checks that `value` is one JAX random key, typed or legacy."""
    expected = "a random key, such as jax.random.key(0)"
    _array("key", value, expected)
    is_typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    if not is_typed and value.dtype != jnp.uint32:
        raise TypeError(
            f"expected key to be {expected}, got an array of dtype {value.dtype.name}"
        )
    if value.shape not in ([()] if is_typed else [(2,), (4,)]):
        raise ValueError(
            f"expected key to be {expected}, got an array of shape {value.shape}; "
            "use jax.vmap for several keys"
        )


def mesh(value: Any) -> None:
    """Checks the mesh of a sweep: None or a mesh of devices."""
    if value is None or (isinstance(value, jax.sharding.Mesh) and value.size):
        return
    raise TypeError(
        "expected mesh to be None or a jax.sharding.Mesh of at least one device, such "
        'as jax.make_mesh((2,), ("members",)), got '
        f"{_type_name(value)}"
    )


def optimizer(value: Any, name: str = "optimizer") -> None:
    """Checks an optax transformation."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"expected {name} to be an optax transformation, such as optax.sgd(0.1), "
            f"got {_type_name(value)}"
        )


def penalty_value(value: Any) -> Any:
    """Checks what a penalty returns; returns it."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or value.shape != () or not jnp.issubdtype(dtype, jnp.floating):
        got = _type_name(value) if dtype is None else f"{dtype}{[*value.shape]}"
        raise TypeError(f"expected penalty to return a floating scalar, got {got}")
    return value


def function(
    name: str,
    value: Any,
    expected: str,
    *,
    arguments: int | None = None,
    is_static: bool = False,
) -> None:
    """Checks a function; one that is a static argument of a program has a hash."""
    if not callable(value):
        raise TypeError(f"expected {name} to be {expected}, got {_type_name(value)}")
    if arguments is not None:
        try:
            inspect.signature(value).bind(*range(arguments))
        except ValueError:
            pass  # some built-in functions have no signature
        except TypeError as error:
            raise TypeError(f"expected {name} to be {expected} ({error})") from None
    if is_static:
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"expected {name} to be hashable, because programs are compiled once "
                f"per {name}, got {_type_name(value)} ({error})"
            ) from None


@contextlib.contextmanager
def calling(name: str, hparams: Mapping[str, Any]) -> Iterator[None]:
    """Adds to an exception which function of the user raised it."""
    try:
        yield
    except Exception as error:
        given = ", ".join(hparams) or "none"
        error.add_note(f"while tracing {name} with the hyperparameters: {given}")
        raise


def precision(value: Any) -> contextlib.AbstractContextManager[Any]:
    """Checks a precision of matrix products; returns the context that sets it."""
    if value is None:
        return contextlib.nullcontext()
    if not isinstance(value, str):
        raise TypeError(
            f"expected precision to be None or a string, got {_type_name(value)}"
        )
    try:
        with jax.default_matmul_precision(value):
            pass
    except ValueError:
        raise ValueError(
            "expected precision to be None or a precision of "
            f'jax.default_matmul_precision, such as "highest", got {value!r}'
        ) from None
    return jax.default_matmul_precision(value)


def count(
    name: str,
    value: Any,
    *,
    least: int = 1,
    examples: int | None = None,
    other: str = "",
) -> int:
    """Checks an integer from `least` to `examples` (or 2^31 − 1); returns it."""
    expected = f"{other}an integer >= {least} and less than 2**31"
    if examples is not None:
        expected = f"an integer from {least} to {examples}, the number of examples in x"
    message = f"expected {name} to be {expected}, got {value!r}"
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if isinstance(value, bool) or not least <= number <= (examples or 2**31 - 1):
        raise ValueError(message)
    return number


def _is_known(value: Any) -> bool:
    """Whether this process can read the values of an array."""
    if isinstance(value, Tracer):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def _range(value: Any) -> tuple[float, float]:
    """The least and the largest entry; NaN if there is one."""
    if isinstance(value, jax.Array) and any(
        device.platform != "cpu" for device in value.devices()
    ):
        with jax.ensure_compile_time_eval():  # also where other arrays are traced
            return float(jnp.min(value)), float(jnp.max(value))
    value = np.asarray(value)  # not a copy
    if value.dtype == jnp.bfloat16:
        value = value.astype(np.float32)  # ten times as fast
    return float(value.min()), float(value.max())


def bounds(
    name: str,
    value: Any,
    expected: str,
    low: float,
    high: float,
    *,
    weight: Any = None,
    hint: Callable[[str, np.ndarray], str] = lambda *_: "",
) -> None:
    """Checks that the entries of an array are in [low, high], if they are known.

    Args:
      name: The name of the argument.
      value: A real array or a number.
      expected: The bounds in words.
      low: The least value.
      high: The largest value.
      weight: Weights [N]; the entries of examples of weight 0 may have any value.
      hint: Says how to convert entries that look like another encoding of labels.
    """
    if not _is_known(value) or not _is_known(weight):
        return
    least, largest = _range(value)
    if low <= least and largest <= high:  # False for NaN
        return
    original = np.asarray(value)
    value = original.astype(float)
    counts = np.ones(value.shape, bool)
    if weight is not None:
        counts &= (np.asarray(weight) != 0).reshape(-1, *[1] * (value.ndim - 1))
    wrong = counts & ~((value >= low) & (value <= high))
    if not wrong.any():
        return
    index = np.unravel_index(np.argmax(wrong), value.shape)
    where = f" at {name}[{', '.join(map(str, index))}]" if index else ""
    where = hint(name, value[counts]) or where
    raise ValueError(f"expected {name} to be {expected}, got {original[index]}{where}")


def min_delta(value: Any, dtype: Any) -> float:
    """Checks a static number >= 0 that is finite in `dtype`; returns it."""
    scalar("min_delta", value, allow_zero=True)
    if not _is_known(value):
        raise TypeError("expected min_delta to be a known number, got a traced array")
    weights("min_delta", np.asarray(value), dtype)
    return float(value)


def finite(name: str, value: Any, dtype: Any) -> None:
    """Checks that known entries are finite in `dtype`."""
    largest = float(jnp.finfo(dtype).max)
    expected = f"finite in {jnp.dtype(dtype).name}"
    bounds(name, value, expected, -largest, largest)


def weights(name: str, value: Any, dtype: Any) -> None:
    """Checks that known weights are finite and >= 0."""
    largest = float(jnp.finfo(dtype).max)
    bounds(name, value, "finite and >= 0", 0, largest)


def some_weight(name: str, value: Any, dtype: Any) -> None:
    """Checks that known weights are not all 0."""
    least = float(jnp.finfo(dtype).smallest_normal)  # XLA may flush others to 0
    if _is_known(value) and (largest := _range(value)[1]) < least:
        raise ValueError(
            f"expected at least one entry of {name} to be >= {least:.1e} "
            f"(smaller ones count as 0), but the largest is {largest:.1e}"
        )


def label_values(name: str, y: Any, *, weight: Any = None) -> None:
    """Checks that known labels are in [0, 1], except at weight 0."""
    bounds(name, y, "in [0, 1]", 0, 1, weight=weight, hint=_label_hint)


def _label_hint(name: str, y: np.ndarray) -> str:
    """How to convert labels outside [0, 1] that look like another encoding."""
    if not np.isfinite(y).all() or (y != np.rint(y)).any():
        return ""
    found = set(np.unique(y).tolist())
    low, high = int(y.min()), int(y.max())
    if found <= {-1, 1}:
        return f" (labels -1/+1: use ({name} + 1) / 2)"
    if found <= {1, 2}:
        return f" (labels 1/2: use {name} - 1)"
    if found <= {0, high}:
        return f" (labels 0/{high}: use {name} / {high})"
    if low >= 0 and 100 < high <= 255:
        return f" (values 0...255: use {name} / 255)"
    if low >= 0:
        return (
            f" (class numbers {low}...{high}: use one column per class, "
            f"{name} == np.arange({low}, {high + 1}))"
        )
    return ""


def examples(
    x: Any,
    y: Any,
    weight: Any,
    params_: Any,
    names: tuple[str, str, str] = ("x", "y", "sample_weight"),
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Checks a data set and its known values; returns it in the dtypes of params.

    Examples of weight 0 may have any label, but at least one weight must be positive.
    Non-finite features are accepted, since an optimizer may skip their batch.
    """
    x_name, y_name, weight_name = names
    checked_x = features(x, params_, x_name)
    n, outputs = checked_x.shape[0], params_[-1].w.shape[1]
    dtype = accumulation_dtype(checked_x.dtype)
    checked_y = labels(y, (n, outputs), dtype, name=y_name)
    checked_weight = None
    if weight is not None:
        checked_weight = sample_weight(weight, n, dtype, weight_name)
        weights(weight_name, weight, dtype)
        some_weight(weight_name, weight, dtype)
    # What was passed, which may be in host memory or have a larger range.
    label_values(y_name, y, weight=weight)
    return checked_x, checked_y, checked_weight


def validation(
    value: Any, params_: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None] | None:
    """Checks None, (x, y) or (x, y, weight); returns None or a triple."""
    if value is None:
        return None
    is_sequence = isinstance(value, (tuple, list))
    if not is_sequence or len(value) not in (2, 3):
        got = f"{len(value)} items" if is_sequence else _type_name(value)
        raise TypeError(
            f"expected validation to be a tuple (x, y) or (x, y, weight), got {got}"
        )
    x, y, weight = (*value, None)[:3]
    names = ("validation[0]", "validation[1]", "validation[2]")
    return examples(x, y, weight, params_, names)


def hparams(values: dict[str, Any], dtype: Any) -> None:
    """Checks the hyperparameters that `sweep` itself uses, arrays [points].

    `init_scale` may have any sign: the distribution of the weights is symmetric.
    """
    if "label_smoothing" in values:
        name = "hparams['label_smoothing']"
        bounds(name, values["label_smoothing"], "in [0, 1]", 0, 1)
    if "pos_weight" in values:
        weights("hparams['pos_weight']", values["pos_weight"], dtype)
