"""Checks the sizes of a model against bounds, since a file may claim anything."""

from yolos_jax.errors import InputError
from yolos_jax.model import Yolos

HEADS = {192: 3, 330: 6, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of ViT-Ti, S (dWr), S, B, L and H, by width
LARGEST = {  # far beyond any ViT; a file that says more is damaged or hostile
    'width': 16_384,
    'depth': 256,
    'heads': 256,
    'num_det_tokens': 10_000,
    'registers': 64,
    'num_classes': 10_001,
}
LONGEST_GRID = 1_024  # patches along a side


def check(model: Yolos) -> None:
    """Raises InputError if a model's sizes are not positive whole numbers within bounds."""
    for name, largest in LARGEST.items():
        value = getattr(model, name)
        least = 0 if name == 'registers' else 1
        if type(value) is not int or not least <= value <= largest:
            raise InputError(f'{name} is {str(value)[:50]}, not a number from {least} to {largest}')
    if type(model.rope) is not bool:
        raise InputError(f'rope is {str(model.rope)[:50]}, neither true nor false')
    grids = {name: getattr(model, name) for name in ('pos_grid', 'mid_pos_grid')}
    for name, grid in ((name, grid) for name, grid in grids.items() if grid is not None):
        if len(grid) != 2 or not all(type(n) is int and 1 <= n <= LONGEST_GRID for n in grid):
            raise InputError(f'{name} is {str(grid)[:50]}, not rows and columns from 1 to {LONGEST_GRID}')
    if model.mid_pos_grid is not None and model.depth < 2:
        raise InputError('mid_pos_grid needs tables between blocks, but depth is 1')
    if model.width % model.heads:
        raise InputError(f'width {model.width} is not a multiple of heads {model.heads}')
    if model.rope and model.width // model.heads % 4:
        raise InputError(f'rope needs a head width divisible by 4, not {model.width // model.heads}')
    if not (isinstance(model.eps, float) and 0 < model.eps < 1):
        raise InputError(f'eps is {str(model.eps)[:50]}, not a number between 0 and 1')
