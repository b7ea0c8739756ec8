"""Signatures of finished folders, as OpenSSF's model-signing makes them: digests find damage, signatures forgery."""

import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from freebits.errors import CheckpointError, UsageError, one_line
from freebits.storage.task import UNFINISHED

SIGNATURE = "model.sig"
"""The file in the folder that signs all others: a bundle of sigstore's with SHA-256 digests."""


def sign(folder: Path, key: str | os.PathLike[str]) -> None:
    """Sign every file of a folder.

    Args:
        folder: finished, but not yet published.
        key: file of a private key of an elliptic curve (PEM, secp256r1, 384r1 or 521r1).

    Raises:
        UsageError: the key cannot be used, or model-signing is not installed.
    """
    hashing = _library("hashing")
    check_key(key)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # what was put together by now
    of = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE])
    try:
        _signer(key).set_hashing_config(of).sign(folder, folder / SIGNATURE)
    except Exception as error:  # of the key's library, too
        raise _no_key(key, error) from None


def check_key(key: str | os.PathLike[str] | None) -> None:
    """Check that a key, if there is one, can sign, before any work is done.

    Raises:
        UsageError: it cannot, or model-signing is not installed.
    """
    if key is not None:
        _library("signing")
        try:
            _signer(key)
        except Exception as error:
            raise _no_key(key, error) from None


def _signer(key: str | os.PathLike[str]) -> Any:
    return _library("signing").Config().use_elliptic_key_signer(private_key=Path(key))


def _no_key(key: str | os.PathLike[str], error: Exception) -> UsageError:
    return UsageError(f"{key} cannot sign ({one_line(error, 160)}): give a private key in PEM, of secp256r1")


def check_signature(folder: Path, key: str | os.PathLike[str]) -> None:
    """Check that a folder is, file for file, what the owner of a key signed.

    Args:
        folder: with a signature in it.
        key: file of the public key (PEM).

    Raises:
        CheckpointError: it is not signed, not with that key, or was changed.
        UsageError: the key cannot be read, or model-signing is not installed.
    """
    hashing, verifying = _library("hashing"), _library("verifying")
    if not (folder / SIGNATURE).is_file():
        raise CheckpointError(f"{folder} has no {SIGNATURE}: it is not signed")
    of = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE])
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(key)).set_hashing_config(of)
    except Exception as error:
        raise UsageError(f"{key} is no key ({one_line(error, 160)}): give a public key in PEM") from None
    try:
        config.verify(folder, folder / SIGNATURE)
    except Exception as error:
        raise CheckpointError(
            f"{folder} is not what the owner of {key} signed ({one_line(' '.join(str(error).split()), 200)}): "
            "do not use it"
        ) from None


def _library(part: str) -> Any:
    try:
        return import_module(f"model_signing.{part}")
    except ImportError:
        raise UsageError("signatures need model-signing: pip install 'freebits[sign]'") from None
