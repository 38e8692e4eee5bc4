"""Compiles the C++ and CUDA sources.

``setup.py`` uses this package in a source tree, ``python -m fastllm build`` in an installed package, and the tests for
the emulated CUDA kernels. ``toolchain`` finds compilers, ``plan`` describes the sources and writes the ninja file,
``builder`` runs ninja, ``cache`` keeps a user's builds. setup.py loads it without ``fastllm``, which needs torch: so
``toolchain``, ``plan`` and ``builder`` import each other and the standard library alone.
"""
