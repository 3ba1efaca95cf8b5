# SPDX-License-Identifier: Apache-2.0
"""Collectives: groups in all their spellings, asynchronous ones, and programs over eight devices by hand."""

import pathlib
from collections.abc import Callable

import pytest

from jft.plan import hlo_collectives, hlo_flops, hlo_text

MESH = {"data": 2, "fsdp": 4, "tensor": 2}


def test_on_eight_devices(eight_devices: Callable[[pathlib.Path], None]) -> None:
    eight_devices(pathlib.Path(__file__).with_name("eight_devices.py"))


def collected(
    body: str, mesh: dict[str, int], before: str = ""
) -> list[hlo_collectives.Collective]:
    text = f"""\
HloModule groups, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}
{before}
ENTRY %main (x: f32[8,4]) -> f32[8,4] {{
  %x = f32[8,4]{{1,0}} parameter(0)
{body}
}}
"""
    walk = hlo_flops.Walk(hlo_text.parse(text))
    return list(hlo_collectives.collect(walk, mesh))


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", ("fsdp",)),
        ("[8,2]<=[16]", ("tensor",)),
        ("[8,2]<=[2,8]T(1,0)", ("data",)),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("[1,16]<=[16]", ("data", "fsdp", "tensor")),
        ("{}", ("data", "fsdp", "tensor")),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", ("fsdp", "tensor")),
        ("mesh['axis_0'=16,'axis_1'=1] {'axis_0':(2)4}", ("fsdp",)),
        ("mesh['a'=4,'b'=4], device_ids=([2,4,2]T(0,2,1)) {'b'}", ("fsdp",)),
        (
            "mesh['a'=2,'b'=8], device_ids=(0,2,4,6,8,10,12,14,1,3,5,7,9,11,13,15) {'a'}",
            ("tensor",),
        ),
    ],
)
def test_groups_in_every_spelling(groups: str, axes: tuple[str, ...]) -> None:
    body = f"  ROOT %r = f32[8,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    (found,) = collected(body, MESH)
    size = 1
    for axis in axes:
        size *= MESH[axis]
    assert (found.axes, found.group) == (axes, size)
    assert found.wire == pytest.approx(2 * 128 * (size - 1) / size)


def test_a_ring_of_permutations_goes_over_its_axis() -> None:
    pairs = ",".join(
        f"{{{d * 8 + f * 2 + t},{d * 8 + (f + 1) % 4 * 2 + t}}}"
        for d in range(2)
        for f in range(4)
        for t in range(2)
    )
    (found,) = collected(
        "  %s = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={"
        + pairs
        + "}\n  ROOT %r = f32[8,4]{1,0} collective-permute-done(%s)",
        MESH,
    )
    assert (found.axes, found.wire, [str(one) for one in found.shapes]) == (
        ("fsdp",),
        128,
        ["f32[8,4]"],
    )


def test_a_gather_spread_over_fusions_counts_once() -> None:
    """As TPU hides it behind products: its start, a fusion that goes on with it, its end, all hold the gather."""
    gather = "all-gather(%p), channel_id=7, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}"
    before = f"""
%start (p: f32[8,4]) -> (f32[8,4], f32[32,4]) {{
  %p = f32[8,4]{{1,0}} parameter(0)
  %g = f32[32,4]{{1,0}} {gather}
  ROOT %c = (f32[8,4]{{1,0}}, f32[32,4]{{1,0}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%end (p.1: f32[8,4], q: f32[32,4]) -> f32[32,4] {{
  %p.1 = f32[8,4]{{1,0}} parameter(0)
  %q = f32[32,4]{{1,0}} parameter(1)
  %g.1 = f32[32,4]{{1,0}} {gather.replace("%p", "%p.1")}
  ROOT %c.1 = f32[32,4]{{1,0}} custom-call(%p.1, %q, %g.1), custom_call_target="AsyncCollectiveDone"
}}
"""
    body = """\
  %s = (f32[8,4]{1,0}, f32[32,4]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %a = f32[8,4]{1,0} get-tuple-element(%s), index=0
  %b = f32[32,4]{1,0} get-tuple-element(%s), index=1
  ROOT %d = f32[32,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%end"""
    (found,) = collected(body, MESH, before)
    assert (found.kind, found.axes, found.wire, found.times) == (
        "all-gather",
        ("fsdp",),
        3 * 128,
        1,
    )
    assert hlo_collectives.gathered([found]) == {("f32", (32, 4)): 1}


def test_what_goes_to_other_slices() -> None:
    attributes = 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    body = f"""\
  %token = token[] after-all()
  %send = (f32[8,4]{{1,0}}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, {attributes}
  ROOT %done = token[] send-done(%send), channel_id=2"""
    (found,) = collected(body, {"slice": 2, "fsdp": 16})
    assert (found.kind, found.axes, found.group, found.wire) == ("all-reduce", ("slice",), 2, 128)
