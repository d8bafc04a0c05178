"""Runs side by side: a table and curves from their workdirs."""

import json

import pytest

from yolos_jax.errors import InputError
from yolos_jax.tools import compare
from yolos_jax.weights import checkpoint


def write(folder, aps, source='', measure='AP', digests=None, **config):
    """A workdir with an evaluation after each epoch, of the files that are read."""
    meta = folder / 'checkpoints' / '40' / checkpoint.META / 'metadata'
    meta.parent.mkdir(parents=True)
    config = {'init_from': source, 'data': str(folder)} | config
    content = {'config': config, 'data': digests or {}}
    meta.write_text(json.dumps(checkpoint.sealed(content)))
    lines = [{'step': 5, 'epoch': 0.5, 'loss': 3.0}]
    evaluated = [{measure: value, 'AP50': 2 * value, 'AP_large': -1} for value in aps]
    lines += [{'step': 10 * i, 'epoch': i} | values for i, values in enumerate(evaluated, 1)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


def test_runs_are_ordered_by_their_best_ap_with_what_differs(tmp_path, capsys):
    first = write(tmp_path / 'plain', [0.1, 0.2, 0.15], epochs=3, learning_rate=1e-4)
    second = write(tmp_path / 'dei|t', [0.3], 'deit.pth', epochs=3, learning_rate=2e-4)
    third = write(tmp_path / 'young', [], epochs=3, learning_rate=1e-4)
    compare.main([str(first), str(second), str(third), f'--output={tmp_path / "out"}'])
    text = (tmp_path / 'out' / 'compare.md').read_text()
    assert capsys.readouterr().out == text
    numbers = ' | '.join(f'{name} (%)' for name in compare.NUMBERS['AP'])
    assert text.splitlines() == [
        f'| run | starts from | learning_rate | epochs trained | {numbers} |',
        '|' + ' --- |' * 10,
        r'| dei\|t | deit.pth | 0.0002 | 1 | 30.0 | 60.0 |  |  |  |  |',
        '| plain | from scratch | 0.0001 | 3 | 20.0 | 40.0 |  |  |  |  |',
        '| young | from scratch | 0.0001 | 0.5 |  |  |  |  |  |  |',
    ]
    assert (tmp_path / 'out' / 'compare.png').stat().st_size > 10_000


def test_different_data_are_listed_and_different_validation_images_give_a_warning(tmp_path):
    data = {'train': {'boxes': 'a'}, 'val': {'boxes': 'b'}}
    others = {'more': data | {'train': {'boxes': 'c'}}, 'other': data | {'val': {'boxes': 'd'}}}
    first = write(tmp_path / 'first', [0.5], digests=data, data='/coco')
    for name, digests in others.items():
        run = write(tmp_path / name, [0.4], digests=digests, data=f'/{name}')
        compare.main([str(first), str(run), f'--output={tmp_path / "out"}'])
        head, _, *rows, last = (tmp_path / 'out' / 'compare.md').read_text().splitlines()
        assert head.startswith('| run | starts from | data | epochs')
        assert rows[0].startswith('| first | from scratch | /coco |')
        assert ('AP does not rank them' in last) == (name == 'other')


def test_runs_of_pre_training_are_compared_by_their_accuracy(tmp_path):
    runs = [write(tmp_path / x, [0.5], measure='top1', smoothing=0.1) for x in ('a', 'b')]
    compare.main([*map(str, runs), f'--output={tmp_path / "out"}'])
    head, _, row, _ = (tmp_path / 'out' / 'compare.md').read_text().splitlines()
    assert head.endswith('| top1 (%) | top5 (%) |') and row == '| a | from scratch | 1 | 50.0 |  |'
    detector = write(tmp_path / 'detector', [0.1])
    with pytest.raises(InputError, match='compare them separately'):
        compare.main([str(runs[0]), str(detector), f'--output={tmp_path / "mixed"}'])


def test_a_run_of_an_earlier_version_whose_lines_say_no_epoch_is_compared(tmp_path):
    run = write(tmp_path / 'run', [0.1, 0.2])
    lines = [{'step': 5, 'loss': 3.0}, {'step': 10, 'epoch_loss': 2.0, 'AP': 0.1}, {'step': 20, 'AP': 0.2}]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert compare.read(run, 'run').epochs == 2


def test_runs_and_weights_of_the_same_name_are_distinguished_and_an_unfinished_line_is_ignored(tmp_path):
    runs = [write(tmp_path / x / 'run', [0.5], f'runs/{x}/deit.pth') for x in ('a', 'b')]
    runs.append(write(tmp_path / 'c' / 'run', [0.5]))
    with open(runs[0] / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 2')
    compare.main([*map(str, runs), f'--output={tmp_path / "out"}'])
    text = (tmp_path / 'out' / 'compare.md').read_text()
    assert '| a/run | a/deit.pth |' in text and '| b/run | b/deit.pth |' in text
    assert '| c/run | from scratch |' in text


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (lambda run: (run / 'metrics.jsonl').unlink(), r'run: not the workdir of a run .*metrics\.jsonl'),
        (lambda run: (run / 'metrics.jsonl').write_text('{\n'), 'metrics.jsonl: not what a run writes'),
        (lambda run: (run / 'metrics.jsonl').write_text('{"step": 1}\n'), "not what a run writes .'epoch'"),
        (lambda run: (run / 'metrics.jsonl').write_text(''), 'metrics.jsonl: has no lines'),
        (lambda run: (run / 'checkpoints').rename(run / 'x'), 'this run has saved no checkpoint yet'),
    ],
)
def test_a_folder_that_is_not_a_run_is_named_and_nothing_is_written(tmp_path, change, says):
    change(write(tmp_path / 'run', [0.1]))
    with pytest.raises(InputError, match=says):
        compare.main([str(tmp_path / 'run'), f'--output={tmp_path / "out"}'])
    assert not (tmp_path / 'out').exists()
