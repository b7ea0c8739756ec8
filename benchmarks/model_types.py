"""Every type of transformers' causal language mapping: is it quantized, how much of it, and does it still answer?

    python -m benchmarks.model_types [TYPE ...] [--quick]

A tiny random model of each type (`tests/model_types.py`) is saved as `save_pretrained` does, in both layouts where a
mixture has two: experts one by one, and stacked. For each: whether the engine's logits are those of the library's plain
run (largest difference relative to the largest logit, float32), whether `quantize` takes it at 6 bits, the share of the
weights that are quantized, its mean KL divergence beside that of 10 % random noise on all matrices, whether it takes
text that the model writes itself, and whether what is loaded generates.
"""

import argparse
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

import freebits
from benchmarks.results import many_small_models, print_table, save_csv, saved_rows, write_page
from freebits.calibration.engine import Engine
from freebits.errors import FreebitsError
from freebits.integrations.naming import InMemory
from freebits.storage.folder import Checkpoint
from tests.model_types import causal_types, plain_logits, random_text, save_tiny_type

HEADER = (
    "type",
    "layout",
    "engine against plain",
    "quantized",
    "share",
    "KL",
    "KL of 10 % noise",
    "own text",
    "generates",
)
BITS, NOISE = 6, 0.1
MOST = 12_000_000
"""Weights of a model that is tried."""
PAGE = Path(__file__).parent.parent / "docs" / "model_types.md"
TEXT = random_text(6000)
TOKENS = torch.randint(5, 250, (4, 64), generator=torch.Generator().manual_seed(0))
CALIBRATION: dict[str, Any] = {"samples": 16, "seq_len": 64, "bits": BITS}


def main() -> None:
    """Try each type, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    arguments = parser.parse_args()
    many_small_models()
    rows = [row for row in saved_rows("model_types") if arguments.types and row[0] not in arguments.types]
    for model_type in arguments.types or causal_types():
        for row in tried(model_type):
            rows.append(row)
            print("; ".join(row), flush=True)
        rows.sort(key=lambda row: row[0])
        save_csv("model_types", HEADER, rows)
        page(rows)
    print_table(HEADER, rows)
    quantized, built = counted(rows)
    print(f"{quantized} of {built} types that can be built are quantized with a share above 0.9")


def page(rows: list[tuple[str, ...]]) -> None:
    """The table as a page of the documentation."""
    quantized, built = counted(rows)
    about = (
        f"Made by `python -m benchmarks.model_types` with transformers {transformers.__version__}: a tiny random model "
        "of every type in the causal language mapping, saved in both layouts where a mixture has two, quantized at "
        f"{BITS} bits. {quantized} of the {built} types that can be built are quantized with a share above 0.9. "
        "*Engine against plain* is the largest difference of a logit, relative to the largest logit, in float32. "
        "KL in nats per token. What transformers does not run backwards (reformer, xlm) is rounded by its weights "
        "alone."
    )
    write_page(PAGE, "Model types that were tried", about, HEADER, rows)


def counted(rows: list[tuple[str, ...]]) -> tuple[int, int]:
    """How many types are quantized with a share above 0.9, in every layout; and how many can be built."""
    built = {row[0] for row in rows if row[2] != "cannot be built"}
    bad = {row[0] for row in rows if row[3] != "yes" or not float(row[4] or 0) > 0.9}
    return len(built - bad), len(built)


def tried(model_type: str) -> list[tuple[str, ...]]:
    """A row for each layout of a type."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            dense = save_tiny_type(model_type, Path(scratch) / "dense", original_format=True)
            stacked = save_tiny_type(model_type, Path(scratch) / "stacked", original_format=False)
            if sum(spec.numel for spec in Checkpoint(dense).specs.values()) > MOST:
                return [(model_type, "", "cannot be built", "no tiny config of it is known", "", "", "", "", "")]
            expected = plain_logits(dense, TOKENS)
        except Exception as error:
            return [(model_type, "", "cannot be built", one(error), "", "", "", "", "")]
        rows.append((model_type, "original", *measured(dense, expected)))
        if names(dense) != names(stacked):
            rows.append((model_type, "library's", *measured(stacked, plain_logits(stacked, TOKENS))))
    return rows


def names(folder: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors."""
    return {(name, of.shape) for name, of in Checkpoint(folder).specs.items()}


def measured(dense: Path, expected: Tensor) -> tuple[str, ...]:
    """The cells of a row."""
    config = AutoConfig.from_pretrained(dense)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ("saved as a type without a causal class", "", "", "", "", "", "")
    out = dense.with_name(f"{dense.name}-q")
    engine = attempt(lambda: difference(dense, config, expected))
    try:
        share = freebits.quantize(dense, out, calibration=TEXT, **CALIBRATION)["coverage"]["share"]
    except Exception as error:
        return (engine, one(error), "", "", "", "", "")
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        cost = kl(expected, model(input_ids=TOKENS, use_cache=False).logits)
    noisy = kl(expected, plain_logits(with_noise(dense), TOKENS))
    own = attempt(
        lambda: freebits.quantize(dense, dense.with_name(f"{dense.name}-own"), samples=2, seq_len=16) and "yes"
    )
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generates = attempt(lambda: "yes" if model.generate(TOKENS[:1, :8], **options).shape[1] > 8 else "no")
    return (engine, "yes", f"{share:.4f}", f"{cost:.2g}", f"{noisy:.2g}", own, generates)


def difference(dense: Path, config: Any, expected: Tensor) -> str:
    """The engine's logits against those of a plain run, streamed block by block."""
    engine = Engine(InMemory(Checkpoint(dense), config), config, torch.device("cpu"), held_whole=0)
    found = torch.stack(list(engine.logits(TOKENS)))
    return f"{((found - expected[:, :-1]).abs().max() / expected.abs().max()).item():.1e}"


def with_noise(dense: Path) -> Path:
    """The model with random noise of a tenth of each matrix."""
    noisy = dense.with_name(f"{dense.name}-noisy")
    noisy.mkdir()
    for file in dense.iterdir():
        (noisy / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(2)
    for file in noisy.glob("*.safetensors"):
        tensors = {
            name: (of.float() + NOISE * of.float().std() * torch.randn(of.shape, generator=generator)).to(of.dtype)
            if of.ndim > 1 and of.is_floating_point()
            else of
            for name, of in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    return noisy


def kl(expected: Tensor, found: Tensor) -> float:
    """Mean KL divergence in nats per token."""
    p, q = expected.flatten(0, 1).log_softmax(-1), found.flatten(0, 1).log_softmax(-1)
    return kl_div(q, p, log_target=True, reduction="batchmean").item()


def attempt(function: Any) -> str:
    """What a function says, or why it fails."""
    try:
        return str(function())
    except Exception as error:
        return one(error)


def one(error: Exception) -> str:
    """An error in one line; one that is not freebits' own with its place."""
    told = " ".join(str(error).split())[:160]
    if isinstance(error, FreebitsError):
        return f"refused: {told}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {told}"


if __name__ == "__main__":
    main()
