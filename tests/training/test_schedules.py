"""Learning-rate schedules equal big_vision's; warm-up and cool-down apply to each of them."""

import numpy as np
import pytest

from imgtune_jax.training import schedules
from tests.training import transcriptions

every_decay = pytest.mark.parametrize("name", schedules.DECAYS)


def rates(name, *, total=100, **changes):
    """Return the rates of all steps."""
    fields = dict(lr=2.0, warmup=0, cooldown=0, timescale=10 if name == "rsqrt" else None)
    schedule = schedules.make_schedule(name, total=total, **{**fields, **changes})
    return np.array([schedule(i) for i in range(total)])


@every_decay
@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (10, 0), (0, 20), (10, 20), (40, 60)])
def test_schedule_equals_that_of_big_vision(name, warmup, cooldown):
    theirs = transcriptions.big_vision_schedule(
        base=2.0, decay_type=name, total_steps=100, warmup_steps=warmup, cooldown_steps=cooldown,
        timescale=10,
    )  # fmt: skip
    ours = rates(name, warmup=warmup, cooldown=cooldown, warmup_from_zero=True)
    # 1 + cos(x) cancels near the end, so the absolute error matters.
    np.testing.assert_allclose(ours, [theirs(i) for i in range(100)], rtol=1e-6, atol=1e-6)


@every_decay
def test_first_update_is_not_zero_unless_warmup_starts_at_zero(name):
    np.testing.assert_allclose(rates(name, warmup=10)[:11], 2 * np.arange(1, 12) / 11, rtol=1e-6)
    from_zero = rates(name, warmup=10, warmup_from_zero=True)
    np.testing.assert_allclose(from_zero[:11], 2 * np.arange(11) / 10, rtol=1e-6)
    np.testing.assert_array_equal(from_zero[10:], rates(name, warmup=10)[10:])
    assert rates(name, warmup_from_zero=True)[0] == 2.0  # without a warm-up


@every_decay
def test_cooldown_multiplies_the_last_steps_by_a_linear_fall(name):
    ratio = rates(name, warmup=10, cooldown=20) / rates(name, warmup=10)
    np.testing.assert_allclose(ratio[:81], 1.0)
    np.testing.assert_allclose(ratio[80:], np.arange(20, 0, -1) / 20, rtol=1e-6)


def test_constant_schedule_without_cooldown_is_constant():
    np.testing.assert_array_equal(rates("constant"), 2.0)


def test_timescale_of_rsqrt_is_the_warmup_by_default():
    ours = rates("rsqrt", warmup=10, timescale=None)
    np.testing.assert_allclose(ours[40], 2 * np.sqrt(10 / 40), rtol=1e-6)
    np.testing.assert_array_equal(ours, rates("rsqrt", warmup=10, timescale=10))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cosin", {}, "expected one of cosine"),
        ("cosine", dict(warmup=80, cooldown=50), "exceed the total of 100"),
        ("cosine", dict(timescale=10), "has no effect with schedule = 'cosine'"),
        ("rsqrt", dict(timescale=None), "set config.optim.timescale to 1 step or more"),
        ("rsqrt", dict(timescale=0, warmup=10), "timescale of 0"),
    ],
)
def test_setting_that_does_not_fit_the_schedule_is_an_error(name, changes, message):
    with pytest.raises(ValueError, match=message):
        rates(name, **changes)
