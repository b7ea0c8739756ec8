"""Try every family with tiny random models: error after rotation, bytes and errors of each form. Half a minute.

    python -m benchmarks.families

Writes `results/families.csv`, and generates `docs/families.md` from the table of families.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

import freebits
from benchmarks.families_page import families_page
from benchmarks.results import print_table, save_csv
from freebits.models.architecture import Architecture
from freebits.transforms.orthogonal import random_orthogonal, rotate
from tests.test_families import differs, logits_of
from tests.test_symmetry import folded_state, unsliced
from tests.tiny import FAMILIES, in_float64, random_text, tiny_config, tiny_model, tiny_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
HEADER = (
    *("family", "error in float64", "dense, bytes", "sliced 25 %, bytes", "canonical, bytes", "bits-back, bytes"),
    *("canonical, error / std of logits", "bits-back, error", "quantized at expected KL 1e-6, error", "generated"),
)
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def main() -> None:
    """Measure, print and save."""
    PAGE.write_text(families_page(), encoding="utf-8", newline="\n")
    rows = []
    for name, changes in FAMILIES.items():
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(
                (name, f"{symmetry_error(SIZES | changes):.0e}", *sizes_and_errors(Path(scratch), SIZES | changes))
            )
        print(rows[-1], flush=True)
    save_csv("families", HEADER, rows)
    print_table(HEADER, rows)


@torch.no_grad()
def symmetry_error(changes: dict[str, Any]) -> float:
    """Return the largest change of a logit after folding norms and random rotations, in float64."""
    config, original = tiny_config(**changes), tiny_model(**changes)
    architecture = Architecture.of(config.to_dict())
    generator = torch.Generator().manual_seed(1)
    rotations = {site: random_orthogonal(config.hidden_size, generator) for site in architecture.free_sites}
    folded = folded_state(original, architecture)
    state = {name: rotate(tensor, architecture.weights[name].axes, rotations) for name, tensor in folded.items()}
    tokens = torch.randint(config.vocab_size, (2, 40), generator=generator)
    expected = in_float64(original)(tokens).logits
    return float((unsliced(config, architecture, state)(tokens).logits - expected).abs().max())


def sizes_and_errors(scratch: Path, changes: dict[str, Any]) -> tuple[str, ...]:
    """Return the bytes of each form, then the differences of the logits that packing and quantizing cause."""
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
