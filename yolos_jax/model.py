"""YOLOS: a plain ViT over one sequence of patches and [DET] tokens (arXiv 2106.00666, section 3).

Parameters carry the names of the reference checkpoint (hustvl/YOLOS, models/backbone.py and
detector.py), with Flax's kernel and scale for torch's weight and the blocks stacked on a leading axis.

Letters: B batch, N patches, R registers, Q [DET] tokens, S = 1 + R + Q + N tokens, D width, H heads,
C classes, L blocks.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import attention, ops, posembed, rope, spmd
from yolos_jax.patches import MEAN, PATCH_DIM, STD

# The published models. Their grids are the reference's init_pe_size and mid_pe_size // 16.
YOLOS_TI = dict(width=192, depth=12, heads=3, pos_grid=(50, 83))
YOLOS_S = dict(width=384, depth=12, heads=6, pos_grid=(32, 54), mid_pos_grid=(32, 54))
YOLOS_S_DWR = dict(width=330, depth=14, heads=6, pos_grid=(32, 54), mid_pos_grid=(32, 54))
YOLOS_B = dict(width=768, depth=12, heads=12, pos_grid=(50, 84), mid_pos_grid=(50, 84))

_small_normal = nn.initializers.normal(0.02)
_xavier = nn.initializers.xavier_uniform()  # for training from scratch; pre-trained weights replace it


def _torch_uniform(fan_in: int) -> Callable:
    bound = fan_in**-0.5
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)


class Dense(nn.Module):
    """A dense layer."""

    features: int
    dtype: Any
    kernel_init: Callable = _xavier
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = spmd.gathered(self.param('kernel', self.kernel_init, (x.shape[-1], self.features)))
        bias = spmd.gathered(self.param('bias', self.bias_init, (self.features,)))
        x, kernel, bias = (y.astype(self.dtype) for y in (x, kernel, bias))
        return jnp.matmul(x, kernel, precision=attention.precision(self.dtype)) + bias


class LayerNorm(nn.Module):
    """Layer normalisation in float32 (`ops.layer_norm`)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = spmd.gathered(self.param('scale', nn.initializers.ones, x.shape[-1:]))
        bias = spmd.gathered(self.param('bias', nn.initializers.zeros, x.shape[-1:]))
        return ops.layer_norm(x, scale, bias, self.eps)


class QueryKeyValue(nn.Module):
    """The dense layer before attention: q [B, H, M, d] of the tokens in `rows`, k, v [B, H, S, d] of all.

    Heads come first at once, as kernels take them, which saves a TPU a tenth of its step for YOLOS-S.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, rows: slice) -> list[jax.Array]:
        D = x.shape[-1]
        kernel = spmd.gathered(self.param('kernel', _xavier, (D, 3 * D)))
        bias = spmd.gathered(self.param('bias', nn.initializers.zeros, (3 * D,)))
        kernels = kernel.reshape(D, 3, self.heads, -1).astype(self.dtype)
        biases = bias.reshape(3, self.heads, -1).astype(self.dtype)

        def project(x: jax.Array, i: int) -> jax.Array:
            exact = attention.precision(self.dtype)
            return ops.add_bias(jnp.einsum('bsc,chd->bhsd', x, kernels[:, i], precision=exact), biases[i])

        return [project(x[:, rows], 0), project(x, 1), project(x, 2)]


class JoinHeads(nn.Module):
    """The dense layer after attention: [B, H, M, d] to [B, M, D]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, H, _, d = x.shape
        kernel = spmd.gathered(self.param('kernel', _xavier, (H * d, H * d)))
        kernel = kernel.reshape(H, d, H * d).astype(self.dtype)
        bias = spmd.gathered(self.param('bias', nn.initializers.zeros, (H * d,))).astype(self.dtype)
        exact = attention.precision(self.dtype)
        return jnp.einsum('bhmd,hdc->bmc', x, kernel, precision=exact) + bias


