"""The names of the files that a run writes in its folder, beside its checkpoints."""

from yolos_jax.weights import deit

CONFIG = 'config.json'  # by which a folder is known as a run's
CARD = 'README.md'  # the model card of a detector
METRICS = 'metrics.jsonl'
LOG = 'log.txt'
CURVES = 'curves.png'
TRUTH = 'val.json'  # a detector's validation set, if that has no annotation file
WRITTEN = CONFIG, CARD, METRICS, LOG, deit.FILE, CURVES, TRUTH
PROGRAMS = 'compiled'  # the folder of compiled programs
