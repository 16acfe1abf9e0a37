"""What a program does with a GPU in these tests, in ctypes: it runs in processes that have nothing of the tests."""

from __future__ import annotations

GPU = '''
import ctypes as _ct
class Cuda:
    """Device memory by the driver API."""
    def __init__(self, device=0):
        self.lib = _ct.CDLL("libcuda.so.1")
        self.ok("cuInit", 0)
        self.context = _ct.c_void_p()
        self.ok("cuCtxCreate_v2", _ct.byref(self.context), 0, device)
    def ok(self, name, *arguments):
        result = getattr(self.lib, name)(*arguments)
        if result:
            raise RuntimeError(f"{name}: CUDA error {result}")
    def put(self, data):
        pointer = _ct.c_uint64()
        self.ok("cuCtxPushCurrent_v2", self.context)
        self.ok("cuMemAlloc_v2", _ct.byref(pointer), _ct.c_size_t(len(data)))
        self.ok("cuMemcpyHtoD_v2", pointer, data, _ct.c_size_t(len(data)))
        self.ok("cuCtxPopCurrent_v2", None)
        return pointer, len(data)
    def get(self, held):
        pointer, size = held
        out = _ct.create_string_buffer(size)
        self.ok("cuMemcpyDtoH_v2", out, pointer, _ct.c_size_t(size))
        return out.raw
    def name(self):
        text, device = _ct.create_string_buffer(96), _ct.c_int()
        self.ok("cuCtxPushCurrent_v2", self.context)
        self.ok("cuCtxGetDevice", _ct.byref(device))
        self.ok("cuCtxPopCurrent_v2", None)
        self.ok("cuDeviceGetName", text, 96, device)
        return text.value.decode()
    def uuid(self):
        raw, device = (_ct.c_ubyte * 16)(), _ct.c_int()
        self.ok("cuCtxPushCurrent_v2", self.context)
        self.ok("cuCtxGetDevice", _ct.byref(device))
        self.ok("cuCtxPopCurrent_v2", None)
        self.ok("cuDeviceGetUuid_v2", raw, device)
        return bytes(raw).hex()
'''
"""Source of a class `Cuda` for a program under test."""
