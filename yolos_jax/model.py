"""YOLOS: a plain ViT over one sequence of patches and [DET] tokens (arXiv 2106.00666, section 3).

Parameters carry the names of the reference checkpoint (hustvl/YOLOS, models/detector.py).

Letters: as in `vit`; C classes.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import attention, spmd
from yolos_jax.block import Dense, torch_uniform
from yolos_jax.patches import PATCH_DIM
from yolos_jax.vit import Backbone

# The published models. Their grids are the reference's init_pe_size and mid_pe_size // 16.
YOLOS_TI: dict[str, Any] = dict(width=192, depth=12, heads=3, pos_grid=(50, 83))
YOLOS_S: dict[str, Any] = dict(width=384, depth=12, heads=6, pos_grid=(32, 54), mid_pos_grid=(32, 54))
YOLOS_S_DWR: dict[str, Any] = dict(width=330, depth=14, heads=6, pos_grid=(32, 54), mid_pos_grid=(32, 54))
YOLOS_B: dict[str, Any] = dict(width=768, depth=12, heads=12, pos_grid=(50, 84), mid_pos_grid=(50, 84))


class Head(nn.Module):
    """DETR's three-layer ReLU perceptron, in float32: [B, Q, D] to [B, Q, features]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, init = x.shape[-1], torch_uniform(x.shape[-1])
        for i, features in enumerate((D, D, self.features)):
            x = nn.relu(x) if i else x
            x = Dense(features, jnp.float32, init, init, name=f'layers_{i}')(x)
        return x


class Yolos(nn.Module):
    """The detector. Its gradients are of reverse mode only (`jax.grad`, `jax.vjp`).

    Attributes:
        width, depth, heads: of the ViT; `YOLOS_TI`, `YOLOS_S`, `YOLOS_S_DWR` and `YOLOS_B` hold those of
            the published models.
        num_classes: C, labels are 0..C-1 (91 for COCO's raw ids); the last logit is "no object".
        num_det_tokens: Q. registers: R, tokens without a position between [CLS] and [DET] (DINOv2, DINOv3).
        pos_grid, mid_pos_grid: (rows, columns) of the position tables; None for none.
        rope: whether queries and keys of patches get rotary positions, as in DINOv3 (`rope.angles`).
        eps: of LayerNorm; 1e-6 in the reference, 1e-12 in Hugging Face's checkpoints.
        dtype: of activations and products; parameters, norms, softmax and heads are float32.
        remat: how many of the first blocks are computed again in the backward pass, instead of keeping
            their activations. The last block, which computes only [DET] tokens, always keeps them.
        attention_kernel: a function of `attention`; `attention.for_platform` chooses the fastest. The
            default, `attention.dense`, is exact and runs on every platform, but keeps all scores in memory.
    """

    width: int
    depth: int
    heads: int
    pos_grid: tuple | None
    mid_pos_grid: tuple | None = None
    num_classes: int = 91
    num_det_tokens: int = 100
    registers: int = 0
    rope: bool = False
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: int = 0
    attention_kernel: Callable = attention.dense

    def __post_init__(self) -> None:
        # JSON gives lists, but a model must be hashable to be a static argument of the jitted `init_params`
        self.pos_grid = self.pos_grid and tuple(self.pos_grid)
        self.mid_pos_grid = self.mid_pos_grid and tuple(self.mid_pos_grid)
        super().__post_init__()

    @property
    def special(self) -> int:
        """How many tokens there are beside the patches."""
        return 1 + self.registers + self.num_det_tokens

    @nn.compact
    def __call__(self, patches: jax.Array, grid: jax.Array) -> dict[str, jax.Array]:
        """Detections of B images.

        Args:
            patches: uint8 [B, N, 768], row-major 16x16x3 patches, padded at the end to N.
            grid: int32 [B, 2], the rows and columns of each image's patches; rows * columns <= N and
                neither above `patches.longest_side(N)` (`patchify` checks both).

        Returns:
            'pred_logits' [B, Q, C + 1] and 'pred_boxes' [B, Q, 4], cxcywh in 0..1 of the image, float32.

        Raises:
            ValueError: patches are not uint8 [B, N, 768] or the width does not divide into heads.
        """
        _check(self, patches)
        backbone = Backbone(
            width=self.width, depth=self.depth, heads=self.heads, num_det_tokens=self.num_det_tokens,
            registers=self.registers, rope=self.rope, pos_grid=self.pos_grid,
            mid_pos_grid=self.mid_pos_grid, eps=self.eps, dtype=self.dtype, remat=self.remat,
            attention_kernel=self.attention_kernel, name='backbone',
        )  # fmt: skip
        x = backbone(patches, grid)  # [B, Q, D]
        logits = Head(self.num_classes + 1, name='class_embed')(x)
        boxes = nn.sigmoid(Head(4, name='bbox_embed')(x))
        return {'pred_logits': logits, 'pred_boxes': boxes}


class Vit(nn.Module):
    """The ViT of a detector alone, for its features: no [DET] tokens, no tables between the blocks.

    Its attributes and parameters are those of `Yolos` without the missing parts: no `det_token`, no
    `mid_pos_embed`, and `pos_embed` without its last rows, those of the [DET] tokens.
    """

    width: int
    depth: int
    heads: int
    pos_grid: tuple | None
    registers: int = 0
    rope: bool = False
    eps: float = 1e-6
    dtype: Any = jnp.float32
    attention_kernel: Callable = attention.dense

    def __post_init__(self) -> None:
        self.pos_grid = self.pos_grid and tuple(self.pos_grid)  # as in `Yolos`
        super().__post_init__()

    @nn.compact
    def __call__(self, patches: jax.Array, grid: jax.Array) -> dict[str, jax.Array]:
        """Features of B images, after the last norm; patches, grid: as for `Yolos`, and raises as it does.

        Returns:
            'cls' [B, D], of the [CLS] token, and 'patches' [B, N, D], float32; those of padding mean
            nothing.
        """
        _check(self, patches)
        x = Backbone(
            width=self.width, depth=self.depth, heads=self.heads, num_det_tokens=0,
            registers=self.registers, rope=self.rope, pos_grid=self.pos_grid, mid_pos_grid=None,
            eps=self.eps, dtype=self.dtype, remat=0, attention_kernel=self.attention_kernel,
            rows_out=(0, None), name='backbone',
        )(patches, grid)  # fmt: skip
        first = 1 + self.registers
        return {'cls': x[:, 0], 'patches': x[:, first : first + patches.shape[1]]}


def _check(model: Yolos | Vit, patches: jax.Array) -> None:
    """Raises ValueError as the models do."""
    if patches.dtype != jnp.uint8 or patches.ndim != 3 or patches.shape[-1] != PATCH_DIM:
        raise ValueError(
            f'patches are {patches.dtype} {list(patches.shape)}; the model takes uint8 [B, N, 768] '
            'as yolos_jax.patchify makes them (pixels are normalised on the device)'
        )
    if model.width % model.heads or model.rope and model.width // model.heads % 4:
        raise ValueError(
            f'width {model.width} is not a multiple of heads {model.heads}{", 4 times" * model.rope}'
        )


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: Yolos | Vit, rng: jax.Array) -> dict:
    """Fresh parameters of a model, as arrays on the default device."""
    rows = spmd.num_devices()  # of the smallest batch: parameters do not depend on it
    one_patch = np.zeros((rows, 1, PATCH_DIM), np.uint8), np.ones((rows, 2), np.int32)
    return model.init(rng, *one_patch)['params']


def param_shapes(model: Yolos | Vit) -> dict:
    """The shapes and types of a model's parameters; nothing is computed."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
