"""DINOv2's and DINOv3's ViTs, against transformers' with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import forward, noise, read_detector, tiny_config, to_torch
from safetensors.torch import save_file
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from yolos_jax import model, rope, weights
from yolos_jax.block import Block, LayerNorm
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.patches import patchify
from yolos_jax.run import mesh as meshes
from yolos_jax.run.train import train
from yolos_jax.vit import PatchEmbed
from yolos_jax.weights import Pretrained, checkpoint, dino, hf, native, reference
from yolos_jax.weights.tensor import Tensor

D, DEPTH, H, R, SIDE = 32, 3, 2, 4, 3
SIZES = dict(hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=H, patch_size=16)
FIELDS = dict(width=D, depth=DEPTH, heads=H, num_classes=3, num_det_tokens=5, registers=R)
V2 = Yolos(**FIELDS, pos_grid=(SIDE, SIDE))
V3 = Yolos(**FIELDS, pos_grid=None, rope=True, eps=1e-5)


def random_weights(vit):
    """With weights large enough for features of about 1, layer scale and all."""
    rng = np.random.default_rng(0)
    for name, parameter in vit.named_parameters():
        size = np.prod(parameter.shape[1:]) ** -0.5 if parameter.ndim > 1 else 0.2
        value = rng.normal(0, size, parameter.shape)
        centre = 1 if 'norm' in name and name.endswith('weight') or 'lambda' in name else 0
        parameter.data = torch.tensor(value + centre, dtype=torch.float32)
    return vit.eval()


@pytest.fixture(scope='module')
def vits(tmp_path_factory):
    """{model: (transformers' ViT, its folder)}."""
    v2 = Dinov2WithRegistersConfig(**SIZES, image_size=16 * SIDE, num_register_tokens=R)
    v3 = DINOv3ViTConfig(**SIZES, intermediate_size=4 * D, num_register_tokens=R)
    result = {}
    for ours, theirs in ((V2, Dinov2WithRegistersModel(v2)), (V3, DINOv3ViTModel(v3))):
        folder = tmp_path_factory.mktemp('vit')
        random_weights(theirs).save_pretrained(folder)
        result[ours] = theirs, folder
    return result


def start(path, ours):
    report = []
    with weights.open(path) as source:
        params = source.backbone(ours, jax.random.key(0), report.append)
    return params, '\n'.join(report)


def tokens(params, ours, image, det=False):
    """The features of all tokens of an image, layer by layer; det: with the [DET] tokens too."""
    backbone, (patches, grid) = params['backbone'], patchify([image])
    embed = PatchEmbed(D, jnp.float32).apply({'params': backbone['patch_embed']}, patches)
    Q = ours.num_det_tokens if det else 0
    special = [backbone['cls_token'], backbone['reg_token'], *([backbone['det_token']] * det)]
    if ours.pos_grid:
        table = backbone['pos_embed']
        embed = embed + table[:, 1 : -ours.num_det_tokens]
        special[0] = special[0] + table[:, :1]
        special[2:] = [token + table[:, -ours.num_det_tokens :] for token in special[2:]]
    x = jnp.concatenate([*special, embed], axis=1)
    angles = rope.angles(grid, embed.shape[1], 1 + R + Q, D // H) if ours.rope else None
    for i in range(DEPTH):
        block = {'params': jax.tree.map(lambda p, i=i: p[i], backbone['blocks'])}
        apply = Block(H, ours.eps, jnp.float32).apply
        x = apply(block, x, jnp.array([x.shape[1]]), angles=angles)
    return LayerNorm(ours.eps).apply({'params': backbone['norm']}, x)


@pytest.mark.parametrize('ours', [V2, V3], ids=['DINOv2', 'DINOv3'])
def test_the_vit_alone_has_the_features_of_transformers(ours, vits):
    """With its own table, and padding after the patches."""
    theirs, folder = vits[ours]
    with weights.open(folder) as source:
        vit, params = source.vit()
    rows, columns = vit.pos_grid or (3, 5)
    image = noise(16 * rows, 16 * columns)
    with torch.no_grad():
        expected = theirs(to_torch(image)).last_hidden_state[0]
    features = vit.apply({'params': params}, *patchify([image], rows * columns + 7))
    assert features['patches'].shape == (1, rows * columns + 7, D)
    np.testing.assert_allclose(features['cls'][0], expected[0], atol=2e-5)
    np.testing.assert_allclose(features['patches'][0, : rows * columns], expected[1 + R :], atol=2e-5)


@pytest.mark.parametrize('width', [4, 64, 196, 392])  # of which 4 / 196 and 4 / 392 are rounded
def test_every_channel_of_a_head_has_an_angle(width):
    cosines, sines = rope.angles(jnp.array([[2, 3]]), 6, 1, width)
    assert cosines.shape == sines.shape == (1, 7, width)


@pytest.mark.parametrize('grid', [(3, 3), (4, 7), (9, 2)])
@pytest.mark.parametrize('ours', [V2, V3], ids=['DINOv2', 'DINOv3'])
def test_features_are_those_of_transformers(ours, grid, vits):
    theirs, folder = vits[ours]
    ours = ours.clone(pos_grid=ours.pos_grid and grid)
    image = noise(16 * grid[0], 16 * grid[1])
    with torch.no_grad():
        expected = theirs(to_torch(image)).last_hidden_state
    assert expected.abs().max() > 1
    np.testing.assert_allclose(tokens(start(folder, ours)[0], ours, image), expected, atol=2e-5)


@pytest.mark.parametrize('ours', [V2, V3], ids=['DINOv2', 'DINOv3'])
def test_gradients_are_those_of_transformers(ours, vits):
    theirs, folder = vits[ours]
    ours = ours.clone(pos_grid=ours.pos_grid and (4, 7))
    image, params = noise(64, 112), start(folder, ours)[0]
    theirs.zero_grad()
    theirs(to_torch(image)).last_hidden_state.square().mean().backward()
    gradient = jax.grad(lambda params: jnp.square(tokens(params, ours, image)).mean())(params)['backbone']
    named = dict(theirs.named_parameters())
    pairs = [(gradient['reg_token'], named['embeddings.register_tokens'].grad)]
    for name, expected in named.items():
        if name.endswith('0.attention.q_proj.weight'):
            pairs.append((gradient['blocks']['attn']['qkv']['kernel'][0, :, :D], expected.grad.T))
        if name.endswith('2.norm1.weight'):
            pairs.append((gradient['blocks']['norm1']['scale'][2], expected.grad))
    assert len(pairs) == 3
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, atol=2e-5 * float(expected.abs().max()) + 1e-7)


@pytest.mark.parametrize('ours', [V2, V3], ids=['DINOv2', 'DINOv3'])
def test_the_detector_equals_its_layers_one_by_one_at_any_padding(ours, vits):
    folder = vits[ours][1]
    ours = ours.clone(pos_grid=ours.pos_grid and (4, 7))
    params, image = start(folder, ours)[0], noise(64, 112)
    detections = tokens(params, ours, image, det=True)[:, 1 + R : ours.special]
    expected = model.Head(4).apply({'params': params['class_embed']}, detections)
    patches, grid = patchify([image])
    for padding in (0, 7, 60):
        outputs = forward(ours, params, np.pad(patches, [(0, 0), (0, padding), (0, 0)]), grid)
        np.testing.assert_allclose(outputs['pred_logits'], expected, atol=1e-5)


def as_released(vit, version):
    """A state dict under the names of the projects' own files."""
    register = 'register_tokens' if version == 2 else 'storage_tokens'
    names = [
        ('embeddings.cls_token', 'cls_token'), ('embeddings.mask_token', 'mask_token'),
        ('embeddings.register_tokens', register),
        ('embeddings.position_embeddings', 'pos_embed'), ('model.layer.', 'blocks.'),
        ('embeddings.patch_embeddings.projection', 'patch_embed.proj'),
        ('embeddings.patch_embeddings', 'patch_embed.proj'), ('encoder.layer.', 'blocks.'),
        ('layernorm.', 'norm.'), ('layer_scale1.lambda1', 'ls1.gamma'),
        ('layer_scale2.lambda1', 'ls2.gamma'),
        ('mlp.up_proj', 'mlp.fc1'), ('mlp.down_proj', 'mlp.fc2'), ('attention.o_proj', 'attn.proj'),
    ]  # fmt: skip
    state = {}
    for name, value in vit.state_dict().items():
        for old, new in names:
            name = name.replace(old, new)
        state[name] = value
    for i in range(DEPTH):
        for kind in ('weight', 'bias'):
            parts = [state.pop(f'blocks.{i}.attention.{part}_proj.{kind}', None) for part in 'qkv']
            if parts[1] is None:
                parts[1] = torch.full_like(parts[0], 7)  # what the mask hides
                state[f'blocks.{i}.attn.qkv.bias_mask'] = torch.ones(3 * D)
            state[f'blocks.{i}.attn.qkv.{kind}'] = torch.cat(parts)
    if version == 3:
        state |= {'rope_embed.periods': torch.ones(4), 'local_cls_norm.weight': torch.ones(D)}
    return state


def as_timm(state, version):
    """The released names as timm has them."""
    state = dict(state)
    state['reg_token'] = state.pop('register_tokens' if version == 2 else 'storage_tokens')
    if version == 2:  # [CLS] has its position in it
        table = state['pos_embed']
        state['cls_token'], state['pos_embed'] = state['cls_token'] + table[:, :1], table[:, 1:]
        return state
    for i in range(DEPTH):
        prefix, bias = f'blocks.{i}.attn.', state.pop(f'blocks.{i}.attn.qkv.bias')
        state |= {f'{prefix}q_bias': bias[:D], f'{prefix}v_bias': bias[2 * D :]}
        state |= {f'blocks.{i}.gamma_{k}': state.pop(f'blocks.{i}.ls{k}.gamma') for k in (1, 2)}
    return {name: x for name, x in state.items() if 'mask' not in name and 'rope' not in name}


@pytest.mark.parametrize('version', [2, 3])
@pytest.mark.parametrize('form', ['released', 'timm'])
def test_every_form_gives_the_same_parameters(version, form, vits, tmp_path):
    ours = V2 if version == 2 else V3
    expected, report = start(vits[ours][1], ours)
    assert f'layer scale: {2 * DEPTH} go into' in report
    state = as_released(vits[ours][0], version)
    torch.save(state if form == 'released' else as_timm(state, version), tmp_path / 'x.pth')
    params, _ = start(tmp_path / 'x.pth', ours)
    if form == 'timm' and version == 2:
        first = params['backbone']['cls_token'] + params['backbone']['pos_embed'][:, :1]
        whole = expected['backbone']['cls_token'] + expected['backbone']['pos_embed'][:, :1]
        np.testing.assert_allclose(first, whole, atol=1e-6)
        for part in (params, expected):
            part['backbone'] = part['backbone'] | {
                'cls_token': 0,
                'pos_embed': part['backbone']['pos_embed'][:, 1:],
            }
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize('side', [14, 8])
def test_larger_patches_give_what_the_smaller_ones_gave(side):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, 3, side, side)).astype(np.float32)
    patch = torch.tensor(rng.normal(size=(5, 3, side, side)), dtype=torch.float32)
    larger = torch.nn.functional.interpolate(patch, size=(16, 16), mode='bilinear')
    resampled = dino.resample_patch(Tensor(kernel.shape, lambda: kernel), 16).numpy()
    expected = np.einsum('bcij,dcij->bd', patch, kernel)
    np.testing.assert_allclose(np.einsum('bcij,dcij->bd', larger, resampled), expected, atol=1e-4)


