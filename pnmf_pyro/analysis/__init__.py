"""What to do with a fit: interpret it, match it with another, check it, choose its size.

It imports from `estimator` and the rooms above that. Begin with
:mod:`~pnmf_pyro.analysis.interpretation`.
"""

from pnmf_pyro.analysis.calibration import Calibration, calibrate
from pnmf_pyro.analysis.clustering import Domains, domains
from pnmf_pyro.analysis.flowsig import to_flowsig

__all__ = ["Calibration", "Domains", "calibrate", "domains", "to_flowsig"]
