"""What parallel/experts/megatron.py uses of Megatron-core's inner names: an update that moves one fails here."""

import inspect

import pytest
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from sharpmoe.parallel.experts.megatron import _PortableDispatcher

STAGES = {  # in the order of a call -> parameters after self
    "dispatch_preprocess": ["hidden_states", "routing_map", "probs"],
    "token_dispatch": ["permutated_local_input_tokens", "permuted_probs"],
    "dispatch_postprocess": ["global_input_tokens", "global_probs"],
    "combine_preprocess": ["hidden_states"],
    "token_combine": ["hidden_states", "async_finish", "allocate_on_comm_stream"],
    "combine_postprocess": ["permutated_local_input_tokens"],
}
OVERRIDDEN = ["preprocess", "token_dispatch", "token_combine", "_maybe_dtoh_and_synchronize"]
KEPT = (  # attributes that we set, or that the stages read where we override the one that sets them
    "drop_and_pad",
    "moe_expert_capacity_factor",
    "cuda_dtoh_stream",
    "num_out_tokens",
    "input_splits",
    "output_splits",
    "num_global_tokens_per_local_expert",
    "local_expert_indices",
)


@pytest.mark.parametrize("stage", STAGES)
def test_a_call_has_the_stages_that_we_go_through(stage: str) -> None:
    method = getattr(MoEAlltoAllTokenDispatcher, stage, None)
    assert method is not None, f"Megatron-core has no {stage} any more: see sharpmoe/parallel/experts/megatron.py"
    assert list(inspect.signature(method).parameters)[1:] == STAGES[stage]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_the_portable_class_overrides_is_there_to_override(name: str) -> None:
    assert name in vars(_PortableDispatcher)
    assert name in vars(MoEAlltoAllTokenDispatcher), f"Megatron-core calls {name} no more: the override does nothing"


@pytest.mark.parametrize("name", KEPT)
def test_the_stages_speak_through_the_attributes_that_we_know(name: str) -> None:
    assert name in inspect.getsource(MoEAlltoAllTokenDispatcher), f"Megatron-core has no {name} any more"


def test_the_factor_makes_megatron_count_rows() -> None:
    """Without it the buffer of a call has tokens * top_k rows, whatever the map says."""
    assert "moe_expert_capacity_factor" in inspect.signature(TransformerConfig).parameters
    assert "config.moe_expert_capacity_factor is not None" in inspect.getsource(MoEAlltoAllTokenDispatcher.preprocess)
