"""Active learning: which images of a pool to label, and the classifier that learns from the labels."""
