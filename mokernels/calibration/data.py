"""Batches of tokens for calibration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mokernels.errors import ArgumentError

_TEXT_FIELDS = ("text", "content")


def text(
    tokenizer: Any,
    path_or_texts: str | os.PathLike[str] | Iterable[str],
    *,
    samples: int = 128,
    length: int = 512,
    batch_size: int = 4,
) -> list[dict[str, Tensor]]:
    """Cut text into batches for a calibration loop.

    The tokens of all texts, in their order and with the tokenizer's end token between them, are cut
    into samples of ``length``: nothing is padded, so that every token counts. A rest shorter than
    that is a batch by itself if no whole sample came before it; otherwise it is dropped.

    Args:
        tokenizer: of transformers.
        path_or_texts: a file (``.jsonl`` with a field "text", anything else as plain text), or
            texts.
        samples: at most so many are made; texts beyond them are not read.
        length: tokens of a sample.
        batch_size: samples that go through the model together.

    Returns:
        ``{"input_ids": int64 [batch_size, length], "attention_mask": ...}`` each; the last batch
        may be smaller.

    Raises:
        ArgumentError: a number is below 1, the file is no text, or there are fewer than 2 tokens.
        OSError: the file cannot be read.
    """
    for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
        if value < 1 or (name == "length" and value < 2):
            raise ArgumentError(f"calibration.text was given {name}={value}, wanted more.")
    tokens = _tokens(tokenizer, _texts(path_or_texts), samples * length)
    if len(tokens) < 2:
        raise ArgumentError(
            f"The calibration text has {len(tokens)} tokens, wanted at least 2 (and better some "
            f"thousands). Give a longer text."
        )
    whole = min(len(tokens) // length, samples)
    rows = tokens[: whole * length].view(whole, length) if whole else tokens[None]
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows.split(batch_size)
    ]


def _tokens(tokenizer: Any, texts: Iterator[str], wanted: int) -> Tensor:
    """Ids of the texts, int64 [at most ``wanted``], the end token between two of them."""
    ids: list[int] = []
    for sample in texts:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(int(tokenizer.eos_token_id))
        ids += tokenizer(sample, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    return torch.tensor(ids[:wanted], dtype=torch.int64)


def _texts(path_or_texts: str | os.PathLike[str] | Iterable[str]) -> Iterator[str]:
    if isinstance(path_or_texts, (str, os.PathLike)):
        yield from _file_texts(Path(path_or_texts))
        return
    for sample in path_or_texts:
        if not isinstance(sample, str):
            raise ArgumentError(
                f"calibration.text was given a {type(sample).__name__} among the texts, wanted "
                "strings. Batches of tokens need no preparation: pass them on as they are."
            )
        yield sample


def _file_texts(path: Path) -> Iterator[str]:
    """The texts of a file: one for each line of JSON, or the whole."""
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _field(path, number, line)
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"The calibration file {str(path)!r} is no text in UTF-8 ({error.reason} at byte "
            f"{error.start}). Give a .txt or .jsonl file."
        ) from error


def _field(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ArgumentError(
            f"Line {number} of the calibration file {str(path)!r} is no JSON: {error.msg}."
        ) from error
    for name in _TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(name), str):
            return str(row[name])
    raise ArgumentError(
        f"Line {number} of the calibration file {str(path)!r} has no field "
        f"{' or '.join(map(repr, _TEXT_FIELDS))} with a text."
    )
