"""Methods of subspaces in float64, written from their papers, independent of the engine."""

import numpy as np

from tests.oracle import trim


def polar(X, singular=1e-3):
    P, d, Qt = np.linalg.svd(X, full_matrices=False)
    kept = d > singular * d[0]
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


def iso_cts(matrices, input_axis=1, common=0.8):
    side, T = min(matrices[0].shape), len(matrices)
    t = min(round((side - int(common * side)) / T), side // T)
    k = side - t * T
    U, s, Vh = np.linalg.svd(sum(matrices), full_matrices=False)
    k = min(k, int((s > 1e-6 * max(s[0], 1e-300)).sum()))
    parts, U_c = [(U[:, :k], s[:k], Vh[:k].T)], U[:, :k]
    for M in matrices:
        U, s, Vh = np.linalg.svd(M - U_c @ U_c.T @ M, full_matrices=False)
        own = min(t, int((s > 1e-6 * np.linalg.norm(M)).sum()))
        parts.append((U[:, :own], s[:own], Vh[:own].T))
    U, s, V = (np.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
    return s.sum() / side * polar(U, 1e-5) @ polar(V, 1e-5).T if s.size else 0 * matrices[0]


def knots(matrices, input_axis=1, keep=1.0):
    tasks = [M if input_axis == 1 else M.T for M in matrices]
    U, s, Vh = np.linalg.svd(np.concatenate(tasks, axis=1), full_matrices=False)
    kept = s > 1e-6 * max(s[0], 1e-300)
    coordinates = np.split((s[:, None] * Vh)[kept], len(tasks), axis=1)
    X = np.stack([trim(C * (abs(C) > 1e-10 * np.linalg.norm(C)), keep) for C in coordinates])
    agreeing = np.where(np.sign(X) == np.sign(X.sum(axis=0)), X, 0)
    mean = agreeing.sum(axis=0) / np.maximum(1, (agreeing != 0).sum(axis=0))
    return U[:, kept] @ mean if input_axis == 1 else (U[:, kept] @ mean).T


def calibrate(M, matrices, alpha=1.0, input_axis=1, basis=None):
    M, *tasks = [A if input_axis == 1 else A.T for A in (M, *matrices)]
    U, s, Vh = basis or np.linalg.svd(M, full_matrices=False)
    for r in range(int((s > 1e-6 * max(s[0], 1e-300)).sum())):
        a, responses = U[:, r] @ M, [U[:, r] @ A for A in tasks]
        pairs = zip(responses, tasks, strict=True)
        heard = [np.linalg.norm(b) > 3.5e-4 * np.linalg.norm(A) for b, A in pairs]
        c = [a @ b / (b @ b) if h else 0 for b, h in zip(responses, heard, strict=True)]
        s[r] *= len(tasks) / sum(max(alpha, x) for x in c)
    return (U * s) @ Vh if input_axis == 1 else ((U * s) @ Vh).T
