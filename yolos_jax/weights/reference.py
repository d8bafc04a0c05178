"""Reads and writes detectors as .pth files of the original code (hustvl/YOLOS)."""

from collections.abc import Sequence
from pathlib import Path

from yolos_jax import files, model
from yolos_jax.data import coco_classes
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.patches import PATCH
from yolos_jax.weights import hf, hf_names, names, sizes, tensors, torchfile
from yolos_jax.weights.pretrained import Pretrained, about_ids

PUBLISHED = (model.YOLOS_TI, model.YOLOS_S, model.YOLOS_S_DWR, model.YOLOS_B)


def read(
    file: tensors.TensorFile,
    heads: int | None = None,
    pos_grid: tuple[int, int] | None = None,
    mid_pos_grid: tuple[int, int] | None = None,
) -> Pretrained:
    """The detector in an open file; for the arguments see `Source.detector`.

    Raises:
        InputError: tensors are missing or of another shape, or neither the file, nor the arguments, nor a
            published model of its size say the heads and grids.
    """
    state = hf_names.unwrapped(file.tensors)
    is_hf = hf_names.has_names(state)
    state = hf_names.to_reference(state) if is_hf else state
    for name in ('backbone.pos_embed', 'backbone.det_token'):
        if name not in state or len(state[name].shape) != 3:
            raise InputError(f'no YOLOS detector: {name} is missing or of another shape')
    width, tokens = state['backbone.pos_embed'].shape[-1], state['backbone.det_token'].shape[1]
    depth = sum(name.endswith('.norm1.weight') for name in state)
    args = file.about.get('args')  # of the reference's main.py
    args = args if isinstance(args, dict) else {}
    published = next((p for p in PUBLISHED if (p['width'], p['depth']) == (width, depth)), {})
    heads = heads or args.get('heads') or published.get('heads')
    if not heads:
        raise InputError(
            f'does not say the heads of its {depth} blocks of width {width}; give heads', 'heads'
        )
    grids = pos_grid, _grid_of(args.get('init_pe_size')), published.get('pos_grid')
    mid_grids = mid_pos_grid, _grid_of(args.get('mid_pe_size')), published.get('mid_pos_grid')
    built = Yolos(
        width=width,
        depth=depth,
        heads=heads,
        pos_grid=_fitting(state, 'pos', grids),
        mid_pos_grid=_fitting(state, 'mid_pos', mid_grids),
        num_classes=names.num_classes(state),
        num_det_tokens=tokens,
        eps=file.about.get('eps', hf.EPS if is_hf else Yolos.eps),
    )
    sizes.check(built)
    size = args.get('eval_size') or published_size(width)[0]
    max_size = args.get('max_size') or size * hf.SIZE[1] // hf.SIZE[0]
    about = about_ids(file.about.get('category_ids'))
    return Pretrained(built, names.to_params(state, built), _classes(file, built), size, max_size, about)


def _grid_of(sides: list[int] | None) -> tuple[int, int] | None:
    """The grid of the reference's init_pe_size or mid_pe_size, in pixels."""
    return tuple(side // PATCH for side in sides) if sides else None


def _fitting(state: dict, name: str, grids: Sequence) -> tuple | None:
    """The first of `grids` that fits a position table; raises InputError if none does."""
    if (table := state.get(f'backbone.{name}_embed')) is None:
        return None
    rows = table.shape[-2] - 1 - state['backbone.det_token'].shape[1]
    for grid in grids:
        if grid and grid[0] * grid[1] == rows:
            return tuple(grid)
    raise InputError(
        f'does not say the grid of its {name}_embed ({rows} patches); give {name}_grid as rows, columns',
        f'{name}_grid',
    )


def published_size(width: int) -> tuple[int, int]:
    """`size` and `max_size` of `Pretrained` for the published detector of a width."""
    return (512, 853) if width == model.YOLOS_TI['width'] else hf.SIZE


def _classes(file: tensors.TensorFile, built: Yolos) -> dict:
    classes = file.about.get('classes')
    if isinstance(classes, dict):
        return classes
    numbered = {i: f'class {i}' for i in range(built.num_classes)}
    return coco_classes.COCO if built.num_classes == 91 else numbered


def write(pretrained: Pretrained, folder: str | Path) -> None:
    """Write folder/yolos.pth, which the reference loads with strict=True.

    Raises:
        InputError: the reference has no such model, or `folder` is not empty.
    """
    pretrained.check()
    built = pretrained.model
    hf.check_form(built)
    sides = lambda grid: [PATCH * side for side in grid] if grid else None
    content = {
        'model': names.from_params(pretrained.params, built),
        'args': {
            'init_pe_size': sides(built.pos_grid),
            'mid_pe_size': sides(built.mid_pos_grid),
            'det_token_num': built.num_det_tokens,
            'heads': built.heads,
            'eval_size': pretrained.size,
            'max_size': pretrained.max_size,
        },
        'classes': pretrained.classes,
        'eps': built.eps,
        'category_ids': pretrained.about.get('category_ids', {}),
    }
    with files.new_folder(folder) as part:
        torchfile.write(part / 'yolos.pth', content)
        tensors.write_hash(part / 'yolos.pth')
