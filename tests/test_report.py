"""A report is one page that holds everything, says what was measured, and takes what a folder says for text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import freebits
from freebits import CheckpointError
from freebits.cli.main import main
from freebits.evaluation.reporting import RoundedView
from freebits.storage.checkpoint import Checkpoint
from tests.tiny import Make, random_text, redigest

VOID = {"meta", "path", "use", "line", "circle", "rect", "br"}


class Nested(HTMLParser):
    """Whether tags close as they open; texts and what is linked to."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def quantized(save_tiny: Make, tmp_path: Path) -> Path:
    freebits.quantize(save_tiny(), tmp_path / "small", bits=5, calibration=random_text(600), samples=4, seq_len=32)
    return tmp_path / "small"


def test_a_page_holds_what_it_shows(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(random_text(400))
    page = tmp_path / "page.html"
    command = ["report", str(quantized), "--against", str(tmp_path / "dense"), "-o", str(page)]
    assert main([*command, "--text", str(tmp_path / "text"), "--seq-len", "32", "--limit", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    content = page.read_text(encoding="utf-8")
    parsed = Nested(content)
    told = " ".join(parsed.texts)
    assert parsed.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"https?://(?!www\.w3\.org)", content)
    assert f"{found['against']['ratio']:.5f}" in told
    assert f"{found['against']['perplexity']['reference']:.4f}" in told
    assert "bits=5" in told
    for section in ("Size, step by step", "What the bytes are for", "Quality", "Bits of each matrix", "Error of each"):
        assert section in told
    assert content.count("<svg") == 5
    assert "$" not in told  # mathematics, unset
    ratio = freebits.verify(quantized, against=tmp_path / "dense", text=random_text(400), seq_len=32, limit=4)["ratio"]
    assert found["against"]["ratio"] == pytest.approx(ratio)


def test_a_folder_alone_is_shown_without_being_run(quantized: Path, tmp_path: Path) -> None:
    result = freebits.write_report(quantized, tmp_path / "page.html")
    assert result["against"] is None
    assert "Quality" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    freebits.write_report(tmp_path / "dense", tmp_path / "page.html")  # what has no history has a page, too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "page.html", "small"]


def test_what_a_folder_says_of_itself_is_text(quantized: Path, tmp_path: Path) -> None:
    foul = "</pre><script>alert(1)</script>"
    odd = {foul: foul, "transform": foul, "bytes": {"dense": 10**400, "sliced": True, foul: -1}}
    redigest(quantized, lambda manifest: manifest["history"][0].update(odd))
    freebits.write_report(quantized, tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in content
    assert "script" not in Nested(content).tags


@pytest.mark.parametrize(
    "name", ["a.$\\frac$.weight", "layers.²._x", "layers.99999999999.漢字\u202e", "x" * 3000 + "$"]
)
def test_names_of_tensors_are_text(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "none of ours"}')
    save_file({name: torch.ones(2, 2)}, tmp_path / "model" / "model.safetensors")
    freebits.write_report(tmp_path / "model", tmp_path / "page.html")
    Nested((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_errors_are_shown_where_the_basis_is_the_same(save_tiny: Make, tmp_path: Path) -> None:
    freebits.pack(save_tiny(), tmp_path / "packed")
    freebits.write_report(tmp_path / "packed", tmp_path / "page.html", against=tmp_path / "dense", seq_len=8, limit=1)
    assert "Error of each matrix" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_any_two_models_of_one_vocabulary_can_be_compared(quantized: Path, save_tiny: Make, tmp_path: Path) -> None:
    other = save_tiny("other", num_hidden_layers=2)
    options: dict[str, Any] = {"text": random_text(60), "seq_len": 8, "limit": 1}
    redigest(quantized, lambda manifest: manifest["history"][0].update(transform=[]))
    for folder in (quantized, tmp_path / "dense"):
        assert freebits.write_report(folder, tmp_path / "page.html", against=other, **options)["against"]["ratio"] > 0


def test_a_page_that_cannot_be_written_is_said(quantized: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "nowhere" / "page.html", tmp_path, "/", "."):
        with pytest.raises(CheckpointError, match="cannot be written"):
            freebits.write_report(quantized, out)


def test_coarse_models_are_rounded_in_groups(save_tiny: Make) -> None:
    dense: Any = Checkpoint(save_tiny(dtype=torch.float32))
    errors = []
    for bits in (4, 8):
        rounded = RoundedView(dense, bits)
        name = "model.layers.0.mlp.up_proj.weight"
        groups = rounded[name].unflatten(-1, (-1, 32))
        assert all(len(group.unique()) <= 2**bits - 1 for group in groups.flatten(0, 1))
        errors.append((rounded[name] - dense[name]).norm() / dense[name].norm())
        assert torch.equal(rounded["model.norm.weight"], dense["model.norm.weight"])
        narrow: Any = {name: dense[name][:, :24]}
        cut = RoundedView(narrow, bits)[name]
        narrow[name] = cut
        assert torch.equal(RoundedView(narrow, bits)[name], cut)
        assert len(cut.unique()) < cut.numel() / 2 or bits == 8
    assert errors[1] < 0.01 < errors[0] < 0.15
