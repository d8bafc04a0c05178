"""tensorflow-datasets' builder of a COCO folder, for `build_tfds`.

It is not in `build_tfds`, because tensorflow-datasets looks up the module of the class.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from yolos_jax import visualize
from yolos_jax.data import array_records, pixels
from yolos_jax.data.annotations import Annotations, class_names


class Coco(tfds.core.GeneratorBasedBuilder):
    """A COCO folder in the layout of coco/2017."""

    VERSION = tfds.core.Version('1.1.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='2017', version='1.1.0')]

    def __init__(self, splits: dict, **options: Any) -> None:
        """splits: {split: (the folder of the images, as `records.Records.images`, and `Annotations`)}."""
        self._splits = splits
        super().__init__(config='2017', file_format='array_record', **options)

    def _info(self) -> tfds.core.DatasetInfo:
        names = [*class_names(next(iter(self._splits.values()))[1].categories).values()]
        objects = {
            'area': np.int64,
            'bbox': tfds.features.BBoxFeature(),
            'id': np.int64,
            'is_crowd': np.bool_,
            'label': tfds.features.ClassLabel(names=names),
        }
        features = {
            'image': tfds.features.Image(encoding_format='jpeg'),
            'image/filename': tfds.features.Text(),
            'image/id': np.int64,
            'objects': tfds.features.Sequence(objects),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager: Any) -> dict:  # noqa: ARG002  the interface of tfds
        return {
            array_records.SPLITS.get(name, name): self._examples(*split)
            for name, split in self._splits.items()
        }

    def _generate_examples(self) -> Iterator:
        """Not used: each split has its own."""
        return iter(())

    def _examples(self, images: Any, a: Annotations) -> Iterator[tuple[int, dict]]:
        labels = {number: k for k, (number, _) in enumerate(a.categories)}
        order = np.argsort(a.owners, kind='stable')
        first = np.searchsorted(a.owners[order], a.ids)
        last = np.searchsorted(a.owners[order], a.ids, side='right')
        for i, image_id in enumerate(a.ids.tolist()):
            size = a.heights[i], a.widths[i]
            yield (
                image_id,
                {
                    'image': io.BytesIO(_stored(images, a.files[i], i, size)),
                    'image/filename': str(a.files[i]),
                    'image/id': image_id,
                    'objects': [_object(a, k, labels, *size) for k in order[first[i] : last[i]]],
                },
            )


def _stored(images: Any, file: str, row: int, size: tuple[int, int]) -> bytes:
    """The bytes of an image: of its file, or of a PNG turned upright if its boxes refer to that."""
    data, name = images.start_read(file, row)(), images.name(file)
    if pixels.orientation(data) == 1 or not images.upright and pixels.size(data, name) == size:
        return data
    upright = pixels.to_rgb(pixels.decode_sized(data, name, size, images.upright))
    return visualize.encoded(Image.fromarray(upright), 'png')


def _object(a: Annotations, k: int, labels: dict[int, int], height: int, width: int) -> dict:
    """Annotation k as tensorflow-datasets stores it; labels: {category id: label}."""
    x, y, w, h = a.boxes[k]
    w, h = max(w, 0), max(h, 0)
    box = np.clip([y / height, x / width, (y + h) / height, (x + w) / width], 0, 1)
    return {
        'area': int(w * h),
        'bbox': tfds.features.BBox(*box),
        'id': int(a.annotation_ids[k]),
        'is_crowd': bool(a.crowd[k]),
        'label': labels[int(a.labels[k])],
    }
