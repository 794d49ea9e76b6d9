"""A module for each command of `nfnets-xla`, named after it: its `main` takes the words after it.

Beside them is what only they use. What a recipe does is not here, but in train.py, evaluate.py ...
"""
