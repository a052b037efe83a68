"""The same quantities by PyTorch and Opacus, as their documentation computes them.

Each function takes what JAX's sides take. The libraries are imported where they are
used: they need not be installed.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.support.timing import Call
from jaxbce.network import Layer, Params


def _library() -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    return torch


def _tensors(tree: Any) -> Any:
    torch = _library()
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return [torch.tensor(np.asarray(t)).to(device) for t in jax.tree.leaves(tree)]


def _layers(tensors: Any) -> Params:
    """Weights and biases in turn, as params of NumPy arrays."""
    arrays: Any = [tensor.detach().cpu().numpy() for tensor in tensors]
    return tuple(Layer(w, b) for w, b in zip(arrays[::2], arrays[1::2], strict=True))


def _loss(params: Any, x: Any, y: Any) -> Any:
    """The mean over rows; `params` are weights and biases in turn."""
    torch: Any = _library()
    h = x
    for w, b in zip(params[:-2:2], params[1:-2:2], strict=True):
        h = torch.relu(torch.addmm(b, h, w))
    a = torch.addmm(params[-1], h, params[-2])
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    return entropy(a, y, reduction="sum") / len(y)


def gradient(params: Params, x: Any, y: Any, v: Any) -> Call:
    """Loss and gradient, eagerly, by autograd."""
    torch = _library()
    leaves = [leaf.requires_grad_() for leaf in _tensors(params)]
    data = _tensors((x, y))

    def run() -> Any:
        value = _loss(leaves, *data)
        return value, torch.autograd.grad(value, leaves)

    return Call(run, result=lambda found: (found[0].item(), _layers(found[1])))


def _row_gradients(params: Params, x: Any, y: Any) -> tuple[Any, Any]:
    torch: Any = _library()
    leaves, data = tuple(_tensors(params)), _tensors((x, y))

    def row(leaves: Any, x: Any, y: Any) -> Any:
        return _loss(leaves, x[None], y[None])

    mapped = torch.func.vmap(torch.func.grad(row), in_dims=(None, 0, 0))

    def norms(grads: Any) -> Any:
        rows = [g.flatten(1).norm(dim=1) for g in grads]
        return torch.stack(rows).norm(dim=0)

    return lambda: mapped(leaves, *data), norms


def norms(params: Params, x: Any, y: Any, v: Any) -> Call:
    """Norms of `torch.func.vmap` of the gradient."""
    grads, norms = _row_gradients(params, x, y)
    return Call(lambda: norms(grads()), result=lambda found: found.cpu().numpy())


def clipped(max_norm: Any, params: Params, x: Any, y: Any, v: Any) -> Call:
    """The clipped sum of `torch.func.vmap` of the gradient."""
    torch = _library()
    grads, norms = _row_gradients(params, x, y)

    def run() -> Any:
        rows = grads()
        kept = (max_norm / norms(rows)).clamp(max=1)
        return [torch.tensordot(kept, g, 1) for g in rows]

    return Call(run, result=_layers)


def ghost_clipped(max_norm: Any, params: Params, x: Any, y: Any, v: Any) -> Call:
    """The clipped sum by Opacus's ghost clipping, which makes no row's gradient."""
    torch = _library()
    from opacus.grad_sample import (  # pyright: ignore[reportMissingImports]
        GradSampleModuleFastGradientClipping,
    )

    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    leaves, data = _tensors(params), _tensors((x, y))
    modules: list[Any] = []
    for w, b in zip(leaves[::2], leaves[1::2], strict=True):
        linear = torch.nn.Linear(*w.shape, device=w.device)
        linear.weight.data, linear.bias.data = w.T.contiguous(), b
        modules += [linear, torch.nn.ReLU()]
    model = GradSampleModuleFastGradientClipping(
        torch.nn.Sequential(*modules[:-1]),
        loss_reduction="sum",
        max_grad_norm=max_norm,
    )
    entropy = torch.nn.BCEWithLogitsLoss(reduction="none")

    def run() -> Any:
        model.zero_grad()
        losses = entropy(model(data[0]), data[1]).sum(dim=1)
        losses.sum().backward(retain_graph=True)
        model.zero_grad()
        kept = model.get_clipping_coef()
        model.disable_hooks()
        (kept * losses).sum().backward()
        model.enable_hooks()
        return [p.grad for p in model.parameters()]

    def result(found: Any) -> Params:
        return tuple(Layer(w.T, b) for w, b in _layers(found))

    return Call(run, result=result)


def adam(
    params: Params, x: Any, y: Any, orders: np.ndarray, rate: float, members: int
) -> Callable[[], Params]:
    """Adam by the usual loop, or on `torch.func.vmap` of a gradient of many alike.

    Args:
      params: Where each member begins.
      x: Features `[N, n_0]`.
      y: Labels `[N, 1]`.
      orders: Rows of each step's batch, `[steps, batch]`, which members share.
      rate: The learning rate.
      members: How many; 0 is one network that is not under vmap.

    Returns:
      A function that trains from the start, and returns parameters, of members
      stacked.
    """
    torch = _library()
    start, data = _tensors(params), _tensors((x, y))
    if members:
        start = [leaf.expand(members, *leaf.shape) for leaf in start]
    mapped = torch.func.vmap(torch.func.grad(_loss), in_dims=(0, None, None))
    batches = torch.tensor(orders).to(start[0].device)

    def train() -> Params:
        leaves = [leaf.clone().requires_grad_(not members) for leaf in start]
        optimizer = torch.optim.Adam(leaves, lr=rate, fused=True)
        for rows in batches:
            batch = [t[rows] for t in data]
            if members:
                grads = mapped(tuple(leaves), *batch)
                for leaf, grad in zip(leaves, grads, strict=True):
                    leaf.grad = grad
            else:
                optimizer.zero_grad()
                _loss(leaves, *batch).backward()
            optimizer.step()
        return _layers(leaves)

    return train
