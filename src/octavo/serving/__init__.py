"""Using a model: generation as a stream of text."""
