"""Binary cross-entropy networks in JAX, with gradients derived by hand."""

from jaxbce import curvature, per_example
from jaxbce.checking import check_gradients
from jaxbce.gradients import (
    ChainRule,
    chain_rule,
    deltas,
    grad,
    loss,
    value_and_grad,
)
from jaxbce.losses import bce, bce_with_logits
from jaxbce.network import Layer, Trace, forward, init, logits, predict_proba
from jaxbce.sweeps import SweepResult, grid, sweep
from jaxbce.training import FitResult, fit

__version__ = "0.1.0"
