"""iqstar plan: counts against real models, FLOPs by hand, arithmetic over devices, bad input."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cli_tools import write_prompts
from iqstar import decoding
from iqstar.adapters import LoRASpec
from iqstar.cli import main
from iqstar.data import EvalBatches, Sample
from iqstar.estimators import ContrastiveEstimator, NullEstimator
from iqstar.losses import RewardImitationLoss
from iqstar.mdp import Message, Prompt
from iqstar.module import InverseQStar
from iqstar.planning.empty import cast_bytes, empty_policy, weights_of
from iqstar.planning.footprint import Footprint, Generation, Weights, Workload
from iqstar.planning.memory import GIB, Layout, make_plan
from iqstar.planning.reading import limits, read_architecture, workload
from iqstar.planning.run import trace_run
from iqstar.planning.tracing import Trace, fake_weights, without_memory
from iqstar.policy import CausalLM, PolicySpec
from iqstar.refresh import EMARefresh
from tiny import tiny_model

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "configs" / "scale" / "architectures"
WORK = Workload(
    prompt_tokens=12,
    new_tokens=4,
    rollout_rows=8,
    generated_rows=8,
    micro_rows=4,
    evaluated_rows=6,
    scored_rows=6,
    step_rows=8,
)


def trace(
    work=WORK, precision="32-true", estimator=None, loss=None, device="cpu", refresh=None, **spec
) -> Footprint:
    module = InverseQStar(
        policy=PolicySpec(**spec),
        estimator=estimator or NullEstimator(),
        loss=loss,
        refresh=refresh,
    )
    return trace_run(module, tiny_model().config, {}, work, precision, device)


# ---- what is counted


@pytest.fixture(scope="module")
def plain():
    """The run without options."""
    return trace()


def test_live_bytes_and_their_peak():
    weight = torch.zeros(100)
    with Trace([weight]) as traced:
        first = torch.ones(256)  # 1024 bytes
        view, other = first[:10], weight[:10]  # of what is there
        assert (traced.live, traced.peak) == (1024, 1024)
        second = first + 1
        assert traced.live == 2048
        del first, view
        gc.collect()
        assert (traced.live, traced.peak) == (1024, 2048)
        del second, other


def step_of(model) -> tuple[int, int, int]:
    """Live and most bytes, and FLOPs, of a forward and a backward pass."""
    ids = torch.zeros(2, 15).long()
    with Trace([*model.parameters(), *model.buffers()]) as traced:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        return traced.live, traced.peak, traced.flops


def test_fake_tensors_take_what_real_ones_do():
    model = tiny_model().train()
    live, peak, flops = step_of(model)
    model.zero_grad()
    with without_memory():
        fake_weights(model)
        assert step_of(model) == (
            live,
            pytest.approx(peak, rel=0.1),  # transformers makes a mask that it can else leave out
            flops,
        )


def test_weights_are_those_of_the_model(plain):
    model, found = tiny_model(), plain
    weights = sum(p.numel() for p in model.parameters())
    assert (found.parameters, found.trained) == (weights, weights)
    assert found.policy.total == found.gradients.total == 4 * weights
    assert found.frozen["reference"] == found.policy  # 32-true: nothing is cast
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert found.policy == Weights(
        blocks=8 * layer, block=4 * layer, rest=4 * (weights - 2 * layer)
    )
    assert found.states == 2 * 4 * weights + 4 * len(list(model.parameters()))  # and a step each


def test_bf16_halves_the_references_matrices_only(plain):
    found = trace(precision="bf16-mixed")
    linear = [m for m in tiny_model().model.modules() if isinstance(m, torch.nn.Linear)]
    matrices = sum(m.weight.numel() for m in linear)  # the tied head is not among them
    assert found.policy.total - found.frozen["reference"].total == 2 * matrices
    assert found.casts == 2 * matrices
    assert found.head_casts == 2 * tiny_model().lm_head.weight.numel()
    assert found.packed == 0
    assert plain.packed == 2 * (found.casts + found.head_casts)  # float32 is packed as it is


def test_a_reference_that_moves_is_held_in_full_and_twice_where_roles_part():
    both = trace(precision="bf16-mixed", refresh=EMARefresh())
    apart = trace(precision="bf16-mixed", refresh=EMARefresh(of="estimator"))
    assert both.frozen["reference"] == both.policy  # in bf16-mixed it is smaller, as shown above
    assert apart.frozen == {**both.frozen, "estimator's copy": both.frozen["reference"]}


@pytest.mark.parametrize(
    ("held_out", "at_once", "devices", "rows"),
    [(48, 32, 1, 24), (48, 32, 8, 6), (5, 2, 2, 2), (5, 1, 2, 2), (0, 8, 1, 0), (None, 8, 4, 8)],
)
def test_evaluations_are_cut_evenly_over_devices(held_out, at_once, devices, rows):
    """As the data's own batches are; all prompts held out are more than one batch."""
    module = InverseQStar(policy=PolicySpec(), estimator=NullEstimator(), eval_samples=3)
    data = Sample(val_prompts=held_out, eval_batch_size=at_once)
    found = workload(module, data, 10, accumulate=1, devices=devices)
    assert found.evaluated_rows == 3 * rows
    if held_out:
        prompts = [
            Prompt(messages=(Message(role="user", content=str(n)),)) for n in range(held_out)
        ]
        loaders = [EvalBatches(prompts, at_once, rank, devices) for rank in range(devices)]
        assert rows == max(len(b.prompts) for loader in loaders for b in loader)


