"""Time, memory and disk of large models: exact shapes, random weights, made and removed block by block.

    python -m benchmarks.scale SCRATCH [--models "opt-1.3b; opt-6.7b; llama-2-7b"] [--blocks N] [--steps PART,…]

The weights of a stream's axis decay as those of a sliced model do, and shortcuts are corners of orthogonal matrices, as
slicing leaves them; no function is computed. Each step runs in a process of its own, which tells its seconds and the
most memory it held of its own (mapped files not counted, but there are none). SCRATCH needs four times the model on
disk. `copy` reads every tensor by the safetensors library and writes it by that: the limit of any unpacking.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import freebits
from benchmarks.results import RESULTS, print_table, save_csv
from freebits.architecture import Architecture, Layout, Role, Weight
from freebits.checkpoint import CheckpointWriter, write_json
from freebits.huggingface.config_estimate import dense_shapes
from freebits.moves import sliced_size
from freebits.symmetry import random_orthogonal

CONFIGS = Path(__file__).parent / "configs"
SPARSITY = 0.2
SHARD = 2 * 10**9
HEADER = ("model", "step", "seconds", "MB of the model a second", "peak memory, GB", "bytes of the result")
Step = Callable[[Path, Path], object]


def packed(codec: str, entropy: str = "none") -> tuple[Step, Step]:
    """Packing and unpacking."""
    return (lambda source, out: freebits.pack(source, out, codec=codec, entropy=entropy)), freebits.unpack


STEPS: dict[str, tuple[str, Step]] = {
    # name: (which folder it takes, what it does)
    "copy": ("sliced", lambda source, out: copy(source, out)),
    "pack canonical": ("sliced", packed("canonical")[0]),
    "unpack canonical": ("pack canonical", freebits.unpack),
    "pack canonical+entropy": ("sliced", packed("canonical", "auto")[0]),
    "unpack canonical+entropy": ("pack canonical+entropy", freebits.unpack),
    "pack bits-back": ("sliced", packed("bits-back")[0]),
    "unpack bits-back": ("pack bits-back", freebits.unpack),
    "pack none+entropy": ("sliced", packed("none", "auto")[0]),
    "unpack none+entropy": ("pack none+entropy", freebits.unpack),
}


def main() -> None:
    """Measure every step of every model, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--models", default="opt-1.3b; opt-6.7b; llama-2-7b")
    parser.add_argument("--blocks", type=int, help="fewer than the model has; not saved")
    parser.add_argument("--steps", default="", help="those with one of these parts in their names, and what they take")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, source, out = arguments.child
        run(STEPS[name][1], Path(source), Path(out))
        return
    rows: list[tuple[object, ...]] = []
    for model in (part.strip() for part in arguments.models.split(";")):
        rows += measured(model, arguments.scratch / model, arguments.steps.split(","), arguments.blocks)
        if not arguments.blocks:
            save_csv("scale", HEADER, merged(rows))
    print_table(HEADER, rows)


def merged(rows: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """With the rows that were measured before."""
    path = RESULTS / "scale.csv"
    before = [tuple(line.split(",")) for line in path.read_text().splitlines()[2:]] if path.exists() else []
    new = {row[:2] for row in rows}
    return [row for row in before if row[:2] not in new] + rows


def measured(model: str, scratch: Path, parts: list[str], blocks: int | None) -> list[tuple[object, ...]]:
    """The rows of one model."""
    scratch.mkdir(parents=True)
    folders = {"sliced": scratch / "sliced"}
    write_sliced(folders["sliced"], json.loads((CONFIGS / f"{model}.json").read_text()), blocks)
    of_model = n_bytes(folders["sliced"])
    rows: list[tuple[object, ...]] = []
    for name, (source, _) in STEPS.items():
        if any(part in name for part in parts):
            folders[name] = scratch / name.replace(" ", "-")
            command = [sys.executable, "-m", "benchmarks.scale", str(scratch)]
            command += ["--child", name, str(folders[source]), str(folders[name])]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds, memory = map(float, told.split())
            size = n_bytes(folders[name])
            rows.append((model, name, f"{seconds:.0f}", f"{of_model / seconds / 1e6:.0f}", f"{memory / 1e9:.2f}", size))
            print(rows[-1], flush=True)
            if not any(of == name for of, _ in STEPS.values()):
                shutil.rmtree(folders[name])
    shutil.rmtree(scratch)
    return rows


def n_bytes(folder: Path) -> int:
    """Of all files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def run(step: Step, source: Path, out: Path) -> None:
    """Do it, and print seconds and most memory of this process, less what it had before."""
    ended, most, before = threading.Event(), [0], own_memory()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    step(source, out)
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    print(seconds, most[0] - before)


def own_memory() -> int:
    """Bytes that are no file's."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def copy(source: Path, out: Path) -> None:
    """Through the safetensors library, shard by shard."""
    out.mkdir()
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            save_file({name: tensors.get_tensor(name) for name in tensors.keys()}, out / file.name)  # noqa: SIM118


def write_sliced(folder: Path, config: dict[str, Any], blocks: int | None) -> None:
    """A sliced model with random weights, in float16."""
    folder.mkdir()
    config |= {"num_hidden_layers": blocks or config["num_hidden_layers"], "tie_word_embeddings": False}
    architecture = Architecture.of(config).with_tie(False)
    layout = Layout.sliced(architecture, sliced_size(architecture.hidden_size, SPARSITY))
    shapes = layout.shapes(architecture, dense_shapes(config, folder))
    generator = torch.Generator().manual_seed(0)
    widths = layout.widths or ()
    before = random_orthogonal(architecture.hidden_size, generator)
    with CheckpointWriter(folder, shapes, SHARD) as writer:
        for part in architecture.parts:
            corners: dict[str, Tensor] = {}
            for sub in part.sublayers:
                after = random_orthogonal(architecture.hidden_size, generator)
                before_width, after_width = widths[sub.site - 1], widths[sub.site]
                corners[sub.shortcut.weight] = (before[:, :before_width].T @ after[:, :after_width]).T
                before = after
            for name, weight in part.weights.items():
                if name in shapes:
                    tensor = corners.get(name)
                    tensor = random_weight(shapes[name], weight, generator) if tensor is None else tensor
                    writer.write(name, tensor.half())
    kept = {"model_type": architecture.family.sliced_model_type, "dtype": "float16", **layout.to_config()}
    write_json(folder / "config.json", config | kept | {"architectures": [architecture.family.sliced_causal_lm]})


def random_weight(shape: tuple[int, ...], weight: Weight, generator: torch.Generator) -> Tensor:
    """Normal numbers that decay along the axis of the stream, which begins with what varies most."""
    tensor = torch.randn(shape, generator=generator) * 0.02
    for axis in weight.axes if weight.role is not Role.SHORTCUT else ():
        decay = (1 + torch.arange(shape[axis.dim])).float() ** -0.25
        tensor *= decay.reshape([-1 if dim == axis.dim else 1 for dim in range(len(shape))])
    return tensor


if __name__ == "__main__":
    main()
