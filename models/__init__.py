"""Methods that give frozen embeddings an uncertainty, one file each; configs/methods lists them."""
