"""What the public functions ask of their arguments, said once.

Every check reads only static facts (structure, shape, dtype), so it works on
tracers and costs nothing once compiled. Each message names the argument, what
it was, and what is accepted; nothing is broadcast or cast across kinds in
silence.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("bfloat16", "float32", "float64")


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype sums are taken in: float32 for bfloat16, otherwise its own."""
    return jnp.dtype(jnp.float32 if dtype == jnp.bfloat16 else dtype)


def _array(name: str, value: Any, accepted: str) -> None:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{name} is a {type(value).__name__}; {accepted} is accepted")


def _kind(name: str, value: Any, *, floating: bool) -> None:
    if floating:
        ok, accepted = value.dtype.name in DTYPES, ", ".join(DTYPES)
    else:
        ok = jnp.issubdtype(value.dtype, jnp.bool_) or (
            jnp.issubdtype(value.dtype, jnp.number)
            and not jnp.issubdtype(value.dtype, jnp.complexfloating)
        )
        accepted = "a real or boolean dtype"
    if not ok:
        raise TypeError(f"{name} has dtype {value.dtype.name}; {accepted} is accepted")


def float_dtype(dtype: Any) -> Any:
    """Checks a dtype; None is JAX's default float dtype."""
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise TypeError(f"dtype is {dtype.name}; {', '.join(DTYPES)} is accepted")
    return dtype


def sizes(value: Any) -> tuple[int, ...]:
    """Layer sizes (n_0, ..., n_L) as a tuple of at least two positive ints."""
    try:
        result = tuple(operator.index(n) for n in value)
    except TypeError:
        raise TypeError(
            f"sizes is {value!r}; a sequence of integers (n_0, ..., n_L) is accepted"
        ) from None
    if len(result) < 2 or min(result) < 1:
        raise ValueError(
            f"sizes is {value!r}; at least an input and an output size, each >= 1, "
            "is accepted"
        )
    return result


def params(value: Any) -> Any:
    """Checks a tuple of Layer(w, b); returns the dtype all its leaves share."""
    if not isinstance(value, tuple) or not all(
        getattr(layer, "_fields", None) == ("w", "b") for layer in value
    ):
        what = type(value).__name__
        if isinstance(value, (tuple, list)):
            what += f" of {sorted({type(v).__name__ for v in value})}"
        raise TypeError(f"params is a {what}; a tuple of Layer(w, b) is accepted")
    if not value:
        raise ValueError("params is empty; at least one Layer(w, b) is accepted")
    width = None
    for k, layer in enumerate(value):
        w, b = f"params[{k}].w", f"params[{k}].b"
        for name, leaf, ndim in ((w, layer.w, 2), (b, layer.b, 1)):
            _array(name, leaf, "an array")
            _kind(name, leaf, floating=True)
            if leaf.ndim != ndim:
                raise ValueError(
                    f"{name} has shape {leaf.shape}; w is [n_in, n_out], b is [n_out]"
                )
        if 0 in layer.w.shape:
            raise ValueError(f"{w} has shape {layer.w.shape}; every size must be >= 1")
        if width is not None and layer.w.shape[0] != width:
            raise ValueError(
                f"{w} has shape {layer.w.shape}; ({width}, n_out) is accepted after a "
                f"layer of {width} outputs"
            )
        width = layer.w.shape[1]
        if layer.b.shape != (width,):
            raise ValueError(
                f"{b} has shape {layer.b.shape}; ({width},) is accepted with w of "
                f"shape {layer.w.shape}"
            )
    dtypes = sorted({leaf.dtype.name for layer in value for leaf in layer})
    if len(dtypes) > 1:
        raise TypeError(f"params mixes dtypes {dtypes}; one dtype is accepted")
    return value[0].w.dtype


def features(x: Any, params_: Any, name: str = "x") -> jax.Array:
    """Checks x [N, n_0] against params; returns it in the parameters' dtype."""
    dtype = params(params_)
    n_in = params_[0].w.shape[0]
    _array(name, x, f"an array [rows, {n_in}]")
    _kind(name, x, floating=True)
    if x.ndim != 2 or x.shape[1] != n_in:
        raise ValueError(
            f"{name} has shape {x.shape}; [rows, {n_in}] is accepted by params[0].w of "
            f"shape {params_[0].w.shape}"
        )
    if x.shape[0] == 0:
        raise ValueError(f"{name} has shape {x.shape}; at least one row is accepted")
    return jnp.asarray(x, dtype)


def trace(value: Any, params_: Any) -> None:
    """Checks that `value` is a Trace that `forward(params, x)` can have returned."""
    if getattr(value, "_fields", None) != ("a", "h"):
        raise TypeError(
            f"trace is a {type(value).__name__}; what forward(params, x) returned is "
            "accepted"
        )
    params(params_)
    widths = [params_[0].w.shape[0], *(layer.w.shape[1] for layer in params_)]
    shapes = [jnp.shape(h) for h in value.h], [jnp.shape(a) for a in value.a]
    rows = shapes[0][0][:1] if shapes[0] else ()
    accepted = [(*rows, n) for n in widths], [(*rows, n) for n in widths[1:]]
    if shapes != accepted:
        raise ValueError(
            f"trace has h and a of shapes {shapes}; {accepted} is accepted, what "
            "forward returns for these params"
        )


