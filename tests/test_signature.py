"""Signed folders are checked against a public key."""

import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import freebits
from freebits import CheckpointError
from freebits.cli.main import main
from tests.tiny import Make, flip

PRIVATE = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
PUBLIC = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def save_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Save a new pair of keys, and return the files of the private and of the public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(*PRIVATE))
    public.write_bytes(key.public_key().public_bytes(*PUBLIC))
    return private, public


def test_verify_checks_all_files_of_a_signed_folder_with_the_key(
    save_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (private, public), (_, other_public) = save_keys(tmp_path, "mine"), save_keys(tmp_path, "other")
    dense, out = save_tiny(), tmp_path / "out"
    assert main(["pack", str(dense), str(out), "--sign", str(private)]) == 0
    assert main(["verify", str(out), "--key", str(public)]) == 0
    assert str(public) in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=re.escape(str(other_public))):
        freebits.verify(out, key=other_public)
    (out / "tokenizer_config.json").write_text("{}")  # the manifest has no digest of this file
    freebits.verify(out)
    with pytest.raises(CheckpointError, match=re.escape(str(public))):
        freebits.verify(out, key=public)


def test_an_added_file_is_noticed(save_tiny: Make, tmp_path: Path) -> None:
    private, public = save_keys(tmp_path, "mine")
    freebits.pack(save_tiny(), tmp_path / "out", sign_with=private)
    (tmp_path / "out" / "modeling.py").write_text("print('hello')")
    with pytest.raises(CheckpointError, match=re.escape(str(public))):
        freebits.verify(tmp_path / "out", key=public)


def test_missing_and_damaged_signatures_and_invalid_keys_are_refused(
    save_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = save_keys(tmp_path, "mine")
    dense = save_tiny()
    freebits.pack(dense, tmp_path / "plain")
    for arguments, fact in (
        (["verify", "plain", "--key", "mine.pub"], "model.sig"),
        (["verify", "plain", "--key", "dense/config.json"], "model.sig"),
        (["pack", "dense", "out", "--sign", "mine.pub"], "mine.pub"),
        (["pack", "dense", "out", "--sign", "missing.pem"], "missing.pem"),
    ):
        assert main(_with_paths(tmp_path, arguments)) == 2
        assert fact in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    freebits.pack(dense, tmp_path / "signed", sign_with=private)
    assert main(["verify", str(tmp_path / "signed"), "--key", str(dense / "config.json")]) == 2
    assert str(dense / "config.json") in capsys.readouterr().err
    flip(tmp_path / "signed" / "model.sig", 200)
    with pytest.raises(CheckpointError, match=re.escape(str(public))):
        freebits.verify(tmp_path / "signed", key=public)


def _with_paths(folder: Path, arguments: list[str]) -> list[str]:
    """Return the arguments of a command with the names of files replaced by their paths in a folder."""
    return [arguments[0], *(name if name.startswith("--") else str(folder / name) for name in arguments[1:])]