class Attention(nn.Module):
    """Self-attention of the tokens in `rows` to all tokens of the sequence."""

    heads: int
    dtype: Any
    kernel: Callable  # one of `attention`'s

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, rows: slice, turns: tuple | None) -> jax.Array:
        q, k, v = QueryKeyValue(self.heads, self.dtype, name='qkv')(x, rows)
        if turns:
            q, k = rope.turn(q, *(y[:, rows] for y in turns)), rope.turn(k, *turns)
        return JoinHeads(self.dtype, name='proj')(self.kernel(q, k, v, lengths))


class Mlp(nn.Module):
    """Two dense layers around the exact (erf) GELU; the tanh form moves logits by 5e-4."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Dense(4 * x.shape[-1], self.dtype, name='fc1')(x)
        return Dense(x.shape[-1], self.dtype, name='fc2')(ops.gelu(y))


class Block(nn.Module):
    """A pre-norm transformer block; only the tokens in `rows` come out.

    turns: `rope.angles`. kept: float32 [2, B], what attention and perceptron are multiplied with before
    they are added (stochastic depth).
    """

    heads: int
    eps: float
    dtype: Any
    attention_kernel: Callable = attention.by_head

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array,
        rows: slice = slice(None),
        turns: tuple | None = None,
        kept: jax.Array | None = None,
    ) -> jax.Array:
        of_rows = lambda y, i: y if kept is None else y * kept[i, :, None, None].astype(y.dtype)
        y = LayerNorm(self.eps, name='norm1')(x).astype(self.dtype)
        attend = Attention(self.heads, self.dtype, self.attention_kernel, name='attn')
        x = x[:, rows] + of_rows(attend(y, lengths, rows, turns), 0)
        y = LayerNorm(self.eps, name='norm2')(x).astype(self.dtype)
        return x + of_rows(Mlp(self.dtype, name='mlp')(y), 1)


def normalised(patches: jax.Array) -> jax.Array:
    """uint8 patches [B, N, 768] as float32 of ImageNet's mean 0 and deviation 1."""
    pixels = patches.reshape(*patches.shape[:2], -1, 3).astype(jnp.float32) / 255
    return ((pixels - MEAN) / STD).reshape(patches.shape)


