"""Runs Triton kernels on the CPU: python interpreted.py CASES OUT, with TRITON_INTERPRET=1, which Triton reads when
it is imported. CASES: (name of a function of triton_ops, its arguments) each; OUT gets what they return."""

import sys

import torch

from stepline.kernels import triton_ops

if __name__ == "__main__":
    cases = torch.load(sys.argv[1], weights_only=False)
    torch.save([getattr(triton_ops, name)(*arguments) for name, arguments in cases], sys.argv[2])
