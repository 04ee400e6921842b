import io
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from conftest import ROOT
from tqdm import tqdm

from engine import console
from engine.console import Progress, duration, exit_on_signal, handle_signals, log, print_result, stop_requests
from engine.errors import UserError, exit_on_error
from engine.flags import Parser


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `time.monotonic` says, for a test to set."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    monkeypatch.setattr("tqdm.std.time", lambda: now.seconds)
    return now


# Log lines


def test_a_log_line_goes_to_stderr_without_control_characters(capsys):
    log.info("\x1b[2Jclass 名")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "\\x1b[2Jclass 名\n")


@pytest.mark.parametrize("error", [BrokenPipeError, RuntimeError("reentrant call")])
def test_a_closed_stderr_does_not_end_a_run(monkeypatch, error):
    """The terminal is gone; or a signal arrived while another line was being written."""

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(tqdm, "write", broken)
    log.info("nobody reads this")


def test_only_rank_0_logs(capsys, monkeypatch):
    monkeypatch.setattr(console, "rank", lambda: 1)
    log.info("from rank 1")
    assert capsys.readouterr().err == ""


def test_configuring_twice_does_not_print_twice(capsys):
    console.configure_logging()
    console.configure_logging()
    log.info("once")
    log.debug("never")
    assert capsys.readouterr().err == "once\n"
    assert log is logging.getLogger("distillation")


# Results on stdout


def test_results_are_printed_in_any_encoding(monkeypatch):
    for encoding, expected in (("ascii", rb"class \u540d \xb1"), ("utf-8", "class 名 ±".encode())):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        print_result("class 名 ±")
        assert written.getvalue().strip() == expected


@pytest.mark.chaos
def test_a_closed_pipe_is_not_an_error():
    """As `| true` does; more text than a pipe holds, and once more after the pipe is closed."""
    code = "from engine.console import print_result; print_result('名' * 200_000); print_result('again')"
    reading, writing = os.pipe()
    os.close(reading)
    # Buffered, as by default: what is left in the buffer is written once more as Python exits.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_results_that_cannot_be_printed_are_an_error(monkeypatch):
    for print_it in (lambda: print_result("results"), Parser().print_help):
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            with pytest.raises(UserError, match="No space left on device"):
                print_it()  # and closing it, as Python does at its end, is no second error


def test_with_a_closed_stderr_nothing_is_printed_elsewhere(monkeypatch, capsys):
    """As after `2>&-`, where Python sets it to None: the progress, a log line, and an error."""
    monkeypatch.setattr(sys, "stderr", None)
    with exit_on_error(), Progress("work", 10) as progress:
        progress.update(10)
        log.info("a line")
    with pytest.raises(SystemExit) as exit, exit_on_error():
        raise UserError("a mistake")
    assert exit.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("script", ["custom_resnet.py", "evaluate.py", "teacher_student_model.py"])
def test_ctrl_c_during_the_imports_says_nothing_and_python_minus_p_finds_our_files(tmp_path, script):
    code = (
        "import importlib.util, time; print(importlib.util.find_spec('engine') is not None, flush=True); time.sleep(60)"
    )
    (tmp_path / "torch.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [sys.executable, ROOT / script], cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True
    )
    assert process.stdout.readline() == "True\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGINT


# Durations


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.4, "0 s"), (40, "40 s"), (89.4, "89 s"), (90.5, "2 min"), (12 * 60, "12 min"), (59.4 * 60, "59 min")),
        *((3599, "1 h"), (3600, "1 h"), (3629, "1 h"), (3661, "1 h 1 min"), (2 * 3600 + 5 * 60, "2 h 5 min")),
        *((7199, "2 h"), (7169, "1 h 59 min"), (31.4 * 3600, "31 h 24 min"), (100 * 3600 - 1, "100 h")),
    ],
)
def test_duration_chooses_suitable_units(seconds, text):
    assert duration(seconds) == text


def test_duration_never_shows_60_minutes():
    for seconds in itertools.chain(
        range(20_000), (3600 * hours + rest for hours in (9, 99) for rest in range(-40, 40))
    ):
        found = re.fullmatch(r"(?:(\d+) h)? ?(?:(\d+) min)?|(\d+) s", duration(seconds))
        hours, minutes, rest = (int(part or 0) for part in found.groups())
        assert minutes < 60
        if rest:
            assert rest == seconds <= 90
        else:
            assert abs(3600 * hours + 60 * minutes - seconds) <= 30


# Progress


