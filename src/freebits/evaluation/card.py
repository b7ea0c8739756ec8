"""The model card of a folder: what the hub and a reader need to know of it. The model's own card is kept below."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError  # type: ignore[import-untyped]

from freebits.errors import one_line
from freebits.evaluation.inspection import inspect
from freebits.evaluation.sizes import change
from freebits.storage.auxiliary_files import CARD, CARD_MARK, kept_cards, stays_inside
from freebits.storage.folder import CONFIG, config_name

_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
"""What of a model's own front matter holds for what is made of it, too."""
_NAMED = ("transform", "fidelity", "producer")
_FRONT = re.compile(r"\A\ufeff?---\s*\n.*?\n---[ \t]*\n", re.DOTALL)
_BELOW = "*The card of the model it was made of:*"
_LOADS = """import freebits  # pip install freebits
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("THIS FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")"""
_LOADS_UNPACKED = "transformers has no class for this model. Unpack it, then load it with its maker's code:"


def write_card(
    directory: Path,
    source: Path,
    measured: Mapping[str, Any] | None = None,
    auto_class: str | None = "AutoModelForCausalLM",
) -> None:
    """Write a folder's `README.md`, above the one that was carried over from what it was made of.

    Args:
        directory: the folder, finished but for this.
        source: the folder that it was made of.
        measured: what `verify` found, and `text`, on what.
        auto_class: the Auto class of transformers that loads the folder; None if it has no such class.
    """
    facts, base = inspect(directory), base_model(source)
    told, theirs = _card(source / CARD) if stays_inside(source / CARD, source) else ({}, "")
    if base is None and CARD_MARK in theirs and isinstance(told.get("base_model"), str):
        base = told["base_model"]
    data = {key: told[key] for key in _CARRIED if isinstance(told.get(key), str | list)} | {  # YAML's `no` is no text
        "library_name": "transformers",
        "tags": sorted(
            {*_texts(told.get("tags")), "freebits", *_texts([entry.get("transform") for entry in facts["history"]])}
        ),
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
    }
    use = _use(facts, auto_class, adapter=config_name(source) != CONFIG)
    parts = (_history(facts), _sizes(facts), _fidelity(measured), use)
    text = "\n\n".join([f"# {one_line(base or source.name)}, smaller", *(line for part in parts for line in part)])
    if (directory / CARD).exists():
        (directory / CARD).rename(directory / kept_cards(directory)[-1])
    if below := _existing_text(theirs):
        text += f"\n\n---\n\n{_BELOW}\n\n{below}"
    front = ModelCardData(**data).to_yaml()
    (directory / CARD).write_text(f"---\n{front}\n---\n\n{CARD_MARK}\n\n{text}\n", encoding="utf-8", newline="\n")


def base_model(source: Path) -> str | None:
    """The id on the hub of the model in a folder, where its place in the hub's cache tells it."""
    snapshots = source.absolute().parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return snapshots.parent.name.removeprefix("models--").replace("--", "/")
    return None


def _card(path: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card; nothing where there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
        front: dict[str, Any] = metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):  # it is kept as it is
        return {}, ""
    return front, _FRONT.sub("", text)


def _texts(values: object) -> list[str]:
    """Those of a list that are texts."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _existing_text(text: str) -> str:
    """A card's text, less what we wrote above it."""
    return text.partition(_BELOW)[2].strip() if CARD_MARK in text else text.strip()


def _history(facts: Mapping[str, Any]) -> list[str]:
    """What was done."""
    rows = []
    for transform in facts["history"]:
        options = {key: value for key, value in transform.items() if isinstance(value, (int, float, str))}
        told = ", ".join(
            f"{key} {value}" for key, value in options.items() if key not in ("transform", "fidelity", "producer")
        )
        told = f"**{transform.get('transform')}** ({transform.get('fidelity')}; {transform.get('producer')}): {told}"
        rows.append(f"1. {one_line(told, 400)}")
    return ["## What was done", "\n".join(rows)] if rows else []


def _sizes(facts: Mapping[str, Any]) -> list[str]:
    """Bytes on disk."""
    sizes = {name: size for name, size in facts["bytes"].items() if size is not None and name != "corrections"}
    rows = ["| | bytes | against the dense model |", "|---|---:|---:|"]
    for name, size in sizes.items():
        percent = change(size, sizes.get("dense"))
        rows.append(f"| {name.replace('_', ' ')} | {size:,} | {'' if percent is None else f'{percent:+.1f} %'} |")
    return ["## Size", "\n".join(rows)]


def _fidelity(measured: Mapping[str, Any] | None) -> list[str]:
    """What was measured, and on which text."""
    if measured is None:
        return []
    if "weight_error" in measured:
        told = (
            f"Rounded weights differ by {measured['weight_error']:.2%} (root mean square). No text measures this model."
        )
        return ["## Fidelity", told]
    if measured.get("mean_kl") is None:
        return ["## Fidelity", "Bit-exact: every tensor equals the original's."]
    return [
        "## Fidelity",
        f"Measured on {measured['text']}: perplexity {measured['perplexity']['packed']:.3f}, "
        f"{measured['perplexity']['reference']:.3f} before (x {measured['ratio']:.4f}); mean KL divergence "
        f"{measured['mean_kl']:.4f} nats per token. Other text may suffer more or less.",
    ]


def _use(facts: Mapping[str, Any], auto_class: str | None, *, adapter: bool) -> list[str]:
    """How to load it, and how to get rid of it; an adapter is for PEFT, once it is unpacked."""
    back = "```bash\nfreebits unpack THIS-FOLDER plain\n```"
    plain = ["A plain checkpoint, for any other tool:", back] if facts["kind"] == "packed" else []
    if adapter:
        return ["## Use", "A PEFT adapter again, to load with PEFT on top of its model:", back]
    if auto_class is None:
        return ["## Use", _LOADS_UNPACKED, back]
    return ["## Use", f"```python\n{_LOADS.format(auto_class=auto_class)}\n```", *plain]