def test_patches_of_14_pixels_are_resampled(vits, tmp_path):
    state = as_released(vits[V2][0], 2)
    state['patch_embed.proj.weight'] = state['patch_embed.proj.weight'][..., :14, :14].clone()
    torch.save(state, tmp_path / 'x.pth')
    params, report = start(tmp_path / 'x.pth', V2)
    assert 'patches of 14 pixels -> 16' in report
    assert params['backbone']['patch_embed']['proj']['kernel'].shape == (768, D)


@pytest.mark.parametrize(
    ('version', 'changes', 'says'),
    [
        (2, {'registers': 0}, 'of registers 4; the model asks for 0'),
        (3, {'rope': False}, 'of rope True; the model asks for False'),
        (3, {'pos_grid': (2, 2)}, 'without a position table'),
        (2, {'pos_grid': None}, 'with a position table'),
    ],
)
def test_a_model_of_another_kind_is_refused(version, changes, says, vits):
    ours = V2 if version == 2 else V3
    with pytest.raises(InputError, match=says):
        start(vits[ours][1], ours.clone(**changes))


def test_a_dinov3_without_registers_is_read(tmp_path):
    config = DINOv3ViTConfig(**SIZES, intermediate_size=4 * D, num_register_tokens=0)
    theirs = random_weights(DINOv3ViTModel(config))
    theirs.save_pretrained(tmp_path)
    image = noise(48, 64)
    with torch.no_grad():
        expected = theirs(to_torch(image)).last_hidden_state[0]
    with weights.open(tmp_path) as source:
        vit, params = source.vit(heads=H)
    assert vit.registers == 0 and vit.rope
    features = vit.apply({'params': params}, *patchify([image]))
    np.testing.assert_allclose(features['patches'][0], expected[1:], atol=2e-5)


