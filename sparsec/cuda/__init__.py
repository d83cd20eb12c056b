"""CUDA code: TIR to CUDA C (`source`), CUDA C to cubin and PTX (`nvrtc`)."""