class PatchEmbed(nn.Module):
    """Patches [B, N, 768] to tokens [B, N, D]: uint8 ones are normalised, then the ViT's convolution."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        pixels = normalised(patches) if patches.dtype == jnp.uint8 else patches
        init = _torch_uniform(patches.shape[-1])
        return Dense(self.width, self.dtype, init, init, name='proj')(pixels)


class Backbone(nn.Module):
    """The ViT: patches [B, N, 768] and grid [B, 2] to the features of the [DET] tokens [B, Q, D].

    class_token: those of [CLS] come before them; Q may be 0 then. kept: float32 [L, 2, B], for the blocks.

    The blocks are scanned by hand and not by `nn.scan`: the last one computes other rows, and all share
    one stacked parameter under the names of the reference checkpoint.
    """

    width: int
    depth: int
    heads: int
    num_det_tokens: int
    registers: int
    pos_grid: tuple | None
    mid_pos_grid: tuple | None
    rope: bool
    eps: float
    dtype: Any
    remat: bool
    attention_kernel: Callable
    class_token: bool = False

    def setup(self) -> None:
        D, Q = self.width, self.num_det_tokens
        self.cls_token = self.param('cls_token', _small_normal, (1, 1, D))
        if self.registers:
            self.reg_token = self.param('reg_token', _small_normal, (1, self.registers, D))
        if Q:
            self.det_token = self.param('det_token', _small_normal, (1, Q, D))
        if self.pos_grid is not None:
            self.pos_embed = self.param(
                'pos_embed', self._init_positions, (1, self._rows(self.pos_grid), D)
            )
        self.patch_embed = PatchEmbed(D, self.dtype)
        self.blocks = self.param('blocks', self._init_blocks)
        if self.mid_pos_grid is not None:
            shape = (self.depth - 1, 1, self._rows(self.mid_pos_grid), D)
            self.mid_pos_embed = self.param('mid_pos_embed', _small_normal, shape)
        self.norm = LayerNorm(self.eps)

    def __call__(self, patches: jax.Array, grid: jax.Array, kept: jax.Array | None = None) -> jax.Array:
        special, N = self._special(), patches.shape[1]
        lengths = special + grid[:, 0] * grid[:, 1]
        more = attention.padded(self.attention_kernel, special + N) - special - N
        x = self.embed(jnp.pad(patches, [(0, 0), (0, more), (0, 0)]), grid)
        x = self.encode(x, grid, lengths, kept)
        return self.norm(self.last_block(x, grid, lengths, kept))

    def embed(self, patches: jax.Array, grid: jax.Array) -> jax.Array:
        """The tokens [B, S, D] of the first block: [CLS], registers, [DET] and patches, with positions."""
        B, N, _ = patches.shape
        special = [self.cls_token, *([self.reg_token] if self.registers else [])]
        special += [self.det_token] if self.num_det_tokens else []
        special = jnp.concatenate([spmd.gathered(token) for token in special], axis=1)
        special = jnp.broadcast_to(special, (B, *special.shape[1:]))
        tokens = self.patch_embed(patches)
        x = jnp.concatenate([special.astype(self.dtype), tokens], axis=1)
        if self.pos_grid is None:
            return x
        layout = posembed.layout(self.pos_grid, grid, N)
        return x + self._positions(self.pos_embed, self.pos_grid, layout)

    def encode(
        self, x: jax.Array, grid: jax.Array, lengths: jax.Array, kept: jax.Array | None = None
    ) -> jax.Array:
        """The tokens [B, S, D] after all blocks but the last."""
        block = self._block()
        layers = {'block': jax.tree.map(lambda p: p[:-1], self.blocks)}
        layout = None
        if self.mid_pos_grid is not None:
            layers['positions'] = self.mid_pos_embed[:, 0]  # an axis of 1 gets a slow layout on a TPU
            layout = posembed.layout(self.mid_pos_grid, grid, x.shape[1] - self._special())
        if kept is not None:
            layers['kept'] = kept[:-1]
        turns = self._turns(grid, x)

        def step(x: jax.Array, layer: dict) -> tuple:
            x = block.apply({'params': layer['block']}, x, lengths, turns=turns, kept=layer.get('kept'))
            if layout is not None:
                x = x + self._positions(layer['positions'][None], self.mid_pos_grid, layout)
            return x, None

        if self.remat:
            step = jax.checkpoint(step)
        elif kept := attention.kept_by(self.attention_kernel):
            policy = jax.checkpoint_policies.save_only_these_names(kept)
            step = jax.checkpoint(step, prevent_cse=False, policy=policy)  # a scan needs no barrier
        x, _ = jax.lax.scan(step, x, layers)
        return x

    def last_block(
        self, x: jax.Array, grid: jax.Array, lengths: jax.Array, kept: jax.Array | None = None
    ) -> jax.Array:
        """The [DET] tokens [B, Q, D] after the last block: exact, and 7 % of the model's work saved."""
        last = {'params': jax.tree.map(lambda p: p[-1], self.blocks)}
        rows = slice(0 if self.class_token else 1 + self.registers, self._special())
        kept = None if kept is None else kept[-1]
        return self._block().apply(last, x, lengths, rows, self._turns(grid, x), kept)

    def _turns(self, grid: jax.Array, x: jax.Array) -> tuple | None:
        """By what the queries and keys of tokens [B, S, D] are turned."""
        special = self._special()
        width = self.width // self.heads
        return rope.angles(grid, x.shape[1] - special, special, width) if self.rope else None

    def _special(self) -> int:
        return 1 + self.registers + self.num_det_tokens

    def _block(self) -> Block:
        return Block(self.heads, self.eps, self.dtype, self.attention_kernel, parent=None)

    def _rows(self, table_grid: tuple) -> int:
        return 1 + table_grid[0] * table_grid[1] + self.num_det_tokens

    def _init_positions(self, rng: jax.Array, shape: tuple) -> jax.Array:
        patches = posembed.sine(self.pos_grid, self.width)
        return _small_normal(rng, shape).at[0, 1 : 1 + len(patches)].set(patches)

    def _init_blocks(self, rng: jax.Array) -> dict:
        # parameters do not depend on the kernel, and `dense` takes one row whatever the mesh
        block = self._block().clone(attention_kernel=attention.dense)

        def init(rng: jax.Array) -> dict:
            token = jnp.zeros((1, 1, self.width))
            return block.init(rng, token, jnp.ones((1,), jnp.int32))['params']

        return jax.vmap(init)(jax.random.split(rng, self.depth))

    def _positions(self, table: jax.Array, table_grid: tuple, layout: tuple) -> jax.Array:
        """A table [1, 1 + rows * columns + Q, D] as the positions of the sequences [B, S, D]."""
        Q, D = self.num_det_tokens, self.width
        table = spmd.gathered(table)
        exact = attention.precision(self.dtype)
        end = table.shape[1] - Q
        patches = posembed.spread(table[0, 1:end].reshape(*table_grid, D), layout, exact)
        registers = jnp.zeros((1, self.registers, D), table.dtype)
        special = jnp.concatenate([table[:, :1], registers, table[:, end:]], axis=1)
        special = jnp.broadcast_to(special, (len(patches), *special.shape[1:]))
        return jnp.concatenate([special, patches], axis=1).astype(self.dtype)


