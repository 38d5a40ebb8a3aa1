"""Loading, freezing, adapters, heads of several architectures, gradient checkpointing."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from fitting import LORA, PROMPTS, attach, distance, fit, make_module, same_bits, sgd
from iqstar import decoding
from iqstar.adapters import LoRASpec
from iqstar.admission import check_head, silence
from iqstar.chat import ChatFormat
from iqstar.errors import InputError
from iqstar.loading import _cast_matrices, load_policy
from iqstar.mdp import TokenSequences
from iqstar.policy import CausalLM, PolicySpec
from iqstar.rollouts import DatasetRollout, GenerateRollout
from test_identities import FIXED
from tiny import tiny_folder, tiny_model, tiny_tokenizer


def load(folder, precision="32-true", **spec):
    spec = PolicySpec(model=str(folder), **spec)
    return load_policy(spec, spec.chat(), precision)


def sequences(ids):
    """One unpadded row, every position of which is scored."""
    return TokenSequences(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        position_ids=torch.arange(ids.shape[1])[None],
        predictors=torch.arange(ids.shape[1]),
    )


# ---- what is trained, and what is not


def test_full_fine_tuning_trains_all_and_freezes_a_copy(tiny):
    policy = load(tiny)
    trained, total = policy.trainable()
    assert trained == total == sum(p.numel() for p in tiny_model().parameters())
    assert policy.actor.training
    assert not policy.frozen.training
    assert not any(p.requires_grad for p in policy.frozen.parameters())
    ours, theirs = (dict(m.model.named_parameters()) for m in (policy.actor, policy.frozen))
    assert same_bits({n: p.detach() for n, p in ours.items()}, theirs)
    assert not {p.data_ptr() for p in ours.values()} & {p.data_ptr() for p in theirs.values()}


def test_adapters_are_few_and_the_reference_is_without_them(tiny):
    policy = load(tiny, lora=LORA)
    trained, total = policy.trainable()
    # Rank 4 on q, o: 32→32; k, v: 32→16; gate, up: 32→64; down: 64→32; two layers.
    assert trained == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert total > trained
    assert policy.frozen is None
    batch = sequences(torch.tensor([[5, 6, 7, 8]]))
    with torch.no_grad():
        start = policy.actor.hidden(batch)
        for name, parameter in policy.actor.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
        moved = policy.actor.hidden(batch)
        with policy.reference() as reference:
            plain = reference.hidden(batch)
            assert not torch.is_grad_enabled()
        after = policy.actor.hidden(batch)
    assert torch.equal(plain, start)
    assert not torch.allclose(moved, start)
    assert torch.equal(after, moved)  # the adapters are back on


def test_only_the_adapters_require_a_gradient(tiny):
    policy = load(tiny, lora=LORA)
    assert {("lora" in n) == p.requires_grad for n, p in policy.actor.named_parameters()} == {True}


def test_all_linear_leaves_the_output_head_alone(tiny, tmp_path):
    untied = tiny_folder(tmp_path / "untied", tie=False)
    for folder in (tiny, untied):
        policy = load(folder, lora=LoRASpec(rank=2, target_modules="all-linear"))
        names = [n for n, p in policy.actor.named_parameters() if p.requires_grad]
        assert names
        assert not any("lm_head" in n for n in names)


def test_an_adapted_output_head_is_refused(tmp_path):
    untied = tiny_folder(tmp_path / "untied", tie=False)
    with pytest.raises(InputError, match="the output head cannot be adapted"):
        load(untied, lora=LoRASpec(target_modules=["q_proj", "lm_head"]))


def test_unknown_target_modules_are_named(tiny):
    with pytest.raises(InputError, match=r"model\.policy\.lora\.target_modules: .*nowhere"):
        load(tiny, lora=LoRASpec(target_modules=["nowhere"]))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / 4)])
def test_rank_stabilised_adapters_scale_by_the_root_of_the_rank(tiny, rslora, scale):
    policy = load(tiny, lora=LoRASpec(rank=16, alpha=32, rslora=rslora))
    adapted = [m for m in policy.actor.modules() if hasattr(m, "lora_A")]
    assert {m.scaling["default"] for m in adapted} == {scale}


@pytest.mark.parametrize("tie", [True, False])
def test_bf16_matrices_change_no_bit_under_autocast(tmp_path, tie):
    """Casting ahead of a product or in it is the same; the head is cast when it is prepared."""
    folder = tiny_folder(tmp_path / "model", tie=tie)
    policy = load(folder, "bf16-mixed")
    batch = sequences(torch.tensor([[5, 6, 7, 8, 2, 90]]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = policy.actor.hidden(batch), policy.frozen.hidden(batch)
        assert torch.equal(ours, theirs)
        heads = [m.head(0.7).prepared() for m in (policy.actor, policy.frozen)]
        assert torch.equal(heads[0].logits(ours), heads[1].logits(theirs))
    dtypes = {n: p.dtype for n, p in policy.frozen.model.named_parameters()}
    assert dtypes["model.embed_tokens.weight"] == dtypes["model.norm.weight"] == torch.float32
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    if not tie:
        assert dtypes["lm_head.weight"] == torch.bfloat16


# ---- the head of several architectures is their own


def architectures():
    """Tiny random models whose logits are more than one product."""
    small = {"vocab_size": 300, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    torch.manual_seed(0)
    gqa = {**small, "num_key_value_heads": 1, "intermediate_size": 32}
    return {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=300, n_layer=1, n_head=2, n_embd=16)),
        "gemma2": Gemma2ForCausalLM(
            Gemma2Config(**gqa, head_dim=8, final_logit_softcapping=0.5, pad_token_id=0)
        ),
        "granite": GraniteForCausalLM(GraniteConfig(**gqa, logits_scaling=8.0)),
        "cohere": CohereForCausalLM(
            CohereConfig(**gqa, logit_scale=0.25, pad_token_id=0, bos_token_id=0, eos_token_id=1)
        ),
        "llama": tiny_model(vocab_size=300),
    }


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "granite", "cohere", "llama"])
def test_our_head_gives_the_models_own_logits(name):
    model = architectures()[name]
    chat = ChatFormat(tiny_tokenizer(), model_vocab_size=300)
    silence(model)
    lm = CausalLM(model, chat).eval()
    check_head(lm, "key")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = lm.head().prepared().logits(lm.hidden(sequences(ids)))
        theirs = model(ids).logits[0, :, : chat.vocab_size]
    assert ours.std() > 0
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        cool = lm.head(0.5).prepared().logits(lm.hidden(sequences(ids)))
    torch.testing.assert_close(cool, theirs / 0.5, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_not_understood_is_refused():
    model = tiny_model()
    plain = model.forward

    def odd(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output

    model.forward = odd
    with pytest.raises(InputError, match="not supported yet"):
        check_head(CausalLM(model, ChatFormat(tiny_tokenizer())), "model.policy.model")


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "grouped"])
def test_attention_implementations_agree(tiny, implementation):
    batch = sequences(torch.tensor([[5, 6, 7, 8, 2, 90]]))
    with torch.no_grad():
        expected = load(tiny, dtype="float64").actor.hidden(batch)
        ours = load(tiny, dtype="float64", attn_implementation=implementation).actor.hidden(batch)
    # transformers' eager path takes the softmax in float32 whatever the model is.
    bound = 1e-5 if implementation == "eager" else 1e-10
    torch.testing.assert_close(ours, expected, atol=bound, rtol=0)


# ---- gradient checkpointing, generation


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradient_checkpointing_changes_no_gradient(tiny, lora, precision):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # adapters start at random
        spec = {"lora": lora, "gradient_checkpointing": checkpointing, "share_prefixes": False}
        module = make_module(tiny, spec=spec, rollout=DatasetRollout(), optimizer=sgd(0.1))
        grads.append(fit(module, FIXED, precision=precision, max_steps=1).gradients[0])
        assert module.policy.actor.plain.is_gradient_checkpointing is checkpointing
    assert grads[0].norm() > 0
    assert distance(grads[1], grads[0]) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_generation_uses_the_cache(tiny, checkpointing):
    """After the prompts, one token goes in at a time; the last one never does."""
    policy = load(tiny, gradient_checkpointing=checkpointing)
    widths = []
    policy.actor.plain.get_input_embeddings().register_forward_hook(
        lambda module, args, output: widths.append(args[0].shape[1])
    )
    GenerateRollout(max_new_tokens=5).roll_out(policy, PROMPTS, 1.0, 0)
    assert min(widths[:-4]) > 1
    assert widths[-4:] == [1] * 4


@pytest.mark.parametrize("own", [True, False], ids=["decode", "generate"])
def test_generation_leaves_mode_and_settings_as_they_were(tiny, monkeypatch, own):
    policy = load(tiny)
    model = policy.actor.model
    settings = model.generation_config
    seen = []

    def stopping(*args, **arguments):
        seen.append((model.training, model.generation_config is settings))
        raise RuntimeError("stop")

    if not own:
        monkeypatch.setattr(decoding, "fits", lambda *_: False)
    GenerateRollout(max_new_tokens=2).roll_out(policy, PROMPTS, 1.0, 0)
    assert policy.actor.training
    assert model.generation_config is settings
    handle = model.register_forward_pre_hook(stopping)
    with pytest.raises(RuntimeError, match="stop"):
        GenerateRollout(max_new_tokens=2).roll_out(policy, PROMPTS, 1.0, 0)
    handle.remove()
    assert seen == [(False, own)]  # only generate has settings, which it must not see
    assert policy.actor.training
    assert model.generation_config is settings


def test_adapters_off_is_what_peft_does(tiny):
    """PEFT's own context gives the same output; ours leaves what is trained alone."""
    policy = load(tiny, lora=LORA)
    model, ids = policy.actor.model, torch.arange(2, 12)[None]
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    adapted = model(ids).logits
    with model.disable_adapter():
        expected = model(ids).logits
    with policy.reference() as reference:
        with policy.reference():
            pass  # whoever asks within it ends his own part only
        assert torch.equal(reference.model(ids).logits, expected)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(model(ids).logits, adapted)
    assert not torch.equal(adapted, expected)


