"""Folders elsewhere: fsspec's memory, and a server on this machine that serves ranges."""

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
    """What is kept of folders elsewhere, apart from the user's."""
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
    """A folder at an address, and how many bytes of each file were sent."""

    address: str
    sent: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def served(sliced: Path) -> Iterator[Served]:
    found = Served("")

    def answer(path: str) -> Answer:
        file = sliced / Path(path).name
        if path.rstrip("/") == "/model":
            links = "".join(f'<a href="/model/{of.name}">x</a>' for of in sliced.iterdir())
            return 200, {"Content-Type": "text/html"}, links.encode()
        return (200, {}, file.read_bytes()) if file.is_file() else (404, {}, b"")

    def sent(path: str, n_bytes: int) -> None:
        found.sent[Path(path).name] = found.sent.get(Path(path).name, 0) + n_bytes

    with serving(answer, sent) as address:
        found.address = f"{address}/model"
        yield found


def test_what_is_an_address() -> None:
    assert url_of("s3://bucket/model/") == "s3://bucket/model"
    assert url_of(Path("s3://bucket/model")) == "s3://bucket/model"  # which pathlib writes with one slash
    for path in ("model", "/model", "C:/model", "C:\\model", "what://model", "makers/model", "s3:"):
        assert url_of(path) is None


def test_from_memory_to_memory(sliced: Path, memory: Any, tmp_path: Path, cache: Path) -> None:
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
        freebits.load("memory://models/sliced")(windows)  # which transformers reads: a download
    assert not [path for path in cache.iterdir() if not path.name.startswith("mirror-")]  # staging directories are gone


def test_weights_are_read_by_range_and_never_copied(served: Served, sliced: Path, tmp_path: Path) -> None:
    [size] = [file.stat().st_size for file in sliced.glob("*.safetensors")]
    freebits.inspect(served.address)
    assert served.sent["model.safetensors"] < size / 4  # the header alone
    hole = local_folder(served.address) / "model.safetensors"
    assert hole.stat().st_size == size
    assert hole.stat().st_blocks == 0
    freebits.pack(served.address, tmp_path / "there")
    freebits.pack(sliced, tmp_path / "here")
    for file in (tmp_path / "here").iterdir():
        assert file.name == "README.md" or file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()


def test_nothing_is_written_where_nothing_can_be(
    served: Served, sliced: Path, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(sliced), served.address.replace("model", "new")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["inspect", served.address.replace("model", "none")]) == 2
    assert "cannot be read (there is no config.json)" in capsys.readouterr().err
    memory.pipe("/taken/file", b"here")
    with pytest.raises(CheckpointError, match="exists already"):
        freebits.pack(sliced, "memory://taken")
    assert memory.find("/") == ["/taken/file"]


def test_what_cannot_be_uploaded_lies_here(
    sliced: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    put = type(memory).put_file

    def refuse(self: Any, file: str, name: str, **options: Any) -> None:
        if name.endswith("config.json"):
            raise OSError("no more room")
        put(self, file, name, **options)

    monkeypatch.setattr(type(memory), "put_file", refuse)
    with pytest.raises(CheckpointError, match=r"no more room.* from /") as told:
        freebits.pack(sliced, "memory://packed")
    assert not memory.exists("/packed")  # where nothing is left
    finished = Path(str(told.value).rpartition(" ")[2])
    assert freebits.inspect(finished)["kind"] == "packed"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    with pytest.raises(CheckpointError, match="could not be uploaded"):
        freebits.pack(sliced, "memory://packed")


def test_a_file_that_changes_is_noticed(sliced: Path, memory: Any) -> None:
    memory.put(str(sliced), "/models/sliced", recursive=True)
    source = Checkpoint(local_folder("memory://models/sliced"))
    name = next(iter(source.specs))
    assert torch.equal(source[name], Checkpoint(sliced)[name])
    memory.pipe("/models/sliced/model.safetensors", (sliced / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        source[name]


def test_a_mirror_of_the_same_files_is_the_same_source(sliced: Path, memory: Any) -> None:
    memory.put(str(sliced), "/models/sliced", recursive=True)

    def facts() -> str:
        remote_module.mirror.cache_clear()
        return Task("pack", local_folder("memory://models/sliced"), {}).facts

    before = facts()
    assert facts() == before  # so a stopped run can be resumed
    memory.pipe("/models/sliced/config.json", (sliced / "config.json").read_bytes())
    assert facts() != before


def test_what_somebody_else_wrote_meanwhile_stays(sliced: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put = type(memory).put_file

    def another(self: Any, file: str, name: str, **options: Any) -> None:
        memory.pipe("/packed/theirs", b"theirs")
        if name.endswith("config.json"):
            raise OSError("no more room")
        put(self, file, name, **options)

    monkeypatch.setattr(type(memory), "put_file", another)
    with pytest.raises(CheckpointError, match="no more room"):
        freebits.pack(sliced, "memory://packed")
    assert memory.find("/packed") == ["/packed/theirs"]


def test_names_that_lead_elsewhere_are_left(memory: Any) -> None:
    memory.store["/model/../../escaped.json"] = memory.open("/x", "wb")
    memory.pipe("/model/config.json", b"{}")
    folder = local_folder("memory://model")
    assert sorted(file.name for file in folder.rglob("*")) == ["config.json"]
    assert not (folder.parent.parent / "escaped.json").exists()


def test_auxiliary_files_at_an_address_come_back(save_tiny: Make, memory: Any, tmp_path: Path) -> None:
    # A mirror holds zeros for every file that it does not copy, and nothing of a folder in a folder.
    dense = save_tiny()
    (dense / "a" / "b").mkdir(parents=True)
    (dense / "a" / "b" / "picture.png").write_bytes(b"picture")
    memory.put(str(dense), "/bucket/model", recursive=True)
    freebits.pack("memory://bucket/model", tmp_path / "packed", codec="none")
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    assert content(tmp_path / "back") == content(dense)
