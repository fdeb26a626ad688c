"""The configuration of a pruning run and the flags of its script."""

from dataclasses import asdict, fields

import model_slimming
from slim_utils.pruning_config import Effect, PruningConfig


def test_pruning_config_has_a_field_with_an_effect_for_every_flag():
    parser = model_slimming.build_parser()
    flags = {action.dest for action in parser._actions} - {"help"}
    assert flags == {field.name for field in fields(PruningConfig)}
    assert all(isinstance(field.metadata["effect"], Effect) for field in fields(PruningConfig))


def test_build_parser_defaults_are_those_of_the_config():
    args = vars(model_slimming.build_parser().parse_args(["MODEL"]))
    assert args == asdict(PruningConfig(model_path="MODEL"))
    # No flag sets another default.
    assert all(
        action.default == getattr(PruningConfig(), action.dest)
        for action in model_slimming.build_parser()._actions
        if action.dest != "help"
    )


def test_flags_of_one_effect_are_named_as_on_the_command_line():
    config = PruningConfig(batch_samples=7)
    rounding = {"--batch_samples": 7, "--tokens_per_forward": None, "--solve_dtype": "auto"}
    assert config.flags(Effect.ROUNDING) == rounding
    assert "--sparsity" in config.flags(Effect.VALUE) and "--save_dir" not in config.flags(Effect.VALUE)
