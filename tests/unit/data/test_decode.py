import contextlib
import io
import math
import random
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from toolkit.data import decode
from toolkit.data.decode import (
    BadImageError,
    EvalTransform,
    TrainTransform,
    decode_rgb,
    sample_generator,
    timm_transform,
)


def picture(height=90, width=120, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def psnr(a, b):
    return 10 * math.log10(255**2 / max(1e-12, float(((a.double() - b.double()) ** 2).mean())))


def test_decodes_as_pil_does(monkeypatch):
    data = encoded(picture(), quality=95)
    fast = decode_rgb(data)
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert np.array_equal(fast, decode_rgb(data))


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(), "PNG"),
        encoded(Image.fromarray(picture()).convert("CMYK")),
        encoded(Image.fromarray(picture()).convert("L")),
        encoded(picture()) + b"trailing bytes",
    ],
)
def test_odd_but_whole_images_are_read(data):
    assert decode_rgb(data).shape == (90, 120, 3)


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(picture())[:1500]])
def test_broken_images_are_refused(data):
    with pytest.raises(BadImageError):
        decode_rgb(data)


def test_what_is_said_of_no_image_has_no_address_of_memory():
    with pytest.raises(BadImageError, match=r"^cannot identify image file$"):
        decode_rgb(b"no image")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(kind, monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(picture(30, 40)).save(buffer, kind)
    monkeypatch.setattr(decode, "MAX_PIXELS", 1200)
    assert decode_rgb(buffer.getvalue()).shape == (30, 40, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 1199)
    with pytest.raises(BadImageError, match="40 × 30 pixels are more than 1,199"):
        decode_rgb(buffer.getvalue())


def test_a_decompression_bomb_is_refused():
    """A PNG header that claims 100,000 × 100,000 pixels."""
    chunk = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    with pytest.raises(BadImageError):
        decode_rgb(png)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("shape", [(90, 120), (131, 77), (64, 64)])
def test_evaluation_equals_timms(interpolation, crop_pct, shape):
    image = picture(*shape)
    mine = EvalTransform((64, 64), crop_pct, interpolation)(image, None)
    theirs = create_transform(
        64, is_training=False, use_prefetcher=True, crop_pct=crop_pct, interpolation=interpolation
    )
    wanted = torch.as_tensor(np.asarray(theirs(Image.fromarray(image))))
    assert mine.shape == wanted.shape
    assert ((mine.int() - wanted.int()).abs() <= 1).double().mean() >= 0.999


def test_training_crop_is_a_resized_box():
    """scale and ratio 1 take the whole image: the same pixels as Pillow's resize."""
    image = picture(80, 80)
    mine = TrainTransform((32, 32), (1.0, 1.0), (1.0, 1.0), 0.0, 0.0, "bilinear")(image, sample_generator(0, 0, 0))
    wanted = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert psnr(mine, torch.from_numpy(wanted.copy())) >= 55


def test_flips():
    image = picture(40, 40)
    plain, both = (
        TrainTransform((40, 40), (1.0, 1.0), (1.0, 1.0), chance, chance, "bilinear")(image, sample_generator(0, 0, 0))
        for chance in (0.0, 1.0)
    )
    assert torch.equal(both, plain.flip(-1, -2))


def test_crops_are_inside_and_of_the_asked_size():
    areas = []
    for sample in range(300):
        box = decode.random_crop_box(
            np.zeros((90, 120, 3)), (0.08, 1.0), (3 / 4, 4 / 3), sample_generator(1, 2, sample)
        )
        top, left, height, width = box
        assert top >= 0
        assert left >= 0
        assert top + height <= 90
        assert left + width <= 120
        areas.append(height * width / (90 * 120))
    assert 0.06 <= min(areas) < 0.15
    assert max(areas) > 0.9


def test_augmentation_depends_on_seed_epoch_and_sample_alone():
    image, transform = picture(), TrainTransform((32, 32))
    first = transform(image, sample_generator(5, 3, 11))
    assert torch.equal(first, transform(image, sample_generator(5, 3, 11)))
    others = [transform(image, sample_generator(*key)) for key in ((6, 3, 11), (5, 4, 11), (5, 3, 12))]
    assert not any(torch.equal(first, other) for other in others)


def test_timms_transforms_are_seeded_by_sample_and_leave_the_generators_alone():
    transform = partial(
        timm_transform,
        create_transform(32, is_training=True, use_prefetcher=True, auto_augment="rand-m9-mstd0.5", color_jitter=0.4),
    )
    image = picture()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    first = transform(image, sample_generator(0, 0, 7))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(first, transform(image, sample_generator(0, 0, 7)))
    assert not torch.equal(first, transform(image, sample_generator(0, 0, 8)))
    assert first.dtype == torch.uint8
    assert first.shape == (3, 32, 32)


def test_damaged_files_are_bad_images_whatever_the_reader_raises(monkeypatch):
    """simplejpeg's header reader has raised KeyError on an unknown colour space, PIL's readers much else."""
    buffer = io.BytesIO()
    Image.fromarray(picture(60, 80)).save(buffer, "JPEG")
    data = buffer.getvalue()
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(data)
        for place in rng.integers(0, 200, 3):
            damaged[place] = int(rng.integers(256))
        with contextlib.suppress(BadImageError):
            decode_rgb(bytes(damaged))


@pytest.mark.parametrize(("kind", "name"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("PPM", "I;16")])
def test_grey_of_16_bits_is_scaled_as_colour_is(kind, name):
    """The upper byte, which PIL takes of 16-bit colour."""
    grey = np.random.default_rng(0).integers(0, 2**16, (6, 5), dtype=np.uint16)
    grey.flat[:4] = 0, 255, 256, 65535
    high_byte_first = grey.astype(">u2").tobytes()
    if kind == "PPM":  # by hand: pillow reads more kinds than its older versions write
        data = b"P5 5 6 65535\n" + high_byte_first
    elif name == "I;16B":
        data = encoded(Image.frombytes(name, (5, 6), high_byte_first), kind)
    else:
        data = encoded(Image.fromarray(grey), kind)
    read = decode_rgb(data)
    assert read.dtype == np.uint8
    assert np.array_equal(read, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_no_known_scale_are_refused_and_not_cut_off(dtype):
    with pytest.raises(BadImageError, match="no known white"):
        decode_rgb(encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_format_is_read_as_pil_reads_it(kind):
    data = encoded(picture(), kind)
    assert np.array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
