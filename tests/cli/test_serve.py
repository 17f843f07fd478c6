"""``mokernels serve`` and ``chat``: a real server on loopback, a real client of OpenAI's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from openai import APIStatusError, BadRequestError, OpenAI, UnprocessableEntityError
from typer.testing import CliRunner

import mokernels
from mokernels.cli import app, serve
from mokernels.errors import ArgumentError
from tests.demo.tiny import byte_tokenizer, talkative_model
from tests.support.models import export

SECONDS = 90
MESSAGE = [{"role": "user", "content": "Hello"}]
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint whose config.json says nothing about its quantization."""
    path = tmp_path_factory.mktemp("model") / "m"
    export(talkative_model().float(), path, "FP8_PB_WO", stated_in=("hf_quant_config.json",))
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder) -> list[str]:
    """The greedy answer to the message, by the library alone; after each token."""
    model, tokenizer = mokernels.from_pretrained(folder), byte_tokenizer()
    ids = tokenizer("<bos>Hello", return_tensors="pt").input_ids
    start, texts = ids.shape[1], []
    for _ in range(8):
        with torch.inference_mode():
            best = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], dim=1)
        texts.append(tokenizer.decode(ids[0, start:]))
    return texts


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS)


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory) -> Iterator[OpenAI]:
    """Of a server with continuous batching, which is interrupted in the end and has to exit."""
    home = tmp_path_factory.mktemp("home")  # without a hub's cache
    port, log = serve.free_port(), home / "log"
    words = [sys.executable, "-m", "mokernels", "serve", str(folder), "--host", "127.0.0.1"]
    words += ["--port", str(port), "--device", "cpu", "--continuous-batching"]
    words += ["--cb-num-blocks", "8", "--cb-max-batch-tokens", "256"]
    with log.open("w") as out:
        process = subprocess.Popen(
            words, stdout=out, stderr=out, env={**os.environ, "HF_HOME": str(home / "hf")}
        )
    try:
        wait_until_up(process, port, log)
        yield client_of(f"http://127.0.0.1:{port}/v1")
        process.send_signal(signal.SIGINT)
        # uvicorn ends in peace or, where it was interrupted while it began, by the signal.
        assert process.wait(60) in (0, 1, 130, -signal.SIGINT), log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_up(process: subprocess.Popen, port: int, log: Path) -> None:
    for _ in range(SECONDS * 5):
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(f"http://127.0.0.1:{port}/health"):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def ask(client: OpenAI, folder: Path, **options):
    options = {"max_tokens": 8, "temperature": 0, "messages": MESSAGE, **options}
    return client.chat.completions.create(model=str(folder), **options)


def test_a_chat(client, folder, expected):
    answer = ask(client, folder)
    assert answer.choices[0].message.content == expected[-1]
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 8)


def test_a_streamed_chat(client, folder, expected):
    chunks = [chunk.choices[0] for chunk in ask(client, folder, stream=True) if chunk.choices]
    texts = [chunk.delta.content for chunk in chunks if chunk.delta.content]
    assert len(texts) > 1
    # A character whose last byte is still to come may be left out of a stream's end.
    assert "".join(texts).rstrip("\ufffd") == expected[-1].rstrip("\ufffd")
    assert chunks[-1].finish_reason == "length"


def test_a_text_is_completed(client, folder, expected):
    answer = client.completions.create(
        model=str(folder), prompt="<bos>Hello", max_tokens=8, temperature=0
    )
    assert answer.choices[0].text == expected[-1]


def test_several_requests_at_once(client, folder, expected):
    def one(number: int) -> str:
        answer = ask(client, folder, max_tokens=1 + number % 8)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(16)))
    assert answers == [expected[number % 8] for number in range(16)]


def test_the_server_lists_its_model(client, folder):
    listed = [model.id for model in client.models.list().data]
    assert listed in ([str(folder)], [])  # before transformers 5.21 a folder is not listed


