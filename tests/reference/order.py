"""The sample order, dealt card by card into lists: `data.order` must equal it.

Written from that module's docstring; it shares no code with it, and keeps everything in memory.
"""

import numpy as np

Card = tuple[int, int, int]  # shard, row, epoch


def deal(
    counts: list[int], seed: int, streams: int, unique: int, window: int, epochs: float
) -> list[list[tuple[Card, int]]]:
    """Every step's cards with their weights."""
    total = round(epochs * sum(counts))
    num_steps = -(-total // unique)
    hands: list[list[Card]] = [[] for _ in range(streams)]
    whose_turn = 0
    for epoch in range(num_steps * unique // sum(counts) + 2):
        line = [
            (int(shard), row, epoch)
            for shard in shuffled(list(range(len(counts))), 1, seed, epoch)
            for row in range(counts[shard])
        ]
        sizes = [0] * streams
        for _ in line:
            sizes[whose_turn] += 1
            whose_turn = (whose_turn + 1) % streams
        for stream, size in enumerate(sizes):
            hand, line = line[:size], line[size:]
            shards = list(dict.fromkeys(shard for shard, _, _ in hand))  # in order of appearance
            for number, first in enumerate(range(0, len(shards), window)):
                mixed = [card for card in hand if card[0] in shards[first : first + window]]
                hands[stream] += shuffled(mixed, 2, seed, epoch, stream, number)

    quotas = [0] * streams
    for draw in range(total):
        quotas[draw % streams] += 1
    each = unique // streams
    return [
        [
            (hands[stream][place], int(place < quotas[stream]))
            for stream in range(streams)
            for place in range(step * each, (step + 1) * each)
        ]
        for step in range(num_steps)
    ]


def shuffled(items: list, *key: int) -> list:
    """Sorted by one random word per item, without as many low bits as the number of items has."""
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(len(items)).tolist()
    low_bits = len(items).bit_length()
    return [items[i] for i in sorted(range(len(items)), key=lambda i: (words[i] >> low_bits, i))]
