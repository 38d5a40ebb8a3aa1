"""Identities 3, 4, 6 and 8 of method §7, through real training steps on tiny models.

1 and 2 are in test_tabular.py, 5 in test_distributed.py, 7 in test_mdp.py and test_rollouts.py, 9
in test_rollouts.py.
"""

import json

import pytest
import torch

import iqstar.distributions
import iqstar.head
import iqstar.scoring
from fitting import (
    LORA,
    LOSSES,
    PROMPTS,
    adamw,
    ask,
    attach,
    contrast,
    copied,
    distance,
    fit,
    make_module,
    make_trainer,
    same_bits,
    sgd,
    trained,
)
from iqstar import InverseQStar
from iqstar.data import HHRLHF, BeaverTails
from iqstar.estimators import NullEstimator, PrincipleEstimator
from iqstar.losses import CreditAdvantage, TokenPolicyGradientLoss
from iqstar.policy import CausalLM
from iqstar.rollouts import DatasetRollout, GenerateRollout
from tiny import tiny_folder

PRECISIONS = ["32-true", "bf16-mixed"]
WEIGHTS = {"full": {}, "lora": {"lora": LORA}}
REPLIES = ("Why", "And the ring is on the sand.", "a", "You and the others are in the inn, then.")
#: Fixed responses of unequal length, the third one cut.
FIXED = tuple(
    ask(p.messages[0].content, text, complete=i != 2)
    for i, (p, text) in enumerate(zip(PROMPTS, REPLIES, strict=True))
)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """A model whose configuration asks for dropout."""
    return tiny_folder(tmp_path_factory.mktemp("dropout"), attention_dropout=0.1)


# ---- identity 3: nothing moves by itself


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("micro", [None, 1])
def test_at_step_0_the_log_ratio_is_exactly_zero(dropping, precision, weights, micro):
    """Policy in training mode, against π_ref with matrices held in autocast's dtype."""
    module = make_module(
        dropping, spec=WEIGHTS[weights], loss=TokenPolicyGradientLoss(), micro_batch_size=micro
    )
    attach(module, precision)
    with module.trainer.precision_plugin.forward_context():
        batches = module.collect(PROMPTS, seed=3)
    tokens = 0
    for batch in batches:
        assert torch.equal(batch.tokens.behaviour, batch.tokens.reference)
        assert batch.tokens.reference.abs().min() > 0
        tokens += len(batch.tokens)
    assert tokens >= len(PROMPTS)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_under_autocast_the_reference_holds_bf16_matrices(dropping, weights):
    """Norms and the embedding (which is the head too) stay in fp32, as the policy's."""
    module = attach(make_module(dropping, spec=WEIGHTS[weights]), "bf16-mixed")
    with module.policy.reference() as reference:
        types = {n: p.dtype for n, p in reference.model.named_parameters() if "lora" not in n}
    for name, dtype in types.items():
        matrix = name.endswith("_proj.weight") or "base_layer" in name
        assert dtype == (torch.bfloat16 if matrix else torch.float32), name
    assert set(types.values()) == {torch.bfloat16, torch.float32}


CASES = [("bf16-mixed", "full", name) for name in LOSSES] + [
    ("32-true", "full", "reverse"),
    ("32-true", "lora", "reward"),
    ("bf16-mixed", "lora", "reverse"),
    ("bf16-mixed", "lora", "gradient"),
    ("bf16-true", "full", "reverse"),
]


@pytest.mark.parametrize(("precision", "weights", "loss"), CASES)
def test_the_null_estimator_moves_no_bit(dropping, precision, weights, loss):
    """Over two rollouts of four steps each; every gradient is exactly 0, so nothing can add up."""
    module = make_module(
        dropping,
        NullEstimator(),
        spec=WEIGHTS[weights],
        loss=LOSSES[loss](),
        epochs_per_rollout=4,
    )
    before = {}
    hook = InverseQStar.on_train_start
    module.on_train_start = lambda: (before.update(copied(trained(module))), hook(module))
    run = fit(module, precision=precision, max_steps=8)
    assert run.losses == [0.0] * 8
    assert all(torch.count_nonzero(g) == 0 for g in run.gradients)
    assert {c["train/credit"] for c in run.curves} == {0.0}
    assert same_bits(before, trained(module))


