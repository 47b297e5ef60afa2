from __future__ import annotations

from pipeline.generate.schedule import Plateau


def test_the_rate_is_halved_after_patience_and_the_best_is_forgotten() -> None:
    plateau = Plateau(16.0, 2)
    rates = []
    for loss in (5.0, 4.0, 4.0, 4.0, 4.0, 9.0, 9.0, 9.0, 9.0, 8.0):
        plateau.step(loss)
        rates.append(plateau.rate)
    # 4.0 three times more than once: halved; then 9.0 is the best, although 4.0 was seen.
    assert rates == [16, 16, 16, 16, 8, 8, 8, 8, 4, 4]


def test_progress_of_less_than_a_ten_thousandth_does_not_count() -> None:
    plateau = Plateau(1.0, 0)
    plateau.step(1.0)
    plateau.step(1.0 - 5e-5)
    assert plateau.rate == 0.5


def test_the_rate_has_a_floor() -> None:
    plateau = Plateau(1.0, 0)
    for _ in range(100):
        plateau.step(1.0)
    assert plateau.rate == 1e-4
