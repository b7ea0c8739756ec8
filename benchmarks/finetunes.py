"""Fine-tune the demo model, so that the results differ from it as published models differ from their base.

    python -m benchmarks.finetunes OUT --data DIR [--steps N]

OUT gets the folder `base`, the demo model in bfloat16 (see `off_grid`), and folders of models trained from it on the
training text of WikiText-2 in DIR. They are trained with AdamW and saved in bfloat16:

- `fast-100` … `fast-1000`: checkpoints of one run with learning rate 2e-5, typical of supervised training
- `slow-200`, `slow-1000`: the same with 1e-6, typical of reinforcement learning
- `merge`: the mean of `fast-1000` and `slow-1000`
- `lora`: a LoRA adapter (rank 16) trained in 200 steps, and merged
- `rows`: `fast-200` with 8 more rows in the vocabulary
"""

import argparse
import copy
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.off_grid import off_grid

LENGTH, BATCH = 256, 1
RATES = {"fast": 2e-5, "slow": 1e-6}
WARM_UP = 20


def main() -> None:
    """Make the models that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext-2-raw")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the longest run (default: %(default)s)")
    arguments = parser.parse_args()
    out, steps = arguments.out, arguments.steps
    base = out / "base"
    if not base.exists():
        model = AutoModelForCausalLM.from_pretrained(off_grid(out / "float16"), dtype=torch.bfloat16)
        save(model, base, out / "float16")
    text = (arguments.data / "wikitext-2-raw" / "wikitext2_train.txt").read_text(encoding="utf-8")[: 1 << 22]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(base)(text, verbose=False)["input_ids"])
    saved = {"fast": [*range(steps // 10, steps + 1, steps // 10)], "slow": [steps // 5, steps]}
    for name, rate in RATES.items():
        if not (out / f"{name}-{steps}").exists():
            model = load(base)
            for step in train(model, tokens, rate, saved[name]):
                save(model, out / f"{name}-{step}", base)
                print(f"{name}-{step}", flush=True)
    if not (out / "lora").exists():
        options = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(load(base), options)
        for _ in train(adapted, tokens, 2e-4, [steps // 5]):
            save(adapted.merge_and_unload(), out / "lora", base)
    fast, slow = (load(out / f"{name}-{steps}") for name in RATES)
    with torch.no_grad():
        for parameter, other in zip(fast.parameters(), slow.parameters(), strict=True):
            parameter.lerp_(other, 0.5)
    save(fast, out / "merge", base)
    grown = load(out / f"fast-{steps // 5}")
    grown.resize_token_embeddings(grown.config.vocab_size + 8)
    save(grown, out / "rows", base)


def load(folder: Path) -> Any:
    """Return a model with float32 parameters."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save(model: Any, folder: Path, base: Path) -> None:
    """Save a copy of a model in bfloat16 with the tokenizer of the base."""
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def train(model: Any, tokens: Tensor, rate: float, saved: Collection[int]) -> Iterator[int]:
    """Train a model on windows drawn at random. Yield the number of finished steps if it is in `saved`."""
    generator = torch.Generator().manual_seed(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    model.train()
    for step in range(1, max(saved) + 1):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        windows = torch.stack([tokens[start : start + LENGTH] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in saved:
            yield step


if __name__ == "__main__":
    main()
