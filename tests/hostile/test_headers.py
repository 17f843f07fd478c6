"""Safetensors headers that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mokernels.checkpoint import open_checkpoint
from mokernels.checkpoint.files import MAX_JSON_BYTES
from mokernels.errors import CheckpointError
from tests.support.checkpoints import SINGLE, make_checkpoint, only_finding, read_raw, write_raw

NAME = "model.norm.weight"
Header = dict[str, Any]


def refused(folder: Path, rule: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    finding = only_finding(caught.value, rule)
    assert finding.file == SINGLE
    return str(finding)


def edit_header(folder: Path, edit: Callable[[Header], Any]) -> None:
    header, data = read_raw(folder / SINGLE)
    edit(header)
    write_raw(folder / SINGLE, header, data)


@pytest.mark.parametrize("size", [0, 7])
def test_file_shorter_than_the_length(folder: Path, size: int) -> None:
    (folder / SINGLE).write_bytes(b"\0" * size)
    text = refused(folder, "header-length")
    assert f"found a file of {size} bytes, wanted at least 8 bytes. Download or copy" in text


@pytest.mark.parametrize("extra", [1, 2**40, 2**63, 2**64 - 9])
def test_header_longer_than_the_file(folder: Path, extra: int) -> None:
    header, data = read_raw(folder / SINGLE)
    size = len(json.dumps(header)) + len(data)
    write_raw(folder / SINGLE, header, data, length=min(size + extra, 2**64 - 1))
    text = refused(folder, "header-length")
    assert "the file is cut off or is no safetensors file" in text
    assert "wanted a header inside the file and of at most 100000000 bytes" in text


def test_header_over_the_limit(folder: Path) -> None:
    with (folder / SINGLE).open("wb") as file:
        file.write((MAX_JSON_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_JSON_BYTES + 100)  # sparse: takes no room on the disk
    assert "found a header of 100000001 bytes" in refused(folder, "header-length")


@pytest.mark.parametrize("header", [b"", b" {}", b"[]", b"\xef\xbb\xbf{}"])
def test_header_that_is_no_object(folder: Path, header: bytes) -> None:
    write_raw(folder / SINGLE, header, b"")
    text = refused(folder, "header-invalid")
    assert f"found a text that starts with {header!r}, wanted a JSON object" in text


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"{", "Expecting property name"),
        (b'{"a": }', "Expecting value"),
        (b"{}x", "Extra data"),
        (b'{"a": "\xff"}', "invalid start byte"),
        (b'{"a": NaN}', "the number NaN, which JSON does not have"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice in one object"),
    ],
)
def test_header_that_is_no_json(folder: Path, header: bytes, found: str) -> None:
    write_raw(folder / SINGLE, header, b"")
    text = refused(folder, "json-invalid")
    assert f"the text is not valid JSON (file {SINGLE!r}): found " in text
    assert found in text


def test_tensor_twice(folder: Path) -> None:
    header, data = read_raw(folder / SINGLE)
    text = json.dumps(header)[:-1] + f', "{NAME}": {json.dumps(header[NAME])}}}'
    write_raw(folder / SINGLE, text.encode(), data)
    assert f"the key '{NAME}' twice in one object" in refused(folder, "json-invalid")


@pytest.mark.parametrize("metadata", [[], {"format": 1}, "pt", None])
def test_metadata_that_is_not_strings(folder: Path, metadata: object) -> None:
    edit_header(folder, lambda header: header.update(__metadata__=metadata))
    assert "__metadata__ is malformed" in refused(folder, "header-metadata")


@pytest.mark.parametrize(
    ("change", "found", "wanted"),
    [
        ({"dtype": "F4"}, "the dtype 'F4'", "one of BOOL, U8,"),
        ({"dtype": None}, "the dtype None", "one of"),
        ({"dtype": ["F32"]}, "the dtype ['F32']", "one of"),
        ({"shape": 64}, "the shape 64", "a list of at most 16 integers, none negative"),
        ({"shape": [-64]}, "the shape [-64]", "none negative"),
        ({"shape": [64.0]}, "the shape [64.0]", "none negative"),
        ({"shape": [True]}, "the shape [True]", "none negative"),
        ({"shape": [1] * 17}, "the shape [1, 1, 1,", "at most 16 integers"),
        ({"shape": [0, 2**62, 4]}, "the shape [0, 4611686018427387904, 4]", "fewer than 2**63"),
        ({"shape": [2**61, 2**61]}, "the shape [2305843009213693952,", "fewer than 2**63"),
        ({"shape": [63]}, "128 bytes", "126 bytes for the shape (63,) of BF16"),
        ({"dtype": "F32"}, "128 bytes", "256 bytes for the shape (64,) of F32"),
        ({"data_offsets": [0]}, "the byte range [0]", "a range inside"),
        ({"data_offsets": [-2, 126]}, "the byte range [-2, 126]", "a range inside"),
        ({"data_offsets": [128, 0]}, "the byte range [128, 0]", "a range inside"),
        ({"data_offsets": [0, 2**63]}, "the byte range [0, 9223372036854775808]", "inside"),
        ({"data_offsets": "ab"}, "the byte range 'ab'", "a range inside"),
        ({"more": 1}, "other fields", "exactly dtype, shape and data_offsets"),
    ],
)
def test_entry_that_cannot_be(
    folder: Path, change: dict[str, object], found: str, wanted: str
) -> None:
    edit_header(folder, lambda header: header[NAME].update(change))
    text = refused(folder, "header-entry")
    assert f"(file {SINGLE!r}, tensor {NAME!r})" in text
    assert f"found {found}" in text
    assert wanted in text


def test_entry_that_is_no_object(folder: Path) -> None:
    edit_header(folder, lambda header: header.update({NAME: [1]}))
    assert "found other fields" in refused(folder, "header-entry")


def test_name_that_is_no_unicode(folder: Path) -> None:
    edit_header(folder, lambda header: header.update({"\ud800": header.pop(NAME)}))
    assert "found a name that is not valid Unicode" in refused(folder, "header-entry")


def test_overlap(folder: Path) -> None:
    header, data = read_raw(folder / SINGLE)
    start, end = header[NAME]["data_offsets"]
    header["copy"] = dict(header[NAME])
    write_raw(folder / SINGLE, header, data)
    text = refused(folder, "header-ranges")
    assert "the data of a tensor overlaps the one before it" in text
    assert end - start == 128


def test_tensor_inside_another_is_one_problem(folder: Path) -> None:
    ranges = {"a": (0, 128), "b": (32, 64), "c": (128, 130)}
    header = {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in ranges.items()
    }
    write_raw(folder / SINGLE, header, bytes(130))
    assert "tensor 'b'" in refused(folder, "header-ranges")


def test_hole(folder: Path) -> None:
    header, data = read_raw(folder / SINGLE)
    del header[NAME]
    write_raw(folder / SINGLE, header, data)
    text = refused(folder, "header-ranges")
    assert "leaves a hole after the one before it" in text or "belong to no tensor" in text


def test_bytes_left_over(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"12345")
    text = refused(folder, "header-ranges")
    assert "5 bytes at the end belong to no tensor" in text
    assert "wanted tensors that follow each other without gaps up to the end of the file" in text


def test_file_cut_off(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-1])
    header = read_raw(folder / SINGLE)[0]
    last = max(header.items(), key=lambda item: item[1].get("data_offsets", [0, 0])[1])[0]
    assert f"tensor {last!r}" in refused(folder, "header-entry")


def test_all_problems_are_listed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", max_shard_size=8_000)
    for shard in folder.glob("*.safetensors"):
        header, data = read_raw(shard)
        for name in header.keys() - {"__metadata__"}:
            header[name]["dtype"] = "F4"
        write_raw(shard, header, data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    findings = caught.value.findings
    assert len(findings) > CheckpointError.shown
    assert len({finding.file for finding in findings}) > 2
    assert "`mokernels check` lists them all" in str(caught.value)


def test_file_that_changes_after_it_was_opened(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        header, data = read_raw(folder / SINGLE)
        header[NAME]["dtype"] = "F16"
        write_raw(folder / SINGLE, header, data)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.tensor(NAME)
    text = str(only_finding(caught.value, "tensor-unreadable"))
    assert "cannot be read as its header describes it" in text
    assert "found 'torch.float16 (64,)', wanted torch.bfloat16 (64,)" in text
