"""The plain ViT under the detector and the classifier: the sequence of its tokens, and its blocks.

Parameters are named as those of a block (`block`), and the blocks are stacked on a leading axis.

Letters: B batch, N patches, R registers, Q [DET] tokens, S = 1 + R + Q + N tokens, D width, H heads,
L blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from yolos_jax import attention, ops, posembed, rope, spmd
from yolos_jax.block import Block, Dense, LayerNorm, torch_uniform
from yolos_jax.patches import MEAN, STD

_small_normal = nn.initializers.normal(0.02, jnp.float32)


def _scan(
    step: Callable, x: jax.Array, layers: dict, shared: dict, *, count: int, unroll: bool
) -> jax.Array:
    """`jax.lax.scan` over the first `count` of `layers`, without the copy of these that it would be given.

    A forward pass of YOLOS-B on one image of 512x688 pixels needs 124 MB beside the parameters; with the
    copy it needs 436.

    step: (x, layer, shared) -> x. Its arrays are arguments, not closures: JAX could not differentiate
    through a `jit`, `scan` or `checkpoint` around the model. No gradient flows to the `shared` ones.
    """
    if count == 0:
        return x

    def scan(x: jax.Array, layers: dict, shared: dict) -> jax.Array:
        first = jax.tree.map(lambda y: y[:count], layers)
        return jax.lax.scan(lambda x, layer: (step(x, layer, shared), None), x, first, unroll=unroll)[0]

    @jax.custom_vjp
    def scan_in_place(x: jax.Array, layers: dict, shared: dict) -> jax.Array:
        layer = lambda i: jax.tree.map(lambda y: jax.lax.dynamic_index_in_dim(y, i, keepdims=False), layers)
        one = lambda x, i: (step(x, layer(i), shared), None)
        return jax.lax.scan(one, x, jnp.arange(count), unroll=unroll)[0]

    # for gradients the layers must be the inputs of the scan
    forward = lambda x, layers, shared: jax.vjp(lambda x, layers: scan(x, layers, shared), x, layers)
    scan_in_place.defvjp(forward, lambda backward, grad: (*backward(grad), None))
    return scan_in_place(x, layers, shared)


def normalised(patches: jax.Array) -> jax.Array:
    """uint8 patches [B, N, 768] as float32, normalised by ImageNet's mean and deviation."""
    pixels = patches.reshape(*patches.shape[:2], -1, 3).astype(jnp.float32) / 255
    return ((pixels - MEAN) / STD).reshape(patches.shape)


