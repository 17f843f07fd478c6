"""Random damage to valid files: either it loads as before, or a CheckpointError says why not."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mokernels.checkpoint import Checkpoint, check, open_checkpoint
from mokernels.errors import CheckpointError
from tests.support.checkpoints import INDEX, SINGLE, Linear, make_checkpoint

pytestmark = pytest.mark.timeout(240)
LAYERS = [Linear("a.b", 16, 32), Linear("a.c", 16, 32, bias=True)]
FUZZ = settings(
    max_examples=100, deadline=5_000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fuzz") / "c", "NVFP4", LAYERS, plain={})


@pytest.fixture(scope="module")
def pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "c"
    return make_checkpoint(folder, "FP8", LAYERS, plain={}, max_shard_size=600)


def read_all(checkpoint: Checkpoint) -> None:
    with checkpoint:
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)


def survives(folder: Path) -> None:
    """Only the documented error comes out, and the audit does not even raise that."""
    with contextlib.suppress(CheckpointError):
        read_all(open_checkpoint(folder))
    assert str(check(folder))


def damage(folder: Path, original: Path, file: str, content: bytes) -> None:
    if not folder.exists():
        shutil.copytree(original, folder)
    # A new file each time: tensors of the last one may still be mapped.
    (folder / file).unlink()
    (folder / file).write_bytes(content)


@FUZZ
@given(data=st.data())
def test_flipped_bytes_in_the_header(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((pristine / SINGLE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    flips = st.lists(st.tuples(st.integers(0, header - 1), st.integers(0, 255)), min_size=1)
    for position, byte in data.draw(flips):
        content[position] = byte
    damage(tmp_path / "c", pristine, SINGLE, bytes(content))
    survives(tmp_path / "c")


@FUZZ
@given(data=st.data())
def test_digits_in_the_header(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    # Shapes and offsets that are wrong but still parse: what random bytes rarely give.
    content = bytearray((pristine / SINGLE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    digits = [index for index in range(8, header) if chr(content[index]).isdigit()]
    chosen = data.draw(st.lists(st.sampled_from(digits), min_size=1, max_size=3))
    for position in chosen:
        content[position] = ord(data.draw(st.sampled_from("0123456789-.e")))
    damage(tmp_path / "c", pristine, SINGLE, bytes(content))
    survives(tmp_path / "c")


@FUZZ
@given(fraction=st.floats(0, 1))
def test_truncation(pristine: Path, tmp_path: Path, fraction: float) -> None:
    content = (pristine / SINGLE).read_bytes()
    kept = int(fraction * (len(content) - 1))
    damage(tmp_path / "c", pristine, SINGLE, content[:kept])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "c")


@FUZZ
@given(length=st.integers(0, 2**64 - 1), rest=st.binary(max_size=64))
def test_any_length_and_any_bytes(pristine: Path, tmp_path: Path, length: int, rest: bytes) -> None:
    damage(tmp_path / "c", pristine, SINGLE, length.to_bytes(8, "little") + rest)
    survives(tmp_path / "c")


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json", INDEX])
def test_flipped_bytes_in_json(
    pristine_shards: Path, tmp_path: Path, file: str, data: st.DataObject
) -> None:
    content = bytearray((pristine_shards / file).read_bytes())
    positions = st.integers(0, len(content) - 1)
    for position in data.draw(st.lists(positions, min_size=1, max_size=8)):
        content[position] = data.draw(st.sampled_from(b'{}[]",:0123456789nulltrue.\\/\xff'))
    damage(tmp_path / "c", pristine_shards, file, bytes(content))
    survives(tmp_path / "c")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["quantization", "quantization_config", "quant_algo", "quant_method", "ignore",
                 "exclude_modules", "kv_cache_scheme", "kv_cache_quant_algo", "config_groups",
                 "weights", "group_size", "producer", "version", "name", "quantized_layers",
                 "type", "num_bits", "text_config"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)  # fmt: skip


@FUZZ
@given(value=JSON)
@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_any_json_as_configuration(
    pristine: Path, tmp_path: Path, file: str, value: object
) -> None:
    damage(tmp_path / "c", pristine, file, json.dumps(value).encode())
    survives(tmp_path / "c")
