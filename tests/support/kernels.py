"""Kernels as a user of `pyro.contrib.gp` writes them, and the same as formulas."""

import math

import numpy as np
import torch
from pyro.contrib.gp.kernels import Isotropy, Kernel


class Wendland(Isotropy):
    """(1 - r)^4 (4 r + 1) up to r = 1, and 0 beyond: a covariance in up to three dimensions."""

    calls = 0

    def forward(self, X, Z=None, diag=False):
        type(self).calls += 1
        if diag:
            return self._diag(X)
        r = self._scaled_dist(X, Z).clamp(max=1)
        return self.variance * (1 - r) ** 4 * (4 * r + 1)


class PlainMatern32(Kernel):
    """Matern32 as a kernel of inputs, of which it is not known that it is one of distance."""

    def forward(self, X, Z=None, diag=False):
        if diag:
            return X.new_ones(len(X))
        Z = X if Z is None else Z
        r = math.sqrt(3) * (torch.cdist(self._slice_input(X), self._slice_input(Z)) + 1e-300)
        return (1 + r) * torch.exp(-r)


def gaps(x, z):
    """Differences of coordinates (n, m, p)."""
    return x[:, None] - z


def periodic(x, z, lengthscale=1.0, period=1.0):
    return np.exp(-2 * np.square(np.sin(np.pi * gaps(x, z) / period) / lengthscale).sum(-1))


def wendland(x, z):
    r = np.minimum(np.linalg.norm(gaps(x, z), axis=-1), 1)
    return (1 - r) ** 4 * (4 * r + 1)
