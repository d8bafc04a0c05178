"""YOLOS: a plain ViT over one sequence of patches and [DET] tokens (arXiv 2106.00666, section 3).

Parameters carry the names of the reference checkpoint (hustvl/YOLOS, models/backbone.py and
detector.py), with Flax's kernel and scale for torch's weight and the blocks stacked on a leading axis.

Letters: B batch, N patches, Q [DET] tokens, S = 1 + Q + N tokens, D width, H heads, C classes, L blocks.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import posembed, sharding
from yolos_jax.attention import attention

PATCH = 16
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet, on pixels in 0..1
STD = np.array([0.229, 0.224, 0.225], np.float32)

# The published models. Their grids are the reference's init_pe_size and mid_pe_size // 16.
YOLOS_TI = dict(width=192, depth=12, heads=3, pos_grid=(50, 83))
YOLOS_S = dict(width=384, depth=12, heads=6, pos_grid=(32, 54), mid_pos_grid=(32, 54))
YOLOS_S_DWR = dict(width=330, depth=14, heads=6, pos_grid=(32, 54), mid_pos_grid=(32, 54))
YOLOS_B = dict(width=768, depth=12, heads=12, pos_grid=(50, 84), mid_pos_grid=(50, 84))

_small_normal = nn.initializers.normal(0.02)
_xavier = nn.initializers.xavier_uniform()  # for training from nothing; pre-trained weights replace it


def _torch_uniform(fan_in):
    bound = fan_in**-0.5
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)


class Dense(nn.Module):
    """A dense layer that can compute a part of its outputs, the `columns`."""

    features: int
    dtype: Any
    kernel_init: Any = _xavier
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x, columns=slice(None)):
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
        bias = self.param('bias', self.bias_init, (self.features,))
        return x.astype(self.dtype) @ kernel[:, columns].astype(self.dtype) + bias[columns].astype(
            self.dtype
        )


class Attention(nn.Module):
    """Self-attention of the tokens in `rows` to all tokens of the sequence."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, lengths, rows):
        D = x.shape[-1]
        qkv = Dense(3 * D, self.dtype, name='qkv')
        split = lambda y: y.reshape(*y.shape[:2], -1, self.heads, D // self.heads)
        q = split(qkv(x[:, rows], slice(None, D)))[:, :, 0]  # [B, M, H, d]
        kv = split(qkv(x, slice(D, None)))  # [B, S, 2, H, d]
        y = attention(q, kv[:, :, 0], kv[:, :, 1], lengths)
        return Dense(D, self.dtype, name='proj')(y.reshape(*y.shape[:2], D))


class Mlp(nn.Module):
    """Two dense layers around the exact (erf) GELU; the tanh form moves logits by 5e-4."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = Dense(4 * x.shape[-1], self.dtype, name='fc1')(x)
        return Dense(x.shape[-1], self.dtype, name='fc2')(nn.gelu(y, approximate=False))


class Block(nn.Module):
    """A pre-norm transformer block; only the tokens in `rows` come out."""

    heads: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x, lengths, rows=slice(None)):
        norm = lambda name: nn.LayerNorm(self.eps, use_fast_variance=False, name=name)
        y = norm('norm1')(x).astype(self.dtype)
        x = x[:, rows] + Attention(self.heads, self.dtype, name='attn')(y, lengths, rows)
        y = norm('norm2')(x).astype(self.dtype)
        return x + Mlp(self.dtype, name='mlp')(y)


class PatchEmbed(nn.Module):
    """uint8 patches [B, N, 768] to tokens [B, N, D]: normalised, then the ViT's convolution."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, patches):
        pixels = patches.reshape(*patches.shape[:2], -1, 3).astype(jnp.float32) / 255
        pixels = ((pixels - MEAN) / STD).reshape(patches.shape)
        init = _torch_uniform(patches.shape[-1])
        return Dense(self.width, self.dtype, init, init, name='proj')(pixels)


class Backbone(nn.Module):
    """The encoder: patches [B, N, 768] and grid [B, 2] to [DET] features [B, Q, D]."""

    width: int
    depth: int
    heads: int
    num_det_tokens: int
    pos_grid: tuple
    mid_pos_grid: tuple | None
    eps: float
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, patches, grid):
        B, N, _ = patches.shape
        D, Q, L = self.width, self.num_det_tokens, self.depth
        rows = lambda table_grid: 1 + table_grid[0] * table_grid[1] + Q
        cls = self.param('cls_token', _small_normal, (1, 1, D))
        det = self.param('det_token', _small_normal, (1, Q, D))
        pos = self.param('pos_embed', self._init_positions, (1, rows(self.pos_grid), D))

        layout = posembed.layout(self.pos_grid, grid, N)
        special = jnp.broadcast_to(jnp.concatenate([cls, det], axis=1), (B, 1 + Q, D))
        tokens = PatchEmbed(D, self.dtype, name='patch_embed')(patches)
        x = jnp.concatenate([special.astype(self.dtype), tokens], axis=1)  # [B, S, D]
        x = x + self._positions(pos, self.pos_grid, layout).astype(self.dtype)
        lengths = 1 + Q + grid[:, 0] * grid[:, 1]

        block = Block(self.heads, self.eps, self.dtype, parent=None)
        blocks = self.param('blocks', self._init_blocks, block)
        scanned = {'block': jax.tree.map(lambda p: p[:-1], blocks)}
        if self.mid_pos_grid is not None:
            shape = (L - 1, 1, rows(self.mid_pos_grid), D)
            scanned['pos'] = self.param('mid_pos_embed', _small_normal, shape)
            layout = posembed.layout(self.mid_pos_grid, grid, N)

        def step(x, xs):
            xs = sharding.gathered(xs)
            x = block.apply({'params': xs['block']}, x, lengths)
            if 'pos' in xs:
                pos = self._positions(xs['pos'], self.mid_pos_grid, layout)
                x = x + pos.astype(self.dtype)
            return x, None

        x, _ = jax.lax.scan(jax.checkpoint(step) if self.remat else step, x, scanned)
        last = {'params': sharding.gathered(jax.tree.map(lambda p: p[-1], blocks))}
        x = block.apply(last, x, lengths, slice(1, 1 + Q))  # exact, and 7 % of the work saved
        return nn.LayerNorm(self.eps, use_fast_variance=False, name='norm')(x)

    def _init_positions(self, rng, shape):
        patches = posembed.sine(self.pos_grid, self.width)
        return _small_normal(rng, shape).at[0, 1 : 1 + len(patches)].set(patches)

    def _init_blocks(self, rng, block):
        token = jnp.zeros((1, 1, self.width))
        init = lambda rng: block.init(rng, token, jnp.ones((1,), jnp.int32))['params']
        return jax.vmap(init)(jax.random.split(rng, self.depth))

    def _positions(self, table, table_grid, layout):
        """A table [1, 1 + rows * columns + Q, D] as the sequence's positions [B, S, D]."""
        Q, D = self.num_det_tokens, table.shape[-1]
        patches = posembed.spread(table[0, 1:-Q].reshape(*table_grid, D), layout)
        special = jnp.concatenate([table[:, :1], table[:, -Q:]], axis=1)
        special = jnp.broadcast_to(special, (len(patches), 1 + Q, D))
        return jnp.concatenate([special, patches], axis=1)


