"""Copy the auxiliary files of a model, which are all files except its weights, and write the module `REMOTE_CODE`."""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from freebits.errors import CheckpointError, one_line
from freebits.storage.checkpoint import ADAPTER, CONFIG, read_json, write_json
from freebits.storage.remote import download, original
from freebits.storage.signature import SIGNATURE

_log = logging.getLogger(__name__)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.dill", "*.npz", "*.npy")
"""Files that can run code when they are loaded. They are never copied."""
_CODE = ("*.py", "*.pyc", "*.so")
_WEIGHTS = ("*.safetensors", "*.index.json", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.tflite", "*.ot")
_TOOL_FILES = (".git*", ".cache", ".ds_store", "*.staging", "__pycache__")
"""Files of git, huggingface_hub, macOS and Python, and staging directories. They are skipped without a message."""
CARD, _PREVIOUS_CARD = "README.md", "README.before.md"
"""The name of the model card, and the name to which the copied card of the source is renamed."""
CARD_MARK = "<!-- written by freebits -->"
REMOTE_CODE = "modeling_freebits.py"
"""The only Python file that freebits writes into a folder. It imports model classes from freebits."""
_REWRITTEN = (CONFIG, ADAPTER, REMOTE_CODE, "freebits.json")
"""Files that are never copied, because a command that needs one writes it itself."""
_MAX_LISTED = 20
"""The largest number of files that one message lists."""


def copy_auxiliary_files(source: Path, target: Path, handled: Iterable[str] = (), *, exact: bool = False) -> None:
    """Copy all files of a model except its weights, including the files in subfolders.

    Pickles, hidden files, signatures and links that lead out of the folder are never copied. Links into the blobs of a
    Hugging Face cache are copied, because every file of a cached model is such a link. Code and weights in other
    formats are copied only if `exact` is set. One message at level ERROR lists the files that are not copied, except
    files of tools and files that the caller or a command writes.

    Args:
        source: the folder to copy from.
        target: the folder to copy to.
        handled: names of files in `source` that the caller writes, such as the weights.
        exact: whether to copy code and weights in other formats as well.

    Raises:
        CheckpointError: a file of the source cannot be read.
    """
    patterns = (*_PICKLES, SIGNATURE, *(() if exact else (*_CODE, *_WEIGHTS)))
    excluded, skipped = {*_REWRITTEN, *handled}, []
    for name in _files_in(source):
        file = source / name
        if str(name) in excluded:
            continue
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or any(_matches(name.name, pattern) for pattern in patterns) or not _is_inside(file, source):
            skipped.append(one_line(name, 60))
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy(file, target / name)
    if not exact:
        _remove_missing_code(target)
    if skipped:
        more = f" and {len(skipped) - _MAX_LISTED} more" if len(skipped) > _MAX_LISTED else ""
        _log.error(
            "freebits: these files were not copied from %s: %s%s",
            one_line(source),
            ", ".join(skipped[:_MAX_LISTED]),
            more,
        )


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write a config without the entries of `auto_map` whose code is not in the folder. Log these entries."""
    classes = config.get("auto_map") or {}
    classes = classes if isinstance(classes, dict) else {"AutoTokenizer": classes}  # the format of old tokenizers
    available = {
        auto: value
        for auto, value in classes.items()
        if all(_has_code(path.parent, name) for name in _class_names(value))
    }
    if available != classes:
        removed = one_line(", ".join(sorted(classes.keys() - available.keys())), 120)
        _log.warning(
            "freebits: removed %s from auto_map in %s, because the code is not in the folder", removed, path.name
        )
        config = {key: value for key, value in config.items() if key != "auto_map"}
        config |= {"auto_map": available} if available else {}
    write_json(path, config)


def _remove_missing_code(folder: Path) -> None:
    """In every config of a folder, remove the entries of `auto_map` whose code is not in the folder."""
    for path in sorted(folder.glob("*config.json")):
        with suppress(CheckpointError):  # a file that is not a JSON object stays as it is
            config = read_json(path)
            if "auto_map" in config:
                write_config(path, config)


def _has_code(folder: Path, name: str) -> bool:
    """Return whether a class is in a folder, in another repository (`owner/name--module.Class`) or in `REMOTE_CODE`."""
    file = f"{name.partition('.')[0]}.py"
    return "--" in name or file == REMOTE_CODE or (folder / file).is_file()


def _class_names(value: object) -> list[str]:
    """Return the class names in a value of `auto_map`: one name or, for tokenizers, a list of two names or nulls."""
    return [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]


def previous_cards(directory: Path) -> list[Path]:
    """Return the names of the previous model cards in a folder, followed by the next free name."""
    names = [Path(_PREVIOUS_CARD)]
    while (directory / names[-1]).exists():
        names.append(Path(_PREVIOUS_CARD.replace(".md", f".{len(names) + 1}.md")))
    return names


def restore_card(directory: Path) -> None:
    """Remove a model card that freebits wrote. Restore the latest previous card, if there is one."""
    card, names = directory / CARD, previous_cards(directory)
    if not card.exists() or CARD_MARK not in card.read_text(encoding="utf-8", errors="replace"):
        return
    card.unlink()
    if len(names) > 1:
        (directory / names[-2]).rename(card)


def copy(file: Path, target: Path) -> None:
    """Copy one file. Download the file if it is a sparse file of a mirror.

    Raises:
        CheckpointError: the file cannot be read.
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
    """Return an `auto_map` that refers to the module `REMOTE_CODE`.

    Args:
        classes: name of an Auto class → name of a model class.
    """
    return {auto: f"{Path(REMOTE_CODE).stem}.{name}" for auto, name in classes.items()}


def write_remote_code(directory: Path, module: str, classes: Mapping[str, str]) -> None:
    """Write the module `REMOTE_CODE`. With this module, `trust_remote_code=True` can replace `import freebits`.

    Args:
        directory: the output folder.
        module: the module of freebits that defines the model classes.
        classes: name of an Auto class → name of a model class.
    """
    (directory / REMOTE_CODE).write_text(
        '"""A model of freebits: pip install freebits."""\n\n'
        f"from {module} import {', '.join(sorted(classes.values()))}  # noqa: F401\n",
        encoding="utf-8",
        newline="\n",
    )


def _files_in(source: Path) -> Iterator[Path]:
    """Yield the paths of all files, and of links to folders, relative to `source`. Skip tool files; follow no links."""
    for folder, subfolders, files in os.walk(source):
        visible = [name for name in subfolders if not _is_tool_file(name)]
        links = [name for name in visible if (Path(folder) / name).is_symlink()]
        subfolders[:] = sorted(name for name in visible if name not in links)
        for name in sorted([*files, *links]):
            if not _is_tool_file(name):
                yield (Path(folder) / name).relative_to(source)


def _is_tool_file(name: str) -> bool:
    return any(_matches(name, pattern) for pattern in _TOOL_FILES)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.lower(), pattern.lower())


def _is_inside(file: Path, folder: Path) -> bool:
    return file.is_file() and stays_inside(file, folder)


def stays_inside(file: Path, folder: Path) -> bool:
    """Return whether a path, with links resolved, is in a folder or in the blobs of the folder's Hugging Face cache."""
    root, target = folder.resolve(), file.resolve()
    cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    return target.is_relative_to(root) or cached
