"""What is in a snapshot, read from images that are made here by hand, and from a process that runs."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from woodfrog.criu.pagemap import PageIndex, PageTask, write_index
from woodfrog.engine.plan import FACTS, Facts, GpuFacts
from woodfrog.snapshot.contents import answer, contents, difference
from woodfrog.snapshot.memory import (
    Area,
    Memory,
    PageReader,
    areas_of_process,
    explain,
    library_of,
    read_areas,
)

PAGE = 4096
MIB = 1 << 20
REGULAR, HEAP, FILE, ANON, ANON_SHARED = 1, 0x20, 0x40, 0x200, 0x100
LAZY, PRESENT = 2, 4


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def image(path: Path, *messages: bytes) -> None:
    path.write_bytes(struct.pack("<II", 0x54564319, 1) + b"".join(struct.pack("<I", len(m)) + m for m in messages))


def vma(begin: int, pages: int, status: int, *, shmid: int = 0, prot: int = 3, flags: int = 0x22) -> bytes:
    return message(
        (1, begin), (2, begin + pages * PAGE), (3, 0), (4, shmid), (5, prot), (6, flags), (7, REGULAR | status), (8, 1)
    )


class Images:
    """A dump: `pages` by pid and address, `vmas` by pid."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        self.files: dict[int, str] = {}
        self._numbers = 0

    def process(self, pid: int, comm: str, vmas: Iterable[bytes], sp: int = 0, threads: tuple[int, ...] = ()) -> None:
        image(self.root / f"mm-{pid}.img", message((1, 0), *((14, v) for v in vmas)))
        core = message((1, 1), (2, message((2, message((20, sp))))), (3, message((6, comm.encode()))))
        image(self.root / f"core-{pid}.img", core)
        self.tree = [*getattr(self, "tree", []), message((1, pid), (2, 0), *((5, t) for t in (pid, *threads)))]
        image(self.root / "pstree.img", *self.tree)

    def thread(self, tid: int, sp: int) -> None:
        image(self.root / f"core-{tid}.img", message((1, 1), (2, message((2, message((20, sp)))))))

    def pages(self, name: int | str, *runs: tuple[int, bytes], flags: int = LAZY | PRESENT) -> None:
        """(address, bytes) each; `name`: a pid or `shmem-<id>`."""
        self._numbers += 1
        entries = [message((1, address), (2, 0), (4, flags), (5, len(data) // PAGE)) for address, data in runs]
        image(self.root / f"pagemap-{name}.img", message((1, self._numbers)), *entries)
        (self.root / f"pages-{self._numbers}.img").write_bytes(b"".join(data for _, data in runs))

    def file(self, number: int, path: str) -> None:
        self.files[number] = path
        regular = [
            message((1, 1), (2, n), (3, message((1, n), (2, 0), (6, p.encode())))) for n, p in self.files.items()
        ]
        image(self.root / "files.img", *regular)


def page(byte: int) -> bytes:
    return bytes([byte]) * PAGE


def pool(size_class: int = 3) -> bytes:
    """A pool of CPython's small objects, 4 pages."""
    head = struct.pack("<QQQQIIII", 5, 0, 0, 0, 0, size_class, 48, 16384 - (size_class + 1) * 16)
    return head.ljust(4 * PAGE, b"\7")


def block(pages: int, shift: int = 0) -> bytes:
    """A block that glibc's malloc mapped on its own; `shift`: where an alignment has put its header."""
    head = bytes(shift) + struct.pack("<QQ", shift, pages * PAGE - shift | 2)
    return head.ljust(pages * PAGE, b"\6")


def chunks(*sizes: tuple[int, bool], pages: int) -> bytes:
    """A heap: (size, used) each, then the top."""
    out, before = b"", True
    for size, used in (*sizes, (pages * PAGE - sum(s for s, _ in sizes), True)):
        out += struct.pack("<QQ", 0, size | before).ljust(size, b"\5")
        before = used
    assert len(out) == pages * PAGE
    return out


def by(rows: list[dict[str, Any]], name: str, field: str = "resident_bytes") -> dict[str, int]:
    return {row[name]: row[field] // PAGE for row in rows}


def look(images: Path, parent: Path | None = None) -> dict[str, Any]:
    return answer({"of": {"images": str(images)}, **({"parent": {"images": str(parent)}} if parent else {})})


LIB, BSS, MAPPED, STACK, HEAP_AT, THREAD = (
    0x7F0000000000,
    0x7F0000002000,
    0x7F1000000000,
    0x7FFF00000000,
    0x5500000000,
    1,
)


@pytest.fixture
def images(tmp_path: Path) -> Images:
    """One process with something of each kind."""
    made = Images(tmp_path / "img")
    made.file(7, "/v/lib/python3.11/site-packages/numpy.libs/libblas-1.so")
    made.file(8, "/data/weights.bin")
    sizes = [(64, True)] * 8 + [(5 * PAGE, False), (20 * PAGE, True), (9 * PAGE - 512, True)]
    heap = chunks(*sizes, pages=60)
    made.process(
        100,
        "python",
        [
            vma(HEAP_AT, 60, ANON | HEAP),
            vma(LIB, 2, FILE, shmid=7, flags=2),
            vma(BSS, 3, ANON),
            vma(MAPPED, 60, ANON),
            vma(MAPPED + 80 * PAGE, 16, ANON),
            vma(MAPPED + 100 * PAGE, 3, FILE, shmid=8, flags=2),
            vma(0x7F2000000000, 8, ANON),
            vma(STACK, 4, ANON, flags=0x122),
        ],
        sp=STACK + PAGE,
        threads=(101,),
    )
    made.thread(101, 0x7F2000000000 + 5 * PAGE + 8)
    made.pages(
        100,
        (HEAP_AT, heap),
        (LIB + PAGE, page(1)),
        (BSS, page(2) + page(0)),
        # 4 pages of a pool, 32 of two blocks, one unexplained, zeroes
        (MAPPED, pool() + block(16) + block(16, shift=48) + page(9) + page(0) * 3),
        (MAPPED + 100 * PAGE, page(4)),
        (0x7F2000000000 + 5 * PAGE, page(3) * 3),
        (STACK + PAGE, page(8)),
    )
    return made


def test_each_kind_is_told_apart(images: Images) -> None:
    found = look(images.root)
    kinds = by(found["kinds"], "kind")
    assert kinds == {
        "heap": 60 - 4 - 19 - 25,
        "free heap": 4 + 25,  # and the top
        "large blocks": 19 + 32,
        "python objects": 4,
        "anonymous": 4,
        "library data": 3,
        "file pages": 1,
        "stacks": 4,
    }
    assert by(found["kinds"], "kind", "zero_bytes") | {} == {
        **dict.fromkeys(kinds, 0),
        "anonymous": 3,
        "library data": 1,
    }
    assert by(found["libraries"], "library") == {"numpy": 3}
    assert by(found["files"], "file") == {
        "/v/lib/python3.11/site-packages/numpy.libs/libblas-1.so": 3, "/data/weights.bin": 1,
    }  # fmt: skip
    [process] = found["processes"]
    assert (process["pid"], process["comm"], process["mapped"]) == (100, "python", 8)
    first, second = process["mappings"][:2]
    assert (first["kind"], first["begin"]) == ("free heap", f"{HEAP_AT:x}")
    assert (second["kind"], second["name"]) == ("large blocks", "")
    assert second["parts"] == {"large blocks": 32 * PAGE, "python objects": 4 * PAGE, "anonymous": 4 * PAGE}
    sizes = [m["resident_bytes"] for m in process["mappings"]]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == found["resident_bytes"]


def test_a_block_goes_on_where_advice_has_split_its_mapping(tmp_path: Path) -> None:
    made = Images(tmp_path / "img")
    areas = [vma(HEAP_AT, 10, ANON | HEAP), vma(HEAP_AT + 10 * PAGE, 10, ANON | HEAP)]
    areas += [vma(MAPPED, 5, ANON), vma(MAPPED + 5 * PAGE, 27, ANON), vma(MAPPED + 33 * PAGE, 1, ANON)]
    made.process(100, "python", areas)
    heap = chunks((16 * PAGE + 64, True), pages=20)
    made.pages(100, (HEAP_AT, heap), (MAPPED, page(9) * 4 + block(20) + page(9) * 8), (MAPPED + 33 * PAGE, page(9)))
    kinds = by(look(made.root)["kinds"], "kind")
    assert kinds == {"large blocks": 15 + 20, "free heap": 3, "heap": 2, "anonymous": 4 + 8 + 1}


def test_what_is_as_in_the_parent(images: Images, tmp_path: Path) -> None:
    parent = Images(tmp_path / "parent")
    parent.pages(
        100,
        (MAPPED, pool() + block(16)),
        (MAPPED + 20 * PAGE, page(1) * 20),
        (STACK, page(1) + page(8)),
        (LIB, page(1)),
    )
    found = look(images.root, parent.root)
    assert {k: v for k, v in by(found["kinds"], "kind", "shared_bytes").items() if v} == {
        "python objects": 4, "large blocks": 16, "stacks": 1,
    }  # fmt: skip
    assert found["shared_bytes"] == 21 * PAGE
    whole = look(images.root, images.root)
    assert whole["shared_bytes"] == whole["resident_bytes"]


def test_the_stack_of_an_arm64_thread_is_one(tmp_path: Path) -> None:
    made = Images(tmp_path / "img")
    made.process(100, "python", [vma(MAPPED, 8, ANON), vma(MAPPED + 64 * PAGE, 8, ANON)], threads=(101,))
    for tid, sp in ((100, STACK + 8), (101, MAPPED + 66 * PAGE)):
        registers = message(*((1, 7) for _ in range(31)), (2, sp), (3, MAPPED), (4, 0))
        image(made.root / f"core-{tid}.img", message((1, 3), (8, message((1, 0), (2, 0), (3, registers)))))
    assert [area.kind for area in read_areas(made.root)[0].areas] == ["anonymous", "stacks"]


def test_shared_memory_counts_once(images: Images) -> None:
    for pid in (200, 201):
        images.process(pid, f"p{pid}", [vma(0x7F3000000000, 4, ANON_SHARED, shmid=55)])
        images.pages(pid)
    images.pages("shmem-55", (0, page(1) + page(0)), flags=PRESENT)
    found = look(images.root)
    shared = next(k for k in found["kinds"] if k["kind"] == "shared memory")
    assert (shared["resident_bytes"], shared["zero_bytes"]) == (2 * PAGE, PAGE)
    assert sorted(p["resident_bytes"] for p in found["processes"])[:2] == [0, 2 * PAGE]


def test_pages_of_a_packed_snapshot_are_where_its_index_says(tmp_path: Path) -> None:
    made = Images(tmp_path / "img")
    made.process(100, "python", [vma(MAPPED, 8, ANON), vma(STACK, 2, ANON, flags=0x122)])
    made.pages(100, (MAPPED, page(0) * 8))
    # The stack is not lazy: it stays in the pages file, behind the hole.
    entries = [
        message((1, MAPPED), (4, LAZY | PRESENT), (5, 8)), message((1, STACK), (4, PRESENT), (5, 2)),
    ]  # fmt: skip
    image(made.root / "pagemap-100.img", message((1, 1)), *entries)
    (made.root / "pages-1.img").write_bytes(page(0) * 8 + page(5) + page(6))
    packs = (tmp_path / "first", tmp_path / "second")
    packs[0].write_bytes(page(1) + page(2) + page(3))
    packs[1].write_bytes(page(4))
    extents = ((MAPPED, 2, PAGE, 0), (MAPPED + 5 * PAGE, 1, 0, 1), (MAPPED + 6 * PAGE, 1, 0, 0))
    (made.root / "pages.idx").write_bytes(write_index(PageIndex((PageTask(100, extents),), ("a" * 64, "b" * 64))))
    reader = PageReader.of_images(made.root, packs)
    assert reader.read(100, MAPPED, 8) == b"".join(map(page, (2, 3, 0, 0, 0, 4, 1, 0)))
    assert reader.read(100, STACK, 2) == page(5) + page(6)
    assert reader.read(100, STACK - PAGE, 2) == page(0) + page(5)
    assert reader.read(7, MAPPED, 1) == page(0)
    found = contents(read_areas(made.root), reader)
    assert (found["resident_bytes"], found["zero_bytes"]) == (10 * PAGE, 4 * PAGE)
    reader.close()


def test_what_differs(images: Images, tmp_path: Path) -> None:
    before = Images(tmp_path / "before")
    before.pages(
        100,
        (MAPPED, pool() + block(16) + block(16, shift=48) + page(9) + page(0) * 2 + page(1)),
        (MAPPED + 100 * PAGE - 3 * PAGE, page(1) * 3),  # gone
        (0x7F2000000000 + 5 * PAGE, page(3) + page(4) + page(3)),  # the middle one
        (STACK + PAGE, page(8)),
    )
    found = answer(
        {"of": {"images": str(images.root)}, "before": {"images": str(before.root)}, "most": 3},
    )
    assert (found["changed"], found["gone"]) == (2, 3)
    assert found["new"] == 60 + 1 + 1 + 1  # heap, library, its zeroed data but for the zero page, file
    assert found["bytes"] == 65 * PAGE
    assert found["same"] == 3 + 36 + 3 + 1
    kinds = {k["kind"]: (k["changed"], k["new"]) for k in found["kinds"]}
    assert kinds["stacks"] == (1, 0) and kinds["anonymous"] == (1, 0) and kinds["library data"] == (0, 2)
    assert [(r["address"], r["pages"]) for r in found["ranges"]] == [
        (f"{HEAP_AT:x}", 60), (f"{LIB + PAGE:x}", 2), (f"{MAPPED + 39 * PAGE:x}", 1),
    ]  # fmt: skip
    assert answer({"of": {"images": str(images.root)}, "before": {"images": str(images.root)}})["bytes"] == 0


CHILD = """
import ctypes, mmap, sys
area = mmap.mmap(-1, 64 * 4096, mmap.MAP_PRIVATE)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
area[:16 * 4096] = b"a" * (16 * 4096)
area[20 * 4096] = 7
print(address, flush=True)
sys.stdin.readline()
"""


def test_a_running_process_against_its_snapshot(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin and child.stdout
        at = int(child.stdout.readline())
        live = PageReader.of_processes({100: child.pid})
        memory = Memory(100, "", areas_of_process(child.pid))
        # As if the first pages had been restored, one was then written, and some were not asked for.
        before = Images(tmp_path / "img")
        old = page(ord("a")) * 15 + page(1) + page(0) * 14 + page(2) * 4
        before.pages(100, (at, old), (0x1000, page(1)))
        snapshot = PageReader.of_images(before.root)
        after = live.over(snapshot, [memory])
        mine = Memory(100, "", [a for a in memory.areas if a.begin <= at < a.end])
        found = difference(snapshot, after, [mine])
        assert (found["changed"], found["new"]) == (2, 0)  # the one that is written, and the 7 among zeroes
        assert found["same"] == 15 + 13 + 4
        assert found["gone"] == 1
        assert live.read(100, at + 20 * PAGE, 1)[:2] == b"\7\0"
        live.close()
        snapshot.close()
        child.stdin.write("\n")


def test_arenas_stacks_and_what_follows_a_library() -> None:
    arena, size = 0x7F0040000000, 64 * MIB

    def kinds(*areas: Area, tops: tuple[int, ...] = ()) -> list[str]:
        return [a.kind for a in explain(list(areas), {a.begin for a in areas}, tops)]

    small, rest = Area(arena, arena + MIB, "anonymous"), Area(arena + MIB, arena + size, "anonymous")
    assert kinds(small, rest)[0] == "malloc arenas"
    assert kinds(Area(arena, arena + size, "anonymous")) == ["malloc arenas"]
    assert kinds(small) == ["anonymous"]
    assert kinds(small, tops=(arena + 8,)) == ["stacks"]
    library = Area(LIB, BSS, "library data", "/lib/libx.so")
    assert explain([library, Area(BSS, BSS + PAGE, "anonymous")], {LIB, BSS}, ())[1].name == "/lib/libx.so"
    assert kinds(library, Area(BSS, BSS + 2 * MIB, "anonymous"))[1] == "anonymous"
    assert explain([library, Area(BSS, BSS + PAGE, "anonymous")], {BSS}, ())[1].kind == "anonymous"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v/lib/python3.11/site-packages/torch/lib/libtorch_cpu.so", "torch"),
        ("/v/lib/python3.11/site-packages/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0", "scikit_learn"),
        ("/v/lib/python3.11/site-packages/_cffi_backend.cpython-311-x86_64-linux-gnu.so", "_cffi_backend"),
        ("/usr/lib/python3/dist-packages/apt_pkg.so", "apt_pkg"),
        ("/p/lib/python3.11/lib-dynload/_json.cpython-311-x86_64-linux-gnu.so", "python"),
        ("/p/lib/libpython3.11.so.1.0", "python"),
        ("/usr/bin/python3.11", "python"),
        ("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "ld-linux-x86-64"),
        ("/usr/lib/locale/C.utf8/LC_CTYPE", "LC_CTYPE"),
    ],
)
def test_a_files_library(path: str, name: str) -> None:
    assert library_of(path) == name


@pytest.mark.parametrize("name", ["mm-100.img", "pagemap-100.img", "pstree.img", "files.img", "pages-1.img"])
def test_images_that_are_cut_off_are_one_line(images: Images, name: str) -> None:
    path = images.root / name
    whole = path.read_bytes()
    for length in (0, 3, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        done = subprocess.run(
            [sys.executable, "-m", "woodfrog.snapshot.contents"],
            input=json.dumps({"of": {"images": str(images.root)}}),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert list(json.loads(done.stdout)) == ["error"], length


def test_what_came_from_a_gpu_is_told_apart(tmp_path: Path) -> None:
    """Also where the kernel joined it with its neighbours, and whatever it looks like."""
    made = Images(tmp_path / "img")
    made.process(100, "python", [vma(MAPPED, 16, ANON)])
    made.pages(100, (MAPPED, page(7) * 2 + block(4) + page(9) * 10))
    gpu = GpuFacts("580", (), (), ((100, 12 * PAGE),), ((100, MAPPED + 2 * PAGE, MAPPED + 14 * PAGE), (99, 0, PAGE)))
    facts = Facts(100, 100, 1, "none", 0, "", {"pages-1.img": 1}, gpu=gpu)
    (made.root / FACTS).write_text(facts.to_json())
    found = answer({"of": {"images": str(made.root)}})
    assert by(found["kinds"], "kind")["GPU memory"] == 12
    assert by(found["kinds"], "kind")["anonymous"] == 4
    (mine,) = found["processes"]
    assert [m["kind"] for m in mine["mappings"]] == ["GPU memory", "anonymous", "anonymous"]
