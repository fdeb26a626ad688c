"""Publish a checkpoint folder on the model hub."""

import argparse
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from slim_utils.common.errors import UserError

# HTTPError is the base class of the transport errors of the installed huggingface_hub.
HUB_ERRORS = (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError)

# Weights of an earlier checkpoint, which would otherwise be loaded instead of the new ones.
_STALE_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"]


def add_hub_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of publishing the pruned model."""
    group.add_argument("--push_to_hub", metavar="NAME", help="publish the pruned model with its card as NAME")
    group.add_argument("--hub_public", action="store_true", help="make a new model public (default: private)")


def publishable_name(name: str, overwrite: bool) -> str:
    """``name`` with its namespace, checked for publishing before any long work.

    Raises:
        UserError: if the hub cannot be reached, no user is logged in, or the model exists without ``overwrite``.
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
    """Upload ``folder`` to the model ``name`` and return its URL.

    Files of the same name are replaced and the weights of an earlier checkpoint removed; all other files are kept.

    Args:
        folder: checkpoint folder.
        name: model name with its namespace.
        public: whether a new model is public; the visibility of an existing model does not change.

    Raises:
        UserError: if the upload fails.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Pruned by SlimGPT", delete_patterns=_STALE_WEIGHTS
        )
        return str(commit.repo_url)
    except HUB_ERRORS as error:
        raise UserError(f"--push_to_hub {name}: {_first_line(error)}; {folder} is complete, upload it later") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
