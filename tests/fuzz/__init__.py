"""The fuzz target: hostile inputs and call patterns for every front-end, judged by references that are not ours.

``python -m tests.fuzz --count 100000`` runs it (``make fuzz``); ``tests/test_fuzz.py`` is its quick form.
"""
