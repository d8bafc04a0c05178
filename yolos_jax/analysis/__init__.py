"""Analyses of the detections of an evaluation: errors, groups, confidence."""
