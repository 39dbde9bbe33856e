"""The scikit-learn estimator, the recommended fit, and what a fit leaves behind.

It imports from `training`, `transforms` and the rooms above those. Begin with
:mod:`~pnmf_pyro.estimator.pnmf`, then :mod:`~pnmf_pyro.estimator.plan`.
"""

from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.estimator.stages import (
    Correlate,
    LearnHyperparameters,
    RestoreSpread,
    Settle,
    SettleJointly,
    SettleLoadings,
    WarmUp,
)

__all__ = [
    "PNMF",
    "Correlate",
    "LearnHyperparameters",
    "RestoreSpread",
    "Settle",
    "SettleJointly",
    "SettleLoadings",
    "WarmUp",
]
