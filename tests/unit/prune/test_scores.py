import pytest
import torch

from toolkit.prune.scores import STATE_SCORES, check_score, displacement, movement_increment

FORMULAS = {
    "magnitude": lambda w, v: w.abs(),
    "variance": lambda w, v: w.abs() * v**0.25,
    "obd": lambda w, v: w.abs() * v.sqrt(),
}


@pytest.mark.parametrize("name", list(STATE_SCORES))
def test_equals_the_formula_in_float64(name):
    weight, second = torch.randn(1000), torch.rand(1000) * 10.0 ** torch.randint(-14, 1, (1000,))
    got = STATE_SCORES[name](weight, {"exp_avg_sq": second})
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), FORMULAS[name](weight.double(), second.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["variance", "obd"])
def test_small_moments_still_rank(name):
    # The predecessor's floors made this magnitude ranking: equal weights, second moments below its epsilon.
    second = torch.tensor([1e-12, 1e-16, 1e-20, 1e-30])
    scores = STATE_SCORES[name](torch.ones(4), {"exp_avg_sq": second})
    assert (scores.diff() < 0).all()


@pytest.mark.parametrize("name", ["variance", "obd"])
def test_is_zero_where_nothing_was_learned(name):
    assert STATE_SCORES[name](torch.ones(3), {"exp_avg_sq": torch.zeros(3)}).eq(0).all()


def test_movement_and_displacement():
    weight, grad, initial = torch.tensor([2.0, -2.0]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, -3.0])
    assert movement_increment(weight, grad, 0.1).tolist() == pytest.approx([-0.1, 0.1])
    assert displacement(weight, initial).tolist() == [2.0, -2.0]


def test_unknown_score_lists_the_known():
    with pytest.raises(ValueError, match="magnitude, variance, obd"):
        check_score("fisher", tuple(STATE_SCORES))
