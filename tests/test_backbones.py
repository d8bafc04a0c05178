import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import DEPTH, SIDE, D, H, make_vit, noise, to_torch, torches
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

import yolos_jax
from yolos_jax import model, weights
from yolos_jax.block import Block
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.patches import patchify
from yolos_jax.vit import PatchEmbed
from yolos_jax.weights import hf_names
from yolos_jax.weights.tensor import Tensor

DETECTOR = dict(width=D, depth=DEPTH, heads=H, pos_grid=(SIDE, SIDE), num_det_tokens=5, num_classes=3)


def to_hf(vit):
    """timm's names as Hugging Face saves them."""
    parts = {'norm1': 'layernorm_before', 'norm2': 'layernorm_after', 'attn.proj': 'attention.output.dense'}
    parts |= {'mlp.fc1': 'intermediate.dense', 'mlp.fc2': 'output.dense'}
    whole = {
        'cls_token': 'embeddings.cls_token',
        'pos_embed': 'embeddings.position_embeddings',
        'patch_embed.proj.weight': 'embeddings.patch_embeddings.projection.weight',
        'patch_embed.proj.bias': 'embeddings.patch_embeddings.projection.bias',
        'norm.weight': 'layernorm.weight',
        'norm.bias': 'layernorm.bias',
    }
    result = {}
    for name, value in vit.items():
        if name in whole:
            result[whole[name]] = value
            continue
        _, i, *inside, leaf = name.split('.')
        inside, prefix = '.'.join(inside), f'encoder.layer.{i}.'
        if inside == 'attn.qkv':
            for part, piece in zip(('query', 'key', 'value'), np.split(value, 3), strict=True):
                result[f'{prefix}attention.attention.{part}.{leaf}'] = piece
        else:
            result[f'{prefix}{parts[inside]}.{leaf}'] = value
    return result


