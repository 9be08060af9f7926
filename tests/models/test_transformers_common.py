"""transformers' own tests of a model and a configuration, on ours: pure, hybrid and with windows.

See tests/models/common.py for where they come from. `SKIPPED` lists what is not asked of these models, each
with its reason; what transformers' tests skip by themselves says so in their own words.
"""

import unittest
from typing import Any, ClassVar
from unittest import mock

import torch

from gka.models import GKAConfig, GKAForCausalLM, GKAModel
from models.common import common_tests

ModelTesterMixin, GenerationTesterMixin, ConfigTester = common_tests()

NO_GENERATION = "GenerationTesterMixin comes with transformers' repository alone"
SKIPPED = {
    "test_causal_lm_loss_honors_shift_labels": "shift_labels is refused: it comes with sequences split over "
    "ranks, where recurrent states would have to travel",
}


class Tester:
    """What the mixins ask of a model: sizes, a configuration, inputs."""

    batch_size, seq_length, hidden_size = 3, 7, 32
    num_hidden_layers, num_attention_heads, vocab_size = 2, 4, 99
    is_training = True
    __test__ = False  # pytest would collect it by its name

    def __init__(self, mixers: list[str]):
        self.mixers = mixers
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self) -> GKAConfig:
        return GKAConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            head_dim=8,
            num_heads=self.num_attention_heads,
            sliding_window=4,
            num_iter=6,
            mixers=self.mixers,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[GKAConfig, dict[str, Any]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common:
    """The tests, for one pattern of mixers."""

    mixers: ClassVar[list[str]]
    all_model_classes = (GKAModel, GKAForCausalLM)
    has_attentions = False  # no layer forms attention weights
    test_can_init_all_missing_weights_before_2023 = True  # else it asks for a year in the source
    model_tester: Tester

    def setUp(self) -> None:
        self.model_tester = Tester(self.mixers)
        if reason := SKIPPED.get(self._testMethodName):  # type: ignore[attr-defined]
            self.skipTest(reason)  # type: ignore[attr-defined]

    def test_config(self) -> None:
        """transformers' checks of a configuration: common names, round trips, common arguments."""
        config: Any = self.model_tester.get_config()
        ConfigTester(
            self, config_class=GKAConfig, hidden_size=37, mixers=config.mixers
        ).run_common_tests()

    def test_left_padding_compatibility(self) -> None:
        """Left-padded prompts, which transformers leaves out where no attention weights are formed."""
        test = getattr(super(), "test_left_padding_compatibility", None)
        if test is None:
            self.skipTest(NO_GENERATION)  # type: ignore[attr-defined]
        with mock.patch.object(type(self), "has_attentions", True):
            test()  # type: ignore[misc]

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        """What each layer keeps; transformers' own version knows one convolution a layer."""
        heads, dim = config.num_heads, config.head_dim
        assert len(past_key_values) == len(config.pattern)
        for mixer, layer in zip(config.pattern, past_key_values.layers, strict=True):
            if mixer == "gka":
                kept = [*layer.conv_states.values(), *layer.recurrent_states.values()]
                shapes = [(batch_size, heads * dim, config.conv_size)] * 3
                shapes += [(batch_size, heads, dim, dim)] * 2
                assert [tuple(x.shape) for x in kept if x is not None] == shapes
            else:
                seen = min(seq_length, config.sliding_window - 1) if mixer == "swa" else seq_length
                for x in (layer.keys, layer.values):
                    assert tuple(x.shape) == (batch_size, heads, seen, dim)


class PureTest(Common, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):  # type: ignore[misc]
    mixers: ClassVar[list[str]] = ["gka", "gka"]


class HybridTest(Common, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):  # type: ignore[misc]
    mixers: ClassVar[list[str]] = ["gka", "attention"]


class WindowTest(Common, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):  # type: ignore[misc]
    mixers: ClassVar[list[str]] = ["gka", "swa"]


del ModelTesterMixin, GenerationTesterMixin
