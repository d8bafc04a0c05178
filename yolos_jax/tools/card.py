"""Write the model card of a detector, with the results of its evaluation and speed test.

    yolos card --weights=PATH --output=README.md [--evaluation=DIR] [--speed=DIR]

DIR are output folders of `yolos eval` (with --report, for groups) and `yolos speed`.
"""

from collections.abc import Sequence
from pathlib import Path

from yolos_jax import files, weights
from yolos_jax.errors import InputError
from yolos_jax.run import cli
from yolos_jax.tools import flags
from yolos_jax.tools.prediction_files import EVALUATION
from yolos_jax.weights import hf, integrity, model_card


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and write."""
    parser = flags.parser(__doc__)
    flags.add_weights(parser)
    parser.add_argument('--output', required=True, type=Path, help='the file to write')
    parser.add_argument('--evaluation', type=Path, help='an output folder of yolos eval')
    parser.add_argument('--speed', type=Path, help='an output folder of yolos speed')
    args = parser.parse_args(arguments)
    files.check_file(args.output, 'output', '.md')
    measured = {}
    if args.evaluation:
        measured['metrics'] = files.read_json(args.evaluation / EVALUATION)
        if (args.evaluation / 'report.json').exists():
            measured['report'] = files.read_json(args.evaluation / 'report.json')
    if args.speed:
        measured['speed'] = files.read_json(args.speed / 'speed.json')
    with weights.open(args.weights, args.step) as source:
        pretrained = source.detector(log=print, **flags.hints(args))
        library = 'transformers' if source.file and hf.has_config(source.file) else 'yolos_jax'
    about = {'fingerprint': integrity.fingerprint(pretrained.params), **pretrained.about}
    evaluated, timed = measured.get('metrics', {}).get('about', {}), measured.get('speed', {})
    for name, of_file in (('evaluation', evaluated), ('speed', timed)):
        # earlier versions wrote no fingerprint
        keys = ['fingerprint'] if 'fingerprint' in of_file else ['step', 'sha256']
        for key in keys:
            if key in of_file and key in about and of_file[key] != about[key]:
                folder = getattr(args, name)
                raise InputError(f'{folder}: measured other weights, with {key} {of_file[key]}', name)
    try:
        card = model_card.text(pretrained, library=library, **measured)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        folders = ' or '.join(str(folder) for folder in (args.evaluation, args.speed) if folder)
        raise InputError(f'{folders}: one of its files is not of this version ({error!r})') from None
    files.write(args.output, card.encode())
    print(args.output)


if __name__ == '__main__':
    cli.run(main)
