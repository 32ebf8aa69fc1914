"""Methods that give frozen embeddings an uncertainty, one file each, and the frozen backbone they build on."""
