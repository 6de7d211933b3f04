// Makes autograd in a CPU build of torch take tensors that say they are on a GPU; see fake_cuda.py.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

const c10::Device device(c10::DeviceType::CUDA, 0);

// One device and one stream: nothing to switch, nothing to wait for.
struct CUDAGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return device; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

namespace at { REGISTER_CUDA_HOOKS(CUDAHooks) }
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, CUDAGuard) }
