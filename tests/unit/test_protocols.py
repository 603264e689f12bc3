"""Protocol ids: what a number may be called, and what it may not."""

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluate.protocols import PROTOCOLS, VALIDATION, get_protocol
from pipeline.evaluate.texts import TEXTS


def test_every_protocol_reads_a_text_that_exists():
    for protocol in PROTOCOLS.values():
        assert protocol.text in {*TEXTS, VALIDATION}
        assert protocol.id in PROTOCOLS
        assert protocol.description.endswith((".", ")."))


def test_krony_protocols_are_what_krony_pt_evaluates():
    expected = {
        "krony/wt103": (286_657, 29.16),
        "krony/wt2": (297_300, 24.67),
        "krony/lambada_text": (429_710, 45.28),
    }
    for name, (tokens, gate) in expected.items():
        protocol = get_protocol(name)
        assert (protocol.window, protocol.stride, protocol.targets) == (1024, 1024, "inside")
        assert protocol.weighting == "windows"
        assert protocol.gpt2_tokens == tokens
        assert protocol.gate is not None
        assert protocol.gate.holds(gate + 0.04)
        assert not protocol.gate.holds(gate + 0.06)


def test_a_shorter_context_is_another_protocol():
    plain = get_protocol("krony/wt103")
    assert plain.at_context(1024) is plain
    assert plain.at_context(4096) is plain
    short = plain.at_context(256)
    assert short.id == "krony/wt103@ctx256"
    assert (short.window, short.stride, short.gate) == (256, 256, None)
    assert "windows of 256 tokens" in short.description
    assert "1,024" not in short.description
    assert get_protocol("krony/wt103@ctx256") == short
    assert get_protocol("raw/wt2@512").at_context(256).stride == 128
    assert short.at_context(64).id == "krony/wt103@ctx64"


def test_a_part_of_a_text_is_another_protocol():
    whole = get_protocol("corpus/val")
    assert whole.at_tokens(0) is whole
    part = whole.at_context(256).at_tokens(131_072)
    assert (part.id, part.limit, part.gate) == ("corpus/val@ctx256@first131072", 131_072, None)
    assert part == whole.at_tokens(131_072).at_context(256) == get_protocol(part.id)
    assert part.description.endswith("Only the first 131,072 tokens.")
    assert part.at_tokens(64).id == "corpus/val@ctx256@first64"
    half = part.at_precision("bf16")
    assert half.id == "corpus/val@ctx256@first131072@bf16"
    assert half == get_protocol(half.id) == whole.at_precision("bf16").at_tokens(131_072).at_context(256)
    assert (half.precision, half.gate, half.at_precision("bf16") is half) == ("bf16", None, True)
    assert "bf16" in half.description
    passages = get_protocol("lambada/openai_last_word")
    assert passages.at_tokens(1000) is passages


@pytest.mark.parametrize("name", ["krony/wt130", "wikitext", "krony/wt103@ctx1024", "krony/wt103@ctx1"])
def test_unknown_ids_are_refused_with_a_way_out(name):
    with pytest.raises(ConfigError, match=r"krony/wt103"):
        get_protocol(name)
