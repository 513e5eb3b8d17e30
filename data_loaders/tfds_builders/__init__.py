"""TFDS builders of datasets that TFDS lacks: ArrayRecord files, resumable, without TensorFlow."""