def to_google(vit, big_vision=False):
    """timm's names and layouts as vision_transformer's or big_vision's."""
    n = ('LayerNorm_0', 'MultiHeadDotProductAttention_0', 'LayerNorm_1', 'MlpBlock_0')
    n = n if big_vision else ('LayerNorm_0', 'MultiHeadDotProductAttention_1', 'LayerNorm_2', 'MlpBlock_3')
    result = {
        'cls': vit['cls_token'],
        'Transformer/posembed_input/pos_embedding': vit['pos_embed'],
        'embedding/kernel': vit['patch_embed.proj.weight'].transpose(2, 3, 1, 0),
        'embedding/bias': vit['patch_embed.proj.bias'],
        'Transformer/encoder_norm/scale': vit['norm.weight'],
        'Transformer/encoder_norm/bias': vit['norm.bias'],
    }
    for i in range(DEPTH):
        get, to = (lambda name, i=i: vit[f'blocks.{i}.{name}']), f'Transformer/encoderblock_{i}/'
        for norm, name in (('norm1', n[0]), ('norm2', n[2])):
            result |= {f'{to}{name}/scale': get(f'{norm}.weight'), f'{to}{name}/bias': get(f'{norm}.bias')}
        for fc, dense in (('fc1', 'Dense_0'), ('fc2', 'Dense_1')):
            result |= {f'{to}{n[3]}/{dense}/kernel': get(f'mlp.{fc}.weight').T}
            result |= {f'{to}{n[3]}/{dense}/bias': get(f'mlp.{fc}.bias')}
        kernels, biases = np.split(get('attn.qkv.weight'), 3), np.split(get('attn.qkv.bias'), 3)
        for part, kernel, bias in zip(('query', 'key', 'value'), kernels, biases, strict=True):
            result |= {f'{to}{n[1]}/{part}/kernel': kernel.T.reshape(D, H, D // H)}
            result |= {f'{to}{n[1]}/{part}/bias': bias.reshape(H, D // H)}
        result |= {f'{to}{n[1]}/out/kernel': get('attn.proj.weight').T.reshape(H, D // H, D)}
        result |= {f'{to}{n[1]}/out/bias': get('attn.proj.bias')}
    return result


def stacked(google):
    """big_vision with scanned blocks: one array for all of them."""
    result = {k: v for k, v in google.items() if 'encoderblock' not in k}
    for name in [k for k in google if 'encoderblock_0' in k]:
        layers = [google[name.replace('block_0', f'block_{i}')] for i in range(DEPTH)]
        result[name.replace('block_0', 'block')] = np.stack(layers)
    return {f'params/{k}': v for k, v in result.items()} | {'opt/0/x': np.zeros(3)}


OTHER = {'student': {'backbone.cls_token': torch.zeros(1, 1, D)}, 'epoch': 3}
HEAD = {'head.weight': torch.zeros(10, D), 'head.bias': torch.zeros(10)}
FORMS = {
    'deit': lambda vit: {'model': torches(vit) | HEAD},
    'timm': lambda vit: torches(vit) | HEAD,
    'timm, moving average': lambda vit: {'state_dict_ema': torches(vit) | HEAD, 'epoch': 3},
    'lightning': lambda vit: {'state_dict': torches(vit, 'model.'), 'hyper_parameters': {}},
    'torch.compile': lambda vit: torches(vit, '_orig_mod.'),
    'timm, pooled': lambda vit: {k.replace('norm.', 'fc_norm.') if k.startswith('norm.') else k: v
                                 for k, v in (torches(vit) | HEAD).items()},
    'dino': lambda vit: {'teacher': torches(vit, 'module.backbone.') | {'head.mlp.0.weight': torch.ones(2)}}
    | OTHER,
    'moco-v3': lambda vit: {
        'state_dict': torches(vit, 'module.base_encoder.')
        | {'module.base_encoder.head.0.weight': torch.ones(2), 'module.predictor.0.weight': torch.ones(2)}
        | {f'module.momentum_encoder.{k}': 0 * v for k, v in torches(vit).items()}
    },
    'mae': lambda vit: {
        'model': torches(vit)
        | {'mask_token': torch.ones(2), 'decoder_pos_embed': torch.ones(2)}
        | {'decoder_blocks.0.attn.qkv.weight': torch.ones(2)}
    },
    'hugging face vit': lambda vit: torches(to_hf(vit), 'vit.') | {'classifier.weight': torch.ones(2)},
    'hugging face deit': lambda vit: torches(to_hf(vit), 'deit.')
    | {'cls_classifier.bias': torch.ones(2), 'deit.embeddings.mask_token': torch.ones(2)},
    'hugging face model': lambda vit: torches(to_hf(vit)) | {'pooler.dense.bias': torch.ones(2)},
}  # fmt: skip


def load(path, content, detector=DETECTOR):
    report = []
    torch.save(content, path) if path.suffix == '.pth' else np.savez(path, **content)
    with weights.open(path) as source:
        params = source.backbone(Yolos(**detector), jax.random.key(0), report.append)
    return params, '\n'.join(report)


def features(params, image):
    """[CLS] and patch features of the ViT alone, through our own layers."""
    backbone = params['backbone']
    patches, _ = patchify([image])
    embed = PatchEmbed(D, jnp.float32).apply({'params': backbone['patch_embed']}, patches)
    x = jnp.concatenate([backbone['cls_token'], embed], axis=1) + backbone['pos_embed'][:, : 1 + SIDE**2]
    for i in range(DEPTH):
        block = {'params': jax.tree.map(lambda p, i=i: p[i], backbone['blocks'])}
        x = Block(H, 1e-6, jnp.float32).apply(block, x, jnp.array([x.shape[1]]))
    mean, deviation = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    norm = backbone['norm']
    return (x - mean) / np.sqrt(deviation**2 + 1e-6) * norm['scale'] + norm['bias']


@pytest.fixture(scope='module')
def vit_model(tmp_path_factory):
    """A folder of transformers' ViT with the weights of `make_vit`, and the model."""
    folder = tmp_path_factory.mktemp('vit')
    config = ViTConfig(
        hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=H, intermediate_size=4 * D,
        image_size=16 * SIDE, patch_size=16, layer_norm_eps=1e-6,
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.save(torches(to_hf(make_vit())), folder / 'pytorch_model.bin')
    return folder, ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()


def test_a_backbone_saved_by_transformers_keeps_its_features(vit_model, tmp_path):
    folder, vit = vit_model
    vit.save_pretrained(tmp_path)  # in safetensors
    image = noise(16 * SIDE, 16 * SIDE)
    with torch.no_grad():
        expected = vit(to_torch(image)).last_hidden_state
    assert expected.abs().max() > 1
    for path in (folder, tmp_path):
        params = yolos_jax.init_from_backbone(path, Yolos(**DETECTOR), jax.random.key(0))
        np.testing.assert_allclose(features(params, image), expected, atol=2e-5)


def test_a_vit_without_a_detector_keeps_its_own_position_table(vit_model, tmp_path):
    folder, theirs = vit_model
    image = noise(16 * SIDE, 16 * SIDE)
    with torch.no_grad():
        expected = theirs(to_torch(image)).last_hidden_state[0]
    torch.save({'model': torches(make_vit())}, tmp_path / 'deit.pth')
    with weights.open(tmp_path / 'deit.pth') as source:
        with pytest.raises(InputError, match=f'deit.pth: it does not say how many heads its {D} channels'):
            source.vit()
        with pytest.raises(InputError, match=f'deit.pth: width {D} is not a multiple of heads 5'):
            source.vit(heads=5)
        models = [source.vit(heads=H)]
    with weights.open(folder) as source:
        models.append(source.vit())
    distilled = torches(make_vit())
    token, (first, others) = torch.randn(1, 1, D), distilled['pos_embed'].split([1, SIDE**2], dim=1)
    distilled |= {'dist_token': token, 'pos_embed': torch.cat([first, token, others], dim=1)}
    torch.save({'model': distilled}, tmp_path / 'distilled.pth')
    with weights.open(tmp_path / 'distilled.pth') as source:
        models.append(source.vit(heads=H))
    for vit, params in models:
        features = vit.apply({'params': params}, *patchify([image]))
        np.testing.assert_allclose(features['cls'][0], expected[0], atol=2e-5)
        np.testing.assert_allclose(features['patches'][0], expected[1:], atol=2e-5)


@pytest.mark.parametrize('text', ['{"image_mean": [0.5, 0.5', '[]', '{"pretrained_cfg": 7}'])
def test_a_damaged_preprocessor_is_not_taken_for_imagenets(text, vit_model, tmp_path):
    vit_model[1].save_pretrained(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text(text)
    with pytest.raises(InputError, match=r'preprocessor_config\.json.*(JSON object|cannot be read)'):
        yolos_jax.init_from_backbone(tmp_path, Yolos(**DETECTOR), jax.random.key(0))


COMPUTE_ELSE = [
    ('', 'hidden_act', 'relu'), ('', 'rope_theta', 50.0), ('', 'image_size', [224, 256]),
    ('', 'architecture', 'vit_small_patch16_rope_ape_224'), ('model_args', 'act_layer', 'relu'),
    ('model_args', 'img_size', [32, 128]), ('pretrained_cfg', 'input_size', [3, 32, 128]),
]  # fmt: skip


@pytest.mark.parametrize(('inner', 'key', 'value'), COMPUTE_ELSE)
def test_a_vit_that_computes_something_else_is_refused(inner, key, value, vit_model, tmp_path):
    vit_model[1].save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config |= {'pretrained_cfg': {'num_classes': 0}} | ({inner: {key: value}} if inner else {key: value})
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match=f'config.json says {key} is .?{re.escape(str(value))}'):
        yolos_jax.init_from_backbone(tmp_path, Yolos(**DETECTOR), jax.random.key(0))


@pytest.mark.parametrize('form', FORMS)
def test_every_project_gives_the_same_parameters(form, tmp_path):
    expected, _ = load(tmp_path / 'x.pth', torches(make_vit()))
    params, report = load(tmp_path / 'x.pth', FORMS[form](make_vit()))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert 'pos_embed 4x4 -> 4x4' in report and 'SHA-256' in report
    assert f'used {len(make_vit()) - 1}: ' in report


@pytest.mark.parametrize('form', ['vision_transformer', 'big_vision', 'big_vision, stacked'])
def test_an_npz_of_google_gets_pixels_normalised_as_in_its_training(form, vit_model, tmp_path):
    content = to_google(make_vit(), big_vision=form != 'vision_transformer')
    content = stacked(content) if 'stacked' in form else content
    params, report = load(tmp_path / 'x.npz', content)
    assert 'go into patch_embed' in report
    image = noise(16 * SIDE, 16 * SIDE)
    pixels = torch.from_numpy(image / np.float32(127.5) - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = vit_model[1](pixels).last_hidden_state
    np.testing.assert_allclose(features(params, image), expected, atol=2e-5)


def test_big_vision_without_class_token_in_bfloat16_with_fixed_positions(tmp_path):
    content = {k: v.astype(ml_dtypes.bfloat16) for k, v in to_google(make_vit(), True).items()}
    del content['cls'], content['Transformer/posembed_input/pos_embedding']
    params, report = load(tmp_path / 'x.npz', content)
    assert 'has no positions: sincos2d of 14x14' in report and 'has no class token' in report
    expected = make_vit()['blocks.1.mlp.fc1.weight'].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params['backbone']['blocks']['mlp']['fc1']['kernel'][1], expected.T)
    with weights.open(tmp_path / 'x.npz') as source:
        table = source.vit()[1]['backbone']['pos_embed'][0, 1:].reshape(14, 14, D)
    omega = 1 / 10_000 ** (np.arange(D // 4) / (D // 4 - 1))  # big_vision's posemb_sincos_2d, of y 3, x 5
    expected = np.concatenate([np.sin(5 * omega), np.cos(5 * omega), np.sin(3 * omega), np.cos(3 * omega)])
    np.testing.assert_allclose(table[3, 5], expected, atol=1e-6)
    content['Transformer/posembed_input/pos_embedding'] = make_vit(SIDE**2)['pos_embed']
    params, report = load(tmp_path / 'x.npz', content)
    assert not params['backbone']['pos_embed'][0, 0].any()
    np.testing.assert_array_equal(
        params['backbone']['pos_embed'][0, 1:17], make_vit(SIDE**2)['pos_embed'][0]
    )


def test_the_distillation_position_becomes_that_of_cls(tmp_path):
    vit = make_vit(2 + SIDE**2)
    content = {'model': torches(vit) | HEAD | {'dist_token': torch.ones(1, 1, D)}}
    content['model'] |= {'head_dist.weight': torch.ones(2)}
    params, report = load(tmp_path / 'x.pth', content)
    np.testing.assert_array_equal(params['backbone']['pos_embed'][0, :17], vit['pos_embed'][0, 1:])
    np.testing.assert_array_equal(params['backbone']['cls_token'], vit['cls_token'])
    assert 'distilled' in report and 'dist_token' in report.split('ignored')[1]


def test_positions_are_resampled_and_the_rest_starts_fresh(tmp_path):
    detector = DETECTOR | dict(pos_grid=(7, 5), mid_pos_grid=(3, 4))
    params, report = load(tmp_path / 'x.pth', torches(make_vit()), detector)
    table = torch.tensor(make_vit()['pos_embed'][:, 1:].reshape(1, 4, 4, D)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(table, (7, 5), mode='bicubic').permute(0, 2, 3, 1)
    backbone = params['backbone']
    np.testing.assert_allclose(backbone['pos_embed'][0, 1:36], wanted.reshape(35, D), atol=1e-6, rtol=0)
    assert 'pos_embed 4x4 -> 7x5' in report
    for name, fresh in (('det_token', backbone['det_token']), ('mid_pos_embed', backbone['mid_pos_embed']),
                        ('[DET] rows', backbone['pos_embed'][0, -5:])):  # fmt: skip
        assert 0.01 < np.std(fresh) < 0.03 and name in report
    other = yolos_jax.init_from_backbone(tmp_path / 'x.pth', Yolos(**detector), jax.random.key(1))
    assert (other['backbone']['det_token'] != backbone['det_token']).all()


@pytest.mark.parametrize(
    ('side', 'fields', 'line'),
    [(14, model.YOLOS_TI, 'pos_embed 14x14 -> 50x83'), (15, model.YOLOS_S_DWR, 'pos_embed 15x15 -> 32x54')],
)
def test_published_sizes_are_resampled(side, fields, line, tmp_path):
    vit = make_vit(1 + side**2, fields['width'], fields['depth'])
    params, report = load(tmp_path / 'x.pth', {'model': torches(vit)}, fields)
    assert line in report
    assert params['backbone']['pos_embed'].shape[1] == 101 + np.prod(fields['pos_grid'])


CHANGES = {
    '1 missing: backbone.blocks.1.norm2.bias': lambda v: v.pop('blocks.1.norm2.bias'),
    'not expected: backbone.blocks.0.q_norm': lambda v: v.update({'blocks.0.q_norm': np.ones(D)}),
    'its 20 positions are not a square grid': lambda v: v.update({'pos_embed': np.ones((1, 20, D))}),
    'a YOLOS detector, not a backbone': lambda v: v.update({'det_token': np.ones((1, 5, D))}),
    '[32, 3, 32, 32] instead of [32, 3, 16, 16]': lambda v: v.update(
        {'patch_embed.proj.weight': np.ones((D, 3, 32, 32))}
    ),
    'no ViT: cls_token is missing': lambda v: v.pop('cls_token'),
    'depth 1; the model asks for 2': lambda v: [v.pop(k) for k in list(v) if 'blocks.1' in k],
    'not finite, in backbone.norm.bias': lambda v: v['norm.bias'].__setitem__(0, np.nan),
}


@pytest.mark.parametrize('says', CHANGES)
def test_a_file_that_is_no_backbone_of_the_model_is_named(says, tmp_path):
    vit = make_vit()
    CHANGES[says](vit)
    with pytest.raises(InputError) as error:
        load(tmp_path / 'x.pth', torches(vit))
    assert says in str(error.value) and str(tmp_path / 'x.pth') in str(error.value)


def test_positions_that_may_be_of_another_grid_are_refused(tmp_path):
    tensors = torches(make_vit())
    tensors['pos_embed'] = torch.zeros(1, 1 + 14 * 16, D)  # as many as 15 x 15
    torch.save(tensors, tmp_path / 'x.pth')
    with pytest.raises(InputError, match='225 positions are not a square grid and .CLS'):
        yolos_jax.init_from_backbone(tmp_path / 'x.pth', Yolos(**DETECTOR), jax.random.key(0))


@pytest.mark.parametrize('form', ['npz', 'timm'])
def test_the_heads_that_a_file_states_are_used(form, tmp_path):
    path = tmp_path / 'x.npz'
    if form == 'npz':
        np.savez(path, **to_google(make_vit()))
    else:
        path = tmp_path / 'timm'
        path.mkdir()
        save_file(torches(make_vit()), path / 'model.safetensors')
        config = {
            'architecture': 'vit_tiny_patch16_224',
            'pretrained_cfg': {},
            'model_args': {'num_heads': H},
        }
        (path / 'config.json').write_text(json.dumps(config))
    with weights.open(path) as source:
        assert source.vit()[0].heads == H
    with pytest.raises(InputError, match=f'a ViT of {H} heads; the model asks for {2 * H}'):
        yolos_jax.init_from_backbone(path, Yolos(**DETECTOR | {'heads': 2 * H}), jax.random.key(0))


def test_values_missing_in_a_file_are_those_of_its_project(tmp_path):
    torch.save(FORMS['moco-v3'](make_vit(width=384)), tmp_path / 'moco.pth')
    dinov3 = {k: v for k, v in make_vit().items() if k != 'pos_embed'} | {'reg_token': np.ones((1, 4, D))}
    torch.save(torches(dinov3), tmp_path / 'dinov3.pth')
    with weights.open(tmp_path / 'moco.pth') as moco, weights.open(tmp_path / 'dinov3.pth') as dinov3:
        vits = moco.vit()[0], dinov3.vit(H)[0]
    assert vits[0].heads == 12 and [vit.eps for vit in vits] == [1e-6, 1e-5]


@pytest.mark.parametrize('prefix', ['module.', 'model.', 'backbone.'])
def test_two_models_in_one_file_are_refused(prefix, tmp_path):
    state = torches(make_vit())
    with pytest.raises(InputError, match='it holds .* twice, under two names: two models in one'):
        load(tmp_path / 'x.pth', state | {prefix + name: 3 * x for name, x in state.items()})


MALFORMED = {
    'not a square grid and .CLS.$': {
        'pos_embed': torch.ones(1, 2 + SIDE**2, D)
    },  # a register's position, perhaps
    'not a square grid and .CLS. and the dist': {'dist_token': torch.ones(1, 1, D)},
    'values of type int8: quantised': {'norm.bias': torch.ones(D, dtype=torch.int8)},
    'not finite, in backbone.norm.bias': {'norm.bias': torch.full((D,), 1e300, dtype=torch.float64)},
    'its tensors, or .* cannot be used .IndexError': {'patch_embed.proj.bias': torch.ones(())},
    'blocks.0.attn.qkv.bias twice': {'blocks.0.attn.q_bias': torch.ones(D)},
}


@pytest.mark.parametrize('message', MALFORMED)
def test_tensors_that_are_no_plain_vits_are_refused(message, tmp_path):
    with pytest.raises(InputError, match=f'x.pth: .*{message}'):
        load(tmp_path / 'x.pth', torches(make_vit()) | MALFORMED[message])


def test_one_bias_of_keys_that_is_missing_is_named():
    parts = lambda letters: {letter: Tensor((2,), lambda: np.ones(2, np.float32)) for letter in letters}
    joined = hf_names.join_qkv({'0.bias': parts('qv'), '1.bias': parts('vq')})  # DINOv3's
    assert joined['0.bias'].numpy().tolist() == [1, 1, 0, 0, 1, 1]
    with pytest.raises(InputError, match='1.bias: has q, v and not all'):
        hf_names.join_qkv({'0.bias': parts('qkv'), '1.bias': parts('qv')})
