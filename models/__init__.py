"""Methods that give frozen embeddings an uncertainty, one file each; `distributions/` and `backbones/` beside them."""
