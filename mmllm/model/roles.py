"""What a parameter is to the optimizer, told by the type of the module that owns it or by a mark of its own."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

Role = Literal["embedding", "vector", "head", "hidden", "filters"]
"""What is looked up or added; a gain, bias or scale; what ends a network; a matrix, or a stack of them, between hidden
states; a convolution's filters."""

_MARKS = "optimizer_roles"
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def mark(module: nn.Module, **roles: Role) -> None:
    """Says what a module's own parameters are, where its type doesn't tell.

    The marks lie on the module, not on its parameters: sharding, a move from the meta device and a copy put new
    parameters into the same module. (A parameter's own attribute `optimizer_role` is read as well, while it is there.)

    Args:
        module: that owns the parameters.
        roles: by the parameter's name in the module.
    """
    missing = [name for name in roles if name not in module._parameters]
    assert not missing, f"{type(module).__name__} has no parameter {missing[0]}"
    assert set(roles.values()) <= set(get_args(Role)), roles
    module.__dict__[_MARKS] = module.__dict__.get(_MARKS, {}) | roles


def mark_all(module: nn.Module, role: Role) -> None:
    """Marks all matrices in a module, those of the modules in it included; what is marked already stays."""
    for part in module.modules():
        marked = part.__dict__.get(_MARKS, {})
        matrices: dict[str, Role] = {name: role for name, p in part._parameters.items() if p is not None and p.ndim > 1}
        mark(part, **(matrices | marked))


def parameter_roles(module: nn.Module) -> dict[str, Role]:
    """The role of each trainable parameter of a module, by the name that `named_parameters` gives it.

    What has at most one dimension is a vector. A tied parameter that is an embedding anywhere is an embedding.

    Raises:
        ValueError: a matrix lies in a module whose type says nothing of it, and is not marked.
    """
    roles: dict[int, Role] = {}
    names = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for path, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            role = _role(module, path, owner, name, parameter)
            if roles.get(id(parameter)) != "embedding":
                roles[id(parameter)] = role
    return {name: roles[key] for key, name in names.items()}


def _role(root: nn.Module, path: str, owner: nn.Module, name: str, parameter: Tensor) -> Role:
    marked = getattr(parameter, "optimizer_role", None) or owner.__dict__.get(_MARKS, {}).get(name)
    if marked is not None:
        return marked
    if parameter.ndim < 2:
        return "vector"
    if isinstance(owner, ParametrizationList):  # the weight of the module two levels up, in another form
        owner = root.get_submodule(path.rpartition(".parametrizations")[0])
    match owner:
        case nn.Embedding() | nn.EmbeddingBag():
            return "embedding"
        case _ConvNd():
            return "filters"
        case nn.Linear() | nn.Bilinear() | nn.MultiheadAttention() | nn.RNNBase() | nn.RNNCellBase():
            return "vector" if name.startswith("bias") else "hidden"
        case _ if isinstance(owner, _NORMS):
            return "vector"
    raise ValueError(
        f"{path + '.' if path else ''}{name} is a matrix of {type(owner).__name__}, which says nothing of its part in "
        f"the optimizer; mark it with mmllm.model.roles.mark(module, {name}=...), one of {', '.join(get_args(Role))}"
    )
