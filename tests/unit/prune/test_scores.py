import pytest
import torch

from toolkit.prune.scores import HOOK_SCORES, STATE_SCORES, check_score, movement_increment

FORMULAS = {
    "magnitude": lambda w, m, v: w.abs(),
    "variance": lambda w, m, v: w.abs() * v**0.25,
    "obd": lambda w, m, v: w.abs() * v.sqrt(),
    "saliency": lambda w, m, v: w.abs() * m.abs().sqrt(),
    "snr": lambda w, m, v: w**2 * m.abs() / v.sqrt(),
}


@pytest.mark.parametrize("name", list(STATE_SCORES))
def test_equals_the_formula_in_float64(name):
    weight, second = torch.randn(1000), torch.rand(1000) * 10.0 ** torch.randint(-14, 1, (1000,))
    first = torch.randn(1000) * second.sqrt()
    got = STATE_SCORES[name](weight, {"exp_avg": first, "exp_avg_sq": second})
    assert got.dtype == torch.float32
    wanted = FORMULAS[name](weight.double(), first.double(), second.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)


def test_momentum_stands_in_for_adams_first_moment():
    weight, buffer = torch.randn(9), torch.randn(9)
    got = STATE_SCORES["saliency"](weight, {"momentum_buffer": buffer})
    assert torch.equal(got, STATE_SCORES["saliency"](weight, {"exp_avg": buffer}))


@pytest.mark.parametrize("name", ["variance", "obd"])
def test_small_moments_still_rank(name):
    # The predecessor's floors made this magnitude ranking: equal weights, second moments below its epsilon.
    second = torch.tensor([1e-12, 1e-16, 1e-20, 1e-30])
    scores = STATE_SCORES[name](torch.ones(4), {"exp_avg_sq": second})
    assert (scores.diff() < 0).all()


@pytest.mark.parametrize("name", ["variance", "obd", "saliency", "snr"])
def test_is_zero_where_nothing_was_learned(name):
    nothing = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    assert STATE_SCORES[name](torch.ones(3), nothing).eq(0).all()


def test_movement_and_displacement():
    weight, grad, initial = torch.tensor([2.0, -2.0]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, -3.0])
    assert movement_increment(weight, grad, 0.1).tolist() == pytest.approx([-0.1, 0.1])
    assert HOOK_SCORES["displacement"](weight, {"initial_weights": initial}).tolist() == [2.0, -2.0]


def test_unknown_score_lists_the_known():
    with pytest.raises(ValueError, match="magnitude, variance, obd"):
        check_score("fisher", tuple(STATE_SCORES))
