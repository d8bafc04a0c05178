"""Convert weights: PyTorch's and Hugging Face's into this project's checkpoints, and back.

    python convert_torch_weights.py --input=yolos_s.pth --output=DIR            # to a checkpoint
    python convert_torch_weights.py --input=DIR --output=OTHER_DIR --to=hf      # for transformers
    python convert_torch_weights.py --input=DIR --output=OTHER_DIR --to=yolos   # for the original code
    python convert_torch_weights.py --input=deit_tiny.pth --output=DIR          # a backbone, heads fresh

--input is anything `yolos_jax.load` takes, or a backbone of a published model's width and depth. Nothing in
a file is executed, and the output appears whole or not at all.
"""

import argparse

import jax

from yolos_jax import adapt, backbones, cli, export, weights
from yolos_jax.data import annotations, coco
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos

WRITERS = {'jax': export.to_jax, 'hf': export.to_hf, 'yolos': export.to_yolos}


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--input', required=True, help='a .pth, Hugging Face folder, checkpoint or workdir')
    parser.add_argument('--output', required=True, help='a new folder')
    parser.add_argument('--to', default='jax', choices=WRITERS, help='the form to write (jax)')
    unsaid = parser.add_argument_group('what a .pth of no published model does not say')
    unsaid.add_argument('--heads', type=int)
    unsaid.add_argument('--pos_grid', type=int, nargs=2, metavar=('ROWS', 'COLUMNS'))
    unsaid.add_argument('--mid_pos_grid', type=int, nargs=2, metavar=('ROWS', 'COLUMNS'))
    change = parser.add_argument_group('for another task')
    change.add_argument('--new_classes', metavar='JSON', help='a COCO annotation file with the classes')
    change.add_argument('--new_det_tokens', type=int, metavar='N')
    change.add_argument('--new_pos_grid', type=int, nargs=2, metavar=('ROWS', 'COLUMNS'))
    change.add_argument('--seed', type=int, default=0, help='of what starts fresh')
    return parser.parse_args()


def read_backbone(path, seed):
    """A backbone as the detector of its published model, heads and [DET] tokens fresh."""
    width, depth = backbones.size(path)
    fields = next((p for p in weights.PUBLISHED if (p['width'], p['depth']) == (width, depth)), None)
    if fields is None:
        raise InputError(
            f'{path}: a ViT of width {width} and depth {depth}, which no published detector has; write a '
            'config for it, and give the file to train.py as --config.init_from'
        )
    model = Yolos(**fields)
    params = backbones.init_from_backbone(path, model, jax.random.key(seed))
    return weights.Weights(model, params, coco.CLASSES, 800, 1333, weights.origin(path))


def adapted(found, args):
    """The detector with the changes asked for, each said."""
    changes = []
    if args.new_classes:
        changes.append((adapt.with_classes, annotations.read_classes(args.new_classes), args.seed))
    if args.new_det_tokens:
        changes.append((adapt.with_det_tokens, args.new_det_tokens, args.seed))
    if args.new_pos_grid:
        changes.append((adapt.with_pos_grid, args.new_pos_grid))
    for change, *how in changes:
        found, said = change(found, *how)
        print(f'  {said}')
    return found


def main():
    """Parse the arguments and convert."""
    args = parse()
    jax.config.update(
        'jax_platforms', 'cpu'
    )  # nothing to gain from an accelerator, nor a need for a free one
    export.check_free(args.output)
    if weights.holds_detector(args.input):
        found = weights.read(args.input, args.heads, args.pos_grid, args.mid_pos_grid, print)
    else:
        found = read_backbone(args.input, args.seed)
    found = adapted(found, args)
    WRITERS[args.to](found, args.output)
    count = sum(x.size for x in jax.tree.leaves(found.params))
    print(f'{args.output}: {count:,} parameters, {len(found.classes)} classes, as {args.to}')


if __name__ == '__main__':
    cli.run(main)
