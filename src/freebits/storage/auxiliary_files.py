"""Auxiliary files: what is copied from folder to folder besides weights, and the code that this package writes."""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from freebits.errors import CheckpointError, one_line
from freebits.storage.folder import ADAPTER, CONFIG, read_json, write_json
from freebits.storage.remote import download, original
from freebits.storage.signature import SIGNATURE

_log = logging.getLogger(__name__)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.dill", "*.npz", "*.npy")
"""Files that could run code when read. They are never copied."""
_CODE = ("*.py", "*.pyc", "*.so")
_WEIGHTS = ("*.safetensors", "*.index.json", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.tflite", "*.ot")
_TOOLS = (".git*", ".cache", ".ds_store", "*.staging", "__pycache__")
"""Files and folders of tools: git, the hub's client, macOS, Python, and this package's own unfinished output."""
CARD, _KEPT = "README.md", "README.before.md"
"""The card of a folder, and the name that the card of its source gets."""
CARD_MARK = "<!-- written by freebits -->"
REMOTE_CODE = "modeling_freebits.py"
"""The only code that this package writes into a folder. It imports freebits."""
_OWN = (CONFIG, ADAPTER, REMOTE_CODE, "freebits.json")
"""Files that are written anew in every folder."""
_LISTED = 20
"""The most files that one message lists."""


def carry_over(source: Path, target: Path, handled: Iterable[str] = (), *, exact: bool = False) -> None:
    """Copy the auxiliary files of a model: everything but its weights, subfolders included.

    Never copied: pickles, hidden files, and links that lead out of the folder (other than into the blobs of a Hugging
    Face cache, where every file of a cached model is a link). Code and other weights are copied only if `exact`.
    Everything that is not copied is listed in one message, which `--quiet` shows, too.

    Args:
        source: the folder of the model.
        target: the folder to copy to.
        handled: names of files in `source` that the caller writes itself, such as the weights.
        exact: copy code and weights in other formats, too.

    Raises:
        CheckpointError: a file of the source cannot be read.
    """
    patterns = (*_PICKLES, SIGNATURE, *(() if exact else (*_CODE, *_WEIGHTS)))
    done, left = {*_OWN, *handled}, []
    for name in _files_in(source):
        file = source / name
        if str(name) in done:
            continue
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or any(_matches(name.name, pattern) for pattern in patterns) or not _is_inside(file, source):
            left.append(one_line(name, 60))
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy(file, target / name)
    if not exact:
        _drop_lost_code(target)
    if left:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        _log.error("freebits: not carried over from %s: %s%s", one_line(source), ", ".join(left[:_LISTED]), more)


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write a config without the entries of `auto_map` whose code is not in the folder, and log which they are."""
    named = config.get("auto_map") or {}
    named = named if isinstance(named, dict) else {"AutoTokenizer": named}  # as old tokenizers have it
    found = {auto: name for auto, name in named.items() if all(_has_code(path.parent, part) for part in _texts(name))}
    if found != named:
        lost = one_line(", ".join(sorted(named.keys() - found.keys())), 120)
        _log.warning("freebits: %s no longer names code for %s: that code is not in the folder", path.name, lost)
        config = {key: value for key, value in config.items() if key != "auto_map"}
        config |= {"auto_map": found} if found else {}
    write_json(path, config)


def _drop_lost_code(folder: Path) -> None:
    """Write every config that was copied and has an `auto_map` again."""
    for path in sorted(folder.glob("*config.json")):
        with suppress(CheckpointError):  # a file that is no JSON object stays as it is
            config = read_json(path)
            if "auto_map" in config:
                write_config(path, config)


def _has_code(folder: Path, name: str) -> bool:
    """Whether the module of a class is in a folder, in another repository (`owner/name--module.Class`) or ours."""
    file = f"{name.partition('.')[0]}.py"
    return "--" in name or file == REMOTE_CODE or (folder / file).is_file()


def _texts(value: object) -> list[str]:
    """The texts in an entry of `auto_map`: one, or for tokenizers a list with a slow and a fast one or null."""
    return [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str)]


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


def copy(file: Path, target: Path) -> None:
    """Copy one file, from its address if the folder is a mirror that holds no copy.

    Raises:
        CheckpointError: it cannot be read.
    """
    if url := original(file):
        download(url, target)
        return
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


def _files_in(source: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, relative to it, and links to folders, which are not followed."""
    for folder, subfolders, files in os.walk(source):
        visible = [name for name in subfolders if not any(_matches(name, tool) for tool in _TOOLS)]
        links = [name for name in visible if (Path(folder) / name).is_symlink()]
        subfolders[:] = sorted(name for name in visible if name not in links)
        for name in sorted([*files, *links]):
            if not any(_matches(name, tool) for tool in _TOOLS):
                yield (Path(folder) / name).relative_to(source)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.lower(), pattern.lower())


def _is_inside(file: Path, folder: Path) -> bool:
    return file.is_file() and stays_inside(file, folder)


def stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is no link that leads out of it, except into the blobs of a Hugging Face cache."""
    top, real = folder.resolve(), file.resolve()
    cached = top.parent.name == "snapshots" and real.parent == top.parent.parent / "blobs"
    return real.is_relative_to(top) or cached
