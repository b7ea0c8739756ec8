"""Commands load models by their hub ids, here from a local server that answers like the hub."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from freebits import CheckpointError
from freebits.storage import hub as hub_module
from freebits.storage.hub import local_folder
from tests.serving import Answer, serving
from tests.tiny import Make

ID, COMMIT = "makers/tiny", "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A local server that serves a folder as the hub serves a model.

    Attributes:
        address: URL of the server.
        requested: names of the files that clients read.
        sizes: file name → bytes of the file.
        sent: file name → bytes that the server sent.
    """

    address: str
    requested: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def hub(save_tiny: Make) -> Iterator[Hub]:
    folder = save_tiny()
    server = Hub("")

    def answer(path: str) -> Answer:
        requested = folder / Path(path).name
        if path.startswith(f"/api/models/{ID}"):
            files = list(folder.iterdir())
            listing: Any = {"id": ID, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            if "/tree/" in path:
                listing = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in files
                ]
            return 200, {}, json.dumps(listing).encode()
        if path.startswith(f"/{ID}/resolve/") and requested.is_file():
            body = requested.read_bytes()
            server.sizes[requested.name] = len(body)
            return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def count_sent(path: str, n_bytes: int) -> None:
        if "/resolve/" in path:
            name = Path(path).name
            server.requested.append(name)
            server.sent[name] = server.sent.get(name, 0) + n_bytes

    with serving(answer, count_sent) as server.address:
        yield server


def run_freebits(hub: Hub, home: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    hub_variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | hub_variables | variables
    command = [sys.executable, "-m", "freebits.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=home)


def test_commands_accept_the_hub_id_of_a_model(hub: Hub, tmp_path: Path) -> None:
    result = run_freebits(hub, tmp_path, "estimate", ID, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["bytes"]["dense"] > 0
    assert hub.requested == ["config.json"]  # but no weights
    result = run_freebits(hub, tmp_path, "compress", ID, tmp_path / "out", "--lossless")
    assert result.returncode == 0, result.stderr
    assert "bit-exact" in result.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {ID}" in card
    assert "base_model_relation: quantized" in card
    offline = run_freebits(hub, tmp_path, "inspect", ID, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr  # because the files are in the cache


def test_a_dry_run_downloads_only_headers_and_caches_no_file(hub: Hub, tmp_path: Path) -> None:
    result = run_freebits(hub, tmp_path, "compress", ID, tmp_path / "out", "--dry-run", XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert ID in result.stdout
    assert f"hf://{ID}" in result.stdout
    assert hub.sent["model.safetensors"] < hub.sizes["model.safetensors"] / 4
    assert not list(tmp_path.glob("hub"))  # the folder of the cache


def test_a_model_that_cannot_be_downloaded_gives_a_one_line_error(hub: Hub, tmp_path: Path) -> None:
    for model, variables in (("makers/none", {}), (ID, {"HF_HUB_OFFLINE": "1"})):
        result = run_freebits(hub, tmp_path, "compress", model, tmp_path / "out", "--lossless", **variables)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert model in result.stderr
        assert not (tmp_path / "out").exists()


def test_paths_are_not_taken_for_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for path in ("a", "a/b", "./x/y", "/x/y", "~/x", "x"):
        assert local_folder(path) == Path(path)


def test_push_uploads_a_folder_or_names_the_repository_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Api:
        def create_repo(self, repo: str, exist_ok: bool, private: bool) -> None:
            calls.append((repo, exist_ok and private))

        def upload_folder(self, folder_path: Path, repo_id: str, commit_message: str) -> Any:
            calls.append((folder_path, repo_id, commit_message))
            return type("Commit", (), {"commit_url": "address"})

    monkeypatch.setattr(hub_module, "HfApi", Api)
    assert hub_module.push(tmp_path, "me/small") == "address"
    assert calls == [("me/small", True), (tmp_path, "me/small", "Made by freebits")]

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no way")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(CheckpointError, match=r"me/small \(no way\)"):
        hub_module.push(tmp_path, "me/small")
