"""Write the model card (`README.md`) of a folder, followed by the card of the source model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError  # type: ignore[import-untyped]

from freebits.errors import one_line
from freebits.evaluation.folder_sizes import change
from freebits.evaluation.inspection import inspect
from freebits.storage.auxiliary_files import CARD, CARD_MARK, previous_cards, stays_inside
from freebits.storage.checkpoint import CONFIG, config_name

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
"""Fields of the source card's front matter that also hold for the new folder."""
_NAMED = ("transform", "fidelity", "producer")
"""Fields of a history entry that the card prints before the options of the step."""
_FRONT = re.compile(r"\A\ufeff?---\s*\n.*?\n---[ \t]*\n", re.DOTALL)
_BELOW = "*The card of the model it was made of:*"
"""Separates freebits' text from the source card. Do not change this text, because existing cards contain it."""
_LOADS = """import freebits  # pip install freebits
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("THIS FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")"""
_LOADS_UNPACKED = (
    "transformers has no class for this model. Unpack the folder, then load the result with the code of its author:"
)


def write_card(
    directory: Path,
    source: Path,
    measured: Mapping[str, Any] | None = None,
    auto_class: str | None = "AutoModelForCausalLM",
) -> None:
    """Write a folder's `README.md`, and append the card of its source.

    Args:
        directory: new folder, complete except for the card.
        source: folder that the new folder was made from.
        measured: `fidelity` as `compress` returns it, with a description of the text as `text`; None if nothing was
            measured.
        auto_class: name of the Auto class of transformers that loads the folder; None if there is no such class.
    """
    facts, base = inspect(directory), base_model(source)
    source_front, source_text = _card(source / CARD) if stays_inside(source / CARD, source) else ({}, "")
    if base is None and CARD_MARK in source_text and isinstance(source_front.get("base_model"), str):
        base = source_front["base_model"]
    data = {  # YAML reads a bare `no` as a boolean, so check the types
        key: source_front[key] for key in _INHERITED if isinstance(source_front.get(key), str | list)
    } | {
        "library_name": "transformers",
        "tags": sorted(
            {
                *_strings(source_front.get("tags")),
                "freebits",
                *_strings([entry.get("transform") for entry in facts["history"]]),
            }
        ),
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
    }
    use = _use(facts, auto_class, adapter=config_name(source) != CONFIG)
    sections = (_history(facts), _sizes(facts), _fidelity(measured), use)
    text = "\n\n".join(
        [f"# {one_line(base or source.name)}, smaller", *(line for section in sections for line in section)]
    )
    if (directory / CARD).exists():
        (directory / CARD).rename(directory / previous_cards(directory)[-1])
    if existing := _existing_text(source_text):
        text += f"\n\n---\n\n{_BELOW}\n\n{existing}"
    front = ModelCardData(**data).to_yaml()
    (directory / CARD).write_text(f"---\n{front}\n---\n\n{CARD_MARK}\n\n{text}\n", encoding="utf-8", newline="\n")


def base_model(source: Path) -> str | None:
    """Return the hub id of a model if its folder lies in the hub's cache, else None."""
    snapshots = source.absolute().parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return snapshots.parent.name.removeprefix("models--").replace("--", "/")
    return None


def _card(path: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of a card, both empty if the card is missing or unreadable."""
    try:
        text = path.read_text(encoding="utf-8")
        front: dict[str, Any] = metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):  # the folder still keeps the unreadable card
        return {}, ""
    return front, _FRONT.sub("", text)


def _strings(values: object) -> list[str]:
    """Return the strings in a list; an empty list if `values` is not a list."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _existing_text(text: str) -> str:
    """Return a card's text without the part that freebits wrote."""
    return text.partition(_BELOW)[2].strip() if CARD_MARK in text else text.strip()


def _history(facts: Mapping[str, Any]) -> list[str]:
    """List the steps that made the folder."""
    rows = []
    for transform in facts["history"]:
        options = ", ".join(
            f"{key} {value}"
            for key, value in transform.items()
            if key not in _NAMED and isinstance(value, (int, float, str))
        )
        summary = f"**{transform.get('transform')}** ({transform.get('fidelity')}; {transform.get('producer')})"
        rows.append(f"1. {one_line(f'{summary}: {options}', 400)}")
    return ["## How it was made", "\n".join(rows)] if rows else []


def _sizes(facts: Mapping[str, Any]) -> list[str]:
    """Tabulate the bytes on disk."""
    sizes = {name: size for name, size in facts["bytes"].items() if size is not None and name != "corrections"}
    rows = ["| | bytes | vs dense |", "|---|---:|---:|"]
    for name, size in sizes.items():
        percent = change(size, sizes.get("dense"))
        rows.append(f"| {name.replace('_', ' ')} | {size:,} | {'' if percent is None else f'{percent:+.1f} %'} |")
    return ["## Size", "\n".join(rows)]


def _fidelity(measured: Mapping[str, Any] | None) -> list[str]:
    """State the measured fidelity, and the text on which it was measured."""
    if measured is None:
        return []
    if "weight_error" in measured:
        error = f"{measured['weight_error']:.2%}"
        return [
            "## Fidelity",
            f"The rounded weights differ from the original weights by {error} (root mean square). The quality was not "
            "measured, because transformers cannot run this model on text.",
        ]
    if measured.get("mean_kl") is None:
        return ["## Fidelity", "Bit-exact: every tensor equals the original tensor."]
    return [
        "## Fidelity",
        f"Measured on {measured['text']}: the perplexity is {measured['perplexity']['packed']:.3f}, and "
        f"{measured['perplexity']['reference']:.3f} before (x {measured['ratio']:.4f}). The mean KL divergence is "
        f"{measured['mean_kl']:.4f} nats per token. The loss on other text can be larger or smaller.",
    ]


def _use(facts: Mapping[str, Any], auto_class: str | None, *, adapter: bool) -> list[str]:
    """Explain how to load and unpack the folder. An adapter must be unpacked first, and then loaded with PEFT."""
    unpack = "```bash\nfreebits unpack THIS-FOLDER plain\n```"
    base = facts["base"]["chain"][0] if "base" in facts else None
    needs = [f"The folder needs its base, `{one_line(base)}`, and stores only the differences from it."] if base else []
    plain = ["To get a plain checkpoint for other tools:", unpack] if facts["kind"] == "packed" else []
    if adapter:
        text = "Unpack the folder to get a PEFT adapter, and load the adapter on top of its model:"
        return ["## Use", *needs, text, unpack]
    if auto_class is None:
        return ["## Use", *needs, _LOADS_UNPACKED, unpack]
    return ["## Use", *needs, f"```python\n{_LOADS.format(auto_class=auto_class)}\n```", *plain]
