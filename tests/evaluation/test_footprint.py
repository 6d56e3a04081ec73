import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_efficiency.evaluation import bits_per_weight, bytes_on_disk, peak_memory
from tests import tiny

ROOT = Path(__file__).parent.parent.parent


class Packed(nn.Linear):
    """Codes of 4 bits, a float16 scale for each group of 8, an int32 a row, as a checkpoint would store them."""

    def __init__(self, d_in, d_out, bias=False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("codes", torch.zeros(d_out, d_in // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(d_out, d_in // 8, dtype=torch.float16))
        self.register_buffer("unpacked", torch.zeros(d_out, d_in), persistent=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(d_out)) if bias else None)


def test_bits_per_weight_by_hand():
    """4 bits and 16/8 a weight; with a dense float32 layer of half as many weights the mean is (2 * 6 + 32) / 3."""
    model = nn.Sequential(Packed(16, 8), nn.Linear(8, 8, bias=False))
    bits = bits_per_weight(model)
    assert bits.quantized == 6
    assert bits.total == pytest.approx((128 * 6 + 64 * 32) / (128 + 64))


def test_bias_counts_for_the_model_only():
    bits = bits_per_weight(nn.Sequential(Packed(16, 8, bias=True)))
    assert bits.quantized == 6
    assert bits.total == pytest.approx((128 * 6 + 8 * 32) / (128 + 8))


def test_integer_weight_of_the_full_size_is_quantized():
    layer = nn.Linear(8, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    assert bits_per_weight(layer).quantized == 8


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_dense_model(dtype, bits):
    found = bits_per_weight(tiny.build_llama().to(dtype))
    assert (found.quantized, found.total) == (None, bits)


def test_tied_head_counts_once(tmp_path):
    tied, untied = (tiny.build_llama(tie_word_embeddings=tie) for tie in (True, False))
    assert bits_per_weight(tied).total == 32
    assert bytes_on_disk(untied) - bytes_on_disk(tied) == 384 * 64 * 4


def test_bytes_on_disk_of_the_folder_is_that_of_the_model_and_a_header(tmp_path):
    model = tiny.build_llama()
    model.save_pretrained(tmp_path, max_shard_size="100kB")
    (tmp_path / "tokenizer.json").write_text("x" * 10_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert 0 < bytes_on_disk(tmp_path) - bytes_on_disk(model) < 10_000


def test_model_without_tensors():
    with pytest.raises(ValueError, match="holds no tensors"):
        bits_per_weight(nn.Sequential())


def test_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"holds no weight file.*safetensors"):
        bytes_on_disk(tmp_path)


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory()
    block = torch.ones(before // 4 + 2**26)  # 4 bytes each: more than the peak so far
    assert peak_memory() >= block.nbytes


def test_peak_memory_of_a_child_is_its_own():
    """The kernel hands the parent's ru_maxrss on to a child; a model's process must not report its starter's memory."""
    block = torch.ones(2**28)  # 1 GiB held by the parent
    script = "from hf_efficiency.evaluation.footprint import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 50_000_000 < int(done.stdout) < block.nbytes
