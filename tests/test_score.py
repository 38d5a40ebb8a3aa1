"""Credits that are written once train exactly as those that are computed on the way."""

import json
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoModelForCausalLM

from cli_tools import changed, error_of, tiny_config, write_config
from fitting import (
    LORA,
    SaveAt,
    ask,
    attach,
    contrast,
    copied,
    distance,
    fit,
    flat,
    make_module,
    make_trainer,
    same_bits,
    sgd,
    trained,
)
from iqstar.checkpoints import AtomicCheckpointIO
from iqstar.cli import main
from iqstar.commands.score import score
from iqstar.credit import PrefixWeight, TopTokens, Whiten
from iqstar.credit_file import CreditFile, write_credits
from iqstar.data import JSONL
from iqstar.errors import InputError
from iqstar.estimators import PlaceboEstimator, PrincipleEstimator, ShuffledEstimator
from iqstar.losses import DistributionImitationLoss, RewardImitationLoss, TokenPolicyGradientLoss
from iqstar.policy import Policy, PolicySpec
from iqstar.refresh import PeriodicRefresh
from iqstar.rollouts import DatasetRollout, MixtureRollout
from iqstar.scored import ScoredRollout, check_origin, estimator_settings
from iqstar.strategies import ShardedStrategy
from processes import two_processes
from tiny import tiny_folder

#: Responses of different lengths; one was cut by its source, one is longer than the limit.
TALK = (
    ask("Hi", "Hello you."),
    ask("Why is it so?", "The inner ring is on, and the others are not."),
    ask("And you, is the inner ring on?", "No."),
    ask("Go on.", "I am going", complete=False),
    ask("Who is it?", "It is the king"),
    ask("Where is the other thing?", "Over there, on the ground."),
    ask("Is it red?", "Yes"),
    ask("Say it again.", "It is red and round, you see."),
)
LIMIT = 12
KEPT = (
    "model.policy.model",
    "vocabulary",
    "model.policy.chat_template",
    "model.temperature",
    "trainer.precision",
    "model.estimator",
    "model.estimator.strength",
    "model.estimator.principle",
    "model.estimator.placement",
)


def build(folder, rollout=None, estimator=None, **options):
    """A run on the responses above, unless another source of them is given."""
    fields = {"loss": RewardImitationLoss(), "optimizer": sgd(0.05), **options}
    return make_module(folder, estimator, rollout=rollout or DatasetRollout(LIMIT), **fields)


def write(path, folder, prompts=TALK, rows=4, precision="32-true", **options):
    """The file that ``iqstar score`` would write."""
    module = build(folder, **options)
    score(make_trainer(precision), module, prompts, rows, path, {"max_new_tokens": LIMIT})
    return path


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    return write(tmp_path_factory.mktemp("scored") / "credits.parquet", tiny)


# ---- the numbers


