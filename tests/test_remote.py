"""Commands read and write remote folders, here in the memory of fsspec and on a local server that serves ranges."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
import torch

import freebits
from freebits import CheckpointError
from freebits.cli.main import main
from freebits.storage import remote as remote_module
from freebits.storage.checkpoint import Checkpoint
from freebits.storage.hub import local_folder
from freebits.storage.remote import url_of
from freebits.storage.resumption import Task
from tests.conftest import content
from tests.serving import Answer, serving
from tests.tiny import Make


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for remote folders, instead of the cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote_module.mirror.cache_clear()
    return tmp_path / "cache" / "freebits"


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def sliced(save_tiny: Make, slice_tiny: Make) -> Path:
    return slice_tiny(save_tiny())


@dataclass
class Served:
    """A folder on a local server.

    Attributes:
        address: URL of the folder.
        sent: file name → bytes that the server sent.
    """

    address: str
    sent: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def served(sliced: Path) -> Iterator[Served]:
    server = Served("")

    def answer(path: str) -> Answer:
        file = sliced / Path(path).name
        if path.rstrip("/") == "/model":
            links = "".join(f'<a href="/model/{entry.name}">x</a>' for entry in sliced.iterdir())
            return 200, {"Content-Type": "text/html"}, links.encode()
        return (200, {}, file.read_bytes()) if file.is_file() else (404, {}, b"")

    def count_sent(path: str, n_bytes: int) -> None:
        server.sent[Path(path).name] = server.sent.get(Path(path).name, 0) + n_bytes

    with serving(answer, count_sent) as address:
        server.address = f"{address}/model"
        yield server


def test_urls_of_known_protocols_are_distinguished_from_paths() -> None:
    assert url_of("s3://bucket/model/") == "s3://bucket/model"
    assert url_of(Path("s3://bucket/model")) == "s3://bucket/model"  # pathlib removes the second slash
    for path in ("model", "/model", "C:/model", "C:\\model", "what://model", "makers/model", "s3:"):
        assert url_of(path) is None


def test_a_remote_folder_is_packed_verified_and_unpacked_like_a_local_one(
    sliced: Path, memory: Any, tmp_path: Path, cache: Path
) -> None:
    freebits.pack(sliced, tmp_path / "here")
    memory.put(str(sliced), "/models/sliced", recursive=True)
    facts = freebits.pack("memory://models/sliced", "memory://models/packed")
    names = {file.name for file in (tmp_path / "here").iterdir()}
    assert {Path(name).name for name in memory.ls("/models/packed", detail=False)} == names
    for name in names - {"README.md"}:
        assert memory.cat(f"/models/packed/{name}") == (tmp_path / "here" / name).read_bytes()
    assert facts == freebits.inspect("memory://models/packed") == freebits.inspect(tmp_path / "here")
    assert freebits.verify("memory://models/packed", against="memory://models/sliced", seq_len=8, limit=2)["ok"]
    freebits.unpack("memory://models/packed", tmp_path / "there")
    freebits.unpack(tmp_path / "here", tmp_path / "back")
    assert content(tmp_path / "there") == content(tmp_path / "back")
    windows = torch.arange(8)[None]
    with torch.no_grad():
        here, there = freebits.load(tmp_path / "here"), freebits.load("memory://models/packed")
        assert torch.equal(here(windows).logits, there(windows).logits)
        freebits.load("memory://models/sliced")(windows)  # transformers reads a downloaded copy
    assert all(path.name.startswith("mirror-") for path in cache.iterdir())  # no staging directory


def test_weights_are_read_by_range_and_not_copied(served: Served, sliced: Path, tmp_path: Path) -> None:
    [size] = [file.stat().st_size for file in sliced.glob("*.safetensors")]
    freebits.inspect(served.address)
    assert served.sent["model.safetensors"] < size / 4  # only the header
    sparse_file = local_folder(served.address) / "model.safetensors"
    assert sparse_file.stat().st_size == size
    assert sparse_file.stat().st_blocks == 0
    freebits.pack(served.address, tmp_path / "there")
    freebits.pack(sliced, tmp_path / "here")
    for file in (tmp_path / "here").iterdir():
        assert file.name == "README.md" or file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()


def test_unusable_urls_are_refused_and_nothing_is_written(
    served: Served, sliced: Path, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    new_url, missing_url = (served.address.replace("model", name) for name in ("new", "missing"))
    assert main(["pack", str(sliced), new_url]) == 2
    assert new_url in capsys.readouterr().err
    assert main(["inspect", missing_url]) == 2
    error = capsys.readouterr().err
    assert missing_url in error
    assert "config.json" in error
    memory.pipe("/taken/file", b"here")
    with pytest.raises(CheckpointError, match="memory://taken"):
        freebits.pack(sliced, "memory://taken")
    assert memory.find("/") == ["/taken/file"]


def test_a_result_that_cannot_be_uploaded_is_kept_and_blocks_the_next_run(
    sliced: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    put = type(memory).put_file

    def refuse(self: Any, file: str, name: str, **options: Any) -> None:
        if name.endswith("config.json"):
            raise OSError("no more room")
        put(self, file, name, **options)

    monkeypatch.setattr(type(memory), "put_file", refuse)
    with pytest.raises(CheckpointError, match=r"memory://packed.*no more room") as caught:
        freebits.pack(sliced, "memory://packed")
    assert not memory.exists("/packed")
    finished = Path(str(caught.value).rpartition(" ")[2])
    assert freebits.inspect(finished)["kind"] == "packed"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    with pytest.raises(CheckpointError, match=re.escape(str(finished))):
        freebits.pack(sliced, "memory://packed")


def test_a_remote_file_that_changes_while_it_is_read_is_refused(sliced: Path, memory: Any) -> None:
    memory.put(str(sliced), "/models/sliced", recursive=True)
    source = Checkpoint(local_folder("memory://models/sliced"))
    name = next(iter(source.specs))
    assert torch.equal(source[name], Checkpoint(sliced)[name])
    memory.pipe("/models/sliced/model.safetensors", (sliced / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        source[name]


def test_a_new_mirror_is_the_same_source_if_no_remote_file_changed(sliced: Path, memory: Any) -> None:
    memory.put(str(sliced), "/models/sliced", recursive=True)

    def facts() -> str:
        remote_module.mirror.cache_clear()
        return Task("pack", local_folder("memory://models/sliced"), {}).facts

    before = facts()
    assert facts() == before  # otherwise a stopped run could not be resumed
    memory.pipe("/models/sliced/config.json", (sliced / "config.json").read_bytes())
    assert facts() != before


def test_a_failed_upload_does_not_remove_files_of_other_writers(
    sliced: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = type(memory).put_file

    def fail_after_other_write(self: Any, file: str, name: str, **options: Any) -> None:
        memory.pipe("/packed/other", b"other")
        if name.endswith("config.json"):
            raise OSError("no more room")
        put(self, file, name, **options)

    monkeypatch.setattr(type(memory), "put_file", fail_after_other_write)
    with pytest.raises(CheckpointError, match="no more room"):
        freebits.pack(sliced, "memory://packed")
    assert memory.find("/packed") == ["/packed/other"]


def test_remote_names_that_lead_out_of_the_mirror_are_ignored(memory: Any) -> None:
    memory.store["/model/../../escaped.json"] = memory.open("/x", "wb")
    memory.pipe("/model/config.json", b"{}")
    folder = local_folder("memory://model")
    assert sorted(file.name for file in folder.rglob("*")) == ["config.json"]
    assert not (folder.parent.parent / "escaped.json").exists()


def test_auxiliary_files_of_a_remote_folder_are_restored(save_tiny: Make, memory: Any, tmp_path: Path) -> None:
    # The mirror has only sparse files in place of most auxiliary files, so `pack` must download their content.
    dense = save_tiny()
    (dense / "a" / "b").mkdir(parents=True)
    (dense / "a" / "b" / "picture.png").write_bytes(b"picture")
    memory.put(str(dense), "/bucket/model", recursive=True)
    freebits.pack("memory://bucket/model", tmp_path / "packed", codec="none")
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    assert content(tmp_path / "back") == content(dense)
