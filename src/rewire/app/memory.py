"""Recognises that memory ran out, whoever reports it."""

from __future__ import annotations

import errno

__all__ = ["is_exhausted"]

#: What torch, C++, and the loading of libraries and starting of threads say, in lower case.
_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "unable to allocate",
    "failed to allocate",
    "bad_alloc",
    "alloc_cpu",
    "failed to map segment",
    "can't start new thread",
    "storage size calculation overflowed",
    "invalid buffer size",
)

#: Functions by which our native code allocates; the error only says that they failed.
_ALLOCATING = ("aoti_torch_empty_strided", "aoti_torch_new_tensor_handle", "aoti_torch_clone")


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left.

    Python raises MemoryError, the system ENOMEM, torch a RuntimeError of one wording or another
    (its class OutOfMemoryError is one too), a library that does not fit an ImportError.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if not isinstance(error, RuntimeError | ImportError | OSError | ValueError):
        return False
    text = str(error).lower()
    if any(words in text for words in _WORDS):
        return True
    return "api call failed" in text and any(name in text for name in _ALLOCATING)
