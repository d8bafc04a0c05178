"""The demo in a browser: upload, detect, click, and what is no image."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from browser import needs_browser, opened
from helpers import ROOT, TINY, make_hf
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.support.ui import WebDriverWait

from yolos_jax import Detector


@pytest.fixture(scope='module')
def served(coco_folder, tmp_path_factory):
    """The address of a demo, its detector, and a photograph."""
    folder = tmp_path_factory.mktemp('demo')
    make_hf(dict(TINY, depth=2), num_classes=4).save_pretrained(folder)
    size = {'size': {'shortest_edge': 64, 'longest_edge': 96}}
    (folder / 'preprocessor_config.json').write_text(json.dumps(size))
    sys.path.insert(0, str(ROOT / 'demo'))
    import app

    page = app.make_page(app.Demo(str(folder)))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield address, Detector.from_pretrained(folder), coco_folder / 'val2017' / '000000000001.jpg'
    page.close()


def upload(browser, path):
    browser.find_element('css selector', '#photograph input[type=file]').send_keys(str(path))


def image(browser, name):
    """The picture of that name, once it is there."""
    shown = f'const x = document.querySelector("#{name} img"); return x && x.naturalWidth > 1 ? x : null'
    return WebDriverWait(browser, 60).until(lambda browser: browser.execute_script(shown))


@needs_browser
def test_clicking_an_object_shows_the_attention_of_its_token(served, tmp_path):
    address, detector, photograph = served
    with opened(address, tmp_path / 'profile') as browser:
        WebDriverWait(browser, 60).until(lambda b: b.find_elements('css selector', '#photograph input'))
        upload(browser, photograph)
        image(browser, 'detections')
        number = browser.find_element('css selector', '#threshold input[type=number]')
        number.send_keys(Keys.CONTROL, 'a')
        number.send_keys('0.05', Keys.TAB)
        table = lambda b: b.find_element('css selector', '#objects').text
        WebDriverWait(browser, 60).until(lambda b: 'LABEL' in table(b))
        detections = detector(str(photograph), threshold=0.05)
        height, width = detections.size
        picture = image(browser, 'detections')
        left, top, right, bottom = detections.boxes[0] / [width, height, width, height]
        away = (
            (left + right - 1) / 2 * picture.size['width'],
            (top + bottom - 1) / 2 * picture.size['height'],
        )
        ActionChains(browser).move_to_element_with_offset(picture, *map(int, away)).click().perform()
        assert image(browser, 'attention')


@needs_browser
def test_a_file_that_is_not_an_image_gives_an_error_message(served, tmp_path):
    address, *_ = served
    (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8\xff no image')
    with opened(address, tmp_path / 'profile') as browser:
        WebDriverWait(browser, 60).until(lambda b: b.find_elements('css selector', '#photograph input'))
        upload(browser, tmp_path / 'broken.jpg')
        body = lambda b: b.find_element('css selector', 'body').text
        WebDriverWait(browser, 60).until(lambda b: 'broken.jpg: not a readable image' in body(b))
        assert 'Traceback' not in body(browser)


@needs_browser
def test_two_people_at_once_both_get_their_detections(served, tmp_path):
    address, _, photograph = served

    def person(browser):
        WebDriverWait(browser, 60).until(lambda b: b.find_elements('css selector', '#photograph input'))
        upload(browser, photograph)
        return image(browser, 'detections') is not None

    # one browser after the other, since the drivers look for a free port each
    with opened(address, tmp_path / 'one') as first, opened(address, tmp_path / 'two') as second:
        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(person, (first, second)))
