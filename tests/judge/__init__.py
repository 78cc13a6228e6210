"""The judge: random programs whose answers are known by construction, put to every front-end, solver and method.

``python -m tests.judge --family redundant --count 10000`` runs it; ``tests/test_judge.py`` is its quick form.
"""
