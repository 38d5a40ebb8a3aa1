"""Our decoding against transformers', on several architectures; rows that end; shared prompts."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from iqstar import decoding
from iqstar.decoding import decode, fits, generate, read
from iqstar.kv_cache import RolloutCache
from iqstar.sampling import CategoricalSampler, ForcedDraws, uniform_numbers
from tiny import tiny_model

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma": lambda: GemmaConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=40),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=40),
    "neox": lambda: GPTNeoXConfig(**SIZES),
    "gpt2": lambda: GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64),
    "falcon": lambda: FalconConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
}
PREFIX = [7, 3, 9, 1, 4, 8, 2, 6, 5]
#: Of very different lengths; two are alike; all begin with ``PREFIX``.
PROMPTS = [
    [*PREFIX, 11],
    [*PREFIX, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22],
    [*PREFIX, 11],
    [*PREFIX, 30, 31, 32],
    [*PREFIX, 30, 33, 34, 35],
]
LIMIT = 9


def model_of(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        dtype = torch.float32 if name == "gemma2" else torch.float64  # its own code has no other
        return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()


class Draws:
    """Draws for :func:`decode`, and remembers the logits of every row and step."""

    def __init__(self, rows, vocab=50, seed=0):
        self.uniform = uniform_numbers(rows, LIMIT, seed, CPU)
        self.sampler = CategoricalSampler(temperature=1.0, vocab_size=vocab)
        self.seen = {}

    def __call__(self, logits, rows, step):
        self.seen.update({(row, step): x for row, x in zip(rows, logits, strict=True)})
        return self.sampler.draw(logits, self.uniform[rows, step])


def never(row):
    return False


def full_logits(model, prompt, response):
    """Logits of every response token, from one forward pass without cache or padding."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompts", [PROMPTS, [p[len(PREFIX) :] for p in PROMPTS]])
def test_logits_are_those_of_one_forward_pass(name, prompts):
    """With the common beginning and without, in groups and rows of all kinds."""
    bound = 1e-4 if name == "gemma2" else 1e-11
    model, draws = model_of(name), Draws(len(prompts))
    assert fits(model, 20 + LIMIT)
    responses = decode(model, prompts, LIMIT, draws, never, CPU)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        assert len(response) == LIMIT
        seen = torch.stack([draws.seen[row, step] for step in range(LIMIT)])
        expected = full_logits(model, prompt, response)
        torch.testing.assert_close(seen, expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_samples_what_transformers_generate_samples(name):
    model, draws = model_of(name), Draws(len(PROMPTS))
    ours = decode(model, PROMPTS, LIMIT, draws, never, CPU)
    forced = ForcedDraws(draws.sampler, draws.uniform)
    assert generate(model, PROMPTS, LIMIT, forced, never, CPU) == ours
    assert ours[0] != ours[2]  # alike prompts, numbers of their own


def test_rows_that_end_leave_and_change_no_other():
    """Ends at every step, several at once; a batch of one row is the last word."""
    model, draws = model_of("llama"), Draws(len(PROMPTS))
    whole = decode(model, PROMPTS, LIMIT, draws, never, CPU)
    lengths = {0: 2, 1: 5, 2: 2, 3: LIMIT, 4: 3}
    ends = {(row, len(r)): r for row, r in enumerate(whole)}
    assert len(ends) == len(PROMPTS)
    wanted = [whole[row][:length] for row, length in lengths.items()]

    def ended(response):
        return response in wanted

    sizes, step = [], decoding.advance

    def counted(model, context, tokens):
        sizes.append(len(tokens))
        return step(model, context, tokens)

    draws.seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "advance", counted)
        assert decode(model, PROMPTS, LIMIT, draws, ended, CPU) == wanted
    assert sizes == [5, 3, 2, 2, 1, 1, 1, 1]
    for row, response in enumerate(wanted):
        seen = torch.stack([draws.seen[row, step] for step in range(len(response))])
        expected = full_logits(model, PROMPTS[row], response)
        torch.testing.assert_close(seen, expected, atol=1e-11, rtol=1e-11)


def test_work_is_shared_between_prompts():
    """9 tokens once, then at most 11 of a group: the longest alone, the others by two lengths."""
    model, read_tokens = model_of("llama"), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: read_tokens.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    context = read(model, PROMPTS, 3, CPU)
    assert read_tokens == [(1, 9), (1, 11), (2, 4), (1, 1)]
    assert context.cache.get_seq_length() == 20
    assert context.positions.tolist() == [10, 20, 10, 12, 13]
    assert context.mask[:, :20].sum(dim=1).tolist() == [10, 20, 10, 12, 13]


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("bf16", torch.bfloat16)])
def test_the_cache_is_as_small_as_attention_allows(precision, dtype):
    """Two layers, keys and values, 2 groups of 8: the last token is never read."""
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None), torch.no_grad():
        cache = read(model, PROMPTS, LIMIT - 1, CPU).cache
    assert cache.nbytes == 2 * 2 * 5 * (20 + LIMIT - 1) * 2 * 8 * dtype.itemsize


def test_prompts_are_read_in_the_dtype_that_they_are_held_in(monkeypatch):
    """A batch of prompts beside the rollout's cache takes no more than its own size there."""
    seen, model = [], tiny_model()
    store = RolloutCache.store
    monkeypatch.setattr(
        RolloutCache,
        "store",
        lambda cache, prompts, *rest: (seen.append(prompts), store(cache, prompts, *rest)),
    )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        read(model, PROMPTS, LIMIT - 1, CPU)
    assert {layer.keys.dtype for prompts in seen for layer in prompts.layers} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SIZES, sliding_window=12), "forgets"),
        (MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1), "no keys"),
        (BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2), "no positions"),
    ],
)
def test_other_models_are_left_to_transformers(config, reason):
    assert not fits(AutoModelForCausalLM.from_config(config), 20), reason
