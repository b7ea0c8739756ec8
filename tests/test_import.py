"""Models that SliceGPT's own code sliced."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import freebits
from freebits.calibration.tokens import token_windows
from freebits.cli.main import main
from freebits.errors import CheckpointError
from freebits.integrations.loading import load
from freebits.transforms.orthogonal import random_orthogonal
from tests.tiny import Make, random_text

LLAMA = {
    "norms": ("input_layernorm", "post_attention_layernorm"),
    "reads": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
    "writes": ("self_attn.o_proj", "mlp.down_proj"),
    "blocks": "model.layers",
    "embeddings": ("model.embed_tokens",),
    "final": "model.norm",
}
OPT = {
    "norms": ("self_attn_layer_norm", "final_layer_norm"),
    "reads": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("fc1",)),
    "writes": ("self_attn.out_proj", "fc2"),
    "blocks": "model.decoder.layers",
    "embeddings": ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    "final": "model.decoder.final_layer_norm",
}


def as_they_save(model: Any, names: dict[str, Any]) -> dict[str, Tensor]:
    """A dense model's tensors as TransformerCompression would have them, rotated but not cut."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    generator, D = torch.Generator().manual_seed(3), model.config.hidden_size
    Q = [random_orthogonal(D, generator) for _ in range(2 * model.config.num_hidden_layers + 1)]
    centred = names is OPT
    no_mean = torch.eye(D, dtype=torch.float64) - (1 / D if centred else 0)

    def fuse(norm: str, read: str) -> None:
        weight = state[f"{read}.weight"]
        if centred:
            zero = torch.zeros(len(weight), dtype=torch.float64)
            state[f"{read}.bias"] = state.get(f"{read}.bias", zero) + weight @ state[f"{norm}.bias"]
        state[f"{read}.weight"] = weight * state[f"{norm}.weight"]

    for embedding in names["embeddings"]:
        state[f"{embedding}.weight"] = state[f"{embedding}.weight"] @ no_mean @ Q[0]
    for site in range(len(Q) - 1):
        block, half = f"{names['blocks']}.{site // 2}", site % 2
        for read in names["reads"][half]:
            fuse(f"{block}.{names['norms'][half]}", f"{block}.{read}")
            state[f"{block}.{read}.weight"] = state[f"{block}.{read}.weight"] @ Q[site]
        write = f"{block}.{names['writes'][half]}"
        state[f"{write}.weight"] = Q[site + 1].T @ no_mean @ state[f"{write}.weight"]
        if f"{write}.bias" in state:
            state[f"{write}.bias"] = state[f"{write}.bias"] @ no_mean @ Q[site + 1]
        state[f"{block}.{('attn', 'mlp')[half]}_shortcut_Q"] = Q[site].T @ Q[site + 1]
    fuse(names["final"], "lm_head")
    state["lm_head.weight"] = state["lm_head.weight"] @ Q[-1]
    bare = ("layernorm.", "layer_norm.", "model.norm.")
    return {name: tensor for name, tensor in state.items() if not any(part in name for part in bare)}


def logits(folder: Path) -> Tensor:
    windows = token_windows(folder, random_text(64), 32)
    with torch.no_grad():
        result: Tensor = load(folder, dtype=torch.float64)(windows).logits
    return result


def sliced_by_them(dense: Path, file: Path, names: dict[str, Any] = LLAMA) -> Path:
    torch.save(as_they_save(load(dense, dtype=torch.float64), names), file)
    file.with_suffix(".json").write_text(json.dumps({"hidden_size": 32, "layers_num": 3, "do_slice_head": False}))
    return file


@pytest.mark.parametrize(("variant", "names"), [({}, LLAMA), ({"tie_word_embeddings": True}, LLAMA), ({}, OPT)])
def test_what_they_rotated_computes_what_the_dense_model_does(
    tmp_path: Path, save_tiny: Make, variant: dict[str, Any], names: dict[str, Any]
) -> None:
    dense = save_tiny(dtype=torch.float64, model_type="llama" if names is LLAMA else "opt", **variant)
    facts = freebits.import_slicegpt(sliced_by_them(dense, tmp_path / "a.pt", names), dense, tmp_path / "out")
    assert facts["history"][-1]["by"] == "TransformerCompression"
    torch.testing.assert_close(logits(tmp_path / "out"), logits(dense), rtol=0, atol=1e-4)  # norms are in float32


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi", "phi3"])
@pytest.mark.parametrize("cuts_head", [False, True])
def test_what_they_sliced_is_the_same_to_the_bit(
    tmp_path: Path, save_tiny: Make, slice_tiny: Make, model_type: str, cuts_head: bool
) -> None:
    dense = save_tiny(model_type=model_type, dtype=torch.float64)
    sliced = slice_tiny(dense, untie=True, force=True)
    theirs = {}
    for name, tensor in load(sliced).state_dict().items():
        spec = name.removesuffix("_shortcut.weight").rpartition(".")[2]
        short = {"attention": "attn", "parallel": "attn", "mlp": "mlp"}.get(spec)
        shortened = name.replace(f"{spec}_shortcut.weight", f"{short}_shortcut_Q")
        theirs[shortened] = tensor.T if "shortcut" in name else tensor
    if cuts_head:  # to the widths of the sites before
        last, k = f"layers.2.{'attn' if model_type == 'phi' else 'mlp'}_shortcut_Q", 24
        for name, tensor in theirs.items():
            if "layers.2." in name and re.search(r"(down_proj|fc2|self_attn\.dense)\.(weight|bias)", name):
                theirs[name] = tensor[:k]
            elif name == "lm_head.weight" or last in name:
                theirs[name] = tensor[:, :k]
    torch.save(theirs, tmp_path / "a.pt")
    freebits.import_slicegpt(tmp_path / "a.pt", dense, tmp_path / "out")
    ours, found = load(sliced), load(tmp_path / "out")
    if not cuts_head:
        assert torch.equal(*(model(torch.arange(20)[None]).logits for model in (ours, found)))
    assert found.config.site_sizes[-1] == (24 if cuts_head else 32)
    freebits.pack(tmp_path / "out", tmp_path / "packed")
    torch.testing.assert_close(logits(tmp_path / "packed"), logits(tmp_path / "out"), rtol=0, atol=1e-4)


