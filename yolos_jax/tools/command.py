"""The `yolos` command: `yolos train ...`, `yolos eval ...` and so on.

Each command is the `main` of a module of `yolos_jax.tools`, imported when it is used; the scripts of the
repository run the same functions.
"""

import sys

import yolos_jax
from yolos_jax.run import cli

COMMANDS = {  # name: (module of yolos_jax.tools, what it does)
    'train': ('train', 'train a detector, as a config says'),
    'pretrain': ('pretrain', 'pre-train a ViT on images with one class each'),
    'eval': ('evaluate', 'measure a detector on a data set'),
    'predict': ('predict', 'detect objects in images and videos'),
    'convert': ('convert', 'convert weights from one format to another'),
    'check': ('check_data', 'check a data set before training on it'),
    'verify': ('verify', 'compare this implementation with the published numbers'),
    'speed': ('speed', 'measure speed, cost and memory'),
    'card': ('card', 'write a model card with the measured results'),
    'compare': ('compare', 'compare runs: a table and curves'),
    'attention': ('attention', 'draw what [DET] tokens look at'),
    'tokens': ('tokens', 'show what [DET] tokens specialise in'),
    'tfds': ('build_tfds', 'pack a data set into few large files'),
    'shapes': ('make_shapes', 'draw a small data set'),
    'quickstart': ('quickstart', 'train a small detector from scratch, in minutes'),
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if name in ('-h', '--help', 'help'):
        print('usage: yolos COMMAND ...    (yolos COMMAND --help for more)\n')
        print('\n'.join(f'  {command:<12} {what}' for command, (_, what) in COMMANDS.items()))
        return
    if name == '--version':
        print(yolos_jax.__version__)
        return
    if name not in COMMANDS:
        sys.exit(f'error: no command {name}; there are {", ".join(COMMANDS)}')
    sys.argv[:2] = [f'yolos {name}']
    cli.start(COMMANDS[name][0])


if __name__ == '__main__':
    main()
