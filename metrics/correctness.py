"""Uncertainties of an answer by the probabilities of all: DOCTOR and Rel-U.

Q queries, C classes; in retrieval, where no two galleries have the same items, C ranks. Larger = less certain.
"""

import numpy as np


def doctor(probability):
    """DOCTOR's (1 - g) / g, (Q,), with g the sum of squared probabilities (Q, C); Granese et al., NeurIPS 2021.

    >>> doctor(np.array([[1.0, 0.0], [0.5, 0.5]])).tolist()
    [0.0, 1.0]
    """
    collision = (probability**2).sum(axis=1)
    return (1 - collision) / collision


def relative_matrix(probability, hit, balance=0.5):
    """Rel-U's matrix (C, C): which pairs of classes share an answer more where it is wrong than where it is right.

    probability: (Q, C) and hit: (Q,), of held-out images. Off the diagonal, the positive part of balance times the mean
    outer product of wrong answers less (1 - balance) times that of right ones, to norm 1; ones if there is none
    (Rel-U: ICLR 2024, arXiv 2306.01710).

    >>> relative_matrix(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([0, 1])).round(3).tolist()
    [[0.0, 0.707], [0.707, 0.0]]
    """
    right = np.asarray(hit) > 0.5
    means = [probability[rows].T @ probability[rows] / max(rows.sum(), 1) for rows in (~right, right)]
    matrix = np.maximum(balance * means[0] - (1 - balance) * means[1], 0)
    np.fill_diagonal(matrix, 0)
    if not matrix.any():
        matrix = 1 - np.eye(len(matrix))
    return matrix / np.linalg.norm(matrix)


def relative(probability, matrix):
    """Rel-U's p^T D p, (Q,), of probabilities (Q, C) and a `relative_matrix` (C, C).

    >>> relative(np.array([[0.5, 0.5]]), np.array([[0.0, 1.0], [1.0, 0.0]])).tolist()
    [0.5]
    """
    return ((probability @ matrix) * probability).sum(axis=1)
