"""Worked examples of the library, each a package that runs with ``python -m``."""
