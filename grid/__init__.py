"""The jobs of a grid: on this machine's devices, or on a cluster."""
