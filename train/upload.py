"""`train upload RUN REPO`: encoder, card, recipe and samples to Hugging Face, after they are shown and confirmed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from ..runtime.optional import needed
from .card import CARD, write_card
from .checkpoint_files import STUDENT, check_files, read_manifest
from .export import chosen_checkpoint
from .page import samples_of
from .recipe import load_recipe
from .run_directory import RunDirectory

MB = 1_000_000


def files_to_send(run: RunDirectory) -> dict[str, Path]:
    """The files of an upload by their names in the repository. Writes the card if the run has none."""
    checkpoint = chosen_checkpoint(run, None)
    check_files(checkpoint, read_manifest(checkpoint), [STUDENT])
    readme = run.path / CARD
    if not readme.is_file():
        write_card(run)
    files = {
        CARD: readme,
        f"{load_recipe(str(run.recipe)).output.name}.safetensors": checkpoint / STUDENT,
        run.recipe.name: run.recipe,
    }
    return files | {f"samples/{one['file']}": run.samples / one["file"] for one in samples_of(run.samples)}


def upload(run: RunDirectory, repo: str, private: bool, confirmed: bool) -> str:
    """Send the files of a run to a repository, which is made if it does not exist; returns its address.

    Without `confirmed`, asks at the terminal. Raises UserError if nobody can be asked, for a name that is not valid, and for what
    Hugging Face answers.
    """
    hub = needed("huggingface_hub", "huggingface_hub", "train upload")
    try:
        needed("huggingface_hub.utils", "huggingface_hub", "train upload").validate_repo_id(repo)
    except ValueError as error:
        raise UserError(f"{repo} is not a valid name of a repository: {error}", "give NAME or OWNER/NAME.") from error
    files = files_to_send(run)
    _show(files, repo, private)
    if not confirmed and not _confirmed():
        return ""
    return _send(hub, files, repo, private)


def _show(files: dict[str, Path], repo: str, private: bool) -> None:
    sys.stdout.write(f"To the {'private' if private else 'public'} repository {repo} on Hugging Face:\n")
    for name, path in files.items():
        sys.stdout.write(f"  {path.stat().st_size / MB:10.3f} MB  {name}\n")


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("Nothing was sent.", "add --yes to send these files.")
    sys.stdout.write("Send them? [y/N] ")
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    sys.stdout.write("Nothing was sent.\n")
    return False


def _send(hub: Any, files: dict[str, Path], repo: str, private: bool) -> str:
    errors = needed("huggingface_hub.errors", "huggingface_hub", "train upload")
    api = hub.HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        adds = [hub.CommitOperationAdd(name, str(path)) for name, path in files.items()]
        api.create_commit(made.repo_id, adds, commit_message="Upload a distilled text encoder")
    except (OSError, errors.HTTPError) as error:  # of files, of Hugging Face, and of the network
        raise UserError(
            f"The files could not be sent: {str(error).strip()}",
            "log in with `hf auth login` as someone who may write to that repository, check the network, then send again.",
        ) from error
    return str(made)
