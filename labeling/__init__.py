"""Active learning: which images of a pool to label, and the classifier that learns from the labels."""

# What each of labeling/strategies.py chooses from the pool, for --help, which does not wait for torch.
STRATEGIES = {
    "random": "Random images of the pool.",
    "random-targeted": "Nearest neighbors of random target images.",
    "entropy": "Images of the pool with the highest predictive entropy.",
    "entropy-targeted": "Nearest neighbors of the target images with the highest predictive entropy.",
    "bald": "Nearest neighbors of the target images on which drawn weights disagree most (BALD).",
    "epig": "Images of the pool whose labels tell most about the target's (EPIG), one by one.",
    "k-center": "Images farthest from all that were chosen before, by direction of embedding (k-center).",
    "entropy-density": "As entropy, each times the density of the pool at the image.",
    "entropy-targeted-density": "As entropy-targeted, each times the density of the target at the image.",
    "bald-density": "As bald, each times the density of the target at the image.",
}
