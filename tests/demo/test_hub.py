"""Whether the hub is there is decided in time, whatever the network does."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from mokernels.demo import hub
from mokernels.demo.hub import HubError


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def serve(monkeypatch, status: int) -> list[tuple[str, str]]:
    """A hub on this machine that answers every request with ``status``; its requests."""
    requests: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append((self.command, self.path))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    point_hub_at(monkeypatch, server.server_port)
    return requests


def point_hub_at(monkeypatch, port: int) -> None:
    def url(repo, file):
        return f"http://127.0.0.1:{port}/{repo}/{file}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_url", url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (503, False)])
def test_the_hub_is_asked_for_the_model(monkeypatch, status, reachable):
    requests = serve(monkeypatch, status)
    assert hub.hub_reachable("owner/model", timeout=5) is reachable
    assert requests == [("HEAD", "/owner/model/config.json")]


def test_a_closed_port_is_no_hub(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    point_hub_at(monkeypatch, port)
    assert not hub.hub_reachable("owner/model", timeout=5)


def test_a_silent_hub_is_given_up(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        point_hub_at(monkeypatch, silent.getsockname()[1])
        begin = time.monotonic()
        assert not hub.hub_reachable("owner/model", timeout=0.3)
        assert time.monotonic() - begin < 3


def test_a_look_up_of_the_name_that_hangs_is_given_up(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(hub, "_asks", lambda repo, timeout: released.wait(30))
    begin = time.monotonic()
    assert not hub.hub_reachable("owner/model", timeout=0.2)
    assert time.monotonic() - begin < 3
    released.set()


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_asks", lambda repo, timeout: pytest.fail("asked the hub"))
    assert not hub.hub_reachable("owner/model")
    assert hub.why_unreachable() == "HF_HUB_OFFLINE is set"


def test_a_folder_is_taken_before_the_hub_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert hub.local_folder("owner/model").samefile(tmp_path / "owner" / "model")


def test_a_model_of_the_hub_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: True)
    calls = []

    def snapshot(repo, **options):
        calls.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.local_folder("owner/model") == tmp_path
    ((repo, options),) = calls
    assert repo == "owner/model"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in options["allow_patterns"])
    assert options["ignore_patterns"] == ["*/*"]


def test_a_failing_download_is_a_sentence(monkeypatch):
    def snapshot(repo, **options):
        raise RuntimeError("401 Client Error.\nmore lines\nand more")

    monkeypatch.setattr(hub, "hub_reachable", lambda repo: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(
        HubError, match=r"'owner/model' could not be fetched .*: 401 Client Error\. "
    ):
        hub.local_folder("owner/model")


def test_without_the_hub_its_cache_is_used(monkeypatch, tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: str(file))
    assert hub.local_folder("owner/model") == tmp_path


def test_a_cache_that_lacks_a_file_is_not_used(monkeypatch, tmp_path):
    def cached(repo, name):
        return str(tmp_path / name) if name == "config.json" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert hub.cached_snapshot("owner/model", ("config.json", "model.safetensors")) is None
    assert hub.cached_snapshot("owner/model", ("config.json",)) == tmp_path


def test_neither_folder_nor_hub(monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: None)
    with pytest.raises(
        HubError, match=r"'owner/model' does not exist here, .* gets 3 seconds\)\. "
    ):
        hub.local_folder("owner/model")


@pytest.mark.parametrize("path", ["./no/such", "/no/such/folder", "a/b/c", "../up", "a/..", ""])
def test_a_path_that_is_no_model_name_is_not_looked_up(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: pytest.fail("asked the hub"))
    if path in ("", "a/.."):
        assert not hub.is_hub_id(path)
        return
    with pytest.raises(HubError, match="does not exist, and it is no name of a model"):
        hub.local_folder(path)
