"""Numerics of Gaussian processes: kernels, inducing points, neighbours, sparse factors.

No Pyro sample statement and no optimiser. It imports from `data`. Begin with
:mod:`~pnmf_pyro.gp.kernels`; inducing points and neighbours are two ways on from there.
"""
