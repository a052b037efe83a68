"""Binary cross-entropy networks in JAX, with gradients derived by hand."""

import jax.export

from jaxbce import curvature, laplace, per_example
from jaxbce.checking import check_gradients
from jaxbce.ensembles import ensemble_logits, ensemble_proba
from jaxbce.gradients import deltas, grad, loss, value_and_grad
from jaxbce.losses import bce, bce_with_logits
from jaxbce.network import Activations, Layer, forward, init, logits, predict_proba
from jaxbce.sweeps import SweepResult, grid, sweep
from jaxbce.textbook import ChainRule, chain_rule
from jaxbce.training import FitResult, fit

# So that programs with these results can be serialized.
for _type in (
    Activations,
    ChainRule,
    FitResult,
    Layer,
    SweepResult,
    curvature.KroneckerFactors,
    laplace.LeaveOneOut,
    laplace.Posterior,
    per_example.Clipped,
    per_example.NoiseScale,
    per_example.Scores,
):
    jax.export.register_namedtuple_serialization(
        _type, serialized_name=f"jaxbce.{_type.__name__}"
    )

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "ChainRule",
    "FitResult",
    "Layer",
    "SweepResult",
    "bce",
    "bce_with_logits",
    "chain_rule",
    "check_gradients",
    "curvature",
    "deltas",
    "ensemble_logits",
    "ensemble_proba",
    "fit",
    "forward",
    "grad",
    "grid",
    "init",
    "laplace",
    "logits",
    "loss",
    "per_example",
    "predict_proba",
    "sweep",
    "value_and_grad",
]
