"""Optional packages that some flags of the Trainer need and that this suite does not install."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers.training_args import TrainingArguments

# --optim: prefixes of the optimizer's name, module to import, package to install.
_OPTIMIZERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("adamw_torch_xla",), "torch_xla", "torch_xla"),
    (("adamw_torch_npu",), "torch_npu", "torch_npu"),
    (("adamw_torch_4bit", "adamw_torch_8bit"), "torchao", "torchao"),
    (("adamw_anyprecision",), "torchdistx", "torchdistx"),
    (("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_bnb"), "bitsandbytes", "bitsandbytes"),
    (("galore",), "galore_torch", "galore-torch"),
    (("apollo",), "apollo_torch", "apollo-torch"),
    (("lomo", "adalomo"), "lomo_optim", "lomo-optim"),
    (("grokadamw",), "grokadamw", "grokadamw"),
    (("schedule_free",), "schedulefree", "schedulefree"),
    (("stable_adamw",), "optimi", "torch-optimi"),
)
# --report_to, if its name is not that of the package: modules of which one suffices, package to install.
_REPORTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "azure_ml": (("azureml",), "azureml-core"),
    "flyte": (("flytekit",), "flytekit"),
    "comet_ml": (("comet_ml",), "comet-ml"),
}


def optimizer_package(name: str) -> tuple[str, str] | None:
    """Module and package that an optimizer of the Trainer needs; ``None`` for optimizers of torch."""
    packages = ((module, package) for prefixes, module, package in _OPTIMIZERS if name.startswith(prefixes))
    return next(packages, None)


def check_packages(training: TrainingArguments) -> None:
    """Check that the packages of ``--optim``, ``--report_to`` and ``--use_liger_kernel`` are installed.

    Raises:
        UserError: naming the package to install.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    optimizer = str(getattr(training.optim, "value", training.optim))
    package = optimizer_package(optimizer)
    if package is not None:
        _check(f"--optim {optimizer}", package[:1], package[1])
    for name in training.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to {name}: choose among none, all, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        if name != "kubeflow":
            _check(f"--report_to {name}", *_REPORTERS.get(name, ((name,), name)))
    if training.use_liger_kernel:
        _check("--use_liger_kernel true", ("liger_kernel",), "liger-kernel")


def _check(flag: str, modules: tuple[str, ...], package: str) -> None:
    if not any(find_spec(module) for module in modules):
        raise UserError(f"{flag} needs a package that is not installed: pip install {package}")
