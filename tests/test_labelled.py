"""Images with one class each: folders of classes, and a data set of tensorflow-datasets."""

import dataclasses
import os
import shutil
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import ROOT
from PIL import Image

from yolos_jax.data import augmentation, class_batches, labelled, loader
from yolos_jax.errors import InputError
from yolos_jax.tools import make_classes


def test_folders_that_are_no_classes_are_named(class_folder, tmp_path):
    with pytest.raises(InputError, match='has no split test; it has train, val'):
        labelled.read(class_folder, 'test')
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'a.jpg').touch()
    with pytest.raises(InputError, match='0 of 1 images are in the folder of a class'):
        labelled.read(tmp_path, 'train')
    os.mkdir(os.fsencode(tmp_path / 'train') + b'/caf\xe9')
    with open(os.fsencode(tmp_path / 'train') + b'/caf\xe9/a.jpg', 'wb'):
        (tmp_path / 'train' / 'a.jpg').unlink()
    with pytest.raises(InputError, match=r"train: the name of a class is not UTF-8: b'caf\\xe9'"):
        labelled.read(tmp_path, 'train')
    with pytest.raises(InputError, match='no training image has the class L-filled'):
        labelled.read(class_folder, 'val', ['H-filled', 'H-outline'])


def test_labels_are_numbers_of_the_sorted_names(class_folder):
    images = labelled.read(class_folder, 'validation')
    assert images.classes == sorted(
        f'{form}-{k}' for form in make_classes.FORMS for k in ('filled', 'outline')
    )
    assert len(images) == 40 and images.labels.tolist() == np.repeat(np.arange(20), 2).tolist()
    data, label = images.start_read(39)()
    assert data[:2] == b'\xff\xd8' and label == 19
    for changed in ({'labels': images.labels[::-1]}, {'classes': images.classes[::-1]}):
        assert dataclasses.replace(images, **changed).digests != images.digests


