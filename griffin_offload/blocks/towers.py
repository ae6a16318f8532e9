"""The language model of a checkpoint that sees or hears as well: all else is left out, for text alone is run."""

from typing import Any, NoReturn

from torch import nn

from griffin_offload.errors import UsageError


class LeftOut(nn.Module):
    """In the place of a tower or a projector: holds nothing, and says so when it is used."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(f"{self._name} is left out: text alone is run here, give no images, videos or sound")


def leave_out_towers(model: Any) -> list[str]:
    """Replace every module of `model` that its language model does not consist of, all parameters gone; their names,
    none where the model knows text alone."""
    if model.config.get_text_config() is model.config:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    kept = [names[id(part)] for part in (model.get_decoder(), model.get_output_embeddings()) if id(part) in names]
    if "" in kept:
        return []
    found = [name for name, module in model.named_modules() if name and _is_outside(name, kept, module)]
    for name in found:
        model.set_submodule(name, LeftOut(name))
    return found


def left_out_parts(model: Any) -> set[str]:
    """What the names of tensors have in them, between dots, that belong to a module left out of `model`."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LeftOut)}


def _is_outside(name: str, kept: list[str], module: nn.Module) -> bool:
    """Neither kept, nor around what is kept, nor inside of something that is outside itself."""
    around = [part for part in kept if part.startswith(f"{name}.")]
    inside = [part for part in kept if name == part or name.startswith(f"{part}.")]
    parent = name.rpartition(".")[0]
    beside = not parent or any(part.startswith(f"{parent}.") for part in kept)
    return not around and not inside and beside and next(module.parameters(), None) is not None
