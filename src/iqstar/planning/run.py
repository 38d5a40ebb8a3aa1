"""What a run takes of one device, found by running its own code on fake tensors.

Nothing here knows an architecture, nor several devices: :mod:`iqstar.planning.memory` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iqstar.curves import token_metrics
from iqstar.distributions import HeadDistributions, TokenDistributions, Unknown
from iqstar.errors import InputError
from iqstar.head import LanguageHead, head_loss
from iqstar.logprobs import entropy, kl_divergence
from iqstar.mdp import TokenCredits, TokenSequences
from iqstar.module import InverseQStar
from iqstar.optim import parameter_groups
from iqstar.planning.empty import TRUE, cast_bytes, empty_policy, packed_bytes, weights_of
from iqstar.planning.footprint import Footprint, Generation, Weights, Workload
from iqstar.planning.scorer import TracedScorer
from iqstar.planning.tracing import Trace, fake_weights, without_memory
from iqstar.policy import AUTOCAST, Policy
from iqstar.sampling import CategoricalSampler

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def trace_run(
    module: InverseQStar,
    config: PretrainedConfig,
    own_models: dict[str, PretrainedConfig],
    workload: Workload,
    precision: str,
    device: str = "cpu",
) -> Footprint:
    """Traces a rollout, its scoring and one update of a run, and an evaluation.

    Args:
        module: The run's, with nothing loaded.
        config: The policy's architecture.
        own_models: Architectures of the estimator's own models, by name.
        workload: Sizes.
        precision: The trainer's.
        device: Type of device that is planned for; what is traced is on a CPU.

    Raises:
        InputError: If the architecture or the precision is not supported.
    """
    if precision not in (ours := ("32-true", *AUTOCAST, *TRUE)):
        raise InputError(f"trainer.precision: iqstar plan knows {', '.join(ours)}; got {precision}")
    reference = not module.rollout.credits_known or workload.evaluated_rows > 0
    held = module.frozen_precision(precision)
    policy = empty_policy(module.spec, config, precision, reference, held)
    apart = module.refresh is not None and module.refresh.of != "both"
    roles = ("reference", "estimator's copy") if apart else ("reference",)
    frozen = {} if policy.frozen is None else dict.fromkeys(roles, weights_of(policy.frozen))
    for name, other in own_models.items():
        model = empty_policy(module.spec.beside(name), other, precision).frozen
        assert model is not None
        frozen[name] = weights_of(model)
    with without_memory():
        fake_weights(*(m for m in (policy.actor, policy.frozen) if m is not None))
        tracer = _Tracer(module, policy, workload, AUTOCAST.get(precision), device)
        return tracer.footprint(frozen)


class _Tracer:
    """Traces the parts of one run; all its tensors are fake."""

    def __init__(
        self,
        module: InverseQStar,
        policy: Policy,
        work: Workload,
        dtype: torch.dtype | None,
        device: str,
    ) -> None:
        self.module = module
        self.device = device
        self.policy = policy
        self.work = work
        self.dtype = dtype
        models = [m for m in (policy.actor, policy.frozen) if m is not None]
        self.weights = [t for m in models for t in (*m.parameters(), *m.buffers())]
        plain = policy.actor.model
        self.all_casts = cast_bytes(plain, dtype)
        head = plain.get_output_embeddings()
        self.head_casts = cast_bytes(head, dtype)

    def footprint(self, frozen: dict[str, Weights]) -> Footprint:
        work, actor = self.work, self.policy.actor
        trained, parameters = self.policy.trainable()
        rollout = self.generation(work.generated_rows)
        same = work.evaluated_rows == work.generated_rows
        evaluation = rollout if same else self.generation(work.evaluated_rows)
        evaluation_scoring = self.evaluation_scoring()
        scored = self.scoring_and_update()
        micro_batches = work.step_rows / work.micro_rows
        fresh = work.step_rows / work.passes
        return Footprint(
            parameters=parameters,
            trained=trained,
            policy=weights_of(actor),
            as_read=self.as_read(),
            frozen=frozen,
            gradients=weights_of(actor, lambda p: p.grad),
            **self.optimizer(),
            head_casts=self.head_casts,
            casts=self.all_casts - self.head_casts,
            packed=packed_bytes(actor.plain, self.dtype),
            rollout=rollout,
            evaluation=evaluation,
            evaluation_scoring=evaluation_scoring,
            scoring=scored["scoring"],
            stored=scored["stored"],
            activations=scored["activations"],
            loss=scored["loss"],
            backward=scored["backward"],
            flops={
                "rollout": round(rollout.flops * fresh / max(work.generated_rows, 1)),
                "scoring": round(scored["scoring_flops"] * micro_batches / work.passes),
                "update": round(scored["update_flops"] * micro_batches),
            },
        )

    def as_read(self) -> int:
        """Bytes of the matrices that LoRA's policy holds in autocast's dtype, before the cast."""
        read: torch.dtype = getattr(torch, self.module.spec.dtype)
        cast = [p for p in self.policy.actor.parameters() if p.dtype == self.dtype != read]
        return sum(p.numel() for p in cast) * read.itemsize

    @contextmanager
    def autocast(self, kept: bool = False) -> Iterator[None]:
        """The trainer's autocast; generation keeps the casts of weights, all else does not."""
        with torch.autocast("cpu", self.dtype, self.dtype is not None, cache_enabled=kept):
            yield

    def planned(self, head: LanguageHead) -> LanguageHead:
        """The head with the chunks of the device that is planned for."""
        return replace(head, planned_on=self.device)

    def sequences(self, rows: int, more: int = 0) -> TokenSequences:
        """Prompts, ``more`` tokens of a principle, and responses of full length."""
        ids = torch.zeros(rows, self.work.prompt_tokens + more + self.work.new_tokens).long()
        return TokenSequences(
            input_ids=ids,
            attention_mask=ids == 0,
            position_ids=torch.arange(ids.shape[1]).expand_as(ids),
            predictors=torch.arange(rows * self.work.new_tokens),
        )

    @torch.no_grad()
    def generation(self, rows: int) -> Generation:
        """Reading the prompts, and the last step of decoding with a full cache."""
        if rows == 0:
            return Generation()
        lm, rollout = self.policy.actor, self.module.rollout
        length = self.work.prompt_tokens + self.work.new_tokens
        sampler = CategoricalSampler(
            temperature=self.module.temperature,
            vocab_size=lm.chat.vocab_size,
            top_k=getattr(rollout, "top_k", 0),
            top_p=getattr(rollout, "top_p", 1.0),
        )
        from iqstar.decoding import fits

        traced = self.decoding if fits(lm.plain, length) else self.growing
        lm.eval()
        with self.autocast(kept=True), Trace(self.weights) as trace:
            self.forward(rows, length - 1)
            flops = trace.flops
            trace.peak = trace.live
            logits, filled = traced(rows, trace)
            sampler.draw(logits, torch.rand(rows, dtype=torch.float64))
            peak = trace.peak - self.all_casts
        lm.train()
        head = lm.head().weight
        flops += 2 * head.numel() * rows * (self.work.new_tokens - 1)  # the first is in already
        return Generation(cache=filled, working=max(peak - filled, 0), flops=flops)

    def decoding(self, rows: int, trace: Trace) -> tuple[Tensor, int]:
        """Last logits, and bytes of the cache, of our own decoding."""
        from iqstar.decoding import advance, read

        model, work = self.policy.actor.plain, self.work
        # No two prompts are alike, and none begins as another.
        prompts = [[row, *[0] * (work.prompt_tokens - 1)] for row in range(rows)]
        context = read(model, prompts, work.new_tokens - 1, torch.device("cpu"))
        for layer in context.cache.kept:
            layer.show(rows, work.prompt_tokens + work.new_tokens - 2)
        context = advance(model, context, torch.zeros(rows).long())
        return context.logits, context.cache.nbytes

    def growing(self, rows: int, trace: Trace) -> tuple[Tensor, int]:
        """Last logits, and bytes of the cache, of transformers' ``generate``."""
        self.forward(rows, self.work.prompt_tokens)
        reading = trace.peak
        cache = self.forward(rows, self.work.prompt_tokens + self.work.new_tokens - 1)[1]
        filled = trace.live - self.all_casts
        trace.peak = max(trace.live, reading)
        return self.forward(rows, 1, cache)[0], filled

    def forward(self, rows: int, width: int, cache: Any = None) -> tuple[Tensor, Any]:
        """Last logits and cache of so many tokens, after those of a full cache."""
        seen = 0 if cache is None else self.work.prompt_tokens + self.work.new_tokens - 1
        output = self.policy.actor.model(
            input_ids=torch.zeros(rows, width).long(),
            attention_mask=torch.ones(rows, seen + width).long(),
            position_ids=torch.arange(seen, seen + width).expand(rows, width),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], output.past_key_values

    @torch.no_grad()
    def evaluation_scoring(self) -> int:
        """Scoring responses under policy and reference, as ``evaluation.divergence_sums`` does."""
        rows = self.work.scored_rows
        if rows == 0:
            return 0
        sequences = self.sequences(rows)
        with self.autocast(), Trace(self.weights) as trace:
            actor = self.policy.actor
            ours = HeadDistributions(actor.hidden(sequences), self.planned(actor.frozen_head()))
            with self.policy.reference() as model:
                head = self.planned(model.frozen_head())
                theirs = HeadDistributions(model.hidden(sequences), head)
            index = torch.arange(min(ours.rows, len(ours)))
            logp = ours.logprobs(index)
            kl_divergence(logp, theirs.logprobs(index))
            entropy(logp)
            return trace.peak

    def scoring_and_update(self) -> dict[str, int]:
        """One micro-batch under the frozen models, then under the policy, forward and backward."""
        work, module, actor = self.work, self.module, self.policy.actor
        rows, tokens = work.micro_rows, work.micro_rows * work.new_tokens
        scorer = TracedScorer(
            self.policy,
            lambda more: self.sequences(rows, more),
            lambda model: self.planned(model.frozen_head(module.temperature)),
        )
        actions, zeros = torch.zeros(tokens).long(), torch.zeros(tokens)
        credits = TokenCredits(
            actions=actions, reference=zeros, credit=zeros, weight=zeros, behaviour=zeros
        )
        with Trace(self.weights) as trace:
            target: TokenDistributions = Unknown(tokens)
            if not module.rollout.credits_known:
                with self.autocast(), torch.no_grad():
                    reference = scorer.scored()
                    target = module.estimator.estimate(scorer, reference, seed=0)
                    if module.loss.needs_behaviour:
                        scorer.scored()
                    reference.at(actions)
                    target.at(actions)
            stored, scoring, scoring_flops = trace.live, trace.peak, trace.flops
            hidden_states = sum(scorer.hidden)
            trace.peak = trace.live
            with self.autocast():
                hidden = actor.hidden(self.sequences(rows))
                kept = trace.live - stored

                def per_token(
                    logits: Tensor, index: Tensor, wanted: Tensor | None
                ) -> tuple[Tensor, dict[str, Tensor]]:
                    losses, metrics = module.loss.per_token(logits, credits[index], wanted)
                    curves = token_metrics(logits.detach(), credits[index], module.beta)
                    return losses * credits.weight[index], {**metrics, **curves}

                wanted = target.logprobs if module.loss.needs_distribution else None
                head = self.planned(actor.head(module.temperature))
                total, _ = head_loss(hidden, head, per_token, wanted)
            forward = trace.peak - stored
            trace.peak = trace.live
            del hidden
            total.backward()
            backward = trace.peak - stored
            update_flops = trace.flops - scoring_flops
        gradients = sum(p.grad.nbytes for p in actor.parameters() if p.grad is not None)
        whole = round(hidden_states * work.rollout_rows / rows)
        return {
            # The states of one scoring are there twice while they are joined.
            "scoring": scoring - stored + max(scorer.hidden, default=0),
            "stored": stored - hidden_states + whole,
            "activations": kept,
            "loss": forward - kept,
            "backward": max(backward - gradients - forward, 0),
            "scoring_flops": scoring_flops,
            "update_flops": update_flops,
        }

    def optimizer(self) -> dict[str, Any]:
        """What an optimiser step takes, as :class:`Footprint` has it."""
        trained = [p for p in self.policy.actor.parameters() if p.requires_grad]
        gradients = [p.grad for p in trained if p.grad is not None]
        try:
            optimizer = self.module.optimizer(parameter_groups(self.policy.actor))
            with Trace([*trained, *gradients]) as trace:
                optimizer.step()
        except (RuntimeError, NotImplementedError, TypeError):  # reads values, or wants a closure
            guess = 2 * sum(g.nbytes for g in gradients)
            return {"states": guess, "states_assumed": True, "step_buffers": 0, "foreach": True}
        leaves = [t for state in optimizer.state.values() for t in state.values()]
        states = sum(t.nbytes for t in leaves if isinstance(t, Tensor))
        settings = optimizer.defaults
        return {
            "states": states,
            "states_assumed": False,
            "step_buffers": max(trace.peak - states, 0),
            "foreach": settings.get("foreach", False) is not False and not settings.get("fused"),
        }