def test_every_end_of_sequence_id_is_known(tmp_path):
    """The tokenizer's, the generation config's and the template's, each once."""
    folder = tiny_folder(tmp_path / "model")
    model = tiny_model()
    model.generation_config.eos_token_id = [7, 1]
    model.generation_config.save_pretrained(folder)
    assert set(PolicySpec(model=str(folder)).chat().eos_ids) == {1, 7}


def test_the_position_limit_is_known(tiny):
    assert attach(make_module(tiny)).policy.actor.max_tokens == 2048


def test_attention_of_gpus_is_chosen_once_the_head_was_checked(tiny, monkeypatch):
    """Its kernels take neither float32 nor main memory; every forward here is before."""
    seen = []

    def switch(model, name):
        seen.append((name, model.config._attn_implementation))
        model.forward = None  # nothing may call it from here on

    monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", switch)
    policy = load(tiny, attn_implementation="flash_attention_2")
    assert seen == [("flash_attention_2", "sdpa")]
    assert policy.actor.model.forward is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_frozen_copy_is_a_copy_that_was_cast(tiny, tmp_path, tied, precision):
    """Matrices are cast while they are copied, which must not show."""
    folder = tiny if tied else tiny_folder(tmp_path / "untied", tie_word_embeddings=False)
    whole = load(folder, "32-true").frozen
    policy = load(folder, precision)
    _cast_matrices(whole.model, precision)
    found, expected = dict(policy.frozen.named_parameters()), dict(whole.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == expected[name].dtype, name
        assert torch.equal(weight, expected[name]), name
        assert not weight.requires_grad
    own = {p.data_ptr() for p in policy.actor.parameters()}
    assert not own & {p.data_ptr() for p in found.values()}
    assert {p.dtype for p in policy.actor.parameters()} == {torch.float32}


def test_end_tokens_are_those_of_the_revision(tiny, monkeypatch):
    seen = []

    def read(folder, revision=None):
        seen.append((folder, revision))
        raise OSError("no such file")

    monkeypatch.setattr(GenerationConfig, "from_pretrained", read)
    PolicySpec(model=str(tiny), revision="abc").chat()
    PolicySpec(model=str(tiny)).chat()
    assert seen == [(str(tiny), "abc"), (str(tiny), "main")]
