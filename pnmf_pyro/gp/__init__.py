"""Numerics of Gaussian processes: no Pyro sample statement and no optimiser.

Here live the kernels, and two ways to make them affordable. One summarises a field by its values
at inducing points (`inducing`, `cholesky`). The other conditions each place on its neighbours: an
order of places (`ordering`), neighbours in it (`neighbors`), the sparse factor of the precision
(`vecchia`), solves and draws with it (`vecchia_solver`), and all of these from a kernel and places
(`neighborhoods`). Its triangular solves (`triangular`) go over runs of places that do not need one
another (`fronts`). `cache` keeps what the kernel's hyperparameters made.

The room imports from `data` alone. Begin with :mod:`~pnmf_pyro.gp.kernels`, then
:mod:`~pnmf_pyro.gp.neighborhoods`.
"""
