"""Triton kernels. Importing a module of this package imports triton, so callers do that when a kernel is first used."""
