"""Cases: the layouts of modules that people have run, and those that other systems get wrong; see `jobs`."""

from hypothesis import strategies as st


_VL = "vision vit {} > language; language gpt {}"
_VAL = "image vit {} > language; audio vit {} > language; language gpt {}"

CASES: dict[str, str] = {
    # one encoder and a language model on ranks of their own
    "1 1": _VL.format("@0", "@1"),
    "1 pp3": _VL.format("@0", "pp3 @1"),
    "1 pp7": _VL.format("@0", "pp7 @1"),
    "tp2 tp2": _VL.format("tp2 @0", "tp2 @2"),
    "tp2 tp2pp2": _VL.format("tp2 @0", "tp2 pp2 @2"),
    "tp2 tp2pp3": _VL.format("tp2 @0", "tp2 pp3 @2"),
    "tp2pp2 tp2pp2": _VL.format("tp2 pp2 @0", "tp2 pp2 @4"),
    "tp4 tp4": _VL.format("tp4 @0", "tp4 @4"),
    "dp4 tp2pp2": _VL.format("dp4 @0", "tp2 pp2 @4"),
    "tp2pp2 dp4": _VL.format("tp2 pp2 @0", "dp4 @4"),
    "dp2 tp2pp3": _VL.format("dp2 @0", "tp2 pp3 @2"),
    "tp2dp2 tp4": _VL.format("tp2 dp2 @0", "tp4 @4"),
    "tp4 tp2dp2": _VL.format("tp4 @0", "tp2 dp2 @4"),
    "tp2dp2 dp4": _VL.format("tp2 dp2 @0", "dp4 @4"),
    "tp2dp2 tp2dp2": _VL.format("tp2 dp2 @0", "tp2 dp2 @4"),
    "dp4 tp4": _VL.format("dp4 @0", "tp4 @4"),
    "tp4 dp4": _VL.format("tp4 @0", "dp4 @4"),
    "dp4 dp4": _VL.format("dp4 @0", "dp4 @4"),
    "dp2 1": _VL.format("dp2 @0", "@2"),
    "dp4 1": _VL.format("dp4 @0", "@4"),
    "1 dp2": _VL.format("@0", "dp2 @1"),
    "1 pp2": _VL.format("@0", "pp2 @1"),
    "dp4 dp2": _VL.format("dp4 @0", "dp2 @4"),
    "dp2 dp3": _VL.format("dp2 @0", "dp3 @2"),
    "dp3 dp2": _VL.format("dp3 @0", "dp2 @3"),
    "cp2 cp2dp2": _VL.format("cp2 @0", "cp2 dp2 tp2 @2"),
    "tp2dp2ep4": _VL.format("tp2 dp2 @0", "tp2 dp2 ep4 x4 @4"),
    # both orders of the axes
    "pp before dp": _VL.format("tp2 dp2 pp2 order=tp,cp,pp,dp @0", "tp2 dp2 pp2 order=tp,cp,pp,dp @8"),
    "pp last": _VL.format("tp2 dp2 pp2 @0", "tp2 dp2 pp2 @8"),
    # several encoders, and modules behind the language model
    "two encoders on a rank": _VAL.format("@0", "@0", "@1"),
    "two encoders on the same ranks": _VAL.format("tp2 pp2 @0", "tp2 pp2 @0", "tp2 pp2 @4"),
    "unequal encoders": _VAL.format("pp2 @0", "@2", "pp2 @3"),
    "pp2 tp2 pp4": _VAL.format("pp2 @0", "tp2 @2", "pp4 @4"),
    "generator tp2": _VAL.format("@0", "@1", "tp2 pp2 @2 > generator; generator regressor tp2 @6"),
    "generator dp2": _VAL.format("@0", "@1", "tp2 pp2 @2 > generator; generator regressor dp2 @6"),
    "generator": "vision vit > language; language gpt > generator; generator regressor",
    "skip edge": "vision vit > middle, language; middle block > language; language gpt",
    "one feeds two": "vision vit > a, language; a regressor; language gpt",
    "two language models": "vision vit dp2 > a, b; a gpt; b gpt pp2",
    # shared ranks
    "colocated tp2dp4 tp4dp2": _VL.format("tp2 dp4 @0", "tp4 dp2 @0"),
    "colocated tp4dp2 tp2dp4": _VL.format("tp4 dp2 @0", "tp2 dp4 @0"),
    "colocated tp4dp2 tp4dp2": _VL.format("tp4 dp2 @0", "tp4 dp2 @0"),
    "colocated tp2dp2 dp4 @4": _VL.format("tp2 dp2 @4", "dp4 @4"),
    "colocated pp2": _VL.format("tp2 dp2 @0", "pp2 dp2 @0"),
    "colocated dp3 dp2": _VL.format("dp3 tp2 @0", "dp2 tp3 @0"),
    "partial overlap": _VL.format("dp2 @0", "pp2 @1"),
    "overlap 0-3 2-5": _VL.format("dp4 @0", "tp2 pp2 @2"),
    "language pp2 alone": "language gpt pp2",
    "idle ranks": _VL.format("@1", "@4"),
    # microbatches of their own
    "encoder microbatches twice": _VL.format("dp2 m8", "pp2"),
    "encoder microbatches half": _VL.format("dp2 m2", "pp2"),
    "three counts": _VAL.format("m2 dp2", "m8", "pp2"),
    # nothing to train in front
    "frozen encoder": _VL.format("dp2 frozen", "pp2"),
    "frozen language": _VL.format("dp2", "pp2 frozen"),
    "tied": _VL.format("dp2", "pp2 tied"),
}


@st.composite
def worlds(draw: st.DrawFn) -> str:
    """Any graph of up to four modules on up to nine ranks each, on grids that may overlap."""
    graph = draw(
        st.sampled_from(
            [
                "a vit {} > c; c gpt {}",
                "a vit {} > c; b vit {} > c; c gpt {}",
                "a vit {} > b, c; b block {} > c; c gpt {}",
                "a vit {} > c; c gpt {} > d; d regressor {}",
                "a vit {} > c, d; b block {} > d; c gpt {}; d regressor {}",
            ]
        )
    )
    grids = [
        "tp{} dp{} pp{} @{} {} {}".format(
            draw(st.sampled_from((1, 1, 2, 3))),
            draw(st.sampled_from((1, 2, 3))),
            draw(st.sampled_from((1, 1, 2))),
            draw(st.integers(0, 6)),
            draw(st.sampled_from(("", "", "m2", "m8"))),
            draw(st.sampled_from(("", "", "frozen"))),
        )
        for _ in range(graph.count("{}"))
    ]
    return graph.format(*grids)
