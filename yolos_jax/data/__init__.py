"""The data path: annotations -> records -> geometry -> plan -> loader; per image pixels does the work."""