@pytest.mark.parametrize('name', ['blocks.0.mlp.w1.weight', 'encoder.layer.0.mlp.weights_in.weight'])
def test_gated_mlps_are_refused(name, vits, tmp_path):
    state = {k: v.contiguous() for k, v in as_released(vits[V3][0], 3).items()}
    save_file(state | {name: torch.ones(2)}, tmp_path / 'x.safetensors')
    with pytest.raises(InputError, match='gated .SwiGLU'):
        start(tmp_path / 'x.safetensors', V3)


def test_formats_that_can_describe_the_model_return_it_and_the_others_refuse_it(vits, tmp_path):
    params, _ = start(vits[V3][1], V3)
    pretrained = Pretrained(V3, params, {1: 'cat', 2: 'dog'}, 112, 176)
    for form, write in {'native': native.write, 'jax': checkpoint.write}.items():
        write(pretrained, tmp_path / form)
        back = read_detector(tmp_path / form)
        assert (
            back.model == V3
            and back.classes == pretrained.classes
            and (back.size, back.max_size) == (112, 176)
        )
        jax.tree.map(np.testing.assert_array_equal, back.params, params)
    for write in (hf.write, reference.write):
        with pytest.raises(InputError, match='registers and rotary positions are unknown'):
            write(pretrained, tmp_path / 'no')
    assert not (tmp_path / 'no').exists()
    config = tmp_path / 'native' / 'config.json'
    text = config.read_text()
    for whole, damaged, says in (
        ('"rope": true', '"rope": 3', 'rope is 3, neither true nor false'),
        ('[112, 176]', '[0, 176]', 'it is evaluated at 0, not at 16 to 100000 pixels'),
    ):
        (tmp_path / 'native' / 'model.safetensors.sha256').unlink()  # which a reader writes again
        config.write_text(text.replace(whole, damaged))
        with pytest.raises(InputError, match=says):
            read_detector(tmp_path / 'native')


def test_a_run_starts_from_a_dinov3_backbone_and_resumes(vits, coco_folder, tmp_path):
    config = tiny_config(data=coco_folder, init_from=str(vits[V3][1]), epochs=1)
    with config.unlocked():
        config.model.update(width=D, depth=DEPTH, heads=H, registers=R, rope=True, eps=1e-5)
        config.model.pos_grid = None
        config.model.mid_pos_grid = None
    mesh = meshes.make_mesh(jax.devices()[:1])
    train(config, tmp_path, mesh)
    config.epochs = 2
    train(config, tmp_path, mesh)
    assert read_detector(tmp_path).model.clone(num_classes=3, num_det_tokens=5) == V3
