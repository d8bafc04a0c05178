"""Analyses of the detections of an evaluation: errors, groups, confidence."""

from yolos_jax.analysis.analysis import Analysis, analyse
from yolos_jax.analysis.outcomes import columns

__all__ = ['Analysis', 'analyse', 'columns']
