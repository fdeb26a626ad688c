"""Model classes of pruned checkpoints, registered so that the suite loads them without remote code."""

from models.registry import install

install()
