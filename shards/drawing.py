"""Drawn images: each class a motif, each image of it another place, size, contrast and noise before a 1/f texture."""

import numpy as np


def _background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [h, w, 3] of 1/f noise with unit spread."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width)), axes=(1, 2)) / frequency
    field = np.fft.irfft2(spectrum, s=(height, width), axes=(1, 2)).transpose(1, 2, 0)
    return ((field - field.mean()) / (field.std() + 1e-9)).astype(np.float32)


def draw(label: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [h, w, 3]: one image of class `label`. The class fixes the motif, `rng` everything else."""
    motif = np.random.default_rng(label)
    front, back = motif.uniform(0, 1, 3), motif.uniform(0, 1, 3)
    angle, waves, corners = motif.uniform(0, np.pi), motif.uniform(3, 14), int(motif.integers(3, 8))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    centre_y, centre_x = rng.uniform(0.35, 0.65) * height, rng.uniform(0.35, 0.65) * width
    radius = rng.uniform(0.25, 0.42) * min(height, width)
    dy, dx = (y - centre_y) / radius, (x - centre_x) / radius
    turn = rng.uniform(-0.2, 0.2)
    outline = 0.75 + 0.25 * np.cos(corners * (np.arctan2(dy, dx) + turn))
    inside = (np.hypot(dy, dx) < outline)[..., None]
    stripes = np.sin(waves * (dx * np.cos(angle + turn) + dy * np.sin(angle + turn)) + rng.uniform(0, 6.3))[..., None]
    shape = np.where(stripes > 0, front, back)
    scene = 0.5 + 0.18 * _background(height, width, rng)
    image = np.where(inside, rng.uniform(0.7, 1.0) * shape, scene) + 0.03 * rng.standard_normal((height, width, 1))
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)
