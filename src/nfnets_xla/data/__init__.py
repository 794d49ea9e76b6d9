"""From shards to batches: the index, the order, decoding, augmentation, the loader."""
