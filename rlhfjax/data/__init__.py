"""Data on disk: record schemas, TFDS datasets in ArrayRecord files, the movies benchmark, batches for training."""
