"""Walks between latents."""

import numpy as np

from latentd_client.messages import Array


def slerp(first: Array, last: Array, shares: Array) -> Array:
    """Points between two vectors along a great circle, lengths blended linearly. Shape [len(shares), *first] f32.

    Gaussian latents of high dimension lie near a sphere; a straight line between two would leave it. Vectors along
    one line, and zero vectors, have no great circle and are joined by that line.
    """
    a, b = first.astype(np.float64).ravel(), last.astype(np.float64).ravel()
    shares = np.asarray(shares, np.float64)[:, None]
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    points: Array = (1 - shares) * a + shares * b
    if min(lengths) > 0:
        a, b = a / lengths[0], b / lengths[1]
        angle = np.arccos(np.clip(a @ b, -1.0, 1.0))
        if np.sin(angle) > 1e-6:
            direction = (np.sin((1 - shares) * angle) * a + np.sin(shares * angle) * b) / np.sin(angle)
            points = direction * ((1 - shares) * lengths[0] + shares * lengths[1])
    return points.reshape(-1, *first.shape).astype(np.float32)
