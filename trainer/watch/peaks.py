"""Peak arithmetic rates of known devices, for model FLOP utilisation."""

import re

# Dense bf16 tensor-core FLOP/s from the vendor's data sheets, by the whole name that torch.cuda reports: a
# MIG slice or a sibling (A10G, H100 PCIe) is another device. V100 has no bf16; its rate is fp16's.
PEAKS = (
    (r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe", 312e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100 80GB HBM3|H100 SXM5( 80GB)?", 989e12),
    (r"H200", 989e12),
    (r"H200 NVL", 835e12),
    (r"GH200 \d+GB|GH200 144G HBM3e", 989e12),
    (r"B200", 2.25e15),
    (r"GB200", 2.5e15),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"A10", 125e12),
    (r"A10G", 70e12),
    (r"A40", 149.7e12),
    (r"GeForce RTX 4090", 165.2e12),
    (r"GeForce RTX 3090", 71e12),
    (r"V100-SXM2-\d+GB(-LS)?", 125e12),
    (r"V100-PCIE-\d+GB", 112e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device by the name of `torch.cuda.get_device_name()`; None where not known."""
    name = re.sub(r"^(NVIDIA|Tesla) ", "", re.sub(r"^NVIDIA Tesla ", "", device_name.strip()))
    for pattern, flops in PEAKS:
        if re.fullmatch(pattern, name):
            return flops
    return None


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float | None) -> float | None:
    """Model FLOP utilisation, tokens/s x FLOPs/token / peak FLOP/s (PaLM, arXiv 2204.02311, appendix B).

    `flops_per_token` counts the model's forward and backward pass and no recomputation; rate and peak are of
    the same devices: both of one, or both of all. None where the peak is not known: no default is assumed.
    """
    return None if peak_flops is None else tokens_per_second * flops_per_token / peak_flops
