"""Data: datasets by name or folder, their splits, preprocessing, calibration batches and accuracy."""
