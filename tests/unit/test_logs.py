"""What functions print: lines, rotation, followers, full disks."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from woodfrog.daemon import logs as module
from woodfrog.daemon.logs import LogBook, rotate_own


def parse(data: bytes) -> list[dict[str, Any]]:
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


async def lines(book: LogBook, app: str = "demo", since: float = 0.0) -> list[str]:
    data = b"".join([chunk async for chunk in book.app(app).read(since=since, follow=False)])
    return [record["line"] for record in parse(data)]


def feeder(book: LogBook) -> Callable[..., None]:
    def feed(data: bytes, stream: str = "stdout", instance: str = "i-1") -> None:
        book.feed("demo", instance=instance, function="f", stream=stream, call="c1", data=data)

    return feed


async def test_output_is_cut_into_lines(tmp_path: Path) -> None:
    book = LogBook(tmp_path, 1 << 20)
    feed = feeder(book)
    feed(b"one\ntwo\nth")
    feed(b"error", stream="stderr")
    feed(b"other", instance="i-2")
    feed(b"ree\n\n")
    feed("é".encode()[:1])
    feed("é".encode()[1:] + b"\n\xff\xfe\x00\n")
    book.note("demo", "note \ud800 \x1b[31m")
    assert await lines(book) == ["one", "two", "three", "", "é", "\ufffd\ufffd\0", "note ? \x1b[31m"]
    book.end("demo", "i-1", "f")
    book.end("demo", "i-1", "f")
    assert (await lines(book))[-1] == "error" and "other" not in await lines(book)
    records = parse((tmp_path / "demo.ndjson").read_bytes())
    assert records[0] == {**records[0], "instance": "i-1", "function": "f", "stream": "stdout", "call": "c1"}
    assert records[-1]["stream"] == "stderr"


async def test_endless_line_is_cut_and_kept_whole(tmp_path: Path) -> None:
    book = LogBook(tmp_path, 8 << 20)
    feed = feeder(book)
    for _ in range(40):
        feed(b"x" * 10_000)
    feed(b"\nnext\n" + b"y" * 300_000)
    book.end("demo", "i-1", "f")
    found = await lines(book)
    assert "".join(found) == "x" * 400_000 + "next" + "y" * 300_000
    assert max(map(len, found)) <= 2 * (64 << 10) and len(book._partial) == 0


async def test_rotation_keeps_to_the_budget(tmp_path: Path) -> None:
    book = LogBook(tmp_path, 1 << 18)
    feed = feeder(book)
    for number in range(5000):
        feed(b"%06d %s\n" % (number, b"x" * 100))
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert (1 << 17) < size < (1 << 18) + 1000
    found = [int(line.split()[0]) for line in await lines(book)]
    assert found == list(range(found[0], 5000)) and found[0] > 0
    again = LogBook(tmp_path, 1 << 18)
    assert await lines(again) == await lines(book)


async def test_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    book = LogBook(tmp_path, 1 << 20)
    for clock[0] in (100.0, 200.5, 300.0):
        book.note("demo", str(clock[0]))
    assert await lines(book, since=200.5) == ["200.5", "300.0"]
    assert await lines(book, since=301) == []


async def test_the_last_lines_and_those_of_one_container_or_call(tmp_path: Path) -> None:
    book = LogBook(tmp_path, 1 << 18)
    for n in range(4000):  # they fill more than one file
        book.lines("demo", f"{n}", instance=f"i-{n % 3}-1", function=f"f{n % 2}", stream="stdout", call=f"c{n % 5}x")
    log = book.app("demo")

    async def shown(which: dict[str, str] | None = None, **more: Any) -> list[str]:
        chunks = [chunk async for chunk in log.show(which or {}, follow=False, **more)]
        return [r["line"] for r in parse(b"".join(chunks))]

    every = await shown()
    assert every[-1] == "3999" and len(every) > 1000
    assert await shown(last=2) == ["3998", "3999"] and await shown(last=0) == []
    assert await shown(last=1_000_000) == every
    assert await shown({"instance": "i-1"}) == [n for n in every if int(n) % 3 == 1]
    assert await shown({"call": "c2", "function": "f1"}, last=2) == ["3987", "3997"]
    book.note("demo", "of another", instance="i-0a-12")
    assert await shown({"instance": "i-0a-1"}) == [] and await shown({"instance": "i-0a"}) == ["of another"]
    assert await shown({"function": "f"}) == [], "names are whole, ids are not"
    assert await shown({"instance": "i-1"}, last=3, since=1e11) == []
    stream = log.show({"instance": "i-1"}, last=1, follow=True)
    assert await take(stream, 1) == ["3997"]
    for instance in ("i-2", "i-1"):
        book.note("demo", f"of {instance}", instance=f"{instance}-1")
    assert await take(stream, 1) == ["of i-1"]
    await stream.aclose()  # type: ignore[attr-defined]


async def take(stream: AsyncIterator[bytes], count: int) -> list[str]:
    out: list[str] = []
    while len(out) < count:
        out += [r["line"] for r in parse(await asyncio.wait_for(anext(stream), 10))]
    return out


async def test_follower_misses_nothing_and_sees_nothing_twice(tmp_path: Path) -> None:
    """Lines come, and the file rotates, while the follower still reads what was there before."""
    book = LogBook(tmp_path, 1 << 18)
    feed = feeder(book)
    for number in range(1500):
        feed(b"%06d %s\n" % (number, b"x" * 50))
    before = await lines(book)
    stream = book.app("demo").read(follow=True)
    got = await take(stream, 1)
    for number in range(1500, 2250):
        feed(b"%06d %s\n" % (number, b"x" * 50))
    got += await take(stream, len(before) + 750 - len(got))
    expected = range(int(before[0].split()[0]), 2250)
    assert [int(line.split()[0]) for line in got] == list(expected)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    feed(b"live\n")
    assert parse(await asyncio.wait_for(waiting, 5))[0]["line"] == "live"
    await stream.aclose()  # type: ignore[attr-defined]
    assert not book.app("demo").followed


async def test_several_followers(tmp_path: Path) -> None:
    book = LogBook(tmp_path, 1 << 20)
    streams = [book.app("demo").read(follow=True) for _ in range(3)]
    tasks = [asyncio.ensure_future(take(stream, 100)) for stream in streams]
    for number in range(100):
        book.note("demo", str(number))
        if number % 10 == 0:
            await asyncio.sleep(0)
    for got in await asyncio.gather(*tasks):
        assert got == [str(n) for n in range(100)]


async def test_a_follower_that_falls_behind_reads_on_in_the_files(tmp_path: Path) -> None:
    """Whatever was written meanwhile; only what the log itself has dropped is missing, and told."""
    book = LogBook(tmp_path, 16 << 20)
    feed = feeder(book)
    stream = book.app("demo").read(after=0, follow=True)
    feed(b"first\n")
    assert await take(stream, 1) == ["first"]
    for number in range(1000):  # one rotation
        feed(b"%06d %s\n" % (number, b"x" * 10_000))
    assert (tmp_path / "demo.old").exists()
    assert [int(line.split()[0]) for line in await take(stream, 1000)] == list(range(1000))
    for number in range(3000):  # three
        feed(b"%06d %s\n" % (number, b"x" * 10_000))
    feed(b"end\n")
    got: list[dict[str, Any]] = []
    while not got or got[-1]["line"] != "end":
        got += parse(await asyncio.wait_for(anext(stream), 10))
    *before, gap, first = [r for r in got if r["n"] <= next(r["n"] for r in got if r["stream"] == "system") + 1]
    assert gap["line"].endswith("lines left out: the log was over its bound before they were read (WOODFROG_LOG_MIB)")
    assert (gap["stream"], gap["instance"], gap["function"]) == ("system", "i-1", "f")
    assert int(gap["line"].split()[0]) == first["n"] - (before[-1]["n"] if before else 1001) - 1
    assert [r["n"] for r in got[len(before) + 1 :]] == list(range(first["n"], 4003))
    feed(b"on\n")
    assert await take(stream, 1) == ["on"]
    await stream.aclose()  # type: ignore[attr-defined]


async def test_numbers_go_on_over_rotations_and_daemons(tmp_path: Path) -> None:
    async def numbers(book: LogBook, after: int | None) -> list[int]:
        data = b"".join([chunk async for chunk in book.app("demo").read(after=after, follow=False)])
        return [r["n"] for r in parse(data)]

    def write(book: LogBook, count: int) -> None:
        for _ in range(count):
            feeder(book)(b"x" * 1000 + b"\n")

    book = LogBook(tmp_path, 1 << 18)
    write(book, 100)
    for first in (101, 201, 301):  # the last of them finds an empty file, and the rest in the old one
        book.close()
        if first == 301:
            os.replace(tmp_path / "demo.ndjson", tmp_path / "demo.old")
        book = LogBook(tmp_path, 1 << 18)
        write(book, 100)
        assert await numbers(book, first - 2) == list(range(first - 1, first + 100))
    assert await numbers(book, 399) == [400] and await numbers(book, 400) == []
    book.remove("demo")
    write(book, 2)
    assert await numbers(book, 400) == [1, 2], "another log: its reader begins anew"


async def test_logs_of_versions_without_numbers(tmp_path: Path) -> None:
    (tmp_path / "demo.ndjson").write_text(
        json.dumps({"t": 1.0, "instance": "", "line": "old"}, separators=(",", ":")) + "\n"
    )
    book = LogBook(tmp_path, 1 << 18)
    book.note("demo", "new")
    assert await lines(book) == ["old", "new"]
    stream = book.app("demo").read(after=0, follow=True)
    assert parse(await anext(stream))[0]["n"] == 1
    await stream.aclose()  # type: ignore[attr-defined]


async def test_failing_disk_never_reaches_the_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = LogBook(tmp_path, 1 << 17)
    feed = feeder(book)
    feed(b"before\n")

    def refuse(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", refuse)
        for _ in range(100):
            feed(b"lost\n")
        assert book.app("demo").dropped == 100
    feed(b"after\n")
    assert await lines(book) == ["before", "100 lines lost: no room for them", "after"]
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", refuse)
        for _ in range(100):
            feed(b"x" * 2000 + b"\n")
    assert len(await lines(book)) == 103  # over its budget rather than lost
    feed(b"rotated\n")
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "open", refuse)
        for _ in range(100):
            feed(b"y" * 2000 + b"\n")
    feed(b"open again\n")
    assert (await lines(book))[-1] == "open again"


@pytest.mark.root
async def test_really_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "woodfrog-test", str(disk)], check=True)
    try:
        book = LogBook(disk, 1 << 20)
        feed = feeder(book)
        (disk / "filler").write_bytes(bytes(30_000))
        for number in range(1000):
            feed(b"%d %s\n" % (number, b"x" * 700))
        kept = await lines(book)  # every line parses
        assert 0 < len(kept) < 100
        (disk / "filler").unlink()
        feed(b"after\n")
        found = await lines(book)
        assert found[-2:] == [f"{1000 - len(kept)} lines lost: no room for them", "after"]
        book.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


async def test_half_a_line_left_by_a_killed_daemon(tmp_path: Path) -> None:
    book = LogBook(tmp_path, 1 << 20)
    book.note("demo", "whole")
    with open(tmp_path / "demo.ndjson", "ab") as f:
        f.write(b'{"t":1.0,"li')
    again = LogBook(tmp_path, 1 << 20)
    again.note("demo", "next")
    text = (tmp_path / "demo.ndjson").read_bytes().splitlines()
    assert [json.loads(text[0])["line"], json.loads(text[-1])["line"]] == ["whole", "next"] and len(text) == 3
    again.close()
    again.close()
    assert os.stat(tmp_path / "demo.ndjson").st_mode & 0o777 == 0o600


async def test_no_descriptor_left_for_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes a line is not to fail of it, and the line is missed in the log."""
    book = LogBook(tmp_path, 1 << 20)

    def full(*arguments: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "open", full)
        book.note("demo", "one")
        book.note("demo", "two")
    book.note("demo", "three")
    assert await lines(book) == ["2 lines lost: no room for them", "three"]


