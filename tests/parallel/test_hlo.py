"""Reading compiled programs: trip counts, collectives, products, traffic; on hand-made texts with known numbers."""

import numpy as np
import pytest

from tracevision_jax.parallel.collectives import by_axes, collectives
from tracevision_jax.parallel.hlo import Shape, executed, hbm_bytes, parse, product_flops, read_shapes, trip_count

LOOP = """HloModule jit_step, is_scheduled=true

%condition (state: (s32[], f32[8,16])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%scatter.all-reduce-scatter.1 (given: f32[8,16]) -> f32[4,16] {
  %given = f32[8,16]{1,0:T(8,128)} parameter(0)
  %summed = f32[8,16]{1,0} all-reduce(%given), channel_id=2, replica_groups={{0,2},{1,3}}, to_apply=%add
  %start = s32[] constant(0)
  ROOT %part = f32[4,16]{1,0} dynamic-slice(%summed, %start, %start), dynamic_slice_sizes={4,16}
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[]{:T(128)}, /*index=1*/f32[8,16]{1,0:T(8,128)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  %rows = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %whole = f32[16,16]{1,0:T(8,128)} all-gather(%rows), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
  %product = f32[16,16]{1,0} dot(%whole, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %fusion.1 = f32[4,16]{1,0} fusion(%rows), kind=kCustom, calls=%scatter.all-reduce-scatter.1
  %one = s32[] constant(1)
  %after = s32[]{:T(128)} add(%turn, %one)
  ROOT %next = (s32[], f32[8,16]) tuple(%after, %rows)
}

ENTRY %main (given: f32[8,16]) -> f32[8,16] {
  %given = f32[8,16]{1,0:T(8,128)} parameter(0), metadata={op_name="rows (of a batch)"}
  %zero = s32[] constant(0)
  %state = (s32[], f32[8,16]) tuple(%zero, %given)
  %while.1 = (s32[], f32[8,16]) while(%state), condition=%condition, body=%body
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%while.1), index=1
}
"""
MESH = {"data": 2, "fsdp": 2}


def one(line: str, mesh: dict[str, int], dims: str = "f32[64]"):
    """The only collective of a program with one line."""
    text = f"HloModule m\n\nENTRY %main (x: {dims}) -> {dims} {{\n  %x = {dims} parameter(0)\n  ROOT %y = {line}\n}}\n"
    (use,) = collectives(parse(text), mesh)
    return use


def test_shapes_are_read_with_their_memory_space():
    assert read_shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[], s4[8])") == (
        Shape("bf16", (2, 3), 1),
        Shape("pred", ()),
        Shape("s4", (8,)),
    )
    assert [shape.bytes for shape in read_shapes("bf16[2,3], pred[], s4[8], f8e4m3fn[10]")] == [12, 1, 4, 10]


def test_a_trip_count_is_read_from_the_condition_or_from_the_note():
    module = parse(LOOP)
    loop = module.computations["main"].instructions["while.1"]
    assert trip_count(module, loop) == 5
    noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    module = parse(noted)
    assert trip_count(module, module.computations["main"].instructions["while.1"]) == 7


@pytest.mark.parametrize(
    ("was", "is_now", "trips"),
    [
        ("%one = s32[] constant(1)", "%one = s32[] constant(2)", 3),  # unrolled twice, as XLA's loops of products
        ("%one = s32[] constant(1)", "%one = s32[] constant(5)", 1),
        ("tuple(%after, %rows)", "tuple(%copied, %rows)", 5),
        ("direction=LT", "direction=NE", None),
        ("add(%turn, %one)", "multiply(%turn, %one)", None),
        ("add(%turn, %one)", "add(%turn, %turn)", None),
        ("tuple(%after, %rows)", "tuple(%turn, %rows)", None),
    ],
)
def test_a_trip_count_follows_the_steps_of_the_counter(was, is_now, trips):
    text = LOOP.replace("  ROOT %next", "  %copied = s32[] copy(%after)\n  ROOT %next")
    assert was in text
    module = parse(text.replace(was, is_now))
    assert trip_count(module, module.computations["main"].instructions["while.1"]) == trips


