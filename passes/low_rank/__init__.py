"""`factorize` and `compress`: layers as products of smaller ones, with or without a sparse rest."""