async def test_what_nobody_writes_to_has_no_descriptor(tmp_path: Path) -> None:
    book = LogBook(tmp_path, 1 << 20)

    def open_logs() -> set[str]:
        paths = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        names = {os.readlink(p) for p in paths if os.path.islink(p)}
        return {Path(n).stem for n in names if n.startswith(str(tmp_path))}

    for app in ("deployed", "stopped", "run", "quiet"):
        book.note(app, "first")
    streams = [book.app(app).read(follow=True) for app in ("stopped", "run")]
    for stream in streams:
        assert await take(stream, 1) == ["first"]
    book.note("run", "last")
    book.settle({"deployed"}, {"run", "quiet"})
    assert open_logs() == {"deployed", "stopped", "run"}, "two are open to their readers"
    assert await take(streams[1], 1) == ["last"]
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(streams[1]), 5)
    book.settle({"deployed"}, set())
    assert set(book._apps) == {"deployed", "stopped"}
    book.note("stopped", "again")  # it may be deployed anew
    assert await take(streams[0], 1) == ["again"]
    await streams[0].aclose()  # type: ignore[attr-defined]
    book.settle({"deployed"}, set())
    assert open_logs() == {"deployed"} and await lines(book, "stopped") == ["first", "again"]
    book.close()


ROTATE = """
import sys
from pathlib import Path
from woodfrog.daemon.logs import rotate_own
log = Path(sys.argv[1])
for number in range(100):
    print(f"{number:09}", flush=True)
    rotate_own(log, 95)
"""


