"""Models and datasets of the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ffprune.core.errors import FfpruneError, MissingInput, NoNetwork, ParameterError, UnsafeFile
from ffprune.sources import local
from ffprune.sources.base import HubSource, describe

T = TypeVar("T")

# Small files first, so that a model which is refused costs no download of weights. Subfolders hold other
# formats (onnx, original), consolidated*.safetensors the same weights once more.
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
_WEIGHTS = ["*.safetensors"]
_IGNORED = ["*/*", "consolidated*"]
# The hub's clients let errors of the library below them through, and change it now and then.
_HTTP_LIBRARIES = frozenset({"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp"})


def fetch_description(source: HubSource, trust_remote_code: bool) -> Path:
    """Configuration and tokenizer of a hub model, without weights: a folder in the hub's own cache.

    Args:
        source: id and revision.
        trust_remote_code: whether the model's Python files come along.

    Raises:
        NoNetwork: the hub cannot be reached and its cache does not have it.
        MissingInput: no such model or revision, or no access to it.
    """
    return _snapshot(source, _SMALL_FILES + (["*.py"] if trust_remote_code else []))


def fetch_weights(source: HubSource) -> Path:
    """The safetensors of a hub model, next to its description.

    Args:
        source: id and revision.

    Raises:
        UnsafeFile: this revision has no safetensors.
        NoNetwork, MissingInput: as in :func:`fetch_description`.
    """
    folder = _snapshot(source, _WEIGHTS)
    if any(folder.glob("*.safetensors")):
        return folder
    files = _explained(source, lambda: HfApi().list_repo_files(source.id, revision=source.revision))
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    raise UnsafeFile(
        f"{describe(source)} has no safetensors; it has {', '.join(pickles[:3]) or 'no weights'}",
        "Pickled weights are refused, since loading them can run code. " + _conversion(source.id),
        "Set revision to one with safetensors, or convert a copy you trust and use `kind: local`",
    )


def _conversion(id: str) -> str:
    """Where the hub's conversion bot offers safetensors of this model, as far as the hub tells."""
    with contextlib.suppress(Exception):  # only a hint in a message: no failure here matters
        for request in HfApi().get_repo_discussions(id, discussion_type="pull_request"):
            if "safetensors variant" in request.title.replace("`", ""):
                return f"The hub's conversion bot offers safetensors at refs/pr/{request.num}"
    return "The hub's conversion bot offers safetensors of many models as refs/pr/N (Community page)"


def _snapshot(source: HubSource, patterns: list[str]) -> Path:
    return Path(
        _explained(
            source,
            lambda: snapshot_download(
                source.id, revision=source.revision, allow_patterns=patterns, ignore_patterns=_IGNORED
            ),
        )
    )


def fetch_rows(source: HubSource, field: str) -> list[str]:
    """One field of every row of a hub dataset's split, in order.

    Args:
        source: id, revision, config and split.
        field: name of the column with text.

    Raises:
        ParameterError: no split was named, or the dataset has no such column.
        NoNetwork: the hub cannot be reached and the cache does not have it.
        MissingInput: no such dataset, revision, config or split.
    """
    if source.split is None:
        raise ParameterError(
            f"A text from {describe(source)} was asked for, without a split",
            "Datasets of the hub are read one split at a time, such as train or train[:1%]",
            "Set split in the source",
        )
    import datasets  # slow to import, and only needed here

    datasets.disable_progress_bars()
    rows = _explained(
        source,
        lambda: datasets.load_dataset(source.id, source.config, split=source.split, revision=source.revision),
    )
    if field not in rows.column_names:
        raise ParameterError(
            f"The field {field!r} of {describe(source)} was asked for",
            f"Its fields are {', '.join(rows.column_names)}",
            "Set data.field to one of them",
        )
    return [str(text) for text in rows[field]]


def _explained(source: HubSource, action: Callable[[], T]) -> T:
    """Run ``action``; what can go wrong between here and the hub becomes a refusal that teaches."""
    asked = describe(source)
    try:
        with local.explain_full_disk("the hub's cache"):
            return action()
    except GatedRepoError as error:
        raise MissingInput(
            f"{asked} is gated, and this account has no access",
            "Its owner lets people in after they accept the licence on the model's page",
            "Accept it there, then log in with `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise MissingInput(
            f"{asked} has no such revision",
            "A revision is a commit, a branch, a tag or refs/pr/N of that repository",
            "Correct revision in the source; `main` always exists",
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingInput(
            f"{asked} was not found",
            "An id is owner/name as in the address of its page; private ones need `hf auth login`",
            "Correct id in the source",
        ) from error
    except FfpruneError:
        raise
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError) as error:
        raise _no_network(asked, error) from error
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise NoNetwork(
            f"The hub did not deliver {asked} ({_first_line(error)})",
            "It answered with an error, which may pass",
            "Run again later, or use `kind: local` with a copy",
        ) from error
    except (FileNotFoundError, ValueError) as error:  # as load_dataset says "no such ..."
        if "offline" in str(error).lower() or "connect" in str(error).lower():
            raise _no_network(asked, error) from error
        raise MissingInput(
            f"{asked} (config {source.config}, split {source.split}) is not readable ({_first_line(error)})",
            "The dataset's page on the hub lists its configs and splits",
            "Correct id, config or split in the source",
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES:
            raise _no_network(asked, error) from error
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _no_network(asked: str, error: Exception) -> NoNetwork:
    return NoNetwork(
        f"{asked} could not be reached ({_first_line(error)})",
        "The hub is asked over the network unless HF_HUB_OFFLINE is set; what it delivered before is in its "
        "cache (HF_HOME)",
        "Connect to the network or unset HF_HUB_OFFLINE, use `kind: local` with a copy, or the default "
        "profile, which needs the package registry only",
    )
