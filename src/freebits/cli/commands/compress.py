"""`freebits compress`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import (
    add_base,
    add_device,
    add_jobs,
    add_model,
    add_out,
    add_revision,
    add_sign,
    add_trellis,
    add_uncalibrated,
    command,
    size,
    text_of,
)
from freebits.cli.output import print_components, print_facts, print_fidelity, print_json, print_plan
from freebits.cli.progress import progress_bar
from freebits.errors import UsageError


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "compress",
        "make a model smaller with one command: plan, compress, compare with the original, and write a model card",
        "Give at most one target. Without a target, the command looks for a small folder whose mean KL divergence from "
        "MODEL is at most 0.05 nats per token, which raises perplexity by about 5 %. If MODEL predicts no text, "
        "--fallback-bits is the target. The divergence is measured on text that was not used for calibration. The "
        "result is lossy, except with --lossless or if the target needs no loss. If compression fails, "
        "there is no OUT, and nothing is uploaded. Compression takes minutes per 100 million parameters on a CPU. "
        "While MODEL generates calibration text, memory holds the whole model, in its own dtype, or in float32 if that "
        "is faster and fits. quantize, slice and pack have more options.",
    )
    add_model(parser, "folder of a checkpoint")
    add_out(parser)
    parser.add_argument("--target-size", metavar="BYTES", type=size, help="largest size of OUT, such as 80MB or 1.2GB")
    parser.add_argument(
        "--target-ratio", metavar="RATIO", type=float, help="largest size of OUT as a fraction of MODEL, such as 0.4"
    )
    parser.add_argument("--bits", type=float, help="average bits per weight: 6 is nearly lossless, 4 small, 3 worse")
    parser.add_argument(
        "--max-kl",
        metavar="NATS",
        type=float,
        help="largest mean KL divergence in nats per token; 0.01 is hardly noticeable",
    )
    parser.add_argument(
        "--lossless",
        action="store_true",
        help="keep every bit (bfloat16 shrinks to about 67 %%); unpack restores the original files",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="file with calibration text (default: text that the model generates)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="file with text to measure on (default: pages of Python's documentation)",
    )
    add_base(parser)
    add_uncalibrated(parser)
    add_trellis(parser)
    add_device(parser)
    parser.add_argument(
        "--force", action="store_true", help="keep the result even if its mean KL exceeds 0.5 nats per token"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the plan; do not download weights")
    parser.add_argument(
        "--push-to", metavar="ID", help="upload OUT to this repository on the hub; a new repository is private"
    )
    add_jobs(parser)
    add_sign(parser)
    add_revision(parser)
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.api.compress import compress
    from freebits.execution.executor import Parallel
    from freebits.storage.auxiliary_files import CARD
    from freebits.storage.hub import push
    from freebits.storage.remote import url_of

    if arguments.push_to and url_of(arguments.out):
        raise UsageError("`push_to` uploads a local folder: give a local path as `out`")
    result = compress(
        arguments.model,
        arguments.out,
        target_size=arguments.target_size,
        target_ratio=arguments.target_ratio,
        bits=arguments.bits,
        lossless=arguments.lossless,
        max_kl=arguments.max_kl,
        calibration=text_of(arguments.calibration),
        text=text_of(arguments.text),
        keep=arguments.keep,
        base=arguments.base,
        fallback_bits=arguments.fallback_bits,
        trellis=arguments.trellis,
        revision=arguments.revision,
        device=arguments.device,
        parallel=Parallel(jobs=arguments.jobs),
        force=arguments.force,
        dry_run=arguments.dry_run,
        sign_with=arguments.sign,
        progress=progress_bar(),
    )
    if arguments.push_to and not arguments.dry_run:
        result["pushed"] = push(arguments.out, arguments.push_to)
    if arguments.json:
        return print_json(result)
    if result.get("kind") == "pipeline":
        return print_components(result)
    print_plan(result["plan"])
    if arguments.dry_run:
        return 0
    print_facts(result, as_json=False)
    print_fidelity(result["fidelity"])
    loading = (
        f"load it with {result['auto_class']} after `import freebits`"
        if result["auto_class"]
        else "run freebits unpack to load it"
    )
    print(f"{result['seconds']:.0f} s; {loading}; see {arguments.out / CARD}")
    return 0
