"""Measured configurations: looked up once, never able to change a bit, never able to crash."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mokernels.ops import configs, table_files, tuned
from mokernels.ops.config_tables import ANY_M
from mokernels.ops.kinds import Kind
from mokernels.ops.table_files import Key, Table, TableError, Winner, read_table, write_table
from mokernels.ops.target import SM_90

DEVICE = "NVIDIA H100 80GB HBM3"
H100 = replace(SM_90, device=DEVICE)
KEY = Key(Kind.FP8, 16, 6144, 4096)
BASE = configs.choose(*KEY, H100)
FASTER = replace(BASE, block_n=128, num_stages=5)
TABLE = Table(DEVICE, "sm_90", "2.11.0", "3.6.0", "2026-01-31", {KEY: Winner(FASTER, 9.1, 9.9)})


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test reads the user's files, or leaves its own behind in the process."""
    monkeypatch.setenv("MOKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED_FOLDER", tmp_path / "shipped")
    tuned.forget()
    yield
    tuned.forget()


def choose(m: int = 1, key: Key = KEY, **options: object):
    return tuned.choose(key.kind, m, key.n, key.k, H100, **options)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mokernels"]


def with_config(**changes: object) -> dict:
    """The table's file as an object, its one configuration changed."""
    entry = {"kind": "fp8", "rows": 16, "n": 6144, "k": 4096, "us": 9.1, "closed_form_us": 9.9}
    entry["config"] = {**asdict(FASTER), **changes}
    words = {"device": DEVICE, "capability": "sm_90", "torch": "2", "triton": "3", "date": "d"}
    return {"schema": 1, **words, "entries": [entry]}


def put(content: object, device: str = DEVICE) -> Path:
    path = tuned.user_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(data)
    tuned.forget()
    return path


def test_without_files_the_closed_form_chooses(caplog):
    assert choose() == BASE
    assert tuned.choice_of(KEY, H100) == tuned.Choice(BASE, "closed form")
    assert warnings_of(caplog) == []


def test_a_winner_is_used_for_its_range_of_rows_and_shape_alone():
    path = tuned.user_file(DEVICE)
    write_table(path, TABLE)
    tuned.forget()
    assert choose(1) == choose(16) == FASTER
    assert tuned.choice_of(KEY, H100) == tuned.Choice(FASTER, str(path))
    assert choose(17) == configs.choose(Kind.FP8, 17, 6144, 4096, H100)
    assert choose(1, KEY._replace(k=2048)) == configs.choose(Kind.FP8, 1, 6144, 2048, H100)
    # A member of a fused group is launched as the group.
    assert tuned.choose(Kind.FP8, 1, 1024, 4096, H100, 6144) == FASTER


def test_batch_invariance_and_other_devices_know_no_files():
    write_table(tuned.user_file(DEVICE), TABLE)
    tuned.forget()
    assert choose(1, invariant=True) == BASE
    assert tuned.choose(*KEY[:1], 1, *KEY[2:], SM_90) == BASE
    other = replace(SM_90, device="NVIDIA H200")
    assert tuned.choose(*KEY[:1], 1, *KEY[2:], other) == BASE


def test_the_users_file_counts_more_than_the_shipped_one(tmp_path):
    shipped = replace(BASE, num_stages=5)
    write_table(
        tmp_path / "shipped" / table_files.file_name(DEVICE),
        replace(TABLE, winners={KEY: Winner(shipped, 9.0, 9.9)}),
    )
    assert choose() == shipped
    write_table(tuned.user_file(DEVICE), TABLE)
    assert choose() == shipped  # files are read once
    tuned.forget()
    assert choose() == FASTER


def test_files_are_read_once_and_not_at_import(monkeypatch):
    put(with_config())
    reads = []
    monkeypatch.setattr(tuned, "read_table", lambda path: reads.append(path) or read_table(path))
    for m in (1, 5, 100, 1000):
        choose(m)
        choose(m, KEY._replace(n=4096))
    assert len(reads) == 1


def test_a_written_file_is_read_back(tmp_path):
    more = Key(Kind.NVFP4, ANY_M, 64, 4096)
    table = replace(TABLE, winners={**TABLE.winners, more: Winner(BASE, 1.0, 2.0)})
    write_table(tmp_path / "a" / "t.json", table)
    assert read_table(tmp_path / "a" / "t.json") == table
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["t.json"]
    assert str(tmp_path) not in (tmp_path / "a" / "t.json").read_text()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    write_table(path, TABLE)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(table_files.os, "replace", full)
    with pytest.raises(OSError, match="full"):
        write_table(path, replace(TABLE, date="2027-01-01"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split_k": 8}, "its split_k is 8 and the closed form's is"),
        ({"block_k": 64}, "its block_k is 64 and the closed form's is 128"),
        ({"promote": None}, "so it adds otherwise"),
        ({"block_n": 4096}, "does not fit sm_90"),
        ({"num_stages": 99}, "does not fit sm_90"),
        ({"block_n": "os"}, "does not fit sm_90"),
        ({"block_n": 32}, "another matrix instruction"),
    ],
    ids=str,
)
def test_an_entry_that_may_not_win_is_named_once(change, reason, caplog):
    content = with_config(**change)
    content["entries"].append({**content["entries"][0], "rows": 32})
    path = put(content)
    assert choose() == BASE
    assert choose(32).order == configs.choose(Kind.FP8, 32, 6144, 4096, H100).order
    (warning,) = warnings_of(caplog)
    assert repr(str(path)) in warning
    assert "fp8 6144x4096, up to 16 rows" in warning
    assert reason in warning
    assert warning.endswith("Measure them again with `mokernels tune`, or delete the file.")


