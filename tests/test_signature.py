"""Folders that are signed."""

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


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(*PRIVATE))
    public.write_bytes(key.public_key().public_bytes(*PUBLIC))
    return private, public


def test_what_is_signed_is_checked(save_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (private, public), (_, another) = keys(tmp_path, "mine"), keys(tmp_path, "another")
    dense, out = save_tiny(), tmp_path / "out"
    assert main(["pack", str(dense), str(out), "--sign", str(private)]) == 0
    assert main(["verify", str(out), "--key", str(public)]) == 0
    assert "signed by the owner of" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="is not what the owner of"):
        freebits.verify(out, key=another)
    (out / "tokenizer_config.json").write_text("{}")  # which no digest of ours covers
    freebits.verify(out)
    with pytest.raises(CheckpointError, match="is not what the owner of"):
        freebits.verify(out, key=public)


def test_a_file_that_was_added_is_noticed(save_tiny: Make, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "mine")
    freebits.pack(save_tiny(), tmp_path / "out", sign_with=private)
    (tmp_path / "out" / "modeling.py").write_text("print('hello')")
    with pytest.raises(CheckpointError, match="is not what the owner of"):
        freebits.verify(tmp_path / "out", key=public)


def test_a_signature_that_is_none_is_refused(
    save_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys(tmp_path, "mine")
    dense = save_tiny()
    freebits.pack(dense, tmp_path / "plain")
    for arguments, finding in (
        (["verify", "plain", "--key", "mine.pub"], "is not signed"),
        (["verify", "plain", "--key", "dense/config.json"], "is not signed"),
        (["pack", "dense", "out", "--sign", "mine.pub"], "cannot sign"),
        (["pack", "dense", "out", "--sign", "no key"], "cannot sign"),
    ):
        assert main(_in(tmp_path, arguments)) == 2
        assert finding in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    freebits.pack(dense, tmp_path / "signed", sign_with=private)
    assert main(["verify", str(tmp_path / "signed"), "--key", str(dense / "config.json")]) == 2
    assert str(dense / "config.json") in capsys.readouterr().err
    flip(tmp_path / "signed" / "model.sig", 200)
    with pytest.raises(CheckpointError, match="is not what the owner of"):
        freebits.verify(tmp_path / "signed", key=public)


def _in(folder: Path, arguments: list[str]) -> list[str]:
    return [arguments[0], *(word if word.startswith("--") else str(folder / word) for word in arguments[1:])]
