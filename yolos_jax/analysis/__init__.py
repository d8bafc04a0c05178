"""What the detections of an evaluation tell: errors, groups, confidence."""
