"""Every type of transformers' image-text mapping that the causal one lacks: packed without loss, and quantized.

    python -m benchmarks.image_text_types [TYPE ...]

A tiny random model of each type (`tests/model_types.py`) is saved as `save_pretrained` does. For each: the class that
loads the lossless folder, whose tensors must equal those of the class that loads the original; whether `quantize` takes
it at 6 bits, the share of the weights that are quantized, and the part of that by the weights alone; whether what is
loaded generates from a text; and the relative difference of the features of a random image, where the class gives them
for pixels alone.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText

import freebits
from benchmarks.model_types import BITS, CALIBRATION, TEXT, attempt, one
from benchmarks.results import many_small_models, print_table, save_csv, saved_rows, write_page
from tests.model_types import image_text_types, save_tiny_type

HEADER = (
    "type",
    "lossless loads as",
    "quantized",
    "share",
    "by weights alone",
    "generates from text",
    "image features, relative difference",
)
PAGE = Path(__file__).parent.parent / "docs" / "image_text_types.md"


def main() -> None:
    """Try each type, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    arguments = parser.parse_args()
    many_small_models()
    before = saved_rows("image_text_types")
    rows = [row for row in before if arguments.types and row[0] not in arguments.types]
    for model_type in arguments.types or image_text_types():
        rows.append((model_type, *tried(model_type)))
        print("; ".join(rows[-1]), flush=True)
        rows.sort()
        save_csv("image_text_types", HEADER, rows)
        page(rows)
    print_table(HEADER, rows)


def page(rows: list[tuple[str, ...]]) -> None:
    """The table as a page of the documentation."""
    built = [row for row in rows if row[1] != "cannot be built"]
    quantized = [row for row in built if row[2] == "yes" and float(row[3]) > 0.9]
    about = (
        f"Made by `python -m benchmarks.image_text_types` with transformers {transformers.__version__}: a tiny random "
        "model of every type in the image-text mapping that is not in the causal one. "
        f"{len(quantized)} of the {len(built)} types that can be built are quantized at {BITS} bits with a share above "
        "0.9. *By weights alone* is the share of the weights that no text reaches, which are rounded without "
        "calibration. Of types that transformers does not run on a text alone that is all. The vision towers of these "
        "tiny models are larger than their language models."
    )
    write_page(PAGE, "Models that see, by type", about, HEADER, rows)


def tried(model_type: str) -> tuple[str, ...]:
    """The cells of a row."""
    with tempfile.TemporaryDirectory() as scratch:
        dense, packed, rounded = (Path(scratch) / name for name in ("dense", "packed", "rounded"))
        try:
            save_tiny_type(model_type, dense)
            reference: Any = AutoModelForImageTextToText.from_pretrained(dense).eval()
        except Exception as error:
            return ("cannot be built", one(error), "", "", "", "")
        lossless = attempt(lambda: same(reference, dense, packed))
        try:
            coverage = freebits.quantize(dense, rounded, calibration=TEXT, **CALIBRATION)["coverage"]
        except Exception as error:
            return (lossless, one(error), "", "", "", "")
        told = (lossless, "yes", f"{coverage['share']:.4f}", f"{coverage['uncalibrated']:.4f}")
        model: Any = AutoModelForImageTextToText.from_pretrained(rounded).eval()
        return (*told, written(reference, model), attempt(lambda: difference(reference, model)))


def same(reference: Any, dense: Path, packed: Path) -> str:
    """The class that loads what was packed without loss; its tensors must be those of the original."""
    freebits.pack(dense, packed, codec="none")
    model: Any = AutoModelForImageTextToText.from_pretrained(packed)
    theirs = reference.state_dict()
    equal = all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert equal
    assert model.state_dict().keys() == theirs.keys()
    return type(model).__name__


def written(reference: Any, model: Any) -> str:
    """Whether a model writes four tokens, if the original does."""
    tokens = torch.arange(5, 13)[None]
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    try:
        reference.generate(tokens, **options)
    except Exception:
        return "the original does not from a text alone"
    return attempt(lambda: "yes" if model.generate(tokens, **options).shape[1] >= 4 else "no")


@torch.no_grad()
def difference(reference: Any, model: Any) -> str:
    """How far the features of a random image are from the reference's."""
    told = "no image features for pixels alone"
    for pixels in images(reference.config):
        try:
            expected, found = (features(of, pixels) for of in (reference, model))
        except Exception as error:
            told = f"not for pixels alone ({type(error).__name__})"
            continue
        return f"{((found - expected).norm() / expected.norm()).item():.2g}"
    return told


def images(config: Any) -> Iterator[dict[str, Tensor]]:
    """Random pixels in the forms that classes take: an image, images with their sizes, patches with a grid."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    patch, time = getattr(vision, "patch_size", 16), getattr(vision, "temporal_patch_size", 1) or 1
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, height, width, generator=generator).bfloat16()
    yield {"pixel_values": image}
    yield {"pixel_values": image[None], "image_sizes": torch.tensor([[height, width]])}
    grid = torch.tensor([[1, 4, 4]])
    if isinstance(patch, int):
        patches = torch.randn(16, 3 * time * patch * patch, generator=generator).bfloat16()
        yield {"pixel_values": patches, "image_grid_thw": grid}
        yield {"pixel_values": patches.reshape(16, 3, -1, patch)[:, :, :patch], "image_grid_thw": grid}


def features(model: Any, pixels: dict[str, Tensor]) -> Tensor:
    """The features of an image in one tensor, float32."""
    output = model.get_image_features(**pixels)
    output = getattr(output, "pooler_output", output)
    parts = output if isinstance(output, list | tuple) else [output]
    return torch.cat([part.float().flatten() for part in parts])


if __name__ == "__main__":
    main()
