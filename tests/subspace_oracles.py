"""TSV-M and Iso-C in float64, written from their papers, independent of the engine."""

import numpy as np


def polar(X):
    P, d, Qt = np.linalg.svd(X, full_matrices=False)
    kept = d > 1e-3 * d[0]
    return P[:, kept] @ Qt[kept]


def tsv_m(matrices, input_axis=1):
    k = max(1, min(matrices[0].shape) // len(matrices))
    parts = [np.linalg.svd(M, full_matrices=False) for M in matrices if np.any(M)]
    if not parts:
        return 0 * matrices[0]
    kept = [min(k, int((s > 1e-6 * s[0]).sum())) for _, s, _ in parts]
    triples = [(U[:, :r], s[:r], Vh[:r].T) for (U, s, Vh), r in zip(parts, kept, strict=True)]
    U, s, V = (np.concatenate(x, axis=-1) for x in zip(*triples, strict=True))
    return (polar(U) * s) @ polar(V).T


def iso_c(matrices, input_axis=1):
    U, s, Vh = np.linalg.svd(sum(matrices), full_matrices=False)
    kept = s > 1e-6 * max(s[0], 1e-300)
    return s.mean() * U[:, kept] @ Vh[kept]
