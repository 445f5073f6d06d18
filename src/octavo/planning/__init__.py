"""How much memory a model needs to be loaded, to generate and to be trained, from its configuration alone."""
