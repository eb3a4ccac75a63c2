"""2:4 sparse products: what cuSPARSELt is asked for, what it refuses, and measurements kept on disk."""

import json
from types import SimpleNamespace

import pytest
import torch

from stepline.kernels import sparse_mm as kernel
from stepline.kernels.fp8 import E4M3, E5M2, cast
from stepline.kernels.sparse24 import pack24, soft_threshold, unpack24
from stepline.kernels.sparse_mm import Algorithm, Cache


def operands(tokens=48, rows=64, cols=96):
    draw = torch.Generator().manual_seed(0)
    x = cast(torch.randn(tokens, cols, generator=draw), E4M3)
    w = cast(soft_threshold(torch.randn(rows, cols, generator=draw)), E4M3)
    return x, w


@pytest.fixture
def cusparselt(monkeypatch):
    """torch's entry points, which check what cuSPARSELt takes, note how they are called and multiply in float64."""
    calls, packed = [], {}

    def compress(w):
        assert w.dtype == E4M3
        assert w.is_contiguous()
        assert not any(n % 32 for n in w.shape)
        made = torch.zeros(w.shape[0], w.shape[1] * 5 // 8, dtype=E4M3)  # values and metadata
        packed[made.data_ptr()] = made, pack24(w)
        return made

    def product(compressed, dense, alpha, out_dtype, transpose_result):
        w = unpack24(*packed[compressed.data_ptr()][1])
        assert dense.dtype == E4M3
        assert dense.t().is_contiguous()  # column-major
        assert not any(n % 16 for n in dense.shape)
        assert alpha.shape == (len(w),)  # one number would make the host wait
        assert alpha.dtype == torch.float32
        assert alpha.is_contiguous()
        y = alpha.double()[:, None] * (w.double() @ dense.double())
        return (y.t() if transpose_result else y).to(out_dtype).contiguous()

    def mm(compressed, dense, *, alpha, out_dtype, transpose_result, alg_id, split_k, split_k_mode):
        calls.append((alg_id, split_k, split_k_mode))
        return product(compressed, dense, alpha, out_dtype, transpose_result)

    def search(compressed, dense, bias, alpha, out_dtype, transpose_result):
        assert bias is None
        product(compressed, dense, alpha, out_dtype, transpose_result)
        return 7, 2, 1, 40

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", mm)
    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=search), raising=False)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_dequantised_operands(cusparselt, dtype):
    x, w = operands()
    expected = x.float(torch.float64) @ w.float(torch.float64).mT
    way = Algorithm(5, 2, 0)
    arguments = (x.data, w.data, x.scale * w.scale, dtype, way.alg_id, way.split_k, way.split_k_mode)
    for got in (kernel.by_cusparselt(*arguments), kernel.sparse_mm(*arguments)):
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert ((got - expected).norm() / expected.norm()).item() < (1e-6 if dtype == torch.float32 else 3e-3)
    assert cusparselt == [(5, 2, 0)]
    torch.library.opcheck(kernel.sparse_mm, arguments, test_utils="test_faketensor")


def test_the_search_gets_what_the_product_gets(cusparselt):
    x, w = operands()
    packed = torch._cslt_compress(w.data)
    assert kernel.search(packed, x.data, torch.ones(64), torch.bfloat16) == Algorithm(7, 2, 1)


@pytest.mark.parametrize("by", ["cuda", "reference"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w: (x, w[:48], torch.float32), "weights of multiples of 32, not 48 x 96"),
        (
            lambda x, w: (x[:, :80].contiguous(), w[:, :80].contiguous(), torch.float32),
            "multiples of 32, not 64 x 80",
        ),
        (lambda x, w: (x[:40], w, torch.float32), "tokens in multiples of 16, not 40"),
        (
            lambda x, w: (x.to(torch.float32).to(E5M2), w, torch.float32),
            "E4M3 operands, not torch.float8_e5m2",
        ),
        (lambda x, w: (x, w.float(), torch.float32), "E4M3 operands"),
        (lambda x, w: (x, w, torch.float64), "not torch.float64"),
        (lambda x, w: (x.t().contiguous().t(), w, torch.float32), "row-major"),
        (lambda x, w: (x[:, :64].contiguous(), w, torch.float32), "are not"),
    ],
)
def test_what_cuda_would_refuse_is_refused_everywhere(by, change, sentence):
    x, w = operands()
    x, w, dtype = change(x.data, w.data)
    run = kernel.by_cusparselt if by == "cuda" else kernel.sparse_mm
    with pytest.raises(ValueError, match=sentence):
        run(x, w, torch.ones(()), dtype, 0, 1, -1)


def test_a_dense_weight_is_no_sparse_one():
    x, _ = operands()
    dense = cast(torch.randn(64, 96), E4M3)
    with pytest.raises(ValueError, match="more than two values"):
        kernel.sparse_mm(x.data, dense.data, torch.ones(()), torch.float32, 0, 1, -1)


def test_why_a_device_has_no_sparse_products(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert "no sparse tensor cores" in kernel.missing(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "no FP8" in kernel.missing(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in kernel.missing(gpu)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert kernel.missing(gpu) is None


def test_measurements_stay_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "new" / "products.json"
    first, second = Cache(path), Cache(path)
    assert first.entries == {}
    first.put({"a": 1})
    second.put({"b": 2})  # which had not seen the first
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}
    assert Cache(path).entries == {"a": 1, "b": 2}
    assert [p.name for p in path.parent.iterdir()] == ["products.json"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    key = Cache.key(torch.device("cuda", 0), 4096, 14336, 8192, torch.bfloat16)
    assert "NVIDIA H200" in key
    assert "4096 x 14336 x 8192, e4m3 to bfloat16" in key
    assert torch.__version__ in key
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel.cache_path() == tmp_path / "stepline" / "products.json"


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_damaged_file_is_named_and_replaced(tmp_path, content):
    path = tmp_path / "products.json"
    path.write_text(content)
    cache = Cache(path)
    assert cache.entries == {}
    assert str(path) in cache.problem
    cache.put({"a": 1})
    again = Cache(path)
    assert again.entries == {"a": 1}
    assert again.problem is None


def test_a_folder_that_takes_no_files_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "products.json")
    cache.put({"a": 1})
    assert "cannot be" in cache.problem
    assert cache.entries == {"a": 1}
