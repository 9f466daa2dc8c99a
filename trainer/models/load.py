"""Loading a base: a diffusers folder, a hub id, or a bare `config.json` with random weights."""

import inspect
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.base_folder import read_class_config, resolve_base, weight_files
from trainer.models.facts import ModelFacts
from trainer.models.families import FAMILIES, family_of

_WEIGHTS = "diffusion_pytorch_model"


def _transformer_folder(base: Path) -> Path:
    """`base` itself if it is a transformer folder, else its `transformer` subfolder."""
    return base / "transformer" if (base / "transformer" / "config.json").is_file() else base


def _transformer_config(path: Path) -> dict:
    """The fields of a transformer's config; those that it leaves out have the class's defaults."""
    fields = read_class_config(path, *FAMILIES)
    known = inspect.signature(_class_of(fields).__init__).parameters.values()
    return {p.name: p.default for p in known if p.default is not p.empty} | fields


def _class_of(config: dict) -> Any:
    return family_of(config).transformer_class


def read_facts(config: dict) -> ModelFacts:
    """What a config that `read_config` gave says, in the words of all families."""
    return family_of(config).facts(config)


def transformer_weight_files(base: str) -> list[Path]:
    """The safetensors files of a base's transformer, one or many.

    Raises:
        ValueError: if the base is missing or lacks one of them.
    """
    return weight_files(_transformer_folder(resolve_base(base)), _WEIGHTS)


def _check_weights(base: str, config: dict) -> None:
    """Every shard is there and whole, and together they hold the config's tensors.

    Only safetensors headers are read: their byte counts are compared with the file's. diffusers itself would fill a
    missing tensor with whatever the memory held, and go on.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in transformer_weight_files(base):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or truncated ({error}). Download or copy it again.") from error
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in _class_of(config).from_config(config).named_parameters()}
    odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if odd:
        raise ValueError(
            f"the weights of base {base!r} do not fit its config: {len(odd)} tensors differ, e.g. {odd[0]} (got "
            f"{found.get(odd[0], 'none')}, expected {wanted.get(odd[0], 'none')}). Download or copy the base again."
        )


def read_config(base: str) -> dict:
    """The transformer's config of a base, checked to be of a known family; no weight is read."""
    path = resolve_base(base)
    if path.is_file():
        return _transformer_config(path)
    config = _transformer_folder(path) / "config.json"
    if not config.is_file():
        mend = "" if Path(base).exists() else f" The download is incomplete: run `hf download {base}` again."
        raise ValueError(
            f"{path} holds no transformer/config.json and no config.json; expected a diffusers folder.{mend}"
        )
    return _transformer_config(config)


def read_scheduler(base: str) -> dict[str, Any] | None:
    """The config of a base's scheduler; None for a base that is a transformer or a config alone.

    Raises:
        ValueError: if it is no JSON object.
    """
    path = resolve_base(base) / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download the base again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is a {type(config).__name__}, expected an object; copy or download the base again.")
    return config


def check_base(base: str) -> dict:
    """Like `read_config`, and the weight files are there and whole (headers only: seconds, whatever their size).

    Raises:
        ValueError: if they are not, or the base's scheduler is for other noise than the family's.
    """
    fields = read_config(base)
    scheduler = read_scheduler(base)
    if scheduler is not None:
        family_of(fields).check_scheduler(scheduler)
    if resolve_base(base).is_dir():
        _check_weights(base, fields)
    return fields


def load_transformer(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    float32_from: int | None = None,
) -> Any:
    """The transformer of a base, diffusers' class of its family.

    Args:
        base: what `resolve_base` takes. A `config.json` gives random weights, made on `device`.
        dtype: dtype of the weights, but for those that diffusers keeps in float32 in any case (some of Wan's).
        device: where they are made; "meta" makes shapes only.
        seed: for random weights.
        float32_from: blocks from this one on, what follows them and parameters that are never trained are in float32
            whatever `dtype`: a trunk in bfloat16 meets a head whose master weights are float32.

    Raises:
        ValueError: if the base is missing, of an unknown family, incomplete or truncated.
    """
    model = _load(base, dtype, device, seed)
    if float32_from is not None and dtype != torch.float32:
        _widen(model, base, float32_from)
    return model


@torch.no_grad()
def _widen(model: Any, base: str, first: int) -> None:
    family = FAMILIES[type(model).__name__]
    # Mochi's frequencies give the rotary angles of every block: in bfloat16 an angle of 100 would be off by a quarter.
    outside = [model.get_parameter(name) for name in family.never_trained]
    for part in (*family.blocks_of(model)[first:], *family.output_parts(model), *outside):
        if isinstance(part, nn.Module):
            part.float()
        else:
            part.data = part.data.float()
    if resolve_base(base).is_dir() and model.device.type != "meta":
        wide = {name: p for name, p in model.named_parameters() if p.dtype == torch.float32}
        for name, value in read_weights(base, wide.keys()).items():  # the narrow dtype has rounded them
            wide[name].copy_(value)


def read_weights(base: str, names: Collection[str]) -> dict[str, Tensor]:
    """Weights of a base folder by name, float32 on the CPU; its other weights are not read.

    Raises:
        ValueError: if the folder lacks one.
    """
    found: dict[str, Tensor] = {}
    for path in transformer_weight_files(base):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).float() for name in file.keys() if name in names}  # noqa: SIM118
    missing = sorted(set(names) - found.keys())
    if missing:
        raise ValueError(f"base {base!r} lacks {missing[:4]}; the base is incomplete. Download or copy it again.")
    return found


def _load(base: str, dtype: torch.dtype, device: torch.device | str, seed: int) -> Any:
    config = check_base(base)
    path = resolve_base(base)
    if path.is_file() or torch.device(device).type == "meta":
        with torch.device(device), torch.random.fork_rng(devices=_cuda_index(device)):
            torch.manual_seed(seed)
            previous = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                model = _class_of(config).from_config(config)
            finally:
                torch.set_default_dtype(previous)
        for name, parameter in model.named_parameters():  # as `from_pretrained` does; `from_config` does not
            if family_of(config).keeps_float32(name):
                parameter.data = parameter.data.float()
        return model
    model = _class_of(config).from_pretrained(
        _transformer_folder(path), torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return model.to(device)


def _cuda_index(device: torch.device | str) -> list[int]:
    device = torch.device(device)
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]
