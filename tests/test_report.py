"""A report is one self-contained page. It shows what was measured, and escapes all content of a folder."""

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


class ParsedPage(HTMLParser):
    """The texts, tags and link targets of a page. Parsing fails if the tags are not nested correctly."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(content)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def quantized(save_tiny: Make, tmp_path: Path) -> Path:
    freebits.quantize(save_tiny(), tmp_path / "small", bits=5, calibration=random_text(600), samples=4, seq_len=32)
    return tmp_path / "small"


def test_a_page_is_self_contained_and_shows_the_measured_figures(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(random_text(400))
    page = tmp_path / "page.html"
    command = ["report", str(quantized), "--against", str(tmp_path / "dense"), "-o", str(page)]
    assert main([*command, "--text", str(tmp_path / "text"), "--seq-len", "32", "--limit", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    content = page.read_text(encoding="utf-8")
    parsed = ParsedPage(content)
    text = " ".join(parsed.texts)
    assert parsed.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"https?://(?!www\.w3\.org)", content)
    assert f"{result['against']['ratio']:.5f}" in text
    assert f"{result['against']['perplexity']['reference']:.4f}" in text
    assert "bits=5" in text
    for section in ("Size, step by step", "What the bytes are for", "Quality", "Bits of each matrix", "Error of each"):
        assert section in text
    assert content.count("<svg") == 5
    assert "$" not in text  # no formula is left as TeX
    ratio = freebits.verify(quantized, against=tmp_path / "dense", text=random_text(400), seq_len=32, limit=4)["ratio"]
    assert result["against"]["ratio"] == pytest.approx(ratio)


def test_a_report_without_a_reference_has_no_quality_section_and_leaves_no_other_file(
    quantized: Path, tmp_path: Path
) -> None:
    result = freebits.write_report(quantized, tmp_path / "page.html")
    assert result["against"] is None
    assert "Quality" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    freebits.write_report(tmp_path / "dense", tmp_path / "page.html")  # a model without a history
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "page.html", "small"]


def test_html_in_a_manifest_is_escaped(quantized: Path, tmp_path: Path) -> None:
    script = "</pre><script>alert(1)</script>"
    step = {script: script, "transform": script, "bytes": {"dense": 10**400, "sliced": True, script: -1}}
    redigest(quantized, lambda manifest: manifest["history"][0].update(step))
    freebits.write_report(quantized, tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in content
    assert "script" not in ParsedPage(content).tags


@pytest.mark.parametrize(
    "name", ["a.$\\frac$.weight", "layers.²._x", "layers.99999999999.漢字\u202e", "x" * 3000 + "$"]
)
def test_tensor_names_are_escaped(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "unknown"}')
    save_file({name: torch.ones(2, 2)}, tmp_path / "model" / "model.safetensors")
    freebits.write_report(tmp_path / "model", tmp_path / "page.html")
    ParsedPage((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_errors_of_matrices_are_not_shown_if_the_basis_differs(save_tiny: Make, tmp_path: Path) -> None:
    freebits.pack(save_tiny(), tmp_path / "packed")
    freebits.write_report(tmp_path / "packed", tmp_path / "page.html", against=tmp_path / "dense", seq_len=8, limit=1)
    assert "Error of each matrix" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_models_with_the_same_vocabulary_can_be_compared(quantized: Path, save_tiny: Make, tmp_path: Path) -> None:
    other = save_tiny("other", num_hidden_layers=2)
    options: dict[str, Any] = {"text": random_text(60), "seq_len": 8, "limit": 1}
    redigest(quantized, lambda manifest: manifest["history"][0].update(transform=[]))
    for folder in (quantized, tmp_path / "dense"):
        assert freebits.write_report(folder, tmp_path / "page.html", against=other, **options)["against"]["ratio"] > 0


def test_an_output_that_is_no_file_in_an_existing_folder_is_refused(quantized: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "nowhere" / "page.html", tmp_path, "/", "."):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(out))} "):
            freebits.write_report(quantized, out)


def test_a_rounded_view_rounds_matrices_in_groups_and_keeps_vectors(save_tiny: Make) -> None:
    dense: Any = Checkpoint(save_tiny(dtype=torch.float32))
    errors = []
    for bits in (4, 8):
        rounded = RoundedView(dense, bits)
        name = "model.layers.0.mlp.up_proj.weight"
        groups = rounded[name].unflatten(-1, (-1, 32))
        assert all(len(group.unique()) <= 2**bits - 1 for group in groups.flatten(0, 1))
        errors.append((rounded[name] - dense[name]).norm() / dense[name].norm())
        assert torch.equal(rounded["model.norm.weight"], dense["model.norm.weight"])
        source: Any = {name: dense[name][:, :24]}  # fewer columns than a group
        matrix = RoundedView(source, bits)[name]
        source[name] = matrix
        assert torch.equal(RoundedView(source, bits)[name], matrix)
        assert len(matrix.unique()) < matrix.numel() / 2 or bits == 8
    assert errors[1] < 0.01 < errors[0] < 0.15
