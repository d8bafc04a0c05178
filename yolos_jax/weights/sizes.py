"""Bounds of a model's sizes, for files that may say anything."""

from yolos_jax.errors import InputError
from yolos_jax.model import Yolos

LARGEST = {  # far beyond any ViT; a file that says more is damaged or hostile
    'width': 16_384,
    'depth': 256,
    'heads': 256,
    'num_det_tokens': 10_000,
    'num_classes': 10_001,
}
LONGEST_GRID = 1_024  # patches along a side


def check(model: Yolos) -> None:
    """Raises InputError where a model's sizes are not positive whole numbers within bounds."""
    for name, largest in LARGEST.items():
        value = getattr(model, name)
        if type(value) is not int or not 1 <= value <= largest:
            raise InputError(f'{name} is {str(value)[:50]}, not a number from 1 to {largest}')
    for name in ('pos_grid', 'mid_pos_grid'):
        grid = getattr(model, name)
        if name == 'mid_pos_grid' and grid is None:
            continue
        if len(grid) != 2 or not all(type(n) is int and 1 <= n <= LONGEST_GRID for n in grid):
            raise InputError(f'{name} is {str(grid)[:50]}, not rows and columns from 1 to {LONGEST_GRID}')
    if model.width % model.heads:
        raise InputError(f'width {model.width} is not a multiple of heads {model.heads}')
    if not (isinstance(model.eps, float) and 0 < model.eps < 1):
        raise InputError(f'eps is {str(model.eps)[:50]}, not a number between 0 and 1')
