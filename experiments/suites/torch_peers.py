"""Baselines in PyTorch and libraries for it, written as in their documentation.

The functions take the arguments of the JAX baselines. The libraries are optional, and
are imported where they are used.
"""

import contextlib
import io
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
    """Params as NumPy arrays, from alternating weights and biases."""
    arrays: Any = [tensor.detach().cpu().numpy() for tensor in tensors]
    return tuple(Layer(w, b) for w, b in zip(arrays[::2], arrays[1::2], strict=True))


def _model(params: Params) -> Any:
    """The network as a torch.nn.Sequential."""
    torch, leaves = _library(), _tensors(params)
    modules: list[Any] = []
    for w, b in zip(leaves[::2], leaves[1::2], strict=True):
        linear = torch.nn.Linear(*w.shape, device=w.device)
        linear.weight.data, linear.bias.data = w.T.contiguous(), b
        modules += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*modules[:-1])


def _loss(params: Any, x: Any, y: Any) -> Any:
    """Mean loss per example; `params` are alternating weights and biases."""
    torch: Any = _library()
    h = x
    for w, b in zip(params[:-2:2], params[1:-2:2], strict=True):
        h = torch.relu(torch.addmm(b, h, w))
    a = torch.addmm(params[-1], h, params[-2])
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    return entropy(a, y, reduction="sum") / len(y)


def gradient(params: Params, x: Any, y: Any, v: Any) -> Call:
    """Loss and gradient by autograd, in eager mode."""
    torch = _library()
    leaves = [leaf.requires_grad_() for leaf in _tensors(params)]
    data = _tensors((x, y))

    def run() -> Any:
        value = _loss(leaves, *data)
        return value, torch.autograd.grad(value, leaves)

    return Call(run, result=lambda found: (found[0].item(), _layers(found[1])))


