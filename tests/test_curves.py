import json

import pytest
from matplotlib.figure import Figure

from yolos_jax.errors import InputError
from yolos_jax.run import curves


def test_curves_are_labelled_with_last_values_also_of_a_file_an_editor_saved(tmp_path, monkeypatch):
    lines = {'step': 1, 'loss': 3.0, 'AP': 0.1}, {'step': 2, 'loss': 2.0}, {'step': 3, 'AP': 0.25}
    (tmp_path / 'metrics.jsonl').write_text('\ufeff' + ''.join(f'{json.dumps(line)}\n' for line in lines))
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
    curves.draw(tmp_path)
    shown = [[(x.get_label(), [*x.get_xdata()]) for x in axes.lines] for axes in figures[0].axes]
    assert shown == [[('loss 2.000', [1, 2])], [('AP 0.250', [1, 3])], []]


@pytest.mark.parametrize('line', ['{"step": 1', '[3]', '{"loss": 1}', '[' * 100_000])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path, line):
    (tmp_path / 'metrics.jsonl').write_text(f'{line}\n')
    with pytest.raises(InputError, match=r'metrics\.jsonl: not what a run writes'):
        curves.draw(tmp_path)
