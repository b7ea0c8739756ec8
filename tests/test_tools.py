"""Tools of transformers, PEFT and PyTorch work with sliced, canonical, quantized and low-rank models."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import freebits
from tests.tiny import Make, random_text

FORMS = ("sliced", "canonical", "quantized", "low rank")
TOKENS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))
ADAPTED = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(params=FORMS)
def folder(request: pytest.FixtureRequest, save_tiny: Make, slice_tiny: Make, tmp_path: Path) -> Path:
    dense = save_tiny(hidden_size=64, intermediate_size=160, num_key_value_heads=2)
    options: dict[str, Any] = {"calibration": random_text(600), "samples": 4, "seq_len": 32}
    out = tmp_path / request.param.replace(" ", "-")
    if request.param == "quantized":
        freebits.quantize(dense, out, bits=5, **options)
    elif request.param == "low rank":
        freebits.lowrank(dense, out, budget=0.8, **options)
    else:
        slice_tiny(dense)
        if request.param == "canonical":
            freebits.pack(tmp_path / "sliced", out)
    return out


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def test_beam_search_sampling_and_batches_generate_tokens(folder: Path) -> None:
    model, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.unk_token
    batch = tokenizer(["w5 w6 w7", "w8 w9 w10 w11 w12"], return_tensors="pt", padding=True)
    for options in ({"num_beams": 3}, {"do_sample": True, "top_k": 5, "num_return_sequences": 2}):
        tokens = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **options)
        assert tokens.shape[1] == batch["input_ids"].shape[1] + 6
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    batched = model.generate(**batch, **options)
    single = model.generate(**tokenizer("w5 w6 w7", return_tensors="pt"), **options)
    assert torch.equal(batched[0, -6:], single[0, -6:])


@torch.no_grad()
def test_auto_model_loads_the_model_without_its_head(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    model.save_pretrained(tmp_path / "saved")
    for path in (folder, tmp_path / "saved"):
        for options in ({}, {"trust_remote_code": True}):
            base_model = AutoModel.from_pretrained(path, dtype=torch.float32, **options).eval()
            assert torch.equal(base_model(TOKENS).last_hidden_state, model.base_model(TOKENS).last_hidden_state)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT uses a name from before 5.24
def test_an_adapter_is_trained_saved_and_merged(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = ADAPTED if set(ADAPTED) <= names else ["down", "up"]  # of low-rank layers
    before = model(TOKENS).logits.detach()
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=layers))
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(adapted.train()(TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    trained = adapted.eval()(TOKENS).logits.detach()
    assert not torch.allclose(trained, before, atol=1e-3)
    restored: Any = PeftModel.from_pretrained(loaded(folder), str(tmp_path / "adapter"))
    torch.testing.assert_close(restored.merge_and_unload()(TOKENS).logits, trained, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_can_be_traced_as_one_graph_copied_and_pickled(folder: Path) -> None:
    model = loaded(folder)
    expected = model(TOKENS).logits
    torch._dynamo.reset()
    compiled: Any = torch.compile(
        model, backend="eager", fullgraph=True
    )  # traces the graph that any backend would compile
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(duplicate(TOKENS).logits, expected)


@torch.no_grad()
def test_eager_and_sdpa_attention_give_the_same_logits(folder: Path) -> None:
    expected = loaded(folder, attn_implementation="eager")(TOKENS).logits
    torch.testing.assert_close(
        loaded(folder, attn_implementation="sdpa")(TOKENS).logits, expected, atol=1e-4, rtol=1e-4
    )
