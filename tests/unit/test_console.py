"""What a person, CI and a program see of a run."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import MappingProxyType, SimpleNamespace

import pytest

from ami_builder import console
from ami_builder.console import Mode, Progress
from ami_builder.core.errors import BuildFailed, Inconclusive, Interrupted, UsageError
from ami_builder.core.records import CheckResult, Measurement, Outcome, RunStatus, StepRecord, Verdict

GIB = 1 << 30
FAILURE = BuildFailed(
    "packer build failed (exit status 1)",
    hint="free some disk space, and try again",
    log=Path("/var/lib/some/where/that/is/a/very/long/way/down/20261123-152301-dask-a1b2/packer.log"),
    tail=(
        "==> qemu: [bold]Setting up[/bold]",
        "\x1b[31m    no space left\x1b[0m\x1b]0;title\x07 on device\r",
    ),
)


class Clock:
    """Time that passes when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and tells what a person would read there in the end."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Stdout and stderr on one terminal."""
    both = Terminal()
    monkeypatch.setattr("ami_builder.console.results.sys", SimpleNamespace(stdout=both, stderr=both))
    return both


@pytest.mark.parametrize(
    ("quiet", "environ", "tty", "mode"),
    [
        (False, {"TERM": "xterm"}, True, Mode.LIVE),
        (False, {"TERM": "xterm"}, False, Mode.PLAIN),
        (False, {"TERM": "dumb"}, True, Mode.PLAIN),
        (False, {}, True, Mode.PLAIN),
        (False, {"TERM": "xterm", "NO_COLOR": "1"}, True, Mode.LIVE),
        (False, {"TERM": "xterm", "GITHUB_ACTIONS": "true"}, True, Mode.GITHUB),
        (False, {"GITHUB_ACTIONS": "false"}, False, Mode.PLAIN),
        (True, {"TERM": "xterm", "GITHUB_ACTIONS": "true"}, True, Mode.QUIET),
    ],
)
def test_the_way_to_show_progress(quiet: bool, environ: dict[str, str], tty: bool, mode: Mode) -> None:
    stream = Terminal() if tty else io.StringIO()
    assert console.choose_mode(quiet=quiet, environ=environ, stream=stream) is mode


def test_steps_are_recorded_in_the_order_in_which_they_started() -> None:
    clock = Clock()
    with console.open_progress(Mode.QUIET, clock=clock) as progress:
        with progress.step("bake", "with TCG") as step:
            clock.now += 2
            with step.step("boot") as boot:
                boot.update("waiting")
                clock.now += 1.5
                assert progress.steps[1] == record("bake > boot", 1.5, RunStatus.RUNNING, "waiting", began=2)
        with progress.step("verify") as step:
            step.update("a line of a log")
            step.done("23 checks passed")
    assert progress.steps == (
        record("bake", 3.5, RunStatus.PASSED, "with TCG"),
        record("bake > boot", 1.5, RunStatus.PASSED, "", began=2),
        record("verify", 0.0, RunStatus.PASSED, "23 checks passed", began=3.5),
    )


def record(name: str, seconds: float, status: RunStatus, detail: str, *, began: float = 0.0) -> StepRecord:
    return StepRecord(name=name, seconds=seconds, status=status, detail=detail, began=began)


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (UsageError("no"), RunStatus.FAILED),
        (ZeroDivisionError(), RunStatus.FAILED),
        (SystemExit(), RunStatus.FAILED),
        (Inconclusive("too busy"), RunStatus.INCONCLUSIVE),
        (Interrupted("Ctrl-C"), RunStatus.INTERRUPTED),
        (KeyboardInterrupt(), RunStatus.INTERRUPTED),
    ],
)
def test_a_raising_block_ends_its_steps_and_names_the_innermost(
    raised: BaseException, status: RunStatus
) -> None:
    progress = console.open_progress(Mode.QUIET)
    with pytest.raises(type(raised)), progress.step("bake") as step, step.step("boot") as boot:  # noqa: PT012
        boot.done("never comes to this")
        boot.update("the last thing it did")
        raise raised
    assert [s.status for s in progress.steps] == [status, status]
    assert progress.steps[1].detail == "the last thing it did"
    assert raised.__notes__ == ["step: bake > boot"]


