"""What a real GPU's libraries keep beside tensors."""

import pytest
import torch

from toolkit.memory.allocator import release_blas_workspaces

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def test_a_product_leaves_a_workspace_for_each_thread_that_made_one():
    place = torch.device("cuda")
    weight = torch.randn(512, 512, device=place, requires_grad=True)
    release_blas_workspaces(place)
    (torch.randn(512, 512, device=place) @ weight).sum().backward()  # backward is another thread's
    weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(place)
    found = release_blas_workspaces(place)
    assert found > 0
    assert before - found == torch.cuda.memory_allocated(place)
    assert release_blas_workspaces(place) == 0