def test_images_come_in_the_order_of_torchvisions_image_folder(tmp_path):
    names = ['cat/b.png', 'cat/a.png', 'cat/x/a.png', 'cat/A/z.tif', 'cat-big/0.JPG', 'cat big/1.bmp']
    for name in names:
        (tmp_path / 'train' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(tmp_path / 'train' / name)
    hidden = tmp_path / 'train' / '.cache'
    hidden.mkdir()
    for path in (hidden / '0.png', tmp_path / 'train' / 'cat' / '._a.png'):
        path.touch()
    data = labelled.read(tmp_path, 'train')
    assert data.classes == ['cat', 'cat big', 'cat-big']
    cats = ['cat/a.png', 'cat/b.png', 'cat/A/z.tif', 'cat/x/a.png']
    assert data.files.tolist() == [*cats, 'cat big/1.bmp', 'cat-big/0.JPG']
    (tmp_path / 'train' / 'dog').mkdir()
    with pytest.raises(InputError, match='dog: has no images'):
        labelled.read(tmp_path, 'train')
    assert len(labelled.read(tmp_path, 'train', [*data.classes, 'dog'])) == 6
    (tmp_path / 'train' / 'dog' / 'round').symlink_to('round')
    with pytest.raises(InputError, match='dog: cannot be listed'):
        labelled.read(tmp_path, 'train')


def test_each_seed_epoch_and_step_has_its_own_images_and_draws(class_folder):
    images = labelled.read(class_folder, 'train')
    recipe = augmentation.Recipe(size=64, repeats=3, erasing=0.5, mixup=0.8, cutmix=1.0, group=8)
    plans, filled = [], []
    for seed, epoch in (0, 0), (1, 0), (0, 1):
        source = class_batches.TrainBatches(images, recipe, batch_size=16, seed=seed)
        plans.append(source.plan(epoch).indices)
        ((_, batch, _),) = loader.load(source, [epoch * source.steps_per_epoch], slice(0, 1))
        filled.append((int(batch['noise'][0]), float(batch['share'][0])))
    for other, values in zip(plans[1:], filled[1:], strict=True):
        assert (other != plans[0]).any() and values[0] != filled[0][0] and values[1] != filled[0][1]


def test_an_image_has_the_label_that_its_teacher_gave_it(class_folder):
    images = labelled.read(class_folder, 'train')
    recipe = augmentation.Recipe(size=64, repeats=3, erasing=0, mixup=0, cutmix=0, group=8)
    of_image = np.arange(100, 100 + len(images), dtype=np.int32)
    source = class_batches.TrainBatches(images, recipe, batch_size=16, seed=0, teacher=of_image)
    ((_, batch, indices),) = loader.load(source, [1], slice(4, 12))
    assert batch['teacher'].tolist() == of_image[indices].tolist() and len(set(indices)) > 2


class Imagenet(tfds.core.GeneratorBasedBuilder):
    """A data set in the form of imagenet2012, from folders of classes."""

    VERSION = tfds.core.Version('5.1.0')
    pkg_dir_path = ROOT

    def __init__(self, folder, **options):
        self._folder = folder
        super().__init__(file_format='array_record', **options)

    def _info(self):
        classes = labelled.read(self._folder, 'train').classes
        image = tfds.features.Image(encoding_format='jpeg')
        features = {
            'file_name': tfds.features.Text(),
            'image': image,
            'label': tfds.features.ClassLabel(names=classes),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):  # noqa: ARG002  the interface of tfds
        return {'train': self._generate_examples('train'), 'validation': self._generate_examples('val')}

    def _generate_examples(self, split):
        images = labelled.read(self._folder, split)
        for i, file in enumerate(images.files.tolist()):
            path = self._folder / split / file
            yield file, {'file_name': file, 'image': path, 'label': int(images.labels[i])}


def test_a_data_set_of_tensorflow_gives_the_same_images(class_folder, tmp_path):
    builder = Imagenet(class_folder, data_dir=tmp_path)
    builder.download_and_prepare()
    for split in ('train', 'val'):
        folder, data_set = labelled.read(class_folder, split), labelled.read(builder.data_dir, split)
        assert data_set.classes == folder.classes and len(data_set) == len(folder)
        read = lambda images: sorted(images.start_read(i)() for i in range(len(images)))
        assert read(data_set) == read(folder)  # the data set is in another order
    fewer = dataclasses.replace(data_set, classes=data_set.classes[:-1])
    with pytest.raises(InputError, match='a label is 19, of 19 classes'):
        read(fewer)
    again = Imagenet(class_folder, data_dir=tmp_path / 'again')
    again.download_and_prepare()
    shutil.copytree(again.data_dir, tmp_path / 'copy')
    copy = labelled.read(tmp_path / 'copy', 'val')
    assert copy.digests == data_set.digests
    swapped = dataclasses.replace(copy, images=labelled.read(tmp_path / 'copy', 'train').images)
    assert swapped.digests['examples'] != copy.digests['examples']
    sizes, examples = copy.images.sizes, copy.images.examples
    labelled_by = lambda label: examples._replace(
        start_read=lambda row: lambda: examples.start_read(row)() | {'label': label}
    )
    unlabelled = types.SimpleNamespace(examples=labelled_by(-1))  # as imagenet2012's test split
    with pytest.raises(InputError, match='a label is -1, of 20 classes'):
        dataclasses.replace(copy, images=unlabelled).start_read(0)()
    for other in (
        types.SimpleNamespace(sizes=sizes, examples=labelled_by(0)),
        types.SimpleNamespace(sizes=lambda: [*sizes(), 1], examples=examples),
    ):
        assert dataclasses.replace(copy, images=other).digests['examples'] != copy.digests['examples']
    batches = (class_batches.EvalBatches(images, 64, 40) for images in (folder, data_set))
    (_, ours, _), (_, theirs, _) = (next(loader.load(b, [0])) for b in batches)
    assert sorted(ours['labels']) == sorted(theirs['labels'])
    assert ours['patches'].sum() == theirs['patches'].sum()