def test_adapters_are_peft_s():
    found = trace(lora=LoRASpec(rank=4), precision="bf16-mixed")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trained, total = get_peft_model(tiny_model(), config).get_nb_trainable_parameters()
    assert (found.trained, found.parameters) == (trained, total)
    assert found.frozen == {}
    assert found.gradients.total == 4 * trained
    linear = [m for m in tiny_model().model.modules() if isinstance(m, torch.nn.Linear)]
    assert found.as_read == 4 * sum(m.weight.numel() for m in linear)


def test_flops_by_hand():
    found = trace(attn_implementation="eager", loss=RewardImitationLoss())
    model, tokens, length = tiny_model(), 4 * 16, 16
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    attention = 2 * 2 * (2 * 4 * length * length * 4 * 8)  # layers, products, rows, heads, size
    forward = 2 * matrices * tokens + attention
    head = 2 * model.lm_head.weight.numel() * (4 * 4)  # at response tokens
    windows = 8 / 4
    assert found.flops["update"] == windows * (3 * forward + 3 * head)
    # The reference alone; its log-probs are asked for twice, as credit is a difference.
    assert found.flops["scoring"] == windows * (forward + 2 * head)


def test_contrast_scores_three_times_and_longer(plain):
    told = trace(
        estimator=ContrastiveEstimator(principle="Be kind. " * 9, antiprinciple="Be rude.")
    )
    assert told.flops["scoring"] > 3 * plain.flops["scoring"]
    assert told.stored == 3 * plain.stored == 3 * 8 * 4 * 32 * 4  # rows, tokens, size, bytes


def test_checkpointing_trades_flops_for_activations(plain):
    less = trace(gradient_checkpointing=True)
    assert less.activations < plain.activations / 2
    assert less.flops["update"] > 1.2 * plain.flops["update"]
    assert less.gradients == plain.gradients


def test_the_head_of_a_gpu_takes_its_own_chunks(plain):
    """16 tokens: a CPU's losses see 2 of them at a time, a GPU's all."""
    tokens, float32 = WORK.micro_rows * WORK.new_tokens, 4
    logits = tokens * tiny_model().config.vocab_size * float32
    assert logits < plain.loss < trace(device="cuda").loss


