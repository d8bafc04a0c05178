"""Reads the JSON files beside the weights of other projects: of Hugging Face, with timm's inside."""

from yolos_jax import rope
from yolos_jax.errors import InputError
from yolos_jax.weights.tensors import CONFIG, WITH_CONFIG, TensorFile

# the tanh forms differ by 4e-4 in features
GELUS = 'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'gelu_tanh', 'gelu_fast'


def read(file: TensorFile, name: str) -> dict:
    """The object in a JSON file of a Hugging Face folder, merged with those inside timm's; else empty.

    Raises:
        InputError: it cannot be read.
    """
    if file.path.name not in WITH_CONFIG:
        return {}
    config = file.beside(name)
    for inner in ('pretrained_cfg', 'model_args'):
        if not isinstance(config.get(inner) or {}, dict):
            raise InputError(f'{name}: its {inner} is no JSON object')
    return config | (config.get('pretrained_cfg') or {}) | (config.get('model_args') or {})


def heads(file: TensorFile) -> int | None:
    """The number of heads that a file or the config.json beside it says; None if neither does."""
    config = read(file, CONFIG)
    count = file.about.get('heads') or config.get('num_attention_heads') or config.get('num_heads')
    return count if type(count) is int else None


def check(file: TensorFile, *, has_table: bool) -> None:
    """Raises InputError if config.json asks for other activations or positions than ours.

    has_table: whether the file has a table of positions.
    """
    config = read(file, CONFIG)
    for key in ('hidden_act', 'act_layer'):  # Hugging Face's, timm's
        if (activation := config.get(key) or GELUS[0]) not in GELUS:
            raise InputError(f'{CONFIG} says {key} is {activation!r}; only {GELUS[0]!r} works')
    if (base := config.get('rope_theta', rope.BASE)) != rope.BASE:
        raise InputError(f'{CONFIG} says rope_theta is {base!r}; only {rope.BASE:g} works')
    for key in ('image_size', 'img_size', 'input_size'):  # timm's last has the channels first
        if has_table and isinstance(size := config.get(key), list) and len(set(size[-2:])) > 1:
            raise InputError(f'{CONFIG} says {key} is {size}; only positions of a square can be read')
    if '_rope_' in (architecture := str(config.get('architecture'))):  # timm's, with a table too
        raise InputError(f'{CONFIG} says architecture is {architecture!r}, whose positions are others')
