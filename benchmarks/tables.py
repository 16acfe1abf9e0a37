"""Write the numbers of results/*.json into README.md, between its markers: `python benchmarks/tables.py`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ARMS = {
    "cold": "cold start",
    "criu": "criu restore",
    "lazy": "criu lazy-pages",
    "runsc": "gVisor runsc restore",
    "whole": "woodfrog, page server off",
    "woodfrog": "woodfrog",
    "fork": "fork server",
    "criu-alone": "criu restore, no woodfrog about",
    "lazy-alone": "criu lazy-pages, no woodfrog about",
}
PHASES = ("verify", "assemble", "restore", "wake", "run")


def rows(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = [" | ".join(headings), "|".join(["---", *["---:"] * (len(headings) - 1)])]
    return "".join(
        f"| {line} |\n" if i != 1 else f"|{line}|\n" for i, line in enumerate([*head, *map(" | ".join, lines)])
    )


def facts(result: dict[str, Any]) -> str:
    m = result["machine"]
    return (
        f"Measured {m['date']}: {m['cpu']}, {m['cores']} cores, {m['memory_gib']:.0f} GiB, kernel {m['kernel']}, "
        f"CRIU {m['criu']}, Python {m['python']}; load before {m['load_before'][0]}.\n\n"
    )


def three(values: dict[str, Any], digits: int = 0) -> str:
    return " / ".join(f"{values[k]:.{digits}f}" for k in ("min", "median", "p95"))


def start(result: dict[str, Any]) -> str:
    work = result["workloads"]
    lines = [
        [title, *(three(w["ms"][arm]) if arm in w["ms"] else "" for w in work.values())]
        for arm, title in ARMS.items()
        if any(arm in w["ms"] for w in work.values())
    ]
    best = (w["best_thaw_over_woodfrog"] for w in work.values())
    lines.append(["the best of criu and gVisor over woodfrog", *("" if b is None else f"{b:.2f}" for b in best)])
    alone = [w.get("best_alone_over_woodfrog") for w in work.values()]
    if any(alone):
        lines.append(["the same, no woodfrog about", *("" if b is None else f"{b:.2f}" for b in alone)])
    lines.append(
        [
            "cold over woodfrog",
            *(f"{w['over_woodfrog']['cold']:.1f}" if "cold" in w["over_woodfrog"] else "" for w in work.values()),
        ]
    )
    lines.append(
        [
            "first request over a warm one, in the handler",
            *(f"{w['handler_ms']['first_over_warm']:.2f}" for w in work.values()),
        ]
    )
    for name in PHASES:
        lines.append(
            [f"phase `{name}` of woodfrog", *(f"{w['phases_ms']['woodfrog'].get(name, 0):.1f}" for w in work.values())]
        )
    heads = [f"{name} ({w['snapshot']['memory_bytes'] / 1e6:.0f} MB)" for name, w in work.items()]
    extra = f" gVisor {result['runsc']}." if "runsc" in result else ""
    if "huge8_over_huge4" in result:
        extra += f" 8 GB over 4 GB: {result['huge8_over_huge4']:.2f}."
    title = f"ms, min / median / p95 of {result['rounds']} rounds (of 4 and 8 GB a quarter)"
    return f"{facts(result).rstrip()}{extra}\n\n{title}:\n\n{rows(['', *heads], lines)}"


def burst(result: dict[str, Any]) -> str:
    lines = [
        ["thaws a second", three(result["thaws_per_second"], 1)],
        ["ms to an answer", three(result["answer_ms"])],
    ]
    cpu = ", ".join(f"{who} {ms:.1f}" for who, ms in result["processor_ms_per_thaw"].items())
    return (
        f"{facts(result)}{result['calls']} calls at once, {result['memory_bytes'] / 1e6:.0f} MB each; "
        f"{result['thaws']} thaws, {result['cold']} cold starts:\n\n{rows(['', 'min / median / p95'], lines)}\n"
        f"Processor time of a thaw, ms: {cpu}.\n"
    )


def memory(result: dict[str, Any]) -> str:
    kinds = ("clone", "anonymous", "files", "tmpfs", "page_server", "machine", "page_cache_once")
    lines = [[title, *(f"{v[k]:.1f}" for k in kinds)] for title, v in result["mib_per_clone"].items()]
    heads = ["", "all", "anonymous", "files", "tmpfs", "page server", "machine", "page cache, once"]
    title = f"MiB for each copy of a {result['snapshot_bytes'] / 1e6:.0f} MB process"
    return f"{facts(result)}{title}:\n\n{rows(heads, lines)}"


def capture(result: dict[str, Any]) -> str:
    work = result["workloads"]
    keys = {
        "criu_dump_ms": "`criu dump`",
        "pause_ms": "pause: hooks, dump, files",
        "thaw_ms": "thaw after it",
        "longer_ms": "first call, longer than one without a capture",
        "stored_after_answer_ms": "stored so long after the answer",
    }
    lines = [[title, *(three(w[key]) for w in work.values())] for key, title in keys.items()]
    for key, title in (("pause_over_criu_dump", "pause"), ("dump_over_criu_dump", "dump and files")):
        lines.append([f"{title} over `criu dump`", *(f"{w[key]:.2f}" for w in work.values())])
    heads = [f"{name} ({w['memory_bytes'] / 1e6:.0f} MB)" for name, w in work.items()]
    return f"{facts(result)}ms, min / median / p95 of {result['rounds']} rounds:\n\n{rows(['', *heads], lines)}"


def bitflips(result: dict[str, Any]) -> str:
    return (
        f"{facts(result)}{result['count']} flips, {result['seconds']:.0f} s: {len(result['not_found'])} not found, "
        f"{len(result['not_answered'])} calls not answered rightly.\n\n"
        f"{rows(['in', 'flips'], [[k, str(v)] for k, v in result['by_kind'].items()])}"
    )


def kills(result: dict[str, Any]) -> str:
    found = {k: len(result[k]) for k in ("wrong", "leaks", "store_problems")}
    return (
        f"{facts(result)}{sum(result['killed'].values())} kills in {result['seconds']:.0f} s: "
        f"{result['right_answers']} right answers, {found['wrong']} wrong, "
        f"{sum(result['without_answer'].values())} without one; {found['leaks']} leaks, "
        f"{found['store_problems']} problems in the store.\n\n"
        f"{rows(['killed', 'times'], [[k, str(v)] for k, v in sorted(result['killed'].items())])}"
    )


def calls(result: dict[str, Any]) -> str:
    payload = [
        [k, str(v["n"]), *(f"{v[x]:.2f}" for x in ("min", "median", "p95"))] for k, v in result["payload_ms"].items()
    ]
    parts = result["where_ms"]
    where = ", ".join(
        f"{k} {parts[p]:.2f}" for k, p in (("HTTP", "http"), ("daemon", "daemon"), ("worker", "run"), ("SDK", "client"))
    )
    many = [[k, f"{v['calls_per_second']:.0f}", f"{v['median_ms']:.2f}"] for k, v in result["throughput"].items()]
    return (
        f"{facts(result)}{rows(['payload', 'calls', 'min ms', 'median ms', 'p95 ms'], payload)}\n"
        f"Where {parts['call']:.2f} ms of a small call go: {where} ms.\n\n"
        f"{rows(['instances, clients', 'calls a second', 'median ms'], many)}"
    )


def soak(result: dict[str, Any]) -> str:
    halfway = result.get("held_halfway", {})
    held = [
        [k, str(v), str(halfway.get(k, "")), str(result["held_at_end"][k])] for k, v in result["held_at_start"].items()
    ]
    return (
        f"{facts(result)}{result['cycles']} cycles, {result['freezes']} freezes and {result['thaws']} thaws in all, "
        f"{result['seconds']:.0f} s: {len(result['differences'])} differences, {len(result['leaks'])} leaks.\n\n"
        f"{rows(['held', 'at the start', 'half-way', 'at the end'], held)}"
    )


def tier(result: dict[str, Any]) -> str:
    arms, parallel = result["arms"], result["parallel_mb_s"]
    titles = {"cold": "cold start", "whole": "all of it first", "through": "read-through"}
    lines = [
        [
            titles[arm],
            three(values["first_ms"]),
            f"{values['first_mb']['median']:.0f}",
            three(values["second_ms"]),
            three(values["whole_ms"]) if "whole_ms" in values else "",
        ]
        for arm, values in arms.items()
    ]
    first = rows(["minimum / median / p95", "first answer, ms", "MB by then", "second, ms", "all here, ms"], lines)
    requests = next(iter(parallel.values()))
    many = [[n, *(f"{column[n]['median']:.0f}" for column in parallel.values())] for n in requests]
    return (
        facts(result)
        + f"{result['raw_bytes'] / 1e6:.0f} MB of memory, {result['mb_s']:.0f} MB/s, {result['latency_ms']:.0f} ms:\n\n"
        + first
        + "\nMB/s of ranges of 2 MiB, so many requests at a time:\n\n"
        + rows(["requests", *parallel], many)
    )


def gpu_start(result: dict[str, Any]) -> str:
    work, gpu = result["workloads"], result["gpu"]
    titles = {"cold": "cold start", "cpu": "host snapshot", "gpu": "GPU snapshot"}
    lines = [
        [title, *(three(w["ms"][arm]) if arm in w["ms"] else "" for w in work.values())]
        for arm, title in titles.items()
    ]
    lines += [
        [
            f"{titles[arm]} over GPU snapshot",
            *(f"{w['over_gpu'][arm]:.1f}" if arm in w["over_gpu"] else "" for w in work.values()),
        ]
        for arm in ("cold", "cpu")
    ]
    for move in ("lock", "checkpoint", "restore", "unlock"):
        found = [w["gpu_ms"].get(f"gpu.{move}") for w in work.values()]
        lines.append([f"driver: {move}", *("" if ms is None else f"{ms:.0f}" for ms in found)])
    for title, key in (("image, GiB", "memory_bytes"), ("of it from the GPU", "gpu_bytes")):
        lines.append(
            [
                title,
                *(f"{w['captures']['gpu'][key] / 2**30:.1f}" if "gpu" in w["captures"] else "" for w in work.values()),
            ]
        )
    about = ", ".join(v for v in (gpu.get("name"), f"driver {gpu.get('driver_version')}") if v)
    return f"{facts(result)}{about}. ms, min / median / p95:\n\n{rows(['', *work], lines)}"


def gpu_restore(result: dict[str, Any]) -> str:
    parts, gpu = result["parts"], result["gpu"]
    about = ", ".join(v for v in (gpu.get("name"), f"driver {gpu.get('driver_version')}") if v)
    out = [f"{facts(result)}{about}."]
    titles = {
        "ours": "ours",
        "whole": "ours, no page server",
        "plain": "plain: criu, then the driver",
        "lazy": "plain, criu lazy-pages",
    }
    for name, found in parts.get("restore", {}).items():
        lines = [
            [
                title,
                three(found["ms"][arm]),
                f"{found['over_ours'].get(arm, 1.0):.2f}",
                *(f"{found['phases_ms'][arm].get(p, 0):.0f}" for p in ("criu", "gpu.restore", "gpu.unlock", "answer")),
                f"{found['gib_s']['gpu.restore'][arm] or 0:.1f}",
            ]
            for arm, title in titles.items()
            if arm in found.get("ms", {})
        ]
        heads = [name, "min / median / p95", "× ours", "criu", "gpu.restore", "gpu.unlock", "answer", "driver GiB/s"]
        out.append(f"ms to the first answer:\n\n{rows(heads, lines)}")
    if bound := parts.get("bound"):
        ways, driver = bound["copies"], bound.get("driver", {}).get("gib_s", {})
        lines = [[way, three(v, 1), three(ways["from_device"][way], 1)] for way, v in ways["to_device"].items()]
        lines.append(
            ["the driver's restore, checkpoint", *(f"{driver.get(m) or 0:.1f}" for m in ("restore", "checkpoint"))]
        )
        out.append(f"GiB/s between host and GPU:\n\n{rows(['', 'to it', 'from it'], lines)}")
    if several := parts.get("several"):
        lines = [
            [
                count,
                *(f"{v[way][m]['median']:.0f}" for m in ("checkpoint", "restore") for way in ("at_once", "in_turn")),
                f"{v['in_turn_over_at_once']['all']:.2f}",
            ]
            for count, v in several.items()
        ]
        heads = ["processes", "checkpoint, at once", "in turn", "restore, at once", "in turn", "all moves, factor"]
        out.append(f"Several processes, median ms:\n\n{rows(heads, lines)}")
    if cycles := parts.get("cycles"):
        leaks = cycles.get("leaks")
        out.append(
            f"{cycles['cycles']} freezes and thaws of {cycles['bytes'] >> 20} MiB: {len(cycles['failures'])} failures, "
            f"{'leaks not looked for' if leaks is None else f'{len(leaks)} leaks'}."
        )
    return "\n\n".join(text.rstrip() for text in out) + "\n"


def main() -> int:
    readme = HERE / "README.md"
    text = readme.read_text()
    parts: dict[str, Callable[[dict[str, Any]], str]] = {
        "start": start,
        "burst": burst,
        "memory": memory,
        "capture": capture,
        "calls": calls,
        "soak": soak,
        "bitflips": bitflips,
        "kills": kills,
        "tier": tier,
        "gpu/start": gpu_start,
        "gpu/restore": gpu_restore,
    }
    for name, render in parts.items():
        path = HERE / "results" / f"{name}.json"
        if not path.exists():
            print(f"no results/{name}.json yet: its part is left as it is", file=sys.stderr)
            continue
        made = f"<!-- {name} -->\n\n{render(json.loads(path.read_text()))}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, made=made: made, text, flags=re.S)
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
