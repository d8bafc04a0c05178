"""The argparse flags that several commands share."""

import argparse
from pathlib import Path
from typing import Any

from yolos_jax.errors import InputError

WEIGHTS = 'a workdir, checkpoint, Hugging Face folder or .pth, or a name (hustvl/yolos-tiny)'
STEP = 'the step of a run to read (the best by AP, else the newest)'


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser that is described by the first line of its script's docstring; `python -OO` has none."""
    return argparse.ArgumentParser(description=(docstring or '').split('\n')[0])


def add_weights(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The arguments of `weights.read`; returns the group of those for a .pth."""
    parser.add_argument('--weights', required=True, help=WEIGHTS)
    parser.add_argument('--step', type=int, help=STEP)
    return add_hints(parser)


def add_hints(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The arguments for `weights.HINTS`."""
    group = parser.add_argument_group('for a .pth that is not of a published model')
    group.add_argument('--heads', type=int)
    group.add_argument('--pos_grid', type=int, nargs=2, metavar=('ROWS', 'COLUMNS'))
    group.add_argument('--mid_pos_grid', type=int, nargs=2, metavar=('ROWS', 'COLUMNS'))
    return group


def add_font(parser: argparse._ActionsContainer) -> None:
    """The argument for the `font` of `visualize.draw`."""
    parser.add_argument('--font', type=Path, help='a font file, for scripts that DejaVu Sans lacks')


def hints(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `weights.HINTS` among the arguments."""
    return {'heads': args.heads, 'pos_grid': args.pos_grid, 'mid_pos_grid': args.mid_pos_grid}


def check_threshold(threshold: float) -> None:
    """Raises InputError if the score threshold is not between 0 and 1."""
    if not 0 <= threshold <= 1:
        raise InputError(f'threshold is {threshold}, not between 0 and 1', 'threshold')


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cluster.start`, for a script that parses its flags with argparse."""
    parser.add_argument('--coordinator', help='host:port of process 0, if no scheduler lists the hosts')
    parser.add_argument('--num_processes', type=int, help='number of processes; 1 always runs alone')
    parser.add_argument('--process_id', type=int, help='number of this process: 0, 1, ...')
    parser.add_argument('--heartbeat', type=int, default=30, help='seconds until a silent process is dead')
