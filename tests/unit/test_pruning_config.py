"""The configuration of a pruning run and the flags of its script."""

from dataclasses import asdict, fields

import model_slimming
from slim_utils.pruning_config import Effect, PruningConfig


def test_every_flag_of_the_script_is_a_field_that_says_what_depends_on_it():
    parser = model_slimming.build_parser()
    flags = {action.dest for action in parser._actions} - {"help"}
    assert flags == {own.name for own in fields(PruningConfig)}
    assert all(isinstance(own.metadata["effect"], Effect) for own in fields(PruningConfig))


def test_defaults_of_the_script_are_those_of_the_configuration():
    args = vars(model_slimming.build_parser().parse_args(["MODEL"]))
    assert args == asdict(PruningConfig(model_path="MODEL"))
    # No flag gives its default apart from the configuration.
    assert all(
        action.default == getattr(PruningConfig(), action.dest)
        for action in model_slimming.build_parser()._actions
        if action.dest != "help"
    )


def test_flags_of_an_effect_are_spelled_as_on_the_command_line():
    config = PruningConfig(batch_samples=7)
    assert config.flags(Effect.ROUNDING) == {"--batch_samples": 7}
    assert "--sparsity" in config.flags(Effect.VALUE) and "--save_dir" not in config.flags(Effect.VALUE)
