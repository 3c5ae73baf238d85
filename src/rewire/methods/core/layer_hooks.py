"""Hooks that a method puts on layers, so that they act for that method and in that model alone."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

__all__ = ["LayerHook", "release"]


class LayerHook:
    """What a forward hook of a method belongs to: register its bound methods, as in
    ``register_forward_hook(h.after)``.

    Copying a model copies its hooks. A plain function would go on acting for the method of the
    original; a bound method of this class becomes one of `copied`, which knows no method. Pickles
    hold the same.
    """

    def __init__(self, method: Any) -> None:
        self._method = weakref.ref(method)

    @property
    def method(self) -> Any:
        """The method, or None: in copies, and once it is gone."""
        found = self.__dict__.get("_method")
        return None if found is None else found()

    def copied(self) -> LayerHook:
        """The hook that a copy of the model has."""
        return type(self).__new__(type(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHook:
        return self.copied()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revived, (type(self), self.copied().__dict__)


def _revived(kind: type[LayerHook], state: dict[str, Any]) -> LayerHook:
    hook = kind.__new__(kind)
    hook.__dict__ |= state
    return hook


def release(model: nn.Module) -> None:
    """Take off the hooks that came with a copied model: another method is about to act on it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, LayerHook) and owner.method is None:
                    del hooks[number]
                    for more in (
                        module._forward_pre_hooks_with_kwargs,
                        module._forward_hooks_with_kwargs,
                        module._forward_hooks_always_called,
                    ):
                        more.pop(number, None)