@torch.no_grad()
def test_reference_and_credit_are_those_of_the_formula(tiny, file):
    """A*/β = γ(log π(y|c⁺,x) − log π(y|c⁻,x)) − log Z by plain transformers, token by token."""
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    chat = PolicySpec(model=str(tiny)).chat()
    stored, prompt = CreditFile(file), TALK[1]
    ids = chat.response_ids(prompt.response)[:LIMIT]

    def logprobs(principle=None):
        context = chat.prompt_ids(prompt.messages, principle)
        logits = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
        return logits[:, : chat.vocab_size].log_softmax(-1)

    plain = logprobs()
    ratio = logprobs("Be kind to all.") - logprobs("Be rude!")
    optimal = (plain + 2.0 * ratio).log_softmax(-1)
    taken = torch.arange(len(ids)), torch.tensor(ids)
    reference, credit = stored.of(prompt, ids)
    torch.testing.assert_close(torch.tensor(reference), plain[taken], atol=1e-5, rtol=0)
    expected = (optimal - plain)[taken]
    torch.testing.assert_close(torch.tensor(credit), expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 0.1


def test_what_the_file_holds(file):
    table = pq.read_table(file)
    rows = table.to_pylist()
    assert [row["prompt"][-1]["content"] for row in rows] == [p.messages[-1].content for p in TALK]
    assert {len(row["response_ids"]) for row in rows} > {LIMIT}
    for row in rows:
        assert len(row["response_ids"]) == len(row["reference"]) == len(row["credit"]) <= LIMIT
        assert max(row["reference"]) < 0
    assert rows[3]["truncated"]  # cut by its source
    assert rows[1]["truncated"]  # cut at the limit
    assert not rows[0]["truncated"]
    about = json.loads(table.schema.metadata[b"iqstar"])
    assert set(KEPT) <= set(about["origin"])
    assert about["origin"]["model.estimator.principle"] == "'Be kind to all.'"


def test_float64_stays_float64(tiny, tmp_path):
    path = write(tmp_path / "c.parquet", tiny, spec={"dtype": "float64"})
    assert pq.read_schema(path).field("credit").type == pa.list_(pa.float64())


# ---- training


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("32-true", {}),
        ("32-true", {"spec": {"lora": LORA}}),
        ("bf16-mixed", {}),
        ("32-true", {"micro_batch_size": 2, "epochs_per_rollout": 2}),
        ("32-true", {"transforms": [Whiten(), TopTokens(0.5), PrefixWeight(4.0)]}),
        ("32-true", {"temperature": 0.7, "estimator": PlaceboEstimator(contrast())}),
    ],
    ids=["plain", "adapters", "bf16", "micro-batches", "transforms", "placebo"],
)
def test_training_is_that_on_the_fly_bit_for_bit(tiny, tmp_path, precision, options):
    rows = options.get("micro_batch_size", 4)
    path = write(tmp_path / "c.parquet", tiny, rows=rows, precision=precision, **options)
    results = []
    for rollout in (DatasetRollout(LIMIT), ScoredRollout(str(path), LIMIT)):
        torch.manual_seed(0)  # adapters start at random
        module = build(tiny, rollout, **options)
        done = fit(module, TALK, precision=precision, max_steps=4)
        results.append((done, copied(trained(module))))
    (fly, weights), (stored, stored_weights) = results
    assert stored.losses == fly.losses
    assert stored.curves[0].keys() == fly.curves[0].keys()
    assert stored.curves[0]["train/credit"] == fly.curves[0]["train/credit"] != 0
    assert same_bits(weights, stored_weights)
    assert not torch.equal(stored.weights[0], stored.weights[-1])


