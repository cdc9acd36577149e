"""The window in which a GPU is at hand: a plan of parts, each in a process of its own, and what they say."""
