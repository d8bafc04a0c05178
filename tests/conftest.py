import json
import os

import jax
import numpy as np
import pytest

jax.config.update('jax_num_cpu_devices', 8)  # before any device is used
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@pytest.fixture(scope='session', autouse=True)
def compiled(tmp_path_factory):
    """Programs that differ in their data alone are compiled once, in whichever worker they run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
    jax.config.update('jax_compilation_cache_dir', str(base / 'compiled'))


@pytest.fixture(scope='session')
def coco_folder(tmp_path_factory):
    """A COCO folder of real JPEG files: 24 images to train on, 10 to evaluate on."""
    from yolos_jax.data import shapes

    root = tmp_path_factory.mktemp('data') / 'shapes'
    shapes.write(root, {'train2017': 24, 'val2017': 10})
    return root


def make_hf(fields, eps=1e-12, num_classes=91):
    """A transformers YOLOS with random weights large enough for logits of about 1."""
    import torch
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=fields['width'],
        num_hidden_layers=fields['depth'],
        num_attention_heads=fields['heads'],
        intermediate_size=4 * fields['width'],
        image_size=[16 * side for side in fields['pos_grid']],
        num_detection_tokens=fields.get('num_det_tokens', 100),
        num_labels=num_classes,
        layer_norm_eps=eps,
        use_mid_position_embeddings=fields.get('mid_pos_grid') is not None,
    )
    model = YolosForObjectDetection(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and 'position' not in name and 'token' not in name:
                value.normal_(0, value[0].numel() ** -0.5)
            else:
                value.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, 0.1)
    return model


def reference_tensors(hf):
    """The weights of a transformers YOLOS under the reference's names, as they are now."""
    from yolos_jax import convert
    from yolos_jax.tensors import Tensor

    values = {name: value.detach().numpy().copy() for name, value in hf.state_dict().items()}
    return convert.from_hf({k: Tensor(v.shape, lambda v=v: v) for k, v in values.items()})


def to_torch(image):
    """An image uint8 [height, width, 3] as a torch model takes it: normalised [1, 3, height, width]."""
    import torch

    from yolos_jax.model import MEAN, STD

    pixels = (np.float32(image) / np.float32(255) - MEAN) / STD
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def noise(height, width, seed=0):
    """A random image, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


TINY = dict(width=32, depth=3, heads=2, pos_grid=(4, 6), mid_pos_grid=(4, 6), num_det_tokens=7)


def make_targets(counts, slots, num_classes, seed=0):
    """Random targets for images with so many objects each: ours, and transformers' labels."""
    import torch

    rng = np.random.default_rng(seed)
    B = len(counts)
    size = rng.uniform(0.05, 0.5, (B, slots, 2))
    centre = rng.uniform(size / 2, 1 - size / 2)
    boxes = np.concatenate([centre, size], axis=-1).astype(np.float32)
    labels = rng.integers(0, num_classes, (B, slots)).astype(np.int32)
    valid = np.arange(slots) < np.array(counts)[:, None]
    ours = {'labels': labels, 'boxes': boxes, 'valid': valid}
    theirs = [
        {'class_labels': torch.from_numpy(labels[b, :n]).long(), 'boxes': torch.from_numpy(boxes[b, :n])}
        for b, n in enumerate(counts)
    ]
    return ours, theirs


def write_coco(root, content, images=True):
    """A COCO folder with this annotation content and empty image files of the names in it."""
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    (root / 'val').mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / 'annotations' / 'instances_val.json').write_text(text)
    if images and not isinstance(content, str):
        for image in content['images']:
            (root / 'val' / image['file_name']).touch()
    return root


def coco_content():
    """A small annotation file with a crowd, a box beyond the image, and one without an area."""
    return {
        'info': {'year': 2017},
        'images': [
            {'id': 7, 'file_name': 'b.jpg', 'height': 100, 'width': 200, 'license': 1},
            {'id': 3, 'file_name': 'a.jpg', 'height': 50, 'width': 60},
        ],
        'annotations': [
            {'id': 1, 'image_id': 7, 'category_id': 2, 'bbox': [10, 20, 30, 40], 'iscrowd': 0, 'area': 9.5,
             'segmentation': [[1, 2, 3]]},
            {'id': 2, 'image_id': 7, 'category_id': 5, 'bbox': [150.5, -5, 100, 50]},
            {'id': 3, 'image_id': 7, 'category_id': 5, 'bbox': [0, 0, 9, 9], 'iscrowd': 1},
            {'id': 4, 'image_id': 7, 'category_id': 5, 'bbox': [50, 50, 0, 10]},
        ],
        'categories': [{'id': 2, 'name': 'cat', 'supercategory': 'animal'}, {'id': 5, 'name': 'dog'}],
    }  # fmt: skip
