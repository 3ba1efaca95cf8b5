# SPDX-License-Identifier: Apache-2.0
"""What a compiled setting takes, as one JSON object and as a page of text."""

from collections.abc import Mapping, Sequence
from typing import Any

from jft.plan import buffers, compiled, hlo_collectives, roofline

LARGEST = 10  # buffers that are told
MILLION = 1_000_000


def describe(
    result: compiled.Result, *, price: float | None = None, tokens: float | None = None
) -> dict[str, Any]:
    """Everything that is known of a compiled setting.

    Args:
      result: of `compiled.compile_setting`.
      price: dollars for a chip and hour.
      tokens: of the whole run; None = steps x batch_size x positions where the configuration has `steps`.
    """
    own, train = result.setting, result.train
    found: dict[str, Any] = {
        "topology": own.on.name,
        "devices": len(own.on.devices),
        "mesh": {axis: size for axis, size in _mesh(own).items() if size > 1},
        "model": {
            "family": own.model.family,
            "parameters_per_token": compiled.active_parameters(own.model),
        },
        "rows": {
            "length": own.length,
            "batch_size": own.config.batch_size,
            "micro_batch": own.program.micro_batch,
            "eval_batch_size": own.program.eval_batch,
        },
        "remat": own.config.remat,
        "fits": result.fits,
        "hbm_bytes_per_device": own.on.chip.hbm_bytes,
        **_step(train, own),
        "ideal_flops_per_device": result.ideal_flops,
        **_work(train, result.ideal_flops),
        **_speed(result, price, tokens),
        "evaluation": _step(result.evaluation, own) if result.evaluation else None,
        "compile_seconds": sum(step.seconds for step in result.steps),
        "overrides": own.overrides,
    }
    return found


def _mesh(own: compiled.Setting) -> Mapping[str, int]:
    return {} if own.program.layout is None else own.program.layout.mesh.shape


def _step(step: compiled.Step, own: compiled.Setting) -> dict[str, Any]:
    memory = step.memory
    found: dict[str, Any] = {
        "argument_bytes_per_device": memory.arguments if memory else None,
        "temp_bytes_per_device": memory.temporaries if memory else None,
        "peak_bytes_per_device": memory.peak if memory else None,
        "host_bytes_per_device": step.host_bytes,
        "step_fits": step.fits(),
        "seconds_to_compile": step.seconds,
    }
    if step.program.refusal:
        found["refused"] = step.program.refusal
    if step.analysis:
        peak = step.analysis.peak
        found["peak_by_use"] = buffers.by_use(peak)
        found["largest"] = [
            {"name": one.name, "shape": one.shape, "count": one.count, "bytes": one.bytes}
            for one in buffers.largest(peak, own.model, LARGEST)
        ]
    return found


def _work(step: compiled.Step, ideal: float) -> dict[str, Any]:
    if step.analysis is None:
        return dict.fromkeys(("flops_per_device", "flops_ratio", "collectives"))
    flops = step.analysis.flops
    sent = hlo_collectives.by_kind_and_axes(step.analysis.collectives)
    return {
        "flops_per_device": flops.total,
        "flops_by_part": flops.by_part(),
        "flops_ratio": flops.total / ideal,
        "collectives": [
            {"kind": kind, "axes": list(axes), "bytes_per_device": size}
            for (kind, axes), size in sorted(sent.items(), key=lambda item: -item[1])
        ],
        "collective_bytes_per_device": sum(sent.values()),
        "not_counted": list(flops.uncounted),
        "counted_at_most": list(flops.stated),
    }


def _speed(result: compiled.Result, price: float | None, tokens: float | None) -> dict[str, Any]:
    own, found = result.setting, result.estimate()
    if found is None:
        names = ("step_seconds", "tokens_per_second_per_device", "roofline", "cost")
        return dict.fromkeys(names)
    of_run = tokens if tokens is not None else (own.config.steps * own.tokens or None)
    cost = None
    if price is not None:
        paid = roofline.cost(found, own.on, price=price, tokens=of_run or MILLION)
        cost = {"dollars": paid, "tokens": of_run or MILLION, "price_per_chip_hour": price}
    rate = found.tokens_per_second_per_device * len(own.on.devices)
    return {
        "step_seconds": found.step_seconds,
        "tokens_per_second_per_device": found.tokens_per_second_per_device,
        "roofline": {
            "compute_seconds": found.compute_seconds,
            "memory_seconds": found.memory_seconds,
            "exchange_seconds": found.exchange_seconds,
            "waits_for": found.bound,
            "assumptions": list(found.assumptions),
        },
        "run_tokens": of_run,
        "run_seconds": of_run / rate if of_run and rate else None,
        "cost": cost,
    }