@pytest.mark.parametrize("masked", [False, True])
def test_any_order_and_any_limit_is_the_same_to_rounding(tiny, tmp_path, masked):
    """Causal: neither a row's neighbours nor what follows a token reaches its credit."""
    exact = {"spec": {"dtype": "float64"}, "mask_truncated": masked}
    path = write(tmp_path / "c.parquet", tiny, **exact)
    order = [TALK[i] for i in (6, 2, 5, 0, 7, 3, 1, 4)]
    fly, stored = (
        fit(build(tiny, rollout, **exact), order, batch_size=2, max_steps=4)
        for rollout in (DatasetRollout(8), ScoredRollout(str(path), 8))
    )
    for ours, theirs in zip(stored.gradients, fly.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    assert sum(gradient.norm() for gradient in fly.gradients) > 0.1


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapters"])
def test_training_needs_no_frozen_model(tiny, file, lora, monkeypatch):
    def refuse(policy):
        raise AssertionError("a frozen model was asked for")

    monkeypatch.setattr(Policy, "reference", refuse)
    module = build(tiny, ScoredRollout(str(file), LIMIT), spec={"lora": lora})
    done = fit(module, TALK, max_steps=3, limit_val_batches=0)
    assert len(done.losses) == 3
    assert module.policy.frozen is None
    monkeypatch.undo()
    expected = nullcontext() if lora else pytest.raises(InputError, match="limit_val_batches is 0")
    with expected, module.policy.reference():
        pass


def test_the_reference_stays_where_it_is_evaluated(tiny, file):
    module = build(tiny, ScoredRollout(str(file), LIMIT))
    fit(module, TALK, max_steps=1)
    assert module.policy.frozen is not None


def test_a_run_goes_on_exactly_inside_a_rollout(tiny, file, tmp_path):
    """A checkpoint has token ids; the file has their credit, for both halves of the rollout."""

    def run(**options):
        rollout = ScoredRollout(str(file), LIMIT)
        module = build(tiny, rollout, micro_batch_size=2, epochs_per_rollout=2)
        done = fit(module, TALK, max_steps=7, plugins=[AtomicCheckpointIO()], **options)
        return done.losses, copied(trained(module))

    losses, weights = run(callbacks=[SaveAt(2, tmp_path / "half.ckpt")])
    resumed, resumed_weights = run(ckpt_path=tmp_path / "half.ckpt")
    assert resumed == losses[2:]
    assert same_bits(weights, resumed_weights)


def work(rank: int, folder: str, path: str):
    """One of two processes, with half of each batch."""
    results = {}
    for name, kind in (("ddp", DDPStrategy), ("fsdp", ShardedStrategy)):
        module = build(folder, ScoredRollout(path, LIMIT))
        strategy = kind(process_group_backend="gloo")
        done = fit(module, TALK, batch_size=2, max_steps=2, devices=2, strategy=strategy,
                   limit_val_batches=0)  # fmt: skip
        results[name] = (done.losses, flat(trained(module)))
    return results


def test_two_processes_train_as_one(tiny, file, tmp_path):
    pair = two_processes(work, tmp_path, str(tiny), str(file))
    prompts = [TALK[i] for i in (0, 2, 1, 3, 4, 6, 5, 7)]  # the ranks take turns
    module = build(tiny, ScoredRollout(str(file), LIMIT))
    alone = fit(module, prompts, max_steps=2)
    for rank in pair:
        for losses, weights in rank.values():
            assert losses == pytest.approx(alone.losses, rel=1e-5)
            change = weights - alone.weights[0]
            assert distance(change, alone.weights[-1] - alone.weights[0]) < 1e-4


# ---- refused


def test_a_path_may_be_below_home_and_is_no_folder(tiny, file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    attach(build(tiny, ScoredRollout(f"~/{file.name}", LIMIT)))
    assert "is a folder; give a file that iqstar score wrote" in refused(tiny, file.parent)


def refused(folder, path, precision="32-true", **options):
    """The message with which a run on a file is refused when its models are loaded."""
    with pytest.raises(InputError) as error:
        attach(build(folder, ScoredRollout(str(path), LIMIT), **options), precision)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("model.temperature", {"temperature": 0.5}),
        ("trainer.precision", {"precision": "bf16-mixed"}),
        ("model.estimator", {"estimator": PrincipleEstimator("Be kind to all.")}),
        ("model.estimator.strength", {"estimator": contrast(1.0)}),
        ("model.estimator.placement", {"estimator": contrast(placement="system")}),
        ("model.estimator", {"estimator": ShuffledEstimator(contrast())}),
        ("model.policy.chat_template", {"spec": {"chat_template": "hh"}}),
        ("model.policy.model", {"spec": {"dtype": "bfloat16"}}),
    ],
)
def test_credits_of_another_run_are_refused(tiny, file, key, options):
    message = refused(tiny, file, **options)
    assert message.startswith(f"{key}: the credits of {file} were made with ")
    assert "this run has" in message
    assert "iqstar score" in message


def test_both_values_are_named(tiny, file):
    assert "made with 1.0, this run has 0.5" in refused(tiny, file, temperature=0.5)
    assert "made with 2.0, this run has 1.0" in refused(tiny, file, estimator=contrast(1.0))


