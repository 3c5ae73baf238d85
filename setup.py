"""Builds the C++ kernels (rewire.ops.cpu._C). Everything else is in pyproject.toml.

The kernels are optional: where they cannot be built, or with REWIRE_NO_NATIVE=1, the package
installs without them and computes in plain PyTorch, slowly. With REWIRE_KERNELS=FILE, that
library is taken, built from the same sources before, and nothing is compiled.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

FOLDER = Path("src/rewire/ops/cpu")
# The stable ABI of torch 2.10: one build serves all later versions. (py_limited_api does the same
# for Python, from 3.10 on: torch's BuildExtension defines Py_LIMITED_API itself.)
DEFINES = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
# Contraction makes fused multiply-adds; vectors are passed between inlined functions only, hence no
# psabi notes.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wno-psabi",
]
# What `make asan` builds with (REWIRE_SANITIZE=1): the tests then stop at the first bad access or
# undefined operation. (Left out is what AddressSanitizer sees by itself; it takes most of the time
# of the build.)
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,vptr,pointer-overflow",
    "-fno-sanitize-recover=undefined",
]
SANITIZE = os.environ.get("REWIRE_SANITIZE", "0") not in ("", "0")
if SANITIZE:
    # (Without optimization the kernels are built in half the time, and their tests take hardly
    # longer.)
    FLAGS += [*SANITIZERS, "-fno-omit-frame-pointer", "-O0", "-g1"]


def warn(reason):
    print(
        f"\nWARNING: rewire is installed WITHOUT its C++ kernels: {reason}.\n"
        "         It works, in plain PyTorch, but many times slower.\n",
        file=sys.stderr,
    )


def native():
    """The keyword arguments of setup() that build the extension, or none."""
    if os.environ.get("REWIRE_NO_NATIVE", "0") not in ("", "0"):
        warn("REWIRE_NO_NATIVE is set")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        warn(f"torch cannot be imported while building ({error})")
        return {}

    class OptionalBuild(BuildExtension):
        """A build whose failure is a warning."""

        def build_extensions(self):
            if built := os.environ.get("REWIRE_KERNELS"):
                for extension in self.extensions:
                    target = Path(self.get_ext_fullpath(extension.name))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(built, target)
                return
            try:
                super().build_extensions()
            except Exception as error:
                if SANITIZE:
                    raise
                warn(f"they could not be compiled ({error})")

    extension = CppExtension(
        "rewire.ops.cpu._C",
        sorted(str(path) for path in FOLDER.rglob("*.cpp")),
        include_dirs=[str(FOLDER.resolve())],
        depends=sorted(str(path) for path in FOLDER.rglob("*.h")),
        define_macros=DEFINES,
        extra_compile_args=[] if platform.system() == "Windows" else FLAGS,
        extra_link_args=SANITIZERS if SANITIZE else [],
        py_limited_api=True,
        optional=not SANITIZE,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
