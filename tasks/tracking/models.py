"""Checkpoints in MLflow's registry: logged models, registered versions and their aliases, once each.

Other people work in the same registry. A version that was registered by hand, a model that was logged into our run,
an alias that somebody has moved: what does not carry our own marks is left alone. Knows no tracker but by its
client's methods.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from rlhf_core.contracts.run_folder import RunFolder
from tasks.lifecycle.retention import best_checkpoint, checkpoint_value
from tasks.tracking import notes as tracker_notes
from tasks.tracking.files import send_model
from tasks.tracking.refusals import error_code, is_missing

logger = logging.getLogger(__name__)

MODEL_TYPE: Final = "transformers-policy"
RUN_TAG: Final = "rlhf.run_id"
ITERATION_TAG: Final = "rlhf.iteration"
OURS_TAG: Final = "rlhf.outbox"
"""Of a version: its aliases carry marks."""
MARK: Final = "rlhf.alias."
"""Prefix of the tag of a version that we have given an alias."""
_UNFIT: Final = re.compile(r"[/:.%\"']")
"""What MLflow takes in no name of a logged model."""


class TrackedModels:
    """The checkpoints of a run in the tracker.

    Args:
        run: the run folder.
        client: of the tracker.
        run_id: of the run there.
        experiment_id: likewise.
        outbox: our own name of the run.
        link: shows models as outputs of the run: model id -> iteration.
    """

    def __init__(
        self,
        run: RunFolder,
        client: Any,
        run_id: str,
        experiment_id: str,
        outbox: str,
        link: Callable[[Mapping[str, int]], None],
    ) -> None:
        self.run, self.client, self.run_id, self.experiment_id = run, client, run_id, experiment_id
        self.outbox, self._link = outbox, link
        self.name = run.config.tracking.registered_model
        self.versions = self._registered()
        """Iteration of each checkpoint that is registered -> its version."""
        self._ids: dict[int, str] = {}

    @property
    def ids(self) -> Mapping[int, str]:
        """Iteration of each registered checkpoint -> its logged model; asked for once."""
        if self._ids.keys() != self.versions.keys():
            found = {_iteration_of(model.params): str(model.model_id) for model in self._models()}
            self._ids = {iteration: found[iteration] for iteration in self.versions if iteration in found}
        return self._ids

    def send_new(self) -> None:
        """Send the checkpoints that are not registered yet."""
        if new := [iteration for iteration in self.run.checkpoints() if iteration not in self.versions]:
            for iteration in new:
                self._send(iteration)
            self.link_outputs()

    def link_outputs(self) -> None:
        """Show the registered models on the run's page; a second time is refused by the tracker."""
        outputs = self.client.get_run(self.run_id).outputs
        there = {output.model_id for output in outputs.model_outputs} if outputs else set[str]()
        found = {m.model_id: _iteration_of(m.params) for m in self._models() if m.model_id not in there}
        if links := {model_id: i for model_id, i in found.items() if i is not None and i in self.versions}:
            self._link(links)

    def set_aliases(self) -> None:
        """Give the newest, the best and the last good checkpoint their aliases."""
        newest = max(self.versions, default=None)
        for alias, iteration in (
            ("newest", newest), ("best", best_checkpoint(self.run)), ("last_good", self.run.last_good)
        ):  # fmt: skip
            if iteration in self.versions:
                self._set_alias(alias, self.versions[iteration])

    def remove_doubles(self) -> None:
        """Undo what was created twice, because a first request was carried out after we had given it up."""
        self.versions = self._registered()
        sources = [str(v.source) for v in self.client.search_model_versions(f"run_id = '{self.run_id}'")]
        for iteration in self.versions:
            same = self._models(self._model_name(iteration))
            kept = next((m for m in same if any(m.model_id in source for source in sources)), None)
            for model in same:
                if kept is not None and model is not kept and not any(model.model_id in source for source in sources):
                    self.client.delete_logged_model(model.model_id)
        for model in self._models():  # retention was faster than the tries to register it
            is_used = any(model.model_id in source for source in sources)
            if not is_used and _iteration_of(model.params) not in {*self.versions, *self.run.checkpoints()}:
                self.client.delete_logged_model(model.model_id)

    def _send(self, iteration: int) -> None:
        """A checkpoint's policy folder as a logged model and a registered version, which says that all is there."""
        folder = self.run.checkpoint_path(iteration) / "policy"
        if not folder.is_dir():  # retention was faster
            return
        there = self._models(self._model_name(iteration))
        model = there[0] if there else self.client.create_logged_model(
            self.experiment_id,
            name=self._model_name(iteration),
            source_run_id=self.run_id,
            params={"iteration": str(iteration)} | tracker_notes.model_tags(self.run),
            model_type=MODEL_TYPE,
        )  # fmt: skip
        send_model(self.client, model.model_id, folder)
        self.client.finalize_logged_model(model.model_id, "READY")
        value = checkpoint_value(self.run, iteration)
        history = self.client.get_metric_history(self.run_id, "checkpoint/value")
        if math.isfinite(value) and iteration not in {metric.step for metric in history}:
            self.client.log_metric(
                self.run_id, "checkpoint/value", value, model.creation_timestamp, iteration, model_id=model.model_id
            )
        self._register(iteration, model.model_id)
        if iteration == max(self.versions):  # the last good one is written late
            self._set_alias("newest", self.versions[iteration])

    def _register(self, iteration: int, model_id: str) -> None:
        try:
            self.client.create_registered_model(self.name)
        except Exception as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {RUN_TAG: self.run_id, ITERATION_TAG: str(iteration), OURS_TAG: self.outbox}
        if iteration not in (registered := self._registered()):
            version = self.client.create_model_version(
                self.name,
                f"models:/{model_id}",
                run_id=self.run_id,
                tags=tags | tracker_notes.model_tags(self.run),
                description=tracker_notes.version_note(self.run, iteration),
                model_id=model_id,
                await_creation_for=0,
            )
            registered[iteration] = str(version.version)
        self.versions |= registered

    def _registered(self) -> dict[int, str]:
        """Iteration of each checkpoint that we have registered -> its version; a second one of ours is removed."""
        kept: dict[int, str] = {}
        found = self.client.search_model_versions(f"name = '{self.name}' and run_id = '{self.run_id}'")
        ours = {model.model_id for model in self._models()} if found else set[str]()
        for version in sorted(found, key=lambda version: int(version.version)):
            iteration = _iteration_of({"iteration": version.tags.get(ITERATION_TAG, "")})
            if iteration is None or version.tags.get(RUN_TAG) != self.run_id:
                continue  # registered by hand
            if iteration not in kept:
                kept[iteration] = str(version.version)
            elif not version.aliases and str(version.source).removeprefix("models:/") in ours:  # not a person's copy
                self.client.delete_model_version(version.name, str(version.version))
        return kept

    def _models(self, *names: str) -> list[Any]:
        """Our logged models of this run, or those of a name, the oldest first."""
        named = "".join(f" and name = '{name}'" for name in names)
        return [
            model
            for model in self._pages(f"source_run_id = '{self.run_id}'{named}")
            if model.model_type == MODEL_TYPE and _iteration_of(model.params) is not None
        ]

    def _pages(self, filters: str) -> Iterator[Any]:
        order, token = [{"field_name": "creation_timestamp", "ascending": True}], None
        while True:
            page = self.client.search_logged_models([self.experiment_id], filters, order_by=order, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _model_name(self, iteration: int) -> str:
        return f"{_UNFIT.sub('-', self.run.path.name)}-{iteration:06d}"

    def _set_alias(self, alias: str, version: str) -> None:
        """Move an alias, unless a person has moved it: then the version it is on does not carry our mark."""
        there = self.client.get_registered_model(self.name).aliases.get(alias)
        if there is not None and str(there) == version:
            return
        before = self._version(str(there)) if there is not None else None
        is_older_release = before is not None and RUN_TAG in before.tags and OURS_TAG not in before.tags
        if before is not None and MARK + alias not in before.tags and not is_older_release:
            logger.warning(
                "the alias %s of %s was moved by hand to version %s, and stays there", alias, self.name, before.version
            )
            return
        self.client.set_model_version_tag(self.name, version, MARK + alias, "set by rlhf-flow")
        self.client.set_registered_model_alias(self.name, alias, version)
        if before is not None and MARK + alias in before.tags:
            self.client.delete_model_version_tag(self.name, str(before.version), MARK + alias)

    def _version(self, version: str) -> Any:
        try:
            return self.client.get_model_version(self.name, version)
        except Exception as error:
            if is_missing(error):  # somebody has deleted it
                return None
            raise


def _iteration_of(values: Mapping[str, str]) -> int | None:
    """The iteration among a model's params; None where somebody else has made it."""
    text = str(values.get("iteration", ""))
    return int(text) if text.isascii() and text.isdecimal() else None