def test_the_dense_models_config_is_enough_and_norms_are_as_there(tmp_path: Path, save_tiny: Make) -> None:
    dense = save_tiny(rms_norm_eps=1e-3)
    theirs = sliced_by_them(dense, tmp_path / "a.pt")
    (dense / "model.safetensors").unlink()
    config = json.loads((dense / "config.json").read_text())
    del config["rms_norm_eps"]
    (dense / "config.json").write_text(json.dumps(config))
    assert freebits.import_slicegpt(theirs, dense, tmp_path / "out")["bytes"]["dense"] is None
    assert load(tmp_path / "out").model.layers[0].input_layernorm.eps == 1e-5
    names = {name: tensor.contiguous() for name, tensor in torch.load(theirs).items()}
    save_file(names, tmp_path / "a.safetensors")
    freebits.import_slicegpt(tmp_path / "a.safetensors", dense, tmp_path / "again")
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert weights[0] == weights[1]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path.cwd() / "ran"),)


def test_what_is_no_such_file_is_refused_and_no_code_in_it_runs(
    tmp_path: Path, save_tiny: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = save_tiny()
    good = as_they_save(load(dense), LLAMA)
    lacking = {name: tensor for name, tensor in good.items() if "layers.1.mlp_shortcut" not in name}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    wide = torch.zeros(1).expand(2**34, 32)
    spoilt: dict[str, tuple[object, str]] = {
        "scalar": (good | {embedding: torch.tensor(1.0)}, "matrix or vector"),
        "empty": (good | {embedding: torch.ones(0, 32)}, "matrix or vector"),
        "meta": (good | {embedding: torch.ones(96, 32, device="meta")}, "matrix or vector"),
        "sparse": (good | {embedding: torch.ones(96, 32).to_sparse()}, "matrix or vector"),
        "complex": (good | {embedding: torch.ones(96, 32, dtype=torch.complex64)}, "matrix or vector"),
        "whole": (good | {embedding: torch.ones(96, 32, dtype=torch.int64)}, "matrix or vector"),
        "claims": (good | {embedding: wide, head: wide}, "matrix or vector"),
        "flat": (good | {"model.layers.0.mlp_shortcut_Q": torch.ones(32)}, "lacks a shortcut"),
        "deep": (good | {"model.layers.0.mlp_shortcut_Q": torch.ones(32, 32, 1)}, "matrix or vector"),
        "more": (good | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "q_proj.bias"),
        "less": ({n: t for n, t in good.items() if "0.mlp.up_proj" not in n}, "is missing"),
        "evil": ({"a": Evil()}, "more than tensors"),
        "text": ([1, 2], "named tensors"),
        "lora": (good | {"base_model.model.x.lora_A.weight": torch.ones(2)}, "LoRA"),
        "lacking": (lacking, "incomplete"),
        "wide": (good | {"model.layers.1.mlp.up_proj.weight": torch.ones(60, 32)}, "up_proj.weight has shape [60, 32]"),
        "narrow": (good | {"model.layers.1.mlp.up_proj.weight": torch.ones(64, 31)}, "should be 32"),
    }
    for name, (content, said) in spoilt.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert main(["import", f"{name}.pt", str(dense), "out"]) == 2
        assert said in capsys.readouterr().err
    file = sliced_by_them(dense, tmp_path / "cut.pt")
    file.write_bytes(file.read_bytes()[:-500])
    (tmp_path / "nested.json").write_text("[" * 200_000)
    torch.save(good, tmp_path / "nested.pt")
    (tmp_path / "other.json").write_text('{"hidden_size": 64, "layers_num": 3}')
    torch.save(good, tmp_path / "other.pt")
    for name, said in (
        ("cut", "damaged"),
        ("nested", "cannot be read as JSON"),
        ("other", "hidden_size is 64"),
        ("none", "none.pt"),
    ):
        assert main(["import", f"{name}.pt", str(dense), "out"]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        freebits.import_slicegpt("none.pt", dense, "out")
