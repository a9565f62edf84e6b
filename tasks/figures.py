"""The picture of a run: score, KL and β by iteration."""

from __future__ import annotations

from pathlib import Path

from rlhf_core.contracts.run_folder import RunFolder


def draw_run(run: RunFolder, path: Path) -> bool:
    """Draw score, KL against its target, and β to a PNG. Returns False while no iteration is finished."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    shaped = [m for m in (run.manifest("shape_rewards", i) for i in range(run.num_finished())) if m is not None]
    if not shaped:
        return False
    steps = [m.artifact.iteration for m in shaped]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, name, title, unit in zip(
        panels,
        ("objective/scores", "objective/kl", "kl/beta"),
        ("Score", "KL to the reference", "KL coefficient β"),
        ("mean score", "nats per response", "β"),
        strict=True,
    ):
        panel.plot(steps, [m.metrics[name] for m in shaped], color="#2458a6", linewidth=1.6)
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("iteration")
        panel.set_ylabel(unit)
        panel.grid(visible=True, alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if run.config.kl.controller == "adaptive":
        panels[1].axhline(run.config.kl.target, color="#c0392b", linestyle="--", linewidth=1, label="target")
        panels[1].legend(frameon=False)
    panels[1].set_ylim(bottom=min(0.0, *(m.metrics["objective/kl"] for m in shaped)))
    panels[2].set_ylim(bottom=0.0)
    figure.suptitle(run.path.name, x=0.01, ha="left", fontsize=10, color="#555555")
    figure.savefig(path, dpi=130)
    return True