def labels(
    y: Any,
    shape: tuple[int, ...],
    dtype: Any,
    against: str = "logits have",
    name: str = "y",
) -> jax.Array:
    """Checks y against the shape of the outputs; returns it in `dtype`."""
    _array(name, y, f"an array of shape {shape}")
    _kind(name, y, floating=False)
    if y.shape != shape:
        raise ValueError(
            f"{name} has shape {y.shape}, {against} {shape}; labels of just that shape "
            "are accepted"
        )
    return jnp.asarray(y, dtype)


def real(name: str, value: Any) -> None:
    """Checks that `value` is an array of a supported floating dtype."""
    _array(name, value, "an array")
    _kind(name, value, floating=True)


def sample_weight(value: Any, rows: int, dtype: Any) -> jax.Array:
    """Checks example weights [N]; returns them in `dtype`."""
    _array("sample_weight", value, f"None or an array of shape ({rows},)")
    _kind("sample_weight", value, floating=False)
    if value.shape != (rows,):
        raise ValueError(
            f"sample_weight has shape {value.shape}; ({rows},), one weight a row of x, "
            "is accepted"
        )
    return jnp.asarray(value, dtype)


def pos_weight(value: Any, outputs: int | None, dtype: Any) -> jax.Array:
    """Checks a scalar or [n_L] positive-class weight; returns it in `dtype`."""
    if isinstance(value, (bool, int, float)):
        return jnp.asarray(value, dtype)
    accepted = "a scalar" if outputs is None else f"a scalar or shape ({outputs},)"
    _array("pos_weight", value, accepted)
    _kind("pos_weight", value, floating=False)
    if value.shape not in ((), (outputs,)):
        raise ValueError(f"pos_weight has shape {value.shape}; {accepted} is accepted")
    return jnp.asarray(value, dtype)


def vector(v: Any, params_: Any) -> Any:
    """Checks a pytree like params, a direction in them; returns it in their dtype."""
    dtype = params(params_)
    shapes = jax.tree.map(jnp.shape, params_)
    if jax.tree.structure(v) != jax.tree.structure(params_):
        raise TypeError(
            f"v is {jax.tree.structure(v)}; a tuple of Layer(w, b) like params is "
            "accepted"
        )
    if (given := jax.tree.map(jnp.shape, v)) != shapes:
        raise ValueError(
            f"v has shapes {given}; those of params, {shapes}, are accepted"
        )
    for leaf in jax.tree.leaves(v):
        real("a leaf of v", leaf)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), v)


def scalar(name: str, value: Any, *, zero: bool = False) -> None:
    """Checks a positive scalar, or one >= 0; its value where NumPy or Python has it."""
    accepted = "a number >= 0" if zero else "a number > 0"
    if type(value) not in (int, float):
        _array(name, value, accepted)
        _kind(name, value, floating=False)
        if value.shape != () or value.dtype == bool:
            raise ValueError(
                f"{name} has shape {value.shape}, dtype {value.dtype.name}; {accepted} "
                "is accepted"
            )
    if isinstance(value, (int, float, np.generic, np.ndarray)):
        number = float(value)
        if not (number >= 0 if zero else number > 0):
            raise ValueError(f"{name} is {value!r}; {accepted} is accepted")


def reduction(value: Any) -> None:
    """Checks the name of a reduction."""
    if not isinstance(value, str) or value not in ("mean", "sum"):
        raise ValueError(f'reduction is {value!r}; "mean" or "sum" is accepted')


def block_size(value: Any) -> None:
    """Checks rows in a block: None, "auto" or a positive int."""
    accepted = 'None, "auto" or an integer >= 1 is accepted'
    if value is None or value == "auto":
        return
    if isinstance(value, str):
        raise ValueError(f"block_size is {value!r}; {accepted}")
    try:
        rows = operator.index(value)
    except TypeError:
        raise TypeError(f"block_size is {value!r}; {accepted}") from None
    if isinstance(value, bool) or rows < 1:
        raise ValueError(f"block_size is {value!r}; {accepted}")


def key(value: Any) -> None:
    """Checks that `value` may be a JAX random key, typed or of the older kind."""
    _array("key", value, "a key, such as jax.random.key(0),")


def count(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """Checks an integer from `least` to `most`, the number of rows of x if given."""
    accepted = (
        f"an integer >= {least}" if most is None else f"1 to the {most} rows of x"
    )
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; {accepted} is accepted") from None
    if most is None and number >= 2**31:
        accepted = "less than 2^31"
    elif not isinstance(value, bool) and least <= number <= (most or number):
        return number
    raise ValueError(f"{name} is {value!r}; {accepted} is accepted")
