"""Datasets with code of their own, as TensorFlow Datasets builders."""
