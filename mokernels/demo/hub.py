"""The Hugging Face hub: is it there, is a model in its cache, fetch one."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from mokernels.errors import MokernelsError

TIMEOUT_SECONDS = 3.0
CHECKPOINT_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt")
"""What is fetched of a repository: no pickles, nothing of its sub-folders."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class HubError(MokernelsError, OSError):
    """A model could not be fetched from the hub; the message says why and what else to do."""


def local_folder(path_or_id: str | os.PathLike[str]) -> Path:
    """``path_or_id`` itself if it exists, else the hub's repository of that name, fetched.

    Raises:
        HubError: it is neither, or the hub cannot be reached.
    """
    path = Path(path_or_id)
    if os.path.lexists(path):
        return path
    name = os.fspath(path_or_id)
    if not is_hub_id(name):
        raise HubError(
            f"The path {name!r} does not exist, and it is no name of a model on the Hugging Face "
            "hub (owner/name) either. Check the path."
        )
    if hub_reachable(name):
        return download(name)
    found = cached_snapshot(name)
    if found is None:
        raise HubError(
            f"The folder {name!r} does not exist here, and as a model of the Hugging Face hub it "
            f"cannot be fetched: {why_unreachable()}. Check the path, or download the model on a "
            "machine that reaches the hub and give its folder."
        )
    return found


def is_hub_id(name: str) -> bool:
    """Whether ``name`` could be a repository: ``name`` or ``owner/name``."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def offline() -> bool:
    """Whether the user has switched the hub off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def why_unreachable() -> str:
    """The reason, for a message."""
    if offline():
        return "HF_HUB_OFFLINE is set"
    return f"the hub did not answer (it gets {TIMEOUT_SECONDS:.0f} seconds)"


def hub_reachable(repo: str, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Whether the hub answers, decided within ``timeout`` seconds.

    A socket's timeout does not cover the look-up of the host's name, which can take half a minute
    where packets are dropped. So the question is asked in a thread, and no longer waited for.
    """
    if offline():
        return False
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(_asks(repo, timeout)), daemon=True)
    asking.start()
    asking.join(timeout)
    return answers == [True]


def _asks(repo: str, timeout: float) -> bool:
    from huggingface_hub import hf_hub_url

    request = Request(hf_hub_url(repo, "config.json"), method="HEAD")
    try:
        with urlopen(request, timeout=timeout):
            return True
    except HTTPError as error:  # an answer all the same: no such file, a token is needed, ...
        return error.code < 500
    except (OSError, ValueError):
        return False


def cached_snapshot(repo: str, wanted: Sequence[str] = ("config.json",)) -> Path | None:
    """The folder of ``repo`` in the hub's cache if all files ``wanted`` are in it, else None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(repo, name) for name in wanted]
    except HFValidationError:
        return None
    paths = [Path(name) for name in found if isinstance(name, str)]
    return paths[0].parent if len(paths) == len(wanted) else None


def download(repo: str, files: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """Fetch the files of ``repo`` that match, into the hub's cache.

    Raises:
        HubError: the hub does not have it, does not give it, or the connection broke.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, allow_patterns=list(files), ignore_patterns=["*/*"])
    # The HTTP client under the hub's library changes with its versions, and its errors with it.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise HubError(
            f"The model {repo!r} could not be fetched from the Hugging Face hub: {reason} "
            "Check the name; for a gated model log in with `hf auth login` first."
        ) from error
    return Path(folder)