def render(found: Mapping[str, Any]) -> str:
    """The page, for a person."""
    rows = found["rows"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one device"
    lines = [
        f"{found['topology']}: {found['devices']} devices ({mesh}), {rows['batch_size']} rows of {rows['length']}"
        f" tokens a step, {rows['micro_batch']} at a time, remat={found['remat']}",
        "",
        f"{'HBM per device':<16}{'arguments':>12}{'temporaries':>14}{'peak':>12}{'of':>12}",
        _memory("training", found, found["hbm_bytes_per_device"]),
    ]
    if found["evaluation"]:
        lines.append(_memory("evaluation", found["evaluation"], found["hbm_bytes_per_device"]))
    lines += ["", "it fits" if found["fits"] else "IT DOES NOT FIT"]
    for name, step in (("training", found), ("evaluation", found["evaluation"])):
        if step and not step["step_fits"]:
            lines += _largest(name, step)
    if "cheapest_change" in found:
        lines += _change(found["cheapest_change"])
    lines += _flops(found) + _time(found)
    lines += _table(found.get("tried", ()))
    if found["overrides"]:
        lines += ["", "flags: " + " ".join(found["overrides"])]
    lines += ["", f"compiled in {found['compile_seconds']:.0f} s"]
    return "\n".join(lines)


def _memory(name: str, step: Mapping[str, Any], there: int) -> str:
    keys = ("argument_bytes_per_device", "temp_bytes_per_device", "peak_bytes_per_device")
    sizes = ["unknown" if step[key] is None else buffers.gigabytes(step[key]) for key in keys]
    line = f"{name:<16}{sizes[0]:>12}{sizes[1]:>14}{sizes[2]:>12}{buffers.gigabytes(there):>12}"
    if step["host_bytes_per_device"]:
        line += f", and {buffers.gigabytes(step['host_bytes_per_device'])} of the host's memory"
    if step.get("refused"):
        line += "  (would take, about)"
    return line


def _largest(name: str, step: Mapping[str, Any]) -> list[str]:
    lines = []
    if step.get("refused"):
        lines.append(f"{name}: the compiler says: {step['refused']}")
    if "largest" in step:
        lines.append(f"the largest in memory at the peak of {name}:")
        lines += [
            f"  {buffers.gigabytes(one['bytes']):>10}  {one['name']}, "
            + (f"{one['count']} of " if one["count"] > 1 else "")
            + one["shape"]
            for one in step["largest"]
        ]
    return lines


def _change(flags: list[str] | None) -> list[str]:
    if flags is None:
        return [
            "no remat policy, micro-batch or mesh of these devices makes it fit: take more or larger ones (--smallest)"
        ]
    return [f"it fits with {' '.join(flags)}"]


def _flops(found: Mapping[str, Any]) -> list[str]:
    if found["flops_per_device"] is None:
        return []
    parts = ", ".join(
        f"{part} {size / 1e12:.4g}" for part, size in found["flops_by_part"].items() if size
    )
    lines = [
        "",
        f"flops of a step per device: {found['flops_per_device'] / 1e12:.4g} T executed ({parts});"
        f" ideal {found['ideal_flops_per_device'] / 1e12:.4g} T; ratio {found['flops_ratio']:.3f}",
    ]
    lines += [f"  not counted: {line}" for line in found["not_counted"]]
    lines += [f"  {line}" for line in found["counted_at_most"]]
    if found["collectives"]:
        lines.append("sent by each device in a step:")
        lines += [
            f"  {buffers.gigabytes(one['bytes_per_device']):>10}  {one['kind']} over {'+'.join(one['axes']) or 'nothing'}"
            for one in found["collectives"]
        ]
    return lines


def _time(found: Mapping[str, Any]) -> list[str]:
    if found["step_seconds"] is None:
        return []
    roof = found["roofline"]
    exchange = sum(roof["exchange_seconds"].values())
    lines = [
        "",
        f"at best {found['step_seconds']:.3g} s a step, {found['tokens_per_second_per_device']:,.0f} tokens/s per device;"
        f" it waits for {roof['waits_for']} (compute {roof['compute_seconds']:.3g} s, memory {roof['memory_seconds']:.3g} s,"
        f" exchange {exchange:.3g} s)",
        *(f"  assumed: {line}" for line in roof["assumptions"]),
    ]
    if found["run_seconds"]:
        lines.append(f"{found['run_tokens']:,.0f} tokens: {_duration(found['run_seconds'])}")
    cost = found["cost"]
    if cost:
        lines.append(
            f"{cost['dollars']:,.2f} dollars for {cost['tokens']:,.0f} tokens at {cost['price_per_chip_hour']:g} for a chip and hour"
        )
    return lines


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:,.1f} hours" if minutes >= 90 else f"{minutes:,.1f} minutes"


def _table(tried: Sequence[Mapping[str, Any]]) -> list[str]:
    if not tried:
        return []
    lines = ["", f"{'peak':>10}{'flops ratio':>13}{'us/token':>10}  tried, the fastest first"]
    for one in tried:
        peak, ratio, time = (
            one["peak_bytes_per_device"],
            one["flops_ratio"],
            one["microseconds_per_token"],
        )
        lines.append(
            f"{buffers.gigabytes(peak) if peak else '-':>10}{f'{ratio:.3f}' if ratio else '-':>13}"
            f"{f'{time:.3f}' if time else '-':>10}  {' '.join(one['overrides'])} {one['why']}".rstrip()
        )
    return lines
