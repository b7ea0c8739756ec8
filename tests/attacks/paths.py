"""Wrong file names, links, and pipes or folders in the place of files."""

import json
import os
from pathlib import Path

from tests.attacks import attack
from tests.tiny import redigest


@attack("dense")
def config_without_end(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


@attack("dense")
def config_that_is_a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@attack("dense")
def weights_that_are_a_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


@attack("dense")
def weights_that_are_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@attack("dense")
def index_that_leads_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": "../../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@attack("dense")
def link_to_a_secret(folder: Path) -> None:
    (folder / "special_tokens_map.json").symlink_to("/etc/passwd")
    (folder / "additional_chat_templates").symlink_to("/etc")


@attack("dense")
def link_without_end_beside_the_weights(folder: Path) -> None:
    (folder / "tokenizer.model").symlink_to("/dev/zero")
    (folder / "code.py").symlink_to("/dev/zero")


@attack("dense")
def weights_in_a_loop(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


@attack("dense")
def pickles_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")


@attack("none")
def file_that_would_be_written_elsewhere(folder: Path) -> None:
    def lead_out(manifest: dict[str, dict[str, str]]) -> None:
        originals = manifest["originals"]
        originals["../escaped.safetensors"] = originals.pop("model.safetensors")

    redigest(folder, lead_out)


@attack("none")
def file_with_a_name_that_ends_early(folder: Path) -> None:
    def end_early(manifest: dict[str, dict[str, str]]) -> None:
        originals = manifest["originals"]
        originals["model\0.safetensors"] = originals.pop("model.safetensors")

    redigest(folder, end_early)


@attack("canonical")
def weights_from_another_folder(folder: Path) -> None:
    redigest(folder, lambda manifest: manifest.update(files=["../canonical/packed.safetensors"]))