@pytest.mark.parametrize("mode", list(Mode))
def test_steps_run_side_by_side_in_threads(mode: Mode) -> None:
    out = Terminal()
    started = threading.Barrier(8)

    def work(progress: Progress, number: int) -> None:
        with progress.step(f"machine {number}") as step:
            started.wait(60)
            for line in range(50):
                step.update(f"line {line}")
            with step.step("reboot"):
                pass

    with console.open_progress(mode, stream=out) as progress:
        threads = [threading.Thread(target=work, args=(progress, n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(progress.steps) == 16
    assert {s.status for s in progress.steps} == {RunStatus.PASSED}
    for number in range(8):
        assert (f"machine {number}" in out.text) == (mode is not Mode.QUIET)


def run_plain(mode: Mode) -> list[str]:
    out, clock = io.StringIO(), Clock()
    with console.open_progress(mode, stream=out, clock=clock, beat_seconds=None) as progress:
        with progress.step("base disk") as step:
            with pytest.raises(UsageError), progress.step("container") as other:  # noqa: PT012
                other.update("too soon to be worth a line")
                clock.now += 31
                other.update("pip\x1b[2J install\n")
                other.update("too soon again")
                raise UsageError("no")
            step.done("cached")
        with progress.step("bake"):
            clock.now += 100
    return lines_of(out)


def lines_of(out: io.StringIO) -> list[str]:
    """Return what was printed without the time of day."""
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in out.getvalue().splitlines()]


def test_plain_progress_has_a_line_for_each_start_and_end() -> None:
    assert run_plain(Mode.PLAIN) == [
        "base disk ...",
        "container ...",
        "container ... 31 s - pip install",
        "container: failed in 31 s - too soon again",
        "base disk: passed in 31 s - cached",
        "bake ...",
        "bake: passed in 1:40 min",
    ]


def test_github_folds_what_runs_together_and_leaves_the_outcome_outside() -> None:
    assert run_plain(Mode.GITHUB) == [
        "::group::base disk",
        "base disk ...",
        "container ...",
        "container ... 31 s - pip install",
        "::endgroup::",
        "container: failed in 31 s - too soon again",
        "base disk: passed in 31 s - cached",
        "::group::bake",
        "bake ...",
        "::endgroup::",
        "bake: passed in 1:40 min",
    ]


def beat(progress: Progress, clock: Clock, seconds: int) -> None:
    """Let time pass as the thread of the progress meets it."""
    for _ in range(seconds):
        clock.now += 1
        progress.beat()


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.GITHUB])
def test_a_silent_step_prints_a_line_after_ten_seconds(mode: Mode) -> None:
    out, clock = io.StringIO(), Clock()
    with (
        console.open_progress(mode, stream=out, clock=clock, beat_seconds=None) as progress,
        progress.step("verify") as step,
        step.step("reboot") as child,
    ):
        child.update("waiting for ssh")
        beat(progress, clock, 120)
    lines = lines_of(out)
    assert [line for line in lines if not line.startswith("::")] == [
        "verify ...",
        "verify > reboot ...",
        "verify > reboot ... 10 s - waiting for ssh",
        # It has no news: from here on less often.
        "verify > reboot ... 20 s - waiting for ssh",
        "verify > reboot ... 40 s - waiting for ssh",
        "verify > reboot ... 1:10 min - waiting for ssh",
        "verify > reboot ... 1:40 min - waiting for ssh",
        "verify > reboot: passed in 2:00 min",
        "verify: passed in 2:00 min",
    ]
    if mode is Mode.GITHUB:
        assert (lines[0], lines[-2]) == ("::group::verify", "::endgroup::")


