"""README.md of an exported detector: what is known of it, and no more."""

from yolos_jax.patches import PATCH
from yolos_jax.weights.pretrained import Pretrained

RECIPE = (  # (what a reader calls it, key of the config)
    ('epochs', 'epochs'),
    ('global batch size', 'batch_size'),
    ('learning rate', 'learning_rate'),
    ('weight decay', 'weight_decay'),
    ('shorter sides in training', 'augment.sizes'),
    ('training split', 'train_split'),
)


def text(pretrained: Pretrained) -> str:
    """The card as Markdown, with the metadata that Hugging Face reads."""
    model, about, config = pretrained.model, pretrained.about, pretrained.about.get('config', {})
    ap = f'{about["AP"]:.3f} on {config["val_split"]}' if 'AP' in about else 'not measured'
    source = f'{about["source"]}, SHA-256 {about["sha256"]}' if 'source' in about else 'no other weights'
    classes = ', '.join(name for _, name in sorted(pretrained.classes.items()))
    size, max_size = pretrained.size, pretrained.max_size
    recipe = [f'* {name}: {config[key]}' for name, key in RECIPE if key in config]
    return '\n'.join(
        [
            '---',
            'library_name: transformers',
            'pipeline_tag: object-detection',
            'tags: [object-detection, yolos, vision]',
            '---',
            '# YOLOS detector',
            '',
            'You Only Look at One Sequence (arXiv 2106.00666): a plain ViT with [DET] tokens, written by',
            'yolos_jax.',
            '',
            '| | |',
            '|---|---|',
            f'| width, depth, heads | {model.width}, {model.depth}, {model.heads} |',
            f'| [DET] tokens | {model.num_det_tokens} |',
            f'| position tables | {model.pos_grid[0]}x{model.pos_grid[1]} patches of {PATCH} pixels |',
            f'| AP | {ap} |',
            f'| from | {source} |',
            '',
            '## Input and output',
            '',
            f'An RGB image, its shorter side resized to {size} pixels and the longer one to at most',
            f'{max_size}, normalised by the mean and deviation of preprocessor_config.json. Give one',
            'image at a time: padding of a batch changes the detections of transformers\' YOLOS.',
            '',
            f'`logits` [B, {model.num_det_tokens}, {model.num_classes + 1}], the last "no object", and',
            f'`pred_boxes` [B, {model.num_det_tokens}, 4], cxcywh in 0..1 of the image.',
            '',
            f'Classes: {classes}.',
            *(['', '## Training', '', *recipe] if recipe else []),
            '',
        ]
    )  # fmt: skip
