"""Builders of WebDataset shards: one file per source of images, all writing through `writer`."""
