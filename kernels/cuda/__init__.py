"""Kernels for CUDA devices: TIR with the threads of a block written out, one file a family.

What a family gives and how it is named is as in `sparsec.kernels`; a kernel's function binds `blockIdx` and `threadIdx`
instead of taking a range of tiles (`sparsec.kernels.cuda.emit`). `device.h` holds the device functions that TIR has no
words for, such as tensor core instructions.
"""
