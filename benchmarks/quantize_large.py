"""Measure time and memory of `quantize` on large models with exact shapes and random weights.

    python -m benchmarks.quantize_large SCRATCH [--models "llama-3.2-1b; opt-6.7b"] [--blocks N] [--samples N]
        [--trellis STATES]

Each model has normally distributed weights in bfloat16 and a tokenizer of 4,096 words. It is quantized to 4 bits and
calibrated on windows of 256 random words. A child process quantizes and reports its seconds and peak memory without
mapped files. SCRATCH needs free space for three times the model.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import freebits
from benchmarks.results import print_table, save_csv
from benchmarks.scale import CONFIGS, SHARD, cores, n_bytes, run
from freebits.api.estimate import dense_shapes
from freebits.api.quantize import SAMPLES
from freebits.options import TRELLIS
from freebits.storage.checkpoint import write_json
from freebits.storage.writer import CheckpointWriter

HEADER = (
    "model",
    "blocks",
    "windows",
    "trellis",
    "seconds",
    "peak memory, GB",
    "bytes of the model",
    "bytes of the result",
    "cores",
)
N_WORDS = 4096
CLASSES = {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM"}


def main() -> None:
    """Measure each model, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--models", default="llama-3.2-1b; opt-6.7b; llama-2-7b")
    parser.add_argument("--blocks", type=int, help="blocks of each model (default: all)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows of text (default: %(default)s)")
    parser.add_argument("--trellis", type=int, default=TRELLIS, help="states of the trellis (default: %(default)s)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scratch: Path = arguments.scratch
    if arguments.child:
        text = (scratch / "text").read_text(encoding="utf-8")
        run(
            lambda source, out: freebits.quantize(
                source, out, bits=4, trellis=arguments.trellis, calibration=text, samples=arguments.samples
            ),
            scratch / "dense",
            arguments.child,
        )
        return
    rows = []
    for model in (name.strip() for name in arguments.models.split(";")):
        config = json.loads((CONFIGS / f"{model}.json").read_text())
        config |= {"num_hidden_layers": arguments.blocks or config["num_hidden_layers"]}
        write_dense(scratch / "dense", config)
        write_text(scratch / "text")
        command = [
            sys.executable,
            "-m",
            "benchmarks.quantize_large",
            str(scratch),
            "--child",
            str(scratch / "quantized"),
            "--samples",
            str(arguments.samples),
            "--trellis",
            str(arguments.trellis),
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ)).stdout
        seconds, memory = map(float, output.split())
        sizes = n_bytes(scratch / "dense"), n_bytes(scratch / "quantized")
        rows.append(
            (
                model,
                config["num_hidden_layers"],
                arguments.samples,
                arguments.trellis,
                f"{seconds:.0f}",
                f"{memory / 1e9:.2f}",
                *sizes,
                cores(),
            )
        )
        print(rows[-1], flush=True)
        shutil.rmtree(scratch)
    save_csv("quantize_large", HEADER, rows)
    print_table(HEADER, [tuple(map(str, row)) for row in rows])


def write_text(path: Path) -> None:
    """Write random words."""
    numbers = torch.randint(N_WORDS, (10_000,), generator=torch.Generator().manual_seed(1))
    path.write_text(" ".join(f"w{number:04}" for number in numbers.tolist()), encoding="utf-8")


def write_dense(folder: Path, config: dict[str, Any]) -> None:
    """Write a model with random weights, and a tokenizer that splits at spaces."""
    folder.mkdir(parents=True)
    shapes = dense_shapes(config, folder)
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(folder, shapes, SHARD) as writer:
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.zeros(shape)
            writer.write(name, (tensor + ("norm" in name and name.endswith("weight"))).bfloat16())
    classes = {"architectures": [CLASSES[config["model_type"]]], "bos_token_id": 0, "eos_token_id": 1}
    write_json(folder / "config.json", config | classes | {"dtype": "bfloat16"})
    tokenizer = Tokenizer(models.WordLevel({f"w{number:04}": number for number in range(N_WORDS)}, unk_token="w0000"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0000", eos_token="w0001").save_pretrained(folder)


if __name__ == "__main__":
    main()
