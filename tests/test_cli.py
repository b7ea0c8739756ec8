"""The command line: what it prints, and what it says of bad input."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import freebits
from freebits.calibration.tokens import token_windows
from freebits.cli.main import main
from freebits.errors import UsageError
from freebits.execution.progress import Progress
from tests.tiny import Make, change_config, random_text, redigest

CaptureFixture = pytest.CaptureFixture[str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(random_text(700))
    return file


@pytest.fixture
def dense(save_tiny: Make) -> Path:
    return save_tiny(hidden_size=64, intermediate_size=160, tie_word_embeddings=True)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_verbs_in_their_order(dense: Path, text: Path, tmp_path: Path, capsys: CaptureFixture) -> None:
    sliced, packed, unpacked = (tmp_path / name for name in ("sliced", "packed", "unpacked"))
    options = ("--calibration", text, "--samples", 8, "--seq-len", 32)
    assert run("slice", dense, sliced, "--sparsity", 0.25, *options) == 0
    assert run("pack", sliced, packed, "--codec", "bits-back", "--threshold", 0.05, "--jobs", 2) == 0
    assert run("unpack", packed, unpacked) == 0
    assert run("inspect", packed) == 0
    assert run("verify", packed) == 0
    assert run("verify", packed, "--against", sliced, "--text", text, "--seq-len", 32, "--kl", 0.5, "--ratio", 1.5) == 0
    assert run("eval", unpacked, "--text", text, "--seq-len", 32) == 0
    output = capsys.readouterr()
    assert "held-out windows of the calibration text" in output.out
    assert "5 of 7 sites encoded" in output.out
    assert "stored plain: model.layers.2.mlp: the tied head fixes its basis" in output.out
    assert "bits-back (function-preserving), freebits" in output.out
    assert "every digest matches" in output.out
    assert "within tolerance for function-preserving steps" in output.out
    assert "perplexity" in output.out.splitlines()[-1]
    assert output.err == ""  # no terminal, no progress bar


def keys(value: Any) -> Any:
    return {key: keys(part) for key, part in value.items()} if isinstance(value, dict) else None


def test_the_json_keys_are_stable(dense: Path, text: Path, tmp_path: Path, capsys: CaptureFixture) -> None:
    def printed(*arguments: object) -> Any:
        capsys.readouterr()
        code = run(*arguments, "--json")
        output = capsys.readouterr()
        assert output.err == ""
        result = json.loads(output.out)
        assert code == (0 if result.get("ok", True) else 1)
        return result

    sliced, packed = tmp_path / "sliced", tmp_path / "packed"
    options = ("--calibration", text, "--samples", 8, "--seq-len", 32)
    sizes = dict.fromkeys(("dense", "dense_untied", "sliced", "packed", "corrections"))
    facts = dict.fromkeys(("kind", "codec", "entropy", "bytes", "sites", "history", "parameters")) | {"bytes": sizes}
    sliced_facts = printed("slice", dense, sliced, "--sparsity", 0.25, *options)
    groups = sliced_facts.pop("groups")
    assert keys(sliced_facts) == facts | {"perplexity": {"dense": None, "sliced": None}}
    assert sum(groups.values()) == sliced_facts["bytes"]["sliced"]
    assert groups.keys() == {"embeddings", "attention", "mlp", "shortcuts", "head", "headers, manifest, config"}
    result = printed("pack", sliced, packed)
    assert keys({key: value for key, value in result.items() if key != "groups"}) == facts
    assert sum(result["groups"].values()) == result["bytes"]["packed"]
    assert result == printed("inspect", packed)
    assert (result["codec"], result["entropy"], len(result["sites"])) == ("canonical", "auto", 7)
    assert printed("inspect", dense)["bytes"]["dense"] == result["bytes"]["dense"]
    perplexities = {"reference": None, "packed": None}
    verified = dict.fromkeys(("ok", "failed", "fidelity", "max_abs_logit_diff", "mean_kl", "ratio"))
    verified |= {"perplexity": perplexities}
    assert keys(printed("verify", packed)) == verified
    compared = printed("verify", packed, "--against", sliced, "--text", text, "--seq-len", 32)
    assert keys(compared) == verified
    assert compared["max_abs_logit_diff"] > 0
    assert 0 < compared["mean_kl"] < 0.1
    assert compared["fidelity"] == "function-preserving"
    assert compared["ratio"] == compared["perplexity"]["packed"] / compared["perplexity"]["reference"]
    assert printed("unpack", packed, tmp_path / "unpacked")["kind"] == "sliced"
    evaluated = printed("eval", dense, "--text", text, "--seq-len", 32, "--limit", 3)
    assert keys(evaluated) == {"perplexity": None, "tokens": None, "tasks": {}}
    assert evaluated["tokens"] == 3 * 31


def verdict(packed: Path, against: Path, text: Path, **options: Any) -> dict[str, Any]:
    return freebits.verify(packed, against=against, text=text.read_text(), seq_len=32, **options)


def test_unrelated_models_are_told_apart(save_tiny: Make, pack_tiny: Make, slice_tiny: Make, text: Path) -> None:
    # The only gate was one-sided perplexity: two unrelated random models gave ok at a mean KL of 3 nats.
    one, other = (slice_tiny(save_tiny(f"dense {seed}", seed=seed), f"sliced {seed}") for seed in (1, 2))
    packed = pack_tiny(one)
    assert verdict(packed, one, text)["ok"]
    found = verdict(packed, other, text)
    assert not found["ok"]
    assert "kl" in found["failed"]
    assert found["mean_kl"] > 1


def test_a_better_model_is_another_model_too(save_tiny: Make, slice_tiny: Make, pack_tiny: Make, text: Path) -> None:
    dense = save_tiny(hidden_size=64)
    one, other = slice_tiny(dense, "one"), slice_tiny(dense, "other", sparsity=0.75)
    for made_from, against in ((one, other), (other, one)):
        found = verdict(pack_tiny(made_from, f"packed {made_from.name}"), against, text, kl=1e9, ratio=1.0)
        assert found["failed"] == ["ratio"]


def test_not_a_number_passes_no_gate(save_tiny: Make, slice_tiny: Make, pack_tiny: Make, text: Path) -> None:
    # A NaN reference passed anything.
    sliced = slice_tiny(save_tiny())
    packed = pack_tiny(sliced)
    state = load_file(sliced / "model.safetensors")
    state["model.embed_tokens.weight"][:] = float("nan")
    save_file(state, sliced / "model.safetensors", metadata={"format": "pt"})
    assert {"finite", "kl", "ratio"} == {*verdict(packed, sliced, text)["failed"]}


def test_what_codec_none_packed_must_be_equal(save_tiny: Make, pack_tiny: Make, text: Path) -> None:
    dense = save_tiny()
    packed = pack_tiny(dense, codec="none")
    assert verdict(packed, dense, text) | {"ok": True, "failed": [], "fidelity": "bit-exact"} == verdict(
        packed, dense, text
    )
    state = load_file(dense / "model.safetensors")
    state["lm_head.weight"][0, 0] *= 1.001
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    assert verdict(packed, dense, text)["failed"] == ["equal"]


def test_the_dense_model_is_a_reference_too(
    save_tiny: Make, slice_tiny: Make, pack_tiny: Make, text: Path, capsys: CaptureFixture
) -> None:
    dense = save_tiny()
    packed = pack_tiny(slice_tiny(dense))
    found = verdict(packed, dense, text, kl=100)
    assert found["fidelity"] == "lossy"
    assert found["mean_kl"] > 0.01  # more than codecs may change
    options = ("--text", text, "--seq-len", 32, "--kl", 0, "--ratio", 1)
    assert run("verify", packed, "--against", dense, *options) == 1
    assert "NOT within tolerance (kl, ratio) for lossy steps" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"kl": -1.0}, {"ratio": 0.5}, {"kl": float("nan")}, {"ratio": float("inf")}])
def test_a_tolerance_that_makes_no_sense_is_refused(
    options: dict[str, float], save_tiny: Make, pack_tiny: Make, text: Path
) -> None:
    dense = save_tiny()
    with pytest.raises(UsageError, match="give a number of at least"):
        verdict(pack_tiny(dense, codec="none"), dense, text, **options)


def test_perplexity_is_what_it_should_be(dense: Path, text: Path) -> None:
    found = freebits.evaluate(dense, text=text.read_text(), seq_len=32, limit=5)
    model = freebits.load(dense, dtype=torch.float64)
    total = count = 0.0
    for window in token_windows(dense, text.read_text(), 32, 5):
        with torch.no_grad():
            odds = torch.softmax(model(window[None]).logits[0].double(), -1)
        for position in range(31):
            total -= math.log(odds[position, window[position + 1]])
            count += 1
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["tokens"] == count


def test_tasks_can_be_measured_alone(dense: Path, capsys: CaptureFixture) -> None:
    assert run("eval", dense, "--no-perplexity") == 2
    assert_one_line(capsys, "nothing to measure")


def spoil_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{ no json")


def spoil_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bloom"}')


def spoil_truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def spoil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (spoil_missing, "model.safetensors"),
        (spoil_config, "cannot be read as JSON"),
        (spoil_type, "'bloom' has no entry"),
        (spoil_truncate, "truncated or damaged"),
        (spoil_pickle, "only pickled weights"),
        (spoil_tokenizer, "no tokenizer"),
    ],
)
@pytest.mark.parametrize("verb", ["slice", "quantize", "eval"])
def test_a_broken_checkpoint_is_one_line_and_exit_code_two(
    verb: str,
    spoil: Callable[[Path], None],
    finding: str,
    dense: Path,
    text: Path,
    tmp_path: Path,
    capsys: CaptureFixture,
) -> None:
    if spoil is spoil_type and verb != "slice":  # transformers knows bloom, but these are not its weights
        finding = "is missing"
    spoil(dense)
    before = sorted(tmp_path.iterdir())
    made = (tmp_path / "out", "--calibration", text)
    options = {"slice": (*made, "--sparsity", 0.2), "quantize": made, "eval": ()}
    assert run(verb, dense, *options[verb]) == 2
    assert_one_line(capsys, finding)
    assert sorted(tmp_path.iterdir()) == before


def assert_one_line(capsys: CaptureFixture, finding: str) -> None:
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("freebits: error: ")
    assert output.err.count("\n") == 1
    assert finding in output.err


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        (("slice", "nowhere", "out", "--sparsity", 0.2), "nowhere is not a folder"),
        (("slice", "dense", "out", "--sparsity", 1.0), "--sparsity"),
        (("slice", "dense", "out", "--sparsity", -0.2), "--sparsity"),
        (("slice", "dense", "out", "--sparsity", 0.2, "--samples", 0, "--seq-len", 32), "--samples"),
        (("slice", "dense", "out", "--sparsity", 0.2, "--seq-len", 1), "--seq-len"),
        (("slice", "dense", "out", "--sparsity", 0.2, "--calibration", "none.txt"), "none.txt cannot be read"),
        (("slice", "dense", "out", "--sparsity", 0.2, "--device", "abacus", "--seq-len", 32), "abacus"),
        (("slice", "dense", "dense", "--sparsity", 0.2, "--seq-len", 32), "dense exists already"),
        (("slice", "empty", "out", "--sparsity", 0.2), "no config.json"),
        (("pack", "dense", "out", "--codec", "bits-back"), "is a dense model"),
        (("pack", "nowhere", "out"), "nowhere is not a folder"),
        (("pack", "dense", "out", "--codec", "bits-back", "--threshold", -1), "--threshold is -1.0"),
        (("pack", "dense", "out", "--threshold", 0.1), "--threshold"),
        (("unpack", "dense", "out"), "no file freebits.json"),
        (("unpack", "nowhere", "out"), "nowhere is not a folder"),
        (("inspect", "nowhere"), "nowhere is not a folder"),
        (("verify", "dense"), "no file freebits.json"),
        (("eval", "nowhere"), "nowhere is not a folder"),
        (("eval", "dense", "--limit", 0), "--limit"),
        (("eval", "dense", "--data-dir", "dense"), "--tasks"),
        (("slice", "dense", "out", "--sparsity", 0.2, "--seed", 2**64, "--seq-len", 32), "seed"),
        (("slice", "x" * 300, "out", "--sparsity", 0.2), "is not a folder"),
        (("unpack", "x" * 300, "out"), "is not a folder"),
        (("verify", "x" * 300), "is not a folder"),
        (("slice", "dense", "x" * 300, "--sparsity", 0.2, "--seq-len", 32), "cannot be created"),
        (("eval", "dense", "--device", "meta", "--seq-len", 32, "--text", "text.txt"), "'meta' cannot be used"),
        (("pack", "dense", "/"), "/ exists already"),
        (("pack", "dense", "out\0"), "cannot be created"),
        (("inspect", "dense\0"), "is not a folder"),
        (("eval", "dense", "--seq-len", 65), "64 positions"),
        (("verify", "dense", "--kl", -1), "--kl"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_two(
    arguments: tuple[object, ...],
    finding: str,
    dense: Path,
    text: Path,
    capsys: CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(dense.parent)
    Path("empty").mkdir()
    if arguments[0] == "slice" and "--calibration" not in arguments:
        arguments += ("--calibration", text.name)
    before = sorted(Path().iterdir())
    assert run(*arguments) == 2
    assert_one_line(capsys, finding)
    assert sorted(Path().iterdir()) == before


def test_an_empty_text_is_not_replaced_by_another(dense: Path, tmp_path: Path, capsys: CaptureFixture) -> None:
    (tmp_path / "empty.txt").touch()
    assert run("eval", dense, "--text", tmp_path / "empty.txt", "--seq-len", 32) == 2
    assert_one_line(capsys, "the text has 0 tokens")


def test_the_model_makers_code_is_never_run(dense: Path, tmp_path: Path, capsys: CaptureFixture) -> None:
    ran = tmp_path / "ran"
    (dense / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((dense / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (dense / "config.json").write_text(json.dumps(config))
    for arguments in (("eval", dense, "--seq-len", 32), ("slice", dense, tmp_path / "out", "--sparsity", 0.2)):
        assert run(*arguments) == 2
        assert_one_line(capsys, "maker's code" if arguments[0] == "eval" else "'evil' has no entry")
    assert not ran.exists()


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """As if a terminal had started the tests: what runs in the background or under nohup ignores some signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_only_what_the_rerun_command_resumes(
    number: signal.Signals, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Progress:
        return lambda _step, _unit, _done, _total: os.kill(os.getpid(), number)

    for name in ("slice", "rotate"):
        monkeypatch.setattr(f"freebits.cli.commands.{name}.progress_bar", interrupted)
    before = sorted(tmp_path.rglob("*"))
    command = ("slice", dense, tmp_path / "new" / "out", "--sparsity", 0.2, "--calibration", text, "--seq-len", 32)
    other = ("rotate", dense, tmp_path / "rotated")
    for stopped in (other, command):
        try:
            code = run(*stopped)
        except SystemExit as ended:
            code = int(ended.code or 0)
        assert code == 128 + number
        if stopped is other:  # which is done in no time
            assert sorted(tmp_path.rglob("*")) == before
    [staging] = (tmp_path / "new").iterdir()
    assert staging.name.startswith(".out.")
    monkeypatch.undo()
    assert run(*command, "--force") == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.usefixtures("in_the_foreground")
def test_nohup_is_heeded(dense: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run("inspect", dense) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_not_a_number_is_null_in_json(dense: Path, text: Path, capsys: CaptureFixture) -> None:
    state = load_file(dense / "model.safetensors")
    state["model.norm.weight"][:] = float("nan")
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    assert run("eval", dense, "--text", text, "--seq-len", 32, "--json") == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] is None


@pytest.mark.parametrize("arguments", [[], ["slice", "a"], ["fly"], ["pack", "a", "b", "--codec", "huffman"]])
def test_wrong_usage_is_one_line_and_exit_code_two(arguments: list[str], capsys: CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert_one_line(capsys, "--help")


def test_help_and_version_of_the_installed_command() -> None:
    command = [sys.executable, "-m", "freebits.cli"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    for verb in ("compress", "estimate", "slice", "pack", "unpack", "inspect", "verify", "eval"):
        assert verb in done.stdout
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"freebits {freebits.__version__}"


def test_names_of_strangers_are_printed_in_one_line(dense: Path, tmp_path: Path, capsys: CaptureFixture) -> None:
    freebits.pack(dense, tmp_path / "packed", codec="none")

    def rename(manifest: dict[str, Any]) -> None:
        manifest["history"][0]["transform"] = "x\x1b[2J\n" * 10**5
        manifest["notes"] = [{"site": 0, "name": "a\nb", "reason": "\x07"}]

    redigest(tmp_path / "packed", rename)
    assert run("inspect", tmp_path / "packed") == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "stored plain: a\\nb: \\x07" in output
    assert len(output) < 3000


def test_a_config_of_a_billion_blocks_is_refused_at_once(dense: Path, tmp_path: Path, capsys: CaptureFixture) -> None:
    change_config(dense, num_hidden_layers=10**9)
    assert run("inspect", dense) == 0  # whatever it is, this is its size
    capsys.readouterr()
    for verb in (("slice", dense, tmp_path / "out", "--sparsity", 0.2), ("estimate", dense, "--sparsity", 0.2)):
        assert run(*verb) == 2
        assert_one_line(capsys, "1000000000")


def test_a_closed_stdout_is_no_traceback(dense: Path) -> None:
    command = f"{sys.executable} -m freebits.cli inspect {dense} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # noqa: S602
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)


def test_how_much_is_said_is_a_choice(
    save_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    dense = str(save_tiny())
    command = ["pack", dense, str(tmp_path / "out"), "--codec", "none"]
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*command, "--quiet"]) == 2  # it is there already
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["unpack", str(tmp_path / "out"), str(tmp_path / "plain"), "--verbose"]) == 0
    assert re.search(r"^\d{4}-\d\d-\d\d \S+ unpacking: done in [\d.]+ s$", capsys.readouterr().err, re.MULTILINE)
    assert main(["inspect", dense]) == 0  # and the next is as always
    said = capsys.readouterr()
    assert "dense" in said.out
    assert said.err == ""
    with pytest.raises(SystemExit):
        main([*command, "--quiet", "--verbose"])
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_errors_name_the_flags_of_the_command_line(dense: Path, tmp_path: Path, capsys: CaptureFixture) -> None:
    with pytest.raises(UsageError, match="`target_size`"):
        freebits.compress(dense, tmp_path / "out", target_size=10**6, bits=4)
    assert run("compress", dense, tmp_path / "out", "--target-size", "1MB", "--bits", 4) == 2
    error = capsys.readouterr().err
    assert "--target-size" in error
    assert "`" not in error


def test_progress_names_the_step_and_its_unit(
    dense: Path, text: Path, tmp_path: Path, capsys: CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, set[str]] = {}

    def progress(step: str, unit: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        steps.setdefault(step, set()).add(unit)

    freebits.quantize(dense, tmp_path / "out", calibration=text.read_text(), seq_len=32, progress=progress)
    assert steps == {"calibrating": {"block"}, "quantizing": {"byte"}}
    monkeypatch.setattr("freebits.cli.progress._SECONDS_BETWEEN_LINES", -1.0)
    command = ("quantize", dense, tmp_path / "again", "--calibration", text, "--seq-len", 32, "--verbose")
    assert run(*command) == 0
    log = capsys.readouterr().err
    assert re.search(r"calibrating, block \d+ of \d+, \d+ s left$", log, re.MULTILINE)
    assert re.search(r"quantizing: done in [\d.]+ s$", log, re.MULTILINE)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_learns_every_verb(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    told = capsys.readouterr().out
    for word in ("compress", "quantize", "report", "--target-size", "--codec", "canonical"):
        assert word in told