def test_bad_requests_are_errors_and_leave_the_server_alive(client, folder, expected):
    with pytest.raises(BadRequestError, match="400"):
        client.chat.completions.create(model="another/model", messages=MESSAGE)
    with pytest.raises(UnprocessableEntityError, match="422"):
        ask(client, folder, extra_body={"nonsense": 1})
    with pytest.raises(APIStatusError):
        ask(client, folder, messages=[{"content": "no role"}])
    # The server closes the connection of such a request, which the client may be about to use.
    again = ask(client.with_options(max_retries=2), folder)
    assert again.choices[0].message.content == expected[-1]


def test_chat_serves_the_model_meanwhile(folder, expected, monkeypatch, capsys):
    """Without continuous batching; the client is transformers' own, its input a list."""
    urls, hand_over = [], serve.command_line
    lines = iter(["Hello", "n", "!exit"])

    def spy(words):
        urls.append(words[2])
        found = client_of(words[2])
        answer = ask(found, folder, stop=expected[3][-1])
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == expected[3]
        hand_over(words)

    monkeypatch.setattr(serve, "command_line", spy)
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    with pytest.raises(SystemExit) as end:
        serve.chat(str(folder), None, ["max_new_tokens=8", "do_sample=False"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "8 tokens in" in shown
    assert "POST" not in shown  # the server's log
    with pytest.raises(OSError, match="refused"):
        urlopen(urls[0])


def run(*arguments: object, code: int):
    result = runner.invoke(app, [str(word) for word in arguments], env={"COLUMNS": "300"})
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    assert "Traceback" not in result.output
    return result


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_folders_that_cannot_be_served(command, tmp_path, folder):
    result = run(command, tmp_path / "nothing", code=1)
    assert f"The path '{tmp_path / 'nothing'}' does not exist" in result.stderr
    (tmp_path / "empty").mkdir()
    assert "[weights-missing]" in run(command, tmp_path / "empty", code=1).stderr
    for file in ("config.json", "model.safetensors", "hf_quant_config.json"):
        (tmp_path / "empty" / file).symlink_to(tmp_path / "empty" / f"own-{file}")
        (tmp_path / "empty" / f"own-{file}").write_bytes((folder / file).read_bytes())
    result = run(command, tmp_path / "empty", code=2)
    assert "holds no tokenizer" in result.stderr
    assert result.stderr.rstrip().endswith("files of the original model there.")


def test_a_port_that_is_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("serve", folder, "--host", "127.0.0.1", "--port", port, code=2)
    assert f"cannot listen on port {port} of '127.0.0.1': another program listens" in result.stderr


@pytest.mark.parametrize("port", ["many", 99999999])
def test_a_port_that_is_none(folder, port):
    assert "port" in run("serve", folder, "--port", port, code=2).stderr


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_flag_that_transformers_does_not_know(folder, command, monkeypatch):
    monkeypatch.setattr(serve, "require_free", lambda host, port: None)
    words = [folder] if command == "serve" else [folder, "--url", "http://127.0.0.1:1/v1"]
    result = run(command, *words, "--no-such-flag", code=2)
    assert "No such option" in result.stderr
    assert "--no-such-flag" in result.stderr


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_packages_that_are_missing(command, folder, monkeypatch):
    monkeypatch.setattr(serve, "PACKAGES", ("openai", "no_such_package"))
    result = run(command, folder, code=1)
    assert f"`mokernels {command}` needs the packages no_such_package, which" in result.stderr
    assert 'pip install "mokernels[serve]"' in result.stderr


def test_names_of_the_hub_are_left_to_transformers(monkeypatch):
    seen = []
    monkeypatch.setattr(serve, "command_line", seen.append)
    port = serve.free_port()
    run("serve", "nvidia/Some-FP8", "--port", port, "--compile", code=0)
    run("chat", "nvidia/Some-FP8", "a=1", "--url", "http://x/v1", "--user", "me", code=0)
    assert seen == [
        ["serve", "nvidia/Some-FP8", "--port", str(port), "--compile"],
        ["chat", "nvidia/Some-FP8", "http://x/v1", "a=1", "--user", "me"],
    ]


def test_address_of_the_flags():
    assert serve.address(["--compile", "--port=7", "--host", "::1"]) == ("::1", 7)
    assert serve.address(["--cb-block-size", "32"]) == ("localhost", 8000)
    with pytest.raises(ArgumentError, match="cannot be read"):
        serve.address(["--port"])
