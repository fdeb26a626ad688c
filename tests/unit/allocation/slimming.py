"""``model_slimming.py`` in this process."""

import model_slimming


def main(*arguments: object) -> None:
    """Run the script."""
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))
