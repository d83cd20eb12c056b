"""`prune`: which weights become zero, how the zeros are divided among layers, and what the others become."""
