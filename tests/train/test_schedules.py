"""Plans over a run, at points worked out by hand."""

from itertools import pairwise

import pytest

from train.schedules import WeightSchedule, cosine_lr


def test_learning_rate_warms_up_and_falls_as_half_a_cosine():
    rate = [cosine_lr(s, steps=110, warmup=10, final=0.1) for s in range(111)]
    assert rate[0] == pytest.approx(0.1) and rate[9] == pytest.approx(1.0) and rate[10] == pytest.approx(1.0)
    assert rate[60] == pytest.approx(0.55) and rate[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rate[10:]))
    assert cosine_lr(0, steps=10, warmup=0, final=0.1) == 1.0


def test_weights_are_linear_between_points_and_stay_outside():
    schedule = WeightSchedule("align=0.1:1,0.5:3,1:0")
    assert schedule.term == "align"
    assert [schedule(s, 100) for s in (0, 10, 30, 50, 75, 100, 130)] == pytest.approx([1, 1, 2, 3, 1.5, 0, 0])
    assert [WeightSchedule("eq=0.5:2")(s, 10) for s in (0, 5, 9)] == [2, 2, 2]


@pytest.mark.parametrize(
    "text", ["align", "align=", "align=1", "align=0:1,0:2", "a=0.5:1,0.1:1", "a=0:x", "a=0:-1", "a=0:1,2:1"]
)
def test_another_text_is_an_error(text):
    with pytest.raises(ValueError, match=r"schedule: expected .*got '" + text):
        WeightSchedule(text)
