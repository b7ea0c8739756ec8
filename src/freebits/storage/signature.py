"""Sign folders, and check signatures, with OpenSSF model-signing. A signature reveals damage and forgery."""

import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from freebits.errors import CheckpointError, UsageError, one_line, reason_of
from freebits.storage.resumption import UNFINISHED

SIGNATURE = "model.sig"
"""The name of the file with the signature of all other files of a folder: a sigstore bundle with SHA-256 digests."""


def sign(folder: Path, key: str | os.PathLike[str]) -> None:
    """Sign every file of a folder.

    Args:
        folder: a finished staging directory.
        key: PEM file of an elliptic-curve private key (secp256r1, secp384r1 or secp521r1).

    Raises:
        UsageError: the key cannot sign, or model-signing is not installed.
    """
    hashing = _library("hashing")
    check_key(key)
    # the finished folder will not contain the stored pieces of work, so they must not be signed
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    hashing_config = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE])
    try:
        _signer(key).set_hashing_config(hashing_config).sign(folder, folder / SIGNATURE)
    except Exception as error:  # model-signing and cryptography raise many types
        raise _signing_error(key, error) from None


def check_key(key: str | os.PathLike[str] | None) -> None:
    """Check that a private key can sign, before the command starts its work. Do nothing if `key` is None.

    Raises:
        UsageError: the key cannot sign, or model-signing is not installed.
    """
    if key is not None:
        _library("signing")
        try:
            _signer(key)
        except Exception as error:
            raise _signing_error(key, error) from None


def _signer(key: str | os.PathLike[str]) -> Any:
    return _library("signing").Config().use_elliptic_key_signer(private_key=Path(key))


def _signing_error(key: str | os.PathLike[str], error: Exception) -> UsageError:
    return UsageError(f"{key} cannot sign ({one_line(error, 160)}): give a PEM file with a secp256r1 private key")


def check_signature(folder: Path, key: str | os.PathLike[str]) -> None:
    """Check that the owner of a key signed a folder, and that no file was changed, added or removed since then.

    Args:
        folder: a folder with a signature.
        key: PEM file of the public key.

    Raises:
        CheckpointError: the folder is not signed, is signed with another key, or was changed.
        UsageError: the key cannot be read, or model-signing is not installed.
    """
    hashing, verifying = _library("hashing"), _library("verifying")
    if not (folder / SIGNATURE).is_file():
        raise CheckpointError(
            f"{folder} is not signed (there is no {SIGNATURE}): ask the publisher for a signed folder"
        )
    hashing_config = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE])
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(key)).set_hashing_config(hashing_config)
    except Exception as error:
        raise UsageError(
            f"{key} is not a public key ({one_line(error, 160)}): give a PEM file with a public key"
        ) from None
    try:
        config.verify(folder, folder / SIGNATURE)
    except Exception as error:
        raise CheckpointError(
            f"{folder} is not what the owner of {key} signed ({reason_of(error)}): do not use this folder"
        ) from None


def _library(module: str) -> Any:
    try:
        return import_module(f"model_signing.{module}")
    except ImportError:
        raise UsageError("signatures need the package model-signing: run pip install 'freebits[sign]'") from None
