"""Packets hold what their sender says that receivers decode, in as many bytes as the arithmetic gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepline.comm.chunking import packed_bytes
from stepline.comm.codec import ChunkCodec, pack_bits, unpack_bits
from stepline.comm.packets import largest


@given(st.integers(1, 20), st.lists(st.integers(0, 2**20 - 1), max_size=40))
def test_bits_come_back(bits, numbers):
    numbers = torch.tensor([n % 2**bits for n in numbers], dtype=torch.int64)
    packed = pack_bits(numbers, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(len(numbers), bits)
    assert torch.equal(unpack_bits(packed, bits, len(numbers)), numbers)
    # The definition: number i stands in bits [i * bits, (i + 1) * bits) of the whole.
    whole = int.from_bytes(bytes(packed.tolist()), "little")
    assert [whole >> i * bits & (2**bits - 1) for i in range(len(numbers))] == numbers.tolist()


@pytest.mark.parametrize("codec", ["fp32", "int8", "sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e4])
def test_receivers_decode_what_the_sender_subtracts(codec, dtype, scale):
    chunks = torch.randn(10, 4096, dtype=dtype) * scale
    chunks[3] = 0
    chunks[4, 5:] = 0
    indices, values = largest(chunks, 32)
    form = ChunkCodec(10, 4096, 32, codec, dtype)
    packet, sent = form.encode(indices, values)
    assert packet.dtype == torch.uint8
    assert len(packet) == form.num_bytes
    shifted = torch.cat([packet.new_zeros(3), packet])[3:]  # a packet may begin anywhere in a buffer
    got_indices, got = form.decode(shifted)
    assert torch.equal(got_indices, indices)
    assert torch.equal(got, sent)
    assert got.dtype == dtype
    worst = values.abs().amax(dim=1, keepdim=True)
    if codec == "fp32":
        assert torch.equal(sent, values)
    elif codec == "int8":
        assert ((sent - values).abs() <= worst * (0.51 / 127 + 2**-8)).all()
    else:
        assert torch.equal(sent.sign()[values != 0][:100], values.sign()[values != 0][:100])
        mean = values.abs().mean(dim=1, keepdim=True)
        assert ((sent.abs() - mean).abs() <= mean * 2**-8).all()


def test_bytes_of_a_parameter():
    """k = 32 of 64 x 64: 12-bit index + int8 + a scale of 2 bytes is .0200 bytes for each parameter."""
    per_parameter = {
        codec: ChunkCodec(1, 4096, 32, codec, torch.float32).num_bytes / 4096
        for codec in ("fp32", "int8", "sign")
    }
    assert per_parameter["fp32"] == 32 * (12 + 32) / 8 / 4096
    assert per_parameter["int8"] == pytest.approx(0.0200, abs=5e-5)
    assert per_parameter["sign"] == (32 * 13 / 8 + 2) / 4096


def test_no_chunks_make_no_bytes():
    form = ChunkCodec(0, 64, 4, "int8", torch.float32)
    packet, sent = form.encode(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4))
    assert packet.numel() == form.num_bytes == 0
    assert form.decode(packet)[1].shape == sent.shape == (0, 4)


@given(
    st.integers(0, 5),
    st.sampled_from([(1024, 20), (1024, 3), (4096, 82), (257, 5), (64, 64), (52, 1), (1000, 13), (16, 9)]),
    st.integers(0, 2**32),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_largest_magnitudes_of_each_row(rows, shape, seed, ties):
    elements, kept = shape
    chunks = torch.randn(rows, elements, generator=torch.Generator().manual_seed(seed))
    if ties:
        chunks = chunks.round()
    indices, values = largest(chunks, kept)
    assert torch.equal(values, chunks.gather(1, indices))
    assert all(len(set(row)) == kept for row in indices.tolist())
    for row, found in zip(chunks.tolist(), values.tolist(), strict=True):
        assert sorted(map(abs, found)) == sorted(map(abs, row))[-kept:]
