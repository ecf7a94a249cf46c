"""Every tolerance of the engine, with its reason."""

from collections.abc import Mapping

import torch

RANK = 1e-6
"""A triple with ``s_k <= RANK * s_1`` is rounding noise of the decomposition, not a feature."""

RESIDUAL: Mapping[torch.dtype, float] = {torch.float32: 2e-7, torch.float64: 1e-14}
"""The solve stops when ``|G alpha - s| <= RESIDUAL * |s|``, near the rounding of its products."""

MAX_ITERATIONS = 400
"""Lanczos steps before the solve gives up; well-posed systems need 5 to 15."""

HEAD = 3e-3
"""Above ``HEAD * s_1`` a float32 image of an exact right vector is as good as a float64 one."""

SHORT = 0.03
"""Below ``SHORT * s_1`` an image of a float32 right vector is summed in float64."""

SMALL_ANGLE = 0.01
"""Largest angle, in radians, after which a sweep of rotations leaves less than rounding does."""

MAX_SWEEPS = 8
"""Sweeps over all pairs before refinement gives up; one to four reach ``SMALL_ANGLE``."""

EQUAL = 1e-6
"""Pairs of singular values that differ by less, relative to the largest, are not rotated: their
angle would be noise. It is three times the rounding in them: with 0 the merged matrix of a steep
spectrum of 768 is 5e-4 off instead of 6e-5, and six decades take eight sweeps instead of one
(measured)."""

CLOSE = 1e-4
"""Singular values that differ by less, relative to themselves, are separated in float64.
Where gaps are random, 3e-5 lets the error of M rise from 1e-5 to 1e-3; 3e-4 halves it, and has
float64 work on nine times as many vectors."""

LARGEST_ROTATION = 0.8
"""Sum of the angles by which one sweep rotates a vector; after more it would not be orthonormal."""

TAIL = 0.1
"""A float32 Gram matrix blurs triples below ``TAIL * s_1``; these are decomposed again, alone."""

ALONG = 0.02
"""Below ``ALONG * s_1`` an image is freed of what rounding put along longer ones, 5e-6 of it there
(measured: with 0.1 or with 0.002 instead the median error moves by a twentieth)."""

FINE_TAIL = 0.2
"""``TAIL`` where refinement follows: it leaves so few vectors mixed that two sweeps do."""

ROUGH_TAIL = 0.05
"""``TAIL`` where the checkpoints' own rounding hides more (``benchmarks/accuracy.py``)."""

BLURRED = 1e-3
"""Below ``BLURRED`` of the largest, eigenvalues of a float32 Gram matrix are mixed with others."""

WELL_POSED = 2.0
"""Up to ``sᵀ G⁻¹ s = WELL_POSED * sᵀs`` the exact solution is taken as it is."""

ILL_POSED = 4.0
"""From ``sᵀ G⁻¹ s = ILL_POSED * sᵀs`` on, contradicting directions are cut at ``CUTOFF``."""

CUTOFF = 0.4
"""Eigenvalue of ``G`` below which an ill-posed system is damped."""

TRUNCATED = 2e-4
"""Residual of the kept triples, relative to ``|s|``, at which a truncated decomposition stops."""
