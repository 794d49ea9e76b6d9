"""NFNets: the networks, their names, their weights. Needs nothing of the trainer; the table of
variants, which is what accounts and plans need, loads no torch either."""