class Head(nn.Module):
    """DETR's three-layer ReLU perceptron, in float32: [B, Q, D] to [B, Q, features]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D, init = x.shape[-1], _torch_uniform(x.shape[-1])
        for i, features in enumerate((D, D, self.features)):
            x = nn.relu(x) if i else x
            x = Dense(features, jnp.float32, init, init, name=f'layers_{i}')(x)
        return x


class Yolos(nn.Module):
    """The detector.

    Attributes:
        width, depth, heads: of the ViT; `YOLOS_TI`, `YOLOS_S`, `YOLOS_S_DWR` and `YOLOS_B` hold those of
            the published models.
        num_classes: C, labels are 0..C-1 (91 for COCO's raw ids); the last logit is "no object".
        num_det_tokens: Q. registers: R, tokens without a position between [CLS] and [DET] (DINOv2, DINOv3).
        pos_grid, mid_pos_grid: (rows, columns) of the position tables; None for none.
        rope: whether queries and keys of patches are turned by their places (DINOv3), as `rope.angles`.
        eps: of LayerNorm; 1e-6 in the reference, 1e-12 in Hugging Face's checkpoints.
        dtype: of activations and products; parameters, norms, softmax and heads are float32.
        remat: compute each block again in the backward pass instead of keeping its activations.
        attention_kernel: a function of `attention`; `attention.for_platform` chooses the fastest. The
            default computes one head at a time, exactly and on every platform.
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
    remat: bool = False
    attention_kernel: Callable = attention.by_head

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
        if patches.dtype != jnp.uint8 or patches.ndim != 3 or patches.shape[-1] != PATCH_DIM:
            raise ValueError(
                f'patches are {patches.dtype} {list(patches.shape)}; the model takes uint8 [B, N, 768] '
                'as yolos_jax.patchify makes them (pixels are normalised on the device)'
            )
        if self.width % self.heads or self.rope and self.width // self.heads % 4:
            raise ValueError(
                f'width {self.width} is not a multiple of heads {self.heads}{", 4 times" * self.rope}'
            )
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


def init_params(model: Yolos, rng: jax.Array) -> dict:
    """Fresh parameters of a model, as arrays on the default device."""
    return jax.jit(lambda rng: model.init(rng, *_one_patch())['params'])(rng)


def param_shapes(model: Yolos) -> dict:
    """The shapes and types of a model's parameters; nothing is computed."""
    return jax.eval_shape(lambda rng: model.init(rng, *_one_patch())['params'], jax.random.key(0))


def _one_patch() -> tuple:
    """The smallest batch: parameters do not depend on it."""
    rows = spmd.num_devices()
    return np.zeros((rows, 1, PATCH_DIM), np.uint8), np.ones((rows, 2), np.int32)
