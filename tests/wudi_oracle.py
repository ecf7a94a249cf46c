"""WUDI in closed form and its relatives, in float64 and by plain inversion."""

import numpy as np

from tests.oracle import trim


def wudi(matrices, ridge=0.3, prior="matched", input_axis=1, weighting="unit", inputs=1.0):
    """The minimum with a ridge; without one, the least squares solution nearest to the prior."""
    A, B, P = system(matrices, prior, input_axis, weighting, inputs)
    mu = ridge * np.trace(A) / len(A)
    inverse = np.linalg.inv(A + mu * np.eye(len(A))) if ridge else np.linalg.pinv(A, 1e-12)
    M = P + (B - P @ A) @ inverse
    return M if input_axis == 1 else M.T


def system(matrices, prior, input_axis=1, weighting="unit", inputs=1.0):
    tasks = [M if input_axis == 1 else M.T for M in matrices if np.any(M)] or [0 * matrices[0]]
    squares = [np.sum(M * M) or 1 for M in tasks]
    w = (
        [1 / q for q in squares]
        if weighting == "unit"
        else [len(tasks) / sum(squares)] * len(tasks)
    )
    C = [x * trim(M, inputs).T @ trim(M, inputs) for x, M in zip(w, tasks, strict=True)]
    B, S = sum(M @ c for M, c in zip(tasks, C, strict=True)), sum(tasks)
    factor = {"sum": 1, "mean": 1 / len(tasks), "none": 0}.get(prior)
    if factor is None:
        factor = min(1, sum(squares) / np.sum(S * S)) if np.any(S) else 0
    return sum(C), B, factor * S


def swudi(matrices, t, leading, steps=400):
    """Gradient flow from the sum on the leading eigenvectors, in steps of its Taylor series."""
    A, B, M = system(matrices, "sum")
    Q = np.linalg.eigh(A)[1][:, len(A) - int(leading * len(A)) :]
    A, B = Q.T @ A @ Q, (B - M @ A) @ Q
    X, h = np.zeros_like(B), t / steps
    for _ in range(steps):
        term = h * (B - X @ A)
        for order in range(2, 20):
            X, term = X + term, -h / order * term @ A
    return M + X @ Q.T
