"""LoRA adapters as somebody else has saved them: by peft alone, with weights that matter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch


def save_sft_adapter(base: Path, folder: Path, *, seed: int = 3, **shape: Any) -> Path:
    """An adapter with random weights on a saved base. ``shape`` goes to peft.LoraConfig."""
    import peft
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, and a deprecation inside of peft
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**{**settings, **shape})
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(str(folder))
    return folder


def edit_adapter(folder: Path, **values: Any) -> None:
    """Set keys of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits_by_peft(base: Path, adapter: Path | None, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the base with an adapter, computed by transformers and peft alone."""
    import peft
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, str(adapter))
        return model.eval()(input_ids=tokens).logits
