"""`train upload RUN REPO`: encoder, card, recipe and samples to Hugging Face, after they are shown and confirmed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from ..runtime.optional import needed
from .card import CARD, check_card, write_card
from .checkpoint_files import step_of
from .export import chosen_checkpoint, export
from .page import samples_of
from .recipe import load_recipe
from .run_directory import RunDirectory

MB = 1_000_000


def files_to_send(run: RunDirectory, folder: Path) -> dict[str, Path]:
    """The files of an upload by their names in the repository; encoder and recipe are copied to a folder, which the run does not change.

    Writes the card if the run has none. Raises UserError for a card of another step or recipe.
    """
    checkpoint, recipe = chosen_checkpoint(run, None), load_recipe(str(run.recipe))
    encoder = export(checkpoint, folder / f"{recipe.output.name}.safetensors")
    published = folder / run.recipe.name
    published.write_text(recipe.without_folders().to_toml(), encoding="utf-8")
    readme = run.path / CARD
    if not readme.is_file():
        write_card(run)
    check_card(readme, recipe, step_of(checkpoint))
    files = {CARD: readme, encoder.name: encoder, published.name: published}
    return files | {f"samples/{one['file']}": run.samples / one["file"] for one in samples_of(run.samples)}


def upload(run: RunDirectory, repo: str, private: bool, confirmed: bool) -> str:
    """Send the files of a run to a repository, which is made if it does not exist; returns its address.

    Without `confirmed`, asks at the terminal. Raises UserError if nobody can be asked, for a name that is not valid, for a repository that
    exists and is not as private as asked for, and for what Hugging Face answers.
    """
    hub = needed("huggingface_hub", "huggingface_hub", "train upload")
    try:
        needed("huggingface_hub.utils", "huggingface_hub", "train upload").validate_repo_id(repo)
    except ValueError as error:
        raise UserError(f"{repo} is not a valid name of a repository: {error}", "give NAME or OWNER/NAME.") from error
    with tempfile.TemporaryDirectory() as folder:
        files = files_to_send(run, Path(folder))
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
        _check_visibility(repo, bool(api.repo_info(made.repo_id).private), private)
        adds = [hub.CommitOperationAdd(name, str(path)) for name, path in files.items()]
        api.create_commit(made.repo_id, adds, commit_message="Upload a distilled text encoder")
    except (OSError, errors.HTTPError) as error:  # of files, of Hugging Face, and of the network
        raise UserError(
            f"The files could not be sent: {str(error).strip()}",
            "log in with `hf auth login` as someone who may write to that repository, check the network, then send again.",
        ) from error
    return str(made)


def _check_visibility(repo: str, is_private: bool, private: bool) -> None:
    """Raise UserError for a repository that is public and should be private, and for the reverse."""
    if is_private != private:
        found, asked = ("private", "public") if is_private else ("public", "private")
        option = "add --private" if is_private else "leave out --private"
        raise UserError(
            f"Nothing was sent: the repository {repo} is {found}; expected a {asked} one.",
            f"{option}, or give another repository, or change its visibility in its settings on Hugging Face.",
        )
