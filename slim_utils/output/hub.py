"""Publishing a checkpoint folder on the model hub."""

import argparse
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from slim_utils.common.errors import UserError

# HTTPError is the base of whatever the transport of the installed huggingface_hub raises.
HUB_ERRORS = (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError)


# What an earlier checkpoint may have left, and would be loaded instead of, or beside, the new one.
_STALE_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"]


def add_hub_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say where the small model is published."""
    group.add_argument("--push_to_hub", metavar="NAME", help="publish the small model, with its card, under this name")
    group.add_argument("--hub_public", action="store_true", help="for all to see (default: private)")


def publishable_name(name: str, overwrite: bool) -> str:
    """``name`` with its namespace; makes sure, before any long work, that it can be published.

    Raises:
        UserError: if the hub cannot be reached, knows no login, or has such a model and ``overwrite`` is not set.
    """
    api = HfApi()
    try:
        user = api.whoami()["name"]
        name = name if "/" in name else f"{user}/{name}"
        exists = api.repo_exists(name)
    except HUB_ERRORS as error:
        raise UserError(f"--push_to_hub {name}: {_first_line(error)}; log in with 'hf auth login'") from error
    if exists and not overwrite:
        raise UserError(f"--push_to_hub {name}: exists; choose another name or pass --overwrite")
    return name


def publish(folder: Path, name: str, public: bool) -> str:
    """Upload all of ``folder`` to the model ``name``; its address.

    Files of the same names are replaced, and an earlier checkpoint's weights removed; all else there stays.

    Args:
        folder: of a checkpoint.
        name: with its namespace.
        public: whether a new model can be seen by all; one that exists stays as visible as it is.

    Raises:
        UserError: if the hub refuses.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Pruned by SlimGPT", delete_patterns=_STALE_WEIGHTS
        )
        return str(commit.repo_url)
    except HUB_ERRORS as error:
        raise UserError(f"--push_to_hub {name}: {_first_line(error)}; {folder} is whole and can be uploaded") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
