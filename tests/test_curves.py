import json

from matplotlib.figure import Figure

from yolos_jax.run import curves


def test_curves_are_labelled_with_their_last_values(tmp_path, monkeypatch):
    lines = {'step': 1, 'loss': 3.0, 'AP': 0.1}, {'step': 2, 'loss': 2.0}, {'step': 3, 'AP': 0.25}
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
    curves.draw(tmp_path)
    shown = [[(x.get_label(), [*x.get_xdata()]) for x in axes.lines] for axes in figures[0].axes]
    assert shown == [[('loss 2.000', [1, 2])], [('AP 0.250', [1, 3])], []]
