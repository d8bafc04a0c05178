import jax.numpy as jnp
import numpy as np
import pytest
from helpers import noise

from yolos_jax import visualize
from yolos_jax.detections import Detections, best_first
from yolos_jax.errors import InputError


@pytest.mark.parametrize('scale', [4, 1])
def test_boxes_are_drawn_where_they_are(scale):
    image = np.zeros((400 // scale, 480 // scale, 3), np.uint8)
    box = np.float32([[120, 160, 360, 320]]) / scale
    drawn = visualize.draw(image, box, [1], ['circle 0.90'])
    assert drawn.shape == (400, 480, 3)  # a small image is enlarged
    assert drawn[160, 240].any() and drawn[320, 240].any() and drawn[240, 120].any()
    assert not drawn[240, 240].any() and not image.any()  # neither filled, nor the original changed
    beyond = visualize.draw(image, [[-9, -9, 999, 999]], [1], [''])
    assert beyond[200, [0, -1]].any(axis=1).all() and beyond[[0, -1], 240].any(axis=1).all()


def test_a_thin_image_is_not_enlarged_beyond_bounds():
    drawn = visualize.draw(np.zeros((1, 40_000, 3), np.uint8), np.zeros((0, 4)), [], [])
    assert drawn.shape == (1, 40_000, 3)
    assert max(visualize.draw(np.zeros((8, 900, 3), np.uint8), np.zeros((0, 4)), [], []).shape) <= 4096


def label_pixels(image, boxes, captions, **options):
    """Where captions lie: what differs from a picture with the same boxes and a caption elsewhere."""
    drawn = visualize.draw(image, boxes, [1] * len(boxes), captions, **options)
    bare = visualize.draw(image, boxes, [1] * len(boxes), [''] * len(boxes), **options)
    return np.argwhere((drawn != bare).any(axis=2))


@pytest.mark.parametrize(
    'box',
    [[0, 0, 40, 40], [560, 0, 639, 60], [0, 440, 50, 479], [600, 430, 639, 479], [-50, -50, 700, 700]],
)
def test_a_caption_lies_within_the_image_on_all_sides(box):
    """A caption cut at an edge would differ from the same one in the middle."""
    image = np.zeros((480, 640, 3), np.uint8)
    middle = label_pixels(image, [[300, 200, 340, 240]], ['a long caption 0.99'])
    there = label_pixels(image, [box], ['a long caption 0.99'])
    assert np.ptp(middle, axis=0)[1] > 100
    np.testing.assert_allclose(np.ptp(there, axis=0), np.ptp(middle, axis=0), atol=10)
    low, high = box[1::-1], box[:1:-1]
    assert (there.min(0) <= np.add(high, 1)).all() and (there.max(0) >= np.subtract(low, 1)).all()


def test_captions_do_not_lie_on_one_another_where_there_is_room():
    image = np.zeros((480, 640, 3), np.uint8)
    boxes = [[200, 200, 300, 300], [205, 203, 305, 303], [210, 206, 310, 306]]
    apart = [len(label_pixels(image, [box], ['caption'])) for box in boxes]
    together = len(label_pixels(image, boxes, ['caption'] * 3))
    assert together > 0.9 * sum(apart)


def test_where_captions_overlap_the_first_is_on_top():
    image, box = np.zeros((480, 640, 3), np.uint8), [300, 200, 340, 240]
    ground = lambda n: (
        (visualize.draw(image, [box] * n, range(n), ['caption'] * n) == visualize.colour_of(0)).all(axis=2)
    ).sum()
    assert ground(40) == ground(8)  # a caption has eight places beside its box


def test_letters_are_black_or_white_by_the_luminance_of_their_ground():
    image = np.zeros((480, 640, 3), np.uint8)
    for label in range(12):
        colour = np.array(visualize.colour_of(label))
        drawn = visualize.draw(image, [[100, 100, 300, 300]], [label], ['MMMM'])
        letters = (
            (drawn[70:100, 100:200] == 0).all(axis=2).sum(),
            (drawn[70:100, 100:200] == 255).all(axis=2).sum(),
        )
        bright = colour @ [0.299, 0.587, 0.114] > 140
        assert (letters[1] == 0) == bright, label


def test_a_caption_wider_than_the_image_is_made_smaller_or_cut():
    image = np.zeros((400, 330, 3), np.uint8)
    for caption in ('x' * 30, 'x' * 300, '\u5b57' * 80):
        assert np.ptp(label_pixels(image, [[10, 100, 50, 200]], [caption]), axis=0)[1] < 330


def test_another_font_can_be_given(tmp_path):
    image, box = noise(400, 400), [[100, 100, 300, 300]]
    mono = next(p for p in visualize.default_font().parent.glob('DejaVuSansMono.ttf'))
    assert (
        visualize.draw(image, box, [1], ['iii'], mono) != visualize.draw(image, box, [1], ['iii'])
    ).any()
    with pytest.raises(InputError, match='no font that can be read') as error:
        visualize.draw(image, box, [1], ['iii'], tmp_path / 'none.ttf')
    assert error.value.argument == 'font'


def test_a_picture_keeps_the_best_of_duplicate_detections():
    boxes = np.float32([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [0, 0, 10, 6], [50, 50, 60, 60]])
    labels = np.array([1, 1, 2, 1, 1])
    assert visualize.without_duplicates(boxes, labels, 0.7).tolist() == [0, 2, 3, 4]
    assert visualize.without_duplicates(boxes, labels, 1.0).tolist() == [0, 1, 2, 3, 4]


def detections(image=None):
    """Three, the second of them a duplicate of the first."""
    boxes = np.float32([[10.126, 20, 50, 60], [11, 20, 50, 60], [60, 10, 90, 40]])
    return Detections(boxes, np.float32([0.87654, 0.5, 0.25]), np.array([3, 3, 7]), ['a', 'a', 'b'], image)


def test_detections_are_listed_with_their_numbers_rounded():
    first, _, last = detections().to_list()
    assert first == {'box': [10.13, 20, 50, 60], 'score': 0.8765, 'label': 3, 'name': 'a'}
    assert last == {'box': [60, 10, 90, 40], 'score': 0.25, 'label': 7, 'name': 'b'}
    assert detections().to_supervision().class_id.tolist() == [3, 3, 7]


def test_a_class_without_a_name_is_called_by_its_number():
    outputs = {'boxes': np.float32([[0, 0, 0.5, 1], [0, 0, 1, 1]]), 'scores': np.float32([0.1, 0.9])}
    outputs['labels'] = np.array([2, 12])
    result = Detections.of_tokens(outputs, np.array([1, 0]), {2: 'cat'}, (50, 100), ids={2: 17, 12: 99})
    assert result.names == ['class 12', 'cat'] and result.labels.tolist() == [99, 17]
    assert result.boxes.tolist() == [[0, 0, 100, 50], [0, 0, 50, 50]]


def test_detections_are_chosen_by_numbers_lists_and_masks():
    every = detections()
    assert every[every.labels.argmax()].name == every[-1].name == 'b'
    for rows, scores in (([], []), ([2, 0], [0.25, 0.87654]), ([False, True, False], [0.5])):
        np.testing.assert_array_equal(every[rows].scores, np.float32(scores))


def test_duplicates_are_drawn_only_when_asked_for():
    image = np.zeros((400, 480, 3), np.uint8)
    every = detections(image)
    once = np.array(every[[0, 2]].draw())
    np.testing.assert_array_equal(every.draw(), once)
    assert (np.array(every.draw(duplicates=1)) != once).any()


def test_of_equal_scores_the_first_comes_first():
    assert best_first(np.float32([0.5, 0.9, 0.5, 0.5] * 9), 0.5).tolist()[9:12] == [0, 2, 3]


def test_text_for_matplotlib_is_neither_a_formula_nor_hidden():
    assert visualize.plain('_a$b$') == r' _a\$b\$'


def test_an_index_of_numpy_or_jax_is_an_index():
    best = detections()[0]
    assert len(detections()[[]]) == 0
    for index in (np.argmax([1, 0]), np.array(0), jnp.argmax(jnp.array([1, 0]))):
        assert detections()[index].name == best.name
