"""The only module that knows the Hugging Face hub: bundles go up and come down, with the user's own login."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

SCHEME = "hub:"
REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"


class HubError(ValueError):
    """Something that the hub does not have, or does not let us do; the message says what to do."""


def is_on_hub(place: str | Path) -> bool:
    """Whether a place is on the hub, and not on this machine."""
    return str(place).startswith(SCHEME)


def folder_of(place: str | Path, files: Sequence[str] | None = None) -> Path:
    """The folder of a place on this machine: of `hub:USER/NAME[@REVISION]`, a copy that is downloaded first.

    files: that are wanted; None means all.

    Raises:
        HubError: when it cannot be had.
    """
    if not is_on_hub(place):
        return Path(place).expanduser()
    from huggingface_hub import snapshot_download

    match = re.fullmatch(rf"hub:({REPOSITORY})(?:@(.+))?", str(place))
    if not match:
        raise HubError(f"{str(place)!r} is not of the form hub:USER/NAME or hub:USER/NAME@REVISION")
    with _explained(str(place)):
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=list(files) if files else None))


def check_name(repository: str) -> None:
    """Refuses a name that no repository can have.

    Raises:
        HubError: saying what form it must have.
    """
    if not re.fullmatch(REPOSITORY, repository):
        raise HubError(f"--push-to {repository!r} is not of the form USER/NAME")


def push(folder: Path, repository: str, private: bool, files: Sequence[str]) -> str:
    """Uploads these files of a folder into a repository, which is made if there is none; returns its URL.

    Raises:
        HubError: when it cannot be reached, or there is no login.
    """
    from huggingface_hub import HfApi

    check_name(repository)
    api = HfApi(library_name="n-musketeers")
    with _explained(f"hub:{repository}"):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        message = f"Bundle of the run {folder.name}"
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(files), commit_message=message)
    return str(url)


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """One line with the remedy for what goes wrong between here and the hub."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{place} is gated: ask for access on its page, and log in with: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"{place}: there is no such repository, or it is private: log in with: hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{place}: the repository has no such revision") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        login = ": log in with a token that may write: hf auth login" if status in (401, 403) else ""
        raise HubError(f"{place}: the hub answered with status {status}{login}") from error
    except (errors.HFValidationError, errors.RemoteEntryNotFoundError) as error:
        raise HubError(f"{place}: {' '.join(str(error).split())}") from error
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # an upload raises httpx's own
        said = " ".join(str(error).split())[:200]
        raise HubError(f"{place}: the hub cannot be reached, and there is no copy of it here ({said})") from error
