"""Loading a part of a base from safetensors."""

from pathlib import Path
from typing import Any


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """Loads a model from safetensors. Missing weights are an error here; the libraries would use random ones.

    Args:
        kind: class of the model, of diffusers or transformers.
        folder: of its config and weights.
        options: of `from_pretrained`.

    Raises:
        ValueError: if it cannot be loaded, or the weights do not fit the config.
    """
    try:
        model, facts = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be loaded ({error}). Download or copy it again.") from error
    wrong = sorted(map(str, [*facts["missing_keys"], *facts["mismatched_keys"]]))
    if wrong:
        raise ValueError(
            f"the weights in {folder} do not fit its config: {len(wrong)} tensors are missing or of another shape, "
            f"e.g. {wrong[0]}. Download or copy the base again."
        )
    return model
