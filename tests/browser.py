"""A browser for tests of pages: headless Chromium, which says what a page complains of."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver

needs_browser = pytest.mark.skipif(
    not shutil.which('chromedriver'), reason="needs Debian's chromium and chromium-driver"
)


@contextlib.contextmanager
def opened(url: str, folder, width: int = 1200, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A page in a browser of its own, without a network; fails at the end where the console has errors."""
    options = webdriver.ChromeOptions()
    for argument in (
        'headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-sync',
        'disable-background-networking', 'disable-component-update', 'disable-dev-shm-usage',
        f'user-data-dir={folder}', f'window-size={width},900',
    ):  # fmt: skip
        options.add_argument(f'--{argument}')
    if dark:
        options.add_argument('--blink-settings=preferredColorScheme=0')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    service = webdriver.ChromeService(shutil.which('chromedriver'))
    driver = webdriver.Chrome(options, service)
    try:
        driver.get(url)
        yield driver
        complaints = [x['message'] for x in driver.get_log('browser') if x['level'] == 'SEVERE']
        assert not complaints
    finally:
        driver.quit()
