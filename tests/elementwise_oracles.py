"""PCB, Consensus TA, Localize-and-Stitch and MetaGPT in float64, from their papers."""

import numpy as np


def pcb(matrices, ratio=0.1, input_axis=1):
    T, shape = len(matrices), matrices[0].shape
    tau = np.stack([np.ravel(M) for M in matrices])
    d, top, low = tau.shape[1], np.zeros_like(tau[0]), np.zeros_like(tau[0])

    def spread(x):
        return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else np.ones_like(x)

    for t in tau:
        ordered, out = np.sort(np.abs(t)), int(d * 1e-4)
        clipped = np.sign(t) * np.clip(np.abs(t), ordered[out], ordered[d - 1 - out])
        beta = np.exp(T * spread(np.abs(clipped)) ** 2) * np.tanh(t * tau.sum(0))
        threshold = np.sort(beta)[int(d * (1 - ratio))]
        if threshold < beta.max():
            beta = spread(np.maximum(beta, threshold))
        else:
            beta = np.where((beta == threshold) & (beta > 0), 1.0, 0.0)
        top, low = top + beta * clipped, low + beta
    return np.divide(top, low, out=np.zeros_like(top), where=low > 0).reshape(shape)


def consensus_ta(matrices, mask=0.4, agreeing=2, input_axis=1):
    S = sum(matrices)
    masks = [np.abs(M) >= mask * np.abs(S - M) for M in matrices]
    return S * (np.sum(masks, axis=0) >= agreeing)


def localize_stitch(matrices, input_axis=1):
    masks = [M != 0 for M in matrices]
    return sum(matrices) / np.maximum(1, np.sum(masks, axis=0))


def metagpt(matrices, squares, input_axis=1):
    """The squares are ``|θ_i - θ_0|²`` of the whole models."""
    return sum(square * M for square, M in zip(squares, matrices, strict=True)) / sum(squares)