def test_collectives_of_a_loop_are_multiplied_by_its_trips():
    uses = {use.kind: use for use in collectives(parse(LOOP), MESH)}
    assert set(uses) == {"all-gather", "reduce-scatter"}
    gather, scatter = uses["all-gather"], uses["reduce-scatter"]
    assert (gather.axes, gather.times, gather.whole_bytes) == (("fsdp",), 5, 16 * 16 * 4)
    assert gather.sent_bytes == 5 * 16 * 16 * 4 / 2
    # A sum inside a fusion that keeps a slice: half of a sum's bytes.
    assert (scatter.axes, scatter.times, scatter.sent_bytes) == (("data",), 5, 5 * 8 * 16 * 4 / 2)
    assert set(by_axes(uses.values())) == {("fsdp",), ("data",)}


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    uses = collectives(parse(LOOP.replace("direction=LT", "direction=NE")), MESH)
    assert [(use.times, use.known) for use in uses] == [(1, False), (1, False)]


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("b", "c"), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("a",), 2),
        ("[4,2]<=[8]", ("c",), 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("b",), 2),
        ("[1,8]<=[8]", ("a", "b", "c"), 8),
        ("mesh['x'=2,'y'=4] {'x'}", ("a",), 2),
        ("mesh['x'=2,'y'=4] {'y'}", ("b", "c"), 4),
        ("mesh['x'=2,'y'=4] {'y':(2)2}", ("c",), 2),
        ("mesh['x'=8] {'x':(1)2}", ("a",), 2),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", ("a", "c"), 4),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", ("a",), 2),
    ],
)
def test_groups_are_told_by_mesh_axes_in_every_notation(groups, axes, size):
    line = f"f32[64] all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    use = one(line, {"a": 2, "b": 2, "c": 2})
    assert (use.axes, use.group) == (axes, size)
    assert use.sent_bytes == pytest.approx(2 * 256 * (size - 1) / size)


def test_a_permutation_sends_its_array_once_along_the_axes_it_moves_along():
    line = "f32[64] collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"
    use = one(line, MESH)
    assert (use.axes, use.sent_bytes) == (("fsdp",), 256)


@pytest.mark.parametrize(
    ("transfer", "target", "kind", "group", "sent"),
    [
        ("ALL_REDUCE", "{1,2}x{0:3}", "all-reduce", 2, 256),
        ("ALL_REDUCE", "{1:4}x{0:3}", "all-reduce", 4, 384),
        ("ALL_GATHER", "{1,2,3,4}x{0:3}", "all-gather", 4, 768),
        ("REDUCE_SCATTER", "{1,2}x{0:3}", "reduce-scatter", 2, 128),
        ("ONE_TO_ONE", "{1,2}x{0:3}", "collective-permute", 2, 256),
    ],
)
def test_what_a_slice_hands_to_its_hosts_goes_to_the_other_slices(transfer, target, kind, group, sent):
    attributes = f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="{transfer}"'
    text = (
        "HloModule m\n\nENTRY %main (x: f32[64]) -> f32[64] {\n  %x = f32[64] parameter(0)\n"
        "  %t = token[] after-all()\n"
        "  ROOT %y = (f32[64], u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true, "
        f"frontend_attributes={{{attributes}}}\n}}\n"
    )
    (use,) = collectives(parse(text), MESH)
    assert (use.kind, use.axes, use.group, use.sent_bytes) == (kind, ("slices",), group, sent)


