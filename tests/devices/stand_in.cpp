// A second device for tests, in the memory of the CPU: what would stop on a GPU because some tensors are on the CPU and
// some are not stops here too, and what is computed is computed by the CPU's kernels, so that results must be the CPU's.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>

namespace {

using at::IntArrayRef;
using at::Tensor;
constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device HERE(KIND, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

// --- what torch wants to know of a device ----------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &c10::free_cpu, HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream only() { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const noexcept override { return only(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return only(); }
  c10::Stream getNewStream(c10::Device, int) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Draws final : at::CPUGeneratorImpl {
  Draws() {
    device_ = HERE;
    key_set_ = KEYS;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return HERE; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Draws>(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<Draws>();
    return generator;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = memory.allocate(bytes);
    std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};
const bool HOOKED = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// --- memory: new, seen otherwise, copied -----------------------------------------------------------------------------

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& t, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}

Tensor& set_storage(Tensor& t, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::set_(t, storage, offset, size, stride);
}

Tensor& set_whole_storage(Tensor& t, at::Storage storage) {
  return at::cpu::set_(t, storage, 0, {static_cast<int64_t>(storage.nbytes() / t.dtype().itemsize())}, {1});
}

// The same memory as a tensor of the CPU.
Tensor on_cpu(const Tensor& t) {
  if (!t.is_privateuseone()) return t;
  auto held = new c10::Storage(t.storage());
  auto forget = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
  c10::DataPtr data(const_cast<void*>(held->data()), held, forget, c10::Device(c10::kCPU));
  auto size = c10::Storage::use_byte_size_t();
  c10::Storage storage(size, held->nbytes(), std::move(data), c10::GetDefaultCPUAllocator(), true);
  c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  auto found = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, t.dtype());
  found.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return found;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  at::NoGradGuard none;
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar number(const Tensor& t) { return on_cpu(t).item(); }

// --- everything else, computed on the CPU ----------------------------------------------------------------------------

// What CUDA takes from both devices: indices. Numbers without a dimension it takes everywhere.
const std::set<std::string> MIXED = {"aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put",
                                     "aten::index_put_", "aten::_index_put_impl_"};

// What CUDA has for floating point alone.
const std::set<std::string> PRODUCTS = {"aten::mm.out",    "aten::bmm.out",   "aten::addmm.out",
                                        "aten::addmv.out", "aten::baddbmm.out", "aten::dot"};

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto name = c10::toString(op.schema().operator_name());
  bool here = false, elsewhere = false;
  auto look = [&](const Tensor& t) {
    if (t.defined() && !(t.dim() == 0 && t.is_cpu())) (t.is_privateuseone() ? here : elsewhere) = true;
    TORCH_CHECK(!t.defined() || t.is_floating_point() || !PRODUCTS.count(name), name, ": CUDA multiplies no integers");
  };
  for (const auto& given : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (given.isTensor()) {
      look(given.toTensor());
    } else if (given.isTensorList()) {
      for (const auto& t : given.toTensorVector()) look(t);
    } else if (given.isOptionalTensorList()) {
      for (const std::optional<Tensor>& t : given.toOptionalTensorList()) look(t.value_or(Tensor()));
    } else if (given.isGenerator()) {
      TORCH_CHECK(given.toGenerator().device() == HERE, name, ": the generator is on the CPU, the tensors are not");
    }
  }
  TORCH_CHECK(!(here && elsewhere) || MIXED.count(name), name, ": some tensors are on the CPU and some are not");
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &number);
}

TORCH_LIBRARY(standin, m) {
  m.def("seed(int seed) -> ()", [](int64_t seed) {
    auto generator = at::detail::getPrivateUse1Hooks().getDefaultGenerator(0);
    generator.set_current_seed(seed);
  });
  m.def("state() -> Tensor", [] { return at::detail::getPrivateUse1Hooks().getDefaultGenerator(0).get_state(); });
  m.def("set_state(Tensor state) -> ()", [](const Tensor& state) {
    auto generator = at::detail::getPrivateUse1Hooks().getDefaultGenerator(0);
    generator.set_state(state);
  });
}

}  // namespace

// Under autocast the same operations are in lower precision, or in float32, as on CUDA.
namespace at::autocast {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT32_SUM(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT32_SUM)
  AT_FORALL_PROMOTE(WIDEST)
}
}  // namespace at::autocast
