"""ICPE predicts whether CLIP's class is right from the classes of labeled images (WACV 2026, arXiv 2511.22019).

Its confidence is the mean of two probabilities of the answer: CLIP's, and that of a Gaussian per class fitted to the
principal components of image embeddings. By the public notebook (zhenxianglin/ICPE, commit aa9c1441), as we could not
read the paper's text; `default` is ours.
"""

import numpy as np

PRESETS = {
    # The notebook: raw embeddings, a covariance for each class. With fewer images than components it has no inverse,
    # and the ridge of 1e-8 decides alone.
    "official": {"components": 128, "unit": False, "ridge": 1e-8, "prior": 0},
    # Unit embeddings; every class's covariance as if it had `prior` more images per component, of the covariance that
    # all classes share (Friedman, 1989), which itself is shrunk (Ledoit and Wolf, 2004).
    "default": {"components": 128, "unit": True, "ridge": 1e-8, "prior": 1},
}


def class_probability(taught, label, asked, classes, preset="default"):
    """Probability (Q, C) of each class of images asked (Q, D) under Gaussians of taught (N, D) with labels (N,).

    All classes are as likely before; one without an image that teaches has 0.
    """
    from sklearn.covariance import LedoitWolf  # only here: it takes a second to import

    options = PRESETS[preset]
    taught, asked = (np.asarray(each, dtype=np.float64) for each in (taught, asked))
    if options["unit"]:
        taught, asked = (each / np.linalg.norm(each, axis=1, keepdims=True).clip(1e-12) for each in (taught, asked))
    center = taught.mean(axis=0)
    axes = np.linalg.svd(taught - center, full_matrices=False)[2][: min(options["components"], len(taught) - 1)]
    taught, asked = ((each - center) @ axes.T for each in (taught, asked))
    seen = np.unique(label)
    parts = [taught[label == number] - taught[label == number].mean(axis=0) for number in seen]
    shared = LedoitWolf(assume_centered=True).fit(np.concatenate(parts)).covariance_
    more, identity = options["prior"] * len(axes), np.eye(len(axes))
    log_density = np.full((len(asked), classes), -np.inf)
    for number, part in zip(seen, parts, strict=True):
        count = max(len(part) - 1, 1)
        covariance = (part.T @ part + more * shared) / (count + more) + options["ridge"] * identity
        factor = np.linalg.cholesky(covariance)
        white = np.linalg.solve(factor, (asked - taught[label == number].mean(axis=0)).T)
        log_density[:, number] = -0.5 * np.square(white).sum(axis=0) - np.log(np.diag(factor)).sum()
    density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    return density / density.sum(axis=1, keepdims=True)
