"""A hundred planted bugs of all rooms: each is one careless line that a review could miss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    """One replaced text in one source file."""

    file: str
    text: str
    """Occurs in the file exactly once."""
    replacement: str
    about: str

    @property
    def name(self) -> str:
        """Key of its result: the list may be sorted anew."""
        return f"{self.file}: {self.about}"

    def planted(self, source: str) -> str:
        """Return the source with the bug. Raises ValueError unless the text is there exactly once."""
        if (count := source.count(self.text)) != 1:
            raise ValueError(f"{self.file} holds {self.text!r} {count} times, not once: mend the list of bugs")
        return source.replace(self.text, self.replacement)


def _ops() -> list[Bug]:
    ops = "rlhf_core/ops"
    return [
        Bug(f"{ops}/kl.py", "return 0.5 * d_BR**2", "return d_BR**2", "k2 is twice as large"),
        Bug(f"{ops}/kl.py", "torch.expm1(-clamped) + clamped", "torch.expm1(clamped) - clamped",
            "k3 of the other side"),
        Bug(f"{ops}/kl.py", "min(max(kl / target - 1.0, -0.2), 0.2)", "kl / target - 1.0", "β's error is not clipped"),
        Bug(f"{ops}/kl.py", "error * num_samples / horizon", "error / horizon", "β ignores the batch size"),
        Bug(f"{ops}/kl.py", "(error - last_error)", "error", "log_pi's proportional part has no memory"),
        Bug(f"{ops}/losses.py", "torch.maximum(unclipped, clipped)", "torch.minimum(unclipped, clipped)",
            "PPO's pessimistic bound is optimistic"),
        Bug(f"{ops}/losses.py", "clamp(1.0 - clip_range, 1.0 + clip_range_high)",
            "clamp(1.0 - clip_range, 1.0 + clip_range)", "clip-higher is ignored"),
        Bug(f"{ops}/losses.py", "(advantages < 0) & (bound < loss)", "bound < loss", "dual clip on good samples, too"),
        Bug(f"{ops}/losses.py", "return masked_sum(values_BR, mask_BR) / (num_samples * max_response_len)",
            "return masked_sum(values_BR, mask_BR) / (num_samples * mask_BR.shape[1])",
            "fixed_length divides by the padded width"),
        Bug(f"{ops}/losses.py", "old_values - value_clip_range, old_values + value_clip_range",
            "returns - value_clip_range, returns + value_clip_range", "values are clipped around the returns"),
        Bug(f"{ops}/advantages.py", "gamma * gae_lambda * running_B", "gae_lambda * running_B", "GAE decays without γ"),
        Bug(f"{ops}/advantages.py", "values_BR = torch.where(response_mask_BR, values_BR, 0.0)",
            "values_BR = values_BR.clone()", "GAE bootstraps from padding"),
        Bug(f"{ops}/advantages.py", "(sum_B - total_B) / (size_B - 1)", "sum_B / size_B",
            "RLOO's baseline holds the sample itself"),
        Bug(f"{ops}/rewards.py", "delta**2 * moments.count * n / total", "delta**2 * n / total",
            "Chan's merge of variances"),
        Bug(f"{ops}/rewards.py", "return torch.where(ended_B, score_B, penalised)",
            "return torch.where(ended_B, penalised, score_B)", "the EOS penalty hits those that ended"),
        Bug(f"{ops}/rewards.py", "per_token = -kl_coef * torch.where", "per_token = kl_coef * torch.where",
            "the KL penalty is a bonus"),
        Bug(f"{ops}/masking.py", "flat = bool(std < MIN_STD) or int(mask.sum()) < 2", "flat = int(mask.sum()) < 2",
            "whitening a constant divides by nothing"),
        Bug(f"{ops}/controller.py", "episodes=state.episodes + num_samples", "episodes=state.episodes + 1",
            "episodes count batches"),
        Bug(f"{ops}/controller.py", "max(kl_coef, MIN_KL_COEF_SHARE * config.coef)", "kl_coef",
            "β may fall to nothing"),
        Bug(f"{ops}/schedules.py", "(iteration + 1) / (warmup_iterations + 1)", "iteration / (warmup_iterations + 1)",
            "the first iteration of a warm-up learns nothing"),
        Bug(f"{ops}/randomness.py", "*map(str, purpose)", "*map(str, purpose[:2])", "all prompts share random numbers"),
        Bug(f"{ops}/frontier.py", "(weights_QN * log_weights_QN)", "(weights_QN * weights_QN)", "the tilt's entropy"),
        Bug(f"{ops}/comparison.py", "+ 0.5 * (mine_K[:, None] == other_N).double()", "", "ties count as losses"),
        Bug(f"{ops}/best_of_n.py", "math.log(n) - (n - 1) / n", "math.log(n) - (n - 1)", "KL of best-of-n"),
        Bug(f"{ops}/diversity.py", "if count else 0.0 for", "if count else 1.0 for",
            "an empty response repeats itself"),
    ]  # fmt: skip


def _contracts() -> list[Bug]:
    room = "rlhf_core/contracts"
    return [
        Bug(f"{room}/artifacts.py", '"iteration": iteration, "run": identity}', '"iteration": iteration}',
            "stage keys without the run's identity"),
        Bug(f"{room}/artifacts.py", "if digest != ref.sha256 and not is_vouched_for:", "if is_vouched_for:",
            "a damaged artifact is read"),
        Bug(f"{room}/artifacts.py", "if table.num_rows != ref.rows:", "if table.num_rows < ref.rows:",
            "rows that were added pass"),
        Bug(f"{room}/artifacts.py", "there - digests.keys()", "digests.keys() - there",
            "surplus files of a checkpoint"),
        Bug(f"{room}/durable.py", """            _ask_fences(path)
            _disk.rename(temporary, path)
        except BaseException:
            _drop(temporary)
            raise
        sync(path.parent)
    return hashlib""", """            _disk.rename(temporary, path)
        except BaseException:
            _drop(temporary)
            raise
        sync(path.parent)
    return hashlib""", "a process that lost its lock still writes files"),
        Bug(f"{room}/durable.py", "            rest = rest[written:]\n        _disk.fsync(descriptor)\n",
            "            rest = rest[written:]\n", "files are not made durable"),
        Bug(f"{room}/durable.py", "            rest = rest[written:]", "            break", "a short write passes"),
        Bug(f"{room}/durable.py", "newest = [max(numbered) for", "newest = [min(numbered) for",
            "a resume makes the oldest folder durable"),
        Bug(f"{room}/records.py", "if hashlib.sha256(body).hexdigest() != found[1].decode():", "if not body:",
            "seals are not compared"),
        Bug(f"{room}/records.py", "if len(table) != len(pairs):", "if len(table) > len(pairs):",
            "a key may stand twice"),
        Bug(f"{room}/run_folder.py", "if self.manifest(\"ppo_update\", int(name)) is not None:",
            "if self.manifest(\"shape_rewards\", int(name)) is not None:", "an iteration counts before its update"),
        Bug(f"{room}/run_folder.py", "if manifest is not None and manifest.identity not in self.identities:",
            "if manifest is None and manifest:", "manifests of another run are taken"),
        Bug(f"{room}/run_folder.py", "if until > iteration), self.identity)", "if until >= iteration), self.identity)",
            "an accepted drift begins an iteration late"),
        Bug(f"{room}/loop_state.py", "or (name in amounts and value < 0)", "", "a negative β is read"),
        Bug(f"{room}/shards.py", 'if record.get("key") != key:', 'if record.get("key") == "":',
            "a part of other inputs is taken"),
        Bug(f"{room}/shards.py", "max(began, until)", "began", "overlapping workers count twice"),
        Bug(f"{room}/archive.py", "if digest != self.files[path.name]:", "if not digest:",
            "a damaged archive is read"),
        Bug(f"{room}/archive.py", "found == sorted(set(found))", "found == sorted(found)",
            "an archive names an iteration twice"),
        Bug(f"{room}/compaction.py", "if replace(loose, timing={}) != replace(archived, timing={}):",
            "if loose.artifact.stage != archived.artifact.stage:", "another artifact than the archived one is removed"),
        Bug(f"{room}/batches.py", "torch.tensor([rows.start, rows.stop])", "torch.tensor([rows.start, rows.stop - 1])",
            "a shard loses the responses of its last prompt"),
        Bug(f"{room}/config_io.py", '("tracking", "frozen_models", "guards", "artifacts")',
            '("tracking", "frozen_models", "guards", "artifacts", "shaping")', "shaping is not part of the identity"),
        Bug(f"{room}/config_io.py", "if isinstance(event, AliasEvent):", "if event is AliasEvent:",
            "YAML aliases pass"),
        Bug(f"{room}/locking.py", "if holder.get(\"boot\") != here[\"boot\"]:\n        return True",
            "if holder.get(\"boot\") != here[\"boot\"]:\n        return False", "a lock outlives a reboot"),
        Bug(f"{room}/values.py",
            "good = (values >= low) & (values <= high)", "good = ~((values < low) | (values > high))",
            "NaN is a good value"),
        Bug("rlhf_core/identity.py", "if flat_then.get(key) != flat_now.get(key)",
            "if key in flat_then and flat_then.get(key) != flat_now.get(key)", "a new entry is no drift"),
    ]  # fmt: skip


def _stages_and_models() -> list[Bug]:
    stages, models = "rlhf_core/stages", "rlhf_core/models"
    return [
        Bug(f"{stages}/ppo_update.py", "trainer.optimizer.zero_grad(set_to_none=True)", "pass", "gradients add up"),
        Bug(f"{stages}/ppo_update.py", "    if not skipped:\n        trainer.optimizer.step()",
            "    trainer.optimizer.step()", "a step with a gradient of NaN is taken"),
        Bug("rlhf_core/updating/batch.py", "(rollouts.logprobs_BR - experience.token_kl_BR)",
            "(rollouts.logprobs_BR + experience.token_kl_BR)", "the reference's log-probs are mirrored"),
        Bug(f"{stages}/ppo_update.py", "skipped_in_a_row + 1 if record[\"skipped\"] else 0",
            "skipped_in_a_row + 1 if record[\"skipped\"] else skipped_in_a_row", "skipped steps need not be in a row"),
        Bug("rlhf_core/updating/losses.py",
            "loss - config.entropy_coef * _mean", "loss + config.entropy_coef * _mean",
            "the entropy bonus is a penalty"),
        Bug(f"{stages}/ppo_update.py", '"ppo_update", iteration, epoch).permutation',
            '"ppo_update", epoch).permutation',
            "the same minibatches in each iteration"),
        Bug(f"{stages}/ppo_update.py", "limit / (norm + 1e-6)", "1.0 / (norm + 1e-6)", "clipping always to norm 1"),
        Bug(f"{stages}/ppo_update.py", "config.critic_learning_rate or config.learning_rate", "config.learning_rate",
            "the critic's learning rate is ignored"),
        Bug(f"{stages}/generate.py", "texts.stop_detector(start * samples_per_prompt)", "texts.stop_detector(start)",
            "stop texts look at another prompt"),
        Bug(f"{stages}/generate.py", "    finite_BR |= ~mask_BR\n", "", "padding must be finite, too"),
        Bug(f"{stages}/sample_prompts.py", '"sample_prompts", epoch).permutation', '"sample_prompts").permutation',
            "each epoch has the same order"),
        Bug(f"{stages}/sample_prompts.py", "if size - position < wanted - len(chosen):",
            "if size - position <= wanted - len(chosen):", "the last batch of an epoch is lost"),
        Bug(f"{stages}/score_rewards.py", "num_prompt_tokens=int(prompts.mask_QP[row].sum())",
            "num_prompt_tokens=len(prompts.mask_QP[row])", "padding counts as prompt"),
        Bug(f"{models}/checkpoints.py", "record.get(\"identity\") not in identities",
            "record.get(\"identity\") in (None, \"\")", "a checkpoint of another run is loaded"),
        Bug(f"{models}/checkpoints.py", "if trainer.digest() != record.get(\"weights\"):", "if not record:",
            "weights are not compared with what was saved"),
        Bug(f"{models}/checkpoints.py", "value.to(parameter.device)", "torch.zeros_like(value)",
            "AdamW forgets on resume"),
        Bug(f"{models}/decoding.py", "logprobs_B.where(going_b, 0.0)", "logprobs_B",
            "log-probs after the end are stored"),
        Bug(f"{models}/decoding.py", "is_eos_b = going_b & torch.isin(draw.tokens_B, eos)",
            "is_eos_b = going_b & (draw.tokens_B == eos[0])", "only one EOS token ends a response"),
        Bug(f"{models}/decoding.py", "rows_b[keep], tokens_b[keep], going_b[keep]",
            "rows_b[: len(keep)], tokens_b[keep], going_b[keep]", "compacted rows write into others"),
        Bug(f"{models}/ending.py", "if known[wanted] in eos_ids", "if wanted in eos_ids", "EOS may be the padding"),
        Bug(f"{models}/critic_start.py", "if not context or longest is None or context >= longest:",
            "if not context or longest is None or context > longest // 2:", "a critic with half the context"),
        Bug(f"{models}/untrusted.py", "if not real.is_relative_to(home) and not real.is_relative_to(blobs):",
            "if not real.exists():", "a link may lead out of a model folder"),
    ]  # fmt: skip


def _rest_of_the_core() -> list[Bug]:
    core = "rlhf_core"
    return [
        Bug(f"{core}/store/lease.py", "now() - since >= other.lease_s", "now() - since >= 0",
            "a lease is taken from a process that lives"),
        Bug(f"{core}/store/lease.py", "found[0].owner != self._holder.owner", "found[0].owner == self._holder.owner",
            "a lost lease is not noticed"),
        Bug(f"{core}/rewards/scoring.py", "if len(found) != count:", "if len(found) < count:",
            "a reward gives too many values"),
        Bug(f"{core}/rewards/scoring.py", "if isinstance(value, bool):", "if value is bool:", "true is a score"),
        Bug(f"{core}/rewards/http.py", "2 ** (turn - 1)", "0 ** (turn - 1)", "the pause between tries does not grow"),
        Bug(f"{core}/rewards/http.py", "if len(answer) > limit:", "if len(answer) < 0:",
            "an answer of any size is read"),
        Bug(f"{core}/rewards/ready_made.py", "-abs(len(p) - target) / target", "-abs(len(p) - target)",
            "length's target without its scale"),
        Bug(f"{core}/rewards/numbers.py",
            "            return text[start:at]", "            return text[start : at + 1]",
            "a boxed answer keeps its brace"),
        Bug(f"{core}/prompts/sources.py", "for rows in (entries, columns) if config.columns else (entries,):",
            "for rows in (entries,):", "columns are not part of the identity"),
        Bug(f"{core}/prompts/columns.py", "if list(names).count(name) > 1:", "if list(names).count(name) > 2:",
            "a column that stands twice"),
        Bug(f"{core}/preflight/prompts.py", "if len(entries) < wanted:", "if len(entries) < wanted - 1:",
            "one prompt too few"),
        Bug(f"{core}/comparing/outcome.py", "/ (len(values) - 1)", "/ len(values)", "a spread of seeds is biased"),
        Bug(f"{core}/comparing/outcome.py", 'rows[0]["score"]) / kl', 'rows[0]["score"]) * kl', "gain per nat"),
        Bug(f"{core}/sweeping/grid.py", "return [first + i for i in range(numbers[0])]",
            "return [first for i in range(numbers[0])]", "all seeds of a sweep are one"),
        Bug(f"{core}/replay/comparison.py", "return _bits(stored) != _bits(replayed)",
            "return ~np.isclose(stored, replayed)", "a replay that is near passes"),
        Bug(f"{core}/replay/changes.py", "if key.startswith(_CONDITIONS):", "if key in _CONDITIONS:",
            "a replay takes execution settings"),
        Bug(f"{core}/verification/run.py", "if not first.damage or not going:", "if not first.damage or going:",
            "a run at work is said to be damaged"),
        Bug(f"{core}/run_list.py", "if finished < run.config.num_iterations:\n        return \"stopped\", \"\"",
            "if finished < run.config.num_iterations:\n        return \"finished\", \"\"",
            "a stopped run is listed as finished"),
        Bug(f"{core}/disk_use.py", "FLOAT_BYTES * saved + ADAM_BYTES * (trained + critic)",
            "FLOAT_BYTES * saved + ADAM_BYTES * trained", "the critic's optimizer takes no room"),
    ]  # fmt: skip


def _tasks_and_flows() -> list[Bug]:
    return [
        Bug("tasks/stage.py", "committed.key == key and _is_intact(session, committed)", "committed.key == key",
            "a damaged artifact is not computed again"),
        Bug("tasks/lifecycle/retention.py", "    if run.last_good is not None:\n        kept.add(run.last_good)\n", "",
            "the last good checkpoint is removed"),
        Bug("tasks/lifecycle/retention.py", "num_finished >= 2 * keep", "num_finished >= keep",
            "iterations are archived too early"),
        Bug("tasks/lifecycle/retention.py", "- run.config.kl.coef * metrics[\"objective/kl\"]", "",
            "the best checkpoint ignores the KL"),
        Bug("tasks/lifecycle/start.py", "or iteration == config.num_iterations", "", "no checkpoint at the end"),
        Bug("tasks/lifecycle/start.py",
            "    if drift:\n        raise DriftError(", "    if drift and False:\n        raise DriftError(",
            "a drift is not refused"),
        Bug("tasks/lifecycle/extension.py", "if num_iterations < finished:", "if num_iterations < 0:",
            "a run is cut short"),
        Bug("tasks/lifecycle/repair.py", "replace(before, timing={}) != replace(after, timing={})",
            "before.artifact.stage != after.artifact.stage", "a repair changes what was computed"),
        Bug("flows/guarding.py", "if all(finding.action == \"pause\" for finding in acting):",
            "if any(finding.action == \"pause\" for finding in acting):", "a guard that stops is asked about"),
    ]  # fmt: skip


BUGS: Final = (*_ops(), *_contracts(), *_stages_and_models(), *_rest_of_the_core(), *_tasks_and_flows())
