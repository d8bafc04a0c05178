"""Videos: what is written of their frames, and of those that end too early."""

import json
import os
import re
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from helpers import TINY, make_video, run_predict
from PIL import Image


def test_a_video_that_has_changed_is_done_again(saved, tmp_path):
    film, lines = tmp_path / 'film.mp4', tmp_path / 'out' / 'film.jsonl'
    for count in (1, 3):
        make_video(film, count * [np.zeros((96, 128, 3), np.uint8)])
        os.utime(film, (count, count))
        run_predict(saved, tmp_path / 'out', film, '--no-pictures')
        assert len(lines.read_text().splitlines()) == count


def test_a_video_is_annotated_frame_by_frame(saved, photographs, tmp_path):
    frames = [np.asarray(Image.open(p).resize((128, 96))) for p in sorted(photographs.iterdir())]
    make_video(tmp_path / 'film.mp4', frames)
    out = tmp_path / 'out'
    run_predict(saved, out, tmp_path / 'film.mp4')
    entries = [json.loads(line) for line in (out / 'film.jsonl').read_text().splitlines()]
    assert [entry['frame'] for entry in entries] == list(range(10))
    assert [entry['seconds'] for entry in entries] == pytest.approx([0.1 * i for i in range(10)])
    assert all(len(entry['detections']) == TINY['num_det_tokens'] for entry in entries)
    with av.open(str(out / 'film.mp4')) as annotated:
        pictures = [frame.to_ndarray(format='rgb24') for frame in annotated.decode(video=0)]
    assert len(pictures) == 10 and pictures[0].shape == (384, 512, 3)
    plain = np.asarray(Image.fromarray(frames[0]).resize((512, 384)), np.int32)
    assert np.abs(pictures[0] - plain).max() > 100  # boxes


def test_a_file_that_is_no_video_is_named_and_the_others_are_done(saved, tmp_path, capsys):
    (tmp_path / 'film.mp4').write_bytes(b'<html>')
    make_video(tmp_path / 'good.mp4', [np.zeros((96, 128, 3), np.uint8)])
    with pytest.raises(SystemExit):
        run_predict(saved, tmp_path / 'out', tmp_path / 'film.mp4', tmp_path / 'good.mp4')
    assert 'film.mp4: no video that can be read' in capsys.readouterr().err
    assert not (tmp_path / 'out' / 'film.mp4').exists() and (tmp_path / 'out' / 'good.mp4').exists()


def turn(path):
    """Write into an .mp4 that its pictures are to be turned by 90 degrees, clockwise."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b'tkhd') + 4 + 40
    data[matrix : matrix + 36] = struct.pack('>9i', 0, 1 << 16, 0, -1 << 16, 0, 0, 96 << 16, 0, 1 << 30)
    path.write_bytes(data)


def test_a_video_of_a_phone_held_upright_is_seen_upright(saved, tmp_path):
    frame = np.zeros((96, 128, 3), np.uint8)
    frame[:, :64] = 255  # above, after the turn
    make_video(tmp_path / 'film.mp4', [frame] * 3)
    turn(tmp_path / 'film.mp4')
    run_predict(saved, tmp_path / 'out', tmp_path / 'film.mp4', '--threshold=1')
    with av.open(str(tmp_path / 'out' / 'film.mp4')) as annotated:
        picture = next(annotated.decode(video=0)).to_ndarray(format='rgb24')
    height, width, _ = picture.shape
    assert height * 96 == width * 128
    assert picture[: height // 3].min() > 200 and picture[-height // 3 :].max() < 50


def test_videos_removed_by_overwrite_are_processed_again(saved, tmp_path):
    film, image, out = tmp_path / 'film.mp4', tmp_path / 'image.jpg', tmp_path / 'out'
    make_video(film, [np.zeros((96, 128, 3), np.uint8)])
    Image.new('RGB', (64, 64)).save(image)
    run_predict(saved, out, film)
    assert (out / 'film.mp4').exists()
    run_predict(saved, out, image, '--overwrite', '--max_detections=1')
    assert not (out / 'film.mp4').exists()
    run_predict(saved, out, film, image, '--max_detections=1')
    assert len(json.loads((out / 'film.jsonl').read_text())['detections']) == 1


def test_videos_of_one_name_are_numbered(saved, tmp_path, capsys):
    paths = [tmp_path / name for name in ('a/film.mp4', 'b/film.mp4', 'predictions.mp4')]
    for count, path in enumerate(paths, 1):
        path.parent.mkdir(exist_ok=True)
        make_video(path, [np.zeros((96, 128, 3), np.uint8)] * count)
    out = tmp_path / 'out'
    run_predict(saved, out, *paths, '--no-pictures')
    assert capsys.readouterr().out.splitlines()[-2] == 'videos: 3'
    counts = [
        len((out / f'{n}.jsonl').read_text().splitlines()) for n in ('film', 'film-2', 'predictions-2')
    ]
    assert counts == [1, 2, 3]
    (tmp_path / 'c').mkdir()
    make_video(tmp_path / 'c' / 'film.mp4', [np.zeros((96, 128, 3), np.uint8)] * 4)
    before = (out / 'film-2.jsonl').stat().st_mtime_ns
    run_predict(saved, out, *paths, tmp_path / 'c' / 'film.mp4', '--no-pictures')  # of another call
    assert len((out / 'film-3.jsonl').read_text().splitlines()) == 4
    assert (out / 'film-2.jsonl').stat().st_mtime_ns == before
    (out / 'film-2.jsonl').unlink()
    (out / 'videos.json').unlink()  # as of an earlier version
    run_predict(saved, out, tmp_path / 'b' / 'film.mp4', '--no-pictures')
    assert len((out / 'film-2.jsonl').read_text().splitlines()) == 2


def test_frames_of_one_time_follow_each_other(saved, tmp_path):
    with av.open(str(tmp_path / 'film.mkv'), 'w') as container:
        stream = container.add_stream('mjpeg', rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, 'yuvj420p'
        for time_of in (0, 33, 33, 33, 34, 66):  # ms
            (packet,) = stream.encode(av.VideoFrame.from_ndarray(np.zeros((96, 128, 3), np.uint8)))
            packet.pts = packet.dts = time_of
            packet.time_base = Fraction(1, 1000)
            container.mux(packet)
    run_predict(saved, tmp_path / 'out', tmp_path / 'film.mkv', '--threshold=1')
    with av.open(str(tmp_path / 'out' / 'film.mp4')) as annotated:
        times = [frame.time for frame in annotated.decode(video=0)]
    assert len(times) == 6 and times == sorted(set(times))


@pytest.mark.parametrize('ending', ['mkv', 'avi'])
def test_a_video_that_was_cut_off_is_named(ending, saved, tmp_path, capsys):
    film, lines = tmp_path / f'film.{ending}', tmp_path / 'out' / 'film.jsonl'
    make_video(film, np.random.default_rng(0).integers(0, 256, (40, 96, 128, 3), np.uint8))
    run_predict(saved, tmp_path / 'out', film, '--threshold=1', '--no-pictures')
    assert len(lines.read_text().splitlines()) == 40 and 'cut off' not in capsys.readouterr().err
    data = film.read_bytes()
    film.write_bytes(data[: len(data) // 2])
    run_predict(saved, tmp_path / 'out', film, '--threshold=1', '--no-pictures')
    assert re.search(f'film.{ending}: seems to be cut off: ', capsys.readouterr().err)
    assert 0 < len(lines.read_text().splitlines()) < 40
