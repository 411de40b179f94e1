"""SIGINT and SIGTERM: recorded while deferred, an exit status otherwise."""

import os
import signal

import pytest

from imgtune_jax.training.stop_signals import StopSignals


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_is_the_exit_status_of_a_shell(signum, status, caplog):
    with pytest.raises(SystemExit) as error, StopSignals():
        send(signum)
    assert error.value.code == status
    assert f"stopped by {signum.name}; the same command resumes" in caplog.text


def test_deferred_signal_is_recorded_until_the_end():
    steps = []
    with pytest.raises(SystemExit, match="143"), StopSignals() as stop, stop.deferred():
        assert stop.received is None
        send(signal.SIGTERM)
        steps.append(stop.received)
        send(signal.SIGTERM)  # a second SIGTERM changes nothing
        steps.append(stop.received)
    assert steps == [signal.SIGTERM, signal.SIGTERM]


def test_signal_in_an_immediate_part_of_a_deferred_one_raises():
    reached = []
    with (
        pytest.raises(SystemExit, match="130"),
        StopSignals() as stop,
        stop.deferred(),
        stop.immediate(),
    ):
        send(signal.SIGINT)
        reached.append("after the signal")
    assert not reached


def test_recorded_signal_raises_at_the_start_of_an_immediate_part():
    reached = []
    with pytest.raises(SystemExit, match="130"), StopSignals() as stop, stop.deferred():
        send(signal.SIGINT)
        with stop.immediate():
            reached.append("evaluation")
    assert not reached


def test_second_sigint_ends_the_process():
    with pytest.raises(SystemExit), StopSignals() as stop, stop.deferred():
        send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_earlier_handlers_are_restored(caplog):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not caplog.text
