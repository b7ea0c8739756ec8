"""Compare the speed of the canonical form, bits-back and the sliced model, without entropy coding. Five minutes.

python -m benchmarks.speed
"""

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import freebits
from benchmarks.results import print_table, save_csv
from benchmarks.timing import interleaved
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text
from freebits.models import sliced as modeling
from freebits.models.architecture import Architecture
from freebits.models.layout import Layout
from freebits.storage.checkpoint import Checkpoint
from freebits.transforms.orthogonal import random_orthogonal

CODECS = ("canonical", "bits-back")
RUNS = 7
PROMPT, NEW_TOKENS = 512, 48
CONFIG = Path(__file__).parent / "configs" / "opt-1.3b.json"
HEADER = ("model", "measurement", "form", "median", "fastest", "baseline", "ratio of medians")

Row = tuple[object, ...]


def compared(
    model: str, measurement: str, steps: Mapping[str, Callable[[], object]], work: float | None = None
) -> list[Row]:
    """Return rows that compare steps with the last of them: in seconds or, with `work`, in units of work per second."""
    seconds = interleaved(steps, RUNS)
    *_, baseline = seconds
    rows: list[Row] = []
    for form, values in seconds.items():
        ratio = statistics.median(values) / statistics.median(seconds[baseline])
        figures = [statistics.median(values), min(values)]
        if work:
            ratio, figures = 1 / ratio, [work / value for value in figures]
        rows.append((model, measurement, form, *(f"{value:.4g}" for value in figures), baseline, f"{ratio:.3f}"))
        print(rows[-1], flush=True)
    return rows


def fresh(call: Callable[[Path], object], out: Path) -> Callable[[], None]:
    """Return a step that writes a folder and removes it. The time of removing is included for all forms."""

    def step() -> None:
        call(out)
        shutil.rmtree(out)

    return step


@torch.no_grad()
def first_token(folder: Path) -> None:
    """Load a model and run one token, which reads every weight."""
    freebits.load(folder)(torch.tensor([[1]]))


def inference(model: str, folders: dict[str, Path], dtype: torch.dtype) -> list[Row]:
    """Measure tokens per second of prefill and decoding at batch size 1, and count parameters in memory."""
    loaded: dict[str, Any] = {name: freebits.load(path, dtype=dtype).eval() for name, path in folders.items()}
    prompt = torch.randint(1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    rows: list[Row] = []
    for name, module in loaded.items():
        n_parameters = sum(parameter.numel() for parameter in module.parameters())
        rows.append((model, "parameters in memory", name, n_parameters, "", "", ""))
    with torch.no_grad():
        prefill = {name: partial(module, prompt, use_cache=False, logits_to_keep=1) for name, module in loaded.items()}
        rows += compared(model, "prefill, tokens/s", prefill, PROMPT)
        decode = {name: partial(module.generate, prompt[:, :8], **options) for name, module in loaded.items()}
        rows += compared(model, "decode, tokens/s", decode, NEW_TOKENS)
    return rows


def random_opt(folder: Path, n_blocks: int = 4, sparsity: float = 0.2) -> Path:
    """Write a sliced OPT of 1.3B's width with few blocks, random weights and shortcuts as after slicing."""
    config = json.loads(CONFIG.read_text()) | {"num_hidden_layers": n_blocks, "tie_word_embeddings": False}
    architecture = Architecture.of(config)
    k = freebits.estimate(CONFIG, sparsity)["sliced_size"]
    sizes = Layout.sliced(architecture, k).widths or ()
    values = {key: value for key, value in config.items() if key != "model_type"} | {"site_sizes": list(sizes)}
    model = modeling.SlicedOPTForCausalLM(modeling.SlicedOPTConfig(**values))
    generator = torch.Generator().manual_seed(0)
    rotation = random_orthogonal(architecture.hidden_size, generator)
    for sublayer in architecture.sublayers:
        next_rotation = random_orthogonal(architecture.hidden_size, generator)
        corner = (rotation[:, :k].T @ next_rotation)[:, : sizes[sublayer.site]]
        model.get_parameter(sublayer.shortcut.weight).data.copy_(corner.T)
        rotation = next_rotation
    model.half().save_pretrained(folder)
    return folder


def main() -> None:
    """Measure, print and save."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        sliced = scratch / "sliced"
        freebits.slice_model(demo_model(), sliced, sparsity=0.2, calibration=embedded_text()[0], samples=8)
        packed = {codec: scratch / codec for codec in CODECS}
        for codec, folder in packed.items():
            freebits.pack(sliced, folder, codec=codec, entropy="none")
        pack = partial(freebits.pack, sliced, entropy="none")
        packs = {codec: fresh(partial(pack, codec=codec), scratch / "out") for codec in CODECS}
        rows += compared("SmolLM2-135M", "pack, s", packs)
        unpacks = {codec: fresh(partial(freebits.unpack, folder), scratch / "out") for codec, folder in packed.items()}
        rows += compared("SmolLM2-135M", "unpack, s", unpacks)
        folders = {"canonical": packed["canonical"], "sliced": sliced}
        unchecked = {"canonical, verify=False": partial(freebits.load, packed["canonical"], verify=False)}
        loads = {name: partial(freebits.load, path) for name, path in folders.items()}
        rows += compared("SmolLM2-135M", "load, s", unchecked | loads)
        tokens = {name: partial(first_token, path) for name, path in folders.items()}
        rows += compared("SmolLM2-135M", "load and first token, s", tokens)
        assert Checkpoint(sliced).config["tie_word_embeddings"]
        rows += inference("SmolLM2-135M", folders, torch.float32)
        rows += inference("SmolLM2-135M, bfloat16", folders, torch.bfloat16)
        wide = {"sliced": random_opt(scratch / "opt")}
        freebits.pack(wide["sliced"], scratch / "opt canonical", entropy="none")
        rows += inference("OPT-1.3B's width, 4 blocks", {"canonical": scratch / "opt canonical"} | wide, torch.float32)
    print_table(HEADER, rows)
    save_csv("speed", HEADER, rows)


if __name__ == "__main__":
    main()
