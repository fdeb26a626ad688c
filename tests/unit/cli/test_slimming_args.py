"""What the flags of ``model_slimming.py`` lead to before anything is pruned."""

from contextlib import nullcontext

import pytest
import torch

import model_slimming
from slim_utils.cli.slimming_args import check_search
from slim_utils.common.errors import UserError
from slim_utils.families import find_family
from slim_utils.layerwise.offload import LayerHost
from slim_utils.layerwise.settings import WalkSettings
from tests.conftest import make_tiny

CPU = torch.device("cpu")


def test_check_search_changes_no_argument(checkpoint, text_file):
    args = model_slimming.process_args(
        model_slimming.build_parser().parse_args(
            [str(checkpoint), "--data_file", str(text_file), "--target_ratio", "0.3", "--preset", "best"]
        )
    )
    before = vars(args).copy()
    for name, refused in (("mixtral", True), ("gqa", False)):
        model = make_tiny(name)
        with pytest.raises(UserError) if refused else nullcontext():
            check_search(args, LayerHost(model, find_family(model.config)), WalkSettings(CPU, CPU))
        assert vars(args) == before
