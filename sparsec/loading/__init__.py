"""load: a model file to a checked, normalized model (`sparsec.loading.load`), and what that needs."""
