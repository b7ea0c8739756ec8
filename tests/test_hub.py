"""Models by their ids: a server on this machine speaks the hub's paths."""

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
    """A folder, served as the hub serves a model."""

    address: str
    asked: list[str] = field(default_factory=list)
    """Files that were read."""
    sizes: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of each file."""


@pytest.fixture
def hub(save_tiny: Make) -> Iterator[Hub]:
    folder = save_tiny()
    found = Hub("")

    def answer(path: str) -> Answer:
        file = folder / Path(path).name
        if path.startswith(f"/api/models/{ID}"):
            files = list(folder.iterdir())
            told: Any = {"id": ID, "sha": COMMIT, "siblings": [{"rfilename": of.name} for of in files]}
            if "/tree/" in path:
                told = [{"type": "file", "path": of.name, "size": of.stat().st_size, "oid": "0"} for of in files]
            return 200, {}, json.dumps(told).encode()
        if path.startswith(f"/{ID}/resolve/") and file.is_file():
            body = file.read_bytes()
            found.sizes[file.name] = len(body)
            return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def sent(path: str, n_bytes: int) -> None:
        if "/resolve/" in path:
            found.asked.append(Path(path).name)
            found.sent[Path(path).name] = found.sent.get(Path(path).name, 0) + n_bytes

    with serving(answer, sent) as found.address:
        yield found


def freebits(hub: Hub, home: Path, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **settings}
    command = [sys.executable, "-m", "freebits.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=home)


def test_a_models_id_stands_for_its_folder(hub: Hub, tmp_path: Path) -> None:
    done = freebits(hub, tmp_path, "estimate", ID, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"]["dense"] > 0
    assert hub.asked == ["config.json"]  # and no weights
    done = freebits(hub, tmp_path, "compress", ID, tmp_path / "out", "--lossless")
    assert done.returncode == 0, done.stderr
    assert "bit-exact" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {ID}" in card
    assert "base_model_relation: quantized" in card
    offline = freebits(hub, tmp_path, "inspect", ID, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr  # it is in the cache


def test_a_plan_reads_headers_by_range(hub: Hub, tmp_path: Path) -> None:
    done = freebits(hub, tmp_path, "compress", ID, tmp_path / "out", "--dry-run", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert ID in done.stdout
    assert f"hf://{ID}" in done.stdout
    assert hub.sent["model.safetensors"] < hub.sizes["model.safetensors"] / 4
    assert not list((tmp_path).glob("hub"))  # nothing was put into the cache


def test_what_cannot_be_had_is_one_line(hub: Hub, tmp_path: Path) -> None:
    for model, settings in (("makers/none", {}), (ID, {"HF_HUB_OFFLINE": "1"})):
        done = freebits(hub, tmp_path, "compress", model, tmp_path / "out", "--lossless", **settings)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert model in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_folder_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for path in ("a", "a/b", "./x/y", "/x/y", "~/x", "x"):
        assert local_folder(path) == Path(path)


def test_pushing_uploads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
