"""Publishing a checkpoint folder on the model hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from slim_utils.errors import UserError

# HTTPError is the base of whatever the transport of the installed huggingface_hub raises.
HUB_ERRORS = (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError)


def check_publishable(name: str, overwrite: bool) -> str:
    """Make sure, before any long work, that ``name`` can be published; the name with its namespace.

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


def publish(folder: Path, name: str) -> str:
    """Upload all of ``folder`` as all there is of the model ``name``; its address.

    Raises:
        UserError: if the hub refuses.
    """
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Pruned by SlimGPT", delete_patterns="*"
        )
        return str(commit.repo_url)
    except HUB_ERRORS as error:
        raise UserError(f"--push_to_hub {name}: {_first_line(error)}; {folder} is whole and can be uploaded") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
