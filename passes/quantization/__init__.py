"""`quantize`: ranges, grids of integers and the nodes that stand for them."""
