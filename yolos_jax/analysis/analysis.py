"""The whole analysis of the detections in a split, as numbers."""

import dataclasses
from typing import Any

import numpy as np

from yolos_jax.analysis import confidence, groups, outcomes, precision, tide
from yolos_jax.analysis.groups import Group
from yolos_jax.analysis.outcomes import Outcomes, Split


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The results of `analyse` for the detections in a split.

    errors: at IoU 0.5; thresholds: the best of each class; least_scores [K]: their scores, 1 for a class
    without one; confusion [K + 1, K + 1]; groups: {title: groups}; corrupted: {name: its AP at each
    strength}, empty if not measured.
    """

    outcomes: Outcomes
    curves: precision.Curves
    errors: tide.Errors
    thresholds: list[confidence.Threshold]
    least_scores: np.ndarray
    confusion: np.ndarray
    calibration: confidence.Calibration
    groups: dict[str, list[Group]]
    corrupted: dict[str, list[float]]

    def relative_ap(self) -> float:
        """The mean AP under corruptions, relative to the AP without."""
        return float(np.mean([*self.corrupted.values()])) / max(self.curves.ap(), 1e-9)

    def numbers(self) -> dict[str, Any]:
        """The analysis without the single detections, as content for JSON."""
        split = self.outcomes.split
        by_class = zip(split.class_names, self.curves.by_class().tolist(), self.thresholds, strict=True)
        return {
            'classes': {name: {'AP': ap} | best._asdict() for name, ap, best in by_class},
            'errors': {
                kind.name.lower(): {'count': self.errors.counts[kind], 'AP50_cost': self.errors.costs[kind]}
                for kind in tide.Kind
            },
            'confusion': self.confusion.tolist(),
            'calibration': {name: np.asarray(x).tolist() for name, x in self.calibration._asdict().items()},
            'groups': {title: [*map(dataclasses.asdict, parts)] for title, parts in self.groups.items()},
            'corrupted': self.corrupted,
        }


def analyse(
    split: Split, fields: dict[str, list] | None = None, corrupted: dict[str, list[float]] | None = None
) -> Analysis:
    """Match a split's detections and run all analyses.

    fields: as `groups.read_fields` gives them.
    """
    matched = outcomes.match(split)
    thresholds = confidence.best_thresholds(matched)
    least_scores = np.array([1.0 if x.score is None else x.score for x in thresholds])
    parts = {
        'Size of objects': groups.by_size(split),
        'Shape of objects': groups.by_shape(split),
        'Objects in the image': groups.by_crowding(matched),
        'Frequency of classes': groups.by_frequency(matched),
    }
    for name, values in (fields or {}).items():
        if name.startswith('images.'):
            parts[name] = groups.by_image_field(matched, values)
        else:
            parts[name] = groups.by_object_field(split, [values[row] for row in split.rows.tolist()])
    return Analysis(
        matched,
        curves=precision.curves(matched),
        errors=tide.errors(matched),
        thresholds=thresholds,
        least_scores=least_scores,
        confusion=confidence.confusion(matched, least_scores),
        calibration=confidence.calibration(matched),
        groups=parts,
        corrupted=corrupted or {},
    )