def test_the_daemon_s_own_log_is_bounded(tmp_path: Path) -> None:
    log = tmp_path / "daemon.log"
    with open(log, "ab") as out:
        subprocess.run([sys.executable, "-c", ROTATE, str(log)], stdout=out, stderr=out, check=True)
    assert {p.name for p in tmp_path.iterdir()} == {"daemon.log", "daemon.log.old"}
    assert log.read_text() == ""
    assert (tmp_path / "daemon.log.old").read_text().split() == [f"{n:09}" for n in range(90, 100)]
    log.write_bytes(b"x" * 200)
    rotate_own(log, 95)  # it is not where this process writes
    assert log.stat().st_size == 200
    rotate_own(tmp_path / "none", 95)


async def test_many_lines_at_once_are_as_one_by_one(tmp_path: Path) -> None:
    texts = ["", 'a "quoted" \\ line', "é \x1b[31m", '"n":0', "\udcff".encode(errors="replace").decode()] * 3
    for name, size in (("many", len(texts)), ("single", 1)):
        book = LogBook(tmp_path / name, 1 << 20)
        for i in range(0, len(texts), size):
            data = "".join(f"{text}\n" for text in texts[i : i + size]).encode()
            book.feed("demo", instance='i"n":0', function="f", stream="stdout", call=None, data=data)
    many, single = (parse((tmp_path / name / "demo.ndjson").read_bytes()) for name in ("many", "single"))
    assert [r["line"] for r in many] == texts and [r["n"] for r in many] == list(range(1, len(texts) + 1))
    assert [{**r, "t": 0} for r in many] == [{**r, "t": 0} for r in single]
    assert all(list(a) == list(b) for a, b in zip(many, single, strict=True))
