"""Compare results and speed of the CPU and another device.

    python -m benchmarks.devices SCRATCH [--device cuda] [--only alike | fast] [--blocks 2]

`alike` runs every command that takes a device on both devices, with a small random Llama. It reports the relative
differences of the logits between source, CPU result and device result. `fast` packs a few blocks of OPT-6.7B's shape on
both devices.
"""

import argparse
import json
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import benchmarks.group_rounding  # noqa: F401  (registers gptq and rtn)
import freebits
from benchmarks.results import print_table, save_csv
from benchmarks.scale import CONFIGS, n_bytes, write_sliced
from freebits.integrations.loading import load

ALIKE = (
    "command",
    "logits, CPU from source",
    "device from source",
    "device from CPU",
    "seconds, CPU",
    "seconds, device",
)
FAST = ("model", "codec", "seconds, CPU", "seconds, device", "CPU / device", "bytes, CPU", "bytes, device")
WORDS = 512
Command = Callable[[Path, Path, str], object]
"""Function of source, output and device."""


def main() -> None:
    """Compare, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=("alike", "fast"))
    parser.add_argument("--blocks", type=int, default=2)
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.only != "fast":
        report("devices_alike", ALIKE, alike(arguments.scratch / "alike", arguments.device))
    if arguments.only != "alike":
        report("devices_fast", FAST, fast(arguments.scratch / "fast", arguments.device, arguments.blocks))


def report(name: str, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Print and save."""
    print_table(header, rows)
    save_csv(name, header, rows)


def alike(scratch: Path, device: str) -> list[tuple[object, ...]]:
    """Run every command on both devices; rows of failed commands contain FAILED."""
    dense, text = small(scratch / "dense"), words(40_000)
    calibrated: dict[str, Any] = {"calibration": text, "samples": 16, "seq_len": 128}
    commands: dict[str, tuple[str, Command]] = {  # name → (name of the source folder, command)
        "slice": (
            "dense",
            lambda s, o, d: freebits.slice_model(s, o, sparsity=0.25, device=d, force=True, **calibrated),
        ),
        "pack canonical": ("slice", lambda s, o, d: freebits.pack(s, o, device=d)),
        "pack bits-back": ("slice", lambda s, o, d: freebits.pack(s, o, codec="bits-back", device=d)),
        "pack dense": ("dense", lambda s, o, d: freebits.pack(s, o, device=d)),
        "lowrank": ("dense", lambda s, o, d: freebits.lowrank(s, o, budget=0.8, device=d, **calibrated)),
        **{
            f"quantize, {method}": ("dense", quantizing(method, calibrated))
            for method in ("integers", "gptq", "pyramid")
        },
    }
    folders, rows = {"dense": dense}, list[tuple[object, ...]]()
    for name, (source, command) in commands.items():
        outs, seconds = {}, {}
        for where in ("cpu", device):
            outs[where] = scratch / f"{name}, {where}"
            start = time.perf_counter()
            try:
                command(folders[source], outs[where], where)
            except Exception:
                print(name, where, traceback.format_exc(limit=-4), flush=True)
                break
            seconds[where] = time.perf_counter() - start
        else:
            folders[name] = outs["cpu"]
            before, on_cpu, on_device = map(logits, (folders[source], outs["cpu"], outs[device]))
            pairs = ((on_cpu, before), (on_device, before), (on_device, on_cpu))
            differences = (f"{(a - b).norm() / b.norm():.1e}" for a, b in pairs)
            rows.append((name, *differences, *(f"{value:.1f}" for value in seconds.values())))
            print(rows[-1], flush=True)
            continue
        rows.append((name, "", "FAILED", "", "", ""))
    shutil.rmtree(scratch)
    return rows


def quantizing(method: str, calibrated: dict[str, Any]) -> Command:
    """Return the command that quantizes by a method."""
    return lambda source, out, device: freebits.quantize(
        source, out, bits=4, method=method, device=device, **calibrated
    )


def fast(scratch: Path, device: str, blocks: int) -> list[tuple[object, ...]]:
    """Pack a model with large matrices on both devices, after one small product that initializes the device."""
    scratch.mkdir()
    torch.ones(8, 8, device=device, dtype=torch.float64) @ torch.ones(8, 8, device=device, dtype=torch.float64)
    write_sliced(scratch / "sliced", json.loads((CONFIGS / "opt-6.7b.json").read_text()), blocks)
    rows: list[tuple[object, ...]] = []
    for codec in ("canonical", "bits-back"):
        seconds, sizes = {}, {}
        for where in (device, "cpu"):
            out = scratch / where
            start = time.perf_counter()
            freebits.pack(scratch / "sliced", out, codec=codec, entropy="none", device=where)
            seconds[where], sizes[where] = time.perf_counter() - start, n_bytes(out)
            shutil.rmtree(out)
        ratio = f"{seconds['cpu'] / seconds[device]:.1f}"
        times = (f"{seconds[where]:.1f}" for where in ("cpu", device))
        rows.append((f"OPT-6.7B, {blocks} blocks", codec, *times, ratio, sizes["cpu"], sizes[device]))
        print(rows[-1], flush=True)
    shutil.rmtree(scratch)
    return rows


def small(folder: Path) -> Path:
    """Write a random Llama in float16 and a tokenizer that splits at spaces."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    model.half().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def words(count: int) -> str:
    """Return a random text for the tokenizer of `small`."""
    numbers = torch.randint(WORDS, (count,), generator=torch.Generator().manual_seed(0))
    return " ".join(f"w{number}" for number in numbers.tolist())


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """Return the logits of one window in float64."""
    model = load(folder, dtype=torch.float32).eval()
    result: torch.Tensor = model(input_ids=torch.arange(128)[None] % WORDS).logits
    return result.double()


if __name__ == "__main__":
    main()
