"""Every family all the way, on tiny random models: what the symmetry's error is, what each form takes. Half a minute.

    python -m benchmarks.families

Writes `results/families.csv`, and `docs/families.md` from the architecture table.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

import freebits
from benchmarks.families_page import families_page
from benchmarks.results import print_table, save_csv
from freebits.models.table import Architecture
from freebits.transforms.orthogonal import random_orthogonal, rotate
from tests.test_families import differs, logits_of
from tests.test_symmetry import folded_state, unsliced
from tests.tiny import FAMILIES, in_float64, random_text, tiny_config, tiny_model, tiny_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
HEADER = (
    *("family", "identity in float64", "dense, bytes", "sliced 25 %", "canonical", "bits-back"),
    *("canonical, of the logits' deviation", "bits-back", "quantized, expected KL 1e-6", "generated"),
)
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def main() -> None:
    """Measure, print and save."""
    PAGE.write_text(families_page(), encoding="utf-8", newline="\n")
    rows = []
    for name, changes in FAMILIES.items():
        with tempfile.TemporaryDirectory() as scratch:
            rows.append((name, f"{identity(SIZES | changes):.0e}", *all_the_way(Path(scratch), SIZES | changes)))
        print(rows[-1], flush=True)
    save_csv("families", HEADER, rows)
    print_table(HEADER, rows)


@torch.no_grad()
def identity(changes: dict[str, Any]) -> float:
    """The largest difference of logits, folded and randomly rotated, in float64."""
    config, original = tiny_config(**changes), tiny_model(**changes)
    architecture = Architecture.of(config.to_dict())
    generator = torch.Generator().manual_seed(1)
    rotations = {site: random_orthogonal(config.hidden_size, generator) for site in architecture.free_sites}
    folded = folded_state(original, architecture)
    state = {n: rotate(tensor, architecture.weights[n].axes, rotations) for n, tensor in folded.items()}
    tokens = torch.randint(config.vocab_size, (2, 40), generator=generator)
    expected = in_float64(original)(tokens).logits
    return float((unsliced(config, architecture, state)(tokens).logits - expected).abs().max())


def all_the_way(scratch: Path, changes: dict[str, Any]) -> tuple[str, ...]:
    """Bytes of each form, and how much the logits differ."""
    dense, sliced, text = scratch / "dense", scratch / "sliced", random_text(2000)
    tiny_model(dtype=torch.float16, **changes).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    options: dict[str, Any] = {"calibration": text, "samples": 16, "seq_len": 32}
    sizes = [freebits.inspect(dense)["bytes"]["dense"]]
    sizes.append(freebits.slice_model(dense, sliced, sparsity=0.25, force=True, **options)["bytes"]["sliced"])
    differences = []
    for codec in ("canonical", "bits-back"):
        sizes.append(freebits.pack(sliced, scratch / codec, codec=codec)["bytes"]["packed"])
        differences.append(differs(logits_of(scratch / codec), logits_of(sliced)))
    freebits.quantize(dense, scratch / "quantized", target_kl=1e-6, **options)
    differences.append(differs(logits_of(scratch / "quantized"), logits_of(dense)))
    return (*(f"{size:,}" for size in sizes), *(f"{difference:.1e}" for difference in differences), "yes")


if __name__ == "__main__":
    main()
