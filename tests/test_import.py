"""Import models that TransformerCompression, the code of the SliceGPT paper, sliced."""

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


def transformer_compression_tensors(model: Any, names: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that TransformerCompression would save for a dense model that it rotates but does not cut."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    generator, D = torch.Generator().manual_seed(3), model.config.hidden_size
    Q = [random_orthogonal(D, generator) for _ in range(2 * model.config.num_hidden_layers + 1)]
    subtracts_mean = names is OPT
    projection = torch.eye(D, dtype=torch.float64) - (1 / D if subtracts_mean else 0)

    def fuse(norm: str, read: str) -> None:
        weight = state[f"{read}.weight"]
        if subtracts_mean:
            zeros = torch.zeros(len(weight), dtype=torch.float64)
            state[f"{read}.bias"] = state.get(f"{read}.bias", zeros) + weight @ state[f"{norm}.bias"]
        state[f"{read}.weight"] = weight * state[f"{norm}.weight"]

    for embedding in names["embeddings"]:
        state[f"{embedding}.weight"] = state[f"{embedding}.weight"] @ projection @ Q[0]
    for site in range(len(Q) - 1):
        block, half = f"{names['blocks']}.{site // 2}", site % 2
        for read in names["reads"][half]:
            fuse(f"{block}.{names['norms'][half]}", f"{block}.{read}")
            state[f"{block}.{read}.weight"] = state[f"{block}.{read}.weight"] @ Q[site]
        write = f"{block}.{names['writes'][half]}"
        state[f"{write}.weight"] = Q[site + 1].T @ projection @ state[f"{write}.weight"]
        if f"{write}.bias" in state:
            state[f"{write}.bias"] = state[f"{write}.bias"] @ projection @ Q[site + 1]
        state[f"{block}.{('attn', 'mlp')[half]}_shortcut_Q"] = Q[site].T @ Q[site + 1]
    fuse(names["final"], "lm_head")
    state["lm_head.weight"] = state["lm_head.weight"] @ Q[-1]
    norms = ("layernorm.", "layer_norm.", "model.norm.")
    return {name: tensor for name, tensor in state.items() if not any(norm in name for norm in norms)}


def logits(folder: Path) -> Tensor:
    windows = token_windows(folder, random_text(64), 32)
    with torch.no_grad():
        result: Tensor = load(folder, dtype=torch.float64)(windows).logits
    return result


def save_as_transformer_compression(dense: Path, file: Path, names: dict[str, Any] = LLAMA) -> Path:
    """Save a dense model as TransformerCompression saves a rotated one, and return the file."""
    torch.save(transformer_compression_tensors(load(dense, dtype=torch.float64), names), file)
    file.with_suffix(".json").write_text(json.dumps({"hidden_size": 32, "layers_num": 3, "do_slice_head": False}))
    return file


@pytest.mark.parametrize(("variant", "names"), [({}, LLAMA), ({"tie_word_embeddings": True}, LLAMA), ({}, OPT)])
def test_an_imported_rotated_model_computes_the_same_as_the_dense_model(
    tmp_path: Path, save_tiny: Make, variant: dict[str, Any], names: dict[str, Any]
) -> None:
    dense = save_tiny(dtype=torch.float64, model_type="llama" if names is LLAMA else "opt", **variant)
    file = save_as_transformer_compression(dense, tmp_path / "a.pt", names)
    facts = freebits.import_slicegpt(file, dense, tmp_path / "out")
    assert facts["history"][-1]["by"] == "TransformerCompression"
    torch.testing.assert_close(logits(tmp_path / "out"), logits(dense), rtol=0, atol=1e-4)  # norms run in float32


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi", "phi3"])
@pytest.mark.parametrize("cuts_head", [False, True])
def test_an_imported_sliced_model_gives_the_same_logits_and_can_be_packed(
    tmp_path: Path, save_tiny: Make, slice_tiny: Make, model_type: str, cuts_head: bool
) -> None:
    dense = save_tiny(model_type=model_type, dtype=torch.float64)
    sliced = slice_tiny(dense, untie=True, force=True)
    tensors = {}
    for name, tensor in load(sliced).state_dict().items():
        sublayer = name.removesuffix("_shortcut.weight").rpartition(".")[2]
        short = {"attention": "attn", "parallel": "attn", "mlp": "mlp"}.get(sublayer)
        shortened = name.replace(f"{sublayer}_shortcut.weight", f"{short}_shortcut_Q")
        tensors[shortened] = tensor.T if "shortcut" in name else tensor
    if cuts_head:  # the last site gets the width of the other sites
        last_shortcut, k = f"layers.2.{'attn' if model_type == 'phi' else 'mlp'}_shortcut_Q", 24
        for name, tensor in tensors.items():
            if "layers.2." in name and re.search(r"(down_proj|fc2|self_attn\.dense)\.(weight|bias)", name):
                tensors[name] = tensor[:k]
            elif name == "lm_head.weight" or last_shortcut in name:
                tensors[name] = tensor[:, :k]
    torch.save(tensors, tmp_path / "a.pt")
    freebits.import_slicegpt(tmp_path / "a.pt", dense, tmp_path / "out")
    expected, imported = load(sliced), load(tmp_path / "out")
    if not cuts_head:
        assert torch.equal(*(model(torch.arange(20)[None]).logits for model in (expected, imported)))
    assert imported.config.site_sizes[-1] == (24 if cuts_head else 32)
    freebits.pack(tmp_path / "out", tmp_path / "packed")
    torch.testing.assert_close(logits(tmp_path / "packed"), logits(tmp_path / "out"), rtol=0, atol=1e-4)


def test_the_config_of_the_dense_model_is_enough_and_defines_the_norms(tmp_path: Path, save_tiny: Make) -> None:
    dense = save_tiny(rms_norm_eps=1e-3)
    file = save_as_transformer_compression(dense, tmp_path / "a.pt")
    (dense / "model.safetensors").unlink()
    config = json.loads((dense / "config.json").read_text())
    del config["rms_norm_eps"]
    (dense / "config.json").write_text(json.dumps(config))
    assert freebits.import_slicegpt(file, dense, tmp_path / "out")["bytes"]["dense"] is None
    assert load(tmp_path / "out").model.layers[0].input_layernorm.eps == 1e-5
    tensors = {name: tensor.contiguous() for name, tensor in torch.load(file).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    freebits.import_slicegpt(tmp_path / "a.safetensors", dense, tmp_path / "again")
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert weights[0] == weights[1]


class CreatesFolder:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path.cwd() / "ran"),)


