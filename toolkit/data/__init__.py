"""Exact streaming of WebDataset shards: index (where), order (when), decode (pixels), loader (batches)."""
