"""Train a small detector from scratch, and look at its detections.

    yolos quickstart [FOLDER]

draws 2,000 pictures of coloured shapes, trains on them for about four minutes (two CPU cores), prints
COCO's twelve numbers, and writes curves, pictures and a report to FOLDER/quickstart (runs/quickstart).
"""

from collections.abc import Sequence
from pathlib import Path

from yolos_jax.configs import quickstart
from yolos_jax.errors import InputError
from yolos_jax.run import cli
from yolos_jax.run.stop import StopSignal
from yolos_jax.run.train import train
from yolos_jax.tools import evaluate, flags, make_shapes, predict


@cli.without_flags('output', 'workdir')
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the argument and train, evaluate and predict."""
    parser = flags.parser(__doc__)
    parser.add_argument('folder', nargs='?', type=Path, default=Path('runs'), help='for all output (runs)')
    parser.add_argument('--epochs', type=int, default=quickstart.get_config().epochs, help='(%(default)s)')
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        raise InputError(f'epochs is {args.epochs}, not 1 or more', 'epochs')
    stop, data, workdir = StopSignal(), args.folder / 'shapes', args.folder / 'quickstart'
    cli.keep_memory()
    make_shapes.write(data)
    config = quickstart.get_config()
    with config.unlocked():
        config.data = str(data)
        config.epochs = args.epochs
    if number := train(config, workdir, stop=stop):
        cli.leave(128 + number)
    stop.release()
    weights = f'--weights={workdir}'
    output = f'--output={workdir / "eval"}'
    evaluate.main([weights, f'--data={data}', output, '--report', '--num_processes=1'])
    images = [str(data / 'val2017' / f'{i:012d}.jpg') for i in range(10, 20)]
    pictures = workdir / 'pictures'
    predict.main([weights, f'--output={pictures}', '--threshold=0.7', '--overwrite', *images])
    report = workdir / 'eval' / 'report.html'
    print(f'Curves: {workdir / "curves.png"}  Detections: {pictures}/  Report: {report}')


if __name__ == '__main__':
    cli.run(main)
