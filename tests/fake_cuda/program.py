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
        self.ok("cuCtxPushCurrent_v2", self.context)  # a thread begins with none
        self.ok("cuMemcpyDtoH_v2", out, pointer, _ct.c_size_t(size))
        self.ok("cuCtxPopCurrent_v2", None)
        return out.raw
    def lock(self, data):
        """A copy of the data in ordinary memory that is page-locked where it lies."""
        import mmap
        memory = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = data
        self.ok("cuCtxPushCurrent_v2", self.context)
        self.ok("cuMemHostRegister_v2", _ct.byref(_ct.c_char.from_buffer(memory)), _ct.c_size_t(len(data)), 0)
        self.ok("cuCtxPopCurrent_v2", None)
        return memory
    def host(self, data):
        """A copy of the data in page-locked memory of the driver's."""
        pointer = _ct.c_void_p()
        self.ok("cuCtxPushCurrent_v2", self.context)
        self.ok("cuMemHostAlloc", _ct.byref(pointer), _ct.c_size_t(len(data)), 0)
        self.ok("cuCtxPopCurrent_v2", None)
        _ct.memmove(pointer, data, len(data))
        return (_ct.c_char * len(data)).from_address(pointer.value)
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
