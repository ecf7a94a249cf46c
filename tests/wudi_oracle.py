"""WUDI in closed form with a ridge, in float64 and by plain inversion."""

import numpy as np


def wudi(matrices, ridge=0.3, prior="matched", input_axis=1):
    tasks = [M if input_axis == 1 else M.T for M in matrices if np.any(M)]
    if not tasks:
        return 0 * matrices[0]
    squares = [np.sum(M * M) for M in tasks]
    A = sum(M.T @ M / q for M, q in zip(tasks, squares, strict=True))
    B = sum(M @ M.T @ M / q for M, q in zip(tasks, squares, strict=True))
    S = sum(tasks)
    factor = {"sum": 1, "mean": 1 / len(tasks), "none": 0}.get(prior)
    if factor is None:
        factor = min(1, sum(squares) / np.sum(S * S)) if np.any(S) else 0
    mu = ridge * np.trace(A) / len(A)
    M = (B + mu * factor * S) @ np.linalg.inv(A + mu * np.eye(len(A)))
    return M if input_axis == 1 else M.T