def test_credits_of_other_weights_are_refused(tmp_path, file):
    other = tiny_folder(tmp_path / "other", seed=1)
    assert refused(other, file).startswith("model.policy.model: the credits of")


def test_an_estimators_own_model_counts(tiny, tmp_path):
    """By its weights, not only by its name."""
    own = tiny_folder(tmp_path / "own", seed=1)
    told = {"estimator": PrincipleEstimator("Be kind.", model=str(own))}
    path = write(tmp_path / "c.parquet", tiny, **told)
    attach(build(tiny, ScoredRollout(str(path), LIMIT), **told))
    tiny_folder(tmp_path / "own", seed=2)
    told = {"estimator": PrincipleEstimator("Be kind.", model=str(own))}
    assert refused(tiny, path, **told).startswith("model.estimator.model (weights): ")


def test_estimators_inside_estimators_count():
    def nested(strength):
        return dict(estimator_settings(PlaceboEstimator(contrast(strength))))

    assert nested(1.0) == nested(1.0) != nested(2.0)
    assert nested(2.0)["model.estimator.estimator.strength"] == "2.0"


def test_what_only_the_file_knows_counts_too(file):
    stored = CreditFile(file)
    here = {k: v for k, v in stored.about["origin"].items() if k != "model.estimator.strength"}
    with pytest.raises(InputError, match=r"strength: .* made with 2.0, this run has nothing"):
        check_origin(stored, here)


def test_losses_of_distributions_are_refused(tiny, file):
    message = refused(tiny, file, loss=DistributionImitationLoss())
    assert "model.loss: DistributionImitationLoss compares whole distributions" in message
    assert "RewardImitationLoss" in message


def test_losses_of_the_policys_own_samples_are_refused(tiny, file):
    with pytest.raises(InputError, match="needs responses that the policy sampled itself"):
        build(tiny, ScoredRollout(str(file)), loss=TokenPolicyGradientLoss())


def test_a_loss_that_asks_for_distributions_unannounced(tiny, file):
    class Sly(DistributionImitationLoss):
        needs_distribution = False

    with pytest.raises(InputError, match="without saying so; set needs_distribution = True"):
        fit(build(tiny, ScoredRollout(str(file), LIMIT), loss=Sly()), TALK, max_steps=1)


def test_longer_responses_than_the_file_has(tiny, file):
    with pytest.raises(InputError, match=f"cut at {LIMIT} tokens; set {LIMIT} or less"):
        attach(build(tiny, ScoredRollout(str(file), LIMIT + 1)))


def test_as_part_of_a_mixture(tiny, file):
    mixed = MixtureRollout([ScoredRollout(str(file), LIMIT), DatasetRollout(LIMIT)], [1.0, 1.0])
    mixed.max_new_tokens = LIMIT
    with pytest.raises(InputError, match="use ScoredRollout alone"):
        fit(build(tiny, mixed), TALK, max_steps=1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (ask("Never seen", "Hello you."), "has no credits for the prompt 'Never seen'"),
        (ask("Hi", "Hello me."), "the response to 'Hi' is another one"),
        (ask("Hi", "Hello you. And more"), "the response to 'Hi' is another one"),
    ],
)
def test_other_data_than_was_scored(tiny, file, prompt, message):
    module = attach(build(tiny, ScoredRollout(str(file), LIMIT)))
    with pytest.raises(InputError, match=message) as error:
        module.collect((TALK[1], prompt), seed=0)
    assert "iqstar score" in str(error.value)


# ---- damaged files


def test_a_missing_file_says_how_to_write_it(tiny, tmp_path):
    path = tmp_path / "none.parquet"
    assert f"there is no file {path}; write it with iqstar score" in refused(tiny, path)