NESTED = b"[" * 200_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (NESTED, "it nests too deeply"),
        (b"[" + b"1" * 5000 + b"]", "digits"),
        (b"[]", "found no object at the top"),
        ({"schema": 2}, "found schema 2, wanted 1"),
        ({**with_config(), "device": 3}, "device is 3, wanted text"),
        ({**with_config(), "entries": {}}, "found no list 'entries'"),
        ({**with_config(), "entries": [7]}, "entry 0 is no object"),
        (with_config(block_m=1.5), "block_m of entry 0 is 1.5, wanted a small number"),
        (with_config(block_m=-4), "block_m of entry 0 is -4"),
        (with_config(block_m=[1]), "block_m of entry 0 is [1]"),
        (with_config(shell="rm"), "the config of entry 0 has ['shell'], which means nothing"),
        (pickle.dumps(os.system), "it is not JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_broken_file_is_named_and_crashes_nothing(content, reason, caplog):
    path = put(content)
    assert choose() == BASE
    assert choose(100) == configs.choose(Kind.FP8, 100, 6144, 4096, H100)
    (warning,) = warnings_of(caplog)
    assert f"The file of measured configurations {str(path)!r} cannot be used" in warning
    assert reason in warning
    assert "Delete it, and run `mokernels tune` to measure again." in warning


@pytest.mark.parametrize(
    ("name", "value"),
    [("us", 0), ("us", "fast"), ("us", float("nan")), ("us", 10**400), ("n", 0), ("n", True),
     ("k", None), ("rows", "many"), ("kind", "fp7"), ("kind", []), ("config", 1)],
)  # fmt: skip
def test_broken_entries(name, value, tmp_path):
    content = with_config()
    content["entries"][0][name] = value
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(TableError, match="entry 0"):
        read_table(tmp_path / "t.json")


def test_what_is_no_file_is_not_read(caplog):
    path = tuned.user_file(DEVICE)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)  # reading it would wait for ever
    assert choose() == BASE
    assert "it is no regular file" in warnings_of(caplog)[0]


def test_a_huge_file_is_not_read_whole(caplog, monkeypatch):
    monkeypatch.setattr(table_files, "LARGEST_FILE", 100)
    put(with_config())
    assert choose() == BASE
    assert "it has more than 100 bytes" in warnings_of(caplog)[0]


def test_a_file_of_another_device_is_not_used(caplog):
    path = tuned.user_file(DEVICE)
    write_table(path, replace(TABLE, device="NVIDIA A100"))
    tuned.forget()
    assert choose() == BASE
    (warning,) = warnings_of(caplog)
    assert repr(str(path)) in warning
    assert "it is of NVIDIA A100 (sm_90), and this device is NVIDIA H100 80GB HBM3" in warning


def test_only_what_tuning_may_vary_is_taken_from_a_file():
    put(with_config(swap=1))  # equal to True, and another constant to a compiler
    assert choose().swap is True


def test_a_winner_may_have_its_operands_come_by_tma():
    key = Key(Kind.FP8, 64, 28672, 4096)
    base = configs.choose(*key, H100)
    winner = replace(base, block_n=64, num_warps=4, tma=True, swap=False)
    write_table(tuned.user_file(DEVICE), replace(TABLE, winners={key: Winner(winner, 9.1, 9.9)}))
    tuned.forget()
    assert base.swap
    assert choose(64, key) == winner
    # Batch invariance asks no file.
    assert not choose(64, key, invariant=True).tma


def test_one_configuration_is_forced_at_a_time():
    with tuned.forced(KEY, FASTER):
        assert choose() == FASTER
        assert choose(17) != FASTER
        with pytest.raises(ValueError, match="measure one by one"), tuned.forced(KEY, BASE):
            pass
    assert choose() == BASE


@pytest.mark.parametrize(
    ("device", "file"),
    [
        (DEVICE, "nvidia-h100-80gb-hbm3.json"),
        ("../../x/..", "x.json"),
        ("\N{SNOWMAN}", "device.json"),
    ],
)
def test_names_of_files(device, file):
    assert table_files.file_name(device) == file


def test_what_is_shipped_can_be_read():
    folder = Path(tuned.__file__).parent / "tables"
    for path in folder.glob("*.json"):
        table = read_table(path)
        assert path.name == table_files.file_name(table.device)
