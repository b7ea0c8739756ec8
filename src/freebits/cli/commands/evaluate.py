"""`freebits eval`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from freebits.cli.arguments import add_device, add_evaluation_text, add_model, command, text_of
from freebits.cli.output import Row, print_json, print_table
from freebits.cli.progress import progress_bar
from freebits.options import ROTATIONS


def add(commands: Any) -> ArgumentParser:
    """Declare the arguments."""
    parser = command(
        commands,
        "eval",
        "measure perplexity and zero-shot accuracy",
        "Perplexity is measured on windows of a text; the windows do not overlap. The model runs in float32, which "
        "takes 4 bytes per parameter. Tasks need lm-eval (pip install 'freebits[eval]'). Their documents come from the "
        "hub or from these files in --data-dir: "
        "piqa/{valid.jsonl,valid-labels.lst}, winogrande/winogrande.jsonl, hellaswag/hellaswag_val_full.txt.bz2.",
    )
    add_model(parser, "folder of any checkpoint")
    parser.add_argument(
        "--tasks", default="", metavar="NAME,…", help="names of lm-eval tasks, such as piqa,winogrande,hellaswag"
    )
    parser.add_argument("--no-perplexity", action="store_true", help="measure only the tasks")
    parser.add_argument(
        "--activations", metavar="BITS", type=int, help="simulate inputs of linear layers with this many bits"
    )
    parser.add_argument("--kv", metavar="BITS", type=int, help="simulate keys and values with this many bits")
    parser.add_argument(
        "--rotate",
        choices=ROTATIONS,
        default="none",
        help="basis in which the simulation rounds; hadamard: a rotated basis, as in QuaRot (default: %(default)s)",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", type=Path, help="folder with the documents of the tasks (default: the hub)"
    )
    add_device(parser)
    add_evaluation_text(parser, None, "windows, and documents per task")
    return parser


def run(arguments: Namespace) -> int:
    """Run the command."""
    from freebits.evaluation.perplexity import evaluate

    result = evaluate(
        arguments.model,
        text=text_of(arguments.text),
        seq_len=arguments.seq_len,
        limit=arguments.limit,
        tasks=[name for name in arguments.tasks.split(",") if name],
        data_dir=arguments.data_dir,
        perplexity=not arguments.no_perplexity,
        activations=arguments.activations,
        kv=arguments.kv,
        rotate=arguments.rotate,
        device=arguments.device,
        progress=progress_bar(),
    )
    if arguments.json:
        return print_json(result)
    if result["perplexity"] is not None:
        print(f"perplexity {result['perplexity']:.4f} on {result['tokens']:,} tokens")
    if result["tasks"]:
        rows: list[Row] = [("task", "metric", "value", "standard error")]
        for task, metrics in result["tasks"].items():
            for metric, value in metrics.items():
                if value is not None and "stderr" not in metric:
                    error = metrics.get(metric.replace(",", "_stderr,") if "," in metric else f"{metric}_stderr")
                    rows.append((task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
        print_table(rows)
    return 0
