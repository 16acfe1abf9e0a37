// A device for PyTorch whose memory is the host's: tests of code that moves tensors between devices, without one.
// Memory is counted, so that a test sees what is freed. Everything but allocation and copies runs on the CPU.
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

constexpr auto kHere = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
std::atomic<int64_t> in_use{0};

void release(void *context) {
    auto *start = static_cast<int64_t *>(context);
    in_use -= *start;
    std::free(start);
}

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        c10::Device device(kHere, 0);
        if (size == 0)
            return {nullptr, nullptr, &release, device};
        auto *start = static_cast<int64_t *>(std::malloc(size + 64));
        TORCH_CHECK(start, "fake device: out of memory");
        *start = static_cast<int64_t>(size);
        in_use += *start;
        return {reinterpret_cast<char *>(start) + 64, start, &release, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void *to, const void *from, std::size_t size) const override { std::memcpy(to, from, size); }
};

Memory memory;
REGISTER_ALLOCATOR(kHere, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return kHere; }
    c10::Device exchangeDevice(c10::Device) const override { return {kHere, 0}; }
    c10::Device getDevice() const override { return {kHere, 0}; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    void resizePrivateUse1Bytes(const c10::Storage &storage, size_t size) const override {
        auto *held = storage.unsafeGetStorageImpl();
        auto made = memory.allocate(size);
        if (size && held->nbytes())
            std::memcpy(made.get(), held->data(), std::min(size, held->nbytes()));
        held->set_data_ptr_noswap(std::move(made));
        held->set_nbytes(size);
    }
};

at::Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                             keys, c10::dtype_or_default(dtype));
}

// A tensor of the CPU over the same bytes.
at::Tensor as_cpu(const at::Tensor &tensor) {
    auto &storage = tensor.storage();
    auto options = tensor.options().device(at::kCPU);
    auto bytes = at::from_blob(storage.mutable_data(), {static_cast<int64_t>(storage.nbytes())}, [](void *) {},
                               options.dtype(at::kByte));
    auto whole = at::empty({0}, options);
    return whole.set_(bytes.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
}

at::Tensor copy_from(const at::Tensor &from, const at::Tensor &to, bool) {
    auto source = from.is_cpu() ? from : as_cpu(from);
    auto target = to.is_cpu() ? to : as_cpu(to);
    target.copy_(source);
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor &from, const at::Tensor &to) {
    to.resize_(from.sizes());
    return copy_from(from, to, false);
}

at::Tensor &set_storage(at::Tensor &tensor, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
    auto *impl = tensor.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(std::move(storage));
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
    return tensor;
}

const at::Tensor &resize(const at::Tensor &tensor, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
    auto *impl = tensor.unsafeGetTensorImpl();
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
    auto wanted = static_cast<size_t>(impl->numel() + impl->storage_offset()) * tensor.element_size();
    if (tensor.storage().nbytes() < wanted)
        at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor.storage(), wanted);
    return tensor;
}

at::Tensor as_strided(const at::Tensor &self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
    return at::cpu::as_strided(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                               offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

at::Tensor view(const at::Tensor &self, c10::SymIntArrayRef size) {
    return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

void fall_back(const c10::OperatorHandle &op, torch::jit::Stack *stack) { at::native::cpu_fallback(op, stack); }

int64_t used() { return in_use; }

} // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("set_.source_Storage_storage_offset", set_storage);
    m.impl("resize_", resize);
    m.impl("as_strided", as_strided);
    m.impl("view", view);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }
TORCH_LIBRARY(fake_device, m) { m.def("used", used); }

static const int registered = [] {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
    return 0;
}();
