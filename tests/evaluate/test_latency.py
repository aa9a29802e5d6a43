"""Block times: what is set while they are taken, and what is made of them. How long anything takes is no test."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffprune.core.errors import ParameterError
from ffprune.evaluate import latency
from ffprune.evaluate.latency import PHASES, Probe, block_latencies
from ffprune.models.surgery import slice_unit
from ffprune.models.view import ModelView
from tests.tiny import MODELS, llama, spread

SHORT = Probe("prefill", tokens=4, batch=1, widths=3, repeats=1)


def silent(done: int, total: int) -> None:
    """Nothing."""


def layer_times(view: ModelView) -> list[float]:
    """A made-up clock: 1 ms a layer, 3 ms a group, 0.25 ms a channel, in seconds."""
    return [(1 + 3 * block.groups + block.channels / 4) / 1000 for block in view.blocks]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the clock."""
    monkeypatch.setitem(PHASES, "prefill", lambda view, tokens: layer_times(view))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_timed_and_left_as_it_was(name: str, phase: str) -> None:
    model = spread(MODELS[name]()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    found = block_latencies(ModelView(model.train()), Probe(phase, 4, 2, 2, 1), silent)
    assert model.training
    assert sorted(unit for times in found.times for unit in times.units) == sorted(
        u.name for u in ModelView(model).units
    )
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, logits)


def test_times_of_layers_are_split_between_their_units(clock: None) -> None:
    view = ModelView(llama(kv_heads=4))
    found = block_latencies(view, SHORT, silent)
    attention, ffn = found.times
    assert (attention.units, ffn.units) == (
        ("layers.0.attention", "layers.1.attention"),
        ("layers.0.ffn", "layers.1.ffn"),
    )
    assert (attention.kept, ffn.kept) == ((1, 3, 4), (1, 8, 16, 24))
    # What one group and one channel take is the attention's, once a layer.
    least = 1 + 3 + 0.25
    assert attention.milliseconds == pytest.approx([least, least + 6, least + 9])
    assert ffn.milliseconds == pytest.approx([0, 7 / 4, 15 / 4, 23 / 4])
    assert found.dense_milliseconds == pytest.approx(2 * (1 + 12 + 6))
    assert found.sum_milliseconds == pytest.approx(found.dense_milliseconds)


def test_layers_of_other_shapes_have_times_of_their_own(clock: None) -> None:
    view = ModelView(llama())
    slice_unit(view, 1, torch.arange(12))
    view = ModelView(view.model)
    found = block_latencies(view, SHORT, silent)
    assert [(times.units, times.granules) for times in found.times] == [
        (("layers.0.attention", "layers.1.attention"), 2),
        (("layers.0.ffn",), 12),
        (("layers.1.ffn",), 24),
    ]
    assert [times.milliseconds[-1] for times in found.times] == pytest.approx([4.25 + 3, 11 / 4, 23 / 4])
    assert found.sum_milliseconds == pytest.approx(found.dense_milliseconds)


def test_shapes_take_turns_and_the_least_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # A round each; in the one that is quiet for a layer, the other is disturbed.
    busy = iter([late for late in ((0.5, 0.2), (0.0, 0.3), (0.3, 0.0), (0.1, 0.4)) for _ in range(5)])
    shapes: list[tuple[int, int]] = []

    def timed(view: ModelView, tokens: Tensor) -> list[float]:
        assert tokens.shape == (3, 4 + latency._DECODED)
        assert all(linear.weight.is_contiguous() for linear in view.prunable.values())
        shapes.append((view.blocks[0].groups, view.blocks[0].channels))
        return [time + late for time, late in zip(layer_times(view), next(busy), strict=True)]

    monkeypatch.setitem(PHASES, "prefill", timed)
    seen: list[tuple[int, int]] = []
    found = block_latencies(ModelView(llama()), Probe("prefill", 4, 3, 2, 4), lambda *turn: seen.append(turn))
    # One granule everywhere, all; then attention, then FFN.
    assert shapes == [(1, 1), (2, 24), (2, 1), (1, 12), (1, 24)] * 4
    assert seen == [(turn, 20) for turn in range(1, 21)]
    assert found.dense_milliseconds == pytest.approx(2 * (1 + 6 + 6))


def test_phases_run_the_decoder_alone(small_llama: PreTrainedModel) -> None:
    fed: list[tuple[int, int]] = []
    small_llama.get_decoder().register_forward_pre_hook(  # type: ignore[no-untyped-call]  # of a library
        lambda _, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    small_llama.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the LM head ran"))
    view, tokens = ModelView(small_llama), torch.zeros(2, 5 + latency._DECODED, dtype=torch.long)
    with torch.inference_mode():
        for phase in ("prefill", "decode"):
            times = PHASES[phase](view, tokens)
            assert len(times) == len(view.blocks)
            assert all(0 < time < float("inf") for time in times)
    assert not any(block.layer._forward_hooks or block.layer._forward_pre_hooks for block in view.blocks)
    assert fed == [(2, 5), (2, 5), *[(2, 1)] * latency._DECODED]


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ParameterError, match="decode, prefill"):
        block_latencies(ModelView(llama()), Probe("training", 4, 1, 2, 1), silent)
