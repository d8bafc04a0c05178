"""The image classifier for pre-training a ViT: DeiT (arXiv 2012.12877), plain or distilled.

It is the detector's `Backbone` with heads on [CLS] and on the distillation token, which takes the place of
a [DET] token.

Letters: as in `vit`; K heads: 1, or 2 with a distillation token.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import attention, spmd
from yolos_jax.block import Dense
from yolos_jax.patches import PATCH, PATCH_DIM
from yolos_jax.vit import Backbone

_normal = nn.initializers.normal(0.02, jnp.float32)  # timm's trunc_normal_ cuts at a hundred deviations
SINES = 4  # strength of fresh sines relative to a detector's: patch tokens grow as much in training


class Classifier(nn.Module):
    """The classifier.

    Attributes:
        width, depth, heads, eps, dtype, remat, attention_kernel: as of `Yolos`.
        num_classes: C. size: of the square images, in pixels, a multiple of 16.
        distilled: with a distillation token, whose head learns from a teacher.
    """

    width: int
    depth: int
    heads: int
    num_classes: int
    size: int = 224
    distilled: bool = False
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: int = 0
    attention_kernel: Callable = attention.dense

    @property
    def side(self) -> int:
        """Patches in a row of an image."""
        return self.size // PATCH

    @nn.compact
    def __call__(self, patches: jax.Array, branch_scale: jax.Array | None = None) -> jax.Array:
        """Logits of B images.

        Args:
            patches: [B, side * side, 768], uint8, or float32 that is normalised already.
            branch_scale: float32 [depth, 2, B], factors on the branches of the blocks
                (`stochastic_depth`); None for no factors.

        Returns:
            float32 [B, K, C]: logits of the class token and, if there is one, the distillation token. The
            prediction is their mean.
        """
        grid = jnp.full((len(patches), 2), self.side, jnp.int32)
        x = Backbone(
            width=self.width, depth=self.depth, heads=self.heads, num_det_tokens=int(self.distilled),
            registers=0, rope=False, pos_grid=(self.side, self.side), mid_pos_grid=None, eps=self.eps,
            dtype=self.dtype, remat=self.remat, attention_kernel=self.attention_kernel,
            rows_out=(0, 1 + self.distilled), name='backbone',
        )(patches, grid, branch_scale)  # fmt: skip
        heads = ['head', 'head_dist'][: x.shape[1]]
        dense = [Dense(self.num_classes, jnp.float32, kernel_init=_normal, name=name) for name in heads]
        return jnp.stack([head(x[:, i]) for i, head in enumerate(dense)], axis=1)


def stochastic_depth(keys: jax.Array, depth: int, rate: float) -> jax.Array:
    """Random factors on the branches of each block, float32 [depth, 2, B], from one key per image.

    The share of dropped branches (factor 0) grows from 0 in the first block to `rate` in the last; the
    others are scaled up to keep the mean (arXiv 1603.09382, as in timm).
    """
    keep = 1 - jnp.linspace(0, rate, depth, dtype=jnp.float32)[:, None]

    def of_image(key: jax.Array) -> jax.Array:
        return (jax.random.uniform(key, (depth, 2), jnp.float32) < keep) / keep

    return jnp.moveaxis(jax.vmap(of_image)(keys), 0, -1)


def init_params(model: Classifier, rng: jax.Array, *, xavier: bool = False) -> dict:
    """Initial parameters as in DeiT: normal of 0.02, zero biases, the patch convolution as in torch.

    xavier: as for a detector from scratch: Xavier's kernels in the blocks and sine positions, but
        `SINES` times as strong. A normal of 0.02 suits widths of hundreds; kernels of width 128 are four
        times as large by Xavier's rule.
    """
    params = _init(model, rng)
    if xavier:
        table = params['backbone']['pos_embed'].at[0, 1 : 1 + model.side**2].multiply(SINES)
        return params | {'backbone': params['backbone'] | {'pos_embed': table}}
    keys = iter(jax.random.split(jax.random.fold_in(rng, 1), len(jax.tree.leaves(params))))

    def deit(path: tuple, x: jax.Array) -> jax.Array:
        key, names = next(keys), [part.key for part in path]
        is_kernel = names[-1] == 'kernel' and 'patch_embed' not in names
        return _normal(key, x.shape) if is_kernel or names[-1] == 'pos_embed' else x

    return jax.tree.map_with_path(deit, params)


def param_shapes(model: Classifier) -> dict:
    """The shapes and types of a classifier's parameters; nothing is computed."""
    return jax.eval_shape(functools.partial(_init, model), jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Classifier, rng: jax.Array) -> dict:
    rows = spmd.num_devices()  # of the smallest batch: parameters do not depend on it
    return model.init(rng, np.zeros((rows, model.side**2, PATCH_DIM), np.uint8))['params']
