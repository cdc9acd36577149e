"""2:4 weights held semi-structured say what they said dense, and the layers that cannot be held are named."""

import pytest
import torch
from torch import nn

import toolkit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_turned_model_says_the_same(dtype):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128), nn.GELU(), nn.Linear(128, 10))
    for layer in (model[0], model[2]):
        fours = layer.weight.data.view(-1, 4)
        lesser = torch.rand(fours.shape, generator=generator).argsort(1)[:, :2]
        fours.scatter_(1, lesser, 0.0)
    model = model.to("cuda", dtype)
    images = torch.randn(64, 256, generator=generator).to("cuda", dtype)
    with torch.no_grad():
        wanted = model(images)
        turned, left = toolkit.to_semi_structured(model)
        found = model(images)
    assert turned == ["0.weight", "2.weight"]
    assert list(left) == ["4.weight"]
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-2