@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "text"])
def test_damaged_files(tiny, file, tmp_path, kind):
    whole = file.read_bytes()
    middle = bytearray(whole)
    credit = np.array(pq.read_table(file)["credit"][0].as_py()[:2], dtype=np.float32)
    middle[whole.index(credit.tobytes())] ^= 1  # one bit of the first credit
    content = {"empty": b"", "cut": whole[:-100], "flipped": bytes(middle), "text": b"{}" * 100}
    path = tmp_path / "damaged.parquet"
    path.write_bytes(content[kind])
    message = refused(tiny, path)
    assert f"{path} is damaged" in message
    assert "iqstar score" in message


def test_other_parquet_files(tiny, file, tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"prompt": ["Hi"]}), path)
    assert "holds no credits; give what iqstar score wrote" in refused(tiny, path)
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["credit"]), path)
    assert "its columns are not credits" in refused(tiny, path)
    other = {b"iqstar": json.dumps({"format": 99, "version": "9.0"}).encode()}
    pq.write_table(table.replace_schema_metadata(other), path)
    assert "has the format 99 of iqstar 9.0, this version reads 1" in refused(tiny, path)


def test_a_file_is_written_whole_or_not_at_all(tiny, tmp_path):
    module = attach(build(tiny))

    def interrupted():
        yield from module.collect(TALK[:4], seed=0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_credits(tmp_path / "c.parquet", interrupted(), {})
    assert list(tmp_path.iterdir()) == []


def test_credit_that_is_not_finite_is_not_written(tiny, tmp_path):
    module = attach(build(tiny))
    (micro,) = module.collect(TALK[:2], seed=0)
    micro.tokens.credit[0] = float("-inf")
    with pytest.raises(InputError, match=r"the response to 'Hi' is not finite"):
        write_credits(tmp_path / "c.parquet", [micro], {})
    assert list(tmp_path.iterdir()) == []


# ---- the command


@pytest.fixture
def config(tmp_path, tiny):
    rows = [
        {"prompt": f"Tell me about {i}, {'please' * (i % 3)}", "response": f"It is {'so ' * i}big."}
        for i in range(20)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return changed(tiny_config(tmp_path, tiny), "data.init_args.path", str(data))


def scored_run(config, path):
    """The same run on a file; evaluated on nothing."""
    source = {"class_path": "iqstar.scored.ScoredRollout",
              "init_args": {"path": str(path), "max_new_tokens": 4}}  # fmt: skip
    config = changed(config, "model.init_args.rollout", source)
    loss = {"class_path": "iqstar.losses.RewardImitationLoss"}
    return changed(config, "model.init_args.loss", loss)


def test_score_and_fit(tmp_path, config, capsys):
    """Epochs in orders of their own, on the command line."""
    path = tmp_path / "out" / "credits.parquet"
    file = write_config(tmp_path, config)
    assert main(["score", "--config", str(file), "--output", str(path)]) == 0
    assert "Wrote the credits of 17 responses" in capsys.readouterr().out
    assert [p.name for p in path.parent.iterdir()] == ["credits.parquet"]
    assert not (tmp_path / "runs").exists()
    file = write_config(tmp_path, scored_run(config, path), "scored.yaml")
    assert main(["fit", "--config", str(file), "--trainer.max_steps", "9"]) == 0
    (summary,) = tmp_path.rglob("summary.json")
    summary = json.loads(summary.read_text())
    assert summary["optimizer_steps"] == 9
    assert summary["kl"] > 0


def test_held_out_prompts_are_not_in_it(tmp_path, config, capsys):
    path, file = tmp_path / "credits.parquet", write_config(tmp_path, config)
    assert main(["score", "--config", str(file), "--output", str(path)]) == 0
    scored = str(write_config(tmp_path, scored_run(config, path), "scored.yaml"))
    message = error_of(capsys, "predict", "--config", scored)
    assert "Held-out prompts are never in it: predict with DatasetRollout" in message


def test_limit_is_that_of_the_data(tmp_path, config, capsys):
    path, file = tmp_path / "credits.parquet", write_config(tmp_path, config)
    assert main(["score", "--config", str(file), "--output", str(path), "--limit", "6"]) == 0
    assert len(CreditFile(path)) == 6
    scored = str(write_config(tmp_path, scored_run(config, path), "scored.yaml"))
    assert main(["fit", "--config", scored, "--data.limit", "6", "--trainer.max_steps", "3"]) == 0
    message = error_of(capsys, "fit", "--config", scored, "--trainer.max_steps", "5")
    assert "has no credits for the prompt" in message
    assert "data.limit" in message


def test_what_has_no_response_is_left_out(tmp_path, config):
    """As two rows of HH-RLHF, whose chosen reply is empty: neither scored nor trained on."""
    source, path = tmp_path / "rows.jsonl", tmp_path / "credits.parquet"
    data = JSONL(path=str(source), val_prompts=3)
    data.setup("fit")
    last = data.train_prompts[-1].messages[0].content
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    kept = [{"prompt": r["prompt"]} if r["prompt"] == last else r for r in rows]
    source.write_text("".join(json.dumps(row) + "\n" for row in kept))
    command = ["score", "--config", str(write_config(tmp_path, config)), "--output", str(path)]
    assert main(command) == 0
    assert len(CreditFile(path)) == 16
    scored = str(write_config(tmp_path, scored_run(config, path), "scored.yaml"))
    assert main(["fit", "--config", scored, "--trainer.max_steps", "5"]) == 0
    (summary,) = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["optimizer_steps"] == 5  # of four: every prompt was met


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output is missing"),
        (["--output", "credits.csv"], "--output: credits.csv must be a file that ends in .parquet"),
        (["--output", "rows.jsonl/c.parquet"], "rows.jsonl/c.parquet cannot be written"),
        (["--output", "c.parquet", "--limit", "0"], "--limit: must be at least 1"),
        (["--output", "c.parquet", "--limt", "3"], "limt"),
    ],
)
def test_wrong_arguments(tmp_path, config, capsys, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_config(tmp_path, config)
    assert message in error_of(capsys, "score", "--config", str(file), *arguments)


def test_score_needs_a_config(capsys):
    assert "iqstar score needs --config FILE" in error_of(capsys, "score", "--output", "c.parquet")


def test_prompts_without_responses(tmp_path, tiny, capsys):
    file = write_config(tmp_path, tiny_config(tmp_path, tiny))
    message = error_of(
        capsys, "score", "--config", str(file), "--output", str(tmp_path / "c.parquet")
    )
    assert "no prompt is left to train on (24 rows" in message
    assert "21 skipped: no response); give data with responses, or have them sampled" in message


def test_estimators_that_mix_tokens_cannot_be_scored(tmp_path, config, capsys):
    inner = config["model"]["init_args"]["estimator"]
    shuffled = {
        "class_path": "iqstar.estimators.ShuffledEstimator",
        "init_args": {"estimator": inner},
    }
    config = changed(config, "model.init_args.estimator", shuffled)
    file = write_config(tmp_path, config)
    message = error_of(
        capsys, "score", "--config", str(file), "--output", str(tmp_path / "c.parquet")
    )
    assert "ShuffledEstimator gives a token another credit in every rollout" in message


def test_credits_on_file_follow_no_policy(tmp_path, tiny, config, capsys):
    with pytest.raises(InputError, match=r"model\.refresh: the credits of a ScoredRollout"):
        build(tiny, ScoredRollout("credits.parquet"), refresh=PeriodicRefresh(every=1))
    refresh = {"class_path": "iqstar.refresh.PeriodicRefresh", "init_args": {"every": 1}}
    file = write_config(tmp_path, changed(config, "model.init_args.refresh", refresh))
    target = str(tmp_path / "c.parquet")
    message = error_of(capsys, "score", "--config", str(file), "--output", target)
    assert "model.refresh: credit that follows the policy cannot be written once" in message


def test_help(capsys):
    assert main(["score", "--help"]) == 0
    assert "--output FILE" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "  score " in capsys.readouterr().out
