// Makes a CPU build of torch treat CUDA as a device with one stream on which nothing runs.
//
// FakeTensorMode makes tensors with device "cuda", but a CPU build cannot take their backward: autograd gives every
// accelerator a thread, and asks for the device's guard, its hooks and its default stream. These are their stand-ins.
// Load the library before torch: its two `at::accelerator` functions must be found before torch's own.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

struct PretendedGuard : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  PretendedGuard() = default;
  explicit PretendedGuard(c10::DeviceType) {}
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream getNewStream(c10::Device, int) const override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

}  // namespace

namespace c10::impl {
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard)
}
}  // namespace c10::impl

namespace at {

// torch finds its hooks by this name.
struct CUDAHooks : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

namespace accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
__attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType type) {
  return type == c10::DeviceType::CUDA;
}
}  // namespace accelerator

}  // namespace at
