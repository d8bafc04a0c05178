"""What the scripts share: one clear line for what the user got wrong."""

import sys

from absl import app
from absl import logging as absl_logging

from yolos_jax.errors import InputError


def run(main):
    """Call `main()`; an `InputError` becomes one line on stderr and exit status 1."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax is talkative
    try:
        main()
    except InputError as error:
        sys.exit(f'error: {error}')


def run_with_flags(main):
    """As `run`, for a script with absl flags; a misspelt config key is an error that names the nearest."""
    try:
        app.run(lambda _: run(main))
    except AttributeError as error:
        if 'Did you mean' not in str(error):
            raise
        sys.exit('error: --config has no key ' + str(error).strip('"\'').replace('\\n', ' '))
