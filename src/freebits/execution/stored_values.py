"""Values in files: plain data, tensors and a few classes of ours, as safetensors. No code runs when one is read."""

import json
import os
import re
import secrets
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Class = TypeVar("Class", bound=type)
_CLASSES: dict[str, type] = {}
_TREE, _DIGEST = "tree", "xxh3"
_OF_THE_SYSTEM = re.compile(r"os error (\d+)")


def kept(cls: Class) -> Class:
    """Make a dataclass one of those that a file can hold."""
    _CLASSES[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


def save(path: Path, value: Any) -> None:
    """Write a value so that the file is whole once it is there, also if the machine stops in between.

    Args:
        path: the file.
        value: None, texts, numbers, tensors, dataclasses that are `kept`, and tuples, lists, dicts and frozensets of
            all these.

    Raises:
        TypeError: something else is in it.
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_taken(value, tensors, {}))
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        save_file(tensors, draft, metadata={_TREE: tree, _DIGEST: _digest(tree, tensors)})
        handle = os.open(draft, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        number = _OF_THE_SYSTEM.search(str(error)) if isinstance(error, SafetensorError) else None
        if number:  # what the library says of a full disk, as Python says it
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(draft)) from error
        raise


def read(path: Path) -> Any:
    """The value in a file, the inverse of `save`.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if _digest(told[_TREE], tensors) != told[_DIGEST]:
            raise ValueError(f"{path} does not hold what was written")
        return _made(json.loads(told[_TREE]), tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_64(tree.encode())
    for _, tensor in sorted(tensors.items()):
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _taken(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """A value as JSON, its tensors put aside."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = str(len(names))
            whole = value.detach().cpu().contiguous()
            places = {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}
            shares = whole.untyped_storage().nbytes() != whole.nbytes or whole.untyped_storage().data_ptr() in places
            tensors[names[id(value)]] = whole.clone() if shares else whole  # safetensors wants storages of their own
        return {"tensor": names[id(value)]}
    if is_dataclass(value) and f"{type(value).__module__}.{type(value).__qualname__}" in _CLASSES:
        told = {field.name: _taken(getattr(value, field.name), tensors, names) for field in fields(value)}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", "fields": told}
    if isinstance(value, dict):
        return {"dict": [[_taken(part, tensors, names) for part in item] for item in value.items()]}
    for spec in (tuple, list, frozenset):
        if isinstance(value, spec):
            return {spec.__name__: [_taken(part, tensors, names) for part in value]}
    raise TypeError(f"no file can hold {type(value)}")


def _made(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_taken`."""
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "class" in tree:
        return _CLASSES[tree["class"]](**{name: _made(part, tensors) for name, part in tree["fields"].items()})
    [(spec, parts)] = tree.items()
    made = [_made(part, tensors) for part in parts] if spec != "dict" else []
    if spec == "dict":
        return {_made(key, tensors): _made(part, tensors) for key, part in parts}
    return {"tuple": tuple, "list": list, "frozenset": frozenset}[spec](made)
