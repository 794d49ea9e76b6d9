"""Lightning callbacks that run during training, besides the task: each does one thing.

`watch.py` makes them, in the order in which they are called.
"""