def _example_gradients(params: Params, x: Any, y: Any) -> tuple[Any, Any]:
    """Functions that return per-example gradients, and the norms of such gradients."""
    torch: Any = _library()
    leaves, data = tuple(_tensors(params)), _tensors((x, y))

    def loss(leaves: Any, x: Any, y: Any) -> Any:
        return _loss(leaves, x[None], y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def norms(grads: Any) -> Any:
        leaf_norms = [g.flatten(1).norm(dim=1) for g in grads]
        return torch.stack(leaf_norms).norm(dim=0)

    return lambda: gradients(leaves, *data), norms


def norms(params: Params, x: Any, y: Any, v: Any) -> Call:
    """Norms of per-example gradients by `torch.func.vmap`."""
    gradients, norms = _example_gradients(params, x, y)
    return Call(lambda: norms(gradients()), result=lambda found: found.cpu().numpy())


def clipped_sum(max_norm: Any, params: Params, x: Any, y: Any, v: Any) -> Call:
    """Clipped sum of per-example gradients by `torch.func.vmap`."""
    torch = _library()
    gradients, norms = _example_gradients(params, x, y)

    def run() -> Any:
        grads = gradients()
        factors = (max_norm / norms(grads)).clamp(max=1)
        return [torch.tensordot(factors, g, 1) for g in grads]

    return Call(run, result=_layers)


def ghost_clipped_sum(max_norm: Any, params: Params, x: Any, y: Any, v: Any) -> Call:
    """Clipped sum by Opacus's ghost clipping, without per-example gradients."""
    torch = _library()
    from opacus.grad_sample import (  # pyright: ignore[reportMissingImports]
        GradSampleModuleFastGradientClipping,
    )

    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    data = _tensors((x, y))
    model = GradSampleModuleFastGradientClipping(
        _model(params),
        loss_reduction="sum",
        max_grad_norm=max_norm,
    )
    entropy = torch.nn.BCEWithLogitsLoss(reduction="none")

    def run() -> Any:
        model.zero_grad()
        losses = entropy(model(data[0]), data[1]).sum(dim=1)
        losses.sum().backward(retain_graph=True)
        model.zero_grad()
        factors = model.get_clipping_coef()
        model.disable_hooks()
        (factors * losses).sum().backward()
        model.enable_hooks()
        return [p.grad for p in model.parameters()]

    def result(found: Any) -> Params:
        return tuple(Layer(w.T, b) for w, b in _layers(found))

    return Call(run, result=result)


def _loader(*tensors: Any) -> Any:
    """A DataLoader of one batch."""
    data: Any = _library().utils.data
    return data.DataLoader(data.TensorDataset(*tensors), batch_size=len(tensors[0]))


def laplace_variances(
    tau: float, params: Params, x: Any, y: Any, x2: Any, y2: Any
) -> Call:
    """Variances of the logits of x2 by laplace-torch, with the full matrix.

    laplace-torch has a softmax of at least two logits, so that a logit of 0 is put
    before the network's. Their cross-entropy is that of the sigmoid.
    """
    torch: Any = _library()
    from laplace import Laplace  # pyright: ignore[reportAttributeAccessIssue]

    class TwoLogits(torch.nn.Module):
        def forward(self, a: Any) -> Any:
            return torch.cat([torch.zeros_like(a), a], dim=1)

    model = torch.nn.Sequential(*_model(params), TwoLogits())
    features, labels, new = _tensors((x, y, x2))
    data = _loader(features, labels[:, 0].long())
    options: Any = {"subset_of_weights": "all", "hessian_structure": "full"}

    def run() -> Any:
        default = torch.get_default_dtype()
        torch.set_default_dtype(new.dtype)  # its matrix has the default dtype
        try:
            posterior = Laplace(model, "classification", prior_precision=tau, **options)
            posterior.fit(data)
            _, covariance = posterior._glm_predictive_distribution(new)
        finally:
            torch.set_default_dtype(default)
        return covariance[:, 1, 1]

    return Call(run, result=lambda found: found.detach().cpu().numpy())


def hessian_influence(
    tau: float, params: Params, x: Any, y: Any, x2: Any, y2: Any
) -> Call:
    """Influence of all pairs by dattri, with the explicit Hessian."""
    torch: Any = _library()
    from dattri.algorithm.influence_function import (  # pyright: ignore[reportMissingImports]
        IFAttributorExplicit,
    )
    from dattri.task import AttributionTask  # pyright: ignore[reportMissingImports]

    model = _model(params)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    features, labels, new, new_labels = _tensors((x, y, x2, y2))
    train, test = _loader(features, labels), _loader(new, new_labels)

    def loss(params: Any, data: Any) -> Any:
        a = torch.func.functional_call(model, params, data[0])
        return entropy(a, data[1], reduction="sum")

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())

    def run() -> Any:
        attributor = IFAttributorExplicit(
            task, device=str(features.device), regularization=tau
        )
        attributor.cache(train)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            return attributor.attribute(train, test)

    return Call(run, result=lambda found: found.detach().cpu().numpy())


def adam(
    params: Params, x: Any, y: Any, orders: np.ndarray, rate: float, members: int
) -> Callable[[], Params]:
    """Adam by the usual loop, for one network or for many by `torch.func.vmap`.

    Args:
      params: Initial parameters of every network.
      x: Features `[N, n_0]`.
      y: Labels `[N, 1]`.
      orders: Indices of each step's examples, `[steps, batch]`, shared by the networks.
      rate: The learning rate.
      members: Number of networks; 0 is one network without vmap.

    Returns:
      A function that trains from `params` and returns the parameters, those of several
      networks stacked.
    """
    torch = _library()
    start, data = _tensors(params), _tensors((x, y))
    if members:
        start = [leaf.expand(members, *leaf.shape) for leaf in start]
    gradients = torch.func.vmap(torch.func.grad(_loss), in_dims=(0, None, None))
    batches = torch.tensor(orders).to(start[0].device)

    def train() -> Params:
        leaves = [leaf.clone().requires_grad_(not members) for leaf in start]
        optimizer = torch.optim.Adam(leaves, lr=rate, fused=True)
        for indices in batches:
            batch = [t[indices] for t in data]
            if members:
                grads = gradients(tuple(leaves), *batch)
                for leaf, grad in zip(leaves, grads, strict=True):
                    leaf.grad = grad
            else:
                optimizer.zero_grad()
                _loss(leaves, *batch).backward()
            optimizer.step()
        return _layers(leaves)

    return train
