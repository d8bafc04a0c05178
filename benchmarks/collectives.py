"""What a compiled program sends between devices, read from its HLO text."""

import collections
import math
import re

KINDS = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|send'  # send: to another slice
BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, token=0)


def computations(text):
    """{name: lines} of a compiled program, and the name of its entry."""
    lines, name, entry = collections.defaultdict(list), None, None
    for line in text.splitlines():
        if header := re.match(r'(ENTRY )?%?([\w.-]+) .*\{$', line):
            name = header[2]
            entry = name if header[1] else entry
        elif name:
            lines[name].append(line)
    return lines, entry


def collectives(text):
    """{kind: (how many in a run of the program, bytes of their results)}, loops counted by their trips."""
    programs, entry = computations(text)
    totals = collections.defaultdict(lambda: [0, 0])
    _add(programs, entry, 1, totals)
    return {kind: tuple(sums) for kind, sums in totals.items()}


def _add(programs, name, times, totals):
    for line in programs[name]:
        call = re.search(rf'= (.*?) ({KINDS})(-start)?\(', line)
        if call:
            arrays = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', call[1])
            if call[3] and call[2] != 'all-reduce':  # -start gives its operands too, a permute two counters
                arrays = [array for array in arrays if array != ('u32', '')]
                arrays = arrays[len(arrays) // 2 :]
            size = sum(
                BYTES[kind] * math.prod(int(n) for n in shape.split(',') if n) for kind, shape in arrays
            )
            totals[call[2]][0] += times
            totals[call[2]][1] += times * size
        if loop := re.search(r'condition=%?([\w.-]+), body=%?([\w.-]+)', line):
            _add(programs, loop[2], times * _trips(programs, line, loop[1]), totals)
        inner = re.search(r'(?:calls|to_apply|branch_computations)=\{?%?([\w.-]+)', line)
        if inner and not loop and not call and inner[1] in programs:
            _add(programs, inner[1], times, totals)


def _trips(programs, line, condition):
    """How often a loop runs: as it says, else the one number its condition compares with, else 1."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known[1])
    limits = [re.search(r's32\[\]\S* constant\((\d+)\)', line) for line in programs[condition]]
    limits = [int(limit[1]) for limit in limits if limit]
    return limits[0] if len(limits) == 1 else 1
