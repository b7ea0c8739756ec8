"""What people do with a model, done with every form that freebits writes: sliced, canonical, quantized, narrow."""

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
def test_beams_samples_and_batches_are_generated(folder: Path) -> None:
    model, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.unk_token
    batch = tokenizer(["w5 w6 w7", "w8 w9 w10 w11 w12"], return_tensors="pt", padding=True)
    for options in ({"num_beams": 3}, {"do_sample": True, "top_k": 5, "num_return_sequences": 2}):
        made = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **options)
        assert made.shape[1] == batch["input_ids"].shape[1] + 6
    both = model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = model.generate(
        **tokenizer("w5 w6 w7", return_tensors="pt"), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(both[0, -6:], alone[0, -6:])


@torch.no_grad()
def test_without_its_head_it_is_what_is_below_the_head(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    model.save_pretrained(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):  # packed, plain
        for code in ({}, {"trust_remote_code": True}):
            below = AutoModel.from_pretrained(place, dtype=torch.float32, **code).eval()
            assert torch.equal(below(TOKENS).last_hidden_state, model.base_model(TOKENS).last_hidden_state)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # by its name of before transformers 5.24
def test_an_adapter_is_trained_saved_and_merged(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = ADAPTED if set(ADAPTED) <= names else ["down", "up"]  # of low rank
    before = model(TOKENS).logits.detach()
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=layers))
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    optimiser = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(adapted.train()(TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    trained = adapted.eval()(TOKENS).logits.detach()
    assert not torch.allclose(trained, before, atol=1e-3)
    again: Any = PeftModel.from_pretrained(loaded(folder), str(tmp_path / "adapter"))
    torch.testing.assert_close(again.merge_and_unload()(TOKENS).logits, trained, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_it_is_traced_whole_copied_and_pickled(folder: Path) -> None:
    model = loaded(folder)
    expected = model(TOKENS).logits
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)  # what another backend would get
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(again(TOKENS).logits, expected)


@torch.no_grad()
def test_attention_by_another_kernel_is_the_same(folder: Path) -> None:
    expected = loaded(folder, attn_implementation="eager")(TOKENS).logits
    torch.testing.assert_close(
        loaded(folder, attn_implementation="sdpa")(TOKENS).logits, expected, atol=1e-4, rtol=1e-4
    )
