"""Convert weights: PyTorch's and Hugging Face's into this project's checkpoints, and back.

    yolos convert --input=yolos_s.pth --output=DIR            # to a checkpoint
    yolos convert --input=DIR --output=OTHER_DIR --to=hf      # for transformers
    yolos convert --input=DIR --output=OTHER_DIR --to=yolos   # for the original code
    yolos convert --input=DIR --output=OTHER_DIR --to=safetensors  # any model, for this project
    yolos convert --input=deit_tiny.pth --output=DIR          # a backbone, heads fresh

--input is anything `yolos_jax.load` takes, or a backbone of a published model's width and depth. Nothing in
a file is executed, and the output appears whole or not at all.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import jax

from yolos_jax import bucket, weights
from yolos_jax.data import annotations, coco_classes, records
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.run import cli
from yolos_jax.tools import flags
from yolos_jax.weights import Pretrained, adapt, checkpoint, hf, native, reference
from yolos_jax.weights.pretrained import about_ids
from yolos_jax.weights.source import check_unused

WRITERS = {'jax': checkpoint.write, 'hf': hf.write, 'yolos': reference.write, 'safetensors': native.write}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = flags.parser(__doc__)
    parser.add_argument('--input', required=True, help=flags.WEIGHTS)
    parser.add_argument('--step', type=int, help=flags.STEP)
    parser.add_argument('--output', required=True, help='a new folder, or its URL in a bucket')
    parser.add_argument('--to', default='jax', choices=WRITERS, help='the format to write (jax)')
    flags.add_hints(parser)
    change = parser.add_argument_group('for another task')
    change.add_argument('--new_classes', metavar='JSON', help='a COCO annotation file with the classes')
    change.add_argument('--new_det_tokens', type=int, metavar='N')
    change.add_argument('--new_pos_grid', type=int, nargs=2, metavar=('ROWS', 'COLUMNS'))
    change.add_argument('--seed', type=int, default=0, help='seed of new parameters')
    args = parser.parse_args(arguments)
    if args.seed < 0:
        raise InputError(f'seed is {args.seed}, less than 0', 'seed')
    return args


def from_backbone(source: weights.Source, seed: int) -> Pretrained:
    """A backbone as the detector of its published model, heads and [DET] tokens fresh."""
    fields = source.backbone_fields()
    is_like = lambda model: all(model[key] == fields[key] for key in ('width', 'depth'))
    published = next(filter(is_like, reference.PUBLISHED), None)
    if published is None or fields['registers'] or fields['rope']:
        size = ', '.join(f'{key} {value}' for key, value in fields.items())
        raise InputError(
            f'{source.path}: a ViT of {size}, which no published detector has; give the file to yolos '
            'train as --config.init_from, with a config whose model is so (as yolos_dinov2_s, '
            'yolos_dinov3_s and _b are)'
        )
    model = Yolos(**published)
    params = source.backbone(model, jax.random.key(seed))
    return Pretrained(
        model, params, coco_classes.COCO, *reference.published_size(model.width), source.about
    )


def adapted(pretrained: Pretrained, args: argparse.Namespace) -> Pretrained:
    """The detector with the changes asked for, each reported."""
    if args.new_classes:
        names = annotations.read_classes(args.new_classes)
        classes, ids = records.numbered(names)
        pretrained, report = adapt.with_classes(pretrained, classes, args.seed)
        if classes != names:
            pretrained = dataclasses.replace(pretrained, about=pretrained.about | about_ids(ids))
        print(f'  {report}')
    if args.new_det_tokens is not None:
        pretrained, report = adapt.with_det_tokens(pretrained, args.new_det_tokens, args.seed)
        print(f'  {report}')
    if args.new_pos_grid:
        pretrained, report = adapt.with_pos_grid(pretrained, args.new_pos_grid)
        print(f'  {report}')
    return pretrained


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and convert."""
    args = parse(arguments)
    # an accelerator would not help, and may be in use
    jax.config.update('jax_platforms', 'cpu')
    with bucket.output_folder(args.output) as folder:
        with weights.open(args.input, args.step) as source:
            if source.is_detector:
                pretrained = source.detector(**flags.hints(args), log=print)
            else:
                check_unused(flags.hints(args), source.path)
                pretrained = from_backbone(source, args.seed)
        pretrained = adapted(pretrained, args)
        WRITERS[args.to](pretrained, folder)
    count = sum(x.size for x in jax.tree.leaves(pretrained.params))
    print(f'{args.output}: {count:,} parameters, {len(pretrained.classes)} classes, as {args.to}')


if __name__ == '__main__':
    cli.run(main)
