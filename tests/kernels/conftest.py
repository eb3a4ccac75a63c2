"""Compiles Triton kernels for Hopper, which needs no GPU."""

import os

import pytest


@pytest.fixture
def hopper(tmp_path, monkeypatch, unavailable):
    """The PTX of a kernel: hopper(kernel, types, constants, aligned, options).

    types: of its arguments by name, without those in constants; aligned: which of them are multiples of 16.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        unavailable("TRITON_INTERPRET is set, and the interpreter compiles nothing")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compiled(kernel, types: dict, constants: dict, aligned: set, options: dict) -> str:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        even = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in aligned}
        source = ASTSource(kernel, signature, constexprs=places, attrs=even)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert ".target sm_90" in made.asm["ptx"]
        assert made.asm["cubin"][:4] == b"\x7fELF"
        return made.asm["ptx"]

    return compiled
