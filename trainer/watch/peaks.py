"""Peak arithmetic rates of known devices, for model FLOP utilisation."""

import re

# Dense bf16 tensor-core FLOP/s from the vendor's data sheets, by a plain name and by the whole name that torch.cuda
# reports: a MIG slice or a sibling (A10G, H100 PCIe) is another device. V100 has no bf16; its rate is fp16's.
PEAKS = (
    ("A100", r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe|A100 (SXM|PCIe)", 312e12),
    ("H100 SXM", r"H100 80GB HBM3|H100 SXM5( 80GB)?", 989e12),
    ("H100 PCIe", r"H100 PCIe", 756e12),
    ("H100 NVL", r"H100 NVL", 835e12),
    ("H200", r"H200 SXM", 989e12),
    ("H200 NVL", r"H200 NVL", 835e12),
    ("GH200", r"GH200 \d+GB|GH200 144G HBM3e", 989e12),
    ("B200", r"B200", 2.25e15),
    ("GB200", r"GB200", 2.5e15),
    ("L40S", r"L40S", 362e12),
    ("L40", r"L40", 181e12),
    ("L4", r"L4", 121e12),
    ("A10", r"A10", 125e12),
    ("A10G", r"A10G", 70e12),
    ("A40", r"A40", 149.7e12),
    ("RTX 4090", r"GeForce RTX 4090", 165.2e12),
    ("RTX 3090", r"GeForce RTX 3090", 71e12),
    ("V100 SXM2", r"V100-SXM2-\d+GB(-LS)?", 125e12),
    ("V100 PCIe", r"V100-PCIE-\d+GB", 112e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device by its plain name, or by that of `torch.cuda.get_device_name()`; upper or
    lower case; None where not known."""
    name = re.sub(r"^(NVIDIA|Tesla) ", "", re.sub(r"^NVIDIA Tesla ", "", device_name.strip()))
    for plain, pattern, flops in PEAKS:
        if re.fullmatch(f"{plain}|{pattern}", name, re.IGNORECASE):
            return flops
    return None


def plain_names() -> list[str]:
    """The plain names of all known devices."""
    return [plain for plain, _, _ in PEAKS]


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float | None) -> float | None:
    """Model FLOP utilisation, tokens/s x FLOPs/token / peak FLOP/s (PaLM, arXiv 2204.02311, appendix B).

    `flops_per_token` counts the model's forward and backward pass and no recomputation; rate and peak are of
    the same devices: both of one, or both of all. None where the peak is not known: no default is assumed.
    """
    return None if peak_flops is None else tokens_per_second * flops_per_token / peak_flops
