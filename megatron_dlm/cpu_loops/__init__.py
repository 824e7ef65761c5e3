"""Loops of kernels on the CPU, as functions of C that Numba compiles.

`layers` and `decoding` have the loops, `library` gives them to callers.
"""
