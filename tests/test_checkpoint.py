"""Reading checkpoint folders, copying auxiliary files, and creating output folders."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import freebits
from freebits.errors import CheckpointError, one_line
from freebits.integrations.loading import load
from freebits.limits import JSON_BYTES
from freebits.storage.auxiliary_files import copy_auxiliary_files
from freebits.storage.checkpoint import Checkpoint
from freebits.storage.safetensors_files import WeightsFile, WeightsWriter, parse_header
from freebits.storage.staging import new_directory
from freebits.types import TensorSpec, bytes_of
from tests.tiny import Make, change_config


def test_an_index_may_list_only_plain_file_names(save_tiny: Make, slice_tiny: Make) -> None:
    dense = save_tiny(shard="20KB")
    index = json.loads((dense / "model.safetensors.index.json").read_text())
    for file in ("../outside.safetensors", str(dense / "model.safetensors"), 5):
        changed = index | {"weight_map": index["weight_map"] | {"model.norm.weight": file}}
        (dense / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json .*{re.escape(repr(file))}"):
            slice_tiny(dense)


def test_a_single_file_takes_precedence_over_an_index_as_in_transformers(save_tiny: Make) -> None:
    single, sharded = save_tiny("single", seed=1), save_tiny("sharded", shard="20KB", seed=2)
    for file in sharded.glob("model*"):
        shutil.copy(file, single)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(Checkpoint(single)[name], load(single).state_dict()[name])


def test_a_folder_from_which_transformers_loads_other_weights_is_refused(save_tiny: Make, tmp_path: Path) -> None:
    # Regression: freebits ignored this entry of the config, and packed weights that transformers does not load.
    dense = save_tiny()
    change_config(dense, transformers_weights="other.safetensors")
    with pytest.raises(CheckpointError, match="transformers_weights"):
        freebits.pack(dense, tmp_path / "packed", codec="none")
    adapted = save_tiny("adapted")
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        freebits.pack(adapted, tmp_path / "packed", codec="none")


PICKLES = ("pytorch_model.bin", "x.PKL", "scaler.joblib", "state.dill", "data.npz", "X.BIN", "sub/tokenizer.pickle")
CODE_AND_WEIGHTS = ("modeling_maker.py", "2_Dense/model.safetensors", "model.gguf", "onnx/model.onnx")
AUXILIARY = {
    "LICENSE": "free",
    "README.md": "# A model",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "1_Pooling/config.json": "{}",
    "modules.json": "[]",
    "tekken.json": "{}",
    "spiece.model": "binary",
    "a/deep/folder/data.csv": "1,2",
}


def add_files(dense: Path, secret: Path) -> Path:
    """Add auxiliary files, and files that must not be copied, to the folder of a model. Return the folder."""
    for name, text in {**AUXILIARY, **dict.fromkeys((*PICKLES, *CODE_AND_WEIGHTS, ".env"), "content")}.items():
        (dense / name).parent.mkdir(exist_ok=True, parents=True)
        (dense / name).write_text(text)
    secret.mkdir()
    (secret / "secret").write_text("secret")
    (dense / "modeling_freebits.py").write_text("raise SystemExit('run')")  # as an attacker might
    (dense / "NOTICE").symlink_to(secret / "secret")
    (dense / "link").symlink_to(secret)
    (dense / "COPYING").symlink_to("LICENSE")
    (dense / "1_Pooling" / "up.txt").symlink_to("../LICENSE")
    (dense / "secret.index.json").symlink_to(secret / "secret")
    os.mkfifo(dense / "pipe")
    return dense


NEVER_COPIED = (*PICKLES, ".env", "NOTICE", "link", "secret.index.json", "pipe")


def test_codec_none_restores_all_files_except_unsafe_ones(
    save_tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = add_files(save_tiny(), tmp_path / "outside")
    freebits.pack(dense, tmp_path / "packed", codec="none")
    assert all(name in caplog.records[0].message for name in NEVER_COPIED)
    caplog.clear()
    freebits.unpack(tmp_path / "packed", tmp_path / "back")
    assert not caplog.records
    files = {str(file.relative_to(dense)) for file in dense.rglob("*") if file.is_file()}
    restored = {str(file.relative_to(tmp_path / "back")) for file in (tmp_path / "back").rglob("*") if file.is_file()}
    assert restored == files - {*NEVER_COPIED, "modeling_freebits.py"}
    assert all((tmp_path / "back" / name).read_bytes() == (dense / name).read_bytes() for name in restored)
    assert "secret" not in (tmp_path / "packed" / "freebits.json").read_text()


def test_other_commands_copy_auxiliary_files_but_neither_code_nor_other_weights(
    save_tiny: Make, slice_tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sliced = slice_tiny(add_files(save_tiny(), tmp_path / "outside"))
    assert all(name in caplog.text for name in (*NEVER_COPIED, *CODE_AND_WEIGHTS))
    caplog.clear()
    (sliced / "modeling_freebits.py").write_text("raise SystemExit('run')")
    freebits.pack(sliced, tmp_path / "packed")
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert not caplog.records
    for folder in (sliced, tmp_path / "packed", tmp_path / "unpacked"):
        for name, text in {**AUXILIARY, "COPYING": "free", "1_Pooling/up.txt": "free"}.items():
            assert text in (folder / name).read_text()  # the new README.md contains the old one
        assert json.loads((folder / "tokenizer.json").read_text())
        assert not [name for name in (*NEVER_COPIED, *CODE_AND_WEIGHTS) if (folder / name).exists()]
        assert folder == sliced or (folder / "modeling_freebits.py").read_text().count("import") == 1
    assert not (tmp_path / "unpacked" / "freebits.json").exists()


def test_files_that_are_not_copied_are_listed_even_with_quiet(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    (dense / "optimizer.pt").write_text("pickle")
    process = subprocess.run(
        [sys.executable, "-m", "freebits.cli", "pack", dense, tmp_path / "out", "--codec", "none", "--quiet"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (process.stdout, process.stderr.count("\n")) == ("", 1)
    assert "optimizer.pt" in process.stderr


def test_auto_map_loses_entries_whose_code_is_not_copied(
    save_tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = save_tiny()
    classes = {"AutoConfig": "configuration_x.C", "AutoModel": "maker/x--modeling_x.M"}
    change_config(dense, auto_map=classes)
    (dense / "configuration_x.py").write_text("")
    tokenizer = json.loads((dense / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}}
    (dense / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (dense / "tokenization_x.py").write_text("")
    (dense / "processor_config.json").write_text("no JSON")
    (dense / "video_processor_config.json").write_text('{"auto_map": ["tokenization_x.Old", null]}')
    freebits.pack(dense, tmp_path / "exact", codec="none")
    freebits.unpack(tmp_path / "exact", tmp_path / "same")
    assert not caplog.records
    freebits.pack(dense, tmp_path / "packed")
    freebits.unpack(tmp_path / "packed", tmp_path / "unpacked")
    freebits.rotate_model(dense, tmp_path / "rotated")
    assert "AutoConfig" in caplog.text
    assert "AutoTokenizer" in caplog.text

    def auto_map_in(folder: str, file: str) -> object:
        return json.loads((tmp_path / folder / file).read_text()).get("auto_map")

    assert auto_map_in("same", "config.json") == classes
    for folder in ("unpacked", "rotated"):
        assert auto_map_in(folder, "config.json") == {"AutoModel": "maker/x--modeling_x.M"}
        assert auto_map_in(folder, "tokenizer_config.json") is None
        assert auto_map_in(folder, "video_processor_config.json") is None
        assert (tmp_path / folder / "processor_config.json").read_text() == "no JSON"


def test_links_into_the_blobs_of_a_hugging_face_cache_are_copied(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    (snapshot / "LICENSE").symlink_to("/etc/hostname")
    (tmp_path / "target").mkdir()
    copy_auxiliary_files(snapshot, tmp_path / "target")
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["tokenizer.json"]


def test_pipes_devices_and_huge_configs_are_refused(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    (dense / "config.json").unlink()
    os.mkfifo(dense / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        freebits.inspect(dense)
    other = save_tiny("other")
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        freebits.pack(other, tmp_path / "out", codec="none")
    (other / "config.json").unlink()
    with (other / "config.json").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(CheckpointError, match=rf"config\.json.* {JSON_BYTES} "):
        freebits.inspect(other)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        '{"a": 5}',
        '{"a": {"dtype": "F16", "shape": [2]}}',
        '{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 5]}}',
        '{"a": {"dtype": "F16", "shape": [2], "data_offsets": [2, 6]}}',
        '{"a": {"dtype": "F16", "shape": [-2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F16", "shape": [2.0], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0.0, 4]}}',
        '{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F16", "shape": [0, 1152921504606846976], "data_offsets": [0, 0]}}',
        '{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}, "a": {"dtype": "F16", "shape": [2], '
        '"data_offsets": [4, 8]}}',
        "[" * 100_000,
    ],
)
def test_an_invalid_header_is_refused(header: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_header(header)
    assert len(one_line(caught.value)) < 700


def test_an_unannounced_tensor_raises_an_error_instead_of_overwriting_a_tensor(tmp_path: Path) -> None:
    # Regression: with an unannounced tensor, the header outgrew its reserved space and overwrote the first tensor.
    tensor = torch.arange(8.0)
    writer = WeightsWriter(tmp_path / "a.safetensors", {"a": (8,)})
    for name in ("a", "b" * 200):
        writer.write(name, TensorSpec.of(tensor), bytes_of(tensor))
    with pytest.raises(AssertionError, match=r"a\.safetensors"):
        writer.close()
    with WeightsWriter(tmp_path / "b.safetensors", {"a": (8,), "b": (8,)}) as writer:
        writer.write("a", TensorSpec.of(tensor), bytes_of(tensor))
        writer.write("b", TensorSpec.of(tensor), bytes_of(tensor))
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], tensor)
    assert WeightsFile(tmp_path / "b.safetensors").read("b").tobytes() == bytes_of(tensor).tobytes()


def test_the_error_about_an_unreadable_file_names_that_file(save_tiny: Make, tmp_path: Path) -> None:
    dense = save_tiny()
    command = [sys.executable, "-c", UNREADABLE, str(dense), str(tmp_path / "new" / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.stdout.startswith(f"{dense / 'LICENSE'} ")
    assert process.stdout.count("\n") == 1
    assert "Permission denied" in process.stdout
    assert not (tmp_path / "new").exists()


UNREADABLE = """
import os, sys, freebits
from pathlib import Path

