"""build: a Program to machine code, data files and libraries."""
