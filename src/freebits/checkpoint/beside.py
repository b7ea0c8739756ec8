"""What lies beside the weights: what is carried over from folder to folder, and the code that we write."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from freebits.checkpoint.folder import ADAPTER, CONFIG
from freebits.checkpoint.signature import SIGNATURE
from freebits.errors import CheckpointError, one_line

_log = logging.getLogger(__name__)
_KNOWN = (
    *("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template*", "*.jinja", "generation_config.json", "*processor_config.json", "*.md"),
    *("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*"),
)
"""Tokenizer, chat templates, generation settings, model card, licence."""
_NEVER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.dill", "*.npz", "*.npy", "*.py")
"""Whatever it is called, it could run when read."""
_FOLDERS = ("additional_chat_templates",)
"""The folders in which transformers keeps a tokenizer's files."""
_OURS = (CONFIG, ADAPTER, SIGNATURE, "freebits.json")
"""What every folder has of its own."""
_WEIGHTS = ("*.safetensors", "*.index.json", "*.gguf", "*.h5", "*.msgpack", "*.onnx*")
CARD, _KEPT = "README.md", "README.before.md"
"""The card of a folder, and what becomes of the one that it had before."""
CARD_MARK = "<!-- written by freebits -->"
REMOTE_CODE = "modeling_freebits.py"
"""The only code in a folder of ours; it imports freebits."""


def carry_over(source: Path, target: Path) -> None:
    """Copy what is known to belong to a model beside its weights, and say what is not.

    Weights, code and pickles in any form stay behind, and so does what is hidden, in another folder, or a link that
    leads out of the folder (but not one into the blobs of a Hugging Face cache, as every file of a cached model is).

    Raises:
        CheckpointError: a file of the source cannot be read.
    """
    left = []
    for file in _beside(source):
        name = file.relative_to(source)
        if _is_known(file) and stays_inside(file):
            (target / name).parent.mkdir(exist_ok=True)
            copy(file, target / name)
        elif not any(
            _matches(file, pattern) for pattern in (*_NEVER, *_WEIGHTS, CONFIG, ADAPTER, SIGNATURE, "freebits.json")
        ):
            left.append(one_line(name, 60))
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        _log.warning("freebits: not carried over from %s: %s%s", one_line(source), ", ".join(left[:5]), more)


def kept_cards(directory: Path) -> list[Path]:
    """Where cards are kept that lie below another: those that are there, and the next."""
    kept = [Path(_KEPT)]
    while (directory / kept[-1]).exists():
        kept.append(Path(_KEPT.replace(".md", f".{len(kept) + 1}.md")))
    return kept


def restore_card(directory: Path) -> None:
    """Put the card back that was there before the last of ours."""
    card, kept = directory / CARD, kept_cards(directory)
    if not card.exists() or CARD_MARK not in card.read_text(encoding="utf-8", errors="replace"):
        return
    card.unlink()
    if len(kept) > 1:
        (directory / kept[-2]).rename(card)


def carry_code(source: Path, target: Path) -> None:
    """Copy the model maker's own code, which nothing of ours runs; ours is not theirs to write."""
    for file in sorted(source.glob("*.py")):
        if file.name != REMOTE_CODE and file.is_file() and stays_inside(file):
            copy(file, target / file.name)


def copy(file: Path, target: Path) -> None:
    """Copy one file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): make it readable or remove it") from None
    shutil.copyfile(file, target)


def auto_map(classes: Mapping[str, str]) -> dict[str, str]:
    """What `config.json` says of the classes, `AutoConfig` and so on, for `trust_remote_code=True`."""
    return {auto: f"{Path(REMOTE_CODE).stem}.{name}" for auto, name in classes.items()}


def write_remote_code(directory: Path, module: str, classes: Mapping[str, str]) -> None:
    """Write the module that `auto_map` names: with it no `import freebits` is needed, only the package."""
    (directory / REMOTE_CODE).write_text(
        '"""A model of freebits: pip install freebits."""\n\n'
        f"from {module} import {', '.join(sorted(classes.values()))}  # noqa: F401\n",
        encoding="utf-8",
        newline="\n",
    )


def _beside(source: Path) -> Iterator[Path]:
    files = [*source.iterdir(), *(file for folder in _FOLDERS for file in (source / folder).glob("*"))]
    return (file for file in sorted(files) if file.is_file() and not file.name.startswith("."))


def _is_known(file: Path) -> bool:
    return any(_matches(file, pattern) for pattern in _KNOWN) and not any(
        _matches(file, name) for name in (*_NEVER, *_WEIGHTS)
    )


def _matches(file: Path, pattern: str) -> bool:
    return Path(file.name.lower()).match(pattern.lower())


def stays_inside(file: Path) -> bool:
    """Whether a file of a folder is no link that leads out of it, except into the blobs of a Hugging Face cache."""
    top = file.parent.parent if file.parent.name in _FOLDERS else file.parent
    folder, real = top.resolve(), file.resolve()
    cached = folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"
    return real.is_relative_to(folder) or cached
