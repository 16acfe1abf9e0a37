"""The small shared modules: specs through JSON, keys, frames, errors, phases, settings."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog import errors, protocol, spec
from woodfrog.errors import CaptureError, RestoreError, SpecError, WoodfrogError, error_from_dict
from woodfrog.linux import rootplan
from woodfrog.protocol import HEAD, MAX_BODY, MAX_HEADER, ProtocolError
from woodfrog.settings import Settings, load
from woodfrog.spec import AppSpec, FunctionSpec, RuntimeSpec, from_dict, function_key, to_dict
from woodfrog.store import content
from woodfrog.telemetry import Phases

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(to_dict(value)))


# Specs

functions = st.builds(
    FunctionSpec,
    tag=TEXT,
    kind=st.sampled_from(["function", "class"]),
    source=st.builds(
        spec.SourceSpec,
        kind=st.sampled_from(["module", "serialized"]),
        module=TEXT,
        qualname=TEXT,
        code_digest=st.none() | TEXT,
        blob_digest=st.none() | TEXT,
    ),
    methods=st.lists(st.builds(spec.MethodSpec, name=TEXT, generator=st.booleans()), max_size=3).map(tuple),
    snapshot=st.builds(spec.SnapshotPolicy, enabled=st.booleans(), gpu=st.booleans()),
    scaling=st.builds(spec.ScalingPolicy, max_containers=st.none() | st.integers(1, 9)),
    resources=st.builds(
        spec.Resources,
        cpu=st.none() | st.floats(0.1, 64),
        memory_mib=st.none() | st.integers(1, 1 << 20),
        gpu=st.lists(TEXT, max_size=2).map(tuple),
    ),
    timeout=st.floats(0, 1e6),
    env=st.dictionaries(TEXT, TEXT, max_size=3),
    secrets=st.lists(
        st.builds(spec.SecretSpec, name=st.none() | TEXT, values=st.dictionaries(TEXT, TEXT, max_size=2)), max_size=2
    ).map(tuple),
    volumes=st.lists(st.builds(spec.VolumeMount, name=TEXT, path=TEXT, read_only=st.booleans()), max_size=2).map(tuple),
    image=st.builds(spec.ImageSpec, packages=st.lists(TEXT, max_size=2).map(tuple)),
    parameters=st.dictionaries(TEXT, TEXT, max_size=2),
    constructor=st.none() | st.dictionaries(TEXT, TEXT, max_size=2),
)
runtimes = st.builds(
    RuntimeSpec, executable=TEXT, prefix=TEXT, base_prefix=TEXT, version=TEXT, sys_path=st.lists(TEXT).map(tuple)
)
apps = st.builds(AppSpec, name=TEXT, runtime=runtimes, functions=st.lists(functions, max_size=3).map(tuple))

RUNTIME = RuntimeSpec("/usr/bin/python3", "/usr", "/usr", "3.11.7")
FUNCTION = FunctionSpec(
    tag="f",
    kind="function",
    source=spec.SourceSpec("module", "app", "f", code_digest="0" * 64),
    methods=(spec.MethodSpec("f"),),
)


@given(apps)
def test_specs_go_through_json_unchanged(app: AppSpec) -> None:
    again = from_dict(AppSpec, through_json(app))
    assert again == app
    for one, other in zip(app.functions, again.functions, strict=True):
        assert function_key(one, app.runtime) == function_key(other, again.runtime)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in inside for p in places(item, (*path, key)))]


@given(apps, st.data())
def test_damaged_specs_are_refused_with_their_place(app: AppSpec, data: st.DataObject) -> None:
    """Whatever stands anywhere: a spec, or one clear SpecError; never another exception."""
    raw = through_json(app)
    path = data.draw(st.sampled_from(places(raw)))
    junk: Any = data.draw(
        st.sampled_from(
            [None, 1, -1.5, True, "x", [], {}, [1], {"x": 1}, {"a\nb": 1}, [None], math.inf, math.nan, 10**400, [[]]]
        )
    )
    if not path:
        raw = junk
    else:
        at = raw
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = junk
    try:
        app = from_dict(AppSpec, raw)
    except SpecError as e:
        assert e.code == "bad-spec" and e.message.startswith("AppSpec") and "\n" not in e.message
    else:
        assert is_dataclass(app) and from_dict(AppSpec, to_dict(app)) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "FunctionSpec: unknown field 'extra'"),
        ({"timeout": "5"}, "FunctionSpec.timeout: expected float, got str"),
        ({"timeout": True}, "FunctionSpec.timeout: expected float, got bool"),
        ({"block_network": 1}, "FunctionSpec.block_network: expected bool, got int"),
        ({"kind": "thing"}, "FunctionSpec.kind: 'thing' is not one of"),
        ({"kind": ["function"]}, "FunctionSpec.kind: "),
        ({"kind": {}}, "FunctionSpec.kind: "),
        ({"methods": "f"}, "FunctionSpec.methods: expected a list, got str"),
        ({"methods": [{"name": 5}]}, r"FunctionSpec.methods\[0\].name: expected str, got int"),
        ({"methods": [{}]}, r"FunctionSpec.methods\[0\]: field 'name' is missing"),
        ({"env": []}, "FunctionSpec.env: expected an object, got list"),
        ({"env": {"A": 1}}, "FunctionSpec.env.A: expected str, got int"),
        ({"env": {"A\nB": 1}}, r"FunctionSpec.env\['A\\nB'\]: expected str, got int"),
        ({"env": {"A\u2028B": 1}}, r"FunctionSpec.env\['A\\u2028B'\]: expected str"),
        ({"env": {"A" * 1000: 1}}, r"FunctionSpec.env\['A{80}'\]: expected str"),
        ({"a\nb": 1}, r"FunctionSpec: unknown field 'a\\nb'"),
        ({"kind": "a\nb"}, r"FunctionSpec.kind: 'a\\nb' is not one of"),
        ({"scaling": {"max_containers": 0}}, "FunctionSpec.scaling: max_containers=0: must be at least 1"),
        ({"resources": {"memory_mib": 1.5}}, "memory_mib: expected int, got float"),
        ({"timeout": math.nan}, "FunctionSpec.timeout: expected a number below"),
        ({"timeout": math.inf}, "FunctionSpec.timeout: expected a number below"),
        ({"resources": {"cpu": 10**400}}, "cpu: expected a number below"),
        ({"resources": None}, "FunctionSpec.resources: expected an object, got NoneType"),
    ],
)
def test_what_is_wrong_in_a_spec_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        from_dict(FunctionSpec, {**through_json(FUNCTION), **change})


def test_a_whole_number_is_a_float_and_defaults_are_filled_in() -> None:
    raw = {**through_json(FUNCTION), "timeout": 5}
    del raw["scaling"]
    assert from_dict(FunctionSpec, raw) == replace(FUNCTION, timeout=5.0)


CHANGES: dict[str, tuple[Any, bool]] = {
    "tag": ("g", False),
    "kind": ("class", True),
    "source": (replace(FUNCTION.source, code_digest="1" * 64), True),
    "methods": ((spec.MethodSpec("f", generator=True),), True),
    "snapshot": (spec.SnapshotPolicy(enabled=True), True),
    "scaling": (spec.ScalingPolicy(min_containers=1), False),
    "resources": (spec.Resources(gpu=("A100",)), True),
    "retries": (spec.RetryPolicy(3), False),
    "timeout": (1.0, False),
    "startup_timeout": (1.0, False),
    "plain_start": (True, False),
    "block_network": (True, True),
    "env": ({"A": "1"}, True),
    "secrets": ((spec.SecretSpec("s"),), True),
    "volumes": ((spec.VolumeMount("v", "/v"),), True),
    "image": (spec.ImageSpec(env={"A": "1"}), True),
    "parameters": ({"x": "int"}, False),
    "constructor": ({"x": "int"}, False),
}


def test_every_field_either_decides_the_key_or_is_known_not_to() -> None:
    assert set(CHANGES) == {f.name for f in fields(FunctionSpec)}
    key = function_key(FUNCTION, RUNTIME)
    for name, (value, decides) in CHANGES.items():
        changed = function_key(replace(FUNCTION, **{name: value}), RUNTIME)
        assert (changed != key) == decides, name
    for f in fields(RuntimeSpec):
        other: Any = ("x",) if f.name == "sys_path" else "other"
        assert function_key(FUNCTION, replace(RUNTIME, **{f.name: other})) != key, f.name
    assert function_key(FUNCTION, RUNTIME, "p") != key


def test_rotated_secrets_keep_the_key() -> None:
    def keyed(**values: str) -> str:
        return function_key(replace(FUNCTION, secrets=(spec.SecretSpec(values=values),)), RUNTIME)

    assert keyed(A="1", B="2") == keyed(B="3", A="4") != keyed(A="1")


def test_memory_limits_keep_the_key() -> None:
    small = replace(FUNCTION, resources=spec.Resources(memory_mib=100))
    assert function_key(small, RUNTIME) == function_key(FUNCTION, RUNTIME)


def test_split_tag() -> None:
    assert spec.split_tag("f") == ("f", None)
    assert spec.split_tag("C.m") == ("C", "m")
    assert spec.split_tag("C.") == ("C", None)


# Frames

headers = st.fixed_dictionaries(
    {"type": TEXT}, optional={"a": st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT)}
)


@given(headers, st.integers(0, MAX_BODY))
def test_frames_round_trip(header: dict[str, Any], body_len: int) -> None:
    data = protocol.pack(header, body_len)
    lengths = protocol.parse_head(data[: HEAD.size])
    assert lengths == (len(data) - HEAD.size, body_len)
    assert protocol.parse_header(data[HEAD.size :]) == header


@given(st.binary(min_size=HEAD.size, max_size=HEAD.size) | st.binary(max_size=16).map(lambda b: b"wfrg\0\0\0\1" + b))
def test_heads_are_lengths_within_the_limits_or_refused(data: bytes) -> None:
    data = data[: HEAD.size].ljust(HEAD.size, b"\0")
    try:
        header_len, body_len = protocol.parse_head(data)
    except ProtocolError:
        return
    assert header_len <= MAX_HEADER and body_len <= MAX_BODY


@given(st.binary(max_size=60) | st.text().map(lambda t: ('{"type":"x","m":' + json.dumps(t) + "}").encode()))
def test_headers_are_encodable_objects_or_refused(data: bytes) -> None:
    try:
        header = protocol.parse_header(data)
    except ProtocolError:
        return
    json.dumps(header, ensure_ascii=False).encode()
    assert isinstance(header["type"], str)


def test_oversized_header_is_not_packed() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        protocol.pack({"type": "x", "pad": "x" * MAX_HEADER})


@given(st.lists(st.tuples(st.sampled_from([b"i", b"d", b"e", b"f"]), st.binary(max_size=30)), max_size=5), st.data())
def test_items_round_trip_and_truncation_is_noticed(items: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    packed = protocol.pack_items(items)
    assert list(protocol.unpack_items(packed)) == items
    if packed:
        cut = data.draw(st.integers(1, len(packed) - 1))
        whole = [protocol.pack_items(items[:n]) for n in range(len(items) + 1)]
        if packed[:cut] not in whole:
            with pytest.raises(ProtocolError, match="truncated"):
                list(protocol.unpack_items(packed[:cut]))


def test_messages_name_their_type() -> None:
    boot = protocol.BootMessage("a", "f", "function", "module", "m", "q", [], [], {})
    start = protocol.StartContext("i", "h", False, None, "00", 1.0, {})
    assert boot.header()["type"] == "boot" and start.header()["type"] == "start"
    assert json.loads(json.dumps(boot.header())) == boot.header()


# Errors


def all_errors() -> list[type[WoodfrogError]]:
    return [getattr(errors, n) for n in errors.__all__ if isinstance(getattr(errors, n), type)]


@pytest.mark.parametrize("cls", all_errors())
def test_errors_travel(cls: type[WoodfrogError]) -> None:
    plain = cls("it broke")
    assert (str(plain), plain.code, plain.retryable) == ("it broke", cls.code, cls.retryable)
    error = cls("it broke é", code="particular", retryable=True, pid=5, log=["x"])
    data = json.loads(json.dumps(error.to_dict()))
    for again in (error_from_dict(data), pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is cls and again.to_dict() == error.to_dict() and str(again) == "it broke é"
    assert isinstance(again, WoodfrogError)


def test_error_codes_are_unique_and_the_tree_is_whole() -> None:
    codes = [cls.code for cls in all_errors()]
    assert len(codes) == len(set(codes))
    assert issubclass(errors.FunctionTimeoutError, TimeoutError) and issubclass(errors.OutOfMemoryError, MemoryError)
    assert set(errors.__all__) == {
        n for n, v in vars(errors).items() if isinstance(v, type) and v.__module__ == errors.__name__
    } | {"error_from_dict"}


def test_errors_keep_what_they_know() -> None:
    capture = pickle.loads(pickle.dumps(CaptureError("x", alive=True, phase="dump")))
    restore = error_from_dict(RestoreError("x", snapshot_at_fault=True).to_dict())
    assert isinstance(capture, CaptureError) and capture.alive and capture.fields["phase"] == "dump"
    assert isinstance(restore, RestoreError) and restore.snapshot_at_fault
    assert not CaptureError("x").alive and not RestoreError("x").snapshot_at_fault


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"type": "Exception", "message": "m"},
        {"type": "SystemExit"},
        {"type": 5, "message": None, "fields": None, "code": None, "retryable": None},
        {"type": "FutureError", "message": "m", "code": "c", "retryable": True, "fields": {"a": 1}, "more": 1},
    ],
)
def test_unknown_errors_are_plain_ones(data: dict[str, Any]) -> None:
    error = error_from_dict(data)
    assert type(error) is WoodfrogError
    assert error_from_dict(error.to_dict()).to_dict() == error.to_dict()


# Phases


def test_phases() -> None:
    phases = Phases()
    with pytest.raises(ValueError), phases("outer"), phases("inner"):
        raise ValueError
    phases.add("worker", 2.0, parent="outer")
    other = Phases()
    other.merge(json.loads(json.dumps(phases.to_list())), offset_ms=10.0, parent="start")
    assert [(p.name, p.parent) for p in other.items] == [("outer", "start"), ("inner", "outer"), ("worker", "outer")]
    assert other.items[0].start_ms == pytest.approx(phases.items[0].start_ms + 10.0)
    assert all(p.ms >= 0 for p in phases.items) and phases.elapsed_ms() >= phases.items[0].ms


# Settings


def test_settings_order(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('pool_size = 7\ntoken = "file"\nkeep_results_s = 5\n')
    env = {"WOODFROG_HOME": str(tmp_path), "WOODFROG_TOKEN": "env", "WOODFROG_UNKNOWN": "x", "PATH": "/bin"}
    got = load(env)
    assert (got.home, got.pool_size, got.token, got.keep_results_s) == (tmp_path, 7, "env", 5.0)
    assert load(env, pool_size=9, token=None).pool_size == 9
    assert load({"WOODFROG_HOME": "/nowhere/at/all"}) == Settings(home=Path("/nowhere/at/all"))
    assert got.socket == tmp_path / "woodfrogd.sock"
    assert got.tag != Settings().tag and len(got.tag) == 8


def test_every_setting_is_read_from_the_environment() -> None:
    for f in fields(Settings):
        value = {"int": "11", "float": "1.5", "bool": "False"}.get(str(f.type), "none" if f.name == "gpu" else "/x")
        got = load({"WOODFROG_HOME": "/nowhere", "WOODFROG_" + f.name.upper(): value})
        assert str(getattr(got, f.name)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pool_sise = 1", "unknown setting 'pool_sise'; known: .*pool_size"),
        ("pool_size = 'many'", "pool_size: 'many' is not of type int"),
        ("pool_size = [1]", "pool_size"),
        ("gpu_free_percent = 101", "setting gpu_free_percent: 101 is not between 0 and 100"),
        ("keep_snapshots = 0", "setting keep_snapshots: 0 is not 1 or more"),
        ("worker_uid = 0", "setting worker_uid: 0 is not between 1 and 2147483646"),
        ("worker_uid = 4294967295", "setting worker_uid: 4294967295 is not between 1 and 2147483646"),
        ("gpu = 'foo'", "setting gpu: 'foo' is neither empty nor none"),
        ("token = 'a b'", "setting token: a token is of printable ASCII, without spaces$"),
        ("pool_size = -1", "setting pool_size: -1 is not 0 or more"),
        ("keep_results_s = nan", "setting keep_results_s: nan is not 0 or more"),
        ("pool_size = ", "config.toml"),
        ("\x00", "config.toml"),
    ],
)
def test_bad_config_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(SpecError, match=message):
        load({"WOODFROG_HOME": str(tmp_path)})


def test_config_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match=r"config\.toml"):
        load({"WOODFROG_HOME": str(tmp_path)})


@pytest.mark.parametrize("value", ["", "x", "1.5", "nan"])
def test_bad_environment(value: str) -> None:
    with pytest.raises(SpecError, match=f"WOODFROG_POOL_SIZE: '{value}' is not of type int"):
        load({"WOODFROG_HOME": "/nowhere", "WOODFROG_POOL_SIZE": value})


@pytest.mark.parametrize("value", ["200", "-1"])
def test_a_share_is_between_0_and_100(value: str) -> None:
    with pytest.raises(SpecError, match=f"WOODFROG_GPU_FREE_PERCENT: {value} is not between 0 and 100"):
        load({"WOODFROG_HOME": "/nowhere", "WOODFROG_GPU_FREE_PERCENT": value})
    for fine in (0, 100):
        assert load({"WOODFROG_HOME": "/nowhere", "WOODFROG_GPU_FREE_PERCENT": str(fine)}).gpu_free_percent == fine


def test_code_is_in_one_place() -> None:
    """Three layers that know nothing of each other: the client's archive, the store's layer, the sandbox's root."""
    assert {
        f"/{spec.CODE}",
        f"/{content.CODE}",
        rootplan.APP,
        protocol.BootMessage.__dataclass_fields__["cwd"].default,
    } == {"/app"}