def test_invalid_files_are_refused_and_their_code_does_not_run(
    tmp_path: Path, save_tiny: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = save_tiny()
    good = transformer_compression_tensors(load(dense), LLAMA)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    bias, shortcut = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp_shortcut_Q"
    first_up, second_up = (f"model.layers.{block}.mlp.up_proj.weight" for block in range(2))
    lacks_matrix = {name: tensor for name, tensor in good.items() if name != first_up}
    lacks_shortcut = {name: tensor for name, tensor in good.items() if "layers.1.mlp_shortcut" not in name}
    huge = torch.zeros(1).expand(2**34, 32)
    invalid: dict[str, tuple[object, list[str]]] = {
        "scalar": (good | {embedding: torch.tensor(1.0)}, [embedding, "scalar.pt"]),
        "empty": (good | {embedding: torch.ones(0, 32)}, [embedding, "empty.pt"]),
        "meta": (good | {embedding: torch.ones(96, 32, device="meta")}, [embedding, "meta.pt"]),
        "sparse": (good | {embedding: torch.ones(96, 32).to_sparse()}, [embedding, "sparse.pt"]),
        "complex": (good | {embedding: torch.ones(96, 32, dtype=torch.complex64)}, [embedding, "complex.pt"]),
        "integer": (good | {embedding: torch.ones(96, 32, dtype=torch.int64)}, [embedding, "integer.pt"]),
        "expanded": (good | {embedding: huge, head: huge}, ["expanded.pt"]),
        "flat shortcut": (good | {shortcut: torch.ones(32)}, ["flat shortcut.pt"]),
        "deep shortcut": (good | {shortcut: torch.ones(32, 32, 1)}, [shortcut, "deep shortcut.pt"]),
        "superfluous bias": (good | {bias: torch.ones(32)}, [bias]),
        "no matrix": (lacks_matrix, [first_up]),
        "evil": ({"a": CreatesFolder()}, ["evil.pt"]),
        "list": ([1, 2], ["list.pt"]),
        "LoRA": (good | {"base_model.model.x.lora_A.weight": torch.ones(2)}, ["base_model.model.x.lora_A.weight"]),
        "no shortcut": (lacks_shortcut, ["no shortcut.pt"]),
        "wrong height": (good | {second_up: torch.ones(60, 32)}, [second_up, "[60, 32]"]),
        "wrong width": (good | {second_up: torch.ones(64, 31)}, [second_up, "[64, 31]"]),
    }
    for name, (content, facts) in invalid.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert main(["import", f"{name}.pt", str(dense), "out"]) == 2
        error = capsys.readouterr().err
        assert all(fact in error for fact in facts), error
    file = save_as_transformer_compression(dense, tmp_path / "truncated.pt")
    file.write_bytes(file.read_bytes()[:-500])
    (tmp_path / "nested.json").write_text("[" * 200_000)
    torch.save(good, tmp_path / "nested.pt")
    (tmp_path / "other.json").write_text('{"hidden_size": 64, "layers_num": 3}')
    torch.save(good, tmp_path / "other.pt")
    for name, fact in (
        ("truncated", "truncated.pt"),
        ("nested", "nested.json"),
        ("other", "hidden_size is 64"),
        ("missing", "missing.pt"),
    ):
        assert main(["import", f"{name}.pt", str(dense), "out"]) == 2
        assert fact in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        freebits.import_slicegpt("missing.pt", dense, "out")