def test_more_rows_and_longer_prompts_take_more(plain):
    more = trace(replace(WORK, micro_rows=8, generated_rows=16))
    assert more.activations == pytest.approx(2 * plain.activations, rel=0.02)
    assert more.rollout.cache == pytest.approx(2 * plain.rollout.cache, rel=0.02)
    longer = trace(replace(WORK, prompt_tokens=28))
    assert longer.activations > 1.8 * plain.activations
    assert longer.rollout.cache == pytest.approx(2 * plain.rollout.cache, rel=0.15)


@pytest.mark.parametrize("own", [True, False], ids=["decode", "generate"])
def test_cache_by_hand(monkeypatch, own):
    if not own:
        monkeypatch.setattr(decoding, "fits", lambda *_: False)
    keys_and_values = 2 * 2 * 2 * 8  # layers, both, heads, size
    full = 8 * (12 + 4 - 1) * keys_and_values * 4
    assert trace().rollout.cache == full


def test_optimiser_states_follow_the_optimiser():
    module = InverseQStar(
        policy=PolicySpec(),
        estimator=NullEstimator(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )
    assert trace_run(module, tiny_model().config, {}, WORK, "32-true").states == 0


@pytest.mark.parametrize(
    ("settings", "foreach"),
    [({}, True), ({"foreach": True}, True), ({"foreach": False}, False), ({"fused": True}, False)],
)
def test_who_takes_all_weights_at_once(settings, foreach):
    module = InverseQStar(
        policy=PolicySpec(),
        estimator=NullEstimator(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1, **settings),
    )
    found = trace_run(module, tiny_model().config, {}, WORK, "32-true")
    assert (found.foreach, found.states_assumed) == (foreach, False)


@pytest.mark.parametrize(
    ("file", "weights"), [("llama2_7b", 6_738_415_616), ("vicuna_13b", 13_015_864_320)]
)
def test_shapes_of_the_papers_models(file, weights):
    policy = empty_policy(PolicySpec(), read_architecture(SHAPES / f"{file}.json"), "bf16-mixed")
    assert policy.trainable() == (weights, weights)
    assert weights_of(policy.actor).total == 4 * weights
    head_and_embedding = 2 * 32000 * policy.actor.model.config.hidden_size
    matrices = weights - head_and_embedding // 2  # all but the embedding and the norms
    halved = weights_of(policy.frozen).total
    assert halved == pytest.approx(4 * weights - 2 * matrices, rel=1e-4)
    casts = cast_bytes(policy.actor.model, torch.bfloat16)
    assert casts == 4 * weights - halved
    assert next(policy.actor.parameters()).is_meta
    assert isinstance(policy.actor, CausalLM)


# ---- arithmetic over devices

RUN = Footprint(
    parameters=100,
    trained=100,
    policy=Weights(blocks=320, block=80, rest=80),
    as_read=0,
    frozen={"reference": Weights(blocks=160, block=40, rest=80)},
    gradients=Weights(blocks=320, block=80, rest=80),
    states=800,
    states_assumed=False,
    step_buffers=160,
    foreach=True,
    head_casts=40,
    casts=160,
    packed=500,
    rollout=Generation(cache=100, working=10),
    evaluation=Generation(cache=200, working=20),
    evaluation_scoring=50,
    scoring=30,
    stored=60,
    activations=500,
    loss=70,
    backward=5,
    flops={"rollout": 1, "scoring": 2, "update": 3},
)
ONE = Layout(devices=1, strategy="single", gpu=True, memory=10_000, libraries=1000)


def test_one_gpu_by_hand():
    plan = make_plan(RUN, ONE)
    always = 1000 + 400 + 240 + 800
    gradients = 400
    assert plan.totals == {
        "evaluation": always + 200 + 200 + 20,
        "rollout": always + 200 + 100 + 10,
        "scoring": always + 60 + 30,
        "update": always + gradients + 60 + 500 + 70 + 5,
        "step": always + gradients + 60 + 400,  # roots of all second moments at once
    }
    assert plan.peak == plan.totals["update"] == 3475
    assert plan.fits
    assert not make_plan(RUN, replace(ONE, memory=3474)).fits
    assert make_plan(RUN, replace(ONE, memory=3475)).fits


def test_a_fused_optimizer_takes_no_roots():
    fused = replace(RUN, foreach=False, step_buffers=0)
    assert make_plan(RUN, ONE).totals["step"] - make_plan(fused, ONE).totals["step"] == 400


def test_ddp_holds_all_and_no_copy_of_the_gradients():
    one, ddp = make_plan(RUN, ONE), make_plan(RUN, replace(ONE, strategy="ddp", devices=4))
    assert ddp.totals == one.totals
    assert ddp.flops == {"rollout": 4, "scoring": 8, "update": 12}


def test_sharding_halves_what_lasts():
    sharded = replace(ONE, strategy="fsdp")
    two, four = (make_plan(RUN, replace(sharded, devices=n)) for n in (2, 4))
    for part in ("policy", "reference", "gradients", "optimiser states"):
        assert two.phases["update"][part] == 2 * four.phases["update"][part]
    # Both root groups, and two of the largest blocks; all blocks of the policy to generate. Its
    # matrices, 320 bytes with the norms, are gathered in half the size: 160 less.
    assert two.phases["update"]["gathered weights"] == 160 + 2 * 40
    assert two.phases["rollout"]["gathered weights"] == 160 + 160
    assert two.phases["rollout"]["copies in autocast's dtype"] == 40  # of the head
    assert "copies in autocast's dtype" not in two.phases["update"]
    assert two.peak > four.peak > make_plan(RUN, replace(sharded, devices=8)).peak


def test_sharded_generation_without_room_gathers_block_by_block():
    narrow = replace(ONE, strategy="fsdp", devices=2, memory=1000 + 720 + 160 + 239)
    plan = make_plan(RUN, narrow)
    assert not plan.whole_blocks
    assert plan.phases["rollout"]["gathered weights"] == 160 + 2 * 40
    assert make_plan(RUN, replace(narrow, memory=narrow.memory + 1)).whole_blocks
    assert make_plan(RUN, replace(narrow, gpu=False)).whole_blocks  # CPUs always do


def test_offloaded_shards_leave_the_device():
    here = make_plan(RUN, replace(ONE, strategy="fsdp", devices=2))
    away = make_plan(RUN, replace(ONE, strategy="fsdp", devices=2, offload_frozen=True))
    assert here.peak - away.peak == 120


def test_on_cpus_the_heap_keeps_what_other_phases_gave_back():
    plan = make_plan(RUN, replace(ONE, gpu=False))
    assert plan.phases["rollout"]["packed matrices"] == 500 - 400  # the rest where gradients were
    others = (100 + 200 + 200 + 20) + (100 + 100 + 100 + 10) + 30 + 160
    assert plan.phases["update"]["heap"] == others
    assert {parts["gradients"] for parts in plan.phases.values()} == {400}  # there too


def test_with_huge_pages_only_caches_leave_something_in_the_heap():
    phases = make_plan(RUN, replace(ONE, gpu=False, heap_keeps=False)).phases
    left = {name: parts["heap"] for name, parts in phases.items()}
    assert left == {name: parts.get("KV cache", 0) for name, parts in phases.items()}
    assert left["rollout"] > 0 == left["update"]


# ---- the command


def arguments(tmp_path, tiny, *more) -> list[str]:
    options = {
        "model.policy.model": tiny,
        "model.rollout.max_new_tokens": 4,
        "data": "JSONL",
        "data.path": write_prompts(tmp_path / "rows.jsonl"),
        "data.max_prompt_tokens": 24,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
    }
    flat = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return ["plan", "--config", str(ROOT / "configs" / "quickstart.yaml"), *flat, *more]


def test_json(tmp_path, tiny, capsys):
    assert main(arguments(tmp_path, tiny, "--json", "--memory", "24")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert plan["memory_bytes"] == 24 * GIB
    assert plan["peak_bytes"] == max(plan["phase_bytes"].values())
    assert plan["fits"] is True
    assert (plan["prompt_tokens"], plan["devices"], plan["strategy"]) == (24, 1, "single")
    for phase, parts in plan["part_bytes"].items():
        assert sum(parts.values()) == plan["phase_bytes"][phase]
    flops = dict(plan["step_flops"])
    assert flops.pop("all") == sum(flops.values())


def test_table_and_no_data_read(tmp_path, tiny, capsys):
    gone = str(tmp_path / "nowhere.jsonl")
    argv = arguments(tmp_path, tiny, "--data.path", gone, "--prompt_tokens", "9")
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "prompts of 9 tokens (--prompt_tokens)" in shown
    assert "fits: " in shown
    for part in ("policy", "reference", "gradients", "optimiser states", "KV cache"):
        assert part in shown


def test_other_devices_than_those_here(tmp_path, tiny, capsys):
    eight = ["--trainer.accelerator", "gpu", "--trainer.devices", "4", "--trainer.num_nodes", "2"]
    more = [*eight, "--trainer.strategy", "fsdp", "--memory", "80", "--json"]
    assert main(arguments(tmp_path, tiny, *more)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["devices"], plan["strategy"]) == (8, "fsdp")
    assert main(arguments(tmp_path, tiny, *more, "--devices", "2")) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 2


def test_a_gpu_elsewhere_has_bfloat16(tmp_path, tiny, capsys, monkeypatch):
    """What this machine's processor prefers says nothing about it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = ["--trainer.precision", "null", "--memory", "24", "--devices", "1", "--json"]
    argv = arguments(tmp_path, tiny, *gpu, "--trainer.accelerator", "gpu")
    plan = plan_of(capsys, argv)
    assert plan["precision"] == "bf16-mixed"
    assert plan["notes"][0].startswith("assumed: bf16-mixed")
    here = plan_of(capsys, arguments(tmp_path, tiny, *gpu, "--trainer.accelerator", "auto"))
    assert here["notes"][0].startswith("assumed: CPUs")


def plan_of(capsys, argv) -> dict:
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out)


def test_without_evaluations_there_is_none_to_hold(tmp_path, tiny, capsys):
    argv = arguments(tmp_path, tiny, "--json")
    phases = plan_of(capsys, argv)["phase_bytes"]
    without = plan_of(capsys, [*argv, "--trainer.limit_val_batches", "0"])["phase_bytes"]
    assert phases.keys() - without.keys() == {"evaluation"}


def test_credits_from_a_file_need_no_scoring_and_no_reference(tmp_path, tiny, capsys):
    own = ["--model.rollout", "iqstar.scored.ScoredRollout"]
    own += ["--model.rollout.init_args.path", "credits.parquet"]
    own += ["--model.loss", "iqstar.losses.RewardImitationLoss"]
    argv = arguments(tmp_path, tiny, "--json", *own)
    plan = plan_of(capsys, argv)
    assert plan["part_bytes"]["update"]["reference"] > 0  # for the evaluations
    assert plan["part_bytes"]["update"]["frozen models' hidden states"] == 0
    assert plan["step_flops"]["scoring"] == 0
    without = plan_of(capsys, [*argv, "--trainer.limit_val_batches", "0"])
    assert "reference" not in without["part_bytes"]["update"]


def test_models_of_the_estimators_own(tmp_path, tiny, capsys):
    """Each counts, also one that two parts name: a run loads it twice."""
    kind = "iqstar.estimators."
    pair = ["--model.estimator", kind + "AlignedPairEstimator"]
    pair += ["--model.estimator.aligned", str(tiny)]

    def frozen(*more: str) -> list[int]:
        parts = plan_of(capsys, arguments(tmp_path, tiny, "--json", *more))["part_bytes"]
        return [v for k, v in next(iter(parts.values())).items() if "estimator's model" in k]

    (size,) = frozen(*pair)
    assert frozen(*pair, "--model.estimator.base", str(tiny)) == [size, size]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--memory", "0"], "--memory: must be positive"),
        (["--prompt_tokens", "-1"], "--prompt_tokens: must be positive"),
        (["--memroy", "8"], "did you mean --memory?"),
        (["--model.betta", "2"], "did you mean --model.beta?"),
        (
            ["--ckpt_path", "last"],
            "ckpt_path: last was given, but a plan loads no weights",
        ),
        (["--data.max_prompt_tokens", "null"], "give --prompt_tokens"),
        (["--architecture", "nowhere.json"], "--architecture: nowhere.json does not exist"),
        (["--architecture", "pyproject.toml"], "is no config.json of a model"),
        (["--trainer.strategy", "deepspeed"], "iqstar plan knows auto, ddp, fsdp"),
        (["--trainer.precision", "16-mixed"], "iqstar plan knows 32-true, bf16-mixed"),
        (["--trainer.accelerator", "tpu"], "iqstar plan knows cpu and gpu"),
        (["--model.policy.model", "no such model"], "model.policy.model: 'no such model'"),
        (["--trainer.devices", "two"], "trainer.devices: 'two' is no number of devices"),
        (["--trainer.devices", "0"], "trainer.devices: '0' is no number of devices"),
        (["--trainer.devices", "-2"], "trainer.devices: '-2' is no number of devices"),
        (["--data.batch_size", "0"], "data.batch_size: 0 is too small"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_bad_input(tmp_path, tiny, capsys, monkeypatch, more, message):
    monkeypatch.chdir(ROOT)
    assert main(arguments(tmp_path, tiny, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_gpu_that_is_not_here(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments(tmp_path, tiny, "--trainer.accelerator", "gpu")) == 2
    assert "trainer.devices: auto counts GPUs" in capsys.readouterr().err
    one = ("--trainer.accelerator", "gpu", "--devices", "1")
    assert main(arguments(tmp_path, tiny, *one)) == 2
    assert "--memory: there is no GPU here" in capsys.readouterr().err


def test_needs_a_config(capsys):
    assert main(["plan"]) == 2
    assert "iqstar plan needs --config FILE" in capsys.readouterr().err
    assert main(["plan", "--help"]) == 0
    assert "--architecture FILE" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "memory"),
    [
        ("llama2_7b_hh", "llama2_7b", 80),
        ("vicuna_13b_beavertails", "vicuna_13b", 80),
        ("llama2_7b_lora_24gb", "llama2_7b", 24),
    ],
)
def test_scale_configs_fit(name, shape, memory, capsys, monkeypatch):
    """And by the figure that the config's comment gives."""
    monkeypatch.chdir(ROOT)
    config = f"configs/scale/{name}.yaml"
    known = ["--architecture", str(SHAPES / f"{shape}.json"), "--memory", str(memory)]
    assert main(["plan", "--config", config, *known, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["peak_bytes"] < 0.9 * plan["memory_bytes"]
    peak = round(plan["peak_bytes"] / GIB)
    assert f"# iqstar plan: {peak} GiB of {memory}" in Path(config).read_text()


def test_a_container_has_the_memory_of_its_group(tmp_path):
    """The least of its own group and those around it counts; ``max`` is no limit."""
    group = tmp_path / "fs" / "job" / "step"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("4096\n")
    own = tmp_path / "cgroup"
    own.write_text("1:cpu:/else\n0::/job/step\n")
    assert limits(tmp_path / "fs", own) == [4096]
    assert limits(tmp_path / "fs", tmp_path / "none") == []