class PatchEmbed(nn.Module):
    """Patches [B, N, 768] to tokens [B, N, D]: uint8 ones are normalised, then the ViT's convolution."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        pixels = normalised(patches) if patches.dtype == jnp.uint8 else patches
        init = torch_uniform(patches.shape[-1])
        return Dense(self.width, self.dtype, init, init, name='proj')(pixels)


class Backbone(nn.Module):
    """The ViT: patches [B, N, 768] and grid [B, 2] to features after the last norm, [B, M, D].

    rows_out: (start, stop) of the tokens that are returned; the [DET] tokens when None. branch_scale:
    float32 [L, 2, B], for the blocks.

    The blocks run in `jax.lax.scan` and not in `nn.scan`: the last block computes fewer rows, yet its
    parameters are stacked with those of the others, under the names of the reference checkpoint.
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
    remat: int
    attention_kernel: Callable
    rows_out: tuple[int, int | None] | None = None

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

    def __call__(
        self, patches: jax.Array, grid: jax.Array, branch_scale: jax.Array | None = None
    ) -> jax.Array:
        special, N = self._special(), patches.shape[1]
        lengths = special + grid[:, 0] * grid[:, 1]
        more = attention.padded(self.attention_kernel, special + N) - special - N
        x = self.embed(jnp.pad(patches, [(0, 0), (0, more), (0, 0)]), grid)
        if self.is_initializing():  # `setup` has made the parameters of the blocks
            return self.norm(x[:, self._rows_out()])
        x = self.encode(x, grid, lengths, branch_scale)
        return self.norm(self.last_block(x, grid, lengths, branch_scale))

    def embed(self, patches: jax.Array, grid: jax.Array) -> jax.Array:
        """The tokens [B, S, D] of the first block: [CLS], registers, [DET] and patches, with positions."""
        special = [self.cls_token, *([self.reg_token] if self.registers else [])]
        special += [self.det_token] if self.num_det_tokens else []
        special = jnp.concatenate([spmd.gathered(token)[0] for token in special])

        def joined(special: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.concatenate([ops.repeat(special, y.shape[0]).astype(y.dtype), y], axis=1)

        # `repeat` fixes a layout, and XLA does not partition what does
        x = spmd.over_batch(joined, shared=1)(special, self.patch_embed(patches))
        if self.pos_grid is None:
            return x
        layout = self._layout(self.pos_grid, grid, patches.shape[1])
        return x + self._positions(self.pos_grid)(self.pos_embed, layout)

    def encode(
        self, x: jax.Array, grid: jax.Array, lengths: jax.Array, branch_scale: jax.Array | None = None
    ) -> jax.Array:
        """The tokens [B, S, D] after all blocks but the last."""
        # JAX keeps `step`, which therefore refers to no parameter
        block, positions = self._block(), self._positions(self.mid_pos_grid)
        layers, shared = {'block': self.blocks}, {'lengths': lengths, 'angles': self._angles(grid, x)}
        if self.mid_pos_grid is not None:
            layers['positions'] = self.mid_pos_embed[:, 0]  # an axis of 1 gets a slow layout on a TPU
            shared['layout'] = self._layout(self.mid_pos_grid, grid, x.shape[1] - self._special())
        if branch_scale is not None:
            layers['branch_scale'] = branch_scale

        def step(x: jax.Array, layer: dict, shared: dict) -> jax.Array:
            options = dict(angles=shared['angles'], branch_scale=layer.get('branch_scale'))
            x = block.apply({'params': layer['block']}, x, shared['lengths'], **options)
            if 'layout' in shared:
                x = x + positions(layer['positions'][None], shared['layout'])
            return x

        unroll = attention.unrolls(self.attention_kernel)
        count, remat = self.depth - 1, min(self.remat, self.depth - 1)
        if remat:
            first = jax.tree.map(lambda y: y[:remat], layers)
            layers = jax.tree.map(lambda y: y[remat:], layers)
            again = jax.checkpoint(lambda x, layer: (step(x, layer, shared), None))
            x, _ = jax.lax.scan(again, x, first, unroll=unroll)
        return _scan(step, x, layers, shared, count=count - remat, unroll=unroll)

    def last_block(
        self, x: jax.Array, grid: jax.Array, lengths: jax.Array, branch_scale: jax.Array | None = None
    ) -> jax.Array:
        """The tokens `rows_out` [B, M, D] after the last block.

        A detector needs only its [DET] tokens here: this is exact and saves 7 % of the work.
        """
        last = {'params': jax.tree.map(lambda p: p[-1], self.blocks)}
        branch_scale = None if branch_scale is None else branch_scale[-1]
        return self._block().apply(last, x, lengths, self._rows_out(), self._angles(grid, x), branch_scale)

    def _angles(self, grid: jax.Array, x: jax.Array) -> tuple | None:
        """The rotary cosines and sines for the queries and keys of tokens [B, S, D]; None without rope."""
        special = self._special()
        width = self.width // self.heads
        return rope.angles(grid, x.shape[1] - special, special, width) if self.rope else None

    def _rows_out(self) -> slice:
        return slice(*(self.rows_out or (1 + self.registers, self._special())))

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

    def _layout(self, table_grid: tuple, grid: jax.Array, length: int) -> tuple:
        """How `_positions` resamples tables of one grid to the grids [B, 2] of images."""
        reads_rows = attention.reads_rows(self.attention_kernel)
        return (posembed.taps if reads_rows else posembed.layout)(table_grid, grid, length)

    def _positions(self, table_grid: tuple) -> Callable:
        """The function (table, layout) -> positions of the sequences [B, S, D], for tables of one grid.

        table: [1, 1 + rows * columns + Q, D]. layout: of `_layout`.
        """
        reads_rows = attention.reads_rows(self.attention_kernel)
        resample = posembed.from_taps if reads_rows else posembed.sequences
        # otherwise XLA would sum gradients of 2.7 times the table's size over the devices
        by_rows = spmd.over_batch(functools.partial(resample, dtype=self.dtype), shared=2)
        R, Q, D = self.registers, self.num_det_tokens, self.width

        def positions(table: jax.Array, layout: tuple) -> jax.Array:
            table = spmd.gathered(table)
            end = table.shape[1] - Q
            special = jnp.concatenate([table[0, :1], jnp.zeros((R, D), table.dtype), table[0, end:]])
            return by_rows(special, table[0, 1:end].reshape(*table_grid, D), layout)

        return positions