def test_news_is_printed_at_once_but_not_all_the_time() -> None:
    out, clock = io.StringIO(), Clock()
    with (
        console.open_progress(Mode.PLAIN, stream=out, clock=clock, beat_seconds=None) as progress,
        progress.step("bake") as step,
    ):
        for second in range(25):
            clock.now += 1
            step.update(f"line {second + 1}")
        # Too soon for a line of its own, it comes with the next beat.
        beat(progress, clock, 15)
        clock.now += 14
        step.update("after a silence")
        beat(progress, clock, 10)
    assert lines_of(out)[1:-1] == [
        "bake ... 10 s - line 10",
        "bake ... 20 s - line 20",
        "bake ... 30 s - line 25",
        "bake ... 40 s - line 25",
        "bake ... 54 s - after a silence",
        "bake ... 1:04 min - after a silence",
    ]


def test_only_the_innermost_steps_beat() -> None:
    out, clock = io.StringIO(), Clock()
    with (
        console.open_progress(Mode.PLAIN, stream=out, clock=clock, beat_seconds=None) as progress,
        progress.step("verify") as step,
    ):
        with step.step("boot"):
            beat(progress, clock, 9)
            step.update("a parent has no beat of its own")
            beat(progress, clock, 6)
        beat(progress, clock, 9)
        assert len(lines_of(out)) == 4
        beat(progress, clock, 1)
    assert lines_of(out)[2:-1] == [
        "verify > boot ... 10 s",
        "verify > boot: passed in 15 s",
        "verify ... 25 s - a parent has no beat of its own",
    ]


def test_what_a_step_says_is_a_line_of_its_own_at_once() -> None:
    out, clock = io.StringIO(), Clock()
    with (
        console.open_progress(Mode.PLAIN, stream=out, clock=clock, beat_seconds=None) as progress,
        progress.step("build") as step,
    ):
        step.announce("about 4 min\non this host")
        with pytest.raises(UsageError), step.step("bake"):
            raise UsageError("no")
        assert step.detail == "", "a failure must not have it for a detail"
    assert lines_of(out)[:2] == ["build ...", "build: about 4 min on this host"]
    assert progress.steps[0].detail == ""


