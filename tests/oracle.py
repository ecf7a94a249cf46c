"""The paper in float64, at most 25 lines, independent of the engine (Algorithms 1 and 2)."""

import numpy as np


def trim(x, density):
    order = np.argsort(-np.abs(x).ravel(), kind="stable")
    kept = np.zeros(x.size)
    k = max(1, int(density * x.size))
    kept[order[:k]] = x.ravel()[order[:k]]
    return kept.reshape(x.shape)


def superpose(matrices, rank=None):
    U, s, Vh = zip(*(np.linalg.svd(M, full_matrices=False) for M in matrices), strict=True)
    keep = [min(rank or len(t), int((t > 1e-6 * t[0]).sum())) for t in s]
    U = np.concatenate([u[:, :k] for u, k in zip(U, keep, strict=True)], axis=1)
    V = np.concatenate([v[:k].T for v, k in zip(Vh, keep, strict=True)], axis=1)
    sigma = np.concatenate([t[:k] for t, k in zip(s, keep, strict=True)])
    alpha = np.linalg.solve((U.T @ U) * (V.T @ V), sigma)
    return (U * alpha) @ V.T


def merge_weight(base, tuned, rule, weights, densities, lam, rank=None):
    pairs = zip(tuned, weights, densities, strict=True)
    tau = [trim(w * (P.astype(np.float64) - base), d) for P, w, d in pairs]
    merged = superpose(tau, rank) if rule == "superpose" else sum(tau)
    return base + (merged / len(tau) if rule == "mean" else lam * merged)
