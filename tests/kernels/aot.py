"""Compiles every variant of one kernel project for real cards, without one: `TRITON_INTERPRET=0 python -m
tests.kernels.aot PROJECT`.

A process of its own, since Triton's interpreter, under which the other tests run, is chosen for a whole process. Prints
one JSON object a compilation; what it finds, the test judges.
"""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from importlib import import_module

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may have.
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}


def compile_variant(variant, target):
    """The compiled kernel of a variant for a target."""
    names = variant.function.arg_names
    constexprs = {(names.index(name),): value for name, value in variant.constexprs.items()}
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    # A name in `constexprs` that the signature types as well is a pointer that the launch leaves out (None).
    signature |= dict.fromkeys(variant.constexprs, "constexpr")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(variant.function, signature, constexprs, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if target.backend == "hip":
        options["num_warps"] = max(1, variant.num_warps // 2)  # a warp has 64 lanes there
        options["num_stages"] = min(2, variant.num_stages)
    return triton.compile(source, target=target, options=options)


def nvidia_spills(said):
    """Bytes of registers that NVIDIA's assembler says it spilled."""
    if "registers" not in said:
        raise ValueError(f"The assembler said nothing of registers: {said!r}.")
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def amd_spills(assembly):
    """Registers that AMD's compiler spills."""
    return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)))


def examine(variant, name):
    """What the test judges."""
    said = io.StringIO()
    with redirect_stdout(said):  # of the assembler: the words of the one run that made the code
        compiled = compile_variant(variant, TARGETS[name])
    found = {
        "label": variant.label,
        "target": name,
        "shared": compiled.metadata.shared,
        "matrix_wanted": variant.matrix,
        "bandwidth_bound": variant.bandwidth_bound,
    }
    if "ptx" in compiled.asm:
        ptx = compiled.asm["ptx"]
        found["spills"] = nvidia_spills(said.getvalue())
        found["matrix"] = bool(re.search(r"\b(mma\.sync|wgmma\.mma_async)", ptx))
        found["wide_loads"] = bool(
            re.search(r"ld\.global\S*\.v4\.[bf]32|ld\.global\S*\.v2\.[bf]64|cp\.async.*, (0x10|16)\b", ptx)
        )
    else:
        assembly = compiled.asm["amdgcn"]
        found["spills"] = amd_spills(assembly)
        found["matrix"] = "v_mfma" in assembly
        found["wide_loads"] = bool(re.search(r"(global|buffer)_load_dwordx4", assembly))
    return found


def main():
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # what is cached comes without the assembler's words
    project = import_module(f"hf_efficiency.kernels.{sys.argv[1]}.kernel")
    for variant in project.variants():
        for name in variant.targets or TARGETS:
            print(json.dumps(examine(variant, name)), flush=True)


if __name__ == "__main__":
    main()
