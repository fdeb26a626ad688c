"""SlimGPT structured pruning: the OBS maths, the layer-wise pruner, the table of families and what a run leaves behind."""

__version__ = "0.1.0"
