"""The page of gpu.py's record: ceilings, a table per section, what was broken and which targets were missed."""

from collections.abc import Iterator
from typing import Any

from report import gigabytes, markdown_table, origin_lines, seconds

Row = dict[str, Any]
# Of the issue: share of the pinned copy rate while streaming, and of the memory's bandwidth in a captured step.
TARGETS = {"streamed_share_of_pinned": 0.9, "replay_share_of_memory": 0.8}
_TARGET_NAMES = {"streamed_share_of_pinned": "of the pinned copy rate", "replay_share_of_memory": "of memory bandwidth"}


def page(record: Row) -> str:
    parts = [f"# GPU: {record['device']}", origin_lines(record)]
    sections = record["sections"]
    if "tests" in sections:
        parts.append(f"Tests on the device: {sections['tests'].get('counts') or 'none ran'}.")
    if sections.get("ceilings", {}).get("rows"):
        parts.append(_ceilings(sections["ceilings"]["rows"][0]))
    for name, section in sections.items():
        rows = [row for row in section["rows"] if "asked_density" in row]
        if rows:
            parts += [f"## {name.upper()}{_layers(rows[0])}", markdown_table([_HEADS, *map(_cells, rows)])]
    if sections.get("exact", {}).get("rows"):
        parts += ["## Exact mode, acceptance simulated", _exact(sections["exact"]["rows"])]
    found, missed = broken(record), list(_missed(record))
    parts.append("## Broken\n\n" + ("\n".join(f"- {line}" for line in found) if found else "Nothing."))
    parts.append("## Targets missed\n\n" + ("\n".join(f"- {line}" for line in missed) if missed else "None measured."))
    return "\n\n".join(parts)


def _layers(row: Row) -> str:
    if not row["repeated"]:
        return ""
    few, many = row["repeated"]
    return f"-shaped: {many} layers that share {few} distinct ones on the host"


_HEADS = (
    "budget",
    "density",
    "tokens",
    "prompt",
    "streamed (of pinned)",
    "per token",
    "graph alone (of memory)",
    "peak (planned)",
    "graphs",
)


def _cells(row: Row) -> tuple[str, ...]:
    asked = (str(row["budget"]), str(row["asked_density"]))
    for key in ("failure", "does_not_fit", "left_out"):
        if key in row:
            return (*asked, f"{key.replace('_', ' ')}: {row[key]}", *[""] * 6)
    return (
        asked[0],
        f"{row['density']:.2f} {row['precision']}",
        f"{row['prompt_tokens']}+{row['new_tokens']}",
        seconds(row["prefill_s"]),
        f"{gigabytes(row['streamed_bytes_per_s'])}/s{_percent(row['streamed_share_of_pinned'])}",
        f"{row['token_s'] * 1e3:.2f} ms",
        "-" if row["replay_s"] is None else f"{row['replay_s'] * 1e3:.2f} ms{_percent(row['replay_share_of_memory'])}",
        f"{gigabytes(row['peak_device_bytes'])} ({gigabytes(row['planned_peak_bytes'])})",
        _graphs(row["graphs"]),
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f" ({value:.0%})"


def _graphs(graphs: Row | None) -> str:
    if graphs is None:
        return "none"
    reasons = "; ".join(f"{count} {reason}" for reason, count in graphs["eager"].items())
    return f"{graphs['replayed']} replayed" + (f"; {reasons}" if reasons else "")


def _ceilings(row: Row) -> str:
    def rate(value: float | None) -> str:
        return "not measured" if value is None else f"{value / 1e9:.1f} GB/s"

    gate_up, gemv = row["gate_up"], row["gemv_bytes_per_s"]
    rows = [
        ("ceiling", "measured"),
        ("host to device, pinned", rate(row["copy_pinned_bytes_per_s"])),
        ("host to device, pageable", rate(row["copy_pageable_bytes_per_s"])),
        ("memory (copy on the device, or bf16 GEMV if that is faster)", rate(row["memory_bytes_per_s"])),
        *((f"one row times matrices, {'bf16' if name == 'none' else name}", rate(gemv[name])) for name in gemv),
        ("gate and up of half the neurons: apart", f"{gate_up['apart_s'] * 1e6:.1f} us"),
        ("the same, stacked in one", f"{gate_up['fused_s'] * 1e6:.1f} us"),
    ]
    return markdown_table(rows)


def _exact(rows: list[Row]) -> str:
    heads = ("acceptance (drawn)", "drafts", "tokens a pass", "streamed per token", "per token", "forecast")
    cells = [
        (
            f"{row['acceptance']:.0%} ({row['drawn']:.0%})",
            str(row["drafts"]),
            f"{row['tokens_per_pass']:.2f}",
            gigabytes(row["streamed_bytes_per_token"]),
            seconds(row["token_s"]),
            seconds(row["forecast_s"]),
        )
        for row in rows
        if "drafts" in row
    ]
    return markdown_table([heads, *cells])


def _rows(record: Row) -> Iterator[tuple[str, Row]]:
    for name, section in record["sections"].items():
        for row in section["rows"]:
            what = f"{row.get('budget')}, density {row.get('asked_density', row.get('acceptance'))}"
            yield f"{name}, {what}", row


def broken(record: Row) -> list[str]:
    """What failed, what is missing, and promises that were not kept."""
    found = [f"{name}: {section['failure']}" for name, section in record["sections"].items() if "failure" in section]
    tests = record["sections"].get("tests")
    if tests is not None and "cuda" in record and not tests["counts"].get("passed"):
        found.append("tests: none passed on the device")
    for what, row in _rows(record):
        found += [f"{what}: {row[key]}" for key in ("failure", "left_out") if key in row]
        if "peak_device_bytes" in row and row["peak_device_bytes"] > row["budget_bytes"]:
            found.append(f"{what}: the peak is {row['peak_device_bytes']} bytes, the budget {row['budget_bytes']}")
        if row.get("decode_streamed_bytes"):
            found.append(f"{what}: {row['decode_streamed_bytes']} bytes of weights were fetched while decoding")
        found += [f"{what}: {line}" for line in _broken_traffic(row.get("traffic"), "cuda" in record)]
    return found


def _broken_traffic(traffic: Row | None, traced: bool) -> Iterator[str]:
    if traffic is None:
        return
    if traffic["host_to_device_bytes"] > traffic["allowed_bytes"]:
        yield f"{traffic['host_to_device_bytes']} bytes went to the device, {traffic['allowed_bytes']} may"
    if traced and not traffic["kernels_seen"]:
        yield "the profiler saw no kernel, so its count of copies says nothing"


def _missed(record: Row) -> Iterator[str]:
    for what, row in _rows(record):
        for key, target in TARGETS.items():
            value = row.get(key)
            # A model that is resident as a whole streams nothing.
            if value is not None and value < target and not (key.startswith("streamed") and not row["streamed_bytes"]):
                yield f"{what}: {value:.0%} {_TARGET_NAMES[key]}, {target:.0%} are the target"
