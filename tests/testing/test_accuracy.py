"""The judge of accuracy itself: it lets rounding pass, and nothing else."""

import pytest
import torch

from ldmkit.testing.accuracy import assert_as_accurate

EXACT = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def _off_by(error: float) -> torch.Tensor:
    return (EXACT + torch.tensor([0.0, error, 0.0], dtype=torch.float64)).float()


def test_within_twice_the_peers_error() -> None:
    assert_as_accurate(_off_by(2e-3), _off_by(1e-3), EXACT)


def test_rounding_passes_beside_a_perfect_peer() -> None:
    assert_as_accurate(_off_by(8 * EPS), EXACT.float(), EXACT)


@pytest.mark.parametrize(("error", "peer"), [(2.1e-3, 1e-3), (12 * EPS, 0.0)])
def test_beyond_fails_with_both_errors_and_the_place(error: float, peer: float) -> None:
    with pytest.raises(AssertionError, match=r"latents: our error .* exceeds .* the peer's .* index 1"):
        assert_as_accurate(_off_by(error), _off_by(peer), EXACT, what="latents")


@pytest.mark.parametrize("position", [0, 1])
def test_nan_fails_on_either_side(position: int) -> None:
    pair = [EXACT.float(), EXACT.float()]
    pair[position] = pair[position].clone().fill_(float("nan"))
    with pytest.raises(AssertionError, match="NaN"):
        assert_as_accurate(*pair, EXACT)


def test_unlike_things_are_not_compared() -> None:
    with pytest.raises(AssertionError, match="shapes"):
        assert_as_accurate(EXACT.float()[:2], EXACT.float(), EXACT)
    with pytest.raises(AssertionError, match="judged"):
        assert_as_accurate(EXACT.float(), EXACT.half(), EXACT)
    with pytest.raises(AssertionError, match="float64"):
        assert_as_accurate(EXACT.float(), EXACT.float(), EXACT.float())
