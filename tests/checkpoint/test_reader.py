"""Opening folders: one file, shards, the hub's cache; reading whole tensors and pieces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mokernels.checkpoint import check, looks_quantized, open_checkpoint, reader
from mokernels.checkpoint.header import DTYPES, read_header
from mokernels.errors import ArgumentError
from tests.support.checkpoints import (
    FORMAT_NAMES,
    INDEX,
    SINGLE,
    edit_json,
    make_checkpoint,
    plain_tensors,
)


def contents(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert tensor.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_tensors_are_what_the_library_reads(tmp_path: Path, format: str) -> None:
    folder = make_checkpoint(tmp_path / "c", format)
    assert_same(contents(folder), load_file(folder / SINGLE))


@pytest.mark.parametrize("size", [1, 6_000, 20_000])
def test_shards_hold_the_same(tmp_path: Path, size: int) -> None:
    whole = make_checkpoint(tmp_path / "whole", "NVFP4")
    sharded = make_checkpoint(tmp_path / "sharded", "NVFP4", max_shard_size=size)
    assert (sharded / INDEX).exists()
    assert not (sharded / SINGLE).exists()
    assert_same(contents(sharded), contents(whole))
    report = check(sharded)
    assert report.findings == ()
    assert len(report.files) == len(list(sharded.glob("*.safetensors"))) > 1


def test_table_of_tensors(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    with open_checkpoint(folder) as checkpoint:
        info = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
        assert (info.file, info.dtype, info.shape) == (SINGLE, torch.float8_e4m3fn, (160, 64))
        assert info.nbytes == info.end - info.start == 160 * 64
        data = (folder / SINGLE).read_bytes()[info.start : info.end]
        stored = checkpoint.tensor("model.layers.0.mlp.up_proj.weight").view(torch.uint8)
        assert stored.flatten().tolist() == list(data)
        assert checkpoint.nbytes == sum(entry.nbytes for entry in checkpoint.tensors.values())


def test_single_file_of_another_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    (folder / SINGLE).rename(folder / "weights.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert check(folder).files == ("weights.safetensors",)


def test_index_may_name_the_single_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    names = load_file(folder / SINGLE)
    (folder / INDEX).write_text("{}")
    edit_json(folder / INDEX, lambda data: data.update(weight_map=dict.fromkeys(names, SINGLE)))
    assert check(folder).ok


@pytest.mark.parametrize("sharded", [False, True])
def test_hub_cache(tmp_path: Path, sharded: bool) -> None:
    """``snapshots/<revision>/<name>`` are links to ``../../blobs/<hash>``."""
    model = tmp_path / "hub" / "models--nvidia--tiny"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    make_checkpoint(snapshot, max_shard_size=8_000 if sharded else 1 << 30)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(model / "blobs" / str(number))
        path.symlink_to(Path("../../blobs", str(number)))
    assert check(snapshot).findings == ()
    # The cache itself may be reached by a link, and the model may be in a subfolder.
    (tmp_path / "link").symlink_to(snapshot)
    assert check(tmp_path / "link").findings == ()
    (snapshot / "sub").mkdir()
    for path in [path for path in snapshot.iterdir() if path.is_symlink()]:
        (snapshot / "sub" / path.name).symlink_to(Path("../../..", "blobs", path.resolve().name))
    assert check(snapshot / "sub").findings == ()


def test_link_inside_the_folder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    (folder / SINGLE).rename(folder / "data")
    (folder / SINGLE).symlink_to("data")
    assert check(folder).findings == ()


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    assert check("c").ok
    monkeypatch.chdir(tmp_path / "c")
    assert check(".").ok


def test_unknown_tensor(tmp_path: Path) -> None:
    with (
        open_checkpoint(make_checkpoint(tmp_path / "c")) as checkpoint,
        pytest.raises(ArgumentError, match=r"has no tensor 'ghost'\. Take a name from"),
    ):
        checkpoint.tensor("ghost")


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    before = load_file(folder / SINGLE)
    assert_same(contents(folder), before)


def test_files_are_closed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", max_shard_size=8_000)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("looks for mapped files in /proc, which this system has not")
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.tensor(name)
        assert str(folder) in maps.read_text()
    assert str(folder) not in maps.read_text()
    assert checkpoint.tensors  # kept alive, so that it is not the garbage collector that closes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (7, 33), (100, 3, 5), (0, 8), (8, 0)])
@pytest.mark.parametrize("limit", [1, 64, 1000, 1 << 20])
def test_pieces_make_up_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], limit: int
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", limit)
    tensor = torch.randn(shape)
    save_file({"x": tensor}, tmp_path / SINGLE)
    with open_checkpoint(tmp_path) as checkpoint:
        pieces = list(checkpoint.chunks("x"))
    rows = [start for start, _ in pieces]
    assert rows == sorted(set(rows))
    whole = pieces[0][1] if not shape else torch.cat([piece for _, piece in pieces])
    assert whole.equal(tensor)
    for start, piece in pieces[1:]:
        assert piece.equal(tensor[start : start + len(piece)])
        assert piece.nbytes <= max(limit, tensor[:1].nbytes)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_can_be_read(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    tensor = torch.arange(48, dtype=torch.uint8).view(dtype)
    save_file({"x": tensor.reshape(3, -1)}, tmp_path / SINGLE)
    (info,) = read_header(tmp_path, SINGLE).values()
    assert (info.dtype, info.shape) == (dtype, (3, 16 // dtype.itemsize))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensor("x").reshape(-1).view(torch.uint8).tolist() == list(range(48))


SHAPES = st.lists(st.integers(0, 5), max_size=4)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=5), data=st.data())
def test_what_the_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("c")
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
    tensors = {
        name: torch.zeros(shape, dtype=data.draw(dtypes))
        for name, shape in shapes.items()
        if name != "__metadata__"
    }
    save_file(tensors, folder / SINGLE)
    header = read_header(folder, SINGLE)
    assert {name: (info.dtype, list(info.shape)) for name, info in header.items()} == {
        name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()
    }


def test_looks_quantized(tmp_path: Path) -> None:
    for format in FORMAT_NAMES:
        assert looks_quantized(make_checkpoint(tmp_path / format, format))
    plain = tmp_path / "plain"
    plain.mkdir()
    assert not looks_quantized(plain)
    assert not looks_quantized(plain / "nowhere")
    save_file(plain_tensors(), plain / SINGLE)
    assert not looks_quantized(plain)
    (plain / SINGLE).write_bytes(b"broken")
    assert not looks_quantized(plain)


def test_nothing_is_read_from_a_folder_that_looks_like_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE)
    assert not looks_quantized(tmp_path)
