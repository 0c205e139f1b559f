# SPDX-License-Identifier: Apache-2.0
# The command line: which command, with what. The commands themselves are in doctor.py, plan_cli.py
# and demo.py.
# With --json, stdout carries one JSON object on one line; everything else goes to stderr.
"""`python -m hift_ext doctor | plan | demo`."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence

from rich.console import Console

from hift_ext import demo, doctor
from hift_ext.planning import cli as plan_cli
from hift_ext.schedule import ORDERS

_EXIT_CODES = "exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes them from the command line.

    Returns:
        The exit code: 0 done, 1 failed, 130 interrupted. (Wrong arguments exit with 2.)
    """
    arguments = _parser().parse_args(argv)
    console = Console(stderr=arguments.json)
    try:
        if arguments.command == "doctor":
            result = doctor.run(console, arguments.probe)
        elif arguments.command == "plan":
            result = plan_cli.run(arguments, console)
        else:
            result = demo.run(_demo_options(arguments), console)
        if arguments.json:
            print(json.dumps(result, allow_nan=False), flush=True)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout has left; nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (demo.MissingPackageError, ValueError, RuntimeError, OSError) as error:
        Console(stderr=True).print(f"hift_ext: {error}", markup=False, highlight=False)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hift_ext", description=__doc__, epilog=_EXIT_CODES
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="write one JSON object to stdout")
    commands.add_parser(
        "doctor",
        parents=[shared],
        epilog=_EXIT_CODES,
        help="what was built, what is here, what will be used, what is missing",
    ).add_argument(
        "--probe",
        nargs="?",
        const="missing",
        choices=["missing", "again"],
        help="measure memory, disk and link, and keep the rates: what is not known, or all again",
    )
    plan = commands.add_parser(
        "plan",
        parents=[shared],
        epilog=_EXIT_CODES,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="what training a model on a card takes, and with which settings it fits",
    )
    plan_cli.add_arguments(plan, _positive, _layers)
    _add_demo(
        commands.add_parser(
            "demo",
            parents=[shared],
            epilog=_EXIT_CODES,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            help="fine-tune a pretrained MiniLM on film reviews",
        )
    )
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    default = demo.Options()
    add = parser.add_argument
    add("--optimizer", choices=list(demo.RECIPES), default=default.optimizer, help="the rule")
    add("--order", choices=ORDERS, default=default.order, help="in which order groups are trained")
    add("--layers-per-group", type=_layers, default=1, metavar="M", help='a number, or "all"')
    add("--store", choices=["ram", "disk"], help="where optimizer state rests")
    add(
        "--epochs", type=_positive, default=default.epochs, metavar="N", help="passes over the data"
    )
    add("--steps", type=_positive, metavar="N", help="stop after N steps, whatever --epochs says")
    add("--lr", type=_rate, metavar="X", help="peak learning rate; None: one that suits the rule")
    add("--compare", action="store_true", help="also train all parameters with torch.optim")
    add("--seed", type=int, default=default.seed, help="of the classifier, data order and dropout")
    add("--batch", type=_positive, default=default.batch, metavar="N", help="reviews per step")
    add(
        "--max-length",
        type=_length,
        default=default.max_length,
        metavar="N",
        help="tokens a review",
    )
    parser.set_defaults(store=demo.default_store())


def _demo_options(arguments: argparse.Namespace) -> demo.Options:
    values = vars(arguments)
    return demo.Options(**{k: v for k, v in values.items() if k not in ("command", "json")})


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _length(text: str) -> int:
    if not 3 <= _positive(text) <= 512:
        raise argparse.ArgumentTypeError(
            f"must be 3 to 512 tokens (the model's limit), got {text!r}"
        )
    return int(text)


def _layers(text: str) -> int | str:
    return text if text == "all" else _positive(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return rate
