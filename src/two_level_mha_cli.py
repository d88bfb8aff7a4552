"""Exact multi-head attention split over more ranks than it has heads: info, plan, predict, calibrate and check.

A module beside the package, which imports torch: help and refused options do not wait for that.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable

PROGRAM = "two-level-mha" if os.path.basename(sys.argv[0]) == "two-level-mha" else "python -m two_level_mha"
ACTIVATIONS = ("replicated", "sequence", "batch")
COMBINES = ("reduce", "concat")
DEVICE_TYPES = ("cuda", "cpu")
LATENT = ("kv-lora-rank", "q-lora-rank", "qk-nope-head-dim", "qk-rope-head-dim", "v-head-dim")
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Version(argparse.Action):
    """Prints it, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"two_level_mha {importlib.import_module('two_level_mha').__version__}")
        parser.exit()


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=later("two_level_mha.commands", "info"))


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="a transformers model, by its config.json, in place of sizes")
    parser.add_argument("--embed-dim", type=int)
    parser.add_argument("--num-heads", "--heads", dest="num_heads", type=int, help="query heads")
    parser.add_argument(
        "--num-kv-heads",
        "--kv-heads",
        dest="num_kv_heads",
        type=int,
        help="key/value heads (default: as many as query heads)",
    )
    parser.add_argument("--head-dim", type=int, help="default: embed dim / heads")
    for name in LATENT:
        parser.add_argument(f"--{name}", type=int, help="of latent attention, in place of the two above")
    parser.add_argument("--ranks", "--devices", dest="ranks", type=int, help="number of ranks")
    parser.add_argument(
        "--memory", metavar="GB,GB,..", type=sizes, help="of each rank, where they differ: finds shares of the KV cache"
    )
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seq", type=int, required=True, help="tokens; with --decode those of the context")
    parser.add_argument("--decode", action="store_true", help="one new token for each sequence, with a KV cache")
    parser.add_argument("--not-causal", action="store_true")
    parser.add_argument("--bias", action="store_true", help="the projections have biases")
    parser.add_argument("--gated", action="store_true", help="every query head has a gate of its output")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, with --model as config.json says")
    parser.add_argument("--combine", default="reduce", choices=COMBINES)
    parser.add_argument(
        "--activations", default="replicated", choices=ACTIVATIONS, help="how X and Y lie over the ranks"
    )
    parser.add_argument("--overlap", type=int, help="chunks of the batch (default: as many as are predicted fastest)")
    parser.add_argument("--device-type", default="cuda", choices=DEVICE_TYPES, help="whose profile predicts")
    parser.add_argument("--profile", metavar="NAME|FILE", help="the hardware to predict for: a name, or a JSON file")
    parser.add_argument("--plot", metavar="FILE", help="a picture of the predictions too: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=later("two_level_mha.commands", "plan"))


def sizes(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a number of GB for each rank, with commas between them, got {text!r}"
        ) from None


def later(module: str, name: str) -> Callable[..., object]:
    """A function of a module that is imported when it is called."""
    return lambda *args: getattr(importlib.import_module(module), name)(*args)


# Name -> its line in the help, and what adds its options.
COMMANDS: dict[str, tuple[str, Callable[..., object]]] = {
    "info": ("versions, build, arch list, operators, kernels", add_info),
    "plan": ("which grid and scheme to take: predicted costs of all", add_plan),
    "predict": (
        "tokens/s of a transformer in every layout, on other hardware",
        later("two_level_mha.experiment.command", "add_predict"),
    ),
    "calibrate": (
        "measures this machine's CPU, for predict",
        later("two_level_mha.experiment.calibrate", "add_calibrate"),
    ),
    "check": (
        "under torchrun: what is wrong with a cluster, before a job finds out",
        later("two_level_mha.check", "add_check"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True)
    asked = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    for name, (text, add_options) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == asked:
            add_options(command)
    try:
        args = parser.parse_args()
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has enough, as `head` does
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()
        sys.exit(1)
