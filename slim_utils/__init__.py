"""SlimGPT structured pruning: the OBS maths, the layer-wise pruner, the table of families, outputs and exports."""

__version__ = "0.1.0"