def test_the_null_estimator_moves_no_bit_with_a_state_baseline(dropping):
    loss = TokenPolicyGradientLoss(advantage=CreditAdvantage(state_baseline=True))
    run = fit(
        make_module(dropping, NullEstimator(), loss=loss), precision="bf16-mixed", max_steps=4
    )
    assert torch.equal(run.weights[0], run.weights[-1])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("source", ["on-policy", "data set"])
def test_under_autocast_every_trained_weight_gets_its_gradient(dropping, weights, source):
    """Autocast caches weights cast without gradient: a rollout must not leave one behind."""
    rollout = DatasetRollout() if source == "data set" else GenerateRollout(max_new_tokens=6)
    runs = {}
    for precision in PRECISIONS:
        torch.manual_seed(0)  # adapters start at random
        module = make_module(dropping, spec=WEIGHTS[weights], rollout=rollout, optimizer=sgd(0.1))
        runs[precision] = fit(module, FIXED, precision=precision, max_steps=2)
        if weights == "full":
            for name, parameter in trained(module).items():
                assert torch.isfinite(parameter).all(), name
    for gradient in runs["bf16-mixed"].gradients:
        assert torch.count_nonzero(gradient) > 0.3 * gradient.numel()
    if source == "data set":  # the same responses in both precisions
        gap = distance(runs["bf16-mixed"].gradients[0], runs["32-true"].gradients[0])
        print(f"bf16 gradient gap ({weights}): {gap:.3g}")
        assert gap < 0.1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_real_estimator_moves_every_tensor(dropping, precision):
    module = make_module(dropping)
    before = {}
    hook = InverseQStar.on_train_start
    module.on_train_start = lambda: (before.update(copied(trained(module))), hook(module))
    run = fit(module, precision=precision, max_steps=2)
    assert run.losses[0] > 0.1
    for name, value in trained(module).items():
        assert not torch.equal(value, before[name]), name


def test_every_dropout_is_switched_off(dropping):
    module = attach(make_module(dropping, spec=WEIGHTS["lora"])).train()
    rates = [
        value
        for part in module.actor.modules()
        for name, value in vars(part).items()
        if "dropout" in name and isinstance(value, float)
    ]
    assert rates
    assert set(rates) == {0.0}
    assert all(p.p == 0 for p in module.actor.modules() if isinstance(p, torch.nn.Dropout))
    (batch,) = module.collect(PROMPTS, seed=0)
    first, second = (module.actor.hidden(batch.sequences) for _ in range(2))
    assert torch.equal(first, second)


# ---- identity 4: padding, company and chunks change nothing


