"""Kernels of our own for what decoding a token does on x86-64: written in C, compiled when the package is installed.

Where no C compiler was there, or on other processors, torch's do.
"""
