"""Stand-ins for torch and sentence-transformers: what the guide's programs use of them, over the driver API.

They keep the answer "how many GPUs" as torch does, so that it is seen whether it is put right after a thaw.
"""

from __future__ import annotations

from fake_cuda.program import GPU

__all__ = ["SENTENCE_TRANSFORMERS", "TORCH"]

TORCH = {
    "__init__.py": "from torch import cuda\n",
    "cuda.py": GPU
    + """
import os
_cached_device_count = None
def _count():
    if os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    try:
        lib = _ct.CDLL("libcuda.so.1")
    except OSError:
        return 0
    n = _ct.c_int()
    return n.value if lib.cuInit(0) == 0 and lib.cuDeviceGetCount(_ct.byref(n)) == 0 else 0
def device_count():
    global _cached_device_count
    if _cached_device_count is None:
        _cached_device_count = _count()
    return _cached_device_count
def is_available():
    return device_count() > 0
def is_initialized():
    return False
""",
}
SENTENCE_TRANSFORMERS = """
import hashlib, torch
class SentenceTransformer:
    def __init__(self, path, device):
        self.weights = hashlib.sha256(path.encode()).digest() * (1 << 18)
        self.device = None
        self.to(device)
    def to(self, device):
        if device == "cuda":
            self.device = torch.cuda.Cuda()
            self.held = self.device.put(self.weights)
            self.weights = None
    def encode(self, sentences, normalize_embeddings):
        weights = self.device.get(self.held) if self.device else self.weights
        return [hashlib.sha256(weights + s.encode()).hexdigest()[:16] for s in sentences]
"""
