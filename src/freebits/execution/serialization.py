"""Save plain data, tensors and storable dataclasses in safetensors files. Read these files without running code."""

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
_SYSTEM_ERROR = re.compile(r"os error (\d+)")


def storable(cls: Class) -> Class:
    """Decorate a dataclass so that `save` accepts its instances."""
    _CLASSES[_class_name(cls)] = cls
    return cls


def save(path: Path, value: Any) -> None:
    """Write a value to a file. The file appears only after it is complete, even if the machine stops.

    Args:
        path: the file.
        value: None, text, a number, a tensor, a `storable` dataclass, or a tuple, list, dict or frozenset of these.

    Raises:
        TypeError: the value contains an object of another type.
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_to_tree(value, tensors, {}))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        save_file(tensors, temporary, metadata={_TREE: tree, _DIGEST: _digest(tree, tensors)})
        handle = os.open(temporary, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        match = _SYSTEM_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
        if match:  # such as a full disk, which the library reports with its own exception
            number = int(match[1])
            raise OSError(number, os.strerror(number), str(temporary)) from error
        raise


def read(path: Path) -> Any:
    """Return the value that `save` wrote to a file.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: the file does not exist.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if _digest(metadata[_TREE], tensors) != metadata[_DIGEST]:
            raise ValueError(f"{path} is damaged (its digest does not match)")
        return _from_tree(json.loads(metadata[_TREE]), tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_64(tree.encode())
    for _, tensor in sorted(tensors.items()):
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _to_tree(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """Convert a value to JSON. Add its tensors to `tensors`, and `id` and name of each tensor to `names`."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = str(len(names))
            tensor = value.detach().cpu().contiguous()
            pointers = {other.untyped_storage().data_ptr() for other in tensors.values() if other.numel()}
            storage = tensor.untyped_storage()
            is_shared = storage.nbytes() != tensor.nbytes or storage.data_ptr() in pointers
            tensors[names[id(value)]] = tensor.clone() if is_shared else tensor  # safetensors refuses shared storages
        return {"tensor": names[id(value)]}
    if is_dataclass(value) and _class_name(type(value)) in _CLASSES:
        content = {field.name: _to_tree(getattr(value, field.name), tensors, names) for field in fields(value)}
        return {"class": _class_name(type(value)), "fields": content}
    if isinstance(value, dict):
        return {"dict": [[_to_tree(part, tensors, names) for part in item] for item in value.items()]}
    for cls in (tuple, list, frozenset):
        if isinstance(value, cls):
            return {cls.__name__: [_to_tree(part, tensors, names) for part in value]}
    raise TypeError(f"{type(value)} cannot be saved: make it a `storable` dataclass")


def _from_tree(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value that `_to_tree` converted."""
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "class" in tree:
        content = {name: _from_tree(part, tensors) for name, part in tree["fields"].items()}
        return _CLASSES[tree["class"]](**content)
    [(cls, parts)] = tree.items()
    if cls == "dict":
        return {_from_tree(key, tensors): _from_tree(part, tensors) for key, part in parts}
    return {"tuple": tuple, "list": list, "frozenset": frozenset}[cls](_from_tree(part, tensors) for part in parts)
