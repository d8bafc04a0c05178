"""Compare runs: a table of what each started from and reached, and the curves of their AP or accuracy.

    yolos compare --output=DIR RUN RUN ...

RUN are workdirs, all of training or all of pre-training, which may still be in progress. DIR receives
compare.md, the table, which is printed too, and compare.png.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from yolos_jax import files, visualize
from yolos_jax.errors import InputError
from yolos_jax.run import cli, config_files, log, run_files
from yolos_jax.tools import flags
from yolos_jax.weights import checkpoint

NUMBERS = {  # the metrics to compare; the first one ranks the runs
    'AP': ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large'),
    'top1': ('top1', 'top5'),
}

LINES = '-', '--', ':', '-.'


class Run(NamedTuple):
    """A run to compare; evaluations: the lines of metrics.jsonl that have the measure."""

    name: str
    config: dict
    digests: dict  # of the data, by split
    measure: str  # 'AP', of pre-training 'top1'
    evaluations: list[dict]
    epochs: float  # that are done

    @property
    def best(self) -> dict:
        """The best evaluation, the first of equals."""
        return max(self.evaluations, key=lambda line: line[self.measure], default={})

    @property
    def reached(self) -> float:
        """The measure of the best evaluation, -1 if there was none."""
        return self.best.get(self.measure, -1)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names of files or folders, with as much of the path as is needed to tell them apart."""
    parts = [folder.parts for folder in folders]
    longest = max(1, *map(len, parts))
    tails = (['/'.join(part[-count:]) for part in parts] for count in range(1, longest + 1))
    return next(names for names in tails if len(set(names)) == len(set(parts)))


def read(folder: Path, name: str) -> Run:
    """A run from its workdir.

    Raises:
        InputError: it is not a workdir, or it has no checkpoint yet.
    """
    if not (folder / run_files.METRICS).exists():
        raise InputError(f'{folder}: not the workdir of a run (no {run_files.METRICS})')
    lines = log.read_metrics(folder)
    try:
        # the first mean of an epoch, named so before version 0.3, whose lines say no epoch
        length = next((line['step'] for line in lines if 'epoch_loss' in line), None)
        if length:
            lines = [{'epoch': line['step'] / length} | line for line in lines]
        epochs = max((line['epoch'] for line in lines), default=0)
        # an AP of -1 is that of no objects
        evaluations = {name: [line for line in lines if line.get(name, -1) != -1] for name in NUMBERS}
    except (TypeError, KeyError) as error:
        raise InputError(f'{folder}/{run_files.METRICS}: not what a run writes ({error})') from None
    meta = checkpoint.newest_meta(folder / checkpoint.FOLDER)
    if not meta:
        raise InputError(f'{folder}: this run has saved no checkpoint yet')
    if not lines:
        raise InputError(f'{folder}/{run_files.METRICS}: has no lines')
    config = meta.get('config', {})
    measure = 'top1' if config_files.is_pretraining(config) else 'AP'
    return Run(name, config, meta.get('data', {}), measure, evaluations[measure], epochs)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The config's values that are not the same in all runs, {key: value of each run}."""
    # the same data may lie in several places
    ignored = {'init_from', 'seed'} | ({'data'} if len(of_data(runs)) == 1 else set())
    keys = sorted(set().union(*(run.config for run in runs)) - ignored)
    values = {key: [str(run.config.get(key, '')) for run in runs] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def of_data(runs: Sequence[Run], split: str | None = None) -> set[str]:
    """The different data sets of the runs, or different versions of a split, as texts."""
    return {json.dumps(run.digests.get(split) if split else run.digests, sort_keys=True) for run in runs}


def table(runs: Sequence[Run]) -> str:
    """Markdown: a row for each run with the numbers of its best evaluation."""
    differing, names = differences(runs), NUMBERS[runs[0].measure]
    starts = names_of([Path(run.config.get('init_from') or '') for run in runs])
    percent = [f'{name} (%)' for name in names]
    rows = [['run', 'starts from', *differing, 'epochs trained', *percent]]
    for i, run in enumerate(runs):
        values = [run.best.get(name, -1) for name in names]  # -1 also if there is no such object
        numbers = [f'{100 * value:.1f}' if value >= 0 else '' for value in values]
        own = [texts[i] for texts in differing.values()]
        rows.append([run.name, starts[i] or 'from scratch', *own, f'{round(run.epochs, 2):g}', *numbers])
    rows = [[str(cell).replace('|', r'\|').replace('\n', ' ') for cell in row] for row in rows]
    rows.insert(1, ['---'] * len(rows[0]))
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def draw(runs: Sequence[Run], path: Path) -> None:
    """The measure in every evaluation by epochs, a line for each run."""
    figure = Figure(figsize=(9, 5.5 + 0.22 * len(runs)), layout='constrained')
    axes = figure.subplots()
    measure = runs[0].measure
    for i, run in enumerate(runs):
        # the name last: a long one is cut
        label = f'{100 * run.reached:.1f}  {run.name}' if run.best else f'not evaluated  {run.name}'
        epochs = [line['epoch'] for line in run.evaluations]
        values = [100 * line[measure] for line in run.evaluations]
        style = LINES[i // 10 % len(LINES)]  # there are ten colours
        axes.plot(epochs, values, marker='.', linestyle=style, label=visualize.plain(label))
    axes.set(xlabel='epochs', ylabel=f'{measure} (%)', xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.4)
    figure.legend(title=f'best {measure}', loc='outside lower left')
    visualize.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and compare."""
    parser = flags.parser(__doc__)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='workdirs')
    parser.add_argument(
        '--output', required=True, type=Path, help='a folder for compare.md and compare.png'
    )
    args = parser.parse_args(arguments)
    files.check_folder(args.output)
    names = names_of([run.resolve() for run in args.runs])
    runs = [read(*run) for run in zip(args.runs, names, strict=True)]
    if len({run.measure for run in runs}) > 1:
        raise InputError('some of these runs train detectors and some pre-train: compare them separately')
    runs.sort(key=lambda run: -run.reached)
    text = table(runs)
    if len(of_data(runs, 'val')) > 1:
        text += f'\nNot all were evaluated on the same images, so {runs[0].measure} does not rank them.\n'
    files.write(args.output / 'compare.md', text.encode())
    draw(runs, args.output / 'compare.png')
    print(text, end='')


if __name__ == '__main__':
    cli.run(main)