class Watched(io.StringIO):
    """A stream that sets `seen` when the thread writes a line, which it may refuse."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.seen = threading.Event()
        self.fails = fails

    def write(self, text: str) -> int:
        if threading.current_thread() is not threading.main_thread():
            self.seen.set()
            if self.fails:
                raise BrokenPipeError
        return super().write(text)


def beating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


@pytest.mark.parametrize("raised", [None, Interrupted("Ctrl-C")])
def test_a_thread_beats_until_the_context_ends(raised: Interrupted | None) -> None:
    out, clock = Watched(), Clock()
    with (
        pytest.raises(Interrupted) if raised else nullcontext(),
        console.open_progress(Mode.PLAIN, stream=out, clock=clock, beat_seconds=0.001) as progress,
        progress.step("bake"),
    ):
        clock.now += 10
        assert out.seen.wait(10)
        if raised:
            raise raised
    assert "bake ... 10 s" in lines_of(out)
    assert not beating()


def test_nothing_is_printed_after_the_end() -> None:
    out, clock = io.StringIO(), Clock()
    progress = console.open_progress(Mode.PLAIN, stream=out, clock=clock, beat_seconds=None)
    with progress.step("bake"):
        progress.close()
        clock.now += 10
        before = out.getvalue()
        progress.beat()
        assert out.getvalue() == before


def test_the_thread_ends_when_the_reader_has_left() -> None:
    out, clock = Watched(fails=True), Clock()
    with (
        console.open_progress(Mode.PLAIN, stream=out, clock=clock, beat_seconds=0.001) as progress,
        progress.step("bake"),
    ):
        clock.now += 10
        assert out.seen.wait(10)
        for thread in beating():
            thread.join(10)
        assert not beating()


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.QUIET])
def test_only_plain_progress_has_a_thread(mode: Mode) -> None:
    with console.open_progress(mode, stream=Terminal()):
        assert not beating()


def test_a_terminal_shows_the_seconds_the_latest_detail_and_what_was_said() -> None:
    out, clock = Terminal(), Clock()
    with (
        console.open_progress(Mode.LIVE, stream=out, clock=clock) as progress,
        progress.step("build") as step,
    ):
        step.announce("about 4 min on this host")
        step.update("TCG (slow)")
        with step.step("reboot") as child:
            child.update("waiting for ssh")
            clock.now += 75
            child.update("waiting for Dask")
            clear(out)
            progress.renderer._live.refresh()  # type: ignore[attr-defined]
            rows = [line.rstrip() for line in out.text.splitlines() if line.strip()]
    assert re.search(r"build +about 4 min on this host; TCG \(slow\) +1:15 min$", rows[0])
    assert re.search(r"reboot +waiting for Dask +1:15 min$", rows[1])
    assert "about 4 min" not in out.text[out.text.rindex("✓ build") :]


def clear(out: Terminal) -> None:
    out.seek(0)
    out.truncate()


def run_live(out: Terminal, children: int = 3) -> None:
    with console.open_progress(Mode.LIVE, stream=out) as progress:
        with progress.step("check the tools") as step:
            step.done(
                "a detail that is longer than any terminal is wide, or nearly so, all told, and it goes on"
            )
        with progress.step("bake") as bake:
            for number in range(children):
                with bake.step(f"provisioner {number} [red]"):
                    pass
            out.seek(0)
            out.truncate()
        with pytest.raises(Interrupted), progress.step("verify"):
            raise Interrupted("Ctrl-C")


@pytest.mark.parametrize("columns", [60, 100, 300])
def test_a_terminal_shows_the_whole_tree_in_the_end(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    run_live(out)
    picture = out.text[out.text.rindex("✓ check the tools") :]
    last = [line.rstrip() for line in picture.splitlines() if line.strip()]
    assert [re.sub(r"  .*", "", line.lstrip()) for line in last] == [
        "✓ check the tools",
        "✓ bake",
        "✓ provisioner 0 [red]",
        "✓ provisioner 1 [red]",
        "✓ provisioner 2 [red]",
        "■ verify",
    ]
    assert {len(line) for line in last} == {min(columns, 100)}
    assert all(line.endswith(" s") for line in last)
    assert out.getvalue().endswith("\x1b[?25h"), "the cursor is given back"


def test_a_low_terminal_folds_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "8")
    out = Terminal()
    with console.open_progress(Mode.LIVE, stream=out) as progress:
        with progress.step("bake") as bake:
            for number in range(9):
                with bake.step(f"provisioner {number}"):
                    pass
            out.seek(0)
            out.truncate()
            progress.renderer._live.refresh()  # type: ignore[attr-defined]
            assert "… 5 more" in out.text
            assert "provisioner 3" not in out.text
        out.seek(0)
        out.truncate()
        progress.renderer._live.refresh()  # type: ignore[attr-defined]
        assert "provisioner" not in out.text
    assert "provisioner 3" in out.text, "in the end all are shown"


def test_no_color_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    run_live(out)
    assert not re.search(r"\x1b\[(3\d|9\d|38;[^m]*)m", out.getvalue())


def test_a_terminal_without_unicode_gets_ascii() -> None:
    out = Terminal()
    out.encoding = "ascii"
    run_live(out)
    assert "ok bake" in out.text
    assert out.text.isascii()


def test_results_go_to_stdout_and_nothing_else_does(capsys: pytest.CaptureFixture[str]) -> None:
    console.result("/one/image.qcow2")
    console.result(["a", "b"])
    console.table(("name", "value"), [("x", 1), ("two\twords", None)])
    console.error(FAILURE)
    console.verdict(proof())
    assert capsys.readouterr().out == "/one/image.qcow2\na\nb\nx\t1\ntwo words\tNone\n"


def test_json_is_one_line_with_a_schema_version(capsys: pytest.CaptureFixture[str]) -> None:
    console.result_json(
        {
            "path": PurePosixPath("/a"),
            "when": datetime(2026, 1, 2, tzinfo=UTC),
            "step": record("bäke", 1.0, RunStatus.PASSED, ""),
            "view": MappingProxyType({"b": 1}),
            "set": {"z", "a"},
        }
    )
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "schema_version": 1,
        "path": "/a",
        "when": "2026-01-02T00:00:00+00:00",
        "step": {"name": "bäke", "seconds": 1.0, "status": "passed", "detail": "", "began": 0.0},
        "view": {"b": 1},
        "set": ["a", "z"],
    }


def test_a_table_on_a_terminal_has_a_heading_and_takes_no_markup(terminal: Terminal) -> None:
    console.table(("image", "status"), [("[bold]dask", "verified")])
    assert re.search(r"image +status", terminal.text)
    assert "[bold]dask" in terminal.text


def test_an_error_tells_what_where_and_what_next(capsys: pytest.CaptureFixture[str]) -> None:
    progress = console.open_progress(Mode.QUIET)
    exc = BuildFailed(FAILURE.message, hint=FAILURE.hint, log=FAILURE.log, tail=FAILURE.tail)
    with pytest.raises(BuildFailed), progress.step("bake") as step, step.step("20-container.sh"):
        raise exc
    console.error(exc)
    assert capsys.readouterr().err.splitlines() == [
        "error: packer build failed (exit status 1)",
        "   step bake > 20-container.sh",
        "      | ==> qemu: [bold]Setting up[/bold]",
        "      | no space left on device",
        f"    log {FAILURE.log}",
        "   next free some disk space, and try again",
    ]


def test_an_error_on_a_narrow_terminal_keeps_the_path_whole(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    console.error(FAILURE)
    lines = terminal.text.splitlines()
    assert f"    log {FAILURE.log}" in lines
    assert "      | ==> qemu: [bold]Setting up[/bold]" in [line.rstrip() for line in lines]
    assert "title" not in terminal.text


def test_an_error_is_an_annotation_on_github(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    console.error(UsageError("50 % of\nnothing"))
    assert capsys.readouterr().err.startswith(
        "::error title=ami-builder::50 %25 of nothing\nerror: 50 % of\n"
    )


def test_what_others_wrote_is_no_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    message = "\x1b]0;title\x07::1 is no image\n ::set-output name=a::b"
    console.error(UsageError(message, hint="\x1b[2J::1\n::stop-commands::c"))
    assert capsys.readouterr().err.splitlines() == [
        "::error title=ami-builder::::1 is no image ::set-output name=a::b",
        "error: ::1 is no image",
        " : :set-output name=a::b",
        "   next ::1",
        ": :stop-commands::c",
    ]


@pytest.mark.parametrize("mode", ["plain", "github"])
def test_work_goes_on_though_nobody_reads_its_progress(mode: str) -> None:
    script = f"""
