"""What Lightning calls during a training beside the task: each says when, and does one thing.

`watch.py` opens them, in the order in which they are told.
"""