def test_a_collective_that_is_spread_over_fusions_counts_once():
    line = (
        "f32[128] all-gather(%x), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}, "
        'backend_config={"async_collective_fusion_config":{"flag_start":"START","flag_end":"8"}}'
    )
    text = f"HloModule m\n\nENTRY %main (x: f32[64]) -> f32[128] {{\n  %x = f32[64] parameter(0)\n  %a = {line}\n"
    text += f"  ROOT %b = {line.replace('START', '2')}\n}}\n"
    assert len(collectives(parse(text.replace("START", "-1")), MESH)) == 1


def test_groups_of_one_chip_move_nothing():
    line = "f32[64] all-reduce(%x), channel_id=1, replica_groups={{0},{1},{2},{3}}, to_apply=%add"
    text = (
        f"HloModule m\n\nENTRY %main (x: f32[64]) -> f32[64] {{\n  %x = f32[64] parameter(0)\n  ROOT %y = {line}\n}}\n"
    )
    assert collectives(parse(text), MESH) == []


def test_products_in_a_loop_are_multiplied_by_its_trips():
    module = parse(LOOP)
    flops = sum(step.times * product_flops(step.instruction, step.computation) for step in executed(module))
    assert flops == 5 * 2 * 16 * 16 * 16


def called(target: str, attributes: str, left: str, right: str, result: str) -> tuple[int, int]:
    """FLOPs and bytes through HBM of a call of a GPU's library."""
    text = (
        f"HloModule m\n\nENTRY %main (x: {left}, k: {right}) -> {result} {{\n  %x = {left} parameter(0)\n"
        f"  %k = {right} parameter(1)\n  ROOT %y = ({result}, s8[4194304]) custom-call(%x, %k), "
        f'{attributes}, custom_call_target="{target}"\n}}\n'
    )
    module = parse(text)
    step = next(step for step in executed(module) if step.instruction.opcode == "custom-call")
    return product_flops(step.instruction, step.computation), hbm_bytes(step, module)


def test_products_by_cublas_count_as_products_and_its_scratch_memory_as_no_traffic():
    numbers = '"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]'
    config = f'backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{{numbers}}}}}}}'
    flops, traffic = called("__cublas$lt$matmul", config, "bf16[4,6,8]", "bf16[4,8,10]", "bf16[4,6,10]")
    assert flops == 2 * 4 * 6 * 8 * 10
    assert traffic == 2 * 4 * (6 * 8 + 8 * 10 + 6 * 10)


def test_gradients_of_a_convolution_by_cudnn_cost_what_the_convolution_costs():
    window = "window={size=3 pad=1_1}, dim_labels=b0f_o0i->b0f"
    image, filters, result = "bf16[1,5,2]", "bf16[7,3,2]", "bf16[1,5,7]"
    forward, _ = called("__cudnn$convForward", window, image, filters, result)
    assert forward == 2 * (3 * 5 - 2) * 2 * 7
    assert called("__cudnn$convBackwardInput", window, result, filters, image)[0] == forward
    assert called("__cudnn$convBackwardFilter", window, image, result, filters)[0] == forward
    assert called("SomethingElse", window, image, filters, result)[0] == 0


def convolved(attributes: str, left: str, right: str, result: str) -> int:
    text = (
        f"HloModule m\n\nENTRY %main (x: {left}, k: {right}) -> {result} {{\n  %x = {left} parameter(0)\n"
        f"  %k = {right} parameter(1)\n  ROOT %y = {result} convolution(%x, %k), {attributes}\n}}\n"
    )
    computation = parse(text).computations["main"]
    return product_flops(computation.root, computation)


def test_a_product_written_as_a_convolution_counts_as_a_product():
    assert convolved("dim_labels=bf_io->bf", "f32[6,8]", "f32[8,10]", "f32[6,10]") == 2 * 6 * 8 * 10
    # A batch of 4 products as the TPU compiler writes it: the batch is a window of which one tap meets an input.
    batched = "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    assert convolved(batched, "f32[4,6,8]", "f32[4,8,10]", "f32[4,6,10]") == 2 * 4 * 6 * 8 * 10


