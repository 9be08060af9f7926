"""The parameter table."""

from collections.abc import Callable

from gka.models import GKAForCausalLM, count_parameters

Build = Callable[..., GKAForCausalLM]


def test_parts_add_up_to_the_whole(build: Build):
    """The parts' counts sum to all parameters, tied or not, with or without a head."""
    for tied in (False, True):
        model = build(mixers=["gka", "attention", "gka"], tie_word_embeddings=tied)
        for whole in (model, model.model):
            table = {line.part: line for line in count_parameters(whole)}
            assert sum(line.parameters for line in table.values()) == sum(
                p.numel() for p in whole.parameters()
            )
        table = {line.part: line for line in count_parameters(model)}
        assert table["output head"].parameters == (0 if tied else 97 * 32)
        assert table["embedding"].parameters == 97 * 32
        assert (table["mixer: gka"].modules, table["mixer: attention"].modules) == (2, 1)
        assert table["mlp"].parameters == 3 * 3 * 32 * 48
        assert (table["norms"].modules, table["norms"].parameters) == (7, 7 * 32)