def test_without_a_terminal_progress_is_one_log_line_per_minute(clock, capsys):
    with Progress("student seed 0 epoch 3/30", total=12_000) as progress:
        for _ in range(75):
            clock.seconds += 8
            if progress.update(160):
                progress.describe("loss 1.2345, 2 h 5 min left")
            else:
                progress.describe("a minute has not passed")
    text = "20.0 images/s  loss 1.2345, 2 h 5 min left"
    shares = [64 * (number + 1) / 600 for number in range(9)]
    expected = [f"student seed 0 epoch 3/30  {share:4.0%}  {text}\n" for share in shares]
    captured = capsys.readouterr()
    assert captured.err == "".join(expected)
    assert captured.out == ""


def test_the_rate_of_a_resumed_epoch_counts_only_new_images(clock, capsys):
    with Progress("resumed", total=1000, done=400) as progress:
        clock.seconds += 100
        assert progress.update(100)
        assert progress.rate == pytest.approx(1.0)
        progress.describe()
    assert capsys.readouterr().err == "resumed   50%  1.0 images/s\n"


def test_on_a_terminal_the_progress_bar_is_erased_at_the_end(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("student epoch 1/5", total=200, done=20) as progress:
        described = []
        for number in range(8):
            clock.seconds += 0.25
            described.append(progress.update(10))
            if described[-1]:
                progress.describe(f"loss {number}")
        log.info("a line above the bar")
    assert all(isinstance(due, bool) for due in described)  # the ranks reduce it as a tensor
    assert described == [False, True] * 4  # twice a second
    shown = terminal.getvalue()
    assert "\rstudent epoch 1/5" in shown
    assert "50%" in shown
    assert "100/200" in shown
    assert "loss 5" in shown
    assert "a line above the bar\n" in shown
    assert shown.count("\n") == 1
    assert shown.endswith("\r")
    assert not shown.split("\r")[-2].strip()


def test_other_ranks_show_no_progress(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console, "rank", lambda: 1)
    with Progress("student", total=100) as progress:
        clock.seconds += 61
        assert progress.update(50)
        progress.describe("loss 1")
    assert terminal.getvalue() == ""


# Signals

SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture
def handlers():
    """The handlers of a script before its training; what was there is restored afterwards."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in SIGNALS[1:]:
        signal.signal(getattr(signal, name), exit_on_signal)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", SIGNALS)
def test_the_first_signal_requests_a_stop_and_the_second_acts_at_once(handlers, capsys, name):
    number = getattr(signal, name)
    with stop_requests() as stop:
        assert stop() == 0
        signal.raise_signal(number)
        assert stop() == number
        assert capsys.readouterr().err.startswith("stopping after this step; a second signal stops at once")
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        else:
            with pytest.raises(SystemExit) as exit:
                signal.raise_signal(number)
            assert exit.value.code == 128 + number
            assert "terminated" in capsys.readouterr().err
        assert stop() == number


def test_a_second_signal_of_another_kind_uses_its_own_handler(handlers):
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit) as exit:
            signal.raise_signal(signal.SIGTERM)
        assert exit.value.code == 143
        assert stop() == signal.SIGINT


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(console, "world_size", 2), (console.multiprocessing, "parent_process", SimpleNamespace(is_alive=lambda: True))],
)
def test_with_several_processes_a_second_signal_is_ignored(handlers, capsys, monkeypatch, module, name, value):
    """torchrun and --jobs pass signals on, so that each process gets Ctrl-C twice."""
    monkeypatch.setattr(module, name, lambda: value)
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop() == signal.SIGINT
    assert capsys.readouterr().err.count("\n") == 1


def test_outside_of_the_main_thread_signals_are_left_alone(handlers):
    """As in a notebook's thread, or in a server's, which call `main`."""
    found = []

    def run() -> None:
        with handle_signals(exit_on_signal, "SIGTERM"), stop_requests() as stop:
            found.append(stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [0]


def test_previous_signal_handlers_are_restored(handlers):
    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    with stop_requests():
        assert all(signal.getsignal(getattr(signal, name)) not in before for name in SIGNALS)
    assert [signal.getsignal(getattr(signal, name)) for name in SIGNALS] == before
    with pytest.raises(SystemExit) as exit:
        signal.raise_signal(signal.SIGTERM)
    assert exit.value.code == 143


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a POSIX signal")
def test_only_an_ignored_sighup_stays_ignored(handlers):
    """nohup ignores SIGHUP; a shell that starts a script in the background makes it ignore SIGINT."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with handle_signals(exit_on_signal, "SIGTERM", "SIGHUP"), stop_requests() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        assert stop() == signal.SIGINT
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_signals_that_the_system_lacks_are_skipped(handlers):
    with handle_signals(exit_on_signal, "SIGTERM", "SIGNOTHING") as before:
        assert list(before) == [signal.SIGTERM]