class Head(nn.Module):
    """DETR's three-layer ReLU perceptron, in float32: [B, Q, D] to [B, Q, features]."""

    features: int

    @nn.compact
    def __call__(self, x):
        init = _torch_uniform(x.shape[-1])
        dense = lambda n, i: Dense(n, jnp.float32, init, init, name=f'layers_{i}')
        x = nn.relu(dense(x.shape[-1], 0)(x))
        x = nn.relu(dense(x.shape[-1], 1)(x))
        return dense(self.features, 2)(x)


class Yolos(nn.Module):
    """The detector.

    Attributes:
        width, depth, heads: of the ViT; `YOLOS_TI`, `YOLOS_S`, `YOLOS_S_DWR` and `YOLOS_B` hold those of
            the published models.
        num_classes: C, labels are 0..C-1 (91 for COCO's raw ids); the last logit is "no object".
        num_det_tokens: Q.
        pos_grid, mid_pos_grid: (rows, columns) of the position tables; None for no mid tables.
        eps: of LayerNorm; 1e-6 in the reference, 1e-12 in Hugging Face's checkpoints.
        dtype: of activations and products; parameters, norms, softmax and heads are float32.
        remat: compute each block again in the backward pass instead of keeping its activations.
    """

    width: int
    depth: int
    heads: int
    pos_grid: tuple
    mid_pos_grid: tuple | None = None
    num_classes: int = 91
    num_det_tokens: int = 100
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, patches, grid):
        """Detections of B images.

        Args:
            patches: uint8 [B, N, 768], row-major 16x16x3 patches, padded at the end to N.
            grid: int32 [B, 2], the rows and columns of each image's patches; rows * columns <= N and
                neither above `posembed.longest_side(N)` (`patchify` checks both).

        Returns:
            'pred_logits' [B, Q, C + 1] and 'pred_boxes' [B, Q, 4], cxcywh in 0..1 of the image, float32.

        Raises:
            ValueError: patches are not uint8 [B, N, 768] or the width does not divide into heads.
        """
        if patches.dtype != jnp.uint8 or patches.ndim != 3 or patches.shape[-1] != PATCH**2 * 3:
            raise ValueError(
                f'patches are {patches.dtype} {list(patches.shape)}; the model takes uint8 [B, N, 768] '
                'as yolos_jax.patchify makes them (pixels are normalised on the device)'
            )
        if self.width % self.heads:
            raise ValueError(f'width {self.width} is not a multiple of heads {self.heads}')
        shared = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(Backbone)
            if f.name not in ('parent', 'name')
        }
        x = Backbone(**shared, name='backbone')(patches, grid)  # [B, Q, D]
        logits = Head(self.num_classes + 1, name='class_embed')(x)
        boxes = nn.sigmoid(Head(4, name='bbox_embed')(x))
        return {'pred_logits': logits, 'pred_boxes': boxes}