from ami_builder import console
with console.open_progress(console.Mode("{mode}")) as progress, progress.step("bake") as step:
    step.update("half")
    step.announce("news")
console.note("a note")
console.result("done")
"""
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" 2>/dev/full', sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_an_interrupt_is_not_called_an_error_on_a_terminal(terminal: Terminal) -> None:
    console.error(Interrupted("stopped by Ctrl-C"))
    assert terminal.text.strip() == "interrupted: stopped by Ctrl-C"


def test_a_busy_host_is_not_called_an_error(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.error(Inconclusive("too busy"))
    assert terminal.text.strip() == "inconclusive: too busy"
    assert "\x1b[1;31m" not in terminal.getvalue()
    monkeypatch.undo()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    console.error(Inconclusive("too busy"))
    assert capsys.readouterr().err == "::warning title=ami-builder::too busy\ninconclusive: too busy\n"


def proof(*, broken: bool = False, busy: bool = False) -> Verdict:
    results = [
        CheckResult(
            name=name,
            phase=phase,
            machine=machine,
            outcome=Outcome.FAILED
            if broken and (name, phase, machine) == ("test_chain", "reboot", "2 GiB")
            else Outcome.SKIPPED
            if (name, phase) == ("test_fallback", "reboot")
            else Outcome.INCONCLUSIVE
            if busy and (name, phase, machine) == ("test_chain", "boot", "1 GiB")
            else Outcome.PASSED,
            seconds=0.1,
            message="assert 1704780 == 1745694720\n  where 1704780 = ...",
        )
        for machine in ("1 GiB", "2 GiB")
        for phase in ("boot", "reboot")
        for name in ("test_chain", "test_fallback")
    ]
    return Verdict(
        digest="a",
        checks_digest="b",
        results=tuple(results),
        measured=(
            Measurement(machine="1 GiB", phase="boot", total=GIB, available=805306368),
            Measurement(machine="2 GiB", phase="boot", total=2 * GIB, available=1879048192),
        ),
    )


def test_a_verdict_names_the_failed_checks_and_counts_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    console.verdict(proof(broken=True))
    assert capsys.readouterr().err.splitlines() == [
        "FAILED test_chain (2 GiB, reboot): assert 1704780 == 1745694720",
        "checks: 5 passed, 1 failed, 2 skipped (1 GiB, 2 GiB; boot, reboot)",
        "1 GiB boot: AVAILABLE_MEMORY_FOR_DASK=805306368 (75.0% of the machine)",
        "2 GiB boot: AVAILABLE_MEMORY_FOR_DASK=1879048192 (87.5% of the machine)",
    ]


def test_a_verdict_names_what_is_inconclusive(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.verdict(proof(busy=True))
    assert re.search(r"test_chain +[?] ✓ +✓ ✓", terminal.text)
    assert "? test_chain  1 GiB, boot\n  assert 1704780 == 1745694720\n" in terminal.text
    assert "\x1b[1;33mchecks: 5 passed, 1 inconclusive, 2 skipped" in terminal.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*31m", terminal.getvalue()), "nothing is red"
    assert "memory.max" not in terminal.text, "the chain was not proved"
    monkeypatch.undo()
    console.verdict(proof(busy=True))
    assert capsys.readouterr().err.splitlines()[:2] == [
        "inconclusive test_chain (1 GiB, boot): assert 1704780 == 1745694720",
        "checks: 5 passed, 1 inconclusive, 2 skipped (1 GiB, 2 GiB; boot, reboot)",
    ]


def test_a_verdict_on_a_terminal_shows_every_check_on_every_machine(terminal: Terminal) -> None:
    console.verdict(proof(broken=True))
    assert re.search(r"check +1 GiB +2 GiB", terminal.text)
    assert re.search(r"test_chain +✓ ✓ +✓ ✗", terminal.text)
    assert re.search(r"test_fallback +✓ – +✓ –", terminal.text)
    assert "✗ test_chain  2 GiB, reboot\n  assert 1704780 == 1745694720\n" in terminal.text


def test_only_a_verdict_that_passed_claims_the_chain(terminal: Terminal) -> None:
    chain = "AVAILABLE_MEMORY_FOR_DASK = HostConfig.Memory = memory.max = memory_limit"
    console.verdict(proof(broken=True))
    assert chain not in terminal.text
    console.verdict(proof())
    assert chain in terminal.text
    assert re.search(r"2 GiB boot +1,879,048,192 +87.5% of the machine", terminal.text)


def test_a_verdict_without_checks_is_no_success(terminal: Terminal) -> None:
    console.verdict(Verdict(digest="a", checks_digest="b", results=(), measured=()))
    assert "checks: none ran" in terminal.text
    assert "\x1b[1;31mchecks" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (139, "2:19 min"),
        (3599.6, "1:00:00 h"),
        (3723, "1:02:03 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (512 << 20, "512 MiB"), (3 << 29, "1.5 GiB"), (24 << 40, "24 TiB")],
)
def test_sizes(number: int, text: str) -> None:
    assert console.size(number) == text
