"""Reads and writes any detector as model.safetensors with a config.json of our own.

The formats of the original and of transformers support no registers and no rotary positions. Tensors have
the names of the original.
"""

from pathlib import Path

from yolos_jax import files
from yolos_jax.weights import checkpoint, model_card, names, safetensors, tensors
from yolos_jax.weights.pretrained import Pretrained, about_ids
from yolos_jax.weights.tensors import CONFIG, SAFETENSORS, TensorFile

MODEL_TYPE = 'yolos_jax'


def is_native(file: TensorFile) -> bool:
    """Whether a file has a config.json of ours beside it; raises InputError if that cannot be read.

    A config.json beside a .pth is that of something else.
    """
    return file.path.suffix == '.safetensors' and file.beside(CONFIG).get('model_type') == MODEL_TYPE


def read(file: TensorFile) -> Pretrained:
    """The detector in an open file; raises InputError if config.json cannot be used."""
    config = file.beside(CONFIG)
    model = checkpoint.model_of(config['model'])
    classes = {int(number): str(name) for number, name in config['classes'].items()}
    size, max_size = config['eval_size']
    about = about_ids(config.get('about', {}).get('category_ids'))
    return Pretrained(model, names.to_params(file.tensors, model), classes, size, max_size, about)


def write(pretrained: Pretrained, folder: str | Path) -> None:
    """Write a folder with the detector; raises InputError if `folder` is not empty."""
    pretrained.check()
    with files.new_folder(folder) as part:
        path = part / SAFETENSORS
        safetensors.write(path, names.from_params(pretrained.params, pretrained.model))
        files.write_json(part / CONFIG, {'model_type': MODEL_TYPE} | checkpoint.describe(pretrained))
        tensors.write_hash(path, part / CONFIG)
        files.write(part / 'README.md', model_card.text(pretrained).encode())