license = Path(sys.argv[1]) / "LICENSE"
license.write_text("free")
original_open = Path.open
def refuse(path, *args, **kwargs):
    if path == license:
        raise PermissionError(13, "Permission denied", str(path))
    return original_open(path, *args, **kwargs)
Path.open = refuse  # because file permissions do not stop root
try:
    freebits.pack(sys.argv[1], sys.argv[2], codec="none")
except freebits.CheckpointError as error:
    print(error)
"""


def test_an_error_is_raised_even_if_a_created_parent_folder_cannot_be_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_directory(tmp_path / "new" / "out"):
        (tmp_path / "new" / "neighbor").mkdir()  # so that `new` cannot be removed
        raise KeyError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["neighbor"]


def test_an_output_folder_that_cannot_be_created_leaves_no_parent_folders(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="x" * 100),
        new_directory(tmp_path / "a" / ("x" * 300) / "out"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_slower_of_two_writers_of_a_folder_fails(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "out"))),
        new_directory(tmp_path / "out") as slower,
    ):
        (slower / "from the slower").touch()
        with new_directory(tmp_path / "out") as faster:
            (faster / "from the faster").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["from the faster"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_next_run_removes_the_staging_directory_of_a_killed_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Regression: 121 of 210 runs that `kill -9` ended left a staging directory for good.
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -9
    [staging] = tmp_path.iterdir()
    with new_directory(tmp_path / "other"):
        assert staging.exists()  # because it belongs to another output folder
    with new_directory(tmp_path / "out") as first, pytest.raises(CheckpointError, match="stop"):
        assert not staging.exists()
        with new_directory(tmp_path / "out"):  # `first` stays, because its process is alive
            assert first.exists()
            raise CheckpointError("stop")
    assert staging.name in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


KILLED = """
import os, signal, sys
from freebits.storage.staging import new_directory

with new_directory(sys.argv[1]) as staging:
    (staging / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_all_files_are_flushed_to_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    with new_directory(tmp_path / "out") as staging:
        (staging / "inside").mkdir()
        (staging / "inside" / "file").touch()
    assert sorted(synced[:-1]) == sorted(map(str, (staging, staging / "inside", staging / "inside" / "file")))
    assert synced[-1] == str(tmp_path)


def test_messages_are_escaped_and_shortened() -> None:
    assert one_line("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"
    assert len(one_line("x" * 10**6)) < 620
    assert str(CheckpointError("tensor a\nb")) == "tensor a\\nb"
