"""A detector with everything needed to use it."""

import dataclasses

from yolos_jax.model import Yolos


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A detector: its model, parameters, class names {id: name} and the size of image it was evaluated at.

    size, max_size: the shorter side images are resized to, and the bound of the longer, in pixels.
    about: where it is from: 'source' and 'sha256' of a file; 'config', 'AP' and 'step' of a run, and
        'category_ids' {str(label): id}, where its data's ids are not the labels.
    """

    model: Yolos
    params: dict
    classes: dict
    size: int
    max_size: int
    about: dict = dataclasses.field(default_factory=dict)
