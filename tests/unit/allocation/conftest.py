"""Shared by the tests of allocations."""

import pytest


@pytest.fixture
def words(checkpoint, text_file) -> list:
    """Arguments of a short run of ``model_slimming.py`` without a target."""
    flags = ["--num_samples", 16, "--seqlen", 32, "--device", "cpu", "--skip_evaluate"]
    return [checkpoint, "--data_file", text_file, *flags]
