"""Writes the API pages to a folder: python docs/api.py FOLDER [MODULE ...]."""

import sys
from pathlib import Path

import pdoc
import pdoc.render

import yolos_jax

# pdoc looks into the module itself, where names that are imported when they are used are not yet
vars(yolos_jax).update({name: getattr(yolos_jax, name) for name in yolos_jax.__all__})
pdoc.render.configure(docformat='google', template_directory=Path(__file__).parent / 'pdoc')
folder, *modules = sys.argv[1:]
pdoc.pdoc(*modules or ['yolos_jax', 'yolos_jax.evaluation', 'yolos_jax.run'], output_directory=Path(folder))
