"""What a compiled program sends over the wires, read from its text."""

import math
import re
from typing import NamedTuple


class Traffic(NamedTuple):
    """How often collectives of one kind run in one execution, and the bytes that each device sends for them.

    Bytes are those of a ring of n devices: of an array of s bytes in all, all-gather, reduce-scatter and all-to-all
    send s (n-1)/n, all-reduce twice that, collective-permute s. `between slices` is what a device hands to its host for
    the data centre's network.
    """

    times: int
    bytes: int


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
# Parts of one collective that overlaps with other work: its start, its steps and its end each name it.
_CHAIN = re.compile(r'chain_id="(\d+)"')
# What leaves a TPU slice for another goes through its host.
_SENT_TO_SLICES = re.compile(r"= (.*?) send\(.*_xla_megascale")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|body|to_apply|branch_computations|called_computations)=\{?(%[\w.\-, %]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=(%[\w.\-]+)")
_BODY = re.compile(r"body=(%[\w.\-]+)")
_CONSTANT = re.compile(r"(%[\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_COMPARED = re.compile(r"(%[\w.\-]+) = [su]32\[\]\S* get-tuple-element\(.*\), index=(\d+)")
_NAMES = re.compile(r"%[\w.\-]+")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")


def collectives(text: str) -> dict[str, Traffic]:
    """The collectives of a compiled module's text by kind, those of a loop's body as often as it runs."""
    computations, entry = _computations(text)
    partitions = _PARTITIONS.search(text[: text.find("\n")])
    devices = int(partitions.group(1)) if partitions else 1
    totals: dict[str, Traffic] = {}
    chains: set[str] = set()

    def add(kind: str, size: int, times: int) -> None:
        before = totals.get(kind, Traffic(0, 0))
        totals[kind] = Traffic(before.times + times, before.bytes + times * size)

    def visit(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            found, between = _COLLECTIVE.search(line), _SENT_TO_SLICES.search(line)
            if between:
                add("between slices", _bytes(between.group(1), started=True), times)
            if found:
                chain = _CHAIN.search(line)
                if chain is None or chain.group(1) not in chains:
                    add(*_sent(found, line, devices, scattered="all-reduce-scatter" in name), times)
                chains.update(chain.groups() if chain else ())
                continue
            trips = _trips(line, computations) if "body=" in line else 1
            for called in _CALLS.findall(line):
                for inner in re.findall(r"%[\w.\-]+", called):
                    visit(inner, times * trips)

    visit(entry, 1)
    return totals


def _sent(found: re.Match[str], line: str, devices: int, scattered: bool) -> tuple[str, int]:
    """(kind, bytes that each device sends) of a collective. scattered: an all-reduce of which each keeps its part."""
    shapes, kind, started = found.groups()
    result, n = _bytes(shapes, bool(started) and kind != "all-reduce"), _group(line, devices)
    if kind == "all-reduce" and scattered:
        return "reduce-scatter", result * (n - 1) // n
    if kind == "collective-permute":
        return kind, result
    whole = result * n if kind == "reduce-scatter" else result
    return kind, whole * (n - 1) // n * (2 if kind == "all-reduce" else 1)


def _group(line: str, devices: int) -> int:
    """How many devices a collective is over."""
    mesh = _MESH_GROUPS.search(line)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        over = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in over)
    listed = _LISTED_GROUPS.search(line)
    if listed:
        return listed.group(1).count(",") + 1
    iota = _IOTA_GROUPS.search(line)
    return int(iota.group(1).split(",")[-1]) if iota else devices


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs; where the compiler does not say, from 0 to what its counter is compared with."""
    known = _TRIPS.search(line)
    if known:
        return int(known.group(1))
    condition, body = _CONDITION.search(line), _BODY.search(line)
    if not condition or not body:
        return 1
    lines = computations.get(condition.group(1), [])
    limits = [int(found.group(2)) for found in map(_CONSTANT.search, lines) if found]
    counters = [int(found.group(2)) for found in map(_COMPARED.search, lines) if found]
    step = _step(counters[0], computations.get(body.group(1), [])) if len(counters) == 1 else 1
    return -(-max(limits, default=1) // step)


def _step(place: int, body: list[str]) -> int:
    """What a loop's body adds to an element of its state, 1 where that cannot be read."""
    root = next((line for line in body if line.lstrip().startswith("ROOT ")), "")
    results = _NAMES.findall(root.partition(" tuple(")[2].partition(")")[0])
    if place >= len(results):
        return 1
    added = next((line for line in body if line.lstrip().startswith(f"{results[place]} = ")), "").partition(" add(")[2]
    operands = _NAMES.findall(added.partition(")")[0])
    constants = {found.group(1): found.group(2) for found in map(_CONSTANT.search, body) if found}
    return max((int(constants[name]) for name in operands if name in constants), default=1)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines of each computation of a module, the entry's name)."""
    computations: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?(%[\w.\-]+) \(.*\{$", line)
        if head:
            name = head.group(2)
            computations[name] = []
            entry = name if head.group(1) else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _bytes(shapes: str, started: bool) -> int:
    """Of a result's arrays; an asynchronous start lists its operands before, and a permutation its contexts after."""
    sizes = []
    for dtype, dimensions in _ARRAY.findall(shapes):
        if started and dtype == "u32" and not dimensions:
            continue  # a context
        bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(re.sub(r"\D", "", dtype))
        sizes.append(math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8)
    return sum(sizes[len(sizes) // 2 :]) if started else sum(sizes)
