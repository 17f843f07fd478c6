"""Files that are not what they should be: nothing hangs, and nothing outside is read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mokernels.checkpoint import check, open_checkpoint
from mokernels.errors import CheckpointError
from tests.support.checkpoints import (
    INDEX,
    SINGLE,
    edit_json,
    make_checkpoint,
    only_finding,
)

pytestmark = pytest.mark.timeout(
    60
)  # a reader that waits for a FIFO must fail, not stall the suite


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A valid checkpoint of several shards to damage."""
    folder = make_checkpoint(tmp_path / "checkpoint", max_shard_size=8_000)
    assert (folder / INDEX).exists()
    return folder


def refused(folder: Path, rule: str) -> str:
    """Text of the only finding; opening and checking have to agree on it."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    finding = only_finding(caught.value, rule)
    assert only_finding(check(folder), rule) == finding
    return str(finding)


def rename_first_shard(folder: Path, name: object) -> None:
    def edit(index: dict[str, dict[str, object]]) -> None:
        first = min(str(shard) for shard in index["weight_map"].values())
        places = index["weight_map"]
        places.update({key: name for key, shard in places.items() if shard == first})

    edit_json(folder / INDEX, edit)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        check(tmp_path / "nowhere")
    text = str(only_finding(caught.value, "folder-missing"))
    assert "the folder cannot be opened: found No such file or directory" in text
    assert "a model of a hub has to be downloaded first" in text


def test_file_instead_of_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        check(folder / SINGLE)
    text = str(only_finding(caught.value, "folder-missing"))
    assert text == (
        "the path is not a folder: found a file, wanted a folder with config.json and safetensors "
        "files. Give the folder that holds the file."
    )


def test_path_with_a_null_byte() -> None:
    with pytest.raises(CheckpointError, match="null byte"):
        check("bad\0name")


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", SINGLE, INDEX])
def test_fifo_does_not_hang(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    text = refused(folder, "file-kind")
    assert f"no regular file (file {name!r}): found a FIFO, wanted a regular file." in text
    assert "unless you trust who made it" in text


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_directory_in_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert "found a directory, wanted a regular file" in refused(folder, "file-kind")


def test_socket_in_place_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "c")
    (folder / SINGLE).unlink()
    monkeypatch.chdir(folder)  # names of sockets are limited to 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(SINGLE)
        assert "found a socket" in refused(folder, "file-kind")


def test_link_to_a_device(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    text = refused(folder, "file-link")
    assert "found '/dev/zero', wanted a file inside" in text


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_link_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    text = refused(folder, "file-link")
    assert f"a symbolic link leads out of the folder (file {name!r})" in text
    assert "Copy the file to the folder, or give the folder that it is in." in text


def test_link_out_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    make_checkpoint(snapshot)
    outside = tmp_path / "models--c--d"
    outside.mkdir()
    (snapshot / SINGLE).rename(outside / "blob")
    (snapshot / SINGLE).symlink_to(outside / "blob")
    assert "wanted a file inside" in refused(snapshot, "file-link")


def test_link_out_of_a_folder_that_only_resembles_the_hub_cache(tmp_path: Path) -> None:
    folder = tmp_path / "other" / "snapshots" / "0123"
    folder.parent.mkdir(parents=True)
    make_checkpoint(folder)
    (folder / SINGLE).rename(tmp_path / "other" / "blob")
    (folder / SINGLE).symlink_to("../../blob")
    assert f"wanted a file inside {str(folder)!r}" in refused(folder, "file-link")


def test_loop_of_links(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(SINGLE)
    assert "found Too many levels of symbolic links" in refused(folder, "file-unreadable")


def test_broken_link(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("blob")
    text = refused(folder, "file-missing")
    assert "a file of the checkpoint is missing (file 'model.safetensors')" in text
    assert "Download the checkpoint again." in text


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../model.safetensors", "sub/model.safetensors", "..", "", "..\\x", "a\0b"],
)
def test_index_that_leads_out_of_the_folder(sharded: Path, name: str) -> None:
    rename_first_shard(sharded, name)
    text = refused(sharded, "file-name")
    assert f"names a file outside of the folder (file {INDEX!r}): found {name!r}" in text
    assert "wanted the plain name of a file in the folder" in text
    assert "Do not load this checkpoint unless you trust who made it." in text


@pytest.mark.parametrize(("name", "rule"), [("x" * 300, "file-unreadable"), ("\ud800", None)])
def test_index_with_a_name_that_no_file_can_have(
    sharded: Path, name: str, rule: str | None
) -> None:
    rename_first_shard(sharded, name)
    refused(sharded, rule or "file-unreadable")


def test_index_that_names_no_file(sharded: Path) -> None:
    rename_first_shard(sharded, 7)
    assert "found the file 7 for tensor" in refused(sharded, "index-invalid")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_index_without_a_map(sharded: Path, weight_map: object) -> None:
    edit_json(sharded / INDEX, lambda index: index.update(weight_map=weight_map))
    text = refused(sharded, "index-invalid")
    assert f"found the weight_map {weight_map!r}" in text
    assert "wanted an object weight_map from tensor names to file names" in text


def test_missing_shard(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[0].unlink()
    text = refused(sharded, "file-missing")
    assert repr(shards[0].name) in text


def test_tensor_that_the_shard_lacks(sharded: Path) -> None:
    shard = min(path.name for path in sharded.glob("*.safetensors"))
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"ghost": shard}))
    text = refused(sharded, "index-mismatch")
    assert "the shard lacks a tensor that the index places there" in text
    assert f"(file {shard!r}, tensor 'ghost')" in text


def test_tensor_that_the_index_lacks(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    text = refused(sharded, "index-mismatch")
    assert "the index does not place the tensor in the shard that holds it" in text
    assert "tensor 'model.norm.weight'" in text
    assert "they are not of the same checkpoint" in text


def test_tensor_in_two_shards(sharded: Path) -> None:
    first = min(sharded.glob("*.safetensors"))
    (sharded / "copy.safetensors").write_bytes(first.read_bytes())
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(ghost="copy.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    rules = {finding.rule for finding in caught.value.findings}
    assert "tensor-duplicate" in rules
    assert "the tensor is also in 'copy.safetensors'" in str(caught.value)


def test_two_sets_of_weights(sharded: Path) -> None:
    (sharded / SINGLE).write_bytes(b"")
    text = refused(sharded, "weights-ambiguous")
    assert "the folder has two sets of weights" in text
    assert "Remove the set that is not meant." in text


def test_several_files_and_no_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    text = refused(sharded, "weights-missing")
    assert "several safetensors files and no index: found 'model-00001-of-" in text


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model-Q4_K_M.gguf"])
def test_other_weight_files_are_named_and_never_read(folder: Path, name: str) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / name)  # reading it would hang
    text = refused(folder, "weights-missing")
    assert "the folder has no safetensors file" in text
    assert repr(name) in text
    assert "Pickled weights (.bin, .pt, .pth) and GGUF files are never read" in text


def test_index_that_names_a_pickle(sharded: Path) -> None:
    rename_first_shard(sharded, "pytorch_model.bin")
    (sharded / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    text = refused(sharded, "header-length")
    assert "(file 'pytorch_model.bin')" in text
    assert "Files of other kinds (.bin, .pt, .gguf) are not read." in text


def test_unreadable_file(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    (folder / SINGLE).chmod(0)
    assert "found Permission denied" in refused(folder, "file-unreadable")


def test_no_module_of_the_reader_can_unpickle() -> None:
    package = Path(check.__code__.co_filename).parent
    sources = {path.name: path.read_text() for path in package.glob("*.py")}
    assert len(sources) > 10
    for name, text in sources.items():
        for word in ("pickle", "torch.load", "eval(", "exec(", "marshal", "shelve"):
            assert word not in text.replace("unpickle", ""), (name, word)