def patchify(images, length=None):
    """Images as the sequences the model reads.

    Args:
        images: uint8 [height, width, 3] RGB arrays, sides multiples of 16 (`data.geometry.resize_shape`).
        length: N; the longest image's when None.

    Returns:
        patches uint8 [B, N, 768] and grid int32 [B, 2] (rows, columns).

    Raises:
        ValueError: an image of another type or shape, too long for `length`, or too thin for it.
    """
    for i, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f'image {i} is {image.dtype} {image.shape}, not uint8 [height, width, 3]')
        if image.shape[0] % PATCH or image.shape[1] % PATCH or 0 in image.shape:
            raise ValueError(
                f'image {i} is {image.shape[0]}x{image.shape[1]}: sides must be multiples of 16'
            )
    grid = np.array([image.shape[:2] for image in images], np.int32).reshape(-1, 2) // PATCH
    longest = int(grid.prod(axis=1).max())
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f'an image has {longest} patches and length is {length}')
    if grid.max() > posembed.longest_side(length):
        raise ValueError(
            f'a side of {grid.max() * PATCH} pixels is too long for {length} patches: at most '
            f'{posembed.longest_side(length) * PATCH}'
        )
    patches = np.zeros((len(images), length, PATCH**2 * 3), np.uint8)
    for image, (rows, columns), out in zip(images, grid, patches, strict=True):
        cells = image.reshape(rows, PATCH, columns, PATCH * 3).swapaxes(1, 2)
        out[: rows * columns] = cells.reshape(rows * columns, -1)  # [h, 16, w, 48] -> [h * w, 768]
    return patches, grid