def test_taps_on_padding_cost_nothing():
    same = "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"
    assert convolved(same, "f32[1,5,2]", "f32[3,2,7]", "f32[1,5,7]") == 2 * (3 * 5 - 2) * 2 * 7


SLICED = """%sliced (stack: f32[10,8], at: s32[]) -> f32[8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%row)
}
"""
"""A computation that takes one row of ten."""


def test_traffic_leaves_out_what_stays_on_the_chip_and_counts_slices_as_slices():
    text = (
        f"HloModule m\n\n{SLICED}"
        + """
%updated (stack: f32[10,8], row: f32[1,8], at: s32[]) -> f32[10,8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[10,8]{1,0} dynamic-update-slice(%stack, %row, %at, %zero)
}

ENTRY %main (stack: f32[10,8], at: s32[]) -> f32[10,8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %one = f32[8]{0} fusion(%stack, %at), kind=kLoop, calls=%sliced
  %near = f32[8]{0:S(1)} negate(%one)
  %row = f32[1,8]{1,0:S(1)} bitcast(%near)
  ROOT %out = f32[10,8]{1,0} fusion(%stack, %row, %at), kind=kLoop, calls=%updated
}
"""
    )
    module = parse(text)
    moved = {step.instruction.name: hbm_bytes(step, module) for step in executed(module) if not step.fused}
    assert moved["one"] == 32 + 4 + 32  # a row of the stack, the place, the result
    assert moved["near"] == 32  # its result lies in on-chip memory
    assert moved["out"] == 4 + 32  # the place; the row comes from on-chip memory, one row of the stack is written
    assert moved["stack"] == moved["row"] == 0


def test_a_slice_in_a_fusion_inside_a_fusion_counts_as_the_slice():
    text = (
        f"HloModule m\n\n{SLICED}"
        + """
%updated (stack: f32[10,8], row: f32[8], at: s32[]) -> f32[10,8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %row = f32[8]{0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %flat = f32[1,8]{1,0} bitcast(%row)
  ROOT %new = f32[10,8]{1,0} dynamic-update-slice(%stack, %flat, %at, %zero)
}

%outer (stack: f32[10,8], at: s32[]) -> f32[10,8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %one = f32[8]{0} fusion(%stack, %at), kind=kLoop, calls=%sliced
  %double = f32[8]{0} add(%one, %one)
  ROOT %out = f32[10,8]{1,0} fusion(%stack, %double, %at), kind=kLoop, calls=%updated
}

ENTRY %main (stack: f32[10,8], at: s32[]) -> f32[10,8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %out = f32[10,8]{1,0} fusion(%stack, %at), kind=kLoop, calls=%outer
}
"""
    )
    module = parse(text)
    (whole,) = (step for step in executed(module) if step.instruction.name == "out" and not step.fused)
    assert hbm_bytes(whole, module) == 32 + 4 + 32  # a row of the stack, the place, the row that is written


def test_a_prefetch_into_on_chip_memory_reads_once():
    text = """HloModule m

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %start = (f32[64]{0}, f32[64]{0:S(1)}, u32[]) copy-start(%x), frontend_attributes={kernel_metadata={
"note":"{ over lines }"
}}, metadata={op_name="prefetch"}
  ROOT %y = f32[64]{0:S(1)} copy-done(%start)
}
"""
    module = parse(text)
    (start,) = (step for step in executed(module) if step.instruction.name == "start")
    assert hbm_bytes(start, module) == 256
    assert start.instruction.origin == "prefetch"  # behind metadata that spans lines


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule m\n")


def test_the_order_of_mesh_axes_is_that_of_the_devices():
    members = np.arange(8).reshape(2, 2, 2)[:, 0, :].ravel()
    line = "f32[64] all-reduce(%x), replica_groups={{" + ",".join(map(str, members)) + "}}, to_apply=%add"
    assert one(line, {"a": 2, "b": 2, "c": 2}).axes == ("a", "c")
