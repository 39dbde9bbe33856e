"""Gaussian processes by dense matrices in float64, written from the textbook and not from the code.

Rasmussen and Williams (2006), chapters 2 and 4; the multi-group kernel from its definition.
"""

import numpy as np


def kappa(name, r):
    """Correlation at distance r in units of the lengthscale."""
    if name == "Matern12":
        return np.exp(-r)
    if name == "Matern32":
        return (1 + np.sqrt(3) * r) * np.exp(-np.sqrt(3) * r)
    if name == "Matern52":
        return (1 + np.sqrt(5) * r + 5 * r**2 / 3) * np.exp(-np.sqrt(5) * r)
    return np.exp(-(r**2) / 2)


def covariance(name, x, z, lengthscale, sigma, gx=None, gz=None, a=0.0, d=None, nugget=0.0):
    """Covariance between places x (n, p) and z (m, p), by two loops."""
    K = np.empty((len(x), len(z)))
    for i in range(len(x)):
        for j in range(len(z)):
            r = np.sqrt(((x[i] - z[j]) ** 2).sum())
            v = 1.0 if gx is None else 1 / (1 + a * d[gx[i], gz[j]] ** 2)
            K[i, j] = sigma**2 * v ** (x.shape[1] / 2) * kappa(name, np.sqrt(v) * r / lengthscale)
            if r == 0 and (gx is None or gx[i] == gz[j]):
                K[i, j] += nugget**2
    return K


def regression(K, K_star, k_star_star, mean, y, noise):
    """Mean and covariance of a field at new places, given y with independent noise variances."""
    solve = np.linalg.solve(K + np.diag(noise), np.column_stack([y - mean, K_star]))
    return mean + K_star.T @ solve[:, 0], k_star_star - K_star.T @ solve[:, 1:]


def kl_joint(m, S, K):
    """KL(N(m, S) || N(0, K)) in nats."""
    inverse = np.linalg.inv(K)
    log_dets = np.linalg.slogdet(K)[1] - np.linalg.slogdet(S)[1]
    return 0.5 * (np.trace(inverse @ S) + m @ inverse @ m - len(m) + log_dets)
