"""NFNets: the networks, their names, their weights. Imports nothing from the trainer. The table of
variants (variants.py), which scaling/ needs, does not load torch either."""
