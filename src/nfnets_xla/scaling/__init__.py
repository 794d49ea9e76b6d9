"""The cost of training, scaling laws fitted to runs, and plans based on both. Needs no torch."""
