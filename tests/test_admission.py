"""What a model is tried out on at the start: what differs from those we know is refused."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    Llama4TextConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    RwkvConfig,
)

from iqstar.admission import can_share, check_head, check_sampling, silence
from iqstar.chat import ChatFormat
from iqstar.decoding import fits
from iqstar.errors import InputError
from iqstar.loading import load_whole
from iqstar.policy import CausalLM, PolicySpec
from test_decoding import CONFIGS, SIZES
from tiny import tiny_model, tiny_tokenizer

KEY = "model.policy.model"
ROWS = {"vocab_size": 320}
#: ``initializer_range`` makes their predictions confident, so that a wrong way is seen.
MORE = {
    "gpt-neo": lambda: gpt_neo(window=6),
    "mamba": lambda: MambaConfig(**ROWS, hidden_size=16, num_hidden_layers=2),
    "short window": lambda: MistralConfig(**SIZES | ROWS, sliding_window=4),
    "llama-4": lambda: Llama4TextConfig(
        **SIZES | ROWS, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=64
    ),
}


def gpt_neo(window):
    return GPTNeoConfig(
        **ROWS,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=window,
        initializer_range=0.4,
    )


def language_model(config):
    config.vocab_size = 320
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    silence(model)
    return CausalLM(model, ChatFormat(tiny_tokenizer(), model_vocab_size=320)).eval()


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_known_architectures_are_taken(name):
    lm = language_model((CONFIGS | MORE)[name]())
    check_head(lm, KEY)
    check_sampling(lm, KEY)
    assert not lm.training


def test_a_model_that_samples_from_other_probabilities_is_refused():
    """RWKV is seen to; why was not looked into."""
    config = RwkvConfig(**ROWS, hidden_size=16, num_hidden_layers=2, context_length=64)
    lm = language_model(config)
    with torch.no_grad():
        for weights in lm.parameters():
            weights.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match=r"RwkvForCausalLM does not sample.*not supported"):
        check_sampling(lm, KEY)


def test_a_window_that_no_cache_knows_of_goes_the_plain_way():
    """GPT-Neo's local layers count padding, which both fast paths put between tokens."""
    lm = language_model(gpt_neo(window=256))
    assert not can_share(lm)
    assert fits(lm.model, 255)
    assert not fits(lm.model, 256)


def test_noise_in_training_is_refused():
    class Noisy(nn.Module):
        def forward(self, states):
            return states + 0.01 * torch.randn_like(states) if self.training else states

    model = tiny_model()
    model.model.norm = nn.Sequential(model.model.norm, Noisy())
    with pytest.raises(InputError, match="computes something else while it trains"):
        check_head(CausalLM(model, ChatFormat(tiny_tokenizer())), KEY)


def test_layers_are_not_dropped(tmp_path):
    config = OPTConfig(
        **ROWS,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        layerdrop=0.5,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    spec = PolicySpec(model=str(tmp_path))
    assert load_whole(spec, spec.chat()).model.model.decoder.layerdrop == 0


def test_a_forward_pass_of_another_form_is_an_error_of_one_line():
    model = tiny_model()
    model.model.forward = lambda **_: torch.zeros(1, 3, 32)
    with pytest.raises(InputError, match=r"forward pass of LlamaForCausalLM.*last_hidden_state"):
        check_head(CausalLM(model, ChatFormat(tiny_tokenizer())), KEY)