def trace(monkeypatch, folder, change=None, prompts=FIXED, precision="64-true", **options):
    """One SGD step on fixed responses: what was known of each prompt's tokens, and the step."""
    batches = []
    collect = InverseQStar.collect

    def spy(self, *args):
        batches.extend(collect(self, *args))
        return batches

    with monkeypatch.context() as patch:
        patch.setattr(InverseQStar, "collect", spy)
        if change:
            change(patch)
        dtype = "float64" if precision == "64-true" else "float32"
        fields = {"rollout": DatasetRollout(), "optimizer": sgd(0.1), **options}
        micro = fields.get("micro_batch_size")
        run = fit(
            make_module(folder, spec={"dtype": dtype}, **fields),
            prompts,
            precision=precision,
            max_steps=1,
            accumulate_grad_batches=-(-len(prompts) // micro) if micro else 1,
        )
    known = {}
    for batch in batches:
        lengths = batch.rollout.lengths.tolist()
        both = torch.stack([batch.tokens.reference, batch.tokens.credit]).split(lengths, dim=1)
        known |= dict(zip(batch.rollout.prompts, both, strict=True))
    return {
        "tokens": torch.cat([known[p].flatten() for p in FIXED]),
        "loss": torch.tensor([run.objective], dtype=torch.float64),
        "gradient": run.gradients[0],
        "curves": torch.tensor(
            [v for k, v in sorted(run.curves[0].items()) if "second" not in k],
            dtype=torch.float64,
        ),
    }


def padded(side, extra):
    """All packing with that padding; the attention mask is handed on, as left padding needs."""
    pack, hidden = iqstar.scoring.pack, CausalLM.hidden

    def change(patch):
        patch.setattr(iqstar.scoring, "pack", lambda c, r, p: pack(c, r, p, side, extra))
        patch.setattr(CausalLM, "hidden", lambda self, s: hidden(self, s, True))

    return change


def chunked(size):
    """Every head product in chunks of that many tokens."""

    def change(patch):
        patch.setattr(iqstar.head, "chunk_rows", lambda vocab_size, budget, copies: size)

    return change


VARIANTS = {
    "one row at a time": {"micro_batch_size": 1},
    "two rows at a time": {"micro_batch_size": 2},
    "other order": {"prompts": FIXED[::-1]},
    "masked": {"change": padded("right", 0)},
    "right padding": {"change": padded("right", 9)},
    "left": {"change": padded("left", 0)},
    "left padding": {"change": padded("left", 9)},
    "chunks of 1": {"change": chunked(1)},
    "chunks of 7": {"change": chunked(7)},
}
SETTINGS = {
    "contrastive": {"loss": LOSSES["reverse"]()},
    "principle": {
        "loss": LOSSES["reward"](),
        "estimator": PrincipleEstimator("Be kind to all.", placement="system"),
    },
}


@pytest.fixture(scope="module")
def yardstick(tiny):
    """The step with no padding but what the batch needs, all rows at once, one chunk."""
    cache = {}

    def get(setting, precision):
        if (setting, precision) not in cache:
            with pytest.MonkeyPatch.context() as patch:
                cache[setting, precision] = trace(
                    patch, tiny, precision=precision, **SETTINGS[setting]
                )
        return cache[setting, precision]

    return get


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_company_and_chunks_change_nothing(tiny, monkeypatch, yardstick, variant, setting):
    """Log-probs, credit, loss, curves and gradient, to 1e-12 in float64."""
    ours = trace(monkeypatch, tiny, **{**SETTINGS[setting], **VARIANTS[variant]})
    expected = yardstick(setting, "64-true")
    assert expected["tokens"].abs().max() > 1
    for name, value in ours.items():
        scale = max(float(expected[name].abs().max()), 1.0)
        # Curves are logged in float32: equal values may round to neighbours.
        bound = 1e-7 if name == "curves" else 1e-12
        assert (value - expected[name]).abs().max() < bound * scale, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_fp32_they_change_no_more_than_rounding(tiny, monkeypatch, yardstick, variant):
    ours = trace(
        monkeypatch, tiny, precision="32-true", **{**SETTINGS["contrastive"], **VARIANTS[variant]}
    )
    for name, value in ours.items():
        assert distance(value, yardstick("contrastive", "32-true")[name]) < 1e-5, name


@pytest.mark.parametrize("variant", ["one row at a time", "left padding"])
def test_in_bf16_the_gap_is_that_of_its_8_bits(tiny, monkeypatch, yardstick, variant):
    ours = trace(
        monkeypatch,
        tiny,
        precision="bf16-mixed",
        **{**SETTINGS["contrastive"], **VARIANTS[variant]},
    )
    gaps = {k: distance(v, yardstick("contrastive", "bf16-mixed")[k]) for k, v in ours.items()}
    print(f"bf16 gaps ({variant}): {gaps}")
    assert max(gaps.values()) < 0.1


# ---- identity 6: what is frozen stays frozen


@pytest.mark.parametrize("weights", WEIGHTS)
def test_frozen_models_get_no_gradient_and_keep_their_bytes(tiny, tmp_path, weights):
    """The reference, the estimator's own model, and with adapters all base weights."""
    other = tiny_folder(tmp_path / "other", seed=1)
    module = make_module(tiny, contrast(model=str(other)), spec=WEIGHTS[weights])

    def frozen():
        return {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}

    before = {}
    hook = InverseQStar.on_train_start
    module.on_train_start = lambda: (before.update(copied(frozen())), hook(module))
    run = fit(module, precision="bf16-mixed", max_steps=3)
    assert distance(run.weights[-1], run.weights[0]) > 0.01
    assert any(n.startswith("estimator.") for n in before)
    assert same_bits(before, frozen())
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    still = [module.estimator] + ([module.frozen] if module.frozen is not None else [])
    module.train()
    assert not any(part.training for model in still for part in model.modules())
    assert module.actor.training


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_checkpoint_holds_the_trained_weights_only(tiny, tmp_path, weights):
    module = make_module(tiny, contrast(model=str(tiny)), spec=WEIGHTS[weights])
    names = {n for n, p in attach(module).named_parameters() if p.requires_grad}
    assert all(("lora" in n) == (weights == "lora") for n in names)
    assert set(module.state_dict()) == names
    fit(module, max_steps=1)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert set(saved) == names
    fresh = attach(make_module(tiny, contrast(model=str(tiny)), spec=WEIGHTS[weights]))
    fresh.load_state_dict(saved, strict=False)
    assert same_bits(trained(fresh), trained(module))


# ---- identity 8: labels are not read

TURNS = ("Is the ring on?", "And the sand?", "Why?", "Who are you then?", "Go on!", "Others?")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def hh_rows(chosen, rejected, turns=TURNS):
    return [
        {
            side: f"\n\nHuman: {turn}\n\nAssistant: Yes.\n\nHuman: So?\n\nAssistant: {reply} {i}"
            for side, reply in (("chosen", chosen), ("rejected", rejected))
        }
        for i, turn in enumerate(turns)
    ]


def beaver_rows(order, turns=TURNS):
    safe = [True, False, False, True, False, True]
    kinds = [{"violence": not s, "rank": i} for i, s in enumerate(safe)]
    return [
        {"prompt": turn, "response": f"Reply {i}.", "is_safe": safe[j], "category": kinds[j]}
        for i, (turn, j) in enumerate(zip(turns, order, strict=True))
    ]


def weights_after(folder, data):
    module = make_module(folder, optimizer=adamw(1e-3))
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    return copied(trained(module))


@pytest.mark.parametrize("kind", ["HH-RLHF", "BeaverTails"])
def test_labels_leave_the_trained_weights_bit_identical(tiny, tmp_path, kind):
    """HH with every final reply replaced; BeaverTails with is_safe and category permuted."""
    fields = {"batch_size": 2, "val_prompts": 1}
    if kind == "HH-RLHF":
        rows = [hh_rows("I am kind", "Go away"), hh_rows("Quite another", "Neither")]
        rows.append(hh_rows("I am kind", "Go away", turns=[t + " Now." for t in TURNS]))
        source = HHRLHF
    else:
        rows = [beaver_rows(range(6)), beaver_rows([3, 0, 5, 4, 1, 2])]
        rows.append(beaver_rows(range(6), turns=[t + " Now." for t in TURNS]))
        source = BeaverTails
    paths = [write(tmp_path / f"{i}.jsonl", r) for i, r in enumerate(rows)]
    first, second, other = (weights_after(tiny, source(path=p, **fields)) for p in paths)
    assert same_bits(first, second)
    assert not same_bits(first, other)  # the test is sharp: other prompts do count
